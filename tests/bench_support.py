"""What the tests of bench/ share: its folder on the path, its programs as commands, rows as it writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402

GPU = gpu.Gpu("NVIDIA Nothing 100 80GB", "9.0", "2.11.0")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=60)


IDENTITY = {"allocator": "default", "threads": "16", "device": GPU.name}
PROVENANCE = {
    **IDENTITY, "driver": "580", "torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0", "nvcc": "13.0",
    "commit": "abc", "date": "2026-11-21",
}  # fmt: skip


def size(case: str, batch: int = 32768, width: int = 512) -> dict:
    return {
        "case": case, "batch": batch, "width": width, "dtype": "bfloat16", "direction": results.BOTH, **IDENTITY,
        "columns": batch,
    }  # fmt: skip


def measured(case: str, times: dict[str, float], extra: float = 100.0, sources: str = "now", **options) -> dict:
    """A row as `run.py` writes it."""
    spread = {name: {"median": t, "low": t, "high": t, "samples": 9} for name, t in times.items()}
    baseline = next(iter(times))
    return {
        **size(case, **options), **PROVENANCE, "milliseconds": spread, "baseline": baseline, "products": 4.0,
        "times_flashpair": {n: spread[n] for n in times if n != baseline}, "foreign_load": 0.0,
        "not_run": {"inf_cl": "No module named 'inf_cl'"}, "sources": sources, "workspace_mebibytes": 256.0,
        "extra_mebibytes": dict.fromkeys(times, extra), "gradient_mebibytes": 64.0,
        "gemm_milliseconds": {"median": 1.5, "low": 1.5, "high": 1.5, "samples": 9},
    }  # fmt: skip


def unmeasured(case: str, **options) -> dict:
    return {**size(case, **options), **PROVENANCE, "not_measured": run.NOT_REACHED, "sources": "now"}
