"""Installing and importing: without torch, compiler, Triton or network; what the wheel carries; what import costs."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

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


def setup_py(*arguments: str, block: set[str] = frozenset(), **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py with its sockets closed and some packages hidden; prints the extensions instead of building them."""
    program = BLOCK.format(names=set(block)) + (
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
        ({"FLASHPAIR_BUILD_CUDA": "1"}, set(), "FLASHPAIR_BUILD_CUDA=1, but this version has no CUDA C++ sources"),
    ],
)
def test_setup_refuses(environment, block, message):
    done = setup_py("bdist_wheel", block=block, **environment)
    assert done.returncode != 0
    assert message in done.stderr


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
    expected = {f"flashpair/csrc/{p.name}" for p in (ROOT / "csrc").iterdir() if p.suffix in {".h", ".cpp", ".cu"}}
    expected |= {f"flashpair/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
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
        "vector_isas",
        "vector_bits",
    }
    assert info["cxx_standard"] >= 202002
    assert info["vector_bits"] in (128, 256, 512)


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
