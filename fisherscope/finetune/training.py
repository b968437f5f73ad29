"""Fine-tuning under the Trainer of Hugging Face, with the losses of fisherscope and any regularizer."""

import contextlib
import difflib
import json
import logging
import math
import platform
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from .. import distributed, storage
from .._progress import progress_bar
from ..data import TASKS, Batches, Source, load_batches, read_source, read_task
from ..data.corruption import IGNORED
from ..data.sources import LABELLED_OBJECTIVES, with_class_order
from ..masks import Mask
from ..models import describe, load_model, measuring, quiet_transformers, saved_classes, saved_objective, shown_name
from ..objectives import predict
from ..scores import FisherScores
from . import methods  # noqa: F401  registers them
from .callback import RegularizerCallback, last_checkpoint
from .forgetting import pretraining_loss
from .metrics import CLASSIFICATION, REGRESSION, is_constant, metrics_of
from .regularizer import METHODS, Composed, Regularizer
from .results import Results, SeedResult
from .run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKPOINTS = 60.0

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, a linear schedule after a linear warm-up, gradients clipped to norm 1.

    Attributes:
        epochs: Passes over the training examples.
        max_steps: Optimizer steps in place of ``epochs``.
        batch_size: Examples at once on every rank.
        accumulate: Batches whose gradients are added up for an optimizer step; changes no gradient.
        learning_rate: At its highest.
        weight_decay: Decoupled; of weights, not of biases and norms.
        warmup: Share of the steps.
        precision: Of the forward and backward pass; weights are float32.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    precision: Precision = "float32"

    MAX_GRAD_NORM = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained by."""
        for name in ("batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, at least 0 and below 1; got {self.warmup}.")

    def steps_per_epoch(self, num_examples: int) -> int:
        """Optimizer steps for a pass over the training examples."""
        batches = math.ceil(num_examples / (self.batch_size * distributed.world_size()))
        return math.ceil(batches / self.accumulate)

    def total_steps(self, num_examples: int) -> int:
        """Optimizer steps of the whole training."""
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch(num_examples))


@dataclass(frozen=True)
class Plan:
    """All that decides a training but its seed."""

    model: str
    revision: str | None
    device: str | None
    objective: str
    name: str  # of the task or data
    metric: str
    train: Source
    validation: Source | None
    train_size: int | None
    subset_seed: int
    max_length: int | None
    recipe: Recipe
    method: str | Regularizer
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: FisherScores | None = None
    mask: Mask | None = None
    strict: bool = False
    forgetting: str | None = None

    @property
    def method_name(self) -> str:
        """As ``--method`` takes it, or the class of a regularizer of one's own."""
        if isinstance(self.method, str):
            return self.method
        return getattr(self.method, "name", type(self.method).__name__)

    def resolved(self) -> dict[str, Any]:
        """Plain values for ``config.yaml`` and ``results.json``."""
        return {
            "model": shown_name(self.model),
            "revision": self.revision,
            "task": self.name,
            "objective": self.objective,
            "train_size": self.train_size,
            "subset_seed": self.subset_seed,
            "max_length": self.max_length,
            **asdict(self.recipe),
            "method": self.method_name,
            "settings": dict(self.settings),
            "scores": self.scores and self.scores.provenance.get("data", {}),
            "mask": self.mask and self.mask.provenance.get("rule"),
            "measure_forgetting": self.forgetting and shown_name(self.forgetting),
        }


def finetune(
    model: str | Path,
    *,
    task: str | None = None,
    data: str | Path | None = None,
    validation_data: str | Path | None = None,
    objective: str | None = None,
    data_dir: str | Path | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    method: str | Regularizer = "vanilla",
    settings: Mapping[str, Any] | None = None,
    scores: FisherScores | None = None,
    mask: Mask | None = None,
    strict: bool = False,
    seeds: Sequence[int] = (0,),
    train_size: int | None = None,
    subset_seed: int = 0,
    max_length: int | None = None,
    measure_forgetting: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_model: bool = False,
    revision: str | None = None,
    device: str | None = None,
    progress: bool = True,
    **recipe: Any,
) -> Results:
    r"""Fine-tune a model with a regularizer, once for every seed, and measure it on validation examples.

    The loss of an optimizer step is :math:`\sum_n \ell_n / \sum_n T_n` over its examples, whatever the accumulation and
    the number of ranks, with :math:`\ell_n` summed over the :math:`T_n` scored tokens of an example (1 where an example
    has one label), plus the penalties of the regularizer in the same way. For one seed, every method begins with the
    same head, sees the same examples in the same order, and draws its own random numbers apart from those of dropout.

    Args:
        model: A name on the Hub, a local folder, or a built-in model.
        task: A key of :data:`fisherscope.TASKS`: its training split is trained on, its validation split measured.
        data: Instead of a task: texts as :func:`fisherscope.load_batches` takes them.
        validation_data: With ``data``: what is measured after every epoch; None measures nothing.
        objective: With ``data``: as for ``load_model``; None takes that of the checkpoint's head.
        data_dir: With ``task``: as for :func:`fisherscope.read_task`.
        text_columns: With ``data``: as for :func:`fisherscope.read_source`.
        label_column: Likewise.
        method: Name of a method, ``"A+B"`` for several at once, or a regularizer.
        settings: Of the method: what its class takes.
        scores: For a method that needs scores; None lets it estimate them on the training examples.
        mask: For a method that needs a mask.
        strict: Refuse scores and masks that were made from other weights, instead of a warning.
        seeds: Of the trainings.
        train_size: A random subset of the training examples; the same one for all seeds.
        subset_seed: Draws it.
        max_length: Tokens per example; None means 128, or fewer if the model takes fewer.
        measure_forgetting: Texts on which the loss of the checkpoint's own head is measured before and after, as
            ``load_batches`` takes them.
        out: Folder of the run: ``config.yaml``, ``run.json``, ``results.json``, ``predictions.jsonl``.
        resume: Go on with what an earlier call left in the folder, to the same result.
        save_model: Also save every trained model there as a plain Hugging Face folder.
        revision: Of the model on the Hub.
        device: None means CUDA where there is one.
        progress: Show progress bars.
        **recipe: The attributes of :class:`Recipe`: ``epochs``, ``max_steps``, ``batch_size``, ``accumulate``,
            ``learning_rate``, ``weight_decay``, ``warmup``, ``precision``.

    Raises:
        ValueError: If an argument is out of range, there is no such task or method, a setting is not one of the
            method's, or scores or a mask do not fit the model.
        FileExistsError: If the folder holds results, or unfinished ones and ``resume`` is not set.
    """
    if save_model and out is None:
        raise ValueError("save_model needs out, the folder to save in.")
    plan = Plan(
        str(model),
        revision,
        device,
        **_data_of(str(model), revision, task, data, validation_data, objective, data_dir, text_columns, label_column),
        train_size=train_size,
        subset_seed=subset_seed,
        max_length=max_length,
        recipe=Recipe(**recipe),
        method=method,
        settings=dict(settings or {}),
        scores=scores,
        mask=mask,
        strict=strict,
        forgetting=measure_forgetting,
    )
    _check_method(plan.method, plan.settings)
    if not seeds:
        raise ValueError("Fine-tuning needs at least one seed, but there is none.")
    folder = None if out is None else Path(out)
    if folder is not None:
        problem = _begin(folder, plan.resolved(), resume) if distributed.is_first() else None
        if problem := distributed.first_says(problem):
            raise problem
    try:
        return _run_all(plan, [int(seed) for seed in seeds], folder, save_model, progress)
    except Exception:
        if folder is not None and distributed.is_first():
            _leave(folder)
        raise


def _data_of(
    model: str,
    revision: str | None,
    task: str | None,
    data: str | Path | None,
    validation_data: str | Path | None,
    objective: str | None,
    data_dir: str | Path | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
) -> dict[str, Any]:
    if (task is None) == (data is None):
        raise ValueError("Fine-tuning needs a task or data, and not both.")
    if task is not None:
        train, validation = (read_task(task, split, data_dir=data_dir) for split in ("train", "validation"))
        objective, metric, name = TASKS[task].objective, TASKS[task].metrics[0], task
    else:
        objective = objective or saved_objective(model, revision=revision)
        columns = {"text_columns": text_columns, "label_column": label_column}
        sources = [d and read_source(d, objective=objective, **columns) for d in (data, validation_data)]
        train, validation = sources  # pyright: ignore[reportAssignmentType]
        defaults = {"classification": CLASSIFICATION[0], "regression": REGRESSION[0]}
        metric, name = defaults.get(objective, "loss"), train.name
    if objective == "classification" and (classes := saved_classes(model, revision=revision)):
        train = with_class_order(train, classes)
        validation = validation and with_class_order(validation, classes)
    return {"objective": objective, "name": name, "metric": metric, "train": train, "validation": validation}


def _check_method(method: str | Regularizer, settings: Mapping[str, Any]) -> None:
    if not isinstance(method, str):
        if settings:
            raise ValueError("A regularizer has its settings already; give settings with the name of a method only.")
        return
    names = method.split("+")
    for name in names:
        if name not in METHODS:
            close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
            hint = f", did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"The method must be one of {', '.join(sorted(METHODS))}; got {name!r}{hint}")
    known = {setting: parameter for name in names for setting, parameter in METHODS[name].settings().items()}
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"{method} has no setting {unknown[0]!r}; it has {', '.join(sorted(known)) or 'none'}.")
    if missing := [name for name, p in known.items() if p.default is p.empty and name not in settings]:
        raise ValueError(f"{method} needs the setting {missing[0]!r}; give it a value.")


def _regularizer(plan: Plan, run: Run) -> Regularizer:
    if isinstance(plan.method, Regularizer):
        return plan.method
    parts = []
    for name in plan.method.split("+"):
        known = METHODS[name].settings()
        parts.append(METHODS[name].for_run(run, **{k: v for k, v in plan.settings.items() if k in known}))
    for given, value in (("scores", plan.scores), ("mask", plan.mask)):
        if value is not None and given not in run.supplied:
            raise ValueError(f"{plan.method} has no use for {given} here; leave {given} out.")
    return parts[0] if len(parts) == 1 else Composed(tuple(parts))


def _begin(folder: Path, settings: dict[str, Any], resume: bool) -> Exception | None:
    """Put the settings into the folder of a run, where the same ones may stand already; else what is wrong."""
    config = folder / "config.yaml"
    if (folder / "results.json").exists() and not resume:
        return FileExistsError(f"{folder} holds results; give resume=True (--resume) to read them, or another folder.")
    if config.exists() and not resume:
        return FileExistsError(
            f"{folder} holds an unfinished run; give resume=True (--resume) to go on with it, or another folder."
        )
    if config.exists():
        before = yaml.safe_load(config.read_text(encoding="utf-8"))
        if found := storage.difference(before, settings):
            return ValueError(
                f"{folder} was begun with another setting: {found}; give the same ones, or another folder."
            )
        return None
    with storage.atomic(config) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return None


def _leave(folder: Path) -> None:
    """Take the settings away again if nothing was done under them, so that other ones can be tried."""
    if {file.name for file in folder.iterdir()} == {"config.yaml"}:
        shutil.rmtree(folder)


def _found(folder: Path) -> Results | None:
    """What earlier calls left: all seeds, or some of them."""
    try:
        return Results.load(folder)
    except FileNotFoundError:
        return None


def _run_all(plan: Plan, seeds: Sequence[int], folder: Path | None, save_model: bool, progress: bool) -> Results:
    results = Results(plan.name, plan.method_name, plan.metric, plan.resolved(), [])
    if folder is not None:
        results = distributed.first_says(_found(folder) if distributed.is_first() else None) or results
    for seed in seeds:
        if seed in [run.seed for run in results.runs]:
            continue
        logger.info("%s on %s, seed %d.", plan.method_name, plan.name, seed)
        with TemporaryDirectory() if folder is None else contextlib.nullcontext(folder) as place:
            result, fingerprints, predictions = _train(
                plan, seed, Path(place), folder is not None, save_model, progress
            )
        facts = storage.provenance(device=_device_name(plan.device))
        results = replace(results, runs=[*results.runs, result], fingerprints=fingerprints, provenance=facts)
        if folder is not None and distributed.is_first():
            _append_predictions(folder / "predictions.jsonl", seed, predictions)
            results.save(storage.part_path(folder / "results.json"))
            shutil.rmtree(folder / f"seed-{seed}", ignore_errors=True)
    unfinished = None if folder is None else storage.part_path(folder / "results.json")
    if folder is not None and unfinished is not None and unfinished.exists() and distributed.is_first():
        with storage.atomic(folder / "run.json") as temporary:
            temporary.write_text(json.dumps(results.provenance, indent=1), encoding="utf-8")
        unfinished.replace(folder / "results.json")
    return results


def _append_predictions(path: Path, seed: int, predictions: Sequence[Mapping[str, Any]]) -> None:
    """Rewrite the file with the rows of one more seed; rows of an earlier attempt at the seed are replaced."""
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in before if json.loads(line)["seed"] != seed]
    with storage.atomic(path) as temporary:
        rows = [*kept, *(json.dumps({"seed": seed, **row}) for row in predictions)]
        temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def _train(
    plan: Plan, seed: int, place: Path, keep: bool, save_model: bool, progress: bool
) -> tuple[SeedResult, dict[str, str | None], list[dict[str, Any]]]:
    """One training, from the checkpoint of the model to its result."""
    model, tokenizer = _loaded(plan, seed)
    train = _batches(plan, plan.train, tokenizer, plan.train_size)
    validation = None if plan.validation is None else _batches(plan, plan.validation, tokenizer, None)
    weights = describe(model)["backbone_fingerprint"]
    total = plan.recipe.total_steps(train.num_examples)
    before = None if plan.forgetting is None else pretraining_loss(plan.model, plan.forgetting, revision=plan.revision)
    facts = {**asdict(plan.recipe), "max_grad_norm": Recipe.MAX_GRAD_NORM}
    run = Run(model, train, plan.objective, total, seed, plan.scores, plan.mask, facts, plan.strict)
    regularizer = _regularizer(plan, run)
    trainer, watch = _trainer(plan, seed, place / f"seed-{seed}", model, train, validation, regularizer, keep, progress)
    set_seed(seed)
    checkpoint = last_checkpoint(place / f"seed-{seed}")
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, RegularizerCallback):
                callback.close()
    if save_model and distributed.is_first():
        _save_model(model, tokenizer, place / f"model-seed-{seed}")
    predicted = [] if validation is None else _predicted(model, validation, plan.objective)
    after = None
    if plan.forgetting is not None:
        after = pretraining_loss(plan.model, plan.forgetting, revision=plan.revision, trained=model)
    result = _result(seed, trainer, watch, predicted, None if before is None else {"before": before, "after": after})
    fingerprints = {
        "train": train.fingerprint,
        "validation": validation and validation.fingerprint,
        "backbone": weights,
    }
    return result, fingerprints, predicted


def _loaded(plan: Plan, seed: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    labels = plan.train.num_labels if plan.objective == "classification" else None
    classes = saved_classes(plan.model, revision=plan.revision) if labels else ()
    model, tokenizer = load_model(
        plan.model,
        objective=plan.objective,
        num_labels=max(len(classes), labels) if labels else None,
        seed=seed,
        revision=plan.revision,
        device=plan.device,
    )
    if plan.objective in LABELLED_OBJECTIVES:
        kinds = {"classification": "single_label_classification", "regression": "regression"}
        model.config.problem_type = kinds[plan.objective]
    if plan.train.label_names and not classes:
        model.config.id2label = dict(enumerate(plan.train.label_names))
        model.config.label2id = {name: i for i, name in enumerate(plan.train.label_names)}
    return model, tokenizer


def _batches(plan: Plan, source: Source, tokenizer: "PreTrainedTokenizerBase", size: int | None) -> Batches:
    return load_batches(
        source,
        tokenizer,
        objective=plan.objective,
        num_examples=size,
        batch_size=plan.recipe.batch_size,
        max_length=plan.max_length,
        seed=plan.subset_seed,
    )


def _trainer(
    plan: Plan,
    seed: int,
    folder: Path,
    model: "PreTrainedModel",
    train: Batches,
    validation: Batches | None,
    regularizer: Regularizer,
    keep: bool,
    progress: bool,
) -> "tuple[_Trainer, _Watch]":
    recipe, total = plan.recipe, plan.recipe.total_steps(train.num_examples)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=math.ceil(recipe.warmup * total),
        max_grad_norm=Recipe.MAX_GRAD_NORM,
        bf16=recipe.precision == "bfloat16",
        fp16=recipe.precision == "float16",
        use_cpu=next(model.parameters()).device.type == "cpu",
        seed=seed,
        data_seed=seed,
        logging_steps=max(1, total // 50),
        save_strategy="no",
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True if distributed.world_size() > 1 else None,
    )
    shown = progress and distributed.is_first()
    watch = _Watch(model, validation, plan.objective, recipe.steps_per_epoch(train.num_examples), keep, shown)
    trainer = _Trainer(
        model,
        arguments,
        train_dataset=_without_unscored(train),  # pyright: ignore[reportArgumentType]
        data_collator=train.collate,
        callbacks=[_AppliedWithPenalty(regularizer), watch],
    )
    trainer.objective, trainer.regularizer, watch.trainer = plan.objective, regularizer, trainer
    trainer.model_accepts_loss_kwargs = True  # our loss divides by the number of items of the whole step
    for quiet in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "PrinterCallback"]:
        trainer.remove_callback(quiet)
    return trainer, watch


def _without_unscored(train: Batches) -> list[dict[str, np.ndarray]]:
    """The examples, where only scored tokens have a label: Trainer divides by the number of labels."""
    if train.objective != "causal-lm":
        return list(train.examples)
    return [{**e, "labels": np.concatenate([[IGNORED], e["labels"][1:]])} for e in train.examples]


class _AppliedWithPenalty(RegularizerCallback):
    """With a trainer that adds the penalty to the loss."""

    adds_penalty = True


class _Trainer(Trainer):
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
        penalty = self.regularizer.penalty(getattr(model, "module", model), inputs, predictions)
        if penalty is not None:
            total = total + penalty.sum()
        count = losses.count.sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks
        return (loss, {}) if return_outputs else loss


class _Watch(TrainerCallback):
    """Measures after every epoch, times the steps, shows how far it is, and saves now and then."""

    trainer: Trainer

    def __init__(
        self,
        model: nn.Module,
        validation: Batches | None,
        objective: str,
        steps_per_epoch: int,
        keep: bool,
        shown: bool,
    ) -> None:
        self.model, self.validation, self.objective = model, validation, objective
        self.steps_per_epoch, self.keep, self.shown = steps_per_epoch, keep, shown
        self.seconds: list[float] = []
        self._began, self._saved = 0.0, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step
        self._bar = progress_bar(state.max_steps, "training", "step", done=done, shown=self.shown)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.model.device.type == "cuda":  # pyright: ignore[reportAttributeAccessIssue]
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        self._bar.update()
        last = state.global_step == state.max_steps
        if self.validation is not None and (state.global_step % self.steps_per_epoch == 0 or last):
            rows = _predicted(self.model, self.validation, self.objective)
            measured = _measured(rows, self.model, self.objective)
            self.trainer.log({f"eval_{name}": value for name, value in measured.items()})
        waited = time.monotonic() - self._saved > SECONDS_BETWEEN_CHECKPOINTS
        if self.keep and not last and distributed.first_says(waited):
            control.should_save, self._saved = True, time.monotonic()


def _predicted(model: nn.Module, batches: Batches, objective: str) -> list[dict[str, Any]]:
    """Prediction, label, summed loss and number of scored tokens of every example, in the order of the source."""
    order = sorted(range(batches.num_examples), key=lambda i: batches.examples[i]["input_ids"].size)
    rows: list[dict[str, Any]] = [{} for _ in order]
    with measuring(model), torch.no_grad():
        for start in range(0, len(order), 4 * batches.batch_size):
            chosen = order[start : start + 4 * batches.batch_size]
            predictions = predict(model, batches.collate([batches.examples[i] for i in chosen]), objective)
            losses = predictions.losses()
            columns: dict[str, list[Any]] = {"loss": losses.total.tolist(), "count": losses.count.tolist()}
            if objective in LABELLED_OBJECTIVES:
                outputs = predictions.outputs[:, 0]
                found = outputs.argmax(-1) if objective == "classification" else outputs
                columns |= {"predicted": found.tolist(), "label": predictions.labels[:, 0].tolist()}
            for row, i in enumerate(chosen):
                rows[i] = {"example": i, **{name: values[row] for name, values in columns.items()}}
    return rows


def _measured(rows: Sequence[Mapping[str, Any]], model: nn.Module, objective: str) -> dict[str, float]:
    """Loss per scored token, and the metrics of labelled objectives."""
    measured = {"loss": sum(r["loss"] for r in rows) / max(sum(r["count"] for r in rows), 1)}
    if objective in LABELLED_OBJECTIVES:
        predicted, labels = (np.array([r[name] for r in rows]) for name in ("predicted", "label"))
        classes: Any = model.config.num_labels if objective == "classification" else None
        measured |= metrics_of(predicted, labels, classes)
    return measured


def _result(
    seed: int, trainer: Trainer, watch: _Watch, predicted: Sequence[Mapping[str, Any]], forgetting: Any
) -> SeedResult:
    history = trainer.state.log_history
    evaluations = [
        {"step": row["step"], "epoch": row["epoch"], **{k.removeprefix("eval_"): v for k, v in row.items() if "_" in k}}
        for row in history
        if "eval_loss" in row
    ]
    losses = [{"step": row["step"], "loss": row["loss"]} for row in history if "loss" in row]
    finite = all(bool(torch.isfinite(p).all()) for p in watch.model.parameters())
    state = trainer.optimizer.state_dict()["state"] if trainer.optimizer is not None else {}
    tensors = [value for values in state.values() for value in values.values() if isinstance(value, Tensor)]
    return SeedResult(
        seed,
        "finished" if finite else "diverged",
        evaluations,
        losses,
        bool(predicted) and "predicted" in predicted[0] and is_constant(np.array([r["predicted"] for r in predicted])),
        statistics.median(watch.seconds) if watch.seconds else float("nan"),
        _peak_memory(watch.model),
        sum(t.numel() * t.element_size() for t in tensors),
        sum(int(values["exp_avg"].numel()) for values in state.values() if "exp_avg" in values),
        forgetting,
    )


def _peak_memory(model: nn.Module) -> int:
    if next(model.parameters()).is_cuda:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_name(device: str | None) -> str:
    if torch.cuda.is_available() and (device is None or device.startswith("cuda")):
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def _save_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    for file in temporary.iterdir():
        storage.readable(file)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
