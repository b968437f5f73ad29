"""Figures for the browser, by plotly: turn, zoom, and read off every point."""

import html
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from ._prepare import (
    COLOURS,
    Compared,
    Histogram,
    Layers,
    Line,
    Lines,
    Panel,
    Panels,
    Parameters,
    Reference,
    Scale,
    Sites,
    columns,
    decades,
    spread,
)
from ._prepare_landscapes import LOSSES, interpolated, marker_notes

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
MOST = 2  # panels in a row
CAMERA = {"eye": {"x": 1.06, "y": -1.36, "z": 1.2}, "center": {"x": 0, "y": 0, "z": -0.15}}

_DASHES = ("solid", "dash", "dashdot", "dot", "longdashdot")
_MARKERS = ("circle", "square", "diamond", "triangle-down", "triangle-up", "cross", "x")
_QUIET, _ABOVE, _PIN = "#595959", "#d1d1d1", "#d55e00"
_ROW, _HEADER, _BELOW, _FOOTER, _LINE = 400, 90, 60, 70, 18  # pixels
_WIDE, _NARROW = 130, 45  # characters of a line below a figure, and of one above a panel or in a legend
_LOG: dict[str, Any] = {"type": "log", "exponentformat": "power", "nticks": 10}
_LOOK = {
    "template": "plotly_white",
    "font": {"family": "sans-serif", "size": 13},
    "legend": {"itemsizing": "constant", "traceorder": "normal"},  # bands would turn it round
}


def surface(panels: Panels) -> go.Figure:
    """One 3-D surface per landscape, cut where the scale ends."""
    figure = _page(panels, kind="scene")
    for number, panel in enumerate(panels.panels):
        scene = f"scene{number + 1 if number else ''}"
        figure.add_trace(_surface_trace(panel, panels.scale, scene))
        if panel.centre is not None and panel.centre <= panels.scale.high:
            figure.add_trace(_centre_trace(panel.centre, panels.scale, scene))
        if panel.markers:
            figure.add_trace(_markers_trace_3d(panel, panels.scale, scene))
        figure.update_layout({scene: _scene(panel, panels.scale)})
    bar = _bar(panels.scale)
    figure.update_layout(
        coloraxis={"colorscale": "Viridis", "cmin": panels.scale.low, "cmax": panels.scale.high, "colorbar": bar}
    )
    return figure


def contour(panels: Panels) -> go.Figure:
    """One filled contour map per landscape; grey where the scale ends, empty where there is no number."""
    figure = _page(panels, kind="xy")
    across = columns(len(panels.panels), MOST)
    for number, panel in enumerate(panels.panels):
        place: dict[str, Any] = {"row": number // across + 1, "col": number % across + 1}
        figure.add_trace(_contour_trace(panel, panels.scale, has_bar=number == 0), **place)
        for reference in panel.references:
            is_named = any(trace.name == _value_text(reference) for trace in figure.data)
            figure.add_trace(_level_trace(panel, reference).update(showlegend=not is_named), **place)
        if panel.measured is not None:
            figure.add_trace(_measured_trace(panel.measured, panel.steps), **place)
        if panel.markers:
            figure.add_trace(_markers_trace(panel), **place)
        if panel.centre is not None:
            figure.add_trace(_mark_trace(), **place)
        axis = figure.get_subplot(**place).xaxis.plotly_name.replace("axis", "")
        x_label, y_label = map(html.escape, panel.labels)
        figure.update_xaxes(title=x_label, range=_ends(panel.steps[0]), constrain="domain", **place)
        figure.update_yaxes(title=y_label, range=_ends(panel.steps[1]), constrain="domain", **place)
        if panel.is_isometric:
            figure.update_yaxes(scaleanchor=axis, **place)
    return figure


def curves(panels: Panels) -> go.Figure:
    """All landscapes of one axis as lines in one pair of axes."""
    scale = panels.scale
    figure = _single((*panels.notes, *marker_notes(panels)))
    for number, panel in enumerate(panels.panels):
        figure.add_traces(_beside_traces(panel, scale, number, panels.are_few))
        figure.add_trace(_curve_trace(panel, scale, number))
        if panel.centre is not None:
            mark = {
                "mode": "markers",
                "marker": {"color": "black", "size": 6},
                "showlegend": False,
                "hoverinfo": "skip",
            }
            figure.add_trace(go.Scatter(x=[0], y=[panel.centre], **mark))
    for reference in panels.references:
        figure.add_hline(
            reference.value,
            line={"color": "black", "width": 1, "dash": "dash"},
            annotation_text=_value_text(reference),
            annotation_position="top",
        )
    margin = 0.05 * (scale.high - scale.low)
    labels = list(dict.fromkeys(panel.labels[0] for panel in panels.panels))
    figure.update_xaxes(title=html.escape(labels[0]) if len(labels) == 1 else "step along the direction")
    figure.update_yaxes(
        title=html.escape(scale.label),
        range=[scale.low - margin, scale.high + (0 if scale.is_cut else margin)],
        **_ticks(scale.ticks),
    )
    return figure


def sorted_scores(lines: Lines) -> go.Figure:
    """Scores in ascending order, one curve per model."""
    figure = _single(lines.notes)
    mode = "lines+markers" if lines.has_markers else "lines"
    for number, line in enumerate(lines.lines):
        marker = {"symbol": _MARKERS[number % len(_MARKERS)], "size": 5}
        figure.add_trace(
            go.Scatter(
                x=line.x,
                y=line.y,
                name=folded(line.title),
                mode=mode,
                line=_line(number),
                marker=marker,
                hovertemplate="%{x:,.4~g}: %{y:.3e}<extra></extra>",
            )
        )
    figure.update_xaxes(title=lines.x_label, range=[0, 1] if lines.is_share else None)
    if not lines.is_share:
        figure.update_xaxes(tickformat="~s")
    figure.update_yaxes(title=lines.y_label, **(_LOG if lines.is_log else {}))
    return figure


def parameter_scores(parameters: Parameters) -> go.Figure:
    """Mean score by parameter, every other layer shaded; hover boxes tell the names."""
    labels = parameters.labels(40)
    figure = _single(parameters.notes, labels=_FOOTER + 7 * max((len(text) for _, text in labels), default=0))
    for number, (line, names) in enumerate(zip(parameters.lines, parameters.names, strict=True)):
        symbol = _MARKERS[number % len(_MARKERS)] + ("-open" if number else "")
        figure.add_trace(
            go.Scatter(
                x=line.x,
                y=line.y,
                customdata=list(map(html.escape, names)),
                name=folded(line.title),
                mode="markers",
                marker={"symbol": symbol, "size": 6, "color": COLOURS[number % len(COLOURS)]},
                hovertemplate="%{customdata}: %{y:.3e}<extra></extra>",
            )
        )
    for _, first, last in parameters.layers[::2]:
        figure.add_vrect(first - 0.5, last + 0.5, fillcolor="#f0f0f0", line_width=0, layer="below")
    figure.update_xaxes(title=parameters.x_label, range=[0.5, max(len(line.x) for line in parameters.lines) + 0.5])
    if labels:
        ticks = _ticks([(middle, html.escape(text)) for middle, text in labels])
        figure.update_xaxes(tickangle=-90, showgrid=False, **ticks)
    figure.update_yaxes(title=parameters.value_label, **_LOG)
    return figure


def layer_scores(layers: Layers) -> go.Figure:
    """Mean score by layer, the first at the top."""
    row = max(26, 9 * (len(layers.series) + 1))
    figure = _single(layers.notes, height=160 + row * len(layers.labels))
    for number, (series, ends) in enumerate(zip(layers.series, layers.ranges, strict=True)):
        names = [layers.labels[int(position)] for position in series.x]
        marker = {"symbol": _MARKERS[number % len(_MARKERS)], "size": 10, "color": COLOURS[number % len(COLOURS)]}
        figure.add_trace(
            go.Scatter(
                x=series.y,
                y=layers.rows(number),
                error_x=None if ends is None else _whiskers(series.y, *ends),
                customdata=names,
                name=folded(series.title),
                mode="markers",
                marker=marker,
                hovertemplate="%{customdata}: %{x:.3e}<extra></extra>",
            )
        )
    figure.update_xaxes(title=layers.value_label, **_LOG)
    figure.update_yaxes(
        tickvals=list(range(len(layers.labels))),
        ticktext=list(map(html.escape, layers.labels)),
        range=[len(layers.labels) - 0.5, -0.5],
        zeroline=False,
    )
    return figure


def _whiskers(middle: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    return {
        "type": "data", "symmetric": False, "array": high - middle, "arrayminus": middle - low,
        "thickness": 1, "width": 0,
    }  # fmt: skip


def stability(lines: Lines) -> go.Figure:
    """Expected overlap by number of examples, one line per mask."""
    figure = _single(lines.notes)
    for number, line in enumerate(lines.lines):
        figure.add_trace(
            go.Scatter(
                x=line.x,
                y=line.y,
                name=folded(line.title),
                mode="lines+markers",
                line=_line(number),
                marker={"symbol": _MARKERS[number % len(_MARKERS)], "size": 6},
                hovertemplate="%{x:,} examples: %{y:.3f}<extra></extra>",
            )
        )
    for name, height in lines.levels:
        look: dict[str, Any] = {"color": _QUIET, "width": 1, "dash": "dot"}
        figure.add_hline(height, line=look, annotation_text=name, annotation_position="top right")
    ticks = [(tick, f"{tick:,.0f}") for tick in spread(float(x) for line in lines.lines for x in line.x)]
    figure.update_xaxes(title=lines.x_label, type="log", **_ticks(ticks))
    figure.update_yaxes(title=lines.y_label)
    return figure


def comparison(compared: Compared) -> go.Figure:
    """Agreement by layer, the first at the top, and beside it scores against each other."""
    height = max(160 + 26 * len(compared.labels), 480 if compared.histogram else 0)
    figure = make_subplots(1, 2, horizontal_spacing=0.2) if compared.histogram else make_subplots(1, 1)
    figure.update_layout(_LOOK, height=height, margin={"t": 40, "l": 80, "r": 20}, showlegend=True)
    add_notes(figure, compared.notes, _FOOTER)
    place: dict[str, Any] = {"row": 1, "col": 2 if compared.histogram else 1}
    for number, line in enumerate((*compared.series, compared.chance)):
        figure.add_trace(_agreement_trace(compared, line, number), **place)
    figure.update_xaxes(title=compared.value_label, **place)
    figure.update_yaxes(
        tickvals=list(range(len(compared.labels))),
        ticktext=list(map(html.escape, compared.labels)),
        range=[len(compared.labels) - 0.5, -0.5],
        zeroline=False,
        **place,
    )
    if compared.histogram:
        _add_histogram(figure, compared.histogram)
    return figure


def dropout_sites(sites: Sites) -> go.Figure:
    """Rates, and the scores beside them, the first site at the top."""
    rows = list(range(len(sites.labels)))
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
    height = 100 + 22 * len(rows)
    figure.update_layout(_LOOK, height=height, margin={"t": 40, "l": 80, "r": 20}, showlegend=False)
    add_notes(figure, sites.notes, _FOOTER)
    names = list(map(html.escape, sites.names))
    look = {"width": 0.5, "marker": {"color": COLOURS[0]}, "hovertemplate": "%{customdata}: %{x:.4g}<extra></extra>"}
    figure.add_trace(go.Bar(x=sites.rates, y=rows, customdata=names, orientation="h", **look), row=1, col=1)
    look = {"marker": {"symbol": "square", "size": 8, "color": COLOURS[1]}}
    look |= {"hovertemplate": "%{customdata}: %{x:.3e}<extra></extra>"}
    scores = np.where(sites.scores > 0, sites.scores, np.nan)
    figure.add_trace(go.Scatter(x=scores, y=rows, customdata=names, mode="markers", **look), row=1, col=2)
    figure.update_xaxes(title="dropout rate", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title="Fisher score", **_LOG, row=1, col=2)
    figure.update_yaxes(range=[len(rows) - 0.5, -0.5], zeroline=False, showgrid=False)
    figure.update_yaxes(tickvals=rows, ticktext=list(map(html.escape, sites.labels)), row=1, col=1)
    for first, end in sites.layers[::2]:
        figure.add_hrect(first - 0.5, end - 0.5, fillcolor="#f0f0f0", line_width=0, layer="below")
    return figure


def save(figure: go.Figure, path: Path, suffix: str) -> None:
    """Write a figure as one ``.html`` file, the only suffix, that needs no network; the same bytes every time."""
    config = {"responsive": True, "displaylogo": False, "toImageButtonOptions": {"format": "svg"}}
    figure.write_html(path, include_plotlyjs=True, div_id="fisherscope", config=config)


def _agreement_trace(compared: Compared, line: Line, number: int) -> go.Scatter:
    is_chance = line is compared.chance
    look = (
        {"symbol": "line-ns-open", "color": _QUIET}
        if is_chance
        else {"symbol": _MARKERS[number], "color": COLOURS[number]}
    )
    return go.Scatter(
        x=line.y,
        y=line.x,
        customdata=[compared.labels[int(position)] for position in line.x],
        name=html.escape(line.title),
        mode="markers",
        marker={"size": 10, **look},
        hovertemplate="%{customdata}: %{x:.3f}<extra></extra>",
    )


def _add_histogram(figure: Any, histogram: Histogram) -> None:
    """Scores against each other at the left; the axes are common logarithms."""
    place: dict[str, Any] = {"row": 1, "col": 1}
    middles = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    counts = np.where(histogram.counts.T > 0, histogram.counts.T, np.nan)
    most = max(1, math.ceil(math.log10(max(1, histogram.counts.max()))))
    bar = {"title": {"text": "entries", "side": "right"}, "thickness": 12, "x": 0.405, "xanchor": "left"}
    bar |= _ticks([(float(k), f"{10**k:,}") for k in range(most + 1)])
    figure.add_trace(
        go.Heatmap(
            x=middles,
            y=middles,
            z=np.log10(counts),
            customdata=counts,
            colorscale="Viridis",
            colorbar=bar,
            hovertemplate="10^%{x:.2f}, 10^%{y:.2f}: %{customdata:,} entries<extra></extra>",
        ),
        **place,
    )
    ends = _ends(histogram.edges)
    line = {"color": "black", "width": 1}
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line, showlegend=False, hoverinfo="skip"), **place)
    dashed = line | {"dash": "dash"}
    for draw, mark in zip((figure.add_vline, figure.add_hline), histogram.marks, strict=True):
        draw(mark, line=dashed, **place)
    label = {"text": histogram.mark_label, "showarrow": False, "xanchor": "right", "yanchor": "bottom"}
    figure.add_annotation(x=histogram.marks[0], y=ends[0], **label, **place)
    ticks = [(float(k), f"10<sup>{k}</sup>") for k in decades(ends[0], ends[1])]
    figure.update_xaxes(title=folded(histogram.labels[0]), range=ends, constrain="domain", **_ticks(ticks), **place)
    figure.update_yaxes(
        title=folded(histogram.labels[1]),
        range=ends,
        constrain="domain",
        scaleanchor="x",
        **_ticks(ticks),
        **place,
    )


def _page(panels: Panels, *, kind: str) -> Any:
    """Empty panels under their titles and notes, what concerns all of them below."""
    count = len(panels.panels)
    across = columns(count, MOST)
    rows = math.ceil(count / across)
    dots = ("dots: points that were measured",) if any(p.measured is not None for p in panels.panels) else ()
    notes = (*panels.notes, *marker_notes(panels), *(dots if kind == "xy" else ()))
    headings = [_heading(panel) for panel in panels.panels]
    header = _HEADER + _LINE * max(0, *(heading.count("<br>") - 3 for heading in headings))
    height = rows * (_ROW + header)
    inside = height - header
    figure = make_subplots(
        rows,
        across,
        specs=[[{"type": kind}] * across] * rows,
        subplot_titles=headings,
        vertical_spacing=(header + (_BELOW if kind == "xy" else 0)) / inside,
        horizontal_spacing=0.16 / across,
    )
    figure.update_annotations(yshift=6)
    figure.update_layout(_LOOK, height=height, margin={"t": header, "l": 60, "r": 20})
    add_notes(figure, notes, _FOOTER)
    return figure


def _single(notes: Sequence[str], *, height: int = 420, labels: int = _FOOTER) -> go.Figure:
    """One empty pair of axes with a legend at its right and, below ``labels`` pixels, what must be said."""
    figure = go.Figure()
    figure.update_layout(_LOOK, height=height, margin={"t": 40, "l": 80, "r": 20}, showlegend=True)
    add_notes(figure, notes, labels)
    return figure


def _heading(panel: Panel) -> str:
    notes = "<br>".join(map(html.escape, panel.notes))
    return f'{folded(panel.title)}<br><span style="font-size:12px;color:{_QUIET}">{notes}</span>'


def folded(text: str, width: int = _NARROW) -> str:
    """Text as plotly takes it, in lines of at most ``width`` characters."""
    return "<br>".join(map(html.escape, textwrap.wrap(text, width)))


def add_notes(figure: Any, notes: Sequence[str], labels: int) -> None:
    """Add a lower margin to a figure, of ``labels`` pixels for its axis and as many as the notes in it need."""
    text = "<br>".join(folded(note, _WIDE) for note in notes)
    footer = labels + _LINE * (text.count("<br>") + 1 if text else 0)
    figure.update_layout(height=figure.layout.height + footer, margin_b=footer)
    figure.add_annotation(
        text=text,
        x=0,
        xref="paper",
        xanchor="left",
        y=0,
        yref="paper",
        yanchor="bottom",
        yshift=10 - footer,
        showarrow=False,
        align="left",
        font={"size": 12, "color": _QUIET},
    )


def _curve_trace(panel: Panel, scale: Scale, number: int) -> go.Scatter:
    return go.Scatter(
        x=panel.steps[0],
        y=panel.losses,
        customdata=scale.shown(panel.losses),
        name="<br>".join(map(folded, (panel.title, ", ".join(panel.notes)))),
        mode="lines",
        line=_line(number),
        hovertemplate=_hover(panel, scale),
    )


def _beside_traces(panel: Panel, scale: Scale, number: int, are_few: bool) -> list[go.Scatter]:
    """What a curve is the mean of and its interval, what Fisher scores foretell, and other models."""
    (steps,) = panel.steps
    colour = COLOURS[number % len(COLOURS)]
    quiet: dict[str, Any] = {"x": steps, "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    traces = []
    if panel.band is not None:
        low, high = panel.band
        end = _line(number) | {"width": 0.8, "color": f"{colour}80"}  # fillings alone cannot be told apart
        traces.append(go.Scatter(y=low, line=end, **quiet))
        traces.append(go.Scatter(y=high, line=end, fill="tonexty", fillcolor=f"{colour}1a", **quiet))
    for losses in panel.replicates if are_few else ():
        traces.append(go.Scatter(y=losses, line={"width": 0.7, "color": colour}, opacity=0.6, **quiet))
    if panel.quadratic is not None:
        named = quiet | {"showlegend": True, "name": folded(f"{panel.title}: L(0) + ½ s² dᵀFd")}
        traces.append(go.Scatter(y=panel.quadratic, line={"width": 1.5, "dash": "dot", "color": colour}, **named))
    if panel.markers:
        marker = {"symbol": "diamond", "size": 8, "color": colour, "line": {"color": "black", "width": 1}}
        x, y = [m.steps[0] for m in panel.markers], _heights(panel, scale)
        traces.append(go.Scatter(x=x, y=y, marker=marker, **_named(panel, "markers+text")))
    return traces


def _surface_trace(panel: Panel, scale: Scale, scene: str) -> go.Surface:
    x, y = panel.steps
    # a surface is cut exactly where its axis ends, so values above the scale may stay
    return go.Surface(
        x=x,
        y=y,
        z=panel.losses.T,
        scene=scene,
        coloraxis="coloraxis",
        customdata=scale.shown(panel.losses.T),
        hovertemplate=_hover(panel, scale),
    )


def _centre_trace(loss: float, scale: Scale, scene: str) -> go.Scatter3d:
    """A pin in the model itself."""
    top = loss + 0.45 * (scale.high - scale.low)
    return go.Scatter3d(
        x=[0, 0],
        y=[0, 0],
        z=[loss, top],
        scene=scene,
        mode="lines+text",
        text=["", "<b>θ</b>"],
        textposition="top center",
        textfont={"size": 16, "color": _PIN},
        line={"color": _PIN, "width": 5},
        showlegend=False,
        hoverinfo="skip",
    )


def _heights(panel: Panel, scale: Scale) -> list[float]:
    """What the landscape has where other models are: the loss as measured there, or else between the grid's points."""
    if scale.metric in LOSSES:
        return [math.nan if m.nearest_loss is None else m.nearest_loss for m in panel.markers]
    return interpolated(panel, [m.steps for m in panel.markers]).tolist()


def _markers_trace_3d(panel: Panel, scale: Scale, scene: str) -> go.Scatter3d:
    """Other models at the height of the surface; those where it has none are left out."""
    heights = _heights(panel, scale)
    x, y = zip(*(m.steps for m in panel.markers), strict=True)
    marker = {"color": _PIN, "size": 4, "line": {"color": "black", "width": 1}}
    mode = "lines+markers+text" if panel.connected else "markers+text"
    line = {"color": "black", "width": 3}
    return go.Scatter3d(x=x, y=y, z=heights, scene=scene, marker=marker, line=line, **_named(panel, mode))


def _markers_trace(panel: Panel) -> go.Scatter:
    """Other models on the map."""
    x, y = zip(*(m.steps for m in panel.markers), strict=True)
    marker = {"color": _PIN, "size": 8, "line": {"color": "black", "width": 1}}
    mode = "lines+markers+text" if panel.connected else "markers+text"
    line = {"color": "white", "width": 1.5}
    return go.Scatter(x=x, y=y, marker=marker, line=line, textfont={"color": "white"}, **_named(panel, mode))


def _named(panel: Panel, mode: str) -> dict[str, Any]:
    """What all traces of markers share; the hover box has the model's own loss beside that of the picture."""

    def told(loss: float | None) -> str:
        return "not measured" if loss is None else f"{loss:.5g}"

    hovers = [
        f"{html.escape(m.name)}<br>its own loss: {told(m.loss)}<br>loss of the nearest point shown: "
        f"{told(m.nearest_loss)}<br>distance to it: {m.distance:.3g}"
        for m in panel.markers
    ]
    names = [html.escape(m.name) for m in panel.markers]
    words = {"text": names, "textposition": "top center", "hovertext": hovers, "hoverinfo": "text"}
    return {"mode": mode, "showlegend": False, **words}


def _measured_trace(measured: np.ndarray, steps: Sequence[np.ndarray]) -> go.Scatter:
    """Dots where a landscape was measured and not predicted."""
    (i, j), (x, y) = np.nonzero(measured), steps
    look = {"marker": {"color": "black", "size": 3, "opacity": 0.6}, "hoverinfo": "skip"}
    return go.Scatter(x=x[i], y=y[j], mode="markers", name="measured", showlegend=False, **look)


def _scene(panel: Panel, scale: Scale) -> dict[str, Any]:
    x_label, y_label = map(html.escape, panel.labels)
    return {
        "xaxis_title": x_label,
        "yaxis_title": y_label,
        "zaxis": {"title": html.escape(scale.metric), "range": [scale.low, scale.high], **_ticks(scale.box_ticks)},
        "aspectmode": "manual",
        "aspectratio": {"x": 1, "y": 1, "z": 0.6},
        "camera": CAMERA,
    }


def _contour_trace(panel: Panel, scale: Scale, *, has_bar: bool) -> go.Contour:
    x, y = panel.steps
    _, first, *_, last = _placed(scale.levels(LEVELS), scale)
    size = float(last - first) / (LEVELS - 1)
    # plotly colours the bands below, between and above the lines at start, start + size, ..., end
    lines = {"start": float(first), "end": float(last) - (0 if scale.is_cut else size) + 1e-6 * size, "size": size}
    return go.Contour(
        x=x,
        y=y,
        z=_placed(panel.losses.T, scale),
        contours=lines,
        autocontour=False,
        colorscale=bands(scale.is_cut),
        line={"width": 0},
        showscale=has_bar,
        colorbar=_bar(scale),
        customdata=scale.shown(panel.losses.T),
        hovertemplate=_hover(panel, scale),
    )


def bands(is_cut: bool) -> list[tuple[float, str]]:
    """One colour per band, and grey above if there is something."""
    colours: list[Any] = [*sample_colorscale("Viridis", [k / (LEVELS - 1) for k in range(LEVELS)]), *[_ABOVE] * is_cut]
    return [(k / (len(colours) - 1), colour) for k, colour in enumerate(colours)]


def _placed(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Where values lie on a scale of colours, which plotly has only linear."""
    if not scale.is_log:
        return values
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(values > 0, np.log(values), np.nan)


def _level_trace(panel: Panel, reference: Reference) -> go.Contour:
    x, y = panel.steps
    # of the raw values also on a logarithmic scale, so that the labels are
    lines = {"start": reference.value, "end": reference.value, "size": 1, "coloring": "none", "showlabels": True}
    lines |= {"labelfont": {"color": "black", "size": 11}, "labelformat": ".3g"}
    return go.Contour(
        x=x,
        y=y,
        z=panel.losses.T,
        contours=lines,
        autocontour=False,
        line={"color": "black", "width": 2},
        showscale=False,
        name=_value_text(reference),
        hoverinfo="skip",
    )


def _value_text(reference: Reference) -> str:
    return f"{html.escape(reference.label)} = {reference.value:.3g}"


def _mark_trace() -> go.Scatter:
    return go.Scatter(
        x=[0],
        y=[0],
        mode="markers+text",
        text=["θ"],
        textposition="top right",
        textfont={"color": "white", "size": 16},
        marker={"color": "black", "size": 8, "line": {"color": "white", "width": 1}},
        showlegend=False,
        hoverinfo="skip",
    )


def _hover(panel: Panel, scale: Scale) -> str:
    steps = "".join(f"step {n}: %{{{axis}:.3g}}<br>" for n, axis in enumerate("xy"[: len(panel.steps)], 1))
    return f"{steps}{scale.metric}: %{{customdata:.5g}}<extra>{html.escape(panel.title)}</extra>"


def _ticks(ticks: Sequence[tuple[float, str]]) -> dict[str, Any]:
    return {"tickvals": [position for position, _ in ticks], "ticktext": [text for _, text in ticks]}


def _bar(scale: Scale) -> dict[str, Any]:
    return {
        "title": {"text": html.escape(scale.label), "side": "right"},
        "thickness": 16,
        "len": 0.8,
        **_ticks([(float(_placed(np.array(position), scale)), text) for position, text in scale.ticks]),
    }


def _line(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "dash": _DASHES[number % len(_DASHES)], "width": 2}


def _ends(steps: np.ndarray) -> list[float]:
    return [float(steps[0]), float(steps[-1])]
