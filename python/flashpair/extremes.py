"""Extremes as GPU kernels find them: which share a pass, and what an entry says.

An entry is one int64: order-preserving bits of its float32 value above, then its column, counted downwards, and one
bit for NaN, which counts as infinity. So the largest entry is the most extreme value at the lowest column; entries
never tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import Operands
from .terms import Extreme, Mask

#: No pair was kept.
MISSING = -(2**63)
LAST_COLUMN = 2**31 - 1


def shared_passes(extremes: list[Extreme]) -> list[list[int]]:
    """Positions of the extremes with k = 1 that share a pass: equal labels visit few tiles, but only on their own."""
    singles = [e for e, extreme in enumerate(extremes) if extreme.k == 1]
    alone = [e for e in singles if extremes[e].mask == Mask.SAME]
    return [group for group in (alone, [e for e in singles if e not in alone]) if group]


def decoded(entries: Tensor, largest: bool, squares: bool, op: Operands) -> tuple[Tensor, Tensor]:
    """int64 entries (B, k), of the squares of what is asked for or of itself → values float32 and columns int64, -1
    where missing, in the caller's order."""
    missing = entries == MISSING
    ordered = (entries >> 32).to(torch.int32)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    values = bits.view(torch.float32)
    values = values if largest else -values
    values = torch.where((entries & 1) == 1, torch.nan, values.sqrt() if squares else values)
    values = torch.where(missing, -torch.inf if largest else torch.inf, values)
    indices = torch.where(missing, -1, LAST_COLUMN - ((entries >> 1) & LAST_COLUMN))
    return op.restore(values, 0, 0), op.restore(indices, 0, 0)
