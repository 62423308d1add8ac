"""Result files: rows by what they measured, each with the row of other sources that it replaced; and their numbers."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

FORWARD, BOTH = "forward", "forward+backward"
GEMM = "vendor GEMM"
#: What makes two rows of speed the same measurement.
KEY = ("case", "batch", "width", "dtype", "direction", "allocator", "threads", "device")
#: What a row tells of the row before it.
_PREVIOUS = ("sources", "commit", "date", "milliseconds", "gemm_milliseconds", "mebibytes")
#: A change of flashpair's time, against dense code in the same runs, that is called a regression.
REGRESSION = 1.1


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    edge = len(ordered) // 10
    return {
        "median": statistics.median(ordered),
        "low": ordered[edge],
        "high": ordered[-1 - edge],
        "samples": len(ordered),
    }


def merge(path: Path, rows: list[dict], key: tuple[str, ...]) -> None:
    """Write rows into a result file; a row replaces the one that measured the same thing on the same device."""
    known = json.loads(path.read_text()) if path.exists() else []
    table = {tuple(row[k] for k in key): row for row in known}
    for row in rows:
        place = tuple(row[k] for k in key)
        before = table.get(place)
        if "not_measured" in row and before is not None and "not_measured" not in before:
            continue
        table[place] = row | _before(row, before)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".partial")  # whoever is cut off here leaves the old file
    whole.write_text(json.dumps([table[k] for k in sorted(table, key=str)], indent=1) + "\n")
    whole.replace(path)


def _before(row: dict, old: dict | None) -> dict:
    """What is kept of the row that a row replaces: the last one of other sources."""
    if old is None or "not_measured" in old:
        return {}
    if old.get("sources") == row.get("sources"):
        return {"previous": old["previous"]} if "previous" in old else {}
    return {"previous": {k: old[k] for k in _PREVIOUS if k in old}}


def matmul_units(row: dict, name: str) -> tuple[float, float] | None:
    """Time of an implementation in vendor GEMMs of the shape of S, and the share of that GEMM's rate that it reaches.

    The share counts the products that the loss needs (`Case.products`); None where either was not measured."""
    time, unit = row["milliseconds"].get(name), row.get("gemm_milliseconds")
    if not time or not unit:
        return None
    units = time["median"] / unit["median"]
    return units, row["products"] / units


def of_peak(row: dict, name: str) -> float | None:
    """Share of the processor's peak rate, counting the products that the loss needs."""
    time, peak = row["milliseconds"].get(name), row.get("peak_gflops")
    if not time or not peak:
        return None
    work = row["products"] * 2.0 * row["batch"] * row["columns"] * row["width"]
    return work / (time["median"] * 1e6) / peak


def change(row: dict) -> float | None:
    """flashpair's time over that of the row before, each in units of dense code (else of the GEMM) of its own run."""
    before = row.get("previous", {})
    ours = row.get("baseline", "flashpair")
    times = [r.get("milliseconds", {}) for r in (row, before)]
    if any(ours not in t for t in times):
        return None
    units = [t.get("dense") or r.get("gemm_milliseconds") for t, r in zip(times, (row, before), strict=True)]
    now, then = (t[ours]["median"] / (u["median"] if all(units) else 1.0) for t, u in zip(times, units, strict=True))
    return now / then


def regressed(row: dict) -> bool:
    found = change(row)
    return found is not None and found > REGRESSION
