"""Whole fine-tunings: one training for every seed, a folder that says how, and what came out."""

import contextlib
import gc
import json
import logging
import math
import platform
import resource
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from transformers import Trainer, set_seed

from .. import distributed, storage
from ..data import Batches, load_batches
from ..data.sources import LABELLED_OBJECTIVES
from ..masks import Mask
from ..metrics import is_constant
from ..models import describe, load_model, quiet_transformers, saved_classes, take_backbone
from ..scores import FisherScores
from .callback import RegularizerCallback, last_checkpoint
from .evaluation import evaluated, measured
from .forgetting import pretraining_loss
from .multitask import SharedBackbone, checked_tasks, together, with_tasks
from .plan import Plan, check_method, data_of, recipe_of
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


class OtherSettings(ValueError):
    """The folder of a run was begun with other settings."""


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
        device: None means CUDA where there is one.
        progress: Show progress bars.
        **recipe: The attributes of :class:`Recipe`: ``epochs``, ``max_steps``, ``batch_size``, ``accumulate``,
            ``learning_rate``, ``weight_decay``, ``warmup``, ``precision``.

    Raises:
        ValueError: If an argument is out of range, there is no such task or method, a setting is not one of the
            method's, or scores or a mask do not fit the model.
        FileExistsError: If the folder holds results, or unfinished ones and ``resume`` is not set.
    """
    check_method(method, settings or {})
    if not seeds:
        raise ValueError("Fine-tuning needs at least one seed, but there is none.")
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
            return OtherSettings(
                f"{folder} was begun with another setting: {found}; give the same ones, or another folder."
            )
        return None
    with storage.atomic(config) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return None


def _leave(folder: Path) -> None:
    """Take the settings away again if nothing was done under them, so that other ones can be tried."""
    ours = ("config.yaml", "splits.json")
    others = [file for file in folder.iterdir() if file.name not in ours and not file.name.startswith("seed-")]
    begun = ("checkpoint-*", "*/checkpoint-*", "*/model")
    if not others and not any(file for pattern in begun for file in folder.glob(f"seed-*/{pattern}")):
        shutil.rmtree(folder)


def _found(folder: Path) -> Results | None:
    """What earlier calls left: all seeds, or some of them."""
    complete = folder / "results.json"
    found = [path for path in (storage.part_path(complete), complete) if path.exists()]
    return Results.load(found[0]) if found else None


def _run_all(plan: Plan, seeds: Sequence[int], folder: Path | None, save_model: bool, progress: bool) -> Results:
    results = Results(plan.title, plan.method_name, plan.main_metric, plan.resolved(), [])
    if folder is not None:
        results = distributed.first_says(_found(folder) if distributed.is_first() else None) or results
    for seed in seeds:
        if seed in [run.seed for run in results.runs]:
            if folder is not None and distributed.is_first():
                shutil.rmtree(folder / f"seed-{seed}", ignore_errors=True)
            continue
        logger.info("%s on %s, seed %d.", plan.method_name, plan.title, seed)
        roles = plan.roles(seed)
        if folder is not None and distributed.is_first():
            key = seed if PROTOCOLS[plan.protocol].drawn_by == "run" else ALL
            by_task = {part.name: of_task for part, of_task in zip(plan.tasks, roles, strict=True)}
            save_roles(folder / "splits.json", plan.protocol, key, by_task)
        with TemporaryDirectory() if folder is None else contextlib.nullcontext(folder) as place:
            result, fingerprints, predictions = _train(
                plan, seed, roles, Path(place), folder is not None, save_model, progress
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
    plan: Plan, seed: int, roles: Sequence[Roles], place: Path, keep: bool, save_model: bool, progress: bool
) -> tuple[SeedResult, dict[str, str | None], list[dict[str, Any]]]:
    """One training, from the checkpoint of the model to its result."""
    folder, shown = place / f"seed-{seed}", progress and distributed.is_first()
    files = _Files(folder, keep, shown)
    models, tokenizer = _models(plan, seed, files)
    tasks = list(zip(plan.tasks, roles, strict=True))
    batches = [_batches(part, of_task.train, tokenizer) for part, of_task in tasks]
    report = [_batches(part, of_task.report, tokenizer) for part, of_task in tasks if of_task.report]
    select = [_batches(part, of_task.select, tokenizer) for part, of_task in tasks if of_task.select]
    model, train = models[0], batches[0]
    weights = describe(model)["backbone_fingerprint"]
    shared = SharedBackbone(plan.tasks, models, batches, plan.sampling_exponent or 0.0) if plan.others else None
    if shared is None:
        evaluate = partial(measured, lambda found: evaluated(model, found[0], plan.objective), report, select)
        total = plan.recipe.total_steps(train.num_examples)
    else:
        evaluate = partial(measured, shared.evaluate, report, select)
        total = plan.recipe.steps_of(shared.steps_per_epoch)
    before = None if plan.forgetting is None else pretraining_loss(plan.model, plan.forgetting, revision=plan.revision)
    facts = {**asdict(plan.recipe), "max_grad_norm": Recipe.MAX_GRAD_NORM}
    run = Run(
        model, train, plan.objective, total, seed, plan.scores, plan.mask, facts, plan.strict, folder if keep else None,
        tokenizer=tokenizer, fine_tuned=None if shared else partial(_fine_tuned, plan, seed, "teacher", files),
    )  # fmt: skip
    regularizer = plan.regularizer(run)
    if save_model and not regularizer.stays:
        raise ValueError(
            f"What {plan.method_name} trains has no place in a plain Hugging Face folder; leave out --save-model."
        )
    trainer, watch = make_trainer(
        plan, seed, folder, model, train, evaluate if report else None, regularizer, keep, shown, shared
    )
    known = _baselines(plan, roles, models, plain=not regularizer.has_penalty)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _fit(trainer, seed, folder)
    memory = _peak_memory(model)
    if save_model and distributed.is_first():
        _save_all(plan, seed, model, tokenizer, shared, place)
    forgetting = None
    if plan.forgetting is not None and before is not None:
        after = pretraining_loss(plan.model, plan.forgetting, revision=plan.revision, trained=model)
        forgetting = {"before": before, "after": after}
    fingerprints: dict[str, str | None] = {"backbone": weights}
    if PROTOCOLS[plan.protocol].drawn_by != "run":
        fingerprints = {
            "train": _together([part.fingerprint for part in batches]),
            "validation": _together([part.fingerprint for part in report]),
        } | fingerprints
    return _result(seed, trainer, watch, memory, forgetting, known), fingerprints, watch.rows


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
            if isinstance(callback, RegularizerCallback):
                callback.close()


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


def _fine_tuned(plan: Plan, seed: int, name: str, files: _Files) -> "PreTrainedModel":
    """The checkpoint as it is trained without a method of the user's, by the same recipe; kept in a folder."""
    folder = files.folder / name
    saved, pairs = folder / "model", plan.stage is not None and not isinstance(plan.method, str)
    if distributed.first_says(files.keep and saved.is_dir()):
        return load_model(saved, objective=plan.objective, next_sentence=pairs, device=plan.device)[0]
    (model,), tokenizer = _models(plan, seed, files)
    if plan.stage == ADAPT_MLM:
        train = adaptation_batches(plan, seed, tokenizer)
    else:
        train = _batches(plan, plan.roles(seed)[0].train, tokenizer)
    regularizer = plan.method if pairs and isinstance(plan.method, Regularizer) else Regularizer()
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


def _save_all(
    plan: Plan,
    seed: int,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    shared: SharedBackbone | None,
    place: Path,
) -> None:
    """Save the trained model, or that of every task, and those of the stages."""
    if shared is None:
        _save_model(model, tokenizer, place / f"model-seed-{seed}")
    for name, part in shared.separate().items() if shared is not None else ():
        _save_model(part, tokenizer, place / f"model-seed-{seed}-{name.rpartition(':')[2]}")
    stage = plan.before
    while stage is not None:
        made = place / f"seed-{seed}" / str(stage.stage) / "model"
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
        next_sentence=plan.stage == ADAPT_MLM and isinstance(plan.method, Regularizer),
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
