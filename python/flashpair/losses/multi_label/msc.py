"""MSC and its regularised form: labels of a sample balanced against one another, prototypes among the references."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...algebra import log_add_exp
from ...pairs import segment_sum
from ...primitives import pair_reduce
from ...request import statistics_dtype
from ...terms import Reduction, Term
from .base import PrototypeLoss
from .label_sets import LabelSets, Sharing
from .shared import listed, pull_within, unit_rows
from .weights import subset_share, union_share


class MSCLoss(PrototypeLoss):
    """Multi-label SupCon in which every label of a sample has the same weight, its prototype included.

        n_ic = 1 + α Σ_{j != i: c in y_j} 1 / |y_i ∪ y_j|
        w_ij = Σ_{c in y_i and y_j} (α / |y_i ∪ y_j|) / n_ic,   w_ic = 1 / n_ic for the prototypes of y_i
        l_i  = 1 / |y_i|  [ Σ_j w_ij (Z_i - s_ij / T) + Σ_c w_ic (Z_i - s_ic / T) ]
        Z_i  = log( Σ_c e^{s_ic / T} + β Σ_{j != i} e^{s_ij / T} )

    of unit vectors; mean over the batch, a sample without labels contributes 0. Three tensors (B, B, C) in the authors'
    code; here two passes for Z and products with the sparse matrix of w, some rows of it at a time.

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
        union = union_share(self.alpha)
        per = 1 / (1 + sets.per_label(union, dtype))
        term = [Term(Reduction.LOGSUMEXP, scale=scale)]
        (of_batch,) = pair_reduce(embeddings, None, term, normalize=True)
        (of_prototypes,) = pair_reduce(embeddings, prototypes, term, normalize=True)
        total = log_add_exp(of_batch + torch.log(of_batch.new_tensor(self.beta)), of_prototypes)
        size, ones = sets.sizes.to(dtype), torch.ones_like(per)
        per = per / size[sets.owner]

        def both(p: Sharing) -> Tensor:  # a sum over the labels that are shared is a sum over both sides' labels
            weights = union(p.shared, size[p.row], size[p.other]) * (p.sums[0] + p.sums[1])
            return torch.where(p.row == p.other, 0.0, weights)

        x, chunks = unit_rows(embeddings), sets.sharing(sets, dtype, [(per, ones), (ones, per)])
        pull = pull_within(x, chunks, both) + (x * sets.mixture(unit_rows(prototypes), per)).sum()
        # The weights of a sample sum to its number of labels.
        return (torch.where(size > 0, total, 0.0).sum() - scale * pull) / len(size)


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
        size = universe.sizes.to(dtype)
        others = (
            (universe.counts[universe.label] - 1).to(dtype) if self.alpha == 0 else universe.per_label(share, dtype)
        )
        counts = others * size[universe.owner]
        usable = counts > 0
        per, ones = torch.where(usable, 1 / torch.where(usable, counts, 1.0), 0.0), torch.ones_like(counts)
        mass = segment_sum(usable.to(dtype) / size[universe.owner], universe.owner, universe.rows)

        (total,) = pair_reduce(everything, None, [Term(Reduction.LOGSUMEXP, scale=scale)], normalize=True)
        x, known = unit_rows(everything), total.detach()

        def both(p: Sharing) -> Tensor:
            s = scale * listed(x, p) if self.regularised else None
            weights = 0.0
            for i, j, sums in ((p.row, p.other, p.sums[0]), (p.other, p.row, p.sums[1])):
                of_side = share(p.shared, size[i], size[j]) * sums
                if s is not None:  # [p - w]_+ beside w: a positive's weight is max(p, w)
                    of_side = torch.where(of_side > 0, of_side.maximum(torch.exp(s - known[i])), 0.0)
                weights = weights + of_side
            return torch.where(p.row == p.other, 0.0, weights)

        beside = universe.rows // 16 if self.regularised else 0
        pull = pull_within(x, universe.sharing(universe, dtype, [(per, ones), (ones, per)], beside), both)
        losses = mass * torch.where(mass > 0, total, 0.0)
        return (losses.sum() - scale * pull) / (mass > 0).sum().clamp_min(1)
