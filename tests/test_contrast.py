"""The contrastive losses against loops from their papers, and what each promises beside its value."""
# ruff: noqa: F811

import math

import contrast_cases
import multi_label_cases
import pytest
import support
import torch
from contrast_cases import CASES
from loss_cases import engine  # noqa: F401
from views import Views, evaluate, unit, views

from flashpair import losses
from flashpair.losses.contrast.feature_transformation import beta_like
from flashpair.losses.multi_label.label_similarity import LabelSimilarity, label_similarity
from flashpair.losses.multi_label.nws import NWSAggregation

KINDS = ["random", "collapsed", "aligned", "large"]


def moved(d: Views, dtype: torch.dtype, device: str = "cpu") -> Views:
    return Views(*(v.detach().to(device=device, dtype=dtype).requires_grad_() for v in (d.x, d.y)))


def close(got: dict, want: dict, bound: float) -> None:
    for name, value in want.items():
        scale = max(value.abs().max().item(), 1.0)
        assert (got[name] - value).abs().max().item() <= bound * scale, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_definition(case, kind, engine):
    d = views(kind)
    close(evaluate(case.ours, moved(d, torch.float64, support.device(engine))), evaluate(case.define, d), 1e-9)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_float32(case, engine):
    """A few times what float32 itself loses, measured in the definition."""
    d = views()
    want = evaluate(case.define, d)
    got = evaluate(case.ours, moved(d, torch.float32, support.device(engine)))
    plain = evaluate(case.define, moved(d, torch.float32))
    for name, value in want.items():
        lost = (plain[name] - value).abs().max().item()
        assert (got[name] - value).abs().max().item() <= 8 * lost + 3e-6 * max(value.abs().max().item(), 1), name


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_small_batches(case, rows, engine):
    """An empty batch is 0; one sample has no negatives and nothing that is NaN; gradients exist."""
    d = moved(views(b=rows) if rows else views(b=2), torch.float64, support.device(engine))
    d = Views(*(v.detach()[:rows].clone().requires_grad_() for v in (d.x, d.y)))
    loss = case.ours(d)
    assert loss.shape == () and not loss.isnan()
    if rows == 0:
        assert loss.item() == 0
    if rows == 1 and case.name.startswith("DCL"):
        assert loss.item() == -math.inf  # log of no negatives
        return
    grads = torch.autograd.grad(loss, [d.x, d.y], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_poison_reaches_the_loss(case, value, engine):
    d = moved(views(), torch.float64, support.device(engine))
    bad = d.x.detach().clone()
    bad[3, 1] = value
    d.x = bad.requires_grad_()
    assert case.ours(d).isnan()


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_saved_for_backward(case):
    """Nothing of the size of S is kept: 300 × 300 numbers are 360 kB."""
    if "cpu" not in support.FUSED:
        pytest.skip("the CPU backend is measured")
    d = moved(views(b=300), torch.float32)
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        for part in (t._indices(), t._values()) if t.is_sparse else (t,):
            kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return t

    with support.forced("cpu"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = case.ours(d)
    loss.backward()
    assert sum(kept.values()) < 300 * (60 * 8 + 24 * 5 * 4), sum(kept.values())


def test_mann_whitney_at_the_papers_temperature(engine):
    """T = 0.01: the table against every comparison, in float64 and float32."""
    d = moved(views(b=40), torch.float64, support.device(engine))
    s = unit(d.x) @ unit(d.y).T
    off = ~torch.eye(40, dtype=torch.bool, device=s.device)
    z = (s[off][None, :] - s.diagonal()[:, None]) / 0.01
    want = torch.nn.functional.softplus(z).sum() / 40
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 2e-6)):
        e = moved(d, dtype, support.device(engine))
        got = losses.MannWhitneyLoss()(e.x, e.y)
        assert abs(got.double() - want) <= bound * want
        for a, b in zip(torch.autograd.grad(got, [e.x, e.y]), torch.autograd.grad(want, [d.x, d.y], retain_graph=True),
                        strict=True):  # fmt: skip
            assert (a.double() - b).abs().max() <= 50 * bound * b.abs().max()


def test_transformed_positives():
    """Extrapolation by 1 + Beta(2, 2) lowers what positives have in common; keys take no gradient."""
    torch.manual_seed(0)
    q, k, queue = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (64, 64, 32))
    q, k = q.requires_grad_(), (0.7 * q + 0.3 * k).detach().requires_grad_()
    plain = losses.FeatureTransformationLoss(0.5, None, None)(q, k, queue)
    assert torch.equal(plain, losses.info_nce_loss(q, k.detach(), queue=queue, temperature=0.5, normalize=False,
                                                   in_batch_negatives=False))  # fmt: skip
    torch.manual_seed(3)
    harder = losses.FeatureTransformationLoss(0.5, 2.0, None)(q, k, queue)
    assert harder > plain
    torch.manual_seed(3)
    stretch = 1 + beta_like(q, 2.0)
    far, other = stretch * q + (1 - stretch) * k.detach(), stretch * k.detach() + (1 - stretch) * q
    logits = torch.cat([(far * other).sum(1, keepdim=True), far @ queue.T], 1) / 0.5
    torch.testing.assert_close(harder, (logits.logsumexp(1) - logits[:, 0]).mean())
    assert torch.autograd.grad(harder, [q, k], allow_unused=True)[1] is None


def test_multi_view_masks(engine):
    """An arbitrary, asymmetric mask; an anchor without positives counts in the mean."""
    d = moved(views(), torch.float64, support.device(engine))
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[4] = False
    for mode in ("all", "one"):
        loss = losses.MultiViewSupConLoss(0.2, mode)
        ours = lambda e: loss(contrast_cases.stacked(e), mask=mask.to(e.x.device))  # noqa: B023, E731
        want = evaluate(lambda e: contrast_cases.define_multi_view(e, None, mode == "one", mask), views())  # noqa: B023
        close(evaluate(ours, d), want, 1e-10)


def test_hard_contrastive_keeps_ties(engine):
    """Duplicated keys at the threshold all stay."""
    x = torch.tensor(
        [[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [-1.0, 0.0]], dtype=torch.float64, device=support.device(engine)
    )
    loss = losses.HardContrastiveLoss(1.0, fraction=0.3)(x, x)  # one negative of three
    s = x @ x.T
    rows = [[1, 2], [2], [1], [1, 2]]
    want = sum(torch.log(s[i, i].exp() + s[i, j].exp().sum()) - s[i, i] for i, j in enumerate(rows)) / 4
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_n_contrast_of_far_embeddings_and_equal_targets(dtype, engine):
    """Logits thousands apart, whose exponentials are 0 and infinite; targets of two numbers, each of them twice."""
    g = torch.Generator().manual_seed(0)
    wide = 1000 * torch.randn(14, 3, generator=g, dtype=torch.float64)
    targets = torch.randint(3, (7, 2), generator=g).double().repeat(2, 1)
    apart, others = torch.cdist(targets, targets, p=1), ~torch.eye(14, dtype=torch.bool)

    def plain(x, t):
        s = -torch.cdist(x, x) / t
        sums = [s[i][(apart[i] >= apart[i, k]) & others[i]].logsumexp(0) - s[i, k] for i, k in others.nonzero()]
        return torch.stack(sums).mean()

    def found(function, dtype, at="cpu"):
        x, t = wide.to(at, dtype).requires_grad_(), torch.tensor(0.5, dtype=dtype, device=at, requires_grad=True)
        loss = function(x, t)
        return [v.detach().double().cpu() for v in (loss, *torch.autograd.grad(loss, (x, t)))]

    at = support.device(engine)
    ours = found(lambda x, t: losses.RnCLoss(t)(x, targets.to(at)), dtype, at)
    rounding = torch.finfo(dtype).eps * (torch.cdist(wide, wide).max() / 0.5).item()  # of a log-sum
    for want, got in zip(found(plain, torch.float64), ours, strict=True):
        support.assert_close("far", got, want, rtol=max(rounding, 1e-10))


def test_hard_contrastive_counts_long_rows():
    """As many as asked for, and the largest; the own column never."""
    from flashpair.losses.contrast.hard_contrastive import _hardest

    s = torch.rand(3, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = torch.tensor([[5], [0], [2999]])
    s.scatter_(1, own, 2.0)
    for kept in (1, 246, 2998, 2999):
        among = _hardest(s, own, kept)[1].bool()
        assert among.sum(1).tolist() == [kept] * 3 and not among.gather(1, own).any()
        rest = torch.where(among, -1.0, s).scatter(1, own, -1.0)
        assert (torch.where(among, s, 3.0).amin(1) > rest.amax(1)).all()


@pytest.mark.parametrize("classes", [[0, 0, 1, 2, 2, 2, 5, 5, 0], [0, 1, 0, 1, 1, 0, 0, 0, 0]])
def test_sim_lap_of_uneven_classes(classes, engine):
    """Anchors of their own partner class, without positives, and without negatives."""
    d = moved(views(), torch.float64, support.device(engine))
    labels = torch.tensor(classes, device=d.x.device)
    partner = torch.tensor([0, 1, 9, 2, 0, 5, 0, -3, 1], device=d.x.device)
    ours = lambda e: losses.SimLAPLoss(30.0)(e.x, contrast_cases.gates(e), labels, partner)  # noqa: E731
    want = lambda e: contrast_cases.define_sim_lap(e, labels, partner, 30.0)  # noqa: E731
    close(evaluate(ours, d), evaluate(want, d), 1e-10)


def test_diagnostics(engine):
    d = moved(views(), torch.float64, support.device(engine))
    found = losses.temperature_diagnostics(d.x, d.y, 0.2, d.labels)
    s = unit(d.x) @ unit(d.y).T / 0.2
    off = ~torch.eye(9, dtype=torch.bool, device=s.device)
    r = s[off].reshape(9, 8).softmax(1)
    torch.testing.assert_close(found.pull, 1 - s.softmax(1).diagonal())
    torch.testing.assert_close(found.effective_negatives, (-(r * r.log()).sum(1)).exp())
    torch.testing.assert_close(found.hardest_share, r.amax(1))
    own = unit(d.x) @ unit(d.x).T
    alike = (d.labels[:, None] == d.labels[None]) & off
    torch.testing.assert_close(found.tolerance, own[alike].mean())
    torch.testing.assert_close(found.uniformity, -contrast_cases.define_uniformity(d.x))
    assert losses.temperature_diagnostics(d.x, d.y, 0.2).tolerance.isnan()


@pytest.mark.parametrize(
    ("name", "define"),
    [
        ("MultiLabelProtoLoss", multi_label_cases.define_proto),
        ("MSCLoss", multi_label_cases.define_msc),
        ("MSCRGLoss", multi_label_cases.define_mscrg),
        ("NWSLoss", lambda d, p: multi_label_cases.define_nws(d, p, alone=True)),
    ],
)
def test_gradient_of_prototypes(name, define, engine):
    d = views()
    options = {"MSCLoss": (0.1, 0.7, 0.2), "NWSLoss": (multi_label_cases.RELATED, 0.1, 0.7, 0.2)}.get(name, ())
    loss = multi_label_cases.with_prototypes(getattr(losses, name)(4, 5, *options)).to(support.device(engine))
    prototypes = multi_label_cases.PROTOTYPES.clone().requires_grad_()
    (want,) = torch.autograd.grad(define(d, prototypes), prototypes)
    value = multi_label_cases.labelled(loss, moved(d, torch.float64, support.device(engine)))
    (got,) = torch.autograd.grad(value, loss.prototypes)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-12)


def test_gradient_of_the_network_of_pair_weights(engine, monkeypatch):
    monkeypatch.setattr("flashpair.rows._CPU_ELEMENTS", 1)  # two rows a panel
    monkeypatch.setattr("flashpair.rows._CPU_ROWS", 2)
    parameters = [p.requires_grad_() for p in contrast_cases.network()]
    want = torch.autograd.grad(contrast_cases.define_ada_meow(views(), parameters), parameters)
    loss = contrast_cases.with_network(losses.AdaMEOWLoss(5, hidden_size=4)).to(support.device(engine))
    d = moved(views(), torch.float64, support.device(engine))
    got = torch.autograd.grad(loss(d.x, d.y), list(loss.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-12)


def test_cluster_concentration(engine):
    """As PCL makes it; clusters of one and of none take the largest density."""
    g = torch.Generator().manual_seed(0)
    v, u = torch.randn(60, 4, generator=g).double(), torch.randn(12, 4, generator=g).double()
    clusters = torch.randint(10, (60,), generator=g)
    clusters[clusters == 3] = 4
    clusters[7] = 3
    density = [0.0] * 12
    for c in range(12):
        far = [(v[i] - u[c]).norm().item() for i in range(60) if clusters[i] == c]
        if len(far) > 1:
            density[c] = sum(far) / len(far) / math.log(len(far) + 10)
    single = [c for c in range(12) if (clusters == c).sum() <= 1]
    assert single == [3, 10, 11]
    for c in single:
        density[c] = max(density)
    want = torch.tensor(density, dtype=torch.float64)
    want = want.clamp(*want.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist())
    want = 0.3 * want / want.mean()
    on = support.device(engine)
    got = losses.cluster_concentration(v.to(on), u.to(on), clusters.to(on), 0.3)
    torch.testing.assert_close(got.cpu(), want)
    assert losses.cluster_concentration(u.to(on), u.to(on), torch.arange(12, device=on), 0.3).eq(0.3).all()
    tight = torch.cat([v[:2], u.repeat(2, 1)])  # ten of twelve clusters lie on their centroids
    phi = losses.cluster_concentration(tight, u, torch.cat([torch.tensor([0, 1]), torch.arange(12).repeat(2)]), 0.3)
    assert phi.min() == 0.003 and phi[:2].min() > 0.3


@pytest.mark.parametrize(("target", "gap"), [("ages", 4), ("real_ages", 2.0)])
def test_mixtures_do_not_depend_on_the_panels(target, gap, engine, monkeypatch):
    """Value and gradients of two rows a panel, and of few triples at a time; another seed makes other negatives."""
    d, targets = moved(views(), torch.float64, support.device(engine)), getattr(contrast_cases, target)
    y = targets(d).tolist()
    assert any(0 < y[i] - a < gap and 0 < b - y[i] < gap for i in range(9) for a in y for b in y)
    ours = lambda d: losses.SupReMixLoss(0.5, gap)(d.x, targets(d))  # noqa: E731
    whole, other = evaluate(ours, d), ours(d)
    monkeypatch.setattr("flashpair.rows._CPU_ELEMENTS", 1)
    monkeypatch.setattr("flashpair.rows._CPU_ROWS", 2)
    for triples in (1 << 17, 9, 1):
        monkeypatch.setattr("flashpair.losses.contrast.sup_re_mix.BetweenTargets._TRIPLES", triples)
        close(evaluate(ours, d), whole, 1e-13)
    assert abs(other.item() - whole["loss"].item()) > 1e-4


@pytest.mark.parametrize("gap", [0, 0.1, 0.3, 0.7, 9.0])
def test_mixtures_of_real_targets_at_the_gap(gap, engine, monkeypatch):
    """Targets whose rounded differences are just the gap, or just not; targets far away, and equal ones."""
    monkeypatch.setattr("flashpair.rows._CPU_ELEMENTS", 1)
    monkeypatch.setattr("flashpair.rows._CPU_ROWS", 1)  # each looks as far as itself must
    d = moved(views(b=14), torch.float64, support.device(engine))
    y = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.3, 0.8, 30.0, 30.1, -5.0], dtype=torch.float64)
    y = y[torch.randperm(14, generator=torch.Generator().manual_seed(0))].to(d.x.device)
    loss = losses.SupReMixLoss(0.5, gap, mix_negatives=False)
    want = evaluate(lambda d: contrast_cases.define_sup_re_mix(d, gap, False, lambda _: y), d)
    close(evaluate(lambda d: loss(d.x, y), d), want, 1e-12)


def test_real_targets_that_are_whole_numbers(engine):
    """Triples and products of sums are the same loss, its temperature's gradient too; NaN targets are seen."""
    d, found = moved(views(b=30), torch.float64, support.device(engine)), []
    y = (3 * d.x[:, 0].detach()).round().long()
    for targets in (y, y.double(), y.float()):
        torch.manual_seed(7)
        temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        value = losses.SupReMixLoss(temperature, 4)(d.x, targets)
        found.append([value, *torch.autograd.grad(value, [d.x, temperature])])
    for of_reals in found[1:]:
        for a, b in zip(of_reals, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert losses.SupReMixLoss()(d.x, y.double().index_fill(0, y[:1] * 0, math.nan)).isnan()


def test_random_bits():
    """As Python's integers make them; what is given stays as it is."""
    from flashpair.random import random_bits

    def mixed(z: int) -> int:
        for by, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            z = (z ^ z >> by) * factor % (1 << 64)
        return z

    rows, columns, golden = torch.tensor([[0], [3], [1 << 40]]), torch.tensor([0, 1, 9]), 0x9E3779B97F4A7C15
    for seed in (0, 12345, -(1 << 61) + 7):
        got = random_bits(seed, rows, columns) % (1 << 62)
        for r, i in enumerate(rows[:, 0].tolist()):
            for c, j in enumerate(columns.tolist()):
                counter = ((i * golden + j) * golden + seed) % (1 << 64)
                assert got[r, c] == mixed(mixed(counter)) % (1 << 62)
    assert rows.tolist() == [[0], [3], [1 << 40]] and columns.tolist() == [0, 1, 9]


@pytest.mark.parametrize("beta", [8.0, 1.5])
def test_beta_numbers(beta):
    """Distribution of Beta(2, β), and no correlation with the neighbour's."""
    from flashpair.losses.contrast.sup_re_mix import beta_two

    n = 300
    rows, columns = torch.arange(n)[:, None], torch.arange(n)[None]
    x = beta_two(5, rows, columns, beta, torch.float64)
    below = 1 - (1 - x) ** beta * (1 + beta * x)  # the distribution function: uniform
    ranks = below.flatten().sort().values
    assert (ranks - (torch.arange(n * n) + 0.5) / n**2).abs().max() < 1.6 / n  # Kolmogorov, one in a hundred
    for a, b in ((below[1:], below[:-1]), (below[:, 1:], below[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 3 / n
    torch.testing.assert_close(beta_two(5, rows, columns, beta, torch.float32).double(), x, rtol=1e-5, atol=1e-6)


def test_cacr_without_negatives(engine):
    """An empty queue; then also nobody else in the batch, with gradients."""
    d = moved(views(), torch.float64, support.device(engine))
    loss, none = losses.CACRQueueLoss(detach_in_batch=False), d.x.detach()[:0]
    alone = losses.CACRQueueLoss(detach_in_batch=False, in_batch=False)
    pull = alone([d.x, d.y], [d.x, d.y], none)
    costs = (unit(d.x) - unit(d.y)).square().sum(1)
    torch.testing.assert_close(pull, costs.mean())
    torch.testing.assert_close(
        torch.autograd.grad(pull, [d.x, d.y]),
        tuple(
            torch.autograd.grad((unit(a) - unit(b).detach()).square().sum(1).mean() / 2, a)[0]
            for a, b in ((d.x, d.y), (d.y, d.x))
        ),
    )
    far = [(unit(v)[:, None] - unit(v)[None]).square().sum(2) for v in (d.x, d.y)]
    off = ~torch.eye(9, dtype=torch.bool, device=d.x.device)
    rows = [c[off].reshape(9, 8) for c in far]
    push = -sum((torch.softmax(-c, 1) * c).sum(1).mean() for c in rows) / 2
    torch.testing.assert_close(loss([d.x, d.y], [d.x, d.y], none) - pull, push)
    one = loss([d.x[:1], d.y[:1]], [d.x[:1], d.y[:1]], none)
    torch.testing.assert_close(one, costs[0])
    assert all(g.isfinite().all() for g in torch.autograd.grad(one, [d.x, d.y]))


def test_cacr_of_two_views_is_mocos(engine):
    """One other view has the weight 1; its temperature is learnable, and rival to nobody costs nothing."""
    d = moved(views(), torch.float64, support.device(engine))
    keys = [d.x * 0.9 + 0.1, d.y * 1.1 - 0.1]
    found = []
    for of, half in ((losses.CACRMoCoLoss, 1.0), (losses.MoCoV3Loss, 0.5)):
        t = torch.tensor(0.3, dtype=torch.float64, device=d.x.device, requires_grad=True)
        call = ([d.x, d.y], keys) if of is losses.CACRMoCoLoss else (d.x, d.y, *keys)
        value = half * of(t)(*call)
        found.append([value, *torch.autograd.grad(value, [d.x, d.y, t])])
    torch.testing.assert_close(*found)
    one = losses.CACRMoCoLoss(cost=losses.CACRCost.EUCLIDEAN)([d.x[:1], d.y[:1]], [k[:1] for k in keys])
    pull = [1 - torch.cosine_similarity(a[:1], b[:1]) for a, b in ((d.y, keys[0]), (d.x, keys[1]))]
    torch.testing.assert_close(one, sum(pull)[0] / 2)


def test_meco_over_batches():
    """Its average follows the batches it is trained on; not those of evaluation, nor what is not finite."""
    loss, g = losses.MECOLoss(0.25), torch.Generator().manual_seed(0)
    data, noise = torch.randn(5, generator=g), torch.randn(4, 7, generator=g)
    means = noise.exp().mean(1)
    u = means[0]
    for k in range(3):
        u = u if k == 0 else 0.75 * u + 0.25 * means[k]
        torch.testing.assert_close(loss(data, noise[k]), -data.mean() + u.log())
    loss.eval()
    torch.testing.assert_close(loss(data, noise[3]), -data.mean() + (0.75 * u + 0.25 * means[3]).log())
    loss.train()
    assert loss(data, noise[3] * math.nan).isnan() and loss(data * math.inf, noise[3][:0]).isnan()
    torch.testing.assert_close(loss.log_average, u.log())
    torch.testing.assert_close(loss(data, noise[0, :0]), -data.mean())
    torch.testing.assert_close(loss(data[:0], noise[3]), (0.75 * u + 0.25 * means[3]).log())
    again = losses.MECOLoss()
    again.load_state_dict(loss.state_dict())
    assert again.log_average == loss.log_average
    assert losses.MECOLoss(1.0)(data, noise[0] + 500) > 400  # in logarithms


@pytest.mark.parametrize("density", [0.1, 0.6])
def test_label_sets(density, monkeypatch):
    """What rows share, in chunks of any size, few labels or many; lists, in any order, and multi-hot are the same."""
    from flashpair.losses.multi_label import label_sets

    hot = torch.rand(40, 13, generator=torch.Generator().manual_seed(0)) < density
    hot[3] = hot[17] = False
    sets = losses.LabelSets.of("labels", hot, 40, hot.device)
    same = losses.LabelSets.from_lists([row.nonzero().flatten().tolist() for row in hot], 13)
    assert torch.equal(sets.owner, same.owner) and torch.equal(sets.label, same.label)
    other = losses.LabelSets.from_lists([row.nonzero().flatten().flip(0).tolist() for row in hot[:25]], 13)
    row = torch.tensor([5, 3, 17, 39, 0, 3])
    want = hot[row].float() @ hot.float().T
    assert torch.equal(sets.overlap(sets, row, torch.float32), want)
    h, o = hot.double(), hot[:25].double()
    values = torch.randn(13, 4, dtype=torch.float64)
    weights, theirs = (torch.rand(len(s.owner), dtype=torch.float64) for s in (sets, other))
    weights[:3] = 0.0  # no reason to leave a pair out
    dense, of_other = h.index_put((sets.owner, sets.label), weights), o.index_put((other.owner, other.label), theirs)
    weigh = lambda s, a, b: s / (a + 2 * b).clamp_min(1)  # noqa: E731
    overlaps = weigh(h @ o.T, h.sum(1)[:, None], o.sum(1)[None])
    for pairs in (1 << 20, 60, 1):
        monkeypatch.setattr(label_sets, "_PAIRS", pairs)
        shared, sums, end = torch.zeros(40, 25).double(), torch.zeros(40, 25).double(), 0
        for found in sets.sharing(other, torch.float64, [(weights, theirs)]):
            assert found.first == end and found.panel == (density > 0.4)
            assert found.panel or ((found.row.diff() >= 0).all() and (found.shared > 0).all())
            assert found.shared.numel() <= pairs or found.end - found.first == 1
            shared[found.row, found.other], sums[found.row, found.other] = found.shared, found.sums[0]
            end = found.end
        assert torch.equal(shared, h @ o.T) and end == 40
        torch.testing.assert_close(sums, dense @ of_other.T)
        got = sets.per_label(weigh, torch.float64, other)
        torch.testing.assert_close(got, (overlaps @ o)[sets.owner, sets.label])
    torch.testing.assert_close(sets.mixture(values, weights), dense @ values)


def test_ten_thousand_labels():
    """Memory does not grow with the number of labels: sets, not tables."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=g).requires_grad_()
    of = [torch.randperm(10_000, generator=g)[:5].tolist() for _ in range(250)] * 2
    sets = losses.LabelSets.from_lists(of, 10_000)
    hot = torch.zeros(500, 10_000).index_put((sets.owner, sets.label), torch.ones(len(sets.owner)))
    for loss in (losses.MultiLabelContrastiveLoss(), losses.MulSupConLoss(), losses.JSCLLoss()):
        torch.testing.assert_close(loss(x, sets), loss(x, hot))


@pytest.mark.parametrize(("many", "pairs"), [(0.0, 7), (math.inf, 7), (math.inf, 1 << 20)])
@pytest.mark.parametrize(
    "name", ["MultiLabelContrastiveLoss similarity_dissimilarity", "MSCLoss", "MSCRGLoss 0.5 True", "NWSLoss"]
)
def test_pairs_that_share_labels_in_parts(name, many, pairs, monkeypatch):
    """A few rows at a time are the whole batch, panels are lists."""
    from flashpair.losses.multi_label import label_sets

    monkeypatch.setattr(label_sets, "_PAIRS", pairs)
    monkeypatch.setattr(label_sets, "_MANY", many)
    case = next(c for c in CASES if c.name == name)
    close(evaluate(case.ours, views()), evaluate(case.define, views()), 1e-10)


@pytest.mark.parametrize("given", ["keys", "queue", "empty queue"])
def test_mul_sup_con_references(given, engine):
    """Keys or a queue alone, and a queue that nothing is in yet; no gradient to either."""
    d = moved(views(), torch.float64, support.device(engine))
    loss = losses.MulSupConLoss(reduction=losses.MulSupConReduction.PER_SAMPLE)
    of_queue = multi_label_cases.OF_QUEUE.to(d.x.device)
    if given == "empty queue":
        assert loss(d.x, d.multi_hot, None, d.queue[:0], of_queue[:0]).item() == 0
        return
    queue = d.queue.requires_grad_()
    more = {"keys": d.y} if given == "keys" else {"queue": queue, "queue_labels": of_queue}
    define = multi_label_cases.define_mul_sup_con_queue
    want = evaluate(lambda d: define(d, True, given == "queue", given == "keys"), views())
    close(evaluate(lambda d: loss(d.x, d.multi_hot, **more), d), want, 1e-10)
    assert torch.autograd.grad(loss(d.x, d.multi_hot, **more), [d.y, queue], allow_unused=True) == (None, None)


def test_nws_of_the_batch_itself(engine):
    """Without keys the references are the batch, without gradient; a batch of no negatives is 0."""
    d = moved(views(), torch.float64, support.device(engine))
    loss = losses.NWSLoss(4, 5, multi_label_cases.RELATED, 0.1, 0.7, 0.2)
    loss = multi_label_cases.with_prototypes(loss).to(support.device(engine))
    want = evaluate(lambda d: multi_label_cases.define_nws(d, alone=True), views())
    close(evaluate(lambda d: multi_label_cases.labelled(loss, d), d), want, 1e-10)
    assert loss(d.x, torch.ones(9, 4, device=d.x.device)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nws_of_wholly_related_labels(dtype, engine):
    """A negative of weight 0 is none, even one on top of the anchor, at a temperature where the others are far away."""
    x = torch.ones(16, 1, dtype=dtype, device=support.device(engine))
    hot = torch.zeros(16, 300, dtype=torch.int64, device=x.device)
    for i in range(16):
        hot[i, i * i : i * i + 1 + i] = 1
    loss = losses.NWSLoss(300, 1, torch.ones(300, 300), 0.01, beta=0.3).to(x.device)
    loss.prototypes.data.fill_(-1.0)  # Z = log(labels not had) - 100
    size = hot.sum(1).to(dtype)
    z = torch.log(300 - size) - 100
    want = (((size + 1) * z - 100 + 100 * size) / size).mean()  # positives of weight 1: itself, each of its prototypes
    torch.testing.assert_close(loss(x, hot), want)
    x.requires_grad_()
    assert loss(x, 0 * hot).item() == 0 and torch.autograd.grad(loss(x, 0 * hot), x)[0].eq(0).all()


def test_nws_takes_lists_of_many_labels():
    """Sets of 2000 labels, some of a sample with none, are their multi-hot tensor, whatever is in a panel."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=g).double().requires_grad_()
    of = [torch.randperm(2000, generator=g)[: i % 4].tolist() for i in range(30)] * 2
    sets = losses.LabelSets.from_lists(of, 2000)
    hot = torch.zeros(60, 2000).index_put((sets.owner, sets.label), torch.ones(len(sets.owner)))
    related = torch.rand(2000, 2000, generator=g)
    for kind in NWSAggregation:
        loss = losses.NWSLoss(2000, 8, related, aggregation=kind)
        torch.testing.assert_close(loss(x, sets), loss(x, hot))


@pytest.mark.parametrize("kind", LabelSimilarity)
def test_label_similarity(kind):
    """Two labels that always meet, that never meet, that everybody has, and that nobody has."""
    hot = torch.rand(30, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    hot[:, 1], hot[:, 2], hot[:, 4], hot[:, 5] = hot[:, 0], ~hot[:, 0], False, True
    got, p = label_similarity(hot, kind), hot.double().mean(0).tolist()
    for c in range(7):
        for e in range(7):
            both = (hot[:, c] & hot[:, e]).double().mean().item()
            if c == e:
                want = 1.0
            elif both == 0:
                want = 0.0
            elif kind == LabelSimilarity.JACCARD:
                want = both / (p[c] + p[e] - both)
            else:
                want = max(math.log(both / (p[c] * p[e])) / -math.log(both), 0.0)
            assert abs(got[c, e].item() - want) < 1e-6, (c, e)
    assert torch.equal(got, label_similarity(losses.LabelSets.of("labels", hot, 30, hot.device), kind))
    everybody = torch.ones(3, 2)
    assert torch.equal(label_similarity(everybody, kind), torch.ones(2, 2))
    losses.NWSLoss(7, 5, got)


def test_each_clustering_has_its_gradient_at_once(monkeypatch):
    """While S is kept: the backward pass is none over the pairs, and without gradients there is none at all."""
    if "cpu" not in support.FUSED:
        pytest.skip("the CPU backend keeps S")
    from flashpair import backend_cpu

    d = moved(views(), torch.float32)
    call = lambda: losses.ProtoNCELoss()(d.x, d.clusters, *contrast_cases.centroids(d.x))  # noqa: E731
    with support.forced("cpu"):
        value = call()
        monkeypatch.setattr(backend_cpu, "weights", None)
        value.backward()
        with torch.no_grad():
            assert torch.equal(call(), value.detach())


def test_draws_of_other_centroids():
    """Only centroids of no sample, each once, in the end each of them; all where fewer are left than are wanted."""
    from flashpair.losses.contrast.proto_nce import draw_others

    of, seen = torch.tensor([3, 3, 0, 8]), set()
    for seed in range(40):
        drawn, counts = draw_others(seed, 0, of, 10, 4)
        assert counts.all() and len(set(drawn.tolist())) == 4
        seen |= set(drawn.tolist())
    assert seen == {1, 2, 4, 5, 6, 7, 9}
    assert not torch.equal(draw_others(0, 0, of, 10, 4)[0], draw_others(0, 1, of, 10, 4)[0])
    drawn, counts = draw_others(0, 0, of, 10, 50)
    assert set(drawn[counts].tolist()) == seen and counts.sum() == 7


def test_hybrid_without_its_contrastive_term(monkeypatch):
    """No pass, the same value; what is no embedding is refused, and NaN seen, all the same."""
    d, logits = views(), torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double()
    loss = losses.HybridMultiLabelLoss(contrastive_weight=0.0)
    want = losses.HybridMultiLabelLoss(contrastive_weight=1e-30)(logits, d.x, d.multi_hot)
    monkeypatch.setattr(losses.MultiLabelContrastiveLoss, "forward", None)
    assert torch.equal(loss(logits, d.x, d.multi_hot), want)
    assert loss(logits, d.x * math.nan, d.multi_hot).isnan()
    for bad in (d.x[:3], d.x[0], d.x.long()):
        with pytest.raises((TypeError, ValueError), match="embeddings must"):
            loss(logits, bad, d.multi_hot)


def test_logit_losses():
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randint(2, (6, 5), generator=torch.Generator().manual_seed(0))
    y[0], y[1] = 0, 1
    rows = []
    for logits, labels in zip(z, y, strict=True):
        absent = 1 + sum(v.exp() for v, c in zip(logits, labels, strict=True) if not c)
        present = 1 + sum((-v).exp() for v, c in zip(logits, labels, strict=True) if c)
        rows.append(torch.log(torch.as_tensor(absent)) + torch.log(torch.as_tensor(present)))
    torch.testing.assert_close(losses.ZLPRLoss()(z, y), torch.stack(rows).mean())
    want = multi_label_cases.define_correlation(z, [set(row.nonzero().flatten().tolist()) for row in y])
    got = losses.LabelCorrelationLoss()(z, y)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, z, retain_graph=True)[0] for v in (got, want)))
    assert losses.LabelCorrelationLoss()(z[:0], y[:0]).item() == 0
    assert losses.LabelCorrelationLoss()(z.detach().index_fill(0, torch.tensor([0]), math.inf), y).isnan()
    for clip, power in ((0.0, 2.0), (0.05, 2.0), (0.3, 0.5)):
        p = torch.sigmoid(z)
        q = (p - clip).clamp_min(1e-300)  # so that a power below one has a slope
        want = -torch.where(y.bool(), (1 - p) ** 0.5 * p.log(), q**power * (1 - q).log()).sum() / 6
        got = losses.AsymmetricLoss(power, 0.5, clip)(z, y)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(v, z, retain_graph=True)[0] for v in (got, want)))


def test_preferences():
    """Each kind from its paper; gradients reach the policy only through the margin."""
    g = torch.Generator().manual_seed(0)
    w, b, rw, rb = (torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(4))
    delta = (w - b) - (rw - rb)
    good, bad = torch.sigmoid(0.3 * delta), torch.sigmoid(-0.3 * delta)
    kinds = losses.PreferenceKind
    for kind, smoothing, want in (
        (kinds.SIGMOID, 0.0, -good.log()),
        (kinds.SIGMOID, 0.1, -0.9 * good.log() - 0.1 * bad.log()),
        (kinds.HINGE, 0.0, (1 - 0.3 * delta).clamp_min(0)),
        (kinds.IPO, 0.0, (delta - 1 / 0.6) ** 2),
        (kinds.ROBUST, 0.1, (-0.9 * good.log() + 0.1 * bad.log()) / 0.8),
    ):
        got = losses.PreferenceLoss(kind, 0.3, smoothing)(w, b, rw, rb)
        torch.testing.assert_close(got, want.mean())
        grads = [torch.autograd.grad(v, [w, rb], retain_graph=True) for v in (got, want.mean())]
        torch.testing.assert_close(*grads)


def test_reranking_gradients():
    """The matched choices have the gradients of contrastive training and of supervised fine-tuning."""
    g = torch.Generator().manual_seed(0)
    yes, no = (torch.randn(5, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sign = torch.ones(5, 4, dtype=torch.float64)
    sign[:, 0] = -1
    contrastive = -yes.log_softmax(1)[:, 0].mean()
    tuned = torch.nn.functional.softplus(sign * (yes - no)).sum() / 5
    for name, want in (("CONTRASTIVE", contrastive), ("SFT", tuned)):
        loss = losses.RerankingLoss(losses.RerankingWeight[name], losses.RerankingDirection[name])(yes, no)
        for leaf in (yes, no):
            pair = [torch.autograd.grad(v, leaf, retain_graph=True, allow_unused=True)[0] for v in (loss, want)]
            assert (pair[0] is None) == (pair[1] is None)
            if pair[0] is not None:
                torch.testing.assert_close(*pair)
    flat = losses.RerankingLoss(losses.RerankingWeight.UNIFORM)(yes, no)
    torch.testing.assert_close(torch.autograd.grad(flat, yes)[0], sign / 5)


def test_jscl_sees_nothing_of_samples_that_share_no_label():
    """Not even the one on top of the anchor, at a temperature where the others are far away."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([[1, 0], [1, 0], [0, 1]])
    got = losses.JSCLLoss(0.01)(x, labels)
    # Anchors 0 and 1: log-sum over the other one, at cosine -1, less the mean of both; anchor 2 shares nothing.
    want = ((-100 - (-100 + 100) / 2) + (-100 - (-100 - 100) / 2)) / 3
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


LEARNABLE = {
    "SimCLRLoss": lambda t, d: losses.SimCLRLoss(t)(d.x, d.y),
    "DCLLoss": lambda t, d: losses.DCLLoss(t)(d.x, d.y),
    "HardContrastiveLoss": lambda t, d: losses.HardContrastiveLoss(t, 0.4)(d.x, d.y),
    "MEOWLoss": lambda t, d: losses.MEOWLoss(t)(d.x, d.y, d.clusters),
    "AdaMEOWLoss": lambda t, d: contrast_cases.with_network(losses.AdaMEOWLoss(5, t, 4)).to(d.x.device)(d.x, d.y),
    "SupReMixLoss": lambda t, d: losses.SupReMixLoss(t, 4, mix_negatives=False)(d.x, contrast_cases.ages(d)),
    "RnCLoss": lambda t, d: losses.RnCLoss(t)(d.x, d.targets),
    "NNCLRLoss": lambda t, d: losses.NNCLRLoss(t)(d.x, d.y, d.x, d.z, d.queue),
    "FeatureTransformationLoss": lambda t, d: losses.FeatureTransformationLoss(t, None, None)(d.x, d.y, d.queue),
    # Its factor 2 T takes no gradient.
    "MoCoV3Loss": lambda t, d: losses.MoCoV3Loss(t)(*contrast_cases.keys(d)) / (2 * t.detach()),
    "CWCLLoss": lambda t, d: losses.CWCLLoss()(unit(d.x), unit(d.y), 1 / t, d.frozen),
    "CyCLIPLoss": lambda t, d: losses.CyCLIPLoss()(unit(d.x), unit(d.y), 1 / t),
    "DistillClipLoss": lambda t, d: losses.DistillClipLoss()(unit(d.x), unit(d.y), 1 / t, d.z, d.y, 1.0)[1],
}


@pytest.mark.parametrize("name", LEARNABLE)
def test_gradient_of_the_temperature(name, engine):
    """Against a central difference."""
    d = moved(views(), torch.float64, support.device(engine))
    at = lambda t: LEARNABLE[name](torch.tensor(t, dtype=torch.float64, device=d.x.device), d).item()  # noqa: E731
    t = torch.tensor(0.4, dtype=torch.float64, device=d.x.device, requires_grad=True)
    (got,) = torch.autograd.grad(LEARNABLE[name](t, d), t)
    want = (at(0.4 + 1e-5) - at(0.4 - 1e-5)) / 2e-5
    assert abs(got.item() - want) <= 1e-7 * max(abs(want), 1)


def test_hard_contrastive_leaves_room_for_rounding(engine):
    """Of two negatives that another product may put in the other order, both stay; of two apart, one."""
    eps = torch.finfo(torch.float64).eps
    for apart, kept in ((4 * eps, 2), (64 * eps, 1)):
        x = torch.eye(4, dtype=torch.float64, device=support.device(engine))
        y = x[[0, 3, 3, 3]].clone()
        s = torch.tensor([0.6, 0.6 - apart, -0.8], dtype=torch.float64, device=x.device)
        y[1:, 0], y[1:, 3] = s, (1 - s * s).sqrt()
        loss = losses.HardContrastiveLoss(1.0, fraction=0.3, simple=1.0)  # one negative of three
        x.requires_grad_()
        (slope,) = torch.autograd.grad(loss(x, y), x)
        # The mean over the kept negatives of row 0, less its positive, which is itself.
        want = y[1 : 1 + kept].mean(0)[3] / 4
        torch.testing.assert_close(slope[0, 3], want)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize(("density", "bound"), [(torch.float32, 1e-7), (torch.float64, 1e-10)])
def test_the_table_alone(temperature, density, bound, monkeypatch):
    """In float64 at the density of either dtype: F and its gradients within the stated share of the largest."""
    from flashpair.losses.contrast import mann_whitney

    monkeypatch.setitem(mann_whitney._DENSITY, torch.float64, mann_whitney._DENSITY[density])
    own = 2 * torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    own.requires_grad_()
    s = torch.linspace(-1, 1, 999, dtype=torch.float64, requires_grad=True)
    got = mann_whitney.Interpolated.apply(*mann_whitney.softplus_table(own, temperature), s)
    want = torch.nn.functional.softplus((s[:, None] - own) / temperature, threshold=100).sum(1)
    for a, b in ((got, want), *zip(*(torch.autograd.grad(v.sum(), [s, own]) for v in (got, want)), strict=True)):
        assert ((a - b).abs() <= bound * b.abs().max()).all()


BAD = [
    (lambda x: losses.SimCLRLoss(0.0), ValueError, "temperature"),
    (lambda x: losses.SimCLRLoss(reduction="mean"), TypeError, r"reduction must be one of SimCLRReduction.MEAN"),
    (lambda x: losses.SimCLRLoss()(x, x[:3]), ValueError, "first and second must have equal numbers of rows"),
    (lambda x: losses.SimCLRLoss()(x, x.double()), TypeError, "first and second must have one dtype"),
    (lambda x: losses.DCLWLoss(sigma=-1), ValueError, "sigma"),
    (lambda x: losses.DebiasedContrastiveLoss(tau_plus=1.0), ValueError, "tau_plus must be below 1"),
    (lambda x: losses.HardNegativeContrastiveLoss(beta=-1.0), ValueError, "beta"),
    (lambda x: losses.HardContrastiveLoss(fraction=0.0), ValueError, "fraction"),
    (lambda x: losses.AlignmentLoss(0.0), ValueError, "alpha"),
    (lambda x: losses.UniformityLoss()(x[0]), ValueError, "embeddings must have shape"),
    (lambda x: losses.CyCLIPLoss(cross=math.nan), ValueError, "cross"),
    (lambda x: losses.CWCLLoss("affine"), TypeError, "weight must be one of CWCLWeight.AFFINE"),
    (lambda x: losses.CWCLLoss(bandwidth=0.0), ValueError, "bandwidth must be in"),
    (lambda x: losses.CWCLLoss()(x, x, 1.0, x[:2]), ValueError, "frozen must have 4 rows"),
    (lambda x: losses.MannWhitneyLoss(1e-6), ValueError, "temperature"),
    (lambda x: losses.MannWhitneyLoss()(x, x, x[:, :2]), ValueError, "negatives must have equal features"),
    (lambda x: losses.CACRLoss()(x), ValueError, "views must be at least 2"),
    (lambda x: losses.CACRLoss()(x, x, x[:2]), ValueError, r"views\[2\]"),
    (lambda x: losses.CACRQueueLoss()([x], [x], x), ValueError, "queries and keys must hold as many views, at least 2"),
    (lambda x: losses.CACRQueueLoss()([x, x], [x, x[:2]], x), ValueError, r"queries\[1\] and keys\[1\] must have"),
    (lambda x: losses.CACRQueueLoss()([x, x], [x, x], x[:, :2]), ValueError, "queries and queue must have equal"),
    (lambda x: losses.CACRQueueLoss(negative_temperature=-1.0), ValueError, "negative_temperature"),
    (lambda x: losses.CACRMoCoLoss()([x], [x]), ValueError, "queries must hold at least 2 views, keys at least 1"),
    (lambda x: losses.CACRMoCoLoss()([x, x], []), ValueError, "at most as many; got 2 and 0"),
    (lambda x: losses.CACRMoCoLoss()([x, x], [x, x[:2]]), ValueError, r"queries\[0\] and keys\[1\] must have"),
    (lambda x: losses.CACRMoCoLoss(cost="rbf"), TypeError, "cost must be one of CACRCost.RBF"),
    (lambda x: losses.MECOLoss(0.0), ValueError, "gamma must be in"),
    (lambda x: losses.MECOLoss()(x, x[0]), ValueError, "data must have one dimension"),
    (lambda x: losses.MECOLoss()(x[0], x[0].double()), TypeError, "data and noise must have one dtype"),
    (lambda x: losses.MECOLoss()(x[0], x[0].long()), TypeError, "noise must be one of"),
    (lambda x: losses.MEOWLoss()(x, x, torch.zeros(4).long()), TypeError, "clusters must be int64 of shape"),
    (lambda x: losses.MEOWLoss()(x, x, torch.zeros(2, 3).long()), ValueError, "clusters must have shape"),
    (lambda x: losses.AdaMEOWLoss(3)(x, x), ValueError, "first must have embedding_size=3 features; got 5"),
    (lambda x: losses.AdaMEOWLoss(5, hidden_size=0), ValueError, "hidden_size must be at least 1"),
    (lambda x: losses.ProtoNCELoss()(x, torch.zeros(1, 4).long(), [x], []), ValueError, "one tensor for each of the 1"),
    (
        lambda x: losses.ProtoNCELoss()(x, torch.full((1, 4), 4), [x], [x[:, 0]]), ValueError,
        r"clusters\[0\] must be in \[0, 4\)",
    ),
    (
        lambda x: losses.ProtoNCELoss()(x, torch.zeros(1, 4).long(), [x[:, :2]], [x[:, 0]]), ValueError,
        r"centroids\[0\] must have shape \(centroids, 5\)",
    ),
    (
        lambda x: losses.ProtoNCELoss()(x, torch.zeros(1, 4).long(), [x], [x]), ValueError,
        r"concentrations\[0\] must have shape \(4,\)",
    ),
    (lambda x: losses.ProtoNCELoss()(x, torch.zeros(1, 3).long(), [x], [x[:, 0]]), ValueError, "clusters must have"),
    (
        lambda x: losses.cluster_concentration(x, x, torch.zeros(4).long(), smoothing=1.0), ValueError,
        "smoothing must be in",
    ),
    (lambda x: losses.cluster_concentration(x, x, torch.full((4,), -1)), ValueError, "clusters must be in"),
    (lambda x: losses.SupReMixLoss()(x, torch.zeros(4).int()), TypeError, "labels must be int64"),
    (lambda x: losses.SupReMixLoss()(x, torch.zeros(4, 1)), ValueError, r"labels must have shape \(4,\)"),
    (lambda x: losses.SupReMixLoss(weight="L1"), TypeError, "weight must be one of SupReMixWeight.NONE"),
    (lambda x: losses.SupReMixLoss()(x, torch.zeros(3).long()), ValueError, r"labels must have shape \(4,\)"),
    (lambda x: losses.SupReMixLoss(gap=-1), ValueError, "gap must be in"),
    (lambda x: losses.SupReMixLoss(beta=0.0), ValueError, "beta must be in"),
    (lambda x: losses.RnCLoss()(x, torch.zeros(4).long()), TypeError, "targets must be a floating-point tensor"),
    (lambda x: losses.RnCLoss()(x, torch.zeros(3)), ValueError, r"targets must have shape \(4,\)"),
    (lambda x: losses.NNCLRLoss()(x, x, x, x, x[:0]), ValueError, "support must have at least one row"),
    (lambda x: losses.NNCLRLoss()(x, x, x, x[:2], x), ValueError, "first and second_prediction must have equal"),
    (lambda x: losses.MoCoV3Loss()(x, x, x, x[:2]), ValueError, "first_query and second_key must have equal"),
    (lambda x: losses.CoCaLoss(2.0, 1.0)(x, x, x, x.long(), 1.0), ValueError, "logits must have shape"),
    (lambda x: losses.MEOWLoss()(x, x, torch.zeros(0, 4).long()), ValueError, "clusters must hold at least one"),
    (lambda x: losses.MultiViewSupConLoss()(x), ValueError, "features must have shape"),
    (lambda x: losses.MultiViewSupConLoss(contrast_mode="both"), ValueError, "contrast_mode must be 'all' or 'one'"),
    (
        lambda x: losses.MultiViewSupConLoss()(x[:, None], torch.zeros(4).long(), torch.eye(4).bool()), ValueError,
        "labels and mask exclude each other",
    ),
    (lambda x: losses.FeatureTransformationLoss(positive_alpha=0.0), ValueError, "positive_alpha"),
    (lambda x: losses.FeatureTransformationLoss()(x, x, x[:, :2]), ValueError, "queue must have equal features"),
    (lambda x: losses.MACLLoss(alpha=1.0), ValueError, r"alpha \* \(1 \+ A_0\) must be below 1"),
    (lambda x: losses.MultipleNegativesRankingLoss()([x]), ValueError, "embeddings must hold at least 2 columns"),
    (lambda x: losses.MultipleNegativesRankingLoss()([x, x[:2]]), ValueError, r"embeddings\[1\]"),
    (lambda x: losses.MultipleNegativesRankingLoss()([{}, {}]), ValueError, "model must be given"),
    (lambda x: losses.MultipleNegativesRankingLoss(directions=["doc_to_doc"]), ValueError, "directions must be"),
    (lambda x: losses.MultipleNegativesRankingLoss(partition_mode="all"), ValueError, "partition_mode must be one of"),
    (lambda x: losses.MultipleNegativesRankingLoss(hardness_mode="all"), ValueError, "hardness_mode must be one of"),
    (lambda x: losses.GISTEmbedLoss()([x, x], [x]), ValueError, "the same two or more columns; got 2 and 1"),
    (lambda x: losses.GISTEmbedLoss()([x, x], [x, x[:2]]), ValueError, r"guide_embeddings\[1\] must have 4 rows"),
    (lambda x: losses.GISTEmbedLoss(margin_strategy="none"), ValueError, "margin_strategy must be one of"),
    (lambda x: losses.CoSENTLoss()([x, x]), TypeError, "labels must be a tensor"),
    (lambda x: losses.CoSENTLoss()([x, x], torch.zeros(3)), ValueError, "labels must hold 4 numbers"),
    (lambda x: losses.CoSENTLoss()([x, x, x], torch.zeros(4)), ValueError, "embeddings must hold 2 columns; got 3"),
    (lambda x: losses.MarginMSELoss()([x, x], torch.zeros(4)), ValueError, "embeddings must hold at least 3 columns"),
    (lambda x: losses.MarginMSELoss()([x, x, x], torch.zeros(4, 2)), ValueError, r"labels must have shape \(4, 1\)"),
    (lambda x: losses.EmbeddingDistillationLoss()([x, x, x]), TypeError, "labels must be a floating-point tensor"),
    (
        lambda x: losses.EmbeddingDistillationLoss()([x, x, x], torch.zeros(4, 3)), ValueError,
        r"labels must have shape \(4, 2\); got \(4, 3\)",
    ),
    (lambda x: losses.EmbeddingDistillationLoss(kind="kl_div"), TypeError, "kind must be one of DistillationKind"),
    (lambda x: losses.EmbeddingDistillationLoss(temperature=0.0), ValueError, "temperature"),
    (lambda x: losses.GISTEmbedLoss(max_score=math.nan), ValueError, "max_score must not be NaN"),
    (lambda x: losses.ADRMSELoss(alpha=0.0), ValueError, "alpha must be in"),
    (lambda x: losses.MatryoshkaLoss(losses.SimCLRLoss(), []), ValueError, "matryoshka_dims must be one or more"),
    (lambda x: losses.MatryoshkaLoss(losses.SimCLRLoss(), [9])(x, x), ValueError, "at least 9 features"),
    (lambda x: losses.DistillClipLoss()(x, x, 1.0, x[:2], x[:2], 1.0), ValueError, "dist_image_features must have 4"),
    (lambda x: losses.MulSupConLoss()(x, torch.zeros(3, 2)), ValueError, r"labels must be LabelSets or a multi-hot"),
    (lambda x: losses.MulSupConLoss()(x, torch.full((4, 2), 2)), ValueError, "labels must hold 0 and 1 only"),
    (lambda x: losses.MultiLabelContrastiveLoss("jaccard"), TypeError, "weight must be one of LabelWeight.ALL"),
    (lambda x: losses.MSCLoss(3, 5)(x, torch.zeros(4, 2)), ValueError, "labels must have num_labels=3 columns"),
    (lambda x: losses.LabelSets.from_lists([[0, 3]], 3), ValueError, r"labels\[0\] must be different numbers"),
    (lambda x: losses.MulSupConLoss()(x, torch.zeros(4, 2), x[:3]), ValueError, "embeddings and keys must have equal"),
    (lambda x: losses.MulSupConLoss()(x, torch.zeros(4, 2), x, x), ValueError, "queue and queue_labels must be given"),
    (
        lambda x: losses.MulSupConLoss()(x, torch.zeros(4, 2), x, x, torch.zeros(4, 3)), ValueError,
        "queue_labels must have 2 columns as labels; got 3",
    ),
    (
        lambda x: losses.MulSupConLoss()(x, torch.zeros(4, 2), x, x, torch.zeros(3, 2)), ValueError,
        "queue_labels must be LabelSets or a multi-hot",
    ),
    (lambda x: losses.NWSLoss(3, 5, torch.eye(2)), ValueError, r"label_similarity must be floating point of shape \(3"),
    (lambda x: losses.NWSLoss(3, 5, 2 * torch.eye(3)), ValueError, r"label_similarity must lie in \[0, 1\]"),
    (lambda x: losses.NWSLoss(3, 5, torch.eye(3), alpha=2.0), ValueError, "alpha"),
    (lambda x: losses.NWSLoss(3, 5, torch.eye(3), aggregation="max"), TypeError, "aggregation must be one of NWSAggr"),
    (lambda x: label_similarity(x[0]), ValueError, "labels must be LabelSets or a multi-hot tensor of"),
    (lambda x: label_similarity(2 * torch.ones(4, 2)), ValueError, "labels must hold 0 and 1 only"),
    (lambda x: label_similarity(torch.ones(4, 2), "npmi"), TypeError, "kind must be one of LabelSimilarity.JACCARD"),
    (lambda x: losses.ProtoNCELoss(-1), ValueError, "negatives must be at least 0"),
    (lambda x: losses.NWSLoss(2, 5, torch.eye(2))(x, torch.zeros(4, 3)), ValueError, "labels must have num_labels=2"),
    (
        lambda x: losses.NWSLoss(2, 5, torch.eye(2))(x, torch.zeros(4, 2), None, x, torch.zeros(4, 2)), ValueError,
        "keys must be given where queue is",
    ),
    (lambda x: losses.LabelCorrelationLoss()(x, torch.zeros(4, 2)), ValueError, "labels must be multi-hot of shape"),
    (lambda x: losses.HybridMultiLabelLoss(-torch.ones(5)), ValueError, "class_weights must be finite"),
    (lambda x: losses.HybridMultiLabelLoss(torch.ones(3))(x, x, torch.zeros(4, 5)), ValueError, "logits must have 3"),
    (lambda x: losses.HybridMultiLabelLoss(bce_weight=-1.0), ValueError, "bce_weight"),
    (lambda x: losses.HybridMultiLabelLoss(contrastive=losses.ZLPRLoss()), TypeError, "contrastive must be a"),
    (lambda x: losses.HybridMultiLabelLoss()(x, x[:3], torch.zeros(4, 5)), ValueError, "labels must be LabelSets or"),
    (lambda x: losses.ZLPRLoss()(x, torch.zeros(4, 2)), ValueError, "labels must be multi-hot of shape"),
    (lambda x: losses.RankNetLoss()(x, x), TypeError, "scores must be a 1-D"),
    (lambda x: losses.RankNetLoss()(x[:, 0], x[:3, 0]), ValueError, r"targets must have shape \(4,\)"),
    (lambda x: losses.ListNetLoss()(x[:, 0], x[:, 0], torch.zeros(3).long()), ValueError, "lists must have shape"),
    (lambda x: losses.ComparisonLoss("thurstone"), TypeError, "model must be one of ComparisonModel.THURSTONE"),
    (lambda x: losses.LambdaLoss(k=0), ValueError, "k must be at least 1"),
    (lambda x: losses.UNIQUELoss(-0.1), ValueError, "margin must be in"),
    (lambda x: losses.UNIQUELoss()(x[:, 0], x[:3, 1], x[:, 0], x[:, 1]), ValueError, r"^deviations must have shape"),
    (lambda x: losses.UNIQUELoss()(x[:, 0], x[:, 1], x[:, 0], x[:3, 1]), ValueError, "target_deviations must have"),
    (lambda x: losses.compare_to_score(x), ValueError, r"comparisons must have shape \(items, items\)"),
    (lambda x: losses.compare_to_score(x[:, :4].long()), TypeError, "comparisons must be one of"),
    (lambda x: losses.compare_to_score(x[:, :4], "thurstone"), TypeError, "model must be one of ComparisonModel"),
    (lambda x: losses.compare_to_score(x[:, :4].abs(), iterations=0), ValueError, "iterations must be at least 1"),
    (lambda x: losses.compare_to_score(x[:, :4].abs(), highest=0.0), ValueError, "highest must be in"),
    (lambda x: losses.PreferenceLoss(losses.PreferenceKind.IPO, 0.1, 0.1), ValueError, "label_smoothing must be 0"),
    (lambda x: losses.PreferenceLoss()(*x[:3], x[3, :2]), ValueError, "reference_rejected must have 5 entries"),
    (lambda x: losses.RerankingLoss()(x, x[:2]), ValueError, "yes and no must have one shape"),
    (lambda x: losses.AMCLLoss()([x], [x, x], x, x), ValueError, "first and second must hold as many heads"),
    (lambda x: losses.AMCLLoss(2.0, 1.0), ValueError, "temperature_max"),
    (lambda x: losses.SimLAPLoss()(x, x, torch.zeros(4), torch.zeros(4).long()), TypeError, "labels must be int64"),
    (lambda x: losses.temperature_diagnostics(x[:1], x[:1], 0.1), ValueError, "first must have at least 2 rows"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call(torch.randn(4, 5))


@pytest.mark.parametrize("name", ["SimCLRLoss", "CWCLLoss", "RankNetLoss", "MultipleNegativesRankingLoss joint"])
def test_compiles_as_one_graph(name):
    case = next(c for c in CASES if c.name == name)
    d, loss = views(b=16), case.make(None)
    want = evaluate(lambda d: case.call(loss, d), d)
    compiled = torch.compile(lambda d: case.call(loss, d), fullgraph=True, backend="aot_eager")
    got = evaluate(compiled, views(b=16))
    torch._dynamo.reset()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_narrow_dtypes(case, dtype, engine):
    """The loss of the rounded embeddings; what is computed of them before the loss is called is rounded too."""
    if not support.serves(engine, dtype):
        pytest.skip(f"{engine} does not serve {dtype}")
    rounded = Views(*(v.detach().to(dtype).requires_grad_() for v in (views().x, views().y)))
    torch.manual_seed(7)  # for the losses that draw
    want = case.define(moved(rounded, torch.float64))
    torch.manual_seed(7)
    device = support.device(engine)
    d = moved(rounded, dtype, device)
    got = case.ours(d)
    assert got.dtype == torch.float32
    rows = rounded.x.detach().double()
    size = max(abs(want.item()), 1.0) * max(rows.abs().max().item(), 1.0)
    assert abs(got.double().cpu() - want) <= 16 * torch.finfo(dtype).eps * size
    (grad,) = torch.autograd.grad(got, d.x)
    assert grad.dtype == dtype and grad.isfinite().all()
