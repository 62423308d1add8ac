"""InfoNCE against the hardest negatives of each query only."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...pairs import pair_similarity
from ...primitives import pair_reduce
from ...rows import RowPanel, row_reduce
from ...terms import Mask, Reduction, Term
from ..arguments import inverse_temperature
from ..two_views import MatchedLoss


class HardContrastiveLoss(MatchedLoss):
    """InfoNCE whose denominator keeps, beside the positive, only a query's most similar negatives.

        α_i = the ⌈fraction · (B - 1)⌉-th largest s_ij, j != i  (no gradient)
        loss = mean_i [ log( e^{s_ii / T} + Σ_{j != i: s_ij ≥ α_i} e^{s_ij / T} ) - s_ii / T ]

    Equal similarities at the threshold all stay. Whole rows of S for the threshold, a panel at a time, then one fused
    pass.

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 0.1.
        fraction: in (0, 1], how many of the negatives stay. Default 0.0819, that is 4095 of 50,000.
        simple: -s_ii + weight · Σ_{j kept} s_ij / (number kept) instead of the log-sum, the paper's "hard simple" loss.
            Default: none, a number is that weight.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a number out of its range.

    Source: Wang and Liu, "Understanding the Behaviour of Contrastive Loss", CVPR 2021, section 4. Not verified: the
    paper's own text was not at hand. Assumed: the threshold counts the kept one in, its gradient is dropped, and
    the simple form is a mean over the kept negatives.

    Example:
        >>> import torch
        >>> from flashpair.losses import HardContrastiveLoss
        >>> x = torch.eye(4)
        >>> round(float(HardContrastiveLoss(temperature=1.0, fraction=1.0)(x, x)), 4)  # log(e + 3) - 1
        0.7437
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, fraction: float = 0.0819, simple: float | None = None, group=None
    ) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        checks.number("fraction", fraction, low=0.0, high=1.0, open_low=True)
        if simple is not None:
            checks.number("simple", simple, low=0.0)
        self.temperature, self.fraction, self.simple = temperature, fraction, simple

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        scale, rows = inverse_temperature(self.temperature), first.shape[0]
        index = torch.arange(rows, device=first.device)
        if rows == 1:
            positive = pair_similarity(first, second, index, index, normalize=True)
            return (positive * 0).sum() if self.simple is None else -positive.sum()
        kept = math.ceil(self.fraction * (rows - 1))
        pairs = {"labels": index, "ref_labels": index, "normalize": True}
        hardest = {"mask": Mask.DIFFERENT, "above": thresholds(first, second, kept)}
        if self.simple is not None:
            terms = [Term(Reduction.SUM, **hardest), Term(Reduction.COUNT, scale=0.0, offset=1.0, **hardest)]
            rivals, count, positive = pair_reduce(first, second, [*terms, Term(Reduction.SUM, mask=Mask.SAME)], **pairs)
            return (self.simple * rivals / count - positive).mean()
        terms = [Term(Reduction.LOGSUMEXP, scale=scale, **hardest), Term(Reduction.SUM, mask=Mask.SAME, scale=scale)]
        rivals, positive = pair_reduce(first, second, terms, **pairs)
        return F.softplus(rivals - positive, threshold=40).mean()


@torch.no_grad()
def thresholds(first: Tensor, second: Tensor, kept: int) -> Tensor:
    """(B,) below the kept-th largest cosine of a row with the other samples, and above the next, if not equal.

    Half-way between both, so that another pass, which rounds otherwise, keeps the same ones.
    """

    def quantile(panel: RowPanel) -> list[Tensor]:
        negatives = torch.where(panel.allowed, panel.s, -torch.inf)
        last = negatives.kthvalue(negatives.shape[1] - kept + 1, dim=1).values  # NaN counts as the largest
        following = torch.where(negatives < last[:, None], negatives, -torch.inf).amax(1)
        return [last - ((last - following) / 2).clamp_min(8 * torch.finfo(last.dtype).eps)]

    index = torch.arange(first.shape[0], device=first.device)
    return row_reduce(first, second, quantile, exclude=index, normalize=True, copies=4)[0]
