"""Unified negative pairs: the negative pairs of the batch beside the other classes' weights, in one softmax."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import checks
from ..algebra import log_add_exp
from ..distributed.sharded import current
from ..losses.arguments import constant
from ..order_statistics import count_pairs, order_statistics
from ..primitives import pair_reduce
from ..terms import Mask, Reduction, Term
from .head import ClassHead

_BOUND = 1.5  # beyond every cosine


def negative_quantiles(x: Tensor, labels: Tensor, fractions: tuple[float, ...] = (0.25, 0.75)) -> tuple[Tensor, Tensor]:
    """Order statistics of the cosines of all negative pairs a < b, y_a ≠ y_b, of which none is stored.

    Of L sorted cosines those at int(fraction L), exactly: counting passes narrow an interval of floats sixteenfold each
    (8 in float32, 17 in float64) until one is left. Nothing waits for the device.

    Args:
        x: (B, D) embeddings.
        labels: (B,) int64.
        fractions: in [0, 1). Default: quartiles.

    Returns:
        (values (n,), number of negative pairs ()), without gradient; the values are arbitrary where there are none.

    Example:
        >>> import torch
        >>> from flashpair.heads import negative_quantiles
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # cosines 0, -1, 0
        >>> values, count = negative_quantiles(x, torch.tensor([0, 1, 2]))
        >>> values.tolist(), count.item()
        ([-1.0, 0.0], 3.0)
    """
    checks.embeddings("x", x)
    checks.labels("labels", labels, x.shape[0])
    for k, fraction in enumerate(fractions):
        checks.number(f"fractions[{k}]", fraction, low=0.0, high=1.0)
    how = {"labels": labels, "normalize": True}
    pairs = (count_pairs(x, None, Mask.DIFFERENT, [None], **how)[0] / 2).round()  # every pair was counted twice
    ranks = torch.stack([2 * (fraction * pairs).floor() for fraction in fractions])
    return order_statistics(x, None, Mask.DIFFERENT, ranks, _BOUND, **how), pairs


class UNPG(nn.Module):
    """A margin head whose every row also competes with the negative pairs of the batch.

        S = {cos(x_a, x_b): a < b, y_a ≠ y_b},   kept where Q1 - r IQR <= s <= Q3 + r IQR      (box-and-whisker fence)
        loss = mean_i [ log(Σ_j exp(z_ij) + Σ_{s kept} exp(scale s)) - z_{i,y_i} ]

    The sum over pairs is one number for all rows, so the B × (C + B²/2) logits are a `logaddexp`. The quartiles are
    exact (see `negative_quantiles`) and have no gradient; the kept similarities have. Three streamed passes over pairs
    beside the head's.

    Args:
        head: a head over cosines, with a margin or `normalize=True`, without bias and soft cap.
        whisker: r >= 0. Default 1.5.

    Raises:
        TypeError, ValueError: on another head, a bad whisker.

    Source: Jung et al., "Unified Negative Pair Generation toward Well-discriminative Feature Space for Face
    Recognition", BMVC 2022, equations 6-9 and its public code.

    Example:
        >>> import torch
        >>> from flashpair.heads import UNPG, CosFace
        >>> loss_of = UNPG(CosFace(num_classes=100, embedding_size=8))
        >>> loss_of(torch.randn(4, 8), torch.tensor([0, 1, 1, 99])).shape
        torch.Size([])
    """

    def __init__(self, head: ClassHead, whisker: float = 1.5) -> None:
        super().__init__()
        if not isinstance(head, ClassHead):
            raise TypeError(f"head must be a flashpair.heads.ClassHead; got {type(head).__name__}")
        if not head.normalize or head.bias is not None or head.softcap is not None:
            raise ValueError("head must be over cosines: with a margin or normalize=True, without bias and softcap")
        checks.number("whisker", whisker, low=0.0)
        self.head, self.whisker = head, whisker

    def negatives(self, x: Tensor, labels: Tensor, scale: float | Tensor) -> Tensor:
        """() logsumexp of scale (s - 1) over the kept negative pairs; -inf without any."""
        quartiles, _ = negative_quantiles(x, labels)
        reach = self.whisker * (quartiles[1] - quartiles[0])
        low, high = quartiles[0] - reach, quartiles[1] + reach
        # Inclusive; (a, b) and (b, a) may be rounded apart and must fall on one side.
        rounding = 4 * torch.finfo(low.dtype).eps
        inside = {"above": low - rounding, "below": high + rounding}
        shifted = Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=scale, offset=-constant(scale), **inside)
        (rows,) = pair_reduce(x, terms=[shifted], labels=labels, normalize=True)
        # Every pair is in the rows of both.
        empty = (rows == -torch.inf).all()
        total = torch.where(empty, torch.zeros_like(rows), rows).logsumexp(0) - math.log(2)
        return torch.where(empty, -torch.inf, total)

    def forward(self, embeddings: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of a batch; arguments as the head's. Rows of `ignore_index` are in no pair: finding them waits for a
        GPU, unless the head has none (`ignore_index=None`).
        """
        if self.head.group is not None and current() is None:
            tensors = {"embeddings": embeddings, "labels": labels, "sample_weight": sample_weight}
            return self.head.over_group(self.forward, tensors)
        logits = self.head.logits(embeddings, labels)
        scale = self.head.scale if self.head.margin is None else self.head.margin.row_scale(embeddings)
        if isinstance(scale, Tensor) and scale.dim():
            raise ValueError("head must have one scale for all rows")
        x = self.head.as_embeddings(embeddings)
        if self.head.ignore_index is not None:
            x, labels = x[logits.valid], labels[logits.valid]
        negatives = self.negatives(x, labels, scale)
        merged = replace(logits, rivals=log_add_exp(logits.rivals, negatives))
        return self.head.finish(merged, embeddings, sample_weight)
