"""Directions between models, and through the checkpoints of a training: what to give ``scan_landscape``.

Another model is a module, its parameters by name (a state dict will do), or where to find it: a ``.safetensors`` file
of parameters, or any name :func:`fisherscope.load_model` takes, read on the CPU when it is needed. It must have the
backbone of the model at step 0; parameters of the head that it lacks rest. A tied parameter moves once. Directions are
kept in a wider type than the weights, so that a step to another model ends at its very weights.

A mask is applied to the differences before anything else is computed from them: give the scan the same one.
"""

import logging
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from .. import storage
from ..masks import Mask
from ..models import backbone_prefix, describe, find_difference, infer_objective, load_model, shown_name
from .directions import Subspace, inner, norm, orthogonalized, restrict
from .surface import Marker

logger = logging.getLogger(__name__)

Other = nn.Module | Mapping[str, Tensor] | str | Path

WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
FLAT = 1e-12
"""A component with less than this share of the variance of the first is rounding, and so is a spread of the checkpoints
that is less than this share of their distance to the model."""
BLOCK = 2**20
"""How many entries are summed in double precision at once."""


def between(
    model: nn.Module, other: Other, *, mask: Mask | None = None, strict: bool = False, name: str = "other"
) -> Subspace:
    r"""The straight line from a model to another one, which is at step 1.

    .. math::  d = m \odot (\theta' - \theta)

    as in Goodfellow et al. (arXiv 1412.6544).

    Args:
        model: The model at step 0.
        other: The other one, see the top of this module.
        mask: The entries that move; the other model is then off the line, by what the mask leaves out.
        strict: Refuse a mask that was made from other weights, instead of warning.
        name: What figures call the other model.

    Returns:
        One direction and one marker.

    Raises:
        ValueError: If the other model does not fit, or does not differ.
        MaskMismatch: If the mask belongs to another model.
        FileNotFoundError: If there is no such model.
    """
    weights, selected = _known(model, other, name), _selected(model, mask, strict)
    move = _masked_difference(model, weights, selected, name)
    return _space(model, [move], [f"to {name}"], {name: weights}, [other])


def plane_through(
    model: nn.Module,
    first: Other,
    second: Other,
    *,
    names: tuple[str, str] = ("first", "second"),
    mask: Mask | None = None,
    strict: bool = False,
) -> Subspace:
    r"""The plane through three models, its two axes orthogonal and equally long.

    .. math::  d_1 = a, \qquad d_2 = \frac{\lVert a\rVert}{\lVert r\rVert}\, r, \qquad
               r = b - \frac{a^\top b}{a^\top a}\, a, \qquad a = m \odot (\theta_1 - \theta),
               \quad b = m \odot (\theta_2 - \theta)

    so that the first model is at (1, 0), the second at :math:`(a^\top b / a^\top a, \lVert r\rVert/\lVert a\rVert)`,
    and step 1 is equally far along both axes; Garipov et al. (arXiv 1802.10026) have the same plane in units of 1.

    Args:
        model: The model at (0, 0).
        first: The one at (1, 0), see the top of this module.
        second: The third one.
        names: What figures call the two.
        mask: The entries that move; the others are then off the plane, by what the mask leaves out.
        strict: Refuse a mask that was made from other weights, instead of warning.

    Returns:
        Two directions and two markers.

    Raises:
        ValueError: If a model does not fit, or the three lie on a line.
        MaskMismatch: If the mask belongs to another model.
        FileNotFoundError: If there is no such model.
    """
    others, selected = [first, second], _selected(model, mask, strict)
    _check_names(names, others)
    weights = {name: _known(model, other, name) for name, other in zip(names, others, strict=True)}
    a, b = (_masked_difference(model, own, selected, name) for name, own in weights.items())
    try:
        _, rest = orthogonalized([a, b])
    except ValueError as error:
        line = f"The model, {names[0]} and {names[1]} lie on a line"
        raise ValueError(f"{line}, but a plane needs three that do not; scan the line with between().") from error
    ratio = norm(list(a.values())) / norm(list(b.values()))
    across = {name: tensor * ratio for name, tensor in rest.items()}
    return _space(model, [a, across], [f"to {names[0]}", f"across, towards {names[1]}"], weights, others)


def trajectory(
    model: nn.Module,
    checkpoints: Sequence[Other],
    *,
    names: Sequence[str] | None = None,
    mask: Mask | None = None,
    strict: bool = False,
    axes: int = 2,
) -> Subspace:
    r"""The principal components of the checkpoints of a training, drawn through the model.

    .. math::  d_k = \rho\, v_k, \qquad
               v_k = \frac{1}{\sqrt{\lambda_k}} \sum_i u_{ik}\, (\delta_i - \bar\delta), \qquad
               (\delta_i - \bar\delta)^\top (\delta_j - \bar\delta) = \sum_k \lambda_k u_{ik} u_{jk}, \qquad
               \delta_i = m \odot (\theta_i - \theta)

    with :math:`\rho = \max_i \lVert\delta_i\rVert`: step 1 is as far as the farthest checkpoint, on every axis. The
    components are those of the checkpoints about their mean, as published (Li et al., arXiv 1712.09913, section 7);
    the plane goes through the model, normally the last checkpoint. Markers are the projections on that plane,
    their ``distance`` what the projection leaves out.

    Two warnings. The trajectory of any high-dimensional random walk has components that look like cosines, and the
    first two hold most of its variance (Antognini and Sohl-Dickstein, arXiv 1806.08805): a smooth curve proves
    nothing. And the loss of the plane at a marker is not that of the checkpoint, which is off the plane; landscapes
    therefore carry both. Checkpoints given by name are copied to a temporary folder once, so that besides the
    directions only one parameter of all of them is in memory at a time.

    Args:
        model: The model at the origin.
        checkpoints: In the order of the training, see the top of this module; give the model too, if it is the last.
        names: What figures call them; None takes the names of files and folders, or numbers from 1.
        mask: The entries that move.
        strict: Refuse a mask that was made from other weights, instead of warning.
        axes: How many components: 1, 2 or 3.

    Returns:
        One direction per component and one marker per checkpoint, connected.

    Raises:
        ValueError: If a checkpoint does not fit, or they spread in fewer directions than there are axes.
        MaskMismatch: If the mask belongs to another model.
        FileNotFoundError: If there is no such checkpoint.
    """
    if axes not in (1, 2, 3):
        raise ValueError(f"axes must be 1, 2 or 3, got {axes}.")
    names = [_default_name(c, n) for n, c in enumerate(checkpoints, 1)] if names is None else list(names)
    _check_names(names, checkpoints)
    selected = _selected(model, mask, strict)
    with TemporaryDirectory() as folder:
        weights: dict[str, Mapping[str, Tensor]] = {}
        for number, (name, checkpoint) in enumerate(zip(names, checkpoints, strict=True)):
            own = _known(model, checkpoint, name)
            on_disk = isinstance(checkpoint, str | Path)
            weights[name] = _OnDisk(Path(folder) / f"{number}.safetensors", own) if on_disk else own
        moves = [partial(_differences, model, own, selected) for own in weights.values()]
        gram, largest = _spread(zip(*(one() for one in moves), strict=True), len(moves))
        mixing, shares = _components(gram, largest, axes)
        directions: list[dict[str, Tensor]] = [{} for _ in range(axes)]
        for parts in zip(*(one() for one in moves), strict=True):
            for direction, column in zip(directions, mixing.T.tolist(), strict=True):
                mixed = torch.zeros_like(parts[0][1])
                for weight, (_, part) in zip(column, parts, strict=True):
                    mixed += weight * part
                direction[parts[0][0]] = mixed
        directions = [_with_norm(direction, largest) for direction in orthogonalized(directions)]
        ordinals = ("1st", "2nd", "3rd")[:axes]
        percents = [f"{100 * share:.1f} % of the variance" for share in shares]
        kinds = [f"{nth} principal component, {p}" for nth, p in zip(ordinals, percents, strict=True)]
        return _space(model, directions, kinds, weights, checkpoints, connected=True)


def span_of(space: Subspace, points: int | Sequence[int], margin: float = 0.2) -> list[tuple[float, float]]:
    """Ranges that show the model and all markers, with the model on the grid: of one length, so the picture is square.

    Args:
        space: The axes and markers.
        points: Grid points per axis, as the scan will have them; one number, or one per axis.
        margin: How far the ranges go beyond the outermost markers of the axis where these are farthest apart, as a
            share of their distance.

    Returns:
        The lowest and the highest step of every axis, for ``span`` of the scan; -1 and 1 if no marker leaves 0.

    Raises:
        ValueError: If there are fewer than 3 points on an axis, or the margin is negative.
    """
    axes = len(space.directions)
    counts = [operator.index(count) for count in (points if isinstance(points, Sequence) else [points] * axes)]
    if len(counts) != axes or min(counts) < 3:
        raise ValueError(f"points must be at least 3, one number or one per axis ({axes}), got {points}.")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be a number from 0, got {margin}.")
    at = [[0.0, *(marker.steps[axis] for marker in space.markers)] for axis in range(axes)]
    extent = max(max(steps) - min(steps) for steps in at)
    half = (0.5 + margin) * extent or 1.0
    centres = [(min(steps) + max(steps)) / 2 for steps in at]
    return [_range_on_grid(centre - half, centre + half, count) for centre, count in zip(centres, counts, strict=True)]


def _range_on_grid(low: float, high: float, count: int) -> tuple[float, float]:
    """The smallest range of ``count`` points that covers from low to high and has 0 on its grid."""
    below = range(1 if low < 0 else 0, count - 1 if high > 0 else count)
    cells = [(max(-low / max(n, 1), high / max(count - 1 - n, 1)), n) for n in below]
    size, zero = min(cells)
    return min(0.0 - zero * size, low), max((count - 1 - zero) * size, high)


def _default_name(checkpoint: Other, number: int) -> str:
    if not isinstance(checkpoint, str | Path):
        return str(number)
    return Path(shown_name(checkpoint)).name.removesuffix(".safetensors")


def _check_names(names: Sequence[str], others: Sequence[Other]) -> None:
    if len(names) != len(others) or len(set(names)) != len(names):
        raise ValueError(f"Every one of the {len(others)} models needs a name of its own, got {', '.join(names)}.")


def _selected(model: nn.Module, mask: Mask | None, strict: bool) -> dict[str, Tensor] | None:
    return None if mask is None else mask.for_model(model, strict=strict)


def _weights(model: nn.Module, other: Other, name: str) -> dict[str, Tensor]:
    """The parameters of another model under the names of this one, as far as it has them.

    Reads no value of ``model``, which may be displaced at the time.
    """
    ours = dict(model.named_parameters())
    canonical = {id(p): own for own, p in ours.items()}
    aliases = {alias: canonical[id(p)] for alias, p in model.named_parameters(remove_duplicate=False)}
    buffers = {buffer for buffer, _ in model.named_buffers(remove_duplicate=False)}
    found, unknown = {}, {}
    for key, tensor in _renamed(model, _read(model, other)).items():
        own = aliases.get(key)
        if own is None and key not in buffers:
            unknown[key] = tensor
        elif own is not None and own in found and found[own] is not tensor and not torch.equal(found[own], tensor):
            raise ValueError(
                f"{name} has two values for '{own}' and '{key}', which are one parameter in the model; take a model "
                "that is tied alike."
            )
        elif own is not None:
            found[own] = tensor
    difference = find_difference(found | unknown, backbone_prefix(model), model)
    for own, tensor in found.items():
        if difference is None and tensor.shape != ours[own].shape:
            difference = f"'{own}' has shape {tuple(tensor.shape)} there but {tuple(ours[own].shape)} in the model"
        elif difference is None and not tensor.is_floating_point():
            difference = f"'{own}' holds {tensor.dtype} values, which are no weights"
    if difference is not None:
        raise ValueError(f"{name} must have the architecture of the model: {difference}.")
    return {own: found[own] for own in ours if own in found}


def _renamed(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the model, whichever of the two is a bare backbone; a head that the model lacks left out."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own, base = backbone_prefix(model), f"{getattr(model, 'base_model_prefix', '')}."
    has_head = any(key.startswith(base) for key in tensors)

    result = {}
    for key, tensor in tensors.items():
        inside = key.startswith(base) or not has_head
        if key in known or (own and not inside):
            result[key] = tensor
        elif inside:
            result[own + key.removeprefix(base)] = tensor
    return result


def _read(model: nn.Module, other: Other) -> Mapping[str, Tensor]:
    if isinstance(other, str | Path) and str(other).endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(other)
        except SafetensorError as error:
            raise storage.WrongFile(f"{other} is not a safetensors file or was cut short; make it again.") from error
    if isinstance(other, str | Path):
        loaded, _ = load_model(other, objective=infer_objective(model), device="cpu")
        drawn = {id(loaded.get_parameter(name)) for name in describe(loaded)["new_parameters"]}
        return {n: p.detach() for n, p in loaded.named_parameters(remove_duplicate=False) if id(p) not in drawn}
    if isinstance(other, nn.Module):
        return {name: p.detach() for name, p in other.named_parameters(remove_duplicate=False)}
    return other


def _known(model: nn.Module, other: Other, name: str) -> dict[str, Tensor]:
    """As :func:`_weights`, with a line about what it lacks."""
    weights = _weights(model, other, name)
    if lacking := [own for own, _ in model.named_parameters() if own not in weights]:
        logger.info("%d parameters are not in %s and rest, for example '%s'.", len(lacking), name, lacking[0])
    return weights


class _OnDisk(Mapping[str, Tensor]):
    """Tensors in a file, one in memory at a time."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        self._path, self._names = path, list(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _differences(
    model: nn.Module, weights: Mapping[str, Tensor], selected: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor]]:
    """The masked differences to the model, parameter by parameter; 0 for what the other model lacks."""
    for name, parameter in model.named_parameters():
        base = parameter.detach().to(WIDER.get(parameter.dtype, torch.float64))
        found = weights[name].to(base) - base if name in weights else torch.zeros_like(base)
        yield name, restrict({name: found}, selected)[name]


def _masked_difference(
    model: nn.Module, weights: Mapping[str, Tensor], selected: Mapping[str, Tensor] | None, name: str
) -> dict[str, Tensor]:
    move = dict(_differences(model, weights, selected))
    size = norm(list(move.values()))
    if not (size > 0 and math.isfinite(size)):
        where = "" if selected is None else " where the mask selects"
        raise ValueError(f"{name} must differ from the model{where} by finite numbers, but the distance is {size:g}.")
    return move


def _spread(rows: Iterator[tuple[tuple[str, Tensor], ...]], count: int) -> tuple[np.ndarray, float]:
    """The Gram matrix of the differences about their mean, and the norm of the largest difference."""
    gram, squares = np.zeros((count, count)), np.zeros(count)
    for parts in rows:
        for blocks in zip(*(part.flatten().split(BLOCK) for _, part in parts), strict=True):
            stacked = torch.stack(blocks).double()
            centred = stacked - stacked.mean(0)
            gram += (centred @ centred.T).cpu().numpy()
            squares += stacked.square().sum(1).cpu().numpy()
    return gram, math.sqrt(squares.max(initial=0))


def _components(gram: np.ndarray, largest: float, axes: int) -> tuple[np.ndarray, np.ndarray]:
    """How the first components mix the differences, one column each, and their shares of the variance.

    The first checkpoint is on the positive side of the mean, so that the signs are always the same.
    """
    if not np.isfinite(gram).all():
        raise ValueError("Checkpoints must hold finite numbers, but one has infinity or NaN; leave it out.")
    variances, vectors = np.linalg.eigh(gram)
    variances, vectors = variances[::-1], vectors[:, ::-1]
    rank = int((variances > max(FLAT * variances.max(initial=0), (FLAT * largest) ** 2)).sum())
    if rank < axes:
        instead = f", or take axes={rank}" if rank else ""
        raise ValueError(
            f"Checkpoints must spread in as many directions as there are axes ({axes}), but these {len(gram)} spread "
            f"in {rank}; give more that differ{instead}."
        )
    vectors = vectors[:, :axes] * np.where(vectors[0, :axes] < 0, -1, 1) / np.sqrt(variances[:axes])
    return vectors - vectors.mean(0), variances[:axes] / variances.sum()


def _with_norm(direction: Mapping[str, Tensor], size: float) -> dict[str, Tensor]:
    ratio = size / norm(list(direction.values()))
    return {name: tensor * ratio for name, tensor in direction.items()}


def _space(
    model: nn.Module,
    directions: Sequence[Mapping[str, Tensor]],
    kinds: Sequence[str],
    weights: Mapping[str, Mapping[str, Tensor]],
    others: Sequence[Other],
    *,
    connected: bool = False,
) -> Subspace:
    """The subspace of orthogonal directions, with the other models by name."""
    return Subspace(
        tuple(directions),
        tuple(kinds),
        tuple(_marker(model, name, own, directions) for name, own in weights.items()),
        tuple(partial(_weights, model, other, name) for name, other in zip(weights, others, strict=True)),
        connected,
    )


def _marker(
    model: nn.Module, name: str, weights: Mapping[str, Tensor], directions: Sequence[Mapping[str, Tensor]]
) -> Marker:
    r"""The point :math:`s_k = \delta^\top d_k / \lVert d_k\rVert^2` nearest to a model, and how far it is."""
    products = np.zeros(len(directions))
    for key, whole in _differences(model, weights, None):
        products += [inner({key: whole}, direction) for direction in directions]
    steps = [float(p / inner(d, d)) for p, d in zip(products, directions, strict=True)]
    squares = 0.0
    for key, rest in _differences(model, weights, None):
        for step, direction in zip(steps, directions, strict=True):
            rest = rest - step * direction[key]
        squares += norm([rest]) ** 2
    return Marker(name, tuple(steps), math.sqrt(squares))
