"""Landscapes of three axes in the browser: surfaces of equal loss, or slices."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from .._typing import Float
from ._prepare import Panel, Scale

SURFACES = 8
"""Of equal loss, evenly spaced from the lowest to where the scale ends."""

_AXES = "xyz"
_ABOVE, _BELOW, _SLIDER = 120, 230, 72  # pixels
_OPACITIES = [[0, 1], [0.5, 0.4], [1, 0.15]]  # of low to high losses, so that what is inside is seen


def volume(panel: Panel, scale: Scale, notes: Sequence[str]) -> go.Figure:
    """The same box twice, one hidden: nested surfaces, and three slices that sliders move."""
    common = _common(panel, scale)
    figure = go.Figure([_surfaces(common, scale), _slices(common, scale, panel.steps)])
    if np.isnan(panel.losses).any():
        notes = (*notes, "surfaces close around points without a number")
    inside = 560
    figure.update_layout(
        template="plotly_white",
        font={"family": "sans-serif", "size": 13},
        title={
            "text": "<br>".join([f"<b>{html.escape(panel.title)}</b>", *map(html.escape, (*panel.notes, *notes))]),
            **{"x": 0.01, "y": 0.99, "yanchor": "top", "font": {"size": 13}},
        },
        height=_ABOVE + inside + _BELOW,
        margin={"t": _ABOVE, "b": _BELOW, "l": 20, "r": 20},
        scene={f"{axis}axis_title": html.escape(label) for axis, label in zip(_AXES, panel.labels, strict=True)}
        | {"aspectmode": "cube", "camera": {"eye": {"x": 1.3, "y": -1.5, "z": 1.0}, "center": {"z": -0.1}}},
        updatemenus=[_buttons()],
        sliders=[_slider(number, steps, -_SLIDER * number / inside) for number, steps in enumerate(panel.steps)],
    )
    return figure


def _common(panel: Panel, scale: Scale) -> dict[str, Any]:
    grids = np.meshgrid(*panel.steps, indexing="ij")
    ticks = {"tickvals": [t for t, _ in scale.ticks], "ticktext": [text for _, text in scale.ticks]}
    return {
        **{axis: grid.ravel() for axis, grid in zip(_AXES, grids, strict=True)},
        "value": filled(panel.losses, scale).ravel(),
        "cmin": scale.low,
        "cmax": scale.high,
        "isomax": scale.high,
        "caps": {axis: {"show": False} for axis in _AXES},
        "colorscale": "Viridis",
        "colorbar": {
            "title": {"text": html.escape(scale.label), "side": "right"},
            "thickness": 16,
            "len": 0.9,
            **ticks,
        },
        "customdata": scale.shown(panel.losses.ravel()),
        "hovertemplate": "%{x:.3g}, %{y:.3g}, %{z:.3g}<br>"
        + f"{html.escape(scale.metric)}: %{{customdata:.5g}}<extra></extra>",
    }


def filled(losses: Float[np.ndarray, "*grid"], scale: Scale) -> Float[np.ndarray, "*grid"]:
    """Losses with one far above the scale for those that are no numbers: plotly draws nothing at all if there are any.

    So far above that interpolation from a neighbour leaves the scale at once, which makes a hole of the right size.
    """
    return np.where(np.isnan(losses), scale.high + 1e6 * (scale.high - scale.low), losses)


def _surfaces(common: dict[str, Any], scale: Scale) -> go.Volume:
    # the first is a little above the lowest loss, where it would be a single point
    lowest = scale.low + (scale.high - scale.low) / (2 * SURFACES)
    return go.Volume(**common, isomin=lowest, surface={"count": SURFACES}, opacity=0.7, opacityscale=_OPACITIES)


def _slices(common: dict[str, Any], scale: Scale, steps: Sequence[np.ndarray]) -> go.Isosurface:
    through = {axis: {"show": True, "locations": [_middle(s)[1]]} for axis, s in zip(_AXES, steps, strict=True)}
    return go.Isosurface(
        **common,
        isomin=scale.low,
        surface={"show": False},
        slices=through,
        visible=False,
        lighting={"ambient": 1, "diffuse": 0},
    )


def _middle(steps: np.ndarray) -> tuple[int, float]:
    """Where the model is, or the nearest there is."""
    index = int(np.argmin(np.abs(steps)))
    return index, float(steps[index])


def _buttons() -> dict[str, Any]:
    choices = {"surfaces of equal value": [True, False], "slices": [False, True]}
    buttons = [{"label": label, "method": "restyle", "args": [{"visible": v}]} for label, v in choices.items()]
    place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "top"}
    return {"type": "buttons", "direction": "right", "buttons": buttons, **place}


def _slider(number: int, steps: np.ndarray, height: float) -> dict[str, Any]:
    """Moves the slice across one axis."""
    target = f"slices.{_AXES[number]}.locations"
    moves = [{"label": f"{step:.3g}", "method": "restyle", "args": [{target: [[float(step)]]}, [1]]} for step in steps]
    words = {"prefix": f"slice across direction {number + 1}: "}
    look = {"y": height, "len": 0.6, "pad": {"t": 10}}
    return {"active": _middle(steps)[0], "steps": moves, "currentvalue": words, **look}
