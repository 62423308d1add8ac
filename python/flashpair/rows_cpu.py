"""The C++ operators of formulas over whole rows, on panels in the memory of a CPU; see `csrc/bind_rows_cpu.cpp`.

Who calls them has asked `backend_cpu.at_hand`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .terms import Mask

if TYPE_CHECKING:
    from .rows import RowPanel


def distances_(s: Tensor, row_squares: Tensor, column_squares: Tensor, unit: bool, root: bool) -> None:
    """Products (b, n), in place, to squared distances, or to their roots.

    Args:
        row_squares: (b,) and column_squares: (n,) of the rows that were multiplied. unit: none is above 1.
    """
    torch.ops.flashpair_cpu.distances.default(s, row_squares.contiguous(), column_squares.contiguous(), unit, root)


def through_roots(slopes: Tensor, s: Tensor) -> Tensor:
    """Slopes (b, n) in distances s to slopes in their squares, 0 where these are 0."""
    return torch.ops.flashpair_cpu.through_roots.default(slopes.contiguous(), s.contiguous())


def ordered_log_sums(
    s: Tensor, scale: Tensor, own: Tensor, targets: Tensor, order: Tensor, left_out: Tensor, slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a panel's rows, Σ_k LSE_{j as far as k or farther} l_j - l_k, l = -scale s, and its slopes in s and scale.

    Args:
        s: (b, n) in the dtype of statistics. scale: 0-d.
        own: (b,) and targets: (n,), the latter ascending, float32 or float64; |own - target| is how far a column is.
        order: (n,) the column that each target belongs to.
        left_out: (b,) column that a row never meets, -1: none.
        slopes: without them that in s is empty.
    """
    s, own, targets, order, left_out = (v.contiguous() for v in (s, own, targets, order, left_out))
    return torch.ops.flashpair_cpu.ordered_log_sums.default(s, scale.item(), own, targets, order, left_out, slopes)


def tabulated(
    values: Tensor, slopes: Tensor, s: Tensor, left_out: Tensor, margin: int, of_s: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of a tabulated function of a panel's entries, and its slopes in the table's values and slopes and in s.

    Args:
        values, slopes: (knots,) at even knots over [-1, 1], `margin` of them beyond on either side.
        s: (b, n). left_out: (b,) column that a row never meets, -1: none.
        of_s: without it the slope in s is empty.
    """
    given = (v.contiguous() for v in (values, slopes, s, left_out))
    return torch.ops.flashpair_cpu.tabulated.default(*given, margin, of_s)


def hardest(
    s: Tensor, own: Tensor, kept: int, scale: Tensor, weight: float | None, slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over a panel's rows of log(1 + Σ_j e^(scale (s_j - s_own))) over the `kept` largest others, its slopes.

    Args:
        s: (b, n) of unit vectors. own: (b,) the column of each row's positive.
        kept: from 1 to n - 1; those level with the last one, but for rounding, are kept too.
        scale: 0-d.
        weight: instead weight · (mean of the kept) - s_own, without a slope in the scale. None: the log-sum.
        slopes: without them that in s is empty.

    Returns:
        Total, its slopes in s (b, n) and in the scale.
    """
    given = s.contiguous(), own.contiguous()
    return torch.ops.flashpair_cpu.hardest.default(*given, kept, scale.item(), weight, slopes)


def pair_gate(p: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """(b, n) Σ_h v_h tanh(p_hi + q_hj) of p (units, b), q (units, n) and v (units,)."""
    return torch.ops.flashpair_cpu.pair_gate.default(p.contiguous(), q.contiguous(), v.contiguous(), None)[0]


def pair_gate_slopes(p: Tensor, q: Tensor, v: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the cotangents (b, n) of the gate say of p, q and v."""
    given = (t.contiguous() for t in (p, q, v, cotangent))
    return torch.ops.flashpair_cpu.pair_gate.default(*given)


def _columns(panel: RowPanel) -> tuple[Tensor, ...]:
    return tuple(v.contiguous() for v in (panel.s.detach(), panel.start, panel.count, panel.own))


def soft_ranks(panel: RowPanel, points: Tensor, mask: Mask, scale: float, step: int, sign: float, own: bool) -> Tensor:
    """`losses.ranks.soft_ranks`, (b, P); step by its place in `Step`."""
    return _soft_ranks(panel, points, mask, scale, step, sign, own, None)[0]


def soft_rank_slopes(
    panel: RowPanel, points: Tensor, mask: Mask, scale: float, step: int, sign: float, own: bool, cotangent: Tensor
) -> tuple[Tensor, Tensor]:
    """What the cotangents (b, P) of the ranks say of the points and of s."""
    return _soft_ranks(panel, points, mask, scale, step, sign, own, cotangent.contiguous())


def _soft_ranks(panel, points, mask, scale, step, sign, own, cotangent) -> tuple[Tensor, Tensor]:
    given = own, int(mask), sign, points.contiguous(), scale, step, cotangent
    return torch.ops.flashpair_cpu.soft_ranks.default(*_columns(panel), *given)


def triplet_sums(
    panel: RowPanel, sign: float, low: float, high: float, closed: bool, slopes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`losses.ranks.triplet_sums`, and the slopes of the sums in s, empty if not wanted."""
    return torch.ops.flashpair_cpu.triplet_sums.default(*_columns(panel), sign, low, high, closed, slopes)


def sums_below(
    panel: RowPanel, mask: Mask, limits: Tensor, closed: bool, with_sums: bool, sign: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(b, K) how many columns under a mask have sign · s below each limit (`closed`: or level), and sums of their s."""
    given = int(mask), sign, limits.contiguous(), closed, with_sums, None
    return torch.ops.flashpair_cpu.sums_below.default(*_columns(panel), *given)[:2]


def sums_below_slopes(panel: RowPanel, mask: Mask, limits: Tensor, closed: bool, cotangent: Tensor) -> Tensor:
    """What the cotangents (b, K) of the sums say of s."""
    given = int(mask), 1.0, limits.contiguous(), closed, False, cotangent.contiguous()
    return torch.ops.flashpair_cpu.sums_below.default(*_columns(panel), *given)[2]


def next_above(panel: RowPanel, points: Tensor, sign: float) -> Tensor:
    """`losses.ranks.next_above`."""
    return torch.ops.flashpair_cpu.next_above.default(*_columns(panel), sign, points.contiguous())


def soft_histogram(panel: RowPanel, mask: Mask, weights: Tensor | None, low: float, high: float, bins: int) -> Tensor:
    """`losses.ranks.row_histogram`, (b, bins + 1)."""
    return _soft_histogram(panel, mask, weights, low, high, bins, None)[0]


def soft_histogram_slopes(
    panel: RowPanel, mask: Mask, weights: Tensor | None, low: float, high: float, bins: int, cotangent: Tensor
) -> Tensor:
    """What the cotangents (b, bins + 1) of the nodes say of s."""
    return _soft_histogram(panel, mask, weights, low, high, bins, cotangent.contiguous())[1]


def _soft_histogram(panel, mask, weights, low, high, bins, cotangent) -> tuple[Tensor, Tensor]:
    given = int(mask), None if weights is None else weights.contiguous(), low, high, bins, cotangent
    return torch.ops.flashpair_cpu.soft_histogram.default(*_columns(panel), *given)
