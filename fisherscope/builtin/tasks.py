"""Small labelled tasks made from the documentation inside the Python standard library.

Every task is computed from :func:`fisherscope.builtin.docs.passages`, so it needs no file and no network. What the
built-in models were pretrained on is the training part, and the held-out modules are the validation part.

- ``acceptability``: is this a sentence of the documentation, or one in which neighbouring words changed places? Both
  kinds hold the same words.
- ``pairs``: does the second sentence follow the first one in its passage? One that does not follows another sentence,
  in some cases of the same module, and each follows somewhere, so that neither sentence alone tells.
- ``similarity``: how much of a sentence survived when words were dropped, replaced by those of another sentence and,
  in some, the two ends changed places; see :func:`similarity`.
- ``topic``: which area of the standard library a passage documents; see :data:`AREAS`.

A passage gives at most one example to a task, and what is drawn for it depends on the task and its text alone. Only
the partner that an example takes its words or its second sentence from can change when a passage is added, and it does
for one or two examples.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from . import docs

# How hard the tasks are. Fine-tuning builtin:bert on 1,000 examples for three epochs learns acceptability, similarity
# and topic in part; pairs needs words to be compared across sentences, and that little training leaves it at chance.
SWAPS = 2
SAME_MODULE = 0.25
REORDERED = 0.3

WORDS_PER_SENTENCE = range(6, 31)
WORDS_PER_PAIRED_SENTENCE = range(8, 41)

AREAS = {
    "concurrency": "_threading_local asyncio concurrent contextvars multiprocessing queue sched selectors signal "
    "subprocess threading",
    "development": "annotationlib ast bdb cProfile code codeop compileall dis doctest importlib inspect linecache "
    "modulefinder pdb pickletools pkgutil profile pstats py_compile pyclbr pydoc runpy symtable tabnanny timeit token "
    "tokenize trace traceback tracemalloc unittest venv warnings zipimport",
    "files": "_pyio bz2 compression dbm filecmp fileinput fnmatch genericpath glob gzip io lzma mimetypes ntpath "
    "nturl2path os pathlib posixpath shelve shutil stat tarfile tempfile zipapp zipfile",
    "formats": "base64 codecs configparser copyreg csv difflib encodings html json pickle plistlib pprint quopri re "
    "string stringprep textwrap tomllib xml",
    "language": "topics",
    "network": "email ftplib http imaplib ipaddress mailbox netrc poplib smtplib socket socketserver ssl urllib "
    "webbrowser wsgiref xmlrpc",
}
"""Classes of ``topic``: the top-level modules of each area; ``topics`` is the language reference."""

Row = tuple[str | int | float, ...]


class _Task(NamedTuple):
    columns: tuple[str, ...]
    class_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    rows: Callable[[Iterable[docs.Passage]], Iterator[Row]]


def table(task: str, part: docs.Part = "held-out") -> dict[str, list]:
    """The examples of one task as columns, in an order that mixes modules and classes.

    Args:
        task: One of :data:`TASKS`.
        part: ``"train"`` or ``"held-out"``, by module as in :func:`fisherscope.builtin.docs.passages`.

    Returns:
        ``sentence1`` and ``sentence2``, ``sentence`` or ``text``, and ``label``: class ids, or values from 0 to 5 for
        ``similarity``. About 2,400 to 3,300 training and 500 to 800 held-out examples.

    Raises:
        FileNotFoundError: If this Python comes without the sources of its standard library.
        ValueError: If there is no such task or part.
    """
    made = _task(task)
    in_order = sorted(made.rows(docs.passages(part)), key=lambda row: _digest(task, str(row[0])))
    return {column: list(values) for column, values in zip(made.columns, zip(*in_order, strict=True), strict=True)}


def class_names(task: str) -> tuple[str, ...] | None:
    """Names of a task's classes, by id; None for ``similarity``, whose labels are numbers."""
    return _task(task).class_names


def similarity(sentence: str, edited: str) -> float:
    """Share of words that two sentences have in common in the same order, from 0 to 5.

    5 * 2L / (n + m) for sentences of n and m words (between blanks) with a longest common subsequence of L words.
    """
    first, second = sentence.split(), edited.split()
    longest = [0] * (len(second) + 1)  # with the words of the first sentence so far, for every prefix of the second
    for word in first:
        above = longest.copy()
        for j, other in enumerate(second):
            longest[j + 1] = above[j] + 1 if word == other else max(above[j + 1], longest[j])
    return 10 * longest[-1] / (len(first) + len(second))


def _task(name: str) -> _Task:
    if name not in TASKS:
        raise ValueError(f"A built-in task is one of {', '.join(TASKS)}; got {name!r}.")
    return TASKS[name]


def _digest(task: str, text: str) -> int:
    return int(hashlib.sha256(f"{task}\0{text}".encode()).hexdigest(), 16)


def _generator(task: str, text: str) -> np.random.Generator:
    return np.random.default_rng(_digest(task, text))


def _sentences(passage: docs.Passage) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", passage.text)


_PLAIN_WORD = re.compile(r"[a-z]+")


def _swappable(words: list[str]) -> list[int]:
    """Positions whose word can change places with the next one without moving a capital or punctuation mark."""
    plain = [_PLAIN_WORD.fullmatch(word) is not None for word in words]
    return [i for i in range(len(words) - 1) if plain[i] and plain[i + 1] and words[i] != words[i + 1]]


def _acceptability(passages: Iterable[docs.Passage]) -> Iterator[Row]:
    for passage in passages:
        candidates = [s for s in _sentences(passage) if len(s.split()) in WORDS_PER_SENTENCE]
        candidates = [s for s in candidates if len(_swappable(s.split())) >= SWAPS]
        if not candidates:
            continue
        generator = _generator("acceptability", passage.text)
        sentence = candidates[generator.integers(len(candidates))]
        acceptable = int(generator.random() < 0.5)
        words = sentence.split()
        if not acceptable:
            for i in sorted(generator.choice(_swappable(words), SWAPS, replace=False)):
                words[i], words[i + 1] = words[i + 1], words[i]
        yield " ".join(words), acceptable


def _pairs(passages: Iterable[docs.Passage]) -> Iterator[Row]:
    strangers: dict[str, list[tuple[str, str]]] = {"": []}  # by module; under "" those that may meet any module
    for passage in passages:
        sentences = [s if len(s.split()) in WORDS_PER_PAIRED_SENTENCE else None for s in _sentences(passage)]
        candidates = [(a, b) for a, b in pairwise(sentences) if a and b]
        if not candidates:
            continue
        generator = _generator("pairs", passage.text)
        pair = candidates[generator.integers(len(candidates))]
        if generator.random() < 0.5:
            yield *pair, 1
        else:
            module = passage.source if generator.random() < SAME_MODULE else ""
            strangers.setdefault(module, []).append(pair)
    for module in [module for module, group in strangers.items() if len(group) == 1]:
        strangers[""] += strangers.pop(module)
    for group in strangers.values():
        group.sort(key=lambda pair: _digest("pairs", pair[0]))
        for (first, _), (_, second) in zip(group, group[1:] + group[:1], strict=True):
            yield first, second, 0


def _similarity(passages: Iterable[docs.Passage]) -> Iterator[Row]:
    chosen = []
    for passage in passages:
        if candidates := [s for s in _sentences(passage) if len(s.split()) in WORDS_PER_SENTENCE]:
            chosen.append(candidates[_generator("similarity", passage.text).integers(len(candidates))])
    chosen.sort(key=lambda sentence: _digest("similarity", sentence))
    for sentence, donor in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        edited = _edited(sentence.split(), donor.split(), _generator("similarity", sentence))
        yield sentence, " ".join(edited), similarity(sentence, " ".join(edited))


def _edited(words: list[str], donor: list[str], generator: np.random.Generator) -> list[str]:
    """Words of a sentence, some dropped, some replaced by the donor's; in some cases with the ends interchanged."""
    kept = generator.random()
    edited = []
    for i, word in enumerate(words):
        if generator.random() < kept:
            edited.append(word)
        elif generator.random() < 0.5:
            edited.append(donor[i % len(donor)])
    edited = edited or donor
    cut = int(generator.integers(len(edited))) if generator.random() < REORDERED else 0
    return edited[cut:] + edited[:cut]


def _topic(passages: Iterable[docs.Passage]) -> Iterator[Row]:
    area_of = {module: i for i, area in enumerate(sorted(AREAS)) for module in AREAS[area].split()}
    for passage in passages:
        area = area_of.get(passage.source.partition(".")[0])
        if area is not None:
            yield passage.text, area


TASKS = {
    "acceptability": _Task(
        ("sentence", "label"), ("unacceptable", "acceptable"), ("matthews", "accuracy"), _acceptability
    ),
    "pairs": _Task(("sentence1", "sentence2", "label"), ("unrelated", "consecutive"), ("f1", "accuracy"), _pairs),
    "similarity": _Task(("sentence1", "sentence2", "label"), None, ("pearson", "spearman"), _similarity),
    "topic": _Task(("text", "label"), tuple(sorted(AREAS)), ("accuracy",), _topic),
}
"""The tasks by name: columns, of which the last is the label, class names, metrics, and what makes the examples."""
