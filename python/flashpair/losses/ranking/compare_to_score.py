"""Scores of items from how often each was preferred to each other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...request import statistics_dtype
from .comparison import ComparisonModel

_STEPS = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)


@torch.no_grad()
def compare_to_score(
    comparisons: Tensor,
    model: ComparisonModel = ComparisonModel.THURSTONE,
    highest: float | None = None,
    iterations: int = 30,
) -> Tensor:
    """The most probable scores of items of which pairs were compared, with a standard normal prior.

        q = argmax  Σ_ij C_ij log φ(q_i - q_j)  -  ½ Σ_i q_i²,   φ the model's probability that i beats j

    The sum is strictly concave: Newton steps, the best of six lengths each, from 0. The authors' code takes 100 steps
    of Adam from random numbers and bounds φ at 1e-6 from below, which changes nothing where no pair at the maximum is
    that improbable. Nothing is read from the device. Not differentiable.

    Args:
        comparisons: (n, n) float32, float64, bfloat16 or float16, finite and ≥ 0 (not checked): C_ij, how often or how
            probably i was preferred to j. The diagonal does not count.
        model: see `ComparisonModel`. Default: THURSTONE, as the paper; BRADLEY_TERRY, as its evaluation code.
        highest: scores are moved and scaled to 0 ... highest (> 0), all highest / 2 where they are equal; the authors
            take 100. Default: none, q itself, of which the mean is 0.
        iterations: ≥ 1; more where some pairs were compared millions of times as often as others. Default 30.

    Returns:
        (n,) scores in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: on bad input, naming the argument.

    Source: Zhu et al., "Adaptive Image Quality Assessment via Teaching Large Multimodal Model to Compare"
    (Compare2Score), NeurIPS 2024, read through the authors' code, q_align/evaluate/scorer.py.

    Example:
        >>> import torch
        >>> from flashpair.losses import compare_to_score
        >>> first_beats_all = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.5], [0.0, 0.5, 0.0]])
        >>> compare_to_score(first_beats_all, highest=100.0).tolist()
        [100.0, 0.0, 0.0]
    """
    if not isinstance(comparisons, Tensor):
        raise TypeError(f"comparisons must be a tensor; got {type(comparisons).__name__}")
    if comparisons.dim() != 2 or comparisons.shape[0] != comparisons.shape[1]:
        raise ValueError(f"comparisons must have shape (items, items); got {tuple(comparisons.shape)}")
    checks.embeddings("comparisons", comparisons)
    checks.member("model", model, ComparisonModel)
    checks.count("iterations", iterations)
    if highest is not None:
        checks.number("highest", highest, low=0.0, open_low=True)
    wins = comparisons.to(statistics_dtype(comparisons))
    q, steps = wins.new_zeros(len(wins)), wins.new_tensor(_STEPS)
    for _ in range(iterations if len(wins) else 0):
        rise, bend = _slopes(model, q[:, None] - q[None])
        gained, curved = wins * rise, wins * bend
        gradient = gained.sum(1) - gained.sum(0) - q
        curved = curved + curved.T  # ≤ 0
        hessian = curved - torch.diag(curved.sum(1) - 1)  # of the negative, at least the identity
        step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky_ex(hessian).L)[:, 0]
        tried = q + steps[:, None] * step
        values = torch.stack([(wins * _log(model, t[:, None] - t[None])).sum() - t.square().sum() / 2 for t in tried])
        q = tried.index_select(0, values.argmax()[None])[0]
    if highest is None or len(wins) == 0:
        return q
    low, high = q.min(), q.max()
    # What rounding makes of equal scores is no order.
    apart = high - low > 16 * torch.finfo(q.dtype).eps * (high.abs() + low.abs())
    return highest * torch.where(apart, (q - low) / torch.where(apart, high - low, 1.0), 0.5)


def _log(model: ComparisonModel, d: Tensor) -> Tensor:
    return torch.special.log_ndtr(d) if model == ComparisonModel.THURSTONE else F.logsigmoid(d)


def _slopes(model: ComparisonModel, d: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of the logarithm of the probability."""
    if model == ComparisonModel.THURSTONE:
        first = math.sqrt(2 / math.pi) / torch.special.erfcx(d * -math.sqrt(0.5))
        return first, -first * (d + first)
    first = torch.sigmoid(-d)
    return first, first * (first - 1)
