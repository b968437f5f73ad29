"""Landscapes for ParaView: one XML file of VTK, written by hand, as it is little more than arrays."""

import base64
import json
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np

from .. import storage
from .._typing import Float
from .scan import MARGIN
from .surface import Landscape

HIDDEN_POINT = 2
"""The flag of vtkDataSetAttributes that takes a point, and all cells that touch it, out of a grid."""

_TYPES = {"float64": "Float64", "uint8": "UInt8"}


def to_vtk(landscape: Landscape, path: str | Path, *, ceiling: float | None = None) -> None:
    r"""Write a landscape of one to three axes as a structured grid for ParaView.

    Of two axes, the points are :math:`(a, b, \min(L(a, b), c))`: the surface, warped. Of one, they are
    :math:`(a, \min(L(a), c), 0)`, a curve; of three, :math:`(a_1, a_2, a_3)`, a box. Coordinates are steps and losses
    as they are: stretch them with ParaView's Transform. Every point has its ``loss``, raw and uncut, so that a Clip by
    that scalar at the ceiling leaves a clean edge; ``log_loss``; all other metrics by their names; and whether it was
    ``evaluated``. Points without a finite loss are blanked and make holes. What the landscape is of, its references
    and its provenance are the string ``fisherscope`` of the field data, as JSON.

    The format is VTK XML StructuredGrid 1.0 (docs.vtk.org, "VTK File Formats"), uncompressed and in base64.

    Args:
        landscape: What to write.
        path: The file; its suffix is ``.vts``.
        ceiling: Where heights end; None for half a nat above ln V where the landscape knows it and the model itself
            lies below, else nowhere.

    Raises:
        ValueError: If the suffix is another, there are more than three axes, or no loss is finite.
    """
    if Path(path).suffix.lower() != ".vts":
        raise ValueError(f"A structured grid of VTK ends in .vts, got {Path(path).name!r}; rename the output.")
    if len(landscape.axes) > 3:
        raise ValueError(f"ParaView shows landscapes of one to three axes, got {len(landscape.axes)}; scan fewer.")
    known = landscape.evaluated if landscape.prediction is None else np.ones_like(landscape.evaluated)
    shown = known & np.isfinite(landscape.loss)
    if not shown.any():
        raise ValueError("There is nothing to write: no point of the landscape has a finite loss so far.")
    if ceiling is None:
        guessing = landscape.references.get("uniform", np.inf) + MARGIN
        ceiling = np.inf if landscape.centre_loss > guessing else guessing
    with np.errstate(divide="ignore", invalid="ignore"):
        arrays = {"loss": landscape.loss, "log_loss": np.log(landscape.loss), **landscape.metrics}
    arrays = {name: _column(np.where(known, values, np.nan).astype(np.float64)) for name, values in arrays.items()}
    arrays["evaluated"] = _column(landscape.evaluated.astype(np.uint8))
    arrays["vtkGhostType"] = _column(np.where(shown, 0, HIDDEN_POINT).astype(np.uint8))
    ends = [size - 1 for size in (*landscape.loss.shape, 1, 1)[:3]]
    extent = " ".join(f"0 {end}" for end in ends)
    points = _array("points", _points(landscape, np.where(shown, landscape.loss, np.nan), ceiling), components=3)
    text = f"""<?xml version="1.0"?>
<VTKFile type="StructuredGrid" version="1.0" byte_order="LittleEndian" header_type="UInt64">
<StructuredGrid WholeExtent="{extent}">
<FieldData>
{_string("fisherscope", _facts(landscape))}
</FieldData>
<Piece Extent="{extent}">
<PointData Scalars="loss">
{"".join(_array(name, values) for name, values in arrays.items())}</PointData>
<Points>
{points}</Points>
</Piece>
</StructuredGrid>
</VTKFile>
"""
    with storage.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _points(landscape: Landscape, loss: Float[np.ndarray, "*grid"], ceiling: float) -> Float[np.ndarray, "points 3"]:
    """Coordinates, the first axis running fastest; points without a loss lie on the floor, where they do not show."""
    steps = np.meshgrid(*(np.asarray(axis.steps, dtype=np.float64) for axis in landscape.axes), indexing="ij")
    heights = np.where(np.isnan(loss), np.nanmin(loss), np.minimum(loss, ceiling))
    coordinates = (steps if len(steps) == 3 else [*steps, heights, np.zeros_like(heights)])[:3]
    return np.stack([_column(values) for values in coordinates], axis=1)


def _column(values: np.ndarray) -> np.ndarray:
    """The values of a grid in the order of VTK: the first axis runs fastest."""
    return values.ravel(order="F")


def _array(name: str, values: np.ndarray, components: int = 1) -> str:
    data = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()
    kind = _TYPES[values.dtype.name]
    body = base64.b64encode(len(data).to_bytes(8, "little") + data).decode()
    attributes = f'type="{kind}" Name={quoteattr(name)} NumberOfComponents="{components}" format="binary"'
    return f"<DataArray {attributes}>{body}</DataArray>\n"


def _string(name: str, text: str) -> str:
    """A string as VTK writes one: the codes of its bytes, 0 at the end."""
    codes = " ".join(map(str, (*text.encode(), 0)))
    return f'<Array type="String" Name={quoteattr(name)} NumberOfTuples="1" format="ascii">{codes}</Array>'


def _facts(landscape: Landscape) -> str:
    facts = {name: getattr(landscape, name) for name in ("title", "objective", "references", "provenance")}
    return json.dumps({name: v if isinstance(v, str) else dict(v) for name, v in facts.items()}, sort_keys=True)
