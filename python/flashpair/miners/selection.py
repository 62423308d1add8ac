"""What miners return: a rule that losses apply while they compute, or one triplet a row; index tensors on demand.

Both behave like the index tuple they stand for (`len`, iteration, indexing), which is computed only when that is
used, so losses of other libraries accept them too (pytorch-metric-learning's TripletMarginLoss wants a real tuple:
give it `as_tuple()`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from ..distributed.sharded import Sharded, local_rows
from ..reference import similarity_matrix
from ..terms import Mask, Reduction, Term

if TYPE_CHECKING:
    from ..losses.geometry import Geometry

_CHUNK_PAIRS = 1 << 20  # similarities at a time, 4 MiB in float32


def check_indices(indices, rows: int, columns: int, device: torch.device) -> None:
    """An index tuple of length 3 or 4, int64, equal lengths per sign, all indices in range."""
    if not isinstance(indices, (tuple, list)) or len(indices) not in (3, 4):
        got = f"length {len(indices)}" if isinstance(indices, (tuple, list)) else type(indices).__name__
        raise ValueError(
            "indices_tuple must be (anchors, positives, negatives) or (anchors, positives, anchors, negatives), "
            f"or what a flashpair miner returned; got {got}"
        )
    anchors = (0,) if len(indices) == 3 else (0, 2)
    for k, index in enumerate(indices):
        name = f"indices_tuple[{k}]"
        partner = k if k in anchors else max(a for a in anchors if a < k)
        checks.indices(name, index, indices[partner].shape[0])
        if index.device != device:
            raise ValueError(f"{name} must be on the device of embeddings, {device}; got {index.device}")
        limit = rows if k in anchors else columns
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < limit:
            raise ValueError(f"{name} must hold indices in [0, {limit}); got {int(index.min())} to {int(index.max())}")


def _same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are one, or views of the same memory that nobody wrote to in between."""
    if isinstance(a, Sharded) != isinstance(b, Sharded):
        return False
    a, b = local_rows(a), local_rows(b)
    if a is b:
        return True
    if a is None or b is None or torch.compiler.is_compiling():
        return False
    same = (a.shape, a.stride(), a.dtype, a.device, a._version) == (b.shape, b.stride(), b.dtype, b.device, b._version)
    return same and a.data_ptr() == b.data_ptr() and a.numel() > 0


class LazyTuple:
    """The tuple protocol over `as_tuple`."""

    def as_tuple(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.as_tuple())

    def __getitem__(self, index):
        return self.as_tuple()[index]


def listed(indices_tuple):
    """Index tensors of what a miner returned; anything else as it is."""
    return indices_tuple.as_tuple() if isinstance(indices_tuple, LazyTuple) else indices_tuple


def may_be_global(indices_tuple) -> bool:
    """Whether indices can be of a global batch: what a miner without a group found is of one process."""
    return not isinstance(indices_tuple, _OfEmbeddings) or isinstance(indices_tuple.embeddings, Sharded)


@dataclass(eq=False)
class _OfEmbeddings(LazyTuple):
    """What was mined, and how pairs were compared; subclasses have `exclude`, (B,) one column a row never meets."""

    embeddings: Tensor  # (B, D)
    columns: Tensor | None  # (N, D), None where they are the embeddings
    labels: Tensor  # (B,)
    ref_labels: Tensor | None  # (N,)
    geometry: Geometry

    def without(self, exclude: Tensor):
        """The same selection less one column per row, of the row's own class."""
        return replace(self, exclude=exclude, _indices=None)

    def mined_from(self, embeddings: Tensor, ref_emb: Tensor | None) -> bool:
        """Whether these are the embeddings that were mined."""
        ref_emb = None if ref_emb is embeddings else ref_emb
        if (self.columns is None) != (ref_emb is None):
            return False
        return _same_tensor(self.embeddings, embeddings) and _same_tensor(self.columns, ref_emb)


@dataclass(eq=False)
class ClosestNegative:
    """A threshold (B,) of the positives, `slack` beyond the closest negative of each row.

    A loss's pass over the negatives finds it on the way (`term`, `found`); who wants it earlier has it looked for.
    Until then the embeddings that were mined must not be written to.
    """

    look: Callable[[], Tensor]  # (B,) similarity or distance of that negative, infinite where there is none
    geometry: Geometry  # in which it stands
    exclude: Tensor | None  # as mined
    slack: float
    _value: Tensor | None = None

    def value(self) -> Tensor:
        """The threshold."""
        if self._value is None:
            with torch.no_grad(), _ordinary_tensors():
                self._value = self.look() + self.slack
        return self._value

    def awaited(self, exclude: Tensor | None) -> bool:
        """Whether a pass that leaves out these columns would find it; in another geometry it is a tensor already."""
        return self._value is None and exclude is self.exclude

    def term(self) -> Term:
        """What tells `found`, beside the terms of the negatives."""
        return Term(Reduction.MAX, mask=Mask.DIFFERENT, scale=float(self.geometry.sign))

    def found(self, largest: Tensor) -> None:
        """Take the result of `term`."""
        with _ordinary_tensors():
            self._value = self.geometry.sign * largest + self.slack


def _ordinary_tensors():
    """Outside of inference mode, whose tensors no later training step could keep."""
    inside = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inside else contextlib.nullcontext()


Bound = Tensor | ClosestNegative


def settled(bounds: dict[str, Bound]) -> dict[str, Tensor]:
    """The thresholds as tensors."""
    return {name: v if isinstance(v, Tensor) else v.value() for name, v in bounds.items()}


@dataclass(eq=False)
class MinedPairs(_OfEmbeddings):
    """All pairs of a batch whose similarity lies between per-row thresholds, O(B) numbers.

    As `indices_tuple` of a flashpair loss on the same embeddings it never becomes pairs: the thresholds join the
    loss's own pass. Where the loss compares embeddings in another way, thresholds of normalised embeddings are
    converted (d^2 = 2 - 2 cos); otherwise, and for other embeddings than those mined, `as_tuple` is used.

    Args:
        embeddings: (B, D) as mined.
        columns: (N, D) reference embeddings, None where they are the embeddings.
        labels: (B,). ref_labels: (N,) or None.
        geometry: similarity in which the thresholds stand.
        bounds: thresholds `above` and `below`, (B,) each, of `Mask.SAME` and `Mask.DIFFERENT`; of `Mask.SAME` also as
            `ClosestNegative`.
        exclude: (B,) one column that row i never meets, or None.
    """

    bounds: dict[Mask, dict[str, Bound]] = field(default_factory=dict)
    exclude: Tensor | None = None
    _indices: tuple[Tensor, ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return 4

    def without(self, exclude: Tensor) -> MinedPairs:
        # The closest negative is another column in any case.
        of_positives = {
            name: replace(v, exclude=exclude) if isinstance(v, ClosestNegative) else v
            for name, v in self.bounds.get(Mask.SAME, {}).items()
        }
        bounds = {**self.bounds, Mask.SAME: of_positives} if self.bounds else {}
        return replace(super().without(exclude), bounds=bounds)

    def bounds_in(self, geometry: Geometry) -> dict[Mask, dict[str, Bound]] | None:
        """The thresholds for another way to compare; None where they do not carry over."""
        from ..losses.geometry import convert_threshold

        if geometry == self.geometry:
            return self.bounds
        turned = {"above": "below", "below": "above"} if geometry.sign != self.geometry.sign else {}
        found: dict[Mask, dict[str, Bound]] = {}
        for mask, bounds in self.bounds.items():
            converted = {
                turned.get(k, k): convert_threshold(v, self.geometry, geometry) for k, v in settled(bounds).items()
            }
            if any(v is None for v in converted.values()):
                return None
            found[mask] = converted
        return found

    @torch.no_grad()
    def as_tuple(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(anchors, positives, anchors, negatives) int64; anchors ascend, partners by similarity (by index if unmined).

        Computed in chunks of rows; kept for the next use.
        """
        if self._indices is None:
            columns = self.embeddings if self.columns is None else self.columns
            step = max(_CHUNK_PAIRS // max(columns.shape[0], 1), 1)
            chunks = [self._chunk(start, step, columns) for start in range(0, max(len(self.embeddings), 1), step)]
            self._indices = tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))
        return self._indices

    def _chunk(self, start: int, step: int, columns: Tensor) -> list[Tensor]:
        rows = slice(start, start + step)
        s = similarity_matrix(self.embeddings[rows], columns, self.geometry.similarity, self.geometry.normalize)
        same = self.labels[rows, None] == (self.labels if self.ref_labels is None else self.ref_labels)[None, :]
        index = torch.arange(start, start + s.shape[0], device=s.device)
        excluded = index if self.columns is None else None if self.exclude is None else self.exclude[rows]
        allowed = torch.ones_like(same)
        if excluded is not None:
            allowed = torch.arange(s.shape[1], device=s.device)[None, :] != excluded[:, None]
        found = []
        for mask, keep in ((Mask.SAME, same & allowed), (Mask.DIFFERENT, ~same & allowed)):
            bounds = settled(self.bounds.get(mask, {}))
            for name, drops in (("above", torch.le), ("below", torch.ge)):
                if name in bounds:
                    keep = keep & ~drops(s, bounds[name][rows, None])
            if not self.bounds:
                i, j = keep.nonzero(as_tuple=True)
            else:
                order = torch.where(keep, s, torch.inf).argsort(dim=1, stable=True)
                i, k = keep.gather(1, order).nonzero(as_tuple=True)
                j = order[i, k]
            found += [i + start, j]
        return found


@dataclass(eq=False)
class MinedTriplets(LazyTuple):
    """One triplet (i, positives[i], negatives[i]) a row, absent where an index is -1.

    As `indices_tuple` of `flashpair.losses.TripletMarginLoss` it stays in this form, of fixed size; other losses
    receive `as_tuple`.

    Args:
        positives: (B,) int64 columns, -1 where there is none.
        negatives: (B,) int64 columns, -1 where there is none.
    """

    positives: Tensor
    negatives: Tensor
    _indices: tuple[Tensor, ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return 3

    @property
    def valid(self) -> Tensor:
        """(B,) bool: the rows that have a triplet."""
        return (self.positives >= 0) & (self.negatives >= 0)

    def without(self, exclude: Tensor) -> MinedTriplets:
        """The triplets whose positive is not the excluded column (B,) of their row."""
        return MinedTriplets(torch.where(self.positives == exclude, -1, self.positives), self.negatives)

    def as_tuple(self) -> tuple[Tensor, Tensor, Tensor]:
        """(anchors, positives, negatives) int64, anchors ascending; kept for the next use."""
        if self._indices is None:
            (anchors,) = self.valid.nonzero(as_tuple=True)
            self._indices = (anchors, self.positives[anchors], self.negatives[anchors])
        return self._indices


@dataclass(eq=False)
class MinedTripletBand(_OfEmbeddings):
    """All triplets (a, p, n) whose negative is farther than the positive by more than `low` and at most `high`.

    As `indices_tuple` of `flashpair.losses.TripletMarginLoss` on the same embeddings and distance the triplets are
    never listed; other losses receive `as_tuple`.

    Args:
        embeddings: (B, D) as mined.
        columns: (N, D) reference embeddings, None where they are the embeddings.
        labels: (B,). ref_labels: (N,) or None.
        geometry: how pairs are compared.
        low, high: bounds of d_an - d_ap (similarities: s_ap - s_an), None for none.
        exclude: (B,) one column that row i never meets, or None.
    """

    low: float | None
    high: float | None
    exclude: Tensor | None = None
    _indices: tuple[Tensor, ...] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return 3

    @torch.no_grad()
    def as_tuple(self) -> tuple[Tensor, Tensor, Tensor]:
        """(anchors, positives, negatives) int64, ascending; O(T) memory for T triplets, kept for the next use."""
        if self._indices is None:
            columns = self.embeddings if self.columns is None else self.columns
            pairs = MinedPairs(
                self.embeddings, self.columns, self.labels, self.ref_labels, self.geometry, exclude=self.exclude
            )
            step = max(_CHUNK_PAIRS // max(columns.shape[0], 1), 1)
            found = [self._chunk(start, step, columns, pairs) for start in range(0, max(len(self.embeddings), 1), step)]
            self._indices = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
        return self._indices

    def _chunk(self, start: int, step: int, columns: Tensor, pairs: MinedPairs) -> tuple[Tensor, ...]:
        rows = slice(start, start + step)
        s = similarity_matrix(self.embeddings[rows], columns, self.geometry.similarity, self.geometry.normalize)
        s = -self.geometry.sign * s  # larger means farther
        a, p, b, n = pairs._chunk(start, step, columns)
        block = max(_CHUNK_PAIRS // max(columns.shape[0], 1), 1)
        negative = torch.zeros_like(s, dtype=torch.bool)
        negative[b - start, n] = True
        found = []
        for first in range(0, max(len(a), 1), block):
            i, j = a[first : first + block] - start, p[first : first + block]
            gap = s[i] - s[i, j][:, None]
            keep = negative[i]
            if self.low is not None:
                keep = keep & ~(gap <= self.low)
            if self.high is not None:
                keep = keep & ~(gap > self.high)
            k, n = keep.nonzero(as_tuple=True)
            found.append((i[k] + start, j[k], n))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
