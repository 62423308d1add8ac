"""The operators as PyTorch sees them, and the choice of a backend."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading

import dense_backend
import pytest
import support
import torch
from programs import LSE, MEAN, SUM, on_sides, only
from support import make
from torch._subclasses.fake_tensor import FakeTensorMode

import flashpair
from flashpair import (
    Axis,
    BackendError,
    Extreme,
    Mask,
    Precision,
    Reduction,
    Score,
    Similarity,
    Term,
    dispatch,
    mine,
    ops,
    pair_reduce,
    pair_similarity,
    pair_sum,
    pairs,
    panels,
    use_backend,
)
from flashpair.operator import operator
from flashpair.request import encode, statistics_dtype
from flashpair.workspace import MINIMUM_BYTES, workspace_bytes


def _precise(backend: str) -> torch.dtype:
    return torch.float64 if support.serves(backend, torch.float64) else torch.float32


def _data(backend: str, side: str, layout: str = "plain", grad: bool = True):
    data = make(6, 5 if side == "rectangle" else None, 4).to(_precise(backend), support.device(backend), grad)
    if layout == "transposed":
        data.x = data.x.detach().T.contiguous().T.requires_grad_(grad)
        if data.y is not None:
            data.y = data.y.detach().T.contiguous().T.requires_grad_(grad)
    return data


def _terms(d):
    return [
        Term(LSE, scale=d.scale, offset=d.row_offset),
        Term(MEAN, axis=Axis.COLUMNS, mask=Mask.SAME, weight=d.row_weight),
        Term(Reduction.MOMENTS, mask=Mask.DIFFERENT, above=d.row_offset),
        Term(SUM, Score.SQUARE, Mask.GIVEN, scale=d.scale),
    ]


def _arguments(d, terms, backend: str):
    """The flat arguments that all operators begin with."""
    params, spec, consts = encode(terms, Similarity.DOT, True, d.y is None, True, Precision.IEEE)
    head = (d.x, d.y, d.labels, d.ref_labels, d.pair_mask, d.exclude)
    return (*head, params, spec, consts, backend, MINIMUM_BYTES)


CASES = pytest.mark.parametrize(("side", "layout"), [("rectangle", "plain"), ("self", "plain"), ("self", "transposed")])


@CASES
def test_opcheck_stats(side, layout, backend):
    data = _data(backend, side, layout)
    torch.library.opcheck(ops.pair_stats.overload, _arguments(data, _terms(data), backend))


@CASES
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)])
def test_opcheck_weights(side, layout, needs, backend):
    data = _data(backend, side, layout, grad=False)
    arguments = _arguments(data, _terms(data), backend)
    statistics = ops.pair_stats(*arguments)
    cotangents = [torch.rand_like(s.T).T for s in statistics]
    need_x, need_y = needs[0], needs[1] and data.y is not None
    need_params = [need_x, True, need_x, False]  # scale, offset, weight; nobody asks for a threshold's
    flat = (*cotangents, *statistics, *arguments, need_x, need_y, need_params)
    torch.library.opcheck(ops.pair_weights.overload, flat)


@CASES
@pytest.mark.parametrize("parameters", [True, False])
def test_opcheck_sum(side, layout, parameters, backend):
    data = _data(backend, side, layout)
    terms = [Term(SUM, Score.SOFTPLUS, scale=data.scale if parameters else 1.0), Term(SUM, axis=Axis.COLUMNS)]
    needs = (True, side == "rectangle", [True] if parameters else [])
    torch.library.opcheck(ops.pair_sum.overload, (*_arguments(data, terms, backend), *needs))


@CASES
def test_opcheck_loss(side, layout, backend):
    data = _data(backend, side, layout)
    terms, formula = [Term(LSE, scale=data.scale), Term(SUM, mask=Mask.SAME)], "mean_gap"
    if side == "self":
        terms, formula = [*terms, Term(LSE, axis=Axis.COLUMNS)], "mean_gap_of_both"
    terms.append(Term(Reduction.MOMENTS, axis=Axis.COLUMNS))
    torch.library.opcheck(ops.pair_loss.overload, _of_formula(data, terms, backend, formula))


def _of_formula(data, terms, backend, formula, counts=None, constants=()) -> tuple:
    """The arguments of `pair_loss`."""
    arguments = _arguments(data, terms, backend)
    return *arguments[:6], counts, *arguments[6:], formula, list(constants)


@CASES
@pytest.mark.parametrize("given", [True, False], ids=["counts given", "counts from the pass"])
def test_opcheck_loss_with_counts(side, layout, given, backend):
    data = _data(backend, side, layout)
    terms = [Term(LSE, scale=data.scale), Term(SUM, mask=Mask.SAME)]
    if not given:
        terms += [Term(Reduction.COUNT, offset=9.0, mask=mask) for mask in (Mask.SAME, Mask.DIFFERENT)]
    rows = data.x.shape[0]
    counts = torch.arange(2.0 * rows, device=data.x.device).reshape(2, rows).to(statistics_dtype(data.x))
    arguments = _of_formula(data, terms, backend, "sup_con", counts if given else None, (2.0, 0.0))
    torch.library.opcheck(ops.pair_loss.overload, arguments)


def test_only_the_loss_has_a_gradient(backend):
    """Not the statistics and slopes beside it, by either way."""
    for call in (ops.pair_loss, ops.pair_loss.overload):
        data = _data(backend, "self", "plain")
        terms = [Term(LSE, scale=data.scale), Term(SUM, mask=Mask.SAME)]
        found = call(*_of_formula(data, terms, backend, "mean_gap"))
        assert [t.requires_grad for t in found] == [True, False, False, False, False]


@CASES
def test_opcheck_mine(side, layout, backend):
    data = _data(backend, side, layout, grad=False)
    arguments = _arguments(data, [], backend)
    spec = [*arguments[7], int(Mask.SAME), 1, 2, -1, 0, int(Mask.ALL), 0, 3, -1, -1]
    consts = [-torch.inf, torch.inf, 0.1, torch.inf]
    torch.library.opcheck(ops.pair_mine.overload, (*arguments[:6], [data.row_offset], spec, consts, *arguments[9:]))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_opcheck_product(wanted):
    a, b = (torch.rand(*shape, requires_grad=w) for shape, w in zip(((3, 4), (4, 5)), wanted, strict=True))
    torch.library.opcheck(panels.product.overload, (a, b))
    assert torch.autograd.gradcheck(
        panels.product, [t.detach().double().requires_grad_(t.requires_grad) for t in (a, b)]
    )


def test_gradients_of_product_have_the_layout_of_a_plain_one():
    """Bit by bit and in strides: float32 layers before it round by the layout of the gradient that they are given."""
    rows, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 7, dtype=torch.float64)
    columns = rows.T.contiguous().T
    found = []
    for multiply in (panels.product, torch.matmul):
        seen = []
        for a in (rows, columns):
            for b in (rows.T, columns.T):
                sides = [t.detach().requires_grad_() for t in (a, b)]
                seen += torch.autograd.grad((multiply(*sides) * weight).sum(), sides)
            x = a.clone().requires_grad_()
            seen += torch.autograd.grad((multiply(x, x.T) * weight).sum(), x)
        found.append(seen)
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain) and ours.stride() == plain.stride()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("side", ["rectangle", "self"])
@pytest.mark.parametrize("similarity", Similarity)
def test_opcheck_pair_similarity(similarity, side, normalize):
    data = make(6, 5, 4).to(torch.float64)
    rows, columns = torch.tensor([0, 5, 5, 2]), torch.tensor([1, 1, 4, 0])
    static = (rows, columns, int(similarity), normalize)
    y = data.y if side == "rectangle" else None
    torch.library.opcheck(pairs.similarity_of_pairs.overload, (data.x, y, *static))
    x, y = data.x.detach(), None if y is None else y.detach()
    out = pairs.similarity_of_pairs(x, y, *static)
    arguments = (torch.rand_like(out), out, x, y, *static)
    torch.library.opcheck(pairs.gradients_of_pairs.overload, arguments)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["widest", "bfloat16"])
@CASES
def test_fakes_tell_the_truth(side, layout, dtype, backend):
    """Shapes, dtypes and strides that compiled code is told, against those that it gets."""
    data = _data(backend, side, layout, grad=False)
    if dtype is not None:
        data.x, data.y = data.x.to(dtype), None if data.y is None else data.y.to(dtype)
    arguments = _arguments(data, _terms(data), backend)
    needs = (True, side == "rectangle", [True, True, True, False])
    sums = _arguments(data, [Term(SUM, scale=data.scale)], backend)

    def run(arguments, sums):
        rows, columns = ops.pair_stats(*arguments)
        gradients = ops.pair_weights(rows, columns, rows, columns, *arguments, *needs)
        return [rows, columns, *gradients, *ops.pair_sum(*sums, *needs[:2], [True])]

    real = run(arguments, sums)
    with FakeTensorMode() as mode:
        convert = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
        fake = run(*torch.utils._pytree.tree_map(convert, (arguments, sums)))
    for got, told in zip(real, fake, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (told.shape, told.dtype, told.stride())


# --- torch.compile ----------------------------------------------------------------------------------------------------


def _compiled_cases(d):
    """Losses over every primitive; each returns a scalar."""
    programs = {p.name: p for p in only("clip", "siglip", "nt_xent", "cacr", "logsumexp_parameters", "given")}
    cases = {n: lambda d, p=p: sum(torch.where(o.isinf(), 0.0, o).sum() for o in p.run(d)) for n, p in programs.items()}

    def batch_hard(d):
        extremes = [Extreme(Mask.SAME, largest=False), Extreme(Mask.DIFFERENT)]
        found = mine(**d.pairs, extremes=extremes)
        rows = torch.arange(d.x.shape[0], device=d.x.device)
        far, near = (pair_similarity(d.x, d.y, rows, f.indices[:, 0].clamp_min(0), normalize=True) for f in found)
        return torch.relu(near - far + 0.2).sum()

    return cases | {"batch_hard": batch_hard}


@pytest.mark.parametrize(
    ("name", "side", "compiler"),
    [
        *((name, side, "aot_eager") for name in _compiled_cases(None) for side in ("rectangle", "self")),
        ("nt_xent", "self", "inductor"),
    ],
)
def test_compile_without_recompiling(name, side, compiler, backend):
    if support.interpreted(backend) and name not in ("clip", "siglip"):
        pytest.skip("too slow under Triton's interpreter")
    if compiler == "inductor" and backend != (support.FUSED or ["dense"])[0]:
        pytest.skip("inductor compiles the same code around every operator; once is enough")
    torch._dynamo.reset()
    loss = _compiled_cases(None)[name]

    def flat(leaves, rest):
        return loss(support.Data(**leaves, **rest))

    compiled = torch.compile(flat, fullgraph=True, backend=compiler)
    for step, (b, n) in enumerate([(6, 9), (8, 11), (13, 15), (7, 10)]):
        data = make(b, n if side == "rectangle" else None, 4, seed=step).to(_precise(backend), support.device(backend))
        leaves = data.leaves()
        rest = {k: getattr(data, k) for k in ("labels", "ref_labels", "pair_mask", "exclude")}
        if data.y is None:
            rest["y"] = None
        for tensor in (*leaves.values(), *rest.values()):
            for axis in range(0 if tensor is None or tensor.dim() == 0 else 2 if tensor.dtype == torch.bool else 1):
                torch._dynamo.mark_dynamic(tensor, axis)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            got = compiled(leaves, rest)
            got.backward()
        gradients = {k: v.grad for k, v in leaves.items()}
        want = flat(leaves, rest)
        torch.testing.assert_close(got, want)
        plain = torch.autograd.grad(want, list(leaves.values()), allow_unused=True)
        for (leaf, gradient), wanted in zip(gradients.items(), plain, strict=True):
            if wanted is not None and gradient is not None:
                torch.testing.assert_close(gradient, wanted, msg=lambda m, leaf=leaf: f"d{leaf}: {m}")
            else:
                assert all(g is None or g.eq(0).all() for g in (gradient, wanted)), leaf


def test_compiled_code_follows_use_backend():
    torch._dynamo.reset()
    x = torch.randn(5, 3)
    compiled = torch.compile(lambda x: pair_reduce(x, terms=[Term(LSE)])[0], fullgraph=True, backend="eager")
    for name in ("dense", "reference", "dense"):
        dense_backend.calls.clear()
        with use_backend(name):
            compiled(x)
        assert dense_backend.calls == (["stats"] if name == "dense" else [])


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "side"), on_sides(only("clip", "siglip", "cacr", "lifted")))
def test_autocast_does_not_narrow(program, side, backend):
    data = make(9, 7 if side == "rectangle" else None, 5).to(torch.float32, support.device(backend))
    want = support.evaluate(program.run, data, backend)
    with torch.autocast(data.x.device.type, torch.bfloat16):
        got = support.evaluate(program.run, data, backend)
    for part, wanted in zip(got, want, strict=True):
        for name, value in part.items():
            support.assert_close(name, value, wanted[name], 1e-6)


# --- the choice of a backend ------------------------------------------------------------------------------------------


def _serving(x=None, **options) -> str:
    return dispatch.choose(torch.zeros(2, 2) if x is None else x, options.get("pairs", 4))


def test_use_backend_nests_and_ends():
    before = dispatch.forced_name()
    with use_backend("reference"):
        with use_backend("dense"):
            assert _serving() == "dense"
        assert _serving() == "reference"
        with pytest.raises(KeyError), use_backend("dense"):
            raise KeyError
        assert _serving() == "reference"
    assert dispatch.forced_name() == before
    assert dispatch._forced_for_compile == before


def test_use_backend_belongs_to_its_thread():
    seen = {}
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait()
        seen["other"] = dispatch.forced_name()
        with use_backend("dense"):
            seen["forced"] = _serving()
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with use_backend("reference"):
        inside.set()
        done.wait()
        assert _serving() == "reference"
        thread.join()
    assert seen == {"other": None, "forced": "dense"}
    assert dispatch._entered == []


def test_interleaved_blocks_leave_nothing_behind():
    first, second = use_backend("reference"), use_backend("dense")
    contexts = []
    for manager in (first, second):
        thread_context = contextvars.copy_context()
        thread_context.run(manager.__enter__)
        contexts.append(thread_context)
    assert dispatch._forced_for_compile == "dense"
    contexts[0].run(first.__exit__, None, None, None)
    assert dispatch._forced_for_compile == "dense"
    contexts[1].run(second.__exit__, None, None, None)
    assert dispatch._forced_for_compile is None


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of .*reference.*; got 'gpu'"), use_backend("gpu"):
        pass


def test_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("FLASHPAIR_BACKEND", "dense")
    assert _serving() == "dense"
    with use_backend("reference"):
        assert _serving() == "reference"
    monkeypatch.setenv("FLASHPAIR_BACKEND", "gpu")
    with pytest.raises(ValueError, match="got 'gpu'"):
        pair_reduce(torch.zeros(2, 2), terms=[Term(SUM)])
    monkeypatch.setenv("FLASHPAIR_BACKEND", "")
    assert dispatch.forced_name() is None


@pytest.mark.parametrize("call", ["pair_reduce", "pair_sum", "mine"])
def test_a_forced_backend_that_cannot_serve_raises_with_its_reasons(call):
    x = torch.zeros(2, 2, dtype=torch.float16)
    run = {
        "pair_reduce": lambda: pair_reduce(x, terms=[Term(SUM)]),
        "pair_sum": lambda: pair_sum(x, terms=[Term(SUM)]),
        "mine": lambda: mine(x, extremes=[Extreme()]),
    }[call]
    with use_backend("dense"), pytest.raises(BackendError, match=r"'dense' was forced.*does not serve torch\.float16"):
        run()


def test_a_forced_backend_that_is_not_usable_raises_with_its_reasons():
    broken = [b for b in dispatch.TABLE if b.name != "reference" and b.why_not()]
    if not broken:
        pytest.skip("every backend is usable here")
    for backend in broken:
        with use_backend(backend.name), pytest.raises(BackendError) as error:
            pair_reduce(torch.zeros(2, 2), terms=[Term(SUM)])
        assert all(reason in str(error.value) for reason in backend.why_not())


def test_the_reference_is_not_chosen_for_a_large_input(monkeypatch):
    monkeypatch.setattr(dispatch, "TABLE", tuple(b for b in dispatch.TABLE if b.name == "reference"))
    small, large = torch.zeros(1024, 1), torch.zeros(1025, 1)
    assert _serving(small, pairs=1024 * 1024) == "reference"
    for run in (
        lambda: pair_reduce(large, terms=[Term(SUM)]),
        lambda: pair_sum(large, terms=[Term(SUM)]),
        lambda: mine(large, extremes=[Extreme()]),
    ):
        with pytest.raises(BackendError, match=r"no backend can serve(.|\n)*reference: stores the 1050625-entry"):
            run()
    with use_backend("reference"):
        pair_reduce(large, terms=[Term(SUM)])


def test_the_table_says_what_is_usable():
    table = flashpair.backends()
    assert table["reference"] == "usable" and list(table)[:4] == ["triton", "cuda", "cpu", "reference"]
    assert all(table.values())


def test_default_workspace():
    previous = flashpair.set_max_workspace_bytes(5 << 20)
    try:
        assert workspace_bytes(None) == 5 << 20 and workspace_bytes(7 << 20) == 7 << 20
    finally:
        assert flashpair.set_max_workspace_bytes(previous) == 5 << 20


# --- calls that nobody watches ----------------------------------------------------------------------------------------


def test_a_direct_call_is_the_dispatched_call(backend):
    """Value and every gradient, bit by bit; a profiler takes the way through the dispatcher."""
    found = []
    for call in (ops.pair_stats, ops.pair_stats.overload):
        data = _data(backend, "rectangle", "plain")
        rows, columns = call(*_arguments(data, _terms(data), backend))
        rows, columns = (torch.where(s.isinf(), 0.0, s) for s in (rows, columns))
        leaves = [data.x, data.y, data.scale]
        found.append([rows, columns, *torch.autograd.grad(rows.sum() + columns.square().sum(), leaves)])
    for direct, dispatched in zip(*found, strict=True):
        assert direct.requires_grad == dispatched.requires_grad and torch.equal(direct, dispatched)


def test_a_direct_call_returns_a_list_where_the_schema_does(backend):
    data = _data(backend, "self", "plain")
    arguments = (*_arguments(data, [Term(SUM, scale=data.scale)], backend), True, False, [True])
    for call in (ops.pair_sum, ops.pair_sum.overload):
        found = call(*arguments)
        assert type(found) is list and found[0].requires_grad


def test_a_profiler_sees_the_operators(backend):
    data = _data(backend, "self", "plain")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.pair_stats(*_arguments(data, _terms(data), backend))[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"flashpair::pair_stats", "flashpair::pair_weights"} <= names


def test_a_tracer_sees_the_operators(backend):
    from torch.fx.experimental.proxy_tensor import make_fx

    data = _data(backend, "self", "plain", grad=False)
    arguments = _arguments(data, _terms(data), backend)
    graph = make_fx(lambda x: ops.pair_stats(x, *arguments[1:])[0])(data.x)
    assert any(node.target is ops.pair_stats.overload for node in graph.graph.nodes)


def test_tensors_without_data_have_shapes():
    data = _data("cpu", "rectangle", "plain").to(torch.float32, "meta", grad=False)
    rows, columns = ops.pair_stats(*_arguments(data, _terms(data), "cpu"))
    assert rows.is_meta and rows.shape == (7, 6) and columns.shape == (2, 5)


def test_a_step_does_not_import_the_compiler():
    """Which takes a second that nobody who does not compile should pay."""
    program = (
        "import sys, torch; from flashpair.losses import ClipLoss;"
        "x, y = torch.randn(2, 8, 4, requires_grad=True); ClipLoss()(x, y, 10.0).backward();"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_one_list_of_tensors_at_most():
    @operator("test_two_lists")
    def two(x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        return x.clone()

    with pytest.raises(ValueError, match="test_two_lists has 2 lists of tensors; at most one is allowed"):
        two.differentiable(lambda ctx, needs, grad: (grad, [], []))


@pytest.mark.skipif("cpu" not in support.FUSED, reason="the C++ extension is not built")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite(dtype):
    """Every place of an array of several threads, the largest numbers and the smallest, strides, no entries."""
    from flashpair import backend_cpu

    info = torch.finfo(dtype)
    x = torch.tensor([info.max, info.min, info.tiny, info.smallest_normal / 2, -0.0, 1.0], dtype=dtype).repeat(100_001)
    assert backend_cpu.finite([x]) and backend_cpu.finite([x[:0]]) and backend_cpu.finite([x, x[:7]])
    for bad in (torch.nan, torch.inf, -torch.inf):
        for at in (0, 5, (1 << 18) - 1, 1 << 18, len(x) - 1):
            y = x.clone()
            y[at] = bad
            assert not backend_cpu.finite([y]) and not backend_cpu.finite([x[:3], y])
    table = y.view(-1, 3)
    assert backend_cpu.finite([table[:, :2]]) and not backend_cpu.finite([table[:, 1:]])
