"""The rest of the pair-based family: definitions, promises, options."""

import math

import pytest
import support
import torch
from family_cases import FAMILY, squared
from loss_cases import KINDS, Batch, batch, evaluate, sides_of
from test_losses_definition import close

from flashpair import losses, miners, row_reduce

#: The formulas are one text for all backends; the fused engine and the reference stand for them.
ENGINES = ["reference", *(b for b in support.FUSED if not support.interpreted(b))]


@pytest.fixture(params=ENGINES)
def engine(request):
    with support.forced(request.param):
        yield request.param


def skip(case, kind) -> None:
    if case.distance and kind == "duplicates":
        pytest.skip("the distance of equal rows has no gradient, and ties decide")
    if kind == "duplicates" and case.name.startswith(("Tuplet", "Triplet", "Histogram")):
        pytest.skip("acos at 1, and ties")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case, side", sides_of(FAMILY))
def test_definition(case, side, kind, engine):
    skip(case, kind)
    data = batch(kind, side)
    want = evaluate(case.definition, data.to(torch.float64), ())
    got = evaluate(case.ours, data.to(torch.float64, support.device(engine)), ())
    close(got, want, 1e-10 if kind != "collapsed" else 1e-8)


@pytest.mark.parametrize("case, side", sides_of(FAMILY))
def test_gradcheck(case, side, engine):
    if case.name.startswith(("DynamicSoft", "GeneralPair", "PairCircle")):
        pytest.skip("detaches a factor by definition; test_definition covers it")
    data = batch("random", side, b=5, n=4, d=3).to(torch.float64, support.device(engine))
    names = [n for n in data.leaves() if n in ("x", "y")]

    def call(*values):
        for name, value in zip(names, values, strict=True):
            setattr(data, name, value)
        return case.ours(data)

    assert torch.autograd.gradcheck(call, [data.leaves()[n] for n in names], atol=1e-6, rtol=1e-5, nondet_tol=0.0)


METRIC = [case for case in FAMILY if "matched" not in case.sides]


@pytest.mark.parametrize("case, side", sides_of(METRIC))
def test_empty_batch(case, side, engine):
    if case.name == "ICNNLoss":
        pytest.skip("needs neighbours; see test_bad_calls")
    data = batch("random", side, b=0, n=0).to(torch.float64, support.device(engine))
    loss = case.ours(data)
    assert loss.shape == () and loss.item() == 0
    loss.backward()
    assert data.x.grad.shape == (0, 5)


@pytest.mark.parametrize("b, n", [(4, 0), (0, 4), (1, 1)])
@pytest.mark.parametrize("case", [c for c in METRIC if True in c.sides], ids=repr)
def test_one_side_empty(case, b, n, engine):
    if case.name == "ICNNLoss" and n == 0:
        pytest.skip("needs neighbours")
    data = batch("all distinct", True, b=b, n=n).to(torch.float64, support.device(engine))
    loss = case.ours(data)
    loss.backward()
    assert loss.isfinite() and data.x.grad.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["random", "one lonely", "one class", "all distinct"])
@pytest.mark.parametrize("case, side", sides_of(FAMILY))
def test_poison_reaches_the_loss(case, side, kind, value, engine):
    """One bad number, also in a row without positives, makes the loss NaN; no row is dropped for it."""
    data = batch(kind, side)
    data.x[0, 1] = value
    data = data.to(torch.float64, support.device(engine))
    loss = case.ours(data)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, data.x)
    assert grad.isnan().any()


@pytest.mark.parametrize("case, side", sides_of(METRIC))
def test_statistics(case, side, engine):
    """The same loss, with the moments of each row's pairs."""
    name = case.name.split()[0]
    if name == "SignalToNoiseRatioContrastiveLoss" or "semihard" in case.name:
        pytest.skip("measures another distance, or a part of the pairs")
    data = batch("random", side).to(torch.float64, support.device(engine))
    found: list = []

    class Asked(getattr(losses, name)):
        def forward(self, *call):
            found.append(super().forward(*call, return_stats=True))
            return found[-1][0]

    previous, loss = getattr(losses, name), case.ours(data)
    setattr(losses, name, Asked)
    try:
        again = case.ours(data)
    finally:
        setattr(losses, name, previous)
    assert torch.equal(loss, again)
    stats = found[0][1]
    refs = data.labels if data.y is None else data.ref_labels
    same = data.labels[:, None] == refs[None, :]
    if data.y is None:
        same.fill_diagonal_(False)
    assert torch.equal(stats.positive.count.long(), same.sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case, side", sides_of(FAMILY))
def test_precision(case, side, dtype):
    """Statistics in float32 for every dtype; as near to float64 as the rounded input allows."""
    data = batch("random", side, b=40, n=30, d=16)
    exact = data.to(torch.float64)
    rounded = data.to(dtype)
    want, got = case.ours(exact), case.ours(rounded)
    assert got.dtype == torch.float32
    # The inputs are exact in bfloat16. A quantised or thresholded pair may fall on the other side.
    loose = 2e-2 if case.name.startswith(("PNP", "SmoothAP", "Tuplet", "DynamicSoft")) else 2e-4
    assert abs(got.double() - want) <= loose * want.abs().clamp_min(1e-2), (got, want)
    (grad,) = torch.autograd.grad(got, rounded.x)
    assert grad.dtype == dtype and grad.isfinite().all()


# --- options --------------------------------------------------------------------------------------------------------


def test_margin_with_a_beta_for_each_class(engine):
    data = batch("random", False).to(torch.float64, support.device(engine))
    loss = losses.MarginLoss(nu=0.3, learn_beta=True, num_classes=4).to(data.x.device)
    with torch.no_grad():
        loss.beta += torch.tensor([0.0, 0.25, -0.125, 0.5], device=data.x.device)
    found = loss(data.x, data.labels)
    grads = torch.autograd.grad(found, [data.x, loss.beta])
    d = torch.cdist(*(torch.nn.functional.normalize(data.x),) * 2, compute_mode="donot_use_mm_for_euclid_dist")
    total, active, added = 0.0, 0, 0.0
    beta = loss.beta.double()
    for a in range(11):
        for p in range(11):
            for n in range(11):
                if a != p and data.labels[a] == data.labels[p] and data.labels[a] != data.labels[n]:
                    pull = (d[a, p] - beta[data.labels[a]] + 0.2).clamp_min(0)
                    push = (beta[data.labels[a]] - d[a, n] + 0.2).clamp_min(0)
                    active += (pull.item() > 0) + (push.item() > 0)
                    total, added = total + pull + push, added + 0.3 * beta[data.labels[a]]
    want = (total + added) / active
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    for a, b in zip(grads, torch.autograd.grad(want, [data.x, loss.beta]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 1e-9, atol=1e-7)


def test_dynamic_soft_margin_moves_its_histogram(engine):
    """Two steps, the second with the first one's histogram; and it is saved with the module."""
    loss = losses.DynamicSoftMarginLoss().double()
    first, second = (batch("random", False, seed=k).to(torch.float64, support.device(engine)) for k in (0, 1))
    loss(*first.call).backward()
    before = loss.hist_.clone()
    value = loss(*second.call)
    value.backward()
    l = torch.stack([a - b for a, b in _triplet_distances(second)]).detach()  # noqa: E741
    place = (l + 2) / 0.4
    left = place.floor().long().clamp(max=8)
    counts = torch.zeros(10, dtype=l.dtype, device=l.device)
    counts = counts.index_add(0, left, 1 - (place - left)).index_add(0, left + 1, place - left)
    moved = 0.99 * before + 0.01 * counts
    moved = moved / moved.sum()
    torch.testing.assert_close(loss.hist_, moved)
    torch.testing.assert_close(value.detach(), (moved.cumsum(0)[left] * l).mean())
    assert "hist_" in loss.state_dict() and not loss.hist_.requires_grad


def _triplet_distances(data: Batch):
    d = [[squared(a, b).sqrt() if a is not b else None for b in data.x] for a in data.x]
    for a in range(len(data.x)):
        for p in range(len(data.x)):
            for n in range(len(data.x)):
                if a != p and data.labels[a] == data.labels[p] != data.labels[n]:
                    yield d[a][p], d[a][n]


def test_dynamic_soft_margin_without_labels(engine):
    data = batch("random", "matched").to(torch.float64, support.device(engine))
    value = losses.DynamicSoftMarginLoss()(data.x, ref_emb=data.y)
    d = torch.stack([torch.stack([squared(a, b).sqrt() for b in data.y]) for a in data.x])
    off = d + torch.diag(torch.full_like(d[0], torch.inf))
    l = (d.diagonal() - torch.minimum(off.amin(0), off.amin(1))).detach()  # noqa: E741
    place = (l + 2) / 0.4
    left = place.floor().long()
    counts = torch.zeros(10, dtype=l.dtype, device=l.device)
    counts = counts.index_add(0, left, 1 - (place - left)).index_add(0, left + 1, place - left)
    torch.testing.assert_close(value.detach(), ((counts / counts.sum()).cumsum(0)[left] * l).mean())


def test_self_supervised(engine):
    data = batch("random", "matched").to(torch.float64, support.device(engine))
    labels = torch.arange(11, device=data.x.device)
    both = torch.cat([data.x, data.y])
    for loss in (losses.NTXentLoss(), losses.SmoothAPLoss(), losses.TripletMarginLoss()):
        assert torch.equal(losses.SelfSupervisedLoss(loss)(data.x, data.y), loss(both, labels.repeat(2)))
        apart = losses.SelfSupervisedLoss(loss, symmetric=False)(data.x, data.y)
        assert torch.equal(apart, loss(data.x, labels, ref_emb=data.y, ref_labels=labels.clone()))


def test_general_pair_weighting_is_multi_similarity(engine):
    from family_cases import soft_weight

    data = batch("random", False).to(torch.float64, support.device(engine))
    by_weights = losses.GeneralPairWeightingLoss(soft_weight(-2.0), soft_weight(50.0))
    ours, theirs = (torch.autograd.grad(f(*data.call), data.x)[0] for f in (by_weights, losses.MultiSimilarityLoss()))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [3, 4])
def test_icnn_of_the_authors_code(k):
    """Angles 0, 20, 40, 60, 80, 5, 30, 50 degrees; values recorded from the first author's implementation."""
    angles = torch.tensor([0.0, 20, 40, 60, 80, 5, 30, 50], dtype=torch.float64).deg2rad()
    x, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 1, 2, 0, 1, 2])
    value = losses.ICNNLoss(k=k, neighbours=5)(x, labels).item()
    want = {4: 0.40796063, 3: 0.42837819}[k]
    assert abs(math.exp(-value) - want) < 1e-4  # equal angles tie, and rounding decides which neighbour counts


def test_proto_triplet_of_the_authors_code():
    angles = torch.tensor([0.0, 20, 40, 60, 80], dtype=torch.float64).deg2rad()
    means = torch.tensor([10.0, 50, 90], dtype=torch.float64).deg2rad()
    x, refs = (torch.stack([a.cos(), a.sin()], 1) for a in (angles, means))
    loss = losses.ProtoTripletLoss()(x, torch.tensor([0, 0, 1, 1, 2]), ref_emb=refs, ref_labels=torch.arange(3))
    assert abs(loss.item() - 0.12534024) < 1e-7


def test_random_triplets_are_triplets(engine):
    """Of the asked number, uniform over partners, the same for the same seed."""
    from flashpair.losses.triplets import random_triplets

    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    a, p, n = random_triplets(labels, None, None, 2000, seed=7)
    assert torch.bincount(a).tolist() == [2000] * 5
    assert (a != p).all() and (labels[a] == labels[p]).all() and (labels[a] != labels[n]).all()
    assert torch.bincount(p[a == 0], minlength=6).sub(torch.tensor([0, 1000, 1000, 0, 0, 0])).abs().max() < 120
    assert torch.bincount(n[a == 3], minlength=6).sub(torch.tensor([500, 500, 500, 0, 0, 500])).abs().max() < 100
    for again, first in zip(random_triplets(labels, None, None, 2000, seed=7), (a, p, n), strict=True):
        assert torch.equal(again, first)
    torch.manual_seed(3)
    x = torch.randn(6, 4, device=support.device(engine))
    torch.manual_seed(4)
    first = losses.TripletMarginLoss(triplets_per_anchor=5)(x, labels.to(x.device))
    torch.manual_seed(4)
    assert torch.equal(first, losses.TripletMarginLoss(triplets_per_anchor=5)(x, labels.to(x.device)))


BAD_CALLS = [
    (lambda x, k: losses.FastAPLoss(num_bins=0), "num_bins must be"),
    (lambda x, k: losses.FastAPLoss(distance=losses.CosineSimilarity()), "distance must be LpDistance"),
    (lambda x, k: losses.AngularLoss(distance=losses.LpDistance(normalize_embeddings=False)), "of normalised"),
    (lambda x, k: losses.AngularLoss(alpha=100), "alpha must be"),
    (lambda x, k: losses.HistogramLoss(n_bins=10, delta=0.1), "delta must be 2 / n_bins"),
    (lambda x, k: losses.HistogramLoss(delta=0.3), "delta must divide"),
    (lambda x, k: losses.PNPLoss(variant="X"), "variant must be one of"),
    (lambda x, k: losses.RankedListLoss(0.4, 10, imbalance=2), "imbalance must be"),
    (lambda x, k: losses.RankedListLoss(0.4, 10)(x, k, (k, k + 1, k + 3)), "indices_tuple must be None"),
    (lambda x, k: losses.PNPLoss()(x, k, (k, k + 1, k + 3)), "indices_tuple must be None"),
    (lambda x, k: losses.AngularLoss()(x, None, (k, k, k)), "labels must be given"),
    (lambda x, k: losses.NCALoss()(x), "labels or indices_tuple must be given"),
    (lambda x, k: losses.InstanceLoss()(x, k, None, x.clone(), k.clone()), "must be None for InstanceLoss"),
    (lambda x, k: losses.NPairsLoss()(x, k, None, x.clone(), k.clone()), "takes no ref_emb"),
    (lambda x, k: losses.VICRegLoss()(x, k), "labels must be None"),
    (lambda x, k: losses.VICRegLoss()(x), "ref_emb must be given"),
    (lambda x, k: losses.VICRegLoss()(x, ref_emb=x[:2]), "equal numbers of rows"),
    (lambda x, k: losses.VICRegLoss(distance=losses.LpDistance()), "distance must not be given"),
    (lambda x, k: losses.ICNNLoss(k=0), "k must be"),
    (lambda x, k: losses.ICNNLoss(k=4, neighbours=3), "neighbours must be"),
    (lambda x, k: losses.ICNNLoss()(x[:1], k[:1]), "at least 2 rows"),
    (lambda x, k: losses.ManifoldLoss(l=4, K=9)(x), "at least K=9 rows"),
    (lambda x, k: losses.ManifoldLoss(l=3, K=2)(x), "l=3 features"),
    (lambda x, k: losses.DynamicSoftMarginLoss()(x), "labels must be given"),
    (lambda x, k: losses.DynamicSoftMarginLoss(min_val=1), "min_val must be"),
    (lambda x, k: losses.MarginLoss(num_classes=3)(x, None, (k, k, k)), "labels must be given to MarginLoss"),
    (lambda x, k: losses.SelfSupervisedLoss(losses.NTXentLoss())(x, x[:2]), "equal numbers of rows"),
    (lambda x, k: losses.TripletMarginLoss(reducer=losses.PerAnchorReducer()), "not be PerAnchorReducer"),
    (lambda x, k: losses.TupletMarginLoss(reducer=losses.ThresholdReducer(low=0.2)), "must not be a Threshold"),
    (lambda x, k: losses.NTXentLoss(reducer=losses.ClassWeightedReducer(torch.ones(3)))(x, None, (k, k, k)),
     "labels must be given with ClassWeightedReducer"),
    (lambda x, k: losses.ContrastiveLoss(distance=losses.LpDistance(p=1)), "p=1.*dense_fallback=True"),
    (lambda x, k: losses.GeneralPairWeightingLoss(lambda s, m: s[0], lambda s, m: s)(x, k), "must return shape"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", BAD_CALLS)
def test_bad_calls(call, message):
    if "dense_fallback" in message:
        pytest.importorskip("pytorch_metric_learning")
    with pytest.raises(ValueError, match=message):
        call(torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2]))


# --- whole rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("within_class", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("similarity", list(__import__("flashpair").Similarity))
@pytest.mark.parametrize("side", [False, True])
def test_row_reduce(side, similarity, normalize, within_class, monkeypatch):
    """Panels of a few rows give what one matrix gives, with all gradients."""
    from flashpair import reference, rows

    monkeypatch.setattr(rows, "_CPU_ELEMENTS", 24)
    monkeypatch.setattr(rows, "_CPU_ROWS", 1)
    data = batch("random", side).to(torch.float64)
    weight = torch.randn(11, dtype=torch.float64, requires_grad=True)
    shift = torch.randn((), dtype=torch.float64, requires_grad=True)
    exclude = None if data.y is None else torch.arange(11) % 9

    def formula(panel, w, c):
        s, same = panel.s + c, panel.same
        position, valid = panel.members()
        near = torch.where(valid, panel.s.gather(1, position), 0.0)
        top = torch.where(same, s, -9.0).sort(dim=1).values[:, -1:]
        return [w[:, None] * top.square(), near.pow(3).sum(1), (w * torch.where(same, s, 0.0).sin().sum(1)).sum()]

    got = row_reduce(
        data.x, data.y, formula, rows=[weight], shared=[shift], totals=1, labels=data.labels,
        ref_labels=data.ref_labels, exclude=exclude, similarity=similarity, normalize=normalize,
        within_class=within_class,
    )  # fmt: skip
    s = reference.similarity_matrix(data.x, data.y, similarity, normalize)
    same = data.labels[:, None] == (data.labels if data.y is None else data.ref_labels)[None, :]
    if data.y is None:
        same.fill_diagonal_(False)
    else:
        same[torch.arange(11), exclude] = False
    top = torch.where(same, s + shift, -9.0).sort(dim=1).values[:, -1:]
    want = [
        weight[:, None] * top.square(),
        torch.where(same, s, 0.0).pow(3).sum(1),
        (weight * torch.where(same, s + shift, 0.0).sin().sum(1)).sum(),
    ]
    leaves = [v for v in (data.x, data.y, weight, shift) if v is not None]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(sum(v.sum() for v in r), leaves) for r in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("frozen", [None, 0, 1])
@pytest.mark.parametrize("within_class", [False, True])
@pytest.mark.parametrize("side", [False, True])
def test_row_reduce_with_further_products(side, within_class, frozen, monkeypatch):
    """Panels of a few rows and two further products, one of a tensor with itself; gradients where they are wanted."""
    from flashpair import reference, rows

    monkeypatch.setattr(rows, "_CPU_ELEMENTS", 24)
    monkeypatch.setattr(rows, "_CPU_ROWS", 1)
    data = batch("random", side).to(torch.float64)
    columns, refs = (data.x, data.labels) if data.y is None else (data.y, data.ref_labels)
    g = torch.Generator().manual_seed(3)
    u, v, w = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (11, len(columns), 11))
    pair = [t if k == frozen else t.requires_grad_() for k, t in enumerate((u, v))]
    other = (w.requires_grad_(), w if data.y is None else torch.ones_like(v))

    def formula(panel):
        kept = panel.same * panel.s * torch.sigmoid(panel.products[0]) + panel.same * panel.products[1].square()
        return [kept.sum(1)]

    (got,) = row_reduce(
        data.x, data.y, formula, products=[pair, other], labels=data.labels, ref_labels=data.ref_labels,
        normalize=True, within_class=within_class,
    )  # fmt: skip
    same = (data.labels[:, None] == refs[None]).double()
    same = same.fill_diagonal_(0) if data.y is None else same
    s = reference.similarity_matrix(data.x, data.y, 0, True)
    want = (same * (s * torch.sigmoid(u @ v.T) + (other[0] @ other[1].T).square())).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaves = [t for t in (data.x, data.y, u, v, w) if t is not None and t.requires_grad]
    weights = torch.randn(11, generator=g, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(r, leaves, weights) for r in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("side", [False, True])
def test_a_single_total_takes_one_pass(side, normalize, monkeypatch):
    """Gradients of one scalar are known with its value: each panel is computed once, whatever becomes of the scalar."""
    from flashpair import rows

    monkeypatch.setattr(rows, "_CPU_ELEMENTS", 24)
    monkeypatch.setattr(rows, "_CPU_ROWS", 1)
    data = batch("random", side).to(torch.float64)
    columns = data.x if data.y is None else data.y
    g = torch.Generator().manual_seed(3)
    u, v, w = (torch.randn(n, 3, generator=g, dtype=torch.float64).requires_grad_() for n in (11, len(columns), 11))
    shift = torch.randn((), generator=g, dtype=torch.float64, requires_grad=True)
    calls = []

    def single(panel, w, c):
        calls.append(len(panel.row))
        return [(w.sum(1, keepdim=True) * panel.same * (panel.s + c).sin() * panel.products[0]).sum()]

    def by_row(panel, w, c):
        return [(w.sum(1, keepdim=True) * panel.same * (panel.s + c).sin() * panel.products[0]).sum(1)]

    how = {
        "products": [(u, v)], "rows": [w], "shared": [shift], "labels": data.labels, "ref_labels": data.ref_labels,
        "normalize": normalize,
    }  # fmt: skip
    (got,), (want,) = row_reduce(data.x, data.y, single, totals=1, **how), row_reduce(data.x, data.y, by_row, **how)
    torch.testing.assert_close(got, want.sum(), rtol=1e-12, atol=1e-12)
    leaves = [t for t in (data.x, data.y, u, v, w, shift) if t is not None]
    found = [torch.autograd.grad(-3 * r.sum(), leaves, retain_graph=True) for r in (got, want, got)]
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert torch.equal(a, c)
    assert sum(calls) == 11 and len(calls) > 2
    with torch.no_grad():
        assert torch.equal(row_reduce(data.x, data.y, single, totals=1, **how)[0], got)
    x = torch.randn(6, 4, dtype=torch.bfloat16, requires_grad=True)
    row_reduce(x, None, lambda panel: [panel.s.square().sum()], totals=1)[0].backward()
    assert x.grad.dtype == torch.bfloat16


def test_results_outlive_their_panel(monkeypatch):
    """The next panel takes the memory of the last: not that of its results, nor that of a call inside the formula."""
    from flashpair import rows

    monkeypatch.setattr(rows, "_CPU_ELEMENTS", 24)
    monkeypatch.setattr(rows, "_CPU_ROWS", 1)
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(n, 4, generator=g, dtype=torch.float64, requires_grad=True) for n in (7, 9))
    s = x @ y.T
    guide = s.detach()
    weights = torch.randn(7, 9, generator=g, dtype=torch.float64)

    def whole(panel):
        row_reduce(y.detach(), x.detach(), lambda inner: [inner.s.sum(1)])
        return [panel.s, panel.products[0].T.T, panel.s[:, 0]]

    how = {"per_member": 0}  # two rows a panel
    got = row_reduce(x, y, whole, products=[(x.detach(), y.detach())], **how)
    for a, b in zip(got, (s, guide, s[:, 0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((v * weights).sum(), (x, y)) for v in (got[0], s)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    (total,) = row_reduce(x, y, lambda panel: [panel.s[0, 0]], totals=1, **how)
    torch.testing.assert_close(total, s[::2, 0].sum(), rtol=1e-12, atol=1e-12)


def test_row_reduce_checks_its_input():
    x = torch.randn(4, 3)
    formula = lambda panel: [panel.s.sum(1)]  # noqa: E731
    for options, message in (
        ({"rows": [torch.ones(3)]}, r"rows\[0\] must have 4 rows"),
        ({"copies": 0}, "copies must be"),
        ({"products": [(torch.ones(4, 2), torch.ones(3, 2))]}, r"products\[0\] must have 4 and 4 rows; got 4 and 3"),
        ({"products": [(torch.ones(4, 2), torch.ones(4, 1))]}, r"products\[0\]\[1\] must have equal features"),
        ({"exclude_self": True, "y": x}, "exclude_self=True needs y=None"),
        ({"exclude": torch.arange(4)}, "exclude and exclude_self=True exclude each other"),
        ({"labels": torch.arange(3)}, "labels"),
    ):
        with pytest.raises(ValueError, match=message):
            row_reduce(x, options.pop("y", None), formula, **options)
    twice = row_reduce(x.requires_grad_(), None, formula)[0].sum()
    (grad,) = torch.autograd.grad(twice, x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x)


# --- in a memory ----------------------------------------------------------------------------------------------------

IN_MEMORY = sorted({c.name.split()[0] for c in METRIC if True in c.sides} - {"GeneralPairWeightingLoss"})

#: Losses that are a sum over rows, so that each row can be checked alone.
BY_ROW = {
    "AngularLoss", "BinomialDevianceLoss", "FastAPLoss", "GeneralizedLiftedStructureLoss", "NCALoss", "SmoothAPLoss",
    "SignalToNoiseRatioContrastiveLoss", "TripletMarginLoss", "TripletSemiHardLoss", "TupletMarginLoss",
}  # fmt: skip


@pytest.mark.parametrize("name", IN_MEMORY)
def test_cross_batch_memory(name, engine):
    """The loss of a batch against the queue without the batch's own copies."""
    data = batch("random", True).to(torch.float64, support.device(engine))
    options = {"RankedListLoss": {"margin": 0.4, "Tn": 10}, "ICNNLoss": {"k": 2}}.get(name, {})
    options |= {"reducer": losses.SumReducer()} if name in BY_ROW else {}
    loss_of = getattr(losses, name)(**options)
    memory = losses.CrossBatchMemory(loss_of, embedding_size=5, memory_size=20)
    memory(data.y.detach(), data.ref_labels)
    loss = memory(data.x, data.labels)
    (grad,) = torch.autograd.grad(loss, data.x)
    assert loss.isfinite() and grad.isfinite().all()
    if name not in BY_ROW:
        return
    columns, refs = torch.cat([data.y, data.x]).detach(), torch.cat([data.ref_labels, data.labels])
    rows = []
    for i in range(11):
        keep = torch.arange(20, device=data.x.device) != 9 + i
        rows.append(loss_of(data.x[[i]], data.labels[[i]], None, columns[keep], refs[keep]))
    torch.testing.assert_close(loss, torch.stack(rows).sum(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["InstanceLoss", "ClipLoss", "ManifoldLoss"])
def test_no_memory_for(name):
    options = {"l": 5} if name == "ManifoldLoss" else {}
    with pytest.raises(ValueError, match=f"loss must be one of .*got {name}"):
        losses.CrossBatchMemory(getattr(losses, name)(**options), embedding_size=5)


# --- what miners return, given to any loss ---------------------------------------------------------------------------

LAZY = {
    "MultiSimilarityMiner": {"epsilon": -0.5},  # leaves out positives of one row that the other row keeps
    "PairMarginMiner": {"pos_margin": 0.9, "neg_margin": 1.2},
    "HDCMiner": {},
    "TopKHardNegativesMiner": {"k": 2},
    "BatchHardMiner": {},
    "TripletMarginMiner": {"margin": 0.3, "type_of_triplets": "semihard"},
}


@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("name", ["ContrastiveLoss", "NCALoss", "MarginLoss", "TripletMarginLoss", "TupletMarginLoss",
                                  "AngularLoss", "IntraPairVarianceLoss"])  # fmt: skip
@pytest.mark.parametrize("miner", LAZY)
def test_lazy_selections_are_their_tuples(miner, name, side):
    """A loss of a lazy selection is the loss of the index tensors that it stands for."""
    data = batch("random", side, b=16, n=13).to(torch.float64)
    call = (data.x, data.labels, data.y, data.ref_labels)
    mined, loss_of = getattr(miners, miner)(**LAZY[miner])(*call), getattr(losses, name)()
    rest = (data.y, data.ref_labels)
    lazy, plain = (loss_of(data.x, data.labels, m, *rest) for m in (mined, mined.as_tuple()))
    torch.testing.assert_close(lazy, plain, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(*(torch.autograd.grad(v, data.x)[0] for v in (lazy, plain)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("miner", LAZY)
def test_lazy_selections_stay_lazy_in_a_memory(miner, monkeypatch):
    """Less the batch's own copies, and without listing anything."""
    from flashpair.miners import selection

    data = batch("random", True, b=8, n=12).to(torch.float64)
    memory = losses.CrossBatchMemory(
        losses.TripletMarginLoss() if "riplet" in miner or miner == "BatchHardMiner" else losses.ContrastiveLoss(),
        embedding_size=5, memory_size=20, miner=getattr(miners, miner)(**LAZY[miner]),
    )  # fmt: skip
    memory(data.y.detach(), data.ref_labels)
    if miner != "BatchHardMiner":  # its triplets are listed already, one a row
        for kind in (selection.MinedPairs, selection.MinedTripletBand):
            monkeypatch.setattr(kind, "as_tuple", lambda self: pytest.fail("listed"))
    assert memory(data.x, data.labels).isfinite()
