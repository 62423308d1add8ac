"""MulSupCon: one supervised contrastive loss for each label of each sample."""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...pairs import segment_sum
from ...primitives import pair_reduce
from ...request import statistics_dtype
from ...terms import Reduction, Term
from .base import MultiLabelLoss, PrototypeLoss
from .label_sets import LabelSets


class MulSupConReduction(Enum):
    """How the losses of (sample, label) become one number."""

    MEAN = "mean"  # over all of them
    PER_SAMPLE = "per_sample"  # the mean of each sample's, then over the batch


class MulSupConLoss(MultiLabelLoss):
    """For each label c of a sample, SupCon with the samples that have c as positives.

        l_ic = LSE_{k != i} s_ik / T  -  mean_{j != i: c in y_j} s_ij / T

    A label that no other sample has gives no loss. The mean over positives is a product with the label's mean
    embedding: one pass for the log-sum, O(labels given · D) for the rest, no overlaps of label sets.

    Args:
        temperature: T > 0. Default 0.1.
        reduction: see `MulSupConReduction`. Default: mean.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a bad number or reduction.

    Source: Zhang and Wu, "Multi-Label Supervised Contrastive Learning" (MulSupCon), AAAI 2024, equation 6;
    williamzhangsjtu/MulSupCon. There the references are a queue; here the batch, without the anchor.

    Example:
        >>> import torch
        >>> from flashpair.losses import MulSupConLoss
        >>> x, labels = torch.eye(3), torch.tensor([[1, 1], [1, 0], [0, 1]])
        >>> round(float(MulSupConLoss()(x, labels)), 4)  # log 2
        0.6931
    """

    def __init__(
        self, temperature: float = 0.1, reduction: MulSupConReduction = MulSupConReduction.MEAN, group=None
    ) -> None:
        super().__init__(group=group)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        checks.member("reduction", reduction, MulSupConReduction)
        self.temperature, self.reduction = temperature, reduction

    def of(self, embeddings: Tensor, sets: LabelSets) -> Tensor:
        scale, dtype = 1 / self.temperature, statistics_dtype(embeddings)
        (total,) = pair_reduce(embeddings, terms=[Term(Reduction.LOGSUMEXP, scale=scale)], normalize=True)
        others = (sets.counts[sets.label] - 1).to(dtype)  # (P,) other samples with the label
        usable = (others > 0).to(dtype)
        weights = usable / others.clamp_min(1)
        labels, own = (segment_sum(v, sets.owner, sets.rows) for v in (usable, weights))
        with torch.autocast(embeddings.device.type, enabled=False):
            x = F.normalize(embeddings.to(dtype), dim=1, eps=1e-12)
            pull = (x * (sets.mixture(sets.sums(x), weights) - own[:, None] * x)).sum(1)
        losses = torch.where(labels > 0, labels * total.masked_fill(labels == 0, 0.0) - scale * pull, 0.0)
        if self.reduction == MulSupConReduction.PER_SAMPLE:
            return (losses / labels.clamp_min(1)).mean()
        return losses.sum() / labels.sum().clamp_min(1)


class MultiLabelProtoLoss(PrototypeLoss):
    """Cross-entropy of each of a sample's labels among learned prototypes.

        loss = mean_i 1 / |y_i|  Σ_{c in y_i} [ LSE_k <x_i, p_k> / T  -  <x_i, p_c> / T ]

    of unit vectors. A sample without labels contributes 0 (the study's code gives NaN).

    Args:
        num_labels, embedding_size: C and D; `prototypes` (C, D) is a parameter.
        temperature: T > 0. Default 0.1.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Source: Audibert, Gauffre, Amini, 2024 ("proto").

    Example:
        >>> import torch
        >>> from flashpair.losses import MultiLabelProtoLoss
        >>> loss = MultiLabelProtoLoss(num_labels=5, embedding_size=4)
        >>> bool(loss(torch.randn(3, 4), torch.eye(5)[:3]) > 0)
        True
    """

    def __init__(self, num_labels: int, embedding_size: int, temperature: float = 0.1, group=None) -> None:
        super().__init__(num_labels, embedding_size, temperature, group)

    def of_prototypes(self, embeddings: Tensor, sets: LabelSets, prototypes: Tensor) -> Tensor:
        dtype = statistics_dtype(embeddings)
        logits = Term(Reduction.LOGSUMEXP, scale=1 / self.temperature)
        (total,) = pair_reduce(embeddings, prototypes, [logits], normalize=True)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, p = (F.normalize(v.to(dtype), dim=1, eps=1e-12) for v in (embeddings, prototypes))
            pull = (x * sets.mixture(p, torch.ones_like(sets.owner, dtype=dtype))).sum(1) / self.temperature
        size = sets.sizes.to(dtype)
        return torch.where(size > 0, total - pull / size.clamp_min(1), 0.0).mean()
