"""What a training changed, as a small file: with it, anyone who has the base model has the trained one, bit by bit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import storage
from .._typing import Int
from ..masks import Mask
from ..models import align, backbone_prefix, describe, find_difference

FORMAT = "fisherscope.difference"

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Difference:
    """The entries of a model that a training changed, and their new values.

    The values themselves are kept, not what was added to them: the sum of a value and a rounded difference is not
    always the new value.

    Attributes:
        indices: Parameter name to the positions of its changed entries, in row-major order and ascending.
        values: The same names to the new values at these positions; and, in their own shape, the parameters that the
            base model lacks, such as the head of the task.
        shapes: Name to shape of every parameter of the model, changed or not.
        provenance: Where the difference came from; ``provenance["base"]`` is the fingerprint of what it applies to.
    """

    indices: Mapping[str, Int[Tensor, "changed"]]
    values: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    provenance: storage.Provenance = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line for notebooks."""
        return f"Difference({self.num_entries:,} entries in {len(self.values)} parameters, {self.density:.2%})"

    @property
    def num_entries(self) -> int:
        """Number of values kept."""
        return sum(values.numel() for values in self.values.values())

    @property
    def density(self) -> float:
        """Share of the model's entries whose values are kept."""
        return self.num_entries / max(sum(map(prod, self.shapes.values())), 1)

    @staticmethod
    def between(before: Mapping[str, Tensor] | str | Path, model: nn.Module, mask: Mask | None = None) -> "Difference":
        """What is different, bit by bit, in a trained model.

        Args:
            before: The base model: parameters by name, a safetensors file, or a folder that has a
                ``model.safetensors``. Parameters that it lacks, or has in another shape, are kept whole.
            model: The trained model.
            mask: What was to change; parameters that it lacks were free to.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the base model has none of the parameters, or an entry changed that the mask does not select.
        """
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        base = _base(before, model, parameters)
        changed = {name: _changed(base[name], parameters[name]) for name in base}
        if mask is not None:
            _check_inside(changed, mask, model)
        indices = {name: positions for name, positions in changed.items() if len(positions)}
        values = {
            name: p.flatten()[indices[name].to(p.device).long()].cpu() if name in base else p.cpu().clone()
            for name, p in parameters.items()
            if name in indices or name not in base
        }
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        facts = storage.provenance(model=describe(model), base=_fingerprint(base))
        return Difference(indices, values, shapes, facts)

    def apply_to(self, model: nn.Module) -> None:
        """Turn a base model into the trained one, bit for bit.

        Args:
            model: As the base model was, with the same head; the values of a head that the base lacks do not matter.

        Raises:
            ValueError: If the model has other parameters or other weights than the base; it is left as it was.
        """
        parameters = dict(model.named_parameters())
        self._check_fits(parameters)
        with torch.no_grad():
            for name, values in self.values.items():
                parameter = parameters[name]
                if name in self.indices:
                    positions = self.indices[name].to(parameter.device).long()
                    parameter.put_(positions, values.to(parameter.device))
                else:
                    parameter.copy_(values)

    def _check_fits(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name in (*self.shapes, *parameters):
            ours, theirs = self.shapes.get(name), tuple(parameters[name].shape) if name in parameters else None
            if ours != theirs:
                raise ValueError(f"The difference does not fit this model: '{name}' is {ours} there but {theirs} here.")
        for name, values in self.values.items():
            if values.dtype != parameters[name].dtype:
                raise ValueError(
                    f"The difference is of {values.dtype} values, but '{name}' is {parameters[name].dtype}; load the "
                    "model in the same precision."
                )
        base = {name: p.detach() for name, p in parameters.items() if name in self.indices or name not in self.values}
        if (found := _fingerprint(base)) != self.provenance["base"]:
            raise ValueError(
                f"The difference belongs to a base model with fingerprint {self.provenance['base']}, but these weights "
                f"have {found}; load the checkpoint that the training started from."
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, complete or not at all; shapes and provenance are JSON in its header."""
        header = {
            "format": FORMAT,
            "format_version": storage.FORMAT_VERSION,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "provenance": dict(self.provenance),
        }
        contents = {f"values.{name}": values for name, values in self.values.items()}
        contents |= {f"indices.{name}": positions for name, positions in self.indices.items()}
        with storage.atomic(path) as temporary:
            contiguous = {name: tensor.cpu().contiguous() for name, tensor in contents.items()}
            save_file(contiguous, temporary, metadata={"fisherscope": json.dumps(header)})

    @staticmethod
    def load(path: str | Path) -> "Difference":
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: If there is no such file.
            WrongFile: If it holds something else, another version, or is damaged.
        """
        path = Path(path)
        with storage.open_safetensors(path, FORMAT) as (file, header):
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        try:
            shapes = {str(name): tuple(map(int, shape)) for name, shape in header["shapes"].items()}
            found: dict[str, dict[str, Tensor]] = {"indices": {}, "values": {}}
            for kind, tensors_of_kind in found.items():
                tensors_of_kind |= {n: tensors[f"{kind}.{n}"] for n in shapes if f"{kind}.{n}" in tensors}
            difference = Difference(found["indices"], found["values"], shapes, dict(header["provenance"]))
            _check_whole(difference, len(tensors))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise storage.WrongFile(f"{path} is damaged; make it again.") from error
        return difference


def _base(before: Any, model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base model's values of the parameters that it has, as a model of the same precision loads them."""
    found = before if isinstance(before, Mapping) else _weights(Path(before))
    inside, outside = backbone_prefix(model), f"{getattr(model, 'base_model_prefix', '')}."
    base = {}
    for name, parameter in parameters.items():
        aliases = (name, name.removeprefix(inside), outside + name)  # a checkpoint of the backbone, or with a head
        value = next((found[alias] for alias in aliases if alias in found), None)
        if value is not None and value.shape == parameter.shape:
            base[name] = value.detach().to(parameter)
    if not base:
        raise ValueError(f"A base model is needed, but this one has no parameter of a {type(model).__name__}.")
    return base


def _weights(path: Path) -> dict[str, Tensor]:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise storage.WrongFile(f"{file} is not a safetensors file or was cut short; make it again.") from error


def _changed(before: Tensor, after: Tensor) -> Int[Tensor, "changed"]:
    """Positions of the entries that differ in any bit: 0 from -0, but no NaN from itself."""
    bits = _BITS[after.element_size()]
    positions = (before.contiguous().view(bits) != after.contiguous().view(bits)).flatten().nonzero()[:, 0].cpu()
    return positions.to(torch.int32 if after.numel() < 2**31 else torch.int64)


def _check_inside(changed: Mapping[str, Tensor], mask: Mask, model: nn.Module) -> None:
    prefix = mask.provenance.get("model", {}).get("prefix", backbone_prefix(model))
    if difference := find_difference(mask, prefix, model):
        raise ValueError(f"The mask does not fit this model: {difference}.")
    for name, selected in align(mask, prefix, model).items():
        if name in changed and (outside := int((~selected.cpu().flatten()[changed[name].long()]).sum())):
            raise ValueError(
                f"The mask should select every entry that changed, but in '{name}' {outside} changed that it does not "
                "select; give the mask of the training, or none."
            )


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes and every bit; 16 hexadecimal digits."""
    parts: list[bytes | str] = []
    for name in sorted(tensors):
        flat = tensors[name].cpu().contiguous().flatten()
        parts += [f"{name}{tuple(tensors[name].shape)}", flat.view(torch.uint8).numpy().tobytes()]
    return storage.digest(*parts)


def _check_whole(difference: Difference, num_tensors: int) -> None:
    if num_tensors != len(difference.indices) + len(difference.values) or "base" not in difference.provenance:
        raise ValueError("something is missing or too much")
    for name, values in difference.values.items():
        if name not in difference.indices and tuple(values.shape) != difference.shapes[name]:
            raise ValueError("a shape")
    for name, positions in difference.indices.items():
        count = prod(difference.shapes[name])
        if positions.dtype not in (torch.int32, torch.int64) or positions.shape != difference.values[name].shape:
            raise ValueError("a number of positions")
        if bool((positions < 0).any() | (positions >= count).any() | (positions.diff() <= 0).any()):
            raise ValueError("a position")
