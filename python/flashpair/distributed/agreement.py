"""What all ranks must have in common before a call touches the wire; a difference raises on every one of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from .ranks import DistributedError, Ranks

_SLOTS = 32  # tensors of one call
_FIELDS = ("rows", "features", "dtype", "gradient", "device")
_HEAD = 3  # refused, what is called, its options
_MESSAGE = 1024  # bytes of a refusal
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
_ABSENT = -1


#: Attributes of a module that are its own affair.
_OWN = {"training", "rank", "prev_num_logits"}


def options_of(module: nn.Module) -> str:
    """The settings of a loss that must not differ between ranks."""
    plain = (bool, int, float, str, type(None), Enum)
    parts = []
    for name, part in sorted(module.named_modules()):
        settings = sorted(vars(part).items(), key=lambda item: item[0])
        shown = [f"{k}={v!r}" for k, v in settings if isinstance(v, plain) and k[0] != "_" and k not in _OWN]
        parts.append(f"{name + ' ' if name else ''}{type(part).__name__}({', '.join(shown)})")
    return "; ".join(parts)


def _describe(value: Tensor | None) -> list[int]:
    if value is None:
        return [_ABSENT] * len(_FIELDS)
    dtype = _DTYPES.index(value.dtype) if value.dtype in _DTYPES else len(_DTYPES)
    features = value.shape[1] if value.dim() == 2 else 0
    gradient = int(value.requires_grad and torch.is_grad_enabled())
    return [value.shape[0], features, dtype, gradient, int(value.device.type != "cpu")]


def _shown(field: str, code: int) -> str:
    if code == _ABSENT:
        return "None"
    if field == "dtype":
        return str(_DTYPES[code]) if code < len(_DTYPES) else "another dtype"
    if field == "gradient":
        return "with gradient" if code else "without gradient"
    if field == "device":
        return "an accelerator" if code else "the CPU"
    return f"{code} {field}"


def agree(
    ranks: Ranks, what: str, options: str, tensors: dict[str, Tensor | None], refusal: Exception | None
) -> dict[str, list[int]]:
    """Rows of each tensor on each rank, once all ranks are known to call the same.

    Args:
        what: name of the loss. options: its settings.
        tensors: what is gathered, by name.
        refusal: why this rank cannot go on; every rank then raises.

    Raises:
        DistributedError: on a difference, and where another rank refuses. `refusal`: on this rank.
    """
    if not ranks.group.check:
        if refusal is not None:
            raise refusal
        return {name: [t.shape[0]] * ranks.size for name, t in tensors.items() if t is not None}
    if refusal is None and len(tensors) > _SLOTS:
        refusal = ValueError(f"{what} must have at most {_SLOTS} tensors; got {len(tensors)}")
    # Their names too: a rank with fewer must not go on where the others find a difference.
    options += f"; {', '.join(tensors)}"
    codes = [int(refusal is not None), zlib.crc32(what.encode()), zlib.crc32(options.encode())]
    for value in tensors.values():
        codes += _describe(value) if refusal is None else []
    codes += [_ABSENT] * (_HEAD + _SLOTS * len(_FIELDS) - len(codes))
    device = "cpu" if "cpu" in ranks.devices() else "cuda"
    own = torch.tensor([codes], dtype=torch.int64, device=device)
    table = ranks.gather(own, [1] * ranks.size).tolist()
    refused = [r for r, row in enumerate(table) if row[0]]
    if refused:
        _raise_refusals(ranks, refused, refusal, device)
    _compare(what, "must be the same call", [what if row[1] == codes[1] else "another" for row in table])
    other = next((r for r, row in enumerate(table) if row[2] != table[0][2]), None)
    if other is not None:
        raise DistributedError(
            f"{what} must have the same options on all ranks; rank 0 and rank {other} differ (here: {options})"
        )
    sizes = {}
    for k, name in enumerate(tensors):
        columns = [
            [row[_HEAD + k * len(_FIELDS) + f] for row in table] for f in range(len(_FIELDS))
        ]  # of each field, by rank
        for field, values in zip(_FIELDS, columns, strict=True):
            if field == "rows" and all(v != _ABSENT for v in values):
                continue
            _compare(name, "must be alike on all ranks", [_shown(field, v) for v in values])
        if tensors[name] is not None:
            sizes[name] = columns[0]
    return sizes


def _compare(name: str, rule: str, shown: Sequence[str]) -> None:
    for r, value in enumerate(shown):
        if value != shown[0]:
            raise DistributedError(f"{name} {rule}; got {shown[0]} on rank 0 and {value} on rank {r}")


def _raise_refusals(ranks: Ranks, refused: list[int], refusal: Exception | None, device: str) -> None:
    message = b"" if refusal is None else f"{type(refusal).__name__}: {refusal}".encode()[:_MESSAGE]
    own = torch.tensor([list(message.ljust(_MESSAGE, b"\0"))], dtype=torch.uint8, device=device)
    table = ranks.gather(own, [1] * ranks.size).cpu()
    if refusal is not None:
        raise refusal
    said = bytes(table[refused[0]].tolist()).rstrip(b"\0").decode(errors="replace")
    raise DistributedError(f"rank {refused[0]} of {ranks.size} refused its input: {said}")
