"""A pass that comes again is played from a recording: its operators and launches, without what decided on them.

What a GPU backend does depends on what its arguments look like, never on their elements: nothing waits for the device.
So a pass whose arguments look like earlier ones starts the same operators and kernels in the same order, and deciding
again on panels, tiles and programs would take the host several times as long as starting them. To record a pass costs
ten times what playing it saves, so it is recorded when it comes for the `RECORDED`th time, and played from then on.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .request import Request

#: The time that a pass that looks alike is recorded.
RECORDED = 8
#: Recordings that are kept, those that were played last; a batch of another length is another pass.
MOST = 1 << 10
#: Calls of the longest one. Larger problems have so many panels that the device is behind the host anyway.
LONGEST = 1 << 10
#: Methods that tell what a tensor looks like, as properties do.
_LOOKS = {
    "__len__", "data_ptr", "dim", "element_size", "get_device", "is_contiguous", "is_floating_point", "numel", "size",
    "stride",
}  # fmt: skip
#: Functions without an effect of their own: left out of a recording that does not use their result.
_PURE = {
    "__get__", "__getitem__", "contiguous", "detach", "empty", "empty_like", "expand", "expand_as", "new_empty",
    "reshape", "select", "split", "t", "to", "unbind", "view",
}  # fmt: skip
#: Functions whose results have shapes that depend on elements.
_SHAPED_BY_ELEMENTS = {
    "argwhere", "masked_select", "nonzero", "repeat_interleave", "unique", "unique_consecutive", "unique_dim",
}  # fmt: skip

#: Recordings by what passes look like, the one that was played last at the end.
recordings: OrderedDict[tuple, Callable] = OrderedDict()
_seen: dict[tuple, int] = {}  # how often a pass without one came; 0: it cannot be recorded
_lock = threading.Lock()  # around every change of these
_times_forgotten = 0
_deciding_anew = 0  # blocks that are open
_now = threading.local()  # the recorder of this thread


def forget() -> None:
    """Forget all recordings: something changed that decides on kernels and that arguments do not show."""
    global _times_forgotten
    with _lock:
        _times_forgotten += 1
        recordings.clear()
        _seen.clear()


@contextlib.contextmanager
def deciding_anew() -> Iterator[None]:
    """Inside the block no pass is recorded or played, in any thread."""
    global _deciding_anew
    with _lock:
        _deciding_anew += 1
    try:
        yield
    finally:
        with _lock:
            _deciding_anew -= 1


class Recorder(TorchFunctionMode):
    """Writes down, as the lines of a function, the calls that are made inside of it."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.reason: str | None = None  # why there can be no recording
        self.calls: list[tuple[str, list[str], set[str], bool]] = []  # text, results, what it reads, whether it is kept
        self.names: dict[int, tuple[weakref.ref, str]] = {}  # of tensors, by identity while they are alive
        self.count = 0  # of names
        self.constants: dict[str, Any] = {}
        self.arguments = [self._new_name(tensor) for tensor in inputs]

    def _new_name(self, tensor: Tensor) -> str:
        name = f"t{self.count}"
        self.count += 1
        self.names[id(tensor)] = weakref.ref(tensor), name
        return name

    def _name(self, tensor: Tensor) -> str | None:
        found = self.names.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _text(self, value: Any, read: set[str]) -> str:
        """Source of a value; `read` collects the tensors in it."""
        if isinstance(value, Tensor):
            name = self._name(value)
            if name is None:
                self.reason = self.reason or "it reads a tensor that is neither an argument nor its own"
                return "None"
            read.add(name)
            return name
        if isinstance(value, (tuple, list)):
            parts = "".join(self._text(v, read) + ", " for v in value)
            return f"({parts})" if isinstance(value, tuple) else f"[{parts}]"
        if isinstance(value, slice) and any(isinstance(v, Tensor) for v in (value.start, value.stop, value.step)):
            self.reason = self.reason or "a slice is given by tensors"
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        return self._constant(value)

    def add(self, call: Callable, args: tuple, kwargs: dict, found: Any, kept: bool = True) -> None:
        """A call that returned `found`; without `kept` it is left out where its result is not read."""
        read: set[str] = set()
        texts = [self._text(v, read) for v in args] + [f"{k}={self._text(v, read)}" for k, v in kwargs.items()]
        many = isinstance(found, (tuple, list))
        results = [self._name(t) or self._new_name(t) for t in (found if many else (found,)) if t is not None]
        assigned = f"{', '.join(results)}{',' * many} = " if results else ""
        self.calls.append((f"{assigned}{self._constant(call)}({', '.join(texts)})", results, read, kept))
        if len(self.calls) > LONGEST:
            self.reason = self.reason or f"it makes more than {LONGEST} calls"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        if self.reason is not None:
            return found
        name, pure = function.__name__, function.__name__ in _PURE and "out" not in kwargs
        if name in _SHAPED_BY_ELEMENTS or (name == "__getitem__" and _asks_elements(args[1])):
            self.reason = f"{name} gives shapes by what tensors hold"
            return found
        results = found if isinstance(found, (tuple, list)) else (found,)
        if found is None or all(isinstance(result, Tensor) for result in results):
            if not (pure and isinstance(found, Tensor) and self._name(found)):  # nothing to do, as for `contiguous`
                self.add(function, args, kwargs, found, kept=not pure)
        elif name != "__get__" and name not in _LOOKS:
            self.reason = f"{name} reads what tensors hold"
        return found

    def source(self, found: Any) -> str:
        """The recording: a function of the inputs that returns `found`."""
        needed: set[str] = set()
        returned = self._text(found, needed)
        lines, used = [], set(needed)
        for text, results, read, kept in reversed(self.calls):
            if kept or needed.intersection(results):
                needed |= read
                last = sorted(read.union(results).difference(used))  # memory is given back after its last use
                lines.append(text + (f"; {' = '.join(last)} = None" if last else ""))
                used |= read.union(results)
        lines = [*reversed(lines), f"return {returned}"]
        return "\n    ".join([f"def play({', '.join(self.arguments)}):", *lines])

    def finish(self, found: Any) -> Callable | None:
        source = self.source(found)
        if self.reason is not None:
            return None
        names = dict(self.constants)
        exec(compile(source, f"<recording of {len(self.calls)} calls>", "exec"), names)
        return names["play"]


def _asks_elements(index: Any) -> bool:
    """Whether an index is a mask."""
    if isinstance(index, (tuple, list)):
        return any(map(_asks_elements, index))
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def note(call: Callable, args: tuple) -> None:
    """Tell the recording that is being made, if one is, of a call without results that PyTorch does not see."""
    recorder = getattr(_now, "recorder", None)
    if recorder is not None:
        recorder.add(call, args, {}, None)


def _looks(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16


def _key(launcher: Callable, request: Request, args: tuple) -> tuple[list[Tensor], tuple]:
    """The tensors of a call, and what they and everything else in it look like."""
    given = (request.x, request.y, request.labels, request.ref_labels, request.pair_mask, request.exclude)
    tensors = [t for t in (*given, *request.params, *args) if isinstance(t, Tensor)]
    values = [a for a in args if not isinstance(a, Tensor)]
    for extreme in request.extremes:
        values += [extreme.mask, extreme.largest, extreme.k]
        for bound in (extreme.above, extreme.below):
            (tensors if isinstance(bound, Tensor) else values).append(bound)
            values.append(isinstance(bound, Tensor))
    same = list(map(id, tensors))  # one tensor in two places may have been read from either
    places = map(same.index, same)
    looks = map(_looks, tensors)
    return tensors, (
        launcher, request.x.device, request.structure, request.max_workspace_bytes, *values, *looks, *places,
    )  # fmt: skip


def recorded(launcher: Callable) -> Callable:
    """Play a backend's pass (request, further tensors and hashable values) from a recording where there is one.

    What holds for a thread, as its current device and stream, is not recorded: a pass may read it, but not set it.
    """

    @functools.wraps(launcher)
    def run(request: Request, *args):
        if _deciding_anew or getattr(_now, "recorder", None) is not None:  # part of another pass
            return launcher(request, *args)
        tensors, key = _key(launcher, request, args)
        play = recordings.get(key)
        if play is not None:
            with _lock:
                if key in recordings:  # not forgotten since
                    recordings.move_to_end(key)
            return play(*tensors)
        if not _is_to_be_recorded(key):
            return launcher(request, *args)
        before = _times_forgotten
        recorder = _now.recorder = Recorder(tensors)
        try:
            with recorder:
                found = launcher(request, *args)
        except BaseException:
            with _lock:
                _seen.pop(key, None)
            raise
        finally:
            _now.recorder = None
        play = recorder.finish(found)
        if play is not None:
            _keep(key, play, before)
        return found

    return run


def _is_to_be_recorded(key: tuple) -> bool:
    """Count a pass; whether its time has come. What could not be recorded is not tried again."""
    with _lock:
        times = _seen.get(key, 1)
        if times == RECORDED:
            _seen[key] = 0
            return True
        if times:
            while len(_seen) >= 4 * MOST:
                _seen.pop(next(iter(_seen)))
            _seen[key] = times + 1
        return False


def _keep(key: tuple, play: Callable, times_forgotten: int) -> None:
    """Keep a recording, if nothing was forgotten since it was begun; where there are too many the oldest goes."""
    with _lock:
        if times_forgotten != _times_forgotten:
            return
        _seen.pop(key, None)
        while len(recordings) >= MOST:
            recordings.popitem(last=False)
        recordings[key] = play
