"""MACL: a temperature that follows the alignment of the positives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...terms import Mask, Reduction, Term
from ..two_views import MatchedLoss, TwoViews

_EPSILON = 1e-8  # lightly's, in the weights


class MACLLoss(MatchedLoss):
    """NT-Xent at a temperature that rises as positives align, each anchor weighted by how hard it still is.

        T_A = T (1 + α (A - A₀)),   A = mean_i s_i+
        P_i = e^{s_i+ / T_A} / Σ_{k != i} e^{s_ik / T_A},   loss = mean_i  -log P_i / (1 - P_i)

    over the 2 B views; T_A and 1 - P take no gradient. lightly's class, same arguments.

    Args:
        temperature: T > 0. Default 0.1.
        alpha: α in [0, 1]. Default 0.5.
        A_0: A₀ in [0, 1], with α (1 + A₀) < 1 so that T_A stays positive. Default 0.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a number out of its range.

    Source: Huang et al., "Model-Aware Contrastive Learning: Towards Escaping the Dilemmas", ICML 2023, algorithm 1,
    read through lightly's MACLLoss.

    Example:
        >>> import torch
        >>> from flashpair.losses import MACLLoss, SimCLRLoss
        >>> x, y = torch.randn(2, 6, 4)
        >>> bool(MACLLoss(0.5, alpha=0.0)(x, y) > SimCLRLoss(0.5)(x, y))  # weights are above 1
        True
    """

    def __init__(self, temperature: float = 0.1, alpha: float = 0.5, A_0: float = 0.0, group=None) -> None:
        super().__init__(group=group)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        checks.number("alpha", alpha, low=0.0, high=1.0)
        checks.number("A_0", A_0, low=0.0, high=1.0)
        if alpha * (1 + A_0) >= 1:
            raise ValueError(f"alpha * (1 + A_0) must be below 1; got {alpha} * (1 + {A_0})")
        self.temperature, self.alpha, self.A_0 = temperature, alpha, A_0

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        views = TwoViews(first, second)
        (similarity,) = views.reduce(Term(Reduction.SUM, mask=Mask.SAME))
        warmth = self.temperature * (1 + self.alpha * (similarity.detach().mean() - self.A_0))
        negatives, positive = views.logits(1 / warmth)
        gap = negatives - positive
        weights = 1 / (torch.sigmoid(gap.detach()) + _EPSILON)  # 1 - P
        return (weights * F.softplus(gap, threshold=40)).mean()
