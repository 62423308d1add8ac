"""Reductions of a tile to one partial per owner, and their merging; numbered as in `flashpair.Reduction`.

Log-sum-exps are kept as (m, mass) with sum = mass * exp(m). Empty: m = -inf, mass = 0.
"""

import triton
import triton.language as tl

from .program import ABSENT, COMBINE, CONSTANT, GUIDE, LOGITS, OFFSET, OTHER, SCALE, SCORE, SIDE, WEIGHED, WEIGHT
from .scores import exp, log1p, score_value
from .tiles import parameter

SUM = tl.constexpr(0)
COUNT = tl.constexpr(1)
LOGSUMEXP = tl.constexpr(2)
SOFTMAX_MEAN = tl.constexpr(3)
MOMENTS = tl.constexpr(4)
MAX = tl.constexpr(5)

LOGADDEXP = tl.constexpr(1)  # numbered as in `flashpair.Combine`
#: Widest range of exponents that may share one offset: what is then flushed is below exp(-43) of every kept sum.
SHARED_RANGE = tl.constexpr(44.0)


@triton.jit
def logaddexp(p, q):
    """log(exp(p) + exp(q)) that passes infinities on."""
    e = tl.where(p == q, 1.0, exp(-tl.abs(p - q)))
    return tl.maximum(p, q) + log1p(e)


@triton.jit
def combined_offset(view, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """combine(p, q), broadcastable to the tile."""
    side: tl.constexpr = PROGRAM[AT + SIDE]
    p = parameter(view, PROGRAM[AT + OFFSET], PROGRAM[AT + OFFSET + 1], side, 0.0)
    if PROGRAM[AT + OTHER] == ABSENT:
        value = p
    else:
        q = parameter(view, PROGRAM[AT + OTHER], PROGRAM[AT + OTHER + 1], 1 - side, 0.0)
        if PROGRAM[AT + COMBINE] == LOGADDEXP:
            value = logaddexp(p, q)
        else:
            value = p + q
    return value


@triton.jit
def affine(s, view, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """z = scale * s + combine(offset, other_offset), leaving out what is absent; of logits with t in the place of s."""
    z = s
    if PROGRAM[AT + GUIDE] == LOGITS:
        z = view[5]
    if PROGRAM[AT + SCALE] != ABSENT:
        z = z * parameter(view, PROGRAM[AT + SCALE], PROGRAM[AT + SCALE + 1], PROGRAM[AT + SIDE], 1.0)
    if (PROGRAM[AT + OFFSET] != ABSENT) or (PROGRAM[AT + OTHER] != ABSENT):
        z = z + combined_offset(view, PROGRAM, AT)
    return z


@triton.jit
def constant_of(view, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """The c of a score."""
    return parameter(view, PROGRAM[AT + CONSTANT], PROGRAM[AT + CONSTANT + 1], 0, 0.0)


@triton.jit
def exponent(s, keep, view, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """(log(w * exp(phi(z))), keep): pairs of weight zero, or of a second product that is not positive, are not kept."""
    e = score_value(affine(s, view, PROGRAM, AT), constant_of(view, PROGRAM, AT), PROGRAM[AT + SCORE])
    if PROGRAM[AT + WEIGHT] != ABSENT:
        w = parameter(view, PROGRAM[AT + WEIGHT], PROGRAM[AT + WEIGHT + 1], 1 - PROGRAM[AT + SIDE], 1.0)
        keep = keep & (w != 0.0)
        e = e + tl.log(tl.where(w == 0.0, 1.0, w))
    if PROGRAM[AT + GUIDE] == WEIGHED:
        keep = keep & ((view[5] <= 0.0) == 0)
        e = e + tl.log(tl.where(view[5] <= 0.0, 1.0, view[5]))
    return e, keep


@triton.jit
def along(v, SIDE: tl.constexpr):
    """A vector along a side, broadcastable to the tile."""
    return tl.expand_dims(v, 1 - SIDE)


@triton.jit
def finite_offset(m):
    """The maximum as an offset: 0 where it is infinite, so that nothing becomes inf - inf."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def owner_logsumexp(e, keep, SIDE: tl.constexpr):
    """(m, mass, p): owners' logsumexp in one tile and the terms of its mass, offset by each owner's maximum."""
    e = tl.where(keep, e, -float("inf"))
    m = tl.max(e, 1 - SIDE)
    p = exp(e - along(finite_offset(m), SIDE))
    return m, tl.sum(p, 1 - SIDE), p


@triton.jit
def shared_logsumexp(e, keep, other_keep, SIDE: tl.constexpr):
    """(m, mass) of the owners on SIDE and of those on the other side, from one exponential where the range permits."""
    either = keep | other_keep
    top = tl.max(tl.where(either, e, -float("inf")))
    bottom = tl.min(tl.where(either, e, float("inf")))
    if top - bottom <= SHARED_RANGE:
        p = exp(e - finite_offset(top))
        mass = tl.sum(tl.where(keep, p, 0.0), 1 - SIDE)
        other_mass = tl.sum(tl.where(other_keep, p, 0.0), SIDE)
        m = tl.where(mass == 0.0, -float("inf"), top)
        other_m = tl.where(other_mass == 0.0, -float("inf"), top)
    else:
        m, mass, _ = owner_logsumexp(e, keep, SIDE)
        other_m, other_mass, _ = owner_logsumexp(e, other_keep, 1 - SIDE)
    return m, mass, other_m, other_mass


@triton.jit
def larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def owner_max(value, keep, SIDE: tl.constexpr):
    """Largest kept value of each owner in one tile; a NaN is the largest."""
    return tl.reduce(tl.where(keep, value, -float("inf")), 1 - SIDE, larger_or_nan)


@triton.jit
def owner_moments(s, keep, SIDE: tl.constexpr):
    """(count, mean, sum of squared deviations, min, max) of the kept entries in one tile."""
    count = tl.sum(tl.where(keep, 1.0, 0.0), 1 - SIDE)
    mean = tl.sum(tl.where(keep, s, 0.0), 1 - SIDE) / tl.maximum(count, 1.0)
    deviation = tl.where(keep, s - along(mean, SIDE), 0.0)
    low = tl.min(tl.where(keep, s, float("inf")), 1 - SIDE)
    high = tl.max(tl.where(keep, s, -float("inf")), 1 - SIDE)
    low = tl.where(mean != mean, mean, low)
    high = tl.where(mean != mean, mean, high)
    return count, mean, tl.sum(deviation * deviation, 1 - SIDE), low, high


# --- merging the partials of tiles ------------------------------------------------------------------------------------
# A running statistic is five vectors (BLOCK,) in float64, of which a reduction uses as many as it has partials.


@triton.jit
def nothing_merged(at, REDUCTION: tl.constexpr):
    """The statistics of no tile."""
    zero = tl.zeros(at.shape, tl.float64)
    inf = zero + float("inf")
    if REDUCTION == MOMENTS:
        values = (zero, zero, zero, inf, -inf)
    elif (REDUCTION == SUM) or (REDUCTION == COUNT):  # noqa: SIM109
        values = (zero, zero, zero, zero, zero)
    else:
        values = (-inf, zero, zero, zero, zero)
    return values


@triton.jit
def running(state, step, inside, REDUCTION: tl.constexpr):
    """The statistics so far, from the state's first slot of each owner; `step` from one slot to the next."""
    first = tl.load(state, mask=inside, other=0.0)
    second = first
    third = first
    fourth = first
    fifth = first
    if (REDUCTION != SUM) and (REDUCTION != COUNT) and (REDUCTION != MAX):
        second = tl.load(state + step, mask=inside, other=0.0)
        if REDUCTION != LOGSUMEXP:
            third = tl.load(state + 2 * step, mask=inside, other=0.0)
        if REDUCTION == MOMENTS:
            fourth = tl.load(state + 3 * step, mask=inside, other=0.0)
            fifth = tl.load(state + 4 * step, mask=inside, other=0.0)
    return (first, second, third, fourth, fifth)


@triton.jit
def keep_running(values, state, step, inside, REDUCTION: tl.constexpr):
    """Write the statistics so far where `running` reads them."""
    tl.store(state, values[0], mask=inside)
    if (REDUCTION != SUM) and (REDUCTION != COUNT) and (REDUCTION != MAX):
        tl.store(state + step, values[1], mask=inside)
        if REDUCTION != LOGSUMEXP:
            tl.store(state + 2 * step, values[2], mask=inside)
        if REDUCTION == MOMENTS:
            tl.store(state + 3 * step, values[3], mask=inside)
            tl.store(state + 4 * step, values[4], mask=inside)


@triton.jit
def write_results(values, out, step, inside, REDUCTION: tl.constexpr):
    """Write what a reduction's statistics say, in float32; `step` from one slot of the results to the next."""
    first, second, third, fourth, fifth = values
    if (REDUCTION == SUM) or (REDUCTION == COUNT) or (REDUCTION == MAX):  # noqa: SIM109
        tl.store(out, first.to(tl.float32), mask=inside)
    elif REDUCTION == MOMENTS:
        tl.store(out, first.to(tl.float32), mask=inside)
        tl.store(out + step, second.to(tl.float32), mask=inside)
        tl.store(out + 2 * step, (third / tl.maximum(first, 1.0)).to(tl.float32), mask=inside)
        tl.store(out + 3 * step, fourth.to(tl.float32), mask=inside)
        tl.store(out + 4 * step, fifth.to(tl.float32), mask=inside)
    else:
        logsumexp = (first + tl.log(second)).to(tl.float32)
        if REDUCTION == SOFTMAX_MEAN:
            mean = tl.where(second == 0.0, 0.0, third / tl.where(second == 0.0, 1.0, second))
            tl.store(out, mean.to(tl.float32), mask=inside)
            tl.store(out + step, logsumexp, mask=inside)
        else:
            tl.store(out, logsumexp, mask=inside)


@triton.jit
def was_visited(tile, at, corner, SIDE: tl.constexpr, TRIANGLE: tl.constexpr):
    """Whether the owners at `at` of a panel met a tile or part of one of the other side, as `tiles.visited` decides."""
    if len(TRIANGLE) == 0:
        met = (tile >= 0) & (at >= 0)
    else:
        first_b, first_n, end_n = corner
        block_b: tl.constexpr = TRIANGLE[0]
        block_n: tl.constexpr = TRIANGLE[1]
        parts: tl.constexpr = TRIANGLE[2]
        tile_b = at // block_b if SIDE == 0 else tile
        tile_n = tile // parts if SIDE == 0 else at // block_n
        met = first_b + tile_b * block_b < tl.minimum(first_n + (tile_n + 1) * block_n, end_n)
    return met


@triton.jit
def merged(
    values,
    partial_ptr,  # (slots, tiles, length) float32
    at,  # (BLOCK,) position in the panel
    tiles,
    length,
    corner,  # (first_b, first_n, end_n) of the panel
    REDUCTION: tl.constexpr,
    SLOT: tl.constexpr,
    SIDE: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The statistics with the partials of a panel's tiles, in the order of the tiles."""
    first, second, third, fourth, fifth = values
    t = tl.arange(0, BLOCK_T)
    step = tl.cast(tiles, tl.int64) * length  # from one slot of the partials to the next
    inside = at < length
    if (REDUCTION == SUM) or (REDUCTION == COUNT):  # noqa: SIM109
        for start in range(0, tiles, BLOCK_T):
            mask = (t[:, None] < tiles - start) & inside[None, :]
            mask = mask & was_visited((start + t)[:, None], at[None, :], corner, SIDE, TRIANGLE)
            offset = step * SLOT + tl.cast(start + t, tl.int64)[:, None] * length + at[None, :]
            first += tl.sum(tl.load(partial_ptr + offset, mask=mask, other=0.0).to(tl.float64), 0)
    elif REDUCTION == MAX:
        for start in range(0, tiles, 1):
            offset = step * SLOT + tl.cast(start, tl.int64) * length + at
            mask = inside & was_visited(start, at, corner, SIDE, TRIANGLE)
            high = tl.load(partial_ptr + offset, mask=mask, other=-float("inf")).to(tl.float64)
            first = tl.where((high > first) | (high != high), high, first)
    elif REDUCTION == MOMENTS:
        for start in range(0, tiles, 1):
            offset = step * SLOT + tl.cast(start, tl.int64) * length + at
            mask = inside & was_visited(start, at, corner, SIDE, TRIANGLE)
            c = tl.load(partial_ptr + offset, mask=mask, other=0.0).to(tl.float64)
            difference = tl.load(partial_ptr + offset + step, mask=mask, other=0.0).to(tl.float64) - second
            m2 = tl.load(partial_ptr + offset + 2 * step, mask=mask, other=0.0).to(tl.float64)
            lo = tl.load(partial_ptr + offset + 3 * step, mask=mask, other=float("inf")).to(tl.float64)
            hi = tl.load(partial_ptr + offset + 4 * step, mask=mask, other=-float("inf")).to(tl.float64)
            share = c / tl.maximum(first + c, 1.0)
            third += m2 + tl.where(c == 0.0, 0.0, difference * difference * first * share)
            second += tl.where(c == 0.0, 0.0, difference * share)
            first += c
            fourth = tl.where((lo < fourth) | (lo != lo), lo, fourth)
            fifth = tl.where((hi > fifth) | (hi != hi), hi, fifth)
    else:
        m = first.to(tl.float32)
        for start in range(0, tiles, BLOCK_T):
            mask = (t[:, None] < tiles - start) & inside[None, :]
            mask = mask & was_visited((start + t)[:, None], at[None, :], corner, SIDE, TRIANGLE)
            offset = step * SLOT + tl.cast(start + t, tl.int64)[:, None] * length + at[None, :]
            tile_m = tl.load(partial_ptr + offset, mask=mask, other=-float("inf"))
            tile_mass = tl.load(partial_ptr + offset + step, mask=mask, other=0.0)
            new_m = tl.maximum(m, tl.max(tile_m, 0))
            shift = finite_offset(new_m)
            old = exp(m - shift).to(tl.float64)
            # An empty tile counts for nothing, and 0 * inf must not make it count.
            factor = tl.where(tile_mass == 0.0, 0.0, exp(tile_m - shift[None, :])).to(tl.float64)
            second = tl.where(second == 0.0, 0.0, second * old) + tl.sum(tile_mass.to(tl.float64) * factor, 0)
            if REDUCTION == SOFTMAX_MEAN:
                tile_t = tl.load(partial_ptr + offset + 2 * step, mask=mask, other=0.0).to(tl.float64)
                third = third * old + tl.sum(tile_t * factor, 0)
            m = new_m
        first = m.to(tl.float64)
    return (first, second, third, fourth, fifth)


@triton.jit
def fold_owners(
    block,
    own,  # (partial_ptr, tiles, first, end, state_ptr, order_ptr, owners) of the side whose owners these are
    other,  # the same of the other side; read if JOINT
    outs,  # (row_out_ptr, column_out_ptr)
    lengths,  # (rows, columns) of the results
    corner,
    ENTRIES: tl.constexpr,
    SIDE: tl.constexpr,
    JOINT: tl.constexpr,
    FRESH: tl.constexpr,
    FINISH: tl.constexpr,
    ORDERED: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge a panel's partials of BLOCK owners."""
    partial_ptr, tiles, first, end, state_ptr, order_ptr, owners = own
    at = block * BLOCK + tl.arange(0, BLOCK)
    length = end - first
    inside = at < length
    place = (first + at).to(tl.int64)
    if ORDERED:
        place = tl.load(order_ptr + first + at, mask=inside, other=0)
    step = tl.cast(owners, tl.int64)
    for n in tl.static_range(len(ENTRIES) // 4):
        state = state_ptr + step * ENTRIES[4 * n + 1] + first + at
        if FRESH:
            values = nothing_merged(at, ENTRIES[4 * n])
        else:
            values = running(state, step, inside, ENTRIES[4 * n])
        values = merged(
            values, partial_ptr, at, tiles, length, corner, ENTRIES[4 * n], ENTRIES[4 * n + 1], SIDE, TRIANGLE, BLOCK_T
        )
        if JOINT:
            values = merged(
                values, other[0], at, other[1], length, corner, ENTRIES[4 * n], ENTRIES[4 * n + 1], 1 - SIDE, TRIANGLE,
                BLOCK_T,
            )  # fmt: skip
        if FINISH:
            out_step = tl.cast(lengths[ENTRIES[4 * n + 2]], tl.int64)
            out = outs[ENTRIES[4 * n + 2]] + out_step * ENTRIES[4 * n + 3] + place
            write_results(values, out, out_step, inside, ENTRIES[4 * n])
        else:
            keep_running(values, state, step, inside, ENTRIES[4 * n])


@triton.jit(do_not_specialize=["row_tiles", "column_tiles", "first_b", "first_n", "end_b", "end_n", "rows", "columns"])
def _fold_kernel(
    row_partials_ptr,  # (slots, row_tiles, end_b - first_b) float32
    column_partials_ptr,  # (slots, column_tiles, end_n - first_n)
    row_state_ptr,  # (slots, rows) float64; not touched if FRESH and FINISH
    column_state_ptr,  # (slots, columns)
    row_order_ptr,  # (rows,) int64: where the caller has each; read if ORDERED
    column_order_ptr,  # (columns,)
    row_out_ptr,  # (slots, rows) float32; written if FINISH
    column_out_ptr,  # (slots, columns)
    row_tiles,
    column_tiles,
    first_b,  # the panel
    first_n,
    end_b,
    end_n,
    rows,
    columns,
    ROWS: tl.constexpr,  # what owners along the rows have: (reduction, slot, side of its results, their slot, ...)
    COLUMNS: tl.constexpr,  # owners along the columns
    JOINT: tl.constexpr,  # the panel is a whole self-similarity: ROWS get the partials of both sides
    FRESH: tl.constexpr,  # nothing was merged yet: the state is not read
    FINISH: tl.constexpr,  # nothing comes later: the results are written, not the state
    ORDERED: tl.constexpr,
    TRIANGLE: tl.constexpr,  # (BLOCK_B, BLOCK_N, PARTS) where tiles below the diagonal were not visited, () elsewhere
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the partials of one panel into the running statistics, of both sides."""
    row_side = (row_partials_ptr, row_tiles, first_b, end_b, row_state_ptr, row_order_ptr, rows)
    column_side = (column_partials_ptr, column_tiles, first_n, end_n, column_state_ptr, column_order_ptr, columns)
    outs, lengths, corner = (row_out_ptr, column_out_ptr), (rows, columns), (first_b, first_n, end_n)
    blocks = 0
    if len(ROWS) > 0:
        blocks = tl.cdiv(end_b - first_b, BLOCK)
    if tl.program_id(0) < blocks:
        fold_owners(
            tl.program_id(0), row_side, column_side, outs, lengths, corner, ROWS, 0, JOINT, FRESH, FINISH, ORDERED,
            TRIANGLE, BLOCK_T, BLOCK,
        )  # fmt: skip
    else:
        fold_owners(
            tl.program_id(0) - blocks, column_side, row_side, outs, lengths, corner, COLUMNS, 1, False, FRESH, FINISH,
            ORDERED, TRIANGLE, BLOCK_T, BLOCK,
        )  # fmt: skip
