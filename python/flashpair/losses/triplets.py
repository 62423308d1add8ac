"""The triplets of one call: given, mined, drawn at random, or all of them without listing any."""

from __future__ import annotations

import torch
from torch import Tensor

from ..label_order import label_order
from ..miners.selection import MinedTriplets, check_indices, listed
from ..random import draw_seed, integers

Triplets = tuple[Tensor, Tensor, Tensor, "Tensor | None"]  # anchors, positives, negatives, which exist (None: all)


def join_pairs(indices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets of positive and negative pairs (a1, p, a2, n) that share their anchor; O(P + T) memory."""
    a1, p, a2, n = indices
    order = a2.argsort(stable=True)
    ordered = a2[order]
    first = torch.searchsorted(ordered, a1)
    count = torch.searchsorted(ordered, a1, right=True) - first
    positive = torch.repeat_interleave(torch.arange(a1.shape[0], device=a1.device), count)
    start = torch.repeat_interleave(count.cumsum(0) - count, count)
    within = torch.arange(positive.shape[0], device=a1.device) - start
    return a1[positive], p[positive], n[order[first[positive] + within]]


def listed_triplets(indices_tuple, x: Tensor, columns: Tensor) -> Triplets:
    """The triplets of an index tuple or of what a miner returned; pairs are joined by their anchors."""
    if isinstance(indices_tuple, MinedTriplets):
        if indices_tuple.positives.shape[0] != x.shape[0]:
            raise ValueError(
                f"indices_tuple must be mined in these {x.shape[0]} rows (in a group: by a miner with that group); "
                f"got triplets of {indices_tuple.positives.shape[0]} rows"
            )
        anchors = torch.arange(indices_tuple.positives.shape[0], device=x.device)
        found = indices_tuple.positives.clamp_min(0), indices_tuple.negatives.clamp_min(0)
        if columns.shape[0] > 0:
            return anchors, *found, indices_tuple.valid
        return anchors[:0], found[0][:0], found[1][:0], None
    indices_tuple = listed(indices_tuple)
    check_indices(indices_tuple, x.shape[0], columns.shape[0], x.device)
    return (*(join_pairs(indices_tuple) if len(indices_tuple) == 4 else indices_tuple), None)


def check_triplets_per_anchor(value) -> None:
    """ "all", or a positive integer.

    Raises:
        ValueError: otherwise.
    """
    if value != "all" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f'triplets_per_anchor must be "all" or a positive integer; got {value!r}')


def random_triplets(
    labels: Tensor, ref_labels: Tensor | None, exclude: Tensor | None, per_anchor: int, seed: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(anchors, positives, negatives): `per_anchor` of each anchor that has both, uniformly and with replacement.

    A function of the seed alone (default: one from torch's generator), whatever the device. O((B + N) log N).
    """
    own = torch.arange(labels.shape[0], device=labels.device)
    found = label_order(labels, ref_labels, own if ref_labels is None else exclude)
    order, start, count, position, inside = *found, found.own_inside
    positives, negatives = count - inside.long(), order.shape[0] - count
    (anchors,) = ((positives > 0) & (negatives > 0)).nonzero(as_tuple=True)
    seed = draw_seed() if seed is None else seed
    a = anchors.repeat_interleave(per_anchor)
    draw = torch.arange(per_anchor, device=labels.device).repeat(anchors.shape[0])
    p = start[a] + integers(seed, a, 2 * draw, positives[a])
    p = p + (inside[a] & (p >= position[a])).long()  # step over the excluded column
    n = integers(seed, a, 2 * draw + 1, negatives[a])
    n = torch.where(n < start[a], n, n + count[a])  # step over the own class
    return a, order[p], order[n]
