"""Installing and importing: without torch, compiler, Triton or network; what the wheel carries; what import costs."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import build_script
import pytest

import flashpair

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

#: Put before a program: importing any of these names fails as if it were not installed.
BLOCK = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def python(program: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run a program in a fresh interpreter; a variable given as "" is unset."""
    merged = {k: v for k, v in {**os.environ, "OMP_NUM_THREADS": "1", **environment}.items() if v}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, env=merged, capture_output=True, text=True, check=False, timeout=300)


def setup_py(
    *arguments: str, block: set[str] = frozenset(), before: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """Run setup.py with its sockets closed and some packages hidden; prints the extensions instead of building them."""
    program = BLOCK.format(names=set(block)) + (
        f"{before}\n"
        "import importlib.util, setuptools, socket, runpy\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name: None if name in {set(block)!r} else find(name)\n"
        "def refused(*a, **k): raise OSError('setup.py reached for the network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused\n"
        "setuptools.setup = lambda **k: print('EXTENSIONS', sorted(e.name for e in k.get('ext_modules', [])))\n"
        f"sys.argv = ['setup.py', *{list(arguments)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    unset = {"FLASHPAIR_BUILD_NATIVE": "", "FLASHPAIR_BUILD_CUDA": ""}
    return python(program, **{**unset, **environment})


# --- setup.py ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["egg_info", "bdist_wheel", "editable_wheel"])
def test_setup_runs_without_torch(command):
    done = setup_py(command, block={"torch", "pybind11", "ninja"})
    assert done.returncode == 0, done.stderr
    assert "EXTENSIONS []" in done.stdout
    # Without torch there is nothing to build with, and whoever builds is told.
    assert ("installing without the native part: torch was not found" in done.stderr) == (command != "egg_info")


def test_setup_builds_where_torch_is_found():
    done = setup_py("bdist_wheel", MAX_JOBS="1", CUDA_HOME="/nonexistent", TORCH_CUDA_ARCH_LIST="9.0")
    assert done.returncode == 0, done.stderr
    assert "flashpair._build_info" in done.stdout
    assert ("flashpair._C" in done.stdout) == (ROOT / "csrc" / "bind.cpp").exists()


def test_metadata_commands_do_not_import_torch():
    done = setup_py("egg_info")
    assert "EXTENSIONS []" in done.stdout
    assert done.stderr == ""


def test_setup_pure_on_request():
    assert "EXTENSIONS []" in setup_py("bdist_wheel", FLASHPAIR_BUILD_NATIVE="0").stdout


@pytest.mark.parametrize(
    ("environment", "block", "message"),
    [
        ({"FLASHPAIR_BUILD_NATIVE": "1"}, {"torch"}, "FLASHPAIR_BUILD_NATIVE=1, but torch was not found"),
        ({"FLASHPAIR_BUILD_NATIVE": "yes"}, set(), "FLASHPAIR_BUILD_NATIVE must be 0 or 1; got 'yes'"),
        ({"FLASHPAIR_BUILD_CUDA": "on"}, set(), "FLASHPAIR_BUILD_CUDA must be 0 or 1; got 'on'"),
    ],
)
def test_setup_refuses(environment, block, message):
    done = setup_py("bdist_wheel", block=block, **environment)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.fixture(scope="module")
def nvcc(tmp_path_factory) -> Path:
    """Home of an nvcc of CUDA 12.6 that knows what it is and compiles nothing."""
    home = tmp_path_factory.mktemp("cuda")
    program = home / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        "--version) echo 'Cuda compilation tools, release 12.6, V12.6.20' ;;\n"
        "--list-gpu-arch) echo compute_50 compute_70 compute_75 compute_80 compute_86 compute_89 compute_90 ;;\n"
        f"""--dryrun) echo '#$ INCLUDES="-I{home}/include"' '#$ LIBRARIES=  "-L{home}/lib64"' >&2 ;;\n"""
        "*) exit 1 ;;\nesac\n"
    )
    program.chmod(0o755)
    return home


posix = pytest.mark.skipif(os.name == "nt", reason="the CUDA part is built on Linux only")


def extensions(**environment: str) -> str:
    """What a wheel would carry beside Python."""
    done = setup_py("bdist_wheel", **{"CUDA_HOME": "", "CUDA_PATH": "", "TORCH_CUDA_ARCH_LIST": "", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.split("EXTENSIONS ")[1].strip().replace("flashpair.", "")


@posix
def test_cuda_part_on_request(nvcc):
    """Beside a torch of any build; without the CPU part where that is not wanted."""
    home = str(nvcc)
    assert extensions(CUDA_HOME=home) == extensions(CUDA_HOME=home, FLASHPAIR_BUILD_CUDA="0")
    assert extensions(CUDA_HOME=home) == "['_C', '_build_info']"
    assert extensions(CUDA_HOME=home, FLASHPAIR_BUILD_CUDA="1") == "['_C', '_CUDA', '_build_info', '_cuda_info']"


@posix
@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "PATH"])
def test_cuda_part_finds_nvcc(nvcc, variable):
    place = {variable: str(nvcc / "bin" if variable == "PATH" else nvcc)}
    found = extensions(FLASHPAIR_BUILD_CUDA="1", FLASHPAIR_BUILD_NATIVE="0", TORCH_CUDA_ARCH_LIST="8.9", **place)
    assert found == "['_CUDA', '_build_info', '_cuda_info']"


@posix
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "8.0;ninety",
            "TORCH_CUDA_ARCH_LIST has 'ninety'; allowed are numbers such as 8.0 or 9.0a and the names Volta",
        ),
        ("80", "TORCH_CUDA_ARCH_LIST has '80'; allowed are "),
        ("9.0+SASS", "TORCH_CUDA_ARCH_LIST has '9.0+SASS'; allowed are "),
        ("8.0;", "TORCH_CUDA_ARCH_LIST has ''; allowed are "),
        ("9.0 10.0+PTX", "TORCH_CUDA_ARCH_LIST asks for 100+PTX; nvcc 12.6 knows 5.0, 7.0, 7.5, 8.0, 8.6, 8.9, 9.0"),
    ],
)
def test_cuda_part_refuses_architectures(nvcc, asked, message):
    done = setup_py("bdist_wheel", FLASHPAIR_BUILD_CUDA="1", CUDA_HOME=str(nvcc), TORCH_CUDA_ARCH_LIST=asked)
    assert done.returncode != 0
    assert done.stderr.strip().startswith(f"flashpair: FLASHPAIR_BUILD_CUDA=1, but {message}")
    assert len(done.stderr.strip().splitlines()) == 1


@posix
def test_architectures_of_others_are_not_ours(nvcc):
    """Nobody asked for the CUDA part: the variable is for other packages."""
    assert extensions(CUDA_HOME=str(nvcc), TORCH_CUDA_ARCH_LIST="3.5;ninety") == "['_C', '_build_info']"


@posix
@pytest.mark.parametrize("command", ["bdist_wheel", "egg_info"])
def test_cuda_part_without_nvcc(command):
    program = "import shutil\nshutil.which = lambda *a, **k: None\n"
    done = setup_py(command, FLASHPAIR_BUILD_CUDA="1", before=program)
    if command == "egg_info":
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(
        "flashpair: FLASHPAIR_BUILD_CUDA=1, but nvcc was not found in CUDA_HOME, CUDA_PATH, PATH and "
    )
    assert line.endswith("install the CUDA toolkit, or set CUDA_HOME to where it is")


@posix
def test_cuda_part_without_torch(nvcc):
    done = setup_py("bdist_wheel", block={"torch"}, FLASHPAIR_BUILD_CUDA="1", CUDA_HOME=str(nvcc))
    assert done.returncode != 0
    assert "flashpair: FLASHPAIR_BUILD_CUDA=1, but torch was not found; install it first" in done.stderr


@pytest.fixture
def script(monkeypatch) -> dict:
    """What setup.py defines."""
    for name in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return build_script.load()


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("8.0", ["80"]),
        ("8.0;9.0a+PTX", ["80", "90a+PTX"]),
        (" 7.5 8.0;8.6, 10.0f 12.1 ", ["75", "80", "86", "100f", "121"]),
        ("Hopper", ["90"]),
        ("Ampere+PTX;8.0", ["80", "86+PTX"]),
    ],
)
def test_architectures_are_read_as_torch_reads_them(script, asked, found):
    assert script["parse_architectures"](asked) == found


def test_architectures_as_options_of_the_compiler(script):
    assert script["gencode"](["80", "90a+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@posix
def test_architectures_by_default(script, nvcc, monkeypatch):
    """The visible GPUs; else all that the compiler knows; always with PTX for later ones."""
    monkeypatch.setenv("CUDA_HOME", str(nvcc))
    compiler = script["CudaCompiler"]()
    assert compiler.version == "12.6"
    assert compiler.include_dirs == [f"{nvcc}/include"]
    assert compiler.library_dirs == [f"{nvcc}/lib64"]
    assert compiler.architectures([]) == ["75", "80", "86", "89", "90+PTX"]
    assert compiler.architectures([(9, 0), (8, 0), (9, 0)]) == ["80", "90+PTX"]
    assert compiler.architectures([(12, 0)]) == ["75", "80", "86", "89", "90+PTX"]  # newer than the compiler
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert script["CudaCompiler"]().architectures([(9, 0)]) == ["86"]


def test_packages_are_those_on_disk():
    """A folder with Python files that is not listed would be missing from the wheel alone."""
    roots = {"flashpair": ROOT / "python" / "flashpair", "flashpair.kernels": ROOT / "kernels"}
    found = {
        ".".join((name, *path.parent.relative_to(folder).parts))
        for name, folder in roots.items()
        for path in folder.rglob("*.py")
    }
    assert found | {"flashpair.csrc"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_version_has_one_source():
    assert "version" not in PROJECT["project"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", flashpair.__version__)


# --- wheel ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The pure wheel, built from a copy with this environment's setuptools."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    program = (
        "import os, shutil, sys\n"
        "source, target = sys.argv[1:]\n"
        "ignore = shutil.ignore_patterns('.*', 'build', 'dist', 'out', '*.egg-info', '__pycache__', '*.so')\n"
        "shutil.copytree(source, target + '/source', ignore=ignore)\n"
        "open(target + '/source/kernels/tuned.json', 'w').write('[]')\n"  # as bench/tune.py does on a GPU
        "os.chdir(target + '/source')\n"
        "from setuptools import build_meta\n"
        "print('WHEEL', build_meta.build_wheel(target))\n"
    )
    done = python(program, str(ROOT), str(folder), FLASHPAIR_BUILD_NATIVE="0", FLASHPAIR_BUILD_CUDA="")
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / done.stdout.split("WHEEL ")[1].split()[0])


def test_wheel_without_native_part_is_pure(wheel):
    assert Path(wheel.filename).name == f"flashpair-{flashpair.__version__}-py3-none-any.whl"


def test_wheel_carries_every_source(wheel):
    expected = {f"flashpair/csrc/{p.name}" for p in (ROOT / "csrc").iterdir()}
    expected |= {f"flashpair/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    expected |= {"flashpair/kernels/tuned.json"}
    expected |= {f"flashpair/{p.relative_to(ROOT / 'python/flashpair')}" for p in (ROOT / "python").rglob("*.py")}
    carried = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert carried == expected | {"flashpair/py.typed"}


def test_wheel_metadata(wheel):
    (metadata,) = (wheel.read(n).decode() for n in wheel.namelist() if n.endswith("/METADATA"))
    assert f"\nVersion: {flashpair.__version__}\n" in metadata
    assert {r.split(";")[0].strip() for r in re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE)} == {
        "torch>=2.10",
        "numpy",
    }
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


def test_wheel_imports_from_an_empty_folder(wheel, tmp_path):
    """What was packed is enough: no file of the checkout is on the path."""
    wheel.extractall(tmp_path / "site")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        # An editable install may have registered a finder for the checkout.
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "import flashpair, flashpair.losses, flashpair.miners, importlib.util\n"
        "assert flashpair.__file__.startswith(sys.argv[1]), flashpair.__file__\n"
        "assert importlib.util.find_spec('flashpair.kernels').origin.startswith(sys.argv[1])\n"
        "print(flashpair.backends())\n"
    )
    done = python(program, str(tmp_path / "site"), cwd=tmp_path, PYTHONPATH="", FLASHPAIR_BACKEND="")
    assert done.returncode == 0, done.stderr
    assert "'reference': 'usable'" in done.stdout


# --- import -----------------------------------------------------------------------------------------------------------


def test_import_needs_no_triton_no_compiler_and_no_peer():
    program = BLOCK.format(names={"triton", "pytorch_metric_learning", "pybind11", "setuptools"}) + (
        "import torch, flashpair, flashpair.losses\n"
        "x = torch.randn(8, 4, requires_grad=True)\n"
        "with flashpair.use_backend('reference'):\n"
        "    flashpair.losses.SupConLoss()(x, torch.arange(8) // 2).backward()\n"
        "print(flashpair.backends()['triton'], float(x.grad.abs().sum()) > 0)\n"
    )
    done = python(program, PATH="/nonexistent", CXX="", FLASHPAIR_BACKEND="", TRITON_INTERPRET="")
    assert done.returncode == 0, done.stderr
    state, connected = done.stdout.rsplit(maxsplit=1)
    assert "usable" not in state.split()
    assert connected == "True"


def test_import_starts_no_process_and_warns_of_nothing():
    """A compilation would be a process; its result would be a file."""
    program = (
        "import sys, torch\n"
        "def watch(event, arguments):\n"
        "    if event in ('subprocess.Popen', 'os.system', 'os.posix_spawn', 'os.exec', 'os.fork'):\n"
        "        raise RuntimeError(f'import started a process: {arguments}')\n"
        "    if event == 'open' and isinstance(arguments[1], str) and set(arguments[1]) & set('wax+'):\n"
        "        raise RuntimeError(f'import wrote a file: {arguments}')\n"
        "sys.addaudithook(watch)\n"
        "import flashpair, flashpair.losses, flashpair.miners\n"
    )
    done = python(program, PYTHONWARNINGS="error::UserWarning", PYTHONDONTWRITEBYTECODE="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_import_is_quick_beyond_torch():
    program = (
        "import time, torch, torch.library\n"
        "start = time.process_time()\n"
        "import flashpair\n"
        "print(time.process_time() - start)\n"
    )
    assert min(float(python(program).stdout) for _ in range(2)) < 1.0


def test_import_leaves_heavy_packages_alone():
    program = (
        "import sys, flashpair, flashpair.losses, flashpair.miners\n"
        "print(sorted({'triton', 'pytorch_metric_learning', 'sklearn', 'matplotlib'} & set(sys.modules)))\n"
    )
    before = python("import sys, torch; print('triton' in sys.modules)").stdout.strip() == "True"
    loaded = python(program).stdout.strip()
    assert loaded == ("['triton']" if before else "[]")


# --- report -----------------------------------------------------------------------------------------------------------


def test_environment_report():
    done = subprocess.run(
        [sys.executable, "-m", "flashpair"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"flashpair {flashpair.__version__}"
    names = {line.split()[0] for line in lines if line.startswith("  ")}
    assert {"python", "torch", "triton", "cpu", "reference", "operators", "workspace", "threads"} <= names
    # Aligned: every value starts in the same column.
    assert len({len(re.match(r"  \S+(?: \S+)*  +", line).group()) for line in lines if line.startswith("  ")}) == 1


def test_build_info_where_built():
    info = pytest.importorskip("flashpair._build_info").info()
    assert set(info) == {
        "compiler",
        "cxx_standard",
        "architecture",
        "torch_built_with",
        "torch_needed",
        "cuda",
        "cuda_version",
        "cuda_architectures",
        "vector_isas",
        "vector_bits",
    }
    assert info["cxx_standard"] >= 202002
    assert info["vector_bits"] in (128, 256, 512)
    built = any((ROOT / "python" / "flashpair").glob("_CUDA*"))
    assert info["cuda"] == built == bool(info["cuda_version"]) == bool(info["cuda_architectures"])


# --- files around -----------------------------------------------------------------------------------------------------


def test_constraints_pin_every_named_package():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower(), re.MULTILINE))
    extras = PROJECT["project"]["optional-dependencies"].values()
    named = {re.split(r"[>=<\[ ]", r)[0] for group in extras for r in group}
    named |= {re.split(r"[>=<\[ ]", r)[0] for r in PROJECT["build-system"]["requires"]}
    assert named | {"torch", "numpy"} <= set(pinned)


def test_ci_lints_and_tests():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in ci
    assert "make lint" in ci
    assert "make test" in ci
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
