"""Which pairs of a tile an evaluation keeps; masks numbered as in `flashpair.Mask`."""

import triton
import triton.language as tl

from .program import ABOVE, ABSENT, BELOW, MASK, MIRRORED, SIDE
from .tiles import parameter

ALL = tl.constexpr(0)
SAME = tl.constexpr(1)
DIFFERENT = tl.constexpr(2)
GIVEN = tl.constexpr(3)
NOT_GIVEN = tl.constexpr(4)


@triton.jit
def labels_meet(
    x_labels_ptr,  # (B,) int32
    y_labels_ptr,  # (N,) int32
    i,
    j,
):
    """False where the label ranges of a tile's rows and columns are disjoint, so that it holds no pair of equals."""
    x_labels = tl.load(x_labels_ptr + i)
    y_labels = tl.load(y_labels_ptr + j)
    return (tl.min(x_labels) <= tl.max(y_labels)) & (tl.min(y_labels) <= tl.max(x_labels))


@triton.jit
def keep_tile(
    inside,  # (BLOCK_B, BLOCK_N) bool
    s,  # (BLOCK_B, BLOCK_N)
    vectors,
    x_labels_ptr,  # (B,) int32
    y_labels_ptr,  # (N,) int32
    exclude_ptr,  # (B,) int32
    pair_mask_ptr,  # (B, N) uint8
    CODE: tl.constexpr,
    AT: tl.constexpr,  # first field of the evaluation
    TRIANGLE: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
):
    """(BLOCK_B, BLOCK_N) bool: the pairs that an evaluation reduces."""
    i = vectors[4]
    j = vectors[5]
    N = tl.cast(vectors[7], tl.int64)
    mirrored: tl.constexpr = CODE[AT + MIRRORED]
    keep = inside
    if TRIANGLE:
        if mirrored:
            keep = keep & (i[:, None] < j[None, :])
        else:
            keep = keep & (i[:, None] <= j[None, :])
    if EXCLUDE_SELF:
        keep = keep & (i[:, None] != j[None, :])
    if HAS_EXCLUDE:
        if mirrored:
            keep = keep & (tl.load(exclude_ptr + j)[None, :] != i[:, None])
        else:
            keep = keep & (tl.load(exclude_ptr + i)[:, None] != j[None, :])
    mask: tl.constexpr = CODE[AT + MASK]
    if (mask == SAME) or (mask == DIFFERENT):
        same = tl.load(x_labels_ptr + i)[:, None] == tl.load(y_labels_ptr + j)[None, :]
        if mask == SAME:
            keep = keep & same
        else:
            keep = keep & (same == 0)
    if (mask == GIVEN) or (mask == NOT_GIVEN):
        if mirrored:
            given = tl.load(pair_mask_ptr + j[None, :] * N + i[:, None], mask=inside, other=0)
        else:
            given = tl.load(pair_mask_ptr + i[:, None] * N + j[None, :], mask=inside, other=0)
        if mask == GIVEN:
            keep = keep & (given != 0)
        else:
            keep = keep & (given == 0)
    side: tl.constexpr = CODE[AT + SIDE]
    if CODE[AT + ABOVE] != ABSENT:
        above = parameter(vectors, CODE[AT + ABOVE], CODE[AT + ABOVE + 1], side, 0.0)
        keep = keep & ((s <= above) == 0)
    if CODE[AT + BELOW] != ABSENT:
        below = parameter(vectors, CODE[AT + BELOW], CODE[AT + BELOW + 1], side, 0.0)
        keep = keep & ((s >= below) == 0)
    return keep
