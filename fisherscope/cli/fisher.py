"""``fisherscope fisher``: Fisher scores of a model on data."""

import argparse

from .. import storage
from ._common import add_model_and_data_flags, add_output_flags, load, output_is_complete


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of ``estimate_fisher``."""
    add_model_and_data_flags(parser)
    fisher = parser.add_argument_group("Fisher information")
    fisher.add_argument(
        "--reduction", choices=("mean", "sum"), default="mean", help="over the scored tokens of an example"
    )
    fisher.add_argument("--engine", choices=("auto", "hooks", "loop"), default="auto", help="loop: the slow reference")
    fisher.add_argument("--seed", type=int, default=0, help="of masked tokens, data subset and new heads")
    add_output_flags(parser, resumable=True)


def run(args: argparse.Namespace) -> None:
    """Estimate, save, and say what came out."""
    if output_is_complete(args):
        return
    from ..fisher import estimate_fisher
    from .info import describe_scores

    model, batches, objective = load(args)
    part = storage.part_path(args.out)
    scores = estimate_fisher(
        model, batches, objective=objective, reduction=args.reduction, engine=args.engine, checkpoint=part
    )
    scores.save(args.out)
    part.unlink(missing_ok=True)
    print(f"{args.out}: {describe_scores(scores)}")
