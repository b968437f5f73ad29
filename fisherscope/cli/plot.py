"""``fisherscope plot``: figures from scores, masks, landscapes and runs; landscapes for ParaView."""

import argparse
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import storage
from ._common import add_output_flags, output_is_finished

if TYPE_CHECKING:
    from ..landscape import Landscape

KINDS = {
    "landscapes": {
        "surface": "surface",
        "contour": "contour",
        "curves": "curves",
        "page": "page",
        "volume": "volume",
    },
    "scores": {
        "sorted": "sorted_scores",
        "layers": "layer_scores",
        "parameters": "parameter_scores",
        "stability": "stability",
        "comparison": "comparison",
    },
    "masks": {"comparison": "comparison"},
    "runs": {
        "boxes": "run_boxes",
        "sizes": "run_sizes",
        "ranks": "run_ranks",
        "learning": "learning_curves",
        "cost": "run_costs",
    },
}
"""The kinds of figures by what they show, and the function of ``fisherscope.plots`` that draws each."""

FLAGS = ("metric", "reference", "which", "width", "by", "normalized", "fraction", "titles")
"""Each is for the kinds whose function has a keyword of this name."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of the functions in ``fisherscope.plots``."""
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="landscapes (several become panels), scores, two masks, or folders with runs of finetune or sweep in them",
    )
    parser.add_argument(
        "--kind",
        choices=tuple(dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds)),
        help="default: by the axes of landscapes (.html: page), layers for scores, comparison for two scores or masks, "
        "boxes for runs (sizes needs two sizes or more, ranks three methods or more)",
    )
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="of landscapes: loss (default), perplexity, or one that was measured; of runs: the main one by default",
    )
    parser.add_argument(
        "--reference", metavar="ARM", help="of runs: beside which the others are drawn; default: vanilla"
    )
    parser.add_argument(
        "--which",
        choices=("last", "selected", "best"),
        help="epoch of runs that counts; default: the one selected on examples of their own, or else the last",
    )
    parser.add_argument(
        "--width", choices=("one-column", "two-column"), help="of a printed landscape: 3.3 or 6.9 inches"
    )
    parser.add_argument("--by", choices=("entry", "parameter"), help="what sorted scores rank; default: entry")
    parser.add_argument("--normalized", action="store_true", default=None, help="sorted scores from 0 to 1")
    parser.add_argument("--fraction", type=float, help="of the masks that scores are compared by; default: 0.1")
    parser.add_argument("--titles", nargs="+", metavar="TITLE", help="one per file")
    add_output_flags(parser)
    parser.set_defaults(refuse=parser.error)


def run(args: argparse.Namespace) -> None:
    """Read, draw, save."""
    if output_is_finished(args):
        return
    formats = {storage.file_format(path) for path in args.files}
    if formats == {"fisherscope.landscape"}:
        _draw_landscapes(args)
    elif formats == {"fisherscope.scores"}:
        _draw_scores(args)
    elif formats == {"fisherscope.mask"}:
        _draw_masks(args)
    elif formats == {"fisherscope.results"}:
        _draw_runs(args)
    else:
        found = ", ".join(sorted(f.removeprefix("fisherscope.") for f in formats))
        raise ValueError(
            f"A figure shows landscapes, scores, masks or runs, one kind at a time, but the files hold: {found}."
        )
    print(args.out)


def _draw_landscapes(args: argparse.Namespace) -> None:
    from ..landscape import Landscape

    landscapes = [Landscape.load(path) for path in args.files]
    if args.out.suffix == ".vts":
        return _export(args, landscapes)
    kind = args.kind or _usual_kind(len(landscapes[0].axes), args.out.suffix == ".html")
    draw = _figure(args, kind, "landscapes")
    draw(_only(landscapes, "A volume") if kind == "volume" else landscapes, args.out)


def _usual_kind(axes: int, is_page: bool) -> str:
    if axes == 3:
        return "volume" if is_page else "contour"
    return "page" if is_page else {1: "curves"}.get(axes, "surface")


def _export(args: argparse.Namespace, landscapes: "Sequence[Landscape]") -> None:
    from ..landscape.vtk import to_vtk

    _refuse_others(args, ("kind", *FLAGS), (), "files for ParaView")
    to_vtk(_only(landscapes, "A file for ParaView"), args.out)


def _only(landscapes: "Sequence[Landscape]", what: str) -> "Landscape":
    if len(landscapes) != 1:
        raise ValueError(f"{what} is made of one landscape, got {len(landscapes)}.")
    return landscapes[0]


def _draw_scores(args: argparse.Namespace) -> None:
    from ..scores import FisherScores

    kind = args.kind or ("comparison" if len(args.files) == 2 else "layers")
    draw = _figure(args, kind, "scores")
    scores = [FisherScores.load(path) for path in args.files]
    draw(*(_two(scores) if kind == "comparison" else [scores]), args.out)


def _draw_masks(args: argparse.Namespace) -> None:
    from ..masks import Mask

    draw = _figure(args, args.kind or "comparison", "masks")
    draw(*_two([Mask.load(path) for path in args.files]), args.out)


def _draw_runs(args: argparse.Namespace) -> None:
    from ..experiments import read_runs

    draw = _figure(args, args.kind or "boxes", "runs")
    draw(read_runs(*args.files), args.out)


def _two(nouns: Sequence[Any]) -> Sequence[Any]:
    if len(nouns) != 2:
        alone = "; fisherscope info shows what one holds, layer by layer" if len(nouns) == 1 else ""
        raise ValueError(f"A comparison takes two files, got {len(nouns)}{alone}.")
    return nouns


def _figure(args: argparse.Namespace, kind: str, what: str) -> Callable[..., Path]:
    """The function that draws a kind, with the flags that were given, which it must know."""
    from .. import plots

    if kind not in KINDS[what]:
        raise ValueError(f"--kind {kind} does not draw {what}; take one of {', '.join(KINDS[what])}.")
    function = getattr(plots, KINDS[what][kind])
    known = [name for name in FLAGS if name in inspect.signature(function).parameters]
    if what == "masks":
        known.remove("fraction")  # which makes masks of scores
    _refuse_others(args, FLAGS, known, f"--kind {kind} of {what}")
    return partial(function, **{name: value for name in known if (value := getattr(args, name)) is not None})


def _refuse_others(args: argparse.Namespace, flags: Sequence[str], known: Sequence[str], what: str) -> None:
    for name in flags:
        if name not in known and getattr(args, name) is not None:
            args.refuse(f"argument --{name}: not for {what}")
