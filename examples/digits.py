"""Learn to tell apart images that were never seen: handwritten digits, multi-similarity loss, hard-pair mining.

    python examples/digits.py            (or `make demo`; under three minutes on two cores)

1. Trains a small network on 900 of scikit-learn's digit images under rotation, shift and scale, and retrieves among the
   897 others, as they are and distorted. The same training with the dense reference backend must give the same curve.
2. Times the loss at growing batch sizes against plain dense PyTorch, with the peak memory of each in a fresh process.

Writes out/similarities.png and out/scaling.png. Exit status 1 where a result misses its mark.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashpair
from flashpair.losses import MultiSimilarityLoss
from flashpair.miners import MultiSimilarityMiner

TRAIN = 900
BATCH, STEPS, LEARNING_RATE = 300, 160, 3e-3
DEGREES, SHIFT, SCALE = 15.0, 0.11, 0.15  # largest distortion; the shift in half image widths
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768)
FEATURES = 64
MARKS = {"MAP@R": 0.97, "Recall@1 distorted": 0.97, "curves": 1e-9}


# --- data and network -------------------------------------------------------------------------------------------------


def load_images(seed: int = 0) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits in a fixed random order: images (1797, 1, 8, 8) in [0, 1], labels (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.tensor(digits.target, dtype=torch.int64)[order]


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random rotation, scale and shift of each image (B, 1, H, W)."""
    turn, zoom, right, down = torch.rand(4, len(images), generator=generator) * 2 - 1
    zoom = 1 + SCALE * zoom
    cos, sin = (math.radians(DEGREES) * turn).cos() / zoom, (math.radians(DEGREES) * turn).sin() / zoom
    rows = [torch.stack([cos, -sin, SHIFT * right], 1), torch.stack([sin, cos, SHIFT * down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images, grid, align_corners=False)


def network(width: int = 32) -> nn.Sequential:
    """(B, 1, 8, 8) images → (B, 64) embeddings."""
    convolution = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]  # noqa: E731
    return nn.Sequential(
        *convolution(1, width),
        *convolution(width, 2 * width),
        nn.MaxPool2d(2),
        *convolution(2 * width, 2 * width),
        nn.Flatten(),
        nn.Linear(2 * width * 16, FEATURES),
    )


# --- retrieval --------------------------------------------------------------------------------------------------------


def recall_at_1(queries: Tensor, gallery: Tensor, labels: Tensor) -> float:
    """How often the nearest other image has the query's label; query i and gallery image i are the same image."""
    itself = torch.arange(len(labels))
    (nearest,) = flashpair.mine(queries, gallery, [flashpair.Extreme()], exclude=itself, normalize=True)
    return (labels[nearest.indices[:, 0]] == labels).double().mean().item()


def map_at_r(queries: Tensor, gallery: Tensor, labels: Tensor) -> float:
    """Mean over queries of 1/R Σ_{k≤R} precision@k · hit_k, R the number of other images with the query's label."""
    similarity = F.normalize(queries) @ F.normalize(gallery).T
    similarity.fill_diagonal_(-math.inf)
    relevant = (labels[:, None] == labels[None]).sum(1) - 1  # (B,)
    found = similarity.topk(int(relevant.max()), dim=1).indices
    hits = (labels[found] == labels[:, None]).double()  # (B, R)
    rank = torch.arange(1, hits.shape[1] + 1)
    precision = hits.cumsum(1) / rank * hits * (rank <= relevant[:, None])
    return (precision.sum(1) / relevant).mean().item()


@torch.no_grad()
def embed(model: nn.Module | None, images: Tensor) -> Tensor:
    """Embeddings of images; without a model the raw pixels."""
    return images.flatten(1) if model is None else model.eval()(images)


def evaluate(model: nn.Module | None, images: Tensor, distorted: Tensor, labels: Tensor) -> dict[str, float]:
    plain, bent = embed(model, images), embed(model, distorted)
    return {
        "Recall@1": recall_at_1(plain, plain, labels),
        "MAP@R": map_at_r(plain, plain, labels),
        "Recall@1 distorted": recall_at_1(bent, plain, labels),
        "MAP@R distorted": map_at_r(bent, plain, labels),
    }


# --- training ---------------------------------------------------------------------------------------------------------


def train(images: Tensor, labels: Tensor, steps: int, name: str) -> tuple[nn.Module, list[float]]:
    """The trained network and its loss curve. The same seed gives the same batches and the same first weights."""
    from tqdm import trange

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    # In single precision, training turns the last bit of a step into another curve; on which processor is chance.
    model = network().double()
    loss_of, mine = MultiSimilarityLoss(), MultiSimilarityMiner()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    curve = []
    bar = trange(steps, desc=name, leave=True)
    for _ in bar:
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        embeddings = model(distort(images[chosen], generator).double())
        loss = loss_of(embeddings, labels[chosen], mine(embeddings, labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
        bar.set_postfix(loss=f"{curve[-1]:.4f}")
    return model.float(), curve


def print_scores(rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    width = max(map(len, rows))
    print(f"\n{'897 images never seen':<{width}}  " + "  ".join(f"{c:>18}" for c in columns))
    for name, scores in rows.items():
        print(f"{name:<{width}}  " + "  ".join(f"{scores[c]:>18.4f}" for c in columns))
    print("distorted: the query is distorted, the images searched are not; the query itself never counts.\n")


# --- the loss alone, at growing batch sizes ---------------------------------------------------------------------------


def dense_loss(embeddings: Tensor, labels: Tensor, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1) -> Tensor:
    """Multi-similarity loss with its miner, as one writes it in plain PyTorch: S and its masks are stored."""
    x = F.normalize(embeddings)
    s = x @ x.T
    same = labels[:, None] == labels[None]
    positive, negative = same & ~torch.eye(len(x), dtype=torch.bool), ~same
    with torch.no_grad():
        hardest_positive = s.masked_fill(~positive, math.inf).amin(1, keepdim=True)
        hardest_negative = s.masked_fill(~negative, -math.inf).amax(1, keepdim=True)
        positive &= s - epsilon < hardest_negative
        negative &= s + epsilon > hardest_positive
    row_p = (alpha * (base - s)).masked_fill(~positive, -math.inf)
    row_n = (beta * (s - base)).masked_fill(~negative, -math.inf)
    zero = x.new_zeros(len(x), 1)  # the 1 in log(1 + Σ exp)
    row_p, row_n = (torch.cat([row, zero], 1).logsumexp(1) for row in (row_p, row_n))
    return (row_p / alpha + row_n / beta).mean()


def flash_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The same number, S never stored."""
    return MultiSimilarityLoss()(embeddings, labels, MultiSimilarityMiner()(embeddings, labels))


def peak_bytes() -> int:
    """Highest resident memory of this process; VmHWM where there is one, since ru_maxrss survives exec."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def measure(name: str, size: int, rounds: int = 3) -> dict[str, float]:
    """Milliseconds (median) and extra bytes of forward + backward; to be called in a fresh process."""
    loss_of = {"dense": dense_loss, "flashpair": flash_loss}[name]

    def step(batch: int) -> float:
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(batch, FEATURES, generator=generator).requires_grad_()
        labels = torch.randint(10, (batch,), generator=generator)
        start = time.perf_counter()
        loss = loss_of(embeddings, labels)
        loss.backward()
        taken = time.perf_counter() - start
        if not torch.isfinite(loss) or embeddings.grad is None:
            raise RuntimeError(f"{name} gave {loss.item()} at batch size {batch}")
        return taken

    step(128)
    before = peak_bytes()
    times = [step(size)]
    while len(times) < rounds and sum(times) < 5:
        times.append(step(size))
    return {"ms": 1e3 * statistics.median(times), "bytes": peak_bytes() - before}


def measure_apart(name: str, size: int) -> dict[str, float] | None:
    """`measure` in a fresh process; None where it does not survive."""
    command = [sys.executable, __file__, "--measure", name, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"  {name} at {size}: failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def scaling(sizes: tuple[int, ...], budget: float) -> dict[str, dict[int, dict[str, float]]]:
    """Table of both implementations until dense needs more than `budget` bytes."""
    from tqdm import tqdm

    results: dict[str, dict[int, dict[str, float]]] = {"dense": {}, "flashpair": {}}
    text = []
    dense_fits = True
    for size in tqdm(sizes, desc="batch sizes"):
        # S grows fourfold per doubling: whether the next one fits is known without trying it.
        needs = 4 * results["dense"][size // 2]["bytes"] if size // 2 in results["dense"] else 0
        dense_fits = dense_fits and needs <= budget
        dense = measure_apart("dense", size) if dense_fits else None
        flash = measure_apart("flashpair", size)
        cells = [f"{size:>10}"]
        for name, found in (("dense", dense), ("flashpair", flash)):
            if found:
                results[name][size] = found
                cells.append(f"{found['ms']:>12.1f} ms {found['bytes'] / 2**20:>9.0f} MiB")
            else:
                cells.append(f"{'over the budget' if name == 'dense' else 'did not run':>29}")
        cells.append(f"{dense['ms'] / flash['ms']:>8.1f}x" if dense and flash else "")
        text.append("  ".join(cells))
    print(
        "\nmulti-similarity loss with mining, forward + backward, float32, 64 features, random embeddings, 10 classes"
    )
    print(f"dense PyTorch may use {budget / 2**30:g} GiB; {torch.get_num_threads()} threads")
    print(f"{'batch':>10}  {'dense PyTorch':>29}  {'flashpair':>29}  {'faster':>9}")
    print("\n".join(text))
    return results


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_similarities(path: Path, before: Tensor, after: Tensor, labels: Tensor) -> None:
    """Histograms of the cosines of positive and negative pairs of unseen images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    same = labels[:, None] == labels[None]
    upper = torch.ones_like(same).triu(1)
    for axes, (title, x) in zip(
        figure.subplots(1, 2, sharex=True), (("raw pixels", before), ("trained", after)), strict=True
    ):
        cosine = F.normalize(x) @ F.normalize(x).T
        for mask, label, colour in ((same, "same digit", "tab:blue"), (~same, "different digits", "tab:orange")):
            axes.hist(
                cosine[mask & upper].numpy(), 80, range=(-1, 1), density=True, alpha=0.6, label=label, color=colour
            )
        axes.set(title=title, xlabel="cosine similarity of a pair", yticks=[])
        axes.legend()
    figure.savefig(path, dpi=150)


def draw_scaling(path: Path, results: dict[str, dict[int, dict[str, float]]], budget: float) -> None:
    """Time and extra memory against batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name, rows in results.items():
        time_axes.loglog(list(rows), [row["ms"] for row in rows.values()], "o-", base=2, label=name)
        memory_axes.loglog(
            list(rows), [max(row["bytes"], 1) / 2**20 for row in rows.values()], "o-", base=2, label=name
        )
    memory_axes.axhline(budget / 2**20, color="gray", linestyle="--", label="budget")
    time_axes.set(xlabel="batch size", ylabel="ms, forward + backward")
    memory_axes.set(xlabel="batch size", ylabel="extra memory, MiB")
    time_axes.legend()
    memory_axes.legend()
    figure.savefig(path, dpi=150)


# --- main -------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the two pictures")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (the marks hold for the default)")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="batch sizes of the table")
    parser.add_argument("--budget", type=float, default=2.0, help="GiB that dense PyTorch may use")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return 0

    usable = flashpair.backends()
    backend = next(name for name, state in usable.items() if state == "usable")
    if backend == "reference":
        print("No fast backend is usable here, so the dense reference runs, on small batches only:")
        print("\n".join(f"  {name}: {state}" for name, state in usable.items()))
        options.sizes = [size for size in options.sizes if size <= 1024]

    images, labels = load_images()
    unseen, unseen_labels = images[TRAIN:], labels[TRAIN:]
    distorted = distort(unseen, torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    scores = {
        "raw pixels": evaluate(None, unseen, distorted, unseen_labels),
        "network before": evaluate(network(), unseen, distorted, unseen_labels),
    }
    model, curve = train(images[:TRAIN], labels[:TRAIN], options.steps, f"training ({backend})")
    scores["network after"] = evaluate(model, unseen, distorted, unseen_labels)
    with flashpair.use_backend("reference"):
        twin, twin_curve = train(images[:TRAIN], labels[:TRAIN], options.steps, "training (reference)")
    scores["after, reference"] = evaluate(twin, unseen, distorted, unseen_labels)
    print_scores(scores)
    apart = max(abs(a - b) for a, b in zip(curve, twin_curve, strict=True)) / max(curve)
    print(f"loss curves, {backend} against reference, same seed: largest difference {apart:.1e} of the largest loss")

    results = scaling(tuple(options.sizes), options.budget * 2**30)
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = [options.out / "similarities.png", options.out / "scaling.png"]
    draw_similarities(pictures[0], embed(None, unseen), embed(model, unseen), unseen_labels)
    draw_scaling(pictures[1], results, options.budget * 2**30)
    print(f"\nwrote {pictures[0]} and {pictures[1]}")

    reached = scores["network after"]
    missed = [f"{k} {reached[k]:.4f} < {MARKS[k]}" for k in ("MAP@R", "Recall@1 distorted") if reached[k] < MARKS[k]]
    if apart > MARKS["curves"]:
        missed.append(f"loss curves differ by {apart:.1e}")
    if missed:
        print("missed: " + "; ".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
