"""What the passes of the GPU backends do to rows of embeddings: norms before the pairs, gradients after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .request import statistics_dtype

#: Every tile's sides divide this.
MAX_BLOCK = 256
#: Smallest norm that `normalize` divides by.
EPSILON = 1e-12
_CHUNK_ELEMENTS = 1 << 22  # normalised at a time in float64


def padded_length(length: int) -> int:
    """Length that holds whole tiles of every configuration."""
    return -(-length // MAX_BLOCK) * MAX_BLOCK


def inverse_norms(x: Tensor) -> Tensor:
    """(rows,) float64: 1 / max(norm, 1e-12)."""
    return 1.0 / torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).clamp_min(EPSILON)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x (rows, D) divided by their norms, rounded once to the dtype of x."""
    inverse, out = inverse_norms(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    step = max(_CHUNK_ELEMENTS // max(x.shape[1], 1), 1)
    for first in range(0, x.shape[0], step):
        chunk = slice(first, first + step)
        out[chunk] = x[chunk].double() * inverse[chunk, None]
    return out


def norms(x: Tensor, normalize: bool, squared: bool) -> Tensor:
    """(2, padded rows) in the dtype of statistics: 1 / max(norm, 1e-12), and the squared norm after that division."""
    rows, dtype = x.shape[0], statistics_dtype(x)
    if not normalize and not squared:
        return torch.empty(2, 1, dtype=dtype, device=x.device)  # not read
    out = torch.zeros(2, padded_length(rows), dtype=dtype, device=x.device)
    if normalize:
        out[0, :rows] = inverse_norms(x)
    if squared:
        wide = x.to(dtype)
        wide = wide * out[0, :rows, None] if normalize else wide
        out[1, :rows] = (wide * wide).sum(1)
    return out


def gradient(
    d: Tensor,  # (rows, D) in the dtype of statistics: sum of weights times the other side
    operand: Tensor,  # (rows, D) as the GEMMs read it
    raw: Tensor,  # (rows, D)
    normalize: bool,
    weight_sums: Tensor | None,  # (rows,) for distances
    scale: Tensor | None,  # (1,)
) -> Tensor:
    """The gradient of one side: distances' own term, the scaling of the weights, and the normalisation undone."""
    dtype = d.dtype
    if weight_sums is not None:
        d = torch.addcmul(d, operand.to(dtype), weight_sums.to(dtype)[:, None], value=-1.0)
    if scale is not None:
        d = d / scale
    if normalize:
        inverse, wide = inverse_norms(raw)[:, None], raw.to(dtype)
        # The part along x is removed with x itself: a rounded unit vector would leave a multiple of its error.
        along = (wide * d).sum(1, keepdim=True, dtype=torch.float64)
        along = along / wide.square().sum(1, keepdim=True, dtype=torch.float64)
        # Rows below the smallest norm are divided by a constant, which has no gradient of its own.
        along = torch.where(inverse < 1.0 / EPSILON, along, 0.0)
        d = (d - wide * along.to(dtype)) * inverse.to(dtype)
    return d.to(raw.dtype)


@dataclass(frozen=True)
class Rowwise:
    """The functions of this module, for a backend that has kernels for them."""

    norms: Callable[[Tensor, bool, bool], Tensor] = norms
    unit_rows: Callable[[Tensor], Tensor] = unit_rows
    gradient: Callable[[Tensor, Tensor, Tensor, bool, Tensor | None, Tensor | None], Tensor] = gradient


TORCH = Rowwise()
