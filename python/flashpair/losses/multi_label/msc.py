"""MSC and its regularised form: labels of a sample balanced against one another, prototypes among the references."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...algebra import log_add_exp
from ...pairs import accumulate, segment_sum
from ...primitives import pair_reduce
from ...request import statistics_dtype
from ...rows import RowPanel, row_reduce
from ...terms import Reduction, Term
from .base import PrototypeLoss
from .label_sets import LabelSets
from .weights import OverlapWeight, subset_share

_ROWS = 256  # of overlaps at a time, where no embeddings are compared


def per_label(sets: LabelSets, weigh: OverlapWeight, dtype: torch.dtype) -> Tensor:
    """(P,) Σ_{j != i: c in y_j} weight(i, j) for each label c of each sample i."""
    found = torch.zeros(len(sets.owner), dtype=dtype, device=sets.owner.device)
    for row in torch.arange(sets.rows, device=sets.owner.device).split(_ROWS):
        weights = sets.weights(weigh, row, dtype)
        for pair, local, other in sets.shared_with(sets, row):
            accumulate(found, pair, weights[local, other])
    return found


def balanced_weights(sets: LabelSets, weigh: OverlapWeight, per: Tensor, row: Tensor) -> Tensor:
    """(b, N) weight(i, j) · Σ_{c in y_i and y_j} per_ic."""
    shares = torch.zeros(len(row) * sets.rows, dtype=per.dtype, device=row.device)
    for pair, local, other in sets.shared_with(sets, row):
        accumulate(shares, local * sets.rows + other, per[pair])
    return sets.weights(weigh, row, per.dtype) * shares.view(len(row), sets.rows)


class MSCLoss(PrototypeLoss):
    """Multi-label SupCon in which every label of a sample has the same weight, its prototype included.

        n_ic = 1 + α Σ_{j != i: c in y_j} 1 / |y_i ∪ y_j|
        w_ij = Σ_{c in y_i and y_j} (α / |y_i ∪ y_j|) / n_ic,   w_ic = 1 / n_ic for the prototypes of y_i
        l_i  = 1 / |y_i|  [ Σ_j w_ij (Z_i - s_ij / T) + Σ_c w_ic (Z_i - s_ic / T) ]
        Z_i  = log( Σ_c e^{s_ic / T} + β Σ_{j != i} e^{s_ij / T} )

    of unit vectors; mean over the batch, a sample without labels contributes 0. Three tensors (B, B, C) in the authors'
    code; here a list of the labels that samples share, a panel at a time.

    Args:
        num_labels, embedding_size: C and D; `prototypes` (C, D) is a parameter.
        temperature: T > 0. Default 0.1.
        alpha: α ≥ 0. Default 1.
        beta: β > 0. Default 0.1.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Source: Audibert, Gauffre, Amini, "Exploring Contrastive Learning for Long-Tailed Multi-Label Text Classification",
    2024; as "msc" in their comprehensive study's code.

    Example:
        >>> import torch
        >>> from flashpair.losses import MSCLoss
        >>> loss = MSCLoss(num_labels=5, embedding_size=4)
        >>> bool(loss(torch.randn(3, 4), torch.eye(5)[:3]) > 0)
        True
    """

    def __init__(
        self,
        num_labels: int,
        embedding_size: int,
        temperature: float = 0.1,
        alpha: float = 1.0,
        beta: float = 0.1,
        group=None,
    ) -> None:
        super().__init__(num_labels, embedding_size, temperature, group)
        checks.number("alpha", alpha, low=0.0)
        checks.number("beta", beta, low=0.0, open_low=True)
        self.alpha, self.beta = alpha, beta

    def of_prototypes(self, embeddings: Tensor, sets: LabelSets, prototypes: Tensor) -> Tensor:
        dtype, scale = statistics_dtype(embeddings), 1 / self.temperature
        union: OverlapWeight = lambda s, a, b: torch.where(s > 0, self.alpha / (a + b - s).clamp_min(1), 0.0)  # noqa: E731
        per = 1 / (1 + per_label(sets, union, dtype))
        term = [Term(Reduction.LOGSUMEXP, scale=scale)]
        (of_batch,) = pair_reduce(embeddings, None, term, normalize=True)
        (of_prototypes,) = pair_reduce(embeddings, prototypes, term, normalize=True)
        total = log_add_exp(of_batch + torch.log(of_batch.new_tensor(self.beta)), of_prototypes)

        def pulled(panel: RowPanel) -> list[Tensor]:
            weights = balanced_weights(sets, union, per, panel.row)
            return [torch.where(weights > 0, weights * panel.s, 0.0).sum(1), weights.sum(1)]

        pull, mass = row_reduce(embeddings, None, pulled, normalize=True, copies=12)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, p = (F.normalize(v.to(dtype), dim=1, eps=1e-12) for v in (embeddings, prototypes))
            pull = pull + (x * sets.mixture(p, per)).sum(1)
        mass = mass + segment_sum(per, sets.owner, sets.rows)
        size = sets.sizes.to(dtype)
        return torch.where(size > 0, (mass * total - scale * pull) / size.clamp_min(1), 0.0).mean()


class MSCRGLoss(PrototypeLoss):
    """Prototypes as samples among samples, and positives that are never repelled.

        U = batch and prototypes (each with its one label), all of them anchors
        f_ij = (|y_i ∩ y_j| / |y_j|)^α,   n_ic = Σ_{j != i: c in y_j} f_ij
        w_ij = 1 / |y_i|  Σ_{c in y_i and y_j} f_ij / n_ic,   p_i the softmax of s_ij / T over j != i
        loss = 1 / (anchors with positives)  Σ_ij [ -w_ij log p_ij  -  [p_ij - w_ij]_+ 1[w_ij != 0] s_ij / T ]

    of unit vectors. The factor of the second term takes no gradient: with it a positive's gradient is
    min(p_ij - w_ij, 0) / T. A label that only the anchor has gives it no weight.

    Args:
        num_labels, embedding_size: C and D; `prototypes` (C, D) is a parameter.
        temperature: T > 0. Default 0.1.
        alpha: α; negative: f_ij says whether y_j is a subset of y_i. Default 0, f = 1, the shipped configuration.
        regularised: False leaves out the second term ("mscwrg"). Default True ("mscrg").
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Source: Audibert, Gauffre, Amini, "Multi-Label Contrastive Learning: A Comprehensive Study", 2024, read through the
    authors' code.

    Example:
        >>> import torch
        >>> from flashpair.losses import MSCRGLoss
        >>> loss = MSCRGLoss(num_labels=5, embedding_size=4, regularised=False)
        >>> bool(loss(torch.randn(3, 4), torch.eye(5)[:3]) > 0)
        True
    """

    def __init__(
        self,
        num_labels: int,
        embedding_size: int,
        temperature: float = 0.1,
        alpha: float = 0.0,
        regularised: bool = True,
        group=None,
    ) -> None:
        super().__init__(num_labels, embedding_size, temperature, group)
        checks.number("alpha", alpha)
        self.alpha, self.regularised = alpha, regularised

    def of_prototypes(self, embeddings: Tensor, sets: LabelSets, prototypes: Tensor) -> Tensor:
        dtype, scale = statistics_dtype(embeddings), 1 / self.temperature
        everything, universe = torch.cat([embeddings, prototypes]), sets.beside(sets.single())
        share = subset_share(self.alpha)
        counts = per_label(universe, share, dtype) * universe.sizes[universe.owner]
        per = torch.where(counts > 0, 1 / torch.where(counts > 0, counts, 1.0), 0.0)

        term = [Term(Reduction.LOGSUMEXP, scale=scale)]
        (total,) = pair_reduce(everything, None, term, normalize=True)

        def pulled(panel: RowPanel, total: Tensor) -> list[Tensor]:
            weights = balanced_weights(universe, share, per, panel.row)
            mass = weights.sum(1)
            if self.regularised:  # [p - w]_+ beside w: a positive's weight is max(p, w)
                p = torch.exp(panel.s.detach() * scale - total[:, None])
                weights = torch.where(weights > 0, weights.maximum(p), 0.0)
            return [(weights * panel.s).sum(1), mass]

        pull, mass = row_reduce(everything, None, pulled, rows=[total.detach()], normalize=True, copies=12)
        losses = mass * torch.where(mass > 0, total, 0.0) - scale * pull
        return losses.sum() / (mass > 0).sum().clamp_min(1)
