"""How single losses become one number: mean, sum, or mean over the losses between two bounds.

A NaN loss is never outside the bounds, so it always reaches the result.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..terms import Mask, Reduction, Score, Term
from .arguments import constant
from .peer import AvgNonZeroReducer, DivisorReducer, MeanReducer, MultipleReducers, SumReducer, ThresholdReducer
from .problem import PairProblem


class Rule(NamedTuple):
    """A reducer, read."""

    mean: bool
    low: float | None = None
    high: float | None = None
    divisor: bool = False  # the sum over a number that the loss names


def reducer_rule(reducer, part: str = "loss", divisor: bool = False) -> Rule:
    """The rule of a reducer object for one named part of a loss; `divisor`: the loss names a divisor.

    Raises:
        ValueError: on a reducer that the losses cannot honour.
    """
    if type(reducer) is MultipleReducers:
        known = part in reducer.reducers
        reducer = reducer.reducers[part] if known else reducer.default_reducer
    kind = type(reducer)
    if kind in (MeanReducer, SumReducer):
        return Rule(kind is MeanReducer)
    if divisor and kind is DivisorReducer:
        return Rule(False, divisor=True)
    if kind in (ThresholdReducer, AvgNonZeroReducer):
        return Rule(True, reducer.low, reducer.high)
    allowed = "MeanReducer, SumReducer, AvgNonZeroReducer, ThresholdReducer" + (", DivisorReducer" if divisor else "")
    raise ValueError(f"reducer must be {allowed}, or MultipleReducers of these; got {kind.__name__}")


def reduce_values(values: Tensor, rule: Rule, valid: Tensor | None = None) -> Tensor:
    """One number from losses (n,), of which only `valid` (n,) ones exist; 0 where nothing is left."""
    keep = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    if rule.low is not None:
        keep = keep & ~(values.detach() <= rule.low)
    if rule.high is not None:
        keep = keep & ~(values.detach() >= rule.high)
    total = torch.where(keep, values, 0.0).sum()
    return total / keep.sum().clamp_min(1) if rule.mean else total


def _inverse(score: Score, loss: float) -> float:
    """The z at which a non-negative, growing score reaches a loss."""
    if loss <= 0:
        return -math.inf
    return loss if score == Score.HINGE else loss + math.log(-math.expm1(-loss))


class PairLosses(NamedTuple):
    """Terms for the reduction of `score(z)` over single pairs, and how to finish it."""

    rule: Rule
    terms: list[Term]
    counted: list[Mask]  # masks whose number of pairs is the divisor

    def finish(self, results: list[Tensor], counts: list[Tensor]) -> Tensor:
        """One number from the results of `terms` and the counts of `counted`."""
        total = results[0].sum()
        if not self.rule.mean:
            return total
        return total / (results[1] if len(results) > 1 else counts[0]).sum().clamp_min(1)


def pair_losses(rule: Rule, score: Score, mask: Mask, scale, offset, growing: bool) -> PairLosses:
    """Reduction of hinge or softplus losses of pairs, one loss a pair; `growing`: the scale is positive."""
    bounds: dict[str, Tensor | float] = {}
    for level, lower in ((rule.low, True), (rule.high, False)):
        if level is not None and not (lower and level <= 0):
            bounds["above" if lower == growing else "below"] = (_inverse(score, level) - offset) / scale
    bounds = {k: constant(v) for k, v in bounds.items()}
    terms = [Term(Reduction.SUM, score, mask, scale=scale, offset=offset, **bounds)]
    if not rule.mean or (rule.low is None and rule.high is None):
        return PairLosses(rule, terms, [mask] if rule.mean else [])
    if rule.low == 0:
        terms.append(Term(Reduction.COUNT, score, mask, scale=constant(scale), offset=constant(offset), **bounds))
    else:
        terms.append(Term(Reduction.COUNT, Score.IDENTITY, mask, scale=0.0, offset=1.0, **bounds))
    return PairLosses(rule, terms, [])


def reduce_pairs(problem: PairProblem, parts: list[PairLosses], statistics: bool = False) -> list[Tensor]:
    """One number for each part, all from one pass."""
    terms = [term for part in parts for term in part.terms]
    masks = [mask for part in parts for mask in part.counted]
    results, counts = problem.reduce(terms, masks, statistics)
    numbers = []
    for part in parts:
        numbers.append(part.finish(results[: len(part.terms)], counts[: len(part.counted)]))
        results, counts = results[len(part.terms) :], counts[len(part.counted) :]
    return numbers
