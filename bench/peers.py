"""Public libraries, each in the shortest use of it that a user would write.

A wrapper maps `Inputs` to a 0-d loss. What is not installed or does not run on the device raises `CannotRun`, whose
message stands in the report. Those for NVIDIA GPUs were written from the sources of the versions named beside them.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from dense import NEIGHBOURS
from inputs import Inputs
from torch import Tensor


class CannotRun(RuntimeError):
    """An implementation that is not installed, or does not serve the device; the message says why."""


@cache
def once(make: Callable, *arguments):
    """A loss or miner is made once, as a training script does, not at every step."""
    return make(*arguments)


def installed(module: str, on_gpu: bool = False, i: Inputs | None = None):
    """An optional module; its absence says so by name."""
    if on_gpu and not i.x.is_cuda:
        raise CannotRun("runs on NVIDIA GPUs only")
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise CannotRun(str(error)) from error


def from_names(losses, miners, loss: str, miner: str | None = None) -> Callable[[Inputs], Tensor]:
    """A user's call: the loss with its defaults, after the miner where there is one, against a memory where it is."""

    def run(i: Inputs) -> Tensor:
        mined = None if miner is None else once(getattr(miners(), miner))(i.x, i.labels)
        call = once(getattr(losses(), loss))
        if i.memory is None:
            return call(i.x, i.labels, mined)
        return call(i.x, i.labels, mined, ref_emb=i.memory, ref_labels=i.memory_labels)

    return run


# --- pytorch-metric-learning ------------------------------------------------------------------------------------------


def metric_learning(loss: str, miner: str | None = None) -> Callable[[Inputs], Tensor]:
    part = lambda name: installed(f"pytorch_metric_learning.{name}")  # noqa: E731
    return from_names(lambda: part("losses"), lambda: part("miners"), loss, miner)


def metric_learning_arc_face(i: Inputs) -> Tensor:
    """Its weights are (D, C) and its own; its margin is in degrees."""
    loss = installed("pytorch_metric_learning.losses").ArcFaceLoss
    with torch.device("meta"):  # weights that nobody uses
        head = loss(len(i.y), i.x.shape[1], margin=math.degrees(0.5), scale=64)
    return torch.func.functional_call(head, {"W": i.y.T}, (i.x, i.labels))


# --- CLIP and SigLIP --------------------------------------------------------------------------------------------------


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


def open_clip_chunked(i: Inputs) -> Tensor:
    """With `chunk_size`, in the versions that have it."""
    losses = open_clip_losses()
    make = losses.ClipLoss if i.bias is None else losses.SigLipLoss
    try:
        loss = once(lambda: make(chunk_size=1024))
    except TypeError:
        raise CannotRun("the installed open_clip has no chunk_size") from None
    return loss(i.x, i.y, i.scale) if i.bias is None else loss(i.x, i.y, i.scale, i.bias)


def both_ways(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor], i: Inputs) -> Tensor:
    """CLIP as two classifications, each tower in turn holding the class weights: (scaled inputs, weights, targets)."""
    target = torch.arange(len(i.x), device=i.x.device)
    return (cross_entropy(i.scale * i.x, i.y, target) + cross_entropy(i.scale * i.y, i.x, target)) / 2


def inf_cl(i: Inputs) -> Tensor:
    """1.2.1"""
    loss, head = installed("inf_cl", True, i).cal_flash_loss, min(i.x.shape[1], 256)
    return both_ways(lambda x, y, target: loss(x, y, target, head_dim=head).mean(), i)


def cut_cross_entropy(i: Inputs) -> Tensor:
    """25.1.1"""
    return both_ways(installed("cut_cross_entropy", True, i).linear_cross_entropy, i)


def liger(i: Inputs) -> Tensor:
    """0.8.5"""
    loss = installed("liger_kernel.transformers", True, i).LigerFusedLinearCrossEntropyLoss()
    return both_ways(lambda x, y, target: loss(y, x, target), i)


def quack(i: Inputs) -> Tensor:
    """0.6.5"""
    return both_ways(installed("quack.linear_cross_entropy", True, i).chunked_linear_cross_entropy, i)


def torch_chunked(i: Inputs) -> Tensor:
    """torch's own, in chunks of the batch."""
    return both_ways(_linear_cross_entropy, i)


def siglip_kernel(i: Inputs) -> Tensor:
    """0.1.2; its temperature is the logarithm of the scale."""
    return installed("siglip_kernel", True, i).fused_siglip_loss(i.x, i.y, i.scale.log(), i.bias)


# --- linear + cross-entropy -------------------------------------------------------------------------------------------


def _linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRun(f"torch {torch.__version__} has no linear_cross_entropy")
    return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def torch_linear(i: Inputs) -> Tensor:
    return _linear_cross_entropy(i.x / 16, i.y, i.labels)


def cut_linear(i: Inputs) -> Tensor:
    return installed("cut_cross_entropy", True, i).linear_cross_entropy(i.x / 16, i.y, i.labels)


def liger_linear(i: Inputs) -> Tensor:
    loss = installed("liger_kernel.transformers", True, i).LigerFusedLinearCrossEntropyLoss()
    return loss(i.y, i.x / 16, i.labels)


def quack_linear(i: Inputs) -> Tensor:
    linear = installed("quack.linear_cross_entropy", True, i).chunked_linear_cross_entropy
    return linear(i.x / 16, i.y, i.labels)


# --- KeOps ------------------------------------------------------------------------------------------------------------


KEOPS_CPU_PRODUCTS = 1 << 27  # of B, N and D: a step of 4096 by 4096 by 128 takes minutes


def _lazy_products(x: Tensor, y: Tensor):
    """Symbolic (B, N) products; KeOps compiles a formula on first use."""
    lazy = installed("pykeops.torch").LazyTensor
    if not x.is_cuda and len(x) * y.numel() > KEOPS_CPU_PRODUCTS:
        raise CannotRun("would take minutes a step on a CPU at this size")
    return lazy(x[:, None, :].contiguous()) | lazy(y[None, :, :].contiguous())


def keops_clip(i: Inputs) -> Tensor:
    s = _lazy_products(i.scale * i.x, i.y)
    own = i.scale * (i.x * i.y).sum(1)
    return ((s.logsumexp(1).flatten() - own).mean() + (s.logsumexp(0).flatten() - own).mean()) / 2


def keops_info_nce(i: Inputs, temperature: float = 0.1) -> Tensor:
    x, y = i.scale * F.normalize(i.x) / temperature, F.normalize(i.y)
    return (_lazy_products(x, y).logsumexp(1).flatten() - (x * y).sum(1)).mean()


# --- nearest neighbours -----------------------------------------------------------------------------------------------


def faiss_nearest(i: Inputs) -> Tensor:
    """The exact index, of float32 on CPUs; a row finds itself first."""
    faiss = installed("faiss")
    if i.x.is_cuda:
        raise CannotRun("faiss-cpu runs on CPUs only")
    faiss.omp_set_num_threads(torch.get_num_threads())
    x = F.normalize(i.x.detach().float()).numpy()
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    return torch.from_numpy(index.search(x, NEIGHBOURS + 1)[0])[:, 1:].sum()


def cuvs_nearest(i: Inputs) -> Tensor:
    """26.10, whose exact index is of float32 or float16; a row finds itself first."""
    brute_force = installed("cuvs.neighbors.brute_force", True, i)
    if i.x.dtype == torch.bfloat16:
        raise CannotRun("serves float32 and float16 only")
    x = F.normalize(i.x.detach())
    found, _ = brute_force.search(brute_force.build(x, metric="inner_product"), x, NEIGHBOURS + 1)
    return torch.as_tensor(found, device=x.device)[:, 1:].sum()
