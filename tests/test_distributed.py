"""Losses of a batch that several processes share: equal to one process with the whole batch, for every loss."""

import functools
import os
import statistics
import weakref
from unittest import mock

import group_cases
import processes
import pytest
import torch
import torch.distributed as dist
from loss_cases import open_clip_losses
from torch.distributed.device_mesh import init_device_mesh

import flashpair
from flashpair import losses, miners
from flashpair.distributed import DistributedError, Exchange, Group, sharded
from flashpair.distributed.cost import LOSSES, Step, main, simulate
from flashpair.distributed.sharded import over_ranks

SIZES = {1: ([12], [9]), 2: ([7, 5], [5, 4]), 3: ([4, 0, 8], [2, 7, 0]), 4: ([3, 2, 6, 1], [3, 1, 2, 3])}
#: Losses whose formula sees whole rows of S, class means or features: they cannot take columns block by block.
WHOLE = {
    "AngularLoss", "BarlowTwinsLoss", "CentroidTripletLoss", "DynamicSoftMarginLoss", "FastAPLoss",
    "GeneralPairWeightingLoss", "HistogramLoss", "ManifoldLoss", "NPairsLoss", "PNPLoss", "ProtoTripletLoss",
    "SignalToNoiseRatioContrastiveLoss", "SmoothAPLoss", "TripletMarginLoss", "TripletSemiHardLoss",
    "TupletMarginLoss", "VICRegLoss", "NormalizedSoftmaxLoss", "ProxyNCALoss", "SoftTripleLoss",
}  # fmt: skip
STREAMED_ALL_THE_SAME = {"TripletMarginLoss hard"}  # one listed triplet a row
ALSO_WHOLE = {"MarginLoss weighted"}  # the miner draws from whole rows


@functools.cache
def on_one_process(case: str, rows: int, columns: int) -> dict:
    return group_cases.evaluate(case, ([rows], [columns]))


def sizes_of(case: str, size: int) -> tuple[list[int], list[int]]:
    rows, columns = SIZES[size]
    return (rows, rows) if group_cases.matched(case) else (rows, columns)


def compare(ranks: list[dict], whole: dict) -> None:
    """Equal values on all ranks; values and gradients of one process."""
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)
    for found in ranks:
        assert torch.equal(found["value"], ranks[0]["value"]) or found["value"].isnan()
        close(found["learned"], whole["learned"])
        close(found["statistics"], whole["statistics"])
        close(found["buffers"], whole["buffers"])
    close(ranks[0]["value"], whole["value"])
    for name in ("dx", "dy"):
        close(torch.cat([found[name] for found in ranks]), whole[name])


def test_no_loss_is_left_out():
    covered = {case.split()[0] for case in group_cases.CASES}
    covered |= {"SogCLRLoss", "ISogCLRLoss"}  # with their states, in test_sog_clr.py
    assert {n for n in losses.__all__ if n.endswith("Loss")} <= covered


@pytest.mark.parametrize("case", group_cases.CASES)
@pytest.mark.parametrize("size", SIZES)
def test_gather(pools, size, case):
    sizes = sizes_of(case, size)
    compare(pools(size).values(group_cases.evaluate_here, case, sizes), on_one_process(case, *map(sum, sizes)))


@pytest.mark.parametrize("case", group_cases.CASES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring(pools, size, case):
    sizes = sizes_of(case, size)
    results = pools(size).run(group_cases.evaluate_here, case, sizes, "RING")
    whole = case.split()[0] in WHOLE or case in ALSO_WHOLE
    if whole and case not in STREAMED_ALL_THE_SAME:
        for error in results:
            assert isinstance(error, ValueError) and "exchange must be GATHER or AUTO" in str(error)
        return
    compare(results, on_one_process(case, *map(sum, sizes)))


def evaluate_with_workspace(case: str, sizes, features: int, workspace: int) -> tuple[dict, int]:
    """And how many messages went round the ring."""
    previous = flashpair.set_max_workspace_bytes(workspace)
    try:
        with mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as messages:
            found = group_cases.evaluate(case, sizes, dist.group.WORLD, dist.get_rank(), features)
        return found, messages.call_count
    finally:
        flashpair.set_max_workspace_bytes(previous)


@pytest.mark.parametrize("case", ["ClipLoss", "SmoothAPLoss self", "SupConLoss mined"])
def test_columns_that_do_not_fit_the_workspace_go_round_the_ring(pools, case):
    """AUTO; losses of whole rows gather in any case."""
    sizes, features = ([70, 40, 82],) * 2, 400
    found = pools(3).values(evaluate_with_workspace, case, sizes, features, 1 << 20)
    assert all((messages > 0) == ("SmoothAP" not in case) for _, messages in found)
    compare([f for f, _ in found], group_cases.evaluate(case, tuple([sum(s)] for s in sizes), features=features))
    found = pools(3).values(evaluate_with_workspace, case, sizes, features, 1 << 24)
    assert all(messages == 0 for _, messages in found)


def bitwise(case: str, sizes, exchange: str) -> bool:
    a, b = (group_cases.evaluate_here(case, sizes, exchange) for _ in range(2))
    return all(torch.equal(a[k], b[k]) for k in ("value", "dx", "dy"))


@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
def test_two_runs_are_bitwise_equal(pools, exchange):
    assert all(pools(3).values(bitwise, "ClipLoss", ([40, 17, 30],) * 2, exchange))


# --- narrow dtypes, other backends ------------------------------------------------------------------------------------


def clip_in(dtype: torch.dtype, sizes: list[int], group, rank: int | None) -> tuple:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(sum(sizes), 16, generator=g), dim=1).to(dtype) for _ in range(2))
    part = slice(None) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x, y = (v[part].clone().requires_grad_() for v in (x, y))
    loss = losses.ClipLoss(group=group)(x, y, 20.0)
    loss.backward()
    ranks = 1 if group is None else dist.get_world_size()
    return loss.detach(), x.grad.float() / ranks, y.grad.float() / ranks


def clip_in_group(dtype: torch.dtype, sizes: list[int], exchange: str) -> tuple:
    return clip_in(dtype, sizes, Group(exchange=Exchange[exchange]), dist.get_rank())


@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(pools, dtype, exchange):
    """The sum over the ranks is taken in float32: no worse than a process rounding its own gradient a few times."""
    sizes = [30, 2, 25]
    found = pools(3).values(clip_in_group, dtype, sizes, exchange)
    whole = clip_in(dtype, sizes, None, None)
    exact = clip_in(torch.float64, sizes, None, None)
    for k in range(3):
        got = found[0][0] if k == 0 else torch.cat([f[k] for f in found])
        scale = exact[k].abs().max().item()
        lost = (whole[k].double() - exact[k]).abs().max().item() / scale
        assert (got.double() - exact[k]).abs().max().item() / scale <= 3 * lost + 1e-6


def on_reference(case: str, sizes) -> dict:
    from flashpair import use_backend

    with use_backend("reference"):
        return group_cases.evaluate(case, sizes, dist.group.WORLD, dist.get_rank())


@pytest.mark.parametrize("case", ["ClipLoss", "SupConLoss mined", "SmoothAPLoss self", "TripletMarginLoss hard"])
def test_reference_backend(pools, case):
    """Dense and undivided, the same numbers."""
    sizes = sizes_of(case, 3)
    compare(pools(3).values(on_reference, case, sizes), on_one_process(case, *map(sum, sizes)))


def nan_in_a_rank(exchange: str) -> tuple:
    x = torch.ones(3, 4, requires_grad=True)
    bad = x * (float("nan") if dist.get_rank() == 1 else 1.0)
    loss = losses.SupConLoss(group=Group(exchange=Exchange[exchange]))(bad, torch.tensor([0, 1, 2]))
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
def test_nan_of_one_rank_reaches_all(pools, exchange):
    for loss, gradient in pools(3).values(nan_in_a_rank, exchange):
        assert loss.isnan() and gradient.isnan().any()


def nan_that_no_pair_meets() -> torch.Tensor:
    x = torch.eye(3)
    x = torch.full_like(x, torch.nan) if dist.get_rank() == 1 else x
    pairs = tuple(torch.tensor(v) for v in ([0, 1], [1, 0], [0, 1], [2, 2]))  # of the first rank's rows alone
    return losses.ContrastiveLoss(group=dist.group.WORLD)(x, torch.arange(3), pairs)


def test_nan_that_no_pair_meets(pools):
    assert all(loss.isnan() for loss in pools(2).values(nan_that_no_pair_meets))


def row_formula(panel, row: torch.Tensor, shared: torch.Tensor) -> list[torch.Tensor]:
    """Results by row, a total, and gradients in what belongs to rows and in what all share."""
    z = shared[0] * panel.s * row[:, None]
    return [torch.where(panel.allowed, z, 0.0).sum(1) + panel.row, (shared[1] * z * z).sum()]


def row_reduce_of(x: torch.Tensor) -> list[torch.Tensor]:
    row = torch.linspace(1, 2, x.shape[0], dtype=torch.float64).requires_grad_()
    shared = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    by_row, total = flashpair.row_reduce(x, None, row_formula, rows=[row], shared=[shared], totals=1, normalize=True)
    value = (by_row * by_row).sum() + total
    return [by_row.detach(), total.detach(), *torch.autograd.grad(value, (row, shared), retain_graph=True), value]


def row_reduce_here(sizes: list[int]) -> list[torch.Tensor]:
    whole, rank = group_cases.data(sum(sizes), 1)["x"], dist.get_rank()
    x = whole[sum(sizes[:rank]) : sum(sizes[: rank + 1])].clone().requires_grad_()
    *found, value = over_ranks(Group(), "row_reduce", "", row_reduce_of, {"x": x}, [])
    return [*found, torch.autograd.grad(value, x)[0] / dist.get_world_size()]


def test_row_reduce(pools):
    """The primitive by itself: results, totals, and gradients of its row inputs and shared ones, whole on each rank."""
    sizes = SIZES[3][0]
    x = group_cases.data(sum(sizes), 1)["x"].requires_grad_()
    *want, value = row_reduce_of(x)
    ranks = pools(3).values(row_reduce_here, sizes)
    for found in ranks:
        torch.testing.assert_close(found[:4], want)
    torch.testing.assert_close(torch.cat([f[4] for f in ranks]), torch.autograd.grad(value, x)[0])


def kept_after(cases: list[str]) -> list[str]:
    """Cases of which a batch outlives its step."""
    born, new = [], sharded.Sharded.__new__

    def noted(cls, *args, **kwargs):
        found = new(cls, *args, **kwargs)
        born.append(weakref.ref(found))
        return found

    left = []
    with mock.patch.object(sharded.Sharded, "__new__", staticmethod(noted)):
        for case in cases:
            born.clear()
            group_cases.evaluate_here(case, sizes_of(case, 2))
            assert born
            if any(batch() is not None for batch in born):
                left.append(case)
    return left


def test_nothing_of_a_batch_outlives_its_step(pools):
    assert pools(2).values(kept_after, group_cases.CASES) == [[], []]


# --- training ---------------------------------------------------------------------------------------------------------


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


# --- what does not fit together ---------------------------------------------------------------------------------------


def _features(rank: int):
    return losses.SupConLoss(group=dist.group.WORLD)(torch.eye(4, 4 + (rank == 2)), torch.arange(4))


def _dtype(rank: int):
    return losses.SupConLoss(group=dist.group.WORLD)(
        torch.eye(4, dtype=torch.float64 if rank == 1 else torch.float32), torch.arange(4)
    )


def _options(rank: int):
    return losses.SupConLoss(temperature=0.1 + 0.1 * (rank == 1), group=dist.group.WORLD)(torch.eye(4), torch.arange(4))


def _gradient(rank: int):
    return losses.SupConLoss(group=dist.group.WORLD)(torch.eye(4).requires_grad_(rank == 1), torch.arange(4))


def _another_loss(rank: int):
    kind = losses.NTXentLoss if rank == 1 else losses.SupConLoss
    return kind(group=dist.group.WORLD)(torch.eye(4), torch.arange(4))


def _references(rank: int):
    more = {} if rank == 0 else {"ref_emb": torch.eye(4), "ref_labels": torch.arange(4)}
    return losses.SupConLoss(group=dist.group.WORLD)(torch.eye(4), torch.arange(4), **more)


def _labels_on_one_rank(rank: int):
    labels = torch.arange(3) if rank == 1 else torch.arange(4)
    return losses.SupConLoss(group=dist.group.WORLD)(torch.eye(4), labels)


def _rows_on_one_rank(rank: int):
    return losses.ClipLoss(group=dist.group.WORLD)(torch.eye(3), torch.eye(3)[: 2 + (rank != 1)], 1.0)


def _exchange(rank: int):
    group = Group(exchange=Exchange.RING if rank else Exchange.GATHER)
    return losses.SupConLoss(group=group)(torch.eye(4), torch.arange(4))


def _miner_of_one_process(rank: int):
    x, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    return losses.SupConLoss(group=dist.group.WORLD)(x, labels, miners.MultiSimilarityMiner()(x, labels))


def _triplets_of_one_process(rank: int):
    x, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    return losses.TripletMarginLoss(group=dist.group.WORLD)(x, labels, miners.BatchHardMiner()(x, labels))


BAD = [
    (_features, "embeddings must be alike on all ranks; got 4 features on rank 0 and 5 features on rank 2"),
    (_dtype, "embeddings must be alike on all ranks; got torch.float32 on rank 0 and torch.float64 on rank 1"),
    (_options, "SupConLoss must have the same options on all ranks; rank 0 and rank 1 differ"),
    (_gradient, "got without gradient on rank 0 and with gradient on rank 1"),
    (_another_loss, "must be the same call"),
    (_references, "ref_emb must be alike on all ranks; got None"),
    (_labels_on_one_rank, "labels must have as many rows as embeddings on each rank, 4; got 3"),
    (_rows_on_one_rank, "text_features must have as many rows as image_features on each rank, 3; got 2"),
    (_exchange, "same options on all ranks"),
    (_miner_of_one_process, "must be of the global batch: give the miner the group too"),
    (_triplets_of_one_process, "mined in these 12 rows (in a group: by a miner with that group); got triplets of 4"),
]


def on_this_rank(function):
    return function(dist.get_rank())


@pytest.mark.parametrize("function, message", BAD, ids=lambda v: getattr(v, "__name__", ""))
def test_differences_raise_on_every_rank(pools, function, message):
    pool = pools(3)
    for error in pool.run(on_this_rank, function):
        assert isinstance(error, (ValueError, DistributedError)), error
        assert message in str(error)
    case = "ClipLoss"  # and nobody waits for anybody afterwards
    compare(
        pool.values(group_cases.evaluate_here, case, sizes_of(case, 3)),
        on_one_process(case, *map(sum, sizes_of(case, 3))),
    )


def test_refusal_names_the_rank(pools):
    errors = pools(3).run(on_this_rank, _labels_on_one_rank)
    assert [type(e) for e in errors] == [DistributedError, ValueError, DistributedError]
    assert str(errors[0]).startswith("rank 1 of 3 refused its input: ValueError: labels must have")


def test_without_a_process_group():
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group first"):
        losses.ClipLoss(group=Group())(torch.eye(2), torch.eye(2), 1.0)
    with pytest.raises(RuntimeError, match=r"init_process_group first"):
        losses.ClipLoss(rank=0, world_size=2)(torch.eye(2), torch.eye(2), 1.0)
    with pytest.raises(TypeError, match="group must be None, a process group"):
        losses.SupConLoss(group="nccl")
    with pytest.raises(TypeError, match=r"exchange must be a flashpair\.distributed\.Exchange; got .ring."):
        Group(exchange="ring")
    with pytest.raises(ValueError, match="local_loss and gather_with_grad must be False with group"):
        losses.ClipLoss(local_loss=True, group=Group())
    with pytest.raises(ValueError, match="dist_impl must be None with group"):
        losses.SigLipLoss(dist_impl="bidir", group=Group())


def in_a_part() -> str | float:
    part = dist.new_group([0, 1])
    loss = losses.ClipLoss(group=part)
    if dist.get_rank() == 2:
        try:
            loss(torch.eye(2), torch.eye(2), 1.0)
        except ValueError as error:
            return str(error)
    return float(loss(torch.eye(2), torch.eye(2), 1.0))


def test_a_rank_outside_of_the_group(pools):
    first, second, outside = pools(3).values(in_a_part)
    assert outside == "group must contain the calling process; rank 2 is not in it"
    assert first == second


def in_a_mesh() -> tuple[float, str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    x = torch.eye(3) + dist.get_rank()
    value = float(losses.ClipLoss(group=mesh["shard"])(x, x, 0.1))
    try:
        losses.ClipLoss(group=mesh)(x, x, 1.0)
    except ValueError as error:
        return value, str(error)
    return value, ""


def test_mesh_dimensions(pools):
    results = pools(4).values(in_a_mesh)
    assert results[0][0] == results[1][0] != results[2][0] == results[3][0]
    assert results[0][1] == "group must be one dimension of a DeviceMesh, mesh[name]; got 2 of them"


def then_one_dies(rank_that_dies: int) -> float:
    loss = losses.ClipLoss(group=dist.group.WORLD)
    x = torch.eye(3).requires_grad_()
    value = loss(x, x, 1.0)
    if dist.get_rank() == rank_that_dies:
        os._exit(1)
    value.backward()
    for _ in range(3):
        loss(x, x, 1.0)
    return float(value)


def test_a_peer_that_dies():
    pool = processes.Pool(3, timeout_s=10)
    try:
        results = pool.run(then_one_dies, 2)
        assert results[2] is None
        for rank, error in enumerate(results[:2]):
            assert isinstance(error, DistributedError), error
            assert str(error).startswith(f"rank {rank} of 3 failed") and "no answer from rank 2" in str(error)
    finally:
        pool.close()


# --- the wire and the memory ------------------------------------------------------------------------------------------


def loopback_bytes() -> int:
    with open("/proc/net/dev") as file:
        return int(next(line for line in file if line.strip().startswith("lo:")).split(":")[1].split()[8])


def steps(name: str, sizes: list[int], features: int, exchange: str, count: int) -> int:
    """Bytes over the loopback device during `count` steps."""
    rank = dist.get_rank()
    g = torch.Generator().manual_seed(rank)
    group = Group(exchange=Exchange[exchange])
    x, y = (torch.randn(sizes[rank], features, generator=g).requires_grad_() for _ in range(2))

    def step() -> None:
        if name == "clip":
            losses.ClipLoss(group=group)(x, y, 1.0).backward()
        elif name == "siglip":
            losses.SigLipLoss(group=group)(x, y, 1.0).backward()
        else:
            losses.SupConLoss(group=group)(x, torch.arange(len(x)) % 7).backward()

    step()
    dist.barrier()
    before = loopback_bytes()
    for _ in range(count):
        step()
    dist.barrier()
    return loopback_bytes() - before


@pytest.mark.skipif(not os.path.exists("/proc/net/dev"), reason="counts bytes of the loopback device")
@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("sizes", [[256] * 2, [256] * 4, [100, 356, 20]], ids=str)
def test_bytes_on_the_wire(pools, sizes, name, exchange):
    """What really crosses the sockets is what the model says, within packet headers and small sums."""
    features, count = 256, 2
    sent = pools(len(sizes)).values(steps, name, sizes, features, exchange, count)[0] / count
    step = Step(len(sizes), max(sizes), features, itemsize=4, **LOSSES[name])
    predicted = sum(simulate(Exchange[exchange], sizes, step))
    assert 0.97 * predicted <= sent <= 1.06 * predicted + 40_000


@pytest.mark.parametrize("exchange", [Exchange.GATHER, Exchange.RING])
@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
def test_model_is_the_simulation(ranks, name, exchange):
    step = Step(ranks, 64, 32, **LOSSES[name])
    assert simulate(exchange, [64] * ranks, step) == [step.sent_bytes(exchange)] * ranks


def test_cost_table(capsys):
    main(["--ranks", "1", "8", "4096"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 2 * 2 and "16,777,216" in lines[-1]
    with pytest.raises(SystemExit):
        main(["--rows", "0"])
    assert "--rows must be positive; got 0" in capsys.readouterr().err


def peak_bytes(sizes: list[int], features: int, exchange: str) -> int:
    """Growth of this process's resident set during a step."""
    rank = dist.get_rank()
    x, y = (torch.randn(sizes[rank], features, requires_grad=True) for _ in range(2))
    loss = losses.ClipLoss(group=Group(exchange=Exchange[exchange]))
    status = lambda key: next(int(v.split()[1]) for v in open("/proc/self/status") if v.startswith(key))  # noqa: E731, SIM115
    loss(x[:8], y[:8], 1.0).backward()
    x.grad = y.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    loss(x, y, 1.0).backward()
    return 1024 * (status("VmHWM") - before)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures the resident set")
def test_memory_of_a_ring_does_not_grow_with_the_ranks():
    rows, features = 1024, 1024
    block = rows * features * 4
    peaks = {}
    for size in (1, 2, 4):
        pool = processes.Pool(size)
        try:
            for exchange in ("RING", "GATHER"):
                found = pool.values(peak_bytes, [rows] * size, features, exchange)
                peaks[size, exchange] = statistics.median(found)
        finally:
            pool.close()
    # The double buffer is full from three ranks on; what allocators keep moves by about a block.
    assert peaks[4, "RING"] <= peaks[2, "RING"] + 2.5 * block, peaks
    assert peaks[4, "GATHER"] >= peaks[2, "GATHER"] + 5 * block, peaks  # the ruler sees what grows
