"""Pair weights of a panel, dL/d<x_i, y_j>, and the sums that parameters' gradients need; formulas in `reference.py`."""

import triton
import triton.language as tl

from .masks import keep_tile, labels_meet
from .program import (
    ABSENT,
    COMBINE,
    COTANGENT,
    DETACH,
    LSE,
    MEAN,
    OFFSET,
    OFFSET_SLOT,
    OTHER,
    OTHER_SLOT,
    PARTNER,
    REDUCTION,
    SCALE,
    SCALE_SLOT,
    SCORE,
    SIDE,
    VALUE_SLOT,
    WEIGHT,
    WEIGHT_SLOT,
    WIDTH,
)
from .reductions import (
    LOG2E,
    LOGADDEXP,
    SHARED_RANGE,
    SOFTMAX_MEAN,
    SUM,
    affine,
    combined_offset,
    constant_of,
    exponent,
)
from .scores import score_slope, score_value
from .stats import store_owner
from .tiles import dot_tile, parameter, similarity_tile, tile_of


@triton.jit
def owner(vectors, CODE: tl.constexpr, AT: tl.constexpr, FIELD: tl.constexpr, absent):
    """A parameter of the owners, broadcastable to the tile."""
    return parameter(vectors, CODE[AT + FIELD], CODE[AT + FIELD + 1], CODE[AT + SIDE], absent)


@triton.jit
def base2(lse):
    """A logsumexp in base 2 as an offset; 0 for owners without pairs, whose weights are masked."""
    return tl.where(lse == -float("inf"), 0.0, lse * LOG2E)


@triton.jit
def offset_share(vectors, CODE: tl.constexpr, AT: tl.constexpr, FIELD: tl.constexpr, IS_OWNER: tl.constexpr):
    """d combine(p, q) / dp or dq."""
    side: tl.constexpr = CODE[AT + SIDE]
    if (CODE[AT + COMBINE] == LOGADDEXP) and (CODE[AT + OTHER] != ABSENT):
        p = parameter(vectors, CODE[AT + OFFSET], CODE[AT + OFFSET + 1], side, 0.0)
        q = parameter(vectors, CODE[AT + OTHER], CODE[AT + OTHER + 1], 1 - side, 0.0)
        if IS_OWNER:
            difference = p - q
        else:
            difference = q - p
        share = tl.where(p == q, 0.5, 1.0 / (1.0 + tl.exp(-difference)))
    else:
        share = 1.0
    return share


@triton.jit
def own_probability(s, keep, vectors, CODE: tl.constexpr, AT: tl.constexpr):
    """(w exp(phi(z) - lse), keep) of one evaluation; for a plain sum the first is not used."""
    if CODE[AT + REDUCTION] == SUM:
        p = s
    else:
        e, keep = exponent(s, keep, vectors, CODE, AT)
        p = tl.exp2(e - base2(owner(vectors, CODE, AT, LSE, 0.0)))
    return p, keep


@triton.jit
def term_weights(s, keep, probability, vectors, partials, CODE: tl.constexpr, AT: tl.constexpr):
    """dL/ds of one evaluation (0 outside its mask); stores its sums for parameters and value."""
    side: tl.constexpr = CODE[AT + SIDE]
    reduction: tl.constexpr = CODE[AT + REDUCTION]
    g = owner(vectors, CODE, AT, COTANGENT, 1.0)
    w = parameter(vectors, CODE[AT + WEIGHT], CODE[AT + WEIGHT + 1], 1 - side, 1.0)
    constant = constant_of(vectors, CODE, AT)
    z = affine(s, vectors, CODE, AT, 1.0)
    if reduction == SUM:
        per_weight = g * score_value(z, constant, CODE[AT + SCORE])  # dL/dw
        u = g * w * score_slope(z, constant, CODE[AT + SCORE])  # dL/dz
        direct = 0.0
    else:
        p = g * probability
        u = p * score_slope(z, constant, CODE[AT + SCORE])
        per_weight = p
        direct = 0.0
        if reduction == SOFTMAX_MEAN:
            centred = s - owner(vectors, CODE, AT, MEAN, 0.0)
            direct = p
            if CODE[AT + DETACH]:
                u = u * 0.0
                per_weight = u
            else:
                u = u * centred
                per_weight = p * centred
        if CODE[AT + WEIGHT] != ABSENT:
            per_weight = per_weight / tl.where(w == 0.0, 1.0, w)
    u = tl.where(keep, u, 0.0)
    if CODE[AT + SCALE_SLOT] >= 0:
        store_owner(partials, tl.sum(tl.where(keep, u * s, 0.0), 1 - side), CODE[AT + SCALE_SLOT], side)
    if CODE[AT + OFFSET_SLOT] >= 0:
        share = offset_share(vectors, CODE, AT, OFFSET, True)
        store_owner(partials, tl.sum(tl.where(keep, u * share, 0.0), 1 - side), CODE[AT + OFFSET_SLOT], side)
    if CODE[AT + OTHER_SLOT] >= 0:
        share = offset_share(vectors, CODE, AT, OTHER, False)
        store_owner(partials, tl.sum(tl.where(keep, u * share, 0.0), side), CODE[AT + OTHER_SLOT], 1 - side)
    if CODE[AT + WEIGHT_SLOT] >= 0:
        store_owner(partials, tl.sum(tl.where(keep, per_weight, 0.0), side), CODE[AT + WEIGHT_SLOT], 1 - side)
    if CODE[AT + VALUE_SLOT] >= 0:
        value = w * score_value(z, constant, CODE[AT + SCORE])
        store_owner(partials, tl.sum(tl.where(keep, value, 0.0), 1 - side), CODE[AT + VALUE_SLOT], side)
    ds = u * owner(vectors, CODE, AT, SCALE, 1.0)
    if reduction == SOFTMAX_MEAN:
        ds += tl.where(keep, direct, 0.0)
    return ds


@triton.jit
def pair_probabilities(e, keep, other_keep, lse, other_lse):
    """exp2(e - lse) and exp2(e - other_lse), from one exponential where the owners' logsumexps are close.

    u = exp2(e - (a + b) / 2) with a, b the two; p = u exp2((b - a) / 2) and vice versa, factors of single owners.
    """
    inf = float("inf")
    top = tl.maximum(tl.max(tl.where(lse == -inf, -inf, lse)), tl.max(tl.where(other_lse == -inf, -inf, other_lse)))
    bottom = tl.minimum(tl.min(tl.where(lse == -inf, inf, lse)), tl.min(tl.where(other_lse == -inf, inf, other_lse)))
    a = tl.where(lse == -inf, 0.0, lse)
    b = tl.where(other_lse == -inf, 0.0, other_lse)
    if top - bottom <= SHARED_RANGE:
        half_a = 0.5 * (a - bottom)
        half_b = 0.5 * (b - bottom)
        u = tl.exp2(e - bottom - half_a - half_b)
        p = u * tl.exp2(half_b) * tl.exp2(-half_a)
        other_p = u * tl.exp2(half_a) * tl.exp2(-half_b)
    else:
        p = tl.exp2(e - a)
        other_p = tl.exp2(e - b)
    return tl.where(keep, p, 0.0), tl.where(other_keep, other_p, 0.0)


@triton.jit(do_not_specialize=["B", "N", "first_b", "first_n", "end_b", "end_n"])
def _weights_kernel(
    x_ptr,  # (B, D)
    y_ptr,  # (N, D)
    x_norms_ptr,  # (2, B) float32
    y_norms_ptr,  # (2, N) float32
    x_labels_ptr,  # (B,) int32
    y_labels_ptr,  # (N,) int32
    exclude_ptr,  # (B,) int32
    pair_mask_ptr,  # (B, N) uint8
    numbers,  # floats
    scalars_ptr,  # (S,) float32
    row_vectors_ptr,  # (P, B) float32
    column_vectors_ptr,  # (Q, N) float32
    row_partials_ptr,  # (slots, tiles_n, length_b) float32
    column_partials_ptr,  # (slots, tiles_b, length_n) float32
    weights_ptr,  # (length_b, stride_w) in the dtype of x; columns beyond length_n get zeros
    weight_scale_ptr,  # (1,) float32
    B,
    N,
    D,
    stride_xb,
    stride_yn,
    stride_w,  # length_n rounded up to a multiple of 16, so that stores are wide
    first_b,  # the panel's rows: first_b to end_b
    first_n,
    end_b,
    end_n,
    PROGRAM: tl.constexpr,
    SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    SAME_ONLY: tl.constexpr,
    STORE: tl.constexpr,  # False: only the sums are wanted
    SCALED: tl.constexpr,  # float16: weights are multiplied by weight_scale before rounding
    ROW_SUM_SLOT: tl.constexpr,  # sums of the stored weights, for distances; -1 for none
    COLUMN_SUM_SLOT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    length_b = end_b - first_b
    length_n = end_n - first_n
    tiles_b = tl.cdiv(length_b, BLOCK_B)
    tiles_n = tl.cdiv(length_n, BLOCK_N)
    tile_b, tile_n = tile_of(tl.program_id(0), tiles_b, tiles_n, GROUP)
    at_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    at_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.minimum(first_b + at_b, end_b - 1).to(tl.int64)
    j = tl.minimum(first_n + at_n, end_n - 1).to(tl.int64)
    if SAME_ONLY:
        if labels_meet(x_labels_ptr, y_labels_ptr, i, j) == 0:
            return
    dots = dot_tile(
        x_ptr, y_ptr, i, j, D, stride_xb, stride_yn, BLOCK_B, BLOCK_N, BLOCK_D, EVEN_D, INPUT_PRECISION
    )
    s, slope = similarity_tile(dots, x_norms_ptr, y_norms_ptr, i, j, B, N, SIMILARITY, NORMALIZE)
    inside = (at_b < length_b)[:, None] & (at_n < length_n)[None, :]
    vectors = (numbers, scalars_ptr, row_vectors_ptr, column_vectors_ptr, i, j, B, N)
    partials = (
        row_partials_ptr, column_partials_ptr, tile_b, tile_n, tiles_b, tiles_n, at_b, at_n, length_b, length_n
    )  # fmt: skip
    ds = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for n in tl.static_range(len(PROGRAM) // WIDTH):
        at: tl.constexpr = n * WIDTH
        partner: tl.constexpr = PROGRAM[at + PARTNER]
        if (partner < 0) or (partner > n):
            keep = keep_tile(
                inside, s, vectors, x_labels_ptr, y_labels_ptr, exclude_ptr, pair_mask_ptr,
                PROGRAM, at, False, EXCLUDE_SELF, HAS_EXCLUDE,
            )  # fmt: skip
            if partner > n:
                other: tl.constexpr = partner * WIDTH
                other_keep = keep_tile(
                    inside, s, vectors, x_labels_ptr, y_labels_ptr, exclude_ptr, pair_mask_ptr,
                    PROGRAM, other, False, EXCLUDE_SELF, HAS_EXCLUDE,
                )  # fmt: skip
                e, _ = exponent(s, keep, vectors, PROGRAM, at)
                lse = owner(vectors, PROGRAM, at, LSE, 0.0) * LOG2E
                other_lse = owner(vectors, PROGRAM, other, LSE, 0.0) * LOG2E
                p, other_p = pair_probabilities(e, keep, other_keep, lse, other_lse)
                ds += term_weights(s, other_keep, other_p, vectors, partials, PROGRAM, other)
            else:
                p, keep = own_probability(s, keep, vectors, PROGRAM, at)
            ds += term_weights(s, keep, p, vectors, partials, PROGRAM, at)
    if STORE:
        weights = tl.where(inside, ds * slope, 0.0)
        if SCALED:
            weights = weights * tl.load(weight_scale_ptr)
        stored = weights.to(weights_ptr.dtype.element_ty)
        weights_ptrs = weights_ptr + at_b.to(tl.int64)[:, None] * stride_w + at_n[None, :]
        tl.store(weights_ptrs, stored, mask=(at_b < length_b)[:, None] & (at_n < stride_w)[None, :])
        # Sums of the rounded weights: rounding errors then cancel between W y and its row sum times x.
        if ROW_SUM_SLOT >= 0:
            store_owner(partials, tl.sum(stored.to(tl.float32), 1), ROW_SUM_SLOT, 0)
        if COLUMN_SUM_SLOT >= 0:
            store_owner(partials, tl.sum(stored.to(tl.float32), 0), COLUMN_SUM_SLOT, 1)
