"""Supervised contrastive learning."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from .. import checks
from ..formulas import SUP_CON, Average
from ..terms import Mask, Reduction, Term
from .arguments import constant, inverse_temperature
from .metric import MetricLoss
from .peer import AvgNonZeroReducer, CosineSimilarity
from .problem import pair_problem
from .reducers import reduce_anchors, reducer_rule


class SupConReduction(Enum):
    """What happens to the anchors' losses."""

    REDUCER = "reducer"  # pytorch-metric-learning: the reducer decides; 0 for a batch of one class
    ALL_ANCHORS = "all_anchors"  # the authors' code: mean over all anchors, also those without positives, × T / base


def sup_con_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    indices_tuple=None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    reduction: SupConReduction = SupConReduction.REDUCER,
    base_temperature: float = 0.07,
    distance=None,
    reducer=None,
    return_stats: bool = False,
):
    """Function behind `SupConLoss`."""
    scale = inverse_temperature(temperature)
    distance = CosineSimilarity() if distance is None else distance
    problem = pair_problem(embeddings, labels, indices_tuple, ref_emb, ref_labels, distance)
    sign = problem.geometry.sign
    # A softmax does not depend on a shift, its rounding does: cosines count from 1 down, as distances do from 0.
    top = scale if sign > 0 and problem.geometry.normalize else 0.0
    logits = {"scale": sign * scale, "offset": -constant(top)}
    terms = [Term(Reduction.LOGSUMEXP, **logits), Term(Reduction.SUM, mask=Mask.SAME, **logits)]
    both = (Mask.SAME, Mask.DIFFERENT)
    if reduction == SupConReduction.ALL_ANCHORS:
        constants = float(Average.MEAN.value), 1.0
        mean = problem.loss(terms, SUP_CON, both, constants, return_stats)
        return problem.finish(temperature / base_temperature * mean)
    rule, constants = reducer_rule(AvgNonZeroReducer() if reducer is None else reducer), (0.0,)
    return problem.finish(reduce_anchors(problem, rule, terms, SUP_CON, both, constants, return_stats))


class SupConLoss(MetricLoss):
    """Each anchor's positives against all its pairs.

        loss_i = LSE_{j in P_i ∪ N_i} s_ij / T  -  1/|P_i| Σ_{p in P_i} s_ip / T

    pytorch-metric-learning's class: same constructor, same call. An anchor without positives has loss 0.

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 0.1.
        reduction: `SupConReduction.REDUCER` (default) or `ALL_ANCHORS`, the reduction of the authors' code.
        base_temperature: for `ALL_ANCHORS`, which multiplies by T / base_temperature. Default 0.07.
        **kwargs: see `MetricLoss`. Default distance: CosineSimilarity; default reducer: AvgNonZeroReducer, over
            anchors.

    Raises:
        ValueError, TypeError: on a temperature that is not positive, or an unsupported distance or reducer.

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2 (L_out).

    Example:
        >>> import torch
        >>> from flashpair.losses import SupConLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(SupConLoss()(embeddings, labels)), 4)  # log(3)
        1.0986
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: SupConReduction = SupConReduction.REDUCER,
        base_temperature: float = 0.07,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        checks.temperature("temperature", temperature)
        checks.number("base_temperature", base_temperature, low=0.0, open_low=True)
        if not isinstance(reduction, SupConReduction):
            raise TypeError(f"reduction must be a flashpair.losses.SupConReduction; got {reduction!r}")
        self.temperature = temperature
        self.reduction = reduction
        self.base_temperature = base_temperature

    def get_default_reducer(self):
        return AvgNonZeroReducer()

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        return sup_con_loss(
            embeddings, labels, indices_tuple, ref_emb, ref_labels,
            temperature=self.temperature, reduction=self.reduction, base_temperature=self.base_temperature,
            distance=self.distance, reducer=self.reducer, return_stats=return_stats,
        )  # fmt: skip
