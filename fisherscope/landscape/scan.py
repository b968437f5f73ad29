"""Evaluating a model on a grid of steps, and leaving it exactly as it was."""

import json
import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from .. import storage
from .._progress import progress_bar
from ..data import BatchDigest, describe_batches
from ..masks import Mask
from ..models import check_head, describe, infer_objective, measuring
from ..objectives import Batch, LossFunction, example_losses, reference_losses
from .directions import Direction, Normalize, OneDimensional, random_directions, restrict
from .surface import Axis, Journal, Landscape, journal

logger = logging.getLogger(__name__)


def scan_landscape(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    mask: Mask | None = None,
    axes: int = 2,
    points: int | Sequence[int] = 51,
    span: float = 1.0,
    directions: Literal["random"] | Sequence[Direction] = "random",
    normalize: Normalize = "filter",
    one_dimensional: OneDimensional = "skip",
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
    bit-identical afterwards, also after an exception.

    Args:
        model: The model at step 0.
        batches: A re-iterable of input dicts, as in :func:`fisherscope.estimate_fisher`.
        mask: The entries that move; None means all.
        axes: 1 or 2.
        points: Grid points per axis, odd so that step 0 is among them; one number, or one per axis.
        span: The steps go from ``-span`` to ``span``, 1 being a move as large as the weights, row by row.
        directions: ``"random"``, or one mapping from parameter name to tensor per axis (parameters left out rest).
        normalize: Of random directions, see :func:`random_directions`.
        one_dimensional: Of random directions.
        objective: As in :func:`fisherscope.estimate_fisher`.
        seed: Of random directions; axis k depends only on (seed, k).
        strict: Refuse a mask that was made from other weights, instead of warning.
        progress: Show a bar with the expected time to the end.
        checkpoint: A file that holds the points measured so far; when it exists the scan goes on where it stopped.

    Raises:
        ValueError: If a number of points is even or below 3, ``axes`` is not 1 or 2, a direction names no parameter
            or has another shape, nothing moves, no token is scored, or the checkpoint belongs to another scan.
        MaskMismatch: If the mask belongs to another model.
    """
    objective = objective or infer_objective(model)
    check_head(model, objective)
    steps = _grid(axes, points, span)
    given = directions != "random"
    whole = (
        _check_directions(directions, model, axes)
        if given
        else random_directions(model, axes, seed=seed, normalize=normalize, one_dimensional=one_dimensional)
    )
    selected = mask.for_model(model, strict=strict) if mask is not None else None
    if selected is not None and (resting := [n for n, _ in model.named_parameters() if n not in selected]):
        logger.info("%d parameters are not in the mask and rest, for example '%s'.", len(resting), resting[0])
    moves = [restrict(direction, selected) for direction in whole]
    kind = "given" if given else {"filter": "random, filter-normalised", "none": "random, Gaussian"}[normalize]
    grid_axes = tuple(_axis(number, s, move, kind) for number, (s, move) in enumerate(zip(steps, moves, strict=True)))
    fixed = list(batches)
    settings = {
        "span": span,
        "seed": None if given else seed,
        "directions": kind,
        "one_dimensional": one_dimensional,
        "moves": _fingerprint(moves),
    }
    shape = tuple(len(s) for s in steps)
    empty = Landscape(
        grid_axes,
        np.full(shape, np.nan),
        np.zeros(shape, dtype=bool),
        _name(objective),
        reference_losses(model, fixed, objective),
        mask.provenance.get("rule", "a mask") if mask is not None else "all entries",
        _provenance(model, batches, fixed, mask, objective, settings),
    )
    with measuring(model), ExitStack() as stack:
        loss_at = _Evaluator(model, fixed, objective, moves)
        stack.callback(loss_at.restore)
        log = stack.enter_context(journal(Path(checkpoint), empty)) if checkpoint else None
        return scan(loss_at, log.landscape if log else empty, log=log, progress=progress)


def scan(
    loss_at: Callable[..., float], landscape: Landscape, *, log: Journal | None = None, progress: bool = False
) -> Landscape:
    """Evaluate ``loss_at(*steps)`` at every grid point that is still missing, the last axis fastest.

    Knows nothing of models: the extension point for other ways to evaluate a point.

    Args:
        loss_at: Loss at one step per axis.
        landscape: The grid, with the points measured so far.
        log: Where points are recorded as they come.
        progress: Show a bar.

    Returns:
        The complete landscape.
    """
    loss, evaluated = landscape.loss.copy(), landscape.evaluated.copy()
    with progress_bar(loss.size, "Landscape", "point", done=int(evaluated.sum()), shown=progress) as bar:
        for row in np.ndindex(loss.shape[:-1]):
            missing = [(*row, column) for column in range(loss.shape[-1]) if not evaluated[(*row, column)]]
            for index in missing:
                loss[index] = loss_at(*(float(axis.steps[i]) for axis, i in zip(landscape.axes, index, strict=True)))
                evaluated[index] = True
                if log:
                    log.record(index, loss[index])
                bar.update()
            if log and missing:
                log.flush()
    return replace(landscape, loss=loss, evaluated=evaluated)


class _Evaluator:
    """The loss of the model moved by steps along the directions, always from an untouched copy of its weights."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], objective: str | LossFunction, directions: Sequence[Direction]
    ) -> None:
        self.model, self.batches, self.objective = model, batches, objective
        parameters = dict(model.named_parameters())
        moved = [name for name in parameters if any(name in d and bool(d[name].any()) for d in directions)]
        self.parameters = [parameters[name].data for name in moved]
        self.base = [p.clone() for p in self.parameters]
        self.directions = [[d[n] if n in d else torch.zeros_like(parameters[n]) for n in moved] for d in directions]
        self.outer_steps: tuple[float, ...] | None = None
        self.outer = self.base

    @torch.no_grad()
    def __call__(self, *steps: float) -> float:
        """Mean loss per scored token at one grid point."""
        if steps[:-1] != self.outer_steps:  # the slow axes change once per row
            self.outer = self.base
            for step, direction in zip(steps[:-1], self.directions[:-1], strict=True):
                self.outer = [w + step * d for w, d in zip(self.outer, direction, strict=True)]
            self.outer_steps = steps[:-1]
        for parameter, weight, move in zip(self.parameters, self.outer, self.directions[-1], strict=True):
            torch.add(weight, move, alpha=steps[-1], out=parameter)
        total, count = 0.0, 0
        for batch in self.batches:
            losses = example_losses(self.model, batch, self.objective)
            total += float(losses.total.double().sum())
            count += int(losses.count.sum())
        if not count:
            raise ValueError(
                "None of the examples has a scored token (a label that is not -100); check labels and objective."
            )
        return total / count

    def restore(self) -> None:
        """Put the original weights back, bit for bit."""
        for parameter, weight in zip(self.parameters, self.base, strict=True):
            parameter.copy_(weight)


def _grid(axes: int, points: int | Sequence[int], span: float) -> list[np.ndarray]:
    if axes not in (1, 2):
        raise ValueError(f"axes must be 1 or 2, got {axes}.")
    counts = [operator.index(count) for count in (points if isinstance(points, Sequence) else [points] * axes)]
    if len(counts) != axes:
        raise ValueError(f"points must be one number or one per axis ({axes}), got {counts}.")
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


def _check_directions(
    directions: Literal["random"] | Sequence[Direction], model: nn.Module, axes: int
) -> Sequence[Direction]:
    mappings = all(isinstance(d, Mapping) for d in directions)
    if isinstance(directions, str) or not mappings or len(directions) != axes:
        found = f"{len(directions)} directions" if mappings else repr(directions)[:40]
        raise ValueError(f"directions must be 'random' or one mapping per axis ({axes}), got {found}.")
    parameters = dict(model.named_parameters())
    for direction in directions:
        for name, tensor in direction.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                found = "no such parameter" if name not in parameters else f"shape {tuple(parameters[name].shape)}"
                raise ValueError(f"A direction has '{name}' of shape {tuple(tensor.shape)}, but the model has {found}.")
    return directions


def _axis(number: int, steps: np.ndarray, move: Mapping[str, Tensor], kind: str) -> Axis:
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in move.values()))
    entries = sum(int(t.count_nonzero()) for t in move.values())
    if not entries:
        raise ValueError(
            "Nothing moves: the mask selects only entries whose direction is 0; select others, or let biases and norms "
            "move with one_dimensional='scale'."
        )
    return Axis(f"axis{number}", steps, norm, entries, kind)


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
