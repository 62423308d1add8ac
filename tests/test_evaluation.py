"""Evaluation against loops over sorted neighbours, and against pytorch-metric-learning's calculator."""

import math

import pytest
import torch

from flashpair import Similarity, evaluation
from flashpair.evaluation import AccuracyCalculator, retrieval, roc, true_accept_rates
from flashpair.losses import ranks


def data(refs: bool, rows: int = 40, dim: int = 4, classes: int = 7, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(rows, dim, generator=g), torch.randint(0, classes, (rows,), generator=g)
    labels[0] = 99  # a query without a match
    y = torch.randn(30, dim, generator=g)
    return (x, labels, y, torch.randint(0, classes, (30,), generator=g)) if refs else (x, labels, None, None)


def neighbours(x, labels, y, refs, i, key):
    """Whether each reference, nearest first, matches; equal distances in the order of the references."""
    others = [j for j in range(len(x if y is None else y)) if y is not None or j != i]
    y, refs = (x, labels) if y is None else (y, refs)
    order = sorted(others, key=lambda j: (key(x[i], y[j]), j))
    return [bool(refs[j] == labels[i]) for j in order]


KEYS = {
    Similarity.SQUARED_EUCLIDEAN: lambda a, b: ((a.double() - b.double()) ** 2).sum().item(),
    Similarity.DOT: lambda a, b: -(a.double() @ b.double()).item(),
}


@pytest.mark.parametrize("few", [0, 16])
@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("similarity", list(KEYS))
@pytest.mark.parametrize("refs", [False, True])
def test_retrieval(refs, similarity, k, few, monkeypatch):
    monkeypatch.setattr(ranks, "FEW", few)
    monkeypatch.setattr(evaluation, "_QUERIES", 13)
    call = data(refs)
    found = retrieval(*call, at=(1, 5), k=k, similarity=similarity)
    for i in range(40):
        hits = neighbours(*call, i, KEYS[similarity])
        r = sum(hits)
        assert found.matches[i] == r
        if r == 0:
            assert all(math.isnan(v[i]) for v in (found.recall[5], found.average_precision, found.r_precision))
            continue
        top = hits if k is None else hits[:k]
        depth = r if k is None else min(r, k)
        precision = [sum(hits[: m + 1]) / (m + 1) for m in range(len(hits))]
        assert found.recall[1][i] == hits[0] and found.recall[5][i] == any(hits[:5])
        assert math.isclose(found.precision[5][i], sum(hits[:5]) / 5)
        total = sum(p for p, h in zip(precision, top, strict=False) if h)
        assert math.isclose(found.average_precision[i], total / r, rel_tol=1e-6)
        at_r = sum(p for p, h in zip(precision[:depth], hits, strict=False) if h) / r
        assert math.isclose(found.average_precision_at_r[i], at_r, rel_tol=1e-6, abs_tol=1e-12)
        assert math.isclose(found.r_precision[i], sum(hits[:depth]) / depth)
        assert math.isclose(found.reciprocal_rank[i], 1 / (top.index(True) + 1) if any(top) else 0.0)


def test_ties_rank_in_the_order_of_the_references(monkeypatch):
    x = torch.zeros(6, 2)
    labels = torch.tensor([1, 0, 0, 1, 1, 0])
    for few in (0, 16):
        monkeypatch.setattr(ranks, "FEW", few)
        found = retrieval(x, labels)
        # Query 0 meets 1, 2, 3, 4, 5 in this order; its matches 3 and 4 are third and fourth.
        assert math.isclose(found.average_precision[0], (1 / 3 + 2 / 4) / 2, rel_tol=1e-6)
        assert found.precision[1].tolist() == [0, 0, 0, 1, 1, 0]


CALCULATORS = [
    {},
    {"k": 3},
    {"k": "max_bin_count"},
    {"avg_of_avgs": True},
    {"return_per_class": True},
    {"include": ("precision_at_1", "r_precision")},
]


@pytest.mark.parametrize("options", CALCULATORS)
@pytest.mark.parametrize("mode", ["own", "references", "included"])
def test_calculator_like_the_peer(mode, options):
    pytest.importorskip("pytorch_metric_learning")
    cluster = pytest.importorskip("sklearn.cluster")
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator as Peer
    from pytorch_metric_learning.utils.inference import CustomKNN

    x, labels, y, refs = data(mode == "references")
    if mode == "included":
        more = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
        y, refs = torch.cat([x, more]), torch.cat([labels, torch.arange(9)])
    if mode == "references" and options.get("return_per_class"):
        pytest.skip("the peer lists lonely classes there, with NaN")
    kmeans = lambda v, n: torch.from_numpy(  # noqa: E731
        cluster.KMeans(n, n_init=1, random_state=0).fit_predict(torch.as_tensor(v).numpy())
    )
    common = {"device": torch.device("cpu"), "kmeans_func": kmeans, **options}
    knn = CustomKNN(LpDistance(normalize_embeddings=False))
    call = (x, labels, y, refs, mode == "included")
    want = Peer(knn_func=knn, **common).get_accuracy(*call)
    got = AccuracyCalculator(**common).get_accuracy(*call)
    assert set(got) == set(want)
    for name, value in got.items():
        assert value == pytest.approx(want[name], rel=1e-5, nan_ok=True), name


def test_verification():
    x, labels, _, _ = data(False)
    s = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T
    same = labels[:, None] == labels[None, :]
    off = ~torch.eye(40, dtype=torch.bool)
    positives, negatives = s[same & off], s[~same]
    for similarity in (Similarity.DOT, Similarity.EUCLIDEAN):
        found = true_accept_rates(x, labels, far=(0.01, 0.1, 1.0), similarity=similarity)
        for m, far in enumerate((0.01, 0.1, 1.0)):
            n = int(far * len(negatives))
            limit = negatives.sort(descending=True).values[n].item() if n < len(negatives) else -math.inf
            want = (positives > limit + 1e-6).double().mean()  # the two ends of a pair are rounded apart
            assert abs(found.true_accept_rate[m] - want) < 2e-2
            assert found.false_accept_rate[m] <= far + 1e-9 and found.false_accept_rate[m] >= far - 3 / len(negatives)
    curve = roc(x, labels, points=512)
    area = -torch.trapezoid(curve.true_accept_rate, curve.false_accept_rate)
    want = (positives[:, None] > negatives[None, :]).double().mean()
    assert abs(area - want) < 2e-3
    other = roc(x, labels, points=512, similarity=Similarity.EUCLIDEAN)
    assert abs(torch.trapezoid(other.true_accept_rate, other.false_accept_rate) - want) < 2e-3


def test_bad_calls():
    x, labels, y, refs = data(True)
    for call, message in (
        (lambda: AccuracyCalculator(include=("recall",)), "include must hold names"),
        (lambda: AccuracyCalculator(k=0), "k must be at least 1; got 0"),
        (lambda: AccuracyCalculator(avg_of_avgs=True, return_per_class=True), "mutually exclusive"),
        (lambda: AccuracyCalculator(label_comparison_fn=torch.eq), "label_comparison_fn must be None"),
        (lambda: retrieval(x, labels, y), "reference_labels must be given"),
        (lambda: retrieval(x, labels, y, refs, at=(0,)), r"at\[0\] must be at least 1; got 0"),
        (lambda: retrieval(x, labels, y, refs, ref_includes_query=True), "must begin with"),
        (lambda: true_accept_rates(x, labels, far=[0.0]), r"far\[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="include must be a tuple"):
        AccuracyCalculator(include="NMI")


def test_the_bar_shows(capsys):
    pytest.importorskip("tqdm")
    x, labels, _, _ = data(False)
    retrieval(x, labels, progress=True)
    assert "retrieval" in capsys.readouterr().err
