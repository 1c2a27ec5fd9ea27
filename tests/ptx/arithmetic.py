"""Instructions that each lane executes by itself, on registers."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from derta_kernels.ptx_counts import COMPARISONS
from ptx.floats import flushed, fma, narrowed, rounded, widened
from ptx.memory import Fault
from ptx.parse import WIDTHS, Instruction, Operand
from ptx.processor import TYPES, UNSIGNED, Mask, Processor

WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
INTEGER = "[su](16|32|64)"
BITS = "(pred|b16|b32|b64)"
ANY = "([bsu](16|32|64)|f32|f64)"


class Arithmetic(Processor):
    """Sums, products, comparisons, bits, conversions."""

    forms = Processor.forms | {
        "add": {rf"{INTEGER}|(rn\.|rz\.)?f32|(rn\.)?f32x2|rn\.f32\.(bf16|f16)": "dvv"},
        "sub": {rf"{INTEGER}|(rn\.)?f32|(rn\.)?f32x2": "dvv"},
        "mul": {rf"lo\.{INTEGER}|wide\.[su](16|32)|hi\.[su]32|(rn\.)?f32|(rn\.)?f32x2": "dvv"},
        "mad": {r"lo\.[su](16|32|64)|wide\.[su](16|32)": "dvvv"},
        "fma": {r"rn\.(ftz\.)?f32|rm\.f32|rn\.f32x2|rn\.f32\.(bf16|f16)": "dvvv"},
        "div": {r"(full|rn)\.f32|[su](32|64)": "dvv"},
        "rem": {r"[su](32|64)": "dvv"},
        "rcp": {r"(approx\.(ftz\.)?|rn\.)f32": "dv"},
        "ex2": {r"approx\.(ftz\.)?f32": "dv"},
        "lg2": {r"approx\.(ftz\.)?f32": "dv"},
        "neg": {r"f32|s(16|32|64)": "dv"},
        "abs": {r"f32|s(16|32|64)|b?f16(x2)?": "dv"},
        "copysign": {r"f32": "dvv"},
        "max": {rf"{INTEGER}|(NaN\.)?f32": "dvv?v"},
        "min": {rf"{INTEGER}|(NaN\.)?f32": "dvv?v"},
        "and": {BITS: "dvv"},
        "or": {BITS: "dvv"},
        "xor": {BITS: "dvv"},
        "not": {BITS: "dv"},
        "shl": {r"b(16|32|64)": "dvv"},
        "shr": {r"[bsu](16|32|64)": "dvv"},
        "bfe": {r"[su]32": "dvii"},
        "prmt": {r"b32": "dvvv"},
        "setp": {rf"(eq|ne|lt|le|gt|ge)\.{ANY}|((eq|ne|lt|le|gt|ge)u|nan|num)\.f32": "dvv"},
        "selp": {ANY: "dvvp"},
        "mov": {rf"pred|{ANY}": "DV"},
        "cvt": {
            r"[su](16|32|64)\.[su](16|32|64)|rn\.f32\.[su](32|64)|r[nzmp]i\.[su]32\.f32"
            r"|f32\.b?f16|rn\.b?f16\.f32|sat\.f32\.f32": "dv",
            r"rn\.b?f16x2\.f32": "dvv",
        },
        "cvta": {r"(to\.)?global\.u64": "dv"},
    }

    def _each(self, ins: Instruction, mask: Mask, f: Callable[..., np.ndarray]) -> None:
        """Set the first operand to f of the others."""
        if ins.type == "f32x2":
            pairs = [self.full(x, "b64").view(np.float32) for x in ins.operands[1:]]
            self.put(ins.operands[0], f(*pairs).view(np.uint64), mask)
            return
        values = [self.get(x, ins.type) for x in ins.operands[1:]]
        self.put(ins.operands[0], f(*values), mask)

    # Sums and products

    def op_add(self, ins: Instruction, mask: Mask) -> None:
        """Add; the first summand may be bf16 or f16."""
        if ins.type in ("bf16", "f16"):
            wide = widened(self.full(ins.operands[1], "b16"), ins.type)
            self.put(ins.operands[0], wide + self.get(ins.operands[2], "f32"), mask)
        elif ins.index in self.fused:
            self._fused(ins, mask)
        elif "rz" in ins.modifiers:
            self._each(ins, mask, lambda a, b: fma(a, np.ones_like(a), b, "rz"))
        else:
            self._each(ins, mask, operator.add)

    def op_sub(self, ins: Instruction, mask: Mask) -> None:
        """Subtract."""
        if ins.index in self.fused:
            self._fused(ins, mask)
        else:
            self._each(ins, mask, operator.sub)

    def _fused(self, ins: Instruction, mask: Mask) -> None:
        *operands, negative = self.fused[ins.index]
        a, b, c = (self.full(x, "f32") for x in operands)
        out = fma(-a if negative == "ab" else a, b, -c if negative == "c" else c)
        self.put(ins.operands[0], out, mask)

    def _wide(self, ins: Instruction) -> tuple[np.ndarray, str]:
        kind = WIDER[ins.type]
        a, b = (self.get(x, ins.type).astype(TYPES[kind]) for x in ins.operands[1:3])
        return a * b, kind

    def op_mul(self, ins: Instruction, mask: Mask) -> None:
        """Multiply: the low half, the high half, all of the product, or floats."""
        if ins.modifiers[0] == "wide":
            self.put(ins.operands[0], self._wide(ins)[0], mask)
        elif ins.modifiers[0] == "hi":
            high = self._wide(ins)[0] >> 32
            self.put(ins.operands[0], high.astype(TYPES[ins.type]), mask)
        else:
            self._each(ins, mask, operator.mul)

    def op_mad(self, ins: Instruction, mask: Mask) -> None:
        """Multiply integers and add; with `wide` the summand is as wide as the product."""
        if ins.modifiers[0] == "wide":
            product, kind = self._wide(ins)
            self.put(ins.operands[0], product + self.get(ins.operands[3], kind), mask)
        else:
            self._each(ins, mask, lambda a, b, c: a * b + c)

    def op_fma(self, ins: Instruction, mask: Mask) -> None:
        """Multiply floats and add, rounded once; factors may be bf16 or f16."""
        if ins.type in ("bf16", "f16"):
            a, b = (widened(self.full(x, "b16"), ins.type) for x in ins.operands[1:3])
            self.put(ins.operands[0], fma(a, b, self.full(ins.operands[3], "f32")), mask)
        elif "ftz" in ins.modifiers:
            self._each(ins, mask, lambda *values: flushed(fma(*(flushed(x) for x in values))))
        else:
            self._each(ins, mask, lambda a, b, c: fma(a, b, c, ins.modifiers[0]))

    # Quotients and approximations

    def _approximate(self, exact: np.ndarray) -> np.ndarray:
        """Return float32, off by up to `approx_ulp`; the same for the same result."""
        value, most = exact.astype(np.float32), self.options.approx_ulp
        if not most:
            return value
        mixed = value.view(np.uint32) * np.uint32(2654435761) + np.uint32(self.options.seed)
        mixed ^= mixed >> np.uint32(15)
        step = (mixed % np.uint32(2 * most + 1)).astype(np.int32) - most
        moved = (value.view(np.int32) + step.astype(np.int32)).view(np.float32)
        # Powers of two are exact on hardware where the exponent is whole, as is 1 / 1.
        return np.where(np.isfinite(value) & (value != 0) & (value != 1), moved, value)

    def _approximated(self, ins: Instruction, mask: Mask, f: Callable[..., np.ndarray]) -> None:
        """Set the first operand to f of the others, in float64 and then off as hardware is."""
        values = [self.full(x, "f32") for x in ins.operands[1:]]
        if "ftz" in ins.modifiers:
            values = [flushed(x) for x in values]
        exact = f(*(x.astype(np.float64) for x in values))
        out = rounded(exact, "rn") if "rn" in ins.modifiers else self._approximate(exact)
        self.put(ins.operands[0], flushed(out) if "ftz" in ins.modifiers else out, mask)

    def op_ex2(self, ins: Instruction, mask: Mask) -> None:
        """Raise 2 to a power."""
        self._approximated(ins, mask, np.exp2)

    def op_lg2(self, ins: Instruction, mask: Mask) -> None:
        """Take the logarithm to base 2."""
        self._approximated(ins, mask, np.log2)

    def op_rcp(self, ins: Instruction, mask: Mask) -> None:
        """Divide 1."""
        self._approximated(ins, mask, lambda x: 1 / x)

    def op_div(self, ins: Instruction, mask: Mask) -> None:
        """Divide floats, or integers towards 0."""
        if ins.type == "f32":
            self._approximated(ins, mask, operator.truediv)
            return
        a, b = self._divided(ins, mask)
        # Magnitudes as unsigned numbers: that of the lowest one has no signed form.
        unsigned = UNSIGNED[a.itemsize]
        quotient = np.abs(a).astype(unsigned) // np.abs(b).astype(unsigned)
        negative = (a < 0) != (b < 0)
        self.put(ins.operands[0], np.where(negative, -quotient, quotient), mask)

    def op_rem(self, ins: Instruction, mask: Mask) -> None:
        """Take the remainder of a division towards 0."""
        self.put(ins.operands[0], np.fmod(*self._divided(ins, mask)), mask)

    def _divided(self, ins: Instruction, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
        a, b = (self.full(x, ins.type) for x in ins.operands[1:])
        if (b[self.lanes_of(mask)] == 0).any():
            raise Fault(f"division by 0: {ins}")
        return a, np.where(b == 0, np.ones_like(b), b)

    def op_neg(self, ins: Instruction, mask: Mask) -> None:
        """Negate."""
        self._each(ins, mask, operator.neg)

    def op_abs(self, ins: Instruction, mask: Mask) -> None:
        """Take the magnitude: of 16-bit floats all bits but their signs."""
        width = WIDTHS[ins.type]
        if "16" in ins.type and ins.type[0] != "s":
            magnitude = UNSIGNED[width](0x7FFF if width == 2 else 0x7FFF7FFF)
            bits = self.get(ins.operands[1], f"b{8 * width}")
            self.put(ins.operands[0], bits & magnitude, mask)
        else:
            self._each(ins, mask, np.abs)

    def op_copysign(self, ins: Instruction, mask: Mask) -> None:
        """Give the second source the sign of the first."""
        self._each(ins, mask, lambda sign, magnitude: np.copysign(magnitude, sign))

    def op_max(self, ins: Instruction, mask: Mask) -> None:
        """Take the largest of two or three; NaN only with the modifier, or if all are."""
        self._extreme(ins, mask, np.fmax, np.maximum)

    def op_min(self, ins: Instruction, mask: Mask) -> None:
        """Take the smallest; see `op_max`."""
        self._extreme(ins, mask, np.fmin, np.minimum)

    def _extreme(self, ins: Instruction, mask: Mask, numbers: np.ufunc, any_nan: np.ufunc) -> None:
        f = any_nan if "NaN" in ins.modifiers else numbers
        self._each(ins, mask, lambda a, *others: f(a, f(*others) if others[1:] else others[0]))

    # Bits

    def op_and(self, ins: Instruction, mask: Mask) -> None:
        """Bitwise."""
        self._each(ins, mask, operator.and_)

    def op_or(self, ins: Instruction, mask: Mask) -> None:
        """Bitwise."""
        self._each(ins, mask, operator.or_)

    def op_xor(self, ins: Instruction, mask: Mask) -> None:
        """Bitwise."""
        self._each(ins, mask, operator.xor)

    def op_not(self, ins: Instruction, mask: Mask) -> None:
        """Bitwise."""
        self._each(ins, mask, operator.invert)

    def op_shl(self, ins: Instruction, mask: Mask) -> None:
        """Shift left; past the width nothing is left."""
        self._shift(ins, mask, np.left_shift)

    def op_shr(self, ins: Instruction, mask: Mask) -> None:
        """Shift right; past the width a signed number's sign is left, or nothing."""
        self._shift(ins, mask, np.right_shift)

    def _shift(self, ins: Instruction, mask: Mask, f: np.ufunc) -> None:
        x, amount = self.full(ins.operands[1], ins.type), self.full(ins.operands[2], "u32")
        bits = 8 * x.itemsize
        out = f(x, np.minimum(amount, bits - 1).astype(x.dtype))
        if x.dtype.kind == "u":
            out = np.where(amount < bits, out, x.dtype.type(0))
        self.put(ins.operands[0], out, mask)

    def op_bfe(self, ins: Instruction, mask: Mask) -> None:
        """Extract bits, whose first is a sign if the type is signed."""
        position, length = (int(str(x), 0) for x in ins.operands[2:])
        if not (0 < length and position + length <= 32):
            raise NotImplementedError(f"a field outside of the register: {ins}")
        field = self.get(ins.operands[1], "u32") << np.uint32(32 - position - length)
        self.put(ins.operands[0], field.view(TYPES[ins.type]) >> TYPES[ins.type](32 - length), mask)

    def op_prmt(self, ins: Instruction, mask: Mask) -> None:
        """Pick four of eight bytes, or of one its sign in every bit."""
        a, b, pick = (self.full(x, "b32").astype(np.uint64) for x in ins.operands[1:])
        both = a | b << np.uint64(32)
        out = np.zeros(self.lanes, np.uint64)
        for i in range(4):
            one = pick >> np.uint64(4 * i)
            byte = both >> ((one & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            sign = (byte >> np.uint64(7)) * np.uint64(255)
            out |= np.where(one & np.uint64(8), sign, byte) << np.uint64(8 * i)
        self.put(ins.operands[0], out.astype(np.uint32), mask)

    # Comparisons and moves

    def op_setp(self, ins: Instruction, mask: Mask) -> None:
        """Compare: NaN is unlike every number, unless the name ends in u, where it passes."""
        a, b = (self.get(x, ins.type) for x in ins.operands[1:])
        name = ins.modifiers[0]
        if ins.type[0] != "f":
            out = COMPARISONS[name](a, b)
        else:
            unordered = np.isnan(a) | np.isnan(b)
            if name in ("nan", "num"):
                out = unordered if name == "nan" else ~unordered
            elif name[-1] == "u":
                out = COMPARISONS[name[:-1]](a, b) | unordered
            else:
                out = COMPARISONS[name](a, b) & ~unordered
        self.put(ins.operands[0], out, mask)

    def op_selp(self, ins: Instruction, mask: Mask) -> None:
        """Select the first source where the predicate holds, else the second."""
        a, b = (self.get(x, ins.type) for x in ins.operands[1:3])
        self.put(ins.operands[0], np.where(self.get(ins.operands[3], "pred"), a, b), mask)

    def op_mov(self, ins: Instruction, mask: Mask) -> None:
        """Copy, or split or join a register; a list's first register is the low part."""
        to, of = ins.operands
        if isinstance(to, list) and isinstance(of, list):
            raise NotImplementedError(f"a move of a list to a list: {ins}")
        if isinstance(to, list):
            parts = self.full(of, ins.type)
            parts = parts.view(UNSIGNED[self._part(ins, to)]).reshape(self.lanes, -1)
            for i, name in enumerate(to):
                self.put(name, parts[:, i].copy(), mask)
        elif isinstance(of, list):
            each = self._part(ins, of)
            parts = np.stack([self.full(x, f"b{8 * each}") for x in of], 1)
            self.put(to, parts.view(UNSIGNED[WIDTHS[ins.type]])[:, 0], mask)
        else:
            self.put(to, self.get(of, ins.type), mask)

    def _part(self, ins: Instruction, parts: list[Operand]) -> int:
        """Return the bytes of a part of what a move splits or joins."""
        each = WIDTHS[ins.type] // len(parts)
        if len(parts) not in (2, 4) or each < 2:
            raise NotImplementedError(f"{len(parts)} parts: {ins}")
        return each

    def op_cvt(self, ins: Instruction, mask: Mask) -> None:
        """Convert; of a pair the first source is the high half."""
        to, of = [m for m in ins.modifiers if m in WIDTHS]
        if to in ("bf16x2", "f16x2"):
            kind = to.removesuffix("x2")
            high, low = (
                narrowed(self.full(x, of), kind).astype(np.uint32) for x in ins.operands[1:]
            )
            self.put(ins.operands[0], high << np.uint32(16) | low, mask)
            return
        x = self.full(ins.operands[1], of)
        if "sat" in ins.modifiers:
            out = np.where(np.isnan(x), np.float32(0), np.clip(x, 0, 1))
        elif of in ("bf16", "f16"):
            out = widened(x.view(np.uint16), of)
        elif to in ("bf16", "f16"):
            out = narrowed(x, to)
        elif to == "f32" or of != "f32":
            out = x.astype(TYPES[to])
        else:
            whole = TO_INTEGER[ins.modifiers[0]](x).astype(np.float64)
            limits = np.iinfo(TYPES[to])
            whole = np.clip(np.where(np.isnan(whole), 0, whole), limits.min, limits.max)
            out = whole.astype(TYPES[to])
        self.put(ins.operands[0], out, mask)

    def op_cvta(self, ins: Instruction, mask: Mask) -> None:
        """Convert between generic and global addresses, which are the same here."""
        self._each(ins, mask, lambda x: x)
