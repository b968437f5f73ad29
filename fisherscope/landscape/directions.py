"""Directions in weight space: one tensor per parameter."""

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..models import row_axis, transposed_parameters

Direction = Mapping[str, Tensor]
Normalize = Literal["filter", "none"]
OneDimensional = Literal["skip", "scale"]


def random_directions(
    model: nn.Module,
    count: int,
    *,
    seed: int,
    normalize: Normalize = "filter",
    one_dimensional: OneDimensional = "skip",
) -> list[dict[str, Tensor]]:
    r"""Gaussian directions, scaled row by row to the model (Li et al., arXiv 1712.09913, section 4).

    .. math::  d_r \leftarrow \frac{\lVert w_r \rVert}{\lVert d_r \rVert}\, d_r, \qquad d \sim \mathcal N(0, I)

    where r runs over the rows of every matrix: output units (columns of a Hugging Face Conv1D) and embedded tokens. The
    entries of a parameter depend only on the seed, the number of the direction and the parameter's name.

    Args:
        model: The model the directions start from.
        count: How many directions.
        seed: Of the draw; the same numbers on every device.
        normalize: ``"filter"`` as above, or ``"none"``.
        one_dimensional: Biases and norms: ``"skip"`` leaves them at rest, ``"scale"`` gives the whole parameter
            its own norm.

    Returns:
        ``count`` mappings from parameter name to a tensor like the parameter.

    Raises:
        ValueError: If an option is unknown.
    """
    if normalize not in ("filter", "none"):
        raise ValueError(f"normalize must be 'filter' or 'none', got {normalize!r}.")
    if one_dimensional not in ("skip", "scale"):
        raise ValueError(f"one_dimensional must be 'skip' or 'scale', got {one_dimensional!r}.")
    transposed = transposed_parameters(model)
    return [
        {
            name: _scaled(
                _gaussian(p, seed, number, name), p.detach(), row_axis(name, transposed), normalize, one_dimensional
            )
            for name, p in model.named_parameters()
        }
        for number in range(count)
    ]


def _gaussian(like: Tensor, seed: int, number: int, name: str) -> Tensor:
    own_seed = int.from_bytes(hashlib.sha256(repr((seed, number, name)).encode()).digest()[:8], "big") >> 1
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(own_seed), dtype=torch.float32)
    return drawn.to(like.device, like.dtype)


def _scaled(direction: Tensor, weight: Tensor, axis: int, normalize: str, one_dimensional: str) -> Tensor:
    if weight.ndim <= 1:
        if one_dimensional == "skip":
            return torch.zeros_like(weight)
        return direction if normalize == "none" else direction * (weight.norm() / direction.norm())
    if normalize == "none":
        return direction
    others = [a for a in range(weight.ndim) if a != axis]
    own = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    drawn = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    return direction * (own / drawn)


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
