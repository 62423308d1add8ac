"""What every loss promises beside its value: empty and poisoned batches, errors, memory, precision, compilation."""
# ruff: noqa: F811

import math

import pytest
import support
import torch
from loss_cases import CASES, METRIC, OPERATORS, Batch, batch, engine, evaluate, operator, sides_of  # noqa: F401

import flashpair
from flashpair import losses, miners
from flashpair.losses.multi_similarity import multi_similarity_loss
from flashpair.losses.problem import log_add_exp
from flashpair.losses.triplet_margin import triplet_margin_loss

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_empty_batch(case, side, engine):
    data = batch("random", side, b=0, n=0).to(torch.float64, support.device(engine))
    loss = case.ours(data)
    assert loss.shape == () and loss.item() == 0
    loss.backward()
    assert data.x.grad.shape == (0, 5)


@pytest.mark.parametrize("b, n", [(4, 0), (0, 4), (1, 1)])
@pytest.mark.parametrize("case", METRIC, ids=repr)
def test_one_side_empty(case, b, n, engine):
    data = batch("all distinct", True, b=b, n=n).to(torch.float64, support.device(engine))
    loss = case.ours(data)
    loss.backward()
    assert loss.item() == 0 or case.name.startswith(("contrastive", "multi"))
    assert data.x.grad.isfinite().all()


@pytest.mark.parametrize("case", METRIC, ids=repr)
def test_without_positives(case, engine):
    """Zero where the definition has nothing to pull together, with a connected graph."""
    data = batch("all distinct", False).to(torch.float64, support.device(engine))
    loss = case.ours(data)
    assert loss.requires_grad
    loss.backward()
    assert data.x.grad.isfinite().all()
    if case.name not in ("contrastive", "multi_similarity"):  # their negatives stand alone
        assert loss.item() == 0
        assert (data.x.grad == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["random", "one lonely", "one class", "all distinct"])
@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_poison_reaches_the_loss(case, side, kind, value, engine):
    """One bad number, also in a row without positives, makes the loss NaN; no row is dropped for it."""
    data = batch(kind, side)
    data.x[0, 1] = value
    assert case.ours(data.to(torch.float64, support.device(engine))).isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "positive_key", "negative_keys", "queue"])
def test_poison_in_extra_keys(where, value, engine):
    """Also where a similarity of -inf would leave the softmax unnoticed."""
    data = {"query": 5, "positive_key": 5, "negative_keys": 3, "queue": 4}
    data = {name: torch.rand(rows, 4, device=support.device(engine)) + 0.1 for name, rows in data.items()}
    data[where][1, 2] = value
    for normalize in (True, False):
        assert losses.info_nce_loss(**data, normalize=normalize).isnan()


def test_large_finite_embeddings_are_no_poison(engine):
    """The test for NaN and infinity must not overflow by itself, in no dtype."""
    labels = torch.arange(8) % 2
    for dtype, size in ((torch.float16, 6e4), (torch.bfloat16, 1e15), (torch.float32, 1e15)):
        if support.serves(engine, dtype):
            x = torch.full((8, 64), size, dtype=dtype, device=support.device(engine))
            assert losses.SupConLoss()(x, labels.to(x.device)).isfinite()


@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_poison_reaches_the_gradients(case, side, engine):
    data = batch("random", side)
    data.x[0, 1] = math.nan
    data = data.to(torch.float64, support.device(engine))
    (grad,) = torch.autograd.grad(case.ours(data), data.x)
    assert grad.isnan().any()


@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_statistics(case, side, engine):
    """The same loss, and the moments of each row's pairs; counts say when there are no positives."""
    data = batch("one lonely", side).to(torch.float64, support.device(engine))
    if side == "matched":
        module = {"clip": losses.ClipLoss, "siglip": losses.SigLipLoss}.get(case.name)
        if module is not None:
            loss, stats = module()(data.x, data.y, data.scale, data.bias, return_stats=True)
            named, again = module()(data.x, data.y, data.scale, data.bias, output_dict=True, return_stats=True)
            assert torch.equal(named["contrastive_loss"], loss) and torch.equal(
                again.positive.mean, stats.positive.mean
            )
            s = data.x @ data.y.T
        else:
            loss, stats = losses.info_nce_loss(data.x, data.y, temperature=1 / data.scale, return_stats=True)
            s = torch.cosine_similarity(data.x[:, None], data.y[None], dim=-1)
        same = torch.eye(len(s), dtype=torch.bool, device=s.device)
        keep = torch.ones_like(same)
    else:
        name = {
            "nt_xent": "NTXentLoss", "sup_con": "SupConLoss", "contrastive": "ContrastiveLoss",
            "multi_similarity": "MultiSimilarityLoss", "circle": "CircleLoss", "triplet": "TripletMarginLoss",
        }[case.name.split()[0]]  # fmt: skip
        options = {"temperature": 1 / data.scale} if name in ("NTXentLoss", "SupConLoss") else {}
        if "all anchors" in case.name:
            options["reduction"] = losses.SupConReduction.ALL_ANCHORS
        mined = None
        if "mined" in case.name or "hard" in case.name:
            miner = miners.BatchHardMiner() if "hard" in case.name else miners.MultiSimilarityMiner()
            mined = miner(data.x, data.labels, data.y, data.ref_labels)
        call = (data.x, data.labels, mined, data.y, data.ref_labels)
        loss, stats = getattr(losses, name)(**options)(*call, return_stats=True)
        y, refs = (data.x, data.labels) if data.y is None else (data.y, data.ref_labels)
        s = torch.cosine_similarity(data.x[:, None], y[None], dim=-1)
        s = (2 - 2 * s).clamp_min(0).sqrt() if case.distance else s
        same = data.labels[:, None] == refs[None]
        keep = torch.ones_like(same) if data.y is not None else ~torch.eye(len(s), dtype=torch.bool, device=s.device)
        if mined is not None:
            a, p, *rest = mined.as_tuple()
            chosen = torch.zeros_like(same)
            chosen[a, p] = True
            chosen[rest[0] if len(rest) == 2 else a, rest[-1]] = True
            keep = keep & chosen
    torch.testing.assert_close(loss, case.ours(data), rtol=1e-12, atol=0)
    assert not any(t.requires_grad for side_ in stats for t in side_)
    for found, mask in ((stats.positive, same & keep), (stats.negative, ~same & keep)):
        for i in range(len(s)):
            row = s[i][mask[i]].detach()
            assert found.count[i] == len(row)
            if len(row):
                want = torch.stack([row.mean(), row.var(correction=0), row.min(), row.max()])
                got = torch.stack([m[i] for m in found[1:]])
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
            else:
                assert [m[i].item() for m in found[1:]] == [0, 0, math.inf, -math.inf]


def kept_bytes(function, data: Batch) -> int:
    """Bytes of the distinct storages that autograd keeps for backward."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(data)
    return sum(kept.values())


@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_memory_kept_for_backward(case, side, operator):
    """At most a few copies of the embeddings; the similarity matrix would be 32 of them."""
    d, b = 16, 512
    data = batch("random", side, b=b, n=b, d=d).to(torch.float32, support.device(operator))
    inputs = data.x.nbytes + (0 if data.y is None else data.y.nbytes)
    vectors = 40 * b * 8
    assert kept_bytes(case.ours, data) <= 4 * inputs + vectors < b * b * 4


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_precision(case, side, dtype, engine):
    """No farther from float64 than 1.5 times dense PyTorch in that dtype (the peer's own code where there is one)."""
    if not support.serves(engine, dtype):
        pytest.skip(f"{engine} does not serve {dtype}")
    at, data = support.device(engine), batch("random", side, b=40, n=36, d=24)
    if side == "matched":  # features come normalised; exact in bfloat16
        data.x, data.y = (torch.nn.functional.normalize(v).bfloat16().double() for v in (data.x, data.y))
    oracle = evaluate(case.ours, data.to(torch.float64, at), case.learns)
    got = evaluate(case.ours, data.to(dtype, at), case.learns)
    rivals = []
    with support.forced("reference"):
        rivals.append(evaluate(case.ours, data.to(dtype), case.learns))
    if case.peer is not None and dtype == torch.float32:
        rivals.append(evaluate(case.peer, data.to(dtype), case.learns))
    for name, value in got.items():
        eps = 2 * torch.finfo(dtype).eps if name in ("dx", "dy") else 4 * torch.finfo(torch.float32).eps
        for rival in rivals:
            support.assert_as_good(name, value, rival[name], oracle[name], eps)


@pytest.mark.parametrize("noise", [0.3, 0.9])
@pytest.mark.parametrize("name", ["clip", "info_nce"])
def test_precision_of_a_trained_model(name, noise, engine):
    """Scale 100 and pairs that match: losses down to 1e-15, of which a difference of logits would keep no digit."""
    at, g = support.device(engine), torch.Generator().manual_seed(1)
    case = next(c for c in CASES if c.name == name)
    unit = lambda v: torch.nn.functional.normalize(v).float().double()  # noqa: E731
    data = batch("random", "matched", b=64, d=32)
    data.x = unit(torch.randn(64, 32, generator=g))
    data.y = unit(data.x + noise * torch.randn(64, 32, generator=g) / 32**0.5)
    data.scale = torch.tensor(100.0, dtype=torch.float64)
    oracle = evaluate(case.ours, data.to(torch.float64, at), case.learns)
    got = evaluate(case.ours, data.to(torch.float32, at), case.learns)
    # A rounded logit of 100 is the relative error of a probability. The scale's gradient is a difference of two means
    # of similarities near 1, each weighted with the probabilities that make up the loss.
    logit = 100 * torch.finfo(torch.float32).eps
    for part, value in got.items():
        error = (value - oracle[part]).norm()
        size = oracle[part].norm() + (oracle["loss"] if part == "dscale" else 0.0)
        assert error <= 4 * logit * size, f"{part}: {error:.2e} of {size:.2e}"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_half_precision_gives_a_float32_loss(case, side, dtype, engine):
    if not support.serves(engine, dtype):
        pytest.skip(f"{engine} does not serve {dtype}")
    data = batch("random", side).to(dtype, support.device(engine))
    loss = case.ours(data)
    loss.backward()
    assert loss.dtype == torch.float32 and data.x.grad.dtype == dtype
    with torch.autocast(data.x.device.type, dtype=torch.bfloat16):
        assert torch.equal(case.ours(data), loss)


@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_autocast_changes_nothing(case, side, engine):
    data = batch("random", side).to(torch.float32, support.device(engine))
    with torch.autocast(data.x.device.type, dtype=torch.bfloat16):
        inside = case.ours(data)
    assert torch.equal(inside, case.ours(data))


@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_bitwise_repeatable(case, side, engine):
    data = batch("random", side, b=40, n=36, d=24)
    first, second = (evaluate(case.ours, data.to(torch.float32, support.device(engine)), case.learns) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("case, side", sides_of(CASES))
def test_compiles_once_for_all_batch_sizes(case, side):
    """fullgraph, and no recompilation when B and N change; operators are opaque, so one backend stands for all."""
    torch._dynamo.reset()
    operator = OPERATORS[-1]
    at = support.device(operator)
    compiled = torch.compile(case.ours, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b, n in ((11, 9), (14, 6), (7, 16)):
            data = batch("random", side, b=b, n=n).to(torch.float32, at)
            again = data.to(torch.float32, at)
            with support.forced(operator):
                loss, eager = compiled(data), case.ours(again)
                torch.testing.assert_close(loss, eager)
                torch.testing.assert_close(*(torch.autograd.grad(v, d.x)[0] for v, d in ((loss, data), (eager, again))))


def learnable() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(0.2))


MODULES = {
    "clip": (losses.ClipLoss(), lambda f, x, y, labels: f(x, y, 10.0, return_stats=True)),
    "clip cached labels": (losses.ClipLoss(cache_labels=True), lambda f, x, y, labels: f(x, y, 10.0)),
    "siglip": (losses.SigLipLoss(), lambda f, x, y, labels: f(x, y, 10.0, -2.5)),
    "info_nce queue": (losses.InfoNCELoss(learnable()), lambda f, x, y, labels: f(x, y, x.flip(0), y.roll(1, 1))),
    "info_nce moco": (losses.InfoNCELoss(0.2, True, False), lambda f, x, y, labels: f(x, y, None, y + x, True)),
    "nt_xent": (losses.NTXentLoss(learnable()), lambda f, x, y, labels: f(x, labels, return_stats=True)),
    "sup_con": (losses.SupConLoss(reduction=losses.SupConReduction.ALL_ANCHORS), lambda f, x, y, labels: f(x, labels)),
    **{
        f"{name} mined": (
            make(),
            lambda f, x, y, labels, mine=miner: f(x, labels, mine(x, labels), return_stats=True),
        )
        for name, make, miner in (
            ("contrastive", losses.ContrastiveLoss, miners.MultiSimilarityMiner()),
            ("multi_similarity", losses.MultiSimilarityLoss, miners.MultiSimilarityMiner()),
            ("circle", losses.CircleLoss, miners.MultiSimilarityMiner()),
            ("triplet_margin", losses.TripletMarginLoss, miners.BatchHardMiner()),
        )
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_compile_once(name):
    """Modules built before, whose numbers torch.compile takes for dynamic, learnable temperatures and statistics."""
    torch._dynamo.reset()
    operator = OPERATORS[-1]
    module, call = MODULES[name]
    compiled = torch.compile(lambda *data: call(module, *data), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), support.forced(operator):
        for b in (11, 14, 7):
            x, y = (torch.randn(b, 6, device=support.device(operator), requires_grad=True) for _ in range(2))
            data = (x, y, torch.arange(b, device=x.device) % 3)
            left, right = (torch.utils._pytree.tree_leaves(f(*data)) for f in (compiled, lambda *d: call(module, *d)))
            for a, c in zip(left, right, strict=True):
                torch.testing.assert_close(a, c)
            torch.testing.assert_close(*(torch.autograd.grad(v[0], x)[0] for v in (left, right)))


# --- errors ---

X = torch.eye(4)
LABELS = torch.tensor([0, 0, 1, 1])
HARD = (torch.tensor([0]), torch.tensor([1]), torch.tensor([2]))
METRIC_MODULES = [
    losses.NTXentLoss, losses.SupConLoss, losses.ContrastiveLoss, losses.MultiSimilarityLoss, losses.CircleLoss,
    losses.TripletMarginLoss,
]  # fmt: skip


@pytest.mark.parametrize("make", METRIC_MODULES, ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ((X[0], LABELS), ValueError, "embeddings must have shape"),
        ((X.long(), LABELS), TypeError, "embeddings must be one of"),
        ((X.tolist(), LABELS), TypeError, "embeddings must be a tensor; got list"),
        ((X,), ValueError, "labels or indices_tuple"),
        ((X, LABELS[:3]), ValueError, r"labels must have shape \(4,\).*got \(3,\)"),
        ((X, LABELS[None]), ValueError, "labels must have shape"),
        ((X, LABELS.float()), TypeError, "labels must be int64; got torch.float32"),
        ((X, LABELS.int()), TypeError, "labels must be int64; got torch.int32"),
        ((X, LABELS, None, X[:, :3], LABELS), ValueError, "equal features; got 4 and 3"),
        ((X, LABELS, None, X.double(), LABELS), TypeError, "one dtype"),
        ((X, LABELS, None, X.clone()), ValueError, "ref_emb was given without ref_labels"),
        ((X, LABELS, None, None, LABELS), ValueError, "ref_labels was given without ref_emb"),
        ((X, LABELS, None, X.clone(), LABELS[:2]), ValueError, "ref_labels must have shape"),
        ((X, LABELS, HARD[:2]), ValueError, "indices_tuple must be .*length 2"),
        ((X, LABELS, "hard"), ValueError, "indices_tuple must be .*str"),
        ((X, LABELS, (*HARD[:2], torch.tensor([4]))), ValueError, r"indices_tuple\[2\] .*\[0, 4\); got 4 to 4"),
        ((X, LABELS, (torch.tensor([-1]), *HARD[1:])), ValueError, r"indices_tuple\[0\] .*got -1 to -1"),
        ((X, LABELS, (*HARD[:2], torch.tensor([2, 3]))), ValueError, r"indices_tuple\[2\] must have length 1"),
        ((X, LABELS, (*HARD[:2], torch.tensor([2.0]))), TypeError, r"indices_tuple\[2\] must be a 1-D int64"),
        ((X, LABELS.to("meta")), ValueError, "labels must be on the device"),
        ((X, LABELS, None, X.to("meta"), LABELS), ValueError, "ref_emb must be on the device"),
    ],
)
def test_bad_calls(make, arguments, kind, message):
    with pytest.raises(kind, match=message):
        make()(*arguments)


@pytest.mark.parametrize(
    "build, kind, message",
    [
        (lambda: losses.NTXentLoss(temperature=0), ValueError, r"temperature must be in \(0.*got 0"),
        (lambda: losses.NTXentLoss(temperature=-1.0), ValueError, "temperature .*got -1"),
        (lambda: losses.SupConLoss(temperature=math.nan), ValueError, "temperature must not be NaN"),
        (lambda: losses.SupConLoss(temperature="hot"), TypeError, "temperature must be a number; got str"),
        (lambda: losses.SupConLoss(temperature=torch.ones(2)), ValueError, "temperature .*one element"),
        (lambda: losses.SupConLoss(reduction="mean"), TypeError, "SupConReduction"),
        (lambda: losses.SupConLoss(base_temperature=0), ValueError, "base_temperature"),
        (lambda: losses.InfoNCELoss(temperature=0.0), ValueError, "temperature"),
        (lambda: losses.ContrastiveLoss(pos_margin=math.nan), ValueError, "pos_margin must not be NaN"),
        (lambda: losses.ContrastiveLoss(neg_margin=None), TypeError, "neg_margin must be a number"),
        (lambda: losses.TripletMarginLoss(margin=math.nan), ValueError, "margin must not be NaN"),
        (lambda: losses.TripletMarginLoss(triplets_per_anchor=0), ValueError, "triplets_per_anchor must be"),
        (lambda: losses.MultiSimilarityLoss(alpha=0), ValueError, "alpha must be"),
        (lambda: losses.MultiSimilarityLoss(beta=-1), ValueError, "beta must be"),
        (lambda: losses.MultiSimilarityLoss(base=math.nan), ValueError, "base must not be NaN"),
        (lambda: losses.CircleLoss(gamma=0), ValueError, "gamma must be"),
        (lambda: losses.CircleLoss(m=math.nan), ValueError, "m must not be NaN"),
        (lambda: losses.CircleLoss(distance=losses.LpDistance()), ValueError, "CosineSimilarity for CircleLoss"),
        (lambda: losses.NTXentLoss(distance=losses.LpDistance(p=1)), ValueError, r"distance must be .*p=1"),
        (lambda: losses.NTXentLoss(distance=torch.nn.Identity()), ValueError, "distance must be .*Identity"),
        (lambda: losses.NTXentLoss(reducer=torch.nn.Identity()), ValueError, "reducer must be .*Identity"),
        (lambda: losses.ClipLoss(rank=1), ValueError, "rank must be at most 0; got 1"),
        (lambda: losses.SigLipLoss(world_size=0), ValueError, "world_size must be at least 1; got 0"),
        (lambda: losses.SigLipLoss(dist_impl="ring"), ValueError, "dist_impl must be .*'ring'"),
        (lambda: miners.MultiSimilarityMiner(epsilon=math.nan), ValueError, "epsilon must not be NaN"),
        (lambda: miners.BatchHardMiner(distance=torch.nn.Identity()), ValueError, "distance must be"),
        (lambda: losses.CrossBatchMemory(losses.SupConLoss(), 0), ValueError, "embedding_size must be"),
        (lambda: losses.CrossBatchMemory(losses.SupConLoss(), 4, 0), ValueError, "memory_size must be"),
    ],
)
def test_bad_settings(build, kind, message):
    with pytest.raises(kind, match=message):
        build()


@pytest.mark.parametrize("make", [losses.ClipLoss, losses.SigLipLoss])
@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ((X, X[:3], 1.0), ValueError, "equal numbers of rows; got 4 and 3"),
        ((X, X[:, :3], 1.0), ValueError, "equal features"),
        ((X[0], X, 1.0), ValueError, "image_features must have shape"),
        ((X, X.double(), 1.0), TypeError, "one dtype"),
        ((X, X, math.nan), ValueError, "logit_scale must be finite; got nan"),
        ((X, X, "1"), TypeError, "logit_scale must be a number or a tensor"),
        ((X, X, torch.ones(2)), ValueError, "logit_scale .*one element"),
        ((X, X, torch.tensor(1)), TypeError, "logit_scale must be floating point"),
        ((X, X, 1.0, torch.ones(2)), ValueError, "logit_bias .*one element"),
    ],
)
def test_bad_image_text_calls(make, arguments, kind, message):
    with pytest.raises(kind, match=message):
        make()(*arguments)


def test_other_bad_calls():
    with pytest.raises(ValueError, match=r"pair \(0, 1\) as positive and as negative"):
        losses.SupConLoss()(X, None, (HARD[0], HARD[1], HARD[0], HARD[1]))
    with pytest.raises(ValueError, match="query and positive_key must have equal numbers of rows"):
        losses.InfoNCELoss()(X, X[:2])
    with pytest.raises(ValueError, match="query and queue must have equal features"):
        losses.InfoNCELoss()(X, X, queue=X[:, :2])
    with pytest.raises(ValueError, match="in_batch_negatives=False needs"):
        losses.InfoNCELoss(in_batch_negatives=False)(X, X)


@pytest.mark.parametrize("make", [losses.NTXentLoss, losses.SupConLoss, losses.InfoNCELoss], ids=lambda m: m.__name__)
def test_learnable_temperature_is_a_parameter(make, engine):
    """As a parameter of the module; its gradient is a finite difference of the loss."""
    at = support.device(engine)
    x = torch.randn(6, 4, dtype=torch.float64, device=at)
    other = x.flip(0) + x if make is losses.InfoNCELoss else torch.arange(6, device=at) % 2
    loss = make(temperature=torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64, device=at)))
    loss(x, other).backward()
    (parameter,) = loss.parameters()
    step = 1e-5
    slope = (make(temperature=0.5 + step)(x, other) - make(temperature=0.5 - step)(x, other)) / (2 * step)
    torch.testing.assert_close(parameter.grad, slope, rtol=1e-7, atol=0)


FUNCTIONS = {
    "circle": {"m": 0.3, "gamma": 20.0},
    "contrastive": {"pos_margin": 0.2, "neg_margin": 0.9},
    "multi_similarity": {"alpha": 3.0, "beta": 20.0, "base": 0.3},
    "nt_xent": {"temperature": 0.4},
    "sup_con": {
        "temperature": 0.4, "reduction": losses.SupConReduction.ALL_ANCHORS, "base_temperature": 0.2
    },
    "triplet_margin": {"margin": 0.3, "swap": True, "smooth_loss": True},
}  # fmt: skip


@pytest.mark.parametrize("defaults", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_their_modules(name, defaults, engine):
    """A function has its module's defaults, and each of its options does something."""
    data = batch("random", False).to(torch.float64, support.device(engine))
    options = {} if defaults else FUNCTIONS[name]
    mined = miners.BatchHardMiner()(data.x, data.labels) if name == "triplet_margin" else None
    function = getattr(losses, f"{name}_loss")
    module = {"nt_xent": losses.NTXentLoss}.get(name) or getattr(losses, name.title().replace("_", "") + "Loss")
    value = function(data.x, data.labels, mined, **options)
    assert torch.equal(value, module(**options)(data.x, data.labels, mined))
    for option in options:
        assert function(data.x, data.labels, mined, **{k: v for k, v in options.items() if k != option}) != value
    same, stats = function(data.x, data.labels, mined, reducer=losses.MeanReducer(), return_stats=True)
    assert torch.equal(same, module(reducer=losses.MeanReducer())(data.x, data.labels, mined, return_stats=True)[0])
    assert stats.positive.count.sum() > 0


@pytest.mark.parametrize("make", METRIC_MODULES, ids=lambda m: m.__name__)
def test_statistics_of_listed_pairs(make, engine):
    """The same numbers whether a miner's rule or its index tensors name the pairs."""
    data = batch("one lonely", False).to(torch.float64, support.device(engine))
    triplets = make is losses.TripletMarginLoss
    mined = (miners.BatchHardMiner if triplets else miners.MultiSimilarityMiner)()(data.x, data.labels)
    (lazy, a), (listed, b) = (make()(data.x, data.labels, i, return_stats=True) for i in (mined, mined.as_tuple()))
    torch.testing.assert_close(lazy, listed, rtol=1e-9, atol=1e-11)
    for left, right in zip((*a.positive, *a.negative), (*b.positive, *b.negative), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_image_text_extras(engine):
    """Dict output, a bias without influence but with a gradient, cached labels, stored logits for subclasses."""
    data = batch("random", "matched").to(torch.float64, support.device(engine))
    clip, siglip = losses.ClipLoss(cache_labels=True), losses.SigLipLoss()
    assert list(clip(data.x, data.y, data.scale, output_dict=True)) == ["contrastive_loss"]
    assert list(siglip(data.x, data.y, data.scale, data.bias, output_dict=True)) == ["contrastive_loss"]
    assert torch.equal(clip(data.x, data.y, data.scale, data.bias), clip(data.x, data.y, data.scale))
    assert torch.autograd.grad(clip(data.x, data.y, data.scale, data.bias), data.bias)[0] == 0
    assert clip.get_ground_truth(data.x.device, 11) is clip.get_ground_truth(data.x.device, 11)
    rows, columns = clip.get_logits(data.x, data.y, data.scale)
    target = clip.get_ground_truth(data.x.device, 11)
    ce = torch.nn.functional.cross_entropy
    torch.testing.assert_close((ce(rows, target) + ce(columns, target)) / 2, clip(data.x, data.y, data.scale))
    stored = siglip._loss(data.x, data.y, data.scale, data.bias)
    torch.testing.assert_close(stored, siglip(data.x, data.y, data.scale, data.bias))
    scale = data.scale.item()
    torch.testing.assert_close(clip(data.x, data.y, scale), clip(data.x, data.y, data.scale.reshape(1)))


def test_log_add_exp_of_nothing():
    """Rows without pairs send zero, not NaN, to the statistics they came from."""
    a, b = (torch.tensor([-math.inf, 0.0, -math.inf], requires_grad=True) for _ in range(2))
    out = log_add_exp(a, b)
    assert out[0] == -math.inf
    torch.where(out.isinf(), 0.0, out).sum().backward()
    assert a.grad.tolist() == [0.0, 0.5, 0.0]


@pytest.mark.parametrize("name", ["alpha", "beta", "margin"])
def test_numbers_given_as_tensors_keep_their_gradient(name):
    """The functions behind the classes take them: a closed formula has no gradient of its constants, autograd has."""
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(12) % 4
    number = torch.tensor({"alpha": 2.0, "beta": 5.0, "margin": 0.3}[name], dtype=torch.float64, requires_grad=True)

    def loss(value):
        if name == "margin":
            mined = miners.BatchHardMiner()(x, labels)
            return triplet_margin_loss(x, labels, mined, margin=value)
        return multi_similarity_loss(x, labels, **{name: value})

    (gradient,) = torch.autograd.grad(loss(number), number)
    slope = (float(loss(float(number) + 1e-6)) - float(loss(float(number) - 1e-6))) / 2e-6
    assert float(gradient) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_listed_triplets_need_no_backend(name):
    """Similarities of a list are PyTorch's or C++'s, whichever backend is asked for."""
    x, labels = torch.randn(8, 5, requires_grad=True), torch.arange(8) % 3
    triplets = torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([1, 2])
    wanted = losses.TripletMarginLoss()(x, labels, triplets)
    with flashpair.use_backend(name):
        torch.testing.assert_close(losses.TripletMarginLoss()(x, labels, triplets), wanted)
