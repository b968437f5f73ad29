"""What moves along the axes of a landscape: directions, masked, made orthogonal and matched."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..models import align, backbone_prefix, find_difference, weights_fingerprint
from ..scores import FisherScores
from .directions import (
    KINDS,
    Direction,
    Match,
    Normalize,
    OneDimensional,
    Subspace,
    matched,
    orthogonalized,
    random_directions,
    restrict,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Moves:
    """The directions of a landscape as they are used, for every replicate.

    The attributes are the arguments of :func:`fisherscope.scan_landscape` of the same names; ``space`` is None for
    random directions.
    """

    model: nn.Module
    axes: int
    space: Subspace | None = None
    mask: Mask | None = None
    scores: FisherScores | None = None
    normalize: Normalize = "filter"
    one_dimensional: OneDimensional = "skip"
    match: Match = "none"
    orthogonal: bool = False
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        """Refuse a match without a mask."""
        if self.match != "none" and self.mask is None:
            raise ValueError(
                f"match={self.match!r} is about the size of masked directions; give a mask, or leave it out."
            )

    def along(self, replicate: int = 0) -> list[dict[str, Tensor]]:
        """One direction per axis, as the model moves.

        Raises:
            ValueError: If other models lie on the directions as they were given, but not on these.
            MaskMismatch: If the mask belongs to another model.
        """
        whole, selected = self._whole(replicate), self.selected
        moves = [restrict(direction, selected) for direction in whole]
        if self.match != "none" and self.space and _are_same(moves, whole):
            raise ValueError(
                f"match={self.match!r} compares masked directions with whole ones, but these were made for the mask; "
                "leave it out."
            )
        if self.orthogonal:  # before they are matched, which keeps their angles but not the other way round
            moves = orthogonalized(moves)
        if self.mask is not None and selected is not None and self.match != "none":
            covered = [{name: t for name, t in direction.items() if name in selected} for direction in whole]
            pairs, density = zip(moves, covered, strict=True), self.mask.density
            moves = [matched(move, direction, density, self.match, self.aligned_scores) for move, direction in pairs]
        if self.space and self.space.markers and not _are_same(moves, whole):
            raise ValueError(
                "Directions between models lead to those models only as they are; make them with the mask of the "
                "landscape, and scan without match and orthogonal."
            )
        return moves

    def _whole(self, replicate: int) -> Sequence[Direction]:
        if self.space:
            return self.space.directions
        options: dict[str, Any] = {"normalize": self.normalize, "one_dimensional": self.one_dimensional}
        return random_directions(self.model, self.axes, seed=self.seed, first=replicate * self.axes, **options)

    @property
    def kinds(self) -> Sequence[str]:
        """What each direction is, in words."""
        return self.space.kinds if self.space else [KINDS[self.normalize]] * self.axes

    @cached_property
    def selected(self) -> Mapping[str, Tensor] | None:
        """The mask under the model's names."""
        if self.mask is None:
            return None
        selected = self.mask.for_model(self.model, strict=self.strict)
        if resting := [name for name, _ in self.model.named_parameters() if name not in selected]:
            logger.info("%d parameters are not in the mask and rest, for example '%s'.", len(resting), resting[0])
        return selected

    @cached_property
    def aligned_scores(self) -> Mapping[str, Tensor] | None:
        """The scores under the model's names, on its device; 0 where the model has a parameter that they lack."""
        if self.scores is None:
            return None
        prefix = self.scores.provenance.get("model", {}).get("prefix", backbone_prefix(self.model))
        if difference := find_difference(self.scores, prefix, self.model):
            raise ValueError(f"The scores do not fit this model: {difference}.")
        origin = self.scores.provenance.get("model", {}).get("backbone_fingerprint")
        if origin is not None and origin != weights_fingerprint(self.model, backbone_only=True):
            message = "The scores were made for other weights of the same architecture; estimate them for this model."
            if self.strict:
                raise ValueError(message)
            logger.warning(message)
        own, parameters = align(self.scores, prefix, self.model), self.model.named_parameters()
        return {n: own[n].to(p.device) if n in own else p.detach().new_zeros(p.shape) for n, p in parameters}

    @property
    def settings(self) -> dict[str, object]:
        """What decides the directions, as plain values."""
        return {
            "seed": None if self.space else self.seed,
            "directions": list(self.space.kinds) if self.space else KINDS[self.normalize],
            "one_dimensional": None if self.space else self.one_dimensional,
            "match": self.match,
            "orthogonal": self.orthogonal,
            "scores": None if self.scores is None else _in_words(self.scores),
        }


def _in_words(scores: FisherScores) -> str:
    """What tells scores of one model apart."""
    data = (scores.provenance.get("data") or {}).get("fingerprint")
    return f"{scores.estimator} by {scores.unit}, {scores.num_examples} examples of {data}"


def given_space(
    directions: Literal["random"] | Sequence[Direction] | Subspace, model: nn.Module, axes: int
) -> Subspace | None:
    """Directions that were given, checked and on the model's device; None for random ones.

    Raises:
        ValueError: If there is not one per axis, or one does not fit the model.
    """
    if isinstance(directions, str) and directions == "random":
        return None
    if isinstance(directions, Sequence) and all(isinstance(d, Mapping) for d in directions):
        directions = Subspace(tuple(directions), ("given",) * len(directions))
    if not isinstance(directions, Subspace) or len(directions.directions) != axes:
        found = repr(directions) if isinstance(directions, str) else f"a {type(directions).__name__}"
        found = f"{len(directions.directions)} directions" if isinstance(directions, Subspace) else found
        raise ValueError(f"directions must be 'random' or one mapping per axis ({axes}), got {found}.")
    space = directions
    if len(space.markers) != len(space.weights):  # which may be made without, to see where they lie
        counts = f"{len(space.markers)} markers and {len(space.weights)} functions"
        raise ValueError(f"A subspace needs a function for the weights of every marker, got {counts}.")
    parameters = dict(model.named_parameters())
    for name, tensor in (item for direction in space.directions for item in direction.items()):
        if name not in parameters or parameters[name].shape != tensor.shape:
            found = "no such parameter" if name not in parameters else f"shape {tuple(parameters[name].shape)}"
            raise ValueError(f"A direction has '{name}' of shape {tuple(tensor.shape)}, but the model has {found}.")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"A direction needs finite values, but '{name}' holds others; make it again.")
    moved = tuple({name: t.detach().to(parameters[name].device) for name, t in d.items()} for d in space.directions)
    return replace(space, directions=moved)


def _are_same(moves: Sequence[Direction], given: Sequence[Direction]) -> bool:
    return all(
        move.keys() == direction.keys() and all(torch.equal(move[name], direction[name]) for name in move)
        for move, direction in zip(moves, given, strict=True)
    )
