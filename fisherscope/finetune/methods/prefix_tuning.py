"""Prefix tuning: training keys and values before the text, in every layer."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..adapters import ADAPTER, ENCODER, VirtualTokens, excluded_by, require_peft


@dataclass(frozen=True)
class PrefixTuning(VirtualTokens):
    r"""Trains keys and values of attention that every layer sees before those of a text, and the head.

    .. math::  \mathrm{softmax}\big(Q [P_K; K]^\top / \sqrt{d_h}\big) [P_V; V],
               \qquad P_K, P_V \in \mathbb{R}^{m \times d}

    for each of the :math:`L` layers, :math:`2 L m d` entries, while the backbone is frozen (Li and Liang 2021, arXiv
    2101.00190; for classifiers Liu et al. 2022, arXiv 2110.07602). They are drawn from a normal distribution and
    trained directly, not through a network. No weight can hold them: leaving the block takes them away, and
    measurements with them belong inside. They need a far higher learning rate than plain fine-tuning, 1e-2 for
    instance, and many more steps.

    Attributes:
        virtual_tokens: Number of trained tokens before the text, m.
        seed: Draws the keys and values.

    Raises:
        ValueError: If there is no token.
    """

    name: ClassVar[str] = "prefix-tuning"
    excludes: ClassVar[Mapping[str, str]] = excluded_by("prefix-tuning")
    needs: ClassVar[str] = "keys and values from before the text"

    virtual_tokens: int = 20
    seed: int = 0

    def encoder(self, model: nn.Module) -> nn.Module:
        """Keys and values of all layers."""
        return self._peft_model(model).prompt_encoder[ADAPTER]

    def inputs(self, model: nn.Module) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Keys and values as if the tokens had been read before."""
        wrapper = self._peft_model(model)
        wrapper.prompt_encoder = model.get_submodule(ENCODER)

        def change(inputs: dict[str, Any]) -> dict[str, Any]:
            return {**inputs, "past_key_values": wrapper.get_prompt(len(inputs["attention_mask"]))}

        return change

    def _peft_model(self, model: nn.Module) -> Any:
        """What knows the shapes of keys and values of a model."""
        peft = require_peft()
        config = peft.PrefixTuningConfig(num_virtual_tokens=self.virtual_tokens, task_type="FEATURE_EXTRACTION")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks models for what transformers renamed
            return peft.PeftModelForFeatureExtraction(model, config, ADAPTER)
