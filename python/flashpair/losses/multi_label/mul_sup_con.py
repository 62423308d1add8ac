"""MulSupCon: one supervised contrastive loss for each label of each sample."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from ... import checks
from ...algebra import log_add_exp
from ...pairs import segment_sum
from ...primitives import pair_reduce
from ...request import statistics_dtype
from ...terms import Reduction, Term
from .base import PrototypeLoss, ReferenceLoss, References
from .label_sets import LabelSets
from .shared import unit_rows


class MulSupConReduction(Enum):
    """How the losses of (sample, label) become one number."""

    MEAN = "mean"  # over all of them
    PER_SAMPLE = "per_sample"  # the mean of each sample's, then over the batch


class MulSupConLoss(ReferenceLoss):
    """For each label c of a sample, SupCon with the references that have c as positives.

        l_ic = LSE_r s_ir / T  -  mean_{r: c in y_r} s_ir / T

    References are the other samples; or, where keys or a queue are given, these, row i of the keys with the labels of
    sample i. A label that no reference has gives no loss. The mean over positives is a product with the label's mean
    embedding: a pass for the log-sum, O(labels given · D) for the rest, no overlaps of label sets.

    Args:
        temperature: T > 0. Default 0.1.
        reduction: see `MulSupConReduction`. Default: mean.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a bad number or reduction.

    Source: Zhang and Wu, "Multi-Label Supervised Contrastive Learning" (MulSupCon), AAAI 2024, equation 6;
    williamzhangsjtu/MulSupCon, where the references are keys and a queue that is full; the batch without the anchor is
    the comprehensive study's. The authors' `with_weight` is PER_SAMPLE.

    Example:
        >>> import torch
        >>> from flashpair.losses import KeyQueue, MulSupConLoss
        >>> x, labels = torch.eye(3), torch.tensor([[1, 1], [1, 0], [0, 1]])
        >>> loss = MulSupConLoss()
        >>> round(float(loss(x, labels)), 4)  # log 2
        0.6931
        >>> queue, of_queue = KeyQueue(6, 3), KeyQueue(6, 2)  # keys, and their labels as numbers
        >>> queue.enqueue(x), of_queue.enqueue(labels.float())
        (None, None)
        >>> value = loss(x, labels, keys=x, queue=queue.rows(), queue_labels=of_queue.rows())
    """

    def __init__(
        self, temperature: float = 0.1, reduction: MulSupConReduction = MulSupConReduction.MEAN, group=None
    ) -> None:
        super().__init__(group=group)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        checks.member("reduction", reduction, MulSupConReduction)
        self.temperature, self.reduction = temperature, reduction

    def of(self, embeddings: Tensor, sets: LabelSets, references: References) -> Tensor:
        scale, dtype = 1 / self.temperature, statistics_dtype(embeddings)
        term, own = [Term(Reduction.LOGSUMEXP, scale=scale)], not references
        total: Tensor | None = None
        for columns in (None,) if own else (rows for rows, _ in references):
            (found,) = pair_reduce(embeddings, columns, term, normalize=True)
            total = found if total is None else log_add_exp(total, found)
        counts = sets.counts if own else sum(of.counts for _, of in references)
        positives = (counts[sets.label] - int(own)).to(dtype)  # (P,) references with the label
        usable = (positives > 0).to(dtype)
        weights = usable / positives.clamp_min(1)
        labels, each = (segment_sum(v, sets.owner, sets.rows) for v in (usable, weights))
        x = unit_rows(embeddings)
        sums = sets.sums(x) if own else sum(of.sums(unit_rows(rows)) for rows, of in references)
        mixed = sets.mixture(sums, weights)
        pull = (x * (mixed - each[:, None] * x if own else mixed)).sum(1)
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
        x, p = unit_rows(embeddings), unit_rows(prototypes)
        pull = (x * sets.mixture(p, torch.ones_like(sets.owner, dtype=dtype))).sum(1) / self.temperature
        size = sets.sizes.to(dtype)
        return torch.where(size > 0, total - pull / size.clamp_min(1), 0.0).mean()
