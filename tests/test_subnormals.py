"""Subnormal numbers are slow on some processors, so tasks of the CPU backend flush them; nothing else is affected."""

from __future__ import annotations

import platform

import pytest
import torch

import flashpair
from flashpair import Reduction, Score, Term, pair_reduce, pair_sum

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flushed on x86-64 only")


def test_a_pass_flushes_them():
    x = torch.full((4, 8), 1e-21)  # <x, x> = 8e-42
    with flashpair.use_backend("cpu"):
        total = pair_sum(x, terms=[Term(Reduction.SUM, Score.HINGE)])
    assert total == 0
    assert (x @ x.mT).sum() != 0


def test_no_more_than_the_smallest_normal_number_is_lost_each_time():
    x = 1e-18 * torch.randn(300, 16, generator=torch.Generator().manual_seed(0))  # products about 4e-36
    with flashpair.use_backend("cpu"):
        (sums,) = pair_reduce(x, terms=[Term(Reduction.SUM, Score.HINGE)], exclude_self=False)
    wanted = (x.double() @ x.double().mT).clamp_min(0).sum(1)
    operations = 300 * (2 * 16 + 2)
    assert (sums - wanted).abs().max() <= operations * torch.finfo(torch.float32).tiny + 1e-5 * wanted.max()


def test_other_code_keeps_them():
    x = torch.randn(600, 8, requires_grad=True)
    with flashpair.use_backend("cpu"):
        pair_sum(x, terms=[Term(Reduction.SUM, Score.HINGE)]).backward()
    tiny = torch.full((1 << 20,), 1e-39)  # as much as several threads share
    assert (tiny * 0.5).min() > 0
