"""Tuplet margin loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..terms import Mask, Reduction, Term
from .geometry import require
from .metric import MetricLoss
from .peer import CosineSimilarity
from .problem import PairProblem
from .reducers import Rule, reduce_sums, refuse


class TupletMarginLoss(MetricLoss):
    """Each positive pair, with its angle reduced by a slack, against all negatives of its anchor.

        loss = mean over positive pairs (i, p) of  log( 1 + Σ_{n in N_i} e^{s (cos θ_in - cos(θ_ip - β))} )

    Two passes: log-sums over negatives, then the positives, of which only the similarities within classes are computed.
    pytorch-metric-learning's class: same constructor, same call; its memory is #positives × #negatives. At a cosine of
    ±1, where its acos has an infinite slope, the gradient here is finite.

    Args:
        margin: β in degrees. Default 5.73.
        scale: s > 0. Default 64.
        **kwargs: see `MetricLoss`. The distance is CosineSimilarity; default reducer: MeanReducer, over positive pairs.

    Raises:
        ValueError, TypeError: on a bad number, or an unsupported distance or reducer.

    Source: Yu, Tao, "Deep Metric Learning with Tuplet Margin Loss", ICCV 2019, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.losses import TupletMarginLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(TupletMarginLoss(scale=1)(embeddings, labels)), 4)  # log(1 + 2 e^{-sin β})
        1.0332
    """

    collapse = False

    def __init__(self, margin: float = 5.73, scale: float = 64, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("margin", margin)
        checks.number("scale", scale, low=0.0, open_low=True)
        self.margin = margin
        self.scale = scale

    def check_distance(self) -> None:
        require(self.distance, "TupletMarginLoss", (CosineSimilarity,))

    def check_rule(self, rule: Rule) -> None:
        refuse(rule, "TupletMarginLoss", bounds=True)

    def losses(self, cosine: Tensor, log_sum: Tensor) -> Tensor:
        """Losses of positive pairs with a cosine, against the log-sum of their anchor's negatives."""
        beta = math.radians(self.margin)
        # cos(θ - β) from the cosine alone; the sine keeps a finite slope at 0.
        sine = (1 - cosine * cosine).clamp_min(torch.finfo(cosine.dtype).tiny).sqrt()
        eased = cosine * math.cos(beta) + torch.where(cosine.abs() < 1, sine, 0.0) * math.sin(beta)
        return F.softplus(log_sum - self.scale * eased, threshold=40)

    def loss_of(self, problem: PairProblem) -> Tensor:
        negatives = Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=self.scale)
        (log_sum,), (count, _) = problem.reduce([negatives], counts=(Mask.SAME, Mask.DIFFERENT))
        sums = problem.sum_over_positives(self.losses, log_sum)
        return reduce_sums(sums, count, self.rule(), problem.anchor_labels)
