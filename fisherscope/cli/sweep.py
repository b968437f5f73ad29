"""``fisherscope sweep``: many trainings that one file names."""

import argparse
import logging
from collections import Counter
from pathlib import Path

from ._common import add_general_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The file, and how its trainings are shared out."""
    parser.add_argument("file", type=Path, help="YAML: models, tasks, sizes, methods, seeds, and keywords of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep; every run gets its own below")
    parser.add_argument("--processes", type=int, default=1, help="runs at once; each has its share of the cores")
    parser.add_argument("--shard", type=_shard, metavar="I/N", help="part I of N only, from 0/N to (N-1)/N")
    parser.add_argument("--retry-failed", action="store_true", help="do runs again that failed before")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and how far they are, and do nothing")
    add_general_flags(parser)


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N-1, as in 0/8; got {text!r}")
    return int(number), int(of)


def run(args: argparse.Namespace) -> int:
    """Do what is not done yet, and say what came of it; 1 if a run failed."""
    from ..experiments import load_sweep, run_sweep

    sweep = load_sweep(args.file)
    if args.shard is not None:
        sweep = sweep.shard(*args.shard)
    if args.dry_run:
        states = sweep.states(args.out)
        print(*(f"{state:8}  {folder}" for folder, state in states.items()), sep="\n")
        print(", ".join(f"{number} {state}" for state, number in Counter(states.values()).items()) or "no runs")
        return 0
    logging.getLogger("fisherscope.finetune").setLevel(logging.WARNING)  # one line for every run is enough
    report = run_sweep(sweep, args.out, processes=args.processes, retry_failed=args.retry_failed)
    print(f"{args.out}: {report}")
    return 1 if report.failed else 0
