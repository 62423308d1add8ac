"""SoftTriple: several centres a class, of which a softmax picks."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..losses.geometry import geometry_of
from ..losses.peer import CosineSimilarity
from ..losses.reducers import reduce_values, reducer_rule
from ..request import statistics_dtype
from ..terms import Reduction, Similarity
from .proxies import ProxyLoss
from .streaming import streamed


def relaxed_centers(la: float, gamma: float, normalize: bool, rows, columns, shared, block):
    """(logsumexp over the other classes, relaxed similarity with the own class) of a block; see `SoftTripleLoss`."""
    x, own = rows
    (centers,) = columns
    units = F.normalize(centers, dim=2) if normalize else centers
    similarity = (x @ units.flatten(0, 1).T).unflatten(1, centers.shape[:2])
    relaxed = ((similarity / gamma).softmax(2) * similarity).sum(2)
    mine = own[:, None] == torch.arange(block.start, block.start + centers.shape[0], device=own.device)
    # A finite floor: a block may hold nothing but the own class.
    rivals = (la * relaxed).masked_fill(mine, torch.finfo(x.dtype).min / 2).logsumexp(1)
    return rivals, torch.where(mine, relaxed, 0.0).sum(1)


class SoftTripleLoss(ProxyLoss):
    """Softmax over classes of a relaxed similarity with K centres each.

        s_ij = Σ_k softmax_k(<x_i, w_jk> / γ) <x_i, w_jk>
        l_i  = -log e^{λ (s_iy - δ)} / (e^{λ (s_iy - δ)} + Σ_{j≠y} e^{λ s_ij})

    pytorch-metric-learning's class: constructor, call and parameter `fc` (D, C K), the centres of a class together;
    like it, without the paper's regulariser that merges centres. A softmax within classes is not a pass of the engine:
    dense code on blocks of classes in bounded memory (see `streamed`), at the speed of dense code.

    Args:
        num_classes, embedding_size: C, D.
        centers_per_class: K. Default 10.
        la: λ > 0. Default 20.
        gamma: γ > 0. Default 0.1.
        margin: δ. Default 0.01.
        **kwargs: see `ProxyLoss` and `MetricLoss`. Default distance: CosineSimilarity; a similarity is needed.

    Raises:
        TypeError, ValueError: on a bad argument, naming it.

    Source: Qian et al., "SoftTriple Loss: Deep Metric Learning Without Triplet Sampling", ICCV 2019, equation 8.

    Example:
        >>> import torch
        >>> from flashpair.heads import SoftTripleLoss
        >>> SoftTripleLoss(num_classes=10, embedding_size=4)(torch.randn(3, 4), torch.arange(3)).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        centers_per_class: int = 10,
        la: float = 20,
        gamma: float = 0.1,
        margin: float = 0.01,
        **kwargs,
    ) -> None:
        checks.count("centers_per_class", centers_per_class)
        checks.number("la", la, low=0.0, open_low=True)
        checks.number("gamma", gamma, low=0.0, open_low=True)
        checks.number("margin", margin)
        super().__init__(num_classes, embedding_size, **kwargs)
        if geometry_of(self.distance).similarity != Similarity.DOT:
            raise ValueError(f"distance must be a similarity; got {type(self.distance).__name__}")
        self.centers_per_class, self.la, self.margin = centers_per_class, la, margin
        self.gamma = 1.0 / gamma  # as the peer's attribute
        self.fc = nn.Parameter(torch.empty(embedding_size, num_classes * centers_per_class))
        self.weight_init_func(self.fc)

    def get_default_distance(self):
        return CosineSimilarity()

    def get_default_weight_init_func(self):
        return functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5))

    def by_class(self) -> Tensor:
        return self.fc.T

    def of_rows(self, x: Tensor, proxies: Tensor, labels: Tensor, indices_tuple) -> Tensor:
        geometry, dtype = geometry_of(self.distance), statistics_dtype(x)
        rows = F.normalize(x.to(dtype), dim=1) if geometry.normalize else x.to(dtype)
        centers = proxies.to(dtype).unflatten(0, (self.num_classes, self.centers_per_class))
        formula = functools.partial(relaxed_centers, self.la, 1 / self.gamma, geometry.normalize)
        rivals, own = streamed(
            formula, [rows, labels], [centers], [Reduction.LOGSUMEXP, Reduction.SUM],
            per_class=3 * self.centers_per_class,
        )  # fmt: skip
        losses = F.softplus(rivals - self.la * (own - self.margin), threshold=40)
        return reduce_values(
            losses * self.weights_of(indices_tuple, labels, x), reducer_rule(self.reducer), labels=labels
        )
