"""What a step of a loss of a global batch costs each rank: bytes on the wire, matrix products, memory, time.

    python -m flashpair.distributed.cost --ranks 8 64 512 4096 --rows 4096 --features 1024

Bytes are those of ring algorithms (an all-gather sends each rank's part W - 1 times, an all-reduce 2 (W - 1) / W of its
length); tests hold them against what real groups send. Times are the model's: products at a stated rate, wires at a
stated bandwidth, and what may overlap does. Scalars, and gradients of scale and bias, are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from .ranks import Exchange

_WIDE = 4  # bytes of statistics and of gradients on the wire, float32
_AGREEMENT = 28 * 8  # bytes that every rank says of its call


@dataclass(frozen=True)
class Step:
    """A loss of W · b rows, as one rank sees it.

    Args:
        ranks: W. rows: b, of each rank. features: D.
        itemsize: bytes of an embedding's entry, 2 for bfloat16.
        row_statistics: vectors per row: CLIP and SupCon 2, SigLIP 0.
        column_logsumexps: logsumexps per column: CLIP 1, others 0.
        labels: whether labels are gathered.
        one_pass: gradients come with the value (SigLIP), S is computed once.
        self_similarity: rows and columns are the same embeddings.
    """

    ranks: int
    rows: int
    features: int
    itemsize: int = 2
    row_statistics: int = 2
    column_logsumexps: int = 1
    labels: bool = False
    one_pass: bool = False
    self_similarity: bool = False

    @property
    def others(self) -> int:
        return self.ranks - 1

    @property
    def block_bytes(self) -> int:
        """One rank's columns."""
        return self.rows * self.features * self.itemsize

    @property
    def gradient_bytes(self) -> int:
        """One rank's column gradients."""
        return self.rows * self.features * _WIDE

    def small_bytes(self) -> int:
        """Sent by a rank besides columns and their gradients: agreement, labels, statistics."""
        per_row = self.row_statistics * _WIDE + 8 * self.labels
        columns = 2 * 2 * self.column_logsumexps * _WIDE  # a maximum and a sum, all-reduced
        return self.others * (_AGREEMENT + self.rows * (per_row + columns))

    def sent_bytes(self, exchange: Exchange) -> int:
        """Sent by a rank, forward and backward."""
        if self.ranks == 1:
            return 0
        if exchange == Exchange.GATHER:
            return self.small_bytes() + self.others * (self.block_bytes + self.gradient_bytes)
        rounds = 1 if self.one_pass else 2
        return self.small_bytes() + rounds * self.others * self.block_bytes + self.ranks * self.gradient_bytes

    def matmul_flops(self) -> float:
        """Of one rank: S (once more in the backward pass unless `one_pass`), W Y and Wᵀ X."""
        units = 3 if self.one_pass else 4
        return units * 2.0 * self.rows * (self.ranks * self.rows) * self.features

    def memory_bytes(self, exchange: Exchange) -> int:
        """Beyond the rank's own embeddings and their gradients: columns, gradients under way, O(B) vectors.

        Without the workspace, which is bounded.
        """
        vectors = self.ranks * self.rows * (_WIDE * (2 * self.row_statistics + 2 * self.column_logsumexps) + 8)
        if self.ranks == 1:
            return vectors
        if exchange == Exchange.GATHER:
            return vectors + self.ranks * (self.block_bytes + self.gradient_bytes)
        return vectors + 2 * self.block_bytes + 3 * self.gradient_bytes

    def seconds(self, exchange: Exchange, flops: float, bandwidth: float, latency: float) -> float:
        """Of a step: a gather waits for its columns; a ring hides what is smaller, products or transfers.

        Args:
            flops: per second of a rank's matrix products. bandwidth: bytes per second that a rank sends.
            latency: seconds of a message.
        """
        compute = self.matmul_flops() / flops
        small = self.small_bytes() / bandwidth + (6 if self.ranks > 1 else 0) * latency
        if self.ranks == 1:
            return compute
        if exchange == Exchange.GATHER:
            wire = self.others * (self.block_bytes + self.gradient_bytes) / bandwidth + 2 * self.others * latency
            return compute + small + wire
        units = 3 if self.one_pass else 4
        total = small
        for one, with_gradient in [(units, True)] if self.one_pass else [(1, False), (3, True)]:
            work = compute * one / units / self.ranks
            hop = self.block_bytes / bandwidth + latency
            if with_gradient:
                hop += self.gradient_bytes / bandwidth + latency
            total += work + self.others * max(work, hop) + (hop if with_gradient else 0)
        return total


def simulate(exchange: Exchange, sizes: Sequence[int], step: Step) -> list[int]:
    """Bytes that each rank sends in one step when ranks hold `sizes` rows, message by message."""
    W = len(sizes)
    sent = [0] * W
    if W == 1:
        return sent

    def all_gather(nbytes: int) -> None:
        for _ in range(W - 1):  # each passes on what it got last
            for r in range(W):
                sent[r] += nbytes

    def all_reduce(nbytes: int) -> None:
        for r in range(W):
            sent[r] += 2 * (W - 1) * nbytes // W

    most, total = max(sizes), sum(sizes)  # gathers are padded to the largest
    row, gradient = step.features * step.itemsize, step.features * _WIDE
    all_gather(_AGREEMENT)
    if step.labels:
        all_gather(most * 8)
    all_gather(most * step.row_statistics * _WIDE)
    for _ in range(2 * step.column_logsumexps):
        all_reduce(total * _WIDE)
    if exchange == Exchange.GATHER:
        all_gather(most * row)
        for r in range(W):  # to each rank the gradients of its columns; NCCL pads them to the largest too
            sent[r] += (total - sizes[r]) * gradient
        return sent
    for _ in range(1 if step.one_pass else 2):
        for k in range(W - 1):
            for r in range(W):
                sent[r] += max(sizes[(r - k) % W], 1) * row
    for k in range(W):
        for r in range(W):
            sent[r] += max(sizes[(r - k) % W], 1) * gradient
    return sent


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError


def table(steps: Sequence[Step], flops: float, bandwidth: float, latency: float) -> str:
    """Markdown: a row per number of ranks and exchange."""
    lines = [
        "| ranks | global batch | exchange | sent per rank | memory per rank | products | step | products' share |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for step in steps:
        for exchange in (Exchange.GATHER, Exchange.RING)[: 1 if step.ranks == 1 else 2]:
            seconds = step.seconds(exchange, flops, bandwidth, latency)
            compute = step.matmul_flops() / flops
            lines.append(
                f"| {step.ranks} | {step.ranks * step.rows:,} | {exchange.value} | {_size(step.sent_bytes(exchange))} "
                f"| {_size(step.memory_bytes(exchange))} | {1e3 * compute:.3g} ms | {1e3 * seconds:.3g} ms "
                f"| {100 * compute / seconds:.0f} % |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table for a cluster."""
    parser = argparse.ArgumentParser(prog="python -m flashpair.distributed.cost", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--rows", type=int, default=4096, help="of each rank")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--itemsize", type=int, default=2, help="bytes of an embedding's entry")
    parser.add_argument("--loss", choices=sorted(LOSSES), default="clip")
    parser.add_argument("--flops", type=float, default=400e12, help="of a rank's matrix products, per second")
    parser.add_argument("--bandwidth", type=float, default=40e9, help="bytes per second that a rank sends")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of a message")
    given = parser.parse_args(arguments)
    for name in ("ranks", "rows", "features", "itemsize", "flops", "bandwidth"):
        values = getattr(given, name)
        if min(values if isinstance(values, list) else [values]) <= 0:
            parser.error(f"--{name} must be positive; got {values}")
    steps = [Step(w, given.rows, given.features, given.itemsize, **LOSSES[given.loss]) for w in given.ranks]
    print(table(steps, given.flops, given.bandwidth, given.latency))


#: How the best known losses use the wire.
LOSSES = {
    "clip": {},
    "siglip": {"row_statistics": 0, "column_logsumexps": 0, "one_pass": True},
    "sup_con": {"column_logsumexps": 0, "labels": True, "self_similarity": True},
}


if __name__ == "__main__":
    main()
