"""How related labels are, from the sets that they appear in."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from ... import checks
from .label_sets import LabelSets


class LabelSimilarity(Enum):
    """From p_c, p_cd: the shares of samples that have label c, and both c and d."""

    JACCARD = "jaccard"  # p_cd / (p_c + p_d - p_cd)
    NPMI = "npmi"  # [log(p_cd / (p_c p_d)) / -log p_cd]_+, normalised pointwise mutual information


@torch.no_grad()
def label_similarity(labels: Tensor | LabelSets, kind: LabelSimilarity = LabelSimilarity.JACCARD) -> Tensor:
    """S in [0, 1] of `NWSLoss`: how related two labels are, from a training set's labels; see `LabelSimilarity`.

    Args:
        labels: (N, C) multi-hot, of any number type or bool, or `LabelSets`.
        kind: Default: Jaccard.

    Returns:
        (C, C) float32, 1 on the diagonal; 0 for two labels that never meet, also where one is nobody's (the authors'
        code gives NaN there, and 0 on NPMI's diagonal, which the loss does not read).

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: no paper is known. koba-84/Multi-label-contrastive-comprehensive, src/trainer/loss/loss_contrastive_nws.py,
    "jaccard" and "npmi"; its "ppmi" and "pmi_ratio" are not here.

    Example:
        >>> import torch
        >>> from flashpair.losses.multi_label.label_similarity import label_similarity
        >>> label_similarity(torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1]]))[0].tolist()
        [1.0, 0.5, 0.0]
    """
    checks.member("kind", kind, LabelSimilarity)
    if not isinstance(labels, LabelSets):
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels must be LabelSets or a multi-hot tensor of shape (samples, labels); got {got}")
        labels = LabelSets.of("labels", labels, labels.shape[0], labels.device)
    both, each = labels.together(), labels.counts.double()
    if kind == LabelSimilarity.JACCARD:
        found = both / (each[:, None] + each[None] - both).clamp_min(1)
    else:
        p = both / max(labels.rows, 1)
        gain = (both * labels.rows / (each[:, None] * each[None]).clamp_min(1)).log()
        found = torch.where(p < 1, gain / -p.log(), 1.0)  # 0 / 0: all samples have both
        found = torch.where(both > 0, found, 0.0).clamp_min(0)
    return found.fill_diagonal_(1.0).float()
