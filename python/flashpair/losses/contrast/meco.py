"""MECO: maximum likelihood of an unnormalised model, its normaliser a moving average over batches of noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ...request import statistics_dtype
from ..arguments import poisoned
from ..group import InGroup, with_value_of
from ..two_views import nothing

_UNSEEN = -math.inf  # log of the average of nothing


class MECOLoss(InGroup, nn.Module):
    """Negative log-likelihood of an unnormalised density, whose normaliser is estimated over all batches of noise.

        g = mean_n p(x_n) / q(x_n),   x_n from a noise distribution q
        u <- (1 - γ) u + γ g;         the first batch: u = g
        value:     -mean_i log p(x_i)  +  log u
        gradient:  -∇ mean_i log p(x_i)  +  ∇g / u

    The call is `loss(data, noise)`, vectors of log p(x_i) and of log p(x_n) - log q(x_n): any model, no pairs. The
    average is kept as a logarithm, moves while training, and keeps its value at a batch that is not finite. Without
    data the first term is 0, without noise the second, and u stays.

    Args:
        gamma: γ in (0, 1], weight of the new batch. Default 0.9; 1 is the plain estimate from the batch.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`: data and noise are those of
            all its ranks, in any number. Default: none.

    Raises:
        TypeError, ValueError: on a number out of its range.

    Source: Jiang et al., "Learning Unnormalized Statistical Models via Compositional Optimization" (MECO), ICML 2023.
    Not verified: the paper's text and code were not at hand, and the formulas above are deduced from its summary.
    Assumed: a plain moving average, as in others' sketches of the algorithm, the default γ, which is that of
    `SogCLRLoss`, and the beginning with u = g. Not offered: an average that corrects for the model's step (STORM: u <-
    g + (1 - γ) (u - g of the model before the step at the same noise)). Nothing at hand says that the paper has it, and
    it would need the noise's ratios under the model before. Averaged gradients are an optimiser's momentum.

    Example:
        >>> import torch
        >>> from flashpair.losses import MECOLoss
        >>> loss, data = MECOLoss(gamma=0.5), torch.zeros(3)
        >>> round(float(loss(data, torch.zeros(2))), 4)  # u = 1
        0.0
        >>> round(float(loss(data, torch.full((2,), 3.0).log())), 4)  # u = (1 + 3) / 2
        0.6931
    """

    log_average: Tensor  # () log u; -inf: no batch yet
    row_groups = ()

    def __init__(self, gamma: float = 0.9, group=None) -> None:
        super().__init__(group=group)
        checks.number("gamma", gamma, low=0.0, high=1.0, open_low=True)
        self.gamma = gamma
        self.register_buffer("log_average", torch.tensor(_UNSEEN))

    def forward(self, data: Tensor, noise: Tensor) -> Tensor:
        """The loss of a batch; moves the average while training.

        Args:
            data: (B,) log p of samples, float32, float64, bfloat16 or float16.
            noise: (N,) log p - log q of samples of q, of the same dtype.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {"data": data, "noise": noise})
        for name, value in (("data", data), ("noise", noise)):
            _check_vector(name, value)
            checks.same_device("the loss's average", self.log_average, **{name: value})
        if data.dtype != noise.dtype:
            raise TypeError(f"data and noise must have one dtype; got {data.dtype} and {noise.dtype}")
        dtype = statistics_dtype(data)
        surrogate = nothing(data, noise)
        shown = surrogate.detach()
        if len(data):
            likelihood = data.to(dtype).mean()
            surrogate, shown = surrogate - likelihood, shown - likelihood.detach()
        if len(noise):
            log_g = noise.to(dtype).logsumexp(0) - math.log(len(noise))
            log_u = self._average(log_g.detach())
            surrogate = surrogate + torch.exp(log_g.detach() - log_u) * log_g
            shown = shown + log_u
        return poisoned(with_value_of(surrogate, shown), data, noise)

    @torch.no_grad()
    def _average(self, log_g: Tensor) -> Tensor:
        """log u after this batch, which is kept while training."""
        old = self.log_average.to(log_g.dtype)
        faded = old + (math.log1p(-self.gamma) if self.gamma < 1 else _UNSEEN)
        log_u = torch.where(old == _UNSEEN, log_g, torch.logaddexp(faded, log_g + math.log(self.gamma)))
        if self.training:
            self.log_average.copy_(torch.where(log_g.isfinite(), log_u, old))
        return log_u


def _check_vector(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dim() != 1:
        raise ValueError(f"{name} must have one dimension; got shape {tuple(value.shape)}")
    if value.dtype not in checks.DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, checks.DTYPES))}; got {value.dtype}")
