"""What a method may ask of the run that it is for."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import distributed, storage
from ..data import Batches
from ..fisher import estimate_fisher
from ..masks import Mask
from ..models import align, backbone_prefix, describe, find_difference, new_parameters
from ..scores import FisherScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Run:
    """One training, before it begins.

    Attributes:
        model: With the head of the task, as it was loaded; a method may change its values before the training.
        batches: The training examples.
        objective: Of the task.
        total_steps: Optimizer steps that the training will take.
        seed: Of the run.
        scores: What the user gave; None lets :meth:`supply` estimate them.
        mask: What the user gave.
        settings: Of the training: ``batch_size``, ``learning_rate``, ``weight_decay``, ``max_grad_norm``.
        strict: Refuse scores and masks that were made from other weights.
        folder: Where scores that took their time are kept for a resumed training; None keeps none.
        supplied: What was asked for so far.
        renewed: Names of parameters that a method drew anew: they have no pretrained value any more.
        tokenizer: Of the model.
        fine_tuned: Gives the checkpoint as vanilla fine-tunes it, with the same recipe, examples and seed.
        longest: Tokens of the longest text of all that the run trains on and measures.
    """

    model: "PreTrainedModel"
    batches: Batches
    objective: str
    total_steps: int
    seed: int = 0
    scores: FisherScores | None = None
    mask: Mask | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    strict: bool = False
    folder: Path | None = None
    supplied: set[str] = field(default_factory=set)
    renewed: set[str] = field(default_factory=set)
    tokenizer: "PreTrainedTokenizerBase | None" = None
    fine_tuned: "Callable[[], PreTrainedModel] | None" = None
    longest: int = 0

    def supply(self, name: str) -> Any:
        """What a regularizer's field of this name gets.

        Raises:
            ValueError: If it is a mask and there is none, an anchor and no parameter is from a checkpoint, or what the
                user gave does not fit the model.
        """
        self.supplied.add(name)
        if name == "scores":
            return self.estimated() if self.scores is None else self._fitting(self.scores)
        if name == "mask":
            if self.mask is None:
                raise ValueError("This method needs a mask; give --mask FILE, as 'fisherscope mask' makes them.")
            return self._fitting(self.mask)
        if name == "anchor":
            return self._anchor()
        return {"total_steps": self.total_steps, "seed": self.seed}[name]

    def _anchor(self) -> dict[str, torch.Tensor]:
        """Copies of the pretrained values: of the parameters that are from the checkpoint and as it has them."""
        new = {*new_parameters(self.model), *self.renewed}
        found = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters() if name not in new}
        if not found:
            raise ValueError("This method needs pretrained weights, but all of this model's are drawn at random.")
        return found

    def estimated(self, **settings: Any) -> FisherScores:
        """Fisher scores of the model on its training examples, for the objective of the task."""
        path = self.folder and self.folder / f"scores-{storage.digest(repr(settings), self.batches.fingerprint)}.h5"
        if path is not None and distributed.first_says(path.exists()):
            return FisherScores.load(path)
        logger.info("Estimating Fisher scores on %d training examples.", self.batches.num_examples)
        scores = estimate_fisher(
            self.model, self.batches, objective=self.objective, seed=self.seed, progress=False, **settings
        )
        if path is not None and distributed.is_first():
            scores.save(path)
        return scores

    def _fitting(self, found: Any) -> Any:
        """Scores or a mask under the model's own names, checked once: a resumed training has other weights."""
        origin = found.provenance.get("model", {})
        prefix = origin.get("prefix", backbone_prefix(self.model))
        what = "mask" if isinstance(found, Mask) else "scores"
        if difference := find_difference(found, prefix, self.model):
            raise ValueError(
                f"The {what} cannot be used for this model, where {difference.replace('it has', 'there is')}; take one "
                "of the same architecture."
            )
        own = describe(self.model)
        if origin.get("backbone_fingerprint", own["backbone_fingerprint"]) != own["backbone_fingerprint"]:
            verb = "was" if what == "mask" else "were"
            message = f"The {what} {verb} made for other weights ({origin['name']}) of the same architecture."
            if self.strict:
                raise ValueError(message)
            logger.warning(message)
        tensors = {name: t.to(torch.device("cpu")) for name, t in align(found, prefix, self.model).items()}
        kept = {"first_half": None, "quarters": None} if isinstance(found, FisherScores) else {}
        return replace(found, tensors=tensors, provenance={**found.provenance, "model": own}, **kept)
