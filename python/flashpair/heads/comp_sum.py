"""Losses that are functions of the cross-entropy alone: comp-sum losses, robust losses, focal loss.

With c = -log p_y every one of them is φ(c), and its gradient φ'(c) (p - onehot): one pass serves all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from .formula import Formula
from .logits import ClassLogits


def probability(logits: ClassLogits) -> Tensor:
    """(B,) p_y."""
    return torch.exp(-logits.cross_entropy)


def complement(logits: ClassLogits) -> Tensor:
    """(B,) 1 - p_y, with all its digits where p_y is near 1."""
    return torch.exp(logits.log_other)


class CompSum(Formula):
    """The comp-sum family: Φ_τ(u) = ((1 + u)^(1-τ) - 1) / (1 - τ) of u = Σ_{j≠y} exp(z_j - z_y); log(1 + u) at τ = 1.

    τ = 0 is the sum-exponential loss 1/p_y - 1, 1 cross-entropy, 1 < τ < 2 generalised cross-entropy with q = τ - 1,
    2 the mean absolute error 1 - p_y. Below τ = 1 hard rows overflow: in float32 from c = 88 / (1 - τ) on.

    Args:
        tau: τ >= 0. Default 1.

    Raises:
        TypeError, ValueError: on a negative τ.

    Source: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    section 3.

    Example:
        >>> import torch
        >>> from flashpair.heads import CompSum, class_loss
        >>> x, weight, labels = torch.zeros(1, 2), torch.eye(2), torch.tensor([0])  # p = 1/2
        >>> [round(float(class_loss(x, weight, labels, formula=CompSum(tau))), 4) for tau in (0.0, 1.0, 2.0)]
        [1.0, 0.6931, 0.5]
    """

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        checks.number("tau", tau, low=0.0)
        self.tau = tau

    def forward(self, logits: ClassLogits) -> Tensor:
        if self.tau == 1.0:
            return logits.cross_entropy
        u = (1 - self.tau) * logits.cross_entropy
        # expm1 keeps the digits of the value near 0, exp those of the slope far below.
        return torch.where(u > -0.5, torch.expm1(u), torch.exp(u) - 1) / (1 - self.tau)


class GeneralizedCrossEntropy(CompSum):
    """(1 - p_y^q) / q, the comp-sum loss of τ = 1 + q; with `truncation` k no more than its value at p_y = k.

    Args:
        q: in (0, 1]. Default 0.7.
        truncation: k in [0, 1). Default 0: none.

    Raises:
        TypeError, ValueError: on a number outside its range.

    Source: Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    NeurIPS 2018, equations 6 and 9.

    Example:
        >>> from flashpair.heads import GeneralizedCrossEntropy
        >>> GeneralizedCrossEntropy().tau
        1.7
    """

    def __init__(self, q: float = 0.7, truncation: float = 0.0) -> None:
        checks.number("q", q, low=0.0, high=1.0, open_low=True)
        checks.number("truncation", truncation, low=0.0, high=1.0)
        super().__init__(1.0 + q)
        self.q, self.truncation = q, truncation

    def forward(self, logits: ClassLogits) -> Tensor:
        losses = super().forward(logits)
        return losses.clamp_max((1 - self.truncation**self.q) / self.q) if self.truncation else losses


class MeanAbsoluteError(CompSum):
    """1 - p_y, half of Σ_j |p_j - [j = y]|.

    Source: Ghosh, Kumar, Sastry, "Robust Loss Functions under Label Noise for Deep Neural Networks", AAAI 2017, whose
    definition is the whole sum.

    Example:
        >>> from flashpair.heads import MeanAbsoluteError
        >>> MeanAbsoluteError().tau
        2.0
    """

    def __init__(self) -> None:
        super().__init__(2.0)


class Focal(Formula):
    """(1 - p_y)^γ (-log p_y).

    Args:
        gamma: γ >= 0. Default 2.

    Raises:
        TypeError, ValueError: on a negative γ.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.heads import Focal, class_loss
        >>> round(float(class_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([0]), formula=Focal(gamma=0.0))), 4)
        0.6931
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        checks.number("gamma", gamma, low=0.0)
        self.gamma = gamma

    def forward(self, logits: ClassLogits) -> Tensor:
        return torch.exp(self.gamma * logits.log_other) * logits.cross_entropy


class AUL(Formula):
    """Asymmetric unhinged loss, ((a - p_y)^q - (a - 1)^q) / q.

    Args:
        a: > 1. Default 1.5.
        q: > 0. Default 0.9.

    Raises:
        TypeError, ValueError: on a number outside its range.

    Source: Zhou et al., "Asymmetric Loss Functions for Learning with Noisy Labels", ICML 2021, section 4.

    Example:
        >>> import torch
        >>> from flashpair.heads import AUL, class_loss
        >>> formula = AUL(a=2.0, q=1.0)  # 1 - p
        >>> round(float(class_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([0]), formula=formula)), 4)
        0.5
    """

    def __init__(self, a: float = 1.5, q: float = 0.9) -> None:
        super().__init__()
        checks.number("a", a, low=1.0, open_low=True)
        checks.number("q", q, low=0.0, open_low=True)
        self.a, self.q = a, q

    def forward(self, logits: ClassLogits) -> Tensor:
        low = self.a - 1
        # (low + r)^q - low^q with the digits of a small r = 1 - p.
        return low**self.q * torch.expm1(self.q * torch.log1p(complement(logits) / low)) / self.q


class AGCE(Formula):
    """Asymmetric generalised cross-entropy, ((a + 1)^q - (a + p_y)^q) / q.

    Args:
        a: > 0. Default 1.
        q: > 0. Default 2.

    Raises:
        TypeError, ValueError: on a number outside its range.

    Source: Zhou et al., "Asymmetric Loss Functions for Learning with Noisy Labels", ICML 2021, section 4.

    Example:
        >>> import torch
        >>> from flashpair.heads import AGCE, class_loss
        >>> formula = AGCE(a=1.0, q=1.0)  # 1 - p
        >>> round(float(class_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([0]), formula=formula)), 4)
        0.5
    """

    def __init__(self, a: float = 1.0, q: float = 2.0) -> None:
        super().__init__()
        checks.number("a", a, low=0.0, open_low=True)
        checks.number("q", q, low=0.0, open_low=True)
        self.a, self.q = a, q

    def forward(self, logits: ClassLogits) -> Tensor:
        top = self.a + 1
        return -(top**self.q) * torch.expm1(self.q * torch.log1p(-complement(logits) / top)) / self.q


class SymmetricCrossEntropy(Formula):
    """α CE + β RCE with the reverse cross-entropy RCE = -A (1 - p_y), log 0 being A.

    Args:
        alpha, beta: weights >= 0. Default 0.5 each.
        log_zero: A < 0. Default -4.

    Raises:
        TypeError, ValueError: on a number outside its range.

    Source: Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019, equations 6-8.

    Example:
        >>> import torch
        >>> from flashpair.heads import SymmetricCrossEntropy, class_loss
        >>> formula = SymmetricCrossEntropy(alpha=0.0, beta=1.0)
        >>> float(class_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([0]), formula=formula))
        2.0
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5, log_zero: float = -4.0) -> None:
        super().__init__()
        checks.number("alpha", alpha, low=0.0)
        checks.number("beta", beta, low=0.0)
        checks.number("log_zero", log_zero, high=0.0)
        self.alpha, self.beta, self.log_zero = alpha, beta, log_zero

    def forward(self, logits: ClassLogits) -> Tensor:
        return self.alpha * logits.cross_entropy - self.beta * self.log_zero * complement(logits)


class JensenShannon(Formula):
    """Scaled Jensen-Shannon divergence between the one-hot label (weight π) and the prediction (weight 1 - π).

        [-π log m - (1-π) ((1-p) log(1-π) - p log(p/m))] / (-(1-π) log(1-π)),    m = π + (1-π) p_y

    π → 0 is cross-entropy, π → 1 the mean absolute error.

    Args:
        pi: π in (0, 1). Default 0.5.

    Raises:
        TypeError, ValueError: on a π outside (0, 1).

    Source: Englesson, Azizpour, "Generalized Jensen-Shannon Divergence Loss for Learning with Noisy Labels", NeurIPS
    2021, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.heads import JensenShannon, class_loss
        >>> far = torch.tensor([[100.0, -100.0]])  # all on the first class: the least value, and the greatest
        >>> values = [float(class_loss(far, torch.eye(2), torch.tensor([y]), formula=JensenShannon())) for y in (0, 1)]
        >>> [round(v, 4) for v in values]
        [0.0, 2.0]
    """

    def __init__(self, pi: float = 0.5) -> None:
        super().__init__()
        checks.number("pi", pi, low=0.0, high=1.0, open_low=True)
        if pi == 1.0:
            raise ValueError("pi must be in (0, 1); got 1.0")
        self.pi = pi

    def forward(self, logits: ClassLogits) -> Tensor:
        rest, rival = 1 - self.pi, complement(logits)
        # Of m = 1 - (1-π) (1-p): log m without losing what is near 0.
        log_m = torch.log1p(-rest * rival)
        divergence = -self.pi * log_m - rest * (
            rival * math.log(rest) + probability(logits) * (logits.cross_entropy + log_m)
        )
        return divergence / (-rest * math.log(rest))


class NormalizedCrossEntropy(Formula):
    """Cross-entropy over its sum for all labels, (L - z_y) / Σ_j (L - z_j).

    Source: Ma et al., "Normalized Loss Functions for Deep Learning with Noisy Labels", ICML 2020, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.heads import NormalizedCrossEntropy, class_loss
        >>> float(class_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([0]), formula=NormalizedCrossEntropy()))
        0.5
    """

    extras = ("sum",)

    def forward(self, logits: ClassLogits) -> Tensor:
        return logits.cross_entropy / (logits.classes * logits.lse - logits.sum)
