"""S cut into panels that fit the workspace, in whole tiles; the vendor's products over them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import ops
from .operator import operator
from .terms import Precision


def cdiv(length: int, block: int) -> int:
    return -(-length // block)


def round_up(value: int, multiple: int) -> int:
    return cdiv(value, multiple) * multiple


def _halved(value: int, block: int) -> int:
    return max(round_up(value // 2, block), block)


def panel_shape(
    B: int,
    N: int,
    block_b: int,
    block_n: int,
    budget: int,  # bytes
    cost: Callable[[int, int], int],  # (rows, columns) → bytes
    square: bool = False,
    tall: int = 0,
) -> tuple[int, int]:
    """Largest (rows, columns) whose `cost(rows, columns)` fits the budget, in whole tiles.

    Rows shrink first, down to `tall`, since whole rows of S need the fewest passes over the gradients.
    """
    rows, columns = round_up(B, block_b), round_up(N, block_n)
    while cost(rows, columns) > budget and (rows > block_b or columns > block_n):
        if square:
            side = max(rows, columns)
            both = max(block_b, block_n)
            rows = columns = _halved(side, both)
            if side == both:
                break
        elif rows > max(tall, block_b) or columns <= block_n:
            rows = _halved(rows, block_b)
        else:
            columns = _halved(columns, block_n)
    return rows, columns


def panels(length: int, step: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each panel along one side."""
    for first in range(0, length, step):
        yield first, min(first + step, length)


def empty_partials(slots: int, tiles: int, length: int, device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(slots * tiles * length,): what each tile of a panel says of each owner; at least one entry."""
    return torch.empty(max(slots * tiles * length, 1), dtype=dtype, device=device)


@contextlib.contextmanager
def float32_products(x: Tensor, precision: Precision) -> Iterator[None]:
    """GEMMs of float32 in the requested arithmetic, whatever the process-wide setting is."""
    matmul, wanted = torch.backends.cuda.matmul, "tf32" if precision == Precision.TF32 else "ieee"
    previous = matmul.fp32_precision
    if not x.is_cuda or x.dtype != torch.float32 or previous == wanted:
        yield
        return
    matmul.fp32_precision = wanted
    try:
        yield
    finally:
        matmul.fp32_precision = previous


@operator("product")
def product(a: Tensor, b: Tensor) -> Tensor:
    """(B, N) a (B, K) times b (K, N), a sparse if it is a constant; no autocast narrows it, nor its gradients."""
    with ops.without_autocast(b), float32_products(b, Precision.IEEE):
        return a @ b


@product.fake
def _(a, b):
    return b.new_empty(a.shape[0], b.shape[1])


def _product_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _in_layout_of(operand: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The gradient left @ right of an operand, in rows or columns as that is, like autograd of a plain product.

    What came before may round by the layout of the gradient that it is given.
    """
    by_columns = left.layout == torch.strided and operand.stride(0) == 1 < operand.stride(1)
    return product(right.T, left.T).T if by_columns else product(left, right)


def _product_backward(ctx, needs, grad):
    a, b = ctx.saved_tensors
    of_a = _in_layout_of(a, grad, b.T) if needs[0] else None
    return of_a, _in_layout_of(b, a.T, grad) if needs[1] else None


product.differentiable(_product_backward, _product_setup)
