"""What is estimated: labels of the data, drawn, or all; sequences or tokens; and what papers published instead."""

import functools
import math

import pytest
import reference
import torch
from conftest import IGNORED, Case, batched, case
from test_fisher import PRECISION, WithLogits, assert_same, labelled, moved
from torch import Tensor
from torch.nn import functional as F

from fisherscope.fisher import Estimand, estimate_fisher
from fisherscope.objectives import predict

fisher = functools.partial(estimate_fisher, progress=False)

LANGUAGE = ("bert", "gpt2", "t5")
ESTIMANDS = {
    "drawn labels": {"estimator": "sampled", "draws": 2},
    "drawn labels of tokens": {"estimator": "sampled", "unit": "token", "draws": 2},
    "tokens": {"unit": "token"},
    "two tokens each": {"unit": "token", "tokens": 2},
    "all labels": {"estimator": "exact"},
    "all labels of tokens": {"estimator": "exact", "unit": "token"},
    "all labels, summed": {"estimator": "exact", "reduction": "sum"},
}


def scored_tokens(made: Case, n: int) -> list[tuple[Tensor, Tensor]]:
    """Logits and label of every scored token of one example, alone and unpadded."""
    example = made.examples[n]
    inputs = {name: value[None] for name, value in example.items()}
    labels = inputs.pop("labels")[0]
    if made.objective == "seq2seq-lm":
        start = torch.tensor([made.model.config.decoder_start_token_id])
        inputs["decoder_input_ids"] = torch.cat([start, labels.clamp(min=0)[:-1]])[None]
    logits = made.model(**inputs).logits[0].reshape(-1, made.model.config.vocab_size)
    if made.objective == "causal-lm":
        logits, labels = logits[:-1], labels[1:]
    return [(logits[t], labels[t]) for t in range(len(labels)) if labels[t] != IGNORED]


def squared(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g**2 for (n, p), g in zip(parameters.items(), found, strict=True)}


def summed(parts: list[dict[str, Tensor]], divisor: float) -> dict[str, Tensor]:
    return {name: sum(part[name] for part in parts) / divisor for name in parts[0]}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", LANGUAGE)
def test_unit_token_by_hand(name: str, size: int):
    made = case(name, lengths=(7, 4, 6))
    tokens = [pair for n in range(3) for pair in scored_tokens(made, n)]
    parts = [squared(made.model, F.cross_entropy(logits, label)) for logits, label in tokens]
    scores = fisher(made.model, batched(made.examples, size), unit="token")
    assert_same(scores, summed(parts, len(tokens)), PRECISION.get(name, 1e-9))
    assert (scores.num_examples, scores.unit) == (len(tokens), "token")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_exact_expectation_over_tokens_by_hand(reduction: str):
    """Between tokens the expectation is 0, so every token's expectation is added."""
    made = case("bert", lengths=(5, 4))
    parts = []
    for n in range(2):
        tokens = scored_tokens(made, n)
        scale = 1 / len(tokens) if reduction == "mean" else 1.0
        for logits, _ in tokens:
            for label, p in enumerate(logits.detach().softmax(0).tolist()):
                part = squared(made.model, F.cross_entropy(logits, torch.tensor(label)))
                parts.append({k: p * scale**2 * v for k, v in part.items()})
    scores = fisher(made.model, batched(made.examples, 2), estimator="exact", reduction=reduction)
    assert_same(scores, summed(parts, 2))


AGREEING = [
    (kind, name)
    for kind, settings in ESTIMANDS.items()
    for name in ("bert-classifier", "bert-regressor", *(() if settings.get("estimator") == "exact" else ("bert", "t5")))
]  # all labels of a vocabulary take a backward pass each


@pytest.mark.parametrize(("kind", "name"), AGREEING)
def test_engines_agree_whatever_the_batch(kind: str, name: str):
    """Also the draws: they belong to the example, not to its batch, padding or place."""
    made = case(name, lengths=(7, 3, 5, 6))
    slow = fisher(made.model, batched(made.examples, 1), engine="loop", **ESTIMANDS[kind])
    for size, examples in ((4, made.examples), (3, made.examples[::-1])):
        assert_same(fisher(made.model, batched(examples, size), **ESTIMANDS[kind]), slow, PRECISION.get(name, 1e-9))


def test_exact_softmax_regression_on_paper():
    model = moved(WithLogits(4))
    examples = labelled(torch.arange(12) % 4)
    x = torch.stack([example["x"] for example in examples])
    p = model(x).logits.softmax(-1).detach()
    scores = fisher(model, batched(examples, 5), objective="classification", estimator="exact")
    variance = p * (1 - p)
    assert_same(scores, {"linear.weight": variance.T @ x**2 / 12, "linear.bias": variance.mean(0)})


def test_exact_does_not_look_at_the_labels():
    made = case("bert-classifier")
    wanted = fisher(made.model, batched(made.examples, 3), estimator="exact")
    others = [{**example, "labels": 1 - example["labels"].clamp(max=1)} for example in made.examples]
    assert_same(fisher(made.model, batched(others, 3), estimator="exact"), wanted)


def test_exact_linear_regression_on_paper():
    """A Gaussian with variance 1/2: the expectation of (2 r)^2 is 2."""
    model = moved(WithLogits(1))
    examples = labelled(torch.linspace(-1, 2, 12, dtype=torch.float64))
    x = torch.stack([example["x"] for example in examples])
    scores = fisher(model, batched(examples, 5), objective="regression", estimator="exact")
    assert_same(scores, {"linear.weight": 2 * (x**2).mean(0)[None], "linear.bias": torch.full((1,), 2.0).double()})


@pytest.mark.parametrize("outputs", [4, 1])
def test_drawn_labels_have_the_exact_expectation(outputs: int):
    model = moved(WithLogits(outputs))
    objective, labels = ("classification", torch.arange(6) % 4) if outputs == 4 else ("regression", torch.zeros(6))
    examples = labelled(labels if outputs == 4 else labels.double())
    exact = fisher(model, batched(examples, 6), objective=objective, estimator="exact")
    drawn = fisher(model, batched(examples, 6), objective=objective, estimator="sampled", draws=4000)
    for name, score in exact.items():
        assert (drawn[name] - score).norm() < 0.05 * score.norm(), name


def test_other_seeds_draw_other_labels():
    made = case("bert", lengths=(7, 5))
    first, same, other = (
        fisher(made.model, batched(made.examples, 2), estimator="sampled", seed=seed) for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.slow
def test_random_tokens_are_unbiased():
    made = case("bert", lengths=(8, 8))
    every = fisher(made.model, batched(made.examples, 2), unit="token")
    some = [fisher(made.model, batched(made.examples, 2), unit="token", tokens=1, seed=seed) for seed in range(60)]
    name = "bert.encoder.layer.0.output.dense.weight"
    mean = torch.stack([scores[name].sum() for scores in some]).mean()
    spread = torch.stack([scores[name].sum() for scores in some]).std() / math.sqrt(len(some))
    assert abs(mean - every[name].sum()) < 4 * spread


def test_squared_batch_mean_is_what_child_tuning_computes():
    made = case("bert-classifier")
    groups = [made.examples[i : i + 3] for i in range(0, len(made.examples), 3)]
    parts = []
    for group in groups:
        losses = [reference.example_loss(made.model, example, "classification") for example in group]
        parts.append(squared(made.model, sum(losses) / len(losses)))
    scores = fisher(made.model, batched(made.examples, 3), estimator="squared-batch-mean")
    assert_same(scores, summed(parts, len(groups)))
    assert scores.num_examples == len(groups)
    empirical = fisher(made.model, batched(made.examples, 3))
    assert sum(s.sum() for s in scores.values()) < sum(s.sum() for s in empirical.values())


def test_absolute_gradient_by_hand():
    made = case("bert-classifier")
    parts = [
        {
            n: g.abs()
            for n, g in reference.gradient(made.model, reference.example_loss(made.model, e, "classification")).items()
        }
        for e in made.examples
    ]
    scores = fisher(made.model, batched(made.examples, 3), estimator="absolute-gradient")
    for name, wanted in summed(parts, len(parts)).items():
        torch.testing.assert_close(scores[name], wanted, rtol=1e-9, atol=1e-15)


def test_exact_expectation_over_a_vocabulary_is_refused():
    made = case("gpt2")
    made.model.resize_token_embeddings(5000)
    with pytest.raises(ValueError, match="take the estimator sampled"):
        fisher(made.model, batched(made.examples, 3), estimator="exact")


def test_a_loss_function_has_no_expectation_over_labels():
    made = case("bert")
    with pytest.raises(ValueError) as error:
        fisher(
            made.model,
            batched(made.examples, 3),
            objective=lambda m, b: m(b["input_ids"]).logits.sum((1, 2)),
            estimator="exact",
        )
    assert str(error.value) == (
        "The exact expectation needs a named objective, but the losses come from a function; take the estimator "
        "empirical."
    )


def test_labels_of_a_loss_function_cannot_be_drawn():
    made = case("bert")
    with pytest.raises(ValueError, match="named objective"):
        fisher(
            made.model,
            batched(made.examples, 3),
            objective=lambda m, b: m(b["input_ids"]).logits.sum((1, 2)),
            estimator="sampled",
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 0, "estimator": "sampled"}, "draws"),
        ({"draws": 2}, "draws"),
        ({"tokens": 2}, "tokens"),
        ({"tokens": 0, "unit": "token"}, "tokens"),
        ({"estimator": "hutchinson"}, "estimator must be"),
        ({"unit": "word"}, "unit must be"),
        ({"estimator": "squared-batch-mean", "unit": "token"}, "squared-batch-mean"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str):
    made = case("bert")
    with pytest.raises(ValueError, match=message):
        fisher(made.model, batched(made.examples, 3), **settings)


def test_an_estimator_without_labels_of_its_own_is_no_other_one():
    """A name alone, as somebody begins with who writes a new one, would be the empirical Fisher under that name."""
    made = case("gpt2")
    estimand = Estimand()
    object.__setattr__(estimand, "estimator", "new")
    predictions = predict(made.model, batched(made.examples, 2)[0], made.objective)
    with pytest.raises(AssertionError, match="new"):
        list(estimand.terms(predictions, batched(made.examples, 2)[0]))
