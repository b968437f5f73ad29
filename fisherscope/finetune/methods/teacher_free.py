"""Distillation without another model: from the model itself as it was fine-tuned before, or from a made-up teacher."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...objectives import Batch, Predictions
from ..run import Run
from .distillation import Distillation
from .label_smoothing import check_classes, possible_classes


@dataclass(frozen=True)
class TeacherFreeDistillation(Distillation):
    r"""Distillation (``distillation``) from a teacher that needs no larger model.

    From the model itself, fine-tuned without a method before, or from a virtual teacher who is right with probability
    c and sees no difference between the other classes,

    .. math::  d_y = c, \qquad d_k = \frac{1 - c}{K - 1}, \qquad d_\tau = \mathrm{softmax}(\log d / \tau)

    in place of :math:`t_\tau` (Yuan et al. 2020, arXiv 1909.11723, section 4; baselines of Kobyzev et al. 2023, arXiv
    2205.12428). At :math:`\tau = 1` the virtual teacher is label smoothing over the other classes with weight
    :math:`a (1 - c)`. The published program takes :math:`\mathrm{softmax}(d / \tau)`, which is almost uniform, and
    leaves out the temperature of the model and :math:`\tau^2`.

    Attributes:
        teacher: From ``for_run``; in a training loop of one's own a model, or ``VirtualTeacher(c)``.
        weight: Of the teacher, a, from 0, which is fine-tuning as it is, to 1, which leaves out the labels.
        temperature: Tau, at least 1; a higher one tells more of the classes that are unlikely.
    """

    name: ClassVar[str] = "teacher-free-distillation"

    @classmethod
    def for_run(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, run: Run, *, variant: Literal["self", "virtual"] = "self", confidence: float = 0.99, **settings: Any
    ) -> "Distillation":
        """With the model itself, fine-tuned first, or with the virtual teacher.

        Args:
            run: The run.
            variant: Whether the teacher is the model itself, fine-tuned without a method first, or virtual.
            confidence: Probability that the virtual teacher gives the right class, c.
            settings: The fields.

        Raises:
            ValueError: If a setting is out of range, or there are no classes for a virtual teacher.
        """
        if variant not in ("self", "virtual"):
            raise ValueError(f"variant must be 'self' or 'virtual', got {variant!r}.")
        if variant == "virtual" and run.objective == "regression":
            raise ValueError("A virtual teacher needs classes, which regression has not; take variant self.")
        virtual = VirtualTeacher(confidence)
        return cls(virtual, **settings) if variant == "virtual" else super().for_run(run, **settings)


@dataclass(frozen=True)
class VirtualTeacher:
    """Knows the label of every token, and nothing else.

    Attributes:
        confidence: Probability of the label, c, at least 0.5 and below 1.

    Raises:
        ValueError: If the confidence is out of range.
    """

    confidence: float = 0.99

    def __post_init__(self) -> None:
        """Refuse a teacher who knows no label."""
        if not 0.5 <= self.confidence < 1:
            raise ValueError(
                f"The confidence of a virtual teacher must be at least 0.5 and below 1, got {self.confidence:g}."
            )

    def __call__(self, batch: Batch, predictions: Predictions) -> Tensor:
        """The logarithms of its probabilities; classes that are ruled out have none.

        Raises:
            ValueError: If there are no classes.
        """
        check_classes("A virtual teacher", predictions)
        among = possible_classes(predictions.outputs)
        others = (1 - self.confidence) / (among.sum(-1, keepdim=True) - 1).clamp(min=1).to(predictions.outputs.dtype)
        lowest = torch.finfo(predictions.outputs.dtype).min
        label = predictions.labels.clamp(min=0)[..., None]
        right = torch.tensor(self.confidence, dtype=others.dtype, device=others.device).log()
        return torch.where(among, others.log(), lowest).scatter(-1, label, right.expand(label.shape))
