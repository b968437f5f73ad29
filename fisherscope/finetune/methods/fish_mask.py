"""FISH mask: training the few entries with the highest Fisher information."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..._typing import Bool
from ...data import Batches
from ...masks import top_fraction
from ...scores import FisherScores
from ..regularizer import Applied, Regularizer
from ..run import Run
from .fixed_mask import new_names, scores_of, train_only


@dataclass(frozen=True)
class FishMask(Regularizer):
    r"""Trains the head and the entries with the highest scores, a small share of the model together.

    .. math::  |M| = \lfloor \mathrm{keep} \cdot n \rfloor, \qquad
               M = \mathrm{head} \cup \mathrm{top}_{|M| - |\mathrm{head}|}(F)

    with :math:`n` all entries of the model. All other entries keep their values bit for bit (Sung et al., arXiv
    2111.09839). Everything outside the head is ranked together: embeddings, normalisations and a pooler, too.

    Attributes:
        scores: Of the model with its head, or of its backbone.
        keep: Share of all entries that is trained, the head included.

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    name: ClassVar[str] = "fish-mask"
    order: ClassVar[int] = -2
    replaced: ClassVar[Mapping[str, Sequence[str]]] = {"scores": ("variant", "num_samples")}

    scores: FisherScores
    keep: float = 0.005

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep:g}.")

    def masks(self, model: nn.Module) -> dict[str, Bool[Tensor, "..."]]:
        """What is trained, by parameter; the head is missing, for it is trained whole.

        Raises:
            ValueError: If the head alone is more than ``keep``, or a score is missing.
        """
        parameters = dict(model.named_parameters())
        new = new_names(model)
        ranked = [name for name in parameters if name not in new]
        total = sum(p.numel() for p in parameters.values())
        head = sum(parameters[name].numel() for name in new)
        count = int(total * self.keep) - head
        if count <= 0:
            smallest = math.ceil(1e6 * (head + 1) / total) / 1e6
            raise ValueError(
                f"keep must leave something to select beside the {head:,} entries of the head, but {self.keep:g} of "
                f"{total:,} does not; the smallest that works is {smallest:g}."
            )
        scores = scores_of(self.scores, model, ranked)
        return dict(top_fraction(scores, count / scores.num_entries))

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Train the head and the entries with the highest scores for the length of the block."""
        with train_only(model, optimizer, self.masks(model)):
            yield Applied()

    @classmethod
    def for_run(
        cls,
        run: Run,
        *,
        variant: Literal["squared", "absolute"] = "squared",
        num_samples: int = 1024,
        **settings: Any,
    ) -> "FishMask":
        """With the scores that the user gave, or else with scores from training examples drawn at random.

        Args:
            run: The run.
            variant: Rank by squared gradients, or by absolute ones as the published code does by default.
            num_samples: Training examples to estimate the scores from, at most.
            settings: The fields.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        estimators: dict[str, Any] = {"squared": "empirical", "absolute": "absolute-gradient"}
        if variant not in estimators:
            raise ValueError(f"variant must be 'squared' or 'absolute', got {variant!r}.")
        if run.scores is not None:
            return cls(run.supply("scores"), **settings)
        few = replace(run, batches=_drawn(run.batches, num_samples, run.seed))
        return cls(few.estimated(estimator=estimators[variant]), **settings)


def _drawn(batches: Batches, count: int, seed: int) -> Batches:
    """At most ``count`` of the examples, in their order."""
    order = torch.randperm(batches.num_examples, generator=torch.Generator().manual_seed(seed))
    examples = [batches.examples[i] for i in sorted(order[:count].tolist())]
    return replace(batches, examples=examples, settings={**batches.settings, "num_examples": len(examples)})
