"""ADR-MSE: how far the ranks that the scores give are from those that the targets give."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...label_order import label_order
from ...primitives import pair_reduce
from ...terms import Mask, Reduction, Score, Term
from .lambda_loss import ranks_in_lists
from .scores import ScoreLoss


class ADRMSELoss(ScoreLoss):
    """Approximate discounted rank MSE: `mean over all items of  (r_i - r̂_i)² / log2(1 + r_i)`.

        r̂_i = 1 + Σ_{j ≠ i in the list} σ( α (a_j - a_i) ),   r_i the rank of y_i in the list, the largest first

    Items with one target share the mean of their ranks, which equal scores reach. σ(z) = ½ + ½ tanh(z / 2), so that r̂
    is one fused pass in which nothing is multiplied.

    Args:
        alpha: α > 0. Default 1.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`: lists may span its ranks.
            Default: none.

    Raises:
        TypeError, ValueError: on a bad number.

    Source: Schlatt et al., "Rank-DistiLLM: Closing the Effectiveness Gap Between Cross-Encoders and LLMs for Passage
    Re-ranking", ECIR 2025; sentence-transformers, cross_encoder/losses/adr_mse.py, which has the mean of tied ranks and
    the mean over items of all lists. The paper's text was not read.

    Example:
        >>> import torch
        >>> from flashpair.losses import ADRMSELoss
        >>> a = torch.zeros(2)  # both ranks are 1.5: (½)² / log2(2) and (½)² / log2(3)
        >>> round(float(ADRMSELoss()(a, torch.tensor([1.0, 0.0]))), 4)
        0.2039
    """

    def __init__(self, alpha: float = 1.0, group=None) -> None:
        super().__init__(group=group)
        checks.number("alpha", alpha, low=0.0, open_low=True)
        self.alpha = alpha

    def of(self, scores: Tensor, targets: Tensor, lists: Tensor) -> Tensor:
        half = self.alpha / 2 * scores
        above = Term(
            Reduction.SUM, Score.SOFTCAP, Mask.SAME, scale=0.0, offset=-half, other_offset=half, constant=1.0
        )  # fmt: skip
        (tanh,) = pair_reduce(scores.new_ones(len(scores), 1), None, [above], labels=lists)
        size = label_order(lists, None, None).count
        # Equal targets stand in their order both times, so the mean is that of their ranks.
        ranks = (ranks_in_lists(targets, lists) + size + 1 - ranks_in_lists(-targets, lists)) / 2
        found = (size + 1 + tanh) / 2
        return ((ranks - found).square() / torch.log2(1 + ranks)).mean()
