"""NWS: MSC without positives in the denominator, whose negatives count the less the more related their labels are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import checks
from ...distributed.sharded import all_rows
from ...pairs import segment_sum
from ...request import statistics_dtype
from ...rows import RowPanel, row_reduce
from .base import PrototypeLoss, ReferenceLoss, References
from .label_sets import LabelSets, Sharing
from .shared import pull_towards, unit_rows
from .weights import union_share


class NWSLoss(ReferenceLoss, PrototypeLoss):
    """MSC's positives against weighted negatives only, from keys, a queue and prototypes.

        n_ic = 1 - α / |y_i| + α Σ_{r: c in y_r} 1 / |y_i ∪ y_r|
        w_ir = Σ_{c in y_i and y_r} (α / |y_i ∪ y_r|) / n_ic,   w_ic = 1 / n_ic for the prototypes of y_i
        a_ir = 1 - y_i^T S y_r / (|y_i| |y_r|)
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
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`; S must be alike on all ranks.
            Default: none.

    Raises:
        TypeError, ValueError: on a bad number, or on a bad S.

    Source: no paper is known. koba-84/Multi-label-contrastive-comprehensive, src/trainer/loss/loss_contrastive_nws.py
    with agg="mean"; agg="max" is not here. Labels of samples and references are made dense, (B + N) C numbers.

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
        group=None,
    ) -> None:
        super().__init__(num_labels, embedding_size, temperature, group)
        checks.number("alpha", alpha, low=0.0, high=1.0)
        checks.number("beta", beta, low=0.0, open_low=True)
        _check_similarity(label_similarity, num_labels)
        self.alpha, self.beta = alpha, beta
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
        total = self._negatives(embeddings, sets, rows, of_rows, prototypes)
        valid = (sets.sizes > 0) & (total.detach() != -torch.inf)

        share, size, sizes = union_share(self.alpha), sets.sizes.to(dtype), of_rows.sizes.to(dtype)
        each = size[sets.owner]  # (P,)
        per = 1 / (1 - self.alpha / each + sets.per_label(share, dtype, of_rows)) / each * valid[sets.owner]
        mass = valid * (1 + self.alpha / size.clamp_min(1) * segment_sum(per, sets.owner, sets.rows))

        def weights(pairs: Sharing) -> Tensor:
            return share(pairs.shared, size[pairs.row], sizes[pairs.other]) * pairs.sums[0]

        chunks = sets.sharing(of_rows, dtype, [(per, torch.ones_like(of_rows.owner, dtype=dtype))])
        x, p = unit_rows(embeddings), unit_rows(prototypes)
        with torch.autocast(x.device.type, enabled=False):
            pull = pull_towards(x, unit_rows(rows), chunks, weights) + (x * sets.mixture(p, per)).sum()
        return ((mass * torch.where(valid, total, 0.0)).sum() - scale * pull) / sets.rows

    def _negatives(
        self, embeddings: Tensor, sets: LabelSets, rows: Tensor, of_rows: LabelSets, prototypes: Tensor
    ) -> Tensor:
        """(B,) Z, -inf without negatives."""
        dtype, scale = statistics_dtype(embeddings), 1 / self.temperature
        has, theirs = dense(sets, dtype), torch.cat([dense(of_rows, dtype), dense(sets.single(), dtype)])
        related = theirs / theirs.sum(1, keepdim=True).clamp_min(1)
        related[of_rows.rows :] = 0.0  # prototypes weigh 1
        with torch.autocast(embeddings.device.type, enabled=False):
            asked = (has / has.sum(1, keepdim=True).clamp_min(1)) @ self.label_similarity.to(dtype)
        section = torch.full((len(theirs),), math.log(self.beta), dtype=dtype, device=theirs.device)
        section[of_rows.rows :] = 0.0

        def formula(panel: RowPanel, section: Tensor) -> list[Tensor]:
            shared, related = panel.products
            weight = torch.where(shared < 0.5, 1 - related, 0.0)
            kept = weight > 8 * torch.finfo(dtype).eps  # what rounding leaves of 1 - 1 is nothing
            logits = scale * panel.s + section[panel.column] + torch.where(kept, weight, 1.0).log()
            alone = ~kept.any(1)
            found = torch.where(kept | alone[:, None], logits, -torch.inf).logsumexp(1)
            return [torch.where(alone, -torch.inf, found)]

        products, columns = [(has, theirs), (asked, related)], torch.cat([rows, prototypes])
        return row_reduce(embeddings, columns, formula, products=products, shared=[section], normalize=True, copies=12)[
            0
        ]


def dense(sets: LabelSets, dtype: torch.dtype) -> Tensor:
    """(B, C) multi-hot."""
    found = torch.zeros(sets.rows, sets.num_labels, dtype=dtype, device=sets.owner.device)
    found[sets.owner, sets.label] = 1.0
    return found


def _check_similarity(value: Tensor, labels: int) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != (labels, labels):
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"label_similarity must be floating point of shape ({labels}, {labels}); got {got}")
    if not ((value >= 0) & (value <= 1)).all():
        raise ValueError(
            f"label_similarity must lie in [0, 1]; got values from {float(value.min())} to {float(value.max())}"
        )
