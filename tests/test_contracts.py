"""What is written down in more than one language says the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flashpair import formulas, terms

ROOT = Path(__file__).resolve().parents[1]
MIRRORED = ("Similarity", "Score", "Mask", "Reduction", "Axis", "Combine", "Guide")


@pytest.mark.parametrize("name", MIRRORED)
def test_enums_have_one_order_in_python_and_cpp(name):
    text = (ROOT / "csrc/options.h").read_text()
    members = re.search(rf"enum class {name} : int {{([^}}]*)}}", text).group(1)
    assert [m.strip().upper() for m in members.split(",")] == [m.name for m in getattr(terms, name)]
    assert [int(m) for m in getattr(terms, name)] == list(range(len(getattr(terms, name))))


def test_slots_of_reductions_agree():
    """How many vectors a reduction keeps: terms.py and reductions.h."""
    expected = [r.slots for r in terms.Reduction]
    header = (ROOT / "csrc/reductions.h").read_text()
    body = re.search(r"int reduction_slots\(Reduction reduction\) {(.*?)\n}", header, re.DOTALL).group(1)
    by_name = {m[0].upper(): int(m[1]) for m in re.findall(r"case Reduction::(\w+):\s*return (\d+);", body)}
    assert [by_name[r.name] for r in terms.Reduction] == expected


def test_formulas_have_one_order():
    """Numbers of formulas and averages that cross to C++ and to Triton."""
    header = (ROOT / "csrc/formulas_cpu.h").read_text()
    for kind, names in (("Formula", list(formulas.FORMULAS)), ("Average", [a.name.lower() for a in formulas.Average])):
        listed = re.search(rf"enum class {kind} {{([^}}]*)}}", header).group(1)
        assert [name.strip() for name in listed.split(",")] == names
    pytest.importorskip("triton")
    from flashpair.kernels import formulas as kernels
    from flashpair.kernels.launch import _OF_ANCHORS, _OF_PAIRS

    assert [kernels.SUM.value, kernels.MEAN.value, kernels.ABOVE_ZERO.value] == list(formulas.Average)
    assert {"mean_gap", "mean_gap_of_both", *_OF_ANCHORS, *_OF_PAIRS} == set(formulas.FORMULAS)
    assert set(_OF_ANCHORS) == {name for name, formula in formulas.FORMULAS.items() if formula.anchors}
