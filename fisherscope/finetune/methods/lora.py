"""LoRA: training a sum of low rank beside frozen matrices."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ...models import query_value_layers
from ..adapters import ADAPTER, Adapter, excluded_by, require_peft


@dataclass(frozen=True)
class LoRA(Adapter):
    r"""Trains a product of two small matrices beside every matrix that makes queries or values, and the head.

    .. math::  W' = W + \frac{\alpha}{r} B A,
               \qquad A \in \mathbb{R}^{r \times d_{in}},\; B \in \mathbb{R}^{d_{out} \times r}

    with :math:`W` frozen, :math:`B = 0` and :math:`A` drawn in the beginning (Hu et al. 2021, arXiv 2106.09685); peft
    computes it. Leaving the block writes :math:`W'` into the weights, so that the model is a plain one. A factor
    :math:`\alpha / r` of 2 is that of the paper's settings for RoBERTa. The rate of plain fine-tuning, 2e-5, is too low
    for :math:`A` and :math:`B`, and so are three epochs of a small task: the paper takes 4e-4 and 20 epochs or more,
    and starts its small tasks from MNLI.

    Attributes:
        rank: Rank of the product, r.
        lora_alpha: The product is multiplied by this over the rank.
        lora_dropout: Share of the inputs of A that is dropped.
        seed: Draws A.

    Raises:
        ValueError: If a setting is out of range.
    """

    name: ClassVar[str] = "lora"
    excludes: ClassVar[Mapping[str, str]] = {
        **excluded_by("lora"),
        "guided-dropout": "it looks scores up by the names of layers, which are other ones with LoRA",
    }

    rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.rank < 1:
            raise ValueError(f"The rank of LoRA must be at least 1, got {self.rank}.")
        if not self.lora_alpha > 0:
            raise ValueError(f"The lora_alpha of LoRA must be above 0, got {self.lora_alpha:g}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"The lora_dropout of LoRA must be at least 0 and below 1, got {self.lora_dropout:g}.")

    def added(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """A and B of every layer."""
        mine = (f".lora_A.{ADAPTER}.", f".lora_B.{ADAPTER}.")
        return {name: p for name, p in model.named_parameters() if any(part in name for part in mine)}

    def add(self, model: nn.Module) -> None:
        """Put A and B beside the layers that make queries and values."""
        from transformers.pytorch_utils import Conv1D

        peft = require_peft()
        layers = query_value_layers(model)
        if not layers:
            raise ValueError(
                f"LoRA works on the linear layers that make the queries and values of attention, but a "
                f"{type(model).__name__} has none; take another method."
            )
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=layers,
            fan_in_fan_out=any(isinstance(model.get_submodule(path), Conv1D) for path in layers),
        )
        peft.inject_adapter_in_model(config, model, ADAPTER)
        del model.peft_config

    def remove(self, model: nn.Module) -> None:
        """Write the sums into the weights, and put the plain layers back."""
        for path, layer in _wrapped(model):
            layer.merge()
            model.set_submodule(path, layer.get_base_layer())

    def computing(self, model: nn.Module) -> AbstractContextManager[None]:
        """The layers do it."""
        del model
        return nullcontext()


def _wrapped(model: nn.Module) -> list[tuple[str, Any]]:
    layer = require_peft().tuners.lora.LoraLayer
    layers: list[tuple[str, Any]] = [(path, m) for path, m in model.named_modules() if isinstance(m, layer)]
    return [(path, m) for path, m in layers if ADAPTER in m.lora_A]
