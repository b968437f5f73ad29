"""The check of the engine: passes for models that are as they should be, and names what is broken in others."""

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
from conftest import LENGTHS, Case, batched, case, untouched
from torch import Tensor, nn
from torch.nn import functional as F

from fisherscope import fisher
from fisherscope.fisher import run
from fisherscope.objectives import example_losses
from fisherscope.testing import EngineReport, _without_padding, check_engine

EXACT = "Verdict: the fast engine is exact on this model and data; batching and padding change nothing."


def checked(made: Case, size: int = 4, **options: object) -> EngineReport:
    return check_engine(made.model, batched(made.examples, size), objective=made.objective, **options)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("bert", 1e-9), ("gpt2", 1e-9), ("bert-classifier", 1e-9), ("bert-regressor", 1e-9), ("t5", 1e-6)],
)
def test_models_as_they_should_be(name: str, tolerance: float):
    made = case(name)
    with untouched(made.model):
        report = checked(made)
    assert report.ok, report
    assert report.tolerance == tolerance
    assert list(report.errors) == [n for n, p in made.model.named_parameters()]
    assert report.num_examples == len(made.examples) and report.num_padded
    assert report.repeat == 0
    assert str(report).splitlines()[-1] == EXACT


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-1)], ids=["float32", "bfloat16"]
)
def test_model_runs_in_its_own_dtype(dtype: torch.dtype, tolerance: float, bert: Case):
    bert.model.to(dtype)
    report = checked(bert)
    assert report.ok, report
    assert (report.tolerance, report.precision) == (tolerance, str(dtype).removeprefix("torch."))
    assert max(report.errors.values()) > 1e-12, "nothing was compared"


def test_float32_inside_a_float64_model_is_noticed():
    assert checked(case("llama")).precision == "float64 with float32 inside"


def test_first_examples_only_and_batches_that_come_once(bert: Case):
    report = check_engine(bert.model, iter(batched(bert.examples, 4)), num_examples=6)
    assert report.num_examples == 6
    with pytest.raises(ValueError, match=r"^num_examples must be at least 1, got 0\.$"):
        check_engine(bert.model, batched(bert.examples, 4), num_examples=0)


def test_what_was_not_examined_is_said(bert: Case):
    alone = str(checked(bert, size=1))
    assert "Batching was not examined: every batch holds one example." in alone
    assert "Padding was not examined: none of the examples is padded." in alone
    assert alone.endswith("Verdict: the fast engine is exact on this model and data.")
    unmasked = bert.with_examples([{k: v for k, v in e.items() if k != "attention_mask"} for e in bert.examples])
    assert "Padding was not examined: the batches have no attention_mask." in str(checked(unmasked))


def test_tolerance_can_be_chosen_and_is_stated(bert: Case):
    bert.model.float()
    report = checked(bert, tolerance=1e-12)
    assert report.wrong and not report.ok
    assert "tolerance 1e-12" in str(report)


def test_parameters_that_get_nothing_are_named(gpt2: Case):
    gpt2.model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    report = checked(gpt2)
    assert report.ok and report.zero == ("unused",)
    assert "1 parameter (unused)" in str(report)


def test_frozen_parameters_are_not_compared(bert: Case):
    bert.model.bert.embeddings.requires_grad_(False)
    with untouched(bert.model):
        report = checked(bert)
    assert report.ok
    assert not any(name.startswith("bert.embeddings") for name in report.errors)


def test_parameters_that_go_one_example_at_a_time_are_named(bert: Case, monkeypatch: pytest.MonkeyPatch):
    rules = {"cls.predictions.bias": "loop", "bert.embeddings.LayerNorm.bias": "bias"}
    monkeypatch.setattr(fisher, "rules_used", lambda model, batch, objective: rules)
    report = checked(bert)
    assert report.ok and report.by_loop == ("cls.predictions.bias",)
    assert "Exact, but one example at a time: 1 parameter (cls.predictions.bias)." in str(report)


def test_examples_without_labels_do_not_count(bert: Case):
    silent = {**bert.examples[1], "labels": torch.full_like(bert.examples[1]["labels"], -100)}
    report = checked(bert.with_examples([bert.examples[0], silent, *bert.examples[2:]]))
    assert report.ok and report.num_examples == len(bert.examples) - 1


def wrong_engine(change: Callable[[dict[str, Tensor]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    right = run.hooks_engine

    def make(*args: object, **options: object) -> Callable[[Mapping[str, Tensor], dict[str, Tensor]], int]:
        engine = right(*args, **options)

        def add(batch: Mapping[str, Tensor], sums: dict[str, Tensor]) -> int:
            used = engine(batch, sums)
            change(sums)
            return used

        return add

    monkeypatch.setattr(run, "hooks_engine", make)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_wrong_rule_is_caught_and_its_parameter_named(dtype: torch.dtype, bert: Case, monkeypatch: pytest.MonkeyPatch):
    name = "bert.encoder.layer.1.attention.self.query.weight"
    wrong_engine(lambda sums: sums[name][3].mul_(1.01), monkeypatch)
    bert.model.to(dtype)
    report = checked(bert)
    assert report.wrong == (name,)
    assert 1e-4 < report.errors[name] < 1.1e-2
    assert report.failures == (
        f"The fast engine differs from the loop for 1 parameter ({name}), by up to {report.errors[name]:.1g}: do not "
        "use it for this model; use --engine loop, and report this.",
    )


def test_many_wrong_parameters_are_counted_the_worst_first(bert: Case, monkeypatch: pytest.MonkeyPatch):
    wrong_engine(lambda sums: [score.mul_(2 + n) for n, score in enumerate(sums.values())], monkeypatch)
    report = checked(bert, size=8)
    influential = [name for name in report.errors if not name.endswith("key.bias")]  # those are rounding errors
    assert report.wrong == tuple(reversed(influential))
    assert f"{len(influential)} parameters ({influential[-1]}, " in report.failures[0]
    assert f" and {len(influential) - 10} more)" in report.failures[0]


def test_parameter_that_is_forgotten(bert: Case, monkeypatch: pytest.MonkeyPatch):
    wrong_engine(lambda sums: sums["cls.predictions.bias"].zero_(), monkeypatch)
    assert checked(bert).wrong == ("cls.predictions.bias",)


class Bag(nn.Module):
    """Token embeddings, averaged over the tokens that the mask keeps, and a linear output."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.classifier = nn.Embedding(99, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.classifier(self.pooled(self.embeddings(batch["input_ids"]), batch["attention_mask"][..., None]))

    def pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return (tokens * mask).sum(1) / mask.sum(1)


class PaddingCounts(Bag):
    def pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens.mean(1)


class Mixing(Bag):
    def pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        pooled = super().pooled(tokens, mask)
        return pooled - 0.1 * pooled.mean(0)


class BatchStatistics(Bag):
    """Batch norm that stays in training mode, and moves its running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6).double()

    def pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        self.norm.training = True
        return super().pooled(self.norm(tokens.transpose(1, 2)).transpose(1, 2), mask)


class AlwaysDropout(Bag):
    def pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return super().pooled(F.dropout(tokens, 0.2, training=True), mask)


class Counting(Bag):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def pooled(self, tokens: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        return super().pooled(tokens, mask)


def class_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch), batch["labels"], reduction="none")


def bag_report(model: Bag) -> EngineReport:
    return check_engine(model, batched(case("bert-classifier").examples, 4), objective=class_losses)


def test_sound_bag_passes():
    report = bag_report(Bag())
    assert report.ok, report
    assert str(report).splitlines()[-1] == EXACT


def test_padding_that_counts_is_caught():
    report = bag_report(PaddingCounts())
    found = report.padded_loss
    assert report.failures == (
        f"Padding changes the loss of example {found.example} by {found.value:.1g}: the model does not mask padding, "
        "or counts positions from it; pad on the right, or use --batch-size 1.",
    )
    assert found.value > 1e-3 and not report.wrong


def test_position_of_the_padding_is_caught(gpt2: Case):
    """Without position ids GPT-2 counts from the left, so that padding on the left moves every token."""
    batches = [{name: value.flip(1) for name, value in batch.items()} for batch in batched(gpt2.examples, 4)]
    report = check_engine(gpt2.model, batches)
    assert len(report.failures) == 1 and report.failures[0].startswith("Padding changes the loss of example ")


def test_attention_mask_that_is_ignored_is_caught(bert: Case):
    def unmasked(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return example_losses(model, {k: v for k, v in batch.items() if k != "attention_mask"}, "mlm").mean

    report = check_engine(bert.model, batched(bert.examples, 4), objective=unmasked)
    assert len(report.failures) == 1 and report.failures[0].startswith("Padding changes the loss of example ")


def test_labels_on_padding_are_caught(gpt2: Case):
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batched(gpt2.examples, 4)]
    report = check_engine(gpt2.model, batches)
    assert report.scored_padding == tuple(n for n, length in enumerate(LENGTHS) if length < 9)
    assert report.failures == (
        "6 examples, the first of them example 0, have labels where attention_mask is 0: the padding is scored; set "
        "those labels to -100.",
    )


@pytest.mark.parametrize("model", [Mixing, BatchStatistics])
def test_examples_that_interact_are_caught(model: type[Bag]):
    report = bag_report(model())
    assert not report.ok
    found = report.in_batch
    expected = (
        f"The loss of example {found.example} alone differs by {found.value:.1g} from that in its batch: the model or "
        "the loss lets examples interact (batch statistics, a mean over the batch); use --batch-size 1."
    )
    assert expected in report.failures
    worse = dataclasses.replace(report, errors={"classifier.bias": 0.5})
    assert any(failure.endswith(", or stop the examples from interacting.") for failure in worse.failures)


def test_randomness_is_caught_and_explains_the_rest():
    report = bag_report(AlwaysDropout())
    assert report.failures == (
        f"Two runs of the fast engine differ by {report.repeat:.1g}: something in the model is random although it is "
        "in eval mode (dropout?); switch it off, since everything else differs for the same reason.",
    )
    assert report.repeat > 1e-3


def test_model_that_writes_to_itself_is_caught():
    report = bag_report(Counting())
    assert report.changed == ("calls",)
    assert report.failures[0].startswith("The run changed the model: 1 change (calls); reload it")
    assert not bag_report(BatchStatistics()).ok
    assert {"norm.running_mean", "norm.running_var"} <= set(bag_report(BatchStatistics()).changed)


def test_report_is_a_plain_frozen_value(bert: Case):
    report = checked(bert)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.tolerance = 1.0
    assert not dataclasses.replace(report, tolerance=0.0).ok
    assert report == checked(bert), "two checks of the same find the same"


def _rows(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: value[n : n + 1] for name, value in batch.items()} for n in range(len(batch["labels"]))]


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bert-classifier"])
def test_without_padding_is_the_example_as_it_was(name: str):
    """The reference for padding: what the batches were made from."""
    made = case(name)
    rows = [row for batch in batched(made.examples, 4) for row in _rows(batch)]
    for row, example in zip(rows, made.examples, strict=True):
        bare = _without_padding(row, two_parts=made.objective == "seq2seq-lm")
        assert {key: value[0].tolist() for key, value in bare.items()} == {k: v.tolist() for k, v in example.items()}


def test_bare_errors_of_a_run_come_through(bert: Case):
    with pytest.raises(ValueError, match="A Fisher run needs at least one batch, but there is none"):
        check_engine(bert.model, [])
    with pytest.raises(ValueError, match="Cannot tell the objective of a Linear"):
        check_engine(nn.Linear(1, 1), [])
    bert.model.requires_grad_(False)
    with pytest.raises(ValueError, match="this model has none"):
        checked(bert)
