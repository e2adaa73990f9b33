"""Numbers as people read them. Plain ASCII; `typeset` puts the true minus sign in for HTML.

A missing number is an en dash, never "nan" and never zero.
"""

from __future__ import annotations

import math
import re

MISSING = "–"


def number(value: float | int | None, digits: int = 4) -> str:
    """`value` with `digits` significant digits; integers stay whole and get thousands separators."""
    if value is None:
        return MISSING
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{places}f}"


def reading(value: float | None) -> str:
    """`value` with four significant digits and no trailing zeros, as the charts write it."""
    return MISSING if value is None else f"{value:.4g}"


def places_for(spread: float, digits: int = 2, most: int = 8) -> int:
    """Decimal places that show `spread` with `digits` significant digits: the precision an estimate
    deserves."""
    if not spread > 0:
        return 4
    return min(most, max(0, digits - 1 - math.floor(math.log10(spread))))


def signed(value: float | None, places: int) -> str:
    """`value` with an explicit sign and a fixed number of decimals."""
    if value is None:
        return MISSING
    return f"{value:+,.{places}f}" if round(value, places) else "0"


def quantity(value: float | int | None) -> str:
    """A count in thousands, millions, billions, trillions: `1.23 M`."""
    if value is None:
        return MISSING
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}"
    return number(value, 3)


def seconds(value: float | None) -> str:
    """A duration: `0.42 s`, `38 s`, `4 min 10 s`, `2 h 05 min`."""
    if value is None:
        return MISSING
    if value < 100:
        return f"{value:.3g} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def size(value: float | None) -> str:
    """Bytes in binary units: `1.5 GiB`."""
    if value is None:
        return MISSING
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def percent(share: float | None, places: int = 1) -> str:
    """A share of one with its sign: 0.0312 gives `+3.1 %`."""
    return MISSING if share is None else f"{signed(100 * share, places)} %"


def typeset(text: str) -> str:
    """`text` with hyphens before digits turned into minus signs."""
    return re.sub(r"(?<![\w.)\]-])-(?=[\d.])", "−", text)


def bounds(values: list[float]) -> tuple[float, float]:
    """Smallest and largest value, moved apart when they are equal."""
    low, high = min(values), max(values)
    if low == high:
        shift = abs(low) * 0.1 or 1.0
        return low - shift, high + shift
    return low, high


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between `low` and `high`: at most `most`, spaced by 1, 2 or 5 times a power of ten."""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10):
        if span / (step * factor) <= most:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def significant(value: float, digits: int = 3) -> str:
    """A positive number with so many significant digits and no trailing zeros: 0.000172, 2.31, 29,400."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(value))
    if not -5 <= exponent <= 6:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - exponent)
    text = f"{round(value, digits - 1 - exponent):,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def factor_ticks(low: float, high: float, most: int) -> list[float]:
    """Logarithms of round factors between two logarithms: powers of ten where they span much, else 1, 2 and 5 times."""
    tens = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    stride = max(1, -(-len(tens) // most))
    steps = (1, 2, 5) if len(tens) <= 3 else (1,)
    values = [ten * math.log(10) + math.log(step) for ten in tens if ten % stride == 0 for step in steps]
    return [value for value in values if low <= value <= high]
