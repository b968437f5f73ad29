"""Landscapes as files of ParaView: what the XML holds, decoded here by another route than it is written."""

import base64
import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from fisherscope.landscape import Axis, Landscape
from fisherscope.landscape.surface import Prediction
from fisherscope.landscape.vtk import to_vtk

CODES = {"Float64": "d", "UInt8": "B"}


def landscape(shape: tuple[int, ...], **facts: Any) -> Landscape:
    """Losses that tell every point from every other, on steps that are not evenly spaced."""
    axes = tuple(Axis(f"axis{k}", np.arange(n) ** 2 / 4 - k, 2.0, 10) for k, n in enumerate(shape))
    loss = 2.0 + np.arange(math.prod(shape), dtype=float).reshape(shape)
    return Landscape(axes, loss, np.ones(shape, dtype=bool), **{"references": {"uniform": 8.0}} | facts)


def written(given: Landscape, path: Path, **settings: Any) -> tuple[dict[str, list[Any]], str, str]:
    """The arrays of a file by name, its extent, and its string."""
    to_vtk(given, path, **settings)
    root = ElementTree.parse(path).getroot()
    assert root.attrib == {
        "type": "StructuredGrid", "version": "1.0", "byte_order": "LittleEndian", "header_type": "UInt64"
    }  # fmt: skip
    grid, piece = root.find("StructuredGrid"), root.find("StructuredGrid/Piece")
    assert grid is not None and piece is not None and grid.get("WholeExtent") == piece.get("Extent")
    arrays = {}
    for array in piece.iter("DataArray"):
        data = base64.b64decode(array.text or "")
        (length,) = struct.unpack("<Q", data[:8])
        assert length == len(data) - 8 and array.get("format") == "binary"
        code = CODES[array.attrib["type"]]
        arrays[array.attrib["Name"]] = list(struct.unpack(f"<{length // struct.calcsize(code)}{code}", data[8:]))
    text = root.find("StructuredGrid/FieldData/Array")
    assert text is not None
    *codes, end = map(int, (text.text or "").split())
    assert end == 0
    return arrays, str(piece.get("Extent")), bytes(codes).decode()


def triples(values: list[float]) -> list[tuple[float, ...]]:
    return [tuple(values[k : k + 3]) for k in range(0, len(values), 3)]


def test_two_axes_become_a_surface_at_the_height_of_the_loss(tmp_path: Path):
    given = landscape((3, 2))
    arrays, extent, _ = written(given, tmp_path / "a.vts")
    assert extent == "0 2 0 1 0 0"
    first, second = (axis.steps for axis in given.axes)
    points = [(first[i], second[j], float(given.loss[i, j])) for j in range(2) for i in range(3)]  # first axis fastest
    assert triples(arrays["points"]) == points
    assert arrays["loss"] == [point[2] for point in points]


def test_heights_end_at_the_ceiling_and_losses_do_not(tmp_path: Path):
    given = landscape((3, 4))
    arrays, _, _ = written(given, tmp_path / "a.vts")
    assert max(z for _, _, z in triples(arrays["points"])) == 8.5
    assert max(arrays["loss"]) == 13.0
    arrays, _, _ = written(given, tmp_path / "a.vts", ceiling=4.0)
    assert max(z for _, _, z in triples(arrays["points"])) == 4.0


def test_a_model_worse_than_guessing_is_not_cut(tmp_path: Path):
    given = landscape((3, 4))
    given.loss[given.centre] = 9.0
    arrays, _, _ = written(given, tmp_path / "a.vts")
    assert max(z for _, _, z in triples(arrays["points"])) == 13.0


def test_one_axis_becomes_a_curve(tmp_path: Path):
    given = landscape((4,))
    arrays, extent, _ = written(given, tmp_path / "a.vts")
    assert extent == "0 3 0 0 0 0"
    assert triples(arrays["points"]) == [
        (s, loss, 0.0) for s, loss in zip(given.axes[0].steps, given.loss, strict=True)
    ]


def test_three_axes_become_a_box(tmp_path: Path):
    given = landscape((2, 3, 4))
    arrays, extent, _ = written(given, tmp_path / "a.vts")
    assert extent == "0 1 0 2 0 3"
    order = [(i, j, k) for k in range(4) for j in range(3) for i in range(2)]
    assert triples(arrays["points"]) == [
        tuple(axis.steps[n] for axis, n in zip(given.axes, index, strict=True)) for index in order
    ]
    assert arrays["loss"] == [given.loss[index] for index in order]


def test_points_without_a_loss_are_blanked(tmp_path: Path):
    given = landscape((2, 2))
    given.loss[0, 0], given.loss[0, 1] = math.nan, math.inf
    given.evaluated[1, 0] = False
    arrays, _, _ = written(given, tmp_path / "a.vts")
    assert arrays["vtkGhostType"] == [2, 2, 2, 0]  # vtkDataSetAttributes::HIDDENPOINT
    assert arrays["evaluated"] == [1, 0, 1, 1]
    assert all(map(math.isfinite, arrays["points"]))
    assert [math.isnan(loss) for loss in arrays["loss"]] == [True, True, False, False]


def test_predicted_points_are_shown_and_told_from_measured_ones(tmp_path: Path):
    given = replace(landscape((2, 2)), prediction=Prediction(0.02, 0.01, 0.02, 0.05, 3))
    given.evaluated[1, 0] = False
    arrays, _, _ = written(given, tmp_path / "a.vts")
    assert (arrays["vtkGhostType"], arrays["evaluated"]) == ([0, 0, 0, 0], [1, 0, 1, 1])


def test_metrics_and_the_logarithm_are_there(tmp_path: Path):
    given = landscape((2, 2), metrics={'a<"&>': np.array([[1, 2], [3, 4]], dtype=np.float32)})
    arrays, _, _ = written(given, tmp_path / "a.vts")
    assert arrays['a<"&>'] == [1.0, 3.0, 2.0, 4.0]
    assert arrays["log_loss"] == pytest.approx([math.log(loss) for loss in (2, 4, 3, 5)])


def test_the_file_says_what_it_is_of(tmp_path: Path):
    given = landscape((2, 2), title="Δ <all>", provenance={"model": {"name": "m"}})
    _, _, text = written(given, tmp_path / "a.vts")
    assert json.loads(text) == {
        "title": "Δ <all>", "objective": "mlm", "references": {"uniform": 8.0}, "provenance": {"model": {"name": "m"}}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "name", "message"),
    [
        (landscape((2, 2)), "a.vtp", "ends in .vts, got 'a.vtp'; rename the output"),
        (landscape((2, 2, 2, 2)), "a.vts", "landscapes of one to three axes, got 4; scan fewer"),
        (landscape((1, 1), prediction=None), "a.vts", "no point of the landscape has a finite loss"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_no_file(tmp_path: Path, given: Any, name: str, message: str):
    given = replace(given, loss=np.full_like(given.loss, np.nan)) if given.loss.size == 1 else given
    with pytest.raises(ValueError, match=message):
        to_vtk(given, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
