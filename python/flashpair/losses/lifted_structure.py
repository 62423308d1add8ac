"""Lifted structure loss, original and generalised."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..terms import Axis, Combine, Mask, Reduction, Score, Term
from .metric import MetricLoss
from .peer import LpDistance
from .problem import PairProblem
from .reducers import Rule, pair_losses, reduce_pairs, reduce_values, refuse


class _Margins(MetricLoss):
    """Distances to positives beyond one margin, to negatives inside another."""

    def __init__(self, neg_margin: float = 1, pos_margin: float = 0, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("neg_margin", neg_margin)
        checks.number("pos_margin", pos_margin)
        self.neg_margin = neg_margin
        self.pos_margin = pos_margin

    def get_default_distance(self):
        return LpDistance()

    def terms(self, problem: PairProblem) -> tuple[Term, Term]:
        """Log-sums over d - pos_margin of positives and neg_margin - d of negatives (with similarities: mirrored)."""
        away = -problem.geometry.sign
        return (
            Term(Reduction.LOGSUMEXP, mask=Mask.SAME, scale=away, offset=-away * self.pos_margin),
            Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=-away, offset=away * self.neg_margin),
        )


class LiftedStructureLoss(_Margins):
    """Every positive pair against all negatives of both of its ends.

        J_ip = log( Σ_{n in N_i} e^{m - d_in} + Σ_{n in N_p} e^{m - d_pn} ) + d_ip - pos_margin
        loss = mean over positive pairs (i, p) of  [J_ip]_+^2 / 2

    pytorch-metric-learning's class: same constructor, same call; its memory is #positives × #negatives. Two passes: the
    log-sums over negatives, by row and by column, then the positives with both as offsets. With `ref_emb` the negatives
    of p are the rows of other labels; the peer compares row numbers with column numbers there.

    Args:
        neg_margin: m. Default 1.
        pos_margin: default 0.
        **kwargs: see `MetricLoss`. Default distance: LpDistance of normalised embeddings; default reducer: MeanReducer,
            over positive pairs.

    Raises:
        ValueError, TypeError: on a margin that is not a number, or an unsupported distance or reducer.

    Source: Oh Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.losses import LiftedStructureLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(LiftedStructureLoss()(embeddings, labels)), 4)  # (log 4 + 1)^2 / 2
        2.8472
    """

    collapse = False

    def check_rule(self, rule: Rule) -> None:
        refuse(rule, "LiftedStructureLoss", bounds=True)

    def loss_of(self, problem: PairProblem) -> Tensor:
        pull, push = self.terms(problem)
        if problem.y is None:
            (rows,), _ = problem.reduce([push])
            columns = rows
        else:
            by_column = Term(push.reduction, mask=push.mask, axis=Axis.COLUMNS, scale=push.scale, offset=push.offset)
            (rows, columns), _ = problem.reduce([push, by_column])
        # log(e^rows + e^columns) + away (s - pos_margin), squared above zero
        positives = pair_losses(
            self.rule(), Score.SQUARED_HINGE, Mask.SAME, pull.scale, rows + pull.offset, growing=pull.scale > 0,
            other_offset=columns + pull.offset, combine=Combine.LOGADDEXP,
        )  # fmt: skip
        return reduce_pairs(problem, [positives]) / 2


class GeneralizedLiftedStructureLoss(_Margins):
    """Soft maximum over an anchor's positives against the soft minimum over its negatives.

        loss_i = [ log Σ_{p in P_i} e^{d_ip - pos_margin}  +  log Σ_{n in N_i} e^{neg_margin - d_in} ]_+

    pytorch-metric-learning's class: same constructor, same call; a log-sum over nothing counts 0.

    Args:
        neg_margin: default 1.
        pos_margin: default 0.
        **kwargs: see `MetricLoss`. Default distance: LpDistance of normalised embeddings; default reducer: MeanReducer,
            over anchors.

    Raises:
        ValueError, TypeError: on a margin that is not a number, or an unsupported distance or reducer.

    Source: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification", 2017, equation 7.

    Example:
        >>> import torch
        >>> from flashpair.losses import GeneralizedLiftedStructureLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(GeneralizedLiftedStructureLoss()(embeddings, labels)), 4)  # log 2 + 1
        1.6931
    """

    def loss_of(self, problem: PairProblem) -> Tensor:
        found, _ = problem.reduce(list(self.terms(problem)))
        positive, negative = (torch.where(v == -torch.inf, 0.0, v) for v in found)
        return reduce_values(torch.relu(positive + negative), self.rule(), labels=problem.anchor_labels)
