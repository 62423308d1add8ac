"""Distillation of a teacher's logits into a student's, neither of which is stored."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..primitives import pair_reduce
from ..request import statistics_dtype
from ..terms import Reduction, Score, Term
from .logits import check_reduction, reduce_rows
from .streaming import streamed


def _check(x, weight, teacher_x, teacher_weight, bias, teacher_bias, temperature, reduction) -> None:
    checks.embedding_pair(x, weight, ("x", "weight"))
    checks.embedding_pair(teacher_x, teacher_weight, ("teacher_x", "teacher_weight"))
    checks.same_device("x", x, teacher_x=teacher_x)
    if teacher_x.shape[0] != x.shape[0]:
        raise ValueError(f"teacher_x must have as many rows as x, {x.shape[0]}; got {teacher_x.shape[0]}")
    classes = weight.shape[0]
    if teacher_weight.shape[0] != classes:
        raise ValueError(f"teacher_weight must have the classes of weight, {classes}; got {teacher_weight.shape[0]}")
    for name, value in (("bias", bias), ("teacher_bias", teacher_bias)):
        if value is not None and tuple(value.shape) != (classes,):
            raise ValueError(f"{name} must have shape ({classes},), one per class; got {tuple(value.shape)}")
    checks.number("temperature", temperature, low=0.0, open_low=True)
    check_reduction(reduction)


def _both(rows: Sequence[Tensor], columns: Sequence[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """(B, c) student's and teacher's logits over the temperature."""
    x, u = rows[:2]
    weight, teacher_weight, bias, teacher_bias = columns
    return (x @ weight.T + bias) / temperature, (u @ teacher_weight.T + teacher_bias) / temperature


def _softmax_block(temperature, rows, columns, shared, block):
    s, t = _both(rows, columns, temperature)
    p = torch.exp(t - rows[2][:, None])
    return s.logsumexp(1), (p * (t - s)).sum(1)


def _binary_block(temperature, rows, columns, shared, block):
    s, t = _both(rows, columns, temperature)
    p = torch.sigmoid(t)
    # p log(p / q) + (1 - p) log((1 - p) / (1 - q)), q = sigmoid(s), through log-sigmoids
    return ((p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))).sum(1),)


def _operands(x, weight, teacher_x, teacher_weight, bias, teacher_bias) -> tuple[list[Tensor], list[Tensor]]:
    """([x, u], [W, V, b, a]) in one wide dtype, the teacher's without gradient, absent biases 0."""
    dtype = torch.promote_types(statistics_dtype(x), statistics_dtype(teacher_x))
    none = torch.zeros(weight.shape[0], dtype=dtype, device=x.device)
    bias = none if bias is None else bias
    teacher_bias = none if teacher_bias is None else teacher_bias
    teacher_x, teacher_weight, teacher_bias = (t.detach() for t in (teacher_x, teacher_weight, teacher_bias))
    return [t.to(dtype) for t in (x, teacher_x)], [t.to(dtype) for t in (weight, teacher_weight, bias, teacher_bias)]


def distillation_loss(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """T² KL(softmax(t_i / T) | softmax(s_i / T)), s = x Wᵀ + b the student's logits, t = u Vᵀ + a the teacher's.

    Two streams of logits at a time in blocks of classes (see `streamed`): bounded memory at the speed of dense code.

    Args:
        x: (B, D) of the student. weight: (C, D). bias: (C,) or None.
        teacher_x: (B, E). teacher_weight: (C, E). teacher_bias: (C,) or None; without gradient.
        temperature: T > 0. Default 1.
        reduction: "mean", "sum" or "none", over rows.

    Returns:
        0-d loss, or (B,).

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.

    Example:
        >>> import torch
        >>> from flashpair.heads import distillation_loss
        >>> x, weight = torch.randn(4, 3), torch.randn(9, 3)
        >>> abs(float(distillation_loss(x, weight, x, weight))) < 1e-6  # its own teacher
        True
    """
    _check(x, weight, teacher_x, teacher_weight, bias, teacher_bias, temperature, reduction)
    rows, columns = _operands(x, weight, teacher_x, teacher_weight, bias, teacher_bias)
    inverse = 1 / temperature
    with torch.no_grad():
        offset = None if teacher_bias is None else columns[3] * inverse
        (total,) = pair_reduce(rows[1], columns[1], [Term(Reduction.LOGSUMEXP, scale=inverse, other_offset=offset)])
    lse, cross = streamed(
        functools.partial(_softmax_block, temperature),
        [*rows, total],
        columns,
        [Reduction.LOGSUMEXP, Reduction.SUM],
        per_class=4,
    )
    losses = temperature**2 * (cross - total + lse)
    return reduce_rows(losses, torch.ones_like(losses, dtype=torch.bool), reduction)


def binary_distillation_loss(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 2.0,
    reduction: str = "mean",
) -> Tensor:
    """T² Σ_j KL(Bernoulli(σ(t_ij / T)) | Bernoulli(σ(s_ij / T))): every class a question of its own.

    Arguments, memory and errors as in `distillation_loss`; default T = 2. Sum over classes, mean over rows.

    Source: Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head", 2024,
    equation 4 ("BinaryKL"). Its public code clamps probabilities at 1e-8; log-sigmoids need none.

    Example:
        >>> import torch
        >>> from flashpair.heads import binary_distillation_loss
        >>> x, weight = torch.randn(4, 3), torch.randn(9, 3)
        >>> abs(float(binary_distillation_loss(x, weight, x, weight))) < 1e-6
        True
    """
    _check(x, weight, teacher_x, teacher_weight, bias, teacher_bias, temperature, reduction)
    rows, columns = _operands(x, weight, teacher_x, teacher_weight, bias, teacher_bias)
    (losses,) = streamed(functools.partial(_binary_block, temperature), rows, columns, [Reduction.SUM], per_class=4)
    return reduce_rows(temperature**2 * losses, torch.ones_like(losses, dtype=torch.bool), reduction)


def binary_gap_distillation_loss(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 2.0,
    reduction: str = "mean",
) -> Tensor:
    """T² Σ_j KL(Bernoulli(1/2) | Bernoulli(σ((s_ij - t_ij) / T))) = T² Σ_j log cosh((s_ij - t_ij) / (2T)).

    The loss of DHKD's auxiliary head ("BinaryKLNorm"). One fused pass: s - t = <[x, u], [w, -v]>, so it stores the
    two weights side by side, (C, D + E), and nothing of size B × C.

    Arguments and errors as in `distillation_loss`; default T = 2.

    Source: Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head", 2024,
    equation 5 and its public code.

    Example:
        >>> import torch
        >>> from flashpair.heads import binary_gap_distillation_loss
        >>> x, weight = torch.randn(4, 3), torch.randn(9, 3)
        >>> abs(float(binary_gap_distillation_loss(x, weight, x, weight))) < 1e-6
        True
    """
    _check(x, weight, teacher_x, teacher_weight, bias, teacher_bias, temperature, reduction)
    (s, u), (w, v, b, a) = _operands(x, weight, teacher_x, teacher_weight, bias, teacher_bias)
    scale = 1 / (2 * temperature)
    offset = None if bias is None and teacher_bias is None else scale * (b - a)
    (sums,) = pair_reduce(
        torch.cat([s, u], dim=1), torch.cat([w, -v], dim=1),
        [Term(Reduction.SUM, Score.LOG_COSH, scale=scale, other_offset=offset)],
    )  # fmt: skip
    return reduce_rows(temperature**2 * sums, torch.ones_like(sums, dtype=torch.bool), reduction)
