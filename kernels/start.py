"""Starting a kernel again. Triton examines every argument at every launch, which takes the host longer than a kernel of
a small batch takes the device; here a launch like an earlier one goes to the kernel that was compiled for that."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from ..recording import note

#: Launches that are known; more are forgotten together. Batches whose lengths vary add one for each length.
_MOST = 1 << 12
known: dict[tuple, tuple[CompiledKernel, tuple]] = {}
_dtype = operator.attrgetter("dtype")


@functools.cache
def _parts(function: Callable, count: int) -> tuple[list[int], list[int]]:
    """Which of the first `count` arguments of a kernel are tensors, which are named `..._ptr`, and which are not."""
    pointers = [name.endswith("_ptr") for name in function.__code__.co_varnames[:count]]
    return [n for n, is_one in enumerate(pointers) if is_one], [n for n, is_one in enumerate(pointers) if not is_one]


def start(kernel, programs: int, args: tuple, constants: dict) -> None:
    """`kernel[(programs,)](*args, **constants)`; tensors are named `..._ptr`, others are numbers and tuples of floats.

    What Triton may compile apart is part of the signature: dtypes, alignment, each number, each constant. Its switches
    that change what is compiled are read when a launch is new.
    """
    with torch._C.DisableTorchFunction():  # a recording takes down the launch, not what happens inside
        run, values = _started(kernel, programs, args, constants)
    note(run, values)


def _started(kernel, programs: int, args: tuple, constants: dict) -> tuple[Callable, tuple]:
    """Start a kernel; what starts it again, and with which arguments."""
    if not isinstance(kernel, JITFunction) or torch.version.hip is not None:  # interpreted, or of other rules
        run = functools.partial(kernel[(programs,)], **constants)
        run(*args)
        return run, args
    pointers, others = _parts(kernel.fn, len(args))
    tensors = [args[n] for n in pointers]
    signature = (
        kernel.fn,
        tensors[0].get_device(),
        *map(_dtype, tensors),
        *[tensor.data_ptr() % 16 for tensor in tensors],
        *[len(args[n]) if type(args[n]) is tuple else args[n] for n in others],
        *constants.items(),
    )
    found = known.get(signature)
    if found is not None:
        run, values = found[0][(programs, 1, 1)], (*args, *found[1])
        run(*values)
        return run, values
    compiled = kernel[(programs,)](*args, **constants)
    if len(known) >= _MOST:
        known.clear()
    known[signature] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
    return compiled[(programs, 1, 1)], (*args, *known[signature][1])
