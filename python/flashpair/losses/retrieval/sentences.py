"""What the losses share that take columns of sentences or of their embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ...distributed.sharded import current
from ..arguments import check_matched, numbered
from ..group import InGroup


class SentenceLoss(InGroup, nn.Module):
    """Base: `loss(columns, labels=None)`, columns being embeddings (B, D) or the features that `model` embeds.

    sentence-transformers' trainer calls it so. `compute_loss_from_embeddings(embeddings, labels)` is the seam where
    that library's own losses and its wrappers meet ours, `calculate_loss(reps, labels)` that of its cached losses:
    `cached.calculate_loss = loss.calculate_loss`.
    """

    row_groups = None

    def __init__(self, model: nn.Module | None = None, group=None) -> None:
        super().__init__(group=group)
        self.model = model

    def forward(self, sentence_features: Iterable[Tensor | Mapping], labels: Tensor | None = None) -> Tensor:
        """The loss of columns: the queries (anchors) first.

        Args:
            sentence_features: one entry a column, embeddings (B, D) or what `model` turns into
                `{"sentence_embedding": (B, D)}`.
            labels: as the loss says.

        Returns:
            0-d loss in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        return self.compute_loss_from_embeddings([self._embedded(column) for column in sentence_features], labels)

    def _embedded(self, column: Tensor | Mapping) -> Tensor:
        if isinstance(column, Tensor):
            return column
        if self.model is None:
            raise ValueError(
                f"model must be given to {type(self).__name__} to embed features; got None and {type(column).__name__}"
            )
        return self.model(column)["sentence_embedding"]

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of embeddings (B, D) by column."""
        embeddings = list(embeddings)
        if self.group is not None and current() is None:

            def run(labels: Tensor | None, **columns: Tensor) -> Tensor:
                return self.compute_loss_from_embeddings(list(columns.values()), labels)

            return self.over_group(run, lambda: {"labels": labels, **named_columns(embeddings)})
        named_columns(embeddings)
        for k, column in enumerate(embeddings[1:], 1):
            check_matched(embeddings[0], column, ("embeddings[0]", f"embeddings[{k}]"))
        return self.of(embeddings, labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of columns that are embedded in parts, (b, D) each; see `finished` for `with_backward`."""
        return finished(self.compute_loss_from_embeddings(joined(reps), labels), with_backward)

    def of(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """The loss of checked columns."""
        raise NotImplementedError


def joined(parts: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    """Columns (B, D) of parts (b, D)."""
    return [torch.cat(list(column)) for column in parts]


def finished(loss: Tensor, with_backward: bool) -> Tensor:
    """The loss; `with_backward`: its value, after its backward pass."""
    if not with_backward:
        return loss
    loss.backward()
    return loss.detach()


def named_columns(embeddings: list[Tensor], name: str = "embeddings") -> dict[str, Tensor]:
    """Two or more columns, one by one.

    Raises:
        ValueError: on fewer.
    """
    if len(embeddings) < 2:
        raise ValueError(f"{name} must hold at least 2 columns; got {len(embeddings)}")
    return numbered(**{name: embeddings})
