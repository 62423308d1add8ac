"""ListNet: the softmax of the scores towards the softmax of the targets."""

from __future__ import annotations

import torch
from torch import Tensor

from ...pairs import segment_sum
from .scores import ScoreLoss


class ListNetLoss(ScoreLoss):
    """`mean over lists of  -Σ_i softmax(y)_i log softmax(a)_i`. O(n), no pairs.

    Args:
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Source: Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007, equation 6 with
    top-one probabilities (allRank adds 1e-10 inside the logarithm).

    Example:
        >>> import torch
        >>> from flashpair.losses import ListNetLoss
        >>> round(float(ListNetLoss()(torch.zeros(3), torch.tensor([2, 1, 1]))), 4)  # log 3
        1.0986
    """

    def __init__(self, group=None) -> None:
        super().__init__(group=group)

    def of(self, scores: Tensor, targets: Tensor, lists: Tensor) -> Tensor:
        known, owner = lists.unique(return_inverse=True)

        def logs(values: Tensor) -> Tensor:
            """(n,) log-softmax of each item in its list."""
            top = values.detach().new_full((len(known),), -torch.inf).scatter_reduce(0, owner, values.detach(), "amax")
            shifted = values - top[owner]
            return shifted - segment_sum(shifted.exp(), owner, len(known)).log()[owner]

        return -(logs(targets).exp() * logs(scores)).sum() / max(len(known), 1)
