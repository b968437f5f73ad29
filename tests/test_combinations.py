"""Two methods at once: the order of their names changes nothing, and both have an effect, or they are refused."""

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

import fisherscope as fs
from fisherscope.finetune import METHODS, Composed, Regularizer
from fisherscope.finetune.methods.l2_sp import L2SP
from fisherscope.finetune.methods.top_k_layers import TopKLayers
from fisherscope.finetune.plan import Plan, check_method
from fisherscope.finetune.recipe import Recipe
from fisherscope.finetune.run import Run
from fisherscope.models import load_model
from fisherscope.objectives import predict

BERT, TASK = "builtin:bert", "builtin:acceptability"
STEPS, TOTAL = 2, 16
SETTINGS: dict[str, dict[str, Any]] = {
    "fish-mask": {"keep": 0.05},
    "gradual-unfreezing": {"share": 0.0},  # or the first steps train the head alone
    "recadam": {"gamma": 100.0},
    "top-k-layers": {"layers": 1},
    "weights-mixup": {"splits": 1, "search_epochs": 0.2},
    "smart": {"sigma": 1e-2, "eps": 1e-2},
    "r3f": {"eps": 1e-2},
    "r4f": {"eps": 1e-2},
}
INERT = {"vanilla", "vanilla-long"}
"""What changes nothing in a step."""
ALIKE = {("fish-mask", "fixed-mask")}
"""What chooses by the same scores here; with a mask of its own the second has an effect."""


@functools.cache
def loaded() -> tuple[Any, Any, dict[str, Tensor], fs.FisherScores, Plan]:
    """A model, examples, its values, its scores, and a plan without a method."""
    source = fs.read_task(TASK, "train")
    model, tokenizer = load_model(BERT, objective="classification", num_labels=2)
    batches = fs.load_batches(
        source, tokenizer, objective="classification", num_examples=8, batch_size=4, max_length=12
    )
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    scores = fs.estimate_fisher(model, batches, progress=False)
    plan = Plan(BERT, None, "cpu", "classification", TASK, "accuracy", source, None, None, 0, None, Recipe(), "vanilla")
    return model, batches, values, scores, plan


@functools.cache
def another() -> Any:
    """A teacher."""
    return load_model(BERT, objective="classification", num_labels=2, seed=1)[0]


def begin() -> None:
    """Put the values of the checkpoint back; nothing has a gradient yet."""
    model, _, values, _, _ = loaded()
    model.zero_grad()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


def settings_of(method: str) -> dict[str, Any]:
    return {name: value for part in method.split("+") for name, value in SETTINGS.get(part, {}).items()}


def prepared(method: str, settings: dict[str, Any]) -> Regularizer:
    """As a run has it."""
    model, batches, _, scores, plan = loaded()
    facts = {"learning_rate": 1e-3, "batch_size": 4}
    run = Run(model, batches, "classification", TOTAL, scores=scores, settings=facts, fine_tuned=another)
    return replace(plan, method=method, settings=settings).regularizer(run)


@functools.cache
def outcome(method: str) -> str | dict[str, Tensor]:
    """All values after the first steps of a training, or why there is none."""
    model, batches, _, _, _ = loaded()
    begin()
    settings = settings_of(method)
    try:
        check_method(method, settings)
        chosen = prepared(method, settings)
        chosen.extend(model)
        model.train()
        optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        torch.manual_seed(0)
        with chosen.applied_to(model, optimizer):
            for batch in itertools.islice(batches, STEPS):
                predictions = predict(model, batch, "classification")
                total, term = predictions.losses().total, chosen.penalty(model, batch, predictions)
                optimizer.zero_grad()
                (total if term is None else total + term).mean().backward()
                optimizer.step()
    except ValueError as error:
        return str(error)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: str | dict[str, Tensor], b: str | dict[str, Tensor]) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.slow
@pytest.mark.parametrize("first", sorted(METHODS))
def test_every_pair_in_both_orders(first: str):
    """Both are refused in the same sentence, or begin bit for bit alike, and as neither method does alone."""
    for second in [name for name in sorted(METHODS) if name > first]:
        there, back = outcome(f"{first}+{second}"), outcome(f"{second}+{first}")
        assert same(there, back), (first, second)
        if not isinstance(there, str) and (first, second) not in ALIKE:
            assert second in INERT or not same(there, outcome(first)), f"{second} has no effect beside {first}"
            assert first in INERT or not same(there, outcome(second)), f"{first} has no effect beside {second}"


@pytest.mark.parametrize(
    ("first", "second"),
    [("top-k-layers", "dps-mix"), ("mixout", "r-drop"), ("weights-mixup", "recadam"), ("re-init", "mixout")],
)
def test_the_order_of_two_names_changes_no_bit(first: str, second: str):
    there, back = outcome(f"{first}+{second}"), outcome(f"{second}+{first}")
    assert not isinstance(there, str)
    assert same(there, back)
    assert not any(same(there, outcome(alone)) for alone in (first, second))


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ("gaussian-dropout", "mixout", "both take the place of the dropout"),
        ("gaussian-dropout", "guided-dropout", "both take the place of the dropout"),
        ("guided-dropout", "mixout", "both take the place of the dropout"),
        ("mixout", "bitfit", "the matrices to be mixed would be frozen"),
        ("weight-decay-pretrained", "bitfit", "the matrices to be pulled would be frozen"),
        ("linear-probe", "bitfit", "nothing but the head is trained"),
        ("linear-probe", "child-tuning-d", "nothing but the head is trained"),
        ("linear-probe", "lnsr", "nothing but the head is trained"),
        ("linear-probe", "fixed-mask", "nothing but the head is trained"),
        ("weights-mixup", "bitfit", "its search moves all weights"),
        ("weights-mixup", "fixed-mask", "its search moves all weights"),
        ("weights-mixup", "top-k-layers", "its search moves all weights"),
        ("weights-mixup", "mixout", "both compute with changed matrices"),
        ("weights-mixup", "dps-mix", "both compute with changed matrices"),
        ("r4f", "dps-mix", "both compute with changed matrices"),
        ("dps-dense", "dps-mix", "both choose what the second stage trains"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(first: str, second: str, why: str):
    said = []
    for method in (f"{first}+{second}", f"{second}+{first}"):
        with pytest.raises(ValueError, match=f"cannot be combined with .*: {why}") as error:
            check_method(method, settings_of(method))
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_name_twice_is_refused():
    with pytest.raises(ValueError, match=r"must be different ones, but smart\+r-drop\+smart has smart twice"):
        check_method("smart+r-drop+smart", {})


@pytest.mark.parametrize("method", ["weights-mixup+l2-sp", "l2-sp+weights-mixup"])
def test_an_anchor_is_the_checkpoint_not_what_a_search_found(method: str):
    begin()
    model, _, values, _, _ = loaded()
    made = prepared(method, SETTINGS["weights-mixup"])
    assert isinstance(made, Composed)
    (anchor,) = [part.anchor for part in made.parts if isinstance(part, L2SP)]
    assert all(torch.equal(value, values[name]) for name, value in anchor.items())
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(model.get_parameter(name), values[name])


def test_composed_freezes_first():
    """Whatever the order of the parts: dps-mix finds the matrices of the top layer and the head only."""
    begin()
    model, _, _, _, _ = loaded()
    found = []
    parts = [METHODS["dps-mix"](total_steps=4, seed=0), TopKLayers(1)]  # pyright: ignore[reportCallIssue]
    for both in (Composed(parts), Composed(parts[::-1])):
        with both.applied_to(model, AdamW(model.parameters())) as applied:
            found.append(sorted(applied.state_dict()))
    assert found[0] == found[1]
    assert not any(".layer.0." in name for name in found[0])
