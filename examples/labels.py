"""Labels that are more than a class: several attributes of a digit, and an angle to be ordered.

    python examples/labels.py        (or `make labels`; half a minute on two cores)

Several labels: MulSupCon on what a digit is (even, prime, at least five, has a loop, has a straight line). Among the
ten nearest of an unseen image, how many of its attributes are shared (mean Jaccard index), beside raw pixels.

An angle: digits turned by up to 60 degrees either way, Rank-N-Contrast on the angle, then ridge regression on the
frozen embeddings: mean absolute error in degrees on unseen digits, beside ridge regression on raw pixels.

Writes out/labels.png. Exit status 1 where a result misses its mark.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashpair
from flashpair.losses import MulSupConLoss, RnCLoss

TRAINED, BATCH, NEAREST, LARGEST = 1300, 512, 10, 60.0
ATTRIBUTES = {
    "even": {0, 2, 4, 6, 8}, "prime": {2, 3, 5, 7}, "at least 5": {5, 6, 7, 8, 9}, "loop": {0, 6, 8, 9},
    "straight line": {1, 4, 5, 7},
}  # fmt: skip
JACCARD, ERROR = 0.05, 0.75  # marks: more than raw pixels by this much; at most this share of their error


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8), ink from 0 to 1, and their digits, in a fixed random order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(found.images).float()[order, None] / 16, torch.from_numpy(found.target)[order]


def network(width: int = 128) -> nn.Module:
    """(B, 1, 8, 8) → (B, 32)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 16, width), nn.GELU(), nn.Linear(width, 32), nn.BatchNorm1d(32, affine=False),
    )  # fmt: skip


def train(draw, loss, steps: int, name: str) -> tuple[nn.Module, list[float]]:
    """A network trained on `draw(generator)` → (images, labels), and its curve."""
    from tqdm import trange

    torch.manual_seed(0)
    model, generator, curve = network(), torch.Generator().manual_seed(1), []
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    bar = trange(steps, desc=name)
    for _ in bar:
        images, labels = draw(generator)
        value = loss(model(images + 0.1 * torch.randn(images.shape, generator=generator)), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.item())
        bar.set_postfix(loss=f"{curve[-1]:.4f}")
    return model.eval(), curve


def multi_hot(of: Tensor) -> Tensor:
    """(B, 5) attributes of digits (B,)."""
    return torch.tensor([[d in members for members in ATTRIBUTES.values()] for d in of.tolist()]).long()


@torch.no_grad()
def shared_attributes(x: Tensor, labels: Tensor) -> float:
    """Mean Jaccard index of each row's attributes and those of its nearest rows."""
    (found,) = flashpair.mine(x, extremes=[flashpair.Extreme(k=NEAREST)], normalize=True)
    both = (labels[:, None] & labels[found.indices]).sum(2)
    return (both / (labels[:, None] | labels[found.indices]).sum(2).clamp_min(1)).mean().item()


def turned(images: Tensor, degrees: Tensor) -> Tensor:
    """Images turned counter-clockwise."""
    a = degrees * math.pi / 180
    zero = torch.zeros_like(a)
    maps = torch.stack([torch.stack([a.cos(), -a.sin(), zero], 1), torch.stack([a.sin(), a.cos(), zero], 1)], 1)
    return F.grid_sample(images, F.affine_grid(maps, images.shape, align_corners=False), align_corners=False)


def ridge_error(x: Tensor, y: Tensor, unseen: Tensor, wanted: Tensor) -> float:
    """Mean absolute error on unseen rows of a ridge regression."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(torch.logspace(-2, 4, 13).numpy()))
    return float(abs(model.fit(x.numpy(), y.numpy()).predict(unseen.numpy()) - wanted.numpy()).mean())


def several_labels(steps: int) -> tuple[float, float, list[float]]:
    """(pixels' score, learned score, curve)."""
    images, of = digits()
    labels = multi_hot(of)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(TRAINED, generator=generator)[:BATCH]
        return images[chosen], labels[chosen]

    model, curve = train(draw, MulSupConLoss(0.2), steps, "attributes")
    unseen, wanted = images[TRAINED:], labels[TRAINED:]
    with torch.no_grad():
        learned = model(unseen)
    return shared_attributes(unseen.flatten(1), wanted), shared_attributes(learned, wanted), curve


def an_angle(steps: int) -> tuple[float, float, list[float]]:
    """(pixels' error, error on what was learned, curve), in degrees."""
    images, _ = digits()

    def draw(generator: torch.Generator, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(TRAINED, generator=generator)[:BATCH] if rows is None else rows
        degrees = LARGEST * (2 * torch.rand(len(rows), generator=generator) - 1)
        return turned(images[rows], degrees), degrees

    model, curve = train(draw, RnCLoss(), steps, "angle")
    generator = torch.Generator().manual_seed(2)
    seen, of_seen = draw(generator, torch.arange(TRAINED).repeat(3))
    unseen, wanted = draw(generator, torch.arange(TRAINED, len(images)))
    with torch.no_grad():
        learned = ridge_error(model(seen), of_seen, model(unseen), wanted)
    return ridge_error(seen.flatten(1), of_seen, unseen.flatten(1), wanted), learned, curve


def draw_figure(path: Path, results: dict[str, tuple[float, float, list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", width_ratios=(2, 1))
    for (left, right), (title, (pixels, learned, curve)) in zip(axes, results.items(), strict=True):
        left.plot(curve)
        left.set(xlabel="step", ylabel="loss")
        right.bar_label(right.bar(["pixels", "learned"], [pixels, learned], color=["0.6", "C0"]), fmt="%.2f")
        right.set(title=title)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("out"))
    given = parser.parse_args()
    labels, angle = several_labels(given.steps), an_angle(given.steps)
    print(f"attributes shared with the {NEAREST} nearest: pixels {labels[0]:.3f}, learned {labels[1]:.3f}")
    print(f"error of the angle: pixels {angle[0]:.1f} degrees, learned {angle[1]:.1f} degrees")
    draw_figure(given.out / "labels.png", {"attributes shared (Jaccard)": labels, "error, degrees": angle})
    print(f"wrote {given.out / 'labels.png'}")
    failed = not labels[1] >= labels[0] + JACCARD or not angle[1] <= ERROR * angle[0]
    if failed:
        print("missed: see the marks at the top of the file", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
