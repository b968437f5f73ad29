"""Gaussian dropout: activations are multiplied by normal noise."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from ...models import backbone_prefix, dropout_sites
from ..parts import forward_replaced, rates_set
from ..regularizer import Applied, Regularizer
from .guided_dropout import SAME_DROPOUT


@dataclass(frozen=True)
class GaussianDropout(Regularizer):
    r"""Activations of the backbone are multiplied by noise with mean 1, at every dropout site.

    .. math::  h' = h \odot n, \qquad n \sim \mathcal{N}(1, \sigma^2), \qquad \sigma = \sqrt{p / (1 - p)}

    which has the mean and the variance of dropout with rate :math:`p` (Srivastava et al. 2014, section 10). The dropout
    of the head stays. The ``"published"`` variant is the baseline in the code of arXiv 2406.14005:
    :math:`\sigma = p / (1 - p)`, and the noise stays on in eval mode, too.

    In a pass with noise, attention is computed step by step ("eager"), because fused kernels know dropout only.

    Attributes:
        rate: Of the dropout that it replaces, p, at every site of the backbone; 0 is no noise at all.
        variant: With the variance of dropout and in training only, or as published.

    Raises:
        ValueError: If not 0 <= rate < 1.
    """

    name: ClassVar[str] = "gaussian-dropout"
    excludes: ClassVar[Mapping[str, str]] = {"guided-dropout": SAME_DROPOUT, "mixout": SAME_DROPOUT}

    rate: float = 0.1
    variant: Literal["matched", "published"] = "matched"

    def __post_init__(self) -> None:
        """Refuse a rate that has no variance."""
        if not 0 <= self.rate < 1:
            raise ValueError(f"The rate of Gaussian dropout must be at least 0 and below 1, got {self.rate:g}.")
        if self.variant not in ("matched", "published"):
            raise ValueError(f"variant must be 'matched' or 'published', got {self.variant!r}.")

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Put noise where dropout was."""
        del optimizer
        sites = dropout_sites(model)
        if not sites:
            raise ValueError(f"Gaussian dropout needs a model with dropout, but a {type(model).__name__} has none.")
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ValueError(
                "Gaussian dropout cannot be had with gradient checkpointing, which would compute activations again "
                "with other noise; turn it off."
            )
        inside = model.get_submodule(backbone_prefix(model).removesuffix("."))
        with rates_set(sites, [self.rate] * len(sites)):
            if not self.rate:
                yield Applied()
                return
            with forward_replaced(inside, self._noisy(inside)):
                yield Applied()

    def _noisy(self, inside: nn.Module) -> Any:
        """The forward pass of the backbone, with noise."""
        plain = inside.forward
        configs = list({id(c): c for m in inside.modules() if (c := getattr(m, "config", None)) is not None}.values())

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not inside.training and self.variant == "matched":
                return plain(*args, **kwargs)
            with _eager_attention(configs), _Noise(self):
                return plain(*args, **kwargs)

        return forward


class _Noise(TorchFunctionMode):
    """Replaces what ``nn.Dropout`` and functional dropout have in common: the function that they call."""

    def __init__(self, method: GaussianDropout) -> None:
        super().__init__()
        self.method = method

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout:
            return self._multiplied(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and _dropout_of_attention(*args, **(kwargs or {})):
            raise ValueError(
                "Gaussian dropout cannot reach the fused attention that this model calls by itself; take a model whose "
                "attention can be 'eager'."
            )
        return func(*args, **(kwargs or {}))

    def _multiplied(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        del inplace  # nobody relies on it: what is returned is used
        if self.method.variant == "published":  # the rate that functional dropout is called with is 0 in eval mode
            return _noisy(x, self.method.rate / (1 - self.method.rate))
        return _noisy(x, math.sqrt(p / (1 - p))) if training and p else x


def _noisy(x: Tensor, deviation: float) -> Tensor:
    return x * (1 + deviation * torch.randn_like(x))


def _dropout_of_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *_: Any,
    **__: Any,
) -> float:
    return dropout_p


@contextmanager
def _eager_attention(configs: Sequence[Any]) -> Iterator[None]:
    """Attention reads its implementation from the config in every forward pass."""
    before = [getattr(config, "_attn_implementation", None) for config in configs]
    changed = [(config, name) for config, name in zip(configs, before, strict=True) if name not in (None, "eager")]
    for config, _ in changed:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, name in changed:
            config._attn_implementation = name
