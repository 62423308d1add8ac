"""The passes over S divided over ranks: each takes its own rows against all columns, once for both directions.

Statistics of rows are complete where they are made and gathered; those of columns are merged by sums over the ranks.
Both are then equal on all ranks, and so are the cotangents that come back for them. A parameter's gradient is summed
over the ranks; those of embeddings see `sides.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from .. import pairs as pairs_of
from ..algebra import merge, merge_extremes
from ..request import FIRST_PARAMETER, GUIDE_COLUMNS, GUIDE_ROWS, HEADER, PARAMETERS, PER_TERM, statistics_dtype
from ..terms import Axis, Extreme, Reduction, Score, Term
from .ranks import Ranks
from .sharded import Sharded, alone, current
from .sides import Side

_ROWS, _COLUMNS, _SCALAR = range(3)  # how a parameter is cut for a block; the first two are `Axis`
_OWNER = ("scale", "offset", "above", "below")  # parameters along the side that owns the statistic


@dataclass
class _Call:
    """One pass as it was asked for, and its cuts into blocks."""

    ranks: Ranks
    rows: Side
    columns: Side
    symmetric: bool
    terms: Sequence[Term]
    labels: Tensor | None
    column_labels: Tensor | None
    pair_mask: Tensor | None
    exclude: Tensor | None
    spec: list[int]
    consts: list[float]
    backend: str
    workspace: int
    #: (parameter, cut, whether it only shifts a logsumexp) of each local parameter
    uses: list[tuple[int, int, bool]] = field(default_factory=list)
    shifts: list[tuple[int, int, int]] = field(default_factory=list)  # (parameter, axis, slot of the logsumexp)

    def localize(self, params: Sequence[Tensor]) -> None:
        """Parameters by the way they are cut: one tensor may be along the rows here, the columns there."""
        self.spec[2] = 0  # exclude_self has become `exclude`
        slots = [0, 0]
        for t, term in enumerate(self.terms):
            at = HEADER + t * PER_TERM + FIRST_PARAMETER
            for k, name in enumerate(PARAMETERS):
                p = self.spec[at + k]
                if p < 0:
                    continue
                along = int(term.axis) if name in _OWNER else 1 - int(term.axis)
                shift = name == "offset" and _shifts(term)
                use = (p, _SCALAR if params[p].dim() == 0 else along, shift)
                if use not in self.uses:
                    self.uses.append(use)
                self.spec[at + k] = self.uses.index(use)
                if shift:
                    self.shifts.append((p, along, slots[along]))
            slots[term.axis] += term.reduction.slots
        rows, columns = self.spec[GUIDE_ROWS], self.spec[GUIDE_COLUMNS]
        if rows >= 0:
            self.spec[GUIDE_ROWS] = self._use(rows, _ROWS)
            self.spec[GUIDE_COLUMNS] = self._use(rows if columns < 0 else columns, _COLUMNS)

    def _use(self, parameter: int, cut: int) -> int:
        self.uses.append((parameter, cut, False))
        return len(self.uses) - 1

    def cut(self, params: Sequence[Tensor], low: int, high: int) -> list[Tensor]:
        """Local parameters of a block of columns."""
        spans = {_ROWS: (self.rows.first, self.rows.end), _COLUMNS: (low, high)}
        return [params[p] if how == _SCALAR else params[p][slice(*spans[how])] for p, how, _ in self.uses]

    def operands(self, block: Tensor, low: int, high: int) -> tuple:
        """x, y, labels, ref_labels, pair_mask, exclude of a block of columns."""
        rows, columns = slice(self.rows.first, self.rows.end), slice(low, high)
        exclude = None
        if self.exclude is not None:
            exclude = self.exclude[rows] - low
            exclude = torch.where((exclude >= 0) & (exclude < high - low), exclude, -1)
        return (
            self.rows.own().detach(),
            block.detach(),
            None if self.labels is None else self.labels[rows],
            None if self.column_labels is None else self.column_labels[columns],
            None if self.pair_mask is None else self.pair_mask[rows, columns],
            exclude,
        )


def _call(x, y, labels, ref_labels, pair_mask, exclude, params, terms, spec, consts, backend, workspace) -> _Call:
    ranks = next((v.ranks for v in (x, y) if isinstance(v, Sharded)), None) or current()
    rows = Side(x, ranks)
    columns = rows if y is None else Side(y, ranks)
    if spec[2]:
        if exclude is not None:
            raise ValueError("exclude must be None in a group where pairs (i, i) are left out too; got one")
        exclude = torch.arange(x.shape[0], device=x.device)
    call = _Call(
        ranks, rows, columns, y is None, terms, labels, labels if y is None else ref_labels,
        pair_mask, exclude, list(spec), consts, backend, workspace,
    )  # fmt: skip
    call.localize(params)
    return call


def _shifts(term: Term) -> bool:
    """Whether the offset of each owner is added to its logsumexp: ∂/∂offset is then 1, known without any pair.

    Backends may take it so, once a call, which here would be once a block or a rank.
    """
    identity = term.reduction == Reduction.LOGSUMEXP and term.score == Score.IDENTITY
    return identity and term.other_offset is None and isinstance(term.offset, Tensor) and term.offset.dim() == 1


class _Gradients:
    """What a rank's rows say of all inputs, added up block by block in the dtype of statistics."""

    def __init__(self, call: _Call, params: Sequence[Tensor], x: bool, y: bool, needs: Sequence[bool]) -> None:
        self.call, self.params, self.x = call, params, bool(x)
        self.columns = self.x if call.symmetric else bool(y)
        self.local = [bool(needs[p]) and not shift for p, _, shift in call.uses]  # of the local parameters
        self.dtype = statistics_dtype(call.rows.tensor)
        self.dx: Tensor | None = None
        self.totals = [
            torch.zeros_like(p, dtype=self.dtype) if need else None for p, need in zip(params, needs, strict=True)
        ]

    def add(self, found: Sequence[Tensor], low: int, high: int) -> Tensor | None:
        """Takes dx, dy, *dparams of a block of columns; returns dy."""
        if self.x:
            self.dx = found[0].to(self.dtype) if self.dx is None else self.dx.add_(found[0])
        spans = {_ROWS: (self.call.rows.first, self.call.rows.end), _COLUMNS: (low, high)}
        for (p, how, _), need, gradient in zip(self.call.uses, self.local, found[2:], strict=True):
            if need:
                total = self.totals[p]
                (total if how == _SCALAR else total[slice(*spans[how])]).add_(gradient)
        return found[1].to(self.dtype) if self.columns else None

    def nothing(self, block: Tensor) -> Tensor | None:
        """The gradient of columns that meet no row."""
        return torch.zeros_like(block, dtype=self.dtype) if self.columns else None

    def finish(self, dy: Tensor | None, known: Sequence[tuple[int, Tensor]] = ()) -> list[Tensor | None]:
        """dx, dy and the parameters' gradients, complete on every rank, these from one exchange.

        `known`: parts of parameters' gradients that every rank has whole.
        """
        if self.x and self.dx is None:
            self.dx = torch.zeros_like(self.call.rows.own(), dtype=self.dtype)
        dx = None if self.dx is None else self.call.rows.gradient_of_own(self.dx)
        if self.call.symmetric:
            dx, dy = None if dx is None else dx + dy, None
        kept = [t for t in self.totals if t is not None]
        pieces = iter(())
        if kept:
            flat = self.call.ranks.total(torch.cat([t.reshape(-1) for t in kept]))
            pieces = iter(flat.split([t.numel() for t in kept]))
        totals = [None if t is None else next(pieces).reshape(t.shape) for t in self.totals]
        for p, gradient in known:
            totals[p] = None if totals[p] is None else totals[p] + gradient
        return [dx, dy, *totals]


# --- statistics -------------------------------------------------------------------------------------------------------


def pair_statistics(
    x, y, labels, ref_labels, pair_mask, exclude, params, terms, spec, consts, backend, workspace
) -> tuple[Tensor, Tensor]:
    """(R, B) and (C, N) statistics of the rows and columns of all ranks, as `ops.pair_stats`."""
    call = _call(x, y, labels, ref_labels, pair_mask, exclude, params, terms, spec, consts, backend, workspace)
    return _Statistics.apply(call, call.rows.tensor, None if y is None else call.columns.tensor, *params)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, x, y, *params):
        dtype, found = statistics_dtype(x), None
        columns = x.new_empty(_slots(call.terms, Axis.COLUMNS), call.columns.value.shape[0], dtype=dtype)

        def visit(block: Tensor, low: int, high: int) -> None:
            nonlocal found
            rows, columns[:, low:high] = ops.pair_stats(
                *call.operands(block, low, high), call.cut(params, low, high),
                call.spec, call.consts, call.backend, call.workspace,
            )  # fmt: skip
            found = rows if found is None else _merged(call.terms, found, rows)

        call.columns.visit(visit)
        rows = call.ranks.gather(found.T.contiguous(), call.rows.sizes).T.contiguous()
        columns = _over_ranks(call, columns)
        ctx.save_for_backward(x, y, rows, columns, *params)
        ctx.call = call
        return rows, columns

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_columns):
        call: _Call = ctx.call
        x, _, rows, columns, *params = ctx.saved_tensors
        gradients = _Gradients(call, params, *ctx.needs_input_grad[1:3], ctx.needs_input_grad[3:])
        own = slice(call.rows.first, call.rows.end)
        of_rows = [v[:, own].contiguous() for v in (grad_rows, rows)]

        def visit(block: Tensor, low: int, high: int) -> Tensor | None:
            if call.rows.first == call.rows.end or low == high:
                return gradients.nothing(block)
            of_columns = [v[:, low:high].contiguous() for v in (grad_columns, columns)]
            found = ops.pair_weights(
                of_rows[0], of_columns[0], of_rows[1], of_columns[1],
                *call.operands(block, low, high), call.cut(params, low, high),
                call.spec, call.consts, call.backend, call.workspace,
                gradients.x, gradients.columns, gradients.local,
            )  # fmt: skip
            return gradients.add(found, low, high)

        both = (rows, grad_rows), (columns, grad_columns)
        known = [(p, torch.where(both[a][0][slot] == -torch.inf, 0.0, both[a][1][slot])) for p, a, slot in call.shifts]
        found = gradients.finish(call.columns.visit(visit), known)
        inputs = (x, x, *params)
        return None, *(None if g is None else g.to(v.dtype) for g, v in zip(found, inputs, strict=True))


def _slots(terms: Sequence[Term], axis: Axis) -> int:
    return sum(t.reduction.slots for t in terms if t.axis == axis)


def _by_term(terms: Sequence[Term], axis: Axis) -> list[tuple[Term, slice]]:
    found, used = [], 0
    for term in terms:
        if term.axis == axis:
            found.append((term, slice(used, used + term.reduction.slots)))
            used += term.reduction.slots
    return found


def _merged(terms: Sequence[Term], a: Tensor, b: Tensor, axis: Axis = Axis.ROWS) -> Tensor:
    """Statistics (R, owners) of two disjoint sets of others."""
    return torch.cat([merge(term.reduction, a[at], b[at]) for term, at in _by_term(terms, axis)] or [a])


def _over_ranks(call: _Call, columns: Tensor) -> Tensor:
    """Statistics (C, N) of all rows from those of each rank's rows: one maximum, then one sum over the ranks."""
    parts = _by_term(call.terms, Axis.COLUMNS)
    if not parts or call.ranks.size == 1:
        return columns
    if any(term.reduction in (Reduction.MOMENTS, Reduction.MAX) for term, _ in parts):
        all_of = call.ranks.gather(columns[None], [1] * call.ranks.size)
        found = all_of[0]
        for other in all_of[1:]:
            found = _merged(call.terms, found, other, Axis.COLUMNS)
        return found
    logs = [at.stop - 1 for term, at in parts if term.reduction in (Reduction.LOGSUMEXP, Reduction.SOFTMAX_MEAN)]
    result = columns.clone()
    if logs:
        top = call.ranks.total(columns[logs], largest=True)
        top = torch.where(top == -torch.inf, 0.0, top)
        result[logs] = torch.exp(columns[logs] - top)
    for term, at in parts:
        if term.reduction == Reduction.SOFTMAX_MEAN:
            result[at.start] = columns[at.start] * result[at.stop - 1]
    result = call.ranks.total(result)
    for term, at in parts:
        if term.reduction == Reduction.SOFTMAX_MEAN:
            mass = result[at.stop - 1]
            result[at.start] = torch.where(mass == 0, 0.0, result[at.start] / mass)
    if logs:
        result[logs] = result[logs].log() + top
    return result


# --- one scalar -------------------------------------------------------------------------------------------------------


def pair_sum(
    x, y, labels, ref_labels, pair_mask, exclude, params, terms, spec, consts, backend, workspace, needs
) -> tuple[Tensor, Tensor]:
    """The sum over all pairs, and that over this rank's rows, which has no gradient; as `ops.pair_sum`."""
    call = _call(x, y, labels, ref_labels, pair_mask, exclude, params, terms, spec, consts, backend, workspace)
    return _Sum.apply(call, needs, call.rows.tensor, None if y is None else call.columns.tensor, *params)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, needs, x, y, *params):
        gradients = _Gradients(call, params, *needs)
        own = torch.zeros((), dtype=gradients.dtype, device=x.device)

        def visit(block: Tensor, low: int, high: int) -> Tensor | None:
            nonlocal own
            if call.rows.first == call.rows.end or low == high:
                return gradients.nothing(block)
            value, *found = ops.pair_sum(
                *call.operands(block, low, high), call.cut(params, low, high),
                call.spec, call.consts, call.backend, call.workspace,
                gradients.x, gradients.columns, gradients.local,
            )  # fmt: skip
            own = own + value
            return gradients.add(found, low, high)

        found = gradients.finish(call.columns.visit(visit))
        ctx.present = [g is not None for g in found]
        ctx.dtypes = [v.dtype for v in (x, x, *params)]
        ctx.save_for_backward(*(g for g in found if g is not None))
        total = call.ranks.total(own).clone()
        ctx.mark_non_differentiable(own)
        return total, own

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent, _):
        saved = iter(ctx.saved_tensors)
        found = [
            (next(saved) * cotangent).to(dtype) if there else None
            for there, dtype in zip(ctx.present, ctx.dtypes, strict=True)
        ]
        return None, None, *found


# --- extremes ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def mine(
    x, y, labels, ref_labels, pair_mask, exclude, bounds, extremes, spec, consts, backend, workspace
) -> list[Tensor]:
    """Values (B, k) and global columns (B, k) of each extreme of the rows of all ranks, as `ops.pair_mine`."""
    call = _call(x, y, labels, ref_labels, pair_mask, exclude, [], [], spec, consts, backend, workspace)
    rows, found = slice(call.rows.first, call.rows.end), None
    own_bounds = [b if b.dim() == 0 else b[rows] for b in bounds]

    def visit(block: Tensor, low: int, high: int) -> None:
        nonlocal found
        if high == low and found is not None:
            return
        new = ops.pair_mine(
            *call.operands(block, low, high), own_bounds, call.spec, call.consts, call.backend, call.workspace
        )
        for e in range(len(extremes)):
            new[2 * e + 1] = torch.where(new[2 * e + 1] >= 0, new[2 * e + 1] + low, -1)
        found = new if found is None else _merged_extremes(extremes, found, new)

    call.columns.visit(visit)
    return [call.ranks.gather(v, call.rows.sizes) for v in found]


def _merged_extremes(extremes: Sequence[Extreme], a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    found = []
    for e, extreme in enumerate(extremes):
        found += merge_extremes(extreme, (a[2 * e], a[2 * e + 1]), (b[2 * e], b[2 * e + 1]))
    return found


# --- listed pairs -----------------------------------------------------------------------------------------------------


def listed_similarity(x, y, rows: Tensor, columns: Tensor, similarity: int, normalize: bool) -> Tensor:
    """(P,) similarities of pairs that all ranks list alike, where columns come block by block.

    On a GPU the host waits for the number of pairs in each block.
    """
    ranks = next(v.ranks for v in (x, y) if isinstance(v, Sharded))
    sides = Side(x, ranks), Side(x if y is None else y, ranks)
    other = None if y is None else sides[1].tensor
    return _Listed.apply(sides, sides[0].tensor, other, rows, columns, similarity, normalize)


class _Listed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sides, x, y, rows, columns, similarity, normalize):
        ctx.sides, ctx.how, ctx.symmetric = sides, (similarity, normalize), y is None
        out = torch.zeros(rows.shape, dtype=statistics_dtype(x), device=x.device)

        def visit(block: Tensor, low: int, high: int) -> None:
            at, pairs = _pairs_in(sides[0], rows, columns, low, high)
            out[at] = pairs_of.similarity_of_pairs(sides[0].own().detach(), block.detach(), *pairs, *ctx.how)

        sides[1].visit(visit)
        out = sides[0].ranks.total(out)
        ctx.save_for_backward(out, rows, columns)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        out, rows, columns = ctx.saved_tensors
        side, other = ctx.sides
        need_x, need_y = ctx.needs_input_grad[1:3]
        dx = None

        def visit(block: Tensor, low: int, high: int) -> Tensor:
            nonlocal dx
            at, pairs = _pairs_in(side, rows, columns, low, high)
            own = side.own().detach()
            found = pairs_of.gradients_of_pairs(grad[at], out[at], own, block.detach(), *pairs, *ctx.how)
            dx = found[0].to(out.dtype) if dx is None else dx.add_(found[0])
            return found[1].to(out.dtype)

        dy = other.visit(visit)
        dx = side.gradient_of_own(dx)
        if ctx.symmetric:
            dx, need_y = dx + dy, False
        dtype = side.tensor.dtype
        return None, dx.to(dtype) if need_x else None, dy.to(dtype) if need_y else None, None, None, None, None


def _pairs_in(side: Side, rows: Tensor, columns: Tensor, low: int, high: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Which pairs are of this rank's rows and a block's columns, and their indices there."""
    inside = (rows >= side.first) & (rows < side.end) & (columns >= low) & (columns < high)
    (at,) = inside.nonzero(as_tuple=True)
    return at, (rows[at] - side.first, columns[at] - low)


# --- whole rows -------------------------------------------------------------------------------------------------------


class Enter(torch.autograd.Function):
    """A value as this rank's share of the work needs it; `back` says what its gradient is made of."""

    @staticmethod
    def forward(ctx, value, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]):
        ctx.back = back
        result = there(value)
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.back(gradient), None, None


def row_reduce(run: Callable, ranks: Ranks, x, y, products, rows, shared, totals: int, exclude, labels, ref_labels):
    """Whole rows of S: `run(x, y, products, rows, shared, exclude, labels, ref_labels, first)` on this rank's rows.

    Returns:
        The results for all rows, then the totals over the ranks.
    """
    side = Side(x, ranks)
    columns = side if y is None else Side(y, ranks)
    wide = statistics_dtype(side.tensor)
    own = slice(side.first, side.end)

    def own_of(side: Side) -> Tensor:
        return Enter.apply(side.tensor, lambda v: v if side.sharded else v[own], side.gradient_of_own)

    def all_of(side: Side) -> Tensor:
        if side.sharded:
            side.value.whole()  # gathers, or says what the exchange must be
        return Enter.apply(
            side.tensor,
            lambda v: side.value.data_of_all() if side.sharded else v,
            lambda g: summed_columns(side, g, wide),
        )

    mine, everyone = own_of(side), all_of(columns)
    further = [(own_of(Side(u, ranks)), all_of(Side(v, ranks))) for u, v in products]
    cut = [Enter.apply(v, lambda v: v[own], lambda g: ranks.gather(g, side.sizes)) for v in rows]
    whole = [Enter.apply(v, lambda v: v, ranks.total) if v.is_floating_point() else v for v in shared]
    if y is None:
        ref_labels = labels
    with alone():
        found = run(
            mine, everyone, further, cut, whole, None if exclude is None else exclude[own],
            None if labels is None else labels[own], ref_labels, side.first,
        )  # fmt: skip
    last = len(found) - totals
    out = [Enter.apply(v, lambda v: ranks.gather(v, side.sizes), lambda g: g[own]) for v in found[:last]]
    return (*out, *(Enter.apply(v, ranks.total, lambda g: g) for v in found[last:]))


def summed_columns(columns: Side, gradient: Tensor, wide: torch.dtype) -> Tensor:
    """Gradient of a side's tensor from what each rank says of all its rows."""
    if not columns.sharded:
        return columns.ranks.total(gradient)
    found = columns.ranks.scatter_total(gradient.to(wide), columns.sizes) * columns.ranks.size
    return found.to(gradient.dtype)
