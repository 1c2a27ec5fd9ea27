"""Roundings and number formats that numpy lacks."""

from __future__ import annotations

import numpy as np

SMALLEST_NORMAL = np.finfo(np.float32).tiny


def widened(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return float32 of the bits of bf16 or f16, uint16."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    assert kind == "bf16", kind
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(x: np.ndarray, kind: str) -> np.ndarray:
    """Return the bits of float32 rounded to the nearest bf16 or f16, ties to even, uint16."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    assert kind == "bf16", kind
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def flushed(x: np.ndarray) -> np.ndarray:
    """Return float32 with subnormal numbers made zeros of their sign (`ftz`)."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def rounded(exact: np.ndarray, mode: str) -> np.ndarray:
    """Round float64 to float32: "rn" to the nearest, "rz" towards 0, "rm" down."""
    near = exact.astype(np.float32)
    if mode == "rn":
        return near
    too_far = np.abs(near) > np.abs(exact) if mode == "rz" else near > exact
    below = np.float32(0 if mode == "rz" else -np.inf)
    return np.where(too_far, np.nextafter(near, below), near)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Return a b + c of float32, rounded once, as `rounded` has it.

    The product is exact in float64. The sum is rounded to odd there: its last bit keeps that
    something was lost, and with 29 bits to spare the rounding to float32 is right.
    """
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
    return rounded(total, mode)
