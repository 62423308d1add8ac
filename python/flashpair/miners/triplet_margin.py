"""Triplets by how much farther the negative is."""

from __future__ import annotations

from .. import checks
from ..losses.problem import PairProblem
from .base import Miner
from .selection import MinedTripletBand

_TYPES = ("all", "hard", "semihard", "easy")


class TripletMarginMiner(Miner):
    """Keeps triplets by their margin d_an - d_ap (similarities: s_ap - s_an).

        "all": margin <= m;   "hard": <= m and <= 0;   "semihard": in (0, m];   "easy": > m

    pytorch-metric-learning's class: same constructor, same call. Given to `TripletMarginLoss` on the same embeddings
    and distance the triplets are never listed.

    Args:
        margin: m. Default 0.2.
        type_of_triplets: default "all".
        distance: LpDistance of normalised embeddings (default; p=2, power 1 or 2), CosineSimilarity or
            DotProductSimilarity.
        group: ranks whose batches are mined as one, as in `MetricLoss`; the selection is of all of them. Default: none.

    Raises:
        TypeError, ValueError: on a margin that is not a number, an unknown type, or another distance.

    Source: Schroff et al., "FaceNet", CVPR 2015, section 3.2.

    Example:
        >>> import torch
        >>> from flashpair.losses import TripletMarginLoss
        >>> from flashpair.miners import TripletMarginMiner
        >>> embeddings, labels = torch.eye(3), torch.tensor([0, 0, 1])
        >>> mined = TripletMarginMiner()(embeddings, labels)
        >>> round(float(TripletMarginLoss()(embeddings, labels, mined)), 4)
        0.05
        >>> [index.tolist() for index in mined.as_tuple()]
        [[0, 1], [1, 0], [2, 2]]
    """

    def __init__(
        self, margin: float = 0.2, type_of_triplets: str = "all", distance=None, collect_stats=None, group=None
    ) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats, group=group)
        checks.number("margin", margin)
        if type_of_triplets not in _TYPES:
            raise ValueError(f"type_of_triplets must be one of {', '.join(_TYPES)}; got {type_of_triplets!r}")
        self.margin = margin
        self.type_of_triplets = type_of_triplets

    def select(self, problem: PairProblem) -> MinedTripletBand:
        low, high = {
            "all": (None, self.margin),
            "hard": (None, min(self.margin, 0.0)),
            "semihard": (0.0, self.margin),
            "easy": (self.margin, None),
        }[self.type_of_triplets]
        return MinedTripletBand(
            problem.x, problem.y, problem.labels, problem.ref_labels, problem.geometry, low, high, problem.exclude
        )
