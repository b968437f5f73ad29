"""Engines: functions that add the squared per-example gradients of one batch to the sums so far.

:func:`loop_engine` is the definition, one backward pass per example; the fast engine in ``hooks.py`` gives the same
numbers at about the price of one training step.
"""

from collections.abc import Container, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from ..objectives import Batch, LossFunction, predict
from .estimand import Estimand, check_finite
from .plan import backward
from .sharding import computing_parameters, own_part


@runtime_checkable
class Engine(Protocol):
    """Adds squared per-example gradients of a batch to sums of squares."""

    def __call__(self, batch: Batch, sums: Mapping[str, Tensor]) -> int:
        """Add one batch.

        Args:
            batch: Inputs and labels of B examples.
            sums: Parameter name to sum of squares, changed in place; exactly these parameters are scored.

        Returns:
            How many terms of the mean the batch stands for: examples, or tokens, that had something to score.

        Raises:
            ValueError: If the loss of an example is not finite.
        """
        ...


def loop_engine(model: nn.Module, objective: str | LossFunction, estimand: Estimand = Estimand()) -> Engine:  # noqa: B008
    r"""The reference: :math:`\sum_n (\partial \ell_n / \partial \theta)^2` by one backward pass per example."""
    absolute = estimand.estimator == "absolute-gradient"

    def add(batch: Batch, sums: Mapping[str, Tensor]) -> int:
        parameters = parameters_named(model, sums)
        units = 0

        def see(name: str, gradient: Tensor) -> None:
            gradient = own_part(gradient, sums[name])
            sums[name].add_(gradient.abs() if absolute else gradient.square())

        for n in range(size(batch)):
            example = {name: value[n : n + 1] for name, value in batch.items()}
            predictions = predict(model, example, objective)
            check_finite(predictions, first=n)
            if own := estimand.num_units(predictions):
                for loss in estimand.terms(predictions, example):
                    backward(model, loss.sum(), parameters, see, retain_graph=True)
            units += own
        return units

    return add


def batch_mean_engine(model: nn.Module, objective: str | LossFunction, estimand: Estimand) -> Engine:
    """The squared gradient of the mean loss of every batch; each batch is one term of the mean."""

    def add(batch: Batch, sums: Mapping[str, Tensor]) -> int:
        predictions = predict(model, batch, objective)
        check_finite(predictions)
        if not (units := estimand.num_units(predictions)):
            return 0
        (losses,) = estimand.terms(predictions, batch)
        backward(
            model,
            losses.sum() / units,
            parameters_named(model, sums),
            lambda name, g: sums[name].add_(g.to(sums[name]).square()),
        )
        return 1

    return add


def parameters_named(model: nn.Module, names: Container[str]) -> dict[str, nn.Parameter]:
    """The parameters to differentiate by; of a sharded model those that compute."""
    return {name: p for name, p in computing_parameters(model).items() if name in names}


def size(batch: Batch) -> int:
    """Number of examples."""
    return len(next(iter(batch.values())))
