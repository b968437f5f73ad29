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
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._typing import Float, Int
from .data.corruption import IGNORED
from .data.sources import LABELLED_OBJECTIVES
from .models import check_head, device_of

Batch = Mapping[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], Tensor]

GAUSSIAN_VARIANCE = 0.5
"""Of regression: the squared error without a factor 1/2 is a Gaussian's negative log-likelihood with this variance."""


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


@dataclass(frozen=True)
class Predictions:
    """What a model says about the labels of a batch, in one form for all objectives.

    Attributes:
        kind: ``"categorical"``: outputs are logits ``[B, L, C]``, labels class or token ids ``[B, L]``, -100 where
            there is nothing to score. ``"gaussian"``: outputs are means ``[B, 1]``, labels numbers ``[B, 1]``.
            ``"losses"``: outputs are the losses ``[B, 1]`` of a function, and there are no labels.
        outputs: As the kind says.
        labels: As the kind says.
    """

    kind: Literal["categorical", "gaussian", "losses"]
    outputs: Float[Tensor, "examples tokens *classes"]
    labels: Tensor

    @property
    def count(self) -> Int[Tensor, "examples"]:
        """Number of scored tokens of every example."""
        scored = (
            self.labels != IGNORED if self.kind == "categorical" else torch.ones_like(self.labels, dtype=torch.bool)
        )
        return scored.sum(1)

    @cached_property
    def token_losses(self) -> Float[Tensor, "examples tokens"]:
        """The loss of every label; 0 where there is none."""
        return self.losses_for(self.labels)

    def losses_for(self, labels: Tensor) -> Float[Tensor, "examples tokens"]:
        """The same for other labels."""
        if self.kind == "losses":
            return self.outputs
        if self.kind == "gaussian":
            return (self.outputs - labels.to(self.outputs.dtype)).square()
        flat = F.cross_entropy(self.outputs.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.view(labels.shape)

    def losses(self) -> ExampleLosses:
        """Losses example by example."""
        return ExampleLosses(self.token_losses.sum(1), self.count)

    def drawn(self, uniforms: Float[Tensor, "examples tokens"]) -> Tensor:
        """Labels drawn from the model, by uniform random numbers; a Gaussian has variance 1/2."""
        if self.kind == "losses":
            raise ValueError(
                "Labels can only be drawn from a named objective, but the losses come from a function; take the "
                "estimator empirical."
            )
        if self.kind == "gaussian":
            normal = torch.special.ndtri(uniforms.clamp(min=1e-12))
            return self.outputs.detach() + math.sqrt(GAUSSIAN_VARIANCE) * normal.to(self.outputs.dtype)
        bounds = self.outputs.detach().double().softmax(-1).cumsum(-1)
        labels = torch.searchsorted(bounds, uniforms[..., None].contiguous(), right=True)[..., 0]
        return torch.where(self.labels == IGNORED, IGNORED, labels.clamp(max=bounds.shape[-1] - 1))


def check_batch(batch: object) -> None:
    """Refuse what is no batch.

    Raises:
        TypeError: If it is no mapping to tensors; names the first that is none.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            "A batch must be a mapping from the names of the model's arguments to tensors, as {'input_ids': ..., "
            f"'labels': ...}}, but the data gives a {type(batch).__name__}; let the loader make a dict of it."
        )
    if wrong := next((name for name, value in batch.items() if not isinstance(value, Tensor)), None):
        raise TypeError(
            f"A batch must hold tensors with the examples first, but {wrong!r} is a {type(batch[wrong]).__name__}; "
            "let the loader collate it, or leave it out."
        )


def example_losses(model: nn.Module, batch: Batch, objective: str | LossFunction) -> ExampleLosses:
    """The loss of every example of a batch; what :func:`predict` says, for the labels of the data."""
    return predict(model, batch, objective).losses()


def predict(model: nn.Module, batch: Batch, objective: str | LossFunction) -> Predictions:
    r"""Run a model on a batch, as far as its labels ask for.

    - ``mlm``, ``seq2seq-lm``, ``token-classification``: :math:`-\sum_t \log p(y_t)` over the tokens whose label is not
      -100.
    - ``causal-lm``: the same with the labels one position later, as Hugging Face heads take them.
    - ``classification``: :math:`-\log p(y)`; ``regression``: :math:`(f - y)^2`, a Gaussian with variance 1/2.
    - ``question-answering``: two labels, ``start_positions`` and ``end_positions``, over the positions of the text.
    - a function ``(model, batch) -> losses of shape [B]``: what it returns.

    Args:
        model: A model with the head the objective needs.
        batch: Model inputs and ``labels``, as a Hugging Face collator makes them; moved to the model's device.
        objective: One of the names, or a function.

    Raises:
        ValueError: If the objective is unknown, the batch has no labels, labels are out of range, or the model returns
            no fitting logits.
    """
    batch = {name: value.to(device_of(model)) for name, value in batch.items()}
    _check_inputs(model, batch)
    if callable(objective):
        return _custom(objective(model, batch), len(next(iter(batch.values()))))
    check_head(model, objective)
    if objective == "question-answering":
        return _answer(model, batch)
    labels = _labels(batch, objective)
    del batch["labels"]
    if objective in LABELLED_OBJECTIVES:
        return _labelled(_logits(model, batch), labels, objective)
    if objective == "causal-lm":
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if objective == "seq2seq-lm" and "decoder_input_ids" not in batch:
        if head := output_embeddings(model):  # before the decoder reads them
            _check_labels(labels, len(head.weight), "labels of the vocabulary")
        batch["decoder_input_ids"] = _shifted_right(model, labels)
    return _tokens(model, batch, labels, "labels of the vocabulary" if is_language_model(objective) else "class labels")


def num_scored(batch: Batch, objective: str | LossFunction) -> Int[Tensor, "examples"]:
    """Number of scored tokens of every example, without running a model; 1 where an example has one label."""
    if callable(objective) or objective == "regression":
        return torch.ones(len(next(iter(batch.values()))), dtype=torch.long)
    labels = _ends(batch) if objective == "question-answering" else _labels(batch, objective)
    labels = labels[:, 1:] if objective == "causal-lm" else labels
    return (labels != IGNORED).reshape(len(labels), -1).sum(1)


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
    head = output_embeddings(model)
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
    labels = batch["labels"]
    if not len(labels):
        raise ValueError("Every batch must hold at least one example, but one holds none.")
    if objective != "regression" and labels.is_floating_point():
        raise ValueError(f"The objective {objective} needs integer labels, but they are {labels.dtype}.")
    if objective not in LABELLED_OBJECTIVES and labels.ndim != 2:
        raise ValueError(
            f"The objective {objective} needs one label per token, shape [B, tokens], but labels are "
            f"{list(labels.shape)}; load the data with this objective."
        )
    return labels


def _check_inputs(model: nn.Module, batch: Batch) -> None:
    """An embedding would raise an IndexError, which on a GPU ends the process."""
    rows = getattr(_embeddings(model, "get_input_embeddings"), "num_embeddings", None)
    for name in ("input_ids", "decoder_input_ids"):
        if rows is None or name not in batch:
            continue
        wrong = (batch[name] < 0) | (batch[name] >= rows)
        if bool(wrong.any()):
            raise ValueError(
                f"The {name} must be below {rows}, the number of tokens that the model knows, and not negative; one is "
                f"{int(batch[name][wrong][0])}: use the model's own tokenizer."
            )


def output_embeddings(model: nn.Module) -> Any:
    """The projection of a language model to its vocabulary; None of a model without one."""
    return _embeddings(model, "get_output_embeddings")


def _embeddings(model: nn.Module, getter: str) -> Any:
    try:
        return getattr(model, getter, lambda: None)()
    except (AttributeError, NotImplementedError):  # a model that has none, as those for images
        return None


def _custom(losses: object, size: int) -> Predictions:
    if not isinstance(losses, Tensor) or losses.shape != (size,):
        found = f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
        raise ValueError(f"A loss function must return one loss per example, shape [B]; got {found}.")
    return Predictions("losses", losses[:, None], torch.zeros(size, 1, dtype=torch.long, device=losses.device))


def _labelled(logits: Tensor, labels: Tensor, objective: str) -> Predictions:
    outputs = 1 if objective == "regression" else "classes"
    if logits.ndim != 2 or logits.shape[:1] != labels.shape or (outputs == 1 and logits.shape[1] != 1):
        raise ValueError(
            f"The objective {objective} needs one label per example and logits of shape [{len(logits)}, {outputs}], "
            f"but labels are {list(labels.shape)} and logits {list(logits.shape)}; load the model with this objective."
        )
    if objective == "regression":
        return Predictions("gaussian", logits, labels[:, None])
    _check_labels(labels, logits.shape[1], "class labels")
    return Predictions("categorical", logits[:, None], labels[:, None])


_ENDS = ("start_positions", "end_positions")


def _ends(batch: Batch) -> Int[Tensor, "examples 2"]:
    """The two labels of every question."""
    if not all(end in batch for end in _ENDS):
        raise ValueError(
            f"question-answering needs {' and '.join(_ENDS)} in every batch, but it holds {sorted(batch)}."
        )
    return torch.stack([batch[end] for end in _ENDS], 1)


def _answer(model: nn.Module, batch: Batch) -> Predictions:
    labels = _ends(batch)
    output: Any = model(**{name: value for name, value in batch.items() if name not in _ENDS})
    logits = [getattr(output, name, None) for name in ("start_logits", "end_logits")]
    if any(values is None or values.ndim != 2 for values in logits):
        raise ValueError(f"{type(model).__name__} returns no start_logits and end_logits; load a model for answers.")
    stacked = _wide(torch.stack(logits, 1))  # pyright: ignore[reportArgumentType]
    _check_labels(labels, stacked.shape[-1], "positions")
    if (mask := batch.get("attention_mask")) is not None:  # no answer starts in the padding
        stacked = stacked.masked_fill((mask == 0)[:, None], torch.finfo(stacked.dtype).min)
    return Predictions("categorical", stacked, labels)


def _check_labels(labels: Tensor, classes: int, what: str) -> None:
    wrong = (labels >= classes) | ((labels < 0) & (labels != IGNORED))
    if bool(wrong.any()):
        raise ValueError(
            f"The {what} must be below {classes}, the number of outputs of the head, and not negative, but for "
            f"{IGNORED} (not scored); one is {int(labels[wrong][0])}."
        )


def _tokens(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, what: str) -> Predictions:
    positions = _scored_positions(labels)
    with _head_sees_only(model, positions, labels.shape[1]) as head:
        logits = _logits(model, inputs)
    if not head.selected:
        _check_length(logits, labels.shape[1])
        logits = _take(logits, positions)
    labels = labels.gather(1, positions)
    _check_labels(labels, logits.shape[-1], what)
    return Predictions("categorical", logits, labels)


def _scored_positions(labels: Int[Tensor, "examples tokens"]) -> Int[Tensor, "examples scored"]:
    """The positions with a label, in order, filled up with positions that have none; at least one."""
    scored = labels != IGNORED
    width = max(int(scored.sum(1).max()), 1)
    rank = torch.where(scored, scored.cumsum(1) - 1, (~scored).cumsum(1) - 1 + scored.sum(1, keepdim=True))
    order = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    return torch.zeros_like(labels).scatter_(1, rank, order)[:, :width]


def _shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder reads: the target one position later, after the start token."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    start = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    unknown = ValueError(
        f"{type(model).__name__} does not say how its decoder starts; set decoder_start_token_id in its configuration, "
        "or add 'decoder_input_ids' to the batches."
    )
    if prepare is not None:
        try:
            return prepare(labels=labels)
        except AttributeError as error:
            if start is None:
                raise unknown from error
            raise
    if start is None:
        raise unknown
    shifted = F.pad(labels[:, :-1], (1, 0), value=start)
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id or 0)  # pyright: ignore


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output: Any = model(**inputs)
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = getattr(output, "prediction_logits", None)  # of a head for tokens beside another one
    if logits is None:
        raise ValueError(f"{type(model).__name__} returns no logits; load the model with a head for the objective.")
    return _wide(logits)


def _wide(logits: Tensor) -> Tensor:
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

    head = output_embeddings(model)
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
