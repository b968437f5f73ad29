"""R-Drop: two passes with different dropout must agree."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...models import device_of, dropout_sites, infer_objective
from ...objectives import Batch, Predictions, predict
from ..regularizer import Applied, Regularizer
from ..smoothness import further_passes, symmetric_divergence, unwrapped


@dataclass(frozen=True)
class RDrop(Regularizer):
    r"""The loss is the mean over two passes with their own dropout, plus how far their predictions are apart.

    .. math::  \ell = \tfrac{1}{2} (\ell_1 + \ell_2)
               + \alpha \, \tfrac{1}{2} \big(\mathrm{KL}(p_1 \,\|\, p_2) + \mathrm{KL}(p_2 \,\|\, p_1)\big)

    for every example, in sum over its scored tokens (Liang et al. 2021, arXiv 2106.14448; its code has several
    weights of the two parts, this is the form that its text explains). For regression the divergence of two Gaussians
    of variance 1/2 is :math:`(f_1 - f_2)^2`. A step takes about twice as long.

    Attributes:
        weight: Of the divergence, alpha; 0 is fine-tuning as it is, with one pass.

    Raises:
        ValueError: If the weight is negative.
    """

    name: ClassVar[str] = "r-drop"
    order: ClassVar[int] = 1  # it asks for dropout, which others change
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse to reward passes that differ."""
        if not self.weight >= 0:
            raise ValueError(f"The weight of R-Drop must not be negative, got {self.weight:g}.")

    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager[Applied]:
        """Refuse a model without dropout, whose passes agree anyway."""
        if self.weight and not any(site.rate for site in dropout_sites(model, backbone_only=False)):
            raise ValueError(
                f"R-Drop compares passes with different dropout, but every dropout rate of this {type(model).__name__} "
                "is 0; load it with dropout in its configuration."
            )
        return super().applied_to(model, optimizer)

    def penalty(self, model: nn.Module, batch: Batch, predictions: Predictions) -> Tensor | None:
        r""":math:`(\ell_2 - \ell_1) / 2` and the weighted divergence, as the loss is :math:`\ell_1` already."""
        if not self.weight:
            return None
        inner = unwrapped(model)
        with further_passes(), _other_draws(device_of(inner)):
            second = predict(inner, batch, infer_objective(inner))
        more = second.losses().total - predictions.losses().total
        return more / 2 + self.weight * divergence(predictions, second)


def divergence(a: Predictions, b: Predictions) -> Tensor:
    r"""The mean of both Kullback-Leibler divergences of two predictions, summed over the tokens of each example.

    :math:`\tfrac{1}{2} \sum_k (p_k - q_k)(\log p_k - \log q_k)` for classes, :math:`(f_1 - f_2)^2` for numbers.
    """
    both = symmetric_divergence(a, b)
    return both if a.kind == "gaussian" else both / 2


@contextmanager
def _other_draws(device: torch.device) -> Iterator[None]:
    """Random numbers that differ from those before and after the block, which go on as if it had not been.

    The seed is drawn from the generator that dropout draws from, so that it is another one every time, and on a GPU,
    too, where the generator of the CPU may stand still.
    """
    indices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=indices):
        seed = int(torch.randint(2**62, (), device=device))
        torch.default_generator.manual_seed(seed)
        if indices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
