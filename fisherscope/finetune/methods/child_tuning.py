"""Child-Tuning: gradients of a part of the entries, drawn anew at every step (F) or chosen once by score (D)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ... import storage
from ..._typing import Bool
from ...data import describe_batches
from ...masks import top_fraction
from ...models import describe, device_of, measuring
from ...objectives import predict
from ...scores import FisherScores
from ..parts import after_steps, before_steps, gradients_masked
from ..regularizer import Applied, Regularizer
from ..run import Run
from .fixed_mask import scores_of
from .top_k_layers import numbered_layers


@dataclass(frozen=True)
class ChildTuningF(Regularizer):
    r"""Uses a random part of the gradient at every optimizer step (Child-Tuning F, Xu et al., arXiv 2109.05687).

    .. math::  \hat g_t = g_t \odot M_t / p, \qquad M_t \sim \mathrm{Bernoulli}(p), \qquad \mathrm{E}\,\hat g_t = g_t

    for every entry of every parameter; :math:`M_t` is the same for all micro-batches of a step. Gradients are masked
    before they are clipped and divided by p after. Momentum and weight decay move the other entries, too.

    Attributes:
        keep: Probability p that an entry's gradient is used, above 0; 1 is plain fine-tuning.
        seed: Of the draws.

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    name: ClassVar[str] = "child-tuning-f"

    keep: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        _check(self.keep)

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Mask gradients at random for the length of the block."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        drawn = _Drawn(parameters, self.keep, self.seed)

        def scale() -> None:
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(self.keep)

        with gradients_masked(drawn.masks), before_steps(optimizer, scale), after_steps(optimizer, drawn.advance):
            yield drawn


class _Drawn(Applied):
    """The masks of one step. Every mask has its own seed, so that the number of the step is all there is to keep."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], keep: float, seed: int) -> None:
        self.masks: dict[nn.Parameter, Bool[Tensor, "..."]] = {}
        self._parameters, self._keep, self._seed = parameters, keep, seed
        self._draw(0)

    def _draw(self, step: int) -> None:
        self._step = step
        for name, parameter in self._parameters.items():
            seed = int(storage.digest(f"{self._seed} {step} {name}"), 16)
            generator = torch.Generator(parameter.device).manual_seed(seed)
            mask = torch.empty(parameter.shape, dtype=torch.bool, device=parameter.device)
            self.masks[parameter] = mask.bernoulli_(self._keep, generator=generator)

    def advance(self) -> None:
        """Draw for the next step."""
        self._draw(self._step + 1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"step": torch.tensor(self._step)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._draw(int(state["step"]))


@dataclass(frozen=True)
class ChildTuningD(Regularizer):
    r"""Uses the gradient of the entries with the highest scores (Child-Tuning D, Xu et al., arXiv 2109.05687).

    .. math::  \hat g_t = g_t \odot M, \qquad M = \mathrm{top}_{\mathrm{round}(p\,n)}(F)

    over all :math:`n` entries of the numbered layers of the backbone together; embeddings, pooler and head are not
    masked. Gradients are masked before they are clipped. As published, only gradients are masked: decoupled weight
    decay moves the other entries, :math:`w_t = w_0 \prod_s (1 - \eta_s \lambda)`; without it, and with a fresh
    optimizer, they keep their values bit for bit. ``fixed-mask`` keeps them in any case.

    Attributes:
        scores: Of the model, or of its layers.
        keep: Share p of the entries of the layers whose gradient is used, above 0; ties are broken by position.

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    name: ClassVar[str] = "child-tuning-d"

    scores: FisherScores
    keep: float = 0.3

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        _check(self.keep)

    def masks(self, model: nn.Module) -> dict[str, Bool[Tensor, "..."]]:
        """What gets a gradient, by parameter of the numbered layers.

        Raises:
            ValueError: If the model has no numbered layers, or a score is missing.
        """
        return dict(top_fraction(scores_of(self.scores, model, _in_layers(model)), self.keep))

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Mask gradients by score for the length of the block."""
        del optimizer
        parameters = dict(model.named_parameters())
        masks = {parameters[name]: mask.to(parameters[name].device) for name, mask in self.masks(model).items()}
        with gradients_masked(masks):
            yield Applied()

    @classmethod
    def for_run(cls, run: Run, *, variant: Literal["exact", "published"] = "exact", **settings: Any) -> "ChildTuningD":
        """With Fisher scores of the training examples.

        Args:
            run: The run.
            variant: Rank by the mean of the examples' squared gradients, or as the published code does: by the square
                of every batch's mean gradient, with dropout, the gradient of every parameter clipped by its norm.
            settings: The fields.
        """
        if variant not in ("exact", "published"):
            raise ValueError(f"variant must be 'exact' or 'published', got {variant!r}.")
        return cls(run.supply("scores") if variant == "exact" else _published_scores(run), **settings)


def _published_scores(run: Run) -> FisherScores:
    r""":math:`\frac1{N_b} \sum_b \mathrm{clip}(\bar g_b)^2` in train mode, by parameter of the numbered layers.

    It is no Fisher information: independent examples have
    :math:`\mathrm{E}\,\bar g_b^2 = \mathrm{E}\,g^2 / B + (1 - 1/B)\, (\mathrm{E}\,g)^2`.
    """
    limit = run.settings.get("max_grad_norm", 1.0) or float("inf")
    names, device = _in_layers(run.model), device_of(run.model)
    parameters = dict(run.model.named_parameters())
    sums = {name: torch.zeros_like(parameters[name], requires_grad=False) for name in names}
    with measuring(run.model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        run.model.train()
        torch.manual_seed(run.seed)
        for batch in run.batches:
            loss = predict(run.model, batch, run.objective).losses().mean.mean()
            gradients = torch.autograd.grad(loss, [parameters[name] for name in names], materialize_grads=True)
            for name, gradient in zip(names, gradients, strict=True):
                sums[name] += (gradient * (limit / (gradient.norm() + 1e-6)).clamp(max=1)).square()
    facts = {"model": describe(run.model), "data": describe_batches(run.batches), "objective": run.objective}
    tensors = {name: (total / len(run.batches)).cpu() for name, total in sums.items()}
    return FisherScores(
        tensors, len(run.batches), "squared-batch-mean", provenance=storage.provenance(**facts, max_grad_norm=limit)
    )


def _in_layers(model: nn.Module) -> list[str]:
    names = [name for names in numbered_layers(model).values() for name in names]
    if not names:
        raise ValueError(f"Child-Tuning D masks numbered layers, but a {type(model).__name__} has none.")
    return names


def _check(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep:g}.")
