"""SupReMix: supervised contrast for regression, with mixtures of the batch as hard negatives and hard positives."""

from __future__ import annotations

import math
import sys
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...algebra import log_add_exp
from ...distributed.sharded import all_rows, by_row, current
from ...eager import eagerly
from ...pairs import pair_similarity
from ...primitives import pair_reduce
from ...random import draw_seed, two_uniform
from ...request import statistics_dtype
from ...rows import RowPanel, row_reduce
from ...terms import Mask, Reduction, Term
from ...workspace import workspace_bytes
from ..arguments import inverse_temperature, poisoned, without_gradient
from ..group import InGroup
from ..two_views import nothing


def beta_two(seed: int, row: Tensor, column: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """Beta(2, β) numbers, a function of (seed, row, column): 1 - U^(1/β) V^(1/(β + 1)), U and V uniform."""
    u, v = two_uniform(seed, row, column, dtype)
    return u.log_().div_(beta).add_(v.log_(), alpha=1 / (beta + 1)).expm1_().neg_()


class SupReMixWeight(Enum):
    """Weight of a candidate in the denominator, from d = |y_i - y_c|; the values are the names of the authors' code."""

    NONE = "none"  # 1
    L1 = "L1"  # 1 / (1 + d)
    L2 = "L2"  # 1 / (1 + d²)
    L1_INV = "L1_inv"  # 1 + d
    L2_INV = "L2_inv"  # 1 + d²

    def log(self, apart: Tensor) -> Tensor:
        """The weight's logarithm of distances d ≥ 0."""
        if self is SupReMixWeight.NONE:
            return torch.zeros_like(apart)
        grown = (apart * apart if self.value.startswith("L2") else apart).log1p()
        return grown if self.value.endswith("_inv") else -grown


class SupReMixLoss(InGroup, nn.Module):
    """Supervised contrast for regression; targets far apart weigh more, mixtures join both sides.

        positives of i:  z_j, y_j = y_i;   α z_j + (1 - α) z_k for all y_j < y_i < y_k with both gaps below n,
                         α = (y_k - y_i) / (y_k - y_j), so that the mixed target is y_i
        negatives of i:  z_k, y_k != y_i;  λ z_i + (1 - λ) z_k for all y_k != y_i, λ from Beta(2, β) for each pair
        loss = mean_i [ log Σ_c w(|y_i - y_c|) e^{<z_i, c> / T}  -  mean_{positives p} <z_i, p> / T ]

    c over positives and negatives, y_c of a mixture the mixed target. z unit vectors; mixtures are constants (gradient
    reaches the anchor only) and not normalised. A row without positives contributes 0 and counts in the mean. For two
    views give both, one after the other, with the targets twice.

    Of integer targets a sum over j and k of e^{α a_j + (1 - α) b_k} is a product of two sums for each pair of gaps, so
    the mixed positives are 2 (n - 1) passes, not B³ triples. Of real targets they are triples: O(B m²) with m samples
    within the gap on either side, a block of them at a time. The mixed negatives are affine in the similarity: whole
    rows of S, a panel at a time. λ is a function of a seed from torch's generator and of the pair: the same in any
    panel, on any rank and in the backward pass.

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 0.3, the authors' for ages; 0.5 for STS-B.
        gap: n ≥ 0, in units of the targets. 0 mixes no positives, nor does 1 of integer targets. Default 5, the
            authors' for ages; 0.5 for the real targets of STS-B.
        beta: β > 0 of Beta(2, β). Default 8.
        mix_negatives: whether negatives are mixed. Default True.
        weight: w, see `SupReMixWeight`. Default: L1_INV, 1 + d.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a number out of its range.

    Source: Wu et al., "Mixup Your Own Pairs" (SupReMix), arXiv 2309.16633, read through
    Dingyijiang1/Mixup-Your-Own-Pairs: imdb-wiki and sts-b-dir, train_supremix.py, supremix_loss.py, supcon_loss.py. Not
    repeated: there samples and mixtures are shifted by maxima of their own before both are summed; "L2_inv" of a
    mixture is 1 + (y_i - y_c + 1)²; and sts-b-dir divides by one positive more than there are.

    Example:
        >>> import torch
        >>> from flashpair.losses import SupReMixLoss
        >>> z = torch.eye(4)  # two pairs, four apart: log(1 + 2 * 5) each
        >>> loss = SupReMixLoss(temperature=1.0, mix_negatives=False)(z, torch.tensor([0, 0, 4, 4]))
        >>> round(float(loss), 4)
        2.3979
    """

    row_groups = (("embeddings", "labels"),)

    def __init__(
        self,
        temperature: float | Tensor = 0.3,
        gap: float = 5,
        beta: float = 8.0,
        mix_negatives: bool = True,
        weight: SupReMixWeight = SupReMixWeight.L1_INV,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        checks.number("gap", gap, low=0.0, high=sys.float_info.max)
        checks.number("beta", beta, low=0.0, open_low=True)
        checks.member("weight", weight, SupReMixWeight)
        self.temperature, self.gap, self.beta, self.mix_negatives = temperature, gap, beta, mix_negatives
        self.weight = weight

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (B, D) float32, float64, bfloat16 or float16; normalised here.
            labels: (B,) y, int64 or floating point; what is real is compared in its own dtype, at least float32.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {"embeddings": embeddings, "labels": labels})
        checks.embeddings("embeddings", embeddings)
        real = isinstance(labels, Tensor) and labels.is_floating_point()
        if real and tuple(labels.shape) != (embeddings.shape[0],):
            raise ValueError(f"labels must have shape ({embeddings.shape[0]},); got {tuple(labels.shape)}")
        if not real:
            checks.labels("labels", labels, embeddings.shape[0])
        checks.same_device("embeddings", embeddings, labels=labels)
        if embeddings.shape[0] == 0:
            return nothing(embeddings)
        scale, dtype = inverse_temperature(self.temperature), statistics_dtype(embeddings)
        z = by_row(lambda v: F.normalize(v.to(dtype), dim=1, eps=1e-12), embeddings)
        targets = all_rows(labels).detach()
        if real:
            targets = targets.to(torch.promote_types(targets.dtype, torch.float32))
        mixed = self._of_mixed_positives(z, targets, scale) if self.gap > 1 and not real else ()
        total = self._of_panels(z, targets, torch.as_tensor(scale, dtype=dtype, device=labels.device), mixed)
        return poisoned(total / z.shape[0], embeddings, targets if real else None)

    @eagerly  # with the seed
    def _of_panels(self, z: Tensor, targets: Tensor, scale: Tensor, mixed: tuple[Tensor, ...]) -> Tensor:
        """Sum of the rows' losses; `mixed` as from `_of_mixed_positives`, of real targets made here."""
        constant, index = without_gradient(z), torch.arange(z.shape[0], device=targets.device)
        squares = pair_similarity(constant, constant, index, index)  # 1, of zero vectors 0
        seed = draw_seed() if self.mix_negatives else 0
        triples = BetweenTargets(targets, self.gap) if targets.is_floating_point() and self.gap > 0 else None

        def losses(panel: RowPanel, own: Tensor, square: Tensor, *further: Tensor) -> list[Tensor]:
            *more, targets, scale = further
            apart = (own[:, None] - targets[panel.column][None]).abs().to(panel.s.dtype)
            positive = (apart == 0) & panel.allowed
            none = torch.finfo(panel.s.dtype).min / 4  # finite, so that empty log-sums have slopes
            logits = torch.where(panel.allowed, scale * panel.s + self.weight.log(apart), none)
            if self.mix_negatives:
                share = beta_two(seed, panel.row[:, None], panel.column[None], self.beta, panel.s.dtype)
                between = share * square[:, None] + (1 - share) * panel.products[0]
                between = torch.where(apart > 0, scale * between + self.weight.log((1 - share) * apart), none)
                logits = torch.logaddexp(logits, between)
            total, pull = logits.logsumexp(1), torch.where(positive, panel.s, 0.0).sum(1)
            count = positive.sum(1).to(total.dtype)
            if triples is not None:
                more = triples.reduce(panel, own, targets[panel.column], scale)
            if more:
                total, pull, count = log_add_exp(total, more[0]), pull + more[1], count + more[2]
            return [torch.where(count > 0, total - scale * pull / count.clamp_min(1), 0.0).sum()]

        place = None if triples is None else triples.place
        (total,) = row_reduce(
            z, z, losses, products=[(z, constant)] if self.mix_negatives or triples is not None else [],
            rows=[targets, squares, *mixed], shared=[targets, scale], labels=place, ref_labels=place, exclude=index,
            totals=1, copies=24 if triples is None else 48,
        )  # fmt: skip
        return total

    @property
    def _gaps(self) -> range:
        """Of integer targets."""
        return range(1, math.ceil(self.gap))

    def _of_mixed_positives(self, z: Tensor, labels: Tensor, scale) -> tuple[Tensor, Tensor, Tensor]:
        """Log-sum, sum and number of the mixed positives, (B,) each."""
        constant, gaps = without_gradient(z), self._gaps
        below, above = (
            {d: self._at_gap(z, constant, labels + sign * d, labels, d, scale) for d in gaps} for sign in (-1, 1)
        )
        total = torch.full_like(below[1][0], -torch.inf)
        pull = torch.zeros_like(total)
        for d in gaps:
            for e in gaps:
                total = log_add_exp(total, below[d][e - 1] + above[e][d - 1])
                (low, low_count), (high, high_count) = below[d][-2:], above[e][-2:]
                pull = pull + (e * low * high_count + d * high * low_count) / (d + e)
        return total, pull, sum(v[-1] for v in below.values()) * sum(v[-1] for v in above.values())

    def _at_gap(self, z, constant, wanted: Tensor, labels: Tensor, d: int, scale) -> tuple[Tensor, ...]:
        """Of the samples at gap d on one side: log-sums, a partner at gaps 1, 2 ... on the other; sum; number."""
        terms = [Term(Reduction.LOGSUMEXP, mask=Mask.SAME, scale=scale * (e / (d + e))) for e in self._gaps]
        terms += [
            Term(Reduction.SUM, mask=Mask.SAME), Term(Reduction.COUNT, mask=Mask.SAME, scale=0.0, offset=1.0),
        ]  # fmt: skip
        return pair_reduce(z, constant, terms, labels=wanted, ref_labels=labels)


class BetweenTargets:
    """Mixtures of a sample below and a sample above each row's real target, both closer than `gap`.

    With the columns in the order of their targets both are intervals beside the row's own target.
    """

    #: Triples at a time on a CPU, so that they stay near the caches; elsewhere numbers of workspace for one.
    _TRIPLES, _NUMBERS = 1 << 17, 12

    def __init__(self, targets: Tensor, gap: float) -> None:
        ordered = targets.sort().values
        self.gap, self.place = gap, torch.searchsorted(ordered, targets)  # (B,) equal targets have one
        # How far the intervals reach, ends at the gap included: rounding keeps the order, so no one closer is missed.
        low = self.place - torch.searchsorted(ordered, targets - gap)
        end = torch.searchsorted(ordered, targets, right=True)
        high = torch.searchsorted(ordered, targets + gap, right=True) - end
        self.reach = torch.stack([low, high])  # (2, B)
        self.widest = self.reach.amax(1).tolist()  # a GPU is read once a call, as for the bounds of panels

    def reduce(self, panel: RowPanel, own: Tensor, ordered: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-sum of the mixtures, their sum and number, (b,) each.

        Args:
            panel: its first product is with the constants that are mixed.
            own: (b,) the rows' targets. ordered: (n,) those of the columns.
            scale: ().
        """
        here = self.widest if panel.s.is_cuda or not len(own) else self.reach[:, panel.row].amax(1).tolist()
        low, high = here  # a GPU is not asked for each panel
        product, end = panel.products[0], panel.start + panel.count
        step = torch.arange(max(low, high), device=product.device)[None]
        sides, gaps = [], []
        for position in (panel.start[:, None] - 1 - step[:, :low], end[:, None] + step[:, :high]):
            safe = position.clamp(0, product.shape[1] - 1)
            gap = (own[:, None] - ordered[safe]).abs()
            gaps.append(torch.where((position == safe) & (gap < self.gap), gap, 0.0).to(product.dtype))
            sides.append(product.gather(1, safe))
        total, weights, shares, count = self._sums(*(v.detach() for v in sides), *gaps, scale.detach())
        # The derivatives are known already: what is added is 0.
        of_scale = sum((p * v.detach()).sum(1) for p, v in zip(weights, sides, strict=True))
        total = total + of_scale * (scale - scale.detach())
        pull = torch.zeros_like(total)
        for v, weight, share in zip(sides, weights, shares, strict=True):
            total = total + scale.detach() * (weight * (v - v.detach())).sum(1)
            pull = pull + (share * v).sum(1)
        return total, pull, count

    @torch.no_grad()
    def _sums(self, a: Tensor, b: Tensor, u: Tensor, v: Tensor, scale: Tensor):
        """Over the triples of each row, α_jk = v_k / (u_j + v_k), z_jk = scale (α_jk a_j + (1 - α_jk) b_k).

        Args:
            a: (b, low) similarities below. b: (b, high) above.
            u, v: their gaps, 0 where there is no such sample.

        Returns:
            log Σ e^z (b,); the slopes of that over the scale, (b, low) and (b, high); Σ_k α and Σ_j (1 - α) likewise;
            the number of triples (b,).
        """
        # A mixture lies between its samples, which stand in the sum too: what is far below both adds nothing to it.
        below, above = u > 0, v > 0
        absent = torch.finfo(a.dtype).min / 4
        a, b = (torch.where(there, scale * s, absent) for there, s in ((below, a), (above, b)))
        top = torch.cat([a, b, a.new_full((len(a), 1), absent)], 1).amax(1, keepdim=True)
        # Without a sample above α and e^z are 0; those below that are none have weight 0.
        a, b = torch.where(below, a - top, 0.0), torch.where(above, b - top, absent)
        u, below = torch.where(below, u, 1.0), below.to(a.dtype)
        of_below, share_of_below = torch.zeros_like(a), torch.zeros_like(a)
        each, of_above, share_of_above = a.new_zeros(3, *b.shape)
        rows, columns = self._blocks(a, b.shape[1])
        for first in range(0, len(a), rows):
            row = slice(first, first + rows)
            for left in range(0, a.shape[1], columns):
                column = slice(left, left + columns)
                there = below[row, None, column]
                share = v[row, None] / (u[row, column, None] + v[row, None])  # (rows, columns, high)
                e = torch.addcmul(b[row, None], share, a[row, column, None] - b[row, None]).exp_()
                share_of_below[row, column] = share.sum(2)
                share_of_above[row] += torch.bmm(there, share)[:, 0]
                each[row] += torch.bmm(there, e)[:, 0]
                e *= share
                of_below[row, column] = e.sum(2)
                of_above[row] += torch.bmm(there, e)[:, 0]
        total = each.sum(1, keepdim=True)
        empty = total == 0
        inverse = torch.where(empty, 0.0, 1 / torch.where(empty, 1.0, total))
        weights = below * of_below * inverse, (each - of_above) * inverse
        numbers = below.sum(1, keepdim=True), above.sum(1, keepdim=True)
        shares = below * share_of_below, torch.where(above, numbers[0] - share_of_above, 0.0)
        log = torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + top)
        return log[:, 0], weights, shares, (numbers[0] * numbers[1])[:, 0]

    def _blocks(self, a: Tensor, high: int) -> tuple[int, int]:
        """(rows, samples below) whose triples are made at once, of (rows, low) samples below."""
        bytes_of_one = self._NUMBERS * a.element_size()
        most = self._TRIPLES if a.device.type == "cpu" else max(workspace_bytes(None) // bytes_of_one, 1)
        columns = max(min(a.shape[1], most // max(high, 1)), 1)
        return max(min(a.shape[0], most // max(columns * high, 1)), 1), columns
