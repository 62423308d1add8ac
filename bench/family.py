"""Every loss of the pair-based family beside pytorch-metric-learning's class of the same name.

    python bench/family.py                    forward + backward at B = 4096, D = 128, four rows a class
    python bench/family.py FastAP Triplet     losses whose name contains one of these
    python bench/family.py --large            time and memory of ours alone at B = 65536, D = 64
    python bench/family.py --quick            a smoke check at a tiny size; nothing is kept

Each loss has a process of its own, whose address space ends where the memory does: a peer that does not fit
says so. Value and gradient must agree on a small batch first, where the peer is right. Then both take turns; medians
and the median ratio with its range. Results go to bench/results/family.json and into the table of docs/losses.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine
import torch
from run import merge

TABLE = machine.ROOT / "docs" / "losses.md"
BEGIN, END = "<!-- measured: begin (written by bench/family.py) -->", "<!-- measured: end -->"
RANKED = {"margin": 0.4, "Tn": 10}

#: Name → arguments; those of one class under several names say what differs.
LOSSES: dict[str, dict] = {
    "AngularLoss": {},
    "BinomialDevianceLoss": {},
    "CentroidTripletLoss": {},
    "CircleLoss": {},
    "ContrastiveLoss": {},
    "DynamicSoftMarginLoss": {},
    "FastAPLoss": {},
    "GeneralizedLiftedStructureLoss": {},
    "HistogramLoss": {},
    "ICNNLoss": {},
    "InstanceLoss": {},
    "IntraPairVarianceLoss": {},
    "LiftedStructureLoss": {},
    "MarginLoss": {},
    "MultiSimilarityLoss": {},
    "NCALoss": {},
    "NPairsLoss": {},
    "NTXentLoss": {},
    "PNPLoss": {},
    "PairCircleLoss": {},
    "ProtoTripletLoss": {},
    "RankedListLoss": RANKED,
    "SignalToNoiseRatioContrastiveLoss": {},
    "SmoothAPLoss": {},
    "SupConLoss": {},
    "ThresholdConsistentMarginLoss": {},
    "TripletMarginLoss": {},
    "TripletMarginLoss (smooth)": {"smooth_loss": True},
    "TripletMarginLoss (swap)": {"swap": True},
    "TripletSemiHardLoss": {},
    "TupletMarginLoss": {},
}

#: Where the peer's value is another one, or its gradient is (tests/test_family_peer.py); it is timed all the same.
DIFFERENT = {"AngularLoss", "DynamicSoftMarginLoss", "SmoothAPLoss"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="losses whose name contains one of these (default: all)")
    parser.add_argument("--large", action="store_true", help="ours alone at B = 65536, D = 64, with its memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="no further round of a loss after this")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="128 rows, results to out/ only")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/family.json)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch, options.width = (128, 16) if options.quick else (65536, 64) if options.large else (4096, 128)
    quick = machine.ROOT / "out" / "family-quick.json"
    options.out = options.out or (quick if options.quick else machine.RESULTS / "family.json")
    return options


def inputs(batch: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random embeddings; classes of four (of eight where B is large), sorted as the peer's SmoothAP needs them."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(batch) // (8 if batch > 32768 else 4)
    return torch.randn(batch, width, generator=g).requires_grad_(), labels


def make(module, name: str):
    return getattr(module, name.split()[0])(**LOSSES[name])


def step(module, name: str, x: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    """(seconds, loss, gradient); a fresh loss every time, since one of the peer's cannot be called twice."""
    loss_of = make(module, name)
    start = time.perf_counter()
    loss = loss_of(x, labels)
    (gradient,) = torch.autograd.grad(loss, x)
    return time.perf_counter() - start, loss.detach(), gradient


def gate(name: str, ours, peer) -> str:
    """Empty, or what is wrong."""
    if name in DIFFERENT:
        return ""
    x, labels = inputs(96, 16)
    x = x.double().detach().requires_grad_()
    (_, a, da), (_, b, db) = (step(m, name, x, labels) for m in (ours, peer))
    loose = 1e-5 if name == "HistogramLoss" else 1e-7  # float32 inside
    off = max(abs((a - b) / b).item(), ((da - db).norm() / db.norm()).item())
    return "" if off < loose else f"value or gradient differ by {off:.1e}"


def child(options) -> None:
    from flashpair import losses as ours

    torch.set_num_threads(options.threads)
    name = options.child
    x, labels = inputs(options.batch, options.width)
    step(ours, name, *inputs(256, options.width))  # libraries and threads
    row = {"batch": options.batch, "width": options.width}
    if options.large:
        memory = machine.PeakMemory()
        memory.start()
        seconds, loss, gradient = step(ours, name, x, labels)
        assert loss.isfinite() and gradient.isfinite().all()
        print(json.dumps(row | {"seconds": seconds, "growth": memory.growth()}))
        return
    from pytorch_metric_learning import losses as peer

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (int(0.85 * memory),) * 2)
    why = "" if hasattr(peer, name.split()[0]) else "no such class"
    defect = "" if why else gate(name, ours, peer)
    if defect:
        print(json.dumps(row | {"defect": defect}))
        return
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    start = time.perf_counter()
    for turn in range(options.rounds + 1):  # the first warms up
        for side, module in (("ours", ours), ("peer", peer)):
            if side == "peer" and why:
                continue
            try:
                seconds = step(module, name, x, labels)[0]
            except (RuntimeError, MemoryError) as error:
                if side == "ours":
                    raise
                why = "does not fit" if "alloc" in str(error) or isinstance(error, MemoryError) else str(error)[:60]
                continue
            slow = side == "peer" and seconds > options.seconds  # once is enough
            if turn or slow:
                times[side].append(seconds)
            why = f"{seconds:.0f} s, timed once" if slow else why
        if turn and time.perf_counter() - start > options.seconds:
            break
    row |= {"seconds": statistics.median(times["ours"]), "rounds": len(times["ours"]), "why": why}
    if times["peer"]:
        typical = statistics.median(times["ours"])
        ratios = sorted(
            p / (o if len(times["peer"]) > 1 else typical) for o, p in zip(times["ours"], times["peer"], strict=False)
        )
        row |= {"ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
    print(json.dumps(row))


def measure(name: str, options) -> dict:
    command = [sys.executable, __file__, "--child", name, "--rounds", str(options.rounds)]
    command += ["--seconds", str(options.seconds), "--threads", str(options.threads)]
    command += ["--large"] * options.large + ["--quick"] * options.quick
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    row = {"loss": name, "batch": options.batch, "width": options.width}
    if done.returncode:
        row["defect"] = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:120]
    else:
        row |= json.loads(done.stdout.splitlines()[-1])
    facts = machine.describe()
    return row | {**facts, "threads": options.threads, "commit": machine.commit(), "sources": machine.source_hash()}


def describe_row(row: dict) -> str:
    if "defect" in row:
        return f"WRONG: {row['defect']}"
    if "growth" in row:
        return f"{row['seconds']:.1f} s, {row['growth'] / 2**20:.0f} MiB"
    peer = f"peer {row['ratio']:.1f}x ({row['low']:.1f}-{row['high']:.1f})" if "ratio" in row else f"peer: {row['why']}"
    return f"{1e3 * row['seconds']:.0f} ms, {peer}"


def table(rows: list[dict]) -> list[str]:
    """Both sizes of each loss on a line."""
    sources = machine.source_hash()
    lines = ["| loss | B = 4096, D = 128 | pytorch-metric-learning takes | B = 65,536, D = 64 | its memory | |"]
    lines.append("|---|---|---|---|---|---|")
    for name in LOSSES:
        small, large = (next((r for r in rows if r["loss"] == name and r["batch"] == b), None) for b in (4096, 65536))
        if small is None and large is None:
            continue
        cells = ["-"] * 4
        if small and "seconds" in small:
            cells[0] = f"{1e3 * small['seconds']:.0f} ms"
            cells[1] = small["why"]
            if "ratio" in small:
                cells[1] = f"**{small['ratio']:.1f}x** ({small['why'] or '{low:.1f}-{high:.1f}'.format(**small)})"
        if large and "seconds" in large:
            cells[2], cells[3] = f"{large['seconds']:.0f} s", f"{large['growth'] / 2**20:.0f} MiB"
        stale = [r for r in (small, large) if r and r["sources"] != sources]
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {'stale' if stale else ''} |")
    machines = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}, {r['date']}" for r in rows})
    return [*(f"- {m}" for m in machines), "", *lines]


def write_table(rows: list[dict]) -> None:
    TABLE.write_text(machine.with_block(TABLE, BEGIN, END, [*table(rows), ""]))


def main() -> int:
    options = arguments()
    if options.child:
        child(options)
        return 0
    from tqdm import tqdm

    names = [n for n in LOSSES if not options.patterns or any(p.lower() in n.lower() for p in options.patterns)]
    defects = 0
    bar = tqdm(names, unit="loss")
    for name in bar:
        row = measure(name, options)
        defects += "defect" in row
        bar.write(f"{name:36s} {describe_row(row)}")
        if "defect" not in row:
            merge(options.out, [row], ("loss", "batch", "width", "device"))
    if not options.quick and options.out.exists():
        write_table(json.loads(options.out.read_text()))
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
