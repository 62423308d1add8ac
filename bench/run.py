"""Speed of the losses: flashpair, dense PyTorch, torch.compile of it, row chunks of it, and public peers.

    python bench/run.py                          every case at B = 4096, D = 128 and 512, both allocators
    python bench/run.py clip ms --batch 8192     cases whose name contains a pattern
    python bench/run.py --preset sweep           time against B and against D, for the curves of the report
    python bench/run.py --preset gpu --seconds 150   a GPU's rows, the most telling first, for as long as there is time
    python bench/run.py --quick                  a smoke check at tiny sizes; nothing is kept

Forward + backward, or forward alone. Every implementation is first compared with the dense loss in float64 (value and
all gradients); a wrong one is reported and never timed. Contestants are timed round by round in one process with pinned
threads, one process per allocator setting; short steps several at once. What stays in memory between forward and
backward is counted, and the product that makes S, by torch.mm, takes part as the unit. On a CPU with --dtype bfloat16
or float16 dense code runs in float32 too: processors without such instructions multiply them ten times as slowly, and
--batch 1024 is enough there. On a GPU a sample is several steps between two CUDA events, on copies of the inputs that
together are four times the L2 cache; peak memory is the CUDA allocator's. Results go to bench/results/speed.json, those
of a GPU to a file with its name, each row as soon as it is there; `python bench/report.py` turns them into tables and
pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine
from results import BOTH, GEMM, KEY, matmul_units, merge, of_peak, spread

CHILD = "FLASHPAIR_BENCH_CHILD"
NOT_REACHED = "not reached"
LOST = 3  # exit status of a process whose GPU refuses all further work
CURRENT = machine.ROOT / "out" / "bench-current.json"  # what is being run, for whoever finds the process dead


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="run the cases whose name contains one of these (default: all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[4096])
    parser.add_argument("--width", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rounds", type=int, help="samples of each implementation (default: 7, on a GPU 11)")
    parser.add_argument("--only", nargs="+", help="implementations to run (default: all)")
    parser.add_argument("--allocator", choices=[*machine.ALLOCATORS, "both"], default="both")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--direction", choices=["forward", "forward+backward"], nargs="+", default=["forward+backward"])
    parser.add_argument("--preset", choices=["gpu", "sweep"], help="cases and sizes: of a GPU, of the report's curves")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after this time")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds, results to out/ only")
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/speed.json, or the GPU's name)")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)  # the job to go on with
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)  # they ended a process
    options = parser.parse_args()
    if options.preset == "gpu":
        options.device = "cuda"
    if options.quick:
        options.batch, options.width, options.rounds = [96], [16], 2
    if options.quick or options.device == "cuda":
        options.allocator = "default"
    options.rounds = options.rounds or (11 if options.device == "cuda" else 7)
    return options


def destination(options) -> Path:
    """The file for the rows."""
    if options.out:
        return options.out
    if options.quick:
        return machine.ROOT / "out/speed-quick.json"
    return machine.RESULTS / (f"{machine.gpu_slug()}.json" if options.device == "cuda" else "speed.json")


# --- one case at one size ---------------------------------------------------------------------------------------------


def available_bytes(device: str = "cpu") -> float:
    import psutil

    if device == "cpu":
        return float(psutil.virtual_memory().available)
    import torch

    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0])


def fitting(case, job, options) -> tuple[dict, dict[str, str]]:
    """Implementations that are asked for and would fit; and the reasons against the others."""
    limit = (0.5 if options.device == "cpu" else 0.9) * available_bytes(options.device)
    fit, reasons = {}, {}
    for name, implementation in case.implementations(options.device, job.dtype).items():
        if options.only and name not in options.only:
            continue
        needs = case.needs_bytes(name, job.batch, job.dtype)
        if name in options.without:
            reasons[name] = "ended the process that measured it; see the log"
        elif needs > limit:
            reasons[name] = f"does not fit: needs about {needs / 2**30:.0f} GiB"
        elif name == "compile" and not job.compiled:
            reasons[name] = "not compiled at this size, to save time"
        else:
            fit[name] = implementation
    return fit, reasons


class ForeignLoad:
    """Share of the machine that other processes used meanwhile: a measurement above a few percent is doubtful."""

    def __init__(self) -> None:
        import psutil

        self._system = psutil.cpu_times
        self._start = self._busy(), time.process_time(), time.perf_counter()

    def _busy(self) -> float:
        times = self._system()
        return times.user + times.system + times.nice

    def share(self) -> float:
        busy, own, wall = self._start
        foreign = (self._busy() - busy) - (time.process_time() - own)
        return max(0.0, foreign / ((time.perf_counter() - wall) * (os.cpu_count() or 1)))


def compete(case, job, options, gate, show: Callable[..., None]) -> dict:
    """One row: every contestant checked, warmed up, and timed round by round."""
    import torch
    from gate import reason_of
    from timers import DeviceTimer, HostTimer, kept_bytes

    torch._dynamo.reset()  # sizes are compiled one by one, as constants
    fit, reasons = fitting(case, job, options)
    against = gate.reasons(case, job, fit, show)
    reasons |= {name: against[name] for name in fit if against[name]}
    inputs = case.make(job.batch, job.width).to(getattr(torch, job.dtype), options.device)
    timer = (DeviceTimer if options.device == "cuda" else HostTimer)(inputs, job.direction)
    contestants = {name: implementation for name, implementation in fit.items() if name not in reasons}
    kept = {}
    for name, implementation in contestants.items() if job.direction == BOTH else ():
        show(name, "what it keeps")
        with contextlib.suppress(Exception):  # the same call fails again below, and says so
            kept[name] = mebibytes(kept_bytes(implementation, inputs))
    contestants |= {GEMM: None}
    for name, implementation in list(contestants.items()):
        try:
            show(name, "warm up")
            timer.warm(name, implementation)
        except Exception as error:
            reasons[name] = reason_of(error)
            del contestants[name]
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    load = ForeignLoad()
    names = list(contestants)
    for r in range(options.rounds):
        for name in names[r % len(names) :] + names[: r % len(names)] if names else []:
            show(name)
            samples[name].append(timer.sample(name, contestants[name]))
    unit = samples.pop(GEMM, None)
    baseline = next((name for name in samples if name.startswith("flashpair")), "flashpair")
    ours = samples.get(baseline, [])
    return {
        **identity(job, options),
        "columns": case.columns(job.batch),
        "milliseconds": {name: spread([1e3 * t for t in times]) for name, times in samples.items()},
        "baseline": baseline,
        # Of pairs from one round: what disturbed one contestant disturbed the other.
        "times_flashpair": {
            name: spread([t / o for t, o in zip(times, ours, strict=True)])
            for name, times in samples.items()
            if ours and name != baseline
        },
        "kept_mebibytes": kept,
        "products": products(case, job, options.device),
        "gemm_milliseconds": spread([1e3 * t for t in unit]) if unit else None,
        "not_run": reasons,
        "foreign_load": round(load.share(), 3),
        **(device_facts(timer) if options.device == "cuda" else {"peak_gflops": machine.fma_peak(options.threads)}),
        **machine.describe(options.device),
    }


def mebibytes(count: float) -> float:
    return round(count / 2**20, 1)


def products(case, job, device: str) -> float:
    """Products of the shape of S that the loss needs at this size; a CPU may keep S between the passes."""
    from flashpair.workspace import workspace_bytes

    if job.direction != BOTH:
        return case.forward_products
    fits = 4 * job.batch * case.columns(job.batch) <= workspace_bytes(None)
    return case.kept_products if device == "cpu" and fits else case.products


def device_facts(timer) -> dict:
    """Memory beyond what was there before the step, gradients included."""
    from flashpair.workspace import workspace_bytes

    return {
        "extra_mebibytes": {name: mebibytes(count) for name, count in timer.extra_bytes.items() if name != GEMM},
        "gradient_mebibytes": mebibytes(sum(leaf.nbytes for leaf in timer.inputs[0].leaves)),
        "workspace_mebibytes": mebibytes(workspace_bytes(None)),
    }


def identity(job, options) -> dict:
    """The part of a row that says what is measured."""
    size = {"case": job.case, "batch": job.batch, "width": job.width, "dtype": job.dtype}
    return {**size, "direction": job.direction, "allocator": options.allocator}


# --- processes --------------------------------------------------------------------------------------------------------


def selected_jobs(options) -> list:
    """What to measure, in order."""
    from cases import CASES, PRESETS, Job

    if options.preset:
        jobs = PRESETS[options.preset]()
    else:
        asked = [(b, d) for b in options.batch for d in options.width]
        sizes = lambda case: asked if options.quick else case.sizes or asked  # noqa: E731
        jobs = [
            Job(c.name, b, d, options.dtype, direction=direction)
            for c in CASES
            for b, d in sizes(c)
            for direction in ([d for d in options.direction if d in c.directions] or c.directions)
        ]
    chosen = [job for job in jobs if not options.patterns or any(p in job.case for p in options.patterns)]
    if not chosen:
        names = ", ".join(dict.fromkeys(job.case for job in jobs))
        raise SystemExit(f"no case matches {options.patterns}; there are {names}")
    return chosen


def run_jobs(
    jobs: list, measure: Callable[..., dict], unmeasured: Callable[..., dict], out: Path, seconds: float, start: float
) -> None:
    """Measure all jobs, each row written as soon as it is there; those that time does not suffice for are named."""
    merge(out, [unmeasured(job) for job in jobs] if seconds < math.inf else [], KEY)
    for done, job in enumerate(jobs):
        if time.monotonic() - start > seconds:
            left = ", ".join(f"{j.case} {j.batch}x{j.width} {j.dtype}" for j in jobs[done:])
            print(f"not measured, {seconds:g} s are over: {left}", flush=True)
            break
        merge(out, [measure(job)], KEY)


def child(options, start: float) -> int:
    """All selected jobs, in this process."""
    import torch
    from cases import CASES
    from gate import DeviceLost, Gate
    from tqdm import tqdm

    torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"bench/run.py: nothing was measured: torch {torch.__version__} sees no GPU")
    jobs, gate, by_name = selected_jobs(options), Gate(options.device), {case.name: case for case in CASES}
    described, out = machine.describe(options.device), destination(options)
    rows: list[dict] = []
    CURRENT.parent.mkdir(exist_ok=True)
    with tqdm(total=len(jobs), initial=options.first, desc=f"{options.allocator} allocator", disable=None) as bar:

        def measure(job) -> dict:
            def show(contestant: str, doing: str = "") -> None:
                CURRENT.write_text(json.dumps({"job": jobs.index(job), "contestant": contestant}))
                bar.set_postfix_str(f"{job.case} {job.batch}x{job.width} {job.dtype}: {doing} {contestant}")

            rows.append(compete(by_name[job.case], job, options, gate, show))
            bar.update()
            bar.write(summary(rows[-1]))
            return rows[-1]

        def unmeasured(job) -> dict:
            return {**identity(job, options), "not_measured": NOT_REACHED, **described}

        try:
            run_jobs(jobs[options.first :], measure, unmeasured, out, options.seconds, start)
            status = 0
        except DeviceLost as error:
            bar.write(f"the GPU is lost: {error}")
            status = LOST
        except KeyboardInterrupt:
            bar.write("interrupted")
            status = 128 + signal.SIGINT
    bad = sum(is_defect(name, reason) for row in rows for name, reason in row["not_run"].items())
    count = f"{options.first + len(rows)} of {len(jobs)} rows measured"
    print(f"{count}{f', wrong or failing {bad} times' if bad else ''}; wrote {out}", flush=True)
    return status or int(bad > 0)


def is_defect(name: str, reason: str) -> bool:
    """A wrong result of anybody's, or a failure of ours."""
    return reason.startswith("wrong") or (name.startswith("flashpair") and reason.startswith("failed"))


def summary(row: dict) -> str:
    """One row as text."""
    size = f"{row['case']} B={row['batch']} D={row['width']} {row['dtype']}"
    lines = [f"{size}, {row['direction']}, {row['allocator']} allocator"]
    if row.get("gemm_milliseconds"):
        lines.append(f"  {GEMM:<28} {row['gemm_milliseconds']['median']:9.3f} ms")
    for name, t in row["milliseconds"].items():
        ratio, units = row["times_flashpair"].get(name), matmul_units(row, name)
        text = f"  {name:<28} {t['median']:9.2f} ms ({t['low']:.2f}-{t['high']:.2f})"
        text += f"  {units[0]:6.2f} GEMMs" if units else ""
        text += f", {100 * units[1]:3.0f}% of its rate" if units and name.startswith("flashpair") else ""
        peak = of_peak(row, name) if name.startswith("flashpair") else None
        text += f", {100 * peak:.0f}% of the peak" if peak else ""
        text += f"  {row['extra_mebibytes'][name]:8.0f} MiB" if "extra_mebibytes" in row else ""
        text += f"  keeps {row['kept_mebibytes'][name]:.4g} MiB" if name in row["kept_mebibytes"] else ""
        text += f"  {ratio['median']:6.2f}x {row['baseline']} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""
        lines.append(text)
    lines += [f"  {name:<28} not run: {reason}" for name, reason in row["not_run"].items()]
    return "\n".join(lines)


def measuring_process(arguments: list[str], environment: dict[str, str]) -> int:
    """Exit status of this file with further arguments; an interruption is the child's to answer."""
    process = subprocess.Popen([sys.executable, *sys.argv, *arguments], env={**environment, CHILD: "1"})
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, previous)


def persist(run: Callable[[list[str]], int], seconds: float, current: Path = CURRENT) -> int:
    """Run a measuring process; where a contestant ends it, go on from there without that contestant."""
    start, first, without = time.monotonic(), 0, []
    while True:
        current.unlink(missing_ok=True)
        further = ["--first", str(first), *(word for name in without for word in ("--without", name))]
        if seconds < math.inf:
            further += ["--seconds", str(seconds - (time.monotonic() - start))]
        status = run(further)
        ended_by_itself = (status >= 0 and status != LOST) or status == -signal.SIGINT
        found = {} if ended_by_itself or not current.exists() else json.loads(current.read_text())
        if not found or found["contestant"] in without:
            return status or int(bool(without))
        print(f"{found['contestant']} ended the process (status {status}); going on without it", flush=True)
        first = found["job"]
        without.append(found["contestant"])


def main() -> int:
    start, options = time.monotonic(), arguments()
    if os.environ.get(CHILD):
        return child(options, start)
    allocators = list(machine.ALLOCATORS) if options.allocator == "both" else [options.allocator]
    status = 0
    for allocator in allocators:
        environment = machine.environment(allocator, options.threads)
        extra = ["--allocator", allocator]
        status |= persist(lambda more, e=environment, x=extra: measuring_process([*x, *more], e), options.seconds)
    return status


if __name__ == "__main__":
    sys.exit(main())
