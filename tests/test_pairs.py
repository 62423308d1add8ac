"""Listed pairs against the dense reference: similarities, every reduction, gradients, memory."""

from __future__ import annotations

import itertools
import math

import pytest
import support
import torch
from support import assert_close, make

from flashpair import (
    Axis,
    Combine,
    Extreme,
    Mask,
    Reduction,
    Score,
    Similarity,
    Term,
    backend_cpu,
    mine,
    pair_reduce,
    pair_similarity,
    pairs,
    reference,
    use_backend,
)
from flashpair.formulas import TRIPLET, Average
from flashpair.pairs import listed_loss

DIFFERENTIABLE = [Reduction.SUM, Reduction.LOGSUMEXP, Reduction.SOFTMAX_MEAN]


def _listed(mask: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of a (B, N) mask in random order."""
    rows, columns = mask.nonzero(as_tuple=True)
    order = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))
    return rows[order], columns[order]


def _random_pairs(b: int, n: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, b, (count,), generator=g), torch.randint(0, n, (count,), generator=g)


# --- similarities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("similarity", Similarity)
@pytest.mark.parametrize("features", [5, 16, 37])
@pytest.mark.parametrize("columns", [9, None])
def test_pair_similarity(columns, features, similarity, normalize, dtype):
    data = make(12, columns, features, precision=dtype)
    rows, others = _random_pairs(12, columns or 12, 40)
    if columns is None:
        rows = torch.where(rows == others, (rows + 1) % 12, rows)  # the distance to itself has no slope
    weights = torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def both(data, dense: bool):
        if dense:
            s = reference.similarity_matrix(data.x, data.x if data.y is None else data.y, similarity, normalize)
            s = s[rows, others]
        else:
            s = pair_similarity(data.x, data.y, rows, others, similarity=similarity, normalize=normalize)
        assert s.dtype == reference.statistics_dtype(data.x)
        leaves = [v for v in (data.x, data.y) if v is not None]
        return [s.detach().double(), *(g.double() for g in torch.autograd.grad((s * weights.to(s)).sum(), leaves))]

    oracle = both(data.to(torch.float64), dense=True)
    got, dense = both(data.to(dtype), dense=False), both(data.to(dtype), dense=True)
    for name, value, plain, want in zip(("s", "dx", "dy"), got, dense, oracle, strict=False):
        if dtype == torch.float64:
            assert_close(name, value, want, 1e-12)
        else:
            eps = torch.finfo(torch.float32 if name == "s" else dtype).eps
            support.assert_as_good(name, value, plain, want, 2 * eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("similarity", Similarity)
@pytest.mark.parametrize("columns", [300, None])
def test_many_pairs_in_threads(columns, similarity, dtype, monkeypatch):
    """The same to the bit however many there are, and what PyTorch makes of the same list."""
    if backend_cpu.unavailable():
        pytest.skip("; ".join(backend_cpu.unavailable()))
    data = make(200, columns, 72).to(dtype)
    rows, others = _random_pairs(200, columns or 200, 40_000)
    rows = torch.where(rows == others, (rows + 1) % 200, rows)
    leaves = [v for v in (data.x, data.y) if v is not None]

    def found() -> list[torch.Tensor]:
        s = pair_similarity(data.x, data.y, rows, others, similarity=similarity, normalize=True)
        return [s.detach(), *torch.autograd.grad((s * torch.linspace(-1, 1, len(s)).to(s)).sum(), leaves)]

    before, results = torch.get_num_threads(), []
    try:
        for threads in (2, 1, 3):
            torch.set_num_threads(threads)
            results.append(found())
    finally:
        torch.set_num_threads(before)
    in_threads = results[0]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, in_threads, strict=True))
    monkeypatch.setattr(backend_cpu, "at_hand", lambda *_: False)
    for name, a, b in zip(("s", "dx", "dy"), in_threads, found(), strict=False):
        assert_close(name, a, b, 1e-12 if dtype == torch.float64 else 3e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("similarity", Similarity)
@pytest.mark.parametrize("tiny", [0.0, 3e-13])
def test_rows_that_are_zero_or_not_finite(tiny, similarity, dtype):
    """Small rows are divided by the floor of a norm; NaN and infinity reach their pairs and nobody else's."""
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(3), dtype=dtype)
    x[0], x[0, 7], x[2, 3], x[4, 19] = 0.0, tiny, math.nan, math.inf
    x.requires_grad_()
    rows, others = torch.tensor([0, 1, 1, 3, 4]), torch.tensor([1, 2, 3, 5, 5])
    s = pair_similarity(x, None, rows, others, similarity=similarity, normalize=True)
    (dx,) = torch.autograd.grad(s.sum(), x)
    whole = x.detach()[[0, 1, 3, 5]].requires_grad_()
    dense = reference.similarity_matrix(whole, whole, similarity, True)[torch.arange(3), torch.arange(1, 4)]
    (wanted,) = torch.autograd.grad(dense.sum(), whole)
    assert s.isnan().tolist() == [False, True, False, False, True]
    torch.testing.assert_close(s[[0, 2, 3]], dense)
    assert dx[[1, 2, 4, 5]].isnan().any(1).all() and not dx[[0, 3]].isnan().any()
    torch.testing.assert_close(dx[[0, 3]], wanted[[0, 2]])


def test_the_operators_refuse_what_is_not_there():
    """Instead of reading past the end."""
    if backend_cpu.unavailable():
        pytest.skip("; ".join(backend_cpu.unavailable()))
    x, at = torch.randn(3, 4), torch.tensor([0, 1])
    similarities, gradients = torch.ops.flashpair_cpu.listed_similarities, torch.ops.flashpair_cpu.listed_gradients
    for wrong in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        for pair in ((wrong, at), (at, wrong)):
            assert similarities(x, None, *pair, 0, False).shape == (0,)
            with pytest.raises(RuntimeError, match="out of range"):
                gradients(torch.ones(2), torch.ones(2), x, None, *pair, 0, False)
    apart = torch.randn(3, 8)[:, ::2]
    for x_, y, rows in ((x, torch.randn(3, 5), at), (x, x.double(), at), (x, None, at[:1]), (x, None, at.int()),
                        (x.half(), None, at), (apart, None, at), (x, None, torch.arange(4)[::2])):  # fmt: skip
        with pytest.raises(RuntimeError, match="listed pairs"):
            similarities(x_, y, rows, at, 0, False)
    for wrong in (torch.ones(2).double(), torch.ones(4)[::2]):
        for pair in ((wrong, torch.ones(2)), (torch.ones(2), wrong)):
            with pytest.raises(RuntimeError, match="of the type of x"):
                gradients(*pair, x, None, at, at, 0, False)
    with pytest.raises(RuntimeError, match="no such similarity"):
        similarities(x, None, at, at, 3, False)
    with pytest.raises(RuntimeError, match="a slope per pair"):
        gradients(torch.ones(1), torch.ones(2), x, None, at, at, 0, False)


def _triplets(backend: str, dtype: torch.dtype) -> tuple:
    device = support.device(backend)
    data = make(9, 7, 6).to(dtype)
    a, p, n = (torch.randint(k, (11,), generator=torch.Generator().manual_seed(k)) for k in (9, 7, 6))
    exist = (torch.arange(11) % 4 != 1).to(dtype)[None]
    x, y = (v.detach().to(device).requires_grad_() for v in (data.x, data.y))
    return x, y, torch.cat([a, a]).to(device), torch.cat([p, n]).to(device), exist.to(device)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("similarity", Similarity)
def test_loss_of_triplets(similarity, smooth, backend):
    """A loop over triplets, and autograd through the dense reference."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    x, y, rows, columns, exist = _triplets(backend, dtype)
    sign = 1.0 if similarity == Similarity.DOT else -1.0
    constants = Average.ABOVE_ZERO, sign, 0.3, smooth
    with use_backend(backend):
        loss = listed_loss(x, y, rows, columns, TRIPLET, exist, constants, similarity=similarity, normalize=True)
        gradients = torch.autograd.grad(3 * loss, (x, y))
    s = reference.similarity_matrix(x.double(), y.double(), similarity, True)[rows, columns].view(2, -1)
    losses = []
    for near, far, exists in zip(*s, exist[0], strict=True):
        violation = sign * (far - near) + 0.3
        value = torch.nn.functional.softplus(violation) if smooth else violation.relu()
        losses += [value] if exists and value > 0 else []
    wanted = sum(losses) / len(losses)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(loss.double(), wanted, **tolerance)
    for a, b in zip(gradients, torch.autograd.grad(3 * wanted, (x, y)), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("given", [True, False], ids=["others", "own"])
def test_opcheck_listed_loss(given, backend):
    x, y, rows, columns, exist = _triplets(backend, torch.float32)
    how = 2, True, backend, "triplet", [2.0, -1.0, 0.3, 0.0]
    arguments = x, y if given else None, rows, columns % 7, exist, *how
    torch.library.opcheck(pairs._loss_of_pairs.overload, arguments)
    assert [t.requires_grad for t in pairs._loss_of_pairs(*arguments)] == [True, False, False]


def test_pairs_that_repeat_count_each_time():
    data = make(4, 3, 2).to(torch.float64)
    rows, columns = torch.tensor([1, 1, 1, 0]), torch.tensor([2, 2, 2, 0])
    s = pair_similarity(data.x, data.y, rows, columns)
    (dx,) = torch.autograd.grad(s.sum(), data.x)
    assert s[0] == s[1] == s[2]
    torch.testing.assert_close(dx[1], 3 * data.y[2].detach())


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 3, 2)], ids=str)
def test_no_pairs(shape):
    data = make(*shape).to(torch.float64)
    none = torch.zeros(0, dtype=torch.int64)
    s = pair_similarity(data.x, data.y, none, none)
    assert s.shape == (0,)
    assert torch.autograd.grad(s.sum(), data.x)[0].eq(0).all()
    total, lse, mean, moments = pair_reduce(
        data.x, data.y, [Term(r) for r in (*DIFFERENTIABLE, Reduction.MOMENTS)], pairs=(none, none)
    )
    assert total.eq(0).all() and lse.eq(-math.inf).all() and mean.eq(0).all()
    assert moments.shape == (5, shape[0]) and moments[3].eq(math.inf).all() and moments[4].eq(-math.inf).all()


@pytest.mark.parametrize("similarity", [Similarity.EUCLIDEAN, Similarity.SQUARED_EUCLIDEAN])
def test_distance_zero_has_gradient_zero(similarity):
    x = torch.randn(3, 4, dtype=torch.float32).repeat(2, 1).requires_grad_()
    rows = torch.arange(3)
    d = pair_similarity(x, None, rows, rows + 3, similarity=similarity)
    assert d.eq(0).all() and torch.autograd.grad(d.sum(), x)[0].eq(0).all()


def test_indices_of_missing_entries_are_refused():
    data = make(3, None, 2, "distinct")
    (found,) = mine(**data.pairs, extremes=[Extreme(Mask.SAME)])
    with pytest.raises(IndexError, match=r"columns must not be negative.*got -1"):
        pair_similarity(data.x, None, torch.arange(3), found.indices[:, 0])
    with pytest.raises(IndexError):
        pair_similarity(data.x, None, torch.tensor([0]), torch.tensor([3]))


# --- every reduction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("reduction", Reduction)
@pytest.mark.parametrize("columns", [9, None])
def test_lists_equal_masks(columns, reduction, axis):
    """Pairs listed once are a mask; the dense reference under that mask is the oracle."""
    data = make(12, columns, 4)
    own, other = ("row", "column") if axis == Axis.ROWS else ("column", "row")
    weight = getattr(data, f"{other}_weight")
    weight[::3] = 0
    vectors = {
        "scale": getattr(data, f"{own}_scale"),
        "offset": getattr(data, f"{own}_offset"),
        "other_offset": getattr(data, f"{other}_offset"),
        "weight": weight,
    }
    options = [
        {},
        {"scale": data.scale, "offset": data.bias},
        vectors,
        vectors | {"combine": Combine.LOGADDEXP, "detach_weights": True},
        {"above": getattr(data, f"{own}_offset") - 0.1, "below": 0.6},
    ]
    scores = [Score.IDENTITY] if reduction == Reduction.MOMENTS else list(Score)

    def run(data, listed: bool):
        outputs = []
        for option, score in itertools.product(options, scores):
            named = {k: _renewed(data, v) for k, v in option.items()}
            term = Term(reduction, score, Mask.ALL if listed else Mask.GIVEN, axis, constant=0.3, **named)
            mask = (
                {"pairs": _listed(data.pair_mask)} if listed else {"pair_mask": data.pair_mask, "exclude_self": False}
            )
            outputs += pair_reduce(data.x, data.y, [term], **mask)
        return tuple(outputs)

    names = {id(v): n for n, v in data.leaves().items()}

    def _renewed(fresh, value):
        return getattr(fresh, names[id(value)]) if id(value) in names else _shifted(fresh, value)

    def _shifted(fresh, value):
        return getattr(fresh, f"{own}_offset") - 0.1 if isinstance(value, torch.Tensor) else value

    with use_backend("reference"):
        want = support.evaluate(lambda d: run(d, False), data.to(torch.float64), "reference")
        got = support.evaluate(lambda d: run(d, True), data.to(torch.float64), "reference")
    for part, wanted in zip(got, want, strict=True):
        for name, value in part.items():
            assert_close(name, value, wanted[name])


def test_lists_with_label_masks():
    data = make(12, 9, 4)
    listed = _listed(data.pair_mask)
    same = data.labels[:, None] == data.ref_labels[None, :]
    for mask, keep in ((Mask.SAME, same), (Mask.DIFFERENT, ~same)):
        (got,) = pair_reduce(**data.pairs, terms=[Term(Reduction.LOGSUMEXP, mask=mask)], pairs=listed)
        with use_backend("reference"):
            (want,) = pair_reduce(
                data.x, data.y, [Term(Reduction.LOGSUMEXP, mask=Mask.GIVEN)], pair_mask=data.pair_mask & keep
            )
        torch.testing.assert_close(got, want)


def test_repeated_pairs_are_repeated_terms():
    data = make(5, 4, 3)
    rows, columns = torch.tensor([2, 2, 2, 0, 4]), torch.tensor([1, 1, 3, 2, 0])
    s = (data.x @ data.y.T)[rows, columns]
    lse, total, count = pair_reduce(
        data.x,
        data.y,
        [Term(Reduction.LOGSUMEXP), Term(Reduction.SUM), Term(Reduction.COUNT, Score.SQUARE)],
        pairs=(rows, columns),
    )
    assert count.tolist() == [1, 0, 3, 0, 1]
    torch.testing.assert_close(total[2], s[:3].sum())
    torch.testing.assert_close(lse[2], s[:3].logsumexp(0))


def test_self_pairs_that_are_listed_exist():
    x = make(4, None, 3).x
    rows = torch.arange(4)
    (total,) = pair_reduce(x, terms=[Term(Reduction.SUM)], pairs=(rows, rows))
    torch.testing.assert_close(total, (x * x).sum(1))


@pytest.mark.parametrize("reduction", [*DIFFERENTIABLE, Reduction.MOMENTS])
def test_nan_and_far_values(reduction):
    data = make(5, 4, 3)
    data.x[1] = math.nan
    data.x[2] *= 1e4
    listed = _listed(torch.ones(5, 4, dtype=torch.bool))
    (got,) = pair_reduce(data.x, data.y, [Term(reduction)], pairs=listed)
    (want,) = pair_reduce(data.x, data.y, [Term(reduction)])
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got[..., 1].isnan().any() and got[..., 0].isfinite().all()


@pytest.mark.parametrize("reduction", DIFFERENTIABLE)
def test_gradcheck(reduction):
    data = make(4, 3, 2).to(torch.float64)
    listed = _random_pairs(4, 3, 8)

    def loss(x, y, scale, offset, other, weight):
        term = Term(
            reduction, Score.SOFTPLUS, scale=scale, offset=offset, other_offset=other, weight=weight,
            combine=Combine.LOGADDEXP,
        )  # fmt: skip
        (out,) = pair_reduce(x, y, [term], pairs=listed, normalize=True)
        return torch.where(out.isinf(), 0.0, out)

    inputs = (data.x, data.y, data.row_scale, data.row_offset, data.column_offset, data.column_weight)
    assert torch.autograd.gradcheck(loss, inputs)


# --- memory and repeatability -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", DIFFERENTIABLE)
def test_memory_is_linear_in_the_pairs(reduction):
    """No (P, D) and no (B, N) is saved for the backward pass."""
    b, d = 300, 64

    def saved(count: int) -> int:
        data = make(b, None, d).to(torch.float32)
        listed = _random_pairs(b, b, count)
        kept: dict[int, int] = {}

        def pack(t):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            pair_reduce(data.x, terms=[Term(reduction, Score.SOFTPLUS, scale=data.scale)], pairs=listed)
        return sum(kept.values())

    few, many = saved(1000), saved(5000)
    assert (many - few) / 4000 <= 100, "bytes a pair: two int64 indices and a handful of float32"
    assert few <= 4 * (4 * b * d) + 100 * 1000


def test_two_runs_are_bitwise_equal():
    data = make(50, 60, 8).to(torch.float32)
    listed = _random_pairs(50, 60, 70_000)  # long enough for PyTorch to use threads
    terms = [
        Term(Reduction.LOGSUMEXP, scale=data.row_scale, other_offset=data.column_offset),
        Term(Reduction.SOFTMAX_MEAN, axis=Axis.COLUMNS, scale=data.column_scale, weight=data.row_weight),
    ]
    leaves = (data.x, data.y, data.row_scale, data.column_offset, data.column_scale, data.row_weight)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        runs = []
        for _ in range(4):
            outputs = pair_reduce(data.x, data.y, terms, pairs=listed)
            runs.append([*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for value, first in zip(run, runs[0], strict=True):
            assert torch.equal(value, first)
