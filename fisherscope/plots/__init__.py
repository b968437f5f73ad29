"""Figures from nouns: landscapes, scores and masks in, one file out.

The suffix of the output decides who draws: ``.pdf``, ``.png`` and ``.svg`` are made for print by matplotlib, ``.html``
is one self-contained interactive page by plotly. The ``_prepare`` modules work out what is shown; ``_matplotlib`` and
``_plotly`` have the same functions, which only draw. A new figure is one function in each.
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
from ._prepare import By, Metric, Titles
from ._prepare_comparison import compared
from ._prepare_landscapes import panels
from ._prepare_scores import layers, sorted_lines, stability_lines
from ._prepare_sites import sites_shown

if TYPE_CHECKING:
    from ..finetune.methods.guided_dropout import GuidedSite

__all__ = ["comparison", "contour", "curves", "dropout_sites", "layer_scores", "sorted_scores", "stability", "surface"]

SUFFIXES = {".pdf": "_matplotlib", ".png": "_matplotlib", ".svg": "_matplotlib", ".html": "_plotly"}
"""The backend of every kind of file."""


def surface(
    landscapes: Landscape | Sequence[Landscape], out: str | Path, *, metric: Metric = "loss", titles: Titles = None
) -> Path:
    """Draw landscapes of two axes as 3-D surfaces.

    All panels share one colour scale, one height and one camera; θ marks the model itself. Landscapes of language
    models are cut half a nat above ln V, the loss of guessing; others where a few extreme points would flatten the
    rest. The figure says where, and how many points lie above. Points that are infinite, not a number or not yet
    measured are holes.

    Args:
        landscapes: One, or several that become panels.
        out: The file to write; its suffix is one of ``.pdf .png .svg .html``.
        metric: ``"loss"``, or ``"perplexity"`` (language models), which is the same picture labelled exp(loss).
        titles: One per landscape; None says what moves.

    Returns:
        The path of the file.

    Raises:
        TypeError: If something else than landscapes was given.
        ValueError: If the suffix is unknown, the landscapes have another number of axes or different objectives, no
            point is finite, or there is no perplexity.
    """
    draw = _backend(out)
    return _save(draw.surface(panels(landscapes, metric, titles, axes=2, plot="surface")), out)


def contour(
    landscapes: Landscape | Sequence[Landscape], out: str | Path, *, metric: Metric = "loss", titles: Titles = None
) -> Path:
    """Draw landscapes of two axes as filled contour maps on one colour scale.

    θ marks the model itself. ln V (the loss of guessing) and the unigram entropy are drawn as labelled lines where the
    losses cross them. Cutting, arguments and errors are those of :func:`surface`; the part that is cut is grey.
    """
    draw = _backend(out)
    return _save(draw.contour(panels(landscapes, metric, titles, axes=2, plot="contour")), out)


def curves(
    landscapes: Landscape | Sequence[Landscape], out: str | Path, *, metric: Metric = "loss", titles: Titles = None
) -> Path:
    """Draw landscapes of one axis as lines in one pair of axes.

    ln V (the loss of guessing) and the unigram entropy are horizontal lines where they lie in the range of the losses.
    Cutting, arguments and errors are those of :func:`surface`.
    """
    draw = _backend(out)
    return _save(draw.curves(panels(landscapes, metric, titles, axes=1, plot="curves")), out)


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


def layer_scores(scores: FisherScores | Sequence[FisherScores], out: str | Path, *, titles: Titles = None) -> Path:
    """Draw the mean score of the entries of every layer, in the model's order, on a logarithmic axis.

    Several models share the rows whose names they have in common. Parameters drawn at random are left out.

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
    (:meth:`fisherscope.FisherScores.stability`).

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


def _backend(out: str | Path) -> ModuleType:
    suffix = Path(out).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"A figure ends in one of {' '.join(SUFFIXES)}, got {Path(out).name!r}; rename the output.")
    return importlib.import_module(f".{SUFFIXES[suffix]}", __name__)


def _save(figure: Any, out: str | Path) -> Path:
    with storage.atomic(out) as temporary:
        _backend(out).save(figure, temporary, Path(out).suffix.lower())
    return Path(out)
