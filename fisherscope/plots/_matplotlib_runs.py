"""Runs of fine-tuning on the printed page, by matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from . import _matplotlib
from ._matplotlib_layout import (
    BODY,
    COLUMN,
    DASHES,
    LINE,
    MARKERS,
    PAGE,
    QUIET,
    STYLE,
    TITLE,
    set_ticks,
    text_height,
    text_width,
    wrapped,
)
from ._prepare import COLOURS, columns, spread
from ._prepare_runs import Boxes, BoxRow, CostPanel, Costs, Learning, LearningCurves, Ranks, Sizes, side_step

__all__ = ["learning_curves", "run_boxes", "run_costs", "run_ranks", "run_sizes", "save"]

ROW = 0.21  # of one method

_AXIS = 0.40  # ticks and label below a panel
_TITLE = 0.24
_BAD = COLOURS[1]
_MARKERS = MARKERS[:6]  # not as many as colours, so that each colour gets every marker
_DASHED, _DOTTED = (0, (4, 2)), (0, (1, 1.5))


class Sheet:
    """A page of one width that grows downwards; lengths in inches from its upper left corner.

    Args:
        width: Of the page.
        height: Of all but the notes.
        notes: What must be said below.
    """

    def __init__(self, width: float, height: float, notes: Sequence[str]) -> None:
        self.width, self.used = width, height + 0.04
        self.note = "\n".join(wrapped(note, 0.97 * width) for note in notes)
        self.height = self.used + text_height(self.note) + 0.06
        self.figure = Figure(figsize=(width, self.height))

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """A pair of axes."""
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def text(self, left: float, top: float, text: str, **options: Any) -> None:
        """Text whose upper edge is at ``top``."""
        self.figure.text(left / self.width, 1 - top / self.height, text, va="top", **options)

    def finished(self) -> Figure:
        """The figure, with its notes."""
        self.text(0.05, self.used, self.note, color=QUIET)
        return self.figure


@matplotlib.rc_context(STYLE)
def run_boxes(boxes: Boxes) -> Figure:
    """Boxes over seeds, with a dot for every run, tasks side by side."""
    count = len(boxes.panels)
    labels = _label_width(boxes.names)
    width = COLUMN if count == 1 and labels < COLUMN / 2 else PAGE
    counts = [[_count_text(row) for row in panel.rows] for panel in boxes.panels]
    beside = 0.16 + max((text_width(text) for texts in counts for text in texts if text), default=0.04)
    across = columns(count, 3)
    room = (width - labels - 0.04) / across - beside
    titles = [wrapped(panel.title, room + beside - 0.06, TITLE) for panel in boxes.panels]
    x_labels = [wrapped(panel.label, room + beside - 0.06) for panel in boxes.panels]
    title = 0.06 + max(map(_title_height, titles))
    inside, below = ROW * len(boxes.names) + 0.05, _AXIS + max(map(text_height, x_labels)) - LINE
    sheet = Sheet(width, math.ceil(count / across) * (title + inside + below), boxes.notes)
    for number, panel in enumerate(boxes.panels):
        row, column = divmod(number, across)
        left, top = labels + column * (room + beside), row * (title + inside + below)
        axes = sheet.axes(left, top + title, room, inside)
        axes.set_title(titles[number], fontsize=TITLE, pad=3)
        for position, shown in enumerate(panel.rows):
            if shown is not None:
                _draw_box(axes, position, shown)
        axes.axvline(panel.reference, color="black", linewidth=0.6, linestyle=_DASHED, zorder=1)
        axes.set_xlabel(x_labels[number])
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        _name_rows(axes, boxes.names if column == 0 else [""] * len(boxes.names))
        for position, text in enumerate(counts[number]):
            if text:
                place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "color": QUIET}
                axes.text(1.0 + 0.04 / room, position, text, **place)
    return sheet.finished()


@matplotlib.rc_context(STYLE)
def run_sizes(sizes: Sizes) -> Figure:
    """Means by training size with their intervals, a panel for every task."""
    count = len(sizes.panels)
    width = COLUMN if count == 1 else PAGE
    across, left = columns(count, 3), 0.55
    room = (width - 0.08) / across - left
    titles = [wrapped(panel.title, room + left - 0.1, TITLE) for panel in sizes.panels]
    title, inside = 0.08 + max(map(_title_height, titles)), min(0.85 * room, 2.2)
    height = math.ceil(count / across) * (title + inside + _AXIS)
    legend = _Legend(sizes.names, width)
    sheet = Sheet(width, height + legend.height, sizes.notes)
    for number, panel in enumerate(sizes.panels):
        row, column = divmod(number, across)
        axes = sheet.axes(left + column * (room + left), row * (title + inside + _AXIS) + title, room, inside)
        axes.set_title(titles[number], fontsize=TITLE, pad=3)
        axes.set_xscale("log")
        for line in panel.lines:
            place = sizes.names.index(line.name)
            x = line.x * side_step(place, len(sizes.names))
            reach = np.nan_to_num(np.array([line.mean - line.low, line.high - line.mean]))
            axes.errorbar(x, line.mean, reach, elinewidth=0.6, capsize=1.2, capthick=0.6, **_series(place))
        set_ticks(axes.xaxis, [(tick, f"{tick:,g}") for tick in spread(sizes.ticks)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=sizes.x_label, xlim=sizes.limits)
        axes.set_ylabel(wrapped(panel.label, inside + 0.2), labelpad=2)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    legend.draw(sheet, height)
    return sheet.finished()


@matplotlib.rc_context(STYLE)
def run_ranks(ranks: Ranks) -> Figure:
    """Mean ranks, the best at the top, with the critical difference above and bars that join what does not differ."""
    labels, count, between = _label_width(ranks.names), len(ranks.names), 0.10
    width = COLUMN if COLUMN - labels - between * len(ranks.alike) > 1.5 else PAGE
    between = min(between, width / 3 / max(len(ranks.alike), 1))
    title, inside = 0.40, ROW * count
    sheet = Sheet(width, title + inside + _AXIS, ranks.notes)
    room = width - labels - between * len(ranks.alike) - 0.16
    axes = sheet.axes(labels, title, room, inside)
    axes.plot(ranks.means, range(count), "o", color=COLOURS[0], markersize=4.0, clip_on=False, zorder=3)
    axes.hlines(range(count), 1, ranks.means, color=COLOURS[0], linewidth=0.8)
    axes.set(xlim=(1, max(count, 1 + ranks.critical)), xlabel="mean rank")
    axes.xaxis.set_major_locator(MaxNLocator(min(8, int(room / 0.2)), integer=True))
    _name_rows(axes, ranks.names)
    above: Any = axes.get_xaxis_transform()
    height = 1 + 0.10 / inside
    axes.plot([1, 1 + ranks.critical], [height] * 2, "|-", transform=above, clip_on=False, color="black", linewidth=1.0)
    text = f"critical difference {ranks.critical:.2f}"
    axes.text(1, height + 0.06 / inside, text, transform=above, ha="left", va="bottom")
    for number, (first, last) in enumerate(ranks.alike):
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False, "solid_capstyle": "butt"}
        x = 1 + (0.08 + between * number) / room
        axes.plot([x, x], [first - 0.3, last + 0.3], color="black", linewidth=2.0, **place)
    return sheet.finished()


@matplotlib.rc_context(STYLE)
def learning_curves(curves: LearningCurves) -> Figure:
    """For every method the training loss, and below it the metric; tasks below each other."""
    most = max(len(task.names) for task in curves.tasks)
    across, between, inside, title, gap = columns(most, 5), 0.10, 0.85, 0.22, 0.08
    width = PAGE if across > 2 else COLUMN
    labels = [[wrapped(label, inside + gap) for label in task.labels] for task in curves.tasks]
    left = 0.45 + max(text_height(label) for pair in labels for label in pair)
    room = (width - left - 0.08 + between) / across - between
    band = title + 2 * inside + gap + _AXIS
    bands = [math.ceil(len(task.names) / across) for task in curves.tasks]
    sheet = Sheet(width, sum(0.24 + count * band for count in bands), curves.notes)
    top = 0.0
    for task, count, y_labels in zip(curves.tasks, bands, labels, strict=True):
        sheet.text(left, top + 0.06, wrapped(task.title, width - left, TITLE), fontsize=TITLE, weight="bold")
        for number, name in enumerate(task.names):
            row, column = divmod(number, across)
            for which in (0, 1):
                y = top + 0.24 + row * band + title + which * (inside + gap)
                axes = sheet.axes(left + column * (room + between), y, room, inside)
                _draw_course(axes, task, number, which)
                axes.set(xlim=(0, 1.02 * task.epochs(number)), ylim=task.limits(which))
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
                if which == 0:
                    axes.set_title(wrapped(name, room), fontsize=BODY, pad=3)
                    axes.xaxis.set_major_formatter(NullFormatter())
                else:
                    axes.set_xlabel("epoch")
                if column == 0:
                    axes.set_ylabel(y_labels[which], labelpad=2)
                else:
                    axes.yaxis.set_major_formatter(NullFormatter())
        top += 0.24 + count * band
    return sheet.finished()


@matplotlib.rc_context(STYLE)
def run_costs(costs: Costs) -> Figure:
    """Bars of time and of memory in the same rows, tasks below each other."""
    labels = max(_label_width(panel.names) for panel in costs.panels)
    width = COLUMN if labels < 0.9 else PAGE
    number = 0.06 + text_width("00.00")
    room = (width - labels - 0.06) / 2 - number
    x_labels = [wrapped(costs.time_label, room + number - 0.1), wrapped("peak memory (GiB)", room + number - 0.1)]
    below = _AXIS + max(map(text_height, x_labels)) - LINE
    heights = [_TITLE + ROW * len(panel.names) + below for panel in costs.panels]
    sheet = Sheet(width, sum(heights), costs.notes)
    top = 0.0
    for panel, height in zip(costs.panels, heights, strict=True):
        sheet.text(labels, top + 0.07, wrapped(panel.title, width - labels, TITLE), fontsize=TITLE)
        for column, values in enumerate((panel.times, panel.memory)):
            left = labels + column * (room + number)
            axes = sheet.axes(left, top + _TITLE, room, ROW * len(panel.names))
            _draw_bars(axes, panel, values, column, room)
            axes.set_xlabel(x_labels[column])
        top += height
    return sheet.finished()


def save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure as all of matplotlib's are written."""
    _matplotlib.save(figure, path, suffix)


class _Legend:
    """Names of lines below a figure, in as many columns as fit."""

    def __init__(self, names: Sequence[str], width: float) -> None:
        self.names, self.width = names, width
        self.columns = max(1, min(len(names), int((width - 0.1) / (max(map(text_width, names)) + 0.55))))
        self.height = 1.2 * LINE * math.ceil(len(names) / self.columns) + 0.05

    def draw(self, sheet: Sheet, top: float) -> None:
        room = (self.width - 0.1) / self.columns
        axes = sheet.axes(0.05, top, self.width - 0.1, self.height)
        axes.set(xlim=(0, self.width - 0.1), ylim=(self.height, 0))
        axes.set_axis_off()
        for number, name in enumerate(self.names):
            row, column = divmod(number, self.columns)
            x, y = column * room, (row + 0.6) * 1.2 * LINE
            axes.plot([x, x + 0.15, x + 0.3], [y] * 3, markevery=[1], **_series(number))
            axes.text(x + 0.37, y, name.replace("$", r"\$"), va="center_baseline")


def _series(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 3.0,
    }


def _label_width(names: Sequence[str]) -> float:
    return 0.12 + max(map(text_width, names))


def _title_height(title: str) -> float:
    return 1.15 * text_height(title)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """A row for every name, the first at the top."""
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)


def _count_text(row: BoxRow | None) -> str:
    if row is None:
        return "not run"
    return f"{row.failures}/{row.runs} failed" if row.failures else ""


def _draw_box(axes: Axes, position: int, row: BoxRow) -> None:
    """A box with its whiskers, and in it every run: dots that stand above each other by seed, crosses for failed."""
    if not row.seeds:
        return
    stats = {
        "q1": row.quartiles[0], "med": row.quartiles[1], "q3": row.quartiles[2],
        "whislo": row.whiskers[0], "whishi": row.whiskers[1],
    }  # fmt: skip
    line = {"color": "0.35", "linewidth": 0.7}
    axes.bxp(
        [stats],
        positions=[position],
        widths=0.72,
        orientation="horizontal",
        showfliers=False,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": "0.92", "edgecolor": "0.35", "linewidth": 0.7},
        whiskerprops=line,
        capprops=line,
        medianprops={"color": "black", "linewidth": 1.3},
    )
    heights = position + row.offsets
    dots: dict[str, Any] = {"linestyle": "none", "zorder": 4, "clip_on": False}
    good, bad = ~row.failed, row.failed
    axes.plot(row.values[good], heights[good], marker="o", color=COLOURS[0], markersize=2.6, mew=0, **dots)
    if bad.any():
        axes.plot(row.values[bad], heights[bad], marker="x", color=_BAD, markersize=3.6, mew=1.0, **dots)


def _draw_course(axes: Axes, task: Learning, number: int, which: int) -> None:
    """Runs below their mean, but those that failed above it."""
    course, reference = task.courses[which][number], task.courses[which][0]
    dots, grey = ({"marker": "o" if c.has_markers else "", "markeredgewidth": 0} for c in (course, reference))
    for values in course.seeds[~course.failed]:
        axes.plot(course.x, values, color=COLOURS[0], linewidth=0.4, alpha=0.6, markersize=2.2, **dots)
    if number:
        axes.plot(reference.x, reference.mean, color="0.5", linewidth=0.9, markersize=2.5, **grey)
    axes.plot(course.x, course.mean, color=COLOURS[0], linewidth=1.3, markersize=3.0, **dots)
    for values in course.seeds[course.failed]:
        axes.plot(course.x, values, color=_BAD, linewidth=0.9, markersize=2.2, **dots)
    level = task.levels[which]
    if level is not None:
        axes.axhline(level, color="black", linewidth=0.7, linestyle=_DOTTED)


def _draw_bars(axes: Axes, panel: CostPanel, values: np.ndarray, column: int, room: float) -> None:
    rows = np.arange(len(panel.names))
    known = np.isfinite(values)
    axes.barh(rows[known], values[known], height=0.66, color=COLOURS[column], linewidth=0)
    _name_rows(axes, panel.names if column == 0 else [""] * len(panel.names))
    axes.set_xlim(0, 1.02 * max([*values[known], 1e-9]))
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    for row in rows[known]:
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center_baseline", "color": QUIET}
        axes.text(1 + 0.03 / room, row, f"{values[row]:.2f}", **place)
    if column == 0:
        axes.axvline(1, color="black", linewidth=0.6, linestyle=_DASHED)
