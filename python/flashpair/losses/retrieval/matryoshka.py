"""Matryoshka: one loss of every prefix of the features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks


class MatryoshkaLoss(nn.Module):
    """`Σ_m w_m loss(first m features)`, for any loss of this package: it is called as that loss is.

    Every tensor (B, D) of floating point among the arguments, or in a list among them, is cut to its first m features;
    with `normalize` the cut rows are unit vectors. Each prefix is a pass of its own, D_1 + D_2 + ... features in all.

    Args:
        loss: the loss.
        matryoshka_dims: numbers of features, the largest of which the embeddings have.
        matryoshka_weights: w, one a prefix. Default: 1 each.
        normalize: of the cut rows. Default True.

    Raises:
        TypeError, ValueError: on dimensions or weights that do not fit.

    Source: Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022, equation 1; sentence-transformers,
    matryoshka.py.

    Example:
        >>> import torch
        >>> from flashpair.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
        >>> loss = MatryoshkaLoss(MultipleNegativesRankingLoss(), matryoshka_dims=[16, 4])
        >>> bool(loss([torch.randn(8, 16), torch.randn(8, 16)]) > 0)
        True
    """

    def __init__(
        self,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        dims = list(matryoshka_dims)
        weights = [1.0] * len(dims) if matryoshka_weights is None else list(matryoshka_weights)
        if not dims or len(weights) != len(dims):
            raise ValueError(
                f"matryoshka_dims must be one or more and matryoshka_weights as many; got {dims} and {weights}"
            )
        for k, (m, w) in enumerate(zip(dims, weights, strict=True)):
            checks.count(f"matryoshka_dims[{k}]", m)
            checks.number(f"matryoshka_weights[{k}]", w)
        order = sorted(range(len(dims)), key=lambda k: -dims[k])
        self.loss, self.normalize = loss, normalize
        self.matryoshka_dims = [dims[k] for k in order]
        self.matryoshka_weights = [weights[k] for k in order]
        if any(a == b for a, b in pairwise(self.matryoshka_dims)):
            raise ValueError(f"matryoshka_dims must differ; got {dims}")

    def forward(self, *args, **kwargs) -> Tensor:
        """The weighted sum of the losses of the prefixes; arguments as the loss takes them."""
        total: Tensor | None = None
        for m, weight in zip(self.matryoshka_dims, self.matryoshka_weights, strict=True):
            cut = [self._cut(v, m) for v in args], {k: self._cut(v, m) for k, v in kwargs.items()}
            value = weight * self.loss(*cut[0], **cut[1])
            total = value if total is None else total + value
        return total

    def _cut(self, value, features: int):
        if isinstance(value, (list, tuple)):
            return type(value)(self._cut(v, features) for v in value)
        if not isinstance(value, Tensor) or value.dim() != 2 or not value.is_floating_point():
            return value
        if value.shape[1] < self.matryoshka_dims[0]:
            raise ValueError(
                f"embeddings must have at least {self.matryoshka_dims[0]} features; got {tuple(value.shape)}"
            )
        return F.normalize(value[:, :features], dim=1) if self.normalize else value[:, :features]
