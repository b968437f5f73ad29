"""The loss of a model moved along directions."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .._typing import Float
from ..data.corruption import IGNORED
from ..metrics import METRICS
from ..objectives import Batch, LossFunction, Predictions, predict
from .directions import Direction
from .surface import Point

Metric = str | Callable[[Predictions], Float[Tensor, "examples"]]
"""The name of one in :mod:`fisherscope.metrics`, over all scored tokens, or a function that gives a value per example,
of which the mean is taken."""


class Evaluator:
    """The loss of a model moved by steps along directions, always from an untouched copy of its weights."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        objective: str | LossFunction,
        directions: Sequence[Direction],
        *,
        metrics: Sequence[Metric] = (),
        keep_examples: bool = False,
        ceiling: float | None = None,
    ) -> None:
        """Copy what moves.

        Args:
            model: The model; :meth:`restore` puts it back.
            batches: What the loss is measured on.
            objective: As in :func:`fisherscope.estimate_fisher`.
            directions: One per axis, on the model's device.
            metrics: What else is measured, in the same pass.
            keep_examples: Whether points have the losses of the examples.
            ceiling: Points whose first batch has a mean loss above this are decided by it.
        """
        self.model, self.batches, self.objective = model, batches, objective
        self.metrics, self.keep_examples, self.ceiling = metrics, keep_examples, ceiling
        parameters = dict(model.named_parameters())
        moved = [name for name in parameters if any(name in d and bool(d[name].any()) for d in directions)]
        self.parameters = [parameters[name].data for name in moved]
        self.base = [p.clone() for p in self.parameters]
        self.directions = [[d[n] if n in d else torch.zeros_like(parameters[n]) for n in moved] for d in directions]
        self.outer_steps: tuple[float, ...] | None = None
        self.outer = self.base

    @torch.no_grad()
    def __call__(self, points: Iterable[tuple[float, ...]]) -> Iterator[Point]:
        """Measure points, given by one step per axis, in their order."""
        for steps in points:
            self._move(steps)
            yield self._measure()

    @torch.no_grad()
    def of_weights(self, weights: Mapping[str, Tensor]) -> Point:
        """Measure another model: the one at step 0 with other values for some parameters, even such as never move."""
        self.restore()
        parameters = dict(self.model.named_parameters())
        kept = {name: parameters[name].detach().clone() for name in weights}
        try:
            for name, tensor in weights.items():
                parameters[name].copy_(tensor)
            return self._measure()
        finally:
            for name, tensor in kept.items():
                parameters[name].copy_(tensor)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the original weights back, bit for bit."""
        for parameter, weight in zip(self.parameters, self.base, strict=True):
            parameter.copy_(weight)

    def _move(self, steps: tuple[float, ...]) -> None:
        if steps[:-1] != self.outer_steps:  # the slow axes change once per row
            self.outer = self.base
            for step, direction in zip(steps[:-1], self.directions[:-1], strict=True):
                self.outer = [w + step * d for w, d in zip(self.outer, direction, strict=True)]
            self.outer_steps = steps[:-1]
        for parameter, weight, move in zip(self.parameters, self.outer, self.directions[-1], strict=True):
            torch.add(weight, move, alpha=steps[-1], out=parameter)

    def _measure(self) -> Point:
        """The loss and metrics of the model as it stands."""
        totals, counts, seen = [], [], _Seen(self.metrics)
        for number, batch in enumerate(self.batches):
            predictions = predict(self.model, batch, self.objective)
            losses = predictions.losses()
            seen.add(predictions)
            totals.append(losses.total.double().cpu().numpy())
            counts.append(losses.count.cpu().numpy())
            if number == 0 and self.ceiling is not None and totals[0].sum() > self.ceiling * counts[0].sum():
                break
        total, count = np.concatenate(totals), np.concatenate(counts)
        if not count.sum():
            raise ValueError(
                "None of the examples has a scored token (a label that is not -100); check labels and objective."
            )
        clipped = len(totals) < len(self.batches)
        examples = total if self.keep_examples else None
        return Point(float(total.sum() / count.sum()), seen.values(), examples, clipped)


class _Seen:
    """Predictions and labels of one point, as far as metrics need them."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.named = [metric for metric in metrics if isinstance(metric, str)]
        self.functions = [metric for metric in metrics if not isinstance(metric, str)]
        self.predicted, self.labels = [], []
        self.by_example: dict[str, list[np.ndarray]] = {}

    def add(self, predictions: Predictions) -> None:
        if self.named:
            scored = predictions.labels != IGNORED
            is_number = predictions.kind == "gaussian"
            outputs = predictions.outputs if is_number else predictions.outputs.argmax(-1)
            self.predicted.append(outputs[scored].cpu().numpy())
            self.labels.append(predictions.labels[scored].cpu().numpy())
        for function in self.functions:
            self.by_example.setdefault(metric_name(function), []).append(function(predictions).double().cpu().numpy())

    def values(self) -> dict[str, float]:
        found = {name: float(np.concatenate(values).mean()) for name, values in self.by_example.items()}
        if self.named:
            predicted, labels = np.concatenate(self.predicted), np.concatenate(self.labels)
            found |= {name: METRICS[name](predicted, labels) for name in self.named}
        return found


def metric_name(metric: Metric) -> str:
    """What a metric is called in files and figures."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "a function")
