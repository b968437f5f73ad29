"""``fisherscope landscape``: the loss around a model, on a grid."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import storage
from ._common import add_model_and_data_flags, add_output_flags, check_ending, load, output_is_finished
from ._finished import check_finished, content, deciding_flags, with_flags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..landscape import Direction, Landscape, Subspace
    from ..landscape.curvature import Curvature

DIRECTIONS = {
    "random": 0,
    "between": 1,
    "plane": 2,
    "trajectory": None,
    "hessian": 0,
    "ggn": 0,
    "steepest": 0,
    "low-rank": 0,
}
"""What the axes can be, and how many other models that takes; None: any number."""

MOVING = ("normalize", "one_dimensional", "match", "orthogonal", "seed", "strict")
"""What decides how directions are used."""

OWN = (("rank", "low-rank", 8), ("normalize", "random", "filter"), ("one_dimensional", "random", "skip"))
"""Flags of one kind of directions, and their defaults."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of ``scan_landscape``, and of the functions that make directions."""
    add_model_and_data_flags(parser)
    grid = parser.add_argument_group("grid")
    grid.add_argument("--axes", type=int, choices=(1, 2, 3), help="a curve, a surface or a volume; default: 2")
    grid.add_argument(
        "--points", type=int, nargs="+", default=[51], help="per axis; odd, so that step 0 is on the grid"
    )
    ends = grid.add_mutually_exclusive_group()
    ends.add_argument("--span", type=float, help="steps go from -span to span; default: 1, or as far as the models are")
    ends.add_argument(
        "--range",
        type=float,
        nargs=2,
        action="append",
        metavar=("LOW", "HIGH"),
        help="steps go from LOW to HIGH, with 0 on the grid; once, or once per axis",
    )
    grid.add_argument("--adaptive", type=float, metavar="TOL", help="measure only as many points as this error needs")
    grid.add_argument("--clip", action="store_true", help="look no closer where the loss is beyond guessing")
    moves = parser.add_argument_group("what moves, and where to")
    moves.add_argument("--mask", type=Path, help="a mask file: only its entries move; default: all entries")
    moves.add_argument("--directions", choices=DIRECTIONS, default="random", help="what the axes are")
    moves.add_argument(
        "--models", nargs="+", default=[], metavar="MODEL", help="other models, for between, plane and trajectory"
    )
    moves.add_argument("--rank", type=int, help="of low-rank directions; default: 8")
    moves.add_argument(
        "--normalize",
        choices=("filter", "row", "parameter", "layer", "none"),
        help="of random directions; default: filter",
    )
    moves.add_argument(
        "--one-dimensional",
        choices=("skip", "scale"),
        help="what biases and norms do in random directions; default: skip",
    )
    moves.add_argument(
        "--match",
        choices=("none", "norm", "fisher"),
        default="none",
        help="make masked directions as large as those of a random mask",
    )
    moves.add_argument("--orthogonal", action="store_true", help="make each direction orthogonal to the earlier ones")
    moves.add_argument("--replicates", type=int, default=1, help="repeat along so many sets of random directions")
    more = parser.add_argument_group("more to measure")
    more.add_argument("--scores", type=Path, help="a scores file, for Fisher norms and --match fisher")
    more.add_argument("--metrics", nargs="+", default=[], metavar="NAME", help="accuracy, f1, matthews, pearson ...")
    more.add_argument("--measures", action="store_true", help="curvature, sharpness and basin radius of the model")
    more.add_argument(
        "--eigenvalue-ratio", action="store_true", help="how far from convex the loss is at every point; slow"
    )
    parser.add_argument("--seed", type=int, default=0, help="of directions, masked tokens, data subset and new heads")
    parser.add_argument(
        "--strict", action="store_true", help="refuse a mask made from other weights, instead of a warning"
    )
    add_output_flags(parser, resumable=True)


def run(args: argparse.Namespace) -> None:
    """Scan, save, and say what came out; started by torchrun, each process measures its share of the points."""
    from .. import distributed

    _check(args)
    check_ending(args.out, "a landscape", ".h5", ".hdf5")
    with distributed.started(args.device) as args.device:
        if not distributed.is_first():
            logging.getLogger("fisherscope").setLevel(logging.ERROR)
        _scan(args, finished=distributed.first_says(distributed.is_first() and output_is_finished(args)))


def _scan(args: argparse.Namespace, *, finished: bool) -> None:
    from .. import distributed
    from ..landscape import scan_landscape
    from ..landscape.curvature import Curvature
    from ..landscape.moves import Moves
    from ..landscape.scan import grid_steps
    from ..masks import Mask
    from ..scores import FisherScores
    from .info import describe_landscape

    axes = args.axes or (1 if args.directions in ("between", "steepest") else 2)
    points = args.points * axes if len(args.points) == 1 else args.points
    grid_steps(axes, points, _span(args, None, axes, points))  # what is wrong with them is known at once
    mask = Mask.load(args.mask) if args.mask else None
    scores = FisherScores.load(args.scores) if args.scores else None
    model, batches, objective = load(args)
    flags = _flags(args, axes, points)
    if finished:
        check_finished(args.out, model, batches, flags)
        return
    space = _space(args, model, batches, mask, objective, axes)
    part = storage.part_path(args.out)
    moving: dict[str, Any] = {name: getattr(args, name) for name in MOVING}
    landscape = scan_landscape(
        model,
        batches,
        mask=mask,
        axes=axes,
        points=points,
        span=_span(args, space, axes, points),
        directions=space or "random",
        scores=scores,
        replicates=args.replicates,
        metrics=args.metrics,
        adaptive=args.adaptive,
        clip=args.clip,
        objective=objective,
        checkpoint=part,
        **moving,
    )
    if not distributed.is_first():
        return
    if args.measures or args.eigenvalue_ratio:
        moves = Moves(model, axes, space, mask, scores, **moving).along()
        landscape = _with_measures(args, landscape, moves, Curvature(model, batches, objective=objective, mask=mask))
    with_flags(landscape, flags).save(args.out)  # not before: what is there counts as complete
    part.unlink(missing_ok=True)
    print(f"{args.out}: {describe_landscape(landscape)}")


def _flags(args: argparse.Namespace, axes: int, points: list[int]) -> dict[str, Any]:
    """Those that decide the result, with what is in the files that they name."""
    span = _given_span(args, axes) or (None if args.models else 1.0)
    return deciding_flags(
        args,
        axes=axes,
        points=points,
        range=None,
        span=[(-span, span)] * axes if isinstance(span, float) else span,
        mask=content(args.mask),
        scores=content(args.scores),
        models=[content(name) for name in args.models],
    )


def _with_measures(
    args: argparse.Namespace, landscape: "Landscape", directions: "Sequence[Direction]", curvature: "Curvature"
) -> "Landscape":
    from dataclasses import replace

    from ..landscape.measures import eigenvalue_ratio_map, measure_landscape, measure_model

    if args.measures:
        measures = measure_model(curvature, directions, seed=args.seed)
        landscape = replace(landscape, measures={**measure_landscape(landscape), **measures})
    if args.eigenvalue_ratio:
        ratios = eigenvalue_ratio_map(curvature, landscape, directions, seed=args.seed)
        landscape = replace(landscape, metrics={**landscape.metrics, "eigenvalue ratio": ratios})
    return landscape


def _check(args: argparse.Namespace) -> None:
    for name, kind, default in OWN:
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.directions != kind:
            args.refuse(f"argument --{name.replace('_', '-')}: only with --directions {kind}")
    if args.directions != "random" and args.replicates > 1:
        args.refuse("argument --replicates: only random directions have several")
    wanted = DIRECTIONS[args.directions]
    if wanted is None and len(args.models) < 2:
        args.refuse(f"argument --models: a trajectory takes at least two other models, got {len(args.models)}")
    if wanted is not None and len(args.models) != wanted:
        args.refuse(f"argument --models: --directions {args.directions} takes {wanted}, got {len(args.models)}")
    if args.directions == "between" and args.axes not in (None, 1):
        args.refuse("argument --axes: between two models there is one axis; take --directions plane for two")
    if args.directions == "plane" and args.axes not in (None, 2):
        args.refuse("argument --axes: a plane has two axes")
    if args.directions == "steepest" and args.axes not in (None, 1):
        args.refuse("argument --axes: the steepest direction is one axis")


def _space(
    args: argparse.Namespace, model: Any, batches: Any, mask: Any, objective: str, axes: int
) -> "Subspace | None":
    """The directions asked for; None for random ones."""
    from ..landscape import curvature, paths

    names = _names(args.models)
    if args.directions == "between":
        return paths.between(model, args.models[0], mask=mask, name=names[0], strict=args.strict)
    if args.directions == "plane":
        first, second = args.models
        return paths.plane_through(model, first, second, names=(names[0], names[1]), mask=mask, strict=args.strict)
    if args.directions == "trajectory":
        return paths.trajectory(model, args.models, names=names, mask=mask, axes=axes, strict=args.strict)
    if args.directions in ("hessian", "ggn"):
        options: dict[str, Any] = {"kind": args.directions, "mask": mask, "objective": objective, "seed": args.seed}
        return curvature.top_eigenvectors(model, batches, axes, strict=args.strict, **options)
    if args.directions == "steepest":
        return curvature.steepest(model, batches, mask=mask, objective=objective, strict=args.strict)
    if args.directions == "low-rank":
        return curvature.low_rank(model, axes, rank=args.rank, seed=args.seed)
    if args.directions != "random":
        raise NotImplementedError(f"No function makes the directions {args.directions!r}; call one here.")
    return None


def _names(models: "Sequence[str]") -> tuple[str, ...]:
    """What figures call other models: file names, or all that was given if those are the same."""
    short = tuple(Path(name).name.removesuffix(".safetensors") for name in models)
    return short if len(set(short)) == len(short) else tuple(models)


def _span(args: argparse.Namespace, space: "Subspace | None", axes: int, points: list[int]) -> Any:
    from ..landscape.paths import span_of

    given = _given_span(args, axes)
    if given is None and space and space.markers:
        return span_of(space, points)
    return 1.0 if given is None else given


def _given_span(args: argparse.Namespace, axes: int) -> Any:
    if args.range:
        ranges = [tuple(ends) for ends in args.range]
        return ranges * axes if len(ranges) == 1 else ranges
    return args.span
