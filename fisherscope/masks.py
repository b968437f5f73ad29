"""Masks: sets of entries of a model, and the ways to choose them. ``True`` means selected."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import storage
from ._typing import Bool
from .models import (
    align,
    backbone_prefix,
    describe,
    find_difference,
    layer_of,
    row_axis,
    transposed_parameters,
    weights_fingerprint,
)
from .scores import FisherScores, check_scores

logger = logging.getLogger(__name__)

FORMAT = "fisherscope.mask"

Within = Literal["model", "layer", "parameter"]
Granularity = Literal["entry", "row", "parameter"]


class MaskMismatch(ValueError):
    """A mask belongs to another model, or two masks to different ones."""


@dataclass(frozen=True, eq=False)
class Mask(Mapping[str, Tensor]):
    """A set of entries of a model.

    Attributes:
        tensors: Parameter name to a tensor of its shape, ``True`` where the entry is selected.
        provenance: Where the mask came from.

    Raises:
        TypeError: If a tensor is not boolean.
    """

    tensors: Mapping[str, Bool[Tensor, "..."]]
    provenance: storage.Provenance = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse anything but booleans."""
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
                found = tensor.dtype if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
                raise TypeError(f"A mask holds boolean tensors, but '{name}' is {found}.")

    def __getitem__(self, name: str) -> Tensor:
        """The selected entries of one parameter."""
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Parameter names."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Number of parameters, selected or not."""
        return len(self.tensors)

    def __repr__(self) -> str:
        """One line for notebooks."""
        return f"Mask({self.num_selected:,} of {self.num_entries:,} entries selected, {self.density:.2%})"

    @property
    def num_entries(self) -> int:
        """Number of scalars covered."""
        return sum(tensor.numel() for tensor in self.values())

    @property
    def num_selected(self) -> int:
        """Number of scalars selected."""
        return sum(int(tensor.sum()) for tensor in self.values())

    @property
    def density(self) -> float:
        """Share of the entries that is selected."""
        return self.num_selected / max(self.num_entries, 1)

    def __invert__(self) -> "Mask":
        """The entries that are not selected."""
        return Mask({name: ~tensor for name, tensor in self.items()}, _derived("~", self))

    def __and__(self, other: "Mask") -> "Mask":
        """The entries selected by both."""
        return _combine("&", torch.logical_and, self, other)

    def __or__(self, other: "Mask") -> "Mask":
        """The entries selected by either."""
        return _combine("|", torch.logical_or, self, other)

    def for_model(self, model: nn.Module, *, strict: bool = False) -> dict[str, Tensor]:
        """The mask under the names of a model that has the same backbone, on the model's device.

        Parameters of the model's head that the mask does not cover are missing from the result. A backbone with
        other weights gets a warning, or an error if ``strict``.

        Raises:
            MaskMismatch: If a backbone parameter is missing or differs in shape; names the first.
        """
        origin = self.provenance.get("model", {})
        prefix = origin.get("prefix", backbone_prefix(model))
        if difference := find_difference(self.tensors, prefix, model):
            raise MaskMismatch(f"The mask does not fit this model: {difference}.")
        if "backbone_fingerprint" in origin and origin["backbone_fingerprint"] != weights_fingerprint(
            model, backbone_only=True
        ):
            message = f"The mask was made for other weights ({origin['name']}) of the same architecture."
            if strict:
                raise MaskMismatch(message)
            logger.warning(message)
        parameters = dict(model.named_parameters())
        return {name: tensor.to(parameters[name].device) for name, tensor in align(self.tensors, prefix, model).items()}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, complete or not at all: one bool tensor per parameter, provenance as JSON."""
        header = {
            "format": FORMAT,
            "format_version": storage.FORMAT_VERSION,
            "parameters": list(self),  # in order, which safetensors does not keep
            "provenance": dict(self.provenance),
        }
        with storage.atomic(path) as temporary:
            contents = {name: tensor.cpu().contiguous() for name, tensor in self.items()}
            save_file(contents, temporary, metadata={"fisherscope": json.dumps(header, sort_keys=True)})

    @staticmethod
    def load(path: str | Path) -> "Mask":
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: If there is no such file.
            WrongFile: If it holds something else, another version, or is damaged.
        """
        path = Path(path)
        if path.is_file() and h5py.is_hdf5(path):
            raise storage.WrongFile(f"{path} holds no mask; make one from scores with 'fisherscope mask'.")
        with storage.open_safetensors(path, FORMAT) as (file, header):
            try:
                tensors = {name: file.get_tensor(name) for name in header["parameters"]}
                provenance = dict(header["provenance"])
            except (KeyError, TypeError, ValueError) as error:
                raise storage.WrongFile(f"{path} has a damaged header; make it again.") from error
        if wrong := next((name for name, tensor in tensors.items() if tensor.dtype != torch.bool), None):
            raise storage.WrongFile(f"{path} has {tensors[wrong].dtype} values under '{wrong}', but masks are boolean.")
        if any(bool((tensor.view(torch.uint8) > 1).any()) for tensor in tensors.values()):  # not checked by safetensors
            raise storage.WrongFile(f"{path} is damaged: a mask holds 0 and 1 only; make it again.")
        return Mask(tensors, provenance)


def _combine(symbol: str, operation: Callable[[Tensor, Tensor], Tensor], a: Mask, b: Mask) -> Mask:
    different = set(a) ^ set(b) or {name for name in a if a[name].shape != b[name].shape}
    if different:
        raise MaskMismatch(
            f"Masks cover different parameters: {len(different)} are in only one of them or differ in shape, for "
            f"example '{min(different)}'; make both for the same model."
        )
    return Mask({name: operation(a[name], b[name]) for name in a}, _derived(symbol, a, b))


def _derived(symbol: str, *masks: Mask) -> dict[str, Any]:
    rules = [mask.provenance.get("rule", "?") for mask in masks]
    rule = f"~({rules[0]})" if len(rules) == 1 else f"({rules[0]}) {symbol} ({rules[1]})"
    return {**masks[0].provenance, "rule": rule}


def top_fraction(
    scores: FisherScores,
    fraction: float,
    *,
    within: Within = "model",
    granularity: Granularity = "entry",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Mask:
    """Select the highest scores: exactly ``round(fraction * n)`` of the n units of every group.

    Args:
        scores: What to rank by.
        fraction: Share of the units to select, in [0, 1].
        within: The group: the whole ``"model"``, every ``"layer"``, or every ``"parameter"``.
        granularity: The unit: a single ``"entry"``, a ``"row"`` (output unit or embedded token) or a whole
            ``"parameter"``. Rows and parameters are ranked by the mean score of their entries. Ties are broken by
            position; where they are of score 0, one warning says so.
        include: Shell patterns of parameter names to choose from; None means all.
        exclude: Shell patterns of parameter names to leave out.

    Raises:
        ValueError: If ``fraction`` is outside [0, 1], an option is unknown, or a pattern matches no parameter.
    """
    tensors = _ranked(scores, fraction, within, granularity, include, exclude)
    rule = f"top {fraction:g} of {_plural(granularity)} within {within}"
    return _finish(scores, tensors, _mask_provenance(scores, rule, include, exclude))


def bottom_fraction(
    scores: FisherScores,
    fraction: float,
    *,
    within: Within = "model",
    granularity: Granularity = "entry",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Mask:
    """Select the lowest scores: the complement of ``top_fraction(scores, 1 - fraction)`` among those considered.

    Arguments and errors are those of :func:`top_fraction`.
    """
    _check_fraction(fraction)
    tensors = _ranked(scores, 1 - fraction, within, granularity, include, exclude, complement=True)
    rule = f"bottom {fraction:g} of {_plural(granularity)} within {within}"
    return _finish(scores, tensors, _mask_provenance(scores, rule, include, exclude))


def sharma2024(scores: FisherScores, select: Literal["top", "bottom"] = "top") -> Mask:
    """The masks of the loss surfaces in arXiv 2406.14005, figure 1, as the published code makes them.

    Whole parameters are ranked by their mean score, and the halves are halves of their number: of 202 parameters the
    upper 101. Most of the highest ranks are biases and norms, which rest in a landscape, so that far fewer entries move
    for the top than for the bottom. For comparison with that work; a fair mask is made by :func:`top_fraction`.

    Args:
        scores: What to rank by.
        select: Which half; the lower one has the smaller number of an odd number of parameters.

    Raises:
        ValueError: If ``select`` is unknown.
    """
    if select not in ("top", "bottom"):
        raise ValueError(f"select must be 'top' or 'bottom' for the published masks, got {select!r}.")
    count = len(scores) - len(scores) // 2
    share, complement = count / len(scores), select == "bottom"
    chosen = _ranked(scores, share, "model", "parameter", None, None, complement=complement)
    rule = f"{select} half of the parameters by mean score (sharma2024)"
    return Mask(chosen, _mask_provenance(scores, rule, None, None))


def random_fraction(
    like: FisherScores | Mask | nn.Module,
    fraction: float,
    *,
    seed: int,
    granularity: Granularity = "entry",
    stratify: Within | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Mask:
    """Select at random: exactly ``round(fraction * n)`` of the n units of every group.

    Args:
        like: Scores, a mask or a model that names the parameters and their shapes.
        fraction: Share of the units to select, in [0, 1].
        seed: Of the draw; the same on every device.
        granularity: The unit, as in :func:`top_fraction`.
        stratify: ``"layer"`` or ``"parameter"`` selects the same share of each; None draws from the whole model.
        include: Shell patterns of parameter names to choose from; None means all.
        exclude: Shell patterns of parameter names to leave out.

    Raises:
        ValueError: As in :func:`top_fraction`.
    """
    if isinstance(like, nn.Module):
        shapes: Mapping[str, Tensor] = dict(like.named_parameters())
        transposed, origin = sorted(transposed_parameters(like)), {"model": describe(like)}
    else:
        if not isinstance(like, FisherScores | Mask):
            raise TypeError(f"like must be scores, a mask or a model, got a {type(like).__name__}; load it first.")
        shapes, origin = like, dict(like.provenance)
        transposed = origin.get("model", {}).get("transposed", [])
    if stratify not in (None, "model", "layer", "parameter"):
        raise ValueError(f"stratify must be 'model', 'layer' or 'parameter', got {stratify!r}.")
    names = _considered(shapes, include, exclude)
    generator = torch.Generator().manual_seed(seed)
    units = {
        name: torch.rand(
            _unit_shape(shapes[name], granularity, row_axis(name, transposed)), generator=generator, dtype=torch.float64
        )
        for name in names
    }
    drawn = {name: u.expand(shapes[name].shape) for name, u in units.items()}
    tensors, _ = highest_units(drawn, fraction, stratify or "model", granularity, transposed)
    rule = f"random {fraction:g} of {_plural(granularity)} within {stratify or 'model'}, seed {seed}"
    provenance = storage.provenance(model=origin.get("model", {}), rule=rule, include=include, exclude=exclude)
    return _finish(shapes, tensors, provenance)


def random_like(mask: Mask, *, seed: int) -> Mask:
    r"""As many entries of every parameter as a mask selects, drawn at random: :math:`|R_k| = |M_k|`.

    What a mask has to beat, if it is to matter which entries it selects: how many of which parameters is the same.

    Args:
        mask: Any mask.
        seed: Of the draw; the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(selected: Tensor) -> Tensor:
        places = torch.randperm(selected.numel(), generator=generator)[: int(selected.sum())]
        flat = torch.zeros(selected.numel(), dtype=torch.bool)
        flat[places] = True
        return flat.view(selected.shape)

    rule = f"as many random entries of every parameter as in ({mask.provenance.get('rule', 'a mask')}), seed {seed}"
    provenance = storage.provenance(model=mask.provenance.get("model", {}), rule=rule)
    return Mask({name: drawn(selected) for name, selected in mask.items()}, provenance)


def _ranked(
    scores: FisherScores,
    fraction: float,
    within: str,
    granularity: str,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    *,
    complement: bool = False,
) -> dict[str, Tensor]:
    """The highest units of the parameters considered, or the others; one warning if scores do not tell these apart."""
    check_scores(scores)
    chosen = {name: scores[name] for name in _considered(scores, include, exclude)}
    transposed = scores.provenance.get("model", {}).get("transposed", [])
    top, zeros = highest_units(chosen, fraction, within, granularity, transposed)
    if zeros.are_cut:
        logger.warning(
            "The cut of this mask falls among %s of score 0: there are %s, of which it takes %s by their position, "
            "which means nothing; estimate the scores from more examples, take a %s fraction or exclude parameters.",
            _plural(granularity),
            f"{zeros.units:,}",
            f"{zeros.units - zeros.among_highest if complement else zeros.among_highest:,}",
            "larger" if complement else "smaller",
        )
    return {name: ~tensor for name, tensor in top.items()} if complement else top


def _finish(like: Mapping[str, Tensor], selected: Mapping[str, Tensor], provenance: dict[str, Any]) -> Mask:
    """A mask over all parameters of ``like``; the ones not considered have nothing selected."""
    empty = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in like.items() if name not in selected}
    return Mask({name: selected[name] if name in selected else empty[name] for name in like}, provenance)


def _mask_provenance(
    scores: FisherScores, rule: str, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, Any]:
    facts = {key: scores.provenance.get(key) for key in ("data", "objective")}
    return storage.provenance(
        model=scores.provenance.get("model", {}),
        rule=rule,
        include=include,
        exclude=exclude,
        scores={**facts, "num_examples": scores.num_examples, "estimator": scores.estimator, "unit": scores.unit},
    )


def check_mask(mask: object) -> None:
    """Refuse what is given as a mask and is none, such as its path.

    Raises:
        TypeError: Saying how to make one.
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"A mask must be a Mask, got a {type(mask).__name__}; take Mask.load(path) or Mask(tensors).")


def _plural(granularity: str) -> str:
    return {"entry": "entries"}.get(granularity, f"{granularity}s")


def _considered(like: Mapping[str, Any], include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[str]:
    for pattern in (*(include or ()), *(exclude or ())):
        if not any(fnmatchcase(name, pattern) for name in like):
            raise ValueError(
                f"The pattern {pattern!r} matches no parameter; they are named like {next(iter(like), '')!r}."
            )
    kept = [name for name in like if not include or any(fnmatchcase(name, p) for p in include)]
    return [name for name in kept if not any(fnmatchcase(name, p) for p in exclude or ())]


def _check_fraction(fraction: float) -> None:
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")


class Zeros(NamedTuple):
    """Units of score 0: how many, how many of them are among the highest, and whether position decided which."""

    units: int
    among_highest: int
    are_cut: bool


def highest_units(
    scores: Mapping[str, Tensor], fraction: float, within: str, granularity: str, transposed: Sequence[str]
) -> tuple[dict[str, Tensor], Zeros]:
    """The highest units of every group, spread over the entries of the unit, and what became of those of score 0."""
    _check_fraction(fraction)
    if within not in ("model", "layer", "parameter"):
        raise ValueError(f"within must be 'model', 'layer' or 'parameter', got {within!r}.")
    groups: dict[str, list[str]] = {}
    for name in scores:
        group = {"model": "", "layer": layer_of(name), "parameter": name}[within]
        groups.setdefault(group, []).append(name)
    selected: dict[str, Tensor] = {}
    zeros = Zeros(0, 0, False)
    for names in groups.values():
        units = {name: _unit_means(scores[name], granularity, row_axis(name, list(transposed))) for name in names}
        flat = torch.cat([unit.flatten() for unit in units.values()])
        count, size, positive = round(fraction * flat.numel()), flat.numel(), int(flat.count_nonzero())
        zeros = Zeros(
            zeros.units + size - positive,
            zeros.among_highest + max(count - positive, 0),
            zeros.are_cut or positive < count < size,
        )
        pieces = highest(flat, count).split([unit.numel() for unit in units.values()])
        for (name, unit), piece in zip(units.items(), pieces, strict=True):
            selected[name] = piece.view(unit.shape).expand(scores[name].shape).clone()
    return selected, zeros


def _unit_means(scores: Tensor, granularity: str, axis: int) -> Tensor:
    """Scores of the units, in a shape that broadcasts to the parameter."""
    shape = _unit_shape(scores, granularity, axis)
    joined = [a for a, size in enumerate(shape) if size != scores.shape[a]]
    return scores.mean(joined, keepdim=True, dtype=torch.float64) if joined else scores


def _unit_shape(like: Tensor, granularity: str, axis: int) -> tuple[int, ...]:
    if granularity == "entry":
        return tuple(like.shape)
    if granularity == "row":
        return tuple(size if a == (axis if like.ndim > 1 else 0) else 1 for a, size in enumerate(like.shape))
    if granularity == "parameter":
        return (1,) * like.ndim
    raise ValueError(f"granularity must be 'entry', 'row' or 'parameter', got {granularity!r}.")


def highest(values: Tensor, count: int) -> Bool[Tensor, "units"]:
    """Mark exactly ``count`` values, the highest ones, earlier positions first among equals; linear time."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(values.numel() - count + 1).values
    selected = values > threshold
    equal = (values == threshold).nonzero().squeeze(1)
    selected[equal[: count - int(selected.sum())]] = True
    return selected
