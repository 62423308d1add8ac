"""Every backend against the float64 reference: values and all gradients of the table of programs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import support
import torch
from programs import BY_NAME, LSE, MEAN, PROGRAMS, SUM, on_sides, only
from support import assert_close, compare, evaluate, make

from flashpair import Axis, Extreme, Mask, Reduction, Score, Similarity, Term, mine, pair_reduce

# One tile of a CPU backend is at most 192 rows or columns; one of the interpreted GPU kernels at most 128.
RECTANGLES = [(1, 1, 1), (2, 3, 3), (17, 33, 17), (64, 64, 65), (191, 200, 5), (193, 192, 3), (40, 400, 1)]
SQUARES = [(1, 1), (2, 3), (33, 17), (64, 65), (193, 5), (400, 3)]
LABELS = ["one", "distinct", "many"]


def _fits(backend: str, *sizes: int | None) -> None:
    if support.interpreted(backend) and max(s or 0 for s in sizes) > 70:
        pytest.skip("too slow under Triton's interpreter")


def _wide_enough(backend: str, features: int) -> None:
    if features == 1 and _precise(backend) != torch.float64:
        pytest.skip("normalised numbers have gradient zero, which only float64 tells from an error")


def _needs(backend: str, dtype: torch.dtype) -> None:
    if not support.serves(backend, dtype):
        pytest.skip(f"{backend} does not serve {dtype}")


def _precise(backend: str) -> torch.dtype:
    """float64 where a backend has it."""
    return torch.float64 if support.serves(backend, torch.float64) else torch.float32


def _compare(program, data, backend: str, dtype: torch.dtype | None = None, **options) -> None:
    compare(program.run, data, backend, dtype or _precise(backend), **options)


@pytest.mark.parametrize("shape", RECTANGLES, ids=str)
@pytest.mark.parametrize("program", [p for p in PROGRAMS if "rectangle" in p.sides], ids=str)
def test_rectangle(program, shape, backend):
    _fits(backend, *shape)
    _wide_enough(backend, shape[-1])
    _compare(program, make(*shape, grid=program.grid and _precise(backend) != torch.float64), backend)


@pytest.mark.parametrize("shape", SQUARES, ids=str)
@pytest.mark.parametrize("program", [p for p in PROGRAMS if "self" in p.sides], ids=str)
def test_self(program, shape, backend):
    _fits(backend, *shape)
    _wide_enough(backend, shape[-1])
    grid = program.grid and _precise(backend) != torch.float64
    _compare(program, make(shape[0], None, shape[1], grid=grid), backend)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(("program", "side"), on_sides(PROGRAMS))
def test_labels(program, side, labels, backend):
    columns = 41 if side == "rectangle" else None
    grid = program.grid and _precise(backend) != torch.float64
    _compare(program, make(37, columns, 6, labels, grid=grid), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("program", "side"), on_sides(PROGRAMS))
def test_narrow_dtypes(program, side, dtype, backend):
    _needs(backend, dtype)
    shapes = [(61, 67, 24)] if support.interpreted(backend) else [(61, 67, 24), (200, 195, 40)]
    for b, n, d in shapes:
        data = make(b, n if side == "rectangle" else None, d, grid=program.grid, precision=dtype, seed=b)
        _compare(program, data, backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_scores_keep_their_digits(dtype, backend):
    _needs(backend, dtype)
    support.check_scores(backend, dtype)


# --- layouts ----------------------------------------------------------------------------------------------------------


def _transposed(t):
    return t.T.contiguous().T if t.dim() == 2 else t


def _every_second(t):
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), math.nan if t.is_floating_point() else 1, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


@pytest.mark.parametrize("layout", [_transposed, _every_second])
@pytest.mark.parametrize(
    ("program", "side"), on_sides(only("clip", "sum_parameters", "given", "exclude", "thresholds"))
)
def test_strided_inputs(program, side, layout, backend):
    data = make(37, 41 if side == "rectangle" else None, 6).to(_precise(backend), support.device(backend))
    want = evaluate(program.run, data, backend)
    fields = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    strided = {
        name: t if t is None or t.dim() == 0 else layout(t.detach().cpu()).to(t.device).requires_grad_(t.requires_grad)
        for name, t in fields.items()
    }
    got = evaluate(program.run, support.Data(**strided), backend)
    for part, wanted in zip(got, want, strict=True):
        for name, value in part.items():
            assert_close(name, value, wanted[name], 1e-12 if _precise(backend) == torch.float64 else 1e-5)


def test_expanded_parameter(backend):
    data = make(9, 5, 4).to(_precise(backend), support.device(backend))
    (one,) = pair_reduce(data.x, data.y, [Term(LSE, scale=data.scale)])
    (many,) = pair_reduce(data.x, data.y, [Term(LSE, scale=data.scale.expand(9))])
    torch.testing.assert_close(one, many)
    got, want = (torch.autograd.grad(v.sum(), data.scale)[0] for v in (many, one))
    torch.testing.assert_close(got, want)


# --- nothing to do ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 3), (0, None, 3), (4, 3, 0)], ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_empty(program, shape, backend):
    if (shape[1] is None) not in [side == "self" for side in program.sides]:
        pytest.skip("other side")
    _compare(program, make(*shape), backend)


# --- adversarial numbers ----------------------------------------------------------------------------------------------


def _collapsed(data):
    data.x[:] = data.x[:1]
    if data.y is not None:
        data.y[:] = data.x[:1]


def _opposed(data):
    _collapsed(data)
    data.y[:] = -data.x[:1]


def _one_row_far_above(data):
    data.x[3] *= 500
    data.y[7] *= 300


def _one_row_far_below(data):
    data.x.abs_()
    data.y.abs_()
    data.x[3] *= -900


def _tiny(data):
    data.x *= 1e-16  # products stay normal numbers; below those see test_subnormals.py
    data.y *= 1e-16


def _huge(data):
    data.x *= 1e7
    data.y *= 1e7


def _with_scale(value: float):
    def spoil(data):
        data.scale.fill_(value)

    return spoil


def _zero_rows(data):
    data.x[2] = 0
    data.y[5] = 0


SPOILERS = [_collapsed, _opposed, _one_row_far_above, _one_row_far_below, _tiny, _huge, _zero_rows]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("spoil", [*SPOILERS, *map(_with_scale, (100.0, 1000.0, -1000.0))], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "program",
    only("clip", "siglip", "shared_scale", "logsumexp_parameters", "softmax_mean_parameters", "cacr"),
    ids=str,
)
def test_adversarial(program, spoil, dtype, backend):
    _needs(backend, dtype)
    data = make(37, 41, 6, precision=torch.bfloat16)
    spoil(data)
    _compare(program, data, backend, dtype, ill_conditioned=True)


@pytest.mark.parametrize("similarity", [Similarity.EUCLIDEAN, Similarity.SQUARED_EUCLIDEAN])
def test_duplicates_have_distance_and_gradient_zero(similarity, backend):
    dtype, at = _precise(backend), support.device(backend)
    data = make(12, None, 5, grid=True)
    x = torch.cat([data.x, data.x]).to(at, dtype).requires_grad_()
    labels = torch.arange(12).repeat(2).to(at)  # every positive is a duplicate
    (total, lse) = pair_reduce(
        x, terms=[Term(SUM, mask=Mask.SAME), Term(LSE, mask=Mask.SAME)], labels=labels, similarity=similarity
    )
    assert total.eq(0).all() and lse.eq(0).all()
    (gradient,) = torch.autograd.grad(total.sum() + lse.sum(), x)
    assert gradient.eq(0).all()


@pytest.mark.parametrize("reduction", [SUM, LSE, MEAN, Reduction.MOMENTS])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_inputs_show(value, reduction, backend):
    data = make(200 if not support.interpreted(backend) else 40, 70, 4).to(_precise(backend), support.device(backend))
    with torch.no_grad():
        data.x[3, 1] = value
    row, column = (
        _mean(pair_reduce(data.x, data.y, [Term(reduction, Score.SQUARE, axis=axis)])[0])
        for axis in (Axis.ROWS, Axis.COLUMNS)
    )
    spoilt = torch.arange(row.shape[0]) == 3
    assert torch.equal(row.isfinite().cpu(), ~spoilt)
    if math.isnan(value):
        assert row[3].isnan() and column.isnan().all()
        if row.requires_grad:
            (gradient,) = torch.autograd.grad(row.sum(), data.x)
            assert gradient[3].isnan().all() and gradient[~spoilt].isfinite().all()
    else:
        with support.forced("reference"):
            plain = _mean(pair_reduce(data.x, data.y, [Term(reduction, Score.SQUARE, axis=Axis.COLUMNS)])[0])
        assert torch.equal(column.isfinite(), plain.isfinite())


@pytest.mark.parametrize("features", [5, 20])
def test_a_bad_column_spoils_no_other_column(features, backend):
    """Several column tiles whose rows end in padding: the gradient of one NaN column stays its own."""
    if support.interpreted(backend):
        pytest.skip("many tiles; the padding is a matter of the CPU kernels")
    data = make(100, 700, features).to(_precise(backend), support.device(backend))
    with torch.no_grad():
        data.y[0] = math.nan
    (total,) = pair_reduce(data.x, data.y, [Term(SUM, axis=Axis.COLUMNS, scale=2.0)], normalize=True)
    (gradient,) = torch.autograd.grad(total.sum(), data.y)
    assert gradient[0].isnan().all() and gradient[1:].isfinite().all()


def _mean(statistic):
    """The mean of moments (5, owners); any other statistic (owners,) as it is."""
    return statistic[1] if statistic.dim() == 2 else statistic


@pytest.mark.parametrize("reduction", [SUM, LSE, MEAN])
def test_nan_threshold_and_parameter_show(reduction, backend):
    data = make(9, 5, 3).to(_precise(backend), support.device(backend))
    offset = data.row_offset.detach().clone()
    offset[2] = math.nan
    (kept,) = pair_reduce(data.x, data.y, [Term(reduction, above=offset)])
    (all_pairs,) = pair_reduce(data.x, data.y, [Term(reduction)])
    torch.testing.assert_close(kept[2], all_pairs[2])
    (spoilt,) = pair_reduce(data.x, data.y, [Term(reduction, offset=offset, score=Score.SQUARE)])
    assert spoilt.isnan().tolist() == [i == 2 for i in range(9)]


def test_zero_weights_drop_pairs(backend):
    data = make(9, 6, 3).to(_precise(backend), support.device(backend))
    keep = torch.tensor([1, 0, 1, 1, 0, 0.0])
    weight = keep.to(data.x).requires_grad_()
    with torch.no_grad():
        data.y[1] *= 1e4  # far above everything that is kept
    for reduction in (LSE, MEAN):
        (got,) = pair_reduce(data.x, data.y, [Term(reduction, weight=weight)])
        (want,) = pair_reduce(data.x, data.y[keep > 0], [Term(reduction)])
        torch.testing.assert_close(got, want)
        dy, dw = torch.autograd.grad(got.sum(), (data.y, weight))
        assert dy[keep == 0].eq(0).all() and dw[keep == 0].eq(0).all() and dw[keep > 0].ne(0).all()
    (none,) = pair_reduce(data.x, data.y, [Term(LSE, weight=torch.zeros_like(weight))])
    assert none.eq(-math.inf).all()


def test_empty_owner_of_infinite_offset(backend):
    """A chained pass over rows without negatives: log-sums of -inf as offsets give neither NaN nor a gradient."""
    data = make(8, None, 3, "one").to(_precise(backend), support.device(backend))
    (negatives,) = pair_reduce(data.x, terms=[Term(LSE, mask=Mask.DIFFERENT)], labels=data.labels)
    assert negatives.eq(-math.inf).all()
    terms = [Term(SUM, Score.SOFTPLUS, Mask.SAME, scale=-1.0, offset=negatives)]
    (total,) = pair_reduce(data.x, terms=terms, labels=data.labels)
    (gradient,) = torch.autograd.grad(total.sum(), data.x)
    assert total.eq(0).all() and gradient.eq(0).all()
    output, gradients = evaluate(BY_NAME["lifted"].run, data, backend)
    assert output["output 1"].eq(0).all() and gradients["dx"].eq(0).all()


# --- extremes ---------------------------------------------------------------------------------------------------------


def _mine_everything(data, k: int):
    extremes = [
        Extreme(mask, largest, k, above, below)
        for mask, above, below in (
            (Mask.ALL, None, None),
            (Mask.SAME, -0.257, None),
            (Mask.DIFFERENT, None, data.row_offset.detach() + 0.013),
            (Mask.GIVEN, data.bias - 0.507, 0.757),
        )
        for largest in (True, False)
    ]
    return mine(**data.pairs, extremes=extremes, pair_mask=data.pair_mask, exclude=data.exclude)


def _assert_mined(data, k: int, backend: str) -> None:
    got = _mine_everything(data, k)
    with support.forced("reference"):
        want = _mine_everything(data, k)
    for found, wanted in zip(got, want, strict=True):
        assert found.values.dtype == wanted.values.dtype and found.indices.dtype == torch.int64
        torch.testing.assert_close(found.values, wanted.values, equal_nan=True)
        assert torch.equal(found.indices, wanted.indices)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("b", "n", "d", "k"), [(1, 1, 1, 1), (7, 9, 3, 2), (40, 70, 5, 5), (193, None, 4, 1)])
def test_mine(b, n, d, k, dtype, backend):
    _needs(backend, dtype)
    _fits(backend, b, n)
    # On the grid equal similarities are frequent, so the order of ties is tested too.
    _assert_mined(make(b, n, d, grid=True).to(dtype, support.device(backend)), k, backend)


@pytest.mark.parametrize(("b", "n", "k"), [(40, 64, 64), (3, 400, 64), (70, None, 63)])
def test_mine_many(b, n, k, backend):
    _fits(backend, b, n)
    _assert_mined(make(b, n, 3, grid=True).to(_precise(backend), support.device(backend)), k, backend)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (0, None, 3)], ids=str)
def test_mine_empty(shape, backend):
    _assert_mined(make(*shape).to(_precise(backend), support.device(backend)), 2, backend)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("similarity", Similarity)
def test_mine_similarities(similarity, normalize, backend):
    data = make(40, 50, 5).to(_precise(backend), support.device(backend))
    options = {
        "extremes": [Extreme(k=3), Extreme(k=3, largest=False)],
        "similarity": similarity,
        "normalize": normalize,
    }
    got = mine(data.x, data.y, **options)
    with support.forced("reference"):
        want = mine(data.x, data.y, **options)
    for found, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(found.values, wanted.values)
        assert torch.equal(found.indices, wanted.indices)


def test_infinite_thresholds_keep_nothing_or_everything(backend):
    data = make(5, 4, 3).to(_precise(backend), support.device(backend), grad=False)
    bounds = [{"above": math.inf}, {"below": -math.inf}, {"above": -math.inf}, {"below": math.inf}]
    found = mine(data.x, data.y, [Extreme(**b) for b in bounds])
    assert [bool(f.indices.eq(-1).all()) for f in found] == [True, True, False, False]
    counts = pair_reduce(data.x, data.y, [Term(Reduction.COUNT, Score.SQUARE, **b) for b in bounds])
    assert [float(c[0]) for c in counts] == [0.0, 0.0, 4.0, 4.0]


@pytest.mark.parametrize("largest", [True, False])
def test_mine_puts_nan_first(largest, backend):
    data = make(6, 9, 1).to(_precise(backend), support.device(backend), grad=False)
    data.x[:] = 1
    data.y[:, 0] = torch.tensor([1.0, -2, math.nan, 5, math.inf, -math.inf, 0, math.nan, 3])
    (found,) = mine(data.x, data.y, [Extreme(k=9, largest=largest)])
    with support.forced("reference"):
        (want,) = mine(data.x, data.y, [Extreme(k=9, largest=largest)])
    assert torch.equal(found.indices, want.indices)
    torch.testing.assert_close(found.values, want.values, equal_nan=True)


def test_mine_is_not_differentiable(backend):
    data = make(6, None, 3).to(_precise(backend), support.device(backend))
    (found,) = mine(data.x, extremes=[Extreme(above=data.row_offset)])
    assert not found.values.requires_grad and not found.indices.requires_grad


@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_counts_and_moments_are_not_differentiable(side, backend):
    data = make(9, 7 if side == "rectangle" else None, 4).to(torch.float32, support.device(backend))
    with support.forced(backend):
        total, count, moments = pair_reduce(
            data.x, data.y, [Term(Reduction.SUM), Term(Reduction.COUNT, Score.HINGE), Term(Reduction.MOMENTS)]
        )
    assert total.requires_grad and not count.requires_grad and not moments.requires_grad


def test_thresholds_of_one_direction(backend):
    """Rows and columns that share z, where only one of them has thresholds."""
    data = make(37, 41, 6).to(_precise(backend), support.device(backend))
    for bounded in (Axis.ROWS, Axis.COLUMNS):

        def run(d: support.Data, bounded=bounded) -> tuple:
            bound = {bounded: 0.1, Axis(1 - bounded): None}
            return pair_reduce(d.x, d.y, [Term(LSE, axis=axis, scale=d.scale, below=bound[axis]) for axis in Axis])

        compare(run, data, backend, _precise(backend))


@pytest.mark.parametrize("shape", [(70, 60), (200, 130)], ids=str)
def test_pairs_far_below_those_that_do_not_count(shape, backend):
    """What trained towers give: e^s of the kept pairs underflows beside that of those a mask or threshold drops."""
    _fits(backend, *shape)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape[0], 16, generator=g, dtype=torch.float64)
    y = x[: shape[1]] + 0.05 * torch.randn(shape[1], 16, generator=g, dtype=torch.float64)
    data = dataclasses.replace(
        make(*shape, 16), x=x, y=y, labels=torch.arange(shape[0]), ref_labels=torch.arange(shape[1])
    )
    data.row_weight[3] = 0

    def run(d: support.Data) -> tuple:
        others = [Term(LSE, mask=Mask.DIFFERENT, axis=axis, scale=100.0) for axis in Axis]
        weighted = Term(LSE, mask=Mask.DIFFERENT, axis=Axis.COLUMNS, scale=300.0, weight=d.row_weight)
        below = [Term(LSE, axis=axis, scale=1500.0, below=0.6) for axis in Axis]
        return pair_reduce(**d.pairs, terms=[*others, weighted, *below], normalize=True)

    compare(run, data, backend, _precise(backend), ill_conditioned=_precise(backend) != torch.float64)
