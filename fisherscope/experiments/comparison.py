"""Methods of fine-tuning compared over seeds: summaries, paired tests, and tables that say what is in them."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from ..finetune.results import SELECT, Which
from . import tables
from .arms import Arm, Group, is_loss
from .statistics import Correction, Paired, Summary, brown_forsythe, corrected, paired, summarize

DRAWN = {
    "run": "Every seed draws examples of its own, so the standard deviation is also over these, unless it takes all.",
    "": "All seeds have the same training examples, so the standard deviation is not over these.",
}
"""What is to be said of ``subset_seed``."""

TESTS = ("p_t", "p_permutation", "p_spread")


@dataclass(frozen=True)
class Row:
    """One arm in one group, beside the reference of that group.

    Attributes:
        group: Model, training size and task; of an aggregate the task is ``"mean over k tasks"``.
        arm: Its name.
        method: The method itself.
        metric: Of all numbers; of an aggregate, what the mean is of.
        less_is_better: Whether that is a loss.
        summary: Of the trainings.
        paired: The difference to the reference, seed by seed; None for the reference.
        p_t: Of the paired t test.
        p_permutation: Of the sign-flip permutation test.
        p_spread: Of the Brown-Forsythe test, that the arm spreads over seeds as the reference does.
        p_t_corrected: Corrected for all t tests of the comparison.
        p_permutation_corrected: Likewise for all permutation tests.
        p_spread_corrected: Likewise for all Brown-Forsythe tests.
        time: Seconds of an optimizer step, the median over the trainings of their medians.
        time_ratio: That by the reference's, if both were trained on devices of one kind.
        peak_memory: Bytes: the most of all trainings.
    """

    group: Group
    arm: str
    method: str
    metric: str
    less_is_better: bool
    summary: Summary
    paired: Paired | None = None
    p_t: float | None = None
    p_permutation: float | None = None
    p_spread: float | None = None
    p_t_corrected: float | None = None
    p_permutation_corrected: float | None = None
    p_spread_corrected: float | None = None
    time: float | None = None
    time_ratio: float | None = None
    peak_memory: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Arms beside a reference: groups by model and training size, in these by task, the aggregate over tasks last.

    Attributes:
        rows: One for every arm of a group, the reference first.
        reference: The arm that all others are compared with.
        which: The evaluation that counts.
        correction: For the number of tests.
        protocol: Who sees which examples.
        notes: What else a reader has to know, a sentence each.
    """

    rows: tuple[Row, ...]
    reference: str
    which: Which
    correction: Correction
    protocol: str
    notes: tuple[str, ...]

    @property
    def groups(self) -> dict[Group, list[Row]]:
        """The rows of every table."""
        found: dict[Group, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found

    @property
    def tested(self) -> dict[str, int]:
        """How often each test was made, which is what its values of p are corrected for."""
        return {test: sum(getattr(row, test) is not None for row in self.rows) for test in TESTS}

    def to_markdown(self) -> str:
        """A table for every group, with what its numbers are."""
        return tables.markdown(self)

    def to_latex(self) -> str:
        """The same for LaTeX with booktabs."""
        return tables.latex(self)

    def to_csv(self) -> str:
        """A line for every row, with all numbers in full precision."""
        return tables.csv_lines(self)


@dataclass(frozen=True)
class _Numbers:
    """One arm in one group: a number for every seed."""

    name: str
    method: str
    values: Mapping[int, float]
    failed: frozenset[int]
    arm: Arm | None = None


def compare_methods(
    runs: Sequence[Arm],
    *,
    reference: str = "vanilla",
    metric: str | None = None,
    which: Which | None = None,
    correction: Correction = "holm",
) -> Comparison:
    """Compare methods of fine-tuning with a reference, seed by seed.

    A training without a finite number counts as failed and is in no mean. Where there are several tasks, the arms that
    have all of them are also compared by the mean over tasks, formed for every seed before anything else. Losses of
    tasks with other objectives have other units, and no mean.

    Args:
        runs: Of :func:`read_runs`.
        reference: Name of the arm that the others are compared with.
        metric: One for all tasks; None takes the main metric of each.
        which: ``"selected"``, ``"last"`` or ``"best"`` epoch, as :meth:`SeedResult.value` has it; None takes the
            selected one where all runs have select examples, and else the last.
        correction: Of the values of p, for all tests of one kind in the comparison together.

    Raises:
        ValueError: If there are no runs, a group lacks the reference, the runs do not all have the metric or the
            select examples, or they cannot be compared: another protocol, or other examples.
    """
    if not runs:
        raise ValueError("A comparison needs runs, but there are none; read_runs reads them from their folders.")
    if which is not None and which not in get_args(Which):
        raise ValueError(f"which must be one of {', '.join(get_args(Which))}; got {which!r}.")
    measured = [arm for arm in runs if any(run.evaluations for run in arm.runs)]
    if not measured:
        raise ValueError("There is nothing to compare: no run was measured; fine-tune with validation examples.")
    if which is None:
        which = "selected" if all(arm.has_select for arm in measured) else "last"
    groups = _groups(runs, reference)
    _check_comparable([*measured, *(arm for arm in runs if not arm.runs)])
    rows: list[Row] = []
    for group_set in _by_model_and_size(groups):
        numbers = {group: [_numbers(arm, metric, which) for arm in groups[group]] for group in group_set}
        names = {group: _metric_of(groups[group], metric) for group in group_set}
        for group in group_set:
            rows += _rows(group, names[group], is_loss(names[group]), numbers[group])
        if (aggregate := _over_tasks(numbers, names)) is not None:
            rows += _rows(*aggregate)
    rows = _with_corrections(rows, correction)
    notes = tuple(_notes(rows, groups, reference, which))
    return Comparison(tuple(rows), reference, which, correction, measured[0].protocol, notes)


def _groups(runs: Sequence[Arm], reference: str) -> dict[Group, list[Arm]]:
    """The arms of every group, the reference first."""
    groups: dict[Group, list[Arm]] = {}
    for arm in sorted(runs, key=lambda arm: (*arm.group.order, arm.method != reference, arm.method)):
        groups.setdefault(arm.group, []).append(arm)
    for group, arms in groups.items():
        if arms[0].method != reference:
            raise ValueError(
                f"The reference {reference!r} has no runs on {group}; there are {', '.join(a.method for a in arms)}: "
                "take one of them as the reference (--reference), or leave that folder out."
            )
    return groups


def _by_model_and_size(groups: Mapping[Group, Any]) -> list[list[Group]]:
    """The groups that differ in their tasks only, together."""
    found: dict[tuple[str, Any], list[Group]] = {}
    for group in groups:
        found.setdefault((group.model, group.train_size), []).append(group)
    return list(found.values())


def _check_comparable(arms: Sequence[Arm]) -> None:
    """Refuse arms whose numbers are of different kinds."""
    first = arms[0]
    for arm in arms:
        for what, one, other in (
            ("protocol", first.protocol, arm.protocol),
            ("subset_seed", first.settings.get("subset_seed"), arm.settings.get("subset_seed")),
        ):
            if one != other:
                raise ValueError(
                    f"A comparison takes runs of one {what}, but {first.method} on {first.group} has {one} and "
                    f"{arm.method} on {arm.group} has {other}; compare them apart."
                )
    seen: dict[tuple[Group, str, int | None], tuple[Arm, str | None]] = {}
    for arm in arms:
        for what, length, fingerprint in _examples_of(arm):
            before, known = seen.setdefault((arm.group, what, length), (arm, fingerprint))
            if known != fingerprint:
                raise ValueError(
                    f"A comparison takes runs on the same examples, but the {what} examples of {before.method} and "
                    f"{arm.method} on {arm.group} differ ({known}, {fingerprint}); compare them apart."
                )


def _examples_of(arm: Arm) -> Iterator[tuple[str, int | None, str | None]]:
    """Fingerprints of what an arm has seen: of the texts, and of their tokens, which ``max_length`` may cut."""
    for split, fingerprint in arm.settings.get("data", {}).items():
        yield split, None, fingerprint
    for role, fingerprint in arm.fingerprints.items():
        if role != "backbone":  # a method may begin with other weights
            yield f"encoded {role}", arm.settings.get("max_length") or 0, fingerprint


def _metric_of(arms: Sequence[Arm], metric: str | None) -> str:
    found = {arm.metric for arm in arms if arm.metric}
    if metric is None and len(found) > 1:
        raise ValueError(
            f"The runs on {arms[0].group} have the main metrics {', '.join(sorted(found))}; say which one to compare "
            "(--metric)."
        )
    return metric or next(iter(found), "no metric")


def _numbers(arm: Arm, metric: str | None, which: Which) -> _Numbers:
    known = {name for run in arm.runs if run.evaluations for name in run.evaluations[-1]} - {"step", "epoch"}
    reported = sorted(name for name in known if not name.startswith(SELECT))
    if known and metric is not None and metric not in reported:
        raise ValueError(f"{arm.method} on {arm.group} has no metric {metric!r}; it has {', '.join(reported)}.")
    try:
        values = arm.values(metric, which)
    except ValueError as error:
        raise ValueError(f"{arm.method} on {arm.group}: {error}") from error
    finite = {seed: value for seed, value in values.items() if math.isfinite(value)}
    failed = frozenset(arm.failures(which)) | (values.keys() - finite.keys())
    return _Numbers(arm.method, str(arm.settings.get("method", arm.method)), finite, failed, arm)


def _rows(group: Group, metric: str, less_is_better: bool, numbers: Sequence[_Numbers]) -> list[Row]:
    """The reference is the first."""
    reference = numbers[0]
    return [_row(group, metric, less_is_better, one, None if one is reference else reference) for one in numbers]


def _row(group: Group, metric: str, less_is_better: bool, one: _Numbers, reference: _Numbers | None) -> Row:
    time, memory = _costs(one.arm)
    row = Row(
        group,
        one.name,
        one.method,
        metric,
        less_is_better,
        summarize(one.values, one.failed),
        time=time,
        time_ratio=None if time is None else 1.0,
        peak_memory=memory,
    )
    if reference is None:
        return row
    difference = paired(one.values, reference.values)
    same_device = one.arm is not None and reference.arm is not None and one.arm.devices == reference.arm.devices
    usual, _ = _costs(reference.arm)
    return replace(
        row,
        paired=difference,
        p_t=difference.p_t,
        p_permutation=difference.p_permutation,
        p_spread=brown_forsythe(list(one.values.values()), list(reference.values.values())),
        time_ratio=time / usual if time and usual and same_device else None,
    )


def _costs(arm: Arm | None) -> tuple[float | None, int | None]:
    """Seconds of a step, and bytes."""
    seconds = [run.seconds_per_step for run in arm.runs if math.isfinite(run.seconds_per_step)] if arm else []
    return (
        statistics.median(seconds) if seconds else None,
        max((run.peak_memory for run in arm.runs), default=None) if arm else None,
    )


def _over_tasks(
    numbers: Mapping[Group, Sequence[_Numbers]], metrics: Mapping[Group, str]
) -> tuple[Group, str, bool, list[_Numbers]] | None:
    """The mean over tasks, of the arms that have all of them; None if that means nothing."""
    are_losses = {is_loss(metric) for metric in metrics.values()}
    trained = [one.arm for ones in numbers.values() for one in ones if one.arm and one.arm.runs]
    objectives = {arm.settings.get("objective") for arm in trained}
    if len(numbers) < 2 or len(are_losses) > 1 or (are_losses == {True} and len(objectives) > 1):
        return None
    first = next(iter(numbers))
    by_arm: dict[str, list[_Numbers]] = {}
    for ones in numbers.values():
        for one in ones:
            by_arm.setdefault(one.name, []).append(one)
    complete = {name: ones for name, ones in by_arm.items() if len(ones) == len(numbers)}
    names = ", ".join(f"{metric} of {group.task}" for group, metric in metrics.items())
    group = replace(first, task=f"mean over {len(numbers)} tasks")
    return group, f"mean of {names}", are_losses == {True}, [_mean_of(ones) for ones in complete.values()]


def _mean_of(ones: Sequence[_Numbers]) -> _Numbers:
    """The mean over tasks for every seed that has a number in each; a seed that failed in one of them failed."""
    seeds = set.intersection(*(set(one.values) for one in ones))
    values = {seed: statistics.fmean(one.values[seed] for one in ones) for seed in sorted(seeds)}
    return _Numbers(ones[0].name, ones[0].method, values, frozenset().union(*(one.failed for one in ones)))


def _with_corrections(rows: Sequence[Row], how: Correction) -> list[Row]:
    """Every test is corrected for its use in all rows."""
    found = {test: corrected([getattr(row, test) for row in rows], how) for test in TESTS}
    return [replace(row, **{f"{test}_corrected": found[test][i] for test in TESTS}) for i, row in enumerate(rows)]


def _notes(rows: Sequence[Row], groups: Mapping[Group, Sequence[Arm]], reference: str, which: Which) -> list[str]:
    """What else a reader has to know."""
    first = next(arm for arms in groups.values() for arm in arms if arm.runs)
    others = [row for row in rows if row.paired is not None]
    notes = [DRAWN.get(str(first.settings.get("subset_seed")), DRAWN[""])]
    if others and not any(row.paired and len(row.paired.seeds) > 1 for row in others):
        of_one = all(row.summary.runs == 1 for row in rows)
        why = "With one seed" if of_one else f"Without two seeds for which {reference} and another have a number"
        notes.append(f"{why} nothing can be tested: there is no interval and no p.")
    for row in others:
        assert row.paired is not None
        for who, seeds in ((row.arm, row.paired.only_here), (reference, row.paired.only_reference)):
            if seeds:
                notes.append(f"{row.arm} on {row.group}: not compared, as only {who} has a number: {_seeds(seeds)}.")
    for aggregate in dict.fromkeys(row.group for row in rows if row.group not in groups):
        here = {row.arm for row in rows if row.group == aggregate}
        lacking = {row.arm for row in rows if _same_but_task(row.group, aggregate)} - here
        if lacking:
            notes.append(f"{aggregate}: without {', '.join(sorted(lacking))}, not run on all of them.")
    described = [_described(arm, arms[0]) for arms in groups.values() for arm in arms]
    notes += dict.fromkeys(text for text in described if text)
    for arms in groups.values():
        for arm in arms:
            seeds_of: defaultdict[str, list[int]] = defaultdict(list)
            for seed, why in arm.failures(which).items():
                seeds_of[why].append(seed)
            notes += [f"Failed: {arm.method} on {arm.group}, {_seeds(of)}: {why}." for why, of in seeds_of.items()]
    return notes


def _same_but_task(group: Group, other: Group) -> bool:
    return replace(group, task=other.task) == other


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _described(arm: Arm, reference: Arm) -> str | None:
    """The settings of an arm's method, and where else it is trained otherwise than the reference."""
    method = str(arm.settings.get("method", arm.method))
    parts = [f"method {method}"] if arm.method != method else []
    parts += [f"{name} {value}" for name, value in _plain(arm.settings.get("settings")).items()]
    if arm.runs and reference.runs:
        for name in sorted({*arm.settings, *reference.settings} - {"method", "settings", "scores", "mask"}):
            here, there = (_short(one.settings.get(name)) for one in (arm, reference))
            if here != there:
                parts.append(f"{name} {here} ({there} for {reference.method})")
    return f"{arm.method}: {', '.join(parts)}." if parts else None


def _short(setting: Any) -> Any:
    return "its own" if isinstance(setting, Mapping) else setting


def _plain(settings: Any) -> dict[str, Any]:
    """The settings of all methods of an arm."""
    found: dict[str, Any] = {}
    for name, value in dict(settings or {}).items():
        found |= value if isinstance(value, Mapping) else {name: value}
    return found
