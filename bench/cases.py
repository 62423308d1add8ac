"""The cases: inputs, flashpair's loss, the same loss in dense PyTorch, and the public peer where there is one.

Every implementation maps `Inputs` to a 0-d loss; gradients go to `inputs.leaves`. A wrapper is the shortest use of its
library that a user would write. The dense versions store S and are what one writes by hand.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Inputs:
    x: Tensor  # (B, D)
    y: Tensor | None = None  # (B, D)
    labels: Tensor | None = None  # (B,)
    scale: Tensor | None = None  # 0-d
    bias: Tensor | None = None  # 0-d

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.y, self.scale, self.bias) if t is not None]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        """A copy whose leaves are leaves again; scale and bias are not narrowed."""
        wide = torch.promote_types(dtype, torch.float32)

        def leaf(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if t is None else t.detach().to(device, dtype, copy=True).requires_grad_()

        labels = None if self.labels is None else self.labels.to(device, copy=True)
        return Inputs(leaf(self.x, dtype), leaf(self.y, dtype), labels, leaf(self.scale, wide), leaf(self.bias, wide))


class CannotRun(RuntimeError):
    """An implementation that is not installed, or would not fit this machine; the message says why."""


@dataclass(frozen=True)
class Implementation:
    loss: Callable[[Inputs], Tensor]
    during: Callable[[], AbstractContextManager] = contextlib.nullcontext  # around forward and backward


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[int, int], Inputs]
    flashpair: Callable[[Inputs], Tensor]
    dense: Callable[[Inputs], Tensor]
    peers: dict[str, Callable[[Inputs], Tensor]] = field(default_factory=dict)
    #: Bytes that a peer needs beyond the usual few B×B matrices, by name.
    peer_bytes: dict[str, Callable[[int], float]] = field(default_factory=dict)
    #: Peers that run on GPUs only.
    gpu_peers: dict[str, Callable[[Inputs], Tensor]] = field(default_factory=dict)
    #: Products of B×B×D that value and gradients take where S is not kept; half of one for a triangle.
    products: float = 4.0
    #: Inputs of the correctness gate; default: those that are timed.
    gate: Callable[[int, int], Inputs] | None = None
    #: Columns of S where they are not the batch, and the (B, D) that are measured then, whatever is asked for.
    columns: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()

    def implementations(self, device: str = "cpu") -> dict[str, Implementation]:
        ours = {"flashpair": Implementation(self.flashpair)} if device == "cpu" else on_gpu_backends(self.flashpair)
        compiled = torch.compile(self.dense, fullgraph=True, dynamic=False)
        others = {"dense": self.dense, "compile": compiled, **self.peers}
        others |= self.gpu_peers if device == "cuda" else {}
        return ours | {name: Implementation(loss) for name, loss in others.items()}

    def needs_bytes(self, implementation: str, batch: int) -> float:
        """A floor for what an implementation allocates; 0 for flashpair and peers that do not store S."""
        if implementation.startswith("flashpair") or implementation in self.gpu_peers:
            return 0.0
        return self.peer_bytes.get(implementation, lambda b: 6 * 4.0 * b * (self.columns or b))(batch)


# --- inputs -----------------------------------------------------------------------------------------------------------


def towers(scale: float, bias: float | None = None) -> Callable[[int, int], Inputs]:
    """Two normalised towers whose pairs agree a little, with a learnable scale and bias."""

    def make(batch: int, width: int) -> Inputs:
        generator = torch.Generator().manual_seed(batch + width)
        x, noise = torch.randn(2, batch, width, generator=generator)
        x, y = F.normalize(x), F.normalize(x + 2 * noise)
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


IDENTITIES = 200_000


def identities(batch: int, width: int) -> Inputs:
    """Embeddings near the weights of their classes, of which there are many; few for a smoke check."""
    classes = IDENTITIES if batch >= 128 else 2 * batch
    generator = torch.Generator().manual_seed(batch + width)
    weight = torch.randn(classes, width, generator=generator)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    x = weight[labels] + 2 * torch.randn(batch, width, generator=generator)
    return Inputs(x, weight, labels).to(torch.float32)


def decided(batch: int, width: int) -> Inputs:
    """Random classes of four in which float32 can tell which pair of every row is the hardest: ten roundings apart."""
    for seed in range(100):
        inputs = labelled(4, RANDOM)(batch, width, seed)
        x = F.normalize(inputs.x.detach().double())
        positive, negative = masks(inputs.labels)
        s = x @ x.T
        gaps = [-v.topk(2).values.diff() for v in (s.masked_fill(~negative, -2), (-s).masked_fill(~positive, -2))]
        if min(gap.min().item() for gap in gaps) > 10 * torch.finfo(torch.float32).eps:
            return inputs
    raise RuntimeError(f"no seed separates the hardest pairs of {batch} rows")


# --- dense PyTorch ----------------------------------------------------------------------------------------------------


def masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, B) positives without self, negatives."""
    same = labels[:, None] == labels[None]
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    return F.normalize(x) @ F.normalize(x if y is None else y).T


def masked_lse(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(~mask, -math.inf).logsumexp(1)


def average_nonzero(terms: Tensor) -> Tensor:
    return terms.sum() / (terms > 0).sum().clamp_min(1)


def dense_clip(i: Inputs) -> Tensor:
    logits = i.scale * i.x @ i.y.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def dense_siglip(i: Inputs) -> Tensor:
    logits = i.scale * i.x @ i.y.T + i.bias
    sign = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def dense_info_nce(i: Inputs, temperature: float = 0.1) -> Tensor:
    logits = i.scale * F.normalize(i.x) @ F.normalize(i.y).T / temperature
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def dense_supcon(i: Inputs, temperature: float = 0.1) -> Tensor:
    z = cosine(i.x) / temperature
    positive, negative = masks(i.labels)
    mean_positive = (z * positive).sum(1) / positive.sum(1)
    return average_nonzero(masked_lse(z, positive | negative) - mean_positive)


def dense_nt_xent(i: Inputs, temperature: float = 0.07) -> Tensor:
    """One positive per row (two views of each image)."""
    z = cosine(i.x) / temperature
    positive, negative = masks(i.labels)
    return (masked_lse(z, positive | negative) - (z * positive).sum(1)).mean()


def dense_multi_similarity(i: Inputs, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1) -> Tensor:
    s = cosine(i.x)
    positive, negative = masks(i.labels)
    fixed = s.detach()
    hardest_positive = fixed.masked_fill(~positive, math.inf).amin(1, keepdim=True)
    hardest_negative = fixed.masked_fill(~negative, -math.inf).amax(1, keepdim=True)
    positive = positive & (fixed - epsilon < hardest_negative)
    negative = negative & (fixed + epsilon > hardest_positive)
    pull, push = masked_lse(alpha * (base - s), positive), masked_lse(beta * (s - base), negative)
    return (F.softplus(pull) / alpha + F.softplus(push) / beta).mean()


def dense_circle(i: Inputs, m: float = 0.4, gamma: float = 80.0) -> Tensor:
    s = cosine(i.x)
    positive, negative = masks(i.labels)
    fixed = s.detach()
    pull = masked_lse(-gamma * (1 + m - fixed).relu() * (s - (1 - m)), positive)
    push = masked_lse(gamma * (fixed + m).relu() * (s - m), negative)
    return average_nonzero(F.softplus(pull + push))


def dense_arc_face(i: Inputs, margin: float = 0.5, scale: float = 64.0) -> Tensor:
    """As public code does it, on the cosine of each row with its own class alone."""
    logits, rows = cosine(i.x, i.y), torch.arange(len(i.x), device=i.x.device)
    own = logits[rows, i.labels].clamp(-1 + 1e-6, 1 - 1e-6)
    moved = torch.where(own > math.cos(math.pi - margin), (own.acos() + margin).cos(), own - margin * math.sin(margin))
    return F.cross_entropy(scale * logits.index_put((rows, i.labels), moved), i.labels)


def dense_linear(i: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(i.x, i.y) / 16, i.labels)


def distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """(B, B) Euclidean distances of normalised rows; the diagonal is 0 with gradient 0."""
    s = cosine(x, y)
    itself = torch.eye(len(s), dtype=torch.bool, device=s.device)
    return (2 - 2 * s).clamp_min(0).masked_fill(itself, 1.0).sqrt().masked_fill(itself, 0.0)


def dense_contrastive(i: Inputs, negative_margin: float = 1.0, memory: Tensor | None = None) -> Tensor:
    d = distances(i.x, memory)
    positive, negative = masks(i.labels)
    return average_nonzero(d * positive) + average_nonzero((negative_margin - d).relu() * negative)


def dense_batch_hard(i: Inputs, margin: float = 0.05) -> Tensor:
    d = distances(i.x)
    positive, negative = masks(i.labels)
    furthest = d.masked_fill(~positive, -math.inf).max(1).values
    closest = d.masked_fill(~negative, math.inf).min(1).values
    return average_nonzero((furthest - closest + margin).relu())


# --- flashpair --------------------------------------------------------------------------------------------------------


@cache
def once(make: Callable, *arguments):
    """A loss or miner is made once, as a training script does, not at every step."""
    return make(*arguments)


def flash_clip(i: Inputs) -> Tensor:
    from flashpair.losses import ClipLoss

    return once(ClipLoss)(i.x, i.y, i.scale)


def flash_siglip(i: Inputs) -> Tensor:
    from flashpair.losses import SigLipLoss

    return once(SigLipLoss)(i.x, i.y, i.scale, i.bias)


def flash_info_nce(i: Inputs) -> Tensor:
    from flashpair.losses import InfoNCELoss

    return InfoNCELoss(temperature=0.1 / i.scale)(i.x, i.y)


def flash_arc_face(i: Inputs) -> Tensor:
    from flashpair.heads import CombinedMargin, class_loss

    return class_loss(i.x, i.y, i.labels, margin=CombinedMargin(scale=64.0, m2=0.5))


def flash_linear(i: Inputs) -> Tensor:
    import flashpair

    return flashpair.linear_cross_entropy(i.x / 16, i.y, i.labels)


def from_names(losses, miners, loss: str, miner: str | None = None) -> Callable[[Inputs], Tensor]:
    """A user's call: the loss with its defaults, after the miner where there is one."""

    def run(i: Inputs) -> Tensor:
        mined = None if miner is None else once(getattr(miners(), miner))(i.x, i.labels)
        return once(getattr(losses(), loss))(i.x, i.labels, mined)

    return run


def flash(loss: str, miner: str | None = None) -> Callable[[Inputs], Tensor]:
    import flashpair.losses
    import flashpair.miners

    return from_names(lambda: flashpair.losses, lambda: flashpair.miners, loss, miner)


@contextlib.contextmanager
def backend_forced(name: str) -> Iterator[None]:
    """Inside it flashpair runs on one backend, or the reason why it cannot is raised."""
    import flashpair

    state = flashpair.backends().get(name, "not in this version")
    if state != "usable":
        raise CannotRun(f"backend {name}: {state}")
    with flashpair.use_backend(name):
        yield


@contextlib.contextmanager
def cuda_form(name: str) -> Iterator[None]:
    """Backend cuda in one of its forms, where it has them."""
    with backend_forced("cuda"):
        from flashpair import backend_cuda

        if not hasattr(backend_cuda, "form"):
            raise CannotRun("backend cuda has one form only")
        with backend_cuda.form(name):
            yield


def on_gpu_backends(loss: Callable[[Inputs], Tensor]) -> dict[str, Implementation]:
    """flashpair on each GPU backend."""
    return {
        "flashpair[triton]": Implementation(loss, partial(backend_forced, "triton")),
        "flashpair[cuda]": Implementation(loss, partial(backend_forced, "cuda")),
        "flashpair[cuda, simple form]": Implementation(loss, partial(cuda_form, "simple")),
    }


# --- peers ------------------------------------------------------------------------------------------------------------


def installed(module: str):
    """An optional module; its absence says so by name."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CannotRun(str(error)) from error


def metric_learning(loss: str, miner: str | None = None) -> Callable[[Inputs], Tensor]:
    part = lambda name: installed(f"pytorch_metric_learning.{name}")  # noqa: E731
    return from_names(lambda: part("losses"), lambda: part("miners"), loss, miner)


def metric_learning_arc_face(i: Inputs) -> Tensor:
    """Its weights are (D, C) and its own; its margin is in degrees."""
    loss = installed("pytorch_metric_learning.losses").ArcFaceLoss
    with torch.device("meta"):  # weights that nobody uses
        head = loss(len(i.y), i.x.shape[1], margin=math.degrees(0.5), scale=64)
    return torch.func.functional_call(head, {"W": i.y.T}, (i.x, i.labels))


def torch_linear(i: Inputs) -> Tensor:
    """torch's own, in chunks of the batch."""
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRun(f"torch {torch.__version__} has no linear_cross_entropy")
    return F.linear_cross_entropy(i.x / 16, i.y, i.labels, options=torch.nn.LinearCrossEntropyOptions())


@cache
def open_clip_losses():
    """open_clip's loss.py alone: its package needs torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        raise CannotRun("open_clip is not installed (pip install --no-deps open_clip_torch)")
    path = Path(next(iter(package.submodule_search_locations))) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_clip(i: Inputs) -> Tensor:
    if i.bias is None:
        return once(open_clip_losses().ClipLoss)(i.x, i.y, i.scale)
    return once(open_clip_losses().SigLipLoss)(i.x, i.y, i.scale, i.bias)


def both_ways(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor], i: Inputs) -> Tensor:
    """CLIP as two classifications, each tower in turn holding the class weights: (scaled inputs, weights, targets)."""
    target = torch.arange(len(i.x), device=i.x.device)
    return (cross_entropy(i.scale * i.x, i.y, target) + cross_entropy(i.scale * i.y, i.x, target)) / 2


def inf_cl(i: Inputs) -> Tensor:
    loss, head = installed("inf_cl").cal_flash_loss, min(i.x.shape[1], 256)
    return both_ways(lambda x, y, target: loss(x, y, target, head_dim=head).mean(), i)


def cut_cross_entropy(i: Inputs) -> Tensor:
    return both_ways(installed("cut_cross_entropy").linear_cross_entropy, i)


def liger(i: Inputs) -> Tensor:
    loss = installed("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return both_ways(lambda x, y, target: loss(y, x, target), i)


# --- the table --------------------------------------------------------------------------------------------------------

PEER = "metric-learning"
RANDOM, HALFWAY, TRAINED = math.inf, 1.2, 0.5


def metric_case(name, make, dense, loss, miner=None, peer_bytes=None, products=2.0, **options) -> Case:
    """`peer_bytes` defaults to index tensors of every pair beside the matrices."""
    needs = {PEER: peer_bytes or (lambda b: 60.0 * b * b)}
    peers = {PEER: metric_learning(loss, miner)}
    return Case(name, make, flash(loss, miner), dense, peers, needs, products=products, **options)


def mined_case(name: str, spread: float) -> Case:
    """Multi-similarity loss and miner; how many pairs survive mining depends on how well the classes are apart."""
    loss, miner = "MultiSimilarityLoss", "MultiSimilarityMiner"
    return metric_case(name, labelled(4, spread), dense_multi_similarity, loss, miner, products=2.5)


CLIP_PEERS = {"inf_cl": inf_cl, "cut_cross_entropy": cut_cross_entropy, "liger_kernel": liger}
CASES = (
    Case("clip", towers(14.3), flash_clip, dense_clip, {"open_clip": open_clip}, gpu_peers=CLIP_PEERS),
    Case("siglip", towers(10.0, -10.0), flash_siglip, dense_siglip, {"open_clip": open_clip}, products=3.0),
    Case("infonce", towers(1.0), flash_info_nce, dense_info_nce),
    metric_case("supcon", labelled(4, RANDOM), dense_supcon, "SupConLoss"),
    # pytorch-metric-learning builds a (positive pairs) × (negative pairs) matrix, several times.
    metric_case(
        "ntxent", labelled(2, RANDOM), dense_nt_xent, "NTXentLoss", peer_bytes=lambda b: 4 * 4.0 * b * b * (b - 2)
    ),
    mined_case("ms-random", RANDOM),
    mined_case("ms-halfway", HALFWAY),
    mined_case("ms-trained", TRAINED),
    metric_case("circle", labelled(4, RANDOM), dense_circle, "CircleLoss"),
    metric_case("contrastive", labelled(4, RANDOM), dense_contrastive, "ContrastiveLoss"),
    metric_case(
        "batch-hard",
        labelled(4, RANDOM),
        dense_batch_hard,
        "TripletMarginLoss",
        "BatchHardMiner",
        products=0.5,
        gate=decided,
    ),
    Case(
        "arcface",
        identities,
        flash_arc_face,
        dense_arc_face,
        {PEER: metric_learning_arc_face},
        columns=IDENTITIES,
        sizes=((256, 256),),
    ),
    Case(
        "linear-cross-entropy",
        identities,
        flash_linear,
        dense_linear,
        {"torch chunked": torch_linear},
        columns=IDENTITIES,
        sizes=((256, 256),),
    ),
)


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One row of results."""

    case: str
    batch: int
    width: int
    dtype: str
    compiled: bool = True  # torch.compile takes part; it compiles anew for every size


def gpu_jobs() -> list[Job]:
    """What a GPU is measured at, the most telling first: whoever runs out of time has those."""
    names = ("clip", "supcon", "siglip", "ms-random", "ms-trained", "batch-hard")
    half = "bfloat16"
    jobs = [Job(name, 32768, 512, half) for name in (*names, "ntxent")]
    jobs += [Job("clip", 32768, 1024, half, compiled=False), Job("arcface", 1024, 512, half, compiled=False)]
    jobs += [Job(name, 4096, 512, half, compiled=name in names[:2]) for name in names]
    jobs += [Job("clip", batch, 512, "float32", compiled=False) for batch in (4096, 16384)]
    rest = [(b, d) for d in (512, 128, 1024) for b in (16384, 4096, 32768)]
    jobs += [Job(name, b, d, half, compiled=False) for b, d in rest for name in names]
    first: dict[tuple, Job] = {}
    for job in jobs:
        first.setdefault((job.case, job.batch, job.width, job.dtype), job)
    return list(first.values())


PRESETS = {"gpu": gpu_jobs}
