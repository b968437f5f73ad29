"""Every method on every family: it trains otherwise than plain fine-tuning does, or says why it cannot.

``python tests/test_method_table.py`` writes docs/methods.md. Every cell of its first table has a test that does it
again; what a model must do for a cell is in :func:`cell`.
"""

import copy
import functools
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batched
from test_regularizers import TABLE, Given, given, of
from torch import Tensor, nn
from torch.optim import AdamW

from fisherscope.finetune import METHODS, Regularizer
from fisherscope.finetune.methods.fixed_mask import backbone_names, new_names
from fisherscope.finetune.methods.lora import LoRA
from fisherscope.finetune.methods.top_k_layers import numbered_layers
from fisherscope.models import dropout_sites, measuring, query_value_layers, quiet_transformers
from fisherscope.objectives import predict

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
OUTDATED = "run 'python tests/test_method_table.py' and commit docs/methods.md"
FAMILIES = (
    "BERT", "RoBERTa", "DistilBERT", "ELECTRA", "DeBERTa", "DeBERTa-v2", "XLNet", "BART", "GPT-2", "T5",
)  # fmt: skip
FAST = ("BERT", "GPT-2", "T5")
"""Those that `make test` does; `make test-all` does every one."""
WORKS = "✓"
STEPS = 2
RATE = 0.1


@dataclass(frozen=True)
class Neutral:
    """A setting at which a method is another one.

    Attributes:
        said: The setting; empty if the method itself tells.
        make: The method at that setting.
        reference: The method that it is then.
        training: What is special about both trainings.
        plain: What else is special about that of the reference.
    """

    said: str
    make: Callable[[Given], Regularizer]
    reference: str = "vanilla"
    training: Mapping[str, float] = field(default_factory=dict)
    plain: Mapping[str, float] = field(default_factory=dict)


class Still(LoRA):
    """LoRA whose own parameters are not trained."""

    def extend(self, model: nn.Module) -> None:
        super().extend(model)
        for parameter in self.added(model).values():
            parameter.requires_grad_(False)


NEUTRAL: dict[str, Neutral] = {
    "gaussian-dropout": Neutral(
        "`rate` 0: as without dropout in the backbone", of("gaussian-dropout", rate=0.0), plain={"rate": 0.0}
    ),
    "weight-decay-pretrained": Neutral(
        "`--weight-decay 0`", TABLE["weight-decay-pretrained"].active, training={"decay": 0.0}
    ),
    "lora": Neutral("A and B not trained: as `linear-probe`", lambda on: Still(rank=2), "linear-probe"),
}
"""Where it is no setting of the method alone; the others are in TABLE."""

NO_NEUTRAL = {
    "r4f": "none: at weight 0 the last layer still has spectral norm 1",
    "recadam": "none: without a pull it is Adam times the share of the task, with epsilon in another place",
    "vanilla-undebiased": "none: it has no strength",
    "bitfit": "none: it has no strength; what it freezes keeps every bit",
    "top-k-layers": "none: embeddings stay frozen; what is below the top layers keeps every bit",
    "linear-probe": "none: it has no strength; the backbone keeps every bit",
    "prefix-tuning": "none: there is no text without the tokens in front; the backbone keeps every bit",
    "prompt-tuning": "none: there is no text without the tokens in front; the backbone keeps every bit",
}
"""Why there is no setting at which a method is plain fine-tuning."""

FROZEN: dict[str, Callable[[nn.Module], set[str]]] = {
    **dict.fromkeys(("linear-probe", "prefix-tuning", "prompt-tuning"), lambda model: old_names(model)),
    "lora": lambda model: old_names(model) - {f"{layer}.weight" for layer in query_value_layers(model)},
    "bitfit": lambda model: {name for name in old_names(model) if not name.endswith("bias")},
    "top-k-layers": lambda model: set(next(iter(numbered_layers(model).values()))),
}
"""What must keep every bit."""


def old_names(model: nn.Module) -> set[str]:
    return set(backbone_names(model)) - new_names(model)


GOLDEN: dict[str, tuple[str, str]] = {
    "guided-dropout": (
        "0.099, 0.09625, …, 0 for the 37 sites of BERT-base",
        "test_dropout_methods.py::test_the_37_sites_of_a_model_shaped_like_bert_base_get_the_published_rates",
    ),
    "gaussian-dropout": (
        "noise with mean 1 and variance p / (1 - p)",
        "test_dropout_methods.py::test_gaussian_noise_has_mean_1_and_the_variance_of_dropout",
    ),
    "r-drop": (
        "even odds and 3 to 1 are ln 3 / 8 apart",
        "test_dropout_methods.py::test_the_divergence_of_even_odds_and_three_to_one_is_an_eighth_of_ln_3",
    ),
    "r3f": (
        "expected term of a logistic regression: 1.5762e-6 with normal noise, 5.2541e-7 with uniform noise",
        "test_smoothness.py::test_the_expectation_of_r3f_for_logistic_regression_is_known",
    ),
    "r4f": (
        "spectral norm 1 as by 200 power iterations",
        "test_smoothness.py::test_the_normalised_weight_has_spectral_norm_1_as_by_200_power_iterations",
    ),
    "smart": (
        "largest divergence of a logistic regression over a box: 0.0396459902",
        "test_smoothness.py::test_the_ascent_finds_the_maximum_over_the_box_for_logistic_regression",
    ),
    "lnsr": (
        "σ² Σ ‖W_r ⋯ W_(b+1)‖² for linear layers",
        "test_smoothness.py::test_the_expectation_of_lnsr_for_linear_layers_is_known",
    ),
    "fixed-mask": (
        "entries outside keep every bit under decay, momentum and clipping",
        "test_subnetworks.py::test_unselected_entries_keep_every_bit_under_decay_momentum_and_clipping",
    ),
    "random-mask": (
        "the same share of every parameter",
        "test_subnetworks.py::test_a_random_mask_trains_the_same_share_of_every_parameter_and_the_head",
    ),
    "fish-mask": (
        "scores are the mean of the examples' squared gradients",
        "test_subnetworks.py::test_fish_scores_are_the_mean_power_of_the_examples_gradients",
    ),
    "bitfit": (
        "what is trained: biases and the head",
        "test_subnetworks.py::test_bitfit_trains_biases_and_the_head_and_nothing_else",
    ),
    "child-tuning-f": (
        "every entry gets g / p or nothing; the mean is g",
        "test_subnetworks.py::test_every_entry_gets_its_gradient_divided_by_p_or_nothing",
    ),
    "child-tuning-d": (
        "masked entries decay by ∏ (1 - ηλ) and nothing else",
        "test_subnetworks.py::test_masked_entries_follow_the_product_of_the_decay_exactly",
    ),
    "top-k-layers": (
        "what is trained: top layers, pooler and head",
        "test_subnetworks.py::test_the_top_layers_pooler_and_head_are_trained_and_nothing_else",
    ),
    "dps-dense": (
        "the method written out, step by step",
        "test_dps.py::test_dense_equals_the_method_written_out",
    ),
    "dps-mix": (
        "the method written out, step by step",
        "test_dps.py::test_mix_equals_the_method_written_out",
    ),
    "label-smoothing": (
        "logits (2, 0, -1): 0.1698460196, smoothed by 0.1 0.3365126862",
        "test_label_methods.py::test_the_published_example_of_label_smoothing",
    ),
    "distillation": (
        "τ² KL at τ = 1, 2, 10, ∞: 0.2458913333, 0.2790376086, 0.2613344539, 0.25",
        "test_label_methods.py::test_the_divergence_at_several_temperatures",
    ),
    "teacher-free-distillation": (
        "logits (2, 0, -1), virtual teacher (0.99, 0.005, 0.005): 0.1319130134",
        "test_label_methods.py::test_the_published_example_of_the_virtual_teacher",
    ),
    "weight-decay-pretrained": (
        "without a gradient the distance shrinks by 1 - ηλ at every step",
        "test_proximity.py::test_without_a_gradient_the_distance_shrinks_geometrically",
    ),
    "l2-sp": (
        "optimum of a quadratic loss, (H + I)⁻¹ (H a + θ₀): (0.5, 0.8)",
        "test_proximity.py::test_the_optimum_of_a_quadratic_loss",
    ),
    "recadam": (
        "θ² / 2 from 1: 0.92625154, 0.84786368, 0.76491454",
        "test_proximity.py::test_three_steps_of_recadam",
    ),
    "mixout": (
        "[[1, 2], [3, 4]] with 0.5 at p = 0.5: [[1.5, 0.5], [5.5, 0.5]] and three others, their mean the weight",
        "test_proximity.py::test_the_mixtures_of_two_inputs",
    ),
    "re-init": (
        "N(0, 0.02²), biases 0, norms 1, as the class draws them",
        "test_proximity.py::test_the_distribution_is_that_of_the_class",
    ),
    "layerwise-lr-decay": (
        "embeddings below 24 layers at 0.95: 0.2773895731",
        "test_schedules.py::test_the_published_factor_of_the_embeddings",
    ),
    "gradual-unfreezing": (
        "slanted triangle of 1000 steps at 0, 100, 550, 1000: 1/32, 1, 0.515625, 1/32",
        "test_schedules.py::test_the_slanted_triangle",
    ),
    "linear-probe": (
        "what is trained: the head",
        "test_schedules.py::test_nothing_but_the_head_is_trained",
    ),
    "vanilla-undebiased": (
        "θ² / 2 from 1: 0.68377233, 0.27020617, -0.16214121",
        "test_schedules.py::test_three_steps_without_bias_correction",
    ),
    "vanilla-long": (
        "3 epochs become 20",
        "test_schedules.py::test_three_epochs_become_twenty",
    ),
    "weights-mixup": (
        "the error of the hypergradient falls as the square of the shift",
        "test_weights_mixup.py::test_the_error_falls_as_the_square_of_the_shift",
    ),
    "lora": (
        "786,432 entries for BERT-large at rank 8",
        "test_adapters.py::test_lora_has_786432_entries_on_bert_large",
    ),
    "prefix-tuning": (
        "983,040 entries for BERT-large at 20 tokens",
        "test_adapters.py::test_a_prefix_has_983040_entries_on_bert_large",
    ),
    "prompt-tuning": (
        "m d entries, which begin as embeddings of words",
        "test_adapters.py::test_a_prompt_has_one_embedding_for_every_virtual_token",
    ),
}  # fmt: skip
"""What is known of a method by formula or paper, and the test that finds it."""

NO_GOLDEN = {"vanilla": "none: nothing is added to `torch.optim.AdamW`"}


# Trainings


def trained(
    on: Given,
    method: Regularizer,
    steps: int = STEPS,
    rate: float = RATE,
    head_rate: float = RATE,
    decay: float = 0.1,
    lr: float = 1e-3,
    eps: float = 1e-8,
    saved: Path | None = None,
) -> dict[str, Tensor]:
    """The values after some steps with dropout, and whether the method kept what it promises meanwhile.

    ``rate`` and ``head_rate`` are those of every dropout site of the backbone and of the head. With ``saved`` the model
    is saved there after the block, and must compute there what it computed in eval mode inside.
    """
    model = copy.deepcopy(on.model).train()
    for site in dropout_sites(model, backbone_only=False):
        site.set_rate(head_rate)
    for site in dropout_sites(model):
        site.set_rate(rate)
    groups = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    optimizer = AdamW(
        [{"params": g, "weight_decay": d} for g, d in zip(groups, (decay, 0.0), strict=True)], lr, eps=eps
    )
    batches = batched(on.made.examples, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with method.applied_to(model, optimizer):
            assert_no_parameter_twice(optimizer)
            for number in range(steps):
                batch = batches[number % len(batches)]
                predictions = predict(model, batch, on.made.objective)
                losses = predictions.losses()
                term = method.penalty(model, batch, predictions)
                loss = (losses.total if term is None else losses.total + term).sum() / losses.count.sum()
                assert loss.isfinite()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            inside, outputs = values(model), outputs_of(model, batches[0])
    assert_no_parameter_twice(optimizer)
    if saved is not None and method.stays:
        with quiet_transformers():
            model.save_pretrained(saved)  # pyright: ignore[reportCallIssue]
            loaded: Any = type(model).from_pretrained(saved, dtype=torch.float64)  # pyright: ignore
        loaded.double()  # XLNet loads some parameters in float32, whatever is asked for
        torch.testing.assert_close(outputs_of(loaded, batches[0]), outputs, rtol=1e-5, atol=1e-5)
    return values(model) if method.extends else inside


def assert_no_parameter_twice(optimizer: AdamW) -> None:
    ids = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(ids) == len(set(ids))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def outputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    with measuring(model), torch.no_grad():
        return predict(model, batch, "classification").outputs


@functools.cache
def reference(family: str, method: str = "vanilla", **training: float) -> dict[str, Tensor]:
    """Of a method without settings."""
    return trained(given(family), METHODS[method](), **training)  # pyright: ignore[reportArgumentType]


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


def cell(method: str, family: str, folder: Path) -> str:
    """The mark of a method that works on a family, or the sentence that refuses the model.

    It works if all of this holds, and otherwise raises: two steps have finite losses, change the head, and end neither
    where plain fine-tuning ends nor where training the head alone does; what it freezes keeps every bit; no parameter
    is in the optimizer twice; a saved model computes what was computed inside the block; and at its neutral setting it
    ends bit for bit where plain fine-tuning does.
    """
    on = given(family)
    try:
        found = trained(on, TABLE[method].active(on), saved=folder)
    except ValueError as error:
        assert type(on.model).__name__ in str(error), error
        return str(error)
    moved = set(differing(found, values(on.model)))
    assert moved & new_names(on.model), "the head did not change"
    if method in FROZEN:
        frozen = FROZEN[method](on.model)
        assert frozen and not frozen & moved
    for other in {"vanilla", "linear-probe"} - {method}:
        if not (other == "vanilla" and TABLE[method].inert):
            assert differing(found, reference(family, other)), f"it does nothing that {other} does not"
    if neutral := neutral_of(method):
        expected = reference(family, neutral.reference, **neutral.training, **neutral.plain)
        assert differing(trained(on, neutral.make(on), **neutral.training), expected) == []  # pyright: ignore
    return WORKS


def neutral_of(method: str) -> Neutral | None:
    """Where a method is another one; None if nowhere."""
    entry = TABLE[method]
    if method in NEUTRAL:
        return NEUTRAL[method]
    if entry.inert:
        return Neutral("itself, step for step", entry.active)
    return None if entry.neutral is None else Neutral("", entry.neutral)


def _changed_settings(method: str) -> str:
    """The settings that a neutral method has and an active one has not."""
    on, entry = given("BERT"), TABLE[method]
    assert entry.neutral is not None
    neutral, active = entry.neutral(on), entry.active(on)
    plain = (int, float, str)
    names = [f.name for f in fields(neutral)]  # pyright: ignore[reportArgumentType]
    pairs = {name: (getattr(neutral, name), getattr(active, name)) for name in names}
    changed = {name: new for name, (new, old) in pairs.items() if isinstance(new, plain) and new != old}
    said = {"mask": "a mask of all entries", "factors": "all shares 1"}
    return ", ".join(f"`{name}` {_told(value)}" for name, value in changed.items()) or next(
        said[name] for name in names if name in said
    )


def _told(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value:g}"


# The page


def page(cells: Mapping[tuple[str, str], str]) -> str:
    """The page, from what the cells are."""
    notes = list(dict.fromkeys(cells[m, f] for m in TABLE for f in FAMILIES if cells[m, f] != WORKS))
    marks = {WORKS: WORKS, **{sentence: f"✗[^{number}]" for number, sentence in enumerate(notes, 1)}}
    rows = [[f"`{m}`", *(marks[cells[m, f]] for f in FAMILIES)] for m in TABLE]
    return _TEXT.format(
        families=_table([["method", *FAMILIES], ["---"] * (1 + len(FAMILIES)), *rows]),
        notes="\n".join(f"[^{number}]: {sentence}" for number, sentence in enumerate(notes, 1)),
        facts=_table([["method", "neutral setting", "known value", "test"], ["---"] * 4, *map(_facts, TABLE)]),
    )


def _facts(method: str) -> list[str]:
    neutral = neutral_of(method)
    said = NO_NEUTRAL[method] if neutral is None else neutral.said or _changed_settings(method)
    known, test = GOLDEN.get(method) or (NO_GOLDEN[method], "")
    return [f"`{method}`", said, known, f"`{test}`" if test else ""]


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def read_cells(text: str) -> dict[tuple[str, str], str]:
    """What the first table of a page says."""
    notes = {f"✗[^{number}]": said for number, said in re.findall(r"^\[\^(\d+)\]: (.*)$", text, re.MULTILINE)}
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    if not lines:
        return {}
    head, *rows = lines
    body = [row for row in rows if len(row) == len(head) and row[0].startswith("`")]
    return {(row[0].strip("`"), f): notes.get(c, c) for row in body for f, c in zip(head[1:], row[1:], strict=True)}


_TEXT = """# Every method on every family

`tests/test_method_table.py` makes the tables and this page: every cell is two steps of a tiny random classifier with
dropout of 0.1 at every site, and its test does them again. What the methods do, and from which papers they are, is in
[finetuning.md](finetuning.md).

✓ says that all of this held:

- Losses are finite and the head changes.
- The training ends neither where plain fine-tuning ends nor where training the head alone does: no method is silently
  without effect.
- What the method freezes keeps every bit, and no parameter is in the optimizer twice.
- The model that is saved afterwards computes what the model in training computed in eval mode. Prefixes and prompts are
  not saved: no weight can hold them.
- At its neutral setting, where it has one, the method ends bit for bit where plain fine-tuning ends, dropout included.

✗ has the sentence that refuses the model.

{families}

{notes}

## Neutral settings and known values

Values from the papers or by a formula, which a test finds again.

{facts}
"""


@functools.cache
def written() -> dict[tuple[str, str], str]:
    return read_cells(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}


@pytest.mark.parametrize("method", TABLE)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in FAMILIES]
)
def test_a_cell_is_what_the_page_says(family: str, method: str, tmp_path: Path):
    assert cell(method, family, tmp_path) == written().get((method, family)), OUTDATED


def test_the_rest_of_the_page_is_up_to_date():
    assert written().keys() == {(method, family) for method in METHODS for family in FAMILIES}, OUTDATED
    assert PAGE.read_text(encoding="utf-8") == page(written()), OUTDATED


def test_every_method_has_a_known_value_or_a_reason():
    assert sorted([*GOLDEN, *NO_GOLDEN]) == sorted(METHODS)


@pytest.mark.parametrize("method", GOLDEN)
def test_the_test_of_a_known_value_exists(method: str):
    file, _, name = GOLDEN[method][1].partition("::")
    assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")


def test_every_method_has_a_neutral_setting_or_a_reason():
    with_one = {method for method in TABLE if neutral_of(method)}
    assert sorted([*with_one, *NO_NEUTRAL]) == sorted(METHODS)


# What holds for every method, on one family


@pytest.mark.parametrize("method", [method for method in TABLE if neutral_of(method)])
def test_twenty_steps_at_the_neutral_setting_are_those_of_plain_fine_tuning(method: str):
    """Bit for bit: schedules, stages and averages begin to differ only after a while."""
    on, neutral = given("BERT"), neutral_of(method)
    assert neutral is not None
    chosen = neutral.make(on)
    if hasattr(chosen, "total_steps"):
        chosen = replace(chosen, total_steps=20)  # pyright: ignore[reportArgumentType]
    expected = reference("BERT", neutral.reference, steps=20, **neutral.training, **neutral.plain)
    assert differing(trained(on, chosen, steps=20, **neutral.training), expected) == []  # pyright: ignore


SMALL = 1e-8
WEAK: dict[str, Callable[[Given], Regularizer]] = {
    "guided-dropout": of("guided-dropout", scores=lambda on: on.scores, highest=RATE + SMALL, lowest=RATE - SMALL),
    "gaussian-dropout": of("gaussian-dropout", rate=SMALL**2),  # the deviation is its root
    "r3f": of("r3f", weight=SMALL),
    "smart": of("smart", total_steps=4, adversarial_weight=SMALL, bregman_weight=SMALL),
    "lnsr": of("lnsr", weight=SMALL),
    "child-tuning-f": of("child-tuning-f", seed=1, keep=1 - SMALL),
    "dps-mix": of("dps-mix", total_steps=4, seed=1, drop=SMALL),
    "label-smoothing": of("label-smoothing", weight=SMALL),
    "mixout": lambda on: replace(TABLE["mixout"].neutral(on), rate=SMALL),  # pyright: ignore
    "layerwise-lr-decay": of("layerwise-lr-decay", decay=1 - SMALL),
    "gradual-unfreezing": of("gradual-unfreezing", total_steps=4, share=0.0, ratio=1 + SMALL),
    "weights-mixup": lambda on: METHODS["weights-mixup"](**on.factors(1 - SMALL)),
    **{
        name: lambda on, name=name: replace(TABLE[name].active(on), weight=SMALL)  # pyright: ignore
        for name in ("distillation", "teacher-free-distillation")
    },
    "l2-sp": lambda on: replace(TABLE["l2-sp"].active(on), alpha=SMALL, beta=SMALL),  # pyright: ignore
    "lora": of("lora", rank=2, lora_alpha=SMALL),
    "weight-decay-pretrained": TABLE["weight-decay-pretrained"].active,
}
"""Methods just beside their neutral setting."""

IN_STEPS = {
    **dict.fromkeys(("fixed-mask", "random-mask", "fish-mask", "child-tuning-d", "dps-dense"), "whole entries"),
    "re-init": "whole layers",
    **dict.fromkeys(("vanilla", "vanilla-long"), "nothing to vary"),
    "r-drop": "the loss is the mean of two passes at every weight but 0",
}
"""Methods that cannot be just beside their neutral setting, and what changes at the least."""


def test_every_method_with_a_neutral_setting_is_tried_beside_it_or_has_a_reason():
    assert sorted([*WEAK, *IN_STEPS]) == sorted(method for method in TABLE if neutral_of(method))


@pytest.mark.parametrize("method", WEAK)
def test_next_to_the_neutral_setting_the_training_is_nearly_plain(method: str):
    """Within 1e-6, with the same dropout: nothing jumps at the neutral setting.

    A large epsilon keeps AdamW from blowing up gradients that are 0 but for rounding. The head has no dropout, as
    normal noise in the backbone takes more random numbers than none.
    """
    on, neutral = given("BERT"), neutral_of(method)
    assert neutral is not None
    how = {"steps": 3, "lr": 0.1, "eps": 1.0, "head_rate": 0.0, **neutral.training}
    expected = reference("BERT", neutral.reference, **how, **neutral.plain)
    if "decay" in neutral.training:
        how["decay"] = SMALL
    found = trained(on, WEAK[method](on), **how)  # pyright: ignore[reportArgumentType]
    assert differing(found, expected), "not beside it, but at it"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made = {(m, f): cell(m, f, Path(temporary) / f"{m}-{f}") for f in FAMILIES for m in TABLE}
    PAGE.write_text(page(made), encoding="utf-8")
