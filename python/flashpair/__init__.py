"""flashpair: pair-based and contrastive losses whose similarity matrix is never stored."""

from . import heads, losses, miners
from .dispatch import BackendError, backends, use_backend
from .primitives import Mined, mine, pair_reduce, pair_similarity, pair_sum
from .terms import Axis, Combine, Extreme, Mask, Precision, Reduction, Score, Similarity, Term
from .workspace import release_workspace, set_max_workspace_bytes

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "BackendError",
    "Combine",
    "Extreme",
    "Mask",
    "Mined",
    "Precision",
    "Reduction",
    "Score",
    "Similarity",
    "Term",
    "backends",
    "heads",
    "losses",
    "mine",
    "miners",
    "pair_reduce",
    "pair_similarity",
    "pair_sum",
    "release_workspace",
    "set_max_workspace_bytes",
    "use_backend",
]
