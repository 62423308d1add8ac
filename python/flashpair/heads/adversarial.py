"""Smooth adversarial comp-sum losses: robustness against a perturbed embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..pairs import pair_similarity
from ..terms import Reduction, Score, Term
from .comp_sum import CompSum
from .cross_entropy import logits_loss
from .logits import class_logits, reduce_rows
from .statistics import class_statistics


def smooth_adversarial_comp_sum_loss(
    x: Tensor,
    adversarial_x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tau: float = 1.0,
    rho: float = 1.0,
    nu: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Comp-sum loss of the margins over ρ, plus ν times how far a perturbation moves the margins.

        Φ_τ(Σ_{j≠y} exp(-(z_y - z_j) / ρ)) + ν ‖D(x') - D(x)‖₂,     D(x) = (z_y - z_j)_{j≠y},  z = x Wᵀ

    The norm is a sum of squares over the classes of the difference x' - x, streamed like all others. Finding x' (by
    projected gradients of this loss, say) is the caller's. Formula recalled from the paper, whose text was not at
    hand: UNVERIFIED; its theory wants ν >= sqrt(C - 1) / ρ, its experiments are said to use ρ = ν = 1.

    Args:
        x, adversarial_x: (B, D), the embedding of a sample and of its perturbation.
        weight: (C, D). labels: (B,) int64 in [0, C).
        tau: τ >= 0. Default 1.
        rho: ρ > 0. Default 1.
        nu: ν >= 0. Default 1.
        reduction: "mean", "sum" or "none".

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    section 5.

    Example:
        >>> import torch
        >>> from flashpair.heads import smooth_adversarial_comp_sum_loss
        >>> x, weight, labels = torch.randn(4, 3), torch.randn(9, 3), torch.arange(4)
        >>> loss = smooth_adversarial_comp_sum_loss(x, x, weight, labels)  # unmoved: cross-entropy
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(x @ weight.T, labels), atol=1e-5)
        True
    """
    checks.embedding_pair(x, adversarial_x, ("x", "adversarial_x"))
    if adversarial_x.shape != x.shape:
        raise ValueError(f"adversarial_x must have the shape of x, {tuple(x.shape)}; got {tuple(adversarial_x.shape)}")
    checks.number("rho", rho, low=0.0, open_low=True)
    checks.number("nu", nu, low=0.0)
    logits = class_logits(x, weight, labels, scale=1 / rho)
    moved = adversarial_x - x
    own = pair_similarity(moved, weight, torch.arange(x.shape[0], device=x.device), labels)
    _, squares = class_statistics(moved, weight, labels, [Term(Reduction.SUM, Score.SQUARE, offset=-own)])
    still = squares <= 0
    distance = torch.where(still, 0.0, torch.where(still, 1.0, squares).sqrt())  # no slope where nothing moved
    first = logits_loss(logits, CompSum(tau), reduction)
    return first + nu * reduce_rows(distance, logits.valid, reduction)
