"""Supervised contrastive learning over several views, by its authors' call."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor, nn

from ... import checks
from ...distributed.sharded import Sharded
from ...primitives import pair_reduce
from ...terms import Mask, Reduction, Term
from ..arguments import poisoned
from ..group import InGroup
from ..two_views import nothing, side_by_side


class ContrastMode(StrEnum):
    """Which views are anchors."""

    ALL = "all"
    ONE = "one"  # the first


class MultiViewSupConLoss(InGroup, nn.Module):
    """SupCon over V views of each sample: `loss(features, labels)`, or `loss(features)` for SimCLR.

        l_i = -(T / T₀) · mean_{p in P_i} [ s_ip / T - LSE_{a != i} s_ia / T ],    mean over the anchors

    The authors' class: same constructor, same call. Features are used as they come (normalise them first). An anchor
    without positives contributes 0 and counts in the mean.

    Args:
        temperature: T > 0. Default 0.07.
        contrast_mode: all views are anchors, or the first: `ContrastMode` or "all", "one". Default: all.
        base_temperature: T₀. Default 0.07.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`. Default: none.

    Raises:
        TypeError, ValueError: on bad numbers or modes.

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2; HobbitLong/SupContrast,
    losses.py.

    Example:
        >>> import torch
        >>> from flashpair.losses import MultiViewSupConLoss
        >>> features = torch.eye(2)[:, None].expand(2, 2, 2)  # two views of two samples
        >>> round(float(MultiViewSupConLoss(1.0, base_temperature=1.0)(features)), 4)  # log(e + 2) - 1
        0.5514
    """

    row_groups = None

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: ContrastMode | str = ContrastMode.ALL,
        base_temperature: float = 0.07,
        group=None,
    ) -> None:
        super().__init__(group=group)
        checks.number("temperature", temperature, low=0.0, open_low=True)
        checks.number("base_temperature", base_temperature, low=0.0, open_low=True)
        if contrast_mode not in [m.value for m in ContrastMode]:
            raise ValueError(f"contrast_mode must be 'all' or 'one'; got {contrast_mode!r}")
        self.temperature, self.base_temperature = temperature, base_temperature
        self.contrast_mode = ContrastMode(contrast_mode)

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            features: (B, V, D) V ≥ 1 views of each sample.
            labels: (B,) int64. Default: every sample is a class of its own.
            mask: (B, B) bool, mask[i, j]: sample j is positive for sample i; may be asymmetric. Costs (V B)² bytes.
                Excludes labels and group.

        Returns:
            0-d loss in float32 (float64 for float64).

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None:
            run = lambda labels, **views: self._of(list(views.values()), labels, None)  # noqa: E731
            return self.over_group(run, lambda: {"labels": labels, **self._named(features, labels, mask)})
        return self._of(list(self._named(features, labels, mask).values()), labels, mask)

    def _named(self, features: Tensor, labels: Tensor | None, mask: Tensor | None) -> dict[str, Tensor]:
        """The views, one by one."""
        if not isinstance(features, Tensor) or features.dim() != 3 or features.shape[1] == 0:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features must have shape (rows, views, features) with at least one view; got {got}")
        if labels is not None and mask is not None:
            raise ValueError("labels and mask exclude each other; got both")
        if self.group is not None and mask is not None:
            raise ValueError("mask must be None with group; got one")
        return {f"features[:, {k}]": view for k, view in enumerate(features.unbind(1))}

    def _of(self, views: list[Tensor], labels: Tensor | None, mask: Tensor | None) -> Tensor:
        checks.embeddings("features", views[0])
        rows, device = views[0].shape[0], views[0].device
        if labels is None:
            labels = torch.arange(rows, device=device)
        checks.labels("labels", labels, rows)
        checks.same_device("features", views[0], labels=labels, mask=mask)
        if mask is not None:
            checks.pair_mask(mask, rows, rows)
        if rows == 0:
            return nothing(*views)
        everything, sample = side_by_side(views)
        of = labels[sample]
        pairs = {"labels": of}
        if mask is not None:
            pairs = {"pair_mask": mask.repeat(len(views), len(views))}
        anchors = {"x": everything, **pairs}
        if self.contrast_mode == ContrastMode.ONE:
            anchors = self._of_first(views, everything, labels, of, mask)
        positive = Mask.SAME if mask is None else Mask.GIVEN
        scale = 1 / self.temperature
        every, pull, count = pair_reduce(
            terms=[
                Term(Reduction.LOGSUMEXP, scale=scale),
                Term(Reduction.SUM, mask=positive, scale=scale),
                Term(Reduction.COUNT, mask=positive, scale=0.0, offset=1.0),
            ],
            **anchors,
        )
        losses = torch.where(count > 0, every - pull / count.clamp_min(1), 0.0)
        return poisoned(losses.mean() * (self.temperature / self.base_temperature), *views)

    def _of_first(self, views, everything, labels, of, mask) -> dict:
        """The arguments of a pass whose rows are the first views only."""
        first, rows = views[0], views[0].shape[0]
        itself = torch.arange(rows, device=first.device)
        if isinstance(first, Sharded):
            starts = torch.cat([torch.full((n,), sum(first.sizes[:r])) for r, n in enumerate(first.sizes)])
            itself = itself + (len(views) - 1) * starts.to(itself)
        if mask is not None:
            return {"x": first, "y": everything, "pair_mask": mask.repeat(1, len(views)), "exclude": itself}
        return {"x": first, "y": everything, "labels": labels, "ref_labels": of, "exclude": itself}
