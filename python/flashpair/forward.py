"""The statistics pass around a backend's kernels: where partial statistics go, and results from the running ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .operands import Operands, operands
from .request import FlatTerm, Request, count_slots, statistics_dtype
from .rowwise import TORCH, Rowwise
from .terms import Reduction

#: An empty owner's running statistics. A logsumexp is kept as (m, mass), its value being m + log(mass).
NEUTRAL = {
    Reduction.SUM: (0.0,),
    Reduction.COUNT: (0.0,),
    Reduction.LOGSUMEXP: (-torch.inf, 0.0),
    Reduction.SOFTMAX_MEAN: (-torch.inf, 0.0, 0.0),
    Reduction.MAX: (-torch.inf,),
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
    found: tuple[Tensor, Tensor]  # the results, rows (R, B) and columns (C, N), in the caller's order
    symmetric: bool

    @functools.cached_property
    def states(self) -> tuple[Tensor, Tensor]:
        """Running statistics (slots, B), (slots, N), float64, uninitialised."""
        states = [
            torch.empty(slots, len(side), dtype=torch.float64, device=side.device)
            for slots, side in zip(self.slots, (self.op.x,) if self.symmetric else (self.op.x, self.op.y), strict=False)
        ]
        return states[0], states[-1]

    def set_neutral(self) -> None:
        """Nothing was merged yet."""
        for state, entries in zip(self.states, self.entries, strict=True):
            set_neutral(state, entries)

    def finish(self) -> None:
        """Results from the running statistics."""
        for term, first in zip(self.terms, self.firsts, strict=True):
            side = int(term.axis)
            out = self.found[side][term.slot : term.slot + term.reduction.slots]
            _finish(term.reduction, self.op.restore(self.states[side][first:], side), out)


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
    request: Request,
    reduce_panels: Callable[[Request, Forward], None],
    plain_tiles: bool = False,
    rowwise: Rowwise = TORCH,
) -> tuple[Tensor, Tensor]:
    """Statistics of all terms, rows (R, B) and columns (C, N); `reduce_panels` finds them from every tile."""
    B, N = request.shape
    device, dtype = request.x.device, statistics_dtype(request.x)
    op = operands(request, {t.mask for t in request.terms}, plain_tiles, rowwise)
    terms = op.arranged_terms(request.terms)
    firsts, slots, entries = _layout(terms, request.symmetric)
    rows, columns = count_slots(request.spec)
    found = (torch.empty(rows, B, dtype=dtype, device=device), torch.empty(columns, N, dtype=dtype, device=device))
    plan = Forward(op, terms, firsts, slots, entries, found, request.symmetric)
    if B and N:
        reduce_panels(request, plan)
    else:
        plan.set_neutral()
        plan.finish()
    return found


def _finish(reduction: Reduction, state: Tensor, out: Tensor) -> None:
    """Running statistics (partials, owners) float64 → the reduction's slots (slots, owners)."""
    if reduction in (Reduction.SUM, Reduction.COUNT, Reduction.MAX):
        out[0] = state[0]
    elif reduction == Reduction.MOMENTS:
        out[:] = state[:5]
        torch.div(state[2], state[0].clamp_min(1.0), out=out[2])
    else:
        torch.add(state[0], state[1].log(), out=out[-1])
        if reduction == Reduction.SOFTMAX_MEAN:
            out[0] = torch.where(state[1] == 0.0, 0.0, state[2] / state[1])
