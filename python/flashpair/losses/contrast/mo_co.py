"""MoCo v3: symmetric InfoNCE of queries and momentum keys, without a queue."""

from __future__ import annotations

from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ..arguments import check_matched, constant, without_gradient
from ..group import InGroup
from ..info_nce import info_nce_loss


class MoCoV3Loss(InGroup, nn.Module):
    """`2 T · ( InfoNCE(q1, k2) + InfoNCE(q2, k1) )` with keys, and a factor 2 T, that take no gradient.

    MoCo v1 and v2 are `InfoNCELoss(in_batch_negatives=False)` with a `KeyQueue`.

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 1, the authors' flag; their recipes: 0.2.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`: keys of all its ranks.
            Default: none.

    Raises:
        TypeError, ValueError: on a temperature that is not positive.

    Source: Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021, algorithm 1;
    facebookresearch/moco-v3, moco/builder.py.

    Example:
        >>> import torch
        >>> from flashpair.losses import MoCoV3Loss
        >>> q = torch.eye(2)
        >>> round(float(MoCoV3Loss()(q, q, q, q)), 4)  # 4 (log(e + 1) - 1)
        1.253
    """

    row_groups = (("first_query", "second_query", "first_key", "second_key"),)

    def __init__(self, temperature: float | Tensor = 1.0, group=None) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        self.temperature = temperature

    def forward(self, first_query: Tensor, second_query: Tensor, first_key: Tensor, second_key: Tensor) -> Tensor:
        """The loss of the predictions (B, D) of two views and the momentum encoder's projections (B, D) of them.

        Returns:
            0-d loss in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        tensors = dict(zip(self.row_groups[0], (first_query, second_query, first_key, second_key), strict=True))
        if self.group is not None and current() is None:
            return self.over_group(self.forward, tensors)
        for name, rows in tensors.items():
            check_matched(first_query, rows, ("first_query", name))
        of = lambda query, key: info_nce_loss(query, without_gradient(key), temperature=self.temperature)  # noqa: E731
        return 2 * constant(self.temperature) * (of(first_query, second_key) + of(second_query, first_key))
