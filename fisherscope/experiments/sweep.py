"""Sweeps: a file that names many trainings, each of which gets a folder of its own.

The unit of work is one training: a model, a task, a number of examples, an arm (a method with its settings) and a seed.
"""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .. import storage
from ..data import TASKS
from ..finetune.plan import check_method, recipe_of
from ..finetune.protocol import DEFAULT, checked_size, protocol_of
from ..finetune.recipe import Recipe
from ..finetune.regularizer import METHODS
from ..finetune.training import finetune
from ..masks import Mask
from ..models import shown_name
from ..scores import FisherScores

AXES = ("model", "task", "train_size", "method", "seeds")
"""The keys of a sweep's file that take several values; the trainings are their product."""

ALL = "all"
"""The ``train_size`` that means all training examples."""

State = Literal["finished", "failed", "begun", "missing"]

_OF_A_SWEEP = ("out", "resume", "progress", "recipe", "return")  # set for every run, or no keywords at all
_OF_OTHER_DATA = ("tasks", "sampling_exponent", "data", "validation_data", "objective", "text_columns", "label_column")

_HINTS = get_type_hints(finetune) | {f.name: get_type_hints(Recipe)[f.name] for f in fields(Recipe)}
KEYWORDS = {name: hint for name, hint in _HINTS.items() if name not in (*AXES, *_OF_A_SWEEP, *_OF_OTHER_DATA)}
"""The keywords of ``finetune`` that a sweep's file may set beside the axes, and their annotations."""


@dataclass(frozen=True)
class SweepRun:
    """One training of a sweep.

    Attributes:
        folder: Its place below the folder of the sweep: ``MODEL/TASK/SIZE/ARM/seed-K``.
        arguments: Those of :func:`fisherscope.finetune` that the file names, with one seed; ``scores`` and ``mask`` are
            names of files.
    """

    folder: Path
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """Many trainings, in the order in which they are run: the first seed of everything, then the second.

    Attributes:
        runs: The trainings, no folder twice.
        is_shard: Whether it is one of several parts that do not overlap.
    """

    runs: tuple[SweepRun, ...]
    is_shard: bool = False

    def states(self, out: str | Path) -> dict[Path, State]:
        """How far the trainings are, by folder; ``out`` is the folder of the sweep."""
        return {run.folder: state_of(Path(out) / run.folder) for run in self.runs}

    def shard(self, number: int, of: int) -> "Sweep":
        """One of so many parts of about one size, which do not overlap; the first has number 0.

        The parts are drawn by the names of the folders: every so-manieth run would give one of them all the runs of a
        slow method.

        Raises:
            ValueError: If there is no part of this number.
        """
        if not 0 <= number < of:
            raise ValueError(f"Of {of} parts of a sweep the numbers are 0 to {of - 1}; got {number}.")
        drawn = sorted((run.folder for run in self.runs), key=lambda folder: storage.digest(folder.as_posix()))
        chosen = set(drawn[number::of])
        return Sweep(tuple(run for run in self.runs if run.folder in chosen), is_shard=True)


class _Loader(yaml.SafeLoader):
    """Reads ``2e-5`` as a number, as YAML 1.2 has it, and refuses a key that stands there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As the base class does."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def load_sweep(path: str | Path) -> Sweep:
    """Read the file of a sweep, and check all that can be known before anything runs.

    The file is YAML: a mapping, or a list of them whose trainings are put together. Each of ``model``, ``task``,
    ``train_size`` (default: ``all``) and ``method`` (default: ``vanilla``) is a value or a list; ``method`` may also be
    a mapping from names of arms to keywords of :func:`fisherscope.finetune`, among them ``method``, which otherwise is
    the name of the arm. ``seeds`` is a list, or a number: 3 for 0, 1 and 2. All other keys are keywords of ``finetune``
    for all trainings; those of an arm go before them. ``scores`` and ``mask`` name files. Names of files are relative
    to the folder in which the sweep is run.

    Raises:
        FileNotFoundError: If there is no such file, or no file with scores or a mask that it names.
        ValueError: If it cannot be read, a key is unknown, a value cannot be, or two trainings with other settings
            would share a folder.
    """
    try:
        contents = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}.") from None
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path} is not YAML of a sweep: {error.problem}{where}.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{path} is not YAML of a sweep; it must be a text file.") from None
    numbered: list[tuple[int, SweepRun]] = []
    try:
        for entry in contents if isinstance(contents, list) and contents else [contents]:
            numbered += _product(entry)
        runs = [run for _, run in sorted(numbered, key=lambda pair: pair[0])]
        return Sweep(tuple(_without_twins(runs)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _without_twins(runs: Sequence[SweepRun]) -> Iterator[SweepRun]:
    """Each run once; refuses two with one folder that are not the same."""
    found: dict[Path, SweepRun] = {}
    for run in runs:
        twin = found.setdefault(run.folder, run)
        if twin is run:
            yield run
        elif differing := storage.difference(dict(twin.arguments), dict(run.arguments)):
            raise ValueError(f"two runs with other settings would share {run.folder}: {differing}; name their arms.")


def _product(entry: Any) -> Iterator[tuple[int, SweepRun]]:
    """The trainings of one mapping, each with the position of its seed."""
    if not isinstance(entry, dict):
        raise ValueError("a sweep is a mapping with at least model and task, or a list of such mappings.")
    _check_keys(entry, (*AXES, *KEYWORDS))
    for axis in ("model", "task"):
        if axis not in entry:
            raise ValueError(f"{axis} is missing; give a name, or a list of names.")
    models, tasks, sizes = (_several(axis, entry.get(axis, ALL)) for axis in AXES[:3])
    shared = {key: value for key, value in entry.items() if key not in AXES}
    arms = {arm: _checked(arm, {**shared, **own}) for arm, own in _arms(entry.get("method", "vanilla")).items()}
    for key, values in (("model", models), ("task", tasks)):
        if wrong := [value for value in values if not isinstance(value, str) or not value]:
            raise ValueError(f"{key} must be a name or a list of names; got {wrong[0]!r}.")
    for task in tasks:
        _check_task("task", task)
    for size in sizes:
        if size is None or (isinstance(size, str | bool) and size != ALL):
            raise ValueError(f"train_size must be a number of examples, a fraction, or {ALL}; got {size!r}.")
        checked_size(None if size == ALL else size)
    for (position, seed), model, task, size, (arm, own) in itertools.product(
        enumerate(_seeds(entry.get("seeds", 1))), models, tasks, sizes, arms.items()
    ):
        folder = Path(_folder_name(model), _folder_name(task), str(size), arm, f"seed-{seed}")
        limit = {} if size == ALL else {"train_size": size}
        yield position, SweepRun(folder, {"model": model, "task": task, **limit, **own, "seeds": [seed]})


def _check_keys(found: Mapping[Any, Any], known: Sequence[str]) -> None:
    for key in found:
        if key in ("resume", "out", "progress"):
            raise ValueError(f"{key} is set by the sweep itself; leave it out.")
        if key in _OF_OTHER_DATA:
            raise ValueError(f"{key} has no place in a sweep, which is over tasks; leave it out.")
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}."
            raise ValueError(f"there is no key {key!r}; {hint}")


def _several(key: str, value: Any) -> list[Any]:
    """A value or a list of them as a list, each once."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{key} is an empty list; give it a value.")
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _seeds(value: Any) -> list[int]:
    numbers = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int and 0 <= n < 2**32 for n in numbers):
        raise ValueError(
            f"seeds must be a number of at least 1, or a list of seeds from 0 to {2**32 - 1}; got {value!r}."
        )
    return _several("seeds", numbers)


def _arms(methods: Any) -> dict[str, dict[str, Any]]:
    """Name of an arm to its own keywords."""
    if not isinstance(methods, dict):
        names = _several("method", methods)
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise ValueError(
                f"method must be a name, a list of names, or a mapping from names of arms; got {wrong[0]!r}."
            )
        methods = dict.fromkeys(names)
    if not methods:
        raise ValueError("method is empty; give it a name.")
    arms: dict[str, dict[str, Any]] = {}
    for arm, own in methods.items():
        if not isinstance(arm, str) or not re.fullmatch(r"\w[\w.+-]*", arm):
            raise ValueError(f"an arm names a folder, of letters, digits and _.+- only; got {arm!r}.")
        if not isinstance(own, dict | None):
            raise ValueError(f"the arm {arm} must be a mapping, as in '{{method: vanilla, epochs: 5}}'; got {own!r}.")
        if axis := next((key for key in own or {} if key in AXES and key != "method"), None):
            raise ValueError(f"the arm {arm} sets {axis}, which is the same for all arms; put another mapping beside.")
        arms[arm] = {"method": arm, **(own or {})}
    return arms


def _checked(arm: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an arm, if they can be."""
    known = {**KEYWORDS, "method": str}
    if misplaced := [key for key in arguments if key not in known and key in _settings_of(arguments["method"])]:
        value = {key: arguments[key] for key in misplaced}
        raise ValueError(f"the arm {arm} must have settings of its method as 'settings: {value}'; move them there.")
    _check_keys(arguments, list(known))
    for key, value in arguments.items():
        if not _accepts(known[key], value):
            raise ValueError(f"{key} must be {_words(known[key])}; got {value!r}, in the arm {arm}.")
    for key in ("scores", "mask"):
        if (file := arguments.get(key)) is not None and not Path(file).is_file():
            raise FileNotFoundError(f"There is no file {file}, the {key} of the arm {arm}.")
    if (task := arguments.get("intermediate_task")) is not None:
        _check_task("intermediate_task", task)
    if arguments.get("pretrain_steps") is not None and arguments.get("pretrain_text") is None:
        raise ValueError(f"pretrain_steps goes with pretrain_text only; leave it out of the arm {arm}.")
    if (length := arguments.get("max_length")) is not None and length < 1:
        raise ValueError(f"max_length must be at least 1; got {length}, in the arm {arm}.")
    method, settings = arguments["method"], arguments.get("settings") or {}
    try:
        check_method(method, settings, [key for key in ("scores", "mask") if arguments.get(key) is not None])
        _check_values(method, settings)
        given = {field.name: arguments[field.name] for field in fields(Recipe) if field.name in arguments}
        recipe_of(method, settings, Recipe(**given))
        protocol_of(arguments.get("protocol", DEFAULT), arguments.get("subset_seed", 0))
    except ValueError as error:
        raise ValueError(f"in the arm {arm}: {error}") from error
    return arguments


def _settings_of(method: Any) -> set[str]:
    return {key for name in str(method).split("+") if name in METHODS for key in METHODS[name].settings()}


def _check_values(method: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings of other types than the classes of a method say."""
    for name in method.split("+"):
        for key, parameter in METHODS[name].settings().items():
            wanted = parameter.annotation
            is_plain = wanted in _WORDS or get_origin(wanted) is Literal
            if key in settings and is_plain and not _accepts(wanted, settings[key]):
                raise ValueError(f"the setting {key} must be {_words(wanted)}; got {settings[key]!r}.")


def _check_task(key: str, name: str) -> None:
    if name not in TASKS:
        raise ValueError(f"{key} must be one of {', '.join(TASKS)}; got {name!r}.")


_WORDS = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null",
    FisherScores: "a file", Mask: "a file",
}  # fmt: skip


def _accepts(annotation: Any, value: Any) -> bool:
    """Whether a value of YAML fits the annotation of a keyword; scores and masks are names of files there."""
    origin = get_origin(annotation)
    if origin is Literal:
        return value in get_args(annotation)
    if origin in (Union, UnionType):
        return any(_accepts(part, value) for part in get_args(annotation))
    if annotation in (int, float):
        return isinstance(value, int | annotation) and not isinstance(value, bool)
    if annotation in (FisherScores, Mask):
        return isinstance(value, str)
    return isinstance(value, origin or annotation)


def _words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in get_args(annotation) if part is not Path))
    return _WORDS.get(annotation, "a mapping")


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", shown_name(name)).lstrip(".-")


def state_of(folder: Path) -> State:
    """How far the training in a folder is."""
    states: dict[str, State] = {"results.json": "finished", "failed.json": "failed", "config.yaml": "begun"}
    for file, state in states.items():
        if (folder / file).exists():
            return state
    return "missing"
