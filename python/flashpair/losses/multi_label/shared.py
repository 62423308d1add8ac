"""Weighted sums of similarities over the pairs that share a label: linear in them, so one sparse product is the value
and the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...eager import eagerly
from ...panels import float32_products
from ...request import statistics_dtype
from ...terms import Precision
from .label_sets import Sharing, over_ranks


class Repeated:
    """Chunks of pairs that are found again each time they are asked for, unless there is only one."""

    def __init__(self, find: Callable[[], Iterator[Sharing]]) -> None:
        self.find, self.only = find, None

    def __iter__(self) -> Iterator[Sharing]:
        if self.only is not None:
            yield self.only
            return
        first = None
        for count, pairs in enumerate(self.find()):
            first = pairs if count == 0 else None
            yield pairs
        self.only = first


def unit_rows(x: Tensor) -> Tensor:
    """x / max(norm, 1e-12) in the statistics dtype, whole."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x.to(statistics_dtype(x)), dim=1, eps=1e-12)


@torch.no_grad()
def _product(chunks: Iterable[Sharing], weights: Callable[[Sharing], Tensor], values: Tensor, rows: int) -> Tensor:
    """(rows, D) Σ_j weight(i, j) values_j."""
    found = values.new_zeros(rows, values.shape[1])
    for pairs in chunks:
        with torch.autocast(values.device.type, enabled=False), float32_products(values, Precision.IEEE):
            found[pairs.first : pairs.end] = pairs.times(weights(pairs), values)
    return over_ranks(found)


@eagerly
def pull_within(x: Tensor, chunks: Iterable[Sharing], both: Callable[[Sharing], Tensor]) -> Tensor:
    """0-d `Σ_ij w_ij <x_i, x_j>`, differentiable in x.

    Args:
        x: (B, D) in the statistics dtype.
        both: w_ij + w_ji of each pair, a constant.
    """
    product = _product(chunks, both, x.detach(), len(x))
    return (x * product).sum() - 0.5 * (x.detach() * product).sum()  # the product is twice the value, and the gradient


@eagerly
def pull_towards(x: Tensor, others: Tensor, chunks: Iterable[Sharing], weights: Callable[[Sharing], Tensor]) -> Tensor:
    """0-d `Σ_ij w_ij <x_i, others_j>`, differentiable in x alone."""
    return (x * _product(chunks, weights, others.detach(), len(x))).sum()


@torch.no_grad()
def listed(x: Tensor, pairs: Sharing) -> Tensor:
    """<x_i, x_j> of the pairs, from a panel of whole rows."""
    with torch.autocast(x.device.type, enabled=False), float32_products(x, Precision.IEEE):
        panel = x[pairs.first : pairs.end] @ x.T
    return panel if pairs.panel else panel[pairs.row - pairs.first, pairs.other]
