"""Neighbourhood component analysis."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..terms import Mask, Reduction, Term
from .metric import MetricLoss
from .peer import LpDistance
from .problem import PairProblem
from .reducers import reduce_values


class NCALoss(MetricLoss):
    """The probability that a random neighbour of an anchor has its label.

        loss_i = -log( Σ_{p in P_i} e^{-a d_ip²} / Σ_{j ≠ i} e^{-a d_ij²} )

    pytorch-metric-learning's class: same constructor, same call; `indices_tuple` weights the anchors by how often they
    were mined. Anchors without positives have no loss. Where the peer's softmax underflows to 0 it drops the anchor,
    here the anchor keeps its loss.

    Args:
        softmax_scale: a. Default 1.
        **kwargs: see `MetricLoss`. Default distance: LpDistance(power=2) of normalised embeddings; default reducer:
            MeanReducer, over anchors with positives.

    Raises:
        ValueError, TypeError: on a bad number, an unsupported distance or reducer, or a call without labels.

    Source: Goldberger et al., "Neighbourhood Components Analysis", NIPS 2004 (log of its equation 3).

    Example:
        >>> import torch
        >>> from flashpair.losses import NCALoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(NCALoss()(embeddings, labels)), 4)  # log 3
        1.0986
    """

    weighs_rows = True

    def __init__(self, softmax_scale: float = 1, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("softmax_scale", softmax_scale, low=0.0, open_low=True)
        self.softmax_scale = softmax_scale

    def get_default_distance(self):
        return LpDistance(power=2)

    def loss_of(self, problem: PairProblem) -> Tensor:
        logits = {"scale": self.softmax_scale * problem.geometry.sign}
        terms = [Term(Reduction.LOGSUMEXP, **logits), Term(Reduction.LOGSUMEXP, mask=Mask.SAME, **logits)]
        (everything, positive), (count, _) = problem.reduce(terms, counts=(Mask.SAME, Mask.DIFFERENT))
        some = count > 0
        losses = torch.where(some, everything - torch.where(some, positive, 0.0), 0.0)
        losses = losses * problem.row_weights()
        return reduce_values(losses, self.rule(), some, problem.anchor_labels)
