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


@triton.jit
def running(ptrs, inside, NEUTRAL: tl.constexpr, FRESH: tl.constexpr):
    """(BLOCK,) float64 of the running statistics; what is neutral where nothing was merged yet."""
    if FRESH:
        value = tl.full(inside.shape, NEUTRAL, tl.float64)
    else:
        value = tl.load(ptrs, mask=inside, other=0.0)
    return value


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
def fold_entry(
    partial_ptr,
    state_ptr,
    at,  # (BLOCK,) position in the panel
    tiles,
    length,
    first,
    state_length,
    corner,
    REDUCTION: tl.constexpr,
    SLOT: tl.constexpr,
    FRESH: tl.constexpr,
    SIDE: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Merge one statistic's partials; one tile of tiles at a time, in their order."""
    t = tl.arange(0, BLOCK_T)
    state = state_ptr + tl.cast(state_length, tl.int64) * SLOT + first + at
    step = tl.cast(tiles, tl.int64) * length  # from one slot of the partials to the next
    inside = at < length
    if (REDUCTION == SUM) or (REDUCTION == COUNT):  # noqa: SIM109
        total = running(state, inside, 0.0, FRESH)
        for start in range(0, tiles, BLOCK_T):
            mask = (t[:, None] < tiles - start) & inside[None, :]
            mask = mask & was_visited((start + t)[:, None], at[None, :], corner, SIDE, TRIANGLE)
            offset = step * SLOT + tl.cast(start + t, tl.int64)[:, None] * length + at[None, :]
            total += tl.sum(tl.load(partial_ptr + offset, mask=mask, other=0.0).to(tl.float64), 0)
        tl.store(state, total, mask=inside)
    elif REDUCTION == MOMENTS:
        count = running(state, inside, 0.0, FRESH)
        mean = running(state + state_length, inside, 0.0, FRESH)
        spread = running(state + 2 * state_length, inside, 0.0, FRESH)
        low = running(state + 3 * state_length, inside, float("inf"), FRESH)
        high = running(state + 4 * state_length, inside, -float("inf"), FRESH)
        for start in range(0, tiles, 1):
            offset = step * SLOT + tl.cast(start, tl.int64) * length + at
            mask = inside & was_visited(start, at, corner, SIDE, TRIANGLE)
            c = tl.load(partial_ptr + offset, mask=mask, other=0.0).to(tl.float64)
            difference = tl.load(partial_ptr + offset + step, mask=mask, other=0.0).to(tl.float64) - mean
            m2 = tl.load(partial_ptr + offset + 2 * step, mask=mask, other=0.0).to(tl.float64)
            lo = tl.load(partial_ptr + offset + 3 * step, mask=mask, other=float("inf")).to(tl.float64)
            hi = tl.load(partial_ptr + offset + 4 * step, mask=mask, other=-float("inf")).to(tl.float64)
            share = c / tl.maximum(count + c, 1.0)
            spread += m2 + tl.where(c == 0.0, 0.0, difference * difference * count * share)
            mean += tl.where(c == 0.0, 0.0, difference * share)
            count += c
            low = tl.where((lo < low) | (lo != lo), lo, low)
            high = tl.where((hi > high) | (hi != hi), hi, high)
        tl.store(state, count, mask=inside)
        tl.store(state + state_length, mean, mask=inside)
        tl.store(state + 2 * state_length, spread, mask=inside)
        tl.store(state + 3 * state_length, low, mask=inside)
        tl.store(state + 4 * state_length, high, mask=inside)
    else:
        m = running(state, inside, -float("inf"), FRESH).to(tl.float32)
        mass = running(state + state_length, inside, 0.0, FRESH)
        weighted = mass
        if REDUCTION == SOFTMAX_MEAN:
            weighted = running(state + 2 * state_length, inside, 0.0, FRESH)
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
            mass = tl.where(mass == 0.0, 0.0, mass * old) + tl.sum(tile_mass.to(tl.float64) * factor, 0)
            if REDUCTION == SOFTMAX_MEAN:
                tile_t = tl.load(partial_ptr + offset + 2 * step, mask=mask, other=0.0).to(tl.float64)
                weighted = weighted * old + tl.sum(tile_t * factor, 0)
            m = new_m
        tl.store(state, m.to(tl.float64), mask=inside)
        tl.store(state + state_length, mass, mask=inside)
        if REDUCTION == SOFTMAX_MEAN:
            tl.store(state + 2 * state_length, weighted, mask=inside)


@triton.jit(do_not_specialize=["tiles", "length", "first", "state_length", "first_b", "first_n", "end_n"])
def _fold_kernel(
    partial_ptr,  # (slots, tiles, length) float32
    state_ptr,  # (slots, state_length) float64
    tiles,
    length,
    first,  # position of the panel in the state
    state_length,
    first_b,  # the panel; read if TRIANGLE
    first_n,
    end_n,
    ENTRIES: tl.constexpr,  # (reduction, slot, ...)
    FRESH: tl.constexpr,  # nothing was merged yet: the state is not read
    SIDE: tl.constexpr,  # of the owners: 0 rows, 1 columns
    TRIANGLE: tl.constexpr,  # (BLOCK_B, BLOCK_N, PARTS) where tiles below the diagonal were not visited, () elsewhere
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the partials of one panel into the running statistics."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for n in tl.static_range(len(ENTRIES) // 2):
        fold_entry(
            partial_ptr, state_ptr, at, tiles, length, first, state_length, (first_b, first_n, end_n),
            ENTRIES[2 * n], ENTRIES[2 * n + 1], FRESH, SIDE, TRIANGLE, BLOCK_T,
        )  # fmt: skip
