"""Row formulas with slopes in closed form: few tensors of a panel's size, and none that autograd keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
