"""Hybrid of classification, label correlation and a contrastive term."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ..arguments import check_rows, poisoned
from ..group import InGroup
from .base import MultiLabelLoss
from .contrastive import MultiLabelContrastiveLoss
from .correlation import LabelCorrelationLoss
from .logits import _checked
from .weights import LabelWeight


class HybridMultiLabelLoss(InGroup, nn.Module):
    """Class-weighted binary cross-entropy of logits, label correlation, and a contrastive loss of embeddings.

        loss = b · mean_ic v_c BCE(z_ic, y_ic)  +  r · LabelCorrelationLoss(z, y)  +  k · contrastive(x, y)

    The paper's formulas were not read: its summary names these three kinds of terms. Assumed: that v multiplies both
    halves of the cross-entropy, that the correlation term is SpanEmo's, that the contrastive term is SupCon where
    samples that share a label are positives, and that the terms are added with constant weights.

    Args:
        class_weights: v (C,), floating point and not negative. Default: 1 for all.
        bce_weight, correlation_weight, contrastive_weight: b, r, k ≥ 0. Default 1 each; with k = 0 no pair is compared.
        contrastive: a multi-label loss of embeddings without a group of its own. Default:
            `MultiLabelContrastiveLoss(LabelWeight.ANY)`.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`; class weights must be alike
            on all ranks. Default: none.

    Raises:
        TypeError, ValueError: on a bad weight or contrastive loss.

    Source: the components of a hybrid loss for Arabic multi-label emotions, arXiv 2410.03979, 2024; see above.

    Example:
        >>> import torch
        >>> from flashpair.losses import HybridMultiLabelLoss
        >>> loss = HybridMultiLabelLoss(contrastive_weight=0.0)
        >>> round(float(loss(torch.zeros(1, 3), torch.eye(1), torch.tensor([[1, 0, 0]]))), 4)  # log 2 + 1
        1.6931
    """

    class_weights: Tensor | None  # (C,)
    row_groups = None

    def __init__(
        self,
        class_weights: Tensor | None = None,
        bce_weight: float = 1.0,
        correlation_weight: float = 1.0,
        contrastive_weight: float = 1.0,
        contrastive: MultiLabelLoss | None = None,
        group=None,
    ) -> None:
        super().__init__(group=group)
        weights = {"bce": bce_weight, "correlation": correlation_weight, "contrastive": contrastive_weight}
        for name, value in weights.items():
            checks.number(f"{name}_weight", value, low=0.0)
        contrastive = MultiLabelContrastiveLoss(LabelWeight.ANY) if contrastive is None else contrastive
        if not isinstance(contrastive, MultiLabelLoss):
            raise TypeError(f"contrastive must be a multi-label loss of embeddings; got {type(contrastive).__name__}")
        if contrastive.group is not None:
            raise ValueError("contrastive must have no group of its own: give it to HybridMultiLabelLoss; got a group")
        if class_weights is not None:
            _check_weights(class_weights)
            class_weights = class_weights.detach().clone()
        self.register_buffer("class_weights", class_weights)
        self.bce_weight, self.correlation_weight = bce_weight, correlation_weight
        self.contrastive_weight, self.contrastive = contrastive_weight, contrastive
        self.correlation = LabelCorrelationLoss()

    def forward(self, logits: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch. `torch.compile` makes graphs of all but the contrastive loss.

        Args:
            logits: (B, C) floating point.
            embeddings: (B, D) as the contrastive loss takes them.
            labels: (B, C) multi-hot, of any number type or bool.

        Returns:
            0-d loss in float32 (float64 where the logits or the embeddings are); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        tensors = {"logits": logits, "embeddings": embeddings, "labels": labels}
        if self.group is not None and current() is None:
            return self.over_group(self.forward, tensors)
        z, present = _checked(logits, labels)
        weights = self.class_weights
        if weights is not None:
            if len(weights) != logits.shape[1]:
                raise ValueError(f"logits must have {len(weights)} columns, one for each weight; got {logits.shape[1]}")
            checks.same_device("logits", logits, class_weights=weights)
            weights = weights.to(z.dtype)
        loss = 0.0
        if self.contrastive_weight:
            loss = self.contrastive_weight * self.contrastive(embeddings, labels)  # checks before the rest is computed
        else:
            check_rows("embeddings", embeddings, len(labels), logits)
        bce = F.binary_cross_entropy_with_logits(z, present.to(z.dtype), weights, reduction="sum") / max(z.numel(), 1)
        loss = loss + self.bce_weight * bce + self.correlation_weight * self.correlation(logits, labels)
        return poisoned(loss, logits, embeddings)


def _check_weights(value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != 1:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"class_weights must be floating point of shape (labels,); got {got}")
    if not ((value >= 0) & (value < torch.inf)).all():
        raise ValueError(f"class_weights must be finite and not negative; got {value.tolist()}")
