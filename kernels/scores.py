"""Scores: value and slope side by side, numbered as in `flashpair.Score`."""

import triton
import triton.language as tl

IDENTITY = tl.constexpr(0)
HINGE = tl.constexpr(1)
SOFTPLUS = tl.constexpr(2)
SQUARE = tl.constexpr(3)
SQUARED_HINGE = tl.constexpr(4)
CIRCLE = tl.constexpr(5)
SOFTCAP = tl.constexpr(6)
LOG_COSH = tl.constexpr(7)


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
def tanh(x):
    """tanh(x) with full relative accuracy."""
    q = x * x
    p = -5.70498872745e-3 * q + 2.06390887954e-2  # Cephes tanhf, |x| < 0.625
    p = p * q - 5.37397155531e-2
    p = p * q + 1.33314422036e-1
    p = p * q - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * q * p, tl.where(x < 0.0, -large, large))


@triton.jit
def log_cosh(z):
    """log(cosh(z)): log(1 + sinh(z) ** 2) / 2 near 0, where the other form cancels."""
    small = tl.abs(z) < 0.625
    t = tanh(z)
    log = log1p(tl.where(small, t * t / (1.0 - t * t), tl.exp(-2.0 * tl.abs(z))))
    return tl.where(small, 0.5 * log, (tl.abs(z) - 0.6931471805599453) + log)


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
    elif SCORE == SOFTCAP:
        value = constant * tanh(z / constant)
    elif SCORE == LOG_COSH:
        value = log_cosh(z)
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
    elif SCORE == SOFTCAP:
        e = tl.exp(-2.0 * tl.abs(z / constant))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif SCORE == LOG_COSH:
        slope = tanh(z)
    else:
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope
