"""Flags and steps that several commands share."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .. import storage
from ..data.sources import LABELLED_OBJECTIVES, OBJECTIVES, read_source
from ..data.tasks import TASKS, read_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data import Batches, Source


def add_model_and_data_flags(
    parser: argparse.ArgumentParser, *, num_examples: int | None = None, may_choose: bool = False
) -> None:
    """The keywords of ``load_model`` and ``load_batches``; with ``may_choose``, the batch size may be ``auto``."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, help="Hub name, local folder, or builtin:bert|gpt2|t5")
    model.add_argument("--objective", choices=OBJECTIVES, help="default: that of the checkpoint's head")
    model.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    model.add_argument("--device", help="for example cuda:1; default: CUDA where there is one")
    model.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="of the weights")
    data = parser.add_argument_group("data")
    origin = data.add_mutually_exclusive_group(required=True)
    origin.add_argument("--data", help="Hub name, .txt .csv .tsv .json .jsonl .parquet file, folder, or builtin:docs")
    origin.add_argument("--task", choices=TASKS, metavar="NAME", help=f"instead of --data: {', '.join(TASKS)}")
    data.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="with the files of the task as published; default: the Hub"
    )
    data.add_argument("--split", help="of the task: train or validation; default: train")
    data.add_argument(
        "--num-examples",
        type=int,
        default=num_examples,
        help="a random subset of this size" + ("; default: all" if num_examples is None else ""),
    )
    effect = (
        "changes no scores but those of squared-batch-mean; their stability is told from 4 batches on; auto: the most "
        "that fit"
        if may_choose
        else "does not change results"
    )
    data.add_argument(
        "--batch-size",
        type=batch_size if may_choose else int,
        default=16,
        help=f"examples at once; {effect}",
    )
    data.add_argument(
        "--max-length", type=int, help="tokens per example; default: 128, or fewer if the model takes fewer"
    )
    data.add_argument("--text-columns", nargs="+", metavar="COLUMN", help="one or two columns with text")
    data.add_argument("--label-column", metavar="COLUMN", help="for classification and regression")
    parser.set_defaults(refuse=parser.error)


def add_memory_flags(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Where and how often the sums of squares are kept."""
    parser.add_argument(
        "--halves", action="store_true", help="also keep the scores by either half of the examples; twice the memory"
    )
    parser.add_argument("--offload", action="store_true", help="save device memory: keep the sums on the host")


def batch_size(text: str) -> int | Literal["auto"]:
    """The value of ``--batch-size`` where it may be chosen."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of examples, or auto; got {text!r}")
    return "auto" if text == "auto" else int(text)


def add_output_flags(parser: argparse.ArgumentParser, *, resumable: bool = False) -> None:
    """``--out`` and what to do when it exists."""
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, help="where the result goes")
    output.add_argument("--overwrite", action="store_true", help="replace an existing result")
    if resumable:
        output.add_argument("--resume", action="store_true", help="go on where an earlier run stopped")
    add_general_flags(parser)


def add_general_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every command."""
    parser.add_argument("--config", type=Path, help="YAML file of flags; the command line wins")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def check_ending(out: Path, kind: str, *endings: str) -> None:
    """Refuse a name by which the file would be taken for another kind when it is read.

    Raises:
        ValueError: If the name has none of the endings.
    """
    if out.suffix.lower() not in endings:
        raise ValueError(f"The name of {kind} ends in {' or '.join(endings)}, got {out.name!r}; rename the output.")


def output_is_finished(args: argparse.Namespace) -> bool:
    """Settle what is to be done about ``--out``; True if ``--resume`` finds a result there, and no work in progress.

    A part beside a finished file is that of its replacement.

    Raises:
        FileExistsError: If there is a result, or a part of one, and no flag says what to do.
        IsADirectoryError: If it is a folder, which no flag replaces.
    """
    if args.out.is_dir():
        raise IsADirectoryError(f"--out must be a file, but {args.out} is a folder; name a file in it.")
    part = storage.part_path(args.out)
    resume = getattr(args, "resume", False)
    if args.out.exists() and resume and not args.overwrite:
        return not part.exists()
    if args.out.exists() and not args.overwrite:
        raise FileExistsError(f"{args.out} exists; give --overwrite to replace it, or another --out.")
    if part.exists() and not resume and not args.overwrite:
        raise FileExistsError(f"{part} holds unfinished work; give --resume to go on, or --overwrite to start afresh.")
    if not resume:
        part.unlink(missing_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return False


def load(args: argparse.Namespace) -> "tuple[PreTrainedModel, Batches, str]":
    """The model, the data for it, and the objective."""
    _check_data_flags(args)
    import torch

    from ..data import load_batches
    from ..data.sources import with_class_order
    from ..models import load_model, saved_classes

    source, objective = _read(args)
    num_labels = source.num_labels
    if objective == "classification" and (classes := saved_classes(args.model, revision=args.revision)):
        source = with_class_order(source, classes)
        num_labels = max(len(classes), source.num_labels or 0)
    model, tokenizer = load_model(
        args.model,
        objective=objective,
        num_labels=num_labels if objective == "classification" else None,
        seed=args.seed,
        revision=args.revision,
        dtype=getattr(torch, args.dtype),
        device=args.device,
    )
    batches = load_batches(
        source,
        tokenizer,
        objective=objective,
        num_examples=args.num_examples,
        batch_size=1 if args.batch_size == "auto" else args.batch_size,  # until it is chosen
        max_length=args.max_length,
        seed=args.seed,
    )
    return model, batches, objective


def _check_data_flags(args: argparse.Namespace) -> None:
    unfit = ("data_dir", "split") if args.task is None else ("text_columns", "label_column")
    given = [f"--{name.replace('_', '-')}" for name in unfit if getattr(args, name) is not None]
    if given:
        args.refuse(f"argument {given[0]}: only with {'--task' if args.task is None else '--data'}")
    if args.task and args.objective in LABELLED_OBJECTIVES and args.objective != TASKS[args.task].objective:
        args.refuse(f"argument --objective: {args.task} is a task of {TASKS[args.task].objective}")


def _read(args: argparse.Namespace) -> "tuple[Source, str]":
    """The texts, with labels if the objective needs them, and the objective."""
    from ..models import saved_objective

    if args.task is not None:
        source = read_task(args.task, args.split or "train", data_dir=args.data_dir)
        if args.objective not in (None, *LABELLED_OBJECTIVES):
            source = replace(source, labels=None, label_names=None, label_column=None)
        return source, args.objective or TASKS[args.task].objective
    objective = args.objective or saved_objective(args.model, revision=args.revision)
    columns = {"text_columns": args.text_columns, "label_column": args.label_column}
    return read_source(args.data, objective=objective, **columns), objective
