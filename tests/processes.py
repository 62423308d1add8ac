"""Processes that share a gloo group, kept for all tests of a module: `Pool(4).run(function, ...)` on every rank.

A function must be importable by name; what it raises comes back as an exception object in its place.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import tempfile
import traceback

import torch
import torch.multiprocessing as mp

TIMEOUT_S = 60


def _serve(rank: int, size: int, path: str, pipe, timeout_s: float, places: list[str]) -> None:
    sys.path[:0] = places
    torch.set_num_threads(1)
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout_s)
    )
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)  # without waiting for the group's threads
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            error.add_note(traceback.format_exc())
            result = error
        try:
            pipe.send(result)
        except Exception as error:  # what cannot be pickled
            pipe.send(RuntimeError(f"{type(result).__name__}: {result}; {error}"))


class Pool:
    """`size` ranks of one group."""

    def __init__(self, size: int, timeout_s: float = TIMEOUT_S) -> None:
        context = mp.get_context("spawn")
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = (rank, size, os.path.join(self.folder.name, "store"), theirs, timeout_s, [os.path.dirname(__file__)])
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args, **kwargs) -> list:
        """What the function returned on each rank, or raised; None where a rank is gone."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send((function, args, kwargs))
        results = []
        for pipe in self.pipes:
            try:
                if not pipe.poll(2 * TIMEOUT_S):
                    raise TimeoutError("a rank does not answer")
                results.append(pipe.recv())
            except (EOFError, OSError):
                results.append(None)
        return results

    def values(self, function, *args, **kwargs) -> list:
        """As `run`; raises what a rank raised."""
        results = self.run(function, *args, **kwargs)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()
