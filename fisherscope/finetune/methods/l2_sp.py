"""L2-SP: a penalty on the distance to the pretrained weights; with Fisher scores, elastic weight consolidation."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...objectives import Batch, Predictions
from ...scores import FisherScores
from ..parts import anchored
from ..regularizer import Applied, Regularizer
from .fixed_mask import backbone_names, scores_of
from .pretrained_decay import DOUBLE_PULL

if TYPE_CHECKING:
    from ..run import Run


@dataclass(frozen=True)
class L2SP(Regularizer):
    r"""A penalty on the squared distance to the pretrained weights (Li et al., arXiv 1802.01483).

    .. math::  \Omega = \tfrac{\alpha}{2} \sum_{i \in S} f_i (w_i - w_i^0)^2 + \tfrac{\beta}{2} \sum_{i \notin S} w_i^2

    added to the loss of a step, with :math:`S` the pretrained parameters, biases and normalisations among them, and
    :math:`f = 1`. With ``scores``, :math:`f` is the diagonal Fisher information, as it is: L2-SP-Fisher, the penalty
    of elastic weight consolidation (arXiv 1612.00796); pretrained parameters outside the backbone then have no pull.
    Adam divides the gradient of the penalty by its own size, as that of the loss. The penalty takes the place of
    weight decay: set that to 0 to train as published.

    Attributes:
        anchor: By name of the parameter: its pretrained value.
        scores: Weights f of the entries of the backbone; None weighs all pretrained entries by 1.
        alpha: Weight of the distance to the pretrained weights; published grid 0.001 to 1.
        beta: Weight of the squared parameters that the checkpoint lacked.

    Raises:
        ValueError: If a weight is negative.
    """

    name: ClassVar[str] = "l2-sp"
    excludes: ClassVar[Mapping[str, str]] = {"recadam": DOUBLE_PULL}

    anchor: Mapping[str, Tensor]
    scores: FisherScores | None = None
    alpha: float = 0.01
    beta: float = 0.01

    def __post_init__(self) -> None:
        """Refuse negative weights."""
        for name in ("alpha", "beta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name):g}.")

    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager[Applied]:
        """Nothing but a check; the penalty does the work.

        Raises:
            ValueError: If the anchor or the scores do not fit the model.
        """
        self._placed.pop(next(model.parameters()).device, None)  # it may be of a model before
        self._terms(model)
        return super().applied_to(model, optimizer)

    def penalty(self, model: nn.Module, batch: Batch, predictions: Predictions) -> Tensor | None:
        r""":math:`\Omega` for every scored token, so that it is added once to the loss of a step."""
        del batch
        if not (self.alpha or self.beta):
            return None
        known, total = self._terms(model), torch.zeros((), device=predictions.outputs.device)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if name not in self.anchor:
                total = total + self.beta / 2 * parameter.square().sum()
            elif name in known:
                start, weights = known[name]
                squares = (parameter - start).square()
                total = total + self.alpha / 2 * (squares if weights is None else weights * squares).sum()
        return total * predictions.count

    def _terms(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Pretrained value and weights by name of the parameter, where the parameter is."""
        device = next(model.parameters()).device
        if device not in self._placed:
            start, weights = anchored(model, self.anchor), None
            if self.scores is not None:
                inside = [name for name in backbone_names(model) if name in start]
                weights = {name: s.to(start[name]) for name, s in scores_of(self.scores, model, inside).items()}
            self._placed[device] = {
                name: (value, None if weights is None else weights[name])
                for name, value in start.items()
                if weights is None or name in weights
            }
        return self._placed[device]

    @cached_property
    def _placed(self) -> dict[torch.device, dict[str, tuple[Tensor, Tensor | None]]]:
        return {}

    @classmethod
    def for_run(cls, run: "Run", *, fisher: bool = False, **settings: Any) -> "L2SP":
        """For the checkpoint of the run.

        Args:
            run: The run.
            fisher: Weigh every entry by its Fisher score on the training examples, or by scores that are given.
            settings: The fields.
        """
        return cls(run.supply("anchor"), run.supply("scores") if fisher else None, **settings)
