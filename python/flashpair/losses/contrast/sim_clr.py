"""SimCLR's NT-Xent: the other view of a sample among all views of the batch."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from ... import checks
from ...formulas import MEAN_GAP
from ...primitives import pair_loss
from ..arguments import inverse_temperature
from ..two_views import MatchedLoss, TwoViews


class SimCLRReduction(Enum):
    """How the losses of the 2 B anchors become one number."""

    MEAN = "mean"  # over all anchors: the paper, lightly
    SUM_OF_VIEWS = "sum_of_views"  # the means of both views, added: google-research/simclr, twice as much


class SimCLRLoss(MatchedLoss):
    """Each view must find the other view of its sample among the 2 B - 1 others.

        l_i = LSE_{k != i} s_ik / T  -  s_i+ / T,    s the cosine of two of the 2 B views, i+ the other view of i
        loss = mean of l over the 2 B anchors (or the means of both views, added)

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 0.1.
        reduction: see `SimCLRReduction`. Default: mean.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`: the views of all its ranks.
            Default: none.

    Raises:
        TypeError, ValueError: on a temperature that is not positive, or another reduction.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, equation 1;
    google-research/simclr, objective.py.

    Example:
        >>> import torch
        >>> from flashpair.losses import SimCLRLoss
        >>> round(float(SimCLRLoss(temperature=1.0)(torch.eye(2), torch.eye(2))), 4)  # log(e + 2) - 1
        0.5514
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, reduction: SimCLRReduction = SimCLRReduction.MEAN, group=None
    ) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        checks.member("reduction", reduction, SimCLRReduction)
        self.temperature, self.reduction = temperature, reduction

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        views = TwoViews(first, second)
        terms = views.logit_terms(inverse_temperature(self.temperature))
        loss, *_ = pair_loss(views.both, None, terms, MEAN_GAP, labels=views.sample, normalize=True)
        return 2 * loss if self.reduction == SimCLRReduction.SUM_OF_VIEWS else loss
