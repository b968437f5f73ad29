"""Gradual unfreezing, with a slanted triangular schedule."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..._typing import Bool
from ..parts import around_steps, gradients_masked, innermost, rates_scaled
from ..regularizer import Applied, Regularizer
from .layerwise_rates import check_decay, depths


@dataclass(frozen=True)
class GradualUnfreezing(Regularizer):
    r"""Trains the head first, then one layer more after the other, from the top down (ULMFiT, arXiv 1801.06146).

    .. math::  \eta_t = \eta\, \frac{1 + q_t (r - 1)}{r}, \qquad
        q_t = \begin{cases} t / c & t < c \\ 1 - (t - c) / (T - c) & \text{else} \end{cases}, \quad
        c = \lfloor T f \rfloor

    The groups are the head with poolers, every layer, and the embeddings, counted as in ``top-k-layers``. The schedule
    is run through once for every group that is added, and once for the rest of the training; it takes the place of
    the optimizer's own. Frozen parameters are neither decayed nor counted in the norm of the gradients.

    Attributes:
        total_steps: Optimizer steps of the training.
        share: Part of the training in which groups are added, one after equally many steps; published is one after
            every epoch, which is (groups - 1) / epochs. 0 trains all from the beginning.
        ratio: How much lower the lowest rate is than the highest; 1 is a constant rate.
        cut: Part of the steps f in which the rate rises.
        decay: Factor between the rate of a layer and the one above it; published is 0.38, for three layers.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "gradual-unfreezing"
    order: ClassVar[int] = -1
    excludes: ClassVar[Mapping[str, str]] = {"vanilla-undebiased": "it needs parameters that took equally many steps"}

    total_steps: int
    share: float = 0.5
    ratio: float = 32.0
    cut: float = 0.1
    decay: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        if not self.share >= 0:
            raise ValueError(f"share must be at least 0, got {self.share:g}.")
        if not self.ratio >= 1:
            raise ValueError(f"ratio must be at least 1, got {self.ratio:g}.")
        if not 0 <= self.cut < 1:
            raise ValueError(f"cut must be at least 0 and below 1, got {self.cut:g}.")
        check_decay(self.decay)

    def stage(self, step: int, groups: int) -> tuple[int, float]:
        """How many groups are trained, and the factor of the rate.

        Args:
            step: Steps that were taken before.
            groups: How many there are.
        """
        starts = [math.floor(i * self.share * self.total_steps / max(groups - 1, 1)) for i in range(groups)]
        trained = max(i for i, start in enumerate(starts) if start <= step) + 1
        end = self.total_steps if trained == groups else min(starts[trained], self.total_steps)
        begin = starts[trained - 1]
        return trained, slanted_triangle(step - begin, end - begin, self.cut, self.ratio)

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Freeze and unfreeze for the length of the block.

        Raises:
            ValueError: If the model has no numbered layers.
        """
        parameters = dict(model.named_parameters())
        below = {parameters[name]: depth for name, depth in depths(model).items()}
        state = _Unfreezing(self, below)

        @contextmanager
        def step() -> Iterator[None]:
            groups = innermost(optimizer).param_groups
            before = [group["lr"] for group in groups]
            try:
                for group in groups:
                    group["lr"] = group.get("initial_lr", group["lr"]) * state.factor
                for parameter in state.frozen:
                    parameter.grad = None  # of 0, it would be decayed
                yield
            finally:
                for group, rate in zip(groups, before, strict=True):
                    group["lr"] = rate
            state.go_to(state.step + 1)

        scaled = rates_scaled(optimizer, {p: self.decay**depth for p, depth in below.items()})
        with gradients_masked(state.frozen), around_steps(optimizer, step), scaled:
            yield state


class _Unfreezing(Applied):
    """What the next step trains, and how fast."""

    def __init__(self, method: GradualUnfreezing, below: Mapping[nn.Parameter, int]) -> None:
        self._method, self._below = method, below
        self.frozen: dict[nn.Parameter, Bool[Tensor, ""]] = {
            p: torch.tensor(False, device=p.device) for p, depth in below.items() if depth
        }
        self.go_to(0)

    def go_to(self, step: int) -> None:
        """Prepare for a step; groups are never frozen again."""
        self.step = step
        trained, self.factor = self._method.stage(step, max(self._below.values()) + 1)
        for parameter in [p for p in self.frozen if self._below[p] < trained]:
            del self.frozen[parameter]

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.go_to(int(state["step"]))


def slanted_triangle(step: int, steps: int, cut: float = 0.1, ratio: float = 32.0) -> float:
    """The factor of the learning rate: it rises from 1 / ratio to 1 in a part of the steps, and falls back.

    Args:
        step: From 0.
        steps: Of the whole schedule.
        cut: Part of the steps in which it rises.
        ratio: Between the highest and the lowest.
    """
    top = math.floor(steps * cut)
    height = step / top if step < top else max(0.0, 1 - (step - top) / max(steps - top, 1))
    return (1 + height * (ratio - 1)) / ratio
