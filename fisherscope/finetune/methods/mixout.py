"""Mixout: dropout that falls back to the pretrained weights in place of 0."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ... import storage
from ...models import dropout_sites
from ..parts import SAME_MATRICES, after_steps, anchored, rates_set, reparametrized, weight_matrices
from ..regularizer import Applied, Regularizer

Granularity = Literal["input", "element"]

_FROZEN = "the matrices to be mixed would be frozen"


@dataclass(frozen=True)
class Mixout(Regularizer):
    r"""Computes with a random mixture of trained and pretrained weights (Lee et al., arXiv 1909.11299).

    .. math::  \Phi = \frac{(1 - M) \odot u + M \odot w - p\,u}{1 - p} = u + \frac{M}{1 - p} \odot (w - u), \qquad
        M \sim \mathrm{Bernoulli}(1 - p), \quad \mathrm{E}\,\Phi = w

    for the weights of linear layers, and raw matrices of attention, that are pretrained; biases, normalisations,
    embeddings and the new head stay. The gradient of :math:`w` is the exact one, with its factor :math:`1 / (1 - p)`,
    which the published program leaves out. :math:`M` is drawn anew for every optimizer step and is the same for all
    examples, passes and micro-batches of it. In eval mode the model computes with :math:`w`. As published, mixing takes
    the place of the backbone's dropout.

    Attributes:
        anchor: By name of the parameter: its pretrained value u.
        rate: Probability p that a weight is replaced; 0.7, 0.8 and 0.9 in the paper.
        granularity: What is replaced at once: all weights of an input of a layer (input, as published), or every weight
            by itself (element).
        keep_dropout: Leave the dropout of the model on.
        seed: Of the draws.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "mixout"
    excludes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("bitfit", "lora", "prefix-tuning", "prompt-tuning"), _FROZEN),
        "dps-mix": SAME_MATRICES,
        "weights-mixup": SAME_MATRICES,
    }

    anchor: Mapping[str, Tensor]
    rate: float = 0.7
    granularity: Granularity = "input"
    keep_dropout: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is a probability, at least 0 and at most 1; got {self.rate:g}.")
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity must be 'input' or 'element', got {self.granularity!r}.")

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Mix the weights in training for the length of the block.

        Raises:
            ValueError: If the anchor does not fit, or there is nothing to mix.
        """
        targets = anchored(model, self.anchor)
        axes = {name: axis for name, axis in weight_matrices(model).items() if name in targets}
        if not axes:
            raise ValueError(
                f"Mixout mixes pretrained matrices that are trained, but this {type(model).__name__} has none; take "
                "another method."
            )
        mixing = _Mixing(self, {name: targets[name] for name in axes}, axes)
        sites = [] if self.keep_dropout else dropout_sites(model)
        functions: dict[str, Callable[[nn.Parameter], Tensor]] = {
            name: partial(mixing.mixed, name, model.get_submodule(name.rpartition(".")[0])) for name in axes
        }
        with (
            rates_set(sites, [0.0] * len(sites)),
            reparametrized(model, functions) if self.rate else nullcontext(),
            after_steps(optimizer, mixing.advance),
        ):
            yield mixing


class _Mixing(Applied):
    """The draws of one step. Every matrix has its own seed, so that the number of the step is all there is to keep."""

    def __init__(self, mixout: Mixout, targets: Mapping[str, Tensor], axes: Mapping[str, int]) -> None:
        self._mixout, self._targets, self._axes = mixout, targets, axes
        self._go_to(0)

    def mixed(self, name: str, module: nn.Module, weight: nn.Parameter) -> Tensor:
        """What a module computes with."""
        if not module.training:
            return weight
        return torch.addcmul(self._targets[name], self._factor(name), weight - self._targets[name])

    def _factor(self, name: str) -> Tensor:
        """M / (1 - p), in a shape that broadcasts to the matrix."""
        if name not in self._drawn:
            target, keep = self._targets[name], 1 - self._mixout.rate
            whole = self._mixout.granularity == "element"
            shape = [n if whole or axis == self._axes[name] else 1 for axis, n in enumerate(target.shape)]
            seed = int(storage.digest(f"{self._mixout.seed} {self._step} {name}"), 16)
            generator = torch.Generator(target.device).manual_seed(seed)
            mask = torch.empty(shape, dtype=target.dtype, device=target.device).bernoulli_(keep, generator=generator)
            self._drawn[name] = mask / (keep or 1.0)
        return self._drawn[name]

    def advance(self) -> None:
        """Draw for the next step."""
        self._go_to(self._step + 1)

    def _go_to(self, step: int) -> None:
        self._step, self._drawn = step, {}

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self._step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._go_to(int(state["step"]))
