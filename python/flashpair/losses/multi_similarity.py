"""Multi-similarity loss."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..formulas import MULTI_SIMILARITY
from ..terms import Mask, Reduction, Term
from .metric import MetricLoss
from .peer import CosineSimilarity, MeanReducer
from .problem import pair_problem
from .reducers import reduce_anchors, reducer_rule


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    indices_tuple=None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    alpha: float = 2,
    beta: float = 50,
    base: float = 0.5,
    distance=None,
    reducer=None,
    return_stats: bool = False,
):
    """Function behind `MultiSimilarityLoss`."""
    distance = CosineSimilarity() if distance is None else distance
    problem = pair_problem(embeddings, labels, indices_tuple, ref_emb, ref_labels, distance)
    pull, push = -alpha * problem.geometry.sign, beta * problem.geometry.sign
    terms = [
        Term(Reduction.LOGSUMEXP, mask=Mask.SAME, scale=pull, offset=-pull * base),
        Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=push, offset=-push * base),
    ]
    rule, constants = reducer_rule(MeanReducer() if reducer is None else reducer), (alpha, beta)
    loss = reduce_anchors(problem, rule, terms, MULTI_SIMILARITY, constants=constants, statistics=return_stats)
    return problem.finish(loss)


class MultiSimilarityLoss(MetricLoss):
    """Soft hinges on the hardest positives and negatives of each anchor.

        loss_i = 1/α log(1 + Σ_{p in P_i} e^{-α (s_ip - λ)})  +  1/β log(1 + Σ_{n in N_i} e^{β (s_in - λ)})

    (with distances the signs turn). pytorch-metric-learning's class: same constructor, same call.

    Args:
        alpha: α > 0. Default 2.
        beta: β > 0. Default 50.
        base: λ. Default 0.5.
        **kwargs: see `MetricLoss`. Default distance: CosineSimilarity; default reducer: MeanReducer, over anchors.

    Raises:
        ValueError, TypeError: on a bad number, or an unsupported distance or reducer.

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019,
    equation 15.

    Example:
        >>> import torch
        >>> from flashpair.losses import MultiSimilarityLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(MultiSimilarityLoss()(embeddings, labels)), 4)  # log(1 + e) / 2
        0.6566
    """

    def __init__(self, alpha: float = 2, beta: float = 50, base: float = 0.5, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("alpha", alpha, low=0.0, open_low=True)
        checks.number("beta", beta, low=0.0, open_low=True)
        checks.number("base", base)
        self.alpha = alpha
        self.beta = beta
        self.base = base

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        return multi_similarity_loss(
            embeddings, labels, indices_tuple, ref_emb, ref_labels,
            alpha=self.alpha, beta=self.beta, base=self.base,
            distance=self.distance, reducer=self.reducer, return_stats=return_stats,
        )  # fmt: skip
