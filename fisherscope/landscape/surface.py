"""The noun Landscape, and its file."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from .. import storage
from .._typing import Bool, Float, Int

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
        parameters: Number of parameters of which something moves.
    """

    name: str
    steps: Float[np.ndarray, "points"]
    norm: float
    entries: int
    kind: str = "random, filter-normalised"
    parameters: int = 0


@dataclass(frozen=True, eq=False)
class Geometry:
    r"""How the directions :math:`d_k` of a landscape lie to each other and to the weights :math:`\theta`.

    Attributes:
        inner: :math:`d_i^\top d_j`.
        weight_norm: :math:`\lVert\theta\rVert` of all parameters, so that a step can be told relative to the weights.
        fisher: :math:`d_i^\top F d_j` with diagonal scores F; None without scores.
        quadratic: Whether :math:`\tfrac12 \delta^\top F \delta` is what the scores predict for the loss: those of the
            tokens that are scored one by one, or of the examples if each has one label.
    """

    inner: Float[np.ndarray, "axes axes"]
    weight_norm: float
    fisher: Float[np.ndarray, "axes axes"] | None = None
    quadratic: bool = False

    @property
    def cosines(self) -> Float[np.ndarray, "axes axes"]:
        """The cosines between the directions."""
        norms = np.sqrt(np.diag(self.inner))
        return self.inner / np.outer(norms, norms)


@dataclass(frozen=True)
class Marker:
    """Another model in the space that the axes span, or near it.

    Attributes:
        name: What figures call it.
        steps: Its coordinates, one per axis: those of the nearest point of the space.
        distance: From there to the model, Euclidean.
        loss: Of the model itself; None if it was not measured.
        nearest_loss: Of the nearest point of the space, which is what a picture of the landscape shows.
    """

    name: str
    steps: tuple[float, ...]
    distance: float
    loss: float | None = None
    nearest_loss: float | None = None


@dataclass(frozen=True)
class Prediction:
    """How points that were not measured were filled in, and how far off they may be.

    The error of a point is abs(predicted - true) / true, or relative to the range of the losses where some are not
    positive. It is estimated by leaving out each of the measured points, of those below the ceiling.

    Attributes:
        tolerance: What the 95th percentile of the errors was to be.
        median: Estimated median of the errors.
        percentile95: Estimated 95th percentile.
        maximum: The largest error found.
        measured: Number of points that were measured, of all replicates together.
    """

    tolerance: float
    median: float
    percentile95: float
    maximum: float
    measured: int


@dataclass(frozen=True, eq=False)
class Point:
    """What was measured at one point of a landscape.

    Attributes:
        loss: Mean loss per scored token.
        metrics: Other values by name.
        examples: The loss of every example, summed over its scored tokens; None if it is not kept.
        clipped: Whether only the first batch was looked at, because its loss is above the ceiling.
    """

    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    examples: Float[np.ndarray, "examples"] | None = None
    clipped: bool = False


@dataclass(frozen=True, eq=False)
class Landscape:
    """Losses on a grid around a model.

    Attributes:
        axes: The grid, slowest axis first.
        loss: Mean loss at every grid point: nats per scored token for language models, per example otherwise (squared
            units for regression). Raw: a model pushed far enough diverges, so infinity and NaN are legitimate values.
        evaluated: Which grid points have been computed; the others hold NaN, or a prediction.
        objective: What the loss is of.
        references: Horizontal lines that give the loss of a language model a scale, in nats: ``"uniform"`` (ln V,
            guessing) and ``"unigram"`` (entropy of the scored labels).
        title: What moves, in words, for figures.
        provenance: Where the landscape came from.
        metrics: Other surfaces of the same grid, by name.
        clipped: At which points only the first batch was looked at, because its loss is above the ceiling.
        examples: The loss of every example at every point, summed over its scored tokens; kept along one axis.
        counts: The number of scored tokens of every example, where ``examples`` are kept.
        geometry: How the directions lie; None in hand-made landscapes.
        markers: Other models in the space of the axes.
        connected: Whether the markers are a path, in their order.
        replicates: The same along other random directions; ``loss`` is then the mean over them, ``axes`` are those of
            the first.
        prediction: How the points that were not evaluated were filled in, if they were.
        measures: Numbers about the landscape and the model at its centre, by name; plain JSON values.
    """

    axes: tuple[Axis, ...]
    loss: Float[np.ndarray, "*grid"]
    evaluated: Bool[np.ndarray, "*grid"]
    objective: str = "mlm"
    references: Mapping[str, float] = field(default_factory=dict)
    title: str = "all entries"
    provenance: storage.Provenance = field(default_factory=dict)
    metrics: Mapping[str, Float[np.ndarray, "*grid"]] = field(default_factory=dict)
    clipped: Bool[np.ndarray, "*grid"] | None = None
    examples: Float[np.ndarray, "*grid examples"] | None = None
    counts: Int[np.ndarray, "examples"] | None = None
    geometry: Geometry | None = None
    markers: tuple[Marker, ...] = ()
    connected: bool = False
    replicates: "tuple[Landscape, ...]" = ()
    prediction: Prediction | None = None
    measures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit the axes."""
        grid = tuple(len(axis.steps) for axis in self.axes)
        if self.loss.shape != grid or self.evaluated.shape != grid:
            raise ValueError(
                f"A landscape with axes of {grid} points needs loss and evaluated of that shape, got "
                f"{self.loss.shape} and {self.evaluated.shape}."
            )
        others = {**self.metrics, "clipped": self.clipped}
        if wrong := next((name for name, v in others.items() if v is not None and v.shape != grid), None):
            raise ValueError(f"A landscape with axes of {grid} points has {wrong} of shape {others[wrong].shape}.")
        if self.examples is not None and (self.counts is None or self.examples.shape != (*grid, *self.counts.shape)):
            raise ValueError(f"The losses of examples need their counts and shape (*{grid}, examples).")
        grams = (self.geometry.inner, self.geometry.fisher) if self.geometry else ()
        if any(gram is not None and gram.shape != (len(grid),) * 2 for gram in grams):
            raise ValueError(f"The inner products of {len(grid)} directions are a square of that size.")
        if wrong := next((marker.name for marker in self.markers if len(marker.steps) != len(grid)), None):
            raise ValueError(f"The marker {wrong!r} needs one step per axis.")

    def __repr__(self) -> str:
        """One line for notebooks."""
        grid = " x ".join(str(size) for size in self.loss.shape)
        several = f", mean of {len(self.replicates)} replicates" if self.replicates else ""
        measured = self.evaluated[self.centre]
        centre = f"{self.centre_loss:.4g} at the centre" if measured else "centre not measured yet"
        return f"Landscape({grid} points, {self.title}, {self.objective}, {centre}{several})"

    @property
    def centre(self) -> tuple[int, ...]:
        """Index of the model itself, where every step is 0."""
        return tuple(int(np.argmin(np.abs(axis.steps))) for axis in self.axes)

    @property
    def centre_loss(self) -> float:
        """Loss of the model itself, at step 0 of every axis."""
        return float(self.loss[self.centre])

    @property
    def perplexity(self) -> Float[np.ndarray, "*grid"]:
        """exp(loss), for losses in nats per token."""
        with np.errstate(over="ignore"):
            return np.exp(self.loss)

    def save(self, path: str | Path) -> None:
        """Write an HDF5 file with dimension scales, complete or not at all."""
        with storage.atomic(path) as temporary, storage.writing(path):
            # made in memory: HDF5 cannot close a file that the disk has no room for
            with h5py.File(temporary, "w", driver="core", backing_store=False) as file:
                storage.write_header(file, FORMAT, self.provenance)
                _write(file, self)
                file.flush()
                image = file.id.get_file_image()
            temporary.write_bytes(image)

    @staticmethod
    def load(path: str | Path) -> "Landscape":
        """Read a file of :meth:`save`, or the ``.part`` of a scan in progress.

        Raises:
            FileNotFoundError: If there is no such file.
            WrongFile: If it holds something else, another version, or is damaged.
        """
        with storage.open_hdf5(path, FORMAT) as file:
            return _read(file)


def mean_of(replicates: Sequence[Landscape], **facts: Any) -> Landscape:
    """The mean of landscapes on one grid along different directions, and all of them.

    The relative error of a mean is at most the largest of its parts'; what is said of its predictions is that.

    Args:
        replicates: The landscapes; a point counts as evaluated where all of them are.
        facts: Other attributes of the result; by default those of the first.
    """
    first = replicates[0]
    evaluated = np.logical_and.reduce([r.evaluated for r in replicates])

    marked = [r.clipped for r in replicates if r.clipped is not None]
    clipped = np.logical_or.reduce(marked) if marked else None
    whole = evaluated if clipped is None else evaluated & ~clipped

    def mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.where(whole, np.mean(arrays, axis=0), np.nan)

    shared = {name: getattr(first, name) for name in ("objective", "references", "title", "provenance", "measures")}
    return Landscape(
        first.axes,
        np.mean([r.loss for r in replicates], axis=0),  # NaN where one is neither measured nor predicted
        evaluated,
        **{**shared, **facts},
        metrics={name: mean([r.metrics[name] for r in replicates]) for name in first.metrics},
        clipped=clipped,
        geometry=first.geometry,
        replicates=tuple(replicates),
        prediction=_worst([r.prediction for r in replicates if r.prediction]),
    )


def _worst(predictions: Sequence[Prediction]) -> Prediction | None:
    if not predictions:
        return None
    errors = ("median", "percentile95", "maximum")
    largest = {name: max(getattr(p, name) for p in predictions) for name in errors}
    return replace(predictions[0], **largest, measured=sum(p.measured for p in predictions))


def _write(group: h5py.Group, landscape: Landscape) -> None:
    facts = {
        "markers": [asdict(marker) for marker in landscape.markers],
        "connected": landscape.connected,
        "prediction": asdict(landscape.prediction) if landscape.prediction else None,
        "measures": landscape.measures,
        "references": dict(landscape.references),
    }
    group.attrs["objective"] = landscape.objective
    group.attrs["title"] = landscape.title
    group.attrs.update({name: json.dumps(value, sort_keys=True) for name, value in facts.items()})
    arrays = {"loss": landscape.loss.astype(np.float64), "evaluated": landscape.evaluated, "clipped": landscape.clipped}
    arrays |= {f"metrics/{name}": values for name, values in landscape.metrics.items()}
    grids = [group.create_dataset(name, data=array) for name, array in arrays.items() if array is not None]
    if landscape.examples is not None:
        group.create_dataset("examples", data=landscape.examples)
        group.create_dataset("counts", data=landscape.counts)
    for number, axis in enumerate(landscape.axes):
        scale = group.create_dataset(f"axis{number}", data=np.asarray(axis.steps, dtype=np.float64))
        scale.attrs.update({key: value for key, value in asdict(axis).items() if key != "steps"})
        scale.make_scale(f"axis{number}")
        for dataset in grids:
            dataset.dims[number].attach_scale(scale)
    if geometry := landscape.geometry:
        group.attrs["weight_norm"], group.attrs["quadratic"] = geometry.weight_norm, geometry.quadratic
        for name, array in (("inner", geometry.inner), ("fisher", geometry.fisher)):
            if array is not None:
                group.create_dataset(name, data=array)
    for number, replicate in enumerate(landscape.replicates):
        _write(group.create_group(f"replicates/{number}"), replicate)


def _read(group: h5py.Group) -> Landscape:
    try:
        return _landscape(group, storage.attributes(group))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        path = group.file.filename
        raise storage.WrongFile(f"{path} is not a complete landscape ({error}); make it again.") from error


def _landscape(group: Any, attributes: Mapping[str, Any]) -> Landscape:
    facts = {name: json.loads(attributes[name]) for name in ("references", "markers", "prediction", "measures")}
    provenance = json.loads(attributes.get("provenance", "{}"))
    if "replicates" in group:
        several = [_read(group["replicates"][str(number)]) for number in range(len(group["replicates"]))]
        mean = mean_of(several, title=str(attributes["title"]), provenance=provenance, measures=facts["measures"])
        own = {name: np.asarray(array) for name, array in group.get("metrics", {}).items() if name not in mean.metrics}
        return replace(mean, metrics={**mean.metrics, **own})
    arrays = {name: np.asarray(group[name]) for name in ("loss", "evaluated", "inner", "fisher") if name in group}
    others: dict[str, Any] = {n: np.asarray(group[n]) for n in ("clipped", "examples", "counts") if n in group}
    scales = [group[f"axis{number}"] for number in range(arrays["loss"].ndim)]
    geometry = None
    if "inner" in arrays:
        scalars = (float(attributes["weight_norm"]), arrays.get("fisher"), bool(attributes["quadratic"]))
        geometry = Geometry(arrays["inner"], *scalars)
    return Landscape(
        tuple(Axis(steps=np.asarray(scale), **_own(storage.attributes(scale))) for scale in scales),
        arrays["loss"],
        arrays["evaluated"].astype(bool),
        str(attributes["objective"]),
        dict(facts["references"]),
        str(attributes["title"]),
        provenance,
        {name: np.asarray(array) for name, array in group.get("metrics", {}).items()},
        **others,
        geometry=geometry,
        markers=tuple(Marker(**{**marker, "steps": tuple(marker["steps"])}) for marker in facts["markers"]),
        connected=bool(json.loads(attributes["connected"])),
        prediction=Prediction(**facts["prediction"]) if facts["prediction"] else None,
        measures=dict(facts["measures"]),
    )


def _own(attributes: dict[str, Any]) -> dict[str, Any]:
    """Those attributes of a dimension scale that are ours; HDF5 adds some."""
    return {
        "name": str(attributes["name"]),
        "norm": float(attributes["norm"]),
        "entries": int(attributes["entries"]),
        "kind": str(attributes["kind"]),
        "parameters": int(attributes["parameters"]),
    }


class Journal:
    """A landscape being measured: in memory, and in a file if there is one, flushed row by row."""

    def __init__(self, landscape: Landscape, group: h5py.Group | None = None) -> None:
        self._group = group
        self._before = landscape
        self.loss, self.evaluated = landscape.loss.copy(), landscape.evaluated.copy()
        self._others: dict[str, np.ndarray] = {f"metrics/{name}": v.copy() for name, v in landscape.metrics.items()}
        for name in ("clipped", "examples"):
            if (array := getattr(landscape, name)) is not None:
                self._others[name] = array.copy()
        names = ("loss", "evaluated", *self._others)  # kept open: HDF5 hides errors of data sets that it closes
        self._stored: dict[str, Any] = {} if group is None else {name: group[name] for name in names}

    def record(self, index: tuple[int, ...], point: Point) -> None:
        """Keep what was measured at one point."""
        values = {f"metrics/{name}": value for name, value in point.metrics.items()}
        values |= {"loss": point.loss, "examples": point.examples, "clipped": point.clipped}
        arrays = {"loss": self.loss, **self._others}
        for name, array in arrays.items():
            array[index] = values[name]
        self.evaluated[index] = True
        if self._group is not None:
            with storage.writing(self._group.file.filename):
                for name in arrays:
                    self._stored[name][index] = values[name]

    def flush(self) -> None:
        """Make everything recorded so far survive a killed process."""
        if self._group is not None:
            with storage.writing(self._group.file.filename):
                self._group.file.flush()
                self._stored["evaluated"][...] = self.evaluated  # last: what a killed process left marked is there
                self._group.file.flush()
                os.fsync(self._group.file.id.get_vfd_handle())

    @property
    def landscape(self) -> Landscape:
        """What has been measured so far."""
        metrics = {name: self._others[f"metrics/{name}"] for name in self._before.metrics}
        others = {name: array for name, array in self._others.items() if not name.startswith("metrics/")}
        return replace(self._before, loss=self.loss, evaluated=self.evaluated, metrics=metrics, **others)


@contextmanager
def journals(path: Path | None, empty: Landscape) -> Iterator[list[Journal]]:
    """One journal per replicate, or the only one: going on with the scan in ``path`` if there is one.

    A file without any point is not left behind when the scan is refused. Without a path, everything is in memory.

    Raises:
        ValueError: If the file was begun with other settings; names the first that differs.
        WrongFile: If it is no landscape.
        OSError: If it cannot be written, or another process writes to it.
    """
    if path is None:
        yield [Journal(part) for part in empty.replicates or (empty,)]
        return
    if path.exists():
        _check_same_scan(path, Landscape.load(path), empty)
    else:
        empty.save(path)
    refused = False
    try:
        with _opened(path) as file:
            groups = [file[f"replicates/{number}"] for number in range(len(empty.replicates))] or [file]
            opened = [Journal(_read(group), group) for group in groups]  # pyright: ignore[reportArgumentType]
            try:
                yield opened
            except (ValueError, ConnectionError):  # here, or on another rank
                refused = not any(journal.evaluated.any() for journal in opened)
                raise
            finally:
                for journal in opened:
                    journal.flush()
    finally:
        if refused:
            path.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """For writing; what cannot be opened or closed is told in one sentence."""
    with storage.writing(path):
        file = h5py.File(path, "r+")
    try:
        yield file
    finally:
        with storage.writing(path):
            file.close()


def _check_same_scan(path: Path, before: Landscape, now: Landscape) -> None:
    same_grid = before.loss.shape == now.loss.shape and all(
        np.array_equal(a.steps, b.steps) for a, b in zip(before.axes, now.axes, strict=True)
    )
    found = None if same_grid else "grid"
    if found := found or storage.difference(before.provenance, json.loads(json.dumps(dict(now.provenance)))):
        raise ValueError(
            f"{path} was begun with another {found}; repeat that command to go on, or delete the file to start afresh."
        )
