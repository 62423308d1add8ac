"""The operators behind the primitives: opaque to torch.compile, with fake and autograd registrations.

`pair_stats` → statistics, `pair_weights` → its gradients; `pair_sum` is the case in which nothing but one scalar is
wanted, so its gradients are computed in the forward pass; `pair_mine` → extremes. All decode to a `Request` and hand
it to a backend module, which offers

    stats(request) → (rows (R, B), columns (C, N))
    weights(request, rows, columns, grad_rows, grad_columns, needs) → (dx, dy, dparams)
    sums(request, needs) → (total, dx, dy, dparams)
    mine(request) → [(values (B, k), indices (B, k)), ...]
    unavailable() → reasons against running at all
    why_not(x) → reasons against embeddings of the dtype and device of x
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch
from .operator import operator
from .request import HEADER, PER_EXTREME, Request, count_slots, decode, statistics_dtype
from .terms import Axis, Extreme, Mask, Reduction


@dataclass(frozen=True)
class Needs:
    """Which gradients a backward pass has to deliver."""

    x: bool
    y: bool
    params: tuple[bool, ...]  # per entry of Request.params


def backend_module(name: str):
    return dispatch.named(name).load()


def without_autocast(x: Tensor):
    """Autocast off, where it is on: it would narrow the matrix products of a backend."""
    device = x.device.type
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


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


def _stats_backward(ctx, needs, grad_rows, grad_columns):
    x, y, labels, ref_labels, pair_mask, exclude, rows, columns, *params = ctx.saved_tensors
    spec, consts, backend, max_workspace_bytes = ctx.static
    need_x, need_y, need_params = needs[0], needs[1], list(needs[6])
    dx, dy, dparams = _call_weights(
        grad_rows, grad_columns, rows, columns, x, y, labels, ref_labels, pair_mask, exclude, params,
        spec, consts, backend, max_workspace_bytes, need_x, need_y, need_params,
    )  # fmt: skip
    return dx, dy, None, None, None, None, dparams, None, None, None, None


def _call_weights(*args):
    need_x, need_y, need_params = args[-3:]
    grads = pair_weights(*args)
    dparams = [g if need else None for g, need in zip(grads[2:], need_params, strict=True)]
    return grads[0] if need_x else None, grads[1] if need_y else None, dparams


pair_stats.differentiable(_stats_backward, _stats_setup)


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
        grads.append(gradient.to(parameter.dtype).reshape(parameter.shape) if need else absent())
    return grads


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
    ctx.save_for_backward(*output[1:], x, y, *params)
    ctx.needs = (*inputs[-3:-1], *inputs[-1])


def _sum_backward(ctx, needs, total, *_):
    count = len(ctx.needs)
    gradients, inputs = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    # Scaled in the wide dtype: a gradient scaler's factor need not fit float16.
    scaled = [
        (g.to(total.dtype) * total).to(g.dtype) if need else None for g, need in zip(gradients, ctx.needs, strict=True)
    ]
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
    """What each term is asked for: (owners,), moments (slots, owners); counts and moments have no gradient."""
    # (statistics, their vectors by one node of autograd for all terms, how many are taken)
    sides = {axis: (stacked, stacked.unbind(0), [0]) for axis, stacked in ((Axis.ROWS, rows), (Axis.COLUMNS, columns))}
    found = []
    for term in terms:
        stacked, vectors, used = sides[term.axis]
        first = used[0]
        used[0] += term.reduction.slots
        if term.reduction == Reduction.MOMENTS:
            found.append(stacked.detach()[first : used[0]])
        else:
            found.append(vectors[first].detach() if term.reduction == Reduction.COUNT else vectors[first])
    return found
