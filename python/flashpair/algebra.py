"""How statistics of disjoint sets of columns combine: classes, pieces of a softmax, columns of other ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .terms import Extreme, Reduction


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """`log(exp(a) + exp(b))` with zero gradients, not NaN, where both are -inf."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    return torch.where(empty, -torch.inf, torch.logaddexp(torch.where(empty, 0.0, a), b))


def merge(reduction: Reduction, a: Tensor, b: Tensor) -> Tensor:
    """Statistics (slots, owners) of the union of two disjoint sets of columns."""
    if reduction in (Reduction.SUM, Reduction.COUNT):
        return a + b
    if reduction == Reduction.MAX:
        return torch.maximum(a, b)
    if reduction == Reduction.LOGSUMEXP:
        return log_add_exp(a, b)
    if reduction == Reduction.SOFTMAX_MEAN:
        total = log_add_exp(a[1], b[1])
        origin = torch.where(total == -torch.inf, 0.0, total)
        mean = torch.exp(a[1] - origin) * a[0] + torch.exp(b[1] - origin) * b[0]
        return torch.stack([mean, total])
    return torch.stack(merge_moments(a, b))


def merge_moments(a, b) -> tuple[Tensor, ...]:
    """(count, mean, variance, min, max) of the union of two disjoint sets (Chan, Golub, LeVeque 1983)."""
    count = a[0] + b[0]
    share = b[0] / count.clamp_min(1)
    delta = b[1] - a[1]
    variance = (1 - share) * a[2] + share * b[2] + share * (1 - share) * delta * delta
    return count, a[1] + share * delta, variance, torch.minimum(a[3], b[3]), torch.maximum(a[4], b[4])


def merge_extremes(extreme: Extreme, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Values and columns (B, k) of the union of two disjoint sets of columns; ties go to the lowest column."""
    values, columns = (torch.cat(pair, 1) for pair in zip(a, b, strict=True))
    last = torch.iinfo(torch.int64).max
    order = torch.where(columns < 0, last, columns).argsort(dim=1)
    # NaN counts as most extreme; a kept infinity comes before a missing entry, whose column is last.
    key = values.gather(1, order)
    key = torch.where(key.isnan(), torch.inf, key if extreme.largest else -key)
    order = order.gather(1, key.argsort(dim=1, descending=True, stable=True))[:, : extreme.k]
    return values.gather(1, order), columns.gather(1, order)
