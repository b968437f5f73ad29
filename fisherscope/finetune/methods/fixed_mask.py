"""Training a part of a model and nothing else: the rest keeps every bit, whatever the optimizer does."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..._typing import Bool
from ...masks import Mask, check_mask, top_fraction
from ...models import align, backbone, backbone_prefix, new_parameters
from ...scores import FisherScores
from ..parts import entries_kept, frozen, gradients_masked
from ..regularizer import Applied, Regularizer
from ..run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SubnetworkUpdate(Regularizer):
    r"""Trains the entries that a mask selects.

    .. math::  \theta_{t+1} = \theta_t + M \odot \Delta_t

    with :math:`\Delta_t` the whole step of the optimizer: an entry that is not selected keeps its value bit for bit
    under weight decay and momentum, too, and adds nothing to the norm that gradients are clipped by. Parameters
    without a selected entry get no gradient and no state in the optimizer. Parameters that the mask does not cover,
    such as the head of the task, are trained.

    Attributes:
        mask: Of the backbone.
    """

    name: ClassVar[str] = "fixed-mask"
    order: ClassVar[int] = -2
    replaced: ClassVar[Mapping[str, Sequence[str]]] = {"mask": ("fraction",)}

    mask: Mask

    def __post_init__(self) -> None:
        """Refuse what is no mask."""
        check_mask(self.mask)

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Train the selected entries for the length of the block.

        Raises:
            MaskMismatch: If the mask is for another model.
            ValueError: If there is nothing to train.
        """
        masks = self.mask.for_model(model)
        if free := [name for name, _ in model.named_parameters() if name not in masks]:
            logger.info("%d parameters that the mask lacks are trained, the first is '%s'.", len(free), free[0])
        with train_only(model, optimizer, masks):
            yield Applied()

    @classmethod
    def for_run(cls, run: Run, *, fraction: float = 0.5, **settings: Any) -> "SubnetworkUpdate":
        """For the run's mask; without one, for the highest Fisher scores of the backbone.

        Args:
            run: The run.
            fraction: Share of the entries of the backbone to select, where no mask is given.
            settings: None.
        """
        if run.mask is None:
            mask = top_fraction(scores_of(run.supply("scores"), run.model, backbone_names(run.model)), fraction)
        else:
            mask = run.supply("mask")
        return cls(checked(mask), **settings)


def checked(mask: Mask) -> Mask:
    """The mask of a run without the fingerprint of weights, which will move: the run has compared it."""
    origin = {key: value for key, value in mask.provenance["model"].items() if key != "backbone_fingerprint"}
    return Mask(mask.tensors, {**mask.provenance, "model": origin})


@contextmanager
def train_only(model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Bool[Tensor, "..."]]) -> Iterator[None]:
    """Let nothing but the selected entries change.

    Args:
        model: The model.
        optimizer: Of its parameters.
        masks: By name of the parameter; those that are missing are trained whole.

    Raises:
        ValueError: If nothing is selected.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    counts = {name: int(masks[name].sum()) if name in masks else p.numel() for name, p in parameters.items()}
    total, selected = sum(p.numel() for p in parameters.values()), sum(counts.values())
    if not selected:
        raise ValueError(
            f"A sub-network needs at least one entry to train, but none of {total:,} is selected; take a larger mask."
        )
    nothing = [p for name, p in parameters.items() if not counts[name]]
    partly = {p: masks[name].to(p.device) for name, p in parameters.items() if 0 < counts[name] < p.numel()}
    logger.info(
        "Training %s of %s entries; %d parameters are frozen, which saves %s bytes of Adam's two moments.",
        f"{selected:,}",
        f"{total:,}",
        len(nothing),
        f"{sum(2 * p.numel() * p.element_size() for p in nothing):,}",
    )
    with frozen(nothing), gradients_masked(partly), entries_kept(optimizer, partly):
        yield


def whole(model: nn.Module, trained: Collection[str]) -> dict[str, Bool[Tensor, "..."]]:
    """Masks that select some parameters whole and nothing else; they take no memory."""
    return {name: torch.tensor(name in trained).expand(p.shape) for name, p in model.named_parameters()}


def backbone_names(model: nn.Module) -> list[str]:
    """The parameters of the backbone, without heads and poolers, by the model's names."""
    prefix = backbone_prefix(model)
    return [prefix + name for name in backbone(dict(model.named_parameters()), prefix)]


def new_names(model: nn.Module) -> set[str]:
    """The parameters outside the base model, which are the head of the task, and those that its checkpoint lacked.

    A pooler that came with the checkpoint is not among them.

    Raises:
        ValueError: If the checkpoint lacked them all.
    """
    prefix, inside, new = backbone_prefix(model), set(backbone_names(model)), set(new_parameters(model))
    if new and inside <= new:
        raise ValueError(
            "This method trains what a checkpoint lacks, but all weights of this model are drawn at random; begin with "
            "pretrained ones, or take another method."
        )
    outside = {n for n, _ in model.named_parameters() if n not in inside and not (prefix and n.startswith(prefix))}
    return outside | new


def scores_of(scores: FisherScores, model: nn.Module, names: Collection[str]) -> FisherScores:
    """The scores of some parameters of a model, by the model's names.

    Raises:
        ValueError: If a score is missing.
    """
    prefix = scores.provenance.get("model", {}).get("prefix", backbone_prefix(model))
    own = align(scores, prefix, model)
    if missing := next((name for name in names if name not in own), None):
        raise ValueError(
            f"The scores do not fit this model: they have nothing of the shape of '{missing}'; estimate them for it."
        )
    return replace(scores, tensors={name: own[name] for name in names}, first_half=None, quarters=None)
