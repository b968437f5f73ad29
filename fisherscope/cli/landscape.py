"""``fisherscope landscape``: the loss around a model, on a grid."""

import argparse
from pathlib import Path

from .. import storage
from ._common import add_model_and_data_flags, add_output_flags, load, output_is_complete


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of ``scan_landscape``."""
    add_model_and_data_flags(parser)
    grid = parser.add_argument_group("landscape")
    grid.add_argument("--mask", type=Path, help="a mask file: only its entries move; default: all entries")
    grid.add_argument("--axes", type=int, choices=(1, 2), default=2, help="a curve or a surface")
    grid.add_argument(
        "--points", type=int, nargs="+", default=[51], help="per axis; odd, so that step 0 is on the grid"
    )
    grid.add_argument("--span", type=float, default=1.0, help="steps go from -span to span")
    grid.add_argument("--normalize", choices=("filter", "none"), default="filter", help="of the random directions")
    grid.add_argument("--one-dimensional", choices=("skip", "scale"), default="skip", help="what biases and norms do")
    grid.add_argument("--seed", type=int, default=0, help="of directions, masked tokens, data subset and new heads")
    grid.add_argument(
        "--strict", action="store_true", help="refuse a mask made from other weights, instead of a warning"
    )
    add_output_flags(parser, resumable=True)


def run(args: argparse.Namespace) -> None:
    """Scan, save, and say what came out."""
    if output_is_complete(args):
        return
    from ..landscape import scan_landscape
    from ..masks import Mask
    from .info import describe_landscape

    mask = Mask.load(args.mask) if args.mask else None
    model, batches, objective = load(args)
    part = storage.part_path(args.out)
    landscape = scan_landscape(
        model,
        batches,
        mask=mask,
        axes=args.axes,
        points=args.points * args.axes if len(args.points) == 1 else args.points,
        span=args.span,
        normalize=args.normalize,
        one_dimensional=args.one_dimensional,
        objective=objective,
        seed=args.seed,
        strict=args.strict,
        checkpoint=part,
    )
    landscape.save(args.out)
    part.unlink(missing_ok=True)
    print(f"{args.out}: {describe_landscape(landscape)}")
