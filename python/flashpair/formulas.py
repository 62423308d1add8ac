"""Losses in closed form: the value and its slopes from the statistics of a pass, without autograd.

The nodes that autograd makes for a few operators on vectors cost a small batch more than its pairs; see
`primitives.pair_loss`. A backend may have a function of its own for a formula, in its `FORMULAS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Formula:
    """A 0-d loss of the first statistics of a pass, (owners,) each; there may be further ones behind them."""

    name: str
    #: (statistics..., counts..., constants...) → the loss, differentiable in the statistics.
    value: Callable[..., Tensor]
    #: (rows (R, B), columns (C, N), counts (`counts`, B), constants) → the loss and its derivative in rows and columns,
    #: without a graph.
    slopes: Callable[[Tensor, Tensor, Tensor | None, Sequence[float]], tuple[Tensor, Tensor, Tensor]]
    #: How many statistics of rows it reads.
    reads: int = 2
    #: And how many vectors (B,) of numbers of pairs. They take no gradient.
    counts: int = 0
    #: (statistics..., counts..., constants but the first) → the losses (B,) of the anchors, of which `value` is the
    #: `Average` that the first constant names. Only of such formulas.
    anchors: Callable[..., Tensor] | None = None


class Average(IntEnum):
    """How losses of anchors become one number, 0 where there are none. The order is that of csrc/formulas_cpu.h."""

    SUM = 0
    MEAN = 1
    ABOVE_ZERO = 2  # the mean of those above zero


def _softplus(z: Tensor) -> Tensor:
    return F.softplus(z, threshold=40)  # from there on it is z to the last digit of a double


# --- a softmax and its own logit --------------------------------------------------------------------------------------


def _mean_gap(log_sum: Tensor, own: Tensor, *log_sum_of_columns: Tensor) -> Tensor:
    gaps = _softplus(torch.stack([log_sum, *log_sum_of_columns]) - own)
    return gaps.sum() / max(gaps.numel(), 1)


def _mean_gap_slopes(both: bool, rows: Tensor, columns: Tensor, counts=None, constants=()) -> tuple[Tensor, ...]:
    gaps = (torch.cat([rows[:1], columns[:1]]) if both else rows[:1]) - rows[1]
    count = max(gaps.numel(), 1)
    loss = _softplus(gaps).sum() / count
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


# --- averages of anchors' losses --------------------------------------------------------------------------------------


def _average(losses: Tensor, how: float) -> Tensor:
    if how == Average.ABOVE_ZERO.value:
        losses = losses.relu()
        return losses.sum() / losses.detach().count_nonzero().clamp_min(1)
    total = losses.sum()
    return total / max(losses.shape[0], 1) if how == Average.MEAN.value else total


def _anchors_value(anchors, *inputs) -> Tensor:
    vectors = [v for v in inputs if isinstance(v, Tensor)]
    how, *constants = inputs[len(vectors) :]
    return _average(anchors(*vectors, *constants), how)


def _anchors_slopes(
    anchors, anchor_slopes, rows: Tensor, columns: Tensor, counts: Tensor | None, constants: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    how, *constants = constants
    inputs = (*rows[:2], *(() if counts is None else counts), *constants)
    losses, slopes = anchors(*inputs), torch.stack(anchor_slopes(*inputs))
    of_rows = torch.zeros_like(rows)
    if how == Average.ABOVE_ZERO:
        kept = ~(losses <= 0)
        number = kept.count_nonzero().clamp_min(1)
        of_rows[:2] = torch.where(kept, slopes / number, 0.0)
        return torch.where(kept, losses, 0.0).sum() / number, of_rows, torch.zeros_like(columns)
    number = max(losses.shape[0], 1) if how == Average.MEAN else 1
    torch.div(slopes, number, out=of_rows[:2])
    return losses.sum() / number, of_rows, torch.zeros_like(columns)


def _anchors(name: str, anchors, anchor_slopes, counts: int = 0) -> Formula:
    value = functools.partial(_anchors_value, anchors)
    return Formula(name, value, functools.partial(_anchors_slopes, anchors, anchor_slopes), 2, counts, anchors)


def _meets(positives: Tensor, others: Tensor) -> Tensor:
    return (positives > 0) & (others > 0)


def _has_pairs(positives: Tensor, others: Tensor, alone: float) -> Tensor:
    return positives > 0 if alone else (positives > 0) & (others > 0).any()


def _sup_con(log_sum: Tensor, attraction: Tensor, positives: Tensor, others: Tensor, alone: float) -> Tensor:
    kept = _has_pairs(positives, others, alone)
    return torch.where(kept, log_sum - attraction / positives.clamp_min(1), 0.0)


def _sup_con_slopes(log_sum, attraction, positives, others, alone) -> list[Tensor]:
    kept = _has_pairs(positives, others, alone).to(log_sum.dtype)
    return [kept, -kept / positives.clamp_min(1)]


def _multi_similarity(positive: Tensor, negative: Tensor, alpha: float, beta: float) -> Tensor:
    return _softplus(positive) / alpha + _softplus(negative) / beta


def _multi_similarity_slopes(positive: Tensor, negative: Tensor, alpha: float, beta: float) -> list[Tensor]:
    return [positive.sigmoid() / alpha, negative.sigmoid() / beta]


def _circle(positive: Tensor, negative: Tensor, positives: Tensor, others: Tensor) -> Tensor:
    return torch.where(_meets(positives, others), _softplus(positive + negative), 0.0)


def _circle_slopes(positive: Tensor, negative: Tensor, positives: Tensor, others: Tensor) -> list[Tensor]:
    return [torch.where(_meets(positives, others), (positive + negative).sigmoid(), 0.0)] * 2


def _violation(near: Tensor, far: Tensor, sign: float, margin: float) -> Tensor:
    return torch.add(margin, far - near, alpha=sign)


def _triplet(near: Tensor, far: Tensor, exist: Tensor, sign: float, margin: float, smooth: float) -> Tensor:
    violation = _violation(near, far, sign, margin)
    return torch.where(exist > 0, _softplus(violation) if smooth else violation.relu(), 0.0)


def _triplet_slopes(near, far, exist, sign, margin, smooth) -> list[Tensor]:
    violation = _violation(near, far, sign, margin)
    slope = violation.sigmoid() if smooth else (~(violation <= 0)).to(near.dtype)
    of_far = torch.where(exist > 0, slope, 0.0) * sign
    return [-of_far, of_far]


#: log-sum - attraction / positives, of rows (log-sum, attraction, ...) and counts (positives, others); 0 for an anchor
#: without positives and, if the constant is 0, for all where none has others.
SUP_CON = _anchors("sup_con", _sup_con, _sup_con_slopes, counts=2)
#: softplus(positive) / α + softplus(negative) / β, of rows (positive, negative, ...); constants α and β.
MULTI_SIMILARITY = _anchors("multi_similarity", _multi_similarity, _multi_similarity_slopes)
#: softplus(positive + negative), of rows (positive, negative, ...) and counts (positives, others); 0 for an anchor
#: without one of both.
CIRCLE = _anchors("circle", _circle, _circle_slopes, counts=2)

#: [sign (far - near) + margin]_+ or, if the last constant is not 0, its softplus, of rows (near, far, ...) and counts
#: (0 where there is no such triplet); constants sign and margin.
TRIPLET = _anchors("triplet", _triplet, _triplet_slopes, counts=1)


# --- averages of pairs' losses ----------------------------------------------------------------------------------------


def _pairs(parts: int, *inputs: Tensor) -> Tensor:
    sums, counts = inputs[:parts], inputs[parts:]
    return sum(s.sum() / c.sum().clamp_min(1) for s, c in zip(sums, counts, strict=True))


def _pairs_slopes(parts: int, rows: Tensor, columns: Tensor, counts: Tensor, constants=()) -> tuple[Tensor, ...]:
    of_one = 1 / counts.sum(1).clamp_min_(1)
    of_rows = torch.zeros_like(rows)
    of_rows[:parts] = of_one[:, None]
    return (rows[:parts].sum(1) * of_one).sum(), of_rows, torch.zeros_like(columns)


#: The mean over pairs, of rows (sum, ...) and counts (pairs).
MEAN_OF_PAIRS = Formula("mean_of_pairs", functools.partial(_pairs, 1), functools.partial(_pairs_slopes, 1), 1, 1)
#: The sum of two such means, of rows (sum, sum, ...) and counts (pairs, pairs).
MEANS_OF_PAIRS = Formula("means_of_pairs", functools.partial(_pairs, 2), functools.partial(_pairs_slopes, 2), 2, 2)

_ALL = (MEAN_GAP, MEAN_GAP_OF_BOTH, SUP_CON, MULTI_SIMILARITY, CIRCLE, MEAN_OF_PAIRS, MEANS_OF_PAIRS, TRIPLET)
#: In the order of csrc/formulas_cpu.h.
FORMULAS = {formula.name: formula for formula in _ALL}


def counted(name: str, rows: Tensor, counts: Tensor | None) -> Tensor | None:
    """The counts (k, B) that a formula reads: those given or, without, the statistics behind those that it reads."""
    formula = FORMULAS[name]
    return rows[formula.reads : formula.reads + formula.counts] if counts is None and formula.counts else counts
