"""The table of losses under test: ours, its definition as a loop over pairs, the public peer. One row, all tests."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable

import pytest
import support
import torch
from torch import Tensor

from flashpair import losses, miners


class Peer:
    """A module of pytorch-metric-learning; a test that uses it is skipped where that is not installed."""

    def __init__(self, name: str) -> None:
        self.name = f"pytorch_metric_learning.{name}"

    def __getattr__(self, attribute: str):
        if not attribute[0].isupper():  # whoever looks at the modules of a test
            raise AttributeError(attribute)
        return getattr(pytest.importorskip(self.name), attribute)


peer_losses, peer_miners = Peer("losses"), Peer("miners")

#: Losses run on the reference, on the operators' dense twin, and on fused backends (not under Triton's interpreter).
BACKENDS = ["reference", "dense", *(b for b in support.FUSED if not support.interpreted(b))]
OPERATORS = [b for b in BACKENDS if b != "reference"]


@pytest.fixture(params=BACKENDS)
def engine(request):
    with support.forced(request.param):
        yield request.param


@pytest.fixture(params=OPERATORS)
def operator(request):
    with support.forced(request.param):
        yield request.param


@dataclasses.dataclass
class Batch:
    """What a loss is called with; floating-point tensors are the leaves whose gradients are compared."""

    x: Tensor  # (B, D)
    y: Tensor | None  # (N, D)
    labels: Tensor  # (B,)
    ref_labels: Tensor | None  # (N,)
    scale: Tensor  # (), logit scale or 1 / temperature
    bias: Tensor  # ()

    @property
    def call(self) -> tuple:
        """Arguments of a metric-learning loss."""
        return (self.x, self.labels, None, self.y, self.ref_labels)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Batch:
        """A copy with fresh leaves; scale and bias in the statistics' dtype."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        moved = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None:
                value = value.detach().to(device, copy=True)
                if value.is_floating_point():
                    value = value.to(dtype if f.name in ("x", "y") else wide).requires_grad_()
            moved[f.name] = value
        return Batch(**moved)

    def leaves(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {n: v for n, v in values.items() if v is not None and v.is_floating_point()}


def batch(kind: str, two_sided: bool, b: int = 11, n: int = 9, d: int = 5, seed: int = 0) -> Batch:
    """Random and adversarial batches in float64 (exact in bfloat16 for "random"); matched rows where two-sided."""
    g = torch.Generator().manual_seed(seed)
    n = b if two_sided == "matched" else n
    x, y = (torch.randn(k, d, generator=g).bfloat16().double() for k in (b, n))
    labels, refs = (torch.randint(0, 4, (k,), generator=g) for k in (b, n))
    if kind == "one class":
        labels, refs = torch.full((b,), 3), torch.full((n,), 3)
    elif kind == "all distinct":
        labels, refs = torch.arange(b), torch.arange(b, b + n)
    elif kind == "one lonely":
        labels[0], refs[0] = 1 << 40, -(1 << 40)
    elif kind == "duplicates":
        x[1::2], y[1::2] = x[:-1:2][: b // 2], y[:-1:2][: n // 2]
    elif kind == "collapsed":
        x, y = (v[:1] + 0.1 * v for v in (x, y))
    elif kind == "large norms":
        x, y = x * 1000, y * 1000
    elif kind == "small norms":
        x, y = x / 1000, y / 1000
    elif kind != "random":
        raise ValueError(kind)
    scale, bias = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
    if two_sided == "matched" and kind == "large norms":
        scale = scale / 1e6
    return Batch(x, y if two_sided else None, labels, refs if two_sided else None, scale, bias)


KINDS = ["random", "one class", "all distinct", "one lonely", "duplicates", "collapsed", "large norms", "small norms"]


# --- definitions: loops over pairs ---


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm().clamp_min(1e-12) * b.norm().clamp_min(1e-12))


def unit_distance(a: Tensor, b: Tensor) -> Tensor:
    difference = a / a.norm().clamp_min(1e-12) - b / b.norm().clamp_min(1e-12)
    return difference.norm()


def signed_pairs(data: Batch, similarity) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Similarities to the positives and negatives of each row."""
    y, refs = (data.x, data.labels) if data.y is None else (data.y, data.ref_labels)
    positives, negatives = [], []
    for i in range(len(data.x)):
        rows = ([], [])
        for j in range(len(y)):
            if not (data.y is None and i == j):
                rows[0 if data.labels[i] == refs[j] else 1].append(similarity(data.x[i], y[j]))
        positives.append(rows[0])
        negatives.append(rows[1])
    return positives, negatives


def mined_pairs(data: Batch, epsilon: float = 0.1):
    """The multi-similarity miner's rule, pair by pair."""
    positives, negatives = signed_pairs(data, cosine)
    for i, (pos, neg) in enumerate(zip(positives, negatives, strict=True)):
        highest = max((s.item() for s in neg), default=-float("inf"))
        lowest = min((s.item() for s in pos), default=float("inf"))
        positives[i] = [s for s in pos if s.item() - epsilon < highest]
        negatives[i] = [s for s in neg if s.item() + epsilon > lowest]
    return positives, negatives


def total(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values).sum() if values else (like * 0).sum()


def mean(values: list[Tensor], like: Tensor) -> Tensor:
    return total(values, like) / max(len(values), 1)


def above_zero(values: list[Tensor]) -> list[Tensor]:
    return [v for v in values if v.item() > 0]


def define_clip(data: Batch) -> Tensor:
    b = len(data.x)
    logits = [[data.scale * (data.x[i] @ data.y[j]) for j in range(b)] for i in range(b)]
    terms = []
    for i in range(b):
        row, column = torch.stack(logits[i]), torch.stack([logits[k][i] for k in range(b)])
        terms += [row.logsumexp(0) - logits[i][i], column.logsumexp(0) - logits[i][i]]
    return total(terms, data.x) / (2 * b)


def define_siglip(data: Batch) -> Tensor:
    terms = []
    for i, j in itertools.product(range(len(data.x)), range(len(data.y))):
        logit = data.scale * (data.x[i] @ data.y[j]) + data.bias
        terms.append(torch.log1p(torch.exp(-logit if i == j else logit)))
    return total(terms, data.x) / len(data.x)


def define_info_nce(data: Batch) -> Tensor:
    terms = []
    for i in range(len(data.x)):
        row = torch.stack([data.scale * cosine(data.x[i], data.y[j]) for j in range(len(data.y))])
        terms.append(row.logsumexp(0) - row[i])
    return mean(terms, data.x)


def define_nt_xent(data: Batch, pairs=signed_pairs) -> Tensor:
    terms = []
    for pos, neg in zip(*(pairs(data, cosine) if pairs is signed_pairs else pairs(data)), strict=True):
        for s in pos:
            row = torch.stack([s, *neg]) * data.scale
            terms.append(row.logsumexp(0) - row[0])
    return mean(terms, data.x)


def define_sup_con(data: Batch, mined: bool = False) -> Tensor:
    positives, negatives = mined_pairs(data) if mined else signed_pairs(data, cosine)
    if not any(positives) or not any(negatives):
        return (data.x * 0).sum()
    terms = []
    for pos, neg in zip(positives, negatives, strict=True):
        if pos:
            everything = (torch.stack(pos + neg) * data.scale).logsumexp(0)
            terms.append(everything - data.scale * torch.stack(pos).mean())
    return mean(above_zero(terms), data.x)


def define_sup_con_all(data: Batch) -> Tensor:
    terms = []
    for pos, neg in zip(*signed_pairs(data, cosine), strict=True):
        if pos:
            everything = (torch.stack(pos + neg) * data.scale).logsumexp(0)
            terms.append(everything - data.scale * torch.stack(pos).mean())
    return total(terms, data.x) / len(data.x) / data.scale / 0.07


def define_contrastive(data: Batch) -> Tensor:
    positives, negatives = signed_pairs(data, unit_distance)
    pull = above_zero([d for row in positives for d in row])
    push = above_zero([1 - d for row in negatives for d in row])
    return mean(pull, data.x) + mean(push, data.x)


def define_multi_similarity(data: Batch, mined: bool = False) -> Tensor:
    positives, negatives = mined_pairs(data) if mined else signed_pairs(data, cosine)
    terms = []
    for pos, neg in zip(positives, negatives, strict=True):
        pull = torch.log1p(total([torch.exp(-2 * (s - 0.5)) for s in pos], data.x))
        push = torch.log1p(total([torch.exp(50 * (s - 0.5)) for s in neg], data.x))
        terms.append(pull / 2 + push / 50)
    return mean(terms, data.x)


def define_circle(data: Batch) -> Tensor:
    terms, m, gamma = [], 0.4, 80
    for pos, neg in zip(*signed_pairs(data, cosine), strict=True):
        if pos and neg:
            pull = torch.stack([-gamma * (1 + m - s).detach().clamp_min(0) * (s - (1 - m)) for s in pos])
            push = torch.stack([gamma * (s + m).detach().clamp_min(0) * (s - m) for s in neg])
            z = pull.logsumexp(0) + push.logsumexp(0)
            terms.append(torch.logaddexp(z, torch.zeros_like(z)))
    return mean(above_zero(terms), data.x)


def define_batch_hard(data: Batch) -> Tensor:
    terms = []
    for pos, neg in zip(*signed_pairs(data, unit_distance), strict=True):
        if pos and neg:
            farthest = max(pos, key=torch.Tensor.item)
            terms.append((farthest - min(neg, key=torch.Tensor.item) + 0.05).clamp_min(0))
    return mean(above_zero(terms), data.x)


# --- ours and the peers ---


def open_clip_losses():
    """open_clip's loss module, read from its file: the package itself needs torchvision."""
    try:
        files = importlib.metadata.files("open_clip_torch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("open_clip_torch is not installed (pip install --no-deps open_clip_torch)")
    path = next(f.locate() for f in files if f.name == "loss.py" and f.parent.name == "open_clip")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mine_then(loss, miner, data: Batch) -> Tensor:
    return loss(data.x, data.labels, miner(data.x, data.labels, data.y, data.ref_labels), data.y, data.ref_labels)


@dataclasses.dataclass
class Case:
    """One loss: `ours` and `peer` take a Batch and return the loss; `definition` is the loop over pairs."""

    name: str
    ours: Callable[[Batch], Tensor]
    definition: Callable[[Batch], Tensor]
    peer: Callable[[Batch], Tensor] | None = None
    sides: tuple = (False, True)  # self-similarity, rectangular; "matched": row i belongs to row i
    learns: tuple[str, ...] = ()  # leaves besides x and y
    distance: bool = False  # Euclidean: two equal rows have a kink at zero

    def __repr__(self) -> str:
        return self.name


CASES = [
    Case(
        "clip",
        lambda d: losses.ClipLoss()(d.x, d.y, d.scale),
        define_clip,
        lambda d: open_clip_losses().ClipLoss()(d.x, d.y, d.scale),
        ("matched",),
        ("scale",),
    ),
    Case(
        "siglip",
        lambda d: losses.SigLipLoss()(d.x, d.y, d.scale, d.bias),
        define_siglip,
        lambda d: open_clip_losses().SigLipLoss()(d.x, d.y, d.scale, d.bias),
        ("matched",),
        ("scale", "bias"),
    ),
    Case(
        "info_nce",
        lambda d: losses.info_nce_loss(d.x, d.y, temperature=1 / d.scale),
        define_info_nce,
        None,
        ("matched",),
        ("scale",),
    ),
    Case(
        "nt_xent",
        lambda d: losses.nt_xent_loss(*d.call, temperature=1 / d.scale),
        define_nt_xent,
        lambda d: peer_losses.NTXentLoss(temperature=1 / d.scale)(*d.call),
        learns=("scale",),
    ),
    Case(
        "nt_xent mined",
        lambda d: mine_then(losses.NTXentLoss(1 / d.scale), miners.MultiSimilarityMiner(), d),
        lambda d: define_nt_xent(d, mined_pairs),
        lambda d: mine_then(peer_losses.NTXentLoss(1 / d.scale), peer_miners.MultiSimilarityMiner(), d),
        learns=("scale",),
    ),
    Case(
        "sup_con",
        lambda d: losses.sup_con_loss(*d.call, temperature=1 / d.scale),
        define_sup_con,
        lambda d: peer_losses.SupConLoss(temperature=1 / d.scale)(*d.call),
        learns=("scale",),
    ),
    Case(
        "sup_con mined",
        lambda d: mine_then(losses.SupConLoss(1 / d.scale), miners.MultiSimilarityMiner(), d),
        lambda d: define_sup_con(d, mined=True),
        lambda d: mine_then(peer_losses.SupConLoss(1 / d.scale), peer_miners.MultiSimilarityMiner(), d),
        learns=("scale",),
    ),
    Case(
        "sup_con all anchors",
        lambda d: losses.sup_con_loss(*d.call, temperature=1 / d.scale, reduction=losses.SupConReduction.ALL_ANCHORS),
        define_sup_con_all,
        learns=("scale",),
    ),
    Case(
        "contrastive",
        lambda d: losses.ContrastiveLoss()(*d.call),
        define_contrastive,
        lambda d: peer_losses.ContrastiveLoss()(*d.call),
        distance=True,
    ),
    Case(
        "multi_similarity",
        lambda d: losses.MultiSimilarityLoss()(*d.call),
        define_multi_similarity,
        lambda d: peer_losses.MultiSimilarityLoss()(*d.call),
    ),
    Case(
        "multi_similarity mined",
        lambda d: mine_then(losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(), d),
        lambda d: define_multi_similarity(d, mined=True),
        lambda d: mine_then(peer_losses.MultiSimilarityLoss(), peer_miners.MultiSimilarityMiner(), d),
    ),
    Case(
        "circle",
        lambda d: losses.CircleLoss()(*d.call),
        define_circle,
        lambda d: peer_losses.CircleLoss()(*d.call),
    ),
    Case(
        "triplet batch hard",
        lambda d: mine_then(losses.TripletMarginLoss(), miners.BatchHardMiner(), d),
        define_batch_hard,
        lambda d: mine_then(peer_losses.TripletMarginLoss(), peer_miners.BatchHardMiner(), d),
        distance=True,
    ),
]

METRIC = [case for case in CASES if case.sides == (False, True)]


def evaluate(function: Callable[[Batch], Tensor], data: Batch, learns: tuple[str, ...]) -> dict[str, Tensor]:
    """Loss and gradients as float64 on the CPU."""
    loss = function(data)
    leaves = {n: v for n, v in data.leaves().items() if n in ("x", "y", *learns)}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {"loss": loss.detach().double().cpu()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        found[f"d{name}"] = torch.zeros(leaf.shape).double() if grad is None else grad.double().cpu()
    return found


def sides_of(cases: list[Case]) -> list:
    return [pytest.param(c, s, id=f"{c.name}-{s}") for c in cases for s in c.sides]
