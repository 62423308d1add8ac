"""Cross-batch memory against the peer's, call by call."""
# ruff: noqa: F811

import pytest
import support
import torch
from loss_cases import engine, peer_losses, peer_miners  # noqa: F401

from flashpair import losses, miners

PAIR_LOSSES = ["NTXentLoss", "SupConLoss", "ContrastiveLoss", "MultiSimilarityLoss", "CircleLoss"]


def stream(count: int, rows: int = 6, device: str = "cpu"):
    g = torch.Generator().manual_seed(3)
    for _ in range(count):
        x = torch.randn(rows, 5, generator=g, dtype=torch.float64).to(device)
        yield x, torch.randint(0, 3, (rows,), generator=g).to(device)


def compare(ours, theirs, batches, **kwargs) -> None:
    for x, labels in batches:
        found = []
        for memory in (ours, theirs):
            leaf = x.clone().requires_grad_()
            loss = memory(leaf, labels, **kwargs)
            found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-7, atol=1e-9)
        assert torch.equal(ours.embedding_memory, theirs.embedding_memory)
        assert torch.equal(ours.label_memory, theirs.label_memory)
        assert (ours.queue_idx, ours.has_been_filled) == (theirs.queue_idx, theirs.has_been_filled)


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("size", [14, 18])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_like_the_peer(name, size, mined, engine):
    """Partly filled, exactly filled, wrapped round; self copies left out by index."""
    ours = losses.CrossBatchMemory(getattr(losses, name)(), 5, size, miners.MultiSimilarityMiner() if mined else None)
    miner = peer_miners.MultiSimilarityMiner() if mined else None
    theirs = peer_losses.CrossBatchMemory(getattr(peer_losses, name)(), 5, size, miner)
    compare(ours, theirs, stream(7, device=support.device(engine)))


def test_hardest_triplets(engine):
    ours = losses.CrossBatchMemory(losses.TripletMarginLoss(), 5, 14, miners.BatchHardMiner())
    theirs = peer_losses.CrossBatchMemory(peer_losses.TripletMarginLoss(), 5, 14, peer_miners.BatchHardMiner())
    compare(ours, theirs, stream(7, device=support.device(engine)))


@pytest.mark.parametrize("length", [3, 4])
def test_further_indices(length):
    ours = losses.CrossBatchMemory(losses.NTXentLoss(), 5, 14, miners.MultiSimilarityMiner())
    theirs = peer_losses.CrossBatchMemory(peer_losses.NTXentLoss(), 5, 14, peer_miners.MultiSimilarityMiner())
    indices = tuple(torch.tensor(v) for v in ([0, 1], [1, 2], [3, 5]))
    indices = indices if length == 3 else (indices[0], indices[1], indices[0], indices[2])
    compare(ours, theirs, stream(4), indices_tuple=indices)


def test_enqueue_mask():
    ours = losses.CrossBatchMemory(losses.SupConLoss(), 5, 14)
    theirs = peer_losses.CrossBatchMemory(peer_losses.SupConLoss(), 5, 14)
    compare(ours, theirs, stream(6), enqueue_mask=torch.tensor([True, False, True, True, False, False]))


def test_an_empty_enqueue_does_not_fill_the_memory():
    """The peer takes an unmoved queue for a full one and then compares with rows of zeros."""
    x, labels = torch.randn(4, 5), torch.arange(4)
    ours = losses.CrossBatchMemory(losses.ContrastiveLoss(), 5, 14)
    ours(x, labels, enqueue_mask=torch.zeros(4, dtype=torch.bool))
    assert not ours.has_been_filled
    theirs = peer_losses.CrossBatchMemory(peer_losses.ContrastiveLoss(), 5, 14)
    theirs(x, labels, enqueue_mask=torch.zeros(4, dtype=torch.bool))
    assert theirs.has_been_filled


def test_stays_lazy(monkeypatch):
    monkeypatch.setattr(miners.MinedPairs, "as_tuple", lambda self: pytest.fail("became pairs"))
    for miner in (None, miners.MultiSimilarityMiner()):
        memory = losses.CrossBatchMemory(losses.MultiSimilarityLoss(), 5, 14, miner)
        for x, labels in stream(3):
            memory(x, labels)


def test_backward_after_the_next_batch():
    """The queue is overwritten between a loss and its backward pass."""
    memory = losses.CrossBatchMemory(losses.SupConLoss(), 5, 6)
    leaves, total = [], 0.0
    for x, labels in stream(3):
        leaves.append(x.requires_grad_())
        total = total + memory(x, labels)
    total.backward()
    assert all(x.grad.abs().sum() > 0 for x in leaves)


def test_statistics_and_state():
    memory = losses.CrossBatchMemory(losses.SupConLoss(), 5, 14)
    for x, labels in stream(2):
        _, stats = memory(x, labels, return_stats=True)
    counts = stats.positive.count + stats.negative.count
    assert torch.equal(counts, torch.full_like(counts, 11))  # 12 rows in the queue less the own copy
    assert set(memory.state_dict()) >= {"embedding_memory", "label_memory"}
    memory.reset_queue()
    assert memory.queue_idx == 0 and not memory.has_been_filled


def test_bad_calls_change_nothing():
    memory = losses.CrossBatchMemory(losses.SupConLoss(), 5, 8)
    x, labels = torch.randn(4, 5), torch.arange(4)
    mask = torch.ones(4, dtype=torch.bool)
    for arguments, message in (
        ((x[:, :3], labels), "embedding_size=5 features; got 3"),
        ((x, labels[:3]), "labels must have shape"),
        ((x.repeat(3, 1), labels.repeat(3)), "memory_size=8; got 12 rows"),
        ((x, labels, (labels,) * 3, mask), "exclude each other"),
        ((x, labels, None, mask[:2]), "enqueue_mask must be bool"),
        ((x, labels, (labels, labels, labels + 4)), r"indices_tuple\[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            memory(*arguments)
        assert memory.queue_idx == 0
