"""What is done to rows of embeddings around the pairs: norms before, the gradient of normalising after.

The formulas stand in `flashpair.rowwise`; sums over the features are float64.
"""

import triton
import triton.language as tl

from .. import rowwise

EPSILON = tl.constexpr(rowwise.EPSILON)  # smallest norm that rows are divided by


@triton.jit
def tile_of_rows(ptr, stride, row, feature, inside):
    """(ROWS, BLOCK_D) float32 entries of a matrix."""
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + feature[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def inverse_norm(squares):
    """1 / max(norm, 1e-12) of sums of squares (ROWS,) float64; NaN stays."""
    norm = tl.sqrt(squares)
    return 1.0 / tl.where(norm < EPSILON, EPSILON, norm)


@triton.jit(do_not_specialize=["rows", "padded"])
def _norms_kernel(
    x_ptr,  # (rows, D)
    norms_ptr,  # (2, padded) float32: inverse norm, squared norm after the division
    unit_ptr,  # (rows, D) in the dtype of x: rows divided by their norms
    stride_x,
    stride_unit,
    D,
    rows,
    padded,
    NORMALIZE: tl.constexpr,
    SQUARED: tl.constexpr,
    UNIT: tl.constexpr,  # unit rows are wanted, otherwise norms
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norms, or unit rows, of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inverse = tl.full([ROWS], 1.0, tl.float64)
    if NORMALIZE:
        squares = tl.zeros([ROWS], tl.float64)
        for start in range(0, D, BLOCK_D):
            inside = (row < rows)[:, None] & (start + columns < D)[None, :]
            x = tile_of_rows(x_ptr, stride_x, row, start + columns, inside).to(tl.float64)
            squares += tl.sum(x * x, 1)
        inverse = inverse_norm(squares)
    if UNIT:
        for start in range(0, D, BLOCK_D):
            inside = (row < rows)[:, None] & (start + columns < D)[None, :]
            x = tile_of_rows(x_ptr, stride_x, row, start + columns, inside).to(tl.float64)
            unit = (x * inverse[:, None]).to(tl.float32).to(unit_ptr.dtype.element_ty)
            ptrs = unit_ptr + row.to(tl.int64)[:, None] * stride_unit + (start + columns)[None, :]
            tl.store(ptrs, unit, mask=inside)
    else:
        tl.store(norms_ptr + row, tl.where(row < rows, inverse, 0.0).to(tl.float32), mask=row < padded)
        if SQUARED:
            total = tl.zeros([ROWS], tl.float32)
            for start in range(0, D, BLOCK_D):
                inside = (row < rows)[:, None] & (start + columns < D)[None, :]
                x = tile_of_rows(x_ptr, stride_x, row, start + columns, inside)
                x = x * inverse.to(tl.float32)[:, None]
                total += tl.sum(x * x, 1)
            tl.store(norms_ptr + padded + row, tl.where(row < rows, total, 0.0), mask=row < padded)


@triton.jit
def tile_of_gradient(
    sources,  # (d_ptr, operand_ptr, sums (ROWS,), scale, stride_d, stride_operand)
    row,
    feature,
    inside,
    DISTANCE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """(ROWS, BLOCK_D) float32: with the distances' own term, and without the scale of float16 weights."""
    d_ptr, operand_ptr, sums, scale, stride_d, stride_operand = sources
    d = tile_of_rows(d_ptr, stride_d, row, feature, inside)
    if DISTANCE:
        d = d - tile_of_rows(operand_ptr, stride_operand, row, feature, inside) * sums[:, None]
    if SCALED:
        d = d / scale
    return d


@triton.jit(do_not_specialize=["rows"])
def _gradient_kernel(
    d_ptr,  # (rows, D) float32: sum of pair weights times the other side
    operand_ptr,  # (rows, D) as the products read it; read for distances
    raw_ptr,  # (rows, D) as given
    sums_ptr,  # (rows,) float64 sums of pair weights; read for distances
    scale_ptr,  # (1,) float32
    out_ptr,  # (rows, D) in the dtype of raw
    stride_d,
    stride_operand,
    stride_raw,
    stride_out,
    D,
    rows,
    NORMALIZE: tl.constexpr,
    DISTANCE: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of ROWS rows as given."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    sums = tl.zeros([ROWS], tl.float32)
    scale = 1.0
    if DISTANCE:
        sums = tl.load(sums_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    if SCALED:
        scale = tl.load(scale_ptr)
    sources = (d_ptr, operand_ptr, sums, scale, stride_d, stride_operand)
    along = tl.zeros([ROWS], tl.float64)
    inverse = tl.full([ROWS], 1.0, tl.float64)
    if NORMALIZE:
        squares = tl.zeros([ROWS], tl.float64)
        for start in range(0, D, BLOCK_D):
            inside = (row < rows)[:, None] & (start + columns < D)[None, :]
            d = tile_of_gradient(sources, row, start + columns, inside, DISTANCE, SCALED)
            raw = tile_of_rows(raw_ptr, stride_raw, row, start + columns, inside).to(tl.float64)
            squares += tl.sum(raw * raw, 1)
            along += tl.sum(raw * d.to(tl.float64), 1)
        inverse = inverse_norm(squares)
        # Rows below the smallest norm are divided by a constant, which has no gradient of its own.
        along = tl.where(inverse < 1.0 / EPSILON, along / squares, 0.0)
    for start in range(0, D, BLOCK_D):
        inside = (row < rows)[:, None] & (start + columns < D)[None, :]
        d = tile_of_gradient(sources, row, start + columns, inside, DISTANCE, SCALED)
        if NORMALIZE:
            raw = tile_of_rows(raw_ptr, stride_raw, row, start + columns, inside)
            d = (d - raw * along.to(tl.float32)[:, None]) * inverse.to(tl.float32)[:, None]
        ptrs = out_ptr + row.to(tl.int64)[:, None] * stride_out + (start + columns)[None, :]
        tl.store(ptrs, d.to(out_ptr.dtype.element_ty), mask=inside)
