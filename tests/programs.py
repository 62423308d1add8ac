"""A table of programs over the primitives: every option of a term, and the combinations that losses use.

One row adds a program to the tests of values, gradients, repeatability, memory and compilation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support import Data
from torch import Tensor

from flashpair import (
    Axis,
    Combine,
    Extreme,
    Guide,
    Mask,
    Reduction,
    Score,
    Similarity,
    Term,
    mine,
    pair_reduce,
    pair_sum,
)
from flashpair.distributed.sharded import by_row
from flashpair.formulas import (
    CIRCLE,
    MEAN_GAP,
    MEAN_GAP_OF_BOTH,
    MEAN_OF_PAIRS,
    MEANS_OF_PAIRS,
    MULTI_SIMILARITY,
    SUP_CON,
)
from flashpair.losses.problem import label_counts
from flashpair.primitives import pair_loss, reduce_in_turn

ROWS, COLUMNS = Axis.ROWS, Axis.COLUMNS
SUM, LSE, COUNT = Reduction.SUM, Reduction.LOGSUMEXP, Reduction.COUNT
MEAN, MOMENTS, MAX = Reduction.SOFTMAX_MEAN, Reduction.MOMENTS, Reduction.MAX
SAME, DIFFERENT, GIVEN, NOT_GIVEN = Mask.SAME, Mask.DIFFERENT, Mask.GIVEN, Mask.NOT_GIVEN


@dataclass(frozen=True)
class Program:
    name: str
    run: Callable[[Data], tuple]
    sides: tuple[str, ...] = ("rectangle", "self")
    grid: bool = False  # has thresholds or counts: in narrow dtypes only exact similarities make it well defined

    def __str__(self) -> str:
        return self.name


def _reduce(*terms: Callable[[Data], Term] | Term, **options) -> Callable[[Data], tuple]:
    """A program of one pass; terms that need the data are functions of it."""

    def run(d: Data) -> tuple:
        extra = {k: v(d) if callable(v) else v for k, v in options.items()}
        return pair_reduce(**d.pairs, terms=[t(d) if callable(t) else t for t in terms], **extra)

    return run


def _clip(d: Data) -> tuple:
    terms = [Term(LSE, scale=d.scale), Term(LSE, axis=COLUMNS, scale=d.scale)]
    return pair_reduce(**d.pairs, terms=terms, normalize=True)


def _siglip(d: Data) -> tuple:
    terms = [
        Term(SUM, Score.SOFTPLUS, SAME, scale=-d.scale, offset=-d.bias),
        Term(SUM, Score.SOFTPLUS, DIFFERENT, scale=d.scale, offset=d.bias),
    ]
    return (pair_sum(**d.pairs, terms=terms, normalize=True),)


def _nt_xent(d: Data) -> tuple:
    (negatives,) = pair_reduce(**d.pairs, terms=[Term(LSE, mask=DIFFERENT, scale=d.scale)], normalize=True)
    positives = Term(SUM, Score.SOFTPLUS, SAME, scale=-d.scale, offset=negatives)
    return negatives, *pair_reduce(**d.pairs, terms=[positives, Term(COUNT, Score.SOFTPLUS, SAME)], normalize=True)


def _lifted(d: Data) -> tuple:
    euclidean = {"similarity": Similarity.EUCLIDEAN}
    both = [Term(LSE, mask=DIFFERENT, scale=-1.0, offset=1.0)]
    if d.y is not None:
        both.append(Term(LSE, mask=DIFFERENT, axis=COLUMNS, scale=-1.0, offset=1.0))
    negatives = pair_reduce(**d.pairs, terms=both, **euclidean)
    term = Term(
        SUM, Score.SQUARED_HINGE, SAME, offset=negatives[0], other_offset=negatives[-1], combine=Combine.LOGADDEXP
    )
    return (*negatives, *pair_reduce(**d.pairs, terms=[term], **euclidean))


def _multi_similarity(d: Data) -> tuple:
    extremes = [Extreme(DIFFERENT), Extreme(SAME, largest=False)]
    hardest, easiest = mine(**d.pairs, extremes=extremes)
    terms = [
        Term(LSE, mask=SAME, scale=-2.0, offset=1.0, below=hardest.values[:, 0] + 0.103),
        Term(LSE, mask=DIFFERENT, scale=5.0, offset=-2.5, above=easiest.values[:, 0] - 0.103),
    ]
    return pair_reduce(**d.pairs, terms=terms)


def _in_turn(d: Data) -> tuple:
    """The negatives above the farthest positive and their maximum, then the positives below that."""
    (farthest,) = mine(**d.pairs, extremes=[Extreme(SAME, largest=False)])
    above = farthest.values[:, 0] - 0.103
    first = [Term(LSE, mask=DIFFERENT, scale=5.0, offset=-2.5, above=above), Term(MAX, mask=DIFFERENT)]

    def then(found) -> list[Term]:
        return [Term(LSE, mask=SAME, scale=-d.scale, offset=1.0, below=found[-1] + 0.103), Term(SUM, mask=SAME)]

    return reduce_in_turn(**d.pairs, first=first, then=then)


def _mean_gap(d: Data) -> tuple:
    """A loss in one node, of rows and, where the columns are the rows, of both directions; moments beside it."""
    terms = [Term(LSE, mask=DIFFERENT, scale=d.scale, offset=-0.3), Term(SUM, mask=SAME, scale=d.scale, offset=-0.3)]
    formula = MEAN_GAP
    if d.y is None:
        formula = MEAN_GAP_OF_BOTH
        terms.append(Term(LSE, mask=DIFFERENT, axis=COLUMNS, scale=d.row_scale))
    extra = [Term(MOMENTS, mask=DIFFERENT), Term(MOMENTS, mask=SAME, axis=COLUMNS)]
    loss, own, found = pair_loss(
        d.x, d.y, terms, formula, extra, labels=d.labels, ref_labels=d.ref_labels, normalize=True
    )
    assert own is None
    return loss, *found


def _anchors(d: Data) -> tuple:
    """Losses of anchors in one node: numbers of pairs given, and from the pass where thresholds decide."""
    counts = label_counts(d.labels, d.ref_labels, None, d.scale.dtype)
    logits = [Term(LSE, scale=d.scale), Term(SUM, mask=SAME, scale=d.scale)]
    sup_con, *_ = pair_loss(**d.pairs, terms=logits, formula=SUP_CON, counts=counts, constants=(2.0, 0.0))
    kept = {SAME: {"below": 0.603}, DIFFERENT: {"above": -0.603}}
    both = [Term(LSE, mask=mask, scale=sign * d.scale, **kept[mask]) for mask, sign in ((SAME, -1), (DIFFERENT, 1))]
    numbers = [Term(COUNT, mask=mask, scale=0.0, offset=1.0, **kept[mask]) for mask in (SAME, DIFFERENT)]
    similar, *_ = pair_loss(**d.pairs, terms=both, formula=MULTI_SIMILARITY, constants=(1.0, 2.0, 50.0))
    circle, *_ = pair_loss(**d.pairs, terms=both + numbers, formula=CIRCLE, constants=(0.0,))
    return sup_con, similar, circle


def _means_of_pairs(d: Data) -> tuple:
    """Means of the losses of pairs in one node, of one kind and of two."""
    terms = [
        Term(SUM, Score.HINGE, SAME, offset=-0.2),
        Term(SUM, Score.HINGE, DIFFERENT, scale=-1.0, offset=1.7),
        Term(COUNT, Score.HINGE, SAME, offset=-0.2),
        Term(COUNT, Score.HINGE, DIFFERENT, scale=-1.0, offset=1.7),
    ]
    how = {**d.pairs, "similarity": Similarity.EUCLIDEAN}
    one, *_ = pair_loss(**how, terms=terms[1::2], formula=MEAN_OF_PAIRS)
    return one, pair_loss(**how, terms=terms, formula=MEANS_OF_PAIRS)[0]


def _circle(d: Data) -> tuple:
    root, margin = math.sqrt(8.0), 0.4
    terms = [
        Term(LSE, Score.CIRCLE, SAME, scale=-root, offset=root, constant=root * margin),
        Term(LSE, Score.CIRCLE, DIFFERENT, scale=root, constant=root * margin),
    ]
    return pair_reduce(**d.pairs, terms=terms, normalize=True)


def _both_axes(reduction: Reduction, **options) -> Callable[[Data], tuple]:
    """The same term owned by rows and by columns, with every vector parameter."""

    def run(d: Data) -> tuple:
        row = {"scale": d.row_scale, "offset": d.row_offset, "other_offset": d.column_offset, "weight": d.column_weight}
        column = {"scale": d.column_scale, "offset": d.column_offset, "other_offset": d.row_offset}
        column["weight"] = d.row_weight
        return pair_reduce(
            **d.pairs, terms=[Term(reduction, **row, **options), Term(reduction, axis=COLUMNS, **column, **options)]
        )

    return run


def _every_reduction(**options) -> Callable[[Data], tuple]:
    """`_both_axes` of every reduction that has a gradient."""
    return lambda d: tuple(v for r in (SUM, LSE, MEAN) for v in _both_axes(r, **options)(d))


def _features(d: Data) -> Tensor | tuple[Tensor, Tensor]:
    """A guide whose products are exact wherever those of the embeddings are."""
    rows, *columns = (by_row(lambda v: v[:, :3], side) for side in (d.x, d.y) if side is not None)
    return (rows, *columns) if columns else rows


def _overlaps(d: Data) -> Tensor | tuple[Tensor, Tensor]:
    """A guide whose products are positive where the labels are both odd or both even, and 0 elsewhere."""

    def side(weight: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
        odd = (labels % 2).to(weight.dtype)
        return torch.stack([weight * odd, scale * odd, weight * (1 - odd)], 1)

    rows = side(d.row_weight, d.row_scale, d.labels)
    return rows if d.y is None else (rows, side(d.column_weight, d.column_scale, d.ref_labels))


PROGRAMS = [
    Program("clip", _clip),
    Program("siglip", _siglip),
    Program(
        "supcon",
        _reduce(
            lambda d: Term(LSE, scale=d.scale),
            lambda d: Term(SUM, mask=SAME, scale=d.scale),
            Term(COUNT, Score.SQUARE, SAME, scale=0.0, offset=1.0),
            normalize=True,
        ),
        sides=("self",),
    ),
    Program("nt_xent", _nt_xent),
    Program("lifted", _lifted),
    Program("multi_similarity", _multi_similarity, grid=True),
    Program("in_turn", _in_turn, grid=True),
    Program("mean_gap", _mean_gap),
    Program("anchors", _anchors, grid=True),
    Program("means_of_pairs", _means_of_pairs, grid=True),
    Program("circle", _circle),
    Program(
        "contrastive",
        _reduce(
            Term(SUM, Score.HINGE, SAME, offset=-0.2),
            Term(SUM, Score.HINGE, DIFFERENT, scale=-1.0, offset=1.7),
            Term(COUNT, Score.HINGE, SAME, offset=-0.2),
            Term(COUNT, Score.HINGE, DIFFERENT, scale=-1.0, offset=1.7),
            similarity=Similarity.EUCLIDEAN,
        ),
        grid=True,
    ),
    Program(
        "cacr",
        _reduce(
            lambda d: Term(MEAN, mask=DIFFERENT, scale=-d.scale),
            lambda d: Term(MEAN, mask=SAME, scale=d.scale),
            similarity=Similarity.SQUARED_EUCLIDEAN,
            normalize=True,
        ),
    ),
    Program(
        "cacr_detached",
        _reduce(
            lambda d: Term(MEAN, mask=DIFFERENT, scale=-d.scale, detach_weights=True),
            lambda d: Term(MEAN, axis=COLUMNS, scale=d.column_scale, weight=d.row_weight, detach_weights=True),
            similarity=Similarity.SQUARED_EUCLIDEAN,
            normalize=True,
        ),
    ),
    Program("row_scale", _reduce(lambda d: Term(LSE, scale=d.row_scale, offset=d.row_offset), normalize=True)),
    Program(
        "shared_scale",
        _reduce(
            lambda d: Term(LSE, scale=d.scale, offset=d.bias),
            lambda d: Term(SUM, Score.SQUARE, SAME, COLUMNS, scale=d.scale, offset=d.bias),
            lambda d: Term(MEAN, mask=DIFFERENT, scale=d.scale),
        ),
    ),
    Program("sum_parameters", _both_axes(SUM, score=Score.SOFTPLUS)),
    Program("logsumexp_parameters", _both_axes(LSE, mask=SAME)),
    Program("softmax_mean_parameters", _both_axes(MEAN, mask=DIFFERENT)),
    Program("sum_logaddexp", _both_axes(SUM, score=Score.SQUARE, combine=Combine.LOGADDEXP)),
    Program("logsumexp_logaddexp", _both_axes(LSE, combine=Combine.LOGADDEXP)),
    Program("softmax_mean_logaddexp", _both_axes(MEAN, combine=Combine.LOGADDEXP)),
    Program(
        "number_logaddexp",
        _reduce(lambda d: Term(LSE, offset=0.5, other_offset=d.column_offset, combine=Combine.LOGADDEXP)),
    ),
    Program(
        "scores_of_sum",
        _reduce(*(Term(SUM, s, scale=0.7, offset=-0.21, constant=0.3) for s in Score)),
    ),
    Program(
        "scores_of_logsumexp",
        _reduce(*(Term(LSE, s, scale=0.7, offset=-0.21, constant=0.3, axis=COLUMNS) for s in Score)),
    ),
    Program(
        "scores_of_softmax_mean",
        # Under log cosh, even in z, a mean near z = 0 would cancel.
        _reduce(
            *(Term(MEAN, s, scale=0.7, offset=-0.51 if s == Score.LOG_COSH else -0.21, constant=0.3) for s in Score)
        ),
    ),
    Program(
        "counts_of_columns",
        _reduce(*(Term(COUNT, s, scale=0.7, offset=-0.21, constant=0.3, axis=COLUMNS) for s in Score)),
        grid=True,
    ),
    Program(
        "softcap_clip",
        _reduce(
            lambda d: Term(LSE, Score.SOFTCAP, scale=d.scale, constant=0.8),
            lambda d: Term(LSE, Score.SOFTCAP, axis=COLUMNS, scale=d.scale, constant=0.8),
            normalize=True,
        ),
    ),
    Program("softcap_parameters", _every_reduction(score=Score.SOFTCAP, constant=2.5)),
    Program("log_cosh_parameters", _every_reduction(score=Score.LOG_COSH)),
    Program(
        "given",
        _reduce(
            lambda d: Term(LSE, mask=GIVEN, scale=d.scale),
            lambda d: Term(SUM, Score.SOFTPLUS, NOT_GIVEN, COLUMNS, scale=d.scale),
            Term(MEAN, mask=GIVEN),
            pair_mask=lambda d: d.pair_mask,
            normalize=True,
        ),
    ),
    Program(
        "exclude",
        _reduce(
            lambda d: Term(LSE, scale=d.scale),
            lambda d: Term(SUM, Score.SQUARE, DIFFERENT, COLUMNS, scale=d.scale),
            Term(COUNT, Score.SQUARE, scale=0.0, offset=1.0),
            exclude=lambda d: d.exclude,
        ),
    ),
    Program(
        "thresholds",
        _reduce(
            lambda d: Term(LSE, above=d.row_offset + 0.013, scale=d.scale),
            lambda d: Term(SUM, Score.SQUARE, SAME, below=d.bias + 0.013),
            Term(MEAN, axis=COLUMNS, above=-0.507, below=0.507),
            lambda d: Term(COUNT, Score.SQUARE, axis=COLUMNS, above=d.column_offset - 0.007, offset=9.1),
            lambda d: Term(MOMENTS, mask=DIFFERENT, below=d.row_offset + 0.013),
        ),
        grid=True,
    ),
    Program(
        "moments",
        _reduce(
            Term(MOMENTS, mask=SAME),
            Term(MOMENTS, mask=DIFFERENT),
            Term(MOMENTS, axis=COLUMNS),
            lambda d: Term(LSE, scale=d.scale),
        ),
    ),
    Program(
        "maxima",
        _reduce(
            lambda d: Term(MAX, mask=DIFFERENT, scale=d.row_scale, offset=d.row_offset, other_offset=d.column_offset),
            lambda d: Term(MAX, mask=SAME, axis=COLUMNS, scale=-1.0, above=d.column_offset + 0.013),
            lambda d: Term(MAX, Score.SQUARE, weight=d.column_weight, below=d.bias + 0.013),
            lambda d: Term(LSE, mask=DIFFERENT, scale=d.scale),
            lambda d: Term(MAX, mask=DIFFERENT, scale=d.scale),
        ),
        grid=True,
    ),
    Program(
        "euclidean",
        _reduce(
            lambda d: Term(LSE, scale=-d.scale), Term(SUM, mask=SAME, axis=COLUMNS), similarity=Similarity.EUCLIDEAN
        ),
    ),
    Program(
        "squared_euclidean",
        _reduce(
            lambda d: Term(LSE, scale=-d.scale),
            lambda d: Term(SUM, Score.HINGE, SAME, COLUMNS, scale=-1.0, offset=d.column_scale),
            similarity=Similarity.SQUARED_EUCLIDEAN,
        ),
    ),
    Program(
        "scalar_of_everything",
        lambda d: (
            pair_sum(
                **d.pairs,
                terms=[
                    Term(SUM, Score.SOFTPLUS, SAME, scale=d.row_scale, offset=d.row_offset, weight=d.column_weight),
                    Term(SUM, Score.SQUARE, axis=COLUMNS, other_offset=d.row_offset, weight=d.row_weight),
                    Term(SUM, Score.SQUARED_HINGE, DIFFERENT, scale=d.scale, offset=d.bias, above=-0.507),
                ],
            ),
        ),
        grid=True,
    ),
    Program(
        "guide_threshold",
        _reduce(
            lambda d: Term(LSE, below=0.013, scale=d.scale, guide=Guide.THRESHOLD),
            lambda d: Term(LSE, axis=COLUMNS, scale=d.scale),
            lambda d: Term(SUM, Score.SQUARE, SAME, COLUMNS, above=d.column_offset + 0.013, guide=Guide.THRESHOLD),
            lambda d: Term(MEAN, above=-0.007, below=d.row_scale + 0.013, scale=d.scale, guide=Guide.THRESHOLD),
            lambda d: Term(
                COUNT, Score.SQUARE, DIFFERENT, offset=9.1, above=d.row_offset + 0.013, guide=Guide.THRESHOLD
            ),
            lambda d: Term(LSE, above=-0.263),
            guide=_features,
        ),
        grid=True,
    ),
    Program(
        "guide_weight",
        _reduce(
            lambda d: Term(SUM, Score.SOFTPLUS, scale=d.row_scale, offset=d.row_offset, guide=Guide.WEIGHT),
            lambda d: Term(LSE, scale=d.scale, weight=d.column_weight.detach(), guide=Guide.WEIGHT),
            lambda d: Term(LSE, axis=COLUMNS, scale=d.scale, offset=d.column_offset, guide=Guide.WEIGHT),
            lambda d: Term(MEAN, mask=DIFFERENT, scale=d.scale, other_offset=d.column_offset, guide=Guide.WEIGHT),
            lambda d: Term(MEAN, axis=COLUMNS, scale=d.scale, guide=Guide.WEIGHT),
            guide=_overlaps,
            normalize=True,
        ),
    ),
    Program(
        "guide_logits",
        _reduce(
            lambda d: Term(MEAN, scale=d.scale, detach_weights=True, guide=Guide.LOGITS),
            lambda d: Term(
                MEAN,
                mask=DIFFERENT,
                axis=COLUMNS,
                weight=d.row_weight.detach(),
                detach_weights=True,
                guide=Guide.LOGITS,
            ),
            lambda d: Term(LSE, scale=d.scale),
            guide=_overlaps,
        ),
    ),
    Program(
        "guide_scalar",
        lambda d: (
            pair_sum(
                **d.pairs,
                guide=_overlaps(d),
                terms=[
                    Term(SUM, Score.SOFTPLUS, scale=d.scale, offset=d.bias, guide=Guide.WEIGHT),
                    Term(
                        SUM,
                        Score.SQUARE,
                        SAME,
                        COLUMNS,
                        scale=d.column_scale,
                        weight=d.row_weight.detach(),
                        guide=Guide.WEIGHT,
                    ),
                ],
            ),
        ),
    ),
    Program("no_gradient", _reduce(Term(COUNT, Score.SQUARE, SAME), Term(MOMENTS), Term(MAX))),
]

BY_NAME = {p.name: p for p in PROGRAMS}


def only(*names: str) -> list[Program]:
    return [BY_NAME[n] for n in names]


def on_sides(programs: list[Program]) -> list:
    """(program, side) parameters for pytest."""
    return [pytest.param(p, side, id=f"{p.name}-{side}") for p in programs for side in p.sides]
