"""Losses in closed form, from the statistics of a pass: value and slopes. The twin of `flashpair.formulas`."""

import triton
import triton.language as tl

from .scores import exp, log1p, relu


@triton.jit
def set_zero(ptr, first, count, BLOCK: tl.constexpr):
    """Entries first ... count - 1."""
    for start in range(first, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(ptr + i, tl.zeros([BLOCK], tl.float32), mask=i < count)


@triton.jit(do_not_specialize=["owners", "others"])
def _mean_gap_kernel(
    rows_ptr,  # (ROW_SLOTS, owners) float32: log-sums, own logits, what the formula does not read
    columns_ptr,  # (COLUMN_SLOTS, others) float32: log-sums with BOTH, what the formula does not read
    loss_ptr,  # () float32
    of_rows_ptr,  # as rows: the derivative of the loss
    of_columns_ptr,  # as columns
    owners,
    others,
    ROW_SLOTS: tl.constexpr,
    COLUMN_SLOTS: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: owners are few beside their pairs."""
    SIDES: tl.constexpr = 2 if BOTH else 1
    count = SIDES * tl.maximum(owners, 1)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, owners, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < owners
        own = tl.load(rows_ptr + owners + i, mask=inside, other=0.0)
        of_own = tl.zeros([BLOCK], tl.float32)
        for side in tl.static_range(SIDES):
            log_sums, slopes = (columns_ptr, of_columns_ptr) if side else (rows_ptr, of_rows_ptr)
            gap = tl.load(log_sums + i, mask=inside, other=float("-inf")) - own
            e = exp(-tl.abs(gap))
            total += (relu(gap) + log1p(e)).to(tl.float64)
            slope = tl.where(gap < 0, e, 1.0) / (1.0 + e) / count
            tl.store(slopes + i, slope, mask=inside)
            of_own -= slope
        tl.store(of_rows_ptr + owners + i, of_own, mask=inside)
    set_zero(of_rows_ptr, 2 * owners, ROW_SLOTS * owners, BLOCK)
    set_zero(of_columns_ptr, (SIDES - 1) * others, COLUMN_SLOTS * others, BLOCK)
    tl.store(loss_ptr, (tl.sum(total) / count).to(tl.float32))
