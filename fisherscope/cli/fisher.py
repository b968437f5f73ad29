"""``fisherscope fisher``: Fisher scores of a model on data."""

import argparse
import logging
from typing import Any

from .. import storage
from ._common import (
    add_memory_flags,
    add_model_and_data_flags,
    add_output_flags,
    check_ending,
    load,
    output_is_finished,
)
from ._finished import check_finished, deciding_flags, with_flags

logger = logging.getLogger(__name__)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of ``estimate_fisher``."""
    add_model_and_data_flags(parser, may_choose=True)
    fisher = parser.add_argument_group("Fisher information")
    fisher.add_argument(
        "--reduction", choices=("mean", "sum"), default="mean", help="over the scored tokens of an example"
    )
    fisher.add_argument(
        "--estimator",
        choices=("empirical", "sampled", "exact", "squared-batch-mean", "absolute-gradient"),
        default="empirical",
        help="labels: of the data, drawn from the model, or all (few classes); or what a paper's code computes",
    )
    fisher.add_argument(
        "--unit", choices=("sequence", "token"), default="sequence", help="what one term of the mean is"
    )
    fisher.add_argument("--draws", type=int, default=1, help="label draws per example, for --estimator sampled")
    fisher.add_argument("--tokens", type=int, help="random tokens per example, for --unit token; default: all")
    fisher.add_argument("--engine", choices=("auto", "hooks", "loop"), default="auto", help="loop: the slow reference")
    fisher.add_argument(
        "--until-stable",
        type=float,
        metavar="OVERLAP",
        help="stop when the mask agrees so well with a fresh draw: 0.95",
    )
    fisher.add_argument("--fraction", type=float, default=0.1, help="of the entries, which that mask selects")
    add_memory_flags(fisher)
    fisher.add_argument(
        "--shard", action="store_true", help="spread the model over the processes of torchrun, where one is too small"
    )
    fisher.add_argument("--seed", type=int, default=0, help="of masked tokens, data subset and new heads")
    add_output_flags(parser, resumable=True)


def run(args: argparse.Namespace) -> None:
    """Estimate, save, and say what came out; started by torchrun, each process does its share."""
    from .. import distributed

    check_ending(args.out, "scores", ".h5", ".hdf5")
    with distributed.started(args.device) as args.device:
        if not distributed.is_first():
            logging.getLogger("fisherscope").setLevel(logging.ERROR)
        _estimate(args, finished=distributed.first_says(distributed.is_first() and output_is_finished(args)))


def _estimate(args: argparse.Namespace, *, finished: bool) -> None:
    from .. import distributed
    from ..fisher import estimate_fisher
    from ..fisher.run import in_random_order
    from ..models import new_parameters
    from .info import describe_scores, describe_stability
    from .plan import chosen, show_plan

    device = args.device
    if args.shard:
        args.device = "cpu"  # from where one block after the other goes to the device
    model, batches, objective = load(args)
    if finished:
        taken = batches if args.until_stable is None else in_random_order(batches)
        check_finished(args.out, model, taken, _flags(args))
        return
    if new_parameters(model):
        logger.warning(
            "The scores of all other parameters are those of gradients through what was drawn at random, and their "
            "overlap with a fresh draw counts other examples, not another head; fine-tune the model first, or compare "
            "the scores of two values of --seed with 'fisherscope info'."
        )
    if args.shard:
        distributed.shard(model, device)
    else:
        batches = chosen(model, batches, objective, args)
        if distributed.is_first():
            show_plan(model, batches, objective, args)
    part = storage.part_path(args.out)
    scores = estimate_fisher(
        model,
        batches,
        objective=objective,
        estimator=args.estimator,
        unit=args.unit,
        reduction=args.reduction,
        draws=args.draws,
        tokens=args.tokens,
        seed=args.seed,
        engine=args.engine,
        halves=args.halves,
        offload=args.offload,
        until_stable=args.until_stable,
        fraction=args.fraction,
        checkpoint=part,
    )
    if distributed.is_first() or scores.is_sharded:
        with_flags(scores, _flags(args)).save(args.out)
    if not distributed.is_first():
        return
    part.unlink(missing_ok=True)
    described = repr(scores) if scores.is_sharded else describe_scores(scores)
    print(f"{args.out}: {described}", *describe_stability(scores, args.fraction), sep="\n")


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """Those that decide the result; the batch size does where gradients are averaged, or the run may stop."""
    by_batch = args.estimator == "squared-batch-mean" or args.until_stable is not None
    batch_size = {"batch_size": args.batch_size} if by_batch else {}
    return deciding_flags(args, engine="loop" if args.engine == "loop" else "hooks", **batch_size)
