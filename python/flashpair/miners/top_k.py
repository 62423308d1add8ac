"""The k hardest negatives of each row."""

from __future__ import annotations

from .. import checks
from ..losses.problem import PairProblem
from ..primitives import mine
from ..terms import Extreme, Mask
from .base import Miner, loosened
from .selection import MinedPairs


class TopKHardNegativesMiner(Miner):
    """Keeps all positives, and the k closest negatives of each row.

    Lazy: the k-th closest negative's value becomes the row's threshold, so negatives that tie with it, up to
    rounding, are kept too.

    Args:
        k: 1 to 64. Default 8.
        distance: LpDistance of normalised embeddings (default; p=2, power 1 or 2), CosineSimilarity or
            DotProductSimilarity.
        group: ranks whose batches are mined as one, as in `MetricLoss`; the selection is of all of them. Default: none.

    Raises:
        ValueError: on a bad k or another distance.

    Example:
        >>> import torch
        >>> from flashpair.losses import LpDistance
        >>> from flashpair.miners import TopKHardNegativesMiner
        >>> embeddings, labels = torch.tensor([[0.0], [1.0], [3.0], [9.0]]), torch.tensor([0, 0, 1, 1])
        >>> mined = TopKHardNegativesMiner(k=1, distance=LpDistance(normalize_embeddings=False))(embeddings, labels)
        >>> [index.tolist() for index in mined.as_tuple()[2:]]
        [[0, 1, 2, 3], [2, 2, 1, 1]]
    """

    def __init__(self, k: int = 8, distance=None, collect_stats=None, group=None) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats, group=group)
        checks.count("k", k, high=checks.MAX_K)
        self.k = k

    def select(self, problem: PairProblem) -> MinedPairs:
        closer_is_larger = problem.geometry.sign > 0
        (found,) = mine(
            problem.x, problem.y, [Extreme(Mask.DIFFERENT, largest=closer_is_larger, k=self.k)],
            labels=problem.labels, ref_labels=problem.ref_labels, exclude=problem.exclude,
            similarity=problem.geometry.similarity, normalize=problem.geometry.normalize,
        )  # fmt: skip
        # A row with fewer than k negatives has an infinite one for its last: no threshold.
        limit = loosened(problem, found.values[:, -1], -1.0 if closer_is_larger else 1.0)
        bounds = {Mask.SAME: {}, Mask.DIFFERENT: {"above" if closer_is_larger else "below": limit}}
        return MinedPairs(
            problem.x, problem.y, problem.labels, problem.ref_labels, problem.geometry, bounds, problem.exclude
        )
