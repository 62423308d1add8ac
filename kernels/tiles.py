"""What every kernel does with a tile: find it, compute its similarities, read parameters along its sides."""

import triton
import triton.language as tl

from .program import (
    EVERY,
    GUIDED,
    LABELLED,
    NORMALIZE,
    NUMBER,
    PLAIN,
    SAME_ONLY,
    SCALAR,
    SIMILARITY,
    SYMMETRIC,
    TILES,
    TRIANGLE,
    VECTOR,
)

DOT = tl.constexpr(0)  # numbered as in `flashpair.Similarity`
SQUARED_EUCLIDEAN = tl.constexpr(1)
EUCLIDEAN = tl.constexpr(2)


@triton.jit
def grouped(index, tiles_b, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles walk the columns together, so that both stay in L2."""
    width = GROUP * tiles_n
    first = (index // width) * GROUP
    size = tl.minimum(tiles_b - first, GROUP)
    return first + (index % width) % size, (index % width) // size


@triton.jit
def tile_of(index, panel, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row tile, column tile) of a tile of the panel."""
    first_b, first_n, end_b, end_n = panel
    return grouped(index, tl.cdiv(end_b - first_b, BLOCK_B), tl.cdiv(end_n - first_n, BLOCK_N), GROUP)


@triton.jit
def dot_tile(
    x_ptr,  # (B, D), D whole blocks
    y_ptr,  # (N, D)
    start_b,  # first row of the tile
    start_n,
    end_b,  # rows from here on are not read
    end_n,
    D,
    stride_xb,
    stride_yn,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(BLOCK_B, BLOCK_N) float32 dot products; rows beyond the end repeat the last one."""
    i = tl.minimum(start_b + tl.arange(0, BLOCK_B), end_b - 1).to(tl.int64)
    j = tl.minimum(start_n + tl.arange(0, BLOCK_N), end_n - 1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + i[:, None] * stride_xb + d[None, :]
    y_ptrs = y_ptr + j[None, :] * stride_yn + d[:, None]
    dots = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for _ in range(0, D, BLOCK_D):
        x = tl.load(x_ptrs)
        y = tl.load(y_ptrs)
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        dots = tl.dot(x, y, dots, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_D
        y_ptrs += BLOCK_D
    return dots


@triton.jit
def guide_tile(
    guide,  # (u_ptr (B, E), v_ptr (N, E), E, stride_ub, stride_vn)
    dots,  # stands for it where there is no second product
    start_b,
    start_n,
    end_b,
    end_n,
    PROGRAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(BLOCK_B, BLOCK_N) float32 second products."""
    if PROGRAM[GUIDED]:
        u_ptr, v_ptr, E, stride_ub, stride_vn = guide
        t = dot_tile(
            u_ptr, v_ptr, start_b, start_n, end_b, end_n, E, stride_ub, stride_vn,
            BLOCK_B, BLOCK_N, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        t = dots
    return t


@triton.jit
def along_rows(ptr, place):
    """(BLOCK_B, 1) entries of a padded vector along the tile's rows."""
    return tl.load(ptr + place[0] + place[2])[:, None]


@triton.jit
def along_columns(ptr, place):
    """(1, BLOCK_N) entries of a padded vector along the tile's columns."""
    return tl.load(ptr + place[1] + place[3])[None, :]


@triton.jit
def similarity_tile(dots, view, PROGRAM: tl.constexpr):
    """(s, ds/ddot), both like dots (BLOCK_B, span)."""
    x_norms_ptr, y_norms_ptr, padded_b, padded_n = view[0]
    place = view[2]
    if PROGRAM[NORMALIZE]:
        dots = dots * along_rows(x_norms_ptr, place) * along_columns(y_norms_ptr, place)
    if PROGRAM[SIMILARITY] == DOT:
        s = dots
        slope = tl.full(dots.shape, 1.0, tl.float32)
    else:
        squared = along_rows(x_norms_ptr + padded_b, place) + along_columns(y_norms_ptr + padded_n, place) - 2.0 * dots
        if (PROGRAM[SYMMETRIC] != 0) and (PROGRAM[TILES] != PLAIN):
            squared = tl.where(rows_of(view) == columns_of(view), squared - squared, squared)
        s = tl.where(squared < 0.0, 0.0, squared)
        slope = tl.where(squared < 0.0, 0.0, -2.0)
        if PROGRAM[SIMILARITY] == EUCLIDEAN:
            s = tl.sqrt_rn(s)
            slope = tl.where(s == 0.0, 0.0, -1.0 / tl.where(s == 0.0, 1.0, s))
    return s, slope


@triton.jit
def parameter(view, KIND: tl.constexpr, AT: tl.constexpr, SIDE: tl.constexpr, absent):
    """A parameter that broadcasts over the tile: a number, or a vector along SIDE."""
    numbers, scalars_ptr, rows_ptr, columns_ptr = view[1]
    place = view[2]
    if KIND == NUMBER:
        value = numbers[AT]
    elif KIND == SCALAR:
        value = tl.load(scalars_ptr + AT)
    elif KIND == VECTOR:
        if SIDE == 0:
            value = along_rows(rows_ptr + tl.cast(view[0][2], tl.int64) * AT, place)
        else:
            value = along_columns(columns_ptr + tl.cast(view[0][3], tl.int64) * AT, place)
    else:
        value = absent
    return value


@triton.jit
def view_of(
    inputs, panel, tile_b, tile_n, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What an epilogue reads for one part of a tile: norms, parameters, place, filters, ends of the panel."""
    first_b, first_n, end_b, end_n = panel
    start_b = tl.multiple_of(first_b + tile_b * BLOCK_B, 16)
    start_n = tl.multiple_of(first_n + tile_n * BLOCK_N + PART * (BLOCK_N // PARTS), 16)
    place = (start_b, start_n, tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_N // PARTS))
    return (inputs[0], inputs[1], place, inputs[2], (end_b, end_n))


@triton.jit
def with_guide(view, t):
    """The view with the second product (BLOCK_B, span)."""
    return (view[0], view[1], view[2], view[3], view[4], t)


@triton.jit
def rows_of(view):
    """(BLOCK_B, 1) int32 rows of S."""
    return view[2][0] + view[2][2][:, None]


@triton.jit
def columns_of(view):
    """(1, span) int32 columns of S."""
    return view[2][1] + view[2][3][None, :]


@triton.jit
def inside_tile(view):
    """(BLOCK_B, span) bool: inside the panel."""
    return (rows_of(view) < view[4][0]) & (columns_of(view) < view[4][1])


@triton.jit
def partials_of(
    row_partials_ptr,  # (slots, tiles_n * PARTS, length_b)
    column_partials_ptr,  # (slots, tiles_b, length_n)
    panel,
    tile_b,
    tile_n,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where one part of a tile writes its partials, for `store_owner`."""
    length_b = panel[2] - panel[0]
    length_n = panel[3] - panel[1]
    at_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    at_n = tile_n * BLOCK_N + PART * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
    rows = (row_partials_ptr, tile_n * PARTS + PART, tl.cdiv(length_n, BLOCK_N) * PARTS, at_b, length_b)
    columns = (column_partials_ptr, tile_b, tl.cdiv(length_b, BLOCK_B), at_n, length_n)
    return (rows, columns)


@triton.jit
def store_owner(partials, value, SLOT: tl.constexpr, SIDE: tl.constexpr):
    """One vector along a side of one tile; a second kernel folds the tiles in their order."""
    partial_ptr, tile, tiles, at, length = partials[SIDE]
    row = (tl.cast(tiles, tl.int64) * SLOT + tile) * length
    tl.store(partial_ptr + row + at, value, mask=at < length)


@triton.jit
def labels_meet(view):
    """False where the label ranges of a tile's rows and columns are disjoint, so that it holds no pair of equals."""
    x_labels = along_rows(view[3][0], view[2])
    y_labels = along_columns(view[3][1], view[2])
    return (tl.min(x_labels) <= tl.max(y_labels)) & (tl.min(y_labels) <= tl.max(x_labels))


@triton.jit
def is_plain(view, PROGRAM: tl.constexpr):
    """Whether a tile is inside the panel, off the diagonal of a self-similarity, and without a pair of equal labels."""
    end_b = view[2][0] + view[2][2].shape[0]
    end_n = view[2][1] + view[2][3].shape[0]
    plain = (end_b <= view[4][0]) & (end_n <= view[4][1])
    if PROGRAM[SYMMETRIC]:
        plain = plain & ((end_b <= view[2][1]) | (end_n <= view[2][0]))
    if PROGRAM[LABELLED]:
        plain = plain & (labels_meet(view) == 0)
    return plain


@triton.jit
def visited(
    index, inputs, panel, PROGRAM: tl.constexpr, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr
):
    """False where a tile is not of the kind that is served, lies below the diagonal of a self-similarity, or holds no
    pair of equal labels where only those count."""
    tile_b, tile_n = tile_of(index, panel, GROUP, BLOCK_B, BLOCK_N)
    view = view_of(inputs, panel, tile_b, tile_n, 0, 1, BLOCK_B, BLOCK_N)
    wanted = view[2][0] < view[4][0]
    if PROGRAM[TILES] != EVERY:
        wanted = wanted & (is_plain(view, PROGRAM) == (PROGRAM[TILES] == PLAIN))
    if PROGRAM[TRIANGLE]:
        last_column = tl.minimum(view[2][1] + view[2][3].shape[0], view[4][1]) - 1
        wanted = wanted & (view[2][0] <= last_column)
    if PROGRAM[SAME_ONLY]:
        wanted = wanted & labels_meet(view)
    return wanted


@triton.jit(do_not_specialize=["first_b", "first_n", "end_b", "end_n"])
def _visited_kernel(
    x_labels_ptr,  # (padded_b,) int64
    y_labels_ptr,  # (padded_n,) int64
    listed_ptr,  # (1 + tiles,) int32: how many tiles, and which, in no order; the count begins at 0
    visits_ptr,  # (tiles_b, tiles_n) int32: 1 where a tile is visited; zeros before, as the next two
    row_bounds_ptr,  # (2, tiles_b) int32: tiles_n less the first column tile visited, the last one plus 1
    column_bounds_ptr,  # (2, tiles_n) int32: the same of the row tiles
    first_b,  # the panel's rows: first_b to end_b
    first_n,
    end_b,
    end_n,
    PROGRAM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Which tiles of a panel a launch has to serve; atomics give the list its order, which no result depends on."""
    inputs = ((), (), (x_labels_ptr, y_labels_ptr))
    panel = (first_b, first_n, end_b, end_n)
    index = tl.program_id(0)
    if visited(index, inputs, panel, PROGRAM, GROUP, BLOCK_B, BLOCK_N):
        tile_b, tile_n = tile_of(index, panel, GROUP, BLOCK_B, BLOCK_N)
        tiles_b, tiles_n = tl.cdiv(end_b - first_b, BLOCK_B), tl.cdiv(end_n - first_n, BLOCK_N)
        tl.store(listed_ptr + 1 + tl.atomic_add(listed_ptr, 1), index)
        tl.store(visits_ptr + tile_b * tiles_n + tile_n, 1)
        tl.atomic_max(row_bounds_ptr + tile_b, tiles_n - tile_n)
        tl.atomic_max(row_bounds_ptr + tiles_b + tile_b, tile_n + 1)
        tl.atomic_max(column_bounds_ptr + tile_n, tiles_b - tile_b)
        tl.atomic_max(column_bounds_ptr + tiles_n + tile_n, tile_b + 1)


@triton.jit
def halves(tile, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half of a tile, each thread keeping what it holds."""
    return tl.split(tl.permute(tl.reshape(tile, [BLOCK_B, 2, BLOCK_N // 2]), [0, 2, 1]))
