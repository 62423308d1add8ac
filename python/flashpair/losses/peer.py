"""pytorch-metric-learning's base classes, distances and reducers, or stand-ins with the same constructors.

Its wrappers ask `isinstance(loss, BaseMetricLossFunction)`, so our losses are subclasses of that class wherever the
library is installed. It is imported whenever it can be (0.7 s, once, and only when a metric-learning loss or a miner
is first used): a base class that depended on what else had been imported before would depend on import order.
"""

from __future__ import annotations

from torch import Tensor, nn

try:
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from pytorch_metric_learning.losses import CrossBatchMemory as BaseCrossBatchMemory
    from pytorch_metric_learning.miners import BaseMiner
    from pytorch_metric_learning.reducers import (
        AvgNonZeroReducer,
        ClassWeightedReducer,
        DivisorReducer,
        MeanReducer,
        MultipleReducers,
        PerAnchorReducer,
        SumReducer,
        ThresholdReducer,
    )
    from pytorch_metric_learning.reducers.per_anchor_reducer import aggregation_func

    INSTALLED = True
except Exception:  # absent, or broken by its own dependencies: neither may break this package
    INSTALLED = False

    class _Distance(nn.Module):
        is_inverted = False

        def __init__(self, normalize_embeddings: bool = True, p: float = 2, power: float = 1) -> None:
            super().__init__()
            self.normalize_embeddings, self.p, self.power = normalize_embeddings, p, power

    class LpDistance(_Distance):
        """`||x - y||_p ** power`, of normalised embeddings by default."""

    class DotProductSimilarity(_Distance):
        """`<x, y> ** power`, of normalised embeddings by default."""

        is_inverted = True

    class CosineSimilarity(DotProductSimilarity):
        """`<x, y>` of normalised embeddings."""

    class SNRDistance(_Distance):
        """`var(x - y) / var(x)` over the features, of normalised embeddings by default."""

    class MeanReducer(nn.Module):
        """Mean over all losses."""

    class SumReducer(MeanReducer):
        """Sum of all losses."""

    class ThresholdReducer(nn.Module):
        """Mean over the losses with low < loss < high."""

        def __init__(self, low: float | None = None, high: float | None = None) -> None:
            super().__init__()
            if low is None and high is None:
                raise ValueError("low or high must be given; got neither")
            self.low, self.high = low, high

    class AvgNonZeroReducer(ThresholdReducer):
        """Mean over the losses above zero."""

        def __init__(self) -> None:
            super().__init__(low=0)

    class DivisorReducer(nn.Module):
        """Sum over what the loss says, its divisor."""

    class ClassWeightedReducer(nn.Module):
        """Mean over the losses times the weight of their anchor's label."""

        def __init__(self, weights: Tensor) -> None:
            super().__init__()
            self.weights = weights

    def aggregation_func(x, num_per_row):
        """The mean of an anchor's losses; stands for itself, the losses never form such a matrix."""
        raise NotImplementedError

    class PerAnchorReducer(nn.Module):
        """Mean of the losses of each anchor, then another reducer over the anchors."""

        def __init__(self, reducer: nn.Module | None = None, aggregation_func=aggregation_func) -> None:
            super().__init__()
            self.reducer = MeanReducer() if reducer is None else reducer
            self.aggregation_func = aggregation_func

    class MultipleReducers(nn.Module):
        """One reducer for each part of a loss, by name."""

        def __init__(self, reducers: dict[str, nn.Module], default_reducer: nn.Module | None = None) -> None:
            super().__init__()
            self.reducers = nn.ModuleDict(reducers)
            self.default_reducer = MeanReducer() if default_reducer is None else default_reducer

    class BaseMetricLossFunction(nn.Module):
        """Holds what every metric-learning loss is built with."""

        def __init__(
            self, distance=None, reducer=None, embedding_regularizer=None, embedding_reg_weight=1, collect_stats=None
        ) -> None:
            super().__init__()
            self.distance = self.get_default_distance() if distance is None else distance
            self.reducer = self.get_default_reducer() if reducer is None else reducer
            self.embedding_regularizer = embedding_regularizer
            self.embedding_reg_weight = embedding_reg_weight
            self.collect_stats = bool(collect_stats)

        def get_default_distance(self) -> nn.Module:
            return LpDistance()

        def get_default_reducer(self) -> nn.Module:
            return MeanReducer()

    class BaseMiner(nn.Module):
        """Holds what every miner is built with."""

        def __init__(self, distance=None, collect_stats=None) -> None:
            super().__init__()
            self.distance = self.get_default_distance() if distance is None else distance
            self.collect_stats = bool(collect_stats)

        def get_default_distance(self) -> nn.Module:
            return LpDistance()

    class BaseCrossBatchMemory(nn.Module):
        """Holds a loss, a miner and the sizes of the memory."""

        def __init__(self, loss, embedding_size, memory_size=1024, miner=None) -> None:
            super().__init__()
            self.loss, self.miner = loss, miner
            self.embedding_size, self.memory_size = embedding_size, memory_size
            self.reset_queue()


__all__ = [
    "INSTALLED",
    "AvgNonZeroReducer",
    "BaseCrossBatchMemory",
    "BaseMetricLossFunction",
    "BaseMiner",
    "ClassWeightedReducer",
    "CosineSimilarity",
    "DivisorReducer",
    "DotProductSimilarity",
    "LpDistance",
    "MeanReducer",
    "MultipleReducers",
    "PerAnchorReducer",
    "SNRDistance",
    "SumReducer",
    "ThresholdReducer",
    "aggregation_func",
]
