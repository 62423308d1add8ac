"""Losses over the logits of classes against their definitions on the dense softmax, in float64."""

# ruff: noqa: F811

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from head_cases import D64, backend, check  # noqa: F401

from flashpair import heads


def leaves(rows=6, features=4, classes=9, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(200 + seed)
    x = spread * torch.randn(rows, features, dtype=D64, generator=g)
    weight = torch.randn(classes, features, dtype=D64, generator=g)
    labels = torch.randint(0, classes, (rows,), generator=g)
    return x.requires_grad_(), weight.requires_grad_(), labels


def own_probability(z, labels):
    return z.softmax(1)[torch.arange(len(z)), labels]


# --- functions of the cross-entropy -----------------------------------------------------------------------------------


def jensen_shannon(p, pi):
    """Of distributions, not of their closed form."""
    n = p.shape[0]
    total = []
    for i in range(n):
        one = torch.stack([torch.ones((), dtype=D64), torch.zeros((), dtype=D64)])
        other = torch.stack([p[i], 1 - p[i]])
        mixture = pi * one + (1 - pi) * other

        def kl(a, b):
            return sum(x * torch.log(x / y) for x, y in zip(a, b, strict=True) if float(x.detach()) > 0)

        total.append((pi * kl(one, mixture) + (1 - pi) * kl(other, mixture)) / (-(1 - pi) * math.log(1 - pi)))
    return torch.stack(total)


PHI = {
    "tau 0": (lambda: heads.CompSum(0.0), lambda p: 1 / p - 1),
    "tau 0.5": (lambda: heads.CompSum(0.5), lambda p: ((1 / p) ** 0.5 - 1) / 0.5),
    "tau 1": (lambda: heads.CompSum(1.0), lambda p: -p.log()),
    "tau 1.5": (lambda: heads.CompSum(1.5), lambda p: ((1 / p) ** -0.5 - 1) / -0.5),
    "tau 3": (lambda: heads.CompSum(3.0), lambda p: ((1 / p) ** -2 - 1) / -2),
    "gce": (lambda: heads.GeneralizedCrossEntropy(0.7), lambda p: (1 - p**0.7) / 0.7),
    "gce truncated": (
        lambda: heads.GeneralizedCrossEntropy(0.7, 0.3),
        lambda p: torch.where(p > 0.3, (1 - p**0.7) / 0.7, (1 - 0.3**0.7) / 0.7),
    ),
    "mae": (heads.MeanAbsoluteError, lambda p: 1 - p),
    "focal": (lambda: heads.Focal(2.0), lambda p: -((1 - p) ** 2) * p.log()),
    "aul": (lambda: heads.AUL(1.5, 0.9), lambda p: ((1.5 - p) ** 0.9 - 0.5**0.9) / 0.9),
    "agce": (lambda: heads.AGCE(1.0, 2.0), lambda p: (2.0**2 - (1 + p) ** 2) / 2),
    "sce": (lambda: heads.SymmetricCrossEntropy(0.3, 0.7), lambda p: -0.3 * p.log() + 0.7 * 4 * (1 - p)),
    "js": (lambda: heads.JensenShannon(0.3), lambda p: jensen_shannon(p, 0.3)),
}


@pytest.mark.parametrize("name", PHI)
def test_phi_of_the_own_probability(name, backend):
    formula, phi = PHI[name]
    x, weight, labels = leaves()
    bias = torch.randn(9, dtype=D64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    expected = phi(own_probability(x @ weight.T + bias, labels)).mean()
    check(heads.class_loss(x, weight, labels, bias=bias, formula=formula()), expected, (x, weight, bias))


@pytest.mark.parametrize("name", PHI)
@pytest.mark.parametrize("gap", [-60.0, -20.0, 0.0, 20.0, 60.0])
def test_float32_keeps_small_losses_and_finite_gradients(name, gap, backend):
    """From hopeless to learned; against the definition with p and 1 - p exact in high precision."""
    formula, _ = PHI[name]
    z = torch.tensor([[gap, 0.0]], requires_grad=True)
    loss = heads.class_loss(z, torch.eye(2), torch.tensor([0]), formula=formula())
    wide = torch.tensor([[gap, 0.0]], dtype=D64, requires_grad=True)
    truth = heads.class_loss(wide, torch.eye(2, dtype=D64), torch.tensor([0]), formula=formula())
    torch.testing.assert_close(loss.double(), truth, rtol=2e-5, atol=1e-37)
    (gradient,), (exact,) = torch.autograd.grad(loss, z), torch.autograd.grad(truth, wide)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.double(), exact, rtol=2e-5, atol=1e-37)


def test_tau_meets_cross_entropy_in_the_limit(backend):
    x, weight, labels = leaves()
    near = heads.class_loss(x, weight, labels, formula=heads.CompSum(1 + 1e-9))
    torch.testing.assert_close(near, F.cross_entropy(x @ weight.T, labels), rtol=1e-8, atol=1e-8)


def test_normalized_cross_entropy(backend):
    x, weight, labels = leaves()
    logs = (x @ weight.T).log_softmax(1)
    expected = (logs[torch.arange(6), labels] / logs.sum(1)).mean()
    check(heads.class_loss(x, weight, labels, formula=heads.NormalizedCrossEntropy()), expected, (x, weight))


def test_the_public_mae_of_ldr_is_zero_whatever_the_logits():
    """It sums onehot - softmax, which is 1 - 1; ours is half of the sum of absolute values."""
    z, y = torch.randn(5, 7, dtype=D64), torch.arange(5)
    public = (F.one_hot(y, 7).double() - z.softmax(1)).sum(1)
    torch.testing.assert_close(public, torch.zeros(5, dtype=D64), atol=1e-14, rtol=0)
    half = (F.one_hot(y, 7).double() - z.softmax(1)).abs().sum(1) / 2
    ours = heads.class_loss(z, torch.eye(7, dtype=D64), y, formula=heads.MeanAbsoluteError(), reduction="none")
    torch.testing.assert_close(ours, half, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PHI)
def test_class_weights_multiply_the_row(name, backend):
    formula, phi = PHI[name]
    x, weight, labels = leaves()
    v = torch.rand(9, dtype=D64)
    rows = v[labels] * phi(own_probability(x @ weight.T, labels))
    found = heads.class_loss(x, weight, labels, formula=formula(), class_weight=v)
    torch.testing.assert_close(found, rows.sum() / v[labels].sum(), rtol=1e-10, atol=1e-10)


# --- spherical family ------------------------------------------------------------------------------------------------


def standardized(z):
    return (z - z.mean(1, keepdim=True)) / z.var(1, unbiased=False, keepdim=True).sqrt()


SPHERICAL = {
    "z": (
        lambda: heads.SphericalZLoss(0.7, 1.5),
        lambda z, y: F.softplus(0.7 * (1.5 - standardized(z)[torch.arange(len(z)), y])) / 0.7,
    ),
    "taylor": (
        heads.TaylorSoftmax,
        lambda z, y: -((1 + z + z**2 / 2) / (1 + z + z**2 / 2).sum(1, keepdim=True)).log()[torch.arange(len(z)), y],
    ),
    "spherical": (
        lambda: heads.SphericalSoftmax(0.1),
        lambda z, y: -((z**2 + 0.1) / (z**2 + 0.1).sum(1, keepdim=True)).log()[torch.arange(len(z)), y],
    ),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("path", ["gram", "streaming", "chosen", "class_loss"])
@pytest.mark.parametrize("name", SPHERICAL)
def test_spherical_family(name, path, normalize, backend):
    formula, dense = SPHERICAL[name]
    x, weight, labels = leaves()
    units = (F.normalize(x), F.normalize(weight)) if normalize else (x, weight)
    expected = dense(3.0 * units[0] @ units[1].T, labels).mean()
    if path == "class_loss":
        found = heads.class_loss(x, weight, labels, formula=formula(), scale=3.0, normalize=normalize)
    else:
        gram = {"gram": True, "streaming": False, "chosen": None}[path]
        found = heads.spherical_loss(x, weight, labels, formula=formula(), scale=3.0, normalize=normalize, gram=gram)
    check(found, expected, (x, weight))


def test_spherical_family_with_a_bias(backend):
    x, weight, labels = leaves()
    bias = torch.randn(9, dtype=D64).requires_grad_()
    expected = SPHERICAL["z"][1](x @ weight.T + bias, labels).mean()
    found = heads.class_loss(x, weight, labels, bias=bias, formula=SPHERICAL["z"][0]())
    check(found, expected, (x, weight, bias))


@pytest.mark.parametrize("gram", [True, False])
def test_the_variance_does_not_cancel_in_float32(gram, backend):
    """Logits of mean 1000 and deviation 1: E[z²] - E[z]² would lose everything."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 4, generator=g) * 0.5
    weight[:, 0] = 1000.0
    x = torch.randn(8, 4, generator=g)
    x[:, 0] = 1.0
    labels = torch.arange(8)
    truth = heads.spherical_loss(x.double(), weight.double(), labels, gram=True)
    found = heads.spherical_loss(x, weight, labels, gram=gram)
    assert abs(float(found) - float(truth)) < 2e-3 * float(truth)
    z = x @ weight.T
    naive = (z**2).mean(1) - z.mean(1) ** 2
    assert ((naive / z.double().var(1, unbiased=False) - 1).abs() > 0.02).any()


def test_rows_without_a_class_count_for_nothing_in_the_gram_path(backend):
    x, weight, labels = leaves()
    labels[1] = -100
    kept = labels >= 0
    found = heads.spherical_loss(x, weight, labels, gram=True)
    torch.testing.assert_close(found, heads.spherical_loss(x[kept], weight, labels[kept], gram=True))


# --- label-distributionally robust losses -----------------------------------------------------------------------------


def worst_distribution(a, k, temperature):
    """max_p Σ p a - λ KL(p | uniform), p <= 1/k, by bisection on the threshold of p = min(1/k, exp(a/λ - t))."""
    low, high = a.min() / temperature - 60, a.max() / temperature + 60
    for _ in range(200):
        middle = (low + high) / 2
        mass = torch.minimum(torch.exp(a / temperature - middle), torch.tensor(1 / k, dtype=D64)).sum()
        low, high = (middle, high) if mass > 1 else (low, middle)
    p = torch.minimum(torch.exp(a / temperature - low), torch.tensor(1 / k, dtype=D64))
    value = (p * a).sum() - temperature * torch.where(p > 0, p * (p * len(a)).log(), 0.0).sum()
    return float(value), p


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_ldr_kl(temperature, margin, backend):
    x, weight, labels = leaves()
    bias = torch.randn(9, dtype=D64).requires_grad_()
    f = x @ weight.T + bias
    gaps = f - f[torch.arange(6), labels][:, None] + margin * (1 - F.one_hot(labels, 9).double())
    expected = (temperature * ((gaps / temperature).exp().mean(1)).log()).mean()
    found = heads.ldr_kl_loss(x, weight, labels, temperature=temperature, margin=margin, bias=bias)
    check(found, expected, (x, weight, bias))


@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 5.0])
def test_ldr_top_k(k, temperature, backend):
    """Against the maximiser over p itself; by the envelope theorem ∂/∂a is that p."""
    x, weight, labels = leaves()
    found = heads.ldr_top_k_loss(x, weight, labels, k=k, temperature=temperature, margin=0.4, reduction="none")
    f = (x @ weight.T).detach()
    gaps = f - f[torch.arange(6), labels][:, None] + 0.4 * (1 - F.one_hot(labels, 9).double())
    slopes = torch.zeros(6, 9, dtype=D64)
    for i in range(6):
        value, p = worst_distribution(gaps[i], k, temperature)
        assert abs(float(found[i].detach()) - value) < 1e-9
        slopes[i] = p - F.one_hot(labels[i], 9)
    gx, gw = torch.autograd.grad(found.sum(), (x, weight))
    torch.testing.assert_close(gx, slopes @ weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gw, slopes.T @ x, rtol=1e-8, atol=1e-8)


def test_ldr_top_k_with_ties(backend):
    """Rivals that tie with the k-th are counted, and only once."""
    x = torch.ones(1, 1, dtype=D64)
    weight = torch.tensor([[0.0], [1.0], [1.0], [1.0], [-1.0]], dtype=D64)
    found = heads.ldr_top_k_loss(x, weight, torch.tensor([0]), k=2)
    value, _ = worst_distribution(weight[:, 0], 2, 1.0)
    assert abs(float(found) - value) < 1e-12


def test_aldr_kl(backend):
    """Three steps on two samples, one of them twice."""
    loss_of = heads.ALDRKLLoss(5, margin=0.1, lambda0=1.5, alpha=2.0).double()
    lambdas = torch.full((5,), 1.5, dtype=D64)
    log_c = math.log(9)
    for step, ids in enumerate(([3, 1, 0, 4, 2, 3][:5], [1, 0, 4, 3, 2], [3, 1, 0, 4, 2])):
        x, weight, labels = leaves(rows=5, seed=step)
        ids = torch.tensor(ids)
        z = x @ weight.T
        f = z / z.abs().mean(1, keepdim=True)
        with torch.no_grad():
            p = (f / lambdas[ids][:, None]).softmax(1)
            divergence = (p * (p * 9).log()).sum(1)
            new = 1.5 * (1 - divergence / (2.0 * log_c))
            lambdas[ids] = new
        gaps = f - f[torch.arange(5), labels][:, None] + 0.1 * (1 - F.one_hot(labels, 9).double())
        rows = new * (gaps / new[:, None]).exp().mean(1).log() - 2.0 * log_c / 3.0 * (new - 1.5) ** 2
        check(loss_of(x, weight, labels, ids), rows.mean(), (x, weight))
        torch.testing.assert_close(loss_of.lambdas, lambdas)
    with pytest.raises(ValueError, match="ids must be in"):
        loss_of(x, weight, labels, torch.tensor([0, 1, 2, 3, 5]))


# --- distillation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["softmax", "binary", "gap"])
def test_distillation(name, biased, backend):
    x, weight, _ = leaves()
    g = torch.Generator().manual_seed(3)
    u, v = (torch.randn(n, 3, dtype=D64, generator=g, requires_grad=True) for n in (6, 9))
    bias = torch.randn(9, dtype=D64, generator=g, requires_grad=True) if biased else None
    teacher_bias = torch.randn(9, dtype=D64, generator=g) if biased else None
    T = 1.7
    s, t = x @ weight.T, u.detach() @ v.detach().T
    if biased:
        s, t = s + bias, t + teacher_bias
    if name == "softmax":
        function, p, q = heads.distillation_loss, (t / T).softmax(1), (s / T).softmax(1)
        rows = (p * (p / q).log()).sum(1)
    else:
        p, q = torch.sigmoid(t / T), torch.sigmoid(s / T)
        if name == "gap":
            p, q = torch.full_like(t, 0.5), torch.sigmoid((s - t) / T)
        function = heads.binary_distillation_loss if name == "binary" else heads.binary_gap_distillation_loss
        rows = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    found = function(x, weight, u, v, bias=bias, teacher_bias=teacher_bias, temperature=T)
    wanted = (x, weight, bias) if biased else (x, weight)
    check(found, T**2 * rows.mean(), wanted)
    assert torch.autograd.grad(found, (u, v), allow_unused=True) == (None, None) if found.requires_grad else True


def test_distillation_in_several_blocks(monkeypatch):
    """The same, with the classes cut into blocks."""
    from flashpair.heads import streaming

    x, weight, _ = leaves()
    g = torch.Generator().manual_seed(3)
    u, v = (torch.randn(n, 3, dtype=D64, generator=g) for n in (6, 9))
    whole = heads.distillation_loss(x, weight, u, v)
    monkeypatch.setattr(streaming, "_blocks", lambda columns, step: [slice(i, min(i + 2, 9)) for i in range(0, 9, 2)])
    check(heads.distillation_loss(x, weight, u, v), whole, (x, weight))


def test_distillation_refuses_what_does_not_match():
    x, weight = torch.randn(4, 3), torch.randn(9, 3)
    with pytest.raises(ValueError, match="teacher_x must have as many rows"):
        heads.distillation_loss(x, weight, torch.randn(5, 2), torch.randn(9, 2))
    with pytest.raises(ValueError, match="teacher_weight must have the classes"):
        heads.distillation_loss(x, weight, torch.randn(4, 2), torch.randn(8, 2))
    with pytest.raises(ValueError, match="temperature"):
        heads.binary_distillation_loss(x, weight, x, weight, temperature=0.0)


# --- random and metric losses, perturbations -------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, -0.5])
def test_ens_loss(power):
    """The weights are the gradient: a draw, sorted as the margins are, tails cut."""
    z = torch.tensor([0.3, -2.0, 5.0, 1.2, -0.1], dtype=D64, requires_grad=True)
    loss = heads.ens_loss(z, power=power, generator=torch.Generator().manual_seed(1), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, z)
    r = torch.randn(5, dtype=D64, generator=torch.Generator().manual_seed(1))
    drawn = sorted(-math.exp(v) if power == 0 else -max(1 + power * v, 0.0) ** (1 / power) if 1 + power * v > 0
                   else (-math.inf if power < 0 else -0.0) for v in r.tolist())  # fmt: skip
    expected = [0.0] * 5
    for rank, i in enumerate(sorted(range(5), key=lambda i: float(z[i].detach()))):
        g = max(drawn[rank], -1.0)
        expected[i] = (g / float(z[i].detach()) if float(z[i].detach()) > 1 else g) - 1e-6
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=D64), rtol=1e-10, atol=1e-12)
    assert (gradient < 0).all()


def test_ens_loss_on_the_margins_of_a_head(backend):
    x, weight, labels = leaves()
    logits = heads.class_logits(x, weight, labels)
    heads.ens_loss(logits.target - logits.rivals).backward()
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("metric", ["accuracy", "f_beta", "g_mean", "balanced_accuracy"])
def test_any_loss(metric):
    """With decisions that are certain it is one minus the metric of the confusion matrix."""
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1])
    sure = torch.tensor([9.0, 9, -9, -9, -9, 9, -9, 9], dtype=D64)
    tp, fn, fp, tn = 3, 1, 1, 3
    true = {
        "accuracy": (tp + tn) / 8,
        "f_beta": 5 * tp / (5 * tp + 4 * fn + fp),
        "g_mean": math.sqrt(tp / (tp + fn) * tn / (tn + fp)),
        "balanced_accuracy": (tp / (tp + fn) + tn / (tn + fp)) / 2,
    }[metric]
    assert abs(float(heads.any_loss(sure, labels, metric, beta=2.0, sharpness=200.0)) - (1 - true)) < 1e-6
    logits = torch.randn(8, dtype=D64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: heads.any_loss(v, labels, metric, beta=2.0, sharpness=5.0), (logits,))
    for one_class in (torch.ones(8), torch.zeros(8)):
        loss = heads.any_loss(logits, one_class, metric)
        assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_the_public_gradient_of_the_g_mean_is_four_times_ours():
    """d(1 - sqrt(u)) = -u' / (2 sqrt(u)); the hand-written one has 2 in the place of 1/2."""
    logits = torch.randn(8, dtype=D64, requires_grad=True)
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1])
    (ours,) = torch.autograd.grad(heads.any_loss(logits, labels, "g_mean", sharpness=5.0), logits)
    decision = torch.sigmoid(5.0 * (torch.sigmoid(logits) - 0.5))
    y = labels.double()
    u = (y * decision).sum() / 4 * (4 - ((1 - y) * decision).sum()) / 4
    (slope,) = torch.autograd.grad(u, logits)
    public = -2 * slope / u.detach().sqrt()
    torch.testing.assert_close(public, 4 * ours, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0])
def test_smooth_adversarial_comp_sum(tau, backend):
    x, weight, labels = leaves()
    moved = (x.detach() + 0.3 * torch.randn_like(x)).requires_grad_()
    total = 0.0
    for i in range(6):
        z, e = x[i] @ weight.T / 0.8, (moved[i] - x[i]) @ weight.T
        y = int(labels[i])
        others = [j for j in range(9) if j != y]
        u = sum(torch.exp(z[j] - z[y]) for j in others)
        phi = torch.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
        total = total + phi + 0.6 * sum((e[y] - e[j]) ** 2 for j in others).sqrt()
    found = heads.smooth_adversarial_comp_sum_loss(x, moved, weight, labels, tau=tau, rho=0.8, nu=0.6)
    check(found, total / 6, (x, moved, weight))
    still = heads.smooth_adversarial_comp_sum_loss(x, x, weight, labels)
    assert all(g.isfinite().all() for g in torch.autograd.grad(still, (x, weight)))


TWO = torch.ones(1, 1), torch.ones(2, 1), torch.tensor([0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: heads.CompSum(-1.0), "tau"),
        (lambda: heads.GeneralizedCrossEntropy(0.0), "q"),
        (lambda: heads.GeneralizedCrossEntropy(0.5, 1.5), "truncation"),
        (lambda: heads.Focal(-1.0), "gamma"),
        (lambda: heads.AUL(a=1.0), "a must be"),
        (lambda: heads.JensenShannon(1.0), "pi"),
        (lambda: heads.SymmetricCrossEntropy(log_zero=1.0), "log_zero"),
        (lambda: heads.SphericalZLoss(a=0.0), "a must be"),
        (lambda: heads.ldr_kl_loss(*TWO, temperature=0.0), "temperature"),
        (lambda: heads.ldr_top_k_loss(*TWO, k=2), "k must be"),
        (lambda: heads.any_loss(torch.ones(2), torch.ones(2), "recall"), "metric"),
        (lambda: heads.any_loss(torch.ones(2), torch.ones(3)), "labels"),
        (lambda: heads.ALDRKLLoss(10, alpha=0.5), "alpha"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
