"""What a class head needs of its (B, C) similarities: the one of each row with its own class, and reductions over the
other classes. One operator with one dense gradient of the class weights.

    target_i = <x_i, w_{y_i}>          out_i = reduce_{j != y_i} phi(a_i <x_i, w_j> + p_i + q_j)

The own class is apart from the others because losses need their difference with all its digits, and margins change it
alone. Its gradient is added into the rows of dW that the pass over the others has just written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import checks, dispatch, ops, reference
from ..algebra import merge
from ..distributed.sharded import Sharded
from ..operator import operator
from ..ops import Needs
from ..pairs import EPSILON, accumulate
from ..primitives import needs_grad
from ..request import HEADER, PER_TERM, Request, count_slots, decode, decode_terms, encode, statistics_dtype
from ..terms import Axis, Precision, Reduction, Score, Similarity, Term
from ..workspace import workspace_bytes

#: Parameters of a row's term that run along the classes.
_ALONG_CLASSES = ("other_offset", "weight")


def class_blocks(classes: int, features: int, backend: str, workspace: int) -> list[slice]:
    """The classes in blocks: GPU backends normalise a copy of their columns, which must fit the workspace."""
    return blocks_of(classes, features, workspace, copies=2) if backend in ("triton", "cuda") else [slice(0, classes)]


def blocks_of(classes: int, features: int, workspace: int, copies: int) -> list[slice]:
    """Blocks of which so many float32 copies fit the workspace."""
    step = max(workspace // (4 * features * copies) // 256 * 256, 256)
    return [slice(first, min(first + step, classes)) for first in range(0, max(classes, 1), step)]


def _along_classes(spec: list[int], consts: list[float], params: list[Tensor]) -> set[int]:
    """Positions of the parameters that hold one value per class."""
    return {term.index[name] for term in decode_terms(spec, consts, params) for name in _ALONG_CLASSES} - {-1}


class Pass:
    """One head's pass, block by block of classes, all of them or those `selected` (S,)."""

    def __init__(
        self, x, weight, labels, params, spec, consts, backend: str, workspace: int,
        blocks: list[slice] | None = None, selected: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.x, self.weight, self.labels, self.selected = x, weight, labels, selected
        self.params, self.spec, self.consts = list(params), spec, consts
        self.backend, self.workspace = ops.backend_module(backend), workspace
        self.classes = weight.shape[0] if selected is None else selected.shape[0]
        self.blocks = class_blocks(self.classes, weight.shape[1], backend, workspace) if blocks is None else blocks
        self.along = _along_classes(spec, consts, self.params)

    def request(self, block: slice) -> Request:
        """The pass over one block of classes."""
        exclude, params = self.labels, self.params
        columns = self.weight[block] if self.selected is None else self.weight[self.selected[block]]
        if columns.shape[0] != self.classes:
            inside = (exclude >= block.start) & (exclude < block.stop)
            exclude = torch.where(inside, exclude - block.start, -1)
            params = [p[block] if i in self.along else p for i, p in enumerate(params)]
        return decode(self.x, columns, None, None, None, exclude, params, self.spec, self.consts, self.workspace)

    def statistics(self) -> Tensor:
        """(R, B), merged over the blocks."""
        found: Tensor | None = None
        for block in self.blocks:
            rows, _ = self.backend.stats(self.request(block))
            found = rows if found is None else self._merged(found, rows)
        return found

    def _merged(self, a: Tensor, b: Tensor) -> Tensor:
        parts = []
        for term in self.request(slice(0, 0)).terms:
            own = slice(term.slot, term.slot + term.reduction.slots)
            parts.append(merge(term.reduction, a[own], b[own]))
        return torch.cat(parts)

    def gradients(
        self, rows: Tensor, grad_rows: Tensor, needs: Needs, take: Callable[[slice, Tensor], None]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dx (B, D) in the statistics dtype and the gradients of the parameters; each block of dW goes to `take`."""
        dtype = statistics_dtype(self.x)
        dx: Tensor | None = None
        dparams: list[Tensor | None] = [None] * len(self.params)
        for block in self.blocks:
            request = self.request(block)
            empty = rows.new_empty(0, request.shape[1])
            block_dx, block_dw, found = self.backend.weights(request, rows, empty, grad_rows.contiguous(), empty, needs)
            if needs.x:
                dx = block_dx.to(dtype) if dx is None else dx.add_(block_dx)
            for i, gradient in enumerate(found):
                if not needs.params[i]:
                    continue
                if i in self.along and len(self.blocks) > 1:
                    if dparams[i] is None:
                        dparams[i] = self.x.new_zeros(self.params[i].shape, dtype=dtype)
                    dparams[i][block] = gradient
                else:
                    dparams[i] = gradient if dparams[i] is None else dparams[i] + gradient
            del request
            if needs.y:
                take(block, block_dw)
        return dx, dparams


# --- the own class ----------------------------------------------------------------------------------------------------


def _unit(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows in the statistics dtype, normalised, and what they were divided by (rows, 1)."""
    rows = rows.to(statistics_dtype(rows))
    if not normalize:
        return rows, None
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(EPSILON)
    return rows / norms, norms


def _through(gradient: Tensor, unit: Tensor, norms: Tensor | None) -> Tensor:
    """Gradient of rows from that of rows / norm; the floor of the norm has no slope."""
    if norms is None:
        return gradient
    along = torch.where(norms <= EPSILON, 0.0, (unit * gradient).sum(1, keepdim=True))
    return (gradient - unit * along) / norms


def listed_similarity(x: Tensor, weight: Tensor, index: Tensor, normalize: bool) -> Tensor:
    """(B, K) similarities of each row with the classes `index` (B, K); 0 where that is -1."""
    if isinstance(weight, Sharded):
        from ..distributed import classes

        return classes.listed_similarity(x, weight, index, normalize)
    rows, _ = _unit(x, normalize)
    found = []
    for column in index.unbind(1):
        own, _ = _unit(weight[column.clamp_min(0)], normalize)
        found.append(torch.where(column < 0, 0.0, (rows * own).sum(1)))
    return torch.stack(found, dim=1) if found else rows.new_empty(index.shape)


def listed_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, normalize: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(dx (B, D), classes (B,), their rows of dW (B, D)) of each column of `index`, in the statistics dtype."""
    rows, row_norms = _unit(x, normalize)
    for g, column in zip(grad.unbind(1), index.unbind(1), strict=True):
        own, own_norms = _unit(weight[column.clamp_min(0)], normalize)
        g = torch.where(column < 0, 0.0, g)[:, None]
        yield _through(g * own, rows, row_norms), column.clamp_min(0), _through(g * rows, own, own_norms)


# --- the operators ----------------------------------------------------------------------------------------------------


@operator("class_stats")
def class_stats(
    x: Tensor,  # (B, D)
    weight: Tensor,  # (C, D)
    labels: Tensor,  # (B,) the class that a row's reductions leave out, -1 for none
    index: Tensor,  # (B, K) the classes whose similarities are wanted by themselves
    params: list[Tensor],
    spec: list[int],
    consts: list[float],
    backend: str,
    max_workspace_bytes: int,
    gradient_filter: float,
) -> tuple[Tensor, Tensor]:  # similarities (B, K), rows (R, B)
    with ops.without_autocast(x):
        rows = Pass(x, weight, labels, params, spec, consts, backend, max_workspace_bytes).statistics()
        return listed_similarity(x, weight, index, bool(spec[1])), rows


@class_stats.fake
def _(x, weight, labels, index, params, spec, consts, backend, max_workspace_bytes, gradient_filter):
    dtype = statistics_dtype(x)
    return x.new_empty(index.shape, dtype=dtype), x.new_empty((count_slots(spec)[0], x.shape[0]), dtype=dtype)


def _setup(ctx, inputs, output):
    x, weight, labels, index, params, *static = inputs
    ctx.save_for_backward(x, weight, labels, index, output[1], *params)
    ctx.static = static


def _backward(ctx, needs, grad_listed, grad_rows):
    x, weight, labels, index, rows, *params = ctx.saved_tensors
    need_x, need_weight, need_params = needs[0], needs[1], list(needs[4])
    dx, dw, *dparams = class_weights(
        grad_listed, grad_rows, rows, x, weight, labels, index, params, *ctx.static, need_x, need_weight, need_params
    )
    dparams = [g if need else None for g, need in zip(dparams, need_params, strict=True)]
    return (dx if need_x else None, dw if need_weight else None, None, None, dparams, *[None] * 5)


class_stats.differentiable(_backward, _setup)


@operator("class_weights")
def class_weights(
    grad_listed: Tensor,  # (B, K)
    grad_rows: Tensor,  # (R, B)
    rows: Tensor,  # (R, B)
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    index: Tensor,
    params: list[Tensor],
    spec: list[int],
    consts: list[float],
    backend: str,
    max_workspace_bytes: int,
    gradient_filter: float,
    need_x: bool,
    need_weight: bool,
    need_params: list[bool],
) -> list[Tensor]:  # dx, dW, *dparams; (0,) where not needed
    params, spec, consts = _filtered(rows, list(params), spec, consts, gradient_filter)
    needs = Needs(need_x, need_weight, (*need_params, *[False] * (len(params) - len(need_params))))
    with ops.without_autocast(x):
        run = Pass(x, weight, labels, params, spec, consts, backend, max_workspace_bytes)
        blocks: list[Tensor] = []
        dw = torch.empty_like(weight) if need_weight and len(run.blocks) > 1 else None
        dx, dparams = run.gradients(
            rows, grad_rows, needs, lambda block, part: blocks.append(part) if dw is None else dw[block].copy_(part)
        )
        dw = blocks[0] if blocks else dw
        if need_x or need_weight:
            for to_x, classes, to_own in listed_gradients(grad_listed, x, weight, index, bool(spec[1])):
                if need_x:
                    dx += to_x
                if need_weight:
                    accumulate(dw, classes, to_own.to(dw.dtype))
    absent = x.new_empty(0)
    return [
        dx.to(x.dtype) if need_x else absent,
        dw if need_weight else absent,
        *(
            g.to(p.dtype).reshape(p.shape) if need else x.new_empty(0)
            for g, p, need in zip(dparams, params, need_params, strict=False)
        ),
    ]


@class_weights.fake
def _(
    grad_listed, grad_rows, rows, x, weight, labels, index, params, spec, consts, backend, max_workspace_bytes,
    gradient_filter, need_x, need_weight, need_params,
):  # fmt: skip
    return ops.gradients_fake(x, weight, params, need_x, need_weight, need_params)


def _class_weights_backward(ctx, needs, *grads):
    raise RuntimeError("a class head cannot be differentiated twice; use_backend('reference') can")


class_weights.differentiable(_class_weights_backward)


def _filtered(rows: Tensor, params: list[Tensor], spec: list[int], consts: list[float], least: float):
    """The terms of the backward pass without the classes whose softmax probability is at most `least`.

    p_ij <= least exactly where s_ij <= (out_i + log(least) - p_i) / a_i, a threshold per row; needs a > 0 and no q_j.
    """
    if least <= 0:
        return params, spec, consts
    spec, consts, params = list(spec), list(consts), list(params)
    for t, term in enumerate(decode_terms(spec, consts, params)):
        if term.reduction != Reduction.LOGSUMEXP:
            continue
        slot = sum(Reduction(spec[HEADER + PER_TERM * k]).slots for k in range(t))
        bound = ((rows[slot] + math.log(least) - term.offset) / term.scale).to(rows.dtype)
        if term.above is not None:
            known = term.above
            bound = torch.maximum(bound, known.to(bound.dtype)) if isinstance(known, Tensor) else bound.clamp_min(known)
        spec[HEADER + PER_TERM * t + PER_TERM - 2] = len(params)
        params.append(bound)
    return params, spec, consts


# --- with the optimiser's step in the backward pass ------------------------------------------------------------------


class WeightUpdate(Protocol):
    """What takes the gradient of the class weights block by block, so that it is never whole."""

    selected: Tensor | None  # (S,) int64, the classes that take part, ascending; None: all

    def step(self, classes: slice | Tensor, gradient: Tensor, finite: Tensor) -> None:
        """Update the rows `classes` of the weights, or nothing where `finite` () is False."""

    def agreed(self, finite: Tensor) -> Tensor:
        """`finite` on all ranks that hold classes: all of them step, or none does."""


class _Updating(torch.autograd.Function):
    """`class_stats` whose backward pass updates the weights instead of returning their gradient.

    All gradients are of the weights before the step: those of the embeddings and of the own classes are computed, and
    everything that enters is known to be finite, before a block's weights change; a block's weights change after its
    part of dx is taken.
    """

    @staticmethod
    def forward(ctx, update, x, weight, labels, index, spec, consts, backend, workspace, *params):
        run = _updating_pass(update, x, weight, labels, params, spec, consts, backend, workspace)
        with ops.without_autocast(x):
            rows = run.statistics()
            listed = listed_similarity(x, weight, full_index(update, index), bool(spec[1]))
        ctx.save_for_backward(x, weight, labels, index, rows, *params)
        ctx.static = update, spec, consts, backend, workspace
        return listed, rows

    @staticmethod
    def backward(ctx, grad_listed, grad_rows):
        x, weight, labels, index, rows, *params = ctx.saved_tensors
        update, spec, consts, backend, workspace = ctx.static
        need_params = tuple(ctx.needs_input_grad[9:])
        run = _updating_pass(update, x, weight, labels, params, spec, consts, backend, workspace)
        with torch.no_grad(), ops.without_autocast(x):
            own = list(listed_gradients(grad_listed, x, weight, full_index(update, index), bool(spec[1])))
            # A logsumexp over no class is -inf; NaN compares false.
            finite = torch.stack([(rows < torch.inf).all(), *(t.isfinite().all() for t in (x, grad_rows, grad_listed))])
            finite = update.agreed(finite.all())

            def take(block: slice, gradient: Tensor) -> None:
                for (_, _, rows_of_dw), column in zip(own, index.unbind(1), strict=True):
                    inside = (column >= block.start) & (column < block.stop)
                    where = torch.where(inside, column - block.start, 0)
                    accumulate(gradient, where, torch.where(inside[:, None], rows_of_dw, 0.0).to(gradient.dtype))
                update.step(block if update.selected is None else update.selected[block], gradient, finite)

            dx, dparams = run.gradients(rows, grad_rows, Needs(True, True, need_params), take)
            for to_x, _, _ in own:
                dx += to_x
        found = [
            g.to(p.dtype).reshape(p.shape) if need else None
            for g, p, need in zip(dparams, params, need_params, strict=True)
        ]
        return None, dx.to(x.dtype), None, None, None, None, None, None, None, *found


def _updating_pass(update, x, weight, labels, params, spec, consts, backend, workspace) -> Pass:
    classes = weight.shape[0] if update.selected is None else update.selected.shape[0]
    blocks = blocks_of(
        classes, weight.shape[1], workspace, copies=8
    )  # gathered weights, their gradient, the step's own
    return Pass(x, weight, labels, params, spec, consts, backend, workspace, blocks, update.selected)


def full_index(update: WeightUpdate | None, index: Tensor) -> Tensor:
    """Positions among the selected classes → classes; -1 stays."""
    if update is None or update.selected is None:
        return index
    return torch.where(index < 0, -1, update.selected[index.clamp_min(0)])


# --- the function ----------------------------------------------------------------------------------------------------


def class_statistics(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    terms: Sequence[Term],
    *,
    index: Tensor | None = None,
    normalize: bool = False,
    gradient_filter: float = 0.0,
    update: WeightUpdate | None = None,
    precision: Precision = Precision.IEEE,
    max_workspace_bytes: int | None = None,
) -> tuple[Tensor, ...]:
    """Similarity of each row with its own class, and reductions over all other classes, without the B×C matrix.

    Args:
        x: (B, D) float32, float64, bfloat16 or float16.
        weight: (C, D) of the same dtype, a row per class.
        labels: (B,) int64 in [0, C), or -1 for a row without a class, which meets all of them.
        terms: reductions over the other classes, owned by rows; see `flashpair.Term`.
        index: (B, K) int64, classes whose similarities are wanted instead of the own one's; -1 for none.
        normalize: divide the rows of x and weight by max(norm, 1e-12) first, gradient included.
        gradient_filter: drop from the backward pass of logsumexp terms the classes whose softmax probability is at
            most this. A row's gradient over the logits is then off by at most (C - 1) times it in the sum of absolute
            values. Default 0, exact.
        update: takes the gradient of `weight` in the backward pass, block by block, instead of `weight.grad`; labels,
            `index` and values per class then count among its selected classes.
        precision: arithmetic of float32 products on a GPU.
        max_workspace_bytes: bound on the scratch memory; default `flashpair.set_max_workspace_bytes`.

    Returns:
        similarity with the own class (B,), or with `index` (B, K); then one (B,) per term; in float32 (float64 for
        float64 inputs).

    Raises:
        TypeError, ValueError: on bad input, naming the argument, before any work.

    Example:
        >>> import torch
        >>> from flashpair import Reduction, Term
        >>> from flashpair.heads import class_statistics
        >>> x, weight = torch.eye(2), torch.eye(2)
        >>> target, others = class_statistics(x, weight, torch.tensor([0, 0]), [Term(Reduction.LOGSUMEXP)])
        >>> target.tolist(), [round(v, 4) for v in others.tolist()]
        ([1.0, 0.0], [0.0, 1.0])
    """
    checks.embedding_pair(x, weight, ("x", "weight"))
    checks.closed("precision", precision, Precision)
    classes = weight.shape[0] if update is None or update.selected is None else update.selected.shape[0]
    checks.terms(terms, x.shape[0], classes, x.device, False, False)
    checks.number("gradient_filter", gradient_filter, low=0.0, high=1.0)
    for t, term in enumerate(terms):
        if term.axis != Axis.ROWS or term.reduction == Reduction.MOMENTS:
            raise ValueError(f"terms[{t}] must be owned by rows and not be MOMENTS; got {term.axis.name}")
        if gradient_filter and (term.score != Score.IDENTITY or term.other_offset is not None):
            raise ValueError(f"gradient_filter needs identity scores without other_offset; got terms[{t}]")
    check_classes(labels, x, classes, missing=-1)
    listed = labels[:, None] if index is None else index
    if index is not None:
        check_listed(index, x, classes)
    if isinstance(weight, Sharded):
        from ..distributed.classes import class_statistics as over_ranks

        return over_ranks(
            x, weight, labels, terms, index, normalize=normalize, gradient_filter=gradient_filter,
            precision=precision, max_workspace_bytes=max_workspace_bytes,
        )  # fmt: skip
    workspace = workspace_bytes(max_workspace_bytes)
    with torch.autocast(x.device.type, enabled=False):
        backend = dispatch.choose(x, x.shape[0] * classes)
        keep = update is None and needs_grad(x, weight, *(v for t in terms for v in vars(t).values()))
        params, spec, consts = encode(list(terms), Similarity.DOT, normalize, False, keep, precision)
        if update is not None:
            if backend == "reference" or gradient_filter:
                raise ValueError("a step in the backward pass needs a fused backend and gradient_filter=0")
            similarities, rows = _Updating.apply(
                update, x, weight, labels, listed, spec, consts, backend, workspace, *params
            )
            return similarities[:, 0] if index is None else similarities, *ops.statistics_of(terms, rows, rows)
        if backend == "reference":
            request = decode(x, weight, None, None, None, labels, params, spec, consts, workspace)
            results = reference.pair_reduce(request)
            similarities = listed_similarity(x, weight, listed, normalize)
            return similarities[:, 0] if index is None else similarities, *(r[0] for r in results)
        similarities, rows = class_stats(
            x, weight, labels, listed, params, spec, consts, backend, workspace, float(gradient_filter)
        )
    return similarities[:, 0] if index is None else similarities, *ops.statistics_of(terms, rows, rows)


def check_classes(labels: Tensor, x: Tensor, classes: int, missing: int | None = None) -> None:
    """(B,) int64 in [0, classes), or `missing`; on a GPU the range is asserted there, so that nothing waits for it.

    Raises:
        TypeError, ValueError: naming the labels.
    """
    checks.labels("labels", labels, x.shape[0])
    checks.same_device("x", x, labels=labels)
    _in_range("labels", labels, classes, missing)


def check_listed(index: Tensor, x: Tensor, classes: int) -> None:
    """(B, K) int64 in [0, classes) or -1.

    Raises:
        TypeError, ValueError: naming the index.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(f"index must be an int64 tensor; got {getattr(index, 'dtype', type(index).__name__)}")
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(f"index must have shape ({x.shape[0]}, K); got {tuple(index.shape)}")
    checks.same_device("x", x, index=index)
    _in_range("index", index, classes, -1)


def _in_range(name: str, values: Tensor, classes: int, missing: int | None) -> None:
    if values.numel() == 0 or torch.compiler.is_compiling():
        return
    allowed = (values >= 0) & (values < classes)
    if missing is not None:
        allowed = allowed | (values == missing)
    if values.device.type != "cpu":
        torch._assert_async(allowed.all())
    elif not bool(allowed.all()):
        also = "" if missing is None else f", or {missing} for none"
        raise ValueError(f"{name} must be classes, in [0, {classes}){also}; got {int(values[~allowed][0])}")
