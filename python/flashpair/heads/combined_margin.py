"""ArcFace, CosFace and SphereFace as one margin, cos(m1 θ + m2) - m3, and the heads of these names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import checks
from ..request import statistics_dtype
from ..terms import Reduction, Term
from .head import ClassHead
from .logits import ClassLogits
from .margins import Margin, add_angle, check_margin_grad, multiply_angle, norms_of, passed


class CombinedMargin(Margin):
    """The cosine of the own class becomes cos(m1 θ + m2) - m3.

    m1 = 1 is exact arithmetic on cosines, with ArcFace's fallback cos θ - m2 sin m2 where θ + m2 > π; other m1 continue
    beyond π as SphereFace does, falling. insightface's `CombinedMarginLoss` takes (s, m1, m2, m3, threshold) in this
    order, allows (1, m2, 0) and (1, 0, m3) only, has no fallback, and passes the gradient straight through.

    Args:
        scale: s > 0. Default 64.
        m1: factor >= 1 of the angle. Default 1.
        m2: radians in [0, π) that are added. Default 0.5.
        m3: in [0, 2), subtracted from the cosine. Default 0.
        interclass_filtering_threshold: cosines with other classes above it become 0 (and still count e^0), as in
            insightface. Default 0: none.
        margin_grad: "exact" or "straight_through", see `add_angle`.

    Raises:
        TypeError, ValueError: on a number outside its range.

    Source: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.heads import CombinedMargin, class_loss
        >>> x, weight = torch.eye(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> round(float(class_loss(x, weight, torch.tensor([0, 1]), margin=CombinedMargin(8.0, m2=0.5))), 4)
        0.3169
    """

    def __init__(
        self,
        scale: float | Tensor = 64.0,
        m1: float = 1.0,
        m2: float = 0.5,
        m3: float = 0.0,
        interclass_filtering_threshold: float = 0.0,
        margin_grad: str = "exact",
    ) -> None:
        super().__init__(scale)
        checks.number("m1", m1, low=1.0)
        checks.number("m2", m2, low=0.0, high=math.pi)
        checks.number("m3", m3, low=0.0, high=2.0)
        checks.number("interclass_filtering_threshold", interclass_filtering_threshold, low=0.0, high=1.0)
        check_margin_grad(margin_grad)
        self.m1, self.m2, self.m3, self.margin_grad = m1, m2, m3, margin_grad
        self.interclass_filtering_threshold = interclass_filtering_threshold

    def forward(self, cosine: Tensor, norms: Tensor, labels: Tensor) -> Tensor:
        if self.m1 != 1.0:
            moved = multiply_angle(cosine, self.m1, self.m2)
        else:
            moved = add_angle(cosine, self.m2) if self.m2 else cosine
        return passed(cosine, moved - self.m3, self.margin_grad)

    def logits(self, x: Tensor, weight: Tensor, labels: Tensor, **options) -> ClassLogits:
        threshold = self.interclass_filtering_threshold
        if threshold == 0:
            return super().logits(x, weight, labels, **options)
        shift = self.scale.detach() if isinstance(self.scale, Tensor) else self.scale
        bound = torch.full((), threshold, dtype=statistics_dtype(x), device=x.device)
        kept = Term(
            Reduction.LOGSUMEXP, scale=self.scale, offset=-shift,
            below=torch.nextafter(bound, torch.full_like(bound, torch.inf)),
        )  # fmt: skip
        filtered = Term(Reduction.LOGSUMEXP, scale=0.0, offset=-shift, above=bound)
        return super().logits(x, weight, labels, rivals=[kept, filtered], **options)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, m1={self.m1}, m2={self.m2}, m3={self.m3}, margin_grad={self.margin_grad!r}"


class ArcFace(ClassHead):
    """Additive angular margin: cross-entropy of s cos(θ_y + m) against s cos θ_j; see `CombinedMargin`.

    Args:
        num_classes, embedding_size: C, D.
        margin: m in radians, [0, π]. Default 0.5.
        scale: s > 0. Default 64.
        margin_grad: "exact" or "straight_through", as insightface's.
        **options: see `ClassHead`.

    Source: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, equation 3.

    Example:
        >>> import torch
        >>> from flashpair.heads import ArcFace
        >>> head = ArcFace(num_classes=1000, embedding_size=16)
        >>> head(torch.randn(8, 16), torch.arange(8)).backward()
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        scale: float | Tensor = 64.0,
        margin_grad: str = "exact",
        **options,
    ) -> None:
        rule = CombinedMargin(scale, m2=margin, margin_grad=margin_grad)
        super().__init__(num_classes, embedding_size, margin=rule, **options)


class CosFace(ClassHead):
    """Additive cosine margin: cross-entropy of s (cos θ_y - m) against s cos θ_j.

    Args:
        num_classes, embedding_size: C, D.
        margin: m in [0, 2]. Default 0.4 (the paper's 0.35 is pytorch-metric-learning's default).
        scale: s > 0. Default 64.
        **options: see `ClassHead`.

    Source: Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.heads import CosFace
        >>> CosFace(num_classes=10, embedding_size=4)(torch.randn(3, 4), torch.arange(3)).shape
        torch.Size([])
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.4, scale: float | Tensor = 64.0, **options
    ) -> None:
        super().__init__(num_classes, embedding_size, margin=CombinedMargin(scale, m2=0.0, m3=margin), **options)


class NormFace(ClassHead):
    """Softmax over cosines with a learned scale.

    Args:
        num_classes, embedding_size: C, D.
        scale: initial s > 0 of a learned parameter. Default 10.
        **options: see `ClassHead`.

    Source: Wang et al., "NormFace: L2 Hypersphere Embedding for Face Verification", ACM MM 2017, section 3.

    Example:
        >>> from flashpair.heads import NormFace
        >>> float(NormFace(num_classes=10, embedding_size=4).scale)
        10.0
    """

    def __init__(self, num_classes: int, embedding_size: int, scale: float = 10.0, **options) -> None:
        checks.number("scale", scale, low=0.0, open_low=True)
        super().__init__(num_classes, embedding_size, normalize=True, **options)
        self.scale = nn.Parameter(torch.tensor(scale, dtype=self.weight.dtype, device=self.weight.device))


class SphereFaceMargin(CombinedMargin):
    """The angle of the own class times m, continued beyond π; logits are scale ‖x_i‖ times the cosines.

    Args:
        m: factor >= 1. Default 4.
        scale: of the norms. Default 1.

    Source: Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", CVPR 2017, equation 7.
    """

    def __init__(self, m: float = 4.0, scale: float = 1.0) -> None:
        super().__init__(scale, m1=m, m2=0.0)

    def row_scale(self, x: Tensor) -> Tensor:
        return self.scale * norms_of(x)


class SphereFace(ClassHead):
    """Multiplicative angular margin: ‖x‖ ψ(θ_y) against ‖x‖ cos θ_j, ψ(θ) = (-1)^k cos(m θ) - 2k.

    Args:
        num_classes, embedding_size: C, D.
        margin: m >= 1. Default 4.
        scale: factor of the norms. Default 1.
        **options: see `ClassHead`.

    Source: Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", CVPR 2017, equation 7; without
    its annealing against the plain softmax, as in pytorch-metric-learning.

    Example:
        >>> import torch
        >>> from flashpair.heads import SphereFace
        >>> SphereFace(num_classes=10, embedding_size=4)(torch.randn(3, 4), torch.arange(3)).shape
        torch.Size([])
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 4.0, scale: float = 1.0, **options
    ) -> None:
        super().__init__(num_classes, embedding_size, margin=SphereFaceMargin(margin, scale), **options)
