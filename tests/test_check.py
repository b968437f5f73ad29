"""``fisherscope check``: the tables, the verdicts, and the exit status; and what the check of landscapes finds."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from conftest import Case, batched, case, checkpoint, untouched
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from fisherscope.cli import main
from fisherscope.fisher import run
from fisherscope.landscape import contract, scan
from fisherscope.landscape.contract import LandscapeReport
from fisherscope.landscape.evaluate import Evaluator
from fisherscope.testing import check_engine, check_landscape


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny GPT-2 and texts of unequal length for it, as flags."""
    folder = tmp_path_factory.mktemp("check")
    checkpoint("gpt2", folder / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(0)
    lengths = [3, 9, 5, 12, 4, 7, 8, 2, 6, 11]
    lines = [" ".join(f"w{i}" for i in torch.randint(0, 90, (n,), generator=draw).tolist()) for n in lengths]
    (folder / "text.txt").write_text("\n".join(lines))
    return ["check", "--model", str(folder / "model"), "--data", str(folder / "text.txt"), "--device", "cpu"]


def test_sound_model_on_text(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 0
    shown = capsys.readouterr().out
    engine, landscape = shown.split("\n\n")
    assert engine.startswith("GPT2LMHeadModel: causal-lm, 8 examples, float32, tolerance 0.0001\n")
    assert "WRONG" not in shown and "not examined" not in shown
    assert engine.endswith("exact on this model and data; batching and padding change nothing.")
    assert landscape.startswith("Landscapes of GPT2LMHeadModel: causal-lm, 8 examples, float32, tolerance 0.0001\n")
    assert landscape.endswith("Verdict: landscapes of this model and data can be trusted.\n")


def test_built_in_model(capsys: pytest.CaptureFixture[str]):
    words = ["check", "--model", "builtin:bert", "--data", "builtin:docs", "--device", "cpu"]
    assert main([*words, "--num-examples", "3", "--max-length", "48"]) == 0
    assert "BertForMaskedLM: mlm, 3 examples, float32" in capsys.readouterr().out


@pytest.mark.slow
def test_flags_reach_the_check(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*words, "--num-examples", "3", "--batch-size", "1", "--dtype", "float64"]) == 0
    shown = capsys.readouterr().out
    assert "3 examples, float64, tolerance 1e-09" in shown
    assert "Batching was not examined" in shown
    assert main([*words, "--tolerance", "1e-30"]) == 1
    assert "tolerance 1e-30" in capsys.readouterr().out


def test_wrong_engine_is_named_and_exits_1(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    right, name = run.hooks_engine, "transformer.h.1.mlp.c_fc.weight"

    def doubled(model: nn.Module, *rest: object) -> object:
        engine = right(model, *rest)

        def add(batch: dict, sums: dict) -> int:
            used = engine(batch, sums)
            sums[name].mul_(2)
            return used

        return add

    monkeypatch.setattr(run, "hooks_engine", doubled)
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "Verdict: not to be trusted as it is." in shown.out
    assert f"1. The fast engine differs from the loop for 1 parameter ({name}), by up to 1: " in shown.out


def test_wrong_landscape_exits_1_though_the_engine_is_right(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    right = contract._plain_loss
    monkeypatch.setattr(contract, "_plain_loss", lambda *arguments: right(*arguments) + 1)
    assert main(words) == 1
    engine, landscape = capsys.readouterr().out.split("\n\n")
    assert "Verdict: the fast engine is exact" in engine
    assert "loss at step 0 and by a plain loop" in landscape and "WRONG" in landscape
    assert "Verdict: landscapes of this model and data are not to be trusted as they are.\n1. The loss" in landscape


def test_problem_with_the_data_is_one_sentence(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*words[:3], "--data", str(tmp_path / "none.txt")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fisherscope: There is no file or folder") and error.endswith("or builtin:docs.")


def landscape_of(made: Case, **options: object) -> LandscapeReport:
    return check_landscape(made.model, batched(made.examples, 3), objective=made.objective, **options)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama", "bert-classifier", "bert-regressor"])
def test_landscapes_of_models_as_they_should_be(name: str):
    made = case(name, lengths=(7, 3, 5, 4))
    made.model.train()
    with untouched(made.model):
        report = landscape_of(made)
    assert report.ok, report
    assert (report.repeat, report.resumed, report.changed, report.unaccounted) == (0, 0, (), 0)
    assert report.num_examples == 4 and report.precision == "float64" and report.tolerance == 1e-6
    assert report.swapped < 1e-6
    assert 0 < report.displaced.value < report.exactness, "nothing was compared"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_landscape_in_the_dtype_of_the_model(dtype: torch.dtype):
    made = case("gpt2", lengths=(7, 3, 5))
    made.model.to(dtype)
    report = landscape_of(made)
    assert report.ok, report
    assert report.displaced.value > 1e-9


def test_landscape_of_the_first_examples_and_of_batches_that_come_once():
    made = case("bert", lengths=(7, 3, 5, 4))
    report = check_landscape(made.model, iter(batched(made.examples, 3)), num_examples=2)
    assert report.ok and report.num_examples == 2
    with pytest.raises(ValueError, match=r"^num_examples must be at least 1, got 0\.$"):
        landscape_of(made, num_examples=0)


def test_landscape_of_a_loss_function():
    made = case("bert", lengths=(4, 3))

    def squares(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(input_ids=batch["input_ids"]).logits.square().mean((1, 2))

    report = check_landscape(made.model, batched(made.examples, 1), objective=squares)
    assert report.ok and report.objective.endswith("squares")


class Wrapped(nn.Module):
    """A model that does something else, too."""

    def __init__(self, model: nn.Module, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, **inputs: Tensor) -> object:
        output = self.model(**inputs)
        output.logits = self.change(self, output.logits)
        return output


def broken(change: Callable[[nn.Module, Tensor], Tensor]) -> LandscapeReport:
    made = case("bert-classifier", lengths=(4, 3, 5))
    return landscape_of(Case(Wrapped(made.model, change), "classification", made.examples))


def test_dropout_that_is_active_in_eval_mode_is_found():
    report = broken(lambda model, logits: F.dropout(logits, 0.5, training=True))
    assert not report.ok and report.repeat > 0
    (failure,) = report.failures
    assert failure.startswith("Two scans differ by ") and "(dropout?)" in failure
    assert re.search(r"two scans +\S+ +WRONG", str(report))


def test_model_that_counts_its_calls_in_a_buffer_is_found():
    def counting(model: nn.Module, logits: Tensor) -> Tensor:
        model.calls += 1
        return logits

    report = broken(counting)
    assert report.changed == ("calls",) and report.repeat == 0
    assert report.failures[0].startswith("The run changed the model (calls): reload it after a run")
    assert "model afterwards" in str(report) and "changed" in str(report)


def test_model_that_changes_its_own_weights_is_found():
    def decaying(model: nn.Module, logits: Tensor) -> Tensor:
        with torch.no_grad():
            model.model.classifier.weight.mul_(0.99)
            model.model.classifier.bias.mul_(0.99)
        return logits

    report = broken(decaying)
    assert "model.classifier.bias" in report.changed
    assert report.failures[0].startswith("The run changed the model (")


def test_loss_that_depends_on_the_number_of_calls_is_found():
    calls = []

    def drifting(model: nn.Module, logits: Tensor) -> Tensor:
        calls.append(1)
        return logits * (1 + 0.001 * len(calls))

    report = broken(drifting)
    assert report.repeat > 0 and "depends on earlier calls" in report.failures[0]


def test_weights_that_share_their_memory_without_being_one_are_found():
    """They would be moved twice."""
    made = case("bert-classifier", lengths=(4, 3))
    query, key = (getattr(made.model.bert.encoder.layer[0].attention.self, name) for name in ("query", "key"))
    key.weight.data = query.weight.data
    report = landscape_of(made)
    assert report.displaced.value > report.exactness
    assert report.displaced.parameter.endswith(("query.weight", "key.weight"))
    assert any(failure.endswith("making them one object, and let forward only read.") for failure in report.failures)


def test_model_that_is_nan_is_found():
    made = case("bert-classifier", lengths=(4, 3))
    with torch.no_grad():
        made.model.classifier.bias.fill_(float("nan"))
    report = landscape_of(made)
    assert "The loss of the model itself is nan: check its weights, and the labels." in report.failures
    assert report.repeat == report.resumed == 0


@pytest.mark.parametrize(
    ("fault", "start"),
    [("centre", "The loss at step 0 is "), ("axes", "Swapped directions change the surface by "),
     ("mask", "The directions with a mask and with its complement do not add up for ")],
)  # fmt: skip
def test_fault_of_the_engine_is_found(fault: str, start: str, monkeypatch: pytest.MonkeyPatch):
    if fault == "centre":  # the engine forgets an example
        right = Evaluator._measure

        def measure(evaluator: Evaluator, *rest: object) -> object:
            evaluator.batches = evaluator.batches[:1]
            return right(evaluator, *rest)

        monkeypatch.setattr(Evaluator, "_measure", measure)
    elif fault == "axes":  # one axis goes further than it says
        move = Evaluator._move
        monkeypatch.setattr(Evaluator, "_move", lambda self, steps: move(self, (2 * steps[0], *steps[1:])))
    else:  # one entry is in neither half
        restrict = contract.restrict

        def forgetful(direction: Mapping[str, Tensor], selected: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = restrict(direction, selected)
            found["bert.embeddings.word_embeddings.weight"][3, 3] = 0
            return found

        monkeypatch.setattr(contract, "restrict", forgetful)
    report = landscape_of(case("bert-classifier", lengths=(4, 3, 5, 6)))
    assert any(failure.startswith(start) for failure in report.failures), report


def test_resuming_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch):
    """A scan that goes on with values of its own."""
    right = scan.scan

    def forgetful(evaluate: Callable, log, **options: object) -> None:
        if log.evaluated.any():
            log.loss[0, 0] += 1
        right(evaluate, log, **options)

    monkeypatch.setattr(scan, "scan", forgetful)
    report = landscape_of(case("bert-classifier", lengths=(4, 3)))
    assert report.resumed > 0 and any(failure.startswith("A resumed scan differs by ") for failure in report.failures)


def test_loader_that_draws_anew_is_caught(bert: Case):
    class Loader:
        """As a DataLoader with a collator that masks tokens."""

        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            for batch in batched(bert.examples, 4):
                yield {**batch, "labels": torch.where(batch["labels"] < 0, batch["labels"], self.passes)}

    report = check_landscape(bert.model, Loader())
    assert report.redrawn == 2 and not report.repeat
    assert not report.ok
    assert re.search(r"two passes over the data +differ +WRONG", str(report))
    assert "1. A second pass over the data gives other batches" in str(report)
    assert "batches = list(loader), or make them with load_batches." in str(report)
    assert check_landscape(bert.model, list(Loader())).ok
    engine = check_engine(bert.model, Loader())
    assert engine.ok and engine.redrawn == 2
    assert "A second pass over the data gives other batches" in str(engine)
    assert "second pass" not in str(check_engine(bert.model, iter(Loader())))
