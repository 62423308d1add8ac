"""The programs of `tests/cpp`: shared headers and the whole CPU engine without torch, plain and under sanitizers.

`FLASHPAIR_COMPILE_ALL=1` also runs the engines of the wide instruction sets that this processor has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALL = os.environ.get("FLASHPAIR_COMPILE_ALL", "0") not in ("0", "")
COMPILER = next(filter(None, map(shutil.which, [os.environ.get("CXX") or "g++", "c++", "clang++"])), None)
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror=switch", "-pthread", f"-I{ROOT / 'csrc'}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
#: Optimising sanitized code takes three times as long as it saves.
VARIANTS = {"plain": ["-O1", "-Werror"], "sanitized": ["-O0", "-g", *SANITIZERS]}
#: What the engine is compared with is not under test, and slow where it is not optimised.
NEVER_SANITIZED = "oracle.cpp"

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: neither CXX, g++, c++ nor clang++ is found"),
    pytest.mark.skipif(os.name == "nt", reason="the engine uses the vector extension of GCC and Clang"),
]


@dataclass
class Program:
    tests: list[str]  # of tests/cpp
    sources: list[str] = field(default_factory=list)  # of csrc
    flags: list[str] = field(default_factory=list)

    def files(self) -> list[Path]:
        return [ROOT / "tests/cpp" / name for name in self.tests] + [ROOT / "csrc" / name for name in self.sources]


def engine(name: str) -> Program:
    sources = ["memory_cpu.cpp", "order_cpu.cpp", "panel_cache_cpu.cpp", "ranks_cpu.cpp", f"isa_{name}_cpu.cpp"]
    return Program(["test_engine.cpp", "test_rows.cpp", "oracle.cpp"], sources, [f"-DFP_TESTED_ENGINE={name}_engine"])


def wide_engines() -> list[str]:
    """Instruction sets beyond the portable one that are asked for and that this processor has."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if ALL and cpuinfo.exists() else set()
    needed = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl"}}
    return [name for name in needed if needed[name] <= flags]


PROGRAMS = {
    "units": Program(
        ["test_order.cpp", "test_memory.cpp", "test_masks.cpp", "test_reductions.cpp", "test_scores.cpp"],
        ["memory_cpu.cpp", "order_cpu.cpp", "panel_cache_cpu.cpp"],
    ),
    "engine": engine("portable"),
    **{f"engine_{name}": engine(name) for name in wide_engines()},
}


def compile_object(program: Program, source: Path, variant: str, folder: Path) -> Path:
    made = folder / f"{source.stem}.o"
    kind = "plain" if source.name == NEVER_SANITIZED else variant
    flags = [*FLAGS, *VARIANTS[kind], *program.flags]
    done = subprocess.run([COMPILER, *flags, "-c", source, "-o", made], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


def works(variant: str, folder: Path) -> bool:
    """Can the compiler link, and this machine run, a program of this variant?"""
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    done = subprocess.run([COMPILER, *VARIANTS[variant], source, "-o", folder / "empty"], capture_output=True)
    return done.returncode == 0 and subprocess.run([folder / "empty"], capture_output=True).returncode == 0


@pytest.fixture(scope="module", params=VARIANTS)
def build(request, tmp_path_factory):
    """All programs of one variant, their files compiled side by side."""
    folder = tmp_path_factory.mktemp(request.param)
    if not works(request.param, folder):
        pytest.skip(f"{COMPILER} does not link {' '.join(VARIANTS[request.param])}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {}
        # The slowest first: engines, then their tests.
        for name in sorted(PROGRAMS):
            program = PROGRAMS[name]
            (folder / name).mkdir()
            objects[name] = [
                pool.submit(compile_object, program, source, request.param, folder / name)
                for source in reversed(program.files())
            ]

    def link(name: str) -> Path:
        made = folder / name / "program"
        files = [one.result() for one in objects[name]]
        subprocess.run([COMPILER, *FLAGS, *VARIANTS[request.param], *files, "-o", made], check=True)
        return made

    return link


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(build, name):
    done = subprocess.run([build(name)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    assert " 0 failures" in done.stdout


def test_every_file_is_in_a_program():
    listed = {name for program in PROGRAMS.values() for name in program.tests}
    assert listed == {path.name for path in (ROOT / "tests/cpp").glob("*.cpp")}


def test_a_failure_is_seen(tmp_path):
    """The header reports what does not hold, and memory that is read past its end ends a sanitized program."""
    source = tmp_path / "broken.cpp"
    source.write_text(
        "#define FP_TEST_MAIN\n#include <cstdlib>\n"
        f'#include "{ROOT / "tests/cpp/check.h"}"\n'
        "TEST(wrong) { CHECK_CLOSE(1.0, 1.5, 0.25); CHECK(std::isnan(0.0)); }\n"
        "TEST(beyond) { std::vector<int> v(3); CHECK(v.data()[size_t(std::rand() % 1) + 3] == 0); }\n"
    )
    for variant in VARIANTS:
        if not works(variant, tmp_path):
            continue
        made = tmp_path / variant
        subprocess.run([COMPILER, *FLAGS, *VARIANTS[variant], source, "-o", made], check=True)
        done = subprocess.run([made, "wrong"], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "1.0 is 1, wanted 1.5 within 0.25" in done.stderr
        assert "std::isnan(0.0)" in done.stderr
        if variant == "sanitized":
            done = subprocess.run([made, "beyond"], capture_output=True, text=True, check=False)
            assert done.returncode != 0
            assert "heap-buffer-overflow" in done.stderr
