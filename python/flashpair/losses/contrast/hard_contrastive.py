"""InfoNCE against the hardest negatives of each query only."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...pairs import pair_similarity
from ...rows import RowPanel, row_reduce
from ..arguments import inverse_temperature
from ..two_views import MatchedLoss


class HardContrastiveLoss(MatchedLoss):
    """InfoNCE whose denominator keeps, beside the positive, only a query's most similar negatives.

        α_i = the ⌈fraction · (B - 1)⌉-th largest s_ij, j != i  (no gradient)
        loss = mean_i [ log( e^{s_ii / T} + Σ_{j != i: s_ij ≥ α_i} e^{s_ij / T} ) - s_ii / T ]

    Equal similarities at the threshold all stay. Whole rows of S, a panel at a time (`flashpair.row_reduce`).

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
        positive = pair_similarity(first, second, index, index, normalize=True)
        if rows == 1:
            return (positive * 0).sum() if self.simple is None else -positive.sum()
        kept = math.ceil(self.fraction * (rows - 1))

        def hardest(panel: RowPanel, *scale: Tensor) -> list[Tensor]:
            negatives = torch.where(panel.allowed, panel.s, -torch.inf)
            # NaN counts as the largest, so that it stays and shows.
            threshold = negatives.detach().topk(kept, dim=1, sorted=True).values[:, -1:]
            keep = panel.allowed & ~(panel.s < threshold)
            if self.simple is not None:
                return [torch.where(keep, panel.s, 0.0).sum(1) / keep.sum(1)]
            return [torch.where(keep, scale[0] * panel.s, -torch.inf).logsumexp(1)]

        shared = [] if self.simple is not None else [torch.as_tensor(scale, dtype=positive.dtype, device=first.device)]
        (rivals,) = row_reduce(first, second, hardest, shared=shared, exclude=index, normalize=True)
        if self.simple is not None:
            return (self.simple * rivals - positive).mean()
        return F.softplus(rivals - scale * positive, threshold=40).mean()
