"""Rank-N-Contrast: embeddings in the order of their continuous targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ... import backend_cpu, checks, rows_cpu
from ...distributed.sharded import all_rows, current
from ...request import statistics_dtype
from ...rows import RowPanel, row_reduce
from ...terms import Similarity
from ..arguments import inverse_temperature, poisoned
from ..closed_form import total_with_slopes
from ..group import InGroup
from ..two_views import nothing


class RnCLoss(InGroup, nn.Module):
    """Of two samples the one with the nearer target must be the nearer one.

        s_ij = -||v_i - v_j||,   D_ij = |y_i - y_j|₁
        loss = 1 / (n (n - 1))  Σ_i Σ_{k != i} [ LSE_{j != i: D_ij ≥ D_ik} s_ij / T  -  s_ik / T ]

    Each row's log-sums are running ones in the order of its target distances. Whole rows of S, a panel at a time: O(n²)
    of one target a sample on a CPU, where the order is a merge of two sorted lists, else O(n² log n). Ties and k itself
    are in the set. The call is `loss(embeddings, targets)`; for two views give both, one after the other, with the
    targets twice.

    Args:
        temperature: T, positive number or 0-d tensor (learnable). Default 2.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a temperature that is not positive.

    Source: Zha et al., "Rank-N-Contrast: Learning Continuous Representations for Regression", NeurIPS 2023, equation 1;
    kaiwenzha/Rank-N-Contrast, loss.py (there `loss(features (B, 2, D), labels (B, L))`).

    Example:
        >>> import torch
        >>> from flashpair.losses import RnCLoss
        >>> line, targets = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0.0, 1.0, 3.0])
        >>> 0 < float(RnCLoss()(line, targets)) < float(RnCLoss()(line, targets[[1, 2, 0]]))
        True
    """

    row_groups = (("embeddings", "targets"),)

    def __init__(self, temperature: float | Tensor = 2.0, group=None) -> None:
        super().__init__(group=group)
        checks.temperature("temperature", temperature)
        self.temperature = temperature

    def forward(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (n, D), used as they come.
            targets: (n,) or (n, L) floating point, compared by the sum of absolute differences.

        Returns:
            0-d loss in float32 (float64 for float64); 0 for fewer than two rows; NaN where a target is not finite.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            return self.over_group(self.forward, {"embeddings": embeddings, "targets": targets})
        checks.embeddings("embeddings", embeddings)
        check_targets("targets", targets, embeddings)
        rows = embeddings.shape[0]
        if rows < 2:
            return poisoned(nothing(embeddings), embeddings)
        scale = torch.as_tensor(
            inverse_temperature(self.temperature), dtype=statistics_dtype(embeddings), device=embeddings.device
        )
        targets = all_rows(targets).detach().reshape(rows, -1)
        targets = targets.to(torch.promote_types(targets.dtype, torch.float32))
        finite = targets.nan_to_num(0.0, 0.0, 0.0)  # others have no order; the loss becomes NaN
        order = finite[:, 0].argsort() if finite.is_cpu and finite.shape[1] == 1 else None

        def ordered(panel: RowPanel, *given: Tensor) -> list[Tensor]:
            if order is not None and backend_cpu.at_hand(panel.s):
                return _merged(order, panel, *given)
            return _sorted(panel, *given)

        (total,) = row_reduce(
            embeddings, None, ordered, rows=[finite], shared=[scale, finite],
            similarity=Similarity.EUCLIDEAN, totals=1, copies=20,
        )  # fmt: skip
        return poisoned(total / (rows * (rows - 1)), embeddings, targets)


def _merged(order: Tensor, panel: RowPanel, own: Tensor, scale: Tensor, targets: Tensor) -> list[Tensor]:
    """Of one target a sample: all of them in order are two sorted lists of distances to any of them."""
    place = torch.empty_like(order)
    place[panel.column] = torch.arange(len(order))
    slopes = panel.s.requires_grad or scale.requires_grad
    with torch.no_grad():
        total, *of = rows_cpu.ordered_log_sums(
            panel.s, scale, own[:, 0], targets[order, 0], place[order], panel.own, slopes
        )
    return [total_with_slopes(total, *zip((panel.s, scale), of, strict=True)) if slopes else total]


def _sorted(panel: RowPanel, own: Tensor, scale: Tensor, targets: Tensor) -> list[Tensor]:
    # The row itself comes last: nothing that is summed has it in its set.
    apart = torch.cdist(own, targets[panel.column], p=1).masked_fill_(~panel.allowed, -1.0)
    return [OrderedLogSums.apply(panel.s, scale, apart)]


class OrderedLogSums(torch.autograd.Function):
    """Σ_i Σ_k LSE_{j: apart_ij ≥ apart_ik} l_ij - l_ik, l = -scale s, over all columns but the nearest of each row.

    Slopes are those of running log-sums too: j is in the sets of all k at its distance and nearer, so
    ∂/∂l_j = Σ_k e^{l_j - LSE_k} - 1 = e^{l_j + LSE_k(-LSE_k)} - 1.
    """

    @staticmethod
    def forward(ctx, s: Tensor, scale: Tensor, apart: Tensor) -> Tensor:
        apart, order = apart.sort(dim=1, descending=True)
        order, step = order[:, :-1], torch.arange(order.shape[1], device=s.device)
        new = apart[:, :-1] > apart[:, 1:]  # whether the next column is nearer
        logits = (-scale * s).gather(1, order)
        # Columns at one distance share the sum of the last of them, and what the first of them gathers from the end.
        ends = torch.where(new, step[:-1], order.shape[1]).flip(1).cummin(1).values.flip(1)
        sums = logits.logcumsumexp(1).gather(1, ends)
        total = (sums - logits).sum()
        if any(ctx.needs_input_grad[:2]):
            firsts = torch.where(new, step[1:], 0)[:, :-1].cummax(1).values
            firsts = torch.cat([firsts.new_zeros(len(firsts), 1), firsts], 1)
            later = sums.neg_().flip(1).logcumsumexp(1).flip(1).gather(1, firsts)
            slopes = torch.zeros_like(s).scatter_(1, order, later.add_(logits).exp_().sub_(1.0))
            ctx.save_for_backward(slopes.mul(-scale), -(slopes * s).sum())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        of_s, of_scale = ctx.saved_tensors
        return of_s * grad, of_scale * grad, None


def check_targets(name: str, value: Tensor, embeddings: Tensor) -> None:
    """Floating-point targets (n,) or (n, L), one or one row per embedding."""
    checks.floating(name, value)
    rows = embeddings.shape[0]
    if value.dim() not in (1, 2) or value.shape[0] != rows:
        raise ValueError(f"{name} must have shape ({rows},) or ({rows}, L); got {tuple(value.shape)}")
    checks.same_device("embeddings", embeddings, **{name: value})
