"""Class heads: losses over the logits of many classes, none of which stores them.

Modules load on first use.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "ALDRKLLoss": "ldr",
    "AdaFace": "ada_face",
    "AdaFaceMargin": "ada_face",
    "ArcFace": "combined_margin",
    "AGCE": "comp_sum",
    "AUL": "comp_sum",
    "ClassHead": "head",
    "ClassLogits": "logits",
    "CombinedMargin": "combined_margin",
    "CompSum": "comp_sum",
    "CosFace": "combined_margin",
    "CrossEntropy": "cross_entropy",
    "CurricularFace": "curricular_face",
    "CurricularFaceMargin": "curricular_face",
    "ElasticFace": "elastic_face",
    "ElasticFaceMargin": "elastic_face",
    "Focal": "comp_sum",
    "Formula": "formula",
    "FusedAdamW": "optim",
    "FusedOptimizer": "optim",
    "FusedSGD": "optim",
    "GeneralizedCrossEntropy": "comp_sum",
    "HLGaussHead": "targets",
    "JensenShannon": "comp_sum",
    "MagFace": "mag_face",
    "MagFaceMargin": "mag_face",
    "Margin": "margins",
    "MeanAbsoluteError": "comp_sum",
    "NormFace": "combined_margin",
    "NormalizedCrossEntropy": "comp_sum",
    "NormalizedSoftmaxLoss": "normalized_softmax",
    "P2SGrad": "p2s_grad",
    "PartialFC_V2": "partial_fc",
    "ProxyAnchorLoss": "proxy_anchor",
    "ProxyNCALoss": "normalized_softmax",
    "SoftTripleLoss": "soft_triple",
    "SparseTargets": "targets",
    "SphereFace": "combined_margin",
    "SphereFaceMargin": "combined_margin",
    "SphericalFormula": "spherical",
    "SphericalSoftmax": "spherical",
    "SphericalZLoss": "spherical",
    "SubCenterArcFace": "sub_center_arc_face",
    "SymmetricCrossEntropy": "comp_sum",
    "TaylorSoftmax": "spherical",
    "UNPG": "unpg",
    "any_loss": "confusion_metrics",
    "binary_distillation_loss": "distillation",
    "binary_gap_distillation_loss": "distillation",
    "class_logits": "logits",
    "class_loss": "cross_entropy",
    "class_range": "head",
    "class_statistics": "statistics",
    "distillation_loss": "distillation",
    "ens_loss": "loss_ensemble",
    "hl_gauss": "targets",
    "ldr_kl_loss": "ldr",
    "ldr_top_k_loss": "ldr",
    "linear_cross_entropy": "linear",
    "load_shard": "checkpoint",
    "negative_quantiles": "unpg",
    "reshard": "checkpoint",
    "sampled_class_loss": "linear",
    "save_shard": "checkpoint",
    "smooth_adversarial_comp_sum_loss": "adversarial",
    "soft_cross_entropy": "targets",
    "spherical_loss": "spherical",
    "streamed": "streaming",
    "symmetry_loss": "sym_face",
    "two_hot": "targets",
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
