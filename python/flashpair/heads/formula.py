"""A per-row loss as a formula over the logits of a head."""

from __future__ import annotations

from torch import Tensor, nn

from .logits import ClassLogits


class Formula(nn.Module):
    """Base of the losses that need of a row's logits no more than `ClassLogits` holds: `forward` gives (B,) losses.

    Attributes:
        extras: what beside the own logit and the logsumexp is needed; see `flashpair.heads.logits.EXTRAS`.
        weighs_classes: whether `forward` applies `logits.class_weight` itself; else its result is multiplied by the
            weight of the row's class.

    Example:
        >>> import torch
        >>> from flashpair.heads import Formula, class_loss
        >>> class Confidence(Formula):
        ...     def forward(self, logits):
        ...         return 1 - torch.exp(-logits.cross_entropy)
        >>> float(class_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([0]), formula=Confidence()))
        0.5
    """

    extras: tuple[str, ...] = ()
    weighs_classes: bool = False

    def forward(self, logits: ClassLogits) -> Tensor:
        """(B,) losses."""
        raise NotImplementedError
