"""What one pass over the pairs computes: a list of terms, each `reduce_j score(z_ij)` over masked pairs.

    s_ij = similarity(x_i, y_j)
    z_ij = scale_i * s_ij + combine(offset_i, other_offset_j)
    term_i = reduce_j  weight_j * score(z_ij)      over the j kept by mask(i, j), above_i < s_ij < below_i

A pass may have a second product t_ij = <u_i, v_j>, a guide's similarities, say, or a teacher's, or label overlaps; a
term's `Guide` says what t_ij does to it.

`i` runs over the term's *owners*: the rows of the similarity matrix for `Axis.ROWS`, its columns for
`Axis.COLUMNS` (then read `s_ji` above). The orders of the enums below are repeated in `csrc/scores.h`,
`csrc/masks.h`, `csrc/reductions.h` and in `flashpair.kernels`; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Similarity(IntEnum):
    """How two embeddings are compared; cosine is `DOT` with `normalize=True`."""

    DOT = 0
    SQUARED_EUCLIDEAN = 1
    EUCLIDEAN = 2


class Score(IntEnum):
    """The scalar function applied to z; `c` is the term's `constant`. Slopes stand in `reference.py`."""

    IDENTITY = 0  # z
    HINGE = 1  # max(z, 0)
    SOFTPLUS = 2  # log(1 + exp(z))
    SQUARE = 3  # z ** 2
    SQUARED_HINGE = 4  # max(z, 0) ** 2
    CIRCLE = 5  # detached max(z + c, 0), times (z - c)
    SOFTCAP = 6  # c tanh(z / c), c > 0
    LOG_COSH = 7  # log cosh z


class Mask(IntEnum):
    """Which pairs a term sees, before its thresholds."""

    ALL = 0
    SAME = 1  # labels[i] == ref_labels[j]
    DIFFERENT = 2  # labels[i] != ref_labels[j]
    GIVEN = 3  # pair_mask[i, j]
    NOT_GIVEN = 4  # not pair_mask[i, j]


class Reduction(IntEnum):
    """How a term reduces over the kept pairs of one owner. Value of an empty row in brackets."""

    SUM = 0  # sum_j w_j score(z_ij)                                      [0]
    COUNT = 1  # number of kept j with score(z_ij) > 0; not differentiable  [0]
    LOGSUMEXP = 2  # log sum_j w_j exp(score(z_ij))                           [-inf]
    SOFTMAX_MEAN = 3  # sum_j p_ij s_ij, p_i = softmax_j over the kept pairs     [0]
    MOMENTS = 4  # (count, mean, variance, min, max) of s; not differentiable   [0, 0, 0, +inf, -inf]
    MAX = 5  # max_j score(z_ij), whatever the weights; not differentiable    [-inf]

    @property
    def differentiable(self) -> bool:
        return self not in (Reduction.COUNT, Reduction.MOMENTS, Reduction.MAX)

    @property
    def slots(self) -> int:
        """Number of vectors that the reduction keeps per owner."""
        return 5 if self == Reduction.MOMENTS else 2 if self == Reduction.SOFTMAX_MEAN else 1


class Axis(IntEnum):
    """Who owns a term's statistic."""

    ROWS = 0
    COLUMNS = 1


class Combine(IntEnum):
    """How an owner's offset and the other side's offset meet in z."""

    ADD = 0
    LOGADDEXP = 1


class Guide(IntEnum):
    """What the second product t of a pass does to a term. No gradient reaches t."""

    NONE = 0
    THRESHOLD = 1  # above_i < t_ij < below_i instead of s_ij: a guide says which pairs count
    WEIGHT = 2  # the weight of a pair is w_j t_ij; of a softmax only pairs with t_ij > 0 are part
    LOGITS = 3  # z_ij = scale_i t_ij + ...: a SOFTMAX_MEAN of s with a teacher's softmax, weights detached


class Precision(IntEnum):
    """Arithmetic of float32 matrix products on a GPU; other inputs and backends ignore it."""

    IEEE = 0
    TF32 = 1


@dataclass(eq=False)  # not frozen: losses construct some at every call, which a frozen class makes slow
class Term:
    """One masked reduction of a pass.

    Args:
        reduction: how the kept pairs of an owner are reduced.
        score: function applied to z before reducing. Default: identity.
        mask: pairs the term sees. Default: all (self pairs are handled by `pair_reduce(exclude_self=)`).
        axis: who owns the statistic. Default: rows.
        scale: float, 0-d tensor or (owners,) tensor. Default 1. Differentiable.
        offset: float, 0-d tensor or (owners,) tensor. Default 0. Differentiable.
        other_offset: None or a vector along the reduced side. Differentiable.
        combine: how the two offsets meet, a sum or `logaddexp`. Default: sum.
        weight: None or a vector along the reduced side (non-negative for softmax-type reductions, where a zero
            removes the pair, so that this weight has gradient 0). Differentiable.
        above: None, float, 0-d tensor or (owners,) tensor; keeps pairs with s > above. Not differentiable.
        below: None, float, 0-d tensor or (owners,) tensor; keeps pairs with s < below. Not differentiable.
        constant: the `c` of `Score.CIRCLE`, and of `Score.SOFTCAP`, which needs it positive and finite in float32.
            Default 0.
        detach_weights: for `SOFTMAX_MEAN`, treat the softmax weights as constants in the backward pass.
        guide: what the second product of the pass (`pair_reduce(guide=)`) does here. Default: nothing.

    A NaN in s, in t or in a threshold keeps the pair, so that it shows in the result.

    Example:
        >>> from flashpair import Reduction, Term
        >>> Term(Reduction.LOGSUMEXP, scale=10.0).scale
        10.0
    """

    reduction: Reduction
    score: Score = Score.IDENTITY
    mask: Mask = Mask.ALL
    axis: Axis = Axis.ROWS
    scale: float | Tensor = 1.0
    offset: float | Tensor = 0.0
    other_offset: Tensor | None = None
    combine: Combine = Combine.ADD
    weight: Tensor | None = None
    above: float | Tensor | None = None
    below: float | Tensor | None = None
    constant: float = 0.0
    detach_weights: bool = False
    guide: Guide = Guide.NONE


@dataclass(frozen=True, eq=False)
class Extreme:
    """One request of `mine`: the k largest or smallest similarities of each row under a mask.

    Args:
        mask: pairs that may be chosen. Default: all.
        largest: True for the largest similarities, False for the smallest.
        k: how many per row, 1 to 64.
        above: None, float, 0-d tensor or (B,) tensor; only s > above may be chosen.
        below: None, float, 0-d tensor or (B,) tensor; only s < below may be chosen.

    Example:
        >>> from flashpair import Extreme, Mask
        >>> Extreme(Mask.DIFFERENT, largest=True).k
        1
    """

    mask: Mask = Mask.ALL
    largest: bool = True
    k: int = 1
    above: float | Tensor | None = None
    below: float | Tensor | None = None
