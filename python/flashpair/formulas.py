"""Losses in closed form: the value and its slopes from the statistics of a pass, without autograd.

The nodes that autograd makes for a few operators on vectors cost a small batch more than its pairs; see
`primitives.pair_loss`. A backend may have a function of its own for a formula, in its `FORMULAS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Formula(NamedTuple):
    """A 0-d loss of the first statistics of a pass, (owners,) each; there may be further ones behind them."""

    name: str
    #: (statistics of the terms...) → the loss, differentiable.
    value: Callable[..., Tensor]
    #: (rows (R, B), columns (C, N)) → the loss and its derivative in both, without a graph.
    slopes: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _mean_gap(log_sum: Tensor, own: Tensor, *log_sum_of_columns: Tensor) -> Tensor:
    # From 40 on softplus(z) is z to the last digit of a double.
    gaps = F.softplus(torch.stack([log_sum, *log_sum_of_columns]) - own, threshold=40)
    return gaps.sum() / max(gaps.numel(), 1)


def _mean_gap_slopes(both: bool, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gaps = (torch.cat([rows[:1], columns[:1]]) if both else rows[:1]) - rows[1]
    count = max(gaps.numel(), 1)
    loss = F.softplus(gaps, threshold=40).sum() / count
    of_gaps = gaps.sigmoid_().div_(count)
    of_rows, of_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    of_rows[0], of_rows[1] = of_gaps[0], -of_gaps.sum(0)
    if both:
        of_columns[0] = of_gaps[1]
    return loss, of_rows, of_columns


#: The mean of softplus(log-sum over the others - own logit), which is the cross-entropy of a softmax over the others
#: and the own one, and keeps the digits of a small loss. Of rows (log-sum, own, ...).
MEAN_GAP = Formula("mean_gap", _mean_gap, functools.partial(_mean_gap_slopes, False))
#: The mean of both directions, of rows (log-sum, own, ...) and as many columns (log-sum, ...).
MEAN_GAP_OF_BOTH = Formula("mean_gap_of_both", _mean_gap, functools.partial(_mean_gap_slopes, True))

FORMULAS = {formula.name: formula for formula in (MEAN_GAP, MEAN_GAP_OF_BOTH)}
