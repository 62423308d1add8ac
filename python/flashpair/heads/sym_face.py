"""SymFace's symmetry loss: the two halves of a frontal face should have one embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .logits import check_reduction, reduce_rows

DISTANCES = ("cosine", "squared_euclidean", "euclidean")


def symmetry_loss(
    left: Tensor,
    right: Tensor,
    symmetric: Tensor | None = None,
    *,
    distance: str = "cosine",
    reduction: str = "mean",
) -> Tensor:
    """Mean distance between the embeddings of the two halves of the faces that are frontal; added to a head's loss.

        L = L_face + 1/|F| Σ_{i in F} d(l_i, r_i),     F: rows with `symmetric`

    A row-aligned term of O(B D). Which distance the paper takes, its threshold on frontness and its normaliser were not
    at hand: UNVERIFIED, hence the options; the sum with weight 1 is the paper's.

    Args:
        left, right: (B, D) embeddings of the two halves.
        symmetric: (B,) bool, rows that count. Default: all.
        distance: "cosine" (1 - cos, default), "squared_euclidean" or "euclidean", the latter two of normalised rows.
        reduction: "mean" (0 without any row), "sum" or "none".

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Prasad et al., "SymFace: Additional Facial Symmetry Loss for Deep Face Recognition", 2024 (abstract).

    Example:
        >>> import torch
        >>> from flashpair.heads import symmetry_loss
        >>> float(symmetry_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])))
        1.0
    """
    checks.embedding_pair(left, right, ("left", "right"))
    if left.shape[0] != right.shape[0]:
        raise ValueError(f"left and right must have equal numbers of rows; got {left.shape[0]} and {right.shape[0]}")
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(map(repr, DISTANCES))}; got {distance!r}")
    check_reduction(reduction)
    if symmetric is None:
        symmetric = torch.ones(left.shape[0], dtype=torch.bool, device=left.device)
    elif symmetric.dtype != torch.bool or tuple(symmetric.shape) != (left.shape[0],):
        got = f"{symmetric.dtype} {tuple(symmetric.shape)}"
        raise ValueError(f"symmetric must be bool of shape ({left.shape[0]},); got {got}")
    wide = torch.promote_types(left.dtype, torch.float32)
    a, b = (F.normalize(t.to(wide), dim=1) for t in (left, right))
    if distance == "cosine":
        gaps = 1 - (a * b).sum(1)
    else:
        gaps = ((a - b) ** 2).sum(1)
        if distance == "euclidean":
            equal = gaps == 0
            gaps = torch.where(equal, 0.0, torch.where(equal, 1.0, gaps).sqrt())
    return reduce_rows(gaps, symmetric, reduction)
