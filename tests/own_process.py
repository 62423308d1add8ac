"""A test file run once more under other environment variables, beside the tests that come before its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

_started: dict[str, tuple[subprocess.Popen, Path]] = {}


def start(file: str, **environment: str) -> None:
    """Begin; `finish` waits for it."""
    if file in _started:
        return
    out = Path(tempfile.mkstemp(suffix=".log")[1])
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "--tb=short", "-p", "no:cacheprovider", file]
    with out.open("w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=Path(file).parent, stdout=log, stderr=subprocess.STDOUT
        )
    _started[file] = process, out


def finish(file: str) -> None:
    """Wait, and fail where it failed."""
    process, out = _started.pop(file)
    try:
        status, said = process.wait(), out.read_text()
    finally:
        out.unlink()
    assert status == 0, said[-10000:]
    assert " passed" in said


def stop() -> None:
    """End what nobody waits for."""
    for process, out in _started.values():
        process.kill()
        out.unlink(missing_ok=True)
    _started.clear()
