r"""What is estimated: which squared gradients are added up, given what a model predicts for a batch.

Every estimator is a weighted sum of squared gradients. A term :math:`w (\partial \ell / \partial \theta)^2` is the
square of the gradient of :math:`\sqrt{w}\, \ell`, so all of them come down to a few losses per example, each
differentiated on its own, on one forward pass.

Shape names: B examples, L scored tokens of the example that has most, C classes.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .._typing import Float
from ..data.corruption import IGNORED
from ..objectives import GAUSSIAN_VARIANCE, Batch, Predictions
from ..scores import Estimator, Reduction, Unit

PUBLISHED: tuple[Estimator, ...] = ("squared-batch-mean", "absolute-gradient")
"""Variants of published code that are no Fisher information, for comparison."""

MOST_EXACT_TERMS = 4096


@dataclass(frozen=True)
class Estimand:
    r"""Which diagonal is estimated.

    With :math:`s_{nt} = \partial \log p(y_{nt}) / \partial\theta` of scored token t of example n, :math:`T_n` tokens:

    - unit ``"sequence"``: :math:`\frac1N \sum_n (\frac1{T_n} \sum_t s_{nt})^2`, or without :math:`1/T_n` for the
      reduction ``"sum"``.
    - unit ``"token"``: :math:`\sum_{nt} s_{nt}^2 / \sum_n T_n`.
    - ``"empirical"``: y from the data. ``"sampled"``: y drawn from the model, the mean over draws; unbiased for the
      Fisher information. ``"exact"``: the expectation over y (Kunstner et al., arXiv 1905.12558). Tokens are
      independent given the model's inputs (teacher forcing), so the terms between different tokens have expectation
      0. Regression is a Gaussian with variance 1/2.
    - ``"squared-batch-mean"``: :math:`\frac1{N_b} \sum_b (\frac1B \sum_{n \in b} g_n)^2`, the squared gradient of
      every batch's mean loss (Child-Tuning, arXiv 2109.05687, without its clipping and dropout). It shrinks with the
      batch size.
    - ``"absolute-gradient"``: :math:`\frac1N \sum_n |g_n|` (FISH mask, arXiv 2111.09839, the default of its code).

    Attributes:
        estimator: Where the labels come from, or the name of a published variant.
        unit: What one term of the sum is.
        reduction: How the scored tokens of a sequence make up its loss; for the unit ``"token"`` it changes nothing.
        draws: Label draws per example of ``"sampled"``.
        tokens: For the unit ``"token"``: how many random tokens per example, weighted so that the expectation is that
            of all; None takes all.
        seed: Of the draws; with an example's content it decides them, whatever batch the example is in.

    Raises:
        ValueError: If a setting is unknown or does not fit the others.
    """

    estimator: Estimator = "empirical"
    unit: Unit = "sequence"
    reduction: Reduction = "mean"
    draws: int = 1
    tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        for name, known in (("estimator", Estimator), ("unit", Unit), ("reduction", Reduction)):
            if getattr(self, name) not in get_args(known):
                options = " or ".join(map(repr, get_args(known)))
                raise ValueError(f"{name} must be {options}, got {getattr(self, name)!r}.")
        for name, value in (("draws", self.draws), ("tokens", self.tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.draws > 1 and self.estimator != "sampled":
            raise ValueError(f"Several draws need the estimator sampled, but it is {self.estimator}.")
        if self.tokens is not None and self.unit != "token":
            raise ValueError(f"A number of tokens needs the unit token, but it is {self.unit}.")
        if self.estimator in PUBLISHED and self.unit != "sequence":
            raise ValueError(f"The estimator {self.estimator} is only for the unit sequence, got {self.unit!r}.")

    def num_units(self, predictions: Predictions) -> int:
        """How many terms of the sum a batch stands for."""
        count = predictions.count
        return int(count.sum()) if self.unit == "token" else int((count > 0).sum())

    def terms(self, predictions: Predictions, batch: Batch) -> Iterator[Float[Tensor, "examples"]]:
        """Losses whose per-example gradients are to be squared and added.

        Raises:
            ValueError: If the loss of an example is not finite, or the estimator does not apply.
        """
        for losses in self._losses(predictions, batch):
            if self.unit == "token":
                yield from self._single_tokens(losses, predictions, batch)
            else:
                yield self._sequence(losses, predictions)

    def _sequence(self, losses: Tensor, predictions: Predictions) -> Tensor:
        total = losses.sum(1)
        return total / predictions.count.clamp(min=1) if self.reduction == "mean" else total

    def _single_tokens(self, losses: Tensor, predictions: Predictions, batch: Batch) -> Iterator[Tensor]:
        count = predictions.count
        if self.tokens is None or self.tokens >= losses.shape[1]:
            yield from losses.unbind(1)
            return
        chosen = torch.zeros(len(losses), self.tokens, dtype=torch.long)
        for n, (generator, available) in enumerate(zip(self._generators(batch, 1), count.tolist(), strict=True)):
            order = torch.randperm(max(available, 1), generator=generator)[: self.tokens]
            chosen[n, : len(order)] = order
        taken = count.clamp(max=self.tokens)
        weight = (count / taken.clamp(min=1)).sqrt()
        for k in range(self.tokens):
            picked = losses.gather(1, chosen[:, k : k + 1].to(losses.device))[:, 0]
            yield picked * torch.where(k < taken, weight, torch.zeros_like(weight))

    def _losses(self, predictions: Predictions, batch: Batch) -> Iterator[Float[Tensor, "examples tokens"]]:
        """Token losses under the labels that the estimator takes, with the square root of their weight."""
        match self.estimator:
            case "sampled":
                for uniforms in self._uniforms(predictions, batch):
                    yield predictions.losses_for(predictions.drawn(uniforms)) / math.sqrt(self.draws)
            case "exact":
                yield from self._expectation(predictions)
            case "empirical" | "squared-batch-mean" | "absolute-gradient":  # which differ in their engines
                yield predictions.token_losses
            case _:
                assert_never(self.estimator)

    def _expectation(self, predictions: Predictions) -> Iterator[Tensor]:
        if predictions.kind == "gaussian":
            yield predictions.outputs / math.sqrt(GAUSSIAN_VARIANCE)
            return
        if predictions.kind == "losses":
            raise ValueError(
                "The exact expectation needs a named objective, but the losses come from a function; take the "
                "estimator empirical."
            )
        tokens, classes = predictions.outputs.shape[1:]
        single = tokens == 1 or self.unit == "token"
        number = classes * tokens
        if number > MOST_EXACT_TERMS:
            raise ValueError(
                "The exact expectation needs one backward pass per class and scored token, at most "
                f"{MOST_EXACT_TERMS}, but here are {classes} classes and {tokens} tokens; take the estimator sampled."
            )
        roots = predictions.outputs.detach().softmax(-1).sqrt()
        for label in range(classes):
            labels = torch.where(predictions.labels == IGNORED, IGNORED, label)
            weight = roots[..., label]
            losses = torch.where(weight > 0, predictions.losses_for(labels) * weight, 0.0)  # not infinity times 0
            if single:
                yield losses
            else:  # one token at a time: the terms between tokens have expectation 0
                yield from (F.one_hot(torch.tensor(t), tokens).to(losses) * losses for t in range(tokens))

    def _uniforms(self, predictions: Predictions, batch: Batch) -> Iterator[Float[Tensor, "examples tokens"]]:
        size = predictions.outputs.shape[:2]
        table = torch.zeros(self.draws, *size, dtype=torch.float64)
        for n, (generator, count) in enumerate(
            zip(self._generators(batch, 0), predictions.count.tolist(), strict=True)
        ):
            table[:, n, :count] = torch.rand(self.draws, count, generator=generator, dtype=torch.float64)
        yield from table.to(predictions.outputs.device)

    def _generators(self, batch: Batch, purpose: int) -> Iterator[torch.Generator]:
        for n in range(len(next(iter(batch.values())))):
            digest = hashlib.sha256(f"{self.seed} {purpose}".encode())
            for part in _content(batch, n):
                digest.update(part)
            yield torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "little") >> 1)


def _content(batch: Batch, n: int) -> Iterator[bytes]:
    """What one example is, without its padding."""
    mask = batch.get("attention_mask")
    for name in sorted(batch):
        row = batch[name][n].detach().cpu()
        if name == "labels" and row.ndim:
            row = row[row != IGNORED]
        elif mask is not None and row.shape == mask[n].shape:
            row = row[mask[n].cpu().bool()]
        yield name.encode() + row.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def check_finite(predictions: Predictions, first: int = 0) -> None:
    """Refuse what no gradient can come from.

    Raises:
        ValueError: Naming the first example whose loss is not finite.
    """
    values = predictions.token_losses.detach().sum(1)
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise ValueError(
            f"Every example needs a finite loss, but example {first + bad} of a batch has {values[bad].item()}; "
            "check the model's weights and the labels."
        )
