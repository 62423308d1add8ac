"""The module behind every miner: checks, no gradients, and the pass over the pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.sharded import current
from ..losses.geometry import geometry_of
from ..losses.group import InGroup
from ..losses.peer import BaseMiner
from ..losses.problem import PairProblem, pair_problem
from ..primitives import Mined, mine
from ..terms import Extreme, Mask, Similarity


class Miner(InGroup, BaseMiner):
    """Base of the miners with pytorch-metric-learning's call; subclasses implement `select`."""

    def __init__(self, distance=None, collect_stats=None, group=None) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats, group=group)
        geometry_of(self.distance)

    def select(self, problem: PairProblem):
        """The selection from the pairs of one call."""
        raise NotImplementedError

    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ):
        """Mine a batch.

        Args:
            embeddings: (B, D) float32, float64, bfloat16 or float16.
            labels: (B,) int64.
            ref_emb: (N, D) embeddings to mine in. Default: the embeddings themselves, without self pairs.
            ref_labels: (N,) int64, required with `ref_emb`.

        Returns:
            A selection that losses take as `indices_tuple`; its `as_tuple()` gives index tensors.

        Raises:
            TypeError, ValueError: on bad input, naming the argument.
        """
        if self.group is not None and current() is None:
            return self.over_group(
                self.forward,
                {"embeddings": embeddings, "labels": labels, "ref_emb": ref_emb, "ref_labels": ref_labels},
            )
        with torch.no_grad():
            return self.select(pair_problem(embeddings, labels, None, ref_emb, ref_labels, self.distance))


def loosened(problem: PairProblem, limit: Tensor, outward: float) -> Tensor:
    """The limit moved outward (+1 or -1) by the rounding of a similarity.

    For thresholds that are themselves similarities: the pair they come from must pass, also from its other end and
    where another kernel computes it.
    """
    eps = 8 * torch.finfo(limit.dtype).eps
    size = 1.0
    if not problem.geometry.normalize:
        sides = (problem.x,) if problem.y is None else (problem.x, problem.y)
        size = torch.stack([v.to(limit.dtype).square().sum(1).max() for v in sides if v.numel()]).max()
    slack = eps * size
    if problem.geometry.similarity == Similarity.EUCLIDEAN:  # the square has that rounding
        slack = slack / limit.abs().clamp_min(1e-3)
    return limit + outward * slack


def hardest(problem: PairProblem) -> tuple[Mined, Mined]:
    """The farthest positive and the closest negative of each row, from one pass."""
    return _mined(problem, _farthest_positive(problem), _closest_negative(problem))


def farthest_positive(problem: PairProblem) -> Tensor:
    """(B,) similarities or distances of the farthest positives; only the pairs of one class are visited."""
    return _mined(problem, _farthest_positive(problem))[0].values[:, 0]


def closest_negative(problem: PairProblem) -> Tensor:
    """(B,) similarities or distances of the closest negatives."""
    return _mined(problem, _closest_negative(problem))[0].values[:, 0]


def _farthest_positive(problem: PairProblem) -> Extreme:
    return Extreme(Mask.SAME, largest=problem.geometry.sign < 0)


def _closest_negative(problem: PairProblem) -> Extreme:
    return Extreme(Mask.DIFFERENT, largest=problem.geometry.sign > 0)


def _mined(problem: PairProblem, *extremes: Extreme) -> tuple[Mined, ...]:
    return mine(
        problem.x,
        problem.y,
        extremes,
        labels=problem.labels,
        ref_labels=problem.ref_labels,
        exclude=problem.exclude,
        similarity=problem.geometry.similarity,
        normalize=problem.geometry.normalize,
    )
