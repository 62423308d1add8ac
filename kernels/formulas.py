"""Losses in closed form, from the statistics of a pass: value and slopes. The twin of `flashpair.formulas`."""

import triton
import triton.language as tl

from .scores import exp, log1p, relu, sigmoid

#: In the order of `flashpair.formulas.Average`.
SUM, MEAN, ABOVE_ZERO = (tl.constexpr(i) for i in range(3))
#: Formulas of anchors.
SUP_CON, MULTI_SIMILARITY, CIRCLE, TRIPLET = (tl.constexpr(i) for i in range(4))


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


@triton.jit
def softplus(z):
    return relu(z) + log1p(exp(-tl.abs(z)))


@triton.jit
def _anchors(rows_ptr, counts_ptr, owners, c0, c1, c2, i, inside, FORMULA: tl.constexpr):
    """Losses of the anchors i and their slopes in two statistics; 0 outside."""
    a = tl.load(rows_ptr + i, mask=inside, other=0.0)
    b = tl.load(rows_ptr + owners + i, mask=inside, other=0.0)
    if FORMULA == MULTI_SIMILARITY:  # c0: alpha, c1: beta
        loss = softplus(a) / c0 + softplus(b) / c1
        of_a, of_b = sigmoid(a) / c0, sigmoid(b) / c1
        kept = inside
    elif FORMULA == TRIPLET:  # c0: sign, c1: margin, c2: whether the hinge is smooth
        kept = tl.load(counts_ptr + i, mask=inside, other=0.0) > 0
        violation = c0 * (b - a) + c1
        loss = tl.where(c2 != 0, softplus(violation), relu(violation))
        of_b = c0 * tl.where(c2 != 0, sigmoid(violation), tl.where(violation <= 0, 0.0, 1.0))
        of_a = -of_b
    else:
        positives = tl.load(counts_ptr + i, mask=inside, other=0.0)
        others = tl.load(counts_ptr + owners + i, mask=inside, other=0.0)
        if FORMULA == SUP_CON:  # c0: whether anchors count, as one of them has others than positives or without
            kept = tl.where(c0 > 0, positives, 0.0) > 0
            share = 1.0 / tl.maximum(positives, 1.0)
            loss = a - b * share
            of_a, of_b = tl.full(a.shape, 1.0, tl.float32), -share
        else:
            kept = (positives > 0) & (others > 0)
            loss, of_a = softplus(a + b), sigmoid(a + b)
            of_b = of_a
    return tl.where(kept, loss, 0.0), tl.where(kept, of_a, 0.0), tl.where(kept, of_b, 0.0)


# Numbers of pairs may be statistics in the middle of `rows_ptr`, aligned or not as the owners are many.
@triton.jit(do_not_specialize=["owners", "others", "c0", "c1", "c2"], do_not_specialize_on_alignment=["counts_ptr"])
def _anchors_kernel(
    rows_ptr,  # (ROW_SLOTS, owners) float32: two statistics, what the formula does not read
    columns_ptr,  # (COLUMN_SLOTS, others) float32: not read
    counts_ptr,  # (2, owners) float32 numbers of pairs, for formulas that read them
    loss_ptr,  # () float32
    of_rows_ptr,  # as rows: the derivative of the loss
    of_columns_ptr,  # as columns: 0
    owners,
    others,
    c0,  # constants of the formula, see `_anchors`
    c1,
    c2,
    FORMULA: tl.constexpr,
    AVERAGE: tl.constexpr,
    ROW_SLOTS: tl.constexpr,
    COLUMN_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: owners are few beside their pairs."""
    if FORMULA == SUP_CON:
        most = tl.zeros([BLOCK], tl.float32)
        for start in range(0, owners, BLOCK):
            i = start + tl.arange(0, BLOCK)
            most = tl.maximum(most, tl.load(counts_ptr + owners + i, mask=i < owners, other=0.0))
        c0 = tl.maximum(c0, tl.max(most))
    total = tl.zeros([BLOCK], tl.float64)
    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, owners, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < owners
        loss, _, _ = _anchors(rows_ptr, counts_ptr, owners, c0, c1, c2, i, inside, FORMULA)
        total += tl.where(inside, loss if AVERAGE != ABOVE_ZERO else relu(loss), 0.0).to(tl.float64)
        above += tl.where(inside & ((loss > 0) | (loss != loss)), 1, 0)
    if AVERAGE == SUM:
        number = tl.full([], 1.0, tl.float32)
    else:
        number = tl.maximum(owners if AVERAGE == MEAN else tl.sum(above), 1).to(tl.float32)
    for start in range(0, owners, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < owners
        loss, of_a, of_b = _anchors(rows_ptr, counts_ptr, owners, c0, c1, c2, i, inside, FORMULA)
        if AVERAGE == ABOVE_ZERO:
            of_a, of_b = tl.where(loss <= 0, 0.0, of_a), tl.where(loss <= 0, 0.0, of_b)
        tl.store(of_rows_ptr + i, of_a / number, mask=inside)
        tl.store(of_rows_ptr + owners + i, of_b / number, mask=inside)
    set_zero(of_rows_ptr, 2 * owners, ROW_SLOTS * owners, BLOCK)
    set_zero(of_columns_ptr, 0, COLUMN_SLOTS * others, BLOCK)
    tl.store(loss_ptr, (tl.sum(total) / number).to(tl.float32))


@triton.jit(do_not_specialize=["owners", "others"], do_not_specialize_on_alignment=["counts_ptr"])
def _pairs_kernel(
    rows_ptr,  # (ROW_SLOTS, owners) float32: sums over pairs, what the formula does not read
    columns_ptr,  # (COLUMN_SLOTS, others) float32: not read
    counts_ptr,  # (PARTS, owners) float32: numbers of pairs
    loss_ptr,  # () float32
    of_rows_ptr,  # as rows: the derivative of the loss
    of_columns_ptr,  # as columns: 0
    owners,
    others,
    PARTS: tl.constexpr,
    ROW_SLOTS: tl.constexpr,
    COLUMN_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: owners are few beside their pairs."""
    mean = tl.full([], 0.0, tl.float64)
    for part in tl.static_range(PARTS):
        total = tl.zeros([BLOCK], tl.float64)
        pairs = tl.zeros([BLOCK], tl.float64)
        for start in range(0, owners, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = i < owners
            total += tl.load(rows_ptr + part * owners + i, mask=inside, other=0.0).to(tl.float64)
            pairs += tl.load(counts_ptr + part * owners + i, mask=inside, other=0.0).to(tl.float64)
        of_one = 1.0 / tl.maximum(tl.sum(pairs), 1.0)
        mean += tl.sum(total) * of_one
        for start in range(0, owners, BLOCK):
            i = start + tl.arange(0, BLOCK)
            slope = tl.zeros([BLOCK], tl.float32) + of_one.to(tl.float32)
            tl.store(of_rows_ptr + part * owners + i, slope, mask=i < owners)
    set_zero(of_rows_ptr, PARTS * owners, ROW_SLOTS * owners, BLOCK)
    set_zero(of_columns_ptr, 0, COLUMN_SLOTS * others, BLOCK)
    tl.store(loss_ptr, mean.to(tl.float32))
