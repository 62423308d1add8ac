"""Most extreme similarities of each row and where they are, as the int64 entries of `flashpair.extremes`."""

import triton
import triton.language as tl

from .. import extremes
from .masks import keep_tile
from .program import EVERY, HEADER, REDUCTION, SAME_ONLY, SIDE, SLOT, TILES, TRIANGLE, WIDTH
from .reductions import was_visited
from .tiles import (
    along_columns,
    along_rows,
    dot_tile,
    grouped,
    halves,
    labels_meet,
    partials_of,
    similarity_tile,
    store_owner,
    tile_of,
    view_of,
    visited,
)

MISSING = tl.constexpr(extremes.MISSING)
_BEYOND = tl.constexpr(2**63 - 1)
_LAST_COLUMN = tl.constexpr(extremes.LAST_COLUMN)
_NOT_KEPT = tl.constexpr(-(2**31))
_INFINITY = tl.constexpr(0x7F800000)  # its rank


@triton.jit
def ranks(s, keep, LARGEST: tl.constexpr):
    """(BLOCK_B, span) int32 in the order of the values, most extreme last; NaN is infinity, _NOT_KEPT below all."""
    value = s + 0.0 if LARGEST else 0.0 - s  # with the zero, -0 and 0 are equal
    value = tl.where(value != value, float("inf"), value)
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(keep, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NOT_KEPT)


@triton.jit
def entries(rank, place, nan):
    """int64 entries of ranks (int32) at places, MISSING where not kept."""
    entry = (rank.to(tl.int64) << 32) | ((-(place - _LAST_COLUMN)).to(tl.int64) << 1) | nan.to(tl.int64)
    return tl.where(rank == _NOT_KEPT, MISSING, entry)


@triton.jit
def best_entry(s, keep, places, LARGEST: tl.constexpr, AXIS: tl.constexpr):
    """(owners,) int64: the largest entry along an axis: its rank first and then the place, in 32 bits each."""
    rank = ranks(s, keep, LARGEST)
    best = tl.max(rank, AXIS)
    place = tl.min(tl.where(rank == tl.expand_dims(best, AXIS), places, _LAST_COLUMN), AXIS)
    nan = best != best
    if tl.max(best) == _INFINITY:
        at_best = places == tl.expand_dims(place, AXIS)
        nan = tl.max((at_best & (s != s)).to(tl.int32), AXIS) != 0
    return entries(best, place, nan)


@triton.jit
def store_extreme(s, view, places, partials, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """The most extreme entry of every owner of one evaluation."""
    side: tl.constexpr = PROGRAM[AT + SIDE]
    keep = keep_tile(s, view, PROGRAM, AT)
    if side == 0:
        entry = best_entry(s, keep, along_columns(places[1], view[2]), PROGRAM[AT + REDUCTION], 1)
    else:
        entry = best_entry(s, keep, along_rows(places[0], view[2]), PROGRAM[AT + REDUCTION], 0)
    store_owner(partials, entry, PROGRAM[AT + SLOT], side)


@triton.jit
def extremes_epilogue(
    dots,  # (BLOCK_B, BLOCK_N / PARTS)
    inputs,
    places,
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
    """The most extreme entry of every evaluation of one part of a tile."""
    view = view_of(inputs, panel, tile_b, tile_n, PART, PARTS, BLOCK_B, BLOCK_N)
    partials = partials_of(outputs[0], outputs[1], panel, tile_b, tile_n, PART, PARTS, BLOCK_B, BLOCK_N)
    s, _ = similarity_tile(dots, view, PROGRAM)
    for n in tl.static_range((len(PROGRAM) - HEADER) // WIDTH):
        store_extreme(s, view, places, partials, PROGRAM, HEADER + n * WIDTH)


@triton.jit
def extremes_tile(
    index,  # of the tile among those of the panel
    inputs,
    embeddings,  # (x_ptr, y_ptr, D, stride_xb, stride_yn)
    places,
    panel,
    outputs,
    PROGRAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
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
    if PARTS == 1:
        extremes_epilogue(dots, inputs, places, panel, outputs, tile_b, tile_n, 0, 1, PROGRAM, BLOCK_B, BLOCK_N)
    else:
        left, right = halves(dots, BLOCK_B, BLOCK_N)
        if PARTS == 2:
            extremes_epilogue(left, inputs, places, panel, outputs, tile_b, tile_n, 0, 2, PROGRAM, BLOCK_B, BLOCK_N)
            extremes_epilogue(right, inputs, places, panel, outputs, tile_b, tile_n, 1, 2, PROGRAM, BLOCK_B, BLOCK_N)
        else:
            first, second = halves(left, BLOCK_B, BLOCK_N // 2)
            third, fourth = halves(right, BLOCK_B, BLOCK_N // 2)
            extremes_epilogue(first, inputs, places, panel, outputs, tile_b, tile_n, 0, 4, PROGRAM, BLOCK_B, BLOCK_N)
            extremes_epilogue(second, inputs, places, panel, outputs, tile_b, tile_n, 1, 4, PROGRAM, BLOCK_B, BLOCK_N)
            extremes_epilogue(third, inputs, places, panel, outputs, tile_b, tile_n, 2, 4, PROGRAM, BLOCK_B, BLOCK_N)
            extremes_epilogue(fourth, inputs, places, panel, outputs, tile_b, tile_n, 3, 4, PROGRAM, BLOCK_B, BLOCK_N)


@triton.jit(do_not_specialize=["N", "first_b", "first_n", "end_b", "end_n"])
def _extremes_kernel(
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
    x_places_ptr,  # (padded_b,) int32: the caller's rows
    y_places_ptr,  # (padded_n,) int32: the caller's columns
    row_partials_ptr,  # (slots, tiles_n * PARTS, length_b) int64
    column_partials_ptr,  # (slots, tiles_b, length_n) int64
    N,
    D,
    stride_xb,
    stride_yn,
    padded_b,  # length of vectors along the rows, a multiple of every tile
    padded_n,
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
    UPCAST: tl.constexpr,
    LISTED: tl.constexpr,
):
    """k = 1: all extremes of a pass share each tile of S."""
    inputs = (
        (x_norms_ptr, y_norms_ptr, padded_b, padded_n),
        (numbers, scalars_ptr, row_vectors_ptr, column_vectors_ptr),
        (x_labels_ptr, y_labels_ptr, x_exclude_ptr, y_exclude_ptr, pair_mask_ptr, N),
    )
    embeddings = (x_ptr, y_ptr, D, stride_xb, stride_yn)
    places = (x_places_ptr, y_places_ptr)
    panel = (first_b, first_n, end_b, end_n)
    outputs = (row_partials_ptr, column_partials_ptr)
    if LISTED:
        for n in range(tl.program_id(0), tl.load(listed_ptr), tl.num_programs(0)):
            extremes_tile(
                tl.load(listed_ptr + 1 + n), inputs, embeddings, places, panel, outputs, PROGRAM,
                BLOCK_B, BLOCK_N, BLOCK_D, GROUP, PARTS, INPUT_PRECISION, UPCAST,
            )  # fmt: skip
    else:
        if (PROGRAM[TRIANGLE] != 0) or (PROGRAM[SAME_ONLY] != 0) or (PROGRAM[TILES] != EVERY):  # noqa: SIM102
            if visited(tl.program_id(0), inputs, panel, PROGRAM, GROUP, BLOCK_B, BLOCK_N) == 0:
                return
        extremes_tile(
            tl.program_id(0), inputs, embeddings, places, panel, outputs, PROGRAM,
            BLOCK_B, BLOCK_N, BLOCK_D, GROUP, PARTS, INPUT_PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "length", "first", "rows", "first_b", "first_n", "end_n"])
def _best_kernel(
    partial_ptr,  # (COUNT, tiles, length) int64
    best_ptr,  # (COUNT, rows) int64
    tiles,
    length,
    first,  # position of the panel among the rows
    rows,
    first_b,  # the panel; read if TRIANGLE
    first_n,
    end_n,
    COUNT: tl.constexpr,
    FRESH: tl.constexpr,  # nothing was found yet: the best are not read
    SIDE: tl.constexpr,  # as in `reductions._fold_kernel`
    TRIANGLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the entries of one panel's tiles into the best so far."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, BLOCK_T)
    for e in tl.static_range(COUNT):
        place = best_ptr + tl.cast(rows, tl.int64) * e + first + at
        if FRESH:
            best = tl.full([BLOCK], MISSING, tl.int64)
        else:
            best = tl.load(place, mask=at < length, other=0)
        for start in range(0, tiles, BLOCK_T):
            tile = tl.cast(tiles, tl.int64) * e + start + t
            mask = (start + t < tiles)[:, None] & (at < length)[None, :]
            mask = mask & was_visited((start + t)[:, None], at[None, :], (first_b, first_n, end_n), SIDE, TRIANGLE)
            found = tl.load(partial_ptr + tile[:, None] * length + at[None, :], mask=mask, other=MISSING)
            best = tl.maximum(best, tl.max(found, 0))
        tl.store(place, best, mask=at < length)


@triton.jit(do_not_specialize=["length"])
def _decode_kernel(
    entries_ptr,  # (rows, K) int64
    order_ptr,  # (rows,) int64: the caller's rows; read if ORDERED
    values_ptr,  # (rows, K) float32, in the caller's order
    indices_ptr,  # (rows, K) int64
    length,  # rows K
    K: tl.constexpr,
    LARGEST: tl.constexpr,
    SQUARES: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What entries say: see `flashpair.extremes`. SQUARES: they are of the squares of what is asked for."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    entry = tl.load(entries_ptr + at, mask=inside, other=MISSING)
    rank = (entry >> 32).to(tl.int32)
    value = (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    value = value if LARGEST else -value
    if SQUARES:
        value = tl.sqrt_rn(value)
    value = tl.where((entry & 1) == 1, float("nan"), value)
    value = tl.where(entry == MISSING, -float("inf") if LARGEST else float("inf"), value)
    index = tl.where(entry == MISSING, -1, _LAST_COLUMN - ((entry >> 1) & _LAST_COLUMN))
    out = at
    if ORDERED:
        out = tl.load(order_ptr + at // K, mask=inside, other=0) * K + at % K
    tl.store(values_ptr + out, value, mask=inside)
    tl.store(indices_ptr + out, index, mask=inside)


@triton.jit(do_not_specialize=["N", "first_b", "end_b", "stripes"])
def _top_k_kernel(
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
    x_places_ptr,  # (padded_b,) int32; not read
    y_places_ptr,  # (padded_n,) int32: the caller's columns
    top_ptr,  # (length_b, stripes, WIDTH_K) int64
    N,
    D,
    stride_xb,
    stride_yn,
    padded_b,  # length of vectors along the rows, a multiple of every tile
    padded_n,
    first_b,
    end_b,
    stripes,
    PROGRAM: tl.constexpr,
    K: tl.constexpr,
    WIDTH_K: tl.constexpr,  # power of two, at least K
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The K most extreme entries of a row tile within one stripe of columns, sorted, kept in registers."""
    length_b = end_b - first_b
    tile_b, stripe = grouped(tl.program_id(0), tl.cdiv(length_b, BLOCK_B), stripes, GROUP)
    at_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    inputs = (
        (x_norms_ptr, y_norms_ptr, padded_b, padded_n),
        (numbers, scalars_ptr, row_vectors_ptr, column_vectors_ptr),
        (x_labels_ptr, y_labels_ptr, x_exclude_ptr, y_exclude_ptr, pair_mask_ptr, N),
    )
    order = tl.arange(0, WIDTH_K)[None, :]
    best = tl.full([BLOCK_B, WIDTH_K], MISSING, tl.int64)
    for tile_n in range(stripe, tl.cdiv(N, BLOCK_N), stripes):
        view = view_of(inputs, (first_b, 0, end_b, N), tile_b, tile_n, 0, 1, BLOCK_B, BLOCK_N)
        wanted = True
        if PROGRAM[SAME_ONLY]:
            wanted = labels_meet(view)
        if wanted:
            dots = dot_tile(
                x_ptr, y_ptr, first_b + tile_b * BLOCK_B, tile_n * BLOCK_N, end_b, N, D, stride_xb, stride_yn,
                BLOCK_B, BLOCK_N, BLOCK_D, INPUT_PRECISION, UPCAST,
            )  # fmt: skip
            s, _ = similarity_tile(dots, view, PROGRAM)
            rank = ranks(s, keep_tile(s, view, PROGRAM, HEADER), PROGRAM[HEADER + REDUCTION])
            entry = entries(rank, along_columns(y_places_ptr, view[2]), s != s)
            last = tl.min(tl.where(order < K, best, _BEYOND), 1)
            if tl.max((tl.max(entry, 1) > last).to(tl.int32)) > 0:
                merged = tl.full([BLOCK_B, WIDTH_K], MISSING, tl.int64)
                previous = tl.full([BLOCK_B], _BEYOND, tl.int64)
                for n in range(K):
                    of_tile = tl.max(tl.where(entry < previous[:, None], entry, MISSING), 1)
                    of_best = tl.max(tl.where(best < previous[:, None], best, MISSING), 1)
                    previous = tl.maximum(of_tile, of_best)
                    merged = tl.where(order == n, previous[:, None], merged)
                best = merged
    at = (at_b.to(tl.int64)[:, None] * stripes + stripe) * WIDTH_K + order
    tl.store(top_ptr + at, best, mask=(at_b < length_b)[:, None] & (order < WIDTH_K))
