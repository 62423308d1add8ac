"""A queue of keys, first in, first out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed.sharded import current
from .group import InGroup
from .places import held, load_whole_state, put, ranks_of, shares_of, whole_state


class KeyQueue(InGroup, nn.Module):
    """A queue of keys, as MoCo's: `enqueue` after each step, `rows()` as `queue=` of `InfoNCELoss`.

    With a group, ranks enqueue the keys of all of them in rank order, and each holds size / ranks of the places: the
    queue is that of one process with the whole batch, at a fraction of its memory. Places not yet written are left out.

    Args:
        size: number of keys. embedding_size: D.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`, the loss's. Default: none.
        device, dtype: of the keys.

    Raises:
        ValueError: on sizes that are not positive, and on a batch larger than the queue.

    Source: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, algorithm 1
    (there the queue begins with random keys; here it begins empty).

    Example:
        >>> import torch
        >>> from flashpair.losses import InfoNCELoss, KeyQueue
        >>> queue, loss = KeyQueue(size=6, embedding_size=4), InfoNCELoss(in_batch_negatives=False)
        >>> for _ in range(2):
        ...     query, key = torch.randn(4, 4), torch.randn(4, 4)
        ...     value = loss(query, key, queue=queue.rows())
        ...     queue.enqueue(key)
        >>> queue.rows().shape
        torch.Size([6, 4])
    """

    keys: Tensor  # (size, D), of this rank's places
    row_groups = ()

    def __init__(self, size: int, embedding_size: int, group=None, device=None, dtype=None) -> None:
        super().__init__(group=group)
        checks.count("size", size)
        checks.count("embedding_size", embedding_size)
        self.size, self.embedding_size = size, embedding_size
        self.shares, own = shares_of(size, self.group)
        self.register_buffer("keys", torch.zeros(own, embedding_size, device=device, dtype=dtype))
        self.count = 0  # keys enqueued so far

    def get_extra_state(self) -> dict[str, int]:
        """Beside the keys, for `state_dict`."""
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]

    def rows(self) -> Tensor:
        """(n, D) the keys, by place; in a group those of all ranks, for a loss of the group."""
        return held(self.keys, self.shares, min(self.count, self.size), ranks_of(self.group))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Writes keys (B, D) over the oldest ones.

        Raises:
            TypeError, ValueError: on bad input, before anything is written.
        """
        if self.group is not None and current() is None:
            self.over_group(self.enqueue, {"keys": keys})
            return
        checks.embeddings("keys", keys)
        if keys.shape[1] != self.embedding_size or keys.shape[0] > self.size:
            raise ValueError(
                f"keys must have at most size={self.size} rows of embedding_size={self.embedding_size}; "
                f"got {tuple(keys.shape)}"
            )
        places = (self.count + torch.arange(keys.shape[0], device=keys.device)) % self.size
        put(self.keys, self.shares, keys, places)
        self.count += keys.shape[0]

    def whole_state(self) -> dict:
        """The queue of all ranks, equal on each: what `load_whole_state` takes with any number of ranks."""
        return {**whole_state(self.group, self.shares, keys=self.keys), "count": self.count}

    def load_whole_state(self, state: dict) -> None:
        """Takes this rank's part of what `whole_state` gave."""
        load_whole_state(self.group, self.shares, state, keys=self.keys)
        self.count = int(state["count"])
