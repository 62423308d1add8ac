"""Negatives corrected for false ones, and weighted by their hardness."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...terms import Mask, Reduction, Term
from ..two_views import MatchedLoss, TwoViews


class HardNegativeContrastiveLoss(MatchedLoss):
    """NT-Xent whose negatives are weighted by their hardness and corrected for those of the anchor's own class.

        R_i = N Σ_n p_in e^{s_in / T},   p_i the softmax of β s_in / T over the N = 2 B - 2 negatives
        G_i = max( (R_i - τ⁺ N e^{s_i+ / T}) / (1 - τ⁺),  N e^{-1 / T} )
        l_i = log(1 + G_i e^{-s_i+ / T}),    mean over the 2 B views

    Computed from logarithms, so that no temperature overflows. At the floor of G an anchor's negatives have no
    gradient.

    Args:
        temperature: T > 0. Default 0.5.
        tau_plus: τ⁺ in [0, 1), the probability that a negative is of the anchor's class. Default 0.1.
        beta: β ≥ 0, how much harder negatives weigh more. Default 1.
        detach_weights: no gradient through p, which is the reading of importance sampling; the authors' code lets it
            through, and so attracts easy negatives. Default False.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a number out of its range.

    Source: Robinson et al., "Contrastive Learning with Hard Negative Samples", ICLR 2021, equation 4; joshr17/HCL.

    Example:
        >>> import torch
        >>> from flashpair.losses import HardNegativeContrastiveLoss
        >>> x = torch.eye(2)  # two negatives at 0: R = 2, G = (2 - 0.2 e^2) / 0.9
        >>> round(float(HardNegativeContrastiveLoss()(x, x)), 4)  # log(1 + G / e^2)
        0.0756
    """

    def __init__(
        self,
        temperature: float = 0.5,
        tau_plus: float = 0.1,
        beta: float = 1.0,
        detach_weights: bool = False,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        checks.number("tau_plus", tau_plus, low=0.0)
        checks.number("beta", beta, low=0.0)
        if tau_plus >= 1:
            raise ValueError(f"tau_plus must be below 1; got {tau_plus}")
        self.temperature, self.tau_plus, self.beta, self.detach_weights = temperature, tau_plus, beta, detach_weights

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        scale, negatives = 1 / self.temperature, 2 * (first.shape[0] - 1)
        sums = [Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=(self.beta + 1) * scale)]
        if self.beta:
            sums.append(Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=self.beta * scale))
        positive, hard, *easy = TwoViews(first, second).reduce(Term(Reduction.SUM, mask=Mask.SAME, scale=scale), *sums)
        if negatives == 0:
            return (positive * 0).sum()
        log_r = hard
        if self.beta:
            log_r = hard - easy[0] + math.log(negatives)
            if self.detach_weights:
                log_r = log_r.detach() + (hard - hard.detach()) / (self.beta + 1)
        floor = math.log(negatives) - scale
        log_g = log_r
        if self.tau_plus:
            false = positive + math.log(self.tau_plus * negatives) - log_r
            left = torch.where(false < 0, -torch.expm1(torch.where(false < 0, false, -1.0)), 0.0)
            log_g = torch.where(left > 0, log_r + torch.log(torch.where(left > 0, left, 1.0)), floor - 1)
            log_g = log_g - math.log1p(-self.tau_plus)
        log_g = torch.where(log_g > floor, log_g, floor + 0 * log_r.detach())
        return F.softplus(log_g - positive, threshold=40).mean()


class DebiasedContrastiveLoss(HardNegativeContrastiveLoss):
    """`HardNegativeContrastiveLoss` with β = 0: negatives corrected for those of the anchor's own class.

    Args:
        temperature, tau_plus, group: see `HardNegativeContrastiveLoss`.

    Source: Chuang et al., "Debiased Contrastive Learning", NeurIPS 2020, equation 8; chingyaoc/DCL.

    Example:
        >>> import torch
        >>> from flashpair.losses import DebiasedContrastiveLoss, SimCLRLoss
        >>> x, y = torch.randn(2, 6, 4)  # without a correction it is NT-Xent
        >>> bool(torch.isclose(DebiasedContrastiveLoss(0.5, tau_plus=0.0)(x, y), SimCLRLoss(0.5)(x, y), rtol=1e-4))
        True
    """

    def __init__(self, temperature: float = 0.5, tau_plus: float = 0.1, group=None) -> None:
        super().__init__(temperature, tau_plus, beta=0.0, group=group)
