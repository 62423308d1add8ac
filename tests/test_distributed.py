"""Losses of a batch that several processes share: equal to one process with the whole batch, for every loss."""

import weakref
from unittest import mock

import group_cases
import pytest
import torch
import torch.distributed as dist
from group_cases import ALSO_WHOLE, SIZES, STREAMED_ALL_THE_SAME, WHOLE, compare, on_one_process, sizes_of

import flashpair
from flashpair import losses
from flashpair.distributed import Exchange, Group, sharded
from flashpair.distributed.ranks import Ranks


def test_no_loss_is_left_out():
    covered = {case.split()[0] for case in group_cases.CASES}
    covered |= {"SogCLRLoss", "ISogCLRLoss"}  # with their states, in test_sog_clr.py
    covered |= {
        "ZLPRLoss",
        "AsymmetricLoss",
        "LabelCorrelationLoss",
        "PreferenceLoss",
        "RerankingLoss",
    }  # means over rows: DDP's average is right
    assert {n for n in losses.__all__ if n.endswith("Loss")} <= covered


@pytest.mark.parametrize("case", group_cases.CASES)
@pytest.mark.parametrize("size", SIZES)
def test_gather(pools, size, case):
    sizes = sizes_of(case, size)
    compare(pools(size).values(group_cases.evaluate_here, case, sizes), on_one_process(case, *map(sum, sizes)))


@pytest.mark.parametrize("case", group_cases.CASES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ring(pools, size, case):
    sizes = sizes_of(case, size)
    results = pools(size).run(group_cases.evaluate_here, case, sizes, "RING")
    whole = case.split()[0] in WHOLE or case in ALSO_WHOLE
    if whole and case not in STREAMED_ALL_THE_SAME:
        for error in results:
            assert isinstance(error, ValueError) and "exchange must be GATHER or AUTO" in str(error)
        return
    compare(results, on_one_process(case, *map(sum, sizes)))


def evaluate_with_workspace(case: str, sizes, features: int, workspace: int) -> tuple[dict, int]:
    """And how many messages went round the ring."""
    previous = flashpair.set_max_workspace_bytes(workspace)
    try:
        with mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as messages:
            found = group_cases.evaluate(case, sizes, dist.group.WORLD, dist.get_rank(), features)
        return found, messages.call_count
    finally:
        flashpair.set_max_workspace_bytes(previous)


@pytest.mark.parametrize("case", ["ClipLoss", "SmoothAPLoss self", "SupConLoss mined"])
def test_columns_that_do_not_fit_the_workspace_go_round_the_ring(pools, case):
    """AUTO; losses of whole rows gather in any case."""
    sizes, features = ([70, 40, 82],) * 2, 400
    found = pools(3).values(evaluate_with_workspace, case, sizes, features, 1 << 20)
    assert all((messages > 0) == ("SmoothAP" not in case) for _, messages in found)
    compare([f for f, _ in found], group_cases.evaluate(case, tuple([sum(s)] for s in sizes), features=features))
    found = pools(3).values(evaluate_with_workspace, case, sizes, features, 1 << 24)
    assert all(messages == 0 for _, messages in found)


def bitwise(case: str, sizes, exchange: str) -> bool:
    a, b = (group_cases.evaluate_here(case, sizes, exchange) for _ in range(2))
    return all(torch.equal(a[k], b[k]) for k in ("value", "dx", "dy"))


@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
def test_two_runs_are_bitwise_equal(pools, exchange):
    assert all(pools(3).values(bitwise, "ClipLoss", ([40, 17, 30],) * 2, exchange))


# --- narrow dtypes, other backends ------------------------------------------------------------------------------------


def clip_in(dtype: torch.dtype, sizes: list[int], group, rank: int | None) -> tuple:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(sum(sizes), 16, generator=g), dim=1).to(dtype) for _ in range(2))
    part = slice(None) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x, y = (v[part].clone().requires_grad_() for v in (x, y))
    loss = losses.ClipLoss(group=group)(x, y, 20.0)
    loss.backward()
    ranks = 1 if group is None else dist.get_world_size()
    return loss.detach(), x.grad.float() / ranks, y.grad.float() / ranks


def clip_in_group(dtype: torch.dtype, sizes: list[int], exchange: str) -> tuple:
    return clip_in(dtype, sizes, Group(exchange=Exchange[exchange]), dist.get_rank())


@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(pools, dtype, exchange):
    """The sum over the ranks is taken in float32: no worse than a process rounding its own gradient a few times."""
    sizes = [30, 2, 25]
    found = pools(3).values(clip_in_group, dtype, sizes, exchange)
    whole = clip_in(dtype, sizes, None, None)
    exact = clip_in(torch.float64, sizes, None, None)
    for k in range(3):
        got = found[0][0] if k == 0 else torch.cat([f[k] for f in found])
        scale = exact[k].abs().max().item()
        lost = (whole[k].double() - exact[k]).abs().max().item() / scale
        assert (got.double() - exact[k]).abs().max().item() / scale <= 3 * lost + 1e-6


def dtypes_of_sums(dtype: torch.dtype, exchange: str) -> set[torch.dtype]:
    """In what the gradients of columns are added up over the ranks."""
    found = set()
    scatter, pass_on = Ranks.scatter_total, Ranks.pass_on

    def noted_scatter(self, value, sizes):
        found.add(value.dtype)
        return scatter(self, value, sizes)

    def noted_pass(self, value, shape, tag):
        if tag == 1:
            found.add(value.dtype)
        return pass_on(self, value, shape, tag)

    with mock.patch.multiple(Ranks, scatter_total=noted_scatter, pass_on=noted_pass):
        clip_in_group(dtype, [3, 4], exchange)
    return found


@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_summed_in_float32(pools, dtype, exchange):
    assert pools(2).values(dtypes_of_sums, dtype, exchange) == [{torch.float32}] * 2


def on_reference(case: str, sizes) -> dict:
    from flashpair import use_backend

    with use_backend("reference"):
        return group_cases.evaluate(case, sizes, dist.group.WORLD, dist.get_rank())


@pytest.mark.parametrize("case", ["ClipLoss", "SupConLoss mined", "SmoothAPLoss self", "TripletMarginLoss hard"])
def test_reference_backend(pools, case):
    """Dense and undivided, the same numbers."""
    sizes = sizes_of(case, 3)
    compare(pools(3).values(on_reference, case, sizes), on_one_process(case, *map(sum, sizes)))


def nan_in_a_rank(exchange: str) -> tuple:
    x = torch.ones(3, 4, requires_grad=True)
    bad = x * (float("nan") if dist.get_rank() == 1 else 1.0)
    loss = losses.SupConLoss(group=Group(exchange=Exchange[exchange]))(bad, torch.tensor([0, 1, 2]))
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
def test_nan_of_one_rank_reaches_all(pools, exchange):
    for loss, gradient in pools(3).values(nan_in_a_rank, exchange):
        assert loss.isnan() and gradient.isnan().any()


def nan_that_no_pair_meets() -> torch.Tensor:
    x = torch.eye(3)
    x = torch.full_like(x, torch.nan) if dist.get_rank() == 1 else x
    pairs = tuple(torch.tensor(v) for v in ([0, 1], [1, 0], [0, 1], [2, 2]))  # of the first rank's rows alone
    return losses.ContrastiveLoss(group=dist.group.WORLD)(x, torch.arange(3), pairs)


def test_nan_that_no_pair_meets(pools):
    assert all(loss.isnan() for loss in pools(2).values(nan_that_no_pair_meets))


#: Losses of scores: nothing that they take has two dimensions.
VECTORS = {"ADRMSELoss", "ComparisonLoss", "LambdaLoss", "ListNetLoss", "MECOLoss", "RankNetLoss", "UNIQUELoss"}


def kept_after(cases: list[str]) -> list[str]:
    """Cases of which a batch outlives its step."""
    born, new = [], sharded.Sharded.__new__

    def noted(cls, *args, **kwargs):
        found = new(cls, *args, **kwargs)
        born.append(weakref.ref(found))
        return found

    left = []
    with mock.patch.object(sharded.Sharded, "__new__", staticmethod(noted)):
        for case in cases:
            born.clear()
            group_cases.evaluate_here(case, sizes_of(case, 2))
            vectors = case.split()[0] in VECTORS
            assert bool(born) != vectors
            if any(batch() is not None for batch in born):
                left.append(case)
    return left


def test_nothing_of_a_batch_outlives_its_step(pools):
    assert pools(2).values(kept_after, group_cases.CASES) == [[], []]
