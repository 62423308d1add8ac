"""Triton's kernels compiled ahead of time, without a GPU, for every architecture that has tile configurations.

The launchers run on CPU tensors with recorders in place of the kernels, so what is compiled is what the programs of
`programs.py` really launch. By default every shipped tile configuration is compiled for one program, and those that are
close to spilling for theirs; `FLASHPAIR_COMPILE_ALL=1` compiles all programs, for every length of the loop over D and
more architectures, and prints what the compiler said.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
from pathlib import Path

import pytest
import support
import torch
from programs import BY_NAME
from torch.utils._python_dispatch import TorchDispatchMode

import flashpair
from flashpair import Extreme, Mask, Precision, Reduction, Score, Term, mine, pair_reduce, pair_sum, recording
from flashpair.workspace import MINIMUM_BYTES

pytest.importorskip("triton", reason="no Triton wheel for this platform")
if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted, not compiled", allow_module_level=True)

from flashpair.kernels import configs, launch, start
from flashpair.kernels.program import PLAIN, TILES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import ahead_of_time
from ahead_of_time import SHARED_MEMORY, Launch, compiled
from stand_in import Driver, Operators, standing_in

ALL = os.environ.get("FLASHPAIR_COMPILE_ALL", "0") not in ("0", "")


# --- what would be launched -------------------------------------------------------------------------------------------


@pytest.fixture
def record(monkeypatch):
    """Runs something on the backend without a device and returns its launches, few tiles listed as in large panels."""

    def run(function, architecture: int = 90, precision: Precision = Precision.IEEE) -> list[Launch]:
        monkeypatch.setattr(launch, "LISTED_TILES", 1)
        return ahead_of_time.record(function, architecture, precision)

    return run


def _tile(c: configs.TileConfig) -> str:
    return f"{c.block_b}x{c.block_n}x{c.block_d} in {c.parts}, {c.warps} warps, {c.stages} stages"


def _data(b: int, n: int | None, d: int, kind: str) -> support.Data:
    return support.make(b, n, d).to(torch.bfloat16 if kind == "half" else torch.float32)


def _mining(*extremes: Extreme):
    return lambda d: mine(d.x, extremes=list(extremes), labels=d.labels, normalize=True)


def _given_sum(d: support.Data):
    return pair_sum(d.x, d.y, [Term(Reduction.SUM, Score.HINGE, Mask.GIVEN, scale=d.scale)], pair_mask=d.pair_mask)


def _positives(d: support.Data):
    return pair_reduce(d.x, terms=[Term(Reduction.LOGSUMEXP, mask=Mask.SAME, scale=d.scale)], labels=d.labels)


#: (function of the data, side); the names of losses are the programs that they use.
PROGRAMS = {
    **{
        name: (BY_NAME[name].run, "rectangle")
        for name in ("clip", "siglip", "cacr", "sum_parameters", "softcap_clip", "log_cosh_parameters", "guide_weight")
    },
    **{
        name: (BY_NAME[name].run, "self")
        for name in (
            "supcon",
            "nt_xent",
            "multi_similarity",
            "in_turn",
            "mean_gap",
            "anchors",
            "means_of_pairs",
            "circle",
            "contrastive",
            "lifted",
            "moments",
            "given",
            "guide_threshold",
        )
    },
    "given_sum": (_given_sum, "rectangle"),
    "positives": (_positives, "self"),
    "batch_hard": (_mining(Extreme(Mask.SAME, False), Extreme(Mask.DIFFERENT, True)), "self"),
    "top_5": (_mining(Extreme(Mask.DIFFERENT, True, 5)), "self"),
    "top_64": (_mining(Extreme(Mask.ALL, True, 64)), "self"),
}


def _run(program: str, kind: str, d: int, b: int = 272, n: int = 336):
    """What a user does: values and gradients of a program in one kind of arithmetic."""
    function, side = PROGRAMS[program]
    data = _data(b, n if side == "rectangle" else None, d, kind)

    def run():
        outputs = function(data)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
        wanted = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
        if wanted:
            torch.autograd.grad([o.sum() for o in wanted], list(data.leaves().values()), allow_unused=True)

    return run


# --- what the compiler says -------------------------------------------------------------------------------------------


def check(launched: Launch, architecture: int, kind: str) -> str:
    """Asserts what every kernel promises; returns one line of facts."""
    found = compiled(launched, architecture)
    facts = (
        f"sm_{architecture} {kind:4} {launched.name:16} {launched.tile()} {found.registers:3} registers, "
        f"{found.spilled} bytes spilled, {found.shared >> 10} KiB shared"
    )
    assert found.spilled == 0, facts
    assert found.shared <= SHARED_MEMORY[architecture], facts
    if launched.name != "_visited_kernel":  # where they give a list its order, which no result depends on
        assert not re.search(r"\b(atom|red)\.", found.ptx), f"{facts}: atomics"
    assert not re.search(r"%(ctaid|nctaid)\.[yz]", found.ptx), f"{facts}: the grid has more than one dimension"
    assert ("tf32" in found.ptx) == (kind == "tf32" and launched.has_product), f"{facts}: tf32"
    if kind == "half" and launched.has_product:
        instruction = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[architecture]
        assert instruction in found.ptx, f"{facts}: no {instruction}"
        assert re.search(r"mma\S*\.f32", found.ptx) or architecture == 100, f"{facts}: accumulator is not float32"
    return facts


# --- the tests --------------------------------------------------------------------------------------------------------

PRECISIONS = {"half": Precision.IEEE, "tf32": Precision.TF32, "ieee": Precision.IEEE}
#: Programs that together start every kernel but those of formulas; the full product has all of them.
SOME = {
    80: ("multi_similarity", "given_sum", "top_5"),
    90: ("supcon", "softcap_clip", "given_sum", "guide_weight", "batch_hard", "top_5"),
    100: ("clip", "given_sum", "batch_hard", "top_5"),
}
#: (architecture, kind, program, D) that need nearly all registers.
TIGHT = [
    (80, "ieee", "nt_xent", 512),
    (80, "half", "supcon", 512),
    (80, "half", "positives", 512),
    (90, "ieee", "nt_xent", 512),
    (90, "half", "positives", 512),
    (90, "half", "top_64", 200),
]


def _cases() -> list[tuple[int, str, str, int]]:
    if ALL:
        return list(itertools.product(configs.ARCHITECTURES, PRECISIONS, PROGRAMS, (512, 40, 20)))
    return [(a, kind, program, 512) for a in SOME for kind in PRECISIONS for program in SOME[a]] + TIGHT


CASES = [pytest.param(*case, id="sm_{}-{}-{}-{}".format(*case)) for case in _cases()]


@pytest.mark.parametrize(("architecture", "kind", "program", "d"), CASES)
def test_compiles(architecture, kind, program, d, record, capsys):
    """Fits registers and shared memory, uses the tensor cores asked for, has no atomics and a 1-D grid."""
    before = len(ahead_of_time.seen)
    for launched in record(_run(program, kind, d), architecture, PRECISIONS[kind]):
        plain = launched.of_pairs and launched.arguments["PROGRAM"][TILES.value] == PLAIN.value
        if plain and not ALL and configs.TABLE["stats", kind, architecture].plain is None:
            continue  # the other tiles' program without its masks
        facts = check(launched, architecture, kind)
        if ALL and len(ahead_of_time.seen) > before and launched.of_pairs:
            with capsys.disabled():
                print(f"\n{facts}, {program}, D = {d}", end="", flush=True)
        before = len(ahead_of_time.seen)


@pytest.mark.parametrize("architecture", sorted(SOME))
@pytest.mark.parametrize(("program", "kernels"), [("mean_gap", 1), ("anchors", 3), ("means_of_pairs", 2)])
def test_formulas_compile(program, kernels, architecture, record):
    names = {"_mean_gap_kernel", "_anchors_kernel", "_pairs_kernel"}
    found = [launched for launched in record(_run(program, "half", 64), architecture) if launched.name in names]
    assert len(found) == kernels
    for launched in found:
        check(launched, architecture, "half")


def test_cases_cover_the_table(record):
    """Every entry of the table of configurations is compiled by default; 89 has the values of 80."""
    used = set()
    for architecture, kind, program, d in (case.values for case in CASES):
        for launched in record(_run(program, kind, d), architecture, PRECISIONS[kind]):
            used.add((launched.name, kind, architecture, launched.tile()))
    for (entry, kind, architecture), config in configs.TABLE.items():
        served = 80 if architecture == 89 and not ALL else architecture
        assert config == configs.TABLE[entry, kind, served]
        kernel = "_weights_kernel" if entry == "crowded" else f"_{entry}_kernel"
        assert (kernel, kind, served, _tile(config)) in used, (entry, kind, architecture)


def test_an_architecture_takes_the_next_lower_entry(monkeypatch):
    found = {}
    for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        found[capability] = configs.architecture(torch.device("cuda"))
    assert found == {(8, 0): 80, (8, 6): 89, (8, 9): 89, (9, 0): 90, (10, 0): 100, (10, 3): 100, (12, 0): 89}


@pytest.mark.parametrize("program", PROGRAMS)
def test_sizes_share_a_compilation(program, record):
    """Neither B nor N is compiled in: other sizes start the same binaries, whole tiles a part of them."""

    def sources(b: int, n: int) -> set[str]:
        return {launched.source().hash() for launched in record(_run(program, "half", 64, b, n))}

    assert sources(128, 256) <= sources(130, 77) == sources(301, 272)
    for launched in record(_run(program, "half", 64)):
        source = launched.source()
        sizes = {"N", "first_b", "first_n", "end_b", "end_n", "rows", "columns", "row_tiles", "column_tiles"}
        sizes |= {"tiles", "length", "first", "state_length", "stripes"}
        for name in sizes & set(source.signature):
            assert source.signature[name] == "i32" and (launched.kernel.arg_names.index(name),) not in source.attrs


@pytest.mark.parametrize("d", [1, 40, 200, 512])
@pytest.mark.parametrize("kind", PRECISIONS)
def test_rows_are_whole_aligned_blocks(kind, d, record):
    """So they are loaded in vectors whatever D is, and binaries for a few D serve all; such rows are not copied."""
    data = _data(40, 50, d + 1, kind)
    wide = torch.zeros(50, 528, dtype=data.x.dtype)
    whole = wide[:, 16 : 16 + d].requires_grad_()  # aligned rows
    shifted = data.x.detach()[:, 1:].requires_grad_()

    def run():
        for x, y in ((whole, shifted), (shifted, whole)):
            pair_sum(x, y, [Term(Reduction.SUM, Score.SQUARE)])
            mine(x, y, [Extreme(), Extreme(k=3)])

    launches = [launched for launched in record(run) if launched.of_pairs]
    assert {launched.name for launched in launches} == {"_weights_kernel", "_extremes_kernel", "_top_k_kernel"}
    for launched in launches:
        block_d, D = launched.arguments["BLOCK_D"], launched.arguments["D"]
        assert D % block_d == 0 and D - d < block_d
        for pointer, stride in (("x_ptr", "stride_xb"), ("y_ptr", "stride_yn")):
            rows = launched.arguments[pointer]
            assert rows.shape[1] == D and rows[:, d:].eq(0).all()
            assert launched.arguments[stride] == rows.stride(0) and rows.stride(0) % 16 == 0
            assert rows.data_ptr() % 16 == 0
        kept = {launched.arguments[p].data_ptr() for p in ("x_ptr", "y_ptr")} & {whole.data_ptr()}
        assert bool(kept) == (d % block_d == 0)


class _NoWaiting(TorchDispatchMode):
    """Refuses the operators that make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique_dim", "_unique2")
        waits |= name == "equal"
        if name.startswith("index"):
            indices = args[1] if isinstance(args[1], (list, tuple)) else []
            waits |= any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        assert not waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_the_guard_against_waiting_works():
    for function in (lambda t: t.sum().item(), lambda t: t[t > 0], lambda t: bool(t.any()), torch.nonzero):
        with pytest.raises(AssertionError, match="waits"), _NoWaiting():
            function(torch.ones(3))


@pytest.mark.parametrize("kind", ["half", "ieee"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_launchers_never_wait(program, kind, record, monkeypatch):
    def guarded(function, *args):
        with _NoWaiting():
            return function(*args)

    for name in ("stats", "weights", "sums", "mine"):
        monkeypatch.setattr(launch, name, functools.partial(guarded, getattr(launch, name)))
    assert record(_run(program, kind, 40))


@pytest.mark.parametrize(
    ("program", "most"), [("clip", 3), ("siglip", 6), ("supcon", 4), ("multi_similarity", 18), ("batch_hard", 13)]
)
def test_passes_over_one_panel_ask_pytorch_for_little(program, most, record, monkeypatch):
    """Forward and backward; at small sizes a step takes as long as its launches."""
    work = Operators()

    def counted(function, *args):
        with work:
            return function(*args)

    for name in ("stats", "weights", "sums", "mine"):
        monkeypatch.setattr(launch, name, functools.partial(counted, getattr(launch, name)))
    monkeypatch.setattr(launch, "add_panel", lambda *args: None)  # two products
    record(_run(program, "half", 64, 512, 768))
    assert len(work.names) <= most, work.names


@pytest.mark.parametrize("budget", [MINIMUM_BYTES, 16 << 20])
@pytest.mark.parametrize("program", PROGRAMS)
def test_buffers_fit_the_workspace(program, budget, record):
    """Partials and pair weights of a launch, largest sizes that users have: never more than the one knob allows."""
    previous = flashpair.set_max_workspace_bytes(budget)
    try:
        found = record(_run(program, "half", 16, 9000, 7001))
    finally:
        flashpair.set_max_workspace_bytes(previous)
    buffers = ("row_partials_ptr", "column_partials_ptr", "weights_ptr", "top_ptr")
    for launched in found:
        held = [launched.arguments[name] for name in buffers if name in launched.arguments]
        assert sum(buffer.numel() * buffer.element_size() for buffer in held) <= budget, launched.name


# --- starting kernels again -------------------------------------------------------------------------------------------


class _Listing(Driver):
    """Keeps what was started: kernel, programs, arguments."""

    def __init__(self, architecture: int) -> None:
        super().__init__(architecture)
        self.seen: list[tuple] = []

    def started(self, kernel, programs: int, arguments: tuple) -> None:
        self.seen.append((kernel, programs, arguments))

    def taken(self) -> list[tuple]:
        found, self.seen = self.seen, []
        return found


def _told(arguments: tuple) -> list:
    """Arguments as far as two launches of one step agree in them: not where tensors are."""
    return [(a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_launch_like_an_earlier_one_gets_what_triton_would_give_it(program, monkeypatch):
    step = _run(program, "half", 64)
    with standing_in(kind=_Listing) as driver:
        step()
        first = driver.taken()  # by Triton, wherever a signature was new
        step()
        again = driver.taken()
        assert recording.recordings
        with monkeypatch.context() as patch:
            for module, name in ((launch, "statistics"), (launch.backward, "weights"), (launch.backward, "sums"),
                                 (launch, "_single"), (launch, "_top_k")):  # fmt: skip
                patch.setattr(module, name, lambda *args, **kwargs: pytest.fail("decided anew"))
            step()
        played = driver.taken()
        start.known.clear()
        with recording.deciding_anew():
            step()
        by_triton = driver.taken()
    assert len(first) == len(by_triton) > 0
    for known in (again, played):
        for (kernel, programs, arguments), (of_triton, wanted, given) in zip(known, by_triton, strict=True):
            assert kernel is of_triton and programs == wanted, kernel.name
            assert _told(arguments) == _told(given), kernel.name


def _launched(driver: _Listing, x: torch.Tensor, **options):
    """Norms of x: its kernel and what came of it."""
    launch._norms(x, options.get("normalize", True), options.get("squared", False))
    ((kernel, _, arguments),) = driver.taken()
    return kernel, arguments


def test_what_triton_compiles_apart_is_never_mistaken():
    whole = torch.empty(1024 * 80 + 8, dtype=torch.bfloat16)
    x = whole[: 1024 * 64].view(1024, 64)
    others = {
        "dtype": x.half(),
        "alignment": whole[1 : 1024 * 64 + 1].view(1024, 64),
        "the first number's divisibility": whole[: 1024 * 65].view(1024, 65)[:, :64],
        "a later number's divisibility": x[:, :40],
    }
    with standing_in(kind=_Listing) as driver:
        kernel, _ = _launched(driver, x)
        for what, other in others.items():
            assert _launched(driver, other)[0] is not kernel, what
            assert _launched(driver, x)[0] is kernel, what
        assert _launched(driver, x, squared=True)[0] is not kernel
        assert _launched(driver, x.clone())[0] is kernel


def test_numbers_reach_the_kernel_as_they_are():
    """A scale that is a number is no part of the signature: another one starts the same kernel, with its value."""
    x = torch.randn(40, 32).bfloat16()
    with standing_in(kind=_Listing) as driver:
        for scale in (3.0, 4.0):
            pair_reduce(x, x, [Term(Reduction.LOGSUMEXP, scale=scale)])
        found = [(k, a) for k, _, a in driver.taken() if k.name == "_stats_kernel"]
        known = len(start.known)
        pair_reduce(x, x, [Term(Reduction.LOGSUMEXP, scale=5.0)])
        assert len(start.known) == known
    kernels, numbers = zip(*((k, a[k.src.fn.arg_names.index("numbers")]) for k, a in found), strict=True)
    assert {values[0] for values in numbers} == {3.0, 4.0}
    assert len(set(map(id, kernels))) == len(kernels) / 2


def test_few_launches_are_remembered(monkeypatch):
    monkeypatch.setattr(start, "_MOST", 3)
    with standing_in(kind=_Listing) as driver:
        for rows in range(300, 310):
            _launched(driver, torch.empty(rows, 64, dtype=torch.bfloat16))
            assert 0 < len(start.known) <= 3


def test_the_stand_in_leaves_nothing_behind():
    from triton.runtime import driver

    before = driver._active
    with standing_in():
        pair_reduce(torch.randn(8, 8), terms=[Term(Reduction.SUM)])
        assert start.known
    assert driver._active is before and not start.known
