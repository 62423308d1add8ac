"""Dynamic soft margin loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..pairs import pair_similarity
from ..primitives import mine
from ..request import statistics_dtype
from ..rows import RowPanel
from ..terms import Extreme, Mask
from .geometry import require
from .metric import MetricLoss
from .peer import LpDistance
from .problem import PairProblem, all_pairs, check_call, pair_problem
from .ranks import sums_up_to
from .triplets import listed_triplets


class DynamicSoftMarginLoss(MetricLoss):
    """Weights each triplet by the share of recent triplets that were easier.

        l = d_ap - d_an,    loss = mean over triplets of  CDF[bin(l)] l

    CDF: cumulative sum of a moving histogram of l over `num_bins` nodes from `min_val` in steps of 2 |min_val| /
    num_bins, in which this batch enters first. With labels over all triplets, or those given; without labels the
    pairs are (embeddings[i], ref_emb[i]) and the negative the closest other row on either side. The histogram has no
    gradient.

    pytorch-metric-learning's class: same constructor, same call, same first value. Its histogram keeps the graph of the
    batch, so that the gradient of its first step has a second part and its second step raises; and it fails on l beyond
    the last node. The loss is one number: reducers do not change it.

    Args:
        min_val: default -2.
        num_bins: default 10.
        momentum: weight of the batch in the histogram. Default 0.01.
        **kwargs: see `MetricLoss`. The distance is LpDistance of normalised embeddings.

    Raises:
        ValueError, TypeError: on a bad number, an unsupported distance, or a call with neither labels nor `ref_emb`.

    Source: Zhang, Rusinkiewicz, "Learning Local Descriptors with a CDF-Based Dynamic Soft Margin", ICCV 2019, section
    4.

    Example:
        >>> import torch
        >>> from flashpair.losses import DynamicSoftMarginLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> float(DynamicSoftMarginLoss()(embeddings, labels))  # positives as far as negatives
        0.0
    """

    falls_back = False

    def __init__(self, min_val: float = -2.0, num_bins: int = 10, momentum: float = 0.01, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("min_val", min_val, high=0.0)
        checks.count("num_bins", num_bins, low=2)
        checks.number("momentum", momentum, low=0.0, high=1.0)
        self.min_val, self.num_bins, self.momentum = min_val, num_bins, momentum
        self.delta = 2 * abs(min_val) / num_bins
        self.register_buffer("hist_", torch.zeros(num_bins))

    def check_distance(self) -> None:
        require(self.distance, "DynamicSoftMarginLoss", (LpDistance,), normalized=True)

    def get_default_distance(self):
        return LpDistance()

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        if labels is None and indices_tuple is None:
            return self._of_counterparts(embeddings, ref_emb, return_stats)
        whole = all_pairs(indices_tuple)
        chosen = indices_tuple if whole or labels is None else None
        problem = pair_problem(embeddings, labels, chosen, ref_emb, ref_labels, self.distance)
        problem.measure = return_stats
        if whole:
            sums, counts = self._all(problem)
            return problem.finish(self._weighted(sums, counts))
        problem.reduce([])
        columns = embeddings if problem.y is None else problem.y
        a, p, n, valid = listed_triplets(indices_tuple, embeddings, columns)
        values = problem.similarity(a, p) - problem.similarity(a, n)
        return problem.finish(self._of_values(values if valid is None else values[valid]))

    def _of_counterparts(self, x: Tensor, y: Tensor | None, return_stats: bool) -> Tensor:
        if y is None or return_stats:
            raise ValueError(
                "labels must be given to DynamicSoftMarginLoss without ref_emb, or for return_stats; got None"
            )
        own = torch.arange(x.shape[0], device=x.device)
        check_call(x, own, None, y, own)
        if x.shape[0] != y.shape[0] or x.shape[0] < 2:
            shapes = tuple(x.shape), tuple(y.shape)
            raise ValueError(f"embeddings and ref_emb must have equal rows, at least 2, without labels; got {shapes}")
        problem = PairProblem(x, y, require(self.distance, "DynamicSoftMarginLoss", (LpDistance,)))
        how = {"similarity": problem.geometry.similarity, "normalize": True}
        nearest = [Extreme(Mask.ALL, largest=False)]
        (of_row,), (of_column,) = (mine(*sides, nearest, exclude=own, **how) for sides in ((x, y), (y, x)))
        by_row = pair_similarity(x, y, own, of_row.indices[:, 0], **how)
        by_column = pair_similarity(x, y, of_column.indices[:, 0], own, **how)
        return problem.finish(self._of_values(problem.similarity(own, own) - torch.minimum(by_row, by_column)))

    def _bin(self, values: Tensor) -> Tensor:
        return ((values.detach() - self.min_val) / self.delta).nan_to_num(0).floor().long().clamp(0, self.num_bins - 1)

    def _of_values(self, values: Tensor) -> Tensor:
        """The loss of single values."""
        place = self._bin(values)
        counts = torch.zeros(self.num_bins, dtype=values.dtype, device=values.device)
        sums = counts.index_add(0, place, values)
        return self._weighted(sums, counts.index_add(0, place, torch.ones_like(values)))

    def _all(self, problem: PairProblem) -> tuple[Tensor, Tensor]:
        """(num_bins,) sums and counts of l over all triplets."""
        edges = [self.min_val + self.delta * k for k in range(1, self.num_bins)]
        dtype, device = statistics_dtype(problem.x), problem.x.device
        edges = torch.tensor([-torch.inf, *edges], dtype=dtype, device=device)

        def formula(panel: RowPanel) -> list[Tensor]:
            position, valid = panel.members()
            near = panel.s.gather(1, position)
            # l >= edge where d_an <= d_ap - edge
            limits = torch.where(valid[:, :, None], near[:, :, None] - edges, -torch.inf)
            count, total = (v.view_as(limits) for v in sums_up_to(panel, Mask.DIFFERENT, limits.flatten(1)))
            total = torch.where(valid[:, :, None], count * near[:, :, None] - total, 0.0)
            count = torch.where(valid[:, :, None], count, 0.0)
            reached = torch.stack([total.sum((0, 1)), count.sum((0, 1))])
            inside = reached - F.pad(reached[:, 1:], (0, 1))
            return [inside[0], inside[1]]

        return problem.row_reduce(formula, "DynamicSoftMarginLoss", totals=2, per_member=self.num_bins)

    def _weighted(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The loss from sums and counts of each bin; moves the histogram."""
        with torch.no_grad():
            total = counts.sum()
            left = self.min_val + self.delta * torch.arange(self.num_bins, dtype=sums.dtype, device=sums.device)
            up = ((sums - counts * left) / self.delta).clamp(min=0)  # Σ of how far each is to the next node
            batch = counts - up + F.pad(up[:-1], (1, 0))
            batch[-1] += up[-1]  # beyond the last node
            self.hist_ = self.hist_.to(sums)
            momentum = torch.where(self.hist_.sum() != 0, self.momentum, 1.0)
            moved = (1 - momentum) * self.hist_ + momentum * batch
            moved = torch.where(total > 0, moved / moved.sum().clamp_min(torch.finfo(sums.dtype).tiny), self.hist_)
            self.hist_ = moved
        return (moved.cumsum(0) * sums).sum() / counts.sum().clamp_min(1)
