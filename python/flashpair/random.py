"""Counter-based random numbers: a function of (seed, row, column), whatever the order, the device or the panels."""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed.sharded import current

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685  # the multipliers of splitmix64


def _shifted(z: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def random_bits(seed: int | Tensor, row: Tensor, column: Tensor) -> Tensor:
    """int64 bits for each (row, column), broadcast; splitmix64 (Steele, Lea, Flood 2014) of a mixed counter."""
    z = (row * _GOLDEN + column).mul_(_GOLDEN).add_(seed)
    part = torch.empty_like(z)  # fresh memory for each step takes twice as long

    def mix(by: int) -> Tensor:
        torch.bitwise_right_shift(z, by, out=part).bitwise_and_((1 << (64 - by)) - 1)
        return z.bitwise_xor_(part)

    for _ in range(2):  # twice: neighbouring counters differ in few bits
        mix(30).mul_(_FIRST)
        mix(27).mul_(_SECOND)
        mix(31)
    return z


def uniform(seed: int | Tensor, row: Tensor, column: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in (0, 1), never 0 or 1."""
    bits = 24 if dtype == torch.float32 else 53
    whole = _shifted(random_bits(seed, row, column), 64 - bits).to(dtype)
    return (whole + 0.5) * 2.0**-bits if dtype == torch.float64 else (whole + 0.5).clamp_max(2.0**24 - 1) * 2.0**-bits


def two_uniform(seed: int | Tensor, row: Tensor, column: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two uniform numbers in (0, 1) for each (row, column), of 23 bits and so the same in every dtype."""
    z = random_bits(seed, row, column)
    return tuple((part.to(dtype) + 0.5) * 2.0**-23 for part in (_shifted(z, 41), z & ((1 << 23) - 1)))


def integers(seed: int | Tensor, row: Tensor, column: Tensor, high: Tensor) -> Tensor:
    """Uniform integers in [0, high), 0 where high is 0 (bias below high / 2^53)."""
    return (uniform(seed, row, column, torch.float64) * high).long().minimum((high - 1).clamp_min(0))


def normal(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers of the shape of a tensor, equal on all ranks that share a call."""
    if generator is None and current() is not None:
        generator = torch.Generator(like.device).manual_seed(draw_seed() & ((1 << 62) - 1))
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def draw_seed() -> int:
    """A seed from torch's default CPU generator, so that `torch.manual_seed` decides; in a group, of its first rank."""
    seed = torch.randint(-(1 << 62), 1 << 62, (), dtype=torch.int64)
    ranks = current()
    if ranks is not None:
        device = "cpu" if "cpu" in ranks.devices() else "cuda"
        seed = ranks.gather(seed.reshape(1).to(device), [1] * ranks.size)[0]
    return int(seed)
