"""Fine-tuning as it is: what every method is compared with."""

from dataclasses import dataclass
from typing import ClassVar

from ..regularizer import Regularizer


@dataclass(frozen=True)
class Vanilla(Regularizer):
    """Changes nothing: the dropout of the model's configuration, all parameters trained."""

    name: ClassVar[str] = "vanilla"
