"""Adam without bias correction, as BERT was first fine-tuned."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from ..parts import around_steps, the_adamw
from ..regularizer import Applied, Regularizer, Unfit


@dataclass(frozen=True)
class Undebiased(Regularizer):
    r"""Plain fine-tuning by Adam without bias correction.

    .. math::  \theta_t = (1 - \eta_t w)\, \theta_{t-1} - \eta_t \frac{m_t}{\sqrt{v_t} + \epsilon}

    Its early steps are :math:`(1 - \beta_1^t) / \sqrt{1 - \beta_2^t}` times those of AdamW: 3.2 at the first one, up to
    6.6 and 1.26 at the thousandth. This is the optimizer of the first programs for BERT, to which Mosbach et al. (arXiv
    2006.04884) and Zhang et al. (arXiv 2006.05987) trace failed trainings.
    """

    name: ClassVar[str] = "vanilla-undebiased"
    unfit: ClassVar[Mapping[Unfit, str]] = {
        "several tasks": "it needs parameters that took equally many steps, and heads do not"
    }

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Leave the correction out for the length of the block.

        Raises:
            ValueError: If the optimizer is not AdamW, or, at a step, parameters of a group took unequally many.
        """
        del model
        inner = the_adamw(optimizer, "vanilla-undebiased")

        @contextmanager
        def step() -> Iterator[None]:
            before = [{key: group[key] for key in ("lr", "eps", "weight_decay")} for group in inner.param_groups]
            try:
                for group in inner.param_groups:
                    group.update(_without_correction(inner, group))
                yield
            finally:
                for group, settings in zip(inner.param_groups, before, strict=True):
                    group.update(settings)

        with around_steps(optimizer, step):
            yield Applied()


def _without_correction(optimizer: AdamW, group: dict[str, Any]) -> dict[str, float]:
    r"""The settings at which AdamW takes the step of a group without correction.

    With :math:`c_i = 1 - \beta_i^t` it takes :math:`\eta / c_1 \cdot m / (\sqrt{v / c_2} + \epsilon)`.
    """
    parameters = [p for p in group["params"] if p.grad is not None]
    if not parameters:
        return {}
    counts = {p: optimizer.state[p]["step"] for p in parameters if p in optimizer.state}
    taken = torch.stack([*counts.values()]).unique().tolist() if counts else [0.0]
    if len(taken) > 1 or 0 < len(counts) < len(parameters):
        raise ValueError(
            "Leaving out the bias correction needs parameters that took equally many steps, but some took "
            f"{0 if len(taken) == 1 else int(min(taken))} and others {int(max(taken))}; take another method."
        )
    steps, (beta1, beta2) = int(taken[0]) + 1, group["betas"]
    first, second = 1 - beta1**steps, math.sqrt(1 - beta2**steps)
    ratio = first / second
    return {"lr": group["lr"] * ratio, "eps": group["eps"] / second, "weight_decay": group["weight_decay"] / ratio}
