"""The latest rows of many batches, first in, first out; over ranks, each holds some of the places."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed.sharded import Sharded, current, even_sizes, offsets
from ..distributed.sides import Side
from .group import InGroup


def own_places(size: int, group) -> list[int]:
    """Places of each rank of a group, of all without one."""
    if group is None:
        return [size]
    from ..distributed.ranks import Ranks

    return even_sizes(size, Ranks(group).size)


@torch.no_grad()
def put(buffer: Tensor, shares: list[int], rows: Tensor, places: Tensor) -> None:
    """Writes rows to places, each on the rank that has it.

    Args:
        buffer: (shares[rank], D) of this rank. shares: places of each rank.
        rows: (B, D), of all ranks in a group. places: (B,) int64, where they go.
    """
    if not isinstance(rows, Sharded):
        buffer[places] = rows.detach().to(buffer.dtype)
        return
    starts = offsets(shares)
    first, end = starts[rows.ranks.rank : rows.ranks.rank + 2]

    def visit(block: Tensor, low: int, high: int) -> None:
        at = places[low:high]
        mine = (at >= first) & (at < end)
        buffer[at[mine] - first] = block[mine].to(buffer.dtype)

    Side(rows.detached(), rows.ranks).visit(visit)


def held(buffer: Tensor, shares: list[int], size: int, ranks) -> Tensor:
    """The first `size` places of all ranks, in order: copies, since the next batch overwrites them."""
    if ranks is None:
        return buffer[:size].clone()
    starts = offsets(shares)
    sizes = [max(min(size, starts[r + 1]) - starts[r], 0) for r in range(len(shares))]
    return Sharded(buffer[: sizes[ranks.rank]].clone(), sizes, ranks)


def kept_rows(rows: Tensor, keep: Tensor) -> Tensor:
    """The rows (B, D) where `keep` (B,) is True; each rank's stay with it."""
    if not isinstance(rows, Sharded):
        return rows[keep]
    parts = keep.split(rows.sizes)
    return Sharded(rows.local[parts[rows.ranks.rank]], [int(p.sum()) for p in parts], rows.ranks)


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
        self.shares = own_places(size, self.group)
        own = self.shares[0]
        if self.group is not None:
            from ..distributed.ranks import Ranks

            own = self.shares[Ranks(self.group).rank]
        self.register_buffer("keys", torch.zeros(own, embedding_size, device=device, dtype=dtype))
        self.count = 0  # keys enqueued so far

    def get_extra_state(self) -> dict[str, int]:
        """Beside the keys, for `state_dict`."""
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]

    def rows(self) -> Tensor:
        """(n, D) the keys, by place; in a group those of all ranks, for a loss of the group."""
        ranks = None
        if self.group is not None:
            from ..distributed.ranks import Ranks

            ranks = Ranks(self.group)
        return held(self.keys, self.shares, min(self.count, self.size), ranks)

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


def whole_state(group, shares: list[int], **buffers: Tensor) -> dict[str, Tensor]:
    """Copies on the CPU: (places, D) buffers of all ranks, other ones as they are."""
    ranks = None
    if group is not None:
        from ..distributed.ranks import Ranks

        ranks = Ranks(group)
    gathered = lambda v: v if ranks is None or v.dim() < 2 else ranks.gather(v, shares)  # noqa: E731
    return {name: gathered(value).detach().cpu().clone() for name, value in buffers.items()}


@torch.no_grad()
def load_whole_state(group, shares: list[int], state: dict[str, Tensor], **buffers: Tensor) -> None:
    """Copies this rank's part of `whole_state` into buffers; everything is checked first.

    Raises:
        ValueError: on a state that does not fit.
    """
    first, end = 0, shares[0]
    if group is not None:
        from ..distributed.ranks import Ranks

        first, end = offsets(shares)[Ranks(group).rank :][:2]
    parts = {}
    for name, buffer in buffers.items():
        if name not in state:
            raise ValueError(f"state must hold {', '.join(buffers)}; {name} is missing")
        value = state[name]
        wanted = (sum(shares), *buffer.shape[1:]) if buffer.dim() == 2 else tuple(buffer.shape)
        if tuple(value.shape) != wanted:
            raise ValueError(f"{name} of the state must have shape {wanted}; got {tuple(value.shape)}")
        parts[name] = value[first:end] if buffer.dim() == 2 else value
    for name, buffer in buffers.items():
        buffer.copy_(parts[name])
