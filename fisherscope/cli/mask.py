"""``fisherscope mask``: a mask from Fisher scores."""

import argparse
from pathlib import Path

from ._common import add_output_flags, check_ending, output_is_finished


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of ``top_fraction``, ``bottom_fraction`` and ``random_fraction``."""
    parser.add_argument("scores", type=Path, help="a scores file of `fisherscope fisher`")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--fraction", type=float, help="share of the units to select, 0 to 1")
    how.add_argument(
        "--published", choices=("sharma2024",), help="half of the parameters by mean score, as arXiv 2406.14005 has it"
    )
    parser.add_argument("--select", choices=("top", "bottom", "random"), default="top", help="which ones")
    parser.add_argument("--granularity", choices=("entry", "row", "parameter"), default="entry", help="the unit")
    parser.add_argument(
        "--within", choices=("model", "layer", "parameter"), default="model", help="the same share of each"
    )
    parser.add_argument("--include", nargs="+", metavar="PATTERN", help="only parameters whose name matches")
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help="no parameters whose name matches")
    parser.add_argument("--seed", type=int, default=0, help="of a random selection")
    add_output_flags(parser)
    parser.set_defaults(refuse=parser.error)


def run(args: argparse.Namespace) -> None:
    """Select, save, and say how many."""
    unused = {"granularity": "entry", "within": "model", "include": None, "exclude": None, "seed": 0}
    if args.published and (given := next((name for name, v in unused.items() if getattr(args, name) != v), None)):
        args.refuse(f"argument --{given}: not with --published, which says what is selected")
    if args.published and args.select == "random":
        args.refuse("argument --select: the published masks are the top and the bottom half")
    check_ending(args.out, "a mask", ".safetensors")
    if output_is_finished(args):
        return
    from ..masks import bottom_fraction, random_fraction, sharma2024, top_fraction
    from ..scores import FisherScores

    scores = FisherScores.load(args.scores)
    patterns = {"granularity": args.granularity, "include": args.include, "exclude": args.exclude}
    if args.published:
        mask = sharma2024(scores, "bottom" if args.select == "bottom" else "top")
    elif args.select == "random":
        mask = random_fraction(scores, args.fraction, seed=args.seed, stratify=args.within, **patterns)
    else:
        choose = top_fraction if args.select == "top" else bottom_fraction
        mask = choose(scores, args.fraction, within=args.within, **patterns)
    mask.save(args.out)
    print(f"{args.out}: {mask}")
