"""Build, test and time flashpair on this machine's GPU: offline, with the Python that runs this file.

    make gpu                                  build, test, bench, then the report
    make gpu STAGES="build sanitize"          some stages
    make gpu STAGES=host                      what a step costs the host
    make gpu STAGES=tune                      half an hour: measured tile configurations, to kernels/tuned.json
    make gpu GPU_OUT=dir                      logs, summary and a copy of the results go to dir (default: out/gpu)

Nothing is downloaded and nothing is installed: the extension is built in place, and the package is imported from a
folder of links. Each stage ends at its own limit with everything it started; what it has measured by then is kept, and
the next stage begins. Exit status: 0 all well, 1 a stage failed or was cut off, 2 nothing could be run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TUNED = ROOT / "kernels" / "tuned.json"
HOST = RESULTS / "host.json"
SITE = ROOT / "out" / "gpu-site"
GRACE = 5.0  # seconds between asking a stage to end and ending it
TESTS = "tests/test_gpu.py"
PROBE_SECONDS = 120.0

PROBE = """
import json
try:
    import torch
except ImportError as error:
    print(json.dumps({"why_not": f"torch cannot be imported ({error})"}))
else:
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        print(json.dumps({"name": name, "capability": "%d.%d" % capability, "torch": torch.__version__}))
    else:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
        print(json.dumps({"why_not": f"torch {torch.__version__}, built for {built}, sees no GPU"}))
"""

USABLE = """
import sys
from pathlib import Path
import flashpair
from flashpair.__main__ import report
print(report())
states = {name: flashpair.backends().get(name, "not in this version") for name in ("triton", "cuda")}
print("; ".join(f"{name}: {state}" for name, state in states.items()))
sys.exit(any(state != "usable" for state in states.values()))
"""


def slug(name: str) -> str:
    """Name of a GPU as a file name: NVIDIA H200 → nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Gpu:
    name: str  # as the driver calls it
    capability: str  # such as 9.0
    torch: str

    @property
    def slug(self) -> str:
        return slug(self.name)

    @property
    def results(self) -> Path:
        return RESULTS / f"{self.slug}.json"


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float  # limit
    commands: Callable[[Gpu, float], list[list[str]]]  # of the GPU and the limit
    verdict: Callable[[str], tuple[bool, str]]  # output → nothing against it, one line


@dataclass
class Outcome:
    stage: str
    state: str  # ok, failed, cut off
    seconds: float
    line: str


# --- what the stages run ----------------------------------------------------------------------------------------------


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def pytest(*arguments: str, parallel: bool) -> list[str]:
    """Every test on a line of its own, so that a run that is cut off says how far it came and where it stood.

    parallel: as many at a time as compile well side by side, and none for ever, where pytest's plugins are there.
    """
    command = python("-m", "pytest", "-vv", "--tb=short", "-rfE", "-p", "no:cacheprovider", *arguments)
    if parallel and importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=90", "--timeout-method=thread"]
    if parallel and importlib.util.find_spec("xdist"):
        workers = max(1, min(12, (os.cpu_count() or 1) - 2))
        command = ["env", "OMP_NUM_THREADS=1", "TORCHINDUCTOR_COMPILE_THREADS=1", *command, "-n", str(workers)]
    return command


def build(gpu: Gpu, seconds: float) -> list[list[str]]:
    return [python("setup.py", "build_ext", "--inplace"), python("-c", USABLE)]


def test(gpu: Gpu, seconds: float) -> list[list[str]]:
    return [pytest(TESTS, parallel=True)]


def bench(gpu: Gpu, seconds: float) -> list[list[str]]:
    budget = max(seconds - 25, seconds / 2)  # the row in progress is finished
    return [python("bench/run.py", "--preset", "gpu", "--seconds", f"{budget:.0f}", "--out", str(gpu.results))]


def report(gpu: Gpu, seconds: float) -> list[list[str]]:
    return [python("bench/report.py", "--gpu", gpu.slug)]


def sanitize(gpu: Gpu, seconds: float) -> list[list[str]]:
    """Memory accesses of all kernels; shared memory of ours alone."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/{sub}" for home in homes for sub in ("bin", "compute-sanitizer"))]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        raise FileNotFoundError("compute-sanitizer is not on PATH, in CUDA_HOME or in /usr/local/cuda")
    cases = pytest(TESTS, "-k", "test_small and cuda", parallel=False)
    shared = ["--error-exitcode=9", "--target-processes=application-only", "--print-limit=20"]
    tools = (["--tool=memcheck", "--report-api-errors=no"], ["--tool=racecheck", "--kernel-name", "kns=flashpair"])
    uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]  # each tensor has an end of its own
    return [[*uncached, found, *tool, *shared, *cases] for tool in tools]


def host(gpu: Gpu, seconds: float) -> list[list[str]]:
    return [python("bench/host.py")]


def tune(gpu: Gpu, seconds: float) -> list[list[str]]:
    budget = max(seconds - 180, seconds / 2)  # the row in progress is finished
    return [python("bench/tune.py", "--write", str(TUNED), "--seconds", f"{budget:.0f}")]


# --- what they said ---------------------------------------------------------------------------------------------------


def last_line(output: str) -> tuple[bool, str]:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return True, lines[-1] if lines else "no output"


def built(output: str) -> tuple[bool, str]:
    """The first thing that a compiler or setup.py objects to, or the last line."""
    objection = re.search(r"^(\S+?(:\d+|\(\d+\))+: (fatal )?error:? .*|flashpair: .* but .*)$", output, re.MULTILINE)
    return True, objection[0] if objection else last_line(output)[1]


def tests_passed(output: str) -> tuple[bool, str]:
    """pytest's own count, or ours where it was cut off; a run in which everything was skipped has shown nothing."""
    totals = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|deselected|errors?)\b.*?)\s*=*$", output, re.MULTILINE)
    if totals:
        return "passed" in totals[-1], totals[-1]
    words = re.findall(r"::\S.*\s(PASSED|FAILED|ERROR|SKIPPED)\b|\s(PASSED|FAILED|ERROR|SKIPPED) \S+::", output)
    counts = {name: sum(name in pair for pair in words) for name in ("FAILED", "ERROR", "PASSED", "SKIPPED")}
    line = ", ".join(f"{count} {name.lower()}" for name, count in counts.items() if count)
    return bool(counts["PASSED"]), f"{line} so far" if line else last_line(output)[1]


def sanitized(output: str) -> tuple[bool, str]:
    summaries = re.findall(r"=+ (ERROR SUMMARY: .*|RACECHECK SUMMARY: .*)", output)
    ran = len(re.findall(r"^=*\s*\d+ passed\b", output, re.MULTILINE))
    return ran == 2, "; ".join(summaries) or last_line(output)[1]


STAGES = {
    stage.name: stage
    for stage in (
        Stage("build", 150, build, built),
        Stage("test", 200, test, tests_passed),
        Stage("bench", 170, bench, last_line),
        Stage("report", 12, report, last_line),
        Stage("sanitize", 300, sanitize, sanitized),
        Stage("host", 120, host, last_line),
        Stage("tune", 1800, tune, last_line),
    )
}
DEFAULT = ("build", "test", "bench")


# --- running one stage ------------------------------------------------------------------------------------------------


def link_package() -> Path:
    """A folder that holds the package as an installation would: its files, kernels and sources, as links."""
    package = SITE / "flashpair"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "python" / "flashpair").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name in ("kernels", "csrc"):
        (package / name).symlink_to(ROOT / name)
    return SITE


def environment(gpu: Gpu, site: Path) -> dict[str, str]:
    # Not what is to be tested.
    elsewhere = ("FLASHPAIR_BACKEND", "FLASHPAIR_CUDA_LIBRARY", "FLASHPAIR_TUNED", "TRITON_INTERPRET")
    kept = {k: v for k, v in os.environ.items() if k not in elsewhere}
    path = os.pathsep.join(filter(None, [str(site), kept.get("PYTHONPATH", "")]))
    settings = {"FLASHPAIR_BUILD_CUDA": "1", "FLASHPAIR_BUILD_NATIVE": "0", "TORCH_CUDA_ARCH_LIST": gpu.capability}
    return {**settings, **kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def end_group(process: subprocess.Popen, grace: float) -> None:
    """End a process and everything it started: asked first, so that it can say what it has."""
    if process.poll() is None and grace > 0:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_command(
    command: list[str], log: Path, seconds: float, variables: dict[str, str], tick: Callable[[], None] = lambda: None
) -> int | None:
    """Exit status of a command whose output is shown and logged; None where it was cut off."""
    grace = min(GRACE, seconds / 4)
    end = time.monotonic() + seconds - grace
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip

    def show() -> None:
        with log.open("a") as file:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(left, 1.0))
            tick()
        return None
    finally:
        end_group(process, grace)
        reader.join(2.0)


def run_stage(
    stage: Stage, gpu: Gpu, folder: Path, seconds: float | None = None, tick: Callable[[], None] = lambda: None
) -> Outcome:
    """All commands of a stage, up to the first that fails, within its limit."""
    seconds = stage.seconds if seconds is None else seconds
    log = folder / f"{stage.name}.log"
    log.write_text("")
    start, state = time.monotonic(), "ok"
    print(f"\n=== {stage.name}: at most {seconds:g} s, log in {log}", flush=True)
    try:
        for command in stage.commands(gpu, seconds):
            variables = environment(gpu, link_package())
            status = run_command(command, log, start + seconds - time.monotonic(), variables, tick)
            if status != 0:
                state = "cut off" if status is None else "failed"
                break
    except OSError as error:
        state = "failed"
        log.write_text(f"{log.read_text()}{error}\n")
    good, line = stage.verdict(log.read_text())
    state = "failed" if state == "ok" and not good else state
    return Outcome(stage.name, state, time.monotonic() - start, line)


def mirror(gpu: Gpu, folder: Path) -> None:
    """Copy the results that are newer than their copies."""
    for path in (*(gpu.results.with_suffix(suffix) for suffix in (".json", ".md", ".png")), TUNED, HOST):
        copy = folder / path.name
        if path.exists() and (not copy.exists() or copy.stat().st_mtime < path.stat().st_mtime):
            with contextlib.suppress(OSError, shutil.SameFileError):
                shutil.copy2(path, copy)


def table(outcomes: list[Outcome]) -> str:
    lines = [f"{'stage':<10}{'state':<10}{'seconds':>8}  result"]
    lines += [f"{o.stage:<10}{o.state:<10}{o.seconds:>8.1f}  {o.line[:200]}" for o in outcomes]
    return "\n".join(lines)


# --- the command ------------------------------------------------------------------------------------------------------


def probe() -> Gpu | str:
    """The GPU that torch sees, or why there is none."""
    try:
        done = subprocess.run(python("-c", PROBE), capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        return f"torch could not be asked for its GPU ({type(error).__name__})"
    return found["why_not"] if "why_not" in found else Gpu(**found)


def limit(text: str) -> tuple[str, float]:
    """`stage=seconds`."""
    name, _, seconds = text.partition("=")
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"unknown stage {name!r}; stages are {', '.join(STAGES)}")
    return name, float(seconds)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; {' '.join(DEFAULT)}")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="logs and a copy of the results")
    parser.add_argument("--limit", type=limit, action="append", default=[], metavar="STAGE=SECONDS")
    options = parser.parse_args(given)
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {', '.join(map(repr, unknown))}; stages are {', '.join(STAGES)}")
    options.stages = options.stages or list(DEFAULT)
    if "bench" in options.stages and "report" not in options.stages:
        options.stages.insert(options.stages.index("bench") + 1, "report")
    return options


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    gpu = probe()
    if isinstance(gpu, str):
        print(f"make gpu: nothing was run: {gpu}; Python is {sys.executable}", file=sys.stderr)
        return 2
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    limits = dict(options.limit)
    print(f"{gpu.name} (compute capability {gpu.capability}), torch {gpu.torch}, {sys.executable}", flush=True)
    outcomes: list[Outcome] = []
    with contextlib.suppress(KeyboardInterrupt):
        for name in options.stages:
            outcomes.append(run_stage(STAGES[name], gpu, folder, limits.get(name), lambda: mirror(gpu, folder)))
            mirror(gpu, folder)
            (folder / "summary.txt").write_text(f"{gpu.name}, torch {gpu.torch}\n{table(outcomes)}\n")
    print(f"\n{table(outcomes)}\n\nlogs and results: {folder}", flush=True)
    complete = len(outcomes) == len(options.stages)
    return int(not complete or any(o.state != "ok" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
