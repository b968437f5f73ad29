"""Evaluating a model on a grid of steps, and leaving it exactly as it was."""

import json
import logging
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from .. import storage
from .._progress import progress_bar
from ..data import BatchDigest, describe_batches
from ..masks import Mask
from ..metrics import METRICS
from ..models import align, backbone_prefix, check_head, describe, find_difference, infer_objective, measuring
from ..objectives import Batch, LossFunction, is_language_model, num_scored, reference_losses
from ..scores import FisherScores
from .directions import (
    KINDS,
    Direction,
    Match,
    Normalize,
    OneDimensional,
    Subspace,
    geometry_of,
    matched,
    norm,
    orthogonalized,
    random_directions,
    restrict,
)
from .evaluate import Evaluator, Metric, metric_name
from .surface import Axis, Journal, Landscape, Marker, Point, journals, mean_of

logger = logging.getLogger(__name__)

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
        objective: As in :func:`fisherscope.estimate_fisher`.
        seed: Of random directions; axis k of replicate r is direction r * axes + k of the seed.
        strict: Refuse a mask that was made from other weights, instead of warning.
        progress: Show a bar with the expected time to the end.
        checkpoint: A file that holds the points measured so far; when it exists the scan goes on where it stopped.

    Raises:
        ValueError: If a number of points is even or below 3, 0 is not on the grid, ``axes`` is not 1, 2 or 3, a
            direction names no parameter or has another shape, nothing moves, no token is scored, a metric is unknown,
            ``replicates`` are asked of given directions, or the checkpoint belongs to another scan.
        MaskMismatch: If the mask belongs to another model.
    """
    objective = objective or infer_objective(model)
    check_head(model, objective)
    _check_metrics(metrics)
    space = None if isinstance(directions, str) and directions == "random" else _given(directions, model, axes)
    if replicates < 1 or (space and replicates > 1):
        found = f"got {replicates}" if replicates < 1 else f"got {replicates} of given directions, which are only one"
        raise ValueError(f"replicates must be at least 1, and only random directions have several; {found}.")
    steps = _grid(axes, points, span)
    selected = mask.for_model(model, strict=strict) if mask is not None else None
    if selected is not None and (resting := [n for n, _ in model.named_parameters() if n not in selected]):
        logger.info("%d parameters are not in the mask and rest, for example '%s'.", len(resting), resting[0])
    weights = None if scores is None else _scores_for(model, scores)
    fixed = list(batches)

    def moves_of(replicate: int) -> list[dict[str, Tensor]]:
        options: dict[str, Any] = {"seed": seed, "normalize": normalize, "one_dimensional": one_dimensional}
        whole = space.directions if space else random_directions(model, axes, **options, first=replicate * axes)
        moves = [restrict(direction, selected) for direction in whole]
        if mask is not None:
            pairs = zip(moves, whole, strict=True)
            moves = [matched(move, direction, mask.density, match, weights) for move, direction in pairs]
        return orthogonalized(moves) if orthogonal else moves

    def empty(replicate: int, moves: Sequence[Direction], **facts: Any) -> Landscape:
        kinds = space.kinds if space else [KINDS[normalize]] * axes
        grid_axes = tuple(map(_axis, range(axes), steps, moves, kinds))
        shape = tuple(len(s) for s in steps)
        counts = np.concatenate([num_scored(batch, objective).numpy() for batch in fixed]) if axes == 1 else None
        return Landscape(
            grid_axes,
            np.full(shape, np.nan),
            np.zeros(shape, dtype=bool),
            _name(objective),
            references,
            mask.provenance.get("rule", "a mask") if mask is not None else "all entries",
            metrics={metric_name(metric): np.full(shape, np.nan) for metric in metrics},
            clipped=np.zeros(shape, dtype=bool) if clip else None,
            examples=None if counts is None else np.full((*shape, len(counts)), np.nan),
            counts=counts,
            geometry=geometry_of(model, moves, weights, quadratic=_predicts_loss(scores, objective)),
            **facts,
        )

    references = reference_losses(model, fixed, objective)
    first = moves_of(0)
    settings = {
        "span": span,
        "seed": None if space else seed,
        "directions": list(space.kinds) if space else KINDS[normalize],
        "one_dimensional": one_dimensional,
        "match": match,
        "orthogonal": orthogonal,
        "replicates": replicates,
        "metrics": [metric_name(metric) for metric in metrics],
        "clip": clip,
        "moves": _fingerprint(first),
    }
    provenance = _provenance(model, batches, fixed, mask, objective, settings)
    if replicates == 1:
        start = empty(0, first, provenance=provenance)
    else:
        start = mean_of([empty(r, moves_of(r)) for r in range(replicates)], provenance=provenance)
    ceiling = references["uniform"] + MARGIN if clip and "uniform" in references else None
    with measuring(model), ExitStack() as stack:
        logs = stack.enter_context(journals(Path(checkpoint) if checkpoint else None, start))
        done = sum(int(log.evaluated.sum()) for log in logs)
        total = sum(log.loss.size for log in logs)
        bar = stack.enter_context(progress_bar(total, "Landscape", "point", done=done, shown=progress))
        markers: tuple[Marker, ...] = ()
        for replicate, log in enumerate(logs):
            moves = first if replicate == 0 else moves_of(replicate)
            evaluator = Evaluator(
                model, fixed, objective, moves, metrics=metrics, keep_examples=axes == 1, ceiling=ceiling
            )
            with ExitStack() as restored:
                restored.callback(evaluator.restore)
                scan(evaluator, log, tick=bar.update)
                markers = _measured(evaluator, space) if space else ()
        found = [log.landscape for log in logs]
    if replicates > 1:
        return mean_of(found, provenance=provenance)
    return replace(found[0], markers=markers, connected=bool(space and space.connected))


def scan(
    evaluate: Callable[[Iterable[tuple[float, ...]]], Iterator[Point]],
    log: Journal,
    *,
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Measure every grid point that is still missing, the last axis fastest.

    Knows nothing of models: the extension point for other ways to evaluate a point.

    Args:
        evaluate: Measures points, given by one step per axis, in their order.
        log: The grid, with the points measured so far; where points are recorded as they come.
        tick: Called after every point.
    """
    axes = log.landscape.axes
    for row in np.ndindex(log.loss.shape[:-1]):
        missing = [(*row, column) for column in range(log.loss.shape[-1]) if not log.evaluated[(*row, column)]]
        for index, point in zip(missing, evaluate([_steps(axes, index) for index in missing]), strict=True):
            log.record(index, point)
            tick()
        if missing:
            log.flush()


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


def _grid(axes: int, points: int | Sequence[int], span: float | Sequence[tuple[float, float]]) -> list[np.ndarray]:
    if axes not in (1, 2, 3):
        raise ValueError(f"axes must be 1, 2 or 3, got {axes}.")
    counts = [operator.index(count) for count in (points if isinstance(points, Sequence) else [points] * axes)]
    if len(counts) != axes:
        raise ValueError(f"points must be one number or one per axis ({axes}), got {counts}.")
    if isinstance(span, Sequence):
        if len(span) != axes:
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


def _check_metrics(metrics: Sequence[Metric]) -> None:
    if wrong := next((m for m in metrics if isinstance(m, str) and m not in METRICS), None):
        raise ValueError(f"A metric is one of {', '.join(METRICS)}, or a function of predictions; got {wrong!r}.")


def _given(directions: Literal["random"] | Sequence[Direction] | Subspace, model: nn.Module, axes: int) -> Subspace:
    if isinstance(directions, Subspace):
        found = f"{len(directions.directions)} directions"
        space = directions
    else:
        mappings = not isinstance(directions, str) and all(isinstance(d, Mapping) for d in directions)
        found = f"{len(directions)} directions" if mappings else repr(directions)[:40]
        space = Subspace(tuple(directions), ("given",) * len(directions)) if mappings else None
    if space is None or len(space.directions) != axes:
        raise ValueError(f"directions must be 'random' or one mapping per axis ({axes}), got {found}.")
    parameters = dict(model.named_parameters())
    for direction in space.directions:
        for name, tensor in direction.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                found = "no such parameter" if name not in parameters else f"shape {tuple(parameters[name].shape)}"
                raise ValueError(f"A direction has '{name}' of shape {tuple(tensor.shape)}, but the model has {found}.")
    return space


def _scores_for(model: nn.Module, scores: FisherScores) -> dict[str, Tensor]:
    """The scores under the model's names, on its device; 0 where the model has a parameter that they lack."""
    prefix = scores.provenance.get("model", {}).get("prefix", backbone_prefix(model))
    if difference := find_difference(scores, prefix, model):
        raise ValueError(f"The scores do not fit this model: {difference}.")
    own = align(scores, prefix, model)
    return {n: own[n].to(p.device) if n in own else p.detach().new_zeros(p.shape) for n, p in model.named_parameters()}


def _predicts_loss(scores: FisherScores | None, objective: str | LossFunction) -> bool:
    """Whether half the Fisher norm squared is the second-order term of the loss, up to what a diagonal leaves out."""
    return scores is not None and (scores.unit == "token" or not is_language_model(objective))


def _axis(number: int, steps: np.ndarray, move: Mapping[str, Tensor], kind: str) -> Axis:
    entries = {name: int(t.count_nonzero()) for name, t in move.items()}
    if not sum(entries.values()):
        raise ValueError(
            "Nothing moves: the mask selects only entries whose direction is 0; select others, or let biases and norms "
            "move with one_dimensional='scale'."
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
