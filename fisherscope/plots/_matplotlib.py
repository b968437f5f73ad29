"""Figures for print, by matplotlib, made without pyplot, so that nothing global changes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FormatStrFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from .._typing import Float
from ._matplotlib_layout import (
    BODY,
    COLUMN,
    MARKERS,
    PAGE,
    QUIET,
    STYLE,
    Page,
    Single,
    outline,
    set_ticks,
    text_height,
    text_width,
)
from ._prepare import (
    COLOURS,
    Compared,
    Histogram,
    Layers,
    Lines,
    Panel,
    Panels,
    Reference,
    Scale,
    Sites,
    decades,
    spread,
)

__all__ = [
    "comparison",
    "contour",
    "curves",
    "dropout_sites",
    "layer_scores",
    "save",
    "sorted_scores",
    "stability",
    "surface",
]

LEVELS = 20  # bands of a contour map
HEIGHT = 0.6  # of the box around a surface, by its sides

_ABOVE = "0.82"  # grey, where a map is cut
_LIGHT = np.array([-0.50, -0.40, 0.77])  # towards the light, in a box whose sides are about 1


@matplotlib.rc_context(STYLE)
def surface(panels: Panels) -> Figure:
    """One 3-D surface per landscape, from one camera, cut where the scale ends."""
    page = Page(panels, most=3, aspect=0.72, left=0.08, between=0.05, below=0.36)
    for panel, axes in page.axes(projection="3d", computed_zorder=False):
        _draw_surface(axes, panel, panels.scale)
    return page.finished(_colours())


@matplotlib.rc_context(STYLE)
def contour(panels: Panels) -> Figure:
    """One filled contour map per landscape; grey where the scale ends, hatched where there is no number."""
    grids = [panel.steps for panel in panels.panels]
    labels = max(text_width(text) for _, y in grids for _, text in _step_ticks(y)) + 0.1
    is_shared = len({tuple(step for steps in grid for step in steps[[0, -1]]) for grid in grids}) == 1
    aspect = min(1.5, max(float(np.ptp(y) / np.ptp(x)) for x, y in grids))
    is_full = all(np.isfinite(panel.losses).all() for panel in panels.panels)
    page = Page(
        panels,
        most=4,
        aspect=aspect,
        left=labels + 0.17,
        between=0.12 if is_shared else labels,
        below=0.42,
        notes=() if is_full else ("hatched where there is no number",),
    )
    for number, (panel, axes) in enumerate(page.axes()):
        _draw_contour(axes, panel, panels.scale)
        axes.set_xlabel("step along direction 1")
        if number % page.across == 0:
            axes.set_ylabel("step along direction 2", labelpad=1)
        elif is_shared:
            axes.set_yticklabels([])
    return page.finished(_colours(LEVELS))


@matplotlib.rc_context(STYLE)
def curves(panels: Panels) -> Figure:
    """All landscapes of one axis as lines in one pair of axes."""
    scale = panels.scale
    single = Single([f"{panel.title}\n{', '.join(panel.notes)}" for panel in panels.panels], panels.notes)
    for number, panel in enumerate(panels.panels):
        single.axes.plot(panel.steps[0], panel.losses, **single.style(number))
        if panel.centre is not None:
            single.axes.plot(0, panel.centre, "o", color="black", markersize=2.5, zorder=5)
    ends = [step for panel in panels.panels for step in panel.steps[0]]
    margin = 0.05 * (scale.high - scale.low)
    single.axes.set(xlabel="step along direction 1", ylabel=scale.label, xlim=(min(ends), max(ends)))
    single.axes.set_ylim(scale.low - margin, scale.high + (0 if scale.is_cut else margin))
    for reference in panels.references:
        _mark_level(single.axes, reference)
    set_ticks(single.axes.yaxis, scale.ticks)
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
def layer_scores(layers: Layers) -> Figure:
    """Mean score by layer, the first at the top; dots, since a logarithmic axis has no zero for bars to stand on."""
    left, height = 0.15 + max(map(text_width, layers.labels)), 0.1 + 0.15 * len(layers.labels)
    single = Single([series.title for series in layers.series], layers.notes, left=left, height=height)
    for number, series in enumerate(layers.series):
        dots = {"linestyle": "none", "marker": MARKERS[number % len(MARKERS)], "markersize": 3.5}
        single.axes.plot(series.y, series.x, **single.style(number) | dots)
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
    x_label, y_label = (single.wrapped(label, 1.9) for label in histogram.labels)
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
    _mark_centre_3d(axes, panel, scale)
    axes.view_init(elev=36, azim=-52)
    axes.set_box_aspect((1, 1, HEIGHT), zoom=1.05)
    axes.patch.set_visible(False)
    axes.tick_params(pad=-3)
    axes.set_xlabel("step along direction 1", labelpad=-5)
    axes.set_ylabel("step along direction 2", labelpad=-5)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color("0.97")
        axis.line.set(color="0.5", linewidth=0.5)
        axis._axinfo["grid"].update(color="0.85", linewidth=0.4)  # the only way to thin the grid of 3-D axes
    for axis, steps in ((axes.xaxis, x), (axes.yaxis, y)):  # half way out, since texts would meet in the corner
        set_ticks(axis, _step_ticks(steps / 2 if steps[0] < 0 < steps[-1] else steps))
    set_ticks(axes.zaxis, scale.box_ticks)
    axes.tick_params(axis="z", pad=24 * max(text_width(text) for _, text in scale.box_ticks) - 4.5)  # texts are centred
    axes.set_zlim(scale.low, scale.high)
    axes.text(x[-1], y[-1], scale.high, f"{scale.metric}\n", ha="center", va="bottom", linespacing=0.5)


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
    axes.text(0, 0, top, "θ", ha="center", va="bottom", zorder=11, path_effects=outline())


def _draw_contour(axes: Axes, panel: Panel, scale: Scale) -> None:
    x, y = panel.steps
    axes.set(xlim=x[[0, -1]], ylim=y[[0, -1]], aspect="equal", facecolor="white")
    axes.patch.set(hatch="/////", edgecolor="0.7")
    if np.isfinite(panel.losses).any():
        levels = np.linspace(scale.low, scale.high, LEVELS + 1)
        extend = "max" if scale.is_cut else "neither"
        bands = axes.contourf(x, y, panel.losses.T, levels, cmap=_colours(LEVELS), extend=extend)
        bands.set(edgecolor="face", linewidth=0.3)  # else viewers show the page between the bands
    for reference in panel.references:
        _draw_level(axes, panel, reference)
    if panel.centre is not None:
        axes.plot(0, 0, "o", color="black", markersize=2.5, markeredgecolor="white", markeredgewidth=0.5)
        axes.annotate("θ", (0, 0), (3, 2), textcoords="offset points", path_effects=outline())
    set_ticks(axes.xaxis, _step_ticks(x))
    set_ticks(axes.yaxis, _step_ticks(y))
    first, *_, last = axes.get_xticklabels()  # turned inwards, so that they do not touch the next panel's
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")


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
    axes.axhline(reference.value, color="black", linewidth=0.6, linestyle=(0, (4, 2)), zorder=1)
    axes.annotate(
        f"{reference.label} = {reference.value:.3g}",
        (0.5, reference.value),
        (0, 1.5),
        color=QUIET,
        ha="center",
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        path_effects=outline(),
    )


def _step_ticks(steps: np.ndarray) -> list[tuple[float, str]]:
    """Both ends and, if it is on the axis, the model itself."""
    ticks = [float(step) for step in (steps[0], 0.0, steps[-1]) if steps[0] <= step <= steps[-1]]
    return [(tick, f"{tick:g}".replace("-", "\N{MINUS SIGN}")) for tick in dict.fromkeys(ticks)]


def _colours(levels: int = 256) -> Colormap:
    return matplotlib.colormaps["viridis"].resampled(levels).with_extremes(over=_ABOVE)
