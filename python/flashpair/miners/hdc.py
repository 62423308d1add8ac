"""The hardest share of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..losses.problem import PairProblem
from ..order_statistics import count_pairs, order_statistics
from ..request import statistics_dtype
from ..terms import Mask
from .base import Miner, loosened
from .selection import MinedPairs


class HDCMiner(Miner):
    """Keeps the hardest share of all positive pairs, and of all negative pairs, of the batch.

        positives: the ceil(share × number) farthest;      negatives: the ceil(share × number) closest

    Lazy and exact: the threshold is found by counting passes (8 in float32), nothing is sorted. Pairs that tie with the
    last one, up to rounding, are kept too; the peer chooses among them by index. pytorch-metric-learning's class:
    same constructor, same call.

    Args:
        filter_percentage: the share, in (0, 1]. Default 0.5.
        distance: LpDistance of normalised embeddings (default; p=2, power 1 or 2), CosineSimilarity or
            DotProductSimilarity.
        group: ranks whose batches are mined as one, as in `MetricLoss`; the selection is of all of them. Default: none.

    Raises:
        TypeError, ValueError: on a share out of range or another distance.

    Source: Yuan, Yang, Zhang, "Hard-Aware Deeply Cascaded Embedding", ICCV 2017, section 3.2.

    Example:
        >>> import torch
        >>> from flashpair.losses import LpDistance
        >>> from flashpair.miners import HDCMiner
        >>> embeddings, labels = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1, 1])
        >>> mined = HDCMiner(distance=LpDistance(normalize_embeddings=False))(embeddings, labels)
        >>> [index.tolist() for index in mined.as_tuple()]
        [[2, 3], [3, 2], [0, 1, 2, 2], [2, 2, 1, 0]]
    """

    def __init__(self, filter_percentage: float = 0.5, distance=None, collect_stats=None, group=None) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats, group=group)
        checks.number("filter_percentage", filter_percentage, low=0.0, high=1.0, open_low=True)
        self.filter_percentage = filter_percentage

    def select(self, problem: PairProblem) -> MinedPairs:
        rows = torch.ones(problem.x.shape[0], dtype=statistics_dtype(problem.x), device=problem.x.device)
        bounds = {}
        for mask in (Mask.SAME, Mask.DIFFERENT):
            largest = (mask == Mask.SAME) == (problem.geometry.sign < 0)  # far positives, near negatives
            bounds[mask] = self._bound(problem, mask, largest, rows)
        return MinedPairs(
            problem.x, problem.y, problem.labels, problem.ref_labels, problem.geometry, bounds, problem.exclude
        )

    def _bound(self, problem: PairProblem, mask: Mask, largest: bool, rows: Tensor) -> dict[str, Tensor]:
        geometry = problem.geometry
        how = {
            "labels": problem.labels, "ref_labels": problem.ref_labels, "exclude": problem.exclude,
            "similarity": geometry.similarity, "normalize": geometry.normalize,
        }  # fmt: skip
        count = count_pairs(problem.x, problem.y, mask, [None], **how)
        keep = (self.filter_percentage * count).ceil()
        rank = (count - keep) if largest else (keep - 1)
        limit = order_statistics(problem.x, problem.y, mask, rank.clamp_min(0), torch.finfo(rows.dtype).max, **how)[0]
        return {"above" if largest else "below": rows * loosened(problem, limit, -1.0 if largest else 1.0)}
