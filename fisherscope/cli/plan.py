"""``fisherscope plan``: the memory that a Fisher run takes, from a model's configuration alone."""

import argparse
import json
from typing import TYPE_CHECKING

from .. import storage
from ..data.sources import OBJECTIVES
from ._common import add_general_flags, add_memory_flags, batch_size

if TYPE_CHECKING:
    from torch import nn

    from ..data import Batches
    from ..fisher.memory import MemoryPlan


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of ``plan_memory``."""
    parser.add_argument("--model", required=True, help="Hub name, local folder, built-in model, or a config.json")
    parser.add_argument("--objective", choices=OBJECTIVES, help="default: that of the checkpoint's head")
    parser.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--device", help="for example cuda:1; default: CUDA where there is one")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument(
        "--batch-size", type=batch_size, default=8, help="examples at once, or auto: the most that fit, up to 256"
    )
    parser.add_argument("--max-length", type=int, default=128, help="tokens per example, and per target if it has one")
    add_memory_flags(parser)
    add_general_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    import torch

    from ..fisher.memory import LARGEST_BATCH_SIZE, choose_batch_size, empty_model, plan_memory

    model, objective = empty_model(
        args.model, objective=args.objective, revision=args.revision, dtype=getattr(torch, args.dtype)
    )
    settings = {"halves": args.halves, "offload": args.offload, "device": args.device}
    size = args.batch_size
    if size == "auto":
        size = choose_batch_size(model, [args.max_length] * LARGEST_BATCH_SIZE, objective, **settings)
    plan = plan_memory(model, batch_size=size, length=args.max_length, objective=objective, **settings)
    print(f"{args.model}, {objective}: {describe_plan(plan)}")


def chosen(model: "nn.Module", batches: "Batches", objective: str, args: argparse.Namespace) -> "Batches":
    """The batches in the size that ``--batch-size auto`` stands for, if that is what was given.

    A run that is resumed keeps the size it was begun with.
    """
    from ..fisher.memory import choose_batch_size
    from ..scores import FORMAT

    if args.batch_size != "auto":
        return batches
    part = storage.part_path(args.out)
    if not part.exists():
        size = choose_batch_size(model, batches, objective, halves=args.halves, offload=args.offload)
        return batches.with_batch_size(size)
    with storage.open_hdf5(part, FORMAT) as file:
        begun = json.loads(storage.attributes(file)["provenance"])
    return batches.with_batch_size(begun["data"]["batch_size"])


def show_plan(model: "nn.Module", batches: "Batches", objective: str, args: argparse.Namespace) -> None:
    """Print what the run will take; a model that cannot be planned gets one line that says so."""
    from ..fisher.memory import longest, plan_memory

    lengths, target_length = longest(batches)
    try:
        plan = plan_memory(
            model,
            batch_size=min(batches.batch_size, len(lengths)),
            length=max(lengths),
            objective=objective,
            halves=args.halves,
            offload=args.offload,
            target_length=target_length,
        )
    except ValueError as error:
        print(error)
    else:
        print(describe_plan(plan))


def describe_plan(plan: "MemoryPlan") -> str:
    """Sizes that matter, and the table."""
    examples = "1 example" if plan.batch_size == 1 else f"{plan.batch_size} examples"
    return f"{plan.entries:,} entries scored, {examples} of {plan.length} tokens at a time\n{plan}"
