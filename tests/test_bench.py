"""Rows and contestants of the benchmarks: right before fast, what a row says, what it replaces."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time

import pytest
import torch
from bench_support import command, measured, unmeasured

import flashpair

import goals  # isort: skip
import machine  # isort: skip
import report  # isort: skip
import results  # isort: skip
import run  # isort: skip


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


def test_cuvs_is_called_as_documented(monkeypatch):
    """By a stand-in of its exact index: build(dataset, metric=), search(index, queries, k), device arrays."""
    import dense
    import inputs
    import peers

    class BruteForce:
        def build(dataset, metric):
            assert metric == "inner_product" and not dataset.requires_grad
            return dataset

        def search(index, queries, k):
            found = (queries @ index.T).topk(k)
            return found.values.numpy(), found.indices.numpy()

    made = inputs.labelled(4, inputs.RANDOM)(96, 8)
    with pytest.raises(peers.CannotRun, match="runs on NVIDIA GPUs only"):
        peers.cuvs_nearest(made)
    monkeypatch.setattr(peers, "installed", lambda *a: BruteForce)
    torch.testing.assert_close(peers.cuvs_nearest(made), dense.dense_nearest(made).detach())
    with pytest.raises(peers.CannotRun, match="serves float32 and float16 only"):
        peers.cuvs_nearest(made.to(torch.bfloat16))


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


@pytest.mark.parametrize("name", ["ms-halfway", "batch-hard"])
def test_narrow_inputs_excuse_no_missing_gradient(name):
    """Where dense code in bfloat16 loses a fifth and more of the gradient; flashpair is held to what float32 loses."""
    import cases
    import gate

    case = next(c for c in cases.CASES if c.name == name)
    absent = lambda i: case.dense(i).detach() + 0 * i.x.sum()  # noqa: E731
    off = lambda i: case.dense(i.widened()) + 0.2 * (i.x - i.x.detach()).sum()  # noqa: E731
    made = {
        "peer": absent,
        "dense": case.dense,
        "flashpair": off,
        "dense in float32": lambda i: case.dense(i.widened()),
    }
    made = {n: cases.Implementation(loss) for n, loss in made.items()}
    found = gate.Gate("cpu").reasons(case, cases.Job(name, 256, 16, "bfloat16"), made, lambda *a: None)
    assert found["peer"].startswith("wrong: gradient 0: error 1.0e+00")
    assert found["flashpair"].startswith("wrong: gradient 0: error ") and found["flashpair"].endswith("allowed 3.1e-02")
    assert found["dense"] == found["dense in float32"] == ""


def test_narrow_rows_have_a_dense_rival_in_float32():
    """On CPUs; it takes as much memory as float32 inputs do, the others half."""
    import cases
    import inputs

    case = next(c for c in cases.CASES if c.name == "clip")
    for device, dtype, there in (("cpu", "bfloat16", True), ("cpu", "float32", False), ("cuda", "bfloat16", False)):
        assert (cases.WIDENED in case.implementations(device, dtype)) == there
    needed = {name: case.needs_bytes(name, 512, "bfloat16") for name in ("dense", cases.WIDENED, "flashpair")}
    assert needed == {"dense": 2 * 6 * 512**2, cases.WIDENED: 4 * 6 * 512**2, "flashpair": 0}
    assert case.needs_bytes("dense", 512) == needed[cases.WIDENED]
    made = inputs.remembered(8, 4).to(torch.bfloat16)
    wide = made.widened()
    assert wide.x.dtype == wide.memory.dtype == torch.float32 and wide.labels is made.labels
    wide.x.sum().backward()
    assert made.x.grad.dtype == torch.bfloat16


def test_the_hardest_pairs_are_decided_in_every_dtype():
    """The first inputs of this size that float32 can decide are undecided once they are narrowed."""
    import dense
    import inputs

    made = inputs.decided(620, 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.nn.functional.normalize(made.x.detach().to(dtype).double())
        for sign, mask in zip((-1, 1), dense.masks(made.labels), strict=True):
            of_kind = (sign * x @ x.T).masked_fill(~mask, -2)
            assert (-of_kind.topk(2).values.diff()).min() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_a_step_never_sees_the_inputs_of_the_one_before(dtype):
    """In any dtype, without drifting away."""
    import cases
    import inputs
    import timers

    made = inputs.labelled(4, inputs.RANDOM)(8, 4).to(dtype)
    first, seen = made.x.detach().clone(), []
    look = cases.Implementation(lambda i: (seen.append(i.x.detach().clone()), i.x.sum())[1])
    timer = timers.HostTimer(made, results.BOTH)
    timer.steps["look"] = 4
    timer.sample("look", look)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))
    assert torch.equal(made.x, first) and torch.equal(seen[1], first)
    torch.testing.assert_close(seen[0], first)


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


@pytest.mark.skipif(flashpair.backends()["cpu"] != "usable", reason="compares threads of the cpu backend")
def test_threads_are_compared(capsys, products_per_thread):
    import threads

    threads.main(["--batch", "8", "16", "--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["8", "16"]
    assert all(float(time) > 0 for line in lines[1:] for time in line.split()[1:])
    assert torch.ops.flashpair_cpu.set_products_per_thread(1) == 1  # as before
