"""Tile configurations measured on this machine's GPU: the rows that win over the table of `kernels/configs.py`.

    python bench/tune.py --write kernels/tuned.json          every kernel at every width, 16-bit inputs
    python bench/tune.py stats weights --width 512 --dtype float32 --tf32      some; only printed
    python bench/tune.py --shape 8192 8192 768 --dtype bfloat16 --write mine.json      those of one shape
    FLASHPAIR_TUNED=mine.json python train.py                uses them
    python bench/tune.py --list --width 512                  what is tried first, compiled; asks for no GPU

From the table's configuration on, one property of the tiles is varied after the other. What does not compile, spills or
needs too much shared memory is dropped; so is what does not compute what the table's computes, on ragged sizes. The
others are timed in turns by CUDA events: the launches of the kernel alone, the L2 cache filled with other data before
each sample. What is ahead in nine rounds of ten, by 2 % in the median, takes the place. A row is written where the last
comparison with the table says so, as soon as it is there; where the table has won, its row is taken out.
Nothing is ever tuned that was not asked for. Exit status: 0; 1: not everything was tuned; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ahead_of_time
import machine
import torch
import torch.nn.functional as F
from gate import DeviceLost, errors, reason_of
from results import merge, spread
from torch import Tensor

from flashpair import Axis, Extreme, Mask, Precision, Reduction, Term, mine, pair_reduce, use_backend

KERNELS = ("weights", "stats", "extremes", "top_k")  # in the order of what there is to gain
WIDTHS = (512, 1024, 128, 256, 64, 32)  # likewise
KEY = ("kernel", "kind", "architecture", "width")
ROWS = 16384  # of both sides where no shape is asked for
RAGGED = (1999, 2031)  # at most so many are compared
COMPILED = (272, 336)  # so many are compiled for: neither B nor N is compiled in
ROUNDS, LAST_ROUNDS = 9, 21
GAIN = 0.02  # of the time, that a candidate must save
TF32 = 2.0**-10  # its rounding
SCALE, NEIGHBOURS = 10.0, 32
CONTEXT = "spawn"  # of the compilers' processes: a fork of one that has touched a GPU cannot use it


@dataclass(frozen=True)
class Task:
    """One row: a kernel, its arithmetic, and the shape that it is timed on."""

    kernel: str
    kind: str
    architecture: int
    shape: tuple[int, int, int]  # B, N, D
    dtype: str

    @property
    def start(self):
        """The table's configuration."""
        from flashpair.kernels import configs

        return configs.from_table(self.kernel, self.kind, self.architecture, self.shape[2])

    @property
    def key(self) -> dict[str, Any]:
        from flashpair.kernels import configs

        values = (self.kernel, self.kind, self.architecture, configs.width_of(self.shape[2]))
        return dict(zip(KEY, values, strict=True))

    @property
    def precision(self) -> Precision:
        return Precision.TF32 if self.kind == "tf32" else Precision.IEEE

    def __str__(self) -> str:
        return f"{self.kernel} {self.kind} {'x'.join(map(str, self.shape))} {self.dtype}"


# --- what is computed -------------------------------------------------------------------------------------------------


@dataclass
class Data:
    x: Tensor  # (B, D)
    y: Tensor  # (N, D)
    labels: Tensor  # (B,), each of them also in y
    ref_labels: Tensor  # (N,)
    precision: Precision

    @property
    def columns(self) -> dict[str, Any]:
        """y where it has a length of its own; else x is compared with itself."""
        own = len(self.x) != len(self.y)
        return {"y": self.y, "ref_labels": self.ref_labels} if own else {}


def make(task: Task, rows: int, columns: int, device: str) -> Data:
    """Random embeddings, about four of each label."""
    dtype, classes = getattr(torch, task.dtype), max(min(rows, columns) // 4, 1)
    generator = torch.Generator().manual_seed(rows + columns)
    x, y = (F.normalize(torch.randn(n, task.shape[2], generator=generator)) for n in (rows, columns))
    x, y = (t.to(device, dtype).requires_grad_(task.kernel == "weights") for t in (x, y))
    labels, ref_labels = (torch.arange(n, device=device) % classes for n in (rows, columns))
    return Data(x, y, labels, ref_labels, task.precision)


def towers(d: Data) -> Sequence[Tensor]:
    """CLIP's statistics."""
    terms = [Term(Reduction.LOGSUMEXP, axis=axis, scale=SCALE) for axis in (Axis.ROWS, Axis.COLUMNS)]
    return pair_reduce(d.x, d.y, terms, precision=d.precision)


def classes(d: Data) -> Sequence[Tensor]:
    """SupCon's."""
    terms = [Term(Reduction.LOGSUMEXP, scale=SCALE), Term(Reduction.SUM, mask=Mask.SAME, scale=SCALE)]
    return pair_reduce(d.x, terms=terms, labels=d.labels, normalize=True, precision=d.precision, **d.columns)


def hardest(d: Data) -> Sequence[Tensor]:
    """Furthest positive, closest negative."""
    extremes = [Extreme(Mask.SAME, largest=False), Extreme(Mask.DIFFERENT, largest=True)]
    found = mine(d.x, extremes=extremes, labels=d.labels, normalize=True, precision=d.precision, **d.columns)
    return [f.values for f in found]


def nearest(d: Data) -> Sequence[Tensor]:
    (found,) = mine(d.x, extremes=[Extreme(k=NEIGHBOURS)], normalize=True, precision=d.precision, y=d.y)
    return [found.values]


#: What each kernel is timed on.
PROGRAMS = {"stats": (towers, classes), "weights": (towers, classes), "extremes": (hardest,), "top_k": (nearest,)}
#: Cases of cases.py that take the same configuration, and must not spill with it either.
SHARED_BY = {
    "stats": ("clip", "supcon", "ms-random", "circle"),
    "weights": ("clip", "siglip", "ntxent", "ms-random", "circle", "contrastive"),
    "extremes": ("batch-hard", "ms-random"),
    "top_k": ("nearest",),
}


def call_of(kernel: str, program: Callable[[Data], Sequence[Tensor]], d: Data) -> Callable[[], Sequence[Tensor]]:
    """A call that launches the kernel, beside it what folds its partials, and returns what is to be compared."""
    if kernel != "weights":
        return lambda: program(d)
    total = sum(output.sum() for output in program(d))
    leaves = [d.x, d.y] if program is towers or d.columns else [d.x]
    return lambda: torch.autograd.grad(total, leaves, retain_graph=True)


# --- candidates -------------------------------------------------------------------------------------------------------

_HELD = 16  # entries of S that a thread has in a part, about


def _parts(rows: int, columns: int, warps: int) -> int:
    """The fewest parts that leave a thread few entries."""
    return next((p for p in (1, 2, 4) if rows * columns <= _HELD * 32 * warps * p), 4)


def shapes(c, kernel: str) -> Iterator:
    """Of tiles whose accumulators take 32 to 128 registers of a thread; more than 64 leave none for a second tile."""
    from flashpair.kernels.configs import ONE_AT_ONCE

    for rows, columns, warps in itertools.product((64, 128, 256), (64, 128, 256), (4, 8)):
        accumulators = rows * columns / (32 * warps)
        if 32 <= accumulators <= 128:
            parts = c.parts if kernel == "top_k" else _parts(rows, columns, warps)
            plain = ONE_AT_ONCE if c.plain and accumulators > 64 else c.plain
            yield replace(c, block_b=rows, block_n=columns, warps=warps, parts=parts, plain=plain)


def parts(c, kernel: str) -> Iterator:
    return (replace(c, parts=p) for p in ((1, 2, 4) if kernel != "top_k" else ()))


def pipelines(c, kernel: str) -> Iterator:
    return (replace(c, block_d=d, stages=stages) for d in (16, 32, 64, 128) for stages in (2, 3, 4, 5))


def plain_tiles(c, kernel: str) -> Iterator:
    of = (None, (2, 128), (3, 128), (3, 168), (4, 168), (4, 255))
    return (replace(c, plain=plain) for plain in (of if kernel != "top_k" else ()))


def registers(c, kernel: str) -> Iterator:
    return (replace(c, registers=most) for most in (None, 128, 168, 255))


def groups(c, kernel: str) -> Iterator:
    return (replace(c, group=group) for group in (4, 8, 16, 32))


STEPS = (shapes, parts, pipelines, plain_tiles, registers, groups)


def candidates(step: Callable, config, task: Task) -> list:
    """What a step makes of a configuration, as far as a row may say it."""
    from flashpair.kernels import configs

    found = []
    for candidate in step(config, task.kernel):
        try:
            configs.tile_config(dataclasses.asdict(candidate))
        except ValueError:
            continue
        if candidate != config and candidate.block_d <= task.key["width"]:
            found.append(candidate)
    return found


def launches_of(task: Task, config, call: Callable[[], object]) -> list[ahead_of_time.Launch]:
    """The launches of the task's kernel that a call makes with a configuration, on CPU tensors, without their work."""
    from flashpair.kernels import configs

    with configs.override(config):
        found = ahead_of_time.record(call, task.architecture, task.precision)
    return [launched for launched in found if launched.name == f"_{task.kernel}_kernel"]


def compiler_against(task: Task, config) -> str:
    """What the compiler says against a candidate on what it would be timed on."""
    d = make(task, *COMPILED, "cpu")
    found = [
        launched
        for program in PROGRAMS[task.kernel]
        for launched in launches_of(task, config, lambda p=program: call_of(task.kernel, p, d)())
    ]
    return ahead_of_time.objection(found, task.architecture)


def case_against(task: Task, config, name: str) -> str:
    """The same of a loss that would take the configuration too."""
    from cases import CASES

    case = next(case for case in CASES if case.name == name)
    inputs = case.make(COMPILED[0], task.shape[2]).to(getattr(torch, task.dtype))

    def call() -> None:
        loss = case.flashpair(inputs)
        if loss.requires_grad:
            loss.backward()

    found = ahead_of_time.objection(launches_of(task, config, call), task.architecture)
    return f"{name}: {found}" if found else ""


class Compilers:
    """Processes that compile side by side; what they compiled is then in Triton's cache."""

    def __init__(self) -> None:
        self.pool: ProcessPoolExecutor | None = None

    def against(self, task: Task, configs: list) -> list[str]:
        """What the compiler says against each candidate."""
        return self._answers([(compiler_against, task, config) for config in configs])

    def others_against(self, task: Task, config) -> str:
        """What it says against a candidate for the losses that share the row."""
        return next(filter(None, self._answers([(case_against, task, config, c) for c in SHARED_BY[task.kernel]])), "")

    def _answers(self, calls: list[tuple]) -> list[str]:
        if self.pool is None:
            workers = max(len(os.sched_getaffinity(0)) - 1, 1)
            self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context(CONTEXT))
        waiting = [self.pool.submit(*call) for call in calls]
        try:
            return [future.result() for future in waiting]
        except BrokenProcessPool:  # one has ended its process, and all others would wait for ever
            self.pool = None
            return [self._alone(call) for call in calls]

    def _alone(self, call: tuple) -> str:
        with ProcessPoolExecutor(1, multiprocessing.get_context(CONTEXT)) as pool:
            try:
                return pool.submit(*call).result()
            except BrokenProcessPool:
                return "ends the compiler's process"


# --- on the device ----------------------------------------------------------------------------------------------------


class KernelTimer:
    """Milliseconds of launches by CUDA events, what they read having left the L2 cache."""

    def __init__(self, device: str) -> None:
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self.other = torch.empty(size, dtype=torch.uint8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, launches: list[ahead_of_time.Launch]) -> float:
        self.other.zero_()
        self.start.record()
        for launched in launches:
            launched.start()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


class Trials:
    """A task on a device: whether a candidate is right, and how long its launches take."""

    def __init__(self, task: Task, device: str, timer: Callable[[list[ahead_of_time.Launch]], float]) -> None:
        self.task, self.timer = task, timer
        B, N, _ = task.shape
        small = make(task, min(B, RAGGED[0]), min(N, RAGGED[1] if B != N else RAGGED[0]), device)
        whole = make(task, B, N, device)
        self.small, self.whole = ([call_of(task.kernel, p, d) for p in PROGRAMS[task.kernel]] for d in (small, whole))
        self.truth = [self._run(call, task.start)[0] for call in self.small]
        self.launches: dict[Any, list[ahead_of_time.Launch]] = {}

    def _run(self, call, config) -> tuple[list[Tensor], list[ahead_of_time.Launch]]:
        """What a call gives with a configuration, and the kernel's launches."""
        from flashpair.kernels import configs

        with configs.override(config), ahead_of_time.recording(starts=True) as launches:
            found = [t.detach().double() for t in call()]
        return found, [launched for launched in launches if launched.name == f"_{self.task.kernel}_kernel"]

    def _allowed(self) -> float:
        """Of the largest entry: float32 in another order; rounded pair weights and gradients where there are any."""
        if self.task.kernel == "weights" and self.task.kind != "ieee":
            return TF32 if self.task.kind == "tf32" else 2 * torch.finfo(getattr(torch, self.task.dtype)).eps
        return 64 * torch.finfo(torch.float32).eps

    def against(self, config) -> str:
        """What is against a candidate; empty where it is right."""
        try:
            for call, truth in zip(self.small, self.truth, strict=True):
                found = max(errors(self._run(call, config)[0], truth))
                if not found <= self._allowed():
                    return f"wrong: error {found:.1e}, allowed {self._allowed():.1e}"
        except Exception as error:  # of the compiler or the driver
            return reason_of(error)
        return ""

    def sample(self, config) -> float:
        """Milliseconds of all launches of the kernel."""
        if config not in self.launches:
            self.launches[config] = [launched for call in self.whole for launched in self._run(call, config)[1]]
        return self.timer(self.launches[config])

    def release(self) -> None:
        """Partials and pair weights of the candidates that were timed."""
        self.launches.clear()


# --- the search -------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """The configuration that won, and the times of the last comparison, in turns."""

    config: Any
    milliseconds: list[float]
    table_milliseconds: list[float]
    tried: int

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.milliseconds, self.table_milliseconds, strict=True)]

    @property
    def is_ahead(self) -> bool:
        return ahead(self.ratios)


def ahead(ratios: list[float]) -> bool:
    """Whether times of these ratios are shorter, and not by chance."""
    of = spread(ratios)
    return of["median"] <= 1 - GAIN and of["high"] < 1


def in_turns(configs: list, sample: Callable[[Any], float], rounds: int) -> dict[Any, list[float]]:
    """Samples of each, round by round; each round begins with another one."""
    for config in configs:
        sample(config)
    found: dict[Any, list[float]] = {config: [] for config in configs}
    for r in range(rounds):
        for config in configs[r % len(configs) :] + configs[: r % len(configs)]:
            found[config].append(sample(config))
    return found


def search(
    task: Task,
    against: Callable[[list], list[str]],  # what is against each candidate; empty where nothing is
    last_against: Callable[[Any], str],  # asked of those alone that would win a step
    sample: Callable[[Any], float],
    say: Callable[[str], None] = print,
    release: Callable[[], None] = lambda: None,
) -> Found:
    """The best configuration that steps from the table's lead to; the table's own where none is better."""
    best, tried = task.start, {task.start}
    for step in STEPS:
        new = [config for config in candidates(step, best, task) if config not in tried]
        tried.update(new)
        reasons = dict(zip(new, against(new), strict=True))
        rivals = [config for config in new if not reasons[config]]
        for config in new:
            if reasons[config]:
                say(f"  dropped {told(config)}: {reasons[config]}")
        times = in_turns([best, *rivals], sample, ROUNDS) if rivals else {}
        base = times.pop(best, [])
        ratios = {c: [t / b for t, b in zip(of, base, strict=True)] for c, of in times.items()}
        for config in sorted(ratios, key=lambda c: spread(ratios[c])["median"]):
            if not ahead(ratios[config]):
                continue
            reason = last_against(config)
            if reason:
                say(f"  dropped {told(config)}: {reason}")
                continue
            say(f"  {step.__name__}: {told(config)}, {spread(ratios[config])['median']:.3f}x")
            best = config
            break
        release()
    times = in_turns(list(dict.fromkeys([task.start, best])), sample, LAST_ROUNDS)
    release()
    return Found(best, times[best], times[task.start], len(tried))


def told(c) -> str:
    plain = f", plain {c.plain[0]} stages and {c.plain[1]} registers" if c.plain else ""
    most = f", {c.registers} registers" if c.registers else ""
    shape = f"{c.block_b}x{c.block_n}x{c.block_d} in {c.parts}"
    return f"{shape}, {c.warps} warps, {c.stages} stages, group {c.group}{most}{plain}"


# --- rows -------------------------------------------------------------------------------------------------------------


def row_of(task: Task, found: Found, described: dict[str, str]) -> dict[str, Any]:
    return {
        **task.key, "tile": dataclasses.asdict(found.config), "shape": list(task.shape), "dtype": task.dtype,
        "milliseconds": spread(found.milliseconds), "table_milliseconds": spread(found.table_milliseconds),
        "times_table": spread(found.ratios), "tried": found.tried, **described,
    }  # fmt: skip


def keep(path: Path, task: Task, found: Found, described: dict[str, str]) -> None:
    """The row of what won; none where the table has."""
    if found.is_ahead:
        merge(path, [row_of(task, found, described)], KEY)
    elif path.exists():
        rows = [row for row in json.loads(path.read_text()) if {name: row[name] for name in KEY} != task.key]
        path.write_text(json.dumps(rows, indent=1) + "\n")


# --- the command ------------------------------------------------------------------------------------------------------


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="kernel", help=f"of {', '.join(KERNELS)} (default: all)")
    parser.add_argument("--width", type=int, nargs="+", help=f"D, at B = N = {ROWS} (default: {WIDTHS})")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("B", "N", "D"), help="one shape instead")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--tf32", action="store_true", help="float32 products through the tensor cores")
    parser.add_argument("--write", type=Path, metavar="PATH", help="the rows' file (default: they are only printed)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after this time")
    parser.add_argument("--list", action="store_true", help="the first candidates of each step, compiled; no GPU")
    parser.add_argument("--architecture", type=int, choices=[80, 89, 90, 100], default=90, help="of --list")
    options = parser.parse_args(given)
    unknown = [name for name in options.kernels if name not in KERNELS]
    if unknown:
        parser.error(f"unknown kernel {', '.join(map(repr, unknown))}; kernels are {', '.join(KERNELS)}")
    if options.tf32 and options.dtype != "float32":
        parser.error(f"--tf32 needs --dtype float32; got {options.dtype}")
    if options.shape and options.width:
        parser.error("--shape and --width exclude each other")
    if min(options.shape or options.width or [1]) < 1:
        parser.error(f"sizes must be positive; got {options.shape or options.width}")
    return options


def tasks(options: argparse.Namespace, architecture: int) -> list[Task]:
    kind = "half" if options.dtype != "float32" else "tf32" if options.tf32 else "ieee"
    shapes = [tuple(options.shape)] if options.shape else [(ROWS, ROWS, d) for d in options.width or WIDTHS]
    return [Task(k, kind, architecture, s, options.dtype) for s in shapes for k in options.kernels or KERNELS]


def show(wanted: list[Task]) -> None:
    """What each step makes of the table's configuration, and what the compiler says of it."""
    compilers = Compilers()
    for task in wanted:
        print(f"{task}, compute capability {task.architecture / 10}: {told(task.start)}")
        for step in STEPS:
            found = candidates(step, task.start, task)
            for config, reason in zip(found, compilers.against(task, found), strict=True):
                print(f"  {step.__name__:<12} {told(config)}: {reason or 'sound'}", flush=True)


def tune(task: Task, device: str, timer, compilers: Compilers, path: Path | None, described: dict[str, str]) -> bool:
    """Search, say what was found, and keep it in the file; False where the table's own configuration fails."""
    print(f"{task}: {told(task.start)}", flush=True)
    try:
        trials = Trials(task, device, timer)

        def against(candidates: list) -> list[str]:
            said = zip(candidates, compilers.against(task, candidates), strict=True)
            return [reason or trials.against(config) for config, reason in said]

        found = search(task, against, partial(compilers.others_against, task), trials.sample, release=trials.release)
    except Exception as error:
        print(f"  not tuned: {reason_of(error)}", flush=True)
        return False
    ratio, ms = spread(found.ratios), spread(found.milliseconds)
    verdict = told(found.config) if found.is_ahead else "the table's stays"
    spreads = f"{ratio['median']:.3f}x ({ratio['low']:.3f}-{ratio['high']:.3f}) the table's time"
    print(f"  {verdict}: {ms['median']:.3f} ms, {spreads}, {found.tried} tried", flush=True)
    if path:
        keep(path, task, found, described)
    return True


def main(given: list[str] | None = None) -> int:
    start, options = time.monotonic(), arguments(given)
    if options.list:
        show(tasks(options, options.architecture))
        return 0
    import flashpair

    state = flashpair.backends()["triton"]
    if state != "usable" or not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no GPU" if not torch.cuda.is_available() else f"triton: {state}"
        print(f"bench/tune.py: nothing was measured: {reason}", file=sys.stderr)
        return 2
    from flashpair.kernels import configs

    if os.environ.get(configs.VARIABLE):
        print(f"{configs.VARIABLE} is set; candidates are compared with the table all the same", flush=True)
    wanted, done = tasks(options, configs.architecture(torch.device("cuda"))), 0
    described, timer, compilers = machine.describe("cuda"), KernelTimer("cuda"), Compilers()
    try:
        with use_backend("triton"):
            for task in wanted:
                if time.monotonic() - start > options.seconds:
                    break
                done += tune(task, "cuda", timer, compilers, options.write, described)
    except DeviceLost as error:
        print(f"the GPU is lost: {error}", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(f"{done} of {len(wanted)} tuned{f'; wrote {options.write}' if options.write else ''}", flush=True)
    return int(done < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
