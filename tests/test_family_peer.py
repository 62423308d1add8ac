"""The rest of the family against pytorch-metric-learning: equal where it is right, and where it is not."""

import pytest
import torch
from family_cases import FAMILY, PEER_ON_ONE_SIDE, define_smooth_ap, unit
from loss_cases import KINDS, batch, evaluate, peer_losses, peer_miners, sides_of
from test_losses_definition import close
from test_losses_peer import arguments, describe

from flashpair import losses, miners
from flashpair.losses.metric import MetricLoss

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning.losses import BaseMetricLossFunction

PAIRED = [c for c in FAMILY if c.peer is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case, side", sides_of(PAIRED))
def test_peer(case, side, kind):
    name = case.name.split()[0]
    if side and name in PEER_ON_ONE_SIDE:
        pytest.skip("the peer takes no references, or gets them wrong; see below")
    if kind == "duplicates" and (case.distance or name in ("TripletMarginLoss", "TupletMarginLoss", "HistogramLoss")):
        pytest.skip("distances of equal rows are rounding errors there, its acos and its bins fail at 1")
    if kind == "collapsed" and name == "HistogramLoss":
        pytest.skip("all in one of its float32 bins")
    if kind == "one class" and name in ("LiftedStructureLoss", "TupletMarginLoss", "SignalToNoiseRatioContrastiveLoss"):
        pytest.skip("the peer gives up without negatives: a plain 0, also for the positives")
    if kind == "all distinct" and name == "NCALoss":
        pytest.skip("the mean of no losses: NaN there, 0 here")
    data = batch(kind, side)
    if case.name == "TripletMarginLoss swap" and side:
        pytest.skip("the peer takes the distance of another pair; see test_losses_peer")
    want = evaluate(case.peer, data.to(torch.float64), ())
    got = evaluate(case.ours, data.to(torch.float64), ())
    # The peer's histograms are float32, its softplus is linear from 20 on.
    loose = {"HistogramLoss": 1e-4}.get(name, 1e-8 if kind == "collapsed" else 1e-9)
    close(got, want, loose)


NAMES = sorted({c.name.split()[0] for c in PAIRED} | {"SmoothAPLoss", "DynamicSoftMarginLoss"})


@pytest.mark.parametrize("name", NAMES)
def test_same_arguments_and_defaults_as_the_peer(name):
    ours, theirs = getattr(losses, name), getattr(peer_losses, name)
    for method in ("__init__", "forward"):
        wanted = [p for p in arguments(getattr(theirs, method)) if p.kind == p.POSITIONAL_OR_KEYWORD]
        got = [p for p in arguments(getattr(ours, method)) if p.kind == p.POSITIONAL_OR_KEYWORD][: len(wanted)]
        assert [(p.name, p.default) for p in got] == [(p.name, p.default) for p in wanted], method
    options = {"margin": 0.4, "Tn": 10} if name == "RankedListLoss" else {}
    left, right = ours(**options), theirs(**options)
    assert isinstance(left, BaseMetricLossFunction)
    assert describe(left.distance) == describe(right.distance) and type(left.reducer) is type(right.reducer)
    if isinstance(right.reducer, reducers.MultipleReducers):
        assert {k: describe(v) for k, v in left.reducer.reducers.items()} == {
            k: describe(v) for k, v in right.reducer.reducers.items()
        }
    else:
        assert describe(left.reducer) == describe(right.reducer)


MINERS = [
    ("PairMarginMiner", {"pos_margin": 0.9, "neg_margin": 1.1}),
    *(("TripletMarginMiner", {"margin": 0.3, "type_of_triplets": t}) for t in ("all", "hard", "semihard", "easy")),
    ("HDCMiner", {"filter_percentage": 1.0}),
    *(
        ("BatchEasyHardMiner", {"pos_strategy": p, "neg_strategy": n, "allowed_pos_range": r})
        for p in ("easy", "hard", "semihard", "all")
        for n in ("easy", "hard", "semihard", "all")
        for r in (None, (0.4, 1.3))
        if not (p == n == "semihard") and not ("all" in (p, n) and "semihard" in (p, n))
    ),
]


def members(indices) -> list:
    """Pairs or triplets in one order."""
    indices = [v.tolist() for v in indices]
    if len(indices) == 3:
        return sorted(zip(*indices, strict=True))
    return [sorted(zip(*indices[:2], strict=True)), sorted(zip(*indices[2:], strict=True))]


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("distance", ["lp", "cosine", "squared"])
@pytest.mark.parametrize("name, options", MINERS)
def test_miners(name, options, distance, side):
    distance = {
        "lp": distances.LpDistance(),
        "cosine": distances.CosineSimilarity(),
        "squared": distances.LpDistance(normalize_embeddings=False, power=2),
    }[distance]
    data = batch("random", side, b=24, n=17)
    call = (data.x, data.labels, data.y, data.ref_labels)
    got = getattr(miners, name)(distance=distance, **options)(*call)
    assert members(tuple(got)) == members(getattr(peer_miners, name)(distance=distance, **options)(*call))


@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize("side", [False, True])
def test_hdc_miner(side, share):
    """The peer keeps one of two pairs that tie with the last one, here both stay."""
    data = batch("random", side, b=24, n=17)
    call = (data.x, data.labels, data.y, data.ref_labels)
    got, want = (members(tuple(m.HDCMiner(share)(*call))) for m in (miners, peer_miners))
    for ours, theirs in zip(got, want, strict=True):
        assert set(theirs) <= set(ours) and len(ours) - len(theirs) <= 1


@pytest.mark.parametrize("side", [False, True])
def test_angular_miner(side):
    """On unit vectors, the only ones for which the peer's angle is one."""
    data = batch("random", side, b=24, n=17)
    refs = None if data.y is None else unit(data.y)
    got = miners.AngularMiner()(data.x, data.labels, data.y, data.ref_labels)
    assert members(got) == members(peer_miners.AngularMiner()(unit(data.x), data.labels, refs, data.ref_labels))


@pytest.mark.parametrize("name", ["NCALoss", "FastAPLoss", "SmoothAPLoss"])
def test_miner_weights(name):
    data = batch("random", False, b=12).to(torch.float64)
    data.labels = torch.arange(3).repeat_interleave(4)  # as the peer's SmoothAP wants them
    mined = peer_miners.BatchHardMiner()(data.x, data.labels)
    ours, theirs = (getattr(m, name)()(data.x, data.labels, mined) for m in (losses, peer_losses))
    if name != "SmoothAPLoss":
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    weights = peer_miner_weights(mined, 12)
    plain = [getattr(losses, name)(reducer=losses.SumReducer())(data.x, data.labels)]
    assert weights.max() == 1 and ours < plain[0]


def peer_miner_weights(mined, rows: int) -> torch.Tensor:
    counts = torch.bincount(torch.cat(mined), minlength=rows).double()
    return counts / counts.max()


INDEXED = [
    "AngularLoss", "GeneralizedLiftedStructureLoss", "IntraPairVarianceLoss", "LiftedStructureLoss", "MarginLoss",
    "SignalToNoiseRatioContrastiveLoss", "ThresholdConsistentMarginLoss", "TripletMarginLoss", "TupletMarginLoss",
    "HistogramLoss", "NPairsLoss", "DynamicSoftMarginLoss",
]  # fmt: skip


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("name", INDEXED)
def test_index_tuples(name, length):
    """Explicit tuples with duplicates."""
    data = batch("random", False).to(torch.float64)
    g = torch.Generator().manual_seed(5)
    a = torch.randint(0, 11, (20,), generator=g)
    p, q = torch.randint(0, 5, (20,), generator=g), torch.randint(5, 11, (20,), generator=g)
    keep = (a != p) & (a != q)
    a, p, q = a[keep], p[keep], q[keep]
    indices = (a, p, q) if length == 3 else (a, p, a, q)
    indices = tuple(torch.cat([v, v[:3]]) for v in indices)
    found = []
    for module in (losses, peer_losses):
        options = {"beta": 1.25} if name == "MarginLoss" else {}
        loss = getattr(module, name)(**options)
        rows = (lambda v: unit(v)) if name == "AngularLoss" else (lambda v: v)
        found.append(evaluate(lambda d, f=loss, r=rows: f(r(d.x), d.labels, indices), data, ()))
    if name == "DynamicSoftMarginLoss":  # see below
        found = [{"loss": f["loss"]} for f in found]
    close(*found, 1e-4 if name == "HistogramLoss" else 1e-9)


@pytest.mark.parametrize("name", ["NTXentLoss", "ContrastiveLoss", "SupConLoss", "NCALoss", "MarginLoss",
                                  "TripletMarginLoss", "IntraPairVarianceLoss"])  # fmt: skip
def test_class_weights(name):
    data = batch("random", False).to(torch.float64)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    found = []
    for module in (losses, peer_losses):
        loss = getattr(module, name)(reducer=reducers.ClassWeightedReducer(weights))
        found.append(evaluate(lambda d, f=loss: f(d.x, d.labels), data, ()))
    if name == "MarginLoss":
        found = [{"loss": f["loss"].float().double()} for f in found]
    close(*found, 1e-6 if name == "MarginLoss" else 1e-8)


@pytest.mark.parametrize("inner", [None, reducers.AvgNonZeroReducer(), reducers.SumReducer()])
@pytest.mark.parametrize("name", ["NTXentLoss", "ContrastiveLoss", "IntraPairVarianceLoss", "MultiSimilarityLoss"])
def test_per_anchor(name, inner):
    data = batch("one lonely", False).to(torch.float64)
    found = []
    for module in (losses, peer_losses):
        loss = getattr(module, name)(reducer=reducers.PerAnchorReducer(inner))
        found.append(evaluate(lambda d, f=loss: f(d.x, d.labels), data, ()))
    close(*found, 1e-8)


@pytest.mark.parametrize("name", ["TupletMarginLoss", "AngularLoss"])
def test_per_anchor_where_the_peer_fails(name):
    """Its losses have a second dimension; the mean of an anchor's losses is the loss of that anchor alone."""
    data = batch("one lonely", False).to(torch.float64)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        getattr(peer_losses, name)(reducer=reducers.PerAnchorReducer())(data.x, data.labels)
    found = getattr(losses, name)(reducer=reducers.PerAnchorReducer())(data.x, data.labels)
    rows = []
    for i in range(11):  # the positive pairs of one anchor, with all negatives
        p = ((data.labels[i] == data.labels) & (torch.arange(11) != i)).nonzero()[:, 0]
        n = (data.labels[i] != data.labels).nonzero()[:, 0]
        a = torch.full_like(p, i)
        alone = getattr(losses, name)()(data.x, data.labels, (a, p, torch.full_like(n, i), n))
        rows.append(alone if len(a) else alone * 0)
    torch.testing.assert_close(found, torch.stack(rows).mean(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "CircleLoss"])
def test_class_weights_where_the_peer_is_wrong(name):
    """Its losses (B, 1) times weights (B,) are a matrix, whose mean knows nothing of whose weight is whose."""
    data = batch("random", False).to(torch.float64)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    reducer = reducers.ClassWeightedReducer(weights)
    ours, theirs = (getattr(m, name)(reducer=reducer)(data.x, data.labels) for m in (losses, peer_losses))
    plain = getattr(losses, name)(reducer=reducers.MeanReducer())(data.x, data.labels)
    torch.testing.assert_close(theirs, plain * weights[data.labels].mean(), rtol=1e-8, atol=1e-10)
    single = [
        getattr(losses, name)(reducer=reducers.SumReducer())(data.x[[i]], data.labels[[i]], None, *others)
        for i in range(11)
        for others in [(torch.cat([data.x[:i], data.x[i + 1 :]]), torch.cat([data.labels[:i], data.labels[i + 1 :]]))]
    ]
    torch.testing.assert_close(ours, (torch.stack(single) * weights[data.labels]).mean(), rtol=1e-8, atol=1e-10)


REDUCERS = [reducers.MeanReducer(), reducers.SumReducer(), reducers.AvgNonZeroReducer()]
BOUNDED = [reducers.ThresholdReducer(low=0.1, high=0.5), reducers.ThresholdReducer(high=0.3)]


@pytest.mark.parametrize("reducer", REDUCERS + BOUNDED, ids=describe)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("distance", ["lp", "cosine"])
@pytest.mark.parametrize("swap", [False, True])
def test_triplets(swap, distance, smooth, reducer):
    """All triplets, never listed."""
    distance = {"lp": distances.LpDistance(), "cosine": distances.CosineSimilarity()}[distance]
    if smooth and not swap and reducer in BOUNDED:
        with pytest.raises(ValueError, match="must not be a ThresholdReducer"):
            losses.TripletMarginLoss(smooth_loss=True, reducer=reducer)(torch.eye(3), torch.tensor([0, 0, 1]))
        return
    data = batch("random", False, b=14).to(torch.float64)
    options = {"margin": 0.2, "swap": swap, "smooth_loss": smooth, "distance": distance, "reducer": reducer}
    close(*(evaluate(lambda d, m=m: m.TripletMarginLoss(**options)(d.x, d.labels), data, ())
            for m in (losses, peer_losses)), 1e-8)  # fmt: skip


@pytest.mark.parametrize("reducer", REDUCERS, ids=describe)
@pytest.mark.parametrize("name", ["LiftedStructureLoss", "GeneralizedLiftedStructureLoss", "MarginLoss", "NCALoss",
                                  "TupletMarginLoss", "RankedListLoss", "FastAPLoss", "AngularLoss"])  # fmt: skip
def test_reducers(name, reducer):
    data = batch("random", False).to(torch.float64)
    options = {"RankedListLoss": {"margin": 0.4, "Tn": 10}, "MarginLoss": {"beta": 1.25}}.get(name, {})
    found = []
    for module in (losses, peer_losses):
        loss = getattr(module, name)(reducer=reducer, **options)
        rows = (lambda v: unit(v)) if name == "AngularLoss" else (lambda v: v)
        found.append(evaluate(lambda d, f=loss, r=rows: f(r(d.x), d.labels), data, ()))
    close(*found, 1e-9)


def test_dense_fallback():
    """What has no fused form says so, and goes to the peer only when asked."""
    data = batch("random", False).to(torch.float64)
    for name, options in (
        ("ContrastiveLoss", {"distance": distances.LpDistance(p=1)}),
        ("MultiSimilarityLoss", {"distance": distances.SNRDistance()}),
        ("TripletMarginLoss", {"reducer": reducers.ThresholdReducer(low=0.1), "smooth_loss": True}),
        ("NTXentLoss", {"distance": distances.DotProductSimilarity(power=3)}),
    ):
        if name == "TripletMarginLoss":
            options["distance"] = distances.LpDistance(p=1)
        with pytest.raises(ValueError, match=f"{name}.*dense_fallback=True"):
            getattr(losses, name)(**options)
        ours = getattr(losses, name)(**options, dense_fallback=True)
        theirs = getattr(peer_losses, name)(**options)
        close(*(evaluate(lambda d, f=f: f(d.x, d.labels), data, ()) for f in (ours, theirs)), 1e-12)
    report = losses.ContrastiveLoss(reducer=reducers.DoNothingReducer(), dense_fallback=True)(data.x, data.labels)
    assert set(report) == {"pos_loss", "neg_loss"}


class _OwnMean(reducers.MeanReducer):
    """A reducer of a user's own may do anything: never fused."""


SHARED = sorted(
    name for name in losses.__all__
    if hasattr(peer_losses, name) and issubclass(getattr(losses, name), MetricLoss)
)  # fmt: skip
STATEFUL = {"DynamicSoftMarginLoss", "ManifoldLoss", "MarginLoss", "VICRegLoss"}


@pytest.mark.parametrize("name", SHARED)
def test_dense_fallback_of_every_loss(name):
    """The peer's class stands in, but not for losses with parameters or a state, or without labels."""
    options = {"RankedListLoss": {"margin": 0.4, "Tn": 10}, "ManifoldLoss": {"l": 5}}.get(name, {})
    options = {**options, "reducer": _OwnMean()}
    if name in STATEFUL:
        with pytest.raises(ValueError, match=r"reducer must be MeanReducer.*got _OwnMean$"):
            getattr(losses, name)(**options, dense_fallback=True)
        return
    data = batch("random", False).to(torch.float64)
    if name == "SmoothAPLoss":  # the peer wants classes of one size
        data.labels = torch.arange(11) % 11
    ours = getattr(losses, name)(**options, dense_fallback=True)
    assert ours.dense
    found = (ours, getattr(peer_losses, name)(**options))
    close(*(evaluate(lambda d, f=f: f(unit(d.x), d.labels), data, ()) for f in found), 1e-12)


def test_dense_fallback_takes_the_peers_arguments():
    loss = losses.SupConLoss(reducer=_OwnMean(), base_temperature=0.1, dense_fallback=True)
    with pytest.raises(ValueError, match=r"base_temperature must be 0\.07 with dense_fallback; got 0\.1"):
        loss(torch.eye(3), torch.tensor([0, 0, 1]))


def test_manifold():
    data = batch("random", False).to(torch.float64)
    meta = torch.arange(11) % 3
    for context in (1.0, 0.0, float("inf")):
        options = {"l": 5, "K": 3, "lambdaC": context}
        ours, theirs = losses.ManifoldLoss(**options), peer_losses.ManifoldLoss(**options)
        theirs.load_state_dict(ours.state_dict())
        values = [f.double()(data.x, None, meta).reshape(()) for f in (ours, theirs)]
        if context == float("inf"):  # "only the context part", says its docstring
            assert values[0].isfinite() and values[1].isinf()
            continue
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-7)  # it inverts in float32
        torch.testing.assert_close(*(torch.autograd.grad(v, data.x)[0] for v in values), rtol=1e-3, atol=1e-6)


# --- where the peer is wrong ------------------------------------------------------------------------------------------


def test_smooth_ap_takes_the_class_size_for_the_number_of_classes():
    """3 classes of 2: the peer's value is another one; 2 of 2 agree."""
    for classes, agrees in ((3, False), (2, True)):
        data = batch("random", False, b=2 * classes).to(torch.float64)
        data.labels = torch.arange(classes).repeat_interleave(2)
        want = define_smooth_ap(data)
        assert torch.isclose(losses.SmoothAPLoss()(*data.call), want, rtol=1e-10)
        theirs = peer_losses.SmoothAPLoss()(*data.call).double()  # it gathers in float32
        assert torch.isclose(theirs, want, rtol=1e-5) == agrees


def test_smooth_ap_takes_classes_of_any_size():
    data = batch("random", False)
    with pytest.raises(Exception, match="same number"):
        peer_losses.SmoothAPLoss()(*data.call)
    assert torch.isclose(losses.SmoothAPLoss()(*data.call), define_smooth_ap(data), rtol=1e-10)


def test_dynamic_soft_margin_keeps_a_graph():
    """Equal first value; the peer's gradient has the histogram's part, and its second step raises."""
    data = batch("random", False).to(torch.float64)
    ours, theirs = losses.DynamicSoftMarginLoss().double(), peer_losses.DynamicSoftMarginLoss()
    values = [f(*data.call) for f in (ours, theirs)]
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(v, data.x)[0] for v in values]
    assert not torch.allclose(*grads, rtol=1e-3)
    ours(*data.call).backward()
    with pytest.raises(RuntimeError, match="second time"):
        theirs(*data.call).backward()


def test_histogram_fails_on_duplicates():
    x = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]]
    labels = torch.tensor([0, 0, 1, 1])
    with pytest.raises((RuntimeError, IndexError)):
        peer_losses.HistogramLoss()(x, labels)
    assert losses.HistogramLoss()(x, labels).isfinite()


def test_angular_depends_on_the_lengths():
    data = batch("random", False)
    theirs = [peer_losses.AngularLoss()(k * data.x, data.labels) for k in (1, 2)]
    ours = [losses.AngularLoss()(k * data.x, data.labels) for k in (1, 2)]
    assert not torch.isclose(*theirs, rtol=0.1) and torch.isclose(*ours, rtol=1e-12)


def test_threshold_consistent_margin_ignores_references():
    data = batch("random", True)
    found = peer_losses.ThresholdConsistentMarginLoss()(*data.call)
    other = peer_losses.ThresholdConsistentMarginLoss()(data.x, data.labels, None, data.y + 1, data.ref_labels)
    assert torch.equal(found, other)


def test_margins_of_index_lists_without_negatives():
    """The peer gives up without negatives: a plain 0, also for the positives' own part."""
    data = batch("one class", False)
    assert peer_losses.LiftedStructureLoss()(*data.call) == 0
    assert losses.LiftedStructureLoss()(*data.call) == 0  # no negatives: nothing to stand out from


def test_distance_weighted_miner_loses_anchors():
    """One near-duplicate negative pair among wide vectors: the peer keeps the rows of that pair alone."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=g)
    x[1] = x[0] + 0.1 * torch.randn(512, generator=g)
    labels = torch.cat([torch.tensor([0, 1]), torch.arange(62) % 2 + 2])
    labels[2:4] = torch.tensor([0, 1])
    theirs = peer_miners.DistanceWeightedMiner(nonzero_loss_cutoff=1.5)(x, labels)
    ours = miners.DistanceWeightedMiner(nonzero_loss_cutoff=1.5)(x, labels)
    assert len(theirs[0].unique()) < 8 and len(ours[0].unique()) == 64
