"""Tile configurations: one table, keyed by kernel (or "crowded"), kind of arithmetic and architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

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

_override: TileConfig | None = None


@contextlib.contextmanager
def override(config: TileConfig) -> Iterator[None]:
    """Use one configuration for every kernel, so that small problems have several tiles."""
    global _override
    previous, _override = _override, config
    try:
        yield
    finally:
        _override = previous


def architecture(device: torch.device) -> int:
    """The entry of the table that serves a device."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    below = [a for a in ARCHITECTURES if a <= 10 * major + minor]
    if major == 12:  # as little shared memory as 89
        return 89
    return 89 if major == 8 and minor > 0 else max(below, default=80)


def of_tiles(config: TileConfig, kind: int) -> TileConfig:
    """The configuration of one kind of tiles; their shape is that of all, since they share the partials."""
    if kind != PLAIN.value or config.plain is None:
        return config
    stages, registers = config.plain
    return replace(config, stages=min(config.stages, stages), registers=registers)


def choose(kernel: str, kind: str, arch: int, D: int, crowded: bool = False) -> TileConfig:
    """The configuration of a kernel for D features; `crowded`: of a pass whose epilogue holds much at a time."""
    if _override is not None:
        return _override
    config = TABLE["crowded" if crowded and kernel != "top_k" else kernel, kind, arch]
    if D <= SHORT_D:
        short = max(SHORTEST_BLOCK, 1 << max(D - 1, 1).bit_length())
        config = replace(config, block_d=min(config.block_d, short), stages=2)
    return config
