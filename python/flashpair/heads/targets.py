"""Soft targets: probabilities over some or all classes, and regression as classification over bins."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..losses.arguments import constant
from ..panels import product
from ..terms import Reduction, Score, Term
from .logits import check_per_class, check_reduction, reduce_rows
from .statistics import check_listed, class_statistics


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Probabilities of a few classes per row.

    Args:
        index: (B, K) int64 classes, -1 for none.
        probability: (B, K) floating point; rows need not sum to 1.

    Example:
        >>> import torch
        >>> from flashpair.heads import SparseTargets, soft_cross_entropy
        >>> mixed = SparseTargets(torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.3]]))
        >>> round(float(soft_cross_entropy(torch.zeros(1, 2), torch.eye(2), mixed)), 4)
        0.6931
    """

    index: Tensor
    probability: Tensor


def soft_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: SparseTargets | Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    normalize: bool = False,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy against probabilities, Σ_j v_j t_ij (L_i - z_ij), L_i = LSE_j z_ij.

    Sparse targets cost O(B K D) beside the pass, dense ones two products with the targets that the caller holds:
    Σ_j t_ij z_ij is linear in the embedding, so the logits are not stored either way.

    Args:
        x: (B, D) float32, float64, bfloat16 or float16.
        weight: (C, D) of the same dtype.
        targets: `SparseTargets`, or probabilities (B, C), differentiable.
        bias, scale, normalize, sample_weight, reduction: see `class_loss`; the mean divides by the rows.
        softcap: c of c tanh(z / c); with sparse targets only.
        class_weight: (C,) weights v of the classes.

    Returns:
        0-d loss, or (B,) with "none".

    Raises:
        TypeError, ValueError: on bad input, naming the argument, before any work.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7.

    Example:
        >>> import torch
        >>> from flashpair.heads import soft_cross_entropy
        >>> x, weight, targets = torch.randn(4, 3), torch.randn(9, 3), torch.rand(4, 9)
        >>> ours = soft_cross_entropy(x, weight, targets)
        >>> torch.allclose(ours, torch.nn.functional.cross_entropy(x @ weight.T, targets), atol=1e-5)
        True
    """
    checks.embedding_pair(x, weight, ("x", "weight"))
    rows, classes = x.shape[0], weight.shape[0]
    check_reduction(reduction)
    check_per_class("class_weight", class_weight, classes)
    sparse = isinstance(targets, SparseTargets)
    if sparse:
        check_listed(targets.index, x, classes)
        if targets.probability.shape != targets.index.shape or not targets.probability.is_floating_point():
            got = f"{targets.probability.dtype} {tuple(targets.probability.shape)}"
            raise ValueError(
                f"targets.probability must be floating point of shape {tuple(targets.index.shape)}; got {got}"
            )
    elif not isinstance(targets, Tensor) or not targets.is_floating_point() or tuple(targets.shape) != (rows, classes):
        got = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be SparseTargets or floating point of shape ({rows}, {classes}); got {got}")
    if softcap is not None:
        checks.number("softcap", softcap, low=0.0, open_low=True)
        if not sparse:
            raise ValueError("softcap needs SparseTargets: capped logits are not linear in the embedding")
    shift = constant(scale) if normalize and softcap is None else 0.0
    cap = {} if softcap is None else {"score": Score.SOFTCAP, "constant": softcap}
    term = Term(Reduction.LOGSUMEXP, scale=scale, offset=-shift, other_offset=bias, **cap)
    nobody = torch.full((rows,), -1, dtype=torch.int64, device=x.device)
    index = targets.index if sparse else nobody[:, None][:, :0]
    similarity, lse = class_statistics(x, weight, nobody, [term], index=index, normalize=normalize)
    if sparse:
        per_row = scale[:, None] if isinstance(scale, Tensor) and scale.dim() == 1 else scale
        z = per_row * similarity
        safe = targets.index.clamp_min(0)
        if bias is not None:
            z = z + bias.to(z.dtype)[safe]
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        below = shift[:, None] if isinstance(shift, Tensor) and shift.dim() == 1 else shift
        share = torch.where(targets.index < 0, 0.0, targets.probability.to(z.dtype))
        share = share if class_weight is None else share * class_weight.to(z.dtype)[safe]
        losses = (share * (lse[:, None] - (z - below))).sum(1)
    else:
        share = targets.to(lse.dtype) if class_weight is None else targets.to(lse.dtype) * class_weight.to(lse.dtype)
        units = [F.normalize(t.to(lse.dtype), dim=1, eps=1e-12) if normalize else t.to(lse.dtype) for t in (x, weight)]
        expected = scale * (units[0] * product(share, units[1])).sum(1)
        if bias is not None:
            expected = expected + product(share, bias.to(lse.dtype)[:, None]).squeeze(1)
        losses = share.sum(1) * (lse + shift) - expected
    return reduce_rows(losses, torch.ones_like(losses, dtype=torch.bool), reduction, sample_weight)


# --- regression over bins --------------------------------------------------------------------------------------------


def two_hot(values: Tensor, centers: Tensor) -> SparseTargets:
    """Each value as the two bin centres around it, weighted so that their mean is the value.

    Args:
        values: (B,) floating point; clipped to the first and the last centre.
        centers: (C,) ascending, at least two.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Bellemare, Dabney, Munos, "A Distributional Perspective on Reinforcement Learning", ICML 2017, equation 7;
    Schrittwieser et al., "Mastering Atari, Go, Chess and Shogi by Planning with a Learned Model", 2020, appendix F.

    Example:
        >>> import torch
        >>> from flashpair.heads import two_hot
        >>> found = two_hot(torch.tensor([1.25]), torch.tensor([0.0, 1.0, 2.0]))
        >>> found.index.tolist(), found.probability.tolist()
        ([[1, 2]], [[0.75, 0.25]])
    """
    _check_values(values, "centers", centers)
    clipped = values.clamp(centers[0], centers[-1])
    upper = torch.searchsorted(centers, clipped.contiguous()).clamp(1, centers.shape[0] - 1)
    low, high = centers[upper - 1], centers[upper]
    share = (clipped - low) / (high - low)
    return SparseTargets(torch.stack([upper - 1, upper], dim=1), torch.stack([1 - share, share], dim=1))


def hl_gauss(values: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """Each value as a Gaussian's mass in the bins, (B, C), truncated to the support.

        t_ij = (Φ((e_{j+1} - v_i) / σ) - Φ((e_j - v_i) / σ)) / (Φ((e_C - v_i) / σ) - Φ((e_0 - v_i) / σ))

    Args:
        values: (B,) floating point; clipped to the support.
        edges: (C + 1,) ascending.
        sigma: σ > 0, in the unit of the values.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Imani, White, "Improving Regression Performance with Distributional Losses", ICML 2018, section 3;
    Farebrother et al., "Stop Regressing: Training Value Functions via Classification for Scalable Deep RL", ICML 2024,
    section 3.1.

    Example:
        >>> import torch
        >>> from flashpair.heads import hl_gauss
        >>> hl_gauss(torch.tensor([1.5]), torch.tensor([0.0, 1.0, 2.0, 3.0]), sigma=0.75).sum().item()
        1.0
    """
    _check_values(values, "edges", edges)
    checks.number("sigma", sigma, low=0.0, open_low=True)
    clipped = values.clamp(edges[0], edges[-1])
    cumulative = torch.erf((edges[None, :] - clipped[:, None]) / (math.sqrt(2) * sigma))
    return cumulative.diff(dim=1) / (cumulative[:, -1:] - cumulative[:, :1])


def _check_values(values: Tensor, name: str, support: Tensor) -> None:
    for label, value in (("values", values), (name, support)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 1:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{label} must be a 1-D floating-point tensor; got {got}")
    if support.shape[0] < 2:
        raise ValueError(f"{name} must hold at least two numbers; got {support.shape[0]}")
    if support.device.type == "cpu" and not bool((support.diff() > 0).all()):
        raise ValueError(f"{name} must be ascending; got {support.tolist()[:8]}")


class HLGaussHead(nn.Module):
    """Regression as classification: a softmax over bins of the target's range, trained on histograms.

    Args:
        embedding_size: D.
        low, high: range of the values.
        bins: C. Default 101.
        sigma: σ of `hl_gauss` in bin widths; 0: `two_hot`. Default 0.75.
        device, dtype: of the weights.

    Raises:
        TypeError, ValueError: on a bad argument, naming it.

    Source: Farebrother et al., "Stop Regressing: Training Value Functions via Classification for Scalable Deep RL",
    ICML 2024, section 3.1 (σ = 0.75 bin widths).

    Example:
        >>> import torch
        >>> from flashpair.heads import HLGaussHead
        >>> head = HLGaussHead(embedding_size=4, low=0.0, high=10.0)
        >>> loss = head(torch.randn(3, 4), torch.tensor([0.5, 3.0, 9.9]))
        >>> head.predict(torch.randn(3, 4)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        embedding_size: int,
        low: float,
        high: float,
        bins: int = 101,
        sigma: float = 0.75,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        checks.count("embedding_size", embedding_size)
        checks.count("bins", bins)
        checks.number("low", low)
        checks.number("high", high, low=low, open_low=True)
        checks.number("sigma", sigma, low=0.0)
        if bins < 2:
            raise ValueError(f"bins must be at least 2; got {bins}")
        self.sigma = sigma * (high - low) / bins
        self.linear = nn.Linear(embedding_size, bins, device=device, dtype=dtype)
        edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
        wide = torch.promote_types(self.linear.weight.dtype, torch.float32)
        self.register_buffer("edges", edges.to(self.linear.weight.device, wide))
        self.register_buffer("centers", ((edges[1:] + edges[:-1]) / 2).to(self.linear.weight.device, wide))

    def targets(self, values: Tensor) -> SparseTargets | Tensor:
        """The values (B,) as histograms."""
        values = values.to(self.edges.dtype)
        return two_hot(values, self.centers) if self.sigma == 0 else hl_gauss(values, self.edges, self.sigma)

    def forward(self, embeddings: Tensor, values: Tensor) -> Tensor:
        """Mean cross-entropy of the histograms of the values (B,) at the embeddings (B, D)."""
        x = embeddings.to(self.linear.weight.dtype)
        return soft_cross_entropy(x, self.linear.weight, self.targets(values), bias=self.linear.bias)

    def predict(self, embeddings: Tensor) -> Tensor:
        """(B,) mean of the bin centres under the softmax; (B, bins) logits are stored, bins being few."""
        x, weight, bias = (v.to(self.centers.dtype) for v in (embeddings, self.linear.weight, self.linear.bias))
        share = (product(x, weight.T) + bias).softmax(1)
        return product(share, self.centers[:, None]).squeeze(1)
