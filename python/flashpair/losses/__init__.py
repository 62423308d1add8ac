"""Losses over all pairs of two sets of embeddings, none of which stores the similarity matrix.

Names, defaults and calls are those of pytorch-metric-learning and open_clip. Modules load on first use, so that the
losses that need nothing of pytorch-metric-learning do not wait for its import.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "CircleLoss": "circle",
    "ClipLoss": "clip",
    "ContrastiveLoss": "contrastive",
    "CosineSimilarity": "peer",
    "CrossBatchMemory": "cross_batch_memory",
    "DotProductSimilarity": "peer",
    "InfoNCELoss": "info_nce",
    "LpDistance": "peer",
    "AvgNonZeroReducer": "peer",
    "MeanReducer": "peer",
    "Moments": "statistics",
    "MultiSimilarityLoss": "multi_similarity",
    "NTXentLoss": "nt_xent",
    "PairStatistics": "statistics",
    "SigLipLoss": "siglip",
    "SumReducer": "peer",
    "SupConLoss": "sup_con",
    "SupConReduction": "sup_con",
    "ThresholdReducer": "peer",
    "TripletMarginLoss": "triplet_margin",
    "circle_loss": "circle",
    "clip_loss": "clip",
    "contrastive_loss": "contrastive",
    "info_nce_loss": "info_nce",
    "multi_similarity_loss": "multi_similarity",
    "nt_xent_loss": "nt_xent",
    "siglip_loss": "siglip",
    "sup_con_loss": "sup_con",
    "triplet_margin_loss": "triplet_margin",
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
