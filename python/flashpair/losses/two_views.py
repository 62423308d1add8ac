"""Two views of a batch: all pairs among 2 B embeddings, of which two are of one sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..distributed.sharded import Sharded, current
from ..primitives import pair_reduce
from ..request import statistics_dtype
from ..terms import Mask, Reduction, Term
from .arguments import check_matched, poisoned
from .group import InGroup


def side_by_side(views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Views (B, D) one after the other (V B, D), and of which sample each row is (V B,); each rank's stay with it."""
    everything, sample = views[0], torch.arange(views[0].shape[0], device=views[0].device)
    if not isinstance(everything, Sharded):
        return torch.cat(list(views)), sample.repeat(len(views))
    for view in views[1:]:
        everything = everything.beside(view)
    return everything, torch.cat([part for part in sample.split(views[0].sizes) for _ in views])


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
        self.both, self.sample = side_by_side((first, second))
        sizes = first.sizes if isinstance(first, Sharded) else [self.rows]
        sides = [torch.full((n,), k, device=first.device) for n in sizes for k in range(2)]
        self.side = torch.cat(sides)

    def table(self, values: Tensor) -> Tensor:
        """(B, 2) of values (2 B,), a column for each view."""
        return values.new_zeros(self.rows, 2).index_put((self.sample, self.side), values)

    def reduce(self, *terms: Term) -> tuple[Tensor, ...]:
        """Terms over all pairs of unit vectors; SAME is the positive, DIFFERENT the 2 B - 2 negatives."""
        return pair_reduce(self.both, terms=terms, labels=self.sample, normalize=True)

    def logits(self, scale: float | Tensor) -> tuple[Tensor, ...]:
        """(2 B,) log-sum over the negatives and the positive's logit."""
        return self.reduce(*self.logit_terms(scale))

    @staticmethod
    def logit_terms(scale: float | Tensor) -> list[Term]:
        """The terms of `logits`."""
        negatives = Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=scale)
        return [negatives, Term(Reduction.SUM, mask=Mask.SAME, scale=scale)]


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
        self.check(first, second)
        if first.shape[0] == 0:
            return nothing(first, second)
        return poisoned(self.of(first, second), first, second, *self.parameters())

    def check(self, first: Tensor, second: Tensor) -> None:
        """Whether the batches are what the loss takes."""
        check_matched(first, second, ("first", "second"))

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of two batches that are not empty."""
        raise NotImplementedError


def nothing(*embeddings: Tensor) -> Tensor:
    """The loss of an empty batch: 0, with a graph."""
    return sum((e.to(statistics_dtype(e)) * 0).sum() for e in embeddings)
