"""Ranked list loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..terms import Mask, Reduction, Term
from .geometry import require
from .metric import MetricLoss
from .peer import LpDistance
from .problem import PairProblem
from .reducers import reduce_values

_FLOOR = 1e-5  # the peer adds it to every weight of a row, used or not


class RankedListLoss(MetricLoss):
    """Positives inside a sphere, negatives outside a larger one, violators weighted by how far they are off.

        P*_i = {p: d_ip > α - m},  w_ip = e^{Tp (d_ip - α + m)};      N*_i = {n: d_in < α},  w_in = e^{Tn (α - d_in)}
        loss_i = (1 - λ) Σ_P* w (d - α + m) / (Σ_P* w + 1e-5 N)  +  λ Σ_N* w (α - d) / (Σ_N* w + 1e-5 N)

    with N the number of columns. pytorch-metric-learning's class: same constructor, same call, same weights, which have
    gradients (the paper's are constants). A negative at distance 0 counts; the peer leaves it out.

    Args:
        margin: m.
        Tn: temperature of the negatives.
        imbalance: λ in [0, 1]. Default 0.5.
        alpha: α. Default 1 + margin / 2.
        Tp: temperature of the positives. Default 0.
        **kwargs: see `MetricLoss`. The distance is LpDistance; default reducer: MeanReducer, over anchors.

    Raises:
        ValueError, TypeError: on a bad number, an unsupported distance or reducer, or a given `indices_tuple`.

    Source: Wang et al., "Ranked List Loss for Deep Metric Learning", CVPR 2019, equations 4-8.

    Example:
        >>> import torch
        >>> from flashpair.losses import RankedListLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(RankedListLoss(margin=0.4, Tn=10)(embeddings, labels)), 4)  # (sqrt 2 - 0.8) / 2
        0.3071
    """

    def __init__(
        self, margin: float, Tn: float, imbalance: float = 0.5, alpha: float | None = None, Tp: float = 0, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        checks.number("margin", margin)
        checks.number("Tn", Tn)
        checks.number("Tp", Tp)
        checks.number("imbalance", imbalance, low=0.0, high=1.0)
        if alpha is not None:
            checks.number("alpha", alpha)
        self.margin = margin
        self.Tn, self.Tp = Tn, Tp
        self.imbalance = imbalance
        self.alpha = 1 + margin / 2 if alpha is None else alpha

    def check_distance(self) -> None:
        require(self.distance, "RankedListLoss", (LpDistance,))

    def get_default_distance(self):
        return LpDistance()

    def loss_of(self, problem: PairProblem) -> Tensor:
        if problem.pairs is not None or problem.bounds:
            raise ValueError("indices_tuple must be None for RankedListLoss, which chooses its own pairs; got one")
        inner = self.alpha - self.margin
        pull = {"mask": Mask.SAME, "scale": float(self.Tp), "offset": -self.Tp * inner, "above": inner}
        push = {"mask": Mask.DIFFERENT, "scale": -float(self.Tn), "offset": self.Tn * self.alpha, "below": self.alpha}
        found, _ = problem.reduce(
            [
                Term(reduction, **side)
                for side in (pull, push)
                for reduction in (Reduction.LOGSUMEXP, Reduction.SOFTMAX_MEAN)
            ]
        )
        columns = (problem.x if problem.y is None else problem.y).shape[0]
        floor = math.log(_FLOOR * max(columns, 1))
        # Σ w l / (Σ w + floor) = (weighted mean of l) sigmoid(log Σ w - log floor)
        share = [torch.sigmoid(torch.where(lse == -torch.inf, -torch.inf, lse) - floor) for lse in found[::2]]
        some = [lse > -torch.inf for lse in found[::2]]
        positive = torch.where(some[0], share[0] * (found[1] - inner), 0.0)
        negative = torch.where(some[1], share[1] * (self.alpha - found[3]), 0.0)
        losses = (1 - self.imbalance) * positive + self.imbalance * negative
        return reduce_values(losses, self.rule(), labels=problem.anchor_labels)
