"""Feature transformation: harder positives and more diverse negatives from the features themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import all_rows, by_row, current
from ...random import draw_seed
from ..arguments import check_matched, without_gradient
from ..group import InGroup
from ..info_nce import info_nce_loss


def beta_like(like: Tensor, alpha: float, generator: torch.Generator | None = None) -> Tensor:
    """Beta(α, α) numbers of a tensor's shape."""
    both = torch.full((*like.shape, 2), alpha, dtype=torch.float32, device=like.device)
    return torch._sample_dirichlet(both, generator)[..., 0].to(like.dtype)


class FeatureTransformationLoss(InGroup, nn.Module):
    """MoCo's loss on transformed features: positives pushed apart, negatives mixed with one another.

        λ = 1 + Beta(α₊, α₊):  q' = λ q + (1 - λ) k,   k' = λ k + (1 - λ) q      for each sample and feature
        μ = Beta(α₋, α₋):      n' = μ n + (1 - μ) n_π, π a permutation           for each key of the queue and feature
        loss = mean_i [ LSE( <q'_i, k'_i>, <q'_i, n'_1>, ... ) / T  -  <q'_i, k'_i> / T ]

    q, k and the queue are unit vectors that the caller made; what is transformed is not normalised again. k and the
    queue take no gradient, but k' has q's. Enqueue the keys as they were. Random numbers are torch's.

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 0.07.
        positive_alpha: α₊ > 0, or None for positives as they are. Default 2.
        negative_alpha: α₋ > 0, or None for a queue as it is. Default 1.6.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`; the queue is a tensor that
            all ranks hold alike, or the rows of a `KeyQueue` with the same group. Default: none.

    Raises:
        TypeError, ValueError: on a number out of its range.

    Source: Zhu et al., "Improving Contrastive Learning by Visualizing Feature Transformation", ICCV 2021, sections 4.1
    and 4.2; DTennant/CL-Visualizing-Feature-Transformation.

    Example:
        >>> import torch
        >>> from flashpair.losses import FeatureTransformationLoss
        >>> q, queue = torch.eye(2), -torch.eye(2)
        >>> loss = FeatureTransformationLoss(1.0, negative_alpha=None)  # equal q and k: extrapolation changes nothing
        >>> round(float(loss(q, q, queue)), 4)  # log(e + 1 / e + 1) - 1
        0.4076
    """

    row_groups = (("query", "key"),)

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        positive_alpha: float | None = 2.0,
        negative_alpha: float | None = 1.6,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        for name, value in (("positive_alpha", positive_alpha), ("negative_alpha", negative_alpha)):
            if value is not None:
                checks.number(name, value, low=0.0, open_low=True)
        self.temperature, self.positive_alpha, self.negative_alpha = temperature, positive_alpha, negative_alpha

    def forward(self, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        """The loss of queries and keys (B, D), row i of both of one sample, and a queue (M, D) of other keys.

        Returns:
            0-d loss in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {"query": query, "key": without_gradient(key)}, queue=queue)
        check_matched(query, key, ("query", "key"))
        checks.embedding_pair(query, queue, ("query", "queue"))
        key = without_gradient(key)
        if self.positive_alpha is not None:
            stretch = by_row(lambda q: 1 + beta_like(q, self.positive_alpha), query)
            away = lambda a, b, s: s * a + (1 - s) * b  # noqa: E731
            query, key = by_row(away, query, key, stretch), by_row(away, key, query, stretch)
        if self.negative_alpha is not None:
            queue = mixed(queue, self.negative_alpha)
        how = {"temperature": self.temperature, "normalize": False, "in_batch_negatives": False}
        return info_nce_loss(query, key, queue=queue, **how)


@torch.no_grad()
def mixed(queue: Tensor, alpha: float) -> Tensor:
    """(M, D) each key between itself and another, by the same random numbers on all ranks of a group."""
    queue = all_rows(queue)
    generator = torch.Generator(queue.device).manual_seed(draw_seed() & ((1 << 62) - 1))
    share = beta_like(queue, alpha, generator)
    order = torch.randperm(queue.shape[0], generator=generator, device=queue.device)
    return share * queue + (1 - share) * queue[order]
