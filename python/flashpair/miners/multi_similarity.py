"""Pairs that are hard relative to the hardest pair of the other kind."""

from __future__ import annotations

import functools

import torch

from .. import checks, dispatch, operands
from ..distributed.sharded import Sharded
from ..losses.peer import CosineSimilarity
from ..losses.problem import PairProblem
from ..terms import Mask
from .base import Miner, closest_negative, farthest_positive, hardest
from .selection import ClosestNegative, MinedPairs

#: From so many pairs on, a CPU leaves the closest negatives to the pass of the loss.
CPU_PAIRS = 1 << 23


class MultiSimilarityMiner(Miner):
    """Keeps positives less similar than the closest negative, and negatives more similar than the farthest positive.

        positive (i, p) kept:  s_ip - epsilon < max_n s_in
        negative (i, n) kept:  s_in + epsilon > min_p s_ip        (with distances: the mirror image; all strict)

    In a large batch max_n is left to the pass of the loss that uses the selection first; until then the embeddings must
    not be written to.

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
        slack = self.epsilon * problem.geometry.sign
        positive, negative = ("below", "above") if problem.geometry.sign > 0 else ("above", "below")
        if _left_to_the_loss(problem):
            limit = farthest_positive(problem) - slack
            look = functools.partial(closest_negative, problem)
            closest = ClosestNegative(look, problem.geometry, problem.exclude, slack)
        else:
            farthest, found = hardest(problem)
            limit, closest = farthest.values[:, 0] - slack, found.values[:, 0] + slack
        bounds = {Mask.SAME: {positive: closest}, Mask.DIFFERENT: {negative: limit}}
        return MinedPairs(
            problem.x, problem.y, problem.labels, problem.ref_labels, problem.geometry, bounds, problem.exclude
        )


def _left_to_the_loss(problem: PairProblem) -> bool:
    """Whether the pass of a loss over the negatives is to find the closest of them.

    Of all pairs that is one pass less, and two more of the pairs of one class: few tiles where kernels sort the rows by
    label, as those of GPUs do where no column is left out.
    """
    x, y = problem.x, problem.y
    if torch.compiler.is_compiling() or isinstance(x, Sharded) or isinstance(y, Sharded):
        return False
    pairs = x.shape[0] * (x if y is None else y).shape[0]
    backend = dispatch.choose(x, pairs)
    if backend == "cpu":
        return pairs >= CPU_PAIRS
    return backend != "reference" and problem.exclude is None and pairs >= operands.ORDERED_PAIRS
