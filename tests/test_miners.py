"""Miners: index tuples equal to the peer's, and selections that never become pairs."""
# ruff: noqa: F811

import pickle

import pytest
import support
import torch
from loss_cases import batch, engine, peer_losses, peer_miners  # noqa: F401

from flashpair import Mask, losses, miners, ops, use_backend
from flashpair.miners import multi_similarity, selection

distances = pytest.importorskip("pytorch_metric_learning.distances")

DISTANCES = [
    None,
    distances.CosineSimilarity(),
    distances.DotProductSimilarity(normalize_embeddings=False),
    distances.LpDistance(),
    distances.LpDistance(power=2),
    distances.LpDistance(normalize_embeddings=False),
]
MINERS = ["MultiSimilarityMiner", "BatchHardMiner"]


@pytest.fixture(params=["found by the miner", "left to the loss"])
def closest_negatives(request, monkeypatch):
    """Both ways to find the closest negatives, whatever the size."""
    left = request.param == "left to the loss"
    monkeypatch.setattr(multi_similarity, "_left_to_the_loss", lambda problem: left)
    return left


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: "default" if d is None else type(d).__name__)
@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("kind", ["random", "one class", "all distinct", "one lonely", "collapsed"])
@pytest.mark.parametrize("name", MINERS)
def test_same_indices_as_the_peer(name, kind, rectangular, distance, engine):
    data = batch(kind, rectangular, b=17, n=13).to(torch.float64, support.device(engine))
    arguments = (data.x, data.labels, data.y, data.ref_labels)
    got = getattr(miners, name)(distance=distance)(*arguments)
    want = getattr(peer_miners, name)(distance=distance)(*arguments)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.int64
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MINERS)
def test_empty(name, engine):
    at = support.device(engine)
    for b, n in ((0, None), (3, 0), (0, 3)):
        x, labels = torch.randn(b, 4, device=at), torch.arange(b, device=at)
        refs = (None, None) if n is None else (torch.randn(n, 4, device=at), torch.arange(n, device=at))
        assert all(len(index) == 0 for index in getattr(miners, name)()(x, labels, *refs))


def test_as_tuple_in_chunks_of_rows(monkeypatch, closest_negatives):
    data = batch("random", False, b=17)
    whole = miners.MultiSimilarityMiner()(data.x, data.labels).as_tuple()
    monkeypatch.setattr(selection, "_CHUNK_PAIRS", 40)
    parts = miners.MultiSimilarityMiner()(data.x, data.labels).as_tuple()
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_ties_are_strict(closest_negatives):
    """s - epsilon < max and s + epsilon > min, both strict: equality keeps neither."""
    x = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.25, 0.0]])
    dot = distances.DotProductSimilarity(normalize_embeddings=False)
    labels = torch.tensor([0, 0, 1])
    # Row 0: positive 0.5, negative 0.25: kept from epsilon > 0.25 on.
    for epsilon, kept in ((0.25, 0), (0.26, 1)):
        a1, _, a2, _ = miners.MultiSimilarityMiner(epsilon, distance=dot)(x, labels).as_tuple()
        assert [int((a == 0).sum()) for a in (a1, a2)] == [kept, kept]


PAIR_LOSSES = ["NTXentLoss", "SupConLoss", "ContrastiveLoss", "MultiSimilarityLoss", "CircleLoss"]


@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("epsilon", [0.1, 0.8, -0.2])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_lazy_equals_explicit(name, epsilon, rectangular, engine, monkeypatch):
    """As indices_tuple a mined selection never becomes pairs, also where the loss measures in another way."""
    data = batch("random", rectangular, b=17, n=13).to(torch.float64, support.device(engine))
    mined = miners.MultiSimilarityMiner(epsilon)(data.x, data.labels, data.y, data.ref_labels)
    pairs = mined.as_tuple()
    monkeypatch.setattr(miners.MinedPairs, "as_tuple", lambda self: pytest.fail("became pairs"))
    loss = getattr(losses, name)()
    found = []
    for indices in (mined, pairs):
        value = loss(data.x, None, indices, data.y)
        found.append((value, torch.autograd.grad(value, data.x)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("power", [1, 2])
def test_thresholds_between_distances(power, closest_negatives):
    """Mined in distances, used by a loss on cosines."""
    data = batch("random", False, b=17).to(torch.float64)
    for epsilon in (0.1, 3.0):
        mined = miners.MultiSimilarityMiner(epsilon, distance=distances.LpDistance(power=power))(data.x, data.labels)
        for loss in (losses.SupConLoss(), losses.ContrastiveLoss()):
            lazy = loss(data.x, data.labels, mined)
            torch.testing.assert_close(lazy, loss(data.x, data.labels, mined.as_tuple()), rtol=1e-9, atol=1e-11)


def test_equal_rows_stay_positives_in_distances(closest_negatives):
    """A threshold on cosines above 1 excludes nothing, a distance of exactly zero included."""
    x, labels = torch.eye(3, dtype=torch.float64)[[0, 0, 0, 1, 2]], torch.tensor([0, 0, 1, 1, 0])
    mined = miners.MultiSimilarityMiner(epsilon=0.5)(x, labels)
    assert [0, 1] in torch.stack(mined.as_tuple()[:2], 1).tolist()
    loss = losses.SupConLoss(distance=distances.LpDistance())
    torch.testing.assert_close(loss(x, labels, mined), loss(x, labels, mined.as_tuple()))


def test_thresholds_that_do_not_carry_over_become_pairs(closest_negatives):
    data = batch("random", False, b=17).to(torch.float64)
    dot = distances.DotProductSimilarity(normalize_embeddings=False)
    mined = miners.MultiSimilarityMiner(distance=dot)(data.x, data.labels)
    assert mined.bounds_in(losses.NTXentLoss().distance and mined.geometry) is not None
    lazy = losses.SupConLoss()(data.x, data.labels, mined)
    torch.testing.assert_close(lazy, losses.SupConLoss()(data.x, data.labels, mined.as_tuple()))


def test_other_embeddings_than_the_mined_ones(closest_negatives):
    """Pairs mined on one set of embeddings and used on another are those pairs, not the rule applied anew."""
    data = batch("random", False, b=17)
    other = torch.randn_like(data.x)
    mined = miners.MultiSimilarityMiner()(data.x, data.labels)
    theirs = peer_miners.MultiSimilarityMiner()(data.x, data.labels)
    want = peer_losses.MultiSimilarityLoss()(other, data.labels, theirs)
    torch.testing.assert_close(losses.MultiSimilarityLoss()(other, data.labels, mined), want)
    assert mined.mined_from(data.x, None) and mined.mined_from(data.x.detach(), data.x.detach()) is False
    assert mined.mined_from(data.x.detach(), None)
    assert not mined.mined_from(data.x.clone(), None)
    data.x.add_(0.0)  # an alias, but written to since
    assert mined.embeddings is data.x


@pytest.mark.parametrize("name", [*PAIR_LOSSES, "TripletMarginLoss"])
def test_batch_hard_with_every_loss(name, engine):
    data = batch("one lonely", False, b=17).to(torch.float64, support.device(engine))
    hard = miners.BatchHardMiner()(data.x, data.labels)
    assert hard.positives[0] == -1 and not hard.valid[0]
    ours = getattr(losses, name)()(data.x, data.labels, hard)
    want = getattr(peer_losses, name)()(data.x, data.labels, peer_miners.BatchHardMiner()(data.x, data.labels))
    torch.testing.assert_close(ours, want, rtol=1e-8, atol=0)


LEFT = [
    ("MultiSimilarityLoss", {}, {}),
    ("MultiSimilarityLoss", {"distance": distances.LpDistance()}, {"distance": distances.LpDistance()}),
    ("MultiSimilarityLoss", {"distance": distances.LpDistance()}, {}),  # compared in another way than mined
    ("NTXentLoss", {}, {}),  # negatives first, then positives
    ("SupConLoss", {}, {}),  # a softmax over both
    ("ContrastiveLoss", {}, {"distance": distances.LpDistance()}),
    ("CircleLoss", {}, {}),
    ("TupletMarginLoss", {}, {}),
]


@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("name, options, mining", LEFT, ids=lambda v: v if isinstance(v, str) else "")
def test_closest_negatives_left_to_the_loss(name, options, mining, rectangular, engine, monkeypatch):
    """The same loss, gradients, statistics and pairs, whoever finds them and however often they are used."""
    data = batch("one lonely", rectangular, b=17, n=13).to(torch.float64, support.device(engine))
    miner, loss = miners.MultiSimilarityMiner(0.3, **mining), getattr(losses, name)(**options)
    found = []
    for left in (False, True):
        monkeypatch.setattr(multi_similarity, "_left_to_the_loss", lambda problem, left=left: left)
        mined = miner(data.x, data.labels, data.y, data.ref_labels)
        values = [loss(data.x, data.labels, mined, data.y, data.ref_labels) for _ in range(2)]
        gradients = [torch.autograd.grad(value, data.x)[0] for value in values]
        again = miner(data.x, data.labels, data.y, data.ref_labels)
        value, (positive, negative) = loss(data.x, data.labels, again, data.y, data.ref_labels, return_stats=True)
        found.append([*values, *gradients, value, *positive, *negative, *mined.as_tuple(), *again.as_tuple()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", ["own copies left out", "memory"])
def test_closest_negatives_where_a_column_is_left_out(case, engine, monkeypatch):
    data = batch("random", False, b=17).to(torch.float64, support.device(engine))
    found, seen = [], []
    look = multi_similarity.closest_negative
    monkeypatch.setattr(multi_similarity, "closest_negative", lambda problem: seen.append(problem) or look(problem))
    for left in (False, True):
        monkeypatch.setattr(multi_similarity, "_left_to_the_loss", lambda problem, left=left: left)
        miner, loss = miners.MultiSimilarityMiner(0.3), losses.MultiSimilarityLoss()
        if case == "memory":
            memory = losses.CrossBatchMemory(loss, data.x.shape[1], 40, miner).to(data.x)
            values = [memory(data.x + k, data.labels) for k in range(3)]
        else:
            copies = data.x.detach() + 0.1
            values = [loss(data.x, data.labels, miner(data.x, data.labels, copies, data.labels), copies, data.labels)]
        found.append([*values, *torch.autograd.grad(values, data.x, [torch.ones_like(v) for v in values])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert not seen  # a loss found all of them


def test_closest_negatives_found_in_inference_mode_serve_training(monkeypatch):
    monkeypatch.setattr(multi_similarity, "_left_to_the_loss", lambda problem: True)
    data = batch("random", False, b=17)
    data.x.requires_grad_()
    loss = losses.MultiSimilarityLoss()
    for first_use in (lambda mined: loss(data.x, data.labels, mined), lambda mined: mined.as_tuple()):
        mined = pickle.loads(pickle.dumps(miners.MultiSimilarityMiner()(data.x.detach(), data.labels)))
        mined.embeddings = data.x
        with torch.inference_mode():
            first_use(mined)
        loss(data.x, data.labels, mined).backward()


def test_passes_of_closest_negatives_left_to_the_loss(monkeypatch):
    """The positives mined, the negatives reduced, the positives reduced; then one backward pass for both."""
    data = batch("random", False, b=17)
    data.x.requires_grad_()
    seen = []
    for name in ("pair_mine", "pair_stats", "pair_weights"):
        operator = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, o=operator: (seen.append((o.name, a)), o(*a))[1])
    monkeypatch.setattr(multi_similarity, "_left_to_the_loss", lambda problem: True)
    with use_backend("dense"):
        mined = miners.MultiSimilarityMiner()(data.x, data.labels)
        losses.MultiSimilarityLoss()(data.x, data.labels, mined).backward()
    assert [name for name, _ in seen] == ["pair_mine", "pair_stats", "pair_stats", "pair_weights"]
    assert seen[0][1][7][7:] == [1, 0, 1, -1, -1]  # the least similar one of the same label
    assert len(mined.as_tuple()[0]) and [name for name, _ in seen[4:]] == []  # nothing is looked for again


def test_when_closest_negatives_are_left_to_the_loss(monkeypatch):
    data = batch("random", False, b=17)
    for limit, kind in ((17 * 17, selection.ClosestNegative), (17 * 17 + 1, torch.Tensor)):
        monkeypatch.setattr(multi_similarity, "CPU_PAIRS", limit)
        monkeypatch.setattr(multi_similarity.operands, "ORDERED_PAIRS", limit)
        mined = miners.MultiSimilarityMiner()(data.x, data.labels)
        assert type(mined.bounds[Mask.SAME]["below"]) is kind
    with use_backend("reference"):
        mined = miners.MultiSimilarityMiner()(data.x, data.labels)
        assert type(mined.bounds[Mask.SAME]["below"]) is torch.Tensor


def test_no_gradient_and_no_graph():
    x = torch.randn(6, 4, requires_grad=True)
    mined = miners.MultiSimilarityMiner()(x, torch.arange(6) % 2)
    assert not any(b.requires_grad for bounds in mined.bounds.values() for b in bounds.values())


def test_nan_is_mined(closest_negatives):
    """A row with NaN is the hardest of all, so that it shows in the loss."""
    x = torch.randn(6, 4)
    x[5] = float("nan")
    labels = torch.arange(6) % 2
    assert losses.TripletMarginLoss()(x, labels, miners.BatchHardMiner()(x, labels)).isnan()
    assert losses.MultiSimilarityLoss()(x, labels, miners.MultiSimilarityMiner()(x, labels)).isnan()


def test_bad_calls():
    x, labels = torch.randn(4, 3), torch.arange(4)
    for arguments, message in (
        ((x, None), "labels or indices_tuple"),
        ((x, labels[:2]), "labels must have shape"),
        ((x, labels, x.clone()), "ref_emb was given without ref_labels"),
        ((x, labels, x[:, :2], labels), "equal features"),
    ):
        with pytest.raises(ValueError, match=message):
            miners.MultiSimilarityMiner()(*arguments)


@pytest.mark.parametrize("name", MINERS)
def test_is_one_of_the_peers_miners(name):
    assert isinstance(getattr(miners, name)(), peer_miners.BaseMiner)
