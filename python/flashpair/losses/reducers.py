"""How single losses become one number: mean, sum, mean over the losses between two bounds, class weights, per anchor.

A NaN loss is never outside the bounds, so it always reaches the result.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import MEAN_OF_PAIRS, MEANS_OF_PAIRS, Average, Formula
from ..terms import Mask, Reduction, Score, Term
from .arguments import constant
from .geometry import NotFused
from .peer import (
    AvgNonZeroReducer,
    ClassWeightedReducer,
    DivisorReducer,
    MeanReducer,
    MultipleReducers,
    PerAnchorReducer,
    SumReducer,
    ThresholdReducer,
    aggregation_func,
)
from .problem import PairProblem

_SIGNED = [Mask.SAME, Mask.DIFFERENT]


class Rule(NamedTuple):
    """A reducer, read."""

    mean: bool
    low: float | None = None
    high: float | None = None
    divisor: bool = False  # the sum over a number that the loss names
    class_weights: Tensor | None = None  # (classes,): each loss times the weight of its anchor's label, then the mean
    per_anchor: Rule | None = None  # the mean of each anchor's losses (0 without any), then this rule over anchors


def reducer_rule(reducer, part: str = "loss", divisor: bool = False) -> Rule:
    """The rule of a reducer object for one named part of a loss; `divisor`: the loss names a divisor.

    Raises:
        NotFused: on a reducer that the losses cannot honour.
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
    if kind is ClassWeightedReducer:
        return Rule(True, class_weights=torch.as_tensor(reducer.weights))
    if kind is PerAnchorReducer and reducer.aggregation_func is aggregation_func:
        return Rule(True, per_anchor=reducer_rule(reducer.reducer, part))
    allowed = (
        "MeanReducer, SumReducer, AvgNonZeroReducer, ThresholdReducer, ClassWeightedReducer, PerAnchorReducer (with "
        "its own mean)" + (", DivisorReducer" if divisor else "")
    )
    raise NotFused(f"reducer must be {allowed}, or MultipleReducers of these; got {kind.__name__}")


def anchors_average(rule: Rule) -> Average | None:
    """What a closed formula makes of losses of anchors under a rule; None where there is no such average."""
    rule = rule if rule.per_anchor is None else rule.per_anchor  # the losses are those of anchors already
    if rule.class_weights is not None or rule.divisor or rule.per_anchor is not None:
        return None
    if rule.low is None and rule.high is None:
        return Average.MEAN if rule.mean else Average.SUM
    return Average.ABOVE_ZERO if rule.low == 0 and rule.high is None else None


def reduce_anchors(
    problem: PairProblem,
    rule: Rule,
    terms: list[Term],
    formula: Formula,
    counts: tuple[Mask, ...] = (),
    constants: tuple[float, ...] = (),
    statistics: bool = False,
) -> Tensor:
    """One number from the losses of anchors: `formula.anchors` of terms, numbers of pairs and constants."""
    average = anchors_average(rule)
    if average is not None and not any(isinstance(c, Tensor) for c in constants):  # a tensor may want a gradient
        return problem.loss(terms, formula, counts, (float(average.value), *constants), statistics)
    results, found = problem.reduce(terms, counts, statistics)
    return reduce_values(formula.anchors(*results, *found, *constants), rule, labels=problem.anchor_labels)


def refuse(rule: Rule, loss: str, *, bounds: bool = False, per_anchor: bool = False) -> None:
    """Reducers that a loss has no fused form for.

    Raises:
        NotFused: where the rule is one of those named, saying what would serve.
    """
    if bounds and ((rule.low is not None and rule.low != 0) or rule.high is not None):
        raise NotFused(f"reducer of {loss} must not be a ThresholdReducer other than AvgNonZeroReducer; got one")
    if per_anchor and rule.per_anchor is not None:
        raise NotFused(f"reducer of {loss} must not be PerAnchorReducer, which is not defined for triplets; got one")


def anchor_weights(rule: Rule, labels: Tensor | None, values: Tensor) -> Tensor | float:
    """What each anchor's losses are multiplied by.

    Raises:
        ValueError: on class weights without labels.
    """
    if rule.class_weights is None:
        return 1.0
    if labels is None:
        raise ValueError("labels must be given with ClassWeightedReducer; got None")
    return rule.class_weights.to(values)[labels]


def reduce_values(
    values: Tensor, rule: Rule, valid: Tensor | None = None, labels: Tensor | None = None, divisor: Tensor | None = None
) -> Tensor:
    """One number from losses (n,), of which only `valid` (n,) ones exist; 0 where nothing is left.

    `labels` (n,) of their anchors, for class weights; `divisor`: what DivisorReducer divides by.
    """
    if rule.per_anchor is not None:  # the losses are those of anchors already
        rule = rule.per_anchor
    if rule.low == 0 and rule.high is None:  # what does not exist is not above zero either
        values = (values if valid is None else torch.where(valid, values, 0.0)).relu()
        return values.sum() / values.detach().count_nonzero().clamp_min(1)
    keep = valid
    if rule.low is not None:
        keep = _both(keep, ~(values.detach() <= rule.low))
    if rule.high is not None:
        keep = _both(keep, ~(values.detach() >= rule.high))
    if rule.class_weights is not None:
        values = values * anchor_weights(rule, labels, values)
    if keep is None and rule.mean and values.shape[0]:
        return values.mean()
    total = (values if keep is None else torch.where(keep, values, 0.0)).sum()
    if rule.divisor:
        return (
            total if divisor is None else torch.where(divisor == 0, 0.0, total / torch.where(divisor == 0, 1, divisor))
        )
    return total / keep.sum().clamp_min(1) if rule.mean and keep is not None else total


def _both(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a & b


def reduce_sums(
    sums: Tensor, counts: Tensor, rule: Rule, labels: Tensor | None, divisor: Tensor | None = None
) -> Tensor:
    """One number from the sum (B,) and the number (B,) of each anchor's losses; bounds are already applied."""
    if rule.per_anchor is not None:
        return reduce_values(sums / counts.clamp_min(1), rule, labels=labels)
    total = (sums * anchor_weights(rule, labels, sums)).sum()
    if rule.divisor:
        return reduce_values(total[None], rule, divisor=divisor)
    return total / counts.sum().clamp_min(1) if rule.mean else total


def _inverse(score: Score, loss: float) -> float:
    """The z at which a non-negative, growing score reaches a loss."""
    if loss <= 0:
        return -math.inf
    if score == Score.SOFTPLUS:
        return loss + math.log(-math.expm1(-loss))
    return math.sqrt(loss) if score == Score.SQUARED_HINGE else loss


class PairLosses(NamedTuple):
    """Terms for the reduction of `score(z)` over single pairs, and how to finish it."""

    rule: Rule
    terms: list[Term]
    counted: list[Mask]  # masks whose number of pairs is the divisor

    def finish(self, results: list[Tensor], counts: list[Tensor], labels: Tensor | None) -> Tensor:
        """One number from the results of `terms` and the counts of `counted`."""
        if not self.rule.mean:
            return results[0].sum()
        return reduce_sums(results[0], results[1] if len(results) > 1 else counts[0], self.rule, labels)


def pair_losses(rule: Rule, score: Score, mask: Mask, scale, offset, growing: bool, **fields) -> PairLosses:
    """Reduction of losses of pairs, `score(scale s + offset)` with a growing score, one loss a pair.

    `growing`: the scale is positive. `fields`: further ones of the terms; with an offset of the other side the rule may
    have no bounds but 0.
    """
    bounds: dict[str, Tensor | float] = {}
    for level, lower in ((rule.low, True), (rule.high, False)):
        if level is not None and not (lower and level <= 0):
            bounds["above" if lower == growing else "below"] = (_inverse(score, level) - offset) / scale
    bounds = {k: constant(v) for k, v in bounds.items()}
    terms = [Term(Reduction.SUM, score, mask, scale=scale, offset=offset, **bounds, **fields)]
    if not rule.mean or (rule.low is None and rule.high is None):
        return PairLosses(rule, terms, [mask] if rule.mean else [])
    if rule.low == 0:
        fields = {k: constant(v) for k, v in fields.items()}
        terms.append(
            Term(Reduction.COUNT, score, mask, scale=constant(scale), offset=constant(offset), **bounds, **fields)
        )
    else:
        terms.append(Term(Reduction.COUNT, Score.IDENTITY, mask, scale=0.0, offset=1.0, **bounds))
    return PairLosses(rule, terms, [])


def reduce_pairs(problem: PairProblem, parts: list[PairLosses]) -> Tensor:
    """The sum of what each part makes of its pairs, all from one pass: a closed formula where all make means."""
    rules, counted = [part.rule for part in parts], [mask for part in parts for mask in part.counted]
    means = all(rule.mean and rule.per_anchor is None and rule.class_weights is None for rule in rules)
    if means and len(parts) <= 2 and counted in ([], _SIGNED[: len(parts)]):
        sums, counts = ([term for part in parts for term in part.terms[k]] for k in (slice(1), slice(1, None)))
        return problem.loss(sums + counts, MEANS_OF_PAIRS if len(parts) == 2 else MEAN_OF_PAIRS, tuple(counted))
    results, counts = problem.reduce([term for part in parts for term in part.terms], counted)
    total = 0.0
    for part in parts:
        found = results[: len(part.terms)], counts[: len(part.counted)]
        total = total + part.finish(*found, problem.anchor_labels)
        results, counts = results[len(part.terms) :], counts[len(part.counted) :]
    return total
