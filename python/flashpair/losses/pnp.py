"""PNP: penalise negatives before positives."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..rows import RowPanel
from ..terms import Mask
from .geometry import require
from .metric import MetricLoss
from .peer import CosineSimilarity
from .problem import PairProblem
from .ranks import soft_ranks


class PNPLoss(MetricLoss):
    """Counts, softly, the negatives ranked before each positive of an anchor, the anchor itself included.

        R_ip = Σ_{n in N_i} σ((s_in - s_ip) / τ),    loss = mean_i mean_{p in P_i ∪ {i}} f(R_ip)
        f:  O  R;   Iu  (1 + R) log(1 + R);   Ib  (b R - log(1 + b R)) / b²;   Ds  log(1 + R);   Dq  1 - (1 + R)^-α

    over anchors with positives. pytorch-metric-learning's class: same constructor, same call; it stores (B, B, B). The
    loss is one number: reducers do not change it.

    Args:
        b, alpha: of the variants Ib and Dq. Default 2 and 1.
        anneal: τ > 0. Default 0.01.
        variant: "O" (default), "Iu", "Ib", "Ds" or "Dq".
        **kwargs: see `MetricLoss`. The distance is CosineSimilarity.

    Raises:
        ValueError, TypeError: on a bad number or variant, an unsupported distance, or a given `indices_tuple`.

    Source: Li et al., "Rethinking the Optimization of Average Precision: Only Penalizing Negative Instances before
    Positive Ones is Enough", AAAI 2022, equations 5-11.

    Example:
        >>> import torch
        >>> from flashpair.losses import PNPLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(PNPLoss()(embeddings, labels)), 4)  # two negatives level with the positive
        0.5
    """

    VARIANTS = ("Ds", "Dq", "Iu", "Ib", "O")

    def __init__(self, b: float = 2, alpha: float = 1, anneal: float = 0.01, variant: str = "O", **kwargs) -> None:
        super().__init__(**kwargs)
        checks.number("b", b, low=0.0, open_low=True)
        checks.number("alpha", alpha)
        checks.number("anneal", anneal, low=0.0, open_low=True)
        if variant not in self.VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(self.VARIANTS)}; got {variant!r}")
        self.b, self.alpha, self.anneal, self.variant = b, alpha, anneal, variant

    def check_distance(self) -> None:
        require(self.distance, "PNPLoss", (CosineSimilarity,))

    def penalty(self, rank: Tensor) -> Tensor:
        """f(R), for Dq without its leading 1 and sign."""
        if self.variant == "Ds":
            return torch.log1p(rank)
        if self.variant == "Dq":
            return (1 + rank) ** -self.alpha
        if self.variant == "Iu":
            return (1 + rank) * torch.log1p(rank)
        if self.variant == "Ib":
            return (self.b * rank - torch.log1p(self.b * rank)) / self.b**2
        return rank

    def loss_of(self, problem: PairProblem) -> Tensor:
        own = problem.y is None

        def formula(panel: RowPanel) -> list[Tensor]:
            position, valid = panel.members(own)
            points = torch.where(valid, panel.s.gather(1, position), 0.0)
            rank = soft_ranks(panel, Mask.DIFFERENT, points, 1 / self.anneal)
            return [torch.where(valid, self.penalty(rank), 0.0).sum(1), valid.sum(1)]

        total, members = problem.row_reduce(formula, "PNPLoss")
        some = members > (1 if own else 0)
        loss = torch.where(some, total / members.clamp_min(1), 0.0).sum() / some.sum().clamp_min(1)
        return torch.where(some.any(), 1 - loss, 0.0) if self.variant == "Dq" else loss
