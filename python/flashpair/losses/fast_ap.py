"""FastAP: average precision from histograms of distances."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..rows import RowPanel
from ..terms import Mask
from .geometry import require
from .metric import MetricLoss
from .peer import LpDistance
from .problem import PairProblem
from .ranks import row_histogram
from .reducers import reduce_values


class FastAPLoss(MetricLoss):
    """Average precision of each anchor's ranking, with distances quantised into soft bins.

        loss_i = 1 - (1 / |P_i|) Σ_l h⁺_l H⁺_l / H_l

    with h⁺ the soft histogram of distances to positives over `num_bins + 1` nodes, h that to all, H their cumulative
    sums. pytorch-metric-learning's class: same constructor, same call, same histogram range [0, 2^power];
    `indices_tuple` weights the anchors. Anchors without positives have no loss. `ref_emb` is served too.

    Args:
        num_bins: default 10.
        **kwargs: see `MetricLoss`. The distance is LpDistance of normalised embeddings (default: power 2); default
            reducer: MeanReducer, over anchors with positives.

    Raises:
        ValueError, TypeError: on a bad number, an unsupported distance or reducer, or a call without labels.

    Source: Cakir et al., "Deep Metric Learning to Rank", CVPR 2019, equation 6. (The authors' hand-written gradient
    lacks two factors; this is the derivative.)

    Example:
        >>> import torch
        >>> from flashpair.losses import FastAPLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(FastAPLoss()(embeddings, labels)), 4)  # all at one distance: precision 1/3
        0.6667
    """

    weighs_rows = True

    def __init__(self, num_bins: int = 10, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.count("num_bins", num_bins)
        self.num_bins = num_bins

    def check_distance(self) -> None:
        require(self.distance, "FastAPLoss", (LpDistance,), normalized=True)

    def get_default_distance(self):
        return LpDistance(power=2)

    def loss_of(self, problem: PairProblem) -> Tensor:
        high = 2.0**self.distance.power

        def formula(panel: RowPanel) -> list[Tensor]:
            positive, everything = (row_histogram(panel, m, 0.0, high, self.num_bins) for m in (Mask.SAME, Mask.ALL))
            below, rank = positive.cumsum(1), everything.cumsum(1)
            some = (positive * below > 0) & (rank > 0)
            share = torch.where(some, positive * below / torch.where(some, rank, 1.0), 0.0)
            return [share.sum(1), panel.counts[0]]

        precision, positives = problem.row_reduce(formula, "FastAPLoss")
        losses = (1 - precision / positives.clamp_min(1)) * problem.row_weights()
        return reduce_values(losses, self.rule(), positives > 0, problem.anchor_labels)
