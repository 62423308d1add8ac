"""Triplet margin loss over all, given or mined triplets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend_cpu, checks
from ..distributed.sharded import current
from ..formulas import TRIPLET, Average
from ..miners.selection import MinedTripletBand
from ..pairs import listed_loss, pair_similarity
from ..primitives import pair_reduce
from ..reference import similarity_matrix
from ..request import statistics_dtype
from ..rows import RowPanel
from ..terms import Mask, Reduction, Term
from .arguments import poisoned
from .geometry import Geometry, geometry_of
from .metric import MetricLoss
from .peer import AvgNonZeroReducer, LpDistance
from .positive_pairs import sums_over_positive_pairs
from .problem import PairProblem, all_pairs, check_call, pair_problem
from .ranks import FEW, Step, counts_below, soft_ranks, triplet_counts, triplet_sums
from .reducers import Rule, anchors_average, reduce_sums, reduce_values, reducer_rule, refuse
from .statistics import PairStatistics, moments, single
from .triplets import check_triplets_per_anchor, listed_triplets, random_triplets

#: Pairs × columns of a block where rows of both ends of a pair are compared.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class _Options:
    """What a triplet's loss is, and how the losses become one number."""

    margin: float
    swap: bool
    smooth: bool
    rule: Rule

    def losses(self, violation: Tensor) -> Tensor:
        return F.softplus(violation, threshold=40) if self.smooth else F.relu(violation)


def triplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    indices_tuple=None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin: float = 0.05,
    swap: bool = False,
    smooth_loss: bool = False,
    triplets_per_anchor="all",
    distance=None,
    reducer=None,
    return_stats: bool = False,
):
    """Function behind `TripletMarginLoss`."""
    check_call(embeddings, labels, indices_tuple, ref_emb, ref_labels)
    distance = LpDistance() if distance is None else distance
    geometry = geometry_of(distance)
    how = _Options(margin, swap, smooth_loss, reducer_rule(AvgNonZeroReducer() if reducer is None else reducer))
    if indices_tuple is None and triplets_per_anchor != "all":
        problem = pair_problem(embeddings, labels, None, ref_emb, ref_labels, distance)
        indices_tuple = random_triplets(labels, problem.ref_labels, problem.exclude, triplets_per_anchor)
    if isinstance(indices_tuple, MinedTripletBand) and not swap and not smooth_loss:
        band = indices_tuple
        if band.geometry == geometry and band.mined_from(embeddings, ref_emb):
            problem = PairProblem(embeddings, band.columns, geometry, band.labels, band.ref_labels, band.exclude)
            problem.anchor_labels, problem.measure = band.labels, return_stats
            return problem.finish(_of_rows(problem, how, band.low, band.high))
    if all_pairs(indices_tuple):
        problem = pair_problem(embeddings, labels, indices_tuple, ref_emb, ref_labels, distance)
        problem.measure = return_stats
        return problem.finish(_of_pairs(problem, how) if swap else _of_rows(problem, how))
    y = None if ref_emb is embeddings else ref_emb
    triplets = listed_triplets(indices_tuple, embeddings, embeddings if y is None else y)
    return _of_list(embeddings, y, labels, triplets, geometry, how, return_stats)


def _of_rows(problem: PairProblem, how: _Options, low: float | None = None, high: float | None = None) -> Tensor:
    """Over all triplets, or those with low < d_an - d_ap <= high, by sorted positives."""
    away, margin, rule = -problem.geometry.sign, how.margin, how.rule
    zeros_count = rule.low is None or rule.low < 0  # a triplet without a loss is one of those averaged
    least = low if rule.high is None else max(margin - rule.high, -torch.inf if low is None else low)
    most = margin - max(rule.low or 0.0, 0.0)
    closed = high is not None and high < most
    most = high if closed else most

    plain = least is None and high is None and most == margin

    def hinges(panel: RowPanel) -> list[Tensor]:
        if plain and panel.most <= FEW and not backend_cpu.at_hand(panel.s):
            position, valid = panel.members()
            limits = away * panel.s.gather(1, position) + margin
            sums = soft_ranks(panel, Mask.DIFFERENT, -limits, 1.0, Step.HINGE, sign=-away)
            if zeros_count:
                counts = panel.counts[1][:, None]
            else:
                counts = counts_below(panel, Mask.DIFFERENT, limits, sign=away)
            return [torch.where(valid, sums, 0.0).sum(1), (valid * counts).sum(1).to(sums.dtype)]
        count, total = triplet_sums(panel, away, least, most, closed)
        if zeros_count:
            return [margin * count + total, triplet_counts(panel, away, least, high, closed=True)]
        return [margin * count + total, count]

    def soft(panel: RowPanel) -> list[Tensor]:
        position, valid = panel.members()
        near, (positives, negatives) = away * panel.s.gather(1, position), panel.counts
        losses = soft_ranks(panel, Mask.DIFFERENT, -(near + margin), 1.0, Step.SOFTPLUS, sign=-away)
        return [torch.where(valid, losses, 0.0).sum(1), (positives * negatives).to(near.dtype)]

    if how.smooth:
        refuse(rule, "TripletMarginLoss with smooth_loss", bounds=True)
    sums, counts = problem.row_reduce(soft if how.smooth else hinges, "TripletMarginLoss")
    return reduce_sums(sums, counts.detach(), rule, problem.anchor_labels)


def _of_pairs(problem: PairProblem, how: _Options) -> Tensor:
    """Over all triplets with the nearer of d_an and d_pn, by rows of both ends of a block of positive pairs."""
    geometry, rule = problem.geometry, how.rule
    away = -geometry.sign
    y = problem.x if problem.y is None else problem.y
    column_labels = problem.labels if problem.ref_labels is None else problem.ref_labels
    if problem.measure:
        problem.reduce([])

    def losses(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        far = [
            away * similarity_matrix(ends, y, geometry.similarity, geometry.normalize)
            for ends in (problem.x[rows], y[columns])
        ]
        near = away * problem.similarity(rows, columns)
        keep = problem.labels[rows, None] != column_labels[None, :]
        if problem.exclude is not None:
            keep = keep & (problem.exclude[rows, None] != torch.arange(y.shape[0], device=y.device)[None, :])
        values = how.losses(near[:, None] - torch.minimum(*far) + how.margin)
        if rule.low is not None:
            keep = keep & ~(values.detach() <= rule.low)
        if rule.high is not None:
            keep = keep & ~(values.detach() >= rule.high)
        return torch.where(keep, values, 0.0).sum(1), keep.sum(1).to(values.dtype)

    step = max(_BLOCK_ELEMENTS // max(y.shape[0], 1), 1)
    sums, counts = sums_over_positive_pairs(problem, losses, step, symmetric=True)
    return reduce_sums(sums, counts, rule, problem.anchor_labels)


def _of_list(x: Tensor, y: Tensor | None, labels, triplets, geometry: Geometry, how: _Options, return_stats: bool):
    """Over listed triplets."""
    anchors, positives, negatives, valid = triplets
    options = {"similarity": geometry.similarity, "normalize": geometry.normalize}
    pairs = anchors.repeat(2), torch.cat([positives, negatives])
    average = anchors_average(how.rule)
    alone = average in (Average.ABOVE_ZERO, Average.SUM)  # what does not exist is not counted
    if alone and not (how.swap or return_stats or isinstance(how.margin, Tensor)) and current() is None:
        dtype = statistics_dtype(x)
        exist = torch.ones_like(anchors, dtype=dtype) if valid is None else valid.to(dtype)
        constants = average.value, geometry.sign, how.margin, how.smooth
        return poisoned(listed_loss(x, y, *pairs, TRIPLET, exist[None], constants, **options), x, y)
    both = pair_similarity(x, y, *pairs, **options)
    near, far = both.chunk(2)
    to_negative = far
    if how.swap:
        other = pair_similarity(x if y is None else y, None, positives, negatives, **options)
        far = torch.minimum(far, other) if geometry.sign < 0 else torch.maximum(far, other)
    losses = how.losses(geometry.sign * (far - near) + how.margin)
    labels = None if labels is None else labels[anchors]
    loss = poisoned(reduce_values(losses, how.rule, valid, labels), x, y)
    if not return_stats:
        return loss
    if valid is not None:
        return loss, PairStatistics(single(near, valid), single(to_negative, valid))
    spread = [
        pair_reduce(x, y, [Term(Reduction.MOMENTS)], pairs=(anchors, partners), **options)[0]
        for partners in (positives, negatives)
    ]
    return loss, PairStatistics(*map(moments, spread))


class TripletMarginLoss(MetricLoss):
    """Positives closer than negatives by a margin.

        loss = reduce_{(a,p,n)} [ d_ap - d_an + margin ]_+          (similarities: s_an - s_ap; smooth: softplus)

    Over all triplets without listing them: a row's positives are sorted, and each negative finds by bisection how many
    of them it violates, O(B N log P) (with `smooth_loss` O(B N P); with `swap` also P matrix products). Or over the
    triplets of `indices_tuple`: what a miner returned (`BatchHardMiner`: one a row, O(B·D) work; `TripletMarginMiner`:
    as all triplets), index tensors of triplets, or of pairs, which are joined by their anchors.
    pytorch-metric-learning's class: same constructor, same call.

    Args:
        margin: default 0.05.
        swap: use the positive-negative distance where it is smaller than the anchor-negative one.
        smooth_loss: softplus instead of the hinge.
        triplets_per_anchor: "all" (default), or how many random triplets of each anchor.
        **kwargs: see `MetricLoss`. Default distance: LpDistance of normalised embeddings; default reducer:
            AvgNonZeroReducer, over triplets.

    Raises:
        ValueError, TypeError: on a bad number, or an unsupported distance or reducer.

    Source: Weinberger, Saul, JMLR 2009; Schroff et al., "FaceNet", CVPR 2015, equation 2.

    Example:
        >>> import torch
        >>> from flashpair.losses import TripletMarginLoss
        >>> from flashpair.miners import BatchHardMiner
        >>> embeddings, labels = torch.eye(3), torch.tensor([0, 0, 1])
        >>> round(float(TripletMarginLoss()(embeddings, labels)), 4)
        0.05
        >>> round(float(TripletMarginLoss()(embeddings, labels, BatchHardMiner()(embeddings, labels))), 4)
        0.05
    """

    def __init__(
        self,
        margin: float = 0.05,
        swap: bool = False,
        smooth_loss: bool = False,
        triplets_per_anchor="all",
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        checks.number("margin", margin)
        check_triplets_per_anchor(triplets_per_anchor)
        self.margin = margin
        self.swap = swap
        self.smooth_loss = smooth_loss
        self.triplets_per_anchor = triplets_per_anchor

    def check_rule(self, rule: Rule) -> None:
        refuse(rule, "TripletMarginLoss", per_anchor=True)

    def get_default_distance(self):
        return LpDistance()

    def get_default_reducer(self):
        return AvgNonZeroReducer()

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        return triplet_margin_loss(
            embeddings, labels, indices_tuple, ref_emb, ref_labels,
            margin=self.margin, swap=self.swap, smooth_loss=self.smooth_loss,
            triplets_per_anchor=self.triplets_per_anchor, distance=self.distance, reducer=self.reducer,
            return_stats=return_stats,
        )  # fmt: skip
