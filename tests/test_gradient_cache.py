"""Chunked encoders: gradients of the whole batch, on one process and on several."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from flashpair import GradientCache, losses


class Towers(nn.Module):
    """Two encoders in one module, with dropout, batch normalisation and a learned scale."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        make = lambda width: nn.Sequential(  # noqa: E731
            nn.Linear(width, 8),
            nn.BatchNorm1d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(8, 4),
        )
        self.image, self.text = make(6), make(5)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, image=None, text=None):
        return self.image(image) if text is None else self.text(text)


def batch(rows: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, width, generator=g).to(dtype) for width in (6, 5))


def towers(**options) -> Towers:
    torch.manual_seed(0)
    return Towers(**options).double()


def chunked(model: Towers, images, texts, size: int) -> torch.Tensor:
    """The same chunks with all graphs alive: the definition."""
    sides = [torch.cat([f(part) for part in v.split(size)]) for f, v in ((model.image, images), (model.text, texts))]
    return losses.ClipLoss()(*sides, model.scale.exp())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 4, 5, 10, 100])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"dropout": 0.3, "norm": True}], ids=str)
def test_gradients_of_the_whole_batch(options, size):
    if options.get("norm") and size == 1:
        pytest.skip("batch normalisation needs two rows")
    images, texts = batch(10)
    want, got = towers(**options), towers(**options)
    torch.manual_seed(5)
    loss = chunked(want, images, texts, size)
    loss.backward()
    after = torch.rand(3)
    torch.manual_seed(5)
    step = GradientCache(losses.ClipLoss(), [got.image, got.text], size)
    value = step(images, texts, logit_scale=got.scale.exp())
    assert not value.requires_grad
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradients(got), gradients(want), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dict(got.named_buffers()), dict(want.named_buffers()))
    assert torch.equal(torch.rand(3), after)  # as many random numbers as one run takes


def test_gradients_add_up():
    images, texts = batch(8)
    once, twice = towers(), towers()
    for model, count in ((once, 1), (twice, 2)):
        for _ in range(count):
            GradientCache(losses.ClipLoss(), [model.image, model.text], 3)(images, texts, logit_scale=2.0)
    for name, gradient in gradients(once).items():
        if gradient is not None:
            torch.testing.assert_close(gradients(twice)[name], 2 * gradient)


def test_autocast_reaches_the_weights():
    """Narrow copies of weights that were made without a graph are not used with one."""
    images, texts = batch(8, torch.float32)
    want, got = towers().float(), towers().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked(want, images, texts, 3).backward()
        GradientCache(losses.ClipLoss(), [got.image, got.text], 3)(images, texts, logit_scale=got.scale.exp())
    for name, gradient in gradients(want).items():
        torch.testing.assert_close(gradients(got)[name], gradient, rtol=2e-2, atol=1e-3)


def test_scaler():
    images, texts = batch(8, torch.float32)
    plain, scaled = towers().float(), towers().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for model, given in ((plain, None), (scaled, scaler)):
        GradientCache(losses.ClipLoss(), [model.image, model.text], 3, scaler=given)(images, texts, logit_scale=2.0)
    torch.testing.assert_close(scaled.image[0].weight.grad, 8 * plain.image[0].weight.grad)


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, values, factor):
        return self.layer(values) * factor[:, None]


@pytest.mark.parametrize("kind", [tuple, dict])
def test_structured_inputs_and_labels(kind):
    """One encoder, inputs of several tensors, a loss with labels."""
    (values, _), factor, labels = batch(9), torch.linspace(0.5, 2, 9, dtype=torch.float64), torch.arange(9) % 3
    torch.manual_seed(0)
    want = Paired()
    losses.SupConLoss()(want(values, factor), labels).backward()
    torch.manual_seed(0)
    got = Paired()
    given = (values, factor) if kind is tuple else {"factor": factor, "values": values}
    GradientCache(losses.SupConLoss(), [got], 4)(given, labels=labels)
    torch.testing.assert_close(gradients(got), gradients(want))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda e: GradientCache(losses.ClipLoss(), [e], 0), ValueError, "chunk_size must be at least 1; got 0"),
        (lambda e: GradientCache(3, [e], 1), TypeError, "loss must be callable; got int"),
        (lambda e: GradientCache(losses.ClipLoss(), [], 1), TypeError, "encoders must be a list of callables"),
        (lambda e: GradientCache(losses.ClipLoss(), [e], 2)(*batch(3)), ValueError, "each of 1 encoders; got 2"),
        (
            lambda e: GradientCache(losses.ClipLoss(), [e], 2)((torch.ones(3), torch.ones(4))),
            ValueError,
            r"inputs\[0\] must hold tensors of one number of rows; got \[3, 4\]",
        ),
        (
            lambda e: GradientCache(losses.ClipLoss(), [lambda v: v.sum(1)], 2)(batch(3)[0]),
            ValueError,
            r"encoders must return representations \(rows, D\); got shape \(2,\)",
        ),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make(nn.Linear(6, 4))


# --- several processes ------------------------------------------------------------------------------------------------


def in_group(kind: str) -> tuple:
    rank, size = dist.get_rank(), dist.get_world_size()
    images, texts = (v[rank * 12 // size : (rank + 1) * 12 // size] for v in batch(12))
    model, calls = towers(), 0
    reduce = dist.all_reduce

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    loss = losses.ClipLoss(group=dist.group.WORLD)
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
        encoders = [lambda v: wrapped(image=v), lambda v: wrapped(text=v)]
        step = GradientCache(loss, encoders, 2, modules=[wrapped])
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (size,))
        for part in (model.image, model.text):
            fully_shard(part, mesh=mesh)
        step = GradientCache(loss, [model.image, model.text], 2)
    value = step(images, texts, logit_scale=model.scale.exp())
    found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in gradients(model).items()}
    dist.all_reduce = counted
    try:
        step(images, texts, logit_scale=model.scale.exp())
    finally:
        dist.all_reduce = reduce
    return value, found, calls


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, 3])
def test_on_several_processes(pools, size, kind):
    images, texts = batch(12)
    model = towers()
    loss = losses.ClipLoss()(model.image(images), model.text(texts), model.scale.exp())
    loss.backward()
    for value, found, calls in pools(size).values(in_group, kind):
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(found, gradients(model), rtol=1e-10, atol=1e-12)
        # One of the loss's sums in each direction, and one exchange of the parameters.
        assert calls <= 5
