"""Gradients through the operators: finite differences, one-sided needs, repeatability, workspaces, interleaving."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import dense_backend
import pytest
import support
import torch
from programs import LSE, MEAN, PROGRAMS, SUM, on_sides, only
from support import evaluate, make

import flashpair
from flashpair import Axis, Combine, Mask, Reduction, Score, Similarity, Term, pair_reduce, pair_sum, use_backend
from flashpair.workspace import MINIMUM_BYTES

LARGE = 64 << 20  # holds S of every case below, so it may be kept between the passes


def _precise(backend: str) -> torch.dtype:
    return torch.float64 if support.serves(backend, torch.float64) else torch.float32


def _size(backend: str) -> int:
    return 40 if support.interpreted(backend) else 230  # the latter is more than one tile


def _data(backend: str, side: str, b: int | None = None, dtype: torch.dtype | None = None, seed: int = 0):
    b = b or _size(backend)
    data = make(b, b + 7 if side == "rectangle" else None, 9, grid=dtype != torch.float64, seed=seed)
    return data.to(dtype or _precise(backend), support.device(backend))


# --- finite differences -----------------------------------------------------------------------------------------------

PARAMETERS = ("scale", "offset", "other_offset", "weight")


@pytest.mark.parametrize("combine", Combine)
@pytest.mark.parametrize("axis", Axis)
@pytest.mark.parametrize("reduction", [SUM, LSE, MEAN])
def test_gradcheck(reduction, axis, combine, backend):
    if not support.serves(backend, torch.float64):
        pytest.skip(f"{backend} does not serve float64")
    data = make(4, 3, 2).to(torch.float64, support.device(backend))
    own, other = ("row", "column") if axis == Axis.ROWS else ("column", "row")
    vectors = [getattr(data, n) for n in (f"{own}_scale", f"{own}_offset", f"{other}_offset", f"{other}_weight")]
    scalars = [data.scale, data.bias, *vectors[2:]]

    def loss(x, y, *parameters):
        term = Term(
            reduction, Score.SOFTPLUS, axis=axis, combine=combine, **dict(zip(PARAMETERS, parameters, strict=True))
        )
        return pair_reduce(x, y, [term], normalize=True)[0]

    for parameters in (vectors, scalars):
        assert torch.autograd.gradcheck(loss, (data.x, data.y, *parameters), fast_mode=True)


@pytest.mark.parametrize("similarity", Similarity)
def test_gradcheck_self(similarity, backend):
    if not support.serves(backend, torch.float64):
        pytest.skip(f"{backend} does not serve float64")
    data = make(5, None, 3).to(torch.float64, support.device(backend))

    def loss(x, scale, offset):
        terms = [
            Term(LSE, mask=Mask.DIFFERENT, scale=scale),
            Term(SUM, Score.SOFTPLUS, Mask.SAME, Axis.COLUMNS, scale=scale, offset=offset),
        ]
        return pair_reduce(x, terms=terms, labels=data.labels, similarity=similarity)

    assert torch.autograd.gradcheck(loss, (data.x, data.scale, data.row_offset), fast_mode=True)


def test_gradcheck_of_pair_sum(backend):
    if not support.serves(backend, torch.float64):
        pytest.skip(f"{backend} does not serve float64")
    data = make(4, 3, 2).to(torch.float64, support.device(backend))

    def loss(x, y, scale, bias, weight):
        terms = [
            Term(SUM, Score.SOFTPLUS, scale=scale, offset=bias),
            Term(SUM, Score.SQUARE, axis=Axis.COLUMNS, weight=weight, scale=scale),
        ]
        return 3.0 * pair_sum(x, y, terms, normalize=True)

    inputs = (data.x, data.y, data.scale, data.bias, data.row_weight)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


# --- what is needed, and no more --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "needed", [("x",), ("y",), ("scale",), ("x", "scale"), ("y", "row_offset"), ("column_weight",)]
)
def test_only_what_is_needed(needed, backend):
    data = _data(backend, "rectangle")

    def loss(d):
        term = Term(LSE, scale=d.scale, offset=d.row_offset, weight=d.column_weight)
        return pair_reduce(d.x, d.y, [term])[0].sum()

    want = dict(zip(needed, torch.autograd.grad(loss(data), [getattr(data, n) for n in needed]), strict=True))
    fresh = data.to(data.x.dtype, str(data.x.device), grad=False)
    for name in needed:
        getattr(fresh, name).requires_grad_()
    dense_backend.calls.clear()
    loss(fresh).backward()
    for name, leaf in fresh.leaves().items():
        assert (leaf.grad is not None) == (name in needed), name
        if name in needed:
            torch.testing.assert_close(leaf.grad, want[name])
    if backend == "dense":
        assert dense_backend.calls[-1] == "weights" + "x" * ("x" in needed) + "y" * ("y" in needed)


def test_pair_sum_without_parameters(backend):
    data = _data(backend, "rectangle")
    total = 2.0 * pair_sum(data.x, data.y, [Term(SUM)])
    dx, dy = torch.autograd.grad(total, (data.x, data.y))
    torch.testing.assert_close(dx, 2 * data.y.sum(0).expand_as(dx))
    torch.testing.assert_close(dy, 2 * data.x.sum(0).expand_as(dy))


def test_nothing_needed(backend):
    data = _data(backend, "rectangle").to(_precise(backend), support.device(backend), grad=False)
    (out,) = pair_reduce(data.x, data.y, [Term(LSE, scale=data.scale)])
    total = pair_sum(data.x, data.y, [Term(SUM)])
    assert not out.requires_grad and not total.requires_grad
    data.x.requires_grad_()
    with torch.no_grad():
        (out,) = pair_reduce(data.x, data.y, [Term(LSE)])
        total = pair_sum(data.x, data.y, [Term(SUM)])
    assert not out.requires_grad and not total.requires_grad


def test_counts_moments_and_thresholds_are_not_differentiable(backend):
    data = _data(backend, "self")
    terms = [
        Term(Reduction.COUNT, Score.SQUARE, scale=data.scale),
        Term(Reduction.MOMENTS),
        Term(LSE, above=data.row_offset, below=data.row_offset + 9.0),
    ]
    count, moments, lse = pair_reduce(data.x, terms=terms)
    assert not count.requires_grad and not moments.requires_grad
    assert torch.autograd.grad(lse[lse.isfinite()].sum(), data.row_offset, allow_unused=True) == (None,)


def test_one_tensor_as_threshold_and_offset(backend):
    data = _data(backend, "rectangle")
    (got,) = pair_reduce(data.x, data.y, [Term(SUM, Score.SQUARE, above=data.row_offset, offset=data.row_offset)])
    bound = data.row_offset.detach().clone()
    (want,) = pair_reduce(data.x, data.y, [Term(SUM, Score.SQUARE, above=bound, offset=data.row_offset)])
    got, want = (torch.autograd.grad(v.sum(), (data.x, data.row_offset)) for v in (got, want))
    torch.testing.assert_close(got, want)


def test_one_tensor_in_several_roles(backend):
    """A scale of two terms, and a vector that is offset here and other offset there, get the sum of their parts."""
    data = _data(backend, "self")
    p, q = data.row_offset, data.row_offset.detach().clone().requires_grad_()
    a, b = data.scale, data.scale.detach().clone().requires_grad_()

    def loss(p, q, a, b):
        terms = [Term(LSE, scale=a, offset=p), Term(SUM, Score.SOFTPLUS, scale=b, other_offset=q)]
        return sum(t.sum() for t in pair_reduce(data.x, terms=terms))

    apart = torch.autograd.grad(loss(p, q, a, b), (p, q, a, b))
    together = torch.autograd.grad(loss(p, p, a, a), (p, a))
    torch.testing.assert_close(together, (apart[0] + apart[1], apart[2] + apart[3]))


def test_parameter_gradients_have_the_parameter_dtype(backend):
    data = _data(backend, "rectangle")
    wide, narrow = data.scale.detach().double().requires_grad_(), data.row_offset.detach().half().requires_grad_()
    (out,) = pair_reduce(data.x, data.y, [Term(LSE, scale=wide, offset=narrow)])
    dwide, dnarrow = torch.autograd.grad(out.sum(), (wide, narrow))
    assert dwide.dtype == torch.float64 and dnarrow.dtype == torch.float16
    torch.testing.assert_close(dnarrow.double(), torch.ones_like(dnarrow).double())


def test_same_tensor_on_both_sides(backend):
    data = _data(backend, "self")
    other = data.x.detach().clone().requires_grad_()
    apart = torch.autograd.grad(pair_reduce(data.x, other, [Term(LSE, scale=data.scale)])[0].sum(), (data.x, other))
    (both,) = torch.autograd.grad(pair_reduce(data.x, data.x, [Term(LSE, scale=data.scale)])[0].sum(), data.x)
    torch.testing.assert_close(both, apart[0] + apart[1])


def test_unused_outputs_and_expanded_cotangents(backend):
    data = _data(backend, "rectangle")
    terms = [Term(LSE), Term(LSE, axis=Axis.COLUMNS), Term(SUM, Score.SQUARE)]
    rows, columns, _ = pair_reduce(data.x, data.y, terms)
    (got,) = torch.autograd.grad(columns.sum(), data.x, retain_graph=True)
    (want,) = torch.autograd.grad(pair_reduce(data.x, data.y, terms[1:2])[0].sum(), data.x)
    torch.testing.assert_close(got, want)
    one = torch.ones((), dtype=rows.dtype, device=rows.device)
    (got,) = torch.autograd.grad(rows, data.x, one.expand_as(rows))
    (want,) = torch.autograd.grad(pair_reduce(data.x, data.y, terms[:1])[0].sum(), data.x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("primitive", ["pair_reduce", "pair_sum"])
def test_second_derivative_raises(primitive, backend):
    data = _data(backend, "self")
    out = (
        pair_reduce(data.x, terms=[Term(LSE)])[0].sum()
        if primitive == "pair_reduce"
        else 2.0 * pair_sum(data.x, terms=[Term(SUM, Score.SQUARE)])
    )
    with pytest.raises(RuntimeError, match=f"{primitive} cannot be differentiated twice"):
        (gradient,) = torch.autograd.grad(out, data.x, create_graph=True)
        gradient.square().sum().backward()


def test_second_derivative_of_the_reference():
    data = make(4, None, 3).to(torch.float64)
    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x: pair_reduce(x, terms=[Term(LSE)])[0], (data.x,))


# --- repeatability and workspaces -------------------------------------------------------------------------------------


def _assert_equal(first, second) -> None:
    for part, other in zip(first, second, strict=True):
        for name, value in part.items():
            assert torch.equal(value, other[name]) or torch.equal(value.isnan(), other[name].isnan()), name
            assert torch.equal(value.nan_to_num(), other[name].nan_to_num()), f"{name} differs between runs"


@pytest.mark.parametrize(("program", "side"), on_sides(PROGRAMS))
def test_two_runs_are_bitwise_equal(program, side, backend):
    data = _data(backend, side, dtype=torch.float32)
    _assert_equal(evaluate(program.run, data, backend), evaluate(program.run, data, backend))


def test_threads_do_not_change_the_result(backend):
    data = _data(backend, "rectangle", dtype=torch.float32)
    (program,) = only("shared_scale")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append([evaluate(program.run, data, backend) for _ in range(2)])
    finally:
        torch.set_num_threads(threads)
    for first, second in results:
        _assert_equal(first, second)
    for part, other in zip(results[0][0], results[1][0], strict=True):
        for name, value in part.items():
            support.assert_close(name, value, other[name], 1e-5)


@pytest.mark.skipif("cpu" not in support.FUSED, reason="the cpu backend is not usable here")
def test_a_small_problem_takes_one_thread(products_per_thread):
    """Seen by the rounding, which depends on how a problem is divided."""
    data = make(140, 130, 128, precision=torch.float32)
    (program,) = only("clip")
    threads = torch.get_num_threads()

    def of_threads(count: int) -> list[dict]:
        torch.set_num_threads(count)
        return evaluate(program.run, data.to(torch.float32), "cpu")

    try:
        divided = [of_threads(count) for count in (1, 3)]
        torch.ops.flashpair_cpu.set_products_per_thread(products_per_thread)
        whole = [of_threads(count) for count in (1, 3)]
    finally:
        torch.set_num_threads(threads)
        torch.ops.flashpair_cpu.set_products_per_thread(1)
    _assert_equal(*whole)
    with pytest.raises(AssertionError):
        _assert_equal(*divided)


def _with_workspace(program, bytes_: int):
    """The program with every primitive called under a default workspace of so many bytes."""

    def run(data):
        previous = flashpair.set_max_workspace_bytes(bytes_)
        try:
            return program.run(data)
        finally:
            flashpair.set_max_workspace_bytes(previous)

    return run


@pytest.mark.parametrize(("program", "side"), on_sides(PROGRAMS))
def test_workspace_changes_nothing_but_rounding(program, side, backend):
    data = _data(backend, side)
    small = evaluate(_with_workspace(program, MINIMUM_BYTES), data, backend)
    large = evaluate(_with_workspace(program, LARGE), data, backend)
    tolerance = 1e-12 if _precise(backend) == torch.float64 else 1e-5
    for part, other in zip(small, large, strict=True):
        for name, value in part.items():
            support.assert_close(name, value, other[name], tolerance)


def _loss(data, workspace: int):
    terms = [Term(LSE, scale=data.scale), Term(LSE, axis=Axis.COLUMNS, mask=Mask.DIFFERENT, scale=data.scale)]
    outputs = pair_reduce(**data.pairs, terms=terms, max_workspace_bytes=workspace)
    return sum(torch.where(o.isinf(), 0.0, o).square().mean() for o in outputs)


@pytest.mark.parametrize("workspace", [MINIMUM_BYTES, LARGE])
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_interleaved_calls_do_not_meet(side, workspace, backend):
    """A workspace kept by one call must not leak into the gradient of another, whatever the order."""
    first, second = _data(backend, side, seed=1), _data(backend, side, seed=2)
    other = _data(backend, side, b=_size(backend) // 2, seed=3)
    want = [torch.autograd.grad(_loss(d, workspace), (d.x, d.scale)) for d in (first, second, other)]

    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        losses = [_loss(d, workspace) for d in (first, second, other)]
        with torch.no_grad():
            _loss(second, workspace)
        for k in order:
            data = (first, second, other)[k]
            for got, wanted in zip(torch.autograd.grad(losses[k], (data.x, data.scale)), want[k], strict=True):
                assert torch.equal(got, wanted)


@pytest.mark.parametrize("workspace", [MINIMUM_BYTES, LARGE])
def test_a_graph_can_be_used_twice(workspace, backend):
    data, other = _data(backend, "self", seed=1), _data(backend, "self", seed=2)
    loss = _loss(data, workspace)
    (first,) = torch.autograd.grad(loss, data.x, retain_graph=True)
    torch.autograd.grad(_loss(other, workspace), other.x)
    (second,) = torch.autograd.grad(loss, data.x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("workspace", [MINIMUM_BYTES, LARGE])
def test_inputs_changed_between_calls(workspace, backend):
    """The same storage with new numbers: nothing of the earlier numbers may be remembered."""
    data = _data(backend, "self", seed=1)
    fresh = _data(backend, "self", seed=2)
    (want,) = torch.autograd.grad(_loss(fresh, workspace), fresh.x)
    _loss(data, workspace)  # no backward: what it kept is abandoned
    with torch.no_grad():
        data.x.copy_(fresh.x)
        data.scale.copy_(fresh.scale)
    data.labels.copy_(fresh.labels)
    (got,) = torch.autograd.grad(_loss(data, workspace), data.x)
    assert torch.equal(got, want)


@pytest.mark.parametrize("workspace", [MINIMUM_BYTES, LARGE])
def test_inputs_changed_before_backward_raise(workspace, backend):
    data = _data(backend, "self")
    loss = _loss(data, workspace)
    with torch.no_grad():
        data.x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads_do_not_meet(backend):
    if support.interpreted(backend):
        pytest.skip("Triton's interpreter is not thread safe")
    datas = [_data(backend, "self", seed=k) for k in range(4)]

    def gradient(data):
        with support.forced(backend):
            return torch.autograd.grad(_loss(data, LARGE), data.x)[0]

    want = [gradient(d) for d in datas]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for got, wanted in zip(pool.map(gradient, datas), want, strict=True):
                assert torch.equal(got, wanted)
