"""How numbers read to people: counts, sizes, times and accuracies, the same in every table."""

from __future__ import annotations

import math

__all__ = [
    "accuracy_error",
    "format_accuracy",
    "format_bytes",
    "format_count",
    "format_milliseconds",
]

_COUNT_UNITS = ("", " k", " M", " G", " T")
_BYTE_UNITS = (" B", " kB", " MB", " GB", " TB")


def format_count(value: float) -> str:
    """Formats a number of things with a decimal prefix: ``853018`` becomes ``'853 k'``."""
    return _scaled(value, _COUNT_UNITS)


def format_bytes(value: float) -> str:
    """Formats a size in bytes with a decimal prefix: ``3448512`` becomes ``'3.45 MB'``."""
    return _scaled(value, _BYTE_UNITS)


def format_milliseconds(value: float) -> str:
    """Formats a time given in milliseconds to three digits: ``'3.14 ms'``."""
    return f"{_three_digits(value)} ms"


def format_accuracy(accuracy: float, error: float | None = None) -> str:
    """Formats an accuracy given as a fraction, with its standard error: ``'92.7 ± 0.8 %'``."""
    if error is None:
        return f"{accuracy * 100:.1f} %"
    return f"{accuracy * 100:.1f} ± {error * 100:.1f} %"


def accuracy_error(accuracy: float, n: int) -> float:
    """Standard error of an accuracy that was measured on ``n`` samples; both fractions."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Formats to three significant digits with the largest unit that keeps the number >= 1."""
    for unit in units[:-1]:
        # 999.5 would round to "1000"; it reads better as 1.00 of the next unit.
        if abs(value) < 999.5:
            whole = unit == units[0] and float(value).is_integer()
            return f"{value:.0f}{unit}" if whole else f"{_three_digits(value)}{unit}"
        value /= 1000
    return f"{_three_digits(value)}{units[-1]}"


def _three_digits(value: float) -> str:
    """Formats to three significant digits without an exponent."""
    size = abs(value)
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{value:.{decimals}f}"
