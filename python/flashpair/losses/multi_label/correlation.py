"""Label correlation: every absent label's probability below every present one's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import poisoned
from .logits import _checked


class LabelCorrelationLoss(nn.Module):
    """Exponential of how far absent labels' probabilities are above present ones', mean over such pairs, then rows.

        l_i = 1 / (|y_i| (C - |y_i|))  Σ_{a not in y_i} Σ_{c in y_i} exp(p_ia - p_ic),   p = σ(z),   mean over the batch

    The sum over pairs is a product of two sums: O(C) for a row. Rows without present labels contribute 0, as in the
    authors' code, and so do rows without absent ones (NaN there); an empty batch gives 0.

    Source: SpanEmo (Alhuzali and Ananiadou, "SpanEmo: Casting Multi-label Emotion Classification as Span-prediction",
    EACL 2021), read through copies of its code; its joint loss is (1 - α) BCE + α times this.

    Example:
        >>> import torch
        >>> from flashpair.losses import LabelCorrelationLoss
        >>> float(LabelCorrelationLoss()(torch.zeros(1, 3), torch.tensor([[1, 0, 0]])))  # equal probabilities
        1.0
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (B, C), floating point, and multi-hot labels (B, C).

        Returns:
            0-d loss in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        given = logits
        logits, present = _checked(logits, labels)
        p = torch.sigmoid(logits)
        absent = torch.where(present, 0.0, p.exp()).sum(1)
        wanted = torch.where(present, (-p).exp(), 0.0).sum(1)
        pairs = present.sum(1) * (~present).sum(1)
        return poisoned((absent * wanted / pairs.clamp_min(1)).sum() / max(len(logits), 1), given)
