"""How a model is trained, whatever the method."""

import math
from dataclasses import dataclass
from typing import Literal

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
        for name in ("batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, at least 0 and below 1; got {self.warmup}.")

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
