"""What a step costs the host on backend triton: Python, PyTorch's operators and Triton's launches, not the kernels.

    python bench/host.py                 every case of the table; to results/host.json and docs/triton.md
    python bench/host.py clip supcon     cases whose name contains a pattern

Small batches of a GPU take as long as their launches, so this is what limits them. Without a GPU a driver stands in
that starts nothing (`stand_in.py`); operators of PyTorch then run on small CPU tensors, which takes about as long as to
start them on a GPU. With a GPU its own driver is used, and the host waits for it between rounds only. "decided anew":
the same steps without recordings (python/flashpair/recording.py), as the first of a kind is; "recorded": with every
pass recorded; "by Triton": decided anew, and every launch through Triton's own search (kernels/start.py saves it);
"dense": the loss in PyTorch on 16 rows, so that its operators compute little. All take turns in one process with one
thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import machine
import torch
from cases import CASES, Implementation
from results import BOTH, merge, spread
from stand_in import Operators, standing_in
from timers import step
from tqdm import tqdm

from flashpair import recording

BATCH, FEW, WIDTH = 256, 16, 64
CHOSEN = ("clip", "siglip", "supcon", "ntxent", "ms-random", "circle", "batch-hard")
OURS, ANEW, RECORDED, BY_TRITON, DENSE = "flashpair", "decided anew", "recorded", "by Triton", "dense"
PATH = machine.RESULTS / "host.json"
BEGIN, END = "<!-- host: begin (written by bench/host.py) -->", "<!-- host: end -->"
KEY = ("case", "batch", "width", "dtype", "driver", "device")


@contextlib.contextmanager
def by_triton() -> Iterator[None]:
    """Every pass decided anew, and every launch through Triton's own search."""
    from flashpair.kernels import launch

    def start(kernel, programs: int, args: tuple, constants: dict) -> None:
        kernel[(programs,)](*args, **constants)

    with recording.deciding_anew(), patch.object(launch, "start", start):
        yield


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Every pass recorded, as the eighth of a kind is."""
    with patch.multiple(recording, RECORDED=1, recordings=OrderedDict(), _seen={}):
        yield


@contextlib.contextmanager
def counting_kernels() -> Iterator[list[str]]:
    """The names of the kernels that are started inside the block."""
    from flashpair.kernels import launch

    names, begin = [], launch.start

    def start(kernel, programs: int, args: tuple, constants: dict) -> None:
        names.append(kernel.__name__)
        begin(kernel, programs, args, constants)

    with recording.deciding_anew(), patch.object(launch, "start", start):
        yield names


def measure(case, device: str, rounds: int, steps: int) -> dict:
    """Milliseconds of a step's host time by contestant, interleaved; kernels and operators of one step."""
    inputs = case.make(BATCH, WIDTH).to(torch.bfloat16, device)
    few = case.make(FEW, WIDTH).to(torch.bfloat16, device)
    ours, dense = Implementation(case.flashpair), Implementation(case.dense)
    contestants = {
        OURS: ours,
        ANEW: Implementation(case.flashpair, recording.deciding_anew),
        RECORDED: Implementation(case.flashpair, recorded),
        BY_TRITON: Implementation(case.flashpair, by_triton),
        DENSE: dense,
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    operators = {}
    for name in (DENSE, OURS):
        with Operators() as counted, counting_kernels() as kernels:
            step(contestants[name], few if name == DENSE else inputs)
        operators[name] = len(counted.names)
    for n in range(rounds + 1):
        for name, implementation in contestants.items():
            begin = time.perf_counter()
            for _ in range(steps):
                step(implementation, few if name == DENSE else inputs)
            taken = time.perf_counter() - begin
            if device == "cuda":
                torch.cuda.synchronize()
            if n:  # in the first one everything is new
                times[name].append(1e3 * taken / steps)
    return {
        "milliseconds": {name: spread(values) for name, values in times.items()},
        "times_flashpair": {
            name: spread([b / a for a, b in zip(times[OURS], values, strict=True)])
            for name, values in times.items()
            if name != OURS
        },
        "kernels": len(kernels),
        "operators": operators,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("patterns", nargs="*", help="run the cases whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--out", default=str(PATH))
    options = parser.parse_args(arguments)
    chosen = [c for c in CASES if c.name in CHOSEN and any(p in c.name for p in options.patterns or [""])]
    if not chosen:
        parser.error(f"no case contains one of {options.patterns}; cases are {', '.join(CHOSEN)}")
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    with contextlib.ExitStack() as stack:
        if device != "cuda":
            stack.enter_context(standing_in())
        for case in tqdm(chosen, desc="host", leave=False):
            measured = measure(case, device, options.rounds, options.steps)
            rows.append(
                {
                    "case": case.name, "batch": BATCH, "width": WIDTH, "dtype": "bfloat16", "direction": BOTH,
                    **measured, **machine.describe(device), "driver": "Triton's" if device == "cuda" else "stand-in",
                    "sources": machine.source_hash("cuda"),
                }
            )  # fmt: skip
    print(*table(rows), sep="\n")
    merge(Path(options.out), rows, KEY)
    if options.out == str(PATH):
        write_table(json.loads(PATH.read_text()))


def table(rows: list[dict]) -> list[str]:
    header = ["case", "host, ms", ANEW, RECORDED, BY_TRITON, DENSE, "kernels", "operators", "operators of dense", ""]
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 2) + "---|"]
    for row in rows:
        cells = [row["case"], "{median:.2f} ({low:.2f}-{high:.2f})".format(**row["milliseconds"][OURS])]
        ratios = (row["times_flashpair"].get(name) for name in (ANEW, RECORDED, BY_TRITON, DENSE))
        cells += ["{median:.2f}x ({low:.2f}-{high:.2f})".format(**ratio) if ratio else "-" for ratio in ratios]
        cells += [str(n) for n in (row["kernels"], row["operators"][OURS], row["operators"][DENSE])]
        lines.append(f"| {' | '.join(cells)} | {'stale' if machine.is_stale(row) else ''} |")
    return lines


def write_table(rows: list[dict]) -> None:
    """The rows of the sources as they are, or all if there are none."""
    rows = [row for row in rows if not machine.is_stale(row)] or rows
    places = sorted({f"{r['device']}, driver: {r['driver']}, torch {r['torch']}, {r['date']}" for r in rows})
    page = machine.ROOT / "docs" / "triton.md"
    page.write_text(machine.with_block(page, BEGIN, END, [*(f"- {p}" for p in places), "", *table(rows), ""]))


if __name__ == "__main__":
    main()
