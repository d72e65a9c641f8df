"""Numbers in sentences."""

from __future__ import annotations

__all__ = ["counted", "describe_seconds"]


def counted(number: float, thing: str) -> str:
    """A number of things: "1 query image", "600 tasks".

    Args:
        number: how many.
        thing: one of them, a noun whose plural ends in s.

    Returns:
        Both.
    """
    return f"{number:g} {thing}" if number == 1 else f"{number:.10g} {thing}s"


def describe_seconds(seconds: float) -> str:
    """A duration for people: "45 s", "12 min", "3 h 05 min".

    Args:
        seconds: not negative.

    Returns:
        The duration, rounded.
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
