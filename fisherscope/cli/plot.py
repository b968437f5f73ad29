"""``fisherscope plot``: figures from scores, masks and landscapes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import storage
from ._common import add_output_flags, output_is_complete

LANDSCAPES = ("surface", "contour", "curves")
SCORES = {
    "sorted": "sorted_scores",
    "layers": "layer_scores",
    "parameters": "parameter_scores",
    "stability": "stability",
    "comparison": "comparison",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of the functions in ``fisherscope.plots``."""
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="landscapes (several become panels), scores, or two masks",
    )
    parser.add_argument(
        "--kind",
        choices=(*LANDSCAPES, *SCORES),
        help="default: surface or curves for landscapes, layers for scores, comparison for two scores or masks",
    )
    parser.add_argument("--metric", choices=("loss", "perplexity"), default="loss", help="of landscapes")
    parser.add_argument("--by", choices=("entry", "parameter"), default="entry", help="what sorted scores rank")
    parser.add_argument("--normalized", action="store_true", help="sorted scores from 0 to 1")
    parser.add_argument("--fraction", type=float, default=0.1, help="of the masks that scores are compared by")
    parser.add_argument("--titles", nargs="+", metavar="TITLE", help="one per file")
    add_output_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Read, draw, save."""
    if output_is_complete(args):
        return
    formats = {storage.file_format(path) for path in args.files}
    if formats == {"fisherscope.landscape"}:
        _draw_landscapes(args)
    elif formats == {"fisherscope.scores"}:
        _draw_scores(args)
    elif formats == {"fisherscope.mask"}:
        _draw_masks(args)
    else:
        found = ", ".join(sorted(f.removeprefix("fisherscope.") for f in formats))
        raise ValueError(
            f"A figure shows landscapes, scores or masks, one kind at a time, but the files hold: {found}."
        )
    print(args.out)


def _draw_landscapes(args: argparse.Namespace) -> None:
    from .. import plots
    from ..landscape import Landscape

    landscapes = [Landscape.load(path) for path in args.files]
    kind = args.kind or ("curves" if len(landscapes[0].axes) == 1 else "surface")
    _check_kind(kind, LANDSCAPES, "landscapes")
    getattr(plots, kind)(landscapes, args.out, metric=args.metric, titles=args.titles)


def _draw_scores(args: argparse.Namespace) -> None:
    from .. import plots
    from ..scores import FisherScores

    kind = args.kind or ("comparison" if len(args.files) == 2 else "layers")
    _check_kind(kind, tuple(SCORES), "scores")
    scores = [FisherScores.load(path) for path in args.files]
    options: dict[str, dict[str, Any]] = {
        "sorted": {"by": args.by, "normalized": args.normalized},
        "comparison": {"fraction": args.fraction},
    }
    given: Any = _two(scores) if kind == "comparison" else [scores]
    getattr(plots, SCORES[kind])(*given, args.out, titles=args.titles, **options.get(kind, {}))


def _draw_masks(args: argparse.Namespace) -> None:
    from .. import plots
    from ..masks import Mask

    _check_kind(args.kind or "comparison", ("comparison",), "masks")
    first, second = _two([Mask.load(path) for path in args.files])
    plots.comparison(first, second, args.out, titles=args.titles)


def _two(nouns: Sequence[Any]) -> Sequence[Any]:
    if len(nouns) != 2:
        raise ValueError(f"A comparison takes two files, got {len(nouns)}.")
    return nouns


def _check_kind(kind: str, allowed: tuple[str, ...], what: str) -> None:
    if kind not in allowed:
        raise ValueError(f"--kind {kind} does not draw {what}; take one of {', '.join(allowed)}.")
