"""Times of the Triton kernels on one H100, predicted from their machine code: what the first run has to test.

    python bench/predict.py              every goal that names a time; to docs/triton.md and results/predictions.json
    python bench/predict.py clip         cases whose name contains a pattern

A call is recorded on CPU tensors, its kernels are compiled for compute capability 9.0 and disassembled. Counted are the
warp instructions on the shortest way through a program (the way of a tile without a special case), the loop over D as
often as it runs. A tile takes its issue slots and its tensor-core time: the longer of both where two programs share a
multiprocessor, one after the other where registers or shared memory admit one only; and no less than it writes takes at
the memory's bandwidth. The gradient's products by the vendor's library are counted as they are called.
Nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from unittest.mock import patch

import ahead_of_time
import goals
import machine

ARCHITECTURE = 90
KINDS = ("every", "plain", "mixed")
RECORDED = 4096  # rows of the call that is recorded; counts grow with their square
RECORDED_WORKSPACE = 4 << 20  # gives it panels on and off the diagonal, as the full size has
BEGIN, END = "<!-- predicted: begin (written by bench/predict.py) -->", "<!-- predicted: end -->"
PATH = machine.RESULTS / "predictions.json"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One H100 SXM, and how much of it good kernels are known to reach."""

    multiprocessors: int = 132
    clock: float = 1.7e9
    issue: float = 4.0  # warp instructions a clock and multiprocessor
    issue_share: float = 0.65
    special: float = 0.5  # warp instructions of exp, log, reciprocal a clock
    flop: float = 4096.0  # of tensor cores in 16 bits, a clock
    flop_share: float = 0.75
    registers: int = 65536
    shared: int = 227 << 10
    bandwidth: float = 3.35e12
    gemm: float = 600e12  # FLOP/s of the vendor's products
    leaving: float = 1e-6  # seconds of a program that finds its tile is not its own
    small_programs: int = 32  # of one warp, on a multiprocessor
    few: float = 1e-5  # seconds to list the tiles that a launch serves, or to multiply those few of a panel
    rest: float = 0.5e-3  # seconds a step: norms, folds, launches


@dataclasses.dataclass
class Kernel:
    name: str
    tile: str
    tiles: str  # which it serves
    registers: int
    shared_kib: int
    programs_at_once: int  # on a multiprocessor
    instructions: float  # a pair
    special: float  # a pair: exponentials and the like
    products: int  # wgmma of one turn of the loop over D
    tensor_ms: float
    issue_ms: float
    predicted_ms: float
    floor_ms: float  # of its products, tensor cores at their peak


# --- machine code -----------------------------------------------------------------------------------------------------

_LABEL = re.compile(r"^(\.L_\S+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z0-9_]+)\S*(.*)")
_TARGET = re.compile(r"\((\.L_\S+?)\)")


@dataclasses.dataclass
class Instruction:
    name: str
    conditional: bool
    target: str | None


def disassembled(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and where each label stands among them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [ahead_of_time.BINARIES / "nvdisasm", "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parsed(text)


def parsed(text: str) -> tuple[list[Instruction], dict[str, int]]:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label, code = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(found)
        elif code:
            target = _TARGET.search(code[3]) if code[2] == "BRA" else None
            conditional = code[1] is not None or (target is not None and bool(re.search(r"U?P\d", code[3])))
            found.append(Instruction(code[2], conditional, target[1] if target else None))
    return found, labels


def shortest(code: list[Instruction], labels: dict[str, int], trips: int) -> tuple[float, float, int]:
    """(instructions, special ones, wgmma of one turn) on the shortest way from the start to an unconditional end."""
    times = [1] * len(code)
    for at, instruction in enumerate(code):
        back = labels.get(instruction.target, at + 1)
        if back < at and any(code[k].name in ("HGMMA", "HMMA") for k in range(back, at)):
            times[back : at + 1] = [trips] * (at + 1 - back)
    # From the end: the rest of the way from each instruction on, as (instructions, special).
    never = (float("inf"), 0.0)
    rest = [never] * (len(code) + 1)
    for at in range(len(code) - 1, -1, -1):
        instruction = code[at]
        cost = (times[at], times[at] * (instruction.name == "MUFU"))
        ways = []
        if instruction.name == "EXIT" and not instruction.conditional:
            ways.append((0.0, 0.0))
        elif instruction.target is not None and labels[instruction.target] > at:
            ways.append(rest[labels[instruction.target]])
        if instruction.conditional or instruction.target is None or labels[instruction.target] <= at:
            ways.append(rest[at + 1] if instruction.name != "EXIT" or instruction.conditional else (0.0, 0.0))
        best = min(ways)
        rest[at] = (cost[0] + best[0], cost[1] + best[1])
    return *rest[0], sum(instruction.name in ("HGMMA", "HMMA") for instruction in code)


# --- the model --------------------------------------------------------------------------------------------------------


def predicted(launches: list[ahead_of_time.Launch], growth: float, width: int, gpu: Gpu) -> list[Kernel]:
    """One entry for each kernel with a product; `growth`: how many times the recorded tiles there are."""
    from flashpair.kernels.program import EVERY, MIXED, PLAIN, SAME_ONLY, STORE, TILES, TRIANGLE

    kernels: dict[str, Kernel] = {}
    for launched in launches:
        if not launched.of_pairs:
            continue
        compiled = ahead_of_time.compiled(launched, ARCHITECTURE)
        size = {n: launched.arguments[n] for n in ("BLOCK_B", "BLOCK_N", "BLOCK_D")}
        pairs = size["BLOCK_B"] * size["BLOCK_N"]
        trips, warps = -(-width // size["BLOCK_D"]), launched.options["num_warps"]
        instructions, special, products = shortest(*disassembled(compiled.cubin), trips)
        registers = -(-compiled.registers // 8) * 8 * 32 * warps
        at_once = max(1, min(gpu.registers // registers, gpu.shared // (compiled.shared + 1024)))
        program, programs = launched.arguments["PROGRAM"], growth * launched.grid[0]
        served = programs / 2 if program[TRIANGLE.value] else programs
        # Along the diagonal and where a class goes on in the next tile.
        mixed = min(served, 2 * growth**0.5 * launched.grid[0] ** 0.5)
        kind = program[TILES.value]
        served = {EVERY.value: served, PLAIN.value: served - mixed, MIXED.value: mixed}[kind]
        served = mixed if program[SAME_ONLY.value] else served
        seconds = served / (gpu.multiprocessors * gpu.clock)
        # The few tiles that such a launch serves are listed by small programs, many on a multiprocessor at once.
        listed = kind == MIXED.value or program[SAME_ONLY.value]
        at_once_to_leave = gpu.small_programs if listed else at_once
        leaving = 1e3 * (programs - served * (not listed)) * gpu.leaving / (gpu.multiprocessors * at_once_to_leave)
        leaving += 1e3 * gpu.few * listed
        tensor = 2 * pairs * width / gpu.flop
        issue = max(instructions * warps / gpu.issue / gpu.issue_share, special * warps / gpu.special)
        cycles = max(tensor / gpu.flop_share, issue) if at_once > 1 else tensor / gpu.flop_share + issue
        if program[STORE.value]:
            cycles = max(cycles, 2 * pairs * gpu.clock * gpu.multiprocessors / gpu.bandwidth)
        ms = 1e3 * seconds
        facts = Kernel(
            launched.name, launched.tile(), KINDS[kind], compiled.registers, compiled.shared >> 10, at_once,
            instructions * warps * 32 / pairs, special * warps * 32 / pairs, products,
            ms * tensor / gpu.flop_share, ms * issue, ms * cycles + leaving, ms * tensor,
        )  # fmt: skip
        key = launched.source().hash()
        if key in kernels:
            for name in ("tensor_ms", "issue_ms", "predicted_ms", "floor_ms"):
                setattr(facts, name, getattr(facts, name) + getattr(kernels[key], name))
        kernels[key] = facts
    return sorted(kernels.values(), key=lambda k: -k.predicted_ms)


def step(case, batch: int, width: int, gpu: Gpu) -> dict:
    """Prediction of one forward + backward step."""
    import torch

    import flashpair
    from flashpair import operands

    previous = flashpair.set_max_workspace_bytes(RECORDED_WORKSPACE)
    try:
        inputs = case.make(RECORDED, width).to(torch.bfloat16)
        ordered = operands.ORDERED_PAIRS * RECORDED**2 // batch**2  # as for the full size
        with patch.object(operands, "ORDERED_PAIRS", ordered):
            launches, flop = ahead_of_time.record_products(lambda: case.flashpair(inputs).backward(), ARCHITECTURE)
    finally:
        flashpair.set_max_workspace_bytes(previous)
    growth = (batch / RECORDED) ** 2
    kernels = predicted(launches, growth, width, gpu)
    gemm_ms = 1e3 * growth * flop / gpu.gemm
    few_ms = 1e3 * gpu.few * sum(launched.has_product and not launched.of_pairs for launched in launches)
    total = sum(k.predicted_ms for k in kernels) + gemm_ms + few_ms + 1e3 * gpu.rest
    floor = sum(k.floor_ms for k in kernels)
    floor += 1e3 * growth * flop / (gpu.flop * gpu.clock * gpu.multiprocessors)
    return {
        "case": case.name, "batch": batch, "width": width, "kernels": [dataclasses.asdict(k) for k in kernels],
        "gemm_ms": gemm_ms, "predicted_ms": total, "floor_ms": floor, "sources": machine.source_hash("cuda"),
    }  # fmt: skip


def lines(rows: list[dict]) -> list[str]:
    """One row a kernel, and the step below."""
    out = []
    for row in rows:
        out.append(f"{row['case']} {row['batch']}x{row['width']}")
        for k in row["kernels"]:
            out.append(
                f"  {k['name']:<18} {k['tiles']} {k['tile']:<36} {k['registers']:3} registers, "
                f"{k['shared_kib']:3} KiB, {k['programs_at_once']} at once, {k['instructions']:5.1f} instructions "
                f"a pair ({k['special']:.1f} special): {k['predicted_ms']:6.2f} ms "
                f"(tensor {k['tensor_ms']:.2f}, issue {k['issue_ms']:.2f}, floor {k['floor_ms']:.2f})"
            )
        total = f"step {row['predicted_ms']:.1f} ms, floor {row['floor_ms']:.1f}"
        out.append(f"  vendor GEMMs {row['gemm_ms']:.2f} ms; {total}")
    return out


def markdown(rows: list[dict]) -> list[str]:
    """The same as two tables."""
    from report import table

    steps = [
        [f"{r['case']}, {r['batch']}x{r['width']}", f"{r['predicted_ms']:.1f}", f"{r['floor_ms']:.1f}",
         f"{r['gemm_ms']:.1f}"] for r in rows
    ]  # fmt: skip
    kernels = [
        [f"{r['case']}, {r['batch']}x{r['width']}", f"`{k['name']}`, {k['tiles']}", str(k["registers"]),
         f"{k['shared_kib']} KiB", str(k["programs_at_once"]), f"{k['instructions']:.0f}", str(k["products"]),
         f"{k['tensor_ms']:.2f}", f"{k['issue_ms']:.2f}", f"{k['predicted_ms']:.2f}", f"{k['floor_ms']:.2f}"]
        for r in rows for k in r["kernels"]
    ]  # fmt: skip
    head = ["kernel, tiles", "registers", "shared", "at once", "instructions a pair", "wgmma in the loop", "tensor, ms"]
    return [
        f"Sources `{rows[0]['sources']}`. Forward + backward in bfloat16; vendor: products of the gradient.",
        "",
        *table(["step", "predicted, ms", "floor, ms", "of these vendor's, ms"], steps),
        "",
        *table(["step", *head, "issue, ms", "predicted, ms", "floor, ms"], kernels),
        "",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*")
    options = parser.parse_args()
    from cases import CASES
    from tqdm import tqdm

    by_name = {case.name: case for case in CASES}
    wanted = dict.fromkeys(
        (c, b, d)
        for goal in goals.GPU_GOALS
        if goal.against is None and not goal.memory
        for c in goal.cases
        for b in goal.batches
        for d in goal.widths
    )
    wanted |= dict.fromkeys((c, 32768, 512) for c in ("supcon", "ntxent", "ms-random", "ms-trained"))
    chosen = [w for w in wanted if not options.patterns or any(p in w[0] for p in options.patterns)]
    rows = [step(by_name[c], b, d, Gpu()) for c, b, d in tqdm(chosen, desc="predict", disable=None)]
    print("\n".join(lines(rows)))
    if not options.patterns:
        PATH.write_text(json.dumps(rows, indent=1) + "\n")
        page = machine.ROOT / "docs" / "triton.md"
        page.write_text(machine.with_block(page, BEGIN, END, markdown(rows)))
        print(f"wrote {PATH.relative_to(machine.ROOT)} and {page.relative_to(machine.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
