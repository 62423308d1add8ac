"""A pass as csrc/bind_cuda.cpp decodes it: what a tile evaluates, terms with their parameters, the place of a panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .operands import Operands, padded
from .panels import cdiv
from .request import FlatTerm, Request
from .rowwise import padded_length
from .terms import Combine, Extreme, Guide, Reduction

#: As in csrc/program_cuda.h and csrc/strip_cuda.h.
MAX_TERMS = 16
TILE_COLUMNS = 128
#: Fields of a header, an item and a term; operands; terms.
LAYOUT = [18, 3, 25, 9, MAX_TERMS]


@dataclass(frozen=True)
class Item:
    """One evaluation on a tile: a term that owns its rows, one that owns its columns (-1: none), or both with one z."""

    row: int
    column: int
    shared: bool = False


def _single(value) -> bool:
    return not isinstance(value, Tensor) or value.numel() == 1


def _uniform(term: FlatTerm) -> bool:
    """z is one affine function of s for all pairs."""
    plain = _single(term.scale) and _single(term.offset) and term.other_offset is None and term.weight is None
    return plain and term.guide in (Guide.NONE, Guide.THRESHOLD)


def _same_z(a: FlatTerm, b: FlatTerm) -> bool:
    same = lambda name: (  # noqa: E731
        a.index[name] == b.index[name] and (a.index[name] >= 0 or getattr(a, name) == getattr(b, name))
    )
    return a.score == b.score and a.constant == b.constant and same("scale") and same("offset")


def evaluations(terms: Sequence[FlatTerm], symmetric: bool, shareable: tuple[Reduction, ...]) -> list[Item]:
    """What a tile evaluates: each term by rows or columns, in a self-similarity by both; pairs with one z together."""
    if symmetric:
        return [Item(t, t, _uniform(term) and term.reduction in shareable) for t, term in enumerate(terms)]
    items, taken = [], set()
    for t, term in enumerate(terms):
        if t in taken:
            continue
        partner = -1
        if _uniform(term) and term.reduction in shareable and term.reduction != Reduction.SOFTMAX_MEAN:
            for u in range(t + 1, len(terms)):
                other = terms[u]
                alike = other.axis != term.axis and other.reduction == term.reduction and _uniform(other)
                if u not in taken and alike and _same_z(term, other):
                    partner = u
                    taken.add(u)
                    break
        own = (t, partner) if int(term.axis) == 0 else (partner, t)
        items.append(Item(*own, partner >= 0))
    return items


@dataclass
class Program:
    """Terms and items of a pass; the header names the panel."""

    operands: list[Tensor]
    header: dict[str, int]
    items: list[Item]
    terms: list[list[int]] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)

    def vector(self, value: Tensor | None) -> int:
        """Position of a vector that is read along a side, -1 without."""
        if value is None:
            return -1
        self.vectors.append(padded(value.detach().to(self.dtype).reshape(-1)))
        return len(self.vectors) - 1

    def parameter(self, value, absent: float) -> tuple[int, float]:
        """(position or -1, number) of an owner's parameter."""
        if not isinstance(value, Tensor):
            return -1, absent if value is None else float(value)
        if value.numel() != 1:
            return self.vector(value), absent
        self.vectors.append(value.detach().to(self.dtype).reshape(1))
        return len(self.vectors) - 1, absent

    @property
    def dtype(self) -> torch.dtype:
        return self.operands[2].dtype  # of the norms

    def add(self, term: FlatTerm | Extreme, slots: dict[str, int], cotangent=None, lse=None, mean=None) -> None:
        """Append a term, or an extreme as one."""
        extreme = isinstance(term, Extreme)
        absent = {"scale": 1.0, "offset": 0.0, "above": -torch.inf, "below": torch.inf}
        places, numbers = zip(*(self.parameter(getattr(term, n, None), v) for n, v in absent.items()), strict=True)
        self.numbers += [*numbers, 0.0 if extreme else term.constant]
        kind = (0, 0, int(term.mask), 0, 0, 0) if extreme else (
            int(term.reduction), int(term.score), int(term.mask), int(term.combine == Combine.LOGADDEXP),
            int(term.detach_weights), int(term.guide),
        )  # fmt: skip
        self.terms.append(
            [
                *kind, int(term.above is not None), int(term.below is not None), int(extreme and term.largest),
                0 if extreme else int(term.axis), *places,
                *(self.vector(v) for v in (getattr(term, "other_offset", None), getattr(term, "weight", None))),
                *(self.vector(v) for v in (cotangent, lse, mean)),
                *(slots.get(n, -1) for n in ("statistic", "scale", "offset", "other_offset", "weight", "value")),
            ]
        )  # fmt: skip

    def beside(self, guide: Tensor) -> list[Tensor]:
        """The operands, with the second products of a panel."""
        return [*self.operands[:-1], guide]

    def codes(self, panel: tuple[int, int, int, int], tile_rows: int, **flags: int) -> list[int]:
        """The flat pass for one panel: (first row, end, first column, end)."""
        first_b, end_b, first_n, end_n = panel
        place = (*panel, cdiv(end_b - first_b, tile_rows), cdiv(end_n - first_n, TILE_COLUMNS))
        header = {**self.header, **flags}
        flat = [*place, *header.values(), len(self.items), len(self.terms)]
        for item in self.items:
            flat += (item.row, item.column, int(item.shared))
        for term in self.terms:
            flat += term
        return flat


def program(request: Request, op: Operands, items: list[Item], **flags: int) -> Program:
    nothing = op.x.new_empty(0)
    listed = [
        op.x, op.y, op.x_norms, op.y_norms, op.x_labels, op.y_labels,
        nothing if request.exclude is None else op.exclude, nothing if request.pair_mask is None else op.pair_mask,
        nothing,
    ]  # fmt: skip
    header = {
        "padded_b": padded_length(op.x.shape[0]),
        "padded_n": padded_length(op.y.shape[0]),
        "columns": op.y.shape[0],
        "similarity": int(request.similarity),
        "scaled": int(op.scaled),
        "exclude_self": int(request.exclude_self),
        "symmetric": int(request.symmetric),
        "triangle": 0,
        "mirror_sums": 1,
        "same_only": int(op.same_only and op.orders[0] is not None),
    }
    return Program(listed, header | flags, items)
