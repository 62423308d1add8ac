"""The module behind every metric-learning loss: constructor keywords, checks and regularisation."""

from __future__ import annotations

from torch import Tensor

from .geometry import geometry_of
from .peer import BaseMetricLossFunction, CosineSimilarity, MeanReducer
from .reducers import reducer_rule


class MetricLoss(BaseMetricLossFunction):
    """Base of the losses with pytorch-metric-learning's call; subclasses implement `fused`.

    Args:
        distance: CosineSimilarity, DotProductSimilarity or LpDistance (p=2, power 1 or 2). Default: the loss's own.
        reducer: MeanReducer, SumReducer, AvgNonZeroReducer, ThresholdReducer or MultipleReducers of these.
        embedding_regularizer: callable on the embeddings whose value is added to the loss. Default: none.
        embedding_reg_weight: its weight.
        collect_stats: accepted for compatibility; statistics come from `return_stats=True` at the call.
    """

    #: Whether the loss says what DivisorReducer divides by.
    names_divisor = False

    def __init__(
        self, distance=None, reducer=None, embedding_regularizer=None, embedding_reg_weight=1, collect_stats=None
    ) -> None:
        super().__init__(
            distance=distance,
            reducer=reducer,
            embedding_regularizer=embedding_regularizer,
            embedding_reg_weight=embedding_reg_weight,
            collect_stats=collect_stats,
        )
        geometry_of(self.distance)
        for part in self._sub_loss_names():
            reducer_rule(self.reducer, part, self.names_divisor)

    def _sub_loss_names(self) -> list[str]:
        return ["loss"]

    def get_default_distance(self):
        return CosineSimilarity()

    def get_default_reducer(self):
        return MeanReducer()

    def fused(self, embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats):
        """The loss's function with this module's settings."""
        raise NotImplementedError

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
        result = self.fused(embeddings, labels, indices_tuple, ref_emb, ref_labels, return_stats)
        if self.embedding_regularizer is None:
            return result
        added = self.embedding_reg_weight * self.embedding_regularizer(embeddings)
        return (result[0] + added, result[1]) if return_stats else result + added
