"""R3F, R4F, SMART and LNSR: further passes, noise at the embeddings, and the closed forms of the papers.

Shape names: B examples in a batch, T tokens, d width.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import checkpointed, entry
from conftest import Case, batched, case, untouched
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim import SGD, AdamW

from fisherscope.finetune.methods.lnsr import LNSR, _distance
from fisherscope.finetune.methods.r3f import R3F, R4F, last_layers, normalised
from fisherscope.finetune.methods.r_drop import RDrop
from fisherscope.finetune.methods.smart import SMART
from fisherscope.finetune.regularizer import Composed, Regularizer
from fisherscope.finetune.smoothness import (
    Lookup,
    OfPasses,
    Passes,
    lookups_noted,
    symmetric_divergence,
    word_embeddings,
)
from fisherscope.models import dropout_sites
from fisherscope.objectives import Predictions, predict

MODELS = ("BERT", "RoBERTa", "DeBERTa", "DeBERTa-v2", "XLNet", "BART", "ELECTRA", "GPT-2", "T5")
TWICE = ("BART", "T5")

W, X = (0.5, -1.5, 2.0), (0.3, 0.2, -0.1)


class Logistic(nn.Module):
    """Logits 0 and the sum over the tokens of w.x, with x the word embeddings; for regression only the sum."""

    def __init__(self, labels: int = 2) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=labels, pad_token_id=0)
        self.words = nn.Embedding.from_pretrained(torch.tensor([(0.0, 0.0, 0.0), X]).double(), freeze=False)
        self.w = nn.Parameter(torch.tensor(W).double())

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        z = (self.words(input_ids) @ self.w).sum(1)
        return SimpleNamespace(logits=torch.stack([0 * z, z][-self.config.num_labels :], 1))


class Stack(nn.Module):
    """Word embeddings, three linear layers, and a head."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=2, pad_token_id=0)
        self.words = nn.Embedding(5, width).double()
        self.layer = nn.ModuleList(nn.Linear(width, width).double() for _ in range(3))
        self.classifier = nn.Linear(width, 2).double()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        hidden = self.words(input_ids)
        for layer in self.layer:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.classifier(hidden.mean(1)))


# As classes of transformers are called, which tells their objective.
Logistic.__name__ = Stack.__name__ = "BertForSequenceClassification"


def one_token(examples: int = 1, labels: type = int) -> dict[str, Tensor]:
    ids = torch.ones(examples, 1, dtype=torch.long)
    return {"input_ids": ids, "labels": torch.zeros(examples, dtype=torch.long if labels is int else torch.float64)}


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def logistic_z() -> float:
    return sum(w * x for w, x in zip(W, X, strict=True))


@contextmanager
def following(method: OfPasses, model: nn.Module) -> Iterator[Passes]:
    with method.applied_to(model, SGD(model.parameters(), lr=0.1)) as passes:
        assert isinstance(passes, Passes)
        yield passes


def categorical(*logits: list[float], label: int = 0) -> Predictions:
    outputs = torch.tensor([list(logits)], dtype=torch.float64)
    return Predictions("categorical", outputs, torch.full((1, len(logits)), label))


def in_training(name: str, head: str = "classification", size: int = 3, **settings: Any) -> tuple[Case, dict[str, Any]]:
    made = entry(name, head, **settings)
    made.model.train()
    return made, batched(made.examples, size)[0]


def without_dropout(model: nn.Module) -> nn.Module:
    for site in dropout_sites(model, backbone_only=False):
        site.set_rate(0.0)
    return model


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def term(method: Regularizer, model: nn.Module, batch: Any, objective: str = "classification") -> Tensor:
    """The penalty of a first batch, with the dropout that a seed draws."""
    torch.manual_seed(0)
    with method.applied_to(model, SGD(model.parameters(), lr=0.1)):
        found = method.penalty(model, batch, predict(model, batch, objective))
    assert found is not None
    return found


def only_adversarial(**settings: Any) -> SMART:
    return SMART(**{"total_steps": 4, "bregman_weight": 0.0, **settings})


def only_bregman(**settings: Any) -> SMART:
    return SMART(**{"total_steps": 4, "adversarial_weight": 0.0, **settings})


# The divergence


def test_the_symmetric_divergence_of_even_odds_and_three_to_one_is_a_quarter_of_ln_3():
    a, b = categorical([0.0, 0.0]), categorical([math.log(3), 0.0])
    assert float(symmetric_divergence(a, b)) == pytest.approx(0.2746530722, abs=1e-10)
    assert float(symmetric_divergence(b, a)) == pytest.approx(0.25 * math.log(3))


def test_a_published_code_compares_odds_which_is_no_divergence():
    """Golden value G8: with odds o = p / (1 - p), the sum of 2 p (log o - log o') that the mt-dnn code minimises."""

    def of_odds(a: Tensor, b: Tensor) -> float:
        p, q = a.softmax(0), b.softmax(0)
        return float((2 * p * (p.logit() - q.logit())).sum())

    even, three_to_one = torch.zeros(2), torch.tensor([math.log(3), 0.0])
    assert of_odds(even, three_to_one) == pytest.approx(0, abs=1e-5)  # of different distributions
    assert of_odds(three_to_one, even) == pytest.approx(math.log(3), abs=1e-5)


def test_for_near_logits_the_symmetric_divergence_is_the_fisher_form_of_the_softmax():
    z, d = torch.tensor([0.3, -1.0, 0.8]).double(), torch.tensor([1.0, -2.0, 0.5]).double()
    p = z.softmax(0)
    form = float(d @ (p.diag() - p[:, None] * p) @ d)
    found = float(symmetric_divergence(categorical(z.tolist()), categorical((z + 1e-4 * d).tolist()))) / 1e-8
    assert found == pytest.approx(form, rel=1e-3)


def test_the_gradient_of_the_divergence_flows_as_its_derivative_says():
    """It is p (d - E d) + p - q for d = log p - log q, not the p - q of a fixed target."""
    z, other = torch.tensor([0.3, -1.0, 0.8]).double(), torch.tensor([0.1, 0.4, -0.6]).double()
    a = replace(categorical(z.tolist()), outputs=z[None, None].clone().requires_grad_())
    (found,) = torch.autograd.grad(symmetric_divergence(a, categorical(other.tolist())).sum(), a.outputs)
    p, q = z.softmax(0), other.softmax(0)
    d = p.log() - q.log()
    torch.testing.assert_close(found[0, 0], p * (d - (p * d).sum()) + p - q)


def test_the_divergence_of_texts_is_the_sum_over_their_scored_tokens():
    a, b = categorical([0.0, 0.0], [1.0, 3.0], [2.0, 0.0]), categorical([math.log(3), 0.0], [0.0, 0.0], [0.0, 1.0])
    scored = torch.tensor([[0, 0, -100]])
    parts = [
        float(symmetric_divergence(categorical(a.outputs[0, t].tolist()), categorical(b.outputs[0, t].tolist())))
        for t in range(2)
    ]
    assert float(symmetric_divergence(replace(a, labels=scored), b)) == pytest.approx(sum(parts))


def test_numbers_are_a_squared_difference_apart():
    numbers = [Predictions("gaussian", torch.tensor([[v]]), torch.zeros(1, 1)) for v in (1.5, -0.5)]
    assert symmetric_divergence(*numbers).tolist() == [4.0]


def test_a_single_class_cannot_be_compared():
    """Its probability is 1, whatever the logit."""
    with pytest.raises(ValueError, match="where there are two classes or more, but the head has one output"):
        symmetric_divergence(categorical([1.0]), categorical([2.0]))


# Further passes


@pytest.mark.parametrize("name", MODELS)
def test_a_further_pass_has_the_same_dropout(name: str):
    """Bit for bit the same predictions, and the global generator goes on as if it had not been."""
    made, batch = in_training(name)
    with following(R3F(), made.model) as passes:
        first = predict(made.model, batch, made.objective)
        before = torch.get_rng_state()
        again = passes.again(batch)
        assert torch.equal(torch.get_rng_state(), before)
        second = predict(made.model, batch, made.objective)
    assert torch.equal(first.outputs, again.outputs)
    assert not torch.equal(first.outputs, second.outputs)


def test_a_further_pass_with_dropout_of_its_own_is_another_one_every_time_and_repeats_with_the_seed():
    made, batch = in_training("BERT")

    def found(seed: int) -> list[Tensor]:
        torch.manual_seed(7)
        with following(R3F(seed=seed), made.model) as passes:
            kept = [predict(made.model, batch, made.objective).outputs]
            before = torch.get_rng_state()
            for _ in range(2):
                passes.generator()
                kept.append(passes.again(batch, "own").outputs)
            assert torch.equal(torch.get_rng_state(), before)
        return kept

    ours, same, other = found(1), found(1), found(2)
    assert all(map(torch.equal, ours, same))
    assert torch.equal(ours[0], other[0])
    assert len({tuple(t.flatten().tolist()) for t in (*ours, *other[1:])}) == 5


def test_the_pass_of_another_penalty_is_not_taken_for_that_of_the_loss():
    """R-Drop makes a pass with other dropout; with it the divergence would be that of the dropout, some 1e-3."""
    made, batch = in_training("BERT")
    r_drop, ours = RDrop(), only_adversarial()
    with Composed([r_drop, ours]).applied_to(made.model, AdamW(made.model.parameters())):
        predictions = predict(made.model, batch, made.objective)
        r_drop.penalty(made.model, batch, predictions)
        found = ours.penalty(made.model, batch, predictions)
    assert found is not None and 0 < float(found.detach().max()) < 1e-6


def test_a_penalty_outside_of_its_block_is_refused():
    made, batch = in_training("BERT")
    predictions = predict(made.model, batch, made.objective)
    for method in (R3F(), SMART(4), LNSR()):
        with pytest.raises(ValueError, match="is not applied to this BertForSequenceClassification; compute it inside"):
            method.penalty(made.model, batch, predictions)


def test_predictions_from_before_the_block_are_refused():
    made, batch = in_training("BERT")
    predictions = predict(made.model, batch, made.objective)
    for method in (R3F(), only_adversarial(), only_bregman()):
        with following(method, made.model), pytest.raises(ValueError, match="the model has made none so far; compute"):
            method.penalty(made.model, batch, predictions)


@pytest.mark.parametrize("method", [R3F(), R4F(), SMART(4), LNSR()], ids=lambda m: m.name)
def test_gradient_checkpointing_changes_no_gradient(method: Regularizer):
    found = []
    for forgetful in (False, True):
        made, batch = in_training("BERT")
        if forgetful:
            checkpointed(made.model, reentrant=False)
        torch.manual_seed(3)
        with method.applied_to(made.model, SGD(made.model.parameters(), lr=0.1)):
            predictions = predict(made.model, batch, made.objective)
            penalty = method.penalty(made.model, batch, predictions)
            assert penalty is not None
            found.append(gradients((predictions.losses().total + 1e3 * penalty).sum(), made.model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


# Noise at the word embeddings


@pytest.mark.parametrize("name", MODELS)
def test_noise_at_the_embeddings_moves_the_logits(name: str):
    made, batch = in_training(name)
    with following(R3F(), made.model) as passes:
        clean = predict(made.model, batch, made.objective)
        moved, lookups = passes.shifted(
            batch, lambda _, lookup: torch.full_like(lookup.embeddings, 1e-3).cumsum(-1), clean
        )
        small, _ = passes.shifted(batch, lambda _, lookup: torch.zeros_like(lookup.embeddings), clean)
    assert (moved.outputs - clean.outputs).abs().amax(-1).min() > 1e-6
    assert torch.equal(small.outputs, clean.outputs)
    assert len(lookups) == 1 + (name in TWICE)


def test_all_modules_that_hold_the_table_are_watched():
    """A hook on the module that the model names as its embedding sees no call where other modules share the weight."""
    made, batch = in_training("BART")
    seen: list[Any] = []
    named = made.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    handle = named.register_forward_hook(lambda *call: seen.append(call))
    with lookups_noted(made.model, batch) as lookups:
        predict(made.model, batch, made.objective)
    handle.remove()
    assert (len(seen), len(lookups)) == (0, 2)
    assert len(word_embeddings(made.model)) == 3


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_the_axis_of_examples_are_known_of_every_lookup(name: str):
    made, batch = in_training(name)
    with lookups_noted(made.model, batch) as lookups:
        predict(made.model, batch, made.objective)
    lengths = batch["attention_mask"].sum(1)
    for number, lookup in enumerate(lookups):
        assert lookup.axis == (name == "XLNet")
        assert lookup.tokens.shape == lookup.embeddings.shape[:2]
        counts = lookup.tokens.sum(1 - lookup.axis)
        if number == 0:
            assert torch.equal(counts, lengths)
        else:  # a decoder reads the text after a token that starts it, here padding in one family
            assert bool(((counts >= lengths - 1) & (counts <= lengths + 1)).all())
            assert not bool(lookup.tokens.all())


def test_noise_that_the_dtype_rounds_away_is_refused():
    """Spacing in bfloat16 is about 1e-4 near the values of embeddings."""
    made = case("bert-classifier")
    model, batch = made.model.bfloat16().train(), batched(made.examples, 3)[0]
    for method in (R3F(), only_adversarial()):
        message = r"moves word embeddings by up to .*e-05, which is rounded away in the torch\.bfloat16 of this Bert"
        with pytest.raises(ValueError, match=message):
            term(method, model, batch)
    assert bool((term(R3F(eps=0.1), model, batch) > 0).all())


def test_models_without_words_are_refused():
    made, batch = in_training("ViT", "image classification")
    for method in (R3F(), R4F(), SMART(4)):
        with pytest.raises(ValueError, match=rf"^{method.name} moves the word .* looks up none;"):
            term(method, made.model, batch)


def test_a_model_that_the_noise_does_not_reach_is_refused():
    class Deaf(Logistic):
        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            super().forward(input_ids)
            return SimpleNamespace(logits=self.w[None, :2].expand(len(input_ids), 2))

    Deaf.__name__ = Logistic.__name__
    for method in (R3F(), R3F(second_dropout="same")):
        with pytest.raises(ValueError, match="but those of this BertForSequenceClassification stay the same"):
            term(method, Deaf(), one_token())


# R3F


@pytest.mark.parametrize(("noise", "golden"), [("normal", 1.5762e-6), ("uniform", 5.2541e-7)])
def test_the_expectation_of_r3f_for_logistic_regression_is_known(noise: Any, golden: float):
    r"""It is :math:`\epsilon^2 p (1 - p) \|w\|^2` for normal noise, a third of it for uniform noise."""
    p = sigmoid(logistic_z())
    form = 1e-6 * p * (1 - p) * sum(w * w for w in W) / (3 if noise == "uniform" else 1)
    assert form == pytest.approx(golden, rel=1e-4)
    found = term(R3F(eps=1e-3, noise=noise), Logistic(), one_token(200_000))
    assert float(found.detach().mean()) == pytest.approx(golden, rel=0.01)


def test_uniform_noise_ends_at_eps_and_normal_noise_has_its_deviation():
    found: dict[str, Tensor] = {}
    for noise in ("uniform", "normal"):
        model = Logistic(1)
        with torch.no_grad():
            model.w.copy_(torch.tensor([1.0, 0.0, 0.0]))
        found[noise] = term(R3F(eps=0.2, noise=noise), model, one_token(20_000, float), "regression").detach().sqrt()
    assert 0.199 < float(found["uniform"].max()) <= 0.2
    assert float(found["normal"].square().mean().sqrt()) == pytest.approx(0.2, rel=0.02)
    assert float(found["normal"].max()) > 0.6


def test_the_term_of_r3f_is_the_symmetric_divergence_with_gradients_through_both_passes():
    """But none into the table through the pass with noise (arXiv 2008.03156 and its code)."""
    made, batch = in_training("BERT")
    method = R3F(weight=0.7, eps=0.05, second_dropout="same")
    with following(method, made.model) as passes:
        clean = predict(made.model, batch, made.objective)
        found = method.penalty(made.model, batch, clean)
        passes.draws = 0
        generator, table = passes.generator(), made.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]

        def moved(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.detach() + 0.05 * (2 * torch.rand(output.shape, generator=generator, dtype=output.dtype) - 1)

        handle = table.register_forward_hook(moved)
        noised = passes.again(batch)
        handle.remove()
    p, q = clean.outputs[:, 0].softmax(-1), noised.outputs[:, 0].softmax(-1)
    expected = 0.7 * ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1))
    assert found is not None
    torch.testing.assert_close(found, expected)
    ours, theirs = gradients(found.sum(), made.model), gradients(expected.sum(), made.model)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], msg=name)
    assert len([g for g in ours.values() if bool(g.any())]) > 20


def test_with_the_same_dropout_the_term_vanishes_with_the_noise_and_with_its_own_it_does_not():
    """With noise of 1e-5 the published method compares passes with other dropout, as R-Drop does."""
    made, batch = in_training("BERT")
    large, small = (term(R3F(eps=eps, second_dropout="same"), made.model, batch).detach() for eps in (1e-2, 1e-3))
    torch.testing.assert_close(100 * small, large, rtol=0.1, atol=0)
    own, same = (term(R3F(second_dropout=kind), made.model, batch).detach() for kind in ("own", "same"))
    assert float(own.min()) > 1e3 * float(same.max())


def test_without_dropout_the_second_dropout_makes_no_difference():
    made, batch = in_training("BERT")
    without_dropout(made.model)
    own, same = (term(R3F(eps=0.01, second_dropout=kind), made.model, batch) for kind in ("own", "same"))
    assert torch.equal(own, same)


def test_the_noise_of_r3f_differs_from_call_to_call_and_repeats_with_the_seed():
    made, batch = in_training("BERT")
    without_dropout(made.model)

    def found(seed: int) -> list[list[float]]:
        method = R3F(seed=seed, eps=0.01)
        with following(method, made.model):
            predictions = predict(made.model, batch, made.objective)
            return [method.penalty(made.model, batch, predictions).tolist() for _ in range(2)]  # pyright: ignore

    assert found(0) == found(0)
    assert len({tuple(values) for seed in (0, 1) for values in found(seed)}) == 4


def test_for_regression_r3f_is_the_mean_squared_difference():
    found = term(R3F(eps=1e-3, noise="normal"), Logistic(1), one_token(200_000, float), "regression")
    assert float(found.detach().mean()) == pytest.approx(1e-6 * sum(w * w for w in W), rel=0.01)


def test_r3f_with_weight_0_makes_no_pass_and_leaves_no_hook():
    made, batch = in_training("BERT")
    with R3F(0.0).applied_to(made.model, AdamW(made.model.parameters())):
        assert not made.model._forward_pre_hooks
        assert R3F(0.0).penalty(made.model, batch, predict(made.model, batch, made.objective)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, r"^The weight of r3f must not be negative, got -1\.$"),
        ({"eps": 0.0}, r"^eps is the size of the noise and must be above 0, got 0\.$"),
        ({"noise": "other"}, r"^noise must be 'uniform' or 'normal', got 'other'\.$"),
        ({"second_dropout": "other"}, r"^second_dropout must be 'own' or 'same', got 'other'\.$"),
    ],
)
def test_r3f_refuses_settings_without_a_meaning(settings: Any, message: str):
    with pytest.raises(ValueError, match=message):
        R3F(**settings)


# R4F


def test_the_normalised_weight_has_spectral_norm_1_as_by_200_power_iterations():
    """And the gradients of the parametrization of torch, which has converged by then."""
    layer = nn.Linear(7, 3).double()
    weight = layer.weight.detach().clone().requires_grad_()
    ours = normalised(weight)
    assert float(torch.linalg.svdvals(ours.detach()).max()) == pytest.approx(1, abs=1e-12)
    theirs = parametrizations.spectral_norm(layer, n_power_iterations=200)
    torch.testing.assert_close(ours, theirs.weight, rtol=0, atol=1e-12)
    probe = torch.randn(3, 7, dtype=torch.float64)
    (a,) = torch.autograd.grad((ours * probe).sum(), weight)
    (b,) = torch.autograd.grad((theirs.weight * probe).sum(), theirs.parametrizations.weight.original)  # pyright: ignore
    torch.testing.assert_close(a, b)


def test_a_weight_of_0_stays_0():
    assert torch.equal(normalised(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("name", MODELS)
def test_r4f_normalises_the_layer_that_gives_the_logits(name: str):
    """In the block, and in the plain weight after it, also after an exception."""
    made, batch = in_training(name)
    made.model.eval()
    layer = made.model.get_submodule(last_layers(made.model)[0].removesuffix(".weight"))
    assert isinstance(layer, nn.Linear)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call: seen.append(call[-1]))
    plain = predict(made.model, batch, made.objective).outputs[:, 0]
    handle.remove()
    assert plain.shape[-1] == layer.out_features and seen[0].shape[-1] == layer.out_features
    sigma = float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
    bias = 0 if layer.bias is None else layer.bias
    expected = (plain - bias) / sigma + bias
    inside: list[Tensor] = []
    with pytest.raises(KeyError), R4F().applied_to(made.model, AdamW(made.model.parameters())):
        inside.append(predict(made.model, batch, made.objective).outputs[:, 0])
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(sigma)
        raise KeyError
    torch.testing.assert_close(inside[0], expected)
    after = predict(made.model, batch, made.objective).outputs[:, 0]
    torch.testing.assert_close(after, inside[0], rtol=0, atol=1e-14)


def test_r4f_refuses_heads_without_labels():
    for name, head in (("BERT", "masked LM"), ("GPT-2", "causal LM"), ("T5", "seq2seq LM")):
        model = entry(name, head).model
        with pytest.raises(ValueError, match=r"^R4F normalises the linear layer .* has none; take R3F for it\.$"):
            term(R4F(), model, {})


# SMART: the adversarial term


def box(eps: float) -> tuple[float, float]:
    """The divergence of logistic regression at both corners of the box that are along w."""
    z, reach = logistic_z(), eps * sum(map(abs, W))
    return tuple((sigmoid(z + s * reach) - sigmoid(z)) * s * reach for s in (1, -1))  # pyright: ignore


def test_the_ascent_finds_the_maximum_over_the_box_for_logistic_regression():
    r"""It is at :math:`\pm \epsilon\, \mathrm{sign}(w)`; on which side depends on where the ascent began."""
    corners = box(0.1)
    assert max(corners) == pytest.approx(0.0396459902, abs=1e-10)
    p = sigmoid(logistic_z())
    assert 0.01 * p * (1 - p) * sum(map(abs, W)) ** 2 == pytest.approx(0.0387995832, abs=1e-10)
    found = term(only_adversarial(eps=0.1, ascent_size=10.0), Logistic(), one_token(64)).tolist()
    assert all(min(abs(value - corner) for corner in corners) < 1e-10 for value in found)
    assert max(found) == pytest.approx(0.0396459902, abs=1e-10)


def test_for_linear_regression_the_adversarial_term_is_known():
    r"""It is :math:`\epsilon^2 \|w\|_1^2`."""
    found = term(only_adversarial(eps=0.1, ascent_size=10.0), Logistic(1), one_token(3, float), "regression")
    assert found.tolist() == pytest.approx([(0.1 * sum(map(abs, W))) ** 2] * 3)


def moved_by(method: SMART, made: Case, batch: Any) -> tuple[list[Tensor], list[Lookup]]:
    with following(method, made.model) as passes, lookups_noted(made.model, batch) as lookups:
        predictions = predict(made.model, batch, made.objective)
        return method.worst(passes, batch, predictions), lookups


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ascent_steps", [1, 3])
def test_embeddings_move_by_eps_at_most_and_padding_does_not_move(name: str, ascent_steps: int):
    made, batch = in_training(name)
    shifts, lookups = moved_by(only_adversarial(sigma=1e-4, ascent_steps=ascent_steps), made, batch)
    assert len(shifts) == 1 + (name in TWICE)
    for shift, lookup in zip(shifts, lookups, strict=False):
        assert 0.99e-5 < float(shift.abs().max()) <= 1e-5 * (1 + 1e-6)
        assert not bool(shift[~lookup.tokens].any())
        assert bool((shift[lookup.tokens].abs().amax(-1) > 0).all())


def test_with_large_steps_every_entry_moves_by_eps_to_the_side_of_its_gradient():
    """All but those with a gradient below about eps / eta of the largest one."""
    made, batch = in_training("BERT")
    method = only_adversarial(sigma=1e-6, ascent_size=1e3)
    (shift,), (lookup, *_) = moved_by(method, made, batch)
    inside = shift[lookup.tokens].abs()
    torch.testing.assert_close(inside, torch.full_like(inside, 1e-5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scope", ["example", "token"])
def test_a_small_step_goes_along_the_gradient_over_the_largest_entry_of_its_scope(scope: Any):
    """Against gradients by hand, of every example alone."""
    made, batch = in_training("BERT")
    without_dropout(made.model)
    method = only_adversarial(eps=1.0, sigma=1e-2, ascent_size=0.1, norm_scope=scope)
    (shift,), (lookup, *_) = moved_by(method, made, batch)
    with following(method, made.model) as passes:
        start = 1e-2 * torch.randn(shift.shape, generator=passes.generator(), dtype=shift.dtype)
    start = start * lookup.tokens[..., None]
    for i, length in enumerate(lookup.tokens.sum(1).tolist()):
        alone = {
            name: value[i : i + 1, :length] if value.ndim > 1 else value[i : i + 1] for name, value in batch.items()
        }
        embeddings = lookup.embeddings[i : i + 1, :length]
        inputs = {k: v for k, v in alone.items() if k not in ("input_ids", "labels")}
        delta = start[i : i + 1, :length].clone().requires_grad_()
        z, moved = (made.model(inputs_embeds=e, **inputs).logits for e in (embeddings, embeddings + delta))
        p, q = z.softmax(-1).detach(), moved.softmax(-1)
        (g,) = torch.autograd.grad(((p - q) * (p.log() - q.log())).sum(), delta)
        size = g.abs().max() if scope == "example" else g.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(shift[i, :length], (delta + 0.1 * g / size)[0].detach())


def test_lookups_of_one_example_share_their_largest_gradient():
    """An encoder-decoder's look-ups are one input, so that only one of them moves by a whole step."""
    made, batch = in_training("BART", size=1)
    shifts, _ = moved_by(only_adversarial(eps=1.0, sigma=1e-9, ascent_size=0.1), made, batch)
    largest = [float(shift.abs().max()) for shift in shifts]
    assert max(largest) == pytest.approx(0.1)
    assert 0 < min(largest) < 0.0999


def test_where_nothing_moved_the_divergence_has_no_gradient_so_that_sigma_must_be_above_0():
    made, batch = in_training("BERT")
    with following(R3F(), made.model) as passes:
        clean = predict(made.model, batch, made.objective)
        clean = replace(clean, outputs=clean.outputs.detach())
        delta = torch.zeros(*batch["input_ids"].shape, 16, dtype=torch.float64, requires_grad=True)
        with lookups_noted(made.model, batch, lambda *_: delta):
            (g,) = torch.autograd.grad(symmetric_divergence(clean, passes.again(batch)).sum(), delta)
    assert not bool(g.any())
    with pytest.raises(ValueError, match=r"^sigma must be above 0, as the divergence has no gradient .* got 0\.$"):
        SMART(4, sigma=0.0)


def test_the_adversarial_term_is_that_of_the_moved_embeddings_with_gradients_through_both_passes():
    made, batch = in_training("BERT")
    method = only_adversarial(adversarial_weight=3.0, eps=1e-2, sigma=1e-3, ascent_size=1e-2)
    with following(method, made.model) as passes:
        clean = predict(made.model, batch, made.objective)
        found = method.penalty(made.model, batch, clean)
        passes.draws = 0
        worst = method.worst(passes, batch, clean)
        moved, _ = passes.shifted(batch, lambda number, _: worst[number], clean)
    p, q = clean.outputs[:, 0].softmax(-1), moved.outputs[:, 0].softmax(-1)
    expected = 3 * ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1))
    assert found is not None
    torch.testing.assert_close(found, expected)
    ours, theirs = gradients(found.sum(), made.model), gradients(expected.sum(), made.model)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], msg=name)
    assert not any(p.grad is not None for p in made.model.parameters())


def test_the_ascent_raises_the_divergence():
    """More than noise of the size that it ends with."""
    made, batch = in_training("BERT")
    adversarial = term(only_adversarial(eps=1e-3, ascent_steps=3), made.model, batch)
    random = term(R3F(eps=1e-3, second_dropout="same"), made.model, batch)
    assert bool((adversarial > 5 * random).all())


# SMART: the Bregman term


def trained(method: Regularizer, made: Case, steps: int = 3, size: int = 2, accumulate: int = 1) -> dict[str, Any]:
    """The parameters after every step, and the state at the end."""
    model = copy.deepcopy(made.model).train()
    optimizer, batches, found = AdamW(model.parameters(), lr=1e-2, eps=1.0), batched(made.examples[:4], size), []
    torch.manual_seed(0)
    with method.applied_to(model, optimizer) as applied:
        found.append({n: p.detach().clone() for n, p in model.named_parameters()})
        for number in range(steps):
            optimizer.zero_grad()
            for micro in range(accumulate):
                batch = batches[(number * accumulate + micro) % len(batches)]
                predictions = predict(model, batch, made.objective)
                loss = predictions.losses().total.sum()
                if (penalty := method.penalty(model, batch, predictions)) is not None:
                    loss = loss + penalty.sum()
                (loss / (size * accumulate)).backward()
            optimizer.step()
            found.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return {"values": found, "state": {n: t.clone() for n, t in applied.state_dict().items()}}


def averages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("average."): t for n, t in state.items() if n.startswith("average.")}


def test_the_average_model_is_that_of_the_closed_form():
    r"""It is :math:`\beta^T \theta_0 + \sum_t (1 - \beta) \beta^{T - t} \theta_t` for one momentum."""
    found = trained(only_bregman(momentum=0.8, early_momentum=0.8), case("bert-classifier"), steps=4)
    values = found["values"]
    for name, average in averages(found["state"]).items():
        expected = 0.8**4 * values[0][name] + sum(0.2 * 0.8 ** (4 - t) * values[t][name] for t in range(1, 5))
        torch.testing.assert_close(average, expected, msg=name)
    assert averages(found["state"]).keys() == values[0].keys()


def test_the_momentum_rises_after_a_tenth_of_the_steps():
    method = SMART(50)
    assert [method.momentum_at(t) for t in (1, 5, 6, 50)] == [0.99, 0.99, 0.999, 0.999]
    found = trained(
        SMART(20, momentum=0.5, early_momentum=1.0, adversarial_weight=0.0), case("bert-classifier"), steps=3
    )
    values, name = found["values"], "classifier.weight"
    expected = (values[0][name] + values[3][name]) / 2  # two early steps leave it
    torch.testing.assert_close(averages(found["state"])[name], expected)


def test_the_first_step_of_the_bregman_term_is_vanilla_bit_for_bit_with_dropout_and_later_ones_are_not():
    """The average is the model itself there, and both passes have the same dropout, so that the divergence is 0."""
    made = case("bert-classifier")
    plain, found = trained(Regularizer(), made)["values"], trained(only_bregman(bregman_weight=50.0), made)["values"]
    assert all(torch.equal(found[1][name], value) for name, value in plain[1].items())
    assert not torch.equal(found[2]["classifier.weight"], plain[2]["classifier.weight"])


def test_without_momentum_the_bregman_term_is_always_0():
    """Bregman proximal steps with one inner step are vanilla fine-tuning."""
    made = case("bert-classifier")
    plain = trained(Regularizer(), made)["values"]
    found = trained(only_bregman(bregman_weight=50.0, momentum=0.0, early_momentum=0.0), made)["values"]
    assert all(torch.equal(found[-1][name], value) for name, value in plain[-1].items())


def test_with_momentum_1_the_average_stays_where_it_began():
    found = trained(only_bregman(momentum=1.0, early_momentum=1.0), case("bert-classifier"))
    for name, average in averages(found["state"]).items():
        assert torch.equal(average, found["values"][0][name])
    assert not torch.equal(found["values"][-1]["classifier.weight"], found["values"][0]["classifier.weight"])


def test_the_bregman_term_is_the_divergence_from_the_average_model():
    """Against a copy of the model with the values of the average, without dropout."""
    made, batch = in_training("BERT")
    model = without_dropout(made.model)
    method = only_bregman(bregman_weight=2.0)
    optimizer = SGD(model.parameters(), lr=0.5)
    with method.applied_to(model, optimizer) as applied:
        predict(model, batch, made.objective).losses().total.sum().backward()
        optimizer.step()
        predictions = predict(model, batch, made.objective)
        before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
        found = method.penalty(model, batch, predictions)
        other = copy.deepcopy(model)
        other.load_state_dict(averages(applied.state_dict()), strict=False)
        target = predict(other, batch, made.objective).outputs[:, 0].detach()
    p, q = predictions.outputs[:, 0].softmax(-1), target.softmax(-1)
    expected = 2 * ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1))
    assert found is not None and float(found.detach().min()) > 1e-9
    torch.testing.assert_close(found, expected)
    ours, theirs = gradients(found.sum(), model), gradients(expected.sum(), model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], theirs[name], msg=name)
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])


def test_the_average_moves_once_per_optimizer_step():
    """Not per micro-batch: with two of them the training and the average are those of the whole batch."""
    made = case("bert-classifier")
    without_dropout(made.model)
    method = only_bregman(bregman_weight=20.0, momentum=0.9, early_momentum=0.9)
    whole, parts = trained(method, made, size=4), trained(method, made, size=1, accumulate=4)
    assert int(whole["state"]["steps"]) == int(parts["state"]["steps"]) == 3
    for name, average in averages(whole["state"]).items():
        torch.testing.assert_close(averages(parts["state"])[name], average, rtol=0, atol=1e-10, msg=name)
        torch.testing.assert_close(parts["values"][-1][name], whole["values"][-1][name], rtol=0, atol=1e-10, msg=name)


def test_the_average_of_a_model_in_bfloat16_is_kept_in_float32():
    """In bfloat16 a thousandth of a difference would be rounded away."""
    model = case("bert-classifier").model.bfloat16()
    optimizer = SGD(model.parameters(), lr=1.0)
    with only_bregman(momentum=0.999, early_momentum=0.999).applied_to(model, optimizer) as applied:
        start = {n: t.clone() for n, t in averages(applied.state_dict()).items()}
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, -0.5)
        optimizer.step()
        for name, average in averages(applied.state_dict()).items():
            assert average.dtype == torch.float32
            moved = model.get_parameter(name).float() - start[name]
            torch.testing.assert_close(average - start[name], 0.001 * moved, rtol=1e-2, atol=1e-6)


def test_autocast_does_not_take_the_average_for_the_model():
    """It remembers lowered weights by the identity of the parameters, which the average borrows."""
    made = case("bert-classifier")
    model, batch = without_dropout(made.model.float()).train(), batched(made.examples, 3)[0]
    method, optimizer = only_bregman(), SGD(model.parameters(), lr=0.5)
    with method.applied_to(model, optimizer):
        predict(model, batch, made.objective).losses().total.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            predictions = predict(model, batch, made.objective)
            found = method.penalty(model, batch, predictions)
    assert found is not None and float(found.detach().sum()) > 1e-6
    found.sum().backward()
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if "dense.weight" in n and p.grad is not None)


def test_the_model_has_its_own_values_again_when_the_pass_of_the_average_raises():
    made, batch = in_training("BERT")
    method = only_bregman()
    with following(method, made.model):
        predictions = predict(made.model, batch, made.objective)
        with untouched(made.model), pytest.raises(ValueError, match="needs 'labels' in every batch"):
            method.penalty(made.model, {n: t for n, t in batch.items() if n != "labels"}, predictions)


def test_both_terms_of_smart_add_up():
    made, batch = in_training("BERT")
    without_dropout(made.model)
    settings: dict[str, Any] = {"total_steps": 4, "eps": 1e-2, "ascent_size": 1e-2}
    found = []
    for weights in ((3.0, 2.0), (3.0, 0.0), (0.0, 2.0)):
        model = copy.deepcopy(made.model)
        method = SMART(adversarial_weight=weights[0], bregman_weight=weights[1], **settings)
        with method.applied_to(model, SGD(model.parameters(), lr=0.1)) as applied:
            for name, average in averages(applied.state_dict()).items():
                average += 0.01 if "classifier.weight" in name else 0.0
                average[..., :1] += 0.05
            found.append(method.penalty(model, batch, predict(model, batch, made.objective)))
    torch.testing.assert_close(found[0], found[1] + found[2])  # pyright: ignore
    assert all(float(part.detach().min()) > 1e-9 for part in found if part is not None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adversarial_weight": -1.0}, r"^adversarial_weight must not be negative, got -1\.$"),
        ({"bregman_weight": -1.0}, r"^bregman_weight must not be negative, got -1\.$"),
        ({"eps": 0.0}, r"^eps must be above 0, got 0\.$"),
        ({"ascent_size": 0.0}, r"^ascent_size must be above 0, got 0\.$"),
        ({"ascent_steps": 0}, r"^ascent_steps must be at least 1, got 0\.$"),
        ({"total_steps": 0}, r"^total_steps must be at least 1, got 0\.$"),
        ({"momentum": 1.1}, r"^momentum must be at least 0 and at most 1, got 1\.1\.$"),
        ({"early_momentum": -0.1}, r"^early_momentum must be at least 0 and at most 1, got -0\.1\.$"),
        ({"norm_scope": "batch"}, r"^norm_scope must be 'example' or 'token', got 'batch'\.$"),
    ],
)
def test_smart_refuses_settings_without_a_meaning(settings: Any, message: str):
    with pytest.raises(ValueError, match=message):
        SMART(**{"total_steps": 4, **settings})


# LNSR


def stacked_ids(examples: int) -> dict[str, Tensor]:
    return {"input_ids": torch.full((examples, 1), 2), "labels": torch.zeros(examples, dtype=torch.long)}


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_expectation_of_lnsr_for_linear_layers_is_known(layer: int):
    r"""It is :math:`\sigma^2 \sum_r \|W_r \cdots W_{b+1}\|_F^2`, with :math:`\sigma = s \|x_b\| / \sqrt d`."""
    model = Stack()
    found = term(LNSR(weight=1.0, layer=layer, relative_noise=0.3), model, stacked_ids(100_000))
    with torch.no_grad():
        below = model.words(torch.tensor(2))
        for done in model.layer[:layer]:
            below = done(below)
        product, expected = torch.eye(4).double(), 0.0
        for above in model.layer[layer:]:
            product = above.get_parameter("weight") @ product
            expected += float((0.3 * below.norm() / 2) ** 2 * product.square().sum())
    assert float(found.detach().mean()) == pytest.approx(expected, rel=0.02)


def test_the_gradient_of_lnsr_flows_through_the_layers_above_the_noise_and_no_others():
    """For a last linear layer it is that of the squared length of W e."""
    model = Stack()
    seen: list[Tensor] = []
    handle = model.layer[2].register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    found = term(LNSR(weight=0.5, layer=2, relative_noise=0.3), model, stacked_ids(3))
    handle.remove()
    e = (seen[1] - seen[0])[:, 0]
    ours = gradients(found.sum(), model)
    torch.testing.assert_close(
        ours["layer.2.weight"], 0.5 * 2 * (model.get_parameter("layer.2.weight") @ e.mT @ e).detach()
    )
    assert not ours["layer.1.weight"].abs().max() > 1e-12


def test_small_noise_scales_the_term_by_its_square():
    """R / s^2 tends to the squared norm of the Jacobian along the draw."""
    made, batch = in_training("BERT")
    found = [term(LNSR(relative_noise=s), made.model, batch).detach() / s**2 for s in (1e-3, 1e-4)]
    torch.testing.assert_close(*found, rtol=1e-2, atol=0)


def test_without_noise_the_passes_of_lnsr_agree_whatever_the_dropout():
    """So that noise that is rounded away is noticed, which with other dropout it would not be."""
    made, batch = in_training("BERT")
    with pytest.raises(ValueError, match=r"^LNSR needs noise to change what layers compute, but .* nothing changes;"):
        term(LNSR(relative_noise=1e-30), made.model, batch)


@pytest.mark.parametrize(("name", "layers"), [*((name, 2 + 2 * (name in TWICE)) for name in MODELS), ("ALBERT", 3)])
def test_the_layers_that_a_pass_calls_are_counted(name: str, layers: int):
    """Those of a decoder after those of the encoder, and a shared one every time."""
    made, batch = in_training(name)
    assert bool((term(LNSR(layer=layers - 1), made.model, batch) > 0).all())
    message = f"but the noise is above {layers} layers and a pass of this .* has {layers}; take a smaller layer"
    with untouched(made.model), pytest.raises(ValueError, match=message):
        term(LNSR(layer=layers), made.model, batch)


@pytest.mark.parametrize("name", MODELS)
def test_the_noise_of_lnsr_has_the_size_that_is_asked_for_at_every_token(name: str):
    made, batch = in_training(name)
    first = next(m for n, m in made.model.named_modules() if n.endswith(".0"))
    seen: list[Tensor] = []
    handle = first.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    for seed in range(10):
        term(LNSR(relative_noise=0.2, seed=seed), made.model, batch)
    handle.remove()
    clean, noisy = torch.stack(seen[0::2]), torch.stack(seen[1::2])
    there = clean.norm(dim=-1) > 0  # one family multiplies padding by 0
    shares = ((noisy - clean).norm(dim=-1) / clean.norm(dim=-1)).square().mean(0).sqrt()[there.all(0)]
    assert len(shares) >= int(batch["attention_mask"].sum())
    assert float(shares.mean()) == pytest.approx(0.2, rel=0.03)
    torch.testing.assert_close(shares, torch.full_like(shares, 0.2), rtol=0.3, atol=0)


def test_distances_are_means_over_the_tokens_of_every_example_without_padding():
    """Also where the first axis counts tokens, and over all of them where the look-up was of other ones."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 3, 4, generator=draw, dtype=torch.float64)
    tokens = torch.tensor([[True, True, False], [True, False, False]])
    lookup = Lookup(torch.zeros(2, 3, 1), tokens, 0)
    expected = [(a[0, :2] - b[0, :2]).square().sum() / 2, (a[1, 0] - b[1, 0]).square().sum()]
    torch.testing.assert_close(_distance(a, b, lookup), torch.stack(expected))
    transposed = Lookup(torch.zeros(3, 2, 1), tokens.mT, 1)
    torch.testing.assert_close(_distance(a.transpose(0, 1), b.transpose(0, 1), transposed), torch.stack(expected))
    everything = (a - b).square().sum((1, 2)) / 3
    torch.testing.assert_close(_distance(a, b, None), everything)
    torch.testing.assert_close(_distance(a, b, Lookup(torch.zeros(2, 5, 1), torch.ones(2, 5) > 0, 0)), everything)


@pytest.mark.parametrize("axis", [0, 1])
def test_virtual_tokens_before_a_text_count_in_its_distance_and_padding_does_not(axis: int):
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 5, 4, generator=draw, dtype=torch.float64)
    tokens = torch.tensor([[True, True, False], [True, False, False]])  # after two virtual ones
    lookup = Lookup(torch.zeros(2, 3, 1), tokens, 0) if axis == 0 else Lookup(torch.zeros(3, 2, 1), tokens.mT, 1)
    expected = [(a[i, :n] - b[i, :n]).square().sum() / n for i, n in ((0, 4), (1, 3))]
    found = _distance(a.transpose(0, axis), b.transpose(0, axis), lookup)
    torch.testing.assert_close(found, torch.stack(expected))


def test_the_term_of_lnsr_counts_once_for_every_scored_token_of_a_text():
    """As the loss of a text is a sum over them, so that its weight means the same for texts of any length."""
    made, batch = in_training("BERT", "masked LM")
    method = LNSR()
    found = term(method, made.model, batch, made.objective)
    counts = predict(made.model, batch, made.objective).count
    single = dict(batch, labels=torch.full_like(batch["labels"], -100))
    single["labels"][:, 1] = 3
    made.model.zero_grad()
    torch.manual_seed(0)
    one = term(method, without_dropout(copy.deepcopy(made.model)), single, made.objective)
    many = term(method, without_dropout(copy.deepcopy(made.model)), batch, made.objective)
    torch.testing.assert_close(many, counts * one)
    assert found.shape == counts.shape and int(counts.max()) > 1


def test_lnsr_works_on_models_of_images():
    made, batch = in_training("ViT", "image classification")
    assert bool((term(LNSR(), made.model, batch) > 0).all())


def test_lnsr_refuses_models_without_numbered_layers():
    with pytest.raises(ValueError, match=r"^LNSR needs a model of numbered layers, but a BertForSeq\w+ has none\.$"):
        term(LNSR(), Logistic(), one_token())


def test_lnsr_keeps_no_hidden_states_after_the_penalty():
    made, batch = in_training("BERT")
    method = LNSR()
    with following(method, made.model) as passes:
        predictions = predict(made.model, batch, made.objective)
        assert len(vars(passes)["states"]) == 2
        method.penalty(made.model, batch, predictions)
        assert vars(passes)["states"] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, r"^The weight of LNSR must not be negative, got -1\.$"),
        ({"layer": -1}, r"^The layer of LNSR must not be negative, got -1\.$"),
        ({"relative_noise": 0.0}, r"^relative_noise must be above 0, got 0\.$"),
    ],
)
def test_lnsr_refuses_settings_without_a_meaning(settings: Any, message: str):
    with pytest.raises(ValueError, match=message):
        LNSR(**settings)


# All of them


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [R3F(), R4F(), SMART(4), LNSR()], ids=lambda m: m.name)
def test_every_model_trains_with_every_method(name: str, method: Regularizer):
    """Two steps: the penalty is positive in both, the head moves, and not as without the method."""
    made = entry(name, "classification")
    plain, found = (trained(how, made, steps=2)["values"] for how in (Regularizer(), method))
    (head,) = last_layers(made.model)
    assert bool(found[2][head].isfinite().all()) and not torch.equal(found[2][head], found[0][head])
    assert not torch.equal(found[2][head], plain[2][head])


@pytest.mark.parametrize("method", [R3F(), SMART(4), LNSR()], ids=lambda m: m.name)
def test_gradients_are_the_same_when_the_model_is_wrapped_for_several_ranks(method: Regularizer):
    made, batch = in_training("BERT")

    def found(model: nn.Module) -> dict[str, Tensor]:
        made.model.zero_grad()
        torch.manual_seed(0)
        with method.applied_to(made.model, SGD(made.model.parameters(), lr=0.1)):
            predictions = predict(model, batch, made.objective)
            penalty = method.penalty(model, batch, predictions)
            assert penalty is not None
            (predictions.losses().total + 1e3 * penalty).sum().backward()
        return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}

    alone = found(made.model)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # pyright: ignore
    try:
        wrapped = found(DistributedDataParallel(made.model, find_unused_parameters=True))
    finally:
        distributed.destroy_process_group()
    assert alone.keys() == wrapped.keys() and len(alone) > 10
    for name, gradient in alone.items():
        torch.testing.assert_close(wrapped[name], gradient, msg=name)


@pytest.mark.parametrize(
    "method", [R3F(1e-9), only_adversarial(adversarial_weight=1e-9), only_bregman(bregman_weight=1e-9), LNSR(1e-9)]
)
def test_a_tiny_weight_is_as_good_as_none(method: Regularizer):
    """Dropout goes on as if there were no further passes."""
    made = case("bert-classifier")
    plain, found = trained(Regularizer(), made)["values"][-1], trained(method, made)["values"][-1]
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize("method", [R3F(), SMART(4), LNSR()], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bert-regressor"])
def test_texts_and_numbers_are_regularised_too(name: str, method: Regularizer):
    made = case(name)
    plain, found = (trained(how, made, steps=2)["values"][-1] for how in (Regularizer(), method))
    assert any(not torch.equal(found[n], value) for n, value in plain.items())
    assert all(bool(value.isfinite().all()) for value in found.values())
