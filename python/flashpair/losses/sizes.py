"""Checks of whole-number arguments."""

from __future__ import annotations


def check_count(name: str, value: int, low: int = 1) -> None:
    """An integer of at least `low`.

    Raises:
        ValueError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}; got {value!r}")
