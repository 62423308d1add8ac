"""The README's code runs and names what exists; so do the examples in public docstrings."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import flashpair

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
HEADS = (ROOT / "docs" / "heads.md").read_text()
LOSSES = "".join((ROOT / "docs" / name).read_text() for name in ("losses.md", "contrastive.md"))
BLOCKS = re.findall(r"^```python\n(.*?)^```", README + HEADS + LOSSES, re.DOTALL | re.MULTILINE)


def with_doctests() -> list[str]:
    """Modules of the package whose source holds an example; found by text, so that nothing is imported to collect."""
    folders = {"flashpair": ROOT / "python" / "flashpair", "flashpair.kernels": ROOT / "kernels"}
    found = []
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            if ">>> " in path.read_text():
                parts = [name, *path.relative_to(folder).with_suffix("").parts]
                found.append(".".join(parts).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_code_block_runs(block):
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_own_loss_is_complete_and_short():
    (block,) = (b for b in BLOCKS if "BinomialDevianceLoss(nn.Module)" in b)
    (own,) = (n for n in ast.parse(block).body if isinstance(n, ast.ClassDef))
    assert own.end_lineno - own.lineno + 1 <= 30


def test_every_public_loss_and_miner_is_named():
    for package in (flashpair.losses, flashpair.miners):
        public = [n for n in package.__all__ if n.endswith(("Loss", "Miner", "Memory", "AsTriplets"))]
        assert public
        assert [n for n in public if f"`{n}`" not in LOSSES] == []


def test_every_name_in_the_loss_tables_exists():
    names = re.findall(r"`([A-Z]\w+(?:Loss|Memory|Miner|Reducer|Distance|Similarity))`", README + LOSSES)
    assert names
    known = (*flashpair.losses.__all__, *flashpair.miners.__all__, *flashpair.heads.__all__, "DoNothingReducer")
    assert [n for n in names if n not in known] == []


def test_every_public_head_is_in_its_table():
    public = [n for n in flashpair.heads.__all__ if not re.search(rf"\b{n}\b", HEADS)]
    assert public == []
    named = set(re.findall(r"`([A-Z]\w+)(?:\(|`)", HEADS)) - {"B"}
    assert [n for n in sorted(named) if not hasattr(flashpair.heads, n)] == []


def test_every_file_the_readme_links_is_there():
    count = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
        assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == [], page
        count += len(links)
    assert count >= 10


def test_the_cost_table_is_what_its_command_prints(capsys):
    from flashpair.distributed import cost

    text = (ROOT / "docs" / "distributed.md").read_text()
    command, table = re.search(
        r"<!-- python -m flashpair.distributed.cost (.*?) -->\n(.*?)\n\n", text, re.DOTALL
    ).groups()
    cost.main(command.split())
    assert capsys.readouterr().out.strip() == table


def test_losses_that_gather_in_any_case_are_named():
    from group_cases import WHOLE

    text = (ROOT / "docs" / "distributed.md").read_text()
    assert [n for n in WHOLE if f"`{n}`" not in text] == []


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("name", with_doctests())
def test_docstring_examples(name):
    if name.startswith("flashpair.kernels"):
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    torch.manual_seed(0)
    failed, tried = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried > 0
    assert failed == 0
