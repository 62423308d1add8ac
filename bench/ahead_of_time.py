"""Triton's kernels compiled without a GPU: what a call would launch, and what the compiler makes of it.

The launchers run on CPU tensors with recorders in place of the kernels, so what is compiled is what a user's call
really launches. Needs Triton; a GPU is not asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashpair import Precision

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip
KERNELS = (
    "_stats_kernel", "_weights_kernel", "_extremes_kernel", "_top_k_kernel", "_fold_kernel", "_visited_kernel",
    "_visited_product_kernel", "_norms_kernel", "_gradient_kernel", "_best_kernel", "_decode_kernel",
    "_mean_gap_kernel", "_anchors_kernel", "_pairs_kernel",
)  # fmt: skip


@dataclasses.dataclass
class Launch:
    kernel: object
    grid: tuple[int, ...]
    arguments: dict  # every argument of the kernel by its name
    options: dict  # of the compiler: num_warps, num_stages, ...

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def has_product(self) -> bool:
        return "INPUT_PRECISION" in self.arguments

    @property
    def of_pairs(self) -> bool:
        """A product that makes similarities."""
        return self.has_product and "PROGRAM" in self.arguments

    def tile(self) -> str:
        if not self.of_pairs:
            return ""
        block_b, block_n, block_d, parts = (self.arguments[n] for n in ("BLOCK_B", "BLOCK_N", "BLOCK_D", "PARTS"))
        warps, stages = self.options["num_warps"], self.options["num_stages"]
        return f"{block_b}x{block_n}x{block_d} in {parts}, {warps} warps, {stages} stages"

    def start(self) -> None:
        """Once more, on the same arguments."""
        self.kernel[self.grid](**self.arguments, **self.options)

    def source(self) -> ASTSource:
        """The specialisation that Triton makes of these arguments."""
        signature, constants, attributes = {}, {}, {}
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            specialised = not parameter.is_constexpr and not parameter.do_not_specialize
            if parameter.is_constexpr or (specialised and isinstance(value, int) and value == 1):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            signature[parameter.name] = _type(value)
            divisible = isinstance(value, torch.Tensor) and value.data_ptr() % 16 == 0
            divisible &= not parameter.do_not_specialize_on_alignment
            divisible |= specialised and isinstance(value, int) and value % 16 == 0
            if divisible:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


def _type(value):
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(v) for v in value)
    if isinstance(value, int):
        return "i32" if value < 1 << 31 else "i64"
    return "fp32"


class Recorder:
    """Stands for a kernel and writes down its launches."""

    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        def start(*args, **constants):
            options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in constants}
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            assert sorted(arguments) == sorted(self.kernel.arg_names)
            if "indices_ptr" in arguments:  # what mining finds in nothing
                arguments["indices_ptr"].fill_(-1)
                arguments["values_ptr"].fill_(-torch.inf)
            self.launches.append(Launch(self.kernel, grid, arguments, options))

        return start


class Starter(Recorder):
    """Writes launches down before they start."""

    def __getitem__(self, grid: tuple[int, ...]):
        write_down = super().__getitem__(grid)

        def start(*args, **constants):
            write_down(*args, **constants)
            self.launches[-1].start()

        return start


@contextlib.contextmanager
def recording(starts: bool = False) -> Iterator[list[Launch]]:
    """The launches inside the block, instead of their work; `starts`: beside it."""
    from flashpair.kernels import launch as launchers

    from flashpair.recording import deciding_anew

    launches: list[Launch] = []
    kind = Starter if starts else Recorder
    stand_ins = {name: kind(getattr(launchers, name), launches) for name in KERNELS}
    with deciding_anew(), patch.multiple(launchers, **stand_ins):
        yield launches


def record(function: Callable[[], object], architecture: int = 90, precision: Precision | None = None) -> list[Launch]:
    """Launches of a call of flashpair on CPU tensors, as on a GPU of this architecture, in this precision if given."""
    from flashpair.kernels import configs

    from flashpair import backend_triton, ops, use_backend
    from flashpair.request import PRECISION

    decode = ops.decode

    def decoded(*args):
        request = decode(*args)
        spec = list(request.spec)
        spec[PRECISION] = int(precision)
        return dataclasses.replace(request, spec=spec)

    with (
        patch.object(ops, "decode", decode if precision is None else decoded),
        recording() as launches,
        patch.multiple(backend_triton, unavailable=list, why_not=lambda x: []),
        patch.object(configs, "architecture", lambda device: architecture),
        use_backend("triton"),
    ):
        function()
    return launches


def record_products(function: Callable[[], object], architecture: int = 90) -> tuple[list[Launch], int]:
    """The same, and the FLOP of the gradient's products, which the launchers leave to the vendor's library."""
    from flashpair.kernels import launch as launchers

    from flashpair.backward import accumulate

    flop = 0

    def counted(plan, w: torch.Tensor, first_b: int, first_n: int, mirror: bool, multiply) -> None:
        nonlocal flop
        if multiply is accumulate:
            products = (plan.dx is not None) * (1 + mirror) + (plan.dy is not None)
            flop += products * 2 * w.numel() * plan.x.shape[1]
        else:
            add_panel(plan, w, first_b, first_n, mirror, multiply)

    add_panel = launchers.add_panel
    with patch.object(launchers, "add_panel", counted):
        return record(function, architecture), flop


@dataclasses.dataclass
class Compiled:
    ptx: str
    shared: int  # bytes
    registers: int
    spilled: int  # bytes of stack and local memory
    cubin: bytes


seen: dict[tuple, Compiled] = {}


def compiled(launched: Launch, architecture: int) -> Compiled:
    source = launched.source()
    key = (source.hash(), tuple(launched.options.items()), architecture)
    if key not in seen:
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launched.options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [BINARIES / "cuobjdump", "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        spilled, cubin = found["STACK"] + found["LOCAL"], binary.asm["cubin"]
        seen[key] = Compiled(binary.asm["ptx"], binary.metadata.shared, found["REG"], spilled, cubin)
    return seen[key]


#: Shared memory that one program may have, bytes.
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


def objection(launches: list[Launch], architecture: int) -> str:
    """What is against these launches on an architecture: they do not compile, spill, or need too much shared memory."""
    for launched in launches:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # where the assembler fails, Triton prints all it was given
                found = compiled(launched, architecture)
        except Exception as error:  # of any stage of the compiler
            lines = str(error).strip().splitlines() or [type(error).__name__]
            told = next((line for line in lines if line.startswith("ptxas fatal")), lines[0])
            return f"{launched.name} does not compile: {told[:160]}"
        if found.spilled:
            return f"{launched.name} spills {found.spilled} bytes"
        if found.shared > SHARED_MEMORY[architecture]:
            most = SHARED_MEMORY[architecture] >> 10
            return f"{launched.name} needs {found.shared >> 10} KiB of shared memory, {most} are there"
    return ""
