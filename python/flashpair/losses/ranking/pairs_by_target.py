"""Sums over the pairs of each list, every pair once with the higher target first; value and gradient from one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...distributed.sharded import current
from ...eager import eagerly
from ...workspace import workspace_bytes

#: Elements of a tile on a CPU, so that what a formula makes of it stays in the caches; its tensors that exist at once.
_CPU_ELEMENTS, _COPIES = 1 << 17, 16


class Tile(NamedTuple):
    """Some pairs of sorted items: those of `rows` come before those of `columns`."""

    rows: slice
    columns: slice
    ragged: bool  # whether some of its pairs are not asked for


#: (differences of scores (b, m), which it may overwrite; which pairs) to (losses (b, m), slopes (b, m)).
Formula = Callable[[Tensor, Tile], tuple[Tensor, Tensor]]


class PairsByTarget:
    """The pairs of items of one list; the first of a pair has the higher target, or the same.

    Args:
        targets: (n,). lists: (n,) int64, which list an item is in.
    """

    order: Tensor  # (n,) int64, sorted position → item: list by list, the highest target first
    tie_end: Tensor  # (n,) int64, by sorted position: end of the items of the list that have the same target
    list_end: Tensor  # (n,) int64, by sorted position: end of the list

    def __init__(self, targets: Tensor, lists: Tensor) -> None:
        order = targets.argsort(descending=True, stable=True)
        self.order = order = order[lists[order].argsort(stable=True)]
        other_list = lists[order][1:] != lists[order][:-1]
        self.list_end = _ends(other_list)
        self.tie_end = _ends(other_list | (targets[order][1:] != targets[order][:-1]))
        self._position = torch.arange(len(order), device=order.device)
        self._bounds: list[list[int]] | None = None

    @property
    def unequal(self) -> Tensor:
        """0-d int64: how many pairs have two targets."""
        return (self.list_end - self.tie_end).sum()

    @property
    def all(self) -> Tensor:
        """0-d int64: how many pairs there are."""
        return (self.list_end - self._position - 1).sum()

    @eagerly
    def sum(self, scores: Tensor, unequal: Formula, equal: Formula | None = None) -> Tensor:
        """Sum of the losses of pairs (i, j), functions of `scores[i] - scores[j]`.

        Memory O(n) and a tile. The ranks of a group share the tiles. Differentiable once, in the scores only.

        Args:
            scores: (n,) float32 or float64.
            unequal: loss and slope of pairs of which the first has the higher target.
            equal: loss and slope of pairs with one target, of which either may be the first. Default: 0.
        """
        if self._bounds is None:  # read from the device once
            self._bounds = torch.stack([self._position + 1, self.tie_end, self.list_end]).tolist()
        after, ties, lists = self._bounds
        elements = workspace_bytes(None) // (scores.element_size() * _COPIES)
        if scores.device.type == "cpu":
            elements = min(elements, _CPU_ELEMENTS)
        work = [(unequal, tile, self.tie_end, self.list_end) for tile in _tiles(ties, lists, elements)]
        if equal is not None:
            nearest = self._position + 1
            work += [(equal, tile, nearest, self.tie_end) for tile in _tiles(after, ties, elements)]
        return _Sum.apply(scores[self.order], self._position, work)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, position: Tensor, work: Sequence[tuple[Formula, Tile, Tensor, Tensor]]):
        ranks = current()
        found = scores.new_zeros(len(scores) + 1, dtype=torch.float64)  # the gradient, then the sum
        for formula, tile, start, end in work if ranks is None else work[ranks.rank :: ranks.size]:
            losses, slopes = formula(scores[tile.rows, None] - scores[None, tile.columns], tile)
            if tile.ragged:
                column = position[None, tile.columns]
                outside = (column < start[tile.rows, None]) | (column >= end[tile.rows, None])
                losses, slopes = losses.masked_fill_(outside, 0.0), slopes.masked_fill_(outside, 0.0)
            found[-1] += losses.sum()
            found[tile.rows] += slopes.sum(1)
            found[tile.columns] -= slopes.sum(0)
        if ranks is not None:
            found = ranks.total(found)
        found = found.to(scores.dtype)
        ctx.save_for_backward(found[:-1])
        return found[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        (gradient,) = ctx.saved_tensors
        return gradient * cotangent, None, None


def _ends(other: Tensor) -> Tensor:
    """(n,) end of the run that each of n items is in; `other` (n - 1,): whether a run ends between two neighbours."""
    n = len(other) + 1
    position = torch.arange(1, n + 1, device=other.device)
    last = torch.cat([other, other.new_ones(1)])
    return torch.where(last, position, n).flip(0).cummin(0).values.flip(0)


def _tiles(start: list[int], end: list[int], elements: int) -> Iterator[Tile]:
    """The pairs of each row i with the columns start[i] ... end[i], neither of which ever falls, in tiles."""
    n, first = len(start), 0
    while first < n:
        if end[first] <= start[first]:
            first += 1
            continue
        low, last = start[first], first + 1
        while last < n and (last + 1 - first) * (end[last] - low) <= elements:
            last += 1
        rows = slice(first, last)
        # Columns that all rows have need no mask.
        inner = start[last - 1], end[first]
        if inner[0] < inner[1]:
            parts = [(low, inner[0], True), (*inner, False), (inner[1], end[last - 1], True)]
        else:
            parts = [(low, end[last - 1], True)]
        yield from (Tile(rows, slice(a, b), ragged) for a, b, ragged in parts if a < b)
        first = last


__all__ = ["PairsByTarget", "Tile"]
