"""What a landscape says beyond the directions and examples it was measured on, and what Fisher scores foretell of it.

Intervals are closed forms, not resampled: every loss here is a mean over directions of ratios that are linear in the
examples, so the variance of a bootstrap is known beforehand, and Student's t, unlike resampling, stays right with few
directions. All intervals hold point by point; for a statement about k points at once take the level 1 - (1 - level) / k
(Bonferroni).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy import stats

from .._typing import Float, Int
from .surface import Axis, Landscape

Over = Literal["directions", "examples", "both"]


@dataclass(frozen=True, eq=False)
class Band:
    """A mean at every grid point with an interval.

    Attributes:
        axes: The grid.
        mean: The estimate, with predictions where points were predicted; NaN where a replicate has no loss, one that is
            not finite, or one of the first batch alone.
        low: Lower end of the interval; NaN where there is no mean, or nothing to tell it from.
        high: Upper end.
        level: How often such an interval is to hold the truth, point by point.
        covers: What the interval is of, in words.
        replicates: Number of random directions (planes, with two axes) behind the mean.
        examples: Number of examples behind it; None if their losses were not kept.
    """

    axes: tuple[Axis, ...]
    mean: Float[np.ndarray, "*grid"]
    low: Float[np.ndarray, "*grid"]
    high: Float[np.ndarray, "*grid"]
    level: float
    covers: str
    replicates: int
    examples: int | None = None

    def at(self, *steps: float) -> tuple[float, float, float]:
        """Mean, low and high at one grid point, given by one step per axis.

        Raises:
            ValueError: If that is no point of the grid.
        """
        index = _index(self.axes, steps)
        return float(self.mean[index]), float(self.low[index]), float(self.high[index])


def band(landscape: Landscape, *, level: float = 0.95, over: Over = "directions") -> Band:
    r"""The interval of the mean loss at every point.

    .. math::  \bar L \pm t_\nu \sqrt{V}, \qquad V_{\text{directions}} = \frac{1}{R (R - 1)} \sum_r (L_r - \bar L)^2,
               \qquad V_{\text{examples}} = \frac{N}{N - 1} \frac{\sum_n (x_n - \bar L\, T_n)^2}{(\sum_n T_n)^2}

    with :math:`L_r` the loss of replicate r, :math:`x_n` the summed loss of example n, mean over the replicates, and
    :math:`T_n` its scored tokens. The second is the variance of a ratio (Cochran, Sampling Techniques, 1977, chapter
    6), what a bootstrap over examples tends to. With ``"both"`` the variances add up, which counts the interaction of
    directions and examples twice and so errs towards width; :math:`\nu` is then that of Welch and Satterthwaite
    (Biometrics Bulletin 2, 1946), otherwise R - 1 or N - 1.

    It is an interval of the *mean over directions*, which gets narrower with every replicate, not the spread of single
    directions; that is best shown by drawing ``landscape.replicates`` themselves.

    Args:
        landscape: With replicates, unless ``over="examples"``.
        level: How often the interval is to hold the truth, point by point.
        over: What would be drawn anew: ``"directions"`` (the same examples along other random directions),
            ``"examples"`` (other examples along these directions; one axis only), or ``"both"``.

    Raises:
        ValueError: If an option is unknown, or there are fewer than two replicates or examples to tell from.
    """
    return _band(_measured(landscape), level, over, "mean loss")


def difference(a: Landscape, b: Landscape, *, level: float = 0.95, over: Over = "directions") -> Band:
    """The interval of the mean of L_a - L_b at every point, paired: what both share cancels.

    Replicate r of a is paired with replicate r of b, whose directions are the same before the mask, and the same
    examples with each other. ``difference(a, b).at(0.5)`` is the difference at one step.

    Args:
        a: A landscape.
        b: Another mask's, otherwise of the same scan: model, data, objective, grid, directions, replicates.
        level: As in :func:`band`.
        over: As in :func:`band`.

    Raises:
        ValueError: If the landscapes do not pair, or as in :func:`band`.
    """
    _check_pairs(a, b)
    first, second = _measured(a), _measured(b)
    examples = None if first.examples is None or second.examples is None else first.examples - second.examples
    paired = _Measured(a.axes, first.losses - second.losses, examples, first.counts)
    return _band(paired, level, over, "mean difference in loss")


def fisher_quadratic(landscape: Landscape) -> Float[np.ndarray, "*grid"]:
    r"""The loss that the scores foretell: a bowl whose curvature along the directions is the Fisher information.

    .. math::  L(0) + \tfrac12 \sum_{ij} s_i s_j\, d_i^\top F d_j

    with :math:`s` the steps; with replicates the mean over them. It has no slope, so measure it against the mean of
    both sides (:func:`quadratic_ratio`). Second derivative and Fisher information are the same for a softmax or least
    squares of a linear function, and near enough where a model fits well (Martens, arXiv 1412.1193).
    The diagonal leaves out cross terms, which are 0 on average over random directions, not along a single one.

    Args:
        landscape: Scanned with scores of scored tokens (of a language model) or of examples with one label each.

    Raises:
        ValueError: If there are no such scores.
    """
    return landscape.centre_loss + np.mean([_predicted_rise(part) for part in _parts(landscape)], axis=0)


def quadratic_ratio(landscape: Landscape, *, level: float = 0.95) -> Band:
    r"""Measured rise over the rise that the scores foretell, at every point: 1 is a perfect prediction.

    .. math::  \rho(s) = \frac{\tfrac12 (L(s) + L(-s)) - L(0)}{\tfrac12 \sum_{ij} s_i s_j\, d_i^\top F d_j}

    with the means over the replicates above and below the line, and the interval of their ratio over directions (as
    over examples in :func:`band`; none with a single direction). Towards step 0 it tends to the true curvature over the
    Fisher information, until rounding takes over; the steps at which it leaves that value are where the loss stops
    being quadratic.

    Args:
        landscape: As for :func:`fisher_quadratic`, on a grid that is symmetric about 0.
        level: As in :func:`band`.

    Returns:
        The ratio; NaN at step 0.

    Raises:
        ValueError: If there are no such scores, or the grid is not symmetric.
    """
    _check_level(level)
    if any(not np.allclose(axis.steps, -axis.steps[::-1], atol=0) for axis in landscape.axes):
        raise ValueError("The rise on both sides needs steps that are symmetric about 0; scan with one number as span.")
    predicted = np.stack([_predicted_rise(part) for part in _parts(landscape)], axis=-1)
    losses = np.moveaxis(_measured(landscape).losses, 0, -1)
    measured = (losses + np.flip(losses, tuple(range(losses.ndim - 1)))) / 2 - losses[landscape.centre]
    total = predicted.sum(-1)
    ratio = measured.sum(-1) / np.where(total > 0, total, np.nan)
    half = np.full(ratio.shape, np.nan)
    if (count := losses.shape[-1]) > 1:
        half = _half_width([_variance_of_ratio(measured, predicted, ratio)], [count - 1], level)
    covers = f"{100 * level:.4g} % interval of measured over predicted rise, over random directions"
    return Band(landscape.axes, ratio, ratio - half, ratio + half, level, covers, count)


@dataclass(frozen=True)
class Row:
    r"""A line of the table that goes with a figure of landscapes.

    Sizes are means over the axes and replicates.

    Attributes:
        title: What moves.
        entries: How many entries move, at step 1 of the first axis.
        parameters: Of how many parameters.
        replicates: Along how many random directions (planes); 1 if there is just the landscape.
        norm: Length of a step of 1.
        relative_norm: By that of the weights; None without geometry, or of weights that are 0.
        fisher_norm: The square root of :math:`d^\top F d`; None without scores.
        cosine: Between the axes, the largest in size of any pair and replicate; None with one axis.
        loss: At the centre.
        step: Where the rise is taken; None if the grids share no step.
        rise: Mean loss at the points one ``step`` along an axis, on both sides, less that at the centre.
        low: Lower end of its interval over directions; None with one.
        high: Upper end.
        level: Of the interval.
    """

    title: str
    entries: int
    parameters: int
    replicates: int
    norm: float
    relative_norm: float | None
    fisher_norm: float | None
    cosine: float | None
    loss: float
    step: float | None
    rise: float | None
    low: float | None
    high: float | None
    level: float


def rows(
    landscapes: Sequence[Landscape],
    titles: Sequence[str] | None = None,
    *,
    step: float | None = None,
    level: float = 0.95,
) -> list[Row]:
    """What a reader needs to judge whether landscapes can be compared: how far each moved, and how much it rose.

    Args:
        landscapes: One per line.
        titles: What to call them; None takes their own.
        step: Where the rise is taken, a step that is on all grids in both signs; None takes the farthest such where
            no loss is clipped or infinite, and tells no rise if the grids share none.
        level: Of the interval of the rise, as in :func:`band`.

    Raises:
        ValueError: If there are no landscapes or not as many titles, or the step is not on a grid.
    """
    _check_level(level)
    if not landscapes:
        raise ValueError("A table needs at least one landscape, got none.")
    titles = [landscape.title for landscape in landscapes] if titles is None else titles
    if len(titles) != len(landscapes):
        raise ValueError(f"There must be one title per landscape ({len(landscapes)}), got {len(titles)}.")
    at = _farthest_step(landscapes) if step is None else abs(step)
    return [_row(landscape, title, at, level) for landscape, title in zip(landscapes, titles, strict=True)]


def comparison_table(
    landscapes: Sequence[Landscape],
    titles: Sequence[str] | None = None,
    *,
    step: float | None = None,
    level: float = 0.95,
) -> str:
    """The same as Markdown, for beside a figure; arguments as for :func:`rows`."""
    found = rows(landscapes, titles, step=step, level=level)
    columns = ["", "entries", "parameters", "replicates", "‖d‖", "‖d‖/‖θ‖", "‖d‖_F", "cosine", "loss"]
    at = "the same step" if found[0].step is None else f"±{found[0].step:.4g}"
    columns += [f"rise at {at}", f"{100 * level:.4g} % interval"]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *map(_cells, found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row) -> list[str]:
    sizes = (row.norm, row.relative_norm, row.fisher_norm, row.cosine, row.loss, row.rise)
    interval = "" if row.low is None or row.high is None else f"{row.low:.4g} to {row.high:.4g}"
    counts = [f"{row.entries:,}", f"{row.parameters:,}", str(row.replicates)]
    return [row.title.replace("|", r"\|"), *counts, *("" if s is None else f"{s:.4g}" for s in sizes), interval]


def _row(landscape: Landscape, title: str, step: float | None, level: float) -> Row:
    parts = _parts(landscape)
    axes = [axis for part in parts for axis in part.axes]
    geometries = [part.geometry for part in parts if part.geometry is not None]
    fisher = [g.fisher for g in geometries if g.fisher is not None]
    relative = [a.norm / g.weight_norm for p in parts if (g := p.geometry) and g.weight_norm > 0 for a in p.axes]
    pairs = np.triu_indices(len(landscape.axes), 1)
    cosines = [c for g in geometries for c in g.cosines[pairs]]
    rises = None if step is None else _rises(landscape, step)
    rise, half = None if rises is None else float(rises.mean()), None
    if rises is not None and len(parts) > 1:
        half = float(_half_width([_variance_of_mean(rises)], [len(parts) - 1], level))
    return Row(
        title=title,
        entries=landscape.axes[0].entries,
        parameters=landscape.axes[0].parameters,
        replicates=len(parts),
        norm=float(np.mean([axis.norm for axis in axes])),
        relative_norm=_mean(relative),
        fisher_norm=_mean([float(size) for f in fisher for size in np.sqrt(np.diag(f))]),
        cosine=float(max(cosines, key=abs)) if cosines else None,
        loss=landscape.centre_loss,
        step=step,
        rise=rise,
        low=None if half is None or rise is None else rise - half,
        high=None if half is None or rise is None else rise + half,
        level=level,
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _rises(landscape: Landscape, step: float) -> Float[np.ndarray, "replicates"]:
    losses, axes, zero = _measured(landscape).losses, landscape.axes, (0.0,) * len(landscape.axes)
    points = [(*zero[:k], sign * step, *zero[k + 1 :]) for k in range(len(axes)) for sign in (-1, 1)]
    ends = [losses[(slice(None), *_index(axes, point))] for point in points]
    return np.mean(ends, axis=0) - losses[(slice(None), *landscape.centre)]


def _farthest_step(landscapes: Sequence[Landscape]) -> float | None:
    """The largest step that is on every axis of every landscape, in both signs, with losses that can be averaged."""
    first, *others = [axis.steps for landscape in landscapes for axis in landscape.axes]
    common = [s for s in first if s > 0 and all(_on(steps, s) and _on(steps, -s) for steps in (first, *others))]
    whole = [s for s in common if all(np.isfinite(_rises(landscape, s)).all() for landscape in landscapes)]
    return float(max(whole or common)) if common else None


def _on(steps: np.ndarray, step: float) -> bool:
    return bool(np.isclose(steps, step, atol=1e-12).any())


def _index(axes: Sequence[Axis], steps: Sequence[float]) -> tuple[int, ...]:
    if len(steps) != len(axes):
        raise ValueError(f"A point needs one step per axis ({len(axes)}), got {len(steps)}.")
    for axis, step in zip(axes, steps, strict=True):
        if not _on(axis.steps, step):
            nearest = axis.steps[np.argmin(np.abs(axis.steps - step))]
            raise ValueError(f"Step {step:g} is not on the grid of {axis.name}; the nearest that is: {nearest:g}.")
    return tuple(int(np.argmin(np.abs(axis.steps - step))) for axis, step in zip(axes, steps, strict=True))


@dataclass(frozen=True, eq=False)
class _Measured:
    """Losses as measured or predicted; NaN where they are not finite, or not of all examples."""

    axes: tuple[Axis, ...]
    losses: Float[np.ndarray, "replicates *grid"]
    examples: Float[np.ndarray, "*grid examples"] | None
    """Summed loss of every example, mean over the replicates."""
    counts: Int[np.ndarray, "examples"] | None


def _parts(landscape: Landscape) -> tuple[Landscape, ...]:
    return landscape.replicates or (landscape,)


def _measured(landscape: Landscape) -> _Measured:
    parts = _parts(landscape)
    usable = [np.isfinite(part.loss) for part in parts]
    usable = [u if part.clipped is None else u & ~part.clipped for u, part in zip(usable, parts, strict=True)]
    losses = np.stack([np.where(u, part.loss, np.nan) for u, part in zip(usable, parts, strict=True)])
    kept = [part.examples for part in parts if part.examples is not None]
    if len(kept) < len(parts):
        return _Measured(landscape.axes, losses, None, None)
    examples = np.zeros_like(kept[0])
    for u, totals in zip(usable, kept, strict=True):  # one after the other: they may be large
        examples += np.where(u[..., None], totals, np.nan) / len(parts)
    return _Measured(landscape.axes, losses, examples, parts[0].counts)


def _band(measured: _Measured, level: float, over: Over, of: str) -> Band:
    _check_level(level)
    if over not in get_args(Over):
        raise ValueError(f"over must be {' or '.join(map(repr, get_args(Over)))}, got {over!r}.")
    replicates = len(measured.losses)
    mean = measured.losses.mean(axis=0)
    variances, freedoms = [], []
    if over != "examples":
        if replicates < 2:
            raise ValueError(
                f"A band over {over} needs at least two replicates, got {replicates}; scan with replicates=8, or ask "
                "for over='examples'."
            )
        variances.append(_variance_of_mean(measured.losses))
        freedoms.append(replicates - 1)
    if over != "directions":
        if measured.examples is None or measured.counts is None:
            raise ValueError(
                f"A band over {over} needs the losses of the single examples, which are kept along one axis only; scan "
                "with axes=1, or ask for over='directions'."
            )
        if len(measured.counts) < 2:
            raise ValueError(f"A band over {over} needs at least two examples, got {len(measured.counts)}.")
        variances.append(_variance_of_ratio(measured.examples, measured.counts, mean))
        freedoms.append(len(measured.counts) - 1)
    half = _half_width(variances, freedoms, level)
    what = {"directions": "random directions", "examples": "examples", "both": "random directions and examples"}[over]
    number = None if measured.counts is None else len(measured.counts)
    covers = f"{100 * level:.4g} % interval of the {of}, over {what}"
    return Band(measured.axes, mean, mean - half, mean + half, level, covers, replicates, number)


def _variance_of_mean(terms: Float[np.ndarray, "terms *grid"]) -> Float[np.ndarray, "*grid"]:
    return np.asarray(terms.var(axis=0, ddof=1) / len(terms))


def _variance_of_ratio(
    above: Float[np.ndarray, "*grid terms"], below: np.ndarray, ratio: Float[np.ndarray, "*grid"]
) -> Float[np.ndarray, "*grid"]:
    """Of sum(above) / sum(below) over independent terms, to first order."""
    count = above.shape[-1]
    residuals = above - ratio[..., None] * below
    total = below.sum(axis=-1)
    return count / (count - 1) * np.square(residuals).sum(axis=-1) / np.where(total > 0, total, np.nan) ** 2


def _half_width(variances: Sequence[np.ndarray], freedoms: Sequence[int], level: float) -> np.ndarray:
    """Of the interval around a sum whose independent terms have these variances, known to these degrees of freedom."""
    total = np.sum(variances, axis=0)
    shares = np.stack(variances) / np.where(total > 0, total, np.nan)
    freedom = 1 / sum(share**2 / f for share, f in zip(shares, freedoms, strict=True))
    return np.where(total == 0, 0.0, stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(total))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level:g}.")


def _check_pairs(a: Landscape, b: Landscape) -> None:
    first, second = _pairing(a), _pairing(b)
    differing = [f"{name} ({first[name]} and {second[name]})" for name in first if first[name] != second[name]]
    counts = [_parts(landscape)[0].counts for landscape in (a, b)]
    if a.loss.shape != b.loss.shape or any(
        not np.array_equal(x.steps, y.steps) for x, y in zip(a.axes, b.axes, strict=True)
    ):
        differing = ["grid"]
    elif all(c is not None for c in counts) and not np.array_equal(*counts):  # pyright: ignore[reportArgumentType]
        differing.append("number of scored tokens")
    if differing:
        raise ValueError(
            f"Landscapes pair if only their masks differ, but these have another {differing[0]}; scan both with the "
            "same model, data, grid, seed and replicates."
        )


def _pairing(landscape: Landscape) -> dict[str, object]:
    """What two landscapes must share for their replicates and examples to be pairs, apart from the grid."""
    facts, settings = landscape.provenance, landscape.provenance.get("settings", {})
    return {
        "number of replicates": len(_parts(landscape)),
        "objective": landscape.objective,
        "model": (facts.get("model") or {}).get("fingerprint"),
        "data": (facts.get("data") or {}).get("fingerprint"),
        **{name: settings.get(name) for name in ("seed", "directions", "one_dimensional")},
    }


def _predicted_rise(landscape: Landscape) -> Float[np.ndarray, "*grid"]:
    geometry = landscape.geometry
    if geometry is None or geometry.fisher is None or not geometry.quadratic:
        found = "none" if geometry is None or geometry.fisher is None else "others"
        raise ValueError(
            "The Fisher quadratic needs scores of every scored token, or of examples with one label each, but the "
            f"landscape was scanned with {found}; estimate scores with --unit token and scan with them."
        )
    steps = np.stack(np.meshgrid(*(axis.steps for axis in landscape.axes), indexing="ij"), axis=-1)
    return np.einsum("...i,ij,...j->...", steps, geometry.fisher, steps) / 2
