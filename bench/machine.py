"""Where a measurement was made: pinned environment, device, versions, commit, source hash; and peak memory."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MEASURED = ("csrc", "kernels", "python/flashpair")
#: Of these what only GPUs run, besides `kernels` and `csrc/*_cuda*`.
GPU_ONLY = tuple(
    f"python/flashpair/{name}.py"
    for name in ("backend_cuda", "backend_triton", "backward", "extremes", "forward", "operands", "program_cuda",
                 "recording", "rowwise")
)  # fmt: skip

#: Threads stay where they are: two of them on one core would be measured as a slow implementation.
PINNED = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
#: `warm` keeps freed buffers: half of dense PyTorch's time is page faults on fresh B×B buffers with plain glibc.
ALLOCATORS = {
    "default": {},
    "warm": {
        "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"
        ":glibc.malloc.top_pad=268435456"
    },
}


def environment(allocator: str, threads: int) -> dict[str, str]:
    """Environment of a measuring process; these variables are read before torch is imported."""
    inherited = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    return {**inherited, **PINNED, **ALLOCATORS[allocator], "OMP_NUM_THREADS": str(threads)}


def _matters(path: Path, device: str) -> bool:
    """Whether a measurement on a device depends on a source."""
    if device != "cpu":
        return True
    return path.parts[0] != "kernels" and "_cuda" not in path.stem and path.as_posix() not in GPU_ONLY


@functools.cache
def source_hash(device: str) -> str:
    """Twelve digits over every source that a measurement on "cpu" or "cuda" depends on, as it is when first asked."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*")):
            place = path.relative_to(ROOT)
            if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"} and _matters(place, device):
                digest.update(str(place).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def is_stale(row: dict) -> bool:
    """Whether the sources of a row have changed since. Rows of a GPU and predictions for one are of all sources."""
    on_gpu = "driver" in row or "floor_ms" in row
    return row["sources"] != source_hash("cuda" if on_gpu else "cpu")


def tuned_hash() -> str:
    """Twelve digits over the measured tiles in use (docs/triton.md); "-" without any."""
    own = os.environ.get("FLASHPAIR_TUNED")
    files = [path for path in (ROOT / "kernels" / "tuned.json", *([Path(own)] if own else [])) if path.exists()]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:12] if files else "-"


def _output(*command: str) -> str:
    """What a program prints; empty where it fails or there is none."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return ""


def commit() -> str:
    found = _output("git", "rev-parse", "--short", "HEAD")
    return (found + ("+changes" if _output("git", "status", "--porcelain", *MEASURED) else "")) or "unknown"


def gpu_slug() -> str:
    """Name of the current GPU as a file name."""
    import torch
    from gpu import slug

    return slug(torch.cuda.get_device_name())


@functools.cache
def gpu_software() -> dict[str, str]:
    """Driver, CUDA of torch, compiler, measured tiles: what the speed of a GPU depends on besides our sources."""
    import torch

    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    compiler = re.search(r"release ([\d.]+)", _output("nvcc", "--version"))
    return {
        "driver": driver[0].strip() if driver else "unknown",
        "cuda": torch.version.cuda or "-",
        "nvcc": compiler[1] if compiler else "-",
        "tuned": tuned_hash(),
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    flags = fields.get("flags", "").split()
    widest = next((isa for isa in ("avx512f", "avx2") if isa in flags), "")
    name = fields.get("model name", platform.processor() or platform.machine())
    return f"{name} ({widest})" if widest else name


def bfloat16_instructions() -> str:
    """What the processor multiplies bfloat16 with; "-" where it has nothing of its own."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return next((isa for isa in ("amx_bf16", "avx512_bf16", "avx_ne_convert") if isa in flags), "-")


@functools.cache
def fma_peak(threads: int) -> float | None:
    """GFLOP/s of float32 multiply-adds in registers on this many threads; None where nothing compiles `peak.cpp`."""
    program = ROOT / "out" / "peak"
    program.parent.mkdir(exist_ok=True)
    source = str(ROOT / "bench" / "peak.cpp")
    flags = ("-O2", "-march=native", "-ffp-contract=fast", "-pthread")
    _output(os.environ.get("CXX", "c++"), *flags, source, "-o", str(program))
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        if before is not None:  # OpenMP has bound this thread to one core, and a child inherits that
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        printed = _output(str(program), str(threads))
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)
    return float(printed) if printed else None


def describe(device: str = "cpu") -> dict[str, str]:
    """Provenance of one row of results."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import flashpair

    usable = [name for name, state in flashpair.backends().items() if state == "usable"]

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "-"

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
        "backend": usable[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "pytorch-metric-learning": installed("pytorch-metric-learning"),
        **(gpu_software() if device == "cuda" else {"bfloat16": bfloat16_instructions()}),
        "commit": commit(),
        "sources": source_hash(device),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


class PeakMemory:
    """Growth of this process's highest resident memory since `start`, in bytes.

    VmHWM is reset at the start where the kernel allows it; ru_maxrss alone would begin at the peak of the imports.
    """

    _status = Path("/proc/self/status")

    def start(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self._field("VmRSS") or self._peak()

    def growth(self) -> int:
        return max(0, self._peak() - self.before)

    def _field(self, name: str) -> int:
        if not self._status.exists():
            return 0
        lines = self._status.read_text().splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), 0)

    def _peak(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self._field("VmHWM") or (peak if sys.platform == "darwin" else peak << 10)


def with_block(page: Path, begin: str, end: str, lines: list[str]) -> str:
    """The text of a page with other lines between two markers.

    Raises:
        SystemExit: where a marker does not stand there once.
    """
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{page.name} must hold each marker once: {begin} and {end}")
    head, rest = text.split(begin)
    return head + "\n".join([begin, "", *lines]) + "\n" + end + rest.split(end)[1]
