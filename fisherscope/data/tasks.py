"""The tasks of GLUE and of minBERT by name, from the Hub or from local files in their original layout.

:data:`TASKS` says what each task is; :func:`read_task` reads one of its splits into a
:class:`~fisherscope.data.Source`, with classes numbered as the Hub numbers them, whatever the file holds.
"""

import csv
import io
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..builtin import tasks as builtin
from .sources import Source, _decoded, _fingerprint, _read_hub, read_source

logger = logging.getLogger(__name__)

Rows = Sequence[Sequence[str] | None]


@dataclass(frozen=True)
class Layout:
    """How the files of a task look.

    Attributes:
        file: Name of a file, with ``{}`` for ``train``, ``dev``, ``dev_matched``, …. A ``.tsv`` is tab separated
            with quoting off, a ``.csv`` is tab separated with quoting on.
        columns: One or two columns with text, then the one with the label.
        header: Names of all columns where the file has no line that says them.
    """

    file: str
    columns: tuple[str, ...]
    header: tuple[str, ...] | None = None

    def file_of(self, split: str) -> str:
        """Name of the file that holds a split."""
        return self.file.format(split.replace("validation", "dev"))


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be predicted from what, and where the examples are.

    Attributes:
        name: As ``--task`` takes it.
        objective: ``"classification"`` or ``"regression"``.
        metrics: Of ``accuracy f1 matthews pearson spearman``, the first is the main one.
        text_columns: One or two columns with text, on the Hub or where the task has no place there, in its files.
        label_column: The column with the label, likewise.
        class_names: By class id; None for regression, and for built-in tasks, whose data say them.
        sizes: Labelled examples in each split as it was published; empty for built-in tasks.
        hub: Name on the Hub; None for a task that is not there.
        layout: Of local files; None for built-in tasks.
    """

    name: str
    objective: str
    metrics: tuple[str, ...]
    text_columns: tuple[str, ...]
    label_column: str = "label"
    class_names: tuple[str, ...] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    hub: str | None = None
    layout: Layout | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have labels."""
        return tuple(self.sizes) or SPLITS


SPLITS: tuple[str, ...] = ("train", "validation")
SENTENCE, PAIR = ("sentence",), ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
SENTIMENT = ("negative", "positive")
GRADES = ("very negative", "negative", "neutral", "positive", "very positive")
DUPLICATE = ("not_duplicate", "duplicate")
QUESTIONS = ("question1", "question2")


def _glue(
    name: str,
    metrics: tuple[str, ...],
    texts: tuple[str, ...],
    classes: tuple[str, ...] | None,
    sizes: tuple[int, ...],
    columns: tuple[str, ...] = (),
    header: tuple[str, ...] | None = None,
) -> Task:
    objective = "classification" if classes else "regression"
    splits = SPLITS if len(sizes) == 2 else ("train", "validation_matched", "validation_mismatched")
    layout = Layout("{}.tsv", columns or (*texts, "label"), header)
    counts = dict(zip(splits, sizes, strict=True))
    return Task(name, objective, metrics, texts, "label", classes, counts, f"glue/{name}", layout)


def _quoted(
    name: str,
    metrics: tuple[str, ...],
    file: str,
    columns: tuple[str, ...],
    classes: tuple[str, ...] | None,
    sizes: tuple[int, int],
) -> Task:
    objective = "classification" if classes else "regression"
    counts = dict(zip(SPLITS, sizes, strict=True))
    return Task(name, objective, metrics, columns[:-1], columns[-1], classes, counts, None, Layout(file, columns))


# The sizes of minBERT are those of its files without the few rows of Quora that have no label. Its handout says
# otherwise: CFIMDB 1,701 for training, Quora 141,506 and 20,215, STS 6,041 and 864.
_ALL = (
    _glue("cola", ("matthews", "accuracy"), SENTENCE, ("unacceptable", "acceptable"), (8_551, 1_043),
          header=("source", "label", "star", "sentence")),
    _glue("sst2", ("accuracy",), SENTENCE, SENTIMENT, (67_349, 872)),
    _glue("mrpc", ("f1", "accuracy"), PAIR, ("not_equivalent", "equivalent"), (3_668, 408),
          columns=("#1 String", "#2 String", "Quality")),
    _glue("stsb", ("spearman", "pearson"), PAIR, None, (5_749, 1_500), columns=(*PAIR, "score")),
    _glue("qqp", ("accuracy", "f1"), QUESTIONS, DUPLICATE, (363_846, 40_430), columns=(*QUESTIONS, "is_duplicate")),
    _glue("mnli", ("accuracy",), ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
          (392_702, 9_815, 9_832), columns=(*PAIR, "gold_label")),
    _glue("qnli", ("accuracy",), ("question", "sentence"), ENTAILMENT, (104_743, 5_463)),
    _glue("rte", ("accuracy",), PAIR, ENTAILMENT, (2_490, 277)),
    _glue("wnli", ("accuracy",), PAIR, ("not_entailment", "entailment"), (635, 71)),
    _quoted("sst5", ("accuracy",), "ids-sst-{}.csv", (*SENTENCE, "sentiment"), GRADES, (8_544, 1_101)),
    _quoted("cfimdb", ("accuracy",), "ids-cfimdb-{}.csv", (*SENTENCE, "sentiment"), SENTIMENT, (1_707, 245)),
    _quoted("quora", ("accuracy", "f1"), "quora-{}.csv", (*PAIR, "is_duplicate"), DUPLICATE, (141_498, 20_212)),
    _quoted("sts", ("pearson", "spearman"), "sts-{}.csv", (*PAIR, "similarity"), None, (6_040, 863)),
    *(
        Task(f"builtin:{name}", "classification" if made.class_names else "regression", made.metrics, made.columns[:-1])
        for name, made in builtin.TASKS.items()
    ),
)  # fmt: skip

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


def read_task(name: str, split: str = "train", *, data_dir: str | Path | None = None) -> Source:
    """Read a split of a task; one log line says if it has another size than the published one.

    Args:
        name: A key of :data:`TASKS`.
        split: ``train`` or ``validation``. That of MNLI means ``validation_matched``; there is
            ``validation_mismatched``, too.
        data_dir: Folder with the files of the task as they were published, or with a folder of theirs that is named
            as the task (``RTE``, ``SST-2``). None reads from the Hub.

    Returns:
        The labelled examples, named ``"rte:train"``. Rows that lack their label or are broken across lines, as some
        of QQP's and Quora's are, are left out and counted in the log; a text may be blank, as two of QQP's are.

    Raises:
        FileNotFoundError: If the files are not there, or the task has no place on the Hub.
        ValueError: If there is no such task or labelled split, or the data are not what the task says.
    """
    if name not in TASKS:
        raise ValueError(f"The task must be one of {', '.join(TASKS)}; got {name!r}.")
    task = TASKS[name]
    if name == "mnli" and split == "validation":
        split = "validation_matched"
    if split not in task.splits:
        hidden = "; the labels of its test set are not public" if split == "test" and task.layout else ""
        raise ValueError(f"The labelled splits of {name} are {', '.join(task.splits)}; got {split!r}{hidden}.")
    if task.layout is None:
        if data_dir is not None:
            raise ValueError(f"{name} is part of fisherscope and takes no --data-dir; leave it out.")
        return read_source(f"{name}/train" if split == "train" else name, objective=task.objective)
    if data_dir is not None:
        return _labelled(task, split, task.layout.columns, _from_files(task, task.layout, split, Path(data_dir)))
    if task.hub is None:
        files = " and ".join(map(task.layout.file_of, task.splits))
        raise FileNotFoundError(f"{name} is not on the Hub; give --data-dir, a folder with {files}.")
    columns = (*task.text_columns, task.label_column)
    return _labelled(task, split, columns, _from_hub(task.hub, split, columns))


def _labelled(task: Task, split: str, columns: tuple[str, ...], rows: Rows) -> Source:
    where, names = f"{task.name}:{split}", task.class_names
    texts, labels, left_out = [], [], 0
    for number, row in enumerate(rows, 1):
        if row is None or not row[-1].strip():
            left_out += 1
            continue
        texts.append(tuple(row[:-1]))
        labels.append(_label(row[-1].strip(), names, f"row {number}, column {columns[-1]!r} of {where}"))
    if left_out:
        logger.info("%s: %d rows that lack their label or are broken are left out.", where, left_out)
    if not texts:
        raise ValueError(f"A split must hold at least one labelled example, but {where} has none.")
    if len(texts) != task.sizes[split]:
        logger.warning("%s has %d examples here, but %d as published.", where, len(texts), task.sizes[split])
    return Source(where, texts, labels, names, _fingerprint(texts, labels, names), columns[:-1], columns[-1])


def _label(label: str, names: tuple[str, ...] | None, where: str) -> int | float:
    """A value, or the id of a class that is given by its name or its id; some files write ids as 0.0 and 1.0."""
    if names and label in names:
        return names.index(label)
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if names and value in range(len(names)):
        return int(value)
    if not names and math.isfinite(value):
        return value
    wanted = f"{', '.join(names)}, or 0 to {len(names) - 1}" if names else "a finite number"
    raise ValueError(f"A label must be {wanted}, but {where} holds {label!r:.40}.")


def _from_hub(hub: str, split: str, columns: tuple[str, ...]) -> Rows:
    table = _read_hub(f"{hub}:{split}", None)  # read_source refuses the blank texts of QQP
    _require(columns, table.columns, table.name)
    cells = [table.columns[column][:] for column in columns]
    if names := table.class_names.get(columns[-1]):
        cells[-1] = [names[label] if label >= 0 else label for label in cells[-1]]
    return [(*row, str(label)) for *row, label in zip(*cells, strict=True)]


def _from_files(task: Task, layout: Layout, split: str, folder: Path) -> Rows:
    """The cells of every row; None for a row that has not as many as the header."""
    path = _find(layout.file_of(split), task, split, folder.expanduser())
    text = _decoded(path)
    if path.suffix == ".csv":
        lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    else:
        lines = (line.rstrip("\r").split("\t") for line in text.split("\n"))
    try:
        rows = [line for line in lines if line not in ([], [""])]
    except csv.Error as error:
        raise ValueError(f"{path.name} is not valid CSV: {error}.") from None
    header = layout.header or tuple(column.strip() for column in (rows.pop(0) if rows else ()))
    _require(layout.columns, header, path.name)
    places = [header.index(column) for column in layout.columns]
    return [[row[i] for i in places] if len(row) == len(header) else None for row in rows]


def _find(file: str, task: Task, split: str, folder: Path) -> Path:
    folders = sorted(folder.iterdir()) if folder.is_dir() else []
    own = [inner for inner in folders if re.sub(r"[\W_]", "", inner.name).casefold() == task.name]
    for candidate in (*own, folder):
        if (candidate / file).is_file():
            return candidate / file
    raise FileNotFoundError(
        f"{task.name}:{split} needs the file {file}, but there is none in {folder} or in a folder {task.name} there."
    )


def _require(columns: Sequence[str], found: Collection[str], where: str) -> None:
    if missing := [column for column in columns if column not in found]:
        raise ValueError(f"{where} must have the column {missing[0]!r}, but it has {', '.join(map(repr, found))}.")
