"""Exact order statistics over all pairs, of which none is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from .primitives import pair_reduce
from .request import statistics_dtype
from .terms import Mask, Reduction, Score, Term

#: Thresholds of one counting pass per rank sought; each divides the interval into one part more.
_THRESHOLDS = 15


def _key(value: Tensor) -> Tensor:
    """Floats → int64 in the same order."""
    bits = value.view(torch.int32 if value.dtype == torch.float32 else torch.int64).long()
    return _turned(bits, value.dtype)


def _value(key: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `_key`."""
    bits = _turned(key, dtype)
    return bits.to(torch.int32).view(dtype) if dtype == torch.float32 else bits.view(dtype)


def _turned(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Negative floats count backwards in their bits."""
    return torch.where(bits < 0, bits ^ (0x7FFFFFFF if dtype == torch.float32 else 0x7FFFFFFFFFFFFFFF), bits)


def count_pairs(x: Tensor, y: Tensor | None, mask: Mask, thresholds: list[Tensor | None], **how) -> Tensor:
    """(thresholds,) float64, how many pairs under the mask have a similarity above each; None: how many there are."""
    ones = {"scale": 0.0, "offset": 1.0, "mask": mask}
    terms = [Term(Reduction.COUNT, Score.IDENTITY, above=t, **ones) for t in thresholds]
    found = pair_reduce(x, y, terms, **how)
    return torch.stack([rows.sum(dtype=torch.float64) for rows in found])


def order_statistics(x: Tensor, y: Tensor | None, mask: Mask, ranks: Tensor, bound: float, **how) -> Tensor:
    """The similarities of the given ranks among all pairs under a mask, smallest first; exact.

    Counting passes narrow an interval of floats sixteenfold each (8 in float32, 17 in float64) until one is left.
    Nothing waits for the device.

    Args:
        x: (B, D). y: (N, D) or None.
        mask: which pairs.
        ranks: (n,) float64, from 0.
        bound: beyond every similarity's absolute value.
        **how: labels, ref_labels, exclude, similarity, normalize of `pair_reduce`.

    Returns:
        (n,) without gradient; arbitrary where there are not so many pairs.
    """
    dtype, device = statistics_dtype(x), x.device
    total = count_pairs(x, y, mask, [None], **how)[0]
    wanted = ranks + 1
    ends = (torch.full((len(ranks),), end, dtype=dtype, device=device) for end in (-bound, bound))
    low, high = (_key(end) for end in ends)
    steps = torch.arange(1, _THRESHOLDS + 1, device=device)
    for _ in range(8 if dtype == torch.float32 else 17):
        width, half = (high - low)[:, None], ((high >> 1) - (low >> 1))[:, None]
        parts = _THRESHOLDS + 1
        near = width // parts * steps + width % parts * steps // parts
        # The floats of both signs are more than an int64 counts: then in steps of two.
        keys = low[:, None] + torch.where(half >= 1 << 61, half // parts * 2 * steps, near)  # (n, thresholds)
        above = count_pairs(x, y, mask, list(_value(keys, dtype).flatten().unbind(0)), **how).view(keys.shape)
        enough = total - above >= wanted[:, None]  # at least so many similarities are <= the threshold
        first = torch.where(enough.any(1), enough.to(torch.int8).argmax(1), _THRESHOLDS)
        edges = torch.cat([low[:, None], keys, high[:, None]], dim=1)
        low, high = edges.gather(1, first[:, None])[:, 0], edges.gather(1, first[:, None] + 1)[:, 0]
    return _value(high, dtype) + 0.0  # -0.0 and 0.0 compare equal
