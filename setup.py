"""Builds the native part where torch and a compiler are at hand; everything else stands in pyproject.toml.

Read from the environment:
    FLASHPAIR_BUILD_NATIVE  1: failing to build is an error; 0: do not build; unset: build if possible
    FLASHPAIR_BUILD_CUDA    1: build the CUDA C++ sources (there are none in this version, so it is an error)
    MAX_JOBS                parallel compilations (ninja, through torch.utils.cpp_extension)
    CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST   as torch.utils.cpp_extension reads them
"""

import importlib.util
import os
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
#: Oldest torch whose stable ABI the binary asks for: one build serves this one and all later ones.
TORCH_TARGET = (2, 10)
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "bdist_egg", "develop", "editable_wheel", "install"}


def switch(name):
    """Environment variable `name` as True, False or None where it is unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"flashpair: {name} must be 0 or 1; got {value!r}")
    return None if value == "" else value == "1"


def notice(text):
    print(f"\nflashpair: {text}\n", file=sys.stderr, flush=True)


def find_torch():
    """True where torch can be imported; pip's isolated build environment hides the interpreter's own packages."""
    if importlib.util.find_spec("torch") is None:
        folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
        if sys.prefix == sys.base_prefix:
            folders.append(site.getusersitepackages())
        sys.path += [folder for folder in dict.fromkeys(folders) if folder not in sys.path and os.path.isdir(folder)]
    return importlib.util.find_spec("torch") is not None


def sources(*patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def compile_flags():
    if os.name == "nt":
        return ["/O2", "/std:c++20", "/EHsc"]
    return [
        "-O3",
        "-std=c++20",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        "-Werror=switch",
        "-g0",
    ]


def pybind11_include(torch_include_paths):
    try:
        import pybind11
    except ImportError:
        return torch_include_paths  # torch carries a copy of the headers
    return [pybind11.get_include()]


def native_extensions(required):
    """The extensions and the command that builds them; raises what torch or a missing file raises."""
    import torch
    from torch.utils import cpp_extension

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_TARGET:
        raise RuntimeError(
            f"torch {torch.__version__} was found, {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or later is needed"
        )
    target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    headers = sources("*.h")
    extensions = [
        Extension(
            "flashpair._build_info",
            sources("info.cpp"),
            include_dirs=pybind11_include(cpp_extension.include_paths()),
            define_macros=[
                ("FLASHPAIR_TORCH_VERSION", f'"{torch.__version__}"'),
                ("FLASHPAIR_TORCH_TARGET", f'"{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"'),
            ],
            extra_compile_args=compile_flags(),
            language="c++",
        )
    ]
    if sources("bind.cpp"):
        system = [] if os.name == "nt" else [f"-isystem{path}" for path in cpp_extension.include_paths()]
        # Not a Python module: `torch.ops.load_library` runs its registrations, against LibTorch's stable ABI only.
        extensions.append(
            cpp_extension.CppExtension(
                "flashpair._C",
                sources("bind.cpp", "*_cpu.cpp"),
                depends=headers,
                define_macros=[("TORCH_TARGET_VERSION", target), ("TORCH_STABLE_ONLY", None)],
                extra_compile_args=compile_flags() + system,
                py_limited_api=True,
            )
        )
    for extension in extensions:
        extension.optional = not required

    class Build(cpp_extension.BuildExtension):
        """torch's command, except that a build nobody insisted on may fail."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if required:
                    raise
                notice(f"the native part was not built ({error}); the package works without it, only slower")

        def get_export_symbols(self, ext):
            return ext.export_symbols if ext.name == "flashpair._C" else super().get_export_symbols(ext)

    return extensions, Build


def native():
    """Keyword arguments of `setup` for the native part."""
    wanted = switch("FLASHPAIR_BUILD_NATIVE")
    if switch("FLASHPAIR_BUILD_CUDA") and not sources("*_cuda.cu"):
        raise SystemExit(
            "flashpair: FLASHPAIR_BUILD_CUDA=1, but this version has no CUDA C++ sources; GPUs are served by Triton"
        )
    if wanted is False or not BUILD_COMMANDS & set(sys.argv):
        return {}
    try:
        if not find_torch():
            raise RuntimeError("torch was not found; install it first, or pass --no-build-isolation")
        extensions, command = native_extensions(required=wanted is True)
    except Exception as error:
        if wanted:
            raise SystemExit(f"flashpair: FLASHPAIR_BUILD_NATIVE=1, but {error}") from error
        notice(f"installing without the native part: {error}")
        return {}
    return {"ext_modules": extensions, "cmdclass": {"build_ext": command}}


setup(**native())
