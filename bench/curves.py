"""Pictures of growth: time and memory against B, time against D, a column for each case of the sweep."""

from __future__ import annotations

from pathlib import Path

from results import BOTH

CASES = ("clip", "supcon", "ms-random")
WIDTH, BATCH = 128, 4096
BATCHES, WIDTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768), (64, 128, 256, 512, 1024)
UNCOMPILED = 16384  # from here on torch.compile takes no part: it needs too long
STYLE = {
    "flashpair": {"color": "tab:red", "linewidth": 2.2},
    "dense": {"color": "black"},
    "compile": {"color": "tab:blue"},
    "chunked": {"color": "tab:orange"},
    "open_clip": {"color": "tab:green"},
    "metric-learning": {"color": "tab:purple"},
    "torch chunked": {"color": "tab:cyan"},
}
RATIOS = (0.5, 1, 2, 5, 10, 20, 50)


def series(rows: list[dict], along: str, value) -> dict[str, list[tuple[float, float]]]:
    """(place, value) of each implementation, in order of the place; value(row) maps names to numbers."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda r: r[along]):
        for name, number in value(row).items():
            found.setdefault(name, []).append((row[along], number))
    return {name: points for name, points in found.items() if len(points) > 1}


def medians(row: dict) -> dict[str, float]:
    return {name: t["median"] for name, t in row["milliseconds"].items()}


def ratios(row: dict) -> dict[str, float]:
    return {"flashpair": 1.0} | {name: t["median"] for name, t in row["times_flashpair"].items()}


def draw(speed: list[dict], memory: list[dict], path: Path) -> bool:
    """False where there is nothing to draw."""
    speed = [r for r in speed if r["direction"] == BOTH and r["allocator"] == "warm" and r["dtype"] == "float32"]
    by_batch = {case: [r for r in speed if (r["case"], r["width"]) == (case, WIDTH)] for case in CASES}
    by_width = {case: [r for r in speed if (r["case"], r["batch"]) == (case, BATCH)] for case in CASES}
    grown = {case: [r for r in memory if r["case"] == case and r.get("sweep") and "mebibytes" in r] for case in CASES}
    if not any(len(rows) > 1 for rows in by_batch.values()):
        return False
    from matplotlib.figure import Figure

    # (lines of each case, below, beside); a row that has no line in any case is left out.
    over_batch, over_width = f"B, D = {WIDTH}", f"D, B = {BATCH}"
    memory_of = lambda r: {r["implementation"]: r["mebibytes"]}  # noqa: E731
    rows = [
        ([series(by_batch[c], "batch", medians) for c in CASES], over_batch, "ms, forward + backward"),
        ([series(by_batch[c], "batch", ratios) for c in CASES], over_batch, "times as long as flashpair"),
        ([series(grown[c], "batch", memory_of) for c in CASES], over_batch, "peak memory, MiB"),
        ([series(by_width[c], "width", ratios) for c in CASES], over_width, "times as long as flashpair"),
    ]
    rows = [row for row in rows if any(row[0])]
    figure = Figure(figsize=(4.2 * len(CASES), 3.3 * len(rows)), layout="constrained")
    for (lines, below, beside), of_row in zip(rows, figure.subplots(len(rows), len(CASES), squeeze=False), strict=True):
        for case, of_case, axes in zip(CASES, lines, of_row, strict=True):
            for name, points in of_case.items():
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **STYLE.get(name, {}))
            axes.set_xscale("log", base=2)
            axes.set(xlabel=below, ylabel=beside, yscale="log", title=case)
            if beside.startswith("times"):
                axes.set_yticks(RATIOS, [f"{r:g}" for r in RATIOS])
                axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True
