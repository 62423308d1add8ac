"""Smooth-AP."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..rows import RowPanel
from ..terms import Mask
from .geometry import require
from .metric import MetricLoss
from .peer import CosineSimilarity
from .problem import PairProblem
from .ranks import soft_ranks
from .reducers import reduce_values


class SmoothAPLoss(MetricLoss):
    """Average precision of each query with sigmoids for the steps of the ranks.

        loss_q = 1 - (1 / |C_q|) Σ_{p in C_q} R⁺_qp / R_qp,    R_qp = 1 + Σ_{k ≠ p} σ((s_qk - s_qp) / τ)

    where C_q is the query's class with the query itself, R counts over the whole batch, R⁺ over the class. Any class
    sizes, in any order. pytorch-metric-learning's class: same constructor, same call; it takes the class size for the
    number of classes, so that its value is only this one where both are equal and labels are sorted, and stores
    (B, B, B). `indices_tuple` weights the queries. With `ref_emb` the class is that of the references.

    Args:
        temperature: τ > 0. Default 0.01.
        **kwargs: see `MetricLoss`. The distance is CosineSimilarity; default reducer: MeanReducer, over queries.

    Raises:
        ValueError, TypeError: on a bad number, an unsupported distance or reducer, or a call without labels.

    Source: Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval", ECCV 2020, equation 6.

    Example:
        >>> import torch
        >>> from flashpair.losses import SmoothAPLoss
        >>> embeddings, labels = torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])
        >>> round(float(SmoothAPLoss()(embeddings, labels)), 4)
        0.0
    """

    weighs_rows = True

    def __init__(self, temperature: float = 0.01, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        self.temperature = temperature

    def _sub_loss_names(self) -> list[str]:
        return ["ap_loss"]

    def check_distance(self) -> None:
        require(self.distance, "SmoothAPLoss", (CosineSimilarity,))

    def loss_of(self, problem: PairProblem) -> Tensor:
        own = problem.y is None

        def formula(panel: RowPanel) -> list[Tensor]:
            position, valid = panel.members(own)
            points = torch.where(valid, panel.s.gather(1, position), 0.0)
            scale = 1 / self.temperature
            half = 0.5  # the sigmoid of k = p, which does not count
            rank = 1 - half + soft_ranks(panel, Mask.ALL, points, scale, own=own)
            among = 1 - half + soft_ranks(panel, Mask.SAME, points, scale, own=own)
            return [torch.where(valid, among / rank, 0.0).sum(1), valid.sum(1)]

        precision, members = problem.row_reduce(formula, "SmoothAPLoss")
        losses = (1 - precision / members.clamp_min(1)) * problem.row_weights()
        return reduce_values(losses, self.rule("ap_loss"), members > 0, problem.anchor_labels)
