"""Inside of activation checkpointing, which makes what a backward pass reads anew, losses are what they are outside.

`CurricularFace` is not here: a forward pass changes its state, and a checkpoint makes two.
"""

# ruff: noqa: F811

from __future__ import annotations

from collections.abc import Callable, Sequence

import contrast_cases
import family_cases
import loss_cases
import pytest
import support
import torch
from loss_cases import batch, engine, sides_of  # noqa: F401
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from views import Views, views

from flashpair import heads

HEADS = [
    "ClassHead", "ArcFace", "CosFace", "NormFace", "SphereFace", "AdaFace", "ElasticFace", "MagFace", "P2SGrad",
    "SubCenterArcFace", "NormalizedSoftmaxLoss", "ProxyAnchorLoss", "ProxyNCALoss", "SoftTripleLoss",
]  # fmt: skip


def same_inside(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
    """Value and gradients, to the last bit."""
    found = []
    for run in (loss, lambda: checkpoint(loss, use_reentrant=False)):
        torch.manual_seed(7)  # for those that draw
        value = run()
        found.append([value.detach(), *torch.autograd.grad(value, list(leaves), allow_unused=True)])
    for outside, inside in zip(*found, strict=True):
        assert outside is inside is None or torch.equal(outside, inside)


@pytest.mark.parametrize("case", contrast_cases.CASES, ids=repr)
def test_contrastive(case, engine):
    rows, at = views(b=20), support.device(engine)
    d = Views(*(v.detach().to(at, torch.float32).requires_grad_() for v in (rows.x, rows.y)))
    same_inside(lambda: case.call(case.make(None), d), [d.x, d.y])


@pytest.mark.parametrize("case, side", sides_of([*loss_cases.CASES, *family_cases.FAMILY]))
def test_metric_learning(case, side, engine):
    data = batch("random", side, b=20, n=18).to(torch.float32, support.device(engine))
    leaves = list(data.leaves().values())
    same_inside(lambda: case.ours(data), leaves)


@pytest.mark.parametrize("name", HEADS)
def test_heads(name, engine):
    at = support.device(engine)
    x, labels = torch.randn(20, 5, device=at).requires_grad_(), torch.arange(20, device=at) % 9

    def loss() -> Tensor:
        torch.manual_seed(3)
        head = getattr(heads, name)(9, 5).to(at)
        return head(x, labels)

    same_inside(loss, [x])
