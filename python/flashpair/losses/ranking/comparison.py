"""Paired comparisons: how probable it is that one item is better, against which one is."""

from __future__ import annotations

import math
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from .pairs_by_target import PairsByTarget, Tile
from .scores import ScoreLoss


class ComparisonModel(Enum):
    """Probability that i beats j, from d = (a_i - a_j) / deviation."""

    THURSTONE = "thurstone"  # the normal distribution's Φ(d)
    BRADLEY_TERRY = "bradley_terry"  # the logistic σ(d)


class ComparisonCriterion(Enum):
    """Loss of a probability p where the target is g: 1, 0, or ½ for equal targets."""

    FIDELITY = "fidelity"  # 1 - sqrt(p g) - sqrt((1 - p) (1 - g))
    CROSS_ENTROPY = "cross_entropy"  # -g log p - (1 - g) log(1 - p)


_TINY = 1e-8  # under the roots, as in LIQE and UNIQUE


class ComparisonLoss(ScoreLoss):
    """Mean over all pairs i < j of a list of the loss of p_ij, the model's probability that i is better.

    O(n²) time, a tile of a_i - a_j at a time, each pair once; slopes in closed form from the same pass.

    Args:
        model: see `ComparisonModel`. Default: THURSTONE.
        criterion: see `ComparisonCriterion`. Default: FIDELITY.
        deviation: of the difference of two scores, > 0. Default 1 (LIQE); √2 is Thurstone's case V with unit variances.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a bad number or choice.

    Source: Tsai et al., "FRank: A Ranking Method with Fidelity Loss", SIGIR 2007; Zhang et al., "Blind Image Quality
    Assessment via Vision-Language Correspondence" (LIQE), CVPR 2023; Thurstone 1927; Bradley and Terry 1952.

    Example:
        >>> import torch
        >>> from flashpair.losses import ComparisonLoss
        >>> round(float(ComparisonLoss()(torch.zeros(2), torch.tensor([1.0, 0.0]))), 4)  # 1 - sqrt(1/2), about
        0.2928
    """

    def __init__(
        self,
        model: ComparisonModel = ComparisonModel.THURSTONE,
        criterion: ComparisonCriterion = ComparisonCriterion.FIDELITY,
        deviation: float = 1.0,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.member("model", model, ComparisonModel)
        checks.member("criterion", criterion, ComparisonCriterion)
        checks.number("deviation", deviation, low=0.0, open_low=True)
        self.model, self.criterion, self.deviation = model, criterion, deviation

    def _probability(self, d: Tensor) -> Tensor:
        return torch.special.ndtr(d) if self.model == ComparisonModel.THURSTONE else torch.sigmoid(d)

    def _density(self, d: Tensor, p: Tensor) -> Tensor:
        """Derivative of the probability p of d."""
        if self.model == ComparisonModel.THURSTONE:
            return d.square().mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        return p * (1 - p)

    def _log(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """log p and its derivative, neither of which overflows far out."""
        if self.model == ComparisonModel.THURSTONE:
            ratio = torch.special.erfcx(d * -math.sqrt(0.5))  # of 2 Φ(d) to exp(-d² / 2)
            return torch.special.log_ndtr(d), ratio.reciprocal_().mul_(math.sqrt(2 / math.pi))
        return F.logsigmoid(d), torch.sigmoid(-d)

    def _better(self, d: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Losses and slopes where the target is 1."""
        if self.criterion == ComparisonCriterion.CROSS_ENTROPY:
            log_p, slopes = self._log(d)
            return log_p.neg_(), slopes.neg_()
        p = self._probability(d)
        slopes = self._density(d, p)
        root = p.add_(_TINY).sqrt_()
        slopes.div_(root).mul_(-0.5)
        return root.neg_().add_(1 - math.sqrt(_TINY)), slopes

    def _alike(self, d: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """Losses and slopes where the target is ½."""
        if self.criterion == ComparisonCriterion.CROSS_ENTROPY:
            (log_p, slopes), (log_q, other) = self._log(d), self._log(-d)
            return (log_p + log_q) / -2, (other - slopes) / 2
        p, q = self._probability(d), self._probability(-d)
        roots = [(v / 2 + _TINY).sqrt() for v in (p, q)]
        slopes = self._density(d, p) * (1 / roots[1] - 1 / roots[0]) / 4
        return 1 - roots[0] - roots[1], slopes

    def of(self, scores: Tensor, targets: Tensor, lists: Tensor) -> Tensor:
        pairs = PairsByTarget(targets, lists)
        return pairs.sum(scores / self.deviation, self._better, self._alike) / pairs.all.clamp_min(1)
