"""What the ranking losses share: a score and a target for each item, items in lists."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ...request import statistics_dtype
from ..group import InGroup


class ScoreLoss(InGroup, nn.Module):
    """Base: `loss(scores, targets, lists=None)`; only items of one list are compared."""

    row_groups = (("scores", "targets", "lists"),)

    def forward(self, scores: Tensor, targets: Tensor, lists: Tensor | None = None) -> Tensor:
        """The loss of scored items.

        Args:
            scores: (n,) float32, float64, bfloat16 or float16.
            targets: (n,) of any number type, compared in the scores' precision (float32 or float64).
            lists: (n,) int64, which list an item is in. Default: all in one.

        Returns:
            0-d loss in float32 (float64 for float64); 0 where nothing can be compared.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {"scores": scores, "targets": targets, "lists": lists})
        targets = targets.detach() if isinstance(targets, Tensor) else targets
        lists, zero, scores, targets = checked(lists, scores=scores, targets=targets)
        return (self.of(scores, targets, lists) if len(scores) else scores.sum()) + zero

    def of(self, scores: Tensor, targets: Tensor, lists: Tensor) -> Tensor:
        """The loss of checked items in the statistics dtype."""
        raise NotImplementedError


def checked(lists: Tensor | None, *, scores: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
    """Lists, a zero, then the scores and others in the statistics dtype.

    The zero is NaN where one of the values is not finite, which must not hide behind a comparison that is false.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.
    """
    if not isinstance(scores, Tensor) or scores.dtype not in checks.DTYPES or scores.dim() != 1:
        got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a 1-D floating-point tensor; got {got}")
    for name, value in others.items():
        if not isinstance(value, Tensor) or value.shape != scores.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must have shape {tuple(scores.shape)}; got {got}")
    checks.same_device("scores", scores, lists=lists, **others)
    lists = torch.zeros(len(scores), dtype=torch.int64, device=scores.device) if lists is None else lists
    checks.labels("lists", lists, len(scores))
    values = [v.to(statistics_dtype(scores)) for v in (scores, *others.values())]
    return lists, 0 * sum(v.detach().sum() for v in values), *values
