"""What fine-tuning came to: one value for a task, a method and its seeds."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import storage

FORMAT = "fisherscope.results"

Which = Literal["last", "best"]


@dataclass(frozen=True)
class SeedResult:
    """One training.

    Attributes:
        seed: Of head, data order and dropout.
        status: ``"finished"``, or ``"diverged"`` if the loss or a weight was not finite at the end.
        evaluations: One for every epoch: ``step``, ``epoch``, ``loss`` and the metrics, on the validation examples.
        losses: Training loss in nats (squared units for regression) of every logged step: ``step``, ``loss``.
        constant: Whether all predictions of the last evaluation are the same: the training failed.
        seconds_per_step: Median time of an optimizer step.
        peak_memory: Bytes: of the GPU's memory in this training, or on a CPU of the process so far.
        optimizer_state: Bytes that the optimizer holds at the end.
        forgetting: Loss of pretraining ``before`` and ``after``, where it was measured.
    """

    seed: int
    status: Literal["finished", "diverged"]
    evaluations: Sequence[Mapping[str, float]]
    losses: Sequence[Mapping[str, float]]
    constant: bool
    seconds_per_step: float
    peak_memory: int
    optimizer_state: int
    forgetting: Mapping[str, float] | None = None

    def value(self, metric: str, which: Which = "last") -> float:
        """A metric on the validation examples: after the last epoch, or of the epoch where it was best.

        The best one is chosen on the examples it is measured on, so it is too good by the luck of the choice.

        Raises:
            KeyError: If there is no such metric.
        """
        values = [row[metric] for row in self.evaluations]
        if which == "last":
            return values[-1]
        return min(values) if metric == "loss" else max(values)


@dataclass(frozen=True)
class Results:
    """What fine-tuning came to.

    Attributes:
        task: Name of the task or of the data.
        method: Name of the method, ``"A+B"`` for several at once.
        metric: The main one.
        settings: Of training and method, resolved.
        runs: One for every seed.
        fingerprints: Of the examples for training and for validation, and of the pretrained weights.
        provenance: Versions, command and time.
    """

    task: str
    method: str
    metric: str
    settings: Mapping[str, Any]
    runs: Sequence[SeedResult]
    fingerprints: Mapping[str, str | None] = field(default_factory=dict)
    provenance: storage.Provenance = field(default_factory=dict)

    def values(self, metric: str | None = None, which: Which = "last") -> dict[int, float]:
        """The main or another metric by seed."""
        return {run.seed: run.value(metric or self.metric, which) for run in self.runs if run.evaluations}

    def table(self) -> list[dict[str, Any]]:
        """A row for every seed: the metrics after the last epoch, the main one at its best, and what it cost."""
        return [
            {
                "seed": str(run.seed),
                "status": run.status,
                **{name: value for name, value in (run.evaluations or [{}])[-1].items() if name != "step"},
                f"best_{self.metric}": run.value(self.metric, "best") if run.evaluations else None,
                "seconds_per_step": run.seconds_per_step,
                "optimizer_state": run.optimizer_state,
            }
            for run in self.runs
        ]

    def __str__(self) -> str:
        """A line for every seed, and the mean."""
        lines = [f"{self.method} on {self.task}, {self.metric} on the validation examples: last (best epoch)"]
        for run in self.runs:
            if not run.evaluations:
                lines.append(f"  seed {run.seed}: not measured, as there are no validation examples")
                continue
            notes = [run.status] * (run.status != "finished") + ["one prediction for all"] * run.constant
            last, best = run.value(self.metric), run.value(self.metric, "best")
            remark = f"  ({', '.join(notes)})" if notes else ""
            lines.append(f"  seed {run.seed}: {last:.4f} ({best:.4f}){remark}")
        values = list(self.values().values())
        if len(values) > 1:
            lines.append(f"  mean {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} (std, ddof 1)")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write JSON, complete or not at all."""
        contents = {"format": FORMAT, "format_version": storage.FORMAT_VERSION, **asdict(self)}
        with storage.atomic(path) as temporary:
            temporary.write_text(json.dumps(contents, indent=1), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "Results":
        """Read a file of :meth:`save`; of a folder, its ``results.json``, or the ``.part`` of a run in progress.

        Raises:
            FileNotFoundError: If there is no such file.
            WrongFile: If it holds something else, another version, or is damaged.
        """
        path = Path(path)
        if path.is_dir():
            complete = path / "results.json"
            path = complete if complete.exists() else storage.part_path(complete)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            contents = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise storage.WrongFile(f"{path} is not JSON or was cut short; make it again.") from error
        storage.check_header(path, FORMAT, contents.pop("format", None), contents.pop("format_version", None))
        try:
            runs = [SeedResult(**run) for run in contents.pop("runs")]
            return Results(**contents, runs=runs)
        except (KeyError, TypeError) as error:
            raise storage.WrongFile(f"{path} has damaged contents; make it again.") from error
