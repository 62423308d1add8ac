"""Recognise what was never seen: a margin head over 1,300 identities, verification on 497 others.

    python examples/faces.py               (or `make faces`; about a minute on two cores)
    python examples/faces.py --capacity    identities that fit in a given memory, dense logits against flashpair
    python examples/faces.py --check       the arithmetic of that table against measured memory, in fresh processes

In the manner of face recognition: every one of 1,300 of scikit-learn's digit images is an identity, seen under random
distortions, and a head with an additive angular margin learns to name it. Verification asks of two distorted views
whether they are of one image, on the 497 images that were not trained on: area under the ROC curve, true accepts at a
false accept rate of 1 %, and how often the right image is the nearest of 497; against the raw pixels.

The head's weights are updated in the backward pass, so that their gradient is never stored. Writes out/faces.png. Exit
status 1 where a result misses its mark.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashpair
from flashpair.heads import ArcFace, FusedAdamW

IDENTITIES = 1300
BATCH, STEPS, LEARNING_RATE = 256, 700, 4e-3
MARGIN, SCALE = 0.2, 24.0
FEATURES = 64
DEGREES, SHIFT, ZOOM, NOISE = 20.0, 0.2, 0.2, 0.1  # largest distortion; the shift in half image widths
MARKS = {"AUC": 0.98, "TAR at FAR 1 %": 0.65, "rank 1": 0.4}


# --- data and network -------------------------------------------------------------------------------------------------


def load_images(seed: int = 0) -> Tensor:
    """scikit-learn's 1797 digits in a fixed random order: (1797, 1, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, 1, 8, 8) rotated, moved, scaled, brightened and with noise, at random."""
    turn, wide, high, right, down, bright = torch.rand(6, len(images), generator=generator) * 2 - 1
    cos, sin = (math.radians(DEGREES) * turn).cos(), (math.radians(DEGREES) * turn).sin()
    wide, high = 1 + ZOOM * wide, 1 + ZOOM * high
    rows = [
        torch.stack([cos / wide, -sin / high, SHIFT * right], 1),
        torch.stack([sin / wide, cos / high, SHIFT * down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, align_corners=False) * (1 + 0.2 * bright)[:, None, None, None]
    return seen + NOISE * torch.randn(seen.shape, generator=generator)


def network(width: int = 32) -> nn.Sequential:
    """(B, 1, 8, 8) images → (B, 64) embeddings."""
    convolution = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.PReLU(o)]  # noqa: E731
    return nn.Sequential(
        *convolution(1, width),
        *convolution(width, 2 * width),
        nn.MaxPool2d(2),
        *convolution(2 * width, 4 * width),
        nn.Flatten(),
        nn.Linear(4 * width * 16, FEATURES),
        nn.BatchNorm1d(FEATURES),
    )


def train(images: Tensor, steps: int) -> tuple[nn.Module, list[float]]:
    """The trained network and its loss curve."""
    from tqdm import trange

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = network()
    head = ArcFace(len(images), FEATURES, margin=MARGIN, scale=SCALE)
    fused = FusedAdamW([head.weight], LEARNING_RATE)
    head.fuse(fused)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, LEARNING_RATE, total_steps=steps) for o in (optimizer, fused)]
    curve = []
    bar = trange(steps, desc="training")
    for _ in bar:
        labels = torch.randint(len(images), (BATCH,), generator=generator)
        loss = head(model(view(images[labels], generator)), labels)
        optimizer.zero_grad()
        loss.backward()  # updates the head's weights
        optimizer.step()
        fused.step()  # nothing is left to do; schedules want to see it
        for schedule in schedules:
            schedule.step()
        curve.append(loss.item())
        bar.set_postfix(loss=f"{curve[-1]:.3f}")
    return model, curve


# --- verification -----------------------------------------------------------------------------------------------------


@dataclass
class Verification:
    """Scores of all pairs of a first with a second view, and what they say."""

    false_accepts: Tensor
    true_accepts: Tensor
    scores: dict[str, float]


@torch.no_grad()
def verify(model: nn.Module | None, first: Tensor, second: Tensor) -> Verification:
    """Cosines of every first with every second view; without a model those of the centred pixels."""
    from sklearn.metrics import roc_auc_score, roc_curve

    if model is None:
        a, b = (v.flatten(1) - v.flatten(1).mean(1, keepdim=True) for v in (first, second))
    else:
        a, b = model.eval()(first), model.eval()(second)
    cosine = F.normalize(a) @ F.normalize(b).T
    same = torch.eye(len(a), dtype=torch.bool)
    far, tar, _ = roc_curve(same.flatten(), cosine.flatten(), drop_intermediate=False)
    far, tar = torch.tensor(far), torch.tensor(tar)
    at = lambda rate: tar[far <= rate][-1].item()  # noqa: E731
    (nearest,) = flashpair.mine(a, b, [flashpair.Extreme()], normalize=True)
    scores = {
        "AUC": float(roc_auc_score(same.flatten(), cosine.flatten())),
        "TAR at FAR 1 %": at(1e-2),
        "TAR at FAR 0.1 %": at(1e-3),
        "best accuracy": ((tar + 1 - far) / 2).max().item(),
        "rank 1": (nearest.indices[:, 0] == torch.arange(len(a))).double().mean().item(),
    }
    return Verification(far, tar, scores)


def print_scores(rows: dict[str, Verification], images: int) -> None:
    columns = list(next(iter(rows.values())).scores)
    width = max(map(len, rows))
    print(f"\n{f'{images} images never seen':<{width}}  " + "  ".join(f"{c:>16}" for c in columns))
    for name, found in rows.items():
        print(f"{name:<{width}}  " + "  ".join(f"{found.scores[c]:>16.4f}" for c in columns))
    print("best accuracy: mean of true accepts and true rejects at the best threshold.\n")


def draw(rows: dict[str, Verification], first: Tensor, second: Tensor, curve: list[float], path: Path) -> None:
    """ROC curves, pairs of views, and the loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (roc, pairs, loss) = plt.subplots(1, 3, figsize=(13, 4), gridspec_kw={"width_ratios": [5, 4, 4]})
    for name, found in rows.items():
        roc.plot(
            found.false_accepts.clamp_min(1e-5), found.true_accepts, label=f"{name}, AUC {found.scores['AUC']:.3f}"
        )
    roc.set(xscale="log", xlim=(1e-4, 1), ylim=(0, 1), xlabel="false accept rate", ylabel="true accept rate")
    roc.set_title("verification of images never seen")
    roc.axvline(1e-2, color="grey", linewidth=0.5)
    roc.legend(loc="lower right")
    shown = torch.cat([torch.cat([first[i, 0], second[i, 0]]) for i in range(12)], dim=1)
    pairs.imshow(torch.cat(shown.chunk(2, dim=1)), cmap="gray_r")
    pairs.set_axis_off()
    pairs.set_title("two views of an image, above each other")
    loss.plot(curve, linewidth=0.7)
    loss.set(xlabel="step", ylabel="loss")
    loss.set_title("training")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


# --- capacity ---------------------------------------------------------------------------------------------------------

#: float32 arrays of the weights' size that an optimiser keeps.
STATES = {"sgd": 0, "momentum": 1, "adamw": 2}
#: Copies of the B × C logits of code that stores them: product, clamped, scaled into the softmax, gradient.
LOGITS = 4
WORKSPACE = 256 << 20


def bytes_per_identity(kind: str, batch: int, features: int, optimizer: str) -> int:
    """Bytes that one more identity takes, float32: weights, their gradient, optimiser, normalised copy, logits."""
    rows = {"dense": 3, "flashpair": 2, "flashpair, fused step": 1}[kind] + STATES[optimizer]
    return 4 * (rows * features + (LOGITS * batch if kind == "dense" else 0))


def capacity(batch: int, features: int, optimizer: str) -> None:
    """Identities that fit, by arithmetic."""
    kinds = ("dense", "flashpair", "flashpair, fused step")
    print(f"\nidentities that fit, in millions: batch {batch}, {features} features, {optimizer}, float32 (computed)\n")
    print(f"{'memory':>8}  " + "  ".join(f"{k:>22}" for k in kinds))
    for gibibytes in (8, 16, 24, 40, 80):
        free = (gibibytes << 30) - WORKSPACE
        counts = [free / bytes_per_identity(kind, batch, features, optimizer) / 1e6 for kind in kinds]
        print(f"{gibibytes:>4} GiB  " + "  ".join(f"{c:>22.2f}" for c in counts))
    print()


def measure(kind: str, identities: int, batch: int, features: int) -> None:
    """In a fresh process: print the growth of the resident memory over one step of plain SGD, weights included."""
    from flashpair.heads import FusedSGD

    status = Path("/proc/self/status")
    read = lambda field: next(  # noqa: E731
        int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(field)
    )

    def step(count: int) -> None:
        x, labels = torch.randn(batch, features, requires_grad=True), torch.arange(batch) % count
        head = ArcFace(count, features)
        if kind == "dense":
            cosine = (F.normalize(x) @ F.normalize(head.weight).T).clamp(-1, 1)
            logits = 64.0 * (cosine - 0.35 * F.one_hot(labels, count).bool().float())
            F.cross_entropy(logits, labels).backward()
        else:
            if "fused" in kind:
                head.fuse(FusedSGD([head.weight], lr=0.1))
            head(x, labels).backward()

    flashpair.set_max_workspace_bytes(32 << 20)
    step(2 * batch)
    flashpair.release_workspace()
    before = read("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(identities)
    print(json.dumps({"bytes": read("VmHWM") - before}))


def check(batch: int = 256, features: int = 128, identities: int = 100_000) -> int:
    """The table's arithmetic against measurement; exit status 1 where flashpair needs more than computed."""
    print(f"\nMiB of one step, plain SGD: batch {batch}, {features} features, {identities} identities")
    status = 0
    for kind in ("dense", "flashpair", "flashpair, fused step"):
        command = [sys.executable, __file__, "--measure", kind, str(identities), str(batch), str(features)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])["bytes"] / 2**20
        computed = identities * bytes_per_identity(kind, batch, features, "sgd") / 2**20 + (kind != "dense") * 32
        status |= kind != "dense" and found > computed + 16
        print(f"  {kind:<22} measured {found:7.0f}   computed {computed:7.0f}")
    return int(status)


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps; marks are not checked")
    parser.add_argument("--capacity", action="store_true", help="print the capacity table and end")
    parser.add_argument("--check", action="store_true", help="measure the capacity table's arithmetic and end")
    parser.add_argument("--batch", type=int, default=1024, help="of the capacity table")
    parser.add_argument("--features", type=int, default=512, help="of the capacity table")
    parser.add_argument("--optimizer", choices=list(STATES), default="momentum", help="of the capacity table")
    parser.add_argument("--out", type=Path, default=Path("out/faces.png"))
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, *sizes = options.measure
        measure(kind, *map(int, sizes))
        return 0
    if options.check:
        return check()
    if options.capacity:
        capacity(options.batch, options.features, options.optimizer)
        return 0
    images = load_images()
    generator = torch.Generator().manual_seed(2)
    unseen = images[IDENTITIES:]
    first, second = view(unseen, generator), view(unseen, generator)
    start = time.perf_counter()
    model, curve = train(images[:IDENTITIES], 60 if options.quick else STEPS)
    seconds = time.perf_counter() - start
    rows = {"raw pixels": verify(None, first, second), "ArcFace": verify(model, first, second)}
    print_scores(rows, len(unseen))
    print(
        f"trained on {IDENTITIES} identities in {seconds:.0f} s, backend {flashpair.dispatch.choose(first[:, 0, 0], 1)}"
    )
    draw(rows, first, second, curve, options.out)
    if options.quick:
        return 0
    missed = [name for name, mark in MARKS.items() if rows["ArcFace"].scores[name] < mark]
    for name in missed:
        print(f"{name} is {rows['ArcFace'].scores[name]:.4f}, below its mark {MARKS[name]}")
    capacity(options.batch, options.features, options.optimizer)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
