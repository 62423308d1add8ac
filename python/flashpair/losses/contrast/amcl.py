"""AMCL: several projection heads, each pair with a temperature of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ...pairs import pair_similarity
from ...rows import RowPanel, row_reduce
from ..arguments import check_matched, check_rows, numbered, poisoned, sequences
from ..closed_form import total_with_slopes
from ..group import InGroup
from ..two_views import nothing


class AMCLLoss(InGroup, nn.Module):
    """InfoNCE of each head with temperatures that a second similarity of the pair decides, added over the heads.

        τ_ij = τ_min + (τ_max - τ_min) σ( -<φ_i, ψ_j> )             similar pairs have low temperatures
        Ω(τ) = d/2 log τ + 1/τ                                      d the features of a head
        l_i  = LSE_{j != i} s_ij / τ_ij  -  s_ii / τ_ii  +  β [ Ω(τ_ii) - mean_{j != i} Ω(τ_ij) ]

    s the cosine of the head's outputs; mean over i, sum over heads. Gradients reach φ and ψ. With `top`, only the `top`
    largest s/τ of a row take part: their mean in place of the log-sum, and the mean of `log τ + 1/τ` over them in place
    of that of Ω. Whole rows of two products, a panel at a time.

    Args:
        temperature_min, temperature_max: 0 < τ_min < τ_max. Default 0.05 and 2.
        beta: β ≥ 0. Default 0.01.
        top: ≥ 1. Default: none, all negatives.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a number out of its range.

    Source: Wang et al., "Adaptive Multi-head Contrastive Learning", ECCV 2024. Not verified: the paper was read through
    a re-implementation, and the authors' code computes something else. Assumed: the bounds of τ (there 1e-5 and 2), and
    means over the negatives in the regulariser.

    Example:
        >>> import torch
        >>> from flashpair.losses import AMCLLoss
        >>> x, phi = torch.eye(2), torch.zeros(2, 3)  # every temperature is (τ_min + τ_max) / 2
        >>> loss = AMCLLoss(temperature_min=0.5, temperature_max=1.5)
        >>> round(float(loss([x, x], [x, x], phi, phi)), 4)  # two heads: -1 each
        -2.0
    """

    row_groups = None

    def __init__(
        self,
        temperature_min: float = 0.05,
        temperature_max: float = 2.0,
        beta: float = 0.01,
        top: int | None = None,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.number("temperature_min", temperature_min, low=0.0, open_low=True)
        checks.number("temperature_max", temperature_max, low=temperature_min, open_low=True)
        checks.number("beta", beta, low=0.0)
        if top is not None:
            checks.count("top", top)
        self.temperature_min, self.temperature_max, self.beta, self.top = temperature_min, temperature_max, beta, top

    def forward(
        self, first: Sequence[Tensor], second: Sequence[Tensor], first_phi: Tensor, second_phi: Tensor
    ) -> Tensor:
        """The loss of two views.

        Args:
            first, second: as many heads each, (B, d) of one dtype; row i of all is of sample i.
            first_phi, second_phi: (B, k) φ and ψ of that dtype, whose products decide the temperatures.

        Returns:
            0-d loss in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        first, second = list(first), list(second)
        if self.group is not None and current() is None:
            run = lambda first_phi, second_phi, **heads: self.forward(  # noqa: E731
                *sequences(heads, "first", "second"), first_phi, second_phi
            )
            phi = {"first_phi": first_phi, "second_phi": second_phi}
            return self.over_group(run, lambda: {**phi, **_named(first, second)})
        _named(first, second)
        for k, (x, y) in enumerate(zip(first, second, strict=True)):
            check_matched(x, y, (f"first[{k}]", f"second[{k}]"))
            check_rows(f"first[{k}]", x, first[0].shape[0], first[0])
        check_matched(first_phi, second_phi, ("first_phi", "second_phi"))
        check_rows("first_phi", first_phi, first[0].shape[0], first[0])
        everything = (*first, *second, first_phi, second_phi)
        if first[0].shape[0] == 0:
            return nothing(*everything)
        heads = [self._of(x, y, first_phi, second_phi) for x, y in zip(first, second, strict=True)]
        return poisoned(sum(heads), *everything)

    def _temperature(self, product: Tensor) -> Tensor:
        return self.temperature_min + (self.temperature_max - self.temperature_min) * torch.sigmoid(-product)

    def _of(self, x: Tensor, y: Tensor, phi: Tensor, psi: Tensor) -> Tensor:
        rows, half = x.shape[0], x.shape[1] / 2
        index = torch.arange(rows, device=x.device)
        own = self._temperature(pair_similarity(phi, psi, index, index))
        loss = self.beta * (half * own.log() + 1 / own) - pair_similarity(x, y, index, index, normalize=True) / own
        if rows == 1:
            return loss.mean()

        def rivals(panel: RowPanel) -> list[Tensor]:
            if self.top is None:
                with torch.no_grad():
                    total, *slopes = self._push(panel.s.detach(), panel.products[0].detach(), panel.own[:, None], half)
                return [total_with_slopes(total, *zip((panel.s, panel.products[0]), slopes, strict=True))]
            heat = self._temperature(panel.products[0])
            best = torch.where(panel.allowed, panel.s / heat, -torch.inf).topk(min(self.top, rows - 1), dim=1)
            kept = heat.gather(1, best.indices)
            return [(best.values.mean(1) - self.beta * (kept.log() + 1 / kept).mean(1)).sum()]

        copies = 10 if self.top is None else 16
        (push,) = row_reduce(
            x, y, rivals, products=[(phi, psi)], exclude=index, normalize=True, totals=1, copies=copies
        )
        return loss.mean() + push / rows

    def _push(self, s: Tensor, product: Tensor, own: Tensor, half: float) -> tuple[Tensor, Tensor, Tensor]:
        """Σ_i LSE_{j != i} s_ij / τ_ij - β mean_{j != i} Ω(τ_ij) of a panel; its derivatives in s and in φ·ψ."""
        share = self.beta / (s.shape[1] - 1)
        cold = product.neg().sigmoid_()
        of_product = (1 - cold).mul_(cold).mul_(self.temperature_max - self.temperature_min)  # -dτ
        heat = cold.mul_(self.temperature_max - self.temperature_min).add_(self.temperature_min)
        inverse = heat.reciprocal()
        weights = (s * inverse).scatter_(1, own, -torch.inf)
        top = weights.amax(1, keepdim=True)
        weights.sub_(top).exp_()
        total = weights.sum(1, keepdim=True)
        value = (total.log() + top).sum()
        inverse.scatter_(1, own, 0.0)
        value -= share * (half * heat.scatter_(1, own, 1.0).log_().sum() + inverse.sum())
        of_s = weights.div_(total).mul_(inverse)
        of_heat = torch.mul(of_s, s, out=heat).sub_(inverse, alpha=share).add_(share * half)  # times -τ
        return value, of_s, of_product.mul_(of_heat).mul_(inverse)


def _named(first: list[Tensor], second: list[Tensor]) -> dict[str, Tensor]:
    """The heads, one by one."""
    if not first or len(first) != len(second):
        raise ValueError(f"first and second must hold as many heads, at least 1; got {len(first)} and {len(second)}")
    return numbered(first=first, second=second)
