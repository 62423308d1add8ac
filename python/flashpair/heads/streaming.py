"""Reductions over classes whose per-class formula is not one function of one similarity: sub-centres, grouped proxies,
losses over two logit streams.

Dense code on one block of classes at a time, computed again in the backward pass: the memory of the fused passes at
the speed of dense code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..algebra import log_add_exp
from ..terms import Reduction
from ..workspace import workspace_bytes

#: Dense tensors of a block's size that a formula is assumed to hold at once, its autograd graph included.
_COPIES = 8


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, formula, reductions, step, counts, *tensors):
        rows, columns, shared = _split(tensors, counts)
        totals: list[Tensor] | None = None
        for block in _blocks(columns, step):
            with ops.without_autocast(tensors[0]):
                parts = formula(rows, [c[block] for c in columns], shared, block)
            totals = [
                _merge(reduction, total, part)
                for reduction, total, part in zip(reductions, totals or [None] * len(parts), parts, strict=True)
            ]
        ctx.save_for_backward(*tensors, *totals)
        ctx.static = formula, reductions, step, counts
        return tuple(totals)

    @staticmethod
    def backward(ctx, *cotangents):
        formula, reductions, step, counts = ctx.static
        saved = ctx.saved_tensors
        tensors, totals = saved[: sum(counts)], saved[sum(counts) :]
        needs = ctx.needs_input_grad[4:]
        gradients = [torch.zeros_like(t) if need else None for t, need in zip(tensors, needs, strict=True)]
        of_rows, of_columns, of_shared = _split(gradients, counts)
        rows, columns, shared = _split(tensors, counts)
        for block in _blocks(columns, step):
            leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in rows]
            parts_of = [c[block].detach().requires_grad_(c.is_floating_point()) for c in columns]
            common = [t.detach().requires_grad_(t.is_floating_point()) for t in shared]
            with torch.enable_grad(), ops.without_autocast(tensors[0]):
                parts = formula(leaves, parts_of, common, block)
            into = [(g, leaf, None) for g, leaf in zip(of_rows, leaves, strict=True)]
            into += [(g, leaf, block) for g, leaf in zip(of_columns, parts_of, strict=True)]
            into += [(g, leaf, None) for g, leaf in zip(of_shared, common, strict=True)]
            into = [entry for entry in into if entry[0] is not None]
            outputs, grads = [], []
            for reduction, total, part, cotangent in zip(reductions, totals, parts, cotangents, strict=True):
                if cotangent is not None and part.requires_grad:
                    outputs.append(part)
                    grads.append(cotangent * _share(reduction, part.detach(), total))
            if not outputs or not into:
                continue
            with ops.without_autocast(tensors[0]):
                found = torch.autograd.grad(outputs, [leaf for _, leaf, _ in into], grads, allow_unused=True)
            for (gradient, _, where), value in zip(into, found, strict=True):
                if value is not None and where is None:
                    gradient += value
                elif value is not None:
                    gradient[where] = value
        return None, None, None, None, *gradients


def _split(tensors, counts):
    first, second, _ = counts
    return tensors[:first], tensors[first : first + second], tensors[first + second :]


def _blocks(columns, step: int) -> list[slice]:
    classes = columns[0].shape[0]
    return [slice(first, min(first + step, classes)) for first in range(0, classes, step)]


def _merge(reduction: Reduction, total: Tensor | None, part: Tensor) -> Tensor:
    part = part.detach()
    if total is None:
        return part
    return total + part if reduction == Reduction.SUM else log_add_exp(total, part)


def _share(reduction: Reduction, part: Tensor, total: Tensor) -> Tensor | float:
    """d total / d part."""
    if reduction == Reduction.SUM:
        return 1.0
    empty = total == -torch.inf
    return torch.where(empty, 0.0, torch.exp(part - torch.where(empty, 0.0, total)))


def streamed(
    formula: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], slice], Sequence[Tensor]],
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    reductions: Sequence[Reduction],
    *,
    shared: Sequence[Tensor] = (),
    per_class: int = 1,
    max_workspace_bytes: int | None = None,
) -> tuple[Tensor, ...]:
    """Row statistics of a dense formula over classes, block by block, gradients by computing each block again.

    Args:
        formula: (rows, block of columns, shared, block) → one (B,) partial per reduction, over the block.
        rows: tensors with B rows.
        columns: tensors with C rows, of which the formula sees a block.
        reductions: how the partials of the blocks combine: SUM or LOGSUMEXP.
        shared: tensors that every block sees whole.
        per_class: dense elements that the formula makes of one row and one class. Default 1.
        max_workspace_bytes: bound on the dense blocks; default `flashpair.set_max_workspace_bytes`.

    Returns:
        (B,) per reduction; differentiable once in rows, columns and shared.

    Example:
        >>> import torch
        >>> from flashpair import Reduction
        >>> from flashpair.heads import streamed
        >>> x, weight = torch.eye(2), torch.eye(2)
        >>> lse = lambda rows, columns, shared, block: [(rows[0] @ columns[0].T).logsumexp(1)]
        >>> (total,) = streamed(lse, [x], [weight], [Reduction.LOGSUMEXP])
        >>> torch.allclose(total, (x @ weight.T).logsumexp(1))
        True
    """
    for reduction in reductions:
        if reduction not in (Reduction.SUM, Reduction.LOGSUMEXP):
            raise ValueError(f"reductions must be SUM or LOGSUMEXP; got {reduction!r}")
    if columns[0].shape[0] == 0:
        raise ValueError("columns must hold at least one class; got none")
    row_bytes = max(rows[0].shape[0], 1) * per_class * rows[0].element_size() * _COPIES
    step = max(workspace_bytes(max_workspace_bytes) // row_bytes, 1)
    counts = (len(rows), len(columns), len(shared))
    return _Streamed.apply(formula, tuple(reductions), step, counts, *rows, *columns, *shared)
