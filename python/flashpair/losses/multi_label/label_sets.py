"""Sets of labels, one a sample: who shares labels with whom is found by label, never as a B×B matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...distributed.sharded import all_rows
from .weights import OverlapWeight

#: Entries (sample, label, other sample) at a time.
_ENTRIES = 1 << 22


class LabelSets:
    """The labels of each sample: memory is the number of labels given, whatever the number of labels there are.

    Args:
        owner: (P,) int64, which sample, ascending.
        label: (P,) int64, which label; a sample has each label once.
        rows: number of samples.
        num_labels: number of labels.

    Example:
        >>> from flashpair.losses import LabelSets
        >>> sets = LabelSets.from_lists([[0, 7], [], [7]], num_labels=10_000)
        >>> sets.sizes.tolist()
        [2, 0, 1]
    """

    def __init__(self, owner: Tensor, label: Tensor, rows: int, num_labels: int) -> None:
        self.owner, self.label, self.rows, self.num_labels = owner, label, rows, num_labels
        self.sizes = torch.bincount(owner, minlength=rows)  # (B,)
        self.counts = torch.bincount(label, minlength=num_labels)  # (C,) samples of each label
        self._first = torch.nn.functional.pad(self.sizes.cumsum(0), (1, 0))  # (B + 1,) of each sample's part
        order = label.argsort(stable=True)
        self._members = owner[order]  # (P,) samples by label
        self._start = self.counts.cumsum(0) - self.counts  # (C,)

    @classmethod
    def from_lists(cls, labels: Sequence[Sequence[int]], num_labels: int, device=None) -> LabelSets:
        """From the label numbers of each sample.

        Raises:
            ValueError: on a number outside of [0, num_labels), or one that a sample has twice.
        """
        for i, of in enumerate(labels):
            if len(set(of)) < len(of) or any(not 0 <= c < num_labels for c in of):
                raise ValueError(f"labels[{i}] must be different numbers in [0, {num_labels}); got {list(of)}")
        owner = [i for i, of in enumerate(labels) for _ in of]
        label = [c for of in labels for c in of]
        tensors = (torch.tensor(v, dtype=torch.int64, device=device) for v in (owner, label))
        return cls(*tensors, len(labels), num_labels)

    @classmethod
    def of(cls, name: str, labels: LabelSets | Tensor, rows: int, device: torch.device) -> LabelSets:
        """From what a loss was given: sets, or a multi-hot (B, C) tensor.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        if isinstance(labels, LabelSets):
            if labels.rows != rows or labels.owner.device != device:
                raise ValueError(
                    f"{name} must be the sets of {rows} samples on {device}; got {labels.rows} on {labels.owner.device}"
                )
            return labels
        labels = all_rows(labels)
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[0] != rows:
            got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"{name} must be LabelSets or a multi-hot tensor of shape ({rows}, labels); got {got}")
        if labels.device != device:
            raise ValueError(f"{name} must be on {device}; got {labels.device}")
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError(f"{name} must hold 0 and 1 only; got values from {labels.min()} to {labels.max()}")
        owner, label = labels.nonzero().unbind(1)
        return cls(owner.contiguous(), label.contiguous(), rows, labels.shape[1])

    def beside(self, other: LabelSets) -> LabelSets:
        """The samples of both, one after the other."""
        owner = torch.cat([self.owner, other.owner + self.rows])
        return LabelSets(owner, torch.cat([self.label, other.label]), self.rows + other.rows, self.num_labels)

    def single(self) -> LabelSets:
        """Every label as a sample that has only it."""
        each = torch.arange(self.num_labels, device=self.owner.device)
        return LabelSets(each, each, self.num_labels, self.num_labels)

    def mixture(self, values: Tensor, weights: Tensor) -> Tensor:
        """(B, D) Σ over a sample's labels of weights (P,) times values (C, D), differentiable in the values."""
        at = torch.stack([self.owner, self.label])
        table = torch.sparse_coo_tensor(at, weights, (self.rows, self.num_labels), check_invariants=False)
        return torch.sparse.mm(table, values)

    def sums(self, embeddings: Tensor) -> Tensor:
        """(C, D) sum of the embeddings (B, D) of each label's samples, differentiable."""
        at, ones = torch.stack([self.label, self.owner]), torch.ones_like(self.owner, dtype=embeddings.dtype)
        table = torch.sparse_coo_tensor(at, ones, (self.num_labels, self.rows), check_invariants=False)
        return torch.sparse.mm(table, embeddings)

    def shared_with(self, others: LabelSets, row: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All (a label that a row has, another sample that has it), a bounded number at a time.

        Args:
            others: the columns.
            row: (b,) which samples are asked.

        Yields:
            (pair (E,) position in `label`, position in `row` (E,), sample of `others` (E,)); the rows of one chunk are
            in no other.
        """
        first, size = self._first[row], self.sizes[row]
        local = torch.arange(len(row), device=row.device).repeat_interleave(size)
        within = torch.arange(len(local), device=row.device) - (size.cumsum(0) - size)[local]
        pair = first[local] + within
        reach = others.counts[self.label[pair]]
        ends = reach.cumsum(0)
        last_of_row = size.cumsum(0) - 1
        begin, total = 0, len(pair)
        if total == 0:
            return
        row_ends = torch.where(size > 0, ends[last_of_row.clamp_min(0)], -1).cummax(0).values.tolist()
        pair_ends, done = size.cumsum(0).tolist(), 0
        for i in range(len(row_ends)):
            if i + 1 < len(row_ends) and row_ends[i + 1] - done <= _ENTRIES:
                continue
            part, done = slice(begin, pair_ends[i]), row_ends[i]
            begin = pair_ends[i]
            yield self._entries(others, pair[part], local[part], reach[part])

    def _entries(self, others: LabelSets, pair, local, reach) -> tuple[Tensor, Tensor, Tensor]:
        which = torch.arange(len(pair), device=pair.device).repeat_interleave(reach)
        step = torch.arange(len(which), device=pair.device) - (reach.cumsum(0) - reach)[which]
        other = others._members[others._start[self.label[pair]][which] + step]
        return pair[which], local[which], other

    def weights(self, weigh: OverlapWeight, row: Tensor, dtype: torch.dtype) -> Tensor:
        """(b, B) `weigh(labels shared, size of the row's set, size of the column's)`, 0 for the row itself."""
        sizes = self.sizes.to(dtype)
        weights = weigh(self.overlap(self, row, dtype), sizes[row, None], sizes[None])
        return weights.scatter(1, row[:, None], 0.0)

    def overlap(self, others: LabelSets, row: Tensor, dtype: torch.dtype) -> Tensor:
        """(b, N) how many labels each of the rows shares with each sample of `others`."""
        found = torch.zeros(len(row) * others.rows, dtype=dtype, device=row.device)
        for _, local, other in self.shared_with(others, row):
            found += torch.bincount(local * others.rows + other, minlength=len(found))
        return found.view(len(row), others.rows)
