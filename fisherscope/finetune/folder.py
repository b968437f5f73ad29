"""The folder of a run: what is in it when, what may be in it before, and what a failed call takes away again."""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import storage
from .protocol import read_roles
from .results import Results

CONFIG, RESULTS, PREDICTIONS, SPLITS, FACTS = (
    "config.yaml", "results.json", "predictions.jsonl", "splits.json", "run.json",
)  # fmt: skip

LOCAL = "local_models"
"""In ``config.yaml`` beside the settings: fingerprints of the local models that they name."""


class OtherSettings(ValueError):
    """The folder of a run was begun with other settings."""


def work_folder(folder: Path, seed: int) -> Path:
    """Where a training keeps what it has done so far; a sweep calls the folders of its runs ``seed-K``."""
    return storage.part_path(folder / f"seed-{seed}")


def saved_models(folder: Path, seed: int | str = "*") -> list[Path]:
    """The models that were saved of a seed, or of all."""
    return sorted([*folder.glob(f"model-seed-{seed}"), *folder.glob(f"model-seed-{seed}-*")])


def begin(
    folder: Path, settings: Mapping[str, Any], local: Mapping[str, str], seeds: Sequence[int], resume: bool, save: bool
) -> Results | None:
    """Put the settings into the folder of a run, or check what an earlier call with the same ones left there.

    Args:
        folder: The folder.
        settings: Of the run, resolved.
        local: Fingerprints of the local models that they name, of which settings hold the names alone.
        seeds: Of the trainings.
        resume: Whether to go on with what is there.
        save: Whether models are to be saved.

    Returns:
        What earlier calls left: all seeds, or some of them; None if there are none.

    Raises:
        FileExistsError: If the folder holds a run and ``resume`` is not set, files of something else under the names of
            ours, a model, or other runs below it.
        NotADirectoryError: If it is a file.
        OtherSettings: If the run there has other settings, or began with other weights of the same name.
        WrongFile: If a file of the run there is damaged, or none of ours.
        ValueError: If models of finished seeds are to be saved.
    """
    if wrong := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise NotADirectoryError(f"A run needs a folder, but {wrong} is a file; give another folder.")
    config = folder / CONFIG
    if (folder / RESULTS).exists() and not resume:
        raise FileExistsError(f"{folder} holds results; give resume=True (--resume) to read them, or another folder.")
    if not config.exists():
        _check_free(folder)
        with storage.atomic(config) as temporary:
            temporary.write_text(yaml.safe_dump({**settings, LOCAL: dict(local)}, sort_keys=False), encoding="utf-8")
        return None
    if not resume:
        raise FileExistsError(
            f"{folder} holds an unfinished run; give resume=True (--resume) to go on with it, or another folder."
        )
    before = _read_config(config)
    known = before.pop(LOCAL, {})
    found = storage.difference(before, dict(settings)) or storage.difference(known, {n: local.get(n) for n in known})
    if found:
        raise OtherSettings(f"{folder} was begun with another setting: {found}; give the same ones, or another folder.")
    results = _left(folder)
    finished = [run.seed for run in results.runs if run.seed in seeds] if results else []
    if save and (unsaved := [seed for seed in finished if not saved_models(folder, seed)]):
        raise ValueError(
            f"{folder} holds the finished seed {unsaved[0]} without its model, which cannot be saved any more; leave "
            "out save_model (--save-model), or give another folder."
        )
    return results


def _check_free(folder: Path) -> None:
    """Refuse a folder where a run would replace something, or would be mixed up with other runs."""
    names = (RESULTS, PREDICTIONS, SPLITS, FACTS)
    ours = [*(folder / name for name in names), storage.part_path(folder / RESULTS)]
    ours += [*folder.glob("seed-*.part"), *folder.glob("*-seed-[0-9]*")]
    if found := next((path for path in ours if path.exists()), None):
        raise FileExistsError(
            f"{folder} holds {found.name}, but no {CONFIG} that says of which run it is; give another folder."
        )
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} is the folder of a model; give another one for what comes out.")
    if found := next(folder.rglob(RESULTS), None) or next(folder.rglob(f"{RESULTS}.part"), None):
        raise FileExistsError(f"{folder} has another run below it, {found.parent}; give a folder of its own.")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict) or not {"model", "method"} <= found.keys():
        raise storage.WrongFile(f"{path} was cut short, or is not of a run; give another folder.")
    if not isinstance(found.setdefault(LOCAL, {}), dict):
        raise storage.WrongFile(f"{path} has damaged contents; give another folder.")
    return found


def _left(folder: Path) -> Results | None:
    """What earlier calls left: all seeds, or some of them; all files that will be added to are read once."""
    complete = folder / RESULTS
    found = [path for path in (storage.part_path(complete), complete) if path.exists()]
    results = Results.load(found[0]) if found else None
    _predictions(folder / PREDICTIONS)
    if (folder / SPLITS).exists():
        try:
            read_roles(folder, 0)
        except storage.WrongFile:
            raise
        except ValueError:  # it has other seeds
            pass
    return results


def leave(folder: Path, made: bool) -> None:
    """Take away what a call put into a folder that held no run, if nothing was trained, so that others can be tried.

    Args:
        folder: The folder.
        made: Whether the call made it.
    """
    work = list(folder.glob("seed-*.part"))
    begun = ("checkpoint-*", "*/checkpoint-*", "*/model")
    trained = any(found for part in work for pattern in begun for found in part.glob(pattern))
    if trained or storage.part_path(folder / RESULTS).exists() or any(folder.glob("*-seed-[0-9]*")):
        return
    for part in work:
        shutil.rmtree(part)
    for name in (SPLITS, CONFIG):  # which says whose the others are, should the process be killed here
        (folder / name).unlink(missing_ok=True)
    if made:
        with contextlib.suppress(OSError):  # what somebody else put there meanwhile stays
            folder.rmdir()


def add(folder: Path, results: Results, predictions: Sequence[Mapping[str, Any]]) -> None:
    """Keep a finished training, the last one of the results, and take away what it had done so far."""
    seed, path = results.runs[-1].seed, folder / PREDICTIONS
    rows = [{"seed": seed, **row} for row in predictions]
    kept = [row for row in _predictions(path) if row["seed"] != seed]  # of an earlier attempt at the seed
    with storage.atomic(path) as temporary:
        temporary.write_text("".join(f"{json.dumps(row)}\n" for row in [*kept, *rows]), encoding="utf-8")
    results.save(storage.part_path(folder / RESULTS))
    shutil.rmtree(work_folder(folder, seed), ignore_errors=True)


def finish(folder: Path, results: Results) -> None:
    """Make the results complete, if any training was added."""
    unfinished = storage.part_path(folder / RESULTS)
    for run in results.runs:  # a process may have ended just before it took this away
        shutil.rmtree(work_folder(folder, run.seed), ignore_errors=True)
    if unfinished.exists():
        with storage.atomic(folder / FACTS) as temporary:
            temporary.write_text(json.dumps(results.provenance, indent=1), encoding="utf-8")
        unfinished.replace(folder / RESULTS)


def _predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of the file so far; none if there is no file."""
    try:
        rows: Any = (
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        )
    except ValueError:
        rows = None
    if rows is None or not all(isinstance(row, dict) and "seed" in row for row in rows):
        raise storage.WrongFile(f"{path} was cut short, or is not of a run; give another folder.")
    return rows
