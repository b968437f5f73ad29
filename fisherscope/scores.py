"""Fisher scores: one non-negative number per entry of a model, and how they were made."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from torch import Tensor

from . import storage
from ._typing import Float
from .models import layer_of

FORMAT = "fisherscope.scores"

Estimator = Literal["empirical"]
Unit = Literal["sequence"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, eq=False)
class FisherScores(Mapping[str, Tensor]):
    r"""Diagonal Fisher information, one value per entry of every parameter.

    .. math::  F_i = \frac{1}{N} \sum_{n=1}^{N} \Big(\frac{\partial \ell_n}{\partial \theta_i}\Big)^2,
               \qquad \ell_n = -\log p(y_n \mid x_n, \theta)

    Attributes:
        tensors: Parameter name to scores in the parameter's own shape, in squared nats per squared unit of the
            parameter; float32, or float64 for a float64 model. Tied parameters appear once, under their first name.
        num_examples: :math:`N`, the number of examples averaged over.
        estimator: ``"empirical"`` takes :math:`y_n` from the data.
        unit: ``"sequence"``: every example is one term of the sum.
        reduction: How the scored tokens of an example make up :math:`\ell_n`: their ``"mean"`` or their ``"sum"``.
        provenance: Where the scores came from.

    Raises:
        ValueError: If a score is negative or not finite, or nothing was averaged.
    """

    tensors: Mapping[str, Float[Tensor, "..."]]
    num_examples: int
    estimator: Estimator = "empirical"
    unit: Unit = "sequence"
    reduction: Reduction = "mean"
    provenance: storage.Provenance = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be a mean of squares."""
        if self.num_examples < 1:
            raise ValueError("Fisher scores are a mean over examples, but num_examples is 0.")
        for name, score in self.tensors.items():
            if not bool((score >= 0).all() & torch.isfinite(score).all()):
                wrong = score[~((score >= 0) & torch.isfinite(score))]
                raise ValueError(
                    f"Fisher scores are finite and cannot be negative, but '{name}' has {wrong.numel()} entries "
                    f"that are not, the first {wrong[0].item():.3g}."
                )

    def __getitem__(self, name: str) -> Tensor:
        """The scores of one parameter."""
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Parameter names, in the model's order."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self.tensors)

    def __repr__(self) -> str:
        """One line for notebooks."""
        return (
            f"FisherScores({len(self)} parameters, {self.num_entries:,} entries, {self.estimator}, "
            f"{self.num_examples} examples by {self.unit})"
        )

    @property
    def num_entries(self) -> int:
        """Number of scalars scored."""
        return sum(score.numel() for score in self.values())

    def share_holding(self, share: float) -> float:
        """The smallest share of the entries that together hold ``share`` of the summed scores; NaN if all are 0.

        Parameters that were drawn at random are left out.
        """
        kept = [score.flatten() for name, score in self.items() if name not in self.new_parameters]
        flat = torch.cat(kept).sort(descending=True).values
        held = flat.cumsum(0, dtype=torch.float64)
        if not held[-1]:
            return float("nan")
        return (int(torch.searchsorted(held, share * held[-1])) + 1) / len(flat)

    @property
    def new_parameters(self) -> list[str]:
        """Parameters that the checkpoint lacked and that were drawn at random."""
        return list(self.provenance.get("model", {}).get("new_parameters", []))

    def save(self, path: str | Path) -> None:
        """Write an HDF5 file, complete or not at all."""
        with storage.atomic(path) as temporary:
            attributes = {key: getattr(self, key) for key in ("estimator", "unit", "reduction", "num_examples")}
            write(temporary, self.tensors, attributes, self.provenance)

    @staticmethod
    def load(path: str | Path) -> "FisherScores":
        """Read a file of :meth:`save`, or the ``.part`` of a run in progress.

        Raises:
            FileNotFoundError: If there is no such file.
            WrongFile: If it holds something else, another version, or is damaged.
            ValueError: If a score in it is negative or not finite.
        """
        with storage.open_hdf5(path, FORMAT) as file:
            facts = storage.attributes(file)
            try:
                num_examples = int(facts["num_examples"])
                kind: dict[str, Any] = {key: str(facts[key]) for key in ("estimator", "unit", "reduction")}
                provenance = dict(json.loads(facts["provenance"]))
            except (KeyError, TypeError, ValueError) as error:
                raise storage.WrongFile(f"{path} has damaged attributes; make it again.") from error
            divisor = num_examples if "progress" in facts else 1
            tensors = {name: tensor / divisor for name, tensor in read_tensors(file).items()}
        return FisherScores(tensors, num_examples, **kind, provenance=provenance)


def by_layer(scores: FisherScores, *, include_new: bool = False) -> dict[str, float]:
    """Mean score of the entries of every layer (:func:`fisherscope.models.layer_of`), in the model's order.

    Parameters that were drawn at random are left out unless ``include_new``.
    """
    totals: dict[str, tuple[float, int]] = {}
    for name, score in scores.items():
        if include_new or name not in scores.new_parameters:
            total, count = totals.get(layer_of(name), (0.0, 0))
            totals[layer_of(name)] = total + float(score.sum(dtype=torch.float64)), count + score.numel()
    return {layer: total / count for layer, (total, count) in totals.items()}


def write(
    path: Path, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], provenance: storage.Provenance
) -> None:
    """Write the file of complete scores, or of sums in progress (attribute ``progress``)."""
    with h5py.File(path, "w") as file:
        storage.write_header(file, FORMAT, provenance)
        for name, value in attributes.items():
            file.attrs[name] = value
        group = file.create_group("scores", track_order=True)
        for name, tensor in tensors.items():
            group.create_dataset(name, data=tensor.detach().cpu().numpy())


def read_tensors(file: h5py.File) -> dict[str, Tensor]:
    """The datasets of an open scores file, in the order they were written.

    Raises:
        WrongFile: If one of them is no floating-point array.
    """
    group = file.get("scores")
    if not isinstance(group, h5py.Group):
        raise storage.WrongFile(f"{file.filename} has no group 'scores'; make it again.")
    tensors = {}
    for name, dataset in group.items():
        if not isinstance(dataset, h5py.Dataset) or dataset.dtype not in ("float32", "float64"):
            found = f"{dataset.dtype} values" if isinstance(dataset, h5py.Dataset) else "no data set"
            raise storage.WrongFile(f"{file.filename} has {found} under '{name}', but scores are float32.")
        tensors[name] = torch.from_numpy(np.asarray(dataset))
    return tensors
