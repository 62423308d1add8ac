"""Pairs that are hard relative to the hardest pair of the other kind."""

from __future__ import annotations

from .. import checks
from ..losses.peer import CosineSimilarity
from ..losses.problem import PairProblem
from ..terms import Mask
from .base import Miner, hardest
from .selection import MinedPairs


class MultiSimilarityMiner(Miner):
    """Keeps positives less similar than the closest negative, and negatives more similar than the farthest positive.

        positive (i, p) kept:  s_ip - epsilon < max_n s_in
        negative (i, n) kept:  s_in + epsilon > min_p s_ip        (with distances: the mirror image; all strict)

    Args:
        epsilon: slack. Default 0.1.
        distance: CosineSimilarity (default), DotProductSimilarity or LpDistance (p=2, power 1 or 2).
        group: ranks whose batches are mined as one, as in `MetricLoss`; the selection is of all of them. Default: none.

    Raises:
        TypeError, ValueError: on a bad epsilon or distance.

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019, equations 11 and 12.

    Example:
        >>> import torch
        >>> from flashpair.losses import MultiSimilarityLoss
        >>> from flashpair.miners import MultiSimilarityMiner
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> mined = MultiSimilarityMiner()(embeddings, labels)
        >>> loss = MultiSimilarityLoss()(embeddings, labels, mined)
        >>> mined.as_tuple()[0].tolist()
        [0, 1, 2, 3]
    """

    def __init__(self, epsilon: float = 0.1, distance=None, collect_stats=None, group=None) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats, group=group)
        checks.number("epsilon", epsilon)
        self.epsilon = epsilon

    def get_default_distance(self):
        return CosineSimilarity()

    def select(self, problem: PairProblem) -> MinedPairs:
        farthest_positive, closest_negative = hardest(problem)
        slack = self.epsilon * problem.geometry.sign
        positive, negative = ("below", "above") if problem.geometry.sign > 0 else ("above", "below")
        bounds = {
            Mask.SAME: {positive: closest_negative.values[:, 0] + slack},
            Mask.DIFFERENT: {negative: farthest_positive.values[:, 0] - slack},
        }
        return MinedPairs(
            problem.x, problem.y, problem.labels, problem.ref_labels, problem.geometry, bounds, problem.exclude
        )
