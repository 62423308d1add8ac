"""Speed of the losses, forward + backward: flashpair, dense PyTorch, torch.compile of it, and public peers.

    python bench/run.py                          every case at B = 4096, D = 128 and 512, both allocators
    python bench/run.py clip ms --batch 8192     cases whose name contains a pattern
    python bench/run.py --quick                  a smoke check at tiny sizes; nothing is kept

Every implementation is first compared with the dense loss in float64 (value and all gradients); a wrong one is reported
and never timed. Contestants are timed round by round in one process with pinned threads, one process per allocator
setting. Results go to bench/results/speed.json; `python bench/report.py` turns them into a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine

CHILD = "FLASHPAIR_BENCH_CHILD"
GATE_BATCH = 4096  # larger batches are checked at this size


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="run the cases whose name contains one of these (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[4096])
    parser.add_argument("--width", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="implementations to run (default: all)")
    parser.add_argument("--allocator", choices=[*machine.ALLOCATORS, "both"], default="both")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds, results to out/ only")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/speed.json)")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.width, options.rounds, options.allocator = [96], [16], 2, "default"
    options.out = options.out or (
        machine.ROOT / "out/speed-quick.json" if options.quick else machine.RESULTS / "speed.json"
    )
    return options


# --- one step ---------------------------------------------------------------------------------------------------------


def step(function, inputs):
    """Forward + backward → loss; gradients are in inputs.leaves."""
    for leaf in inputs.leaves:
        leaf.grad = None
    loss = function(inputs)
    loss.backward()
    return loss


def timed(function, inputs, device: str) -> float:
    """Seconds of one step, on inputs that no step saw before: flashpair may keep S between passes over equal ones."""
    import torch

    with torch.no_grad():
        inputs.x.mul_(1 + 1e-6)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(function, inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# --- correctness gate -------------------------------------------------------------------------------------------------


def results_of(function, inputs) -> list:
    loss = step(function, inputs)
    return [t.detach().double().cpu() for t in (loss, *(leaf.grad for leaf in inputs.leaves))]


def errors(found: list, truth: list) -> list[float]:
    """Largest error of the loss and of each gradient, relative to the largest true entry; NaN is infinite."""
    import torch

    relative = [
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in zip(found, truth, strict=True)
    ]
    return [torch.inf if e != e else e for e in relative]


def gate(implementation, inputs, truth: list, allowed: list[float]) -> str:
    """Empty where right, else what is wrong."""
    names = ["loss", *(f"gradient {i}" for i in range(len(truth) - 1))]
    found = errors(results_of(implementation, inputs), truth)
    wrong = [
        f"{n}: error {e:.1e}, allowed {a:.1e}" for n, e, a in zip(names, found, allowed, strict=True) if not e <= a
    ]
    return "wrong: " + "; ".join(wrong) if wrong else ""


# --- one case at one size ---------------------------------------------------------------------------------------------


def available_bytes() -> float:
    import psutil

    return float(psutil.virtual_memory().available)


def admit(case, batch: int, width: int, options) -> tuple[dict, dict[str, str]]:
    """Implementations that fit, run and are right; and the reasons against the others."""
    import torch
    from cases import CannotRun

    dtype = getattr(torch, options.dtype)
    rows = min(batch, GATE_BATCH)
    inputs = case.make(rows, width).to(dtype, options.device)
    truth = results_of(case.dense, inputs.to(torch.float64))
    epsilon = torch.finfo(dtype).eps
    # A small multiple of what dense PyTorch itself loses in this dtype, plus a few roundings.
    allowed = [8 * e + 64 * epsilon for e in errors(results_of(case.dense, inputs), truth)]
    admitted, reasons = {}, {}
    for name, function in case.implementations().items():
        if options.only and name not in options.only:
            continue
        needs = case.needs_bytes(name, batch)
        if needs > 0.5 * available_bytes() and options.device == "cpu":
            reasons[name] = f"needs about {needs / 2**30:.0f} GiB"
            continue
        try:
            wrong = gate(function, inputs, truth, allowed)
        except (CannotRun, RuntimeError, MemoryError, ImportError) as error:
            reasons[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            continue
        if wrong:
            reasons[name] = wrong
        else:
            admitted[name] = function
    return admitted, reasons


class ForeignLoad:
    """Share of the machine that other processes used meanwhile: a measurement above a few percent is doubtful."""

    def __init__(self) -> None:
        import psutil

        self._system = psutil.cpu_times
        self._start = self._busy(), time.process_time(), time.perf_counter()

    def _busy(self) -> float:
        times = self._system()
        return times.user + times.system + times.nice

    def share(self) -> float:
        busy, own, wall = self._start
        foreign = (self._busy() - busy) - (time.process_time() - own)
        return max(0.0, foreign / ((time.perf_counter() - wall) * (os.cpu_count() or 1)))


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    edge = len(ordered) // 10
    return {
        "median": statistics.median(ordered),
        "low": ordered[edge],
        "high": ordered[-1 - edge],
        "samples": len(ordered),
    }


def compete(case, batch: int, width: int, options, bar) -> dict:
    import torch

    bar.set_postfix_str(f"{case.name} {batch}x{width}: check")
    torch._dynamo.reset()  # sizes are compiled one by one, as constants
    admitted, reasons = admit(case, batch, width, options)
    inputs = case.make(batch, width).to(getattr(torch, options.dtype), options.device)
    samples: dict[str, list[float]] = {name: [] for name in admitted}
    for function in admitted.values():
        step(function, inputs)  # warm: code is compiled, kept memory is there
    load = ForeignLoad()
    names = list(admitted)
    for r in range(options.rounds):
        for name in names[r % len(names) :] + names[: r % len(names)] if names else []:
            bar.set_postfix_str(f"{case.name} {batch}x{width}: {name}")
            samples[name].append(timed(admitted[name], inputs, options.device))
        bar.update()
    ours = samples.get("flashpair", [])
    return {
        "case": case.name,
        "batch": batch,
        "width": width,
        "dtype": options.dtype,
        "allocator": options.allocator,
        "milliseconds": {name: spread([1e3 * t for t in times]) for name, times in samples.items()},
        # Of pairs from one round: what disturbed one contestant disturbed the other.
        "times_flashpair": {
            name: spread([t / o for t, o in zip(times, ours, strict=True)])
            for name, times in samples.items()
            if ours and name != "flashpair"
        },
        "not_run": reasons,
        "foreign_load": round(load.share(), 3),
        **machine.describe(options.device),
    }


# --- processes --------------------------------------------------------------------------------------------------------


def child(options) -> list[dict]:
    """All selected cases, in this process."""
    import torch
    from cases import CASES
    from tqdm import tqdm

    torch.set_num_threads(options.threads)
    selected = [c for c in CASES if not options.patterns or any(p in c.name for p in options.patterns)]
    if not selected:
        raise SystemExit(f"no case matches {options.patterns}; there are {', '.join(c.name for c in CASES)}")
    rows = []
    jobs = [(c, b, d) for b in options.batch for d in options.width for c in selected]
    with tqdm(
        total=len(jobs) * options.rounds, desc=f"{options.allocator} allocator", unit="round", disable=None
    ) as bar:
        for case, batch, width in jobs:
            rows.append(compete(case, batch, width, options, bar))
            bar.write(summary(rows[-1]))
    return rows


def summary(row: dict) -> str:
    """One row as text."""
    lines = [f"{row['case']} B={row['batch']} D={row['width']} {row['dtype']}, {row['allocator']} allocator"]
    for name, t in row["milliseconds"].items():
        ratio = row["times_flashpair"].get(name)
        times = f"{ratio['median']:6.2f}x flashpair ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""
        lines.append(f"  {name:<16} {t['median']:9.2f} ms ({t['low']:.2f}-{t['high']:.2f})  {times}")
    lines += [f"  {name:<16} not run: {reason}" for name, reason in row["not_run"].items()]
    return "\n".join(lines)


def merge(path: Path, rows: list[dict], key: tuple[str, ...]) -> None:
    """Write rows into a result file; a row replaces the one that measured the same thing on the same device."""
    known = json.loads(path.read_text()) if path.exists() else []
    table = {tuple(row[k] for k in key): row for row in [*known, *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([table[k] for k in sorted(table, key=str)], indent=1) + "\n")


def main() -> int:
    options = arguments()
    if os.environ.get(CHILD):
        rows = child(options)
        merge(options.out, rows, ("case", "batch", "width", "dtype", "allocator", "threads", "device"))
        print(f"wrote {options.out}")
        return 1 if any(reason.startswith("wrong") for row in rows for reason in row["not_run"].values()) else 0
    allocators = list(machine.ALLOCATORS) if options.allocator == "both" else [options.allocator]
    status = 0
    for allocator in allocators:
        command = [sys.executable, *sys.argv, "--allocator", allocator]
        environment = {**machine.environment(allocator, options.threads), CHILD: "1"}
        status |= subprocess.run(command, env=environment, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
