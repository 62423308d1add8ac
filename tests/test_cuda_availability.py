"""What the CUDA backend says where it cannot run: one line that names the reason and what to do. No GPU is needed."""

from __future__ import annotations

import types

import pytest
import torch

import flashpair
from flashpair import backend_cuda, dispatch


@pytest.fixture
def not_loaded(monkeypatch):
    """As if nothing had been looked for yet."""
    monkeypatch.delenv("FLASHPAIR_CUDA_LIBRARY", raising=False)
    backend_cuda._load.cache_clear()
    yield
    backend_cuda._load.cache_clear()


def test_not_built(not_loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(backend_cuda, "__file__", str(tmp_path / "backend_cuda.py"))
    (reason,) = backend_cuda.unavailable()
    assert reason == (
        "the CUDA extension was not built; install CUDA's nvcc and run `FLASHPAIR_BUILD_CUDA=1 pip install "
        "--force-reinstall --no-deps --no-build-isolation flashpair`"
    )
    assert flashpair.backends()["cuda"] == reason


def test_does_not_load(not_loaded, monkeypatch, tmp_path):
    """Built for another torch, or broken."""
    monkeypatch.setattr(backend_cuda, "__file__", str(tmp_path / "backend_cuda.py"))
    (tmp_path / "_CUDA.abi3.so").write_bytes(b"not a library")
    (reason,) = backend_cuda.unavailable()
    assert reason.startswith(f"the CUDA extension _CUDA.abi3.so does not load with torch {torch.__version__} (")
    assert "FLASHPAIR_BUILD_CUDA=1 pip install" in reason


def test_driver_is_too_old(monkeypatch):
    monkeypatch.setattr(backend_cuda, "_load", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = types.SimpleNamespace(versions=lambda: [13000, 12080])
    monkeypatch.setattr(torch.ops, "flashpair_cuda", found, raising=False)
    (reason,) = backend_cuda.unavailable()
    assert reason.startswith("the CUDA extension was built with CUDA 13, the driver serves CUDA 12; update the driver")
    found.versions = lambda: [13000, 13010]
    assert backend_cuda.unavailable() == []


def test_built_from_other_sources(not_loaded, monkeypatch, tmp_path):
    """An old build in place would read a pass wrongly."""
    monkeypatch.setattr(backend_cuda, "__file__", str(tmp_path / "backend_cuda.py"))
    (tmp_path / "_CUDA.abi3.so").touch()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "flashpair_cuda", types.SimpleNamespace(layout=lambda: [1, 2, 3]), raising=False)
    (reason,) = backend_cuda.unavailable()
    assert reason.startswith("the CUDA extension _CUDA.abi3.so was built from another version of flashpair; `FLASHPAIR")


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["80"], 80, True),
        (["80"], 86, True),  # machine code runs on later minor versions
        (["86"], 80, False),
        (["80"], 90, False),
        (["80+PTX"], 90, True),
        (["75", "90+PTX"], 80, False),
        (["75", "90+PTX"], 120, True),
        (["90a"], 90, True),
        (["90a+PTX"], 100, False),  # what is for one architecture alone stays there
        (["100"], 75, False),
    ],
)
def test_gpus_that_the_build_serves(built, capability, runs, monkeypatch):
    monkeypatch.setattr(backend_cuda, "architectures", lambda: built)
    reason = backend_cuda._not_built_for(capability)
    assert (reason == "") == runs
    if not runs:
        arch = f"{capability // 10}.{capability % 10}"
        assert reason.startswith(
            f"the CUDA extension was built for compute capabilities {', '.join(built)}, this GPU has"
        )
        assert f'TORCH_CUDA_ARCH_LIST="{arch}" FLASHPAIR_BUILD_CUDA=1 pip install' in reason


def _embeddings(device: str, dtype: torch.dtype = torch.float32, rows: int = 4, features: int = 8):
    """What `why_not` looks at, on a device that need not exist."""
    return types.SimpleNamespace(device=torch.device(device), dtype=dtype, shape=torch.Size((rows, features)))


@pytest.mark.parametrize(
    ("embeddings", "reason"),
    [
        (_embeddings("cpu"), "embeddings are on cpu; the kernels read cuda tensors"),
        (_embeddings("cuda:0", torch.int8), "embeddings are torch.int8; allowed are torch.float32, torch.float64"),
        (_embeddings("cuda:0", rows=1 << 31), "embeddings have 2147483648 rows; at most 2147483647 are allowed"),
        (_embeddings("cuda:0", features=1 << 21), "embeddings have 2097152 features; at most 1048576 are allowed"),
    ],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)
def test_embeddings_that_it_does_not_serve(embeddings, reason, monkeypatch):
    monkeypatch.setattr(backend_cuda, "emulated", lambda: False)
    monkeypatch.setattr(backend_cuda, "_capability", lambda index: 90)
    monkeypatch.setattr(backend_cuda, "architectures", lambda: ["90"])
    (found,) = backend_cuda.why_not(embeddings)
    assert found.startswith(reason)


def test_bfloat16_needs_its_products(monkeypatch):
    monkeypatch.setattr(backend_cuda, "emulated", lambda: False)
    monkeypatch.setattr(backend_cuda, "_capability", lambda index: 75)
    monkeypatch.setattr(backend_cuda, "architectures", lambda: ["75"])
    (reason,) = backend_cuda.why_not(_embeddings("cuda:0", torch.bfloat16))
    assert reason.startswith("bfloat16 products need compute capability 8.0")
    assert backend_cuda.why_not(_embeddings("cuda:0", torch.float16)) == []


@pytest.mark.parametrize(
    ("unusable", "dtype", "chosen"),
    [
        ((), torch.bfloat16, "triton"),
        ((), torch.float64, "cuda"),  # Triton's kernels do not serve it
        (("triton",), torch.bfloat16, "cuda"),
    ],
)
def test_choice_on_a_gpu(unusable, dtype, chosen, monkeypatch):
    """Triton where it is usable, the CUDA kernels otherwise."""
    monkeypatch.delenv("FLASHPAIR_BACKEND", raising=False)
    monkeypatch.setattr(backend_cuda, "_capability", lambda index: 90)
    monkeypatch.setattr(backend_cuda, "architectures", lambda: ["90"])
    monkeypatch.setattr(backend_cuda, "emulated", lambda: False)
    for name in ("triton", "cuda"):
        reasons = ["not here"] if name in unusable else []
        monkeypatch.setattr(dispatch.named(name).load(), "unavailable", lambda reasons=reasons: reasons)
    assert dispatch.choose(_embeddings("cuda:0", dtype), 1 << 40) == chosen


@pytest.mark.parametrize(
    ("capability", "features", "name", "fused"),
    [
        (75, 64, "auto", False),  # no asynchronous copies, no bfloat16 products
        (75, 64, "fused", False),
        (80, 1024, "auto", True),
        (90, 512, "auto", True),
        (90, 1024, "auto", False),
        (90, 1024, "fused", True),
        (90, 512, "simple", False),
        (120, 512, "auto", True),
    ],
)
def test_choice_of_form(capability, features, name, fused, monkeypatch):
    monkeypatch.setattr(backend_cuda, "_capability", lambda index: capability)
    monkeypatch.setattr(backend_cuda, "emulated", lambda: False)
    with backend_cuda.form(name):
        assert backend_cuda._fused(_embeddings("cuda:0", torch.bfloat16, features=features)) == fused
        assert not backend_cuda._fused(_embeddings("cuda:0", torch.float32, features=features))


def test_form_is_checked():
    with pytest.raises(ValueError, match=r"form must be .*; got 'other'"), backend_cuda.form("other"):
        pass
