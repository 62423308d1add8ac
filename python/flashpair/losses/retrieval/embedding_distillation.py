"""Distillation of a teacher's scores of each query's documents, among the documents of the batch."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn

from ... import checks
from ...algebra import log_add_exp
from ...distributed.sharded import all_rows
from ...pairs import pair_similarity
from ...primitives import pair_reduce
from ...terms import Mask, Reduction, Term
from ..arguments import poisoned
from ..two_views import nothing, side_by_side
from .sentences import SentenceLoss


class DistillationKind(Enum):
    """What is learned from the teacher's weights t_i = softmax_g(teacher's scores of the documents d_ig of query i)."""

    KL_DIV = "kl_div"  # -Σ_g t_ig log softmax_g(s_ig), and InfoNCE of the first document
    M3_KD = "m3_kd_loss"  # Σ_g t_ig InfoNCE of d_ig without d_i1 ... d_i,g-1


class EmbeddingDistillationLoss(SentenceLoss):
    """InfoNCE of query i and its documents d_i1, ..., d_iG that a teacher has scored (columns 1, ..., G).

        s = cosine / T,   t_i = softmax over g of the teacher's scores
        L_ig = log( Σ_{documents d of other queries} e^{s(q_i, d)} + Σ_{h ≥ g} e^{s_ih} ) - s_ig
        KL_DIV: mean_i [ -Σ_g t_ig log softmax_g(s_i)_g ]  +  contrastive_weight · mean_i L_i1
        M3_KD:  mean_i Σ_g t_ig L_ig

    One fused pass over the documents of other queries; the own ones join its log-sum one by one.

    Args:
        model: turns features into `{"sentence_embedding": ...}`. Default: none, columns are embeddings.
        kind: see `DistillationKind`. Default: KL_DIV.
        temperature: T > 0. Default 0.02.
        normalize: cosines; False: dot products. Default True.
        in_batch_negatives: whether documents of other queries count; False: no pass over pairs. Default True.
        contrastive_weight: ≥ 0, see KL_DIV, and 1 in the authors' code; M3_KD has no such term. Default 1.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`: documents of all its ranks.
            Default: none.

    `labels` of a call are the teacher's scores (B, G), floating point, without gradient.

    Raises:
        TypeError, ValueError: on a bad number or kind.

    Source: Chen et al., "M3-Embedding", 2024, section 3.3, its text not read; FlagEmbedding,
    abc/finetune/embedder/AbsModeling.py, where M3_KD without in-batch negatives is not defined: here it is the formula.

    Example:
        >>> import torch
        >>> from flashpair.losses import EmbeddingDistillationLoss
        >>> loss = EmbeddingDistillationLoss(temperature=1.0, in_batch_negatives=False, contrastive_weight=0.0)
        >>> q = torch.eye(2)
        >>> round(float(loss([q, q, q], torch.tensor([[3.0, 1.0], [0.0, 0.0]]))), 4)  # equal documents: log 2
        0.6931
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        kind: DistillationKind = DistillationKind.KL_DIV,
        temperature: float = 0.02,
        normalize: bool = True,
        in_batch_negatives: bool = True,
        contrastive_weight: float = 1.0,
        group=None,
    ) -> None:
        super().__init__(model, group)
        checks.member("kind", kind, DistillationKind)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        checks.number("contrastive_weight", contrastive_weight, low=0.0)
        self.kind, self.temperature, self.normalize = kind, temperature, normalize
        self.in_batch_negatives, self.contrastive_weight = in_batch_negatives, contrastive_weight

    def of(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        query, *documents = embeddings
        rows = query.shape[0]
        checks.floating("labels", labels)
        if tuple(labels.shape) != (rows, len(documents)):
            raise ValueError(f"labels must have shape ({rows}, {len(documents)}); got {tuple(labels.shape)}")
        checks.same_device("embeddings", query, labels=labels)
        if rows == 0:
            return nothing(*embeddings)
        index = torch.arange(rows, device=query.device)
        pair = [pair_similarity(query, d, index, index, normalize=self.normalize) for d in documents]
        own = torch.stack(pair, 1) / self.temperature  # (B, G)
        teacher = all_rows(labels).detach().to(own.dtype).softmax(1)
        if self.kind == DistillationKind.M3_KD:
            loss = (teacher * (self._totals(query, documents, own, index) - own)).sum(1).mean()
        else:
            loss = -(teacher * own.log_softmax(1)).sum(1).mean()
            if self.contrastive_weight:
                first = self._totals(query, documents, own, index)[:, 0] - own[:, 0]
                loss = loss + self.contrastive_weight * first.mean()
        return poisoned(loss, *embeddings)

    def _totals(self, query: Tensor, documents: list[Tensor], own: Tensor, index: Tensor) -> Tensor:
        """(B, G) log-sums over the documents of other queries and the own ones from g on."""
        near = own.flip(1).logcumsumexp(1).flip(1)
        if not self.in_batch_negatives:
            return near
        everything, sample = side_by_side(documents)
        others = Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=1 / self.temperature)
        (far,) = pair_reduce(
            query, everything, [others], labels=index, ref_labels=sample, normalize=self.normalize
        )  # fmt: skip
        return log_add_exp(far[:, None], near)
