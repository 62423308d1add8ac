"""MagFace: the norm of an embedding is its quality, and the margin grows with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from .head import ClassHead
from .margins import Margin, add_angle


class MagFaceMargin(Margin):
    """An angular margin that grows with the norm a = clip(‖x‖, l_a, u_a), which a regulariser pulls up.

        m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a)      loss += λ (a / u_a² + 1 / a)

    Margin and regulariser have gradients through the norm.

    Args:
        lower_norm, upper_norm: l_a, u_a > 0. Default 10, 110.
        lower_margin, upper_margin: l_m, u_m in radians, [0, π]. Default 0.45, 0.8.
        regularization: λ >= 0. Default 35, of the paper's best run; the optimum lies inside the bounds only from
            s u_a² l_a² (u_m - l_m) / ((u_a² - l_a²) (u_a - l_a)) on.
        scale: s > 0. Default 64.
        easy_margin: the margin only where cos θ > 0 (default), else ArcFace's fallback beyond π.

    Raises:
        TypeError, ValueError: on numbers outside their range.

    Source: Meng et al., "MagFace: A Universal Representation for Face Recognition and Quality Assessment", CVPR 2021,
    equations 2 and 3.
    """

    def __init__(
        self,
        lower_norm: float = 10.0,
        upper_norm: float = 110.0,
        lower_margin: float = 0.45,
        upper_margin: float = 0.8,
        regularization: float = 35.0,
        scale: float = 64.0,
        easy_margin: bool = True,
    ) -> None:
        super().__init__(scale)
        checks.number("lower_norm", lower_norm, low=0.0, open_low=True)
        checks.number("upper_norm", upper_norm, low=lower_norm, open_low=True)
        checks.number("lower_margin", lower_margin, low=0.0, high=math.pi)
        checks.number("upper_margin", upper_margin, low=lower_margin, high=math.pi)
        checks.number("regularization", regularization, low=0.0)
        self.norms, self.margins = (lower_norm, upper_norm), (lower_margin, upper_margin)
        self.regularization, self.easy_margin = regularization, easy_margin

    def forward(self, cosine: Tensor, norms: Tensor, labels: Tensor) -> Tensor:
        (low, high), (smallest, largest) = self.norms, self.margins
        margin = smallest + (largest - smallest) / (high - low) * (norms.clamp(low, high) - low)
        if not self.easy_margin:
            return add_angle(cosine, margin)
        return torch.where(cosine > 0, add_angle(cosine, margin, fallback=False), cosine)

    def regularizer(self, norms: Tensor) -> Tensor:
        a = norms.clamp(*self.norms)
        return self.regularization * (a / self.norms[1] ** 2 + 1 / a)

    def extra_repr(self) -> str:
        return f"norms={self.norms}, margins={self.margins}, regularization={self.regularization}, scale={self.scale}"


class MagFace(ClassHead):
    """A head with `MagFaceMargin`.

    Args:
        num_classes, embedding_size: C, D.
        lower_norm, upper_norm, lower_margin, upper_margin, regularization, scale, easy_margin: see `MagFaceMargin`.
        **options: see `ClassHead`.

    Source: Meng et al., "MagFace: A Universal Representation for Face Recognition and Quality Assessment", CVPR 2021.

    Example:
        >>> import torch
        >>> from flashpair.heads import MagFace
        >>> MagFace(num_classes=10, embedding_size=4)(20 * torch.randn(3, 4), torch.arange(3)).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        lower_norm: float = 10.0,
        upper_norm: float = 110.0,
        lower_margin: float = 0.45,
        upper_margin: float = 0.8,
        regularization: float = 35.0,
        scale: float = 64.0,
        easy_margin: bool = True,
        **options,
    ) -> None:
        rule = MagFaceMargin(lower_norm, upper_norm, lower_margin, upper_margin, regularization, scale, easy_margin)
        super().__init__(num_classes, embedding_size, margin=rule, **options)
