"""What decides a fine-tuning: data, recipe, method."""

import difflib
import hashlib
import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import storage
from ..data import TASKS, Source, read_source, read_task
from ..data.sources import with_class_order
from ..masks import Mask
from ..metrics import CLASSIFICATION, REGRESSION
from ..models import saved_classes, saved_objective, shown_name
from ..scores import FisherScores
from . import methods  # noqa: F401  registers them
from .protocol import DEFAULT, PROTOCOLS, Roles, Size, Splits
from .recipe import Recipe
from .regularizer import METHODS, Composed, Regularizer, check_regularizers, check_together
from .run import Run

logger = logging.getLogger(__name__)

MEAN = "mean"
"""The main metric of several tasks: the mean of theirs."""


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
    train_size: Size
    subset_seed: int
    max_length: int | None
    recipe: Recipe
    method: str | Regularizer
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: FisherScores | None = None
    mask: Mask | None = None
    strict: bool = False
    forgetting: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    stage: str | None = None  # what this is before another training
    before: "Plan | None" = None  # the stage before this one
    others: "tuple[Plan, ...]" = ()  # one for each further task that shares the backbone
    sampling_exponent: float | None = None
    protocol: str = DEFAULT

    @property
    def tasks(self) -> "tuple[Plan, ...]":
        """The plan of every task by itself."""
        return (replace(self, others=(), sampling_exponent=None), *self.others)

    @property
    def title(self) -> str:
        """The names of all tasks."""
        return "+".join(plan.name for plan in self.tasks)

    @property
    def main_metric(self) -> str:
        """The metric of the task, or the mean over several."""
        return MEAN if self.others else self.metric

    @property
    def next_sentence(self) -> bool:
        """Whether this is a stage that also learns which texts follow each other; only there a stage has a method."""
        return self.stage is not None and isinstance(self.method, Regularizer)

    @property
    def method_name(self) -> str:
        """As ``--method`` takes it, or the class of a regularizer of one's own."""
        if isinstance(self.method, str):
            return self.method
        return getattr(self.method, "name", type(self.method).__name__)

    @property
    def methods(self) -> list[type[Regularizer]]:
        """The classes of all methods."""
        if isinstance(self.method, str):
            return [METHODS[name] for name in self.method.split("+")]
        return [type(part) for part in (self.method.parts if isinstance(self.method, Composed) else [self.method])]

    def roles(self, seed: int) -> tuple[Roles, ...]:
        """Who sees which examples in a training, for every task; none select where a task has none for it.

        Raises:
            ValueError: If there are too few examples for the protocol.
        """
        found = tuple(
            PROTOCOLS[plan.protocol].roles(
                Splits.of(plan.train, plan.validation, plan.objective), plan.train_size, plan.subset_seed, seed
            )
            for plan in self.tasks
        )
        return found if all(roles.select for roles in found) else tuple(roles.without_select for roles in found)

    def resolved(self) -> dict[str, Any]:
        """Plain values for ``config.yaml`` and ``results.json``."""
        drawn_by = PROTOCOLS[self.protocol].drawn_by
        return {
            "model": shown_name(self.model),
            "revision": self.revision,
            "task": self.title,
            "objective": "+".join(plan.objective for plan in self.tasks),
            "protocol": self.protocol,
            "train_size": self.train_size,
            "subset_seed": self.subset_seed if drawn_by == "subset_seed" else drawn_by,
            "max_length": self.max_length,
            **asdict(self.recipe),
            "method": self.method_name,
            "settings": self._settings(),
            "data": self._fingerprints(),
            "scores": self.scores and _digest(self.scores),
            "mask": self.mask and _digest(self.mask),
            "measure_forgetting": self.forgetting and shown_name(self.forgetting),
            **{name: value for name, value in self._extras().items() if value is not None},
        }

    def local_models(self) -> dict[str, str]:
        """Fingerprints of the weights in local folders that the plan names, by what names them.

        Settings hold the last part of their names alone, which other folders may share.
        """
        named = {"model": self.model} | {name: v for name, v in self.settings.items() if isinstance(v, str)}
        folders = {name: Path(value).expanduser() for name, value in named.items()}
        return {name: found for name, folder in folders.items() if (found := _digest_of_weights(folder))}

    def _fingerprints(self) -> dict[str, str | None]:
        found = {"train": self.train.fingerprint, "validation": self.validation and self.validation.fingerprint}
        others = {plan.name: plan._fingerprints() for plan in self.others}
        return found | {f"{name}.{split}": value for name, by in others.items() for split, value in by.items()}

    def _extras(self) -> dict[str, Any]:
        """What most runs do without; None where this one does."""
        return {
            "init": self.init if self.init != "pretrained" else None,
            "stage": self.stage,
            "before": self.before and self.before.resolved(),
            "sampling_exponent": self.sampling_exponent,
        }

    def _settings(self) -> dict[str, Any]:
        """Of every method, defaults included; of a regularizer of one's own, its plain fields."""
        if isinstance(self.method, str):
            known = {name: METHODS[name].settings() for name in self.method.split("+")}
            given = given_names(self.scores, self.mask)
            idle = {name: replaced(METHODS[name], given) for name in known}
            return {
                method: {n: _shown(self.settings.get(n, p.default)) for n, p in own.items() if n not in idle[method]}
                for method, own in known.items()
            }
        own = fields(self.method) if is_dataclass(self.method) else ()
        return {f.name: v for f in own if isinstance(v := getattr(self.method, f.name), (int, float, str, bool))}

    def regularizer(self, run: Run) -> Regularizer:
        """The regularizer for one of the trainings.

        Raises:
            ValueError: If scores or a mask were given that it has no use for.
        """
        if isinstance(self.method, Regularizer):
            return self.method
        parts = []
        for name in sorted(self.method.split("+"), key=lambda name: (METHODS[name].order, name)):
            known = METHODS[name].settings()
            parts.append(METHODS[name].for_run(run, **{k: v for k, v in self.settings.items() if k in known}))
        if useless := [given for given in given_names(self.scores, self.mask) if given not in run.supplied]:
            raise ValueError(f"{self.method} has no use for {useless[0]} here; leave {useless[0]} out.")
        return parts[0] if len(parts) == 1 else Composed(tuple(parts))


def _shown(value: Any) -> Any:
    """A setting as files hold it: what names a folder, without where it is."""
    return shown_name(value) if isinstance(value, str) else value


def _digest(tensors: Mapping[str, Tensor]) -> str:
    parts = ((name, t.cpu().contiguous().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items())
    return storage.digest(*itertools.chain.from_iterable(parts))


def _digest_of_weights(folder: Path) -> str | None:
    """Of the files in a folder that hold weights; None if there are none."""
    parts = []
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            parts += [path.name, hashlib.file_digest(file, "sha256").hexdigest()]
    return storage.digest(*parts) if parts else None


def data_of(
    model: str,
    revision: str | None,
    task: str | None = None,
    data: str | Path | None = None,
    validation_data: str | Path | None = None,
    objective: str | None = None,
    data_dir: str | Path | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> dict[str, Any]:
    """The fields of a plan that say what is trained on and measured; the arguments are those of ``finetune``."""
    if callable(objective):
        raise ValueError(
            "Fine-tuning takes an objective by name, but here is a function; a loss of your own goes into a loop of "
            "your own, inside 'with regularizer.applied_to(model, optimizer)'."
        )
    unfit = {"validation_data": validation_data, "objective": objective, "text_columns": text_columns}
    unfit = unfit | {"label_column": label_column} if task is not None else {"data_dir": data_dir}
    if given := next((name for name, value in unfit.items() if value is not None), None):
        raise ValueError(f"{given} goes with {'data' if task is not None else 'a task'} only; leave it out.")
    validation: Source | None = None
    if task is not None and data is None:
        train, validation = (read_task(task, split, data_dir=data_dir) for split in ("train", "validation"))
        objective, metric, name = TASKS[task].objective, TASKS[task].metrics[0], task
    elif data is not None and task is None:
        objective = objective or saved_objective(model, revision=revision)
        columns = {"text_columns": text_columns, "label_column": label_column}
        train = read_source(data, objective=objective, **columns)
        if validation_data is not None:
            validation = read_source(validation_data, objective=objective, **columns)
            if validation.fingerprint == train.fingerprint:
                logger.warning("The validation data are the training data: they say nothing about other examples.")
        if objective == "classification" and validation is not None:  # a file numbers its own classes
            validation = with_class_order(validation, train.label_names or ())
        defaults = {"classification": CLASSIFICATION[0], "regression": REGRESSION[0]}
        metric, name = defaults.get(objective, "loss"), train.name
    else:
        raise ValueError("Fine-tuning needs a task or data, and not both.")
    if objective == "classification" and (classes := saved_classes(model, revision=revision)):
        train = with_class_order(train, classes)
        validation = validation and with_class_order(validation, classes)
    return {"objective": objective, "name": name, "metric": metric, "train": train, "validation": validation}


def given_names(scores: FisherScores | None, mask: Mask | None) -> list[str]:
    """Which of the two the user gives beside a method."""
    return [name for name, value in (("scores", scores), ("mask", mask)) if value is not None]


def replaced(method: type[Regularizer], given: Collection[str]) -> set[str]:
    """The settings of a method that have no effect where the user gives scores, a mask or both."""
    return {setting for noun in given for setting in method.replaced.get(noun, ())}


def check_method(method: str | Regularizer, settings: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Refuse methods that there are not, settings that they do not have or that do nothing, and missing ones.

    Args:
        method: The name of one or several, or a regularizer.
        settings: What the user sets.
        given: What the user gives beside it: ``scores``, ``mask``.

    Raises:
        TypeError: If the method is neither a name nor a regularizer.
        ValueError: If there is no such method or setting, one has no effect, or one is missing.
    """
    if not isinstance(method, str):
        check_regularizers([method])
        if settings:
            raise ValueError("A regularizer has its settings already; give settings with the name of a method only.")
        return
    names = method.split("+")
    for name in names:
        if name not in METHODS:
            close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"There is no method {name!r}{hint}; the method must be one of {', '.join(sorted(METHODS))}."
            )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"Methods together must be different ones, but {method} has {twice} twice; name it once.")
    check_together(METHODS[name] for name in names)
    known = {setting: parameter for name in names for setting, parameter in METHODS[name].settings().items()}
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"{method} has no setting {unknown[0]!r}; it has {', '.join(sorted(known)) or 'none'}.")
    for noun in given:
        active = {
            setting for name in names for setting in {*METHODS[name].settings()} - replaced(METHODS[name], [noun])
        }
        if idle := sorted(set(settings) - active):
            raise ValueError(f"{method} has no use for the setting {idle[0]!r} beside {noun}; leave one of them out.")
    if missing := [name for name, p in known.items() if p.default is p.empty and name not in settings]:
        raise ValueError(f"{method} needs the setting {missing[0]!r}; give it a value.")


def recipe_of(method: str | Regularizer, settings: Mapping[str, Any], recipe: Recipe) -> Recipe:
    """What a run is trained by: the recipe, as its methods change it."""
    if isinstance(method, str):
        for name in method.split("+"):
            known = METHODS[name].settings()
            recipe = METHODS[name].recipe(recipe, **{key: value for key, value in settings.items() if key in known})
        return recipe
    for part in method.parts if isinstance(method, Composed) else [method]:
        recipe = part.recipe(recipe, **vars(part))
    return recipe
