"""NNCLR: the positive is the nearest neighbour in a support set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ...primitives import mine
from ...terms import Extreme
from ..arguments import check_matched
from ..group import InGroup
from ..info_nce import info_nce_loss


class NNCLRLoss(InGroup, nn.Module):
    """InfoNCE between the nearest neighbour of one view and the prediction of the other.

        loss = ½ [ InfoNCE(nn(z1), p2) + InfoNCE(nn(z2), p1) ],    nn(z) = argmax_{q in support} cos(z, q)

    The neighbour takes no gradient; negatives are the other predictions of the batch.

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 0.1.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`; the support set is then a
            `KeyQueue` with the same group, or a tensor that all ranks hold alike. Default: none.

    Raises:
        TypeError, ValueError: on a temperature that is not positive.

    Source: Dwibedi et al., "With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual
    Representations", ICCV 2021, equations 3 and 4. Not verified: the paper's own text was not at hand. Assumed: only
    pairs across the views are negatives (lightly adds those within a view).

    Example:
        >>> import torch
        >>> from flashpair.losses import KeyQueue, NNCLRLoss
        >>> support, loss = KeyQueue(size=64, embedding_size=4), NNCLRLoss()
        >>> z1, z2, p1, p2 = torch.randn(4, 8, 4)
        >>> support.enqueue(z1)
        >>> loss(z1, z2, p1, p2, support.rows()).isfinite().item()
        True
    """

    row_groups = (("first", "second", "first_prediction", "second_prediction"),)

    def __init__(self, temperature: float | Tensor = 0.1, group=None) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        self.temperature = temperature

    def forward(
        self, first: Tensor, second: Tensor, first_prediction: Tensor, second_prediction: Tensor, support: Tensor
    ) -> Tensor:
        """The loss of a batch.

        Args:
            first, second: (B, D) projections of two views, which take no gradient.
            first_prediction, second_prediction: (B, D) predictions made of them.
            support: (M, D) projections of earlier batches, `KeyQueue.rows()`; M ≥ 1.

        Returns:
            0-d loss in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            given = first, second, first_prediction, second_prediction
            return self.over_group(self.forward, dict(zip(self.row_groups[0], given, strict=True)), support=support)
        for name, view in zip(self.row_groups[0][1:], (second, first_prediction, second_prediction), strict=True):
            check_matched(first, view, ("first", name))
        checks.embedding_pair(first, support, ("first", "support"))
        if support.shape[0] == 0:
            raise ValueError("support must have at least one row; got none")
        of = lambda view, prediction: info_nce_loss(  # noqa: E731
            nearest(view, support), prediction, temperature=self.temperature
        )
        return (of(first, second_prediction) + of(second, first_prediction)) / 2


@torch.no_grad()
def nearest(rows: Tensor, support: Tensor) -> Tensor:
    """(B, D) the row of the support set with the largest cosine, for each row; NaN for a row that is."""
    (found,) = mine(rows, support, [Extreme()], normalize=True)
    bad = found.values.isnan()
    return torch.where(bad, torch.nan, support[found.indices[:, 0]])
