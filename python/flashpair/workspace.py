"""The one memory knob."""

from __future__ import annotations

import os

MINIMUM_BYTES = 1 << 20  # one tile row of every backend fits

_default = int(os.environ.get("FLASHPAIR_MAX_WORKSPACE_BYTES", 256 << 20))


def set_max_workspace_bytes(value: int) -> int:
    """Set the default bound on scratch memory (bytes, at least 1 MiB); returns the previous one.

    Beyond the embeddings, their gradients and O(B + N) statistics a call uses at most this much. On a CPU it decides
    whether S is kept between the passes (faster), on a GPU how large the panels are. Default: 256 MiB, or the
    environment variable `FLASHPAIR_MAX_WORKSPACE_BYTES`.

    Raises:
        ValueError: below the minimum.

    Example:
        >>> import flashpair
        >>> previous = flashpair.set_max_workspace_bytes(64 << 20)
        >>> flashpair.set_max_workspace_bytes(previous)
        67108864
    """
    global _default
    previous, _default = _default, workspace_bytes(value)
    return previous


def release_workspace() -> int:
    """Give the kept scratch memory back to the system; returns its size in bytes.

    On a CPU the similarity matrix of the last call stays in memory where it fits the workspace, for the pass or the
    training step that follows (fresh pages cost as much as the arithmetic that they save), and so do up to 64 MiB of
    other scratch memory.

    Example:
        >>> import flashpair
        >>> flashpair.release_workspace() >= 0
        True
    """
    from . import backend_cpu

    return backend_cpu.release_workspace()


def workspace_bytes(value: int | None) -> int:
    """`value` checked, or the default."""
    if value is None:
        return _default
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"max_workspace_bytes must be an integer; got {type(value).__name__}")
    if value < MINIMUM_BYTES:
        raise ValueError(f"max_workspace_bytes must be at least {MINIMUM_BYTES}, one tile row; got {value}")
    return value
