"""Losses over all pairs of two sets of embeddings, none of which stores the similarity matrix.

Names, defaults and calls are those of pytorch-metric-learning and open_clip. Modules load on first use, so that the
losses that need nothing of pytorch-metric-learning do not wait for its import.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "AngularLoss": "angular",
    "AvgNonZeroReducer": "peer",
    "BarlowTwinsLoss": "features",
    "BinomialDevianceLoss": "binomial_deviance",
    "CentroidTripletLoss": "prototypes",
    "CircleLoss": "circle",
    "ClassWeightedReducer": "peer",
    "ClipLoss": "clip",
    "ContrastiveLoss": "contrastive",
    "CosineSimilarity": "peer",
    "CrossBatchMemory": "cross_batch_memory",
    "DivisorReducer": "peer",
    "DotProductSimilarity": "peer",
    "DynamicSoftMarginLoss": "dynamic_soft_margin",
    "FastAPLoss": "fast_ap",
    "GeneralPairWeightingLoss": "general_pair_weighting",
    "GeneralizedLiftedStructureLoss": "lifted_structure",
    "HistogramLoss": "histogram",
    "ICNNLoss": "icnn",
    "ISogCLRLoss": "sog_clr",
    "InfoNCELoss": "info_nce",
    "InstanceLoss": "instance",
    "IntraPairVarianceLoss": "intra_pair_variance",
    "KeyQueue": "key_queue",
    "LiftedStructureLoss": "lifted_structure",
    "LpDistance": "peer",
    "ManifoldLoss": "manifold",
    "MarginLoss": "margin",
    "MeanReducer": "peer",
    "Moments": "statistics",
    "MultiSimilarityLoss": "multi_similarity",
    "MultipleReducers": "peer",
    "NCALoss": "nca",
    "NPairsLoss": "n_pairs",
    "NTXentLoss": "nt_xent",
    "PNPLoss": "pnp",
    "PairCircleLoss": "circle",
    "PairStatistics": "statistics",
    "PerAnchorReducer": "peer",
    "ProtoTripletLoss": "prototypes",
    "RankedListLoss": "ranked_list",
    "SNRDistance": "peer",
    "SelfSupervisedLoss": "self_supervised",
    "SigLipLoss": "siglip",
    "SignalToNoiseRatioContrastiveLoss": "signal_to_noise",
    "SmoothAPLoss": "smooth_ap",
    "SogCLRLoss": "sog_clr",
    "SumReducer": "peer",
    "SupConLoss": "sup_con",
    "SupConReduction": "sup_con",
    "ThresholdConsistentMarginLoss": "threshold_consistent_margin",
    "ThresholdReducer": "peer",
    "TripletMarginLoss": "triplet_margin",
    "TripletSemiHardLoss": "semi_hard",
    "TupletMarginLoss": "tuplet_margin",
    "VICRegLoss": "features",
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
