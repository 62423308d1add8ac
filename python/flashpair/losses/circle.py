"""Circle loss with pair-wise labels, by anchor and over the whole batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..formulas import CIRCLE
from ..terms import Mask, Reduction, Score, Term
from .geometry import require
from .metric import MetricLoss
from .peer import AvgNonZeroReducer, CosineSimilarity
from .problem import pair_problem
from .reducers import reduce_anchors, reducer_rule


def _terms(m: float, gamma: float) -> list[Term]:
    """Log-sums over positives and negatives.

    With u = s for negatives and u = 1 - s for positives, both are gamma [u + m]_+ (u - m) with the factor detached.
    """
    root = gamma**0.5
    return [
        Term(Reduction.LOGSUMEXP, Score.CIRCLE, Mask.SAME, scale=-root, offset=root, constant=root * m),
        Term(Reduction.LOGSUMEXP, Score.CIRCLE, Mask.DIFFERENT, scale=root, constant=root * m),
    ]


def circle_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    indices_tuple=None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    m: float = 0.4,
    gamma: float = 80,
    distance=None,
    reducer=None,
    return_stats: bool = False,
):
    """Function behind `CircleLoss`."""
    distance = CosineSimilarity() if distance is None else distance
    require(distance, "CircleLoss", (CosineSimilarity,))
    problem = pair_problem(embeddings, labels, indices_tuple, ref_emb, ref_labels, distance)
    rule, both = reducer_rule(AvgNonZeroReducer() if reducer is None else reducer), (Mask.SAME, Mask.DIFFERENT)
    return problem.finish(reduce_anchors(problem, rule, _terms(m, gamma), CIRCLE, both, statistics=return_stats))


class CircleLoss(MetricLoss):
    """Weights each similarity by how far it is from its optimum.

        loss_i = softplus( LSE_{n in N_i} γ [s_in + m]_+ (s_in - m) + LSE_{p in P_i} γ [1 + m - s_ip]_+ (1 - m - s_ip) )

    with the brackets taken as constants in the gradient. Anchors that lack positives or negatives have loss 0.
    pytorch-metric-learning's class: same constructor, same call.

    Args:
        m: relaxation. Default 0.4.
        gamma: γ > 0, scale. Default 80.
        **kwargs: see `MetricLoss`. The distance is CosineSimilarity; default reducer: AvgNonZeroReducer, over
            anchors.

    Raises:
        ValueError, TypeError: on a bad number, or an unsupported distance or reducer.

    Source: Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020, equation 6.

    Example:
        >>> import torch
        >>> from flashpair.losses import CircleLoss
        >>> embeddings, labels = torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])
        >>> round(float(CircleLoss()(embeddings, labels)), 4)
        0.0
    """

    def __init__(self, m: float = 0.4, gamma: float = 80, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("m", m)
        checks.number("gamma", gamma, low=0.0, open_low=True)
        self.m = m
        self.gamma = gamma

    def check_distance(self) -> None:
        require(self.distance, "CircleLoss", (CosineSimilarity,))

    def get_default_reducer(self):
        return AvgNonZeroReducer()

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        return circle_loss(
            embeddings, labels, indices_tuple, ref_emb, ref_labels,
            m=self.m, gamma=self.gamma, distance=self.distance, reducer=self.reducer, return_stats=return_stats,
        )  # fmt: skip


class PairCircleLoss(CircleLoss):
    """Circle loss in which all positive pairs of the batch meet all its negative pairs.

        loss = softplus( LSE_{all negative pairs} γ [s + m]_+ (s - m)
                         + LSE_{all positive pairs} γ [1 + m - s]_+ (1 - m - s) )

    one number for the batch, each unordered pair once, as in the widely used implementation of the paper; reducers do
    not change it. A batch without positives or negatives has loss 0.

    Args:
        m: relaxation. Default 0.4.
        gamma: γ > 0, scale. Default 80.
        **kwargs: see `MetricLoss`. The distance is CosineSimilarity.

    Raises:
        ValueError, TypeError: on a bad number or an unsupported distance.

    Source: Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020, equation 6.

    Example:
        >>> import torch
        >>> from flashpair.losses import PairCircleLoss
        >>> embeddings, labels = torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])
        >>> round(float(PairCircleLoss()(embeddings, labels)), 4)
        0.0
    """

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        problem = pair_problem(embeddings, labels, indices_tuple, ref_emb, ref_labels, self.distance)
        problem.measure = return_stats
        found, _ = problem.reduce(_terms(self.m, self.gamma))
        # Where the rows are the columns every pair was met from both ends.
        twice = math.log(2) if problem.y is None and problem.pairs is None and not problem.bounds else 0.0
        some = [log_sum > -torch.inf for log_sum in found]
        total = sum(_log_sum(log_sum, kept) - twice for log_sum, kept in zip(found, some, strict=True))
        loss = torch.where(some[0].any() & some[1].any(), F.softplus(total, threshold=40), 0.0)
        return problem.finish(loss)


def _log_sum(values: Tensor, kept: Tensor) -> Tensor:
    """logsumexp of the kept values, 0 without any, with no gradient of those that are not."""
    values = torch.where(kept, values, 0.0)
    return torch.where(kept.any(), values.masked_fill(~kept, -1e30).logsumexp(0), 0.0)
