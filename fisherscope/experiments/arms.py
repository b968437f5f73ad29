"""Runs of fine-tuning read back from their folders: one value for every arm of an experiment, with all its seeds."""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import storage
from ..finetune.protocol import DEFAULT
from ..finetune.results import Results, SeedResult
from ..models import shown_name
from .failure import FAILED, Failure

logger = logging.getLogger(__name__)

RESULTS = "results.json"

SEED_FOLDER = re.compile(r"seed-\d+")


@dataclass(frozen=True)
class Group:
    """What arms must have in common to be compared.

    Attributes:
        model: Its name.
        train_size: Training examples, or the share of all; None for all.
        task: Its name.
    """

    model: str
    train_size: float | None
    task: str

    @property
    def size(self) -> str:
        """The number of training examples in words."""
        if self.train_size is None:
            return "all training examples"
        if self.train_size < 1:
            return f"{100 * self.train_size:g} % of the training examples"
        return f"{self.train_size:g} training examples"

    @property
    def order(self) -> tuple[Any, ...]:
        """Where it stands in a table."""
        return self.model, math.inf if self.train_size is None else self.train_size, self.task

    def __str__(self) -> str:
        return f"{self.task}, {self.model}, {self.size}"


@dataclass(frozen=True)
class Arm(Results):
    """All trainings of one arm of an experiment: one model, task, training size, method and settings.

    ``method`` is the arm's name; the method itself is ``settings["method"]``. ``fingerprints`` are those that all
    seeds have in common.

    Attributes:
        crashed: By seed, the error of a training that has no result.
        devices: What it was trained on.
    """

    crashed: Mapping[int, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ()

    @property
    def group(self) -> Group:
        """What it shares with the arms it can be compared with."""
        return _group(self)

    @property
    def protocol(self) -> str:
        """Who sees which examples; what was trained before there was a choice has the default."""
        return self.settings.get("protocol", DEFAULT)

    @property
    def failures(self) -> dict[int, str]:
        """By seed, why a training failed."""
        found = {run.seed: why for run in self.runs if (why := self.failure(run)) is not None}
        return dict(sorted((found | {seed: f"crashed: {error}" for seed, error in self.crashed.items()}).items()))


@dataclass(frozen=True)
class _Run:
    """One folder: what it holds, and the errors of the seeds that have no result."""

    folder: Path
    results: Results
    crashed: Mapping[int, str] = field(default_factory=dict)

    @property
    def alike(self) -> tuple[Group, str]:
        """Equal for runs of one arm, unless their settings differ."""
        return _group(self.results), self.results.method

    @property
    def arm_folder(self) -> str | None:
        """The folder that names the arm, if the run is one seed of a sweep."""
        folder = self.folder.resolve()
        return folder.parent.name if SEED_FOLDER.fullmatch(folder.name) else None

    @property
    def settings(self) -> str | None:
        """To compare; of a crashed training they are not resolved, and cannot be compared."""
        return json.dumps(self.results.settings, sort_keys=True) if self.results.runs else None


def read_runs(*folders: str | Path) -> list[Arm]:
    """Read all runs of fine-tuning below some folders, with the seeds of one arm joined.

    An arm is named by its folder in a sweep (``.../ARM/seed-K``), or else by its method; where runs of one method
    differ in their settings, by the names of their folders. Of a run in progress the seeds that are done are taken,
    and the log says so.

    Args:
        folders: Of runs, or above them; a ``results.json`` itself will do.

    Raises:
        FileNotFoundError: If there is no such folder, or no run in it.
        WrongFile: If a ``results.json`` or ``failed.json`` is damaged or none of ours.
        ValueError: If a seed of an arm is there twice with other values, or two arms would have one name.
    """
    runs = [run for folder in _run_folders(folders) for run in _read(folder)]
    if not runs:
        raise FileNotFoundError(
            f"There are no results of fine-tuning in {_listed(folders)}; give folders that `fisherscope finetune` or "
            "`fisherscope sweep` wrote to."
        )
    arms: dict[tuple[Group, str], list[_Run]] = {}
    for run, name in zip(runs, _names(runs), strict=True):
        arms.setdefault((_group(run.results), name), []).append(run)
    return [_joined(name, arms[group, name]) for group, name in sorted(arms, key=lambda key: (*key[0].order, key[1]))]


def is_loss(metric: str) -> bool:
    """Whether less is better."""
    return metric.rpartition(".")[2] == "loss"


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "no folder at all"


def _group(results: Results) -> Group:
    settings = results.settings
    return Group(str(settings.get("model")), settings.get("train_size"), results.task)


def _run_folders(folders: Sequence[str | Path]) -> list[Path]:
    """Every folder that holds a result, complete or not, or says that there is none; each once."""
    found: dict[Path, Path] = {}
    for given in map(Path, folders):
        if given.is_file():
            given = given.parent
        if not given.is_dir():
            raise FileNotFoundError(f"There is no folder {given}; give folders of runs.")
        for name in (RESULTS, storage.part_path(RESULTS).name, FAILED):
            for file in sorted(given.rglob(name)):
                found.setdefault(file.parent.resolve(), file.parent)
    return sorted(found.values())


def _read(folder: Path) -> list[_Run]:
    """What is in a folder: its results, and a training that crashed there, perhaps before them."""
    runs = []
    if (folder / RESULTS).exists() or storage.part_path(folder / RESULTS).exists():
        try:
            results = Results.load(folder)
        except storage.WrongFile as error:
            raise storage.WrongFile(f"{error} Or leave it out: name the other folders one by one.") from error
        if not (folder / RESULTS).exists():
            seeds = _listed(sorted(run.seed for run in results.runs))
            logger.warning("%s is not finished: the seeds that are done are taken, %s.", folder, seeds)
        runs.append(_Run(folder, results))
    if (folder / FAILED).exists():
        runs.append(_read_failed(folder / FAILED))
    return runs


def _read_failed(path: Path) -> _Run:
    """A training of a sweep that crashed: no value, and the reason."""
    failure = Failure.load(path)
    method, config = str(failure.config.get("method", "vanilla")), failure.config
    settings = {"train_size": None, **config, "model": shown_name(config["model"]), "method": method}
    results = Results(str(config["task"]), method, "", settings, [])
    return _Run(path.parent, results, {int(config["seed"]): failure.error.removesuffix(".")})


def _names(runs: Sequence[_Run]) -> list[str]:
    """The name of every run's arm."""
    settings: dict[tuple[Group, str], set[str | None]] = {}
    for run in runs:
        if run.arm_folder is None:
            settings.setdefault(run.alike, set()).add(run.settings)
    ambiguous = {method for (_, method), found in settings.items() if len(found) > 1}
    return [
        run.arm_folder or (run.folder.resolve().name if run.results.method in ambiguous else run.results.method)
        for run in runs
    ]


def _joined(name: str, runs: Sequence[_Run]) -> Arm:
    """One arm from the runs of its seeds."""
    first, *others = [run for run in runs if run.settings is not None] or runs[:1]
    for other in others:
        if found := storage.difference(first.results.settings, other.results.settings):
            raise ValueError(
                f"{first.folder} and {other.folder} are both {name} on {first.results.task}, with another setting: "
                f"{found}; give their folders other names, or compare them apart."
            )
    seeds: dict[int, tuple[SeedResult, Path]] = {}
    for run in runs:
        for result in run.results.runs:
            before, folder = seeds.setdefault(result.seed, (result, run.folder))
            if _measured(before) != _measured(result):
                raise ValueError(
                    f"Seed {result.seed} of {name} on {first.results.task} is in {folder} and in {run.folder} with "
                    "other values; leave one of them out."
                )
    held = {item.name: getattr(first.results, item.name) for item in fields(Results)}
    same = set.intersection(*(set(run.results.fingerprints.items()) for run in [first, *others]))
    return Arm(**held | {
        "method": name,
        "runs": [seeds[seed][0] for seed in sorted(seeds)],
        "fingerprints": dict(sorted(same)),
        "crashed": {seed: error for run in runs for seed, error in run.crashed.items() if seed not in seeds},
        "devices": tuple(sorted({str(run.results.provenance["device"]) for run in runs if run.results.provenance})),
    })  # fmt: skip


def _measured(result: SeedResult) -> str:
    """What two records of one training must agree in; times may differ. Not a number equals itself here."""
    costs = ("seconds_per_step", "peak_memory")
    return json.dumps({key: value for key, value in asdict(result).items() if key not in costs}, sort_keys=True)
