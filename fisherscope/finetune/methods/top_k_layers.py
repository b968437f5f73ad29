"""Training the top layers of a model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from ...models import layer_of
from ..parts import is_in_numbered_layer
from ..regularizer import Applied, Regularizer
from .fixed_mask import backbone_names, train_only, whole

_NORM_AFTER_LAYERS = re.compile(r"((final|post|last)_?)?(layer_?)?norm(_f)?|ln_f")


@dataclass(frozen=True)
class TopKLayers(Regularizer):
    """Trains the top layers of the backbone, its pooler and the head; what is below them is frozen.

    With :math:`L` layers, the embeddings and layers :math:`1 … L - K` get no gradient, so nothing is computed backward
    through them; their dropout stays. Layers are the numbered blocks, in the model's order; of a model with encoder
    and decoder, those of the decoder are on top. A normalisation after the last layer of a stack belongs to that
    layer, a table of relative positions to what holds it. This is the control of Child-Tuning (arXiv 2109.05687) and
    of DPS (arXiv 2211.01642).

    Attributes:
        layers: How many layers are trained; 0 trains the head and a pooler alone.

    Raises:
        ValueError: If ``layers`` is negative.
    """

    name: ClassVar[str] = "top-k-layers"
    order: ClassVar[int] = -2

    layers: int

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        if self.layers < 0:
            raise ValueError(f"layers must be at least 0, got {self.layers}.")

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Train the top layers for the length of the block.

        Raises:
            ValueError: If the model has fewer layers.
        """
        found = list(numbered_layers(model))
        if self.layers > len(found):
            raise ValueError(
                f"layers must be at most the {len(found)} that a {type(model).__name__} has, got {self.layers}."
            )
        top, inside = set(found[len(found) - self.layers :]), set(backbone_names(model))
        trained = {n for n, _ in model.named_parameters() if n not in inside or layer_in(found, n) in top}
        with train_only(model, optimizer, whole(model, trained)):
            yield Applied()


def numbered_layers(model: nn.Module) -> dict[str, list[str]]:
    """The numbered blocks of the backbone, in the model's order, and their parameters.

    A numbered block inside another one is a part of it.
    """
    layers: dict[str, list[str]] = {}
    for name in backbone_names(model):
        if is_in_numbered_layer(name):
            layers.setdefault(layer_of(name), []).append(name)
    return layers


def layer_in(layers: list[str], name: str) -> str | None:
    """The layer that a parameter of the backbone belongs to; None for embeddings."""
    if (layer := layer_of(name)) in layers:
        return layer
    path, _, module = name.rpartition(".")[0].rpartition(".")
    if not _NORM_AFTER_LAYERS.fullmatch(module):
        return None
    stack = [layer for layer in layers if layer.startswith(f"{path}." if path else "")]
    return stack[-1] if stack else None
