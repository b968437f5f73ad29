"""A random sub-network: what any other choice of the same size has to beat."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from ...masks import Mask, random_fraction, random_like
from ..regularizer import Applied, Regularizer
from ..run import Run
from .fixed_mask import backbone_names, checked, train_only


@dataclass(frozen=True)
class RandomMask(Regularizer):
    r"""Trains a random share of every parameter of the backbone, drawn once, and the head.

    .. math::  \theta_{t+1} = \theta_t + M \odot \Delta_t, \qquad |M_k| = \mathrm{round}(f\, n_k)

    for parameter :math:`k` with :math:`n_k` entries. The entries that are not drawn keep their values bit for bit. The
    draw depends on the seed and the backbone alone, not on the head or the device.

    With a mask it is the control of that mask: as many entries of every parameter, drawn at random
    (:func:`~fisherscope.masks.random_like`), and the parameters that the mask lacks.

    Attributes:
        fraction: Share of the entries of every parameter of the backbone that is trained, above 0.
        seed: Of the draw.
        mask: What it is a control of, in place of the fraction.

    Raises:
        ValueError: If the fraction is out of range.
    """

    name: ClassVar[str] = "random-mask"
    order: ClassVar[int] = -2
    replaced: ClassVar[Mapping[str, Sequence[str]]] = {"mask": ("fraction",)}

    fraction: float = 0.5
    seed: int = 0
    mask: Mask | None = None

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {self.fraction:g}.")

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Train the drawn entries for the length of the block.

        Raises:
            MaskMismatch: If the mask is for another model.
        """
        with train_only(model, optimizer, self._drawn(model)):
            yield Applied()

    def _drawn(self, model: nn.Module) -> Mapping[str, torch.Tensor]:
        if self.mask is not None:
            return random_like(self.mask, seed=self.seed).for_model(model)
        parameters = dict(model.named_parameters())
        shapes = Mask({name: torch.zeros(parameters[name].shape, dtype=torch.bool) for name in backbone_names(model)})
        return random_fraction(shapes, self.fraction, seed=self.seed, stratify="parameter")

    @classmethod
    def for_run(cls, run: Run, **settings: Any) -> "RandomMask":
        """Drawn by the seed of the run, for its mask if it has one."""
        mask = None if run.mask is None else checked(run.supply("mask"))
        return cls(seed=run.supply("seed"), mask=mask, **settings)
