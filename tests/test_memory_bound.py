"""No B×N matrix: neither saved for the backward pass nor ever resident."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
import torch
from programs import PROGRAMS, on_sides
from support import make

TESTS = Path(__file__).parent


def saved_bytes(program, data, backend: str) -> int:
    """Bytes of all distinct storages saved for the backward pass, but for a mask that the caller holds anyway."""
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with support.forced(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = program.run(data)
    kept.pop(data.pair_mask.untyped_storage().data_ptr(), None)
    del outputs
    return sum(kept.values())


def _bound(data) -> int:
    """Twice the embeddings (inputs; gradients of a scalar) and forty vectors (statistics, parameters, labels)."""
    rows = data.x.shape[0] + (0 if data.y is None else data.y.shape[0])
    return 2 * rows * data.x.shape[1] * data.x.element_size() + 40 * rows * 8


def _data(backend: str, side: str):
    b = 64 if support.interpreted(backend) else 400
    dtype = torch.float64 if support.serves(backend, torch.float64) else torch.float32
    return make(b, b + 10 if side == "rectangle" else None, 16).to(dtype, support.device(backend))


@pytest.mark.parametrize(("program", "side"), on_sides(PROGRAMS))
def test_saved_for_backward(program, side, backend):
    data = _data(backend, side)
    assert saved_bytes(program, data, backend) <= _bound(data)


def test_the_bound_tells_a_matrix():
    """The dense reference, which saves several B×N matrices, must fail the test above."""
    data = _data("dense", "rectangle")
    for program in PROGRAMS:
        if program.name != "no_gradient" and "rectangle" in program.sides:
            assert saved_bytes(program, data, "reference") > _bound(data), program.name


# --- resident memory --------------------------------------------------------------------------------------------------

ROWS, FEATURES = 16384, 64  # S would take 1 GiB
COLUMNS = 400_000  # 98 MiB
MIB = 1 << 20
WORKSPACE = 32 * MIB


def _measure(backend: str, name: str, side: str, rows: int, threads: int) -> None:
    """In a fresh process: print the growth of resident memory in forward + backward, and the bytes of the inputs."""
    from programs import BY_NAME

    import flashpair
    from flashpair import dispatch

    torch.set_num_threads(threads)
    flashpair.set_max_workspace_bytes(flashpair.workspace.MINIMUM_BYTES)
    dispatch.TABLE = (*dispatch.TABLE, support.DENSE)

    def data_of(count: int):
        data = make(2, 2, 2).to(torch.float32)  # the parameters a program does not use stay small
        g = torch.Generator().manual_seed(0)
        x, y = (torch.randn(count, FEATURES, generator=g) / 8 for _ in range(2))
        labels = torch.randint(0, max(count // 8, 1), (count,), generator=g)
        rectangle = side == "rectangle"
        return dataclasses.replace(
            data,
            x=x.requires_grad_(),
            y=y.requires_grad_() if rectangle else None,
            labels=labels,
            ref_labels=labels.clone() if rectangle else None,
        )

    def run(data) -> None:
        with support.forced(backend):
            outputs = BY_NAME[name].run(data)
            loss = sum(torch.where(o.isinf(), 0.0, o).mean() for o in outputs if o.requires_grad)
            loss.backward()

    run(data_of(256))  # code pages, threads and their arenas
    data = data_of(rows)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = _status("VmRSS")
    run(data)
    inputs = sum(t.numel() * t.element_size() for t in (data.x, data.y) if t is not None)
    print(json.dumps({"growth": _status("VmHWM") - before, "inputs": inputs}))


def _measure_columns(backend: str, columns: int, threads: int) -> None:
    """As `_measure`, of a few rows against many columns: a class head, a memory bank."""
    import flashpair

    torch.set_num_threads(threads)
    flashpair.set_max_workspace_bytes(WORKSPACE)

    def run(count: int) -> list[torch.Tensor]:
        x, y = (torch.randn(n, FEATURES).requires_grad_() for n in (64, count))
        Path("/proc/self/clear_refs").write_text("5")
        marks.append(_status("VmRSS"))
        with support.forced(backend):
            (lse,) = flashpair.pair_reduce(x, y, [flashpair.Term(flashpair.Reduction.LOGSUMEXP)], normalize=True)
            lse.sum().backward()
        return [x, y]

    marks: list[int] = []
    run(2048)
    flashpair.release_workspace()
    inputs = sum(t.numel() * t.element_size() for t in run(columns))
    print(json.dumps({"growth": _status("VmHWM") - marks[-1], "inputs": inputs}))


def _measure_listed(count: int) -> None:
    """As `_measure`, of the similarities of a hundred listed pairs of many rows."""
    import flashpair

    def run(rows: int) -> torch.Tensor:
        x = torch.randn(rows, FEATURES)
        listed = torch.randint(rows, (2, 100))
        Path("/proc/self/clear_refs").write_text("5")
        marks.append(_status("VmRSS"))
        flashpair.pair_similarity(x, None, *listed, similarity=flashpair.Similarity.EUCLIDEAN, normalize=True)
        return x

    marks: list[int] = []
    run(2048)
    x = run(count)
    print(json.dumps({"growth": _status("VmHWM") - marks[-1], "inputs": x.numel() * x.element_size()}))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _growth(backend: str, name: str, side: str, rows: int, threads: int = 2) -> tuple[int, int]:
    return _in_a_fresh_process(f"t._measure({backend!r}, {name!r}, {side!r}, {rows}, {threads})", threads)


def _in_a_fresh_process(call: str, threads: int) -> tuple[int, int]:
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import test_memory_bound as t; {call}"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return found["growth"], found["inputs"]


@pytest.fixture
def high_water_mark():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the high-water mark of resident memory cannot be reset here: {error}")


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("clip", "rectangle"),
        ("siglip", "rectangle"),
        ("supcon", "self"),
        ("multi_similarity", "self"),
        ("lifted", "self"),
    ],
)
def test_resident_growth_with_the_smallest_workspace(name, side, fused, high_water_mark):
    if support.interpreted(fused) or support.device(fused) != "cpu":
        pytest.skip("a CPU backend is measured")
    threads = 2
    growth, inputs = _growth(fused, name, side, ROWS, threads)
    # Beyond the promise: labels, statistics and their gradients, a dozen vectors of 16384 rows (1.5 MiB in float64),
    # and the pages that malloc rounds up.
    allowed = 5 * inputs + threads * 2 * MIB + 3 * MIB
    assert growth <= allowed, f"grew by {growth / MIB:.1f} MiB; inputs {inputs / MIB:.1f}, allowed {allowed / MIB:.1f}"


def test_resident_growth_of_many_columns(fused, high_water_mark):
    """One gradient of the columns; no copy of them, whole or per thread."""
    if support.interpreted(fused) or support.device(fused) != "cpu":
        pytest.skip("a CPU backend is measured")
    growth, inputs = _in_a_fresh_process(f"t._measure_columns({fused!r}, {COLUMNS}, 2)", 2)
    allowed = inputs + WORKSPACE + 24 * MIB  # statistics, orders and norms of 400,000 columns take 20
    assert growth <= allowed, f"grew by {growth / MIB:.1f} MiB; inputs {inputs / MIB:.1f}, allowed {allowed / MIB:.1f}"


def test_resident_growth_of_few_listed_pairs(high_water_mark):
    """A norm a row; no row is copied to be divided by it."""
    growth, inputs = _in_a_fresh_process(f"t._measure_listed({COLUMNS})", 2)
    allowed = 4 * COLUMNS + 8 * MIB
    assert growth <= allowed < inputs / 4, f"grew by {growth / MIB:.1f} MiB; allowed {allowed / MIB:.1f}"


def test_the_measurement_sees_a_matrix(high_water_mark):
    """The dense backend with an S of 16 MiB."""
    growth, inputs = _growth("dense", "clip", "rectangle", ROWS // 8)
    assert growth > 16 * MIB > 5 * inputs
