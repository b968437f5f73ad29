"""Stages before a fine-tuning: more pretraining on text, or another task first.

A stage is a :class:`Plan` of its own, without a method. The training after it starts from the same checkpoint, with the
values of the stage's backbone (and pooler, where both have one): heads are drawn as without the stage.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .. import distributed, storage
from ..data import Batches, Source, load_batches, read_source
from ..data.encoding import DEFAULT_MAX_LENGTH
from ..data.pairs import next_sentence_pairs, sentences_of
from ..models import has_next_sentence_head, saved_objective
from ..objectives import Batch, Predictions
from .plan import Plan, data_of
from .protocol import DEFAULT
from .recipe import Recipe
from .regularizer import Applied, Regularizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ADAPT_MLM, INTERMEDIATE_TASK = "adapt-mlm", "intermediate-task"

MOST_PASSES = 10
"""Over a text, with masks and pairs of their own; further passes repeat them."""


@dataclass(frozen=True)
class NextSentence(Regularizer):
    r"""The loss of every example gets that of saying whether its second text follows the first.

    .. math::  \ell = \sum_t -\log p(y_t) + T \cdot (-\log p(\text{follows}))

    with T the number of masked tokens, so that both losses weigh alike in the mean over tokens; BERT's own mean of the
    second one is over examples (Devlin et al. 2019, arXiv 1810.04805, appendix A.2). For models with a head for both.
    """

    _said: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Keep what the head says of a batch until the penalty is asked for."""

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._said["pairs"] = output.seq_relationship_logits

        handle = model.register_forward_hook(keep)
        try:
            yield Applied()
        finally:
            handle.remove()
            self._said.clear()

    def penalty(self, model: nn.Module, batch: Batch, predictions: Predictions) -> Tensor | None:
        r""":math:`T \cdot (-\log p)`."""
        logits = self._said.pop("pairs").float()
        labels = batch["next_sentence_label"].to(logits.device)
        return F.cross_entropy(logits, labels, reduction="none") * predictions.count


def with_stages(
    plan: Plan,
    recipe: Recipe,
    pretrain_text: str | Path | None,
    pretrain_steps: int | None,
    intermediate_task: str | None,
    data_dir: str | Path | None,
) -> Plan:
    """The plan, after the stages that the other arguments ask for; the last four are those of ``finetune``.

    Args:
        plan: Of the training after them.
        recipe: Of the stages: what the user gave, without what a method makes of it.
        pretrain_text: Texts.
        pretrain_steps: Optimizer steps on them; with 0 there is no such stage.
        intermediate_task: Name of a task.
        data_dir: Of its files.

    Raises:
        ValueError: If the model was not pretrained on masked tokens, or the arguments do not fit each other.
    """
    bare = replace(
        plan, recipe=recipe, method="vanilla", settings={}, scores=None, mask=None, forgetting=None, train_size=None,
        validation=None, protocol=DEFAULT,
    )  # fmt: skip
    if pretrain_steps is not None and pretrain_text is None:
        raise ValueError("pretrain_steps goes with pretrain_text only; leave it out.")
    if pretrain_steps is not None and pretrain_steps < 0:
        raise ValueError(f"pretrain_steps must not be negative, got {pretrain_steps}.")
    if pretrain_text is not None and pretrain_steps != 0:
        plan = replace(plan, before=_adaptation(bare, pretrain_text, pretrain_steps))
    if intermediate_task is not None:
        data = data_of(plan.model, plan.revision, task=intermediate_task, data_dir=data_dir)
        first = replace(bare, **data | {"validation": None}, stage=INTERMEDIATE_TASK, before=plan.before)
        plan = replace(plan, before=first)
    return plan


def _adaptation(bare: Plan, text: str | Path, steps: int | None) -> Plan:
    try:
        found = "a head for " + saved_objective(bare.model, revision=bare.revision)
    except ValueError:
        found = "no head for it"
    if found != "a head for mlm":
        raise ValueError(
            f"pretrain_text goes on with masked language modelling (mlm), but {bare.model} was saved with {found}; "
            "take a checkpoint that was pretrained so, or leave pretrain_text out."
        )
    source = read_source(text, objective="mlm")
    pairs = has_next_sentence_head(bare.model, revision=bare.revision) and len(_documents(source)) > 1
    if not pairs:
        logger.info("Masked tokens only: pairs need a model with a head for them, and documents of several sentences.")
    recipe = replace(bare.recipe, epochs=1.0, max_steps=steps)
    return replace(
        bare, objective="mlm", name=source.name, metric="loss", train=source, recipe=recipe, stage=ADAPT_MLM,
        method=NextSentence() if pairs else "vanilla",
    )  # fmt: skip


def _documents(source: Source) -> list[list[str]]:
    """The texts of at least two sentences; none if the texts are pairs already."""
    texts = [sentences_of(row[0]) for row in source.texts if len(row) == 1]
    return [sentences for sentences in texts if len(sentences) > 1]


def adaptation_batches(plan: Plan, seed: int, tokenizer: "PreTrainedTokenizerBase") -> Batches:
    """The examples of a stage of pretraining: the text as often as the steps need it, masked anew each time.

    Masks and pairs depend on seed and pass; after :data:`MOST_PASSES` they come again.
    """
    first = _one_pass(plan, seed, 0, tokenizer)
    a_step = plan.recipe.batch_size * plan.recipe.accumulate * distributed.world_size()
    passes = math.ceil((plan.recipe.max_steps or 0) * a_step / first.num_examples)
    more = (_one_pass(plan, seed, number, tokenizer).examples for number in range(1, min(passes, MOST_PASSES)))
    return replace(first, examples=[*first.examples, *(example for examples in more for example in examples)])


def _one_pass(plan: Plan, seed: int, number: int, tokenizer: "PreTrainedTokenizerBase") -> Batches:
    draws = int(storage.digest(f"pass {number} over the text, seed {seed}"), 16) % 2**31
    settings: dict[str, Any] = {"objective": "mlm", "batch_size": plan.recipe.batch_size, "seed": draws}
    settings["max_length"] = plan.max_length
    if not isinstance(plan.method, NextSentence):
        return load_batches(plan.train, tokenizer, **settings)
    documents = _documents(plan.train)
    longest = plan.max_length or min(DEFAULT_MAX_LENGTH, tokenizer.model_max_length)
    room = longest - tokenizer.num_special_tokens_to_add(pair=True)
    lengths = [[len(ids) for ids in _token_ids(sentences, tokenizer)] for sentences in documents]
    pairs = next_sentence_pairs(documents, lengths, room, np.random.default_rng(draws))
    source = replace(plan.train, texts=[pair[:2] for pair in pairs])
    batches = load_batches(source, tokenizer, **settings)
    labels = [np.array(pair[2]) for pair in pairs]
    return replace(
        batches,
        examples=[e | {"next_sentence_label": y} for e, y in zip(batches.examples, labels, strict=True)],
    )


def _token_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
