"""Triplets with a wide angle at the negative."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..losses.geometry import require
from ..losses.peer import LpDistance
from ..losses.positive_pairs import positive_pairs
from ..losses.problem import PairProblem
from ..reference import normalized
from .base import Miner

_BLOCK_ELEMENTS = 1 << 20  # pairs × columns at a time


class AngularMiner(Miner):
    """Keeps triplets whose angle at the negative, as in the angular loss, is wide.

        atan( ‖a - p‖ / (2 ‖n - (a + p) / 2‖) ) > angle

    of unit vectors; pytorch-metric-learning's takes the embeddings as they are. Same constructor, same call. O(T)
    memory for T kept triplets.

    Args:
        angle: degrees. Default 20.
        distance: LpDistance of normalised embeddings, power 1.
        group: ranks whose batches are mined as one, as in `MetricLoss`; the selection is of all of them. Default: none.

    Returns:
        Index tensors (anchors, positives, negatives) in ascending order.

    Raises:
        TypeError, ValueError: on a bad angle or another distance.

    Source: Wang et al., "Deep Metric Learning with Angular Loss", ICCV 2017, equation 6.

    Example:
        >>> import torch
        >>> from flashpair.miners import AngularMiner
        >>> [index.tolist() for index in AngularMiner()(torch.eye(3), torch.tensor([0, 0, 1]))]
        [[0, 1], [1, 0], [2, 2]]
    """

    def __init__(self, angle: float = 20, distance=None, collect_stats=None, group=None) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats, group=group)
        checks.number("angle", angle, low=0.0, high=90.0)
        require(self.distance, "AngularMiner", (LpDistance,), normalized=True, powers=(1,))
        self.angle = angle

    def select(self, problem: PairProblem) -> tuple[Tensor, Tensor, Tensor]:
        x = normalized(problem.x)
        y = x if problem.y is None else normalized(problem.y)
        labels = problem.labels if problem.ref_labels is None else problem.ref_labels
        tangent = math.tan(math.radians(self.angle))
        found = [(torch.empty(0, dtype=torch.long, device=x.device),) * 3]
        step = max(_BLOCK_ELEMENTS // max(y.shape[0], 1), 1)
        for rows, columns in positive_pairs(problem, step, once=False):
            center = (x[rows] + y[columns]) / 2
            near = (x[rows] - y[columns]).norm(dim=1, keepdim=True)
            keep = (near > 2 * tangent * torch.cdist(center, y)) & (problem.labels[rows, None] != labels[None, :])
            if problem.exclude is not None:
                keep &= problem.exclude[rows, None] != torch.arange(y.shape[0], device=y.device)[None, :]
            pair, negative = keep.nonzero(as_tuple=True)
            found.append((rows[pair], columns[pair], negative))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
