"""What `return_stats=True` gives: moments of the similarities of each row's positive and negative pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import merge_moments


class Moments(NamedTuple):
    """Per row, in the loss's own similarity or distance; not differentiable. Empty rows: 0, 0, 0, +inf, -inf."""

    count: Tensor  # (B,) number of pairs
    mean: Tensor  # (B,)
    variance: Tensor  # (B,) population variance
    min: Tensor  # (B,)
    max: Tensor  # (B,)


class PairStatistics(NamedTuple):
    """Statistics of the pairs that entered a loss."""

    positive: Moments
    negative: Moments


def moments(slots: Tensor) -> Moments:
    """Moments from the (5, B) result of `Reduction.MOMENTS`."""
    return Moments(*slots.unbind(0))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets of pairs."""
    return Moments(*merge_moments(a, b))


def single(value: Tensor, valid: Tensor) -> Moments:
    """Moments of one pair per row, absent where `valid` is False."""
    value = value.detach()
    zero = torch.zeros_like(value)
    return Moments(
        valid.to(value.dtype),
        torch.where(valid, value, zero),
        zero,
        torch.where(valid, value, torch.inf),
        torch.where(valid, value, -torch.inf),
    )
