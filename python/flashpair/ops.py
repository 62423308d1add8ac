"""The operators behind the primitives: opaque to torch.compile, with fake and autograd registrations.

`pair_stats` → statistics, `pair_weights` → its gradients; `pair_loss` → a closed formula of statistics; `pair_sum` is
the case in which nothing but one scalar is wanted, so its gradients are computed in the forward pass; `pair_mine` →
extremes. All decode to a `Request` and hand it to a backend module, which offers

    stats(request) → (rows (R, B), columns (C, N))
    weights(request, rows, columns, grad_rows, grad_columns, needs) → (dx, dy, dparams)
    sums(request, needs) → (total, dx, dy, dparams)
    mine(request) → [(values (B, k), indices (B, k)), ...]
    FORMULAS, if it has any: name → `slopes` of that `formulas.Formula`
    unavailable() → reasons against running at all
    why_not(x) → reasons against embeddings of the dtype and device of x
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .formulas import FORMULAS, counted
from .operator import operator
from .request import HEADER, PER_EXTREME, SLOTS, Request, count_slots, decode, statistics_dtype
from .terms import Extreme, Mask, Reduction


class Needs(NamedTuple):
    """Which gradients a backward pass has to deliver."""

    x: bool
    y: bool
    params: tuple[bool, ...]  # per entry of Request.params


_AS_IT_IS = contextlib.nullcontext()


def backend_module(name: str):
    return dispatch.named(name).load()


def in_autocast() -> bool:
    """Whether autocast is on, or may be when compiled code runs."""
    return torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()


def without_autocast(x: Tensor):
    """Autocast off, where it is on: it would narrow the matrix products of a backend."""
    return torch.autocast(x.device.type, enabled=False) if in_autocast() else _AS_IT_IS


def _statistics_shape(x: Tensor, y: Tensor | None, spec: list[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    rows, columns = count_slots(spec)
    return (rows, x.shape[0]), (columns, (x if y is None else y).shape[0])


# --- statistics ------------------------------------------------------------------------------------------------------


@operator("pair_stats")
def pair_stats(
    x: Tensor,  # (B, D)
    y: Tensor | None,  # (N, D)
    labels: Tensor | None,  # (B,)
    ref_labels: Tensor | None,  # (N,)
    pair_mask: Tensor | None,  # (B, N)
    exclude: Tensor | None,  # (B,)
    params: list[Tensor],
    spec: list[int],
    consts: list[float],
    backend: str,
    max_workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # (R, B), (C, N)
    request = decode(x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, max_workspace_bytes)
    with without_autocast(x):
        return backend_module(backend).stats(request)


@pair_stats.fake
def _(x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, backend, max_workspace_bytes):
    dtype = statistics_dtype(x)
    rows, columns = _statistics_shape(x, y, spec)
    return x.new_empty(rows, dtype=dtype), x.new_empty(columns, dtype=dtype)


def _stats_setup(ctx, inputs, output):
    x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, backend, max_workspace_bytes = inputs
    ctx.save_for_backward(x, y, labels, ref_labels, pair_mask, exclude, *output, *params)
    ctx.static = (spec, consts, backend, max_workspace_bytes)
    ctx.set_materialize_grads(False)


def _stats_backward(ctx, needs, grad_rows, grad_columns):
    x, y, labels, ref_labels, pair_mask, exclude, rows, columns, *params = ctx.saved_tensors
    grad_rows = torch.zeros_like(rows) if grad_rows is None else grad_rows
    grad_columns = torch.zeros_like(columns) if grad_columns is None else grad_columns
    pairs = x, y, labels, ref_labels, pair_mask, exclude
    return _of_statistics(pairs, (rows, columns), (grad_rows, grad_columns), params, ctx.static, needs)


def _of_statistics(pairs, statistics, grads, params, static, needs):
    """Gradients of the arguments of `pair_stats`, from those of its results."""
    need_x, need_y, need_params = needs[0], needs[1], list(needs[6])
    dx, dy, *dparams = pair_weights(*grads, *statistics, *pairs, list(params), *static, need_x, need_y, need_params)
    dparams = [g if need else None for g, need in zip(dparams, need_params, strict=True)]
    return dx if need_x else None, dy if need_y else None, None, None, None, None, dparams, None, None, None, None


pair_stats.differentiable(_stats_backward, _stats_setup)


class _OnePass(torch.autograd.Function):
    """Statistics that several passes found, with one backward pass for all of them."""

    @staticmethod
    def forward(ctx, found, static, *tensors):
        output = tuple(torch.cat(side) for side in zip(*found, strict=True))
        _stats_setup(ctx, (*tensors[:6], tensors[6:], *static), output)
        return output

    @staticmethod
    def backward(ctx, grad_rows, grad_columns):
        needs = ctx.needs_input_grad[2:]
        of_pairs = _stats_backward(ctx, (*needs[:6], needs[6:]), grad_rows, grad_columns)
        return None, None, *of_pairs[:6], *of_pairs[6]


def as_of_one_pass(
    found: Sequence[tuple[Tensor, Tensor]], pairs: Sequence[Tensor | None], params: Sequence[Tensor], *static
) -> tuple[Tensor, Tensor]:
    """Statistics (R, B) and (C, N) of one pass whose terms, in this order, several passes have reduced.

    Args:
        found: what `pair_stats` gave for each of them.
        pairs: x, y, labels, ref_labels, pair_mask, exclude.
        params, static: of the terms of all; spec, consts, backend, max_workspace_bytes.
    """
    return _OnePass.apply(found, static, *pairs, *params)


# --- a loss in closed form: statistics and their slopes in one node ---------------------------------------------------


@operator("pair_loss")
def pair_loss(
    x: Tensor,
    y: Tensor | None,
    labels: Tensor | None,
    ref_labels: Tensor | None,
    pair_mask: Tensor | None,
    exclude: Tensor | None,
    counts: Tensor | None,  # (k, B) of statistics' dtype, for a formula that reads numbers of pairs; None: statistics
    params: list[Tensor],
    spec: list[int],
    consts: list[float],
    backend: str,
    max_workspace_bytes: int,
    formula: str,
    constants: list[float],
) -> list[Tensor]:  # loss, rows (R, B), columns (C, N), their slopes
    request = decode(x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, max_workspace_bytes)
    with without_autocast(x):
        rows, columns = backend_module(backend).stats(request)
        loss, *found = slopes_of(backend, formula, rows, columns, counts, constants)
    return [loss, rows, columns, *found]


def slopes_of(
    backend: str, name: str, rows: Tensor, columns: Tensor, counts: Tensor | None, constants: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a closed formula and its slopes in both statistics."""
    slopes = getattr(backend_module(backend), "FORMULAS", {}).get(name) or FORMULAS[name].slopes
    return slopes(rows, columns, counted(name, rows, counts), constants)


@pair_loss.fake
def _(
    x, y, labels, ref_labels, pair_mask, exclude, counts, params,
    spec, consts, backend, max_workspace_bytes, formula, constants,
):  # fmt: skip
    dtype = statistics_dtype(x)
    shapes = _statistics_shape(x, y, spec)
    return [x.new_empty(shape, dtype=dtype) for shape in ((), *shapes, *shapes)]


def _loss_setup(ctx, inputs, output):
    x, y, labels, ref_labels, pair_mask, exclude, _, params, spec, consts, backend, max_workspace_bytes, *_ = inputs
    _keep_slopes(ctx, (x, y, labels, ref_labels, pair_mask, exclude), output[1:], params)
    ctx.static = (spec, consts, backend, max_workspace_bytes)
    ctx.mark_non_differentiable(*output[1:])


def _keep_slopes(ctx, pairs, statistics_and_slopes, params):
    ctx.save_for_backward(*pairs, *statistics_and_slopes, *params)
    ctx.set_materialize_grads(False)


def _of_loss(ctx, needs, total):
    """Gradients of the arguments of `pair_stats`, from that of the loss."""
    saved = ctx.saved_tensors  # once: a checkpoint makes them anew at every look
    *pairs, rows, columns, slope_rows, slope_columns = saved[:10]
    grads = torch._foreach_mul([slope_rows, slope_columns], total)
    return _of_statistics(pairs, (rows, columns), grads, saved[10:], ctx.static, needs)


def _loss_backward(ctx, needs, total, *_):
    if total is None:
        return *[None] * 7, [None] * len(needs[7]), *[None] * 6
    *of_pairs, of_params = _of_loss(ctx, (*needs[:6], needs[7]), total)[:7]
    return *of_pairs, None, of_params, *[None] * 6


pair_loss.differentiable(_loss_backward, _loss_setup)


class _OneLoss(torch.autograd.Function):
    """A formula of statistics that several passes found, with one backward pass for all of them."""

    @staticmethod
    def forward(ctx, found, static, formula, constants, *tensors):
        rows, columns = (torch.cat(side) for side in zip(*found, strict=True))
        loss, *slopes = slopes_of(static[2], formula, rows, columns, None, constants)
        _keep_slopes(ctx, tensors[:6], (rows, columns, *slopes), tensors[6:])
        ctx.static = static
        return loss

    @staticmethod
    def backward(ctx, total):
        needs = ctx.needs_input_grad[4:]
        if total is None:
            return None, None, None, None, *[None] * len(needs)
        of_pairs = _of_loss(ctx, (*needs[:6], needs[6:]), total)
        return None, None, None, None, *of_pairs[:6], *of_pairs[6]


def loss_of_one_pass(
    found: Sequence[tuple[Tensor, Tensor]],
    pairs: Sequence[Tensor | None],
    params: Sequence[Tensor],
    *static,
    formula: str,
    constants: Sequence[float],
) -> Tensor:
    """`pair_loss` of one pass whose terms, in this order, several passes have reduced; see `as_of_one_pass`."""
    return _OneLoss.apply(found, static, formula, constants, *pairs, *params)


# --- weights: the backward pass of the statistics --------------------------------------------------------------------


@operator("pair_weights")
def pair_weights(
    grad_rows: Tensor,  # (R, B)
    grad_columns: Tensor,  # (C, N)
    rows: Tensor,  # (R, B)
    columns: Tensor,  # (C, N)
    x: Tensor,
    y: Tensor | None,
    labels: Tensor | None,
    ref_labels: Tensor | None,
    pair_mask: Tensor | None,
    exclude: Tensor | None,
    params: list[Tensor],
    spec: list[int],
    consts: list[float],
    backend: str,
    max_workspace_bytes: int,
    need_x: bool,
    need_y: bool,
    need_params: list[bool],
) -> list[Tensor]:  # dx, dy, *dparams; (0,) where not needed
    request = decode(x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, max_workspace_bytes)
    needs = Needs(need_x, need_y, tuple(need_params))
    with without_autocast(x):
        dx, dy, dparams = backend_module(backend).weights(
            request, rows, columns, grad_rows.contiguous(), grad_columns.contiguous(), needs
        )
    return _gradients(request, needs, dx, dy, dparams)


def _gradients(request: Request, needs: Needs, dx, dy, dparams) -> list[Tensor]:
    absent = lambda: request.x.new_empty(0)  # noqa: E731
    grads = [dx if needs.x else absent(), dy if needs.y else absent()]
    for parameter, gradient, need in zip(request.params, dparams, needs.params, strict=True):
        grads.append(like(gradient, parameter) if need else absent())
    return grads


def like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in dtype and shape of its parameter; asking first costs a tenth of a cast that has nothing to do."""
    gradient = gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)
    return gradient if gradient.shape == parameter.shape else gradient.reshape(parameter.shape)


def gradients_fake(x, y, params, need_x, need_y, need_params) -> list[Tensor]:
    wanted = [(x, need_x), (y, need_y), *zip(params, need_params, strict=True)]
    return [t.new_empty(t.shape) if need else x.new_empty(0) for t, need in wanted]


@pair_weights.fake
def _(
    grad_rows, grad_columns, rows, columns, x, y, labels, ref_labels, pair_mask, exclude, params,
    spec, consts, backend, max_workspace_bytes, need_x, need_y, need_params,
):  # fmt: skip
    return gradients_fake(x, y, params, need_x, need_y, need_params)


def _weights_backward(ctx, needs, *grads):
    raise RuntimeError("flashpair.pair_reduce cannot be differentiated twice; use_backend('reference') can")


pair_weights.differentiable(_weights_backward)


# --- one scalar: gradients in the forward pass ------------------------------------------------------------------------


@operator("pair_sum")
def pair_sum(
    x: Tensor,
    y: Tensor | None,
    labels: Tensor | None,
    ref_labels: Tensor | None,
    pair_mask: Tensor | None,
    exclude: Tensor | None,
    params: list[Tensor],
    spec: list[int],
    consts: list[float],
    backend: str,
    max_workspace_bytes: int,
    need_x: bool,
    need_y: bool,
    need_params: list[bool],
) -> list[Tensor]:  # total, dx, dy, *dparams
    request = decode(x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, max_workspace_bytes)
    needs = Needs(need_x, need_y, tuple(need_params))
    with without_autocast(x):
        total, dx, dy, dparams = backend_module(backend).sums(request, needs)
    return [total, *_gradients(request, needs, dx, dy, dparams)]


@pair_sum.fake
def _(
    x, y, labels, ref_labels, pair_mask, exclude, params,
    spec, consts, backend, max_workspace_bytes, need_x, need_y, need_params,
):  # fmt: skip
    total = x.new_empty((), dtype=statistics_dtype(x))
    return [total, *gradients_fake(x, y, params, need_x, need_y, need_params)]


class _Once(torch.autograd.Function):
    """Gradients computed in the forward pass look like constants; tied to the inputs, a second derivative raises."""

    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("flashpair.pair_sum cannot be differentiated twice; use_backend('reference') can")


def _sum_setup(ctx, inputs, output):
    x, y, params = inputs[0], inputs[1], inputs[6]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], x, y, *params)
    ctx.needs = (*inputs[-3:-1], *inputs[-1])


def _sum_backward(ctx, needs, total, *_):
    if total is None:
        return None, None, None, None, None, None, [None] * len(needs[6]), *[None] * 7
    count, saved = len(ctx.needs), ctx.saved_tensors
    gradients, inputs = saved[:count], saved[count:]
    # Scaled in the wide dtype: a gradient scaler's factor need not fit float16.
    wanted = [g.to(total.dtype) for g, need in zip(gradients, ctx.needs, strict=True) if need]
    wide = iter(torch._foreach_mul(wanted, total))
    scaled = [like(next(wide), g) if need else None for g, need in zip(gradients, ctx.needs, strict=True)]
    if torch.is_grad_enabled():
        inputs = [t for t in inputs if t is not None]
        scaled = [g if g is None else _Once.apply(g, *inputs) for g in scaled]
    return scaled[0], scaled[1], None, None, None, None, scaled[2:], *[None] * 7


pair_sum.differentiable(_sum_backward, _sum_setup)


# --- extremes -------------------------------------------------------------------------------------------------------


@operator("pair_mine")
def pair_mine(
    x: Tensor,
    y: Tensor | None,
    labels: Tensor | None,
    ref_labels: Tensor | None,
    pair_mask: Tensor | None,
    exclude: Tensor | None,
    bounds: list[Tensor],  # thresholds given as tensors, (1,) or (B,)
    spec: list[int],  # the header of a request, then (mask, largest, k, above, below) each
    consts: list[float],  # (above, below) of each extreme where they are numbers
    backend: str,
    max_workspace_bytes: int,
) -> list[Tensor]:  # values (B, k), indices (B, k) of each extreme
    request = decode(x, y, labels, ref_labels, pair_mask, exclude, [], spec[:HEADER], [], max_workspace_bytes)
    for e in range((len(spec) - HEADER) // PER_EXTREME):
        at = HEADER + PER_EXTREME * e
        mask, largest, k, above, below = spec[at : at + PER_EXTREME]
        low, high = consts[2 * e : 2 * e + 2]
        numbers = (None if low == -torch.inf else low, None if high == torch.inf else high)
        above, below = (bounds[i].reshape(-1) if i >= 0 else v for i, v in zip((above, below), numbers, strict=True))
        request.extremes.append(Extreme(Mask(mask), bool(largest), k, above, below))
    with without_autocast(x):
        found = backend_module(backend).mine(request)
    return [t for pair in found for t in pair]


@pair_mine.fake
def _(x, y, labels, ref_labels, pair_mask, exclude, bounds, spec, consts, backend, max_workspace_bytes):
    found = []
    for at in range(HEADER, len(spec), PER_EXTREME):
        shape = (x.shape[0], spec[at + 2])
        found += [x.new_empty(shape, dtype=statistics_dtype(x)), x.new_empty(shape, dtype=torch.int64)]
    return found


def statistics_of(terms, rows: Tensor, columns: Tensor) -> list[Tensor]:
    """What each term is asked for: (owners,), moments (slots, owners); some have no gradient."""
    # By axis: the vectors, from one node of autograd for all terms, and how many of them are taken.
    vectors, used = (_vectors(rows), _vectors(columns)), [0, 0]
    found = []
    for term in terms:
        axis = int(term.axis)
        first = used[axis]
        used[axis] += SLOTS[int(term.reduction)]
        if term.reduction is Reduction.MOMENTS:
            found.append((columns if axis else rows).detach()[first : used[axis]])
        else:
            vector = vectors[axis][first]
            found.append(vector if term.reduction.differentiable else vector.detach())
    return found


def _vectors(statistics: Tensor) -> Sequence[Tensor]:
    """The rows of (slots, owners); a single one as a view, which is cheaper than the two nodes of `unbind`."""
    slots, owners = statistics.shape
    return statistics.unbind(0) if slots > 1 else (statistics.view(owners),) if slots else ()
