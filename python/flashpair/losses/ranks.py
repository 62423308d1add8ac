"""What row formulas are made of: soft ranks, soft histograms, and sums over the triplets of a row without listing
them."""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..rows import RowPanel

#: Points of a row up to which each is compared with all columns; more are found by bisection.
FEW = 8


class Step(Enum):
    """The function of a difference that `soft_ranks` sums."""

    SIGMOID = "sigmoid"
    SOFTPLUS = "softplus"
    HINGE = "hinge"


def _apply(step: Step, z: Tensor) -> Tensor:
    if step == Step.HINGE:
        return z.clamp_min_(0)
    return z.sigmoid_() if step == Step.SIGMOID else F.softplus(z, threshold=40)


def _slope(step: Step, z: Tensor) -> Tensor:
    if step == Step.HINGE:
        return (z > 0).to(z.dtype)
    share = z.sigmoid_()
    return share.mul_(1 - share) if step == Step.SIGMOID else share


class _SoftRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, keep, points, scale, step):
        values = values.masked_fill(~keep, -torch.inf)  # both steps are 0 there, with slope 0
        ctx.save_for_backward(values, points)
        ctx.static = scale, step
        out = torch.empty_like(points)
        for p in range(points.shape[1]):
            out[:, p] = _apply(step, (values - points[:, p : p + 1]).mul_(scale)).sum(1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        values, points = ctx.saved_tensors
        scale, step = ctx.static
        by_value, by_point = torch.zeros_like(values), torch.empty_like(points)
        for p in range(points.shape[1]):
            slope = _slope(step, (values - points[:, p : p + 1]).mul_(scale))
            by_point[:, p] = slope.sum(1)
            by_value.addcmul_(slope, cotangent[:, p : p + 1])
        return by_value.mul_(scale), None, by_point.mul_(cotangent).mul_(-scale), None, None


def soft_ranks(values: Tensor, keep: Tensor, points: Tensor, scale: float, step: Step = Step.SIGMOID) -> Tensor:
    """`R_p = Σ_j step(scale (values_j - points_p))` over the kept j of each row, one point at a time.

    Args:
        values: (b, n). keep: (b, n) bool. points: (b, P).

    Returns:
        (b, P); O(b n) memory. Differentiable in values and points.
    """
    return _SoftRanks.apply(values, keep, points, scale, step)


def soft_histogram(values: Tensor, weight: Tensor, low: float, high: float, bins: int) -> Tensor:
    """(b, bins + 1) weights of the nodes low, low + Δ, ..., high: a value gives its two neighbours by their nearness.

    Args:
        values: (b, n), clamped to [low, high].
        weight: (b, n) what each value counts, 0 for none.
    """
    place = (values.clamp(low, high) - low) * (bins / (high - low))
    left = place.detach().floor().clamp_(0, bins - 1)
    right = (place - left) * weight
    left = left.nan_to_num(0).long()  # a NaN value leaves a NaN weight
    nodes = values.new_zeros(values.shape[0], bins + 1)
    return nodes.scatter_add(1, left, weight - right).scatter_add(1, left + 1, right)


def triplet_sums(
    near: Tensor,
    valid: Tensor,
    far: Tensor,
    keep: Tensor,
    low: float | None,
    high: float | None,
    closed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Over the triplets (p, n) of each row with `low < far_n - near_p < high`: their number, and Σ (near_p - far_n).

    Sorted positives and their prefix sums: n log P a row instead of n P.

    Args:
        near: (b, P) distances to the positives, of which `valid` (b, P) exist.
        far: (b, n) distances to the columns, of which `keep` (b, n) are negatives.
        low, high: bounds, None for none. closed: `high` itself is inside.
    """
    ordered, order = near.detach().masked_fill(~valid, torch.inf).sort(dim=1)
    present = valid.sum(1, keepdim=True)
    value = torch.where(valid, near, 0.0).gather(1, order)
    prefix = F.pad(value.cumsum(1), (1, 0))
    start = far.detach()
    zero = torch.zeros_like(present).expand(-1, far.shape[1])
    first = zero if high is None else torch.searchsorted(ordered, start - high, right=not closed).minimum(present)
    last = (
        present.expand(-1, far.shape[1]) if low is None else torch.searchsorted(ordered, start - low).minimum(present)
    )
    met = torch.where(keep, last - first, 0).clamp_min_(0)
    some = met > 0
    sums = prefix.gather(1, torch.where(some, last, 0)) - prefix.gather(1, torch.where(some, first, 0))
    counts = met.to(far.dtype)
    return counts.sum(1), (sums - torch.where(some, counts * far, 0.0)).sum(1)


def counts_below(values: Tensor, keep: Tensor, limits: Tensor, closed: bool = False) -> Tensor:
    """(b, K) int64, how many kept values of each row are below each limit (`closed`: or level with it).

    Args:
        values: (b, n). keep: (b, n) bool. limits: (b, K) in any order. No gradients.
    """
    if limits.shape[1] > FEW:
        return _reached(values, limits.detach(), keep.long(), right=not closed)
    values = values.detach().masked_fill(~keep, torch.inf)
    compare = torch.le if closed else torch.lt
    counts = torch.empty_like(limits, dtype=torch.long)
    for k in range(limits.shape[1]):
        counts[:, k] = compare(values, limits[:, k : k + 1]).sum(1)
    return counts


def sums_up_to(values: Tensor, keep: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """How many kept values of each row are <= each limit, and their sum, which has a gradient in the values.

    Args:
        values: (b, n). keep: (b, n) bool. limits: (b, K) in any order, no gradient.

    Returns:
        (counts (b, K), sums (b, K)); n log K a row.
    """
    weights = keep.to(values.dtype), torch.where(keep, values, 0.0)
    counts, sums = (_reached(values, limits.detach(), w, right=False) for w in weights)
    return counts, sums


def _reached(values: Tensor, limits: Tensor, weight: Tensor, right: bool) -> Tensor:
    """(b, K) weight (b, n) of the values that are <= each limit (`right`: <), by bisection."""
    ordered, order = limits.sort(dim=1)
    place = torch.searchsorted(ordered, values.detach(), right=right)  # how many limits a value is beyond
    nodes = weight.new_zeros(limits.shape[0], limits.shape[1] + 1)
    below = nodes.scatter_add(1, place, weight)[:, :-1].cumsum(1)
    return torch.empty_like(below).scatter(1, order, below)


def gathered(panel: RowPanel, own: bool = False) -> tuple[Tensor, Tensor]:
    """(b, P) similarities to the columns that share the label, and which of them are valid."""
    position, valid = panel.members(own)
    return panel.s.gather(1, position), valid
