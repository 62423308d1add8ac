"""Manifold similarity loss, dense."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed.sharded import current
from ..panels import product
from ..random import draw_seed
from ..reference import normalized
from .geometry import require
from .metric import MetricLoss
from .peer import CosineSimilarity
from .problem import check_call


class ManifoldLoss(MetricLoss):
    """Similarity by random walks over a batch and learned proxies. Dense: O((B + K)²) memory, O((B + K)³) time.

        S = e^{2 [cos]_+} without its diagonal,  S̄ = D^{-1/2} S D^{-1/2},   F = (1 - α) (I - α S̄)^{-1}
        intrinsic:  mean_i log(1 + Σ_{k ≠ m_i: u_ik >= 0} e^{u_ik}),  u_ik = F_{i,k} - F_{i,m_i} + margin
        context:    the same with the cosines of the rows of F of samples and of proxies
        loss = intrinsic + λ_C context

    where m_i is the proxy (meta-class) of sample i. The inverse of a matrix over all pairs has no streamed form, so
    this is plain PyTorch; it is here for the name. pytorch-metric-learning's class: same constructor; the call takes
    `meta_classes` where that one takes them as `indices_tuple`, which is accepted too.

    Args:
        l: embedding size D.
        K: number of proxies. Default 50.
        lambdaC: λ_C >= 0; infinity leaves the intrinsic part out. Default 1.
        alpha: α in (0, 1). Default 0.8.
        margin: default 5e-4.
        **kwargs: see `MetricLoss`. The distance is CosineSimilarity.

    Raises:
        ValueError, TypeError: on a bad number, labels, `ref_emb`, or fewer samples than proxies without meta-classes.

    Source: Aziere, Todorovic, "Ensemble Deep Manifold Similarity Learning Using Hard Proxies", CVPR 2019, equations
    1-9.

    Example:
        >>> import torch
        >>> from flashpair.losses import ManifoldLoss
        >>> ManifoldLoss(l=4, K=2)(torch.randn(6, 4), meta_classes=torch.tensor([0, 1, 0, 1, 0, 1])).shape
        torch.Size([])
    """

    falls_back = False
    row_groups = (("embeddings", "meta_classes"),)

    def __init__(
        self,
        l: int,  # noqa: E741
        K: int = 50,
        lambdaC: float = 1.0,
        alpha: float = 0.8,
        margin: float = 5e-4,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        checks.count("l", l)
        checks.count("K", K)
        if not lambdaC >= 0:
            raise ValueError(f"lambdaC must not be negative; got {lambdaC}")
        checks.number("alpha", alpha, low=0.0, high=1.0)
        checks.number("margin", margin)
        self.l, self.K, self.lambdaC, self.alpha, self.margin = l, K, lambdaC, alpha, margin
        self.proxies = nn.Parameter(torch.randn(K, l))

    def check_distance(self) -> None:
        require(self.distance, "ManifoldLoss", (CosineSimilarity,))

    def forward(
        self, embeddings: Tensor, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None, *, meta_classes=None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (B, l).
            meta_classes: (B,) int64, the proxy of each sample. Default: random, every proxy at least once.
            labels, ref_emb, ref_labels: must be None. indices_tuple: another name of `meta_classes`.
        """
        for name, value in (("labels", labels), ("ref_emb", ref_emb), ("ref_labels", ref_labels)):
            if value is not None:
                raise ValueError(f"{name} must be None for ManifoldLoss; got one")
        meta = indices_tuple if meta_classes is None else meta_classes
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {"embeddings": embeddings, "meta_classes": meta})
        rows = embeddings.shape[0]
        if meta is None:
            if rows < self.K:
                raise ValueError(f"embeddings must have at least K={self.K} rows without meta_classes; got {rows}")
            drawn = torch.Generator().manual_seed(draw_seed() & (1 << 62) - 1)
            free = torch.randint(0, self.K, (rows - self.K,), generator=drawn)
            order = torch.randperm(rows, generator=drawn)
            meta = torch.cat([torch.arange(self.K), free])[order].to(embeddings.device)
        check_call(embeddings, meta, None, None, None)
        if embeddings.shape[1] != self.l:
            raise ValueError(f"embeddings must have l={self.l} features; got {embeddings.shape[1]}")
        loss = self._loss(normalized(embeddings), meta)
        return self._with_regularizer(loss, embeddings, False)

    def _loss(self, x: Tensor, meta: Tensor) -> Tensor:
        nodes = torch.cat([x, normalized(self.proxies.to(x))])
        s = torch.exp(2 * product(nodes, nodes.T).clamp_min(0))
        s = s - torch.diag(s.diagonal())
        root = s.sum(1).rsqrt()
        eye = torch.eye(len(nodes), dtype=x.dtype, device=x.device)
        walk = (1 - self.alpha) * _Inverse.apply(eye - self.alpha * root[:, None] * s * root[None, :])
        samples, proxies = walk[: len(x)], walk[len(x) :]
        context = self._ranking(product(normalized(samples), normalized(proxies).T), meta)
        if self.lambdaC == float("inf"):
            return context
        return self._ranking(samples[:, len(x) :], meta) + self.lambdaC * context

    def _ranking(self, score: Tensor, meta: Tensor) -> Tensor:
        gap = score - score.gather(1, meta[:, None]) + self.margin
        counts = (gap >= 0) & (torch.arange(self.K, device=meta.device)[None, :] != meta[:, None])
        return torch.log1p(torch.where(counts, gap.exp(), 0.0).sum(1)).mean()


class _Inverse(torch.autograd.Function):
    """The inverse of a matrix; autocast would narrow the products of torch's own derivative."""

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        inverse = torch.linalg.inv(matrix)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -product(product(inverse.T, grad), inverse.T)
