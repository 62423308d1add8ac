"""Pairs on the wrong side of fixed margins."""

from __future__ import annotations

import torch

from .. import checks
from ..losses.problem import PairProblem
from ..request import statistics_dtype
from ..terms import Mask
from .base import Miner
from .selection import MinedPairs


class PairMarginMiner(Miner):
    """Keeps positives beyond one distance and negatives inside another.

        positive (i, p) kept:  d_ip > pos_margin;      negative (i, n) kept:  d_in < neg_margin

    (with similarities the mirror image; all strict). pytorch-metric-learning's class: same constructor, same call.

    Args:
        pos_margin: default 0.2.
        neg_margin: default 0.8.
        distance: LpDistance of normalised embeddings (default; p=2, power 1 or 2), CosineSimilarity or
            DotProductSimilarity.
        group: ranks whose batches are mined as one, as in `MetricLoss`; the selection is of all of them. Default: none.

    Raises:
        TypeError, ValueError: on a margin that is not a number, or another distance.

    Example:
        >>> import torch
        >>> from flashpair.miners import PairMarginMiner
        >>> mined = PairMarginMiner()(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> [index.tolist() for index in mined.as_tuple()]
        [[0, 1, 2, 3], [1, 0, 3, 2], [], []]
    """

    def __init__(
        self, pos_margin: float = 0.2, neg_margin: float = 0.8, distance=None, collect_stats=None, group=None
    ) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats, group=group)
        checks.number("pos_margin", pos_margin)
        checks.number("neg_margin", neg_margin)
        self.pos_margin = pos_margin
        self.neg_margin = neg_margin

    def select(self, problem: PairProblem) -> MinedPairs:
        far, near = ("below", "above") if problem.geometry.sign > 0 else ("above", "below")
        rows = torch.ones(problem.x.shape[0], dtype=statistics_dtype(problem.x), device=problem.x.device)
        bounds = {Mask.SAME: {far: rows * self.pos_margin}, Mask.DIFFERENT: {near: rows * self.neg_margin}}
        return MinedPairs(
            problem.x, problem.y, problem.labels, problem.ref_labels, problem.geometry, bounds, problem.exclude
        )
