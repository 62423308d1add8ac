"""InfoNCE against the hardest negatives of each query only."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import backend_cpu, checks, rows_cpu
from ...pairs import pair_similarity
from ...request import statistics_dtype
from ...rows import RowPanel, row_reduce
from ..arguments import inverse_temperature
from ..closed_form import total_with_slopes
from ..two_views import MatchedLoss


class HardContrastiveLoss(MatchedLoss):
    """InfoNCE whose denominator keeps, beside the positive, only a query's most similar negatives.

        α_i = the ⌈fraction · (B - 1)⌉-th largest s_ij, j != i  (no gradient)
        loss = mean_i [ log( e^{s_ii / T} + Σ_{j != i: s_ij ≥ α_i} e^{s_ij / T} ) - s_ii / T ]

    Similarities that equal the threshold, within 8 units of rounding at 1, all stay. Whole rows of S, a panel at a
    time.

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
        rows = first.shape[0]
        index = torch.arange(rows, device=first.device)
        if rows == 1:
            positive = pair_similarity(first, second, index, index, normalize=True)
            return (positive * 0).sum() if self.simple is None else -positive.sum()
        scale = inverse_temperature(self.temperature)
        scale = torch.as_tensor(scale, dtype=statistics_dtype(first), device=first.device)
        kept = math.ceil(self.fraction * (rows - 1))

        def hardest(panel: RowPanel, scale: Tensor) -> list[Tensor]:
            with torch.no_grad():
                total, of_s, of_scale = self._slopes(panel, kept, scale)
            return [total_with_slopes(total, (panel.s, of_s), (scale, of_scale))]

        (total,) = row_reduce(first, second, hardest, exclude=index, normalize=True, shared=[scale], totals=1, copies=5)
        return total / rows

    def _slopes(self, panel: RowPanel, kept: int, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Total of a panel's rows, its derivatives in s and in the scale."""
        s = panel.s.detach()
        if backend_cpu.at_hand(s):
            return rows_cpu.hardest(s, panel.own, kept, scale, self.simple, panel.s.requires_grad)
        return (self._log_sum if self.simple is None else self._mean)(s, panel.own[:, None], kept, scale)

    def _log_sum(self, s: Tensor, own: Tensor, kept: int, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """With the log-sum."""
        positive, (rivals, among) = s.gather(1, own), _hardest(s, own, kept)
        top = rivals.amax(1, keepdim=True)
        weights = rivals.sub_(top).mul_(scale).exp_().mul_(among)
        total = weights.sum(1, keepdim=True)
        gap = total.log() + scale * (top - positive)
        share = gap.sigmoid()
        of_scale = None
        if scale.requires_grad:
            of_scale = (share * (torch.mul(weights, s, out=among).sum(1, keepdim=True) / total - positive)).sum()
        of_s = weights.mul_(scale * share / total).scatter_(1, own, -scale * share)
        return F.softplus(gap, threshold=40).sum(), of_s, of_scale

    def _mean(self, s: Tensor, own: Tensor, kept: int, scale: Tensor) -> tuple[Tensor, Tensor, None]:
        """Of the simple loss, which has no scale."""
        among = _hardest(s, own, kept)[1]
        of_s = among.mul_(self.simple / among.sum(1, keepdim=True)).scatter_(1, own, -1.0)
        return (of_s * s).sum(), of_s, None


def _hardest(s: Tensor, own: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """(b, n) s with -inf at each row's own column, and 1 where it is among the row's `kept` largest, 0 elsewhere.

    Those level with the last one, but for rounding, are among them.
    """
    others = s.scatter(1, own, -torch.inf)
    rank, among = s.shape[1] - kept, others.clone()  # from 0, smallest first; NaN counts as the largest
    last = among.kthvalue(rank + 1, dim=1, keepdim=True).values
    return others, torch.gt(others, last - 8 * torch.finfo(s.dtype).eps, out=among)
