"""Class heads: losses over the logits of many classes, none of which stores them.

Modules load on first use.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "AdaFace": "ada_face",
    "AdaFaceMargin": "ada_face",
    "ArcFace": "combined_margin",
    "ClassHead": "head",
    "ClassLogits": "logits",
    "CombinedMargin": "combined_margin",
    "CosFace": "combined_margin",
    "CrossEntropy": "cross_entropy",
    "CurricularFace": "curricular_face",
    "CurricularFaceMargin": "curricular_face",
    "ElasticFace": "elastic_face",
    "ElasticFaceMargin": "elastic_face",
    "Formula": "formula",
    "FusedAdamW": "optim",
    "FusedOptimizer": "optim",
    "FusedSGD": "optim",
    "MagFace": "mag_face",
    "MagFaceMargin": "mag_face",
    "Margin": "margins",
    "NormFace": "combined_margin",
    "P2SGrad": "p2s_grad",
    "PartialFC_V2": "partial_fc",
    "SphereFace": "combined_margin",
    "SphereFaceMargin": "combined_margin",
    "SubCenterArcFace": "sub_center_arc_face",
    "class_logits": "logits",
    "class_loss": "cross_entropy",
    "class_range": "partial_fc",
    "class_statistics": "statistics",
    "load_shard": "checkpoint",
    "reshard": "checkpoint",
    "save_shard": "checkpoint",
    "streamed": "streamed",
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
