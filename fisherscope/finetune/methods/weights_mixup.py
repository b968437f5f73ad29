"""Attention-guided weights mixup: trained weights mixed with the pretrained ones, by shares that are searched for."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ... import distributed
from ...models import backbone_prefix, device_of, measuring
from ...objectives import Batch, predict
from ..bilevel import hypergradient, set_values
from ..parts import SAME_MATRICES, is_in_numbered_layer, reparametrized, weight_matrices
from ..regularizer import Applied, Regularizer

if TYPE_CHECKING:
    from ..run import Run

logger = logging.getLogger(__name__)

Factors = tuple[Tensor, Tensor]
Form = Literal["convex", "published"]

_MOVED = "its search moves all weights, and the other keeps most of them as they were"

SPREAD = 0.005
"""Standard deviation of the factors around 1, before they are searched for."""
TRAIN_SHARE = 0.8
"""Of the examples that the search trains weights on; it trains the shares on the others."""


@dataclass(frozen=True)
class WeightsMixup(Regularizer):
    r"""Weights mixed with the pretrained ones, by shares of rank 1 that stay as they are during the training.

    .. math:: \hat W = \alpha \odot W + (1 - \alpha) \odot W_0, \qquad \alpha = a b, \quad a, b \in [0, 1].

    :math:`a` has one number for every output of a matrix and :math:`b` one for every input; :math:`W_0` is the matrix
    before the search. It is the weight of a linear layer, or a raw parameter of two axes or more, in the numbered
    layers of the backbone or in its pooler. The model computes with :math:`\hat W` in training and eval mode, with the
    biases of :math:`W`. On leaving the block :math:`\hat W` is written into :math:`W`, so that the plain model computes
    the same; checkpoints within it hold :math:`W` itself.

    The published program runs :math:`\hat W = a b \odot W + (1 - a)(1 - b) \odot W_0` in place of the formula of the
    paper; these shares do not add up to 1.

    Source: *Attention-guided weights mixup*, arXiv 2403.12918.

    Attributes:
        factors: By name of the matrix: a and b, each in a shape that broadcasts to it.
        anchor: By name of the matrix: the pretrained one.
        form: Whether the shares add up to 1 (convex) or are those of the published program.

    Raises:
        ValueError: If the form is unknown, factors are outside [0, 1], or factors and anchor do not fit each other.
    """

    name: ClassVar[str] = "weights-mixup"
    order: ClassVar[int] = 1  # its search changes the weights, which are the anchors of others
    excludes: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("bitfit", "fish-mask", "fixed-mask", "random-mask", "top-k-layers"), _MOVED),
        "dps-mix": SAME_MATRICES,
    }

    factors: Mapping[str, Factors]
    anchor: Mapping[str, Tensor]
    form: Form = "convex"

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        _check_form(self.form)
        if self.factors.keys() != self.anchor.keys():
            odd = min(self.factors.keys() ^ self.anchor.keys())
            raise ValueError(f"factors and anchor must be for the same matrices, but only one of them has '{odd}'.")
        for name, (a, b) in self.factors.items():
            if not all(bool(((f >= 0) & (f <= 1)).all()) for f in (a, b)):
                raise ValueError(f"Factors must be in [0, 1], but one of '{name}' is not; clamp them.")
            if (a * b).shape != self.anchor[name].shape:
                raise ValueError(
                    f"The factors of '{name}' make shares of shape {list((a * b).shape)}, but it has shape "
                    f"{list(self.anchor[name].shape)}; give each the shape of the matrix with axes of length 1."
                )

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Compute with the mixed weights; leaving the block writes them into the model.

        Raises:
            ValueError: If the model lacks a matrix, or has it in another shape, or another method changes it.
        """
        del optimizer
        parameters = dict(model.named_parameters())
        for name, tensor in self.anchor.items():
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ValueError(
                    f"The model has no matrix '{name}' of shape {list(tensor.shape)}; search again, for this model."
                )
        mixture = _Mixture({name: parameters[name] for name in self.anchor}, self)
        functions = mixture.functions()
        with reparametrized(model, functions):
            try:
                yield mixture
            finally:
                with torch.no_grad():
                    for name, function in functions.items():
                        parameters[name].copy_(function(parameters[name]))

    @classmethod
    def for_run(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        run: "Run",
        *,
        form: Form = "convex",
        splits: int = 5,
        search_epochs: float = 3.0,
        alpha_learning_rate: float = 2e-3,
    ) -> "WeightsMixup":
        """Search for the shares on the training examples; the weights that were found with them go into the model.

        Args:
            run: The run.
            form: As above.
            splits: Random splits of the examples to search on; weights and factors are averaged over them.
            search_epochs: Passes over the training part of every split.
            alpha_learning_rate: Of the factors.

        Raises:
            ValueError: If a setting is out of range, or there are too few examples or no matrix to mix.
        """
        factors, anchor = search(
            run, form=form, splits=splits, search_epochs=search_epochs, alpha_learning_rate=alpha_learning_rate
        )
        return cls(factors, anchor, form)


class _Mixture(Applied):
    """The factors and pretrained weights of the matrices of a model."""

    def __init__(self, weights: Mapping[str, nn.Parameter], mixup: WeightsMixup) -> None:
        self.weights = weights
        self.form: Form = mixup.form
        self.take(mixup.factors, mixup.anchor)

    def take(self, factors: Mapping[str, Factors], anchor: Mapping[str, Tensor]) -> None:
        """Keep copies where the weights are."""
        self.factors = {name: _like(w, *factors[name]) for name, w in self.weights.items()}
        self.anchor = {name: _like(w, anchor[name])[0] for name, w in self.weights.items()}
        self.plain = {name for name, pair in self.factors.items() if all(bool((f == 1).all()) for f in pair)}

    def functions(self) -> dict[str, Callable[[nn.Parameter], Tensor]]:
        """What the model computes with, by name of the matrix."""
        return {name: partial(self.mixed, name) for name in self.weights}

    def mixed(self, name: str, weight: nn.Parameter) -> Tensor:
        """The mixed weight; the weight itself where all shares are 1."""
        a, b = self.factors[name]
        return weight if name in self.plain else mixed(weight, self.anchor[name], a, b, self.form)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"anchor.{name}": tensor for name, tensor in self.anchor.items()}
        for name, (a, b) in self.factors.items():
            state |= {f"a.{name}": a, f"b.{name}": b}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        factors = {name: (state[f"a.{name}"], state[f"b.{name}"]) for name in self.weights}
        self.take(factors, {name: state[f"anchor.{name}"] for name in self.weights})


def _like(weight: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().to(weight.device, weight.dtype, copy=True) for t in tensors)


def mixed(weight: Tensor, anchor: Tensor, a: Tensor, b: Tensor, form: Form) -> Tensor:
    """The weight that is computed with; exactly the weight where a = b = 1 and the anchor where a = b = 0."""
    if form == "convex":
        return torch.lerp(anchor, weight, a * b)
    return a * b * weight + (1 - a) * (1 - b) * anchor


def mixed_matrices(model: nn.Module) -> dict[str, int]:
    """The matrices that are mixed: name to the axis of the inputs."""
    prefix = backbone_prefix(model)
    return {
        name: axis
        for name, axis in weight_matrices(model).items()
        if (name.startswith(prefix) and is_in_numbered_layer(name)) or "pooler" in name.split(".")
    }


def initial_factors(weight: Tensor, axis: int, generator: np.random.Generator) -> Factors:
    """Normal numbers around 1 with standard deviation 0.005, those above 1 set to 1.

    Args:
        weight: The matrix.
        axis: Of its inputs.
        generator: What they are drawn from.

    Returns:
        For the outputs and for the inputs, in shapes that broadcast to the matrix.
    """
    shapes = [[size if (i == axis) == inputs else 1 for i, size in enumerate(weight.shape)] for inputs in (False, True)]
    drawn = [torch.from_numpy(1 + SPREAD * generator.standard_normal(shape)).clamp(0, 1) for shape in shapes]
    a, b = _like(weight, *drawn)
    return a, b


def search(
    run: "Run", *, form: Form, splits: int, search_epochs: float, alpha_learning_rate: float
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    r"""Find the factors of a run by bilevel training; the model gets the weights that were found with them.

    For each of several random splits, 80 % to 20 %, that start from the same weights and new factors: for every batch
    of the larger part, first a step of AdamW for the factors, by the gradient of the loss on a batch of the smaller
    part after a step of gradient descent on this one (:func:`fisherscope.finetune.bilevel.hypergradient`), and clamped
    to [0, 1]; then a step of AdamW for the weights, as the run trains them, at a constant rate. Weights and factors are
    averaged over the splits. The model's dropout is on, and the same in all passes of a step.

    Args:
        run: The run; ``learning_rate``, ``weight_decay``, ``max_grad_norm`` and ``batch_size`` are those of its
            settings.
        form: Of the mixture.
        splits: How many.
        search_epochs: Passes over the larger part of every split.
        alpha_learning_rate: Of the factors.

    Returns:
        The factors, and the matrices as they were, both by name.

    Raises:
        ValueError: If a setting is out of range, or there are too few examples or no matrix to mix.
    """
    _check_form(form)
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}.")
    for name, value in (("search_epochs", search_epochs), ("alpha_learning_rate", alpha_learning_rate)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}.")
    axes, parameters = mixed_matrices(run.model), dict(run.model.named_parameters())
    if not axes:
        raise ValueError(f"{type(run.model).__name__} has no matrix in a numbered layer that could be mixed.")
    anchor = {name: parameters[name].detach().clone() for name in axes}
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]
    device = device_of(run.model)
    found, total, result = {}, [torch.zeros_like(value) for value in start], start
    with measuring(run.model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        run.model.train()
        try:
            for number in range(splits):
                set_values(trained, start)
                draw = np.random.default_rng((run.seed, number))
                pairs = {name: initial_factors(parameters[name], axis, draw) for name, axis in axes.items()}
                _Search(run, anchor, pairs, form, alpha_learning_rate, draw).train(search_epochs)
                shares = float(np.mean([(a * b).mean().item() for a, b in pairs.values()]))
                logger.info("Searched on split %d of %d: the mean share of W is %.5f.", number + 1, splits, shares)
                found[number] = pairs
                for kept, parameter in zip(total, trained, strict=True):
                    kept.add_(parameter.detach(), alpha=1 / splits)
            result = total
        finally:
            set_values(trained, result)
    averaged = {name: tuple(_mean([pairs[name][i] for pairs in found.values()]) for i in (0, 1)) for name in axes}
    return distributed.first_says(averaged), anchor  # pyright: ignore[reportReturnType]


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.detach().cpu() for t in tensors]).mean(0)


class _Search:
    """Bilevel training on one split; the factors are trained in place."""

    def __init__(
        self,
        run: "Run",
        anchor: Mapping[str, Tensor],
        pairs: Mapping[str, Factors],
        form: Form,
        alpha_learning_rate: float,
        draw: np.random.Generator,
    ) -> None:
        self.run, self.draw = run, draw
        self.functions = {
            name: partial(mixed, anchor=anchor[name], a=a, b=b, form=form) for name, (a, b) in pairs.items()
        }
        self.factors = [factor.requires_grad_(True) for pair in pairs.values() for factor in pair]
        self.weights = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        self.learning_rate = float(run.settings.get("learning_rate", 2e-5))
        decay = float(run.settings.get("weight_decay", 0.01))
        groups = [
            {"params": [w for w in self.weights if w.ndim > 1], "weight_decay": decay},
            {"params": [w for w in self.weights if w.ndim < 2], "weight_decay": 0.0},
        ]
        self.lower = AdamW([group for group in groups if group["params"]], lr=self.learning_rate)
        self.upper = AdamW(self.factors, lr=alpha_learning_rate, weight_decay=0.0)

    def train(self, epochs: float) -> None:
        """Take steps on both levels in turn."""
        examples = self.run.batches.num_examples
        order, cut = self.draw.permutation(examples), int(TRAIN_SHARE * examples)
        if not 0 < cut < examples:
            raise ValueError(f"The search needs at least 2 examples for its split, but there are {examples}.")
        training, validation = self.batches(order[:cut]), self.batches(order[cut:])
        steps = max(1, round(epochs * -(-cut // self.batch_size)))
        with reparametrized(self.run.model, self.functions):
            self.lower.zero_grad()  # what the caller has left
            for _ in range(steps):
                self.step(next(training), next(validation))
        for factor in self.factors:
            factor.requires_grad_(False)

    def step(self, training: Batch, validation: Batch) -> None:
        """One on the factors, then one on the weights."""
        seeds = self.draw.integers(2**31, size=2).tolist()
        inner, outer = partial(self.loss, training, seeds[0]), partial(self.loss, validation, seeds[1])
        found = hypergradient(self.weights, self.factors, inner, outer, self.learning_rate)
        for factor, gradient in zip(self.factors, found, strict=True):
            factor.grad = gradient
        self.upper.step()
        with torch.no_grad():
            for factor in self.factors:
                factor.clamp_(0, 1)
        inner().backward(inputs=self.weights)
        if limit := self.run.settings.get("max_grad_norm", 1.0):
            nn.utils.clip_grad_norm_(self.weights, limit)
        self.lower.step()
        self.lower.zero_grad()

    def loss(self, batch: Batch, seed: int) -> Tensor:
        """As the run has it, with the dropout of a seed."""
        torch.manual_seed(seed)
        losses = predict(self.run.model, batch, self.run.objective).losses()
        return losses.total.sum() / losses.count.sum().clamp(min=1)

    @property
    def batch_size(self) -> int:
        """Examples at once."""
        return int(self.run.settings.get("batch_size", self.run.batches.batch_size))

    def batches(self, positions: np.ndarray) -> Iterator[Batch]:
        """Batches of these examples, pass after pass in another order."""
        while True:
            order = self.draw.permutation(positions)
            for start in range(0, len(order), self.batch_size):
                rows = [self.run.batches.examples[i] for i in order[start : start + self.batch_size]]
                yield self.run.batches.collate(rows)


def _check_form(form: str) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}.")
