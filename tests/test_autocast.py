"""Inside autocast every loss and head is what it is outside, to the last bit: value and gradients.

No product of embeddings is narrowed, in the backward pass neither, nor those of the gradients of parameters.
"""

# ruff: noqa: F811

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import contrast_cases
import family_cases
import loss_cases
import pytest
import support
import torch
from loss_cases import batch, engine, sides_of  # noqa: F401
from torch import Tensor, nn
from views import Views, views

from flashpair import heads, losses


def same_inside(step: Callable[[], tuple[Tensor, Sequence[Tensor]]], device: str) -> None:
    """`step()` → (value, leaves), run twice; everything inside, and the backward pass alone."""

    def run(forward: bool, backward: bool) -> list[Tensor | None]:
        torch.manual_seed(7)  # for those that draw
        with torch.autocast(device, torch.bfloat16, enabled=forward):
            value, leaves = step()
        with torch.autocast(device, torch.bfloat16, enabled=backward):
            return [value, *torch.autograd.grad(value, list(leaves), allow_unused=True)]

    want = run(False, False)
    for inside in ((True, True), (False, True)):
        for k, (a, b) in enumerate(zip(run(*inside), want, strict=True)):
            assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b)), (inside, k)


@pytest.mark.parametrize("case", contrast_cases.CASES, ids=repr)
def test_contrastive(case, engine):
    at = support.device(engine)

    def step() -> tuple[Tensor, list[Tensor]]:
        rows = views(b=20)
        d = Views(*(v.detach().to(at, torch.float32).requires_grad_() for v in (rows.x, rows.y)))
        loss = case.make(None)
        parameters = loss.parameters() if isinstance(loss, nn.Module) else []
        return case.call(loss, d), [d.x, d.y, *parameters]

    same_inside(step, at)


@pytest.mark.parametrize("case, side", sides_of([*loss_cases.CASES, *family_cases.FAMILY]))
@pytest.mark.parametrize("features", [5, 40])
def test_metric_learning(case, side, features, engine):
    """Fewer features than rows, and more."""
    at = support.device(engine)

    def step() -> tuple[Tensor, list[Tensor]]:
        data = batch("random", side, b=20, n=18, d=features).to(torch.float32, at)
        return case.ours(data), [v for n, v in data.leaves().items() if n in ("x", "y", *case.learns)]

    same_inside(step, at)


def test_manifold(engine):
    loss = losses.ManifoldLoss(l=5, K=3).to(support.device(engine))

    def step() -> tuple[Tensor, list[Tensor]]:
        x = batch("random", False, b=20).to(torch.float32, support.device(engine)).x
        return loss(x, meta_classes=torch.arange(20, device=x.device) % 3), [x, loss.proxies]

    same_inside(step, support.device(engine))


OF_VIEWS = {
    "SogCLRLoss": lambda x, y: losses.SogCLRLoss(num_samples=20)(x, y, torch.arange(20, device=x.device)),
    "ISogCLRLoss": lambda x, y: losses.ISogCLRLoss(num_samples=20)(x, y, torch.arange(20, device=x.device)),
    "InfoNCELoss": lambda x, y: losses.InfoNCELoss()(x, y, queue=2 * y.detach().flip(1)),
    "SelfSupervisedLoss": lambda x, y: losses.SelfSupervisedLoss(losses.SupConLoss())(x, y),
}


@pytest.mark.parametrize("name", OF_VIEWS)
def test_views(name, engine):
    def step() -> tuple[Tensor, list[Tensor]]:
        data = batch("random", "matched", b=20).to(torch.float32, support.device(engine))
        return OF_VIEWS[name](data.x, data.y), [data.x, data.y]

    same_inside(step, support.device(engine))


# --- heads ------------------------------------------------------------------------------------------------------------

ROWS, FEATURES, CLASSES = 20, 5, 9


def _module(make: Callable[[], nn.Module]) -> Callable:
    """A head, of embeddings and labels."""

    def of(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        head = make().to(x.device)
        return head(x, labels), list(head.parameters())

    return of


def _function(function: Callable) -> Callable:
    return lambda x, weight, labels: (function(x, weight, labels), [weight])


def _shares(x: Tensor) -> Tensor:
    return torch.rand(len(x), CLASSES, generator=torch.Generator().manual_seed(2)).to(x).softmax(1)


def _hl_gauss(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    head = heads.HLGaussHead(FEATURES, 0.0, CLASSES, bins=13).to(x.device)
    return head(x, labels.to(x.dtype)) + head.predict(x).square().mean(), list(head.parameters())


HEADS = {
    **{
        name: _module(functools.partial(getattr(heads, name), CLASSES, FEATURES))
        for name in (
            "ClassHead", "ArcFace", "CosFace", "NormFace", "SphereFace", "AdaFace", "CurricularFace", "ElasticFace",
            "MagFace", "P2SGrad", "SubCenterArcFace", "NormalizedSoftmaxLoss", "ProxyAnchorLoss", "ProxyNCALoss",
            "SoftTripleLoss",
        )
    },
    **{
        f"ClassHead {of}": _module(lambda of=of: heads.ClassHead(CLASSES, FEATURES, formula=getattr(heads, of)()))
        for of in ("SphericalZLoss", "TaylorSoftmax", "SphericalSoftmax", "Focal", "NormalizedCrossEntropy")
    },
    "PartialFC_V2": _module(lambda: heads.PartialFC_V2(heads.CosFace(1, 1).margin, FEATURES, CLASSES, 0.6)),
    "UNPG": _module(lambda: heads.UNPG(heads.CosFace(CLASSES, FEATURES))),
    "HLGaussHead": _hl_gauss,
    "spherical_loss": _function(functools.partial(heads.spherical_loss, gram=True)),
    "spherical_loss normalised": _function(functools.partial(heads.spherical_loss, gram=True, normalize=True)),
    "soft_cross_entropy": _function(
        lambda x, w, y: heads.soft_cross_entropy(x, w, _shares(x), bias=w.sum(1), scale=2.0, normalize=True)
    ),
    "distillation_loss": _function(lambda x, w, y: heads.distillation_loss(x, w, 0.5 * x.flip(0), w.flip(0).detach())),
    "binary_distillation_loss": _function(
        lambda x, w, y: heads.binary_distillation_loss(x, w, 0.5 * x.flip(0), w.flip(0).detach())
    ),
    "binary_gap_distillation_loss": _function(
        lambda x, w, y: heads.binary_gap_distillation_loss(x, w, 0.5 * x.flip(0), w.flip(0).detach())
    ),
    "symmetry_loss": _function(lambda x, w, y: heads.symmetry_loss(x, x.flip(0) + w.sum())),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads(name, engine):
    at = support.device(engine)

    def step() -> tuple[Tensor, list[Tensor]]:
        g = torch.Generator().manual_seed(1)
        x, weight = (torch.randn(n, FEATURES, generator=g).to(at).requires_grad_() for n in (ROWS, CLASSES))
        value, parameters = HEADS[name](x, weight, torch.randint(CLASSES, (ROWS,), generator=g).to(at))
        return value, [x, *parameters]

    same_inside(step, at)
