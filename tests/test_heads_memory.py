"""Class heads: one gradient of the class weights, or none, and nothing else as large as weights or logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch

TESTS = Path(__file__).parent
MIB = 1 << 20
WORKSPACE = 32 * MIB
CLASSES, FEATURES, ROWS = 400_000, 64, 64  # 98 MiB of weights; the logits would take as much in float32


def step(kind: str, classes: int, rows: int) -> float:
    """Forward and backward of a head; the loss."""
    from flashpair.heads import ClassHead, FusedSGD, PartialFC_V2
    from flashpair.heads.margins import Margin

    torch.manual_seed(0)
    if kind == "sampled":
        head = PartialFC_V2(Margin(64.0), FEATURES, classes, sample_rate=0.1)
    else:
        head = ClassHead(classes, FEATURES, margin=Margin(64.0))
    if kind != "gradient":
        head.fuse(FusedSGD([head.weight], lr=0.1))
    x = torch.randn(rows, FEATURES, requires_grad=True)
    measured.start()
    loss = head(x, torch.arange(rows) % classes)
    loss.backward()
    assert (head.weight.grad is not None) == (kind == "gradient")
    return float(loss.detach())


def child(kind: str, classes: int, rows: int) -> None:
    """In a fresh process: print the growth of the resident memory, its highest value, and the loss."""
    import flashpair

    torch.set_num_threads(2)
    flashpair.set_max_workspace_bytes(WORKSPACE)
    step(kind, 2048, rows)  # libraries are loaded, threads are there
    flashpair.release_workspace()
    loss = step(kind, classes, rows)
    print(json.dumps({"growth": measured.growth(), "highest": measured.before + measured.growth(), "loss": loss}))


def measure(kind: str, classes: int = CLASSES, rows: int = ROWS) -> dict:
    command = [sys.executable, __file__, kind, str(classes), str(rows)]
    environment = {**os.environ, "FLASHPAIR_BACKEND": "cpu", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


pytestmark = pytest.mark.skipif("cpu" not in support.FUSED, reason="the C++ extension was not built")
if not Path("/proc/self/clear_refs").exists():
    pytestmark = [pytestmark, pytest.mark.skip(reason="resident memory is measured on Linux only")]


@pytest.mark.parametrize(("kind", "gradients"), [("gradient", 1), ("fused", 0), ("sampled", 0)])
def test_peak_beyond_the_weights(kind, gradients):
    """Their gradient where it is wanted, the workspace, and a few vectors along the classes."""
    found = measure(kind)
    allowed = gradients * 4 * CLASSES * FEATURES + WORKSPACE + 16 * MIB
    assert found["growth"] <= allowed, f"{found['growth'] / MIB:.0f} MiB, allowed {allowed / MIB:.0f}"


def test_two_million_classes_in_one_and_a_half_gigabytes():
    """Interpreter, libraries, weights (488 MiB) and their gradient; dense logits alone would take as much twice."""
    found = measure("gradient", classes=2_000_000)
    assert found["highest"] <= 1.5e9, f"{found['highest'] / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS.parent / "bench"))
    from machine import PeakMemory

    measured = PeakMemory()
    child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
