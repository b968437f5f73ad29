"""RecAdam: Adam that recalls the pretrained weights first and learns the task later."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from ..parts import anchored, steps_rewritten, the_adamw
from ..regularizer import Applied, Regularizer
from .pretrained_decay import DOUBLE_PULL

Anneal = Literal["sigmoid", "linear", "constant"]

_OWN_ADAM = "RecAdam is an Adam of its own"
_NO_ANCHOR = "what it adds has no pretrained value, and the rest is frozen"


@dataclass(frozen=True)
class RecAdam(Regularizer):
    r"""Adam with a pull to the pretrained weights that fades (Chen et al., arXiv 2004.12651).

    .. math::
        \lambda_t &= \sigma(k (t - t_0)) \\
        \theta' &= \theta_{t-1} - \lambda_t \eta_t \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \frac{m_t}{\sqrt{v_t} + \epsilon} \\
        \theta'' &= \theta' - \eta_t (1 - \lambda_t) \gamma (\theta' - \theta^*) \\
        \theta_t &= \theta'' - \eta_t w \theta''

    with :math:`m, v` the moments of the gradient of the task alone, :math:`\theta^*` the pretrained values, :math:`w`
    the weight decay and :math:`t` counting optimizer steps. It holds for all pretrained parameters, biases,
    normalisations and embeddings among them; others take AdamW's own steps. The defaults :math:`\gamma` and :math:`k`
    are published, where :math:`t_0` is 250 to 1,000 of 7,800 to 61,360 steps.

    Attributes:
        anchor: By name of the parameter: its pretrained value.
        total_steps: Optimizer steps of the training.
        gamma: Strength of the pull; times the learning rate it must stay below 2.
        k: Steepness of the change from recalling to learning, per step.
        t0: Steps until half of the change, or their share of all steps if it is below 1.
        anneal: How the share of the task grows: sigmoid, linear (up to step t0) or constant (at 1, without a pull).

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "recadam"
    excludes: ClassVar[Mapping[str, str]] = {
        "weight-decay-pretrained": DOUBLE_PULL,
        "vanilla-undebiased": _OWN_ADAM,
        **dict.fromkeys(("lora", "prefix-tuning", "prompt-tuning"), _NO_ANCHOR),
    }

    anchor: Mapping[str, Tensor]
    total_steps: int
    gamma: float = 5000.0
    k: float = 0.5
    t0: float = 0.1
    anneal: Anneal = "sigmoid"

    def __post_init__(self) -> None:
        """Refuse what never lets go, or never holds."""
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma:g}.")
        if not self.k > 0:
            raise ValueError(f"k must be above 0, got {self.k:g}; the share of the task would stay at a half.")
        if not 0 < self.t0 < self.total_steps and self.anneal != "constant":
            raise ValueError(
                f"t0 must be above 0 and below the {self.total_steps} steps of the training, got {self.t0:g}; give a "
                "share of the steps, such as 0.1."
            )
        if self.anneal not in get_args(Anneal):
            raise ValueError(f"anneal must be one of {', '.join(get_args(Anneal))}, got {self.anneal!r}.")

    def task_share(self, step: int) -> float:
        r""":math:`\lambda_t` of a step, counted from 1."""
        middle = self.t0 * self.total_steps if self.t0 < 1 else self.t0
        if self.anneal == "constant":
            return 1.0
        if self.anneal == "linear":
            return min(1.0, step / middle)
        x = self.k * (step - middle)
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Take steps of RecAdam for the length of the block.

        Raises:
            ValueError: If the anchor does not fit, the optimizer is not AdamW, or the pull would throw weights out.
        """
        inner = the_adamw(optimizer, "RecAdam")
        parameters = dict(model.named_parameters())
        anchor = {parameters[name]: value for name, value in anchored(model, self.anchor).items()}
        for group in inner.param_groups:
            self._check_rate(float(group.get("initial_lr", group["lr"])), self.task_share(1))

        def rewrite(parameter: nn.Parameter, before: Tensor, group: dict[str, Any]) -> None:
            state, rate = inner.state[parameter], float(group["lr"])
            steps, (beta1, beta2) = int(state["step"]), group["betas"]
            share = self.task_share(steps)
            self._check_rate(rate, share)
            size = rate * math.sqrt(1 - beta2**steps) / (1 - beta1**steps) * share
            spread = state["exp_avg_sq"].sqrt().add_(group["eps"])
            parameter.copy_(before.addcdiv(state["exp_avg"], spread, value=-size))
            parameter.sub_(parameter - anchor[parameter], alpha=rate * (1 - share) * self.gamma)
            parameter.mul_(1 - rate * group["weight_decay"])

        with steps_rewritten(optimizer, list(anchor), rewrite):
            yield Applied()

    def _check_rate(self, rate: float, share: float) -> None:
        if not rate * self.gamma * (1 - share) < 2:
            raise ValueError(
                f"The pull of RecAdam diverges unless learning rate times gamma is below 2, but it is {rate:g} times "
                f"{self.gamma:g}; lower one of them."
            )
