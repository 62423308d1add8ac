"""RankNet: of two items the one with the higher target must score higher."""

from __future__ import annotations

from torch import Tensor

from ... import checks
from ...primitives import pair_reduce
from ...terms import Mask, Reduction, Score, Term
from .scores import ScoreLoss


class RankNetLoss(ScoreLoss):
    """`mean over pairs of a list with y_i > y_j of  softplus( -σ (a_i - a_j) )`.

    One fused pass in which nothing is multiplied: the "similarity" is the other's target, which the own one bounds.

    Args:
        sigma: σ > 0. Default 1.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`: lists may span its ranks.
            Default: none.

    Raises:
        TypeError, ValueError: on a bad number.

    Source: Burges et al., "Learning to Rank using Gradient Descent", ICML 2005, equation 3; Burges, "From RankNet to
    LambdaRank to LambdaMART", 2010, section 2.

    Example:
        >>> import torch
        >>> from flashpair.losses import RankNetLoss
        >>> round(float(RankNetLoss()(torch.zeros(3), torch.tensor([2, 1, 1]))), 4)  # two pairs, log 2 each
        0.6931
    """

    def __init__(self, sigma: float = 1.0, group=None) -> None:
        super().__init__(group=group)
        checks.number("sigma", sigma, low=0.0, open_low=True)
        self.sigma = sigma

    def of(self, scores: Tensor, targets: Tensor, lists: Tensor) -> Tensor:
        lower = {"mask": Mask.SAME, "scale": 0.0, "below": targets}
        gaps = {"offset": -self.sigma * scores, "other_offset": self.sigma * scores}
        terms = [Term(Reduction.SUM, Score.SOFTPLUS, **gaps, **lower), Term(Reduction.COUNT, offset=1.0, **lower)]
        ones = targets.new_ones(len(scores), 1)
        sums, pairs = pair_reduce(ones, targets[:, None], terms, labels=lists, ref_labels=lists.clone())
        return sums.sum() / pairs.sum().clamp_min(1)
