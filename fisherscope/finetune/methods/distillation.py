"""Knowledge distillation: a model learns what another one, the teacher, says about the examples."""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ... import storage
from ..._typing import Float
from ...data.sources import LABELLED_OBJECTIVES
from ...models import device_of, infer_objective, load_model, measuring, saved_objective
from ...objectives import Batch, Predictions, predict
from ..regularizer import Applied, Regularizer, Unfit
from ..run import Run
from .label_smoothing import check_classes, summed

logger = logging.getLogger(__name__)

Teacher = Callable[[Batch, Predictions], Tensor]
"""Gives outputs for a batch, in the form of the outputs of the predictions of the model that learns."""

OWN = "vanilla"
"""As a name of a teacher: the model itself, fine-tuned without a method first."""


@dataclass(frozen=True)
class Distillation(Regularizer):
    r"""The loss is mixed with how far the predictions are from those of a teacher.

    .. math::  \ell = (1 - a) \, (-\log p_y) + a \, \tau^2 \, \mathrm{KL}(t_\tau \,\|\, p_\tau), \qquad
               p_\tau = \mathrm{softmax}(z / \tau), \quad t_\tau = \mathrm{softmax}(z^t / \tau)

    for every scored token (Hinton et al. 2015, arXiv 1503.02531; a baseline of Kobyzev et al. 2023, arXiv 2205.12428).
    The factor :math:`\tau^2` keeps the size of the gradients, which tend to those of
    :math:`\tfrac{1}{2K} \|z - z^t\|^2` with centred logits. For regression :math:`\ell = (1 - a)(f - y)^2 + a (f -
    f^t)^2`, without a temperature. The teacher is in eval mode. Weight and temperature have defaults of our own: none
    are published.

    Attributes:
        teacher: What is learnt from: a saved model for the same task and tokenizer, or vanilla, which fine-tunes the
            model without a method first, with the same recipe, examples and seed.
        weight: Of the teacher, a, from 0, which is fine-tuning as it is, to 1, which leaves out the labels.
        temperature: Tau, at least 1; a higher one tells more of the classes that are unlikely.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "distillation"
    unfit: ClassVar[Mapping[Unfit, str]] = {"several tasks": "it learns from a teacher, who knows one task"}

    teacher: nn.Module | Teacher
    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what is no mixture."""
        if not 0 <= self.weight <= 1:
            raise ValueError(f"The weight of a teacher must be from 0 to 1, got {self.weight:g}.")
        if not 1 <= self.temperature < float("inf"):
            raise ValueError(f"The temperature must be at least 1, got {self.temperature:g}.")

    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager[Applied]:
        """Refuse a teacher with other labels."""
        if isinstance(self.teacher, nn.Module):
            check_labels(self.teacher, model)
        return super().applied_to(model, optimizer)

    def penalty(self, model: nn.Module, batch: Batch, predictions: Predictions) -> Tensor | None:
        r""":math:`a \, (\tau^2 \, \mathrm{KL} + \log p_y)`, as the loss is :math:`-\log p_y` already.

        Raises:
            ValueError: If the outputs of the teacher are for other labels, or there is a single one to compare.
        """
        if not self.weight:
            return None
        if predictions.kind != "gaussian":
            check_classes("Distillation", predictions)
        with torch.no_grad():
            teacher = self.teacher
            outputs = said_by(teacher, batch) if isinstance(teacher, nn.Module) else teacher(batch, predictions)
        outputs = outputs.to(predictions.outputs)
        if outputs.shape != predictions.outputs.shape:
            raise ValueError(
                f"A teacher must give outputs of the shape that the model gives, {list(predictions.outputs.shape)}, "
                f"but gives {list(outputs.shape)}; take a teacher for the same labels."
            )
        return self.weight * (divergence_from(outputs, predictions, self.temperature) - predictions.losses().total)

    @classmethod
    def for_run(cls, run: Run, *, teacher: str = OWN, **settings: Any) -> "Distillation":
        """With a teacher that is loaded, or fine-tuned first.

        A teacher of classes or numbers is asked about every training example once, before the training; one of
        language stays in memory.

        Args:
            run: The run.
            teacher: As above, by its name.
            settings: The fields.

        Raises:
            ValueError: If the teacher was saved for another task, other labels or another tokenizer.
        """
        made = cls(_silent, **settings)
        if not made.weight:
            return made
        model = _own_teacher(run) if teacher == OWN else _saved_teacher(run, teacher)
        check_labels(model, run.model)
        if run.objective not in LABELLED_OBJECTIVES:
            return cls(model, **settings)
        return cls(Remembered(model, run.batches.with_batch_size(4 * run.batches.batch_size)), **settings)


def divergence_from(teacher: Tensor, predictions: Predictions, temperature: float = 1.0) -> Float[Tensor, "examples"]:
    r"""How far predictions are from a teacher's outputs, in sum over the scored tokens of every example.

    :math:`\tau^2 \, \mathrm{KL}(t_\tau \,\|\, p_\tau)` for classes, :math:`(f - f^t)^2` for numbers.
    """
    if predictions.kind == "gaussian":
        return (predictions.outputs - teacher).square().sum(1)
    log_p, log_t = ((z / temperature).log_softmax(-1) for z in (predictions.outputs, teacher))
    by_token = F.kl_div(log_p, log_t, reduction="none", log_target=True).sum(-1)
    return temperature**2 * summed(by_token, predictions.labels)


def said_by(model: nn.Module, batch: Batch) -> Tensor:
    """The outputs of a model for a batch, in eval mode and without gradients."""
    with measuring(model), torch.no_grad():
        return predict(model, batch, infer_objective(model)).outputs


class Remembered:
    """What a model said about examples, found again by their content in batches of any size and padding.

    Raises:
        ValueError: When it is asked about another example.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        """Ask the model about every example; it is not kept."""
        keys: list[str] = []
        outputs = []
        for batch in batches:
            keys += _keys(batch)
            outputs.append(said_by(model, batch))
        self._rows = {key: row for row, key in enumerate(keys)}
        self._outputs = torch.cat(outputs)

    def __call__(self, batch: Batch, predictions: Predictions) -> Tensor:
        """What was said about the examples of a batch."""
        keys = _keys(batch)
        if any(key not in self._rows for key in keys):
            raise ValueError(
                "The teacher was asked about the training examples only, but a batch holds another one; give the "
                "teacher itself, or all examples as they are trained on."
            )
        return self._outputs[[self._rows[key] for key in keys]]


def _keys(batch: Batch) -> list[str]:
    """What tells examples apart: their inputs without padding."""
    inputs = {name: values.detach().cpu() for name, values in sorted(batch.items()) if name != "labels"}
    mask = inputs.get("attention_mask")
    keys = []
    for row in range(len(batch["labels"])):
        found: list[str | bytes] = []
        for name, values in inputs.items():
            is_padded = mask is not None and values.shape == mask.shape
            own = values[row][mask[row].bool()] if mask is not None and is_padded else values[row]
            found += [f"{name}{list(own.shape)}", own.numpy().tobytes()]
        keys.append(storage.digest(*found))
    return keys


def _silent(batch: Batch, predictions: Predictions) -> Tensor:
    """The teacher of a weight of 0, who is never asked."""
    raise NotImplementedError


def _own_teacher(run: Run) -> nn.Module:
    if run.fine_tuned is None:
        raise ValueError("Distillation needs a teacher, but here is none; give teacher, the name or folder of a model.")
    logger.info("Fine-tuning a teacher first: the model itself, without a method.")
    return run.fine_tuned()


def _saved_teacher(run: Run, name: str) -> nn.Module:
    made_for = saved_objective(name)
    if made_for != run.objective:
        raise ValueError(
            f"The teacher {name!r} was saved with a head for {made_for}, but the training is for {run.objective}; take "
            "a model that was fine-tuned for it, or leave teacher out."
        )
    model, tokenizer = load_model(name, objective=run.objective, device=device_of(run.model))
    if run.tokenizer is not None and tokenizer.get_vocab() != run.tokenizer.get_vocab():
        raise ValueError(
            f"A teacher reads the tokens of the model, but {name!r} has another vocabulary; take a teacher with the "
            "model's own tokenizer."
        )
    return model


def check_labels(teacher: nn.Module, model: nn.Module) -> None:
    """Refuse a teacher whose outputs mean something else; classes without names (``LABEL_0``) may mean anything.

    Raises:
        ValueError: If the numbers of labels, or their names, differ.
    """
    sizes = [_number_of_outputs(each) for each in (teacher, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"A teacher must have the outputs of the model, {sizes[1]}, but it has {sizes[0]}; take one for the same "
            "labels."
        )
    names = [_class_names(each) for each in (teacher, model)]
    if all(names) and names[0] != names[1]:
        raise ValueError(
            f"A teacher must have the classes of the model in their order, {', '.join(names[1])}, but it has "
            f"{', '.join(names[0])}; take one for the same labels."
        )


def _number_of_outputs(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if _is_labelled(model):
        return getattr(config, "num_labels", None)
    return getattr(config, "vocab_size", None)


def _class_names(model: nn.Module) -> list[str]:
    """By id, without regard to case; none if they are placeholders."""
    config: Any = getattr(model, "config", None)
    found = [str(name).casefold() for _, name in sorted((getattr(config, "id2label", None) or {}).items())]
    is_named = _is_labelled(model) and len(found) > 1 and found != [f"label_{i}" for i in range(len(found))]
    return found if is_named else []


def _is_labelled(model: nn.Module) -> bool:
    try:
        return infer_objective(model) in (*LABELLED_OBJECTIVES, "token-classification")
    except ValueError:
        return False
