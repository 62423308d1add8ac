"""A driver for Triton that starts nothing, and a compiler that compiles nothing: what a step costs the host, without a
GPU; and a count of PyTorch's operators.

Kernels are looked up and called with their arguments as on a GPU of the architecture; results hold anything. What
mining finds is nothing, so that no index is out of range.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Kernel(CompiledKernel):
    """A kernel that was not compiled."""

    def __init__(self, source: ASTSource, of: Driver) -> None:
        self.src, self.name = source, source.fn.__name__
        self.module = self.function = 0
        self.packed_metadata = ()
        _ = source.fn.cache_key  # finds the globals that the kernel reads, which Triton compares at every launch
        names = source.fn.arg_names
        found = [(names.index(n), missing) for n, missing in (("values_ptr", -torch.inf), ("indices_ptr", -1))
                 if "indices_ptr" in names]  # fmt: skip

        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
            of.started(self, x, arguments)
            for at, missing in found:
                arguments[at].fill_(missing)

        self._run = run


class Driver(DriverBase):
    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def started(self, kernel: Kernel, programs: int, arguments: tuple) -> None:
        """Called for every launch."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        return triton.testing.do_bench

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


#: Operators that make a view or take memory: nothing runs on a device.
NO_WORK = (
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "select", "slice", "split",
    "split_with_sizes", "t", "transpose", "unbind", "unsqueeze", "view",
)  # fmt: skip


class Operators(TorchDispatchMode):
    """The names of PyTorch's operators inside the block that would start something on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_WORK and func.namespace != "flashpair":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _small_product(out, w, operand, transposed: bool, fresh: bool) -> None:
    """In the place of a product, whose dtypes a CPU has no operator for: one that the host starts in the same time."""
    torch.mm(operand[:1, :1], operand[:1, :1])


@contextlib.contextmanager
def standing_in(architecture: int = 90, kind: type[Driver] = Driver) -> Iterator[Driver]:
    """Backend triton on CPU tensors, without its kernels and with small products of the gradients."""
    from flashpair.kernels import configs, launch, start

    from flashpair import backend_cpu, backend_triton, recording, use_backend

    active, stand_in = driver._active, kind(architecture)
    kernels = [f for f in vars(launch).values() if isinstance(f, JITFunction)]

    def forget() -> None:  # what was found for one driver is not for the other
        start.known.clear()
        recording.forget()
        for kernel in kernels:
            kernel.device_caches.clear()

    driver.set_active(stand_in)
    forget()
    try:
        with (
            patch("triton.compiler.compile", lambda source, target, options: Kernel(source, stand_in)),
            patch.multiple(backend_triton, unavailable=list, why_not=lambda x: []),
            patch.object(configs, "architecture", lambda device: architecture),
            patch.object(launch, "accumulate", _small_product),
            patch.object(backend_cpu, "unavailable", lambda: ["these tensors stand for those of a GPU"]),
            use_backend("triton"),
        ):
            yield stand_in
    finally:
        driver._active = active
        forget()
