"""LambdaLoss: pairs of a list weighted by what swapping them would do to NDCG."""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...label_order import label_order
from ...pairs import segment_sum
from ...rows import RowPanel, row_reduce
from .scores import ScoreLoss, differences


class LambdaWeight(Enum):
    """Weight of a pair, from gains G = (2^y - 1) / maxDCG and discounts D(r) = log2(1 + r) of the current ranks."""

    NONE = "none"  # 1
    NDCG1 = "ndcg1"  # G_i / D(r_i)
    LAMBDA_RANK = "lambda_rank"  # |1/D(r_i) - 1/D(r_j)| |G_i - G_j|
    NDCG2 = "ndcg2"  # |1/D(|r_i - r_j|) - 1/D(|r_i - r_j| + 1)| |G_i - G_j|
    NDCG2_PLUS = "ndcg2++"  # mu NDCG2 + LAMBDA_RANK


class LambdaLoss(ScoreLoss):
    """`-mean over pairs of a list with y_i > y_j of  w_ij log2 σ( sigma (a_i - a_j) )`, w by the current ranking.

    Ranks and weights take no gradient. NDCG1 has no j in its weight. A panel of whole lists at a time.

    Args:
        weight: see `LambdaWeight`. Default: NDCG2_PLUS.
        k: only pairs of which both rank among the first k. Default: none, all.
        sigma: > 0. Default 1.
        mu: share of NDCG2 in NDCG2_PLUS. Default 10.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a bad number or weight.

    Source: Wang et al., "The LambdaLoss Framework for Ranking Metric Optimization", CIKM 2018, sections 4 and 5;
    sentence-transformers and allRank clamp the probability at 1e-10, which loses its gradient there: this does not.

    Example:
        >>> import torch
        >>> from flashpair.losses import LambdaLoss, LambdaWeight
        >>> loss = LambdaLoss(LambdaWeight.NONE)  # RankNet over log 2
        >>> round(float(loss(torch.zeros(3), torch.tensor([2, 1, 1]))), 4)
        1.0
    """

    def __init__(
        self,
        weight: LambdaWeight = LambdaWeight.NDCG2_PLUS,
        k: int | None = None,
        sigma: float = 1.0,
        mu: float = 10.0,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.member("weight", weight, LambdaWeight)
        if k is not None:
            checks.count("k", k)
        checks.number("sigma", sigma, low=0.0, open_low=True)
        checks.number("mu", mu, low=0.0)
        self.weight, self.k, self.sigma, self.mu = weight, k, sigma, mu

    def _weights(self, gain: Tensor, rank: Tensor, gains: Tensor, ranks: Tensor) -> Tensor:
        """(b, n) of the rows' gains and ranks (b, 1) and the columns' (1, n)."""
        if self.weight == LambdaWeight.NONE:
            return torch.ones_like(gain + gains)
        discount = lambda r: torch.log2(1 + r)  # noqa: E731
        if self.weight == LambdaWeight.NDCG1:
            return (gain / discount(rank)).expand(-1, gains.shape[1])
        change = (gain - gains).abs()
        lambdas = (1 / discount(rank) - 1 / discount(ranks)).abs() * change
        if self.weight == LambdaWeight.LAMBDA_RANK:
            return lambdas
        apart = (rank - ranks).abs().clamp_min(1)
        ndcg2 = (1 / discount(apart) - 1 / discount(apart + 1)).abs() * change
        return ndcg2 if self.weight == LambdaWeight.NDCG2 else self.mu * ndcg2 + lambdas

    def of(self, scores: Tensor, targets: Tensor, lists: Tensor) -> Tensor:
        ranks = ranks_in_lists(scores.detach(), lists)
        gains = torch.exp2(targets) - 1
        _, owner = lists.unique(return_inverse=True)
        most = gains / torch.log2(1 + ranks_in_lists(targets, lists))
        if self.k is not None:
            most = torch.where(ranks_in_lists(targets, lists) <= self.k, most, 0.0)
        ideal = segment_sum(most, owner, len(scores))[owner]
        gains = torch.where(ideal > 0, gains / torch.where(ideal > 0, ideal, 1.0), 0.0)

        def weighted(panel: RowPanel, target: Tensor, gain: Tensor, rank: Tensor, *columns: Tensor) -> list[Tensor]:
            targets, gains, ranks = (c[panel.column][None] for c in columns)
            target, gain, rank = target[:, None], gain[:, None], rank[:, None]
            keep = panel.same & (target > targets)
            if self.k is not None:
                keep = keep & (rank <= self.k) & (ranks <= self.k)
            weights = self._weights(gain, rank, gains, ranks)
            losses = torch.where(keep, weights * F.softplus(-self.sigma * panel.s), 0.0)
            return [losses.sum(1), keep.sum(1).to(losses.dtype)]

        x, y = differences(scores)
        given = [targets, gains, ranks]
        sums, pairs = row_reduce(
            x, y, weighted, rows=given, shared=given, labels=lists, ref_labels=lists.clone(),
            exclude=torch.arange(len(scores), device=scores.device), within_class=True, copies=20,
        )  # fmt: skip
        return sums.sum() / pairs.sum().clamp_min(1) / torch.log(sums.new_tensor(2.0))


def ranks_in_lists(values: Tensor, lists: Tensor) -> Tensor:
    """(n,) from 1, the largest value of a list first; ties in their order."""
    order = values.argsort(descending=True, stable=True)
    order = order[lists[order].argsort(stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    start = label_order(lists, None, None).start
    return (place - start + 1).to(values.dtype)
