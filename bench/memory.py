"""Peak extra memory of every loss, forward + backward, each in a fresh process.

    python bench/memory.py                          every loss at B = 65536, D = 64, default and smallest workspace
    python bench/memory.py clip --batch 4096 --implementations flashpair dense metric-learning
    python bench/memory.py --sweep                  a few losses at many B, with dense code and peers, for the curves
    python bench/memory.py --quick                  a smoke check at a tiny size; nothing is kept

Counted is the growth of the resident memory beyond the interpreter, the libraries and the inputs; the gradients of the
inputs are part of it. An implementation is measured for the losses that have it; the names are those of run.py.
Results go to bench/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import curves
import machine
from results import merge
from timers import step

QUEUED = "cross-batch-memory"
TOO_SLOW = ("all-triplets",)  # at the sizes that are measured here
#: What the curves show, each where a loss has it.
SWEPT = ("flashpair", "dense", "compile", "chunked", "open_clip", "metric-learning")
WARM_UP = 256  # rows of the step that loads libraries and starts threads
FEW = 96  # for which a case with columns of its own makes few of them


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "patterns", nargs="*", help="measure the losses whose name contains one of these (default: all)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[65536])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--implementations", nargs="+", default=["flashpair"])
    parser.add_argument("--workspace", choices=["default", "smallest"], nargs="+", default=["default", "smallest"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sweep", action="store_true", help="a few losses at many B, D = 128, for the report's curves")
    parser.add_argument("--quick", action="store_true", help="512 rows, results to out/ only")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/memory.json)")
    parser.add_argument(
        "--child", nargs=5, metavar=("CASE", "BATCH", "WIDTH", "IMPLEMENTATION", "WORKSPACE"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.sweep:
        options.batch, options.width = [b for b in curves.BATCHES if b >= 1024], curves.WIDTH
        options.workspace = ["default"]
        options.implementations = list(SWEPT)
    if options.quick:
        options.batch, options.width = [512], 16
    options.out = options.out or (
        machine.ROOT / "out/memory-quick.json" if options.quick else machine.RESULTS / "memory.json"
    )
    return options


def cross_batch_memory(inputs):
    """Contrastive loss of a batch against a queue of its own length; the queue is part of the memory counted."""
    from flashpair.losses import ContrastiveLoss, CrossBatchMemory

    batch, width = inputs.x.shape
    return CrossBatchMemory(ContrastiveLoss(), width, memory_size=batch)(inputs.x, inputs.labels)


def peer_cross_batch_memory(inputs):
    """The same by pytorch-metric-learning."""
    from peers import installed

    losses = installed("pytorch_metric_learning.losses")
    batch, width = inputs.x.shape
    return losses.CrossBatchMemory(losses.ContrastiveLoss(), width, memory_size=batch)(inputs.x, inputs.labels)


def dense_cross_batch_memory(inputs):
    from dense import dense_memory_contrastive

    inputs.memory, inputs.memory_labels = inputs.x.detach().clone(), inputs.labels
    return dense_memory_contrastive(inputs)


def all_cases():
    from cases import CASES, FORWARD, PEER, Case, Peer
    from inputs import labelled

    ours = [case for case in CASES if case.directions != (FORWARD,) and case.name not in (QUEUED, *TOO_SLOW)]
    peers = {PEER: Peer(peer_cross_batch_memory, 15.0)}
    extra = Case(QUEUED, labelled(4, float("inf")), cross_batch_memory, dense_cross_batch_memory, peers)
    return (*ours, extra)


def jobs_of(cases: list, options: argparse.Namespace) -> list[tuple[str, int, int, str, str]]:
    """(case, batch, width, implementation, workspace) of everything to measure.

    Raises:
        SystemExit: on an implementation that none of the losses has.
    """
    known = {case.name: list(case.implementations()) for case in cases}
    every = list(dict.fromkeys(name for names in known.values() for name in names))
    absent = [name for name in options.implementations if name not in every]
    if absent and not options.sweep:
        raise SystemExit(f"no loss asked for has the implementation {absent[0]!r}; there are {', '.join(every)}")
    return [
        (case.name, batch, width, implementation, workspace)
        for case in cases
        for batch, width in ((not options.quick and case.sizes) or [(b, options.width) for b in options.batch])
        for implementation in options.implementations
        if implementation in known[case.name]
        for workspace in (options.workspace if implementation == "flashpair" else ["default"])
    ]


def measure(name: str, batch: int, width: int, implementation: str, workspace: str, threads: int) -> dict:
    """One measurement; to be called in a fresh process."""
    import torch
    from peers import CannotRun

    import flashpair.workspace

    torch.set_num_threads(threads)
    if workspace == "smallest":
        flashpair.set_max_workspace_bytes(flashpair.workspace.MINIMUM_BYTES)
    case = next(c for c in all_cases() if c.name == name)
    function = case.implementations()[implementation]
    needs = case.needs_bytes(implementation, batch)
    if needs > 0.5 * available_bytes():
        return {"not_run": f"needs about {needs / 2**30:.0f} GiB"}
    try:
        step(function, case.make(FEW if case.sizes else WARM_UP, width))
    except CannotRun as reason:
        return {"not_run": str(reason)}
    inputs = case.make(batch, width)
    memory = machine.PeakMemory()
    memory.start()
    start = time.perf_counter()
    loss = step(function, inputs)
    seconds = time.perf_counter() - start
    if not torch.isfinite(loss):
        return {"not_run": f"wrong: the loss is {loss.item()}"}
    return {
        "mebibytes": round(memory.growth() / 2**20, 1),
        # Both sides of S; a queue has the length of the batch.
        "columns": case.columns(batch),
        "inputs_mebibytes": round(sum(t.nbytes for t in inputs.leaves) * (1 + (name == QUEUED)) / 2**20, 1),
        "seconds": round(seconds, 2),
    }


def available_bytes() -> float:
    import psutil

    return float(psutil.virtual_memory().available)


def limit(row: dict) -> float | None:
    """MiB that flashpair promises at B = 65536, D = 64; None where nothing is promised."""
    if row["implementation"] != "flashpair" or (row["batch"], row["width"]) != (65536, 64) or "mebibytes" not in row:
        return None
    return 400.0 if row["workspace"] == "default" else 5 * row["inputs_mebibytes"] + 2 * int(row["threads"])


def main() -> int:
    options = arguments()
    if options.child:
        name, batch, width, implementation, workspace = options.child
        found = measure(name, int(batch), int(width), implementation, workspace, options.threads)
        print(json.dumps({**found, **machine.describe()}))
        return 0
    from tqdm import tqdm

    if options.sweep:
        options.patterns = curves.CASES
    cases = [c for c in all_cases() if not options.patterns or any(p in c.name for p in options.patterns)]
    cases = [c for c in cases if c.name in options.patterns] if options.sweep else cases
    if not cases:
        raise SystemExit(f"no loss matches {options.patterns}; there are {', '.join(c.name for c in all_cases())}")
    jobs = jobs_of(cases, options)
    rows, status = [], 0
    for job in tqdm(jobs, desc="memory", disable=None):
        command = [sys.executable, __file__, "--child", *map(str, job)]
        environment = machine.environment("default", options.threads)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found = json.loads(done.stdout.splitlines()[-1])
        else:
            message = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
            found = {"not_run": message[:200], **machine.describe()}
        row = {**dict(zip(("case", "batch", "width", "implementation", "workspace"), job, strict=True)), **found}
        row["sweep"] = options.sweep
        rows.append(row)
        allowed = limit(row)
        over = allowed is not None and row["mebibytes"] > allowed
        status |= over or ("not_run" in row and row["implementation"] == "flashpair")
        text = row.get("not_run") or f"{row['mebibytes']:8.1f} MiB  {row['seconds']:6.2f} s"
        promised = "" if allowed is None else f"  allowed {allowed:.0f}{', exceeded' if over else ''}"
        tqdm.write(f"{job[0]:<20} {job[1]:>6} {job[3]:<18} {job[4]:<9} {text}{promised}")
    merge(options.out, rows, ("case", "batch", "width", "implementation", "workspace", "threads", "device"))
    print(f"wrote {options.out}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
