"""Proxy-Anchor: every proxy is an anchor for the embeddings of the batch."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..losses.geometry import geometry_of
from ..losses.peer import CosineSimilarity, DivisorReducer
from ..losses.reducers import reduce_values, reducer_rule
from ..primitives import pair_reduce
from ..terms import Axis, Mask, Reduction, Term
from .proxies import ProxyLoss


class ProxyAnchorLoss(ProxyLoss):
    """Log-sum-exp of the positives and of the negatives of every proxy.

        1/|P⁺| Σ_p log(1 + Σ_{i: y_i = p} e^{-α (s_ip - m)}) + 1/C Σ_p log(1 + Σ_{i: y_i ≠ p} e^{α (s_ip + m)})

    P⁺ are the classes of the batch. pytorch-metric-learning's class: constructor, call and parameter `proxies` (C, D).
    Statistics belong to the columns of one pass.

    Args:
        num_classes, embedding_size: C, D.
        margin: m. Default 0.1.
        alpha: α > 0. Default 32.
        **kwargs: see `ProxyLoss` and `MetricLoss`. Default distance: CosineSimilarity; default reducer: DivisorReducer.

    Raises:
        TypeError, ValueError: on a bad argument, naming it.

    Source: Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.heads import ProxyAnchorLoss
        >>> ProxyAnchorLoss(num_classes=10, embedding_size=4)(torch.randn(3, 4), torch.arange(3)).shape
        torch.Size([])
    """

    names_divisor = True

    def __init__(self, num_classes: int, embedding_size: int, margin: float = 0.1, alpha: float = 32, **kwargs) -> None:
        checks.number("margin", margin)
        checks.number("alpha", alpha, low=0.0, open_low=True)
        super().__init__(num_classes, embedding_size, **kwargs)
        self.margin, self.alpha = margin, alpha
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))
        self.weight_init_func(self.proxies)

    def get_default_distance(self):
        return CosineSimilarity()

    def get_default_reducer(self):
        return DivisorReducer()

    def get_default_weight_init_func(self):
        return functools.partial(nn.init.kaiming_normal_, mode="fan_out")

    def _sub_loss_names(self) -> list[str]:
        return ["pos_loss", "neg_loss"]

    def by_class(self) -> Tensor:
        return self.proxies

    def of_rows(self, x: Tensor, proxies: Tensor, labels: Tensor, indices_tuple) -> Tensor:
        geometry = geometry_of(self.distance)
        near = self.alpha * geometry.sign
        weights = self.weights_of(indices_tuple, labels, x)
        mined = weights - 1 if isinstance(weights, Tensor) else None
        # The peer's margin of a distance d is d - m for positives and -m - d for negatives.
        offset = self.alpha * self.margin
        shared = {"axis": Axis.COLUMNS, "offset": geometry.sign * offset, "other_offset": mined}
        terms = [
            Term(Reduction.LOGSUMEXP, mask=Mask.SAME, scale=-near, **shared),
            Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=near, **shared),
        ]
        classes = torch.arange(self.num_classes, device=x.device)
        pull, push = pair_reduce(
            x, proxies, terms, labels=labels, ref_labels=classes,
            similarity=geometry.similarity, normalize=geometry.normalize,
        )  # fmt: skip
        present = torch.zeros(self.num_classes, dtype=torch.bool, device=x.device).index_fill_(0, labels, True)
        total = 0.0
        for name, values, divisor in (
            ("pos_loss", pull, present.sum().clamp_min(1)),
            ("neg_loss", push, self.num_classes),
        ):
            rule, losses = reducer_rule(self.reducer, name, divisor=True), F.softplus(values, threshold=40)
            part = reduce_values(losses, rule)
            total = total + (part / divisor if rule.divisor else part)
        return total
