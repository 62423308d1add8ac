"""Measured tile configurations without a GPU: candidates, the search with a fake timer, and which rows launches take.

What touches kernels runs under Triton's interpreter, in a process of its own, since Triton decides at import.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import replace

import own_process
import pytest
import torch
from bench_support import GPU, command

from flashpair import Reduction, Score, Term, pair_sum

pytest.importorskip("triton", reason="no Triton wheel for this platform")
from flashpair.kernels import configs, launch

import ahead_of_time  # isort: skip
import gpu  # isort: skip
import tune  # isort: skip

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, which sets TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted, not compiled")

WIDE = configs.TileConfig(64, 256, 32, 8, 3, parts=4, group=16, registers=168, plain=(2, 128))
if INTERPRETED:
    import interpreting

    interpreting.hasten()

ROW = {"kernel": "stats", "kind": "half", "architecture": 90, "width": 512, "tile": dataclasses.asdict(WIDE)}


def task(kernel: str = "stats", kind: str = "half", architecture: int = 90, shape=(16384, 16384, 512)) -> tune.Task:
    return tune.Task(kernel, kind, architecture, shape, "bfloat16" if kind == "half" else "float32")


@compiled
def test_in_a_process_of_its_own():
    own_process.run(__file__, "-k", "compared or tuned_to_a_row", TRITON_INTERPRET="1")


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def tuned_files(tmp_path, monkeypatch):
    """Writes rows where launches look for them: of the package, or of the user."""
    monkeypatch.setattr(configs, "TUNED", tmp_path / "tuned.json")
    monkeypatch.delenv(configs.VARIABLE, raising=False)
    configs.tuned.cache_clear()

    def write(*rows: dict, own: bool = False):
        path = tmp_path / "own.json" if own else configs.TUNED
        path.write_text(json.dumps(rows))
        if own:
            monkeypatch.setenv(configs.VARIABLE, str(path))
        configs.tuned.cache_clear()
        return path

    yield write
    configs.tuned.cache_clear()


def chosen() -> dict:
    """Every choice, at widths around the ends of the buckets."""
    widths = sorted({w + d for w in configs.WIDTHS for d in (-1, 0, 1)} | {1, 5000})
    return {
        (kernel, kind, arch, D, crowded): configs.choose(kernel, kind, arch, D, crowded)
        for kernel in configs._KEY["kernel"]
        for kind in configs.KINDS
        for arch in configs.ARCHITECTURES
        for D in widths
        for crowded in (False, True)
    }


def test_without_rows_the_table_decides(tuned_files):
    by_table = chosen()
    for (kernel, kind, arch, D, crowded), config in by_table.items():
        entry = "crowded" if crowded and kernel != "top_k" else kernel
        assert config == configs.from_table(entry, kind, arch, D)
    tuned_files()
    assert chosen() == by_table


def test_a_row_serves_its_bucket_and_nothing_else(tuned_files):
    by_table = chosen()
    top_k = {**ROW, "kernel": "top_k", "kind": "ieee", "architecture": 80, "width": 1024}
    tuned_files(ROW, top_k)
    changed = {place for place, config in chosen().items() if config != by_table[place]}
    want = {("stats", "half", 90, D, False) for D in (257, 511, 512)}
    want |= {("top_k", "ieee", 80, D, crowded) for D in (513, 1023, 1024, 1025, 5000) for crowded in (False, True)}
    assert changed == want
    assert {configs.choose(*place) for place in changed} == {WIDE}


def test_own_rows_win_over_those_of_the_package(tuned_files):
    tuned_files(ROW, {**ROW, "kernel": "weights"})
    own = replace(WIDE, warps=4)
    tuned_files({**ROW, "tile": dataclasses.asdict(own)}, own=True)
    assert configs.choose("stats", "half", 90, 512) == own
    assert configs.choose("weights", "half", 90, 512) == WIDE
    with configs.override(replace(WIDE, group=1)):
        assert configs.choose("stats", "half", 90, 512).group == 1


@compiled
def test_launches_take_the_row(tuned_files):
    """Of their kernel, arithmetic, architecture and width."""
    tuned_files({**ROW, "kernel": "weights"})
    x = torch.zeros(40, 300, dtype=torch.bfloat16, requires_grad=True)

    def tiles(d: int, architecture: int = 90) -> set[str]:
        run = lambda: pair_sum(x[:, :d], x[:, :d], [Term(Reduction.SUM, Score.SQUARE)])  # noqa: E731
        return {launched.tile() for launched in ahead_of_time.record(run, architecture)}

    mine = "64x256x32 in 4, 8 warps, 3 stages"
    assert mine in tiles(300) and mine not in tiles(256) | tiles(300, 80)


def without(name: str) -> dict:
    return {k: v for k, v in ROW["tile"].items() if k != name}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kernel": "fold"}, "kernel must be one of 'stats', 'weights', 'extremes', 'top_k'; got 'fold'"),
        ({"kernel": "crowded"}, "kernel must be one of 'stats', "),
        ({"kind": "fp8"}, "kind must be one of 'half', 'tf32', 'ieee'; got 'fp8'"),
        ({"architecture": 86}, "architecture must be one of 80, 89, 90, 100; got 86"),
        ({"architecture": "90"}, "architecture must be one of 80, 89, 90, 100; got '90'"),
        ({"width": 300}, "width must be one of 32, 64, 128, 256, 512, 1024; got 300"),
        ({"tile": None}, "it must have kernel, kind, architecture, width and a tile; got {"),
        ({"tile": {"block_b": 100}}, "block_b must be one of 16, 32, 64, 128, 256; got 100"),
        ({"tile": {"block_d": 64.0}}, "block_d must be one of 16, 32, 64, 128; got 64.0"),
        ({"tile": {"warps": True}}, "warps must be one of 1, 2, 4, 8, 16; got True"),
        ({"tile": {"parts": 8}}, "parts must be one of 1, 2, 4; got 8"),
        ({"tile": {"stages": 0}}, "stages must be one of 1, 2, 3, 4, 5, 6, 7, 8; got 0"),
        ({"tile": {"group": 0}}, "group must be one of 1, 2, ..., 128; got 0"),
        ({"tile": {"registers": 300}}, "registers must be one of None, 24, ..., 255; got 300"),
        ({"tile": {"plain": [3]}}, "plain must be None or (stages, registers); got [3]"),
        ({"tile": {"plain": [3, 512]}}, "registers of plain must be one of 24, 25, ..., 255; got 512"),
        ({"tile": {"block_n": 32}}, "parts must leave 16 columns of block_n = 32; got 4"),
        ({"tile": {"warps": 16}}, "registers must be at most 128 with 16 warps; got 168"),
        ({"tile": {"warps": 16, "registers": None, "plain": [2, 255]}}, "registers of plain must be at most 128 with"),
        ({"tile": {"colour": 1}}, "colour is no field of a tile; there are block_b, block_n, "),
        ({"width": 64, "tile": {"block_d": 128}}, "block_d must be at most the width, 64; got 128"),
    ],
    ids=lambda v: None if isinstance(v, str) else str(v)[1:-1],
)
def test_a_row_that_is_not_valid_is_named(tuned_files, row, message):
    changed = {**ROW, **row}
    if isinstance(row.get("tile"), dict):
        changed["tile"] = {**ROW["tile"], **row["tile"]}
    path = tuned_files(ROW, changed, own=True)
    with pytest.raises(ValueError) as error:
        configs.choose("extremes", "ieee", 80, 16)
    assert str(error.value).startswith(f"FLASHPAIR_TUNED: {path}, row 1: {message}")


def test_a_file_that_is_none_is_named(tuned_files, monkeypatch, tmp_path):
    path = tuned_files({**ROW, "tile": without("warps")})
    with pytest.raises(ValueError, match=r"tuned.json, row 0: warps is missing"):
        configs.choose("stats", "half", 90, 512)
    for text, message in (("{}", "must be a list of rows; got dict"), ("[", "holds no tuned tiles: Expecting value")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            configs.choose("stats", "half", 90, 512)
    path.write_text("[]")
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path / "nowhere.json"))
    with pytest.raises(ValueError, match=r"FLASHPAIR_TUNED: .*nowhere.json holds no tuned tiles: .*No such file"):
        configs.choose("stats", "half", 90, 512)


def test_vectors_are_padded_to_whole_tiles_of_every_row():
    assert all(launch.padded_length(n) % block == 0 for n in (1, 255, 257) for block in configs._TILE["block_b"])


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_candidates_are_rows_that_can_be_read(kernel):
    for kind in configs.KINDS:
        for architecture in configs.ARCHITECTURES:
            for width in (32, 512):
                of = task(kernel, kind, architecture, (16384, 16384, width))
                found = [c for step in tune.STEPS for c in tune.candidates(step, of.start, of)]
                assert of.start not in found and len(found) > 12
                for config in found:
                    assert configs.tile_config(json.loads(json.dumps(dataclasses.asdict(config)))) == config
                    assert config.block_d <= width


@compiled
def test_the_compiler_drops_what_does_not_fit(monkeypatch, capfd):
    """What spills, what takes too much shared memory, and what it cannot make anything of."""
    of = task("top_k")
    assert tune.compiler_against(of, replace(of.start, block_b=128)) == ""
    assert tune.compiler_against(of, replace(of.start, block_n=128, warps=4)).startswith("_top_k_kernel spills ")
    large = tune.compiler_against(of, replace(of.start, block_d=128, stages=8))
    assert large.startswith("_top_k_kernel needs ") and large.endswith(" KiB of shared memory, 227 are there")
    few = tune.compiler_against(of, replace(of.start, registers=24))
    assert few.startswith("_top_k_kernel does not compile: ptxas fatal ") and "register" in few
    assert capfd.readouterr().out == ""  # not the kernel in the assembler's language
    monkeypatch.setattr(ahead_of_time, "compiled", lambda *a: 1 / 0)
    assert tune.compiler_against(of, of.start) == "_top_k_kernel does not compile: division by zero"


@compiled
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_losses_that_share_a_row_are_compiled_with_it(kernel, monkeypatch):
    """In its arithmetic and with its tile; what they say names the loss."""
    of = task(kernel, "tf32")
    seen: list[ahead_of_time.Launch] = []
    monkeypatch.setattr(ahead_of_time, "objection", lambda launches, architecture: (seen.extend(launches), "spills")[1])
    for name in tune.SHARED_BY[kernel]:
        before = len(seen)
        assert tune.case_against(of, replace(of.start, group=3), name) == f"{name}: spills" and len(seen) > before
    assert {launched.name for launched in seen} == {f"_{kernel}_kernel"}
    assert {(launched.arguments["GROUP"], launched.arguments["INPUT_PRECISION"]) for launched in seen} == {(3, "tf32")}


@compiled
def test_a_candidate_that_ends_the_compiler_is_dropped_alone(monkeypatch):
    """Its process ends; the others are compiled after all."""
    of = task("top_k")
    compilers = tune.Compilers()
    monkeypatch.setattr(tune, "CONTEXT", "fork")
    monkeypatch.setattr(tune, "compiler_against", ended_by_eight_stages)
    found = [replace(of.start, stages=stages) for stages in (7, 8, 6)]
    assert compilers.against(of, found) == ["", "ends the compiler's process", ""]


def ended_by_eight_stages(of: tune.Task, config) -> str:
    return os._exit(1) if config.stages == 8 else ""


# --- the search -------------------------------------------------------------------------------------------------------


def faked(of: tune.Task, cost, against=lambda c: "", last_against=lambda c: "", noise=0.0) -> tune.Found:
    """A search in which a configuration takes `cost` of it, give or take."""
    generator = torch.Generator().manual_seed(0)
    sample = lambda c: cost(c) * (1 + noise * (2 * torch.rand((), generator=generator).item() - 1))  # noqa: E731
    said = []
    found = tune.search(of, lambda cs: [against(c) for c in cs], last_against, sample, said.append)
    return found, said


def test_the_search_walks_to_what_is_fastest():
    """Property by property, past what is dropped; the ratio is of the last comparison."""
    of = task()
    wanted = replace(of.start, block_b=64, parts=2, stages=3, group=16)
    fields = [field.name for field in dataclasses.fields(wanted)]
    cost = lambda c: 1.0 + sum(getattr(c, n) != getattr(wanted, n) for n in fields)  # noqa: E731
    found, said = faked(of, cost, noise=0.05)
    assert found.config == wanted and found.is_ahead and found.tried > 30
    assert [line.split(":")[0].strip() for line in said] == ["shapes", "pipelines", "groups"]
    assert 0.15 < sorted(found.ratios)[10] < 0.25  # 1 of 5
    found, said = faked(of, cost, against=lambda c: "spills" if c.stages == 3 else "")
    assert found.config == replace(wanted, stages=4)
    assert sum(line.strip().endswith(": spills") for line in said) > 3
    found, said = faked(of, cost, last_against=lambda c: "circle: spills" if c.block_b == 64 else "")
    assert found.config == replace(wanted, block_b=128)


def test_what_is_not_clearly_faster_changes_nothing(tmp_path):
    of, other = task(), lambda c: 0.0 if c == task().start else 1.0
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROW, {**ROW, "kernel": "weights"}]))
    for cost, noise in ((lambda c: 1 - 0.01 * other(c), 0.0), (lambda c: 1 - 0.04 * other(c), 0.5)):
        found, said = faked(of, cost, noise=noise)
        assert found.config == of.start and not found.is_ahead and said == []
    tune.keep(path, of, found, {})  # a row of old is taken out
    assert [row["kernel"] for row in json.loads(path.read_text())] == ["weights"]
    tune.keep(tmp_path / "none.json", of, found, {})
    assert not (tmp_path / "none.json").exists()


def test_what_wins_becomes_a_row(tuned_files):
    of = task("weights", shape=(8192, 4096, 700))
    found, _ = faked(of, lambda c: {16: 1.5, 32: 1.0}.get(c.group, 2.0))
    described = {"device": GPU.name, "date": "2026-11-29", "sources": "abc", "commit": "def"}
    for _ in range(2):
        tune.keep(configs.TUNED, of, found, described)
    (row,) = json.loads(configs.TUNED.read_text())
    assert {k: row[k] for k in tune.KEY} == {"kernel": "weights", "kind": "half", "architecture": 90, "width": 1024}
    assert row["shape"] == [8192, 4096, 700] and row["dtype"] == "bfloat16" and row["device"] == GPU.name
    assert (row["milliseconds"]["median"], row["table_milliseconds"]["median"]) == (1.0, 2.0)
    assert row["times_table"] == {"median": 0.5, "low": 0.5, "high": 0.5, "samples": tune.LAST_ROUNDS}
    configs.tuned.cache_clear()
    assert configs.choose("weights", "half", 90, 1000) == replace(of.start, group=32)


# --- on a device ------------------------------------------------------------------------------------------------------

SMALL = {"stats": (33, 33, 16), "weights": (20, 33, 16), "extremes": (33, 33, 16), "top_k": (17, 33, 16)}


@interpreted
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_candidates_are_compared_and_timed(kernel, monkeypatch):
    """On ragged sizes, against the table's; the launches that are timed can be started again."""
    timed = []

    def timer(launches) -> float:
        for launched in launches:
            launched.start()
        timed.append(launches)
        return 1.0

    monkeypatch.setattr(tune, "RAGGED", (31, 33))
    monkeypatch.setattr(tune, "NEIGHBOURS", 3)
    of = task(kernel, architecture=80, shape=SMALL[kernel])
    start = ahead_of_time.Launch.start

    def broken(launched) -> None:
        """A compiler that turns the sign of x in the kernel."""
        if "x_ptr" in launched.arguments:
            launched = replace(launched, arguments=launched.arguments | {"x_ptr": -launched.arguments["x_ptr"]})
        start(launched)

    with tune.use_backend("triton"):
        trials = tune.Trials(of, "cpu", timer)
        right = replace(of.start, block_b=16, block_n=32, block_d=16, parts=2, warps=4)
        assert trials.against(right) == ""
        monkeypatch.setattr(ahead_of_time.Launch, "start", broken)
        assert trials.against(right).startswith("wrong: error ")
        monkeypatch.setattr(ahead_of_time.Launch, "start", lambda launched: 1 / 0)
        assert trials.against(right) == "failed: ZeroDivisionError: division by zero"
        monkeypatch.setattr(ahead_of_time.Launch, "start", start)
        assert trials.sample(right) == trials.sample(right) == 1.0
    assert (
        len(timed) == 2 and timed[0] is timed[1] and {launched.name for launched in timed[0]} == {f"_{kernel}_kernel"}
    )
    assert {launched.arguments["BLOCK_B"] for launched in timed[0]} == {16}
    trials.release()
    assert not trials.launches


@interpreted
def test_a_task_is_tuned_to_a_row(tuned_files, monkeypatch, capsys):
    """From the first candidate to the launch that takes the row; all but the times and the compiler is real."""

    class Compilers:
        def against(self, task, candidates) -> list[str]:
            return ["spills" if c.group == 16 else "" for c in candidates]

        def others_against(self, task, config) -> str:
            return "circle: spills" if config.group == 4 else ""

    monkeypatch.setattr(tune, "STEPS", (tune.groups,))
    monkeypatch.setattr(tune, "NEIGHBOURS", 3)
    of = task("top_k", architecture=80, shape=SMALL["top_k"])
    timer = lambda launches: {4: 1.0, 16: 1.0, 32: 2.0}.get(launches[0].arguments["GROUP"], 3.0)  # noqa: E731
    with tune.use_backend("triton"):
        assert tune.tune(of, "cpu", timer, Compilers(), configs.TUNED, {"device": GPU.name})
        configs.tuned.cache_clear()
        with ahead_of_time.recording(starts=True) as launches:
            tune.nearest(tune.make(of, *SMALL["top_k"][:2], "cpu"))
    assert {launched.arguments["GROUP"] for launched in launches if launched.name == "_top_k_kernel"} == {32}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[-1] for line in lines[1:3]] == ["spills", "spills"] and "0.667x (0.667-0.667)" in lines[-1]
    monkeypatch.setattr(tune, "Trials", lambda *a: 1 / 0)
    assert not tune.tune(of, "cpu", timer, Compilers(), configs.TUNED, {})
    assert capsys.readouterr().out.splitlines()[-1] == "  not tuned: failed: ZeroDivisionError: division by zero"


# --- the command ------------------------------------------------------------------------------------------------------


@compiled
def test_without_a_gpu_nothing_is_measured(tmp_path):
    path = tmp_path / "rows.json"
    done = command(sys.executable, "bench/tune.py", "--write", str(path))
    assert done.returncode == 2 and done.stdout == "" and not path.exists()
    assert done.stderr.startswith("bench/tune.py: nothing was measured: ") and done.stderr.endswith(" sees no GPU\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["fold"], "unknown kernel 'fold'; kernels are weights, stats, extremes, top_k"),
        (["--tf32"], "--tf32 needs --dtype float32; got bfloat16"),
        (["--shape", "8", "8", "8", "--width", "8"], "--shape and --width exclude each other"),
        (["--shape", "8", "0", "8"], "sizes must be positive; got [8, 0, 8]"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_what_cannot_be_tuned_is_refused(given, message, capsys):
    with pytest.raises(SystemExit) as error:
        tune.arguments(given)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_tasks_are_those_asked_for():
    found = tune.tasks(tune.arguments([]), 90)
    assert [(t.kernel, t.shape[2]) for t in found[:5]] == [
        ("weights", 512), ("stats", 512), ("extremes", 512), ("top_k", 512), ("weights", 1024),
    ]  # fmt: skip
    assert {t.key["width"] for t in found} == set(configs.WIDTHS) and {t.kind for t in found} == {"half"}
    (one,) = tune.tasks(tune.arguments(["stats", "--shape", "9", "8", "7", "--dtype", "float32", "--tf32"]), 80)
    assert one == tune.Task("stats", "tf32", 80, (9, 8, 7), "float32")


def test_the_stage_of_make_gpu_writes_what_the_package_carries(tmp_path, monkeypatch):
    """Asked for by name only; its rows are copied beside the results."""
    assert "tune" not in gpu.DEFAULT and gpu.arguments(["tune"]).stages == ["tune"]
    ((_, program, *rest),) = gpu.STAGES["tune"].commands(GPU, 1200.0)
    assert program == "bench/tune.py" and tune.arguments(rest).seconds <= 1200.0
    assert tune.arguments(rest).write == gpu.TUNED == gpu.ROOT / "kernels" / "tuned.json"
    monkeypatch.setattr(gpu, "TUNED", tmp_path / "tuned.json")
    (tmp_path / "tuned.json").write_text("[]")
    (tmp_path / "out").mkdir()
    gpu.mirror(GPU, tmp_path / "out")
    assert (tmp_path / "out" / "tuned.json").read_text() == "[]"
