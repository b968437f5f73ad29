"""Figures for print, by matplotlib. Every size is in inches, so that nothing needs scaling on the page.

Figures are laid out by hand from the top down and never touch pyplot, so nothing global changes.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import EngFormatter, MaxNLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from .._typing import Float
from ._prepare import COLOURS, Layers, Lines, Panel, Panels, Reference, Scale, columns

COLUMN, PAGE = 3.3, 6.9  # inches: one column and the full text width of most journals
LEVELS = 20  # bands of a contour map
HEIGHT = 0.6  # of the box around a surface, by its sides

_TITLE, _BODY = 8.0, 7.0  # points
_LINE = 0.117  # inches from one line of body text to the next
_BAR, _BAR_LABELS = 0.10, 0.52  # inches: the colour bar, and what stands to its right
_RULER_DPI = 300
_QUIET = "0.35"
_ABOVE = "0.82"  # where a map is cut
_DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vPX"
_LIGHT = np.array([-0.50, -0.40, 0.77])  # towards the light, in a box whose sides are about 1

_OWN = {
    "font.family": "DejaVu Sans",
    "font.size": _BODY,
    "axes.labelsize": _BODY,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.4,
    "legend.fontsize": _BODY,
    "lines.linewidth": 1.1,
    "pdf.fonttype": 42,  # TrueType, which journals ask for
    "savefig.dpi": 300,
    "svg.hashsalt": "fisherscope",  # the same file from the same data
    "xtick.labelsize": _BODY,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.labelsize": _BODY,
    "ytick.major.size": 2.5,
    "ytick.major.width": 0.6,
}
_MACHINE = ("animation", "backend", "date", "datapath", "interactive", "savefig.directory", "timezone", "toolbar", "webagg")
# The look must not depend on a matplotlibrc of the reader either.
_STYLE = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith(_MACHINE)} | _OWN


@matplotlib.rc_context(_STYLE)
def surface(panels: Panels) -> Figure:
    """One 3-D surface per landscape, from one camera, cut where the scale ends."""
    page = _Page(panels, most=3, aspect=0.74, below=0.2)
    for panel, axes in page.axes(projection="3d", computed_zorder=False):
        _draw_surface(axes, panel, panels.scale)
    return page.finished(_colours())


@matplotlib.rc_context(_STYLE)
def contour(panels: Panels) -> Figure:
    """One filled contour map per landscape; grey where the scale ends, hatched where there is no number."""
    page = _Page(panels, most=4, aspect=1.0, left=0.48, between=0.12, below=0.42)
    shared = len({tuple(step for s in panel.steps for step in s[[0, -1]]) for panel in panels.panels}) == 1
    for number, (panel, axes) in enumerate(page.axes()):
        _draw_contour(axes, panel, panels.scale)
        axes.set_xlabel("step along direction 1")
        if number % page.across == 0:
            axes.set_ylabel("step along direction 2", labelpad=1)
        elif shared:
            axes.set_yticklabels([])
    return page.finished(_colours(LEVELS))


@matplotlib.rc_context(_STYLE)
def curves(panels: Panels) -> Figure:
    """All landscapes of one axis as lines in one pair of axes."""
    scale = panels.scale
    single = _Single([f"{panel.title}\n{', '.join(panel.notes)}" for panel in panels.panels], panels.notes)
    for number, panel in enumerate(panels.panels):
        single.axes.plot(panel.steps[0], panel.losses, **single.style(number))
        if panel.centre is not None:
            single.axes.plot(0, panel.centre, "o", color="black", markersize=2.5, zorder=5)
    ends = [step for panel in panels.panels for step in panel.steps[0]]
    margin = 0.05 * (scale.high - scale.low)
    single.axes.set(xlabel="step along direction 1", ylabel=scale.label, xlim=(min(ends), max(ends)))
    single.axes.set_ylim(scale.low - margin, scale.high + (0 if scale.is_cut else margin))
    for reference in _inside(panels.references, scale):
        _mark_level(single.axes, reference)
    _set_ticks(single.axes.yaxis, scale)
    return single.finished()


@matplotlib.rc_context(_STYLE)
def sorted_scores(lines: Lines) -> Figure:
    """Scores in ascending order, one curve per model."""
    single = _Single([line.title for line in lines.lines], lines.notes)
    for number, line in enumerate(lines.lines):
        style = single.style(number)
        marker = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 2.0} if lines.has_markers else {}
        single.axes.plot(line.x, line.y, **style, **marker)
    single.axes.set(xlabel=lines.x_label, ylabel=lines.y_label)
    single.axes.margins(x=0.01)
    if lines.is_log:
        single.axes.set_yscale("log")
    if lines.is_share:
        single.axes.set_xlim(0, 1)
    else:
        single.axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return single.finished()


@matplotlib.rc_context(_STYLE)
def layer_scores(layers: Layers) -> Figure:
    """Mean score by layer, the first at the top; dots, since a logarithmic axis has no zero for bars to stand on."""
    left, height = 0.15 + max(map(_text_width, layers.labels)), 0.1 + 0.15 * len(layers.labels)
    single = _Single([series.title for series in layers.series], layers.notes, left=left, height=height)
    for number, series in enumerate(layers.series):
        style = single.style(number) | {"linestyle": "none", "marker": _MARKERS[number % len(_MARKERS)], "markersize": 3.5}
        single.axes.plot(series.y, series.x, **style)
    single.axes.set_yticks(range(len(layers.labels)), layers.labels)
    single.axes.set(xlabel=layers.value_label, ylim=(len(layers.labels) - 0.5, -0.5))
    single.axes.grid(axis="y", color="0.85", linewidth=0.5)
    single.axes.tick_params(axis="y", length=0)
    single.axes.set_xscale("log")
    return single.finished()


@matplotlib.rc_context(_STYLE)
def save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure as ``.pdf``, ``.png`` or ``.svg``, the same bytes every time."""
    metadata: dict[str, Any] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}[suffix]
    figure.savefig(path, format=suffix[1:], metadata=metadata)


class _Page:
    """Panels in rows under their titles and notes, one colour bar at the right, what concerns all of them below.

    Args:
        panels: What is drawn.
        most: Panels in a row.
        aspect: Height of a panel by its width.
        left: Room for the labels left of each row.
        between: Room between the panels of a row.
        below: Room for the labels below each row.
    """

    def __init__(
        self, panels: Panels, *, most: int, aspect: float, left: float = 0.0, between: float = 0.0, below: float = 0.0
    ) -> None:
        self.panels, count = panels, len(panels.panels)
        self.across = columns(count, most)
        self.rows = math.ceil(count / self.across)
        self.width = COLUMN if count == 1 else PAGE
        self.marks = _inside(panels.references, panels.scale)
        marked = max((_text_width(_narrow(mark.label)) for mark in self.marks), default=0.0)
        self.bar_left = self.width - _BAR_LABELS - _BAR
        self.left, self.between = left, between
        self.panel_width = (self.bar_left - marked - 0.12 - left - between * (self.across - 1)) / self.across
        self.panel_height = aspect * self.panel_width
        self.titles = [_wrapped(panel.title, self.panel_width, _TITLE) for panel in panels.panels]
        self.title_height = 0.05 + 1.15 * _LINE * (1 + max(title.count("\n") for title in self.titles))
        self.header = self.title_height + 0.05 + _LINE * max(len(panel.notes) for panel in panels.panels)
        self.row_height = self.header + self.panel_height + below
        self.note = _paragraphs(panels.notes, self.width)
        self.height = self.rows * self.row_height + 0.08 + _text_height(self.note)
        self.figure = Figure(figsize=(self.width, self.height))

    def axes(self, **options: Any) -> list[tuple[Panel, Any]]:
        """Every panel with its axes, titled."""
        return [(panel, self._panel_axes(number, panel, options)) for number, panel in enumerate(self.panels.panels)]

    def finished(self, colours: Colormap) -> Figure:
        """The figure, with its colour bar and notes."""
        top, bottom = self.header, (self.rows - 1) * self.row_height + self.header + self.panel_height
        height = min(bottom - top, 3.0)
        scale, axes = self.panels.scale, self._place(self.bar_left, (top + bottom - height) / 2, _BAR, height)
        mappable = ScalarMappable(Normalize(scale.low, scale.high), colours)
        bar = self.figure.colorbar(mappable, axes, extend="max" if scale.is_cut else "neither", label=scale.label)
        _set_ticks(bar.ax.yaxis, scale)
        for mark in self.marks:
            bar.ax.axhline(mark.value, color="black", linewidth=0.8, path_effects=_outline())
            bar.ax.text(-0.3, mark.value, _narrow(mark.label), ha="right", va="center",
                        transform=bar.ax.get_yaxis_transform())  # fmt: skip
        self._text(0.05, self.height - 0.04 - _text_height(self.note), self.note, color=_QUIET)
        return self.figure

    def _panel_axes(self, number: int, panel: Panel, options: dict[str, Any]) -> Axes:
        row, column = divmod(number, self.across)
        left, top = self.left + column * (self.panel_width + self.between), row * self.row_height
        middle = left + self.panel_width / 2
        self._text(middle, top + self.title_height, self.titles[number], size=_TITLE, ha="center", va="bottom")
        self._text(middle, top + self.title_height + 0.02, "\n".join(panel.notes), color=_QUIET, ha="center")
        return self._place(left, top + self.header, self.panel_width, self.panel_height, **options)

    def _place(self, left: float, top: float, width: float, height: float, **options: Any) -> Axes:
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box, **options)

    def _text(self, left: float, top: float, text: str, **options: Any) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, text, **({"va": "top"} | options))


class _Single:
    """One pair of axes in a column; a single series is named above them, several in a legend below.

    Args:
        names: Of the series; lines after the first are notes.
        notes: What must be said below the figure.
        left: Room for the labels at the left.
        height: Of the axes.
    """

    def __init__(self, names: Sequence[str], notes: Sequence[str], *, left: float = 0.55, height: float = 1.9) -> None:
        self.names = ["\n".join(_wrapped(line, COLUMN - 0.5) for line in name.split("\n")) for name in names]
        self.note = _paragraphs(notes, COLUMN)
        legend = sum(map(_text_height, self.names)) + 0.03 * len(names) if len(names) > 1 else 0.0
        above = 0.08 if len(names) > 1 else 0.12 + _text_height(self.names[0])
        self.legend_top = legend + _text_height(self.note) + 0.10
        self.height = above + height + 0.36 + self.legend_top
        self.figure = Figure(figsize=(COLUMN, self.height))
        box = (left, self.legend_top + 0.36, COLUMN - left - 0.10, height)
        self.axes = self.figure.add_axes((box[0] / COLUMN, box[1] / self.height, box[2] / COLUMN, box[3] / self.height))

    def style(self, number: int) -> dict[str, Any]:
        """Colour, dashes and name of one series."""
        dashes = _DASHES[number % len(_DASHES)]
        return {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes, "label": self.names[number]}

    def finished(self) -> Figure:
        """The figure, with its legend or title, and its notes."""
        if len(self.names) > 1:
            self.figure.legend(
                loc="upper left", bbox_to_anchor=(0.05 / COLUMN, self.legend_top / self.height), frameon=False,
                borderpad=0, borderaxespad=0, labelspacing=0.25, handlelength=2.6,
            )  # fmt: skip
        else:
            title, *rest = self.names[0].split("\n")
            self.axes.set_title("\n".join(rest), fontsize=_BODY, color=_QUIET, pad=3)
            up = 3 + _text_height("\n".join(rest)) * 72
            self.axes.annotate(title, (0.5, 1), (0, up), xycoords="axes fraction", textcoords="offset points",
                               ha="center", va="bottom", size=_TITLE)  # fmt: skip
        self.figure.text(0.05 / COLUMN, (0.04 + _text_height(self.note)) / self.height, self.note, color=_QUIET, va="top")
        return self.figure


def clipped_cells(
    x: Float[np.ndarray, "columns"], y: Float[np.ndarray, "rows"], z: Float[np.ndarray, "columns rows"], ceiling: float
) -> list[Float[np.ndarray, "corners 3"]]:
    """The cells of a grid as polygons in space, cut off exactly at the ceiling.

    Cells with a corner that is NaN, and those wholly above the ceiling, are left out.
    """
    polygons = []
    for i, j in np.ndindex(z.shape[0] - 1, z.shape[1] - 1):
        corners = np.array([(x[a], y[b], z[a, b]) for a, b in ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))])
        if not np.isnan(corners).any() and corners[:, 2].min() < ceiling:
            polygons.append(corners if corners[:, 2].max() <= ceiling else _cut(corners, ceiling))
    return polygons


def _cut(corners: Float[np.ndarray, "corners 3"], ceiling: float) -> Float[np.ndarray, "kept 3"]:
    """The part of a polygon below the ceiling (one step of Sutherland and Hodgman's clipping)."""
    kept = []
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if start[2] <= ceiling:
            kept.append(start)
        if (start[2] <= ceiling) != (end[2] <= ceiling):
            kept.append(start + (end - start) * (ceiling - start[2]) / (end[2] - start[2]))
    return np.array(kept)


def _draw_surface(axes: Any, panel: Panel, scale: Scale) -> None:
    x, y = panel.steps
    axes.set(xlim=x[[0, -1]], ylim=y[[0, -1]], zlim=(scale.low, scale.high))
    polygons = clipped_cells(x, y, panel.losses, scale.high)
    if polygons:
        colours = _shaded(polygons, np.array([np.ptp(x), np.ptp(y), np.ptp((scale.low, scale.high)) / HEIGHT]), scale)
        edges = 0.75 * colours if len(polygons) <= 1000 else colours
        axes.add_collection3d(Poly3DCollection(polygons, facecolors=colours, edgecolors=edges, linewidths=0.2, rasterized=True))
    _mark_centre_3d(axes, panel, scale)
    axes.view_init(elev=36, azim=-52)
    axes.set_box_aspect((1, 1, HEIGHT), zoom=1.1)
    axes.tick_params(pad=-3)
    axes.set_xlabel("step along direction 1", labelpad=-7)
    axes.set_ylabel("step along direction 2", labelpad=-7)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color("0.97")
        axis.line.set(color="0.5", linewidth=0.5)
        axis._axinfo["grid"].update(color="0.85", linewidth=0.4)  # the only way to thin the grid of 3-D axes
    _set_step_ticks(axes.xaxis, x)
    _set_step_ticks(axes.yaxis, y)
    ticks = scale.ticks or [(tick, f"{tick:g}") for tick in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(scale.low, scale.high)]
    axes.zaxis.set_ticks([t for t, _ in ticks], [text for _, text in ticks])
    axes.set_zlim(scale.low, scale.high)
    axes.set_zlabel(scale.metric, labelpad=-9 + 72 * max(_text_width(text) for _, text in ticks)/2)


def _shaded(polygons: Sequence[np.ndarray], box: np.ndarray, scale: Scale) -> np.ndarray:
    """Colours by height, up to a quarter darker where a polygon turns from the light."""
    heights = np.array([polygon[:, 2].mean() for polygon in polygons])
    normals = np.array([np.cross(p / box, np.roll(p / box, -1, axis=0)).sum(axis=0) for p in polygons])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    brightness = 0.75 + 0.25 * np.clip(normals @ _LIGHT, 0, 1)
    return _colours()(Normalize(scale.low, scale.high)(heights))[:, :3] * brightness[:, None]


def _mark_centre_3d(axes: Any, panel: Panel, scale: Scale) -> None:
    if panel.centre is None or panel.centre > scale.high:
        return
    top = panel.centre + 0.45 * (scale.high - scale.low)
    axes.plot([0, 0], [0, 0], [panel.centre, top], color="black", linewidth=0.6, zorder=10)
    axes.plot([0], [0], [panel.centre], "o", color="black", markersize=2, zorder=10)
    axes.text(0, 0, top, "θ", ha="center", va="bottom", zorder=11, path_effects=_outline())


def _draw_contour(axes: Axes, panel: Panel, scale: Scale) -> None:
    x, y = panel.steps
    axes.set(xlim=x[[0, -1]], ylim=y[[0, -1]], aspect="equal", facecolor="white")
    axes.patch.set(hatch="/////", edgecolor="0.7")
    if np.isfinite(panel.losses).any():
        levels = np.linspace(scale.low, scale.high, LEVELS + 1)
        axes.contourf(x, y, panel.losses.T, levels, cmap=_colours(LEVELS), extend="max" if scale.is_cut else "neither")
    for reference in panel.references:
        _draw_level(axes, panel, reference)
    if panel.centre is not None:
        axes.plot(0, 0, "o", color="black", markersize=2.5, markeredgecolor="white", markeredgewidth=0.5)
        axes.annotate("θ", (0, 0), (3, 2), textcoords="offset points", path_effects=_outline())
    _set_step_ticks(axes.xaxis, x)
    _set_step_ticks(axes.yaxis, y)
    first, *_, last = axes.get_xticklabels()  # turned inwards, so that they do not touch the next panel's
    first.set_ha("left")
    last.set_ha("right")


def _draw_level(axes: Axes, panel: Panel, reference: Reference) -> None:
    """A line where the loss has a value, named once even if every piece is shorter than its name."""
    lines = axes.contour(*panel.steps, panel.losses.T, [reference.value], colors="black", linewidths=0.8)
    lines.set_path_effects(_outline())
    texts = list(axes.clabel(lines, fmt=reference.label, fontsize=_BODY))
    if not texts:
        points = lines.get_paths()[0].vertices
        x, y = points[np.hypot(*points.T).argmin()]
        sides = {"ha": "right" if x > 0 else "left", "va": "top" if y > 0 else "bottom"}
        texts = [axes.annotate(reference.label, (x, y), (-2 * np.sign(x), -2 * np.sign(y)), textcoords="offset points", **sides)]
    for text in texts:
        text.set_path_effects(_outline())


def _mark_level(axes: Axes, reference: Reference) -> None:
    axes.axhline(reference.value, color="black", linewidth=0.6, linestyle=(0, (4, 2)), zorder=1)
    axes.annotate(f"{reference.label} = {reference.value:.3g}", (1, reference.value), (-3, 1.5), color=_QUIET, ha="right",
                  xycoords=("axes fraction", "data"), textcoords="offset points", path_effects=_outline())  # fmt: skip


def _set_ticks(axis: Axis, scale: Scale) -> None:
    if scale.ticks is not None:
        axis.set_ticks([position for position, _ in scale.ticks], [text for _, text in scale.ticks])


def _set_step_ticks(axis: Axis, steps: np.ndarray) -> None:
    """Both ends and the model itself, if it is on the axis."""
    ticks = [step for step in (steps[0], 0.0, steps[-1]) if steps[0] <= step <= steps[-1]]
    axis.set_ticks(ticks, [f"{step:g}".replace("-", "\N{MINUS SIGN}") for step in ticks])


def _inside(references: Sequence[Reference], scale: Scale) -> list[Reference]:
    return [reference for reference in references if scale.low <= reference.value <= scale.high]


def _colours(levels: int | None = None) -> Colormap:
    return matplotlib.colormaps["viridis"].resampled(levels or 256).with_extremes(over=_ABOVE)


def _outline() -> list[patheffects.AbstractPathEffect]:
    """A white rim that keeps text readable on any colour."""
    return [patheffects.withStroke(linewidth=1.2, foreground="white", alpha=0.9)]


def _narrow(label: str) -> str:
    """A name beside the colour bar, its words below each other if it is long."""
    return label.replace(" ", "\n") if len(label) > 8 else label


def _wrapped(text: str, width: float, size: float = _BODY) -> str:
    """Text broken into lines of at most a width in inches, if its words allow."""
    first, *words = text.split(" ")
    lines = [first]
    for word in words:
        longer = f"{lines[-1]} {word}"
        lines[-1:] = [longer] if _text_width(longer, size) <= width else [lines[-1], word]
    return "\n".join(lines)


def _paragraphs(notes: Sequence[str], width: float) -> str:
    return "\n".join(_wrapped(note, width - 0.1) for note in notes)


@cache
def _text_width(text: str, size: float = _BODY) -> float:
    """Inches that text takes in the font of all figures, its longest line if there are several."""
    font = FontProperties(family=_OWN["font.family"], size=size)
    return max(_ruler().get_text_width_height_descent(line, font, False)[0] for line in text.split("\n")) / _RULER_DPI


@cache
def _ruler() -> RendererAgg:
    return RendererAgg(1, 1, _RULER_DPI)


def _text_height(text: str) -> float:
    """Inches that body text takes."""
    return _LINE * (text.count("\n") + 1) if text else 0.0
