"""FaceNet's semi-hard triplet loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..rows import RowPanel
from .metric import MetricLoss
from .peer import LpDistance
from .problem import PairProblem
from .ranks import next_above
from .reducers import Rule, reduce_sums, refuse


class TripletSemiHardLoss(MetricLoss):
    """Each positive pair against the closest negative that is farther than the positive.

        d_an* = min{d_an: d_an > d_ap} where there is one, else max_n d_an
        loss = mean over positive pairs (a, p) of  [d_ap - d_an* + margin]_+

    zeros included. On a CPU each negative of a row finds its place among the sorted positives, O(B N log P); elsewhere
    the negatives are sorted, O(B N log N).

    Args:
        margin: default 1.
        **kwargs: see `MetricLoss`. Default distance: LpDistance(power=2) of normalised embeddings; default reducer:
            MeanReducer, over positive pairs of anchors with negatives.

    Raises:
        ValueError, TypeError: on a margin that is not a number, an unsupported distance or reducer, or a given
            `indices_tuple`.

    Source: Schroff et al., "FaceNet", CVPR 2015, section 3.2; as in TensorFlow Addons' triplet_semihard_loss.

    Example:
        >>> import torch
        >>> from flashpair.losses import TripletSemiHardLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> float(TripletSemiHardLoss()(embeddings, labels))
        1.0
    """

    def __init__(self, margin: float = 1.0, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("margin", margin)
        self.margin = margin

    def get_default_distance(self):
        return LpDistance(power=2)

    def check_rule(self, rule: Rule) -> None:
        refuse(rule, "TripletSemiHardLoss", bounds=True)

    def loss_of(self, problem: PairProblem) -> Tensor:
        away, nonzero = -problem.geometry.sign, self.rule().low == 0

        def formula(panel: RowPanel) -> list[Tensor]:
            position, valid = panel.members()
            near = away * panel.s.gather(1, position)
            valid = valid & (panel.counts[1] > 0)[:, None]
            chosen = away * panel.s.gather(1, next_above(panel, near, sign=away))
            losses = torch.where(valid, torch.relu(near - chosen + self.margin), 0.0)
            return [losses.sum(1), (valid & (losses > 0) if nonzero else valid).sum(1).to(losses.dtype)]

        sums, counts = problem.row_reduce(formula, "TripletSemiHardLoss")
        return reduce_sums(sums, counts, self.rule(), problem.anchor_labels)
