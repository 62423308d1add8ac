"""Triplet margin loss over given triplets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..miners.selection import MinedPairs, MinedTriplets, check_indices
from ..pairs import pair_similarity
from ..primitives import pair_reduce
from ..terms import Reduction, Term
from .arguments import poisoned
from .geometry import geometry_of
from .metric import MetricLoss
from .peer import AvgNonZeroReducer, LpDistance
from .problem import check_call
from .reducers import reduce_values, reducer_rule
from .statistics import PairStatistics, moments, single

_NEEDED = (
    "indices_tuple must be given: what BatchHardMiner or MultiSimilarityMiner returned, triplets (anchors, positives, "
    "negatives) or pairs (anchors, positives, anchors, negatives); TripletMarginLoss does not enumerate all triplets"
)


def join_pairs(indices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets of positive and negative pairs (a1, p, a2, n) that share their anchor; O(P + T) memory."""
    a1, p, a2, n = indices
    order = a2.argsort(stable=True)
    ordered = a2[order]
    first = torch.searchsorted(ordered, a1)
    count = torch.searchsorted(ordered, a1, right=True) - first
    positive = torch.repeat_interleave(torch.arange(a1.shape[0], device=a1.device), count)
    start = torch.repeat_interleave(count.cumsum(0) - count, count)
    within = torch.arange(positive.shape[0], device=a1.device) - start
    return a1[positive], p[positive], n[order[first[positive] + within]]


def _triplets(indices_tuple, x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(anchors, positives, negatives, which of them exist; None: all)."""
    if isinstance(indices_tuple, MinedTriplets):
        anchors = torch.arange(indices_tuple.positives.shape[0], device=x.device)
        found = indices_tuple.positives.clamp_min(0), indices_tuple.negatives.clamp_min(0)
        if columns.shape[0] > 0:
            return anchors, *found, indices_tuple.valid
        return anchors[:0], found[0][:0], found[1][:0], None
    if isinstance(indices_tuple, MinedPairs):
        if not indices_tuple.bounds:
            raise ValueError(_NEEDED)
        indices_tuple = indices_tuple.as_tuple()
    check_indices(indices_tuple, x.shape[0], columns.shape[0], x.device)
    return (*(join_pairs(indices_tuple) if len(indices_tuple) == 4 else indices_tuple), None)


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
    distance=None,
    reducer=None,
    return_stats: bool = False,
):
    """Function behind `TripletMarginLoss`."""
    check_call(embeddings, labels, indices_tuple, ref_emb, ref_labels)
    if indices_tuple is None:
        raise ValueError(_NEEDED)
    geometry = geometry_of(LpDistance() if distance is None else distance)
    y = None if ref_emb is embeddings else ref_emb
    anchors, positives, negatives, valid = _triplets(indices_tuple, embeddings, embeddings if y is None else y)
    how = {"similarity": geometry.similarity, "normalize": geometry.normalize}
    both = pair_similarity(embeddings, y, anchors.repeat(2), torch.cat([positives, negatives]), **how)
    near, far = both.chunk(2)
    to_negative = far
    if swap:
        other = pair_similarity(embeddings if y is None else y, None, positives, negatives, **how)
        far = torch.minimum(far, other) if geometry.sign < 0 else torch.maximum(far, other)
    violation = geometry.sign * (far - near) + margin
    losses = F.softplus(violation, threshold=40) if smooth_loss else F.relu(violation)
    rule = reducer_rule(AvgNonZeroReducer() if reducer is None else reducer)
    loss = poisoned(reduce_values(losses, rule, valid), embeddings, y)
    if not return_stats:
        return loss
    if valid is not None:
        return loss, PairStatistics(single(near, valid), single(to_negative, valid))
    spread = [
        pair_reduce(embeddings, y, [Term(Reduction.MOMENTS)], pairs=(anchors, partners), **how)[0]
        for partners in (positives, negatives)
    ]
    return loss, PairStatistics(*map(moments, spread))


class TripletMarginLoss(MetricLoss):
    """Positives closer than negatives by a margin, over given triplets.

        loss = reduce_{(a,p,n)} [ d_ap - d_an + margin ]_+          (similarities: s_an - s_ap; smooth: softplus)

    pytorch-metric-learning's class: same constructor, same call, but the triplets must be given as `indices_tuple`:
    what `BatchHardMiner` returned (one triplet a row, O(B·D) work), index tensors of triplets, or of pairs, which are
    joined by their anchors (as are those of `MultiSimilarityMiner`).

    Args:
        margin: default 0.05.
        swap: use the positive-negative distance where it is smaller than the anchor-negative one.
        smooth_loss: softplus instead of the hinge.
        triplets_per_anchor: only "all", all that are given.
        **kwargs: see `MetricLoss`. Default distance: LpDistance of normalised embeddings; default reducer:
            AvgNonZeroReducer, over triplets.

    Raises:
        ValueError, TypeError: on a bad number, an unsupported distance or reducer, or a call without `indices_tuple`.

    Source: Weinberger, Saul, JMLR 2009; Schroff et al., "FaceNet", CVPR 2015, equation 2.

    Example:
        >>> import torch
        >>> from flashpair.losses import TripletMarginLoss
        >>> from flashpair.miners import BatchHardMiner
        >>> embeddings, labels = torch.eye(3), torch.tensor([0, 0, 1])
        >>> mined = BatchHardMiner()(embeddings, labels)
        >>> round(float(TripletMarginLoss()(embeddings, labels, mined)), 4)
        0.05
    """

    def __init__(
        self,
        margin: float = 0.05,
        swap: bool = False,
        smooth_loss: bool = False,
        triplets_per_anchor: str = "all",
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        checks.number("margin", margin)
        if triplets_per_anchor != "all":
            raise ValueError(
                f'triplets_per_anchor must be "all" (of the given triplets); got {triplets_per_anchor!r}. '
                "Sample triplets with a miner and give them as indices_tuple"
            )
        self.margin = margin
        self.swap = swap
        self.smooth_loss = smooth_loss
        self.triplets_per_anchor = triplets_per_anchor

    def get_default_distance(self):
        return LpDistance()

    def get_default_reducer(self):
        return AvgNonZeroReducer()

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        return triplet_margin_loss(
            embeddings, labels, indices_tuple, ref_emb, ref_labels,
            margin=self.margin, swap=self.swap, smooth_loss=self.smooth_loss,
            distance=self.distance, reducer=self.reducer, return_stats=return_stats,
        )  # fmt: skip
