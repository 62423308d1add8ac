"""Which memory is measured, and what a measurement says."""

from __future__ import annotations

import sys

import bench_support  # noqa: F401
import pytest
import torch

import memory  # isort: skip


def options(monkeypatch, *given: str):
    monkeypatch.setattr(sys, "argv", ["memory.py", *given])
    return memory.arguments()


def measured_by(jobs: list[tuple]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for case, _, _, implementation, _ in jobs:
        found.setdefault(case, []).append(implementation)
    return {case: list(dict.fromkeys(names)) for case, names in found.items()}


def test_an_implementation_is_measured_for_the_losses_that_have_it(monkeypatch):
    cases = [case for case in memory.all_cases() if case.name in ("clip", "supcon", "cross-batch-memory")]
    jobs = memory.jobs_of(cases, options(monkeypatch, "--sweep"))
    shared = ["flashpair", "dense", "compile"]
    assert measured_by(jobs) == {
        "clip": [*shared, "chunked", "open_clip"],
        "supcon": [*shared, "chunked", "metric-learning"],
        "cross-batch-memory": [*shared, "metric-learning"],
    }
    assert {batch for _, batch, *_ in jobs} == {1024, 2048, 4096, 8192, 16384, 32768}
    jobs = memory.jobs_of(cases, options(monkeypatch, "--implementations", "flashpair", "open_clip"))
    assert [job[3:] for job in jobs if job[0] == "clip"] == [
        ("flashpair", "default"), ("flashpair", "smallest"), ("open_clip", "default"),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="no loss asked for has the implementation 'open-clip'; there are flashpair, "):
        memory.jobs_of(cases, options(monkeypatch, "--implementations", "open-clip"))


def test_the_queue_of_the_peer_is_the_same_loss():
    pytest.importorskip("pytorch_metric_learning")
    from inputs import RANDOM, labelled

    made = labelled(4, RANDOM)(32, 8)
    functions = (memory.cross_batch_memory, memory.peer_cross_batch_memory)
    ours, theirs = ([loss, *torch.autograd.grad(loss, made.x)] for loss in (f(made) for f in functions))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_peers_are_measured_or_say_why_not():
    found = {
        name: memory.measure("clip", 300, 8, name, "default", torch.get_num_threads()) for name in ("chunked", "inf_cl")
    }
    assert found["inf_cl"] == {"not_run": "runs on NVIDIA GPUs only"}
    assert found["chunked"]["mebibytes"] >= 0 and found["chunked"]["columns"] == 300
