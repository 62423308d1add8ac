"""Two views of a batch: all pairs among 2 B embeddings, of which two are of one sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed.sharded import Sharded, current
from ..primitives import pair_reduce
from ..request import statistics_dtype
from ..terms import Mask, Reduction, Term
from .arguments import check_matched, poisoned
from .group import InGroup


class TwoViews:
    """Both views as one set of embeddings; the positive of a row is the other view of its sample.

    Args:
        first, second: (B, D) row i of both is of sample i.
    """

    both: Tensor  # (2 B, D)
    sample: Tensor  # (2 B,) int64, of each row: the labels of the pairs
    side: Tensor  # (2 B,) int64, 0 or 1: which view

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.rows = first.shape[0]
        sample = torch.arange(self.rows, device=first.device)
        if isinstance(first, Sharded):  # each rank's views stay with it
            parts = sample.split(first.sizes)
            self.sample, self.both = torch.cat([p for p in parts for _ in range(2)]), first.beside(second)
            self.side = torch.cat([torch.full_like(p, k) for p in parts for k in range(2)])
        else:
            self.sample, self.both = sample.repeat(2), torch.cat([first, second])
            self.side = torch.arange(2, device=first.device).repeat_interleave(self.rows)

    def table(self, values: Tensor) -> Tensor:
        """(B, 2) of values (2 B,), a column for each view."""
        return values.new_zeros(self.rows, 2).index_put((self.sample, self.side), values)

    def reduce(self, *terms: Term) -> tuple[Tensor, ...]:
        """Terms over all pairs of unit vectors; SAME is the positive, DIFFERENT the 2 B - 2 negatives."""
        return pair_reduce(self.both, terms=terms, labels=self.sample, normalize=True)

    def logits(self, scale, *extra: Term) -> tuple[Tensor, ...]:
        """(2 B,) log-sum over the negatives and the positive's logit, both less the largest logit there can be."""
        terms = {"scale": scale, "offset": -(scale.detach() if isinstance(scale, Tensor) else scale)}
        negatives = Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, **terms)
        return self.reduce(negatives, Term(Reduction.SUM, mask=Mask.SAME, **terms), *extra)


class MatchedLoss(InGroup, nn.Module):
    """Base of losses of two batches whose rows belong together: `loss(first, second)`."""

    row_groups = (("first", "second"),)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            first, second: (B, D) float32, float64, bfloat16 or float16; row i of both is of one sample.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {"first": first, "second": second})
        check_matched(first, second, ("first", "second"))
        if first.shape[0] == 0:
            return nothing(first, second)
        return poisoned(self.of(first, second), first, second)

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of two batches that are not empty."""
        raise NotImplementedError


def nothing(*embeddings: Tensor) -> Tensor:
    """The loss of an empty batch: 0, with a graph."""
    return sum((e.to(statistics_dtype(e)) * 0).sum() for e in embeddings)
