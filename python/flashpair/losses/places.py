"""Rows that outlive a batch (a queue's, a sample's), cut into places; over ranks, each holds some of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.ranks import Group, Ranks
from ..distributed.sharded import Sharded, current, even_sizes, offsets
from ..distributed.sides import Side


def ranks_of(group: Group | None) -> Ranks | None:
    """A group as this process sees it, None without one."""
    return None if group is None else Ranks(group)


def shares_of(places: int, group: Group | None) -> tuple[list[int], int]:
    """Places of each rank of a group, and of this one; of all without a group."""
    ranks = ranks_of(group)
    shares = [places] if ranks is None else even_sizes(places, ranks.size)
    return shares, shares[0 if ranks is None else ranks.rank]


def _own(shares: list[int], ranks) -> tuple[int, int]:
    starts = offsets(shares)
    rank = 0 if ranks is None else ranks.rank
    return starts[rank], starts[rank + 1]


# --- rows of embeddings -----------------------------------------------------------------------------------------------


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
    first, end = _own(shares, rows.ranks)

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


# --- numbers of samples -----------------------------------------------------------------------------------------------


@torch.no_grad()
def read(buffer: Tensor, shares: list[int], index: Tensor) -> Tensor:
    """(B, k) numbers of samples `index` (B,), wherever they are held; buffer (shares[rank], k)."""
    ranks = current()
    first, end = _own(shares, ranks)
    mine = (index >= first) & (index < end)
    found = torch.where(mine[:, None], buffer[torch.where(mine, index - first, 0)] if len(buffer) else 0.0, 0.0)
    return found if ranks is None else ranks.total(found.to(buffer.dtype))


@torch.no_grad()
def write(buffer: Tensor, shares: list[int], index: Tensor, values: Tensor) -> None:
    """Writes numbers (B, k) of samples, each on the rank that holds it."""
    first, end = _own(shares, current())
    mine = (index >= first) & (index < end)
    buffer[index[mine] - first] = values[mine].to(buffer.dtype)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def whole_state(group: Group | None, shares: list[int], **buffers: Tensor) -> dict[str, Tensor]:
    """Copies on the CPU: (places, k) buffers of all ranks, other ones as they are."""
    ranks = ranks_of(group)
    gathered = lambda v: v if ranks is None or v.dim() < 2 else ranks.gather(v, shares)  # noqa: E731
    return {name: gathered(value).detach().cpu().clone() for name, value in buffers.items()}


@torch.no_grad()
def load_whole_state(group: Group | None, shares: list[int], state: dict, **buffers: Tensor) -> None:
    """Copies this rank's part of `whole_state` into buffers; everything is checked first.

    Raises:
        ValueError: on a state that does not fit.
    """
    first, end = _own(shares, ranks_of(group))
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
