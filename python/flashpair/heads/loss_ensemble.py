"""EnsLoss: a new random convex loss in every step, through its gradient alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..random import normal
from .logits import reduce_rows


def ens_loss(
    margins: Tensor, *, power: float = 0.0, generator: torch.Generator | None = None, reduction: str = "mean"
) -> Tensor:
    """mean_i g_i z_i with random decreasing weights g as the gradient of a random calibrated loss at the margins z.

        r ~ N(0, 1)^B,  g = -BoxCox⁻¹_λ(r) sorted ascending, at least -1, given to the margins in ascending order,
        divided by z where z > 1 (superlinear tails are ruled out), minus 1e-6

    The value has no meaning, its gradient is the point: the same sort of margins, another draw in every call.

    Args:
        margins: (B,) (2y - 1) f for binary scores f; for classes `logits.target - logits.rivals` (log p / (1 - p)), an
            extension that the paper does not make.
        power: λ of the inverse Box-Cox transform. Default 0, the exponential.
        generator: of r; default torch's own.
        reduction: "mean", "sum" or "none".

    Returns:
        0-d loss, or (B,).

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification", ICML
    2025, algorithm 1 and its public code.

    Example:
        >>> import torch
        >>> from flashpair.heads import ens_loss
        >>> z = torch.tensor([-1.0, 2.0, 0.5], requires_grad=True)
        >>> ens_loss(z).backward()
        >>> bool((z.grad < 0).all()), z.grad.argmin().item()  # the worst margin is pushed hardest
        (True, 0)
    """
    if not isinstance(margins, Tensor) or not margins.is_floating_point() or margins.dim() != 1:
        got = f"{margins.dtype} {tuple(margins.shape)}" if isinstance(margins, Tensor) else type(margins).__name__
        raise TypeError(f"margins must be a 1-D floating-point tensor; got {got}")
    checks.number("power", power)
    with torch.no_grad():
        z = margins
        draw = normal(z, generator)
        if power == 0:
            weights = -torch.exp(draw)
        else:
            weights = -((1 + power * draw).clamp_min(0) ** (1 / power))
        weights = torch.empty_like(z).scatter_(0, z.argsort(), weights.sort().values.clamp_min(-1))
        weights = torch.where(z > 1, weights / z, weights) - 1e-6
    return reduce_rows(weights * margins, torch.ones_like(margins, dtype=torch.bool), reduction)
