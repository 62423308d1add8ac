"""Batches of matched rows, and what a row of the tables of contrastive losses is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass
class Views:
    """A batch of matched rows, and what some losses want beside it; each row's extras follow from the row."""

    x: Tensor  # (B, D) leaf
    y: Tensor  # (B, D) leaf

    @property
    def z(self) -> Tensor:
        """(B, D) a third view."""
        return self.x.flip(1) + 0.5 * self.y

    @property
    def frozen(self) -> Tensor:
        """(B, 3) unit vectors of another tower."""
        return unit((self.x[:, :3] * 2 + self.y[:, 1:4]).detach())

    @property
    def labels(self) -> Tensor:
        return (self.x[:, 0].detach() > 0).long() + (self.y[:, 1].detach() > 0.5).long()

    @property
    def targets(self) -> Tensor:
        """(B,) with ties."""
        return (self.x[:, 0] + self.y[:, 0]).detach().mul(2).round() / 2

    @property
    def multi_hot(self) -> Tensor:
        """(B, 4) of which some rows are empty."""
        return (self.x[:, :4].detach() + 0.3 * self.y[:, 1:5].detach() > 0.5).long()

    @property
    def clusters(self) -> Tensor:
        return torch.stack([(self.x[:, k].detach() > 0.3).long() for k in (0, 1, 2)])

    @property
    def queue(self) -> Tensor:
        """(6, D) keys that all ranks hold alike."""
        g = torch.Generator().manual_seed(5)
        return torch.randn(6, self.x.shape[1], generator=g, dtype=torch.float64).to(self.x)


def unit(a: Tensor) -> Tensor:
    return a / a.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def lse(values: list[Tensor]) -> Tensor:
    return torch.stack(values).logsumexp(0)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def views(kind: str = "random", b: int = 9, d: int = 5, seed: int = 0) -> Views:
    """Two views in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, d, generator=g).double()
    y = x + 0.7 * torch.randn(b, d, generator=g).double()
    if kind == "collapsed":
        x, y = x[:1] + 0.1 * x, y[:1] + 0.1 * y
    elif kind == "aligned":
        y = x + 1e-3 * y
    elif kind == "large":
        x, y = 30 * x, 30 * y
    return Views(x.requires_grad_(), y.requires_grad_())


@dataclasses.dataclass
class Case:
    """`make(group)` is the loss, `call(loss, views)` its value, `define(views)` the loops."""

    name: str
    make: Callable
    call: Callable
    define: Callable
    rows: bool = False  # asks for whole rows, features or a third tower: ranks must gather

    def __repr__(self) -> str:
        return self.name

    def ours(self, d: Views) -> Tensor:
        return self.call(self.make(None), d)


def evaluate(function: Callable[[Views], Tensor], d: Views) -> dict[str, Tensor]:
    torch.manual_seed(7)  # for the losses that draw
    loss = function(d)
    grads = torch.autograd.grad(loss, [d.x, d.y], allow_unused=True)
    found = {"loss": loss.detach().double().cpu()}
    for name, leaf, grad in zip(("dx", "dy"), (d.x, d.y), grads, strict=True):
        found[name] = torch.zeros(leaf.shape).double() if grad is None else grad.double().cpu()
    return found
