"""What ranks do not have in common, what one of them cannot do, and one that dies: an error on all."""

import functools
import os

import group_cases
import processes
import pytest
import torch
import torch.distributed as dist
from group_cases import compare, on_one_process, sizes_of
from torch.distributed.device_mesh import init_device_mesh

from flashpair import losses, miners
from flashpair.distributed import DistributedError, Exchange, Group


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


X = torch.eye(4)


def _columns(rank: int):
    loss = losses.MultipleNegativesRankingLoss(group=dist.group.WORLD)
    return loss([X, X, X] if rank == 1 else [X, X])


STRUCTURES = [
    ("MultipleNegativesRankingLoss", ([X, X],), ([X],), "embeddings must hold at least 2 columns; got 1"),
    ("GISTEmbedLoss", ([X, X], [X, X]), ([X, X], [X]), "the same two or more columns; got 2 and 1"),
    ("CACRLoss", (X, X), (X,), "views must be at least 2; got 1"),
    ("AMCLLoss", ([X], [X], X, X), ([X], [X, X], X, X), "as many heads, at least 1; got 1 and 2"),
    ("MEOWLoss", (X, X, torch.zeros(2, 4).long()), (X, X, torch.zeros(4).long()), "clusters must be int64 of shape"),
    ("MultiViewSupConLoss", (torch.ones(4, 2, 3),), (X,), "features must have shape"),
    ("FeatureTransformationLoss", (X, X, X), (X, X[:2], X), "key must have as many rows as query on each rank"),
    ("MulSupConLoss", (X, X), (X, losses.LabelSets.from_lists([[0]] * 4, 4)), "labels must be a tensor; got LabelSets"),
]


def _structure(k: int, rank: int):
    name, good, bad, _ = STRUCTURES[k]
    return getattr(losses, name)(group=dist.group.WORLD)(*(bad if rank == 1 else good))


def _many(count: int, rank: int):
    return losses.MultipleNegativesRankingLoss(group=dist.group.WORLD)([X] * count)


BAD = [
    (_columns, "MultipleNegativesRankingLoss must have the same options on all ranks; rank 0 and rank 1 differ"),
    *((functools.partial(_structure, k), case[-1]) for k, case in enumerate(STRUCTURES)),
    (functools.partial(_many, 33), "must have at most 32 tensors; got 34"),
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
        assert isinstance(error, (TypeError, ValueError, DistributedError)), error
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
