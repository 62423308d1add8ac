"""Contrastive attraction and contrastive repulsion."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import current
from ...pairs import pair_similarity
from ...primitives import pair_reduce
from ...terms import Mask, Reduction, Term
from ..arguments import check_matched, numbered, poisoned
from ..group import InGroup
from ..two_views import nothing


class CACRLoss(InGroup, nn.Module):
    """Far positives are pulled more, near negatives pushed more.

        attraction of view a: mean_i Σ_v w_iv c_iv,   c = ||a_i - v_i||²,  w the softmax of τ₊ c over the other views v
        repulsion of views a, b: -mean_i Σ_{j != i} p_ij ||a_i - b_j||²,   p the softmax of -τ₋ ||a_i - b_j||²
        loss = mean attraction over the views + mean repulsion over the pairs of views (first one as anchor)

    Of unit vectors. The call is `loss(view, view, ...)` with two or more views (B, D).

    Args:
        positive_temperature: τ₊ ≥ 0. Default 1.
        negative_temperature: τ₋ ≥ 0. Default 0.9 (CIFAR-10; the authors take 2 for CIFAR-100 and STL-10).
        detach_weights: no gradient through w and p. Default False, as in the authors' small-scale code.
        tau_plus: in [0, 1), debiased repulsion `(repulsion + τ⁺ mean_i ||a_i - b_i||²) / (1 - τ⁺)`. Default 0.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a bad number, fewer than two views or views that do not match.

    Source: Zheng et al., "Contrastive Attraction and Contrastive Repulsion for Representation Learning", TMLR 2023;
    JegZheng/CACR-SSL, small_scale_experiments. Assumed for `tau_plus`: in cost units, repulsion being minus a cost,
    the correction removes the positives' share.

    Example:
        >>> import torch
        >>> from flashpair.losses import CACRLoss
        >>> x = torch.eye(3)  # positives at 0, negatives at squared distance 2
        >>> float(CACRLoss()(x, x))
        -2.0
    """

    row_groups = None

    def __init__(
        self,
        positive_temperature: float = 1.0,
        negative_temperature: float = 0.9,
        detach_weights: bool = False,
        tau_plus: float = 0.0,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.number("positive_temperature", positive_temperature, low=0.0)
        checks.number("negative_temperature", negative_temperature, low=0.0)
        checks.number("tau_plus", tau_plus, low=0.0)
        if tau_plus >= 1:
            raise ValueError(f"tau_plus must be below 1; got {tau_plus}")
        self.positive_temperature, self.negative_temperature = positive_temperature, negative_temperature
        self.detach_weights, self.tau_plus = detach_weights, tau_plus

    def forward(self, *views: Tensor) -> Tensor:
        """The loss of two or more views (B, D) of one dtype; 0 for an empty batch."""
        if self.group is not None and current() is None:
            return self.over_group(lambda **given: self.forward(*given.values()), lambda: _named(views))
        _named(views)
        for k, view in enumerate(views):
            check_matched(views[0], view, ("views[0]", f"views[{k}]"))
        if views[0].shape[0] == 0:
            return nothing(*views)
        return poisoned(self._attraction(views) + self._repulsion(views), *views)

    def _attraction(self, views: tuple[Tensor, ...]) -> Tensor:
        index = torch.arange(views[0].shape[0], device=views[0].device)
        costs = {
            (a, b): 2 - 2 * pair_similarity(views[a], views[b], index, index, normalize=True)
            for a, b in combinations(range(len(views)), 2)
        }
        total = 0.0
        for a in range(len(views)):
            others = torch.stack([costs[min(a, b), max(a, b)] for b in range(len(views)) if b != a], 1)
            weights = torch.softmax(self.positive_temperature * others, 1)
            total = total + ((weights.detach() if self.detach_weights else weights) * others).sum(1).mean()
        return total / len(views)

    def _repulsion(self, views: tuple[Tensor, ...]) -> Tensor:
        index = torch.arange(views[0].shape[0], device=views[0].device)
        near = Term(
            Reduction.SOFTMAX_MEAN, mask=Mask.DIFFERENT, scale=2 * self.negative_temperature,
            detach_weights=self.detach_weights,
        )  # fmt: skip
        total, pairs = 0.0, list(combinations(views, 2))
        for a, b in pairs:
            terms = [near, Term(Reduction.SUM, mask=Mask.SAME)]
            mean, own = pair_reduce(a, b, terms, labels=index, ref_labels=index, normalize=True)
            cost = 2 * mean - 2 if len(index) > 1 else 0 * mean
            if self.tau_plus:
                cost = (cost + self.tau_plus * (2 - 2 * own)) / (1 - self.tau_plus)
            total = total + cost.mean()
        return total / len(pairs)


def _named(views: tuple[Tensor, ...]) -> dict[str, Tensor]:
    if len(views) < 2:
        raise ValueError(f"views must be at least 2; got {len(views)}")
    return numbered(views=views)
