"""Markdown and pictures from bench/results/*.json; rows whose sources have changed since are marked stale.

python bench/report.py              writes bench/results/README.md, docs/bench-*.png, the blocks in README.md and docs/,
                                    and bench/results/<gpu>.md and .png for every GPU that has results
python bench/report.py --gpu NAME   writes those of one GPU alone
python bench/report.py --check      exit status 1 where a row is stale or README.md differs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import curves
import goals
import machine
from results import BOTH, GEMM, REGRESSION, change, matmul_units, of_peak, regressed

BEGIN, END = "<!-- measured: begin (written by bench/report.py) -->", "<!-- measured: end -->"
STALE = "stale"
OTHER_RESULTS = ("speed", "memory", "family", "contrast", "distributed", "predictions", "host")  # than those of a GPU


def load(name: str) -> list[dict]:
    path = machine.RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def freshness(row: dict) -> str:
    return f"{STALE} ({row['sources'][:6]})" if machine.is_stale(row) else ""


def provenance(rows: list[dict]) -> list[str]:
    """One line per machine and version that the rows come from."""
    lines = set()
    for r in rows:
        if "driver" in r:
            software = (
                f"driver {r['driver']}, torch {r['torch']} (CUDA {r['cuda']}), triton {r['triton']}, nvcc {r['nvcc']}"
            )
            software += f", measured tiles {r['tuned']}" if r.get("tuned", "-") != "-" else ""
        else:
            software = f"{r['threads']} threads, torch {r['torch']}, backend {r['backend']}"
            software += f", bfloat16 by {r['bfloat16']}" if r.get("dtype") == "bfloat16" and "bfloat16" in r else ""
        lines.add(f"{r['device']}, {software}, commit {r['commit']}, sources `{r['sources']}`, {r['date']}")
    return [f"- {line}" for line in sorted(lines)]


def measured(rows: list[dict]) -> list[dict]:
    return [r for r in rows if "not_measured" not in r]


def machine_of(row: dict) -> tuple:
    return row["device"], row.get("threads", "")


def newest_machine(rows: list[dict]) -> list[dict]:
    """The rows of the machine that was measured last; of several on one day the one with current rows, or with most."""
    if not rows:
        return []
    last = max(
        rows, key=lambda r: (r["date"], not machine.is_stale(r), sum(machine_of(o) == machine_of(r) for o in rows))
    )
    return [r for r in rows if machine_of(r) == machine_of(last)]


def since(row: dict) -> str:
    """flashpair's time against that of the row before, in units of dense code."""
    found = change(row)
    if found is None:
        return ""
    text = f"{found:.2f}x ({row['previous']['sources'][:6]})"
    return f"**slower** {text}" if regressed(row) else text


def _size(row: dict) -> list[str]:
    narrow = f" {row['dtype']}" if row["dtype"] != "float32" else ""
    return [row["case"], f"{row['batch']}x{row['width']}{narrow}"]


def speed_summary(rows: list[dict]) -> list[str]:
    """One line a case: the warm allocator, forward + backward, everybody's ratio."""
    swept = {(case, b, d) for case in curves.CASES for b in curves.BATCHES for d in curves.WIDTHS}
    swept -= {(case, 4096, d) for case in curves.CASES for d in (128, 512)}
    rows = [r for r in rows if r["allocator"] == "warm" and r["direction"] == BOTH] or rows
    rows = [r for r in rows if (r["case"], r["batch"], r["width"]) not in swept]
    body = []
    for r in rows:
        ours = r["milliseconds"].get("flashpair")
        ratio = {name: f"**{t['median']:.2f}x**" for name, t in r["times_flashpair"].items()}
        peers = ", ".join(f"{name} {text}" for name, text in ratio.items() if name not in ("dense", "compile"))
        kept = r.get("kept_mebibytes", {})
        peak = of_peak(r, "flashpair")
        body.append([
            *_size(r), f"{ours['median']:.1f}" if ours else r["not_run"].get("flashpair", "-"),
            f"{100 * peak:.0f}%" if peak else "-", ratio.get("dense", "-"), ratio.get("compile", "-"), peers or "-",
            " / ".join(f"{kept[n]:.0f}" if n in kept else "-" for n in ("flashpair", "dense")), since(r),
            freshness(r),
        ])  # fmt: skip
    header = ["case", "BxD", "flashpair, ms", "of peak", "dense", "compile", "others", "keeps, MiB", "since", ""]
    return table(header, body)


def speed_section(rows: list[dict]) -> list[str]:
    """What README shows."""
    rows = newest_machine(rows)
    if not rows:
        return ["No speed has been measured yet: `python bench/run.py`.", ""]
    return [
        "Printed by `python bench/run.py`. Forward + backward, with an allocator that keeps freed buffers (plain glibc",
        "makes dense code up to twice as slow); median, and how many times as long the others take. Of peak: of the",
        "processor's multiply-adds, counting the loss's own matrix products. Keeps: between forward and backward,",
        "flashpair / dense, S included where flashpair keeps it. Since: against the sources named, in units of dense",
        "code of the same runs. Of clip-trained's peaked logits dense code makes subnormal softmax weights; one costs",
        "an Intel processor up to a hundred ordinary numbers, and flashpair flushes them.",
        "[All rows](bench/results/README.md): plain allocator, forward alone, spreads, who did not run and why.",
        "",
        *provenance(rows),
        "",
        *speed_summary(rows),
        "",
        "![time and memory against B, time against D](docs/bench-sweep.png)",
        "",
    ]


def speed_details(rows: list[dict]) -> list[str]:
    """Every row of every machine, with spreads, and what did not run."""
    lines = []
    for place in dict.fromkeys(map(machine_of, rows)):
        of = [r for r in rows if machine_of(r) == place]
        body, absent = [], {}
        for r in of:
            units = matmul_units(r, "flashpair")
            unit = f"{units[0]:.2f} U, {100 * units[1]:.0f}%" if units else "-"
            kept = r.get("kept_mebibytes", {})
            head = [r["case"], f"{r['batch']}x{r['width']}", r["dtype"], r["direction"], r["allocator"]]
            for name, t in r["milliseconds"].items():
                ratio = r["times_flashpair"].get(name)
                body.append([
                    *head, name, f"{t['median']:.2f} ({t['low']:.2f}-{t['high']:.2f})",
                    f"**{ratio['median']:.2f}x** ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else unit,
                    f"{kept[name]:.1f}" if name in kept else "-",
                    *([f"{100 * r['foreign_load']:.0f}%", since(r), freshness(r)] if not ratio else [""] * 3),
                ])  # fmt: skip
                head = [""] * len(head)
            for name, reason in r["not_run"].items():
                absent.setdefault((name, reason), []).append(r["case"])
        header = ["case", "BxD", "dtype", "direction", "allocator", "implementation", "ms (10th to 90th percentile)",
                  "times flashpair's", "keeps, MiB", "foreign load", "since", ""]  # fmt: skip
        reasons = [f"- {n}: {why} ({', '.join(dict.fromkeys(c))})" for (n, why), c in sorted(absent.items())]
        lines += [f"## {place[0]}, {place[1]} threads", "", *provenance(of), "", *table(header, body), ""]
        lines += ["Did not run:", "", *reasons, ""] if reasons else []
    text = f"""U: of the matrix product that makes S, by torch.mm in the same run and dtype; percent: of its rate.
{REGRESSION}x the time of the row before, both in units of dense code, is called slower."""
    return [text, "", *lines] if lines else lines


def memory_section(rows: list[dict]) -> list[str]:
    rows = newest_machine(rows)
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
            freshness(r),
        ]
        for r in rows
        if not r.get("sweep")
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
    return {name: load(name) for name in names if name not in OTHER_RESULTS}


def goals_section(rows: list[dict], which: tuple[goals.Goal, ...] = goals.GPU_GOALS) -> list[str]:
    """Every goal with what was measured; met or missed only where it was."""
    body = []
    for goal in which:
        state, text, used = goals.judge(goal, rows)
        stale = STALE if any(freshness(r) for r in used) else ""
        body.append([", ".join(goal.cases), goal.text, *forecast(goal), text, state, stale])
    device = next((r["device"] for r in measured(rows)), None)
    on_gpu = which is goals.GPU_GOALS
    what = "one GPU in bfloat16" if on_gpu else "the CPU in float32, warm allocator"
    where = f", measured on {device}" if device else f"; no {'GPU' if on_gpu else 'CPU'} has been measured yet"
    if not on_gpu:
        body = [row[:2] + row[3:] for row in body]
    return [
        f"Goals for {what}{where}:" + (" (predictions: [docs/triton.md](docs/triton.md))" if on_gpu else ""),
        "",
        *table(["cases", "goal", *(["predicted"] if on_gpu else []), "measured", "state", ""], body),
        "",
    ]


def forecast(goal: goals.Goal) -> list[str]:
    """What is expected before the first run."""
    steps = load("predictions")
    value = goals.predicted(goal, steps)
    if value is None:
        return ["-"]
    stale = f", {STALE}" if any(map(machine.is_stale, steps)) else ""
    return [f"{value:.2f}x{stale}" if goal.against else f"{value:.1f} ms{stale}"]


def gpu_section(rows: list[dict]) -> list[str]:
    """Times, memory, and what did not run."""
    done = measured(rows)
    names = list(dict.fromkeys(name for r in done for name in [*r["milliseconds"], *r["not_run"]]))
    times, memory = [], []
    for r in rows:
        size = [r["case"], str(r["batch"]), str(r["width"]), r["dtype"]]
        if "not_measured" in r:
            cells = [f"not measured ({r['not_measured']})", *["-"] * len(names)]
            times.append([*size, *cells, freshness(r)])
            continue
        cells = []
        for name in names:
            time, units = r["milliseconds"].get(name), matmul_units(r, name)
            text = f"{time['median']:.2f} ({time['low']:.2f}-{time['high']:.2f})" if time else "-"
            cells.append(text + (f", {units[0]:.1f} U, {100 * units[1]:.0f}%" if units else ""))
        unit = r["gemm_milliseconds"]
        times.append([*size, f"{unit['median']:.3f}" if unit else "-", *cells, freshness(r)])
        extra = {name: value - r["gradient_mebibytes"] for name, value in r["extra_mebibytes"].items()}
        cells = [f"{extra[name]:.0f}" if name in extra else "-" for name in names]
        memory.append([*size, *cells, freshness(r)])
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


def write_gpu(name: str, rows: list[dict]) -> list[str]:
    """bench/results/<gpu>.md and .png; returns the text."""
    device = next((r["device"] for r in rows), name)
    text = [f"# {device}", "", "Printed by `make gpu`.", "", *goals_section(rows), *gpu_section(rows)]
    (machine.RESULTS / f"{name}.md").write_text("\n".join(text))
    draw(measured(rows), machine.RESULTS / f"{name}.png")
    return text


def draw(rows: list[dict], path: Path) -> bool:
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
        stale = [f"{r['case']}\n({STALE})" if freshness(r) else r["case"] for r in chosen]
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(chosen)), stale, fontsize=8)
        baseline = chosen[0].get("baseline", "flashpair")
        axes.set(yscale="log", ylabel=f"time / {baseline}", title="B={} D={} {}, {} allocator".format(*setting))
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def write_pages() -> None:
    """The tables of docs/ once more, so that rows of other sources are marked there too."""
    import contrast
    import distributed
    import family
    import host
    import versus

    for suite in (family.SUITE, contrast.SUITE):
        if rows := load(suite.title):
            versus.write_table(suite, rows)
    if rows := load("distributed"):
        distributed.write_table(rows)
    if rows := load("host"):
        host.write_table(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", metavar="NAME", help="the results of one GPU, such as nvidia-h200")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where something is out of date"
    )
    options = parser.parse_args()
    speed, memory, gpus = measured(load("speed")), load("memory"), gpu_results()
    if options.gpu:
        if options.gpu not in gpus:
            known = f"there are {', '.join(gpus)}" if gpus else "there are none"
            raise SystemExit(f"bench/report.py: no results of {options.gpu!r}; {known}")
        print("\n".join(write_gpu(options.gpu, gpus[options.gpu])))
        states = [goals.judge(goal, gpus[options.gpu])[0] for goal in goals.GOALS]
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("met", "missed", "not measured"))
        print(f"goals: {counts}; wrote bench/results/{options.gpu}.md")
        return 0
    goal_rows = [goals_section(newest_machine(speed), goals.CPU_GOALS)]
    goal_rows += [goals_section(rows) for rows in gpus.values()] or [goals_section([])]
    block = [*speed_section(speed), *memory_section(memory), *(x for part in goal_rows for x in part)]
    block += [f"More of each GPU: {', '.join(f'[{n}](bench/results/{n}.md)' for n in gpus)}.", ""] if gpus else []
    readme = machine.ROOT / "README.md"
    text = machine.with_block(readme, BEGIN, END, block)
    stale = [r for r in [*speed, *memory, *(r for rows in gpus.values() for r in rows)] if freshness(r)]
    if options.check:
        print(f"{len(stale)} stale rows; README.md is {'current' if text == readme.read_text() else 'out of date'}")
        return int(bool(stale) or text != readme.read_text())
    readme.write_text(text)
    machine.RESULTS.mkdir(parents=True, exist_ok=True)
    local = [line.replace("](bench/results/", "](") for line in block]
    local = [line.replace("](docs/", "](../../docs/") for line in local if "All rows" not in line]
    details = ["# All rows", "", *speed_details(speed)]
    (machine.RESULTS / "README.md").write_text("\n".join(["# Measured results", "", *local, *details]))
    for name, rows in gpus.items():
        write_gpu(name, rows)
    write_pages()
    newest = newest_machine(speed)
    docs = machine.ROOT / "docs"
    at_default = [r for r in newest if r["direction"] == BOTH and (r["batch"] == 4096 or r["width"] == 256)]
    drawn = [path for path, done in (
        (docs / "bench-speed.png", draw(at_default, docs / "bench-speed.png")),
        (docs / "bench-sweep.png", curves.draw(newest, newest_machine(memory), docs / "bench-sweep.png")),
    ) if done]  # fmt: skip
    print("\n".join(block))
    slower = [" ".join(_size(r)) for r in newest if regressed(r)]
    print(f"slower than before: {', '.join(slower)}" if slower else "nothing is slower than before")
    written = ["README.md", "bench/results/README.md", *(str(path.relative_to(machine.ROOT)) for path in drawn)]
    print(f"wrote {', '.join(written)}; {len(stale)} stale rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
