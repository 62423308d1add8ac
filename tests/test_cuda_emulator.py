"""The CUDA kernels, compiled for the host and run by the emulator of `cpp/emulator.h` on CPU tensors.

Which library the backend loads is decided once, so these tests need a process of their own: without
FLASHPAIR_CUDA_LIBRARY the first tests build the emulated library and start it, once plainly and once under
AddressSanitizer and UndefinedBehaviourSanitizer, which see every access of the kernels. A tile of S has 32 rows (16 in
float64, 128 in the fused form) and 128 columns.
"""

from __future__ import annotations

import os
import subprocess
import weakref
from pathlib import Path

import emulated
import own_process
import pytest
import support
import torch
from programs import LSE, PROGRAMS, SUM, on_sides, only
from support import compare, evaluate, make

import flashpair
from flashpair import (
    Axis,
    Extreme,
    Guide,
    Mask,
    Reduction,
    Score,
    Term,
    backend_cuda,
    mine,
    pair_reduce,
    pair_sum,
    use_backend,
)

EMULATED = "FLASHPAIR_CUDA_LIBRARY" in os.environ
alone = pytest.mark.skipif(not EMULATED, reason="runs in a process of its own, which sets FLASHPAIR_CUDA_LIBRARY")
starts = pytest.mark.skipif(EMULATED, reason="this is that process")
possible = pytest.mark.skipif(bool(emulated.OBSTACLE), reason=emulated.OBSTACLE)
#: Files whose tests take every usable backend.
SHARED = ("test_recipes.py", "test_miners.py", "test_losses_definition.py")
HALVES = (torch.float16, torch.bfloat16)


@starts
@possible
def test_in_a_process_of_its_own(tmp_path):
    own_process.run(__file__, *SHARED, "-k", "cuda", FLASHPAIR_CUDA_LIBRARY=str(emulated.build(tmp_path)))


@starts
@possible
def test_under_sanitizers(tmp_path):
    library = emulated.build(tmp_path, ("-O1", "-g", *emulated.SANITIZERS))
    runtimes = [
        subprocess.run([emulated.COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("the compiler has no sanitizer runtimes")
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "LD_PRELOAD": " ".join(runtimes),
        "FLASHPAIR_CUDA_LIBRARY": str(library),
    }
    # Not captured: a report would be lost with the process.
    own_process.run(__file__, "--capture=no", "-k", "cuda and sanitized", **options)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    if EMULATED:
        torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def _shape(side: str, b: int, n: int) -> tuple[int, int | None]:
    return (b, n) if side == "rectangle" else (b, None)


# --- values and gradients ---------------------------------------------------------------------------------------------


@alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_cuda_gradients_of_numbers_have_memory_of_their_own(dtype):
    """Of three numbers that a pass sums none is a view of the others, whatever is done to them in place."""
    x = torch.randn(9, 5, dtype=dtype, requires_grad=True)
    numbers = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.5, -0.5, 0.25)]
    scale, offset, other = numbers
    terms = [
        Term(Reduction.SUM, Score.SOFTPLUS, scale=scale, offset=offset),
        Term(Reduction.SUM, Score.SQUARE, scale=other),
    ]
    found = []
    for backend in ("cuda", "reference"):
        with use_backend(backend):
            loss = pair_sum(x, terms=terms)
            loss += 1.0
            gradients = torch.autograd.grad(loss, numbers)
            of_rows = torch.autograd.grad(torch.stack(pair_reduce(x, terms=terms)).sum(), numbers)
        found.append([loss.detach(), *gradients, *of_rows])
    assert len({value.untyped_storage().data_ptr() for value in found[0]}) == 7
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("program", "side"), on_sides(PROGRAMS))
def test_programs(program, side, dtype):
    """Every program of the table: all reductions, scores, masks, parameters and similarities."""
    data = make(*_shape(side, 37, 131), 19, grid=program.grid, precision=torch.float32)
    compare(program.run, data, "cuda", dtype)


@alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_scores_keep_their_digits(dtype):
    support.check_scores("cuda", dtype)


NARROW = only(
    "clip", "supcon", "multi_similarity", "contrastive", "cacr", "euclidean", "given", "scalar_of_everything",
    "softmax_mean_parameters", "moments", "maxima", "thresholds", "guide_weight",
)  # fmt: skip


@alone
@pytest.mark.parametrize("form", ["simple", "fused"])
@pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("program", "side"), on_sides(NARROW))
def test_narrow_inputs(program, side, dtype, form):
    """S from the vendor's product, and S from the kernels' own."""
    data = make(*_shape(side, 133, 30), 41, grid=program.grid, precision=dtype)
    with backend_cuda.form(form):
        compare(program.run, data, "cuda", dtype)


@alone
@pytest.mark.parametrize("rows", [1, 31, 32, 33])
@pytest.mark.parametrize("columns", [1, 127, 128, 129])
def test_sizes_around_a_tile_sanitized(rows, columns):
    for name in ("sum_parameters", "squared_euclidean"):
        data = make(rows, columns, 5, precision=torch.float32)
        compare(only(name)[0].run, data, "cuda", torch.float32, ill_conditioned=True)


@alone
@pytest.mark.parametrize("shape", [(1, 1, 1), (127, 129, 31), (128, 128, 32), (129, 127, 33), (5, 3, 200)], ids=str)
def test_sizes_around_a_fused_tile_sanitized(shape):
    data = make(*shape, precision=torch.bfloat16)
    with backend_cuda.form("fused"):
        compare(only("sum_parameters")[0].run, data, "cuda", torch.bfloat16, ill_conditioned=True)


@alone
@pytest.mark.parametrize("size", [1, 31, 32, 33, 129])
@pytest.mark.parametrize("name", ["supcon", "moments", "maxima", "given"])
def test_self_similarity_around_a_tile_sanitized(name, size):
    data = make(size, None, 5, precision=torch.float32)
    compare(only(name)[0].run, data, "cuda", torch.float32, ill_conditioned=True)


@alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_many_panels(side, dtype):
    """A workspace of 1 MiB holds a part of S only; statistics and sums are merged over the panels."""

    def run(d):
        terms = [
            Term(LSE, scale=d.row_scale, other_offset=d.column_offset),
            Term(SUM, Score.SOFTPLUS, Mask.SAME, Axis.COLUMNS, scale=d.scale),
            Term(Reduction.SOFTMAX_MEAN, mask=Mask.DIFFERENT),
            Term(Reduction.MOMENTS, axis=Axis.COLUMNS),
            Term(Reduction.MAX, mask=Mask.SAME, scale=-d.row_scale, offset=-4.0),
            Term(Reduction.MAX, Score.SQUARE, axis=Axis.COLUMNS),
        ]
        return pair_reduce(**d.pairs, terms=terms, max_workspace_bytes=1 << 20)

    with backend_cuda.form("simple"):
        compare(run, make(*_shape(side, 600, 530), 6, precision=dtype), "cuda", dtype)


@alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_workspace_is_a_bound(side, dtype, monkeypatch):
    """Panels of S and W, partials and lists of the best: what the driver of the kernels holds at a time."""
    live, peak, empty = [0], [0], torch.empty

    def counted(*shape, **options):
        out = empty(*shape, **options)
        size = out.numel() * out.element_size()
        live[0] += size
        peak[0] = max(peak[0], live[0])
        weakref.finalize(out, lambda: live.__setitem__(0, live[0] - size))
        return out

    d, budget = make(*_shape(side, 510, 700), 3).to(dtype), 1 << 20
    terms = [
        Term(LSE, scale=d.row_scale, other_offset=d.column_offset),
        Term(SUM, Score.SQUARE, weight=d.column_weight),
    ]
    monkeypatch.setattr(torch, "empty", counted)
    with use_backend("cuda"), backend_cuda.form("simple"):
        outputs = pair_reduce(**d.pairs, terms=terms, max_workspace_bytes=budget)
        sum(o.sum() for o in outputs).backward()
        mine(**d.pairs, extremes=[Extreme(), Extreme(k=3)], max_workspace_bytes=budget)
    assert budget / 4 < peak[0] <= budget


@alone
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_more_terms_than_a_pass_takes(side):
    def run(d):
        terms = [Term(SUM, Score.SOFTPLUS, scale=0.1 * (k + 1), weight=d.column_weight) for k in range(19)]
        return pair_reduce(**d.pairs, terms=terms)

    compare(run, make(*_shape(side, 9, 7), 4, precision=torch.float32), "cuda", torch.float32)


@alone
def test_sums_of_more_parameters_than_a_block_gathers():
    """In the fused form, whose tile leaves shared memory for the sums of a few columns only."""

    def run(d):
        options = {"scale": d.column_scale, "offset": d.column_offset}
        return (pair_sum(**d.pairs, terms=[Term(SUM, Score.SOFTPLUS, axis=Axis.COLUMNS, **options)] * 16),)

    with backend_cuda.form("fused"):
        compare(run, make(9, 7, 4, precision=torch.bfloat16), "cuda", torch.bfloat16)


@alone
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_labels_of_columns_may_begin_anywhere(rows):
    """Ranks of both sides come from one array; those of the columns are read four at a time."""

    def run(d):
        return pair_reduce(**d.pairs, terms=[Term(LSE, mask=Mask.DIFFERENT), Term(SUM, mask=Mask.SAME)])

    compare(run, make(rows, 256, 4, precision=torch.float32), "cuda", torch.float32)


@alone
@pytest.mark.parametrize("labels", ["few", "one", "distinct", "many"])
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_terms_of_equal_labels_only(side, labels):
    """Rows are sorted by label on the way, tiles without a pair of equals are skipped."""

    def run(d):
        terms = [
            Term(LSE, mask=Mask.SAME, scale=d.row_scale, offset=d.row_offset, weight=d.column_weight),
            Term(SUM, Score.SOFTPLUS, Mask.SAME, Axis.COLUMNS, d.column_scale, other_offset=d.row_offset),
            Term(Reduction.MOMENTS, mask=Mask.SAME, below=d.row_offset + 0.513),
            Term(Reduction.MAX, mask=Mask.SAME, scale=-1.0, offset=-1.0),
            Term(Reduction.MAX, mask=Mask.SAME, axis=Axis.COLUMNS, scale=-1.0, offset=-1.0),
            Term(Reduction.MAX, mask=Mask.SAME, scale=-d.row_scale, below=d.row_offset + 0.513),
        ]
        return pair_reduce(**d.pairs, terms=terms, similarity=flashpair.Similarity.SQUARED_EUCLIDEAN)

    compare(run, make(*_shape(side, 150, 260), 4, labels, precision=torch.float32), "cuda", torch.float32)


def _maxima(d: support.Data) -> list[Term]:
    """Nearly all below 0, so that zeros of what is not kept would win; some rows and columns share z."""
    each = {"offset": -40.0, "scale": 0.5}
    return [
        Term(Reduction.MAX, **each),
        Term(Reduction.MAX, axis=Axis.COLUMNS, **each),
        Term(Reduction.MAX, mask=Mask.NOT_GIVEN, above=d.row_offset + 0.013, **each),
        Term(Reduction.MAX, mask=Mask.GIVEN, axis=Axis.COLUMNS, below=d.column_offset - 0.013, **each),
        Term(Reduction.MAX, Score.SQUARED_HINGE, Mask.SAME, above=torch.inf),
        Term(Reduction.MAX, mask=Mask.DIFFERENT, scale=d.row_scale, offset=-30.0, other_offset=d.column_offset),
        Term(Reduction.MAX, mask=Mask.SAME, axis=Axis.COLUMNS, offset=-40.0, weight=d.row_weight),
        Term(Reduction.COUNT, mask=Mask.SAME),
    ]


@alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(37, 131), (133, None), (1, 129), (520, 600)], ids=str)
def test_maxima_sanitized(shape, dtype):
    """Masks, thresholds, excluded columns, owners without pairs, weights of no concern, several panels."""

    def run(d):
        options = {"pair_mask": d.pair_mask, "exclude": d.exclude, "max_workspace_bytes": 1 << 20}
        return pair_reduce(**d.pairs, terms=_maxima(d), **options)

    for form in ("simple", "fused") if dtype == torch.bfloat16 else ("simple",):
        with backend_cuda.form(form):
            compare(run, make(*shape, 19, grid=True), "cuda", dtype)


@alone
@pytest.mark.parametrize("use", [Guide.THRESHOLD, Guide.NONE])
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_maxima_beside_a_guide(side, use):
    """The second product says which pairs count, and is no factor of the score."""

    def run(d):
        terms = [
            Term(Reduction.MAX, mask=Mask.DIFFERENT, offset=-40.0, above=0.013, guide=use),
            Term(Reduction.MAX, axis=Axis.COLUMNS, offset=-40.0, below=-0.013, guide=use),
            Term(SUM, Score.SOFTPLUS, guide=Guide.WEIGHT),
        ]
        guide = d.x[:, :3] if d.y is None else (d.x[:, :3], d.y[:, :3])
        return pair_reduce(**d.pairs, terms=terms, guide=guide)

    compare(run, make(*_shape(side, 37, 131), 19, grid=True), "cuda", torch.float32)


@alone
@pytest.mark.parametrize("kind", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_maxima_with_nan_and_infinity(side, dtype, kind):
    """A NaN shows in every owner that meets it, wherever it lies, and in no other."""
    d = make(*_shape(side, 140, 150), 3, grid=True)
    d.x[5, 2] = kind
    if d.y is not None:
        d.y[7, 1] = d.y[130, 0] = kind
    d.pair_mask[:, :100] = False
    terms = [Term(Reduction.MAX, mask=m, axis=a) for m in (Mask.ALL, Mask.SAME, Mask.GIVEN) for a in Axis]
    terms.append(Term(Reduction.MAX, Score.SQUARE, scale=d.row_scale.to(torch.float32)))
    found = []
    for backend, kept in (("cuda", d.to(dtype)), ("reference", d)):
        with use_backend(backend):
            found.append(pair_reduce(**kept.pairs, terms=terms, pair_mask=d.pair_mask, max_workspace_bytes=1 << 20))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-6, atol=0, equal_nan=True)


@alone
@pytest.mark.parametrize("size", [5, 33, 129])
def test_pairs_with_oneself_count_once_sanitized(size):
    """The diagonal belongs to its tile and to the mirror image of that tile."""

    def run(d):
        terms = [
            Term(LSE, scale=d.scale),
            Term(SUM, Score.SOFTPLUS, Mask.SAME, Axis.COLUMNS, d.column_scale, other_offset=d.row_offset),
            Term(Reduction.MOMENTS),
            Term(Reduction.COUNT, Score.SQUARE, scale=0.0, offset=1.0),
            Term(Reduction.MAX),
            Term(Reduction.MAX, mask=Mask.SAME, axis=Axis.COLUMNS, scale=-d.column_scale, offset=-9.0),
        ]
        return pair_reduce(**d.pairs, terms=terms, exclude_self=False)

    compare(run, make(size, None, 6, precision=torch.float32), "cuda", torch.float32)


@alone
@pytest.mark.parametrize("name", ["sum_parameters", "supcon", "multi_similarity", "maxima"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_the_order_of_threads_does_not_matter(name, dtype, monkeypatch):
    """Bitwise: whatever order the threads of a block run in between barriers. A race would show."""
    program = only(name)[0]
    data = make(*_shape(program.sides[-1], 140, 0), 35, grid=program.grid, precision=dtype).to(dtype)
    found = []
    for order in ("0", "1", "2", "12345"):
        monkeypatch.setenv("FLASHPAIR_EMULATOR_ORDER", order)
        values, gradients = evaluate(program.run, data, "cuda")
        found.append({**values, **gradients})
    for other in found[1:]:
        assert all(torch.equal(other[name].nan_to_num(), value.nan_to_num()) for name, value in found[0].items())


@alone
def test_offsets_beyond_int32():
    """Embeddings whose elements lie more than 2^31 apart are read where they are."""
    rows, stride = 20, 1 << 27
    x = torch.empty(0, dtype=torch.bfloat16).set_(
        torch.UntypedStorage(2 * rows * stride), 0, (rows, 16), (stride, 1)
    )  # fmt: skip
    x.copy_(torch.randn(rows, 16))
    assert (rows - 1) * stride > 1 << 31
    terms = [Term(LSE), Term(SUM, Score.SQUARE, axis=Axis.COLUMNS)]
    with use_backend("cuda"), backend_cuda.form("fused"):
        ours = pair_reduce(x, x[:3], terms)
    with use_backend("reference"):
        expected = pair_reduce(x.double(), x[:3].double(), terms)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


# --- mining -----------------------------------------------------------------------------------------------------------


def _mined(extremes, backend, **options):
    with use_backend(backend):
        return mine(extremes=extremes, **options)


def _assert_equal(extremes, dtype, **options):
    narrow = {n: v.to(dtype) if n in "xy" and v is not None else v for n, v in options.items()}
    found, expected = _mined(extremes, "cuda", **narrow), _mined(extremes, "reference", **options)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.values.double(), wanted.values.double(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.indices, wanted.indices)


@alone
@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_extremes(side, dtype, k):
    """Exact similarities with many ties: values and places, over several tiles and stripes."""
    d = make(*_shape(side, 131, 140), 3, grid=True)
    bound = d.row_offset.mul(4).round() / 4 + 0.125
    extremes = [
        Extreme(Mask.DIFFERENT, k=k),
        Extreme(Mask.SAME, largest=False, k=k),
        Extreme(k=k, above=bound, below=1.125),
    ]
    _assert_equal(extremes, dtype, **d.pairs)


@alone
def test_extremes_in_stripes_sanitized():
    d = make(3, 1500, 3, grid=True)
    _assert_equal([Extreme(k=7), Extreme(k=40, largest=False)], torch.float32, x=d.x, y=d.y)


@alone
@pytest.mark.parametrize("k", [1, 5])
def test_extremes_with_nan_and_infinity(k):
    d = make(40, 140, 3, grid=True)
    d.y[7, 1], d.y[130, 0], d.x[5, 2] = torch.nan, torch.inf, torch.nan
    _assert_equal([Extreme(k=k), Extreme(k=k, largest=False, mask=Mask.SAME)], torch.float32, **d.pairs)


@alone
def test_this_backend_runs_emulated():
    assert flashpair.backends()["cuda"] == "usable" and backend_cuda.emulated()
    assert support.interpreted("cuda")
