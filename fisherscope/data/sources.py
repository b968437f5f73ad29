"""Where the text comes from: files, folders of the datasets library, the Hub, and the built-in documentation.

:func:`read_source` turns any of them into a :class:`Source`: texts, and labels where there are any, in the order
in which they are stored.
"""

import csv
import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..builtin import docs, tasks

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

OBJECTIVES = ("mlm", "causal-lm", "seq2seq-lm", "classification", "regression")
LABELLED_OBJECTIVES = ("classification", "regression")

DEFAULT_TEXT_COLUMNS = (("sentence1", "sentence2"), ("sentence",), ("text",))
DEFAULT_LABEL_COLUMNS = {
    "classification": ("label", "labels"),
    "regression": ("label", "labels", "similarity", "score", "sentiment"),
}


@dataclass(frozen=True, eq=False)
class Source:
    """Texts, and labels where there are any, in a fixed order.

    Attributes:
        name: As recorded in provenance: ``"builtin:docs"``, a file's base name, ``"glue/mrpc:validation"``; no path.
        texts: One or two text columns per example.
        labels: Class ids or real values, one per example; None when the objective needs none.
        label_names: Names of the classes, by id, when the labels are classes.
        fingerprint: 16 hexadecimal digits of a SHA-256 over texts and labels. That of unlabelled text in one column
            is the one that :func:`fisherscope.builtin.docs.fingerprint` defines.
        text_columns: Names of the columns the texts were read from.
        label_column: Name of the column the labels were read from.
    """

    name: str
    texts: Sequence[tuple[str, ...]]
    labels: Sequence[int] | Sequence[float] | None
    label_names: tuple[str, ...] | None
    fingerprint: str
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None

    def __repr__(self) -> str:
        return f"Source({self.name}, {len(self.texts)} examples, {self.num_labels or 'no'} classes)"

    @property
    def num_labels(self) -> int | None:
        """Number of classes; None without class labels."""
        return None if self.label_names is None else len(self.label_names)


def read_source(
    data: str | Path,
    *,
    objective: str,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    revision: str | None = None,
) -> Source:
    """Read texts, and for classification and regression their labels.

    Args:
        data: One of the following.

            - ``builtin:docs`` (the held-out part) or ``builtin:docs/train``; in the same way the labelled tasks
              ``builtin:acceptability``, ``builtin:pairs``, ``builtin:similarity`` and ``builtin:topic``.
            - A file. ``.txt``: paragraphs between blank lines, or without any blank line one example per line.
              ``.tsv``: tab separated with a header, quoting off. ``.csv``: quoting on, and tab separated if the
              header holds tabs and no comma. ``.json`` and ``.jsonl``: a list of objects, or one object per line.
              ``.parquet``.
            - A folder made by ``save_to_disk``; one split of a ``DatasetDict`` is ``folder:split``.
            - A data set of the Hub, ``name[/config][@revision][:split]``, split ``train`` by default. Two
              components are tried as ``owner/name`` first and, if the Hub has no such data set, as
              ``name/config``; three are ``owner/name/config``.
        objective: One of :data:`OBJECTIVES`; decides whether labels are read.
        text_columns: One or two column names; by default ``sentence1`` and ``sentence2``, else ``sentence``, else
            ``text``.
        label_column: By default ``label``, else ``labels``, else for regression ``similarity``, ``score`` or
            ``sentiment``.
        revision: Of a Hub data set whose name does not give one.

    Returns:
        All examples, in stored order. Language-model objectives skip rows with a blank text; messages count rows from
        1 after the header.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        ValueError: If the objective is unknown, the data cannot be read, a column is missing, or a row lacks
            its text or label.
    """
    check_objective(objective)
    table = _read_table(data, revision)
    if not table.columns:
        raise ValueError(f"Data must hold at least one example, but {table.name} is empty.")
    columns = _text_columns(table, text_columns)
    texts = _texts(table, columns, skip_blank=objective not in LABELLED_OBJECTIVES)
    if not texts:
        raise ValueError(f"Data must hold at least one example, but column {columns[0]!r} of {table.name} is empty.")
    labels, names, column = None, None, None
    if objective in LABELLED_OBJECTIVES:
        column = _label_column(table, label_column, objective)
        labels, names = _classes(table, column) if objective == "classification" else (_values(table, column), None)
    return Source(table.name, texts, labels, names, _fingerprint(texts, labels, names), columns, column)


def with_class_order(source: Source, names: Sequence[str]) -> Source:
    """The same source with classes numbered as a model numbers them.

    Args:
        source: With named classes.
        names: The model's class names, by id; compared without regard to case. Placeholders (``LABEL_0``) say nothing,
            and the source is returned as it is.

    Raises:
        ValueError: If the source has a class that the model does not name.
    """
    numbers = {name.casefold(): i for i, name in enumerate(names)}
    own = source.label_names or ()
    if source.labels is None or all(re.fullmatch(r"label_\d+", name) for name in numbers):
        return source
    if all(_INTEGER.fullmatch(name) for name in own) and not set(own) <= set(numbers):
        return source  # ids without names: taken as they are
    if missing := [name for name in own if name.casefold() not in numbers]:
        raise ValueError(
            f"{source.name} has the classes {_listed(own)}, but the model's head has {_listed(names)}: "
            f"{missing[0]!r} is not among them; rename the classes, or write them as the model's numbers."
        )
    labels = [numbers[own[int(label)].casefold()] for label in source.labels]
    return replace(
        source,
        labels=labels,
        label_names=tuple(names),
        fingerprint=_fingerprint(source.texts, labels, tuple(names)),
    )


def _listed(names: Sequence[str], shown: int = 10) -> str:
    """The first names, and how many others there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def check_objective(objective: str) -> None:
    """Raise a ValueError that lists the objectives unless this is one of them."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}.")


def _fingerprint(
    texts: Sequence[tuple[str, ...]], labels: Sequence[int | float] | None, label_names: tuple[str, ...] | None
) -> str:
    digest = hashlib.sha256()
    for row in texts:
        for text in row:
            digest.update(text.encode() + b"\0")
    if labels is not None or len(texts[0]) > 1:  # plain text hashes as builtin.docs has it
        digest.update(json.dumps([len(texts[0]), labels, label_names]).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class _Table:
    """Named columns of equal length, and the class names of those that are declared as classes."""

    name: str
    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def require(self, column: str, flag: str) -> None:
        if column not in self.columns:
            raise ValueError(f"{self.name} has no column {column!r}; it has {self.listing}; {self.remedy(flag)}.")

    @property
    def listing(self) -> str:
        return ", ".join(map(repr, self.columns))

    def remedy(self, flag: str) -> str:
        """What to do about a column that is missing."""
        if len(self.columns) == 1 and ";" in self.listing:
            return "it looks separated by ';', write it with commas"
        return f"choose with {flag}"

    def cell(self, column: str, row: int) -> str:
        return f"row {row}, column {column!r} of {self.name}"


def _text_columns(table: _Table, chosen: Sequence[str] | None) -> tuple[str, ...]:
    if chosen is None:
        for candidate in DEFAULT_TEXT_COLUMNS:
            if set(candidate) <= set(table.columns):
                return candidate
        raise ValueError(
            f"{table.name} has no column sentence1 with sentence2, sentence or text; it has {table.listing}; "
            f"{table.remedy('--text-columns')}."
        )
    columns = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    if len(columns) not in (1, 2):
        raise ValueError(f"--text-columns takes one or two columns, got {len(columns)}.")
    for column in columns:
        table.require(column, "--text-columns")
    return columns


def _texts(table: _Table, columns: tuple[str, ...], *, skip_blank: bool) -> list[tuple[str, ...]]:
    rows = list(zip(*(table.columns[column][:] for column in columns), strict=True))
    kept = []
    for number, row in enumerate(rows, 1):
        for column, text in zip(columns, row, strict=True):
            if not isinstance(text, str | None):
                raise ValueError(f"A text must be a string, but {table.cell(column, number)} holds {text!r:.40}.")
            if _is_missing(text) and not skip_blank:
                raise ValueError(f"Every example needs a text, but {table.cell(column, number)} has none.")
        if not any(map(_is_missing, row)):
            kept.append(row)
    if blank := kept and len(rows) - len(kept):
        what = "row with a blank text is" if blank == 1 else "rows with a blank text are"
        logger.info("%s: %d %s skipped.", table.name, blank, what)
    return kept


def _label_column(table: _Table, chosen: str | None, objective: str) -> str:
    if chosen is not None:
        table.require(chosen, "--label-column")
        return chosen
    defaults = DEFAULT_LABEL_COLUMNS[objective]
    for column in defaults:
        if column in table.columns:
            return column
    raise ValueError(
        f"{objective} needs labels, but {table.name} has no column {' or '.join(defaults)}; it has {table.listing}; "
        f"{table.remedy('--label-column')}."
    )


_INTEGER = re.compile(r"[+-]?[0-9]+")


def _labels(table: _Table, column: str) -> list[Any]:
    labels = [label.strip() if isinstance(label, str) else label for label in table.columns[column][:]]
    for number, label in enumerate(labels, 1):
        if _is_missing(label):
            raise ValueError(f"Every example needs a label, but {table.cell(column, number)} has none.")
        if not isinstance(label, str | int | float):
            raise ValueError(
                f"A label must be a name or a number, but {table.cell(column, number)} holds {label!r:.40}."
            )
    return labels


def _classes(table: _Table, column: str) -> tuple[list[int], tuple[str, ...]]:
    """Class ids and class names; ids are taken as they are, names are numbered in sorted order."""
    labels = _labels(table, column)
    where = f"column {column!r} of {table.name}"
    if all(isinstance(label, int) or _INTEGER.fullmatch(str(label)) for label in labels):
        ids = list(map(int, labels))
        if -1 in ids:
            raise _unlabelled(where)
        return ids, table.class_names.get(column) or _class_ids_as_names(ids, where)
    if all(map(_is_number, labels)):
        raise ValueError(
            f"Classes are integers or names, but {where} holds numbers such as {labels[0]}; "
            "write them as integers, or use regression."
        )
    names = tuple(sorted(set(map(str, labels))))
    number = {name: i for i, name in enumerate(names)}
    return [number[str(label)] for label in labels], names


def _class_ids_as_names(ids: Sequence[int], where: str) -> tuple[str, ...]:
    found = sorted(set(ids))
    if found != list(range(len(found))):
        listing = ", ".join(map(str, found[:8])) + (", …" if len(found) > 8 else "")
        raise ValueError(
            f"Integer labels must be 0 to C-1 for C classes, each of them present, but {where} holds {listing}; "
            "renumber them, or write the classes as names."
        )
    return tuple(map(str, found))


def _values(table: _Table, column: str) -> list[float]:
    labels = _labels(table, column)
    for number, label in enumerate(labels, 1):
        if not _is_number(label):
            raise ValueError(f"regression needs finite numbers, but {table.cell(column, number)} holds {label!r:.40}.")
    values = list(map(float, labels))
    if set(values) == {-1.0}:
        raise _unlabelled(f"column {column!r} of {table.name}")
    return values


def _unlabelled(where: str) -> ValueError:
    return ValueError(
        f"A label of -1 marks an unlabelled example, as in the test sets of GLUE, and {where} holds it; "
        "use a labelled split."
    )


def _is_number(label: str | int | float) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _is_missing(cell: object) -> bool:
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())


def _read_table(data: str | Path, revision: str | None) -> _Table:
    if str(data).startswith("builtin:"):
        return _read_builtin(str(data))
    path, split = _local(data)
    if path is None:
        return _read_hub(str(data), revision)
    if path.is_dir():
        return _read_folder(path, split)
    if split is not None:
        raise ValueError(f"{path.name} is a file and has no splits; leave out ':{split}'.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"The name of a data file must end in {', '.join(_READERS)}; got {path.name}.")
    return reader(path)


def _local(data: str | Path) -> tuple[Path | None, str | None]:
    """The file or folder that is meant, and the split asked for; no path when it is a name of the Hub."""
    path = Path(data).expanduser()
    if path.exists():
        return path, None
    stem, colon, split = str(data).rpartition(":")
    if colon and (folder := Path(stem).expanduser()).exists():
        return folder, split
    looks_local = isinstance(data, Path) or data.startswith((".", "/", "~"))
    if looks_local or path.suffix.lower() in _READERS or Path(stem).suffix.lower() in _READERS:
        raise FileNotFoundError(f"There is no file or folder {data}; give one, a Hub name or builtin:docs.")
    return None, None


def _read_builtin(data: str) -> _Table:
    name, slash, split = data.removeprefix("builtin:").partition("/")
    part: docs.Part = "train" if slash else "held-out"
    if name not in ("docs", *tasks.TASKS) or split not in ("", "train") or data.endswith("/"):
        known = ", ".join(f"builtin:{known}" for known in ("docs", *tasks.TASKS))
        raise ValueError(f"Built-in data is {known} (the held-out part), or one of them and /train; got {data!r}.")
    if name == "docs":
        return _Table(data, {"text": [passage.text for passage in docs.passages(part)]})
    class_names = tasks.class_names(name)
    return _Table(data, tasks.table(name, part), {"label": class_names} if class_names else {})


# Text formats are read with the standard library rather than the builders of datasets: those guess types ("001"
# becomes 1, "NA" becomes missing), unquote what GLUE never quoted, and leave a converted copy in a cache.
def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} must be UTF-8, but the byte at offset {error.start} (0x{raw[error.start]:02x}) is not; "
            "convert it, for example with iconv."
        ) from None


def _read_txt(path: Path) -> _Table:
    text = re.sub(r"\r\n?", "\n", _decoded(path)).strip()
    paragraphs = re.split(r"\n\s*\n", text)
    if len(paragraphs) == 1:
        paragraphs = text.split("\n")
    return _Table(path.name, {"text": [" ".join(map(str.strip, p.split("\n"))) for p in paragraphs]})


def _read_tsv(path: Path) -> _Table:
    return _with_header(path.name, (line.rstrip("\r").split("\t") for line in _decoded(path).split("\n")))


def _read_csv(path: Path) -> _Table:
    text = _decoded(path)
    header = text.partition("\n")[0]
    delimiter = "\t" if "\t" in header and "," not in header else ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(max(len(text), 1))  # the default refuses documents of more than 128 KiB
    try:
        return _with_header(path.name, rows)
    except csv.Error as error:
        raise ValueError(f"{path.name} is not valid CSV up to line {rows.line_num}: {error}.") from None
    finally:
        csv.field_size_limit(limit)


def _with_header(name: str, lines: Iterable[list[str]]) -> _Table:
    header, *rows = [line for line in lines if line not in ([], [""])] or [[]]
    header = [column.strip() for column in header]
    repeated = [column for column in header if column and header.count(column) > 1]
    if repeated:
        raise ValueError(f"Columns must have different names, but the header of {name} repeats {repeated[0]!r}.")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ValueError(f"The header of {name} names {len(header)} columns, but row {number} has {len(row)}.")
    return _Table(name, {column: [row[i] for row in rows] for i, column in enumerate(header)})


def _read_json(path: Path) -> _Table:
    text = _decoded(path)
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [_parsed(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    except json.JSONDecodeError as error:
        where = f"{error.msg}: line {error.lineno} column {error.colno}"
        raise ValueError(f"{path.name} must hold a list of objects, or one object per line: {where}.") from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"{path.name} must hold one object per example, but row {number} is {record!r:.40}.")
    names = dict.fromkeys(name for record in records for name in record)
    return _Table(path.name, {name: [record.get(name) for record in records] for name in names})


def _parsed(line: str, number: int) -> Any:
    """The value of one line of a file; errors tell its number in the file."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(error.msg, "\n" * (number - 1) + line, number - 1 + error.pos) from None


def _read_parquet(path: Path) -> _Table:
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path.name} is not a readable Parquet file: {error}") from None
    return _from_dataset(path.name, Dataset(InMemoryTable(table)))


_READERS: dict[str, Callable[[Path], _Table]] = {
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


def _read_folder(folder: Path, split: str | None) -> _Table:
    name = folder.resolve().name
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split is None and len(splits) == 1:
            split = str(splits[0])
        if split is None or split not in splits:
            raise ValueError(f"{name} holds the splits {', '.join(splits)}; choose one as {name}:{splits[0]}.")
        folder, name = folder / split, f"{name}:{split}"
    elif split is not None:
        raise ValueError(f"The folder {name} has no splits; leave out ':{split}'.")
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"A data folder must be made by save_to_disk of the datasets library, but {name} holds no state.json; "
            "give one of its files instead."
        )
    from datasets import Dataset

    return _from_dataset(name, Dataset.load_from_disk(folder))


_HUB_NAME = re.compile(r"(?P<path>[^/@:]+(?:/[^/@:]+){0,2})(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?")


def _read_hub(data: str, revision: str | None) -> _Table:
    match = _HUB_NAME.fullmatch(data)
    if match is None:
        raise ValueError(f"Data is a file, a folder, or a Hub name such as name/config@revision:split; got {data!r}.")
    revision, split = match["revision"] or revision, match["split"] or "train"
    dataset = _ask_hub(data, match["path"].split("/"), split, revision)
    at = f"@{revision}" if revision else ""
    return _from_dataset(f"{match['path']}{at}:{split}", dataset)


def _ask_hub(data: str, path: list[str], split: str, revision: str | None) -> "datasets.Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    candidates = [("/".join(path[:2]), *path[2:])]
    if len(path) == 2:
        candidates.append((path[0], path[1]))
    failures = []
    for repository, *config in candidates:
        if Path(repository).exists():  # load_dataset would silently take the local files instead
            raise ValueError(
                f"{data!r} could mean the Hub or the local {repository!r}; rename that, or write ./{repository}."
            )
        try:
            return load_dataset(repository, *config, split=split, revision=revision)
        except (FileNotFoundError, ConnectionError) as error:  # ConnectionError also where offline and not in the cache
            failures.append(" ".join(str(error).split()))
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise ValueError(f"{data!r} cannot be read from the Hub: {' '.join(str(error).split())}") from error
    raise FileNotFoundError(f"{data!r} is neither a file here nor a data set of the Hub: {'; '.join(failures)}")


def _from_dataset(name: str, dataset: "datasets.Dataset") -> _Table:
    from datasets import ClassLabel

    dataset = dataset.with_format(None)
    classes = {column: feature.names for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
    return _Table(
        name,
        {column: dataset[column] for column in dataset.column_names},
        {column: tuple(names or ()) for column, names in classes.items()},
    )
