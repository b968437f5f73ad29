"""Landscapes as one page to explore: a contour map, a surface and cuts that are linked, and the facts below.

The numbers are embedded once, as JSON; ``_page.html`` holds the markup and the script that draws them with plotly.js.
"""

import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from ..landscape import Landscape
from ..landscape.statistics import band
from ..objectives import is_language_model
from ._plotly import CAMERA, LEVELS, bands
from ._prepare import COLOURS, Panel, Panels, Titles, model_name
from ._prepare_landscapes import logarithmic_ticks, panels, with_log_scale


def document(given: Sequence[Landscape], metric: str, titles: Titles) -> str:
    """The page of landscapes of one or two axes, all on the same scales.

    Raises:
        ValueError: If they do not go into one figure, or ``metric`` is unknown.
    """
    axes = 1 if all(len(landscape.axes) == 1 for landscape in given) else 2
    shown = {name: panels(given, name, titles, axes=axes, plot="page") for name in _metrics(given, metric)}
    names = list(dict.fromkeys(filter(None, map(model_name, given))))
    title = ": ".join(["Loss landscape" + ("s" if len(given) > 1 else ""), *names[: len(names) == 1]])
    data = json.dumps(_data(given, shown, metric), allow_nan=False, ensure_ascii=False)
    parts = {
        "title": html.escape(title),
        "plotly": get_plotlyjs(),
        "data": data.replace("<", "\\u003c"),  # or a title could end the script
    }
    template = resources.files("fisherscope.plots").joinpath("_page.html").read_text(encoding="utf-8")
    return re.sub(r"<!--(title|plotly|data)-->", lambda match: parts[match[1]], template)


def _metrics(given: Sequence[Landscape], metric: str) -> list[str]:
    """What can be shown of all landscapes; the one asked for in any case, so that it is refused in the usual words."""
    is_perplexity = all(is_language_model(landscape.objective) for landscape in given)
    common = [name for name in given[0].metrics if all(name in landscape.metrics for landscape in given)]
    return list(dict.fromkeys(["loss", *["perplexity"] * is_perplexity, *common, metric]))


def _data(given: Sequence[Landscape], shown: dict[str, Panels], metric: str) -> dict[str, Any]:
    """What the script draws: plain numbers, None where there is none."""
    quantities = [_quantity(name, panels) for name, panels in shown.items()]
    if (scale := shown["loss"].scale).low > 0:
        ticks = logarithmic_ticks(*np.log([scale.low, scale.high]).tolist())
        ends = {"low": float(np.log(scale.low)), "high": float(np.log(scale.high)), "ticks": ticks, "is_log": True}
        words = {"name": "loss, logarithmic scale", "label": with_log_scale(quantities[0]["label"])}
        quantities.insert(1, {**quantities[0], **ends, **words})
    drawn = [tuple(panels.panels[number] for panels in shown.values()) for number in range(len(given))]
    return {
        "quantities": quantities,
        "first": [quantity["name"] for quantity in quantities].index(metric),
        "panels": [_panel(g, dict(zip(shown, views, strict=True))) for g, views in zip(given, drawn, strict=True)],
        "levels": LEVELS,
        "colours": COLOURS,
        "camera": CAMERA,
    }


def _quantity(name: str, panels: Panels) -> dict[str, Any]:
    scale = panels.scale
    references = panels.references if name in ("loss", "perplexity") else ()
    return {
        "name": name,
        "key": "loss" if name == "perplexity" else name,
        "label": scale.label,
        "low": scale.low,
        "high": scale.high,
        "is_cut": scale.is_cut,
        "is_log": False,
        "is_exp": name == "perplexity",
        "ticks": scale.ticks,
        "colours": bands(scale.is_cut),
        "references": [{"label": f"{r.label} = {r.value:.3g}", "value": r.value} for r in references],
        "notes": panels.notes,
    }


def _panel(landscape: Landscape, views: dict[str, Panel]) -> dict[str, Any]:
    geometry, seen = landscape.geometry, views["loss"]
    return {
        "title": seen.title,
        "labels": seen.labels,
        "is_isometric": seen.is_isometric,
        "facts": [(name, text) for name, text in _facts(landscape).items() if text],
        "steps": [axis.steps.tolist() for axis in landscape.axes],
        "values": {name: numbers(view.losses) for name, view in views.items() if name != "perplexity"},
        "bands": _bands(landscape, views),
        "quadratic": None if seen.quadratic is None else numbers(seen.quadratic),
        "measured": None if seen.measured is None else seen.measured.tolist(),
        "markers": [
            {
                "name": marker.name,
                "steps": marker.steps,
                "distance": marker.distance,
                "loss": _number(marker.loss),
                "nearest_loss": _number(marker.nearest_loss),
            }
            for marker in seen.markers
        ],
        "connected": seen.connected,
        "inner": None if geometry is None else geometry.inner.tolist(),
        "weight_norm": None if geometry is None else geometry.weight_norm,
    }


def _bands(landscape: Landscape, views: dict[str, Panel]) -> dict[str, Any]:
    """Intervals of the means over random directions; of two axes, those of the loss."""
    found = {name: view.band for name, view in views.items() if view.band is not None and name != "perplexity"}
    if len(landscape.axes) > 1 and landscape.replicates:
        interval = band(landscape)
        found["loss"] = (interval.low, interval.high)
    return {name: {"low": numbers(low), "high": numbers(high)} for name, (low, high) in found.items()}


def numbers(values: np.ndarray) -> list[Any]:
    """Nested lists with None for what is not finite, as JSON has no word for it."""
    plain = values.astype(object)
    plain[~np.isfinite(values)] = None
    return plain.tolist()


def _number(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def _facts(landscape: Landscape) -> dict[str, str]:
    """What a reader must know to judge a landscape, in words; empty where it is not known."""
    facts, geometry = landscape.provenance, landscape.geometry
    data, settings, mask = facts.get("data") or {}, facts.get("settings") or {}, facts.get("mask") or {}
    grid = " \N{MULTIPLICATION SIGN} ".join(str(size) for size in landscape.loss.shape)
    done = int(landscape.evaluated.sum())
    prediction, unmeasured = landscape.prediction, landscape.loss.size - done
    rest = "" if prediction is None else f", the others predicted (95 % of errors below {prediction.percentile95:.2g})"
    norms, weights = [axis.norm for axis in landscape.axes], geometry.weight_norm if geometry else 0.0
    relative = ", ".join(f"{100 * norm / weights:.3g} %" for norm in norms) if weights > 0 else ""
    cosine = float(geometry.cosines[0, 1]) if geometry is not None and len(norms) > 1 else None
    return {
        "model": model_name(landscape),
        "moves": landscape.title,
        "mask": str(mask.get("rule") or ""),
        "entries that move": " / ".join(f"{axis.entries:,}" for axis in landscape.axes),
        "directions": ", ".join(dict.fromkeys(axis.kind for axis in landscape.axes)),
        "random directions": f"mean of {len(landscape.replicates)}" if landscape.replicates else "",
        "length of step 1": ", ".join(f"{norm:.4g}" for norm in norms) + (f" ({relative} of ‖θ‖)" if relative else ""),
        "cosine between them": "" if cosine is None else f"{cosine:.3g}",
        "loss of the model": f"{landscape.centre_loss:.5g}",
        "objective": landscape.objective,
        "grid": f"{grid} points" + (f", {done:,} measured{rest}" if unmeasured else ""),
        "data": str(data.get("source") or ""),
        "examples": "" if landscape.counts is None else f"{len(landscape.counts):,}",
        "scored tokens": "" if landscape.counts is None else f"{int(landscape.counts.sum()):,}",
        "seed": "" if settings.get("seed") is None else str(settings["seed"]),
        "command": str(facts.get("command") or ""),
        "made": str(facts.get("time") or ""),
        "versions": ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items()),
    }
