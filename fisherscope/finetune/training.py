"""Whole fine-tunings: one training for every seed, a folder that says how, and what came out."""

import contextlib
import difflib
import gc
import inspect
import logging
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed

from .. import distributed, storage
from .._machine import device_name, forget_peak, peak_memory
from ..data import Batches, load_batches
from ..data.sources import LABELLED_OBJECTIVES
from ..masks import Mask, check_mask
from ..metrics import is_constant
from ..models import (
    describe,
    load_model,
    quiet_transformers,
    saved_classes,
    shown_name,
    take_backbone,
    usable_device,
)
from ..scores import FisherScores, check_scores
from .callback import RegularizerCallback, last_checkpoint
from .evaluation import Evaluation, Rows, evaluated, measured
from .folder import SPLITS, OtherSettings, add, begin, finish, leave, work_folder
from .forgetting import pretraining_loss
from .multitask import SharedBackbone, checked_tasks, together, with_tasks
from .plan import Plan, check_method, data_of, given_names, recipe_of
from .protocol import ALL, DEFAULT, PROTOCOLS, Positions, Roles, Size, baselines, checked_size, protocol_of, save_roles
from .recipe import Recipe
from .regularizer import Regularizer
from .results import Results, SeedResult
from .run import Run
from .stages import ADAPT_MLM, adaptation_batches, with_stages
from .trainer import Watch, make_trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


T = TypeVar("T")


def finetune(
    model: str | Path,
    *,
    task: str | None = None,
    tasks: Sequence[str] | None = None,
    sampling_exponent: float | None = None,
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
    train_size: Size = None,
    subset_seed: int = 0,
    protocol: str = DEFAULT,
    max_length: int | None = None,
    init: Literal["pretrained", "random"] = "pretrained",
    pretrain_text: str | Path | None = None,
    pretrain_steps: int | None = None,
    intermediate_task: str | None = None,
    measure_forgetting: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_model: bool = False,
    revision: str | None = None,
    device: str | None = None,
    progress: bool = True,
    **recipe: Any,
) -> Results:
    r"""Fine-tune a model with a regularizer, once for every seed, and measure it on examples that it did not see.

    The loss of an optimizer step is :math:`\sum_n \ell_n / \sum_n T_n` over its examples, whatever the accumulation
    (and the number of ranks, while batches are full), with :math:`\ell_n` summed over the :math:`T_n` scored tokens
    of an example (1 where an example has one label), plus the penalties of the regularizer in the same way. For one
    seed, every method begins with the same head, sees the same examples in the same order, and draws its own random
    numbers apart from those of dropout.

    Args:
        model: A name on the Hub, a local folder, or a built-in model.
        task: A key of :data:`fisherscope.TASKS`: its training split is trained on, its validation split reported.
        tasks: Instead of a task: several, with a shared backbone and a head for each (a pair of texts is one input).
            Every optimizer step is on one of them; an epoch has as many steps as passes over the examples of each. The
            main metric is the mean of theirs. Of a method that looks at training examples before it begins (to
            estimate scores, for example), the first task's are used.
        sampling_exponent: With ``tasks``: a task with n examples is drawn in proportion to n to this power; None means
            1, which draws every example alike; 0 draws every task alike.
        data: Instead of a task: texts as :func:`fisherscope.load_batches` takes them.
        validation_data: With ``data``: what is reported after every epoch; None measures nothing.
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
        train_size: How many of the training examples (of each task) to train on, or a fraction of them between 0 and 1;
            None means all that the protocol has for training.
        subset_seed: Of ``fixed-subset``: draws them and those that choose the epoch, the same ones for all seeds.
        protocol: Who sees which examples: ``fixed-subset``, where one random subset trains in all seeds, as many of the
            others choose the epoch, and the validation examples are reported; ``somayajula2024``, ``sharma2024``,
            ``dps2022`` or ``zhang2020`` as published (:mod:`fisherscope.finetune.protocol`).
        max_length: Tokens per example; None means 128, or fewer if the model takes fewer.
        init: ``"random"`` begins with random weights, of the same architecture, drawn by the seed.
        pretrain_text: Texts, as ``load_batches`` takes them, on which the checkpoint's own masked language modelling
            goes on before the fine-tuning, by the same recipe, without a method: with pairs of sentences, too, if the
            model has a head for them and the texts have sentences to pair. Texts that are measured on must not be
            among them.
        pretrain_steps: Optimizer steps of that; None means one pass over the texts.
        intermediate_task: A task that the model is fine-tuned on first, by the same recipe, without a method; its head
            is not kept.
        measure_forgetting: Texts on which the loss of the checkpoint's own head is measured before and after, as
            ``load_batches`` takes them.
        out: Folder of the run: ``config.yaml``, ``run.json``, ``results.json``, ``predictions.jsonl``, ``splits.json``.
        resume: Go on with what an earlier call left in the folder, to the same result.
        save_model: Also save every trained model there as a plain Hugging Face folder; with ``tasks`` a folder for
            each, and the models that stages came to.
        revision: Of the model on the Hub.
        device: None means CUDA where there is one; of several GPUs the first.
        progress: Show progress bars.
        **recipe: The attributes of :class:`Recipe`: ``epochs``, ``max_steps``, ``batch_size``, ``accumulate``,
            ``learning_rate``, ``weight_decay``, ``warmup``, ``precision``.

    Raises:
        ValueError: If an argument is out of range, there is no such task or method, a setting is not one of the
            method's, or scores or a mask do not fit the model.
        FileExistsError: If the folder holds results, or unfinished ones and ``resume`` is not set, or files of another
            program under the names of these.
        TypeError: If there is no such keyword.
    """
    _check_keywords(recipe)
    if scores is not None:
        check_scores(scores)
    if mask is not None:
        check_mask(mask)
    given = given_names(scores, mask)
    check_method(method, settings or {}, given)
    _check_seeds(seeds)
    _check_device(device)
    if given and not isinstance(method, str):
        raise ValueError(f"A regularizer has its {given[0]} already; give {given[0]} with the name of a method only.")
    if init not in ("pretrained", "random"):
        raise ValueError(f"init must be pretrained or random; got {init!r}.")
    if init == "random" and measure_forgetting is not None:
        raise ValueError("Random weights have nothing to forget; leave out measure_forgetting, or init.")
    if save_model and out is None:
        raise ValueError("save_model needs out, the folder to save in.")
    protocol_of(protocol, subset_seed)
    chosen = checked_tasks(task, tasks, sampling_exponent, data)
    if intermediate_task is not None and intermediate_task in chosen:
        raise ValueError(f"{intermediate_task} cannot come before itself; take another intermediate_task.")
    source = (validation_data, objective, data_dir, text_columns, label_column)
    first, *others = [data_of(str(model), revision, name, data, *source) for name in chosen]
    plan = Plan(
        str(model),
        revision,
        device,
        **first,
        train_size=checked_size(train_size),
        subset_seed=subset_seed,
        protocol=protocol,
        max_length=max_length,
        recipe=recipe_of(method, settings or {}, Recipe(**recipe)),
        method=method,
        settings=dict(settings or {}),
        scores=scores,
        mask=mask,
        strict=strict,
        forgetting=measure_forgetting,
        init=init,
    )
    plan = with_stages(plan, Recipe(**recipe), pretrain_text, pretrain_steps, intermediate_task, data_dir)
    plan = with_tasks(plan, others, sampling_exponent)
    numbers = [int(seed) for seed in seeds]
    if out is None:
        return _run_all(plan, numbers, None, None, save_model, progress)
    folder = Path(out)
    made, is_new = not folder.exists(), not (folder / "config.yaml").exists()
    found = _on_first(lambda: begin(folder, plan.resolved(), plan.local_models(), numbers, resume, save_model))
    try:
        return _run_all(plan, numbers, folder, found, save_model, progress)
    except Exception:
        if is_new and distributed.is_first():
            leave(folder, made)
        raise


def _check_keywords(given: Mapping[str, Any]) -> None:
    """Refuse what is no attribute of a recipe, and name the keyword that is most like it."""
    known = [field.name for field in fields(Recipe)]
    if unknown := next((name for name in given if name not in known), None):
        all_known = [*known, *inspect.signature(finetune).parameters]
        initials = [name for name in all_known if unknown == "".join(word[0] for word in name.split("_"))]
        close = initials or difflib.get_close_matches(unknown, all_known, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise TypeError(f"finetune has no keyword {unknown}{hint}")


def _check_seeds(seeds: Sequence[int]) -> None:
    if len(seeds) == 0:
        raise ValueError("Fine-tuning needs at least one seed, but there is none.")
    for seed in seeds:
        if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
            raise ValueError(f"Seeds must be whole numbers from 0 to {2**32 - 1}; got {seed}.")


def _check_device(device: str | None) -> None:
    """Refuse a GPU that Trainer would not use: it moves the model to the first one."""
    number = usable_device(device).index
    if number and distributed.world_size() == 1:
        raise ValueError(
            f"Fine-tuning takes the first GPU that it sees, not {device}; set CUDA_VISIBLE_DEVICES={number} and leave "
            "out the device."
        )


def _on_first(work: Callable[[], T]) -> T:
    """What a function gives or raises on the first rank, on all of them."""
    answer: Any = None
    if distributed.is_first():
        try:
            answer = work()
        except Exception as error:
            answer = error
    answer = distributed.first_says(answer)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _run_all(
    plan: Plan, seeds: Sequence[int], folder: Path | None, found: Results | None, save_model: bool, progress: bool
) -> Results:
    """Train with every seed that an earlier call has not left results of."""
    results = found or Results(plan.title, plan.method_name, plan.main_metric, plan.resolved(), [])
    for seed in seeds:
        if seed in [run.seed for run in results.runs]:
            continue
        logger.info("%s on %s, seed %d.", plan.method_name, plan.title, seed)
        roles = plan.roles(seed)
        if folder is not None and distributed.is_first():
            key = seed if PROTOCOLS[plan.protocol].drawn_by == "run" else ALL
            by_task = {part.name: of_task for part, of_task in zip(plan.tasks, roles, strict=True)}
            save_roles(folder / SPLITS, plan.protocol, key, by_task)
        with TemporaryDirectory() if folder is None else contextlib.nullcontext(folder) as place:
            files = _Files(work_folder(Path(place), seed), folder is not None, progress and distributed.is_first())
            known = results.fingerprints.get("backbone")
            result, fingerprints, predictions = _train(plan, seed, roles, files, known, save_model)
        facts = storage.provenance(device=device_name(usable_device(plan.device)))
        results = replace(results, runs=[*results.runs, result], fingerprints=fingerprints, provenance=facts)
        if folder is not None and distributed.is_first():
            add(folder, results, predictions)
    if folder is not None and distributed.is_first():
        finish(folder, results)
    return results


@dataclass(frozen=True)
class _Files:
    """Where a seed keeps what it has done so far.

    Attributes:
        folder: Of the seed.
        keep: Whether anything is kept.
        shown: Whether to show a progress bar.
    """

    folder: Path
    keep: bool
    shown: bool


@dataclass(frozen=True)
class _Loaded:
    """What a training works with: for every task a model, and the examples of every role.

    Attributes:
        models: As they begin.
        tokenizer: Of all of them.
        train: Training examples.
        report: Examples to report, if there are any.
        select: Examples that choose the epoch, likewise.
        shared: Of several tasks.
    """

    models: "Sequence[PreTrainedModel]"
    tokenizer: "PreTrainedTokenizerBase"
    train: Sequence[Batches]
    report: Sequence[Batches]
    select: Sequence[Batches]
    shared: SharedBackbone | None

    @property
    def model(self) -> "PreTrainedModel":
        """The one that is trained."""
        return self.models[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(e["input_ids"].size for part in (*self.train, *self.report, *self.select) for e in part.examples)

    def steps(self, recipe: Recipe) -> int:
        """Optimizer steps of the training."""
        if self.shared is not None:
            return recipe.steps_of(self.shared.steps_per_epoch)
        return recipe.total_steps(self.train[0].num_examples)

    def evaluation(self, plan: Plan) -> Evaluation | None:
        """What is measured; None if there are no examples for it."""
        if not self.report:
            return None
        if self.shared is not None:
            return partial(measured, self.shared.evaluate, self.report, self.select)
        alone = partial(_evaluated_alone, self.model, plan.objective)
        return partial(measured, alone, self.report, self.select)

    def fingerprints(self, plan: Plan) -> dict[str, str | None]:
        """Of the weights, and of the examples where no seed draws them."""
        weights = {"backbone": describe(self.model)["backbone_fingerprint"]}
        if PROTOCOLS[plan.protocol].drawn_by == "run":
            return weights
        found = (_together([part.fingerprint for part in role]) for role in (self.train, self.report))
        return dict(zip(("train", "validation"), found, strict=True)) | weights


def _evaluated_alone(model: nn.Module, objective: str, found: Sequence[Batches]) -> tuple[Rows, dict[str, float]]:
    return evaluated(model, found[0], objective)


def _train(
    plan: Plan, seed: int, roles: Sequence[Roles], files: _Files, known: str | None, save_model: bool
) -> tuple[SeedResult, dict[str, str | None], list[dict[str, Any]]]:
    """One training, from the checkpoint of the model to its result; ``known``: the backbone of the other seeds."""
    loaded = _load(plan, seed, roles, files)
    model, fingerprints = loaded.model, loaded.fingerprints(plan)
    is_checkpoint = plan.before is None and plan.init == "pretrained"
    if is_checkpoint and known not in (None, fingerprints["backbone"]):
        raise OtherSettings(
            f"The finished seeds began with other weights of {shown_name(plan.model)} ({known} there, "
            f"{fingerprints['backbone']} now); give the same model, or another folder."
        )
    forgetting = _forgetting(plan)
    regularizer = _regularizer(plan, seed, loaded, files)
    if save_model and not regularizer.stays:
        raise ValueError(
            f"What {plan.method_name} trains has no place in a plain Hugging Face folder; leave out --save-model."
        )
    trainer, watch = make_trainer(
        plan, seed, files.folder, model, loaded.train[0], loaded.evaluation(plan), regularizer, files.keep, files.shown,
        loaded.shared,
    )  # fmt: skip
    of_labels = _baselines(plan, roles, loaded.models, plain=not regularizer.has_penalty)
    forget_peak(model.device)
    _fit(trainer, seed, files.folder)
    memory = peak_memory(model.device)
    if save_model and distributed.is_first():
        _save_all(plan, seed, loaded, files.folder)
    forgetting |= _forgetting(plan, model)
    return _result(seed, trainer, watch, memory, forgetting or None, of_labels), fingerprints, watch.rows


def _load(plan: Plan, seed: int, roles: Sequence[Roles], files: _Files) -> _Loaded:
    models, tokenizer = _models(plan, seed, files)
    tasks = list(zip(plan.tasks, roles, strict=True))
    train = [_batches(part, of_task.train, tokenizer) for part, of_task in tasks]
    report = [_batches(part, of_task.report, tokenizer) for part, of_task in tasks if of_task.report]
    select = [_batches(part, of_task.select, tokenizer) for part, of_task in tasks if of_task.select]
    shared = SharedBackbone(plan.tasks, models, train, plan.sampling_exponent or 0.0) if plan.others else None
    return _Loaded(models, tokenizer, train, report, select, shared)


def _regularizer(plan: Plan, seed: int, loaded: _Loaded, files: _Files) -> Regularizer:
    run = Run(
        loaded.model,
        loaded.train[0],
        plan.objective,
        loaded.steps(plan.recipe),
        seed,
        plan.scores,
        plan.mask,
        {**asdict(plan.recipe), "max_grad_norm": Recipe.MAX_GRAD_NORM},
        plan.strict,
        files.folder if files.keep else None,
        tokenizer=loaded.tokenizer,
        fine_tuned=None if loaded.shared else partial(_fine_tuned, plan, seed, "teacher", files),
        longest=loaded.longest,
    )
    return plan.regularizer(run)


def _forgetting(plan: Plan, trained: nn.Module | None = None) -> dict[str, float]:
    """The loss of pretraining, if it is to be measured: before the training, or after it."""
    if plan.forgetting is None:
        return {}
    loss = pretraining_loss(plan.model, plan.forgetting, revision=plan.revision, device=plan.device, trained=trained)
    return {"before" if trained is None else "after": loss}


def _baselines(
    plan: Plan, roles: Sequence[Roles], models: "Sequence[PreTrainedModel]", plain: bool
) -> dict[str, float]:
    """What the labels alone come to; nothing where there are none, or nothing is measured.

    Args:
        plan: Of the run.
        roles: Of every task.
        models: Likewise.
        plain: Whether the logged loss is that of the task and nothing else.
    """
    found = {}
    for part, of_task, model in zip(plan.tasks, roles, models, strict=True):
        if part.objective not in LABELLED_OBJECTIVES or not of_task.report:
            return {}
        classes: Any = model.config.num_labels if part.objective == "classification" else None
        train, report = (_labels(part, positions) for positions in (of_task.train, of_task.report))
        found[part.name] = baselines(train, report, classes, label_entropy=plain and not plan.others)
    return together(plan.tasks, found) if plan.others else found[plan.name]


def _labels(plan: Plan, positions: Positions) -> np.ndarray:
    sources = {"train": plan.train, "validation": plan.validation}
    return np.concatenate([np.asarray(sources[split].labels)[chosen] for split, chosen in positions.items()])  # pyright: ignore


def _together(fingerprints: Sequence[str]) -> str | None:
    """One fingerprint for several; None for none."""
    return storage.digest(*fingerprints) if len(fingerprints) > 1 else next(iter(fingerprints), None)


def _fit(trainer: Trainer, seed: int, folder: Path) -> None:
    """Train, or go on from the last checkpoint in the folder; the regularizer is taken off whatever happens."""
    _set_seeds(seed)
    checkpoint = last_checkpoint(folder)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, RegularizerCallback | Watch):
                callback.close()


def _fine_tuned(plan: Plan, seed: int, name: str, files: _Files) -> "PreTrainedModel":
    """The checkpoint as it is trained without a method of the user's, by the same recipe; kept in a folder."""
    folder = files.folder / name
    saved = folder / "model"
    if distributed.first_says(files.keep and saved.is_dir()):
        return load_model(saved, objective=plan.objective, next_sentence=plan.next_sentence, device=plan.device)[0]
    (model,), tokenizer = _models(plan, seed, files)
    if plan.stage == ADAPT_MLM:
        train = adaptation_batches(plan, seed, tokenizer)
    else:
        train = _batches(plan, plan.roles(seed)[0].train, tokenizer)
    regularizer = plan.method if isinstance(plan.method, Regularizer) and plan.next_sentence else Regularizer()
    logger.info("%s on %s first, seed %d.", name, plan.name, seed)
    trainer, _ = make_trainer(plan, seed, folder, model, train, None, regularizer, files.keep, files.shown)
    _fit(trainer, seed, folder)
    del trainer
    gc.collect()  # a trainer refers to itself, and holds the state of its optimizer
    if files.keep and distributed.is_first():
        _save_model(model, tokenizer, saved)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return model.eval()


def _models(plan: Plan, seed: int, files: _Files) -> "tuple[list[PreTrainedModel], PreTrainedTokenizerBase]":
    """The model of every task as its training begins: the checkpoint, after the stages before it."""
    loaded = [_loaded(part, seed) for part in plan.tasks]
    models = [model for model, _ in loaded]
    if plan.before is not None and plan.before.stage is not None:
        stage = _fine_tuned(plan.before, seed, plan.before.stage, files)
        for model in models:
            take_backbone(model, stage)
    return models, loaded[0][1]


def _save_all(plan: Plan, seed: int, loaded: _Loaded, work: Path) -> None:
    """Save the trained model, or that of every task, and those of the stages, which the training's own folder has."""
    place = work.parent
    if loaded.shared is None:
        _save_model(loaded.model, loaded.tokenizer, place / f"model-seed-{seed}")
    for name, part in loaded.shared.separate().items() if loaded.shared is not None else ():
        _save_model(part, loaded.tokenizer, place / f"model-seed-{seed}-{name.rpartition(':')[2]}")
    stage = plan.before
    while stage is not None:
        made = work / str(stage.stage) / "model"
        shutil.copytree(made, place / f"{stage.stage}-seed-{seed}", dirs_exist_ok=True)
        stage = stage.before


def _set_seeds(seed: int) -> None:
    """For dropout, which has to differ between ranks."""
    set_seed(seed)
    if distributed.rank():
        set_seed(int(storage.digest(f"rank {distributed.rank()} of seed {seed}"), 16) % 2**31)


def _loaded(plan: Plan, seed: int) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    labels = plan.train.num_labels if plan.objective == "classification" else None
    classes = saved_classes(plan.model, revision=plan.revision) if labels else ()
    model, tokenizer = load_model(
        plan.model,
        objective=plan.objective,
        init=plan.init,
        next_sentence=plan.next_sentence,
        num_labels=max(len(classes), labels) if labels else None,
        seed=seed,
        revision=plan.revision,
        device=plan.device,
    )
    if plan.objective in LABELLED_OBJECTIVES:
        kinds: dict[str, Any] = {"classification": "single_label_classification", "regression": "regression"}
        model.config.problem_type = kinds[plan.objective]
    if plan.train.label_names and not classes:
        model.config.id2label = dict(enumerate(plan.train.label_names))
        model.config.label2id = {name: i for i, name in enumerate(plan.train.label_names)}
    return model, tokenizer


def _batches(plan: Plan, positions: Positions, tokenizer: "PreTrainedTokenizerBase") -> Batches:
    """The examples at some places in the splits, those of the training split first."""
    sources = {"train": plan.train, "validation": plan.validation}
    parts = [
        load_batches(
            source,
            tokenizer,
            objective=plan.objective,
            positions=positions[split],
            batch_size=plan.recipe.batch_size,
            max_length=plan.max_length,
            seed=plan.subset_seed,
        )
        for split, source in sources.items()
        if source is not None and positions.get(split)
    ]
    examples = [example for part in parts for example in part.examples]
    return replace(
        parts[0],
        examples=examples,
        source="+".join(part.source for part in parts),
        source_fingerprint=_together([part.source_fingerprint for part in parts]) or "",
        settings=parts[0].settings | {"num_examples": len(examples)},
    )


def _result(
    seed: int,
    trainer: Trainer,
    watch: Watch,
    memory: int,
    forgetting: dict[str, float] | None,
    known: dict[str, float],
) -> SeedResult:
    history = trainer.state.log_history
    evaluations = [
        {"step": row["step"], "epoch": row["epoch"], **{k.removeprefix("eval_"): v for k, v in row.items() if "_" in k}}
        for row in history
        if "eval_loss" in row
    ]
    losses = [{"step": row["step"], "loss": row["loss"]} for row in history if "loss" in row]
    finite = all(bool(torch.isfinite(p).all()) for p in watch.model.parameters())
    state = trainer.optimizer.state_dict()["state"]  # pyright: ignore
    tensors = [value for values in state.values() for value in values.values() if isinstance(value, Tensor)]
    predicted: dict[str, list[float]] = {}
    for row in watch.rows:
        if "predicted" in row:
            predicted.setdefault(row.get("task", ""), []).append(row["predicted"])
    return SeedResult(
        seed,
        "finished" if finite and math.isfinite(losses[-1]["loss"]) else "diverged",
        evaluations,
        losses,
        any(is_constant(np.array(found)) for found in predicted.values()),
        statistics.median(watch.seconds) if watch.seconds else float("nan"),
        memory,
        sum(t.numel() * t.element_size() for t in tensors),
        forgetting,
        known,
    )


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
