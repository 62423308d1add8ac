"""ProtoNCE: each sample against the centroids of clusterings, each of which has a temperature of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import Sharded, by_row, current
from ...pairs import pair_similarity, segment_sum
from ...primitives import pair_reduce
from ...random import draw_seed, uniform
from ...request import statistics_dtype
from ...terms import Reduction, Similarity, Term
from ..arguments import poisoned
from ..closed_form import total_at_once
from ..group import InGroup
from ..two_views import nothing
from .meow import named_clusterings

#: Of the mean: clusters of equal embeddings have density 0, where PCL divides by it.
_LEAST = 0.01


class ProtoNCELoss(InGroup, nn.Module):
    """Cross-entropy of each sample's own centroid, averaged over clusterings.

        loss = 1/M Σ_m mean_i [ LSE_c <z_i, u_c> / φ_c  -  <z_i, u_k> / φ_k ],   k the cluster of i in clustering m

    z and u unit vectors, φ from `cluster_concentration`. Centroids and φ take no gradient. One pass a clustering. The c
    are all centroids; or, as PCL has it, those of the batch's samples, one for each sample, and some of the others,
    drawn in each call by torch's generator. `MEOWLoss` plus this loss of its anchors is MEOW's; its code adds the
    constant log(B / K).

    Args:
        negatives: how many centroids of no sample of the batch are drawn; all where there are fewer, where PCL's code
            raises. Default: none are drawn, the c are all centroids.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`; centroids and φ are held by
            all ranks alike. Default: none.

    Source: Li et al., "Prototypical Contrastive Learning of Unsupervised Representations", ICLR 2021, equation 11
    without its instance term; salesforce/PCL, pcl/builder.py; jianxiangyu/MEOW, module/contrast.py. The number of the
    equation is from memory.

    Example:
        >>> import torch
        >>> from flashpair.losses import ProtoNCELoss
        >>> z, clusters = torch.eye(3), torch.tensor([[0, 1, 1]])
        >>> loss = ProtoNCELoss()(z, clusters, [torch.eye(3)[:2]], [torch.ones(2)])
        >>> round(float(loss), 4)  # (2 log(e + 1) - 2 + log 2) / 3
        0.4399
    """

    row_groups = None

    def __init__(self, negatives: int | None = None, group=None) -> None:
        super().__init__(group=group)
        if negatives is not None:
            checks.count("negatives", negatives, low=0)
        self.negatives = negatives

    def forward(
        self, embeddings: Tensor, clusters: Tensor, centroids: Sequence[Tensor], concentrations: Sequence[Tensor]
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (B, D) float32, float64, bfloat16 or float16; normalised here.
            clusters: (M, B) int64, the cluster of each sample in each of M ≥ 1 clusterings.
            centroids: M tensors (K_m, D), K_m ≥ 1, of any floating-point dtype; normalised here.
            concentrations: M tensors (K_m,), φ > 0 of each centroid (whose values are not read).

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument; on a cluster that has no centroid (on a GPU an
                assertion of the device).
        """
        if self.group is not None and current() is None:

            def run(embeddings: Tensor, **clusters: Tensor) -> Tensor:
                return self.forward(embeddings, torch.stack(list(clusters.values())), centroids, concentrations)

            return self.over_group(run, lambda: {"embeddings": embeddings, **named_clusterings(clusters)})
        checks.embeddings("embeddings", embeddings)
        named_clusterings(clusters)
        rows = embeddings.shape[0]
        if clusters.shape[1] != rows:
            raise ValueError(f"clusters must have shape (clusterings, {rows}); got {tuple(clusters.shape)}")
        checks.same_device("embeddings", embeddings, clusters=clusters)
        centroids, concentrations = list(centroids), list(concentrations)
        if not len(centroids) == len(concentrations) == len(clusters):
            raise ValueError(
                f"centroids and concentrations must hold one tensor for each of the {len(clusters)} clusterings; got "
                f"{len(centroids)} and {len(concentrations)}"
            )
        for m, (u, phi) in enumerate(zip(centroids, concentrations, strict=True)):
            _check_centroids(f"centroids[{m}]", u, embeddings)
            _check_concentration(f"concentrations[{m}]", phi, u)
            _in_range(f"clusters[{m}]", clusters[m], len(u))
        if rows == 0:
            return nothing(embeddings)
        dtype, index = statistics_dtype(embeddings), torch.arange(rows, device=embeddings.device)
        z = by_row(lambda v: F.normalize(v.to(dtype), dim=1, eps=1e-12), embeddings)
        total, own = 0.0, 0.0  # own: (B, D) sum of a sample's centroids
        seed = 0 if self.negatives is None else draw_seed()
        for m, (of, u, phi) in enumerate(zip(clusters.unbind(0), centroids, concentrations, strict=True)):
            scaled = F.normalize(u.detach().to(dtype), dim=1, eps=1e-12) / phi.detach().to(dtype)[:, None]
            of_rows = scaled.index_select(0, of)
            own, columns, weight = own + of_rows, scaled, None
            if self.negatives is not None:
                others, counts = draw_others(seed, m, of, len(u), self.negatives)
                columns, weight = torch.cat([of_rows, scaled[others]]), F.pad(counts.to(dtype), (rows, 0), value=1.0)
            terms = [Term(Reduction.LOGSUMEXP, weight=weight)]
            total = total + total_at_once(lambda z: pair_reduce(z, columns, terms)[0].sum(), z)  # noqa: B023
        # Rows that are aligned need no gathering, which takes as long as a pass; those of all ranks do.
        attraction = pair_similarity(z, own, index, index) if isinstance(z, Sharded) else z * own
        total = total - attraction.sum()
        return poisoned(total / (rows * len(clusters)), embeddings, *centroids)


def draw_others(seed: int, clustering: int, of: Tensor, count: int, wanted: int) -> tuple[Tensor, Tensor]:
    """((r,) centroids, (r,) bool) drawn among those that no sample has; False: there were not so many."""
    each = torch.arange(count, device=of.device)
    keys = uniform(seed, torch.full_like(each, clustering), each).index_fill(0, of, torch.inf)
    drawn = keys.topk(min(wanted, count), largest=False)
    return drawn.indices, drawn.values != torch.inf


@torch.no_grad()
def cluster_concentration(
    embeddings: Tensor, centroids: Tensor, clusters: Tensor, temperature: float = 0.2, smoothing: float = 10.0
) -> Tensor:
    """φ of each cluster, its temperature in `ProtoNCELoss`: small where many embeddings lie near their centroid.

        d_c = mean_{i in c} ||v_i - u_c|| / log(n_c + α),   d_c of a cluster of at most one embedding: the largest one
        φ_c = T · clip(d)_c / mean(clip(d)),                 clip to the 10th and the 90th percentile

    At least T / 100, and T where all d are 0: there PCL divides by 0.

    Args:
        embeddings: (N, D) v, of all that was clustered, used as they come.
        centroids: (K, D) u of the same dtype, K ≥ 1, as they came from k-means.
        clusters: (N,) int64, of each embedding.
        temperature: T > 0. Default 0.2.
        smoothing: α > 1. Default 10; MEOW's code has 5.

    Returns:
        (K,) float32 (float64 for float64), without gradient.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Li et al., "Prototypical Contrastive Learning of Unsupervised Representations", ICLR 2021, section 3.3;
    salesforce/PCL, main_pcl.py, run_kmeans. MEOW's copy takes inner products for the distances, which is not repeated.

    Example:
        >>> import torch
        >>> from flashpair.losses import cluster_concentration
        >>> v, u = torch.tensor([[0.0], [2.0], [9.0], [9.2]]), torch.tensor([[1.0], [9.1]])
        >>> phi = cluster_concentration(v, u, torch.tensor([0, 0, 1, 1]))
        >>> bool(phi[0] > phi[1]), round(float(phi.mean()), 4)
        (True, 0.2)
    """
    checks.embedding_pair(embeddings, centroids, ("embeddings", "centroids"))
    checks.labels("clusters", clusters, embeddings.shape[0])
    checks.same_device("embeddings", embeddings, clusters=clusters)
    checks.number("temperature", temperature, low=0.0, open_low=True)
    checks.number("smoothing", smoothing, low=1.0, open_low=True)
    if centroids.shape[0] == 0:
        raise ValueError(f"centroids must have at least one row; got shape {tuple(centroids.shape)}")
    _in_range("clusters", clusters, len(centroids))
    index = torch.arange(len(clusters), device=clusters.device)
    far = pair_similarity(embeddings, centroids, index, clusters, similarity=Similarity.EUCLIDEAN)
    size = segment_sum(torch.ones_like(far), clusters, len(centroids))
    density = segment_sum(far, clusters, len(centroids)) / size.clamp_min(1) / torch.log(size + smoothing)
    several = size > 1
    density = torch.where(several, density, torch.where(several, density, 0.0).amax())
    low, high = density.quantile(density.new_tensor([0.1, 0.9]))
    density = density.clamp(low, high)
    mean = density.mean()
    phi = torch.where(mean == 0, temperature, temperature * density / torch.where(mean == 0, 1.0, mean))
    return phi.clamp_min(_LEAST * temperature)


def _check_centroids(name: str, value: Tensor, embeddings: Tensor) -> None:
    checks.embeddings(name, value)
    checks.same_device("embeddings", embeddings, **{name: value})
    if value.shape[0] == 0 or value.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"{name} must have shape (centroids, {embeddings.shape[1]}) with at least one; got {tuple(value.shape)}"
        )


def _check_concentration(name: str, value: Tensor, centroids: Tensor) -> None:
    checks.floating(name, value)
    if tuple(value.shape) != (len(centroids),):
        raise ValueError(f"{name} must have shape ({len(centroids)},), one per centroid; got {tuple(value.shape)}")
    checks.same_device("the centroids", centroids, **{name: value})


def _in_range(name: str, clusters: Tensor, count: int) -> None:
    if clusters.numel() == 0 or torch.compiler.is_compiling():
        return
    allowed = (clusters >= 0) & (clusters < count)
    if clusters.device.type != "cpu":
        torch._assert_async(allowed.all())
    elif not bool(allowed.all()):
        raise ValueError(f"{name} must be in [0, {count}), one of the centroids; got {int(clusters[~allowed][0])}")
