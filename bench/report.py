"""Markdown and pictures from bench/results/*.json; rows whose sources have changed since are marked stale.

python bench/report.py              writes bench/results/README.md, docs/bench-speed.png, the block in README.md, and
                                    bench/results/<gpu>.md and .png for every GPU that has results
python bench/report.py --gpu NAME   writes those of one GPU alone
python bench/report.py --check      exit status 1 where a row is stale or README.md differs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import goals
import machine
from run import GEMM, matmul_units

BEGIN, END = "<!-- measured: begin (written by bench/report.py) -->", "<!-- measured: end -->"
STALE = "stale"


def load(name: str) -> list[dict]:
    path = machine.RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def freshness(row: dict, sources: str) -> str:
    return "" if row["sources"] == sources else f"{STALE} ({row['sources'][:6]})"


def provenance(rows: list[dict]) -> list[str]:
    """One line per machine and version that the rows come from."""
    lines = set()
    for r in rows:
        if "driver" in r:
            software = (
                f"driver {r['driver']}, torch {r['torch']} (CUDA {r['cuda']}), triton {r['triton']}, nvcc {r['nvcc']}"
            )
        else:
            software = f"{r['threads']} threads, torch {r['torch']}, backend {r['backend']}"
        lines.add(f"{r['device']}, {software}, commit {r['commit']}, sources `{r['sources']}`, {r['date']}")
    return [f"- {line}" for line in sorted(lines)]


def measured(rows: list[dict]) -> list[dict]:
    return [r for r in rows if "not_measured" not in r]


def speed_section(rows: list[dict], sources: str) -> list[str]:
    if not rows:
        return ["No speed has been measured yet: `python bench/run.py`.", ""]
    others = sorted({name for r in rows for name in [*r["milliseconds"], *r["not_run"]]} - {"flashpair"})
    body = []
    for r in rows:
        ours = r["milliseconds"].get("flashpair")
        cells = [r["case"], str(r["batch"]), str(r["width"]), r["dtype"], r["allocator"]]
        cells.append(f"{ours['median']:.1f}" if ours else r["not_run"].get("flashpair", "-"))
        for name in others:
            ratio, time = r["times_flashpair"].get(name), r["milliseconds"].get(name)
            if ratio:
                cells.append(f"**{ratio['median']:.2f}x** ({ratio['low']:.2f}-{ratio['high']:.2f})")
            else:
                cells.append(f"{time['median']:.1f} ms" if time else r["not_run"].get(name, "-"))
        body.append([*cells, f"{100 * r['foreign_load']:.0f}%", freshness(r, sources)])
    header = ["case", "B", "D", "dtype", "allocator", "flashpair, ms", *others, "foreign load", ""]
    return [
        "Printed by `python bench/run.py`. Forward + backward; median, and how many times as long the others take",
        "(median of ratios within a round, 10th to 90th percentile in brackets).",
        "",
        *provenance(rows),
        "",
        *table(header, body),
        "",
    ]


def memory_section(rows: list[dict], sources: str) -> list[str]:
    if not rows:
        return ["No memory has been measured yet: `python bench/memory.py`.", ""]
    body = [
        [
            r["case"],
            str(r["batch"]),
            str(r["width"]),
            r["implementation"],
            r["workspace"] if r["implementation"] == "flashpair" else "-",
            r["not_run"] if "not_run" in r else f"{r['mebibytes']:.0f}",
            f"{r['inputs_mebibytes']:.0f}" if "inputs_mebibytes" in r else "-",
            f"{4 * r['batch'] * r.get('columns', r['batch']) / 2**20:.0f}",
            freshness(r, sources),
        ]
        for r in rows
    ]
    header = ["loss", "B", "D", "implementation", "workspace", "peak, MiB", "inputs, MiB", "S would be, MiB", ""]
    return [
        "Printed by `python bench/memory.py`: growth of resident memory in a fresh process,",
        "forward + backward, float32, gradients of the inputs included.",
        "",
        *provenance(rows),
        "",
        *table(header, body),
        "",
    ]


# --- GPUs -------------------------------------------------------------------------------------------------------------


def gpu_results() -> dict[str, list[dict]]:
    """Rows of every GPU by the name of its file."""
    names = sorted(path.stem for path in machine.RESULTS.glob("*.json"))
    return {name: load(name) for name in names if name not in ("speed", "memory", "family", "contrast", "distributed")}


def goals_section(rows: list[dict], sources: str) -> list[str]:
    """Every goal with what was measured; met or missed only where it was."""
    body = []
    for goal in goals.GOALS:
        state, text, used = goals.judge(goal, rows)
        stale = STALE if any(freshness(r, sources) for r in used) else ""
        body.append([", ".join(goal.cases), goal.text, text, state, stale])
    device = next((r["device"] for r in measured(rows)), None)
    return [
        f"Goals for one GPU in bfloat16{f', measured on {device}' if device else '; no GPU has been measured yet'}:",
        "",
        *table(["cases", "goal", "measured", "state", ""], body),
        "",
    ]


def gpu_section(rows: list[dict], sources: str) -> list[str]:
    """Times, memory, and what did not run."""
    done = measured(rows)
    names = list(dict.fromkeys(name for r in done for name in [*r["milliseconds"], *r["not_run"]]))
    times, memory = [], []
    for r in rows:
        size = [r["case"], str(r["batch"]), str(r["width"]), r["dtype"]]
        if "not_measured" in r:
            cells = [f"not measured ({r['not_measured']})", *["-"] * len(names)]
            times.append([*size, *cells, freshness(r, sources)])
            continue
        cells = []
        for name in names:
            time, units = r["milliseconds"].get(name), matmul_units(r, name)
            text = f"{time['median']:.2f} ({time['low']:.2f}-{time['high']:.2f})" if time else "-"
            cells.append(text + (f", {units[0]:.1f} U, {100 * units[1]:.0f}%" if units else ""))
        unit = r["gemm_milliseconds"]
        times.append([*size, f"{unit['median']:.3f}" if unit else "-", *cells, freshness(r, sources)])
        extra = {name: value - r["gradient_mebibytes"] for name, value in r["extra_mebibytes"].items()}
        cells = [f"{extra[name]:.0f}" if name in extra else "-" for name in names]
        memory.append([*size, *cells, freshness(r, sources)])
    against: dict[str, dict[str, list[str]]] = {}
    for r in done:
        for name, reason in r["not_run"].items():
            place = f"{r['case']} {r['batch']}x{r['width']} {r['dtype']}"
            against.setdefault(name, {}).setdefault(reason, []).append(place)
    absent = [
        f"- {name}: {reason} ({places[0] if len(places) == 1 else f'{len(places)} rows'})"
        for name, reasons in against.items()
        for reason, places in reasons.items()
    ]
    head = ["case", "B", "D", "dtype"]
    return [
        *provenance(done),
        "",
        f"Forward + backward in ms, median and 10th to 90th percentile; U: in products of B×B×D ({GEMM}, timed in the",
        "same run); percent: of that product's rate, counting the products that the loss needs where S is not kept.",
        "",
        *table([*head, GEMM, *names, ""], times),
        "",
        "Peak memory in MiB beyond inputs and gradients:",
        "",
        *table([*head, *names, ""], memory),
        "",
        *(["Did not run:", "", *absent, ""] if absent else []),
    ]


def write_gpu(name: str, rows: list[dict], sources: str) -> list[str]:
    """bench/results/<gpu>.md and .png; returns the text."""
    device = next((r["device"] for r in rows), name)
    text = [f"# {device}", "", "Printed by `make gpu`.", "", *goals_section(rows, sources), *gpu_section(rows, sources)]
    (machine.RESULTS / f"{name}.md").write_text("\n".join(text))
    draw(measured(rows), sources, machine.RESULTS / f"{name}.png")
    return text


def draw(rows: list[dict], sources: str, path: Path) -> bool:
    """Bars of the ratios, the first size and dtype of each allocator; False where there is nothing to draw."""
    rows = [r for r in rows if r["times_flashpair"]]
    if not rows:
        return False
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((r["batch"], r["width"], r["dtype"], r["allocator"]) for r in rows))
    figure = Figure(figsize=(9, 2.6 * len(settings)), layout="constrained")
    for axes, setting in zip(figure.subplots(len(settings), 1, squeeze=False)[:, 0], settings, strict=True):
        chosen = [r for r in rows if (r["batch"], r["width"], r["dtype"], r["allocator"]) == setting]
        others = sorted({name for r in chosen for name in r["times_flashpair"]})
        for k, name in enumerate(others):
            found = [
                (i, r["times_flashpair"][name]["median"]) for i, r in enumerate(chosen) if name in r["times_flashpair"]
            ]
            places = [i + (k - (len(others) - 1) / 2) * 0.8 / len(others) for i, _ in found]
            axes.bar(places, [value for _, value in found], 0.8 / len(others), label=name)
        stale = [f"{r['case']}\n({STALE})" if freshness(r, sources) else r["case"] for r in chosen]
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(chosen)), stale, fontsize=8)
        baseline = chosen[0].get("baseline", "flashpair")
        axes.set(yscale="log", ylabel=f"time / {baseline}", title="B={} D={} {}, {} allocator".format(*setting))
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", metavar="NAME", help="the results of one GPU, such as nvidia-h200")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where something is out of date"
    )
    options = parser.parse_args()
    sources = machine.source_hash()
    speed, memory, gpus = load("speed"), load("memory"), gpu_results()
    if options.gpu:
        if options.gpu not in gpus:
            known = f"there are {', '.join(gpus)}" if gpus else "there are none"
            raise SystemExit(f"bench/report.py: no results of {options.gpu!r}; {known}")
        print("\n".join(write_gpu(options.gpu, gpus[options.gpu], sources)))
        states = [goals.judge(goal, gpus[options.gpu])[0] for goal in goals.GOALS]
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("met", "missed", "not measured"))
        print(f"goals: {counts}; wrote bench/results/{options.gpu}.md")
        return 0
    goal_rows = [goals_section(rows, sources) for rows in gpus.values()] or [goals_section([], sources)]
    block = [*speed_section(speed, sources), *memory_section(memory, sources), *(x for part in goal_rows for x in part)]
    block += [f"More of each GPU: {', '.join(f'[{n}](bench/results/{n}.md)' for n in gpus)}.", ""] if gpus else []
    readme = machine.ROOT / "README.md"
    text = machine.with_block(readme, BEGIN, END, block)
    stale = [r for r in [*speed, *memory, *(r for rows in gpus.values() for r in rows)] if freshness(r, sources)]
    if options.check:
        print(f"{len(stale)} stale rows; README.md is {'current' if text == readme.read_text() else 'out of date'}")
        return int(bool(stale) or text != readme.read_text())
    readme.write_text(text)
    machine.RESULTS.mkdir(parents=True, exist_ok=True)
    local = [line.replace("](bench/results/", "](") for line in block]
    (machine.RESULTS / "README.md").write_text("\n".join(["# Measured results", "", *local]))
    for name, rows in gpus.items():
        write_gpu(name, rows, sources)
    drawn = draw(speed, sources, machine.ROOT / "docs" / "bench-speed.png")
    print("\n".join(block))
    pictures = " and docs/bench-speed.png" if drawn else ""
    print(f"wrote README.md and bench/results/README.md{pictures}; {len(stale)} stale rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
