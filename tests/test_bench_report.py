"""Goals, predictions and the report: nothing is met that was not measured, stale rows show."""

from __future__ import annotations

import sys

import pytest
from bench_support import GPU, measured, unmeasured

import goals  # isort: skip
import machine  # isort: skip
import report  # isort: skip
import results  # isort: skip


def states(rows: list[dict]) -> dict[str, str]:
    return {f"{goal.cases[0]}: {goal.text}": goals.judge(goal, rows)[0] for goal in goals.GOALS}


def test_nothing_is_met_that_was_not_measured():
    assert set(states([]).values()) == {"not measured"}
    assert set(states([unmeasured("clip"), unmeasured("supcon")]).values()) == {"not measured"}
    section = "\n".join(report.goals_section([]))
    assert section.count("| not measured |") == len(goals.GPU_GOALS) and "no GPU has been measured yet" in section
    section = "\n".join(report.goals_section([], goals.CPU_GOALS))
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
    monkeypatch.setattr(machine, "source_hash", lambda device: "now")
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
    assert "nvcc 13.0, measured tiles 0123, commit" in report.provenance([rows[0] | {"tuned": "0123"}])[0]
    assert report.provenance([rows[0] | {"tuned": "-"}]) == report.provenance(rows[:1])
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
    text = "\n".join([*report.speed_section(rows), *report.speed_details(rows)])
    assert "| clip | 4096x128 | 1.0 | - | **3.00x** |" in text and "inf_cl: No module named 'inf_cl' (clip)" in text


def test_the_machine_shown_is_the_one_measured_last():
    """On one day it is the one whose rows are of today's sources, not the one that has more."""
    row = {"date": "2026-01-02", "threads": 2, "sources": "old"}
    rows = [
        {**row, "device": "A"},
        {**row, "device": "A"},
        {**row, "device": "B", "sources": machine.source_hash("cpu")},
    ]
    assert {r["device"] for r in report.newest_machine(rows)} == {"B"}
    assert {r["device"] for r in report.newest_machine([*rows[:2], {**row, "device": "C"}])} == {"A"}
    later = {**row, "date": "2026-01-03", "device": "C"}
    assert {r["device"] for r in report.newest_machine([*rows, later])} == {"C"}
    assert report.newest_machine([]) == []


def test_narrow_rows_of_a_cpu_say_so():
    """Beside those of float32: in the table of README, in its details, and what the processor has for them."""
    rows = [
        measured("clip", {"flashpair": 1.0, "dense": 3.0 + wide}, batch=4096, width=128)
        | {"backend": "cpu", "allocator": "warm", "dtype": dtype, "bfloat16": "amx_bf16"}
        for wide, dtype in enumerate(("bfloat16", "float32"))
    ]
    for row in rows:
        del row["driver"]  # of a GPU's rows only
    text = "\n".join(report.speed_section(rows))
    assert "| clip | 4096x128 bfloat16 | 1.0 | - | **3.00x** |" in text
    assert "| clip | 4096x128 | 1.0 | - | **4.00x** |" in text
    narrow, wide = sorted(report.provenance(rows), key=len, reverse=True)
    assert "backend cpu, bfloat16 by amx_bf16, commit abc" in narrow and "backend cpu, commit abc" in wide
    details = "\n".join(report.speed_details(rows))
    assert "| clip | 4096x128 | bfloat16 | forward+backward | warm | flashpair |" in details


def test_results_of_other_kinds_are_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    for name in ("speed", "memory", "family", "contrast", "distributed", "nvidia-nothing"):
        (tmp_path / f"{name}.json").write_text("[]")
    assert list(report.gpu_results()) == ["nvidia-nothing"]
