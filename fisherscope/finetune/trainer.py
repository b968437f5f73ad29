"""The Trainer of Hugging Face with the losses of fisherscope, a regularizer, and measurements after every epoch."""

import math
import time
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from .. import distributed, storage
from .._progress import progress_bar
from ..data import Batches
from ..data.corruption import IGNORED
from ..models import quiet_transformers
from ..objectives import predict
from .callback import RegularizerCallback
from .evaluation import Evaluation
from .multitask import InOrder, SharedBackbone
from .plan import Plan
from .protocol import PROTOCOLS
from .recipe import Recipe
from .regularizer import Regularizer, check_penalty

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECONDS_BETWEEN_CHECKPOINTS = 60.0


def make_trainer(
    plan: Plan,
    seed: int,
    folder: Path,
    model: "PreTrainedModel",
    train: Batches,
    evaluate: "Evaluation | None",
    regularizer: Regularizer,
    keep: bool,
    shown: bool,
    tasks: "SharedBackbone | None" = None,
) -> "tuple[Trainer, Watch]":
    """A Trainer that computes our loss, and the callback that measures it.

    Args:
        plan: Of the run.
        seed: Of the training.
        folder: For checkpoints.
        model: The model.
        train: Examples.
        evaluate: What is done after every epoch, or as often as the protocol says; None is nothing.
        regularizer: To apply.
        keep: Whether to save checkpoints.
        shown: Whether to show a progress bar.
        tasks: Of several tasks, which share the model's backbone; their examples take the place of ``train``.
    """
    recipe = plan.recipe
    an_epoch = recipe.steps_per_epoch(train.num_examples) if tasks is None else tasks.steps_per_epoch
    total = recipe.steps_of(an_epoch)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=min(math.ceil(recipe.warmup * total), total - 1),  # the first step of a warm-up moves nothing
        max_grad_norm=Recipe.MAX_GRAD_NORM,
        bf16=recipe.precision == "bfloat16",
        fp16=recipe.precision == "float16",
        use_cpu=next(model.parameters()).device.type == "cpu",
        seed=seed,
        data_seed=order_seed(seed),
        logging_steps=max(1, total // 50),
        save_strategy="no",
        save_total_limit=3,  # one may be half-written, and one without the state of the regularizer
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True if distributed.world_size() > 1 else None,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several ranks
    due = evaluation_steps(total, an_epoch, PROTOCOLS[plan.protocol].evaluations)
    watch = Watch(model, evaluate, due, keep, shown)
    trainer = (_OurTrainer if tasks is None else _MultiTaskTrainer)(
        model,
        arguments,
        train_dataset=_without_unscored(train) if tasks is None else tasks.examples,  # pyright: ignore
        data_collator=train.collate,
        callbacks=[_AppliedWithPenalty(regularizer), watch],
    )
    trainer.objective, trainer.regularizer, watch.trainer = plan.objective, regularizer, trainer
    if isinstance(trainer, _MultiTaskTrainer) and tasks is not None:
        trainer.tasks, trainer.order = tasks, tasks.order(total, seed)
    trainer.model_accepts_loss_kwargs = True  # our loss divides by the number of items of the whole step
    for quiet in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(quiet)
    return trainer, watch


def evaluation_steps(total: int, steps_per_epoch: int, evaluations: int | None) -> frozenset[int]:
    """After which steps of so many a training is measured: the last of every epoch, or so many times evenly."""
    if evaluations is None:
        return frozenset([*range(steps_per_epoch, total, steps_per_epoch), total])
    return frozenset(-(-total * number // evaluations) for number in range(1, evaluations + 1))


def order_seed(seed: int) -> int:
    """Draws the order of the examples: the sampler adds the epoch, so that seeds in a row would share most orders."""
    return int(storage.digest(f"order of the examples {seed}"), 16) % 2**31


def _without_unscored(train: Batches) -> list[dict[str, np.ndarray]]:
    """The examples, where only scored tokens have a label: Trainer divides by the number of labels."""
    if train.objective != "causal-lm":
        return list(train.examples)
    return [{**e, "labels": np.concatenate([[IGNORED], e["labels"][1:]])} for e in train.examples]


class _AppliedWithPenalty(RegularizerCallback):
    """With a trainer that adds the penalty to the loss."""

    adds_penalty = True


class _OurTrainer(Trainer):
    """The losses of fisherscope: from logits, divided once by the number of items of an optimizer step."""

    objective: str
    regularizer: Regularizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        predictions = predict(model, inputs, self.objective)
        losses = predictions.losses()
        total = losses.total.sum()
        penalty = self.regularizer.penalty(self.view(model), inputs, predictions)
        if penalty is not None:
            check_penalty(self.regularizer, penalty, losses.count)
            total = total + penalty.sum()
        count = losses.count.sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count).clamp(min=1).to(total.device)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, {}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        """As Trainer counts labels, where -100 is none; but a label that is a number may well be -100."""
        labels = (batch["labels"] for batch in batch_samples)
        counted = [{"labels": torch.zeros_like(y) if y.is_floating_point() else y} for y in labels]
        return super()._get_num_items_in_batch(counted, device)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer does, without its bars, and its doubts about times of files."""
        with quiet_transformers():
            super()._save_checkpoint(*args, **kwargs)

    def view(self, model: nn.Module) -> nn.Module:
        """The model that a regularizer sees: without what ranks wrap it in."""
        return getattr(model, "module", model)


class _MultiTaskTrainer(_OurTrainer):
    """All examples of an optimizer step are of one task."""

    tasks: SharedBackbone
    order: np.ndarray

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        with self.tasks.of(inputs) as (self.objective, alone):
            return super().compute_loss(model, alone, *args, **kwargs)

    def view(self, model: nn.Module) -> nn.Module:
        return self.tasks.current

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return InOrder(self.order, self.tasks.steps_per_epoch, lambda: self.state.global_step)


class Watch(TrainerCallback):
    """Measures after the steps where it is due, times the steps, shows how far it is, and saves now and then."""

    trainer: Trainer

    def __init__(
        self,
        model: nn.Module,
        evaluate: Evaluation | None,
        due: Container[int],
        keep: bool,
        shown: bool,
    ) -> None:
        self.model, self.evaluate = model, evaluate
        self.due, self.keep, self.shown = due, keep, shown
        self.seconds: list[float] = []
        self.rows: list[dict[str, Any]] = []  # of the last evaluation
        self._began, self._saved = 0.0, time.monotonic()
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the bar."""
        done = state.global_step
        self._bar = progress_bar(state.max_steps, "training", "step", done=done, shown=self.shown)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the loss."""
        if "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the bar."""
        self.close()

    def close(self) -> None:
        """End the bar, of a training that raised, too, so that what it says is on a line of its own."""
        if self._bar is not None:
            self._bar.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock; measure, and save, if it is time."""
        if self.model.device.type == "cuda":  # pyright: ignore[reportAttributeAccessIssue]
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        self._bar.update()
        last = state.global_step == state.max_steps
        if self.evaluate is not None and state.global_step in self.due:
            self.rows, measured = self.evaluate()
            due = control.should_log
            self.trainer.log({f"eval_{name}": value for name, value in measured.items()})
            control.should_log = due  # of the training loss, which logging takes for done
        waited = time.monotonic() - self._saved > SECONDS_BETWEEN_CHECKPOINTS
        if self.keep and not last and distributed.first_says(waited):
            control.should_save, self._saved = True, time.monotonic()
