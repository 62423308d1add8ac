"""Threshold-consistent margin loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..request import statistics_dtype
from ..terms import Mask, Reduction, Score, Term
from .geometry import require
from .metric import MetricLoss
from .peer import CosineSimilarity
from .problem import PairProblem


class ThresholdConsistentMarginLoss(MetricLoss):
    """Only pairs on the wrong side of two fixed thresholds, so that one threshold serves all classes.

        loss = λ⁺ mean_{(i,p): s_ip <= m⁺} (m⁺ - s_ip)  +  λ⁻ mean_{(i,n): s_in >= m⁻} (s_in - m⁻)

    pytorch-metric-learning's class: same constructor, same call; it ignores `ref_emb`, this one does not. The loss is
    one number: reducers do not change it.

    Args:
        lambda_plus, lambda_minus: λ⁺, λ⁻. Default 1.
        margin_plus, margin_minus: m⁺, m⁻. Default 0.9 and 0.5.
        **kwargs: see `MetricLoss`. The distance is CosineSimilarity.

    Raises:
        ValueError, TypeError: on a bad number or an unsupported distance.

    Source: Zhang et al., "Learning for Transductive Threshold Calibration in Open-World Recognition" / "Threshold-
    Consistent Margin Loss for Open-World Deep Metric Learning", ICLR 2024, equation 4.

    Example:
        >>> import torch
        >>> from flashpair.losses import ThresholdConsistentMarginLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(ThresholdConsistentMarginLoss()(embeddings, labels)), 4)
        0.9
    """

    collapse = False

    def __init__(
        self,
        lambda_plus: float = 1.0,
        lambda_minus: float = 1.0,
        margin_plus: float = 0.9,
        margin_minus: float = 0.5,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (
            ("lambda_plus", lambda_plus),
            ("lambda_minus", lambda_minus),
            ("margin_plus", margin_plus),
            ("margin_minus", margin_minus),
        ):
            checks.number(name, value)
            setattr(self, name, value)

    def check_distance(self) -> None:
        require(self.distance, "ThresholdConsistentMarginLoss", (CosineSimilarity,))

    def loss_of(self, problem: PairProblem) -> Tensor:
        dtype, device = statistics_dtype(problem.x), problem.x.device
        plus, minus = (
            torch.tensor(float(m), dtype=dtype, device=device) for m in (self.margin_plus, self.margin_minus)
        )
        beyond = torch.tensor(torch.inf, dtype=dtype, device=device)
        # The thresholds themselves count: s < next float above m⁺, s > next float below m⁻.
        inside = {"below": torch.nextafter(plus, beyond)}, {"above": torch.nextafter(minus, -beyond)}
        count = {"scale": 0.0, "offset": 1.0}
        (pull, push, pulled, pushed), _ = problem.reduce(
            [
                Term(Reduction.SUM, Score.HINGE, Mask.SAME, scale=-1.0, offset=plus),
                Term(Reduction.SUM, Score.HINGE, Mask.DIFFERENT, offset=-minus),
                Term(Reduction.COUNT, Score.IDENTITY, Mask.SAME, **count, **inside[0]),
                Term(Reduction.COUNT, Score.IDENTITY, Mask.DIFFERENT, **count, **inside[1]),
            ]
        )
        positive, negative = pull.sum() / pulled.sum().clamp_min(1), push.sum() / pushed.sum().clamp_min(1)
        return self.lambda_plus * positive + self.lambda_minus * negative
