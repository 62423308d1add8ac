"""Cross-batch memory: a loss against the embeddings of earlier batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed.agreement import options_of
from ..distributed.sharded import current, over_ranks
from ..miners.selection import LazyTuple, MinedPairs, check_indices, listed
from ..terms import Similarity
from .geometry import Geometry
from .peer import BaseCrossBatchMemory
from .places import held, kept_rows, load_whole_state, put, shares_of, whole_state
from .problem import check_call
from .triplets import join_pairs

#: Losses of image-text pairs, of views, of one pair a class: a queue means nothing to them.
_WITHOUT_MEMORY = {
    "BarlowTwinsLoss", "ClipLoss", "InfoNCELoss", "InstanceLoss", "ManifoldLoss", "NPairsLoss", "SelfSupervisedLoss",
    "SigLipLoss", "VICRegLoss",
}  # fmt: skip


class CrossBatchMemory(BaseCrossBatchMemory):
    """Compares each batch with a queue of the latest embeddings, which take no gradient.

    A call first enqueues the batch, then takes the loss of the batch against the whole queue; the copies of the
    batch's own rows are left out by index. pytorch-metric-learning's class: same constructor, same call. A miner of
    this library stays lazy, and so does the choice of all pairs; `indices_tuple` turns both into index tensors.

    With a loss that has a group, the batch is that of all its ranks and the queue that of one process with it, in rank
    order; each rank holds memory_size / ranks of its places. `indices_tuple` and the miner's selection are then global.

    Args:
        loss: a metric-learning loss that takes labels and references: all but InstanceLoss, ManifoldLoss and
            NPairsLoss.
        embedding_size: D.
        memory_size: length of the queue. Default 1024.
        miner: called with the batch and the queue. Default: all pairs.

    Raises:
        ValueError: on sizes that are not positive, or a batch larger than the queue.

    Source: Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020, algorithm 1 (here without the loss
    inside the batch, as in pytorch-metric-learning).

    Example:
        >>> import torch
        >>> from flashpair.losses import ContrastiveLoss, CrossBatchMemory
        >>> memory = CrossBatchMemory(ContrastiveLoss(), embedding_size=2, memory_size=4)
        >>> float(memory(torch.eye(2), torch.tensor([0, 1])))  # one distance of sqrt(2), beyond the margin
        0.0
    """

    embedding_memory: Tensor  # (memory_size, D)
    label_memory: Tensor  # (memory_size,) int64

    def __init__(self, loss: nn.Module, embedding_size: int, memory_size: int = 1024, miner=None) -> None:
        checks.count("embedding_size", embedding_size)
        checks.count("memory_size", memory_size)
        self.check_loss_support(type(loss).__name__)
        super().__init__(loss=loss, embedding_size=embedding_size, memory_size=memory_size, miner=miner)

    @staticmethod
    def supported_losses() -> list[str]:
        """Names of the losses that can be wrapped: those that compare with other embeddings by label."""
        from . import __all__ as names

        own = {n for n in names if n.endswith("Loss")} - _WITHOUT_MEMORY
        inherited = getattr(BaseCrossBatchMemory, "supported_losses", list)
        return sorted(own | set(inherited()))

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        """Raises ValueError on a loss that has no use for a memory."""
        if loss_name not in cls.supported_losses():
            allowed = ", ".join(cls.supported_losses())
            raise ValueError(f"loss must be one of {allowed}; got {loss_name}")

    def reset_queue(self) -> None:
        """Forget all embeddings."""
        self.shares, own = shares_of(self.memory_size, getattr(self.loss, "group", None))
        self.register_buffer("embedding_memory", torch.zeros(own, self.embedding_size))
        self.register_buffer("label_memory", torch.zeros(self.memory_size, dtype=torch.int64))
        self.has_been_filled = False
        self.queue_idx = 0

    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        """Enqueue `batch_size` rows, over the oldest ones once the queue is full."""
        first = self.queue_idx
        self.curr_batch_idx = torch.arange(first, first + batch_size, device=labels.device) % self.memory_size
        put(self.embedding_memory, self.shares, embeddings, self.curr_batch_idx)
        self.label_memory[self.curr_batch_idx] = labels
        self.has_been_filled = self.has_been_filled or first + batch_size >= self.memory_size
        self.queue_idx = (first + batch_size) % self.memory_size

    def _check(self, embeddings, labels, indices_tuple, enqueue_mask) -> None:
        check_call(embeddings, labels, None, None, None)
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings must have embedding_size={self.embedding_size} features; got {embeddings.shape[1]}"
            )
        if enqueue_mask is None:
            count = embeddings.shape[0]
        else:
            if indices_tuple is not None:
                raise ValueError("indices_tuple and enqueue_mask exclude each other; got both")
            if enqueue_mask.dtype != torch.bool or enqueue_mask.shape != labels.shape:
                got = f"{enqueue_mask.dtype} {tuple(enqueue_mask.shape)}"
                raise ValueError(f"enqueue_mask must be bool of shape ({embeddings.shape[0]},); got {got}")
            checks.same_device("embeddings", embeddings, enqueue_mask=enqueue_mask)
            count = int(enqueue_mask.sum())
        if count > self.memory_size:
            raise ValueError(f"a batch must fit into memory_size={self.memory_size}; got {count} rows to enqueue")

    def forward(
        self, embeddings: Tensor, labels: Tensor, indices_tuple=None, enqueue_mask: Tensor | None = None, **kwargs
    ):
        """Enqueue a batch, then the loss of it against the queue.

        Args:
            embeddings: (B, D).
            labels: (B,) int64.
            indices_tuple: further index tensors into batch and queue, added to the mined (or all) pairs.
            enqueue_mask: (B,) bool; rows where it is True are only enqueued, the others only compared.
            **kwargs: passed to the loss (`return_stats`).

        Returns:
            What the loss returns.

        Raises:
            TypeError, ValueError: on bad input, naming the argument, before anything is enqueued.
        """
        group = getattr(self.loss, "group", None)
        if group is not None and current() is None:
            return self._over_group(group, embeddings, labels, indices_tuple, enqueue_mask, kwargs)
        self._check(embeddings, labels, indices_tuple, enqueue_mask)
        if indices_tuple is not None:
            filled = min(self.queue_idx + embeddings.shape[0], self.memory_size)
            columns = self.memory_size if self.has_been_filled else filled
            indices_tuple = listed(indices_tuple)
            check_indices(indices_tuple, embeddings.shape[0], columns, embeddings.device)
        self.embedding_memory = self.embedding_memory.to(embeddings.device, embeddings.dtype)
        self.label_memory = self.label_memory.to(labels.device)
        queued, queued_labels = embeddings, labels
        if enqueue_mask is not None:
            queued, queued_labels = kept_rows(embeddings, enqueue_mask), labels[enqueue_mask]
            embeddings, labels = kept_rows(embeddings, ~enqueue_mask), labels[~enqueue_mask]
        self.add_to_memory(queued, queued_labels, queued.shape[0])
        size = self.memory_size if self.has_been_filled else self.queue_idx
        # Copies: the next batch overwrites the queue, perhaps before this loss has gone backward.
        memory, memory_labels = (
            held(self.embedding_memory, self.shares, size, current()),
            self.label_memory[:size].clone(),
        )
        own = self.curr_batch_idx if enqueue_mask is None else None
        selection = self._select(embeddings, labels, memory, memory_labels, own)
        if indices_tuple is not None:
            selection = _joined(tuple(selection), indices_tuple)
        return self.loss(embeddings, labels, selection, memory, memory_labels, **kwargs)

    def _over_group(self, group, embeddings, labels, indices_tuple, enqueue_mask, kwargs):
        run = lambda embeddings, labels, enqueue_mask: self.forward(  # noqa: E731
            embeddings, labels, indices_tuple, enqueue_mask, **kwargs
        )
        tensors = {"embeddings": embeddings, "labels": labels, "enqueue_mask": enqueue_mask}
        return over_ranks(group, type(self).__name__, options_of(self), run, tensors, [tuple(tensors)])

    def whole_state(self) -> dict:
        """The memory of all ranks, equal on each: what `load_whole_state` takes with any number of ranks."""
        group = getattr(self.loss, "group", None)
        buffers = {"embedding_memory": self.embedding_memory, "label_memory": self.label_memory}
        counters = {"queue_idx": self.queue_idx, "has_been_filled": self.has_been_filled}
        return {**whole_state(group, self.shares, **buffers), **counters}

    def load_whole_state(self, state: dict) -> None:
        """Takes this rank's part of what `whole_state` gave.

        Raises:
            ValueError: on a state that does not fit, before anything changes.
        """
        group = getattr(self.loss, "group", None)
        buffers = {"embedding_memory": self.embedding_memory, "label_memory": self.label_memory}
        load_whole_state(group, self.shares, state, **buffers)
        self.queue_idx, self.has_been_filled = state["queue_idx"], state["has_been_filled"]

    def _select(self, embeddings, labels, memory, memory_labels, own: Tensor | None):
        if self.miner is None:
            geometry = Geometry(Similarity.DOT, normalize=True)  # any: there are no thresholds
            return MinedPairs(embeddings, memory, labels, memory_labels, geometry, exclude=own)
        mined = self.miner(embeddings, labels, memory, memory_labels)
        if own is None:
            return mined
        if isinstance(mined, LazyTuple):
            return mined.without(own)
        anchors, positives, *rest = mined
        keep = positives != own[anchors]
        if not rest[1:]:
            return anchors[keep], positives[keep], rest[0][keep]
        return anchors[keep], positives[keep], *rest


def _joined(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Index tensors of both, in the form of the first."""
    if len(first) == 4 and len(second) == 3:
        second = (second[0], second[1], second[0], second[2])
    elif len(first) == 3 and len(second) == 4:
        second = join_pairs(second)
    return tuple(torch.cat(parts) for parts in zip(first, second, strict=True))
