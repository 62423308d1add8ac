"""Contrastive attraction and contrastive repulsion with momentum keys and a queue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import checks
from ...algebra import merge
from ...distributed.sharded import current
from ...pairs import pair_similarity
from ...primitives import pair_reduce
from ...terms import Reduction, Term
from ..arguments import check_matched, check_rows, numbered, poisoned, sequences, without_gradient
from ..group import InGroup
from ..two_views import nothing


class CACRQueueLoss(InGroup, nn.Module):
    """CACR of large runs: far keys of the own sample are pulled more, near keys of a queue pushed more.

        attraction of view a: mean_i Σ_{v != a} w_iv c_iv,   c = ||q^a_i - k^v_i||²,  w the softmax of τ₊ c
        repulsion of view a: -mean_i Σ_n p_in ||q^a_i - n||²,   p the softmax of -τ₋ ||q^a_i - n||²
                             n over the queue and the other queries q^a_j, j != i
        loss = mean over the views of attraction + repulsion

    Of unit vectors. Keys and queue take no gradient, nor do w, and p by default: the code of the authors detaches it
    for the queue, not for the queries. Without a queue and without other queries the repulsion is 0. `KeyQueue` holds
    the queue; the authors enqueue the keys of the last view.

    Args:
        positive_temperature: τ₊ ≥ 0. Default 1.
        negative_temperature: τ₋ ≥ 0. Default 1.
        in_batch: other queries of the view are negatives too. Default True.
        detach_in_batch: no gradient through what the queries' distances say of p. Default True; False is the authors'.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`; the queue is a tensor that
            all ranks hold alike, or the rows of a `KeyQueue` with the same group. Default: none.

    Raises:
        TypeError, ValueError: on a bad number.

    Source: Zheng et al., "Contrastive Attraction and Contrastive Repulsion for Representation Learning", TMLR 2023;
    JegZheng/CACR-SSL, large_scale_shift_experiments/imagenet/ours/builder.py, with α = β = 1.

    Example:
        >>> import torch
        >>> from flashpair.losses import CACRQueueLoss
        >>> x = torch.eye(2)  # keys at 0; the queue at squared distance 4 and 2, the other query at 2
        >>> loss = CACRQueueLoss(negative_temperature=0.0)
        >>> round(float(loss([x, x], [x, x], queue=-torch.eye(2)[:1])), 4)  # rows: -(4 + 2) / 2, -(2 + 2) / 2
        -2.5
    """

    row_groups = None

    def __init__(
        self,
        positive_temperature: float = 1.0,
        negative_temperature: float = 1.0,
        in_batch: bool = True,
        detach_in_batch: bool = True,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.number("positive_temperature", positive_temperature, low=0.0)
        checks.number("negative_temperature", negative_temperature, low=0.0)
        self.positive_temperature, self.negative_temperature = positive_temperature, negative_temperature
        self.in_batch, self.detach_in_batch = in_batch, detach_in_batch

    def forward(self, queries: Sequence[Tensor], keys: Sequence[Tensor], queue: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            queries: two or more views (B, D) of one dtype, float32, float64, bfloat16 or float16; normalised here.
            keys: as many (B, D) of that dtype, by the momentum encoder; row i of all is of sample i.
            queue: (M, D) other keys of that dtype, M ≥ 0.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        queries, keys = list(queries), list(keys)
        if self.group is not None and current() is None:
            run = lambda **given: self.forward(*sequences(given, "queries", "keys"), queue)  # noqa: E731
            return self.over_group(run, lambda: _named(queries, [without_gradient(k) for k in keys]))
        _named(queries, keys)
        for k, (query, key) in enumerate(zip(queries, keys, strict=True)):
            check_matched(query, key, (f"queries[{k}]", f"keys[{k}]"))
            check_rows(f"queries[{k}]", query, queries[0].shape[0], queries[0])
            checks.embedding_pair(queries[0], query, ("queries[0]", f"queries[{k}]"))
        checks.embedding_pair(queries[0], queue, ("queries", "queue"))
        if queries[0].shape[0] == 0:
            return nothing(*queries)
        keys, queue = [without_gradient(k) for k in keys], without_gradient(queue)
        total = sum(self._attraction(q, [*keys[:a], *keys[a + 1 :]]) for a, q in enumerate(queries))
        total = total + sum(self._repulsion(q, queue) for q in queries)
        return poisoned(total / len(queries), *queries, *keys, queue)

    def _attraction(self, query: Tensor, others: list[Tensor]) -> Tensor:
        index = torch.arange(query.shape[0], device=query.device)
        costs = torch.stack([2 - 2 * pair_similarity(query, k, index, index, normalize=True) for k in others], 1)
        weights = torch.softmax(self.positive_temperature * costs.detach(), 1)
        return (weights * costs).sum(1).mean()

    def _repulsion(self, query: Tensor, queue: Tensor) -> Tensor:
        near = {"scale": 2 * self.negative_temperature}
        constant = [Term(Reduction.SOFTMAX_MEAN, detach_weights=True, **near), Term(Reduction.LOGSUMEXP, **near)]
        mean, lse = pair_reduce(query, queue, constant, normalize=True)
        found = torch.stack([mean, lse.detach()])
        if self.in_batch:
            through = [Term(Reduction.SOFTMAX_MEAN, **near), constant[1]]
            mean, lse = pair_reduce(query, terms=constant if self.detach_in_batch else through, normalize=True)
            own = torch.stack([mean, lse.detach() if self.detach_in_batch else lse])
            found = merge(Reduction.SOFTMAX_MEAN, found, own)
        cost = 2 * found[0] - 2
        return torch.where(found[1] == -torch.inf, 0.0, cost).mean()


def _named(queries: list[Tensor], keys: list[Tensor]) -> dict[str, Tensor]:
    if len(queries) < 2 or len(queries) != len(keys):
        raise ValueError(f"queries and keys must hold as many views, at least 2; got {len(queries)} and {len(keys)}")
    return numbered(queries=queries, keys=keys)
