"""Margins: what face-recognition heads do to the cosine of a row with its own class before the softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import checks
from .logits import ClassLogits, class_logits

GRADIENTS = ("exact", "straight_through")


def add_angle(cosine: Tensor, angle: float | Tensor, margin_grad: str = "exact", fallback: bool = True) -> Tensor:
    """cos(θ + m) of cosines cos θ, through cos θ cos m - sin θ sin m, finite gradients everywhere.

    Where θ + m > π the cosine would rise again; with `fallback` it is cos θ - m sin m there, else it is left as it is.
    At |cos θ| = 1 sin θ has no slope; its square is floored at the rounding of 1, so that gradients stay finite.

    Args:
        cosine: (B,)
        angle: m in radians, number or (B,).
        margin_grad: "exact"; or "straight_through": the margin moves the value and the gradient passes as if it were a
            constant, ∂cos(θ + m)/∂cos θ = 1, as in code that computes it without gradient.
        fallback: see above.

    Raises:
        ValueError: on an unknown `margin_grad`.

    Source: Deng et al., "ArcFace", CVPR 2019, section 3.1 and its public code.

    Example:
        >>> import math, torch
        >>> from flashpair.heads.margins import add_angle
        >>> round(float(add_angle(torch.tensor(0.5), math.pi / 6)), 6)
        0.0
    """
    check_margin_grad(margin_grad)
    trig = torch if isinstance(angle, Tensor) else math
    cos, sin = trig.cos(angle), trig.sin(angle)
    moved = cosine * cos - sine_of(cosine) * sin
    if fallback:
        moved = torch.where(cosine > -cos, moved, cosine - angle * sin)  # θ + m < π
    return passed(cosine, moved, margin_grad)


def multiply_angle(cosine: Tensor, factor: float, angle: float = 0.0) -> Tensor:
    """The falling function (-1)^k cos φ - 2k of φ = m θ + a, k = floor(φ / π), that continues cos φ beyond π.

    Args:
        cosine: (B,) cos θ.
        factor: m.
        angle: a in radians.

    Source: Liu et al., "SphereFace", CVPR 2017, equation 7.

    Example:
        >>> import math, torch
        >>> from flashpair.heads.margins import multiply_angle
        >>> round(float(multiply_angle(torch.tensor(math.cos(0.2)), 4.0)), 4), round(math.cos(0.8), 4)
        (0.6967, 0.6967)
    """
    phi = factor * torch.atan2(sine_of(cosine), cosine) + angle
    k = (phi.detach() / math.pi).floor()
    return (1 - 2 * (k % 2)) * torch.cos(phi) - 2 * k


def sine_of(cosine: Tensor) -> Tensor:
    """sin θ >= 0, its square floored at the rounding of 1: at |cos θ| = 1 it has no slope."""
    return (1 - cosine * cosine).clamp_min(torch.finfo(cosine.dtype).eps).sqrt()


def passed(cosine: Tensor, moved: Tensor, margin_grad: str) -> Tensor:
    """`moved`, with its own gradient or with that of `cosine`."""
    return cosine + (moved - cosine).detach() if margin_grad == "straight_through" else moved


def check_margin_grad(value: str) -> None:
    """One of `GRADIENTS`."""
    if value not in GRADIENTS:
        raise ValueError(f"margin_grad must be one of {', '.join(map(repr, GRADIENTS))}; got {value!r}")


def norms_of(x: Tensor) -> Tensor:
    """(B,) norms of the rows of x (B, D), in at least float32."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


def check_margin(margin: Margin, bias, scale: float | Tensor, softcap: float | None, **others: Tensor | None) -> None:
    """A margin, and nothing beside it that its logits do not have.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(margin, Margin):
        raise TypeError(f"margin must be a flashpair.heads.Margin; got {type(margin).__name__}")
    if bias is not None or softcap is not None or isinstance(scale, Tensor) or scale != 1.0:
        raise ValueError("margin excludes bias, softcap and scale: its logits are its own scale times cosines")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"margin excludes {name}: its logits are its own scale times cosines")


class Margin(nn.Module):
    """Base: changes the cosines (B,) of rows with their own classes; the logits are `scale` times the cosines.

    Args:
        scale: s > 0, number or 0-d tensor.

    `forward(cosine, norms, labels)` gets (B,) cosines, the norms (B,) of the embeddings and the labels (B,).
    """

    def __init__(self, scale: float | Tensor = 64.0) -> None:
        super().__init__()
        checks.temperature("scale", scale)
        self.scale = scale

    def forward(self, cosine: Tensor, norms: Tensor, labels: Tensor) -> Tensor:
        """(B,) cosines with the margin."""
        return cosine

    def regularizer(self, norms: Tensor) -> Tensor | None:
        """(B,) added to the losses, or None."""
        return None

    def row_scale(self, x: Tensor) -> float | Tensor:
        """What the cosines are multiplied with: a number, () or (B,)."""
        return self.scale

    def logits(self, x: Tensor, weight: Tensor, labels: Tensor, **options) -> ClassLogits:
        """The logits of a head with this margin; options as in `class_logits`."""
        norms = norms_of(x)
        return class_logits(
            x, weight, labels, scale=self.row_scale(x), normalize=True,
            margin=lambda cosine: self(cosine, norms, labels), **options,
        )  # fmt: skip
