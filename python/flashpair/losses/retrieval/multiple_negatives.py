"""Multiple negatives ranking: each query's document among all documents of the batch, in up to four directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import checks
from ...algebra import log_add_exp
from ...pairs import pair_similarity
from ...primitives import pair_reduce
from ...terms import Mask, Reduction, Term
from ..arguments import poisoned
from ..two_views import nothing, side_by_side
from .sentences import SentenceLoss

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


class MultipleNegativesRankingLoss(SentenceLoss):
    """InfoNCE of queries q_i, documents d_i and hard negatives n_i1, n_i2, ... (columns 0, 1, 2, ...).

        log-sums of row i, over s = scale · cosine:
          query_to_doc    q_i with all d_j and n_jk           query_to_query  q_i with all q_j, j != i
          doc_to_query    d_i with all q_j                    doc_to_doc      d_i with all d_j and n_jk, j != i
        joint:            loss = mean_i [ LSE of the chosen log-sums  -  s(q_i, d_i) ]
        per_direction:    loss = mean_i [ mean of the chosen log-sums  -  s(q_i, d_i) ]

    Hardness adds `strength · cosine`, without gradient, to logits of query_to_doc: those of other queries' documents
    (in_batch_negatives), of the query's own hard negatives (hard_negatives), or of both (all_negatives).
    sentence-transformers' class: same names and defaults. All four directions, joint: the GTE loss; query_to_doc and
    doc_to_query per direction: the symmetric loss.

    Args:
        model: turns features into `{"sentence_embedding": ...}`. Default: none, columns are embeddings.
        scale: 1 / temperature > 0. Default 20.
        normalize: cosines; False: dot products. Default True.
        directions: some of the four, query_to_doc among them. Default: that one.
        partition_mode: "joint" or "per_direction". Default: joint.
        hardness_mode, hardness_strength: see above. Default: none and 0.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`: columns of all its ranks.
            Default: none.

    Raises:
        TypeError, ValueError: on bad numbers or modes.

    Source: Henderson et al., "Efficient Natural Language Response Suggestion for Smart Reply", 2017; Li et al.,
    "Towards General Text Embeddings with Multi-stage Contrastive Learning", 2023, equation 3; Lan et al., "LLaVE",
    2025, equation 5; sentence-transformers, multiple_negatives_ranking.py.

    Example:
        >>> import torch
        >>> from flashpair.losses import MultipleNegativesRankingLoss
        >>> query = document = torch.eye(3)
        >>> round(float(MultipleNegativesRankingLoss(scale=1.0)([query, document])), 4)  # log(e + 2) - 1
        0.5514
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        scale: float = 20.0,
        normalize: bool = True,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        group=None,
    ) -> None:
        super().__init__(model, group)
        checks.number("scale", scale, low=0.0, open_low=True)
        checks.number("hardness_strength", hardness_strength, low=0.0)
        directions = tuple(directions)
        if not set(directions) <= set(DIRECTIONS) or "query_to_doc" not in directions:
            raise ValueError(f"directions must be query_to_doc and others of {DIRECTIONS}; got {directions}")
        if len(set(directions)) < len(directions):
            raise ValueError(f"directions must not repeat; got {directions}")
        if partition_mode == "per_direction" and not set(directions) <= {"query_to_doc", "doc_to_query"}:
            raise ValueError(
                "partition_mode must be 'joint' with query_to_query or doc_to_doc, whose log-sums lack the positive; "
                f"got {partition_mode!r} and {directions}"
            )
        for name, value, allowed in (
            ("partition_mode", partition_mode, ("joint", "per_direction")), ("hardness_mode", hardness_mode, HARDNESS)
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {value!r}")
        self.scale, self.normalize, self.directions, self.partition_mode = scale, normalize, directions, partition_mode
        self.hardness_mode, self.hardness_strength = hardness_mode, hardness_strength

    def of(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        query, positive, *negatives = embeddings
        rows = query.shape[0]
        if rows == 0:
            return nothing(*embeddings)
        documents, sample = side_by_side([positive, *negatives])
        index = torch.arange(rows, device=query.device)
        others = {"labels": index, "ref_labels": sample}
        own = self.scale * self._pair(query, positive)
        sums = [self._query_to_doc(query, documents, negatives, own, others)]
        for direction in self.directions:
            if direction == "query_to_query":
                sums.append(self._rivals(query, None))
            elif direction == "doc_to_query":
                sums.append(self._rivals(positive, query))
            elif direction == "doc_to_doc":
                sums.append(self._rivals(positive, documents, **others))
        if self.partition_mode == "joint":
            total = sums[0]
            for more in sums[1:]:
                total = log_add_exp(total, more)
        else:
            total = torch.stack(sums).mean(0)
        return poisoned((total - own).mean(), *embeddings)

    def _rivals(self, x: Tensor, y: Tensor | None, hardness: float = 0.0, **others: Tensor) -> Tensor:
        """(B,) log-sum of a direction, over the documents of other queries where `others` says whose they are."""
        mask = Mask.DIFFERENT if others else Mask.ALL
        term = Term(Reduction.LOGSUMEXP, mask=mask, scale=self.scale + hardness)
        (found,) = pair_reduce(x, y, [term], normalize=self.normalize, **others)
        return self._softened(found, hardness)

    def _softened(self, logits: Tensor, hardness: float) -> Tensor:
        """The slope of `scale` under the value of `scale + hardness`."""
        if not hardness:
            return logits
        constant = torch.where(logits.detach() == -torch.inf, 0.0, logits.detach())
        return logits.detach() + (logits.clamp_min(torch.finfo(logits.dtype).min) - constant) * (
            self.scale / (self.scale + hardness)
        )

    def _pair(self, x: Tensor, y: Tensor) -> Tensor:
        index = torch.arange(x.shape[0], device=x.device)
        return pair_similarity(x, y, index, index, normalize=self.normalize)

    def _query_to_doc(self, query, documents, negatives, own, others) -> Tensor:
        far, near = (
            self.hardness_strength if self.hardness_mode in (mode, "all_negatives") else 0.0
            for mode in ("in_batch_negatives", "hard_negatives")
        )
        total = log_add_exp(self._rivals(query, documents, far, **others), own)
        for negative in negatives:
            logits = (self.scale + near) * self._pair(query, negative)
            total = log_add_exp(total, self._softened(logits, near))
        return total
