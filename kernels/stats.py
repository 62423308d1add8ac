"""Row and column statistics of a panel: GEMM tile, reduction of the float32 accumulator, partials; S is not written."""

import triton
import triton.language as tl

from .masks import keep_tile, labels_meet
from .program import PARTNER, REDUCTION, SCORE, SIDE, SLOT, WEIGHT, WIDTH
from .program import ABSENT
from .reductions import (
    COUNT,
    LOGSUMEXP,
    MOMENTS,
    SOFTMAX_MEAN,
    affine,
    constant_of,
    exponent,
    owner_logsumexp,
    owner_moments,
    shared_logsumexp,
)
from .scores import score_value
from .tiles import dot_tile, parameter, similarity_tile, store_partial, tile_of


@triton.jit
def store_owner(partials, value, slot, SIDE: tl.constexpr):
    """A partial vector of the owners on SIDE."""
    rows_ptr, columns_ptr, tile_b, tile_n, tiles_b, tiles_n, at_b, at_n, length_b, length_n = partials
    if SIDE == 0:
        store_partial(rows_ptr, value, slot, tile_n, tiles_n, at_b, length_b)
    else:
        store_partial(columns_ptr, value, slot, tile_b, tiles_b, at_n, length_n)


@triton.jit
def store_statistic(s, keep, vectors, partials, CODE: tl.constexpr, AT: tl.constexpr):
    """Reduce one tile for one evaluation."""
    side: tl.constexpr = CODE[AT + SIDE]
    slot: tl.constexpr = CODE[AT + SLOT]
    reduction: tl.constexpr = CODE[AT + REDUCTION]
    if reduction == MOMENTS:
        count, mean, spread, low, high = owner_moments(s, keep, side)
        store_owner(partials, count, slot, side)
        store_owner(partials, mean, slot + 1, side)
        store_owner(partials, spread, slot + 2, side)
        store_owner(partials, low, slot + 3, side)
        store_owner(partials, high, slot + 4, side)
    elif (reduction == LOGSUMEXP) or (reduction == SOFTMAX_MEAN):
        e, keep = exponent(s, keep, vectors, CODE, AT)
        m, l, p = owner_logsumexp(e, keep, side)
        store_owner(partials, m, slot, side)
        store_owner(partials, l, slot + 1, side)
        if reduction == SOFTMAX_MEAN:
            store_owner(partials, tl.sum(tl.where(keep, p * s, 0.0), 1 - side), slot + 2, side)
    else:
        z = affine(s, vectors, CODE, AT, 1.0)
        value = score_value(z, constant_of(vectors, CODE, AT), CODE[AT + SCORE])
        if reduction == COUNT:
            value = tl.where(value <= 0.0, 0.0, 1.0)
        elif CODE[AT + WEIGHT] != ABSENT:
            value = value * parameter(vectors, CODE[AT + WEIGHT], CODE[AT + WEIGHT + 1], 1 - side, 1.0)
        store_owner(partials, tl.sum(tl.where(keep, value, 0.0), 1 - side), slot, side)


@triton.jit(do_not_specialize=["B", "N", "first_b", "first_n", "end_b", "end_n"])
def _stats_kernel(
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
    B,
    N,
    D,
    stride_xb,
    stride_yn,
    first_b,  # the panel's rows: first_b to end_b
    first_n,
    end_b,
    end_n,
    PROGRAM: tl.constexpr,
    SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    TRIANGLE: tl.constexpr,  # self-similarity: only pairs i <= j, which also stand for (j, i)
    SAME_ONLY: tl.constexpr,
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
    if TRIANGLE:
        if first_b + tile_b * BLOCK_B > tl.minimum(first_n + (tile_n + 1) * BLOCK_N, end_n) - 1:
            return
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
    s, _ = similarity_tile(dots, x_norms_ptr, y_norms_ptr, i, j, B, N, SIMILARITY, NORMALIZE)
    inside = (at_b < length_b)[:, None] & (at_n < length_n)[None, :]
    vectors = (numbers, scalars_ptr, row_vectors_ptr, column_vectors_ptr, i, j, B, N)
    partials = (
        row_partials_ptr, column_partials_ptr, tile_b, tile_n, tiles_b, tiles_n, at_b, at_n, length_b, length_n
    )  # fmt: skip
    for n in tl.static_range(len(PROGRAM) // WIDTH):
        at: tl.constexpr = n * WIDTH
        partner: tl.constexpr = PROGRAM[at + PARTNER]
        if (partner < 0) or (partner > n):
            keep = keep_tile(
                inside, s, vectors, x_labels_ptr, y_labels_ptr, exclude_ptr, pair_mask_ptr,
                PROGRAM, at, TRIANGLE, EXCLUDE_SELF, HAS_EXCLUDE,
            )  # fmt: skip
            if partner > n:
                other: tl.constexpr = partner * WIDTH
                other_keep = keep_tile(
                    inside, s, vectors, x_labels_ptr, y_labels_ptr, exclude_ptr, pair_mask_ptr,
                    PROGRAM, other, TRIANGLE, EXCLUDE_SELF, HAS_EXCLUDE,
                )  # fmt: skip
                side: tl.constexpr = PROGRAM[at + SIDE]
                e, _ = exponent(s, keep, vectors, PROGRAM, at)
                m, l, other_m, other_l = shared_logsumexp(e, keep, other_keep, side)
                store_owner(partials, m, PROGRAM[at + SLOT], side)
                store_owner(partials, l, PROGRAM[at + SLOT] + 1, side)
                store_owner(partials, other_m, PROGRAM[other + SLOT], 1 - side)
                store_owner(partials, other_l, PROGRAM[other + SLOT] + 1, 1 - side)
            else:
                store_statistic(s, keep, vectors, partials, PROGRAM, at)
