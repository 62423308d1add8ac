"""CurricularFace: hard negatives count more as training goes on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..request import statistics_dtype
from ..terms import Reduction, Score, Term
from .head import ClassHead
from .logits import ClassLogits
from .margins import Margin, add_angle
from .statistics import check_classes, full_index, listed_similarity


class CurricularFaceMargin(Margin):
    """ArcFace's margin, and negatives harder than the moved positive get cos θ_j (t + cos θ_j) instead of cos θ_j.

        t ← (1 - α) t + α mean_i cos θ_{y_i},   before it is used, in training mode

    The hard negatives' s (t c + c²) is a square, (√s c + √s t / 2)² - s t² / 4, so two logsumexp terms of one pass,
    below and above the threshold cos(θ_y + m) of a row, hold all negatives.

    Args:
        margin: m in radians, [0, π]. Default 0.5.
        scale: s > 0. Default 64.
        momentum: α in [0, 1]. Default 0.01.

    Raises:
        TypeError, ValueError: on a number outside its range.

    Source: Huang et al., "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition", CVPR 2020,
    equations 4-8.
    """

    def __init__(self, margin: float = 0.5, scale: float = 64.0, momentum: float = 0.01) -> None:
        super().__init__(scale)
        checks.number("scale", scale, low=0.0, open_low=True)
        checks.number("margin", margin, low=0.0, high=math.pi)
        checks.number("momentum", momentum, low=0.0, high=1.0)
        self.m, self.momentum = margin, momentum
        self.register_buffer("t", torch.zeros(()))

    def forward(self, cosine: Tensor, norms: Tensor, labels: Tensor) -> Tensor:
        return add_angle(cosine, self.m)

    def logits(self, x: Tensor, weight: Tensor, labels: Tensor, **options) -> ClassLogits:
        update, ignore_index = options.get("update"), options.get("ignore_index")
        classes = weight.shape[0] if update is None or update.selected is None else update.selected.shape[0]
        check_classes(labels, x, classes, missing=ignore_index)
        valid = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
        with torch.no_grad():
            own = full_index(update, torch.where(valid, labels, -1)[:, None])
            cosine = listed_similarity(x, weight, own, normalize=True)[:, 0]
            if self.training:
                mean = cosine.sum() / valid.sum().clamp_min(1)
                self.t.copy_(torch.where(valid.any(), self.momentum * mean + (1 - self.momentum) * self.t, self.t))
            threshold = add_angle(cosine, self.m, fallback=False)
            t = self.t.to(statistics_dtype(x))
        root = math.sqrt(self.scale)
        easy = Term(
            Reduction.LOGSUMEXP, scale=self.scale, offset=-self.scale,
            below=torch.nextafter(threshold, torch.full_like(threshold, torch.inf)),
        )  # fmt: skip
        hard = Term(Reduction.LOGSUMEXP, Score.SQUARE, scale=root, offset=root * t / 2, above=threshold)
        beyond = self.scale * (1 + t * t / 4)
        return super().logits(x, weight, labels, rivals=[easy, (hard, -beyond)], **options)

    def extra_repr(self) -> str:
        return f"margin={self.m}, scale={self.scale}, momentum={self.momentum}"


class CurricularFace(ClassHead):
    """A head with `CurricularFaceMargin`.

    Args:
        num_classes, embedding_size: C, D.
        margin, scale, momentum: see `CurricularFaceMargin`.
        **options: see `ClassHead`.

    Source: Huang et al., "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition", CVPR 2020.

    Example:
        >>> import torch
        >>> from flashpair.heads import CurricularFace
        >>> CurricularFace(num_classes=10, embedding_size=4)(torch.randn(3, 4), torch.arange(3)).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        scale: float = 64.0,
        momentum: float = 0.01,
        **options,
    ) -> None:
        rule = CurricularFaceMargin(margin, scale, momentum)
        super().__init__(num_classes, embedding_size, margin=rule, **options)
