"""Columns in the order of their labels, where the members of a class are neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LabelOrder(NamedTuple):
    """Where the columns that share a row's label stand once columns are sorted by label."""

    order: Tensor  # (N,) int64, sorted position → column
    start: Tensor  # (B,) int64, first position of a row's class
    count: Tensor  # (B,) int64, its columns, the excluded one included
    own: Tensor  # (B,) int64, position of the column that the row never meets, -1: none

    @property
    def own_inside(self) -> Tensor:
        """(B,) bool: whether the excluded column is of the row's class."""
        return (self.own >= self.start) & (self.own < self.start + self.count)


def positions(order: Tensor, column: Tensor | None, rows: int) -> Tensor:
    """(B,) sorted position of one column a row (B,), -1 where there is none."""
    if column is None or order.numel() == 0:
        return torch.full((rows,), -1, dtype=torch.int64, device=order.device)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    there = (column >= 0) & (column < order.shape[0])
    return torch.where(there, place[column.clamp(0, order.shape[0] - 1)], -1)


def label_order(labels: Tensor, ref_labels: Tensor | None, excluded: Tensor | None) -> LabelOrder:
    """The order of the columns `ref_labels` (N,), or `labels` (B,) themselves; `excluded`: (B,), a column a row."""
    ordered, order = (labels if ref_labels is None else ref_labels).sort(stable=True)
    start = torch.searchsorted(ordered, labels)
    count = torch.searchsorted(ordered, labels, right=True) - start
    return LabelOrder(order, start, count, positions(order, excluded, labels.shape[0]))
