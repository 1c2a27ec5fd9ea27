"""Roundings that numpy lacks."""

from __future__ import annotations

import numpy as np


def bf16_to_f32(x):
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x):
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def fma(a, b, c):
    """Rounded once: through float64 rounded to odd, which float32's rounding cannot see."""
    product = a.astype(np.float64) * b
    c = np.asarray(c, np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    odd = np.isfinite(total) & (error != 0)
    if odd.any():
        bits = total.view(np.int64).copy()
        odd &= bits & 1 == 0
        away = (error > 0) == (total > 0)
        bits += np.where(odd, np.where(away, 1, -1), 0)
        total = bits.view(np.float64)
    return total.astype(np.float32)


def bf16_or_f16(x, kind):
    return bf16_to_f32(x) if kind == "bf16" else x.view(np.float16).astype(np.float32)
