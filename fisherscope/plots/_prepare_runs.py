"""Runs of fine-tuning as boxes over seeds, lines over training sizes, mean ranks, learning curves and costs."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from .._typing import Bool, Float
from ._prepare import LOSS_LABELS, as_sequence

if TYPE_CHECKING:
    from ..experiments.arms import Arm, Group
    from ..experiments.comparison import Comparison, Row
    from ..finetune.results import SeedResult, Which

CONFIDENCE = 0.95
LEVEL = 0.05
"""Of the critical difference."""

JITTER = 0.26
"""How far dots stand from the middle of a row of boxes, in rows."""

BEYOND = 4
"""How far axes reach beyond the runs that did not fail to hold those that did: lengths of their range, but at least 1,
within which most shares and correlations are."""

FEW = 12
"""Points of a learning curve up to which each is marked."""

STYLES = 210
"""How many lines look different: 7 colours, 6 markers and 5 kinds of dashes, cycled together."""

METRIC_LABELS = {
    "accuracy": "accuracy (share of examples)",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}


@dataclass(frozen=True, eq=False)
class BoxRow:
    """The trainings of one arm.

    Attributes:
        values: Those that have a number, by rising seed.
        seeds: Of the values.
        failed: Which of the values are of trainings that failed.
        failures: How many failed, those without a number too.
        runs: All trainings.
        quartiles: Of the values, numpy's percentiles 25, 50 and 75; NaN without values.
        whiskers: The lowest and highest value no farther from the box than 1.5 times its length.
    """

    values: Float[np.ndarray, "runs"]
    seeds: tuple[int, ...]
    failed: Bool[np.ndarray, "runs"]
    failures: int
    runs: int
    quartiles: tuple[float, float, float]
    whiskers: tuple[float, float]

    @property
    def offsets(self) -> Float[np.ndarray, "runs"]:
        """How far the dots stand from the middle of the row, so that none covers another."""
        count = len(self.seeds)
        return np.linspace(-JITTER, JITTER, count) if count > 1 else np.zeros(count)


@dataclass(frozen=True, eq=False)
class BoxPanel:
    """One task: a row for every arm of the figure, None where it was not run, and the median of the reference."""

    title: str
    label: str
    rows: tuple[BoxRow | None, ...]
    reference: float


@dataclass(frozen=True, eq=False)
class Boxes:
    """Tasks side by side, with the same arms in the same rows, the reference first."""

    names: tuple[str, ...]
    panels: tuple[BoxPanel, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class SizeLine:
    """Means of one arm by training size, and the ends of their intervals, NaN where there is one number only."""

    name: str
    x: Float[np.ndarray, "sizes"]
    mean: Float[np.ndarray, "sizes"]
    low: Float[np.ndarray, "sizes"]
    high: Float[np.ndarray, "sizes"]


@dataclass(frozen=True, eq=False)
class SizePanel:
    """One task of one model."""

    title: str
    label: str
    lines: tuple[SizeLine, ...]


@dataclass(frozen=True, eq=False)
class Sizes:
    """Tasks by training size; names are those of all lines, the reference first."""

    names: tuple[str, ...]
    panels: tuple[SizePanel, ...]
    ticks: tuple[float, ...]
    x_label: str
    notes: tuple[str, ...]

    @property
    def limits(self) -> tuple[float, float]:
        """Where the axes of all panels begin and end."""
        return self.ticks[0] / 1.2, self.ticks[-1] * 1.2


@dataclass(frozen=True, eq=False)
class Ranks:
    """Mean ranks, the best first.

    Attributes:
        names: Of the arms.
        means: Of their ranks; 1 is best.
        critical: The difference of mean ranks that is significant.
        alike: First and last position of every group of arms that do not differ, none inside another.
        notes: What must be said below the figure.
    """

    names: tuple[str, ...]
    means: Float[np.ndarray, "arms"]
    critical: float
    alike: tuple[tuple[int, int], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Course:
    """One quantity of one arm over the epochs.

    Attributes:
        x: Epochs.
        seeds: A row for every training; NaN where it has no finite number.
        failed: Which of them failed.
        mean: Over the trainings; NaN where one of them has no number.
    """

    x: Float[np.ndarray, "moments"]
    seeds: Float[np.ndarray, "runs moments"]
    failed: Bool[np.ndarray, "runs"]
    mean: Float[np.ndarray, "moments"]

    @property
    def has_markers(self) -> bool:
        """Whether there are few enough points to show each."""
        return self.x.size <= FEW


@dataclass(frozen=True, eq=False)
class Learning:
    """One task: for every arm, the reference first, the training loss and a metric.

    Attributes:
        title: Of the task.
        names: Of the arms.
        courses: Of the loss, and of the metric; in both one for each arm.
        labels: Of the two quantities.
        levels: What the labels alone give of the two; None where it is not known.
    """

    title: str
    names: tuple[str, ...]
    courses: tuple[tuple[Course, ...], tuple[Course, ...]]
    labels: tuple[str, str]
    levels: tuple[float | None, float | None]

    def limits(self, quantity: int) -> tuple[float, float]:
        """The range of all trainings and of the level, one for all arms.

        Of failed trainings that go far beyond the others, only what is within :data:`BEYOND`.
        """
        courses, level = self.courses[quantity], self.levels[quantity]
        everything, good = (
            values[np.isfinite(values)]
            for values in (
                np.concatenate([course.seeds.ravel() for course in courses]),
                np.concatenate([course.seeds[~course.failed].ravel() for course in courses]),
            )
        )
        known = np.append(good if good.size else everything, [] if level is None else [level])
        if not known.size:
            return 0.0, 1.0
        reach = max(BEYOND * float(np.ptp(known)), 1.0)
        near = everything[(everything >= known.min() - reach) & (everything <= known.max() + reach)]
        low, high = (float(end(np.append(known, near))) for end in (np.min, np.max))
        margin = 0.05 * (high - low or 1.0)
        return low - margin, high + margin

    @property
    def is_cut(self) -> bool:
        """Whether some trainings go beyond the limits."""
        limits = [self.limits(quantity) for quantity in range(2)]
        return any(
            bool(((course.seeds < low) | (course.seeds > high)).any())
            for (low, high), courses in zip(limits, self.courses, strict=True)
            for course in courses
        )

    def epochs(self, number: int) -> float:
        """Where the horizontal axes of one arm end."""
        return max((float(courses[number].x[-1]) for courses in self.courses if courses[number].x.size), default=1.0)


@dataclass(frozen=True, eq=False)
class LearningCurves:
    """Tasks below each other, and what must be said of them."""

    tasks: tuple[Learning, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class CostPanel:
    """One task: seconds of a step by the reference's, and gibibytes; NaN where there is no number."""

    title: str
    names: tuple[str, ...]
    times: Float[np.ndarray, "arms"]
    memory: Float[np.ndarray, "arms"]


@dataclass(frozen=True, eq=False)
class Costs:
    """Tasks below each other, the reference first in each."""

    panels: tuple[CostPanel, ...]
    time_label: str
    notes: tuple[str, ...]


def boxes(runs: "Sequence[Arm]", reference: str, metric: str | None, which: "Which | None") -> Boxes:
    """Every training of every arm by task, model and training size.

    Raises:
        TypeError: If something else than runs was given.
        ValueError: If they cannot be compared.
    """
    given = _arms(runs, "run_boxes")
    comparison, groups = _compared(given, reference, metric, which)
    names = _names(groups, reference)
    panels = []
    for rows, title in zip(groups.values(), _titles(list(groups)), strict=True):
        arms = {row.arm: _arm(given, row) for row in rows}
        shown = {name: _box_row(arm, rows[0].metric, comparison.which) for name, arm in arms.items()}
        panels.append(
            BoxPanel(
                title,
                _metric_label(rows[0].metric, arms[reference]),
                tuple(shown.get(name) for name in names),
                shown[reference].quartiles[1],
            )
        )
    failed = any(row is not None and row.failures for panel in panels for row in panel.rows)
    notes = [
        "Dots: all runs, by seed; box: median and quartiles; whiskers: to the farthest run within 1.5 lengths of the "
        f"box; dashed: median of {reference}.",
        *(["Crosses: failed runs, in the box with all others if they have a number."] if failed else []),
    ]
    return Boxes(names, tuple(panels), (*notes, _epoch_note(comparison), *_common(list(groups))))


def sizes(runs: "Sequence[Arm]", reference: str, metric: str | None, which: "Which | None") -> Sizes:
    """Means over seeds by the number of training examples, or by their share.

    Raises:
        TypeError: If something else than runs was given.
        ValueError: If they cannot be compared, there is one size only, there are numbers and shares, or more arms than
            :data:`STYLES`.
    """
    given = _arms(runs, "run_sizes")
    comparison, groups = _compared(given, reference, metric, which)
    x_of = _places_of_sizes(list(groups))
    placed = {group: rows for group, rows in groups.items() if group.train_size in x_of}
    by_task: dict[tuple[str, str], list[Row]] = {}
    for group, rows in placed.items():
        by_task.setdefault((group.model, group.task), []).extend(rows)
    if max((len({row.group for row in rows}) for rows in by_task.values()), default=0) < 2:
        shown = ", ".join(dict.fromkeys(group.size for group in groups))
        raise ValueError(
            f"A figure of sizes needs runs of at least two training sizes of one task, got {shown}; run the others, or "
            "draw these as boxes."
        )
    everyone = _names(groups, reference)
    names = _with_lines(everyone, reference, placed)
    models = {model for model, _ in by_task}
    panels = []
    for (model, task), rows in by_task.items():
        title = task if len(models) == 1 else f"{task}, {model}"
        lines = (_size_line(name, rows, x_of) for name in names)
        label = _metric_label(rows[0].metric, _arm(given, rows[0]))
        panels.append(SizePanel(title, label, tuple(line for line in lines if len(line.x))))
    unplaced = len(placed) < len(groups)
    without = [name for name in everyone if name not in names]
    notes = [
        "Lines: mean over seeds; bars: 95 % t interval of that mean.",
        _epoch_note(comparison),
        *(["Without the runs on all training examples, as they do not say how many these are."] if unplaced else []),
        *([f"Without {', '.join(without)}: one size only."] if without else []),
        *([f"Model: {name}." for name in models] if len(models) == 1 else []),
        *(["Lines are moved sideways, by 8 % at most, so that bars cover each other less."] if len(names) > 1 else []),
    ]
    ticks = tuple(sorted({x_of[group.train_size] for group in placed}))
    x_label = "share of the training examples" if None in x_of else "training examples"
    return Sizes(names, tuple(panels), ticks, x_label, tuple(notes))


def _places_of_sizes(groups: "Sequence[Group]") -> dict[int | float | None, float]:
    """Where every training size stands on the axis; all examples (None) are at 1 among shares, and nowhere else."""
    found = {group.train_size for group in groups if group.train_size is not None}
    are_shares = {size < 1 for size in found}
    if len(are_shares) > 1:
        raise ValueError(
            "A figure of sizes needs training sizes of one kind, got numbers of examples and shares of all "
            f"({', '.join(f'{size:g}' for size in sorted(found))}); draw them in separate figures."
        )
    places: dict[int | float | None, float] = {size: float(size) for size in found}
    return {**places, None: 1.0} if are_shares == {True} else places


def _with_lines(names: Sequence[str], reference: str, groups: "Mapping[Group, Sequence[Row]]") -> tuple[str, ...]:
    """The reference, and the arms that have several training sizes."""
    number = Counter(
        name for name, _ in {(row.arm, group.train_size) for group, rows in groups.items() for row in rows}
    )
    kept = tuple(name for name in names if name == reference or number[name] > 1)
    if len(kept) > STYLES:
        raise ValueError(
            f"A figure of sizes needs at most {STYLES} methods, as it has so many kinds of lines, got {len(kept)}; "
            "leave folders out, or draw these as boxes."
        )
    return kept


def side_step(number: int, count: int) -> float:
    """The factor by which one of several lines is moved along the axis of sizes: 2.5 % from each to the next, or less.

    Args:
        number: Of the line.
        count: Of all lines; together they reach 8 % to either side at most.
    """
    middle = (count - 1) / 2
    return min(1.025, 1.08 ** (1 / max(middle, 1))) ** (number - middle)


def ranks(runs: "Sequence[Arm]", metric: str | None, which: "Which | None") -> Ranks:
    """Mean ranks over blocks, a block being one seed of one task, training size and model.

    A block counts if at least half of the arms have it. There must be three arms, as Friedman's test needs them.

    Raises:
        TypeError: If something else than runs was given.
        ValueError: If fewer than three arms have all blocks, or there are fewer than two blocks.
    """
    given = _arms(runs, "run_ranks")
    owned = {name: {b for arm in given if arm.method == name for b in _blocks(arm)} for name in _methods(given)}
    everywhere = set().union(*owned.values())
    usual = {block for block in everywhere if 2 * sum(block in own for own in owned.values()) >= len(owned)}
    blocks = sorted(usual, key=lambda block: (block[0].order, block[1]))
    lacking = {name: len(usual - own) for name, own in owned.items() if usual - own}
    names = [name for name in owned if name not in lacking]
    told = ", ".join(f"{name} ({count} of {len(blocks)} blocks missing)" for name, count in lacking.items())
    if len(names) < 3 or len(blocks) < 2:
        raise ValueError(
            "A figure of ranks needs at least three methods that all have the same blocks (seeds of tasks), two or "
            f"more, got methods: {len(names)}, blocks: {len(blocks)}{f', without {told}' if told else ''}; run what is "
            "missing, or leave folders out."
        )
    rare = Counter(group for group, _ in sorted(everywhere - usual, key=lambda block: block[0].order))
    counted = {group for group, _ in blocks}
    kept = [arm for arm in given if arm.method in names and arm.group in counted]
    comparison, groups = _compared(kept, names[0], metric, which)
    worths = np.array([[_worth(kept, name, block, groups, comparison) for name in names] for block in blocks])
    ranked = np.array([stats.rankdata(-row) for row in worths])
    means = ranked.mean(axis=0)
    order = np.argsort(means, kind="stable")
    critical = critical_difference(len(names), len(blocks))
    test = stats.friedmanchisquare(*ranked.T) if (np.ptp(ranked, axis=1) > 0).any() else None
    p = "p = 1, as all are tied" if test is None else f"p = {test.pvalue:.2g}"
    notes = [
        f"Mean ranks over {len(blocks)} blocks (one seed of one task{_and_size(groups)}); 1 is best; ties share their "
        "rank.",
        f"Friedman test that all methods rank alike: {p}. Nemenyi: critical difference {critical:.2f} at the level "
        f"{LEVEL:g}; methods joined by a bar differ by less.",
        "Seeds of one task are no tasks of their own: for other tasks the tests promise too much.",
        _epoch_note(comparison),
        *([f"Left out: {told}."] if told else []),
        *([f"Left out, as fewer than half of the methods have them: {_blocks_told(rare)}."] if rare else []),
        *(["A run without a number ranks last."] if not np.isfinite(worths).all() else []),
    ]
    return Ranks(
        tuple(names[i] for i in order), means[order], critical, tuple(alike(means[order], critical)), tuple(notes)
    )


def critical_difference(methods: int, blocks: int) -> float:
    r"""How far apart mean ranks must be to differ: :math:`q_\alpha \sqrt{k (k + 1) / (6 N)}` for k methods, N blocks.

    :math:`q_\alpha` is the quantile of the studentized range for infinitely many degrees of freedom, by
    :math:`\sqrt 2` (Nemenyi's test; Demšar 2006, JMLR 7, section 3.2.2).

    Args:
        methods: How many are ranked.
        blocks: How often.
    """
    q = float(stats.studentized_range.ppf(1 - LEVEL, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * blocks))


def alike(means: Float[np.ndarray, "arms"], critical: float) -> list[tuple[int, int]]:
    """First and last of every largest group of rising mean ranks that differ by less than the critical difference.

    Args:
        means: In rising order.
        critical: The difference.
    """
    found: list[tuple[int, int]] = []
    for first, mean in enumerate(means):
        last = int((means < mean + critical).sum()) - 1
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


def learning(runs: "Sequence[Arm]", reference: str, metric: str | None) -> LearningCurves:
    """Training loss as it was logged, and a metric on the report examples, over the epochs.

    Raises:
        TypeError: If something else than runs was given.
        ValueError: If they cannot be compared.
    """
    given = _arms(runs, "learning_curves")
    _, groups = _compared(given, reference, metric, "last")
    tasks = []
    for rows, title in zip(groups.values(), _titles(list(groups)), strict=True):
        arms = [_arm(given, row) for row in rows]
        shown = rows[0].metric
        objective = str(arms[0].settings.get("objective"))
        baselines = next((arm.baselines for arm in arms if arm.baselines), {})
        tasks.append(
            Learning(
                title,
                tuple(arm.method for arm in arms),
                (
                    tuple(_course(arm, [_logged(run) for run in arm.runs]) for arm in arms),
                    tuple(_course(arm, [_measured(run, shown) for run in arm.runs]) for arm in arms),
                ),
                (f"training {LOSS_LABELS.get(objective, 'loss')}", _metric_label(shown, arms[0])),
                (baselines.get("label_entropy"), baselines.get(shown)),
            )
        )
    failed = any(course.failed.any() for task in tasks for course in task.courses[0])
    differ = any(
        len({task.epochs(number) for number, course in enumerate(task.courses[1]) if course.x.size}) > 1
        for task in tasks
    )
    levels = any(level is not None for task in tasks for level in task.levels)
    notes = [
        "Thin: single runs; thick: their mean, which ends where one of them has no number; grey: mean of "
        f"{reference}. Losses are shown as logged.",
        *(["Orange: failed runs."] if failed else []),
        *(
            ["Axes hold the runs that did not fail; some that did, and means with them, go far beyond."]
            if any(task.is_cut for task in tasks)
            else []
        ),
        *(["Horizontal axes end where the runs of each method do."] if differ else []),
        *(["Dotted: what the labels of the training examples alone give."] if levels else []),
        *_common(list(groups)),
    ]
    return LearningCurves(tuple(tasks), tuple(notes))


def costs(runs: "Sequence[Arm]", reference: str) -> Costs:
    """Time of an optimizer step, and the most memory of all trainings.

    Raises:
        TypeError: If something else than runs was given.
        ValueError: If they cannot be compared.
    """
    given = _arms(runs, "run_costs")
    _, groups = _compared(given, reference, "loss", "last")  # which all have; the costs are the same by any metric
    panels, seconds = [], []
    for rows, title in zip(groups.values(), _titles(list(groups)), strict=True):
        panels.append(
            CostPanel(
                title,
                tuple(row.arm for row in rows),
                np.array([math.nan if row.time_ratio is None else row.time_ratio for row in rows]),
                np.array([(row.peak_memory or math.nan) / 2**30 for row in rows]),
            )
        )
        if rows[0].time is not None:
            seconds.append(f"{rows[0].time:.3g} s on {title}")
    devices = sorted({device for arm in given for device in arm.devices})
    notes = [
        f"Time: median over runs of the median step; {reference} takes {', '.join(seconds)}."
        if seconds
        else "Time was not measured.",
        "Memory: the most of all runs; on a CPU that is the memory of the whole process.",
        *([f"Trained on {', '.join(devices)}."] if devices else []),
        *_common(list(groups)),
    ]
    if any(np.isnan(panel.times).any() for panel in panels):
        notes.insert(1, f"No bar: trained on another kind of device than {reference}, or not timed.")
    return Costs(tuple(panels), f"seconds per step / those of {reference}", tuple(notes))


def _arms(runs: "Sequence[Arm]", plot: str) -> "list[Arm]":
    from ..experiments.arms import Arm  # here, as the methods take long to import

    return as_sequence(runs, Arm, plot)


def _compared(
    given: "Sequence[Arm]", reference: str, metric: str | None, which: "Which | None"
) -> "tuple[Comparison, dict[Group, list[Row]]]":
    """What tables would show, so that figures refuse what they refuse; without means over tasks."""
    from ..experiments.comparison import compare_methods

    comparison = compare_methods(given, reference=reference, metric=metric, which=which)
    trained = {arm.group for arm in given}
    return comparison, {group: rows for group, rows in comparison.groups.items() if group in trained}


def _arm(runs: "Sequence[Arm]", row: "Row") -> "Arm":
    return next(arm for arm in runs if (arm.group, arm.method) == (row.group, row.arm))


def _methods(runs: "Sequence[Arm]") -> list[str]:
    return list(dict.fromkeys(arm.method for arm in runs))


def _names(groups: "Mapping[Group, Sequence[Row]]", reference: str) -> tuple[str, ...]:
    """All arms, the reference first."""
    return tuple(dict.fromkeys([reference, *sorted(row.arm for rows in groups.values() for row in rows)]))


def _titles(groups: "Sequence[Group]") -> list[str]:
    """The task, and what else the groups differ in."""
    models, several = len({group.model for group in groups}) > 1, len({group.train_size for group in groups}) > 1
    return [
        ", ".join([group.task, *([group.model] if models else []), *([group.size] if several else [])])
        for group in groups
    ]


def _common(groups: "Sequence[Group]") -> list[str]:
    """What the groups have in common, as a note."""
    models, amounts = {group.model for group in groups}, {group.size for group in groups}
    parts = [*(models if len(models) == 1 else ()), *(amounts if len(amounts) == 1 else ())]
    return [f"Runs of {', '.join(parts)}."] if parts else []


def _and_size(groups: "Iterable[Group]") -> str:
    return " and training size" if len({group.train_size for group in groups}) > 1 else ""


def _epoch_note(comparison: "Comparison") -> str:
    from ..experiments.tables import EPOCHS

    return f"Numbers are those {EPOCHS[comparison.which]}."


def _metric_label(metric: str, arm: "Arm") -> str:
    from ..experiments.arms import is_loss

    if is_loss(metric):
        return LOSS_LABELS.get(str(arm.settings.get("objective")), metric)
    return METRIC_LABELS.get(metric, metric)


def _box_row(arm: "Arm", metric: str, which: "Which") -> BoxRow:
    finite = {seed: value for seed, value in arm.values(metric, which).items() if math.isfinite(value)}
    seeds, values = tuple(sorted(finite)), np.array([finite[seed] for seed in sorted(finite)], dtype=np.float64)
    trained = {run.seed for run in arm.runs} | set(arm.crashed)
    failures = set(arm.failures(which)) | {run.seed for run in arm.runs if run.evaluations and run.seed not in finite}
    failed = np.array([seed in failures for seed in seeds], dtype=bool)
    if not seeds:
        none = math.nan
        return BoxRow(values, seeds, failed, len(failures), len(trained), (none, none, none), (none, none))
    low, middle, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    reach = 1.5 * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    whiskers = (min(float(inside.min()), low), max(float(inside.max()), high))
    return BoxRow(values, seeds, failed, len(failures), len(trained), (low, middle, high), whiskers)


def _size_line(name: str, rows: "Sequence[Row]", x_of: Mapping[int | float | None, float]) -> SizeLine:
    mine = [row for row in rows if row.arm == name and row.summary.mean is not None]
    ordered = sorted(mine, key=lambda row: x_of[row.group.train_size])
    means = np.array([row.summary.mean for row in ordered], dtype=np.float64)
    reach = np.array([_reach(row.summary.std, row.summary.measured) for row in ordered])
    return SizeLine(
        name, np.array([x_of[row.group.train_size] for row in ordered]), means, means - reach, means + reach
    )


def _reach(std: float | None, count: int) -> float:
    """Half of the interval of a mean."""
    if std is None:
        return math.nan
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * std / math.sqrt(count)


def _blocks(arm: "Arm") -> "set[tuple[Group, int]]":
    return {(arm.group, seed) for seed in [*(run.seed for run in arm.runs), *arm.crashed]}


def _blocks_told(counts: "Mapping[Group, int]") -> str:
    return "; ".join(f"{count} block{'s' * (count > 1)} on {group}" for group, count in counts.items())


def _worth(
    runs: "Sequence[Arm]",
    name: str,
    block: "tuple[Group, int]",
    groups: "Mapping[Group, Sequence[Row]]",
    comparison: "Comparison",
) -> float:
    """How good one training is: more is better, no number worse than all numbers."""
    from ..experiments.arms import is_loss

    group, seed = block
    metric = groups[group][0].metric
    arm = next(arm for arm in runs if (arm.group, arm.method) == (group, name))
    value = arm.values(metric, comparison.which).get(seed, math.nan)
    if not math.isfinite(value):
        return -math.inf
    return -value if is_loss(metric) else value


def _logged(run: "SeedResult") -> dict[float, float]:
    """Training losses by epoch."""
    if not run.evaluations:
        return {}
    last = run.evaluations[-1]
    return {row["step"] * last["epoch"] / last["step"]: row["loss"] for row in run.losses}


def _measured(run: "SeedResult", metric: str) -> dict[float, float]:
    return {row["epoch"]: row[metric] for row in run.evaluations}


def _course(arm: "Arm", by_epoch: Sequence[Mapping[float, float]]) -> Course:
    x = sorted({epoch for one in by_epoch for epoch in one})
    seeds = np.array([[one.get(epoch, math.nan) for epoch in x] for one in by_epoch], dtype=np.float64)
    seeds = seeds.reshape(len(by_epoch), len(x))
    seeds[~np.isfinite(seeds)] = math.nan
    failed = np.array([run.seed in arm.failures() for run in arm.runs], dtype=bool)
    mean = np.array([statistics.fmean(column) for column in seeds.T], dtype=np.float64)
    return Course(np.array(x, dtype=np.float64), seeds, failed, mean)
