"""P2SGrad: the squared error of all cosines."""

from __future__ import annotations

from torch import Tensor

from .formula import Formula
from .head import ClassHead
from .logits import ClassLogits


class CosineSquaredError(Formula):
    """1/C Σ_j (cos θ_ij - [j = y_i])², for logits that are cosines."""

    extras = ("squares",)

    def forward(self, logits: ClassLogits) -> Tensor:
        return (logits.extras["squares"] + (logits.logit - 1) ** 2) / logits.classes


class P2SGrad(ClassHead):
    """Mean over rows and classes of (cos θ_ij - [j = y_i])²: no scale, no margin.

    Args:
        num_classes, embedding_size: C, D.
        **options: see `ClassHead`.

    Source: Zhang et al., "P2SGrad: Refined Gradients for Optimizing Deep Face Models", CVPR 2019; as a loss: Wang,
    Yamagishi, "A Comparative Study on Recent Neural Spoofing Countermeasures for Synthetic Speech Detection", 2021,
    equation 5; pytorch-metric-learning's P2SGradLoss.

    Example:
        >>> import torch
        >>> from flashpair.heads import P2SGrad
        >>> P2SGrad(num_classes=10, embedding_size=4)(torch.randn(3, 4), torch.arange(3)).shape
        torch.Size([])
    """

    def __init__(self, num_classes: int, embedding_size: int, **options) -> None:
        super().__init__(num_classes, embedding_size, normalize=True, formula=CosineSquaredError(), **options)
