"""Losses of multi-label logits that the contrastive ones are compared with; no pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...request import statistics_dtype


class ZLPRLoss(nn.Module):
    """`mean_i [ log(1 + Σ_{c not in y_i} e^{z_ic}) + log(1 + Σ_{c in y_i} e^{-z_ic}) ]` of logits z (B, C).

    Source: Su et al., "ZLPR: A Novel Loss for Multi-label Classification", 2022, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.losses import ZLPRLoss
        >>> round(float(ZLPRLoss()(torch.zeros(1, 3), torch.tensor([[1, 0, 0]]))), 4)  # log 3 + log 2
        1.7918
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (B, C) and multi-hot labels (B, C)."""
        logits, present = _checked(logits, labels)
        zero = logits.new_zeros(len(logits), 1)
        absent = torch.cat([zero, logits.masked_fill(present, -torch.inf)], 1).logsumexp(1)
        wanted = torch.cat([zero, (-logits).masked_fill(~present, -torch.inf)], 1).logsumexp(1)
        return (absent + wanted).sum() / max(len(logits), 1)


class AsymmetricLoss(nn.Module):
    """ASL: binary cross-entropy whose easy negatives count less than easy positives; mean over rows.

        -[ y (1 - p)^γ₊ log p + (1 - y) q^γ₋ log(1 - q) ],   p = σ(z), q = [p - m]_+,   summed over labels

    Args:
        gamma_neg, gamma_pos: γ₋, γ₊ ≥ 0. Default 1 and 0, the comprehensive study's.
        clip: m in [0, 1]. Default 0.

    Source: Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021, equations 4-6.

    Example:
        >>> import torch
        >>> from flashpair.losses import AsymmetricLoss
        >>> round(float(AsymmetricLoss(0.0)(torch.zeros(1, 3), torch.tensor([[1, 0, 0]]))), 4)  # 3 log 2
        2.0794
    """

    def __init__(self, gamma_neg: float = 1.0, gamma_pos: float = 0.0, clip: float = 0.0) -> None:
        super().__init__()
        checks.number("gamma_neg", gamma_neg, low=0.0)
        checks.number("gamma_pos", gamma_pos, low=0.0)
        checks.number("clip", clip, low=0.0, high=1.0)
        self.gamma_neg, self.gamma_pos, self.clip = gamma_neg, gamma_pos, clip

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (B, C) and multi-hot labels (B, C)."""
        logits, present = _checked(logits, labels)
        p = torch.sigmoid(logits)
        pull = torch.sigmoid(-logits) ** self.gamma_pos * F.logsigmoid(logits)
        if self.clip:
            q = (p - self.clip).clamp_min(0)
            push = q**self.gamma_neg * torch.log1p(-q)
        else:
            push = p**self.gamma_neg * F.logsigmoid(-logits)
        return -torch.where(present, pull, push).sum() / max(len(logits), 1)


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in the statistics dtype, labels as bool."""
    checks.embeddings("logits", logits)
    if not isinstance(labels, Tensor) or labels.shape != logits.shape:
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must be multi-hot of shape {tuple(logits.shape)}; got {got}")
    checks.same_device("logits", logits, labels=labels)
    return logits.to(statistics_dtype(logits)), labels.bool()
