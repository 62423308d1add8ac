"""A batch that several ranks hold together, as one tensor to everything that computes a loss.

A loss of the global batch is the single-process code, run by every rank on the same O(B) vectors of statistics. What
costs O(B N) is divided: `primitives.py` gives each rank its own rows of S. Two kinds of values meet there:

- replicated: equal on all ranks, and so is the gradient that arrives at them (scale, labels, statistics, losses);
- sharded: each rank holds its own rows, a `Sharded`.

Gradients of sharded rows are the global batch's times the number of ranks, as with torch's own differentiable
gather: DDP and FSDP, which average over the ranks, make of them the gradients of one process with the whole batch.
Gradients of replicated values are complete on every rank, so averaging does not change them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..eager import eagerly
from ..request import statistics_dtype
from ..workspace import workspace_bytes
from .agreement import agree
from .ranks import Exchange, Group, Ranks

_current: ContextVar[Ranks | None] = ContextVar("flashpair_ranks", default=None)


def current() -> Ranks | None:
    """The ranks that share the call now running, None outside of a group."""
    return None if torch.compiler.is_compiling() else _current.get()


@contextlib.contextmanager
def shared_by(ranks: Ranks | None) -> Iterator[None]:
    """What runs inside is one call of these ranks."""
    token = _current.set(ranks)
    try:
        yield
    finally:
        _current.reset(token)


def alone():
    """What runs inside is this rank's own affair."""
    return shared_by(None)


def bound(function: Callable) -> Callable:
    """The function, for the ranks that share the call now running whenever it is called."""
    ranks = current()

    def call(*args, **kwargs):
        with shared_by(ranks):
            return function(*args, **kwargs)

    return function if ranks is None else call


_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_leaf")
} | {Tensor.dim, Tensor.size, Tensor.is_floating_point, Tensor.numel, Tensor.__len__}  # fmt: skip


class Sharded(Tensor):
    """(Σ sizes, D) rows of all ranks in rank order, of which this one holds `local`; whatever is no pass gathers."""

    local: Tensor  # (sizes[rank], D)
    sizes: list[int]
    ranks: Ranks

    @staticmethod
    def __new__(cls, local: Tensor, sizes: Sequence[int], ranks: Ranks) -> Sharded:
        found = Tensor._make_wrapper_subclass(
            cls, (sum(sizes), *local.shape[1:]), dtype=local.dtype, device=local.device,
            requires_grad=local.requires_grad and torch.is_grad_enabled(),
        )  # fmt: skip
        found.local, found.sizes, found.ranks = local, list(sizes), ranks
        found._data, found._with_gradient = None, None
        return found

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        unwrap = lambda v: v.whole() if isinstance(v, Sharded) else v  # noqa: E731
        return function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} reached rows that other ranks hold")

    def __repr__(self) -> str:
        return f"Sharded(shape={tuple(self.shape)}, sizes={self.sizes})"

    def __deepcopy__(self, memo):
        return self

    @property
    def range(self) -> tuple[int, int]:
        """First and end of this rank's rows."""
        first = sum(self.sizes[: self.ranks.rank])
        return first, first + self.sizes[self.ranks.rank]

    def streams(self) -> bool:
        """Whether the rows of other ranks come block by block, not all at once."""
        exchange = self.ranks.group.exchange
        if self.ranks.size == 1 or exchange == Exchange.GATHER:
            return False
        if exchange == Exchange.RING:
            return True
        # Gathered rows and their gradient, which is summed in the dtype of statistics.
        each = self.local.dtype.itemsize + torch.finfo(statistics_dtype(self.local)).bits // 8
        return self._data is None and self.numel() * each > workspace_bytes(None)

    def beside(self, other: Sharded) -> Sharded:
        """Each rank's rows of both, one after the other."""
        sizes = [a + b for a, b in zip(self.sizes, other.sizes, strict=True)]
        return Sharded(torch.cat([self.local, other.local]), sizes, self.ranks)

    def cast(self, dtype: torch.dtype) -> Sharded:
        """The same rows in another dtype."""
        return self if dtype == self.dtype else Sharded(self.local.to(dtype), self.sizes, self.ranks)

    def detached(self) -> Sharded:
        """The same rows without gradient."""
        found = Sharded(self.local.detach(), self.sizes, self.ranks)
        found._data = self._data
        return found

    def data_of_all(self) -> Tensor:
        """(Σ sizes, D) without gradient; gathered once."""
        if self._data is None:
            self._data = self.ranks.gather(self.local.detach(), self.sizes)
        return self._data

    def whole(self) -> Tensor:
        """(Σ sizes, D) for replicated use: its gradient must be equal on all ranks.

        Raises:
            ValueError: where the exchange must not hold all rows at once.
        """
        if self.ranks.group.exchange == Exchange.RING and self.ranks.size > 1:
            raise ValueError(
                "exchange must be GATHER or AUTO for this loss, which needs all embeddings at once; got RING"
            )
        if not self.requires_grad or not torch.is_grad_enabled():
            return self.data_of_all()
        if self._with_gradient is None:
            self._with_gradient = _Whole.apply(self.local, (self.data_of_all(), *self.range, self.ranks.size))
        return self._with_gradient


class _Whole(torch.autograd.Function):
    """The node must not hold the `Sharded`, which holds the result: such a circle through autograd is never freed."""

    @staticmethod
    def forward(ctx, local, whole: tuple[Tensor, int, int, int]):
        data, *ctx.part = whole
        return data.view_as(data)

    @staticmethod
    def backward(ctx, gradient):
        first, end, ranks = ctx.part
        return gradient[first:end] * ranks, None


def all_rows(value: Tensor) -> Tensor:
    """The rows of all ranks as an ordinary tensor; any other tensor as it is."""
    return value.whole() if isinstance(value, Sharded) else value


def by_row(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """A function that makes each row from the same rows of the values; of all ranks, or of one process."""
    if not isinstance(values[0], Sharded):
        return function(*values)
    return Sharded(function(*(v.local for v in values)), values[0].sizes, values[0].ranks)


def sum_of_entries(values: Sequence[Tensor], dtype: torch.dtype) -> Tensor | int:
    """Sum of all entries, no gradients; of sharded rows each rank adds its own."""
    own = [v.local for v in values if isinstance(v, Sharded)]
    sums = [v.detach().sum(dtype=dtype) for v in values if not isinstance(v, Sharded)]
    total = functools.reduce(torch.add, sums) if sums else 0  # Python's sum would add 0 first
    if not own:
        return total
    ranks = next(v.ranks for v in values if isinstance(v, Sharded))
    return ranks.total(sum(v.detach().sum(dtype=dtype) for v in own)) + total


def local_rows(value: Tensor | None) -> Tensor | None:
    """This rank's rows of a sharded tensor, any other tensor as it is."""
    return value.local if isinstance(value, Sharded) else value


@eagerly
def over_ranks(
    group: Group,
    what: str,
    options: str,
    function: Callable,
    tensors: dict[str, Tensor | None] | Callable[[], dict[str, Tensor | None]],
    rows: Sequence[tuple[str, ...]] | None,
    check: Callable[[], None] | None = None,
):
    """`function(**tensors of all ranks)`, divided over the ranks.

    Embeddings arrive as `Sharded`, labels and other vectors gathered.

    Args:
        what, options: what the ranks must agree on.
        tensors: by name; or a function that gives them, and raises what is wrong with what they are taken from.
        rows: names of tensors that have equal numbers of rows on each rank; None: all of them have.
        check: raises what is wrong with this rank's tensors.

    Raises:
        DistributedError: on every rank where one of them cannot go on or differs.
    """
    ranks, refusal = Ranks(group), None
    given: dict[str, Tensor | None] = {}
    try:
        given = tensors() if callable(tensors) else tensors
        _check_local(ranks, given, [tuple(given)] if rows is None else rows)
        if check is not None:
            check()
    except (TypeError, ValueError) as error:
        refusal = error
    options += f"; {group.exchange}, workspace of {workspace_bytes(None)} bytes"
    sizes = agree(ranks, what, options, given, refusal)
    known: dict[int, Tensor] = {}
    for name, value in given.items():
        if value is not None and id(value) not in known:
            known[id(value)] = _of_all(value, sizes[name], ranks)
    with shared_by(ranks):
        return function(**{n: None if v is None else known[id(v)] for n, v in given.items()})


def _of_all(value: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    if value.dim() == 2:
        return Sharded(value, sizes, ranks)
    data = ranks.gather(value.detach(), sizes)
    if value.requires_grad and torch.is_grad_enabled():
        first = offsets(sizes)[ranks.rank]
        return _Whole.apply(value, (data, first, first + value.shape[0], ranks.size))
    return data


def _check_local(ranks: Ranks, tensors: dict[str, Tensor | None], rows: Sequence[tuple[str, ...]]) -> None:
    for name, value in tensors.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
        if value.dim() not in (1, 2):
            raise ValueError(f"{name} must have one or two dimensions; got shape {tuple(value.shape)}")
        if value.device.type not in ranks.devices():
            carried = ", ".join(sorted(ranks.devices()))
            raise ValueError(
                f"{name} must be on a device that the group's backend carries, {carried}; got {value.device}"
            )
    for names in rows:
        present = [n for n in names if tensors.get(n) is not None]
        for name in present[1:]:
            if tensors[name].shape[0] != tensors[present[0]].shape[0]:
                raise ValueError(
                    f"{name} must have as many rows as {present[0]} on each rank, {tensors[present[0]].shape[0]}; "
                    f"got {tensors[name].shape[0]}"
                )


def offsets(sizes: Sequence[int]) -> list[int]:
    """First row of each rank, and the end of the last."""
    return [0, *accumulate(sizes)]


def even_sizes(rows: int, parts: int) -> list[int]:
    """Shares of each rank where nothing else decides: contiguous, the first ranks one more where they do not divide."""
    whole, rest = divmod(rows, parts)
    return [whole + (r < rest) for r in range(parts)]
