"""Every loss on a batch that ranks share, and on one process: the same call, with and without a group."""

from __future__ import annotations

import functools

import contrast_cases
import torch
import torch.distributed as dist
from torch import Tensor
from views import Views

from flashpair import heads, losses, miners
from flashpair.distributed import Exchange, Group
from flashpair.losses.metric import MetricLoss


def pull(s: Tensor, mask: Tensor) -> Tensor:
    return torch.exp(-2 * s)


def push(s: Tensor, mask: Tensor) -> Tensor:
    return torch.exp(3 * s)


OPTIONS = {
    "RankedListLoss": {"margin": 0.4, "Tn": 10},
    "MarginLoss": {"beta": 1.25, "learn_beta": True, "num_classes": 4},
    "ManifoldLoss": {"l": 5, "K": 3},
    "GeneralPairWeightingLoss": {"positive_weight": pull, "negative_weight": push},
}
#: Losses that compare whole rows, classes or features: they gather.
VIEWS = {"VICRegLoss", "BarlowTwinsLoss"}
ONE_SIDED = {"NPairsLoss", "InstanceLoss", "ManifoldLoss"}
METRIC = sorted(
    n for n in losses.__all__
    if isinstance(getattr(losses, n), type) and issubclass(getattr(losses, n), MetricLoss)
)  # fmt: skip
PROXIES = ["NormalizedSoftmaxLoss", "ProxyAnchorLoss", "ProxyNCALoss", "SoftTripleLoss"]
TOWERS = ["ClipLoss", "SigLipLoss", "InfoNCELoss"]
MINED = {
    "MultiSimilarityLoss mined": ("MultiSimilarityLoss", lambda g: miners.MultiSimilarityMiner(group=g)),
    "SupConLoss mined": ("SupConLoss", lambda g: miners.MultiSimilarityMiner(group=g)),
    "TripletMarginLoss hard": ("TripletMarginLoss", lambda g: miners.BatchHardMiner(group=g)),
    "TripletMarginLoss band": ("TripletMarginLoss", lambda g: miners.TripletMarginMiner(0.2, "semihard", group=g)),
    "AngularLoss mined": ("AngularLoss", lambda g: miners.PairMarginMiner(group=g)),
    "MarginLoss weighted": ("MarginLoss", lambda g: miners.DistanceWeightedMiner(group=g)),
}
CASES = [
    *(f"{n} self" for n in METRIC if n not in VIEWS),
    *(f"{n} refs" for n in METRIC if n not in ONE_SIDED),
    *TOWERS,
    *MINED,
    *PROXIES,
    "SelfSupervisedLoss",
    "SupConLoss stats",
    *(c.name for c in contrast_cases.CASES),
]
CONTRAST = {c.name: c for c in contrast_cases.CASES}


def build(case: str, group) -> tuple[torch.nn.Module, object]:
    """The loss and the miner of a case, in double precision."""
    torch.manual_seed(0)
    if case in CONTRAST:
        return CONTRAST[case].make(group), None
    name, miner = MINED.get(case, (case.split()[0], lambda g: None))
    if name == "SelfSupervisedLoss":
        return losses.SelfSupervisedLoss(losses.NTXentLoss(group=group)).double(), None
    if name in PROXIES:
        return getattr(heads, name)(num_classes=4, embedding_size=5, group=group).double(), None
    return getattr(losses, name)(**OPTIONS.get(name, {}), group=group).double(), miner(group)


def data(rows: int, columns: int, features: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """A global batch."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, features, generator=g).double() for n in (rows, columns))
    x = x + 0.5 * x.mean(1, keepdim=True)
    labels, refs = (torch.randint(0, 4, (k,), generator=g) for k in (rows, columns))
    return {"x": x, "y": y, "labels": labels, "ref_labels": refs}


def call(case: str, loss, miner, x, y, labels, ref_labels, scale, bias):
    """The loss of (a part of) a batch, and statistics where the case has them."""
    if case in CONTRAST:
        return CONTRAST[case].call(loss, Views(x, y)), None
    name = case.split()[0]
    if name in ("ClipLoss", "SigLipLoss"):
        return loss(x, y, scale, bias), None
    if name == "InfoNCELoss":
        return loss(x, y, negative_keys=x.flip(1) * 0.5), None
    if name == "SelfSupervisedLoss":
        return loss(x, y), None
    if name == "ManifoldLoss":
        return loss(x, meta_classes=labels % 3), None
    if name in VIEWS:
        return loss(x, ref_emb=y), None
    if case.endswith("refs"):
        return loss(x, labels, None, y, ref_labels), None
    if case.endswith("stats"):
        return loss(x, labels, return_stats=True)
    return loss(x, labels, None if miner is None else miner(x, labels)), None


def matched(case: str) -> bool:
    """Whether the rows of x and y belong together."""
    return case in CONTRAST or case.split()[0] in {*TOWERS, *VIEWS, "SelfSupervisedLoss"}


def evaluate(
    case: str, sizes: tuple[list[int], list[int]], group=None, rank: int | None = None, features: int = 5
) -> dict:
    """Value, gradients of the embeddings (averaged over the ranks) and of everything that is learned."""
    whole = data(sum(sizes[0]), sum(sizes[1]), features)
    parts = slice(None), slice(None)
    if rank is not None:
        parts = tuple(slice(sum(s[:rank]), sum(s[: rank + 1])) for s in sizes)
    x, y = (whole[k][p].clone().requires_grad_() for k, p in zip(("x", "y"), parts, strict=True))
    labels, ref_labels = whole["labels"][parts[0]], whole["ref_labels"][parts[1]]
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (7.0, -1.5))
    loss, miner = build(case, group)
    torch.manual_seed(7 + 1000 * (rank or 0))  # the first rank's generator decides
    value, statistics = call(case, loss, miner, x, y, labels, ref_labels, scale, bias)
    value.backward()
    ranks = 1 if group is None else dist.get_world_size()
    found = {"value": value.detach()}
    found |= {k: torch.zeros_like(v) if v.grad is None else v.grad / ranks for k, v in (("dx", x), ("dy", y))}
    learned = {"scale": scale, "bias": bias, **dict(loss.named_parameters())}
    found["learned"] = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in learned.items()}
    found["buffers"] = dict(loss.named_buffers())
    found["statistics"] = [] if statistics is None else [v for side in statistics for v in side]
    return found


def evaluate_here(case: str, sizes: tuple[list[int], list[int]], exchange: str = "GATHER") -> dict:
    """`evaluate` on a rank of the default group."""
    return evaluate(case, sizes, Group(exchange=Exchange[exchange]), dist.get_rank())


# --- comparing --------------------------------------------------------------------------------------------------------

SIZES = {1: ([12], [9]), 2: ([7, 5], [5, 4]), 3: ([4, 0, 8], [2, 7, 0]), 4: ([3, 2, 6, 1], [3, 1, 2, 3])}
#: Losses whose formula sees whole rows of S, class means or features: they cannot take columns block by block.
WHOLE = {
    "AngularLoss", "BarlowTwinsLoss", "CentroidTripletLoss", "DynamicSoftMarginLoss", "FastAPLoss",
    "GeneralPairWeightingLoss", "HistogramLoss", "ManifoldLoss", "NPairsLoss", "PNPLoss", "ProtoTripletLoss",
    "SignalToNoiseRatioContrastiveLoss", "SmoothAPLoss", "TripletMarginLoss", "TripletSemiHardLoss",
    "TupletMarginLoss", "VICRegLoss", "NormalizedSoftmaxLoss", "ProxyNCALoss", "SoftTripleLoss",
    *(c.name.split()[0] for c in contrast_cases.CASES if c.rows),
}  # fmt: skip
#: One listed triplet a row; a second product for D×D products.
STREAMED_ALL_THE_SAME = {"TripletMarginLoss hard", "CWCLLoss exponential"}
ALSO_WHOLE = {"MarginLoss weighted"}  # the miner draws from whole rows


@functools.cache
def on_one_process(case: str, rows: int, columns: int) -> dict:
    return evaluate(case, ([rows], [columns]))


def sizes_of(case: str, size: int) -> tuple[list[int], list[int]]:
    rows, columns = SIZES[size]
    return (rows, rows) if matched(case) else (rows, columns)


def compare(ranks: list[dict], whole: dict) -> None:
    """Equal values on all ranks; values and gradients of one process."""
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)
    for found in ranks:
        assert torch.equal(found["value"], ranks[0]["value"]) or found["value"].isnan()
        close(found["learned"], whole["learned"])
        close(found["statistics"], whole["statistics"])
        close(found["buffers"], whole["buffers"])
    close(ranks[0]["value"], whole["value"])
    for name in ("dx", "dy"):
        close(torch.cat([found[name] for found in ranks]), whole[name])
