"""Regularizers in the Trainer of Hugging Face: applied, checkpointed, resumed, and taken off again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Interrupted, batched, case
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fisherscope.finetune import Applied, Composed, Regularizer, parts
from fisherscope.finetune.callback import STATE_FILE, RegularizerCallback, last_checkpoint
from fisherscope.finetune.contract import _facts, _same

EXAMPLES = 12
BIAS = "classifier.bias"


class Steps(Applied):
    """Counts optimizer steps."""

    def __init__(self) -> None:
        self.done = 0

    def state_dict(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.done = int(state["done"])


@dataclass(frozen=True)
class Drifting(Regularizer):
    """Adds the number of steps before to the gradient of a bias, so that a step depends on what was before it."""

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        bias, steps = model.get_parameter(BIAS), Steps()

        def push() -> None:
            assert bias.grad is not None
            bias.grad += 0.1 * steps.done
            steps.done += 1

        with parts.before_steps(optimizer, push):
            yield steps


@dataclass(frozen=True)
class Masked(Regularizer):
    """Trains the first row of a weight and nothing else of it."""

    parameter: str

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        parameter = model.get_parameter(self.parameter)
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        mask[0] = True
        masks = {parameter: mask}
        with parts.gradients_masked(masks), parts.entries_kept(optimizer, masks):
            yield Applied()


class Penalised(Regularizer):
    """Adds a term to the loss."""

    def penalty(self, model: nn.Module, batch: Any, predictions: Any) -> Tensor:
        return torch.ones(len(batch["labels"]))


class StopAt(TrainerCallback):
    """Raises at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
        if state.global_step == self.step:
            raise Interrupted


def classifier(**settings: Any) -> nn.Module:
    return case("bert-classifier", **settings).model.float()


def trainer(folder: Path, callbacks: list[TrainerCallback], model: nn.Module | None = None, **settings: Any) -> Trainer:
    """A training of six steps with batches of two examples of unequal length."""
    chosen = {
        "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "weight_decay": 0.1, "seed": 3,
        "save_steps": 3, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return Trainer(
        model=model or classifier(),
        args=TrainingArguments(output_dir=str(folder), **{**chosen, **settings}),
        train_dataset=case("bert-classifier", lengths=range(2, 2 + EXAMPLES)).examples,
        data_collator=lambda examples: batched(examples, len(examples))[0],
        callbacks=callbacks,
    )


def values(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def resumable(tmp_path: Path) -> Path:
    """The folder of a whole training, with checkpoints after three steps and after six."""
    made = trainer(tmp_path, [RegularizerCallback(Drifting())])
    made.train()
    torch.save(values(made.model), tmp_path / "values.pt")
    return tmp_path


def resumed(folder: Path) -> Trainer:
    """The second half of a training, by a model that begins with other weights."""
    made = trainer(folder, [RegularizerCallback(Drifting())], classifier(seed=5))
    made.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert made.state.global_step == 6
    return made


def test_a_resumed_training_goes_on_as_if_it_had_never_stopped(resumable: Path):
    """Bit for bit, with dropout, momentum, decay and a schedule."""
    assert_equal(values(resumed(resumable).model), torch.load(resumable / "values.pt"))


def test_a_resumed_training_needs_the_state(resumable: Path):
    """With that of a beginning in its place, the same training ends elsewhere."""
    save_file({"done": torch.tensor(0)}, resumable / "checkpoint-3" / STATE_FILE)
    assert not torch.equal(values(resumed(resumable).model)[BIAS], torch.load(resumable / "values.pt")[BIAS])


def test_the_state_is_beside_every_checkpoint(resumable: Path):
    for step in (3, 6):
        assert load_file(resumable / f"checkpoint-{step}" / STATE_FILE) == {"done": torch.tensor(step)}


def test_a_regularizer_without_state_leaves_a_file_too(tmp_path: Path):
    """The file says that the checkpoint was written to its end."""
    trainer(tmp_path, [RegularizerCallback(Regularizer())], max_steps=3).train()
    assert load_file(tmp_path / "checkpoint-3" / STATE_FILE) == {}


def test_the_last_checkpoint_is_the_newest_that_is_complete(tmp_path: Path):
    """By number, not by name."""
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / STATE_FILE).touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_checkpoint_without_the_state_is_refused(resumable: Path, tmp_path: Path):
    """And the model is as it was before the training."""
    (resumable / "checkpoint-3" / STATE_FILE).unlink()
    callback = RegularizerCallback(Drifting())
    made = trainer(tmp_path, [callback])
    with pytest.raises(FileNotFoundError, match=r"checkpoint-3 is no complete checkpoint of a training with Drifting;"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not parts.innermost(made.optimizer)._optimizer_step_pre_hooks


@pytest.mark.parametrize("regularizer", [Penalised(), Composed([Regularizer(), Penalised()])], ids=["one", "composed"])
def test_a_penalty_is_refused(regularizer: Regularizer):
    name = type(regularizer).__name__
    with pytest.raises(TypeError, match=rf"^{name} adds a term to the loss, which a callback of Trainer cannot do;"):
        RegularizerCallback(regularizer)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_regularizer_is_refused():
    for wrong, found in ((Penalised, "Penalised"), (None, "a NoneType")):
        with pytest.raises(TypeError, match=rf"^RegularizerCallback takes a regularizer, .*, got {found}\.$"):
            RegularizerCallback(wrong)  # pyright: ignore[reportArgumentType]


def test_the_model_is_restored_at_the_end_of_the_training(tmp_path: Path):
    """A second training of the same model, without the callback, trains all of it."""
    model = classifier()
    name = "bert.encoder.layer.0.output.dense.weight"
    before = values(model)[name]
    made = trainer(tmp_path, [RegularizerCallback(Masked(name))], model)
    made.train()
    after = values(model)[name]
    assert torch.equal(after[1:], before[1:])
    assert bool((after[0] != before[0]).all())
    assert not parts.innermost(made.optimizer)._optimizer_step_post_hooks
    trainer(tmp_path, [], model).train()
    assert not torch.equal(values(model)[name][1:], before[1:])


def test_closing_restores_the_model_after_a_training_that_raised(tmp_path: Path):
    """Trainer does not tell its callbacks of exceptions; until it is closed, the regularizer is on."""
    model = classifier()
    name = "bert.encoder.layer.0.output.dense.weight"
    callback = RegularizerCallback(Masked(name))
    made = trainer(tmp_path, [callback, StopAt(2)], model)
    with pytest.raises(Interrupted):
        made.train()
    optimizer = parts.innermost(made.optimizer)
    assert model.get_parameter(name)._post_accumulate_grad_hooks
    assert optimizer._optimizer_step_post_hooks
    callback.close()
    assert not model.get_parameter(name)._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_post_hooks
    callback.close()


def test_a_callback_can_be_used_again(tmp_path: Path):
    """Two trainings from the same start with the same callback are the same, the second not going on from the first."""
    callback = RegularizerCallback(Drifting())
    found = []
    for _ in range(2):
        made = trainer(tmp_path, [callback], save_strategy="no")
        made.train()
        found.append(values(made.model))
    assert_equal(*found)


def test_a_step_is_an_optimizer_step_under_gradient_accumulation(tmp_path: Path):
    trainer(
        tmp_path, [RegularizerCallback(Drifting())], max_steps=2, gradient_accumulation_steps=3, save_steps=2
    ).train()
    assert load_file(tmp_path / "checkpoint-2" / STATE_FILE) == {"done": torch.tensor(2)}


def test_clipping_sees_masked_gradients(tmp_path: Path):
    """The norm that Trainer logs is that of the gradients that are used."""
    name = "bert.encoder.layer.0.output.dense.weight"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    logged = {}
    for kind, regularizer in {"plain": Regularizer(), "masked": Masked(name)}.items():
        made = trainer(
            tmp_path, [RegularizerCallback(regularizer)], classifier(**still),
            max_steps=1, per_device_train_batch_size=EXAMPLES, save_strategy="no",
        )  # fmt: skip
        made.train()
        logged[kind] = next(row["grad_norm"] for row in made.state.log_history if "grad_norm" in row)
    model = classifier(**still).train()
    batch = batched(case("bert-classifier", lengths=range(2, 2 + EXAMPLES)).examples, EXAMPLES)[0]
    model(**batch).loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt().item()
    model.get_parameter(name).grad[1:] = 0
    masked = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt().item()
    assert masked < 0.999 * norm
    assert logged == {"plain": pytest.approx(norm, rel=1e-4), "masked": pytest.approx(masked, rel=1e-4)}


def test_a_regularizer_that_changes_nothing_trains_as_no_callback_does(tmp_path: Path):
    """Bit for bit, with dropout."""
    found = []
    for callbacks in ([], [RegularizerCallback(Regularizer())]):
        made = trainer(tmp_path, callbacks, save_strategy="no", max_steps=3)
        made.train()
        found.append(values(made.model))
    assert_equal(*found)


def test_modules_and_optimizer_are_as_without_the_callback():
    """Every flag, hook and attribute."""
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    callback = RegularizerCallback(Composed([Drifting(), Masked("bert.pooler.dense.weight")]))
    arguments, state, control = TrainingArguments(use_cpu=True), TrainerState(), TrainerControl()
    facts = [_facts(model, optimizer)]
    callback.on_train_begin(arguments, state, control, model=model, optimizer=optimizer)
    facts.append(_facts(model, optimizer))
    callback.on_train_end(arguments, state, control)
    facts.append(_facts(model, optimizer))
    changed = [[name for name, fact in facts[0].items() if not _same(fact, later.get(name))] for later in facts[1:]]
    assert changed[0] == ["the hooks of 'bert.pooler.dense.weight'", *changed[0][1:]]
    assert len(changed[0]) == 3
    assert changed[1] == []
