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
from ..finetune.plan import recipe_of
from ..finetune.protocol import DEFAULT, PROTOCOLS, checked_size
from ..finetune.recipe import Recipe
from ..finetune.regularizer import METHODS
from ..finetune.results import Results, SeedResult, Which
from ..models import shown_name
from .failure import FAILED, Failure

logger = logging.getLogger(__name__)

RESULTS = "results.json"

UNRESOLVED = {"settings", "scores", "mask", "seed", "seeds", "arm"}
"""What a crashed training says in other words than ``results.json``, or says of its seed."""

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

    def failures(self, which: Which = "last") -> dict[int, str]:
        """By seed, why a training failed; ``which`` is the evaluation that counts, as :meth:`failure` has it."""
        found = {run.seed: why for run in self.runs if (why := self.failure(run, which)) is not None}
        crashed = {seed: " ".join(f"crashed: {error}".split()) for seed, error in self.crashed.items()}
        return dict(sorted((found | crashed).items()))


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
        """To name arms by; of a crashed training only those are known that it was given."""
        return json.dumps(self.results.settings, sort_keys=True) if self.results.runs else None

    @property
    def begins_with(self) -> str | None:
        """The fingerprint of the pretrained weights; None if those are not what the training begins with."""
        settings = self.results.settings
        is_checkpoint = settings.get("before") is None and settings.get("init", "pretrained") == "pretrained"
        return self.results.fingerprints.get("backbone") if is_checkpoint else None

    def difference(self, other: "_Run") -> str | None:
        """The first setting in which another run differs, in words; of a crashed one only what it was given counts."""
        here, there = ({"protocol": DEFAULT, "init": "pretrained", **run.results.settings} for run in (self, other))
        if not (self.results.runs and other.results.runs):
            both = here.keys() & there.keys() - UNRESOLVED
            here, there = ({name: one[name] for name in sorted(both)} for one in (here, there))
        return storage.difference(here, there)


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
        ValueError: If a file of another name is given, a seed of an arm is there twice with other values, seeds of an
            arm began with other weights, or two arms would have one name.
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
    names = (RESULTS, storage.part_path(RESULTS).name, FAILED)
    for given in map(Path, folders):
        if given.is_file():
            if given.name not in names:
                raise ValueError(f"{given} is not a file of a run ({_listed(names)}); give folders of runs.")
            given = given.parent
        if not given.is_dir():
            raise FileNotFoundError(f"There is no folder {given}; give folders of runs.")
        for name in names:
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
    try:
        settings = _asked(failure.config)
    except (TypeError, ValueError) as problem:
        raise storage.WrongFile(
            f"{path} has damaged contents; remove it, or name the other folders one by one."
        ) from problem
    results = Results(settings["task"], settings["method"], "", settings, [])
    return _Run(path.parent, results, {failure.config["seed"]: failure.error.removesuffix(".")})


def _asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a crashed training was given, in the words of ``results.json`` but for those unresolved."""
    texts = {"method": "vanilla", "protocol": DEFAULT, **config}
    for name, kind in (("model", str), ("task", str), ("method", str), ("protocol", str), ("seed", int)):
        if not isinstance(texts[name], kind):
            raise TypeError(f"{name} is {texts[name]!r}")
    drawn_by = PROTOCOLS[texts["protocol"]].drawn_by if texts["protocol"] in PROTOCOLS else "subset_seed"
    return {
        **texts,
        **_recipe(texts["method"], config),
        "model": shown_name(texts["model"]),
        "train_size": checked_size(config.get("train_size")),
        "subset_seed": config.get("subset_seed", 0) if drawn_by == "subset_seed" else drawn_by,
    }


def _recipe(method: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe was given, as the method changes it."""
    given = {item.name: config[item.name] for item in fields(Recipe) if item.name in config}
    own = dict(config.get("settings") or {})
    if not METHODS.keys() >= set(method.split("+")):
        return given
    changed = recipe_of(method, own, Recipe(**given))
    return {name: getattr(changed, name) for name in given}


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
    done = {result.seed for run in runs for result in run.results.runs}
    runs = [run for run in runs if not (run.crashed and run.crashed.keys() <= done)]  # mended since
    first, *others = sorted(runs, key=lambda run: not run.results.runs)
    for other in others:
        if found := first.difference(other):
            raise ValueError(
                f"{first.folder} and {other.folder} are both {name} on {first.results.task}, with another setting: "
                f"{found}; give their folders other names, or compare them apart."
            )
    weights = {run.begins_with: run.folder for run in runs if run.begins_with is not None}
    if len(weights) > 1:
        (one, here), (another, there), *_ = weights.items()
        raise ValueError(
            f"{here} and {there} are both {name} on {first.results.task}, but began with other weights of "
            f"{first.results.settings.get('model')} ({one}, {another}); compare them apart."
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
    complete = [run for run in runs if run.results.runs] or [first]
    same = set.intersection(*(set(run.results.fingerprints.items()) for run in complete))
    return Arm(**held | {
        "method": name,
        "runs": [seeds[seed][0] for seed in sorted(seeds)],
        "fingerprints": dict(sorted(same)),
        "crashed": {seed: error for run in runs for seed, error in run.crashed.items()},
        "devices": tuple(sorted({str(run.results.provenance["device"]) for run in runs if run.results.provenance})),
    })  # fmt: skip


def _measured(result: SeedResult) -> str:
    """What two records of one training must agree in; times may differ. Not a number equals itself here."""
    costs = ("seconds_per_step", "peak_memory")
    return json.dumps({key: value for key, value in asdict(result).items() if key not in costs}, sort_keys=True)
