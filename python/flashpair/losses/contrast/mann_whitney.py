"""MW loss: every positive above every negative of the batch, an AUC for retrieval."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import backend_cpu, checks, rows_cpu
from ...distributed.sharded import current
from ...pairs import pair_similarity, segment_sum
from ...primitives import pair_reduce
from ...rows import RowPanel, row_reduce
from ...terms import Reduction, Score, Term
from ..arguments import check_matched, poisoned
from ..closed_form import total_with_slopes
from ..group import InGroup
from ..two_views import nothing

#: Knots of the table in one temperature.
_DENSITY = {torch.float32: 8, torch.float64: 48}
_MARGIN = 4  # knots beyond [-1, 1] on either side
#: Points of the polynomial through the slopes, and what each weight is divided by (Lagrange).
_POINTS = range(-2, 4)
_DIVISORS = [math.prod(a - b for b in _POINTS if a != b) for a in _POINTS]


def softplus_table(positives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """F(s) = Σ_i softplus((s - d_i) / T) and F' at even knots over [-1, 1], (knots,) each, differentiable in d (B,).

    A reduction over (knot, i) pairs like any other.
    """
    dtype, device = positives.dtype, positives.device
    inside = math.ceil(2 / temperature * _DENSITY[dtype]) + 1
    at = torch.arange(-_MARGIN, inside + _MARGIN, dtype=dtype, device=device) * (2 / (inside - 1)) - 1
    nothing = [v.new_zeros(len(v), 1) for v in (at, positives)]
    whole = {"scale": 0.0, "offset": at / temperature, "other_offset": -positives / temperature}
    half = {"scale": 0.0, "offset": at / (2 * temperature), "other_offset": -positives / (2 * temperature)}
    value, slope = pair_reduce(
        *nothing,
        [
            Term(Reduction.SUM, Score.SOFTPLUS, **whole),
            Term(Reduction.SUM, Score.SOFTCAP, constant=1.0, **half),  # σ(z) = (1 + tanh(z / 2)) / 2
        ],
    )
    return value, (slope + len(positives)) / (2 * temperature)


class Interpolated(torch.autograd.Function):
    """The cubic through values and slopes at even knots (Hermite); its slope is the quintic through the slopes.

    The cubic's own slope would be a difference of two large values, over the distance of the knots.
    """

    @staticmethod
    def forward(ctx, values: Tensor, slopes: Tensor, s: Tensor) -> Tensor:
        step = 2 / (len(values) - 2 * _MARGIN - 1)
        position = (s + 1) / step + _MARGIN
        left = position.nan_to_num(_MARGIN).long().clamp_(_MARGIN - 1, len(values) - _MARGIN - 1)
        t = position - left
        u = 1 - t
        ctx.save_for_backward(slopes, left, t)
        ctx.step = step
        inner = t * u * step * (u * slopes[left] - t * slopes[left + 1])
        return u * u * (1 + 2 * t) * values[left] + t * t * (1 + 2 * u) * values[left + 1] + inner

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        slopes, left, t = ctx.saved_tensors
        of_s = of_values = of_slopes = None
        if ctx.needs_input_grad[2]:
            of_s = torch.zeros_like(t)
            for a, divisor in zip(_POINTS, _DIVISORS, strict=True):
                weight = torch.full_like(t, 1 / divisor)
                for b in _POINTS:
                    if a != b:
                        weight *= t - b
                of_s += weight.mul_(slopes[left + a])
            of_s *= grad
        if ctx.needs_input_grad[0]:
            u, at, knots = 1 - t, left.flatten(), len(slopes)
            summed = lambda low, high: (  # noqa: E731
                segment_sum((grad * low).flatten(), at, knots) + segment_sum((grad * high).flatten(), at + 1, knots)
            )
            of_values = summed(u * u * (1 + 2 * t), t * t * (1 + 2 * u))
            of_slopes = summed(ctx.step * t * u * u, -ctx.step * t * t * u)
        return of_values, of_slopes, of_s


def _summed(panel: RowPanel, values: Tensor, slopes: Tensor) -> list[Tensor]:
    """F of all pairs of a panel; on a CPU by one operator, whose memory for the table is below that of the panel."""
    if panel.s.numel() < 8 * len(values) or not backend_cpu.at_hand(panel.s):
        return [torch.where(panel.allowed, Interpolated.apply(values, slopes, panel.s), 0.0).sum()]
    inputs = values, slopes, panel.s
    with torch.no_grad():
        total, *of = rows_cpu.tabulated(*inputs, panel.own, _MARGIN, panel.s.requires_grad)
    wanted = torch.is_grad_enabled() and any(v.requires_grad for v in inputs)
    return [total_with_slopes(total, *zip(inputs, of, strict=True)) if wanted else total]


class MannWhitneyLoss(InGroup, torch.nn.Module):
    """Every query's positive above every negative score of the batch: an upper bound of the area over the ROC curve.

        loss = 1/B  Σ_i Σ_{s in S⁻} softplus( (s - s_i+) / T )
        S⁻   = all scores between queries and documents but those of the B positive pairs

    That is B² (B - 1) comparisons. A negative score meets the same sum over positives wherever it stands, so the sum is
    tabulated: F(s) = Σ_i softplus((s - s_i+) / T) at 8 knots a temperature (48 in float64), cubic between them,
    with an error below 1e-7 (1e-10) of its largest value. The loss is Σ F(s) in one walk over S; its gradient in the
    positives is that of the table.

    Args:
        temperature: T in [1e-4, ∞). Default 0.01.
        mean_over_negatives: divide by |S⁻| too, which makes the value independent of the batch. Default False: the
            paper's sum.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a bad number.

    Source: "MW loss", arXiv 2510.00137, equation 3 with the temperature of its lemma. No code of the authors was found.

    Example:
        >>> import torch
        >>> from flashpair.losses import MannWhitneyLoss
        >>> x = torch.eye(2)  # two positives at 1, two negatives at 0: 2 · 2 softplus(-1) / 2
        >>> round(float(MannWhitneyLoss(temperature=1.0)(x, x)), 4)
        0.6265
    """

    row_groups = (("query", "positive"),)

    def __init__(self, temperature: float = 0.01, mean_over_negatives: bool = False, group=None) -> None:
        super().__init__(group=group)
        checks.number("temperature", temperature, low=1e-4)
        self.temperature, self.mean_over_negatives = temperature, mean_over_negatives

    def forward(self, query: Tensor, positive: Tensor, negatives: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            query, positive: (B, D) row i of both belongs together; cosines are compared.
            negatives: (N, D) further documents, negatives of all queries. Default: none.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for an empty batch.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            tensors = {"query": query, "positive": positive, "negatives": negatives}
            return self.over_group(self.forward, tensors)
        check_matched(query, positive, ("query", "positive"))
        if negatives is not None:
            checks.embedding_pair(query, negatives, ("query", "negatives"))
        rows = query.shape[0]
        if rows == 0:
            return nothing(query, positive)
        index = torch.arange(rows, device=query.device)
        own = pair_similarity(query, positive, index, index, normalize=True)
        table = softplus_table(own, self.temperature)

        how = {"shared": table, "totals": 1, "normalize": True, "copies": 16}
        (loss,) = row_reduce(query, positive, _summed, exclude=index, **how)
        count = rows * (rows - 1)
        if negatives is not None:
            loss = loss + row_reduce(query, negatives, _summed, **how)[0]
            count += rows * negatives.shape[0]
        loss = loss / rows / (max(count, 1) if self.mean_over_negatives else 1)
        return poisoned(loss, query, positive, negatives)
