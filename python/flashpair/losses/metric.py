"""The module behind every metric-learning loss: constructor keywords, checks and regularisation."""

from __future__ import annotations

import inspect

from torch import Tensor

from ..distributed.sharded import current
from ..miners.selection import MinedPairs
from .geometry import NotFused, geometry_of
from .group import InGroup
from .peer import INSTALLED, BaseMetricLossFunction, CosineSimilarity, MeanReducer
from .problem import PairProblem, pair_problem
from .reducers import Rule, reducer_rule


def peer_losses():
    """pytorch-metric-learning's losses."""
    from pytorch_metric_learning import losses

    return losses


class MetricLoss(InGroup, BaseMetricLossFunction):
    """Base of the losses with pytorch-metric-learning's call; subclasses implement `fused`.

    Args:
        distance: CosineSimilarity, DotProductSimilarity or LpDistance (p=2, power 1 or 2). Default: the loss's own.
        reducer: MeanReducer, SumReducer, AvgNonZeroReducer, ThresholdReducer or MultipleReducers of these.
        embedding_regularizer: callable on the embeddings whose value is added to the loss. Default: none.
        embedding_reg_weight: its weight.
        collect_stats: accepted for compatibility; statistics come from `return_stats=True` at the call.
        dense_fallback: compute a distance or reducer that has no fused form with pytorch-metric-learning's class of the
            same name, whose memory grows with B × N (or with the number of triplets), instead of raising. Default: no.
        group: a process group, a DeviceMesh dimension or a `flashpair.distributed.Group`: the loss is that of the
            batches of all its ranks, in rank order, and equal on all of them; index tuples and `ref_emb` are of the
            global batch too. Default: the batch of this process.
    """

    #: Whether the loss says what DivisorReducer divides by.
    names_divisor = False
    #: Whether a pair listed twice in an index tuple counts once.
    collapse = True
    #: Whether the peer's class can stand in: not for losses with parameters or a state, which it would have of its own.
    falls_back = True
    #: Whether an index tuple weights the anchors instead of choosing pairs.
    weighs_rows = False

    def __init__(
        self,
        distance=None,
        reducer=None,
        embedding_regularizer=None,
        embedding_reg_weight=1,
        collect_stats=None,
        dense_fallback: bool = False,
        group=None,
    ) -> None:
        super().__init__(
            group=group,
            distance=distance,
            reducer=reducer,
            embedding_regularizer=embedding_regularizer,
            embedding_reg_weight=embedding_reg_weight,
            collect_stats=collect_stats,
        )
        self.dense = False
        try:
            self.check_distance()
            for part in self._sub_loss_names():
                self.check_rule(reducer_rule(self.reducer, part, self.names_divisor))
        except NotFused as error:
            if not (self.falls_back and INSTALLED and hasattr(peer_losses(), type(self).__name__)):
                raise
            if not dense_fallback:
                raise ValueError(
                    f"{error}; {type(self).__name__}(..., dense_fallback=True) computes it with pytorch-metric-"
                    "learning, in memory that grows with B x N or with the number of triplets"
                ) from None
            self.dense = True

    def check_distance(self) -> None:
        """Raises NotFused, or ValueError on a distance that the loss is not defined with."""
        geometry_of(self.distance)

    def check_rule(self, rule: Rule) -> None:
        """Raises NotFused on a reducer that the loss has no fused form for."""

    def _dense_loss(self, *call):
        """The loss by pytorch-metric-learning's class of the same name and arguments.

        Raises:
            ValueError: on an argument of this class that the peer's has not.
        """
        peer = getattr(peer_losses(), type(self).__name__)
        known, arguments = inspect.signature(peer.__init__).parameters, {}
        shared = ("kwargs", *inspect.signature(MetricLoss.__init__).parameters)
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name in shared:
                continue
            value = getattr(self, name)
            if name in known:
                arguments[name] = value
            elif value != parameter.default:
                raise ValueError(f"{name} must be {parameter.default!r} with dense_fallback; got {value!r}")
        return peer(**arguments, distance=self.distance, reducer=self.reducer)(*call)

    def _sub_loss_names(self) -> list[str]:
        return ["loss"]

    def get_default_distance(self):
        return CosineSimilarity()

    def get_default_reducer(self):
        return MeanReducer()

    def loss_of(self, problem: PairProblem) -> Tensor:
        """The loss of the pairs of one call."""
        raise NotImplementedError

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        """The loss of one call, with its statistics where they are wanted."""
        mined = indices_tuple if self.weighs_rows else None
        chosen = None if self.weighs_rows else indices_tuple
        problem = pair_problem(embeddings, labels, chosen, ref_emb, ref_labels, self.distance, collapse=self.collapse)
        problem.mined, problem.measure = mined, return_stats
        if isinstance(mined, MinedPairs) and problem.y is not None:
            problem.exclude = mined.exclude  # a memory's copies of the batch's own rows
        return problem.finish(self.loss_of(problem))

    def rule(self, part: str = "loss") -> Rule:
        """How a part of the loss is reduced."""
        return reducer_rule(self.reducer, part, self.names_divisor)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple=None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        return_stats: bool = False,
    ):
        """The loss of a batch.

        Args:
            embeddings: (B, D) float32, float64, bfloat16 or float16.
            labels: (B,) int64. Required unless `indices_tuple` is given.
            indices_tuple: what a miner returned, or index tensors (anchors, positives, negatives) or
                (anchors, positives, anchors, negatives). Default: all pairs.
            ref_emb: (N, D) embeddings to compare with. Default: the embeddings themselves, without self pairs.
            ref_labels: (N,) int64, required with `ref_emb` and labels.
            return_stats: also return `PairStatistics` of the pairs that entered the loss, from the same pass.

        Returns:
            0-d loss in float32 (float64 for float64), or `(loss, PairStatistics)` with `return_stats=True`.
        """
        if self.group is not None and current() is None:
            tensors = {"embeddings": embeddings, "labels": labels, "ref_emb": ref_emb, "ref_labels": ref_labels}
            return self.over_group(self.forward, tensors, indices_tuple=indices_tuple, return_stats=return_stats)
        if self.dense:
            if return_stats:
                raise ValueError("return_stats must be False with dense_fallback; got True")
            return self._with_regularizer(
                self._dense_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels), embeddings, False
            )
        result = self.fused(embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats)
        return self._with_regularizer(result, embeddings, return_stats)

    def _with_regularizer(self, result, embeddings: Tensor, return_stats: bool):
        if self.embedding_regularizer is None:
            return result
        added = self.embedding_reg_weight * self.embedding_regularizer(embeddings)
        return (result[0] + added, result[1]) if return_stats else result + added
