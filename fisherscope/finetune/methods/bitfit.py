"""BitFit: training the biases."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from ..regularizer import Applied, Regularizer
from .fixed_mask import new_names, train_only, whole


@dataclass(frozen=True)
class BitFit(Regularizer):
    """Trains the biases and the head of the task (Ben Zaken et al., arXiv 2106.10199).

    Biases are the parameters named ``bias`` or ``…_bias``, those of normalisations among them. The weight of a pooler
    that came with the checkpoint is no head and stays; one that is drawn at random is trained.
    """

    name: ClassVar[str] = "bitfit"
    order: ClassVar[int] = -2

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Train the biases and the head for the length of the block.

        Raises:
            ValueError: If there is no bias outside the head.
        """
        new = new_names(model)
        biases = [name for name, _ in model.named_parameters() if name not in new and _is_bias(name)]
        if not biases:
            raise ValueError(
                f"BitFit trains biases, but a {type(model).__name__} has none outside its head; take another method."
            )
        with train_only(model, optimizer, whole(model, {*biases, *new})):
            yield Applied()


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")
