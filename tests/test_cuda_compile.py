"""The CUDA sources compiled for every architecture, without a GPU: registers, spills, shared memory, instructions.

`FLASHPAIR_COMPILE_ALL=1` takes all architectures that nvcc knows, and looks at the instructions of each.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import build_script
import pytest

ROOT = Path(__file__).resolve().parents[1]
ALL = os.environ.get("FLASHPAIR_COMPILE_ALL", "0") not in ("0", "")
#: The oldest, and the one whose instructions are read: each takes a minute or more. 8.9 has the limits of 8.6.
ARCHITECTURES = ("75", "80", "86", "89", "90", "100") if ALL else ("75", "90")
DISASSEMBLED = ARCHITECTURES if ALL else ("90",)
#: Slowest first, so that none is left over at the end.
SOURCES = sorted((ROOT / "csrc").glob("*_cuda.cu"), key=lambda path: -path.stat().st_size)
REGISTERS = 1 << 16  # of a multiprocessor
STATIC_SHARED = 48 << 10  # bytes
#: Bytes of stack that a kernel may have, by its name; none needs any.
STACK: dict[str, int] = {}

pytestmark = pytest.mark.skipif(not SOURCES, reason="there are no CUDA sources")


@dataclass
class Kernel:
    name: str  # demangled, without its arguments
    registers: int
    stack: int  # bytes
    spilled: int  # bytes
    shared: int  # bytes, static
    opcodes: collections.Counter = field(default_factory=collections.Counter)  # such as LDG.E.128

    def __str__(self) -> str:
        sizes = f"{self.registers:3} registers, {self.stack} stack, {self.spilled} spilled, {self.shared:5} shared"
        return f"{sizes}  {self.name}"


def table(kernels: list[Kernel]) -> str:
    return "\n" + "\n".join(map(str, kernels))


def demangled(names: list[str]) -> list[str]:
    """Names without namespaces and arguments: stats_kernel<float, PanelSource<float> >."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return names
    plain = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    found = []
    for name in plain.splitlines():
        name = re.sub(r"flashpair::|\(anonymous namespace\)::|^void ", "", name)
        found.append(name.partition("(")[0])
    return found


def resources(report: str) -> list[Kernel]:
    """What `ptxas -v` says of each kernel."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    found = pattern.findall(report)
    assert len(found) == report.count("Compiling entry function"), report
    kernels = []
    for name, (_, stack, stores, loads, registers, rest) in zip(demangled([f[0] for f in found]), found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(name, int(registers), int(stack), int(stores) + int(loads), int(shared[1]) if shared else 0)
        )
    return kernels


def cuobjdump(nvcc: str) -> str | None:
    """Beside nvcc, or the one that Triton carries."""
    triton = importlib.util.find_spec("triton")
    carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else Path()
    folders = [str(Path(nvcc).resolve().parent), os.environ.get("PATH", ""), str(carried)]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def instructions(tool: str, cubin: Path) -> dict[str, collections.Counter]:
    """How often each kernel of a binary has each instruction."""
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = [part.partition("\n") for part in text.split("Function : ")[1:]]
    opcode = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    names = demangled([name for name, _, _ in parts])
    return {name: collections.Counter(opcode.findall(body)) for name, (_, _, body) in zip(names, parts, strict=True)}


@dataclass
class Compiler:
    nvcc: str
    version: str
    flags: list[str]
    known: set[str]
    folder: Path

    def compile(self, source: Path, architecture: str, *flags: str) -> tuple[Path, str]:
        """The binary and what the compiler said."""
        made = self.folder / f"{source.stem}.{architecture}.cubin"
        command = [self.nvcc, *self.flags, f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin", *flags]
        done = subprocess.run([*command, source, "-o", made], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return made, done.stderr


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> Compiler:
    try:
        found = build_script.load()["CudaCompiler"]()
    except SystemExit as error:
        pytest.skip(str(error).partition("but ")[2])
    return Compiler(found.nvcc, found.version, found.flags, found.known, tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def compiled(compiler) -> dict[str, list[Future]]:
    """All sources for all architectures, as many at a time as there are processors."""
    wanted = sorted(compiler.known, key=int) if ALL else [a for a in ARCHITECTURES if a in compiler.known]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        newest = wanted[-1]
        keep = ("--keep", f"--keep-dir={compiler.folder}")  # PTX
        yield {
            a: [pool.submit(compiler.compile, source, a, *(keep if a == newest else ())) for source in SOURCES]
            for a in wanted
        }
        pool.shutdown(cancel_futures=True)


def kernels_of(compiled: dict[str, list[Future]], architecture: str) -> list[Kernel]:
    return [kernel for future in compiled[architecture] for kernel in resources(future.result()[1])]


@pytest.fixture(scope="module", params=DISASSEMBLED)
def disassembled(request, compiler, compiled) -> list[Kernel]:
    """The kernels of one architecture with their instructions."""
    tool = cuobjdump(compiler.nvcc)
    if tool is None:
        pytest.skip("there is no cuobjdump beside nvcc, on PATH or in Triton's wheel")
    if request.param not in compiled:
        pytest.skip(f"nvcc {compiler.version} does not compile for sm_{request.param}")
    kernels = {kernel.name: kernel for kernel in kernels_of(compiled, request.param)}
    for future in compiled[request.param]:
        for name, found in instructions(tool, future.result()[0]).items():
            kernels[name].opcodes = found
    assert all(kernel.opcodes["EXIT"] for kernel in kernels.values())
    return list(kernels.values())


def threads() -> int:
    """Threads of a block, the same for every kernel."""
    header = (ROOT / "csrc" / "device_cuda.h").read_text()
    lanes, warps = (int(re.search(rf"constexpr int {name} = (\d+);", header)[1]) for name in ("kLanes", "kWarps"))
    return lanes * warps


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_fit(compiled, architecture):
    """No spills, no stack, no warning, registers for a block, static shared memory that every GPU has."""
    if architecture not in compiled:
        pytest.skip(f"nvcc does not compile for sm_{architecture}")
    for future in compiled[architecture]:
        assert "warning" not in future.result()[1], future.result()[1]
    kernels = kernels_of(compiled, architecture)
    for kernel in kernels:
        assert kernel.spilled == 0, table(kernels)
        assert kernel.stack <= STACK.get(kernel.name.partition("<")[0], 0), table(kernels)
        assert kernel.shared <= STATIC_SHARED, table(kernels)
        assert kernel.registers * threads() <= REGISTERS, table(kernels)


def test_other_architectures_fit(compiled):
    """Those of FLASHPAIR_COMPILE_ALL; and all have the same kernels."""
    names = {a: sorted(kernel.name for kernel in kernels_of(compiled, a)) for a in compiled}
    assert len({tuple(found) for found in names.values()}) == 1, names
    for architecture in set(compiled) - set(ARCHITECTURES):
        kernels = kernels_of(compiled, architecture)
        assert all(kernel.spilled == 0 and kernel.stack == 0 for kernel in kernels), table(kernels)


def test_newest_has_ptx_for_later_ones(compiler, compiled):
    newest = list(compiled)[-1]
    for source, future in zip(SOURCES, compiled[newest], strict=True):
        future.result()
        (text,) = (path.read_text() for path in compiler.folder.glob(f"{source.stem}*.ptx"))
        assert re.search(rf"^\.target sm_{newest}$", text, re.MULTILINE)
        assert not re.search(r"^\s*(@!?%p\d+ )?(atom|red)\.", text, re.MULTILINE), source.name


def has_atomics(kernel: Kernel) -> bool:
    return any(re.match(r"(ATOM\w*|RED[AGS]?)(\.|$)", opcode) for opcode in kernel.opcodes)


def has_local_memory(kernel: Kernel) -> bool:
    return any(re.match(r"(LDL|STL)(\.|$)", opcode) for opcode in kernel.opcodes)


def test_kernels_have_no_atomics(disassembled):
    """Deterministic: what meets in one place is added in a fixed order."""
    assert [kernel.name for kernel in disassembled if has_atomics(kernel)] == []


def test_kernels_use_no_local_memory(disassembled):
    assert [kernel.name for kernel in disassembled if has_local_memory(kernel)] == []


def named(kernels: list[Kernel], name: str, *types: str) -> list[Kernel]:
    found = [k for k in kernels if k.name.startswith(f"{name}_kernel") and all(t in k.name for t in types)]
    assert found, f"no {name}_kernel of {types}: {[k.name for k in kernels]}"
    return found


@pytest.mark.parametrize("name", ["stats", "weights", "extremes"])
def test_panels_are_read_16_bytes_at_a_time(disassembled, name):
    for kernel in named(disassembled, name, "PanelSource"):
        assert any(opcode.startswith("LDG.E.128") for opcode in kernel.opcodes), kernel
    for kernel in named(disassembled, name, "EmbeddingSource"):  # copied to shared memory asynchronously
        assert any(re.match(r"LDGSTS\S*\.128", opcode) for opcode in kernel.opcodes), kernel


def test_weights_are_written_four_at_a_time(disassembled):
    for kernel in named(disassembled, "weights"):
        wide = "128" if re.search(r"(float|double) ?>$", kernel.name) else "64"  # of 4 bytes or more; of 2
        assert any(opcode.startswith(f"STG.E.{wide}") for opcode in kernel.opcodes), kernel


@pytest.mark.parametrize("name", ["stats", "weights", "extremes"])
def test_narrow_embeddings_use_tensor_cores(disassembled, name):
    """With float32 accumulators."""
    for kernel in named(disassembled, name, "EmbeddingSource"):
        products = [opcode for opcode in kernel.opcodes if re.match(r"[HQ]?(G|U)?MMA\.", opcode)]
        assert products, kernel
        assert all(".F32" in opcode for opcode in products), products


def test_what_is_forbidden_is_seen(compiler, tmp_path):
    """A kernel with atomics, an array in local memory, spills and a warning."""
    source = tmp_path / "bad.cu"
    source.write_text(
        "template <class T> __global__ void __launch_bounds__(1024, 2) bad_kernel(T* x, int n) {\n"
        "  __shared__ T shared[5000];\n"
        "  T held[64]; int unused;\n"
        "  for (int k = 0; k < 64; ++k) held[k] = x[k * n + threadIdx.x];\n"
        "  shared[threadIdx.x] = held[n]; __syncthreads();\n"
        "  for (int r = 0; r < n; ++r)\n"
        "    for (int k = 0; k < 64; ++k) held[k] = held[k] * held[(k + 1) % 64] + shared[k];\n"
        "  for (int k = 0; k < 64; ++k) atomicAdd(x + k, held[k]);\n"
        "}\n"
        "template __global__ void bad_kernel(float*, int);\n"
    )
    made, report = compiler.compile(source, "90" if "90" in compiler.known else max(compiler.known, key=int))
    assert "warning" in report
    (kernel,) = resources(report)
    assert kernel.stack > 0
    assert kernel.shared == 20000
    tool = cuobjdump(compiler.nvcc)
    if tool:
        (kernel.opcodes,) = instructions(tool, made).values()
        assert has_atomics(kernel)
        assert has_local_memory(kernel)
