"""What is to be reached, as data, and whether the measured rows show it.

A goal bounds one quantity, a time, a ratio of two times, memory or the share of the processor's peak, of some cases at
some sizes. It is met where every case was measured and every size that was measured keeps the bound; nothing is met
that was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from results import BOTH, FORWARD, GEMM, of_peak

TRITON, CUDA, DENSE = "flashpair[triton]", "flashpair[cuda]", "dense"
FASTER = "faster backend"  # of the two for GPUs, row by row
COMPILE, INF_CL = "compile", "inf_cl"
FASTEST_DENSE = "fastest dense"  # of eager, compiled and chunked
BOUND = -1.0  # limit of memory: see `memory_bound`
GPU = {"dtype": "bfloat16"}
CPU = {"dtype": "float32", "allocator": "warm"}


@dataclass(frozen=True)
class Goal:
    text: str
    cases: tuple[str, ...]
    limit: float  # of milliseconds, of a ratio, of MiB, or of the inverse share of the peak
    of: str = FASTER
    against: tuple[str, str] | None = None  # (case or "" for the same, implementation) whose time divides
    memory: bool = False  # MiB beyond inputs and gradients instead of a time
    peak: bool = False  # how many times as long as at the processor's peak rate
    faster: bool = False  # a ratio that is told as how many times as fast, its inverse
    batches: tuple[int, ...] = (32768,)
    widths: tuple[int, ...] = (512,)
    direction: str = BOTH
    rows: dict[str, Any] = field(default_factory=lambda: GPU)  # which rows count


MS = ("ms-random", "ms-trained")
DENSE_CASES = ("clip", "supcon", "siglip", *MS)
ALL_SIZES = {"batches": (4096, 16384, 32768), "widths": (128, 512, 1024)}
EVERY_SIZE = {"batches": (1024, *ALL_SIZES["batches"]), "widths": ALL_SIZES["widths"]}

GPU_GOALS = (
    Goal("cuda no slower than dense, B ≥ 4096", DENSE_CASES, 1.0, CUDA, ("", DENSE), **ALL_SIZES),
    Goal("cuda within its memory bound, B ≥ 4096", DENSE_CASES, BOUND, CUDA, memory=True, **ALL_SIZES),
    Goal("cuda at most 1.6x triton", (*DENSE_CASES, "batch-hard"), 1.6, CUDA, ("", TRITON), **ALL_SIZES),
    Goal("at most 10 ms, B = 32768, D = 512", ("clip",), 10.0),
    Goal("at most 18 ms, B = 32768, D = 1024", ("clip",), 18.0, widths=(1024,)),
    Goal("at most 256 MiB beyond inputs and gradients, the same", ("clip",), 256.0, memory=True, widths=(512, 1024)),
    Goal("at most 0.65x CLIP", ("supcon", "ntxent"), 0.65, against=("clip", FASTER)),
    Goal("at most 1.2x SupCon", MS, 1.2, against=("supcon", FASTER)),
    Goal("at most 3 ms, B = 32768, D = 512", ("batch-hard",), 3.0),
    Goal("at most 38 ms, B = 65536, D = 768", ("siglip",), 38.0, batches=(65536,), widths=(768,)),
    Goal("at most 700 MiB, the same", ("siglip",), 700.0, memory=True, batches=(65536,), widths=(768,)),
    Goal("no slower than torch.compile, B ≥ 1024", DENSE_CASES, 1.0, against=("", COMPILE), **EVERY_SIZE),
    Goal("at least 5 times as fast as Inf-CL", ("clip",), 0.2, against=("", INF_CL), faster=True, **ALL_SIZES),
    Goal("forward alone at 60 % of the GEMM's rate", ("clip",), 1 / 0.6, against=("", GEMM), direction=FORWARD),
)


def _times_dense(case: str, times: float, **more) -> Goal:
    text = f"{times:g} times as fast as dense, B = {more['batches'][0]}"
    return Goal(text, (case,), 1 / times, "flashpair", ("", DENSE), faster=True, rows=CPU, **more)


SMALL = {"widths": (128,), "batches": (4096,)}
CPU_GOALS = (
    _times_dense("clip", 3.5, **SMALL),
    _times_dense("supcon", 5.5, **SMALL),
    _times_dense("ms-random", 5.3, **SMALL),
    _times_dense("arcface", 2.4, widths=(256,), batches=(256,)),
    Goal(
        "75 % of the processor's peak, B = 4096", ("clip", "supcon", "siglip", "infonce"), 1 / 0.75, "flashpair",
        peak=True, rows=CPU, **SMALL,
    ),
    Goal(
        "at least as fast as the fastest dense code, B ≥ 256", ("clip", "supcon", "ms-random"), 1.0, "flashpair",
        ("", FASTEST_DENSE), faster=True, batches=(256, 512, 1024, 2048, 4096, 8192, 16384),
        widths=(64, 128, 256, 512, 1024), rows=CPU,
    ),
)  # fmt: skip
GOALS = (*CPU_GOALS, *GPU_GOALS)


def memory_bound(row: dict) -> float:
    """MiB beyond inputs and gradients: the workspace, four times the inputs and forty vectors of eight bytes."""
    return row["workspace_mebibytes"] + 4 * row["gradient_mebibytes"] + 40 * 8 * row["batch"] / 2**20


@dataclass(frozen=True)
class Finding:
    value: float
    limit: float
    case: str
    place: str
    rows: tuple[dict, ...]  # that it was computed from


def _time(row: dict | None, implementation: str) -> tuple[str, float] | None:
    """(name, median ms) of an implementation in a row, or of the fastest of several."""
    times = {name: t["median"] for name, t in row["milliseconds"].items()} if row else {}
    if row and row.get("gemm_milliseconds"):
        times[GEMM] = row["gemm_milliseconds"]["median"]
    several = {FASTER: (TRITON, CUDA), FASTEST_DENSE: (DENSE, COMPILE, "chunked")}
    names = several.get(implementation, (implementation,))
    return min(((name, times[name]) for name in names if name in times), key=lambda found: found[1], default=None)


def findings(goal: Goal, rows: list[dict]) -> list[Finding]:
    """The goal's quantity for each of its cases and sizes that was measured."""
    wanted = {**goal.rows, "direction": goal.direction}
    counts = [r for r in rows if "milliseconds" in r and all(r[k] == v for k, v in wanted.items())]
    table = {(r["case"], r["batch"], r["width"]): r for r in counts}
    found = []
    for case, b, d in ((c, b, d) for c in goal.cases for b in goal.batches for d in goal.widths):
        row = table.get((case, b, d))
        ours = _time(row, goal.of)
        if ours is None:
            continue
        name, value = ours
        limit, used = goal.limit, (row,)
        if goal.peak:
            share = of_peak(row, name)
            if share is None:
                continue
            value = 1 / share
        if goal.memory:
            value = row["extra_mebibytes"][name] - row["gradient_mebibytes"]
            limit = memory_bound(row) if limit == BOUND else limit
        if goal.against is not None:
            other = table.get((goal.against[0] or case, b, d))
            rival = _time(other, goal.against[1])
            if rival is None:
                continue
            value, used = value / rival[1], (row, other)
        found.append(Finding(value, limit, case, f"{name}, {case} {b}x{d}", used))
    return found


def predicted(goal: Goal, steps: list[dict]) -> float | None:
    """The worst value of a goal for the Triton backend by `predict.py`; None where that says nothing of it."""
    times = {(s["case"], s["batch"], s["width"]): s["predicted_ms"] for s in steps}
    other = goal.against and goal.against[0]
    if goal.memory or goal.peak or goal.direction != BOTH or goal.of != FASTER or (goal.against and not other):
        return None
    sizes = [(b, d) for b in goal.batches for d in goal.widths]
    found = [
        times[c, b, d] / (times.get((other, b, d), float("nan")) if other else 1.0)
        for c in goal.cases
        for b, d in sizes
        if (c, b, d) in times
    ]
    return max(found, default=None)


def judge(goal: Goal, rows: list[dict]) -> tuple[str, str, tuple[dict, ...]]:
    """(state, worst finding as text, rows it rests on); the state is not measured, partly measured, met or missed."""
    found = findings(goal, rows)
    if not found:
        return "not measured", "-", ()
    worst = max(found, key=lambda f: f.value / f.limit)
    unit = " MiB" if goal.memory else "x" if goal.against else " ms"
    sizes = len(goal.cases) * len(goal.batches) * len(goal.widths)
    count = f"; worst of {len(found)}, of {sizes} sizes" if sizes > 1 else ""
    bound = f" of {worst.limit:.0f}" if goal.limit == BOUND else ""
    shown = 1 / worst.value if goal.faster else worst.value
    value = f"{100 / worst.value:.0f} %" if goal.peak else f"{shown:.2f}{bound}{unit}"
    text = f"{value} ({worst.place}{count})"
    if any(f.value > f.limit for f in found):
        state = "missed"
    else:
        state = "met" if {f.case for f in found} == set(goal.cases) else "partly measured"
    return state, text, tuple(row for f in found for row in f.rows)
