"""R3F and R4F: predictions must not change when the word embeddings move a little."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...models import OTHER_TASKS, infer_objective
from ...objectives import Batch, Predictions, is_language_model
from ..parts import SAME_MATRICES, reparametrized
from ..regularizer import Applied, Regularizer
from ..smoothness import Dropout, Lookup, OfPasses, exact_dtype, normal, symmetric_divergence

Noise = Literal["uniform", "normal"]


@dataclass(frozen=True)
class R3F(OfPasses):
    r"""The predictions for noised word embeddings must agree with those for the embeddings.

    .. math::  \ell = \ell_{\text{task}} + \lambda \big(\mathrm{KL}(p_x \,\|\, p_{x + z})
               + \mathrm{KL}(p_{x + z} \,\|\, p_x)\big), \qquad z \sim U(-\epsilon, \epsilon)
               \text{ or } N(0, \epsilon^2)

    for every example, in sum over its scored tokens, with one :math:`z` for every entry of every word embedding of the
    batch, before positions are added (arXiv 2008.03156, section 2). Gradients flow through both predictions, but
    not into the table of embeddings that noise was added to. For regression, which the paper leaves out, the
    divergence is :math:`(f_x - f_{x + z})^2`.

    The authors' code gives the second pass dropout of its own, which is the default. The predictions then differ by
    dropout far more than by noise of the default size, so that the method is close to R-Drop. With the same
    dropout they differ by the noise alone, and the term is as good as 0 unless ``eps`` is some hundred times larger,
    or lost in rounding with precision bfloat16 or float16. A step takes about twice as long.

    Attributes:
        weight: Of the divergence, lambda; 0 is fine-tuning as it is, with one pass.
        eps: Size of the noise: its largest value if it is uniform, its standard deviation if it is normal.
        noise: Distribution of the noise.
        second_dropout: What the pass with noise drops, something of its own or the same as the other pass.
        seed: Of the noise.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "r3f"

    weight: float = 1.0
    eps: float = 1e-5
    noise: Noise = "uniform"
    second_dropout: Dropout = "own"

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        if not self.weight >= 0:
            raise ValueError(f"The weight of {self.name} must not be negative, got {self.weight:g}.")
        if not self.eps > 0:
            raise ValueError(f"eps is the size of the noise and must be above 0, got {self.eps:g}.")
        if self.noise not in ("uniform", "normal"):
            raise ValueError(f"noise must be 'uniform' or 'normal', got {self.noise!r}.")
        if self.second_dropout not in ("own", "same"):
            raise ValueError(f"second_dropout must be 'own' or 'same', got {self.second_dropout!r}.")

    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager[Applied]:
        """Follow the passes of the model; with weight 0 do nothing."""
        return super().applied_to(model, optimizer) if self.weight else Regularizer.applied_to(self, model, optimizer)

    def penalty(self, model: nn.Module, batch: Batch, predictions: Predictions) -> Tensor | None:
        """The weighted divergence of a pass with noise."""
        if not self.weight:
            return None
        passes = self.passes_of(model)
        generator = passes.generator()

        def drawn(number: int, lookup: Lookup) -> Tensor:
            return self.eps * _noise(self.noise, lookup.embeddings, generator)

        noised, _ = passes.shifted(batch, drawn, predictions, self.second_dropout)
        return self.weight * symmetric_divergence(predictions, noised)


def _noise(kind: Noise, like: Tensor, generator: torch.Generator) -> Tensor:
    if kind == "normal":
        return normal(like, generator)
    drawn = torch.rand(like.shape, generator=generator, device=like.device, dtype=exact_dtype(like))
    return 2 * drawn - 1


@dataclass(frozen=True)
class R4F(R3F):
    r"""R3F, and a last layer that cannot stretch: its weight is used with spectral norm 1.

    .. math::  \hat W = W / \sigma_{\max}(W)

    for the weight :math:`W` of the linear layer that gives the logits, of every task (arXiv 2008.03156, section 2). The
    norm is exact in every pass, from singular values, and gradients flow through it; power iteration, which the authors
    use, approaches it. The model computes with :math:`\hat W` in eval mode, too; after the training it is written into
    the plain weight, so that a saved model needs nothing else.

    Attributes:
        weight: Of the divergence, lambda; 0 leaves a head with spectral norm 1, with one pass.
        eps: Size of the noise: its largest value if it is uniform, its standard deviation if it is normal.
        noise: Distribution of the noise.
        second_dropout: What the pass with noise drops, something of its own or the same as the other pass.
        seed: Of the noise.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "r4f"
    excludes: ClassVar[Mapping[str, str]] = {"dps-mix": SAME_MATRICES}

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Also normalise the last layer for the length of the block.

        Raises:
            ValueError: If no linear layer gives the logits, or it is shared with the embeddings.
        """
        names = last_layers(model)
        with super().applied_to(model, optimizer) as applied:
            try:
                with reparametrized(model, dict.fromkeys(names, normalised)):
                    yield applied
            finally:
                with torch.no_grad():
                    for weight in map(model.get_parameter, names):
                        weight.copy_(normalised(weight))


def normalised(weight: Tensor) -> Tensor:
    r""":math:`W / \sigma_{\max}(W)`."""
    exact = weight.to(exact_dtype(weight))
    return (exact / torch.linalg.matrix_norm(exact, 2).clamp(min=1e-12)).to(weight.dtype)


def last_layers(model: nn.Module) -> list[str]:
    """Names of the weights of the linear layers that give the logits of heads with labels, one for every task.

    Raises:
        ValueError: If there is none.
    """
    outputs = getattr(getattr(model, "config", None), "num_labels", None)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    own = [n for n, m in linear.items() if m.out_features == outputs and not n.startswith(f"{OTHER_TASKS}.")]
    others = {n.split(".")[1]: n for n in linear if n.startswith(f"{OTHER_TASKS}.")}  # the last of each head
    if is_language_model(infer_objective(model)) or not own:
        raise ValueError(
            f"R4F normalises the linear layer that gives the logits of a few labels, but a {type(model).__name__} has "
            "none; take R3F for it."
        )
    return [f"{name}.weight" for name in (own[-1], *others.values())]
