"""What backends are given to draw: numbers and words, worked out once for all of them.

``_prepare_landscapes`` and ``_prepare_scores`` make these values from nouns. Landscapes stay in the loss's own unit:
perplexity is the same picture with other tick labels, as a logarithmic axis of exp(loss) is a linear axis of the loss.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from .._typing import Bool, Float, Int
from ..landscape import Landscape
from ..landscape.surface import Marker
from ..masks import Mask
from ..scores import FisherScores

Width = Literal["one-column", "two-column"] | None
By = Literal["entry", "parameter"]
Titles = str | Sequence[str] | None
Noun = TypeVar("Noun")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of lines: the palette of Okabe and Ito for every kind of colour vision, without its yellow, which fades on white."""

MOST_MARKERS = 400
"""Points of a curve up to which each is marked."""

FEW = 10
"""Replicates up to which each is drawn as a thin line."""

LOSS_LABELS = {
    "mlm": "MLM loss (nats per scored token)",
    "causal-lm": "loss (nats per token)",
    "seq2seq-lm": "loss (nats per target token)",
    "classification": "loss (nats per example)",
    "regression": "squared error per example",
}


@dataclass(frozen=True)
class Reference:
    """A loss with a name, such as ln V, the loss of guessing; ``short`` where there is little room."""

    label: str
    short: str
    value: float


@dataclass(frozen=True, eq=False)
class Scale:
    """The one value axis or colour scale of all panels of a figure.

    Attributes:
        label: Quantity and unit.
        metric: What tick labels and hover boxes show: the loss, perplexity, or another surface of the landscapes.
        low: The lowest value of all panels.
        high: Where the scale ends; values above are not drawn.
        is_cut: Whether there are any, of curves also in their bands and single directions.
        ticks: Values and what is written beside them.
        is_log: Whether colours go by the logarithm of the value.
    """

    label: str
    metric: str
    low: float
    high: float
    is_cut: bool
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    def levels(self, count: int) -> Float[np.ndarray, "edges"]:
        """The edges of bands of colour, evenly spaced on the scale."""
        return (np.geomspace if self.is_log else np.linspace)(self.low, self.high, count + 1)

    def shown(self, losses: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Values as the reader is told them."""
        if self.metric != "perplexity":
            return losses
        with np.errstate(over="ignore"):
            return np.exp(losses)

    @property
    def box_ticks(self) -> tuple[tuple[float, str], ...]:
        """Ticks for the upright edge of a 3-D box: at most four, none so low that it meets those of the floor."""
        free = [tick for tick in self.ticks if tick[0] > self.low + 0.08 * (self.high - self.low)]
        return tuple(free[:: math.ceil(len(free) / 4) or 1])


@dataclass(frozen=True, eq=False)
class Panel:
    """One landscape, or a slice of one.

    Attributes:
        title: What moves.
        notes: Short lines: how many entries move and how far, and how much is measured if not all.
        steps: One array per axis, slowest first.
        losses: Of shape ``(len(steps[0]), ...)``; NaN where there is no number, uncut. The values of another surface
            if the scale is of one.
        centre: The loss at step 0 of every axis, None if it is not on the grid or not known.
        references: Those that lie inside the range of the losses and of the scale.
        labels: Of the axes.
        relative: The size of step 1 of every axis by that of the weights; None if not known.
        is_isometric: Whether steps of the same length are as far along all axes.
        markers: Other models in the landscape.
        connected: Whether the markers are a path, in their order.
        measured: Which points were measured, where others are predicted; None where none is.
        replicates: Along other random directions, of one axis; ``losses`` are their mean.
        band: Lower and upper end of the interval of that mean.
        quadratic: The loss that Fisher scores predict along one axis; None if they predict none.
    """

    title: str
    notes: tuple[str, ...]
    steps: tuple[Float[np.ndarray, "_"], ...]
    losses: Float[np.ndarray, "*grid"]
    centre: float | None
    references: tuple[Reference, ...]
    labels: tuple[str, ...]
    relative: tuple[float, ...] | None = None
    is_isometric: bool = True
    markers: tuple[Marker, ...] = ()
    connected: bool = False
    measured: Bool[np.ndarray, "*grid"] | None = None
    replicates: tuple[Float[np.ndarray, "points"], ...] = ()
    band: tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"]] | None = None
    quadratic: Float[np.ndarray, "points"] | None = None


@dataclass(frozen=True, eq=False)
class Panels:
    """Landscapes on one scale, the references inside it, what must be said of all of them, and how wide they print."""

    panels: tuple[Panel, ...]
    scale: Scale
    references: tuple[Reference, ...]
    notes: tuple[str, ...]
    width: Width = None

    @property
    def are_few(self) -> bool:
        """Whether replicates are drawn one by one."""
        return sum(len(panel.replicates) for panel in self.panels) <= FEW

    @property
    def relative(self) -> float | None:
        """The size of step 1 by that of the weights, if all axes of all panels agree on it to 1 %."""
        if any(panel.relative is None for panel in self.panels):
            return None
        sizes = [size for panel in self.panels for size in panel.relative or ()]
        return sizes[0] if max(sizes) <= 1.01 * min(sizes) else None


@dataclass(frozen=True, eq=False)
class Line:
    """One series of points."""

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
        notes: What must be said below the figure.
        levels: Names and heights of dotted lines across.
    """

    lines: tuple[Line, ...]
    x_label: str
    y_label: str
    is_log: bool
    is_share: bool
    notes: tuple[str, ...]
    levels: tuple[tuple[str, float], ...] = ()

    @property
    def has_markers(self) -> bool:
        """Whether there are few enough points to show each."""
        return all(len(line.x) <= MOST_MARKERS for line in self.lines)


@dataclass(frozen=True, eq=False)
class Parameters:
    """Means by parameter.

    Attributes:
        lines: Of every model, parameters counted from 1; NaN where a mean cannot be shown.
        names: Of the parameters of each line.
        layers: Label, first and last parameter of every layer, if all lines have the same.
        value_label: Of the axis of the means.
        notes: What must be said below the figure.
    """

    lines: tuple[Line, ...]
    names: tuple[tuple[str, ...], ...]
    layers: tuple[tuple[str, int, int], ...]
    value_label: str
    notes: tuple[str, ...]

    @property
    def x_label(self) -> str:
        """Of the horizontal axis."""
        return "parameters, in the model's order" + (", by layer" if self.layers else "")

    def labels(self, most: int) -> list[tuple[float, str]]:
        """The middles and labels of layers, without those for which there is no room where ``most`` stand in a row."""
        kept: list[tuple[float, str]] = []
        for label, first, last in self.layers:
            middle = (first + last) / 2
            if not kept or (middle - kept[-1][0]) * most >= self.layers[-1][2]:
                kept.append((middle, label))
        return kept


@dataclass(frozen=True, eq=False)
class Layers:
    """Means by layer.

    Attributes:
        labels: In the model's order.
        series: Of every model; positions among the labels as ``x``, means as ``y``.
        ranges: Of every series, the lower and the higher mean by either half of the examples; None without halves.
        value_label: Of the axis of the means.
        notes: What must be said below the figure.
    """

    labels: tuple[str, ...]
    series: tuple[Line, ...]
    ranges: tuple[tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"]] | None, ...]
    value_label: str
    notes: tuple[str, ...]

    def rows(self, number: int) -> Float[np.ndarray, "points"]:
        """Where the dots of a series stand: beside the row's middle if there are several series, so all are seen."""
        count = len(self.series)
        return self.series[number].x + (number - (count - 1) / 2) * min(0.25, 0.75 / count)


@dataclass(frozen=True, eq=False)
class Histogram:
    """Entries counted by two scores.

    Attributes:
        counts: Entries per cell, first score by second.
        edges: Of the cells in both directions: common logarithms of the scores.
        marks: Logarithms of the scores from which each one's mask selects.
        mark_label: Which mask.
        labels: Of the two axes.
    """

    counts: Int[np.ndarray, "cells cells"]
    edges: Float[np.ndarray, "edges"]
    marks: tuple[float, float]
    mark_label: str
    labels: tuple[str, str]


@dataclass(frozen=True, eq=False)
class Compared:
    """Two nouns compared.

    Attributes:
        labels: Layers in the model's order.
        series: Measures of agreement, with positions among the labels as ``x``; the first one is ``chance``'s.
        chance: What the first would be by chance.
        value_label: Of the axis of the measures.
        histogram: Of scores against each other; None for masks.
        notes: What must be said below the figure.
    """

    labels: tuple[str, ...]
    series: tuple[Line, ...]
    chance: Line
    value_label: str
    histogram: Histogram | None
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Sites:
    """Dropout sites in the order of the modules.

    Attributes:
        labels: What each is called; the first of a layer with the layer's name.
        names: Their whole names.
        layers: First position and end of every group of sites in one layer.
        rates: Share of the activations that each drops.
        scores: That the rates come from.
        notes: What must be said below the figure.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    layers: tuple[tuple[int, int], ...]
    rates: Float[np.ndarray, "sites"]
    scores: Float[np.ndarray, "sites"]
    notes: tuple[str, ...]


def as_sequence(given: Noun | Sequence[Noun], kind: type[Noun], plot: str) -> list[Noun]:
    """One noun or several as a list.

    Raises:
        TypeError: If one of them is something else.
        ValueError: If there is none.
    """
    nouns: list = list(given) if isinstance(given, list | tuple) else [given]
    if not nouns:
        raise ValueError(f"{plot} needs at least one {kind.__name__}, got none.")
    for noun in nouns:
        if not isinstance(noun, kind):
            raise TypeError(f"{plot} needs a {kind.__name__} or a list of them, got {type(noun).__name__}.")
    return nouns


def titles_of(given: Sequence[Noun], titles: Titles, default: Callable[[Noun], str]) -> list[str]:
    """The titles asked for, or else default ones, numbered where they are the same.

    Raises:
        ValueError: If their number is wrong.
    """
    if titles is None:
        names = [default(noun) for noun in given]
        count = Counter(names)
        return [f"{name} ({names[: i + 1].count(name)})" if count[name] > 1 else name for i, name in enumerate(names)]
    asked = [titles] if isinstance(titles, str) else list(titles)
    if len(asked) != len(given):
        raise ValueError(f"titles must be one per {type(given[0]).__name__} ({len(given)}), got {len(asked)}.")
    return asked


def model_name(noun: Landscape | FisherScores | Mask) -> str:
    """The name of the model behind a noun, empty if it has none."""
    name = (noun.provenance.get("model") or {}).get("name") or ""
    return "" if name == "unnamed" else name


def columns(count: int, most: int) -> int:
    """How many panels stand side by side when no row may have more than ``most``; rows as equal as possible."""
    return math.ceil(count / math.ceil(count / most))


def spread(values: Iterable[float], most: int = 5) -> list[float]:
    """Some of the values, the last and the others so far below each other that a logarithmic axis has room for them."""
    ordered = sorted(set(values))
    least = (ordered[-1] / ordered[0]) ** (1 / most)
    kept = ordered[-1:]
    for value in reversed(ordered):
        if value * least < kept[0]:
            kept.insert(0, value)
    return kept


def decades(low: float, high: float, most: int = 6) -> list[int]:
    """At most ``most`` whole exponents of 10 between two common logarithms, evenly spaced."""
    inside = range(math.ceil(low), math.floor(high) + 1)
    return list(inside[:: math.ceil(len(inside) / most) or 1])
