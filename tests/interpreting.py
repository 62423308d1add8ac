"""Triton's interpreter, in a process that does nothing else."""

from __future__ import annotations

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """The interpreter replaces every function of the language, and puts it back, at each call of a device function.

    That is half of its time; here they are replaced once for good.
    """
    patch, done = interpreter._patch_lang, set()

    def patched(function):
        modules = frozenset(m.__name__ for m in (tl, tl.core) if any(m is v for v in function.__globals__.values()))
        if modules not in done:
            patch(function)
            done.add(modules)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patched


def trust_integers() -> None:
    """Without a check of every sum and product of integers for overflow, half of the time that is left."""
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
