"""Pictures of embeddings and losses: similarities of positives and negatives, also over training, and pair weights.

Draws with matplotlib, which is imported on first use (`pip install flashpair[plot]`). Every function draws into `ax`,
or into a new figure, and returns the axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import use_backend
from .losses.ranks import row_histogram
from .losses.statistics import Moments, PairStatistics
from .rows import RowPanel, row_reduce
from .terms import Mask

_COLORS = {"positive": "tab:blue", "negative": "tab:red"}


def _axes(ax, count: int = 0):
    """The given axes, or new ones; `count`: so many side by side."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("flashpair.plot needs matplotlib: pip install matplotlib") from error
    if count:
        return list(pyplot.subplots(1, count, figsize=(4 * count, 3.5), squeeze=False)[1][0])
    return pyplot.subplots(figsize=(6, 4))[1]


class SimilarityHistogram(NamedTuple):
    """Densities of the similarities of positive and of negative pairs."""

    centers: Tensor  # (bins + 1,)
    positive: Tensor  # (bins + 1,)
    negative: Tensor  # (bins + 1,)


def similarity_histogram(x: Tensor, labels: Tensor, bins: int = 100) -> SimilarityHistogram:
    """Densities of the cosines of all positive and all negative pairs, from one pass that stores none.

    Args:
        x: (B, D). labels: (B,) int64. bins: intervals of [-1, 1].

    Example:
        >>> import torch
        >>> from flashpair.plot import similarity_histogram
        >>> found = similarity_histogram(torch.eye(4), torch.tensor([0, 0, 1, 1]), bins=4)
        >>> found.positive.tolist()  # all cosines are 0
        [0.0, 0.0, 2.0, 0.0, 0.0]
    """
    checks.embeddings("x", x)
    checks.labels("labels", labels, x.shape[0])
    checks.count("bins", bins)

    def formula(panel: RowPanel) -> list[Tensor]:
        masks = Mask.SAME, Mask.DIFFERENT
        return [row_histogram(panel, m, -1.0, 1.0, bins).sum(0).double() for m in masks]

    with torch.no_grad():
        counts = row_reduce(x, None, formula, labels=labels, normalize=True, totals=2)
    width = 2 / bins
    densities = (c / c.sum().clamp_min(1) / width for c in counts)
    return SimilarityHistogram(torch.linspace(-1, 1, bins + 1), *(d.cpu() for d in densities))


def plot_similarities(x: Tensor, labels: Tensor, bins: int = 100, ax=None):
    """The densities of `similarity_histogram`, positives and negatives over each other."""
    found, ax = similarity_histogram(x, labels, bins), _axes(ax)
    for name in ("positive", "negative"):
        density = getattr(found, name)
        ax.fill_between(found.centers, density, alpha=0.4, color=_COLORS[name], label=name)
        ax.plot(found.centers, density, color=_COLORS[name], linewidth=1)
    ax.set(xlabel="cosine", ylabel="density", title="similarities")
    ax.legend()
    return ax


def _summary(found: Moments) -> tuple[float, float]:
    """Mean and standard deviation over the pairs of all rows."""
    count = found.count.double()
    total = count.sum().clamp_min(1)
    mean = (count * found.mean.double()).sum() / total
    variance = (count * (found.variance.double() + (found.mean.double() - mean) ** 2)).sum() / total
    return mean.item(), variance.sqrt().item()


class SimilarityHistory:
    """Mean and spread of positive and negative similarities, step by step, from statistics that losses give for free.

    Example:
        >>> import torch
        >>> from flashpair.losses import MultiSimilarityLoss
        >>> from flashpair.plot import SimilarityHistory
        >>> history = SimilarityHistory()
        >>> loss, stats = MultiSimilarityLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1]), return_stats=True)
        >>> history.append(0, stats)
        >>> history.rows
        [(0, 0.0, 0.0, 0.0, 0.0)]
    """

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float, float, float]] = []

    def append(self, step: float, stats: PairStatistics) -> None:
        """Add what a loss returned with `return_stats=True`; reads four numbers from the device."""
        self.rows.append((step, *_summary(stats.positive), *_summary(stats.negative)))

    def plot(self, ax=None):
        """Means as lines, one standard deviation on both sides as bands."""
        ax = _axes(ax)
        table = torch.tensor(self.rows, dtype=torch.float64).reshape(-1, 5)
        for k, name in ((1, "positive"), (3, "negative")):
            step, mean, spread = table[:, 0], table[:, k], table[:, k + 1]
            ax.plot(step, mean, color=_COLORS[name], label=name)
            ax.fill_between(step, mean - spread, mean + spread, color=_COLORS[name], alpha=0.2, linewidth=0)
        ax.set(xlabel="step", ylabel="similarity", title="similarities over training")
        ax.legend()
        return ax


class PairWeights(NamedTuple):
    """The weight |∂loss/∂s| that a loss puts on each pair of a batch."""

    similarity: Tensor  # (P,)
    weight: Tensor  # (P,)
    positive: Tensor  # (P,) bool


def pair_weights(
    loss: Callable[..., Tensor],
    x: Tensor,
    labels: Tensor,
    indices_tuple=None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> PairWeights:
    """The weights of a batch's pairs under any loss that is a function of similarities.

    Dense, on the reference backend: for batches that one draws, not for those one trains with.

    Args:
        loss: called as `loss(x, labels, indices_tuple, ref_emb, ref_labels)`.
        x: (B, D). labels: (B,) int64. indices_tuple, ref_emb, ref_labels: passed on.

    Raises:
        ValueError: if the loss never compares all rows with all columns.

    Example:
        >>> import torch
        >>> from flashpair.losses import ContrastiveLoss, CosineSimilarity, SumReducer
        >>> from flashpair.plot import pair_weights
        >>> loss = ContrastiveLoss(1, 0.5, distance=CosineSimilarity(), reducer=SumReducer())
        >>> pair_weights(loss, torch.eye(4), torch.tensor([0, 0, 1, 1])).weight.tolist()  # positives weigh 1
        [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    """
    x = x.detach().requires_grad_()
    with use_backend("reference"), reference.recorded_similarities() as found, torch.enable_grad():
        value = loss(x, labels, indices_tuple, ref_emb, ref_labels)
        value.backward()
    columns = labels if ref_labels is None else ref_labels
    shape = (len(labels), len(columns))
    found = [s for s in found if s.shape == shape and s.grad is not None]
    if not found:
        raise ValueError(f"loss must compare all rows with all columns; {type(loss).__name__} does not")
    weight = sum(s.grad for s in found).abs()
    same = labels[:, None] == columns[None, :]
    keep = torch.ones_like(same)
    if ref_emb is None:
        keep.fill_diagonal_(False)
    return PairWeights(found[0].detach()[keep].cpu(), weight[keep].cpu(), same[keep].cpu())


def plot_pair_weights(losses: Mapping[str, Callable[..., Tensor]], x: Tensor, labels: Tensor, axes=None):
    """Weight against similarity, one panel a loss: how general pair weighting looks at it.

    Args:
        losses: name → loss. axes: as many axes as losses. Default: a new figure.
        x: (B, D). labels: (B,) int64.

    Returns:
        The list of axes.
    """
    if axes is None:
        axes = _axes(None, len(losses))
    for ax, (name, loss) in zip(axes, losses.items(), strict=True):
        found = pair_weights(loss, x, labels)
        for sign, kept in (("positive", found.positive), ("negative", ~found.positive)):
            some = kept & (found.weight > 0)
            ax.scatter(found.similarity[some], found.weight[some], s=4, color=_COLORS[sign], label=sign, linewidths=0)
        ax.set(xlabel="similarity", ylabel="pair weight", title=name)
        ax.legend()
    return list(axes)


def plot_embeddings(x: Tensor, labels: Tensor, method: str = "auto", seed: int = 0, ax=None):
    """Embeddings on a plane, coloured by label.

    Args:
        x: (B, D). labels: (B,) int64.
        method: "umap" (needs umap-learn), "tsne" (needs scikit-learn), or "auto": UMAP where it is installed.
        seed: of the projection.

    Raises:
        ValueError: on another method. ImportError: where the library is missing.
    """
    if method not in ("auto", "umap", "tsne"):
        raise ValueError(f'method must be "auto", "umap" or "tsne"; got {method!r}')
    points = x.detach().float().cpu().numpy()
    plane = None
    if method in ("auto", "umap"):
        try:
            import umap

            plane, method = umap.UMAP(random_state=seed).fit_transform(points), "umap"
        except ImportError:
            if method == "umap":
                raise ImportError("method 'umap' needs umap-learn: pip install umap-learn") from None
    if plane is None:
        try:
            from sklearn.manifold import TSNE
        except ImportError as error:
            raise ImportError("method 'tsne' needs scikit-learn: pip install scikit-learn") from error
        perplexity = max(min(30.0, (len(points) - 1) / 3), 1.0)
        plane, method = TSNE(random_state=seed, perplexity=perplexity).fit_transform(points), "tsne"
    ax = _axes(ax)
    ax.scatter(plane[:, 0], plane[:, 1], c=labels.cpu(), cmap="tab20", s=6, linewidths=0)
    ax.set(title={"umap": "UMAP", "tsne": "t-SNE"}[method], xticks=[], yticks=[])
    return ax


__all__ = [
    "PairWeights",
    "SimilarityHistogram",
    "SimilarityHistory",
    "pair_weights",
    "plot_embeddings",
    "plot_pair_weights",
    "plot_similarities",
    "similarity_histogram",
]
