"""What the proxy losses share: pytorch-metric-learning's call, row weights from miners, weight regularisers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .. import checks
from ..distributed.sharded import Sharded
from ..losses.metric import MetricLoss
from ..losses.weights import row_weights
from ..request import statistics_dtype
from .statistics import check_classes


class ProxyLoss(MetricLoss):
    """Base of the losses that compare embeddings with learned proxies of the classes; subclasses implement `of_rows`.

    Args:
        num_classes, embedding_size: C, D.
        weight_init_func: fills the proxies in place. Default: the loss's own.
        weight_regularizer: callable on the proxies (C, D) whose value is added to the loss. Default: none.
        weight_reg_weight: its weight.
        **kwargs: see `MetricLoss`.

    Raises:
        TypeError, ValueError: on bad sizes, an unsupported distance or reducer.
    """

    falls_back = False

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        weight_init_func=None,
        weight_regularizer=None,
        weight_reg_weight: float = 1,
        **kwargs,
    ) -> None:
        checks.count("num_classes", num_classes)
        checks.count("embedding_size", embedding_size)
        super().__init__(**kwargs)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.weight_init_func = self.get_default_weight_init_func() if weight_init_func is None else weight_init_func
        self.weight_regularizer, self.weight_reg_weight = weight_regularizer, weight_reg_weight

    def get_default_weight_init_func(self):
        return functools.partial(nn.init.normal_)

    def by_class(self) -> Tensor:
        """The proxies, (C, D) or (C K, D)."""
        raise NotImplementedError

    def of_rows(self, x: Tensor, proxies: Tensor, labels: Tensor, indices_tuple) -> Tensor:
        """The loss of embeddings (B, D)."""
        raise NotImplementedError

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        checks.embeddings("embeddings", embeddings)
        if labels is None:
            raise ValueError("labels must be given: proxies belong to classes")
        if ref_emb is not None or ref_labels is not None:
            raise ValueError("ref_emb and ref_labels must be None: embeddings are compared with the proxies")
        if return_stats:
            raise ValueError("return_stats must be False: proxy losses collect no statistics of pairs")
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"embeddings must have {self.embedding_size} features; got {embeddings.shape[1]}")
        check_classes(labels, embeddings, self.num_classes)
        proxies = self.by_class()
        dtype = torch.promote_types(embeddings.dtype, proxies.dtype)
        x = embeddings.cast(dtype) if isinstance(embeddings, Sharded) else embeddings.to(dtype)
        loss = self.of_rows(x, proxies.to(dtype), labels, indices_tuple)
        if self.weight_regularizer is None:
            return loss
        return loss + self.weight_reg_weight * self.weight_regularizer(proxies)

    def weights_of(self, indices_tuple, labels: Tensor, x: Tensor, anchors_only: bool = False) -> Tensor | float:
        """(B,) weights of the rows from a miner, 1 without one."""
        weights = row_weights(indices_tuple, labels, statistics_dtype(x), anchors_only)
        return 1.0 if weights is None else weights
