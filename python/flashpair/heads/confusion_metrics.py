"""AnyLoss: one minus a differentiable confusion-matrix metric of a batch of binary scores."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks

METRICS = ("accuracy", "f_beta", "g_mean", "balanced_accuracy")


def any_loss(
    logits: Tensor, labels: Tensor, metric: str = "f_beta", *, beta: float = 1.0, sharpness: float = 73.0
) -> Tensor:
    """1 - metric of the batch, decisions made soft by a steep sigmoid of the probability.

        p = σ(logit),  ŷ = σ(L (p - 1/2)),  a = Σ y ŷ,  P = Σ y,  H = Σ ŷ

        accuracy           (n - P - H + 2a) / n
        f_beta             (1 + β²) a / (β² P + H)
        g_mean             sqrt(a / P · (n - H - P + a) / (n - P))
        balanced_accuracy  (a / P + (n - H - P + a) / (n - P)) / 2

    n is the number of rows of the batch; the public TensorFlow code takes that of the training set for three of the
    metrics, and the gradient of its hand-written G-mean is four times too large.

    Args:
        logits: (B,) floating point.
        labels: (B,) 0 or 1, of any dtype.
        metric: one of the four. Default "f_beta".
        beta: β > 0. Default 1.
        sharpness: L > 0. Default 73, of the paper.

    Returns:
        0-d loss. A metric that divides by an empty class counts 0 for it.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Han, Moniz, Chawla, "AnyLoss: Transforming Classification Metrics into Loss Functions", KDD 2024, sections
    3.2 and 3.3.

    Example:
        >>> import torch
        >>> from flashpair.heads import any_loss
        >>> logits, labels = torch.tensor([9.0, -9.0, 9.0]), torch.tensor([1, 0, 0])
        >>> [round(float(any_loss(logits, labels, m)), 3) for m in ("accuracy", "f_beta", "balanced_accuracy")]
        [0.333, 0.333, 0.25]
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() != 1:
        got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a 1-D floating-point tensor; got {got}")
    if not isinstance(labels, Tensor) or labels.shape != logits.shape:
        got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels must have shape {tuple(logits.shape)}; got {got}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}; got {metric!r}")
    checks.number("beta", beta, low=0.0, open_low=True)
    checks.number("sharpness", sharpness, low=0.0, open_low=True)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    y = labels.to(wide.dtype)
    decision = torch.sigmoid(sharpness * (torch.sigmoid(wide) - 0.5))
    n, positives, chosen, right = wide.shape[0], y.sum(), decision.sum(), (y * decision).sum()
    negatives = n - positives
    ratio = lambda top, bottom: top / torch.where(bottom == 0, 1.0, bottom)  # noqa: E731
    refused = negatives - chosen + right  # true negatives
    if metric == "accuracy":
        return 1 - (refused + right) / max(n, 1)
    if metric == "f_beta":
        return 1 - ratio((1 + beta**2) * right, beta**2 * positives + chosen)
    sensitivity, specificity = ratio(right, positives), ratio(refused, negatives)
    if metric == "balanced_accuracy":
        return 1 - (sensitivity + specificity) / 2
    product = sensitivity * specificity
    tiny = torch.finfo(product.dtype).tiny
    return 1 - torch.where(product > tiny, product.clamp_min(tiny).sqrt(), 0.0)  # the root has no slope at 0
