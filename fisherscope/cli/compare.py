"""``fisherscope compare``: methods of fine-tuning side by side, with tests over seeds."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .. import storage
from ._common import add_general_flags, output_is_finished

if TYPE_CHECKING:
    from ..experiments.comparison import Comparison

SUFFIXES = (".md", ".tex", ".csv")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of ``compare_methods``."""
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="with the runs of finetune or sweep in or below it"
    )
    parser.add_argument("--reference", default="vanilla", help="the arm that the others are compared with")
    parser.add_argument("--metric", metavar="NAME", help="one for all tasks; default: the main one of each")
    parser.add_argument(
        "--which",
        choices=("last", "selected", "best"),
        help="epoch that counts; default: the one selected on examples of their own, or else the last",
    )
    parser.add_argument(
        "--correction", choices=("holm", "benjamini-hochberg"), default="holm", help="for the number of tests"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"a table, {', '.join(SUFFIXES)}; default: print it")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing table")
    add_general_flags(parser)
    parser.set_defaults(refuse=parser.error)


def run(args: argparse.Namespace) -> None:
    """Read, compare, and print or save."""
    if args.out is not None:
        if args.out.suffix not in SUFFIXES:
            args.refuse(f"argument --out: a table is {', '.join(SUFFIXES)}; got {args.out.name!r}")
        output_is_finished(args)
    from ..experiments import compare_methods, read_runs

    comparison = compare_methods(
        read_runs(*args.folders),
        reference=args.reference,
        metric=args.metric,
        which=args.which,
        correction=args.correction,
    )
    if args.out is None:
        print(comparison.to_markdown(), end="")
        return
    with storage.atomic(args.out) as temporary:
        temporary.write_text(_text(comparison, args.out.suffix), encoding="utf-8")
    print(args.out)


def _text(comparison: "Comparison", suffix: str) -> str:
    """The table; how it was made is a comment where the format has them."""
    if suffix == ".csv":
        return comparison.to_csv()
    facts = storage.provenance()
    origin = f"{facts['command']} (fisherscope {facts['versions']['fisherscope']}, {facts['time']})"
    if suffix == ".md":
        return f"{comparison.to_markdown()}\n<!-- {origin} -->\n"
    return f"% {origin}\n{comparison.to_latex()}"
