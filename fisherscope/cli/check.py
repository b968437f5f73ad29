"""``fisherscope check``: whether the fast engine and landscapes can be trusted on a model and data."""

import argparse

from ._common import add_general_flags, add_model_and_data_flags, load


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of ``check_engine`` and ``check_landscape``."""
    add_model_and_data_flags(parser, num_examples=8)
    check = parser.add_argument_group("check")
    check.add_argument("--tolerance", type=float, help="relative difference allowed; default: by the precision")
    check.add_argument("--seed", type=int, default=0, help="of masked tokens, data subset and new heads")
    add_general_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print two tables and verdicts; the exit status is 1 unless all is well."""
    from ..testing import check_engine, check_landscape

    model, batches, objective = load(args)
    options = {"objective": objective, "num_examples": args.num_examples, "tolerance": args.tolerance}
    engine = check_engine(model, batches, **options)
    print(engine, end="\n\n")
    landscape = check_landscape(model, batches, **options)
    print(landscape)
    return int(not (engine.ok and landscape.ok))
