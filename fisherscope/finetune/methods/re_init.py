"""Re-init: the top layers begin at random values in place of the pretrained ones."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from ... import storage
from ...models import new_parameters, untrained
from ..parts import before_steps, innermost
from ..regularizer import Applied, Regularizer
from .top_k_layers import numbered_layers

if TYPE_CHECKING:
    from ..run import Run

logger = logging.getLogger(__name__)

_FROZEN = "re-initialised layers would stay frozen at random values"


@dataclass(frozen=True)
class ReInit(Regularizer):
    r"""Draws the top layers and the pooler anew, before training (Zhang et al., arXiv 2006.05987).

    .. math::  \theta_{\text{top}\,L} \sim p_0

    with :math:`p_0` the initial distribution of the model's own class: for most encoders :math:`N(0, 0.02^2)`, biases
    0, normalisations 1. Everything is trained then. Layers are the numbered blocks, as in ``top-k-layers``; tied
    parameters stay. The draws are apart from all others, so that the head begins as without the method. In a run, no
    method sees the pretrained values of what was drawn anew. In a training loop of one's own the values are written at
    the beginning of the block, unless the optimizer has a state, which is that of a resumed training.

    Attributes:
        reinit_layers: How many layers from the top are drawn anew; the paper searches among 1 to 6.
        pooler: Whether a pretrained pooler is drawn anew, too.
        seed: Of the draws.

    Raises:
        ValueError: If ``reinit_layers`` is negative.
    """

    name: ClassVar[str] = "re-init"
    order: ClassVar[int] = -3
    excludes: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("linear-probe", "bitfit", "lora", "prefix-tuning", "prompt-tuning"), _FROZEN
    )

    reinit_layers: int = 1
    pooler: bool = True
    seed: int = 0
    _written = False  # whether for_run did it

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        if self.reinit_layers < 0:
            raise ValueError(f"reinit_layers must be at least 0, got {self.reinit_layers}.")

    def names(self, model: nn.Module) -> list[str]:
        """The parameters that are drawn anew.

        Raises:
            ValueError: If the model has fewer layers.
        """
        layers = list(numbered_layers(model).values())
        if self.reinit_layers > len(layers):
            raise ValueError(
                f"reinit_layers must be at most the {len(layers)} layers that a {type(model).__name__} has, got "
                f"{self.reinit_layers}."
            )
        top = [name for layer in layers[len(layers) - self.reinit_layers :] for name in layer]
        new, parameters = set(new_parameters(model)), dict(model.named_parameters())
        poolers = [name for name in parameters if "pooler" in name.split(".") and name not in new]
        uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        return [name for name in [*top, *(poolers if self.pooler else [])] if uses[id(parameters[name])] == 1]

    @torch.no_grad()
    def write(self, model: nn.Module) -> list[str]:
        """Draw the values and write them into the model, whose global generators stay as they are.

        Returns:
            The names of the parameters.

        Raises:
            ValueError: If the model has fewer layers, or nothing was changed.
        """
        names, parameters = self.names(model), dict(model.named_parameters())
        if not names:
            return []
        fresh = dict(untrained(model, int(storage.digest(f"re-init {self.seed}"), 16) % 2**62).named_parameters())
        same = [name for name in names if torch.equal(parameters[name].cpu(), fresh[name].to(parameters[name].dtype))]
        if any(parameters[name].ndim > 1 for name in same):
            raise ValueError(f"Re-init must change '{same[0]}', but it has these values already; take another seed.")
        for name in names:
            parameters[name].copy_(fresh[name])
        logger.info("Drew %d parameters of the top layers anew, the first is '%s'.", len(names), names[0])
        return names

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Write the values, unless that is done.

        Raises:
            ValueError: If the model has fewer layers, or another method freezes what was drawn anew.
        """
        parameters = dict(model.named_parameters())
        names = self.names(model) if self._written or innermost(optimizer).state else self.write(model)

        def check() -> None:
            if frozen := next((name for name in names if not parameters[name].requires_grad), None):
                raise ValueError(f"'{frozen}' was drawn anew, but is frozen by another method; draw fewer layers anew.")

        with before_steps(optimizer, check):
            yield Applied()

    @classmethod
    def for_run(cls, run: "Run", **settings: Any) -> "ReInit":
        """Write the values into the run's model."""
        made = cls(seed=run.supply("seed"), **settings)
        run.renewed.update(made.write(run.model))
        object.__setattr__(made, "_written", True)
        return made
