"""The GPU backends on a GPU: right in every dtype, at any size and stride; captured, compiled, on any stream."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

import contrast_cases
import family_cases
import loss_cases
import pytest
import support
import torch
import views
from loss_cases import Batch, sides_of
from programs import PROGRAMS, on_sides, only
from support import compare, make
from torch import Tensor

import flashpair
from flashpair import dispatch, losses, miners
from flashpair.workspace import workspace_bytes

if not torch.cuda.is_available():
    pytest.skip(f"torch {torch.__version__} sees no GPU (torch.cuda.is_available())", allow_module_level=True)

AT = "cuda"
HALF = [torch.bfloat16, torch.float16]
DTYPES = [*HALF, torch.float32, torch.float64]
MIB = 1 << 20


def _name(value) -> str | None:
    return str(value)[6:] if isinstance(value, torch.dtype) else None


@pytest.fixture(params=support.ON_GPU)
def gpu(request) -> Iterator[str]:
    """Every GPU backend, forced; one that cannot run here is skipped with its reasons."""
    state = flashpair.backends().get(request.param, "not in this version")
    if state != "usable":
        pytest.skip(f"{request.param}: {state}")
    assert support.device(request.param) == AT and not support.interpreted(request.param)
    with support.forced(request.param):
        yield request.param


def _needs(backend: str, dtype: torch.dtype) -> None:
    if not support.serves(backend, dtype):
        pytest.skip(f"{backend} does not serve {dtype}")


def _needs_bytes(count: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if count > free:
        pytest.skip(f"needs {count / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")


# --- one step of a few losses -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """What a loss is called with."""

    x: Tensor  # (B, D)
    y: Tensor  # (B, D)
    labels: Tensor  # (B,)
    scale: Tensor  # ()

    def leaves(self) -> list[Tensor]:
        return [self.x, self.y, self.scale]

    def to(self, device: str) -> Step:
        moved = {f.name: getattr(self, f.name).detach().to(device, copy=True) for f in dataclasses.fields(self)}
        return Step(**{n: v.requires_grad_() if v.is_floating_point() else v for n, v in moved.items()})


def _inputs(b: int, d: int, dtype: torch.dtype, seed: int = 0) -> Step:
    """Rows of unit length, four of each label in random order."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.nn.functional.normalize(torch.randn(b, d, generator=g)).to(dtype) for _ in range(2))
    labels = (torch.arange(b) // 4)[torch.randperm(b, generator=g)]
    return Step(x, y, labels, torch.tensor(14.3)).to(AT)


def _mined(loss, miner, s: Step) -> Tensor:
    return loss(s.x, s.labels, miner(s.x, s.labels))


LOSSES = {
    "clip": lambda s: losses.ClipLoss()(s.x, s.y, s.scale),
    "sup_con": lambda s: losses.SupConLoss()(s.x, s.labels),
    "siglip": lambda s: losses.SigLipLoss()(s.x, s.y, s.scale, -10.0),
    "multi_similarity": lambda s: _mined(losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(), s),
    "batch_hard": lambda s: _mined(losses.TripletMarginLoss(), miners.BatchHardMiner(), s),
}


def _step(name: str, s: Step) -> list[Tensor]:
    """Loss and the gradients of what it depends on."""
    loss = LOSSES[name](s)
    grads = torch.autograd.grad(loss, s.leaves(), allow_unused=True)
    return [loss.detach(), *(g for g in grads if g is not None)]


def _relative(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


# --- losses and programs against the reference in float64 -------------------------------------------------------------


@pytest.mark.parametrize("case, side", sides_of(loss_cases.CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_loss(case, side, dtype, gpu):
    _needs(gpu, dtype)

    def run(d: support.Data) -> Tensor:
        return case.ours(Batch(d.x, d.y, d.labels, d.ref_labels, d.scale, d.bias))

    n = {"matched": 130, False: None, True: 77}[side]
    compare(run, make(130, n, 40, "many", precision=dtype), gpu, dtype)


@pytest.mark.parametrize("case, side", sides_of(family_cases.FAMILY))
def test_family(case, side, gpu):
    """In float32, whole rows included, against float64 on the CPU."""
    if case.name.startswith(("DynamicSoft", "ICNN")):
        pytest.skip("bins and ties: another rounding is another loss")
    data = loss_cases.batch("random", side, b=130, n=77, d=24)
    want, got = case.ours(data.to(torch.float64)), case.ours(data.to(torch.float32, "cuda"))
    loose = 1e-2 if case.name.startswith(("PNP", "SmoothAP", "Tuplet")) else 1e-4
    assert abs(got.double().cpu() - want) <= loose * want.abs().clamp_min(1e-2)
    got.backward()


@pytest.mark.parametrize("case", contrast_cases.CASES, ids=repr)
def test_contrast(case, gpu):
    """In float32, second products and label sets included, against float64 on the CPU."""
    if case.name.startswith("FeatureTransformation"):
        pytest.skip("random numbers of another device")
    whole = views.views(b=96, d=5)
    want = case.ours(whole)
    d = views.Views(*(v.detach().to("cuda", torch.float32).requires_grad_() for v in (whole.x, whole.y)))
    loss = case.make(None).to("cuda")
    got = case.call(loss, d)
    # Labels, lists and sets of a row follow from its numbers: a threshold between two of them may fall otherwise.
    assert abs(got.double().cpu() - want) <= 1e-3 * want.abs().clamp_min(1.0)
    got.backward()


@pytest.mark.parametrize("program", only("clip", "sum_parameters", "thresholds", "multi_similarity"), ids=str)
def test_small(program, gpu):
    """Few and small, for a memory checker to watch."""
    compare(program.run, make(37, 41, 24, grid=program.grid, precision=torch.bfloat16), gpu, torch.bfloat16)


@pytest.mark.parametrize("form", ["simple", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=_name)
@pytest.mark.parametrize(
    ("program", "side"), on_sides(only("clip", "supcon", "siglip", "sum_parameters", "thresholds", "multi_similarity"))
)
def test_forms(program, side, dtype, form, gpu):
    backend = dispatch.named(gpu).load()
    if not hasattr(backend, "form"):
        pytest.skip(f"{gpu} has one form")
    with backend.form(form):
        data = make(200, 195 if side == "rectangle" else None, 40, grid=program.grid, precision=dtype)
        compare(program.run, data, gpu, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=_name)
@pytest.mark.parametrize("shape", [(1001, 1024, 40), (513, 1001, 24)], ids=str)
@pytest.mark.parametrize("name", ["circle", "moments"])
def test_columns_begin_and_end_anywhere(name, shape, dtype, gpu):
    """Labels of columns that begin between multiples of 16 bytes; panels that end between them."""
    data = make(*shape, "many", precision=dtype)
    compare(only(name)[0].run, data, gpu, dtype, ill_conditioned=True)


# --- large ------------------------------------------------------------------------------------------------------------

ROWS, FEATURES, CHECKED = 1 << 18, 64, 5


def _stripes(x: Tensor, y: Tensor, scale: float, itself: bool) -> Iterator[tuple[slice, Tensor]]:
    """scale · x yᵀ in float64, some rows at a time; -inf on the diagonal where a row never meets itself."""
    for first in range(0, len(x), 1024):
        rows = slice(first, min(first + 1024, len(x)))
        z = scale * (x[rows] @ y.T)
        if not itself:
            z.diagonal(first).fill_(-math.inf)
        yield rows, z


def _logsumexp(x: Tensor, y: Tensor, scale: float, itself: bool = True) -> Tensor:
    return torch.cat([z.logsumexp(1) for _, z in _stripes(x, y, scale, itself)])


@functools.cache
def _dense_clip() -> tuple[float, Tensor]:
    """Loss, and the gradients of the first rows of x."""
    s = _inputs(ROWS, FEATURES, torch.bfloat16)
    x, y, scale = s.x.detach().double(), s.y.detach().double(), s.scale.double().item()
    rows, columns = _logsumexp(x, y, scale), _logsumexp(y, x, scale)
    own = scale * (x * y).sum(1)
    z = scale * (x[:CHECKED] @ y.T)
    weights = (z - rows[:CHECKED, None]).exp() + (z - columns).exp()
    gradient = scale / (2 * ROWS) * (weights @ y - 2 * y[:CHECKED])
    return ((rows + columns) / 2 - own).mean().item(), gradient


@functools.cache
def _dense_sup_con(temperature: float = 0.1) -> tuple[float, Tensor]:
    s = _inputs(ROWS, FEATURES, torch.bfloat16)
    raw, labels = s.x.detach().double(), s.labels
    norms = raw.norm(dim=1, keepdim=True)
    x = raw / norms
    everything = _logsumexp(x, x, 1 / temperature, itself=False)
    order = labels.argsort()  # four of each label: the positives are the other three
    sums = torch.empty_like(x)
    sums[order] = x[order].reshape(-1, 4, FEATURES).sum(1).repeat_interleave(4, 0)
    loss = (everything - ((sums - x) * x).sum(1) / 3 / temperature).mean().item()
    first = slice(0, CHECKED)
    z = x[first] @ x.T / temperature
    z.diagonal().fill_(-math.inf)
    weights = (z - everything[first, None]).exp() + (z - everything).exp()
    g = (weights @ x - 2 * (sums - x)[first] / 3) / (temperature * ROWS)
    return loss, (g - x[first] * (g * x[first]).sum(1, keepdim=True)) / norms[first]


@pytest.mark.parametrize(("name", "dense"), [("clip", _dense_clip), ("sup_con", _dense_sup_con)])
def test_a_quarter_of_a_million_rows(name, dense, gpu):
    """S would be 128 GiB in bfloat16: right, and the memory is that of the inputs and the workspace."""
    _needs_bytes(12 << 30)
    want, gradient = dense()
    s = _inputs(ROWS, FEATURES, torch.bfloat16)
    _step(name, _inputs(1024, FEATURES, torch.bfloat16))  # handles and workspaces of the libraries
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, dx, *_ = _step(name, s)
    growth = torch.cuda.max_memory_allocated() - before
    # Gradients, their float32 sums and a copy of the rows; forty vectors; what is put to float64 a piece at a time.
    inputs = sum(t.nbytes for t in ((s.x, s.y) if name == "clip" else (s.x,)))
    allowed = workspace_bytes(None) + 5 * inputs + 40 * 8 * ROWS + 128 * MIB
    assert growth <= allowed, f"grew by {growth / MIB:.0f} MiB, allowed {allowed / MIB:.0f}"
    assert dx.isfinite().all()
    assert abs(loss.item() - want) <= 1e-5 * abs(want)
    assert _relative(dx[:CHECKED], gradient) <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", ["clip", "sup_con"])
def test_offsets_beyond_two_to_the_31(name, gpu):
    """Rows so far apart that their offsets need 64 bits; what lies between them is NaN."""
    rows, stride = 4100, (1 << 19) + 64
    assert (rows - 1) * stride > 1 << 31
    _needs_bytes(3 * rows * stride * 2)
    near = _inputs(rows, FEATURES, torch.bfloat16)
    far = dataclasses.replace(near)
    for field in ("x", "y") if name == "clip" else ("x",):
        wide = torch.full((rows, stride), math.nan, dtype=torch.bfloat16, device=AT)[:, :FEATURES]
        setattr(far, field, wide.copy_(getattr(near, field).detach()).requires_grad_())
    for got, want in zip(_step(name, far), _step(name, near), strict=True):
        assert _relative(got, want) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", ["clip", "sup_con"])
def test_panels_of_more_than_two_to_the_31_elements(name, gpu):
    rows, workspace = 47104, 9 << 30
    assert rows * rows > 1 << 31
    _needs_bytes(3 * workspace)
    s = _inputs(rows, FEATURES, torch.bfloat16)
    want = _step(name, s)
    previous = flashpair.set_max_workspace_bytes(workspace)
    try:
        got = _step(name, s)
    finally:
        flashpair.set_max_workspace_bytes(previous)
    for a, b in zip(got, want, strict=True):
        assert _relative(a, b) <= 2 * torch.finfo(torch.bfloat16).eps


# --- capture, compilation, streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "sup_con"])
def test_graph_capture(name, gpu):
    """Forward and backward captured once; replayed on new inputs they are what eager gives."""
    s, other = (_inputs(700, 96, torch.bfloat16, seed) for seed in (0, 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _step(name, s)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(name, s)
    with torch.no_grad():
        for field in dataclasses.fields(s):
            getattr(s, field.name).copy_(getattr(other, field.name))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, _step(name, other), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["clip", "sup_con"])
def test_compile_without_recompiling(name, gpu):
    torch._dynamo.reset()

    def run(x: Tensor, y: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return LOSSES[name](Step(x, y, labels, scale))

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b in (300, 333, 390):  # between the same powers of two, which inductor itself tells apart
            s = _inputs(b, 40, torch.bfloat16, seed=b)
            loss = compiled(s.x, s.y, s.labels, s.scale)
            found = [loss.detach(), *torch.autograd.grad(loss, s.leaves(), allow_unused=True)]
            for got, want in zip([f for f in found if f is not None], _step(name, s), strict=True):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=_name)
@pytest.mark.parametrize("name", LOSSES)
def test_two_runs_are_bitwise_equal(name, dtype, gpu):
    s = _inputs(1500, 96, dtype)
    for first, second in zip(_step(name, s), _step(name, s), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", LOSSES)
def test_side_stream(name, gpu):
    """Inputs that arrive late on a stream: whoever works on another one reads zeros."""
    right = _inputs(700, 96, torch.bfloat16)
    want = _step(name, right)
    late = right.to(AT)
    with torch.no_grad():
        for leaf in (late.x, late.y):
            leaf.zero_()
    _step(name, late)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        with torch.no_grad():
            late.x.copy_(right.x)
            late.y.copy_(right.y)
        got = _step(name, late)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@contextlib.contextmanager
def _no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", LOSSES)
def test_the_host_never_waits(name, gpu):
    """Neither by a way that PyTorch sees nor by another: the step is issued while the GPU still sleeps."""
    s = _inputs(700, 96, torch.bfloat16)
    for _ in range(3):
        _step(name, s)
    torch.cuda.synchronize()
    asleep = torch.cuda.Event()
    with _no_synchronisation():
        torch.cuda._sleep(2_000_000_000)  # about a second
        asleep.record()
        _step(name, s)
        waited = asleep.query()
    torch.cuda.synchronize()
    assert not waited


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is visible")
@pytest.mark.parametrize("name", LOSSES)
def test_a_device_that_is_not_current(name, gpu):
    s = _inputs(700, 96, torch.bfloat16)
    with torch.cuda.device(0):
        want, got = _step(name, s.to("cuda:0")), _step(name, s.to("cuda:1"))
    for a, b in zip(got, want, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.cpu(), b.cpu())


# --- every program ----------------------------------------------------------------------------------------------------


def _programs() -> list:
    """Both sides in bfloat16 and float64, one in the others: the code differs by dtype and by side, not by both."""
    found = []
    for dtype in DTYPES:
        for param in on_sides(PROGRAMS):
            program, side = param.values
            one = {torch.float32: program.sides[0], torch.float16: program.sides[-1]}.get(dtype, side)
            if side == one:
                found.append(pytest.param(program, side, dtype, id=f"{param.id}-{_name(dtype)}"))
    return found


@pytest.mark.parametrize(("program", "side", "dtype"), _programs())
def test_program(program, side, dtype, gpu):
    _needs(gpu, dtype)
    grid = program.grid and dtype != torch.float64
    data = make(200, 195 if side == "rectangle" else None, 40, grid=grid, precision=dtype)
    compare(program.run, data, gpu, dtype)


RAGGED = [
    (128, 128, 64), (127, 129, 64), (129, 127, 65), (2, 3, 3), (2, 300, 17), (257, 5, 130), (64, None, 64),
    (129, None, 33), (385, None, 96),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=_name)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("program", only("clip", "sum_parameters", "thresholds", "given"), ids=str)
def test_ragged(program, shape, dtype, gpu):
    compare(program.run, make(*shape, "many", grid=program.grid, precision=dtype), gpu, dtype)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 3), (0, None, 3), (1, None, 3), (4, 3, 0)], ids=str)
@pytest.mark.parametrize("program", only("clip", "siglip", "sum_parameters", "thresholds", "multi_similarity"), ids=str)
def test_empty(program, shape, gpu):
    compare(program.run, make(*shape, grid=program.grid), gpu, torch.float32)


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "every second column": lambda t: t.repeat_interleave(2, -1)[:, ::2],
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "off by one element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=_name)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["clip", "sup_con"])
def test_strided_inputs(name, layout, dtype, gpu):
    """The same as from contiguous rows, but for the order in which a product is summed."""
    s = _inputs(300, 40, dtype)
    x, y = (LAYOUTS[layout](t.detach()) for t in (s.x, s.y))
    plain = dataclasses.replace(s, x=x.contiguous().requires_grad_(), y=y.contiguous().requires_grad_())
    strided = dataclasses.replace(s, x=x.requires_grad_(), y=y.requires_grad_())
    for got, want in zip(_step(name, strided), _step(name, plain), strict=True):
        torch.testing.assert_close(got, want)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_narrow(name, gpu):
    s = _inputs(300, 40, torch.float32)
    want = _step(name, s)
    with torch.autocast(AT, torch.bfloat16):
        got = _step(name, s)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_float16_with_a_scaled_loss(name, gpu):
    """The factor of a gradient scaler neither overflows the pair weights nor costs digits."""
    s = _inputs(300, 40, torch.float16)
    scaled = torch.autograd.grad(LOSSES[name](s) * 2.0**16, s.x)[0]
    exact = dataclasses.replace(s, x=s.x.detach().double().requires_grad_(), y=s.y.detach().double().requires_grad_())
    with support.forced("reference"):
        want = torch.autograd.grad(LOSSES[name](exact), exact.x)[0]
    assert scaled.isfinite().all()
    assert _relative(scaled.double() / 2.0**16, want) <= 4 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_poison_reaches_loss_and_gradient(name, value, gpu):
    s = _inputs(300, 40, torch.bfloat16)
    with torch.no_grad():
        s.x[170, 3] = value
    loss, dx, *_ = _step(name, s)
    assert loss.isnan() and dx.isnan().any()


# --- errors -----------------------------------------------------------------------------------------------------------


def test_tensors_on_different_devices(gpu):
    s = _inputs(8, 4, torch.float32)
    with pytest.raises(ValueError, match=r"labels must be on the device of .*cuda.*got cpu"):
        losses.SupConLoss()(s.x, s.labels.cpu())
    with pytest.raises(ValueError, match=r"text_features must be on the device of .*cuda.*got cpu"):
        losses.ClipLoss()(s.x, s.y.detach().cpu(), s.scale)
    with pytest.raises(ValueError, match=r"scale must be on cuda.*got cpu"):
        flashpair.pair_reduce(s.x, terms=[flashpair.Term(flashpair.Reduction.LOGSUMEXP, scale=torch.ones(()))])


@pytest.fixture
def another_architecture(monkeypatch) -> Iterator[None]:
    """A GPU that nothing was built for; what modules remember of the real one is forgotten before and after."""
    backend = dispatch.named("cuda").load()

    def forget() -> None:
        for value in vars(backend).values():
            getattr(value, "cache_clear", lambda: None)()

    forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (3, 7))
    yield
    monkeypatch.undo()
    forget()


def test_an_extension_built_for_another_architecture(request):
    if flashpair.backends().get("cuda") != "usable":
        pytest.skip(f"cuda: {flashpair.backends().get('cuda', 'not in this version')}")
    s = _inputs(8, 4, torch.float32)
    request.getfixturevalue("another_architecture")
    with support.forced("cuda"), pytest.raises(flashpair.BackendError, match=r"sm_37|3\.7|\b37\b"):
        losses.SupConLoss()(s.x, s.labels)


# --- class heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=_name)
@pytest.mark.parametrize("margin", [None, "arc", "curricular"])
def test_heads(margin, dtype, gpu, monkeypatch):
    """In several blocks of classes, against dense code in float64."""
    from flashpair import heads

    _needs(gpu, dtype)
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 96, generator=g).to(AT, dtype) for n in (130, 5000))
    labels = torch.randint(0, 5000, (130,), generator=g).to(AT)
    rule = {None: None, "arc": heads.CombinedMargin(16.0), "curricular": heads.CurricularFaceMargin(scale=16.0)}[margin]
    monkeypatch.setattr(
        heads.statistics, "class_blocks", lambda n, *_: [slice(i, min(i + 2048, n)) for i in range(0, n, 2048)]
    )

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        a, b = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
        module = None if rule is None else type(rule)(scale=16.0).to(AT, torch.promote_types(dtype, torch.float32))
        with support.forced(backend):
            loss = heads.class_loss(a, b, labels, margin=module)
            return [t.double() for t in (loss.detach(), *torch.autograd.grad(loss, (a, b)))]

    truth, dense, ours = results("reference", torch.float64), results("reference", dtype), results(gpu, dtype)
    for exact, theirs, mine in zip(truth, dense, ours, strict=True):
        allowed = 4 * (theirs - exact).abs().max() + 8 * torch.finfo(dtype).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= allowed


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_in_the_backward_pass_of_a_head(name, gpu):
    """Sampled classes; the host never waits."""
    from flashpair import heads

    head = heads.PartialFC_V2(heads.CombinedMargin(16.0), 64, 4000, sample_rate=0.25, device=AT, ignore_index=None)
    make_optimizer = {"sgd": heads.FusedSGD, "adamw": heads.FusedAdamW}[name]
    head.fuse(make_optimizer([head.weight], lr=0.1))
    x, labels = torch.randn(64, 64, device=AT, requires_grad=True), torch.randint(0, 4000, (64,), device=AT)
    head(x, labels).backward()
    before = head.weight.detach().clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(x, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    moved = (head.weight != before).any(1)
    others = torch.ones_like(moved)
    others[head.sampled] = False
    assert moved[labels].all() and not moved[others].any() and head.weight.isfinite().all()


# --- measured tiles ---------------------------------------------------------------------------------------------------


def test_a_tile_is_compared_and_timed(gpu):
    """By bench/tune.py: another order of the tiles computes the same, and its launches can be started again."""
    if gpu != "triton":
        pytest.skip("tiles of the Triton kernels")
    import bench_support  # noqa: F401
    import tune
    from flashpair.kernels import configs

    for kernel in ("stats", "weights"):
        architecture = configs.architecture(torch.device(AT))
        task = tune.Task(kernel, "half", architecture, (600, 500, 64), "bfloat16")
        trials = tune.Trials(task, AT, tune.KernelTimer(AT))
        other = dataclasses.replace(task.start, group=3)
        assert trials.against(other) == ""
        times = tune.in_turns([task.start, other], trials.sample, 3)
        assert all(0 < t < 1000 for of in times.values() for t in of)
