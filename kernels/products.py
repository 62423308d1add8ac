"""Pair weights of a panel with few visited tiles, multiplied into a gradient; the vendor multiplies full panels."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length", "lengths", "tiles", "own_tiles"])
def _visited_product_kernel(
    weights_ptr,  # (length_b, stride_w); read in visited tiles only
    operand_ptr,  # (lengths, D) rows of the other side
    out_ptr,  # (length, D) float32, added to
    visits_ptr,  # (tiles_b, tiles_n) int32: 1 where a tile was visited
    firsts_ptr,  # (own_tiles,) int32: tiles less the first visited one among the others
    ends_ptr,  # (own_tiles,) int32: the last one plus 1
    stride_w,
    stride_operand,
    stride_out,
    D,
    length,  # owners: rows of the panel, or its columns if TRANSPOSED
    lengths,  # others
    tiles,  # of the others
    own_tiles,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,  # owners of a tile
    BLOCKS: tl.constexpr,  # others of a tile, a multiple of BLOCK_K
    BLOCK_K: tl.constexpr,  # others at a time
    BLOCK_F: tl.constexpr,  # features of a program
    INPUT_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out += W operand, or Wᵀ operand; a program has the owners of one tile and some features, and walks the others."""
    tile = tl.program_id(0) % own_tiles
    own = tile * BLOCK + tl.arange(0, BLOCK)
    feature = tl.program_id(0) // own_tiles * BLOCK_F + tl.arange(0, BLOCK_F)
    steps: tl.constexpr = BLOCKS // BLOCK_K
    total = tl.zeros([BLOCK, BLOCK_F], tl.float32)
    first = tiles - tl.load(firsts_ptr + tile)
    end = tl.load(ends_ptr + tile)
    for step in range(first * steps, end * steps):
        other_tile = step // steps
        if TRANSPOSED:
            visit = tl.load(visits_ptr + other_tile * own_tiles + tile)
        else:
            visit = tl.load(visits_ptr + tile * tiles + other_tile)
        other = step * BLOCK_K + tl.arange(0, BLOCK_K)
        there = (other < lengths) & (visit != 0)
        rows = tl.load(
            operand_ptr + other.to(tl.int64)[:, None] * stride_operand + feature[None, :],
            mask=there[:, None] & (feature < D)[None, :],
            other=0.0,
        )
        if TRANSPOSED:
            places = other.to(tl.int64)[None, :] * stride_w + own[:, None]
            inside = (own < stride_w)[:, None] & there[None, :]
        else:
            places = own.to(tl.int64)[:, None] * stride_w + other[None, :]
            inside = (own < length)[:, None] & ((other < stride_w) & (visit != 0))[None, :]
        # Whole columns up to the stride, where zeros are, so that they are loaded many at a time.
        w = tl.load(weights_ptr + places, mask=inside, other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
            rows = rows.to(tl.float32)
        total = tl.dot(w, rows, total, input_precision=INPUT_PRECISION)
    out = out_ptr + own.to(tl.int64)[:, None] * stride_out + feature[None, :]
    inside = (own < length)[:, None] & (feature < D)[None, :]
    tl.store(out, tl.load(out, mask=inside, other=0.0) + total, mask=inside)
