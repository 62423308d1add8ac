"""Contrastive loss: positives closer than one margin, negatives farther than another."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..terms import Mask, Score
from .metric import MetricLoss
from .peer import AvgNonZeroReducer, LpDistance
from .problem import PairProblem, pair_problem
from .reducers import pair_losses, reduce_pairs, reducer_rule


def contrastive_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    indices_tuple=None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    pos_margin: float = 0,
    neg_margin: float = 1,
    distance=None,
    reducer=None,
    return_stats: bool = False,
):
    """Function behind `ContrastiveLoss`."""
    distance = LpDistance() if distance is None else distance
    problem = pair_problem(embeddings, labels, indices_tuple, ref_emb, ref_labels, distance, collapse=False)
    problem.measure = return_stats
    return problem.finish(reduce_margins(problem, reducer, pos_margin, neg_margin))


def reduce_margins(
    problem: PairProblem, reducer, pos_margin: float, neg_margin: float, row_scale: float | Tensor = 1.0
) -> Tensor:
    """Both parts; distances are `row_scale`, positive, (B,) or one number, times the problem's."""
    reducer = AvgNonZeroReducer() if reducer is None else reducer
    away = -problem.geometry.sign  # +1 where a larger value means farther apart
    parts = [
        pair_losses(
            reducer_rule(reducer, "pos_loss"),
            Score.HINGE,
            Mask.SAME,
            away * row_scale,
            -away * pos_margin,
            growing=away > 0,
        ),
        pair_losses(
            reducer_rule(reducer, "neg_loss"),
            Score.HINGE,
            Mask.DIFFERENT,
            -away * row_scale,
            away * neg_margin,
            growing=away < 0,
        ),
    ]
    return reduce_pairs(problem, parts)


class ContrastiveLoss(MetricLoss):
    """Pulls positives inside one margin and pushes negatives outside another.

        loss = reduce_{(i,p)} [d_ip - pos_margin]_+  +  reduce_{(i,n)} [neg_margin - d_in]_+

    (with similarities: [pos_margin - s_ip]_+ and [s_in - neg_margin]_+). pytorch-metric-learning's class: same
    constructor, same call; both parts are reduced on their own, as "pos_loss" and "neg_loss".

    Args:
        pos_margin: default 0.
        neg_margin: default 1.
        **kwargs: see `MetricLoss`. Default distance: LpDistance of normalised embeddings; default reducer:
            AvgNonZeroReducer, over pairs.

    Raises:
        ValueError, TypeError: on a margin that is not a number, or an unsupported distance or reducer.

    Source: Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006
    (unsquared here, as in pytorch-metric-learning).

    Example:
        >>> import torch
        >>> from flashpair.losses import ContrastiveLoss
        >>> embeddings, labels = torch.eye(2), torch.tensor([0, 0])
        >>> round(float(ContrastiveLoss()(embeddings, labels)), 4)  # the distance of the one pair
        1.4142
    """

    def __init__(self, pos_margin: float = 0, neg_margin: float = 1, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("pos_margin", pos_margin)
        checks.number("neg_margin", neg_margin)
        self.pos_margin = pos_margin
        self.neg_margin = neg_margin

    def _sub_loss_names(self) -> list[str]:
        return ["pos_loss", "neg_loss"]

    def get_default_distance(self):
        return LpDistance()

    def get_default_reducer(self):
        return AvgNonZeroReducer()

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        return contrastive_loss(
            embeddings, labels, indices_tuple, ref_emb, ref_labels,
            pos_margin=self.pos_margin, neg_margin=self.neg_margin,
            distance=self.distance, reducer=self.reducer, return_stats=return_stats,
        )  # fmt: skip
