"""Bytes on the wire and memory of a rank: what the model says, and what is measured."""

import os
import statistics

import processes
import pytest
import torch
import torch.distributed as dist

from flashpair import losses
from flashpair.distributed import Exchange, Group
from flashpair.distributed.cost import LOSSES, Step, main, simulate


def loopback_bytes() -> int:
    with open("/proc/net/dev") as file:
        return int(next(line for line in file if line.strip().startswith("lo:")).split(":")[1].split()[8])


def steps(name: str, sizes: list[int], features: int, exchange: str, count: int) -> int:
    """Bytes over the loopback device during `count` steps."""
    rank = dist.get_rank()
    g = torch.Generator().manual_seed(rank)
    group = Group(exchange=Exchange[exchange])
    x, y = (torch.randn(sizes[rank], features, generator=g).requires_grad_() for _ in range(2))

    def step() -> None:
        if name == "clip":
            losses.ClipLoss(group=group)(x, y, 1.0).backward()
        elif name == "siglip":
            losses.SigLipLoss(group=group)(x, y, 1.0).backward()
        else:
            losses.SupConLoss(group=group)(x, torch.arange(len(x)) % 7).backward()

    step()
    dist.barrier()
    before = loopback_bytes()
    for _ in range(count):
        step()
    dist.barrier()
    return loopback_bytes() - before


@pytest.mark.skipif(not os.path.exists("/proc/net/dev"), reason="counts bytes of the loopback device")
@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("sizes", [[256] * 2, [256] * 4, [100, 356, 20]], ids=str)
def test_bytes_on_the_wire(pools, sizes, name, exchange):
    """What really crosses the sockets is what the model says, within packet headers and small sums."""
    features, count = 256, 2
    sent = pools(len(sizes)).values(steps, name, sizes, features, exchange, count)[0] / count
    step = Step(len(sizes), max(sizes), features, itemsize=4, **LOSSES[name])
    predicted = sum(simulate(Exchange[exchange], sizes, step))
    assert 0.97 * predicted <= sent <= 1.06 * predicted + 40_000


@pytest.mark.parametrize("exchange", [Exchange.GATHER, Exchange.RING])
@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
def test_model_is_the_simulation(ranks, name, exchange):
    step = Step(ranks, 64, 32, **LOSSES[name])
    assert simulate(exchange, [64] * ranks, step) == [step.sent_bytes(exchange)] * ranks


def test_cost_table(capsys):
    main(["--ranks", "1", "8", "4096"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + 2 * 2 and "16,777,216" in lines[-1]
    with pytest.raises(SystemExit):
        main(["--rows", "0"])
    assert "--rows must be positive; got 0" in capsys.readouterr().err


def peak_bytes(sizes: list[int], features: int, exchange: str) -> int:
    """Growth of this process's resident set during a step."""
    rank = dist.get_rank()
    x, y = (torch.randn(sizes[rank], features, requires_grad=True) for _ in range(2))
    loss = losses.ClipLoss(group=Group(exchange=Exchange[exchange]))
    status = lambda key: next(int(v.split()[1]) for v in open("/proc/self/status") if v.startswith(key))  # noqa: E731, SIM115
    loss(x[:8], y[:8], 1.0).backward()
    x.grad = y.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    loss(x, y, 1.0).backward()
    return 1024 * (status("VmHWM") - before)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures the resident set")
def test_memory_of_a_ring_does_not_grow_with_the_ranks(monkeypatch):
    # The ranks give every buffer back when it is freed: what a heap keeps would be blocks more or less by chance.
    for limit in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(limit, str(1 << 18))
    rows, features = 1024, 1024
    block = rows * features * 4
    peaks = {}
    for size in (1, 2, 4):
        pool = processes.Pool(size)
        try:
            for exchange in ("RING", "GATHER"):
                found = pool.values(peak_bytes, [rows] * size, features, exchange)
                peaks[size, exchange] = statistics.median(found)
        finally:
            pool.close()
    # The double buffer is full from three ranks on.
    assert peaks[4, "RING"] <= peaks[2, "RING"] + 2.5 * block, peaks
    assert peaks[4, "GATHER"] >= peaks[2, "GATHER"] + 5 * block, peaks  # the ruler sees what grows
