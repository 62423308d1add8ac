"""Losses beside other code for the same, each in a process of its own: what family.py and contrast.py share.

A process's address space ends where the memory does: a contestant that does not fit says so. Value and gradient
must agree on a small batch first, where the other is right. Then both take turns; medians, the median ratio, its range.
At the large size ours runs alone, once, unless an eighth of the batch says that this takes too long.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
from results import merge
from torch import Tensor

END = "<!-- measured: end -->"
PART = 8  # of a large batch, which says how long all of it takes


@dataclass
class Suite:
    """What is compared, and where its results go."""

    script: str  # file in bench/
    page: Path  # whose block between `begin` and END is the table
    other: str  # heading of the other's column
    names: list[str]
    inputs: Callable[[int, int], Sequence[Tensor]]  # (batch, width) → leaves, float32
    ours: Callable[[str, Sequence[Tensor]], Tensor]  # (name, leaves) → loss
    theirs: Callable[[str, Sequence[Tensor]], Tensor]
    absent: Callable[[str], str]  # why there is no other, or nothing
    agreement: Callable[
        [str], float | None
    ]  # how close both must be in float64; None: the other's value is another one

    @property
    def title(self) -> str:
        return self.script.removesuffix(".py")

    @property
    def begin(self) -> str:
        return f"<!-- measured: begin (written by bench/{self.script}) -->"


def arguments(suite: Suite, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="losses whose name contains one of these (default: all)")
    parser.add_argument("--large", action="store_true", help="ours alone at B = 65536, D = 64, with its memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="no further round of a loss after this")
    parser.add_argument("--minutes", type=float, default=3, help="a large batch that takes longer is not run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="128 rows, results to out/ only")
    parser.add_argument("--out", type=Path, help=f"JSON file (default: bench/results/{suite.title}.json)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch, options.width = (128, 16) if options.quick else (65536, 64) if options.large else (4096, 128)
    quick = machine.ROOT / "out" / f"{suite.title}-quick.json"
    options.out = (options.out or (quick if options.quick else machine.RESULTS / f"{suite.title}.json")).resolve()
    return options


def step(run: Callable, name: str, leaves: Sequence[Tensor]) -> tuple[float, Tensor, list[Tensor]]:
    """(seconds, loss, gradients)."""
    start = time.perf_counter()
    loss = run(name, leaves)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return time.perf_counter() - start, loss.detach(), [g for g in gradients if g is not None]


def gate(suite: Suite, name: str) -> str:
    """Empty, or what is wrong."""
    bound = suite.agreement(name)
    if bound is None:
        return ""
    leaves = [x.double().detach().requires_grad_() for x in suite.inputs(96, 16)]
    (_, a, da), (_, b, db) = (step(run, name, leaves) for run in (suite.ours, suite.theirs))
    gradients = (((p - q).norm() / q.norm().clamp_min(1e-30)).item() for p, q in zip(da, db, strict=True))
    off = max(abs((a - b) / b).item(), *gradients, key=lambda v: (v != v, v))  # NaN is the worst
    return "" if off < bound else f"value or gradient differ by {off:.1e}"


def child(suite: Suite, options) -> None:
    torch.set_num_threads(options.threads)
    name = options.child
    step(suite.ours, name, suite.inputs(256, options.width))  # libraries and threads
    row = {"batch": options.batch, "width": options.width}
    if options.part:
        seconds = step(suite.ours, name, suite.inputs(options.batch // PART, options.width))[0]
        print(json.dumps({"minutes": seconds * PART**2 / 60}))
        return
    leaves = suite.inputs(options.batch, options.width)
    if options.large:
        memory = machine.PeakMemory()
        memory.start()
        seconds, loss, gradients = step(suite.ours, name, leaves)
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
        print(json.dumps(row | {"seconds": seconds, "growth": memory.growth()}))
        return
    why = suite.absent(name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (int(0.85 * memory),) * 2)
    defect = "" if why else gate(suite, name)
    if defect:
        print(json.dumps(row | {"defect": defect}))
        return
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    start = time.perf_counter()
    for turn in range(options.rounds + 1):  # the first warms up
        for side, run in (("ours", suite.ours), ("peer", suite.theirs)):
            if side == "peer" and why:
                continue
            try:
                seconds = step(run, name, leaves)[0]
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


def answer(command: Sequence[str], threads: int) -> dict:
    """What a child says."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"defect": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:120]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(suite: Suite, name: str, options) -> dict:
    command = [sys.executable, str(machine.ROOT / "bench" / suite.script), "--child", name]
    command += ["--rounds", str(options.rounds), "--seconds", str(options.seconds), "--threads", str(options.threads)]
    command += ["--large"] * options.large + ["--quick"] * options.quick
    row = {"loss": name, "batch": options.batch, "width": options.width}
    if options.large:
        row |= answer([*command, "--part"], options.threads)
    if row.get("minutes", 0) > options.minutes:
        row["why"] = f"not run: about {row['minutes']:.0f} minutes"
    elif "defect" not in row:
        row |= answer(command, options.threads)
    facts = machine.describe()
    return row | {**facts, "threads": options.threads, "commit": machine.commit()}


def describe_row(row: dict) -> str:
    if "defect" in row:
        return f"WRONG: {row['defect']}"
    if "growth" in row:
        return f"{row['seconds']:.1f} s, {row['growth'] / 2**20:.0f} MiB"
    if "seconds" not in row:
        return row["why"]
    peer = f"peer {row['ratio']:.1f}x ({row['low']:.1f}-{row['high']:.1f})" if "ratio" in row else f"peer: {row['why']}"
    return f"{1e3 * row['seconds']:.0f} ms, {peer}"


def _newest(rows: list[dict]) -> dict | None:
    """The row that was measured last, of several machines say; one of the sources as they are before all others."""
    return max(rows, key=lambda r: (not machine.is_stale(r), r["date"]), default=None)


def table(suite: Suite, rows: list[dict]) -> list[str]:
    """Both sizes of each loss on a line."""
    lines = [f"| loss | B = 4096, D = 128 | {suite.other} | B = 65,536, D = 64 | its memory | |"]
    lines.append("|---|---|---|---|---|---|")
    for name in suite.names:
        small, large = (_newest([r for r in rows if r["loss"] == name and r["batch"] == b]) for b in (4096, 65536))
        if small is None and large is None:
            continue
        cells = ["-"] * 4
        if small and "seconds" in small:
            cells[0] = f"{1e3 * small['seconds']:.0f} ms"
            cells[1] = small["why"]
            if "ratio" in small:
                cells[1] = f"**{small['ratio']:.1f}x** ({small['why'] or '{low:.1f}-{high:.1f}'.format(**small)})"
        if large:
            ran = "growth" in large
            cells[2] = f"{large['seconds']:.0f} s" if ran else large["why"]
            cells[3] = f"{large['growth'] / 2**20:.0f} MiB" if ran else "-"
        stale = [f"{r['batch']:,}" for r in (small, large) if r and machine.is_stale(r)]
        told = f"stale (B = {stale[0]})" if len(stale) == 1 and small and large else "stale" if stale else ""
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {told} |")
    machines = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}, {r['date']}" for r in rows})
    return [*(f"- {m}" for m in machines), "", *lines]


def write_table(suite: Suite, rows: list[dict]) -> None:
    suite.page.write_text(machine.with_block(suite.page, suite.begin, END, [*table(suite, rows), ""]))


def main(suite: Suite, description: str) -> int:
    options = arguments(suite, description)
    if options.child:
        child(suite, options)
        return 0
    from tqdm import tqdm

    names = [n for n in suite.names if not options.patterns or any(p.lower() in n.lower() for p in options.patterns)]
    defects = 0
    bar = tqdm(names, unit="loss")
    for name in bar:
        row = measure(suite, name, options)
        defects += "defect" in row
        bar.write(f"{name:36s} {describe_row(row)}")
        if "defect" not in row:
            merge(options.out, [row], ("loss", "batch", "width", "device"))
    if options.out == machine.RESULTS / f"{suite.title}.json" and options.out.exists():
        write_table(suite, json.loads(options.out.read_text()))
    return 1 if defects else 0
