"""Figures for print, by matplotlib. Every size is in inches, so that nothing needs scaling on the page.

Figures are laid out by hand from the top down and never touch pyplot, so nothing global changes.
"""


import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ._prepare import Panels

COLUMN, PAGE = 3.3, 6.9  # inches: one column and the full text width of most journals
LEVELS = 20  # bands of a contour map

_TITLE, _BODY = 8.0, 7.0  # points
_LINE = 0.125  # inches from one line of body text to the next
_QUIET = "0.35"
_DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vPX"
_LIGHT = np.array([-0.5, -0.4, 0.77])  # towards the light, in a box whose sides are about 1
_BAR, _BAR_LABELS = 0.10, 0.50  # inches: the colour bar, and what stands to its right

_OWN = {
    "font.family": "DejaVu Sans",
    "font.size": _BODY,
    "axes.titlesize": _TITLE,
    "axes.labelsize": _BODY,
    "axes.linewidth": 0.6,
    "xtick.labelsize": _BODY,
    "ytick.labelsize": _BODY,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": _BODY,
    "hatch.linewidth": 0.4,
    "lines.linewidth": 1.1,
    "pdf.fonttype": 42,  # TrueType, which journals ask for
    "savefig.dpi": 300,
    "svg.hashsalt": "fisherscope",  # the same file from the same data
}
_MACHINE = ("backend", "interactive", "toolbar", "webagg", "savefig.directory", "datapath", "timezone", "date", "animation")
# The look must not depend on a matplotlibrc of the reader either.
_STYLE = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(_MACHINE)} | _OWN


@matplotlib.rc_context(_STYLE)
def surface(panels: Panels) -> Figure:
    """One 3-D surface per landscape, from one camera, cut where the scale ends."""
    page = _Page(panels, most=3, aspect=0.84, left=0.0, between=0.0, below=0.0)
    for panel, axes in page.axes(projection="3d", computed_zorder=False):
        _draw_surface(axes, panel, panels.scale)
    return page.finished(_colours())


@matplotlib.rc_context(_STYLE)
def contour(panels: Panels) -> Figure:
    """One filled contour map per landscape; grey where the scale ends, hatched where there is no number."""
    shared = len({(tuple(s[[0, -1]]) for s in panel.steps) for panel in panels.panels}) == 1
    page = _Page(panels, most=4, aspect=1.0, left=0.42, between=0.12, below=0.42)
    for number, (panel, axes) in enumerate(page.axes()):
        _draw_contour(axes, panel, panels.scale)
        axes.set_xlabel("step along direction 1")
        if number % page.across == 0:
            axes.set_ylabel("step along direction 2")
        elif shared:
            axes.set_yticklabels([])
    return page.finished(_colours(LEVELS))
