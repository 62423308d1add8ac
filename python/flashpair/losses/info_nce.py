"""InfoNCE: each query must find its own key among the others, extra negatives and a queue."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..algebra import log_add_exp
from ..distributed.sharded import current
from ..formulas import MEAN_GAP
from ..pairs import pair_similarity
from ..primitives import pair_loss, pair_reduce
from ..terms import Mask, Reduction, Term
from .arguments import check_matched, constant, inverse_temperature, poisoned, without_gradient
from .group import InGroup
from .statistics import PairStatistics, merge, moments, single


def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    queue: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    in_batch_negatives: bool = True,
    return_stats: bool = False,
):
    """Function behind `InfoNCELoss`."""
    check_matched(query, positive_key, ("query", "positive_key"))
    for name, extra in (("negative_keys", negative_keys), ("queue", queue)):
        if extra is not None:
            checks.embedding_pair(query, extra, ("query", name))
    if not in_batch_negatives and negative_keys is None and queue is None:
        raise ValueError("in_batch_negatives=False needs negative_keys or queue; got neither")
    scale, index = inverse_temperature(temperature), torch.arange(query.shape[0], device=query.device)
    # A softmax does not depend on a shift, its rounding does: cosines count from 1 down.
    top = constant(scale) if normalize else 0.0
    logits = {"scale": scale, "offset": -top}
    spread = [Term(Reduction.MOMENTS)] if return_stats else []
    if in_batch_negatives:
        pieces = [
            Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, **logits),
            Term(Reduction.SUM, mask=Mask.SAME, **logits),
        ]
        pieces += [Term(Reduction.MOMENTS, mask=m) for m in (Mask.SAME, Mask.DIFFERENT)] if return_stats else []
        pairs = {"labels": index, "ref_labels": index, "normalize": normalize}
        if negative_keys is None and queue is None:
            loss, _, found = pair_loss(query, positive_key, pieces[:2], MEAN_GAP, pieces[2:], **pairs)
            loss = poisoned(loss, query, positive_key)
            return (loss, PairStatistics(*map(moments, found))) if return_stats else loss
        rivals, own, *found = pair_reduce(query, positive_key, pieces, **pairs)
        found = [moments(slots) for slots in found]
    else:
        similarity = pair_similarity(query, positive_key, index, index, normalize=normalize)
        own = scale * similarity - top
        rivals = torch.full_like(own, -torch.inf)
        none = torch.zeros_like(index, dtype=torch.bool)
        found = [single(similarity, ~none), single(similarity, none)]
    if queue is not None:
        queue = without_gradient(queue)
    for others in (negative_keys, queue):
        if others is not None:
            more, *slots = pair_reduce(
                query, others, [Term(Reduction.LOGSUMEXP, **logits), *spread], normalize=normalize
            )
            rivals = log_add_exp(rivals, more)
            if return_stats:
                found[1] = merge(found[1], moments(slots[0]))
    loss = poisoned(MEAN_GAP.value(rivals, own), query, positive_key, negative_keys, queue)
    return (loss, PairStatistics(*found)) if return_stats else loss


class InfoNCELoss(InGroup, nn.Module):
    """Cross-entropy of each query's own key among all keys, without the B×N logits.

        loss = 1/B  Σ_i [ LSE_{k in K_i} <q_i, k> / T  -  <q_i, k_i> / T ]
        K_i  = k_i, the other keys of the batch, `negative_keys` and `queue`

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 0.1.
        normalize: normalise queries and keys first, gradient included. Default True.
        in_batch_negatives: whether other queries' keys are negatives. Default True; False with a queue is MoCo.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`: the loss of the queries and
            keys of all its ranks, `negative_keys` included; `queue` is a `KeyQueue` with the same group, or a tensor
            that all ranks hold alike. Default: none.

    Raises:
        ValueError, TypeError: on a temperature that is not positive.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018, equation 4;
    He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, equation 1.

    Example:
        >>> import torch
        >>> from flashpair.losses import InfoNCELoss
        >>> query = key = torch.eye(4)
        >>> round(float(InfoNCELoss(temperature=0.5)(query, key)), 4)
        0.3408
    """

    row_groups = (("query", "positive_key"),)

    def __init__(
        self, temperature: float | Tensor = 0.1, normalize: bool = True, in_batch_negatives: bool = True, group=None
    ) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        self.temperature = temperature
        self.normalize = normalize
        self.in_batch_negatives = in_batch_negatives

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        queue: Tensor | None = None,
        return_stats: bool = False,
    ):
        """The loss of a batch of queries with their keys.

        Args:
            query: (B, D) float32, float64, bfloat16 or float16.
            positive_key: (B, D); row i belongs to query i.
            negative_keys: (N, D) keys that belong to no query, with gradient.
            queue: (M, D) keys that belong to no query, without gradient.
            return_stats: also return `PairStatistics` of each query's similarities.

        Returns:
            0-d loss in float32 (float64 for float64), or `(loss, PairStatistics)` with `return_stats`.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            tensors = {"query": query, "positive_key": positive_key, "negative_keys": negative_keys}
            return self.over_group(self.forward, tensors, queue=queue, return_stats=return_stats)
        return info_nce_loss(
            query,
            positive_key,
            negative_keys,
            queue,
            temperature=self.temperature,
            normalize=self.normalize,
            in_batch_negatives=self.in_batch_negatives,
            return_stats=return_stats,
        )
