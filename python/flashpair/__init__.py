"""flashpair: pair-based and contrastive losses whose similarity matrix is never stored."""

from . import distributed, heads, losses, miners
from .dispatch import BackendError, backends, use_backend
from .primitives import Mined, mine, pair_reduce, pair_similarity, pair_sum
from .rows import RowPanel, row_reduce
from .terms import Axis, Combine, Extreme, Guide, Mask, Precision, Reduction, Score, Similarity, Term
from .workspace import release_workspace, set_max_workspace_bytes


def __getattr__(name: str):
    """`linear_cross_entropy` loads the heads on first use, `GradientCache` torch's data parallelism."""
    if name == "linear_cross_entropy":
        return heads.linear_cross_entropy
    if name == "GradientCache":
        from .gradient_cache import GradientCache

        return GradientCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "Axis",
    "BackendError",
    "Combine",
    "Extreme",
    "GradientCache",
    "Guide",
    "Mask",
    "Mined",
    "Precision",
    "Reduction",
    "RowPanel",
    "Score",
    "Similarity",
    "Term",
    "backends",
    "distributed",
    "heads",
    "linear_cross_entropy",
    "losses",
    "mine",
    "miners",
    "pair_reduce",
    "pair_similarity",
    "pair_sum",
    "release_workspace",
    "row_reduce",
    "set_max_workspace_bytes",
    "use_backend",
]
