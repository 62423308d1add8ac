"""Recordings of passes (flashpair.recording), with passes of a few PyTorch operators on CPU tensors."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor

from flashpair import Extreme, recording
from flashpair.recording import recorded
from flashpair.request import HEADER, Request
from flashpair.terms import Mask


def request(x: Tensor, y: Tensor | None = None, labels: Tensor | None = None, params=(), **options) -> Request:
    return Request(x, y, labels, None, None, None, list(params), [0] * HEADER, [], 1 << 20, **options)


def playing(function):
    """The function as a recorded pass, and how often it ran itself."""
    runs = []

    @recorded
    def launcher(request, *args):
        runs.append(request)
        return function(request, *args)

    return launcher, runs


def check(function, *calls: tuple, plays: bool = True) -> None:
    """All calls look alike: each gives what the function gives, and from the third on it does not run."""
    launcher, runs = playing(function)
    for call in (*calls, *calls, *calls):
        torch.testing.assert_close(launcher(*call), function(*call), rtol=0, atol=0)
    assert len(runs) == (2 if plays else 3 * len(calls))
    assert len(recording.recordings) == plays


def test_what_passes_do_is_played():
    """Views, slices, assignments, operators in place and with `out=`, several results, lists, types."""

    def function(r, weight):
        rows, features = r.x.shape
        space = torch.empty(rows * features + 3, dtype=torch.float64)
        view = space[3:].view(rows, features)
        torch.mul(r.x, 2.0, out=view)
        view += weight
        view[:, 0] = r.labels
        view[1:].mul_(0.5)
        first, second = view.T.contiguous().split([1, features - 1])
        smallest = torch.stack([first.sum(), second.amin()]).to(torch.float32)
        order = r.labels.argsort()
        return smallest, [view[order], None, (torch.cat((first, second)),)], torch.where(r.x > 0, 1.0, torch.inf)

    calls = [(request(torch.randn(4, 3), labels=torch.randperm(4)), torch.randn(3)) for _ in range(3)]
    check(function, *calls)


def test_operators_of_extensions_are_played():
    def function(r):
        return torch.ops.aten.add.Tensor(r.x, 1), torch.ops.aten.mul(r.x, 3)

    check(function, (request(torch.ones(2)[None]),), (request(torch.zeros(2)[None]),))


def test_numbers_keep_their_digits_and_constants_their_identity():
    constants = (0.1, -0.0, 1e-300, float("inf"), float("-inf"), 7, True, torch.float64)

    def function(r):
        out = torch.zeros(8, dtype=constants[-1])
        for n, value in enumerate(constants[:-1]):
            out[n] = r.x[0, 0] + value if value != value else r.x[0, 0] * 0 + value
        return out.view(torch.int64)

    check(function, (request(torch.ones(1, 1, dtype=torch.float64)),), (request(torch.zeros(1, 1).double()),))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:3],
        lambda x: x.double(),
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    ],
    ids=["shape", "dtype", "strides", "alignment"],
)
def test_what_looks_different_is_another_pass(change):
    launcher, runs = playing(lambda r: (r.x.data_ptr() % 16, r.x + 1)[1])
    x = torch.randn(4, 4)
    for _ in range(3):
        launcher(request(x))
    assert len(runs) == 2
    launcher(request(change(x)))
    assert len(runs) == 3


def test_whatever_a_request_says_is_part_of_what_it_looks_like():
    launcher, runs = playing(lambda r, *args: r.x + 1)
    x = torch.randn(4, 4)
    calls = [
        (request(x),),
        (request(x, y=x.clone()),),
        (request(x, labels=torch.arange(4)),),
        (request(x, params=[torch.ones(4)]),),
        (request(x, params=[torch.ones(1)]),),
        (request(x), (True, False)),
        (request(x), (True, True)),
        *[(request(x, extremes=[Extreme(Mask.SAME, True, 1, above, below)]),) for above, below in (
            (None, None), (0.0, None), (1.0, None), (None, 0.0), (torch.zeros(4), None), (None, torch.zeros(4)),
        )],
        (request(x, extremes=[Extreme(Mask.SAME, False)]),),
        (request(x, extremes=[Extreme(Mask.ALL)]),),
        (request(x, extremes=[Extreme(Mask.SAME, k=2)]),),
        (request(x, extremes=[Extreme(Mask.SAME), Extreme(Mask.SAME)]),),
    ]  # fmt: skip
    one = request(x)
    one.max_workspace_bytes = 7
    for n, field in enumerate(("spec", "consts")):
        other = request(x)
        setattr(other, field, [1.0 + n])
        calls.append((other,))
    for call in [*calls, (one,)]:
        launcher(*call)
    assert len(runs) == len(calls) + 1 and not recording.recordings


def test_one_tensor_in_two_places_is_not_taken_for_two():
    function = lambda r: r.labels * 10 + r.exclude  # noqa: E731
    launcher, _ = playing(function)
    same, other = torch.arange(3), torch.arange(3) + 5
    x = torch.zeros(3, 1)
    for labels, exclude in [(same, same)] * 3 + [(same, other)] * 3 + [(other, same)] * 3:
        r = request(x, labels=labels)
        r.exclude = exclude
        assert torch.equal(launcher(r), function(r))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda r: r.x * r.x.sum().item(), "item reads what tensors hold"),
        (lambda r: r.x * float(r.x.sum()), "__float__ reads what tensors hold"),
        (lambda r: r.x + 1 if (r.x > 0).any() else r.x - 1, "__bool__ reads what tensors hold"),
        (lambda r: r.x + r.x.tolist()[0][0], "tolist reads what tensors hold"),
        (lambda r: r.x + len(torch.nonzero(r.x > 0)), "nonzero gives shapes by what tensors hold"),
        (lambda r: r.x + len(r.x[r.x > 0]), "__getitem__ gives shapes by what tensors hold"),
        (lambda r: r.x + FOREIGN, "it reads a tensor that is neither an argument nor its own"),
        (
            lambda r: [r.x + n for n in range(recording.LONGEST + 1)][-1],
            f"it makes more than {recording.LONGEST} calls",
        ),
    ],
    ids=["item", "float", "bool", "list", "nonzero", "mask", "foreign", "long"],
)
def test_what_depends_on_more_than_looks_is_not_recorded(function, reason, monkeypatch):
    reasons = []
    finish = recording.Recorder.finish
    monkeypatch.setattr(recording.Recorder, "finish", lambda self, f: (finish(self, f), reasons.append(self.reason))[0])
    check(function, (request(torch.ones(1, 1)),), (request(-torch.ones(1, 1)),), plays=False)
    assert reasons == [reason]


FOREIGN = torch.ones(1)


def test_only_what_is_used_is_played():
    source = recording.Recorder.source
    sources = []

    def function(r):
        unused = r.x.view(-1)[1:].detach()  # noqa: F841
        torch.empty(5)
        seen = torch.zeros(2)
        seen[0] = 1.0  # an effect, though nobody reads it
        return r.x.contiguous() + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording.Recorder, "source", lambda self, f: (sources.append(source(self, f)), sources[-1])[1])
        check(function, (request(torch.ones(2, 2)),))
    assert sources[0].count("\n") == 1 + 3  # zeros, assignment, sum; and what is returned


def test_memory_is_given_back_after_its_last_use():
    """Where the pass runs, also while it is recorded, and where it is played."""
    refs, alive = [], []
    begin, look = lambda t: refs.append(weakref.ref(t)), lambda t: alive.append(refs[-1]() is not None)

    def function(r):
        first = r.x + 1
        begin(first)
        recording.note(begin, (first,))
        second = first * 2
        del first
        look(second)
        recording.note(look, (second,))
        return second + 1

    launcher, _ = playing(function)
    for _ in range(3):
        launcher(request(torch.ones(2, 2)))
    assert len(refs) == 3 and alive == [False] * 3


def test_results_that_nobody_reads_are_given_back():
    refs, alive = [], []

    def function(r):
        values = r.x.sort(dim=1).values
        recording.note(lambda t: alive.append(any(ref() is not None for ref in refs)), (values,))
        return values + 1

    launcher, _ = playing(function)
    x = torch.randn(2, 2)
    launcher(request(x))
    launcher(request(x))
    (play,) = recording.recordings.values()
    names = play.__globals__
    sort = next(name for name, value in names.items() if getattr(value, "__name__", "") == "sort")
    call = names[sort]

    def watched(*args, **kwargs):
        values, indices = call(*args, **kwargs)
        refs.append(weakref.ref(indices))
        return values, indices

    names[sort] = watched
    launcher(request(x))
    assert alive == [False]


def test_named_results_are_passed_on():
    """A tuple of a kind of its own is one of its tensors."""

    def function(r):
        found = r.x.max(dim=1)
        return torch.stack([v.to(r.x.dtype) for v in found]), torch.cat(found[:1])

    check(function, *[(request(torch.randn(3, 2)),) for _ in range(3)])


def test_a_tensor_in_the_place_of_a_dead_one_is_another():
    """Identities come again; what was known of a tensor goes with it."""

    def function(r):
        total = torch.zeros_like(r.x)
        for n in range(50):
            total += r.x * n
        return total

    check(function, *[(request(torch.randn(2, 2)),) for _ in range(3)])


def test_a_recording_keeps_no_tensor():
    launcher, runs = playing(lambda r: (r.x + 1).sum(1))
    x = torch.randn(4, 4)
    refs = [weakref.ref(x)]
    for _ in range(3):
        refs.append(weakref.ref(launcher(request(x))))
    runs.clear()
    del x
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4 and len(recording.recordings) == 1


def test_calls_that_pytorch_does_not_see_are_noted():
    seen = []
    launcher, _ = playing(lambda r: (recording.note(seen.append, (r.x,)), r.x + 1)[1])
    given = [torch.randn(2, 2) for _ in range(3)]
    for x in given:
        launcher(request(x))
    assert len(seen) == 1 and seen[0] is given[2]  # played; nobody records otherwise


def test_a_pass_inside_another_is_part_of_that():
    seen = []
    inner, _ = playing(lambda r: (recording.note(seen.append, (r.x,)), r.x + 1)[1])
    outer, runs = playing(lambda r: inner(r) * 2)
    x = torch.ones(1, 1)
    for _ in range(3):  # two of its own are played in the end
        inner(request(x))
    seen.clear()
    given = [torch.ones(1, 1) for _ in range(3)]
    for x in given:
        assert outer(request(x)).item() == 4.0
    assert len(runs) == 2
    # The inner one is played in the first; in the second it only tells of its call, which the third makes.
    assert [id(x) for x in seen] == [id(given[0]), id(given[2])]


def test_an_error_is_not_recorded():
    def function(r):
        if fails:
            raise RuntimeError("not now")
        return r.x + 1

    launcher, runs = playing(function)
    x, fails = torch.ones(1, 1), False
    launcher(request(x))
    fails = True
    with pytest.raises(RuntimeError, match="not now"):
        launcher(request(x))
    recording.note(pytest.fail, ("nothing records any more",))
    assert not recording.recordings
    fails = False
    for _ in range(3):
        assert launcher(request(x)).item() == 2.0
    assert len(runs) == 4 and len(recording.recordings) == 1


def test_a_pass_is_recorded_when_its_time_has_come(monkeypatch):
    monkeypatch.setattr(recording, "RECORDED", 4)
    launcher, runs = playing(lambda r: r.x + 1)
    for calls in range(1, 8):
        launcher(request(torch.ones(1, 1)))
        assert len(recording.recordings) == (calls >= 4) and len(runs) == min(calls, 4)


def test_those_that_were_played_last_are_kept(monkeypatch):
    monkeypatch.setattr(recording, "MOST", 2)
    launcher, runs = playing(lambda r: r.x + 1)
    call = lambda length, times=1: [launcher(request(torch.ones(length, 1))) for _ in range(times)]  # noqa: E731
    call(1, 3), call(2, 3), call(1), call(3, 3)
    assert len(recording.recordings) == 2 and len(runs) == 6
    call(1), call(3)
    assert len(runs) == 6
    call(2, 3)  # as new as the first time
    assert len(runs) == 8


def test_more_kinds_than_are_kept_are_not_recorded_each_time(monkeypatch):
    """To record takes longer than to decide anew."""
    monkeypatch.setattr(recording, "MOST", 4)
    monkeypatch.setattr(recording, "RECORDED", 8)
    made = []
    monkeypatch.setattr(recording.Recorder, "finish", lambda self, found: made.append(found) or (lambda *t: found))
    launcher, _ = playing(lambda r: r.x + 1)
    for _ in range(20):
        for length in range(8):
            launcher(request(torch.ones(length, 1)))
    assert len(made) <= 20 * 8 // 8
    for length in range(100):  # passes that come once leave little
        launcher(request(torch.ones(length, 1)))
    assert len(recording._seen) <= 16 and len(recording.recordings) == 4


def test_a_pass_that_cannot_be_recorded_is_tried_once(monkeypatch):
    made = []
    finish = recording.Recorder.finish
    monkeypatch.setattr(recording.Recorder, "finish", lambda self, found: made.append(found) or finish(self, found))
    launcher, runs = playing(lambda r: r.x * r.x.sum().item())
    for _ in range(9):
        launcher(request(torch.ones(1, 1)))
    assert len(made) == 1 and len(runs) == 9


def test_what_is_forgotten_meanwhile_is_not_kept():
    """Another thread may change tiles while a pass is recorded with the old ones."""
    launcher, runs = playing(lambda r: (forgets and recording.forget(), r.x + 1)[1])
    x, forgets = torch.ones(1, 1), False
    launcher(request(x))
    forgets = True
    launcher(request(x))
    assert not recording.recordings and len(runs) == 2


def test_a_full_table_serves_threads(monkeypatch):
    monkeypatch.setattr(recording, "MOST", 2)
    launcher, _ = playing(lambda r: r.x + 1)
    failed = []

    def work(first: int) -> None:
        try:
            for n in range(400):
                length = 1 + (first + n // 3) % 6
                assert launcher(request(torch.ones(length, 1))).shape == (length, 1)
                if n % 50 == 0:
                    recording.forget()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed and len(recording.recordings) <= 2


def test_nothing_is_played_inside_deciding_anew():
    launcher, runs = playing(lambda r: r.x + 1)
    x = torch.ones(1, 1)
    for _ in range(3):
        launcher(request(x))
    with recording.deciding_anew():
        launcher(request(x))
    assert len(runs) == 3
    launcher(request(x))
    assert len(runs) == 3


def test_blocks_of_deciding_anew_may_overlap():
    launcher, runs = playing(lambda r: r.x + 1)
    x, first, second = torch.ones(1, 1), recording.deciding_anew(), recording.deciding_anew()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    for _ in range(3):
        launcher(request(x))
    second.__exit__(None, None, None)
    assert len(runs) == 3
    for _ in range(3):
        launcher(request(x))
    assert len(runs) == 5


def test_threads_record_apart():
    barrier = threading.Barrier(2, timeout=60)

    def function(r):
        out = r.x + 1
        barrier.wait()
        return out * 2

    launcher, _ = playing(function)

    def work(n):
        for k in range(3):
            found = launcher(request(torch.full((n + 1, 1), float(k))))
            results[n].append(found.flatten().tolist() == [2.0 * (k + 1)] * (n + 1))

    results = [[], []]
    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [[True] * 3] * 2 and len(recording.recordings) == 2
