"""The benchmarks beside peers: the losses of a family, and of processes that share a batch."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch
from bench_support import command


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
    assert rows["SimCLRLoss"]["ratio"] > 0 and rows["MSCLoss"]["ratio"] > 0


def test_a_wrong_loss_is_never_timed(monkeypatch):
    import contrast
    import versus

    wrong = {**contrast.DENSE, "SimCLRLoss": lambda x, y: 1.01 * contrast.sim_clr(x, y)}
    monkeypatch.setattr(contrast, "DENSE", wrong)
    assert versus.gate(contrast.SUITE, "SimCLRLoss").startswith("value or gradient differ by 9.9e-03")
    assert versus.gate(contrast.SUITE, "DCLLoss") == ""
    for bad in (lambda x, y: (x, y * torch.nan), lambda x, y: (x * torch.nan, y)):  # a gradient alone
        nan = lambda x, y, bad=bad: contrast.dcl(x, y) + 0 * sum((v - v.detach()).nansum() for v in bad(x, y))  # noqa: E731
        monkeypatch.setitem(contrast.DENSE, "DCLLoss", nan)
        assert versus.gate(contrast.SUITE, "DCLLoss") == "value or gradient differ by nan"


def test_what_takes_too_long_is_said_not_run(monkeypatch):
    import contrast
    import versus

    asked = []

    def answer(command, threads):
        asked.append(command)
        return {"minutes": 14.2} if "--part" in command else {"seconds": 100.0, "growth": 1 << 20}

    monkeypatch.setattr(versus, "answer", answer)
    options = argparse.Namespace(
        rounds=1, seconds=1.0, minutes=3.0, threads=1, large=True, quick=False, batch=65536, width=64
    )
    row = versus.measure(contrast.SUITE, "DCLLoss", options)
    assert len(asked) == 1 and versus.describe_row(row) == "not run: about 14 minutes"
    assert "| not run: about 14 minutes | - |" in versus.table(contrast.SUITE, [row])[-1]
    options.minutes = 20.0
    row = versus.measure(contrast.SUITE, "DCLLoss", options)
    assert len(asked) == 3 and "| 100 s | 1 MiB |" in versus.table(contrast.SUITE, [row])[-1]


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


def test_the_newest_row_of_a_loss_is_shown_and_which_size_is_stale(monkeypatch):
    """One of the sources as they are before later ones of others, else the last that was measured."""
    import contrast
    import machine
    import versus

    monkeypatch.setattr(machine, "source_hash", lambda device: "now")
    facts = {"loss": "DCLLoss", "device": "some CPU", "threads": 2, "torch": "2", "why": ""}
    timed = facts | {"batch": 4096, "ratio": 3.0, "low": 2.0, "high": 4.0}
    large = facts | {"batch": 65536, "seconds": 13.0, "growth": 1 << 20}
    old = timed | {"seconds": 0.1, "sources": "before", "date": "2026-01-03"}
    older = timed | {"seconds": 0.2, "sources": "before", "date": "2026-01-02"}
    now = timed | {"seconds": 0.3, "sources": "now", "date": "2026-01-01"}

    def shown(*rows: dict) -> str:
        return next(line for line in versus.table(contrast.SUITE, list(rows)) if line.startswith("| `DCLLoss`"))

    assert shown(old, now, older).startswith("| `DCLLoss` | 300 ms |") and shown(old, now).endswith("|  |")
    assert shown(older, old).startswith("| `DCLLoss` | 100 ms |") and shown(older, old).endswith("| stale |")
    before = large | {"sources": "before", "date": "2026-01-01"}
    assert shown(now, before).endswith("| stale (B = 65,536) |")
    assert shown(old, before).endswith("| stale |")
    assert shown(now, before | {"sources": "now"}).endswith("|  |")


def test_only_the_kept_results_are_shown_in_the_docs(tmp_path, monkeypatch):
    """Rows of `--out` elsewhere are not all there are."""
    import contrast
    import machine
    import versus

    written, row = [], {"loss": "DCLLoss", "batch": 1, "width": 1, "device": "", "seconds": 1.0, "why": "", "date": ""}
    monkeypatch.setattr(versus, "write_table", lambda suite, rows: written.append(rows))
    monkeypatch.setattr(versus, "measure", lambda suite, name, options: row)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    for out, shown in (([], 1), (["--out", "contrast.json"], 2), (["--out", "other.json"], 2), (["--quick"], 2)):
        monkeypatch.setattr(sys, "argv", ["contrast.py", "DCLLoss", *out])
        assert versus.main(contrast.SUITE, "") == 0
        assert len(written) == shown, out
