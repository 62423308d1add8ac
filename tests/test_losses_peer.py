"""Values and gradients equal to pytorch-metric-learning's and open_clip's, and where theirs are wrong."""
# ruff: noqa: F811

import inspect
import subprocess
import sys

import pytest
import support
import torch
from loss_cases import (  # noqa: F401
    CASES,
    KINDS,
    METRIC,
    batch,
    engine,
    evaluate,
    open_clip_losses,
    peer_losses,
    peer_miners,
    sides_of,
)
from test_losses_definition import close

from flashpair import losses, miners

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, reducers, regularizers
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper

PAIRED = [c for c in CASES if c.peer is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case, side", sides_of(PAIRED))
def test_peer(case, side, kind, engine):
    if case.distance and kind == "duplicates":
        pytest.skip("the peer's distance of equal rows is a rounding error")
    if "mined" in case.name and kind == "duplicates":
        pytest.skip("ties at the miner's threshold; see test_miners")
    data = batch(kind, side)
    want = evaluate(case.peer, data.to(torch.float64), case.learns)
    got = evaluate(case.ours, data.to(torch.float64, support.device(engine)), case.learns)
    # The peer's softplus is linear from 20 on, which is 2e-9 off.
    close(got, want, 1e-8 if case.name == "circle" else 1e-9 if case.distance else 1e-10)


DISTANCES = [
    distances.CosineSimilarity(),
    distances.DotProductSimilarity(),
    distances.DotProductSimilarity(normalize_embeddings=False),
    distances.LpDistance(),
    distances.LpDistance(power=2),
    distances.LpDistance(normalize_embeddings=False),
    distances.LpDistance(normalize_embeddings=False, power=2),
]
REDUCERS = [
    reducers.MeanReducer(),
    reducers.SumReducer(),
    reducers.AvgNonZeroReducer(),
    reducers.ThresholdReducer(low=0.4),
    reducers.ThresholdReducer(low=0.1, high=1.5),
    reducers.ThresholdReducer(high=0.9),
    reducers.ThresholdReducer(low=-1),
]
NAMES = ["NTXentLoss", "SupConLoss", "ContrastiveLoss", "MultiSimilarityLoss", "TripletMarginLoss"]


def describe(value) -> str:
    keys = ("normalize_embeddings", "power", "low", "high")
    return type(value).__name__ + "".join(
        f"-{k}{getattr(value, k)}" for k in keys if getattr(value, k, None) is not None
    )


def both(name: str, data, options: dict, indices=None, rtol=1e-9) -> None:
    """Ours and the peer's class of one name with the same options on the same data."""
    found = []
    for module in (losses, peer_losses):
        loss = getattr(module, name)(**options)
        found.append(evaluate(lambda d, f=loss: f(d.x, d.labels, indices, d.y, d.ref_labels), data, ()))
    close(*found, rtol)


@pytest.mark.parametrize("reducer", REDUCERS, ids=describe)
@pytest.mark.parametrize("distance", DISTANCES, ids=describe)
@pytest.mark.parametrize("name", NAMES)
def test_distances_and_reducers(name, distance, reducer):
    data = batch("random", True).to(torch.float64)
    temperature = {"temperature": 3.0} if "temperature" in getattr(losses, name)().__dict__ else {}
    mined = peer_miners.BatchHardMiner()(data.x, data.labels, data.y, data.ref_labels)
    indices = mined if name == "TripletMarginLoss" else None
    with support.forced("dense"):
        both(name, data, {"distance": distance, "reducer": reducer, **temperature}, indices)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_triplet_options(smooth, swap, power):
    data = batch("random", False, b=14).to(torch.float64)
    distance = distances.LpDistance(power=power) if power == 2 else distances.CosineSimilarity()
    for miner in (peer_miners.BatchHardMiner(), peer_miners.MultiSimilarityMiner()):
        indices = miner(data.x, data.labels)
        options = {"margin": 0.3, "swap": swap, "smooth_loss": smooth, "distance": distance}
        both("TripletMarginLoss", data, options, indices)


def test_swap_with_references_takes_the_distance_of_the_references():
    """The peer reads row `positive` of the (embeddings, references) matrix, another pair; here it is (p, n)."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)
    y = torch.tensor([[0.8, 0.6], [0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    indices = tuple(torch.tensor([v]) for v in (0, 1, 2))
    options = {"margin": 1.0, "swap": True}
    d = lambda a, b: (a - b).norm()  # noqa: E731
    want = d(x[0], y[1]) - torch.minimum(d(x[0], y[2]), d(y[1], y[2])) + 1
    assert torch.isclose(losses.TripletMarginLoss(**options)(x, None, indices, y), want)
    theirs = peer_losses.TripletMarginLoss(**options)(x, None, indices, y)
    assert torch.isclose(theirs, d(x[0], y[1]) - torch.minimum(d(x[0], y[2]), d(x[1], y[2])) + 1)


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss", "ContrastiveLoss", "MultiSimilarityLoss", "CircleLoss"])
def test_index_tuples(name, rectangular, length, engine):
    """Explicit tuples with duplicates: counted by losses over pairs, collapsed by losses over rows."""
    data = batch("random", rectangular).to(torch.float64, support.device(engine))
    n = data.x.shape[0] if data.y is None else data.y.shape[0]
    g = torch.Generator().manual_seed(5)
    a = torch.randint(0, 11, (20,), generator=g)
    p, q = torch.randint(0, n // 2, (20,), generator=g), torch.randint(n // 2, n, (20,), generator=g)
    indices = (a, p, q) if length == 3 else (a[:12], p[:12], a.flip(0), q)
    indices = tuple(torch.cat([v, v[:3]]).to(data.x.device) for v in indices)
    both(name, data, {}, indices)
    data.labels = data.ref_labels = None
    both(name, data, {}, indices)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss", "ContrastiveLoss", "MultiSimilarityLoss", "CircleLoss"])
def test_same_labels_object_leaves_out_the_diagonal(name):
    """Two views with one labels tensor: the peer leaves (i, i) out; with a copy of the labels it does not."""
    data = batch("random", "matched").to(torch.float64)
    for refs in (data.labels, data.labels.clone()):
        data.ref_labels = refs
        both(name, data, {})
    data.y, data.ref_labels = data.x, data.labels
    both(name, data, {})
    if name != "ContrastiveLoss":  # the distance of a row to itself
        data.y, data.ref_labels = data.x, data.labels.clone()
        both(name, data, {})


def test_regularizer_and_multiple_reducers():
    data = batch("random", False).to(torch.float64)
    for name in ("NTXentLoss", "ContrastiveLoss", "MultiSimilarityLoss"):
        both(name, data, {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3})
    parts = {"pos_loss": reducers.SumReducer(), "neg_loss": reducers.MeanReducer()}
    both("ContrastiveLoss", data, {"reducer": reducers.MultipleReducers(parts)})
    parts.pop("pos_loss")
    both("ContrastiveLoss", data, {"reducer": reducers.MultipleReducers(parts, reducers.SumReducer())})


@pytest.mark.parametrize("name", [*NAMES, "CircleLoss"])
def test_is_one_of_the_peers_losses(name):
    assert isinstance(getattr(losses, name)(), BaseMetricLossFunction)


@pytest.mark.parametrize("ours, theirs", [(losses, peer_losses), (miners, peer_miners)], ids=["losses", "miners"])
def test_same_arguments_and_defaults_as_the_peer(ours, theirs):
    """Constructor and call take the peer's arguments by its names, in its order, with its defaults."""
    names = [*NAMES, "CircleLoss", "CrossBatchMemory"] if ours is losses else ["MultiSimilarityMiner", "BatchHardMiner"]
    for name in names:
        mine_, peer = getattr(ours, name), getattr(theirs, name)
        for method in ("__init__", "forward"):
            wanted = [p for p in arguments(getattr(peer, method)) if p.kind == p.POSITIONAL_OR_KEYWORD]
            got = [p for p in arguments(getattr(mine_, method)) if p.kind == p.POSITIONAL_OR_KEYWORD][: len(wanted)]
            assert [(p.name, p.default) for p in got] == [(p.name, p.default) for p in wanted], (name, method)
        if name == "CrossBatchMemory":
            continue
        left, right = mine_(), peer()
        assert describe(left.distance) == describe(right.distance)
        assert ours is miners or describe(left.reducer) == describe(right.reducer)
        for option in ("embedding_regularizer", "embedding_reg_weight"):
            assert getattr(left, option, None) == getattr(right, option, None)


def arguments(function) -> list[inspect.Parameter]:
    """Its parameters, where `**kwargs` of a subclass adds the peer's own."""
    return list(inspect.signature(function).parameters.values())[1:]


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_same_arguments_and_defaults_as_open_clip(name):
    ours, theirs = getattr(losses, name), getattr(open_clip_losses(), name)
    for method in ("__init__", "forward"):
        # Horovod is for several processes.
        wanted = [p for p in arguments(getattr(theirs, method)) if p.name != "use_horovod"]
        got = arguments(getattr(ours, method))[: len(wanted)]
        assert [p.name for p in got] == [p.name for p in wanted], method
        # SigLIP's bias, required there, may be left out here.
        assert all(p.default in (q.default, None) for p, q in zip(got, wanted, strict=True)), method
        assert all(p.default == q.default for p, q in zip(got, wanted, strict=True) if q.default is not q.empty), method


def test_self_supervised_wrapper_of_the_peer():
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    for symmetric in (True, False):
        ours = peer_losses.SelfSupervisedLoss(losses.NTXentLoss(0.5), symmetric=symmetric)(x, y)
        assert torch.isclose(
            ours, peer_losses.SelfSupervisedLoss(peer_losses.NTXentLoss(0.5), symmetric=symmetric)(x, y)
        )


@pytest.mark.parametrize("name", [*NAMES, "CircleLoss"])
def test_cross_batch_memory_of_the_peer(name):
    """The peer's memory around our loss, with our miner, its own miner and (where it can) none."""
    own = [None] if name != "TripletMarginLoss" else []
    for miner in [miners.MultiSimilarityMiner(), peer_miners.MultiSimilarityMiner(), *own]:
        theirs = miner and peer_miners.MultiSimilarityMiner()
        memories = [
            peer_losses.CrossBatchMemory(getattr(losses, name)(), 5, 14, miner),
            peer_losses.CrossBatchMemory(getattr(peer_losses, name)(), 5, 14, theirs),
        ]
        for seed in range(3):
            data = batch("random", False, b=6, seed=seed)
            found = [memory(data.x, data.labels) for memory in memories]
            torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)


def test_distributed_wrappers_of_the_peer():
    """They check the class; without processes the loss is called as it is."""
    data = batch("random", False)
    with pytest.warns(UserWarning, match="non-distributed"):
        for name in (*NAMES[:4], "CircleLoss"):
            loss = getattr(losses, name)()
            assert torch.equal(DistributedLossWrapper(loss)(data.x, data.labels), loss(data.x, data.labels))
    for module in (losses.CrossBatchMemory(losses.SupConLoss(), 5, 14), losses.TripletMarginLoss()):
        assert DistributedLossWrapper(module).loss is module
    assert DistributedMinerWrapper(miners.MultiSimilarityMiner()).miner is not None


def test_peer_losses_accept_lazy_selections():
    data = batch("random", False)
    pairs, hard = miners.MultiSimilarityMiner()(data.x, data.labels), miners.BatchHardMiner()(data.x, data.labels)
    same_pairs = peer_miners.MultiSimilarityMiner()(data.x, data.labels)
    same_hard = peer_miners.BatchHardMiner()(data.x, data.labels)
    multi, nt_xent, triplet = (
        peer_losses.MultiSimilarityLoss(), peer_losses.NTXentLoss(), peer_losses.TripletMarginLoss()
    )  # fmt: skip
    for loss, ours, theirs in (
        (multi, pairs, same_pairs),
        (nt_xent, pairs, same_pairs),
        (triplet, pairs, same_pairs),
        (multi, hard, same_hard),
        (nt_xent, hard, same_hard),
        (triplet, hard.as_tuple(), same_hard),  # it insists on a real tuple of triplets
    ):
        torch.testing.assert_close(
            loss(data.x, data.labels, ours), loss(data.x, data.labels, theirs), rtol=1e-12, atol=0
        )


def test_without_the_peer_installed():
    """The stand-ins give the same losses; nothing imports the peer."""
    program = """
import sys
sys.modules["pytorch_metric_learning"] = None
import torch, flashpair
from flashpair import losses, miners
torch.manual_seed(0)
x, labels = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
mined = miners.MultiSimilarityMiner()(x, labels)
for name in ("NTXentLoss", "SupConLoss", "ContrastiveLoss", "MultiSimilarityLoss", "CircleLoss"):
    print(float(getattr(losses, name)()(x, labels)), float(getattr(losses, name)()(x, labels, mined)))
hard = miners.BatchHardMiner()(x, labels)
print(float(losses.TripletMarginLoss()(x, labels, hard)), 0)
print(float(losses.CrossBatchMemory(losses.SupConLoss(), 4, 20)(x, labels)), 0)
print(float(losses.ContrastiveLoss(distance=losses.LpDistance(power=2), reducer=losses.MeanReducer())(x, labels)), 0)
assert not losses.NTXentLoss.__mro__[2].__module__.startswith("pytorch")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    x, labels = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    names = ("NTXentLoss", "SupConLoss", "ContrastiveLoss", "MultiSimilarityLoss", "CircleLoss")
    mined = peer_miners.MultiSimilarityMiner()(x, labels)
    want = [
        v for n in names for v in (getattr(peer_losses, n)()(x, labels), getattr(peer_losses, n)()(x, labels, mined))
    ]
    want += [peer_losses.TripletMarginLoss()(x, labels, peer_miners.BatchHardMiner()(x, labels)), 0.0]
    want += [peer_losses.CrossBatchMemory(peer_losses.SupConLoss(), 4, 20)(x, labels), 0.0]
    squared = {"distance": distances.LpDistance(power=2), "reducer": reducers.MeanReducer()}
    want += [peer_losses.ContrastiveLoss(**squared)(x, labels), 0.0]
    got = [float(v) for v in done.stdout.split()]
    torch.testing.assert_close(got, [float(v) for v in want], rtol=1e-6, atol=1e-7)


# --- where the peer is wrong ---


def test_nt_xent_does_not_saturate():
    """At T = 0.01 a pair of opposite rows has loss 200; the peer's stops at -log(smallest float) with no gradient."""
    x = torch.tensor([[1.0, 0.0], [-0.9, 0.3], [1.0, 0.01], [1.0, -0.01]])
    labels = torch.tensor([0, 0, 1, 2])
    found = []
    for module, dtype in ((losses, torch.float32), (peer_losses, torch.float32), (losses, torch.float64)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        loss = module.NTXentLoss(temperature=0.01)(leaf, labels)
        loss.backward()
        found.append((loss.item(), leaf.grad[1].norm().item()))
    ours, theirs, right = found
    assert theirs[0] < 45 < 90 < right[0]  # the mean of 87 and 1, instead of 195 and 1
    assert abs(ours[0] - right[0]) < 1e-5 * right[0]
    assert abs(ours[1] - right[1]) < 1e-4 * right[1]
    assert theirs[1] < 0.6 * right[1]


def test_one_positive_and_one_negative_pair_count():
    """The peer returns zero when each index list has at most one element."""
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    labels, refs = torch.tensor([0]), torch.tensor([0, 1])
    loss = losses.NTXentLoss(temperature=1.0)(x, labels, None, y, refs)
    assert torch.isclose(loss, torch.tensor(1.0).exp().add(1).log())
    assert peer_losses.NTXentLoss(temperature=1.0)(x, labels, None, y, refs) == 0


def test_nan_rows_are_not_dropped():
    """The peer's AvgNonZeroReducer keeps losses above zero, which NaN is not."""
    data = batch("random", False)
    data.x[3, 2] = float("nan")
    peer = peer_losses.SupConLoss()
    peer_data = batch("random", True)
    peer_data.x[3, 2] = float("nan")
    assert peer(*peer_data.call).isfinite()
    assert losses.SupConLoss()(*peer_data.call).isnan()
    assert losses.SupConLoss()(*data.call).isnan()


def test_low_precision_keeps_the_loss_in_float32():
    """The peer computes in the embeddings' dtype; at T = 0.07 a bfloat16 loss is off by percents."""
    data = batch("random", False, b=64, d=16)
    oracle = losses.NTXentLoss()(data.x, data.labels)
    ours = losses.NTXentLoss()(data.x.bfloat16(), data.labels)
    theirs = peer_losses.NTXentLoss()(data.x.bfloat16(), data.labels)
    assert ours.dtype == torch.float32
    assert abs(ours - oracle) < 1e-5 * oracle
    assert abs(theirs - oracle) > 1e-4 * oracle


@pytest.mark.parametrize("case", METRIC, ids=repr)
def test_every_metric_loss_has_its_peer(case):
    assert case.peer is not None or case.name == "sup_con all anchors"


@pytest.mark.parametrize("reducer", ["default", "ThresholdReducer"])
@pytest.mark.parametrize("lists", [False, True], ids=["labels", "index tuple"])
def test_anchors_without_a_negative_of_their_own(lists, reducer):
    """SupCon keeps them while any anchor of the batch has one, and is 0 where none has, by whichever way it runs."""
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = {} if reducer == "default" else {"reducer": reducers.ThresholdReducer(low=0.1)}
    for labels in ([0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0]):
        labels, of_columns = torch.tensor(labels), torch.zeros(4, dtype=torch.int64)
        call = x, labels, None, y, of_columns
        if lists:
            a, p = (labels[:, None] == of_columns).nonzero(as_tuple=True)
            n = (labels[:, None] != of_columns).nonzero(as_tuple=True)
            call = x, labels, (a, p, *n), y, of_columns
        wanted = peer_losses.SupConLoss(**own)(*call)
        assert float(wanted) > 0 or not (labels != 0).any()
        torch.testing.assert_close(losses.SupConLoss(**own)(*call), wanted)
