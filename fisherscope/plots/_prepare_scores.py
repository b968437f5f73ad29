"""Scores as curves and as means by layer: sorting, thinning, short names."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch

from .._typing import Float, Int
from ..models import layer_of
from ..scores import FisherScores, Summary, summarize
from ._prepare import LOSS_LABELS, Layers, Line, Lines, Parameters, Titles, as_sequence, model_name, titles_of

MOST_POINTS = 2000
"""Points of a curve, whatever the number of entries; more than a column of print can resolve."""

LOWEST = 1e-12
"""The share of the highest mean below which those of other parameters are rounding noise and are not drawn."""


def sorted_lines(scores: FisherScores | Sequence[FisherScores], by: str, normalized: bool, titles: Titles) -> Lines:
    """Scores in ascending order, at most ``MOST_POINTS`` points per model.

    Raises:
        TypeError: If something else than scores was given.
        ValueError: If ``by`` is unknown, units differ, or there is nothing to draw.
    """
    given = as_sequence(scores, FisherScores, "sorted_scores")
    if by not in ("entry", "parameter"):
        raise ValueError(f"by must be 'entry' or 'parameter', got {by!r}.")
    if not normalized:
        _check_same_reduction(given)
    units = "entries" if by == "entry" else "parameters"
    is_share = len(given) > 1
    names = titles_of(given, titles, differing_titles(given))
    lines, notes = [], []
    for one, title in zip(given, names, strict=True):
        values = _values(one, by)
        lines.append(_sorted_line(values, title, normalized, is_share))
        if (zeros := int((values == 0).sum())) and not normalized:
            notes.append(f"{title}: {zeros:,} of {len(values):,} {units} are exactly 0")
    quantity = "Fisher score" if by == "entry" else "mean Fisher score"
    return Lines(
        tuple(lines),
        f"{'share of ' if is_share else ''}{units}, in ascending order",
        f"{quantity}, min-max normalised" if normalized else quantity + unit_of(given),
        not normalized,
        is_share,
        (*notes, *_new_parameters_notes(given, names)),
    )


def parameter_lines(scores: FisherScores | Sequence[FisherScores], titles: Titles) -> Parameters:
    """Mean score of the entries of every parameter, in the model's order; those below :data:`LOWEST` are gaps.

    Raises:
        TypeError: If something else than scores was given.
        ValueError: If units differ, or there is nothing to draw.
    """
    given = as_sequence(scores, FisherScores, "parameter_scores")
    _check_same_reduction(given)
    means = [_values(one, "parameter") for one in given]
    lowest = LOWEST * max(float(values.max()) for values in means)
    names = titles_of(given, titles, differing_titles(given))
    lines, notes = [], []
    for values, title in zip(means, names, strict=True):
        if not values.any():
            raise ValueError(f"All scores of {title} are 0, so there is nothing to draw on a logarithmic axis.")
        is_shown = (values > 0) & (values >= lowest)
        lines.append(Line(title, np.arange(1.0, len(values) + 1), np.where(is_shown, values, np.nan)))
        if zeros := int((values == 0).sum()):
            notes.append(f"{title}: {zeros} of {len(values)} parameters are exactly 0")
        if low := int((~is_shown & (values > 0)).sum()):
            notes.append(f"{title}: {low} of {len(values)} parameters are below {LOWEST:g} of the highest, not shown")
    found = list(dict.fromkeys(map(_layer_ends, given)))
    return Parameters(
        tuple(lines),
        tuple(tuple(_kept(one)) for one in given),
        found[0] if len(found) == 1 else (),
        "mean Fisher score" + unit_of(given),
        (*notes, *_new_parameters_notes(given, names)),
    )


def layers(scores: FisherScores | Sequence[FisherScores], titles: Titles) -> Layers:
    """Mean score of the entries of every layer, in the model's order.

    Raises:
        TypeError: If something else than scores was given.
        ValueError: If units differ, or there is nothing to draw.
    """
    given = as_sequence(scores, FisherScores, "layer_scores")
    _check_same_reduction(given)
    layered = [_by_label(one) for one in given]
    labels = _merged([list(rows) for rows in layered])
    if not any(row.mean for rows in layered for row in rows.values()):
        raise ValueError("All scores are 0, so there is nothing to draw on a logarithmic axis.")
    names = titles_of(given, titles, differing_titles(given))
    series, ranges, notes = [], [], []
    for title, rows in zip(names, layered, strict=True):
        shown = {label: row for label, row in rows.items() if row.mean}
        places = np.array([float(labels.index(label)) for label in shown])
        series.append(Line(title, places, np.array([row.mean for row in shown.values()])))
        ranges.append(_range_of(list(shown.values())))
        if zero := [label for label in rows if label not in shown]:
            notes.append(f"{title}: exactly 0 in {', '.join(zero)}")
    if any(ranges):
        notes.append("whiskers: means by either half of the examples alone")
    value_label = "mean Fisher score of an entry" + unit_of(given)
    notes += _new_parameters_notes(given, names)
    return Layers(tuple(labels), tuple(series), tuple(ranges), value_label, tuple(notes))


def _range_of(rows: Sequence[Summary]) -> tuple[np.ndarray, np.ndarray] | None:
    """The lower and the higher mean by either half, the mean itself in place of 0, which no logarithmic axis has."""
    halves = [(row.first_half_mean, row.second_half_mean) for row in rows]
    if not halves or any(mean is None for pair in halves for mean in pair):
        return None
    ends = np.sort(np.array(halves, dtype=float), axis=1)
    low, high = np.where(ends > 0, ends, [[row.mean] for row in rows]).T
    return low, high


def stability_lines(scores: FisherScores | Sequence[FisherScores], titles: Titles) -> Lines:
    """The expected overlap at each moment of a run that noted it, one line per fraction, and what chance gives.

    Two random masks of a fraction share that fraction of their entries.

    Raises:
        TypeError: If something else than scores was given.
        ValueError: If one of them has no history.
    """
    given = as_sequence(scores, FisherScores, "stability")
    names = titles_of(given, titles, differing_titles(given))
    lines = []
    for one, name in zip(given, names, strict=True):
        if one.quarters is None or not one.quarters.history:
            raise ValueError(
                f"The scores of {name} have no history of their stability; estimate them again from at least four "
                "batches."
            )
        for fraction in one.quarters.fractions:
            numbers, overlaps = np.array(one.quarters.curve(fraction), dtype=float).T
            mask = f"top {100 * fraction:g} %"
            lines.append(Line(f"{name}: {mask}" if len(given) > 1 else mask, numbers, overlaps))
    fractions = sorted({fraction for one in given if one.quarters for fraction in one.quarters.fractions})
    notes = [] if len(given) > 1 else [f"{names[0]}, {given[0].num_examples:,} examples"]
    return Lines(
        tuple(lines),
        "examples",
        "expected overlap with a fresh draw",
        False,
        False,
        (*notes, "dotted: the overlap of two random masks of that size"),
        tuple((f"chance, top {100 * fraction:g} %", fraction) for fraction in fractions),
    )


def thinned(first: int, size: int, most: int = MOST_POINTS) -> Int[np.ndarray, "positions"]:
    """At most ``most`` positions, evenly from ``first`` to ``size - 1``, both included."""
    return np.unique(np.linspace(first, size - 1, min(most, size - first)).round().astype(np.int64))


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
    """The modules around a layer, and what it is called among its neighbours."""
    if prefix and not name.startswith(prefix.removesuffix(".")):
        return [], "head"
    *around, last = name.removeprefix(prefix).split(".")
    return (around[:-1], f"layer {last}") if last.isdigit() else (around, last.replace("_", " "))


def differing_titles(given: Sequence[FisherScores]) -> Callable[[FisherScores], str]:
    """What to call each of several scores: the model and, of several of one model, whatever else differs."""
    if len({_title(one) for one in given}) == len(given):
        return _title
    facts = [_facts(one) for one in given]
    differing = [key for key in facts[0] if len({fact[key] for fact in facts}) > 1]
    return lambda scores: ", ".join(filter(None, map(_facts(scores).get, differing))) or _title(scores)


def _title(scores: FisherScores) -> str:
    return model_name(scores) or "scores"


def _facts(scores: FisherScores) -> dict[str, str]:
    """What may tell scores apart, in words."""
    data = scores.provenance.get("data") or {}
    seed = (data.get("settings") or {}).get("seed")
    return {
        "model": model_name(scores),
        "data": str(data.get("source") or ""),
        "objective": str(scores.provenance.get("objective") or ""),
        "estimator": scores.estimator,
        "unit": f"by {scores.unit}",
        "reduction": f"{scores.reduction} over tokens",
        "examples": f"{scores.num_examples:,} examples",
        "seed": "" if seed is None else f"seed {seed}",
    }


def _check_same_reduction(given: Sequence[FisherScores]) -> None:
    found = sorted({scores.reduction for scores in given})
    if len(found) > 1:
        raise ValueError(
            f"Scores by {' and '.join(found)} over the tokens of an example have different units; draw them in "
            "separate figures, or sorted with normalized=True."
        )


def _kept(scores: FisherScores) -> list[str]:
    """Parameters that the checkpoint had."""
    new = set(scores.new_parameters)
    return [name for name, score in scores.items() if name not in new and score.numel()]


def _layer_ends(scores: FisherScores) -> tuple[tuple[str, int, int], ...]:
    """Label, first and last parameter of every layer, counted from 1."""
    layers = list(map(layer_of, _kept(scores)))
    names = list(dict.fromkeys(layers))
    labels = dict(zip(names, short_labels(names, _prefix(scores)), strict=True))
    groups = [list(group) for _, group in groupby(enumerate(layers, 1), key=lambda place: place[1])]
    return tuple((labels[group[0][1]], group[0][0], group[-1][0]) for group in groups)


def _prefix(scores: FisherScores) -> str:
    return (scores.provenance.get("model") or {}).get("prefix", "")


def _values(scores: FisherScores, by: str) -> Float[np.ndarray, "units"]:
    """Scores of the entries or parameters that the checkpoint had, unsorted."""
    kept = [scores[name].detach() for name in _kept(scores)]
    if not kept:
        raise ValueError("There is nothing to draw: every scored parameter was drawn at random.")
    if by == "parameter":
        return np.array([float(score.mean(dtype=torch.float64)) for score in kept])
    return np.concatenate([score.cpu().numpy().ravel() for score in kept])


def _sorted_line(values: Float[np.ndarray, "units"], title: str, normalized: bool, is_share: bool) -> Line:
    """A curve of scores, the values being sorted in place."""
    values.sort()
    low, high = float(values[0]), float(values[-1])
    if high == (low if normalized else 0):
        purpose = "normalise; draw them raw" if normalized else "draw on a logarithmic axis"
        raise ValueError(f"All scores of {title} are {high:g}, so there is nothing to {purpose}.")
    positions = thinned(0 if normalized else int(np.searchsorted(values, 0, side="right")), len(values))
    heights = values[positions].astype(float)
    return Line(
        title,
        positions / max(len(values) - 1, 1) if is_share else positions + 1.0,
        (heights - low) / (high - low) if normalized else heights,
    )


def unit_of(given: Sequence[FisherScores]) -> str:
    """Squared nats, unless a loss is in another unit or not known."""
    objectives = {str(scores.provenance.get("objective")) for scores in given}
    return " (nats²)" if all("nats" in LOSS_LABELS.get(objective, "") for objective in objectives) else ""


def _new_parameters_notes(given: Sequence[FisherScores], names: Sequence[str]) -> list[str]:
    """How many parameters are not shown because they were drawn at random; of which scores, unless of all."""
    counts = [len(set(scores) & set(scores.new_parameters)) for scores in given]
    said = [f"without {count} parameter{'s' if count > 1 else ''} drawn at random" for count in counts]
    if len(set(counts)) == 1:
        return said[:1] if counts[0] else []
    return [f"{name}: {note}" for name, note, count in zip(names, said, counts, strict=True) if count]


def _by_label(scores: FisherScores) -> dict[str, Summary]:
    rows = summarize(scores)
    if not rows:
        raise ValueError("There is nothing to draw: every scored parameter was drawn at random.")
    return dict(zip(short_labels([row.name for row in rows], _prefix(scores)), rows, strict=True))


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
