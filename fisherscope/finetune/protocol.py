"""Who sees which examples: those that train, those that choose the epoch, and those that tables report.

A protocol is a function that draws the three roles from the two labelled splits of a task, and a line of
:data:`PROTOCOLS`. What papers leave open is ours, and said to be so.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import storage
from ..data import Source
from ..data.sources import LABELLED_OBJECTIVES
from ..metrics import metrics_of

logger = logging.getLogger(__name__)

FORMAT = "fisherscope.splits"

ALL = "all"
"""In the file of the lists: of every seed."""

Size = int | float | None
"""Of a training set: how many examples, a fraction of those there are, or None for all."""

Positions = Mapping[str, list[int]]
"""Of examples: by the split they are from (``train`` or ``validation``), in its order, rising."""

TRAIN, VALIDATION = "train", "validation"
BINS = 10
"""Of real labels, with as many examples in each, where a draw is by class."""


@dataclass(frozen=True)
class Roles:
    """The examples of one training on one task; no example has two roles.

    Attributes:
        train: The model learns from them.
        select: The epoch can be chosen by them; may be empty.
        report: Tables show the metrics on them; empty where there is nothing to measure on.
    """

    train: Positions
    select: Positions
    report: Positions

    @property
    def without_select(self) -> "Roles":
        """The same with nothing to choose the epoch by."""
        return replace(self, select={})


@dataclass(frozen=True)
class Splits:
    """The labelled examples of a task as a protocol sees them: a class for each.

    Attributes:
        train: Of the training split: class ids; for real labels the number of their bin, for text 0.
        validation: Of the validation split, likewise; empty if there is none.
        name: Of the training split, as that of a :class:`Source`.
    """

    train: np.ndarray
    validation: np.ndarray
    name: str = ""

    @staticmethod
    def of(train: Source, validation: Source | None, objective: str) -> "Splits":
        """Those of the sources that were read."""
        return Splits(_classes(train, objective), _classes(validation, objective), train.name)


def _classes(source: Source | None, objective: str) -> np.ndarray:
    """Class ids; real labels are put into :data:`BINS` bins between their quantiles, so that none is a class alone."""
    if source is None:
        return np.empty(0, np.int64)
    if objective not in LABELLED_OBJECTIVES or source.labels is None:
        return np.zeros(len(source.texts), np.int64)
    labels = np.asarray(source.labels)
    if objective == "classification":
        return labels.astype(np.int64)
    return np.searchsorted(np.quantile(labels, np.arange(1, BINS) / BINS), labels, side="right")


@dataclass(frozen=True)
class Protocol:
    """How examples get their roles.

    Attributes:
        name: As ``--protocol`` takes it.
        divide: From the splits, the size of the training set and a seed to the roles.
        drawn_by: What the seed is: ``subset_seed`` (the same examples in all trainings), the seed of the ``run``, or
            nothing, where all draws are ``fixed``.
        needs_validation: Whether there must be a validation split.
        evaluations: How often a training is measured, at equal steps; None is after every epoch.
    """

    name: str
    divide: Callable[[Splits, Size, int], Roles]
    drawn_by: Literal["subset_seed", "run", "fixed"] = "run"
    needs_validation: bool = True
    evaluations: int | None = None

    def roles(self, splits: Splits, size: Size, subset_seed: int, run_seed: int) -> Roles:
        """The roles in one training.

        Raises:
            ValueError: If there are too few examples for them.
        """
        if self.needs_validation and not splits.validation.size:
            raise ValueError(
                f"The protocol {self.name} reports on validation examples, but there are none; give validation_data, "
                f"or take the protocol {DEFAULT}."
            )
        roles = self.divide(splits, size, {"subset_seed": subset_seed, "run": run_seed, "fixed": 0}[self.drawn_by])
        if not roles.train:
            total = splits.train.size + splits.validation.size
            raise ValueError(f"The protocol {self.name} leaves no example of {total} to train on; give more of them.")
        return roles


def checked_size(size: Size) -> Size:
    """A size as it may be given.

    Raises:
        ValueError: If it is neither a number of examples nor a fraction.
    """
    if size is None or (isinstance(size, Integral) and size >= 1) or (isinstance(size, float) and 0 < size < 1):
        return size
    raise ValueError(f"train_size must be a number of examples, 1 or more, or a fraction between 0 and 1; got {size}.")


def count_of(size: Size, available: int) -> int:
    """How many examples a size is: of a fraction the nearest number, and at least one; never more than there are."""
    if size is None:
        return available
    wanted = max(1, round(size * available)) if isinstance(size, float) else size
    if wanted > available:
        logger.warning("There are %d training examples, %d were asked for; all are used.", available, wanted)
    return min(wanted, available)


def stratified(classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    r"""Positions drawn so that every class has its share, up to one example.

    Of the :math:`N_c` examples of a class :math:`n N_c / N` are due. Each class gets the whole part of that, and
    those with the largest remainders one more; equal remainders in random order. A class with one member is no
    exception: it is drawn or not.

    Args:
        classes: Of all examples, ``[N]``.
        count: How many to draw, n.
        seed: Of the draw.
    """
    draw = np.random.default_rng(seed)
    found, members = np.unique(classes, return_counts=True)
    due, rest = np.divmod(count * members, max(classes.size, 1))
    more = np.lexsort((draw.random(found.size), -rest))[: count - due.sum()]
    due[more] += 1
    chosen = [draw.permutation(np.flatnonzero(classes == c))[:n] for c, n in zip(found, due, strict=True)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


def balanced(classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions drawn so that every class has as many as any other, up to one; a class that runs out gives all it has.

    Args:
        classes: Of all examples, ``[N]``.
        count: How many to draw.
        seed: Of the draw.
    """
    draw = np.random.default_rng(seed)
    turn = np.empty(classes.size, np.int64)  # in which round an example is taken
    for c in np.unique(classes):
        members = np.flatnonzero(classes == c)
        turn[members] = draw.permutation(members.size)
    return np.sort(np.lexsort((draw.random(classes.size), turn))[:count])


def _drawn(available: int, *counts: int, seed: int) -> list[list[int]]:
    """Disjoint random choices, one after the other, each as large as it can be."""
    order = np.random.default_rng(seed).permutation(available)
    ends = np.cumsum(counts)
    return [sorted(order[end - count : end].tolist()) for count, end in zip(counts, ends, strict=True)]


def _whole(classes: np.ndarray) -> Positions:
    """All of the validation split."""
    return {VALIDATION: list(range(classes.size))} if classes.size else {}


def _of_train(positions: Sequence[int] | np.ndarray) -> Positions:
    """Of the training split; nothing where there is nothing."""
    return {TRAIN: [int(i) for i in positions]} if len(positions) else {}


def fixed_subset(splits: Splits, size: Size, seed: int) -> Roles:
    """Ours: a random subset trains, as many of the other training examples select, the validation split is reported.

    A smaller subset is part of a larger one. Where fewer training examples are left, these select; none select where
    all train, or where there is no validation split to report on.
    """
    available = splits.train.size
    train = count_of(size, available)
    select = min(train, available - train) if splits.validation.size else 0
    chosen, others = _drawn(available, train, select, seed=seed)
    return Roles(_of_train(chosen), _of_train(others), _whole(splits.validation))


def somayajula2024(splits: Splits, size: Size, seed: int) -> Roles:
    """Attention-guided weights mixup (Somayajula et al. 2024, arXiv 2403.12918), as its code divides the data.

    The training set is drawn without regard to classes, by the seed of the run; of the rest of the training split a
    sixth of as many examples (all of it, if less) selects; the validation split is reported. On full data the published
    code selects on the reported examples, which we do not: nothing selects there. The random generator is ours, and so
    is that the rest may be too small for a sixth, where the published code fails.
    """
    available = splits.train.size
    train = count_of(size, available)
    select = min(train // 6, available - train)
    chosen, others = _drawn(available, train, select, seed=seed)
    return Roles(_of_train(chosen), _of_train(others), _whole(splits.validation))


def sharma2024(splits: Splits, size: Size, seed: int) -> Roles:
    r"""Guided dropout (Sharma et al. 2024, arXiv 2406.14005), as its code divides the data.

    Both splits are put together and shuffled by the seed of the run. Four fifths are for training, of which a smaller
    set takes the first (a fraction r of n examples is :math:`\lfloor r n \rfloor`, at least 1); a fifth is reported. Of
    MNLI the training split alone is shuffled and trains, and the matched validation split is reported. Nothing selects.
    Scores are not comparable with those on a validation split. The random generator is ours, and so is that a size may
    be a number of examples.
    """
    if splits.name == "mnli:train":
        order = np.random.default_rng(seed).permutation(splits.train.size)
        return Roles(_of_train(np.sort(order[: _cut(size, order.size)])), {}, _whole(splits.validation))
    total = splits.train.size + splits.validation.size
    order = np.random.default_rng(seed).permutation(total)
    training = 4 * total // 5

    def positions(chosen: np.ndarray) -> Positions:
        parts = {
            TRAIN: chosen[chosen < splits.train.size],
            VALIDATION: chosen[chosen >= splits.train.size] - splits.train.size,
        }
        return {split: sorted(part.tolist()) for split, part in parts.items() if part.size}

    return Roles(positions(order[: _cut(size, training)]), {}, positions(order[training:]))


def _cut(size: Size, available: int) -> int:
    """As :func:`count_of`, but of a fraction the whole part."""
    return count_of(max(1, int(size * available)) if isinstance(size, float) else size, available)


def dps2022(splits: Splits, size: Size, seed: int) -> Roles:
    """DPS (Zhang et al. 2022, arXiv 2211.01642), as its code divides the data.

    A stratified draw by the seed of the run trains, the validation split is reported, nothing selects. The published
    code fails for real labels and for classes with one member; here real labels are drawn by tenths of their
    distribution, and the shares of small classes are rounded (:func:`stratified`). The random generator is ours.
    """
    chosen = stratified(splits.train, count_of(size, splits.train.size), seed)
    return Roles(_of_train(chosen), {}, _whole(splits.validation))


def zhang2020(splits: Splits, size: Size, seed: int) -> Roles:
    r"""Revisiting few-sample BERT fine-tuning (Zhang et al. 2021, arXiv 2006.05987), as its code divides the data.

    One half of the validation split, stratified, selects, the other is reported; the training set has as many
    examples of every class; the draws are the same for all seeds; a training is measured ten times. Of K classes the
    published code draws :math:`\lfloor n / K \rfloor` each, fewer of a class that has fewer; here the training set has
    n examples all the same, by one more of some classes, or more of those that have more. The random generator is ours,
    and so is that real labels are drawn by tenths of their distribution.
    """
    classes = splits.train
    chosen = np.arange(classes.size) if size is None else balanced(classes, count_of(size, classes.size), seed)
    half = stratified(splits.validation, splits.validation.size // 2, seed=1)
    other = np.setdiff1d(np.arange(splits.validation.size), half)
    select, report = ({VALIDATION: part.tolist()} if part.size else {} for part in (half, other))
    return Roles(_of_train(chosen), select, report)


DEFAULT = "fixed-subset"

PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(DEFAULT, fixed_subset, drawn_by="subset_seed", needs_validation=False),
        Protocol("somayajula2024", somayajula2024),
        Protocol("sharma2024", sharma2024, needs_validation=False),
        Protocol("dps2022", dps2022),
        Protocol("zhang2020", zhang2020, drawn_by="fixed", evaluations=10),
    )
}


def protocol_of(name: str, subset_seed: int) -> Protocol:
    """The protocol of this name.

    Raises:
        ValueError: If there is none, or it has no use for the seed of a subset.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"The protocol must be one of {', '.join(PROTOCOLS)}; got {name!r}.")
    protocol = PROTOCOLS[name]
    if subset_seed < 0:
        raise ValueError(f"subset_seed must be at least 0, got {subset_seed}.")
    if subset_seed != 0 and protocol.drawn_by != "subset_seed":
        by = "the seed of the run" if protocol.drawn_by == "run" else "fixed seeds"
        raise ValueError(f"The protocol {name} draws by {by}, so that subset_seed has no use; leave it out.")
    return protocol


def baselines(
    train: np.ndarray, report: np.ndarray, num_classes: int | None, *, label_entropy: bool = True
) -> dict[str, float]:
    r"""What is reached by who knows the labels of the training examples and no text.

    The metrics are those of saying the commonest class (the lowest of equals), or the mean label, of every report
    example; F1 is that of always saying 1, the best a constant can do, as it would otherwise hang on a single label.
    The loss is :math:`-\frac 1n \sum_i \log p_{y_i}` with the shares :math:`p_c` of the classes among the
    training examples, left out where a reported class is not among them; for real labels the mean squared distance
    to their mean. A metric that is better says that the text was used.

    Args:
        train: Labels of the training examples.
        report: Labels of the report examples.
        num_classes: None for a regression.
        label_entropy: Whether to add :math:`-\sum_c p_c \log p_c`, for classes.
    """
    if num_classes is None:
        mean = float(train.mean())
        return {"loss": float(np.square(report - mean).mean()), **metrics_of(np.full(report.size, mean), report, None)}
    shares = np.bincount(train, minlength=num_classes) / train.size
    said = np.full(report.size, shares.argmax())
    found = metrics_of(said, report, num_classes)
    if "f1" in found:
        found["f1"] = metrics_of(np.ones_like(said), report, num_classes)["f1"]
    if (shares[report] > 0).all():
        found = {"loss": float(-np.log(shares[report]).mean())} | found
    if label_entropy:
        known = shares[shares > 0]
        found["label_entropy"] = float(-(known * np.log(known)).sum())
    return found


def save_roles(path: Path, protocol: str, seed: int | str, roles: Mapping[str, Roles]) -> None:
    """Add the roles of a seed, or of :data:`ALL`, to a file; those of other seeds in it are kept.

    Args:
        path: The file.
        protocol: Its name.
        seed: Of the run.
        roles: Of every task.
    """
    before = _read(path)["by_seed"] if path.exists() else {}
    lists = {str(seed): {task: asdict(of_task) for task, of_task in roles.items()}}
    contents = {
        "format": FORMAT,
        "format_version": storage.FORMAT_VERSION,
        "protocol": protocol,
        "by_seed": before | lists,
    }
    with storage.atomic(path) as temporary:
        temporary.write_text(json.dumps(contents), encoding="utf-8")


def read_roles(path: str | Path, seed: int) -> dict[str, Roles]:
    """Who saw which examples in a run, for every task.

    Args:
        path: Folder of the run, or its ``splits.json``.
        seed: Of the training.

    Raises:
        FileNotFoundError: If there is no such file.
        WrongFile: If it holds something else, another version, or is damaged.
        ValueError: If the run has no such seed.
    """
    path = Path(path)
    path = path / "splits.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    by_seed = _read(path)["by_seed"]
    of_seed = by_seed.get(str(seed), by_seed.get(ALL))
    if of_seed is None:
        raise ValueError(f"{path} has the seeds {', '.join(by_seed)}; got {seed}.")
    try:
        return {task: Roles(**of_task) for task, of_task in of_seed.items()}
    except (AttributeError, TypeError) as error:
        raise storage.WrongFile(f"{path} has damaged contents; make it again.") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        contents = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise storage.WrongFile(f"{path} is not JSON or was cut short; make it again.") from error
    storage.check_header(path, FORMAT, contents.get("format"), contents.get("format_version"))
    if not isinstance(contents.get("by_seed"), dict):
        raise storage.WrongFile(f"{path} has damaged contents; make it again.")
    return contents
