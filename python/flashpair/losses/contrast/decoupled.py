"""Decoupled contrastive learning: the positive leaves the denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...terms import Mask, Reduction, Term
from ..arguments import inverse_temperature
from ..two_views import MatchedLoss, TwoViews


class DCLLoss(MatchedLoss):
    """NT-Xent without the positive in the denominator, so that small batches learn as fast.

        l_i = LSE_{k: other samples} s_ik / T  -  s_i+ / T,    mean over the 2 B views

    lightly's class. The authors' code takes one view as anchors and adds log(1e-45) to the self pairs, which at T =
    0.01 is not small; here they do not exist. A batch of one sample has no negatives and the loss is -inf.

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 0.1.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a temperature that is not positive.

    Source: Yeh et al., "Decoupled Contrastive Learning", ECCV 2022, equation 6.

    Example:
        >>> import torch
        >>> from flashpair.losses import DCLLoss
        >>> round(float(DCLLoss(temperature=1.0)(torch.eye(2), torch.eye(2))), 4)  # log 2 - 1
        -0.3069
    """

    def __init__(self, temperature: float | Tensor = 0.1, group=None) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        self.temperature = temperature

    def positive_weights(self, similarity: Tensor) -> Tensor | float:
        """What the positives' logits are multiplied by; `similarity` (2 B,) of each view and its positive."""
        return 1.0

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        negatives = Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=inverse_temperature(self.temperature))
        rivals, similarity = TwoViews(first, second).reduce(negatives, Term(Reduction.SUM, mask=Mask.SAME))
        weights = self.positive_weights(similarity)
        return (rivals - weights * similarity / self.temperature).mean()


class DCLWLoss(DCLLoss):
    """`DCLLoss` whose positives weigh more the farther they are.

        w_i = 2 - B softmax_i( s_i+ / σ )

    Args:
        temperature, group: see `DCLLoss`.
        sigma: σ > 0. Default 0.5.
        detach_weights: no gradient through w, as lightly has it; the authors' code lets it through. Default True.

    Source: Yeh et al., 2022, section 3.3.

    Example:
        >>> import torch
        >>> from flashpair.losses import DCLLoss, DCLWLoss
        >>> x = torch.eye(3)  # all positives alike: every weight is 1
        >>> bool(torch.isclose(DCLWLoss()(x, x), DCLLoss()(x, x)))
        True
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, sigma: float = 0.5, detach_weights: bool = True, group=None
    ) -> None:
        super().__init__(temperature, group)
        checks.number("sigma", sigma, low=0.0, open_low=True)
        self.sigma, self.detach_weights = sigma, detach_weights

    def positive_weights(self, similarity: Tensor) -> Tensor:
        # Both views of a sample have the same positive pair: a softmax over 2 B is half that over B.
        weights = 2 - similarity.shape[0] * torch.softmax(similarity / self.sigma, 0)
        return weights.detach() if self.detach_weights else weights
