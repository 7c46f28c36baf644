"""How numbers are written on the page: one power of ten per table, a true minus sign, no false digits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MISSING = "–"


def is_number(value: object) -> bool:
    """Whether `value` is a finite number (None, NaN, infinities and text are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Scale:
    """One power of ten and one number of decimals for values that are read side by side.

    Example:
        >>> scale = Scale.of([0.0123, -0.0045])
        >>> scale.unit, scale.signed(0.0123), scale.signed(-0.0045)
        ('10⁻³ loss units', '+12.30', '−4.50')
    """

    exponent: int
    decimals: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Scale:
        """Choose the scale by the largest magnitude: four significant digits for it, fewer for the rest."""
        largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
        if largest == 0.0:
            return cls(0, 0)
        magnitude = math.floor(math.log10(largest))
        exponent = 0 if -1 <= magnitude <= 3 else 3 * (magnitude // 3)
        return cls(exponent, min(3, max(0, 3 - (magnitude - exponent))))

    @property
    def factor(self) -> float:
        """Multiply a value by this to have it on the scale."""
        return float(10.0**-self.exponent)

    @property
    def unit(self) -> str:
        """Name of the scaled unit, for a column header or an axis."""
        power = f"10{str(self.exponent).translate(_SUPERSCRIPTS)} " if self.exponent else ""
        return f"{power}loss units"

    def signed(self, value: float | None) -> str:
        """Write a value on the scale, always with its sign."""
        if value is None or not math.isfinite(value):
            return MISSING
        text = f"{value * self.factor:+,.{self.decimals}f}"
        if not any(digit in text for digit in "123456789"):  # rounds to zero: no sign to claim
            text = text[1:]
        return text.replace("-", "−")


def percent(share: float | None) -> str:
    """Write a share as per cent.

    Example:
        >>> percent(0.1234), percent(-0.02), percent(-1e-6), percent(12.5), percent(None)
        ('12.3 %', '−2.0 %', '0.0 %', '1,250 %', '–')
    """
    if share is None or not math.isfinite(share):
        return MISSING
    text = f"{100 * share:,.{1 if abs(share) < 0.9995 else 0}f} %"
    return text.removeprefix("-") if text == "-0.0 %" else text.replace("-", "−")


def span(shares: Iterable[float | None]) -> str:
    """Write several shares as the range that they cover.

    Example:
        >>> span([0.1, 0.25, 0.2]), span([0.1]), span([])
        ('10.0–25.0 %', '10.0 %', '–')
    """
    known = sorted(share for share in shares if share is not None and math.isfinite(share))
    if not known:
        return MISSING
    low, high = percent(known[0]), percent(known[-1])
    return low if low == high else f"{low.removesuffix(' %')}–{high}"


def plain(value: object) -> str:
    """Write any value of a configuration, a summary or a side table.

    Example:
        >>> plain(1234567), plain(0.000123456), plain(True), plain(None), plain([1, "a"])
        ('1,234,567', '0.0001235', 'yes', '–', '1, a')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        text = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return text.replace("-", "−")
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    return str(value)


def named(value: object) -> str:
    """Write a value that names something: a year, a seed or an id is a whole number without separators.

    Example:
        >>> named(2019), named("law"), named(0.5)
        ('2019', 'law', '0.5')
    """
    return str(value) if type(value) is int else plain(value)


def flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Turn nested settings into rows of (dotted name, value).

    Example:
        >>> flat({"model": {"layers": 2}, "methods": [{"path": "left"}]})
        [('model.layers', 2), ('methods.0.path', 'left')]
    """
    rows: list[tuple[str, object]] = []
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            rows.extend(flat(value, f"{name}."))
        else:
            rows.append((name, value))
    return rows
