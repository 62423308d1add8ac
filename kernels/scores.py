"""Scores: value and slope side by side, numbered as in `flashpair.Score`."""

import triton
import triton.language as tl

IDENTITY = tl.constexpr(0)
HINGE = tl.constexpr(1)
SOFTPLUS = tl.constexpr(2)
SQUARE = tl.constexpr(3)
SQUARED_HINGE = tl.constexpr(4)
CIRCLE = tl.constexpr(5)


@triton.jit
def log1p(e):
    """log(1 + e) for e in [0, 1] with full relative accuracy."""
    u = 1.0 + e
    return tl.log(u) + (e - (u - 1.0)) / u


@triton.jit
def relu(z):
    """max(z, 0) that keeps NaN."""
    return tl.where(z <= 0.0, 0.0, z)


@triton.jit
def score_value(z, constant, SCORE: tl.constexpr):
    """phi(z)."""
    if SCORE == HINGE:
        value = relu(z)
    elif SCORE == SOFTPLUS:
        value = relu(z) + log1p(tl.exp(-tl.abs(z)))
    elif SCORE == SQUARE:
        value = z * z
    elif SCORE == SQUARED_HINGE:
        value = relu(z) * relu(z)
    elif SCORE == CIRCLE:
        value = relu(z + constant) * (z - constant)
    else:
        value = z
    return value


@triton.jit
def score_slope(z, constant, SCORE: tl.constexpr):
    """phi'(z)."""
    if SCORE == HINGE:
        slope = tl.where(z <= 0.0, 0.0, 1.0)
    elif SCORE == SOFTPLUS:
        e = tl.exp(-tl.abs(z))
        slope = tl.where(z >= 0.0, 1.0, e) / (1.0 + e)
    elif SCORE == SQUARE:
        slope = 2.0 * z
    elif SCORE == SQUARED_HINGE:
        slope = 2.0 * relu(z)
    elif SCORE == CIRCLE:
        slope = relu(z + constant)
    else:
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope
