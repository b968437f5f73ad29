"""Doing the trainings of a sweep.

Any number of processes may work on one sweep: each claims a training by a lock that ends with the process.
"""

import contextlib
import errno
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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import torch

from .. import storage
from .._progress import progress_bar
from ..finetune.folder import LOCAL
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


@dataclass(frozen=True)
class _Call:
    """What all trainings of a call have in common.

    Attributes:
        out: Folder of the sweep.
        retry_failed: Whether to do those again that failed before.
        is_shard: Whether no other process is to do these trainings, so that locks can be done without.
    """

    out: Path
    retry_failed: bool
    is_shard: bool


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
        NotADirectoryError: If there is a file where a folder has to be.
        OSError: If the folder's file system has no locks, and the sweep is no shard.
        ValueError: If a training was begun, or finished, with other settings.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("A sweep shares its trainings among processes by itself; start it without torchrun.")
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}.")
    out, runs = Path(out), sweep.runs
    _check_folders(runs, out)
    call = _Call(out, retry_failed, sweep.is_shard)
    if processes > 1 and len(runs) > 1:
        outcomes = _in_processes(runs, call, min(processes, len(runs)))
    else:
        checked: set[str] = set()
        outcomes = (_attempt(run, call, checked) for run in runs)
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


def _check_folders(runs: Sequence[SweepRun], out: Path) -> None:
    """Refuse a file where a training needs a folder."""
    for folder in {place for run in runs for place in (out / run.folder, *(out / run.folder).parents)}:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"A sweep needs a folder, but {folder} is a file; give another folder (--out).")


def _report(outcomes: Sequence[_Outcome]) -> SweepReport:
    folders = {
        kind: tuple(outcome.folder for outcome in outcomes if outcome.kind == kind)
        for kind in ("finished", "skipped", "in use")
    }
    failed = {outcome.folder: outcome.note for outcome in outcomes if outcome.kind == "failed"}
    return SweepReport(folders["finished"], folders["skipped"], folders["in use"], failed)


def _attempt(run: SweepRun, call: _Call, checked: set[str]) -> _Outcome:
    """Do a training unless it is done, in use or has failed before."""
    folder = call.out / run.folder
    if state_of(folder) == "finished":
        return _finished_before(run, folder, checked)
    with _claimed(folder, call.is_shard) as is_ours:
        if not is_ours:
            return _Outcome(run.folder, "in use")
        state, file = state_of(folder), folder / FAILED
        if state == "finished":
            return _finished_before(run, folder, checked, "done by another process meanwhile")
        if state == "failed" and not call.retry_failed:
            return _Outcome(run.folder, "failed", f"{_said_in(file)} (before; retry it with --retry-failed)")
        began = time.monotonic()
        try:
            results = _train(run, folder)
        except OtherSettings:
            raise
        except Exception as error:
            return _failed(run, folder, error)
        finally:
            gc.collect()  # a trainer refers to itself, and holds the state of its optimizer
        file.unlink(missing_ok=True)
        return _Outcome(run.folder, "finished", f"{_told(results)}, {time.monotonic() - began:.0f} s")


def _failed(run: SweepRun, folder: Path, error: Exception) -> _Outcome:
    """Keep what happened."""
    failure = Failure.of(error, run.arguments, run.folder.parts[-2])
    failure.save(folder / FAILED)
    return _Outcome(run.folder, "failed", failure.error)


def _finished_before(run: SweepRun, folder: Path, checked: set[str], note: str = "") -> _Outcome:
    """Skip a training that has results, if they can be read and are of its seed and its settings."""
    try:
        found, (seed,) = [result.seed for result in Results.load(folder).runs], run.arguments["seeds"]
        if seed not in found:
            told = f"{folder} has results of seed {', '.join(map(str, found))}, not {seed}; move it elsewhere."
            return _Outcome(run.folder, "failed", told)
        _check_settings(run, folder, checked)
    except storage.WrongFile as error:
        return _Outcome(run.folder, "failed", str(error))
    return _Outcome(run.folder, "skipped", note)


def _check_settings(run: SweepRun, folder: Path, checked: set[str]) -> None:
    """Refuse a finished training of other settings; one with another seed alone than a checked one needs no new look.

    Large tasks take seconds to read, and settings are known only with the data.
    """
    config = folder / "config.yaml"
    found = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    found = found.replace(f"{LOCAL}: {{}}\n", "")  # older ones do not say that there are none
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
    values = [f"{results.metric} {value:.4f} after the last epoch" for value in results.values().values()]
    return ", ".join([*(run.status for run in results.runs if run.status != "finished"), *values]) or "not measured"


def _said_in(path: Path) -> str:
    try:
        return Failure.load(path).error
    except storage.WrongFile:
        return f"{path.name} is damaged"


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that have no locks."""


@contextlib.contextmanager
def _claimed(folder: Path, is_shard: bool) -> Iterator[bool]:
    """Whether the folder belongs to this process, until the block or the process ends.

    The lock is on a file beside the folder, as the folder of a refused run is taken away. The file stays: a lock on one
    that another process has just deleted would be worth nothing. Where there are no locks, all of a shard is its own.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except BlockingIOError:
            is_ours = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if not is_shard:
                raise OSError(
                    f"The file system of {path.parent} has no locks, by which processes share a sweep; give every "
                    "process a part of its own, --shard I/N (0/1 for a process alone)."
                ) from error
            is_ours = True
        yield is_ours


def _in_processes(runs: Sequence[SweepRun], call: _Call, processes: int) -> Generator[_Outcome, None, None]:
    """Hand out the trainings to processes."""
    pool = _Pool(deque(runs), call, max(1, torch.get_num_threads() // processes))
    try:
        for _ in range(processes):
            pool.start()
        yield from pool.outcomes()
    finally:
        pool.end()


@dataclass
class _Pool:
    """Processes that are handed trainings, one at a time.

    A killed process is replaced, and what it was busy with is tried once more; at the second kill it has failed. A
    process that ends before it asks for its first training is not replaced: others would end likewise.
    """

    waiting: deque[SweepRun]
    call: _Call
    threads: int
    killed: set[Path] = field(default_factory=set)
    workers: dict[Connection, BaseProcess] = field(default_factory=dict)
    busy: dict[Connection, SweepRun | None] = field(default_factory=dict)  # None until it asks for the first

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        ours, theirs = context.Pipe()
        self.workers[ours] = context.Process(target=_work, args=(theirs, self.call, self.threads))
        self.workers[ours].start()
        theirs.close()
        self.busy[ours] = None

    def outcomes(self) -> Iterator[_Outcome]:
        """What becomes of each training, as it is known; then of those that no process was left for."""
        while self.busy:
            for pipe in wait(list(self.busy)):
                assert isinstance(pipe, Connection)
                run = self.busy.pop(pipe)
                try:
                    outcome = pipe.recv()
                except (EOFError, ConnectionResetError):
                    yield from self._ended(pipe, run)
                    continue
                if isinstance(outcome, Exception):
                    raise outcome
                if outcome is not None:
                    yield outcome
                self._hand_out(pipe)
        for run in self.waiting:
            yield _Outcome(run.folder, "failed", "no process was left to do it; the same command goes on")

    def _hand_out(self, pipe: Connection) -> None:
        if not self.waiting:
            pipe.close()
            return
        self.busy[pipe] = self.waiting.popleft()
        with contextlib.suppress(BrokenPipeError):  # then its end is noticed in its answer
            pipe.send(self.busy[pipe])

    def _ended(self, pipe: Connection, run: SweepRun | None) -> Iterator[_Outcome]:
        """Replace a process that was killed."""
        pipe.close()
        self.workers[pipe].join()  # its lock ends a moment after its pipe
        if run is None:
            return
        if run.folder in self.killed:
            yield _killed_twice(run, self.call)
        else:
            self.killed.add(run.folder)
            self.waiting.append(run)
        if self.waiting:
            self.start()

    def end(self) -> None:
        for pipe, worker in self.workers.items():
            pipe.close()  # which ends an idle one
            if self.busy:
                worker.terminate()
        for worker in self.workers.values():
            worker.join()


def _killed_twice(run: SweepRun, call: _Call) -> _Outcome:
    """Keep that a training fails without an error of its own."""
    folder = call.out / run.folder
    with _claimed(folder, call.is_shard) as is_ours:
        if not is_ours:  # another call has begun it meanwhile
            return _Outcome(run.folder, "in use")
        return _failed(run, folder, ChildProcessError("Its process was killed, twice, as when memory runs out."))


def _work(pipe: Connection, call: _Call, threads: int) -> None:
    """Do the trainings that come through the pipe, and send back what became of each; None asks for the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one is interrupted, too, and ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    checked: set[str] = set()
    outcome: _Outcome | Exception | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(outcome)
            run = pipe.recv()
            try:
                outcome = _attempt(run, call, checked)
            except Exception as error:
                outcome = error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
