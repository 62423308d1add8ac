"""Embeddings that come as triplets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.peer import BaseMiner


class EmbeddingsAlreadyPackagedAsTriplets(BaseMiner):
    """Rows 0, 1, 2 are anchor, positive and negative; so are rows 3, 4, 5; and so on.

    pytorch-metric-learning's class: same call.

    Raises:
        ValueError: if the number of rows is no multiple of three.

    Example:
        >>> import torch
        >>> from flashpair.miners import EmbeddingsAlreadyPackagedAsTriplets
        >>> mined = EmbeddingsAlreadyPackagedAsTriplets()(torch.eye(6), torch.arange(6))
        >>> [index.tolist() for index in mined]
        [[0, 3], [1, 4], [2, 5]]
    """

    def forward(self, embeddings: Tensor, labels: Tensor, ref_emb=None, ref_labels=None):
        """(anchors, positives, negatives) of the rows of `embeddings` (3 T, D)."""
        rows = embeddings.shape[0]
        if rows % 3:
            raise ValueError(f"embeddings must have a multiple of 3 rows; got {rows}")
        first = torch.arange(0, rows, 3, device=embeddings.device)
        return first, first + 1, first + 2
