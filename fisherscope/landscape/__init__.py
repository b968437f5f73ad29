"""Landscapes: the loss around a model, on a grid of steps along directions in weight space.

``surface.py`` holds the noun :class:`Landscape` and its file. Directions: ``directions.py`` draws and scales them,
``paths.py`` leads to other models, ``curvature.py`` follows the Hessian, ``moves.py`` masks and matches them.
``evaluate.py`` measures a point, ``prefix.py`` saves what is the same at all of them, ``scan.py`` measures a grid and
``adaptive.py`` a part of one. ``statistics.py`` and ``measures.py`` say what it means, ``contract.py`` checks it all.
"""

from .directions import Direction, Subspace, random_directions
from .scan import scan_landscape
from .surface import Axis, Landscape

__all__ = ["Axis", "Direction", "Landscape", "Subspace", "random_directions", "scan_landscape"]
