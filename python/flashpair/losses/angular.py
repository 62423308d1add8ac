"""Angular loss."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..primitives import pair_reduce
from ..reference import normalized
from ..terms import Mask, Reduction, Term
from .geometry import require
from .metric import MetricLoss
from .peer import LpDistance
from .positive_pairs import single_losses, sums_over_positive_pairs
from .problem import PairProblem, pair_problem
from .reducers import reduce_sums


class AngularLoss(MetricLoss):
    """Bounds the angle at the negative of every triangle of anchor, positive and negative.

        loss = mean over positive pairs (a, p) of
               log( 1 + Σ_{n: y_n ≠ y_a} e^{4 tan²α <x_a + x_p, x_n> - 2 (1 + tan²α) <x_a, x_p>} )

    The queries x_a + x_p of a block of pairs are rows of one engine pass, each pair of a self-similarity once. All x
    are unit vectors. pytorch-metric-learning's class: same constructor, same call; its negatives are not normalised, so
    that its loss depends on the lengths of the embeddings. As there, a given `indices_tuple` chooses the positive
    pairs, and the negatives are all that labels say.

    Args:
        alpha: α in degrees. Default 40.
        **kwargs: see `MetricLoss`. The distance is LpDistance of normalised embeddings, power 1; default reducer:
            MeanReducer, over positive pairs.

    Raises:
        ValueError, TypeError: on a bad number, an unsupported distance or reducer, or a call without labels.

    Source: Wang et al., "Deep Metric Learning with Angular Loss", ICCV 2017, equation 8.

    Example:
        >>> import torch
        >>> from flashpair.losses import AngularLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(AngularLoss()(embeddings, labels)), 4)  # log(1 + 2)
        1.0986
    """

    collapse = False

    def __init__(self, alpha: float = 40, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("alpha", alpha, low=0.0, high=90.0)
        self.alpha = alpha

    def check_distance(self) -> None:
        require(self.distance, "AngularLoss", (LpDistance,), normalized=True, powers=(1,))

    def get_default_distance(self):
        return LpDistance()

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        if labels is None or (ref_emb is not None and ref_labels is None):
            raise ValueError("labels must be given to AngularLoss (and ref_labels with ref_emb); got None")
        problem = pair_problem(embeddings, labels, indices_tuple, ref_emb, ref_labels, self.distance, collapse=False)
        problem.measure = return_stats
        if return_stats:
            problem.reduce([])
        columns = labels if problem.y is None or ref_labels is None else ref_labels
        return problem.finish(self.loss_of(problem, columns))

    def loss_of(self, problem: PairProblem, column_labels: Tensor) -> Tensor:
        square = math.tan(math.radians(self.alpha)) ** 2
        x = normalized(problem.x)
        y = x if problem.y is None else normalized(problem.y)
        labels, rule = problem.anchor_labels, self.rule()
        push = Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=4 * square)

        def losses(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
            near, far = x[rows], y[columns]
            (log_sum,) = pair_reduce(near + far, y, [push], labels=labels[rows], ref_labels=column_labels)
            values = F.softplus(log_sum - 2 * (1 + square) * (near * far).sum(1), threshold=40)
            return single_losses(values, rule)

        sums, counts = sums_over_positive_pairs(problem, losses, max(y.shape[0], 1), symmetric=True)
        return reduce_sums(sums, counts, rule, labels)
