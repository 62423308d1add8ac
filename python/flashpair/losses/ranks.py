"""What row formulas are made of: soft ranks, soft histograms, counts below limits and sums over the triplets of a row
without listing them.

Each is plain PyTorch and, on a CPU, an operator of C++ that needs no mask and no sort of the row.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backend_cpu, rows_cpu
from ..rows import RowPanel
from ..terms import Mask

#: Points of a row up to which each is compared with all columns; more are found by bisection.
FEW = 8


class Step(Enum):
    """The function of a difference that `soft_ranks` sums."""

    SIGMOID = "sigmoid"
    SOFTPLUS = "softplus"
    HINGE = "hinge"


def kept(panel: RowPanel, mask: Mask, own: bool = False) -> Tensor:
    """(b, n) bool: the columns under a mask; `own`: the excluded one is like others."""
    if mask == Mask.DIFFERENT:
        return ~panel.member if own else panel.different
    if mask == Mask.SAME:
        return panel.member if own else panel.same
    return torch.ones_like(panel.s, dtype=torch.bool) if own else panel.allowed


def _under(panel: RowPanel, mask: Mask, own: bool = False) -> tuple[Tensor, Tensor]:
    """(similarities, which of them count): of positives only the members of a row, (b, P), else (b, n)."""
    if mask == Mask.SAME:
        return gathered(panel, own)
    return panel.s, kept(panel, mask, own)


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


class _NativeSoftRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, panel, s, points, *how):
        ctx.panel, ctx.how = panel, how
        ctx.save_for_backward(points)
        return rows_cpu.soft_ranks(panel, points, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        of_points, of_s = rows_cpu.soft_rank_slopes(ctx.panel, *ctx.saved_tensors, *ctx.how, cotangent)
        return None, of_s, of_points, None, None, None, None, None


def soft_ranks(
    panel: RowPanel,
    mask: Mask,
    points: Tensor,
    scale: float,
    step: Step = Step.SIGMOID,
    *,
    sign: float = 1.0,
    own: bool = False,
) -> Tensor:
    """`R_p = Σ_j step(scale (sign s_j - points_p))` over the columns of each row under a mask, one point at a time.

    Args:
        points: (b, P). own: the excluded column is like others.

    Returns:
        (b, P); O(b n) memory. Differentiable in s and points.
    """
    if backend_cpu.at_hand(panel.s, points):
        return _NativeSoftRanks.apply(panel, panel.s, points, mask, scale, list(Step).index(step), sign, own)
    values, keep = _under(panel, mask, own)
    return _SoftRanks.apply(values if sign == 1 else sign * values, keep, points, scale, step)


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


class _NativeHistogram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, panel, s, *how):
        ctx.panel, ctx.how = panel, how
        return rows_cpu.soft_histogram(panel, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        of_s = rows_cpu.soft_histogram_slopes(ctx.panel, *ctx.how, cotangent)
        return None, of_s, None, None, None, None, None


def row_histogram(
    panel: RowPanel, mask: Mask, low: float, high: float, bins: int, weights: Tensor | None = None
) -> Tensor:
    """`soft_histogram` of the similarities of each row under a mask.

    Args:
        weights: (n,) what each column counts, without gradient. Default: 1.
    """
    if backend_cpu.at_hand(panel.s):
        return _NativeHistogram.apply(panel, panel.s, mask, weights, low, high, bins)
    values, keep = _under(panel, mask)
    weight = keep.to(values.dtype)
    if weights is not None:
        weight = weight * (weights[panel.members()[0]] if mask == Mask.SAME else weights)
    return soft_histogram(values, weight, low, high, bins)


class _NativeTripletSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, panel, s, *how):
        counts, sums, of_s = rows_cpu.triplet_sums(panel, *how, ctx.needs_input_grad[1])
        ctx.save_for_backward(of_s)
        ctx.mark_non_differentiable(counts)
        return counts, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, _, cotangent):
        (of_s,) = ctx.saved_tensors
        return None, of_s * cotangent[:, None], None, None, None, None


def triplet_counts(panel: RowPanel, sign: float, low: float | None, high: float | None, closed: bool) -> Tensor:
    """(b,) the number of triplets of `triplet_sums`, which without bounds are all."""
    if low is None and high is None:
        positives, negatives = panel.counts
        return (positives * negatives).to(panel.s.dtype)
    return triplet_sums(replace(panel, s=panel.s.detach()), sign, low, high, closed)[0]


def triplet_sums(
    panel: RowPanel, sign: float, low: float | None, high: float | None, closed: bool = False
) -> tuple[Tensor, Tensor]:
    """Over the triplets (p, n) of each row, d = sign s, with `low < d_n - d_p < high`: their number, and Σ d_p - d_n.

    Sorted positives and their prefix sums: n log P a row instead of n P.

    Args:
        low, high: bounds, None for none. closed: `high` itself is inside.
    """
    if backend_cpu.at_hand(panel.s):
        bounds = -torch.inf if low is None else low, torch.inf if high is None else high
        return _NativeTripletSums.apply(panel, panel.s, sign, *bounds, closed)
    position, valid = panel.members()
    near, far, keep = sign * panel.s.gather(1, position), sign * panel.s, kept(panel, Mask.DIFFERENT)
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


def counts_below(panel: RowPanel, mask: Mask, limits: Tensor, closed: bool = False, *, sign: float = 1.0) -> Tensor:
    """(b, K) int64, how many columns of each row under a mask have sign · s below each limit (`closed`: or level).

    A NaN is below nothing, and nothing below a NaN.

    Args:
        limits: (b, K) in any order. No gradients.
    """
    limits = limits.detach()
    if backend_cpu.at_hand(panel.s, limits):
        return rows_cpu.sums_below(panel, mask, limits, closed, False, sign)[0]
    values, keep = sign * panel.s.detach(), kept(panel, mask)
    if limits.shape[1] > FEW:
        # Bisection takes no NaN among the limits.
        never = limits.isnan()
        limits = limits.masked_fill(never, torch.inf)
        return _reached(values, limits, (keep & ~values.isnan()).long(), right=not closed).masked_fill_(never, 0)
    values = values.masked_fill(~keep, torch.inf)
    compare = torch.le if closed else torch.lt
    counts = torch.empty_like(limits, dtype=torch.long)
    for k in range(limits.shape[1]):
        counts[:, k] = compare(values, limits[:, k : k + 1]).sum(1)
    return counts


class _NativeSumsUpTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, panel, s, mask, limits):
        ctx.panel, ctx.mask = panel, mask
        ctx.save_for_backward(limits)
        counts, sums = rows_cpu.sums_below(panel, mask, limits, True, True)
        counts = counts.to(sums.dtype)
        ctx.mark_non_differentiable(counts)
        return counts, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, _, cotangent):
        of_s = rows_cpu.sums_below_slopes(ctx.panel, ctx.mask, *ctx.saved_tensors, True, cotangent)
        return None, of_s, None, None


def sums_up_to(panel: RowPanel, mask: Mask, limits: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each row under a mask have s <= each limit, and the sum of these s, which has a gradient.

    Args:
        limits: (b, K) in any order, no gradient.

    Returns:
        (counts (b, K), sums (b, K)); n log K a row.
    """
    limits = limits.detach()
    if backend_cpu.at_hand(panel.s, limits):
        return _NativeSumsUpTo.apply(panel, panel.s, mask, limits)
    values, keep = panel.s, kept(panel, mask)
    weights = keep.to(values.dtype), torch.where(keep, values, 0.0)
    counts, sums = (_reached(values, limits, w, right=False) for w in weights)
    return counts, sums


def _reached(values: Tensor, limits: Tensor, weight: Tensor, right: bool) -> Tensor:
    """(b, K) weight (b, n) of the values that are <= each limit (`right`: <), by bisection."""
    ordered, order = limits.sort(dim=1)
    place = torch.searchsorted(ordered, values.detach(), right=right)  # how many limits a value is beyond
    nodes = weight.new_zeros(limits.shape[0], limits.shape[1] + 1)
    below = nodes.scatter_add(1, place, weight)[:, :-1].cumsum(1)
    return torch.empty_like(below).scatter(1, order, below)


def next_above(panel: RowPanel, points: Tensor, *, sign: float = 1.0) -> Tensor:
    """(b, P) int64, the column of another class with the smallest sign · s above each point, else with the largest.

    Of equal ones any; a row without columns of other classes gives any column.

    Args:
        points: (b, P). No gradients.
    """
    points = points.detach()
    if backend_cpu.at_hand(panel.s, points):
        return rows_cpu.next_above(panel, points, sign)
    keep = kept(panel, Mask.DIFFERENT)
    ordered, order = (sign * panel.s.detach()).masked_fill(~keep, torch.inf).sort(dim=1)
    place = torch.searchsorted(ordered, points.contiguous(), right=True)
    last = (keep.sum(1, keepdim=True) - 1).clamp_min(0)
    return order.gather(1, torch.minimum(place, last))


def gathered(panel: RowPanel, own: bool = False) -> tuple[Tensor, Tensor]:
    """(b, P) similarities to the columns that share the label, and which of them are valid."""
    position, valid = panel.members(own)
    return panel.s.gather(1, position), valid
