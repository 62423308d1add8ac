"""Checks of user input: each error names the argument, what it was and what is allowed, before any work is done."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .terms import Axis, Combine, Extreme, Guide, Mask, Reduction, Score, Similarity, Term

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_K = 64
SINGLE = torch.finfo(torch.float32)


def embeddings(name: str, value: Tensor) -> None:
    """2-D floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape (rows, features); got {tuple(value.shape)}")
    if value.dtype not in DTYPES:
        allowed = ", ".join(str(d) for d in DTYPES)
        raise TypeError(f"{name} must be one of {allowed}; got {value.dtype}")


def embedding_pair(x: Tensor, y: Tensor | None, names: tuple[str, str] = ("x", "y")) -> None:
    """Two embeddings that can be compared."""
    embeddings(names[0], x)
    if y is None:
        return
    embeddings(names[1], y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{names[0]} and {names[1]} must have equal features; got {x.shape[1]} and {y.shape[1]}")
    if x.dtype != y.dtype:
        raise TypeError(f"{names[0]} and {names[1]} must have one dtype; got {x.dtype} and {y.dtype}")
    same_device(names[0], x, **{names[1]: y})


def same_device(reference_name: str, reference: Tensor, /, **others: Tensor | None) -> None:
    """All tensors on one device."""
    for name, value in others.items():
        if isinstance(value, Tensor) and value.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {reference_name}, {reference.device}; got {value.device}"
            )


def labels(name: str, value: Tensor, length: int) -> None:
    """1-D int64 tensor of a given length."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an int64 tensor; got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64; got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{name} must have shape ({length},), one per row; got {tuple(value.shape)}")


def floating(name: str, value: Tensor) -> None:
    """Floating-point tensor of any shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor; got {got}")


def number(name: str, value: float, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> None:
    """Finite number inside [low, high], or (low, high] with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if value != value:  # NaN; torch.compile traces this for a dynamic number, but not math.isnan
        raise ValueError(f"{name} must not be NaN")
    if value < low or value > high or (open_low and value == low):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}]; got {value}")


def count(name: str, value: int, low: int = 1, high: float = math.inf) -> None:
    """Integer inside [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}; got {value}")
    if value > high:
        raise ValueError(f"{name} must be at most {high}; got {value}")


def temperature(name: str, value: float | Tensor) -> None:
    """Positive number, or a 0-d tensor (whose value is not read, so that no device is synchronised)."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor with one element; got shape {tuple(value.shape)}")
        return
    number(name, value, low=0.0, open_low=True)


def _parameter(of: str, at: int, field: str, value, length: int, device: torch.device, scalar: bool) -> None:
    """`of[at].field`, a name that only errors need."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.device == device and value.dim() == 0 and scalar:
            return
        name = f"{of}[{at}].{field}"
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{name} must be on {device}; got {value.device}")
        if value.dim() != 1 or value.shape[0] != length:
            allowed = f"a number, a 0-d tensor or shape ({length},)" if scalar else f"shape ({length},)"
            raise ValueError(f"{name} must be {allowed}; got shape {tuple(value.shape)}")
    elif not scalar:
        if value is not None:
            got = type(value).__name__
            raise TypeError(f"{of}[{at}].{field} must be None or a tensor of shape ({length},); got {got}")
    elif value is not None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{of}[{at}].{field} must be a number or a tensor; got {type(value).__name__}")
        if value != value:  # NaN, see `number`
            raise ValueError(f"{of}[{at}].{field} must not be NaN")


_LABELLED, _GIVEN = (Mask.SAME, Mask.DIFFERENT), (Mask.GIVEN, Mask.NOT_GIVEN)


def _mask(of: str, at: int, mask: Mask, has_labels: bool, has_pair_mask: bool) -> None:
    if not has_labels and mask in _LABELLED:
        raise ValueError(f"{of}[{at}].mask is {mask.name}, which needs labels (and ref_labels when y is given)")
    if not has_pair_mask and mask in _GIVEN:
        raise ValueError(f"{of}[{at}].mask is {mask.name}, which needs pair_mask")


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Term)}
_OWNER_FIELDS = tuple((name, _DEFAULTS[name]) for name in ("scale", "offset", "above", "below"))
_CLOSED_FIELDS = (
    ("reduction", Reduction), ("score", Score), ("mask", Mask), ("axis", Axis), ("combine", Combine), ("guide", Guide),
)  # fmt: skip


def terms(
    values: Sequence[Term],
    rows: int,
    columns: int,
    device: torch.device,
    has_labels: bool,
    has_pair_mask: bool,
    has_guide: bool = False,
) -> None:
    """Every term complete and of the right shapes."""
    if not values:
        raise ValueError("terms must hold at least one Term; got none")
    for t, term in enumerate(values):
        if not isinstance(term, Term):
            raise TypeError(f"terms[{t}] must be a flashpair.Term; got {type(term).__name__}")
        for field, kind in _CLOSED_FIELDS:
            if not isinstance(getattr(term, field), kind):
                closed(f"terms[{t}].{field}", getattr(term, field), kind)
        if term.guide is not Guide.NONE:
            _guided(f"terms[{t}]", term, has_guide)
        if term.mask is not Mask.ALL:
            _mask("terms", t, term.mask, has_labels, has_pair_mask)
        owners, others = (rows, columns) if term.axis == Axis.ROWS else (columns, rows)
        # What was not given needs no name in a message.
        for field, absent in _OWNER_FIELDS:
            value = getattr(term, field)
            if value is not absent:
                if value is None:
                    raise TypeError(f"terms[{t}].{field} must be a number or a tensor; got None")
                _parameter("terms", t, field, value, owners, device, scalar=True)
        for field in ("other_offset", "weight"):
            value = getattr(term, field)
            if value is not None:
                _parameter("terms", t, field, value, others, device, scalar=False)
        if term.constant is not _DEFAULTS["constant"]:
            number(f"terms[{t}].constant", term.constant)
        if term.score is Score.SOFTCAP and not SINGLE.tiny <= term.constant <= SINGLE.max:
            raise ValueError(
                f"terms[{t}].constant must be positive and finite (in float32) for SOFTCAP; got {term.constant}"
            )


def _guided(name: str, term: Term, has_guide: bool) -> None:
    guide = f"{name}.guide is {term.guide.name}"
    if not has_guide:
        raise ValueError(f"{guide}, which needs the guide of a pass")
    if term.guide == Guide.THRESHOLD and term.above is None and term.below is None:
        raise ValueError(f"{guide}, which needs {name}.above or {name}.below; got neither")
    if term.guide == Guide.LOGITS and not (term.reduction == Reduction.SOFTMAX_MEAN and term.detach_weights):
        raise ValueError(
            f"{guide}, which needs reduction=SOFTMAX_MEAN and detach_weights=True; got {term.reduction.name} "
            f"and {term.detach_weights}"
        )
    if term.guide == Guide.WEIGHT and not term.reduction.differentiable:
        raise ValueError(f"{guide}, which {term.reduction.name} does not have")
    if term.guide == Guide.WEIGHT and isinstance(term.weight, Tensor) and term.weight.requires_grad:
        raise ValueError(f"{guide}; {name}.weight must take no gradient beside it")


def guide(
    value: Tensor | tuple[Tensor, Tensor] | None, x: Tensor, columns: int, own: bool, terms: Sequence[Term]
) -> tuple[Tensor, Tensor | None] | None:
    """(u, v) of the second product: u (rows of x, E) and v (columns, E), or u alone where the columns are the rows."""
    if value is None:
        return None
    wanted = "a tensor (B, E), as y is None" if own else "a tuple of tensors (B, E) and (N, E), as y is given"
    if own != isinstance(value, Tensor) or not (own or (isinstance(value, (tuple, list)) and len(value) == 2)):
        got = type(value).__name__ + (f" of length {len(value)}" if isinstance(value, (tuple, list)) else "")
        raise TypeError(f"guide must be {wanted}; got {got}")
    sides = [value] if own else list(value)
    allowed = {x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32}
    for k, side in enumerate(sides):
        name, rows = ("guide" if own else f"guide[{k}]"), columns if k else x.shape[0]
        if not isinstance(side, Tensor) or side.dim() != 2 or side.shape[0] != rows:
            got = f"shape {tuple(side.shape)}" if isinstance(side, Tensor) else type(side).__name__
            raise ValueError(f"{name} must be a tensor with {rows} rows; got {got}")
        if side.dtype not in allowed:
            raise TypeError(
                f"{name} must be {' or '.join(sorted(map(str, allowed)))} beside embeddings of {x.dtype}; "
                f"got {side.dtype}"
            )
        if side.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}; got {side.device}")
    if not own and (sides[0].shape[1] != sides[1].shape[1] or sides[0].dtype != sides[1].dtype):
        raise ValueError(
            f"guide must be two tensors of one width and dtype; got {tuple(sides[0].shape)} {sides[0].dtype} and "
            f"{tuple(sides[1].shape)} {sides[1].dtype}"
        )
    if not any(term.guide != Guide.NONE for term in terms):
        raise ValueError("guide was given, but no term has a guide; set Term(guide=)")
    return sides[0], None if own else sides[1]


def extremes(
    values: Sequence[Extreme], rows: int, columns: int, device: torch.device, has_labels: bool, has_pair_mask: bool
) -> None:
    """Every extreme complete, with a k that rows can fill."""
    if not values:
        raise ValueError("extremes must hold at least one Extreme; got none")
    for e, extreme in enumerate(values):
        if not isinstance(extreme, Extreme):
            raise TypeError(f"extremes[{e}] must be a flashpair.Extreme; got {type(extreme).__name__}")
        if not isinstance(extreme.mask, Mask):
            raise TypeError(f"extremes[{e}].mask must be a flashpair.Mask; got {extreme.mask!r}")
        _mask("extremes", e, extreme.mask, has_labels, has_pair_mask)
        if isinstance(extreme.k, bool) or not isinstance(extreme.k, int) or not 1 <= extreme.k <= MAX_K:
            raise ValueError(f"extremes[{e}].k must be an integer from 1 to {MAX_K}; got {extreme.k!r}")
        if extreme.k > columns > 0:
            raise ValueError(f"extremes[{e}].k must be at most the row length {columns}; got {extreme.k}")
        for field in ("above", "below"):
            _parameter("extremes", e, field, getattr(extreme, field), rows, device, scalar=True)


def pair_mask(value: Tensor, rows: int, columns: int) -> None:
    """(rows, columns) bool."""
    if not isinstance(value, Tensor):
        raise TypeError(f"pair_mask must be a bool tensor; got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"pair_mask must be bool; got {value.dtype}")
    if tuple(value.shape) != (rows, columns):
        raise ValueError(f"pair_mask must have shape ({rows}, {columns}); got {tuple(value.shape)}")


def indices(name: str, value: Tensor, length: int | None = None) -> None:
    """1-D int64 tensor, optionally of a given length."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.dim() != 1:
        got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a 1-D int64 tensor; got {got}")
    if length is not None and value.shape[0] != length:
        raise ValueError(f"{name} must have length {length}; got {value.shape[0]}")


def pair_list(value: tuple[Tensor, Tensor], device: torch.device) -> None:
    """(rows (P,), columns (P,)) int64 on the device of the embeddings."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        got = f"{type(value).__name__}" + (f" of length {len(value)}" if isinstance(value, (tuple, list)) else "")
        raise TypeError(f"pairs must be a tuple (rows, columns) of int64 tensors; got {got}")
    rows, columns = value
    indices("pairs[0]", rows)
    indices("pairs[1]", columns, rows.shape[0])
    for k, index in enumerate(value):
        if index.device != device:
            raise ValueError(f"pairs[{k}] must be on the device of x, {device}; got {index.device}")


def closed(name: str, value, kind: type) -> None:
    """A member of one of our enums."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a flashpair.{kind.__name__}; got {value!r}")


def member(name: str, value, kind: type) -> None:
    """A member of an enum of a loss."""
    if not isinstance(value, kind):
        allowed = ", ".join(f"{kind.__name__}.{m.name}" for m in kind)
        raise TypeError(f"{name} must be one of {allowed}; got {value!r}")


def similarity(value: Similarity) -> None:
    closed("similarity", value, Similarity)
