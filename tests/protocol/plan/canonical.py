"""An independent canonicaliser: RFC 8785 with floats as strings, written without json or the code under test."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

_WIDE = Context(prec=1100, Emin=-2000, Emax=2000)
_SHORT = {0x08: "\\b", 0x09: "\\t", 0x0A: "\\n", 0x0C: "\\f", 0x0D: "\\r", 0x22: '\\"', 0x5C: "\\\\"}


def _quote(text: str) -> str:
    return '"' + "".join(_SHORT.get(ord(c)) or (f"\\u{ord(c):04x}" if ord(c) < 32 else c) for c in text) + '"'


def _utf16(text: str) -> list[int]:
    units = []
    for point in map(ord, text):
        high, low = divmod(point - 0x10000, 0x400)
        units += [point] if point < 0x10000 else [0xD800 + high, 0xDC00 + low]
    return units


def _shortest(value: float) -> str:
    """The fewest significant digits that read back to the same float, laid out as Python writes floats."""
    if value == 0:
        return "-0.0" if math.copysign(1, value) < 0 else "0.0"
    exact = Decimal(value)
    for digits in range(1, 18):
        unit = Decimal(1).scaleb(exact.adjusted() - digits + 1)
        both = [exact.quantize(unit, rounding, _WIDE) for rounding in (ROUND_FLOOR, ROUND_CEILING)]
        if fitting := [decimal for decimal in both if float(decimal) == value]:
            break
    nearest = min(fitting, key=lambda d: (abs(_WIDE.subtract(d, exact)), d.as_tuple().digits[-1] % 2))
    decimal = nearest.normalize()
    sign, point = "-" * (value < 0), decimal.adjusted() + 1
    digits = "".join(map(str, decimal.as_tuple().digits))
    if not -4 < point <= 16:
        fraction = f".{digits[1:]}" if digits[1:] else ""
        return f"{sign}{digits[0]}{fraction}e{point - 1:+03}"
    digits = digits.rjust(len(digits) + max(0, 1 - point), "0").ljust(point + 1, "0")
    point = max(point, 1)
    return f"{sign}{digits[:point]}.{digits[point:]}"


def canonical(value: Any) -> str:
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case int():
            return str(value)
        case float():
            return _quote(_shortest(value))
        case str():
            return _quote(value)
        case dict():
            return "{" + ",".join(f"{_quote(k)}:{canonical(value[k])}" for k in sorted(value, key=_utf16)) + "}"
        case _:
            return "[" + ",".join(map(canonical, value)) + "]"
