"""Training on several processes follows one; open_clip's arguments give open_clip's values and gradients."""

import functools

import pytest
import torch
import torch.distributed as dist
from loss_cases import open_clip_losses

from flashpair import losses
from flashpair.distributed import DistributedError


def train(group, ranks: int, rank: int, mixed: bool) -> list:
    """Two steps of two accumulated micro-batches each, two towers and a learned scale."""
    torch.manual_seed(0)
    towers = torch.nn.ModuleDict({n: torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)) for n in "ab"})
    towers.register_parameter("scale", torch.nn.Parameter(torch.tensor(1.0)))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = towers

        def forward(self, a, b):
            return towers["a"](a), towers["b"](b), towers.scale.exp()

    model = Model() if mixed else Model().double()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_of, values = losses.ClipLoss(group=group), []
    g = torch.Generator().manual_seed(1)
    for _ in range(2):
        optimizer.zero_grad()
        for micro in range(2):
            a, b = (torch.randn(12, 6, generator=g, dtype=torch.float32 if mixed else torch.float64) for _ in "ab")
            part = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
            quiet = wrapped.no_sync() if ranks > 1 and micro == 0 else torch.enable_grad()
            with quiet, torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = loss_of(*wrapped(a[part], b[part]))
                loss.backward()
                values.append(loss.item())
        optimizer.step()
    return [values, [p.detach() for p in model.parameters()]]


def train_here(mixed: bool) -> list:
    return train(dist.group.WORLD, dist.get_world_size(), dist.get_rank(), mixed)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_data_parallel_training_follows_one_process(pools, size, mixed):
    values, parameters = train(None, 1, 0, mixed)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if mixed else {"rtol": 1e-10, "atol": 1e-12}
    for found_values, found in pools(size).values(train_here, mixed):
        torch.testing.assert_close(found_values, values, **tolerance)
        torch.testing.assert_close(found, parameters, **tolerance)


def compiled(size: int) -> list:
    found = []
    for run in (lambda f: f, functools.partial(torch.compile, backend="eager")):
        x, y = (torch.randn(4, 5, generator=torch.Generator().manual_seed(dist.get_rank() + s)) for s in (0, 9))
        x, y = x.requires_grad_(), y.requires_grad_()
        loss_of = losses.ClipLoss(group=dist.group.WORLD)
        loss = run(lambda a, b, f=loss_of: f(a * 2, b, 5.0) + 0)(x, y)
        loss.backward()
        found.append((loss.detach(), x.grad, y.grad))
    return found


def test_compiled_callers(pools):
    for plain, through_compiler in pools(2).values(compiled, 2):
        torch.testing.assert_close(plain, through_compiler)


# --- open_clip --------------------------------------------------------------------------------------------------------


def like_open_clip(theirs: bool, name: str, options: dict) -> list:
    module = open_clip_losses() if theirs else losses
    rank, size = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(rank)
    unit = lambda: torch.nn.functional.normalize(torch.randn(4, 6, generator=g).double(), dim=1)  # noqa: E731
    x, y = unit().requires_grad_(), unit().requires_grad_()
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (9.0, -3.0))
    loss = getattr(module, name)(rank=rank, world_size=size, **options)
    value = loss(x, y, scale) if name == "ClipLoss" else loss(x, y, scale, bias)
    value.backward()
    shared = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in (scale, bias)])
    dist.all_reduce(shared)  # what DDP makes of them
    return [value.detach(), x.grad, y.grad, shared / size]


@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize("gather_with_grad", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_clip_like_open_clip(pools, size, local_loss, gather_with_grad):
    open_clip_losses()
    options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    ours, theirs = (pools(size).values(like_open_clip, t, "ClipLoss", options) for t in (False, True))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dist_impl", [None, "bidir", "shift", "reduce", "gather"])
@pytest.mark.parametrize("size", [2, 3])
def test_siglip_like_open_clip(pools, size, dist_impl):
    open_clip_losses()
    options = {"dist_impl": dist_impl}
    ours, theirs = (pools(size).values(like_open_clip, t, "SigLipLoss", options) for t in (False, True))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def wrong_ranks(world_size: int) -> None:
    losses.ClipLoss(rank=0, world_size=world_size)(torch.eye(2), torch.eye(2), 1.0)


def test_ranks_that_are_not_the_groups(pools):
    for error in pools(2).run(wrong_ranks, 3):
        assert isinstance(error, (ValueError, DistributedError)) and "world_size must be that of the" in str(error)
