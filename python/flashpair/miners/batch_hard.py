"""The hardest triplet of each row."""

from __future__ import annotations

from ..losses.problem import PairProblem
from .base import Miner, hardest
from .selection import MinedTriplets


class BatchHardMiner(Miner):
    """Pairs each row with its farthest positive and its closest negative; rows that lack one give no triplet.

        p_i = argmax_p d(i, p),   n_i = argmin_n d(i, n)        (ties: lowest column)

    Args:
        distance: LpDistance of normalised embeddings (default; p=2, power 1 or 2), CosineSimilarity or
            DotProductSimilarity.

    Raises:
        ValueError: on another distance.

    Source: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification", 2017, equation 5.

    Example:
        >>> import torch
        >>> from flashpair.losses import LpDistance
        >>> from flashpair.miners import BatchHardMiner
        >>> embeddings, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1])
        >>> mined = BatchHardMiner(distance=LpDistance(normalize_embeddings=False))(embeddings, labels)
        >>> [index.tolist() for index in mined.as_tuple()]
        [[0, 1], [1, 0], [2, 2]]
    """

    def select(self, problem: PairProblem) -> MinedTriplets:
        positive, negative = hardest(problem)
        return MinedTriplets(positive.indices[:, 0], negative.indices[:, 0])
