"""NWS: MSC without positives in the denominator, whose negatives count the less the more related their labels are."""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...distributed.sharded import all_rows
from ...pairs import segment_sum
from ...panels import product
from ...request import statistics_dtype
from ...rows import RowPanel, row_reduce
from ..closed_form import total_with_slopes
from .base import PrototypeLoss, ReferenceLoss, References
from .label_sets import LabelSets, Sharing
from .shared import pull_towards, unit_rows
from .weights import union_share


class NWSAggregation(Enum):
    """How related two label sets are, from how related their labels are."""

    MEAN = "mean"  # of all pairs of a label of one and a label of the other
    MAX = "max"  # the largest of them


class NWSLoss(ReferenceLoss, PrototypeLoss):
    """MSC's positives against weighted negatives only, from keys, a queue and prototypes.

        n_ic = 1 - α / |y_i| + α Σ_{r: c in y_r} 1 / |y_i ∪ y_r|
        w_ir = Σ_{c in y_i and y_r} (α / |y_i ∪ y_r|) / n_ic,   w_ic = 1 / n_ic for the prototypes of y_i
        a_ir = 1 - y_i^T S y_r / (|y_i| |y_r|),   or 1 - max_{c in y_i, d in y_r} S_cd
        Z_i  = log( Σ_{r: y_i ∩ y_r = ∅} β a_ir e^{s_ir / T} + Σ_{c not in y_i} e^{s_ic / T} )
        l_i  = 1 / |y_i|  [ Σ_r w_ir (Z_i - s_ir / T) + Σ_{c in y_i} w_ic (Z_i - s_ic / T) ]

    of unit vectors; mean over the batch. r are the keys, sample i's own among them, and the queue, both without
    gradient; without keys, the batch itself without gradient. A reference without labels has a_ir = 1. A sample without
    labels, and one without negatives of weight above 0, contributes 0 (the authors' code has log 1e-8 there). Since
    Z_i holds no positives, the loss may be negative.

    Args:
        num_labels, embedding_size: C and D; `prototypes` (C, D) is a parameter.
        label_similarity: S (C, C) in [0, 1], floating point: how related two labels are, from the training set's
            labels for instance.
        temperature: T > 0. Default 0.07.
        alpha: α in [0, 1]. Default 1.
        beta: β > 0. Default 0.1, MSC's; the code has no default.
        aggregation: see `NWSAggregation`, the code's `agg`. Default: mean.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`; S must be alike on all ranks.
            Default: none.

    Raises:
        TypeError, ValueError: on a bad number, or on a bad S.

    Source: no paper is known. koba-84/Multi-label-contrastive-comprehensive, src/trainer/loss/loss_contrastive_nws.py.

    Example:
        >>> import torch
        >>> from flashpair.losses import NWSLoss
        >>> loss = NWSLoss(num_labels=5, embedding_size=4, label_similarity=torch.eye(5))
        >>> bool(loss(torch.randn(3, 4), torch.eye(5)[:3]).isfinite())
        True
    """

    label_similarity: Tensor  # (C, C)

    def __init__(
        self,
        num_labels: int,
        embedding_size: int,
        label_similarity: Tensor,
        temperature: float = 0.07,
        alpha: float = 1.0,
        beta: float = 0.1,
        aggregation: NWSAggregation = NWSAggregation.MEAN,
        group=None,
    ) -> None:
        super().__init__(num_labels, embedding_size, temperature, group)
        checks.number("alpha", alpha, low=0.0, high=1.0)
        checks.number("beta", beta, low=0.0, open_low=True)
        checks.member("aggregation", aggregation, NWSAggregation)
        _check_similarity(label_similarity, num_labels)
        self.alpha, self.beta, self.aggregation = alpha, beta, aggregation
        self.register_buffer("label_similarity", label_similarity.detach().clone())

    def of(self, embeddings: Tensor, sets: LabelSets, references: References) -> Tensor:
        self.check_labels(sets)
        if references and references[0][1] is not sets:
            raise ValueError("keys must be given where queue is; got None")
        dtype, scale = statistics_dtype(embeddings), 1 / self.temperature
        prototypes, rows, of_rows = self.prototypes.to(embeddings.dtype), all_rows(embeddings).detach(), sets
        if references:
            rows = torch.cat([all_rows(r) for r, _ in references])
            for _, more in references[1:]:
                of_rows = of_rows.beside(more)
        # Whoever has all labels has no other negatives than references without labels.
        valid = (sets.sizes > 0) & ((sets.sizes < sets.num_labels) | (of_rows.sizes == 0).any())

        share, size, sizes = union_share(self.alpha), sets.sizes.to(dtype), of_rows.sizes.to(dtype)
        each = size[sets.owner]  # (P,)
        per = 1 / (1 - self.alpha / each + sets.per_label(share, dtype, of_rows)) / each * valid[sets.owner]
        mass = valid * (1 + self.alpha / size.clamp_min(1) * segment_sum(per, sets.owner, sets.rows))

        def weights(pairs: Sharing) -> Tensor:
            return share(pairs.shared, size[pairs.row], sizes[pairs.other]) * pairs.sums[0]

        chunks = sets.sharing(of_rows, dtype, [(per, torch.ones_like(of_rows.owner, dtype=dtype))])
        x, p = unit_rows(embeddings), unit_rows(prototypes)
        pull = pull_towards(x, unit_rows(rows), chunks, weights) + (x * sets.mixture(p, per)).sum()
        return (self._negatives(embeddings, sets, rows, of_rows, x, p, mass) - scale * pull) / sets.rows

    def _negatives(
        self, embeddings: Tensor, sets: LabelSets, rows: Tensor, of_rows: LabelSets, x: Tensor, p: Tensor, mass: Tensor
    ) -> Tensor:
        """0-d Σ_i mass_i Z_i over the i whose mass (B,) is not 0."""
        dtype, scale = p.dtype, 1 / self.temperature
        related, largest = self.label_similarity.to(dtype), self.aggregation == NWSAggregation.MAX
        # Σ over a reference's labels is a mean; one label that is shared makes it larger than 1.
        each, far = None if largest else 1 / of_rows.sizes[of_rows.owner].to(dtype), 2.0 * sets.num_labels
        full = self.beta * (1 - 8 * torch.finfo(dtype).eps)  # what rounding leaves of 1 - 1 is nothing

        def formula(panel: RowPanel, x: Tensor, mass: Tensor, p: Tensor) -> list[Tensor]:
            with torch.no_grad():
                local, label = sets.of_rows(panel.row)
                starts = torch.searchsorted(local, torch.arange(len(x), device=x.device))
                of_label = F.embedding_bag(label, related, starts, mode="max" if largest else "mean").mul_(self.beta)
                of_label[local, label] = far * self.beta
                own = of_label == far * self.beta
                logits = of_rows.bags(of_label.T.contiguous(), each, largest).neg_().add_(full)
                logits = logits.clamp_min_(0).log_().add_(panel.s, alpha=scale)
                of_prototypes = product(x, p.T).mul_(scale).masked_fill_(own, -torch.inf)
                top = torch.maximum(logits.amax(1), of_prototypes.amax(1))[:, None]
                top = torch.where(top == -torch.inf, 0.0, top)
                logits.sub_(top).exp_(), of_prototypes.sub_(top).exp_()
                total = (logits.sum(1) + of_prototypes.sum(1))[:, None]
                total = torch.where(total == 0, 1.0, total)  # no negatives: mass 0
                z = (total.log() + top).squeeze(1)
                slope = mass[:, None] * scale / total
                logits.mul_(slope), of_prototypes.mul_(slope)
                value = (mass * z).sum()
                slopes = (panel.s, logits), (x, product(of_prototypes, p)), (p, product(of_prototypes.T, x))
            return [total_with_slopes(value, *slopes)]

        return row_reduce(embeddings, rows, formula, rows=[x, mass], shared=[p], totals=1, normalize=True, copies=6)[0]


def _check_similarity(value: Tensor, labels: int) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != (labels, labels):
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"label_similarity must be floating point of shape ({labels}, {labels}); got {got}")
    if not ((value >= 0) & (value <= 1)).all():
        raise ValueError(
            f"label_similarity must lie in [0, 1]; got values from {float(value.min())} to {float(value.max())}"
        )
