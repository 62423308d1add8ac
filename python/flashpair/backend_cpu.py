"""Backend `cpu`: C++ on the CPU, vectorised and threaded; see `csrc/engine_cpu.h`.

float32 and float64 are served natively; bfloat16 and float16 embeddings are read as float32 (exactly), so their
results lose nothing but the rounding of their gradients.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from .request import GUIDE_COLUMNS, GUIDE_ROWS, HEADER, Request, count_slots, parameter_places, statistics_dtype
from .terms import Axis

MAX_FEATURES = 1 << 16


@functools.cache
def _load() -> str:
    """Load the extension once; the reason why not, or an empty string."""
    found = sorted(Path(__file__).parent.glob("_C*.so")) + sorted(Path(__file__).parent.glob("_C*.pyd"))
    if not found:
        return (
            "the C++ extension was not built; install a C++ compiler and run "
            "`FLASHPAIR_BUILD_NATIVE=1 pip install --force-reinstall --no-deps flashpair`"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"the C++ extension {found[0].name} does not load with torch {torch.__version__}: {error}"
    return ""


def unavailable() -> list[str]:
    reason = _load()
    return [reason] if reason else []


def why_not(x: Tensor) -> list[str]:
    reasons = []
    if x.device.type != "cpu":
        reasons.append(f"serves CPU tensors; got {x.device}")
    if x.shape[1] > MAX_FEATURES:
        reasons.append(f"serves at most {MAX_FEATURES} features; got {x.shape[1]}")
    return reasons


def isa() -> str:
    """Instruction set in use: portable, avx2 or avx512."""
    return torch.ops.flashpair_cpu.isa()


def release_workspace() -> int:
    return 0 if _load() else torch.ops.flashpair_cpu.release_workspace()


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(statistics_dtype(x)).contiguous()


def _directed(request: Request) -> bool:
    """A pair mask or excluded columns need not be symmetric: such a self-similarity runs as a rectangular problem."""
    return request.y is None and (request.pair_mask is not None or request.exclude is not None)


def _arguments(request: Request) -> list:
    """The flat arguments that all three native operators share, without the parameters."""
    x = _wide(request.x)
    y, ref_labels = request.y, request.ref_labels
    if _directed(request):
        y, ref_labels = x, request.labels
    contiguous = lambda t: None if t is None else t.contiguous()  # noqa: E731
    return [
        x, None if y is None else _wide(y), contiguous(request.labels), contiguous(ref_labels),
        contiguous(request.pair_mask), contiguous(request.exclude),
    ]  # fmt: skip


def _params(request: Request) -> list[Tensor]:
    dtype = statistics_dtype(request.x)
    return [p.detach().to(dtype).contiguous() for p in request.params]


def _spec(request: Request) -> list[int]:
    """The spec with a guide for the columns wherever the problem runs as a rectangular one."""
    if not _directed(request):
        return request.spec
    spec = list(request.spec)
    spec[GUIDE_COLUMNS] = spec[GUIDE_ROWS]
    return spec


def stats(request: Request) -> tuple[Tensor, Tensor]:
    """Statistics: rows (R, B), columns (C, N)."""
    b, n = request.shape
    dtype = statistics_dtype(request.x)
    row_slots, column_slots = count_slots(request.spec)
    rows = request.x.new_empty(row_slots, b, dtype=dtype)
    columns = request.x.new_empty(column_slots, n, dtype=dtype)
    flat = (_params(request), _spec(request), request.consts, request.max_workspace_bytes)
    torch.ops.flashpair_cpu.stats(*_arguments(request), *flat, rows, columns)
    return rows, columns


def _weights(request: Request, needs, statistics: list[Tensor], total: Tensor | None):
    b, n = request.shape
    dtype = statistics_dtype(request.x)
    empty = lambda *shape: torch.empty(shape, dtype=dtype)  # noqa: E731
    directed, absent = _directed(request), empty(0)
    dx = empty(b, request.x.shape[1]) if needs.x else absent
    dy = empty(n, request.x.shape[1]) if (needs.x if directed else needs.y) else absent
    gradients = [dx, dy]
    by_parameter: list[list[Tensor]] = [[] for _ in request.params]
    for axis, places in parameter_places(request.spec):
        owners, others = (b, n) if axis == Axis.ROWS else (n, b)
        # Of scale, offset, other_offset and weight; thresholds have none.
        for place, length in zip(places, (owners, owners, others, others), strict=False):
            wanted = place >= 0 and needs.params[place]
            gradients.append(empty(length) if wanted else absent)
            if wanted:
                by_parameter[place].append(gradients[-1])
    flat = (_params(request), _spec(request), request.consts, request.max_workspace_bytes)
    torch.ops.flashpair_cpu.weights(*_arguments(request), *flat, statistics, gradients, total)
    if directed and needs.x:
        dx += dy
    dparams = []
    for parameter, parts in zip(request.params, by_parameter, strict=True):
        if not parts:
            dparams.append(None)
            continue
        if parameter.dim() == 0:  # one number for all owners of all terms
            parts = [(torch.cat(parts) if len(parts) > 1 else parts[0]).sum(dtype=torch.float64)]
        dparams.append(functools.reduce(torch.add, parts))
    return dx.to(request.x.dtype), dy.to(request.x.dtype), dparams


def weights(request: Request, rows: Tensor, columns: Tensor, grad_rows: Tensor, grad_columns: Tensor, needs):
    """Gradients of the statistics: dx, dy, dparams."""
    return _weights(request, needs, [rows, columns, grad_rows, grad_columns], None)


def sums(request: Request, needs):
    """Sum of all terms and its gradients, in one pass."""
    total = torch.zeros((), dtype=torch.float64)
    dx, dy, dparams = _weights(request, needs, [], total)
    return total.to(statistics_dtype(request.x)), dx, dy, dparams


def mine(request: Request) -> list[tuple[Tensor, Tensor]]:
    """(values (B, k), indices (B, k)) of each extreme."""
    b = request.x.shape[0]
    dtype = statistics_dtype(request.x)
    found: list[Tensor] = []
    bounds: list[Tensor] = []
    spec = request.spec[:HEADER]
    consts: list[float] = []
    for extreme in request.extremes:
        spec += [int(extreme.mask), int(extreme.largest), extreme.k]
        for bound, absent in ((extreme.above, -torch.inf), (extreme.below, torch.inf)):
            is_tensor = isinstance(bound, Tensor)
            spec.append(len(bounds) if is_tensor else -1)
            consts.append(absent if is_tensor or bound is None else float(bound))
            if is_tensor:
                # One element for all rows is a 0-d tensor to the extension.
                value = bound.to(dtype).contiguous()
                bounds.append(value.reshape(()) if value.numel() == 1 and b != 1 else value)
        found += [request.x.new_empty(b, extreme.k, dtype=dtype), torch.empty(b, extreme.k, dtype=torch.int64)]
    torch.ops.flashpair_cpu.extremes(*_arguments(request), bounds, spec, consts, request.max_workspace_bytes, found)
    return list(zip(found[::2], found[1::2], strict=True))
