"""Pair weights of a panel, dL/d<x_i, y_j>, and the sums that parameters' gradients need; formulas in `reference.py`."""

import triton
import triton.language as tl

from .masks import SAME, keep_tile
from .program import (
    ABSENT,
    COLUMN_SUM_SLOT,
    COMBINE,
    COTANGENT,
    DETACH,
    EVERY,
    GUIDE,
    HEADER,
    LSE,
    MASK,
    MEAN,
    OFFSET,
    OFFSET_SLOT,
    OTHER,
    OTHER_SLOT,
    PARTNER,
    PLAIN,
    REDUCTION,
    ROW_SUM_SLOT,
    SAME_ONLY,
    SCALE,
    SCALE_SLOT,
    SCALED,
    SCORE,
    SIDE,
    STORE,
    TILES,
    TRIANGLE,
    VALUE_SLOT,
    WEIGHED,
    WEIGHT,
    WEIGHT_SLOT,
    WIDTH,
    WITH_PARTNER,
)
from .reductions import LOGADDEXP, SHARED_RANGE, SOFTMAX_MEAN, SUM, affine, constant_of, exponent
from .scores import IDENTITY, exp, score_slope, score_value, sigmoid
from .tiles import (
    dot_tile,
    guide_tile,
    halves,
    inside_tile,
    parameter,
    partials_of,
    similarity_tile,
    store_owner,
    tile_of,
    view_of,
    visited,
    with_guide,
)


@triton.jit
def owner(view, PROGRAM: tl.constexpr, AT: tl.constexpr, FIELD: tl.constexpr, absent):
    """A parameter of the owners, broadcastable to the tile."""
    return parameter(view, PROGRAM[AT + FIELD], PROGRAM[AT + FIELD + 1], PROGRAM[AT + SIDE], absent)


@triton.jit
def offset_share(view, PROGRAM: tl.constexpr, AT: tl.constexpr, FIELD: tl.constexpr, IS_OWNER: tl.constexpr):
    """d combine(p, q) / dp or dq."""
    side: tl.constexpr = PROGRAM[AT + SIDE]
    if (PROGRAM[AT + COMBINE] == LOGADDEXP) and (PROGRAM[AT + OTHER] != ABSENT):
        p = parameter(view, PROGRAM[AT + OFFSET], PROGRAM[AT + OFFSET + 1], side, 0.0)
        q = parameter(view, PROGRAM[AT + OTHER], PROGRAM[AT + OTHER + 1], 1 - side, 0.0)
        if IS_OWNER:
            difference = p - q
        else:
            difference = q - p
        share = tl.where(p == q, 0.5, sigmoid(difference))
    else:
        share = 1.0
    return share


@triton.jit
def own_probability(s, keep, view, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """(w exp(phi(z) - lse), keep) of one evaluation; for a plain sum the first is not used."""
    if PROGRAM[AT + REDUCTION] == SUM:
        p = s
    else:
        e, keep = exponent(s, keep, view, PROGRAM, AT)
        lse = owner(view, PROGRAM, AT, LSE, 0.0)
        p = exp(e - tl.where(lse == -float("inf"), 0.0, lse))
    return p, keep


@triton.jit
def term_weights(s, keep, probability, view, partials, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """dL/ds of one evaluation (0 outside its mask); stores its sums for parameters and value."""
    side: tl.constexpr = PROGRAM[AT + SIDE]
    reduction: tl.constexpr = PROGRAM[AT + REDUCTION]
    g = owner(view, PROGRAM, AT, COTANGENT, 1.0)
    w = parameter(view, PROGRAM[AT + WEIGHT], PROGRAM[AT + WEIGHT + 1], 1 - side, 1.0)
    constant = constant_of(view, PROGRAM, AT)
    z = affine(s, view, PROGRAM, AT)
    if reduction == SUM:
        per_weight = g * score_value(z, constant, PROGRAM[AT + SCORE])  # dL/dw
        if PROGRAM[AT + GUIDE] == WEIGHED:
            w = w * view[5]
        u = g * w * score_slope(z, constant, PROGRAM[AT + SCORE])  # dL/dz
        direct = 0.0
        lever = s  # dz / dscale
    else:
        p = g * probability
        u = p * score_slope(z, constant, PROGRAM[AT + SCORE])
        per_weight = p
        direct = 0.0
        lever = s
        if reduction == SOFTMAX_MEAN:
            centred = s - owner(view, PROGRAM, AT, MEAN, 0.0)
            direct = p
            if PROGRAM[AT + SCORE] == IDENTITY:
                lever = centred  # sum_j p_j (s_j - mean) is 0: leaving the mean out avoids its rounding
            if PROGRAM[AT + DETACH]:
                u = u * 0.0
                per_weight = u
            else:
                u = u * centred
                per_weight = p * centred
        if PROGRAM[AT + WEIGHT] != ABSENT:
            per_weight = per_weight / tl.where(w == 0.0, 1.0, w)
    u = tl.where(keep, u, 0.0)
    if PROGRAM[AT + SCALE_SLOT] >= 0:
        store_owner(partials, tl.sum(tl.where(keep, u * lever, 0.0), 1 - side), PROGRAM[AT + SCALE_SLOT], side)
    if PROGRAM[AT + OFFSET_SLOT] >= 0:
        share = offset_share(view, PROGRAM, AT, OFFSET, True)
        store_owner(partials, tl.sum(tl.where(keep, u * share, 0.0), 1 - side), PROGRAM[AT + OFFSET_SLOT], side)
    if PROGRAM[AT + OTHER_SLOT] >= 0:
        share = offset_share(view, PROGRAM, AT, OTHER, False)
        store_owner(partials, tl.sum(tl.where(keep, u * share, 0.0), side), PROGRAM[AT + OTHER_SLOT], 1 - side)
    if PROGRAM[AT + WEIGHT_SLOT] >= 0:
        store_owner(partials, tl.sum(tl.where(keep, per_weight, 0.0), side), PROGRAM[AT + WEIGHT_SLOT], 1 - side)
    if PROGRAM[AT + VALUE_SLOT] >= 0:
        value = w * score_value(z, constant, PROGRAM[AT + SCORE])
        store_owner(partials, tl.sum(tl.where(keep, value, 0.0), 1 - side), PROGRAM[AT + VALUE_SLOT], side)
    ds = u * owner(view, PROGRAM, AT, SCALE, 1.0)
    if reduction == SOFTMAX_MEAN:
        ds += tl.where(keep, direct, 0.0)
    return ds


@triton.jit
def store_partnered(
    u, v, both, keep, other_keep, lever, partials, PROGRAM: tl.constexpr, AT: tl.constexpr, FIELD: tl.constexpr
):
    """One parameter's sums over two evaluations: together along the rows where its gradient is one number for both."""
    other: tl.constexpr = HEADER + PROGRAM[AT + PARTNER] * WIDTH
    own_slot: tl.constexpr = PROGRAM[AT + FIELD]
    other_slot: tl.constexpr = PROGRAM[other + FIELD]
    side: tl.constexpr = PROGRAM[AT + SIDE]
    if own_slot == WITH_PARTNER:
        store_owner(partials, tl.sum(tl.where(keep | other_keep, both * lever, 0.0), 1), other_slot, 0)
    elif other_slot == WITH_PARTNER:
        store_owner(partials, tl.sum(tl.where(keep | other_keep, both * lever, 0.0), 1), own_slot, 0)
    else:
        if own_slot >= 0:
            store_owner(partials, tl.sum(tl.where(keep, u * lever, 0.0), 1 - side), own_slot, side)
        if other_slot >= 0:
            store_owner(partials, tl.sum(tl.where(other_keep, v * lever, 0.0), side), other_slot, 1 - side)


@triton.jit
def partnered_weights(s, view, partials, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """dL/ds of two logsumexps of one z, of rows and of columns, from one exponential where their owners' are close.

    With a, b the two and c below both, exp(e - b) = exp(e - a) exp(a - c) exp(c - b): the factors are of single owners.
    Where exp(e - a) is flushed, exp(e - b) is below exp(-43).
    """
    inf = float("inf")
    other: tl.constexpr = HEADER + PROGRAM[AT + PARTNER] * WIDTH
    keep = keep_tile(s, view, PROGRAM, AT)
    other_keep = keep_tile(s, view, PROGRAM, other)
    constant = constant_of(view, PROGRAM, AT)
    z = affine(s, view, PROGRAM, AT)
    e = score_value(z, constant, PROGRAM[AT + SCORE])
    lse = owner(view, PROGRAM, AT, LSE, 0.0)
    other_lse = owner(view, PROGRAM, other, LSE, 0.0)
    a = tl.where(lse == -inf, 0.0, lse)
    b = tl.where(other_lse == -inf, 0.0, other_lse)
    g = owner(view, PROGRAM, AT, COTANGENT, 1.0)
    other_g = owner(view, PROGRAM, other, COTANGENT, 1.0)
    top = tl.maximum(tl.max(a), tl.max(b))
    bottom = tl.minimum(tl.min(a), tl.min(b))
    slope = score_slope(z, constant, PROGRAM[AT + SCORE])
    # The sum is made on either way: held apart until they meet, the two would spill.
    if top - bottom <= SHARED_RANGE:
        p = exp(e - a)
        u = tl.where(keep, p * g, 0.0)
        v = tl.where(other_keep, p * (exp(a - bottom) * (exp(bottom - b) * other_g)), 0.0)
        both = u + v
    else:
        u = tl.where(keep, exp(e - a) * g, 0.0)
        v = tl.where(other_keep, exp(e - b) * other_g, 0.0)
        both = u + v
    u, v, both = u * slope, v * slope, both * slope
    store_partnered(u, v, both, keep, other_keep, s, partials, PROGRAM, AT, SCALE_SLOT)
    store_partnered(u, v, both, keep, other_keep, 1.0, partials, PROGRAM, AT, OFFSET_SLOT)
    return both * owner(view, PROGRAM, AT, SCALE, 1.0)


@triton.jit
def store_zeros(partials, SLOT: tl.constexpr, SIDE: tl.constexpr):
    """A vector of zeros in a slot, where there is one."""
    if SLOT >= 0:
        store_owner(partials, tl.zeros(partials[SIDE][3].shape, tl.float32), SLOT, SIDE)


@triton.jit
def store_no_sums(partials, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """The sums of an evaluation that keeps no pair."""
    side: tl.constexpr = PROGRAM[AT + SIDE]
    store_zeros(partials, PROGRAM[AT + SCALE_SLOT], side)
    store_zeros(partials, PROGRAM[AT + OFFSET_SLOT], side)
    store_zeros(partials, PROGRAM[AT + VALUE_SLOT], side)
    store_zeros(partials, PROGRAM[AT + OTHER_SLOT], 1 - side)
    store_zeros(partials, PROGRAM[AT + WEIGHT_SLOT], 1 - side)


@triton.jit
def evaluated_weights(s, view, partials, PROGRAM: tl.constexpr, INDEX: tl.constexpr):
    """dL/ds of an evaluation, together with its partner's from the same exponentials."""
    at: tl.constexpr = HEADER + INDEX * WIDTH
    if (PROGRAM[TILES] == PLAIN) and (PROGRAM[at + MASK] == SAME):
        store_no_sums(partials, PROGRAM, at)
        if PROGRAM[at + PARTNER] >= 0:
            store_no_sums(partials, PROGRAM, HEADER + PROGRAM[at + PARTNER] * WIDTH)
        ds = tl.zeros(s.shape, tl.float32)
    else:
        ds = kept_weights(s, view, partials, PROGRAM, at)
    return ds


@triton.jit
def kept_weights(s, view, partials, PROGRAM: tl.constexpr, at: tl.constexpr):
    """The same, where the mask keeps pairs."""
    if PROGRAM[at + PARTNER] >= 0:
        ds = partnered_weights(s, view, partials, PROGRAM, at)
    else:
        p, keep = own_probability(s, keep_tile(s, view, PROGRAM, at), view, PROGRAM, at)
        ds = term_weights(s, keep, p, view, partials, PROGRAM, at)
    return ds


@triton.jit
def weights_epilogue(
    dots,  # (BLOCK_B, BLOCK_N / PARTS)
    t,  # (BLOCK_B, BLOCK_N / PARTS)
    inputs,
    panel,
    outputs,
    tile_b,
    tile_n,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    PROGRAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pair weights and sums of one part of a tile."""
    view = with_guide(view_of(inputs, panel, tile_b, tile_n, PART, PARTS, BLOCK_B, BLOCK_N), t)
    partials = partials_of(outputs[0], outputs[1], panel, tile_b, tile_n, PART, PARTS, BLOCK_B, BLOCK_N)
    s, slope = similarity_tile(dots, view, PROGRAM)
    ds = tl.zeros(dots.shape, tl.float32)
    for n in tl.static_range((len(PROGRAM) - HEADER) // WIDTH):
        if (PROGRAM[HEADER + n * WIDTH + PARTNER] < 0) or (PROGRAM[HEADER + n * WIDTH + PARTNER] > n):
            ds += evaluated_weights(s, view, partials, PROGRAM, n)
    if PROGRAM[STORE]:
        weights_ptr = outputs[2]
        stride_w = outputs[4]
        weights = ds * slope
        if PROGRAM[TILES] != PLAIN:
            weights = tl.where(inside_tile(view), weights, 0.0)
        if PROGRAM[SCALED]:
            weights = weights * tl.load(outputs[3])
        stored = weights.to(weights_ptr.dtype.element_ty)
        at_b = partials[0][3]
        at_n = partials[1][3]
        weights_ptrs = weights_ptr + at_b.to(tl.int64)[:, None] * stride_w + at_n[None, :]
        tl.store(weights_ptrs, stored, mask=(at_b < partials[0][4])[:, None] & (at_n < stride_w)[None, :])
        # Sums of the rounded weights: rounding errors then cancel between W y and its row sum times x.
        if PROGRAM[ROW_SUM_SLOT] >= 0:
            store_owner(partials, tl.sum(stored.to(tl.float32), 1), PROGRAM[ROW_SUM_SLOT], 0)
        if PROGRAM[COLUMN_SUM_SLOT] >= 0:
            store_owner(partials, tl.sum(stored.to(tl.float32), 0), PROGRAM[COLUMN_SUM_SLOT], 1)


@triton.jit
def weights_tile(
    index,  # of the tile among those of the panel
    inputs,
    embeddings,  # (x_ptr, y_ptr, D, stride_xb, stride_yn)
    guide,  # (u_ptr, v_ptr, E, stride_ub, stride_vn)
    panel,
    outputs,
    PROGRAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile: its products, its epilogue part by part."""
    x_ptr, y_ptr, D, stride_xb, stride_yn = embeddings
    tile_b, tile_n = tile_of(index, panel, GROUP, BLOCK_B, BLOCK_N)
    start_b = panel[0] + tile_b * BLOCK_B
    start_n = panel[1] + tile_n * BLOCK_N
    dots = dot_tile(
        x_ptr, y_ptr, start_b, start_n, panel[2], panel[3], D, stride_xb, stride_yn,
        BLOCK_B, BLOCK_N, BLOCK_D, INPUT_PRECISION, UPCAST,
    )  # fmt: skip
    t = guide_tile(
        guide, dots, start_b, start_n, panel[2], panel[3], PROGRAM,
        BLOCK_B, BLOCK_N, BLOCK_D, GUIDE_PRECISION, UPCAST,
    )  # fmt: skip
    if PARTS == 1:
        weights_epilogue(dots, t, inputs, panel, outputs, tile_b, tile_n, 0, 1, PROGRAM, BLOCK_B, BLOCK_N)
    else:
        left, right = halves(dots, BLOCK_B, BLOCK_N)
        t_left, t_right = halves(t, BLOCK_B, BLOCK_N)
        if PARTS == 2:
            weights_epilogue(left, t_left, inputs, panel, outputs, tile_b, tile_n, 0, 2, PROGRAM, BLOCK_B, BLOCK_N)
            weights_epilogue(right, t_right, inputs, panel, outputs, tile_b, tile_n, 1, 2, PROGRAM, BLOCK_B, BLOCK_N)
        else:
            first, second = halves(left, BLOCK_B, BLOCK_N // 2)
            t_first, t_second = halves(t_left, BLOCK_B, BLOCK_N // 2)
            third, fourth = halves(right, BLOCK_B, BLOCK_N // 2)
            t_third, t_fourth = halves(t_right, BLOCK_B, BLOCK_N // 2)
            weights_epilogue(first, t_first, inputs, panel, outputs, tile_b, tile_n, 0, 4, PROGRAM, BLOCK_B, BLOCK_N)
            weights_epilogue(second, t_second, inputs, panel, outputs, tile_b, tile_n, 1, 4, PROGRAM, BLOCK_B, BLOCK_N)
            weights_epilogue(third, t_third, inputs, panel, outputs, tile_b, tile_n, 2, 4, PROGRAM, BLOCK_B, BLOCK_N)
            weights_epilogue(fourth, t_fourth, inputs, panel, outputs, tile_b, tile_n, 3, 4, PROGRAM, BLOCK_B, BLOCK_N)


@triton.jit(do_not_specialize=["N", "first_b", "first_n", "end_b", "end_n"])
def _weights_kernel(
    x_ptr,  # (B, D), D whole blocks
    y_ptr,  # (N, D)
    x_norms_ptr,  # (2, padded_b) float32
    y_norms_ptr,  # (2, padded_n) float32
    x_labels_ptr,  # (padded_b,) int64
    y_labels_ptr,  # (padded_n,) int64
    x_exclude_ptr,  # (padded_b,) int32: column that row i never meets
    y_exclude_ptr,  # (padded_n,) int32: the same for the mirror image
    pair_mask_ptr,  # (B, N) uint8
    numbers,  # floats
    scalars_ptr,  # (S,) float32
    row_vectors_ptr,  # (P, padded_b) float32
    column_vectors_ptr,  # (Q, padded_n) float32
    row_partials_ptr,  # (slots, tiles_n * PARTS, length_b) float32
    column_partials_ptr,  # (slots, tiles_b, length_n) float32
    weights_ptr,  # (length_b, stride_w) in the dtype of x; columns beyond length_n get zeros
    weight_scale_ptr,  # (1,) float32
    N,
    D,
    stride_xb,
    stride_yn,
    padded_b,  # length of vectors along the rows, a multiple of every tile
    padded_n,
    u_ptr,  # (B, E) of the second product, E whole blocks; not read without one
    v_ptr,  # (N, E)
    E,
    stride_ub,
    stride_vn,
    stride_w,  # length_n rounded up to a multiple of 16, so that stores are wide
    listed_ptr,  # (1 + tiles,) int32: how many tiles are to be served, and which; read if LISTED
    first_b,  # the panel's rows: first_b to end_b
    first_n,
    end_b,
    end_n,
    PROGRAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    GUIDE_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    LISTED: tl.constexpr,
):
    inputs = (
        (x_norms_ptr, y_norms_ptr, padded_b, padded_n),
        (numbers, scalars_ptr, row_vectors_ptr, column_vectors_ptr),
        (x_labels_ptr, y_labels_ptr, x_exclude_ptr, y_exclude_ptr, pair_mask_ptr, N),
    )
    embeddings = (x_ptr, y_ptr, D, stride_xb, stride_yn)
    guide = (u_ptr, v_ptr, E, stride_ub, stride_vn)
    panel = (first_b, first_n, end_b, end_n)
    outputs = (row_partials_ptr, column_partials_ptr, weights_ptr, weight_scale_ptr, stride_w)
    if LISTED:
        for n in range(tl.program_id(0), tl.load(listed_ptr), tl.num_programs(0)):
            weights_tile(
                tl.load(listed_ptr + 1 + n), inputs, embeddings, guide, panel, outputs, PROGRAM,
                BLOCK_B, BLOCK_N, BLOCK_D, GROUP, PARTS, INPUT_PRECISION, GUIDE_PRECISION, UPCAST,
            )  # fmt: skip
    else:
        if (PROGRAM[TRIANGLE] != 0) or (PROGRAM[SAME_ONLY] != 0) or (PROGRAM[TILES] != EVERY):  # noqa: SIM102
            if visited(tl.program_id(0), inputs, panel, PROGRAM, GROUP, BLOCK_B, BLOCK_N) == 0:
                return
        weights_tile(
            tl.program_id(0), inputs, embeddings, guide, panel, outputs, PROGRAM,
            BLOCK_B, BLOCK_N, BLOCK_D, GROUP, PARTS, INPUT_PRECISION, GUIDE_PRECISION, UPCAST,
        )  # fmt: skip
