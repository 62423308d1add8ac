"""Losses against class means: centroid triplet and prototype triplet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..pairs import pair_similarity
from ..primitives import mine
from ..request import statistics_dtype
from ..terms import Extreme, Mask, Score, Similarity
from .metric import MetricLoss
from .peer import AvgNonZeroReducer, LpDistance
from .problem import PairProblem
from .reducers import Rule, pair_losses, reduce_pairs, reduce_values, refuse


def class_means(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sums (C, D), counts (C,), labels of the classes (C,), class of each row (B,)); deterministic."""
    classes, own, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    dtype = statistics_dtype(x)
    sums = torch.zeros(len(classes), x.shape[1], dtype=dtype, device=x.device)
    values = x.to(dtype)
    if x.is_cuda:
        sums = sums.index_put((own,), values, accumulate=True)
    else:
        sums = sums.index_add(0, own, values)
    return sums, counts.to(dtype), classes, own


class CentroidTripletLoss(MetricLoss):
    """Every anchor nearer to the mean of its class's other members than to any other class's mean.

        loss = reduce over (i, c ≠ y_i) of  [d(x_i, mean of P_i) - d(x_i, mean of class c) + margin]_+

    Rows without another of their class have no loss. Means are of the embeddings as given; the distance normalises
    them. With `ref_emb` the means are those of the references.

    Args:
        margin: default 0.05.
        **kwargs: see `MetricLoss`. Default distance: LpDistance of normalised embeddings; default reducer:
            AvgNonZeroReducer, over (anchor, class).

    Raises:
        ValueError, TypeError: on a margin that is not a number, an unsupported distance or reducer, or a given
            `indices_tuple`.

    Source: Wieczorek, Rychalska, Dąbrowski, "On the Unreasonable Effectiveness of Centroids in Image Retrieval", 2021,
    section 3.2. There is no public class of this name in pytorch-metric-learning 2.9 to compare with; which classes an
    anchor meets is taken to be all.

    Example:
        >>> import torch
        >>> from flashpair.losses import CentroidTripletLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(CentroidTripletLoss()(embeddings, labels)), 4)  # equally far from both means
        0.05
    """

    def __init__(self, margin: float = 0.05, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("margin", margin)
        self.margin = margin

    def get_default_distance(self):
        return LpDistance()

    def get_default_reducer(self):
        return AvgNonZeroReducer()

    def check_rule(self, rule: Rule) -> None:
        refuse(rule, "CentroidTripletLoss", per_anchor=True)

    def loss_of(self, problem: PairProblem) -> Tensor:
        if problem.pairs is not None or problem.bounds:
            raise ValueError("indices_tuple must be None for CentroidTripletLoss, whose partners are means; got one")
        problem.reduce([])
        x = problem.x.to(statistics_dtype(problem.x))
        refs, ref_labels = (problem.x, problem.labels) if problem.y is None else (problem.y, problem.ref_labels)
        if len(refs) == 0 or len(x) == 0:
            return 0.0 * (x.sum() + refs.sum())
        sums, counts, classes, _ = class_means(refs, ref_labels)
        means = sums / counts[:, None]
        own = torch.searchsorted(classes, problem.labels).clamp_max(max(len(classes) - 1, 0))
        members = torch.where(classes[own] == problem.labels, counts[own], 0.0)
        excluded = self._excluded(problem, refs, ref_labels)
        if excluded is not None:
            members = members - excluded[1]
            others = (sums[own] - excluded[1][:, None] * excluded[0]) / members.clamp_min(1)[:, None]
        else:
            others = means[own]
        geometry, rows = problem.geometry, torch.arange(x.shape[0], device=x.device)
        how = {"similarity": geometry.similarity, "normalize": geometry.normalize}
        some = members > 0
        near = pair_similarity(x, others, rows, rows, **how)
        away = -geometry.sign
        # Rows without a positive: a hinge at minus infinity.
        offset = torch.where(some, away * near + self.margin, -torch.inf)
        rows_of = PairProblem(x, means, geometry, problem.labels, classes, anchor_labels=problem.labels)
        part = pair_losses(self.rule(), Score.HINGE, Mask.DIFFERENT, -float(away), offset, growing=away < 0)
        if part.counted:  # all (anchor, class) of anchors with positives
            sums_, _ = rows_of.reduce(part.terms)
            count = (counts.shape[0] - 1.0 * (classes[own] == problem.labels)) * some
            return part.finish(sums_, [count], problem.labels)
        return reduce_pairs(rows_of, [part])

    @staticmethod
    def _excluded(problem: PairProblem, refs: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """The embedding that each row leaves out of its class, and 1 where it belongs to it."""
        if problem.y is None:
            return refs.to(statistics_dtype(refs)), refs.new_ones(len(refs), dtype=statistics_dtype(refs))
        if problem.exclude is None:
            return None
        at = problem.exclude.clamp_min(0)
        same = (problem.exclude >= 0) & (ref_labels[at] == problem.labels)
        return refs[at].to(statistics_dtype(refs)), same.to(statistics_dtype(refs))


class ProtoTripletLoss(MetricLoss):
    """Queries nearer to the mean of their class's support than to the nearest mean of another.

        loss = mean over queries q of  [d(q, c_{y_q}) - min_{c ≠ y_q} d(q, c) + margin]_+,    d = sqrt(‖q - c‖² + 1e-6)

    The call is `loss(queries, labels, ref_emb=support, ref_labels=support_labels)`; without `ref_emb` the batch is its
    own support. Embeddings are not normalised. A mean at distance 0 is never the nearest other. A query whose class has
    no support, or all of it, has loss 0.

    Args:
        margin: default 0.5.
        **kwargs: `reducer`. Default: MeanReducer, over queries.

    Raises:
        ValueError, TypeError: on a margin that is not a number, a distance, a miner, or a call without labels.

    Source: Mendez-Ruiz et al., "SuSana Distancia is all you need: Enforcing class separability in metric learning via
    two novel distance-based loss functions for few-shot image classification", 2023, as in the first author's code.

    Example:
        >>> import torch
        >>> from flashpair.losses import ProtoTripletLoss
        >>> support, labels = torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1])
        >>> queries = torch.tensor([[0.5], [1.0]])
        >>> round(float(ProtoTripletLoss()(queries, torch.tensor([0, 1]), ref_emb=support, ref_labels=labels)), 3)
        0.25
    """

    def __init__(self, margin: float = 0.5, **kwargs) -> None:
        if "distance" in kwargs:
            raise ValueError("distance must not be given to ProtoTripletLoss, which is defined with its own")
        super().__init__(**kwargs)
        checks.number("margin", margin)
        self.margin = margin

    def get_default_distance(self):
        return LpDistance(normalize_embeddings=False, power=2)

    def loss_of(self, problem: PairProblem) -> Tensor:
        if problem.pairs is not None or problem.bounds:
            raise ValueError("indices_tuple must be None for ProtoTripletLoss, whose partners are means; got one")
        problem.reduce([])
        refs, ref_labels = (problem.x, problem.labels) if problem.y is None else (problem.y, problem.ref_labels)
        if len(refs) == 0 or len(problem.x) == 0:
            return 0.0 * (problem.x.sum(dtype=statistics_dtype(refs)) + refs.sum())
        sums, counts, classes, _ = class_means(refs, ref_labels)
        means, x = sums / counts[:, None], problem.x.to(sums.dtype)
        own = torch.searchsorted(classes, problem.labels).clamp_max(max(len(classes) - 1, 0))
        rivals = [Extreme(Mask.DIFFERENT, largest=False, above=0.0)]
        how = {"similarity": Similarity.SQUARED_EUCLIDEAN}
        (nearest,) = mine(x, means, rivals, labels=problem.labels, ref_labels=classes, **how)
        rival = nearest.indices[:, 0]
        some = (classes[own] == problem.labels) & (rival >= 0)
        rows = torch.arange(x.shape[0], device=x.device)
        near, far = ((pair_similarity(x, means, rows, c, **how) + 1e-6).sqrt() for c in (own, rival.clamp_min(0)))
        losses = torch.where(some, F.relu(near - far + self.margin), 0.0)
        return reduce_values(losses, self.rule(), labels=problem.anchor_labels)
