"""Labels for two views of the same samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed.agreement import options_of
from ..distributed.sharded import Sharded, current, over_ranks
from .arguments import check_matched


class SelfSupervisedLoss(nn.Module):
    """Calls a loss on two views, row i of one belonging to row i of the other.

        symmetric:  loss([x; y], [0..B-1; 0..B-1])        else:  loss(x, 0..B-1, ref_emb=y, ref_labels=0..B-1)

    pytorch-metric-learning's class: same constructor, same call, for every loss of `flashpair.losses` that takes labels
    (its own list has fewer).

    Args:
        loss: a metric-learning loss.
        symmetric: whether both views are anchors. Default: yes.

    Raises:
        TypeError: on something that is no loss. ValueError: on views that do not match.

    Source: pytorch-metric-learning, losses.SelfSupervisedLoss.

    Example:
        >>> import torch
        >>> from flashpair.losses import NTXentLoss, SelfSupervisedLoss
        >>> loss = SelfSupervisedLoss(NTXentLoss(temperature=0.5))
        >>> loss(torch.eye(3), torch.eye(3)) < loss(torch.eye(3), torch.eye(3).roll(1, 0))
        tensor(True)
    """

    def __init__(self, loss: nn.Module, symmetric: bool = True) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be a module, such as flashpair.losses.NTXentLoss(); got {type(loss).__name__}")
        self.loss, self.symmetric = loss, symmetric

    def forward(self, embeddings: Tensor, ref_emb: Tensor, **kwargs):
        """The loss of two views.

        Args:
            embeddings: (B, D).
            ref_emb: (B, D), another view of the same samples.
            **kwargs: passed to the loss (`return_stats`).
        """
        group = getattr(self.loss, "group", None)
        if group is not None and current() is None:
            return over_ranks(
                group, type(self).__name__, options_of(self), lambda **views: self.forward(**views, **kwargs),
                {"embeddings": embeddings, "ref_emb": ref_emb}, [("embeddings", "ref_emb")],
            )  # fmt: skip
        check_matched(embeddings, ref_emb, ("embeddings", "ref_emb"))
        labels = torch.arange(embeddings.shape[0], device=embeddings.device)
        if self.symmetric and isinstance(embeddings, Sharded):  # each rank's views stay with it
            parts = labels.split(embeddings.sizes)
            return self.loss(embeddings.beside(ref_emb), torch.cat([p for p in parts for _ in range(2)]), **kwargs)
        if self.symmetric:
            return self.loss(torch.cat([embeddings, ref_emb]), labels.repeat(2), **kwargs)
        return self.loss(embeddings, labels, ref_emb=ref_emb, ref_labels=labels.clone(), **kwargs)
