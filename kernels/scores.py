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

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """exp(x), 0 where it is below the smallest normal number: `tl.exp` takes three instructions more to keep those."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def log1p(e):
    """log(1 + e) for e in [0, 1] to two units in the last place; a third of the instructions of `tl.log`."""
    p = 5.23269426e-3 * e - 2.95052388e-2  # minimax of log(1 + e) / e, relative error 3e-8 before rounding
    p = p * e + 7.82259519e-2
    p = p * e - 1.36632458e-1
    p = p * e + 1.91060068e-1
    p = p * e - 2.48429822e-1
    p = p * e + 3.33190968e-1
    p = p * e - 4.99994931e-1
    p = p * e + 9.99999970e-1
    return p * e


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z))."""
    e = exp(-tl.abs(z))
    u = 1.0 + e
    return tl.where(z >= 0.0, 1.0, e) * tl.rsqrt(u * u)  # 1 / u, without what a quotient does for extreme divisors


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
    e = exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * q * p, tl.where(x < 0.0, -large, large))


@triton.jit
def log_cosh(z):
    """log(cosh(z)): log(1 + sinh(z) ** 2) / 2 near 0, where the other form cancels."""
    small = tl.abs(z) < 0.625
    t = tanh(z)
    log = log1p(tl.where(small, t * t / (1.0 - t * t), exp(-2.0 * tl.abs(z))))
    return tl.where(small, 0.5 * log, (tl.abs(z) - 0.6931471805599453) + log)


@triton.jit
def score_value(z, constant, SCORE: tl.constexpr):
    """phi(z)."""
    if SCORE == HINGE:
        value = relu(z)
    elif SCORE == SOFTPLUS:
        value = relu(z) + log1p(exp(-tl.abs(z)))
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
        slope = sigmoid(z)
    elif SCORE == SQUARE:
        slope = 2.0 * z
    elif SCORE == SQUARED_HINGE:
        slope = 2.0 * relu(z)
    elif SCORE == CIRCLE:
        slope = relu(z + constant)
    elif SCORE == SOFTCAP:
        e = exp(-2.0 * tl.abs(z / constant))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif SCORE == LOG_COSH:
        slope = tanh(z)
    else:
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope
