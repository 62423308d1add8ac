"""From which size on a second thread pays: CLIP steps with one thread and with all, interleaved in one process.

    python bench/threads.py

The number behind `products_per_thread` in csrc/bind.cpp: where both columns cross, D B² is twice that.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import flashpair
from flashpair.losses import ClipLoss

ONE, ALL = 1 << 62, 1  # products that are worth a thread


def step(loss: ClipLoss, batch: int, width: int) -> float:
    """Seconds, on inputs that no step saw before."""
    x, y = (torch.nn.functional.normalize(torch.randn(batch, width), dim=1).requires_grad_() for _ in range(2))
    begin = time.perf_counter()
    loss(x, y, 14.3).backward()
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 96, 128, 160, 192, 256, 384, 512])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args(arguments)
    if flashpair.backends()["cpu"] != "usable":
        parser.error(f"the cpu backend is not usable here: {flashpair.backends()['cpu']}")
    loss, set_products = ClipLoss(), torch.ops.flashpair_cpu.set_products_per_thread
    before = set_products(ONE)
    print(f"{'B':>6}{'one, ms':>10}{f'{torch.get_num_threads()}, ms':>10}")
    try:
        for batch in options.batch:
            times: dict[int, list[float]] = {ONE: [], ALL: []}
            for _ in range(options.rounds):
                for products, found in times.items():
                    set_products(products)
                    found.append(step(loss, batch, options.width))
            one, every = (1e3 * statistics.median(found) for found in times.values())
            print(f"{batch:6}{one:10.2f}{every:10.2f}")
    finally:
        set_products(before)


if __name__ == "__main__":
    main()
