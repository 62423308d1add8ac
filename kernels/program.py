"""A pass as the kernels see it: a flat tuple of integers, a header and then `WIDTH` per evaluation of a term on a tile.

An evaluation reduces one tile along one side. A term of a rectangular problem has one evaluation, a term of a
self-similarity has two: tile (I, J) also stands for its mirror image (J, I).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton.language as tl
from torch import Tensor

#: Where a parameter comes from.
ABSENT = tl.constexpr(0)
NUMBER = tl.constexpr(1)  # an entry of `numbers`
SCALAR = tl.constexpr(2)  # an entry of `scalars` on the device
VECTOR = tl.constexpr(3)  # a row of `row_vectors` or `column_vectors`

#: Every tile's sides divide this.
MAX_BLOCK = 256

#: Header: what holds for all evaluations.
SIMILARITY = tl.constexpr(0)
NORMALIZE = tl.constexpr(1)
EXCLUDE_SELF = tl.constexpr(2)
HAS_EXCLUDE = tl.constexpr(3)
SAME_ONLY = tl.constexpr(4)  # only pairs of equal labels count: tiles without any are skipped
TRIANGLE = tl.constexpr(5)  # self-similarity: only pairs i <= j are visited, which also stand for (j, i)
STORE = tl.constexpr(6)  # pair weights are wanted, not only sums
SCALED = tl.constexpr(7)  # float16: pair weights are multiplied by a scale before rounding
ROW_SUM_SLOT = tl.constexpr(8)  # sums of the stored weights, for distances; -1 for none
COLUMN_SUM_SLOT = tl.constexpr(9)
SYMMETRIC = tl.constexpr(10)  # self-similarity: a row is at distance 0 of itself, also after rounding
HEADER = tl.constexpr(11)

#: Fields of an evaluation. Parameters take two: kind and position.
REDUCTION = tl.constexpr(0)  # for extremes: 1 largest, 0 smallest
SCORE = tl.constexpr(1)
MASK = tl.constexpr(2)
SIDE = tl.constexpr(3)  # 0: the owners are the tile's rows, 1: its columns
MIRRORED = tl.constexpr(4)  # 1: the tile's columns are the rows of the pass
COMBINE = tl.constexpr(5)
SCALE = tl.constexpr(6)
OFFSET = tl.constexpr(8)
OTHER = tl.constexpr(10)
WEIGHT = tl.constexpr(12)
ABOVE = tl.constexpr(14)
BELOW = tl.constexpr(16)
CONSTANT = tl.constexpr(18)
COTANGENT = tl.constexpr(20)
MEAN = tl.constexpr(22)
LSE = tl.constexpr(24)
SLOT = tl.constexpr(26)  # first partial vector of the statistic
PARTNER = tl.constexpr(27)  # evaluation of the other side with the same z, or -1
DETACH = tl.constexpr(28)
SCALE_SLOT = tl.constexpr(29)  # partial vectors of parameter gradients, or -1
OFFSET_SLOT = tl.constexpr(30)
OTHER_SLOT = tl.constexpr(31)
WEIGHT_SLOT = tl.constexpr(32)
VALUE_SLOT = tl.constexpr(33)
WIDTH = tl.constexpr(34)

_SLOTS = {"scale": SCALE_SLOT, "offset": OFFSET_SLOT, "other_offset": OTHER_SLOT, "weight": WEIGHT_SLOT}
_FIELDS = {"scale": SCALE, "offset": OFFSET, "other_offset": OTHER, "weight": WEIGHT, "above": ABOVE, "below": BELOW}
_ALONG_OTHERS = ("other_offset", "weight")  # parameters along the reduced side
#: Numbers that change nothing, so that the kernels leave the arithmetic out.
_NEUTRAL = {"scale": 1.0, "offset": 0.0, "above": None, "below": None, "other_offset": None, "weight": None}


@dataclass
class Parameters:
    """The parameters of all terms, packed."""

    device: torch.device
    shared: bool  # self-similarity: rows and columns have the same vectors
    numbers: list[float] = field(default_factory=list)
    scalars: list[Tensor] = field(default_factory=list)
    vectors: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    seen: dict = field(default_factory=dict)  # (id of tensor, place) → position

    def add(self, value: float | Tensor | None, neutral: float | None, side: int, vector=False) -> tuple[int, int]:
        """(kind, position) of a parameter that runs along `side`."""
        if value is None or (not isinstance(value, Tensor) and value == neutral):
            return ABSENT.value, 0
        if not isinstance(value, Tensor):
            return NUMBER.value, _position(self.numbers, float(value))
        if value.numel() == 1 and not vector:
            return SCALAR.value, self._tensor(self.scalars, value, "scalars")
        side = 0 if self.shared else side
        return VECTOR.value, self._tensor(self.vectors[side], value, side)

    def _tensor(self, pool: list[Tensor], value: Tensor, place) -> int:
        key = (value.data_ptr(), value.dtype, value.stride(), value.numel(), place)
        if key not in self.seen:
            self.seen[key] = len(pool)
            pool.append(value.detach())
        return self.seen[key]

    def packed(self) -> tuple[tuple[float, ...], Tensor, Tensor, Tensor]:
        """numbers, scalars (S,), row_vectors (P, padded B), column_vectors (Q, padded N)."""
        scalars = _stack(self.scalars, self.device).reshape(-1)
        rows = padded(_stack(self.vectors[0], self.device))
        columns = rows if self.shared else padded(_stack(self.vectors[1], self.device))
        return tuple(self.numbers) or (0.0,), scalars, rows, columns


def padded_length(length: int) -> int:
    """Length that holds whole tiles of every configuration."""
    return -(-length // MAX_BLOCK) * MAX_BLOCK


def padded(vectors: Tensor) -> Tensor:
    """(..., length) → (..., padded length), so that kernels read tiles of vectors without masks."""
    return torch.nn.functional.pad(vectors, (0, padded_length(vectors.shape[-1]) - vectors.shape[-1])).contiguous()


def _stack(values: list[Tensor], device: torch.device) -> Tensor:
    if not values:
        return torch.zeros(1, dtype=torch.float32, device=device)
    return torch.stack([v.to(torch.float32) for v in values])


def _position(pool: list, value) -> int:
    if value not in pool:
        pool.append(value)
    return pool.index(value)


def _common(term, mirrored: bool, parameters: Parameters) -> list[int]:
    """Fields that statistics and weights share."""
    side = int(term.axis) ^ int(mirrored)
    code = [0] * WIDTH.value
    code[REDUCTION.value] = int(term.reduction)
    code[SCORE.value] = int(term.score)
    code[MASK.value] = int(term.mask)
    code[SIDE.value] = side
    code[MIRRORED.value] = int(mirrored)
    code[COMBINE.value] = int(term.combine)
    code[DETACH.value] = int(term.detach_weights)
    for name, at in _FIELDS.items():
        along = 1 - side if name in _ALONG_OTHERS else side
        code[at.value : at.value + 2] = parameters.add(
            getattr(term, name), _NEUTRAL[name], along, vector=name in _ALONG_OTHERS
        )
    code[CONSTANT.value : CONSTANT.value + 2] = parameters.add(term.constant, None, side)
    for slot in (SLOT, PARTNER, *_SLOTS.values(), VALUE_SLOT):
        code[slot.value] = -1
    return code


def _same_exponent(a: list[int], b: list[int], symmetric_mask: bool) -> bool:
    """Whether two evaluations on opposite sides have one z and could share its exponential."""
    scalar = (ABSENT.value, NUMBER.value, SCALAR.value)
    if a[SIDE.value] == b[SIDE.value] or (not symmetric_mask and a[MIRRORED.value] != b[MIRRORED.value]):
        return False
    if any(a[f.value] != b[f.value] for f in (REDUCTION, SCORE, MASK)):
        return False
    for at in (SCALE, OFFSET):
        if a[at.value] not in scalar or a[at.value : at.value + 2] != b[at.value : at.value + 2]:
            return False
    plain = all(c[at.value] == ABSENT.value for c in (a, b) for at in (OTHER, WEIGHT, ABOVE, BELOW))
    return plain and a[CONSTANT.value : CONSTANT.value + 2] == b[CONSTANT.value : CONSTANT.value + 2]


def _pair_up(codes: list[list[int]], logsumexp: int, symmetric_mask: bool) -> None:
    for e, code in enumerate(codes):
        if code[PARTNER.value] >= 0 or code[REDUCTION.value] != logsumexp:
            continue
        for other in range(e + 1, len(codes)):
            if codes[other][PARTNER.value] < 0 and _same_exponent(code, codes[other], symmetric_mask):
                code[PARTNER.value], codes[other][PARTNER.value] = other, e
                break


@dataclass(frozen=True)
class Pass:
    """The header of a program."""

    similarity: int
    normalize: bool
    exclude_self: bool
    has_exclude: bool
    same_only: bool
    symmetric: bool

    def program(
        self, codes: tuple[int, ...], triangle=False, store=False, scaled=False, row_sum=-1, column_sum=-1
    ) -> tuple[int, ...]:
        """A complete program from its evaluations."""
        flags = (self.normalize, self.exclude_self, self.has_exclude, self.same_only, triangle, store, scaled)
        return (self.similarity, *map(int, flags), row_sum, column_sum, int(self.symmetric), *codes)


def _flat(codes: list[list[int]]) -> tuple[int, ...]:
    return tuple(v for code in codes for v in code)


def statistics_codes(
    terms: list, request, parameters: Parameters, firsts: list[int], logsumexp: int
) -> tuple[int, ...]:
    """Evaluations of a pass over the statistics; term t writes its partials from slot firsts[t] on."""
    codes = []
    for mirrored in (False, True) if request.symmetric else (False,):
        for term, first in zip(terms, firsts, strict=True):
            code = _common(term, mirrored, parameters)
            code[SLOT.value] = first
            codes.append(code)
    _pair_up(codes, logsumexp, request.pair_mask is None and request.exclude is None)
    return _flat(codes)


@dataclass
class Gradients:
    """Where the partial sums of parameter gradients and of the value go: a slot and a side for each use."""

    used: list[int] = field(default_factory=lambda: [0, 0])  # slots per side; one shared count for self-similarity
    uses: list[tuple[int, int, int]] = field(default_factory=list)  # (parameter, side, slot)
    values: list[tuple[int, int]] = field(default_factory=list)  # (side, slot)

    def take(self, side: int) -> int:
        self.used[side] += 1
        return self.used[side] - 1


def weights_codes(
    terms: list,
    request,
    parameters: Parameters,
    logsumexp: int,
    cotangents: list[Tensor | None],  # of each term, (owners,); None: not differentiable or 1
    statistics: list[tuple[Tensor | None, Tensor | None]],  # (mean, logsumexp) of each term, (owners,)
    needs_params: tuple[bool, ...],
    with_value: bool,
) -> tuple[tuple[int, ...], tuple[int, ...], Gradients]:
    """Evaluations of blocks off and on the diagonal, and the slots of their sums.

    On a diagonal block every pair is visited twice, so mirrored evaluations add to the pair weights only.
    """
    codes, gradients = [], Gradients()
    slots: dict[tuple[int, str], tuple[int, int]] = {}  # (term, name) → (natural side, slot)
    for t, term in enumerate(terms):
        for name in _SLOTS:
            index = term.index[name]
            if index >= 0 and needs_params[index]:
                along = int(term.axis) ^ int(name in _ALONG_OTHERS)
                side = 0 if request.symmetric else along
                slots[t, name] = (along, gradients.take(side))
                gradients.uses.append((index, side, slots[t, name][1]))
        if with_value:
            side = 0 if request.symmetric else int(term.axis)
            slots[t, "value"] = (int(term.axis), gradients.take(side))
            gradients.values.append((side, slots[t, "value"][1]))
    for mirrored in (False, True) if request.symmetric else (False,):
        for t, term in enumerate(terms):
            if cotangents[t] is None and not with_value:
                continue
            code = _common(term, mirrored, parameters)
            side = code[SIDE.value]
            if cotangents[t] is not None:
                code[COTANGENT.value : COTANGENT.value + 2] = parameters.add(cotangents[t], None, side, vector=True)
            for at, value in zip((MEAN, LSE), statistics[t], strict=True):
                code[at.value : at.value + 2] = parameters.add(value, None, side, vector=True)
            for name, at in _SLOTS.items():
                code[at.value] = slots.get((t, name), (0, -1))[1]
            code[VALUE_SLOT.value] = slots.get((t, "value"), (0, -1))[1]
            codes.append(code)
    if request.symmetric:
        gradients.used[1] = gradients.used[0]
    _pair_up(codes, logsumexp, request.pair_mask is None and request.exclude is None)
    diagonal = [list(code) for code in codes]
    for code in diagonal:
        if code[MIRRORED.value]:
            for at in (*_SLOTS.values(), VALUE_SLOT):
                code[at.value] = -1
    return _flat(codes), _flat(diagonal), gradients


def extremes_codes(extremes, symmetric: bool, parameters: Parameters) -> tuple[int, ...]:
    """Evaluations of a mining pass; slot e is extreme e."""
    codes = []
    for mirrored in (False, True) if symmetric else (False,):
        for e, extreme in enumerate(extremes):
            code = [0] * WIDTH.value
            code[REDUCTION.value] = int(extreme.largest)
            code[MASK.value] = int(extreme.mask)
            code[SIDE.value] = code[MIRRORED.value] = int(mirrored)
            for at, value in ((ABOVE, extreme.above), (BELOW, extreme.below)):
                code[at.value : at.value + 2] = parameters.add(value, None, int(mirrored))
            code[SLOT.value], code[PARTNER.value] = e, -1
            codes.append(code)
    return _flat(codes)


def written_slots(codes: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Slots of sums that weights write on one side."""
    slots = set()
    for at in range(0, len(codes), WIDTH.value):
        code = codes[at : at + WIDTH.value]
        for name, slot in (*_SLOTS.items(), ("value", VALUE_SLOT)):
            other = name in _ALONG_OTHERS
            if code[slot.value] >= 0 and code[SIDE.value] ^ int(other) == side:
                slots.add(code[slot.value])
    return tuple(sorted(slots))


def statistics_slots(codes: tuple[int, ...], side: int) -> tuple[int, ...]:
    """(reduction, slot, ...) of the statistics that are written on one side."""
    entries = []
    for at in range(0, len(codes), WIDTH.value):
        code = codes[at : at + WIDTH.value]
        if code[SIDE.value] == side:
            entries += [code[REDUCTION.value], code[SLOT.value]]
    return tuple(entries)
