"""Plain fine-tuning that takes its time."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..regularizer import Regularizer

if TYPE_CHECKING:
    from ..recipe import Recipe


@dataclass(frozen=True)
class Long(Regularizer):
    r"""Plain fine-tuning for several times as many steps.

    .. math::  T' = \text{longer} \cdot T

    Epochs, or steps where they are given, are multiplied, and warm-up and decay of the learning rate with them. The
    default makes 20 epochs out of 3, as in Mosbach et al. (arXiv 2006.04884), who find that this with Adam's bias
    correction leaves few failed trainings; so do Zhang et al. (arXiv 2006.05987).

    Attributes:
        longer: Factor of the length of the training, above 0; 1 is plain fine-tuning.

    Raises:
        ValueError: If ``longer`` is out of range.
    """

    name: ClassVar[str] = "vanilla-long"

    longer: float = 20 / 3

    def __post_init__(self) -> None:
        """Refuse what is no factor."""
        if not (self.longer > 0 and math.isfinite(self.longer)):
            raise ValueError(f"longer must be above 0, got {self.longer:g}.")

    @classmethod
    def recipe(cls, recipe: "Recipe", **settings: Any) -> "Recipe":
        """More epochs and steps."""
        factor = cls(**settings).longer
        steps = None if recipe.max_steps is None else math.ceil(recipe.max_steps * factor)
        return replace(recipe, epochs=recipe.epochs * factor, max_steps=steps)
