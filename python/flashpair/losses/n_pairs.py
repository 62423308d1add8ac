"""N-pairs loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import pair_similarity
from ..primitives import pair_reduce
from ..terms import Mask, Reduction, Term
from .metric import MetricLoss
from .peer import DotProductSimilarity
from .problem import PairProblem
from .reducers import reduce_values


class NPairsLoss(MetricLoss):
    """One pair of each class; the other classes' positives are the negatives.

        loss_k = log Σ_l e^{s(a_k, p_l)} - s(a_k, p_k)      over one positive pair (a_k, p_k) of each label

    namely the first in the order of rows, then columns. pytorch-metric-learning's class: same constructor, same call;
    its DotProductSimilarity normalises unless told otherwise. How many classes have a pair is read from the device.

    Args:
        **kwargs: see `MetricLoss`. Default distance: DotProductSimilarity; default reducer: MeanReducer, over pairs.

    Raises:
        ValueError, TypeError: on an unsupported distance or reducer, a call without labels, or `ref_emb`.

    Source: Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016, equation 8.

    Example:
        >>> import torch
        >>> from flashpair.losses import NPairsLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(NPairsLoss()(embeddings, labels)), 4)  # log 2
        0.6931
    """

    collapse = False

    def get_default_distance(self):
        return DotProductSimilarity()

    def loss_of(self, problem: PairProblem) -> Tensor:
        if problem.y is not None or problem.anchor_labels is None:
            raise ValueError("NPairsLoss needs labels and takes no ref_emb; got no labels, or a ref_emb")
        problem.reduce([])
        anchors, positives = self._pairs(problem)
        geometry = problem.geometry
        a, p = problem.x[anchors], problem.x[positives]
        own = torch.arange(a.shape[0], device=a.device)
        how = {"similarity": geometry.similarity, "normalize": geometry.normalize}
        (log_sum,) = pair_reduce(a, p, [Term(Reduction.LOGSUMEXP, scale=float(geometry.sign))], **how)
        losses = log_sum - geometry.sign * pair_similarity(a, p, own, own, **how)
        loss = reduce_values(losses, self.rule(), labels=problem.anchor_labels[anchors])
        return loss + 0.0 * problem.x.sum(dtype=loss.dtype)  # without any pair, still a function of the embeddings

    def _pairs(self, problem: PairProblem) -> tuple[Tensor, Tensor]:
        """The first positive pair of each label."""
        labels = problem.anchor_labels
        if problem.bounds:
            raise ValueError("indices_tuple must be index tensors for NPairsLoss: give a miner's as_tuple()")
        if problem.pairs is not None:
            anchors, positives = problem.pairs[Mask.SAME]
            ordered, order = labels[anchors].sort(stable=True)
            first = torch.ones_like(ordered, dtype=torch.bool)
            first[1:] = ordered[1:] != ordered[:-1]
            return anchors[order[first]], positives[order[first]]
        ordered, order = labels.sort(stable=True)
        same = ordered[1:] == ordered[:-1]
        starts = torch.ones_like(ordered, dtype=torch.bool)
        starts[1:] = ~same
        (at,) = (starts[:-1] & same).nonzero(as_tuple=True)
        return order[at], order[at + 1]
