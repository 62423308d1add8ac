"""Weights of rows from what a miner found, for losses that have no use for its pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..miners.selection import MinedPairs, check_indices, listed


def row_weights(
    indices_tuple, labels: Tensor, dtype: torch.dtype, anchors_only: bool = False, columns: int | None = None
) -> Tensor | None:
    """(B,) how often a row was mined over how often the most frequent one was; None without a miner.

    Args:
        indices_tuple: what a miner returned, or index tensors (3 or 4), or None.
        labels: (B,)
        anchors_only: count rows as anchors only.
        columns: number of reference rows, where there are any.
    """
    if indices_tuple is None or (isinstance(indices_tuple, MinedPairs) and not indices_tuple.bounds):
        return None  # all pairs: every row as often as the others
    indices_tuple = listed(indices_tuple)
    rows = labels.shape[0]
    check_indices(indices_tuple, rows, rows if columns is None else columns, labels.device)
    if anchors_only:
        indices_tuple = [t for k, t in enumerate(indices_tuple) if k == 0 or (len(indices_tuple) == 4 and k == 2)]
    indices = torch.cat(list(indices_tuple))
    if indices.numel() == 0:
        return None
    ones = torch.ones_like(indices, dtype=dtype)
    counts = torch.zeros(rows, dtype=dtype, device=labels.device).index_add_(0, indices, ones)
    return counts / counts.max()
