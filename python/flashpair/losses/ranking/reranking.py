"""Reranking: a weight from one loss with the direction of another."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from ... import checks
from ...request import statistics_dtype


class RerankingWeight(Enum):
    """How much each document pulls or pushes; no gradient."""

    CONTRASTIVE = "contrastive"  # 1 - p of the positive, p of a negative: the softmax of s over the group
    SFT = "sft"  # 1 - the probability of the right answer, from the two answers' logits
    UNIFORM = "uniform"  # 1


class RerankingDirection(Enum):
    """What is pulled or pushed."""

    CONTRASTIVE = "contrastive"  # the logit of "yes"
    SFT = "sft"  # the logit of "yes" less that of "no"


class RerankingLoss(nn.Module):
    """`mean over queries of  -w_0 d_0 + Σ_i w_i d_i`: document 0 is relevant, the others are not; w without gradient.

    The gradient of contrastive training is CONTRASTIVE weights with CONTRASTIVE direction, that of supervised
    fine-tuning SFT with SFT; any pair may be mixed. The value itself is no bound of anything.

    Args:
        weight: see `RerankingWeight`. Default: CONTRASTIVE.
        direction: see `RerankingDirection`. Default: CONTRASTIVE.

    Raises:
        TypeError: on another choice.

    Source: "SFT or CL for reranking", arXiv 2510.14824, the unified reranking loss; read through a detailed note.

    Example:
        >>> import torch
        >>> from flashpair.losses import RerankingLoss
        >>> yes = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> RerankingLoss()(yes, torch.zeros(1, 2)).backward()
        >>> [round(g, 4) for g in yes.grad[0].tolist()]  # that of -log softmax
        [-0.2689, 0.2689]
    """

    def __init__(
        self,
        weight: RerankingWeight = RerankingWeight.CONTRASTIVE,
        direction: RerankingDirection = RerankingDirection.CONTRASTIVE,
    ) -> None:
        super().__init__()
        checks.member("weight", weight, RerankingWeight)
        checks.member("direction", direction, RerankingDirection)
        self.weight, self.direction = weight, direction

    def forward(self, yes: Tensor, no: Tensor) -> Tensor:
        """The loss of logits (queries, 1 + negatives) of both answers, the relevant document first.

        Returns:
            0-d loss in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        checks.embedding_pair(yes, no, ("yes", "no"))
        if yes.shape != no.shape or yes.shape[1] < 1:
            raise ValueError(f"yes and no must have one shape, one document at least; got {yes.shape} and {no.shape}")
        yes, no = (v.to(statistics_dtype(v)) for v in (yes, no))
        sign = torch.ones_like(yes)
        sign[:, 0] = -1
        value = yes if self.direction == RerankingDirection.CONTRASTIVE else yes - no
        return (self._weights(yes.detach(), no.detach(), sign) * sign * value).sum() / max(yes.shape[0], 1)

    def _weights(self, yes: Tensor, no: Tensor, sign: Tensor) -> Tensor:
        if self.weight == RerankingWeight.UNIFORM:
            return torch.ones_like(yes)
        if self.weight == RerankingWeight.SFT:
            return torch.sigmoid(sign * (yes - no))  # of the wrong answer
        p = yes.softmax(1)
        return torch.cat([1 - p[:, :1], p[:, 1:]], 1)
