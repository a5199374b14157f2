"""exp and log with the same bits on every machine: of IEEE doubles' +, -, x and / alone, as math libraries differ."""

import numpy as np

LN2 = (6.93147180369123816490e-01, 1.90821492927058770002e-10)  # ln 2 as high + low part (fdlibm)
EXP = tuple(1.0 / float(np.prod(np.arange(1, n + 1), dtype=np.float64)) for n in range(14))
LOG = tuple(1.0 / n for n in range(1, 24, 2))


def exp(x: np.ndarray) -> np.ndarray:
    """e^x to about 1e-16; x is held within -700 and 700."""
    x = np.clip(x, -700.0, 700.0)
    k = np.rint(x / (LN2[0] + LN2[1]))
    r = (x - k * LN2[0]) - k * LN2[1]
    return np.ldexp(_horner(EXP, r), k.astype(np.int32))


def log(x: np.ndarray) -> np.ndarray:
    """ln x to about 1e-16, for x > 0."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa, k = np.where(small, 2 * mantissa, mantissa), exponent - small.astype(np.int32)
    z = (mantissa - 1) / (mantissa + 1)
    return k * LN2[0] + (k * LN2[1] + 2 * z * _horner(LOG, z * z))


def _horner(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = y * x + c
    return y
