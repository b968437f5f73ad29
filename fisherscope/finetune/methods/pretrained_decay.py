"""Weight decay towards the pretrained weights."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..parts import anchored, around_steps, innermost, is_normalisation
from ..regularizer import Applied, Regularizer

logger = logging.getLogger(__name__)

DOUBLE_PULL = "both pull to the pretrained weights"


@dataclass(frozen=True)
class PretrainedDecay(Regularizer):
    r"""Decoupled weight decay that pulls to the pretrained weights in place of 0.

    .. math::  \theta_t = \theta_{t-1} - \eta_t \lambda (\theta_{t-1} - u) - \Delta_t

    with :math:`\eta_t` the learning rate of the step, :math:`\lambda` the optimizer's own weight decay, :math:`u` the
    pretrained weights and :math:`\Delta_t` the step of the optimizer without decay. Pulled are the pretrained matrices
    whose group has a weight decay, embeddings among them; parameters with one axis and those of normalisations never
    are, by their shape and the type of their module, and decay as the optimizer has it. What the checkpoint lacks, or
    a method drew anew, decays to 0. Under Adam this is not the penalty of ``l2-sp``, whose gradient is normalised.

    The prior is that of Daumé III (arXiv 0907.1815) and one of the baselines of Mixout (arXiv 1909.11299, with 0.01,
    0.04, 0.07 and 0.1) and of Zhang et al. (arXiv 2006.05987), whose program pulls the head to its random start.

    Attributes:
        anchor: By name of the parameter: its pretrained value.
    """

    name: ClassVar[str] = "weight-decay-pretrained"
    excludes: ClassVar[Mapping[str, str]] = {
        "recadam": DOUBLE_PULL,
        "l2-sp": DOUBLE_PULL,
        "bitfit": "the matrices to be pulled would be frozen",
    }

    anchor: Mapping[str, Tensor]

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Turn the direction of the decay for the length of the block.

        Raises:
            ValueError: If the anchor does not fit, or has no matrix.
        """
        targets = self._targets(model)
        if not any(group["weight_decay"] for group in innermost(optimizer).param_groups):
            logger.warning("weight-decay-pretrained does nothing without a weight decay; give one above 0.")

        @contextmanager
        def step() -> Iterator[None]:
            groups = [group for group in innermost(optimizer).param_groups if group["weight_decay"]]
            before = [group["weight_decay"] for group in groups]
            try:
                for group in groups:
                    _decay(group, targets)
                    group["weight_decay"] = 0.0
                yield
            finally:
                for group, decay in zip(groups, before, strict=True):
                    group["weight_decay"] = decay

        with around_steps(optimizer, step):
            yield Applied()

    def _targets(self, model: nn.Module) -> dict[nn.Parameter, Tensor]:
        parameters = dict(model.named_parameters())
        norms = {p for module in model.modules() if is_normalisation(module) for p in module.parameters(recurse=False)}
        found = {parameters[name]: value for name, value in anchored(model, self.anchor).items()}
        targets = {p: value for p, value in found.items() if p.ndim > 1 and p not in norms}
        if not targets:
            raise ValueError(
                f"weight-decay-pretrained pulls matrices, but the anchor has none of this {type(model).__name__}; give "
                "its pretrained values."
            )
        return targets


@torch.no_grad()
def _decay(group: dict, targets: Mapping[nn.Parameter, Tensor]) -> None:
    share = float(group["lr"]) * float(group["weight_decay"])
    for parameter in (p for p in group["params"] if p.grad is not None):
        if parameter in targets:
            parameter.sub_(parameter - targets[parameter], alpha=share)
        else:
            parameter.mul_(1 - share)
