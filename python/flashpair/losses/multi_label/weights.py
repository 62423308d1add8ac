"""How positive two label sets are, from how many labels they share and have."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

#: (labels shared (b, N), size of the rows' sets (b, 1), size of the columns' sets (1, N)) → weights (b, N), 0 where
#: nothing is shared.
OverlapWeight = Callable[[Tensor, Tensor, Tensor], Tensor]


class LabelWeight(Enum):
    """Which pairs are positive, and how much; s, a, b: labels shared, of the anchor, of the other."""

    ALL = "all"  # 1 for equal sets
    ANY = "any"  # 1 where anything is shared
    JACCARD = "jaccard"  # s / (a + b - s)
    SIMILARITY_DISSIMILARITY = "similarity_dissimilarity"  # s / a / (1 + b - s)


def overlap_weight(kind: LabelWeight) -> OverlapWeight:
    """The function behind a `LabelWeight`."""
    return {
        LabelWeight.ALL: lambda s, a, b: ((s == a) & (s == b) & (s > 0)).to(s.dtype),
        LabelWeight.ANY: lambda s, a, b: (s > 0).to(s.dtype),
        LabelWeight.JACCARD: lambda s, a, b: s / (a + b - s).clamp_min(1),
        LabelWeight.SIMILARITY_DISSIMILARITY: lambda s, a, b: s / a.clamp_min(1) / (1 + b - s),
    }[kind]


def subset_share(power: float) -> OverlapWeight:
    """(s / b)^power; for a negative power, 1 where the other's labels are all the anchor's."""
    if power < 0:
        return lambda s, a, b: ((s == b) & (s > 0)).to(s.dtype)
    if power == 0:
        return lambda s, a, b: (s > 0).to(s.dtype)
    return lambda s, a, b: torch.where(s > 0, s / b.clamp_min(1), 0.0) ** power


def union_share(factor: float) -> OverlapWeight:
    """factor / (labels of both together), where one is shared."""
    return lambda s, a, b: torch.where(s > 0, factor / (a + b - s).clamp_min(1), 0.0)
