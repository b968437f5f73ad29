"""SMART: predictions must not change where embeddings move in the worst way, nor move away from an average model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...objectives import Batch, Predictions
from ..parts import after_steps
from ..regularizer import Applied, Regularizer
from ..smoothness import Lookup, OfPasses, Passes, exact_dtype, normal, symmetric_divergence

Scope = Literal["example", "token"]

EARLY = 0.1
"""Share of the steps that have the early momentum."""


@dataclass(frozen=True)
class SMART(OfPasses):
    r"""Adversarial smoothness and Bregman proximal steps.

    .. math::  \ell = \ell_{\text{task}}
               + \lambda \max_{\|\tilde x - x\|_\infty \le \epsilon} J(f(\tilde x; \theta), f(x; \theta))
               + \mu\, J(f(x; \theta), f(x; \tilde\theta)), \qquad
               \tilde\theta \leftarrow \beta \tilde\theta + (1 - \beta)\, \theta \text{ after every step}

    for every example, with :math:`x` its word embeddings and :math:`J` the sum of both Kullback-Leibler divergences,
    or the squared difference for regression (Jiang et al. 2020, arXiv 1911.03437, Algorithm 1 with S = 1). The maximum
    is sought from :math:`x + \nu`, :math:`\nu \sim N(0, \sigma^2)`, by steps

    .. math::  \tilde x \leftarrow \Pi_{\|\tilde x - x\|_\infty \le \epsilon}
               \big(\tilde x + \eta\, g / \|g\|_\infty\big), \qquad g = \partial J / \partial \tilde x

    and :math:`\tilde x` is a constant then. Padding does not move. All passes have the dropout of the pass that the
    loss is of, so that both terms are 0 where nothing moved. The average :math:`\tilde\theta` begins as the model
    and is kept in float32. A step takes about three times as long with one ascent step. With precision bfloat16 or
    float16 the default noise is lost in rounding.

    Attributes:
        total_steps: Optimizer steps of the training.
        seed: Of the noise that the ascent begins with.
        adversarial_weight: Of the adversarial term, lambda; the paper takes 1, 3 or 5; 0 leaves it out.
        bregman_weight: Of the distance to the average model, mu; 0 leaves it out.
        eps: The most that an entry of a word embedding moves.
        sigma: Standard deviation of the noise that the ascent begins with.
        ascent_size: Size of an ascent step, eta.
        ascent_steps: Ascent steps for every batch.
        norm_scope: What has a largest gradient of its own, an example or every token.
        momentum: Of the average model, beta; with 0 it is the model itself, and the Bregman term is 0.
        early_momentum: The same in the first tenth of the steps.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "smart"

    total_steps: int
    adversarial_weight: float = 1.0
    bregman_weight: float = 1.0
    eps: float = 1e-5
    sigma: float = 1e-5
    ascent_size: float = 1e-3
    ascent_steps: int = 1
    norm_scope: Scope = "example"
    momentum: float = 0.999
    early_momentum: float = 0.99

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        for name in ("adversarial_weight", "bregman_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name):g}.")
        for name in ("eps", "ascent_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name):g}.")
        if not self.sigma > 0:
            raise ValueError(
                f"sigma must be above 0, as the divergence has no gradient where nothing moved; got {self.sigma:g}."
            )
        for name in ("total_steps", "ascent_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("momentum", "early_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be at least 0 and at most 1, got {getattr(self, name):g}.")
        if self.norm_scope not in ("example", "token"):
            raise ValueError(f"norm_scope must be 'example' or 'token', got {self.norm_scope!r}.")

    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager[Applied]:
        """Follow the passes of the model, and average its parameters over the steps; with both weights 0 do nothing."""
        if not self.adversarial_weight and not self.bregman_weight:
            return Regularizer.applied_to(self, model, optimizer)
        return self._averaging(model, optimizer)

    @contextmanager
    def _averaging(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        average = _Average(self, model)
        with self.following(model, average), after_steps(optimizer, average.update):
            yield average

    def momentum_at(self, step: int) -> float:
        """The momentum of the average after a step, counted from 1."""
        return self.early_momentum if step <= EARLY * self.total_steps else self.momentum

    def penalty(self, model: nn.Module, batch: Batch, predictions: Predictions) -> Tensor | None:
        """The weighted terms."""
        terms = []
        if self.adversarial_weight:
            passes = self.passes_of(model)
            worst = self.worst(passes, batch, predictions)
            moved, _ = passes.shifted(batch, lambda number, _: worst[number], predictions)
            terms.append(self.adversarial_weight * symmetric_divergence(predictions, moved))
        if self.bregman_weight:
            average = self.passes_of(model)
            assert isinstance(average, _Average)
            with torch.no_grad(), average.in_place():
                target = average.again(batch)
            terms.append(self.bregman_weight * symmetric_divergence(predictions, target))
        return sum(terms[1:], terms[0]) if terms else None

    def worst(self, passes: Passes, batch: Batch, predictions: Predictions) -> list[Tensor]:
        """What word embeddings are moved by after the ascent, look-up by look-up."""
        clean = replace(predictions, outputs=predictions.outputs.detach())
        generator = passes.generator()
        shifts: list[Tensor] = []

        def current(number: int, lookup: Lookup) -> Tensor:
            if number == len(shifts):
                shifts.append(self.sigma * normal(lookup.embeddings, generator) * lookup.tokens[..., None])
            return shifts[number].requires_grad_()

        for _ in range(self.ascent_steps):
            moved, lookups = passes.shifted(batch, current, predictions)
            # Gradients are about as small as eps; divided by it they are far from where half precision ends.
            height = symmetric_divergence(clean, moved).sum() / self.eps
            gradients = torch.autograd.grad(height, shifts, materialize_grads=True)
            with torch.no_grad():
                masked = [g * lookup.tokens[..., None] for g, lookup in zip(gradients, lookups, strict=True)]
                steps = _normalised(masked, lookups, self.norm_scope)
                shifts[:] = [
                    (shift + self.ascent_size * step).clamp(-self.eps, self.eps)
                    for shift, step in zip(shifts, steps, strict=True)
                ]
        return shifts


def _normalised(gradients: Sequence[Tensor], lookups: Sequence[Lookup], scope: Scope) -> list[Tensor]:
    """Gradients by the largest entry of every example, over all its look-ups, or of every token."""
    if scope == "token":
        sizes = [g.abs().amax(-1, keepdim=True) for g in gradients]
    else:
        of_examples = [g.abs().amax((1 - lookup.axis, 2)) for g, lookup in zip(gradients, lookups, strict=True)]
        largest = torch.stack(of_examples).amax(0)[:, None, None]
        sizes = [largest.transpose(0, lookup.axis) for lookup in lookups]
    return [g / size.clamp(min=torch.finfo(g.dtype).tiny) for g, size in zip(gradients, sizes, strict=True)]


class _Average(Passes):
    """The average model."""

    def __init__(self, settings: SMART, model: nn.Module) -> None:
        super().__init__(model, settings.name, settings.seed)
        self.settings, self.steps = settings, 0
        self.parameters = dict(model.named_parameters()) if settings.bregman_weight else {}
        self.values = {n: p.detach().to(exact_dtype(p), copy=True) for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model, after a step."""
        self.steps += 1
        share = 1 - self.settings.momentum_at(self.steps)
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter.to(self.values[name].dtype), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the values of the average; for passes without gradients."""
        kept = {name: parameter.data for name, parameter in self.parameters.items()}
        torch.clear_autocast_cache()  # it finds the model's own values by the identity of the parameters
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.values[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = kept[name]
            torch.clear_autocast_cache()

    def state_dict(self) -> dict[str, Tensor]:
        counted = {**super().state_dict(), "steps": torch.tensor(self.steps)}
        return {**counted, **{f"average.{name}": value for name, value in self.values.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.steps = int(state["steps"])
        for name, value in self.values.items():
            value.copy_(state[f"average.{name}"])
