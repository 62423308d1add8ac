"""Paired comparisons: how probable it is that one item is better, against which one is."""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...rows import RowPanel, row_reduce
from .scores import ScoreLoss, differences


class ComparisonModel(Enum):
    """Probability that i beats j, from d = (a_i - a_j) / deviation."""

    THURSTONE = "thurstone"  # the normal distribution's Φ(d)
    BRADLEY_TERRY = "bradley_terry"  # the logistic σ(d)


class ComparisonCriterion(Enum):
    """Loss of a probability p where the target is g: 1, 0, or ½ for equal targets."""

    FIDELITY = "fidelity"  # 1 - sqrt(p g) - sqrt((1 - p) (1 - g))
    CROSS_ENTROPY = "cross_entropy"  # -g log p - (1 - g) log(1 - p)


_TINY = 1e-8  # under the roots, as in LIQE and UNIQUE


class ComparisonLoss(ScoreLoss):
    """Mean over all pairs i < j of a list of the loss of p_ij, the model's probability that i is better.

    O(n²) time, a panel of a_i - a_j at a time.

    Args:
        model: see `ComparisonModel`. Default: THURSTONE.
        criterion: see `ComparisonCriterion`. Default: FIDELITY.
        deviation: of the difference of two scores, > 0. Default 1 (LIQE); √2 is Thurstone's case V with unit variances.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a bad number or choice.

    Source: Tsai et al., "FRank: A Ranking Method with Fidelity Loss", SIGIR 2007; Zhang et al., "Blind Image Quality
    Assessment via Vision-Language Correspondence" (LIQE), CVPR 2023; Thurstone 1927; Bradley and Terry 1952.

    Example:
        >>> import torch
        >>> from flashpair.losses import ComparisonLoss
        >>> round(float(ComparisonLoss()(torch.zeros(2), torch.tensor([1.0, 0.0]))), 4)  # 1 - sqrt(1/2), about
        0.2928
    """

    def __init__(
        self,
        model: ComparisonModel = ComparisonModel.THURSTONE,
        criterion: ComparisonCriterion = ComparisonCriterion.FIDELITY,
        deviation: float = 1.0,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.member("model", model, ComparisonModel)
        checks.member("criterion", criterion, ComparisonCriterion)
        checks.number("deviation", deviation, low=0.0, open_low=True)
        self.model, self.criterion, self.deviation = model, criterion, deviation

    def _loss(self, d: Tensor, g: Tensor) -> Tensor:
        thurstone = self.model == ComparisonModel.THURSTONE
        if self.criterion == ComparisonCriterion.CROSS_ENTROPY:
            log_p = torch.special.log_ndtr if thurstone else F.logsigmoid
            return -g * log_p(d) - (1 - g) * log_p(-d)
        p, q = ((torch.special.ndtr if thurstone else torch.sigmoid)(v) for v in (d, -d))
        return 1 - (p * g + _TINY).sqrt() - (q * (1 - g) + _TINY).sqrt()

    def of(self, scores: Tensor, targets: Tensor, lists: Tensor) -> Tensor:
        index = torch.arange(len(scores), device=scores.device)

        def compared(panel: RowPanel, own: Tensor, targets: Tensor) -> list[Tensor]:
            g = (torch.sign(own[:, None] - targets[panel.column][None]) + 1) / 2
            losses = torch.where(panel.same, self._loss(panel.s / self.deviation, g), 0.0)
            return [losses.sum()]

        x, y = differences(scores)
        (total,) = row_reduce(
            x, y, compared, rows=[targets], shared=[targets], labels=lists, ref_labels=lists.clone(), exclude=index,
            within_class=True, copies=16, totals=1,
        )  # fmt: skip
        sizes = lists.unique(return_counts=True)[1]
        return total / (sizes * (sizes - 1)).sum().clamp_min(1)
