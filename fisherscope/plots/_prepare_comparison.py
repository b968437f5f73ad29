"""Two nouns compared: agreement by layer, and scores against each other."""

import math
from collections.abc import Sequence

import numpy as np

from ..comparison import Agreement, Comparison, compare, matched, ranked_entries
from ..masks import Mask
from ..scores import FisherScores
from ._prepare import Compared, Histogram, Line, Titles, model_name, titles_of
from ._prepare_landscapes import short_title
from ._prepare_scores import differing_titles, short_labels, unit_of

CELLS = 100
"""Of a histogram, in each direction."""

_LOWEST = 0.001
"""The share of the scores that a histogram leaves out at its lower end, which may be many decades long."""


def compared(a: FisherScores | Mask, b: FisherScores | Mask, fraction: float, titles: Titles) -> Compared:
    """What two nouns have in common, by layer and, of scores, entry by entry.

    Raises:
        TypeError: If one is scores and the other a mask.
        ValueError: If they have nothing in common, or no score is above 0 in both.
    """
    result = compare(a, b, fraction)
    first, second = titles_of([a, b], titles, _default_title(a, b))  # pyright: ignore[reportArgumentType]
    prefix = (a.provenance.get("model") or {}).get("prefix", "")
    labels = tuple(short_labels([row.name for row in result.groups], prefix))
    rows = result.groups
    overlap = f"overlap of the top {100 * fraction:g} %" if result.fraction else "overlap"
    other = "rank correlation" if result.fraction else "Jaccard index"
    series = (
        _line(overlap, [row.overlap for row in rows]),
        _line(other, [row.rank_correlation if result.fraction else row.jaccard for row in rows]),
    )
    histogram = None
    notes = [_overall(result.overall, first, second)]
    if isinstance(a, FisherScores) and isinstance(b, FisherScores):
        histogram, hidden = _histogram(a, b, result, (first, second))
        notes += [hidden] if hidden else []
    chance = _line("overlap by chance", [row.chance for row in rows])
    return Compared(labels, series, chance, "agreement within the layer", histogram, (*notes, *_left_out(result)))


def _default_title(a: FisherScores | Mask, b: FisherScores | Mask):
    if isinstance(a, FisherScores) and isinstance(b, FisherScores):
        return differing_titles([a, b])
    several = model_name(a) != model_name(b)

    def title(mask: Mask) -> str:
        rule = short_title(str(mask.provenance.get("rule", "mask")))
        return f"{model_name(mask)}: {rule}" if several and model_name(mask) else rule

    return title


def _line(title: str, values: Sequence[float | None]) -> Line:
    """Values by position; those that are no number are not drawn."""
    kept = [(float(k), v) for k, v in enumerate(values) if v is not None and not math.isnan(v)]
    return Line(title, np.array([k for k, _ in kept]), np.array([v for _, v in kept]))


def _overall(whole: Agreement, first: str, second: str) -> str:
    measures = f"over the whole model: overlap {whole.overlap:.3f}, Jaccard index {whole.jaccard:.3f}"
    correlation = "" if whole.rank_correlation is None else f", rank correlation {whole.rank_correlation:.3f}"
    return f"{first} and {second}, {measures}{correlation}"


def _left_out(result: Comparison) -> list[str]:
    counts = [
        (len(result.only_in_first), "only in the first"),
        (len(result.only_in_second), "only in the second"),
        (len(result.drawn), "drawn at random"),
    ]
    shown = ", ".join(f"{count} {where}" for count, where in counts if count)
    return [f"parameters left out: {shown}"] if shown else []


def _histogram(
    a: FisherScores, b: FisherScores, result: Comparison, titles: tuple[str, str]
) -> tuple[Histogram, str | None]:
    """Scores of the common entries against each other, and how many cannot be shown."""
    chosen = list(ranked_entries(matched(a, b)).values())
    x, y = (np.concatenate([pair[side] for pair in chosen]).astype(np.float64) for side in (0, 1))
    marks = [float(np.quantile(values, 1 - (result.fraction or 0.0))) for values in (x, y)]
    positive = (x > 0) & (y > 0)
    if not positive.any():
        raise ValueError("There is nothing to draw on logarithmic axes: no entry has a score above 0 in both.")
    x, y = np.log10(x[positive]), np.log10(y[positive])
    both = np.concatenate([x, y])
    low, high = float(np.quantile(both, _LOWEST)), float(both.max())
    edges = np.linspace(low, max(high, low + 1e-6), CELLS + 1)
    counts = np.histogram2d(x, y, bins=[edges, edges])[0].astype(np.int64)
    hidden = len(positive) - int(counts.sum())
    note = f"{hidden:,} of {len(positive):,} entries are 0 or lower than shown" if hidden else None
    labels = [f"score, {title}{unit_of([one])}" for one, title in zip((a, b), titles, strict=True)]
    return Histogram(
        counts,
        edges,
        (_within(marks[0], edges), _within(marks[1], edges)),
        f"top {100 * (result.fraction or 0):g} %",
        (labels[0], labels[1]),
    ), note


def _within(score: float, edges: np.ndarray) -> float:
    """The logarithm of a score, or where the axes begin if it is lower."""
    return max(math.log10(score), float(edges[0])) if score > 0 else float(edges[0])
