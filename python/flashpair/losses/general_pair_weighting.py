"""General pair weighting: a loss that is given by its pair weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..rows import RowPanel
from .metric import MetricLoss
from .problem import PairProblem
from .reducers import reduce_values

Weight = Callable[[Tensor, Tensor], Tensor]


class GeneralPairWeightingLoss(MetricLoss):
    """Any pair-based loss, by the weights it puts on its pairs.

        loss_i = Σ_{n in N_i} w⁻_in s_in  -  Σ_{p in P_i} w⁺_ip s_ip,       weights constant in the gradient

    so that ∂loss_i/∂s_ip = -w⁺_ip and ∂loss_i/∂s_in = w⁻_in, which is how the paper takes every such loss apart. The
    weights of a row may depend on the whole row: a function sees similarities (b, n) of some rows with all columns and
    the mask (b, n) of those rows' positives, or negatives, and returns weights (b, n), of which the masked ones count.
    With distances the signs turn.

    Args:
        positive_weight: (similarities, mask of the positives) → w⁺ >= 0.
        negative_weight: (similarities, mask of the negatives) → w⁻ >= 0.
        **kwargs: see `MetricLoss`. Default distance: CosineSimilarity; default reducer: MeanReducer, over anchors.

    Raises:
        ValueError, TypeError: on something that is no function, an unsupported distance or reducer, or a given
            `indices_tuple`.

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019,
    equations 3-5.

    Example:
        Multi-similarity is the case w⁺ = e^{-α (s - λ)} / (1 + Σ_P e^{-α (s - λ)}), and likewise w⁻:

        >>> import torch
        >>> from flashpair.losses import GeneralPairWeightingLoss, MultiSimilarityLoss
        >>> def soft(slope):
        ...     def weight(s, mask):
        ...         e = torch.where(mask, torch.exp(slope * (s - 0.5)), 0.0)
        ...         return e / (1 + e.sum(1, keepdim=True))
        ...     return weight
        >>> x, labels = torch.randn(8, 4, dtype=torch.float64, requires_grad=True), torch.arange(8) % 3
        >>> by_weights = GeneralPairWeightingLoss(soft(-2.0), soft(50.0))
        >>> gradients = [torch.autograd.grad(f(x, labels), x)[0] for f in (by_weights, MultiSimilarityLoss())]
        >>> torch.allclose(*gradients)
        True
    """

    def __init__(self, positive_weight: Weight, negative_weight: Weight, **kwargs) -> None:
        super().__init__(**kwargs)
        for name, value in (("positive_weight", positive_weight), ("negative_weight", negative_weight)):
            if not callable(value):
                raise TypeError(f"{name} must be a function of similarities and a mask; got {type(value).__name__}")
        self.positive_weight, self.negative_weight = positive_weight, negative_weight

    def loss_of(self, problem: PairProblem) -> Tensor:
        def formula(panel: RowPanel) -> list[Tensor]:
            total = 0.0
            for mask, weight, sign in (
                (panel.same, self.positive_weight, -1),
                (panel.different, self.negative_weight, 1),
            ):
                found = weight(panel.s.detach(), mask)
                if found.shape != panel.s.shape:
                    shapes = tuple(panel.s.shape), tuple(found.shape)
                    raise ValueError(f"a weight function must return shape {shapes[0]} as its input; got {shapes[1]}")
                total = total + sign * torch.where(mask, found.detach() * panel.s, 0.0).sum(1)
            return [problem.geometry.sign * total]

        (losses,) = problem.row_reduce(formula, "GeneralPairWeightingLoss")
        return reduce_values(losses, self.rule(), labels=problem.anchor_labels)
