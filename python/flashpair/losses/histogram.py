"""Histogram loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import RowPanel
from ..terms import Mask
from .geometry import require
from .metric import MetricLoss
from .peer import CosineSimilarity, DotProductSimilarity
from .problem import PairProblem, all_pairs, pair_problem
from .ranks import row_histogram, soft_histogram
from .triplets import listed_triplets


class HistogramLoss(MetricLoss):
    """The probability that a random negative pair is more similar than a random positive one.

        loss = Σ_r p⁻_r Σ_{q <= r} p⁺_q

    with p⁺, p⁻ soft histograms, over nodes -1, -1 + Δ, ..., 1, of the cosines of all positive and all negative pairs
    that occur in a triplet, each unordered pair once. pytorch-metric-learning's class: same constructor, same call;
    it lists the triplets to find the pairs, and fails on a pair of equal embeddings, whose cosine is the last node.
    The loss is one number: reducers do not change it.

    Args:
        n_bins: number of intervals. Default 100.
        delta: Δ = 2 / n_bins, may be given instead.
        **kwargs: see `MetricLoss`. The distance is CosineSimilarity or DotProductSimilarity of normalised embeddings.

    Raises:
        ValueError, TypeError: on numbers that disagree, or an unsupported distance.

    Source: Ustinova, Lempitsky, "Learning Deep Embeddings with Histogram Loss", NIPS 2016, equations 1-6.

    Example:
        >>> import torch
        >>> from flashpair.losses import HistogramLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> float(HistogramLoss()(embeddings, labels))  # all cosines are 0
        1.0
    """

    def __init__(self, n_bins: int | None = None, delta: float | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        if n_bins is not None and delta is not None and delta != 2 / n_bins:
            raise ValueError(f"delta must be 2 / n_bins; got delta={delta} and n_bins={n_bins}")
        if delta is None:
            delta = 2 / (100 if n_bins is None else n_bins)
        if not 0 < delta <= 2 or abs(round(2 / delta) * delta - 2) > 1e-9:
            raise ValueError(f"delta must divide 2 into whole intervals; got {delta}")
        self.n_bins, self.delta = n_bins, delta

    def check_distance(self) -> None:
        require(self.distance, "HistogramLoss", (CosineSimilarity, DotProductSimilarity), normalized=True, powers=(1,))

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        whole = all_pairs(indices_tuple)
        chosen = indices_tuple if whole or labels is None else None
        problem = pair_problem(embeddings, labels, chosen, ref_emb, ref_labels, self.distance)
        problem.measure = return_stats
        if whole:
            return problem.finish(self.loss_of(problem))
        if problem.y is not None:
            raise ValueError("ref_emb must be None with indices_tuple for HistogramLoss; got both")
        problem.reduce([])
        anchors, positives, negatives, valid = listed_triplets(indices_tuple, embeddings, embeddings)
        if valid is not None:
            anchors, positives, negatives = anchors[valid], positives[valid], negatives[valid]
        return problem.finish(self._of_lists(problem, _once(anchors, positives), _once(anchors, negatives)))

    @property
    def _bins(self) -> int:
        return round(2 / self.delta)

    def _of_lists(self, problem: PairProblem, positive, negative) -> Tensor:
        found = []
        for rows, columns in (positive, negative):
            values = problem.similarity(rows, columns)[None]
            found.append(soft_histogram(values, torch.ones_like(values), -1.0, 1.0, self._bins)[0])
        return _overlap(*found)

    def loss_of(self, problem: PairProblem) -> Tensor:
        # A row with positives and negatives has triplets. A pair whose both ends have some is met twice.
        _, (positives, negatives) = problem.reduce([], counts=(Mask.SAME, Mask.DIFFERENT))
        anchor = (positives > 0) & (negatives > 0)
        own = problem.y is None

        def formula(panel: RowPanel, anchor_row: Tensor, anchors: Tensor) -> list[Tensor]:
            once = 1 / (1.0 + anchors[panel.column].to(panel.s.dtype)) if own else None
            nodes = (row_histogram(panel, m, -1.0, 1.0, self._bins, once) for m in (Mask.SAME, Mask.DIFFERENT))
            return [torch.where(anchor_row[:, None], v, 0.0).sum(0) for v in nodes]

        return _overlap(*problem.row_reduce(formula, "HistogramLoss", rows=[anchor], shared=[anchor], totals=2))


def _once(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Unordered pairs, each once."""
    pairs = torch.unique(torch.stack([torch.minimum(a, b), torch.maximum(a, b)]), dim=1)
    return pairs[0], pairs[1]


def _overlap(positive: Tensor, negative: Tensor) -> Tensor:
    share = [h / torch.where(h.sum() > 0, h.sum(), 1.0).detach() for h in (positive, negative)]
    return (share[1] * share[0].cumsum(0)).sum()
