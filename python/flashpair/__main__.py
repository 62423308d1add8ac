"""`python -m flashpair`: what is installed and usable here, as plain aligned text."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import flashpair
from flashpair import workspace


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    """The C++ compiler that an installation would use, with its version."""
    names = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        return "none found (set CXX or install g++ to build the native part)"
    answer = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return f"{found} ({answer[0]})" if answer else found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{_processor()}, {os.cpu_count()} logical cores")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            rows.append(
                (f"cuda:{i}", f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.1f} GiB")
            )
    else:
        rows.append(("cuda", "no usable device"))
    return rows


def _native() -> list[tuple[str, str]]:
    folder = Path(flashpair.__file__).parent
    built = sorted(path.name for pattern in ("_C*.so", "_C*.pyd", "_C*.dylib") for path in folder.glob(pattern))
    rows = [("operators", ", ".join(built) or "not built; install again where torch and a C++ compiler are found")]
    try:
        info = importlib.import_module("flashpair._build_info").info()
    except ImportError as error:
        return [*rows, ("build info", f"not available ({error})")]
    return [
        *rows,
        ("compiled with", f"{info['compiler']}, C++ {info['cxx_standard']}, {info['architecture']}"),
        ("against", f"torch {info['torch_built_with']}, stable ABI of {info['torch_needed']} and later"),
        ("CUDA part", _cuda(info)),
        ("vectors here", f"{info['vector_bits']} bit ({', '.join(info['vector_isas'])})"),
    ]


def _cuda(info: dict) -> str:
    if not info["cuda"]:
        return "not built (FLASHPAIR_BUILD_CUDA=1 builds it where nvcc is found)"
    return f"CUDA {info['cuda_version']} for compute capability {', '.join(info['cuda_architectures'])}"


def report() -> str:
    """The whole report as text.

    Example:
        >>> from flashpair.__main__ import report
        >>> report().splitlines()[0].split()[0]
        'flashpair'
    """
    forced = os.environ.get("FLASHPAIR_BACKEND")
    sections = {
        f"flashpair {flashpair.__version__}": [("package", str(Path(flashpair.__file__).parent))],
        "versions": [
            ("python", f"{platform.python_version()} on {platform.platform()}"),
            ("torch", torch.__version__),
            ("triton", _version("triton")),
            ("numpy", _version("numpy")),
            ("CUDA of torch", torch.version.cuda or "none (CPU build)"),
            ("C++ compiler", _compiler()),
        ],
        "devices": _devices(),
        "backends": list(flashpair.backends().items())
        + ([("forced", f"{forced} by FLASHPAIR_BACKEND")] if forced else []),
        "native part": _native(),
        "settings": [
            ("workspace", f"{workspace.workspace_bytes(None) / 2**20:g} MiB (FLASHPAIR_MAX_WORKSPACE_BYTES)"),
            ("tuned tiles", os.environ.get("FLASHPAIR_TUNED") or "those of the package, if any (FLASHPAIR_TUNED)"),
            ("threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS, torch.set_num_threads)"),
        ],
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {name:<{width}}  {text}" for name, text in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
