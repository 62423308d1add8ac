"""Bad input: a clear error before any work, naming the argument, its value and what is allowed."""

from __future__ import annotations

import math
import re

import dense_backend
import pytest
import torch

import flashpair
from flashpair import (
    Axis,
    Extreme,
    Mask,
    Reduction,
    Score,
    Similarity,
    Term,
    checks,
    mine,
    pair_reduce,
    pair_similarity,
    pair_sum,
    use_backend,
)

SUM = Reduction.SUM
X, Y, LABELS = torch.ones(3, 2), torch.ones(4, 2), torch.zeros(3, dtype=torch.int64)
REF_LABELS = torch.zeros(4, dtype=torch.int64)
NOT_A_TERM = "SUM"


@pytest.fixture(autouse=True)
def _watched():
    """The backend must not be reached, whatever is wrong."""
    with use_backend("dense"):
        yield
    assert dense_backend.calls == []


def _index(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# What is wrong: arguments beside x and the terms, the error, and what its message must contain.
SHARED = {
    "x is a list": (dict(x=[[1.0]]), TypeError, "x must be a tensor; got list"),
    "x is a vector": (dict(x=torch.ones(3)), ValueError, "x must have shape (rows, features); got (3,)"),
    "x is 3-D": (dict(x=torch.ones(1, 2, 3)), ValueError, "x must have shape (rows, features); got (1, 2, 3)"),
    "x is int": (dict(x=torch.ones(3, 2).long()), TypeError, "x must be one of torch.float32"),
    "x is complex": (dict(x=torch.ones(3, 2) * 1j), TypeError, "got torch.complex64"),
    "y is a vector": (dict(y=torch.ones(2)), ValueError, "y must have shape (rows, features); got (2,)"),
    "features differ": (dict(y=torch.ones(4, 5)), ValueError, "x and y must have equal features; got 2 and 5"),
    "dtypes differ": (
        dict(y=Y.double()),
        TypeError,
        "x and y must have one dtype; got torch.float32 and torch.float64",
    ),
    "devices differ": (dict(y=Y.to("meta")), ValueError, "y must be on the device of x, cpu; got meta"),
    "labels on another device": (dict(labels=LABELS.to("meta")), ValueError, "labels must be on the device of x"),
    "labels is a list": (dict(labels=[0, 1, 2]), TypeError, "labels must be an int64 tensor; got list"),
    "labels are floats": (dict(labels=torch.zeros(3)), TypeError, "labels must be int64; got torch.float32"),
    "labels are int32": (dict(labels=LABELS.int()), TypeError, "labels must be int64; got torch.int32"),
    "labels too short": (dict(labels=LABELS[:2]), ValueError, "labels must have shape (3,), one per row; got (2,)"),
    "labels 2-D": (dict(labels=LABELS[:, None]), ValueError, "labels must have shape (3,), one per row; got (3, 1)"),
    "labels without ref_labels": (dict(y=Y, labels=LABELS), ValueError, "ref_labels is missing for y"),
    "ref_labels without labels": (dict(y=Y, ref_labels=REF_LABELS), ValueError, "ref_labels was given without labels"),
    "ref_labels without y": (dict(labels=LABELS, ref_labels=LABELS), ValueError, "ref_labels was given without y"),
    "ref_labels too short": (
        dict(y=Y, labels=LABELS, ref_labels=LABELS),
        ValueError,
        "ref_labels must have shape (4,), one per row; got (3,)",
    ),
    "pair_mask is a list": (dict(pair_mask=[[True]]), TypeError, "pair_mask must be a bool tensor; got list"),
    "pair_mask is float": (dict(pair_mask=torch.ones(3, 3)), TypeError, "pair_mask must be bool; got torch.float32"),
    "pair_mask has another shape": (
        dict(y=Y, pair_mask=torch.ones(3, 3) > 0),
        ValueError,
        "pair_mask must have shape (3, 4); got (3, 3)",
    ),
    "exclude is int32": (dict(exclude=LABELS.int()), TypeError, "exclude must be a 1-D int64 tensor; got torch.int32"),
    "exclude too short": (dict(exclude=LABELS[:2]), ValueError, "exclude must have length 3; got 2"),
    "exclude_self with y": (dict(y=Y, exclude_self=True), ValueError, "exclude_self=True needs y=None"),
    "similarity is a string": (
        dict(similarity="cosine"),
        TypeError,
        "similarity must be a flashpair.Similarity; got 'cosine'",
    ),
    "similarity is a number": (dict(similarity=1), TypeError, "similarity must be a flashpair.Similarity; got 1"),
    "precision is a string": (dict(precision="tf32"), TypeError, "precision must be a flashpair.Precision; got 'tf32'"),
    "workspace too small": (
        dict(max_workspace_bytes=1000),
        ValueError,
        "max_workspace_bytes must be at least 1048576, one tile row; got 1000",
    ),
    "workspace negative": (dict(max_workspace_bytes=-1), ValueError, "max_workspace_bytes must be at least"),
    "workspace is a float": (
        dict(max_workspace_bytes=2.0**21),
        TypeError,
        "max_workspace_bytes must be an integer; got float",
    ),
    "workspace is a bool": (dict(max_workspace_bytes=True), TypeError, "max_workspace_bytes must be an integer"),
}


@pytest.mark.parametrize("primitive", ["pair_reduce", "pair_sum", "mine"])
@pytest.mark.parametrize("case", SHARED)
def test_shared_arguments(case, primitive):
    arguments, error, message = SHARED[case]
    arguments = {"x": X, **arguments}
    run = {
        "pair_reduce": lambda: pair_reduce(terms=[Term(SUM)], **arguments),
        "pair_sum": lambda: pair_sum(terms=[Term(SUM)], **arguments),
        "mine": lambda: mine(extremes=[Extreme()], **arguments),
    }[primitive]
    with pytest.raises(error, match=re.escape(message)):
        run()


def _term(**options) -> dict:
    return {"terms": [Term(SUM), Term(SUM, **options)]}


TERMS = {
    "no terms": ({"terms": []}, ValueError, "terms must hold at least one Term; got none"),
    "not a term": ({"terms": [NOT_A_TERM]}, TypeError, "terms[0] must be a flashpair.Term; got str"),
    "reduction": ({"terms": [Term(0)]}, TypeError, "terms[0].reduction must be a flashpair.Reduction; got 0"),
    "score": (_term(score="hinge"), TypeError, "terms[1].score must be a flashpair.Score; got 'hinge'"),
    "mask": (_term(mask=1), TypeError, "terms[1].mask must be a flashpair.Mask; got 1"),
    "axis": (_term(axis=0), TypeError, "terms[1].axis must be a flashpair.Axis; got 0"),
    "combine": (_term(combine="add"), TypeError, "terms[1].combine must be a flashpair.Combine; got 'add'"),
    "mask without labels": (_term(mask=Mask.SAME), ValueError, "terms[1].mask is SAME, which needs labels"),
    "mask without pair_mask": (_term(mask=Mask.NOT_GIVEN), ValueError, "is NOT_GIVEN, which needs pair_mask"),
    "scale NaN": (_term(scale=math.nan), ValueError, "terms[1].scale must not be NaN"),
    "offset NaN": (_term(offset=math.nan), ValueError, "terms[1].offset must not be NaN"),
    "above NaN": (_term(above=math.nan), ValueError, "terms[1].above must not be NaN"),
    "constant NaN": (_term(constant=math.nan), ValueError, "terms[1].constant must not be NaN"),
    "constant of a softcap": (
        _term(score=Score.SOFTCAP),
        ValueError,
        "terms[1].constant must be positive and finite (in float32) for SOFTCAP; got 0.0",
    ),
    "constant of a softcap negative": (_term(score=Score.SOFTCAP, constant=-1.0), ValueError, "SOFTCAP; got -1.0"),
    "constant of a softcap infinite": (_term(score=Score.SOFTCAP, constant=math.inf), ValueError, "SOFTCAP; got inf"),
    "constant of a softcap too large": (_term(score=Score.SOFTCAP, constant=1e39), ValueError, "SOFTCAP; got 1e+39"),
    "constant of a softcap too small": (_term(score=Score.SOFTCAP, constant=1e-39), ValueError, "SOFTCAP; got 1e-39"),
    "constant is a tensor": (
        _term(constant=torch.ones(())),
        TypeError,
        "terms[1].constant must be a number; got Tensor",
    ),
    "scale is None": (_term(scale=None), TypeError, "terms[1].scale must be a number or a tensor; got None"),
    "scale is a string": (_term(scale="1"), TypeError, "terms[1].scale must be a number or a tensor; got str"),
    "scale is a bool": (_term(scale=True), TypeError, "terms[1].scale must be a number or a tensor; got bool"),
    "scale is int": (
        _term(scale=torch.ones(3).long()),
        TypeError,
        "terms[1].scale must be floating point; got torch.int64",
    ),
    "scale has the other side's length": (
        {"y": Y, **_term(scale=torch.ones(4))},
        ValueError,
        "terms[1].scale must be a number, a 0-d tensor or shape (3,); got shape (4,)",
    ),
    "scale of columns has the rows' length": (
        {"y": Y, **_term(scale=torch.ones(3), axis=Axis.COLUMNS)},
        ValueError,
        "terms[1].scale must be a number, a 0-d tensor or shape (4,); got shape (3,)",
    ),
    "scale is 2-D": (_term(scale=torch.ones(3, 1)), ValueError, "got shape (3, 1)"),
    "scale on another device": (
        _term(scale=torch.ones(3, device="meta")),
        ValueError,
        "terms[1].scale must be on cpu; got meta",
    ),
    "threshold too long": (_term(below=torch.ones(5)), ValueError, "terms[1].below must be a number, a 0-d tensor or"),
    "weight is a number": (
        _term(weight=2.0),
        TypeError,
        "terms[1].weight must be None or a tensor of shape (3,); got float",
    ),
    "weight is 0-d": (_term(weight=torch.ones(())), ValueError, "terms[1].weight must be shape (3,); got shape ()"),
    "weight has the owners' length": (
        {"y": Y, **_term(weight=torch.ones(3))},
        ValueError,
        "terms[1].weight must be shape (4,); got shape (3,)",
    ),
    "other_offset too short": (
        {"y": Y, **_term(other_offset=torch.ones(3))},
        ValueError,
        "terms[1].other_offset must be shape (4,); got shape (3,)",
    ),
}


@pytest.mark.parametrize("primitive", [pair_reduce, pair_sum])
@pytest.mark.parametrize("case", TERMS)
def test_terms(case, primitive):
    arguments, error, message = TERMS[case]
    with pytest.raises(error, match=re.escape(message)):
        primitive(X, **arguments)


@pytest.mark.parametrize("reduction", [r for r in Reduction if r != SUM])
def test_pair_sum_takes_sums_only(reduction):
    with pytest.raises(ValueError, match=rf"terms\[1\]\.reduction must be SUM in pair_sum; got {reduction.name}"):
        pair_sum(X, terms=[Term(SUM), Term(reduction)])


EXTREMES = {
    "none": ([], ValueError, "extremes must hold at least one Extreme; got none"),
    "not an extreme": ([Term(SUM)], TypeError, "extremes[0] must be a flashpair.Extreme; got Term"),
    "mask": ([Extreme("all")], TypeError, "extremes[0].mask must be a flashpair.Mask; got 'all'"),
    "mask without labels": ([Extreme(Mask.DIFFERENT)], ValueError, "extremes[0].mask is DIFFERENT, which needs labels"),
    "k is 0": ([Extreme(k=0)], ValueError, "extremes[0].k must be an integer from 1 to 64; got 0"),
    "k is 65": ([Extreme(k=65)], ValueError, "extremes[0].k must be an integer from 1 to 64; got 65"),
    "k is a float": ([Extreme(k=1.0)], ValueError, "extremes[0].k must be an integer from 1 to 64; got 1.0"),
    "k is a bool": ([Extreme(k=True)], ValueError, "extremes[0].k must be an integer from 1 to 64; got True"),
    "k larger than the row": (
        [Extreme(), Extreme(k=4)],
        ValueError,
        "extremes[1].k must be at most the row length 3; got 4",
    ),
    "threshold NaN": ([Extreme(above=math.nan)], ValueError, "extremes[0].above must not be NaN"),
    "threshold too long": (
        [Extreme(below=torch.ones(4))],
        ValueError,
        "extremes[0].below must be a number, a 0-d tensor or",
    ),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_extremes(case):
    extremes, error, message = EXTREMES[case]
    with pytest.raises(error, match=re.escape(message)):
        mine(X, extremes=extremes)


PAIRS = {
    "one tensor": (
        dict(pairs=_index(0, 1)),
        TypeError,
        "pairs must be a tuple (rows, columns) of int64 tensors; got Tensor",
    ),
    "three tensors": (dict(pairs=(_index(0),) * 3), TypeError, "got tuple of length 3"),
    "int32": (
        dict(pairs=(_index(0).int(), _index(0))),
        TypeError,
        "pairs[0] must be a 1-D int64 tensor; got torch.int32",
    ),
    "lengths differ": (dict(pairs=(_index(0), _index(0, 1))), ValueError, "pairs[1] must have length 1; got 2"),
    "another device": (
        dict(pairs=(_index(0), _index(0).to("meta"))),
        ValueError,
        "pairs[1] must be on the device of x",
    ),
    "with pair_mask": (
        dict(pairs=(_index(0),) * 2, pair_mask=torch.ones(3, 3) > 0),
        ValueError,
        "pairs excludes pair_mask",
    ),
    "with exclude": (dict(pairs=(_index(0),) * 2, exclude=LABELS), ValueError, "pairs excludes pair_mask, exclude"),
    "with exclude_self": (dict(pairs=(_index(0),) * 2, exclude_self=True), ValueError, "exclude_self=True"),
    "mask that needs pair_mask": (
        dict(pairs=(_index(0),) * 2, terms=[Term(SUM, mask=Mask.GIVEN)]),
        ValueError,
        "terms[0].mask is GIVEN, which needs pair_mask",
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(case):
    arguments, error, message = PAIRS[case]
    with pytest.raises(error, match=re.escape(message)):
        pair_reduce(X, **{"terms": [Term(SUM)], **arguments})


SIMILARITIES = {
    "x is a vector": (dict(x=X[0]), ValueError, "x must have shape (rows, features); got (2,)"),
    "rows are floats": (
        dict(rows=torch.zeros(2)),
        TypeError,
        "rows must be a 1-D int64 tensor; got torch.float32 (2,)",
    ),
    "columns too long": (dict(columns=_index(0, 1, 1)), ValueError, "columns must have length 2; got 3"),
    "columns are 2-D": (dict(columns=_index(0, 1)[None]), TypeError, "columns must be a 1-D int64 tensor"),
    "similarity": (dict(similarity=0), TypeError, "similarity must be a flashpair.Similarity; got 0"),
    "row too large": (dict(rows=_index(0, 3)), IndexError, "out of"),
    "column negative": (dict(columns=_index(0, -1)), IndexError, "columns must not be negative"),
}


@pytest.mark.parametrize("case", SIMILARITIES)
def test_pair_similarity(case):
    arguments, error, message = SIMILARITIES[case]
    given = {"x": X, "y": Y, "rows": _index(0, 1), "columns": _index(0, 3), "similarity": Similarity.DOT, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        pair_similarity(**given)


def test_default_workspace_keeps_its_value_after_an_error():
    before = flashpair.set_max_workspace_bytes(8 << 20)
    try:
        for bad in (0, 1.5, "1 GiB"):
            with pytest.raises((ValueError, TypeError), match="max_workspace_bytes must be"):
                flashpair.set_max_workspace_bytes(bad)
    finally:
        assert flashpair.set_max_workspace_bytes(before) == 8 << 20


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, "0.1", None, torch.ones(2)])
def test_temperatures(bad):
    with pytest.raises((ValueError, TypeError), match="temperature must"):
        checks.temperature("temperature", bad)
    checks.temperature("temperature", 0.07)
    checks.temperature("temperature", torch.tensor(0.07))


def test_nothing_is_half_done():
    """After an error the inputs have no gradient, no graph, and the next call is served as ever."""
    x = X.clone().requires_grad_()
    before = x.detach().clone()
    with pytest.raises(ValueError, match="terms"):
        pair_reduce(x, terms=[Term(SUM), Term(SUM, mask=Mask.SAME)])
    assert x.grad is None and torch.equal(x, before) and x._version == 0
    assert dense_backend.calls == []
    with use_backend("reference"):
        (total,) = pair_reduce(x, terms=[Term(SUM)])
    assert total.tolist() == [4.0, 4.0, 4.0]
