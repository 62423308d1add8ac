"""Sub-centre ArcFace: several centres a class, of which the nearest counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..request import statistics_dtype
from ..terms import Reduction
from .combined_margin import CombinedMargin
from .head import ClassHead
from .logits import ClassLogits
from .streaming import streamed


def nearest_centers(rows: Sequence[Tensor], columns: Sequence[Tensor], shared: Sequence[Tensor], block: slice):
    """(logsumexp over the other classes, cosine with the own class), cos_ij = max_k <x_i, w_jk>, of a block."""
    x, own = rows
    (centers,), (scale,) = columns, shared
    units = F.normalize(centers.to(x.dtype), dim=2).flatten(0, 1)
    cosine = (x @ units.T).unflatten(1, centers.shape[:2]).amax(2)
    mine = own[:, None] == torch.arange(block.start, block.start + centers.shape[0], device=own.device)
    # A finite floor: a block may hold nothing but the own class.
    rivals = (scale * (cosine - 1)).masked_fill(mine, torch.finfo(x.dtype).min / 2).logsumexp(1)
    return rivals, torch.where(mine, cosine, 0.0).sum(1)


class SubCenterArcFace(ClassHead):
    """ArcFace with K centres a class, cos θ_j = max_k <x̂, ŵ_jk>: noisy images gather round a centre of their own.

    A maximum within classes is not a pass of the engine: dense code on blocks of classes in bounded memory (see
    `streamed`), at the speed of dense code.

    Args:
        num_classes, embedding_size: C, D.
        margin: m in radians. Default 0.5.
        scale: s > 0. Default 64.
        sub_centers: K. Default 3.
        margin_grad: "exact" or "straight_through".
        **options: see `ClassHead`. Formulas with extras, gradient_filter and `fuse` are not available.

    Attributes:
        weight: (C K, D), the centres of a class together.

    Raises:
        TypeError, ValueError: on a bad argument, naming it.

    Source: Deng et al., "Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces", ECCV 2020,
    equation 2.

    Example:
        >>> import torch
        >>> from flashpair.heads import SubCenterArcFace
        >>> head = SubCenterArcFace(num_classes=10, embedding_size=4)
        >>> head(torch.randn(3, 4), torch.arange(3)).shape, head.weight.shape
        (torch.Size([]), torch.Size([30, 4]))
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        scale: float = 64.0,
        sub_centers: int = 3,
        margin_grad: str = "exact",
        **options,
    ) -> None:
        checks.count("sub_centers", sub_centers)
        checks.count("num_classes", num_classes)
        rule = CombinedMargin(scale, m2=margin, margin_grad=margin_grad)
        super().__init__(num_classes * sub_centers, embedding_size, margin=rule, **options)
        if self.formula.extras or self.gradient_filter:
            raise ValueError("SubCenterArcFace offers neither formulas with extras nor gradient_filter")
        self.num_classes, self.sub_centers = num_classes, sub_centers

    spreads = False

    def fuse(self, optimizer) -> None:
        if optimizer is not None:
            raise ValueError("SubCenterArcFace cannot be fused with an optimiser")

    def logits(self, embeddings: Tensor, labels: Tensor) -> ClassLogits:
        x = self.as_embeddings(embeddings)
        self.check_labels(labels, x)
        valid = torch.ones_like(labels, dtype=torch.bool) if self.ignore_index is None else labels != self.ignore_index
        own = torch.where(valid, labels, -1)
        dtype = statistics_dtype(x)
        scale = self.margin.scale
        scale = scale.to(dtype) if isinstance(scale, Tensor) else torch.full((), scale, dtype=dtype, device=x.device)
        unit = F.normalize(x.to(dtype), dim=1, eps=1e-12)
        centers = self.weight.unflatten(0, (self.num_classes, self.sub_centers))
        rivals, cosine = streamed(
            nearest_centers, [unit, own], [centers], [Reduction.LOGSUMEXP, Reduction.SUM],
            shared=[scale], per_class=self.sub_centers, max_workspace_bytes=self.max_workspace_bytes,
        )  # fmt: skip
        moved = scale * self.margin(cosine, cosine, own) - scale.detach()
        rivals = rivals + (scale - scale.detach())  # counted from a shift that has no gradient
        return ClassLogits(moved, rivals, scale.detach(), cosine, valid, own, self.num_classes, self.class_weight)

    @torch.no_grad()
    def predict(self, embeddings: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """See `ClassHead.predict`; k is 1 here."""
        if k != 1:
            raise ValueError(f"k must be 1 with sub-centres; got {k}")
        values, centers = super().predict(embeddings, 1)
        return values, centers // self.sub_centers
