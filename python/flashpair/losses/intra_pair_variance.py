"""Intra-pair variance loss."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..terms import Mask, Reduction, Score, Term
from .metric import MetricLoss
from .problem import PairProblem
from .reducers import pair_losses, reduce_pairs


class IntraPairVarianceLoss(MetricLoss):
    """Pulls positive pairs above their common mean, and negative pairs below theirs.

        loss = mean_{(i,p)} [(1 - pos_eps) μ⁺ - s_ip]_+²  +  mean_{(i,n)} [s_in - (1 + neg_eps) μ⁻]_+²

    with μ⁺, μ⁻ the means over all positive and all negative pairs of the batch, which have gradients too (with
    distances the roles turn: [d - (1 + eps) μ]_+ for positives). Two passes. pytorch-metric-learning's class: same
    constructor, same call; both parts are reduced on their own, as "pos_loss" and "neg_loss".

    Args:
        pos_eps, neg_eps: default 0.01.
        **kwargs: see `MetricLoss`. Default distance: CosineSimilarity; default reducer: MeanReducer, over pairs.

    Raises:
        ValueError, TypeError: on a bad number, or an unsupported distance or reducer.

    Source: Yu, Tao, "Deep Metric Learning with Tuplet Margin Loss", ICCV 2019, equation 8.

    Example:
        >>> import torch
        >>> from flashpair.losses import IntraPairVarianceLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> float(IntraPairVarianceLoss()(embeddings, labels))
        0.0
    """

    collapse = False

    def __init__(self, pos_eps: float = 0.01, neg_eps: float = 0.01, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("pos_eps", pos_eps)
        checks.number("neg_eps", neg_eps)
        self.pos_eps = pos_eps
        self.neg_eps = neg_eps

    def _sub_loss_names(self) -> list[str]:
        return ["pos_loss", "neg_loss"]

    def loss_of(self, problem: PairProblem) -> Tensor:
        masks = (Mask.SAME, Mask.DIFFERENT)
        sums, counts = problem.reduce([Term(Reduction.SUM, mask=mask) for mask in masks], counts=masks)
        means = [total.sum() / count.sum().clamp_min(1) for total, count in zip(sums, counts, strict=True)]
        parts = []
        for part, mask, mean, eps in zip(
            self._sub_loss_names(), masks, means, (self.pos_eps, self.neg_eps), strict=True
        ):
            raise_it = (problem.geometry.sign > 0) == (mask == Mask.SAME)
            scale, offset = (-1.0, (1 - eps) * mean) if raise_it else (1.0, -(1 + eps) * mean)
            parts.append(pair_losses(self.rule(part), Score.SQUARED_HINGE, mask, scale, offset, growing=scale > 0))
        return reduce_pairs(problem, parts)
