"""The signature of torch.nn.functional.linear_cross_entropy, and cross-entropy over sampled classes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from .cross_entropy import CrossEntropy, class_loss
from .logits import check_reduction
from .statistics import check_classes
from .targets import soft_cross_entropy


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: None = None,
) -> Tensor:
    """`cross_entropy(linear(input, linear_weight, linear_bias), target, ...)` without the logits; torch's signature.

    Args:
        input: (D,) or (N, D) float32, float64, bfloat16 or float16.
        linear_weight: (C, D) of the same dtype. torch's K-dimensional (C, d_1, ..., D) is not offered.
        target: class indices () or (N,) int64, or probabilities (C,) or (N, C) floating point.
        linear_bias: (C,) or None.
        weight: (C,) weights of the classes, or None.
        reduction: "mean", "sum" or "none". As in torch the mean over indices divides by the weights of their classes
            (NaN where every row is ignored), over probabilities by N.
        ignore_index: index of rows that count for nothing; None: -100. Not for probabilities.
        label_smoothing: in [0, 1].
        options: None: there are no chunks to choose.

    Returns:
        0-d loss, or () or (N,) with "none", in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: on bad input, naming the argument, before any work.

    Source: torch.nn.functional.linear_cross_entropy, torch 2.13.

    Example:
        >>> import torch
        >>> import flashpair
        >>> x, weight, target = torch.randn(4, 3), torch.randn(9, 3), torch.tensor([0, 8, -100, 2])
        >>> ours = flashpair.linear_cross_entropy(x, weight, target, label_smoothing=0.1)
        >>> dense = torch.nn.functional.cross_entropy(x @ weight.T, target, label_smoothing=0.1)
        >>> torch.allclose(ours, dense)
        True
    """
    if options is not None:
        raise ValueError(f"options must be None: no chunks are chosen here; got {options!r}")
    if not isinstance(input, Tensor) or input.dim() not in (1, 2):
        got = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
        raise ValueError(f"input must have shape (D,) or (N, D); got {got}")
    if not isinstance(linear_weight, Tensor) or linear_weight.dim() != 2:
        got = tuple(linear_weight.shape) if isinstance(linear_weight, Tensor) else type(linear_weight).__name__
        raise ValueError(f"linear_weight must have shape (C, D); got {got}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor; got {type(target).__name__}")
    check_reduction(reduction)
    checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    if input.dim() == 1:
        loss = linear_cross_entropy(
            input[None], linear_weight, target[None], linear_bias=linear_bias, weight=weight, reduction=reduction,
            ignore_index=ignore_index, label_smoothing=label_smoothing,
        )  # fmt: skip
        return loss[0] if reduction == "none" else loss
    checks.embedding_pair(input, linear_weight, ("input", "linear_weight"))
    if target.is_floating_point():
        if ignore_index is not None and ignore_index >= 0:
            raise ValueError(f"ignore_index must be None or negative with probabilities; got {ignore_index}")
        if label_smoothing:
            target = target * (1 - label_smoothing) + label_smoothing / linear_weight.shape[0]
        return soft_cross_entropy(
            input, linear_weight, target, bias=linear_bias, class_weight=weight, reduction=reduction
        )
    ignored = -100 if ignore_index is None else ignore_index
    losses = class_loss(
        input, linear_weight, target, formula=CrossEntropy(label_smoothing), bias=linear_bias, class_weight=weight,
        ignore_index=ignored, reduction="none" if reduction == "none" else "sum",
    )  # fmt: skip
    if reduction != "mean":
        return losses
    kept = target != ignored
    shares = kept.to(losses.dtype) if weight is None else torch.where(kept, weight[torch.where(kept, target, 0)], 0.0)
    return losses / shares.sum()


def sampled_class_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    classes: Tensor,
    *,
    log_q: Tensor | None = None,
    bias: Tensor | None = None,
    correct_positive: bool = True,
    **options,
) -> Tensor:
    """A loss over some of the classes, corrected for how likely each was to be sampled: z_ij - log q_j.

    Args:
        x: (B, D). weight: (C, D), of all classes. labels: (B,) int64, each in `classes`.
        classes: (S,) int64 ascending, the sample with all positives.
        log_q: (S,) log-probabilities (or log expected counts) of the samples, or None.
        bias: (C,) or None.
        correct_positive: subtract log q from the own class too. Default True.
        **options: see `class_loss`.

    Raises:
        TypeError, ValueError: on bad input, also where a label is not among the classes.

    Source: Jean et al., "On Using Very Large Target Vocabulary for Neural Machine Translation", ACL 2015, section 3;
    Bengio, Senécal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model",
    2008.

    Example:
        >>> import torch
        >>> from flashpair.heads import class_loss, sampled_class_loss
        >>> x, weight, labels = torch.randn(2, 3), torch.randn(9, 3), torch.tensor([1, 7])
        >>> everything = sampled_class_loss(x, weight, labels, torch.arange(9))
        >>> torch.allclose(everything, class_loss(x, weight, labels))
        True
    """
    checks.embedding_pair(x, weight, ("x", "weight"))
    ignored = options.get("ignore_index", -100)
    check_classes(labels, x, weight.shape[0], missing=ignored)
    checks.indices("classes", classes)
    if log_q is not None and log_q.shape != classes.shape:
        raise ValueError(f"log_q must have shape {tuple(classes.shape)}, one per sample; got {tuple(log_q.shape)}")
    valid = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored
    position = torch.searchsorted(classes, labels).clamp_max(max(classes.shape[0] - 1, 0))
    present = classes[position] == labels if classes.shape[0] else torch.zeros_like(valid)
    if labels.device.type != "cpu":
        torch._assert_async((present | ~valid).all())
    elif not bool((present | ~valid).all()):
        wrong = int(labels[valid & ~present][0])
        raise ValueError(f"classes must be ascending and hold the class of every row; {wrong} is not there")
    if classes.device.type == "cpu" and not bool((classes.diff() > 0).all()):
        raise ValueError("classes must be ascending, without repetition")
    offset = None if bias is None else bias[classes]
    if log_q is not None:
        offset = -log_q if offset is None else offset - log_q
    if log_q is not None and not correct_positive:
        options["own_offset"] = torch.where(valid, log_q[position], 0.0)
    own = position if ignored is None else torch.where(valid, position, ignored)
    return class_loss(x, weight[classes], own, bias=offset, **options)
