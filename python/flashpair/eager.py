"""Python that torch.compile runs as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def eagerly(function: Callable) -> Callable:
    """`torch.compiler.disable` on first use in a graph: its import of torch._dynamo would cost every user a second."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
