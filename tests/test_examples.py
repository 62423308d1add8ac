"""The examples do what they say, in a few steps."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_faces_learns_to_verify_what_it_never_saw():
    for module in ("sklearn", "tqdm"):
        pytest.importorskip(module)
    faces = load("faces")
    images = faces.load_images()
    generator = torch.Generator().manual_seed(2)
    unseen = images[faces.IDENTITIES :]
    views = faces.view(unseen, generator), faces.view(unseen, generator)
    model, curve = faces.train(images[: faces.IDENTITIES], 80)
    raw, learned = faces.verify(None, *views).scores, faces.verify(model, *views).scores
    assert curve[-1] < 0.8 * curve[0]
    assert learned["AUC"] > raw["AUC"] + 0.1
    assert learned["TAR at FAR 1 %"] > raw["TAR at FAR 1 %"] + 0.1


def test_the_capacity_table_is_its_arithmetic():
    command = [sys.executable, str(EXAMPLES / "faces.py"), "--capacity", "--batch", "1024", "--optimizer", "sgd"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row = next(line for line in done.stdout.splitlines() if line.startswith("   8 GiB")).split()[2:]
    free = 8 * 2**30 - 256 * 2**20
    bytes_of = (4 * (3 * 512 + 4 * 1024), 4 * 2 * 512, 4 * 512)
    assert [float(cell) for cell in row] == [round(free / each / 1e6, 2) for each in bytes_of]


def towers_here(steps: int, state: dict | None) -> dict:
    import torch.distributed as dist

    run = load("two_towers").Run(dist.group.WORLD)
    if state is not None:
        run.load(state)
    run.train(*sys.modules["two_towers"].halves(), steps, "")
    return run.state()


def test_towers_follow_one_process_and_resume_on_another_number_of_ranks(pools):
    for module in ("sklearn", "tqdm"):
        pytest.importorskip(module)
    towers = load("two_towers")
    upper, lower = towers.halves()
    alone = towers.Run()
    alone.train(upper, lower, 8, "")
    state = None
    for ranks, steps in ((2, 4), (3, 8)):
        state = pools(ranks).values(towers_here, steps, state)[0]
    torch.testing.assert_close(state["curve"], alone.curve, rtol=1e-9, atol=0)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(state["model"][name], value, rtol=1e-6, atol=1e-9)
    assert alone.curve[-1] < 0.9 * alone.curve[0]


def test_labels_and_angles_are_learned():
    for module in ("sklearn", "tqdm"):
        pytest.importorskip(module)
    labels = load("labels")
    pixels, learned, curve = labels.several_labels(15)
    assert learned > pixels + 0.01 and curve[-1] < curve[0]
    pixels, learned, curve = labels.an_angle(15)
    assert learned < 0.9 * pixels and curve[-1] < curve[0]
    upright = torch.zeros(2, 1, 8, 8)
    upright[:, 0, :, 3:5] = 1
    quarter = labels.turned(upright, torch.tensor([0.0, 90.0]))
    assert torch.allclose(quarter[0], upright[0], atol=1e-6)
    assert torch.allclose(quarter[1, 0], upright[1, 0].T, atol=1e-5)


SOURCE = '''
class Rectangle:
    """A box on the plane, drawn."""

    def set_bounds(self):
        """Set the Rectangle to left,
        bottom and set_bounds.

        More.
        """

    def _hidden(self):
        """Nobody asks for it."""

def box():
    """A box on the PLANE, drawn."""

def brief():
    """Two words."""

async def readHTTP2():
    """Read what the server says."""
'''


def test_docstrings_and_their_names():
    docstrings = load("docstrings")
    found = docstrings.entries([("a.py", SOURCE), ("b.py", SOURCE), ("c.py", "def {{ template }}")])
    assert found == [
        ("a.py", ["rectangle"], ["a", "box", "on", "the", "plane", "drawn"]),
        ("a.py", ["rectangle", "set", "bounds"], ["set", "the", "to", "left", "bottom", "and"]),
        ("a.py", ["read", "http", "2"], ["read", "what", "the", "server", "says"]),
    ]
    bags = docstrings.Bags([torch.tensor([3]), torch.tensor([], dtype=torch.long), torch.tensor([1, 2])])
    values, begin = bags.take(torch.tensor([2, 1, 0, 2]))
    assert (values.tolist(), begin.tolist()) == ([1, 2, 3, 1, 2], [0, 2, 2, 3])


def test_towers_of_docstrings_learn(monkeypatch):
    for module in ("sklearn", "tqdm"):
        pytest.importorskip(module)
    docstrings = load("docstrings")
    for name, value in (("BUCKETS", 1 << 12), ("FEATURES", 64), ("WIDTH", 64)):
        monkeypatch.setattr(docstrings, name, value)
    sources = docstrings.files(())[:60]
    seen, unseen = docstrings.split(docstrings.entries((name, path.read_bytes()) for name, path in sources))
    assert seen and unseen and not {e.file for e in seen} & {e.file for e in unseen}
    model, curve = docstrings.train(seen, 12)
    assert curve[-1] < 0.8 * curve[0]
    random, plain = docstrings.chance(len(unseen)), docstrings.tf_idf(seen, unseen)
    found = docstrings.learned(model, unseen)
    assert found.mrr > 3 * random.mrr and plain.recall_1 <= plain.recall_10 <= 1
