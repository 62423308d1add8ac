"""Extremes as GPU kernels find them: which share a pass, and what an entry says.

An entry is one int64: order-preserving bits of its float32 value above, then its column, counted downwards, and one
bit for NaN, which counts as infinity. So the largest entry is the most extreme value at the lowest column; entries
never tie.
"""

from __future__ import annotations

from .terms import Extreme, Mask

#: No pair was kept.
MISSING = -(2**63)
LAST_COLUMN = 2**31 - 1


def shared_passes(extremes: list[Extreme]) -> list[list[int]]:
    """Positions of the extremes with k = 1 that share a pass: equal labels visit few tiles, but only on their own."""
    singles = [e for e, extreme in enumerate(extremes) if extreme.k == 1]
    alone = [e for e in singles if extremes[e].mask == Mask.SAME]
    return [group for group in (alone, [e for e in singles if e not in alone]) if group]
