"""The primitives divided over ranks: every program of the table, whole rows, and the collectives under them."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import group_cases
import pytest
import support
import torch
import torch.distributed as dist
from programs import BY_NAME, PROGRAMS, on_sides

import flashpair
from flashpair import Extreme, Mask, mine
from flashpair.distributed import Exchange, Group
from flashpair.distributed.ranks import Ranks
from flashpair.distributed.sharded import over_ranks

ROWS, COLUMNS = [5, 0, 8], [4, 9, 0]
FUSED = "cpu" if "cpu" in support.FUSED else None
pytestmark = pytest.mark.skipif(FUSED is None, reason="the CPU backend is divided")


def part(sizes: list[int]) -> slice:
    rank = dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def inputs(side: str) -> support.Data:
    return support.make(sum(ROWS), sum(COLUMNS) if side == "rectangle" else None, 6).to(torch.float64)


def program_here(name: str, side: str, exchange: str) -> tuple[dict, dict]:
    """As `support.evaluate`; x and y of this rank, and their gradients averaged."""
    data = inputs(side)
    own = {"x": data.x.detach()[part(ROWS)].clone().requires_grad_()}
    if side == "rectangle":
        own["y"] = data.y.detach()[part(COLUMNS)].clone().requires_grad_()

    def run(**sharded) -> tuple[dict, dict]:
        return support.evaluate(BY_NAME[name].run, dataclasses.replace(data, **sharded), FUSED)

    # `evaluate` differentiates by what stands in its data: the leaves of this rank, seen through what they became.
    with mock.patch.object(support.Data, "leaves", lambda d: {**whole_leaves(d), **own}):
        group = Group(exchange=Exchange[exchange])
        values, gradients = over_ranks(group, name, "", run, own, [])
    ranks = dist.get_world_size()
    return values, {k: v / ranks if k in ("dx", "dy") else v for k, v in gradients.items()}


def whole_leaves(d: support.Data) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(d, f.name) for f in dataclasses.fields(d)}
    return {n: v for n, v in values.items() if n not in ("x", "y") and v is not None and v.is_floating_point()}


@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
@pytest.mark.parametrize(("program", "side"), on_sides(PROGRAMS))
def test_programs(pools, program, side, exchange):
    """Every reduction, score, mask and parameter, on both axes: outputs, and gradients of all that has one."""
    if (program.name, side) == ("exclude", "self"):  # two columns a row
        for error in pools(3).run(program_here, program.name, side, exchange):
            assert isinstance(error, ValueError) and "exclude must be None in a group where pairs" in str(error)
        return
    want = support.evaluate(program.run, inputs(side), "reference")
    found = pools(3).values(program_here, program.name, side, exchange)
    for values, gradients in found:
        for k, value in want[0].items():
            support.assert_close(k, values[k], value, 1e-9)
        for k, value in want[1].items():
            if k not in ("dx", "dy"):
                support.assert_close(k, gradients[k], value, 1e-9)
    for k in ("dx", "dy"):
        if k in want[1]:
            support.assert_close(k, torch.cat([gradients[k] for _, gradients in found]), want[1][k], 1e-9)


def mined_here(k: int, exchange: str, ties: bool) -> list:
    x, y, labels, refs = mining(ties)

    def run(x, y):
        found = mine(x, y, [Extreme(Mask.DIFFERENT, k=k), Extreme(Mask.ALL, largest=False, k=k, above=-0.5)],
                     labels=labels, ref_labels=refs)  # fmt: skip
        return [v for pair in found for v in pair]

    own = {"x": x[part(ROWS)].clone(), "y": y[part(COLUMNS)].clone()}
    return over_ranks(Group(exchange=Exchange[exchange]), "mine", "", run, own, [])


def mining(ties: bool) -> tuple:
    d = support.make(sum(ROWS), sum(COLUMNS), 6)
    x, y = (v.sign() if ties else v for v in (d.x, d.y))
    return x.double(), y.double(), d.labels, d.ref_labels


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_mine(pools, k, exchange, ties):
    """More than a rank's columns, ties between ranks, missing entries."""
    x, y, labels, refs = mining(ties)
    with flashpair.use_backend("reference"):
        want = mine(x, y, [Extreme(Mask.DIFFERENT, k=k), Extreme(Mask.ALL, largest=False, k=k, above=-0.5)],
                    labels=labels, ref_labels=refs)  # fmt: skip
    for found in pools(3).values(mined_here, k, exchange, ties):
        torch.testing.assert_close(found, [v for pair in want for v in pair], rtol=1e-12, atol=1e-12)


# --- whole rows -------------------------------------------------------------------------------------------------------


def row_formula(panel, row: torch.Tensor, shared: torch.Tensor) -> list[torch.Tensor]:
    """Results by row, a total, and gradients in what belongs to rows and in what all share."""
    z = shared[0] * panel.s * row[:, None]
    return [torch.where(panel.allowed, z, 0.0).sum(1) + panel.row, (shared[1] * z * z).sum()]


def row_reduce_of(x: torch.Tensor) -> list[torch.Tensor]:
    row = torch.linspace(1, 2, x.shape[0], dtype=torch.float64).requires_grad_()
    shared = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    by_row, total = flashpair.row_reduce(x, None, row_formula, rows=[row], shared=[shared], totals=1, normalize=True)
    value = (by_row * by_row).sum() + total
    return [by_row.detach(), total.detach(), *torch.autograd.grad(value, (row, shared), retain_graph=True), value]


def row_reduce_here() -> list[torch.Tensor]:
    x = group_cases.data(sum(ROWS), 1)["x"][part(ROWS)].clone().requires_grad_()
    *found, value = over_ranks(Group(), "row_reduce", "", row_reduce_of, {"x": x}, [])
    return [*found, torch.autograd.grad(value, x)[0] / dist.get_world_size()]


def test_row_reduce(pools):
    """Results, totals, and gradients of row inputs and shared ones, whole on each rank."""
    x = group_cases.data(sum(ROWS), 1)["x"].requires_grad_()
    *want, value = row_reduce_of(x)
    ranks = pools(3).values(row_reduce_here)
    for found in ranks:
        torch.testing.assert_close(found[:4], want)
    torch.testing.assert_close(torch.cat([f[4] for f in ranks]), torch.autograd.grad(value, x)[0])


# --- collectives ------------------------------------------------------------------------------------------------------


def scattered(sizes: list[int], padded: bool) -> torch.Tensor:
    """What backends other than gloo do is a reduce-scatter of rows padded to the most; gloo can do that too."""
    value = (1.0 + dist.get_rank()) * torch.arange(3.0 * sum(sizes)).view(-1, 3)
    with mock.patch.object(dist, "get_backend", lambda _: "nccl") if padded else contextlib.nullcontext():
        return Ranks(Group()).scatter_total(value, sizes)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 0, 1], [0, 0, 0]], ids=str)
def test_sums_of_rows_go_to_their_ranks(pools, sizes, padded):
    found = pools(3).values(scattered, sizes, padded)
    assert [len(f) for f in found] == sizes
    torch.testing.assert_close(torch.cat(found), 6 * torch.arange(3.0 * sum(sizes)).view(-1, 3))


def gathered(sizes: list[int], dtype: torch.dtype) -> torch.Tensor:
    rank = dist.get_rank()
    own = torch.full((sizes[rank], 2), rank + 1).to(dtype)
    return Ranks(Group()).gather(own, sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 0, 1], [0, 0, 0]], ids=str)
def test_rows_of_all_ranks(pools, sizes, dtype):
    want = torch.cat([torch.full((n, 2), r + 1).to(dtype) for r, n in enumerate(sizes)])
    assert all(torch.equal(found, want) for found in pools(3).values(gathered, sizes, dtype))
