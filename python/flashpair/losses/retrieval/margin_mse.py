"""MarginMSE: a teacher's margin between the positive and the negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from ...distributed.sharded import all_rows
from ...pairs import pair_similarity
from ..arguments import poisoned
from ..two_views import nothing
from .sentences import SentenceLoss


class MarginMSELoss(SentenceLoss):
    """Mean of `( <q_i, d_i> - <q_i, n_ik> - margin_ik )²` over queries and their negatives.

    Columns: queries, positives, one or more negatives; labels (B,) or (B, negatives) are the teacher's margins.
    sentence-transformers' class. No pairs beyond the listed ones.

    Args:
        model: turns features into `{"sentence_embedding": ...}`. Default: none, columns are embeddings.
        normalize: cosines instead of dot products. Default False.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Source: Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation", 2020, equation 6.

    Example:
        >>> import torch
        >>> from flashpair.losses import MarginMSELoss
        >>> q = d = torch.eye(2)
        >>> float(MarginMSELoss()([q, d, -d], torch.tensor([2.0, 1.0])))
        0.5
    """

    def __init__(self, model=None, normalize: bool = False, group=None) -> None:
        super().__init__(model, group)
        self.normalize = normalize

    def of(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        if len(embeddings) < 3:
            raise ValueError(f"embeddings must hold at least 3 columns; got {len(embeddings)}")
        query, *documents = embeddings
        rows = query.shape[0]
        checks.floating("labels", labels)
        if labels.shape not in ((rows,), (rows, len(documents) - 1)) or (labels.dim() == 1 and len(documents) > 2):
            raise ValueError(f"labels must have shape ({rows}, {len(documents) - 1}); got {tuple(labels.shape)}")
        checks.same_device("embeddings", query, labels=labels)
        if rows == 0:
            return nothing(*embeddings)
        index = torch.arange(rows, device=query.device)
        own, *others = (pair_similarity(query, d, index, index, normalize=self.normalize) for d in documents)
        margins = own[:, None] - torch.stack(others, 1)
        wanted = all_rows(labels).reshape(rows, -1).to(margins.dtype)
        return poisoned((margins - wanted).square().mean(), *embeddings)
