"""Class heads: losses over the logits of many classes, none of which stores them.

Modules load on first use.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "ClassHead": "head",
    "ClassLogits": "logits",
    "CrossEntropy": "cross_entropy",
    "Formula": "formula",
    "FusedAdamW": "optim",
    "FusedOptimizer": "optim",
    "FusedSGD": "optim",
    "Margin": "margins",
    "PartialFC_V2": "partial_fc",
    "class_range": "partial_fc",
    "class_logits": "logits",
    "load_shard": "checkpoint",
    "reshard": "checkpoint",
    "save_shard": "checkpoint",
    "class_loss": "cross_entropy",
    "class_statistics": "statistics",
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
