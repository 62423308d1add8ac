"""Binomial deviance loss."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..terms import Mask, Reduction, Score, Term
from .metric import MetricLoss
from .problem import PairProblem
from .reducers import reduce_values


class BinomialDevianceLoss(MetricLoss):
    """Soft hinges on all pairs, positives and negatives averaged apart.

        loss_i = mean_{p in P_i} log(1 + e^{-α (s_ip - λ)})  +  mean_{n in N_i} log(1 + e^{β (s_in - λ)})

    A mean over nothing is 0.

    Args:
        alpha: α > 0. Default 2.
        beta: β > 0. Default 40.
        base: λ. Default 0.5.
        **kwargs: see `MetricLoss`. Default distance: CosineSimilarity; default reducer: MeanReducer, over anchors.

    Raises:
        ValueError, TypeError: on a bad number, or an unsupported distance or reducer.

    Source: Yi, Lei, Li, "Deep Metric Learning for Practical Person Re-Identification", 2014, equation 8; normalised as
    in the first author of multi-similarity's Deep_Metric code.

    Example:
        >>> import torch
        >>> from flashpair.losses import BinomialDevianceLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(BinomialDevianceLoss()(embeddings, labels)), 4)  # log(1 + e)
        1.3133
    """

    def __init__(self, alpha: float = 2, beta: float = 40, base: float = 0.5, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("alpha", alpha, low=0.0, open_low=True)
        checks.number("beta", beta, low=0.0, open_low=True)
        checks.number("base", base)
        self.alpha, self.beta, self.base = alpha, beta, base

    def loss_of(self, problem: PairProblem) -> Tensor:
        pull, push = -self.alpha * problem.geometry.sign, self.beta * problem.geometry.sign
        sums, counts = problem.reduce(
            [
                Term(Reduction.SUM, Score.SOFTPLUS, Mask.SAME, scale=pull, offset=-pull * self.base),
                Term(Reduction.SUM, Score.SOFTPLUS, Mask.DIFFERENT, scale=push, offset=-push * self.base),
            ],
            counts=(Mask.SAME, Mask.DIFFERENT),
        )
        losses = sum(total / count.clamp_min(1) for total, count in zip(sums, counts, strict=True))
        return reduce_values(losses, self.rule(), labels=problem.anchor_labels)
