"""What every kernel does with a tile: find it, compute its similarities, read parameters along its sides."""

import triton
import triton.language as tl

from .program import NUMBER, SCALAR, VECTOR

DOT = tl.constexpr(0)  # numbered as in `flashpair.Similarity`
SQUARED_EUCLIDEAN = tl.constexpr(1)
EUCLIDEAN = tl.constexpr(2)


@triton.jit
def tile_of(pid, tiles_b, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles walk the columns together, so that both stay in L2."""
    width = GROUP * tiles_n
    first = (pid // width) * GROUP
    size = tl.minimum(tiles_b - first, GROUP)
    return first + (pid % width) % size, (pid % width) // size


@triton.jit
def dot_tile(
    x_ptr,  # (B, D)
    y_ptr,  # (N, D)
    i,  # (BLOCK_B,) int64, inside
    j,  # (BLOCK_N,) int64, inside
    D,
    stride_xb,
    stride_yn,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """(BLOCK_B, BLOCK_N) float32 dot products of the rows i of x and j of y."""
    d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + i[:, None] * stride_xb + d[None, :]
    y_ptrs = y_ptr + j[None, :] * stride_yn + d[:, None]
    dots = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_ptrs)
            y = tl.load(y_ptrs)
        else:
            x = tl.load(x_ptrs, mask=d[None, :] < D - start, other=0.0)
            y = tl.load(y_ptrs, mask=d[:, None] < D - start, other=0.0)
        dots = tl.dot(x, y, dots, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_D
        y_ptrs += BLOCK_D
    return dots


@triton.jit
def similarity_tile(
    dots,  # (BLOCK_B, BLOCK_N)
    x_norms_ptr,  # (2, B) inverse norm, squared norm
    y_norms_ptr,  # (2, N)
    i,
    j,
    B,
    N,
    SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """(s, ds/ddot), both (BLOCK_B, BLOCK_N)."""
    if NORMALIZE:
        dots = dots * tl.load(x_norms_ptr + i)[:, None] * tl.load(y_norms_ptr + j)[None, :]
    if SIMILARITY == DOT:
        s = dots
        slope = tl.full(dots.shape, 1.0, tl.float32)
    else:
        squared = tl.load(x_norms_ptr + B + i)[:, None] + tl.load(y_norms_ptr + N + j)[None, :] - 2.0 * dots
        s = tl.where(squared < 0.0, 0.0, squared)
        slope = tl.where(squared < 0.0, 0.0, -2.0)
        if SIMILARITY == EUCLIDEAN:
            s = tl.sqrt_rn(s)
            slope = tl.where(s == 0.0, 0.0, -1.0 / tl.where(s == 0.0, 1.0, s))
    return s, slope


@triton.jit
def parameter(vectors, KIND: tl.constexpr, AT: tl.constexpr, SIDE: tl.constexpr, absent):
    """A parameter that broadcasts over the tile: a number, or a vector along SIDE."""
    numbers, scalars_ptr, rows_ptr, columns_ptr, i, j, B, N = vectors
    if KIND == NUMBER:
        value = numbers[AT]
    elif KIND == SCALAR:
        value = tl.load(scalars_ptr + AT)
    elif KIND == VECTOR:
        if SIDE == 0:
            value = tl.load(rows_ptr + tl.cast(B, tl.int64) * AT + i)[:, None]
        else:
            value = tl.load(columns_ptr + tl.cast(N, tl.int64) * AT + j)[None, :]
    else:
        value = absent
    return value


@triton.jit
def store_partial(
    partial_ptr,  # (slots, tiles, length)
    value,  # (BLOCK,) along the side
    slot,
    tile,  # position of this tile across the side
    tiles,
    at,  # (BLOCK,) position along the side, inside the panel or beyond its end
    length,
):
    """One vector of one tile; a second kernel folds the tiles in their order."""
    row = (tl.cast(slot, tl.int64) * tiles + tile) * length
    tl.store(partial_ptr + row + at, value, mask=at < length)
