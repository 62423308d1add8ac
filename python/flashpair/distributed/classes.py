"""Class heads whose classes are spread over ranks: each holds the weights of some, and meets the rows of all.

What is known of the classes of one rank is merged by small sums over the ranks: a maximum and a sum for a logsumexp,
the own class's similarity. The gradient of the embeddings is reduced once. That of the weights is complete where they
are, and not multiplied by the number of ranks: nobody averages them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..algebra import merge_extremes
from ..request import statistics_dtype
from ..terms import Extreme, Reduction, Term
from .passes import Enter, summed_columns
from .ranks import Ranks
from .sharded import Sharded, alone
from .sides import Side


class ShardedClasses(Sharded):
    """(C, D) weights of all ranks' classes; those of this rank take part, or `selected` ones among them."""

    selected: Tensor | None  # (S,) int64 ascending among this rank's classes; None: all
    rows: Tensor  # (S, D) of the selected classes, or all of this rank's
    update: object  # a WeightUpdate for this rank's weights, or None

    @classmethod
    def of(cls, weight: Tensor, sizes, ranks: Ranks, selected=None, rows=None, update=None) -> ShardedClasses:
        """The weights (sizes[rank], D) of this rank as part of all."""
        found = cls(weight, sizes, ranks)
        found.selected, found.rows, found.update = selected, weight if rows is None else rows, update
        return found

    def cast(self, dtype: torch.dtype) -> ShardedClasses:
        return ShardedClasses.of(
            self.local.to(dtype), self.sizes, self.ranks, self.selected, self.rows.to(dtype), self.update
        )

    def among_own(self, classes: Tensor) -> Tensor:
        """Positions of classes among those that take part here, -1 elsewhere."""
        first, end = self.range
        inside = (classes >= first) & (classes < end)
        own = torch.where(inside, classes - first, -1)
        if self.selected is None:
            return own
        at = torch.searchsorted(self.selected, own.clamp_min(0)).clamp_max(max(len(self.selected) - 1, 0))
        return torch.where(inside & (self.selected[at] == own), at, -1)


def class_statistics(
    x: Tensor, weight: ShardedClasses, labels: Tensor, terms: list[Term], index: Tensor | None, **options
) -> tuple[Tensor, ...]:
    """As `flashpair.heads.class_statistics`, for the classes of all ranks."""
    from ..heads import statistics

    ranks, rows = weight.ranks, weight.rows
    with alone():
        similarity, *found = statistics.class_statistics(
            _everyone(x, ranks), weight.local if weight.update is not None else rows,
            weight.among_own(labels), [_local(term, weight) for term in terms],
            index=None if index is None else weight.among_own(index), update=weight.update, **options,
        )  # fmt: skip
    return _total(similarity, ranks), *(_merged(t, v, ranks) for t, v in zip(terms, found, strict=True))


def listed_similarity(x: Tensor, weight: ShardedClasses, index: Tensor, normalize: bool) -> Tensor:
    """(B, K) similarities with listed classes, wherever they are; 0 for -1."""
    from ..heads import statistics

    first, end = weight.range
    own = torch.where((index >= first) & (index < end), index - first, -1)
    with alone():
        found = statistics.listed_similarity(_everyone(x, weight.ranks), weight.local, own, normalize)
    return _total(found, weight.ranks)


@torch.no_grad()
def highest(x: Tensor, weight: Tensor, k: int, first: int, ranks: Ranks, **options) -> tuple[Tensor, Tensor]:
    """The k classes of all ranks with the highest similarities: (B, k) values and classes.

    Args:
        x: (B, D) rows of all ranks. weight: (n, D) of this rank's classes, which begin at `first`.
    """
    from ..primitives import mine

    with alone():
        (found,) = mine(x, weight, [Extreme(k=min(k, weight.shape[0]))], **options)
    short = k - found.values.shape[1]
    values = nn.functional.pad(found.values, (0, short), value=-torch.inf)
    classes = nn.functional.pad(torch.where(found.indices < 0, -1, found.indices + first), (0, short), value=-1)
    everyone = [ranks.gather(v[None], [1] * ranks.size) for v in (values, classes)]
    best = everyone[0][0], everyone[1][0]
    for r in range(1, ranks.size):
        best = merge_extremes(Extreme(k=k), best, (everyone[0][r], everyone[1][r]))
    return best


def _everyone(x: Tensor, ranks: Ranks) -> Tensor:
    """(B, D) rows of all ranks, whose gradient is the sum of what the ranks' classes say."""
    side = Side(x, ranks)
    whole = x.data_of_all() if side.sharded else x
    return Enter.apply(side.tensor, lambda _: whole, lambda g: summed_columns(side, g, statistics_dtype(whole)))


def _local(term: Term, weight: ShardedClasses) -> Term:
    """The term for this rank's classes; gradients of its parameters are summed over the ranks."""
    ranks, (first, end) = weight.ranks, weight.range

    def cut(value: Tensor) -> Tensor:
        own = value[first:end]
        return own if weight.selected is None else own[weight.selected]

    def back(gradient: Tensor, rows: int) -> Tensor:
        whole = gradient.new_zeros(rows)
        if weight.selected is None:
            whole[first:end] = gradient
        else:
            whole[first:end][weight.selected] = gradient
        return ranks.total(whole)

    changed = {}
    for name in ("scale", "offset"):
        value = getattr(term, name)
        if isinstance(value, Tensor):
            changed[name] = Enter.apply(value, lambda v: v, ranks.total)
    for name in ("other_offset", "weight"):
        value = getattr(term, name)
        if value is not None:
            changed[name] = Enter.apply(value, cut, lambda g, n=value.shape[0]: back(g, n))
    return replace(term, **changed)


def _total(value: Tensor, ranks: Ranks) -> Tensor:
    return Enter.apply(value, ranks.total, lambda g: g)


def _merged(term: Term, value: Tensor, ranks: Ranks) -> Tensor:
    """(B,) a row's statistic over the classes of all ranks."""
    if term.reduction in (Reduction.SUM, Reduction.COUNT):
        return _total(value, ranks)
    if term.reduction == Reduction.LOGSUMEXP:
        return _LogSumExp.apply(value, ranks)
    raise ValueError(f"a formula that needs the {term.reduction.name} of the logits cannot be used with group")


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, ranks: Ranks):
        top = ranks.total(value, largest=True)
        top = torch.where(top == -torch.inf, 0.0, top)
        total = ranks.total(torch.exp(value - top)).log() + top
        ctx.save_for_backward(value, total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        value, total = ctx.saved_tensors
        empty = total == -torch.inf
        return gradient * torch.where(empty, 0.0, torch.exp(value - torch.where(empty, 0.0, total))), None
