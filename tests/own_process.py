"""Test files run once more in a process of their own, under other environment variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(*arguments: str, **environment: str) -> None:
    """`pytest arguments`, which must pass, with one thread and these variables."""
    command = [sys.executable, "-m", "pytest", "--no-header", "--tb=short", "-p", "no:cacheprovider", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=variables, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
