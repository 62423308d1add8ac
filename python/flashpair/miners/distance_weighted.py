"""Distance-weighted sampling of negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..losses.geometry import require
from ..losses.peer import LpDistance
from ..losses.problem import PairProblem
from ..random import draw_seed, integers, uniform
from ..rows import RowPanel, row_reduce
from .base import Miner


class DistanceWeightedMiner(Miner):
    """Negatives drawn so that all distances come up alike, each with a random positive.

        P(n | a) ∝ 1 / q(max(d_an, cutoff))  for d_an < nonzero_loss_cutoff,     q(d) = d^{D-2} (1 - d²/4)^{(D-3)/2}

    q is the density of distances of random unit vectors. Each anchor draws as many triplets as its class has columns,
    with replacement. pytorch-metric-learning's class: same constructor, same call; it divides the weights by their
    largest over the whole batch, so that most rows underflow and are lost as soon as one negative is near; here every
    row has its own largest. Sampling is Gumbel-max with counter-based random numbers: one pass, no normaliser, and
    the same triplets for the same seed on every device.

    Args:
        cutoff: default 0.5.
        nonzero_loss_cutoff: default 1.4.
        distance: LpDistance of normalised embeddings, power 1.
        group: ranks whose batches are mined as one, as in `MetricLoss`; the selection is of all of them. Default: none.

    Raises:
        TypeError, ValueError: on a bad number or another distance.

    Source: Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, section 4, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.miners import DistanceWeightedMiner
        >>> x, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> anchors, positives, negatives = DistanceWeightedMiner(nonzero_loss_cutoff=2.1)(x, labels)
        >>> bool((labels[anchors] == labels[positives]).all() & (labels[anchors] != labels[negatives]).all())
        True
    """

    def __init__(
        self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4, distance=None, collect_stats=None, group=None
    ) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats, group=group)
        checks.number("cutoff", cutoff, low=0.0, high=2.0, open_low=True)
        checks.number("nonzero_loss_cutoff", nonzero_loss_cutoff)
        require(self.distance, "DistanceWeightedMiner", (LpDistance,), normalized=True, powers=(1,))
        self.cutoff = float(cutoff)
        self.nonzero_loss_cutoff = float(nonzero_loss_cutoff)

    def select(self, problem: PairProblem) -> tuple[Tensor, Tensor, Tensor]:
        seed, features = draw_seed(), problem.x.shape[1]
        columns = problem.labels if problem.ref_labels is None else problem.ref_labels
        draws = int(torch.unique(columns, return_counts=True)[1].max()) if columns.numel() else 0

        def formula(panel: RowPanel) -> list[Tensor]:
            d = panel.s.clamp_min(self.cutoff)
            log_weight = (2.0 - features) * d.log() - (features - 3) / 2 * torch.log1p(-0.25 * d * d)
            allowed = panel.different & (panel.s < self.nonzero_loss_cutoff) & log_weight.isfinite()
            log_weight = log_weight.masked_fill(~allowed, -torch.inf)
            negative = torch.empty(len(panel.row), draws, dtype=torch.long, device=d.device)
            for k in range(draws):
                noise = uniform(seed + k, panel.row[:, None], panel.column[None, :], d.dtype)
                negative[:, k] = panel.column[(log_weight - (-noise.log()).log()).argmax(1)]
            position, valid = panel.members()
            present = valid.sum(1)
            step = torch.arange(draws, device=d.device)[None, :]
            pick = integers(seed - 1, panel.row[:, None], step, present[:, None])
            ordered = torch.argsort(~valid, dim=1, stable=True)
            pick = pick.clamp_max(max(ordered.shape[1] - 1, 0))
            positive = panel.column[position.gather(1, ordered).gather(1, pick)] if ordered.shape[1] else pick
            some = (allowed.any(1) & (present > 0))[:, None] & (step < panel.count[:, None])
            return [torch.where(some, positive, -1), negative]

        positive, negative = row_reduce(
            problem.x, problem.y, formula,
            labels=problem.labels, ref_labels=problem.ref_labels, exclude=problem.exclude,
            similarity=problem.geometry.similarity, normalize=True,
        )  # fmt: skip
        anchors, draw = (positive >= 0).nonzero(as_tuple=True)
        return anchors, positive[anchors, draw], negative[anchors, draw]
