"""Which pairs of a tile an evaluation keeps; masks numbered as in `flashpair.Mask`."""

import triton
import triton.language as tl

from .program import (
    ABOVE,
    ABSENT,
    BELOW,
    EXCLUDE_SELF,
    GUIDE,
    HAS_EXCLUDE,
    MASK,
    MIRRORED,
    PLAIN,
    SIDE,
    THRESHOLD,
    TILES,
    TRIANGLE,
)
from .tiles import along_columns, along_rows, columns_of, inside_tile, parameter, rows_of

ALL = tl.constexpr(0)
SAME = tl.constexpr(1)
DIFFERENT = tl.constexpr(2)
GIVEN = tl.constexpr(3)
NOT_GIVEN = tl.constexpr(4)


@triton.jit
def keep_tile(
    s,  # (BLOCK_B, span)
    view,
    PROGRAM: tl.constexpr,
    AT: tl.constexpr,  # first field of the evaluation
):
    """(BLOCK_B, span) bool: the pairs that an evaluation reduces. A NaN passes every threshold."""
    if PROGRAM[TILES] == PLAIN:
        keep = tl.full(s.shape, 1, tl.int1)
    else:
        keep = keep_by_place(s, view, PROGRAM, AT)
    compared = s
    if PROGRAM[AT + GUIDE] == THRESHOLD:
        compared = view[5]
    if PROGRAM[AT + ABOVE] != ABSENT:
        above = parameter(view, PROGRAM[AT + ABOVE], PROGRAM[AT + ABOVE + 1], PROGRAM[AT + SIDE], 0.0)
        keep = keep & ((compared <= above) == 0)
    if PROGRAM[AT + BELOW] != ABSENT:
        below = parameter(view, PROGRAM[AT + BELOW], PROGRAM[AT + BELOW + 1], PROGRAM[AT + SIDE], 0.0)
        keep = keep & ((compared >= below) == 0)
    return keep


@triton.jit
def keep_by_place(s, view, PROGRAM: tl.constexpr, AT: tl.constexpr):
    """(BLOCK_B, span) bool: inside, off the diagonal where that is asked for, and in the mask."""
    x_labels_ptr, y_labels_ptr, x_exclude_ptr, y_exclude_ptr, pair_mask_ptr, N = view[3]
    place = view[2]
    i = rows_of(view)
    j = columns_of(view)
    keep = inside_tile(view)
    if PROGRAM[TRIANGLE]:
        if PROGRAM[AT + MIRRORED]:
            keep = keep & (i < j)
        else:
            keep = keep & (i <= j)
    if PROGRAM[EXCLUDE_SELF]:
        keep = keep & (i != j)
    if PROGRAM[HAS_EXCLUDE]:
        if PROGRAM[AT + MIRRORED]:
            keep = keep & (along_columns(y_exclude_ptr, place) != i)
        else:
            keep = keep & (along_rows(x_exclude_ptr, place) != j)
    if (PROGRAM[AT + MASK] == SAME) or (PROGRAM[AT + MASK] == DIFFERENT):
        same = along_rows(x_labels_ptr, place) == along_columns(y_labels_ptr, place)
        if PROGRAM[AT + MASK] == SAME:
            keep = keep & same
        else:
            keep = keep & (same == 0)
    if (PROGRAM[AT + MASK] == GIVEN) or (PROGRAM[AT + MASK] == NOT_GIVEN):
        if PROGRAM[AT + MIRRORED]:
            offset = j.to(tl.int64) * N + i
        else:
            offset = i.to(tl.int64) * N + j
        given = tl.load(pair_mask_ptr + offset, mask=inside_tile(view), other=0)
        if PROGRAM[AT + MASK] == GIVEN:
            keep = keep & (given != 0)
        else:
            keep = keep & (given == 0)
    return keep
