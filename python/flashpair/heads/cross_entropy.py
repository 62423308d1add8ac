"""Softmax cross-entropy over classes, and the function behind every head."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..terms import Precision
from .formula import Formula
from .logits import ClassLogits, check_reduction, class_logits, reduce_rows
from .margins import Margin, check_margin, norms_of

CONVENTIONS = ("torch", "megatron")


class CrossEntropy(Formula):
    """Cross-entropy with label smoothing and the squared-logsumexp regulariser.

        l_i = (1 - ε) w_{y_i} (L_i - z_{i,y_i}) + ε / C  Σ_j w_j (L_i - z_ij) + λ L_i²,    L_i = LSE_j z_ij

    Args:
        label_smoothing: ε in [0, 1]. Default 0.
        convention: "torch", or "megatron", whose ε spreads over the C - 1 other classes: ε' = ε C / (C - 1).
        z_loss: λ >= 0 ("z-loss" of PaLM and ST-MoE). Default 0.

    Raises:
        TypeError, ValueError: on a number outside its range.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7;
    Chowdhery et al., "PaLM", 2022, section 5.

    Example:
        >>> import torch
        >>> from flashpair.heads import CrossEntropy, class_loss
        >>> x, weight, labels = torch.eye(2), torch.eye(2), torch.tensor([0, 1])
        >>> round(float(class_loss(x, weight, labels, formula=CrossEntropy(label_smoothing=0.1))), 4)
        0.3633
    """

    weighs_classes = True

    def __init__(self, label_smoothing: float = 0.0, convention: str = "torch", z_loss: float = 0.0) -> None:
        super().__init__()
        checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
        checks.number("z_loss", z_loss, low=0.0)
        if convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(map(repr, CONVENTIONS))}; got {convention!r}")
        self.label_smoothing, self.convention, self.z_loss = label_smoothing, convention, z_loss

    @property
    def extras(self) -> tuple[str, ...]:
        return ("weighted_sum",) if self.label_smoothing else ()

    def forward(self, logits: ClassLogits) -> Tensor:
        losses = logits.own_weight * logits.cross_entropy
        if self.label_smoothing:
            share = self.label_smoothing
            if self.convention == "megatron":
                share = share * logits.classes / max(logits.classes - 1, 1)
            spread = logits.total_weight * logits.lse - logits.weighted_sum
            losses = (1 - share) * losses + share / logits.classes * spread
        if self.z_loss:
            losses = losses + self.z_loss * logits.lse**2
        return losses


def class_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    formula: Formula | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    class_scale: Tensor | None = None,
    normalize: bool = False,
    softcap: float | None = None,
    margin: Margin | None = None,
    own_offset: Tensor | None = None,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    gradient_filter: float = 0.0,
    precision: Precision = Precision.IEEE,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """A loss over the logits z_ij = scale_i <x_i, w_j> + bias_j of a head, none of which is stored.

    Memory beyond the gradients is O((B + C) + B D) and the workspace; dW is written once.

    Args:
        x: (B, D) float32, float64, bfloat16 or float16.
        weight: (C, D) of the same dtype, a row per class.
        labels: (B,) int64 in [0, C), or `ignore_index`.
        formula: per-row loss of the logits. Default: `CrossEntropy()`.
        bias: (C,) or None.
        scale: number, 0-d tensor or (B,) tensor; the inverse of the temperature; differentiable. Default 1.
        class_scale: (C,) factors of the classes' similarities, or None; differentiable. Copies the weights.
        normalize: cosines instead of dot products, gradient through the norms. Default False.
        softcap: c > 0 of c tanh(z / c). Default: none.
        margin: a `Margin`: cosines times its scale, the own class's with the margin. Excludes bias, scale, class_scale,
            normalize, softcap and own_offset.
        own_offset: (B,) added to the logit of the own class. Default: none.
        class_weight: (C,) weights; the mean then divides by the weights of the rows' classes, as torch's does.
        sample_weight: (B,) factors of the rows' losses; the mean still divides by the number of rows.
        ignore_index: label of rows that count for nothing; None: there are none. Default -100.
        reduction: "mean", "sum" or "none". The mean without any row is 0.
        gradient_filter: see `class_statistics`. Default 0, exact.
        precision: arithmetic of float32 products on a GPU.
        max_workspace_bytes: bound on the scratch memory; default `flashpair.set_max_workspace_bytes`.

    Returns:
        0-d loss, or (B,) with "none", in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: on bad input, naming the argument, before any work.

    Example:
        >>> import torch
        >>> from flashpair.heads import class_loss
        >>> x, weight = torch.eye(2), torch.eye(2)
        >>> round(float(class_loss(x, weight, torch.tensor([0, 1]), scale=16.0, normalize=True)), 9)
        1.13e-07
    """
    formula = CrossEntropy() if formula is None else formula
    check_reduction(reduction)
    options = {
        "extras": formula.extras, "class_weight": class_weight, "ignore_index": ignore_index,
        "gradient_filter": gradient_filter, "precision": precision, "max_workspace_bytes": max_workspace_bytes,
    }  # fmt: skip
    if margin is None:
        logits = class_logits(
            x, weight, labels,
            bias=bias, scale=scale, class_scale=class_scale, normalize=normalize, softcap=softcap,
            own_offset=own_offset, **options,
        )  # fmt: skip
        return logits_loss(logits, formula, reduction, sample_weight)
    check_margin(margin, bias, scale, softcap, own_offset=own_offset, class_scale=class_scale)
    logits = margin.logits(x, weight, labels, **options)
    loss = logits_loss(logits, formula, reduction, sample_weight)
    added = margin.regularizer(norms_of(x))
    return loss if added is None else loss + reduce_rows(added, logits.valid, reduction)


def logits_loss(
    logits: ClassLogits, formula: Formula, reduction: str = "mean", sample_weight: Tensor | None = None
) -> Tensor:
    """The loss of logits that are at hand; arguments as in `class_loss`."""
    check_sample_weight(sample_weight, logits.target)
    losses = formula(logits)
    if logits.class_weight is None:
        return reduce_rows(losses, logits.valid, reduction, sample_weight)
    if not formula.weighs_classes:
        losses = logits.own_weight * losses
    total = (logits.own_weight * logits.valid).sum() if reduction == "mean" else None
    return reduce_rows(losses, logits.valid, reduction, sample_weight, total)


def check_sample_weight(value: Tensor | None, rows: Tensor) -> None:
    """(B,) floating point, or None.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if value is None:
        return
    checks.floating("sample_weight", value)
    if value.shape != rows.shape:
        raise ValueError(f"sample_weight must have shape ({rows.shape[0]},), one per row; got {tuple(value.shape)}")
