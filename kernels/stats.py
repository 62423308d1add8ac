"""Row and column statistics of a panel: GEMM tile, reduction of the float32 accumulator, partials; S is not written."""

import triton
import triton.language as tl

from .masks import SAME, keep_tile
from .program import (
    ABSENT,
    EVERY,
    GUIDE,
    HEADER,
    MASK,
    PARTNER,
    PLAIN,
    REDUCTION,
    SAME_ONLY,
    SCORE,
    SIDE,
    SLOT,
    TILES,
    TRIANGLE,
    WEIGHED,
    WEIGHT,
    WIDTH,
)
from .reductions import (
    COUNT,
    MAX,
    MOMENTS,
    SOFTMAX_MEAN,
    SUM,
    affine,
    constant_of,
    exponent,
    owner_logsumexp,
    owner_max,
    owner_moments,
    shared_logsumexp,
)
from .scores import score_value
from .tiles import (
    dot_tile,
    guide_tile,
    halves,
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
def store_statistic(s, keep, view, partials, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """Reduce one tile for one evaluation."""
    side: tl.constexpr = PROGRAM[AT + SIDE]
    slot: tl.constexpr = PROGRAM[AT + SLOT]
    reduction: tl.constexpr = PROGRAM[AT + REDUCTION]
    if reduction == MOMENTS:
        count, mean, spread, low, high = owner_moments(s, keep, side)
        store_owner(partials, count, slot, side)
        store_owner(partials, mean, slot + 1, side)
        store_owner(partials, spread, slot + 2, side)
        store_owner(partials, low, slot + 3, side)
        store_owner(partials, high, slot + 4, side)
    elif reduction == MAX:
        value = score_value(affine(s, view, PROGRAM, AT), constant_of(view, PROGRAM, AT), PROGRAM[AT + SCORE])
        store_owner(partials, owner_max(value, keep, side), slot, side)
    elif (reduction != SUM) and (reduction != COUNT):
        e, keep = exponent(s, keep, view, PROGRAM, AT)
        m, mass, p = owner_logsumexp(e, keep, side)
        store_owner(partials, m, slot, side)
        store_owner(partials, mass, slot + 1, side)
        if reduction == SOFTMAX_MEAN:
            store_owner(partials, tl.sum(tl.where(keep, p * s, 0.0), 1 - side), slot + 2, side)
    else:
        z = affine(s, view, PROGRAM, AT)
        value = score_value(z, constant_of(view, PROGRAM, AT), PROGRAM[AT + SCORE])
        if reduction == COUNT:
            value = tl.where(value <= 0.0, 0.0, 1.0)
        elif PROGRAM[AT + WEIGHT] != ABSENT:
            value = value * parameter(view, PROGRAM[AT + WEIGHT], PROGRAM[AT + WEIGHT + 1], 1 - side, 1.0)
        if PROGRAM[AT + GUIDE] == WEIGHED:
            value = value * view[5]
        store_owner(partials, tl.sum(tl.where(keep, value, 0.0), 1 - side), slot, side)


@triton.jit
def store_neutral(partials, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """The statistics of no pair."""
    side: tl.constexpr = PROGRAM[AT + SIDE]
    slot: tl.constexpr = PROGRAM[AT + SLOT]
    reduction: tl.constexpr = PROGRAM[AT + REDUCTION]
    nothing = tl.zeros(partials[side][3].shape, tl.float32)
    inf = float("inf")
    if reduction == MOMENTS:
        for k in tl.static_range(3):
            store_owner(partials, nothing, slot + k, side)
        store_owner(partials, nothing + inf, slot + 3, side)
        store_owner(partials, nothing - inf, slot + 4, side)
    elif reduction == MAX:
        store_owner(partials, nothing - inf, slot, side)
    elif (reduction != SUM) and (reduction != COUNT):
        store_owner(partials, nothing - inf, slot, side)
        store_owner(partials, nothing, slot + 1, side)
        if reduction == SOFTMAX_MEAN:
            store_owner(partials, nothing, slot + 2, side)
    else:
        store_owner(partials, nothing, slot, side)


@triton.jit
def store_statistics(s, view, partials, PROGRAM: tl.constexpr, INDEX: tl.constexpr):
    """Reduce one tile for an evaluation, and for its partner with the same exponentials."""
    at: tl.constexpr = HEADER + INDEX * WIDTH
    if (PROGRAM[TILES] == PLAIN) and (PROGRAM[at + MASK] == SAME):
        store_neutral(partials, PROGRAM, at)
        if PROGRAM[at + PARTNER] >= 0:
            store_neutral(partials, PROGRAM, HEADER + PROGRAM[at + PARTNER] * WIDTH)
    else:
        store_kept_statistics(s, view, partials, PROGRAM, at)


@triton.jit
def store_kept_statistics(s, view, partials, PROGRAM: tl.constexpr, at: tl.constexpr):
    """The same, where the mask keeps pairs."""
    keep = keep_tile(s, view, PROGRAM, at)
    if PROGRAM[at + PARTNER] >= 0:
        other: tl.constexpr = HEADER + PROGRAM[at + PARTNER] * WIDTH
        other_keep = keep_tile(s, view, PROGRAM, other)
        e, _ = exponent(s, keep, view, PROGRAM, at)
        m, mass, other_m, other_mass = shared_logsumexp(e, keep, other_keep, PROGRAM[at + SIDE])
        store_owner(partials, m, PROGRAM[at + SLOT], PROGRAM[at + SIDE])
        store_owner(partials, mass, PROGRAM[at + SLOT] + 1, PROGRAM[at + SIDE])
        store_owner(partials, other_m, PROGRAM[other + SLOT], PROGRAM[other + SIDE])
        store_owner(partials, other_mass, PROGRAM[other + SLOT] + 1, PROGRAM[other + SIDE])
    else:
        store_statistic(s, keep, view, partials, PROGRAM, at)


@triton.jit
def stats_epilogue(
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
    """Statistics of one part of a tile."""
    view = with_guide(view_of(inputs, panel, tile_b, tile_n, PART, PARTS, BLOCK_B, BLOCK_N), t)
    partials = partials_of(outputs[0], outputs[1], panel, tile_b, tile_n, PART, PARTS, BLOCK_B, BLOCK_N)
    s, _ = similarity_tile(dots, view, PROGRAM)
    for n in tl.static_range((len(PROGRAM) - HEADER) // WIDTH):
        if (PROGRAM[HEADER + n * WIDTH + PARTNER] < 0) or (PROGRAM[HEADER + n * WIDTH + PARTNER] > n):
            store_statistics(s, view, partials, PROGRAM, n)


@triton.jit
def stats_tile(
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
        stats_epilogue(dots, t, inputs, panel, outputs, tile_b, tile_n, 0, 1, PROGRAM, BLOCK_B, BLOCK_N)
    else:
        left, right = halves(dots, BLOCK_B, BLOCK_N)
        t_left, t_right = halves(t, BLOCK_B, BLOCK_N)
        if PARTS == 2:
            stats_epilogue(left, t_left, inputs, panel, outputs, tile_b, tile_n, 0, 2, PROGRAM, BLOCK_B, BLOCK_N)
            stats_epilogue(right, t_right, inputs, panel, outputs, tile_b, tile_n, 1, 2, PROGRAM, BLOCK_B, BLOCK_N)
        else:
            first, second = halves(left, BLOCK_B, BLOCK_N // 2)
            t_first, t_second = halves(t_left, BLOCK_B, BLOCK_N // 2)
            third, fourth = halves(right, BLOCK_B, BLOCK_N // 2)
            t_third, t_fourth = halves(t_right, BLOCK_B, BLOCK_N // 2)
            stats_epilogue(first, t_first, inputs, panel, outputs, tile_b, tile_n, 0, 4, PROGRAM, BLOCK_B, BLOCK_N)
            stats_epilogue(second, t_second, inputs, panel, outputs, tile_b, tile_n, 1, 4, PROGRAM, BLOCK_B, BLOCK_N)
            stats_epilogue(third, t_third, inputs, panel, outputs, tile_b, tile_n, 2, 4, PROGRAM, BLOCK_B, BLOCK_N)
            stats_epilogue(fourth, t_fourth, inputs, panel, outputs, tile_b, tile_n, 3, 4, PROGRAM, BLOCK_B, BLOCK_N)


@triton.jit(do_not_specialize=["N", "first_b", "first_n", "end_b", "end_n"])
def _stats_kernel(
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
    outputs = (row_partials_ptr, column_partials_ptr)
    if LISTED:
        for n in range(tl.program_id(0), tl.load(listed_ptr), tl.num_programs(0)):
            stats_tile(
                tl.load(listed_ptr + 1 + n), inputs, embeddings, guide, panel, outputs, PROGRAM,
                BLOCK_B, BLOCK_N, BLOCK_D, GROUP, PARTS, INPUT_PRECISION, GUIDE_PRECISION, UPCAST,
            )  # fmt: skip
    else:
        if (PROGRAM[TRIANGLE] != 0) or (PROGRAM[SAME_ONLY] != 0) or (PROGRAM[TILES] != EVERY):  # noqa: SIM102
            if visited(tl.program_id(0), inputs, panel, PROGRAM, GROUP, BLOCK_B, BLOCK_N) == 0:
                return
        stats_tile(
            tl.program_id(0), inputs, embeddings, guide, panel, outputs, PROGRAM,
            BLOCK_B, BLOCK_N, BLOCK_D, GROUP, PARTS, INPUT_PRECISION, GUIDE_PRECISION, UPCAST,
        )  # fmt: skip
