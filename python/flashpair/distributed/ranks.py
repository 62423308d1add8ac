"""The ranks that share a batch, and the few collectives that the losses need of them.

Copies travel as bytes, so every backend carries every dtype; sums travel in float32 or float64. What a backend raises
becomes a `DistributedError` that says which rank saw it, what was going on and which ranks have not answered.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor

#: Seconds that the survivors of a failed collective wait for each other's sign of life.
_ROLL_CALL_S = 5.0

_failures = 0  # failed collectives of this process; a roll call has the same number on every survivor


class DistributedError(RuntimeError):
    """A call that all ranks share cannot go on: another rank refused its input, differs in it, or is gone."""


class Exchange(Enum):
    """How a rank gets at the columns of the others."""

    AUTO = "auto"  # GATHER while the columns of all ranks fit the workspace, else RING
    GATHER = "gather"  # all columns at once: memory grows with the number of ranks
    RING = "ring"  # one rank's columns at a time, passed on while the panel computes: memory does not grow


@dataclass(frozen=True, eq=False)
class Group:
    """Ranks whose batches are one batch, for the `group=` of every loss and miner.

    Args:
        process_group: a process group or a one-dimensional DeviceMesh. Default: all processes.
        exchange: how a rank gets at the columns of the others. Default: `Exchange.AUTO`.
        check: compare sizes, dtypes and options of all ranks before each call, so that a difference raises on every
            rank. One small all-gather, read by the host: on a group without a CPU backend it waits for the device.
            False: the ranks' batches are promised to be of one size and kind. Default: True.

    Raises:
        TypeError: on something that is no group. At the call, RuntimeError: before
            `torch.distributed.init_process_group`; ValueError: in a process that is not in the group, or on a mesh of
            several dimensions.

    Example:
        >>> from flashpair.distributed import Exchange, Group
        >>> from flashpair.losses import SigLipLoss
        >>> loss = SigLipLoss(group=Group(exchange=Exchange.RING))
    """

    process_group: object = None
    exchange: Exchange = Exchange.AUTO
    check: bool = True

    def __post_init__(self) -> None:
        members = self.process_group
        known = members is None or hasattr(members, "get_group") or isinstance(members, dist.ProcessGroup)
        if not known and members is not dist.GroupMember.NON_GROUP_MEMBER:
            raise TypeError(
                "group must be None, a process group, a one-dimensional DeviceMesh or a flashpair.distributed.Group; "
                f"got {type(members).__name__}"
            )
        if not isinstance(self.exchange, Exchange):
            raise TypeError(f"exchange must be a flashpair.distributed.Exchange; got {self.exchange!r}")


def as_group(group) -> Group | None:
    """What users give as `group=`: None, a `Group`, a process group or a DeviceMesh.

    Raises:
        TypeError: on anything else.
    """
    return group if group is None or isinstance(group, Group) else Group(group)


class Ranks:
    """A group as this process sees it during one call.

    Raises:
        RuntimeError, ValueError: where the group cannot be used, see `Group`.
    """

    def __init__(self, group: Group) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "group was given, but there is no process group; call torch.distributed.init_process_group first"
            )
        members = group.process_group
        if members is None:
            members = dist.group.WORLD
        elif hasattr(members, "get_group"):
            if members.ndim != 1:
                raise ValueError(f"group must be one dimension of a DeviceMesh, mesh[name]; got {members.ndim} of them")
            members = members.get_group()
        if not isinstance(members, dist.ProcessGroup) or dist.get_rank(members) < 0:
            raise ValueError(f"group must contain the calling process; rank {dist.get_rank()} is not in it")
        self.group, self.members = group, members
        self.rank, self.size = dist.get_rank(members), dist.get_world_size(members)

    def devices(self) -> set[str]:
        """Device types that the group's backends carry."""
        known = getattr(self.members, "_device_types", None)
        if known is None:
            return {"cpu"} if dist.get_backend(self.members) == "gloo" else {"cuda"}
        found = {device.type for device in known}
        return found - {"cuda"} if dist.get_backend(self.members) == "gloo" and not torch.cuda.is_available() else found

    # --- copies -------------------------------------------------------------------------------------------------------

    def gather(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """(Σ sizes, ...) the rows of all ranks in rank order; `own` (sizes[rank], ...)."""
        if self.size == 1:
            return own
        most = max(sizes)
        whole = own.new_empty((self.size * most, *own.shape[1:]))
        if whole.numel() == 0:
            return whole[: sum(sizes)]
        if own.shape[0] < most:
            own = torch.cat([own, own.new_zeros((most - own.shape[0], *own.shape[1:]))])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name since 2.13
        with self._told("gathering rows"):
            gather(_bytes(whole), _bytes(own.contiguous()), group=self.members)
        if min(sizes) == most:
            return whole
        return torch.cat([whole[r * most : r * most + rows] for r, rows in enumerate(sizes)])

    def pass_on(self, value: Tensor, shape: Sequence[int], tag: int) -> Arrival:
        """Sends to the next rank and receives a tensor of a shape from the one before, while the caller goes on."""
        arrives = value.new_empty((max(shape[0], 1), *shape[1:]))
        if value.shape[0] == 0:
            value = value.new_zeros((1, *value.shape[1:]))  # empty messages confuse some transports
        value = value.contiguous()
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        with self._told("passing rows on"):
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, _bytes(value), group=self.members, group_peer=after, tag=tag),
                    dist.P2POp(dist.irecv, _bytes(arrives), group=self.members, group_peer=before, tag=tag),
                ]
            )
        return Arrival(self, works, value, arrives[: shape[0]])

    # --- sums ---------------------------------------------------------------------------------------------------------

    def total(self, value: Tensor, largest: bool = False) -> Tensor:
        """Sum (or maximum) of a tensor over the ranks, equal on all of them."""
        if self.size == 1 or value.numel() == 0:
            return value
        value = value.clone(memory_format=torch.contiguous_format)
        with self._told("summing over the ranks"):
            dist.all_reduce(value, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self.members)
        return value

    def scatter_total(self, value: Tensor, sizes: Sequence[int]) -> Tensor:
        """(sizes[rank], ...) this rank's rows of the sum of `value` (Σ sizes, ...) over the ranks."""
        if self.size == 1:
            return value
        own = sizes[self.rank]
        if value.numel() == 0:
            return value[:own]
        if dist.get_backend(self.members) == "gloo":
            # gloo's reduce-scatter sends as much as an all-reduce, twice what is needed.
            parts = value.new_empty((self.size * own, *value.shape[1:]))
            with self._told("summing rows over the ranks"):
                dist.all_to_all_single(parts, value.contiguous(), [own] * self.size, list(sizes), group=self.members)
            return parts.view(self.size, own, *value.shape[1:]).sum(0)
        most = max(sizes)
        if min(sizes) < most:
            padded = value.new_zeros((self.size, most, *value.shape[1:]))
            for r, part in enumerate(value.split(list(sizes))):
                padded[r, : len(part)] = part
            value = padded.flatten(0, 1)
        result = value.new_empty((most, *value.shape[1:]))
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the name since 2.13
        with self._told("summing rows over the ranks"):
            scatter(result, value.contiguous(), group=self.members)
        return result[:own]

    # --- failures -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.failure(what, error) from error

    def failure(self, what: str, error: BaseException) -> DistributedError:
        """The error of this rank, with the ranks that do not answer any more."""
        if isinstance(error, DistributedError):
            return error
        missing = self._roll_call()
        gone = f"; no answer from rank {', '.join(map(str, missing))}" if missing else ""
        return DistributedError(f"rank {self.rank} of {self.size} failed {what}{gone}: {error}")

    def _roll_call(self) -> list[int]:
        """Ranks of the group that have not noticed the failure within a few seconds; empty if nobody can be asked."""
        global _failures
        _failures += 1
        try:
            store = dist.distributed_c10d._get_default_store()
            keys = [f"flashpair/{_failures}/{dist.get_global_rank(self.members, r)}" for r in range(self.size)]
            store.set(keys[self.rank], "here")
            end, missing = time.monotonic() + _ROLL_CALL_S, list(range(self.size))
            while missing and time.monotonic() < end:
                missing = [r for r in missing if not store.check([keys[r]])]
                time.sleep(0.05)
            return missing
        except Exception:  # the store went with its rank
            return []


@dataclass
class Arrival:
    """A tensor on its way."""

    ranks: Ranks
    works: list
    sent: Tensor  # alive until it has left
    value: Tensor

    def wait(self) -> Tensor:
        """The tensor of the rank before."""
        with self.ranks._told("passing rows on"):
            for work in self.works:
                work.wait()
        return self.value


def _bytes(value: Tensor) -> Tensor:
    return value.reshape(-1).view(torch.uint8)
