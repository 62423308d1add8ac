"""Correctness before speed: every implementation against the dense loss in float64, value and all gradients."""

from __future__ import annotations

from collections.abc import Callable

from cases import Implementation
from peers import CannotRun
from results import BOTH
from timers import step

#: Of the largest entry, unless dense code in a narrow dtype loses more itself: a gradient that is missing is wrong.
MOST = 0.5
BATCH = {"cpu": 4096, "cuda": 2048}  # larger batches are checked at this size


class DeviceLost(RuntimeError):
    """A kernel has broken the GPU's context: nothing else can run in this process."""


def results_of(implementation, inputs, direction: str = BOTH) -> list:
    loss = step(implementation, inputs, direction)
    gradients = [leaf.grad for leaf in inputs.leaves] if direction == BOTH else []
    return [t.detach().double().cpu() for t in (loss, *gradients)]


def errors(found: list, truth: list) -> list[float]:
    """Largest error of the loss and of each gradient, relative to the largest true entry; NaN is infinite."""
    import torch

    relative = [
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item() for a, b in zip(found, truth, strict=True)
    ]
    return [torch.inf if e != e else e for e in relative]


def verdict(implementation, inputs, truth: list, allowed: list[float], direction: str = BOTH) -> str:
    """Empty where right, else what is wrong."""
    names = ["loss", *(f"gradient {i}" for i in range(len(truth) - 1))]
    found = errors(results_of(implementation, inputs, direction), truth)
    wrong = [
        f"{n}: error {e:.1e}, allowed {a:.1e}" for n, e, a in zip(names, found, allowed, strict=True) if not e <= a
    ]
    return "wrong: " + "; ".join(wrong) if wrong else ""


def reason_of(error: Exception) -> str:
    """First line of what an implementation said when it could not run."""
    import torch

    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as broken:
            raise DeviceLost(str(broken)) from error
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"does not fit: {text}"
    return text if isinstance(error, CannotRun) else f"failed: {type(error).__name__}: {text}"


class Gate:
    """Implementations that are right, each checked once per case, width, dtype and direction."""

    def __init__(self, device: str) -> None:
        self.device, self.known = device, {}

    def reasons(self, case, job, implementations: dict, show: Callable[..., None]) -> dict[str, str]:
        """What is against each implementation; empty where it is right."""
        import torch

        dtype = getattr(torch, job.dtype)
        make = case.gate or case.make
        inputs = make(min(job.batch, BATCH[self.device]), job.width).to(dtype, self.device)
        scope = (case.name, len(inputs.x), job.width, job.dtype, job.direction)
        known = self.known.setdefault(scope, {})
        if set(implementations) <= set(known):
            return known
        dense = Implementation(case.dense)
        truth = results_of(dense, inputs.to(torch.float64, self.device), job.direction)
        # A small multiple of what dense PyTorch itself loses, plus a few roundings. flashpair reads narrow inputs
        # exactly and sums in float32, so of what is lost in that.
        roundings = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
        allowed: dict[torch.dtype, list[float]] = {}
        for name in [name for name in implementations if name not in known]:
            show(name, "check")
            sums = torch.float32 if name.startswith("flashpair") else dtype
            if sums not in allowed:
                lost = errors(results_of(dense, inputs.to(sums, self.device), job.direction), truth)
                allowed[sums] = [max(min(8 * e, MOST), 1.5 * e) + roundings for e in lost]
            try:
                known[name] = verdict(implementations[name], inputs, truth, allowed[sums], job.direction)
            except Exception as error:  # of anybody's code
                known[name] = reason_of(error)
        return known
