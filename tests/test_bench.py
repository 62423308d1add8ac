"""The runner for GPU machines and the report, without a GPU: limits, partial results, goals, stale rows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import goals  # noqa: E402
import gpu  # noqa: E402
import machine  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402

GPU = gpu.Gpu("NVIDIA Nothing 100 80GB", "9.0", "2.11.0")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(arguments, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=60)


# --- stages -----------------------------------------------------------------------------------------------------------


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
    outcome = gpu.run_stage(stage(program), GPU, tmp_path, 4.0, lambda: ticks.append(1))
    assert time.monotonic() - start < 10
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
    assert "unknown stage 'profile'; stages are build, test, bench, report, sanitize" in capsys.readouterr().err
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


# --- rows -------------------------------------------------------------------------------------------------------------

IDENTITY = {"allocator": "default", "threads": "16", "device": GPU.name}
PROVENANCE = {
    **IDENTITY, "driver": "580", "torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0", "nvcc": "13.0",
    "commit": "abc", "date": "2026-11-21",
}  # fmt: skip


def size(case: str, batch: int = 32768, width: int = 512) -> dict:
    return {
        "case": case, "batch": batch, "width": width, "dtype": "bfloat16", "direction": results.BOTH, **IDENTITY,
        "columns": batch,
    }  # fmt: skip


def measured(case: str, times: dict[str, float], extra: float = 100.0, sources: str = "now", **options) -> dict:
    """A row as `run.py` writes it."""
    spread = {name: {"median": t, "low": t, "high": t, "samples": 9} for name, t in times.items()}
    baseline = next(iter(times))
    return {
        **size(case, **options), **PROVENANCE, "milliseconds": spread, "baseline": baseline, "products": 4.0,
        "times_flashpair": {n: spread[n] for n in times if n != baseline}, "foreign_load": 0.0,
        "not_run": {"inf_cl": "No module named 'inf_cl'"}, "sources": sources, "workspace_mebibytes": 256.0,
        "extra_mebibytes": dict.fromkeys(times, extra), "gradient_mebibytes": 64.0,
        "gemm_milliseconds": {"median": 1.5, "low": 1.5, "high": 1.5, "samples": 9},
    }  # fmt: skip


def unmeasured(case: str, **options) -> dict:
    return {**size(case, **options), **PROVENANCE, "not_measured": run.NOT_REACHED, "sources": "now"}


def test_a_row_that_was_not_reached_replaces_no_measurement(tmp_path):
    path = tmp_path / "gpu.json"
    results.merge(path, [unmeasured("clip"), unmeasured("supcon")], results.KEY)
    results.merge(path, [measured("clip", {goals.CUDA: 9.0})], results.KEY)
    results.merge(path, [unmeasured("clip"), unmeasured("supcon")], results.KEY)
    rows = {row["case"]: row for row in json.loads(path.read_text())}
    assert rows["clip"]["milliseconds"] and rows["supcon"]["not_measured"] and len(rows) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_rows_are_written_one_by_one(tmp_path, capsys):
    from cases import Job

    path, seen = tmp_path / "gpu.json", []
    jobs = [Job(name, 32768, 512, "bfloat16") for name in ("clip", "supcon", "siglip")]

    def measure(job) -> dict:
        seen.append([row["case"] for row in json.loads(path.read_text()) if "milliseconds" in row])
        if job.case == "supcon":
            time.sleep(0.6)
        return measured(job.case, {goals.TRITON: 1.0})

    run.run_jobs(jobs, measure, lambda job: unmeasured(job.case), path, 0.5, time.monotonic())
    rows = {row["case"]: "milliseconds" in row for row in json.loads(path.read_text())}
    assert seen == [[], ["clip"]]
    assert rows == {"clip": True, "supcon": True, "siglip": False}
    assert "not measured, 0.5 s are over: siglip 32768x512 bfloat16" in capsys.readouterr().out


def test_a_contestant_that_ends_the_process_is_left_out(tmp_path):
    """The next process goes on with the same row, without it; one that ends it again ends the run."""
    current, calls = tmp_path / "current.json", []

    def process(arguments: list[str]) -> int:
        calls.append(arguments)
        current.write_text(json.dumps({"job": 4, "contestant": goals.CUDA}))
        return 0 if goals.CUDA in arguments else run.LOST

    assert run.persist(process, float("inf"), current) == 1
    assert calls == [["--first", "0"], ["--first", "4", "--without", goals.CUDA]]
    calls.clear()
    assert run.persist(lambda arguments: process(arguments) and -signal.SIGKILL, 9.0, current) == 1
    assert run.persist(lambda arguments: process(arguments) * 0 - signal.SIGSEGV, 9.0, current) == -signal.SIGSEGV


def test_the_preset_begins_with_the_most_telling_rows():
    from cases import CASES, gpu_jobs

    jobs = gpu_jobs()
    assert [(j.case, j.batch, j.width) for j in jobs[:2]] == [("clip", 32768, 512), ("supcon", 32768, 512)]
    assert {j.case for j in jobs} <= {c.name for c in CASES}
    assert len({(j.case, j.batch, j.width, j.dtype, j.direction) for j in jobs}) == len(jobs)
    bf16 = {(j.case, j.batch, j.width, j.direction) for j in jobs if j.dtype == "bfloat16"}
    named = {(c, b, d, g.direction) for g in goals.GPU_GOALS for c in g.cases for b in g.batches for d in g.widths}
    assert named <= bf16
    assert {(j.case, j.batch) for j in jobs if j.dtype == "float32"} == {("clip", 4096), ("clip", 16384)}


def test_a_row_tells_of_the_one_of_other_sources_before_it(tmp_path):
    """And of that one still, after it was measured again with the same sources."""
    path = tmp_path / "speed.json"
    for sources, ours, dense in (("first", 10.0, 40.0), ("second", 30.0, 60.0), ("second", 24.0, 60.0)):
        results.merge(path, [measured("clip", {"flashpair": ours, "dense": dense}, sources=sources)], results.KEY)
    (row,) = json.loads(path.read_text())
    assert row["previous"]["sources"] == "first" and row["previous"]["milliseconds"]["flashpair"]["median"] == 10.0
    # 24 of 60 against 10 of 40: a machine that is slower today is no regression, this is one.
    assert results.change(row) == pytest.approx(1.6) and results.regressed(row)
    assert report.since(row) == "**slower** 1.60x (first)"
    results.merge(path, [measured("clip", {"flashpair": 13.0, "dense": 60.0}, sources="third")], results.KEY)
    (row,) = json.loads(path.read_text())
    assert results.change(row) == pytest.approx(13 / 24) and not results.regressed(row)
    assert report.since(measured("clip", {"flashpair": 1.0})) == ""


def test_what_a_row_says_of_the_machine():
    row = measured("clip", {"flashpair": 6.0}) | {"peak_gflops": 2000.0, "batch": 1000, "columns": 2000, "width": 500}
    assert results.matmul_units(row, "flashpair") == (4.0, 1.0)  # 1.5 ms a product, four of them needed
    assert results.of_peak(row, "flashpair") == pytest.approx(4 * 2e9 / 6e-3 / 2e12)
    assert results.of_peak(row, "dense") is None and results.matmul_units(row, "dense") is None
    goal = next(g for g in goals.CPU_GOALS if g.peak)
    row |= {"dtype": "float32", "allocator": "warm", "batch": 4096, "columns": 4096, "width": 128}
    row["peak_gflops"] = 3819.0
    state, text, _ = goals.judge(goal, [row])
    assert state == "missed" and text.startswith("75 % (flashpair, clip 4096x128")  # 74.98
    assert goals.judge(goal, [row | {"peak_gflops": 3800.0}])[0] == "partly measured"
    # Told as the text of the goal does: how many times as fast.
    goal = next(g for g in goals.CPU_GOALS if g.faster and g.cases == ("clip",))
    row |= measured("clip", {"flashpair": 10.0, "dense": 40.0}) | {
        k: row[k] for k in ("dtype", "allocator", "batch", "width")
    }
    assert goals.judge(goal, [row])[:2] == ("met", "4.00x (flashpair, clip 4096x128)")


def test_the_peak_is_that_of_this_processor():
    found = machine.fma_peak(1)
    if found is None:
        pytest.skip("no C++ compiler")
    assert found > 1.0


# --- contestants ------------------------------------------------------------------------------------------------------


def test_kept_bytes_are_those_between_the_passes():
    import cases
    import inputs
    import timers

    made = inputs.towers(10.0)(64, 8)
    stored = cases.Implementation(lambda i: (i.x @ i.y.T).exp().sum())
    assert timers.kept_bytes(stored, made) == 64 * 64 * 4
    assert timers.kept_bytes(cases.Implementation(lambda i: (i.x * i.y).sum()), made) == 0


@pytest.mark.parametrize("numbers", [1, 640, 1 << 24])
def test_the_unit_is_the_whole_product(monkeypatch, numbers):
    """In panels that fit `GEMM_NUMBERS`, against the columns of the case."""
    import inputs
    import timers

    monkeypatch.setattr(timers, "GEMM_NUMBERS", numbers)
    made = inputs.remembered(6, 4)
    product = timers.Product(made)
    product()
    last = 6 - (-(-6 // product.panel) - 1) * product.panel
    assert product.out.numel() <= max(numbers, len(made.memory))
    assert (product.out[:last] == made.x.detach()[6 - last :] @ made.memory.T).all()


def test_chunks_are_the_dense_loss(monkeypatch):
    import cases
    import dense
    import gate
    import torch

    monkeypatch.setattr(dense, "CHUNK_ROWS", 7)
    tried = [case for case in cases.CASES if cases.CHUNKED in case.peers]
    assert len(tried) >= 9
    for case in tried:
        inputs = case.make(24, 8).to(torch.float64)
        whole, parts = (
            gate.results_of(cases.Implementation(loss), inputs) for loss in (case.dense, case.peers[cases.CHUNKED].loss)
        )
        assert max(gate.errors(parts, whole)) < 1e-12, case.name


def test_contestants_are_gated_and_timed(tmp_path):
    """Cases of every shape; whoever cannot run says why; forward alone where it is asked for or there is no more."""
    pytest.importorskip("tqdm")
    out = tmp_path / "speed.json"
    who = ["--only", "flashpair", "dense", "chunked", "inf_cl"]
    names = ["clip", "all-triplets", "cross-batch", "nearest", "linear"]
    done = command(
        sys.executable, "bench/run.py", *names, "--quick", *who, "--direction", "forward", "forward+backward",
        "--out", str(out), FLASHPAIR_BACKEND="cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(r["case"], r["direction"]): r for r in json.loads(out.read_text())}
    assert {d for c, d in rows if c == "nearest"} == {"forward"}
    assert {d for c, d in rows if c == "clip"} == {"forward", "forward+backward"}
    both = rows["clip", "forward+backward"]
    assert set(both["milliseconds"]) == set(both["kept_mebibytes"]) == {"flashpair", "dense", "chunked"}
    assert both["not_run"] == {"inf_cl": "runs on NVIDIA GPUs only"}
    assert both["gemm_milliseconds"]["median"] > 0 and both["products"] == 3.0  # S is kept
    assert rows["clip", "forward"]["products"] == 1.0 and not rows["clip", "forward"]["kept_mebibytes"]
    assert rows["cross-batch-memory", "forward"]["columns"] == 16 * 96


def test_a_wrong_contestant_is_reported_and_never_timed(monkeypatch):
    import cases
    import gate

    case = next(c for c in cases.CASES if c.name == "supcon")
    made = {
        "flashpair": cases.Implementation(lambda i: 1.001 * case.dense(i)),
        "peer": cases.Implementation(lambda i: case.dense(i) + 0 * (i.x - i.x.detach()).abs().sqrt().sum()),
    }
    found = gate.Gate("cpu").reasons(case, cases.Job("supcon", 24, 8, "float32"), made, lambda *a: None)
    assert found["flashpair"].startswith("wrong: loss: error 1.0e-03") and "gradient 0: error inf" in found["peer"]
    assert run.is_defect("flashpair", found["flashpair"]) and run.is_defect("peer", found["peer"])
    assert run.is_defect("flashpair", "failed: x") and not run.is_defect("peer", "failed: x")
    assert not run.is_defect("flashpair", "does not fit: 9 GiB")


def test_curves_are_drawn_where_there_are_points(tmp_path):
    pytest.importorskip("matplotlib")
    import curves

    path = tmp_path / "sweep.png"
    rows = [
        measured("clip", {"flashpair": b / 100, "dense": b / 30}, batch=b, width=128)
        | {"dtype": "float32", "allocator": "warm"}
        for b in (1024, 256, 4096)
    ]
    assert not curves.draw(rows[:1], [], path) and not path.exists()
    assert curves.series(rows, "batch", curves.medians)["dense"] == [(b, b / 30) for b in (256, 1024, 4096)]
    assert curves.draw(rows, [], path) and path.stat().st_size > 1000


# --- goals and report -------------------------------------------------------------------------------------------------


def states(rows: list[dict]) -> dict[str, str]:
    return {f"{goal.cases[0]}: {goal.text}": goals.judge(goal, rows)[0] for goal in goals.GOALS}


def test_nothing_is_met_that_was_not_measured():
    assert set(states([]).values()) == {"not measured"}
    assert set(states([unmeasured("clip"), unmeasured("supcon")]).values()) == {"not measured"}
    section = "\n".join(report.goals_section([], "now"))
    assert section.count("| not measured |") == len(goals.GPU_GOALS) and "no GPU has been measured yet" in section
    section = "\n".join(report.goals_section([], "now", goals.CPU_GOALS))
    assert section.count("| not measured |") == len(goals.CPU_GOALS) and "no CPU has been measured yet" in section


def test_goals_are_judged_by_what_was_measured():
    rows = [
        measured("clip", {goals.TRITON: 8.0, goals.CUDA: 12.0, goals.DENSE: 20.0}, extra=300.0),
        measured("supcon", {goals.TRITON: 6.0, goals.CUDA: 8.0, goals.DENSE: 7.0}),
        measured("ms-random", {goals.TRITON: 7.0}),
        measured("batch-hard", {goals.CUDA: 2.0}),
    ]
    found = states(rows)
    assert found["clip: cuda no slower than dense, B ≥ 4096"] == "missed"  # by SupCon
    assert found["clip: cuda at most 1.6x triton"] == "partly measured"
    assert found["clip: at most 10 ms, B = 32768, D = 512"] == "met"
    assert found["clip: at most 18 ms, B = 32768, D = 1024"] == "not measured"
    assert found["clip: at most 256 MiB beyond inputs and gradients, the same"] == "met"
    assert found["supcon: at most 0.65x CLIP"] == "missed"
    assert found["ms-random: at most 1.2x SupCon"] == "partly measured"
    assert found["batch-hard: at most 3 ms, B = 32768, D = 512"] == "met"
    text = goals.judge(goals.GPU_GOALS[0], rows)[1]
    assert "1.14x" in text and "supcon 32768x512" in text


def test_goals_have_the_predictions_that_concern_them():
    sizes = {
        ("clip", 512): 10.0,
        ("clip", 1024): 16.0,
        ("supcon", 512): 5.0,
        ("ntxent", 512): 7.0,
        ("batch-hard", 512): 4.0,
    }
    steps = [{"case": c, "batch": 32768, "width": d, "predicted_ms": t} for (c, d), t in sizes.items()]
    found = {f"{goal.cases[0]}: {goal.text}": goals.predicted(goal, steps) for goal in goals.GOALS}
    assert {name: value for name, value in found.items() if value is not None} == {
        "clip: at most 10 ms, B = 32768, D = 512": 10.0,
        "clip: at most 18 ms, B = 32768, D = 1024": 16.0,
        "supcon: at most 0.65x CLIP": 0.7,  # the worse of both
        "batch-hard: at most 3 ms, B = 32768, D = 512": 4.0,
    }


CODE = """
.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P2 EXIT ;
.L_x_0:
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   MUFU.EX2 R3, R4 ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   MUFU.EX2 R3, R4 ;
        /*0070*/                   FADD R3, R4, R5 ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0090*/                   FADD R3, R4, R5 ;
        /*00a0*/                   FADD R3, R4, R5 ;
.L_x_2:
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
"""


def test_machine_code_is_counted_along_its_shortest_way():
    pytest.importorskip("triton")
    import predict

    code, labels = predict.parsed(CODE)
    assert len(code) == 13 and labels == {".L_x_0": 2, ".L_x_1": 9, ".L_x_2": 11, ".L_x_3": 12}
    # Two before the loop, three in each of its turns, a branch, two additions, the end; the other way is longer.
    assert predict.shortest(code, labels, 8) == (2 + 3 * 8 + 1 + 2 + 1, 8.0, 1)


def test_memory_beyond_its_bound_is_missed():
    goal = next(g for g in goals.GOALS if g.limit == goals.BOUND)
    row = measured("clip", {goals.CUDA: 9.0})
    bound = goals.memory_bound(row)
    assert 512 < bound < 1024  # S would take 2048 MiB
    for value, state in ((bound, "partly measured"), (bound + 1, "missed")):
        row["extra_mebibytes"][goals.CUDA] = value + row["gradient_mebibytes"]
        assert goals.judge(goal, [row])[0] == state


def test_the_report_of_a_gpu(tmp_path, monkeypatch):
    """Stale rows are marked, rows that were not reached are named, and so are the absent peers."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "source_hash", lambda: "now")
    times = {goals.TRITON: 8.0, goals.CUDA: 12.0, goals.DENSE: 20.0}
    rows = [measured("clip", times, sources="before"), measured("supcon", times), unmeasured("siglip")]
    results.merge(tmp_path / f"{GPU.slug}.json", rows, results.KEY)
    monkeypatch.setattr(sys, "argv", ["report.py", "--gpu", GPU.slug])
    assert report.main() == 0
    text = (tmp_path / "nvidia-nothing-100-80gb.md").read_text()
    lines = {line.split(" | ")[0][2:]: line for line in text.splitlines() if " | 32768 | 512 | " in line}
    assert "stale (before)" in lines["clip"] and "stale" not in lines["supcon"]
    assert "not measured (not reached)" in text
    assert "8.00 (8.00-8.00), 5.3 U, 75%" in text  # 8 ms in units of 1.5 ms; 4 products
    assert "- inf_cl: No module named 'inf_cl' (2 rows)" in text
    assert "driver 580, torch 2.11.0 (CUDA 13.0), triton 3.6.0, nvcc 13.0" in text
    goal = next(line for line in text.splitlines() if "at most 10 ms" in line)
    assert "| met | stale |" in goal
    assert (tmp_path / "nvidia-nothing-100-80gb.png").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", ["report.py", "--gpu", "another"])
    with pytest.raises(SystemExit, match=r"no results of 'another'; there are nvidia-nothing-100-80gb"):
        report.main()


def test_a_sweep_that_was_cut_short_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    cpu = {"dtype": "float32", "allocator": "warm"}
    rows = [measured("clip", {"flashpair": 1.0, "dense": 3.0}, batch=4096, width=128) | {"backend": "cpu"} | cpu]
    for row in rows:
        del row["driver"]  # of a GPU's rows only
    results.merge(tmp_path / "speed.json", [*rows, unmeasured("clip", batch=16384, width=128) | cpu], results.KEY)
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main() == 1 and "1 stale rows" in capsys.readouterr().out
    text = "\n".join([*report.speed_section(rows, "now"), *report.speed_details(rows, "now")])
    assert "| clip | 4096x128 | 1.0 | - | **3.00x** |" in text and "inf_cl: No module named 'inf_cl' (clip)" in text


# --- the family beside the peer --------------------------------------------------------------------------------------


def test_the_family_is_gated_and_timed(tmp_path):
    """One loss with a peer, one without; a table with both."""
    pytest.importorskip("pytorch_metric_learning")
    pytest.importorskip("tqdm")
    out = tmp_path / "family.json"
    options = ["NCA", "SemiHard", "--quick", "--rounds", "1", "--out", str(out)]
    done = command(sys.executable, "bench/family.py", *options, FLASHPAIR_BACKEND="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {r["loss"]: r for r in json.loads(out.read_text())}
    assert set(rows) == {"NCALoss", "TripletSemiHardLoss"}
    assert rows["NCALoss"]["ratio"] > 0 and rows["TripletSemiHardLoss"]["why"] == "no such class"

    import family
    import versus

    lines = versus.table(family.SUITE, [r | {"batch": 4096} for r in rows.values()])
    assert any("`NCALoss`" in line and "x**" in line for line in lines)
    assert any("no such class" in line for line in lines)


def test_results_of_other_kinds_are_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    for name in ("speed", "memory", "family", "contrast", "distributed", "nvidia-nothing"):
        (tmp_path / f"{name}.json").write_text("[]")
    assert list(report.gpu_results()) == ["nvidia-nothing"]


def test_every_loss_of_the_family_is_in_its_benchmark():
    import family
    from family_cases import FAMILY

    dense = {"VICRegLoss", "BarlowTwinsLoss", "GeneralPairWeightingLoss"}  # features, or the user's functions
    names = {c.name.split()[0] for c in FAMILY} - dense
    assert names <= {n.split()[0] for n in family.LOSSES}


def test_dense_code_is_gated_and_timed(tmp_path):
    """A loss with dense code beside it, one without."""
    pytest.importorskip("tqdm")
    out = tmp_path / "contrast.json"
    options = ["SimCLR", "MSCLoss", "--quick", "--rounds", "1", "--out", str(out)]
    done = command(sys.executable, "bench/contrast.py", *options, FLASHPAIR_BACKEND="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {r["loss"]: r for r in json.loads(out.read_text())}
    assert rows["SimCLRLoss"]["ratio"] > 0 and rows["MSCLoss"]["why"] == "not written"


def test_a_wrong_loss_is_never_timed(monkeypatch):
    import contrast
    import versus

    wrong = {**contrast.DENSE, "SimCLRLoss": lambda x, y: 1.01 * contrast.sim_clr(x, y)}
    monkeypatch.setattr(contrast, "DENSE", wrong)
    assert versus.gate(contrast.SUITE, "SimCLRLoss").startswith("value or gradient differ by 9.9e-03")
    assert versus.gate(contrast.SUITE, "DCLLoss") == ""


def test_distributed_losses_are_gated_and_timed(tmp_path):
    out = tmp_path / "distributed.json"
    pytest.importorskip("tqdm")
    done = command(
        sys.executable, "bench/distributed.py", "Clip", "--quick", "--out", str(out), FLASHPAIR_BACKEND="cpu"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["case"]: row for row in json.loads(out.read_text())}
    import distributed

    assert set(rows) == {"ClipLoss"}
    for row in rows.values():
        assert {"flashpair, gather", "flashpair, ring", "dense gather"} <= set(row["times"])
        assert all(found["seconds"] > 0 for found in row["times"].values())
        assert row["times"]["flashpair, gather"]["growth"] >= 0
    assert len(distributed.table(list(rows.values()))) >= 2 + 2 + 3
