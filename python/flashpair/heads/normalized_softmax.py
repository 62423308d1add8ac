"""Normalised softmax and proxy NCA: cross-entropy over similarities with one proxy a class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..losses.geometry import Geometry, geometry_of
from ..losses.peer import DotProductSimilarity, LpDistance
from ..losses.reducers import reduce_values, reducer_rule
from ..pairs import pair_similarity
from ..primitives import pair_reduce
from ..terms import Reduction, Similarity, Term
from .logits import class_logits
from .proxies import ProxyLoss


def proxy_cross_entropy(x: Tensor, proxies: Tensor, labels: Tensor, geometry: Geometry, scale: float) -> Tensor:
    """(B,) -log softmax of scale times similarities (or of minus scale times distances) at the row's own proxy."""
    unit_squares = geometry.similarity == Similarity.SQUARED_EUCLIDEAN and geometry.normalize
    if geometry.similarity == Similarity.DOT or unit_squares:
        # Of unit vectors -d² = 2 cos θ - 2.
        factor = 2 * scale if unit_squares else scale
        return class_logits(x, proxies, labels, scale=factor, normalize=geometry.normalize).cross_entropy
    how = {"similarity": geometry.similarity, "normalize": geometry.normalize}
    (rivals,) = pair_reduce(x, proxies, [Term(Reduction.LOGSUMEXP, scale=-scale)], exclude=labels, **how)
    own = pair_similarity(x, proxies, torch.arange(x.shape[0], device=x.device), labels, **how)
    return F.softplus(rivals + scale * own, threshold=40)


class NormalizedSoftmaxLoss(ProxyLoss):
    """Cross-entropy over cosines with the class weights, divided by a temperature.

        l_i = -log exp(cos(x_i, w_{y_i}) / T) / Σ_j exp(cos(x_i, w_j) / T)

    pytorch-metric-learning's class: constructor, call and parameter `W` (D, C).

    Args:
        num_classes, embedding_size: C, D.
        temperature: T > 0. Default 0.05.
        **kwargs: see `ProxyLoss` and `MetricLoss`. Default distance: DotProductSimilarity (of normalised embeddings).

    Raises:
        TypeError, ValueError: on a bad argument, naming it.

    Source: Zhai, Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.heads import NormalizedSoftmaxLoss
        >>> NormalizedSoftmaxLoss(num_classes=10, embedding_size=4)(torch.randn(3, 4), torch.arange(3)).shape
        torch.Size([])
    """

    def __init__(self, num_classes: int, embedding_size: int, temperature: float = 0.05, **kwargs) -> None:
        checks.number("temperature", temperature, low=0.0, open_low=True)
        super().__init__(num_classes, embedding_size, **kwargs)
        self.temperature = temperature
        self.W = nn.Parameter(torch.empty(embedding_size, num_classes))
        self.weight_init_func(self.W)

    def get_default_distance(self):
        return DotProductSimilarity()

    def by_class(self) -> Tensor:
        return self.W.T

    def of_rows(self, x: Tensor, proxies: Tensor, labels: Tensor, indices_tuple) -> Tensor:
        geometry = geometry_of(self.distance)
        if not geometry.normalize:
            proxies = F.normalize(proxies, dim=1)  # the weights are, whatever the distance does with embeddings
        losses = proxy_cross_entropy(x, proxies, labels, geometry, 1 / self.temperature)
        return reduce_values(
            losses * self.weights_of(indices_tuple, labels, x), reducer_rule(self.reducer), labels=labels
        )


class ProxyNCALoss(ProxyLoss):
    """Neighbourhood component analysis with one proxy a class for neighbours.

        l_i = -log exp(-a ‖x_i - p_{y_i}‖²) / Σ_j exp(-a ‖x_i - p_j‖²)

    pytorch-metric-learning's class: constructor, call and parameter `proxies` (C, D). Where its softmax underflows to 0
    it drops the row, here the row keeps its loss.

    Args:
        num_classes, embedding_size: C, D.
        softmax_scale: a > 0. Default 1.
        **kwargs: see `ProxyLoss` and `MetricLoss`. Default distance: LpDistance(power=2) of normalised embeddings.

    Raises:
        TypeError, ValueError: on a bad argument, naming it.

    Source: Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017, equation 4; with the
    own proxy in the denominator, as in pytorch-metric-learning.

    Example:
        >>> import torch
        >>> from flashpair.heads import ProxyNCALoss
        >>> ProxyNCALoss(num_classes=10, embedding_size=4)(torch.randn(3, 4), torch.arange(3)).shape
        torch.Size([])
    """

    def __init__(self, num_classes: int, embedding_size: int, softmax_scale: float = 1, **kwargs) -> None:
        checks.number("softmax_scale", softmax_scale, low=0.0, open_low=True)
        super().__init__(num_classes, embedding_size, **kwargs)
        self.softmax_scale = softmax_scale
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))
        self.weight_init_func(self.proxies)

    def get_default_distance(self):
        return LpDistance(power=2)

    def by_class(self) -> Tensor:
        return self.proxies

    def of_rows(self, x: Tensor, proxies: Tensor, labels: Tensor, indices_tuple) -> Tensor:
        losses = proxy_cross_entropy(x, proxies, labels, geometry_of(self.distance), self.softmax_scale)
        weights = self.weights_of(indices_tuple, labels, x, anchors_only=True)
        return reduce_values(losses * weights, reducer_rule(self.reducer), labels=labels)
