"""What the multi-label losses share: their call, and the group's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ..arguments import poisoned
from ..group import InGroup
from ..two_views import nothing
from .label_sets import LabelSets


class MultiLabelLoss(InGroup, nn.Module):
    """Base: `loss(embeddings, labels)` with a multi-hot (B, C) tensor or `LabelSets`."""

    row_groups = (("embeddings", "labels"),)

    def forward(self, embeddings: Tensor, labels: Tensor | LabelSets) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (B, D) float32, float64, bfloat16 or float16; normalised here.
            labels: (B, C) multi-hot, of any number type or bool, or `LabelSets`; with a group a tensor.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {"embeddings": embeddings, "labels": labels})
        checks.embeddings("embeddings", embeddings)
        sets = LabelSets.of("labels", labels, embeddings.shape[0], embeddings.device)
        if embeddings.shape[0] == 0:
            return nothing(embeddings)
        return poisoned(self.of(embeddings, sets), embeddings, *self.parameters())

    def of(self, embeddings: Tensor, sets: LabelSets) -> Tensor:
        """The loss of a batch that is not empty."""
        raise NotImplementedError


class PrototypeLoss(MultiLabelLoss):
    """Base of the losses that learn a prototype (D,) for each label."""

    prototypes: nn.Parameter  # (num_labels, embedding_size)

    def __init__(self, num_labels: int, embedding_size: int, temperature: float, group=None) -> None:
        super().__init__(group=group)
        checks.count("num_labels", num_labels)
        checks.count("embedding_size", embedding_size)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        self.temperature = temperature
        self.prototypes = nn.Parameter(nn.functional.normalize(torch.randn(num_labels, embedding_size), dim=1))

    def of(self, embeddings: Tensor, sets: LabelSets) -> Tensor:
        if sets.num_labels != len(self.prototypes):
            raise ValueError(f"labels must have num_labels={len(self.prototypes)} columns; got {sets.num_labels}")
        return self.of_prototypes(embeddings, sets, self.prototypes.to(embeddings.dtype))

    def of_prototypes(self, embeddings: Tensor, sets: LabelSets, prototypes: Tensor) -> Tensor:
        """The loss of a batch that is not empty, with prototypes (C, D) of the embeddings' dtype."""
        raise NotImplementedError
