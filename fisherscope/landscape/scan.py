"""Evaluating a model on a grid of steps, and leaving it exactly as it was."""

import json
import logging
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from .. import distributed, storage
from .._progress import progress_bar
from ..data import BatchDigest, describe_batches
from ..data.sources import LABELLED_OBJECTIVES
from ..masks import Mask, check_mask
from ..metrics import CLASSIFICATION, REGRESSION
from ..models import check_head, describe, infer_objective, measuring
from ..objectives import Batch, LossFunction, check_batch, is_language_model, num_scored, reference_losses
from ..scores import FisherScores, check_scores
from .adaptive import Index, check_tolerance, measure_adaptively
from .directions import Direction, Match, Normalize, OneDimensional, Subspace, geometry_of, norm
from .evaluate import Evaluator, Metric, metric_name
from .moves import Moves, given_space
from .surface import Axis, Geometry, Journal, Landscape, Marker, Point, journals, mean_of

logger = logging.getLogger(__name__)

Evaluate = Callable[[Iterable[tuple[float, ...]]], Iterator[Point]]
"""Measures points, given by one step per axis, in their order."""

EACH = 4
"""Points that a rank measures before all ranks exchange theirs."""

SECONDS_BETWEEN_FLUSHES = 10.0
"""What a killed scan loses at most."""

MARGIN = 0.5
"""Nats above ln V beyond which a language model is worse than guessing, and its loss says nothing more."""


def scan_landscape(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    mask: Mask | None = None,
    axes: int = 2,
    points: int | Sequence[int] = 51,
    span: float | Sequence[tuple[float, float]] = 1.0,
    directions: Literal["random"] | Sequence[Direction] | Subspace = "random",
    normalize: Normalize = "filter",
    one_dimensional: OneDimensional = "skip",
    match: Match = "none",
    orthogonal: bool = False,
    scores: FisherScores | None = None,
    replicates: int = 1,
    metrics: Sequence[Metric] = (),
    clip: bool = False,
    adaptive: float | None = None,
    objective: str | LossFunction | None = None,
    seed: int = 0,
    strict: bool = False,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Landscape:
    r"""The loss on a grid around a model, with only the entries of a mask moving.

    .. math::  L(a, b) = \frac{\sum_n \ell_n(\theta + a\, m \odot d_1 + b\, m \odot d_2)}{\sum_n T_n}

    with :math:`m` the mask, :math:`d_k` directions normalised on the whole model, :math:`\ell_n` the loss summed over
    the :math:`T_n` scored tokens of example n. Every point sees the same tokens, in eval mode; the model is
    bit-identical afterwards, also after an exception. Processes that ``torchrun`` started share the points.

    Args:
        model: The model at step 0.
        batches: A re-iterable of input dicts, as in :func:`fisherscope.estimate_fisher`.
        mask: The entries that move; None means all.
        axes: 1, 2 or 3.
        points: Grid points per axis, odd so that step 0 is among them; one number, or one per axis.
        span: The steps go from ``-span`` to ``span``, 1 being a move as large as the weights, row by row; or a pair
            ``(lowest, highest)`` per axis, with 0 on its grid.
        directions: ``"random"``, one mapping from parameter name to tensor per axis (parameters left out rest), or what
            the functions for directions between models or along the curvature return.
        normalize: Of random directions, see :func:`random_directions`.
        one_dimensional: Of random directions.
        match: Whether masked directions are made as large as a random mask of the same density leaves them on average:
            ``"norm"`` or ``"fisher"``, see :func:`matched`; ``"none"`` leaves them as they are.
        orthogonal: Make each direction orthogonal to the earlier ones, after the mask.
        scores: For ``match="fisher"`` and for the Fisher norms of the directions, of the same backbone; parameters that
            they lack count as 0.
        replicates: How often to do it all, each time along other random directions; the result is their mean.
        metrics: Other surfaces, measured in the same pass: names of :mod:`fisherscope.metrics`, taken over all scored
            tokens, or functions from :class:`fisherscope.objectives.Predictions` to a value per example.
        clip: Look only at the first batch where its loss is above ln V + 0.5 nats, beyond guessing; language models.
        adaptive: Measure only as many points as it takes to predict the others, of 95 % of them within this share of
            the loss, by cross-validation: 0.02. Language models beyond guessing need no accuracy, which implies
            ``clip``. The points are measured in rounds, see :mod:`fisherscope.landscape.adaptive`.
        objective: As in :func:`fisherscope.estimate_fisher`.
        seed: Of random directions; axis k of replicate r is direction r * axes + k of the seed.
        strict: Refuse a mask that was made from other weights, instead of warning.
        progress: Show a bar with the expected time to the end.
        checkpoint: A file that holds the points measured so far; when it exists the scan goes on where it stopped.

    Raises:
        ValueError: If a number of points is even or below 3, 0 is not on the grid, ``axes`` is not 1, 2 or 3, a
            direction names no parameter or has another shape, nothing moves, no token is scored, a metric is unknown,
            ``replicates`` are asked of given directions, ``adaptive`` is no share, the checkpoint belongs to another
            scan, or ranks were given different settings.
        MaskMismatch: If the mask belongs to another model.
    """
    objective = objective or infer_objective(model)
    check_head(model, objective)
    if mask is not None:
        check_mask(mask)
    if scores is not None:
        check_scores(scores)
    _check_metrics(metrics, objective, getattr(getattr(model, "config", None), "num_labels", None))
    space = given_space(directions, model, axes)
    _check_replicates(replicates, space)
    steps = grid_steps(axes, points, span)
    clip = _clips(clip, adaptive, objective)
    moves = Moves(
        model, axes, space, mask, scores, normalize, one_dimensional, match, orthogonal, seed=seed, strict=strict
    )
    fixed = _checked(batches)
    references = reference_losses(model, fixed, objective)
    counts = np.concatenate([num_scored(batch, objective).cpu().numpy() for batch in fixed])
    kept = counts if axes == 1 else None
    names = [metric_name(metric) for metric in metrics]
    title = mask.provenance.get("rule", "a mask") if mask is not None else "all entries"
    about = (_name(objective), references, title)
    first = moves.along()
    settings = {
        "span": span,
        **moves.settings,
        "replicates": replicates,
        "metrics": names,
        "clip": clip,
        "adaptive": adaptive,
        "tokens": int(counts.sum()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "moves": _fingerprint(first),
    }
    provenance = _provenance(model, batches, fixed, mask, objective, settings)
    _check_same_on_all_ranks({**provenance, "points": [len(s) for s in steps]})

    def empty(directions: Sequence[Direction]) -> Landscape:
        geometry = geometry_of(model, directions, moves.aligned_scores, quadratic=_predicts_loss(scores, objective))
        grid = tuple(map(_axis, range(axes), steps, directions, moves.kinds))
        return _empty(grid, *about, provenance, names, clip, kept, geometry)

    if replicates == 1:
        start = empty(first)
    else:
        start = mean_of([empty(moves.along(number)) for number in range(replicates)], provenance=provenance)
    ceiling = references["uniform"] + MARGIN if clip and "uniform" in references else None
    path = Path(checkpoint) if checkpoint and distributed.is_first() else None
    with measuring(model), ExitStack() as stack:
        logs = _shared(stack.enter_context(journals(path, start)))
        done = sum(int(log.evaluated.sum()) for log in logs)
        total = sum(log.loss.size for log in logs) if adaptive is None else None
        shown = progress and distributed.is_first()
        bar = stack.enter_context(progress_bar(total, "Landscape", "point", done=done, shown=shown))
        landscapes: list[Landscape] = []
        for replicate, log in enumerate(logs):
            directions = first if replicate == 0 else moves.along(replicate)
            options: dict[str, Any] = {"metrics": metrics, "keep_examples": kept is not None, "ceiling": ceiling}
            with Evaluator(model, fixed, objective, directions, **options) as evaluator:
                if adaptive is None:
                    scan(evaluator, log, tick=bar.update)
                    landscapes.append(log.landscape)
                else:
                    landscapes.append(scan_adaptively(evaluator, log, adaptive, ceiling=ceiling, bar=bar))
                if space:
                    markers, connected = _measured(evaluator, space), space.connected
                    landscapes = [replace(landscapes[0], markers=markers, connected=connected)]
    return landscapes[0] if replicates == 1 else mean_of(landscapes, provenance=provenance)


def _check_replicates(replicates: int, space: Subspace | None) -> None:
    if replicates < 1 or (space and replicates > 1):
        found = f"got {replicates}" if replicates < 1 else f"got {replicates} of given directions, which are only one"
        raise ValueError(f"replicates must be at least 1, and only random directions have several; {found}.")


def _clips(clip: bool, adaptive: float | None, objective: str | LossFunction) -> bool:
    """Whether losses beyond guessing get no close look: as asked for, or as ``adaptive`` implies."""
    if clip and not is_language_model(objective):
        found = f"the objective is {_name(objective)}; leave it out"
        raise ValueError(f"clip is about losses beyond guessing a token, but {found}.")
    if adaptive is None:
        return clip
    check_tolerance(adaptive)
    return is_language_model(objective)


def _checked(batches: Iterable[Batch]) -> list[Batch]:
    fixed = list(batches)
    if not fixed:
        raise ValueError("A landscape needs at least one batch, but there is none; check the data.")
    for batch in fixed:
        check_batch(batch)
    return fixed


def _empty(
    axes: tuple[Axis, ...],
    objective: str,
    references: Mapping[str, float],
    title: str,
    provenance: storage.Provenance,
    metrics: Sequence[str],
    clip: bool,
    counts: np.ndarray | None,
    geometry: Geometry,
) -> Landscape:
    """A landscape with nothing measured yet; with counts, one that keeps the losses of examples."""
    shape = tuple(len(axis.steps) for axis in axes)
    return Landscape(
        axes,
        np.full(shape, np.nan),
        np.zeros(shape, dtype=bool),
        objective,
        references,
        title,
        provenance,
        metrics={name: np.full(shape, np.nan) for name in metrics},
        clipped=np.zeros(shape, dtype=bool) if clip else None,
        examples=None if counts is None else np.full((*shape, len(counts)), np.nan),
        counts=counts,
        geometry=geometry,
    )


def scan(evaluate: Evaluate, log: Journal, *, tick: Callable[[], object] = lambda: None) -> None:
    """Measure every grid point that is still missing, the last axis fastest.

    Knows nothing of models: the extension point for other ways to evaluate a point.

    Args:
        evaluate: Measures points, given by one step per axis, in their order.
        log: The grid, with the points measured so far; where points are recorded as they come.
        tick: Called after every point.
    """
    for row in np.ndindex(log.loss.shape[:-1]):
        measure(evaluate, log, [(*row, column) for column in range(log.loss.shape[-1])], tick=tick)


def scan_adaptively(
    evaluate: Evaluate, log: Journal, tolerance: float, *, ceiling: float | None = None, bar: Any = None
) -> Landscape:
    """Measure the grid points that are needed to predict the others within a tolerance.

    Args:
        evaluate: As in :func:`scan`.
        log: As in :func:`scan`.
        tolerance: What 95 % of the predicted losses may be off, relative to the loss.
        ceiling: Losses above need no accuracy.
        bar: A progress bar; its total is what is known to be needed, round by round.

    Returns:
        The landscape with the predictions, and what is known about their errors.
    """

    def measured(chosen: Sequence[Index]) -> np.ndarray:
        missing = [index for index in chosen if not log.evaluated[index]]
        if bar is not None:
            bar.total = bar.n + len(missing)
            bar.refresh()
        measure(evaluate, log, missing, tick=bar.update if bar is not None else lambda: None)
        return log.loss

    filled = measure_adaptively(measured, log.landscape.centre, log.loss.shape, tolerance, ceiling)
    prediction = filled.prediction
    if distributed.is_first():
        logger.info(
            "Measured %d of %d points; 95 %% of the others%s are predicted within %.2g %% of the loss, by "
            "cross-validation.",
            prediction.measured,
            filled.loss.size,
            "" if ceiling is None else " below the ceiling",
            100 * prediction.percentile95,
        )
    return replace(log.landscape, loss=filled.loss, prediction=prediction)


def measure(evaluate: Evaluate, log: Journal, indices: Sequence[Index], *, tick: Callable[[], object]) -> None:
    """Measure those of some grid points that are still missing, every rank its share, and record them everywhere."""
    missing = [index for index in indices if not log.evaluated[index]]
    if not missing:
        return
    flushed = time.monotonic()
    for index, point in zip(missing, _points(evaluate, log.landscape.axes, missing), strict=True):
        log.record(index, point)
        tick()
        if time.monotonic() - flushed > SECONDS_BETWEEN_FLUSHES:  # a row of slow points is long
            log.flush()
            flushed = time.monotonic()
    log.flush()


def _points(evaluate: Evaluate, axes: Sequence[Axis], indices: Sequence[Index]) -> Iterator[Point]:
    """What all ranks measure together, a few points at a time."""
    ranks = distributed.world_size()
    if ranks == 1:
        yield from evaluate([_steps(axes, index) for index in indices])
        return
    for start in range(0, len(indices), ranks * EACH):
        some = indices[start : start + ranks * EACH]
        shares = distributed.all_say(
            list(evaluate([_steps(axes, index) for index in some[distributed.rank() :: ranks]]))
        )
        yield from (shares[number % ranks][number // ranks] for number in range(len(some)))


def _shared(logs: Sequence[Journal]) -> Sequence[Journal]:
    """The journals of rank 0, which alone has the file; copies in memory on the other ranks."""
    before = distributed.first_says([log.landscape for log in logs])
    return logs if distributed.is_first() else [Journal(landscape) for landscape in before]


def _check_same_on_all_ranks(facts: Mapping[str, Any]) -> None:
    if found := storage.difference(distributed.first_says(facts), facts):
        raise ValueError(f"All ranks share one scan, but rank {distributed.rank()} was given another {found}.")


def _steps(axes: Sequence[Axis], index: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(float(axis.steps[i]) for axis, i in zip(axes, index, strict=True))


def _measured(evaluator: Evaluator, space: Subspace) -> tuple[Marker, ...]:
    """The markers with the losses of their models, and of the points of the space that are nearest to them."""
    nearest = evaluator([marker.steps for marker in space.markers])
    shown = [point.loss for point in nearest]
    own = [evaluator.of_weights(weights()).loss for weights in space.weights]
    return tuple(
        replace(marker, loss=loss, nearest_loss=seen)
        for marker, loss, seen in zip(space.markers, own, shown, strict=True)
    )


def grid_steps(axes: int, points: int | Sequence[int], span: float | Sequence[tuple[float, float]]) -> list[np.ndarray]:
    """The steps of every axis, for the arguments of :func:`scan_landscape`.

    Raises:
        ValueError: If they make no grid with step 0 on it.
    """
    if axes not in (1, 2, 3):
        raise ValueError(f"axes must be 1, 2 or 3, got {axes}.")
    counts = [operator.index(count) for count in (points if isinstance(points, Sequence) else [points] * axes)]
    if len(counts) != axes:
        raise ValueError(f"points must be one number or one per axis ({axes}), got {counts}.")
    if isinstance(span, Sequence):
        if len(span) != axes or not all(isinstance(ends, Sequence) and len(ends) == 2 for ends in span):
            raise ValueError(f"span must be one number, or a pair (lowest, highest) per axis ({axes}), got {span}.")
        return [_between(count, *map(float, ends)) for count, ends in zip(counts, span, strict=True)]
    for count in counts:
        if count % 2 == 0:
            near = f"{count - 1} or {count + 1}" if count > 3 else "3"
            raise ValueError(f"points must be odd, so that step 0 is on the grid, got {count}; take {near}.")
        if count < 3:
            raise ValueError(f"points must be odd and at least 3, got {count}.")
    if not (math.isfinite(span) and span > 0):
        raise ValueError(f"span must be a positive number, got {span}.")
    # symmetric by construction: linspace may miss 0 by a rounding error
    return [span * np.arange(-(c // 2), c // 2 + 1) / (c // 2) for c in counts]


def _between(count: int, low: float, high: float) -> np.ndarray:
    """Steps from low to high, of which one is exactly 0."""
    if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high and low < high):
        raise ValueError(f"span must go from a number up to 0 to one from 0, got ({low:g}, {high:g}).")
    if count < 3:
        raise ValueError(f"points must be at least 3, got {count}.")
    zero = -low / (high - low) * (count - 1)
    if abs(zero - round(zero)) > 1e-6:
        fits = [c for c in range(3, 200) if abs((z := -low / (high - low) * (c - 1)) - round(z)) <= 1e-6]
        near = sorted(fits, key=lambda c: abs(c - count))[:2]
        instead = f"take {' or '.join(map(str, sorted(near)))} points" if near else "take other ends"
        raise ValueError(
            f"Step 0, the model, must be on the grid from {low:g} to {high:g}; with {count} points it is "
            f"not: {instead}."
        )
    return (high - low) / (count - 1) * (np.arange(count) - round(zero))


def _check_metrics(metrics: Sequence[Metric], objective: str | LossFunction, num_classes: int | None) -> None:
    fitting = () if callable(objective) else REGRESSION if objective == "regression" else CLASSIFICATION
    if is_language_model(objective):
        fitting = ("accuracy",)
    elif num_classes not in (None, 2):  # F1 is that of class 1 of two
        fitting = tuple(name for name in fitting if name != "f1")
    if wrong := next((m for m in metrics if isinstance(m, str) and m not in fitting), None):
        known = f"one of {', '.join(fitting)}, or " if fitting else ""
        raise ValueError(f"A metric of {_name(objective)} is {known}a function of predictions; got {wrong!r}.")
    names = [metric_name(metric) for metric in metrics]
    if wrong := next((name for name in names if names.count(name) > 1 or "/" in name), None):
        raise ValueError(f"Every metric needs a name of its own, without '/'; rename the function {wrong!r}.")


def _predicts_loss(scores: FisherScores | None, objective: str | LossFunction) -> bool:
    """Whether half the Fisher norm squared is the second-order term of the loss, up to what a diagonal leaves out."""
    if scores is None or scores.estimator not in ("empirical", "sampled", "exact"):
        return False
    return scores.unit == "token" or callable(objective) or objective in LABELLED_OBJECTIVES


def _axis(number: int, steps: np.ndarray, move: Mapping[str, Tensor], kind: str) -> Axis:
    entries = {name: int(t.count_nonzero()) for name, t in move.items()}
    if not sum(entries.values()):
        raise ValueError(
            f"Nothing moves along axis {number}: the direction is 0, or the mask selects only entries where it is; "
            "select others, or let biases and norms move with one_dimensional='scale'."
        )
    size = norm(list(move.values()))
    return Axis(f"axis{number}", steps, size, sum(entries.values()), kind, sum(map(bool, entries.values())))


def _fingerprint(moves: Sequence[Direction]) -> str:
    """SHA-256 over what moves, and how: the directions after the mask."""
    parts = [(name, tensor) for move in moves for name, tensor in move.items()]
    return storage.digest(*(part for name, t in parts for part in (name, t.float().cpu().numpy().tobytes())))


def _name(objective: str | LossFunction) -> str:
    return objective if isinstance(objective, str) else getattr(objective, "__qualname__", "a function")


def _provenance(
    model: nn.Module,
    batches: Iterable[Batch],
    fixed: Sequence[Batch],
    mask: Mask | None,
    objective: str | LossFunction,
    settings: Mapping[str, object],
) -> dict[str, object]:
    data = describe_batches(batches)
    if data["fingerprint"] is None:
        digest = BatchDigest()
        for batch in fixed:
            digest.update(batch)
        data["fingerprint"] = str(digest)
    facts = {
        "model": describe(model),
        "data": data,
        "objective": _name(objective),
        "mask": None if mask is None else {"rule": mask.provenance.get("rule"), "selected": mask.num_selected},
        "settings": dict(settings),
    }
    return storage.provenance(**json.loads(json.dumps(facts)))
