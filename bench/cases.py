"""The cases: inputs, flashpair's loss, the same in dense PyTorch, and the public peers, one table.

Every implementation maps `Inputs` to a 0-d loss; gradients go to `inputs.leaves`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import curves
import dense
import peers
import torch
from dense import NEIGHBOURS, at_once, chunked
from inputs import (
    HALFWAY,
    MEMORY,
    RANDOM,
    TRAINED,
    Inputs,
    classes_of,
    decided,
    decided_triplets,
    identities,
    labelled,
    remembered,
    towers,
)
from peers import CannotRun, from_names, metric_learning, once
from results import BOTH, FORWARD
from torch import Tensor

Loss = Callable[[Inputs], Tensor]
WIDENED = "dense in float32"  # of narrow inputs


@dataclass(frozen=True)
class Implementation:
    loss: Loss
    during: Callable[[], AbstractContextManager] = contextlib.nullcontext  # around forward and backward


@dataclass(frozen=True)
class Peer:
    loss: Loss
    #: Matrices of B×columns numbers that it allocates, as a number or a function of B; a floor.
    matrices: float | Callable[[int], float] = 6.0


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[int, int], Inputs]
    flashpair: Loss
    dense: Loss
    peers: dict[str, Peer] = field(default_factory=dict)
    #: Products of the shape of S that value and gradients take where S is not kept; half of one for a triangle.
    products: float = 4.0
    #: Where it is.
    kept_products: float = 3.0
    #: What the value alone takes.
    forward_products: float = 1.0
    #: Inputs of the correctness gate; default: those that are timed.
    gate: Callable[[int, int], Inputs] | None = None
    #: Columns of S for a batch; default: the batch.
    columns: Callable[[int], int] = lambda batch: batch
    #: The (B, D) that are measured, whatever is asked for; empty: what is asked for.
    sizes: tuple[tuple[int, int], ...] = ()
    directions: tuple[str, ...] = (FORWARD, BOTH)
    dense_matrices: float | Callable[[int], float] = 6.0

    def implementations(self, device: str = "cpu", dtype: str = "float32") -> dict[str, Implementation]:
        ours = {"flashpair": Implementation(self.flashpair)} if device == "cpu" else on_gpu_backends(self.flashpair)
        compiled = torch.compile(self.dense, fullgraph=True, dynamic=False)
        others = {"dense": self.dense, "compile": compiled, **{name: p.loss for name, p in self.peers.items()}}
        if device == "cpu" and dtype != "float32":  # many processors multiply narrow numbers slowly
            others[WIDENED] = lambda i: self.dense(i.widened())
        return ours | {name: Implementation(loss) for name, loss in others.items()}

    def needs_bytes(self, implementation: str, batch: int, dtype: str = "float32") -> float:
        """A floor for what an implementation allocates; 0 for those that do not store S."""
        if implementation.startswith("flashpair"):
            return 0.0
        matrices = self.peers[implementation].matrices if implementation in self.peers else self.dense_matrices
        size = 4.0 if implementation == WIDENED else getattr(torch, dtype).itemsize
        return (matrices(batch) if callable(matrices) else matrices) * size * batch * self.columns(batch)


# --- flashpair --------------------------------------------------------------------------------------------------------


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


def flash_nearest(i: Inputs) -> Tensor:
    from flashpair import Extreme, mine

    (found,) = mine(i.x, extremes=[Extreme(k=NEIGHBOURS)], normalize=True)
    return found.values.sum()


def flash(loss: str, miner: str | None = None) -> Loss:
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


def on_gpu_backends(loss: Loss) -> dict[str, Implementation]:
    """flashpair on each GPU backend."""
    return {
        "flashpair[triton]": Implementation(loss, partial(backend_forced, "triton")),
        "flashpair[cuda]": Implementation(loss, partial(backend_forced, "cuda")),
        "flashpair[cuda, simple form]": Implementation(loss, partial(cuda_form, "simple")),
    }


# --- the table --------------------------------------------------------------------------------------------------------

PEER, CHUNKED = "metric-learning", "chunked"
CLIP_PEERS = {
    "open_clip": Peer(peers.open_clip),
    "open_clip chunked": Peer(peers.open_clip_chunked, 1.0),
    "torch chunked": Peer(peers.torch_chunked, 0.0),
    "keops": Peer(peers.keops_clip, 0.0),
    "inf_cl": Peer(peers.inf_cl, 0.0),
    "cut_cross_entropy": Peer(peers.cut_cross_entropy, 0.0),
    "liger_kernel": Peer(peers.liger, 0.0),
    "quack": Peer(peers.quack, 0.0),
}
#: With a scale of 100 KeOps loses digits of the scale's gradient: 1.2e-4 of it at B = 96.
TRAINED_CLIP_PEERS = {name: peer for name, peer in CLIP_PEERS.items() if name != "keops"}
SIGLIP_PEERS = {
    "open_clip": Peer(peers.open_clip),
    "open_clip chunked": Peer(peers.open_clip_chunked, 1.0),
    "siglip_kernel": Peer(peers.siglip_kernel, 0.0),
}
LINEAR_PEERS = {
    "torch chunked": Peer(peers.torch_linear, 0.0),
    "cut_cross_entropy": Peer(peers.cut_linear, 0.0),
    "liger_kernel": Peer(peers.liger_linear, 0.0),
    "quack": Peer(peers.quack_linear, 0.0),
}


def tower_case(name, make, terms, ours, public, products=4.0, whole=None) -> Case:
    """Two towers; the mean over the batch of the terms of its pairs, which can be taken in chunks."""
    mean = lambda values: values.mean()  # noqa: E731
    public = {CHUNKED: Peer(chunked(terms, mean), 0.0), **public}
    return Case(name, make, ours, whole or at_once(terms, mean), public, products=products)


def metric_case(name, make, loss, miner=None, dense=None, rows=None, matrices=15.0, **options) -> Case:
    """A loss of pytorch-metric-learning; `rows`: (terms, reduce) where its terms belong to rows."""
    public = {PEER: Peer(metric_learning(loss, miner), matrices)}
    if rows:
        dense, public = at_once(*rows), {CHUNKED: Peer(chunked(*rows), 0.0), **public}
    options = {"products": 2.0, "kept_products": 1.5, "forward_products": 0.5, **options}
    return Case(name, make, flash(loss, miner), dense, public, **options)


def mined_case(name: str, spread: float) -> Case:
    """Multi-similarity loss and miner; how many pairs survive mining depends on how well the classes are apart."""
    loss, miner, rows = "MultiSimilarityLoss", "MultiSimilarityMiner", (dense.multi_similarity_terms, Tensor.mean)
    return metric_case(name, labelled(4, spread), loss, miner, rows=rows, products=2.5)


def head_case(name: str, ours: Loss, dense: Loss, public: dict[str, Peer]) -> Case:
    return Case(name, identities, ours, dense, public, columns=classes_of, sizes=((256, 256),))


AVERAGE = dense.average_nonzero
TRIPLETS = ((512, 128), (1024, 128))
CASES = (
    tower_case("clip", towers(14.3), dense.clip_terms, flash_clip, CLIP_PEERS, whole=dense.dense_clip),
    tower_case(
        "clip-trained", towers(100.0, noise=0.5), dense.clip_terms, flash_clip, TRAINED_CLIP_PEERS,
        whole=dense.dense_clip,
    ),
    tower_case("siglip", towers(10.0, -10.0), dense.siglip_terms, flash_siglip, SIGLIP_PEERS, products=3.0),
    tower_case(
        "infonce", towers(1.0), dense.info_nce_terms, flash_info_nce, {"keops": Peer(peers.keops_info_nce, 0.0)}
    ),
    metric_case("supcon", labelled(4, RANDOM), "SupConLoss", rows=(dense.sup_con_terms, AVERAGE)),
    # pytorch-metric-learning builds a (positive pairs) × (negative pairs) matrix, several times.
    metric_case(
        "ntxent", labelled(2, RANDOM), "NTXentLoss", rows=(dense.nt_xent_terms, Tensor.mean),
        matrices=lambda batch: 4.0 * (batch - 2),
    ),
    mined_case("ms-random", RANDOM),
    mined_case("ms-halfway", HALFWAY),
    mined_case("ms-trained", TRAINED),
    metric_case("circle", labelled(4, RANDOM), "CircleLoss", rows=(dense.circle_terms, AVERAGE)),
    metric_case("contrastive", labelled(4, RANDOM), "ContrastiveLoss", dense=dense.dense_contrastive),
    metric_case("contrastive-trained", labelled(4, TRAINED), "ContrastiveLoss", dense=dense.dense_contrastive),
    metric_case(
        "batch-hard", labelled(4, RANDOM), "TripletMarginLoss", "BatchHardMiner", dense=dense.dense_batch_hard,
        products=0.5, kept_products=0.5, gate=decided,
    ),
    metric_case(
        "all-triplets", labelled(4, RANDOM), "TripletMarginLoss", dense=dense.dense_all_triplets, sizes=TRIPLETS,
        dense_matrices=lambda batch: 4.0 * batch, matrices=75.0, gate=decided_triplets,
    ),
    metric_case(
        "cross-batch-memory", remembered, "ContrastiveLoss", dense=dense.dense_memory_contrastive,
        columns=lambda batch: MEMORY * batch, sizes=((1024, 128),), products=3.0, kept_products=2.0,
        forward_products=1.0,
    ),
    Case(
        "nearest", labelled(4, RANDOM), flash_nearest, dense.dense_nearest,
        {"faiss": Peer(peers.faiss_nearest, 0.0), "cuvs": Peer(peers.cuvs_nearest, 0.0)}, directions=(FORWARD,),
    ),
    head_case("arcface", flash_arc_face, dense.dense_arc_face, {PEER: Peer(peers.metric_learning_arc_face)}),
    head_case("linear-cross-entropy", flash_linear, dense.dense_linear, LINEAR_PEERS),
)  # fmt: skip


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One row of results."""

    case: str
    batch: int
    width: int
    dtype: str
    compiled: bool = True  # torch.compile takes part; it compiles anew for every size
    direction: str = BOTH


def sweep_jobs() -> list[Job]:
    """Time against B, and against D, for the curves of the report."""
    sizes = [(batch, curves.WIDTH) for batch in curves.BATCHES]
    sizes += [(curves.BATCH, width) for width in curves.WIDTHS if width != curves.WIDTH]
    return [Job(name, b, d, "float32", compiled=b < curves.UNCOMPILED) for b, d in sizes for name in curves.CASES]


def gpu_jobs() -> list[Job]:
    """What a GPU is measured at, the most telling first: whoever runs out of time has those."""
    names = ("clip", "supcon", "siglip", "ms-random", "ms-trained", "batch-hard")
    half = "bfloat16"
    jobs = [Job(name, 32768, 512, half) for name in (*names, "ntxent")]
    jobs += [Job("clip", 32768, 512, half, compiled=False, direction=FORWARD)]
    jobs += [Job("siglip", 65536, 768, half, compiled=False), Job("clip", 32768, 1024, half, compiled=False)]
    jobs += [Job("arcface", 1024, 512, half, compiled=False)]
    jobs += [Job(name, 1024, 512, half) for name in names]
    jobs += [Job(name, 4096, 512, half, compiled=name in names[:2]) for name in names]
    jobs += [Job("clip", batch, 512, "float32", compiled=False) for batch in (4096, 16384)]
    rest = [(b, d) for d in (512, 128, 1024) for b in (16384, 4096, 32768, 1024)]
    jobs += [Job(name, b, d, half, compiled=False) for b, d in rest for name in names]
    jobs += [Job(name, 32768, 512, half, compiled=False, direction=FORWARD) for name in names]
    jobs += [Job("nearest", 32768, 512, "float16", compiled=False, direction=FORWARD)]  # the width of cuVS
    first: dict[tuple, Job] = {}
    for job in jobs:
        first.setdefault((job.case, job.batch, job.width, job.dtype, job.direction), job)
    return list(first.values())


PRESETS = {"gpu": gpu_jobs, "sweep": sweep_jobs}
