"""Whole rows of S, a panel at a time: for losses that ask a row for more than sums, such as ranks, sorts or histograms.

One documented composition for every backend: a panel of S is a product of the vendor's, the formula is plain PyTorch on
it, and the backward pass computes each panel again. Columns (and rows) are taken in the order of their labels, so that
the positives of a row are neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend_cpu, checks, dispatch, panels, reference, rows_cpu
from .distributed.sharded import current
from .eager import eagerly
from .label_order import label_order, positions
from .pairs import _norms, _through_norm
from .panels import float32_products
from .primitives import _check, _outside_autocast
from .request import statistics_dtype
from .terms import Precision, Similarity
from .workspace import workspace_bytes

#: Elements of a panel on a CPU, so that what a formula makes of it stays near the caches; and rows that it has in any
#: case, since every panel costs a pass over dY.
_CPU_ELEMENTS, _CPU_ROWS = 1 << 20, 64


@dataclass
class RowPanel:
    """Some rows of S with all their columns (with `within_class`: at least the columns that share a row's label).

    The columns stand in the order of their labels. The pair (i, i) of a self-similarity, or the excluded column, is
    neither `same` nor `different`, and no valid member.
    """

    s: Tensor  # (b, n)
    row: Tensor  # (b,) int64, which rows these are
    column: Tensor  # (n,) int64, which column each is
    own: Tensor  # (b,) int64, position of the excluded column in s, -1: none
    start: Tensor  # (b,) int64, first position of the columns that share the label
    count: Tensor  # (b,) int64, how many they are, the excluded one included
    most: int  # largest count
    products: list[Tensor]  # (b, n) each, the further products that were asked for

    @property
    def _position(self) -> Tensor:
        return torch.arange(self.s.shape[1], device=self.s.device)[None, :]

    @property
    def allowed(self) -> Tensor:
        """(b, n) bool: all pairs but the excluded ones."""
        return self._position != self.own[:, None]

    @property
    def member(self) -> Tensor:
        """(b, n) bool: the columns that share the row's label, the excluded one included."""
        return (self._position >= self.start[:, None]) & (self._position < (self.start + self.count)[:, None])

    @property
    def same(self) -> Tensor:
        """(b, n) bool: the positives."""
        return self.member & self.allowed

    @property
    def different(self) -> Tensor:
        """(b, n) bool: the negatives."""
        return ~self.member & self.allowed

    @property
    def counts(self) -> tuple[Tensor, Tensor]:
        """(b,) int64 each, how many positives and how many negatives a row has."""
        inside = (self.own >= self.start) & (self.own < self.start + self.count)
        outside = (self.own >= 0) & ~inside
        return self.count - inside.long(), self.s.shape[1] - self.count - outside.long()

    def members(self, own: bool = False) -> tuple[Tensor, Tensor]:
        """Positions (b, P) of the columns that share the label, valid where the second (b, P) is.

        `own`: with the excluded column.
        """
        step = torch.arange(self.most, device=self.s.device)[None, :]
        position = self.start[:, None] + step
        valid = step < self.count[:, None]
        if not own:
            valid = valid & (position != self.own[:, None])
        return torch.where(step < self.count[:, None], position, 0), valid


Formula = Callable[..., Sequence[Tensor]]


@dataclass
class _Plan:
    """What does not depend on the values of x and y."""

    formula: Formula
    products: int  # how many pairs of tensors come first among the further ones
    row_inputs: int  # how many of those that follow have a row for each row of x
    first: int  # what a formula calls row 0 of x: other ranks hold the rows before it
    totals: int
    similarity: Similarity
    normalize: bool
    row_order: Tensor  # (B,) int64, by sorted row
    column_order: Tensor  # (N,)
    own: Tensor  # (B,) by sorted row: sorted position of the excluded column, -1: none
    start: Tensor  # (B,) by sorted row
    count: Tensor  # (B,)
    panels: list[_Bounds]

    def rows(self, at: _Bounds) -> Tensor:
        """(b,) which rows of x a panel has."""
        return self.row_order[at.first : at.end]


class _Bounds(NamedTuple):
    """Which rows and columns, in sorted order, a panel has."""

    first: int
    end: int
    low: int
    high: int
    most: int


def _sorted(labels: Tensor | None, ref_labels: Tensor | None, excluded: Tensor | None, rows: int, columns: int, device):
    """Row order, column order; by sorted row: excluded position, first position and number of the label's columns."""
    if labels is None:
        row_order, order = torch.arange(rows, device=device), torch.arange(columns, device=device)
        own = positions(order, excluded, rows)
        return row_order, order, own, torch.zeros_like(row_order), torch.full_like(row_order, columns)
    found = label_order(labels, ref_labels, excluded)
    row_order = labels.argsort(stable=True)
    return row_order, found.order, *(v[row_order] for v in (found.own, found.start, found.count))


def _cut(start: Tensor, count: Tensor, columns: int, budget: int, within_class: bool, per_member: int) -> list[_Bounds]:
    """Panels of at most `budget` elements, `per_member` for each member among them, or of one row.

    Reads the device once.
    """
    starts, counts = torch.stack([start, count]).tolist()
    found: list[_Bounds] = []
    first = 0
    while first < len(starts):
        low, high, most, end = starts[first], starts[first] + counts[first], counts[first], first + 1
        while end < len(starts):
            reach = starts[end] + counts[end]  # the rows are in the order of their labels
            wide, large = (reach - low) if within_class else columns, max(most, counts[end])
            if (end + 1 - first) * max(wide + per_member * large, 1) > budget:
                break
            high, most, end = reach, large, end + 1
        found.append(_Bounds(first, end, *((low, high) if within_class else (0, columns)), most))
        first = end
    return found


def _prepared(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """(rows as they are compared, their norms) in the statistics dtype."""
    norms = _norms(x, normalize)
    x = x.to(statistics_dtype(x))
    return (x if norms is None else x / norms), norms


class _Sides:
    """x and y as they are compared."""

    def __init__(self, x: Tensor, y: Tensor | None, plan: _Plan, further: Sequence[Tensor]) -> None:
        self.plan = plan
        self.x, self.x_norms = _prepared(x, plan.normalize)
        self.y, self.y_norms = (self.x, self.x_norms) if y is None else _prepared(y, plan.normalize)
        self.columns = self.y[plan.column_order]  # (N, D)
        if plan.similarity != Similarity.DOT:
            self.x_squares, self.column_squares = ((v * v).sum(1) for v in (self.x, self.columns))
        wide = statistics_dtype(x)
        self.u = [u.to(wide) for u in further[0 : 2 * plan.products : 2]]
        self.v = [v.to(wide)[plan.column_order] for v in further[1 : 2 * plan.products : 2]]
        largest = max((at.end - at.first) * (at.high - at.low) for at in plan.panels)
        self.native = backend_cpu.at_hand(self.x)
        self.buffers = [self.x.new_empty(largest) for _ in range(1 + plan.products)]

    def panel(self, at: _Bounds) -> RowPanel:
        """A panel in the memory of the one before, whose graph must be gone."""
        plan = self.plan
        row = plan.rows(at)
        x, columns = self.x[row], self.columns[at.low : at.high]
        shape = at.end - at.first, at.high - at.low
        # In fresh pages a product of 128 features takes twice as long.
        s, *products = (v[: shape[0] * shape[1]].view(shape) for v in self.buffers)
        distances = plan.similarity != Similarity.DOT
        with float32_products(self.x, Precision.IEEE):
            if not distances or self.native:
                torch.mm(x, columns.T, out=s)
            else:
                squares = self.x_squares[row, None], self.column_squares[None, at.low : at.high]
                torch.addmm(squares[1], x, columns.T, alpha=-2, out=s).add_(squares[0])
            for u, v, product in zip(self.u, self.v, products, strict=True):
                torch.mm(u[row], v[at.low : at.high].T, out=product)
        if distances and self.native:
            root = plan.similarity == Similarity.EUCLIDEAN
            rows_cpu.distances_(s, self.x_squares[row], self.column_squares[at.low : at.high], plan.normalize, root)
        elif distances:
            # Equal rows, but for rounding: relative to both squares, of which unit vectors have none above 1.
            size = squares[0] + (1.0 if plan.normalize else squares[1])
            s.masked_fill_(s <= size.mul_(4 * torch.finfo(s.dtype).eps), 0.0)
            if plan.similarity == Similarity.EUCLIDEAN:
                s.sqrt_()
        own = plan.own[at.first : at.end]
        own = torch.where((own >= at.low) & (own < at.high), own - at.low, -1)
        start, count = plan.start[at.first : at.end] - at.low, plan.count[at.first : at.end]
        column = plan.column_order[at.low : at.high]
        # Leaves of a graph, not views of the buffers.
        s, *products = (v.detach() for v in (s, *products))
        return RowPanel(s, row + plan.first, column, own, start, count, at.most, products)


class _Gradients:
    """What the panels say of the gradients, added up."""

    def __init__(self, plan: _Plan, x: Tensor, y: Tensor | None, further: Sequence[Tensor], needs: Sequence[bool]):
        self.plan, self.x, self.y, self.inputs = plan, x, y, further[2 * plan.products :]
        self.sides = sides = _Sides(x, y, plan, further)
        self.need_x, self.need_y, *of_further = needs
        of_pairs, of_inputs = of_further[: 2 * plan.products], of_further[2 * plan.products :]
        self.dx = torch.zeros_like(sides.x) if self.need_x else None
        by_column = self.need_y or (y is None and self.need_x)
        self.dy = torch.zeros_like(sides.columns) if by_column else None  # by sorted column
        zeros = lambda v, need: torch.zeros_like(v) if need else None  # noqa: E731
        self.of_inputs = [zeros(v, need) for v, need in zip(self.inputs, of_inputs, strict=True)]
        pairs = [side for both in zip(sides.u, sides.v, strict=True) for side in both]
        self.of_pairs = [
            zeros(v, need) for v, need in zip(pairs, of_pairs, strict=True)
        ]  # by row, by sorted column, ...

    def add(self, at: _Bounds, cotangents: Sequence[Tensor | None] | None) -> Tensor | None:
        """Adds a panel's part; without cotangents that of a formula with one scalar result, which is returned."""
        plan, panel, row = self.plan, self.sides.panel(at), self.plan.rows(at)
        panel.s.requires_grad_(self.need_x or self.need_y)
        for k, product in enumerate(panel.products):
            product.requires_grad_(any(g is not None for g in self.of_pairs[2 * k : 2 * k + 2]))
        leaves = [
            _slice(plan, row, k, v).detach().requires_grad_(g is not None)
            for k, (v, g) in enumerate(zip(self.inputs, self.of_inputs, strict=True))
        ]
        s, products = panel.s, panel.products
        # What somebody does to saved tensors, offload them say, is not for a panel's, which go at once.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda v: v, lambda v: v):
            outputs = list(plan.formula(panel, *leaves))
        total = None
        if cotangents is None:
            if len(outputs) != 1 or outputs[0].dim() != 0:
                return None
            # A copy: it may be an entry of the panel itself.
            total, cotangents = outputs[0].detach().clone(), [torch.ones_like(outputs[0])]
        cut = len(outputs) - plan.totals
        pairs = [
            (output, g[row] if k < cut else g)
            for k, (output, g) in enumerate(zip(outputs, cotangents, strict=True))
            if g is not None and output.requires_grad
        ]
        wanted = [v for v in (s, *products, *leaves) if v.requires_grad]
        if pairs and wanted:
            outputs, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
            self._add(at, row, s, products, iter(found))
        return total

    def _add(self, at: _Bounds, row: Tensor, s: Tensor, products: list[Tensor], found: Iterator[Tensor | None]) -> None:
        ds = next(found) if s.requires_grad else None
        for k, product in enumerate(products):
            dp = next(found) if product.requires_grad else None
            if dp is not None:
                _accumulate_product(self.sides, k, at, row, dp, *self.of_pairs[2 * k : 2 * k + 2])
        for k, gradient in enumerate(self.of_inputs):
            value = None if gradient is None else next(found)
            if value is None:
                continue
            if k < self.plan.row_inputs:
                gradient[row] = value
            else:
                gradient += value
        if ds is not None:
            _accumulate(self.sides, at, row, s.detach(), ds, self.dx, self.dy)

    def finish(self) -> list[Tensor | None]:
        """Those of x, y, the products' sides and the inputs; of embeddings in the dtype of statistics."""
        order, sides = self.plan.column_order, self.sides
        in_order = lambda g: torch.empty_like(g).index_copy_(0, order, g)  # noqa: E731
        dx, dy = self.dx, None if self.dy is None else in_order(self.dy)
        if self.y is None and dx is not None:
            dx, dy = dx.add_(dy), None
        dx = None if dx is None else _through_norm(dx, self.x, sides.x_norms)
        dy = _through_norm(dy, self.y, sides.y_norms) if self.need_y else None
        of_pairs = [g if g is None or k % 2 == 0 else in_order(g) for k, g in enumerate(self.of_pairs)]
        return [dx, dy, *of_pairs, *self.of_inputs]


class _RowReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, x, y, *further):
        ctx.plan, ctx.dtypes = plan, [None if v is None else v.dtype for v in (x, y, *further)]
        ctx.known = False
        if plan.totals == 1 and any(ctx.needs_input_grad):
            total, found = _value_and_gradients(plan, x, y, further, ctx.needs_input_grad[1:])
            if total is not None:
                ctx.known = True
                ctx.save_for_backward(*found)
                return total
        ctx.save_for_backward(x, y, *further)
        return _values(plan, x, y, further)

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents):
        saved = ctx.saved_tensors
        if ctx.known:
            found = [None if g is None else g * cotangents[0] for g in saved]
        else:
            # Whoever calls backward inside autocast would get half-precision products.
            with torch.autocast(saved[0].device.type, enabled=False):
                x, y, *further = saved
                gradients = _Gradients(ctx.plan, x, y, further, ctx.needs_input_grad[1:])
                for at in ctx.plan.panels:
                    gradients.add(at, cotangents)
                found = gradients.finish()
        return None, *(None if g is None else g.to(d) for g, d in zip(found, ctx.dtypes, strict=True))


def _values(plan: _Plan, x: Tensor, y: Tensor | None, further: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results, a panel at a time."""
    sides, inputs = _Sides(x, y, plan, further), further[2 * plan.products :]
    results: list[Tensor] = []
    for at in plan.panels:
        panel, row = sides.panel(at), plan.rows(at)
        outputs = list(_evaluate(plan, panel, row, inputs))
        cut = len(outputs) - plan.totals
        if not results:
            # Written in place: small tensors that stay between large ones that go would pin the heap.
            results = [v.new_empty((len(plan.row_order), *v.shape[1:])) for v in outputs[:cut]]
            results += [torch.zeros_like(v) for v in outputs[cut:]]
        for k, value in enumerate(outputs):
            if k < cut:
                results[k][row] = value
            else:
                results[k] += value
        del panel, outputs
    return tuple(results)


def _value_and_gradients(plan: _Plan, x, y, further, needs) -> tuple[tuple[Tensor] | None, list[Tensor | None]]:
    """One total, and its gradients from the same panels; nothing where the formula gives more than one total."""
    gradients, total = _Gradients(plan, x, y, further, needs), None
    for at in plan.panels:
        value = gradients.add(at, None)
        if value is None:
            return None, []
        total = value if total is None else total.add_(value)
    return (total,), gradients.finish()


def _evaluate(plan: _Plan, panel: RowPanel, row: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    return plan.formula(panel, *(_slice(plan, row, k, v) for k, v in enumerate(inputs)))


def _slice(plan: _Plan, row: Tensor, k: int, value: Tensor) -> Tensor:
    return value[row] if k < plan.row_inputs else value


def _accumulate(sides: _Sides, at: _Bounds, row: Tensor, s: Tensor, ds: Tensor, dx, dy) -> None:
    """Adds what a panel says of dX and, by sorted column, dY."""
    columns, x = sides.columns[at.low : at.high], sides.x[row]
    kind = sides.plan.similarity
    if kind == Similarity.EUCLIDEAN and sides.native:
        ds = rows_cpu.through_roots(ds, s)
    elif kind == Similarity.EUCLIDEAN:
        ds = (ds / s).mul_(0.5).masked_fill_(s == 0, 0.0)
    with float32_products(x, Precision.IEEE):
        if dx is not None:
            by_row = ds @ columns
            if kind != Similarity.DOT:
                by_row = 2 * (ds.sum(1, keepdim=True) * x - by_row)
            dx[row] = by_row
        if dy is not None:
            by_column = dy[at.low : at.high]
            if kind == Similarity.DOT:
                by_column.addmm_(ds.T, x)
            else:
                by_column.addmm_(ds.T, x, alpha=-2).addcmul_(ds.sum(0)[:, None], columns, value=2)


def _accumulate_product(sides: _Sides, k: int, at: _Bounds, row: Tensor, dp: Tensor, du, dv) -> None:
    """Adds what a panel says of the gradients of a further product."""
    with float32_products(sides.x, Precision.IEEE):
        if du is not None:
            du[row] = dp @ sides.v[k][at.low : at.high]
        if dv is not None:
            dv[at.low : at.high].addmm_(dp.T, sides.u[k][row])


def _dense(plan: _Plan, x: Tensor, y: Tensor | None, further: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The specification: one panel of everything, nothing but autograd."""
    wide = statistics_dtype(x)
    pairs, inputs = further[: 2 * plan.products], further[2 * plan.products :]
    products = [
        panels.product(u.to(wide), v.to(wide).T)[plan.row_order][:, plan.column_order]
        for u, v in zip(pairs[0::2], pairs[1::2], strict=True)
    ]
    s = reference.similarity_matrix(x, y, plan.similarity, plan.normalize)
    s = s[plan.row_order][:, plan.column_order]
    most = max((at.most for at in plan.panels), default=0)
    panel = RowPanel(s, plan.row_order, plan.column_order, plan.own, plan.start, plan.count, most, products)
    outputs = list(_evaluate(plan, panel, plan.row_order, inputs))
    place = torch.empty_like(plan.row_order)
    place[plan.row_order] = torch.arange(len(place), device=place.device)
    cut = len(outputs) - plan.totals
    return tuple(v[place] if k < cut else v for k, v in enumerate(outputs))


@eagerly
@_outside_autocast
def row_reduce(
    x: Tensor,
    y: Tensor | None,
    formula: Formula,
    *,
    products: Sequence[tuple[Tensor, Tensor]] = (),
    rows: Sequence[Tensor] = (),
    shared: Sequence[Tensor] = (),
    totals: int = 0,
    labels: Tensor | None = None,
    ref_labels: Tensor | None = None,
    exclude: Tensor | None = None,
    exclude_self: bool | None = None,
    similarity: Similarity = Similarity.DOT,
    normalize: bool = False,
    within_class: bool = False,
    copies: int = 8,
    per_member: int = 1,
    max_workspace_bytes: int | None = None,
) -> tuple[Tensor, ...]:
    """A formula over whole rows of the similarity matrix, of which one panel exists at a time.

        out_i = formula(s_i·),   gradients by computing each panel again

    For what `pair_reduce` cannot say: ranks, sorts, histograms, sums over pairs of pairs. Costs the matrix products of
    two passes (of one, where the formula gives a single total), and plain PyTorch for the formula. Memory is
    O((B + N) D) plus the workspace, if the formula's own tensors are at most `copies` panels. On a GPU the panels'
    bounds are read once from the device. Differentiable once; `torch.compile` runs it as it is. On the reference
    backend: one matrix and autograd.

    Args:
        x: (B, D) float32, float64, bfloat16 or float16.
        y: (N, D) of the same dtype, or None for the pairs of x with itself.
        formula: called as `formula(panel, *rows of the panel, *shared)` with a `RowPanel` of b rows; returns tensors
            (b, ...), then `totals` tensors that are summed over the panels. Plain differentiable PyTorch that writes
            into nothing it was given and draws no random numbers: it is called again in the backward pass. It keeps
            nothing of the panel beyond its results: the next panel takes the same memory.
        products: (u (B, E), v (N, E)) pairs whose products <u_i, v_j> the formula finds in `panel.products`: the
            temperatures or gates of pairs, say. Differentiable. One without gradient that is a threshold, a weight or a
            softmax goes with `pair_reduce(guide=)`.
        rows: tensors (B, ...) of which the formula sees the panel's rows. Differentiable.
        shared: tensors that the formula sees whole. Differentiable.
        totals: how many of the results, the last ones, are sums over all rows.
        labels: (B,) int64. ref_labels: (N,) int64. Without labels all columns are members of every row.
        exclude: (B,) int64, one column that row i never meets (-1: none).
        exclude_self: drop the pairs (i, i). Default: True when y is None. Excludes `exclude`.
        similarity: dot product, squared or plain Euclidean distance.
        normalize: divide the rows of x and y by max(norm, 1e-12) first, gradient included.
        within_class: the formula only looks at columns that share a row's label; others may be missing.
        copies: tensors of a panel's size that the formula holds at once, its autograd graph included. Default 8.
        per_member: elements of each such tensor for every member of a row, beside the columns. Default 1.
        max_workspace_bytes: bound on the panels; default `flashpair.set_max_workspace_bytes`.

    Returns:
        The formula's results, (B, ...) each, then the totals.

    Raises:
        ValueError, TypeError: on bad input, before any work.

    Example:
        >>> import torch
        >>> from flashpair import row_reduce
        >>> x = torch.eye(3)
        >>> median = lambda panel: [panel.s.median(dim=1).values]
        >>> row_reduce(x, None, median)[0].tolist()
        [0.0, 0.0, 0.0]
    """
    exclude_self = (y is None) if exclude_self is None else exclude_self
    _check(x, y, labels, ref_labels, None, exclude, exclude_self, similarity, Precision.IEEE)
    for name, tensors in (("rows", rows), ("shared", shared)):
        for k, value in enumerate(tensors):
            checks.same_device("x", x, **{f"{name}[{k}]": value})
            if name == "rows" and value.shape[:1] != x.shape[:1]:
                raise ValueError(f"rows[{k}] must have {x.shape[0]} rows as x; got shape {tuple(value.shape)}")
    columns = (x if y is None else y).shape[0]
    for k, (u, v) in enumerate(products):
        checks.embedding_pair(u, v, (f"products[{k}][0]", f"products[{k}][1]"))
        checks.same_device("x", x, **{f"products[{k}][0]": u})
        if (u.shape[0], v.shape[0]) != (x.shape[0], columns):
            raise ValueError(
                f"products[{k}] must have {x.shape[0]} and {columns} rows; got {u.shape[0]} and {v.shape[0]}"
            )
    if exclude_self and exclude is not None:
        raise ValueError("exclude and exclude_self=True exclude each other in row_reduce: a row leaves out one column")
    checks.count("copies", copies)
    checks.count("per_member", per_member, low=0)
    workspace = workspace_bytes(max_workspace_bytes)
    excluded = torch.arange(x.shape[0], device=x.device) if exclude_self else exclude
    settings = formula, totals, similarity, normalize, within_class, copies, per_member, workspace
    ranks = current()
    if ranks is None or dispatch.forced_name() == "reference":
        return _row_reduce(settings, x, y, products, rows, shared, excluded, labels, ref_labels)
    from .distributed import passes

    run = functools.partial(_row_reduce, settings)
    return passes.row_reduce(run, ranks, x, y, products, rows, shared, totals, excluded, labels, ref_labels)


def _row_reduce(
    settings, x, y, products, rows, shared, excluded, labels, ref_labels, first: int = 0
) -> tuple[Tensor, ...]:
    """`row_reduce` of the rows that this process has, the first of which is row `first`."""
    formula, totals, similarity, normalize, within_class, copies, per_member, workspace = settings
    budget = workspace // (torch.finfo(statistics_dtype(x)).bits // 8 * copies)
    columns = (x if y is None else y).shape[0]
    if x.device.type == "cpu":
        budget = min(budget, max(_CPU_ELEMENTS, _CPU_ROWS * columns))
    row_order, column_order, own, start, count = _sorted(
        labels, ref_labels, excluded, x.shape[0], columns, x.device
    )  # fmt: skip
    cut = _cut(start, count, columns, budget, within_class and labels is not None, per_member)
    if not cut:  # no rows: the formula still says what its results look like
        cut = [_Bounds(0, 0, 0, 0 if within_class else columns, 0)]
    plan = _Plan(
        formula, len(products), len(rows), first, totals, similarity, normalize, row_order, column_order, own, start,
        count, cut,
    )  # fmt: skip
    further = *(side for pair in products for side in pair), *rows, *shared
    return (
        _dense(plan, x, y, further) if dispatch.forced_name() == "reference" else _RowReduce.apply(plan, x, y, *further)
    )


__all__ = ["RowPanel", "row_reduce"]
