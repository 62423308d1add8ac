"""What a temperature does to a contrastive loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks
from ...pairs import pair_similarity
from ...primitives import pair_reduce
from ...terms import Mask, Reduction, Term
from ..arguments import check_matched, inverse_temperature
from .align_uniform import UniformityLoss


class TemperatureDiagnostics(NamedTuple):
    """Of a batch; nothing is differentiable."""

    pull: Tensor  # (B,) gradient of the loss in the positive times -T: the probability of all negatives together
    effective_negatives: (
        Tensor  # (B,) exp of the entropy of the penalties r_ij: 1 with one hard negative, at most B - 1
    )
    hardest_share: Tensor  # (B,) largest relative penalty max_j r_ij
    tolerance: Tensor  # () mean cosine of different samples of a class; NaN without labels
    uniformity: Tensor  # () -log mean e^{-2 ||x_i - x_j||²} of the first view, larger is more uniform


@torch.no_grad()
def temperature_diagnostics(
    first: Tensor, second: Tensor, temperature: float | Tensor, labels: Tensor | None = None
) -> TemperatureDiagnostics:
    """How a temperature spreads the gradient over the negatives, without the B×B matrix.

        r_ij = e^{s_ij / T} / Σ_{k != i} e^{s_ik / T},   s the cosine of x_i and y_j

    Args:
        first, second: (B, D) row i of both is of sample i; B ≥ 2.
        temperature: T.
        labels: (B,) int64, for the tolerance. Default: none.

    Returns:
        `TemperatureDiagnostics`.

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Wang and Liu, "Understanding the Behaviour of Contrastive Loss", CVPR 2021, sections 3 and 5.

    Example:
        >>> import torch
        >>> from flashpair.losses import temperature_diagnostics
        >>> found = temperature_diagnostics(torch.eye(4), torch.eye(4), temperature=0.5)
        >>> found.effective_negatives.round().tolist()  # three equal negatives each
        [3.0, 3.0, 3.0, 3.0]
    """
    check_matched(first, second, ("first", "second"))
    if first.shape[0] < 2:
        raise ValueError(f"first must have at least 2 rows; got {first.shape[0]}")
    scale, index = inverse_temperature(temperature), torch.arange(first.shape[0], device=first.device)
    lse, mean, spread = pair_reduce(
        first, second,
        [
            Term(Reduction.LOGSUMEXP, mask=Mask.DIFFERENT, scale=scale),
            Term(Reduction.SOFTMAX_MEAN, mask=Mask.DIFFERENT, scale=scale),
            Term(Reduction.MOMENTS, mask=Mask.DIFFERENT),
        ],
        labels=index, ref_labels=index, normalize=True,
    )  # fmt: skip
    positive = scale * pair_similarity(first, second, index, index, normalize=True)
    tolerance = lse.new_tensor(torch.nan)
    if labels is not None:
        checks.labels("labels", labels, first.shape[0])
        total, pairs = pair_reduce(
            first, None,
            [Term(Reduction.SUM, mask=Mask.SAME), Term(Reduction.COUNT, mask=Mask.SAME, scale=0.0, offset=1.0)],
            labels=labels, normalize=True,
        )  # fmt: skip
        tolerance = total.sum() / pairs.sum()
    return TemperatureDiagnostics(
        torch.sigmoid(lse - positive),
        torch.exp(lse - scale * mean),
        torch.exp(scale * spread[4] - lse),
        tolerance,
        -UniformityLoss()(first),
    )
