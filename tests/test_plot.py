"""Pictures: what is drawn is what was counted."""

import pytest
import torch
from loss_cases import batch

from flashpair import losses, plot

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def test_histogram_is_a_density_of_the_cosines():
    data = batch("random", False, b=60)
    found = plot.similarity_histogram(data.x, data.labels, bins=20)
    x = torch.nn.functional.normalize(data.x)
    s, same = x @ x.T, data.labels[:, None] == data.labels[None, :]
    off = ~torch.eye(60, dtype=torch.bool)
    for density, kept in ((found.positive, same & off), (found.negative, ~same)):
        assert torch.isclose(density.sum() * 0.1, torch.tensor(1.0, dtype=torch.float64))
        mean = (density * found.centers.double()).sum() * 0.1  # linear weights keep the mean
        assert torch.isclose(mean, s[kept].mean().double(), atol=1e-6)
    ax = plot.plot_similarities(data.x, data.labels)
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"positive", "negative"}


def test_history():
    data = batch("random", False)
    history = plot.SimilarityHistory()
    for step in range(3):
        _, stats = losses.SupConLoss()(data.x * (step + 1), data.labels, return_stats=True)
        history.append(step, stats)
    x = torch.nn.functional.normalize(data.x)
    s = (x @ x.T)[(data.labels[:, None] == data.labels[None, :]) & ~torch.eye(11, dtype=torch.bool)]
    row = torch.tensor(history.rows[0][1:3], dtype=torch.float64)
    torch.testing.assert_close(row, torch.stack([s.mean(), s.std(correction=0)]), rtol=1e-6, atol=1e-9)
    assert len(history.plot().lines) == 2


@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "NTXentLoss", "GeneralPairWeightingLoss", "PNPLoss"])
def test_pair_weights_are_the_gradient(name):
    """dX = (G + Gᵀ) X for unit rows, less its part along them; G is negative on positives."""
    data = batch("random", False)
    options = [lambda s, mask: 2 + s, lambda s, mask: 2 - s] if name == "GeneralPairWeightingLoss" else []
    loss = getattr(losses, name)(*options)
    x = torch.nn.functional.normalize(data.x).requires_grad_()
    found = plot.pair_weights(loss, x, data.labels)
    g = torch.zeros(11, 11, dtype=torch.float64)
    g[~torch.eye(11, dtype=torch.bool)] = torch.where(found.positive, -found.weight, found.weight)
    along = ((g + g.T) @ x).detach()
    (grad,) = torch.autograd.grad(loss(x, data.labels), x)
    want = along - (along * x).sum(1, keepdim=True) * x
    torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-11)


def test_pair_weights_of_multi_similarity():
    """The closed form of the paper."""
    data = batch("random", False)
    found = plot.pair_weights(losses.MultiSimilarityLoss(), data.x, data.labels)
    x = torch.nn.functional.normalize(data.x)
    s = x @ x.T
    same = data.labels[:, None] == data.labels[None, :]
    off = ~torch.eye(11, dtype=torch.bool)
    want = torch.zeros_like(s)
    for slope, kept in ((-2.0, same & off), (50.0, ~same)):
        e = torch.where(kept, torch.exp(slope * (s - 0.5)), 0.0)
        want += e / (1 + e.sum(1, keepdim=True)) / 11
    torch.testing.assert_close(found.weight, want[off], rtol=1e-9, atol=1e-12)


def test_pictures():
    data = batch("random", False, b=40)
    both = {"multi-similarity": losses.MultiSimilarityLoss(), "contrastive": losses.ContrastiveLoss()}
    assert len(plot.plot_pair_weights(both, data.x, data.labels)) == 2
    pytest.importorskip("sklearn")
    assert plot.plot_embeddings(data.x, data.labels, method="tsne").get_title() == "t-SNE"


def test_bad_calls():
    data = batch("random", False)
    with pytest.raises(ValueError, match="method must be"):
        plot.plot_embeddings(data.x, data.labels, method="pca")
    with pytest.raises(ValueError, match="bins must be"):
        plot.similarity_histogram(data.x, data.labels, bins=0)
    with pytest.raises(ValueError, match="compare all rows with all columns"):
        plot.pair_weights(lambda *call: call[0].sum(), data.x, data.labels)
