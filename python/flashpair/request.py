"""One call in the flat form that crosses the operator boundary, and its decoded twin for the backends.

Custom operators carry tensors, ints and floats; `encode` turns a list of terms into those, `Request` reads them
back. Checks of user input stand in `checks.py`; here everything is already known to be valid.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .terms import Axis, Combine, Extreme, Guide, Mask, Precision, Reduction, Score, Similarity, Term

#: Tensor parameters of a term, in the order of their indices in the flat form.
PARAMETERS = ("scale", "offset", "other_offset", "weight", "above", "below")
#: And the numbers that stand for them where they are not given; None where they cannot be numbers.
_ABSENT = tuple(zip(PARAMETERS, (1.0, 0.0, None, None, -torch.inf, torch.inf), strict=True))
#: similarity, normalize, exclude_self, keep (a backward pass follows: S may be kept in the workspace), precision,
#: positions of the guide's two sides among the parameters (-1: none; the second also -1 where the columns are the rows)
HEADER = 7
SIMILARITY, NORMALIZE, EXCLUDE_SELF, KEEP, PRECISION, GUIDE_ROWS, GUIDE_COLUMNS = range(HEADER)
#: reduction, score, mask, axis, combine, detach_weights, guide, then the parameters
FIRST_PARAMETER = 7
PER_TERM = FIRST_PARAMETER + len(PARAMETERS)
PER_EXTREME = 5  # mask, largest, k, above, below
#: `Reduction.slots` by number.
SLOTS = tuple(reduction.slots for reduction in Reduction)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 embeddings, float32 for every other dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass
class FlatTerm:
    """A term whose parameters are numbers or tensors of shape (1,) or (owners,)/(others,)."""

    reduction: Reduction
    score: Score
    mask: Mask
    axis: Axis
    combine: Combine
    detach_weights: bool
    guide: Guide
    constant: float
    index: dict[str, int]  # position in Request.params, -1 where the parameter is a number or absent
    scale: float | Tensor
    offset: float | Tensor
    other_offset: Tensor | None
    weight: Tensor | None
    above: float | Tensor | None
    below: float | Tensor | None
    slot: int = 0  # first row of this term in the statistics of its axis

    def with_tensors(self, tensors: dict[str, Tensor]) -> FlatTerm:
        """A copy with tensors for some parameters; the constructor takes four times as long."""
        term = object.__new__(FlatTerm)
        term.__dict__ = {**self.__dict__, **tensors}
        return term


@dataclass
class Request:
    """Everything a backend needs for one pass over the pairs."""

    x: Tensor  # (B, D)
    y: Tensor | None  # (N, D); None: the columns are the rows (self-similarity)
    labels: Tensor | None  # (B,) int64
    ref_labels: Tensor | None  # (N,) int64; None with y None
    pair_mask: Tensor | None  # (B, N) bool
    exclude: Tensor | None  # (B,) int64, column that row i never meets, -1 for none
    params: list[Tensor]
    spec: list[int]  # as it crossed the operator boundary, for backends that decode it themselves
    consts: list[float]
    max_workspace_bytes: int
    extremes: list[Extreme] = field(default_factory=list)
    _terms: list[FlatTerm] | None = None

    @property
    def terms(self) -> list[FlatTerm]:
        if self._terms is None:
            self._terms = decode_terms(self.spec, self.consts, self.params)
        return self._terms

    @functools.cached_property
    def structure(self) -> tuple:
        """What calls have in common that differ in the values and lengths of their tensors alone."""
        given = tuple(v is None for v in (self.y, self.labels, self.pair_mask, self.exclude))
        return given, tuple(p.numel() == 1 for p in self.params), tuple(self.spec), tuple(self.consts)

    @property
    def similarity(self) -> Similarity:
        return Similarity(self.spec[SIMILARITY])

    @property
    def normalize(self) -> bool:
        return bool(self.spec[NORMALIZE])

    @property
    def exclude_self(self) -> bool:
        return bool(self.spec[EXCLUDE_SELF])

    @property
    def precision(self) -> Precision:
        return Precision(self.spec[PRECISION])

    @property
    def symmetric(self) -> bool:
        return self.y is None

    @property
    def columns(self) -> Tensor:
        return self.x if self.y is None else self.y

    @property
    def column_labels(self) -> Tensor | None:
        return self.labels if self.y is None else self.ref_labels

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.columns.shape[0]

    @property
    def guide(self) -> tuple[Tensor, Tensor | None] | None:
        """(u (B, E), v (N, E), None where the columns are the rows) of the second product, if there is one."""
        rows, columns = self.spec[GUIDE_ROWS], self.spec[GUIDE_COLUMNS]
        return None if rows < 0 else (self.params[rows], None if columns < 0 else self.params[columns])


def _slots(terms: list[FlatTerm]) -> None:
    """Give every term its first row in the statistics of its axis."""
    used = [0, 0]
    for term in terms:
        axis = int(term.axis)
        term.slot = used[axis]
        used[axis] += term.reduction.slots


def encode(
    terms: list[Term],
    similarity: Similarity,
    normalize: bool,
    exclude_self: bool,
    keep: bool,
    precision: Precision,
    guide: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[list[Tensor], list[int], list[float]]:
    """Terms → (params, spec, consts)."""
    params: list[Tensor] = []
    given: list[tuple[Tensor, bool]] = []
    spec = [int(similarity), int(normalize), int(exclude_self), int(keep), int(precision), -1, -1]
    consts: list[float] = []

    def place(value: Tensor, threshold: bool) -> int:
        # The same tensor given to several terms is one parameter: its gradient is computed once.
        # Thresholds and guides are not differentiable, so they are apart and detached.
        for i, (known, kind) in enumerate(given):
            if known is value and kind == threshold:
                return i
        given.append((value, threshold))
        params.append(value.detach() if threshold else value)
        return len(params) - 1

    for term in terms:
        spec += [int(term.reduction), int(term.score), int(term.mask), int(term.axis), int(term.combine)]
        spec += [int(term.detach_weights), int(term.guide)]
        for name, absent in _ABSENT:
            value = getattr(term, name)
            tensor = isinstance(value, Tensor)
            spec.append(place(value, name in ("above", "below")) if tensor else -1)
            if absent is not None:
                consts.append(absent if tensor or value is None else float(value))
        consts.append(float(term.constant))
    if guide is not None:
        spec[GUIDE_ROWS] = place(guide[0], True)
        spec[GUIDE_COLUMNS] = -1 if guide[1] is None else place(guide[1], True)
    return params, spec, consts


@functools.lru_cache(256)
def _decoded(spec: tuple[int, ...], consts: tuple[float, ...]) -> list[FlatTerm]:
    """The terms without their tensors; a step repeats those of the last."""
    terms = []
    for t in range(count_terms(spec)):
        fields = spec[HEADER + t * PER_TERM : HEADER + (t + 1) * PER_TERM]
        scale, offset, above, below, constant = consts[5 * t : 5 * t + 5]
        terms.append(
            FlatTerm(
                reduction=Reduction(fields[0]),
                score=Score(fields[1]),
                mask=Mask(fields[2]),
                axis=Axis(fields[3]),
                combine=Combine(fields[4]),
                detach_weights=bool(fields[5]),
                guide=Guide(fields[6]),
                constant=constant,
                index=dict(zip(PARAMETERS, fields[FIRST_PARAMETER:], strict=True)),
                scale=scale,
                offset=offset,
                other_offset=None,
                weight=None,
                above=None if above == -torch.inf else above,
                below=None if below == torch.inf else below,
            )
        )
    _slots(terms)
    return terms


def decode_terms(spec: list[int], consts: list[float], params: list[Tensor]) -> list[FlatTerm]:
    """Inverse of `encode` for the terms."""
    return [
        known.with_tensors({name: params[at].reshape(-1) for name, at in known.index.items() if at >= 0})
        for known in _decoded(tuple(spec), tuple(consts))
    ]


def count_terms(spec: Sequence[int]) -> int:
    """Number of terms of a flat request."""
    return (len(spec) - HEADER) // PER_TERM


def parameter_places(spec: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """(axis, position in the params of each of `PARAMETERS`, -1 for a number) of every term, from the ints alone."""
    for at in range(HEADER, len(spec), PER_TERM):
        yield spec[at + 3], spec[at + FIRST_PARAMETER : at + PER_TERM]


def count_slots(spec: list[int]) -> tuple[int, int]:
    """Number of statistic vectors (rows, columns) of a flat request, from its ints alone."""
    used = [0, 0]
    for at in range(HEADER, len(spec), PER_TERM):
        used[spec[at + 3]] += SLOTS[spec[at]]
    return used[0], used[1]


def decode(x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, max_workspace_bytes) -> Request:
    """The flat arguments of an operator → Request."""
    return Request(x, y, labels, ref_labels, pair_mask, exclude, list(params), spec, consts, max_workspace_bytes)
