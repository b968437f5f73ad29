"""Directions in weight space: one tensor per parameter; how they are scaled, masked, matched and measured."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..models import layer_of, row_axis, transposed_parameters
from .surface import Geometry, Marker

Direction = Mapping[str, Tensor]
Normalize = Literal["filter", "row", "parameter", "layer", "none"]
OneDimensional = Literal["skip", "scale"]
Match = Literal["none", "norm", "fisher"]

KINDS: Mapping[str, str] = {
    "filter": "random, filter-normalised",
    "row": "random, row-normalised",
    "parameter": "random, normalised by parameter",
    "layer": "random, normalised by layer",
    "none": "random, Gaussian",
}


@dataclass(frozen=True, eq=False)
class Subspace:
    """The directions of a landscape's axes, and other models that lie in the space they span, or near it.

    Attributes:
        directions: One per axis; parameters that one leaves out rest.
        kinds: What each is, in words.
        markers: The other models, without losses.
        weights: For every marker a function that gives its parameters, for the loss of the model itself.
        connected: Whether the markers are a path, in their order.

    Raises:
        ValueError: If there is not one kind per direction.
    """

    directions: tuple[Direction, ...]
    kinds: tuple[str, ...]
    markers: tuple[Marker, ...] = ()
    weights: tuple[Callable[[], Mapping[str, Tensor]], ...] = ()
    connected: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not belong together."""
        if isinstance(self.kinds, str) or len(self.kinds) != len(self.directions):
            found = repr(self.kinds) if isinstance(self.kinds, str) else f"{len(self.kinds)} of them"
            raise ValueError(f"kinds must say in words what each of {len(self.directions)} directions is, got {found}.")


def random_directions(
    model: nn.Module,
    count: int,
    *,
    seed: int,
    normalize: Normalize = "filter",
    one_dimensional: OneDimensional = "skip",
    first: int = 0,
) -> list[dict[str, Tensor]]:
    r"""Gaussian directions, scaled to the model group by group (Li et al., arXiv 1712.09913, section 4).

    .. math::  d_g \leftarrow \frac{\lVert w_g \rVert}{\lVert d_g \rVert}\, d_g, \qquad d \sim \mathcal N(0, I)

    where g runs over groups of entries of the parameters of two or more dimensions: with ``"filter"`` the rows of every
    one, which are output units (columns of a Hugging Face Conv1D) and embedded tokens; with ``"row"`` the slices along
    the first axis as stored, as published code has it, which is the same but for Conv1D; with ``"parameter"`` whole
    parameters; with ``"layer"`` all those of a layer. The entries of a parameter depend only on the seed, the number of
    the direction and the parameter's name.

    Args:
        model: The model the directions start from.
        count: How many directions.
        seed: Of the draw; the same numbers on every device.
        normalize: As above, or ``"none"`` for the plain Gaussian.
        one_dimensional: Biases and norms: ``"skip"`` leaves them at rest, ``"scale"`` gives the whole parameter
            its own norm (``"none"`` leaves it alone).
        first: Number of the first direction.

    Returns:
        ``count`` mappings from parameter name to a tensor like the parameter.

    Raises:
        ValueError: If an option is unknown.
    """
    check_option("normalize", normalize, get_args(Normalize))
    check_option("one_dimensional", one_dimensional, get_args(OneDimensional))
    transposed = transposed_parameters(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def one(number: int) -> dict[str, Tensor]:
        drawn = {name: gaussian(weight, seed, number, name) for name, weight in weights.items()}
        for name, weight in weights.items():
            if weight.ndim <= 1 and one_dimensional == "skip":
                drawn[name].zero_()
            elif weight.ndim <= 1 and normalize != "none":
                drawn[name] = fitted(drawn[name], weight, None)
            elif normalize in ("filter", "row"):
                axis = row_axis(name, transposed) if normalize == "filter" else 0
                drawn[name] = fitted(drawn[name], weight, [a for a in range(weight.ndim) if a != axis])
            elif normalize == "parameter":
                drawn[name] = fitted(drawn[name], weight, None)
        return _fitted_by_layer(drawn, weights) if normalize == "layer" else drawn

    return [one(number) for number in range(first, first + count)]


def check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse an option that is none of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}.")


def gaussian(like: Tensor, seed: int, number: int, name: str) -> Tensor:
    """Standard normal entries, a function of the seed, the direction's number and the parameter's name alone."""
    own_seed = int.from_bytes(hashlib.sha256(repr((seed, number, name)).encode()).digest()[:8], "big") >> 1
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(own_seed), dtype=torch.float32)
    return drawn.to(like.device, like.dtype)


def fitted(direction: Tensor, weight: Tensor, others: list[int] | None) -> Tensor:
    """The direction with the norms of the weight, over some axes or over all."""
    own = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    drawn = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    return direction * torch.where(drawn > 0, own / drawn, 0)  # rows of one entry may be drawn as 0


def _fitted_by_layer(drawn: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layers: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if weight.ndim > 1:
            layers.setdefault(layer_of(name), []).append(name)
    result = dict(drawn)
    for names in layers.values():
        size = norm([drawn[name] for name in names])
        ratio = norm([weights[name] for name in names]) / size if size else 0.0
        result |= {name: drawn[name] * ratio for name in names}
    return result


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of several tensors together, summed in double precision."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def restrict(direction: Direction, selected: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The direction where a mask selects, 0 elsewhere; parameters of the head that the mask does not cover rest.

    The directions of a mask and of its complement add up to the whole direction.

    Args:
        direction: One tensor per parameter.
        selected: The mask under the model's names (:meth:`fisherscope.Mask.for_model`); None selects everything.
    """
    if selected is None:
        return dict(direction)
    return {
        name: tensor * selected[name] if name in selected else torch.zeros_like(tensor)
        for name, tensor in direction.items()
    }


def matched(
    move: Direction, whole: Direction, density: float, match: Match, scores: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    r"""A masked direction as large as one that a random mask of the same density leaves, on average.

    .. math::  \delta \leftarrow \delta\, \sqrt{\frac{\rho\, \lVert d\rVert^2}{\lVert\delta\rVert^2}}

    with d the whole direction and :math:`\rho` the share of entries that the mask selects; with ``"fisher"``,
    :math:`\lVert d\rVert_F^2 = d^\top F d`. Masks of one density then move the model equally far, so that a difference
    between their losses is one between entries, not between sizes.

    Args:
        move: The direction after the mask.
        whole: Before the mask.
        density: Of the mask.
        match: ``"norm"`` or ``"fisher"``; ``"none"`` changes nothing.
        scores: For ``"fisher"``, under the model's names.

    Raises:
        ValueError: If the option is unknown, scores are missing, or a size is 0.
    """
    check_option("match", match, get_args(Match))
    if match == "none":
        return dict(move)
    if match == "fisher" and scores is None:
        raise ValueError("match='fisher' needs scores; give them, or take match='norm'.")
    weigh = scores if match == "fisher" else None
    own, wanted = inner(move, move, weigh), density * inner(whole, whole, weigh)
    if not own > 0 or not wanted > 0:
        raise ValueError(f"A direction of size 0 cannot be matched by {match}; select entries that move.")
    return {name: tensor * math.sqrt(wanted / own) for name, tensor in move.items()}


def inner(a: Direction, b: Direction, scores: Mapping[str, Tensor] | None = None) -> float:
    r""":math:`a^\top b`, or :math:`a^\top F b` with diagonal scores; what one of them leaves out is 0."""
    total = 0.0
    for name in (name for name in a if name in b):
        product = a[name].double() * b[name].double()
        total += float((product if scores is None else product * scores[name].to(product)).sum())
    return total


def orthogonalized(directions: Sequence[Direction]) -> list[dict[str, Tensor]]:
    """Each direction made orthogonal to the earlier ones, with the norm that it had.

    Raises:
        ValueError: If one lies in the span of the earlier ones.
    """
    result: list[dict[str, Tensor]] = []
    for number, direction in enumerate(directions):
        size, rest = norm(list(direction.values())), dict(direction)
        for _ in range(2):  # the second pass removes what rounding left
            for earlier in result:
                share = inner(rest, earlier) / inner(earlier, earlier)
                rest = {name: t - share * earlier[name] if name in earlier else t for name, t in rest.items()}
                rest |= {name: -share * t for name, t in earlier.items() if name not in direction}
        left = norm(list(rest.values()))
        if not left > 1e-6 * size:
            raise ValueError(f"Direction {number} lies in the span of the earlier ones; take another.")
        result.append({name: tensor * (size / left) for name, tensor in rest.items()})
    return result


def geometry_of(
    model: nn.Module, moves: Sequence[Direction], scores: Mapping[str, Tensor] | None = None, *, quadratic: bool = False
) -> Geometry:
    """How directions lie to each other and to the weights.

    Args:
        model: The model at step 0.
        moves: The directions as used.
        scores: Under the model's names; parameters without any count as 0.
        quadratic: Whether the scores predict the loss.
    """

    def gram(weigh: Mapping[str, Tensor] | None) -> np.ndarray:
        return np.array([[inner(a, b, weigh) for b in moves] for a in moves])

    if scores is not None:
        scores = {n: scores[n] if n in scores else torch.zeros_like(p) for n, p in model.named_parameters()}
    weight_norm = norm([p.detach() for p in model.parameters()])
    return Geometry(gram(None), weight_norm, None if scores is None else gram(scores), quadratic)
