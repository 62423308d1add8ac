"""What a distance object means for the engine: which similarity, whether normalised, and which way is closer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..terms import Similarity
from .peer import CosineSimilarity, DotProductSimilarity, LpDistance


@dataclass(frozen=True)
class Geometry:
    """How pairs are compared."""

    similarity: Similarity
    normalize: bool

    @property
    def sign(self) -> int:
        """+1 where larger means closer (similarities), -1 where smaller does (distances)."""
        return 1 if self.similarity == Similarity.DOT else -1


class NotFused(ValueError):
    """A distance or a reducer that a loss is defined with, but has no fused form for."""


def geometry_of(distance) -> Geometry:
    """The geometry of a distance object.

    Raises:
        NotFused: on a distance that the engine cannot compute. Exact types only: a subclass may compute anything.
    """
    kind, power = type(distance), getattr(distance, "power", 1)
    if kind in (CosineSimilarity, DotProductSimilarity) and power == 1:
        return Geometry(Similarity.DOT, bool(distance.normalize_embeddings))
    if kind is LpDistance and distance.p == 2 and power in (1, 2):
        similarity = Similarity.EUCLIDEAN if power == 1 else Similarity.SQUARED_EUCLIDEAN
        return Geometry(similarity, bool(distance.normalize_embeddings))
    shown = f"{kind.__name__}(p={getattr(distance, 'p', None)}, power={power})"
    raise NotFused(
        "distance must be CosineSimilarity, DotProductSimilarity (power 1) or LpDistance (p=2, power 1 or 2); "
        f"got {shown}"
    )


def require(distance, loss: str, kinds: tuple[type, ...], *, normalized: bool = False, powers=(1, 2)) -> Geometry:
    """The geometry of a distance that a loss is defined with.

    Raises:
        ValueError: on another kind or power, or without normalisation where that is part of the definition.
    """
    powers = powers if LpDistance in kinds else (1,)
    fits = type(distance) in kinds and distance.power in powers and getattr(distance, "p", 2) == 2
    if fits and (distance.normalize_embeddings or not normalized):
        return geometry_of(distance)
    names = " or ".join(kind.__name__ for kind in kinds)
    details = [f"power {' or '.join(map(str, powers))}"] * (LpDistance in kinds)
    details += ["of normalised embeddings"] * normalized
    wanted = f"{names} ({', '.join(details)})" if details else names
    shown = f"{type(distance).__name__}(power={getattr(distance, 'power', None)}, "
    shown += f"normalize_embeddings={getattr(distance, 'normalize_embeddings', None)})"
    raise ValueError(f"distance must be {wanted} for {loss}; got {shown}")


def convert_threshold(value: Tensor, source: Geometry, target: Geometry) -> Tensor | None:
    """The threshold in `target` that cuts pairs where `value` does in `source`; None where there is none.

    Unit vectors: d^2 = 2 - 2 <x, y>, so a threshold on one is a threshold on the others (with the direction turned
    round between similarities and distances).
    """
    if source == target:
        return value
    if not (source.normalize and target.normalize):
        return None
    if source.similarity == Similarity.DOT:
        squared = 2 - 2 * value
    else:
        # A negative threshold on distances lies below all of them, as does a negative squared one.
        squared = value if source.similarity == Similarity.SQUARED_EUCLIDEAN else value * value.abs()
    if target.similarity == Similarity.DOT:
        return 1 - squared / 2
    if target.similarity == Similarity.SQUARED_EUCLIDEAN:
        return squared
    return torch.where(squared < 0, -1.0, squared.clamp_min(0).sqrt())
