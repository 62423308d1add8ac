"""Totals whose slopes are known with them: formulas in closed form, and passes whose gradients are taken at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..primitives import needs_grad


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, *inputs_and_slopes: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs_and_slopes[len(inputs_and_slopes) // 2 :])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        slopes = ctx.saved_tensors
        as_they_are = grad.device.type == "cpu" and grad.item() == 1  # a pass less
        scaled = slopes if as_they_are else [None if v is None else v * grad for v in slopes]
        return None, *scaled, *([None] * len(slopes))


def total_with_slopes(value: Tensor, *pairs: tuple[Tensor, Tensor | None]) -> Tensor:
    """A 0-d value whose derivative in each input is a tensor that is known already.

    Args:
        value: 0-d, computed without a graph.
        pairs: (input, derivative of the value in it, None where the input needs none).
    """
    inputs, slopes = zip(*pairs, strict=True)
    return _Total.apply(value, *inputs, *slopes)


def total_at_once(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, 0-d, with its gradient in x, taken right away.

    For losses of several passes: a CPU keeps S for a backward pass that comes before the next pass only. Rows that
    ranks share, and what is compiled, get their gradients later.

    Args:
        function: of rows, to a sum that is not small; its gradient has not seen the factor of a gradient scaler.
        x: rows in the dtype of statistics.
    """
    if type(x) not in (Tensor, torch.nn.Parameter) or not needs_grad(x) or torch.compiler.is_compiling():
        return function(x)
    leaf = x.detach().requires_grad_()
    value = function(leaf)
    (slope,) = torch.autograd.grad(value, leaf)
    return total_with_slopes(value.detach(), (x, slope))
