"""One table of backends, in order of preference; the first with nothing against a request serves it."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

#: The reference backend stores S; it is chosen by itself only up to this many pairs.
REFERENCE_PAIRS = 1 << 20

_forced: ContextVar[str | None] = ContextVar("flashpair_backend", default=None)

# torch.compile cannot trace a ContextVar, but it guards a global: compiled code recompiles when this one changes.
_entered: list[list[str]] = []  # every `use_backend` block now open, in any thread
_forced_for_compile: str | None = None  # the one entered last
_lock = threading.Lock()


class BackendError(RuntimeError):
    """No backend can serve a request, or the forced one cannot; the message says why."""


_loaded = functools.cache(import_module)


@dataclass(frozen=True)
class Backend:
    """A row of the table: a name and the module behind it, which offers what `ops.py` lists and says when it cannot."""

    name: str
    module: str
    serves: str

    def load(self):
        return _loaded(self.module)

    def why_not(self, x: Tensor | None = None, pairs: int | None = None) -> list[str]:
        """Reasons against running on embeddings like `x`; without `x`, against running at all."""
        if self.name == "reference":
            if x is not None and forced_name() != "reference" and (pairs or 0) > REFERENCE_PAIRS:
                return [
                    f"stores the {pairs}-entry similarity matrix and is chosen by itself only up to "
                    f"{REFERENCE_PAIRS} entries; force it with use_backend('reference')"
                ]
            return []
        return _module_why_not(self.name, x)


TABLE: tuple[Backend, ...] = (
    Backend("triton", "flashpair.backend_triton", "NVIDIA GPUs; CPU tensors under Triton's interpreter"),
    Backend("cuda", "flashpair.backend_cuda", "NVIDIA GPUs without Triton; C++/CUDA"),
    Backend("cpu", "flashpair.backend_cpu", "CPU tensors; C++"),
    Backend("reference", "flashpair.reference", "dense PyTorch, the specification"),
)
NAMES = tuple(b.name for b in TABLE)


def named(name: str) -> Backend:
    for backend in TABLE:
        if backend.name == name:
            return backend
    raise ValueError(f"backend must be one of {', '.join(NAMES)}; got {name!r}")


def _constant(function):
    """`torch.compiler.assume_constant_result`, whose own import of torch._dynamo would cost every user a second."""
    function._dynamo_marked_constant = True
    return function


@_constant
def _module_why_not(name: str, x: Tensor | None) -> list[str]:
    """Reasons of a backend's module; they depend on x through its dtype and device only, which compiled code guards."""
    module = named(name).load()
    reasons = module.unavailable()
    return reasons or ([] if x is None else module.why_not(x))


@_constant
def _environment() -> str | None:
    return os.environ.get("FLASHPAIR_BACKEND") or None


def forced_name() -> str | None:
    forced = _forced_for_compile if torch.compiler.is_compiling() else _forced.get()
    return forced or _environment()


def _announce(entry: list[str], entered: bool) -> None:
    """Keep `_forced_for_compile` right however blocks of several threads interleave."""
    global _forced_for_compile
    with _lock:
        if entered:
            _entered.append(entry)
        else:
            _entered[:] = [e for e in _entered if e is not entry]
        _forced_for_compile = _entered[-1][0] if _entered else None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a `with` block; the environment variable `FLASHPAIR_BACKEND` does the same globally.

    Blocks belong to their thread. Only a compiled function takes the block entered last in any thread, and recompiles
    when that changes.

    Args:
        name: "triton", "cuda", "cpu" or "reference".

    Raises:
        ValueError: on an unknown name.
        BackendError: later, when a call inside the block cannot be served, with the reasons.

    Example:
        >>> import torch, flashpair
        >>> x = torch.randn(8, 4)
        >>> with flashpair.use_backend("reference"):
        ...     (lse,) = flashpair.pair_reduce(x, terms=[flashpair.Term(flashpair.Reduction.LOGSUMEXP)])
        >>> lse.shape
        torch.Size([8])
    """
    entry = [named(name).name]
    token = _forced.set(entry[0])
    _announce(entry, entered=True)
    try:
        yield
    finally:
        _announce(entry, entered=False)
        _forced.reset(token)


def choose(x: Tensor, pairs: int) -> str:
    """Name of the backend that serves embeddings like `x` with this many pairs."""
    forced = forced_name()
    if forced is not None:
        backend = named(forced)
        reasons = backend.why_not(x, pairs)
        if reasons:
            raise BackendError(f"backend {backend.name!r} was forced but cannot serve this call: " + "; ".join(reasons))
        return backend.name
    against = {}
    for backend in TABLE:
        reasons = backend.why_not(x, pairs)
        if not reasons:
            return backend.name
        against[backend.name] = reasons
    raise BackendError(
        f"no backend can serve {x.dtype} embeddings on {x.device}:\n"
        + "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in against.items())
    )


def backends() -> dict[str, str]:
    """Each backend with "usable" or the reasons why it is not, in order of preference.

    Example:
        >>> import flashpair
        >>> flashpair.backends()["reference"]
        'usable'
    """
    return {b.name: "; ".join(b.why_not()) or "usable" for b in TABLE}
