"""Builds the CUDA backend for the host: the same sources, with the device of `cpp/emulator.h`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
#: Why the kernels cannot be emulated here, or an empty string.
OBSTACLE = (
    "no C++ compiler was found"
    if COMPILER is None
    else "the emulator switches stacks on x86-64 Linux only"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64")
    else ""
)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def build(folder: Path, flags: tuple[str, ...] = ("-O2",)) -> Path:
    """The emulated extension, compiled into `folder`."""
    common = [COMPILER, "-std=c++20", *flags, "-fPIC", "-DFP_EMULATED", f"-I{ROOT / 'tests/cpp'}"]
    common += ["-Wall", "-Wextra", "-Werror"]
    binding = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    binding += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    files = [*sorted((ROOT / "csrc").glob("*_cuda.cu")), ROOT / "csrc/bind_cuda.cpp"]

    def compile_one(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        kind = ["-x", "c++"] if source.suffix == ".cu" else binding
        subprocess.run([*common, *kind, "-c", str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, files))
    library = folder / "flashpair_emulated.so"
    torch_folder = Path(torch.__file__).parent / "lib"
    link = [COMPILER, "-shared", *flags, "-o", str(library), *objects, f"-L{torch_folder}"]
    subprocess.run([*link, "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    return library
