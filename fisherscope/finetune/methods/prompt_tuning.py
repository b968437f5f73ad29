"""Prompt tuning: training the embeddings of tokens before the text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..adapters import ADAPTER, ENCODER, VirtualTokens, excluded_by, require_peft


@dataclass(frozen=True)
class PromptTuning(VirtualTokens):
    r"""Trains the embeddings of tokens before every text, and the head; the backbone is frozen.

    .. math::  [P; E(x)], \qquad P \in \mathbb{R}^{m \times d}

    in place of the embeddings :math:`E(x)` of a text (Lester et al. 2021, arXiv 2104.08691). :math:`P` begins with the
    embeddings of words drawn from the vocabulary, as in the paper. No weight can hold :math:`P`: leaving the block
    takes it away, and measurements with it belong inside. It needs a far higher learning rate than plain fine-tuning,
    1e-2 for instance, and many more steps; on small models it may stay at chance.

    Attributes:
        virtual_tokens: Number of trained tokens before the text, m.
        seed: Draws the words.

    Raises:
        ValueError: If there is no token.
    """

    name: ClassVar[str] = "prompt-tuning"
    excludes: ClassVar[Mapping[str, str]] = excluded_by("prompt-tuning")
    needs: ClassVar[str] = "embeddings in place of tokens"

    virtual_tokens: int = 20
    seed: int = 0

    def encoder(self, model: nn.Module) -> nn.Module:
        """The embeddings of words of the vocabulary."""
        peft, embeddings = require_peft(), model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        config = peft.PromptTuningConfig(
            num_virtual_tokens=self.virtual_tokens,
            token_dim=embeddings.embedding_dim,
            num_transformer_submodules=1,
            prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB,
        )
        return peft.PromptEmbedding(config, embeddings)

    def inputs(self, model: nn.Module) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Embeddings in place of tokens; the tokens before the text belong to its first segment."""
        embeddings, encoder = model.get_input_embeddings(), model.get_submodule(f"{ENCODER}.{ADAPTER}")  # pyright: ignore

        def change(inputs: dict[str, Any]) -> dict[str, Any]:
            tokens, text = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
            text = embeddings(tokens) if text is None else text
            prompt = encoder(torch.arange(self.virtual_tokens, device=text.device))
            inputs["inputs_embeds"] = torch.cat([prompt.to(text.dtype).expand(len(text), -1, -1), text], 1)
            if (segments := inputs.get("token_type_ids")) is not None:
                inputs["token_type_ids"] = torch.cat([segments.new_zeros(len(text), self.virtual_tokens), segments], 1)
            return inputs

        return change
