"""Queues of earlier embeddings, spread over ranks: the queue of one process with the whole batch."""

import functools

import pytest
import torch
import torch.distributed as dist

from flashpair import losses, miners
from flashpair.distributed import DistributedError, Exchange, Group

BATCHES = [[3, 2, 4], [1, 0, 5], [4, 4, 1], [2, 2, 2], [0, 5, 3]]  # rows of each of three ranks
CASES = {
    "contrastive": (lambda g: losses.ContrastiveLoss(group=g), lambda g: None),
    "triplet": (lambda g: losses.TripletMarginLoss(group=g), lambda g: None),
    "mined": (lambda g: losses.MultiSimilarityLoss(group=g), lambda g: miners.MultiSimilarityMiner(group=g)),
    "hard": (lambda g: losses.TripletMarginLoss(group=g), lambda g: miners.BatchHardMiner(group=g)),
    "triplets": (lambda g: losses.NTXentLoss(group=g), lambda g: miners.TripletMarginMiner(group=g)),
    "whole rows": (lambda g: losses.FastAPLoss(group=g), lambda g: None),
}


def shares(rows: list[int], ranks: int) -> list[int]:
    """A batch for another number of ranks."""
    total = sum(rows)
    return rows if ranks == 3 else [total * (r + 1) // ranks - total * r // ranks for r in range(ranks)]


def run(case: str, mask: bool, group, rank: int, ranks: int, state: dict | None = None, first: int = 0, end: int = 5):
    """Losses and gradients of some batches, and the memory afterwards."""
    loss, miner = (make(group) for make in CASES[case])
    memory = losses.CrossBatchMemory(loss, 4, memory_size=20, miner=miner)
    memory.double()
    if state is not None:
        memory.load_whole_state(state)
    found = []
    for b in range(first, end):
        g = torch.Generator().manual_seed(b)
        sizes = shares(BATCHES[b], ranks)
        x, labels = torch.randn(sum(sizes), 4, generator=g).double(), torch.randint(0, 3, (sum(sizes),), generator=g)
        enqueue = torch.rand(sum(sizes), generator=g) < 0.5
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x = x[own].clone().requires_grad_()
        value = memory(x, labels[own], enqueue_mask=enqueue[own] if mask else None)
        value.backward()
        found.append((value.detach(), x.grad / ranks))
    return found, memory.whole_state()


def run_here(case: str, mask: bool, exchange: str = "GATHER", **options):
    group = Group(exchange=Exchange[exchange])
    return run(case, mask, group, dist.get_rank(), dist.get_world_size(), **options)


def compare(ranks: list, whole: tuple) -> None:
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)
    for found, state in ranks:
        close(state, whole[1])
        close([value for value, _ in found], [value for value, _ in whole[0]])
    for b, (_, gradient) in enumerate(whole[0]):
        close(torch.cat([found[b][1] for found, _ in ranks]), gradient)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3])
def test_memory(pools, size, case, mask):
    """Fills, wraps round, with rows that are only enqueued or only compared."""
    compare(pools(size).values(run_here, case, mask), run(case, mask, None, 0, 1))


@pytest.mark.parametrize("case", ["contrastive", "mined", "hard"])
def test_memory_round_the_ring(pools, case):
    compare(pools(3).values(run_here, case, False, "RING"), run(case, False, None, 0, 1))


@pytest.mark.parametrize("size", [1, 2])
def test_memory_goes_on_with_another_number_of_ranks(pools, size):
    half = pools(3).values(run_here, "mined", False, end=3)
    state = half[0][1]
    assert all(torch.equal(s["embedding_memory"], state["embedding_memory"]) for _, s in half)
    compare(
        pools(size).values(run_here, "mined", False, state=state, first=3),
        (run("mined", False, None, 0, 1)[0][3:], run("mined", False, None, 0, 1)[1]),
    )


def test_state_that_does_not_fit():
    small, large = (losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, memory_size=n) for n in (5, 6))
    with pytest.raises(ValueError, match=r"embedding_memory of the state must have shape \(6, 4\); got \(5, 4\)"):
        large.load_whole_state(small.whole_state())


def moco(group, rank: int, ranks: int, in_batch: bool) -> tuple:
    """MoCo's steps: a loss against the queue, then the keys join it."""
    queue = losses.KeyQueue(10, 4, group=group, dtype=torch.float64)
    loss = losses.InfoNCELoss(in_batch_negatives=in_batch, group=group)
    held, found = [], []
    for b, rows in enumerate(BATCHES):
        g, sizes = torch.Generator().manual_seed(b), shares(rows, ranks)
        query, key = (torch.randn(sum(sizes), 4, generator=g).double() for _ in range(2))
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        query, key = query[own].clone().requires_grad_(), key[own]
        value = loss(query, key, queue=queue.rows())
        value.backward()
        queue.enqueue(key)
        held.append(len(queue.keys))
        found.append((value.detach(), query.grad / ranks))
    return found, queue.whole_state(), held


def moco_here(in_batch: bool, exchange: str) -> tuple:
    return moco(Group(exchange=Exchange[exchange]), dist.get_rank(), dist.get_world_size(), in_batch)


@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_key_queue(pools, size, in_batch, exchange):
    found = pools(size).values(moco_here, in_batch, exchange)
    compare([(f, s) for f, s, _ in found], moco(None, 0, 1, in_batch)[:2])
    assert sum(held[-1] for *_, held in found) == 10  # nobody holds more than a share


def test_key_queue_is_first_in_first_out():
    queue = losses.KeyQueue(5, 1)
    assert queue.rows().shape == (0, 1)
    for first in (0, 3, 6):
        queue.enqueue(torch.arange(first, first + 3.0)[:, None])
    assert sorted(queue.rows().flatten().tolist()) == [4, 5, 6, 7, 8]
    again = losses.KeyQueue(5, 1)
    again.load_state_dict(queue.state_dict())
    again.enqueue(torch.tensor([[9.0]]))
    assert sorted(again.rows().flatten().tolist()) == [5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match=r"at most size=5 rows of embedding_size=1; got \(6, 1\)"):
        queue.enqueue(torch.zeros(6, 1))


def too_many() -> None:
    losses.CrossBatchMemory(losses.ContrastiveLoss(group=dist.group.WORLD), 4, memory_size=5)(
        torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    )


def test_global_batch_must_fit(pools):
    for error in pools(3).run(too_many):
        assert isinstance(error, (ValueError, DistributedError))
        assert "a batch must fit into memory_size=5; got 6 rows to enqueue" in str(error)


def with_support(name: str, group, rank: int, ranks: int) -> list:
    """Values and gradients of a loss whose keys of earlier batches are spread over the ranks."""
    queue = losses.KeyQueue(10, 4, group=group, dtype=torch.float64)
    loss = getattr(losses, name)(group=group, **({} if name == "NNCLRLoss" else {"positive_alpha": None}))
    found = []
    for b in range(3):
        sizes = shares(BATCHES[b], ranks)
        x = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(b)).double()
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x = x[own].clone().requires_grad_()
        queue.enqueue(x.detach() + 0.1)
        views = (x, x.flip(1), 2 * x + 0.3, x - 0.1) if name == "NNCLRLoss" else (x, x.flip(1))
        torch.manual_seed(b + 1000 * rank)  # the first rank's generator decides
        value = loss(*views, queue.rows())
        value.backward()
        found.append((value.detach(), x.grad / ranks))
    return found


def with_support_here(name: str) -> list:
    return with_support(name, Group(), dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize("name", ["NNCLRLoss", "FeatureTransformationLoss"])
def test_support_that_is_spread_over_ranks(pools, name):
    whole, ranks = with_support(name, None, 0, 1), pools(3).values(with_support_here, name)
    for b, (value, gradient) in enumerate(whole):
        for found in ranks:
            torch.testing.assert_close(found[b][0], value, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(torch.cat([found[b][1] for found in ranks]), gradient, rtol=1e-10, atol=1e-13)
