"""Launchers: operands and parameters packed, S cut into panels that fit the workspace, all work in a fixed order.

Nothing here reads a device value, so nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from . import configs
from .extremes import _extremes_kernel, _top_k_kernel
from .program import (
    Gradients,
    Parameters,
    Pass,
    extremes_codes,
    padded,
    padded_length,
    statistics_codes,
    statistics_slots,
    weights_codes,
    written_slots,
)
from .reductions import COUNT, LOGSUMEXP, MOMENTS, SOFTMAX_MEAN, SUM, _fold_kernel
from .stats import _stats_kernel
from .weights import _weights_kernel

_SAME = 1  # flashpair.Mask.SAME
_EPSILON = 1e-12  # smallest norm that `normalize` divides by
_CHUNK_ELEMENTS = 1 << 22  # normalised at a time in float64
_MISSING = -(2**63)
_LAST_COLUMN = 2**31 - 1
#: float16 pair weights are scaled by a power of two so that the largest cotangent becomes about this.
_HALF_RANGE = 16.0
#: Programs that fill a GPU; decides into how many stripes a top-k pass cuts its columns.
_ENOUGH_PROGRAMS = 512


def launch(kernel, programs: int, config: configs.TileConfig | None, *args, **constants):
    """Start a kernel on a 1-D grid; nothing to do is no launch."""
    if programs == 0:
        return None
    if config is not None:
        constants |= {
            "BLOCK_B": config.block_b,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "GROUP": config.group,
            "PARTS": config.parts,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
    return kernel[(programs,)](*args, **constants)


# --- operands -------------------------------------------------------------------------------------------------------


def group_ids(labels: Tensor, ref_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels as ranks, int32: half the registers of int64, same order, without waiting for the device."""
    both = labels if ref_labels is None else torch.cat([labels, ref_labels])
    ordered, order = both.sort(stable=True)
    rank = torch.zeros_like(ordered, dtype=torch.int32)
    rank[1:] = (ordered[1:] != ordered[:-1]).to(torch.int32).cumsum(0, dtype=torch.int32)
    ids = torch.empty_like(rank)
    ids[order] = rank
    return ids[: labels.shape[0]], (ids if ref_labels is None else ids[labels.shape[0] :])


def _padded_labels(ids: Tensor) -> Tensor:
    """(rows,) → (padded rows,), repeating the last label so that padding widens no tile's range."""
    missing = padded_length(ids.shape[0]) - ids.shape[0]
    return torch.cat([ids, ids[-1:].expand(missing)]) if missing else ids


@dataclass
class Operands:
    """What every kernel of a pass reads, apart from the terms' parameters."""

    raw_x: Tensor  # (B, D) as given
    raw_y: Tensor  # (N, D)
    x: Tensor  # (B, D) as the kernels read it: float32 normalised, 16-bit inputs as given, since they are exact
    y: Tensor  # (N, D)
    x_norms: Tensor  # (2, padded B) inverse norm, squared norm
    y_norms: Tensor  # (2, padded N)
    x_labels: Tensor  # (padded B,) int32
    y_labels: Tensor  # (padded N,) int32
    exclude: Tensor  # (padded B,) int32
    pair_mask: Tensor  # (B, N) uint8
    header: Pass
    kind: str
    crowded: bool  # an explicit mask or many evaluations
    orders: tuple[Tensor | None, Tensor | None]  # rows and columns as sorted by label

    def arrange(self, vector: Tensor | None, side: int) -> Tensor | None:
        """A caller's vector (..., owners) in the order of the operands."""
        order = self.orders[side]
        return vector if order is None or vector is None or vector.shape[-1] == 1 else vector[..., order]

    def restore(self, values: Tensor, side: int, dim: int = -1) -> Tensor:
        """Inverse of `arrange` along a dimension."""
        order = self.orders[side]
        if order is None:
            return values
        return torch.empty_like(values).index_copy_(dim, order, values)

    def tensors(self) -> tuple[Tensor, ...]:
        return (
            self.x, self.y, self.x_norms, self.y_norms, self.x_labels, self.y_labels, self.exclude, self.exclude,
            self.pair_mask,
        )  # fmt: skip

    def config(self, kernel: str) -> configs.TileConfig:
        arch = configs.architecture(self.x.device)
        return configs.choose(kernel, self.kind, arch, self.x.shape[1], self.crowded)


def _inverse_norms(x: Tensor) -> Tensor:
    """(rows,) float64: 1 / max(norm, 1e-12)."""
    return 1.0 / torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).clamp_min(_EPSILON)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of x (rows, D) divided by their norms, rounded once."""
    inverse, out = _inverse_norms(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for first, end in _panels(x.shape[0], max(_CHUNK_ELEMENTS // max(x.shape[1], 1), 1)):
        out[first:end] = x[first:end].double() * inverse[first:end, None]
    return out


def _norms(x: Tensor, normalize: bool, squared: bool) -> Tensor:
    """(2, padded rows): 1 / max(norm, 1e-12), and the squared norm after that division."""
    rows = x.shape[0]
    out = torch.zeros(2, padded_length(rows), dtype=torch.float32, device=x.device)
    if normalize:
        out[0, :rows] = _inverse_norms(x)
    if squared:
        wide = x.float()
        wide = wide * out[0, :rows, None] if normalize else wide
        out[1, :rows] = (wide * wide).sum(1)
    return out


def operands(request, masks: set[int]) -> Operands:
    """Operands of a request; sorted by label where only pairs of equal labels count, so that tiles can be skipped."""
    x, y, device = request.x, request.columns, request.x.device
    same_only = masks == {_SAME}
    x_labels = y_labels = torch.zeros(1, dtype=torch.int32, device=device)
    orders = (None, None)
    if request.labels is not None:
        x_labels, y_labels = group_ids(request.labels, None if request.symmetric else request.column_labels)
    if same_only and request.pair_mask is None and request.exclude is None:
        row_order = x_labels.argsort(stable=True)
        column_order = row_order if request.symmetric else y_labels.argsort(stable=True)
        orders = (row_order, column_order)
        x, x_labels = x[row_order], x_labels[row_order]
        y, y_labels = (x, x_labels) if request.symmetric else (y[column_order], y_labels[column_order])
    x = x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
    y = x if request.symmetric else (y if y.stride(1) == 1 or y.shape[1] <= 1 else y.contiguous())
    raw_x, raw_y = x, y
    scaled = request.normalize and x.dtype != torch.float32  # by norms, in the epilogue
    if request.normalize and not scaled:
        x = unit_rows(x)
        y = x if request.symmetric else unit_rows(y)
    squared = int(request.similarity) != 0
    x_norms = _norms(x, scaled, squared)
    exclude = x_labels
    if request.exclude is not None:
        inside = (request.exclude >= 0) & (request.exclude < y.shape[0])
        exclude = padded(torch.where(inside, request.exclude, -1).to(torch.int32))
    pair_mask = x_labels if request.pair_mask is None else request.pair_mask.contiguous().view(torch.uint8)
    x_labels, y_labels = _padded_labels(x_labels), _padded_labels(y_labels)
    half = x.dtype != torch.float32
    tf32 = not half and int(request.precision) == 1
    kind = "half" if half else "tf32" if tf32 else "ieee"
    evaluations = max(len(request.terms), len(request.extremes)) * (1 + int(request.symmetric))
    return Operands(
        raw_x,
        raw_y,
        x,
        y,
        x_norms,
        x_norms if request.symmetric else _norms(y, scaled, squared),
        x_labels,
        y_labels,
        exclude,
        pair_mask,
        Pass(
            int(request.similarity),
            scaled,
            request.exclude_self,
            request.exclude is not None,
            same_only,
            request.symmetric,
        ),
        kind,
        request.pair_mask is not None or evaluations > configs.MANY_EVALUATIONS,
        orders,
    )


def _arranged_terms(request, op: Operands) -> list:
    """The terms with their vectors in the order of the operands."""
    if op.orders[0] is None:
        return request.terms
    terms = []
    for term in request.terms:
        side = int(term.axis)
        moved = {}
        for name in ("scale", "offset", "above", "below", "other_offset", "weight"):
            value = getattr(term, name)
            if isinstance(value, Tensor):
                moved[name] = op.arrange(value, 1 - side if name in ("other_offset", "weight") else side)
        terms.append(replace(term, **moved))
    return terms


# --- panels ---------------------------------------------------------------------------------------------------------


def _on_device(function):
    """Run a launcher with the device of its request current."""

    @functools.wraps(function)
    def launcher(request, *args, **kwargs):
        with torch.cuda.device(request.x.device) if request.x.is_cuda else contextlib.nullcontext():
            return function(request, *args, **kwargs)

    return launcher


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _halved(value: int, block: int) -> int:
    return max(_round_up(value // 2, block), block)


def panel_shape(
    B: int, N: int, config: configs.TileConfig, budget: int, cost, square: bool = False, tall: int = 0
) -> tuple[int, int]:
    """Largest (rows, columns) whose `cost(rows, columns)` bytes fit the budget, in whole tiles.

    Rows shrink first, down to `tall`, since whole rows of S need the fewest passes over the gradients.
    """
    rows, columns = _round_up(B, config.block_b), _round_up(N, config.block_n)
    while cost(rows, columns) > budget and (rows > config.block_b or columns > config.block_n):
        if square:
            side = max(rows, columns)
            both = max(config.block_b, config.block_n)
            rows = columns = _halved(side, both)
            if side == both:
                break
        elif rows > max(tall, config.block_b) or columns <= config.block_n:
            rows = _halved(rows, config.block_b)
        else:
            columns = _halved(columns, config.block_n)
    return rows, columns


def _panels(length: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, step):
        yield first, min(first + step, length)


def _tiles(length: int, block: int) -> int:
    return -(-length // block)


def _partials(slots: int, tiles: int, length: int, device, dtype=torch.float32) -> Tensor:
    return torch.empty(max(slots * tiles * length, 1), dtype=dtype, device=device)


def _fold(partials: Tensor, state: Tensor, tiles: int, length: int, first: int, entries: tuple[int, ...]) -> None:
    """Merge one panel's partials (slots, tiles, length) into the state (slots, owners) from `first` on."""
    if entries:
        block = 128
        launch(
            _fold_kernel, _tiles(length, block), None, partials, state, tiles, length, first, state.shape[1],
            ENTRIES=entries, BLOCK_T=8, BLOCK=block,
        )  # fmt: skip


_NEUTRAL = {
    SUM.value: (0.0,),
    COUNT.value: (0.0,),
    LOGSUMEXP.value: (-torch.inf, 0.0),
    SOFTMAX_MEAN.value: (-torch.inf, 0.0, 0.0),
    MOMENTS.value: (0.0, 0.0, 0.0, torch.inf, -torch.inf),
}


def _state_layout(terms: list, symmetric: bool) -> tuple[list[int], list[int]]:
    """First partial slot of each term, and slots per side; a logsumexp has two partials, a softmax mean three."""
    used, firsts = [0, 0], []
    for term in terms:
        side = 0 if symmetric else int(term.axis)
        firsts.append(used[side])
        used[side] += len(_NEUTRAL[int(term.reduction)])
    if symmetric:
        used[1] = used[0]
    return firsts, used


def _set_neutral(buffer: Tensor, entries: tuple[int, ...]) -> None:
    """Empty statistics in a buffer (slots, ...)."""
    for reduction, slot in zip(entries[::2], entries[1::2], strict=True):
        for k, value in enumerate(_NEUTRAL[reduction]):
            buffer[slot + k].fill_(value)


def _dimensions(op: Operands) -> tuple[int, ...]:
    B, N = op.x.shape[0], op.y.shape[0]
    return N, op.x.shape[1], op.x.stride(0), op.y.stride(0), padded_length(B), padded_length(N)


def _tile_constants(op: Operands, config: configs.TileConfig) -> dict:
    precision = "ieee" if op.kind == "ieee" else "tf32"
    # The interpreter multiplies the bit patterns of bfloat16.
    upcast = op.x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret
    return {"EVEN_D": op.x.shape[1] % config.block_d == 0, "INPUT_PRECISION": precision, "UPCAST": upcast}


# --- statistics -----------------------------------------------------------------------------------------------------


@_on_device
def stats(request) -> tuple[Tensor, Tensor]:
    """Statistics of all terms: rows (R, B) and columns (C, N), float32."""
    B, N = request.shape
    device = request.x.device
    op = operands(request, {int(t.mask) for t in request.terms})
    terms = _arranged_terms(request, op)
    firsts, slots = _state_layout(terms, request.symmetric)
    parameters = Parameters(device, request.symmetric)
    codes = statistics_codes(terms, request, parameters, firsts, LOGSUMEXP.value)
    entries = (statistics_slots(codes, 0), statistics_slots(codes, 1))
    rows_state = torch.empty(slots[0], B, dtype=torch.float64, device=device)
    columns_state = rows_state if request.symmetric else torch.empty(slots[1], N, dtype=torch.float64, device=device)
    _set_neutral(rows_state, entries[0])
    if not request.symmetric:
        _set_neutral(columns_state, entries[1])
    if B and N:
        _stats_panels(request, op, parameters.packed(), codes, slots, entries, (rows_state, columns_state))
    rows, columns = [], []
    for term, first in zip(terms, firsts, strict=True):
        side = int(term.axis)
        state = op.restore((columns_state if side else rows_state)[first:], side)
        (columns if side else rows).append(_finished(int(term.reduction), state))
    return _joined(rows, B, device), _joined(columns, N, device)


def _joined(parts: list[Tensor], length: int, device) -> Tensor:
    if not parts:
        return torch.empty(0, length, dtype=torch.float32, device=device)
    return torch.cat(parts).to(torch.float32)


def _stats_panels(request, op: Operands, packed, codes, slots, entries, states) -> None:
    B, N = request.shape
    config = op.config("stats")

    def cost(rows: int, columns: int) -> int:
        across, down = _tiles(columns, config.block_n) * config.parts, _tiles(rows, config.block_b)
        return 4 * (slots[0] * across * rows + slots[1] * down * columns)

    panel_b, panel_n = panel_shape(B, N, config, request.max_workspace_bytes, cost)
    program = op.header.program(codes, triangle=request.symmetric)
    skips = request.symmetric or op.header.same_only
    for first_b, end_b in _panels(B, panel_b):
        for first_n, end_n in _panels(N, panel_n):
            if request.symmetric and end_n <= first_b:
                continue
            length_b, length_n = end_b - first_b, end_n - first_n
            tiles_b, tiles_n = _tiles(length_b, config.block_b), _tiles(length_n, config.block_n)
            row_partials = _partials(slots[0], tiles_n * config.parts, length_b, op.x.device)
            column_partials = _partials(slots[1], tiles_b, length_n, op.x.device)
            if skips:
                for partials, count, side in ((row_partials, slots[0], 0), (column_partials, slots[1], 1)):
                    if count:
                        _set_neutral(partials.view(count, -1), entries[side])
            launch(
                _stats_kernel, tiles_b * tiles_n, config, *op.tensors(), *packed, row_partials, column_partials,
                *_dimensions(op), first_b, first_n, end_b, end_n,
                PROGRAM=program, **_tile_constants(op, config),
            )  # fmt: skip
            _fold(row_partials, states[0], tiles_n * config.parts, length_b, first_b, entries[0])
            _fold(column_partials, states[1], tiles_b, length_n, first_n, entries[1])


def _finished(reduction: int, state: Tensor) -> Tensor:
    """Running statistics (partials, owners) float64 → the reduction's slots."""
    if reduction in (SUM.value, COUNT.value):
        return state[:1]
    if reduction == MOMENTS.value:
        return torch.cat([state[:2], (state[2] / state[0].clamp_min(1.0))[None], state[3:5]])
    logsumexp = state[0] + state[1].log()
    if reduction == LOGSUMEXP.value:
        return logsumexp[None]
    mean = torch.where(state[1] == 0.0, 0.0, state[2] / state[1])
    return torch.stack([mean, logsumexp])


# --- weights --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _float32_products(x: Tensor, tf32: bool) -> Iterator[None]:
    """GEMMs of float32 in the requested arithmetic, whatever the process-wide setting is."""
    matmul, wanted = torch.backends.cuda.matmul, "tf32" if tf32 else "ieee"
    previous = matmul.fp32_precision
    if not x.is_cuda or x.dtype != torch.float32 or previous == wanted:
        yield
        return
    matmul.fp32_precision = wanted
    try:
        yield
    finally:
        matmul.fp32_precision = previous


def _accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in float32."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


def _half_scale(terms: list, cotangents: list[Tensor | None], device) -> Tensor:
    """(1,) power of two that brings the largest cotangent times scale near `_HALF_RANGE`; 1 if that is not finite."""
    largest = torch.zeros((), dtype=torch.float32, device=device)
    for term, cotangent in zip(terms, cotangents, strict=True):
        if cotangent is None:
            bound = torch.ones((), dtype=torch.float32, device=device)
        else:
            bound = cotangent.abs().amax()
        for value in (term.scale, term.weight if int(term.reduction) == SUM.value else None):
            if isinstance(value, Tensor):
                bound = bound * value.detach().float().abs().amax()
            elif value is not None:
                bound = bound * abs(value)
        largest = torch.maximum(largest, bound)
    scale = torch.exp2(torch.floor(torch.log2(_HALF_RANGE / largest)).clamp(-100.0, 100.0))
    return torch.where(scale.isfinite(), scale, 1.0).reshape(1)


@_on_device
def weights(request, rows: Tensor, columns: Tensor, grad_rows: Tensor, grad_columns: Tensor, needs):
    """Gradients (dx, dy, [dparam, ...]) from the cotangents of the statistics."""
    cotangents, statistics = [], []
    for term in request.terms:
        known, gradient = (columns, grad_columns) if int(term.axis) else (rows, grad_rows)
        reduction = int(term.reduction)
        fixed = reduction in (COUNT.value, MOMENTS.value)
        cotangents.append(None if fixed else gradient[term.slot])
        if reduction == LOGSUMEXP.value:
            statistics.append((None, known[term.slot]))
        elif reduction == SOFTMAX_MEAN.value:
            statistics.append((known[term.slot], known[term.slot + 1]))
        else:
            statistics.append((None, None))
    _, dx, dy, dparams = _gradients(request, cotangents, statistics, needs, with_value=False)
    return dx, dy, dparams


@_on_device
def sums(request, needs):
    """(total, dx, dy, [dparam, ...]) of a pass of sums: S is computed once."""
    if not (needs.x or needs.y or any(needs.params)):
        rows, columns = stats(request)
        total = rows.double().sum() + columns.double().sum()
        return total.to(torch.float32), None, None, [None] * len(request.params)
    nothing = [None] * len(request.terms)
    return _gradients(request, nothing, [(None, None)] * len(request.terms), needs, with_value=True)


def _gradients(request, cotangents, statistics, needs, with_value: bool):
    B, N = request.shape
    device = request.x.device
    op = operands(request, {int(t.mask) for t in request.terms})
    sides = [int(t.axis) for t in request.terms]
    cotangents = [op.arrange(c, s) for c, s in zip(cotangents, sides, strict=True)]
    statistics = [tuple(op.arrange(v, s) for v in pair) for pair, s in zip(statistics, sides, strict=True)]
    terms = _arranged_terms(request, op)
    symmetric, distance = request.symmetric, int(request.similarity) != 0
    parameters = Parameters(device, symmetric)
    codes, diagonal, gradients = weights_codes(
        terms, request, parameters, LOGSUMEXP.value, cotangents, statistics, needs.params, with_value
    )
    need_x, need_y = needs.x, needs.y and not symmetric
    row_sum = column_sum = -1
    if distance and (need_x or need_y):
        row_sum = gradients.take(0)
        column_sum = row_sum if symmetric else gradients.take(1)
    if symmetric:
        gradients.used[1] = gradients.used[0]
    rows_state = torch.zeros(gradients.used[0], B, dtype=torch.float64, device=device)
    columns_state = rows_state if symmetric else torch.zeros(gradients.used[1], N, dtype=torch.float64, device=device)
    dx = torch.zeros(op.x.shape, dtype=torch.float32, device=device) if need_x else None
    dy = torch.zeros(op.y.shape, dtype=torch.float32, device=device) if need_y else None
    scale = _half_scale(terms, cotangents, device) if op.x.dtype == torch.float16 and B and N else None
    scaled = op.header.normalize
    x = unit_rows(op.x) if scaled else op.x
    y = x if symmetric else unit_rows(op.y) if scaled else op.y
    if B and N and codes:
        _weights_panels(
            request, op, parameters.packed(), (codes, diagonal), gradients, (rows_state, columns_state),
            (x, y), (dx, dy), (row_sum, column_sum), scale,
        )  # fmt: skip
    if dx is not None:
        sums_of = rows_state[row_sum] if distance else None
        dx = op.restore(_finished_gradient(dx, x, op.raw_x, request.normalize, sums_of, scale), 0, 0)
    if dy is not None:
        sums_of = columns_state[column_sum] if distance else None
        dy = op.restore(_finished_gradient(dy, y, op.raw_y, request.normalize, sums_of, scale), 1, 0)
    dparams = _parameter_gradients(request, op, gradients, (rows_state, columns_state))
    states = (rows_state, columns_state)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for side, slot in gradients.values:
        total = total + states[side][slot].sum()
    return total.to(torch.float32), dx, dy, dparams


def _weights_panels(request, op, packed, codes, gradients: Gradients, states, xy, dxy, sum_slots, scale) -> None:
    B, N = request.shape
    config = op.config("weights")
    symmetric = request.symmetric
    (x, y), (dx, dy), (row_sum, column_sum) = xy, dxy, sum_slots
    store = dx is not None or dy is not None
    slots, size = gradients.used, op.x.element_size() if store else 0

    def cost(rows: int, columns: int) -> int:
        across, down = _tiles(columns, config.block_n) * config.parts, _tiles(rows, config.block_b)
        return size * rows * columns + 4 * (slots[0] * across * rows + slots[1] * down * columns)

    panel_b, panel_n = panel_shape(B, N, config, request.max_workspace_bytes, cost, square=symmetric, tall=1024)
    width = _round_up(min(panel_n, N), 16)
    workspace = torch.empty(min(panel_b, B) * width if store else 1, dtype=op.x.dtype, device=op.x.device)
    skips = op.header.same_only
    for first_b, end_b in _panels(B, panel_b):
        for first_n, end_n in _panels(N, panel_n):
            if symmetric and first_n < first_b:
                continue
            on_diagonal = symmetric and first_n == first_b
            visible = codes[1] if on_diagonal else codes[0]
            length_b, length_n = end_b - first_b, end_n - first_n
            tiles_b, tiles_n = _tiles(length_b, config.block_b), _tiles(length_n, config.block_n)
            row_partials = _partials(slots[0], tiles_n * config.parts, length_b, op.x.device)
            column_partials = _partials(slots[1], tiles_b, length_n, op.x.device)
            column_slot = -1 if on_diagonal else column_sum
            stride_w = _round_up(length_n, 16)
            panel = workspace[: length_b * stride_w] if store else workspace
            if skips:
                for buffer in (row_partials, column_partials, panel):
                    buffer.zero_()
            launch(
                _weights_kernel, tiles_b * tiles_n, config, *op.tensors(), *packed, row_partials, column_partials,
                panel, packed[1] if scale is None else scale, *_dimensions(op), stride_w,
                first_b, first_n, end_b, end_n,
                PROGRAM=op.header.program(
                    visible, store=store, scaled=scale is not None, row_sum=row_sum, column_sum=column_slot
                ),
                **_tile_constants(op, config),
            )  # fmt: skip
            for side, partials, tiles, length, first in (
                (0, row_partials, tiles_n * config.parts, length_b, first_b),
                (1, column_partials, tiles_b, length_n, first_n),
            ):  # fmt: skip
                extra = (row_sum, column_slot)[side]
                written = written_slots(visible, side) + ((extra,) if extra >= 0 else ())
                entries = tuple(v for slot in written for v in (SUM.value, slot))
                _fold(partials, states[side], tiles, length, first, entries)
            if not store:
                continue
            w = panel.view(length_b, stride_w)[:, :length_n]
            with _float32_products(x, op.kind == "tf32"):
                if dx is not None:
                    _accumulate(dx[first_b:end_b], w, y[first_n:end_n])
                if symmetric and not on_diagonal:
                    _accumulate(dx[first_n:end_n], w.T, x[first_b:end_b])
                if dy is not None:
                    _accumulate(dy[first_n:end_n], w.T, x[first_b:end_b])


def _finished_gradient(
    d: Tensor,  # (rows, D) float32: sum of weights times the other side
    operand: Tensor,  # (rows, D) as the GEMMs read it
    raw: Tensor,  # (rows, D)
    normalize: bool,
    weight_sums: Tensor | None,  # (rows,) for distances
    scale: Tensor | None,  # (1,)
) -> Tensor:
    """The gradient of one side: distances' own term, the scaling of the weights, and the normalisation undone."""
    if weight_sums is not None:
        d = torch.addcmul(d, operand.float(), weight_sums.float()[:, None], value=-1.0)
    if scale is not None:
        d = d / scale
    if normalize:
        inverse, wide = _inverse_norms(raw)[:, None], raw.float()
        # The part along x is removed with x itself: a rounded unit vector would leave a multiple of its error.
        along = (wide * d).sum(1, keepdim=True, dtype=torch.float64)
        along = along / wide.square().sum(1, keepdim=True, dtype=torch.float64)
        # Rows below the smallest norm are divided by a constant, which has no gradient of its own.
        along = torch.where(inverse < 1.0 / _EPSILON, along, 0.0)
        d = (d - wide * along.float()) * inverse.float()
    return d.to(raw.dtype)


def _parameter_gradients(request, op: Operands, gradients: Gradients, states) -> list[Tensor | None]:
    """Each parameter's gradient: the sum over its uses."""
    found: list[Tensor | None] = [None] * len(request.params)
    for index, side, slot in gradients.uses:
        gradient = op.restore(states[side][slot], side)
        if request.params[index].numel() == 1 and gradient.numel() != 1:
            gradient = gradient.sum().reshape(1)
        found[index] = gradient if found[index] is None else found[index] + gradient
    return found


# --- extremes -------------------------------------------------------------------------------------------------------


@_on_device
def mine(request) -> list[tuple[Tensor, Tensor]]:
    """[(values (B, k), indices (B, k)), ...] of the extremes; those with k = 1 share one pass."""
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(request.extremes)
    singles = [e for e, extreme in enumerate(request.extremes) if extreme.k == 1]
    # Equal-label extremes visit few tiles, but only in a pass of their own.
    alone = [e for e in singles if int(request.extremes[e].mask) == _SAME]
    for group in (alone, [e for e in singles if e not in alone]):
        if group:
            for e, result in zip(group, _single(request, [request.extremes[e] for e in group]), strict=True):
                found[e] = result
    for e, extreme in enumerate(request.extremes):
        if extreme.k > 1:
            found[e] = _top_k(request, extreme)
    return found


def _decoded(entries: Tensor, extreme, op: Operands) -> tuple[Tensor, Tensor]:
    """int64 entries (B, k) → values and columns, in the caller's order."""
    missing = entries == _MISSING
    ordered = (entries >> 32).to(torch.int32)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    values = bits.view(torch.float32)
    values = torch.where((entries & 1) == 1, torch.nan, values if extreme.largest else -values)
    values = torch.where(missing, -torch.inf if extreme.largest else torch.inf, values)
    columns = _LAST_COLUMN - ((entries >> 1) & _LAST_COLUMN)
    if op.orders[1] is not None:
        columns = op.orders[1][torch.where(missing, 0, columns)] if op.y.shape[0] else columns
    indices = torch.where(missing, -1, columns)
    return op.restore(values, 0, 0), op.restore(indices, 0, 0)


def _thresholds(extreme, op: Operands):
    moved = {
        name: op.arrange(value, 0)
        for name, value in (("above", extreme.above), ("below", extreme.below))
        if isinstance(value, Tensor)
    }
    return replace(extreme, **moved) if moved else extreme


def _single(request, extremes) -> list[tuple[Tensor, Tensor]]:
    B, N = request.shape
    device, count = request.x.device, len(extremes)
    op = operands(request, {int(e.mask) for e in extremes})
    extremes = [_thresholds(e, op) for e in extremes]
    parameters = Parameters(device, request.symmetric)
    codes = extremes_codes(extremes, request.symmetric, parameters)
    program = op.header.program(codes, triangle=request.symmetric)
    packed = parameters.packed()
    config = op.config("extremes")
    best = torch.full((count, B), _MISSING, dtype=torch.int64, device=device)
    columns_of = int(request.symmetric)

    def cost(rows: int, columns: int) -> int:
        across, down = _tiles(columns, config.block_n) * config.parts, _tiles(rows, config.block_b)
        return 8 * count * (across * rows + columns_of * down * columns)

    panel_b, panel_n = panel_shape(B, N, config, request.max_workspace_bytes, cost) if B and N else (1, 1)
    for first_b, end_b in _panels(B, panel_b):
        for first_n, end_n in _panels(N, panel_n):
            if request.symmetric and end_n <= first_b:
                continue
            length_b, length_n = end_b - first_b, end_n - first_n
            tiles_b, tiles_n = _tiles(length_b, config.block_b), _tiles(length_n, config.block_n)
            row_partials = _partials(count, tiles_n * config.parts, length_b, device, torch.int64)
            column_partials = _partials(count * columns_of, tiles_b, length_n, device, torch.int64)
            if request.symmetric or op.header.same_only:
                row_partials.fill_(_MISSING)
                column_partials.fill_(_MISSING)
            launch(
                _extremes_kernel, tiles_b * tiles_n, config, *op.tensors(), *packed, row_partials, column_partials,
                *_dimensions(op), first_b, first_n, end_b, end_n,
                PROGRAM=program, **_tile_constants(op, config),
            )  # fmt: skip
            for partials, tiles, first, end in (
                (row_partials, tiles_n * config.parts, first_b, end_b), (column_partials, tiles_b, first_n, end_n)
            )[: 1 + columns_of]:  # fmt: skip
                panel = partials.view(count, tiles, end - first).amax(1)
                best[:, first:end] = torch.maximum(best[:, first:end], panel)
    return [_decoded(best[e, :, None], extreme, op) for e, extreme in enumerate(extremes)]


def _top_k(request, extreme) -> tuple[Tensor, Tensor]:
    B, N = request.shape
    device = request.x.device
    op = operands(request, {int(extreme.mask)})
    extreme = _thresholds(extreme, op)
    parameters = Parameters(device, request.symmetric)
    program = op.header.program(extremes_codes([extreme], False, parameters))
    packed = parameters.packed()
    config = op.config("top_k")
    k = extreme.k
    wide = triton.next_power_of_2(k)
    best = torch.full((B, k), _MISSING, dtype=torch.int64, device=device)
    if B and N:
        stripes = max(1, min(_tiles(N, config.block_n), _ENOUGH_PROGRAMS // _tiles(B, config.block_b)))
        per_row = 8 * stripes * wide * 4  # the entries, and as much again twice for sorting
        step = max(_round_up(request.max_workspace_bytes // per_row, config.block_b) - config.block_b, config.block_b)
        for first_b, end_b in _panels(B, step):
            top = _partials(1, 1, (end_b - first_b) * stripes * wide, device, torch.int64)
            launch(
                _top_k_kernel, _tiles(end_b - first_b, config.block_b) * stripes, config, *op.tensors(), *packed,
                top, *_dimensions(op), first_b, end_b, stripes,
                PROGRAM=program, K=k, WIDTH_K=wide, **_tile_constants(op, config),
            )  # fmt: skip
            best[first_b:end_b] = top.view(end_b - first_b, -1).sort(dim=1, descending=True).values[:, :k]
    return _decoded(best, extreme, op)
