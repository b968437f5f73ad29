"""How a model is trained, whatever the method."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, get_args

from .. import distributed

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, a linear schedule after a linear warm-up, gradients clipped to norm 1.

    Attributes:
        epochs: Passes over the training examples.
        max_steps: Optimizer steps in place of ``epochs``.
        batch_size: Examples at once on every rank.
        accumulate: Batches whose gradients are added up for an optimizer step; changes no gradient.
        learning_rate: At its highest.
        weight_decay: Decoupled; of weights, not of biases and norms.
        warmup: Share of the steps.
        precision: Of the forward and backward pass; weights are float32.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    precision: Precision = "float32"

    MAX_GRAD_NORM = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained by."""
        for name in ("batch_size", "accumulate", *(["max_steps"] if self.max_steps is not None else [])):
            value = getattr(self, name)
            if not _is(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number and at least 1, got {value!r}.")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if not _is(value, Real) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, and finite; got {value!r}.")
        if not _is(self.weight_decay, Real) or not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a number, at least 0 and finite; got {self.weight_decay!r}.")
        if not _is(self.warmup, Real) or not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, at least 0 and below 1; got {self.warmup!r}.")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}; got {self.precision!r}.")

    def steps_per_epoch(self, num_examples: int) -> int:
        """Optimizer steps for a pass over the training examples."""
        batches = math.ceil(num_examples / (self.batch_size * distributed.world_size()))
        return math.ceil(batches / self.accumulate)

    def total_steps(self, num_examples: int) -> int:
        """Optimizer steps of the whole training."""
        return self.steps_of(self.steps_per_epoch(num_examples))

    def steps_of(self, steps_per_epoch: int) -> int:
        """The same, for epochs of so many steps."""
        return self.max_steps or math.ceil(self.epochs * steps_per_epoch)


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
