"""The printed page: sizes, type, where panels, legends and notes stand; lengths in inches, sizes of type in points."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import matplotlib
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from ._prepare import COLOURS, Panel, Panels, Reference, Scale, Width, columns

COLUMN, PAGE = 3.3, 6.9  # one column and the full text width of most journals
TITLE, BODY = 8.0, 7.0
LINE = 0.117  # from one line of body text to the next
QUIET = "0.35"
MARKERS = "osD^vPX"

_BAR, _BAR_LABELS = 0.10, 0.52  # the colour bar, and what stands to its right
_NARROWEST, _WIDEST = 1.0, 3.6  # panel
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_RULER_DPI = 300

_OWN = {
    "font.family": "DejaVu Sans",
    "font.size": BODY,
    "axes.labelsize": BODY,
    "axes.linewidth": 0.6,
    "figure.dpi": _RULER_DPI,  # as the file will have, so that texts measure the same
    "hatch.linewidth": 0.4,
    "legend.fontsize": BODY,
    "lines.linewidth": 1.1,
    "pdf.fonttype": 42,  # TrueType, which journals ask for
    "savefig.dpi": _RULER_DPI,
    "svg.hashsalt": "fisherscope",  # the same file from the same data
    "xtick.labelsize": BODY,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.labelsize": BODY,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
}
# The look must not depend on a matplotlibrc of the reader either; what is left out is about machines, not looks.
_MACHINE = ("animation", "backend", "date", "interactive", "savefig.directory", "timezone", "toolbar", "webagg")
STYLE: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith(_MACHINE)} | _OWN


class Page:
    """Panels in rows under their titles and notes, one colour bar at the right, what concerns all of them below.

    Args:
        panels: What is drawn.
        most: Panels in a row of the page; in a column there are two at most, and the colour bar lies below them.
        aspect: Height of a panel by its width.
        left: Room for the labels left of each row.
        between: Room between the panels of a row.
        below: Room for the labels below each row.
        above: Room for the labels above each row.
        notes: More to be said below.
    """

    def __init__(
        self,
        panels: Panels,
        *,
        most: int,
        aspect: float,
        left: float,
        between: float,
        below: float,
        above: float = 0.0,
        notes: Sequence[str] = (),
    ) -> None:
        self.panels, count = panels, len(panels.panels)
        self.width = _width_of(panels.width, COLUMN if count == 1 else PAGE)
        self.is_bar_below = self.width == COLUMN
        self.marks = panels.references
        marked = max((text_width(_narrow(mark.label)) for mark in self.marks), default=0.0)
        beside = 0.10 if self.is_bar_below else _BAR_LABELS + _BAR + marked + 0.12
        all_room = self.width - beside - left + between
        most = min(most, 2 if self.is_bar_below else most, max(1, int(all_room / (_NARROWEST + between))))
        self.across = columns(count, most)
        self.rows = math.ceil(count / self.across)
        room = all_room / self.across - between
        along = self.width - 0.5 if self.is_bar_below else self.rows * aspect * min(room, _WIDEST)
        self.label = wrapped(panels.scale.label, max(along, 1.2))
        if not self.is_bar_below:
            room -= LINE * self.label.count("\n") / self.across
        self.panel_width, self.between = min(room, _WIDEST), between
        self.left = left + (room - self.panel_width) * self.across / 2
        self.bar_left = self.left + self.across * self.panel_width + (self.across - 1) * between + 0.12 + marked
        self.panel_height = aspect * self.panel_width
        self.titles = [wrapped(panel.title, self.panel_width, TITLE) for panel in panels.panels]
        self.panel_notes = [_paragraphs(panel.notes, self.panel_width + 0.1) for panel in panels.panels]
        self.title_height = 0.05 + 1.15 * LINE * (1 + max(title.count("\n") for title in self.titles))
        self.header = self.title_height + 0.07 + max(map(text_height, self.panel_notes)) + above
        self.row_height = self.header + self.panel_height + below
        self.note = _paragraphs((*panels.notes, *notes), self.width)
        self.bar_top = self.rows * self.row_height + (LINE if self.marks else 0.0) + 0.08
        bar_height = self.bar_top + _BAR + 0.42 - self.rows * self.row_height if self.is_bar_below else 0.0
        self.height = self.rows * self.row_height + bar_height + 0.08 + text_height(self.note)
        self.figure = Figure(figsize=(self.width, self.height))

    def axes(self, **options: Any) -> list[tuple[Panel, Any]]:
        """Every panel with its axes, titled."""
        return [(panel, self._panel_axes(number, panel, options)) for number, panel in enumerate(self.panels.panels)]

    def finished(self, colours: Colormap) -> Figure:
        """The figure, with its colour bar and notes."""
        scale = self.panels.scale
        mappable = ScalarMappable(colour_norm(scale), colours)
        options: dict[str, Any] = {"extend": "max" if scale.is_cut else "neither", "label": self.label}
        if self.is_bar_below:
            axes = self._place(0.25, self.bar_top, self.width - 0.5, _BAR)
            bar = self.figure.colorbar(mappable, axes, orientation="horizontal", **options)
        else:
            top, bottom = self.header, (self.rows - 1) * self.row_height + self.header + self.panel_height
            height = min(bottom - top, 3.0)
            axes = self._place(self.bar_left, (top + bottom - height) / 2, _BAR, height)
            bar = self.figure.colorbar(mappable, axes, **options)
        bar.minorticks_off()
        # else viewers show the page between the bands
        bar.solids.set_edgecolor("face")  # pyright: ignore[reportOptionalMemberAccess]
        set_ticks(bar.long_axis, scale.ticks)
        for mark in self.marks:
            self._mark_bar(bar.ax, mark)
        self._text(0.05, self.height - 0.04 - text_height(self.note), self.note, color=QUIET)
        return self.figure

    def _mark_bar(self, axes: Axes, mark: Reference) -> None:
        if self.is_bar_below:
            axes.axvline(mark.value, color="black", linewidth=0.8, path_effects=outline())
            place = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            axes.text(mark.value, 1.3, mark.short, **place)
        else:
            axes.axhline(mark.value, color="black", linewidth=0.8, path_effects=outline())
            place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
            axes.text(-0.3, mark.value, _narrow(mark.label), **place)

    def _panel_axes(self, number: int, panel: Panel, options: dict[str, Any]) -> Axes:
        row, column = divmod(number, self.across)
        left, top = self.left + column * (self.panel_width + self.between), row * self.row_height
        middle = left + self.panel_width / 2
        self._text(middle, top + self.title_height, self.titles[number], size=TITLE, ha="center", va="bottom")
        self._text(middle, top + self.title_height + 0.02, self.panel_notes[number], color=QUIET, ha="center")
        return self._place(left, top + self.header, self.panel_width, self.panel_height, **options)

    def _place(self, left: float, top: float, width: float, height: float, **options: Any) -> Axes:
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box, **options)

    def _text(self, left: float, top: float, text: str, *, va: str = "top", **options: Any) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, text, va=va, **options)


class Single:
    """One pair of axes in a column; a single series is named above them, several in a legend below.

    Args:
        names: Of the series; lines after the first are notes.
        notes: What must be said below the figure.
        left: Room for the labels at the left.
        height: Of the axes.
        beside: Room left of the column for other axes; what must be said then stands below both.
        above: Room for labels above the axes.
        below: Room for labels below the axes.
        width: Of the page; None is a column.
    """

    def __init__(
        self,
        names: Sequence[str],
        notes: Sequence[str],
        *,
        left: float = 0.55,
        height: float = 1.9,
        beside: float = 0.0,
        above: float = 0.0,
        below: float = 0.36,
        width: Width = None,
    ) -> None:
        column = _width_of(width, COLUMN)
        self.beside, self.width, self.labels_above = beside, column + beside, above
        self.names = [_paragraphs(name.split("\n"), column - 0.5) for name in names]
        title, *under = names[0].split("\n")
        self.title, self.under = wrapped(title, column - left, TITLE), _paragraphs(under, column - left)
        self.note = _paragraphs(notes, self.width)
        legend = sum(map(text_height, self.names)) + 0.03 * len(names) if len(names) > 1 else 0.0
        titled = 0.12 + 1.15 * text_height(self.title) + text_height(self.under)
        self.above = top = above + (0.08 if len(names) > 1 else titled)
        self.legend_top = legend + text_height(self.note) + 0.10
        self.height = top + height + below + self.legend_top
        self.figure = Figure(figsize=(self.width, self.height))
        self.axes = self.place(beside + left, top, column - left - 0.10, height)

    def place(self, left: float, top: float, width: float, height: float) -> Axes:
        """More axes."""
        bottom = self.height - top - height
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def style(self, number: int) -> dict[str, Any]:
        """Colour, dashes and name of one series."""
        dashes = DASHES[number % len(DASHES)]
        return {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes, "label": self.names[number]}

    def finished(self) -> Figure:
        """The figure, with its legend or title, and its notes."""
        if len(self.names) > 1:
            self.figure.legend(
                loc="upper left",
                bbox_to_anchor=((self.beside + 0.05) / self.width, self.legend_top / self.height),
                frameon=False,
                borderpad=0,
                borderaxespad=0,
                labelspacing=0.25,
                handlelength=2.6,
            )
        else:
            base = 3 + 72 * self.labels_above
            self.axes.set_title(self.under, fontsize=BODY, color=QUIET, pad=base)
            up = base + text_height(self.under) * 72
            self.axes.annotate(
                self.title,
                (0.5, 1),
                (0, up),
                xycoords="axes fraction",
                textcoords="offset points",
                ha="center",
                va="bottom",
                size=TITLE,
            )
        top = (0.04 + text_height(self.note)) / self.height
        self.figure.text(0.05 / self.width, top, self.note, color=QUIET, va="top")
        return self.figure


def set_ticks(axis: Axis, ticks: Sequence[tuple[float, str]]) -> None:
    """Put ticks, each a position and a text, on an axis."""
    axis.set_ticks([position for position, _ in ticks], [text for _, text in ticks])


def outline() -> list[patheffects.AbstractPathEffect]:
    """A white rim that keeps text readable on any colour."""
    return [patheffects.withStroke(linewidth=1.2, foreground="white", alpha=0.9)]


def colour_norm(scale: Scale) -> Normalize:
    """From values to places on the colour scale."""
    return (LogNorm if scale.is_log else Normalize)(scale.low, scale.high)


def _width_of(width: Width, usual: float) -> float:
    return {"one-column": COLUMN, "two-column": PAGE, None: usual}[width]


def _narrow(label: str) -> str:
    """A name beside the colour bar, its words below each other if it is long."""
    return label.replace(" ", "\n") if len(label) > 8 else label


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is: no formulas, and no leading underscore, which would hide it from legends."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def wrapped(text: str, width: float, size: float = BODY) -> str:
    """Text as matplotlib takes it, in lines of at most a width in inches if its words allow."""
    first, *words = _plain(text).split(" ")
    lines = [first]
    for word in words:
        longer = f"{lines[-1]} {word}"
        lines[-1:] = [longer] if text_width(longer, size) <= width else [lines[-1], word]
    return "\n".join(lines)


def _paragraphs(notes: Sequence[str], width: float) -> str:
    return "\n".join(wrapped(note, 0.97 * width) for note in notes)


@cache
def text_width(text: str, size: float = BODY) -> float:
    """Inches that text takes in the font of all figures, its longest line if there are several."""
    font = FontProperties(family=_OWN["font.family"], size=size)
    return max(_ruler().get_text_width_height_descent(line, font, False)[0] for line in text.split("\n")) / _RULER_DPI


@cache
def _ruler() -> RendererAgg:
    return RendererAgg(1, 1, _RULER_DPI)


def text_height(text: str) -> float:
    """Inches that body text takes."""
    return LINE * (text.count("\n") + 1) if text else 0.0
