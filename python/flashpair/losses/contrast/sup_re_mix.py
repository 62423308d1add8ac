"""SupReMix: supervised contrast for regression, with mixtures of the batch as hard negatives and hard positives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...algebra import log_add_exp
from ...distributed.sharded import by_row, current
from ...eager import eagerly
from ...pairs import pair_similarity
from ...primitives import pair_reduce
from ...random import draw_seed, two_uniform
from ...request import statistics_dtype
from ...rows import RowPanel, row_reduce
from ...terms import Mask, Reduction, Term
from ..arguments import inverse_temperature, poisoned, without_gradient
from ..group import InGroup
from ..two_views import nothing


def beta_two(seed: int, row: Tensor, column: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """Beta(2, β) numbers, a function of (seed, row, column): 1 - U^(1/β) V^(1/(β + 1)), U and V uniform."""
    u, v = two_uniform(seed, row, column, dtype)
    return 1 - u ** (1 / beta) * v ** (1 / (beta + 1))


class SupReMixLoss(InGroup, nn.Module):
    """Supervised contrast of integer targets; targets far apart weigh more, mixtures join both sides.

        positives of i:  z_j, y_j = y_i;   α z_j + (1 - α) z_k for all y_j < y_i < y_k with both gaps below n,
                         α = (y_k - y_i) / (y_k - y_j), so that the mixed target is y_i
        negatives of i:  z_k, y_k != y_i;  λ z_i + (1 - λ) z_k for all y_k != y_i, λ from Beta(2, β) for each pair
        loss = mean_i [ log Σ_c (|y_i - y_c| + 1) e^{<z_i, c> / T}  -  mean_{positives p} <z_i, p> / T ]

    c over positives and negatives, y_c of a mixture the mixed target. z unit vectors; mixtures are constants (gradient
    reaches the anchor only) and not normalised. A row without positives contributes 0 and counts in the mean. For two
    views give both, one after the other, with the targets twice.

    A sum over j and k of e^{α a_j + (1 - α) b_k} is a product of two sums for each pair of gaps, so the mixed
    positives are 2 (n - 1) passes, not B³ triples. The mixed negatives are affine in the similarity: whole rows of S,
    a panel at a time. λ is a function of a seed from torch's generator and of the pair: the same in any panel, on any
    rank and in the backward pass.

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 0.3.
        gap: n ≥ 1; 1 mixes no positives. Default 5.
        beta: β > 0 of Beta(2, β). Default 8.
        mix_negatives: whether negatives are mixed. Default True.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a number out of its range.

    Source: Wu et al., "Mixup Your Own Pairs" (SupReMix), arXiv 2309.16633, read through
    Dingyijiang1/Mixup-Your-Own-Pairs, imdb-wiki, train_supremix.py and supremix_loss.py with distance "L1_inv". There
    samples and mixtures are shifted by maxima of their own before both are summed, which is not repeated.

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
        gap: int = 5,
        beta: float = 8.0,
        mix_negatives: bool = True,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        checks.count("gap", gap)
        checks.number("beta", beta, low=0.0, open_low=True)
        self.temperature, self.gap, self.beta, self.mix_negatives = temperature, gap, beta, mix_negatives

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (B, D) float32, float64, bfloat16 or float16; normalised here.
            labels: (B,) int64 y. Real targets must be rounded or binned first.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument; on labels that are no integers.
        """
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {"embeddings": embeddings, "labels": labels})
        checks.embeddings("embeddings", embeddings)
        if isinstance(labels, Tensor) and labels.is_floating_point():
            raise TypeError(
                f"labels must be int64, real targets rounded or binned: mixtures are found by integer gaps; got "
                f"{labels.dtype}"
            )
        checks.labels("labels", labels, embeddings.shape[0])
        checks.same_device("embeddings", embeddings, labels=labels)
        if embeddings.shape[0] == 0:
            return nothing(embeddings)
        scale, dtype = inverse_temperature(self.temperature), statistics_dtype(embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            z = by_row(lambda v: F.normalize(v.to(dtype), dim=1, eps=1e-12), embeddings)
        total, pull, count = self._of_samples(z, labels, torch.as_tensor(scale, dtype=dtype, device=labels.device))
        if self.gap > 1:
            more, mixed_pull, mixed_count = self._of_mixed_positives(z, labels, scale)
            total, pull, count = log_add_exp(total, more), pull + mixed_pull, count + mixed_count
        losses = torch.where(count > 0, total - scale * pull / count.clamp_min(1), 0.0)
        return poisoned(losses.mean(), embeddings)

    @eagerly  # with the seed
    def _of_samples(self, z: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-sum over samples and mixed negatives; sum and number of the samples that are positives, (B,) each."""
        constant, index = without_gradient(z), torch.arange(z.shape[0], device=labels.device)
        squares = pair_similarity(constant, constant, index, index)  # 1, of zero vectors 0
        seed = draw_seed() if self.mix_negatives else 0

        def rivals(panel: RowPanel, own: Tensor, square: Tensor, labels: Tensor, scale: Tensor) -> list[Tensor]:
            apart = (own[:, None] - labels[panel.column][None]).abs().to(panel.s.dtype)
            positive = (apart == 0) & panel.allowed
            none = torch.finfo(panel.s.dtype).min / 4  # finite, so that empty log-sums have slopes
            logits = torch.where(panel.allowed, scale * panel.s + apart.log1p(), none)
            if self.mix_negatives:
                share = beta_two(seed, panel.row[:, None], panel.column[None], self.beta, panel.s.dtype)
                mixed = share * square[:, None] + (1 - share) * panel.products[0]
                mixed = torch.where(apart > 0, scale * mixed + ((1 - share) * apart).log1p(), none)
                logits = torch.logaddexp(logits, mixed)
            return [logits.logsumexp(1), torch.where(positive, panel.s, 0.0).sum(1), positive.sum(1).to(logits.dtype)]

        return row_reduce(
            z, z, rivals, products=[(z, constant)] if self.mix_negatives else [], rows=[labels, squares],
            shared=[labels, scale], exclude=index, copies=24,
        )  # fmt: skip

    def _of_mixed_positives(self, z: Tensor, labels: Tensor, scale) -> tuple[Tensor, Tensor, Tensor]:
        """Log-sum, sum and number of the mixed positives, (B,) each."""
        constant, gaps = without_gradient(z), range(1, self.gap)
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
        terms = [Term(Reduction.LOGSUMEXP, mask=Mask.SAME, scale=scale * (e / (d + e))) for e in range(1, self.gap)]
        terms += [
            Term(Reduction.SUM, mask=Mask.SAME), Term(Reduction.COUNT, mask=Mask.SAME, scale=0.0, offset=1.0),
        ]  # fmt: skip
        return pair_reduce(z, constant, terms, labels=wanted, ref_labels=labels)
