"""Margin loss with a learnable boundary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import checks
from ..miners.selection import MinedPairs
from ..pairs import segment_sum
from ..request import statistics_dtype
from ..terms import Mask, Reduction, Score, Term
from .arguments import constant
from .metric import MetricLoss
from .peer import DivisorReducer, LpDistance
from .problem import PairProblem, pair_problem
from .reducers import Rule, reduce_sums, refuse
from .triplets import Triplets, check_triplets_per_anchor, listed_triplets, random_triplets


class MarginLoss(MetricLoss):
    """Positives inside and negatives outside a boundary β, with a margin on both sides.

        loss = Σ_{(a,p,n)} ( [d_ap - β + margin]_+ + [β - d_an + margin]_+ ) / #{active terms}

    over all triplets, which separate: with n_a negatives and p_a positives of a row it is n_a times its positives' sum
    plus p_a times its negatives'. One pass, O(B·D) memory. pytorch-metric-learning's class: same constructor, same
    call; it lists the triplets.

    Args:
        margin: default 0.2.
        nu: weight of ν β, added where β is learned. Default 0.
        beta: β, also its start. Default 1.2.
        triplets_per_anchor: "all" (default), or how many random triplets of each anchor.
        learn_beta: whether `beta` is a parameter. Default: no.
        num_classes: a β for each class, found by the anchor's label. Default: one.
        **kwargs: see `MetricLoss`. Default distance: LpDistance of normalised embeddings; default reducer:
            DivisorReducer, by the number of active terms. Parts: "margin_loss", "beta_reg_loss".

    Raises:
        ValueError, TypeError: on a bad number, or an unsupported distance or reducer.

    Source: Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, equation 5.

    Example:
        >>> import torch
        >>> from flashpair.losses import MarginLoss
        >>> embeddings, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> round(float(MarginLoss()(embeddings, labels)), 4)  # every positive is sqrt(2) - 1.2 + 0.2 off
        0.4142
    """

    falls_back = False
    names_divisor = True
    collapse = False

    def __init__(
        self,
        margin: float = 0.2,
        nu: float = 0,
        beta: float = 1.2,
        triplets_per_anchor="all",
        learn_beta: bool = False,
        num_classes: int | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("margin", margin), ("nu", nu), ("beta", beta)):
            checks.number(name, value)
        check_triplets_per_anchor(triplets_per_anchor)
        self.margin, self.nu = margin, nu
        self.triplets_per_anchor = triplets_per_anchor
        self.learn_beta = learn_beta
        self.num_classes = num_classes
        start = torch.full((num_classes or 1,), float(beta))
        if learn_beta:
            self.beta = nn.Parameter(start)
        else:
            self.register_buffer("beta", start)

    def _sub_loss_names(self) -> list[str]:
        return ["margin_loss", "beta_reg_loss"]

    def get_default_distance(self):
        return LpDistance()

    def get_default_reducer(self):
        return DivisorReducer()

    def check_rule(self, rule: Rule) -> None:
        refuse(rule, "MarginLoss", bounds=True, per_anchor=True)

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        if indices_tuple is None and self.triplets_per_anchor != "all":
            problem = pair_problem(embeddings, labels, None, ref_emb, ref_labels, self.distance)
            indices_tuple = random_triplets(labels, problem.ref_labels, problem.exclude, self.triplets_per_anchor)
        separable = indices_tuple is None or isinstance(indices_tuple, MinedPairs)
        problem = pair_problem(embeddings, labels, indices_tuple, ref_emb, ref_labels, self.distance, collapse=False)
        problem.measure = return_stats
        beta = self._beta(problem)
        if separable and problem.pairs is None:
            return problem.finish(self._loss_of_all(problem, beta))
        columns = embeddings if problem.y is None else problem.y
        return problem.finish(self._loss_of_listed(problem, listed_triplets(indices_tuple, embeddings, columns), beta))

    def _beta(self, problem: PairProblem) -> Tensor:
        """(B,) or 0-d."""
        beta = self.beta.to(problem.x.device, statistics_dtype(problem.x))
        if len(beta) == 1:
            return beta.reshape(())
        if problem.anchor_labels is None:
            raise ValueError("labels must be given to MarginLoss with a beta for each class; got None")
        return beta[problem.anchor_labels]

    def _loss_of_all(self, problem: PairProblem, beta: Tensor) -> Tensor:
        away = -problem.geometry.sign
        pull = {"mask": Mask.SAME, "scale": float(away), "offset": self.margin - away * beta}
        push = {"mask": Mask.DIFFERENT, "scale": -float(away), "offset": self.margin + away * beta}
        fixed = [{**side, "offset": constant(side["offset"])} for side in (pull, push)]
        (near, far, active_near, active_far), (p, n) = problem.reduce(
            [Term(Reduction.SUM, Score.HINGE, **side) for side in (pull, push)]
            + [Term(Reduction.COUNT, Score.HINGE, **side) for side in fixed],
            counts=(Mask.SAME, Mask.DIFFERENT),
        )
        # Each positive of a row meets each of its negatives.
        active = n * active_near + p * active_far
        not_zero = n * p - (p - active_near) * (n - active_far)
        return self._reduced(problem, n * near + p * far, n * p, not_zero, active.sum(), beta)

    def _loss_of_listed(self, problem: PairProblem, triplets: Triplets, beta: Tensor) -> Tensor:
        a, p, n, valid = triplets
        problem.reduce([])
        away, beta_a = -problem.geometry.sign, beta if beta.dim() == 0 else beta[a]
        near = torch.relu(away * (problem.similarity(a, p) - beta_a) + self.margin)
        far = torch.relu(away * (beta_a - problem.similarity(a, n)) + self.margin)
        if valid is not None:
            near, far = torch.where(valid, near, 0.0), torch.where(valid, far, 0.0)
        segment = lambda values: segment_sum(values.to(near.dtype), a, problem.x.shape[0])  # noqa: E731
        every = torch.ones_like(a, dtype=torch.bool) if valid is None else valid
        active = (near > 0).sum() + (far > 0).sum()
        return self._reduced(
            problem, segment(near + far), segment(every), segment((near + far).detach() > 0), active, beta
        )

    def _reduced(self, problem: PairProblem, sums, counts, not_zero, active, beta: Tensor) -> Tensor:
        """Both parts from the sum, the number and the number above zero of each anchor's triplets."""
        rule, labels = self.rule("margin_loss"), problem.anchor_labels
        loss = reduce_sums(sums, not_zero if rule.low == 0 else counts, rule, labels, active)
        if not self.learn_beta:
            return loss
        if beta.dim() == 0:
            return loss + self.nu * beta
        return loss + reduce_sums(counts * self.nu * beta, counts, self.rule("beta_reg_loss"), labels, active)
