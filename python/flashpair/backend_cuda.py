"""Backend `cuda`: the C++/CUDA kernels of `csrc/`, for GPUs without Triton; see `csrc/engine_cuda.h`.

A panel of similarities comes from the vendor's matrix product into the workspace (*simple* form), or the kernels
multiply 16-bit embeddings themselves on tensor cores and S is not written at all (*fused* form). Pair weights go to the
workspace and from there through the vendor's matrix product into the gradients.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from . import backward, forward
from .backward import Backward, add_panel
from .extremes import shared_passes
from .forward import NEUTRAL, Forward
from .operands import Operands, in_precision, on_device, operands, unserved
from .panels import cdiv, empty_partials, float32_products, panel_shape, panels, round_up
from .program_cuda import LAYOUT, MAX_TERMS, TILE_COLUMNS, Item, Program, evaluations
from .program_cuda import program as program_of
from .request import Request, statistics_dtype
from .terms import Extreme, Precision, Reduction

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
_REBUILD = "FLASHPAIR_BUILD_CUDA=1 pip install --force-reinstall --no-deps --no-build-isolation flashpair"

#: As in csrc/engine_cuda.h and csrc/mma_cuda.h.
FUSED_ROWS = 128
_WARPS = 8
#: Rows of a strip by kernel and bytes of a similarity, and strips of a warp in the simple form.
STRIP_ROWS = {"stats": {4: 4, 8: 2}, "weights": {4: 2, 8: 1}}
STRIPS = 4
#: Sums of parameters whose columns a block gathers in shared memory.
MAX_SUMS = 32
#: Programs that fill a GPU; decides into how many stripes a top-k pass cuts its columns.
_ENOUGH_WARPS = 4096
#: Features up to which the fused form is chosen, by compute capability (the next lower one serves). Not measured:
#: mma.sync reaches the full rate of sm_80 to sm_89 but about 0.6 of the rate of later GPUs, where a long product is
#: better left to the vendor although S then goes through memory (8 bytes a pair).
FUSED_FEATURES = {80: 4096, 89: 4096, 90: 768}
_forms = ("auto",)


# --- availability -----------------------------------------------------------------------------------------------------


@functools.cache
def _load() -> str:
    """Load the extension once; the reason why not, or an empty string.

    `FLASHPAIR_CUDA_LIBRARY` names another file than the installed one, such as an emulated build.
    """
    asked = os.environ.get("FLASHPAIR_CUDA_LIBRARY")
    found = [Path(asked)] if asked else sorted(Path(__file__).parent.glob("_CUDA*.so"))
    if not found:
        return f"the CUDA extension was not built; install CUDA's nvcc and run `{_REBUILD}`"
    name = found[0].name
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"the CUDA extension {name} does not load with torch {torch.__version__} ({error}); `{_REBUILD}`"
    layout = getattr(torch.ops.flashpair_cuda, "layout", None)
    if layout is None or layout() != LAYOUT:
        return f"the CUDA extension {name} was built from another version of flashpair; `{_REBUILD}`"
    return ""


def emulated() -> bool:
    """Whether the kernels run on the host."""
    return not _load() and not torch.ops.flashpair_cuda.versions()


def architectures() -> list[str]:
    """Compute capabilities that the kernels were built for, such as "80" or, with PTX for later GPUs, "90+PTX"."""
    return list(import_module("flashpair._cuda_info").architectures)


def unavailable() -> list[str]:
    """Reasons against using the CUDA kernels at all."""
    reason = _load()
    if reason:
        return [reason]
    if emulated():
        return []
    if not torch.cuda.is_available():
        return ["no CUDA device is visible"]
    built, driver = torch.ops.flashpair_cuda.versions()
    if driver // 1000 < built // 1000:
        return [
            f"the CUDA extension was built with CUDA {built // 1000}, the driver serves CUDA {driver // 1000}; "
            f"update the driver, or let CUDA_HOME name an older toolkit and run `{_REBUILD}`"
        ]
    return []


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _not_built_for(capability: int) -> str:
    """Why the kernels do not run on a GPU, or an empty string: machine code runs on its own and later minor versions of
    a major one (that of "90a" on 9.0 only), PTX on every later GPU."""
    for entry in architectures():
        name, _, ptx = entry.partition("+")
        number = int(name.rstrip("af"))
        same_major = number // 10 == capability // 10 and number <= capability
        if number == capability or (name.isdigit() and (same_major or (ptx and number <= capability))):
            return ""
    arch = f"{capability // 10}.{capability % 10}"
    return (
        f"the CUDA extension was built for compute capabilities {', '.join(architectures())}, this GPU has {arch}; "
        f'TORCH_CUDA_ARCH_LIST="{arch}" {_REBUILD}'
    )


def why_not(x: Tensor) -> list[str]:
    """Reasons against embeddings like x (rows, D)."""
    reasons = []
    if emulated():
        if x.device.type != "cpu":
            reasons.append(f"the emulated kernels serve CPU tensors; got {x.device}")
    elif x.device.type != "cuda":
        reasons.append(f"embeddings are on {x.device}; the kernels read cuda tensors")
    else:
        capability = _capability(x.device.index)
        reason = _not_built_for(capability)
        reasons += [reason] if reason else []
        if capability < 80 and x.dtype == torch.bfloat16:
            reasons.append("bfloat16 products need compute capability 8.0; float16, float32 and float64 are served")
    return reasons + unserved(x, DTYPES)


@contextlib.contextmanager
def form(name: str) -> Iterator[None]:
    """Force the "simple" or the "fused" form inside a `with` block, "auto" to choose by size; for benchmarks and tests.

    The fused form serves bfloat16 and float16 from compute capability 8.0 on; other inputs stay simple.
    """
    global _forms
    if name not in ("auto", "simple", "fused"):
        raise ValueError(f'form must be "auto", "simple" or "fused"; got {name!r}')
    _forms = (*_forms, name)
    try:
        yield
    finally:
        _forms = _forms[:-1]


def _fused(x: Tensor) -> bool:
    if x.dtype not in _HALVES or x.shape[1] == 0 or _forms[-1] == "simple":
        return False
    capability = 80 if emulated() else _capability(x.device.index)
    if capability < 80 or _forms[-1] == "fused":
        return capability >= 80
    return x.shape[1] <= FUSED_FEATURES[max(c for c in FUSED_FEATURES if c <= capability)]


# --- where similarities come from -------------------------------------------------------------------------------------


def _aligned(x: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 bytes."""
    if x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) == 1:
        return x
    wide = torch.zeros(x.shape[0], round_up(x.shape[1], 8), dtype=x.dtype, device=x.device)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


class _Source:
    """Similarities of a panel: an array in the workspace, filled by the vendor's product, or none (fused form)."""

    def __init__(self, op: Operands, fused: bool, kernel: str = "stats") -> None:
        self.dtype = statistics_dtype(op.x)
        self.fused = fused
        if fused:
            x = _aligned(op.x)
            op.x, op.y = x, x if op.y is op.x else _aligned(op.y)
        self.op = op
        self.tile_rows = FUSED_ROWS if fused else _WARPS * STRIPS * STRIP_ROWS[kernel][self.dtype.itemsize]
        # A pair in the workspace; second products are always there.
        self.bytes = (int(not fused) + int(op.guide is not None)) * self.dtype.itemsize
        self._space = op.x.new_empty(0, dtype=self.dtype)
        self._guide_space = self._space

    def panel(self, first_b: int, end_b: int, first_n: int, end_n: int) -> Tensor:
        """(rows, columns) dot products with a row stride that keeps rows 16-byte aligned; empty in the fused form."""
        if self.fused:
            return self._space
        self._space, out = _product(self.op.x[first_b:end_b], self.op.y[first_n:end_n], self._space)
        return out

    def guide(self, first_b: int, end_b: int, first_n: int, end_n: int, precision: Precision) -> Tensor:
        """The second products of a panel, laid out like `panel`; empty without them."""
        if self.op.guide is None:
            return self.op.x.new_empty(0, dtype=self.dtype)
        u, v = self.op.guide
        with float32_products(u, precision):  # a guide may be float32 where the embeddings are not
            self._guide_space, out = _product(u[first_b:end_b], v[first_n:end_n], self._guide_space)
        return out


def _product(x: Tensor, y: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """x y^T in the dtype of the space, and the space, larger where it has to be."""
    stride = round_up(y.shape[0], 8)
    size = x.shape[0] * stride
    if space.numel() < size:
        space = torch.empty(size, dtype=space.dtype, device=x.device)
    out = space[:size].view(x.shape[0], stride)[:, : y.shape[0]]
    if x.dtype == space.dtype:
        torch.mm(x, y.T, out=out)
    elif x.is_cuda:
        torch.mm(x, y.T, out_dtype=space.dtype, out=out)
    else:
        torch.mm(x.to(space.dtype), y.T.to(space.dtype), out=out)
    return space, out


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _fold(partials: Tensor, state: Tensor, tiles: int, length: int, first: int, entries: list[int], stream: int):
    if entries:
        torch.ops.flashpair_cuda.fold(partials, state, tiles, length, first, entries, stream)


def _chunks(items: Sequence) -> Iterator[tuple[int, Sequence]]:
    """(position of the first, up to MAX_TERMS terms)."""
    for first in range(0, len(items), MAX_TERMS):
        yield first, items[first : first + MAX_TERMS]


def _panel_pairs(request: Request, shape: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Panels in a fixed order; of a self-similarity those on and above the diagonal."""
    B, N = request.shape
    for first_b, end_b in panels(B, shape[0]):
        for first_n, end_n in panels(N, shape[1]):
            if not (request.symmetric and first_n < first_b):
                yield first_b, end_b, first_n, end_n


# --- statistics -------------------------------------------------------------------------------------------------------


@on_device
@in_precision
def stats(request: Request) -> tuple[Tensor, Tensor]:
    """Statistics of all terms: rows (R, B), columns (C, N)."""
    return forward.statistics(request, _reduce_panels)


def _reduce_panels(request: Request, plan: Forward) -> None:
    op, stream = plan.op, _stream(request.x)
    plan.set_neutral()
    source = _Source(op, _fused(op.x))
    programs = []
    shareable = tuple(r for r in Reduction if r != Reduction.MOMENTS)
    for first, terms in _chunks(plan.terms):
        program = program_of(
            request, op, evaluations(terms, request.symmetric, shareable), triangle=int(request.symmetric)
        )
        used, entries = [0, 0], ([], [])
        for t, term in enumerate(terms):
            side = 0 if request.symmetric else int(term.axis)
            program.add(term, {"statistic": used[side]})
            entries[side].extend((int(term.reduction), used[side], plan.firsts[first + t]))
            used[side] += len(NEUTRAL[term.reduction])
        if request.symmetric:
            used[1], entries = used[0], (entries[0], entries[0])
        programs.append((program, used, entries))
    most = [max(used[side] for _, used, _ in programs) for side in (0, 1)]

    def cost(rows: int, columns: int) -> int:
        partials = most[0] * cdiv(columns, TILE_COLUMNS) * rows + most[1] * cdiv(rows, source.tile_rows) * columns
        return source.bytes * rows * columns + source.dtype.itemsize * partials

    shape = _shape(request, cost)
    for panel in _panel_pairs(request, shape):
        first_b, end_b, first_n, end_n = panel
        s, t = source.panel(*panel), source.guide(*panel, request.precision)
        tiles_b, tiles_n = cdiv(end_b - first_b, source.tile_rows), cdiv(end_n - first_n, TILE_COLUMNS)
        for program, used, entries in programs:
            rows = empty_partials(used[0], tiles_n, end_b - first_b, op.x.device, source.dtype)
            columns = empty_partials(used[1], tiles_b, end_n - first_n, op.x.device, source.dtype)
            torch.ops.flashpair_cuda.stats(
                program.beside(t), s, program.vectors, program.codes(panel, source.tile_rows), program.numbers,
                stream, rows, columns,
            )  # fmt: skip
            _fold(rows, plan.states[0], tiles_n, end_b - first_b, first_b, entries[0], stream)
            _fold(columns, plan.states[1], tiles_b, end_n - first_n, first_n, entries[1], stream)
    plan.finish()


def _shape(request: Request, cost, tall: int = 1024) -> tuple[int, int]:
    B, N = request.shape
    return panel_shape(
        B, N, FUSED_ROWS, TILE_COLUMNS, request.max_workspace_bytes, cost, square=request.symmetric, tall=tall
    )


# --- pair weights -----------------------------------------------------------------------------------------------------


@on_device
@in_precision
def weights(request: Request, rows: Tensor, columns: Tensor, grad_rows: Tensor, grad_columns: Tensor, needs):
    """Gradients of the statistics: dx, dy, dparams."""
    return backward.weights(request, rows, columns, grad_rows, grad_columns, needs, _add_panels)


@on_device
@in_precision
def sums(request: Request, needs):
    """Sum of all terms and its gradients, in one pass."""
    return backward.sums(request, needs, stats, _add_panels)


def _written(program: Program, count_columns: bool) -> tuple[list[int], list[int]]:
    """Slots of sums that the kernel writes on each side."""
    written: tuple[set[int], set[int]] = (set(), set())
    for item in program.items:
        for side, t in ((0, item.row), (1, item.column)):
            if t < 0 or (side == 1 and (item.shared or not count_columns)):
                continue
            scale, offset, other, weight, value = program.terms[t][-5:]
            written[side].update((scale, offset, value))
            written[1 - side].update((other, weight))
    return tuple(sorted(w - {-1}) for w in written)


def _weight_chunks(plan: Backward) -> Iterator[list[int]]:
    """Terms of each pass: at most MAX_TERMS, whose sums of parameters fit the shared memory of a block."""
    chunk, slots = [], 0
    for t in range(len(plan.terms)):
        if not plan.with_value and plan.cotangents[t] is None:
            continue
        wanted = sum(of == t for of, _ in plan.slots.of)
        if chunk and (len(chunk) == MAX_TERMS or slots + wanted > MAX_SUMS):
            yield chunk
            chunk, slots = [], 0
        chunk, slots = [*chunk, t], slots + wanted
    if chunk:
        yield chunk


def _add_panels(request: Request, plan: Backward) -> None:
    source = _Source(plan.op, _fused(plan.op.x), "weights")
    plan.sums.flat.zero_()
    for chunk in _weight_chunks(plan):
        terms = [plan.terms[t] for t in chunk]
        program = program_of(
            request, plan.op, evaluations(terms, request.symmetric, (Reduction.SUM, Reduction.LOGSUMEXP))
        )
        # Slots of the states that this pass adds to; the kernel numbers them from 0 on.
        slots = sorted({slot for (t, _), slot in plan.slots.of.items() if t in chunk} | {plan.row_sum, plan.column_sum})
        slots = [slot for slot in slots if slot >= 0]
        for t, term in zip(chunk, terms, strict=True):
            own = {name: slots.index(slot) for (of, name), slot in plan.slots.of.items() if of == t}
            mean, lse = plan.statistics[t]
            program.add(term, own, plan.cotangents[t], lse, mean)
        _weigh(request, plan, source, program, slots)


def _weigh(request: Request, plan: Backward, source: _Source, program: Program, slots: list[int]) -> None:
    op, stream, count = plan.op, _stream(request.x), len(slots)
    store = plan.dx is not None or plan.dy is not None
    narrow = op.x.dtype != source.dtype  # 16-bit weights lie beside the similarities, others take their place
    nothing = op.x.new_empty(0)

    def cost(rows: int, columns: int) -> int:
        partials = count * (cdiv(columns, TILE_COLUMNS) * rows + cdiv(rows, source.tile_rows) * columns)
        pair = source.bytes + (op.x.element_size() if store and narrow else 0)
        return pair * rows * columns + source.dtype.itemsize * partials

    shape = _shape(request, cost, tall=4096)
    space = nothing
    for panel in _panel_pairs(request, shape):
        first_b, end_b, first_n, end_n = panel
        on_diagonal = request.symmetric and first_n == first_b
        tiles_b, tiles_n = cdiv(end_b - first_b, source.tile_rows), cdiv(end_n - first_n, TILE_COLUMNS)
        s = source.panel(*panel)
        w = nothing
        if store and narrow:
            stride = round_up(end_n - first_n, 8)
            if space.numel() < (end_b - first_b) * stride:
                space = torch.empty((end_b - first_b) * stride, dtype=op.x.dtype, device=op.x.device)
            w = space[: (end_b - first_b) * stride].view(end_b - first_b, stride)[:, : end_n - first_n]
        elif store:
            w = s
        rows = empty_partials(count, tiles_n, end_b - first_b, op.x.device, source.dtype)
        columns = empty_partials(count, tiles_b, end_n - first_n, op.x.device, source.dtype)
        row_sum, column_sum = (plan.row_sum, -1 if on_diagonal else plan.column_sum) if store else (-1, -1)
        torch.ops.flashpair_cuda.weights(
            program.beside(source.guide(*panel, request.precision)), s, program.vectors,
            program.codes(panel, source.tile_rows, mirror_sums=int(not on_diagonal)), program.numbers, stream,
            rows, columns, w, nothing.float() if plan.scale is None else plan.scale,
            [count, count, *(slots.index(slot) if slot >= 0 else -1 for slot in (row_sum, column_sum))],
        )  # fmt: skip
        written = _written(program, not on_diagonal)
        for side, partials, tiles, length, first, extra in (
            (0, rows, tiles_n, end_b - first_b, first_b, row_sum),
            (1, columns, tiles_b, end_n - first_n, first_n, column_sum),
        ):
            of_side = [*written[side], *([slots.index(extra)] if extra >= 0 else [])]
            entries = [v for partial in of_side for v in (int(Reduction.SUM), partial, slots[partial])]
            _fold(partials, plan.states[side], tiles, length, first, entries, stream)
        if store:
            add_panel(plan, w, first_b, first_n, request.symmetric and not on_diagonal)


# --- extremes ---------------------------------------------------------------------------------------------------------


@on_device
@in_precision
def mine(request: Request) -> list[tuple[Tensor, Tensor]]:
    """(values (B, k), indices (B, k)) of each extreme; those with k = 1 share a pass."""
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(request.extremes)
    for _, group in (chunk for together in shared_passes(request.extremes) for chunk in _chunks(together)):
        results = _mine_single(request, [request.extremes[e] for e in group])
        for e, result in zip(group, results, strict=True):
            found[e] = result
    for e, extreme in enumerate(request.extremes):
        if extreme.k > 1:
            found[e] = _mine_many(request, extreme)
    return found


def _no_best(extreme: Extreme, rows: int, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
    missing = -torch.inf if extreme.largest else torch.inf
    values = torch.full((rows, extreme.k), missing, dtype=dtype, device=device)
    return values, torch.full((rows, extreme.k), -1, dtype=torch.int32, device=device)


def _restored(op: Operands, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Values and columns (B, k) in the caller's order."""
    columns = places.long()
    if op.orders[1] is not None and op.y.shape[0]:
        columns = torch.where(columns < 0, -1, op.orders[1][columns.clamp_min(0)])
    return op.restore(values, 0, 0), op.restore(columns, 0, 0)


def _mine_single(request: Request, extremes: list[Extreme]) -> list[tuple[Tensor, Tensor]]:
    B, N = request.shape
    device, count, stream = request.x.device, len(extremes), _stream(request.x)
    op = operands(request, {e.mask for e in extremes})
    source = _Source(op, _fused(op.x))
    items = [Item(t, t if request.symmetric else -1) for t in range(count)]
    program = program_of(request, op, items, triangle=int(request.symmetric))
    for t, extreme in enumerate(extremes):
        program.add(op.arranged_extreme(extreme), {"statistic": t})
    best = [_no_best(e, B, source.dtype, device) for e in extremes]
    columns_of = int(request.symmetric)
    entry = source.dtype.itemsize + 4

    def cost(rows: int, columns: int) -> int:
        partials = cdiv(columns, TILE_COLUMNS) * rows + columns_of * cdiv(rows, source.tile_rows) * columns
        return source.bytes * rows * columns + entry * count * partials

    for panel in _panel_pairs(request, _shape(request, cost)) if B and N else ():
        first_b, end_b, first_n, end_n = panel
        sides = (
            (cdiv(end_n - first_n, TILE_COLUMNS), first_b, end_b),
            (cdiv(end_b - first_b, source.tile_rows), first_n, end_n),
        )[: 1 + columns_of]
        partials = []
        for tiles, first, end in sides:
            size = count * tiles * (end - first)
            partials.append(torch.empty(size, dtype=source.dtype, device=device))
            partials.append(torch.empty(size, dtype=torch.int32, device=device))
        nothing = [partials[0].new_empty(0), partials[1].new_empty(0)] if len(partials) == 2 else []
        torch.ops.flashpair_cuda.extremes(
            program.operands, source.panel(*panel), program.vectors, program.codes(panel, source.tile_rows),
            program.numbers, stream, partials + nothing,
        )  # fmt: skip
        for side, (tiles, first, end) in enumerate(sides):
            values, places = (p.view(count, -1) for p in partials[2 * side : 2 * side + 2])
            for e, extreme in enumerate(extremes):
                into = [b[first:end] for b in best[e]]
                torch.ops.flashpair_cuda.merge_best(
                    values[e], places[e], *into, tiles, end - first, 1, extreme.largest, stream
                )
    return [_restored(op, *b) for b in best]


def _mine_many(request: Request, extreme: Extreme) -> tuple[Tensor, Tensor]:
    B, N = request.shape
    device, k, stream = request.x.device, extreme.k, _stream(request.x)
    op = operands(request, {extreme.mask})
    source = _Source(op, False)
    program = program_of(request, op, [Item(0, -1)])
    program.add(op.arranged_extreme(extreme), {"statistic": 0})
    values, places = _no_best(extreme, B, source.dtype, device)
    entry = (source.dtype.itemsize + 4) * k

    def stripes(rows: int, columns: int) -> int:
        return max(1, min(cdiv(columns, 4 * TILE_COLUMNS), _ENOUGH_WARPS // rows))

    def cost(rows: int, columns: int) -> int:
        return source.bytes * rows * columns + entry * rows * stripes(rows, columns)

    shape = (
        panel_shape(B, N, FUSED_ROWS, TILE_COLUMNS, request.max_workspace_bytes, cost, tall=1024) if B and N else (1, 1)
    )
    for first_b, end_b in panels(B, shape[0]):
        for first_n, end_n in panels(N, shape[1]):
            panel, rows = (first_b, end_b, first_n, end_n), end_b - first_b
            lists = stripes(rows, end_n - first_n)
            found = (
                torch.empty(lists, rows, k, dtype=source.dtype, device=device),
                torch.empty(lists, rows, k, dtype=torch.int32, device=device),
            )
            torch.ops.flashpair_cuda.top_k(
                program.operands, source.panel(*panel), program.vectors, program.codes(panel, source.tile_rows),
                program.numbers, stream, k, lists, *found,
            )  # fmt: skip
            torch.ops.flashpair_cuda.merge_best(
                *found, values[first_b:end_b], places[first_b:end_b], lists, rows, k, extreme.largest, stream
            )
    return _restored(op, values, places)
