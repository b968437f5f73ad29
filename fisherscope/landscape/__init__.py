"""Landscapes: the loss around a model, on a grid of steps along directions in weight space.

``directions.py`` makes directions, ``surface.py`` holds the noun :class:`Landscape` and its file, ``scan.py``
evaluates.
"""

from .directions import Direction, random_directions
from .scan import scan_landscape
from .surface import Axis, Landscape

__all__ = ["Axis", "Direction", "Landscape", "random_directions", "scan_landscape"]
