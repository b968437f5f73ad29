"""The noun Landscape, and its file."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .. import storage
from .._typing import Bool, Float

FORMAT = "fisherscope.landscape"


@dataclass(frozen=True, eq=False)
class Axis:
    """One coordinate of a landscape.

    Attributes:
        name: For example ``"axis0"``.
        steps: Coordinates along the direction; 0 is the model itself.
        norm: Euclidean norm of the direction as used (after the mask), so that ``step * norm`` is a distance.
        entries: Number of entries that move, which may be fewer than the mask selects.
        kind: What the direction is, in words.
    """

    name: str
    steps: Float[np.ndarray, "points"]
    norm: float
    entries: int
    kind: str = "random, filter-normalised"


@dataclass(frozen=True, eq=False)
class Landscape:
    """Losses on a grid around a model.

    Attributes:
        axes: The grid, slowest axis first.
        loss: Mean loss at every grid point: nats per scored token for language models, per example otherwise (squared
            units for regression). Raw: a model pushed far enough diverges, so infinity and NaN are legitimate values.
        evaluated: Which grid points have been computed; the others hold NaN.
        objective: What the loss is of.
        references: Horizontal lines that give the loss of a language model a scale, in nats: ``"uniform"`` (ln V,
            guessing) and ``"unigram"`` (entropy of the scored labels).
        title: What moves, in words, for figures.
        provenance: Where the landscape came from.
    """

    axes: tuple[Axis, ...]
    loss: Float[np.ndarray, "*grid"]
    evaluated: Bool[np.ndarray, "*grid"]
    objective: str = "mlm"
    references: Mapping[str, float] = field(default_factory=dict)
    title: str = "all entries"
    provenance: storage.Provenance = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit the axes."""
        grid = tuple(len(axis.steps) for axis in self.axes)
        if self.loss.shape != grid or self.evaluated.shape != grid:
            raise ValueError(
                f"A landscape with axes of {grid} points needs loss and evaluated of that shape, got "
                f"{self.loss.shape} and {self.evaluated.shape}."
            )

    def __repr__(self) -> str:
        """One line for notebooks."""
        grid = " x ".join(str(size) for size in self.loss.shape)
        return f"Landscape({grid} points, {self.title}, {self.objective}, {self.centre_loss:.4g} at the centre)"

    @property
    def centre_loss(self) -> float:
        """Loss of the model itself, at step 0 of every axis."""
        return float(self.loss[tuple(int(np.argmin(np.abs(axis.steps))) for axis in self.axes)])

    @property
    def perplexity(self) -> Float[np.ndarray, "*grid"]:
        """exp(loss), for losses in nats per token."""
        with np.errstate(over="ignore"):
            return np.exp(self.loss)

    def save(self, path: str | Path) -> None:
        """Write an HDF5 file with dimension scales, complete or not at all."""
        with storage.atomic(path) as temporary, h5py.File(temporary, "w") as file:
            _write(file, self)

    @staticmethod
    def load(path: str | Path) -> "Landscape":
        """Read a file of :meth:`save`, or the ``.part`` of a scan in progress.

        Raises:
            FileNotFoundError: If there is no such file.
            WrongFile: If it holds something else, another version, or is damaged.
        """
        with storage.open_hdf5(path, FORMAT) as file:
            return _read(file)


def _write(file: h5py.File, landscape: Landscape) -> None:
    storage.write_header(file, FORMAT, landscape.provenance)
    file.attrs["objective"] = landscape.objective
    file.attrs["title"] = landscape.title
    file.attrs["references"] = json.dumps(dict(landscape.references), sort_keys=True)
    loss = file.create_dataset("loss", data=landscape.loss.astype(np.float64))
    evaluated = file.create_dataset("evaluated", data=landscape.evaluated)
    for number, axis in enumerate(landscape.axes):
        scale = file.create_dataset(f"axis{number}", data=np.asarray(axis.steps, dtype=np.float64))
        for key, value in asdict(axis).items():
            if key != "steps":
                scale.attrs[key] = value
        scale.make_scale(f"axis{number}")
        for dataset in (loss, evaluated):
            dataset.dims[number].attach_scale(scale)


def _read(file: h5py.File) -> Landscape:
    try:
        loss, evaluated = np.asarray(file["loss"]), np.asarray(file["evaluated"]).astype(bool)
        scales = [file[f"axis{number}"] for number in range(loss.ndim)]
        axes = tuple(Axis(steps=np.asarray(scale), **_own(storage.attributes(scale))) for scale in scales)
        facts = storage.attributes(file)
        return Landscape(
            axes,
            loss,
            evaluated,
            str(facts["objective"]),
            json.loads(facts["references"]),
            str(facts["title"]),
            json.loads(facts["provenance"]),
        )
    except (KeyError, ValueError) as error:
        raise storage.WrongFile(f"{file.filename} is not a complete landscape ({error}); make it again.") from error


def _own(attributes: dict[str, Any]) -> dict[str, Any]:
    """Those attributes of a dimension scale that are ours; HDF5 adds some."""
    return {
        "name": str(attributes["name"]),
        "norm": float(attributes["norm"]),
        "entries": int(attributes["entries"]),
        "kind": str(attributes["kind"]),
    }


class Journal:
    """A landscape being written, flushed row by row."""

    def __init__(self, file: h5py.File) -> None:
        self._file = file

    def record(self, index: tuple[int, ...], loss: float) -> None:
        """Write one point."""
        self._file["loss"][index] = loss  # pyright: ignore[reportIndexIssue]
        self._file["evaluated"][index] = True  # pyright: ignore[reportIndexIssue]

    def flush(self) -> None:
        """Make everything recorded so far survive a killed process."""
        self._file.flush()
        os.fsync(self._file.id.get_vfd_handle())

    @property
    def landscape(self) -> Landscape:
        """What has been measured so far."""
        return _read(self._file)


@contextmanager
def journal(path: Path, empty: Landscape) -> Iterator[Journal]:
    """Go on with the scan in ``path`` if there is one, else begin with an empty landscape.

    A file without any point is not left behind when the scan is refused.

    Raises:
        ValueError: If the file was begun with other settings; names the first that differs.
        WrongFile: If it is no landscape.
    """
    if path.exists():
        _check_same_scan(path, Landscape.load(path), empty)
    else:
        empty.save(path)
    refused = False
    try:
        with h5py.File(path, "r+") as file:
            try:
                yield Journal(file)
            except ValueError:
                refused = not np.asarray(file["evaluated"]).any()
                raise
    finally:
        if refused:
            path.unlink()


def _check_same_scan(path: Path, before: Landscape, now: Landscape) -> None:
    same_grid = before.loss.shape == now.loss.shape and all(
        np.array_equal(a.steps, b.steps) for a, b in zip(before.axes, now.axes, strict=True)
    )
    found = None if same_grid else "grid"
    if found := found or storage.difference(before.provenance, json.loads(json.dumps(dict(now.provenance)))):
        raise ValueError(
            f"{path} was begun with another {found}; repeat that command to go on, or delete the file to start afresh."
        )
