"""Figures from nouns: landscapes, scores, masks and runs in, one file out.

The suffix of the output decides who draws: ``.pdf``, ``.png`` and ``.svg`` are made for print by matplotlib, ``.html``
is one self-contained interactive page by plotly. The ``_prepare`` modules work out what is shown; ``_matplotlib`` and
``_plotly`` have the same functions, which only draw, as have ``_matplotlib_runs`` and ``_plotly_runs``. A new figure
is one function in each.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import storage
from ..landscape import Landscape
from ..masks import Mask
from ..scores import FisherScores
from ._prepare import By, Titles, Width, as_sequence
from ._prepare_comparison import compared
from ._prepare_landscapes import panels
from ._prepare_runs import boxes, costs, learning, ranks, sizes
from ._prepare_scores import layers, parameter_lines, sorted_lines, stability_lines
from ._prepare_sites import sites_shown

if TYPE_CHECKING:
    from ..experiments.arms import Arm
    from ..finetune.methods.guided_dropout import GuidedSite
    from ..finetune.results import Which

__all__ = [
    "comparison",
    "contour",
    "curves",
    "dropout_sites",
    "layer_scores",
    "learning_curves",
    "page",
    "parameter_scores",
    "run_boxes",
    "run_costs",
    "run_ranks",
    "run_sizes",
    "sorted_scores",
    "stability",
    "surface",
    "volume",
]

SUFFIXES = {".pdf": "_matplotlib", ".png": "_matplotlib", ".svg": "_matplotlib", ".html": "_plotly"}
"""The backend of every kind of file."""


def surface(
    landscapes: Landscape | Sequence[Landscape],
    out: str | Path,
    *,
    metric: str = "loss",
    titles: Titles = None,
    width: Width = None,
) -> Path:
    """Draw landscapes of two axes as 3-D surfaces.

    All panels share one colour scale, one height and one camera; θ marks the model itself. Landscapes of language
    models are cut half a nat above ln V, the loss of guessing; others where a few extreme points would flatten the
    rest. The figure says where, and how many points lie above. Points that are infinite, not a number or not yet
    measured are holes. Other models in the landscape are dots at the height of the surface, joined if they are a path.

    Args:
        landscapes: One, or several that become panels.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.
        metric: ``"loss"``; ``"perplexity"`` (language models), which is the same picture labelled exp(loss); or the
            name of another surface that all the landscapes have, which is drawn uncut and without reference lines.
        titles: One per landscape; None says what moves.
        width: Of print: ``"one-column"`` (3.3 inches), ``"two-column"`` (6.9), or None for what the panels need.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than landscapes was given.
        ValueError: If the suffix is unknown, a page in a browser is given a width, the landscapes have another number
            of axes or different objectives, no point is finite, there is no perplexity, or they lack the metric.
    """
    draw = _backend(out)
    _check_width(width, out)
    return _save(draw.surface(panels(landscapes, metric, titles, axes=2, plot="surface", width=width)), out)


def contour(
    landscapes: Landscape | Sequence[Landscape],
    out: str | Path,
    *,
    metric: str = "loss",
    titles: Titles = None,
    width: Width = None,
) -> Path:
    """Draw landscapes of two axes as filled contour maps on one colour scale, logarithmic in the loss.

    θ marks the model itself. ln V (the loss of guessing) and the unigram entropy are drawn as labelled lines where the
    losses cross them. Other models in the plane are marked by name, joined by arrows if they are a path; below stands
    their loss, beside that of the nearest point of the plane, which is what the map shows. Where points are predicted,
    the measured ones are dots. Landscapes of three axes become three slices through the model. Cutting, arguments and
    errors are those of :func:`surface`; the part that is cut is grey.
    """
    draw = _backend(out)
    _check_width(width, out)
    drawn = panels(landscapes, metric, titles, axes=2, plot="contour", slices=True, width=width)
    return _save(draw.contour(drawn), out)


def curves(
    landscapes: Landscape | Sequence[Landscape],
    out: str | Path,
    *,
    metric: str = "loss",
    titles: Titles = None,
    width: Width = None,
) -> Path:
    """Draw landscapes of one axis as lines in one pair of axes.

    ln V (the loss of guessing) and the unigram entropy are horizontal lines where they lie in the range of the losses.
    Replicates are a band, the 95 % interval of their mean, and thin lines where they are few. What Fisher scores
    predict, L(0) + ½ s² dᵀFd, is dotted. Cutting, arguments and errors are those of :func:`surface`.
    """
    draw = _backend(out)
    _check_width(width, out)
    return _save(draw.curves(panels(landscapes, metric, titles, axes=1, plot="curves", width=width)), out)


def page(
    landscapes: Landscape | Sequence[Landscape], out: str | Path, *, metric: str = "loss", titles: Titles = None
) -> Path:
    """Make one HTML page to explore landscapes of two axes: a contour map, a surface, and cuts through a point.

    A cross-hair on the map follows the pointer, is held by a click and moved by the arrow keys; the point on the
    surface and the cuts along both axes follow it. Several landscapes share one scale: buttons choose among them, and
    the cuts show them all. The loss can be shown on a logarithmic scale, or as perplexity, or another metric of the
    landscapes. Points that have no number are holes, those of an adaptive scan that were measured are dotted, other
    models are marked with their own loss. Of one axis, the page has the curves, with bands over random directions.
    A table says what moves, how far, and where the numbers come from. The file needs no network.

    Args:
        landscapes: One, or several.
        out: The file to write; its suffix is ``.html``.
        metric: What is shown first: ``"loss"``, ``"perplexity"`` (language models) or the name of a metric.
        titles: One per landscape; None says what moves.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than landscapes was given.
        ValueError: If the suffix is another, the landscapes have more than two axes, different numbers of axes or
            different objectives, no point is finite, or there is no such metric.
    """
    _check_html(out)
    from . import _page  # here, as plotly is only imported to draw

    with storage.atomic(out) as temporary:
        temporary.write_text(_page.document(as_sequence(landscapes, Landscape, "page"), metric, titles), "utf-8")
    return Path(out)


def volume(landscape: Landscape, out: str | Path, *, metric: str = "loss", titles: Titles = None) -> Path:
    """Make one HTML page with a landscape of three axes: nested surfaces of equal loss, or slices that can be moved.

    The box is cut where :func:`surface` is. Points that have no number are holes.

    Args:
        landscape: Of three axes.
        out: The file to write; its suffix is ``.html``.
        metric: As for :func:`surface`.
        titles: The title; None says what moves.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than a landscape was given.
        ValueError: If the suffix is another, the landscape has not three axes, no point is finite, or there is no such
            metric.
    """
    _check_html(out)
    from . import _plotly, _volume  # here, as plotly is only imported to draw

    with storage.atomic(out) as temporary:
        drawn = panels([landscape], metric, titles, axes=3, plot="volume")
        _plotly.save(_volume.volume(drawn.panels[0], drawn.scale, drawn.notes), temporary, ".html")
    return Path(out)


def sorted_scores(
    scores: FisherScores | Sequence[FisherScores],
    out: str | Path,
    *,
    by: By = "entry",
    normalized: bool = False,
    titles: Titles = None,
) -> Path:
    r"""Draw scores in ascending order, one curve per model.

    Raw scores have a logarithmic axis; how many are exactly 0, which it cannot show, is said below. Normalised ones are
    :math:`(F - \min F) / (\max F - \min F)`, as in figure 3 of arXiv 2406.14005. Curves of several models run
    over shares from 0 to 1, so that sizes do not matter. Parameters drawn at random are left out.

    Args:
        scores: One, or several that become curves.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.
        by: ``"entry"``, or ``"parameter"`` for the mean score of every parameter.
        normalized: Whether to map each curve to [0, 1].
        titles: One per curve; None says which model.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than scores was given.
        ValueError: If the suffix is unknown, raw scores have different units, or all scores of a curve are the same.
    """
    draw = _backend(out)
    return _save(draw.sorted_scores(sorted_lines(scores, by, normalized, titles)), out)


def parameter_scores(scores: FisherScores | Sequence[FisherScores], out: str | Path, *, titles: Titles = None) -> Path:
    """Draw the mean score of the entries of every parameter as a dot, in the model's order, on a logarithmic axis.

    Every other layer is shaded, and layers are named where there is room. Means below 1e-12 of the highest, such as
    those of key biases, which softmax does not see, are rounding noise: they are counted and not drawn. The counterpart
    of figures 6 to 8 of arXiv 2406.14005. Parameters drawn at random are left out.

    Args:
        scores: One, or several that become curves.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.
        titles: One per curve; None says which model.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than scores was given.
        ValueError: If the suffix is unknown, the scores have different units, or all scores of a curve are 0.
    """
    draw = _backend(out)
    return _save(draw.parameter_scores(parameter_lines(scores, titles)), out)


def layer_scores(scores: FisherScores | Sequence[FisherScores], out: str | Path, *, titles: Titles = None) -> Path:
    """Draw the mean score of the entries of every layer, in the model's order, on a logarithmic axis.

    Several models share the rows whose names they have in common. Where scores hold halves (``estimate_fisher`` with
    ``halves=True``), a whisker joins the means by either half of the examples. Parameters drawn at random are left out.

    Args:
        scores: One, or several that become differently marked dots.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.
        titles: One per model; None says which.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than scores was given.
        ValueError: If the suffix is unknown, the scores have different units, or all are 0.
    """
    draw = _backend(out)
    return _save(draw.layer_scores(layers(scores, titles)), out)


def stability(scores: FisherScores | Sequence[FisherScores], out: str | Path, *, titles: Titles = None) -> Path:
    """Draw how stable masks of the top scores were while the examples came in, a line per fraction.

    The height is the expected overlap with the mask from a fresh draw of as many examples
    (:meth:`fisherscope.FisherScores.stability`). What two random masks of a fraction would have in common is dotted.

    Args:
        scores: One, or several.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.
        titles: One per set of scores; None says which model.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than scores was given.
        ValueError: If the suffix is unknown or no history was kept.
    """
    draw = _backend(out)
    return _save(draw.stability(stability_lines(scores, titles)), out)


def comparison(
    a: FisherScores | Mask, b: FisherScores | Mask, out: str | Path, *, fraction: float = 0.1, titles: Titles = None
) -> Path:
    """Draw how far two sets of scores, or two masks, agree layer by layer, and scores against each other.

    By layer: the overlap of the masks of the top ``fraction`` within it, with what chance gives, and Spearman's rank
    correlation; of masks, the overlap and the Jaccard index (:func:`fisherscope.compare`). Scores are also drawn
    against each other as a histogram; beyond both dashed lines are the entries that both masks select.

    Args:
        a: Scores or a mask.
        b: Another one, of a model with the same backbone or parts of it.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.
        fraction: Of scores, the share of the entries that the masks select.
        titles: One for each; None says which model, or what else is different.

    Returns:
        The path of the file.

    Raises:
        TypeError: If one is scores and the other a mask.
        ValueError: If the suffix is unknown, or they have nothing in common.
    """
    draw = _backend(out)
    return _save(draw.comparison(compared(a, b, fraction, titles)), out)


def dropout_sites(sites: "Sequence[GuidedSite]", out: str | Path) -> Path:
    """Draw the rates that guided dropout gives to the sites of a model, beside the scores that they come from.

    Sites are rows in the order of the modules, those of every other layer shaded.

    Args:
        sites: As ``fisherscope.finetune.methods.guided_dropout.guided_rates`` makes them.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than sites was given.
        ValueError: If the suffix is unknown, there is no site, or all scores are 0.
    """
    draw = _backend(out)
    return _save(draw.dropout_sites(sites_shown(sites)), out)


def run_boxes(
    runs: "Sequence[Arm]",
    out: str | Path,
    *,
    reference: str = "vanilla",
    metric: str | None = None,
    which: "Which | None" = None,
) -> Path:
    """Draw every run of methods of fine-tuning as a dot on a box over seeds, a panel for every task.

    Boxes reach from the first to the third quartile, whiskers to the farthest run within 1.5 lengths of the box. Failed
    runs are crosses; they are counted beside the row, those without a number too.

    Args:
        runs: Of :func:`fisherscope.read_runs`.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.
        reference: The arm in the first row; its median is a line across.
        metric: One for all tasks; None takes the main metric of each.
        which: The epoch that counts, as for :func:`fisherscope.compare_methods`.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than runs was given.
        ValueError: If the suffix is unknown, or the runs cannot be compared, as :func:`fisherscope.compare_methods`
            has it: there is no reference, a metric lacks, or they saw other examples.
    """
    draw = _backend(out, of_runs=True)
    return _save(draw.run_boxes(boxes(runs, reference, metric, which)), out)


def run_sizes(
    runs: "Sequence[Arm]",
    out: str | Path,
    *,
    reference: str = "vanilla",
    metric: str | None = None,
    which: "Which | None" = None,
) -> Path:
    r"""Draw the mean over seeds against the size of the training set, with its 95 % t interval, a panel for every task.

    The interval is :math:`\bar x \pm t_{0.975, n - 1} \, s / \sqrt n`. The counterpart of figure 4 of arXiv 2406.14005.
    Lines are moved sideways, by 8 % at most, so that intervals cover each other less. Arguments are those of
    :func:`run_boxes`.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than runs was given.
        ValueError: As for :func:`run_boxes`, and if there is one size only, numbers of examples beside shares, or more
            methods than kinds of lines (210).
    """
    draw = _backend(out, of_runs=True)
    return _save(draw.run_sizes(sizes(runs, reference, metric, which)), out)


def run_ranks(
    runs: "Sequence[Arm]", out: str | Path, *, metric: str | None = None, which: "Which | None" = None
) -> Path:
    """Draw mean ranks of three methods or more over blocks (seeds of tasks), with Nemenyi's critical difference.

    Bars join methods whose mean ranks differ by less than that (Demšar 2006, JMLR 7, section 3.2). Ties share their
    rank, and a run without a number ranks last. Blocks that fewer than half of the methods have are left out, and then
    methods that lack a block; the figure says so.

    Args:
        runs: Of :func:`fisherscope.read_runs`.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.
        metric: One for all tasks; None takes the main metric of each.
        which: The epoch that counts, as for :func:`fisherscope.compare_methods`.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than runs was given.
        ValueError: If the suffix is unknown, the runs cannot be compared, or fewer than three methods have all blocks.
    """
    draw = _backend(out, of_runs=True)
    return _save(draw.run_ranks(ranks(runs, metric, which)), out)


def learning_curves(
    runs: "Sequence[Arm]", out: str | Path, *, reference: str = "vanilla", metric: str | None = None
) -> Path:
    """Draw training loss and a metric on the report examples over the epochs, a pair of panels for every method.

    Thin lines are runs, the thick one is their mean, the grey one the mean of the reference. Losses are as logged. What
    the labels of the training examples alone give (their entropy, the majority class) is dotted, where it is known.
    Failed runs are drawn last; where they go far beyond the others, they are cut off, and a note says so.

    Args:
        runs: Of :func:`fisherscope.read_runs`.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.
        reference: The arm that all others are drawn beside.
        metric: One for all tasks; None takes the main metric of each.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than runs was given.
        ValueError: As for :func:`run_boxes`.
    """
    draw = _backend(out, of_runs=True)
    return _save(draw.learning_curves(learning(runs, reference, metric)), out)


def run_costs(runs: "Sequence[Arm]", out: str | Path, *, reference: str = "vanilla") -> Path:
    """Draw what methods cost: seconds of an optimizer step by those of the reference, and peak memory.

    The time is the median over runs of their median steps, on devices of one kind; the memory is the most of all runs.

    Args:
        runs: Of :func:`fisherscope.read_runs`.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.
        reference: The arm whose time is 1.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than runs was given.
        ValueError: As for :func:`run_boxes`.
    """
    draw = _backend(out, of_runs=True)
    return _save(draw.run_costs(costs(runs, reference)), out)


def _backend(out: str | Path, *, of_runs: bool = False) -> ModuleType:
    suffix = Path(out).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"A figure ends in one of {' '.join(SUFFIXES)}, got {Path(out).name!r}; rename the output.")
    return importlib.import_module(f".{SUFFIXES[suffix]}{'_runs' if of_runs else ''}", __name__)


def _check_width(width: str | None, out: str | Path) -> None:
    if width is not None and SUFFIXES[Path(out).suffix.lower()] == "_plotly":
        raise ValueError(f"width is of print, and a page in a browser fills its window; leave it out, got {width!r}.")


def _check_html(out: str | Path) -> None:
    if Path(out).suffix.lower() != ".html":
        raise ValueError(f"A page to explore ends in .html, got {Path(out).name!r}; rename the output.")


def _save(figure: Any, out: str | Path) -> Path:
    with storage.atomic(out) as temporary:
        _backend(out).save(figure, temporary, Path(out).suffix.lower())
    return Path(out)
