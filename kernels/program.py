"""A pass as the kernels see it: a flat tuple of integers, a header and then `WIDTH` per evaluation of a term on a tile.

An evaluation reduces one tile along one side. A term of a rectangular problem has one evaluation, a term of a
self-similarity has two: tile (I, J) also stands for its mirror image (J, I).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..backward import Backward
from ..forward import Forward
from ..operands import ALONG_OTHERS, Operands, padded
from ..request import FlatTerm, Request
from ..terms import Extreme, Mask, Reduction, Similarity

#: Where a parameter comes from.
ABSENT = tl.constexpr(0)
NUMBER = tl.constexpr(1)  # an entry of `numbers`
SCALAR = tl.constexpr(2)  # an entry of `scalars` on the device
VECTOR = tl.constexpr(3)  # a row of `row_vectors` or `column_vectors`

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
TILES = tl.constexpr(11)  # which tiles a launch serves
LABELLED = tl.constexpr(12)  # an evaluation asks for labels
GUIDED = tl.constexpr(13)  # there is a second product
HEADER = tl.constexpr(14)

#: Plain tiles lie inside the panel, off the diagonal, and hold no pair of equal labels: no pair needs a mask of its
#: own. They have programs of their own, with fewer instructions and registers.
EVERY = tl.constexpr(0)
PLAIN = tl.constexpr(1)
MIXED = tl.constexpr(2)  # the others

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
GUIDE = tl.constexpr(34)  # what the second product does
WIDTH = tl.constexpr(35)

#: In the place of a slot: the partner's sum along the rows is of both, which spares one down the columns.
WITH_PARTNER = tl.constexpr(-2)

THRESHOLD = tl.constexpr(1)  # numbered as in `flashpair.Guide`
WEIGHED = tl.constexpr(2)
LOGITS = tl.constexpr(3)

_SLOTS = {
    "scale": SCALE_SLOT,
    "offset": OFFSET_SLOT,
    "other_offset": OTHER_SLOT,
    "weight": WEIGHT_SLOT,
    "value": VALUE_SLOT,
}
#: What the statistics and their cotangents say of a term.
_KNOWN = {"cotangent": COTANGENT, "mean": MEAN, "logsumexp": LSE}
_FIELDS = {"scale": SCALE, "offset": OFFSET, "other_offset": OTHER, "weight": WEIGHT, "above": ABOVE, "below": BELOW}
#: Numbers that change nothing, so that the kernels leave the arithmetic out.
_NEUTRAL = {"scale": 1.0, "offset": 0.0, "above": None, "below": None, "other_offset": None, "weight": None}


#: Which tensor of a pass a kernel reads: (term, name) of a parameter, or of what a backward pass knows of the term.
Source = tuple[int, str]


@dataclass
class Layout:
    """Where the kernels of a pass find each parameter: the same for every call of one structure."""

    shared: bool  # self-similarity: rows and columns have the same vectors
    numbers: list[float] = field(default_factory=list)
    scalars: list[Source] = field(default_factory=list)
    vectors: tuple[list[Source], list[Source]] = field(default_factory=lambda: ([], []))
    seen: dict = field(default_factory=dict)  # (what a tensor is, place) → position

    def add(
        self, value: float | Tensor | None, neutral: float | None, side: int, source: Source, known: int = -1,
        vector: bool = False,
    ) -> tuple[int, int]:  # fmt: skip
        """(kind, position) of a parameter that runs along `side`; `known`: its number among a request's parameters."""
        if value is None or (not isinstance(value, Tensor) and value == neutral):
            return ABSENT.value, 0
        if not isinstance(value, Tensor):
            return NUMBER.value, _position(self.numbers, float(value))
        if value.numel() == 1 and not vector:
            return SCALAR.value, self._tensor(self.scalars, source, known, "scalars")
        side = 0 if self.shared else side
        return VECTOR.value, self._tensor(self.vectors[side], source, known, side)

    def _tensor(self, pool: list[Source], source: Source, known: int, place) -> int:
        key = (known if known >= 0 else source, place)
        if key not in self.seen:
            self.seen[key] = len(pool)
            pool.append(source)
        return self.seen[key]

    def packed(self, device: torch.device, tensor_of: Callable[[int, str], Tensor]) -> tuple:
        """numbers, scalars (S,), row_vectors (P, padded B), column_vectors (Q, padded N) of one call."""
        nothing = torch.empty(1, dtype=torch.float32, device=device)
        scalars, rows, columns = (
            _stack([tensor_of(*source) for source in pool]) if pool else nothing
            for pool in (self.scalars, *self.vectors)
        )
        rows = padded(rows) if self.vectors[0] else nothing
        columns = rows if self.shared else padded(columns) if self.vectors[1] else nothing
        return tuple(self.numbers) or (0.0,), scalars.reshape(-1), rows, columns


def _stack(values: list[Tensor]) -> Tensor:
    """(values, length) float32; a single vector as a view of itself."""
    wide = [v if v.dtype == torch.float32 else v.to(torch.float32) for v in values]
    return torch.stack(wide) if len(wide) > 1 else wide[0].reshape(1, -1)


#: What is known of calls by their structure; more are forgotten together.
_MOST = 1 << 10
_remembered: dict[tuple, Any] = {}


def once(key: tuple, make: Callable[[], Any]) -> Any:
    """What `make` returned for this key, which holds the structure of a call and whatever else it depends on."""
    found = _remembered.get(key)
    if found is None:
        if len(_remembered) >= _MOST:
            _remembered.clear()
        found = _remembered[key] = make()
    return found


def _position(pool: list, value) -> int:
    if value not in pool:
        pool.append(value)
    return pool.index(value)


def _common(t: int, term: FlatTerm, mirrored: bool, layout: Layout) -> list[int]:
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
    code[GUIDE.value] = int(term.guide)
    for name, at in _FIELDS.items():
        along = 1 - side if name in ALONG_OTHERS else side
        code[at.value : at.value + 2] = layout.add(
            getattr(term, name), _NEUTRAL[name], along, (t, name), term.index[name], vector=name in ALONG_OTHERS
        )
    code[CONSTANT.value : CONSTANT.value + 2] = layout.add(term.constant, None, side, (t, "constant"))
    for slot in (SLOT, PARTNER, *_SLOTS.values()):
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
    plain = all(c[at.value] == ABSENT.value for c in (a, b) for at in (OTHER, WEIGHT, ABOVE, BELOW, GUIDE))
    return plain and a[CONSTANT.value : CONSTANT.value + 2] == b[CONSTANT.value : CONSTANT.value + 2]


def _pair_up(codes: list[list[int]], symmetric_mask: bool) -> None:
    for e, code in enumerate(codes):
        if code[PARTNER.value] >= 0 or code[REDUCTION.value] != Reduction.LOGSUMEXP:
            continue
        for other in range(e + 1, len(codes)):
            if codes[other][PARTNER.value] < 0 and _same_exponent(code, codes[other], symmetric_mask):
                code[PARTNER.value], codes[other][PARTNER.value] = other, e
                break


def _share_sums(codes: list[list[int]], terms: list[FlatTerm]) -> None:
    """One sum for two partners whose scale or offset is one and the same number."""
    for code, term in zip(codes, terms, strict=True):
        if code[PARTNER.value] < 0 or code[SIDE.value] == 0:
            continue
        partner, its_term = codes[code[PARTNER.value]], terms[code[PARTNER.value]]
        for name in ("scale", "offset"):
            at = _SLOTS[name].value
            if min(code[at], partner[at]) >= 0 and term.index[name] == its_term.index[name]:
                code[at] = WITH_PARTNER.value


def program(
    request: Request,
    op: Operands,
    codes: tuple[int, ...],
    triangle: bool = False,
    store: bool = False,
    scaled: bool = False,
    row_sum: int = -1,
    column_sum: int = -1,
    tiles: int = EVERY.value,
    squares: bool = False,
) -> tuple[int, ...]:
    """A complete program from its evaluations; `squares`: the squares of its distances will do."""
    flags = (op.scaled, request.exclude_self, request.exclude is not None, op.same_only, triangle, store, scaled)
    sums = (row_sum, column_sum, int(request.symmetric), tiles, *_asks(codes))
    return (int(Similarity.SQUARED_EUCLIDEAN if squares else request.similarity), *map(int, flags), *sums, *codes)


@functools.lru_cache(_MOST)
def _asks(codes: tuple[int, ...]) -> tuple[int, int]:
    """Whether evaluations ask for labels, and for a second product."""
    labelled = any(mask in (Mask.SAME, Mask.DIFFERENT) for mask in codes[MASK.value :: WIDTH.value])
    return int(labelled), int(any(codes[GUIDE.value :: WIDTH.value]))


def kinds_of_tiles(request: Request, op: Operands) -> tuple[int, ...]:
    """What a pass launches: plain tiles apart from the others, unless a mask of pairs leaves none plain."""
    if op.same_only or request.pair_mask is not None or request.exclude is not None:
        return (EVERY.value,)
    return (PLAIN.value, MIXED.value)


def _flat(codes: list[list[int]]) -> tuple[int, ...]:
    return tuple(v for code in codes for v in code)


def statistics_codes(request: Request, plan: Forward) -> tuple[tuple[int, ...], Layout]:
    """Evaluations of a pass over the statistics, and where their parameters are."""

    def make() -> tuple[tuple[int, ...], Layout]:
        codes, layout = [], Layout(request.symmetric)
        for mirrored in (False, True) if request.symmetric else (False,):
            for t, (term, first) in enumerate(zip(plan.terms, plan.firsts, strict=True)):
                code = _common(t, term, mirrored, layout)
                code[SLOT.value] = first
                codes.append(code)
        _pair_up(codes, request.pair_mask is None and request.exclude is None)
        return _flat(codes), layout

    return once(("statistics", request.structure), make)


def weights_codes(request: Request, plan: Backward) -> tuple[tuple[int, ...], tuple[int, ...], Layout]:
    """Evaluations of blocks off and on the diagonal, and where their parameters are.

    On a diagonal block every pair is visited twice, so mirrored evaluations add to the pair weights only.
    """

    def make() -> tuple[tuple[int, ...], tuple[int, ...], Layout]:
        codes, terms, layout = [], [], Layout(request.symmetric)
        for mirrored in (False, True) if request.symmetric else (False,):
            for t, term in enumerate(plan.terms):
                if plan.cotangents[t] is None and not plan.with_value:
                    continue
                code = _common(t, term, mirrored, layout)
                for name, at in _KNOWN.items():
                    code[at.value : at.value + 2] = layout.add(
                        plan.tensor(t, name), None, code[SIDE.value], (t, name), vector=True
                    )
                for name, at in _SLOTS.items():
                    code[at.value] = plan.slots.of.get((t, name), -1)
                codes.append(code)
                terms.append(term)
        _pair_up(codes, request.pair_mask is None and request.exclude is None)
        diagonal = [list(code) for code in codes]
        for code in diagonal:
            if code[MIRRORED.value]:
                for at in _SLOTS.values():
                    code[at.value] = -1
        for evaluations in (codes, diagonal):
            _share_sums(evaluations, terms)
        return _flat(codes), _flat(diagonal), layout

    return once(("weights", request.structure, plan.with_value, *plan.slots.of.items()), make)


def extremes_codes(extremes: list[Extreme], symmetric: bool) -> tuple[tuple[int, ...], Layout]:
    """Evaluations of a mining pass, and where their parameters are; slot e is extreme e."""
    codes, layout = [], Layout(symmetric)
    for mirrored in (False, True) if symmetric else (False,):
        for e, extreme in enumerate(extremes):
            code = [0] * WIDTH.value
            code[REDUCTION.value] = int(extreme.largest)
            code[MASK.value] = int(extreme.mask)
            code[SIDE.value] = code[MIRRORED.value] = int(mirrored)
            for name, at in (("above", ABOVE), ("below", BELOW)):
                code[at.value : at.value + 2] = layout.add(getattr(extreme, name), None, int(mirrored), (e, name))
            code[SLOT.value], code[PARTNER.value] = e, -1
            codes.append(code)
    return _flat(codes), layout


@functools.lru_cache(_MOST)
def written_slots(codes: tuple[int, ...], side: int, weight_sum: int) -> tuple[int, ...]:
    """Slots of sums that weights write on one side; `weight_sum`: that of the weights themselves, or -1."""
    slots = {weight_sum} - {-1}
    for at in range(0, len(codes), WIDTH.value):
        code = codes[at : at + WIDTH.value]
        for name, slot in _SLOTS.items():
            if code[slot.value] >= 0 and code[SIDE.value] ^ int(name in ALONG_OTHERS) == side:
                slots.add(code[slot.value])
    return tuple(sorted(slots))
