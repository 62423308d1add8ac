"""The spherical family: losses of the own logit, the sum and the sum of squares of all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..pairs import pair_similarity
from ..panels import product
from ..request import statistics_dtype
from .cross_entropy import logits_loss
from .formula import Formula
from .logits import ClassLogits, class_logits
from .statistics import check_classes


class SphericalFormula(Formula):
    """Base: a loss of the logit, the mean and the variance of a row's logits."""

    extras = ("sum", "spread")

    def moments(self, logits: ClassLogits) -> tuple[Tensor, Tensor]:
        """(mean (B,), population variance (B,)) of all logits of each row."""
        mean = logits.sum / logits.classes
        # `spread` counts from the mean without its gradient, which there is 0.
        own = (logits.logit - mean.detach()) ** 2
        return mean, (logits.extras["spread"] + own) / logits.classes


class SphericalZLoss(SphericalFormula):
    """softplus(a (b - ζ_y)) / a of the standardised logit ζ_y = (z_y - μ) / σ; blind to shift and scale of the logits.

    Not the squared-logsumexp "z-loss" of language models, which is `CrossEntropy(z_loss=)`.

    Args:
        a: > 0. Default 1.
        b: default 0.

    Raises:
        TypeError, ValueError: on an `a` that is not positive.

    Source: de Brébisson, Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
    Spherical Family", 2016, equation 6.

    Example:
        >>> import torch
        >>> from flashpair.heads import SphericalZLoss, class_loss
        >>> x, weight = torch.tensor([[3.0, 1.0]]), torch.eye(2)
        >>> [round(float(class_loss(x, weight, torch.tensor([y]), formula=SphericalZLoss())), 4) for y in (0, 1)]
        [0.3133, 1.3133]
    """

    def __init__(self, a: float = 1.0, b: float = 0.0) -> None:
        super().__init__()
        checks.number("a", a, low=0.0, open_low=True)
        checks.number("b", b)
        self.a, self.b = a, b

    def forward(self, logits: ClassLogits) -> Tensor:
        mean, variance = self.moments(logits)
        flat = variance == 0
        deviation = torch.where(flat, 1.0, variance).sqrt()
        z = torch.where(flat, 0.0, (logits.logit - mean) / deviation)
        return F.softplus(self.a * (self.b - z), threshold=40) / self.a


class TaylorSoftmax(SphericalFormula):
    """-log p_y of p_j ∝ 1 + z_j + z_j² / 2.

    Source: de Brébisson, Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family", ICLR
    2016, section 3.2.

    Example:
        >>> import torch
        >>> from flashpair.heads import TaylorSoftmax, class_loss
        >>> round(float(class_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([0]), formula=TaylorSoftmax())), 4)
        0.6931
    """

    def forward(self, logits: ClassLogits) -> Tensor:
        mean, variance = self.moments(logits)
        z = logits.logit
        total = logits.classes * (1 + mean + (variance + mean**2) / 2)
        return total.log() - (1 + z + z**2 / 2).log()


class SphericalSoftmax(SphericalFormula):
    """-log p_y of p_j ∝ z_j² + ε.

    Args:
        epsilon: ε > 0. Default 1e-3.

    Raises:
        TypeError, ValueError: on an ε that is not positive.

    Source: de Brébisson, Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family", ICLR
    2016, section 3.1.

    Example:
        >>> import torch
        >>> from flashpair.heads import SphericalSoftmax, class_loss
        >>> x, weight = torch.tensor([[3.0, 1.0]]), torch.eye(2)
        >>> round(float(class_loss(x, weight, torch.tensor([0]), formula=SphericalSoftmax())), 3)
        0.105
    """

    def __init__(self, epsilon: float = 1e-3) -> None:
        super().__init__()
        checks.number("epsilon", epsilon, low=0.0, open_low=True)
        self.epsilon = epsilon

    def forward(self, logits: ClassLogits) -> Tensor:
        mean, variance = self.moments(logits)
        total = logits.classes * (variance + mean**2 + self.epsilon)
        return total.log() - (logits.logit**2 + self.epsilon).log()


# --- without a pass over rows × classes -------------------------------------------------------------------------------


class _Gram(torch.autograd.Function):
    """Mean (D,) and centred Gram matrix Σ_j (w_j - w̄)(w_j - w̄)ᵀ (D, D) of the class weights, in blocks of classes."""

    @staticmethod
    def forward(ctx, weight, normalize, step):
        blocks = weight.split(step)
        mean = sum(_units(block, normalize)[0].sum(0) for block in blocks) / weight.shape[0]
        centred = (_units(block, normalize)[0] - mean for block in blocks)
        gram = sum(product(block.T, block) for block in centred)
        ctx.save_for_backward(weight, mean)
        ctx.static = normalize, step
        return mean, gram

    @staticmethod
    def backward(ctx, grad_mean, grad_gram):
        weight, mean = ctx.saved_tensors
        normalize, step = ctx.static
        gradient = torch.empty_like(weight)
        both = grad_gram + grad_gram.T
        for block, into in zip(weight.split(step), gradient.split(step), strict=True):
            units, norms = _units(block, normalize)
            found = product(units - mean, both) + grad_mean / weight.shape[0]
            if norms is not None:
                found = (found - units * (units * found).sum(1, keepdim=True)) / norms
            into.copy_(found)
        return gradient, None, None


def _units(block: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    rows = block.to(statistics_dtype(block))
    if not normalize:
        return rows, None
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)
    return rows / norms, norms


def spherical_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    formula: SphericalFormula | None = None,
    scale: float | Tensor = 1.0,
    normalize: bool = False,
    gram: bool | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
) -> Tensor:
    """A loss of the spherical family, in O(C D² + B D²) where that is less than O(B C D).

    The variance of a row's logits is x̂ᵀ Q x̂ / C with the centred Gram matrix Q of the class weights, so nothing
    cancels. The same losses in `class_loss` and `ClassHead` stream over the classes.

    Args:
        x: (B, D) float32, float64, bfloat16 or float16.
        weight: (C, D) of the same dtype.
        labels: (B,) int64 in [0, C), or `ignore_index`.
        formula: `SphericalZLoss` (default), `TaylorSoftmax`, `SphericalSoftmax`.
        scale: number or 0-d tensor.
        normalize: cosines.
        gram: the Gram path or the streaming one. Default: Gram where B > D.
        sample_weight, ignore_index, reduction: see `class_loss`.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Vincent, de Brébisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015, section 3: the Gram matrix. Weights stay as they are here, for any optimiser.

    Example:
        >>> import torch
        >>> from flashpair.heads import spherical_loss
        >>> x, weight, labels = torch.randn(8, 3), torch.randn(20, 3), torch.arange(8)
        >>> by_gram, streamed = (spherical_loss(x, weight, labels, gram=gram) for gram in (True, False))
        >>> torch.allclose(by_gram, streamed)
        True
    """
    formula = SphericalZLoss() if formula is None else formula
    if not isinstance(formula, SphericalFormula):
        raise TypeError(f"formula must be a flashpair.heads.SphericalFormula; got {type(formula).__name__}")
    checks.embedding_pair(x, weight, ("x", "weight"))
    check_classes(labels, x, weight.shape[0], missing=ignore_index)
    if not (x.shape[0] > x.shape[1] if gram is None else gram):
        logits = class_logits(
            x, weight, labels, scale=scale, normalize=normalize, extras=formula.extras, ignore_index=ignore_index
        )
        return logits_loss(logits, formula, reduction, sample_weight)
    valid = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    own = torch.where(valid, labels, 0)
    rows = torch.arange(x.shape[0], device=x.device)
    similarity = pair_similarity(x, weight, rows, own, normalize=normalize)
    mean, centred = _Gram.apply(weight, normalize, max((1 << 22) // weight.shape[1], 1))
    units = x.to(mean.dtype)
    units = F.normalize(units, dim=1, eps=1e-12) if normalize else units
    target, average = scale * similarity, scale * product(units, mean[:, None]).squeeze(1)
    # The formulas add the own class back.
    spread = scale**2 * (product(units, centred) * units).sum(1) - (target - average.detach()) ** 2
    extras = {"sum": weight.shape[0] * average - target, "spread": spread}
    unknown = torch.full_like(target, torch.nan)
    logits = ClassLogits(
        target, unknown, 0.0, similarity, valid, torch.where(valid, labels, -1), weight.shape[0], extras=extras
    )
    return logits_loss(logits, formula, reduction, sample_weight)
