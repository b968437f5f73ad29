"""Label smoothing: every class gets a share of every label."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..._typing import Bool, Float
from ...data.corruption import IGNORED
from ...objectives import Batch, Predictions
from ..regularizer import Regularizer, Unfit


@dataclass(frozen=True)
class LabelSmoothing(Regularizer):
    r"""The labels are mixed with the uniform distribution.

    .. math::  \ell = (1 - a) \, (-\log p_y) + a \, \frac1K \sum_k -\log p_k

    for every scored token, with K classes (Szegedy et al. 2016, arXiv 1512.00567, section 7; a baseline of Kobyzev et
    al. 2023, arXiv 2205.12428). ``over="others"`` spreads the weight over the :math:`K - 1` other classes instead, as
    some programs do: the same with the weight :math:`a K / (K - 1)`, twice as much for two classes. Losses on
    validation examples are those of the plain labels.

    Attributes:
        weight: Share of the label that is spread, a, at least 0 and below 1; 0 is fine-tuning as it is.
        over: Whether it is spread over all classes, the right one too, or over the others.

    Raises:
        ValueError: If the weight is no such share, or ``over`` is unknown.
    """

    name: ClassVar[str] = "label-smoothing"
    unfit: ClassVar[Mapping[Unfit, str]] = {"regression": "it needs classes to spread a label over"}

    weight: float = 0.1
    over: Literal["all", "others"] = "all"

    def __post_init__(self) -> None:
        """Refuse labels that are none."""
        if not 0 <= self.weight < 1:
            raise ValueError(f"The weight of label smoothing must be at least 0 and below 1, got {self.weight:g}.")
        if self.over not in ("all", "others"):
            raise ValueError(f"over must be 'all' or 'others', got {self.over!r}.")

    def penalty(self, model: nn.Module, batch: Batch, predictions: Predictions) -> Tensor | None:
        r""":math:`e \, (z_y - \bar z)`: the normaliser of the logits z cancels in the difference of the losses.

        Raises:
            ValueError: If there are no classes to spread a label over.
        """
        if not self.weight:
            return None
        check_classes("Label smoothing", predictions)
        logits = predictions.outputs
        among = possible_classes(logits)
        count = among.sum(-1)
        more = label_values(logits, predictions.labels) - torch.where(among, logits, 0.0).sum(-1) / count
        share = self.weight if self.over == "all" else self.weight * count / (count - 1).clamp(min=1)
        return summed(share * more, predictions.labels)


def check_classes(method: str, predictions: Predictions) -> None:
    """Refuse predictions that have no classes to choose from.

    Raises:
        ValueError: For regression, one logit, and losses that come from a function.
    """
    found = {"gaussian": "predicts a number", "losses": "was given a function for its loss"}.get(predictions.kind)
    if found is None and predictions.outputs.shape[-1] < 2:
        found = "has a single output"
    if found is not None:
        raise ValueError(f"{method} needs at least two classes, but this model {found}; train it without this method.")


def possible_classes(logits: Float[Tensor, "examples tokens classes"]) -> Bool[Tensor, "examples tokens classes"]:
    """All but those that the lowest logit there is rules out, as padding is where an answer is sought."""
    return logits > torch.finfo(logits.dtype).min


def label_values(values: Float[Tensor, "examples tokens classes"], labels: Tensor) -> Float[Tensor, "examples tokens"]:
    """What stands at the label of every token; any number where there is no label."""
    return values.gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def summed(by_token: Float[Tensor, "examples tokens"], labels: Tensor) -> Float[Tensor, "examples"]:
    """The sum over the scored tokens of every example."""
    return torch.where(labels == IGNORED, 0.0, by_token).sum(1)
