"""UNIQUE: comparisons of items whose scores and whose targets are uncertain."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ..group import InGroup
from .pairs_by_target import PairsByTarget, Tile
from .scores import checked

_TINY = 1e-8  # under the roots, as in the authors' code


class UNIQUELoss(InGroup, nn.Module):
    """Fidelity of comparisons with learned standard deviations, which a hinge of their own orders.

        p_ij = Φ( (a_i - a_j) / sqrt(σ_i² + σ_j²) ),  σ a constant;   g_ij = Φ( (y_i - y_j) / sqrt(τ_i² + τ_j²) )
        mean over pairs i < j of a list of   1 - sqrt(p g) - sqrt((1 - p) (1 - g))
                                           + max( 0, margin - sign(τ_i - τ_j) (σ_i - σ_j) )

    1e-8 stands under each of the roots. Each pair once, a tile at a time; slopes in closed form from the same pass.

    Args:
        margin: of the hinge, ≥ 0. Default 0.025, the authors'.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a bad number.

    Source: Zhang et al., "Uncertainty-Aware Blind Image Quality Assessment in the Laboratory and Wild" (UNIQUE), TIP
    2021, read through the authors' code, TrainModel.py and MNL_Loss.py: it compares listed pairs, this all of a list;
    that g has 1e-8 under its root is assumed.

    Example:
        >>> import torch
        >>> from flashpair.losses import UNIQUELoss
        >>> one, y = torch.ones(2), torch.tensor([1.0, 1.0])
        >>> round(float(UNIQUELoss(margin=0.5)(y, one, y, one)), 4)  # p = g = 1/2, and no order of deviations
        0.5
    """

    row_groups = (("scores", "deviations", "targets", "target_deviations", "lists"),)

    def __init__(self, margin: float = 0.025, group=None) -> None:
        super().__init__(group=group)
        checks.number("margin", margin, low=0.0)
        self.margin = margin

    def forward(
        self,
        scores: Tensor,
        deviations: Tensor,
        targets: Tensor,
        target_deviations: Tensor,
        lists: Tensor | None = None,
    ) -> Tensor:
        """The loss of scored items.

        Args:
            scores: (n,) a, float32, float64, bfloat16 or float16. deviations: (n,) σ; its gradient is the hinge's.
            targets: (n,) y. target_deviations: (n,) τ; without gradient both.
            lists: (n,) int64, which list an item is in. Default: all in one.

        Returns:
            0-d loss in float32 (float64 for float64); 0 where nothing can be compared.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        given = {
            "scores": scores, "deviations": deviations, "targets": targets, "target_deviations": target_deviations,
        }  # fmt: skip
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {**given, "lists": lists})
        lists, zero, a, sigma, y, tau = checked(lists, **given)
        y, tau = y.detach(), tau.detach()
        if len(a) == 0:
            return a.sum() + sigma.sum()
        by_mean, by_width = PairsByTarget(y, lists), PairsByTarget(tau, lists)
        fidelity = _Fidelity(*(v[by_mean.order] for v in (sigma.square(), y, tau.square())))
        total = by_mean.sum(a, fidelity, fidelity) + by_width.sum(sigma, self._ordered, self._alike)
        return total / by_mean.all.clamp_min(1) + zero

    def _ordered(self, d: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        losses = (self.margin - d).clamp_min_(0)
        return losses, -(losses > 0).to(d.dtype)

    def _alike(self, d: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        return torch.full_like(d, self.margin), torch.zeros_like(d)


class _Fidelity:
    """Loss and slope of pairs, from σ², targets and τ² (n,) of the sorted items."""

    def __init__(self, variances: Tensor, targets: Tensor, target_variances: Tensor) -> None:
        self.variances, self.targets, self.target_variances = variances, targets, target_variances

    def __call__(self, d: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        over = lambda v: (v[tile.rows, None] + v[None, tile.columns] + _TINY).rsqrt_()  # noqa: E731
        per, per_target = over(self.variances), over(self.target_variances)
        z = d.mul_(per)
        target = (self.targets[tile.rows, None] - self.targets[None, tile.columns]).mul_(per_target)
        p, q, g, h = (torch.special.ndtr(v) for v in (z, -z, target, -target))
        good, bad = (p * g).add_(_TINY).sqrt_(), (q * h).add_(_TINY).sqrt_()
        density = z.square().mul_(-0.5).exp_().mul_(per).mul_(0.5 / math.sqrt(2 * math.pi))
        return 1 - good - bad, density.mul_(h.div_(bad).sub_(g.div_(good)))
