"""The loss of a model moved along directions."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .._typing import Float
from ..data.corruption import IGNORED
from ..distributed import world_size
from ..fisher.memory import free_on
from ..metrics import METRICS
from ..models import device_of
from ..objectives import Batch, LossFunction, Predictions, predict
from .directions import Direction
from .prefix import Prefix, same
from .surface import Point

logger = logging.getLogger(__name__)

Metric = str | Callable[[Predictions], Float[Tensor, "examples"]]
"""The name of one in :mod:`fisherscope.metrics`, over all scored tokens, or a function that gives a value per example,
of which the mean is taken."""

SHARE_OF_FREE = 0.25
"""How much of the free memory may hold what is the same at every point; of 4 GiB where the system does not tell."""


class Evaluator:
    """The loss of a model moved by steps along directions, always from an untouched copy of its weights.

    A point costs one pass over the parameters that move, and a forward pass of every batch, of which what comes before
    the first of them is computed once (:class:`Prefix`). Both leave every bit of the loss as it is.
    """

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
        device = device_of(model)
        self.batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
        self.model, self.objective = model, objective
        self.metrics, self.keep_examples, self.ceiling = metrics, keep_examples, ceiling
        self.num_examples = sum(len(next(iter(batch.values()))) for batch in batches)
        parameters = dict(model.named_parameters())
        moved = [name for name in parameters if any(name in d and bool(d[name].any()) for d in directions)]
        self.parameters = [parameters[name].data for name in moved]
        self.base = [p.clone() for p in self.parameters]
        self.directions = [[d[n] if n in d else torch.zeros_like(parameters[n]) for n in moved] for d in directions]
        self.wide = [_wide(weight) for weight in self.base]  # the same tensors, unless they are narrow
        self.row = self.wide if len(directions) == 1 else [torch.empty_like(weight) for weight in self.wide]
        self.row_steps: tuple[float, ...] | None = None
        room = int(SHARE_OF_FREE * (free_on(device) or 2**32)) // world_size()
        # a function may do anything, not only run the model once
        self.prefix = None if callable(objective) else Prefix(model, [parameters[name] for name in moved], room)
        self._is_checked = False

    def __call__(self, points: Iterable[tuple[float, ...]]) -> Iterator[Point]:
        """Measure points, given by one step per axis, in their order."""
        for steps in points:
            if not self._is_checked:
                self._check_prefix(steps)
            self._move(steps)
            yield self._measure(self.prefix)

    def __enter__(self) -> "Evaluator":
        """For a block after which the model is as it was."""
        return self

    def __exit__(self, *_: object) -> None:
        """Restore."""
        self.restore()

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

    @torch.no_grad()
    def _check_prefix(self, steps: tuple[float, ...]) -> None:
        """Compare what is kept of the first batch at step 0 with a full run where every axis is displaced.

        They differ where a parameter that moves is used by a module that does not own it, and where a module notes
        something elsewhere, which then is of the last batch that ran.
        """
        self._is_checked = True
        if self.prefix is None or not self.batches:
            return
        self.restore()
        for number in sorted({0, len(self.batches) - 1}):
            self._predict(number, self.prefix)
        if not self.prefix.holds(0):
            self.prefix = None
            return
        self._move(tuple(step or 0.1 for step in steps))
        if not same(self._predict(0, self.prefix), self._predict(0, None)):
            logger.info("Every point runs the model in full: what comes before what moves is not constant.")
            self.prefix = None

    def _predict(self, number: int, prefix: Prefix | None) -> Predictions:
        def compute() -> Predictions:
            return predict(self.model, self.batches[number], self.objective)

        return compute() if prefix is None else prefix.run(number, compute)

    @torch.no_grad()
    def _move(self, steps: tuple[float, ...]) -> None:
        if steps[:-1] != self.row_steps:  # the slow axes change once per row
            start = self.wide
            for step, direction in zip(steps[:-1], self.directions[:-1], strict=True):
                for row, weight, move in zip(self.row, start, direction, strict=True):
                    torch.add(weight, move, alpha=step, out=row)
                start = self.row
            self.row_steps = steps[:-1]
        for parameter, weight, move in zip(self.parameters, self.row, self.directions[-1], strict=True):
            torch.add(weight, move, alpha=steps[-1], out=parameter)

    @torch.no_grad()
    def _measure(self, prefix: Prefix | None = None) -> Point:
        """The loss and metrics of the model as it stands."""
        totals, counts, seen = [], [], _Seen(self.metrics)
        for number in range(len(self.batches)):
            predictions = self._predict(number, prefix)
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
        examples = np.pad(total, (0, self.num_examples - len(total)), constant_values=np.nan)
        examples = examples if self.keep_examples else None
        return Point(float(total.sum() / count.sum()), seen.values(), examples, clipped)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, so that a point is rounded to the precision of the weights once."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


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
            values = function(predictions)
            if values.shape != predictions.count.shape:
                raise ValueError(
                    f"The metric {metric_name(function)} must give one value per example, shape "
                    f"{list(predictions.count.shape)}; got shape {list(values.shape)}."
                )
            self.by_example.setdefault(metric_name(function), []).append(values.double().cpu().numpy())

    def values(self) -> dict[str, float]:
        found = {name: float(np.concatenate(values).mean()) for name, values in self.by_example.items()}
        if self.named:
            predicted, labels = np.concatenate(self.predicted), np.concatenate(self.labels)
            found |= {name: METRICS[name](predicted, labels) for name in self.named}
        return found


def metric_name(metric: Metric) -> str:
    """What a metric is called in files and figures."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "a function")
