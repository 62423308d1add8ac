"""Pairs drawn evenly over the range of distances."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..losses.problem import PairProblem
from ..random import draw_seed, integers
from ..reference import similarity_matrix
from ..rows import RowPanel, row_reduce
from ..terms import Mask, Reduction, Term
from .base import Miner


class UniformHistogramMiner(Miner):
    """Draws the same number of pairs from every interval of distances, of positives and of negatives.

    The range from the smallest to the largest distance of a kind is cut into `num_bins`; from each interval that
    holds pairs some are drawn with replacement. One pass counts, a few rows are computed again to name the pairs;
    counter-based random numbers: one seed, one result. pytorch-metric-learning's class: same constructor, same call.

    Args:
        num_bins: default 100.
        pos_per_bin, neg_per_bin: default 10.
        distance: LpDistance of normalised embeddings (default; p=2, power 1 or 2), CosineSimilarity or
            DotProductSimilarity.
        group: ranks whose batches are mined as one, as in `MetricLoss`; the selection is of all of them. Default: none.

    Returns:
        Index tensors (anchors, positives, anchors, negatives), interval by interval.

    Raises:
        ValueError: on numbers that are not positive, or another distance.

    Example:
        >>> import torch
        >>> from flashpair.miners import UniformHistogramMiner
        >>> miner = UniformHistogramMiner(num_bins=4, pos_per_bin=3, neg_per_bin=2)
        >>> [len(index) for index in miner(torch.eye(4), torch.tensor([0, 0, 1, 1]))]  # all distances are equal
        [3, 3, 2, 2]
    """

    def __init__(
        self,
        num_bins: int = 100,
        pos_per_bin: int = 10,
        neg_per_bin: int = 10,
        distance=None,
        collect_stats=None,
        group=None,
    ) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats, group=group)
        for name, value in (("num_bins", num_bins), ("pos_per_bin", pos_per_bin), ("neg_per_bin", neg_per_bin)):
            checks.count(name, value)
        self.num_bins, self.pos_per_bin, self.neg_per_bin = num_bins, pos_per_bin, neg_per_bin

    def select(self, problem: PairProblem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found: list[Tensor] = []
        for mask, draws in ((Mask.SAME, self.pos_per_bin), (Mask.DIFFERENT, self.neg_per_bin)):
            (moments,), _ = problem.reduce([Term(Reduction.MOMENTS, mask=mask)])
            found += self._drawn(problem, mask, draws, moments[3].min(), moments[4].max())
        return tuple(found)

    def _bin(self, s: Tensor, low: Tensor, high: Tensor) -> Tensor:
        width = (high - low).clamp_min(torch.finfo(s.dtype).tiny) / self.num_bins
        return ((s - low) / width).nan_to_num(0).floor().clamp(0, self.num_bins - 1).long()

    def _drawn(self, problem: PairProblem, mask: Mask, draws: int, low: Tensor, high: Tensor) -> list[Tensor]:
        def count(panel: RowPanel) -> list[Tensor]:
            keep = panel.same if mask == Mask.SAME else panel.different
            place = self._bin(panel.s, low, high)
            zeros = torch.zeros(len(panel.row), self.num_bins, dtype=torch.int64, device=place.device)
            return [zeros.scatter_add(1, place, keep.long())]

        geometry = problem.geometry
        how = {"similarity": geometry.similarity, "normalize": geometry.normalize}
        (counts,) = row_reduce(
            problem.x, problem.y, count, labels=problem.labels, ref_labels=problem.ref_labels, exclude=problem.exclude,
            **how,
        )  # fmt: skip
        ends = counts.cumsum(0)  # (B, bins): pairs of each interval up to and with a row
        (filled,) = ends[-1].nonzero(as_tuple=True)
        bins = filled.repeat_interleave(draws)
        draw = torch.arange(draws, device=bins.device).repeat(len(filled))
        rank = integers(draw_seed(), bins, draw, ends[-1][bins])
        row = torch.searchsorted(ends.T.contiguous()[bins], rank[:, None], right=True)[:, 0]
        within = rank - (ends[row, bins] - counts[row, bins])
        return [row, self._columns(problem, mask, row, bins, within, low, high)]

    def _columns(self, problem, mask, rows, bins, within, low, high) -> Tensor:
        """The `within`-th column of each row that falls into an interval, in the order that counted them."""
        labels = problem.labels if problem.ref_labels is None else problem.ref_labels
        y = problem.x if problem.y is None else problem.y
        found = [torch.empty(0, dtype=torch.long, device=rows.device)]
        step = max((1 << 20) // max(y.shape[0], 1), 1)
        for first in range(0, len(rows), step):
            at = slice(first, first + step)
            row = rows[at]
            s = similarity_matrix(problem.x[row], y, problem.geometry.similarity, problem.geometry.normalize)
            same = problem.labels[row, None] == labels[None, :]
            excluded = row if problem.y is None else None if problem.exclude is None else problem.exclude[row]
            keep = same if mask == Mask.SAME else ~same
            if excluded is not None:
                keep = keep & (torch.arange(y.shape[0], device=row.device)[None, :] != excluded[:, None])
            inside = keep & (self._bin(s, low, high) == bins[at, None])
            # Rounding may move a pair over an interval's edge between the two computations: stay in range.
            order = inside.cumsum(1)
            target = torch.minimum(within[at, None] + 1, order[:, -1:])
            nearest = torch.where(order[:, -1:] > 0, (inside & (order == target)).to(torch.int8), keep.to(torch.int8))
            found.append(nearest.argmax(1))
        return torch.cat(found)
