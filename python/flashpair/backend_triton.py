"""Backend `triton`: the kernels of `flashpair.kernels`, loaded on first use; CPU tensors under Triton's interpreter."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from . import formulas
from .operands import unserved
from .request import Request

#: With more owners a formula is PyTorch's: its kernel is one program. Lists of triplets may be that long.
MAX_OWNERS = 1 << 17
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _import_failure() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken Triton must not break flashpair
        return f"triton cannot be imported ({type(error).__name__}: {error}); pip install triton"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def unavailable() -> list[str]:
    """Reasons against using Triton at all."""
    failure = _import_failure()
    if failure is not None:
        return [failure]
    if not torch.cuda.is_available() and not _interpreted():
        return ["no CUDA device is visible, and TRITON_INTERPRET=1 is not set"]
    return []


def why_not(x: Tensor) -> list[str]:
    """Reasons against embeddings like x (rows, D)."""
    reasons = []
    if x.device.type != "cuda" and not _interpreted():
        reasons.append(f"embeddings are on {x.device}; the kernels read cuda tensors (or set TRITON_INTERPRET=1)")
    if x.dtype == torch.float64:
        return [*reasons, "float64 is served by cuda, cpu and reference"]
    return reasons + unserved(x, DTYPES)


def _launchers():
    from .kernels import launch

    return launch


def stats(request: Request) -> tuple[Tensor, Tensor]:
    """Statistics: rows (R, B), columns (C, N), float32."""
    return _launchers().stats(request)


def _formula(name: str, rows: Tensor, columns: Tensor, counts: Tensor | None, constants: Sequence[float]):
    if rows.shape[1] > MAX_OWNERS:
        return formulas.FORMULAS[name].slopes(rows, columns, counts, constants)
    return _launchers().formula(name, rows, columns, counts, constants)


#: All of them, by one kernel each.
FORMULAS = {name: functools.partial(_formula, name) for name in formulas.FORMULAS}


def weights(request: Request, rows, columns, grad_rows, grad_columns, needs):
    """Gradients: dx (B, D), dy (N, D), and one per parameter."""
    return _launchers().weights(request, rows, columns, grad_rows, grad_columns, needs)


def sums(request: Request, needs):
    """Total () and its gradients, from one pass."""
    return _launchers().sums(request, needs)


def mine(request: Request) -> list[tuple[Tensor, Tensor]]:
    """Values (B, k) float32 and indices (B, k) int64 of each extreme."""
    return _launchers().mine(request)
