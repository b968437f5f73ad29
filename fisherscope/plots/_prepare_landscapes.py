"""Landscapes as panels on one scale: units, titles, where they are cut, ticks."""

import math
import re
from collections.abc import Sequence

import numpy as np

from .._typing import Float
from ..landscape import Landscape
from ..objectives import is_language_model
from ._prepare import LOSS_LABELS, Metric, Panel, Panels, Reference, Scale, Titles, as_sequence, model_name, titles_of

MARGIN_ABOVE_GUESSING = 0.5
"""Nats above ln V at which landscapes of language models are cut: beyond guessing, a loss says nothing more."""

_REFERENCES = {"uniform": ("ln V", "ln V"), "unigram": ("unigram entropy", "unigram")}
_SUBSCRIPTS = "₁₂₃"


def panels(landscapes: Landscape | Sequence[Landscape], metric: str, titles: Titles, *, axes: int, plot: str) -> Panels:
    """Landscapes as panels on one scale.

    Raises:
        TypeError: If something else than landscapes was given.
        ValueError: If they do not go into one figure of this kind.
    """
    given = as_sequence(landscapes, Landscape, plot)
    _check_axes(given, axes, plot)
    scale, cut = _scale(given, _check_metric(given, metric))
    several_models = len({model_name(landscape) for landscape in given}) > 1

    def title(landscape: Landscape) -> str:
        name = model_name(landscape) if several_models else ""
        return f"{name}: {short_title(landscape.title)}" if name else short_title(landscape.title)

    drawn = tuple(_panel(g, words, scale) for g, words in zip(given, titles_of(given, titles, title), strict=True))
    return Panels(drawn, scale, _distinct(given, scale), tuple(filter(None, (cut, _grid_note(given)))))


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


def perplexity_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round perplexities between two losses, as (loss, text)."""
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


def _check_axes(given: Sequence[Landscape], axes: int, plot: str) -> None:
    found = sorted({len(landscape.axes) for landscape in given})
    if len(found) > 1:
        raise ValueError(
            f"The landscapes of one figure need the same number of axes, got {' and '.join(map(str, found))}; "
            "draw those with one axis by curves and those with two by surface or contour."
        )
    if found[0] != axes:
        instead = {1: "; use curves", 2: "; use surface or contour"}.get(found[0], "")
        number = ("one axis", "two axes")[axes - 1]
        raise ValueError(f"{plot} needs landscapes of exactly {number}, got {found[0]}{instead}.")


def _check_metric(given: Sequence[Landscape], metric: str) -> Metric:
    objectives = list(dict.fromkeys(landscape.objective for landscape in given))
    if len(objectives) > 1:
        raise ValueError(
            f"The landscapes of one figure share one scale, but these are of {' and '.join(objectives)}, whose losses "
            "have different units; draw them in separate figures."
        )
    if metric == "loss":
        return "loss"
    if metric != "perplexity":
        raise ValueError(f"metric must be 'loss' or 'perplexity', got {metric!r}.")
    if not is_language_model(objectives[0]):
        raise ValueError(
            f"Perplexity needs mlm, causal-lm or seq2seq-lm, but this landscape is of {objectives[0]}; draw the loss."
        )
    return "perplexity"


def _measured(landscape: Landscape) -> Float[np.ndarray, "*grid"]:
    """Losses that are numbers; NaN elsewhere."""
    return np.where(landscape.evaluated & np.isfinite(landscape.loss), landscape.loss, np.nan)


def _centre(landscape: Landscape) -> float | None:
    index = tuple(int(np.argmin(np.abs(axis.steps))) for axis in landscape.axes)
    is_on_grid = all(axis.steps[i] == 0 for axis, i in zip(landscape.axes, index, strict=True))
    loss = float(_measured(landscape)[index])
    return loss if is_on_grid and math.isfinite(loss) else None


def _scale(given: Sequence[Landscape], metric: Metric) -> tuple[Scale, str]:
    """The scale of all landscapes, and the sentence that says what it leaves out."""
    losses = np.concatenate([landscape.loss[landscape.evaluated] for landscape in given])
    finite = losses[np.isfinite(losses)]
    if not finite.size:
        raise ValueError("There is nothing to draw: no point of the landscapes has a finite loss so far.")
    centres = [centre for centre in map(_centre, given) if centre is not None]
    guessing = [landscape.references["uniform"] for landscape in given if "uniform" in landscape.references]
    high, rule = _ceiling(losses, finite, max(centres, default=float(finite.min())), max(guessing, default=None))
    low = float(finite.min())
    if high <= low:  # all the same
        low, high = low - 0.5, high + 0.5
    ticks = (perplexity_ticks if metric == "perplexity" else round_ticks)(low, high)
    scale = Scale(_label(given[0].objective, metric), metric, low, high, bool(rule), tuple(ticks))
    return scale, _cut_note(losses, scale, rule, "nats" in LOSS_LABELS.get(given[0].objective, ""))


def _label(objective: str, metric: Metric) -> str:
    label = LOSS_LABELS.get(objective, f"{objective} per example")
    if metric == "loss":
        return label
    return label.split(" (")[0].replace("loss", "perplexity") + " (logarithmic scale)"


def _ceiling(losses: np.ndarray, finite: np.ndarray, centre: float, guessing: float | None) -> tuple[float, str]:
    """Where the scale ends, and by which rule if that leaves something out.

    Language models: half a nat above guessing, if that is above the models themselves. Others: at the 95th percentile,
    if the rest would take more than half of the scale.
    """
    low, top = float(finite.min()), float(finite.max())
    if guessing is not None and centre < guessing + MARGIN_ABOVE_GUESSING:
        ceiling, rule = guessing + MARGIN_ABOVE_GUESSING, f"ln V + {MARGIN_ABOVE_GUESSING:g}"
    else:
        ceiling, rule = max(centre, float(np.percentile(finite, 95))), "the 95th percentile"
        if top - low <= 2 * (ceiling - low):
            ceiling, rule = top, "the largest finite value"
    return (ceiling, rule) if (losses > ceiling).any() else (top, "")


def _cut_note(losses: np.ndarray, scale: Scale, rule: str, is_in_nats: bool) -> str:
    notes = []
    if rule:
        value = f"{scale.high:.3g}{' nats' if is_in_nats else ''}"
        if scale.metric == "perplexity":
            value += f", perplexity {scale.shown(np.array([scale.high]))[0]:,.0f}"
        notes.append(f"cut at {rule} = {value}; {int((losses > scale.high).sum()):,} of {losses.size:,} points above")
    if undefined := int(np.isnan(losses).sum() + np.isneginf(losses).sum()):
        notes.append(f"not a number at {undefined:,} of {losses.size:,}")
    return "; ".join(notes)


def _panel(landscape: Landscape, title: str, scale: Scale) -> Panel:
    losses = _measured(landscape)
    finite = losses[np.isfinite(losses)]
    low, high = (finite.min(), min(finite.max(), scale.high)) if finite.size else (0.0, 0.0)
    crossed = tuple(reference for reference in _references(landscape) if low < reference.value < high)
    steps = tuple(np.asarray(axis.steps, dtype=float) for axis in landscape.axes)
    return Panel(title, _panel_notes(landscape), steps, losses, _centre(landscape), crossed)


def _panel_notes(landscape: Landscape) -> tuple[str, ...]:
    entries = " / ".join(f"{count:,}" for count in dict.fromkeys(axis.entries for axis in landscape.axes))
    symbols = ["‖d‖"] if len(landscape.axes) == 1 else [f"‖d{digit}‖" for digit in _SUBSCRIPTS]
    norms = [f"{symbol} = {_three_digits(axis.norm)}" for symbol, axis in zip(symbols, landscape.axes, strict=False)]
    done = int(landscape.evaluated.sum())
    part = (f"{done:,} of {landscape.loss.size:,} points",) if done < landscape.loss.size else ()
    return (f"{entries} entries move", ", ".join(norms), *part)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:#.3g}".rstrip(".")


def _references(landscape: Landscape) -> list[Reference]:
    return [Reference(*_REFERENCES.get(name, (name, name)), float(v)) for name, v in landscape.references.items()]


def _distinct(given: Sequence[Landscape], scale: Scale) -> tuple[Reference, ...]:
    """The references inside the scale, once each if they agree to the three digits that a figure shows."""
    found = {(r.label, f"{r.value:.3g}"): r for landscape in given for r in _references(landscape)}
    return tuple(r for r in found.values() if scale.low <= r.value <= scale.high)


def _grid_note(given: Sequence[Landscape]) -> str:
    sizes = dict.fromkeys(
        " \N{MULTIPLICATION SIGN} ".join(str(size) for size in landscape.loss.shape) for landscape in given
    )
    return f"{' and '.join(sizes)} points, linear in between"
