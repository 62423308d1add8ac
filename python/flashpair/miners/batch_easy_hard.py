"""One positive and one negative of each row, easy, hard or semi-hard."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.problem import PairProblem
from ..primitives import Mined, mine
from ..request import statistics_dtype
from ..terms import Extreme, Mask
from .base import Miner
from .selection import MinedPairs


class BatchEasyHardMiner(Miner):
    """Chooses a positive and a negative of each row, each by its own strategy.

        positive:  easy: the closest;  hard: the farthest;   negative:  easy: the farthest;  hard: the closest
        semihard negative: the closest beyond the chosen positive;  semihard positive: the farthest inside the negative
        all: every one

    strictly beyond, and within the allowed ranges (inclusive). Rows that lack either give nothing.
    pytorch-metric-learning's class: same constructor, same call, same index tuple; ties go to the lowest column.

    Args:
        pos_strategy: "easy" (default), "hard", "semihard" or "all".
        neg_strategy: "semihard" (default), "hard", "easy" or "all".
        allowed_pos_range, allowed_neg_range: (lowest, highest) distance or similarity that may be chosen.
        distance: LpDistance of normalised embeddings (default; p=2, power 1 or 2), CosineSimilarity or
            DotProductSimilarity.
        group: ranks whose batches are mined as one, as in `MetricLoss`; the selection is of all of them. Default: none.

    Returns:
        Index tensors (anchors, positives, anchors, negatives); lazily `MinedPairs` where both strategies are "all".

    Raises:
        ValueError: on an unknown strategy, two semihard ones or semihard with all, a bad range, another distance.

    Source: Xuan, Stylianou, Pless, "Improved Embeddings with Easy Positive Triplet Mining", WACV 2020.

    Example:
        >>> import torch
        >>> from flashpair.losses import LpDistance
        >>> from flashpair.miners import BatchEasyHardMiner
        >>> embeddings, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1])
        >>> miner = BatchEasyHardMiner(distance=LpDistance(normalize_embeddings=False))
        >>> [index.tolist() for index in miner(embeddings, labels)]
        [[0, 1], [1, 0], [0, 1], [2, 2]]
    """

    HARD, SEMIHARD, EASY, ALL = "hard", "semihard", "easy", "all"
    all_batch_mining_strategies = (HARD, SEMIHARD, EASY, ALL)

    def __init__(
        self,
        pos_strategy: str = EASY,
        neg_strategy: str = SEMIHARD,
        allowed_pos_range: tuple[float, float] | None = None,
        allowed_neg_range: tuple[float, float] | None = None,
        distance=None,
        collect_stats=None,
        group=None,
    ) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats, group=group)
        allowed = ", ".join(self.all_batch_mining_strategies)
        both = {"pos_strategy": pos_strategy, "neg_strategy": neg_strategy}
        for name, value in both.items():
            if value not in self.all_batch_mining_strategies:
                raise ValueError(f"{name} must be one of {allowed}; got {value!r}")
        if self.SEMIHARD in both.values() and (pos_strategy == neg_strategy or self.ALL in both.values()):
            raise ValueError(
                'pos_strategy and neg_strategy cannot both be "semihard", nor one of them with "all"; '
                f"got {pos_strategy!r} and {neg_strategy!r}"
            )
        for name, value in (("allowed_pos_range", allowed_pos_range), ("allowed_neg_range", allowed_neg_range)):
            if value is not None and not (len(value) == 2 and value[0] <= value[1]):
                raise ValueError(f"{name} must be (lowest, highest); got {value!r}")
        self.pos_strategy, self.neg_strategy = pos_strategy, neg_strategy
        self.allowed_pos_range, self.allowed_neg_range = allowed_pos_range, allowed_neg_range

    def select(self, problem: PairProblem):
        if self.pos_strategy == self.neg_strategy == self.ALL and not (
            self.allowed_pos_range or self.allowed_neg_range
        ):
            return MinedPairs(
                problem.x, problem.y, problem.labels, problem.ref_labels, problem.geometry, {}, problem.exclude
            )
        semihard_positive = self.pos_strategy == self.SEMIHARD
        first = None
        found = {}
        for sign in ("neg", "pos") if semihard_positive else ("pos", "neg"):
            strategy = getattr(self, f"{sign}_strategy")
            if strategy != self.ALL:
                found[sign] = self._extreme(problem, sign, first if strategy == self.SEMIHARD else None)
                first = found[sign].values[:, 0]
        rows = torch.arange(problem.x.shape[0], device=problem.x.device)
        chosen = {sign: mined.indices[:, 0] for sign, mined in found.items()}
        if len(chosen) == 2:
            keep = (chosen["pos"] >= 0) & (chosen["neg"] >= 0)
            return rows[keep], chosen["pos"][keep], rows[keep], chosen["neg"][keep]
        everything = MinedPairs(
            problem.x, problem.y, problem.labels, problem.ref_labels, problem.geometry, {}, problem.exclude
        ).as_tuple()
        pairs = {"pos": everything[:2], "neg": everything[2:]}
        for sign, partners in chosen.items():
            keep = partners >= 0
            pairs[sign] = (rows[keep], partners[keep])
        return (*pairs["pos"], *pairs["neg"])

    def _extreme(self, problem: PairProblem, sign: str, threshold: Tensor | None) -> Mined:
        """One partner of each row."""
        strategy, allowed = getattr(self, f"{sign}_strategy"), getattr(self, f"allowed_{sign}_range")
        closest = (strategy == self.EASY) == (sign == "pos")
        geometry = problem.geometry
        largest = closest == (geometry.sign > 0)
        above, below = (None, None) if allowed is None else self._open(allowed, problem)
        if threshold is not None:
            # Strictly on the far side of the other's choice, whose absence is no bound.
            present = threshold.isfinite()
            if largest:
                bound = torch.where(present, threshold, torch.inf)
                below = bound if below is None else torch.minimum(bound, below)
            else:
                bound = torch.where(present, threshold, -torch.inf)
                above = bound if above is None else torch.maximum(bound, above)
        mask = Mask.SAME if sign == "pos" else Mask.DIFFERENT
        return mine(
            problem.x, problem.y, [Extreme(mask, largest=largest, above=above, below=below)],
            labels=problem.labels, ref_labels=problem.ref_labels, exclude=problem.exclude,
            similarity=geometry.similarity, normalize=geometry.normalize,
        )[0]  # fmt: skip

    @staticmethod
    def _open(allowed: tuple[float, float], problem: PairProblem) -> tuple[Tensor, Tensor]:
        """Bounds that a value in the closed range lies strictly between."""
        ends = torch.tensor(allowed, dtype=statistics_dtype(problem.x), device=problem.x.device)
        rows = torch.ones(problem.x.shape[0], dtype=ends.dtype, device=ends.device)
        infinity = torch.full_like(ends[0], torch.inf)
        return rows * torch.nextafter(ends[0], -infinity), rows * torch.nextafter(ends[1], infinity)
