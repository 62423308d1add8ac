"""Miners: which pairs or triplets of a batch are worth training on, found without storing the similarity matrix."""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "AngularMiner": "angular",
    "BatchEasyHardMiner": "batch_easy_hard",
    "BatchHardMiner": "batch_hard",
    "DistanceWeightedMiner": "distance_weighted",
    "EmbeddingsAlreadyPackagedAsTriplets": "packaged_triplets",
    "HDCMiner": "hdc",
    "MinedPairs": "selection",
    "MinedTripletBand": "selection",
    "MinedTriplets": "selection",
    "MultiSimilarityMiner": "multi_similarity",
    "PairMarginMiner": "pair_margin",
    "TopKHardNegativesMiner": "top_k",
    "TripletMarginMiner": "triplet_margin",
    "UniformHistogramMiner": "uniform_histogram",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
