"""Lower learning rates for lower layers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from ..parts import rates_scaled
from ..regularizer import Applied, Regularizer
from .fixed_mask import backbone_names
from .top_k_layers import layer_in, numbered_layers


@dataclass(frozen=True)
class LayerwiseRates(Regularizer):
    r"""A learning rate that falls by a factor with every layer from the top down.

    .. math::  \eta_d = \eta\, \xi^d

    with :math:`d = 0` for the head and poolers, 1 for the top layer, ... and :math:`L + 1` for the embeddings; layers
    are counted as in ``top-k-layers``. Weight decay falls with the rate. From Sun et al. (arXiv 1905.05583), as a
    baseline in Zhang et al. (arXiv 2006.05987), where :math:`\xi = 0.95`.

    Attributes:
        decay: The factor between a layer and the one above it, above 0; 1 is plain fine-tuning.

    Raises:
        ValueError: If ``decay`` is out of range.
    """

    name: ClassVar[str] = "layerwise-lr-decay"
    order: ClassVar[int] = -1
    excludes: ClassVar[Mapping[str, str]] = {"gradual-unfreezing": "that has rates for every layer of its own"}

    decay: float = 0.95

    def __post_init__(self) -> None:
        """Refuse what does not fall."""
        check_decay(self.decay)

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Scale the rates for the length of the block.

        Raises:
            ValueError: If the model has no numbered layers.
        """
        parameters = dict(model.named_parameters())
        factors = {parameters[name]: self.decay**depth for name, depth in depths(model).items()}
        with rates_scaled(optimizer, factors):
            yield Applied()


def depths(model: nn.Module) -> dict[str, int]:
    """How far below the head every parameter is: 0 head and poolers, 1 top layer, ... L + 1 embeddings.

    Raises:
        ValueError: If the model has no numbered layers.
    """
    layers, inside = list(numbered_layers(model)), set(backbone_names(model))
    if not layers:
        raise ValueError(f"A {type(model).__name__} has no numbered layers to tell apart; take another method.")
    found = {}
    for name, _ in model.named_parameters():
        layer = layer_in(layers, name)
        below = len(layers) + 1 if layer is None else len(layers) - layers.index(layer)
        found[name] = below if name in inside else 0
    return found


def check_decay(decay: float) -> None:
    """Refuse what is no factor between layers."""
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be above 0 and at most 1, got {decay:g}.")
