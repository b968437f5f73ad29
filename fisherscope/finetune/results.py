"""What fine-tuning came to: one value for a task, a method and its seeds."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .. import storage
from .protocol import checked_size

T = TypeVar("T")

FORMAT = "fisherscope.results"

Which = Literal["last", "selected", "best"]
"""Which evaluation of a training counts; :meth:`SeedResult.value` says what they are."""

SELECT = "select_"
"""Before the name of a metric: on the examples that choose the epoch."""


@dataclass(frozen=True)
class SeedResult:
    """One training.

    Attributes:
        seed: Of head, data order and dropout.
        status: ``"finished"``, or ``"diverged"`` if the loss or a weight was not finite at the end.
        evaluations: One for every epoch (or as often as the protocol says): ``step``, ``epoch``, ``loss`` and all
            metrics on the report examples; ``select_loss``, … on the select examples, where there are any.
        losses: Training loss in nats (squared units for regression) of every logged step: ``step``, ``loss``.
        constant: Whether all predictions of the last evaluation are the same: the training failed.
        seconds_per_step: Median time of an optimizer step.
        peak_memory: Bytes: the most in the training, of the GPU's memory or on a CPU of the whole process (on other
            systems than Linux since it began).
        optimizer_state: Bytes that the optimizer holds at the end.
        forgetting: Loss of pretraining ``before`` and ``after``, where it was measured.
        baselines: Metrics on the report examples of what knows only how often each class (or the mean label) is among
            the training examples, as :func:`fisherscope.finetune.protocol.baselines` computes them;
            ``label_entropy`` is the training loss of that, where the logged loss is nothing but cross-entropy.
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
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def has_select(self) -> bool:
        """Whether there are select examples, which choose the epoch."""
        return bool(self.evaluations) and f"{SELECT}loss" in self.evaluations[0]

    def value(self, metric: str, which: Which = "last") -> float:
        """A metric on the report examples.

        Args:
            metric: Its name.
            which: ``"last"``: after the last epoch. ``"selected"``: of the epoch where the metric is best on the select
                examples (where their loss is lowest, if the metric is not measured there), the earliest of equals.
                ``"best"``: of the epoch where it is best on the report examples themselves, which is too good by the
                luck of the choice.

        Raises:
            KeyError: If there is no such metric.
            ValueError: If there are no select examples to choose by.
        """
        if which == "last":
            return self.evaluations[-1][metric]
        if which == "best":
            return self.evaluations[self._best(metric)][metric]
        if not self.has_select:
            raise ValueError(
                "The selected epoch needs select examples, but this training left none; take the last epoch, or a "
                "protocol or train_size that leaves some."
            )
        name = f"{SELECT}{metric}"
        return self.evaluations[self._best(name if name in self.evaluations[0] else f"{SELECT}loss")][metric]

    def _best(self, metric: str) -> int:
        """The evaluation with the best value, the first of equals; what is not a number is worse than all else."""
        sign = -1 if metric.rpartition(".")[2].removeprefix(SELECT) == "loss" else 1
        worths = [sign * row[metric] for row in self.evaluations]
        return max(range(len(worths)), key=lambda i: -math.inf if math.isnan(worths[i]) else worths[i])

    def _last_epoch_loss(self) -> float | None:
        """The mean training loss that was logged in the last epoch; None if nothing says where that began."""
        if not self.evaluations:
            return None
        last = self.evaluations[-1]
        begin = last["step"] - last["step"] / last["epoch"]
        losses = [row["loss"] for row in self.losses if row["step"] > begin]
        return statistics.fmean(losses) if losses else None


@dataclass(frozen=True)
class Results:
    """What fine-tuning came to.

    Attributes:
        task: Name of the task or of the data.
        method: Name of the method, ``"A+B"`` for several at once.
        metric: The main one.
        settings: Of training and method, resolved; ``protocol`` and ``train_size`` say who saw which examples.
        runs: One for every seed.
        fingerprints: Of the pretrained weights (``backbone``), and where no seed draws them of the ``train`` and the
            report examples (``validation``).
        provenance: Versions, command and time.
    """

    task: str
    method: str
    metric: str
    settings: Mapping[str, Any]
    runs: Sequence[SeedResult]
    fingerprints: Mapping[str, str | None] = field(default_factory=dict)
    provenance: storage.Provenance = field(default_factory=dict)

    @property
    def has_select(self) -> bool:
        """Whether all trainings have select examples."""
        measured = [run for run in self.runs if run.evaluations]
        return bool(measured) and all(run.has_select for run in measured)

    @property
    def baselines(self) -> dict[str, float]:
        """The mean over the trainings of :attr:`SeedResult.baselines`; empty if they were not measured."""
        known = [run.baselines for run in self.runs if run.baselines]
        names = [name for name in (known or [{}])[0] if all(name in one for one in known)]
        return {name: statistics.fmean(one[name] for one in known) for name in names}

    def values(self, metric: str | None = None, which: Which = "last") -> dict[int, float]:
        """The main or another metric by seed."""
        return {run.seed: run.value(metric or self.metric, which) for run in self.runs if run.evaluations}

    def failure(self, run: SeedResult, which: Which = "last") -> str | None:
        r"""Why a training counts as failed, in words; None if it does not.

        It failed if it diverged, if its main metric is no better than that of the majority class or the mean label
        (Dodge et al. 2020, arXiv 2002.06305, section 3; Mosbach et al. 2021, arXiv 2006.04884), or if its training loss
        in the last epoch is within 1 % of the entropy of the labels, :math:`-\sum_c p_c \log p_c` (ours). Where the
        last evaluation counts, it also failed if it predicts the same for all examples then, which is not known of
        earlier ones. A correlation with constant predictions counts as 0.

        Args:
            run: The training.
            which: The evaluation whose main metric counts, as for :meth:`SeedResult.value`.
        """
        reasons = []
        if run.status != "finished":
            reasons.append(run.status)
        if run.constant and which == "last":
            reasons.append("one prediction for all")
        least = run.baselines.get(self.metric)
        if run.evaluations and least is not None and not run.value(self.metric, which) > least:
            reasons.append(f"{self.metric} no better than the {least:.4f} of the labels alone")
        entropy, loss = run.baselines.get("label_entropy"), run._last_epoch_loss()
        if entropy is not None and loss is not None and abs(loss - entropy) <= 0.01 * entropy:
            reasons.append(f"training loss still {loss:.4f}, where the labels alone give {entropy:.4f}")
        return ", ".join(reasons) or None

    def table(self) -> list[dict[str, Any]]:
        """A row for every seed: the metrics after the last epoch, the main one as it was chosen, and what it cost."""
        which = self._chosen
        return [
            {
                "seed": str(run.seed),
                "status": run.status,
                **{name: value for name, value in (run.evaluations or [{}])[-1].items() if name != "step"},
                f"{which}_{self.metric}": run.value(self.metric, which) if run.evaluations else None,
                "seconds_per_step": run.seconds_per_step,
                "optimizer_state": run.optimizer_state,
            }
            for run in self.runs
        ]

    @property
    def _chosen(self) -> Which:
        """What is shown beside the last epoch."""
        return "selected" if self.has_select else "best"

    def __str__(self) -> str:
        """A line for every seed, and the mean."""
        which = self._chosen
        lines = [f"{self.method} on {self.task}, {self.metric} on the report examples: last ({which} epoch)"]
        for run in self.runs:
            if not run.evaluations:
                lines.append(f"  seed {run.seed}: not measured, as there are no validation examples")
                continue
            failure = self.failure(run)
            last, chosen = run.value(self.metric), run.value(self.metric, which)
            remark = f"  (failed: {failure})" if failure else ""
            lines.append(f"  seed {run.seed}: {last:.4f} ({chosen:.4f}){remark}")
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
            if not path.exists() and any(path.parent.glob("seed-*.part")):
                raise FileNotFoundError(f"No training in {path.parent} is finished yet; go on with resume (--resume).")
            if not path.exists():
                raise FileNotFoundError(
                    f"A folder must hold results of fine-tuning, but {complete.parent} holds none; give the folder of "
                    "a run, or a file of scores, a mask or a landscape."
                )
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            contents = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise storage.WrongFile(f"{path} is not JSON or was cut short; make it again.") from error
        storage.check_header(path, FORMAT, contents.pop("format", None), contents.pop("format_version", None))
        try:
            runs = [_checked(SeedResult, run) for run in contents.pop("runs")]
            results = _checked(Results, {**contents, "runs": runs})
            _check_contents(results)
            return results
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise storage.WrongFile(f"{path} has damaged contents; make it again.") from error


def _checked(kind: type[T], contents: Mapping[str, Any]) -> T:
    """A dataclass of what JSON holds, if every value is of the type of its field."""
    hints = get_type_hints(kind)
    for name, value in contents.items():
        if not _fits(value, hints[name]):
            raise TypeError(f"{name} is not of its type")
    return kind(**contents)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value of JSON is of a type; a whole number is a float, too, and a truth value is no number."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is Sequence:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    if annotation in (int, float):
        return isinstance(value, int | annotation) and not isinstance(value, bool)
    return annotation is Any or isinstance(value, annotation)


def _check_contents(results: Results) -> None:
    """Refuse what is of the right type and cannot be."""
    for run in results.runs:
        for row in run.evaluations:
            if not {"step", "epoch", results.metric} <= row.keys() == run.evaluations[0].keys():
                raise KeyError("an evaluation lacks a metric")
            if not (row["step"] > 0 and row["epoch"] > 0):
                raise ValueError("an evaluation is of no epoch")
        if not all({"step", "loss"} <= row.keys() for row in run.losses):
            raise KeyError("a loss lacks its step")
    checked_size(results.settings.get("train_size"))
    for name in ("settings", "data"):
        if not isinstance(results.settings.get(name, {}), dict):
            raise TypeError(f"{name} is no mapping")
    if results.provenance and not isinstance(results.provenance.get("device"), str):
        raise TypeError("there is no device")
