"""SimLAP (Hydra): similarity between arbitrary classes, in the subspace that a gate opens for their pair."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import by_row, current
from ...request import statistics_dtype
from ...rows import RowPanel, row_reduce
from ..arguments import check_matched, poisoned
from ..closed_form import total_with_slopes
from ..group import InGroup
from ..two_views import nothing

_TINY = 1e-24  # squared norms under a gate from which on they are divided by


class SimLAPLoss(InGroup, nn.Module):
    """Each anchor attracts the samples of its partner class, compared under the anchor's own gate.

        s_ij = cos(g_i ∘ z_i, g_i ∘ z_j) = <g_i² ∘ z_i, z_j> / ( ||g_i ∘ z_i|| sqrt(<g_i², z_j²>) )
        P_i  = samples of class c'_i,   N_i = samples of neither c_i nor c'_i
        loss = 1 / Σ_i |P_i|  Σ_i Σ_{j in P_i} softplus( LSE_{n in N_i} t s_in  -  t s_ij )

    c_i is the class of sample i, c'_i the partner class that its gate was made for. The norm under the gate is a second
    product, a panel at a time; gradients reach the gates through both. An anchor of its own partner class is a positive
    of itself, as in the authors' code; a batch without positives gives 0 (there 0 / 0).

    Args:
        scale: t > 0. Default 10.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on a bad number.

    Source: "Hydra" / "SimLAP", arXiv 2410.18200, read through erow/vitookit, simlap.py.

    Example:
        >>> import torch
        >>> from flashpair.losses import SimLAPLoss
        >>> z, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> loss = SimLAPLoss(scale=1.0)(z, torch.ones(3, 3), labels, labels[[1, 2, 0]])
        >>> round(float(loss), 4)  # one positive and one negative, both at 0: log 2
        0.6931
    """

    row_groups = (("embeddings", "gates", "labels", "partner_labels"),)

    def __init__(self, scale: float = 10.0, group=None) -> None:
        super().__init__(group=group)
        checks.number("scale", scale, low=0.0, open_low=True)
        self.scale = scale

    def forward(self, embeddings: Tensor, gates: Tensor, labels: Tensor, partner_labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (B, D) z. gates: (B, D) g of the same dtype, in (0, 1) or any numbers.
            labels: (B,) int64 c. partner_labels: (B,) int64 c'.

        Returns:
            0-d loss in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            given = embeddings, gates, labels, partner_labels
            return self.over_group(self.forward, dict(zip(self.row_groups[0], given, strict=True)))
        check_matched(embeddings, gates, ("embeddings", "gates"))
        for name, value in (("labels", labels), ("partner_labels", partner_labels)):
            checks.labels(name, value, embeddings.shape[0])
            checks.same_device("embeddings", embeddings, **{name: value})
        if embeddings.shape[0] == 0:
            return nothing(embeddings, gates)
        with torch.autocast(embeddings.device.type, enabled=False):
            z, g = (by_row(lambda v: v.to(statistics_dtype(v)), v) for v in (embeddings, gates))
            squares, of_columns = (by_row(torch.square, v) for v in (g, z))
            # <anchor_i, z_j> is the cosine times ||g_i z_j||.
            anchors = by_row(lambda z, g: F.normalize(g * z, dim=1, eps=1e-12) * g, z, g)

        def crossed(panel: RowPanel, own: Tensor, classes: Tensor) -> list[Tensor]:
            with torch.no_grad():
                total, *slopes = self._panel(panel, own, classes)
            return [total_with_slopes(total, *zip((panel.s, panel.products[0]), slopes, strict=True))]

        (total,) = row_reduce(
            anchors, z, crossed, products=[(squares, of_columns)], labels=partner_labels, ref_labels=labels,
            rows=[labels], shared=[labels], totals=1, copies=8,
        )  # fmt: skip
        classes = labels.sort().values
        ends = (torch.searchsorted(classes, partner_labels, right=right) for right in (True, False))
        pairs = (next(ends) - next(ends)).sum()
        return poisoned(total / pairs.clamp_min(1), embeddings, gates)

    def _panel(self, panel: RowPanel, own: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum over a panel's rows, its derivatives in <anchor_i, z_j> and in the squared norms under the gates."""
        squared = panel.products[0].detach()
        inverse = squared.clamp_min(_TINY).rsqrt_()
        logits = (panel.s.detach() * inverse).mul_(self.scale)
        position, valid = panel.members()
        positives = logits.gather(1, position)
        # Far below, yet finite: an anchor without negatives has a loss and a gradient of 0.
        lowest = torch.finfo(logits.dtype).min / 4
        weights = logits.clone().masked_fill_(classes[panel.column][None] == own[:, None], lowest)
        weights.masked_fill_(panel.member, lowest)
        top = weights.amax(1, keepdim=True)
        weights.sub_(top).exp_()
        total = weights.sum(1, keepdim=True)
        gaps = (top + total.log()) - positives
        pull = torch.where(valid, gaps.sigmoid(), 0.0)
        value = torch.where(valid, F.softplus(gaps, threshold=40), 0.0).sum()
        weights.mul_(pull.sum(1, keepdim=True) / total).scatter_add_(1, position, -pull)  # of the logits
        of_squared = logits.mul_(weights).mul_(inverse).mul_(inverse).mul_(-0.5)
        return value, weights.mul_(inverse).mul_(self.scale), of_squared.masked_fill_(squared < _TINY, 0.0)
