"""Doing the trainings of a sweep.

Any number of processes may work on one sweep: each claims a training by a lock that ends with the process.
"""

import contextlib
import fcntl
import gc
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import torch

from .. import storage
from .._progress import progress_bar
from ..finetune.results import Results
from ..finetune.training import OtherSettings, finetune
from ..masks import Mask
from ..scores import FisherScores
from .failure import FAILED, Failure
from .sweep import Sweep, SweepRun, state_of


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
    if state_of(folder) == "finished":
        _check_settings(run, folder, checked)
        return _Outcome(run.folder, "skipped")
    with _claimed(folder) as is_ours:
        if not is_ours:
            return _Outcome(run.folder, "in use")
        state, file = state_of(folder), folder / FAILED
        if state == "finished":
            _check_settings(run, folder, checked)
            return _Outcome(run.folder, "skipped", "done by another process meanwhile")
        if state == "failed" and not retry_failed:
            return _Outcome(run.folder, "failed", f"{_said_in(file)} (before; retry it with --retry-failed)")
        file.unlink(missing_ok=True)
        began = time.monotonic()
        try:
            results = _train(run, folder)
        except OtherSettings:
            raise
        except Exception as error:
            failure = Failure.of(error, run.arguments, run.folder.parts[-2])
            failure.save(file)
            return _Outcome(run.folder, "failed", failure.error)
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


def _said_in(path: Path) -> str:
    try:
        return Failure.load(path).error
    except storage.WrongFile:
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
