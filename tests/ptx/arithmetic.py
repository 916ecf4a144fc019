"""Numbers as PTX computes with them, on numpy arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

TYPES = {
    **{f"b{8 * n}": f"u{n}" for n in (1, 2, 4, 8)},
    **{f"u{8 * n}": f"u{n}" for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": f"i{n}" for n in (1, 2, 4, 8)},
    "f16": "f2",
    "f32": "f4",
    "f64": "f8",
    "pred": "?",
}


def type_of(name: str) -> np.dtype:
    return np.dtype(TYPES[name])


def wide(dtype: np.dtype) -> np.dtype:
    """The type of twice the width."""
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16, which numpy does not have, from its 16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: np.ndarray) -> np.ndarray:
    bits = value.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def to_tf32(value: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, ties away from zero (``cvt.rna``)."""
    bits = value.view(np.uint32)
    return np.where(np.isfinite(value), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(np.float32)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quotients towards zero; anything where the divisor is zero."""
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(quotient.dtype) if a.dtype.kind == "i" else quotient


def shift(op: Callable[..., np.ndarray]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Shifts by the width or more give what shifting one bit at a time would."""

    def shifted(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        bits = 8 * a.itemsize
        b = np.asarray(b).astype(np.int64)
        if op is np.left_shift or a.dtype.kind == "u":
            return np.where(b >= bits, a.dtype.type(0), op(a, np.minimum(b, bits - 1).astype(a.dtype)))
        return op(a, np.minimum(b, bits - 1).astype(a.dtype))

    return shifted


def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product."""
    if a.itemsize == 8:
        product = a.astype(object) * b.astype(object)
        return np.asarray(product >> 64).astype(a.dtype)
    return (a.astype(wide(a.dtype)) * b.astype(wide(a.dtype)) >> wide(a.dtype).type(8 * a.itemsize)).astype(a.dtype)


BINARY: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": divide,
    "rem": lambda a, b: a - divide(a, b) * b,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "max": np.maximum,
    "min": np.minimum,
}
UNARY: dict[str, Callable[..., np.ndarray]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "rcp": lambda a: 1 / a,
}
_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def compare(name: str, dtype: np.dtype) -> Callable[..., np.ndarray]:
    """The comparison ``setp.name`` makes: of floats false where either is NaN, unless it ends in u or is one of num,
    nan, ne."""
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name.endswith("u") and dtype.kind == "f":  # true where either is NaN
        base = _COMPARE[name[:-1]]
        return lambda a, b: base(a, b) | np.isnan(a) | np.isnan(b)
    base = _COMPARE[name]
    if name == "ne" and dtype.kind == "f":
        return lambda a, b: base(a, b) & ~(np.isnan(a) | np.isnan(b))
    return base
