"""Alignment of positives and uniformity of everything on the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import checks
from ...distributed.sharded import current
from ...pairs import pair_similarity
from ...primitives import pair_reduce
from ...terms import Reduction, Similarity, Term
from ..arguments import poisoned
from ..group import InGroup
from ..two_views import MatchedLoss, nothing


class AlignmentLoss(MatchedLoss):
    """Mean distance of positives: `mean_i ||x_i - y_i||^α` of unit vectors.

    Args:
        alpha: α > 0. Default 2.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Source: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", ICML 2020, section 4.1.1.

    Example:
        >>> import torch
        >>> from flashpair.losses import AlignmentLoss
        >>> float(AlignmentLoss()(torch.eye(2), -torch.eye(2)))
        4.0
    """

    def __init__(self, alpha: float = 2.0, group=None) -> None:
        super().__init__(group=group)
        checks.number("alpha", alpha, low=0.0, open_low=True)
        self.alpha = alpha

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        index = torch.arange(first.shape[0], device=first.device)
        squared = pair_similarity(first, second, index, index, similarity=Similarity.SQUARED_EUCLIDEAN, normalize=True)
        if self.alpha == 2:
            return squared.mean()
        equal = squared == 0  # a power below one has no slope there
        return torch.where(equal, 0.0, torch.where(equal, 1.0, squared) ** (self.alpha / 2)).mean()


class UniformityLoss(InGroup, torch.nn.Module):
    """How unevenly unit vectors cover the sphere: `log mean_{i != j} e^{-t ||x_i - x_j||²}`.

    One log-sum over all pairs; the call is `loss(embeddings)`.

    Args:
        t: > 0. Default 2.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Source: Wang and Isola, ICML 2020, section 4.1.2.

    Example:
        >>> import torch
        >>> from flashpair.losses import UniformityLoss
        >>> float(UniformityLoss()(torch.eye(3)))  # all squared distances are 2
        -4.0
    """

    row_groups = (("embeddings",),)

    def __init__(self, t: float = 2.0, group=None) -> None:
        super().__init__(group=group)
        checks.number("t", t, low=0.0, open_low=True)
        self.t = t

    def forward(self, embeddings: Tensor) -> Tensor:
        """The loss of embeddings (B, D); 0 for fewer than two."""
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {"embeddings": embeddings})
        checks.embeddings("embeddings", embeddings)
        rows = embeddings.shape[0]
        if rows < 2:
            return poisoned(nothing(embeddings), embeddings)
        near = Term(Reduction.LOGSUMEXP, scale=-self.t)
        (sums,) = pair_reduce(embeddings, terms=[near], similarity=Similarity.SQUARED_EUCLIDEAN, normalize=True)
        return poisoned(sums.logsumexp(0) - math.log(rows * (rows - 1)), embeddings)


class AlignmentUniformityLoss(MatchedLoss):
    """Both at once: `align_weight · alignment + uniform_weight · (uniformity(x) + uniformity(y)) / 2`.

    Args:
        align_weight, uniform_weight: Default 1 and 1.
        alpha, t: see `AlignmentLoss` and `UniformityLoss`. Default 2 and 2.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Source: Wang and Isola, ICML 2020, figure 5.

    Example:
        >>> import torch
        >>> from flashpair.losses import AlignmentUniformityLoss
        >>> float(AlignmentUniformityLoss()(torch.eye(3), torch.eye(3)))
        -4.0
    """

    def __init__(
        self, align_weight: float = 1.0, uniform_weight: float = 1.0, alpha: float = 2.0, t: float = 2.0, group=None
    ) -> None:
        super().__init__(group=group)
        checks.number("align_weight", align_weight)
        checks.number("uniform_weight", uniform_weight)
        self.align_weight, self.uniform_weight = align_weight, uniform_weight
        self.alignment, self.uniformity = AlignmentLoss(alpha), UniformityLoss(t)

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        spread = (self.uniformity(first) + self.uniformity(second)) / 2
        return self.align_weight * self.alignment(first, second) + self.uniform_weight * spread
