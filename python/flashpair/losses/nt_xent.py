"""NT-Xent: every positive pair against the negatives of its anchor."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..terms import Mask, Reduction, Score, Term
from .arguments import inverse_temperature
from .metric import MetricLoss
from .peer import CosineSimilarity, MeanReducer
from .problem import pair_problem
from .reducers import pair_losses, reduce_pairs, reducer_rule


def nt_xent_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    indices_tuple=None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    distance=None,
    reducer=None,
    return_stats: bool = False,
):
    """Function behind `NTXentLoss`."""
    scale = inverse_temperature(temperature)
    distance = CosineSimilarity() if distance is None else distance
    problem = pair_problem(embeddings, labels, indices_tuple, ref_emb, ref_labels, distance, collapse=False)
    sign = problem.geometry.sign
    negatives = Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=sign * scale)
    (negatives,), _ = problem.reduce([negatives], statistics=return_stats)
    # Second pass: softplus(LSE - z) keeps the digits that log of a ratio loses.
    rule = reducer_rule(MeanReducer() if reducer is None else reducer)
    positives = pair_losses(rule, Score.SOFTPLUS, Mask.SAME, -sign * scale, negatives, growing=sign < 0)
    return problem.finish(reduce_pairs(problem, [positives]))


class NTXentLoss(MetricLoss):
    """Each positive pair against the negatives of its anchor; other positives take no part.

        loss = mean over positive pairs (i, p) of  softplus( LSE_{n in N_i} s_in / T  -  s_ip / T )

    which is `-log( e^{s_ip/T} / (e^{s_ip/T} + Σ_n e^{s_in/T}) )`. Two passes: the first gives the logsumexp over
    negatives, which the second takes as each row's offset. pytorch-metric-learning's class: same constructor, same
    call. Its own adds the smallest float to the ratio, so that its loss stops at about 87 in float32 and its gradient
    is lost there; this one does neither.

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 0.07.
        **kwargs: see `MetricLoss`. Default distance: CosineSimilarity; default reducer: MeanReducer, over positive
            pairs.

    Raises:
        ValueError, TypeError: on a temperature that is not positive, or an unsupported distance or reducer.

    Source: Sohn, NIPS 2016, equation 5 (one positive); Chen et al., "A Simple Framework for Contrastive Learning of
    Visual Representations", ICML 2020, equation 1.

    Example:
        >>> import torch
        >>> from flashpair.losses import NTXentLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(NTXentLoss()(embeddings, labels)), 4)  # log(1 + 2)
        1.0986
    """

    def __init__(self, temperature: float | Tensor = 0.07, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.temperature("temperature", temperature)
        self.temperature = temperature

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        return nt_xent_loss(
            embeddings, labels, indices_tuple, ref_emb, ref_labels,
            temperature=self.temperature, distance=self.distance, reducer=self.reducer, return_stats=return_stats,
        )  # fmt: skip
