"""``fisherscope plot``: figures from scores and landscapes."""

import argparse
from pathlib import Path
from typing import Any

from .. import storage
from ._common import add_output_flags, output_is_complete

KINDS = ("surface", "contour", "curves", "sorted", "layers")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of the functions in ``fisherscope.plots``."""
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="landscapes, or scores; several become panels"
    )
    parser.add_argument("--kind", choices=KINDS, help="default: surface or curves for landscapes, layers for scores")
    parser.add_argument("--metric", choices=("loss", "perplexity"), default="loss", help="of landscapes")
    parser.add_argument("--by", choices=("entry", "parameter"), default="entry", help="what sorted scores rank")
    parser.add_argument("--normalized", action="store_true", help="sorted scores from 0 to 1")
    parser.add_argument("--titles", nargs="+", metavar="TITLE", help="one per file")
    add_output_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Read, draw, save."""
    if output_is_complete(args):
        return
    from .. import plots

    formats = {storage.file_format(path) for path in args.files}
    if formats == {"fisherscope.landscape"}:
        from ..landscape import Landscape

        landscapes = [Landscape.load(path) for path in args.files]
        kind = args.kind or ("curves" if len(landscapes[0].axes) == 1 else "surface")
        _check_kind(kind, KINDS[:3], "landscapes")
        getattr(plots, kind)(landscapes, args.out, metric=args.metric, titles=args.titles)
    elif formats == {"fisherscope.scores"}:
        from ..scores import FisherScores

        scores = [FisherScores.load(path) for path in args.files]
        kind = args.kind or "layers"
        _check_kind(kind, KINDS[3:], "scores")
        options: dict[str, Any] = {"by": args.by, "normalized": args.normalized} if kind == "sorted" else {}
        getattr(plots, {"sorted": "sorted_scores", "layers": "layer_scores"}[kind])(
            scores, args.out, titles=args.titles, **options
        )
    else:
        found = ", ".join(sorted(f.removeprefix("fisherscope.") for f in formats))
        raise ValueError(f"A figure shows landscapes or scores, one kind at a time, but the files hold: {found}.")
    print(args.out)


def _check_kind(kind: str, allowed: tuple[str, ...], what: str) -> None:
    if kind not in allowed:
        raise ValueError(f"--kind {kind} does not draw {what}; take one of {', '.join(allowed)}.")
