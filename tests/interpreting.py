"""Triton's interpreter, in a process that does nothing else."""

from __future__ import annotations

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Leave out what the interpreter does again and again without effect.

    It replaces every function of the language at each call of a device function and puts it back after; here they are
    replaced once for good. It computes whether a sum or product of integers overflows, but asserts that only in debug
    mode.
    """
    patch, done = interpreter._patch_lang, set()

    def patched(function):
        modules = frozenset(m.__name__ for m in (tl, tl.core) if any(m is v for v in function.__globals__.values()))
        if modules not in done:
            patch(function)
            done.add(modules)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patched
    assert not interpreter.interpreter_builder.options.debug
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
