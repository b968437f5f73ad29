r"""Dynamic parameter selection: two stages that take turns, one that scores entries and one that trains the best.

A stage is :math:`u = \max(1, \lfloor\mathrm{steps} \cdot \mathrm{ratio}\rfloor)` optimizer steps long. With
:math:`g_t` the gradient at step :math:`t` (summed over micro-batches and ranks, unscaled, clipped), the first stage
adds up :math:`\sum_t g_t^2`, from 0 every time; in the second only the :math:`\lceil n (1 - p) \rceil` of the
:math:`n` entries of every matrix that scored highest get a gradient. The optimizer goes on over both: its momentum and
decay move the other entries in the second stage, too.

The matrices are the weights of all linear layers, the head's included; biases, norms and embeddings train as ever.

Source: Zhang et al., *Fine-Tuning Pre-Trained Language Models Effectively by Optimizing Subnetworks Adaptively*,
NeurIPS 2022, arXiv 2211.01642; what the published code does where the paper leaves it open. It runs with the model's
own dropout at 0, which nothing here changes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..._typing import Bool
from ...masks import highest
from ..parts import after_steps, before_steps, gradients_masked, reparametrized, weight_matrices
from ..regularizer import Applied, Regularizer

PENALIZED_FROM = 50
"""Stages of so many steps or more give entries that were drawn often a lower score."""


@dataclass(frozen=True)
class DPSDense(Regularizer):
    """DPS Dense: the first stage trains every entry, the second those whose squared gradients added up to most.

    Attributes:
        total_steps: Optimizer steps of the training.
        drop: Share of the entries of every matrix that the second stage leaves out.
        update_ratio: Length of a stage, as a share of all steps.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "dps-dense"
    excludes: ClassVar[Mapping[str, str]] = {"dps-mix": "both choose what the second stage trains"}

    total_steps: int
    drop: float = 0.3
    update_ratio: float = 0.05

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        _check(self.total_steps, self.drop, self.update_ratio)

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Mask gradients in the second stages.

        Raises:
            ValueError: If the model has no matrix to train.
        """
        weights = _weights(model)
        stages = _Stages(weights, stage_length(self.total_steps, self.update_ratio), self.drop)
        masks: dict[nn.Parameter, Tensor] = {p: torch.ones((), dtype=torch.bool) for p in weights.values()}
        with gradients_masked(masks):
            masks.clear()
            stages.masks = masks
            with before_steps(optimizer, stages.add_up), after_steps(optimizer, stages.advance):
                yield stages


@dataclass(frozen=True)
class DPSMix(Regularizer):
    r"""DPS Mix: as DPS Dense, and the entries that do not train are those of an earlier model in the forward pass.

    In training mode a matrix :math:`W` is used as

    .. math:: \hat W = \frac{(1 - N) T + N W - p T}{1 - p}, \qquad
              \frac{\partial L}{\partial W} := N \frac{\partial L}{\partial \hat W}.

    In the first stage :math:`T` is :math:`W` before the training, and :math:`N` is drawn for every optimizer step: 1
    with probability :math:`1 - p`, one number for every input column; :math:`\hat W` has the mean :math:`W`. In the
    second, :math:`T` is :math:`W` at its start and :math:`N` the mask of the highest scores: squared gradients added up
    and divided by how often the column was drawn (:math:`f`), times :math:`e^{-f/u}` if :math:`u \ge 50`.

    Attributes:
        total_steps: Optimizer steps of the training.
        seed: Of the draws.
        drop: Share of the input columns that the first stage mixes, and of the entries that the second leaves out.
        update_ratio: Length of a stage, as a share of all steps.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "dps-mix"

    total_steps: int
    seed: int
    drop: float = 0.3
    update_ratio: float = 0.05

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        _check(self.total_steps, self.drop, self.update_ratio)

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Compute with mixed weights in training mode, in eval mode with the plain ones.

        Raises:
            ValueError: If the model has no matrix to train, or another method changes its weights.
        """
        weights = _weights(model)
        length = stage_length(self.total_steps, self.update_ratio)
        stages = _MixedStages(weights, length, self.drop, self.seed, weight_matrices(model))
        with (
            reparametrized(model, {name: _in_training(model, name, partial(stages.mixed, name)) for name in weights}),
            before_steps(optimizer, stages.add_up),
            after_steps(optimizer, stages.advance),
        ):
            yield stages


def stage_length(total_steps: int, update_ratio: float) -> int:
    """Optimizer steps of a stage; at least 1."""
    return max(1, int(total_steps * update_ratio))


def stage(step: int, length: int) -> int:
    """The stage, 1 or 2, that an optimizer step belongs to; steps are counted from 0."""
    return step // length % 2 + 1


def _check(total_steps: int, drop: float, update_ratio: float) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}.")
    if not 0 <= drop < 1:
        raise ValueError(f"drop is a share of the entries, at least 0 and below 1; got {drop}.")
    if not 0 < update_ratio <= 1:
        raise ValueError(f"update_ratio is a share of the steps, above 0 and at most 1; got {update_ratio}.")


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    weights = {name: model.get_parameter(name) for name in weight_matrices(model)}
    if not weights:
        raise ValueError(f"DPS trains weight matrices, but {type(model).__name__} has none that is trained.")
    return weights


def _in_training(model: nn.Module, name: str, function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    holder = model.get_submodule(name.rpartition(".")[0])
    return lambda parameter: function(parameter) if holder.training else parameter


class _Stages(Applied):
    """Where the two stages stand.

    Attributes:
        weights: The matrices.
        length: Of a stage.
        drop: Share of the entries that is left out.
        step: Optimizer steps done.
        sums: Squared gradients added up, by name; empty but in a first stage.
        masks: What trains, by parameter; empty but in a second stage.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], length: int, drop: float) -> None:
        self.weights, self.length, self.drop = weights, length, drop
        self.step = 0
        self.sums: dict[str, Tensor] = {}
        self.masks: dict[nn.Parameter, Tensor] = {}

    def add_up(self) -> None:
        """Before an optimizer step."""
        if stage(self.step, self.length) == 1:
            for name, weight in self.weights.items():
                if weight.grad is not None:
                    gradient = weight.grad.to(torch.promote_types(weight.dtype, torch.float32))
                    self.sums[name] = self.sums.get(name, 0) + gradient.square()

    def advance(self) -> None:
        """After an optimizer step."""
        self.step += 1
        if self.step % self.length == 0:
            if stage(self.step, self.length) == 2:
                self.begin_second()
            else:
                self.begin_first()

    def begin_second(self) -> None:
        """Choose what trains: a matrix that got no gradient stays out of it."""
        for name in list(self.sums):
            scores = self.score(name, self.sums.pop(name))
            count = math.ceil(round(scores.numel() * (1 - self.drop), 6))  # 10 * (1 - 0.9) is 0.99999999
            self.masks[self.weights[name]] = highest(scores.flatten(), count).view(scores.shape)

    def begin_first(self) -> None:
        """Forget the choice."""
        self.masks.clear()

    def score(self, name: str, total: Tensor) -> Tensor:
        """What the entries of a matrix are ranked by."""
        del name
        return total

    def state_dict(self) -> dict[str, Tensor]:
        masks = {f"masks.{name}": self.masks[p] for name, p in self.weights.items() if p in self.masks}
        return {"step": torch.tensor(self.step), **_prefixed("sums", self.sums), **masks}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.step = int(state["step"])
        self.sums = self.found("sums", state)
        self.masks.clear()
        self.masks.update({self.weights[name]: mask for name, mask in self.found("masks", state).items()})

    def found(self, kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a kind, each on the device of its matrix."""
        return {
            name: state[f"{kind}.{name}"].to(weight.device, copy=True)
            for name, weight in self.weights.items()
            if f"{kind}.{name}" in state
        }


def _prefixed(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": tensor for name, tensor in tensors.items()}


class _MixedStages(_Stages):
    """The same with mixed weights.

    Attributes:
        seed: Of the draws.
        axes: Which axis of a matrix counts its inputs.
        numbers: Of the matrices, for their draws.
        first: The matrices before the training.
        second: The matrices at the start of a second stage; empty but in one.
        drawn: How often every input column trained in this first stage.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], length: int, drop: float, seed: int, axes: Mapping[str, int]
    ) -> None:
        super().__init__(weights, length, drop)
        self.seed, self.axes = seed, axes
        self.numbers = {name: number for number, name in enumerate(weights)}
        self.first = _copies(weights)
        self.second: dict[str, Tensor] = {}
        self.drawn: dict[str, Tensor] = {}

    def mixed(self, name: str, weight: nn.Parameter) -> Tensor:
        """What the forward pass uses."""
        if not self.drop:
            return weight
        if stage(self.step, self.length) == 1:
            return _Mixed.apply(weight, self.first[name], self.draw(name), self.drop)  # pyright: ignore
        if weight not in self.masks:
            return weight
        return _Mixed.apply(weight, self.second[name], self.masks[weight], self.drop)  # pyright: ignore

    def draw(self, name: str) -> Bool[Tensor, "..."]:
        """Which input columns train in this step, the same for all its micro-batches and recomputed layers."""
        weight, axis = self.weights[name], self.axes[name]
        generator = np.random.default_rng((self.seed, self.step, self.numbers[name]))
        kept = torch.from_numpy(generator.random(weight.shape[axis]) >= self.drop)
        shape = [size if a == axis else 1 for a, size in enumerate(weight.shape)]
        return kept.view(shape).to(weight.device, non_blocking=True)

    def add_up(self) -> None:
        super().add_up()
        if stage(self.step, self.length) == 1:
            for name in self.sums:
                self.drawn[name] = self.drawn.get(name, 0) + self.draw(name).int()

    def score(self, name: str, total: Tensor) -> Tensor:
        times = self.drawn[name]
        score = total / times.clamp(min=1)
        return score * torch.exp(-times / self.length) if self.length >= PENALIZED_FROM else score

    def begin_second(self) -> None:
        super().begin_second()
        self.drawn = {}
        self.second = _copies(self.weights) if self.drop else {}

    def begin_first(self) -> None:
        super().begin_first()
        self.second = {}

    def state_dict(self) -> dict[str, Tensor]:
        kinds = {"first": self.first, "second": self.second, "drawn": self.drawn}
        return super().state_dict() | {k: t for kind, found in kinds.items() for k, t in _prefixed(kind, found).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.first, self.second, self.drawn = (self.found(kind, state) for kind in ("first", "second", "drawn"))


def _copies(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


class _Mixed(torch.autograd.Function):
    """The mixed weight, and a gradient that passes where it is mixed in, as it is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, kept: Tensor, drop: float) -> Tensor:
        ctx.save_for_backward(kept)
        # ((1-N) T + N W - p T) / (1-p), so arranged that W = T gives W itself
        return torch.where(kept, weight + (weight - anchor) * (drop / (1 - drop)), anchor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (kept,) = ctx.saved_tensors
        return gradients[0].masked_fill(~kept, 0), None, None, None
