"""What setup.py defines, without building anything."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
READ = ("FLASHPAIR_BUILD_NATIVE", "FLASHPAIR_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST")


def load() -> dict:
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", ["setup.py", "egg_info"]),
        mock.patch("setuptools.setup"),
    ):
        for name in READ:
            os.environ.pop(name, None)
        return runpy.run_path(str(ROOT / "setup.py"))
