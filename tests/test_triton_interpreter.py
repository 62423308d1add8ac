"""Every Triton kernel under Triton's interpreter, on CPU tensors, with tiles so small that each problem has several.

Triton decides at import whether it interprets, so these tests need a process of their own: without TRITON_INTERPRET=1
the one test that runs starts it. The tile of 16 rows by 32 columns is cut in two parts; sizes are one tile, one more,
one less and ragged ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import own_process
import pytest
import support
import test_formulas
import torch
from programs import PROGRAMS, on_sides, only
from support import evaluate, make

import flashpair
from flashpair import (
    Axis,
    Combine,
    Extreme,
    Mask,
    Reduction,
    Score,
    Similarity,
    Term,
    mine,
    operands,
    pair_reduce,
    pair_sum,
    recording,
    use_backend,
)
from flashpair.formulas import Average

triton = pytest.importorskip("triton", reason="no Triton wheel for this platform")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, which sets TRITON_INTERPRET=1")

if INTERPRETED:
    import interpreting
    import triton.language as tl
    from flashpair.kernels import configs, extremes, launch, masks, reductions, scores, stats, tiles, weights
    from triton.runtime import interpreter

    SMALL = configs.TileConfig(16, 32, 16, warps=4, stages=1, parts=2, group=2)

    interpreting.hasten()


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_a_process_of_its_own():
    own_process.run(__file__, TRITON_INTERPRET="1")


#: Tiles of a panel from which on those that a launch serves are listed: always, never.
LISTED = [1, 1 << 30]


def _poisoned(*shape, **options):
    """torch.empty, filled with what must never be read."""
    out = torch.zeros(*shape, **options)
    if out.dtype == torch.bool:
        return out
    return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max // 2)


def _like(tensor, options):
    return {"dtype": tensor.dtype, "device": tensor.device, **options}


@pytest.fixture(autouse=True)
def _small_tiles_in_poisoned_memory(monkeypatch):
    if not INTERPRETED:
        yield
        return
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "empty", _poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape, **k: _poisoned(*shape, **_like(self, k)))
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: _poisoned(t.shape, **_like(t, k)))
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot_in_order)
    with configs.override(SMALL):
        yield


def _dot_in_order(_, a, b, d, *options):
    """A product whose elements are summed in the order of the features, as on a GPU: both passes see one S.

    The interpreter's own asks NumPy's BLAS, which on some processors rounds a tile and its transpose apart.
    """
    product = np.einsum("ik,kj->ij", a.data, b.data, dtype=d.data.dtype, casting="unsafe")
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _shape(side: str, b: int = 33, n: int = 18) -> tuple[int, int | None]:
    return (b, n) if side == "rectangle" else (b, None)


# --- values and gradients ---------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("program", "side"), on_sides(PROGRAMS))
def test_programs(program, side):
    """Every program of the table: all reductions, scores, masks, parameters and similarities."""
    data = make(*_shape(side), 19, grid=program.grid, precision=torch.float32)
    support.compare(program.run, data, "triton", torch.float32)


@interpreted
@test_formulas.every_case
def test_formula(formula, constants, row_slots, column_slots, owners):
    test_formulas.test_every_implementation(formula, constants, row_slots, column_slots, owners, torch.float32)


@interpreted
def test_formulas_of_infinities_and_nan():
    test_formulas.test_infinities_and_nan(torch.float32)
    for average in Average:
        test_formulas.test_anchors_that_lack_something_and_nan(torch.float32, average)


@interpreted
def test_scores_keep_their_digits():
    support.check_scores("triton", torch.float32)


@interpreted
@pytest.mark.parametrize("shape", [(17, 18), (17, 0), (0, 18), (17, None)], ids=str)
def test_sums_of_few_parameters(shape):
    """One or two numbers are summed where they lie, of rows or of columns; what nothing is written to is zero."""

    def run(d):
        column = Term(Reduction.SUM, Score.SOFTPLUS, axis=Axis.COLUMNS, scale=d.scale, offset=d.bias)
        by_column = pair_reduce(**d.pairs, terms=[Term(Reduction.SUM, scale=d.row_scale), column])
        (by_row,) = pair_reduce(**d.pairs, terms=[Term(Reduction.SUM, Score.SOFTPLUS, scale=d.scale)])
        vectors = {"scale": d.row_scale, "offset": d.row_offset}
        terms = [Term(Reduction.COUNT, **vectors), Term(Reduction.SUM, other_offset=d.column_offset)]
        return *by_column, by_row, *pair_reduce(**d.pairs, terms=terms)

    data = make(*shape, 5, precision=torch.float32)
    support.compare(run, data, "triton", torch.float32, ill_conditioned=True)


NARROW = only(
    "clip", "supcon", "multi_similarity", "contrastive", "cacr", "euclidean", "given", "exclude",
    "scalar_of_everything", "softmax_mean_parameters", "moments", "guide_threshold", "guide_weight",
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("program", "side"), on_sides(NARROW))
def test_narrow_inputs(program, side, dtype):
    data = make(*_shape(side, 33, 18), 17, grid=program.grid, precision=dtype)
    support.compare(program.run, data, "triton", dtype)


def _refuse(*args, **kwargs):
    raise AssertionError("decided anew")


def _check_played(run, data_of, dtype, monkeypatch) -> None:
    """The third pass of a kind is played from a recording, with the tensors of its own call."""
    for seed in range(2):
        evaluate(run, data_of(seed).to(dtype), "triton")
    assert recording.recordings
    for module, name in ((launch, "statistics"), (launch.backward, "weights"), (launch.backward, "sums")):
        monkeypatch.setattr(module, name, _refuse)
    support.compare(run, data_of(2), "triton", dtype, ill_conditioned=True)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("program", "side"), on_sides(only("clip", "supcon", "given", "scalar_of_everything")))
def test_played_passes(program, side, dtype, monkeypatch):
    def data_of(seed: int) -> support.Data:
        data = make(*_shape(side, 17, 18), 5, seed=seed, grid=program.grid, precision=dtype)
        data.scale += seed
        return data

    _check_played(program.run, data_of, dtype, monkeypatch)


@interpreted
@pytest.mark.parametrize("side", ["rectangle", "self"])
@pytest.mark.parametrize(("name", "listed"), zip(("nt_xent", "contrastive"), LISTED, strict=True))
def test_played_passes_of_several_panels(name, side, listed, monkeypatch):
    """Sorted by label, with tiles listed or not, and products of the visited tiles."""
    program = only(name)[0]
    if side not in program.sides:
        pytest.skip("a program of the other side")
    monkeypatch.setattr(launch, "LISTED_TILES", listed)
    monkeypatch.setattr(operands, "ORDERED_PAIRS", 0)
    monkeypatch.setattr(launch, "panel_shape", lambda *args, square=False, **_: (32, 32) if square else (32, 64))

    def data_of(seed: int) -> support.Data:
        return make(*_shape(side, 37, 70), 5, "many", seed, grid=program.grid, precision=torch.float32)

    _check_played(program.run, data_of, torch.float32, monkeypatch)


@interpreted
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("side", ["rectangle", "self"])
@pytest.mark.parametrize("k", [1, 3])
def test_played_mining(k, side, bounded, monkeypatch):
    for seed in range(3):
        data = make(*_shape(side, 17, 18), 5, seed=seed, precision=torch.float32).to(torch.float32)
        bounds = {"above": data.row_offset.detach(), "below": 3.5} if bounded else {}
        extremes = [Extreme(Mask.SAME, False, k, **bounds), Extreme(Mask.DIFFERENT, k=k, **bounds)]
        if seed == 2:
            assert recording.recordings
            for name in ("_single", "_top_k"):
                monkeypatch.setattr(launch, name, _refuse)
        found = []
        for backend in ("triton", "reference"):
            with use_backend(backend):
                found.append(mine(**data.pairs, extremes=extremes, similarity=Similarity.EUCLIDEAN))
        for got, want in zip(*found, strict=True):
            assert torch.equal(got.indices, want.indices)
            torch.testing.assert_close(got.values, want.values, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize(
    "shape", [(16, 32, 16), (15, 31, 15), (17, 33, 17), (1, 1, 1), (48, 64, 32), (3, 70, 5)], ids=str
)
@pytest.mark.parametrize("name", ["clip", "sum_parameters", "squared_euclidean"])
def test_sizes_around_a_tile(name, shape):
    data = make(*shape, precision=torch.float32)
    if shape[2] == 1 and name == "clip":
        pytest.skip("normalised numbers have gradient zero, which only float64 tells from an error")
    support.compare(only(name)[0].run, data, "triton", torch.float32, ill_conditioned=True)


@interpreted
@pytest.mark.parametrize("size", [15, 16, 17, 31, 33])
@pytest.mark.parametrize("name", ["supcon", "moments"])
def test_self_similarity_around_a_tile(name, size):
    data = make(size, None, 5, precision=torch.float32)
    support.compare(only(name)[0].run, data, "triton", torch.float32, ill_conditioned=True)


@interpreted
@pytest.mark.parametrize(
    ("sort", "panels"), [("sorted", "whole"), ("sorted", "panels"), ("as they come", "panels")], ids=str
)
@pytest.mark.parametrize(("listed", "labels"), zip(LISTED * 2, ["few", "one", "distinct", "many"], strict=True))
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_terms_of_equal_labels_only(side, labels, listed, sort, panels, monkeypatch):
    """The rows are sorted by label on the way, unless pairs are excluded; the gradients read no tile without a pair."""
    monkeypatch.setattr(launch, "LISTED_TILES", listed)
    if panels == "panels":
        monkeypatch.setattr(launch, "panel_shape", lambda *args, square=False, **_: (32, 32) if square else (32, 64))

    def run(d):
        exclude = None if sort == "sorted" else torch.arange(len(d.x)) // 2
        return pair_reduce(
            **d.pairs,
            exclude=exclude,
            terms=[
                Term(
                    Reduction.LOGSUMEXP, mask=Mask.SAME, scale=d.row_scale, offset=d.row_offset, weight=d.column_weight
                ),
                Term(Reduction.SUM, Score.SOFTPLUS, Mask.SAME, Axis.COLUMNS, d.column_scale, other_offset=d.row_offset),
                Term(Reduction.MOMENTS, mask=Mask.SAME, below=d.row_offset + 0.513),
            ],
            similarity=Similarity.SQUARED_EUCLIDEAN,
        )

    data = make(*_shape(side, 37, 41), 7, labels, precision=torch.float32)
    support.compare(run, data, "triton", torch.float32, ill_conditioned=True)


@interpreted
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_tiles_between_visited_ones_are_not_read(side):
    """Of the column tiles of 32, the first and the last hold pairs of equal labels; excluded pairs forbid sorting."""

    def run(d):
        labels = torch.tensor([0, 1, 0]).repeat_interleave(32)
        columns = {} if side == "self" else {"y": d.y, "ref_labels": labels}
        terms = [Term(Reduction.LOGSUMEXP, mask=Mask.SAME, scale=d.row_scale)]
        return pair_reduce(d.x, terms=terms, labels=labels, exclude=torch.arange(96) - 1, **columns)

    support.compare(run, make(*_shape(side, 96, 96), 7, precision=torch.float32), "triton", torch.float32)


@interpreted
@pytest.mark.parametrize("normalize", [False, True])
def test_not_finite_rows_show_in_gradients_of_equal_labels_only(normalize):
    """As they do in a full product: no entry depends on which tiles were visited."""
    x, labels, found = torch.randn(70, 8), torch.arange(70) // 5, []
    x[5, 2] = torch.nan
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            terms = [Term(Reduction.LOGSUMEXP, mask=Mask.SAME)]
            (value,) = pair_reduce(leaf, terms=terms, labels=labels, normalize=normalize)
        value[value.isfinite()].sum().backward()
        found.append(leaf.grad.isnan())
    assert torch.equal(*found)


SORTED = only(
    "siglip", "supcon", "nt_xent", "multi_similarity", "contrastive", "cacr", "softmax_mean_parameters", "moments",
    "scalar_of_everything",
)  # fmt: skip


@interpreted
@pytest.mark.parametrize(("labels", "listed"), zip(("few", "many"), LISTED, strict=True))
@pytest.mark.parametrize(("program", "side"), on_sides(SORTED))
def test_many_pairs_are_sorted_by_label(program, side, labels, listed, monkeypatch):
    """Which makes most tiles plain; everything comes back in the caller's order."""
    monkeypatch.setattr(launch, "LISTED_TILES", listed)
    monkeypatch.setattr(operands, "ORDERED_PAIRS", 0)
    data = make(*_shape(side, 50, 70), 5, labels, grid=program.grid, precision=torch.float32)
    support.compare(program.run, data, "triton", torch.float32)


@interpreted
@pytest.mark.parametrize("listed", LISTED)
@pytest.mark.parametrize("k", [1, 3])
def test_sorting_leaves_ties_to_the_lowest_column(k, listed, monkeypatch):
    monkeypatch.setattr(launch, "LISTED_TILES", listed)
    monkeypatch.setattr(operands, "ORDERED_PAIRS", 0)
    x, labels = torch.ones(40, 4), 9 - torch.arange(40) // 4
    with use_backend("triton"):
        (found,) = mine(x, extremes=[Extreme(Mask.DIFFERENT, k=k)], labels=labels)
    want = [[j for j in range(40) if labels[j] != labels[i]][:k] for i in range(40)]
    assert found.indices.tolist() == want


@interpreted
@pytest.mark.parametrize(("sort", "masked"), [(False, 6), (True, 4)])
def test_plain_tiles_ask_no_pair_for_its_mask(sort, masked, monkeypatch):
    """Of the 6 tiles of 16 by 32 that hold pairs i <= j, the two off the diagonal, if the labels are in order."""
    asked, real = [], masks.keep_by_place
    monkeypatch.setattr(masks, "keep_by_place", lambda *a, **k: asked.append(1) or real(*a, **k))
    monkeypatch.setattr(operands, "ORDERED_PAIRS", 0 if sort else 1 << 26)
    x, labels = torch.randn(64, 8, requires_grad=True), torch.arange(64) % 32
    with use_backend("triton"):
        pair_reduce(x, terms=[Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT)], labels=labels)
    both_sides_and_parts = 2 * 2
    assert len(asked) == masked * both_sides_and_parts


@interpreted
@pytest.mark.parametrize("name", ["clip", "contrastive", "scalar_of_everything", "given"])
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_panels(name, side, monkeypatch):
    """S in panels of 32 by 64 instead of one: the same numbers, whatever the workspace."""
    program = only(name)[0]
    data = make(*_shape(side, 40, 70), 6, grid=program.grid, precision=torch.float32)
    whole = evaluate(program.run, data.to(torch.float32), "triton")
    monkeypatch.setattr(launch, "panel_shape", lambda *args, square=False, **_: (32, 32) if square else (32, 64))
    cut = evaluate(program.run, data.to(torch.float32), "triton")
    for part, other in zip(cut, whole, strict=True):
        for key, value in part.items():
            support.assert_close(key, value, other[key], 2e-6)


@interpreted
@pytest.mark.parametrize("scale", [0.1, 1000.0, -1000.0])
@pytest.mark.parametrize("name", ["clip", "supcon"])
def test_shared_exponentials(name, scale, monkeypatch):
    """One exponential for rows and columns where the range permits, two where not: equally right either way."""
    program = only(name)[0]
    side = program.sides[0]
    data = make(*_shape(side), 8, precision=torch.float32)
    data.scale.fill_(scale)
    support.compare(program.run, data, "triton", torch.float32, ill_conditioned=True)
    for module in (reductions, weights):
        monkeypatch.setattr(module, "SHARED_RANGE", tl.constexpr(-1.0))
    support.compare(program.run, data, "triton", torch.float32, ill_conditioned=True)


@interpreted
def test_one_tile_of_very_different_rows():
    """A row far below another in its tile keeps its digits: nothing is flushed for the sake of a shared offset."""
    x = torch.zeros(16, 16)
    x[0, 0], x[1, 1] = 200.0, 0.01
    y = torch.eye(32)[:, :16].contiguous()
    terms = [Term(Reduction.LOGSUMEXP), Term(Reduction.LOGSUMEXP, axis=Axis.COLUMNS)]
    with use_backend("triton"):
        found = pair_reduce(x, y, terms)
    s = x.double() @ y.double().T
    for got, want in zip(found, (s.logsumexp(1), s.logsumexp(0)), strict=True):
        support.assert_close("logsumexp", got.double(), want, 2e-7)


@interpreted
@pytest.mark.parametrize("name", ["clip", "lifted", "scalar_of_everything", "moments"])
def test_bitwise_repeatable(name):
    program = only(name)[0]
    data = make(*_shape(program.sides[0]), 9, grid=program.grid, precision=torch.float32)
    first, second = (evaluate(program.run, data.to(torch.float32), "triton") for _ in range(2))
    for part, other in zip(first, second, strict=True):
        for key, value in part.items():
            assert torch.equal(value, other[key]), key


@interpreted
def test_strided_and_expanded_inputs():
    data = make(33, 18, 17, precision=torch.float32)
    x, y = data.x.float(), data.y.float()
    terms = [Term(Reduction.LOGSUMEXP), Term(Reduction.SUM, Score.SQUARE, axis=Axis.COLUMNS)]
    with use_backend("triton"):
        want = pair_reduce(x, y, terms)
        wide = torch.full((66, 40), torch.nan)
        wide[::2, 1:35:2] = x
        for strided in (wide[::2, 1:35:2], x.T.contiguous().T, torch.cat([x, x * torch.nan], 1)[:, :17]):
            for got, expected in zip(pair_reduce(strided, y, terms), want, strict=True):
                assert torch.equal(got, expected)
        rows = pair_reduce(x[:1].expand(33, 17), y, terms)
        repeated = pair_reduce(x[:1].repeat(33, 1), y, terms)
    assert all(torch.equal(a, b) for a, b in zip(rows, repeated, strict=True))


@interpreted
@pytest.mark.parametrize("combine", Combine)
@pytest.mark.parametrize("reduction", [Reduction.SUM, Reduction.LOGSUMEXP, Reduction.SOFTMAX_MEAN])
def test_one_by_one(reduction, combine):
    """Vectors of length one are vectors and numbers at once."""

    def run(d):
        return pair_reduce(
            **d.pairs,
            terms=[
                Term(
                    reduction, scale=d.row_scale, offset=d.row_offset, other_offset=d.column_offset,
                    combine=combine, weight=d.column_weight, above=d.row_offset - 100.0,
                )
            ],
        )  # fmt: skip

    for shape in [(1, 1, 3), (1, 40, 3), (20, 1, 3)]:
        data = make(*shape, precision=torch.float32)
        support.compare(run, data, "triton", torch.float32, ill_conditioned=True)


@interpreted
@pytest.mark.parametrize("needed", ["x", "y", "scale", "row_offset"])
def test_only_what_is_needed(needed):
    """A gradient asked for alone is the one that is found together with all others."""
    program, data = only("scalar_of_everything")[0], make(33, 40, 6, grid=True, precision=torch.float32)
    _, everything = evaluate(program.run, data.to(torch.float32), "triton")
    for name in ("scalar_of_everything", "sum_parameters" if needed == "row_offset" else "clip"):
        program = only(name)[0]
        if needed == "row_offset" and name == "clip":
            continue
        _, everything = evaluate(program.run, data.to(torch.float32), "triton")
        alone = data.to(torch.float32, grad=False)
        getattr(alone, needed).requires_grad_()
        with use_backend("triton"):
            outputs = program.run(alone)
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            loss = sum((o * support.cotangent(k, o)).sum() for k, o in enumerate(outputs))
            (gradient,) = torch.autograd.grad(loss, getattr(alone, needed))
        support.assert_close(needed, gradient.double(), everything[f"d{needed}"], 1e-6)


@interpreted
def test_a_sum_without_gradients_and_empty_sides_launch_nothing_needless(monkeypatch):
    started = []
    real = launch.launch
    monkeypatch.setattr(launch, "launch", lambda kernel, *a, **k: started.append(kernel) or real(kernel, *a, **k))
    x = make(20, None, 4, precision=torch.float32).x.float()
    with use_backend("triton"):
        total = pair_sum(x, terms=[Term(Reduction.SUM, Score.SQUARE)])
        assert launch._weights_kernel not in started
        reference = (x @ x.T).fill_diagonal_(0).square().sum()
        torch.testing.assert_close(total, reference)
        started.clear()
        for b, n in ((0, 5), (5, 0), (0, 0)):
            left = torch.zeros(b, 3, requires_grad=True)
            (lse,) = pair_reduce(left, torch.zeros(n, 3), [Term(Reduction.LOGSUMEXP)])
            assert lse.shape == (b,) and lse.eq(-torch.inf).all()
            lse.sum().backward()
            assert left.grad.eq(0).all()
            mine(left, torch.zeros(n, 3), [Extreme()])
    assert set(started) <= {launch._decode_kernel}  # which says that nothing was found


@interpreted
@pytest.mark.parametrize("kind", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", Reduction)
def test_not_finite_rows_show(reduction, kind):
    if reduction == Reduction.COUNT:
        pytest.skip("a count is of pairs")
    data = make(20, 40, 5, precision=torch.float32)
    x, y = data.x.float(), data.y.float()
    x[17, 2] = kind
    with use_backend("triton"):
        (row,) = pair_reduce(x, y, [Term(reduction)])
    row = row if row.dim() == 1 else row[1]
    assert not row[17].isfinite() and row[:17].isfinite().all() and row[18:].isfinite().all()


@interpreted
def test_scaling_keeps_small_float16_weights():
    """Pair weights of a mean over many rows are below float16's smallest number; they are scaled before rounding."""
    data = make(40, 48, 8, precision=torch.float16)

    def run(d):
        rows, columns = pair_reduce(
            d.x, d.y, [Term(Reduction.LOGSUMEXP), Term(Reduction.LOGSUMEXP, axis=Axis.COLUMNS)], normalize=True
        )
        return (rows + columns[:40]) * 1e-6

    got = data.to(torch.float16)
    with use_backend("triton"):
        (gradient,) = torch.autograd.grad((run(got) * 1e4).sum() * 1e-4, got.x)
    assert gradient.ne(0).float().mean() > 0.5
    wide = data.to(torch.float64)
    with use_backend("reference"):
        (want,) = torch.autograd.grad(run(wide).sum(), wide.x)
    assert (gradient.double() - want).abs().max() < 2**-24


# --- skipping ---------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("listed", LISTED)
def test_tiles_without_pairs_are_not_multiplied(listed, monkeypatch):
    """Below the diagonal of a self-similarity, and where no label of the rows is one of the columns."""
    monkeypatch.setattr(launch, "LISTED_TILES", listed)
    products = []
    for module in (stats, weights, extremes):
        real = module.dot_tile
        monkeypatch.setattr(
            module, "dot_tile", lambda *a, real=real, **k: products.append(1) or real(*a, **k), raising=True
        )
    x = torch.randn(64, 8)
    with use_backend("triton"):
        pair_reduce(x, terms=[Term(Reduction.SUM)])
        assert len(products) == 6  # of 4 x 2 tiles of 16 x 32, those that reach the diagonal or beyond
        products.clear()
        labels = torch.arange(64) % 4  # unsorted classes of 16
        pair_reduce(x, terms=[Term(Reduction.SUM, mask=Mask.SAME)], labels=labels, y=x.clone(), ref_labels=labels)
        assert len(products) == 4
        products.clear()
        mine(x, extremes=[Extreme(Mask.SAME, False)], labels=labels)
        assert len(products) == 4


# --- mining -----------------------------------------------------------------------------------------------------------


def _assert_mined(data, extremes_of, **options):
    with use_backend("triton"):
        found = mine(data.x, data.y, extremes_of, **options)
    with use_backend("reference"):
        want = mine(data.x, data.y, extremes_of, **options)
    for got, expected in zip(found, want, strict=True):
        assert torch.equal(got.indices, expected.indices)
        torch.testing.assert_close(got.values, expected.values, equal_nan=True)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("side", ["rectangle", "self"])
@pytest.mark.parametrize("k", [1, 2, 7, 33])
def test_mine(k, side, dtype, monkeypatch):
    """Many ties, since similarities are multiples of 1/16: the lowest column wins in every tile, stripe and panel."""
    data = make(*_shape(side, 35, 70), 5, grid=True, precision=dtype).to(dtype, grad=False)
    bound = data.row_offset + 0.013
    wanted = [
        Extreme(Mask.ALL, True, k),
        Extreme(Mask.SAME, False, k),
        Extreme(Mask.DIFFERENT, True, k, below=bound),
        Extreme(Mask.NOT_GIVEN, False, k, above=bound),
    ]
    options = {"labels": data.labels, "ref_labels": data.ref_labels, "pair_mask": data.pair_mask}
    _assert_mined(data, wanted, **options)
    monkeypatch.setattr(launch, "panel_shape", lambda *args, **_: (16, 32))
    monkeypatch.setattr(launch, "_ENOUGH_PROGRAMS", 4)
    _assert_mined(data, wanted, exclude=data.exclude, similarity=Similarity.SQUARED_EUCLIDEAN, **options)


@interpreted
@pytest.mark.parametrize("k", [1, 3])
def test_distances_are_compared_by_their_squares(k):
    """And their roots are returned, unless a bound asks for the distances themselves."""
    data = make(*_shape("rectangle", 20, 40), 5, grid=True, precision=torch.float32).to(torch.float32, grad=False)
    for bound in (None, 1.013):
        wanted = [Extreme(k=k, largest=largest, above=bound) for largest in (True, False)]
        _assert_mined(data, wanted, similarity=Similarity.EUCLIDEAN)


@interpreted
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 9])
def test_mine_not_finite(k, largest):
    y = torch.tensor([1.0, -2, torch.nan, 5, torch.inf, -torch.inf, 0, torch.nan, -0.0, 3]).repeat(4)[:, None]
    data = make(18, 40, 1).to(torch.float32, grad=False)
    data.x[:], data.y = 1.0, y
    _assert_mined(data, [Extreme(k=k, largest=largest), Extreme(k=k, largest=largest, above=-1.0, below=4.0)])


@interpreted
def test_mine_fewer_than_wanted():
    data = make(20, 40, 3, "many", precision=torch.float32).to(torch.float32, grad=False)
    options = {"labels": data.labels, "ref_labels": data.ref_labels}
    _assert_mined(data, [Extreme(Mask.SAME, True, 20), Extreme(Mask.SAME, True)], **options)


# --- class heads ------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", ["smoothed", "arc", "curricular", "capped"])
def test_heads(name, blocks, monkeypatch):
    """One pass and several blocks of classes, as a GPU takes them, against the reference."""
    from flashpair import heads

    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 16, generator=g, requires_grad=True) for n in (20, 70))
    bias, labels = torch.randn(70, generator=g, requires_grad=True), torch.randint(0, 70, (20,), generator=g)
    labels[3] = -100
    options = {
        "smoothed": {"bias": bias, "formula": heads.CrossEntropy(0.1, z_loss=0.1)},
        "arc": {"margin": heads.CombinedMargin(16.0)},
        "curricular": {"margin": heads.CurricularFaceMargin(scale=16.0)},
        "capped": {"bias": bias, "softcap": 3.0},
    }[name]
    wanted = (x, weight, bias) if "bias" in options else (x, weight)
    if blocks > 1:
        cut = [slice(0, 32), slice(32, 64), slice(64, 70)]
        monkeypatch.setattr(heads.statistics, "class_blocks", lambda *_: cut)
    found = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            loss = heads.class_loss(x, weight, labels, **options)
            found.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
        if name == "curricular":
            options["margin"].t.zero_()
    for truth, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-5)


@interpreted
def test_a_step_in_the_backward_pass_of_a_head():
    from flashpair import heads

    g = torch.Generator().manual_seed(0)
    head = heads.PartialFC_V2(heads.CombinedMargin(8.0), 16, 50, sample_rate=0.4, generator=g)
    head.fuse(heads.FusedSGD([head.weight], lr=0.1))
    x, labels = torch.randn(6, 16, generator=g, requires_grad=True), torch.arange(6)
    before = head.weight.detach().clone()
    with use_backend("triton"):
        head(x, labels).backward()
    rows = head.sampled
    part = before[rows].requires_grad_()
    with use_backend("reference"):
        margin = heads.CombinedMargin(8.0)
        loss = heads.class_loss(x, part, torch.searchsorted(rows, labels), margin=margin)
        gx, gw = torch.autograd.grad(loss, (x, part))
    torch.testing.assert_close(x.grad, gx, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.weight[rows], before[rows] - 0.1 * gw, rtol=1e-4, atol=1e-5)


# --- the two languages ------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    ("module", "kind"),
    [("scores", Score), ("masks", Mask), ("reductions", Reduction), ("tiles", Similarity), ("reductions", Combine)],
)
def test_numbers_of_the_choices(module, kind):
    module = {"scores": scores, "masks": masks, "reductions": reductions, "tiles": tiles}[module]
    for member in kind:
        if kind != Combine or member.name == "LOGADDEXP":
            assert getattr(module, member.name).value == member.value, member


@interpreted
def test_backend_serves_what_it_says():
    assert flashpair.backends()["triton"] == "usable"
    with (
        use_backend("triton"),
        pytest.raises(flashpair.BackendError, match="float64 is served by cuda"),
    ):
        pair_reduce(torch.zeros(2, 2, dtype=torch.float64), terms=[Term(Reduction.SUM)])


def test_import_leaves_triton_alone():
    code = "import sys, flashpair; flashpair.losses; assert 'triton' not in sys.modules; print('fine')"
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert done.stdout.strip() == "fine", done.stderr


def test_kernels_refuse_to_be_a_package_of_their_own():
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=root, capture_output=True, text=True)
    assert done.returncode != 0 and "flashpair.kernels" in done.stderr
