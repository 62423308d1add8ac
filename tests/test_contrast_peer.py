"""Values and gradients equal to those of lightly, open_clip and sentence-transformers, and where theirs differ.

The peers' modules are read from their files: their packages want torchvision and transformers, which no loss needs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from unittest import mock

import pytest
import torch
from loss_cases import open_clip_losses
from retrieval_cases import columns, guides
from views import evaluate, unit, views

from flashpair import losses


def package(distribution: str, *names: str, **stubs: types.ModuleType):
    """Modules of an installed distribution whose `__init__` files do not run; `stubs` take the place of others."""
    try:
        root = importlib.metadata.distribution(distribution).locate_file("")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed (pip install --no-deps {distribution})")
    bare = {}
    for name in names:
        bare[name] = types.ModuleType(name)
        bare[name].__path__ = [str(root / name.replace(".", "/"))]
    return mock.patch.dict(sys.modules, {**bare, **{k.replace("__", "."): v for k, v in stubs.items()}})


def stub(name: str, **attributes) -> types.ModuleType:
    found = types.ModuleType(name)
    found.__dict__.update(attributes)
    return found


@pytest.fixture(scope="module")
def lightly():
    with package("lightly", "lightly", "lightly.loss", "lightly.utils"):
        return {name: importlib.import_module(f"lightly.loss.{name}") for name in ("dcl_loss", "macl_loss")}


def cos_sim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return unit(a) @ unit(b).T


@pytest.fixture(scope="module")
def sentence_transformers():
    """The losses' own code; the library's helpers for models, ranks and cosines are stubs."""
    base = "sentence_transformers"
    names = (
        base,
        f"{base}.base",
        f"{base}.base.losses",
        f"{base}.sentence_transformer",
        f"{base}.sentence_transformer.losses",
        f"{base}.cross_encoder",
        f"{base}.cross_encoder.losses",
    )
    nothing = type("Nothing", (), {})
    util = stub(
        f"{base}.util", cos_sim=cos_sim, all_gather_with_grad=None, get_rank=lambda: 0, similarity_fct_name=str,
        batch_to_device=lambda batch, device: batch, fullname=str,
        pairwise_cos_sim=lambda a, b: (unit(a) * unit(b)).sum(1),
    )  # fmt: skip
    stubs = {
        f"{base}__util": util,
        f"{base}__base__losses__merged_forward": stub("merged", embed_columns=lambda model, features: model(features)),
        f"{base}__sentence_transformer__model": stub("model", SentenceTransformer=nothing),
        f"{base}__sentence_transformer__modules": stub("modules", StaticEmbedding=nothing),
        "transformers": stub("transformers", PreTrainedTokenizerBase=nothing),
    }
    with package("sentence-transformers", *names, **stubs):
        sys.modules[base].util = util
        of = lambda name: importlib.import_module(f"{base}.sentence_transformer.losses.{name}")  # noqa: E731
        sys.modules[f"{base}.cross_encoder"].CrossEncoder = nothing
        found = {"adr_mse": importlib.import_module(f"{base}.cross_encoder.losses.adr_mse")}
        names = "multiple_negatives_ranking", "gist_embed", "cosent"
        if importlib.util.find_spec("tqdm") is not None:
            names += "cached_multiple_negatives_ranking", "cached_gist_embed"
        return found | {name: of(name) for name in names}


def same(ours, peer, bound: float = 1e-10, **how) -> None:
    got, want = evaluate(ours, views(**how)), evaluate(peer, views(**how))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=bound, atol=bound)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_decoupled(lightly, temperature):
    peer = lightly["dcl_loss"]
    same(lambda d: losses.DCLLoss(temperature)(d.x, d.y), lambda d: peer.DCLLoss(temperature)(d.x, d.y))
    same(lambda d: losses.DCLWLoss(temperature, 0.3)(d.x, d.y), lambda d: peer.DCLWLoss(temperature, 0.3)(d.x, d.y))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.3, "alpha": 0.2, "A_0": 0.1}])
def test_macl(lightly, options):
    peer = lightly["macl_loss"].MACLLoss(**options)
    same(lambda d: losses.MACLLoss(**options)(d.x, d.y), lambda d: peer(d.x, d.y))


def test_co_ca():
    """Both parts, captions with padding."""
    logits = torch.randn(9, 6, 11, generator=torch.Generator().manual_seed(0)).double()
    tokens = torch.randint(0, 11, (9, 6), generator=torch.Generator().manual_seed(1))
    call = lambda loss, d: loss(unit(d.x), unit(d.y), logits, tokens, 7.0)  # noqa: E731
    ours, peer = losses.CoCaLoss(2.0, 0.5), open_clip_losses().CoCaLoss(2.0, 0.5)
    for part in (0, 1):
        d = views()
        torch.testing.assert_close(call(ours, d)[part], call(peer, d)[part])
    same(lambda d: sum(call(ours, d)), lambda d: sum(call(peer, d)))
    named = ours(unit(d.x), unit(d.y), logits, tokens, 7.0, output_dict=True)
    assert set(named) == {"contrastive_loss", "caption_loss"}
    assert losses.CoCaLoss(2.0, 0.0)(unit(d.x), unit(d.y), logits, tokens, 7.0)[0].item() == 0


def test_distill_clip():
    peer = open_clip_losses().DistillClipLoss()
    call = lambda loss, d: loss(unit(d.x), unit(d.y), 7.0, d.z.detach()[:, :3], d.y.detach()[:, :3], 2.0)  # noqa: E731
    for part in (0, 1):
        same(lambda d: call(losses.DistillClipLoss(), d)[part], lambda d: call(peer, d)[part])  # noqa: B023


@pytest.mark.parametrize("partition", ["joint", "per_direction"])
@pytest.mark.parametrize("hardness", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize(
    "directions",
    [("query_to_doc",), ("query_to_doc", "doc_to_query"), ("query_to_doc", "query_to_query", "doc_to_doc")],
)
def test_multiple_negatives(sentence_transformers, directions, hardness, partition):
    if partition == "per_direction" and "doc_to_doc" in directions:
        for loss in (losses, sentence_transformers["multiple_negatives_ranking"]):
            with pytest.raises(ValueError, match="partition_mode"):
                loss.MultipleNegativesRankingLoss(None, directions=directions, partition_mode=partition)
        return
    options = {
        "directions": directions, "partition_mode": partition, "hardness_mode": hardness,
        "hardness_strength": 4.0 if hardness else 0.0,
    }  # fmt: skip
    peer = sentence_transformers["multiple_negatives_ranking"].MultipleNegativesRankingLoss(None, **options)
    ours = losses.MultipleNegativesRankingLoss(**options)
    for count in (2, 4):
        same(
            lambda d: ours.compute_loss_from_embeddings(columns(d)[:count], None),  # noqa: B023
            lambda d: peer.compute_loss_from_embeddings(columns(d)[:count], None),  # noqa: B023
        )


@pytest.mark.parametrize(("strategy", "margin"), [("absolute", 0.0), ("absolute", 0.2), ("relative", 0.3)])
@pytest.mark.parametrize("contrast", [True, False])
def test_gist_embed(sentence_transformers, strategy, margin, contrast):
    module = sentence_transformers["gist_embed"]
    for count in (2, 3):
        peer = object.__new__(module.GISTEmbedLoss)
        torch.nn.Module.__init__(peer)
        peer.temperature, peer.margin_strategy, peer.margin = 0.05, strategy, margin
        peer.contrast_anchors = peer.contrast_positives = contrast
        peer.gather_across_devices = peer.must_retokenize = False
        peer.similarity_fct, peer.cross_entropy_loss = torch.nn.CosineSimilarity(-1), torch.nn.CrossEntropyLoss()
        ours = losses.GISTEmbedLoss(0.05, strategy, margin, contrast, contrast)

        def of_peer(d, peer=peer, count=count):
            peer.model, peer.guide = lambda f: columns(d)[:count], lambda f: guides(d, count)
            return peer([{}] * count, None)

        same(lambda d: ours(columns(d)[:count], guides(d, count)), of_peer)  # noqa: B023


class Embedder(torch.nn.Module):
    """A model of sentence-transformers, as far as its cached losses look at it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        start = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)).double()
        self.weight = torch.nn.Parameter(start)

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": torch.tanh(features["input_ids"].double() @ self.weight)}


@pytest.mark.parametrize("name", ["multiple_negatives_ranking", "gist_embed"])
def test_in_a_cached_loss(sentence_transformers, name):
    """Gradients of the parameters, the library's loss on top of its gradient cache and ours in its place."""
    pytest.importorskip("tqdm")
    columns_of = [
        {"input_ids": torch.randint(-2, 3, (8, 7), generator=torch.Generator().manual_seed(k))} for k in range(3)
    ]
    module = sentence_transformers[f"cached_{name}"]
    model, guide = Embedder(0), Embedder(1)
    if name == "gist_embed":
        peer = object.__new__(module.CachedGISTEmbedLoss)
        torch.nn.Module.__init__(peer)
        peer.model, peer.guide, peer.temperature, peer.margin_strategy, peer.margin = model, guide, 0.1, "absolute", 0.1
        peer.contrast_anchors = peer.contrast_positives = True
        peer.gather_across_devices = peer.must_retokenize = peer.show_progress_bar = False
        peer.mini_batch_size, peer.mini_batch_num_tokens = 3, None
        peer.similarity_fct, peer.cross_entropy_loss = torch.nn.CosineSimilarity(-1), torch.nn.CrossEntropyLoss()
        ours = losses.GISTEmbedLoss(0.1, margin=0.1)
    else:
        with mock.patch.object(module, "has_static_embedding_input", return_value=False):
            peer = module.CachedMultipleNegativesRankingLoss(model, scale=5.0, mini_batch_size=3)
        ours = losses.MultipleNegativesRankingLoss(scale=5.0)
    found = []
    for calculate in (peer.calculate_loss, ours.calculate_loss):
        peer.calculate_loss, model.weight.grad = calculate, None
        with torch.no_grad():
            value = peer([dict(c) for c in columns_of], None)
        loss = peer([dict(c) for c in columns_of], None)
        (2 * loss).backward()
        assert loss.item() == pytest.approx(value.item())
        found.append((loss.detach(), model.weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_adr_mse(sentence_transformers):
    """Lists of three lengths, with equal labels."""
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = [torch.tensor(v) for v in ([2.0, 2.0, 0.0, 1.0], [1.0, 0.0], [0.0, 0.0, 3.0])]
    peer = object.__new__(sentence_transformers["adr_mse"].ADRMSELoss)
    torch.nn.Module.__init__(peer)
    peer.alpha, peer.activation_fn, peer.mini_batch_size = 0.7, torch.nn.Identity(), -1
    peer.model = mock.Mock(return_value={"scores": scores}, device="cpu", preprocess=lambda pairs, **how: pairs)
    want = peer([["q"] * 3, [["d"] * len(of) for of in labels]], labels)
    lists = torch.repeat_interleave(torch.arange(3), torch.tensor([len(of) for of in labels]))
    got = losses.ADRMSELoss(0.7)(scores, torch.cat(labels), lists)
    for a, b in ((got, want), *zip(*(torch.autograd.grad(v, scores) for v in (got, want)), strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_co_sent(sentence_transformers):
    module = sentence_transformers["cosent"]
    peer = module.CoSENTLoss(None, scale=5.0, similarity_fct=lambda a, b: (unit(a) * unit(b)).sum(1))
    same(
        lambda d: losses.CoSENTLoss(scale=5.0)([d.x, d.y], d.targets),
        lambda d: peer.compute_loss_from_embeddings([d.x, d.y], d.targets),
    )


def test_a_sentence_model():
    """Features go through the model, as a trainer of sentence-transformers calls a loss."""
    model = lambda features: {"sentence_embedding": features["input_ids"].float() @ torch.eye(5)[:3]}  # noqa: E731
    loss = losses.MultipleNegativesRankingLoss()
    loss.model = model
    features = [{"input_ids": torch.randint(9, (6, 3), generator=torch.Generator().manual_seed(k))} for k in (0, 1)]
    want = losses.MultipleNegativesRankingLoss()([model(f)["sentence_embedding"] for f in features])
    assert torch.equal(loss(features, None), want)
