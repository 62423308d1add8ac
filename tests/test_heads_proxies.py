"""Proxy losses against loops from their definitions and against pytorch-metric-learning."""

# ruff: noqa: F811

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from head_cases import D64, backend, check  # noqa: F401

import flashpair
from flashpair import heads, miners

peer = pytest.importorskip("pytorch_metric_learning.losses")
distances, peer_miners, reducers, regularizers = (
    pytest.importorskip(f"pytorch_metric_learning.{name}")
    for name in ("distances", "miners", "reducers", "regularizers")
)

ROWS, FEATURES, CLASSES = 8, 5, 6
NAMES = ["NormalizedSoftmaxLoss", "ProxyNCALoss", "ProxyAnchorLoss", "SoftTripleLoss"]


def batch(kind="random"):
    g = torch.Generator().manual_seed(8)
    x = 2 * torch.randn(ROWS, FEATURES, dtype=D64, generator=g)
    labels = torch.randint(0, CLASSES - 1, (ROWS,), generator=g)  # the last class is absent
    if kind == "one class":
        labels.fill_(2)
    if kind == "duplicates":
        x[1], labels[1] = x[0], labels[0]
    return x.requires_grad_(), labels


def twins(name, **options):
    """Our loss and the peer's with the same proxies."""
    ours, theirs = (getattr(module, name)(CLASSES, FEATURES, **options).double() for module in (heads, peer))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def like_the_peer(name, kind="random", indices=None, **options):
    ours, theirs = twins(name, **options)
    x, labels = batch(kind)
    found, expected = ours(x, labels, indices), theirs(x, labels, indices)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (p,), (q,) = list(ours.parameters()), list(theirs.parameters())
    for a, b in zip(torch.autograd.grad(found, (x, p)), torch.autograd.grad(expected, (x, q)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["random", "one class", "duplicates"])
@pytest.mark.parametrize("name", NAMES)
def test_like_the_peer(name, kind, backend):
    like_the_peer(name, kind)


OPTIONS = {
    "NormalizedSoftmaxLoss": [
        {"temperature": 0.5},
        {"distance": distances.DotProductSimilarity(normalize_embeddings=False)},
    ],
    "ProxyNCALoss": [
        {"softmax_scale": 3},
        {"distance": distances.CosineSimilarity()},
        {"distance": distances.LpDistance(power=1)},
        {"distance": distances.LpDistance(normalize_embeddings=False, power=2)},
    ],
    "ProxyAnchorLoss": [
        {"margin": 0.3, "alpha": 8},
        {"distance": distances.LpDistance(power=2)},
        {"reducer": reducers.MeanReducer()},
    ],
    "SoftTripleLoss": [{"centers_per_class": 3, "la": 5, "gamma": 0.5, "margin": 0.2}, {"centers_per_class": 1}],
}


@pytest.mark.parametrize(("name", "options"), [(name, o) for name, many in OPTIONS.items() for o in many])
def test_options_like_the_peer(name, options, backend):
    like_the_peer(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_sum_and_regularizers_like_the_peer(name):
    if name != "ProxyAnchorLoss":
        like_the_peer(name, reducer=reducers.SumReducer())
        like_the_peer(name, reducer=reducers.ThresholdReducer(low=0.5))
    like_the_peer(name, weight_regularizer=regularizers.LpRegularizer(), weight_reg_weight=0.3)
    like_the_peer(name, embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["pairs", "triplets", "mined", "ours"])
def test_row_weights_of_miners_like_the_peer(name, kind):
    x, labels = batch()
    if kind == "pairs":
        indices = tuple(torch.tensor(v) for v in ([0, 0, 3], [1, 2, 4], [0, 5], [6, 6]))
    elif kind == "triplets":
        indices = tuple(torch.tensor(v) for v in ([0, 0, 3], [1, 2, 4], [5, 6, 6]))
    elif kind == "mined":
        indices = peer_miners.MultiSimilarityMiner()(x, labels)
    else:
        lazy = miners.MultiSimilarityMiner()(x, labels)
        ours, _ = twins(name)
        torch.testing.assert_close(ours(x, labels, lazy), ours(x, labels, lazy.as_tuple()))
        return
    like_the_peer(name, indices=indices)


# --- definitions ------------------------------------------------------------------------------------------------------


def cosine(a, b):
    return a @ b / a.norm() / b.norm()


def test_normalized_softmax_by_definition(backend):
    x, labels = batch()
    loss = heads.NormalizedSoftmaxLoss(CLASSES, FEATURES, temperature=0.3).double()
    total = 0.0
    for i in range(ROWS):
        z = torch.stack([cosine(x[i], loss.W[:, j]) / 0.3 for j in range(CLASSES)])
        total = total - z.log_softmax(0)[labels[i]]
    check(loss(x, labels), total / ROWS, (x, loss.W))


def test_proxy_nca_by_definition(backend):
    x, labels = batch()
    loss = heads.ProxyNCALoss(CLASSES, FEATURES, softmax_scale=2.0).double()
    total = 0.0
    for i in range(ROWS):
        z = torch.stack([-2.0 * ((F.normalize(x[i], dim=0) - F.normalize(p, dim=0)) ** 2).sum() for p in loss.proxies])
        total = total - z.log_softmax(0)[labels[i]]
    check(loss(x, labels), total / ROWS, (x, loss.proxies))


def test_proxy_anchor_by_definition(backend):
    x, labels = batch()
    loss = heads.ProxyAnchorLoss(CLASSES, FEATURES, margin=0.2, alpha=4.0).double()
    pull = push = 0.0
    for j in range(CLASSES):
        positives = [torch.exp(-4 * (cosine(x[i], loss.proxies[j]) - 0.2)) for i in range(ROWS) if labels[i] == j]
        negatives = [torch.exp(4 * (cosine(x[i], loss.proxies[j]) + 0.2)) for i in range(ROWS) if labels[i] != j]
        pull, push = (
            pull + torch.log1p(torch.as_tensor(sum(positives))),
            push + torch.log1p(torch.as_tensor(sum(negatives))),
        )
    check(loss(x, labels), pull / len(labels.unique()) + push / CLASSES, (x, loss.proxies))


def test_soft_triple_by_definition(backend):
    x, labels = batch()
    loss = heads.SoftTripleLoss(CLASSES, FEATURES, centers_per_class=3, la=5.0, gamma=0.4, margin=0.1).double()
    total = 0.0
    for i in range(ROWS):
        z = []
        for j in range(CLASSES):
            s = torch.stack([cosine(x[i], loss.fc[:, 3 * j + k]) for k in range(3)])
            z.append(5.0 * (((s / 0.4).softmax(0) * s).sum() - (0.1 if j == int(labels[i]) else 0.0)))
        total = total - torch.stack(z).log_softmax(0)[labels[i]]
    check(loss(x, labels), total / ROWS, (x, loss.fc))


def test_a_far_row_keeps_its_loss_where_the_peer_drops_it(backend):
    """Its softmax in float32 underflows to 0 and the row leaves the mean."""
    x, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    proxies = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    found = {}
    for module in (heads, peer):
        loss = module.ProxyNCALoss(2, 2, softmax_scale=50)
        loss.proxies.data.copy_(proxies)
        found[module] = float(loss(x, labels))
    assert found[peer] == 0.0
    assert abs(found[heads] - 100.0) < 1e-3


def test_the_peers_wrappers_know_them():
    from pytorch_metric_learning.losses import BaseMetricLossFunction

    for name in NAMES:
        assert isinstance(getattr(heads, name)(3, 2), BaseMetricLossFunction)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_named(name):
    loss, (x, labels) = getattr(heads, name)(CLASSES, FEATURES), batch()
    x = x.detach().float()
    with pytest.raises(ValueError, match="labels must be classes"):
        loss(x, labels + 2)
    with pytest.raises(ValueError, match="labels must be given"):
        loss(x)
    with pytest.raises(ValueError, match="ref_emb and ref_labels must be None"):
        loss(x, labels, ref_emb=x, ref_labels=labels)
    with pytest.raises(ValueError, match="embeddings must have 5 features"):
        loss(x[:, :3], labels)
    with pytest.raises(ValueError, match="reducer must be"):
        getattr(heads, name)(CLASSES, FEATURES, reducer=reducers.DoNothingReducer())
    with pytest.raises(ValueError, match="num_classes"):
        getattr(heads, name)(0, FEATURES)
    with pytest.raises(ValueError, match="reducer must be"):
        flashpair.losses.NTXentLoss(reducer=reducers.DivisorReducer())  # which names no divisor
