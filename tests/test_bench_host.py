"""What a step costs the host (bench/host.py), and what a measurement on a CPU depends on."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from bench_support import ROOT

import machine  # isort: skip
from cases import CASES  # isort: skip
from timers import step  # isort: skip


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""), reason="kernels are interpreted")
def test_host_time_is_measured_beside_triton_and_dense_code(tmp_path, capsys):
    pytest.importorskip("triton", reason="no Triton wheel for this platform")
    import host

    host.main(["clip", "--rounds", "1", "--steps", "1", "--out", str(tmp_path / "host.json")])
    (row,) = json.loads((tmp_path / "host.json").read_text())
    assert set(row["milliseconds"]) == {"flashpair", "decided anew", "recorded", "by Triton", "dense"}
    assert set(row["times_flashpair"]) == {"decided anew", "recorded", "by Triton", "dense"}
    # Statistics and weights by plain and mixed tiles, a fold each, and the formula.
    assert row["kernels"] == 7 and 0 < row["operators"]["flashpair"] < row["operators"]["dense"]
    assert row["driver"] in ("stand-in", "Triton's") and not machine.is_stale(row)
    assert "| clip | " in capsys.readouterr().out


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""), reason="kernels are interpreted")
def test_by_triton_goes_round_what_is_remembered():
    pytest.importorskip("triton", reason="no Triton wheel for this platform")
    import host
    from flashpair.kernels import start
    from stand_in import standing_in

    case = next(c for c in CASES if c.name == "clip")
    inputs = case.make(32, 16).to(torch.bfloat16)
    with standing_in():
        with host.by_triton(), host.counting_kernels() as kernels:
            step(case.implementations()["flashpair"], inputs)
        assert kernels and not start.known
        step(case.implementations()["flashpair"], inputs)
        assert start.known


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""), reason="kernels are interpreted")
def test_contestants_record_and_play_what_they_say(monkeypatch):
    pytest.importorskip("triton", reason="no Triton wheel for this platform")
    import host
    from stand_in import standing_in

    from flashpair import recording

    made, finish = [], recording.Recorder.finish
    monkeypatch.setattr(recording.Recorder, "finish", lambda self, found: made.append(self) or finish(self, found))
    case = next(c for c in CASES if c.name == "clip")
    inputs = case.make(32, 16).to(torch.bfloat16)
    with standing_in():
        for during, passes in ((host.recorded, [2, 4, 6]), (recording.deciding_anew, [0, 0, 0])):
            made.clear()
            for expected in passes:
                with during():
                    step(case.implementations()["flashpair"], inputs)
                assert len(made) == expected and not recording.recordings


def test_a_pattern_that_meets_no_case_is_refused(capsys):
    pytest.importorskip("triton", reason="no Triton wheel for this platform")
    import host

    with pytest.raises(SystemExit):
        host.main(["no such case"])
    assert "no case contains one of ['no such case']; cases are clip, siglip" in capsys.readouterr().err


#: Functions of the sources of GPUs that a CPU asks whether they can serve.
_ASKED = {"unavailable", "why_not", "_import_failure", "_interpreted"}


@pytest.mark.parametrize("name", ["clip", "siglip", "supcon", "ms-random", "batch-hard", "nearest"])
def test_a_cpu_runs_nothing_that_its_rows_do_not_depend_on(name):
    case = next(c for c in CASES if c.name == name)
    inputs = case.make(64, 16)
    left_out = {str(ROOT / path) for path in machine.GPU_ONLY}
    seen = set()

    def profile(frame, event, argument):
        code = frame.f_code
        if event == "call" and (code.co_filename in left_out or f"{os.sep}kernels{os.sep}" in code.co_filename):
            seen.add((Path(code.co_filename).name, code.co_name))

    step(case.implementations()["flashpair"], inputs, "forward" if name == "nearest" else "forward+backward")
    sys.setprofile(profile)
    try:
        step(case.implementations()["flashpair"], inputs, "forward" if name == "nearest" else "forward+backward")
    finally:
        sys.setprofile(None)
    assert {of for _, of in seen} <= _ASKED, seen


def test_rows_of_a_cpu_and_of_a_gpu_depend_on_their_own_sources(tmp_path, monkeypatch):
    of_cpu = {
        "csrc/weights_cpu.h": True, "csrc/weights_cuda.cu": False, "kernels/tiles.py": False,
        "python/flashpair/backward.py": False, "python/flashpair/losses/clip.py": True,
    }  # fmt: skip
    for path in of_cpu:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    monkeypatch.setattr(machine, "ROOT", tmp_path)

    def hashes() -> tuple[str, str]:
        machine.source_hash.cache_clear()
        return machine.source_hash("cpu"), machine.source_hash("cuda")

    cpu, cuda = hashes()
    for path, matters in of_cpu.items():
        (tmp_path / path).write_text("changed")
        now = hashes()
        assert (now[0] != cpu) == matters and now[1] != cuda, path
        cpu, cuda = now
    assert machine.is_stale({"sources": cuda}) and not machine.is_stale({"sources": cpu})
    assert machine.is_stale({"sources": cpu, "driver": "580"}) and not machine.is_stale({"sources": cuda, "driver": ""})
    machine.source_hash.cache_clear()


def test_the_table_has_rows_of_the_sources_as_they_are(tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="no Triton wheel for this platform")
    import host

    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "triton.md"
    page.write_text(f"before\n{host.BEGIN}\n{host.END}\nafter\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "is_stale", lambda row: row["device"] == "old")
    time = {"median": 1.0, "low": 0.5, "high": 2.0}

    def row(device: str, *contestants: str) -> dict:
        return {
            "case": "clip", "device": device, "driver": "stand-in", "torch": "2", "date": "today",
            "milliseconds": {host.OURS: time}, "times_flashpair": dict.fromkeys(contestants, time),
            "kernels": 1, "operators": {host.OURS: 2, host.DENSE: 3},
        }  # fmt: skip

    host.write_table([row("old", host.BY_TRITON, host.DENSE)])
    assert (
        "| clip | 1.00 (0.50-2.00) | - | - | 1.00x (0.50-2.00) | 1.00x (0.50-2.00) | 1 | 2 | 3 | stale |"
        in page.read_text()
    )
    host.write_table([row("old"), row("new", host.ANEW, host.BY_TRITON, host.DENSE)])
    assert "old" not in page.read_text() and "- new, driver: stand-in" in page.read_text()
