"""Sweeps: a file that names many trainings, each of which gets a folder of its own.

The unit of work is one training: a model, a task, a number of examples, an arm (a method with its settings) and a seed.
Any number of processes may work on one sweep: each claims a training by a lock that ends with the process.
"""

import contextlib
import difflib
import fcntl
import gc
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from .. import storage
from .._progress import progress_bar
from ..data import TASKS
from ..masks import Mask
from ..models import shown_name
from ..scores import FisherScores
from .plan import check_method, recipe_of
from .protocol import DEFAULT, checked_size, protocol_of
from .recipe import Recipe
from .results import Results
from .training import OtherSettings, finetune

FAILURE = "fisherscope.failure"
"""Format of ``failed.json``."""

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
    """

    runs: tuple[SweepRun, ...]

    def states(self, out: str | Path) -> dict[Path, State]:
        """How far the trainings are, by folder; ``out`` is the folder of the sweep."""
        return {run.folder: _state(Path(out) / run.folder) for run in self.runs}

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
        return Sweep(tuple(run for run in self.runs if run.folder in chosen))


@dataclass(frozen=True)
class SweepReport:
    """What a call of :func:`run_sweep` came to.

    Attributes:
        finished: Trainings that were done now.
        skipped: Those that had been finished before.
        in_use: Those that another process was busy with.
        failed: Those that failed, now or before, and the error.
    """

    finished: tuple[Path, ...]
    skipped: tuple[Path, ...]
    in_use: tuple[Path, ...]
    failed: Mapping[Path, str]

    def __str__(self) -> str:
        """A line of numbers, and one for every failure."""
        parts = [f"{len(self.finished)} finished", f"{len(self.skipped)} finished before", f"{len(self.failed)} failed"]
        parts += [f"{len(self.in_use)} in use by other processes"] * bool(self.in_use)
        return "\n".join([", ".join(parts), *(f"  failed: {folder}: {why}" for folder, why in self.failed.items())])


@dataclass(frozen=True)
class _Outcome:
    folder: Path
    kind: Literal["finished", "skipped", "in use", "failed"]
    note: str = ""


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
        if wrong := next((value for value in values if not isinstance(value, str)), None):
            raise ValueError(f"{key} must be a name or a list of names; got {wrong!r}.")
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
    if not isinstance(numbers, list) or not numbers or not all(type(seed) is int and seed >= 0 for seed in numbers):
        raise ValueError(f"seeds must be a number of at least 1, or a list of seeds; got {value!r}.")
    return _several("seeds", numbers)


def _arms(methods: Any) -> dict[str, dict[str, Any]]:
    """Name of an arm to its own keywords."""
    if not isinstance(methods, dict):
        methods = {name: None for name in _several("method", methods)}
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
    _check_keys(arguments, list(known))
    for key, value in arguments.items():
        if not _accepts(known[key], value):
            raise ValueError(f"{key} must be {_words(known[key])}; got {value!r}, in the arm {arm}.")
    for key in ("scores", "mask"):
        if (file := arguments.get(key)) is not None and not Path(file).is_file():
            raise FileNotFoundError(f"There is no file {file}, the {key} of the arm {arm}.")
    if (task := arguments.get("intermediate_task")) is not None:
        _check_task("intermediate_task", task)
    method, settings = arguments["method"], arguments.get("settings") or {}
    try:
        check_method(method, settings)
        given = {field.name: arguments[field.name] for field in fields(Recipe) if field.name in arguments}
        recipe_of(method, settings, Recipe(**given))
        protocol_of(arguments.get("protocol", DEFAULT), arguments.get("subset_seed", 0))
    except ValueError as error:
        raise ValueError(f"in the arm {arm}: {error}") from error
    return arguments


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


def _state(folder: Path) -> State:
    """How far the training in a folder is."""
    states: dict[str, State] = {"results.json": "finished", "failed.json": "failed", "config.yaml": "begun"}
    for file, state in states.items():
        if (folder / file).exists():
            return state
    return "missing"


def run_sweep(
    sweep: Sweep,
    out: str | Path,
    *,
    processes: int = 1,
    retry_failed: bool = False,
    progress: bool = True,
) -> SweepReport:
    """Do the trainings of a sweep that are not done yet.

    Other calls, on this machine or on others that share the folder, may work on the same sweep at the same time: no
    training is done twice. One that a killed process left behind goes on from its last checkpoint. One that fails
    leaves ``failed.json`` in its folder, and the others go on.

    Args:
        sweep: The trainings, or one :meth:`Sweep.shard` of them.
        out: Folder of the sweep; every training gets its own below.
        processes: How many trainings at once; each has its share of the threads.
        retry_failed: Do those again, too, that failed before.
        progress: Show a bar, and print a line for every training.

    Raises:
        ValueError: If a training was begun, or finished, with other settings.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("A sweep shares its trainings among processes by itself; start it without torchrun.")
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}.")
    out, runs = Path(out), sweep.runs
    if processes > 1 and len(runs) > 1:
        outcomes = _in_processes(runs, out, retry_failed, min(processes, len(runs)))
    else:
        checked: set[str] = set()
        outcomes = (_attempt(run, out, retry_failed, checked) for run in runs)
    found: list[_Outcome] = []
    done = {folder for folder, state in sweep.states(out).items() if state == "finished"}
    with contextlib.closing(outcomes), progress_bar(len(runs), "sweep", "run", done=len(done), shown=progress) as bar:
        for outcome in outcomes:
            found.append(outcome)
            if outcome.folder not in done:
                bar.update()
                if progress:
                    bar.write(f"{outcome.folder}: {', '.join(filter(None, (outcome.kind, outcome.note)))}")
    return _report(found)


def _report(outcomes: Sequence[_Outcome]) -> SweepReport:
    folders = {
        kind: tuple(outcome.folder for outcome in outcomes if outcome.kind == kind)
        for kind in ("finished", "skipped", "in use")
    }
    failed = {outcome.folder: outcome.note for outcome in outcomes if outcome.kind == "failed"}
    return SweepReport(folders["finished"], folders["skipped"], folders["in use"], failed)


def _attempt(run: SweepRun, out: Path, retry_failed: bool, checked: set[str]) -> _Outcome:
    """Do a training unless it is done, in use or has failed before."""
    folder = out / run.folder
    if _state(folder) == "finished":
        _check_settings(run, folder, checked)
        return _Outcome(run.folder, "skipped")
    with _claimed(folder) as is_ours:
        if not is_ours:
            return _Outcome(run.folder, "in use")
        state, failure = _state(folder), folder / "failed.json"
        if state == "finished":
            _check_settings(run, folder, checked)
            return _Outcome(run.folder, "skipped", "done by another process meanwhile")
        if state == "failed" and not retry_failed:
            return _Outcome(run.folder, "failed", f"{_sentence_in(failure)} (before; retry it with --retry-failed)")
        failure.unlink(missing_ok=True)
        began = time.monotonic()
        try:
            results = _train(run, folder)
        except OtherSettings:
            raise
        except Exception as error:
            _save_failure(failure, run, error)
            return _Outcome(run.folder, "failed", _sentence(error))
        finally:
            gc.collect()  # a trainer refers to itself, and holds the state of its optimizer
        return _Outcome(run.folder, "finished", f"{_told(results)}, {time.monotonic() - began:.0f} s")


def _check_settings(run: SweepRun, folder: Path, checked: set[str]) -> None:
    """Refuse a finished training of other settings; one with another seed alone than a checked one needs no new look.

    Large tasks take seconds to read, and settings are known only with the data.
    """
    config = folder / "config.yaml"
    found = config.read_text(encoding="utf-8") if config.exists() else ""
    key = storage.digest(json.dumps({**run.arguments, "seeds": None}, sort_keys=True), found)
    if key not in checked:
        _train(run, folder)  # which only reads what is finished
        checked.add(key)


def _train(run: SweepRun, folder: Path) -> Results:
    arguments = dict(run.arguments)
    for key, kind in (("scores", FisherScores), ("mask", Mask)):
        if arguments.get(key) is not None:
            arguments[key] = kind.load(arguments[key])
    return finetune(**arguments, out=folder, resume=True, progress=False)


def _told(results: Results) -> str:
    values = [f"{results.metric} {value:.4f}" for value in results.values().values()]
    return ", ".join([*(run.status for run in results.runs if run.status != "finished"), *values]) or "not measured"


def _save_failure(path: Path, run: SweepRun, error: Exception) -> None:
    """Say in a file why a training failed; of local files the names alone."""
    shown = {key: shown_name(value) if isinstance(value, str) else value for key, value in run.arguments.items()}
    contents = {
        "format": FAILURE,
        "format_version": storage.FORMAT_VERSION,
        "error": _sentence(error),
        "traceback": _without_folders("".join(traceback.format_exception(error))),
        "config": {**shown, "seed": run.arguments["seeds"][0], "arm": run.folder.parts[-2]},
        "provenance": storage.provenance(),
    }
    with storage.atomic(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=1), encoding="utf-8")


def _without_folders(text: str) -> str:
    """A traceback that names files as ``finetune/training.py``, wherever they are."""

    def shortened(found: re.Match[str]) -> str:
        return "/".join(Path(found[0]).parts[-2:])

    return re.sub(r'(?<=File ")[^"]+', shortened, text)


def _sentence(error: Exception) -> str:
    said = " ".join(str(error).split())
    known = isinstance(error, ValueError | TypeError | OSError | MemoryError) and said
    return said if known else f"{type(error).__name__}: {said}"


def _sentence_in(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["error"])
    except (ValueError, KeyError, TypeError):
        return f"{path.name} is damaged"


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Whether the folder belongs to this process, until the block or the process ends.

    The lock is on a file beside the folder, as the folder of a refused run is taken away. The file stays: a lock on one
    that another process has just deleted would be worth nothing.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except BlockingIOError:
            is_ours = False
        yield is_ours


def _in_processes(
    runs: Sequence[SweepRun], out: Path, retry_failed: bool, processes: int
) -> Generator[_Outcome, None, None]:
    """Hand out the trainings to processes; what a killed one was busy with goes to another one, once."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    threads = max(1, torch.get_num_threads() // processes)
    waiting, killed = deque(runs), set[Path]()
    workers: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, SweepRun] = {}

    def give(pipe: Connection) -> None:
        if not waiting:
            return pipe.close()
        busy[pipe] = waiting.popleft()
        with contextlib.suppress(BrokenPipeError):  # then its end is noticed below
            pipe.send(busy[pipe])

    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            workers[ours] = context.Process(target=_work, args=(theirs, out, retry_failed, threads))
            workers[ours].start()
            theirs.close()
            give(ours)
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                run = busy.pop(pipe)
                try:
                    outcome = pipe.recv()
                except (EOFError, ConnectionResetError):
                    pipe.close()
                    if run.folder in killed:
                        yield _Outcome(run.folder, "failed", "its process was killed, twice; the same command goes on")
                    else:
                        killed.add(run.folder)
                        waiting.append(run)
                    continue
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
                give(pipe)
        for run in waiting:
            yield _Outcome(run.folder, "failed", "its process was killed; the same command goes on")
    finally:
        for pipe, worker in workers.items():
            pipe.close()  # which ends an idle one
            if busy:
                worker.terminate()
        for worker in workers.values():
            worker.join()


def _work(pipe: Connection, out: Path, retry_failed: bool, threads: int) -> None:
    """Do the trainings that come through the pipe, and send back what became of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one is interrupted, too, and ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    checked: set[str] = set()
    with contextlib.suppress(EOFError):
        while True:
            run = pipe.recv()
            try:
                outcome: _Outcome | Exception = _attempt(run, out, retry_failed, checked)
            except Exception as error:
                outcome = error
            pipe.send(outcome)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
