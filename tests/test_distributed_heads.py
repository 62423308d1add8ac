"""Class heads whose classes are spread over ranks: equal to one process that holds them all."""

import functools
import os

import processes
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from flashpair import heads, use_backend
from flashpair.distributed import DistributedError, Exchange, Group

CLASSES, FEATURES = 11, 5
HEADS = {
    "ClassHead": lambda **k: heads.ClassHead(CLASSES, FEATURES, **k),
    "bias": lambda **k: heads.ClassHead(CLASSES, FEATURES, bias=True, **k),
    "smoothed": lambda **k: heads.ClassHead(
        CLASSES, FEATURES, formula=heads.CrossEntropy(label_smoothing=0.1), softcap=5.0, bias=True, **k
    ),
    "weighted": lambda **k: heads.ClassHead(
        CLASSES, FEATURES, class_weight=torch.linspace(0.5, 2, CLASSES, dtype=torch.float64), ignore_index=3, **k
    ),
    "ArcFace": lambda **k: heads.ArcFace(CLASSES, FEATURES, **k),
    "CosFace": lambda **k: heads.CosFace(CLASSES, FEATURES, **k),
    "NormFace": lambda **k: heads.NormFace(CLASSES, FEATURES, **k),
    "SphereFace": lambda **k: heads.SphereFace(CLASSES, FEATURES, **k),
    "AdaFace": lambda **k: heads.AdaFace(CLASSES, FEATURES, **k),
    "MagFace": lambda **k: heads.MagFace(CLASSES, FEATURES, **k),
    "CurricularFace": lambda **k: heads.CurricularFace(CLASSES, FEATURES, **k),
    "P2SGrad": lambda **k: heads.P2SGrad(CLASSES, FEATURES, **k),
    "unified": lambda **k: heads.UNPG(heads.CosFace(CLASSES, FEATURES, **k)),
    "PartialFC_V2": lambda **k: heads.PartialFC_V2(heads.ArcFace(1, 1).margin, FEATURES, CLASSES, **k),
}
SIZES = {1: [9], 2: [6, 3], 3: [4, 0, 5], 4: [2, 3, 1, 3]}


def data(rows: int) -> tuple:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, FEATURES, generator=g).double(), torch.randn(CLASSES, FEATURES, generator=g).double()
    labels = torch.randint(0, CLASSES, (rows,), generator=g)
    return 3 * x, weight, labels, torch.rand(rows, generator=g).double()


def evaluate(name: str, sizes: list[int], group=None, rank: int | None = None, weighted: bool = False) -> dict:
    x, weight, labels, sample = data(sum(sizes))
    own = slice(None) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    head = HEADS[name](group=group).double()
    layer = getattr(head, "head", head)
    with torch.no_grad():
        layer.weight.copy_(weight[layer.classes.start : layer.classes.stop])
        if layer.bias is not None:
            layer.bias.copy_(torch.linspace(-1, 1, CLASSES))
    x, sample = x[own].clone().requires_grad_(), sample[own].clone().requires_grad_()
    value = head(x, labels[own], sample if weighted else None)
    value.backward()
    ranks = 1 if group is None else dist.get_world_size()
    learned = {n: p.grad for n, p in head.named_parameters() if p is not layer.weight}
    none = torch.zeros_like(sample)
    return {
        "value": value.detach(), "dx": x.grad / ranks, "dw": layer.weight.grad, "learned": learned,
        "dsample": sample.grad / ranks if weighted else none, "buffers": dict(head.named_buffers()),
    }  # fmt: skip


def evaluate_here(name: str, sizes: list[int], weighted: bool, exchange: str = "GATHER") -> dict:
    return evaluate(name, sizes, Group(exchange=Exchange[exchange]), dist.get_rank(), weighted)


@functools.cache
def whole(name: str, rows: int, weighted: bool) -> dict:
    return evaluate(name, [rows], weighted=weighted)


def compare(ranks: list[dict], want: dict) -> None:
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)
    for found in ranks:
        assert torch.equal(found["value"], ranks[0]["value"])
        close(found["value"], want["value"])
        close(found["learned"], want["learned"])
        close(found["buffers"], want["buffers"])
    for name in ("dx", "dw", "dsample"):
        close(torch.cat([found[name] for found in ranks]), want[name])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", SIZES)
def test_heads(pools, size, name, weighted):
    sizes = SIZES[size]
    compare(pools(size).values(evaluate_here, name, sizes, weighted), whole(name, sum(sizes), weighted))


def on_reference(name: str, sizes: list[int]) -> dict:
    with use_backend("reference"):
        return evaluate_here(name, sizes, False)


@pytest.mark.parametrize("name", ["ArcFace", "CurricularFace", "bias"])
def test_reference_backend(pools, name):
    compare(pools(3).values(on_reference, name, SIZES[3]), whole(name, sum(SIZES[3]), False))


def predict_here(name: str, k: int, bias: bool) -> tuple:
    x, weight, labels, _ = data(8)
    head = HEADS[name](group=dist.group.WORLD).double()
    with torch.no_grad():
        head.weight.copy_(weight[head.classes.start : head.classes.stop])
        if bias:
            head.bias.copy_(torch.linspace(-1, 1, CLASSES))
    own = slice(dist.get_rank() * 8 // dist.get_world_size(), (dist.get_rank() + 1) * 8 // dist.get_world_size())
    return *head.predict(x[own], k), head.accuracy(x[own], labels[own], k)


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("name", ["ArcFace", "bias"])
def test_predict(pools, name, k):
    """The best classes of the rows of all ranks, wherever they are; more of them than a rank holds."""
    x, weight, labels, _ = data(8)
    head = HEADS[name]().double()
    with torch.no_grad():
        head.weight.copy_(weight)
        if name == "bias":
            head.bias.copy_(torch.linspace(-1, 1, CLASSES))
    want = (*head.predict(x, k), head.accuracy(x, labels, k))
    for found in pools(3).values(predict_here, name, k, name == "bias"):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


# --- samples, optimisers, checkpoints ---------------------------------------------------------------------------------


def sample_here(rate: float) -> dict:
    """One step over sampled classes, and the same by a dense loop over what every rank sampled."""
    x, weight, labels, _ = data(9)
    rank, size = dist.get_rank(), dist.get_world_size()
    own = slice(rank * 9 // size, (rank + 1) * 9 // size)
    margin = heads.CosFace(1, 1, margin=0.2, scale=8.0).margin
    head = heads.PartialFC_V2(margin, FEATURES, CLASSES, rate, group=dist.group.WORLD).double()
    with torch.no_grad():
        head.weight.copy_(weight[head.classes.start : head.classes.stop])
    torch.manual_seed(rank)
    mine = x[own].clone().requires_grad_()
    value = head(mine, labels[own])
    value.backward()
    return {
        "value": value.detach(), "dx": mine.grad / size, "dw": head.weight.grad,
        "sampled": head.sampled + head.classes.start, "held": len(head.classes),
    }  # fmt: skip


@pytest.mark.parametrize("rate", [0.1, 0.6])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_partial_fc(pools, size, rate):
    found = pools(size).values(sample_here, rate)
    x, weight, labels, _ = data(9)
    sampled = torch.cat([f["sampled"] for f in found])
    assert set(labels.tolist()) <= set(sampled.tolist())
    for f in found:
        present = sum(int(label) in f["sampled"].tolist() for label in set(labels.tolist()))
        assert len(f["sampled"]) == max(int(rate * f["held"]), 1, present)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    cosine = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(weight, dim=1).T
    logits = 8.0 * (cosine - 0.2 * torch.nn.functional.one_hot(labels, CLASSES))[:, sampled]
    at = (sampled[None, :] == labels[:, None]).int().argmax(1)
    want = torch.nn.functional.cross_entropy(logits, at)
    want.backward()
    for f in found:
        torch.testing.assert_close(f["value"], want.detach())
    torch.testing.assert_close(torch.cat([f["dx"] for f in found]), x.grad)
    torch.testing.assert_close(torch.cat([f["dw"] for f in found]), weight.grad)


def train(group, rank: int, ranks: int, fused: bool, rate: float = 1.0, start: dict | None = None, steps: int = 3):
    """A linear backbone under DDP and a head with its own optimiser."""
    torch.manual_seed(0)
    backbone = torch.nn.Linear(4, FEATURES).double()
    wrapped = DistributedDataParallel(backbone) if ranks > 1 else backbone
    margin = heads.CosFace(1, 1, margin=0.2, scale=8.0).margin
    head = heads.PartialFC_V2(margin, FEATURES, CLASSES, rate, group=group).double()
    if start is None:
        with torch.no_grad():
            head.weight.copy_(data(9)[1][head.classes.start : head.classes.stop])
    if fused:
        optimizer = heads.FusedSGD([head.weight], lr=0.3, momentum=0.9)
        head.fuse(optimizer)
    else:
        optimizer = torch.optim.SGD([head.weight], lr=0.3, momentum=0.9)
    if start is not None:
        heads.load_shard(head, start["head"])
        backbone.load_state_dict(start["backbone"])
    of_backbone = torch.optim.SGD(backbone.parameters(), lr=0.3)
    g, values = torch.Generator().manual_seed(3), []
    for _ in range(steps):
        inputs, labels = torch.randn(12, 4, generator=g).double(), torch.randint(0, CLASSES, (12,), generator=g)
        own = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
        of_backbone.zero_grad()
        optimizer.zero_grad()
        loss = head(wrapped(inputs[own]), labels[own])
        loss.backward()
        of_backbone.step()
        if not fused:
            optimizer.step()
        values.append(loss.item())
    return values, heads.save_shard(head), backbone.state_dict()


def train_here(fused: bool, starts: list[dict] | None = None):
    rank = dist.get_rank()
    start = None if starts is None else starts[rank]
    return train(dist.group.WORLD, rank, dist.get_world_size(), fused, start=start)


@pytest.mark.parametrize("fused", [False, True])
def test_training_with_a_backbone_under_ddp(pools, fused):
    values, shard, backbone = train(None, 0, 1, fused)
    results = pools(3).values(train_here, fused)
    for found, _, state in results:
        torch.testing.assert_close(found, values, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state, backbone, rtol=1e-10, atol=1e-12)
    (joined,) = heads.reshard([s for _, s, _ in results], 1)
    torch.testing.assert_close(joined["classes"]["weight"], shard["classes"]["weight"], rtol=1e-10, atol=1e-12)


def test_checkpoints_go_on_with_another_number_of_ranks(pools):
    """Three ranks, then two, then one: the curve of one process."""
    first = pools(3).values(train_here, True)
    shards, backbone = [s for _, s, _ in first], first[0][2]
    curves = []
    for ranks in (1, 2):
        starts = [{"head": s, "backbone": backbone} for s in heads.reshard(shards, ranks)]
        if ranks == 1:
            curves.append(train(None, 0, 1, True, start=starts[0])[0])
        else:
            curves.append(pools(2).values(train_here, True, starts)[0][0])
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-10, atol=1e-12)


def step_with_a_bad_weight(rank_of_it: int) -> bool:
    """Whether a fused step left this rank's weights as they were, where one rank holds an infinite one."""
    x, weight, labels, _ = data(6)
    head = heads.ClassHead(CLASSES, FEATURES, group=dist.group.WORLD).double()
    with torch.no_grad():
        head.weight.copy_(weight[head.classes.start : head.classes.stop])
        if dist.get_rank() == rank_of_it:
            head.weight[0, 0] = torch.inf
    head.fuse(heads.FusedSGD([head.weight], lr=0.1))
    before = head.weight.detach().clone()
    head(x.requires_grad_(), labels).backward()
    return torch.equal(before, head.weight)


def test_all_ranks_step_or_none(pools):
    assert pools(3).values(step_with_a_bad_weight, -1) == [False] * 3
    assert pools(3).values(step_with_a_bad_weight, 1) == [True] * 3


def step_that_loses_a_rank(rank_that_dies: int) -> tuple[BaseException | None, bool]:
    """The error of a fused backward pass, and whether the weights are as they were."""
    x, weight, labels, _ = data(6)
    head = heads.ClassHead(CLASSES, FEATURES, group=dist.group.WORLD).double()
    with torch.no_grad():
        head.weight.copy_(weight[head.classes.start : head.classes.stop])
    head.fuse(heads.FusedSGD([head.weight], lr=0.1))
    before = head.weight.detach().clone()
    loss = head(x.requires_grad_(), labels)
    if dist.get_rank() == rank_that_dies:
        os._exit(1)
    try:
        loss.backward()
    except RuntimeError as error:
        return error, torch.equal(before, head.weight)
    return None, torch.equal(before, head.weight)


def test_no_step_of_some_ranks_only():
    """A rank is lost between forward and backward: the others raise before their weights change."""
    pool = processes.Pool(3, timeout_s=10)
    try:
        results = pool.run(step_that_loses_a_rank, 2)
        assert results[2] is None
        for error, unchanged in results[:2]:
            assert isinstance(error, DistributedError) and unchanged
    finally:
        pool.close()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def construct(kind: str):
    group = dist.group.WORLD
    if kind == "sub-centres":
        return heads.SubCenterArcFace(CLASSES, FEATURES, group=group)
    if kind == "few classes":
        return heads.ArcFace(2, FEATURES, group=group)
    x, labels = torch.zeros(2, FEATURES), torch.tensor([0, CLASSES if kind == "label" else 1])
    if kind == "dtype" and dist.get_rank() == 1:
        x = x.double()
    formula = heads.CompSumLoss() if kind == "formula" and hasattr(heads, "CompSumLoss") else None
    return heads.ClassHead(CLASSES, FEATURES, formula=formula, group=group)(x, labels)


@pytest.mark.parametrize(
    "kind, message",
    [
        ("sub-centres", "group must be None for SubCenterArcFace"),
        ("few classes", "num_classes must be at least one for each of 3 ranks; got 2"),
        ("label", "labels must be classes, in [0, 11)"),
        ("dtype", "embeddings must be alike on all ranks; got torch.float32 on rank 0 and torch.float64 on rank 1"),
    ],
)
def test_bad_input_raises_on_every_rank(pools, kind, message):
    for error in pools(3).run(construct, kind):
        assert isinstance(error, (ValueError, DistributedError)), error
        assert message in str(error)


def initial_weights() -> torch.Tensor:
    torch.manual_seed(0)
    return heads.ArcFace(30, FEATURES, group=dist.group.WORLD).weight.detach()


def test_ranks_begin_with_different_weights(pools):
    parts = pools(3).values(initial_weights)
    assert len({tuple(row.tolist()) for part in parts for row in part}) == 30
    again = pools(3).values(initial_weights)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
