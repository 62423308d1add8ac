"""The runner for GPU machines, without a GPU: limits, partial results, verdicts."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
from bench_support import GPU, command

import gpu  # isort: skip


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
    return tmp_path / "site"


def stage(program: str, *more: str, verdict=gpu.last_line) -> gpu.Stage:
    return gpu.Stage("some", 60, lambda g, s: [gpu.python("-c", p) for p in (program, *more)], verdict)


def gone(pid: int) -> bool:
    """Within a second; a zombie is gone."""
    for _ in range(20):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_stage_that_is_cut_off_keeps_what_it_has(tmp_path, site):
    """Its results, its output, and nothing that it started; it is told to end before it is ended."""
    program = f"""
import pathlib, signal, subprocess, sys, time
folder = pathlib.Path({str(tmp_path)!r})
deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf])
(folder / "child").write_text(str(child.pid))
(folder / "result").write_text("row 1")
print("row 1", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted after 1 row", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(60)
"""
    ticks = []
    start = time.monotonic()
    # A quarter of the limit is for what it has to say, which takes long where many tests run.
    outcome = gpu.run_stage(stage(program), GPU, tmp_path, 8.0, lambda: ticks.append(1))
    assert time.monotonic() - start < 20
    assert (outcome.state, outcome.line) == ("cut off", "interrupted after 1 row")
    assert (tmp_path / "result").read_text() == "row 1" and "row 1" in (tmp_path / "some.log").read_text()
    assert gone(int((tmp_path / "child").read_text())) and ticks


def test_a_stage_stops_at_the_command_that_fails(tmp_path, site):
    outcome = gpu.run_stage(stage("print('first')", "print('no'); exit(3)", "print('third')"), GPU, tmp_path)
    assert (outcome.state, outcome.line) == ("failed", "no")
    assert (tmp_path / "some.log").read_text() == "first\nno\n"
    assert gpu.run_stage(stage("print('fine')"), GPU, tmp_path).state == "ok"


def test_a_stage_in_which_everything_was_skipped_has_failed(tmp_path, site):
    outcome = gpu.run_stage(stage("print('7 skipped in 0.10s')", verdict=gpu.tests_passed), GPU, tmp_path)
    assert (outcome.state, outcome.line) == ("failed", "7 skipped in 0.10s")


def test_a_tool_that_is_missing_fails_its_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda *a, **k: None)
    outcome = gpu.run_stage(gpu.STAGES["sanitize"], GPU, tmp_path)
    assert outcome.state == "failed" and "compute-sanitizer" in outcome.line


def test_stages_run_on_after_one_that_fails(tmp_path, site, monkeypatch, capsys):
    made = {"build": stage("exit(1)"), "test": stage("import time; time.sleep(60)"), "bench": stage("print('2 rows')")}
    made = {name: gpu.Stage(name, 2, s.commands, s.verdict) for name, s in made.items()}
    monkeypatch.setattr(gpu, "STAGES", made | {"report": gpu.Stage("report", 9, lambda g, s: [], gpu.last_line)})
    monkeypatch.setattr(gpu, "probe", lambda: GPU)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    states = [line.split()[:2] for line in (tmp_path / "summary.txt").read_text().splitlines()[2:]]
    assert [name for name, _ in states] == ["build", "test", "bench", "report"]
    assert [state for _, state in states] == ["failed", "cut", "ok", "ok"]
    assert "2 rows" in text and "at most 2 s" in text


def test_the_package_is_importable_from_links(site):
    gpu.link_package()
    program = (
        "import flashpair, flashpair.losses; print(flashpair.__file__); from pathlib import Path; import importlib"
    )
    program += ".util; print(importlib.util.find_spec('flashpair.kernels').origin)"
    done = command(sys.executable, "-c", program, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(site)) for line in done.stdout.split())


@pytest.mark.parametrize(
    ("output", "good", "line"),
    [
        ("x\n=== 3 failed, 5 passed, 2 skipped in 1.20s ===\n", True, "3 failed, 5 passed, 2 skipped in 1.20s"),
        ("7 skipped in 0.10s\n", False, "7 skipped in 0.10s"),
        ("tests/a.py::test_x[a-b] PASSED [ 1%]\ntests/a.py::test_y FAILED\n", True, "1 failed, 1 passed so far"),
        ("[gw1] [ 2%] PASSED tests/a.py::test_x[b]\n[gw0] [ 3%] PASSED tests/a.py::test_z\n", True, "2 passed so far"),
        ("No module named pytest\n", False, "No module named pytest"),
    ],
    ids=["total", "nothing but skips", "cut off", "cut off in parallel", "no pytest"],
)
def test_what_pytest_said(output, good, line):
    assert gpu.tests_passed(output) == (good, line)


@pytest.mark.parametrize(
    "line",
    [
        "csrc/a.h:36:39: error: 'x' was not declared in this scope",
        'csrc/a.cu(12): error: identifier "x" is undefined',
        "flashpair: FLASHPAIR_BUILD_CUDA=1, but nvcc was not found",
        "triton: usable; cuda: usable",
    ],
    ids=["host compiler", "nvcc", "setup.py", "success"],
)
def test_what_the_build_said(line):
    after = "" if line.startswith("triton") else "\nRuntimeError: Error compiling objects for extension"
    assert gpu.built(f"g++ -Werror=switch a.cpp\n{line}{after}\n")[1] == line


def test_a_memory_checker_that_saw_no_test_has_shown_nothing():
    clean = "2 passed in 1s\n========= ERROR SUMMARY: 0 errors\n"
    race = "2 passed in 1s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu.sanitized(clean + race)[0]
    assert not gpu.sanitized(clean)[0]
    assert not gpu.sanitized((clean + race).replace("2 passed", "2 skipped"))[0]


def test_an_unknown_stage_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        gpu.arguments(["build", "profile"])
    assert error.value.code == 2
    stages = "build, test, bench, report, sanitize, host, tune"
    assert f"unknown stage 'profile'; stages are {stages}" in capsys.readouterr().err
    assert gpu.arguments([]).stages == ["build", "test", "bench", "report"]
    assert gpu.arguments(["sanitize"]).stages == ["sanitize"]


def test_default_stages_take_less_than_nine_minutes():
    assert sum(gpu.STAGES[name].seconds for name in gpu.arguments([]).stages) < 540


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_without_a_gpu(tmp_path):
    done = command("make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}", f"GPU_OUT={tmp_path / 'out'}")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("make gpu: ")]
    assert len(lines) == 1 and "sees no GPU" in lines[0]
    assert not (tmp_path / "out").exists()
