"""Two towers learn which halves belong together: upper and lower halves of handwritten digits, CLIP's loss.

    torchrun --nproc-per-node=2 examples/two_towers.py       (or `make towers`; under a minute on two cores)
    python examples/two_towers.py                            one process, the same curve
    torchrun --nproc-per-node=3 examples/two_towers.py --resume out/two_towers.pt --steps 900

Every process encodes its slice of the batch, the loss is that of the whole batch (`group=`), DistributedDataParallel
averages the gradients. On several processes the first one then trains alone on whole batches: both curves must agree.
Recall is counted among 497 images that were never seen; chance is 0.002.

Writes out/two_towers.png and the checkpoint out/two_towers.pt, with which any number of processes goes on. Exit status
1 where a result misses its mark.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flashpair
from flashpair.losses import ClipLoss

BATCH, FEATURES, TRAINED = 650, 64, 1300
LEARNING_RATE, WEIGHT_DECAY, NOISE = 2e-3, 0.1, 0.1
RECALL_1, RECALL_5, CURVE = 0.22, 0.6, 1e-6  # marks


class Towers(nn.Module):
    """(B, 32) upper and lower halves → (B, 64) unit vectors each, and the factor of their similarities."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        tower = lambda: nn.Sequential(  # noqa: E731
            nn.Linear(32, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, FEATURES)
        )
        self.upper, self.lower = tower(), tower()
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(self.upper(upper)), F.normalize(self.lower(lower)), self.log_scale.exp()


def halves() -> tuple[Tensor, Tensor]:
    """(1797, 32) each, ink from 0 to 1 less 0.3, in a fixed random order."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).flatten(1) / 16 - 0.3
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[:, :32], images[:, 32:]


class Run:
    """A training that any number of processes goes on with."""

    def __init__(self, group=None) -> None:
        torch.manual_seed(0)
        self.model = Towers().double()
        self.loss = ClipLoss(group=group)
        self.rank, self.ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.wrapped = self.model if group is None else DistributedDataParallel(self.model, process_group=group)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.curve: list[float] = []

    def step(self, upper: Tensor, lower: Tensor) -> float:
        """One step on this process's slice of the next batch."""
        # The batch depends on the step alone: every number of processes sees the same.
        g = torch.Generator().manual_seed(1000 + len(self.curve))
        chosen = torch.randperm(TRAINED, generator=g)[:BATCH]
        noise = NOISE * torch.randn(2, BATCH, 32, generator=g, dtype=upper.dtype)
        own = slice(self.rank * BATCH // self.ranks, (self.rank + 1) * BATCH // self.ranks)
        views = [half[chosen][own] + n[own] for half, n in zip((upper, lower), noise, strict=True)]
        loss = self.loss(*self.wrapped(*views))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.curve.append(loss.item())
        return self.curve[-1]

    def train(self, upper: Tensor, lower: Tensor, steps: int, name: str) -> None:
        from tqdm import trange

        bar = trange(len(self.curve), steps, desc=name, disable=self.rank > 0)
        for _ in bar:
            bar.set_postfix(loss=f"{self.step(upper, lower):.4f}")

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "curve": self.curve}

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would go on in the same tensors
        self.curve = list(state["curve"])


@torch.no_grad()
def recall(upper: Tensor, lower: Tensor, at: tuple[int, ...] = (1, 5)) -> list[float]:
    """How often an upper half's own lower half is among its k most similar ones."""
    (found,) = flashpair.mine(upper, lower, [flashpair.Extreme(k=max(at))], normalize=True)
    hit = found.indices == torch.arange(len(upper))[:, None]
    return [hit[:, :k].any(1).double().mean().item() for k in at]


def draw(path: Path, curves: dict[str, list[float]], recalls: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for k, (name, curve) in enumerate(curves.items()):
        left.plot(curve, label=name, linestyle=("-", "--")[k % 2], linewidth=2 - k % 2)
    left.set(xlabel="step", ylabel="loss of the global batch", title="Training")
    left.legend()
    for k, (name, values) in enumerate(recalls.items()):
        bars = right.bar([p + 0.4 * k for p in range(len(values))], values, 0.38, label=name)
        right.bar_label(bars, fmt="%.3f")
    right.set_xticks([0.2 * (len(recalls) - 1) + p for p in range(2)], ["Recall@1", "Recall@5"])
    right.set(title="Lower halves found among 497 unseen", ylim=(0, 1))
    right.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--resume", type=Path, help="a checkpoint of any number of processes")
    parser.add_argument("--out", type=Path, default=Path("out"))
    given = parser.parse_args()
    several = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    if several:
        dist.init_process_group("gloo")
        threads = torch.get_num_threads()
        torch.set_num_threads(max((os.cpu_count() or 1) // dist.get_world_size(), 1))
    upper, lower = halves()
    run = Run(dist.group.WORLD if several else None)
    start = torch.load(given.resume, weights_only=True) if given.resume else None
    if start is not None:
        run.load(start)
    run.train(upper, lower, given.steps, f"{run.ranks} processes" if several else "one process")
    if several:
        dist.barrier()
        dist.destroy_process_group()
        torch.set_num_threads(threads)
    if run.rank > 0:
        return 0
    curves, failed = {f"{run.ranks} process{'es' * several}": run.curve}, []
    if several:
        alone = Run()
        if start is not None:
            alone.load(start)
        alone.train(upper, lower, given.steps, "one process")
        curves["one process"] = alone.curve
        apart = max(abs(a - b) for a, b in zip(run.curve, alone.curve, strict=True))
        print(f"largest difference of the curves {apart:.1e}")
        failed += [f"curves differ by {apart:.1e}"] * (not apart <= CURVE)
    run.model.eval()
    with torch.no_grad():
        learned = recall(*run.model(upper[TRAINED:], lower[TRAINED:])[:2])
    pixels = recall(upper[TRAINED:], lower[TRAINED:])
    for name, values in (("pixels", pixels), ("learned", learned)):
        print(f"{name:>8}: Recall@1 {values[0]:.3f}, Recall@5 {values[1]:.3f}")
    failed += [f"Recall {learned}"] * (learned[0] < RECALL_1 or learned[1] < RECALL_5)
    given.out.mkdir(exist_ok=True)
    torch.save(run.state(), given.out / "two_towers.pt")
    draw(given.out / "two_towers.png", curves, {"pixels": pixels, "learned": learned})
    print(f"wrote {given.out / 'two_towers.png'} and {given.out / 'two_towers.pt'}")
    for reason in failed:
        print(f"missed: {reason}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
