"""Losses on features, without pairs of samples: VICReg and Barlow Twins."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..panels import product
from ..request import statistics_dtype
from .arguments import check_matched
from .metric import MetricLoss
from .peer import LpDistance
from .reducers import reduce_values


class _FeatureLoss(MetricLoss):
    """Takes two views, row by row; no labels, miners or distances."""

    falls_back = False
    row_groups = (("embeddings", "ref_emb"),)

    def __init__(self, **kwargs) -> None:
        for refused in ("distance", "embedding_regularizer"):
            if refused in kwargs:
                raise ValueError(f"{refused} must not be given to {type(self).__name__}, which has none")
        super().__init__(**kwargs)

    def check_distance(self) -> None:
        pass  # it has none

    def get_default_distance(self):
        return LpDistance()

    def of_views(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of two views (B, D) in the statistics dtype."""
        raise NotImplementedError

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        for name, value in (("labels", labels), ("indices_tuple", indices_tuple), ("ref_labels", ref_labels)):
            if value is not None:
                raise ValueError(f"{name} must be None for {type(self).__name__}, which compares views row by row")
        if return_stats or ref_emb is None:
            raise ValueError(f"ref_emb must be given to {type(self).__name__}, and return_stats must be False")
        check_matched(embeddings, ref_emb, ("embeddings", "ref_emb"))
        if embeddings.shape[0] < 2:
            raise ValueError(f"embeddings must have at least 2 rows; got {embeddings.shape[0]}")
        dtype = statistics_dtype(embeddings)
        return self.of_views(embeddings.to(dtype), ref_emb.to(dtype))


def squared_covariances(x: Tensor) -> Tensor:
    """Σ_{d ≠ e} cov_de² of centred x (B, D), by the smaller of the D × D and the B × B products."""
    rows, features = x.shape
    gram = product(x.T, x) if features <= rows else product(x, x.T)  # both have the same Frobenius norm
    return ((gram * gram).sum() - (x * x).sum(0).square().sum()) / (rows - 1) ** 2


class VICRegLoss(_FeatureLoss):
    """Two views close to each other, every feature spread out, no two features correlated.

        loss = λ mean_i mean_d (x_id - y_id)²  +  μ/2 Σ_{v in x, y} mean_d [1 - sqrt(var_d(v) + ε)]_+
               +  ν Σ_{v in x, y} Σ_{d ≠ e} cov_de(v)² / D

    pytorch-metric-learning's class: same constructor; the call is `loss(embeddings, ref_emb=...)`. Covariances cost the
    smaller of D² and B² memory.

    Args:
        invariance_lambda, variance_mu, covariance_v: λ, μ, ν. Default 25, 25, 1.
        eps: ε. Default 1e-4.
        **kwargs: `reducer`, of the parts "invariance_loss" over rows and "variance_loss1", "variance_loss2" over
            features. Default: MeanReducer.

    Raises:
        ValueError, TypeError: on a bad number, views that do not match, labels or a miner.

    Source: Bardes, Ponce, LeCun, "VICReg", ICLR 2022, equations 1-6.

    Example:
        >>> import torch
        >>> from flashpair.losses import VICRegLoss
        >>> x = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
        >>> round(float(VICRegLoss()(x, ref_emb=x)), 1)  # the second feature does not vary
        12.4
    """

    def __init__(
        self,
        invariance_lambda: float = 25,
        variance_mu: float = 25,
        covariance_v: float = 1,
        eps: float = 1e-4,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (
            ("invariance_lambda", invariance_lambda),
            ("variance_mu", variance_mu),
            ("covariance_v", covariance_v),
            ("eps", eps),
        ):
            checks.number(name, value)
            setattr(self, name, value)

    def _sub_loss_names(self) -> list[str]:
        return ["invariance_loss", "variance_loss1", "variance_loss2", "covariance_loss"]

    def of_views(self, x: Tensor, y: Tensor) -> Tensor:
        distances = self.invariance_lambda * (x - y).square().mean(1)
        loss = reduce_values(distances, self.rule("invariance_loss"))
        for part, view in (("variance_loss1", x), ("variance_loss2", y)):
            spread = F.relu(1 - (view.var(0) + self.eps).sqrt()) / 2
            loss = loss + reduce_values(self.variance_mu * spread, self.rule(part))
            loss = loss + self.covariance_v * squared_covariances(view - view.mean(0)) / view.shape[1]
        return loss


class BarlowTwinsLoss(_FeatureLoss):
    """Each feature of one view correlated with itself in the other, and with no other feature.

        C = x̂ᵀ ŷ / B   (features standardised over the batch),    loss = Σ_d (1 - C_dd)² + λ Σ_{d ≠ e} C_de²

    The call is `loss(embeddings, ref_emb=...)`. Costs the smaller of D² and B² memory.

    Args:
        lambd: λ. Default 0.0051.
        eps: added to the variances. Default 1e-5.

    Raises:
        ValueError, TypeError: on a bad number, views that do not match, labels or a miner.

    Source: Zbontar et al., "Barlow Twins", ICML 2021, equation 1; standardised as by its batch norm (biased variance).

    Example:
        >>> import torch
        >>> from flashpair.losses import BarlowTwinsLoss
        >>> x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> round(float(BarlowTwinsLoss()(x, ref_emb=x)), 4)
        0.0
    """

    def __init__(self, lambd: float = 0.0051, eps: float = 1e-5, **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("lambd", lambd)
        checks.number("eps", eps, low=0.0)
        self.lambd, self.eps = lambd, eps

    def of_views(self, x: Tensor, y: Tensor) -> Tensor:
        rows, features = x.shape
        x, y = ((v - v.mean(0)) / (v.var(0, correction=0) + self.eps).sqrt() for v in (x, y))
        own = (x * y).sum(0) / rows
        # ||xᵀ y||² = <x xᵀ, y yᵀ>
        if features <= rows:
            every = product(x.T, y).square().sum()
        else:
            every = (product(x, x.T) * product(y, y.T)).sum()
        return (1 - own).square().sum() + self.lambd * (every / rows**2 - own.square().sum())
