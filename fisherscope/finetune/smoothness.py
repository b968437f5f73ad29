"""What penalties of smoothness are made of: further passes over a batch, noise at the word embeddings, and distances.

A further pass can have the dropout of the pass that the loss is of: it then begins from the same state of torch's
generators. It is compared with that pass itself, at no further cost, and without noise the two agree, whatever the
dropout. With dropout of its own it differs by that, too, which is much more than what small noise does.

Shape names: B examples in a batch.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .. import distributed, storage
from .._typing import Bool, Float
from ..data.corruption import IGNORED
from ..models import device_of, infer_objective, trained_model
from ..objectives import Batch, Predictions, predict
from .regularizer import Applied, Regularizer

_is_further: ContextVar[bool] = ContextVar("_is_further", default=False)


def symmetric_divergence(a: Predictions, b: Predictions) -> Float[Tensor, "examples"]:
    r"""How far two predictions are apart, summed over the scored tokens of each example.

    .. math::  J(p, q) = \mathrm{KL}(p \,\|\, q) + \mathrm{KL}(q \,\|\, p) = \sum_k (p_k - q_k)(\log p_k - \log q_k)

    for classes, :math:`(f - g)^2` for numbers (arXiv 1911.03437, section 3.1). For logits :math:`d` apart it is
    :math:`d^\top (\mathrm{diag}\, p - p p^\top)\, d`, the Fisher form of the softmax, up to third order.

    Args:
        a: Predictions for a named objective.
        b: Likewise, for the same batch.

    Raises:
        ValueError: If the losses come from a function, or there is a single class, of which the probability is 1.
    """
    if a.kind == "losses":
        raise ValueError("Predictions can only be compared for a named objective, but the losses come from a function.")
    if a.kind == "gaussian":
        return (a.outputs - b.outputs).square().sum(1)
    if a.outputs.shape[-1] < 2:
        raise ValueError(
            "Predictions can only be compared where there are two classes or more, but the head has one output; load "
            "the model for regression."
        )
    log_p, log_q = a.outputs.log_softmax(-1), b.outputs.log_softmax(-1)
    by_token = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    return torch.where(a.labels == IGNORED, 0.0, by_token).sum(1)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that trains, with the heads of all tasks and without the wrapper for several ranks.

    Gradients of all passes are added up before ranks exchange them, so only the first pass needs the wrapper.
    """
    return trained_model(model.module if isinstance(model, DistributedDataParallel) else model)


@contextmanager
def further_passes() -> Iterator[None]:
    """Passes in the block are not the one that the loss is of: nobody takes note of them."""
    token = _is_further.set(True)
    try:
        yield
    finally:
        _is_further.reset(token)


def is_further() -> bool:
    """Whether a pass is a further one, of a penalty."""
    return _is_further.get()


@dataclass(frozen=True)
class Lookup:
    """Word embeddings that a pass looks up; an encoder-decoder does so twice.

    Attributes:
        embeddings: What was found, without its history.
        tokens: False at padding.
        axis: Which counts the examples; some models count tokens first.
    """

    embeddings: Float[Tensor, "rows columns width"]
    tokens: Bool[Tensor, "rows columns"]
    axis: int


Dropout = Literal["own", "same"]

Shift = Callable[[int, Lookup], Tensor]
"""What is added to the embeddings of a look-up, by its number in the pass."""


def word_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules that look up word embeddings; some models have several for one table, and call other ones only."""
    try:
        table = getattr(model, "get_input_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):
        return []
    weight = getattr(table, "weight", None)
    return [m for m in model.modules() if isinstance(m, nn.Embedding) and weight is not None and m.weight is weight]


@contextmanager
def lookups_noted(model: nn.Module, batch: Batch, shift: Shift | None = None) -> Iterator[list[Lookup]]:
    """The look-ups of the passes in the block, in their order.

    Args:
        model: The model.
        batch: Its inputs.
        shift: What the embeddings are moved by; the moved ones are constants for the backward pass. None leaves them.
    """
    found: list[Lookup] = []
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        found.append(Lookup(output.detach(), *_read(args[0], batch, padding)))
        if shift is None:
            return None
        return (found[-1].embeddings + shift(len(found) - 1, found[-1])).to(output.dtype)

    handles = [module.register_forward_hook(note) for module in word_embeddings(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _read(ids: Tensor, batch: Batch, padding: int | None) -> tuple[Tensor, int]:
    """Which of the tokens are no padding, and the axis that counts examples."""
    given, attended = batch.get("input_ids"), batch.get("attention_mask")
    for axis, seen in ((0, ids), (1, ids.mT)):
        if given is not None and given.shape == seen.shape and torch.equal(given.to(ids.device), seen):
            read = attended.to(ids.device) != 0 if attended is not None else torch.ones_like(seen, dtype=torch.bool)
            return (read.mT if axis else read), axis
    # what a decoder reads, which no mask tells
    return (torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding), 0


class Passes(Applied):
    """Further passes of a model, and the draws for them.

    Attributes:
        model: In training.
        draws: How many generators were given out.
    """

    def __init__(self, model: nn.Module, name: str, seed: int) -> None:
        """Nothing drawn so far."""
        self.model, self.draws = model, 0
        self._name, self._seed = name, seed
        self._generators: tuple[Tensor, Tensor | None] | None = None
        self._is_checked = False

    def state_dict(self) -> dict[str, Tensor]:
        """The number of draws."""
        return {"draws": torch.tensor(self.draws)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        self.draws = int(state["draws"])

    @contextmanager
    def following(self) -> Iterator[None]:
        """Take note of the random state that every pass begins with."""

        def note(*_: Any) -> None:
            if not is_further():
                device = device_of(self.model)
                on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
                self._generators = torch.get_rng_state(), on_device

        handle = self.model.register_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def generator(self) -> torch.Generator:
        """For the draws of one penalty: a function of name, seed, rank and how many there were."""
        self.draws += 1
        return torch.Generator(device_of(self.model)).manual_seed(self._drawn_seed("noise"))

    def _drawn_seed(self, of: str) -> int:
        what = f"{of} of {self._name}, seed {self._seed}, rank {distributed.rank()}, number {self.draws}"
        return int(storage.digest(what), 16) % 2**63

    def again(self, batch: Batch, dropout: Dropout = "same") -> Predictions:
        """The predictions of one more pass.

        Args:
            batch: The inputs.
            dropout: ``"same"`` as in the last pass that was none of ours, or the pass's ``"own"``.

        Raises:
            ValueError: If there was no such pass.
        """
        if self._generators is None:
            raise ValueError(
                f"{self._name} compares passes with the one that the loss is of, but the model has made none so far; "
                "compute the predictions inside the block of applied_to."
            )
        device, (here, there) = device_of(self.model), self._generators
        with further_passes(), torch.random.fork_rng(devices=[] if there is None else [device]):
            if dropout == "own":
                here, there = _random_states(self._drawn_seed("dropout"), None if there is None else device)
            torch.set_rng_state(here)
            if there is not None:
                torch.cuda.set_rng_state(there, device)
            return predict(self.model, batch, infer_objective(self.model))

    def shifted(
        self, batch: Batch, shift: Shift, clean: Predictions, dropout: Dropout = "same"
    ) -> tuple[Predictions, list[Lookup]]:
        """The predictions for word embeddings that are moved.

        Args:
            batch: The inputs.
            shift: What they are moved by.
            clean: The predictions of the pass that the loss is of.
            dropout: As for :meth:`again`.

        Raises:
            ValueError: If they cannot be moved, or nothing comes of it the first time.
        """
        shifts: list[Tensor] = []

        def noted(number: int, lookup: Lookup) -> Tensor:
            if number == len(shifts):
                shifts.append(shift(number, lookup))
            return shifts[number]

        if not self._is_checked and dropout == "own":  # which would change the predictions alone
            with torch.no_grad(), lookups_noted(self.model, batch, noted) as lookups:
                self._check(clean, self.again(batch), lookups, shifts)
            torch.clear_autocast_cache()  # of weights without a gradient
        with lookups_noted(self.model, batch, noted) as lookups:
            predictions = self.again(batch, dropout)
        if not self._is_checked and dropout == "same":
            self._check(clean, predictions, lookups, shifts)
        self._is_checked = True
        return predictions, lookups

    def _check(self, clean: Predictions, moved: Predictions, lookups: list[Lookup], shifts: list[Tensor]) -> None:
        kind = type(self.model).__name__
        if not lookups:
            raise ValueError(
                f"{self._name} moves the word embeddings of the input_ids, but this {kind} looks up none; take a model "
                "and batches of texts."
            )
        for lookup, shift in zip(lookups, shifts, strict=True):
            before, shift = lookup.embeddings, shift.detach()
            lost = ((before + shift).to(before.dtype) == before) & (shift != 0)
            if lost.sum() > 0.5 * (shift != 0).sum():
                raise ValueError(
                    f"{self._name} moves word embeddings by up to {float(shift.abs().max()):.2g}, which is rounded "
                    f"away in the {before.dtype} of this {kind}; load the weights in float32 or take more noise."
                )
        if torch.equal(clean.outputs, moved.outputs):
            raise ValueError(
                f"{self._name} needs noise at the word embeddings to change the predictions, but those of this {kind} "
                "stay the same; take more noise, or another method for this model."
            )


def _random_states(seed: int, device: torch.device | None) -> tuple[Tensor, Tensor | None]:
    """The states of torch's generators, of the CPU and of a GPU, after seeding."""
    on_device = None if device is None else torch.Generator(device).manual_seed(seed).get_state()
    return torch.Generator().manual_seed(seed).get_state(), on_device


@dataclass(frozen=True, kw_only=True)
class OfPasses(Regularizer):
    """A regularizer whose penalty makes further passes.

    Attributes:
        seed: Of the noise.
    """

    seed: int = 0
    _applied: "weakref.WeakKeyDictionary[nn.Module, Passes]" = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager[Applied]:
        """Follow the passes of the model for the length of the block."""
        return self.following(model, Passes(model, self.name, self.seed))

    @contextmanager
    def following(self, model: nn.Module, passes: Passes) -> Iterator[Passes]:
        """Let :meth:`passes_of` find these for the length of the block."""
        self._applied[model] = passes
        try:
            with passes.following():
                yield passes
        finally:
            del self._applied[model]

    def passes_of(self, model: nn.Module) -> Passes:
        """Those of the block that the model trains in.

        Raises:
            ValueError: If there is no such block.
        """
        found = self._applied.get(unwrapped(model))
        if found is None:
            raise ValueError(
                f"The penalty of {self.name} is for a model that it is applied to, but it is not applied to this "
                f"{type(unwrapped(model)).__name__}; compute it inside the block of applied_to."
            )
        return found


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of a shape, in float32 or better, so that small noise is not rounded where it is made."""
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=exact_dtype(like))


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor, float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)
