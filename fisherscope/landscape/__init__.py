"""Landscapes: the loss around a model, on a grid of steps along directions in weight space.

``directions.py`` makes directions, ``surface.py`` holds the noun :class:`Landscape` and its file, ``evaluate.py``
measures a point, ``scan.py`` a grid.
"""

from .directions import Direction, Subspace, random_directions
from .scan import scan_landscape
from .surface import Axis, Landscape

__all__ = ["Axis", "Direction", "Landscape", "Subspace", "random_directions", "scan_landscape"]
