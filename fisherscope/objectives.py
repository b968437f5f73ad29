r"""Per-example losses from logits.

The loss of example :math:`n` is the sum of :math:`-\log p` over its scored tokens, kept apart from their number, so
that it is divided once and explicitly. ``output.loss`` of a Hugging Face head is never used: it averages over the
batch.

Shape names: B examples in a batch, T tokens, L scored tokens of the example that has most, V vocabulary, C classes.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._typing import Float, Int
from .data.corruption import IGNORED
from .data.sources import LABELLED_OBJECTIVES, check_objective
from .models import device_of

Batch = Mapping[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class ExampleLosses:
    """Losses of a batch, example by example.

    Attributes:
        total: Loss summed over the scored tokens of each example, in nats (squared units for regression).
        count: Number of scored tokens; 1 where an example has one label.
    """

    total: Float[Tensor, "examples"]
    count: Int[Tensor, "examples"]

    @property
    def mean(self) -> Float[Tensor, "examples"]:
        """Loss per scored token; 0 for an example without any."""
        return self.total / self.count.clamp(min=1)


def example_losses(model: nn.Module, batch: Batch, objective: str | LossFunction) -> ExampleLosses:
    r"""The loss of every example of a batch.

    - ``mlm``, ``seq2seq-lm``: :math:`-\sum_t \log p(y_t)` over the tokens whose label is not -100.
    - ``causal-lm``: the same with the labels one position later, as Hugging Face heads take them.
    - ``classification``: :math:`-\log p(y)`; ``regression``: :math:`(f - y)^2`, a Gaussian with variance 1/2.
    - a function ``(model, batch) -> losses of shape [B]``: what it returns.

    Args:
        model: A model with the head the objective needs.
        batch: Model inputs and ``labels``, as a Hugging Face collator makes them; moved to the model's device.
        objective: One of the five names, or a function.

    Raises:
        ValueError: If the objective is unknown, the batch has no labels, or the model returns no fitting logits.
    """
    batch = {name: value.to(device_of(model)) for name, value in batch.items()}
    if callable(objective):
        return _custom(objective(model, batch), len(next(iter(batch.values()))))
    check_objective(objective)
    labels = _labels(batch, objective)
    del batch["labels"]
    if objective in LABELLED_OBJECTIVES:
        return _label_losses(_logits(model, batch), labels, objective)
    if objective == "causal-lm":
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if objective == "seq2seq-lm" and "decoder_input_ids" not in batch:
        batch["decoder_input_ids"] = _shifted_right(model, labels)
    return _token_losses(model, batch, labels)


def reference_losses(model: nn.Module, batches: Iterable[Batch], objective: str | LossFunction) -> dict[str, float]:
    """What the loss of a language model is compared with, in nats per scored token; empty for other objectives.

    Returns:
        ``"uniform"``: ln V, the loss of a uniform guess over the model's vocabulary. ``"unigram"``: the entropy of the
        scored labels, the loss of always predicting their frequencies.
    """
    if not is_language_model(objective):
        return {}
    labels = torch.cat([torch.zeros(0, dtype=torch.long), *(_scored(batch, objective).cpu() for batch in batches)])
    shares = labels.unique(return_counts=True)[1].double() / max(len(labels), 1)
    references = {"unigram": float(-(shares * shares.log()).sum())}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return references if head is None else {"uniform": math.log(head.weight.shape[0]), **references}


def _scored(batch: Batch, objective: str | LossFunction) -> Int[Tensor, "tokens"]:
    labels = _labels(batch, objective)
    labels = labels[:, 1:] if objective == "causal-lm" else labels
    return labels[labels != IGNORED]


def is_language_model(objective: str | LossFunction) -> bool:
    """Whether the loss is in nats per token of a vocabulary."""
    return objective in ("mlm", "causal-lm", "seq2seq-lm")


def _labels(batch: Batch, objective: str | LossFunction) -> Tensor:
    if "labels" not in batch:
        raise ValueError(f"The objective {objective} needs 'labels' in every batch, but it holds {sorted(batch)}.")
    return batch["labels"]


def _custom(losses: Tensor, size: int) -> ExampleLosses:
    if losses.shape != (size,):
        raise ValueError(
            f"A loss function must return one loss per example, shape [B]; got shape {list(losses.shape)}."
        )
    return ExampleLosses(losses, torch.ones_like(losses, dtype=torch.long))


def _label_losses(logits: Tensor, labels: Tensor, objective: str) -> ExampleLosses:
    outputs = 1 if objective == "regression" else "classes"
    if logits.ndim != 2 or logits.shape[:1] != labels.shape or (outputs == 1 and logits.shape[1] != 1):
        raise ValueError(
            f"The objective {objective} needs one label per example and logits of shape [{len(logits)}, {outputs}], "
            f"but labels are {list(labels.shape)} and logits {list(logits.shape)}; load the model with this objective."
        )
    if objective == "regression":
        return ExampleLosses(
            (logits[:, 0] - labels.to(logits.dtype)).square(), torch.ones_like(labels, dtype=torch.long)
        )
    if bool((labels >= logits.shape[1]).any()):
        raise ValueError(
            f"Class labels must be below {logits.shape[1]}, the number of outputs of the head, but one is "
            f"{int(labels.max())}."
        )
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return ExampleLosses(losses, (labels != IGNORED).long())


def _token_losses(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> ExampleLosses:
    scored = labels != IGNORED
    count = scored.sum(1)
    width = max(int(count.max()), 1)
    positions = (~scored).int().argsort(dim=1, stable=True)[:, :width]  # [B, L], scored ones first
    with _head_sees_only(model, positions, labels.shape[1]) as head:
        logits = _logits(model, inputs)
    if not head.selected:
        _check_length(logits, labels.shape[1])
        logits = _take(logits, positions)
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.gather(1, positions).flatten(), ignore_index=IGNORED, reduction="none"
    )
    return ExampleLosses(losses.view_as(positions).sum(1), count)


def _shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder reads: the target one position later, after the start token."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels=labels)
    start = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"{type(model).__name__} does not say how its decoder starts; add 'decoder_input_ids' to the batches."
        )
    shifted = F.pad(labels[:, :-1], (1, 0), value=start)
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id or 0)  # pyright: ignore


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    logits: Any = getattr(model(**inputs), "logits", None)
    if logits is None:
        raise ValueError(f"{type(model).__name__} returns no logits; load the model with a head for the objective.")
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


@dataclass
class _Head:
    selected: bool = False


@contextlib.contextmanager
def _head_sees_only(model: nn.Module, positions: Int[Tensor, "examples scored"], length: int) -> Iterator[_Head]:
    """Let only the given positions reach the vocabulary projection, the widest layer: exact, and much less work."""
    state = _Head()

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if args[0].ndim != 3:
            return args
        _check_length(args[0], length)
        state.selected = True
        return (_take(args[0], positions), *args[1:])

    head = getattr(model, "get_output_embeddings", lambda: None)()
    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield state
    finally:
        if handle:
            handle.remove()


def _check_length(values: Tensor, length: int) -> None:
    if values.shape[1] != length:
        raise ValueError(
            f"The labels must have one entry per position of the output, but they have {length} and the output has "
            f"{values.shape[1]}; check the collator."
        )


def _take(values: Float[Tensor, "examples tokens width"], positions: Int[Tensor, "examples scored"]) -> Tensor:
    return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))
