"""Contrastive attraction and contrastive repulsion with the momentum keys of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ...primitives import pair_reduce
from ...terms import Mask, Reduction, Term
from ..arguments import (
    check_matched,
    check_rows,
    constant,
    inverse_temperature,
    numbered,
    poisoned,
    sequences,
    without_gradient,
)
from ..group import InGroup
from ..two_views import nothing


class CACRCost(Enum):
    """What a pair costs."""

    RBF = "rbf"  # in a log-sum: cross-entropy
    EUCLIDEAN = "euclidean"  # 1 - cosine


class CACRMoCoLoss(InGroup, nn.Module):
    """CACR in place of MoCo v3's loss: far positives are pulled more, near keys of the batch pushed more.

        w_ia = softmax over the views a != v of ||q^a_i - k^v_i||² / T
        RBF:        l_ia = 2 T [ LSE_j <q^a_i, k^v_j> / T  -  <q^a_i, k^v_i> / T ]
        EUCLIDEAN:  l_ia = c_ii - Σ_{j != i} p_ij c_ij,   c_ij = 1 - <q^a_i, k^v_j>,   p the softmax of -c_ij / T
        loss = mean over the keys' views v of  mean_i Σ_{a != v} w_ia l_ia

    Of unit vectors. Keys, w, p and the factor 2 T take no gradient. Of two views RBF is half of `MoCoV3Loss`.

    Args:
        temperature: T, positive number or 0-d tensor (learnable with RBF). Default 1.
        cost: see `CACRCost`. Default: RBF, the authors'.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a temperature that is not positive, or another cost.

    Source: Zheng et al., "Contrastive Attraction and Contrastive Repulsion for Representation Learning", TMLR 2023;
    JegZheng/CACR-SSL, imagenet_pretraining/moco/builder.py. There EUCLIDEAN is a sum over the rows of a process, not a
    mean.

    Example:
        >>> import torch
        >>> from flashpair.losses import CACRCost, CACRMoCoLoss
        >>> x = torch.eye(2)  # positives cost 0, negatives 1
        >>> float(CACRMoCoLoss(cost=CACRCost.EUCLIDEAN)([x, x], [x, x]))
        -1.0
    """

    row_groups = None

    def __init__(self, temperature: float | Tensor = 1.0, cost: CACRCost = CACRCost.RBF, group=None) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        checks.member("cost", cost, CACRCost)
        self.temperature, self.cost = temperature, cost

    def forward(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        """The loss of a batch.

        Args:
            queries: two or more views (B, D) of one dtype, float32, float64, bfloat16 or float16; normalised here.
            keys: (B, D) of that dtype, by the momentum encoder, of the first views or of all; row i of all is of
                sample i. The authors take two keys of many queries, with `use_full_mode` as many.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        queries, keys = list(queries), list(keys)
        if self.group is not None and current() is None:
            run = lambda **given: self.forward(*sequences(given, "queries", "keys"))  # noqa: E731
            return self.over_group(run, lambda: _named(queries, [without_gradient(k) for k in keys]))
        for name, view in _named(queries, keys).items():
            check_matched(queries[0], view, ("queries[0]", name))
            check_rows(name, view, queries[0].shape[0], queries[0])
        if queries[0].shape[0] == 0:
            return nothing(*queries)
        keys = [without_gradient(k) for k in keys]
        total = sum(self._against([*queries[:v], *queries[v + 1 :]], key) for v, key in enumerate(keys))
        return poisoned(total / len(keys), *queries, *keys)

    def _against(self, queries: list[Tensor], key: Tensor) -> Tensor:
        """The loss of the queries of the other views."""
        index, scale = torch.arange(key.shape[0], device=key.device), inverse_temperature(self.temperature)
        of_rbf = self.cost == CACRCost.RBF
        kind = {} if of_rbf else {"detach_weights": True}
        rivals = Term(
            Reduction.LOGSUMEXP if of_rbf else Reduction.SOFTMAX_MEAN, mask=Mask.DIFFERENT, scale=scale, **kind
        )
        own, losses = [], []
        for query in queries:
            terms = [rivals, Term(Reduction.SUM, mask=Mask.SAME)]
            others, positive = pair_reduce(query, key, terms, labels=index, ref_labels=index, normalize=True)
            if of_rbf:
                losses.append(2 / constant(scale) * F.softplus(others - scale * positive, threshold=40))
            else:
                losses.append(1 - positive + (others - 1 if len(index) > 1 else 0 * others))
            own.append(positive.detach())
        weights = torch.softmax(constant(scale) * (2 - 2 * torch.stack(own)), 0)
        return (weights * torch.stack(losses)).sum(0).mean()


def _named(queries: list[Tensor], keys: list[Tensor]) -> dict[str, Tensor]:
    if len(queries) < 2 or not 1 <= len(keys) <= len(queries):
        raise ValueError(
            f"queries must hold at least 2 views, keys at least 1 and at most as many; got {len(queries)} and "
            f"{len(keys)}"
        )
    return numbered(queries=queries, keys=keys)
