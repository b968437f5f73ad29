"""``fisherscope check``: whether the fast engine is exact on a model, and batching and padding are harmless."""

import argparse

from ._common import add_general_flags, add_model_and_data_flags, load


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of ``check_engine``."""
    add_model_and_data_flags(parser, num_examples=8)
    check = parser.add_argument_group("check")
    check.add_argument("--tolerance", type=float, help="relative difference allowed; default: by the precision")
    check.add_argument("--seed", type=int, default=0, help="of masked tokens, data subset and new heads")
    add_general_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print a table and the verdict; the exit status is 1 unless all is well."""
    from ..testing import check_engine

    model, batches, objective = load(args)
    report = check_engine(model, batches, objective=objective, num_examples=args.num_examples, tolerance=args.tolerance)
    print(report)
    return int(not report.ok)
