"""Methods that change how fast and how long what is trained: rates by layer, unfreezing, probes, Adam, length."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import entry
from conftest import Case, batched
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fisherscope as fs
from fisherscope.finetune import METHODS, Composed, parts, plan
from fisherscope.finetune.methods.fixed_mask import new_names
from fisherscope.finetune.methods.gradual_unfreezing import GradualUnfreezing, slanted_triangle
from fisherscope.finetune.methods.layerwise_rates import LayerwiseRates, depths
from fisherscope.finetune.methods.linear_probe import LinearProbe
from fisherscope.finetune.methods.long import Long
from fisherscope.finetune.methods.top_k_layers import numbered_layers
from fisherscope.finetune.methods.undebiased import Undebiased
from fisherscope.finetune.plan import check_method, recipe_of
from fisherscope.finetune.recipe import Recipe
from fisherscope.finetune.regularizer import Regularizer
from fisherscope.objectives import example_losses

FAMILIES = ("BERT", "RoBERTa", "DeBERTa", "DeBERTa-v3", "XLNet", "BART", "ELECTRA", "GPT-2", "T5")
NAMES = ("layerwise-lr-decay", "gradual-unfreezing", "linear-probe", "vanilla-undebiased")


@pytest.fixture
def encoder() -> Case:
    return entry("BERT", "classification")


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def copied(case: Case) -> Case:
    return Case(copy.deepcopy(case.model), case.objective, case.examples)


def adam(model: nn.Module, lr: float = 1e-2) -> AdamW:
    return AdamW(model.parameters(), lr=lr, weight_decay=0.1)


def train(case: Case, optimizer: Optimizer, steps: int, scheduler: LambdaLR | None = None) -> None:
    """Optimizer steps with dropout, all on the same examples."""
    case.model.train()
    batch = batched(case.examples[:4], 4)[0]
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        example_losses(case.model, batch, case.objective).mean.mean().backward()
        optimizer.step()
        if scheduler:
            scheduler.step()


def trained(case: Case, method: Regularizer, steps: int) -> dict[str, Tensor]:
    case = copied(case)
    optimizer = adam(case.model)
    with method.applied_to(case.model, optimizer):
        train(case, optimizer, steps)
    return values(case.model)


# Steps that are changed


def test_contexts_around_steps_are_nested_and_before_what_comes_after():
    """The last one put around is the innermost; write-backs of masks see what all of them did."""
    parameter, told = nn.Parameter(torch.zeros(1)), []
    optimizer = SGD([parameter], lr=1.0)

    def telling(name: str) -> Any:
        @contextmanager
        def step() -> Iterator[None]:
            told.append(f"in {name}")
            yield
            told.append(f"out {name}")

        return step

    with (
        parts.after_steps(optimizer, lambda: told.append("after")),
        parts.around_steps(optimizer, telling("a")),
        parts.around_steps(optimizer, telling("b")),
    ):
        for _ in range(2):
            told.clear()
            optimizer.step()
            assert told == ["in a", "in b", "out b", "out a", "after"]


def test_a_step_that_raises_is_left_like_a_block(encoder: Case):
    """Rates are what they were, although the step never came to its end."""
    optimizer = adam(encoder.model)
    for parameter in encoder.model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def stop() -> None:
        raise KeyError("stop")

    for method in (Undebiased(), GradualUnfreezing(10)):
        before = dict(optimizer.param_groups[0])
        with (
            pytest.raises(KeyError),
            method.applied_to(encoder.model, optimizer),
            parts.before_steps(optimizer, stop),
        ):
            optimizer.step()
        assert optimizer.param_groups[0] == before


# Rates by layer


def test_the_published_factor_of_the_embeddings():
    """0.95 to the 25th for 24 layers, as in the program of arXiv 2006.05987."""
    import transformers

    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(num_hidden_layers=24, hidden_size=8, num_attention_heads=2, intermediate_size=8)
        )
    found = {name: 0.95**depth for name, depth in depths(model).items()}
    assert found["bert.embeddings.word_embeddings.weight"] == pytest.approx(0.2773895731, abs=1e-10)
    assert found["bert.encoder.layer.23.output.dense.weight"] == 0.95
    assert found["classifier.weight"] == found["bert.pooler.dense.weight"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_depth(family: str):
    """From the head, 0, through all layers to the embeddings; layers are counted from the top."""
    model = entry(family, "classification").model
    found, layers = depths(model), list(numbered_layers(model))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert set(found.values()) == set(range(len(layers) + 2))
    assert {found[name] for name in new_names(model)} == {0}
    for depth, layer in enumerate(reversed(layers), 1):
        assert {found[name] for name in found if name.startswith(f"{layer}.")} == {depth}
    tables = [f"{p}.weight" for p, module in model.named_modules() if isinstance(module, nn.Embedding)]
    outside = [name for name in tables if name in found and not any(name.startswith(f"{x}.") for x in layers)]
    assert {found[name] for name in outside} == {len(layers) + 1}


def test_a_norm_after_the_layers_is_with_the_top_one():
    found = depths(entry("T5", "classification").model)
    assert found["transformer.decoder.final_layer_norm.weight"] == 1
    assert found["transformer.encoder.final_layer_norm.weight"] == 3


def test_it_is_what_groups_with_these_rates_do(encoder: Case):
    """Five steps of AdamW with decay, one group for every depth."""
    found = trained(encoder, LayerwiseRates(0.7), 5)
    case, by_depth = copied(encoder), depths(encoder.model)
    parameters = dict(case.model.named_parameters())
    groups = [
        {"params": [parameters[n] for n, depth in by_depth.items() if depth == d], "lr": 1e-2 * 0.7**d}
        for d in sorted(set(by_depth.values()))
    ]
    train(case, AdamW(groups, weight_decay=0.1), 5)
    for name, value in values(case.model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-13, msg=name)


def test_what_has_the_full_rate_keeps_every_bit_of_its_step(encoder: Case):
    found, plain = (trained(encoder, method, 1) for method in (LayerwiseRates(0.5), Regularizer()))
    same = {name for name, depth in depths(encoder.model).items() if depth == 0}
    assert same == {name for name in plain if torch.equal(found[name], plain[name])}


@pytest.mark.parametrize("kind", [LayerwiseRates, lambda decay: GradualUnfreezing(10, decay=decay)])
@pytest.mark.parametrize("decay", [0.0, 1.1])
def test_factors_that_are_none_are_refused(kind: Any, decay: float):
    with pytest.raises(ValueError, match=r"^decay must be above 0 and at most 1, got"):
        kind(decay)


def test_a_model_without_layers_is_refused():
    model = nn.Linear(2, 2)
    for method in (LayerwiseRates(), GradualUnfreezing(10)):
        with (
            pytest.raises(ValueError, match=r"^A Linear has no numbered layers to tell apart; take another method\.$"),
            method.applied_to(model, adam(model)),
        ):
            pass


# Gradual unfreezing


def test_the_slanted_triangle():
    """Of 1000 steps, a tenth of them up, 32 times as high as low: the values of ULMFiT's formula."""
    found = [slanted_triangle(t, 1000, 0.1, 32) for t in (0, 100, 550, 1000)]
    assert found == [1 / 32, 1, 0.515625, 1 / 32]


@pytest.mark.parametrize("steps", [1, 5, 9])
def test_few_steps_have_a_schedule_too(steps: int):
    """With less than one step to rise, it begins at its top."""
    found = [slanted_triangle(t, steps) for t in range(steps)]
    assert found[0] == 1
    assert found == sorted(found, reverse=True)


def test_a_ratio_of_one_is_a_constant_rate():
    assert {slanted_triangle(t, 50, 0.1, 1.0) for t in range(50)} == {1.0}


def test_the_stages():
    """4 groups in half of 60 steps: one more every 10 steps, each with a schedule of its own, then one for the rest."""
    method = GradualUnfreezing(60, share=0.5)
    stages = [method.stage(step, 4) for step in range(60)]
    assert [trained for trained, _ in stages] == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 30
    for start, length in ((0, 10), (10, 10), (20, 10), (30, 30)):
        assert [factor for _, factor in stages[start : start + length]] == [
            slanted_triangle(t, length) for t in range(length)
        ]


def test_one_group_after_every_epoch():
    """As published: 3 epochs of 20 steps and 6 groups need a share of 5 / 3, and the training ends before all."""
    method = GradualUnfreezing(60, share=5 / 3)
    assert [method.stage(step, 6)[0] for step in (0, 19, 20, 39, 40, 59)] == [1, 1, 2, 2, 3, 3]


def test_without_frozen_groups_it_is_the_schedule_alone(encoder: Case):
    """Bit for bit a scheduler's rates; one that the optimizer has is replaced."""
    case = copied(encoder)
    optimizer = adam(case.model)
    train(case, optimizer, 6, LambdaLR(optimizer, lambda t: slanted_triangle(t, 6)))
    other = copied(encoder)
    optimizer = adam(other.model)
    scheduler = LambdaLR(optimizer, lambda t: 0.5**t)
    with GradualUnfreezing(6, share=0.0).applied_to(other.model, optimizer):
        train(other, optimizer, 6, scheduler)
    assert optimizer.param_groups[0]["lr"] == 1e-2 * 0.5**6
    found = values(other.model)
    assert [name for name, value in values(case.model).items() if not torch.equal(found[name], value)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_frozen_until_their_turn(family: str):
    """Every bit, with no state in the optimizer; then they move, from the top down."""
    case = entry(family, "classification")
    below, count = depths(case.model), len(numbered_layers(case.model)) + 2
    optimizer, start = adam(case.model), values(case.model)
    with GradualUnfreezing(2 * count, share=(count - 1) / count).applied_to(case.model, optimizer):
        for trained in range(1, count + 1):
            train(case, optimizer, 2)
            moved = {n for n, p in case.model.named_parameters() if not torch.equal(p, start[n])}
            used = {n for n, p in case.model.named_parameters() if p in optimizer.state}
            assert {below[name] for name in moved} == set(range(trained))
            assert moved <= used <= {name for name, depth in below.items() if depth < trained}


def test_frozen_groups_do_not_count_for_clipping(encoder: Case):
    """Their gradients are 0 when the norm is taken."""
    optimizer = adam(encoder.model)
    with GradualUnfreezing(10).applied_to(encoder.model, optimizer):
        batch = batched(encoder.examples[:2], 2)[0]
        example_losses(encoder.model.train(), batch, encoder.objective).mean.mean().backward()
        norms = {name: float(p.grad.norm()) for name, p in encoder.model.named_parameters() if p.grad is not None}
    below = depths(encoder.model)
    assert all((norm > 0) == (below[name] == 0) for name, norm in norms.items())


def test_a_training_goes_on_where_it_was(encoder: Case):
    """The number of steps taken is all there is to keep."""
    method, found = GradualUnfreezing(8), []
    for step in (0, 3, 6):
        with method.applied_to(encoder.model, adam(encoder.model)) as applied:
            applied.load_state_dict({"step": torch.tensor(step)})
            found.append(len(applied.frozen))  # pyright: ignore
            assert applied.state_dict()["step"].item() == step
    assert found[0] > found[1] > found[2] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": -0.1}, r"^share must be at least 0, got -0\.1\.$"),
        ({"ratio": 0.5}, r"^ratio must be at least 1, got 0\.5\.$"),
        ({"cut": 1.0}, r"^cut must be at least 0 and below 1, got 1\.$"),
    ],
)
def test_schedules_that_are_none_are_refused(settings: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        GradualUnfreezing(10, **settings)


# Linear probe


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_the_head_is_trained(family: str):
    """The backbone keeps every bit under weight decay and has no state in the optimizer."""
    case = entry(family, "classification")
    head, before, optimizer = new_names(case.model), values(case.model), adam(case.model)
    with LinearProbe().applied_to(case.model, optimizer):
        train(case, optimizer, 3)
    moved = {name for name, p in case.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == head
    assert {name for name, p in case.model.named_parameters() if p in optimizer.state} == head


def test_a_pretrained_pooler_is_frozen_and_a_new_one_is_not():
    """The checkpoint decides."""
    probed = []
    for family in ("BERT", "DeBERTa"):
        case = entry(family, "classification")
        with LinearProbe().applied_to(case.model, adam(case.model)):
            probed.append({n for n, p in case.model.named_parameters() if p.requires_grad and "pooler" in n})
    assert probed == [set(), {"pooler.dense.weight", "pooler.dense.bias"}]


# Adam without bias correction


def squares(method: Regularizer, steps: int) -> list[float]:
    r"""The values of :math:`\theta` from 1 down :math:`\theta^2 / 2`, whose gradient it is."""
    w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer, found = AdamW([w], lr=0.1, weight_decay=0.0), []
    with method.applied_to(nn.ParameterList([w]), optimizer):
        for _ in range(steps):
            w.grad = w.detach().clone()
            optimizer.step()
            found.append(w.item())
    return found


def test_three_steps_without_bias_correction():
    """By hand, with the epsilon added to the root of the second moment itself."""
    assert squares(Undebiased(), 3) == pytest.approx([0.68377233, 0.27020617, -0.16214121], abs=1e-8)


def test_the_ratio_of_the_steps():
    r""":math:`(1 - \beta_1^t) / \sqrt{1 - \beta_2^t}` times those of AdamW, which are the rate here."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer, path = AdamW([w], lr=0.1, weight_decay=0.0, eps=1e-12), [0.0]
    with Undebiased().applied_to(nn.ParameterList([w]), optimizer):
        for _ in range(5000):
            w.grad = torch.ones_like(w)
            optimizer.step()
            path.append(w.item())
    ratios = [(path[t - 1] - path[t]) / 0.1 for t in (1, 10, 100, 1000, 5000)]
    assert ratios == pytest.approx([3.16, 6.53, 3.24, 1.26, 1.003], rel=2e-3)


def test_a_whole_model_without_bias_correction(encoder: Case):
    """Five steps with decay and a warm-up from 0, by a slow reference."""
    case = copied(encoder)
    optimizer, expected, m, v = adam(case.model), values(encoder.model), {}, {}
    rates = [0.0, 5e-3, 1e-2, 7e-3, 1e-3]
    with Undebiased().applied_to(case.model, optimizer):
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            train(case, optimizer, 1)
            for name, parameter in case.model.named_parameters():
                g = parameter.grad
                assert g is not None
                m[name] = 0.9 * m.get(name, 0) + 0.1 * g
                v[name] = 0.999 * v.get(name, 0) + 0.001 * g * g
                expected[name] = expected[name] * (1 - rate * 0.1) - rate * m[name] / (v[name].sqrt() + 1e-8)
            assert optimizer.param_groups[0]["lr"] == rate
    for name, parameter in case.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("started", [True, False])
def test_unequal_numbers_of_steps_are_refused(started: bool):
    """They have no common factor; nothing is done to them silently."""
    one, other = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = AdamW([one, other])
    for step in range(3):
        one.grad = torch.ones(1)
        other.grad = torch.ones(1) if started and step == 0 else None
        optimizer.step()
    other.grad = torch.ones(1)
    message = rf"^Leaving out the bias correction needs .*, but some took {int(started)} and others 3; take another"
    with Undebiased().applied_to(nn.ParameterList([one, other]), optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


def test_leaving_out_the_correction_needs_adamw(encoder: Case):
    optimizer = SGD(encoder.model.parameters(), lr=0.1)
    with (
        pytest.raises(ValueError, match=r"^vanilla-undebiased is a form of AdamW, but the optimizer is SGD;"),
        Undebiased().applied_to(encoder.model, optimizer),
    ):
        pass


# Longer trainings


def test_three_epochs_become_twenty():
    """As in arXiv 2006.04884."""
    assert recipe_of("vanilla-long", {}, Recipe()).epochs == pytest.approx(20)


def test_steps_become_as_many_times_more():
    found = recipe_of("vanilla-long+mixout", {"longer": 2.5, "rate": 0.5}, Recipe(max_steps=3))
    assert found == Recipe(max_steps=8, epochs=7.5)


def test_a_regularizer_changes_the_recipe_as_its_name_does():
    for method in (Long(2.0), Composed([Regularizer(), Long(2.0)])):
        assert recipe_of(method, {}, Recipe()) == Recipe(epochs=6.0)


def test_others_leave_the_recipe_as_it_is():
    for name in METHODS.keys() - {"vanilla-long"}:
        assert recipe_of(name, {}, Recipe()) == Recipe()


@pytest.mark.parametrize("longer", [0.0, -1.0, math.inf, math.nan])
def test_lengths_that_are_none_are_refused(longer: float):
    with pytest.raises(ValueError, match=r"^longer must be above 0, got"):
        Long(longer)


# What does not go together


EXCLUDED = sorted((name, other) for name, method in METHODS.items() for other in method.excludes)


@pytest.mark.parametrize(("name", "other"), EXCLUDED)
def test_methods_that_exclude_each_other_are_refused(name: str, other: str):
    """In either order, in one sentence, before anything is loaded."""
    for pair in (f"{name}+{other}", f"{other}+{name}"):
        with pytest.raises(ValueError, match=rf"^({name} .* {other}|{other} .* {name}): [^.]+; take one of them\.$"):
            check_method(pair, {})


def test_pairs_that_must_not_be_combined():
    """Two pulls to the pretrained weights; an anchor for adapters, which have none; mixing what is frozen."""
    named = {frozenset(pair) for pair in EXCLUDED}
    for pair in (
        ("recadam", "weight-decay-pretrained"), ("recadam", "lora"), ("mixout", "lora"), ("recadam", "l2-sp"),
        ("re-init", "linear-probe"), ("gradual-unfreezing", "layerwise-lr-decay"),
    ):  # fmt: skip
        assert frozenset(pair) in named


def test_regularizers_that_exclude_each_other_are_refused():
    message = "^layerwise-lr-decay cannot be combined with gradual-unfreezing: that has rates for every layer of its"
    with pytest.raises(ValueError, match=message):
        Composed([GradualUnfreezing(10), LayerwiseRates()])


class Noted(Regularizer):
    """Notes when it is prepared and applied."""

    told: list[str]

    @classmethod
    def for_run(cls, run: Any, **settings: Any) -> "Noted":
        cls.told.append(cls.name)
        return cls()


def test_methods_are_prepared_in_their_order(monkeypatch: pytest.MonkeyPatch):
    """Whatever the order of their names; equal ones by name."""
    told: list[str] = []
    monkeypatch.setattr(plan, "METHODS", dict(METHODS))
    for name, order in (("late", 1), ("early", -1), ("one", 0), ("two", 0)):
        plan.METHODS[name] = type(name, (Noted,), {"name": name, "order": order, "told": told})
        METHODS.pop(name)  # where the class has put itself
    chosen = type("Chosen", (), {"method": "late+two+early+one", "settings": {}, "scores": None, "mask": None})
    plan.Plan.regularizer(chosen(), None)  # pyright: ignore
    assert told == ["early", "one", "two", "late"]


# All of them


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_trained_otherwise(name: str, family: str):
    """Finite values, a head that moves, and a backbone that is not that of plain fine-tuning."""
    case = entry(family, "classification")
    method = METHODS[name](**({"total_steps": 4} if name == "gradual-unfreezing" else {}))
    start, found, plain = values(case.model), trained(case, method, 3), trained(case, Regularizer(), 3)
    new = new_names(case.model)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert any(not torch.equal(found[n], start[n]) for n in new)
    assert any(not torch.equal(value, plain[n]) for n, value in found.items() if n not in new)


COMMON = {
    "task": "builtin:acceptability", "train_size": 8, "batch_size": 4, "max_steps": 3, "max_length": 16,
    "learning_rate": 1e-3, "warmup": 0.0, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_losses() -> Iterator[list[Mapping[str, float]]]:
    """Of plain fine-tuning, measured on few examples, as all runs are meanwhile."""

    def few(name: str, split: str, **options: Any) -> fs.Source:
        source = fs.read_task(name, split, **options)
        return replace(source, texts=source.texts[:8], labels=source.labels[:8])  # pyright: ignore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "read_task", few)
        yield fs.finetune("builtin:bert", **COMMON).runs[0].evaluations


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "vanilla-long"])
def test_whole_runs(name: str, plain_losses: list[Mapping[str, float]]):
    """Through Trainer: another loss than plain fine-tuning, and a finite one."""
    settings = {"longer": 5 / 3} if name == "vanilla-long" else {}
    results = fs.finetune("builtin:bert", method=name, settings=settings, **COMMON)
    found = results.runs[0].evaluations[-1]
    assert found["step"] == (5 if name == "vanilla-long" else 3)
    assert results.settings["max_steps"] == found["step"]
    assert math.isfinite(found["loss"])
    assert found["loss"] != plain_losses[-1]["loss"]
