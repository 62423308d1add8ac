"""Tile configurations: a table by kernel (or "crowded"), arithmetic and architecture, and measured rows that win.

The table was chosen by compiling and reading. `bench/tune.py` measures, and writes rows of the same keys and a bucket
of widths: into `tuned.json` beside this file, or into a file of one's own that `FLASHPAIR_TUNED` names.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import recording
from .program import PLAIN


@dataclass(frozen=True)
class TileConfig:
    """Shape of a tile of S and how a program computes it."""

    block_b: int  # rows
    block_n: int  # columns
    block_d: int  # features at a time
    warps: int
    stages: int
    parts: int = 1  # column parts that the epilogue takes one after the other, which bounds its registers
    group: int = 8  # row tiles that share the columns they walk
    registers: int | None = None  # per thread, at most; left to itself, the assembler spills a few to fit another block
    plain: tuple[int, int] | None = None  # stages and registers of plain tiles, whose epilogue holds little at a time


#: Compute capabilities that have an entry of their own; others use the next lower one.
ARCHITECTURES = (80, 89, 90, 100)
KINDS = ("half", "tf32", "ieee")  # 16-bit inputs, float32 through tensor cores, float32 in full
#: Feature counts up to which a bucket applies; short loops want shallow pipelines.
SHORT_D = 64
#: Features at a time that short loops take at least.
SHORTEST_BLOCK = 32
#: Terms times sides that the epilogue of an ordinary pass has at most.
MANY_EVALUATIONS = 6

#: Two programs share a multiprocessor: one multiplies while the other reduces.
_TWO_AT_ONCE = (3, 128)
ONE_AT_ONCE = (4, 255)
#: 16-bit inputs. Four parts: the epilogue of a 128 by 128 tile at once would spill.
_HALF = {
    80: TileConfig(128, 64, 32, 8, 3, parts=2),
    89: TileConfig(128, 64, 32, 8, 3, parts=2),
    90: TileConfig(128, 128, 64, 8, 4, parts=4, plain=_TWO_AT_ONCE),
    100: TileConfig(128, 128, 64, 8, 4, parts=4, registers=255, plain=_TWO_AT_ONCE),
}
_TF32 = {
    80: TileConfig(128, 64, 32, 8, 3, parts=2),
    89: TileConfig(128, 64, 32, 8, 3, parts=2),
    90: TileConfig(128, 128, 32, 8, 3, parts=4, plain=ONE_AT_ONCE),
    100: TileConfig(128, 128, 32, 8, 3, parts=4, plain=ONE_AT_ONCE),
}
#: float32 in full runs on the ordinary cores, whose accumulators leave few registers for the epilogue.
_IEEE = dict.fromkeys(ARCHITECTURES, TileConfig(64, 64, 16, 8, 2, parts=4, registers=128))
#: Ranks and places beside the accumulators of the larger tile would spill in TF32.
_EXTREMES = {
    "half": _HALF,
    "tf32": _TF32 | dict.fromkeys((90, 100), TileConfig(128, 64, 32, 8, 3, parts=2, registers=255)),
    "ieee": _IEEE,
}
#: The running K best are int64, twice the registers of a similarity.
_TOP_K = {
    "half": dict.fromkeys(ARCHITECTURES, TileConfig(64, 64, 64, 8, 3, registers=255)),
    "tf32": dict.fromkeys(ARCHITECTURES, TileConfig(64, 64, 32, 8, 3, registers=255)),
    "ieee": dict.fromkeys(ARCHITECTURES, TileConfig(64, 64, 16, 8, 2, registers=255)),
}
#: Passes with an explicit mask, a second product, softmax means or more than `MANY_EVALUATIONS` take a smaller part of
#: S at a time.
_CROWDED = {
    "half": dict.fromkeys((80, 89), TileConfig(128, 64, 32, 8, 3, parts=4, registers=255))
    | dict.fromkeys((90, 100), TileConfig(128, 64, 64, 8, 4, parts=4)),
    "tf32": dict.fromkeys(ARCHITECTURES, TileConfig(128, 64, 32, 8, 3, parts=4)),
    "ieee": dict.fromkeys(ARCHITECTURES, TileConfig(64, 64, 16, 8, 2, parts=4, registers=255)),
}
_STATS = {"half": _HALF, "tf32": _TF32, "ieee": _IEEE}
#: Pair weights hold more at a time than statistics: probabilities, slopes, their sum.
_WEIGHTS = _STATS | {
    "half": _HALF
    | dict.fromkeys((80, 89), TileConfig(128, 64, 32, 8, 3, parts=4, registers=128))
    | {100: TileConfig(128, 128, 64, 8, 4, parts=4, plain=ONE_AT_ONCE)}
}
_ENTRIES = {"stats": _STATS, "weights": _WEIGHTS, "extremes": _EXTREMES, "top_k": _TOP_K, "crowded": _CROWDED}

TABLE: dict[tuple[str, str, int], TileConfig] = {
    (entry, kind, arch): _ENTRIES[entry][kind][arch] for entry in _ENTRIES for kind in KINDS for arch in ARCHITECTURES
}

# --- measured rows ----------------------------------------------------------------------------------------------------

#: Rows that come with the package; written by `bench/tune.py`.
TUNED = Path(__file__).with_name("tuned.json")
#: Environment variable that names a file of one's own, whose rows win over those; read at the first launch.
VARIABLE = "FLASHPAIR_TUNED"
#: Feature counts up to which a bucket of measured rows applies; the last serves all that are wider, too.
WIDTHS = (32, 64, 128, 256, 512, 1024)
REGISTERS = 65536  # of a multiprocessor

_BLOCKS = (16, 32, 64, 128, 256)  # vectors along the sides are padded to whole tiles of these
_STAGES, _REGISTERS = range(1, 9), range(24, 256)
#: What the fields of a row may be. Crowded passes keep the table: no one program stands for all of them.
_KEY = {
    "kernel": ("stats", "weights", "extremes", "top_k"),
    "kind": KINDS,
    "architecture": ARCHITECTURES,
    "width": WIDTHS,
}
_TILE = {
    "block_b": _BLOCKS, "block_n": _BLOCKS, "block_d": (16, 32, 64, 128), "warps": (1, 2, 4, 8, 16), "stages": _STAGES,
    "parts": (1, 2, 4), "group": range(1, 129), "registers": (None, *_REGISTERS),
}  # fmt: skip


def width_of(D: int) -> int:
    """The bucket of D features."""
    return next((width for width in WIDTHS if width >= D), WIDTHS[-1])


def _check(name: str, value: Any, allowed: Sequence) -> None:
    if not any(type(value) is type(a) and value == a for a in allowed):
        told = [repr(a) for a in allowed]
        told = [*told[:2], "...", told[-1]] if len(told) > 8 else told
        raise ValueError(f"{name} must be one of {', '.join(told)}; got {value!r}")


def tile_config(tile: dict[str, Any]) -> TileConfig:
    """The fields of a measured row as a configuration.

    Raises:
        ValueError: on a field that is missing, unknown or not allowed, by name.
    """
    known = {field.name: field.default is MISSING for field in fields(TileConfig)}
    for name in tile:
        if name not in known:
            raise ValueError(f"{name} is no field of a tile; there are {', '.join(known)}")
    for name, needed in known.items():
        if needed and name not in tile:
            raise ValueError(f"{name} is missing")
    for name, value in tile.items():
        if name != "plain":
            _check(name, value, _TILE[name])
    plain = tile.get("plain")
    if plain is not None:
        if not isinstance(plain, (list, tuple)) or len(plain) != 2:
            raise ValueError(f"plain must be None or (stages, registers); got {plain!r}")
        for name, value, allowed in zip(("stages", "registers"), plain, (_STAGES, _REGISTERS), strict=True):
            _check(f"{name} of plain", value, allowed)
    config = TileConfig(**{**tile, "plain": None if plain is None else tuple(plain)})
    if config.block_n < 16 * config.parts:
        raise ValueError(f"parts must leave 16 columns of block_n = {config.block_n}; got {config.parts}")
    for name, registers in (("registers", config.registers), ("registers of plain", plain and plain[1])):
        most = REGISTERS // (32 * config.warps)
        if registers and registers > most:
            raise ValueError(f"{name} must be at most {most} with {config.warps} warps; got {registers}")
    return config


def read_tuned(path: Path) -> dict[tuple[str, str, int, int], TileConfig]:
    """Configurations of a file by (kernel, kind, architecture, width).

    Raises:
        ValueError: where it is no such file, or a row is not valid; names the file, the row and the field.
    """
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no tuned tiles: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds no tuned tiles: it must be a list of rows; got {type(rows).__name__}")
    found = {}
    for n, row in enumerate(rows):
        try:
            if not isinstance(row, dict) or not isinstance(row.get("tile"), dict):
                raise ValueError(f"it must have {', '.join(_KEY)} and a tile; got {row!r}")
            for name, allowed in _KEY.items():
                _check(name, row.get(name), allowed)
            config = tile_config(row["tile"])
            if config.block_d > row["width"]:
                raise ValueError(f"block_d must be at most the width, {row['width']}; got {config.block_d}")
        except ValueError as error:
            raise ValueError(f"{path}, row {n}: {error}") from None
        found[tuple(row[name] for name in _KEY)] = config
    return found


@functools.cache
def tuned() -> dict[tuple[str, str, int, int], TileConfig]:
    """Measured configurations by (kernel, kind, architecture, width): the package's, and one's own over them.

    Raises:
        ValueError: on a file that is not valid.
    """
    found = read_tuned(TUNED) if TUNED.exists() else {}
    own = os.environ.get(VARIABLE)
    try:
        return found | (read_tuned(Path(own)) if own else {})
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from error


# --- the choice -------------------------------------------------------------------------------------------------------

_override: TileConfig | None = None


@contextlib.contextmanager
def override(config: TileConfig) -> Iterator[None]:
    """Use one configuration for every kernel, so that small problems have several tiles."""
    global _override
    previous, _override = _override, config
    recording.forget()
    try:
        yield
    finally:
        _override = previous
        recording.forget()


def architecture(device: torch.device) -> int:
    """The entry of the table that serves a device."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    below = [a for a in ARCHITECTURES if a <= 10 * major + minor]
    if major == 12:  # as little shared memory as 89
        return 89
    return 89 if major == 8 and minor > 0 else max(below, default=80)


@functools.cache
def of_tiles(config: TileConfig, kind: int) -> TileConfig:
    """The configuration of one kind of tiles; their shape is that of all, since they share the partials."""
    if kind != PLAIN.value or config.plain is None:
        return config
    stages, registers = config.plain
    return replace(config, stages=min(config.stages, stages), registers=registers)


@functools.cache
def one_at_once(config: TileConfig) -> TileConfig:
    """The configuration with plain tiles of which a multiprocessor holds one at a time."""
    return replace(config, plain=ONE_AT_ONCE)


def choose(kernel: str, kind: str, arch: int, D: int, crowded: bool = False) -> TileConfig:
    """The configuration of a kernel for D features; `crowded`: of a pass whose epilogue holds much at a time."""
    if _override is not None:
        return _override
    if crowded and kernel != "top_k":
        return from_table("crowded", kind, arch, D)
    return tuned().get((kernel, kind, arch, width_of(D))) or from_table(kernel, kind, arch, D)


@functools.cache
def from_table(entry: str, kind: str, arch: int, D: int) -> TileConfig:
    """The table's configuration for D features, whatever was measured."""
    config = TABLE[entry, kind, arch]
    if D <= SHORT_D:
        short = max(SHORTEST_BLOCK, 1 << max(D - 1, 1).bit_length())
        config = replace(config, block_d=min(config.block_d, short), stages=2)
    return config
