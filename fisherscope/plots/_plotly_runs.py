"""Runs of fine-tuning in the browser, by plotly; hover boxes tell the seed and value of every run."""

import html
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from . import _plotly
from ._prepare import COLOURS, columns, spread
from ._prepare_runs import Boxes, BoxRow, Costs, Course, LearningCurves, Ranks, Sizes, side_step

__all__ = ["learning_curves", "run_boxes", "run_costs", "run_ranks", "run_sizes", "save"]

_DASHES = ("solid", "dash", "dashdot", "dot", "longdashdot")
_MARKERS = ("circle", "square", "diamond", "triangle-down", "triangle-up", "cross")  # not as many as colours
_QUIET, _BAD, _GREY = "#595959", COLOURS[1], "#888888"
_TOP, _ROW, _HEAD, _AXIS, _FOOTER, _PANEL = 80, 30, 50, 70, 30, 320  # pixels
_LOOK = {"template": "plotly_white", "font": {"family": "sans-serif", "size": 13}}


def run_boxes(boxes: Boxes) -> go.Figure:
    """Boxes over seeds, with a dot for every run, tasks below each other."""
    titles = [html.escape(panel.title) for panel in boxes.panels]
    figure = _sheet(len(titles), 1, _ROW * len(boxes.names), titles, boxes.notes)
    for number, panel in enumerate(boxes.panels, 1):
        place = {"row": number, "col": 1}
        for position, (name, row) in enumerate(zip(boxes.names, panel.rows, strict=True)):
            if row is not None and row.seeds:
                figure.add_traces(_box_traces(name, position, row), rows=number, cols=1)
        figure.add_vline(panel.reference, line={"color": "black", "width": 1, "dash": "dash"}, **place)
        names = [_counted(name, row) for name, row in zip(boxes.names, panel.rows, strict=True)]
        _name_rows(figure, names, place)
        figure.update_xaxes(title=html.escape(panel.label), zeroline=False, **place)
    return figure


def run_sizes(sizes: Sizes) -> go.Figure:
    """Means by training size with their intervals, a panel for every task; the legend shows and hides methods."""
    across = columns(len(sizes.panels), 2)
    rows = math.ceil(len(sizes.panels) / across)
    figure = _sheet(rows, across, _PANEL, [html.escape(panel.title) for panel in sizes.panels], sizes.notes)
    named: set[str] = set()
    for number, panel in enumerate(sizes.panels):
        place = {"row": number // across + 1, "col": number % across + 1}
        for line in panel.lines:
            style = sizes.names.index(line.name)
            reach = {
                "type": "data",
                "symmetric": False,
                "array": line.high - line.mean,
                "arrayminus": line.mean - line.low,
            }
            colour = COLOURS[style % len(COLOURS)]
            trace = go.Scatter(
                x=line.x * side_step(style, len(sizes.names)),
                y=line.mean,
                customdata=line.x,
                error_y=reach | {"thickness": 1, "width": 3},
                name=html.escape(line.name),
                legendgroup=html.escape(line.name),
                showlegend=line.name not in named,
                mode="lines+markers",
                line={"color": colour, "dash": _DASHES[style % len(_DASHES)], "width": 2},
                marker={"symbol": _MARKERS[style % len(_MARKERS)], "size": 7},
                hovertemplate=f"{html.escape(line.name)}, %{{customdata:,}}: %{{y:.4f}}<extra></extra>",
            )
            named.add(line.name)
            figure.add_trace(trace, **place)
        ticks = spread(sizes.ticks)
        figure.update_xaxes(
            title=sizes.x_label,
            type="log",
            range=np.log10(sizes.limits),
            tickvals=ticks,
            ticktext=[f"{tick:,g}" for tick in ticks],
            **place,
        )
        figure.update_yaxes(title=html.escape(panel.label), zeroline=False, **place)
    figure.update_layout(showlegend=True)
    return figure


def run_ranks(ranks: Ranks) -> go.Figure:
    """Mean ranks, the best at the top, with the critical difference above and bars that join what does not differ."""
    count = len(ranks.names)
    figure = _sheet(1, 1, _ROW * count, [""], ranks.notes)
    names = [html.escape(name) for name in ranks.names]
    figure.add_trace(
        go.Scatter(
            x=ranks.means,
            y=list(range(count)),
            customdata=names,
            error_x={"type": "data", "symmetric": False, "array": np.zeros(count), "arrayminus": ranks.means - 1}
            | {"width": 0, "thickness": 1.5},
            mode="markers",
            marker={"color": COLOURS[0], "size": 10},
            hovertemplate="%{customdata}: %{x:.2f}<extra></extra>",
        )
    )
    end = max(float(count), 1 + ranks.critical)
    thick: dict[str, Any] = {"mode": "lines", "hoverinfo": "skip", "line": {"color": "black", "width": 5}}
    between = min(0.02, 0.5 / max(len(ranks.alike), 1)) * (end - 1)
    for number, (first, last) in enumerate(ranks.alike):
        x = end + between * (number + 1)
        figure.add_trace(go.Scatter(x=[x, x], y=[first - 0.3, last + 0.3], **thick))
    thin = thick | {"line": {"color": "black", "width": 2}, "mode": "lines+markers"}
    thin |= {"marker": {"symbol": "line-ns-open", "size": 8}}
    figure.add_trace(go.Scatter(x=[1, 1 + ranks.critical], y=[-0.8, -0.8], **thin))
    label = {"text": f"critical difference {ranks.critical:.2f}", "showarrow": False, "xanchor": "left"}
    figure.add_annotation(x=1, y=-0.85, yanchor="bottom", **label)
    _name_rows(figure, names, {"row": 1, "col": 1})
    far, ticks = end + between * (len(ranks.alike) + 1), range(1, count + 1, math.ceil(count / 20))
    figure.update_xaxes(title="mean rank", range=[0.95, far], zeroline=False, tickvals=list(ticks))
    figure.update_yaxes(range=[count - 0.5, -1.7])
    return figure


def learning_curves(curves: LearningCurves) -> go.Figure:
    """For every method the training loss, and below it the metric; tasks below each other."""
    across = columns(max(len(task.names) for task in curves.tasks), 5)
    bands = [math.ceil(len(task.names) / across) for task in curves.tasks]
    titles: list[str] = []
    for task, count in zip(curves.tasks, bands, strict=True):
        for band in range(count):
            names = [
                f"{html.escape(task.title)}<br>{html.escape(name)}"
                for name in task.names[band * across : (band + 1) * across]
            ]
            titles += [*names, *[""] * (across - len(names)), *[""] * across]
    figure = _sheet(2 * sum(bands), across, 170, titles, curves.notes, between=95)
    top = 1
    for task, count in zip(curves.tasks, bands, strict=True):
        for number, name in enumerate(task.names):
            band, column = divmod(number, across)
            for which, courses in enumerate(task.courses):
                place = {"row": top + 2 * band + which, "col": column + 1}
                reference = courses[0] if number else None
                figure.add_traces(
                    _course_traces(name, courses[number], reference), rows=place["row"], cols=place["col"]
                )
                level = task.levels[which]
                if level is not None:
                    figure.add_hline(level, line={"color": "black", "width": 1, "dash": "dot"}, **place)
                figure.update_xaxes(title="epoch" if which else None, range=[0, 1.02 * task.epochs(number)], **place)
                figure.update_yaxes(
                    title="<br>".join(map(html.escape, textwrap.wrap(task.labels[which], 22))) if column == 0 else None,
                    range=task.limits(which),
                    zeroline=False,
                    **place,
                )
        top += 2 * count
    return figure


def run_costs(costs: Costs) -> go.Figure:
    """Bars of time and of memory in the same rows, tasks below each other."""
    rows = max(len(panel.names) for panel in costs.panels)
    titles = [text for panel in costs.panels for text in (html.escape(panel.title), "")]
    figure = _sheet(len(costs.panels), 2, _ROW * rows, titles, costs.notes)
    for number, panel in enumerate(costs.panels, 1):
        names = list(map(html.escape, panel.names))
        for column, (values, label) in enumerate(
            ((panel.times, costs.time_label), (panel.memory, "peak memory (GiB)")), 1
        ):
            place = {"row": number, "col": column}
            bar = {"color": COLOURS[column - 1]}
            template = "%{customdata}: %{x:.4g}<extra></extra>"
            figure.add_trace(
                go.Bar(
                    x=values,
                    y=list(range(len(names))),
                    customdata=names,
                    orientation="h",
                    marker=bar,
                    width=0.66,
                    hovertemplate=template,
                ),
                **place,
            )
            figure.update_xaxes(title=html.escape(label), rangemode="tozero", **place)
            _name_rows(figure, names if column == 1 else [""] * len(names), place)
        figure.add_vline(1, line={"color": "black", "width": 1, "dash": "dash"}, row=number, col=1)
    return figure


def save(figure: go.Figure, path: Path, suffix: str) -> None:
    """Write a figure as all of plotly's are written."""
    _plotly.save(figure, path, suffix)


def _sheet(
    rows: int, across: int, inside: int, titles: Sequence[str], notes: Sequence[str], between: int = _HEAD + _AXIS
) -> Any:
    """Empty panels of one height under their titles, notes below."""
    height = rows * inside + (rows - 1) * between
    figure = make_subplots(
        rows,
        across,
        subplot_titles=list(titles),
        vertical_spacing=between / height if rows > 1 else 0,
        horizontal_spacing=0.16 / across if across > 1 else 0,
    )
    figure.update_annotations(font_size=14)
    figure.update_layout(_LOOK, height=height + _TOP, margin={"t": _TOP, "l": 80, "r": 20}, showlegend=False)
    figure.update_xaxes(automargin=False)
    _plotly.add_notes(figure, notes, _AXIS + _FOOTER)
    return figure


def _name_rows(figure: Any, names: Sequence[str], place: dict[str, int]) -> None:
    """A row for every name, the first at the top."""
    rows = list(range(len(names)))
    look: dict[str, Any] = {"zeroline": False, "showgrid": False}
    figure.update_yaxes(tickvals=rows, ticktext=list(names), range=[len(names) - 0.5, -0.5], **look, **place)


def _counted(name: str, row: BoxRow | None) -> str:
    told = html.escape(name)
    if row is None:
        return f'<span style="color:{_QUIET}">{told} (not run)</span>'
    return f"{told} ({row.failures}/{row.runs} failed)" if row.failures else told


def _box_traces(name: str, position: int, row: BoxRow) -> list[Any]:
    """A box with its whiskers, and in it every run: dots that stand above each other by seed, crosses for failed."""
    low, middle, high = row.quartiles
    box = go.Box(
        y=[position],
        q1=[low],
        median=[middle],
        q3=[high],
        lowerfence=[row.whiskers[0]],
        upperfence=[row.whiskers[1]],
        orientation="h",
        line={"color": _QUIET, "width": 1},
        fillcolor="#ebebeb",
        width=0.72,
        hoverinfo="skip",
    )
    look = {
        "color": [_BAD if failed else COLOURS[0] for failed in row.failed],
        "symbol": ["x-thin" if failed else "circle" for failed in row.failed],
        "line": {"width": [2 if failed else 0 for failed in row.failed], "color": _BAD},
        "size": 7,
    }
    dots = go.Scatter(
        x=row.values,
        y=position + row.offsets,
        customdata=[f"{seed}{' (failed)' if bad else ''}" for seed, bad in zip(row.seeds, row.failed, strict=True)],
        mode="markers",
        marker=look,
        hovertemplate=f"{html.escape(name)}, seed %{{customdata}}: %{{x:.4f}}<extra></extra>",
    )
    return [box, dots]


def _course_traces(name: str, course: Course, reference: Course | None) -> list[go.Scatter]:
    """Runs below their mean, but those that failed above it."""
    quiet: dict[str, Any] = {"mode": _mode(course), "hoverinfo": "skip", "marker": {"size": 4}}
    thin, bad = {"width": 0.8, "color": COLOURS[0]}, {"width": 1.6, "color": _BAD}
    traces = [
        go.Scatter(x=course.x, y=values, opacity=0.5, line=thin, **quiet) for values in course.seeds[~course.failed]
    ]
    failed = [go.Scatter(x=course.x, y=values, line=bad, **quiet) for values in course.seeds[course.failed]]
    if reference is not None:
        grey = quiet | {"mode": _mode(reference), "line": {"width": 1.5, "color": _GREY}}
        traces.append(go.Scatter(x=reference.x, y=reference.mean, **grey))
    thick = {"width": 2.5, "color": COLOURS[0]}
    hover = f"{html.escape(name)}, epoch %{{x:.2f}}: %{{y:.4f}}<extra></extra>"
    look = {"mode": _mode(course), "marker": {"size": 7}, "line": thick}
    mean = go.Scatter(x=course.x, y=course.mean, hovertemplate=hover, **look)
    return [*traces, mean, *failed]


def _mode(course: Course) -> str:
    return "lines+markers" if course.has_markers else "lines"
