"""AdaFace: a margin that follows the quality of an image, read from the norm of its embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..request import statistics_dtype
from ..terms import Reduction, Term
from .head import ClassHead
from .logits import ClassLogits
from .margins import Margin, add_angle


class AdaFaceMargin(Margin):
    """Angle and cosine margins that depend on the norm of the embedding.

        ẑ = clip(h (‖x‖ - μ) / (σ + ε), -1, 1)        ψ = cos(clip(θ - m ẑ, ε, π - ε)) - (m + m ẑ)

    μ and σ are running mean and standard deviation of the norms, updated before they are used in training mode. Norms
    are clipped to [0.001, 100] and have no gradient here; all cosines are clipped to ±(1 - ε), beyond which they have
    none either.

    Args:
        margin: m in [0, 1]. Default 0.4.
        h: concentration > 0. Default 0.333.
        scale: s > 0. Default 64.
        t_alpha: share of the batch in the running statistics, (0, 1]. Default 1, as the public class; its training
            script uses 0.01.
        eps: ε in (0, 0.1]. Default 1e-3.

    Raises:
        TypeError, ValueError: on a number outside its range.

    Source: Kim et al., "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022, equations 13-17.
    """

    def __init__(
        self, margin: float = 0.4, h: float = 0.333, scale: float = 64.0, t_alpha: float = 1.0, eps: float = 1e-3
    ) -> None:
        super().__init__(scale)
        checks.number("margin", margin, low=0.0, high=1.0)
        checks.number("h", h, low=0.0, open_low=True)
        checks.number("t_alpha", t_alpha, low=0.0, high=1.0, open_low=True)
        checks.number("eps", eps, low=0.0, high=0.1, open_low=True)
        self.m, self.h, self.t_alpha, self.eps = margin, h, t_alpha, eps
        self.register_buffer("batch_mean", torch.tensor(20.0))
        self.register_buffer("batch_std", torch.tensor(100.0))

    def quality(self, norms: Tensor, valid: Tensor) -> Tensor:
        """(B,) ẑ in [-1, 1]; updates the running statistics in training mode."""
        safe = norms.detach().clamp(0.001, 100.0)
        if self.training:
            count = valid.sum()
            mean = torch.where(valid, safe, 0.0).sum() / count.clamp_min(1)
            spread = torch.where(valid, (safe - mean) ** 2, 0.0).sum() / (count - 1).clamp_min(1)
            for buffer, value in ((self.batch_mean, mean), (self.batch_std, spread.sqrt())):
                updated = self.t_alpha * value + (1 - self.t_alpha) * buffer
                buffer.copy_(torch.where(count > 1, updated, buffer))  # one row has no spread
        return (self.h * (safe - self.batch_mean) / (self.batch_std + self.eps)).clamp(-1, 1).to(norms.dtype)

    def forward(self, cosine: Tensor, norms: Tensor, labels: Tensor) -> Tensor:
        quality = self.quality(norms, labels >= 0)
        clipped = cosine.clamp(-1 + self.eps, 1 - self.eps)
        angle = -self.m * quality
        # θ + angle inside [ε, π - ε], else the cosine of the end.
        theta = torch.acos(clipped.detach()) + angle
        moved = add_angle(clipped, angle, fallback=False)
        moved = torch.where(theta < self.eps, math.cos(self.eps), moved)
        moved = torch.where(theta > math.pi - self.eps, -math.cos(self.eps), moved)
        return moved - (self.m + self.m * quality)

    def logits(self, x: Tensor, weight: Tensor, labels: Tensor, **options) -> ClassLogits:
        high = torch.full((), 1 - self.eps, dtype=statistics_dtype(x), device=x.device)
        inside = {"above": -high, "below": high}
        ends = (high, {"above": torch.nextafter(high, -high)}), (-high, {"below": torch.nextafter(-high, high)})
        rivals = [Term(Reduction.LOGSUMEXP, scale=self.scale, offset=-self.scale, **inside)]
        rivals += [
            Term(Reduction.LOGSUMEXP, scale=0.0, offset=self.scale * (end - 1), **bounds) for end, bounds in ends
        ]
        return super().logits(x, weight, labels, rivals=rivals, **options)

    def extra_repr(self) -> str:
        return f"margin={self.m}, h={self.h}, scale={self.scale}, t_alpha={self.t_alpha}, eps={self.eps}"


class AdaFace(ClassHead):
    """A head with `AdaFaceMargin`.

    Args:
        num_classes, embedding_size: C, D.
        margin, h, scale, t_alpha, eps: see `AdaFaceMargin`.
        **options: see `ClassHead`.

    Source: Kim et al., "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022.

    Example:
        >>> import torch
        >>> from flashpair.heads import AdaFace
        >>> AdaFace(num_classes=10, embedding_size=4)(20 * torch.randn(3, 4), torch.arange(3)).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.4,
        h: float = 0.333,
        scale: float = 64.0,
        t_alpha: float = 1.0,
        eps: float = 1e-3,
        **options,
    ) -> None:
        rule = AdaFaceMargin(margin, h, scale, t_alpha, eps)
        super().__init__(num_classes, embedding_size, margin=rule, **options)
