"""The statistics pass around a backend's kernels: where partial statistics go, and results from the running ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .operands import Operands, operands
from .request import FlatTerm, Request, statistics_dtype
from .terms import Reduction

#: An empty owner's running statistics. A logsumexp is kept as (m, mass), its value being m + log(mass).
NEUTRAL = {
    Reduction.SUM: (0.0,),
    Reduction.COUNT: (0.0,),
    Reduction.LOGSUMEXP: (-torch.inf, 0.0),
    Reduction.SOFTMAX_MEAN: (-torch.inf, 0.0, 0.0),
    Reduction.MOMENTS: (0.0, 0.0, 0.0, torch.inf, -torch.inf),  # count, mean, sum of squared deviations, min, max
}


@dataclass
class Forward:
    """A pass over the statistics; a self-similarity has one state, which both sides of a tile add to."""

    op: Operands
    terms: list[FlatTerm]  # vectors in the order of the operands
    firsts: list[int]  # first partial of each term
    slots: tuple[int, int]  # partials per row and per column
    entries: tuple[tuple[int, ...], tuple[int, ...]]  # (reduction, first partial, ...) that a side's tiles write
    states: tuple[Tensor, Tensor]  # running statistics (slots, B), (slots, N), float64


def set_neutral(buffer: Tensor, entries: tuple[int, ...]) -> None:
    """Empty statistics in a buffer (slots, ...)."""
    for reduction, slot in zip(entries[::2], entries[1::2], strict=True):
        for k, value in enumerate(NEUTRAL[Reduction(reduction)]):
            buffer[slot + k].fill_(value)


def _layout(terms: list[FlatTerm], symmetric: bool) -> tuple[list[int], tuple[int, int], tuple]:
    """First partial of each term, partials per side, entries per side."""
    used, firsts, entries = [0, 0], [], ([], [])
    for term in terms:
        side = 0 if symmetric else int(term.axis)
        firsts.append(used[side])
        entries[side].extend((int(term.reduction), used[side]))
        used[side] += len(NEUTRAL[term.reduction])
    if symmetric:
        return firsts, (used[0], used[0]), (tuple(entries[0]), tuple(entries[0]))
    return firsts, (used[0], used[1]), (tuple(entries[0]), tuple(entries[1]))


def statistics(
    request: Request, reduce_panels: Callable[[Request, Forward], None], sort_many: bool = False
) -> tuple[Tensor, Tensor]:
    """Statistics of all terms, rows (R, B) and columns (C, N); `reduce_panels` merges every tile into the states."""
    B, N = request.shape
    device = request.x.device
    op = operands(request, {t.mask for t in request.terms}, sort_many)
    terms = op.arranged_terms(request.terms)
    firsts, slots, entries = _layout(terms, request.symmetric)
    rows_state = torch.empty(slots[0], B, dtype=torch.float64, device=device)
    columns_state = rows_state if request.symmetric else torch.empty(slots[1], N, dtype=torch.float64, device=device)
    states = (rows_state, columns_state)
    for state, written in zip(states, entries, strict=True):
        set_neutral(state, written)
    if B and N:
        reduce_panels(request, Forward(op, terms, firsts, slots, entries, states))
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for term, first in zip(terms, firsts, strict=True):
        side = int(term.axis)
        found[side].append(_finished(term.reduction, op.restore(states[side][first:], side)))
    dtype = statistics_dtype(request.x)
    return _joined(found[0], B, dtype, device), _joined(found[1], N, dtype, device)


def _joined(parts: list[Tensor], length: int, dtype: torch.dtype, device) -> Tensor:
    if not parts:
        return torch.empty(0, length, dtype=dtype, device=device)
    return torch.cat(parts).to(dtype)


def _finished(reduction: Reduction, state: Tensor) -> Tensor:
    """Running statistics (partials, owners) float64 → the reduction's slots."""
    if reduction in (Reduction.SUM, Reduction.COUNT):
        return state[:1]
    if reduction == Reduction.MOMENTS:
        return torch.cat([state[:2], (state[2] / state[0].clamp_min(1.0))[None], state[3:5]])
    logsumexp = state[0] + state[1].log()
    if reduction == Reduction.LOGSUMEXP:
        return logsumexp[None]
    mean = torch.where(state[1] == 0.0, 0.0, state[2] / state[1])
    return torch.stack([mean, logsumexp])
