"""ElasticFace: a margin drawn anew for every sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..random import normal
from .head import ClassHead
from .margins import Margin, add_angle

KINDS = ("arc", "cos")


class ElasticFaceMargin(Margin):
    """A random margin m_i ~ N(m, σ²) for every row and step: cos(θ + m_i) ("arc") or cos θ - m_i ("cos").

    With `plus` the margins drawn go to the rows by difficulty, the largest to the smallest cosine. The public code
    indexes the sorted margins with the sorting permutation itself instead of its inverse, so that hard rows do not
    systematically get large margins; `public_order` does the same.

    Args:
        margin: m. Default 0.5 ("arc"), 0.35 ("cos").
        std: σ >= 0. Default 0.05; the paper's "plus" uses 0.0175 ("arc") and 0.02 ("cos").
        kind: "arc" or "cos".
        plus: see above. Default False.
        public_order: see above. Default False.
        scale: s > 0. Default 64.
        generator: of the margins, in a group with one seed on all ranks; default torch's own.

    Raises:
        TypeError, ValueError: on a bad argument, naming it.

    Source: Boutros et al., "ElasticFace: Elastic Margin Loss for Deep Face Recognition", CVPRW 2022, equations 5-7.
    """

    def __init__(
        self,
        margin: float | None = None,
        std: float = 0.05,
        kind: str = "arc",
        plus: bool = False,
        public_order: bool = False,
        scale: float = 64.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(scale)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")
        margin = {"arc": 0.5, "cos": 0.35}[kind] if margin is None else margin
        checks.number("margin", margin, low=0.0, high=math.pi)
        checks.number("std", std, low=0.0)
        self.m, self.std, self.kind, self.plus = margin, std, kind, plus
        self.public_order, self.generator = public_order, generator

    def draw(self, cosine: Tensor) -> Tensor:
        """(B,) margins of the rows."""
        cosine = cosine.detach()
        margins = self.m + self.std * normal(cosine, self.generator)
        if not self.plus:
            return margins
        hardest_last = cosine.argsort(descending=True)
        ordered = margins.sort().values
        if self.public_order:
            return ordered[hardest_last]
        return torch.empty_like(margins).scatter_(0, hardest_last, ordered)

    def forward(self, cosine: Tensor, norms: Tensor, labels: Tensor) -> Tensor:
        margins = self.draw(cosine)
        return cosine - margins if self.kind == "cos" else add_angle(cosine, margins)

    def extra_repr(self) -> str:
        return f"margin={self.m}, std={self.std}, kind={self.kind!r}, plus={self.plus}, scale={self.scale}"


class ElasticFace(ClassHead):
    """A head with `ElasticFaceMargin`.

    Args:
        num_classes, embedding_size: C, D.
        margin, std, kind, plus, public_order, scale, generator: see `ElasticFaceMargin`.
        **options: see `ClassHead`.

    Source: Boutros et al., "ElasticFace: Elastic Margin Loss for Deep Face Recognition", CVPRW 2022.

    Example:
        >>> import torch
        >>> from flashpair.heads import ElasticFace
        >>> ElasticFace(num_classes=10, embedding_size=4, plus=True)(torch.randn(3, 4), torch.arange(3)).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | None = None,
        std: float = 0.05,
        kind: str = "arc",
        plus: bool = False,
        public_order: bool = False,
        scale: float = 64.0,
        generator: torch.Generator | None = None,
        **options,
    ) -> None:
        rule = ElasticFaceMargin(margin, std, kind, plus, public_order, scale, generator)
        super().__init__(num_classes, embedding_size, margin=rule, **options)
