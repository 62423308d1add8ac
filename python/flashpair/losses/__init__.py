"""Losses over all pairs of two sets of embeddings, none of which stores the similarity matrix.

Names, defaults and calls are those of pytorch-metric-learning and open_clip. Modules load on first use, so that the
losses that need nothing of pytorch-metric-learning do not wait for its import.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "AlignmentLoss": "contrast.align_uniform",
    "AlignmentUniformityLoss": "contrast.align_uniform",
    "AnglELoss": "retrieval.co_sent",
    "AngularLoss": "angular",
    "AvgNonZeroReducer": "peer",
    "BarlowTwinsLoss": "features",
    "BinomialDevianceLoss": "binomial_deviance",
    "CACRLoss": "contrast.cacr",
    "CWCLLoss": "contrast.cwcl",
    "CentroidTripletLoss": "prototypes",
    "CircleLoss": "circle",
    "ClassWeightedReducer": "peer",
    "ClipLoss": "clip",
    "CoCaLoss": "contrast.co_ca",
    "CoSENTLoss": "retrieval.co_sent",
    "ContrastMode": "contrast.multi_view",
    "ContrastiveLoss": "contrastive",
    "CosineSimilarity": "peer",
    "CrossBatchMemory": "cross_batch_memory",
    "CyCLIPLoss": "contrast.cy_clip",
    "DCLLoss": "contrast.decoupled",
    "DCLWLoss": "contrast.decoupled",
    "DebiasedContrastiveLoss": "contrast.hard_negative",
    "DistillClipLoss": "contrast.distill_clip",
    "DivisorReducer": "peer",
    "DotProductSimilarity": "peer",
    "DynamicSoftMarginLoss": "dynamic_soft_margin",
    "FastAPLoss": "fast_ap",
    "FeatureTransformationLoss": "contrast.feature_transformation",
    "GISTEmbedLoss": "retrieval.gist_embed",
    "GeneralPairWeightingLoss": "general_pair_weighting",
    "GeneralizedLiftedStructureLoss": "lifted_structure",
    "HardContrastiveLoss": "contrast.hard_contrastive",
    "HardNegativeContrastiveLoss": "contrast.hard_negative",
    "HistogramLoss": "histogram",
    "ICNNLoss": "icnn",
    "ISogCLRLoss": "sog_clr",
    "InfoNCELoss": "info_nce",
    "InstanceLoss": "instance",
    "IntraPairVarianceLoss": "intra_pair_variance",
    "KeyQueue": "key_queue",
    "LiftedStructureLoss": "lifted_structure",
    "LpDistance": "peer",
    "MACLLoss": "contrast.macl",
    "MEOWLoss": "contrast.meow",
    "ManifoldLoss": "manifold",
    "MannWhitneyLoss": "contrast.mann_whitney",
    "MarginLoss": "margin",
    "MarginMSELoss": "retrieval.margin_mse",
    "MatryoshkaLoss": "retrieval.matryoshka",
    "MeanReducer": "peer",
    "MoCoV3Loss": "contrast.mo_co",
    "Moments": "statistics",
    "MultiSimilarityLoss": "multi_similarity",
    "MultiViewSupConLoss": "contrast.multi_view",
    "MultipleNegativesRankingLoss": "retrieval.multiple_negatives",
    "MultipleReducers": "peer",
    "NCALoss": "nca",
    "NNCLRLoss": "contrast.nn_clr",
    "NPairsLoss": "n_pairs",
    "NTXentLoss": "nt_xent",
    "PNPLoss": "pnp",
    "PairCircleLoss": "circle",
    "PairStatistics": "statistics",
    "PerAnchorReducer": "peer",
    "ProtoTripletLoss": "prototypes",
    "RankedListLoss": "ranked_list",
    "RnCLoss": "contrast.rank_n_contrast",
    "SNRDistance": "peer",
    "SelfSupervisedLoss": "self_supervised",
    "SigLipLoss": "siglip",
    "SignalToNoiseRatioContrastiveLoss": "signal_to_noise",
    "SimCLRLoss": "contrast.sim_clr",
    "SimCLRReduction": "contrast.sim_clr",
    "SmoothAPLoss": "smooth_ap",
    "SogCLRLoss": "sog_clr",
    "SumReducer": "peer",
    "SupConLoss": "sup_con",
    "SupConReduction": "sup_con",
    "TemperatureDiagnostics": "contrast.diagnostics",
    "ThresholdConsistentMarginLoss": "threshold_consistent_margin",
    "ThresholdReducer": "peer",
    "TripletMarginLoss": "triplet_margin",
    "TripletSemiHardLoss": "semi_hard",
    "TupletMarginLoss": "tuplet_margin",
    "UniformityLoss": "contrast.align_uniform",
    "VICRegLoss": "features",
    "circle_loss": "circle",
    "clip_loss": "clip",
    "contrastive_loss": "contrastive",
    "info_nce_loss": "info_nce",
    "multi_similarity_loss": "multi_similarity",
    "nt_xent_loss": "nt_xent",
    "siglip_loss": "siglip",
    "sup_con_loss": "sup_con",
    "temperature_diagnostics": "contrast.diagnostics",
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
