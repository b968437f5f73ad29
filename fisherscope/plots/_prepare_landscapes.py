"""Landscapes as panels on one scale: units, titles, where they are cut, ticks."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np

from .._typing import Bool, Float
from ..landscape import Axis, Landscape
from ..landscape.scan import MARGIN
from ..landscape.surface import Geometry
from ..objectives import is_language_model
from ._prepare import (
    FEW,
    LOSS_LABELS,
    Panel,
    Panels,
    Reference,
    Scale,
    Titles,
    Width,
    as_sequence,
    model_name,
    titles_of,
)

_REFERENCES = {"uniform": ("ln V", "ln V"), "unigram": ("unigram entropy", "unigram")}
_GUESSING = f"ln V + {MARGIN:g}"
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
MOST_QUADRATICS = 4
"""Curves up to which the Fisher quadratic of each is drawn; with more, nobody could tell which is whose."""

LOSSES = ("loss", "perplexity")
"""What has lines of reference, a ceiling and a Fisher quadratic."""


def panels(
    landscapes: Landscape | Sequence[Landscape],
    metric: str,
    titles: Titles,
    *,
    axes: int,
    plot: str,
    slices: bool = False,
    width: Width = None,
) -> Panels:
    """Landscapes as panels on one scale; with ``slices``, one of three axes becomes its slices through the model.

    Raises:
        TypeError: If something else than landscapes was given.
        ValueError: If they do not go into one figure of this kind.
    """
    given = as_sequence(landscapes, Landscape, plot)
    _check_axes(given, (axes, 3) if slices else (axes,), plot)
    _check_metric(given, metric)
    if width not in (None, *(widths := get_args(get_args(Width)[0]))):
        raise ValueError(f"width must be {' or '.join(map(repr, widths))}, got {width!r}.")
    several_models = len({model_name(landscape) for landscape in given}) > 1

    def title(landscape: Landscape) -> str:
        name = model_name(landscape) if several_models else ""
        return f"{name}: {short_title(landscape.title)}" if name else short_title(landscape.title)

    words = titles_of(given, titles, title)
    parts = [(g, name) for g, name in zip(given, words, strict=True)]
    if slices and len(given[0].axes) == 3:
        parts = [part for g, name in parts for part in _slices(g, name)]
    shown = [part for part, _ in parts]
    scale, cut = _scale(shown, metric, is_log=plot == "contour" and metric == "loss")
    drawn = tuple(_panel(part, name, scale) for part, name in parts)
    if len(drawn) > MOST_QUADRATICS:
        drawn = tuple(replace(panel, quadratic=None) for panel in drawn)
    symbols = _symbols_note(shown)
    notes = (cut, _grid_note(shown), _replicates_note(shown), symbols, _directions_note(given), _data_note(given))
    return Panels(drawn, scale, _distinct(shown, scale), tuple(filter(None, notes)), width)


def marker_notes(drawn: Panels) -> list[str]:
    """The losses of the marked models, and of what the landscape shows in their place, in the order of the markers."""
    notes = []
    for panel in drawn.panels:
        losses = [(m.name, m.loss, m.nearest_loss) for m in panel.markers if m.loss is not None]
        each = [f"{name}: {loss:#.3g}" + (f" ({seen:#.3g})" if seen is not None else "") for name, loss, seen in losses]
        if each:
            title = f"{panel.title}: " if len(drawn.panels) > 1 else ""
            place = "line" if len(panel.steps) == 1 else "plane"
            whole = ", ".join(text.replace(" ", "\N{NO-BREAK SPACE}") for text in each)
            notes.append(f"{title}loss of other models (of the nearest point of the {place}): {whole}")
    return notes


def interpolated(panel: Panel, places: Sequence[Sequence[float]] | np.ndarray) -> Float[np.ndarray, "places"]:
    """The values at some places, each one step per axis, linear between the points of the grid; NaN beyond it."""
    from scipy.interpolate import RegularGridInterpolator

    grid = RegularGridInterpolator(panel.steps, panel.losses, bounds_error=False)
    return grid(np.reshape(np.asarray(places, dtype=float), (-1, len(panel.steps))))


def short_title(title: str) -> str:
    """A mask's rule as a panel says it: ``top 0.5 of entries within model`` becomes ``top 50 % of entries``."""

    def words(match: re.Match[str]) -> str:
        share, unit, group = match.groups()
        return f"{float(share) * 100:g}\N{NO-BREAK SPACE}% of {unit}" + ("" if group == "model" else f" per {group}")

    shorter = re.sub(r"(\d[\d.]*(?:e-?\d+)?) of (\w+) within (model|layer|parameter)", words, title)
    return re.sub(r", (seed \d+)", r" (\1)", shorter).replace("~", "not ")


def round_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Up to eight round numbers between two others, with their texts."""
    step, decimals = _round_step((high - low) / 7)
    digits = math.floor(math.log10(max(abs(low), abs(high)))) + decimals + 1
    texts = f",.{decimals}f" if decimals < 5 else f".{digits}g"
    return [(k * step, f"{k * step:{texts}}") for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def logarithmic_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers between two given by their natural logarithms, as (logarithm, text)."""
    decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        values = [(math.log(m) + k * math.log(10), m, k) for k in decades for m in mantissas]
        inside = [value for value in values if low <= value[0] <= high]
        if len(inside) >= 4:
            return [(loss, _power(m, k)) for loss, m, k in inside[:: math.ceil(len(inside) / 7)]]
    if high > 700:  # exp would overflow
        return [(loss, f"e^{text}") for loss, text in round_ticks(low, high)]
    return [(math.log(value), text) for value, text in round_ticks(math.exp(low), math.exp(high))]


def _round_step(least: float) -> tuple[float, int]:
    """The smallest of ..., 0.5, 1, 2, 5, 10, ... that is not less, and the decimals it needs."""
    exponent = math.floor(math.log10(least))
    mantissa = next((m for m in (1, 2, 5) if m * 10.0**exponent >= least), 10)
    return mantissa * 10.0**exponent, max(0, -exponent - (mantissa == 10))


def _power(mantissa: int, exponent: int) -> str:
    return f"{mantissa}e{exponent}" if abs(exponent) > 5 else f"{mantissa * 10.0**exponent:,g}"


def _check_axes(given: Sequence[Landscape], allowed: Sequence[int], plot: str) -> None:
    found = sorted({len(landscape.axes) for landscape in given})
    if len(found) > 1:
        raise ValueError(
            f"The landscapes of one figure need the same number of axes, got {' and '.join(map(str, found))}; "
            "draw those with one axis by curves and those with two by surface or contour."
        )
    if found[0] not in allowed:
        instead = {1: "; use curves", 2: "; use surface or contour", 3: "; use contour or volume"}.get(found[0], "")
        number = " or ".join(("one axis", "two axes", "three axes")[axes - 1] for axes in allowed)
        raise ValueError(f"{plot} needs landscapes of exactly {number}, got {found[0]}{instead}.")


def _check_metric(given: Sequence[Landscape], metric: str) -> None:
    objectives = list(dict.fromkeys(landscape.objective for landscape in given))
    if len(objectives) > 1:
        raise ValueError(
            f"The landscapes of one figure share one scale, but these are of {' and '.join(objectives)}, whose losses "
            "have different units; draw them in separate figures."
        )
    shared = [name for name in given[0].metrics if all(name in landscape.metrics for landscape in given)]
    if metric not in (*LOSSES, *shared):
        others = ", ".join(map(repr, shared)) or "nothing else"
        raise ValueError(
            f"metric must be 'loss', 'perplexity', or what was measured beside them ({others}), got {metric!r}."
        )
    if metric == "perplexity" and not is_language_model(objectives[0]):
        raise ValueError(
            f"Perplexity needs mlm, causal-lm or seq2seq-lm, but this landscape is of {objectives[0]}; draw the loss."
        )


def _slices(landscape: Landscape, title: str) -> list[tuple[Landscape, str]]:
    """The planes of two of three axes through the model, with the markers that lie in them."""
    found = []
    for pair in itertools.combinations(range(3), 2):
        (rest,) = {0, 1, 2} - set(pair)
        place: list[Any] = [slice(None)] * 3
        place[rest] = landscape.centre[rest]
        names = [_direction(landscape.axes[number]) for number in pair]
        markers = [m for m in landscape.markers if m.steps[rest] == 0]
        part = Landscape(
            tuple(landscape.axes[number] for number in pair),
            landscape.loss[tuple(place)],
            landscape.evaluated[tuple(place)],
            landscape.objective,
            landscape.references,
            landscape.title,
            landscape.provenance,
            {name: values[tuple(place)] for name, values in landscape.metrics.items()},
            None if landscape.clipped is None else landscape.clipped[tuple(place)],
            geometry=_part_of(landscape.geometry, pair) if landscape.geometry else None,
            markers=tuple(replace(m, steps=tuple(m.steps[number] for number in pair)) for m in markers),
            connected=landscape.connected and len(markers) == len(landscape.markers),
            prediction=landscape.prediction,
        )
        found.append((part, f"{title}, directions {' and '.join(names)}"))
    return found


def _part_of(geometry: Geometry, axes: Sequence[int]) -> Geometry:
    square = np.ix_(axes, axes)
    return replace(
        geometry, inner=geometry.inner[square], fisher=None if geometry.fisher is None else geometry.fisher[square]
    )


def _direction(axis: Axis) -> str:
    """The number of an axis from 1, or its name if it has another."""
    number = re.fullmatch(r"axis(\d+)", axis.name)
    return str(int(number[1]) + 1) if number else axis.name


def _axis_label(axis: Axis) -> str:
    """What an axis is, where its direction is a special one."""
    ordinary = axis.kind.startswith("random") or axis.kind == "given"
    return f"step along direction {_direction(axis)}" if ordinary else axis.kind


def _is_shown(landscape: Landscape, metric: str) -> Bool[np.ndarray, "*grid"]:
    """Where there is a value: measured, on all examples unless only a loss is wanted, or predicted."""
    known = landscape.evaluated.copy()
    if metric not in LOSSES and landscape.clipped is not None:
        known &= ~landscape.clipped
    return known | np.isfinite(landscape.loss) if metric in LOSSES and landscape.prediction else known


def _all_values(landscape: Landscape, metric: str) -> Float[np.ndarray, "*grid"]:
    return landscape.loss if metric in LOSSES else landscape.metrics[metric]


def _values(landscape: Landscape, metric: str) -> Float[np.ndarray, "*grid"]:
    """Values that are numbers; NaN elsewhere."""
    values = _all_values(landscape, metric)
    return np.where(_is_shown(landscape, metric) & np.isfinite(values), values, np.nan)


def _centre(landscape: Landscape, metric: str) -> float | None:
    index = landscape.centre
    is_on_grid = all(axis.steps[i] == 0 for axis, i in zip(landscape.axes, index, strict=True))
    value = float(_values(landscape, metric)[index])
    return value if is_on_grid and math.isfinite(value) else None


def _scale(given: Sequence[Landscape], metric: str, *, is_log: bool) -> tuple[Scale, str]:
    """The scale of all landscapes, and the sentence that says what it leaves out."""
    values = np.concatenate([_all_values(part, metric)[_is_shown(part, metric)] for part in given])
    finite = values[np.isfinite(values)]
    if not finite.size:
        what = "loss" if metric in LOSSES else metric
        raise ValueError(f"There is nothing to draw: no point of the landscapes has a finite {what} so far.")
    low, high, rule, limit = float(finite.min()), float(finite.max()), "", math.inf
    if metric in LOSSES:
        centres = [centre for centre in (_centre(part, metric) for part in given) if centre is not None]
        guessing = [landscape.references["uniform"] for landscape in given if "uniform" in landscape.references]
        centre = max(centres, default=low)
        limit = _limit(centre, max(guessing, default=None))
        high, rule = _ceiling(values, finite, centre, limit)
    beside = _beside(given, metric)
    low = float(min([low, *beside]))
    high = high if rule else float(max([high, *beside[beside <= limit]]))
    if is_beside_cut := bool((beside > high).any()):
        high, rule = (high, rule) if rule else (limit, _GUESSING)
    if high <= low:  # all the same
        low, high = low - 0.5, high + 0.5
    scale = Scale(_label(given[0].objective, metric), metric, low, high, bool(rule), ())
    if metric == "perplexity":
        scale = replace(scale, ticks=tuple(logarithmic_ticks(low, high)))
    elif is_log and low > 0:
        ticks = [(math.exp(place), text) for place, text in logarithmic_ticks(math.log(low), math.log(high))]
        scale = replace(scale, label=with_log_scale(scale.label), ticks=tuple(ticks), is_log=True)
    else:
        scale = replace(scale, ticks=tuple(round_ticks(low, high)))
    note = _cut_note(values, scale, rule, is_beside_cut, "nats" in LOSS_LABELS.get(given[0].objective, ""))
    return scale, note


def _label(objective: str, metric: str) -> str:
    label = LOSS_LABELS.get(objective, f"{objective} per example")
    if metric == "perplexity":
        return label.split(" (")[0].replace("loss", "perplexity") + " (logarithmic scale)"
    return label if metric == "loss" else metric.replace("_", " ")


def with_log_scale(label: str) -> str:
    return f"{label[:-1]}, log scale)" if label.endswith(")") else f"{label} (log scale)"


def _limit(centre: float, guessing: float | None) -> float:
    """Half a nat above guessing, if that is above the models themselves; else infinite."""
    return guessing + MARGIN if guessing is not None and centre < guessing + MARGIN else math.inf


def _ceiling(losses: np.ndarray, finite: np.ndarray, centre: float, limit: float) -> tuple[float, str]:
    """Where the scale ends, and by which rule if that leaves something out.

    At the limit if there is one. Else at the 95th percentile, if the rest would take more than half of the scale.
    """
    low, top = float(finite.min()), float(finite.max())
    if limit < math.inf:
        ceiling, rule = limit, _GUESSING
    else:
        ceiling, rule = max(centre, float(np.percentile(finite, 95))), "the 95th percentile"
        if top - low <= 2 * (ceiling - low):
            ceiling, rule = top, "the largest finite value"
    return (ceiling, rule) if (losses > ceiling).any() else (top, "")


def _cut_note(losses: np.ndarray, scale: Scale, rule: str, is_beside_cut: bool, is_in_nats: bool) -> str:
    notes = []
    if rule:
        value = f"{scale.high:.3g}{' nats' if is_in_nats else ''}"
        if scale.metric == "perplexity":
            value += f", perplexity {scale.shown(np.array([scale.high]))[0]:,.0f}"
        above = f"{int((losses > scale.high).sum()):,} of {losses.size:,} points above"
        above += ", and parts of intervals or single directions" if is_beside_cut else ""
        notes.append(f"cut at {rule} = {value}; {above}")
    if undefined := int(np.isnan(losses).sum() + np.isneginf(losses).sum()):
        notes.append(f"not a number at {undefined:,} of {losses.size:,}")
    return "; ".join(notes)


def _panel(landscape: Landscape, title: str, scale: Scale) -> Panel:
    losses = _values(landscape, scale.metric)
    finite = losses[np.isfinite(losses)]
    low, high = (finite.min(), min(finite.max(), scale.high)) if finite.size else (0.0, 0.0)
    references = _references(landscape) if scale.metric in LOSSES else []
    along = _along(landscape, scale.metric)
    return Panel(
        title,
        _panel_notes(landscape),
        tuple(np.asarray(axis.steps, dtype=float) for axis in landscape.axes),
        losses,
        _centre(landscape, scale.metric),
        tuple(reference for reference in references if low < reference.value < high),
        tuple(_axis_label(axis) for axis in landscape.axes),
        relative=_relative(landscape),
        is_isometric=_are_close(_norms(landscape)),
        markers=landscape.markers,
        connected=landscape.connected,
        measured=landscape.evaluated if landscape.prediction else None,
        replicates=along,
        band=_interval(landscape, along) if along else None,
        quadratic=_quadratic(landscape) if scale.metric in LOSSES else None,
    )


def _norms(landscape: Landscape) -> list[float]:
    """The norms of the directions, on average over replicates."""
    each = [[axis.norm for axis in part.axes] for part in landscape.replicates or (landscape,)]
    return [float(norm) for norm in np.mean(each, axis=0)]


def _relative(landscape: Landscape) -> tuple[float, ...] | None:
    weights = landscape.geometry.weight_norm if landscape.geometry else 0.0
    return tuple(norm / weights for norm in _norms(landscape)) if weights > 0 else None


def _along(landscape: Landscape, metric: str) -> tuple[Float[np.ndarray, "points"], ...]:
    """The values of the replicates, of one axis."""
    replicates = landscape.replicates if len(landscape.axes) == 1 else ()
    return tuple(_values(replicate, metric) for replicate in replicates)


def _beside(given: Sequence[Landscape], metric: str) -> Float[np.ndarray, "values"]:
    """All finite numbers that are drawn beside the curves: ends of the intervals, and single directions if few."""
    each = [(part, along) for part in given if (along := _along(part, metric))]
    singles = [values for _, along in each for values in along]
    intervals = [end for part, along in each for end in _interval(part, along)]
    drawn = np.concatenate([np.zeros(0), *intervals, *(singles if len(singles) <= FEW else ())])
    return drawn[np.isfinite(drawn)]


def _interval(landscape: Landscape, along: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of the mean over directions."""
    from ..landscape.statistics import band

    replicates = [replace(r, loss=values) for r, values in zip(landscape.replicates, along, strict=True)]
    found = band(replace(landscape, replicates=tuple(replicates)))
    return found.low, found.high


def _quadratic(landscape: Landscape) -> Float[np.ndarray, "points"] | None:
    """The loss along one axis that Fisher scores foretell, if there are any that do."""
    from ..landscape.statistics import fisher_quadratic

    foretold = landscape.geometry is not None and landscape.geometry.fisher is not None and landscape.geometry.quadratic
    return fisher_quadratic(landscape) if foretold and len(landscape.axes) == 1 else None


def _panel_notes(landscape: Landscape) -> tuple[str, ...]:
    entries = " / ".join(f"{count:,}" for count in dict.fromkeys(axis.entries for axis in landscape.axes))
    one = len(landscape.axes) == 1
    symbols = ["‖d‖" if one else f"‖d{_direction(axis).translate(_SUBSCRIPTS)}‖" for axis in landscape.axes]
    norms = [
        f"{symbol} = {_three_digits(norm)}".replace(" ", "\N{NO-BREAK SPACE}")
        for symbol, norm in zip(symbols, _norms(landscape), strict=True)
    ]
    notes = [f"{entries} entries move", ", ".join(norms)]
    if landscape.geometry and (relative := _relative(landscape)):
        shares = relative[:1] if _are_close(relative) else relative
        angles = landscape.geometry.cosines[np.triu_indices(len(relative), 1)]
        cosines = (
            "" if one else f", cosine\N{NO-BREAK SPACE}{' / '.join(f'{round(angle, 2) + 0:.2f}' for angle in angles)}"
        )
        notes.append(f"{', '.join(map(_three_digits, shares))} of ‖θ‖{cosines}".replace("-", "\N{MINUS SIGN}"))
    done = f"{int(landscape.evaluated.sum()):,} of {landscape.loss.size:,} points"
    if landscape.prediction:
        within = f"{100 * landscape.prediction.percentile95:.2g}"
        notes += [
            f"measured {done}",
            f"the rest predicted, 95 % within {within} %".replace(" %", "\N{NO-BREAK SPACE}%"),
        ]
    elif not landscape.evaluated.all():
        notes.append(done)
    return tuple(notes)


def _are_close(sizes: Sequence[float]) -> bool:
    """Whether sizes agree to 1 %."""
    return max(sizes) <= 1.01 * min(sizes)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:#.3g}".rstrip(".")


def _references(landscape: Landscape) -> list[Reference]:
    return [Reference(*_REFERENCES.get(name, (name, name)), float(v)) for name, v in landscape.references.items()]


def _distinct(given: Sequence[Landscape], scale: Scale) -> tuple[Reference, ...]:
    """The references inside the scale, once each if they agree to the three digits that a figure shows."""
    found = {(r.label, f"{r.value:.3g}"): r for landscape in given for r in _references(landscape)}
    return tuple(r for r in found.values() if scale.low <= r.value <= scale.high and scale.metric in LOSSES)


def _grid_note(given: Sequence[Landscape]) -> str:
    sizes = dict.fromkeys(
        " \N{MULTIPLICATION SIGN} ".join(str(size) for size in landscape.loss.shape) for landscape in given
    )
    return f"{' and '.join(sizes)} points, linear in between"


def _replicates_note(given: Sequence[Landscape]) -> str:
    counts = list(dict.fromkeys(len(landscape.replicates) for landscape in given if landscape.replicates))
    if not counts:
        return ""
    axes = len(given[0].axes)
    mean = f"means over {' and '.join(map(str, counts))} {('directions', 'pairs', 'triples')[axes - 1]}"
    return mean + (", shaded: their 95\N{NO-BREAK SPACE}% interval" if axes == 1 else " of directions")


def _symbols_note(given: Sequence[Landscape]) -> str:
    """In words what panels tell of the geometry of their directions."""
    if not any(map(_relative, given)):
        return ""
    cosine = "; cosine: of the angle between two directions" if len(given[0].axes) > 1 else ""
    return f"‖d‖: length of a step of 1; ‖θ‖: length of all weights{cosine}"


def _directions_note(given: Sequence[Landscape]) -> str:
    """How the directions were made, as far as the landscapes know."""

    def matched(settings: Mapping[str, Any]) -> str:
        words = {"norm": "sizes matched by norm", "fisher": "sizes matched by Fisher norm"}
        return words.get(settings.get("match", "none"), "")

    def kind(settings: Mapping[str, Any]) -> str:
        return f"{settings['directions']} directions" if isinstance(settings.get("directions"), str) else ""

    facts: list[Callable[[Mapping[str, Any]], str]] = [
        kind,
        lambda s: f"seed {s['seed']}" if kind(s) and s.get("seed") is not None else "",
        lambda s: "biases and norms at rest" if kind(s) and s.get("one_dimensional") == "skip" else "",
        lambda s: "made orthogonal" if s.get("orthogonal") else "",
        matched,
    ]
    return _facts([landscape.provenance.get("settings") or {} for landscape in given], facts)


def _data_note(given: Sequence[Landscape]) -> str:
    """The model and what its loss is of, as far as the landscapes know."""

    def settings(landscape: Landscape) -> Mapping[str, Any]:
        return landscape.provenance.get("settings") or {}

    def examples(landscape: Landscape) -> str:
        data = landscape.provenance.get("data") or {}
        count, source = (data.get("settings") or {}).get("num_examples"), data.get("source")
        return f"{count:,} examples of {source}" if count and source else source or ""

    def tokens(landscape: Landscape) -> str:
        counts = (landscape.replicates or (landscape,))[0].counts
        count = settings(landscape).get("tokens") if counts is None else int(counts.sum())
        is_tokens = is_language_model(landscape.objective)
        return f"{count:,} scored {'tokens' if is_tokens else 'labels'}" if count else ""

    return _facts(given, [model_name, examples, tokens, lambda landscape: settings(landscape).get("dtype") or ""])


def _facts(things: Sequence[Any], facts: Iterable[Callable[[Any], str]]) -> str:
    """What is known of several things: every fact once, with all values it has."""
    found = (dict.fromkeys(fact(thing) for thing in things) for fact in facts)
    return "; ".join(
        " and ".join(filter(None, values)) + (" (not all)" if "" in values else "") for values in found if any(values)
    )
