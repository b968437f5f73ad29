"""Guided dropout, Gaussian dropout and R-Drop: what they do in a pass, and that nothing of it is left behind."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from architectures import Computing, entry
from conftest import Case, batched, built, case, untouched
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fisherscope.finetune.methods import r_drop
from fisherscope.finetune.methods.gaussian_dropout import GaussianDropout
from fisherscope.finetune.methods.guided_dropout import GuidedDropout, guided_rates
from fisherscope.finetune.methods.r_drop import RDrop, divergence
from fisherscope.finetune.parts import rates_set
from fisherscope.finetune.regularizer import METHODS, Composed, Regularizer
from fisherscope.finetune.run import Run
from fisherscope.models import DropoutSite, backbone_prefix, dropout_sites
from fisherscope.objectives import Predictions, predict
from fisherscope.scores import FisherScores

FAMILIES = ("BERT", "GPT-2", "T5", "BART")
OF_LANGUAGE = {"BERT": "masked LM", "GPT-2": "causal LM", "T5": "seq2seq LM", "BART": "seq2seq LM"}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def applied(method: Regularizer, model: nn.Module) -> Any:
    return method.applied_to(model, optimizer_of(model))


def rates(model: nn.Module) -> dict[str, float]:
    return {site.name: site.rate for site in dropout_sites(model, backbone_only=False)}


def head_sites(model: nn.Module) -> list[DropoutSite]:
    inside = {site.name for site in dropout_sites(model)}
    return [site for site in dropout_sites(model, backbone_only=False) if site.name not in inside]


def drawn_scores(model: nn.Module, seed: int = 0) -> FisherScores:
    """Scores of many sizes for every parameter, under the names that the model has."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {name: 10 ** float(torch.randn((), generator=draw)) for name, _ in model.named_parameters()}
    tensors = {
        name: size * torch.rand(model.get_parameter(name).shape, generator=draw, dtype=torch.float64)
        for name, size in sizes.items()
    }
    return FisherScores(tensors, 8, provenance={"model": {"prefix": backbone_prefix(model)}})


def scores_by_site(model: nn.Module, values: list[float]) -> FisherScores:
    """Scores for which every site has the score that is asked for."""
    wanted = {name: value for site, value in zip(dropout_sites(model), values, strict=True) for name in site.parameters}
    tensors = {name: torch.full(p.shape, wanted.get(name, 3.0)) for name, p in model.named_parameters()}
    return FisherScores({name: t.double() for name, t in tensors.items()}, 8)


def base_shaped() -> nn.Module:
    """A narrow model with the twelve layers of BERT-base, and a classification head."""
    return built("bert-classifier", num_hidden_layers=12)


def outputs(made: Case, seed: int = 0) -> Tensor:
    """Losses of the first batch, from a seed of the global generator."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return predict(made.model, batched(made.examples, 4)[0], made.objective).losses().total


def test_a_rate_that_the_configuration_writes_as_a_whole_number_is_one():
    whole, real = (entry("BART", "classification", attention_dropout=zero).model for zero in (0, 0.0))
    assert rates(whole) == rates(real)
    assert len(rates(whole)) > len([rate for rate in rates(whole).values() if rate]) > 0


# Guided dropout: the rates


def test_the_37_sites_of_a_model_shaped_like_bert_base_get_the_published_rates():
    model = base_shaped()
    found = sorted((site.rate for site in guided_rates(drawn_scores(model), model)), reverse=True)
    assert len(found) == 37
    assert found == pytest.approx([0.099 - 0.00275 * k for k in range(37)])
    assert (sum(found), sum(found) / 37) == (pytest.approx(1.8315), pytest.approx(0.0495))
    assert (found[0], found[-1]) == (0.099, 0.0)


def test_the_score_of_a_site_is_the_plain_mean_over_its_parameters_of_their_means():
    model = built("bert-classifier")
    scores = drawn_scores(model)
    layer = "bert.encoder.layer.1"
    blocks = {
        "bert.embeddings.dropout": [
            *(f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")),
            *(f"bert.embeddings.LayerNorm.{part}" for part in ("weight", "bias")),
        ],
        f"{layer}.attention.self.dropout": [
            f"{layer}.attention.self.{kind}.{part}" for kind in ("query", "key", "value") for part in ("weight", "bias")
        ],
        f"{layer}.attention.output.dropout": [
            f"{layer}.attention.output.{kind}.{part}" for kind in ("dense", "LayerNorm") for part in ("weight", "bias")
        ],
        f"{layer}.output.dropout": [
            f"{layer}.output.{kind}.{part}" for kind in ("dense", "LayerNorm") for part in ("weight", "bias")
        ],
    }
    found = {site.name: site.score for site in guided_rates(scores, model)}
    for name, parameters in blocks.items():
        assert found[name] == pytest.approx(sum(float(scores[p].mean()) for p in parameters) / len(parameters))


def test_the_lowest_score_gets_the_highest_rate_and_ties_go_in_the_order_of_the_modules():
    model = built("bert")
    sites = guided_rates(scores_by_site(model, [5.0, 1.0, 2.0, 2.0, 9.0, 0.5, 2.0]), model, highest=0.6)
    assert [site.rate for site in sites] == pytest.approx([0.1, 0.5, 0.4, 0.3, 0.0, 0.6, 0.2])
    assert [site.name for site in sites] == [site.name for site in dropout_sites(model)]


def test_by_score_rates_are_linear_in_the_scores():
    model = built("bert")
    scores = scores_by_site(model, [5.0, 1.0, 2.0, 2.0, 9.0, 1.0, 7.0])
    found = [site.rate for site in guided_rates(scores, model, highest=0.5, lowest=0.1, by="score")]
    assert found == pytest.approx([0.3, 0.5, 0.45, 0.45, 0.1, 0.5, 0.2])


@pytest.mark.parametrize("by", ["rank", "score"])
def test_rates_follow_the_scores_when_layers_change_places(by: Any):
    model = base_shaped()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()

    def moved(name: str) -> str:
        parts = name.split(".")
        return ".".join([*parts[:3], str(order[int(parts[3])]), *parts[4:]]) if name.count("layer.") else name

    scores = drawn_scores(model)
    exchanged = FisherScores({moved(name): t for name, t in scores.items()}, 8)
    before, after = ({s.name: s.rate for s in guided_rates(g, model, by=by)} for g in (scores, exchanged))
    assert before != after
    assert {moved(name): rate for name, rate in before.items()} == after


@pytest.mark.parametrize("change", [lambda s: 7.5 * s, lambda s: s**3, math.log1p, math.exp])
def test_rates_by_rank_stay_under_every_increasing_transform_of_the_scores(change: Callable[[float], float]):
    model = base_shaped()
    values = torch.rand(37, generator=torch.Generator().manual_seed(2), dtype=torch.float64).tolist()
    before = guided_rates(scores_by_site(model, values), model)
    after = guided_rates(scores_by_site(model, [change(value) for value in values]), model)
    assert [site.rate for site in before] == [site.rate for site in after]


def test_rates_by_score_stay_when_the_loss_is_rescaled():
    model = base_shaped()
    scores = drawn_scores(model)
    scaled = FisherScores({name: 49 * t for name, t in scores.items()}, 8)
    before, after = ([s.rate for s in guided_rates(g, model, by="score")] for g in (scores, scaled))
    assert before == pytest.approx(after)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_a_language_model_guide_a_classifier_of_the_same_backbone(family: str):
    language, classifier = entry(family, OF_LANGUAGE[family]).model, entry(family, "classification").model
    scores = drawn_scores(language)

    def guided(model: nn.Module) -> list[tuple[str, float, float]]:
        prefix = backbone_prefix(model)
        return [(s.name.removeprefix(prefix), s.score, s.rate) for s in guided_rates(scores, model)]

    assert guided(language) == guided(classifier)
    assert len({rate for _, _, rate in guided(classifier)}) == len(dropout_sites(classifier)) > 4


def test_a_parameter_without_scores_is_left_out_of_the_mean_of_its_site():
    model = built("bert")
    scores, name = drawn_scores(model), "bert.encoder.layer.0.output.dense.weight"
    fewer = FisherScores({n: t for n, t in scores.items() if n != name}, 8, provenance=scores.provenance)
    site = next(s for s in guided_rates(fewer, model) if s.name == "bert.encoder.layer.0.output.dropout")
    kept = [n for n in scores if n.startswith("bert.encoder.layer.0.output.") and n != name]
    assert site.score == pytest.approx(sum(float(scores[n].mean()) for n in kept) / 3)


@pytest.mark.parametrize("by", ["rank", "score"])
def test_a_site_alone_gets_the_highest_rate(by: Any):
    model = Computing(lambda m, x: m.drop(m.layer(x)), layer=nn.Linear(2, 2), drop=nn.Dropout())
    (site,) = guided_rates(drawn_scores(model), model, by=by)
    assert (site.name, site.rate) == ("drop", 0.099)


# Guided dropout: the block


def test_the_rates_are_in_the_model_for_the_block_and_the_classifier_keeps_its_own():
    model = built("bert-classifier", classifier_dropout=0.3)
    method = GuidedDropout(drawn_scores(model), highest=0.2)
    before = rates(model)
    with untouched(model), applied(method, model):
        inside = rates(model)
        assert inside == {site.name: site.rate for site in method.sites(model)} | {"dropout": 0.3}
        assert inside != before
    assert rates(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_rates_are_restored_exactly_after_an_exception(family: str):
    model = entry(family, "classification").model
    for number, site in enumerate(dropout_sites(model)):
        site.set_rate(0.01 * number)
    before = rates(model)
    with pytest.raises(KeyError), applied(GuidedDropout(drawn_scores(model)), model):
        assert rates(model) != before
        raise KeyError
    assert rates(model) == before


@pytest.mark.parametrize("family", (*FAMILIES, "DeBERTa", "XLNet", "Llama", "ViT"))
def test_two_passes_in_training_are_equal_when_every_site_has_rate_0(family: str):
    """Rates that modules hand to functions are sites too, else attention would go on dropping."""
    made = entry(family, {"ViT": "image classification"}.get(family, "classification"))
    made.model.train()
    method = GuidedDropout(drawn_scores(made.model), highest=0.0)
    for site in dropout_sites(made.model):
        site.set_rate(0.4)
    heads = [
        s
        for s in dropout_sites(made.model, backbone_only=False)
        if s.name not in {x.name for x in method.sites(made.model)}
    ]
    with rates_set(heads, [0.0] * len(heads)):
        assert not torch.equal(outputs(made, 0), outputs(made, 1))
        with applied(method, made.model):
            assert torch.equal(outputs(made, 0), outputs(made, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_rate_everywhere_is_dropout_as_it_is_bit_for_bit(family: str):
    made = entry(family, "classification")
    made.model.train()
    plain = [0.1] * len(dropout_sites(made.model))
    with rates_set(dropout_sites(made.model), plain):
        before = outputs(made)
    with applied(GuidedDropout(drawn_scores(made.model), highest=0.1, lowest=0.1), made.model):
        assert torch.equal(outputs(made), before)


def test_guided_dropout_changes_nothing_in_eval_mode():
    made = case("bert-classifier")
    before = outputs(made)
    with applied(GuidedDropout(drawn_scores(made.model)), made.model):
        assert torch.equal(outputs(made), before)


def test_guided_dropout_says_in_one_line_what_it_does(caplog: pytest.LogCaptureFixture):
    model = base_shaped()
    with caplog.at_level(logging.INFO, "fisherscope"), applied(GuidedDropout(drawn_scores(model)), model):
        pass
    assert caplog.messages == ["Guided dropout: 37 sites, rates from 0.099 to 0."]


def test_guided_dropout_takes_the_scores_of_the_run():
    language, model = built("bert"), built("bert-classifier")
    scores = drawn_scores(language)
    run = Run(model, [], "classification", 10, scores=scores)  # pyright: ignore[reportArgumentType]
    method: Any = GuidedDropout.for_run(run, highest=0.2)
    assert method.sites(model) == guided_rates(scores, model, highest=0.2)


def test_the_settings_of_the_methods_are_their_fields_but_for_the_scores():
    names = ("guided-dropout", "gaussian-dropout", "r-drop")
    found = {name: {key: p.default for key, p in METHODS[name].settings().items()} for name in names}
    assert found == {
        "guided-dropout": {"highest": 0.099, "lowest": 0.0, "by": "rank"},
        "gaussian-dropout": {"rate": 0.1, "variant": "matched"},
        "r-drop": {"weight": 1.0},
    }


def test_what_cannot_guide_is_refused_in_a_sentence(unchecked: None):
    model, other = built("bert"), built("bert", hidden_size=16)
    scores = drawn_scores(model)
    lacking = FisherScores({n: t for n, t in scores.items() if "layer.1.attention.self" not in n}, 8)
    for draw, sentence in (
        (lambda: guided_rates(scores, nn.Linear(2, 2)),
         "Guided dropout needs a model with dropout, but a Linear has none to guide."),
        (lambda: guided_rates(drawn_scores(other), model),
         "shape (99, 16) there but (99, 32) in the model."),
        (lambda: guided_rates(lacking, model),
         "The scores have no parameter of the dropout site 'bert.encoder.layer.1.attention.self.dropout'; take scores "
         "of a model with the same backbone."),
        (lambda: GuidedDropout(scores, highest=1.0),
         "Rates must have 0 <= lowest <= highest < 1, got lowest 0 and highest 1."),
        (lambda: GuidedDropout(scores, lowest=0.2),
         "Rates must have 0 <= lowest <= highest < 1, got lowest 0.2 and highest 0.099."),
        (lambda: GuidedDropout(scores, by="size"),  # pyright: ignore[reportArgumentType]
         "by must be 'rank' or 'score', got 'size'."),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            draw()
        assert str(caught.value).endswith(sentence)


# Gaussian dropout


def dropping(rate: float = 0.1) -> nn.Module:
    """A model that only drops."""
    return Computing(lambda m, x: m.drop(x), drop=nn.Dropout(rate), unused=nn.Linear(1, 1)).train()


def noise_of(model: nn.Module, size: int = 10**6) -> Tensor:
    return model(torch.full((size,), 2.0, dtype=torch.float64)) / 2


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_gaussian_noise_has_mean_1_and_the_variance_of_dropout(rate: float):
    """Srivastava et al. 2014, section 10: p / (1 - p), for p = 0.1 it is 0.11111."""
    model, variance = dropping(), rate / (1 - rate)
    with applied(GaussianDropout(rate), model):
        noise = noise_of(model)
    assert noise.mean() == pytest.approx(1, abs=5 * math.sqrt(variance / noise.numel()))
    assert noise.var() == pytest.approx(variance, abs=5 * variance * math.sqrt(2 / noise.numel()))
    skew, kurtosis = (((noise - 1) / math.sqrt(variance)) ** power for power in (3, 4))
    assert skew.mean() == pytest.approx(0, abs=5 * math.sqrt(15 / noise.numel()))
    assert kurtosis.mean() == pytest.approx(3, abs=5 * math.sqrt(96 / noise.numel()))


@pytest.mark.parametrize("is_training", [True, False])
def test_published_noise_has_deviation_p_over_1_minus_p_and_stays_on_in_eval_mode(is_training: bool):
    model = dropping().train(is_training)
    with applied(GaussianDropout(variant="published"), model):
        noise = noise_of(model)
    assert noise.std() == pytest.approx(1 / 9, abs=5 / 9 * math.sqrt(1 / (2 * noise.numel())))
    assert noise.mean() == pytest.approx(1, abs=5 / 9 / math.sqrt(noise.numel()))


@pytest.mark.parametrize("family", FAMILIES)
def test_gaussian_dropout_changes_nothing_in_eval_mode(family: str):
    made = entry(family, "classification")
    before = outputs(made)
    with untouched(made.model), applied(GaussianDropout(), made.model):
        assert torch.equal(outputs(made), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_noise_reaches_attention_in_eval_mode_too(family: str):
    made = entry(family, "classification")
    plain = outputs(made)
    with applied(GaussianDropout(variant="published"), made.model):
        weights = attention_of(made, seed=0)
    sums = weights.sum(-1)
    assert (sums - 1).abs().max() > 0.01  # of probabilities themselves they would be 1
    assert torch.equal(outputs(made), plain)


def test_the_gradient_of_gaussian_dropout_has_the_multiplier_of_the_forward_pass():
    model = dropping()
    x = torch.linspace(1, 2, 50, dtype=torch.float64, requires_grad=True)
    with applied(GaussianDropout(), model):
        y = model(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (y / x).detach())


def _first_attention(model: nn.Module) -> str:
    """The first site that drops attention probabilities."""
    names = [site.name for site in dropout_sites(model)]
    return next(
        n for n in names if any(word in n for word in ("attention.self", "attn_dropout", "SelfAttention", "self_attn"))
    )


def attention_of(made: Case, seed: int) -> Tensor:
    """The probabilities of the first attention as its values are weighted by them, dropout included."""
    batch = {k: v for k, v in batched(made.examples, 5)[0].items() if k in ("input_ids", "attention_mask")}
    if made.model.config.is_encoder_decoder:  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        batch["decoder_input_ids"] = batch["input_ids"]
    torch.manual_seed(seed)
    with torch.no_grad():
        found: Any = made.model.base_model(**batch, output_attentions=True)  # pyright: ignore[reportCallIssue]
    return (found.get("attentions") or found.get("encoder_attentions"))[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_probabilities_get_gaussian_noise_though_no_module_drops_them(family: str):
    made = entry(family, "classification")
    made.model.train()
    sites, name = dropout_sites(made.model), _first_attention(made.model)
    with applied(GaussianDropout(), made.model):
        with rates_set(sites, [0.0] * len(sites)):
            plain = attention_of(made, 0)
        with rates_set(sites, [0.5 * (site.name == name) for site in sites]):
            noisy = torch.stack([attention_of(made, seed) for seed in range(40)])
    noise = (noisy / plain)[:, plain > 0]
    assert noise.mean() == pytest.approx(1, abs=5 / math.sqrt(noise.numel()))
    assert noise.var() == pytest.approx(1, abs=5 * math.sqrt(2 / noise.numel()))
    assert len(noise.unique()) > 0.99 * noise.numel()  # of dropout it would be 0 and 2


@pytest.mark.parametrize("family", FAMILIES)
def test_rate_0_is_no_dropout_at_all_bit_for_bit(family: str):
    made = entry(family, "classification")
    heads = [
        s for s in dropout_sites(made.model, backbone_only=False) if not s.name.startswith(backbone_prefix(made.model))
    ]
    plain = outputs(made)
    made.model.train()
    with rates_set(heads, [0.0] * len(heads)), applied(GaussianDropout(0.0), made.model):
        assert torch.equal(outputs(made), plain)


def test_the_dropout_of_the_head_stays_as_it_is():
    made = case("bert-classifier", classifier_dropout=0.5)
    made.model.train()
    seen: list[Tensor] = []
    made.model.get_submodule("dropout").register_forward_hook(lambda _, args, out: seen.append(out / args[0]))
    with applied(GaussianDropout(), made.model):
        outputs(made)
    assert set(seen[0].flatten().tolist()) == {0.0, 2.0}


def test_two_methods_that_take_the_place_of_dropout_are_refused():
    guided = GuidedDropout(drawn_scores(case("bert").model))
    with pytest.raises(ValueError, match=r"^gaussian-dropout cannot be combined with guided-dropout: both"):
        Composed([GaussianDropout(), guided])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["matched", "published"])
def test_gaussian_dropout_leaves_nothing_behind_after_an_exception(family: str, variant: Any):
    made = entry(family, "classification")
    made.model.train()
    before, kind = rates(made.model), made.model.config._attn_implementation  # pyright: ignore
    seen: list[str] = []
    site = dropout_sites(made.model)[-1].holder

    def fail(module: nn.Module, *_: Any) -> None:
        seen.append(made.model.config._attn_implementation)  # pyright: ignore
        raise KeyError

    handle = made.model.get_submodule(site).register_forward_pre_hook(fail)
    with untouched(made.model), pytest.raises(KeyError), applied(GaussianDropout(0.3, variant), made.model):
        assert {site.rate for site in dropout_sites(made.model)} == {0.3}
        assert made.model.config._attn_implementation == kind  # pyright: ignore
        outputs(made)
    handle.remove()
    assert seen == ["eager"]
    assert rates(made.model) == before and made.model.config._attn_implementation == kind == "sdpa"  # pyright: ignore
    assert not any("forward" in vars(module) for module in made.model.modules())


def test_what_has_no_gaussian_dropout_is_refused_in_a_sentence():
    def fused(m: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=m.drop.p)

    checkpointing = built("bert")
    vars(next(checkpointing.children()))["gradient_checkpointing"] = True
    attending = Computing(fused, drop=nn.Dropout(), layer=nn.Linear(2, 2))
    x = torch.ones(1, 1, 2, 2)
    for model, sentence in (
        (nn.Linear(2, 2), "Gaussian dropout needs a model with dropout, but a Linear has none."),
        (checkpointing, "Gaussian dropout cannot be had with gradient checkpointing, which would compute activations "
         "again with other noise; turn it off."),
        (attending, "Gaussian dropout cannot reach the fused attention that this model calls by itself; take a model "
         "whose attention can be 'eager'."),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught, applied(GaussianDropout(), model):
            model(x)
        assert str(caught.value) == sentence
    with pytest.raises(ValueError, match="at least 0 and below 1, got 1"):
        GaussianDropout(1.0)
    with pytest.raises(ValueError, match="variant must be 'matched' or 'published', got 'other'"):
        GaussianDropout(variant="other")  # pyright: ignore[reportArgumentType]


# R-Drop


@contextmanager
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Predictions]]:
    """The predictions of all second passes in the block."""
    seen: list[Predictions] = []

    def recorded(*given: Any) -> Predictions:
        seen.append(predict(*given))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(r_drop, "predict", recorded)
        yield seen


def published(first: Predictions, second: Predictions, weight: float) -> list[Tensor]:
    """The objective of every example, term by term."""
    losses = []
    for b in range(len(first.labels)):
        total = torch.zeros((), dtype=torch.float64)
        for t in range(first.labels.shape[1]):
            label = first.labels[b, t]
            if first.kind == "gaussian":
                f, g = first.outputs[b, t], second.outputs[b, t]
                total = total + ((f - label) ** 2 + (g - label) ** 2) / 2 + weight * (f - g) ** 2
            elif int(label) >= 0:
                p, q = first.outputs[b, t].softmax(-1), second.outputs[b, t].softmax(-1)
                there, back = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
                total = total - (p[label].log() + q[label].log()) / 2 + weight * (there + back) / 2
        losses.append(total)
    return losses


@pytest.mark.parametrize("name", ["bert-classifier", "bert-regressor", "bert", "gpt2", "t5"])
def test_the_loss_of_r_drop_is_the_mean_of_two_passes_plus_both_divergences(name: str, monkeypatch: pytest.MonkeyPatch):
    made = case(name)
    made.model.train()
    batch = batched(made.examples, 4)[0]
    first = predict(made.model, batch, made.objective)
    with passes(monkeypatch) as seen:
        term = RDrop(0.7).penalty(made.model, batch, first)
    assert term is not None and term.shape == (4,)
    ours = first.losses().total + term
    theirs = torch.stack(published(first, seen[0], 0.7))
    torch.testing.assert_close(ours, theirs)
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad(loss.sum(), parameters, retain_graph=True, allow_unused=True) for loss in (ours, theirs)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def categorical(logits: list[float]) -> Predictions:
    return Predictions(
        "categorical", torch.tensor([[logits]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.long)
    )


def test_the_divergence_of_even_odds_and_three_to_one_is_an_eighth_of_ln_3():
    a, b = categorical([0.0, 0.0]), categorical([math.log(3), 0.0])
    assert float(divergence(a, b)) == pytest.approx(math.log(3) / 8)
    assert float(divergence(b, a)) == pytest.approx(math.log(3) / 8)
    assert float(divergence(a, a)) == 0.0


def test_for_near_logits_the_divergence_is_half_the_fisher_form_of_the_softmax():
    logits, step = [0.3, -1.0, 2.0], torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    p = torch.tensor(logits, dtype=torch.float64).softmax(0)
    fisher = p.diag() - p[:, None] * p
    for size, tolerance in ((1e-2, 1e-1), (1e-4, 1e-3)):
        near = categorical([value + size * float(d) for value, d in zip(logits, step, strict=True)])
        assert float(divergence(categorical(logits), near)) / size**2 == pytest.approx(
            float(step @ fisher @ step) / 2, rel=tolerance
        )


def test_the_second_pass_drops_other_activations_and_the_generator_goes_on_as_if_it_had_not_been(
    monkeypatch: pytest.MonkeyPatch,
):
    made = case("bert-classifier")
    made.model.train()
    batch = batched(made.examples, 4)[0]
    torch.manual_seed(3)
    plain = [predict(made.model, batch, made.objective).outputs for _ in range(3)]
    torch.manual_seed(3)
    firsts = []
    with passes(monkeypatch) as seen:
        for _ in range(3):
            firsts.append(predict(made.model, batch, made.objective))
            RDrop().penalty(made.model, batch, firsts[-1])
    assert all(torch.equal(a, b.outputs) for a, b in zip(plain, firsts, strict=True))
    different = {tuple(p.outputs.flatten().tolist()) for p in (*firsts, *seen)}
    assert len(different) == 6


def test_the_numbers_of_the_second_pass_come_again_nowhere():
    """Else the next first pass would drop what the second one did, a few places further on."""
    with r_drop._other_draws(torch.device("cpu")):
        inside = torch.rand(1000, dtype=torch.float64)
    after = torch.rand(2000, dtype=torch.float64)
    assert not set(inside.tolist()) & set(after.tolist())


def test_weight_0_is_one_pass_and_no_term(monkeypatch: pytest.MonkeyPatch):
    made = case("bert-classifier", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = batched(made.examples, 4)[0]
    with passes(monkeypatch) as seen, applied(RDrop(0.0), made.model):
        assert RDrop(0.0).penalty(made.model, batch, predict(made.model, batch, made.objective)) is None
    assert seen == []


def test_without_dropout_r_drop_is_refused_and_its_term_would_be_0():
    made = case("bert-classifier", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with pytest.raises(ValueError) as caught, applied(RDrop(), made.model):
        pass
    assert str(caught.value) == (
        "R-Drop compares passes with different dropout, but every dropout rate of this BertForSequenceClassification "
        "is 0; load it with dropout in its configuration."
    )
    batch = batched(made.examples, 4)[0]
    term = RDrop().penalty(made.model.train(), batch, predict(made.model, batch, made.objective))
    assert term is not None and term.tolist() == [0.0] * 4


def test_r_drop_refuses_a_negative_weight_and_losses_of_a_function():
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        RDrop(-1.0)
    losses = Predictions("losses", torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="the losses come from a function"):
        divergence(losses, losses)


def test_r_drop_has_the_same_gradients_when_the_model_is_wrapped_for_several_ranks():
    made = case("bert-classifier")
    made.model.train()
    batch = batched(made.examples, 4)[0]

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        made.model.zero_grad()
        torch.manual_seed(5)
        first = predict(model, batch, made.objective)
        term = RDrop().penalty(model, batch, first)
        assert term is not None
        (first.losses().total + term).mean().backward()
        return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}

    alone = gradients(made.model)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = gradients(DistributedDataParallel(made.model))
    finally:
        distributed.destroy_process_group()
    assert alone.keys() == wrapped.keys() and len(alone) > 10
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient, wrapped[name])
