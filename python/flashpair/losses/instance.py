"""Instance loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..pairs import pair_similarity
from ..primitives import pair_reduce
from ..terms import Reduction, Term
from .geometry import require
from .metric import MetricLoss
from .peer import CosineSimilarity
from .problem import PairProblem
from .reducers import reduce_values


class InstanceLoss(MetricLoss):
    """Cross entropy over the batch, every sample a class of its own.

        loss_i = log Σ_j e^{γ s_ij} - γ s_{i,t_i}      over all j, i itself included;   t_i: rank of i's label

    pytorch-metric-learning's class: same constructor, same call, same target: the column whose number is the rank of
    the label among the batch's labels. It is i itself, as the definition has it, where labels are arange(B).

    Args:
        gamma: γ > 0. Default 64.
        **kwargs: see `MetricLoss`. The distance is CosineSimilarity; default reducer: MeanReducer, over anchors.

    Raises:
        ValueError, TypeError: on a bad number, an unsupported distance or reducer, a given `indices_tuple` or
        `ref_emb`.

    Source: Zheng et al., "Dual-Path Convolutional Image-Text Embeddings with Instance Loss", TOMM 2020, equation 3.

    Example:
        >>> import torch
        >>> from flashpair.losses import InstanceLoss
        >>> round(float(InstanceLoss(gamma=1)(torch.eye(2), torch.arange(2))), 4)  # log(1 + 1/e)
        0.3133
    """

    def __init__(self, gamma: float = 64, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("gamma", gamma, low=0.0, open_low=True)
        self.gamma = gamma

    def check_distance(self) -> None:
        require(self.distance, "InstanceLoss", (CosineSimilarity,))

    def loss_of(self, problem: PairProblem) -> Tensor:
        if problem.y is not None or problem.pairs is not None or problem.bounds:
            raise ValueError("indices_tuple and ref_emb must be None for InstanceLoss; got one")
        problem.reduce([])
        x = problem.x
        _, target = torch.unique(problem.labels, return_inverse=True)
        (log_sum,) = pair_reduce(
            x, None, [Term(Reduction.LOGSUMEXP, scale=self.gamma)], exclude_self=False, normalize=True
        )
        own = pair_similarity(x, None, torch.arange(x.shape[0], device=x.device), target, normalize=True)
        return reduce_values(log_sum - self.gamma * own, self.rule(), labels=problem.anchor_labels)
