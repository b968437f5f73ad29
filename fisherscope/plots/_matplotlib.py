"""Figures for print, by matplotlib, made without pyplot, so that nothing global changes."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FormatStrFormatter,
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)
from matplotlib.transforms import Bbox
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from .._typing import Float
from ..landscape.surface import Marker
from ._matplotlib_layout import (
    BODY,
    COLUMN,
    MARKERS,
    PAGE,
    QUIET,
    STYLE,
    TITLE,
    Page,
    Single,
    colour_norm,
    outline,
    set_ticks,
    text_height,
    text_width,
    wrapped,
)
from ._prepare import (
    COLOURS,
    Compared,
    Histogram,
    Layers,
    Lines,
    Panel,
    Panels,
    Parameters,
    Reference,
    Scale,
    Sites,
    decades,
    spread,
)
from ._prepare_landscapes import interpolated, marker_notes

__all__ = [
    "comparison",
    "contour",
    "curves",
    "dropout_sites",
    "layer_scores",
    "parameter_scores",
    "save",
    "sorted_scores",
    "stability",
    "surface",
]

LEVELS = 20  # bands of a contour map
HEIGHT = 0.6  # of the box around a surface, by its sides

_ABOVE = "0.82"  # grey, where a map is cut
_MARKER = COLOURS[1]  # of other models: stands out from all colours of a map, and from white
_DOTS = (0, (1, 1.2))
_LIGHT = np.array([-0.50, -0.40, 0.77])  # towards the light, in a box whose sides are about 1


@matplotlib.rc_context(STYLE)
def surface(panels: Panels) -> Figure:
    """One 3-D surface per landscape, from one camera, cut where the scale ends."""
    kinds = [dict.fromkeys(panel.labels[k] for panel in panels.panels) for k in (0, 1)]
    names = [
        f"direction {k}: {' / '.join(each)}"
        for k, each in enumerate(kinds, 1)
        if f"step along direction {k}" not in each
    ]
    page = Page(panels, most=3, aspect=0.72, left=0.08, between=0.05, below=0.36, notes=[*names, *marker_notes(panels)])
    step = "step along " if page.panel_width > 2 else ""  # long labels would meet those of the next box
    for panel, axes in page.axes(projection="3d", computed_zorder=False):
        _draw_surface(axes, panel, panels.scale)
        axes.set_xlabel(f"{step}direction 1", labelpad=-5)
        axes.set_ylabel(f"{step}direction 2", labelpad=-5)
    return page.finished(_colours())


@matplotlib.rc_context(STYLE)
def contour(panels: Panels) -> Figure:
    """One filled contour map per landscape; grey where the scale ends, hatched where there is no number."""
    grids = [panel.steps for panel in panels.panels]
    numbers = max(text_width(text) for _, y in grids for _, text in _step_ticks(y)) + 0.1
    is_shared = len({(panel.labels[1], *panel.steps[1][[0, -1]]) for panel in panels.panels}) == 1
    is_isometric = all(panel.is_isometric for panel in panels.panels)
    x_labels, y_labels = ([_short_lines(panel.labels[k]) for panel in panels.panels] for k in (0, 1))
    y_label = 0.06 + max(map(text_height, y_labels))
    is_full = all(np.isfinite(panel.losses).all() for panel in panels.panels)
    notes = ["dots: points that were measured"] if any(p.measured is not None for p in panels.panels) else []
    page = Page(
        panels,
        most=4,
        aspect=min(1.5, max(float(np.ptp(y) / np.ptp(x)) for x, y in grids)) if is_isometric else 1.0,
        left=numbers + y_label,
        between=0.12 if is_shared else numbers + (0.0 if len(set(y_labels)) == 1 else y_label),
        below=0.30 + max(map(text_height, x_labels)),
        above=0.0 if panels.relative is None else 0.33,
        notes=(
            *_relative_note(panels),
            *marker_notes(panels),
            *notes,
            *([] if is_full else ["hatched where there is no number"]),
        ),
    )
    for number, (panel, axes) in enumerate(page.axes()):
        axes.set_aspect("equal" if is_isometric else "auto")
        _draw_contour(axes, panel, panels.scale)
        axes.set_xlabel(x_labels[number])
        if number % page.across == 0 or len(set(y_labels)) > 1:
            axes.set_ylabel(y_labels[number], labelpad=1)
        elif is_shared:
            axes.set_yticklabels([])
        if panels.relative is not None:
            top = _add_relative_axis(axes, panels.relative)
            set_ticks(top.xaxis, [(panels.relative * step, text) for step, text in _relative_ticks(axes, panels)])
            _turn_inwards(top)
    return page.finished(_colours(LEVELS))


@matplotlib.rc_context(STYLE)
def curves(panels: Panels) -> Figure:
    """All landscapes of one axis as lines in one pair of axes."""
    scale = panels.scale
    single = Single(
        [f"{panel.title}\n{', '.join(panel.notes)}" for panel in panels.panels],
        (*panels.notes, *_relative_note(panels), *_curve_notes(panels), *marker_notes(panels)),
        height=1.9 if panels.width != "two-column" else 2.5,
        above=0.0 if panels.relative is None else 0.33,
        width=panels.width,
    )
    margin = 0.05 * (scale.high - scale.low)
    ends = [step for panel in panels.panels for step in panel.steps[0]]
    single.axes.set(xlim=(min(ends), max(ends)))
    single.axes.set_ylim(scale.low - margin, scale.high + (0 if scale.is_cut else margin))
    for number, panel in enumerate(panels.panels):
        _draw_curve(single.axes, panel, single.style(number), panels.are_few)
    labels = list(dict.fromkeys(panel.labels[0] for panel in panels.panels))
    single.axes.set(xlabel=labels[0] if len(labels) == 1 else "step along the direction", ylabel=scale.label)
    for reference in panels.references:
        _mark_level(single.axes, reference)
    set_ticks(single.axes.yaxis, scale.ticks)
    single.axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _step_text(step)))
    if panels.relative is not None:
        top = _add_relative_axis(single.axes, panels.relative)
        top.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], symmetric=True))
        top.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{abs(size):g}"))
    return single.finished()


@matplotlib.rc_context(STYLE)
def sorted_scores(lines: Lines) -> Figure:
    """Scores in ascending order, one curve per model."""
    single = Single([line.title for line in lines.lines], lines.notes)
    for number, line in enumerate(lines.lines):
        style = single.style(number)
        marker = {"marker": MARKERS[number % len(MARKERS)], "markersize": 2.0} if lines.has_markers else {}
        single.axes.plot(line.x, line.y, **style, **marker)
    single.axes.set(xlabel=lines.x_label, ylabel=lines.y_label)
    single.axes.margins(x=0.01)
    if lines.is_log:
        single.axes.set_yscale("log")
    if lines.is_share:
        single.axes.set_xlim(-0.01, 1.01)
    else:
        single.axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return single.finished()


@matplotlib.rc_context(STYLE)
def parameter_scores(parameters: Parameters) -> Figure:
    """Mean score by parameter, every other layer shaded."""
    labels = parameters.labels(20)
    below = 0.34 + max((text_width(text) for _, text in labels), default=0.02)
    single = Single([line.title for line in parameters.lines], parameters.notes, left=0.65, below=below)
    for number, line in enumerate(parameters.lines):
        look = {"linestyle": "none", "marker": MARKERS[number % len(MARKERS)], "markersize": 2.5}
        look |= {"markerfacecolor": "none", "markeredgewidth": 0.7} if number else {"markeredgewidth": 0}
        single.axes.plot(line.x, line.y, **single.style(number) | look)
    single.axes.set(xlabel=parameters.x_label, ylabel=parameters.value_label, yscale="log")
    single.axes.set_xlim(0.5, max(len(line.x) for line in parameters.lines) + 0.5)
    for _, first, last in parameters.layers[::2]:
        single.axes.axvspan(first - 0.5, last + 0.5, color="0.94", linewidth=0, zorder=0)
    _label_few(single.axes.yaxis)
    if labels:
        set_ticks(single.axes.xaxis, labels)
        single.axes.tick_params(axis="x", length=0, rotation=90)
    return single.finished()


@matplotlib.rc_context(STYLE)
def layer_scores(layers: Layers) -> Figure:
    """Mean score by layer, the first at the top; dots, since a logarithmic axis has no zero for bars to stand on."""
    row = max(0.15, 0.06 * (len(layers.series) + 1))
    left, height = 0.15 + max(map(text_width, layers.labels)), 0.1 + row * len(layers.labels)
    single = Single([series.title for series in layers.series], layers.notes, left=left, height=height)
    for number, (series, ends) in enumerate(zip(layers.series, layers.ranges, strict=True)):
        look, rows = single.style(number), layers.rows(number)
        dots = {"linestyle": "none", "marker": MARKERS[number % len(MARKERS)], "markersize": 3.5}
        single.axes.plot(series.y, rows, **look | dots)
        if ends is not None:
            single.axes.hlines(rows, *ends, color=look["color"], linewidth=0.8)
    single.axes.set_yticks(range(len(layers.labels)), layers.labels)
    single.axes.set(xlabel=layers.value_label, ylim=(len(layers.labels) - 0.5, -0.5))
    single.axes.grid(axis="y", color="0.85", linewidth=0.5)
    single.axes.tick_params(axis="y", length=0)
    single.axes.set_xscale("log")
    _label_few(single.axes.xaxis)
    return single.finished()


def _label_few(axis: Axis) -> None:
    """On a logarithmic axis: powers of ten; where they are few, three times them too, or round numbers instead."""
    low, high = axis.get_view_interval()
    if high < 8 * low:
        axis.set_major_locator(MaxNLocator(3))
        axis.set_major_formatter(FormatStrFormatter("%.2g"))
    elif high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf)))
    axis.set_minor_formatter(NullFormatter())


@matplotlib.rc_context(STYLE)
def stability(lines: Lines) -> Figure:
    """Expected overlap by number of examples, one line per mask."""
    single = Single([line.title for line in lines.lines], lines.notes)
    for number, line in enumerate(lines.lines):
        style = single.style(number) | {"marker": MARKERS[number % len(MARKERS)], "markersize": 2.5}
        single.axes.plot(line.x, line.y, **style)
    single.axes.set(xlabel=lines.x_label, ylabel=lines.y_label, xscale="log")
    for name, height in lines.levels:
        single.axes.axhline(height, color=QUIET, linewidth=0.6, linestyle=_DOTS, zorder=1)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        single.axes.annotate(name, (0.98, height), (0, 1.5), color=QUIET, path_effects=outline(), **place)
    single.axes.set_ylim(top=1.0)
    ticks = spread(float(x) for line in lines.lines for x in line.x)
    set_ticks(single.axes.xaxis, [(tick, f"{tick:,.0f}") for tick in ticks])
    single.axes.xaxis.set_minor_formatter(NullFormatter())
    single.axes.tick_params(axis="x", which="minor", length=0)
    single.axes.grid(axis="y", color="0.85", linewidth=0.5)
    return single.finished()


@matplotlib.rc_context(STYLE)
def comparison(compared: Compared) -> Figure:
    """Agreement by layer, the first at the top, and beside it scores against each other."""
    left = 0.15 + max(map(text_width, compared.labels))
    height = max(0.1 + 0.15 * len(compared.labels), 2.2 if compared.histogram else 0.0)
    beside = PAGE - COLUMN if compared.histogram else 0.0
    shown = (*compared.series, compared.chance)
    single = Single([line.title for line in shown], compared.notes, left=left, height=height, beside=beside)
    for number, line in enumerate(compared.series):
        dots = {"linestyle": "none", "marker": MARKERS[number], "markersize": 3.5}
        single.axes.plot(line.y, line.x, **single.style(number) | dots)
    dots = {"linestyle": "none", "marker": "|", "markersize": 6, "color": QUIET}
    single.axes.plot(compared.chance.y, compared.chance.x, **single.style(len(compared.series)) | dots)
    lowest = min([0.0, *(float(y) for line in shown for y in line.y)])
    single.axes.set_yticks(range(len(compared.labels)), compared.labels)
    single.axes.set(
        xlabel=compared.value_label, ylim=(len(compared.labels) - 0.5, -0.5), xlim=(1.1 * lowest - 0.02, 1.02)
    )
    single.axes.grid(axis="y", color="0.85", linewidth=0.5)
    single.axes.tick_params(axis="y", length=0)
    if compared.histogram:
        _draw_histogram(single, compared.histogram)
    return single.finished()


@matplotlib.rc_context(STYLE)
def dropout_sites(sites: Sites) -> Figure:
    """Rates, and the scores beside them, the first site at the top."""
    labels, between, height = 0.15 + max(map(text_width, sites.labels)), 0.15, 0.1 + 0.135 * len(sites.labels)
    beside = PAGE - COLUMN if labels > COLUMN / 2 else 0.0
    width = (COLUMN + beside - labels - between - 0.10) / 2
    single = Single([""], sites.notes, left=labels + width + between - beside, height=height, beside=beside)
    rates, rows = single.place(labels, single.above, width, height), np.arange(len(sites.labels))
    rates.hlines(rows, 0, sites.rates, color=COLOURS[0])
    rates.plot(sites.rates, rows, "o", color=COLOURS[0], markersize=3.0, clip_on=False)
    rates.set(xlabel="dropout rate", xlim=(0, 1.1 * max(*sites.rates, 0.01)))
    rates.set_yticks(rows, sites.labels)
    rates.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    rates.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    is_shown = sites.scores > 0
    single.axes.plot(sites.scores[is_shown], rows[is_shown], "s", color=COLOURS[1], markersize=3.0)
    single.axes.set(xlabel="Fisher score", xscale="log", yticks=[])
    _label_few(single.axes.xaxis)
    for axes in (rates, single.axes):
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_label_coords(0.5, -0.24 / height)  # else exponents push one of the two down
        for first, end in sites.layers[::2]:
            axes.axhspan(first - 0.5, end - 0.5, color="0.94", linewidth=0, zorder=0)
    return single.finished()


@matplotlib.rc_context(STYLE)
def save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure as ``.pdf``, ``.png`` or ``.svg``, the same bytes every time."""
    metadata: dict[str, Any] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}[suffix]
    figure.savefig(path, format=suffix[1:], metadata=metadata)


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


def _draw_histogram(single: Single, histogram: Histogram) -> None:
    x_label, y_label = (wrapped(label, 1.9) for label in histogram.labels)
    left, top = 0.45 + text_height(y_label), single.above
    side = single.beside - left - 0.65
    axes = single.place(left, top, side, side)
    edges = histogram.edges
    counts = np.ma.masked_equal(histogram.counts.T, 0)
    mesh = axes.pcolormesh(
        edges, edges, counts, norm=LogNorm(1, max(2, counts.max())), cmap=_colours(), rasterized=True
    )
    axes.plot(edges[[0, -1]], edges[[0, -1]], color="black", linewidth=0.6)
    for draw, mark in zip((axes.axvline, axes.axhline), histogram.marks, strict=True):
        draw(mark, color="black", linewidth=0.6, linestyle=(0, (4, 2)))
    axes.set(xlim=edges[[0, -1]], ylim=edges[[0, -1]])
    axes.set(xlabel=x_label, ylabel=y_label)
    ticks = [(float(k), f"$10^{{{k}}}$") for k in decades(edges[0], edges[-1])]
    for axis in (axes.xaxis, axes.yaxis):
        set_ticks(axis, ticks)
    place = {"xy": (histogram.marks[0], 0), "xycoords": ("data", "axes fraction"), "xytext": (-3, 3)}
    axes.annotate(histogram.mark_label, **place, textcoords="offset points", ha="right", path_effects=outline())
    bar = single.figure.colorbar(mesh, single.place(left + side + 0.08, top, 0.08, side), label="entries")
    bar.ax.minorticks_off()


def _draw_surface(axes: Any, panel: Panel, scale: Scale) -> None:
    x, y = panel.steps
    axes.set(xlim=x[[0, -1]], ylim=y[[0, -1]], zlim=(scale.low, scale.high))
    polygons = clipped_cells(x, y, panel.losses, scale.high)
    if polygons:
        colours = _shaded(polygons, np.array([np.ptp(x), np.ptp(y), np.ptp((scale.low, scale.high)) / HEIGHT]), scale)
        edges = 0.75 * colours if len(polygons) <= 1000 else colours
        axes.add_collection3d(
            Poly3DCollection(polygons, facecolors=colours, edgecolors=edges, linewidths=0.2, rasterized=True)
        )
    _draw_path_3d(axes, panel, scale)
    _mark_centre_3d(axes, panel, scale)
    axes.view_init(elev=36, azim=-52)
    axes.set_box_aspect((1, 1, HEIGHT), zoom=1.05)
    axes.patch.set_visible(False)
    axes.tick_params(pad=-3)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color("0.97")
        axis.line.set(color="0.5", linewidth=0.5)
        axis._axinfo["grid"].update(color="0.85", linewidth=0.4)  # the only way to thin the grid of 3-D axes
    for axis, steps in ((axes.xaxis, x), (axes.yaxis, y)):  # half way out, since texts would meet in the corner
        set_ticks(axis, _step_ticks(steps / 2 if steps[0] < 0 < steps[-1] else steps))
    set_ticks(axes.zaxis, scale.box_ticks)
    axes.tick_params(axis="z", pad=24 * max(text_width(text) for _, text in scale.box_ticks) - 4.5)  # texts are centred
    axes.set_zlim(scale.low, scale.high)
    axes.text(
        x[-1], y[-1], scale.high, f"{scale.metric.replace('_', ' ')}\n", ha="center", va="bottom", linespacing=0.5
    )


def _shaded(polygons: Sequence[np.ndarray], box: np.ndarray, scale: Scale) -> np.ndarray:
    """Colours by height, up to a quarter darker where a polygon turns from the light."""
    heights = np.array([polygon[:, 2].mean() for polygon in polygons])
    normals = np.array([np.cross(p / box, np.roll(p / box, -1, axis=0)).sum(axis=0) for p in polygons])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    brightness = 0.75 + 0.25 * np.clip(normals @ _LIGHT, 0, 1)
    return _colours()(colour_norm(scale)(heights))[:, :3] * brightness[:, None]


def _mark_centre_3d(axes: Any, panel: Panel, scale: Scale) -> None:
    if panel.centre is None or panel.centre > scale.high:
        return
    top = panel.centre + 0.45 * (scale.high - scale.low)
    axes.plot([0, 0], [0, 0], [panel.centre, top], color="black", linewidth=0.6, zorder=10)
    axes.plot([0], [0], [panel.centre], "o", color="black", markersize=2, zorder=10)
    axes.text(0, 0, top, "θ", ha="center", va="bottom", size=TITLE, zorder=11, path_effects=outline())


def _draw_path_3d(axes: Any, panel: Panel, scale: Scale) -> None:
    """The markers at the height of the surface, and on it their path."""
    inside = _inside(panel)
    if not inside:
        return

    def drawn(places: Float[np.ndarray, "points 2"]) -> list[np.ndarray]:
        heights = interpolated(panel, np.clip(places, [s[0] for s in panel.steps], [s[-1] for s in panel.steps]))
        return [*places.T, np.where(heights <= scale.high, heights, np.nan)]

    places = np.array([marker.steps for marker in inside])
    if panel.connected:
        shares = np.linspace(0, 1, 20)[:, None]
        path = np.concatenate([a + shares * (b - a) for a, b in itertools.pairwise(places)] or [places])
        axes.plot(*drawn(path), color="black", linewidth=0.8, zorder=10)
    axes.plot(*drawn(places), "o", color=_MARKER, markeredgecolor="black", markeredgewidth=0.4, markersize=3, zorder=11)
    named = [inside[0], inside[-1]] if panel.connected else inside  # names of a path's points would cover each other
    for marker in {m.name: m for m in named}.values():
        x, y, z = (float(v[0]) for v in drawn(np.array([marker.steps])))
        if math.isfinite(z) and any(marker.steps):  # the model itself has its θ
            axes.text(
                x,
                y,
                z,
                f"{marker.name}\n",
                ha="center",
                va="bottom",
                linespacing=0.6,
                zorder=12,
                path_effects=outline(),
            )


def _draw_contour(axes: Axes, panel: Panel, scale: Scale) -> None:
    x, y = panel.steps
    axes.set(xlim=x[[0, -1]], ylim=y[[0, -1]], facecolor="white")
    axes.apply_aspect()
    axes.patch.set(hatch="/////", edgecolor="0.7")
    if np.isfinite(panel.losses).any():
        extend = "max" if scale.is_cut else "neither"
        style: dict[str, Any] = {"cmap": _colours(LEVELS), "norm": colour_norm(scale), "extend": extend}
        bands = axes.contourf(x, y, panel.losses.T, scale.levels(LEVELS), **style)
        bands.set(edgecolor="face", linewidth=0.3)  # else viewers show the page between the bands
    if np.nanmax(panel.losses, initial=scale.low) > scale.high:  # in grey print the highest band is as light as the cut
        axes.contour(x, y, panel.losses.T, [scale.high], colors=QUIET, linewidths=0.5)
    if panel.measured is not None:
        places = np.argwhere(panel.measured)
        axes.plot(x[places[:, 0]], y[places[:, 1]], ".", color="black", markersize=1.0, alpha=0.6)
    for reference in panel.references:
        _draw_level(axes, panel, reference)
    if panel.centre is not None:
        axes.plot(0, 0, "o", color="black", markersize=2.5, markeredgecolor="white", markeredgewidth=0.5)
        axes.annotate("θ", (0, 0), (3, 2), size=TITLE, textcoords="offset points", path_effects=outline())
    _draw_markers(axes, panel)
    set_ticks(axes.xaxis, _step_ticks(x))
    set_ticks(axes.yaxis, _step_ticks(y))
    _turn_inwards(axes)


def _turn_inwards(axes: Any) -> None:
    """Turn the texts of both ends inwards, so that they do not touch the next panel's."""
    first, *_, last = axes.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


def _inside(panel: Panel) -> list[Marker]:
    """The markers within the grid."""
    ends = [(steps[0], steps[-1]) for steps in panel.steps]
    return [m for m in panel.markers if all(a <= s <= b for s, (a, b) in zip(m.steps, ends, strict=True))]


def _draw_markers(axes: Axes, panel: Panel) -> None:
    """Dots, arrows from one to the next if they are a path, and names where there is room for them."""
    inside = _inside(panel)
    places = [(marker.steps[0], marker.steps[1]) for marker in inside]
    if panel.connected:
        axes.plot(*np.array(places).reshape(-1, 2).T, color="white", linewidth=0.9)
        for start, end in itertools.pairwise(places):
            if np.hypot(*(axes.transData.transform(end) - axes.transData.transform(start))) > 10:
                look = {"arrowstyle": "-|>", "color": "white", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
                axes.annotate("", end, start, arrowprops=look | {"mutation_scale": 5}, zorder=2.5)
    for place in places:
        style = {"color": _MARKER, "markeredgecolor": "black", "markeredgewidth": 0.5, "markersize": 3.2}
        axes.plot(*place, "o", **style, zorder=3)
    named = [(marker.name, place) for marker, place in zip(inside, places, strict=True) if any(place)]
    _name_points(axes, named)  # the model itself has its θ


def _name_points(axes: Axes, points: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Write names beside points, each where it covers nothing; a name for which there is no room is left out."""
    figure: Any = axes.get_figure()
    pixel, renderer = figure.dpi / 72, FigureCanvasAgg(figure).get_renderer()
    taken = [text.get_window_extent(renderer) for text in axes.texts if text.get_text() and text.get_visible()]
    taken += [_square(axes.transData.transform(place), 2.0 * pixel) for _, place in points]
    frame = axes.get_window_extent()
    for name, place in points:
        width, height = text_width(name) * figure.dpi, 7.5 * pixel
        x, y = axes.transData.transform(place)
        for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)):
            left = x + 3 * right * pixel - width * (1 - right) / 2
            bottom = y + 3 * up * pixel - height * (1 - up) / 2
            box = Bbox.from_bounds(left, bottom, width, height)
            is_inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if is_inside and not any(box.overlaps(other) for other in taken):
                aligned: dict[str, Any] = {
                    "ha": ("right", "center", "left")[right + 1],
                    "va": ("top", "center_baseline", "bottom")[up + 1],
                }
                offset = (3 * right, 3 * up)
                axes.annotate(name, place, offset, textcoords="offset points", path_effects=outline(), **aligned)
                taken.append(box)
                break


def _square(middle: np.ndarray, half: float) -> Bbox:
    return Bbox([middle - half, middle + half])


def _draw_curve(axes: Axes, panel: Panel, style: dict[str, Any], are_few: bool) -> None:
    """The losses, around them the interval of their mean and what it is the mean of, and what the scores foretell."""
    (steps,) = panel.steps
    thin: dict[str, Any] = {"color": style["color"], "zorder": 1.5}
    if panel.band is not None:
        axes.fill_between(steps, *panel.band, color=style["color"], alpha=0.10, linewidth=0)
        for end in panel.band:  # where bands overlap, their fillings cannot be told apart
            axes.plot(steps, end, linewidth=0.6, alpha=0.5, linestyle=style["linestyle"], **thin)
    for losses in panel.replicates if are_few else ():
        axes.plot(steps, losses, linewidth=0.4, alpha=0.7, **thin)
    if panel.quadratic is not None:
        axes.plot(steps, panel.quadratic, linestyle=_DOTS, linewidth=0.9, **thin)
    axes.plot(steps, panel.losses, **style)
    if panel.centre is not None:
        axes.plot(0, panel.centre, "o", color="black", markersize=2.5, zorder=5)
    low, high = axes.get_ylim()
    heights = [(m.name, (m.steps[0], float(np.interp(m.steps[0], steps, panel.losses)))) for m in _inside(panel)]
    shown = [(name, place) for name, place in heights if low <= place[1] <= high]
    for _, place in shown:
        axes.plot(
            *place, "D", color=style["color"], markeredgecolor="black", markeredgewidth=0.4, markersize=3, zorder=4
        )
    _name_points(axes, shown)


def _curve_notes(panels: Panels) -> list[str]:
    notes = []
    if panels.are_few and any(panel.replicates for panel in panels.panels):
        notes.append("thin lines: single directions")
    if any(panel.quadratic is not None for panel in panels.panels):
        notes.append("dotted: L(0) + ½ s² dᵀFd, what the Fisher scores foretell for steps s along d")
    return notes


def _add_relative_axis(axes: Axes, relative: float) -> Any:
    """A second horizontal axis on top: how far a step is, by the size of the weights."""
    top = axes.secondary_xaxis(
        "top", functions=(lambda v: relative * np.asarray(v), lambda v: np.asarray(v) / relative)
    )
    top.set_xlabel("‖δ‖ / ‖θ‖", labelpad=4)
    top.tick_params(width=0.6, pad=2)
    return top


def _relative_note(panels: Panels) -> list[str]:
    return [] if panels.relative is None else ["‖δ‖ / ‖θ‖: length of the step, by that of all weights"]


def _relative_ticks(axes: Axes, panels: Panels) -> list[tuple[float, str]]:
    """The steps of the lower axis, and how far they are."""
    relative = panels.relative or 0.0
    return [(float(step), f"{abs(relative * step):.2g}") for step in axes.get_xticks()]


def _short_lines(label: str) -> str:
    """A label in lines that are not longer than a small panel."""
    return wrapped(label, 1.2)


def _draw_level(axes: Axes, panel: Panel, reference: Reference) -> None:
    """A line where the loss has a value, named once even if every piece is shorter than its name."""
    lines = axes.contour(*panel.steps, panel.losses.T, [reference.value], colors="black", linewidths=0.8)
    lines.set_path_effects(outline())
    texts = list(axes.clabel(lines, fmt=reference.short, fontsize=BODY))
    reach = [0.85 * steps[-1] for steps in panel.steps]
    inside = [t for t in texts if all(abs(p) < r for p, r in zip(t.get_position(), reach, strict=True))]
    for text in texts:  # a name across the frame would be cut off
        text.set_visible(text in inside or not inside)
    if not texts:
        points = np.asarray(lines.get_paths()[0].vertices)
        x, y = points[np.hypot(*points.T).argmin()]
        right, up = np.sign(x), np.sign(y)
        if abs(x) > 0.6 * panel.steps[0][-1] or abs(y) > 0.6 * panel.steps[1][-1]:  # there is more room inside
            right, up = -right, -up
        texts = [
            axes.annotate(
                reference.short,
                (x, y),
                (2 * right, 2 * up),
                textcoords="offset points",
                ha="left" if right > 0 else "right",
                va="bottom" if up > 0 else "top",
            )
        ]
    for text in texts:
        text.set_path_effects(outline())


def _mark_level(axes: Axes, reference: Reference) -> None:
    """A line across, with its name where it covers the fewest points of the curves."""
    axes.axhline(reference.value, color="black", linewidth=0.6, linestyle=(0, (4, 2)), zorder=1)
    name = f"{reference.label} = {reference.value:.3g}"
    figure: Any = axes.get_figure()
    to_fraction, frame = axes.transAxes.inverted(), axes.get_window_extent()
    width = text_width(name) * figure.dpi / frame.width
    bottom = float(to_fraction.transform(axes.transData.transform((0, reference.value)))[1])
    curves = [to_fraction.transform(axes.transData.transform(_dense(line.get_xydata()))) for line in axes.lines]
    points = np.concatenate([*curves, np.zeros((0, 2))])
    points = points[(points[:, 1] > bottom + 0.01) & (points[:, 1] < bottom + 0.08)]

    def covered(left: float) -> int:
        return int(((points[:, 0] > left) & (points[:, 0] < left + width)).sum())

    middle = (1 - width) / 2
    left = min(sorted(np.linspace(0.02, 0.98 - width, 25), key=lambda left: abs(left - middle)), key=covered)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(name, (left, reference.value), (0, 1.5), color=QUIET, path_effects=outline(), **place)


def _dense(points: Any) -> np.ndarray:
    """A line as many points."""
    places = np.arange(len(points))
    fine = np.linspace(0, len(points) - 1, 20 * len(points))
    return np.column_stack([np.interp(fine, places, values) for values in np.asarray(points, dtype=float).T])


def _step_ticks(steps: np.ndarray) -> list[tuple[float, str]]:
    """Both ends and, if it is on the axis and there is room, the model itself."""
    low, high = float(steps[0]), float(steps[-1])
    middle = [0.0] if min(-low, high) > 0.2 * (high - low) else []
    return [(tick, _step_text(tick)) for tick in dict.fromkeys((low, *middle, high))]


def _step_text(step: float) -> str:
    return f"{step:.3g}".replace("-", "\N{MINUS SIGN}")


def _colours(levels: int = 256) -> Colormap:
    return matplotlib.colormaps["viridis"].resampled(levels).with_extremes(over=_ABOVE)
