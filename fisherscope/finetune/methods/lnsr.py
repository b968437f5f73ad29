"""LNSR: what layers compute must not change much when noise is added below them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...models import layer_of
from ...objectives import Batch, Predictions
from ..parts import is_in_numbered_layer
from ..regularizer import Applied, Regularizer
from ..smoothness import Lookup, OfPasses, Passes, exact_dtype, is_further, lookups_noted, normal, unwrapped


@dataclass(frozen=True)
class LNSR(OfPasses):
    r"""Layer-wise noise stability: noise at one layer must not be amplified by the layers above it.

    .. math::  \ell = \ell_{\text{task}} + \lambda \sum_{r > b} \big\| h_r(x_b + e) - h_r(x_b) \big\|^2, \qquad
               e \sim N\big(0, \tfrac{s^2}{d} \|x_b\|^2\big)

    for every example, in the mean over its tokens without padding (virtual ones count), times the number of its scored
    tokens, which is 1 for labels. :math:`x_b` is what layer :math:`b` gives to the next one, of width :math:`d`, and
    :math:`h_r` the output of layer :math:`r` (Hua et al. 2021, arXiv 2107.04835). Both passes have the same dropout.
    The layers are counted in the order that a pass calls them, the decoder's after the encoder's. We know of no code of
    the authors': noise relative to the norm of every token, one weight for all layers, gradients through both passes,
    and the defaults are ours. A step takes about twice as long.

    Attributes:
        weight: Of the squared distances, lambda, the same for all layers; 0 is fine-tuning as it is, with one pass.
        layer: Layers below the noise; 0 puts it at the input of the first one.
        relative_noise: Expected size of the noise at a token, as a share of the norm of its hidden state.
        seed: Of the noise.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "lnsr"

    weight: float = 0.1
    layer: int = 0
    relative_noise: float = 0.05

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        for name in ("weight", "layer"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"The {name} of LNSR must not be negative, got {getattr(self, name):g}.")
        if not self.relative_noise > 0:
            raise ValueError(f"relative_noise must be above 0, got {self.relative_noise:g}.")

    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager[Applied]:
        """Take note of what the layers compute, for the length of the block; with weight 0 do nothing.

        Raises:
            ValueError: If the model has no numbered layers.
        """
        return self._noting(model) if self.weight else Regularizer.applied_to(self, model, optimizer)

    @contextmanager
    def _noting(self, model: nn.Module) -> Iterator[Applied]:
        noted = _Noted(model, self.name, self.seed)
        with self.following(model, noted), noted.noting():
            yield noted

    def penalty(self, model: nn.Module, batch: Batch, predictions: Predictions) -> Tensor | None:
        """The weighted squared distances of a pass with noise.

        Raises:
            ValueError: If there is no layer above the noise, or the noise comes to nothing.
        """
        if not self.weight:
            return None
        noted = self.passes_of(model)
        assert isinstance(noted, _Noted)
        clean, noted.states = noted.states, []  # kept no longer than needed: they hold the graph
        if self.layer >= len(clean):
            raise ValueError(
                f"LNSR needs a layer above the noise, but the noise is above {self.layer} layers and a pass of this "
                f"{type(unwrapped(model)).__name__} has {len(clean)}; take a smaller layer."
            )
        generator = noted.generator()

        def noise(hidden: Tensor) -> Tensor:
            exact = hidden.detach().to(exact_dtype(hidden))
            size = self.relative_noise * exact.norm(dim=-1, keepdim=True) / exact.shape[-1] ** 0.5
            return (hidden + size * normal(hidden, generator)).to(hidden.dtype)

        with lookups_noted(noted.model, batch) as lookups, noted.noised(self.layer, noise, lookups) as states:
            noted.again(batch)
        pairs = list(zip(clean, states, strict=True))[self.layer :]
        distances = torch.stack([_distance(a.hidden, b.hidden, b.lookup) for a, b in pairs]).sum(0)
        if not bool(distances.detach().any()):
            raise ValueError(
                f"LNSR needs noise to change what layers compute, but in this {type(unwrapped(model)).__name__} "
                "nothing changes; take more noise or float32."
            )
        return self.weight * distances * predictions.count


@dataclass(frozen=True)
class _State:
    """What a layer computed, and the look-up of word embeddings before it, if there was one."""

    hidden: Tensor
    lookup: Lookup | None = None


class _Noted(Passes):
    """The passes of a model, and what its layers computed in the last one that the loss is of."""

    def __init__(self, model: nn.Module, name: str, seed: int) -> None:
        super().__init__(model, name, seed)
        self.states: list[_State] = []
        names = dict.fromkeys(layer_of(n) for n, _ in model.named_parameters() if is_in_numbered_layer(n))
        self.layers = [model.get_submodule(n) for n in names]
        if not self.layers:
            raise ValueError(f"LNSR needs a model of numbered layers, but a {type(model).__name__} has none.")

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Take note of the layers' outputs in every pass that is none of ours."""

        def begin(*_: Any) -> None:
            if not is_further():
                self.states = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if not is_further() and (hidden := _hidden(output)) is not None:
                self.states.append(_State(hidden))

        with ExitStack() as stack:
            stack.callback(self.model.register_forward_pre_hook(begin).remove)
            for layer in self.layers:
                stack.callback(layer.register_forward_hook(note).remove)
            try:
                yield
            finally:
                self.states = []

    @contextmanager
    def noised(self, number: int, noise: Any, lookups: list[Lookup]) -> Iterator[list[_State]]:
        """The same for the passes in the block, where the layer of this number gets another input."""
        states: list[_State] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if (hidden := _hidden(output)) is not None:
                states.append(_State(hidden, lookups[-1] if lookups else None))

        def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(states) != number:
                return None
            if args:
                return (noise(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": noise(kwargs["hidden_states"])}

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(change, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(note).remove)
            yield states


def _hidden(output: Any) -> Tensor | None:
    """The hidden states in what a layer gives: one vector for every token."""
    first = output[0] if isinstance(output, (tuple, list)) else output
    return first if isinstance(first, Tensor) and first.ndim == 3 else None


def _distance(a: Tensor, b: Tensor, lookup: Lookup | None) -> Tensor:
    """The squared distance of hidden states, in the mean over the tokens of each example."""
    by_token = (a.to(exact_dtype(a)) - b.to(exact_dtype(b))).square().sum(-1)
    axis = 0 if lookup is None else lookup.axis
    by_token = by_token.movedim(axis, 0)
    tokens = torch.ones_like(by_token, dtype=torch.bool)
    if lookup is not None:
        read = lookup.tokens.movedim(axis, 0)
        text = tokens[:, -read.shape[1] :]  # virtual tokens stand before it
        if text.shape == read.shape:
            text.copy_(read)
    return (by_token * tokens).sum(1) / tokens.sum(1).clamp(min=1)
