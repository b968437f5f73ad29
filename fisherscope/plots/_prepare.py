"""What a figure shows, in numbers and words: everything that is not drawing, shared by the backends.

Values of landscapes stay in the loss's own unit. Perplexity is the same picture with other tick labels, because a
logarithmic axis of exp(loss) is a linear axis of the loss.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from .._typing import Float
from ..landscape import Axis, Landscape
from ..objectives import is_language_model
from ..scores import FisherScores, by_layer

Metric = Literal["loss", "perplexity"]
By = Literal["entry", "parameter"]

MARGIN_ABOVE_GUESSING = 0.5
"""Nats above ln V at which landscapes of language models are cut: well beyond guessing, a loss says nothing more."""

MOST_POINTS = 2000
"""Points of a line; more than a column of print can resolve."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of lines: Okabe and Ito's palette for every kind of colour vision, without its yellow, which fades on white."""

_LABELS = {
    "mlm": "MLM loss (nats per scored token)",
    "causal-lm": "loss (nats per token)",
    "seq2seq-lm": "loss (nats per target token)",
    "classification": "loss (nats per example)",
    "regression": "squared error per example",
}
_REFERENCES = {"uniform": "ln V", "unigram": "unigram entropy"}
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

Noun = TypeVar("Noun", Landscape, FisherScores)


@dataclass(frozen=True)
class Reference:
    """A loss with a name, such as ln V, the loss of guessing."""

    label: str
    value: float


@dataclass(frozen=True, eq=False)
class Scale:
    """The one value axis or colour scale of all panels of a figure.

    Attributes:
        label: Quantity and unit.
        metric: What tick labels and hover boxes show.
        low: The lowest loss of all panels.
        high: Where the scale ends; values above are not drawn.
        is_cut: Whether there are any.
        ticks: Positions and texts, or None where the backend may choose.
    """

    label: str
    metric: Metric
    low: float
    high: float
    is_cut: bool
    ticks: tuple[tuple[float, str], ...] | None = None

    def shown(self, losses: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Losses as the reader is told them."""
        if self.metric == "loss":
            return losses
        with np.errstate(over="ignore"):
            return np.exp(losses)


@dataclass(frozen=True, eq=False)
class Panel:
    """One landscape.

    Attributes:
        title: What moves.
        notes: Short lines: how many entries move and how far, and how much is measured if not all.
        steps: One array per axis, slowest first.
        losses: Of shape ``(len(steps[0]), ...)``; NaN where not measured or not finite, uncut.
        centre: The loss at step 0 of every axis, None if it is not on the grid or not known.
        references: Those that lie inside the range of the losses and of the scale.
    """

    title: str
    notes: tuple[str, ...]
    steps: tuple[Float[np.ndarray, "points"], ...]
    losses: Float[np.ndarray, "*grid"]
    centre: float | None
    references: tuple[Reference, ...]


@dataclass(frozen=True, eq=False)
class Panels:
    """Landscapes on one scale, with what must be said of all of them."""

    panels: tuple[Panel, ...]
    scale: Scale
    references: tuple[Reference, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Line:
    """One curve of a figure; for the layers, positions count from 0 and may be missing where a mean is 0."""

    title: str
    x: Float[np.ndarray, "points"]
    y: Float[np.ndarray, "points"]


@dataclass(frozen=True, eq=False)
class Lines:
    """Curves in one pair of axes.

    Attributes:
        lines: The curves.
        x_label: Of the horizontal axis.
        y_label: Of the vertical axis.
        is_log: Whether the vertical axis is logarithmic.
        is_share: Whether ``x`` is a share from 0 to 1 and no count.
        has_markers: Whether there are few enough points to show each.
        notes: What must be said below the figure.
    """

    lines: tuple[Line, ...]
    x_label: str
    y_label: str
    is_log: bool
    is_share: bool
    has_markers: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Layers:
    """Mean scores by layer: ``labels`` in the model's order, and one series of (position, mean) per model."""

    labels: tuple[str, ...]
    series: tuple[Line, ...]
    value_label: str
    notes: tuple[str, ...]


def panels(
    landscapes: Landscape | Sequence[Landscape], metric: str, titles: str | Sequence[str] | None, *, axes: int, plot: str
) -> Panels:
    """Landscapes as panels on one scale.

    Raises:
        TypeError: If something else than landscapes was given.
        ValueError: If they do not go into one figure of this kind.
    """
    given = _sequence(landscapes, Landscape, plot)
    _check_axes(given, axes, plot)
    known = _check_objective(given, metric)
    scale, cut = _scale(given, known)
    drawn = tuple(_panel(g, title, scale) for g, title in zip(given, _titles(given, titles, _landscape_title), strict=True))
    return Panels(drawn, scale, _distinct(given), tuple(filter(None, (cut, _grid_note(given)))))


def sorted_lines(
    scores: FisherScores | Sequence[FisherScores], by: str, normalized: bool, titles: str | Sequence[str] | None
) -> Lines:
    """Scores in ascending order, as at most ``MOST_POINTS`` points per model.

    Raises:
        TypeError: If something else than scores was given.
        ValueError: If ``by`` is unknown, or there is nothing to draw.
    """
    given = _sequence(scores, FisherScores, "sorted_scores")
    if by not in ("entry", "parameter"):
        raise ValueError(f"by must be 'entry' or 'parameter', got {by!r}.")
    if not normalized:
        _check_same_reduction(given)
    unit = {"entry": "entries", "parameter": "parameters"}[by]
    is_share = len(given) > 1
    named = _titles(given, titles, _score_title)
    drawn = [_sorted_line(g, title, by, normalized, is_share) for g, title in zip(given, named, strict=True)]
    quantity = "Fisher score" if by == "entry" else "mean Fisher score"
    return Lines(
        tuple(line for line, _ in drawn),
        f"share of {unit}, in ascending order" if is_share else f"{unit}, in ascending order",
        f"{quantity}, min-max normalised" if normalized else quantity + _score_unit(given),
        not normalized,
        is_share,
        all(len(line.x) <= 400 for line, _ in drawn),
        (*(note for _, note in drawn if note), *_new_parameters_note(given)),
    )


def layers(scores: FisherScores | Sequence[FisherScores], titles: str | Sequence[str] | None) -> Layers:
    """Mean score of the entries of every layer, in the model's order.

    Raises:
        TypeError: If something else than scores was given.
        ValueError: If there is nothing to draw.
    """
    given = _sequence(scores, FisherScores, "layer_scores")
    _check_same_reduction(given)
    means = [_labelled_means(g) for g in given]
    if not any(value > 0 for one in means for value in one.values()):
        raise ValueError("Every layer has a mean score of 0, so there is nothing to draw on a logarithmic axis.")
    labels = _merged([list(one) for one in means])
    named = _titles(given, titles, _score_title)
    series, notes = [], []
    for title, one in zip(named, means, strict=True):
        positive = [(labels.index(label), value) for label, value in one.items() if value > 0]
        series.append(Line(title, *np.array(positive, dtype=float).reshape(-1, 2).T))
        if zero := [label for label, value in one.items() if value == 0]:
            notes.append(f"{title}: the mean is exactly 0 in {', '.join(zero)}")
    label = "mean Fisher score of an entry" + _score_unit(given)
    return Layers(tuple(labels), tuple(series), label, (*notes, *_new_parameters_note(given)))


def columns(count: int, most: int) -> int:
    """How many panels stand side by side when no row may have more than ``most``; rows as equal as possible."""
    return math.ceil(count / math.ceil(count / most))


def thinned(first: int, size: int, most: int = MOST_POINTS) -> np.ndarray:
    """At most ``most`` positions, evenly from ``first`` to ``size - 1``, both included."""
    return np.unique(np.linspace(first, size - 1, min(most, size - first)).round().astype(np.int64))


def short_title(title: str) -> str:
    """A mask's rule as a panel says it: ``top 0.5 of entries within model`` becomes ``top 50 % of entries``."""

    def words(match: re.Match[str]) -> str:
        share, unit, group = match.groups()
        return f"{float(share) * 100:g}\N{NO-BREAK SPACE}% of {unit}" + ("" if group == "model" else f" per {group}")

    shorter = re.sub(r"(\d[\d.]*(?:e-?\d+)?) of (\w+) within (model|layer|parameter)", words, title)
    return re.sub(r", (seed \d+)", r" (\1)", shorter).replace("~", "not ")


def short_labels(names: Sequence[str], prefix: str = "") -> list[str]:
    """Layers as an axis names them: ``layer 3``, ``embeddings``, ``head``; longer where that would not be unique.

    Args:
        names: As :func:`fisherscope.models.layer_of` gives them.
        prefix: Of the backbone; what is outside is the head.
    """
    parts = [_label_parts(name, prefix) for name in names]
    labels = [base for _, base in parts]
    for depth in range(1, max((len(context) for context, _ in parts), default=0) + 1):
        count = Counter(labels)
        labels = [
            " ".join([*context[-depth:], base]) if count[label] > 1 else label
            for label, (context, base) in zip(labels, parts, strict=True)
        ]
    count = Counter(labels)
    return [label if count[label] == 1 else name for label, name in zip(labels, names, strict=True)]


def _label_parts(name: str, prefix: str) -> tuple[list[str], str]:
    inside = name.removeprefix(prefix).split(".")
    if prefix and not name.startswith(prefix):
        return [], "head"
    if inside[-1].isdigit():
        return inside[:-2], f"layer {inside[-1]}"
    return inside[:-1], inside[-1].replace("_", " ")


def _sequence(given: Noun | Sequence[Noun], kind: type[Noun], plot: str) -> list[Noun]:
    nouns: list = list(given) if isinstance(given, (list, tuple)) else [given]
    if not nouns:
        raise ValueError(f"{plot} needs at least one {kind.__name__}, got none.")
    for noun in nouns:
        if not isinstance(noun, kind):
            raise TypeError(f"{plot} needs a {kind.__name__} or a list of them, got {type(noun).__name__}.")
    return nouns


def _titles(given: Sequence[Noun], titles: str | Sequence[str] | None, default: Callable[[Noun], str]) -> list[str]:
    if titles is not None:
        named = [titles] if isinstance(titles, str) else list(titles)
        if len(named) != len(given):
            raise ValueError(f"titles must be one per {type(given[0]).__name__} ({len(given)}), got {len(named)}.")
        return named
    named = [default(noun) for noun in given]
    models = [_model_name(noun) for noun in given]
    if len(set(models)) > 1 and isinstance(given[0], Landscape):
        named = [f"{model}: {title}" if model else title for model, title in zip(models, named, strict=True)]
    count = Counter(named)
    return [f"{t} ({named[: i + 1].count(t)})" if count[t] > 1 else t for i, t in enumerate(named)]


def _model_name(noun: Landscape | FisherScores) -> str:
    name = (noun.provenance.get("model") or {}).get("name", "")
    return "" if name == "unnamed" else name


def _landscape_title(landscape: Landscape) -> str:
    return short_title(landscape.title)


def _score_title(scores: FisherScores) -> str:
    return _model_name(scores) or "scores"


def _check_axes(given: Sequence[Landscape], axes: int, plot: str) -> None:
    found = sorted({len(landscape.axes) for landscape in given})
    if len(found) > 1:
        raise ValueError(
            f"The landscapes of one figure need the same number of axes, got {' and '.join(map(str, found))}; draw the "
            "ones with one axis by curves and the ones with two by surface or contour."
        )
    if found[0] != axes:
        other = {1: "; curves draws those", 2: "; surface and contour draw those"}.get(found[0], "")
        numbers = {1: "exactly one axis", 2: "exactly two axes"}
        raise ValueError(f"{plot} needs landscapes of {numbers[axes]}, got {found[0]}{other}.")


def _check_objective(given: Sequence[Landscape], metric: str) -> Metric:
    objectives = list(dict.fromkeys(landscape.objective for landscape in given))
    if len(objectives) > 1:
        raise ValueError(
            f"The landscapes of one figure share one scale, but these are of {' and '.join(objectives)}, whose losses have "
            "different units; draw them in separate figures."
        )
    if metric == "loss":
        return "loss"
    if metric != "perplexity":
        raise ValueError(f"metric must be 'loss' or 'perplexity', got {metric!r}.")
    if not is_language_model(objectives[0]):
        raise ValueError(
            f"Perplexity is defined for mlm, causal-lm and seq2seq-lm, but this landscape is of {objectives[0]}; draw the loss."
        )
    return "perplexity"


def _measured(landscape: Landscape) -> Float[np.ndarray, "*grid"]:
    """Losses that are numbers; NaN elsewhere."""
    return np.where(landscape.evaluated & np.isfinite(landscape.loss), landscape.loss, np.nan)


def _centre(landscape: Landscape) -> float | None:
    index = tuple(int(np.argmin(np.abs(axis.steps))) for axis in landscape.axes)
    on_grid = all(axis.steps[i] == 0 for axis, i in zip(landscape.axes, index, strict=True))
    loss = float(_measured(landscape)[index])
    return loss if on_grid and math.isfinite(loss) else None


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
    if high <= low:
        low, high = low - 0.5, high + 0.5
    objective = given[0].objective
    label = _LABELS.get(objective, f"{objective} per example")
    if metric == "perplexity":
        label = label.replace("loss", "perplexity").split(" (")[0] + " (logarithmic scale)"
    ticks = tuple(perplexity_ticks(low, high)) if metric == "perplexity" else None
    scale = Scale(label, metric, low, high, bool(rule), ticks)
    return scale, _cut_note(losses, scale, rule, "nats" in _LABELS.get(objective, ""))


def _ceiling(losses: np.ndarray, finite: np.ndarray, centre: float, guessing: float | None) -> tuple[float, str]:
    """Where the scale ends, and by which rule if that leaves something out."""
    top = float(finite.max())
    highest = float(losses[~np.isnan(losses)].max())
    if guessing is not None and centre < guessing + MARGIN_ABOVE_GUESSING:
        ceiling, rule = guessing + MARGIN_ABOVE_GUESSING, f"ln V + {MARGIN_ABOVE_GUESSING:g}"
    else:
        low, ceiling, rule = float(finite.min()), float(np.percentile(finite, 95)), "the 95th percentile"
        ceiling = max(ceiling, centre)
        if top - low <= 2 * (ceiling - low):
            ceiling, rule = top, "the largest finite value"
    return (ceiling, rule) if highest > ceiling else (top, "")


def _cut_note(losses: np.ndarray, scale: Scale, rule: str, in_nats: bool) -> str:
    undefined = int(np.isnan(losses).sum()) + int(np.isneginf(losses).sum())
    notes = []
    if rule:
        above = int((losses > scale.high).sum())
        value = f"{scale.high:.3g}{' nats' if in_nats else ''}"
        if scale.metric == "perplexity":
            value += f", perplexity {float(scale.shown(np.array(scale.high))):,.0f}"
        notes.append(f"cut at {rule} = {value}; {above:,} of {losses.size:,} points above")
    if undefined:
        notes.append(f"{undefined:,} of {losses.size:,} points are not a number")
    return "; ".join(notes)


def perplexity_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About five round perplexities between two losses, as (loss, text)."""
    decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        values = [(math.log(m) + k * math.log(10), m, k) for k in decades for m in mantissas]
        inside = [value for value in values if low <= value[0] <= high]
        if len(inside) >= 4:
            return [(loss, _power(m, k)) for loss, m, k in inside[:: math.ceil(len(inside) / 7)]]
    return _linear_perplexity_ticks(math.exp(low), math.exp(high))


def _power(mantissa: int, exponent: int) -> str:
    return f"{mantissa}e{exponent}" if abs(exponent) > 5 else f"{mantissa * 10.0**exponent:,g}"


def _linear_perplexity_ticks(low: float, high: float) -> list[tuple[float, str]]:
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= (high - low) / 5)
    values = step * np.arange(math.ceil(low / step), math.floor(high / step) + 1)
    return [(math.log(value), f"{value:,.6g}") for value in values]


def _panel(landscape: Landscape, title: str, scale: Scale) -> Panel:
    losses = _measured(landscape)
    finite = losses[np.isfinite(losses)]
    inside = tuple(r for r in _references(landscape) if finite.size and finite.min() < r.value < min(finite.max(), scale.high))
    steps = tuple(np.asarray(axis.steps, dtype=float) for axis in landscape.axes)
    return Panel(title, _panel_notes(landscape), steps, losses, _centre(landscape), inside)


def _panel_notes(landscape: Landscape) -> tuple[str, ...]:
    entries = " / ".join(f"{count:,}" for count in dict.fromkeys(axis.entries for axis in landscape.axes))
    norms = ", ".join(f"{_norm_symbol(n, landscape.axes)} = {_three_digits(axis.norm)}" for n, axis in enumerate(landscape.axes, 1))
    done = int(landscape.evaluated.sum())
    part = (f"{done:,} of {landscape.loss.size:,} points",) if done < landscape.loss.size else ()
    return (f"{entries} entries move", norms, *part)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:#.3g}".rstrip(".")


def _norm_symbol(number: int, axes: Sequence[Axis]) -> str:
    return "‖d‖" if len(axes) == 1 else f"‖d{str(number).translate(_SUBSCRIPTS)}‖"


def _references(landscape: Landscape) -> list[Reference]:
    return [Reference(_REFERENCES.get(name, name), float(value)) for name, value in landscape.references.items()]


def _distinct(given: Iterable[Landscape]) -> tuple[Reference, ...]:
    """The references of all landscapes, once each, to the three digits that a figure shows."""
    found = {(r.label, f"{r.value:.3g}"): r for landscape in given for r in _references(landscape)}
    return tuple(found.values())


def _grid_note(given: Sequence[Landscape]) -> str:
    sizes = dict.fromkeys(" × ".join(str(size) for size in landscape.loss.shape) for landscape in given)
    return f"{' and '.join(sizes)} points, linear in between"


def _check_same_reduction(given: Sequence[FisherScores]) -> None:
    found = sorted({scores.reduction for scores in given})
    if len(found) > 1:
        raise ValueError(
            f"Scores by {' and '.join(found)} over the tokens of an example have different units; draw them in separate "
            "figures, or sorted with normalized=True."
        )


def _kept(scores: FisherScores) -> list[str]:
    """The parameters of score figures: all but those drawn at random."""
    new = set(scores.new_parameters)
    kept = [name for name in scores if name not in new and scores[name].numel()]
    if not kept:
        raise ValueError("There is nothing to draw: every scored parameter was drawn at random, the checkpoint has none.")
    return kept


def _values(scores: FisherScores, by: str) -> np.ndarray:
    kept = [scores[name].detach() for name in _kept(scores)]
    if by == "parameter":
        return np.array([float(tensor.mean(dtype=tensor.double().dtype)) for tensor in kept])
    return np.concatenate([tensor.cpu().numpy().ravel() for tensor in kept])


def _sorted_line(scores: FisherScores, title: str, by: str, normalized: bool, is_share: bool) -> tuple[Line, str]:
    values = np.sort(_values(scores, by))
    zeros = int(np.searchsorted(values, 0, side="right"))
    if values[-1] == (values[0] if normalized else 0):
        raise ValueError(
            f"All scores of {title} are {values[0]:g}, so there is nothing to "
            + ("normalise; draw them raw." if normalized else "draw on a logarithmic axis.")
        )
    positions = thinned(0 if normalized else zeros, len(values))
    heights = values[positions].astype(float)
    if normalized:
        heights = (heights - values[0]) / (float(values[-1]) - float(values[0]))
    ranks = positions / max(len(values) - 1, 1) if is_share else positions + 1.0
    unit = "entries" if by == "entry" else "parameters"
    note = f"{title}: {zeros:,} of {len(values):,} {unit} are exactly 0" if zeros and not normalized else ""
    return Line(title, ranks, heights), note


def _score_unit(given: Sequence[FisherScores]) -> str:
    """Squared nats, unless a loss is in another unit."""
    objectives = {scores.provenance.get("objective") for scores in given}
    return " (nats²)" if all("nats" in _LABELS.get(str(objective), "") for objective in objectives) else ""


def _new_parameters_note(given: Sequence[FisherScores]) -> tuple[str, ...]:
    left_out = max(len(set(scores) & set(scores.new_parameters)) for scores in given)
    return (f"{left_out} parameters drawn at random are left out",) if left_out else ()


def _labelled_means(scores: FisherScores) -> dict[str, float]:
    _kept(scores)
    means = by_layer(scores)
    prefix = (scores.provenance.get("model") or {}).get("prefix", "")
    return dict(zip(short_labels(list(means), prefix), means.values(), strict=True))


def _merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """All labels, each after the one that comes before it in its own model."""
    merged: list[str] = []
    for order in orders:
        place = 0
        for label in order:
            if label not in merged:
                merged.insert(place, label)
            place = merged.index(label) + 1
    return merged
