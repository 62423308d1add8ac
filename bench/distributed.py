"""Losses of a batch that several processes share, beside open_clip's and a dense gather; gloo, one machine.

    python bench/distributed.py                       two and four ranks, 1,024 rows of 256 features each
    python bench/distributed.py Clip --ranks 2 --rows 2048 --features 512
    python bench/distributed.py --quick               a smoke check at a tiny size; nothing is kept

Values and averaged gradients must agree with those of the dense gather first. Then the contestants take turns on the
same ranks; medians of the slowest rank, and ratios within a round. Memory is the largest growth of a rank's resident
set in one step, in processes of their own. Ranks share the machine's cores, one thread each: what is compared is work
and memory, not a network. Results go to bench/results/distributed.json and into the table of docs/distributed.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import machine
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.multiprocessing as mp
import torch.nn.functional as F
from results import merge

TABLE = machine.ROOT / "docs" / "distributed.md"
BEGIN, END = "<!-- measured: begin (written by bench/distributed.py) -->", "<!-- measured: end -->"
OURS = {"flashpair, gather": "GATHER", "flashpair, ring": "RING"}
CASES = {
    "ClipLoss": [*OURS, "dense gather", "open_clip, local_loss"],
    "SigLipLoss": [*OURS, "dense gather", "open_clip, bidir"],
    "SupConLoss": [*OURS, "dense gather"],
}


@functools.cache
def open_clip():
    """Its loss module alone, None where it is not installed."""
    try:
        files = importlib.metadata.files("open_clip_torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    path = next(f.locate() for f in files if f.name == "loss.py" and f.parent.name == "open_clip")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gathered(value: torch.Tensor) -> torch.Tensor:
    """All ranks' rows, differentiable: what most code does."""
    return torch.cat(dist.nn.all_gather(value))


def dense(case: str, x, y, labels) -> torch.Tensor:
    x = gathered(x)
    if case == "SupConLoss":
        every = [torch.empty_like(labels) for _ in range(dist.get_world_size())]
        dist.all_gather(every, labels)
        labels, x = torch.cat(every), F.normalize(x)
        own = torch.eye(len(x), dtype=torch.bool)
        s = (x @ x.T / 0.1).masked_fill(own, -torch.inf)
        same = (labels[:, None] == labels[None, :]) & ~own
        log_p = torch.where(same, s - s.logsumexp(1, keepdim=True), 0.0)
        return -(log_p.sum(1) / same.sum(1).clamp_min(1)).mean()
    logits = 20.0 * x @ gathered(y).T
    at = torch.arange(len(logits))
    if case == "ClipLoss":
        return (F.cross_entropy(logits, at) + F.cross_entropy(logits.T, at)) / 2
    signs = 2 * torch.eye(len(logits)) - 1
    return -F.logsigmoid(signs * (logits - 10.0)).sum() / len(logits)


def loss_of(case: str, contestant: str):
    """(x, y, labels) → loss; None where the contestant cannot run."""
    from flashpair import losses
    from flashpair.distributed import Exchange, Group

    if contestant == "dense gather":
        return functools.partial(dense, case)
    if contestant in OURS:
        found = getattr(losses, case)(group=Group(exchange=Exchange[OURS[contestant]]))
    elif open_clip() is None:
        return None
    else:
        how = {"local_loss": True, "gather_with_grad": True} if case == "ClipLoss" else {"dist_impl": "bidir"}
        found = getattr(open_clip(), case)(rank=dist.get_rank(), world_size=dist.get_world_size(), **how)
    if case == "SupConLoss":
        return lambda x, y, labels: found(x, labels)
    bias = [torch.tensor(-10.0)] if case == "SigLipLoss" else []
    return lambda x, y, labels: found(x, y, torch.tensor(20.0), *bias)


def inputs(rows: int, features: int) -> tuple:
    g = torch.Generator().manual_seed(dist.get_rank())
    x, y = (F.normalize(torch.randn(rows, features, generator=g), dim=1).requires_grad_() for _ in range(2))
    return x, y, torch.randint(0, max(rows // 4, 1), (rows,), generator=g)


def step(function, given) -> tuple[float, torch.Tensor, list]:
    """Seconds of forward and backward on this rank; the mean of the values over the ranks; gradients."""
    dist.barrier()
    start = time.perf_counter()
    value = function(*given)
    gradients = torch.autograd.grad(value, given[:2], allow_unused=True)
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return seconds.item(), mean / dist.get_world_size(), [g for g in gradients if g is not None]


def rank_main(rank: int, ranks: int, store: str, out: str, options: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    case, contestants = options["case"], options["contestants"]
    functions = {name: loss_of(case, name) for name in contestants}
    functions = {name: f for name, f in functions.items() if f is not None}
    small = inputs(32, 16)
    want = step(functions.get("dense gather") or functools.partial(dense, case), small)
    found: dict[str, dict] = {}
    for name, function in functions.items():
        _, value, gradients = step(function, small)
        off = max((g - w).norm() / w.norm() for g, w in zip(gradients, want[2], strict=True)).item()
        off = max(off, ((value - want[1]) / want[1]).abs().item())
        found[name] = {"defect": f"differs by {off:.1e}"} if off > 1e-4 else {"seconds": []}
    given = inputs(options["rows"], options["features"])
    if options["memory"]:
        (name,) = contestants
        memory = machine.PeakMemory()
        memory.start()
        step(functions[name], given)
        growth = torch.tensor(float(memory.growth()))
        dist.all_reduce(growth, dist.ReduceOp.MAX)
        found[name]["growth"] = int(growth)
    else:
        for turn in range(options["rounds"] + 1):  # the first warms up
            for name, function in functions.items():
                if "defect" not in found[name]:
                    seconds = step(function, given)[0]
                    found[name]["seconds"] += [seconds] * (turn > 0)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(ranks: int, **options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out.json")
        mp.start_processes(
            rank_main, (ranks, os.path.join(folder, "store"), out, options), nprocs=ranks, start_method="spawn"
        )
        return json.loads(Path(out).read_text())


def measure(case: str, ranks: int, options) -> dict:
    size = {"rows": options.rows, "features": options.features, "rounds": options.rounds}
    found = on_ranks(ranks, case=case, contestants=CASES[case], memory=False, **size)
    typical = next(iter(found))
    row: dict = {"case": case, "ranks": ranks, "batch": ranks * options.rows, "width": options.features, "times": {}}
    for name, result in found.items():
        if "defect" in result:
            row["times"][name] = result
            continue
        ratios = [s / t for s, t in zip(result["seconds"], found[typical]["seconds"], strict=True)]
        row["times"][name] = {
            "seconds": statistics.median(result["seconds"]), "ratio": statistics.median(ratios),
            "low": min(ratios), "high": max(ratios),
        }  # fmt: skip
        if not options.quick or name == typical:
            alone = on_ranks(ranks, case=case, contestants=[name], memory=True, **size)
            row["times"][name]["growth"] = alone[name]["growth"]
    facts = machine.describe()
    return row | {**facts, "threads": "1 a rank", "commit": machine.commit()}


def table(rows: list[dict]) -> list[str]:
    lines = ["| loss | ranks × rows | D | contestant | step | against the first | growth of a rank | |"]
    lines.append("|---|---|---:|---|---:|---|---:|---|")
    for row in rows:
        stale = "stale" if machine.is_stale(row) else ""
        for name, found in row["times"].items():
            place = f"| `{row['case']}` | {row['ranks']} × {row['batch'] // row['ranks']:,} | {row['width']} | {name} |"
            if "defect" in found:
                lines.append(f"{place} WRONG: {found['defect']} | | | {stale} |")
                continue
            ratio = "{ratio:.2f}x ({low:.2f}-{high:.2f})".format(**found)
            growth = f"{found['growth'] / 2**20:.0f} MiB" if "growth" in found else "-"
            lines.append(f"{place} {1e3 * found['seconds']:.0f} ms | {ratio} | {growth} | {stale} |")
    machines = sorted({f"{r['device']}, threads: {r['threads']}, torch {r['torch']}, {r['date']}" for r in rows})
    return [*(f"- {m}" for m in machines), "", *lines]


def write_table(rows: list[dict]) -> None:
    TABLE.write_text(machine.with_block(TABLE, BEGIN, END, [*table(rows), ""]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="losses whose name contains one of these (default: all)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, default=1024, help="of each rank")
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="64 rows, memory of the first only, results to out/")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/distributed.json)")
    options = parser.parse_args()
    if options.quick:
        options.ranks, options.rows, options.features, options.rounds = [2], 64, 16, 1
    kept = machine.RESULTS / "distributed.json"
    out = options.out or (machine.ROOT / "out" / "distributed-quick.json" if options.quick else kept)
    from tqdm import tqdm

    wrong = 0
    cases = [c for c in CASES if not options.patterns or any(p.lower() in c.lower() for p in options.patterns)]
    for case, ranks in tqdm([(c, r) for c in cases for r in options.ranks], unit="case"):
        row = measure(case, ranks, options)
        wrong += any("defect" in found for found in row["times"].values())
        merge(out, [row], ("case", "ranks", "batch", "width", "device"))
    print("\n".join(table(json.loads(out.read_text()))))
    if out == kept:
        write_table(json.loads(out.read_text()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
