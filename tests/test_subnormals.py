"""Subnormal numbers are slow on some processors, so tasks of the CPU backend flush them; nothing else is affected."""

from __future__ import annotations

import platform

import pytest
import torch

import flashpair
from flashpair import Reduction, Score, Term, pair_sum

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flushed on x86-64 only")


def test_a_pass_flushes_them():
    x = torch.full((4, 8), 1e-21)  # <x, x> = 8e-42
    with flashpair.use_backend("cpu"):
        total = pair_sum(x, terms=[Term(Reduction.SUM, Score.HINGE)])
    assert total == 0
    assert (x @ x.mT).sum() != 0


def test_other_code_keeps_them():
    x = torch.randn(600, 8, requires_grad=True)
    with flashpair.use_backend("cpu"):
        pair_sum(x, terms=[Term(Reduction.SUM, Score.HINGE)]).backward()
    tiny = torch.full((1 << 20,), 1e-39)  # as much as several threads share
    assert (tiny * 0.5).min() > 0
