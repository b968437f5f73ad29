r"""Fewer points: measure where a grid is hard to predict, predict the rest, and say how far off that may be.

The logarithm :math:`f = \ln L` of the loss is interpolated from the nearest measured points,

.. math::  s(x) = \sum_j w_j \lVert x - x_j \rVert^3 + c_0 + c^\top x, \qquad s(x_j) = f(x_j), \quad
           \sum_j w_j = 0, \quad \sum_j w_j x_j = 0

(polyharmonic spline: Duchon, 1977; Wendland, Scattered Data Approximation, 2005, section 11). It goes through what was
measured. Every measured point is also predicted from the others (leave-one-out; Rippa, Adv. Comput. Math. 11, 1999),
and these errors say both where to measure next and how good the predictions are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import KDTree

from .. import distributed
from .._typing import Bool, Float
from .surface import Prediction

FIRST = 7
"""Points per axis of the first round."""

NEIGHBOURS = 30
"""How many measured points a prediction is made from."""

GROWTH = 0.25
"""Points of a round, relative to those before it."""

Index = tuple[int, ...]


def measure_adaptively(
    measure: Callable[[Sequence[Index]], Float[np.ndarray, "*grid"]],
    centre: Index,
    shape: Index,
    tolerance: float,
    ceiling: float | None = None,
) -> "Filled":
    """Measure points in rounds, until the others are predicted well enough or none is left that matters.

    What is chosen depends only on what was measured before, in the same order, so that a scan that is done again, with
    points that are known already, goes the same way.

    Args:
        measure: Measures points, given by their indices, and returns all losses so far; NaN elsewhere.
        centre: Where the model itself is; always measured.
        shape: Of the grid.
        tolerance: What the estimated 95th percentile of the errors is to be.
        ceiling: Losses above need no accuracy.

    Returns:
        The losses, predicted where they were not measured.

    Raises:
        ValueError: If the tolerance is not between 0 and 1.
    """
    check_tolerance(tolerance)
    seen, chosen = np.zeros(shape, dtype=bool), _first(centre, shape)
    while True:
        loss = measure(chosen)
        seen[tuple(np.transpose(chosen))] = True
        filled = distributed.first_says(Filled.from_measured(loss, seen, centre, tolerance, ceiling))
        chosen = filled.next_points()
        if filled.is_settled() or not chosen:
            return filled


def check_tolerance(tolerance: float) -> None:
    """Refuse what is no relative error, and one that no prediction meets."""
    if not 0 < tolerance < 1:
        raise ValueError(
            f"adaptive must be the share of the loss that predictions may be off, between 0 and 1, got {tolerance:g}; "
            "leave it out to measure every point."
        )


def _first(centre: Index, shape: Index) -> list[Index]:
    r"""The model itself, the corners, and points of an additive sequence, up to the edges.

    Of a coarse grid, every point has others beside it along each axis, from which it is predicted well where the loss
    changes along one axis only, and then leaving it out says nothing. :math:`u_n = n\alpha \bmod 1` with
    :math:`\alpha_k = \varphi^{-k}, \varphi^{d + 1} = \varphi + 1` (Roberts, 2018) has no such rows, and no large holes.
    """
    axes = len(shape)
    if math.prod(shape) <= FIRST**axes:
        return list(np.ndindex(*shape))
    ratio = np.roots([1, *[0] * (axes - 1), -1, -1]).real.max()
    unit = (0.5 + np.outer(np.arange(FIRST**axes), ratio ** -np.arange(1.0, axes + 1))) % 1
    unit = np.clip(unit + (2 * unit - 1) / (2 * FIRST), 0, 1)  # some reach beyond, and are set upon the edges
    spread = np.rint(unit * (np.array(shape) - 1)).astype(int)
    chosen = {centre, *map(tuple, np.argwhere(_corners(shape)).tolist()), *map(tuple, spread.tolist())}
    return sorted(chosen)


@dataclass(frozen=True, eq=False)
class Filled:
    """A grid of which some points are measured and the others predicted.

    Attributes:
        loss: Measured or predicted.
        seen: Which are measured.
        centre: Index of the model itself.
        tolerance: What the errors may be.
        errors: Of the measured points, each predicted from the others: abs(predicted - measured) / measured; 1 where
            either is not finite. NaN at the other points.
        wanted: Whether a point is to be accurate: its loss is not above the ceiling, or may not be, by its prediction
            or by the measured point that is nearest.
    """

    loss: Float[np.ndarray, "*grid"]
    seen: Bool[np.ndarray, "*grid"]
    centre: Index
    tolerance: float
    errors: Float[np.ndarray, "*grid"]
    wanted: Bool[np.ndarray, "*grid"]

    @classmethod
    def from_measured(
        cls,
        loss: Float[np.ndarray, "*grid"],
        seen: Bool[np.ndarray, "*grid"],
        centre: Index,
        tolerance: float,
        ceiling: float | None,
    ) -> "Filled":
        """Predict every point that was not measured, and those that were, each from the others.

        Positive losses are interpolated as their logarithm. If some are not positive, the losses themselves are, and
        errors are relative to the range of the finite ones.
        """
        if seen.all():
            return cls(
                loss.copy(), seen.copy(), centre, tolerance, np.zeros(seen.shape), np.ones(seen.shape, dtype=bool)
            )
        values = loss[seen]
        finite = np.isfinite(values)
        heights, highest = values.copy(), np.inf if ceiling is None else ceiling
        is_positive = bool((values[finite] > 0).all())
        scale = 1.0 if is_positive else max(float(np.ptp(values[finite])), np.finfo(float).tiny)
        if is_positive:
            heights[finite], highest = np.log(values[finite]), np.log(highest)
        else:
            heights[finite], highest = values[finite] / scale, highest / scale

        places, known = _places(seen.shape), seen.ravel()
        measured, others = places[known], places[~known]
        again = _left_out(measured, heights)
        both, off = np.isfinite(again) & finite, np.where(finite, 1.0, 0.0)
        off[both] = np.minimum(np.abs(again[both] - heights[both]), 50)  # exp(50) is far enough off
        guess = _predicted(measured, heights, others)
        doubt = _rate(measured, off, others) * _distance(measured, others) ** 2

        errors, wanted, filled = np.full(seen.shape, np.nan), np.zeros(seen.shape, dtype=bool), loss.copy()
        errors[seen] = np.where(both, np.expm1(off) if is_positive else off, 1.0)
        wanted[seen] = finite & (heights <= highest)
        nearest = heights[_nearest(measured, others, 1)[:, 0]]
        may_be_low = (np.minimum(guess - doubt, nearest) <= highest) & np.isfinite(guess)
        wanted[~seen] = may_be_low | (not finite.any())
        with np.errstate(over="ignore"):
            filled[~seen] = np.where(np.isfinite(guess), np.exp(guess) if is_positive else guess * scale, guess)
        return cls(filled, seen.copy(), centre, tolerance, errors, wanted)

    @property
    def prediction(self) -> Prediction:
        """How far off the predictions may be, by the errors of the measured points.

        Each counts as often as it is the nearest of a predicted point that is wanted, because most were measured where
        predicting is hard. The corners of the grid do not count: they are never predicted, and without one there is a
        part of the grid that the others do not surround.
        """
        measured = int(self.seen.sum())
        weights = _voronoi(self.seen, self.wanted & ~self.seen) * ~_corners(self.seen.shape)[self.seen]
        if not weights.any():
            return Prediction(self.tolerance, 0.0, 0.0, 0.0, measured)
        errors = self.errors[self.seen]
        order = np.argsort(errors, kind="stable")
        share = np.cumsum(weights[order]) / weights.sum()
        median, percentile95 = (float(errors[order][np.searchsorted(share, q)]) for q in (0.5, 0.95))
        return Prediction(self.tolerance, median, percentile95, float(errors[weights > 0].max()), measured)

    def is_settled(self) -> bool:
        """Whether the errors are within the tolerance, and also that of the model itself, if it has any neighbour left.

        A basin that is narrower than the first round is wide could hide among the other 5 %.
        """
        around = tuple(slice(max(0, i - 1), i + 2) for i in self.centre)
        is_known = bool(self.errors[self.centre] <= self.tolerance or self.seen[around].all())
        return self.prediction.percentile95 <= self.tolerance and is_known

    def next_points(self) -> list[Index]:
        """The points to be measured next: where the error is expected to be largest, and not close together.

        It is expected to grow with the square of the distance to the nearest measured point.
        """
        places, seen = _places(self.seen.shape), self.seen.ravel()
        candidates = np.flatnonzero((self.wanted & ~self.seen).ravel())
        count = min(max(FIRST * self.seen.ndim, int(GROWTH * seen.sum())), len(candidates))
        if not count:
            return []
        off = np.where(np.isfinite(self.loss[self.seen]), np.log1p(self.errors[self.seen]), 0.0)
        rate = _rate(places[seen], off, places[candidates])
        squared = _distance(places[seen], places[candidates]) ** 2
        chosen: list[int] = []
        for _ in range(count):
            best = int(np.argmax(rate * squared))
            chosen.append(int(candidates[best]))
            squared = np.minimum(squared, ((places[candidates] - places[chosen[-1]]) ** 2).sum(-1))
            squared[best] = -1.0
        return [tuple(map(int, np.unravel_index(flat, self.seen.shape))) for flat in sorted(chosen)]


def _places(shape: Index) -> Float[np.ndarray, "points axes"]:
    """Every grid point in a cube of edge 2."""
    ticks = [np.linspace(-1, 1, size) for size in shape]
    return np.stack(np.meshgrid(*ticks, indexing="ij"), -1).reshape(-1, len(shape))


def _corners(shape: Index) -> Bool[np.ndarray, "*grid"]:
    corners = np.zeros(shape, dtype=bool)
    corners[np.ix_(*[[0, size - 1] for size in shape])] = True
    return corners


def _voronoi(seen: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Of how many cells each of the measured points is the nearest."""
    places = _places(seen.shape)
    nearest = _nearest(places[seen.ravel()], places[cells.ravel()], 1)[:, 0]
    return np.bincount(nearest, minlength=int(seen.sum()))


def _nearest(measured: np.ndarray, at: np.ndarray, count: int) -> np.ndarray:
    """Indices of the measured points that are nearest, the nearest first; fewer if there are no more."""
    count = min(count, len(measured))
    return np.reshape(KDTree(measured).query(at, count)[1], (len(at), count))


def _distance(measured: np.ndarray, at: np.ndarray) -> np.ndarray:
    """To the nearest measured point."""
    return np.asarray(KDTree(measured).query(at)[0])


def _rate(measured: np.ndarray, off: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Error per squared distance, the mean of some measured points nearby; never 0, so that distance always counts."""
    hole = np.asarray(KDTree(measured).query(measured, 2)[0])[:, 1]
    rates = off / hole**2
    return rates[_nearest(measured, at, 4)].mean(-1) + 1e-3 * rates.mean() + np.finfo(float).tiny


def _predicted(measured: np.ndarray, heights: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Heights at other points, from the finite ones near them.

    Where the nearest measured height is not finite, that one is the prediction: nothing is interpolated across it.
    """
    finite, nearest = np.isfinite(heights), _nearest(measured, at, 1)[:, 0]
    return np.where(finite[nearest], _spline(measured[finite], heights[finite], at), heights[nearest])


def _left_out(measured: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Every finite height as the other points predict it; the others as they are."""
    finite, nearest = np.isfinite(heights), _nearest(measured, measured, 2)[:, 1]
    known, result = measured[finite], heights.copy()
    of_nearest = heights[nearest][finite]
    result[finite] = np.where(np.isfinite(of_nearest), _spline(known, heights[finite], known, skip=1), of_nearest)
    return result


def _spline(known: np.ndarray, heights: np.ndarray, at: np.ndarray, *, skip: int = 0) -> np.ndarray:
    """Splines through the nearest known points, without the ``skip`` very nearest; NaN if there are no others."""
    result = np.full(len(at), np.nan)
    for start in range(0, len(at) if len(known) > skip else 0, 512):
        here = at[start : start + 512]
        near = _nearest(known, here, NEIGHBOURS + skip)[:, skip:]
        result[start : start + 512] = _interpolated(known[near] - here[:, None], heights[near])
    return result


def _interpolated(around: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The splines through the points around 0, at 0."""
    around = around / np.linalg.norm(around, axis=-1).max(1)[:, None, None]
    number, count, axes = around.shape
    cubes = np.linalg.norm(around[:, :, None] - around[:, None], axis=-1) ** 3
    linear = np.concatenate([np.ones((number, count, 1)), around], -1)
    matrix = np.zeros((number, count + 1 + axes, count + 1 + axes))
    matrix[:, :count, :count] = cubes
    matrix[:, :count, count:] = linear
    matrix[:, count:, :count] = linear.transpose(0, 2, 1)
    matrix[:, count:, count:] = -1e-10 * np.eye(1 + axes)  # points on one line say nothing about the slope across it
    right = np.concatenate([heights, np.zeros((number, 1 + axes))], -1)
    solved = np.linalg.solve(matrix, right[..., None])[..., 0]
    return (solved[:, :count] * np.linalg.norm(around, axis=-1) ** 3).sum(-1) + solved[:, count]
