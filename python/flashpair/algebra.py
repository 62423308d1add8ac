"""How statistics of disjoint sets of columns combine, for blocks of classes and pieces of a softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from .terms import Reduction


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """`log(exp(a) + exp(b))` with zero gradients, not NaN, where both are -inf."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    return torch.where(empty, -torch.inf, torch.logaddexp(torch.where(empty, 0.0, a), b))


def merge(reduction: Reduction, a: Tensor, b: Tensor) -> Tensor:
    """Statistics (slots, owners) of the union of two disjoint sets of columns.

    Raises:
        ValueError: on MOMENTS.
    """
    if reduction in (Reduction.SUM, Reduction.COUNT):
        return a + b
    if reduction == Reduction.LOGSUMEXP:
        return log_add_exp(a, b)
    if reduction == Reduction.SOFTMAX_MEAN:
        total = log_add_exp(a[1], b[1])
        origin = torch.where(total == -torch.inf, 0.0, total)
        mean = torch.exp(a[1] - origin) * a[0] + torch.exp(b[1] - origin) * b[0]
        return torch.stack([mean, total])
    raise ValueError(f"statistics of {reduction.name} do not merge")
