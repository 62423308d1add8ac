"""Pictures of growth: time and memory against B, time against D, a column for each case of the sweep."""

from __future__ import annotations

from pathlib import Path

from results import BOTH

CASES = ("clip", "supcon", "ms-random")
WIDTH, BATCH = 128, 4096
BATCHES, WIDTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768), (64, 128, 256, 512, 1024)
UNCOMPILED = 16384  # from here on torch.compile takes no part: it needs too long
STYLE = {"flashpair": {"color": "red", "linewidth": 2.2}, "dense": {"color": "black"}, "compile": {"color": "blue"}}


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

    figure = Figure(figsize=(4.2 * len(CASES), 13), layout="constrained")
    grid = figure.subplots(4, len(CASES), squeeze=False)
    for column, case in enumerate(CASES):
        panels = (
            (series(by_batch[case], "batch", medians), f"B, D = {WIDTH}", "ms, forward + backward", "log"),
            (series(by_batch[case], "batch", ratios), f"B, D = {WIDTH}", "times as long as flashpair", "log"),
            (series(grown[case], "batch", lambda r: {r["implementation"]: r["mebibytes"]}), f"B, D = {WIDTH}",
             "peak memory, MiB", "log"),
            (series(by_width[case], "width", ratios), f"D, B = {BATCH}", "times as long as flashpair", "log"),
        )  # fmt: skip
        for axes, (lines, below, beside, scale) in zip(grid[:, column], panels, strict=True):
            for name, points in lines.items():
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **STYLE.get(name, {}))
            axes.set_xscale("log", base=2)
            axes.set(xlabel=below, ylabel=beside, yscale=scale, title=case)
            axes.grid(alpha=0.3)
            if lines:
                axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True
