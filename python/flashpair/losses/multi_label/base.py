"""What the multi-label losses share: their call, and the group's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ...eager import eagerly
from ..arguments import check_matched, poisoned, without_gradient
from ..group import InGroup
from ..two_views import nothing
from .label_sets import LabelSets


class MultiLabelLoss(InGroup, nn.Module):
    """Base: `loss(embeddings, labels)` with a multi-hot (B, C) tensor or `LabelSets`."""

    row_groups = (("embeddings", "labels"),)

    @eagerly
    def forward(self, embeddings: Tensor, labels: Tensor | LabelSets) -> Tensor:
        """The loss of a batch. `torch.compile` runs it as it is: how many labels are given is no size of a tensor.

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


#: References without gradient: rows, and the labels of each.
References = list[tuple[Tensor, LabelSets]]


class ReferenceLoss(MultiLabelLoss):
    """Base of the losses of samples against others: momentum keys of the batch, and a queue of earlier ones."""

    row_groups = (("embeddings", "labels", "keys"),)

    @eagerly
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | LabelSets,
        keys: Tensor | None = None,
        queue: Tensor | None = None,
        queue_labels: Tensor | LabelSets | None = None,
    ) -> Tensor:
        """The loss of a batch. `torch.compile` runs it as it is: how many labels are given is no size of a tensor.

        Args:
            embeddings: (B, D) float32, float64, bfloat16 or float16; normalised here.
            labels: (B, C) multi-hot, of any number type or bool, or `LabelSets`; with a group a tensor.
            keys: (B, D) row i has the labels of sample i; without gradient. Default: none.
            queue: (M, D) further rows, without gradient; with a group the rows of a `KeyQueue` with the same group, or
                a tensor that all ranks hold alike. Default: none.
            queue_labels: (M, C) multi-hot or `LabelSets`, the labels of the queue; its rows as those of the queue.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            tensors = {"embeddings": embeddings, "labels": labels, "keys": without_gradient(keys)}
            return self.over_group(self.forward, tensors, queue=queue, queue_labels=queue_labels)
        checks.embeddings("embeddings", embeddings)
        sets = LabelSets.of("labels", labels, embeddings.shape[0], embeddings.device)
        references: References = []
        if keys is not None:
            check_matched(embeddings, keys, ("embeddings", "keys"))
            references.append((without_gradient(keys), sets))
        if (queue is None) != (queue_labels is None):
            raise ValueError("queue and queue_labels must be given together; got one of them")
        if queue is not None:
            checks.embedding_pair(embeddings, queue, ("embeddings", "queue"))
            of_queue = LabelSets.of("queue_labels", queue_labels, queue.shape[0], embeddings.device)
            if of_queue.num_labels != sets.num_labels:
                raise ValueError(
                    f"queue_labels must have {sets.num_labels} columns as labels; got {of_queue.num_labels}"
                )
            references.append((without_gradient(queue), of_queue))
        if embeddings.shape[0] == 0:
            return nothing(embeddings)
        return poisoned(self.of(embeddings, sets, references), embeddings, keys, queue, *self.parameters())

    def of(self, embeddings: Tensor, sets: LabelSets, references: References) -> Tensor:
        """The loss of a batch that is not empty; without references, of the batch itself."""
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
        self.check_labels(sets)
        return self.of_prototypes(embeddings, sets, self.prototypes.to(embeddings.dtype))

    def check_labels(self, sets: LabelSets) -> None:
        """Raises ValueError where there are not as many labels as prototypes."""
        if sets.num_labels != len(self.prototypes):
            raise ValueError(f"labels must have num_labels={len(self.prototypes)} columns; got {sets.num_labels}")

    def of_prototypes(self, embeddings: Tensor, sets: LabelSets, prototypes: Tensor) -> Tensor:
        """The loss of a batch that is not empty, with prototypes (C, D) of the embeddings' dtype."""
        raise NotImplementedError
