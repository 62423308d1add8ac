"""SupCon of label sets: the more labels two samples share, the more positive they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...primitives import pair_reduce
from ...request import statistics_dtype
from ...rows import RowPanel, row_reduce
from ...terms import Reduction, Term
from .base import MultiLabelLoss
from .label_sets import LabelSets, Sharing, over_ranks
from .shared import Repeated, pull_within, unit_rows
from .weights import LabelWeight, overlap_weight


class MultiLabelContrastiveLoss(MultiLabelLoss):
    """Cross-entropy of each sample's similarities towards how much the others' labels are its own.

        l_i = Σ_{j != i} w_ij / (Σ_k w_ik) [ LSE_{k != i} s_ik / T  -  s_ij / T ],   mean over the i with Σ w > 0

    w as `LabelWeight` says: ANY and ALL are the usual multi-label SupCon, JACCARD the "base" loss of the comprehensive
    study. One pass for the log-sum; the rest is a product with the sparse matrix of w, some rows of it at a time. A
    sample without labels is a negative, no anchor.

    Args:
        weight: see `LabelWeight`. Default: JACCARD.
        temperature: T > 0. Default 0.1.
        all_anchors: the mean is over all anchors, those without positives contributing 0. Default False.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a bad number or weight.

    Source: Audibert, Gauffre, Amini, "Multi-Label Contrastive Learning: A Comprehensive Study", 2024 (base); Zhang and
    Wu, "Multi-Label Supervised Contrastive Learning" (MulSupCon), AAAI 2024 (ANY, ALL). The placement of
    SIMILARITY_DISSIMILARITY is not verified: its paper was not at hand; assumed to weight the positives.

    Example:
        >>> import torch
        >>> from flashpair.losses import LabelWeight, MultiLabelContrastiveLoss
        >>> x, labels = torch.eye(3), torch.tensor([[1, 1], [1, 0], [0, 1]])
        >>> round(float(MultiLabelContrastiveLoss(LabelWeight.ANY)(x, labels)), 4)  # log 2
        0.6931
    """

    def __init__(
        self,
        weight: LabelWeight = LabelWeight.JACCARD,
        temperature: float = 0.1,
        all_anchors: bool = False,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.member("weight", weight, LabelWeight)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        self.weight, self.temperature, self.all_anchors = weight, temperature, all_anchors

    def of(self, embeddings: Tensor, sets: LabelSets) -> Tensor:
        weigh, scale, dtype = overlap_weight(self.weight), 1 / self.temperature, statistics_dtype(embeddings)
        (total,) = pair_reduce(embeddings, terms=[Term(Reduction.LOGSUMEXP, scale=scale)], normalize=True)
        sizes, pairs = sets.sizes.to(dtype), Repeated(lambda: sets.sharing(sets, dtype))

        def weights(p: Sharing, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i == j, 0.0, weigh(p.shared, sizes[i], sizes[j]))

        mass = torch.zeros_like(sizes)
        for p in pairs:
            mass[p.first : p.end] = p.totals(weights(p, p.row, p.other))
        mass = over_ranks(mass)
        anchor = mass > 0
        each = torch.where(anchor, 1 / torch.where(anchor, mass, 1.0), 0.0)

        def both(p: Sharing) -> Tensor:
            there = weights(p, p.row, p.other)
            if self.weight != LabelWeight.SIMILARITY_DISSIMILARITY:  # symmetric
                return there * (each[p.row] + each[p.other])
            return there * each[p.row] + weights(p, p.other, p.row) * each[p.other]

        pull = pull_within(unit_rows(embeddings), pairs, both)
        anchors = len(mass) if self.all_anchors else anchor.sum().clamp_min(1)
        return (torch.where(anchor, total, 0.0).sum() - scale * pull) / anchors


class JSCLLoss(MultiLabelLoss):
    """Every other sample is a positive; the Jaccard index multiplies the exponentials of the denominator.

        loss = mean_i mean_{j != i} [ log Σ_{k != i} J_ik e^{s_ik / T}  -  s_ij / T ]

    What the code under this name computes, although the name suggests weights on the positives. Samples that share
    labels with nobody contribute 0.

    Args:
        temperature: T > 0. Default 0.1.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Source: IIP-Lab-2024/CL-MTC, scripts/model.py (there with 1e-20 inside the exponential).

    Example:
        >>> import torch
        >>> from flashpair.losses import JSCLLoss
        >>> round(float(JSCLLoss()(torch.eye(3), torch.ones(3, 2))), 4)  # log 2
        0.6931
    """

    def __init__(self, temperature: float = 0.1, group=None) -> None:
        super().__init__(group=group)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        self.temperature = temperature

    def of(self, embeddings: Tensor, sets: LabelSets) -> Tensor:
        weigh = overlap_weight(LabelWeight.JACCARD)

        def crossed(panel: RowPanel) -> list[Tensor]:
            weights = sets.weights(weigh, panel.row, panel.s.dtype)
            logits = panel.s / self.temperature
            total = torch.where(weights > 0, logits + weights.clamp_min(1e-38).log(), -torch.inf)
            alone = (weights > 0).sum(1) == 0
            total = torch.where(alone[:, None], 0.0, total).logsumexp(1)
            pull = torch.where(panel.allowed, logits, 0.0).sum(1) / panel.allowed.sum(1).clamp_min(1)
            return [torch.where(alone, 0.0, total - pull)]

        return row_reduce(embeddings, None, crossed, normalize=True, copies=16)[0].mean()
