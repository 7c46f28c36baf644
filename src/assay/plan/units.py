"""Costs as one reads them."""

from __future__ import annotations

__all__ = ["as_bytes", "as_share", "as_time"]


def as_share(share: float) -> str:
    """A share in per cent.

    Example:
        >>> as_share(0.25), as_share(0.0012)
        ('25 %', '0.12 %')
    """
    return (f"{share:.0%}" if share >= 0.01 else f"{share:.2%}").replace("%", " %")


def as_time(seconds: float) -> str:
    """A time in the largest unit of which there is one.

    Example:
        >>> as_time(5400), as_time(12)
        ('1.5 h', '12 s')
    """
    units = (("years", 365 * 86400.0), ("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))
    return _in_units(seconds, units)


def as_bytes(size: float) -> str:
    """A size in the largest unit of which there is one; a dash for nothing.

    Example:
        >>> as_bytes(2_500_000), as_bytes(0)
        ('2.5 MB', '–')
    """
    units = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
    return _in_units(size, units) if size else "–"


def _in_units(number: float, units: tuple[tuple[str, float], ...]) -> str:
    unit, one = next(((u, s) for u, s in units if number >= s), units[-1])
    return f"{number / one:.3g} {unit}" if number / one < 1000 else f"{number / one:,.0f} {unit}"
