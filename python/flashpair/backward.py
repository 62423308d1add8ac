"""The pass over pair weights W around a backend's kernels: dX = W Y and dY = Wᵀ X, panel by panel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .operands import ALONG_OTHERS, Operands, operands
from .request import FlatTerm, Request, statistics_dtype
from .rowwise import TORCH, Rowwise
from .terms import Guide, Reduction, Similarity

#: float16 pair weights are scaled by a power of two so that the largest cotangent becomes about this.
_HALF_RANGE = 16.0
#: Parameters of a term that have gradients.
DIFFERENTIABLE = ("scale", "offset", "other_offset", "weight")


@dataclass
class Slots:
    """Where the partial sums of parameter gradients, the value and the weights go: a vector per slot and side."""

    used: list[int] = field(default_factory=lambda: [0, 0])  # slots per side; one shared count for self-similarity
    of: dict[tuple[int, str], int] = field(default_factory=dict)  # (term, name of a parameter or "value") → slot
    uses: list[tuple[int, int, int]] = field(default_factory=list)  # (parameter, side, slot)
    values: list[tuple[int, int]] = field(default_factory=list)  # (side, slot)

    def take(self, side: int) -> int:
        self.used[side] += 1
        return self.used[side] - 1


def _slots(terms: list[FlatTerm], symmetric: bool, needs_params: tuple[bool, ...], with_value: bool) -> Slots:
    # One name after the other, so that what one parameter's terms say of it is mostly in neighbouring slots.
    slots = Slots()
    for name in DIFFERENTIABLE:
        for t, term in enumerate(terms):
            index = term.index[name]
            if index >= 0 and needs_params[index]:
                side = 0 if symmetric else int(term.axis) ^ int(name in ALONG_OTHERS)
                slots.of[t, name] = slots.take(side)
                slots.uses.append((index, side, slots.of[t, name]))
    for t, term in enumerate(terms) if with_value else ():
        side = 0 if symmetric else int(term.axis)
        slots.of[t, "value"] = slots.take(side)
        slots.values.append((side, slots.of[t, "value"]))
    return slots


class Sums:
    """Running sums of a pass, float64, a vector per slot and side; those of a self-similarity are the same."""

    def __init__(self, slots: Slots, rows: int, columns: int, shared: bool, device: torch.device) -> None:
        of_rows, of_columns = slots.used[0] * rows, 0 if shared else slots.used[1] * columns
        of_rows += of_rows % 2 if of_columns else 0  # those of the columns begin at a multiple of 16 bytes
        self.lengths = rows, rows if shared else columns
        self.firsts = 0, 0 if shared else of_rows
        self.written = set(range(slots.used[0])), set(range(slots.used[1]))  # the others are 0, whatever they hold
        self.flat = torch.empty(of_rows + of_columns, dtype=torch.float64, device=device)  # not filled
        self.sides = tuple(  # (slots, rows), (slots, columns)
            self.flat[first : first + count * length].view(count, length)
            for first, count, length in zip(self.firsts, slots.used, self.lengths, strict=True)
        )

    def vector(self, side: int, slot: int) -> Tensor:
        """(owners,) of one slot."""
        found = self.sides[side][slot]
        return found if slot in self.written[side] else torch.zeros_like(found)

    def total(self, places: list[tuple[int, int]]) -> Tensor:
        """0-d sum over all owners of slots (side, slot)."""
        pieces: list[list[int]] = []  # first entry, end; what follows one another is one piece
        for side, slot in self._of_any(places):
            first = self.firsts[side] + slot * self.lengths[side]
            if pieces and pieces[-1][1] == first:
                pieces[-1][1] += self.lengths[side]
            else:
                pieces.append([first, first + self.lengths[side]])
        found = [self.flat[first:end] for first, end in pieces]
        return (torch.cat(found) if len(found) > 1 else found[0] if found else self.flat[:0]).sum()

    def totals(self, wanted: list[list[tuple[int, int]]]) -> list[Tensor]:
        """The `total` of each, which may be a view, in few operators."""
        if len(wanted) < 3:
            return [self.total(places) for places in wanted]
        wanted = [self._of_any(places) for places in wanted]
        of_slots = {side: self.sides[side].sum(1) for side in sorted({side for of in wanted for side, _ in of})}
        found = []
        for places in wanted:
            parts = [of_slots[side][slot] for side, slot in places]
            found.append(parts[0] if len(parts) == 1 else torch.stack(parts or [self.flat.new_zeros(())]).sum())
        return found

    def _of_any(self, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(side, slot) for side, slot in places if slot in self.written[side]]


@dataclass
class Backward:
    """A pass over the pair weights; a self-similarity has one gradient and one state, which both sides add to."""

    op: Operands
    terms: list[FlatTerm]  # vectors in the order of the operands, as everything below
    cotangents: list[Tensor | None]  # of each term, (owners,); None: not differentiable, or 1 in a pass of sums
    statistics: list[tuple[Tensor | None, Tensor | None]]  # (mean, logsumexp) of each term, (owners,)
    with_value: bool  # a pass of sums
    slots: Slots
    row_sum: int  # slots of the sums of weights, for distances; -1 for none
    column_sum: int
    sums: Sums  # not filled
    x: Tensor  # (B, D), (N, D) as the matrix products read them
    y: Tensor
    dx: Tensor | None  # (B, D), (N, D) in the dtype of statistics, uninitialised
    dy: Tensor | None
    scale: Tensor | None  # (1,) for float16: pair weights are multiplied by it before rounding
    reached: list[int] = field(default_factory=lambda: [0, 0])  # rows of dx and dy that hold a sum, the first ones

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Running sums (slots, B), (slots, N), float64."""
        return self.sums.sides

    def first_touch(self, side: int, rows: slice) -> bool:
        """Whether nothing was written yet to these rows of a gradient; afterwards it was.

        Panels come in the order of their columns, those of the first rows first, so that what was written has no gap.
        """
        fresh = rows.start >= self.reached[side]
        self.reached[side] = max(self.reached[side], rows.stop)
        return fresh

    def tensor(self, t: int, name: str) -> Tensor | float | None:
        """A parameter of a term, its "cotangent", or its statistic, "mean" or "logsumexp"."""
        if name == "cotangent":
            return self.cotangents[t]
        if name in ("mean", "logsumexp"):
            return self.statistics[t][name == "logsumexp"]
        return getattr(self.terms[t], name)


def weights(
    request: Request,
    rows: Tensor,  # (R, B) statistics
    columns: Tensor,  # (C, N)
    grad_rows: Tensor,  # (R, B)
    grad_columns: Tensor,  # (C, N)
    needs,
    add_panels: Callable[[Request, Backward], None],
    plain_tiles: bool = False,
    rowwise: Rowwise = TORCH,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients (dx, dy, [dparam, ...]) of the statistics; `add_panels` adds every panel to dx, dy and the states."""
    cotangents, statistics = [], []
    for term in request.terms:
        known, gradient = (columns, grad_columns) if int(term.axis) else (rows, grad_rows)
        cotangents.append(gradient[term.slot] if term.reduction.differentiable else None)
        if term.reduction == Reduction.LOGSUMEXP:
            statistics.append((None, known[term.slot]))
        elif term.reduction == Reduction.SOFTMAX_MEAN:
            statistics.append((known[term.slot], known[term.slot + 1]))
        else:
            statistics.append((None, None))
    _, dx, dy, dparams = _gradients(request, cotangents, statistics, needs, False, add_panels, plain_tiles, rowwise)
    return dx, dy, dparams


def sums(
    request: Request,
    needs,
    stats: Callable[[Request], tuple[Tensor, Tensor]],
    add_panels: Callable[[Request, Backward], None],
    plain_tiles: bool = False,
    rowwise: Rowwise = TORCH,
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor | None]]:
    """(total, dx, dy, [dparam, ...]) of a pass of sums: S is computed once."""
    if not (needs.x or needs.y or any(needs.params)):
        rows, columns = stats(request)
        total = rows.double().sum() + columns.double().sum()
        return total.to(statistics_dtype(request.x)), None, None, [None] * len(request.params)
    nothing = [None] * len(request.terms)
    return _gradients(
        request, nothing, [(None, None)] * len(request.terms), needs, True, add_panels, plain_tiles, rowwise
    )


def _gradients(
    request: Request, cotangents, statistics, needs, with_value: bool, add_panels, plain_tiles: bool, rowwise: Rowwise
):
    B, N = request.shape
    device, dtype = request.x.device, statistics_dtype(request.x)
    symmetric, distance = request.symmetric, request.similarity != Similarity.DOT
    op = operands(request, {t.mask for t in request.terms}, plain_tiles, rowwise)
    sides = [int(t.axis) for t in request.terms]
    cotangents = [op.arrange(c, s) for c, s in zip(cotangents, sides, strict=True)]
    statistics = [tuple(op.arrange(v, s) for v in pair) for pair, s in zip(statistics, sides, strict=True)]
    terms = op.arranged_terms(request.terms)
    slots = _slots(terms, symmetric, needs.params, with_value)
    need_x, need_y = needs.x, needs.y and not symmetric
    row_sum = column_sum = -1
    if distance and (need_x or need_y):
        row_sum = slots.take(0)
        column_sum = row_sum if symmetric else slots.take(1)
    if symmetric:
        slots.used[1] = slots.used[0]
    sums = Sums(slots, B, N, symmetric, device)
    passes = bool(B and N) and (with_value or any(c is not None for c in cotangents))
    gradient = functools.partial(torch.empty if passes else torch.zeros, dtype=dtype, device=device)
    dx = gradient(op.x.shape) if need_x else None
    dy = gradient(op.y.shape) if need_y else None
    scale = _half_scale(terms, cotangents, op.guide, device) if op.x.dtype == torch.float16 and B and N else None
    x = rowwise.unit_rows(op.x) if op.scaled else op.x
    y = x if symmetric else rowwise.unit_rows(op.y) if op.scaled else op.y
    if passes:
        plan = Backward(
            op, terms, cotangents, statistics, with_value, slots, row_sum, column_sum, sums, x, y, dx, dy, scale
        )
        add_panels(request, plan)
    else:
        sums.flat.zero_()
    if dx is not None:
        sums_of = sums.sides[0][row_sum] if distance else None
        dx = op.restore(rowwise.gradient(dx, x, op.raw_x, request.normalize, sums_of, scale), 0, 0)
    if dy is not None:
        sums_of = sums.sides[1][column_sum] if distance else None
        dy = op.restore(rowwise.gradient(dy, y, op.raw_y, request.normalize, sums_of, scale), 1, 0)
    dparams, total = _parameter_gradients(request, op, slots, sums)
    return None if total is None else total.to(dtype, copy=True), dx, dy, dparams


def accumulate(out: Tensor, w: Tensor, operand: Tensor, transposed: bool, fresh: bool) -> None:
    """out = or += (not `fresh`) w @ operand, or wᵀ @ operand, in the dtype of out, float32 or float64."""
    a, b = w.T if transposed else w, operand
    wide = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if wide and not a.is_cuda:
        a, b, wide = a.to(out.dtype), b.to(out.dtype), {}
    if fresh:
        torch.mm(a, b, out=out, **wide)
    else:
        torch.addmm(out, a, b, out=out, **wide)


def add_panel(
    plan: Backward,
    w: Tensor,  # (rows, columns) of the panel
    first_b: int,
    first_n: int,
    mirror: bool,  # the panel also stands for its mirror image: a self-similarity off the diagonal
    multiply: Callable[[Tensor, Tensor, Tensor, bool, bool], None] = accumulate,
) -> None:
    """Multiply the pair weights of one panel into the gradients."""
    rows, columns = slice(first_b, first_b + w.shape[0]), slice(first_n, first_n + w.shape[1])
    if plan.dx is not None:
        multiply(plan.dx[rows], w, plan.y[columns], False, plan.first_touch(0, rows))
        if mirror:
            multiply(plan.dx[columns], w, plan.x[rows], True, plan.first_touch(0, columns))
    if plan.dy is not None:
        multiply(plan.dy[columns], w, plan.x[rows], True, plan.first_touch(1, columns))


def _half_scale(
    terms: list[FlatTerm], cotangents: list[Tensor | None], guide: tuple[Tensor, Tensor] | None, device
) -> Tensor:
    """(1,) power of two that brings the largest cotangent times scale near `_HALF_RANGE`; 1 if that is not finite."""
    largest = torch.zeros((), dtype=torch.float32, device=device)
    products = 1.0 if guide is None else math.prod(v.float().square().sum(1).amax().sqrt() for v in guide)
    for term, cotangent in zip(terms, cotangents, strict=True):
        if cotangent is None:
            bound = torch.ones((), dtype=torch.float32, device=device)
        else:
            bound = cotangent.abs().amax()
        for value in (term.scale, term.weight if term.reduction == Reduction.SUM else None):
            if isinstance(value, Tensor):
                bound = bound * value.detach().float().abs().amax()
            elif value is not None:
                bound = bound * abs(value)
        if term.guide == Guide.WEIGHT and term.reduction == Reduction.SUM:
            bound = bound * products
        largest = torch.maximum(largest, bound)
    scale = torch.exp2(torch.floor(torch.log2(_HALF_RANGE / largest)).clamp(-100.0, 100.0))
    return torch.where(scale.isfinite(), scale, 1.0).reshape(1)


def _parameter_gradients(
    request: Request, op: Operands, slots: Slots, sums: Sums
) -> tuple[list[Tensor | None], Tensor | None]:
    """Each parameter's gradient, which is the sum over its uses, and the value of a pass of sums."""
    uses: dict[int, list[tuple[int, int]]] = {}
    for index, side, slot in slots.uses:
        uses.setdefault(index, []).append((side, slot))
    found: list[Tensor | None] = [None] * len(request.params)
    numbers = {}  # those that are one number
    for index, places in uses.items():
        if request.params[index].numel() == 1:
            numbers[index] = places
        else:
            parts = [op.restore(sums.vector(side, slot), side) for side, slot in places]
            found[index] = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0].clone()
    value = len(request.params)
    if slots.values:
        numbers[value] = slots.values
    totals = sums.totals(list(numbers.values()))
    numbers = dict(zip(numbers, totals, strict=True))
    total = numbers.pop(value, None)
    for index, number in numbers.items():
        # What leaves an operator shares no memory; most are cast to the dtype of their parameter on the way out.
        cast = request.params[index].dtype != number.dtype
        found[index] = (number if cast else number.clone()).reshape(1)
    return found, total
