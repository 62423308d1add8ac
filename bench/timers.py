"""One step, its time, what it keeps for the backward pass, and the vendor's matrix product of the same shape."""

from __future__ import annotations

import statistics
import time

from results import BOTH

SAMPLE_SECONDS = {"cpu": 0.03, "cuda": 0.01}  # shorter steps are timed several at once
GEMM_NUMBERS = 1 << 24  # of S at a time: the product does not pay for fresh pages


def step(implementation, inputs, direction: str = BOTH):
    """Forward + backward, gradients in inputs.leaves, or the value alone; → loss."""
    import torch

    for leaf in inputs.leaves:
        leaf.grad = None
    with implementation.during():
        if direction != BOTH:
            with torch.no_grad():
                return implementation.loss(inputs)
        loss = implementation.loss(inputs)
        loss.backward()
    return loss


def steps_of(seconds: float, device: str) -> int:
    """How many steps of this length make a sample."""
    return min(max(round(SAMPLE_SECONDS[device] / max(seconds, 1e-6)), 1), 50)


class Product:
    """S once, by the library behind torch.mm, in panels of rows."""

    def __init__(self, inputs) -> None:
        import torch

        columns = next(t for t in (inputs.memory, inputs.y, inputs.x) if t is not None).detach()
        rows = inputs.x.detach()
        self.panel = min(max(GEMM_NUMBERS // len(columns), 1), len(rows))
        if rows.is_cuda:
            self.panel = len(rows)
        self.rows, self.columns = rows, columns
        self.out = torch.empty(self.panel, len(columns), dtype=rows.dtype, device=rows.device)

    def __call__(self) -> None:
        import torch

        for first in range(0, len(self.rows), self.panel):
            part = self.rows[first : first + self.panel]
            torch.mm(part, self.columns.T, out=self.out[: len(part)])


def kept_bytes(implementation, inputs) -> int:
    """What stays between forward and backward beside the inputs; flashpair's kept S counts."""
    import torch

    import flashpair

    own = {t.untyped_storage().data_ptr() for t in vars(inputs).values() if t is not None}
    found: dict[int, int] = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    flashpair.release_workspace()
    with implementation.during(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = implementation.loss(inputs)
    del loss
    return sum(found.values()) + flashpair.release_workspace()


def change_last_bit(t) -> None:
    """Of the first entry: another tensor in any dtype, and the old one the next time."""
    import torch

    bits = t.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
    bits.view(-1)[:1] ^= 1


class HostTimer:
    """Seconds of one step by the host's clock, the mean of several, each on other inputs than the step before:
    flashpair may keep S between passes over equal ones."""

    def __init__(self, inputs, direction: str) -> None:
        self.inputs, self.direction = inputs, direction
        self.steps: dict[str, int] = {}
        self.product = Product(inputs)

    def _run(self, implementation) -> float:
        change_last_bit(self.inputs.x)
        start = time.perf_counter()
        if implementation is None:
            self.product()
        else:
            step(implementation, self.inputs, self.direction)
        return time.perf_counter() - start

    def warm(self, name: str, implementation) -> None:
        """Code is compiled, kept memory is there; and how many steps make a sample."""
        self._run(implementation)
        self.steps[name] = steps_of(self._run(implementation), "cpu")

    def sample(self, name: str, implementation) -> float:
        return statistics.mean(self._run(implementation) for _ in range(self.steps[name]))


class DeviceTimer:
    """Seconds of one step by CUDA events, the mean of several, each on inputs that have left the L2 cache."""

    def __init__(self, inputs, direction: str) -> None:
        import torch

        x = inputs.x
        size = sum(t.nbytes for t in vars(inputs).values() if t is not None)
        cache = torch.cuda.get_device_properties(x.device).L2_cache_size
        copies = 4 * cache // size + 1
        self.inputs = [inputs, *(inputs.to(x.dtype, str(x.device)) for _ in range(copies - 1))]
        self.products = [Product(i) for i in self.inputs]
        for product in self.products[1:]:
            product.out = self.products[0].out
        self.direction = direction
        self.steps: dict[str, int] = {}
        self.extra_bytes: dict[str, int] = {}
        self._next = 0

    def _run(self, steps: int, implementation) -> float:
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            place = self._next % len(self.inputs)
            self._next += 1
            if implementation is None:
                self.products[place]()
                continue
            step(implementation, self.inputs[place], self.direction)
            for leaf in self.inputs[place].leaves:
                leaf.grad = None
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / steps

    def warm(self, name: str, implementation) -> None:
        """Compile; then the peak memory of one step beyond what was there, and how many steps make a sample."""
        import torch

        for _ in range(2):
            self._run(1, implementation)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = self._run(1, implementation)
        self.extra_bytes[name] = torch.cuda.max_memory_allocated() - before
        self.steps[name] = steps_of(seconds, "cuda")

    def sample(self, name: str, implementation) -> float:
        return self._run(self.steps[name], implementation)
