"""Losses with a state for each sample: against loops from the papers, LibAUC, and one process for several."""

import functools
import importlib.metadata
import importlib.util
import math

import pytest
import torch
import torch.distributed as dist

from flashpair import losses
from flashpair.distributed import DistributedError, Exchange, Group

SAMPLES, FEATURES = 12, 5
BATCHES = [[4, 0, 7], [9, 2, 5, 1, 3], [4, 9], [0, 1, 2, 3, 4, 5], [11, 7, 9]]


def unit(v):
    return v / v.norm(dim=-1, keepdim=True)


def inputs(b: int) -> tuple:
    g = torch.Generator().manual_seed(b)
    first, second = (torch.randn(len(BATCHES[b]), FEATURES, generator=g).double() for _ in range(2))
    return first, first + 0.7 * second, torch.tensor(BATCHES[b])


class Loops:
    """The definition, pair by pair; `u`, `T` and `m` by sample and side."""

    def __init__(self, towers: bool, individual: bool, gamma: float, temperature: float) -> None:
        self.towers, self.individual, self.gamma = towers, individual, gamma
        self.u = {}
        self.T = {(i, k): temperature for i in range(SAMPLES) for k in range(2)}
        self.m = {key: 0.0 for key in self.T}

    def __call__(self, first, second, index):
        sides, B, total = (unit(first), unit(second)), len(index), 0.0
        updates = {}
        for i in range(B):
            for k in range(2):
                key, own = (int(index[i]), k), sides[k][i]
                positive = (own * sides[1 - k][i]).sum()
                others = [sides[1 - k][j] for j in range(B) if j != i]
                if not self.towers:
                    others += [sides[k][j] for j in range(B) if j != i]
                scores = [(own * v).sum() - (positive if self.towers else 0.0) for v in others]
                e = [math.exp(s.item() / self.T[key]) for s in scores]
                g = sum(e) / len(e)
                u = g if key not in self.u else (1 - self.gamma) * self.u[key] + self.gamma * g
                weighted = sum(w * s for w, s in zip(e, scores, strict=True)) / (len(e) * u)
                loss = weighted if self.towers else weighted - positive
                total = total + loss / B / (2 if self.towers else 1)
                updates[key] = u, math.log(u) + 0.3 - weighted.item() / self.T[key]
        for i in range(B):
            keys = [(int(index[i]), k) for k in range(2)]
            for key in keys:
                u, d = updates[key]
                if not self.towers:  # views share one
                    u, d = ((updates[keys[0]][n] + updates[keys[1]][n]) / 2 for n in range(2))
                self.u[key] = u
                if self.individual:
                    self.m[key] = 0.1 * self.m[key] + 0.9 * d
                    self.T[key] = min(max(self.T[key] - 0.01 * self.m[key], 0.05), 0.7)
        return total


def make(individual: bool, towers: bool, gamma: float, group=None):
    kind = losses.ISogCLRLoss if individual else losses.SogCLRLoss
    return kind(SAMPLES, temperature=0.25, gamma=gamma, towers=towers, group=group).double()


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("towers", [False, True])
@pytest.mark.parametrize("individual", [False, True])
def test_definition(individual, towers, gamma):
    """Value, gradients and state over several batches; some samples return, some are new."""
    ours, loops = make(individual, towers, gamma), Loops(towers, individual, gamma, 0.25)
    for b in range(len(BATCHES)):
        found = []
        for function in (ours, loops):
            first, second, index = inputs(b)
            first, second = first.requires_grad_(), second.requires_grad_()
            value = function(first, second, index)
            found.append((value.detach(), *torch.autograd.grad(value, (first, second))))
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    state = torch.full((SAMPLES, 2), -math.inf).double()
    for (i, k), u in loops.u.items():
        state[i, k] = math.log(u)
    torch.testing.assert_close(ours.log_average, state, rtol=1e-10, atol=1e-12)
    if individual:
        want = torch.tensor([[loops.T[i, k] for k in range(2)] for i in range(SAMPLES)], dtype=torch.float64)
        torch.testing.assert_close(ours.temperature_of, want, rtol=1e-10, atol=1e-12)


def test_first_meeting_is_the_softmax_of_the_batch():
    """With γ = 1 the gradient is that of T log Σ e^{s/T} - s+."""
    first, second, index = inputs(1)
    found = []
    for function in (make(False, False, 1.0), None):
        a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
        if function is not None:
            value = function(a, b, index)
        else:
            z = torch.cat([unit(a), unit(b)])
            s, rows = z @ z.T / 0.25, len(index)
            labels = torch.arange(2 * rows) % rows
            same = labels[:, None] == labels[None, :]
            lse = s.masked_fill(same, -math.inf).logsumexp(1)
            positive = s[torch.arange(2 * rows), (torch.arange(2 * rows) + rows) % (2 * rows)]
            value = 0.25 * (lse - positive).sum() / rows
        found.append(torch.autograd.grad(value, (a, b)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_evaluation_moves_nothing():
    loss = make(True, False, 0.5)
    loss(*inputs(0))
    before = {n: b.clone() for n, b in loss.named_buffers()}
    loss.eval()
    loss(*inputs(1))
    torch.testing.assert_close(dict(loss.named_buffers()), before)


def test_small_temperatures_do_not_overflow():
    loss = losses.SogCLRLoss(SAMPLES, temperature=0.001)
    first, second, index = inputs(0)
    for _ in range(2):
        first = first.float().detach().requires_grad_()
        value = loss(first, second.float(), index)
        value.backward()
        assert value.isfinite() and first.grad.isfinite().all()


# --- LibAUC -----------------------------------------------------------------------------------------------------------


def libauc():
    """LibAUC's contrastive losses, read from their file: the package itself needs much else."""
    try:
        files = importlib.metadata.files("libauc")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("libauc is not installed (pip install --no-deps libauc)")
    path = next(f.locate() for f in files if str(f).endswith("libauc/losses/contrastive.py"))
    spec = importlib.util.spec_from_file_location("libauc_contrastive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize("towers", [False, True])
def test_peer(towers, individual):
    """Over batches that are new or known as a whole, where its batch-level test says what ours says of each sample."""
    peer, ours = libauc(), make(individual, towers, 0.6)
    options = {"N": SAMPLES, "tau": 0.25, "gamma": 0.6, "enable_isogclr": individual}
    if towers:
        theirs = peer.GCLoss_v2(tau_min=0.05, tau_max=0.7, rho=0.3, eta=0.01, beta=0.9, **options)
    else:
        theirs = peer.GCLoss_v1(device="cpu", **options)
    for name, value in vars(theirs).items():
        if isinstance(value, torch.Tensor):
            setattr(theirs, name, value.double())
    for b in (1, 1, 1):
        first, second, index = inputs(b)
        found = []
        for run in (ours, theirs):
            x, y = first.clone().requires_grad_(), second.clone().requires_grad_()
            value = run(unit(x), unit(y), index)
            if run is theirs and towers:
                value = value[0] / (len(index) - 1)  # it does not divide
            found.append((value.detach(), *torch.autograd.grad(value, (x, y))))
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


# --- several processes ------------------------------------------------------------------------------------------------


def run(individual: bool, towers: bool, group, rank: int, ranks: int, state=None, first: int = 0, end: int = 5):
    loss, found = make(individual, towers, 0.6, group), []
    if state is not None:
        loss.load_whole_state(state)
    for b in range(first, end):
        x, y, index = inputs(b)
        own = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
        x, y = x[own].clone().requires_grad_(), y[own].clone().requires_grad_()
        value = loss(x, y, index[own])
        value.backward()
        found.append((value.detach(), x.grad / ranks, y.grad / ranks))
    return found, loss.whole_state(), len(loss.log_average)


def run_here(individual: bool, towers: bool, exchange: str = "GATHER", **options):
    group = Group(exchange=Exchange[exchange])
    return run(individual, towers, group, dist.get_rank(), dist.get_world_size(), **options)


@functools.cache
def alone(individual: bool, towers: bool):
    return run(individual, towers, None, 0, 1)


def compare(ranks: list, want: list, state: dict) -> None:
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)
    for found, kept, _ in ranks:
        close(kept, state)
        close([f[0] for f in found], [w[0] for w in want])
    for b, batch in enumerate(want):
        for k in (1, 2):
            close(torch.cat([found[b][k] for found, *_ in ranks]), batch[k])


@pytest.mark.parametrize("exchange", ["GATHER", "RING"])
@pytest.mark.parametrize("towers", [False, True])
@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_on_several_processes(pools, size, individual, towers, exchange):
    """Samples fall to any rank; each keeps the state of its share."""
    found = pools(size).values(run_here, individual, towers, exchange)
    compare(found, *alone(individual, towers)[:2])
    assert sum(held for *_, held in found) == SAMPLES


@pytest.mark.parametrize("size", [1, 2])
def test_goes_on_with_another_number_of_ranks(pools, size):
    half = pools(3).values(run_here, True, True, end=3)
    rest = pools(size).values(run_here, True, True, state=half[0][1], first=3)
    compare(rest, alone(True, True)[0][3:], alone(True, True)[1])


def bad_index() -> None:
    index = torch.tensor([0, SAMPLES if dist.get_rank() == 1 else 1])
    make(False, False, 1.0, dist.group.WORLD)(torch.eye(2).double(), torch.eye(2).double(), index)


def test_bad_input(pools):
    x = torch.eye(2)
    loss = losses.SogCLRLoss(SAMPLES)
    with pytest.raises(ValueError, match=r"index must be in \[0, num_samples=12\); got 12"):
        loss(x, x, torch.tensor([0, SAMPLES]))
    with pytest.raises(ValueError, match="index must have length 2; got 3"):
        loss(x, x, torch.arange(3))
    with pytest.raises(TypeError, match="index must be a 1-D int64 tensor"):
        loss(x, x, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="first and second must have equal numbers of rows"):
        loss(x, torch.eye(3)[:, :2], torch.arange(2))
    with pytest.raises(ValueError, match="gamma must be in"):
        losses.SogCLRLoss(SAMPLES, gamma=0.0)
    with pytest.raises(ValueError, match="temperature_min must be in"):
        losses.ISogCLRLoss(SAMPLES, temperature=0.1, temperature_min=0.2)
    with pytest.raises(ValueError, match=r"log_average of the state must have shape \(12, 2\)"):
        loss.load_whole_state({"log_average": torch.zeros(3, 2)})
    assert (loss.log_average == -math.inf).all()
    for error in pools(2).run(bad_index):
        assert isinstance(error, (ValueError, DistributedError)) and "got 12" in str(error)
