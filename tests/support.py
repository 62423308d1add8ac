"""What the tests of the engine share: usable backends, data, programs' oracle and the comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import decimal
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import flashpair
from flashpair import Reduction, Score, Term, dispatch, pair_reduce

DENSE = dispatch.Backend("dense", "dense_backend", "tests")

#: Fused backends that run here; the first three columns of `flashpair.backends()` say why others do not.
FUSED = [b.name for b in dispatch.TABLE if b.name != "reference" and not b.why_not()]


#: Backends that run on a GPU; on CPU tensors only interpreted or emulated.
ON_GPU = ("triton", "cuda")


def device(backend: str) -> str:
    if backend not in ON_GPU or not torch.cuda.is_available():
        return "cpu"
    return "cpu" if backend == "cuda" and dispatch.named(backend).load().emulated() else "cuda"


def interpreted(backend: str) -> bool:
    """Triton's interpreter or emulated CUDA: right, and so slow that sizes must be small."""
    return backend in ON_GPU and device(backend) == "cpu"


def serves(backend: str, dtype: torch.dtype) -> bool:
    if backend == "reference":
        return True
    return not dispatch.named(backend).why_not(torch.empty(1, 1, dtype=dtype, device=device(backend)))


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """`use_backend` that also knows the dense twin."""
    with flashpair.use_backend(name):
        yield


@dataclasses.dataclass
class Data:
    """Inputs of a program; the floating-point ones are the leaves whose gradients are compared."""

    x: Tensor  # (B, D)
    y: Tensor | None  # (N, D)
    labels: Tensor  # (B,)
    ref_labels: Tensor | None  # (N,)
    pair_mask: Tensor  # (B, N)
    exclude: Tensor  # (B,)
    scale: Tensor  # ()
    bias: Tensor  # ()
    row_scale: Tensor  # (B,)
    row_offset: Tensor  # (B,)
    column_scale: Tensor  # (N,)
    column_offset: Tensor  # (N,)
    row_weight: Tensor  # (B,)
    column_weight: Tensor  # (N,)

    @property
    def pairs(self) -> dict:
        """The arguments of a primitive that name the embeddings and labels."""
        return {"x": self.x, "y": self.y, "labels": self.labels, "ref_labels": self.ref_labels}

    def leaves(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {n: v for n, v in values.items() if v is not None and v.is_floating_point()}

    def to(self, dtype: torch.dtype, device: str = "cpu", grad: bool = True) -> Data:
        """A copy: embeddings in `dtype`, parameters in the statistics' dtype, fresh leaves."""
        statistics = torch.float64 if dtype == torch.float64 else torch.float32

        def move(name: str, value: Tensor | None):
            if value is None or not value.is_floating_point():
                return None if value is None else value.to(device)
            value = value.detach().to(device=device, dtype=dtype if name in ("x", "y") else statistics, copy=True)
            return value.requires_grad_(grad)

        return Data(**{f.name: move(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)})


def make_labels(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """few: 4 unsorted classes; one: all alike; distinct: no positives; many: unsorted, large and negative values."""
    if kind == "one":
        return torch.full((count,), 7)
    if kind == "distinct":
        return torch.randperm(count, generator=generator) + (1 << 40)
    if kind == "many":
        return (torch.randint(0, max(count // 2, 1), (count,), generator=generator) - 3) * 1_000_003
    return torch.randint(0, 4, (count,), generator=generator)


def make(
    b: int,
    n: int | None,
    d: int,
    labels: str = "few",
    seed: int = 0,
    grid: bool = False,
    precision: torch.dtype = torch.float64,
) -> Data:
    """Random float64 data for B×N pairs (`n` None: self-similarity), with values that `precision` holds exactly.

    `grid`: entries are multiples of 1/4, so every similarity is exact in every dtype and no rounding can carry a pair
    over a threshold or a kink.
    """
    g = torch.Generator().manual_seed(seed)
    columns = b if n is None else n

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def embeddings(count: int) -> Tensor:
        if grid:
            return (normal(count, d) * 4 / math.sqrt(math.sqrt(max(d, 1)))).round() / 4
        return (normal(count, d) / math.sqrt(math.sqrt(max(d, 1)))).to(precision).double()

    single = lambda v: v.to(torch.float32).double()  # noqa: E731
    x = embeddings(b)
    y = None if n is None else embeddings(n)
    exclude = torch.randint(-1, max(columns, 1), (b,), generator=g)
    return Data(
        x,
        y,
        make_labels(labels, b, g),
        None if n is None else make_labels(labels, n, g),
        torch.rand(b, columns, generator=g) < 0.4,
        exclude,
        torch.tensor(1.5, dtype=torch.float64),
        torch.tensor(-0.25, dtype=torch.float64),
        single(1 + normal(b).abs()),
        single(normal(b) / 4),
        single(1 + normal(columns).abs()),
        single(normal(columns) / 4),
        single(0.1 + normal(b).abs()),
        single(0.1 + normal(columns).abs()),
    )


def _exact(kind: Score, z: float, c: float) -> tuple[float, float]:
    """(value, slope) of SOFTCAP or LOG_COSH, rounded once."""
    with decimal.localcontext(decimal.Context(prec=120)):
        exact = decimal.Decimal(z) / (decimal.Decimal(c) if kind == Score.SOFTCAP else 1)
        up, down = exact.exp(), (-exact).exp()
        tanh = (up - down) / (up + down)
        if kind == Score.SOFTCAP:
            return float(decimal.Decimal(c) * tanh), float(1 - tanh * tanh)
        return float(((up + down) / 2).ln()), float(tanh)


def check_scores(backend: str, dtype: torch.dtype) -> None:
    """Values and slopes of the scores with a tanh, pair by pair, from tiny arguments to huge ones."""
    sizes = [10.0**k for k in range(-12, 4)] + [k / 16 for k in range(64)] + [0.6249, 0.6251, 0.999, 1.001, 44.1, 88.9]
    z = torch.tensor([sign * size for size in sizes for sign in (1, -1)], dtype=dtype)[:, None]
    special = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)[:, None]
    one, eps = torch.ones(1, 1, dtype=dtype, device=device(backend)), torch.finfo(dtype).eps
    for kind, c in ((Score.SOFTCAP, 0.75), (Score.SOFTCAP, 30.0), (Score.LOG_COSH, 0.0)):
        term, x = Term(Reduction.SUM, kind, constant=c), z.to(one.device, copy=True).requires_grad_()
        with forced(backend):
            (value,) = pair_reduce(x, one, [term])
            (slope,) = torch.autograd.grad(value.sum(), x)
            (ends,) = pair_reduce(special.to(one.device), one, [term])
        want = torch.tensor([_exact(kind, v, c) for v in z[:, 0].tolist()], dtype=torch.float64)
        for name, got, exact in (("value", value, want[:, 0]), ("slope", slope[:, 0], want[:, 1])):
            # 1 - tanh^2 of autograd has digits after the point, not behind leading zeros.
            size = torch.ones_like(exact) if (name, kind) == ("slope", Score.SOFTCAP) else exact.abs()
            error = (got.detach().double().cpu() - exact).abs() / (8 * eps * size).clamp_min(1e-37)
            assert error.max() <= 1, f"{kind.name} {name} at {z[error.argmax()].item()}: {error.max():.2f} bounds"
        expected = [c, -c, math.nan] if kind == Score.SOFTCAP else [math.inf, math.inf, math.nan]
        torch.testing.assert_close(ends.cpu(), torch.tensor(expected, dtype=dtype), rtol=0, atol=0, equal_nan=True)


Program = Callable[[Data], "Tensor | tuple[Tensor, ...]"]


def cotangent(index: int, value: Tensor) -> Tensor:
    """Fixed random numbers of the shape of an output, the same for every dtype and backend."""
    g = torch.Generator().manual_seed(1000 + index)
    return torch.randn(value.shape, generator=g, dtype=torch.float64).to(value.device, value.dtype)


def evaluate(program: Program, data: Data, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a program on one backend, as float64 on the CPU.

    The loss is a fixed random combination of the outputs; entries that are infinite (empty owners) take no part.
    """
    with forced(backend):
        outputs = program(data)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    leaves = data.leaves()
    loss = sum(
        (torch.where(o.isinf(), 0.0, o) * cotangent(k, o)).sum() for k, o in enumerate(outputs) if o.requires_grad
    )
    grads: tuple = (None,) * len(leaves)
    if isinstance(loss, Tensor):
        with forced(backend):
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    wide = lambda t: t.detach().double().cpu()  # noqa: E731
    values = {f"output {k}": wide(o) for k, o in enumerate(outputs)}
    # A parameter that takes no part may have a zero gradient on one backend and none on another.
    gradients = {
        f"d{n}": torch.zeros(v.shape, dtype=torch.float64) if g is None else wide(g)
        for (n, v), g in zip(leaves.items(), grads, strict=True)
    }
    return values, gradients


def _finite_part(name: str, got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(want)), f"{name}: {kind.__name__} at other places than in the oracle"
    finite = want.isfinite()
    return got[finite], want[finite]


def assert_close(name: str, got: Tensor, want: Tensor, rtol: float = 1e-10, noise: float = 0.0) -> None:
    """Largest error at most `rtol` of the largest entry (or of 0.1, where everything cancels) plus the noise."""
    got, want = _finite_part(name, got, want)
    if want.numel() == 0:
        return
    error, size = (got - want).abs().max().item(), want.abs().max().item()
    bound = rtol * max(size, 0.1) + noise
    assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e}, size {size:.3e}, noise {noise:.3e}"


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def assert_as_good(
    name: str, got: Tensor, dense: Tensor, oracle: Tensor, eps: float, noise: float = 0.0, factor: float = 1.5
) -> None:
    """Root-mean-square error at most `factor` times that of dense PyTorch, plus a rounding of the size of `eps`."""
    got, want = _finite_part(name, got, oracle)
    if want.numel() == 0:
        return
    dense = dense[oracle.isfinite()]
    ours, theirs, size = _rms(got - want), _rms(dense - want), _rms(want)
    bound = factor * theirs + eps * size + noise
    assert ours <= bound, (
        f"{name}: error {ours:.3e}, dense PyTorch {theirs:.3e} (ratio {ours / max(theirs, 1e-300):.2f}), "
        f"bound {bound:.3e}, size {size:.3e}, noise {noise:.3e}"
    )


def rounded(data: Data, dtype: torch.dtype, seed: int = 0) -> Data:
    """`data` with every number changed by one rounding of `dtype`, up or down."""
    g = torch.Generator().manual_seed(seed)

    def change(value: Tensor) -> Tensor:
        sign = torch.randint(0, 2, value.shape, generator=g) * 2.0 - 1.0
        return value.detach() * (1 + sign * torch.finfo(dtype).eps)

    return dataclasses.replace(data, **{n: change(v) for n, v in data.leaves().items()})


def _sensitivity(program: Program, data: Data, oracle: tuple, dtype: torch.dtype, most: bool) -> dict[str, float]:
    """How much each result of the oracle changes when its inputs are rounded once: the largest of three trials."""
    found: dict[str, float] = {}
    for seed in range(3):
        changed = evaluate(program, rounded(data, dtype, seed).to(torch.float64), "reference")
        for part, wanted in zip(changed, oracle, strict=True):
            for name, value in part.items():
                change = torch.where(wanted[name].isfinite(), value - wanted[name], 0.0).reshape(-1)
                size = 0.0 if change.numel() == 0 else change.abs().amax().item() if most else _rms(change)
                found[name] = max(found.get(name, 0.0), size)
    return found


def compare(program: Program, data: Data, backend: str, dtype: torch.dtype, ill_conditioned: bool = False) -> None:
    """A program on a backend against the float64 reference, to the accuracy promised for `dtype`.

    `ill_conditioned`: allow for four times the change of the oracle when the inputs are rounded once. Scalars in narrow
    dtypes are allowed it too, since a single number may be right by luck in the dense result.
    """
    at, exact = device(backend), dtype == torch.float64
    oracle = evaluate(program, data.to(torch.float64), "reference")
    got = evaluate(program, data.to(dtype, at), backend)
    dense = oracle if exact else evaluate(program, data.to(dtype, at), "reference")
    noise: dict[str, float] = {}
    if ill_conditioned or not exact:
        noise = _sensitivity(program, data, oracle, torch.promote_types(dtype, torch.float32), most=exact)
    for part, plain, wanted in zip(got, dense, oracle, strict=True):
        for name, value in part.items():
            allowed = 4 * noise[name] if ill_conditioned or (value.dim() == 0 and not exact) else 0.0
            if exact:
                assert_close(name, value, wanted[name], noise=allowed)
                continue
            eps = 2 * torch.finfo(dtype).eps if name in ("dx", "dy") else 4 * torch.finfo(torch.float32).eps
            # A scalar's gradient sums over B owners of random sign: what cancels is sqrt(B) times larger.
            eps *= math.sqrt(max(data.x.shape[0], 1)) if value.dim() == 0 else 1.0
            assert_as_good(name, value, plain[name], wanted[name], eps, allowed)
