"""Builds the native parts where torch and a compiler are at hand; everything else stands in pyproject.toml.

Read from the environment:
    FLASHPAIR_BUILD_NATIVE  1: failing to build the CPU part is an error; 0: not built; unset: built if possible
    FLASHPAIR_BUILD_CUDA    1: the CUDA part is built, failing is an error; 0 or unset: not built
    MAX_JOBS                parallel compilations
    CXX                     the host compiler, of nvcc too
    CUDA_HOME, CUDA_PATH    where nvcc is (bin/nvcc); else that of PATH or of /usr/local/cuda
    TORCH_CUDA_ARCH_LIST    architectures of the CUDA part, such as "8.0;9.0a+PTX"; default: the visible GPUs, or all

The CUDA part is compiled by nvcc itself: torch's own command refuses where torch is a CPU build or of another CUDA
version, neither of which matters to a library that talks to LibTorch through its stable ABI.
"""

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
#: Oldest torch whose stable ABI the binary asks for: one build serves this one and all later ones.
TORCH_TARGET = (2, 10)
#: What the CUDA part is compiled for by default, the newest also as PTX; what the compiler does not know is left out.
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0")
ARCHITECTURE_NAMES = {
    "Volta": ("7.0",),
    "Turing": ("7.5",),
    "Ampere": ("8.0", "8.6"),
    "Ada": ("8.9",),
    "Hopper": ("9.0",),
    "Blackwell": ("10.0", "12.0"),
}
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


def refuse_cuda(reason):
    raise SystemExit(f"flashpair: FLASHPAIR_BUILD_CUDA=1, but {reason}")


def parse_architectures(text):
    """TORCH_CUDA_ARCH_LIST → architectures: "8.0;9.0a+PTX" → ["80", "90a+PTX"]."""
    found = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        name, plus, ptx = entry.partition("+")
        numbers = ARCHITECTURE_NAMES.get(name, (name,))
        if not all(re.fullmatch(r"\d+\.\d[af]?", number) for number in numbers) or plus + ptx not in ("", "+PTX"):
            refuse_cuda(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}; allowed are numbers such as 8.0 or 9.0a and the names "
                f"{', '.join(ARCHITECTURE_NAMES)}, each also with +PTX, separated by semicolons or spaces"
            )
        found += [number.replace(".", "") for number in numbers]
        found[-1] += plus + ptx
    return list(dict.fromkeys(found))


def gencode(architectures):
    """nvcc's options for ["80", "90a+PTX"]."""
    flags = []
    for entry in architectures:
        number, _, ptx = entry.partition("+")
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in ("sm", *["compute"] * bool(ptx))]
    return flags


class CudaCompiler:
    """The nvcc found, and what it says of itself."""

    def __init__(self):
        if os.name == "nt":
            refuse_cuda("the CUDA part is built on Linux only")
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        folders = [*(os.path.join(home, "bin") for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
        self.nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
        if self.nvcc is None:
            refuse_cuda(
                "nvcc was not found in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda; "
                "install the CUDA toolkit, or set CUDA_HOME to where it is"
            )
        version = re.search(r"release (\d+)\.(\d+)", self._ask("--version"))
        if version is None:
            refuse_cuda(f"{self.nvcc} does not say its version")
        self.version = ".".join(version.groups())
        self.flags = ["-std=c++20" if int(version[1]) >= 12 else "-std=c++17", "-O3", "-lineinfo"]
        self.known = set(re.findall(r"compute_(\d+)", self._ask("--list-gpu-arch")))
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
        self.asked = parse_architectures(asked) if asked else []
        for entry in self.asked:
            if re.match(r"\d+", entry)[0] not in self.known:
                known = ", ".join(f"{n[:-1]}.{n[-1]}" for n in sorted(self.known, key=int))
                refuse_cuda(f"TORCH_CUDA_ARCH_LIST asks for {entry}; nvcc {self.version} knows {known}")
        # nvcc may be a script that stands elsewhere than its headers; it is asked where they are.
        folders = self._ask("--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
        self.include_dirs = list(dict.fromkeys(re.findall(r'"-I([^"]+)"', folders)))
        self.library_dirs = list(dict.fromkeys(re.findall(r'"-L([^"]+)"', folders)))

    def _ask(self, *arguments):
        done = subprocess.run([self.nvcc, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            refuse_cuda(f"`{self.nvcc} {' '.join(arguments)}` fails: {done.stderr.strip()}")
        return done.stdout + done.stderr

    def architectures(self, capabilities):
        """What to compile for; `capabilities`: (major, minor) of the visible GPUs."""
        if self.asked:
            return self.asked
        numbers = {f"{major}{minor}" for major, minor in capabilities} & self.known
        numbers = numbers or {n.replace(".", "") for n in CUDA_ARCHITECTURES} & self.known
        numbers = sorted(numbers, key=int)
        return [*numbers[:-1], f"{numbers[-1]}+PTX"]

    def compile(self, folder, architectures):
        """Objects of csrc/*_cuda.cu, compiled side by side; those that nothing has changed for stay as they are."""
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        files = sources("*_cuda.cu")
        command = [self.nvcc, *self.flags, *gencode(architectures)]
        command += [
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-Xfatbin=-compress-all",
            f"--threads={max(1, jobs // len(files))}",
        ]
        if os.environ.get("CXX"):
            command.append(f"-ccbin={os.environ['CXX']}")
        newest_header = max(os.path.getmtime(path) for path in sources("*.h", "*.cuh"))

        def build(source):
            made = Path(folder, source).with_suffix(".o")
            log = made.with_suffix(".command")
            line = [*command, "-c", source, "-o", str(made)]
            newest = max(newest_header, os.path.getmtime(source))
            if made.exists() and made.stat().st_mtime > newest and log.exists() and log.read_text() == str(line):
                return str(made)
            made.parent.mkdir(parents=True, exist_ok=True)
            print(f"{' '.join(line)}\n", end="", flush=True)
            if subprocess.run(line, check=False).returncode != 0:
                refuse_cuda(f"nvcc could not compile {source}; what it said stands above")
            log.write_text(str(line))
            return str(made)

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(build, files))


def native_extensions(wanted, cuda):
    """The extensions and the command that builds them; raises what torch or a missing file raises.

    wanted: build the CPU part (True), build it if possible (None), or not (False); cuda: CudaCompiler or None.
    """
    import torch
    from torch.utils import cpp_extension

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_TARGET:
        raise RuntimeError(
            f"torch {torch.__version__} was found, {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or later is needed"
        )
    target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    headers = sources("*.h")
    system = [] if os.name == "nt" else [f"-isystem{path}" for path in cpp_extension.include_paths()]

    def information(name, source, optional, **macros):
        """A Python module of facts about the build."""
        return Extension(
            f"flashpair.{name}",
            sources(source),
            include_dirs=pybind11_include(cpp_extension.include_paths()),
            define_macros=[(f"FLASHPAIR_{key}", f'"{value}"') for key, value in macros.items()],
            extra_compile_args=compile_flags(),
            language="c++",
            optional=optional,
        )

    def operators(name, files, optional, flags=(), **options):
        """Not a Python module: `torch.ops.load_library` runs its registrations, against LibTorch's stable ABI only."""
        return cpp_extension.CppExtension(
            f"flashpair.{name}",
            files,
            depends=headers,
            define_macros=[("TORCH_TARGET_VERSION", target), ("TORCH_STABLE_ONLY", None)],
            extra_compile_args=[*compile_flags(), *system, *flags],
            py_limited_api=True,
            optional=optional,
            **options,
        )

    facts = {"TORCH_VERSION": torch.__version__, "TORCH_TARGET": f"{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"}
    extensions = [information("_build_info", "info.cpp", not wanted, **facts)]
    if wanted is not False:
        extensions.append(operators("_C", sources("bind.cpp", "*_cpu.cpp"), not wanted))
    if cuda:
        gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        architectures = cuda.architectures([torch.cuda.get_device_capability(k) for k in gpus])
        facts = {"CUDA_VERSION": cuda.version, "CUDA_ARCHS": ",".join(architectures)}
        extensions.append(information("_cuda_info", "info_cuda.cpp", False, **facts))
        extensions.append(
            operators(
                "_CUDA",
                sources("bind_cuda.cpp"),
                False,
                flags=["-fvisibility=hidden", *(f"-isystem{path}" for path in cuda.include_dirs)],
                library_dirs=cuda.library_dirs,
                # The runtime is linked in and hidden, so that it neither has to be there nor meets that of torch.
                libraries=["cudart_static", "rt", "pthread", "dl"],
                extra_link_args=["-Wl,--exclude-libs,ALL"],
            )
        )

    class Build(cpp_extension.BuildExtension):
        """torch's command, except that a build nobody insisted on may fail, and that nvcc is ours."""

        def build_extensions(self):
            # setuptools looks at the time of the sources only, which a change of architectures does not touch.
            self.force = self.force or cuda is not None
            try:
                super().build_extensions()
            except Exception as error:
                self._failed(self.extensions, error)

        def build_extension(self, ext):
            try:
                if ext.name == "flashpair._CUDA":
                    ext.extra_objects = cuda.compile(self.build_temp, architectures)
                super().build_extension(ext)
            except Exception as error:
                self._failed([ext], error)

        def _failed(self, extensions, error):
            if not all(ext.optional for ext in extensions):
                raise error
            notice(f"the native part was not built ({error}); the package works without it, only slower")

        def get_export_symbols(self, ext):
            libraries = ("flashpair._C", "flashpair._CUDA")
            return ext.export_symbols if ext.name in libraries else super().get_export_symbols(ext)

    return extensions, Build


def native():
    """Keyword arguments of `setup` for the native parts."""
    wanted, cuda_wanted = switch("FLASHPAIR_BUILD_NATIVE"), switch("FLASHPAIR_BUILD_CUDA")
    if (wanted is False and not cuda_wanted) or not BUILD_COMMANDS & set(sys.argv):
        return {}
    cuda = CudaCompiler() if cuda_wanted else None
    try:
        if not find_torch():
            raise RuntimeError("torch was not found; install it first, or pass --no-build-isolation")
        extensions, command = native_extensions(wanted, cuda)
    except Exception as error:
        if wanted:
            raise SystemExit(f"flashpair: FLASHPAIR_BUILD_NATIVE=1, but {error}") from error
        if cuda_wanted:
            refuse_cuda(error)
        notice(f"installing without the native part: {error}")
        return {}
    return {"ext_modules": extensions, "cmdclass": {"build_ext": command}}


setup(**native())
