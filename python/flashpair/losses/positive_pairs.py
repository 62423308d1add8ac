"""Losses of single positive pairs that look at whole rows of both ends: one block of pairs at a time, computed again in
the backward pass, so that memory does not grow with the number of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..distributed.sharded import bound
from ..label_order import label_order
from ..miners.selection import settled
from ..request import statistics_dtype
from ..terms import Mask
from .problem import PairProblem
from .reducers import Rule


def positive_pairs(problem: PairProblem, step: int, once: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks (rows, columns) of at most `step` positive pairs.

    Args:
        once: of a self-similarity, only one of (i, p) and (p, i).
    """
    if problem.pairs is not None:
        yield from zip(*(index.split(step) for index in problem.pairs[Mask.SAME]), strict=True)
        return
    labels, device = problem.labels, problem.x.device
    excluded = torch.arange(labels.shape[0], device=device) if problem.y is None else problem.exclude
    found = label_order(labels, problem.ref_labels, excluded)
    order, start, count, own, inside = *found, found.own_inside
    if once:
        count, start = start + count - own - 1, own + 1
        inside = torch.zeros_like(inside)
    else:
        count = count - inside.long()
    ends = count.cumsum(0)
    for first in range(0, int(ends[-1]) if len(ends) else 0, step):
        pair = torch.arange(first, min(first + step, int(ends[-1])), device=device)
        row = torch.searchsorted(ends, pair, right=True)
        position = start[row] + pair - (ends[row] - count[row])
        position = position + (inside[row] & (position >= own[row])).long()  # step over the excluded column
        yield _within(problem, row, order[position])


@torch.no_grad()
def _within(problem: PairProblem, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs between the mined thresholds of their rows."""
    bounds = settled(problem.bounds.get(Mask.SAME, {}))
    if not bounds:
        return rows, columns
    s = problem.similarity(rows, columns)
    keep = torch.ones_like(s, dtype=torch.bool)
    for name, drops in (("above", torch.le), ("below", torch.ge)):
        if name in bounds:
            keep &= ~drops(s, bounds[name][rows])
    return rows[keep], columns[keep]


def sums_over_positive_pairs(
    problem: PairProblem,
    losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    step: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """(B,) sums and (B,) counts by row of what `losses(rows, columns)` says of each pair of a block: (sum, count).

    Args:
        symmetric: the losses of (i, p) and (p, i) of a self-similarity are equal.
    """
    once = symmetric and problem.y is None and problem.pairs is None and not problem.bounds
    sums = counts = None
    losses = bound(losses)  # it runs again in the backward pass
    for rows, columns in positive_pairs(problem, step, once):
        found = checkpoint(losses, rows, columns, use_reentrant=False, preserve_rng_state=False)
        if sums is None:
            sums, counts = (torch.zeros_like(problem.x[:, 0], dtype=v.dtype).detach() for v in found)
        for index in (rows, columns) if once else (rows,):
            sums, counts = sums.index_add(0, index, found[0]), counts.index_add(0, index, found[1].detach())
    if sums is None:
        zero = problem.x.sum(1, dtype=statistics_dtype(problem.x)) * 0  # keeps the graph
        return zero, zero.detach()
    return sums, counts


def single_losses(values: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """(losses, counts) of pairs with one loss each, those out of the rule's bounds dropped."""
    keep = torch.ones_like(values, dtype=torch.bool)
    if rule.low is not None:
        keep = keep & ~(values.detach() <= rule.low)
    if rule.high is not None:
        keep = keep & ~(values.detach() >= rule.high)
    return torch.where(keep, values, 0.0), keep.to(values.dtype)
