"""Label-distributionally robust losses: the worst distribution over labels near the uniform one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..algebra import log_add_exp
from ..primitives import mine
from ..terms import Extreme, Reduction, Score, Term
from .logits import check_reduction, class_logits, reduce_rows
from .statistics import check_classes, class_statistics


def ldr_kl_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    margin: float = 0.0,
    bias: Tensor | None = None,
    normalize: bool = False,
    sample_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
) -> Tensor:
    """λ log 1/C Σ_j exp((f_j + c [j ≠ y] - f_y) / λ), f_j = <x, w_j> + b_j.

    λ = 1, c = 0 is cross-entropy - log C; λ → 0 the Crammer-Singer hinge.

    Args:
        x, weight, labels, bias, normalize, sample_weight, ignore_index, reduction: see `class_loss`.
        temperature: λ > 0. Default 1.
        margin: c >= 0. Default 0.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class Classification: Consistency,
    Robustness and Adaptivity", ICML 2023, equation 4. Its public code first divides softplus(f) by its mean.

    Example:
        >>> import torch
        >>> from flashpair.heads import ldr_kl_loss
        >>> round(float(ldr_kl_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([0]), margin=1.0)), 4)
        0.6201
    """
    checks.number("temperature", temperature, low=0.0, open_low=True)
    checks.number("margin", margin, low=0.0)
    logits = class_logits(
        x, weight, labels,
        bias=None if bias is None else bias / temperature, scale=1 / temperature, normalize=normalize,
        ignore_index=ignore_index,
    )  # fmt: skip
    gaps = F.softplus(logits.rivals + margin / temperature - logits.target, threshold=40)
    return reduce_rows(temperature * (gaps - math.log(logits.classes)), logits.valid, reduction, sample_weight)


def ldr_top_k_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    k: int = 5,
    temperature: float = 1.0,
    margin: float = 0.0,
    normalize: bool = False,
    sample_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
) -> Tensor:
    """max over p with p_j <= 1/k, Σ p = 1, of Σ_j p_j a_j - λ KL(p | uniform), a_j = f_j + c [j ≠ y] - f_y.

    With a sorted, Z_m = LSE_{j>m} a_j / λ and m the least with (1 - m/k) exp(a_{m+1} / λ - Z_m) <= 1/k,

        1/k Σ_{j<=m} a_j + λ m/k log k + λ M (Z_m - log M) - λ log C,    M = 1 - m/k

    in closed form. λ → 0 is the top-k hinge. Takes the k largest rivals of each row and a logsumexp of the rest. Rivals
    that tie exactly with the k-th count in the value; their share of the gradient goes to the k-th alone.

    Args:
        x, weight, labels, normalize, sample_weight, ignore_index, reduction: see `class_loss`.
        k: 1 to 63, and less than the number of classes. Default 5.
        temperature: λ > 0. Default 1.
        margin: c >= 0. Default 0.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class Classification", ICML 2023, section 3
    (the capped set); the closed form follows from its optimality conditions.

    Example:
        >>> import torch
        >>> from flashpair.heads import ldr_kl_loss, ldr_top_k_loss
        >>> x, weight, labels = torch.randn(4, 3), torch.randn(9, 3), torch.arange(4)
        >>> torch.allclose(ldr_top_k_loss(x, weight, labels, k=1), ldr_kl_loss(x, weight, labels), atol=1e-5)
        True
    """
    checks.embedding_pair(x, weight, ("x", "weight"))
    classes = weight.shape[0]
    checks.count("k", k)
    if not k < min(classes, 64):
        raise ValueError(f"k must be at most 63 and less than the number of classes, {classes}; got {k}")
    checks.number("temperature", temperature, low=0.0, open_low=True)
    checks.number("margin", margin, low=0.0)
    check_reduction(reduction)
    check_classes(labels, x, classes, missing=ignore_index)
    valid = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    own = torch.where(valid, labels, -1)
    (largest,) = mine(x, weight, [Extreme(k=k)], exclude=own, normalize=normalize)
    least = largest.values[:, -1]
    at_least = torch.nextafter(least, torch.full_like(least, -torch.inf))
    index = torch.cat([own[:, None], largest.indices], dim=1)
    listed, rest, tied = class_statistics(
        x, weight, own,
        [
            Term(Reduction.LOGSUMEXP, scale=1 / temperature, below=least),
            Term(Reduction.COUNT, scale=0.0, offset=1.0, above=at_least),
        ],
        index=index, normalize=normalize,
    )  # fmt: skip
    target, rivals = listed[:, 0], listed[:, 1:]
    shifted = (margin - target) / temperature
    # Rivals that tie with the k-th are not in `rest`.
    more = (tied - k).clamp_min(0)
    ties = torch.where(more > 0, more.clamp_min(1).log() + rivals[:, -1] / temperature, -torch.inf)
    rest = log_add_exp(rest, ties) + shifted
    a = torch.cat([rivals / temperature + shifted[:, None], torch.zeros_like(target)[:, None]], dim=1)
    a = a.sort(dim=1, descending=True).values  # a_j / λ
    tails = [log_add_exp(rest, a[:, k])]  # Z_k, and backwards Z_{k-1}, ..., Z_0
    for j in range(k - 1, -1, -1):
        tails.append(log_add_exp(tails[-1], a[:, j]))
    z = torch.stack(tails[:0:-1], dim=1)  # (B, k) Z_0 .. Z_{k-1}
    m = torch.arange(k, dtype=a.dtype, device=x.device)
    mass = 1 - m / k
    heads = torch.cat([torch.zeros_like(a[:, :1]), a[:, :k].cumsum(1)], dim=1)  # sums of the m largest
    values = heads[:, :k] / k + m / k * math.log(k) + mass * (z - mass.log())
    last = heads[:, k] / k + math.log(k)
    fits = mass.log() + a[:, :k].detach() - z.detach() <= -math.log(k)
    first = torch.where(fits.any(1), fits.to(torch.int8).argmax(1), k)
    chosen = torch.cat([values, last[:, None]], dim=1).gather(1, first[:, None])[:, 0]
    return reduce_rows(temperature * (chosen - math.log(classes)), valid, reduction, sample_weight)


class ALDRKLLoss(nn.Module):
    """LDR-KL with a temperature λ_i of each sample's own, which grows where its label is doubtful.

        f = <x, w> / m,   m the mean |<x, w>| of the row       λ ← λ₀ (1 - KL(softmax(f / λ) | uniform) / (α log C))
        loss = λ log 1/C Σ_j exp((f_j + c [j ≠ y] - f_y) / λ) - α log C / (2 λ₀) (λ - λ₀)²

    One fixed-point update of λ per call, without gradient; the softmax in it leaves the margin out. The public code
    adds 1e-5 to every probability there, which for 100,000 classes is as much as all of them: it is left out here.

    Args:
        num_samples: of the data set; `forward` gets the ids of its rows.
        margin: c >= 0. Default 0.1.
        lambda0: λ₀ > 0. Default 1.
        alpha: α >= 1, above 1 keeps λ positive. Default 2.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class Classification", ICML 2023, section 5
    and its public code.

    Example:
        >>> import torch
        >>> from flashpair.heads import ALDRKLLoss
        >>> loss = ALDRKLLoss(num_samples=100)
        >>> loss(torch.randn(2, 3), torch.randn(9, 3), torch.tensor([0, 8]), torch.tensor([41, 7])).shape
        torch.Size([])
    """

    def __init__(self, num_samples: int, margin: float = 0.1, lambda0: float = 1.0, alpha: float = 2.0) -> None:
        super().__init__()
        checks.count("num_samples", num_samples)
        checks.number("margin", margin, low=0.0)
        checks.number("lambda0", lambda0, low=0.0, open_low=True)
        checks.number("alpha", alpha, low=1.0)
        self.margin, self.lambda0, self.alpha = margin, lambda0, alpha
        self.register_buffer("lambdas", torch.full((num_samples,), lambda0))

    def forward(self, x: Tensor, weight: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            x: (B, D). weight: (C, D). labels: (B,) int64.
            ids: (B,) int64 in [0, num_samples), which sample each row is; λ of these is updated in training mode.

        Returns:
            0-d loss.
        """
        checks.embedding_pair(x, weight, ("x", "weight"))
        check_classes(labels, x, weight.shape[0])
        checks.indices("ids", ids, x.shape[0])
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.lambdas):
            raise ValueError(f"ids must be in [0, {len(self.lambdas)}); got {int(ids.min())} to {int(ids.max())}")
        log_classes = math.log(weight.shape[0])
        target, up, down = class_statistics(
            x, weight, labels, [Term(Reduction.SUM, Score.HINGE, scale=a) for a in (1.0, -1.0)]
        )
        mean = (up + down + target.abs()) / weight.shape[0]
        old = self.lambdas[ids].to(mean.dtype)
        with torch.no_grad():
            scale = 1 / (mean * old)
            terms = [Term(Reduction.SOFTMAX_MEAN, scale=scale), Term(Reduction.LOGSUMEXP, scale=scale)]
            own, average, rivals = class_statistics(x, weight, labels, terms)
            total = log_add_exp(rivals, scale * own)
            share = torch.exp(scale * own - total)
            divergence = log_classes - total + scale * (share * own + (1 - share) * average)
            new = self.lambda0 * (1 - divergence / (self.alpha * log_classes)) if log_classes else old
            if self.training:
                self.lambdas.index_copy_(0, ids, new.to(self.lambdas.dtype))
        scale = 1 / (mean * new)
        own, rivals = class_statistics(x, weight, labels, [Term(Reduction.LOGSUMEXP, scale=scale)])
        gaps = F.softplus(rivals + self.margin / new - scale * own, threshold=40)
        penalty = self.alpha * log_classes / (2 * self.lambda0) * (new - self.lambda0) ** 2
        return (new * (gaps - log_classes) - penalty).mean()
