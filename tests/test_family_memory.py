"""The family's memory: what is kept for the backward pass, and what a step takes, far below the similarity matrix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch
from family_cases import FAMILY
from loss_cases import batch

TESTS = Path(__file__).parent
MIB = 1 << 20
BATCH, WIDTH = 6144, 32  # S would take 144 MiB, the triplets' distances 430 MiB

#: One of each way of running; the rest share their code.
MEASURED = ["TripletMarginLoss", "FastAPLoss", "HistogramLoss", "PNPLoss", "DynamicSoftMarginLoss", "AngularLoss",
            "TripletSemiHardLoss", "LiftedStructureLoss", "TupletMarginLoss", "MarginLoss"]  # fmt: skip


@pytest.mark.parametrize("case", [c for c in FAMILY if False in c.sides], ids=repr)
def test_saved_for_backward(case):
    data = batch("random", False, b=400, d=8).to(torch.float32)
    data.labels = torch.arange(400) // 4
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with support.forced("cpu" if "cpu" in support.FUSED else support.FUSED[0]):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = case.ours(data)
        loss.backward()
    # Some thirty vectors of B and a few copies of the embeddings; S is 640 kB.
    assert sum(kept.values()) < 400 * (30 * 8 + 20 * 8 * 4), kept


def child(name: str, large: bool) -> None:
    """In a fresh process: print the growth of the resident memory over a step."""
    from flashpair import losses

    torch.set_num_threads(2)
    status = lambda field: next(  # noqa: E731
        int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if field in line
    )

    def step(rows: int, members: int) -> None:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(rows, WIDTH, generator=g).requires_grad_()
        getattr(losses, name)()(x, torch.arange(rows) // members).backward()
        assert x.grad.isfinite().all()

    step(256, 4)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    # Large classes: a row's positives are as many as its negatives.
    step(*((BATCH // 4, BATCH // 8) if large else (BATCH, 4)))
    print(json.dumps(status("VmHWM") - before))


@pytest.mark.parametrize(
    ("name", "large"),
    [
        *((n, False) for n in MEASURED),
        *((n, True) for n in ("TripletMarginLoss", "DynamicSoftMarginLoss", "FastAPLoss")),
    ],
)
def test_resident_growth(name, large):
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the high-water mark of resident memory cannot be reset here: {error}")
    if "cpu" not in support.FUSED:
        pytest.skip("the CPU backend is measured")
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import test_family_memory as t; t.child({name!r}, {large})"
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "FLASHPAIR_MAX_WORKSPACE_BYTES": str(16 * MIB)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout.splitlines()[-1])
    assert growth < 96 * MIB, f"{growth / MIB:.0f} MiB"
