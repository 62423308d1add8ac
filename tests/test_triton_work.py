"""Triton's kernels under its interpreter: invented programs, how much work a pass does, and offsets beyond int32.

Triton decides at import whether it interprets, so without TRITON_INTERPRET=1 the one test that runs starts a process of
its own. `FLASHPAIR_FUZZ` is the number of invented programs. Every `torch.empty` is filled with NaN.
"""

from __future__ import annotations

import os
import random

import numpy
import own_process
import pytest
import torch
from programs import LSE, SUM
from support import compare, make

from flashpair import (
    Axis,
    Combine,
    Extreme,
    Mask,
    Reduction,
    Score,
    Similarity,
    Term,
    mine,
    pair_reduce,
    pair_sum,
    use_backend,
)

pytest.importorskip("triton", reason="no Triton wheel for this platform")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")
FUZZ = int(os.environ.get("FLASHPAIR_FUZZ", "20"))
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, which sets TRITON_INTERPRET=1")

if INTERPRETED:
    import interpreting
    from flashpair.kernels import configs, launch
    from flashpair.kernels.configs import TileConfig
    from triton.runtime.interpreter import InterpreterBuilder

    interpreting.hasten()
    SQUARE = TileConfig(16, 16, 16, 4, 1, parts=1, group=2)
    CONFIGS = [
        TileConfig(16, 32, 16, 4, 1, parts=2, group=2),
        TileConfig(32, 16, 16, 4, 1, parts=2, group=3),
        TileConfig(16, 32, 32, 4, 1, parts=4, group=8),
    ]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_a_process_of_its_own():
    own_process.run(__file__, TRITON_INTERPRET="1")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 by 16, folds of 16 owners, and poisoned memory."""
    monkeypatch.setattr(launch, "FOLDED", 16)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills torch.empty
    assert torch.empty(3).isnan().all()
    with configs.override(SQUARE):
        yield
    torch.use_deterministic_algorithms(before)


# --- programs made up at random ---------------------------------------------------------------------------------------


def _invented(rng: random.Random):
    """Random data and a random program over it."""
    symmetric, grid = rng.random() < 0.5, True
    b = rng.choice([1, 2, 5, 16, 17, 31, 35])
    n = None if symmetric else rng.choice([1, 3, 16, 33, 37])
    d = rng.choice([1, 3, 8, 16, 17, 33])
    data = make(b, n, d, rng.choice(["few", "one", "distinct", "many"]), seed=rng.randrange(1000), grid=grid)
    options = {"similarity": rng.choice(list(Similarity)), "exclude_self": symmetric and rng.random() < 0.7}
    use_exclude, detach = rng.random() < 0.3, rng.random() < 0.3
    rows = ("row_scale", "row_offset", "row_weight")
    columns = ("column_scale", "column_offset", "column_weight")
    plans = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        axis = rng.choice(list(Axis))
        own, other = (rows, columns) if axis == Axis.ROWS else (columns, rows)
        plans.append(
            {
                "reduction": rng.choice(list(Reduction)),
                "score": rng.choice(list(Score)),
                "mask": rng.choice(list(Mask)),
                "axis": axis,
                "scale": rng.choice([1.0, -0.5, "scale", own[0]]),
                "offset": rng.choice([0.0, -0.31, "bias", own[1]]),
                "other_offset": rng.choice([None, None, other[1]]),
                "combine": rng.choice(list(Combine)),
                "weight": rng.choice([None, None, other[2]]),
                "above": rng.choice([None, None, None, -0.507, own[1]]),
                "below": rng.choice([None, None, None, 0.507, own[0]]),
                "constant": 0.3,
                "detach_weights": detach,
            }
        )

    def run(d):
        def value(plan, name):
            found = plan[name]
            found = getattr(d, found) if isinstance(found, str) else found
            # Similarities on the grid are multiples of 1/16: thresholds between them are well defined.
            return found.detach() * 0 + 0.507 if name in ("above", "below") and torch.is_tensor(found) else found

        terms = [Term(**{name: value(plan, name) for name in plan}) for plan in plans]
        extra = dict(options, pair_mask=d.pair_mask)
        if use_exclude:
            extra["exclude"] = d.exclude
        return pair_reduce(**d.pairs, terms=terms, **extra)

    return data, run, plans, options


@interpreted
@pytest.mark.parametrize("seed", range(FUZZ))
def test_invented_programs(small_tiles, seed):
    rng = random.Random(seed)
    data, run, plans, options = _invented(rng)
    try:
        with configs.override(rng.choice([SQUARE, *CONFIGS])):
            compare(run, data, "triton", torch.float32, ill_conditioned=True)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{tuple(data.x.shape)}, {options}, {plans}") from None


def _forced(backend: str, function):
    with use_backend(backend):
        return function()


# --- how much work is done --------------------------------------------------------------------------------------------


@pytest.fixture
def count(monkeypatch):
    """Multiplications in tile products and exponentials of tile entries that the kernels perform."""
    counted = {"dot": 0, "exp": 0}
    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *args):
        counted["dot"] += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *args)

    def create_exp2(self, arg):
        counted["exp"] += arg.data.size if arg.data.shape == (SQUARE.block_b, SQUARE.block_n) else 0
        return self.unary_op(arg, numpy.exp2)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "create_exp2", create_exp2)
    return counted


def _work(count: dict, b: int, n: int, d: int = 16) -> float:
    """Tile products so far, in units of all B N D; resets the count."""
    units = count["dot"] / (b * n * d)
    count["dot"] = count["exp"] = 0
    return units


@interpreted
def test_a_self_similarity_visits_the_triangle_once(small_tiles, count):
    x = torch.randn(64, 16, requires_grad=True)
    with use_backend("triton"):
        lse, total = pair_reduce(x, terms=[Term(LSE), Term(SUM, Score.SQUARE)])
        triangle = (4 * 5 / 2) / 16
        assert _work(count, 64, 64) == triangle
        torch.autograd.grad(lse.sum() + total.sum(), x)
        assert _work(count, 64, 64) <= 1.0
        mine(x, extremes=[Extreme(), Extreme(largest=False)])
        assert _work(count, 64, 64) == triangle
        y = torch.randn(64, 16)
        pair_reduce(x, y, terms=[Term(LSE)])
        assert _work(count, 64, 64) == 1.0


@interpreted
def test_super_blocks_halve_the_backward_pass(small_tiles, count, monkeypatch):
    monkeypatch.setattr(launch, "panel_shape", lambda *args, **kwargs: (16, 16))
    x = torch.randn(96, 16, requires_grad=True)
    with use_backend("triton"):
        (lse,) = pair_reduce(x, terms=[Term(LSE)])
        _work(count, 96, 96)
        torch.autograd.grad(lse.sum(), x)
    assert _work(count, 96, 96) == (6 * 7 / 2) / 36


@interpreted
def test_pairs_of_equal_labels_cost_their_tiles_only(small_tiles, count):
    x = torch.randn(96, 16, requires_grad=True)
    labels = torch.arange(96) % 6  # sorted: one tile each
    with use_backend("triton"):
        (total,) = pair_reduce(x, terms=[Term(SUM, mask=Mask.SAME)], labels=labels)
        assert _work(count, 96, 96) == 6 / 36
        torch.autograd.grad(total.sum(), x)
        features = 64 / 16  # a program of the gradient's product has 64 at a time, of which 16 are there
        assert _work(count, 96, 96) == (6 + 6 * features) / 36
        mine(x, extremes=[Extreme(Mask.SAME), Extreme(Mask.DIFFERENT)], labels=labels)
        assert _work(count, 96, 96) == (6 + 21) / 36


@interpreted
def test_a_sum_needs_one_pass(small_tiles, count):
    x, y = (torch.randn(48, 16, requires_grad=True) for _ in range(2))
    with use_backend("triton"):
        total = pair_sum(x, y, terms=[Term(SUM, Score.SOFTPLUS)])
        torch.autograd.grad(total, (x, y))
    assert _work(count, 48, 48) == 1.0


@interpreted
@pytest.mark.parametrize("side", ["rectangle", "self"])
def test_rows_and_columns_share_an_exponential(small_tiles, side, count):
    x = (0.3 * torch.randn(64, 16)).requires_grad_()
    y = 0.3 * torch.randn(64, 16) if side == "rectangle" else None
    terms = [Term(LSE, scale=2.0), Term(LSE, axis=Axis.COLUMNS, scale=2.0)][: 2 if y is not None else 1]
    with use_backend("triton"):
        found = pair_reduce(x, y, terms=terms)
        assert count["exp"] == 256 * round(_work(count, 64, 64) * 16)
        torch.autograd.grad(sum(f.sum() for f in found), x)
        assert count["exp"] == 256 * round(_work(count, 64, 64) * 16)


# --- sizes beyond int32 -----------------------------------------------------------------------------------------------


@interpreted
def test_row_offsets_are_int64(small_tiles, tmp_path):
    """Rows 2**30 entries apart in a sparse file: the fourth lies beyond int32."""
    stride, rows, d = 1 << 30, 4, 16  # whole blocks of features: nothing is copied
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2 * (stride * (rows - 1) + d))
    far = torch.from_file(str(path), shared=True, size=stride * (rows - 1) + d, dtype=torch.float16)
    x = far.as_strided((rows, d), (stride, 1))
    x.copy_(torch.randn(rows, d))
    y = torch.randn(5, d).half()
    for a, b in ((x, y), (y, x)):
        results = [
            _forced("triton", lambda p=p, q=q: pair_reduce(p, q, [Term(LSE), Term(LSE, axis=Axis.COLUMNS)]))
            for p, q in ((a, b), (a.contiguous(), b.contiguous()))
        ]
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
