"""LambdaLoss: pairs of a list weighted by what swapping them would do to NDCG."""

from __future__ import annotations

import math
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...label_order import label_order
from ...pairs import segment_sum
from .pairs_by_target import PairsByTarget, Tile
from .scores import ScoreLoss


class LambdaWeight(Enum):
    """Weight of a pair, from gains G = (2^y - 1) / maxDCG and discounts D(r) = log2(1 + r) of the current ranks."""

    NONE = "none"  # 1
    NDCG1 = "ndcg1"  # G_i / D(r_i)
    LAMBDA_RANK = "lambda_rank"  # |1/D(r_i) - 1/D(r_j)| |G_i - G_j|
    NDCG2 = "ndcg2"  # |1/D(|r_i - r_j|) - 1/D(|r_i - r_j| + 1)| |G_i - G_j|
    NDCG2_PLUS = "ndcg2++"  # mu NDCG2 + LAMBDA_RANK


class LambdaLoss(ScoreLoss):
    """`-mean over pairs of a list with y_i > y_j of  w_ij log2 σ( sigma (a_i - a_j) )`, w by the current ranking.

    Ranks and weights take no gradient. NDCG1 has no j in its weight. A tile of pairs at a time, slopes in closed form.

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

    def of(self, scores: Tensor, targets: Tensor, lists: Tensor) -> Tensor:
        ranks = ranks_in_lists(scores.detach(), lists)
        gains = torch.exp2(targets) - 1
        _, owner = lists.unique(return_inverse=True)
        best = ranks_in_lists(targets, lists)
        most = gains / torch.log2(1 + best)
        if self.k is not None:
            most = torch.where(best <= self.k, most, 0.0)
        ideal = segment_sum(most, owner, len(scores))[owner]
        gains = torch.where(ideal > 0, gains / torch.where(ideal > 0, ideal, 1.0), 0.0)
        if self.k is not None:  # pairs of others do not count
            kept = (ranks <= self.k).nonzero()[:, 0]
            scores, targets, lists, ranks, gains = (v[kept] for v in (scores, targets, lists, ranks, gains))
        pairs = PairsByTarget(targets, lists)
        weights = _Weights(self, gains[pairs.order], ranks[pairs.order])

        def weighted(d: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
            losses = F.softplus(d.mul_(-self.sigma))
            slopes = torch.sigmoid(d).mul_(-self.sigma)
            if self.weight != LambdaWeight.NONE:
                w = weights.of(tile)
                losses, slopes = losses.mul_(w), slopes.mul_(w)
            return losses, slopes

        return pairs.sum(scores, weighted) / pairs.unequal.clamp_min(1) / math.log(2)


class _Weights:
    """Weights of the pairs of a tile, from gains and ranks (n,) of the sorted items."""

    def __init__(self, loss: LambdaLoss, gains: Tensor, ranks: Tensor) -> None:
        self.kind, self.mu, self.gains = loss.weight, loss.mu, gains
        self.discounts = 1 / torch.log2(1 + ranks)
        # Of ranks that are as far apart as the entry's place; of one rank there is no pair.
        apart = torch.arange(len(ranks), device=ranks.device).to(gains).clamp_min_(1)
        self.by_distance = 1 / torch.log2(1 + apart) - 1 / torch.log2(2 + apart)
        self.ranks = ranks.to(torch.int64)

    @property
    def _far(self) -> bool:
        return self.kind in (LambdaWeight.NDCG2, LambdaWeight.NDCG2_PLUS)

    def of(self, tile: Tile) -> Tensor:
        """(b, m), or (b, 1) where a weight is its row's."""
        gain, discount = self.gains[tile.rows, None], self.discounts[tile.rows, None]
        if self.kind == LambdaWeight.NDCG1:
            return gain * discount
        change = gain - self.gains[None, tile.columns]  # ≥ 0: the first has the higher target
        weights = None
        if self.kind in (LambdaWeight.LAMBDA_RANK, LambdaWeight.NDCG2_PLUS):
            weights = (discount - self.discounts[None, tile.columns]).abs_()
        if self._far:
            apart = (self.ranks[tile.rows, None] - self.ranks[None, tile.columns]).abs_()
            ndcg2 = self.by_distance.expand(len(apart), -1).gather(1, apart)
            weights = ndcg2 if weights is None else weights.add_(ndcg2, alpha=self.mu)
        return weights.mul_(change)


def ranks_in_lists(values: Tensor, lists: Tensor) -> Tensor:
    """(n,) from 1, the largest value of a list first; ties in their order."""
    order = values.argsort(descending=True, stable=True)
    order = order[lists[order].argsort(stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    start = label_order(lists, None, None).start
    return (place - start + 1).to(values.dtype)
