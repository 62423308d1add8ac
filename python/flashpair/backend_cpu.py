"""Backend `cpu`: C++ on the CPU, vectorised and threaded; see `csrc/engine_cpu.h`.

float32 and float64 are served natively; bfloat16 and float16 embeddings are read as float32 (exactly), so their
results lose nothing but the rounding of their gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import formulas
from .dispatch import forced_name
from .operator import watched
from .request import (
    GUIDE_COLUMNS,
    GUIDE_ROWS,
    HEADER,
    Request,
    count_terms,
    parameter_places,
    statistics_dtype,
)

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


def finite(tensors: list[Tensor]) -> bool:
    """Whether every entry is finite."""
    return torch.ops.flashpair_cpu.finite.default([t.contiguous() for t in tensors])


def _dense(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as the extension reads it; asking first costs a tenth of a `to` that has nothing to do."""
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()


def _directed(request: Request) -> bool:
    """A pair mask or excluded columns need not be symmetric: such a self-similarity runs as a rectangular problem."""
    return request.y is None and (request.pair_mask is not None or request.exclude is not None)


def _pairs(request: Request) -> list[Tensor | None]:
    """The flat arguments of all three native operators that say which pairs there are."""
    dtype = statistics_dtype(request.x)
    x, y, ref_labels = _dense(request.x, dtype), request.y, request.ref_labels
    if _directed(request):
        y, ref_labels = x, request.labels
    found = [x, None if y is None else _dense(y, dtype)]
    for given in (request.labels, ref_labels, request.pair_mask, request.exclude):
        found.append(None if given is None else given.contiguous())
    return found


def _arguments(request: Request) -> list:
    """The flat arguments that `stats` and `weights` share."""
    dtype, spec = statistics_dtype(request.x), request.spec
    if _directed(request):  # a guide for the columns too
        spec = list(spec)
        spec[GUIDE_COLUMNS] = spec[GUIDE_ROWS]
    params = [_dense(p, dtype) for p in request.params]
    return [*_pairs(request), params, spec, request.consts, request.max_workspace_bytes]


def stats(request: Request) -> tuple[Tensor, Tensor]:
    """Statistics: rows (R, B), columns (C, N)."""
    return torch.ops.flashpair_cpu.stats.default(*_arguments(request))


@functools.lru_cache(maxsize=256)  # one entry for each loss of a program
def _uses(spec: tuple[int, ...], params: int) -> list[list[tuple[int, int]]]:
    """For each parameter where its gradients stand among the extension's, and the side that each runs along."""
    used: list[list[tuple[int, int]]] = [[] for _ in range(params)]
    for t, (axis, places) in enumerate(parameter_places(spec)):
        # Of scale, offset, other_offset and weight; thresholds have none.
        for k, place in enumerate(places[:4]):
            if place >= 0:
                used[place].append((2 + 4 * t + k, axis if k < 2 else 1 - axis))
    return used


def _weights(request: Request, needs, statistics: list[Tensor], total: Tensor | None):
    lengths = request.shape
    dtype = statistics_dtype(request.x)
    directed, absent, features = _directed(request), torch.empty(0, dtype=dtype), request.x.shape[1]
    dx = torch.empty(lengths[0], features, dtype=dtype) if needs.x else absent
    dy = torch.empty(lengths[1], features, dtype=dtype) if (needs.x if directed else needs.y) else absent
    gradients = [dx, dy] + [absent] * (4 * count_terms(request.spec))
    dparams: list[Tensor | list[Tensor] | None] = [None] * len(request.params)
    for k, uses in enumerate(_uses(tuple(request.spec), len(request.params))):
        if not (uses and needs.params[k]):
            continue
        if request.params[k].dim() == 0:  # one number for all owners of all terms, which the extension adds up
            dparams[k] = torch.empty((), dtype=dtype)
            for place, _ in uses:
                gradients[place] = dparams[k]
        else:
            dparams[k] = [torch.empty(lengths[side], dtype=dtype) for _, side in uses]
            for (place, _), part in zip(uses, dparams[k], strict=True):
                gradients[place] = part
    torch.ops.flashpair_cpu.weights.default(*_arguments(request), statistics, gradients, total)
    if directed and needs.x:
        dx += dy
    dparams = [functools.reduce(torch.add, d) if isinstance(d, list) else d for d in dparams]
    return _dense(dx, request.x.dtype), _dense(dy, request.x.dtype), dparams


def weights(request: Request, rows: Tensor, columns: Tensor, grad_rows: Tensor, grad_columns: Tensor, needs):
    """Gradients of the statistics: dx, dy, dparams."""
    return _weights(request, needs, [rows, columns, grad_rows, grad_columns], None)


def sums(request: Request, needs):
    """Sum of all terms and its gradients, in one pass."""
    total = torch.zeros((), dtype=torch.float64)
    dx, dy, dparams = _weights(request, needs, [], total)
    return total.to(statistics_dtype(request.x)), dx, dy, dparams


def label_counts(labels: Tensor, ref_labels: Tensor | None, exclude: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(2, B): the numbers of positives and negatives of each row."""
    given = [None if v is None else v.contiguous() for v in (labels, ref_labels, exclude)]
    return torch.ops.flashpair_cpu.label_counts.default(*given, dtype == torch.float64)


def listed_similarity(
    x: Tensor, y: Tensor | None, rows: Tensor, columns: Tensor, similarity: int, normalize: bool
) -> Tensor:
    """(P,) similarities of listed pairs; (0,) where an index is out of range."""
    return torch.ops.flashpair_cpu.listed_similarities.default(*_listed(x, y, rows, columns), similarity, normalize)


def listed_gradients(
    grad: Tensor, found: Tensor, x: Tensor, y: Tensor | None, rows: Tensor, columns: Tensor, similarity: int,
    normalize: bool,
) -> list[Tensor]:  # fmt: skip
    """dx, and dy where y is given, from the slopes in `found`, the similarities."""
    call = grad.contiguous(), found.contiguous(), *_listed(x, y, rows, columns), similarity, normalize
    dx, dy = torch.ops.flashpair_cpu.listed_gradients.default(*call)
    return [dx] if y is None else [dx, dy]


def _listed(x: Tensor, y: Tensor | None, rows: Tensor, columns: Tensor) -> list[Tensor | None]:
    return [None if v is None else v.contiguous() for v in (x, y, rows, columns)]


def at_hand(*tensors: Tensor) -> bool:
    """Whether the operators beside the passes may take these tensors: on a CPU, unless somebody watches or decides."""
    if forced_name() not in (None, "cpu") or watched(*tensors) or unavailable():
        return False
    return all(tensor.is_cpu for tensor in tensors)


def _formula(
    number: int, rows: Tensor, columns: Tensor, counts: Tensor | None, constants: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    counts = None if counts is None else counts.contiguous()
    return torch.ops.flashpair_cpu.formula.default(number, rows, columns, counts, constants)


#: All of them, by one operator.
FORMULAS = {name: functools.partial(_formula, number) for number, name in enumerate(formulas.FORMULAS)}


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
    torch.ops.flashpair_cpu.extremes.default(*_pairs(request), bounds, spec, consts, request.max_workspace_bytes, found)
    return list(zip(found[::2], found[1::2], strict=True))
