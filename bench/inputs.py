"""What the cases are measured on: random embeddings, and clustered ones as a trained model gives them.

Skipping depends on the data: a mined or hinge loss of a trained model has few pairs that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

RANDOM, HALFWAY, TRAINED = math.inf, 1.2, 0.5  # spread of classes around their centres


@dataclass
class Inputs:
    x: Tensor  # (B, D)
    y: Tensor | None = None  # (B, D)
    labels: Tensor | None = None  # (B,)
    scale: Tensor | None = None  # 0-d
    bias: Tensor | None = None  # 0-d
    memory: Tensor | None = None  # (M, D) columns that take no gradient
    memory_labels: Tensor | None = None  # (M,)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.y, self.scale, self.bias) if t is not None]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        """A copy whose leaves are leaves again; scale and bias are not narrowed."""
        wide = torch.promote_types(dtype, torch.float32)

        def moved(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
            return None if t is None else t.detach().to(device, dtype or t.dtype, copy=True)

        def leaf(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if t is None else moved(t, dtype).requires_grad_()

        return Inputs(
            leaf(self.x, dtype), leaf(self.y, dtype), moved(self.labels), leaf(self.scale, wide), leaf(self.bias, wide),
            moved(self.memory, dtype), moved(self.memory_labels),
        )  # fmt: skip

    def widened(self) -> Inputs:
        """The same in float32; gradients go through to these leaves."""
        wide = lambda t: None if t is None else t.float()  # noqa: E731
        return replace(self, x=wide(self.x), y=wide(self.y), memory=wide(self.memory))


def towers(scale: float, bias: float | None = None, noise: float = 2.0) -> Callable[[int, int], Inputs]:
    """Two normalised towers whose pairs agree a little (0.5: as well as trained ones), a learnable scale and bias."""

    def make(batch: int, width: int) -> Inputs:
        generator = torch.Generator().manual_seed(batch + width)
        x, other = torch.randn(2, batch, width, generator=generator)
        x, y = F.normalize(x), F.normalize(x + noise * other)
        return Inputs(x, y, None, torch.tensor(scale), None if bias is None else torch.tensor(bias)).to(torch.float32)

    return make


def labelled(views: int, spread: float) -> Callable[..., Inputs]:
    """`views` embeddings per class in random order; spread ∞ is random, 0.5 gives positive cosines near 0.8."""

    def make(batch: int, width: int, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(batch + width + seed)
        labels = (torch.arange(batch) // views)[torch.randperm(batch, generator=generator)]
        noise = F.normalize(torch.randn(batch, width, generator=generator))
        centres = F.normalize(torch.randn(-(-batch // views), width, generator=generator))
        x = noise if math.isinf(spread) else centres[labels] + spread * noise
        return Inputs(x, None, labels).to(torch.float32)

    return make


MEMORY = 16  # rows of a cross-batch memory per row of the batch


def remembered(batch: int, width: int) -> Inputs:
    """A batch, and the embeddings of the batches before it."""
    whole = labelled(4, HALFWAY)((1 + MEMORY) * batch, width)
    x, memory = whole.x.detach().split([batch, MEMORY * batch])
    labels, memory_labels = whole.labels.split([batch, MEMORY * batch])
    return Inputs(x, None, labels, None, None, memory, memory_labels).to(torch.float32)


IDENTITIES = 200_000


def classes_of(batch: int) -> int:
    """Few for a smoke check."""
    return IDENTITIES if batch >= 128 else 2 * batch


def identities(batch: int, width: int) -> Inputs:
    """Embeddings near the weights of their classes, of which there are many."""
    classes = classes_of(batch)
    generator = torch.Generator().manual_seed(batch + width)
    weight = torch.randn(classes, width, generator=generator)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    x = weight[labels] + 2 * torch.randn(batch, width, generator=generator)
    return Inputs(x, weight, labels).to(torch.float32)


def decided(batch: int, width: int) -> Inputs:
    """Random classes of four in which float32 can tell which pair of every row is the hardest: ten roundings apart,
    also after the inputs were narrowed."""
    from dense import masks

    for seed in range(100):
        inputs = labelled(4, RANDOM)(batch, width, seed)
        positive, negative = masks(inputs.labels)
        gaps = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = F.normalize(inputs.x.detach().to(dtype).double())
            s = x @ x.T
            gaps += [-v.topk(2).values.diff() for v in (s.masked_fill(~negative, -2), (-s).masked_fill(~positive, -2))]
        if min(gap.min().item() for gap in gaps) > 10 * torch.finfo(torch.float32).eps:
            return inputs
    raise RuntimeError(f"no seed separates the hardest pairs of {batch} rows")


def decided_triplets(batch: int, width: int, margin: float = 0.05) -> Inputs:
    """Few rows in which float32 can tell which triplets violate the margin: one that flips shows in a gradient."""
    from dense import distances, masks

    for seed in range(100):
        inputs = labelled(4, RANDOM)(min(batch, 64), width, seed)
        positive, negative = masks(inputs.labels)
        smallest = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            d = distances(inputs.x.detach().to(dtype).double())
            violation = (d[:, :, None] - d[:, None, :] + margin)[positive[:, :, None] & negative[:, None, :]]
            smallest.append(violation.abs().min().item())
        if min(smallest) > 10 * torch.finfo(torch.float32).eps:
            return inputs
    raise RuntimeError(f"no seed separates the triplets of {batch} rows")
