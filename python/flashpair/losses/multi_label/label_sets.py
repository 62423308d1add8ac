"""Sets of labels, one a sample: who shares labels with whom is found by label, never as a B×B matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...distributed.sharded import all_rows, current, even_sizes, offsets
from ...pairs import accumulate
from ...panels import product
from ...workspace import workspace_bytes
from .weights import OverlapWeight

#: Pairs that share a label at a time: at most, and bytes of workspace for one. Labels that an average pair shares from
#: which on panels are faster than lists.
_PAIRS, _BYTES, _MANY = 1 << 20, 128, 0.15


@dataclass
class Sharing:
    """Some rows with all samples that share a label with them: a list (E,) by row, or a panel (b, N) where many do.

    `row` and `other` of a panel are (b, 1) and (1, N): what is computed of a pair broadcasts.
    """

    first: int
    end: int
    row: Tensor  # int64, first <= row < end
    other: Tensor  # int64
    shared: Tensor  # how many labels; in a panel 0 where none is
    sums: list[Tensor]  # as `shared` each: the sums over shared labels that were asked for

    @property
    def panel(self) -> bool:
        """Whether this is a panel."""
        return self.shared.dim() == 2

    def totals(self, weights: Tensor) -> Tensor:
        """(b,) Σ_j weight(i, j)."""
        if self.panel:
            return weights.sum(1)
        found = weights.new_zeros(self.end - self.first)
        accumulate(found, self.row - self.first, weights)
        return found

    def times(self, weights: Tensor, values: Tensor) -> Tensor:
        """(b, D) Σ_j weight(i, j) values_j."""
        if self.panel:
            return weights @ values
        each = torch.arange(self.first, self.end, device=values.device)
        starts = torch.searchsorted(self.row, each)
        return F.embedding_bag(self.other, values, starts, mode="sum", per_sample_weights=weights)

    def by_other(self, weights: Tensor, rows: int) -> Tensor:
        """(rows, b) the weights as a panel."""
        if self.panel:
            return weights.T.contiguous()
        found = weights.new_zeros(rows, self.end - self.first)
        found[self.other, self.row - self.first] = weights
        return found


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
        self._order = label.argsort(stable=True)  # (P,) by label

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

    def together(self) -> Tensor:
        """(C, C) float64, how many samples have both of two labels."""
        table = self._by_label(torch.ones_like(self.owner, dtype=torch.float64))
        return torch.sparse.mm(table, table.T.coalesce()).to_dense()

    def mixture(self, values: Tensor, weights: Tensor) -> Tensor:
        """(B, D) Σ over a sample's labels of weights (P,) times values (C, D), differentiable in the values."""
        at = torch.stack([self.owner, self.label])
        table = torch.sparse_coo_tensor(at, weights, (self.rows, self.num_labels), check_invariants=False)
        return product(table, values)

    def sums(self, embeddings: Tensor) -> Tensor:
        """(C, D) sum of the embeddings (B, D) of each label's samples, differentiable."""
        at, ones = torch.stack([self.label, self.owner]), torch.ones_like(self.owner, dtype=embeddings.dtype)
        table = torch.sparse_coo_tensor(at, ones, (self.num_labels, self.rows), check_invariants=False)
        return product(table, embeddings)

    def sharing(
        self, others: LabelSets, dtype: torch.dtype, per: Sequence[tuple[Tensor, Tensor]] = (), beside: int = 0
    ) -> Iterator[Sharing]:
        """All pairs of a sample and one of `others` that have a label in common, a bounded number at a time.

        Args:
            others: the columns; may be these sets themselves, whose pairs (i, i) are among them.
            dtype: of what is counted.
            per: (P,) factors of own entries and (P',) of the others'; their products are summed over shared labels.
            beside: numbers that the caller holds for each row of a chunk, in place of so many pairs.

        Of rows that ranks share, each sees a part; see `over_ranks`.
        """
        if self.rows == 0 or len(self.owner) == 0 or len(others.owner) == 0:
            return
        reach = torch.zeros(self.rows, dtype=torch.int64, device=self.owner.device)
        reach.index_add_(0, self.owner, others.counts[self.label])
        visits, pairs = torch.stack([reach, reach.clamp_max(others.rows)]).cumsum(1).cpu()
        budget = min(_PAIRS, max(workspace_bytes(None) // _BYTES, 1))
        many = int(visits[-1]) > _MANY * self.rows * others.rows
        rows = torch.arange(1, self.rows + 1)
        ends = (rows * others.rows if many else pairs) + rows * (beside + self.num_labels // 32)
        ones = [torch.ones(len(sets.owner), dtype=dtype, device=sets.owner.device) for sets in (self, others)]
        per = [(ones[0], ones[1]), *per]
        columns = per if many else [(left, others._by_label(right)) for left, right in per]
        first, last = own_part(self.rows)
        while first < last:
            done = int(ends[first - 1]) if first else 0
            end = min(max(int(torch.searchsorted(ends, done + budget, right=True)), first + 1), last)
            part = self._entries(first, end)
            owner, label = self.owner[part] - first, self.label[part]
            size = end - first, self.num_labels
            if many:
                shared, *sums = (others._gathered(label, owner, left[part], size, right) for left, right in columns)
                row, other = (torch.arange(*bounds, device=owner.device) for bounds in ((first, end), (others.rows,)))
                yield Sharing(first, end, row[:, None], other[None], shared, sums)
            else:
                (at, shared), *found = (_matching(owner, label, left[part], size, right) for left, right in columns)
                yield Sharing(first, end, at[0] + first, at[1].contiguous(), shared, [v for _, v in found])
            first = end

    def _entries(self, first: int, end: int) -> slice:
        """Which entries some samples have."""
        return slice(*self._first[[first, end]].tolist())

    def _gathered(
        self, label: Tensor, row: Tensor, values: Tensor, size: tuple[int, int], own: Tensor | None
    ) -> Tensor:
        """(b, rows) Σ over each sample's labels of own (P,) times a table (b, C) given by its entries."""
        table = torch.zeros(size[::-1], dtype=values.dtype, device=values.device)
        table[label, row] = values
        return self.bags(table, own)

    def bags(self, table: Tensor, weights: Tensor | None = None, largest: bool = False) -> Tensor:
        """(b, B) Σ over each sample's labels of weights (P,) times the rows of a table (C, b), or the largest of them.

        Of no labels 0.
        """
        mode = "max" if largest else "sum"
        found = F.embedding_bag(self.label, table, self._first[:-1], mode=mode, per_sample_weights=weights)
        return found.T.contiguous()

    def _by_label(self, values: Tensor) -> Tensor:
        """(C, rows) table of values (P,)."""
        at = torch.stack([self.label, self.owner])[:, self._order]
        size = self.num_labels, self.rows
        return torch.sparse_coo_tensor(at, values[self._order], size, is_coalesced=True, check_invariants=False)

    def per_label(self, weigh: OverlapWeight, dtype: torch.dtype, others: LabelSets | None = None) -> Tensor:
        """(P,) Σ_j weight(i, j) over the j that have c, for each label c of each sample i.

        Args:
            others: the j; default: these sets, without i itself.
        """
        columns = self if others is None else others
        found = torch.zeros(len(self.owner), dtype=dtype, device=self.owner.device)
        a, b = self.sizes.to(dtype), columns.sizes.to(dtype)
        members = columns.owner[columns._order]  # by label
        starts = columns.counts.cumsum(0) - columns.counts
        for pairs in self.sharing(columns, dtype, beside=(self.num_labels + columns.rows) // 16):
            weights = weigh(pairs.shared, a[pairs.row], b[pairs.other])
            if others is None:
                weights = torch.where(pairs.row == pairs.other, 0.0, weights)
            sums = F.embedding_bag(members, pairs.by_other(weights, columns.rows), starts, mode="sum")  # (C, b)
            part = self._entries(pairs.first, pairs.end)
            found[part] = sums[self.label[part], self.owner[part] - pairs.first]
        return over_ranks(found)

    def overlap(self, others: LabelSets, row: Tensor, dtype: torch.dtype) -> Tensor:
        """(b, N) how many labels each of the rows shares with each sample of `others`."""
        local, label = self.of_rows(row)
        ones = torch.ones(len(local), dtype=dtype, device=row.device)
        return others._gathered(label, local, ones, (len(row), self.num_labels), None)

    def of_rows(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """((P',) place in `row`, (P',) label) of the labels of some rows (b,)."""
        first, size = self._first[row], self.sizes[row]
        local = torch.arange(len(row), device=row.device).repeat_interleave(size)
        within = torch.arange(len(local), device=row.device) - (size.cumsum(0) - size)[local]
        return local, self.label[first[local] + within]

    def weights(self, weigh: OverlapWeight, row: Tensor, dtype: torch.dtype) -> Tensor:
        """(b, B) `weigh(labels shared, size of the row's set, size of the column's)`, 0 for the row itself."""
        sizes = self.sizes.to(dtype)
        weights = weigh(self.overlap(self, row, dtype), sizes[row, None], sizes[None])
        return weights.scatter(1, row[:, None], 0.0)


def _matching(row: Tensor, label: Tensor, values: Tensor, size: tuple[int, int], right: Tensor):
    """((2, E) places by row, (E,) values) of a table given by its entries, by row, times a sparse table."""
    if len(row) == 0:
        return torch.stack([row, label]), values
    left = torch.sparse_coo_tensor(
        torch.stack([row, label]), values, size, is_coalesced=True, check_invariants=False
    )  # fmt: skip
    found = torch.sparse.mm(left, right)
    at, values = found._indices(), found._values()
    if values.is_cuda:  # where the library promises no order
        order = (at[0] * right.shape[1] + at[1]).argsort()
        at, values = at[:, order], values[order]
    return at, values


def own_part(rows: int) -> tuple[int, int]:
    """First and end of the rows that this process sees to."""
    ranks = current()
    if ranks is None:
        return 0, rows
    cuts = offsets(even_sizes(rows, ranks.size))
    return cuts[ranks.rank], cuts[ranks.rank + 1]


def over_ranks(value: Tensor) -> Tensor:
    """The sum of what each rank found for its part."""
    ranks = current()
    return value if ranks is None else ranks.total(value)
