"""Most extreme similarities of each row and where they are.

An entry is one int64: order-preserving bits of its value above, its column, counted downwards, below. So the largest
entry is the most extreme value at the lowest column, and entries never tie.
"""

import triton
import triton.language as tl

from .masks import keep_tile, labels_meet
from .program import REDUCTION, SIDE, SLOT, WIDTH
from .stats import store_owner
from .tiles import dot_tile, similarity_tile, tile_of

MISSING = tl.constexpr(-(2**63))
_BEYOND = tl.constexpr(2**63 - 1)
_LAST_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def entries(s, keep, columns, LARGEST: tl.constexpr):
    """(BLOCK_B, BLOCK_N) int64 entries; NaN above infinity, MISSING where not kept."""
    value = s if LARGEST else -s
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0 and 0 are equal
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(value != value, 0x7FFFFFFF, ordered)
    entry = (ordered.to(tl.int64) << 32) | (_LAST_COLUMN - columns)
    return tl.where(keep, entry, MISSING)


@triton.jit(do_not_specialize=["B", "N", "first_b", "first_n", "end_b", "end_n"])
def _extremes_kernel(
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
    row_partials_ptr,  # (slots, tiles_n, length_b) int64
    column_partials_ptr,  # (slots, tiles_b, length_n) int64
    B,
    N,
    D,
    stride_xb,
    stride_yn,
    first_b,
    first_n,
    end_b,
    end_n,
    PROGRAM: tl.constexpr,
    SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    TRIANGLE: tl.constexpr,
    SAME_ONLY: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The most extreme entry (k = 1) of every evaluation of one tile; all extremes share the tile."""
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
        keep = keep_tile(
            inside, s, vectors, x_labels_ptr, y_labels_ptr, exclude_ptr, pair_mask_ptr,
            PROGRAM, at, TRIANGLE, EXCLUDE_SELF, HAS_EXCLUDE,
        )  # fmt: skip
        side: tl.constexpr = PROGRAM[at + SIDE]
        if side == 0:
            entry = entries(s, keep, j[None, :], PROGRAM[at + REDUCTION])
        else:
            entry = entries(s, keep, i[:, None], PROGRAM[at + REDUCTION])
        store_owner(partials, tl.max(entry, 1 - side), PROGRAM[at + SLOT], side)


@triton.jit(do_not_specialize=["B", "N", "first_b", "end_b", "stripes"])
def _top_k_kernel(
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
    top_ptr,  # (length_b, stripes, WIDTH_K) int64
    B,
    N,
    D,
    stride_xb,
    stride_yn,
    first_b,
    end_b,
    stripes,
    PROGRAM: tl.constexpr,
    SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    SAME_ONLY: tl.constexpr,
    K: tl.constexpr,
    WIDTH_K: tl.constexpr,  # power of two, at least K
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The K most extreme entries of a row tile within one stripe of columns, sorted, kept in registers."""
    length_b = end_b - first_b
    tile_b, stripe = tile_of(tl.program_id(0), tl.cdiv(length_b, BLOCK_B), stripes, GROUP)
    at_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    i = tl.minimum(first_b + at_b, end_b - 1).to(tl.int64)
    place = tl.arange(0, WIDTH_K)[None, :]
    best = tl.full([BLOCK_B, WIDTH_K], MISSING, tl.int64)
    for tile_n in range(stripe, tl.cdiv(N, BLOCK_N), stripes):
        at_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        j = tl.minimum(at_n, N - 1).to(tl.int64)
        wanted = True
        if SAME_ONLY:
            wanted = labels_meet(x_labels_ptr, y_labels_ptr, i, j)
        if wanted:
            dots = dot_tile(
                x_ptr, y_ptr, i, j, D, stride_xb, stride_yn, BLOCK_B, BLOCK_N, BLOCK_D, EVEN_D, INPUT_PRECISION
            )
            s, _ = similarity_tile(dots, x_norms_ptr, y_norms_ptr, i, j, B, N, SIMILARITY, NORMALIZE)
            inside = (at_b < length_b)[:, None] & (at_n < N)[None, :]
            vectors = (numbers, scalars_ptr, row_vectors_ptr, column_vectors_ptr, i, j, B, N)
            keep = keep_tile(
                inside, s, vectors, x_labels_ptr, y_labels_ptr, exclude_ptr, pair_mask_ptr,
                PROGRAM, 0, False, EXCLUDE_SELF, HAS_EXCLUDE,
            )  # fmt: skip
            entry = entries(s, keep, j[None, :], PROGRAM[REDUCTION])
            last = tl.min(tl.where(place < K, best, _BEYOND), 1)
            if tl.max((tl.max(entry, 1) > last).to(tl.int32)) > 0:
                merged = tl.full([BLOCK_B, WIDTH_K], MISSING, tl.int64)
                previous = tl.full([BLOCK_B], _BEYOND, tl.int64)
                for n in range(K):
                    of_tile = tl.max(tl.where(entry < previous[:, None], entry, MISSING), 1)
                    of_best = tl.max(tl.where(best < previous[:, None], best, MISSING), 1)
                    previous = tl.maximum(of_tile, of_best)
                    merged = tl.where(place == n, previous[:, None], merged)
                best = merged
    at = (at_b.to(tl.int64)[:, None] * stripes + stripe) * WIDTH_K + place
    tl.store(top_ptr + at, best, mask=(at_b < length_b)[:, None] & (place < WIDTH_K))
