"""Launchers: parameters packed, kernels started panel by panel, all work in a fixed order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import backward
from ..backward import Backward, accumulate, add_panel
from ..extremes import MISSING, shared_passes
from ..forward import Forward, set_neutral, statistics
from ..operands import Operands, in_precision, on_device, operands
from ..panels import cdiv, empty_partials, panel_shape, panels, round_up
from ..recording import recorded
from ..request import Request
from ..rowwise import Rowwise, padded_length
from ..terms import Extreme, Precision, Reduction, Score, Similarity
from . import configs
from .extremes import _best_kernel, _decode_kernel, _extremes_kernel, _top_k_kernel
from .formulas import CIRCLE, MULTI_SIMILARITY, SUP_CON, TRIPLET, _anchors_kernel, _mean_gap_kernel, _pairs_kernel
from .products import _visited_product_kernel
from .program import (
    GUIDED,
    HEADER,
    LABELLED,
    MIXED,
    SAME_ONLY,
    SYMMETRIC,
    TILES,
    extremes_codes,
    kinds_of_tiles,
    once,
    program,
    statistics_codes,
    weights_codes,
    written_slots,
)
from .reductions import _fold_kernel
from .rowwise import _gradient_kernel, _norms_kernel
from .start import start
from .stats import _stats_kernel
from .tiles import _visited_kernel
from .weights import _weights_kernel

#: Tiles of a panel from which on the few that a launch serves are listed first. A program that only finds that its tile
#: is not served takes the place of one that works, on a multiprocessor that holds one or two.
LISTED_TILES = 2048
#: Owners whose partials, or entries of extremes, one program merges.
FOLDED = 128
#: Programs that fill a GPU; decides into how many stripes a top-k pass cuts its columns.
_ENOUGH_PROGRAMS = 512


def launch(kernel, programs: int, config: configs.TileConfig | None, *args, **constants) -> None:
    """Start a kernel on a 1-D grid; nothing to do is no launch."""
    if programs == 0:
        return
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
        if config.registers is not None and torch.version.hip is None:
            constants["maxnreg"] = config.registers
    start(kernel, programs, args, constants)


def _kind(request: Request) -> str:
    """The arithmetic of the products of tiles."""
    if request.x.dtype != torch.float32:
        return "half"
    return "tf32" if request.precision == Precision.TF32 else "ieee"


def _config(kernel: str, request: Request) -> configs.TileConfig:
    kind = _kind(request)
    arch = configs.architecture(request.x.device)
    if request.extremes:
        crowded, lean = _traits(kernel, request)
    else:
        crowded, lean = once((kernel, request.structure), lambda: _traits(kernel, request))
    # Two accumulators of the larger tile that tf32 has would spill.
    kind = "ieee" if request.guide is not None and kind == "tf32" else kind
    config = configs.choose(kernel, kind, arch, request.x.shape[1], crowded)
    return config if lean or config.plain is None else configs.one_at_once(config)


def _traits(kernel: str, request: Request) -> tuple[bool, bool]:
    """Whether a pass's epilogue holds much at a time, and whether that of plain tiles is known to fit its registers."""
    evaluations = max(len(request.terms), len(request.extremes)) * (1 + int(request.symmetric))
    crowded = request.pair_mask is not None or request.guide is not None or evaluations > configs.MANY_EVALUATIONS
    crowded |= any(term.reduction == Reduction.SOFTMAX_MEAN for term in request.terms)
    return crowded, _is_lean(kernel, request)


#: Scores of few instructions.
_SHORT_SCORES = (Score.IDENTITY, Score.SOFTPLUS, Score.HINGE, Score.SQUARED_HINGE, Score.SQUARE)


def _is_lean(kernel: str, request: Request) -> bool:
    """Whether the epilogue of plain tiles is known to fit `TileConfig.plain`; compiled and read, not derived."""
    if any(term.score not in _SHORT_SCORES for term in request.terms):
        return False
    if kernel in ("stats", "extremes"):
        return True
    parameters = [getattr(term, name) for term in request.terms for name in backward.DIFFERENTIABLE]
    vectors = any(isinstance(value, Tensor) and value.numel() > 1 for value in parameters)
    return not vectors and (request.symmetric or not request.normalize)


def _in_blocks(x: Tensor, block_d: int) -> Tensor:
    """x (rows, D) in whole, aligned blocks of features: kernels would load ragged rows entry by entry."""
    D = x.shape[1]
    if D % block_d == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    out = x.new_zeros(x.shape[0], round_up(D, block_d))
    out[:, :D] = x
    return out


def _inputs(op: Operands, packed: tuple, block_d: int) -> tuple[tuple, tuple[int, ...]]:
    """What every kernel reads, in its order: tensors and `packed` parameters; dimensions and strides."""
    x = _in_blocks(op.x, block_d)
    y = x if op.y is op.x else _in_blocks(op.y, block_d)
    B, N, D = x.shape[0], y.shape[0], x.shape[1]
    tensors = (x, y, op.x_norms, op.y_norms, op.x_labels, op.y_labels, op.exclude, op.exclude, op.pair_mask, *packed)
    return tensors, (N, D, x.stride(0), y.stride(0), padded_length(B), padded_length(N))


def _guide(op: Operands, block_d: int) -> tuple:
    """What the kernels of statistics and weights read of a second product; without one something that is not read."""
    if op.guide is None:
        return op.x, op.x, 0, 0, 0
    u = _in_blocks(op.guide[0], block_d)
    v = u if op.guide[1] is op.guide[0] else _in_blocks(op.guide[1], block_d)
    return u, v, u.shape[1], u.stride(0), v.stride(0)


def _guide_precision(request: Request) -> dict:
    exact = request.guide is not None and request.guide[0].dtype == torch.float32
    return {"GUIDE_PRECISION": "ieee" if exact and request.precision == Precision.IEEE else "tf32"}


#: Whether the kernels are interpreted, which Triton decides when they are defined.
_INTERPRETED = bool(triton.knobs.runtime.interpret)


def _arithmetic(request: Request) -> dict:
    # The interpreter multiplies the bit patterns of bfloat16.
    upcast = request.x.dtype == torch.bfloat16 and _INTERPRETED
    return {"INPUT_PRECISION": "ieee" if _kind(request) == "ieee" else "tf32", "UPCAST": upcast}


def _triangle(request: Request, config: configs.TileConfig) -> tuple[int, ...]:
    """What tells a fold which tiles a pass over a triangle visited."""
    return (config.block_b, config.block_n, config.parts) if request.symmetric else ()


def _fold(
    plan: Forward | Backward,
    panel: tuple[int, ...],  # first_b, first_n, end_b, end_n
    partials: tuple[Tensor, Tensor],
    tiles: tuple[int, int],
    entries: tuple[tuple[int, ...], tuple[int, ...]],  # of owners along rows and columns, as the kernel has them
    triangle: tuple[int, ...] = (),
    joint: bool = False,
    fresh: bool = False,
    finish: bool = False,
) -> None:
    """Merge one panel's partials (slots, tiles, length) of both sides into the running statistics."""
    op = plan.op
    blocks = sum(cdiv(panel[2 + side] - panel[side], FOLDED) for side in (0, 1) if entries[side])
    outs = plan.found if finish else partials
    states = partials if fresh and finish else plan.states
    ordered = finish and op.orders[0] is not None
    launch(
        _fold_kernel, blocks, None, *partials, *states, *(op.orders if ordered else partials), *outs, *tiles, *panel,
        op.x.shape[0], op.y.shape[0], ROWS=entries[0], COLUMNS=entries[1], JOINT=joint, FRESH=fresh, FINISH=finish,
        ORDERED=ordered, TRIANGLE=triangle, BLOCK_T=8, BLOCK=FOLDED,
    )  # fmt: skip


@dataclass
class Visits:
    """Which tiles of a panel a launch serves."""

    listed: Tensor  # (1 + tiles,) int32: how many, and which
    map: Tensor  # (tiles_b, tiles_n) int32: 1 where served
    bounds: tuple[Tensor, Tensor]  # (2, tiles_b), (2, tiles_n) int32, as `_visited_kernel` writes them


def _visits(op: Operands, config: configs.TileConfig, code: tuple[int, ...], panel: tuple[int, ...]) -> Visits:
    tiles_b, tiles_n = cdiv(panel[2] - panel[0], config.block_b), cdiv(panel[3] - panel[1], config.block_n)
    tiles = tiles_b * tiles_n
    lengths = (1 + tiles, tiles, 2 * tiles_b, 2 * tiles_n)
    aligned = [round_up(length, 4) for length in lengths]
    zeros = torch.zeros(sum(aligned), dtype=torch.int32, device=op.x.device).split(aligned)
    listed, visits, *bounds = (z[:length] for z, length in zip(zeros, lengths, strict=True))
    launch(
        _visited_kernel, tiles, None, op.x_labels, op.y_labels, listed, visits, *bounds, *panel,
        PROGRAM=code[: HEADER.value], BLOCK_B=config.block_b, BLOCK_N=config.block_n, GROUP=config.group, num_warps=1,
    )  # fmt: skip
    return Visits(listed, visits.view(tiles_b, tiles_n), tuple(b.view(2, -1) for b in bounds))


def _serve(
    kernel,
    op: Operands,
    config: configs.TileConfig,
    code: tuple[int, ...],  # the program
    panel: tuple[int, ...],  # first_b, first_n, end_b, end_n
    *args,
    visits: Visits | None = None,  # where they are known
    **constants,
) -> None:
    """Start a kernel over the tiles of a panel that its program serves."""
    length_b, length_n = panel[2] - panel[0], panel[3] - panel[1]
    apart = not code[SYMMETRIC.value] and not code[LABELLED.value]
    if code[TILES.value] == MIXED.value and apart and length_b % config.block_b == length_n % config.block_n == 0:
        return  # all tiles are plain
    tiles = cdiv(length_b, config.block_b) * cdiv(length_n, config.block_n)
    few = code[TILES.value] == MIXED.value or code[SAME_ONLY.value]
    # The epilogue of two products has no register to spare for a list.
    listed = few and tiles >= LISTED_TILES and not code[GUIDED.value]
    if listed and visits is None:
        visits = _visits(op, config, code, panel)
    launch(
        kernel, min(tiles, _programs(op.x.device)) if listed else tiles, configs.of_tiles(config, code[TILES.value]),
        *args, visits.listed if listed else op.x_labels, *panel, PROGRAM=code, LISTED=listed, **constants,
    )  # fmt: skip


@functools.cache
def _programs(device: torch.device) -> int:
    """Programs that walk a list of tiles: two to a multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


# --- rows -----------------------------------------------------------------------------------------------------------


def _by_rows(rows: int, D: int) -> tuple[int, dict[str, int]]:
    """(programs, shape of a program's tile)."""
    block_d = min(triton.next_power_of_2(max(D, 16)), 1024)
    shape = {"ROWS": max(1, 2048 // block_d), "BLOCK_D": block_d}
    return cdiv(rows, shape["ROWS"]), shape


def _norms(x: Tensor, normalize: bool, squared: bool) -> Tensor:
    """`rowwise.norms`."""
    length = padded_length(x.shape[0])
    if not normalize and not squared:
        return x.new_empty(2, 1, dtype=torch.float32)  # not read
    out = x.new_empty(2, length, dtype=torch.float32)
    programs, shape = _by_rows(length, x.shape[1])
    launch(
        _norms_kernel, programs, None, x, out, x, x.stride(0), 0, x.shape[1], x.shape[0], length,
        NORMALIZE=normalize, SQUARED=squared, UNIT=False, **shape,
    )  # fmt: skip
    return out


def _unit_rows(x: Tensor) -> Tensor:
    """`rowwise.unit_rows`."""
    out = x.new_empty(x.shape)
    programs, shape = _by_rows(*x.shape)
    launch(
        _norms_kernel, programs, None, x, x, out, x.stride(0), out.stride(0), x.shape[1], x.shape[0], 0,
        NORMALIZE=True, SQUARED=False, UNIT=True, **shape,
    )  # fmt: skip
    return out


def _gradient(
    d: Tensor, operand: Tensor, raw: Tensor, normalize: bool, weight_sums: Tensor | None, scale: Tensor | None
) -> Tensor:
    """`rowwise.gradient`."""
    if not normalize and weight_sums is None and scale is None:
        return d.to(raw.dtype)
    out = raw.new_empty(raw.shape)
    programs, shape = _by_rows(*raw.shape)
    launch(
        _gradient_kernel, programs, None, d, operand, raw, d if weight_sums is None else weight_sums,
        d if scale is None else scale, out, d.stride(0), operand.stride(0), raw.stride(0), out.stride(0),
        raw.shape[1], raw.shape[0],
        NORMALIZE=normalize, DISTANCE=weight_sums is not None, SCALED=scale is not None, **shape,
    )  # fmt: skip
    return out


#: How the passes around these kernels read their operands.
_OWN = {"plain_tiles": True, "rowwise": Rowwise(_norms, _unit_rows, _gradient)}


# --- statistics -----------------------------------------------------------------------------------------------------


@on_device
@recorded
def stats(request: Request) -> tuple[Tensor, Tensor]:
    """Statistics of all terms: rows (R, B) and columns (C, N), float32."""
    return statistics(request, _stats_panels, **_OWN)


def _folded(plan: Forward, symmetric: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a fold merges for owners along the rows and the columns."""
    entries = ([], [])
    for term, first in zip(plan.terms, plan.firsts, strict=True):
        side = 0 if symmetric else int(term.axis)
        entries[side].extend((int(term.reduction), first, int(term.axis), term.slot))
    return tuple(entries[0]), tuple(entries[1])


def _stats_panels(request: Request, plan: Forward) -> None:
    op, slots = plan.op, plan.slots
    B, N = request.shape
    config = _config("stats", request)
    codes, layout = statistics_codes(request, plan)
    packed = layout.packed(op.x.device, lambda t, name: getattr(plan.terms[t], name))
    inputs, dimensions = _inputs(op, packed, config.block_d)
    guide = _guide(op, config.block_d)

    def cost(rows: int, columns: int) -> int:
        across, down = cdiv(columns, config.block_n) * config.parts, cdiv(rows, config.block_b)
        return 4 * (slots[0] * across * rows + slots[1] * down * columns)

    panel_b, panel_n = panel_shape(B, N, config.block_b, config.block_n, request.max_workspace_bytes, cost)
    triangle, folded = _triangle(request, config), _folded(plan, request.symmetric)
    one = panel_b >= B and panel_n >= N
    if not one:
        plan.set_neutral()
    partials = op.x, op.x
    for first_b, end_b in panels(B, panel_b):
        for first_n, end_n in panels(N, panel_n):
            if request.symmetric and end_n <= first_b:
                continue
            panel = (first_b, first_n, end_b, end_n)
            length_b, length_n = end_b - first_b, end_n - first_n
            tiles_b, tiles_n = cdiv(length_b, config.block_b), cdiv(length_n, config.block_n)
            tiles = tiles_n * config.parts, tiles_b
            partials = (
                empty_partials(slots[0], tiles[0], length_b, op.x.device),
                empty_partials(slots[1], tiles[1], length_n, op.x.device),
            )
            if op.same_only:
                for side in (0, 1):
                    if slots[side]:
                        set_neutral(partials[side].view(slots[side], -1), plan.entries[side])
            for kind in kinds_of_tiles(request, op):
                code = program(request, op, codes, triangle=request.symmetric, tiles=kind)
                _serve(
                    _stats_kernel, op, config, code, panel, *inputs, *partials, *dimensions, *guide,
                    **_arithmetic(request), **_guide_precision(request),
                )  # fmt: skip
            if one:
                _fold(plan, panel, partials, tiles, folded, triangle, request.symmetric, fresh=True, finish=True)
            elif request.symmetric:  # an owner may be on both sides: one after the other
                _fold(plan, panel, partials, tiles, folded, triangle)
                _fold(plan, panel, partials, tiles, folded[::-1], triangle)
            else:
                _fold(plan, panel, partials, tiles, folded)
    if not one:
        _fold(plan, (0, 0, B, N), partials, (0, 0), folded, finish=True)


# --- formulas ---------------------------------------------------------------------------------------------------------


#: `flashpair.formulas` of anchors, and those that are means over pairs with how many of them they add up.
_OF_ANCHORS = {"sup_con": SUP_CON, "multi_similarity": MULTI_SIMILARITY, "circle": CIRCLE, "triplet": TRIPLET}
_OF_PAIRS = {"mean_of_pairs": 1, "means_of_pairs": 2}


def formula(
    name: str, rows: Tensor, columns: Tensor, counts: Tensor | None, constants: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a closed formula, and its derivative in both statistics."""
    loss, of_rows, of_columns = rows.new_empty(()), torch.empty_like(rows), torch.empty_like(columns)
    given, numbers = [rows, columns], ()
    if name not in ("mean_gap", "mean_gap_of_both"):
        given.append(rows if counts is None else counts.contiguous())
    if name in _OF_ANCHORS:
        kernel, options = _anchors_kernel, {"FORMULA": _OF_ANCHORS[name].value, "AVERAGE": int(constants[0])}
        numbers = (*map(float, constants[1:]), 1.0, 1.0, 1.0)[:3]
    elif name in _OF_PAIRS:
        kernel, options = _pairs_kernel, {"PARTS": _OF_PAIRS[name]}
    else:
        kernel, options = _mean_gap_kernel, {"BOTH": name == "mean_gap_of_both"}
    with torch.cuda.device_of(rows):
        launch(
            kernel, 1, None, *given, loss, of_rows, of_columns, rows.shape[1], columns.shape[1], *numbers, **options,
            ROW_SLOTS=rows.shape[0], COLUMN_SLOTS=columns.shape[0], BLOCK=1024, num_warps=8,
        )  # fmt: skip
    return loss, of_rows, of_columns


# --- weights --------------------------------------------------------------------------------------------------------


@on_device
@in_precision
@recorded
def weights(request: Request, rows: Tensor, columns: Tensor, grad_rows: Tensor, grad_columns: Tensor, needs):
    """Gradients (dx, dy, [dparam, ...]) from the cotangents of the statistics."""
    return backward.weights(request, rows, columns, grad_rows, grad_columns, needs, _weights_panels, **_OWN)


@on_device
@in_precision
@recorded
def sums(request: Request, needs):
    """(total, dx, dy, [dparam, ...]) of a pass of sums: S is computed once."""
    return backward.sums(request, needs, stats, _weights_panels, **_OWN)


def _weights_panels(request: Request, plan: Backward) -> None:
    B, N = request.shape
    op, slots = plan.op, plan.slots.used
    symmetric, device = request.symmetric, op.x.device
    config = _config("weights", request)
    codes, diagonal, layout = weights_codes(request, plan)
    packed = layout.packed(device, plan.tensor)
    inputs, dimensions = _inputs(op, packed, config.block_d)
    guide = _guide(op, config.block_d)
    store = plan.dx is not None or plan.dy is not None
    size = op.x.element_size() if store else 0

    def cost(rows: int, columns: int) -> int:
        across, down = cdiv(columns, config.block_n) * config.parts, cdiv(rows, config.block_b)
        return size * rows * columns + 4 * (slots[0] * across * rows + slots[1] * down * columns)

    panel_b, panel_n = panel_shape(
        B, N, config.block_b, config.block_n, request.max_workspace_bytes, cost, square=symmetric, tall=1024
    )
    one = panel_b >= B and panel_n >= N
    workspace = torch.empty(
        min(panel_b, B) * round_up(min(panel_n, N), 16) if store else 1, dtype=op.x.dtype, device=device
    )
    for first_b, end_b in panels(B, panel_b):
        for first_n, end_n in panels(N, panel_n):
            if symmetric and first_n < first_b:
                continue
            on_diagonal = symmetric and first_n == first_b
            visible = diagonal if on_diagonal else codes
            length_b, length_n = end_b - first_b, end_n - first_n
            tiles_b, tiles_n = cdiv(length_b, config.block_b), cdiv(length_n, config.block_n)
            row_partials = empty_partials(slots[0], tiles_n * config.parts, length_b, device)
            column_partials = empty_partials(slots[1], tiles_b, length_n, device)
            column_sum = -1 if on_diagonal else plan.column_sum
            stride_w = round_up(length_n, 16)
            panel = workspace[: length_b * stride_w] if store else workspace
            if op.same_only:
                row_partials.zero_()
                column_partials.zero_()
            visits = None
            for kind in kinds_of_tiles(request, op):
                code = program(
                    request, op, visible, store=store, scaled=plan.scale is not None,
                    row_sum=plan.row_sum, column_sum=column_sum, tiles=kind,
                )  # fmt: skip
                if op.same_only and store:
                    visits = _visits(op, config, code, (first_b, first_n, end_b, end_n))
                _serve(
                    _weights_kernel, op, config, code, (first_b, first_n, end_b, end_n), *inputs, row_partials,
                    column_partials, panel, packed[1] if plan.scale is None else plan.scale, *dimensions, *guide,
                    stride_w, visits=visits, **_arithmetic(request), **_guide_precision(request),
                )  # fmt: skip
            written = written_slots(visible, 0, plan.row_sum), written_slots(visible, 1, column_sum)
            folded = tuple(tuple(v for slot in of for v in (int(Reduction.SUM), slot, 0, 0)) for of in written)
            if one:
                plan.sums.written = tuple(map(set, (written[0] + written[1],) * 2 if symmetric else written))
            elif first_b == first_n == 0:
                plan.sums.flat.zero_()
            tiles = tiles_n * config.parts, tiles_b
            _fold(plan, (first_b, first_n, end_b, end_n), (row_partials, column_partials), tiles, folded, fresh=one)
            if store:
                w = panel.view(length_b, stride_w)[:, :length_n]
                multiply = accumulate if visits is None else _visited_product(request, config, visits)
                add_panel(plan, w, first_b, first_n, symmetric and not on_diagonal, multiply)


def _visited_product(
    request: Request, config: configs.TileConfig, visits: Visits
) -> Callable[[Tensor, Tensor, Tensor, bool, bool], None]:
    """`backward.accumulate` for a panel of which only the visited tiles were written."""

    def multiply(out: Tensor, w: Tensor, operand: Tensor, transposed: bool, fresh: bool) -> None:
        block, blocks = (config.block_n, config.block_b) if transposed else (config.block_b, config.block_n)
        own_tiles, tiles = visits.map.shape[::-1] if transposed else visits.map.shape
        bounds = visits.bounds[int(transposed)]
        features = 64
        nothing = (operand * 0).sum(0, dtype=out.dtype)  # what is not finite shows in every row, as in a full product
        if fresh:
            out.copy_(nothing.expand_as(out))
        else:
            out += nothing
        launch(
            _visited_product_kernel, own_tiles * cdiv(out.shape[1], features), None, w, operand, out, visits.map,
            bounds[0], bounds[1], w.stride(0), operand.stride(0), out.stride(0), out.shape[1], out.shape[0],
            operand.shape[0], tiles, own_tiles, TRANSPOSED=transposed, BLOCK=block, BLOCKS=blocks,
            BLOCK_K=min(blocks, 128 // operand.element_size()), BLOCK_F=features,
            num_warps=8 if block > 128 else 4, num_stages=3, **_arithmetic(request),
        )  # fmt: skip

    return multiply


# --- extremes -------------------------------------------------------------------------------------------------------


@on_device
@recorded
def mine(request: Request) -> list[tuple[Tensor, Tensor]]:
    """[(values (B, k), indices (B, k)), ...] of the extremes; those with k = 1 share one pass."""
    found = {}
    for group in shared_passes(request.extremes):
        found |= dict(zip(group, _single(request, [request.extremes[e] for e in group]), strict=True))
    for e, extreme in enumerate(request.extremes):
        if extreme.k > 1:
            found[e] = _top_k(request, extreme)
    return [found[e] for e in range(len(request.extremes))]


def _by_squares(request: Request, extremes: list[Extreme]) -> bool:
    """Whether only the distances found need a root: they are in the order of their squares; thresholds are not."""
    bounded = any(e.above is not None or e.below is not None for e in extremes)
    return request.similarity == Similarity.EUCLIDEAN and not bounded


def _single(request: Request, extremes: list[Extreme]) -> list[tuple[Tensor, Tensor]]:
    B, N = request.shape
    device, count = request.x.device, len(extremes)
    op = operands(request, {e.mask for e in extremes}, **_OWN)
    extremes = [op.arranged_extreme(e) for e in extremes]
    codes, layout = extremes_codes(extremes, request.symmetric)
    packed = layout.packed(device, lambda e, name: getattr(extremes[e], name))
    config = _config("extremes", request)
    by_squares = _by_squares(request, extremes)
    inputs, dimensions = _inputs(op, packed, config.block_d)
    places = op.places()
    columns_of, triangle = int(request.symmetric), _triangle(request, config)

    def cost(rows: int, columns: int) -> int:
        across, down = cdiv(columns, config.block_n) * config.parts, cdiv(rows, config.block_b)
        return 8 * count * (across * rows + columns_of * down * columns)

    panel_b, panel_n = (1, 1)
    if B and N:
        panel_b, panel_n = panel_shape(B, N, config.block_b, config.block_n, request.max_workspace_bytes, cost)
    one = 0 < B <= panel_b and 0 < N <= panel_n
    best = torch.empty(count, B, dtype=torch.int64, device=device)
    if not one:
        best.fill_(MISSING)
    for first_b, end_b in panels(B, panel_b):
        for first_n, end_n in panels(N, panel_n):
            if request.symmetric and end_n <= first_b:
                continue
            length_b, length_n = end_b - first_b, end_n - first_n
            tiles_b, tiles_n = cdiv(length_b, config.block_b), cdiv(length_n, config.block_n)
            row_partials = empty_partials(count, tiles_n * config.parts, length_b, device, torch.int64)
            column_partials = empty_partials(count * columns_of, tiles_b, length_n, device, torch.int64)
            if op.same_only:
                row_partials.fill_(MISSING)
                column_partials.fill_(MISSING)
            for kind in kinds_of_tiles(request, op):
                code = program(
                    request, op, codes, triangle=request.symmetric, tiles=kind, squares=by_squares
                )  # fmt: skip
                _serve(
                    _extremes_kernel, op, config, code, (first_b, first_n, end_b, end_n), *inputs, *places,
                    row_partials, column_partials, *dimensions, **_arithmetic(request),
                )  # fmt: skip
            panel = (first_b, first_n, end_b, end_n)
            _merge(0, row_partials, best, tiles_n * config.parts, panel, one, triangle)
            if request.symmetric:
                _merge(1, column_partials, best, tiles_b, panel, False, triangle)
    return [_decoded(best[e, :, None], extreme.largest, by_squares, op) for e, extreme in enumerate(extremes)]


def _merge(
    side: int,
    partials: Tensor,
    best: Tensor,
    tiles: int,
    panel: tuple[int, ...],  # first_b, first_n, end_b, end_n
    fresh: bool,
    triangle: tuple[int, ...],
) -> None:
    """Merge one panel's entries (count, tiles, length) into the best (count, rows) of a side."""
    first, length = panel[side], panel[2 + side] - panel[side]
    launch(
        _best_kernel, cdiv(length, FOLDED), None, partials, best, tiles, length, first, best.shape[1], panel[0],
        panel[1], panel[3], COUNT=best.shape[0], FRESH=fresh, SIDE=side, TRIANGLE=triangle, BLOCK_T=8, BLOCK=FOLDED,
    )  # fmt: skip


def _decoded(entries: Tensor, largest: bool, squares: bool, op: Operands) -> tuple[Tensor, Tensor]:
    """(values (rows, k) float32, columns int64) of entries (rows, k) in the caller's order; -1: none."""
    values, indices = entries.new_empty(entries.shape, dtype=torch.float32), entries.new_empty(entries.shape)
    order, block = op.orders[0], 256
    launch(
        _decode_kernel, cdiv(entries.numel(), block), None, entries, entries if order is None else order, values,
        indices, entries.numel(), K=entries.shape[1], LARGEST=largest, SQUARES=squares, ORDERED=order is not None,
        BLOCK=block,
    )  # fmt: skip
    return values, indices


def _top_k(request: Request, extreme: Extreme) -> tuple[Tensor, Tensor]:
    B, N = request.shape
    device = request.x.device
    op = operands(request, {extreme.mask}, **_OWN)
    extreme = op.arranged_extreme(extreme)
    codes, layout = extremes_codes([extreme], False)
    packed = layout.packed(device, lambda _, name: getattr(extreme, name))
    config = _config("top_k", request)
    by_squares = _by_squares(request, [extreme])
    inputs, dimensions = _inputs(op, packed, config.block_d)
    places = op.places()
    k = extreme.k
    wide = triton.next_power_of_2(k)
    best = torch.full((B, k), MISSING, dtype=torch.int64, device=device)
    if B and N:
        stripes = max(1, min(cdiv(N, config.block_n), _ENOUGH_PROGRAMS // cdiv(B, config.block_b)))
        per_row = 8 * stripes * wide * 4  # the entries, and as much again twice for sorting
        step = max(round_up(request.max_workspace_bytes // per_row, config.block_b) - config.block_b, config.block_b)
        for first_b, end_b in panels(B, step):
            top = empty_partials(1, 1, (end_b - first_b) * stripes * wide, device, torch.int64)
            launch(
                _top_k_kernel, cdiv(end_b - first_b, config.block_b) * stripes, config, *inputs, *places, top,
                *dimensions, first_b, end_b, stripes,
                PROGRAM=program(request, op, codes, squares=by_squares), K=k, WIDTH_K=wide, **_arithmetic(request),
            )  # fmt: skip
            best[first_b:end_b] = top.view(end_b - first_b, -1).sort(dim=1, descending=True).values[:, :k]
    return _decoded(best, extreme.largest, by_squares, op)
