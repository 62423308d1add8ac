"""Tile configurations: one table, keyed by kernel, kind of arithmetic and architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


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


KERNELS = ("stats", "weights", "extremes", "top_k")
#: Compute capabilities that have an entry of their own; others use the next lower one.
ARCHITECTURES = (80, 89, 90, 100)
KINDS = ("half", "tf32", "ieee")  # 16-bit inputs, float32 through tensor cores, float32 in full
#: Feature counts up to which a bucket applies; short loops want shallow pipelines.
SHORT_D = 64

_TENSOR_CORES = {
    80: TileConfig(128, 128, 32, 8, 3),
    89: TileConfig(128, 128, 32, 8, 3),
    90: TileConfig(128, 128, 64, 8, 4),
    100: TileConfig(128, 128, 64, 8, 4),
}
_TF32 = {
    80: TileConfig(128, 128, 32, 8, 3),
    89: TileConfig(128, 64, 32, 8, 3),
    90: TileConfig(128, 128, 32, 8, 4),
    100: TileConfig(128, 128, 32, 8, 4),
}
_IEEE = {arch: TileConfig(64, 64, 16, 4, 2) for arch in ARCHITECTURES}
_TOP_K = {
    "half": {arch: TileConfig(64, 64, 64, 4, 3) for arch in ARCHITECTURES},
    "tf32": {arch: TileConfig(64, 64, 32, 4, 3) for arch in ARCHITECTURES},
    "ieee": _IEEE,
}

TABLE: dict[tuple[str, str, int], TileConfig] = {
    (kernel, kind, arch): (
        _TOP_K[kind][arch]
        if kernel == "top_k"
        else {"half": _TENSOR_CORES, "tf32": _TF32, "ieee": _IEEE}[kind][arch]
    )
    for kernel in KERNELS
    for kind in KINDS
    for arch in ARCHITECTURES
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


def choose(kernel: str, kind: str, arch: int, D: int) -> TileConfig:
    """The configuration of a kernel for D features."""
    if _override is not None:
        return _override
    config = TABLE[kernel, kind, arch]
    if D <= SHORT_D:
        short = max(16, min(config.block_d, 1 << max(D - 1, 1).bit_length()))
        config = TileConfig(config.block_b, config.block_n, short, config.warps, 2, config.parts, config.group)
    return config
