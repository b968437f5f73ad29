"""``fisherscope finetune``: fine-tuning with a regularizer, for several seeds."""

import argparse
import inspect
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..data.sources import OBJECTIVES
from ..data.tasks import TASKS
from ..finetune.protocol import DEFAULT, PROTOCOLS
from ..finetune.regularizer import METHODS, Regularizer
from ._common import add_general_flags

TRAINING = ("epochs", "max_steps", "batch_size", "accumulate", "learning_rate", "weight_decay", "warmup", "precision")

STAGES = ("tasks", "sampling_exponent", "init", "pretrain_text", "pretrain_steps", "intermediate_task")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The keywords of ``finetune``, and the settings of every method."""
    from ..finetune import methods  # noqa: F401  registers them, which takes torch

    what = parser.add_argument_group("model and task")
    what.add_argument("--model", required=True, help="Hub name, local folder, or builtin:bert|gpt2|t5")
    origin = what.add_mutually_exclusive_group(required=True)
    origin.add_argument("--task", choices=TASKS, metavar="NAME", help=", ".join(TASKS))
    origin.add_argument("--data", help="instead of --task: text to train on, as for the other commands")
    origin.add_argument("--tasks", type=_names, metavar="A,B,C", help="instead of --task: several at once")
    what.add_argument(
        "--sampling-exponent",
        type=float,
        help="with --tasks: draw them in proportion to their size to this power; default: 1.0",
    )
    what.add_argument("--init", choices=("pretrained", "random"), default="pretrained", help="of the weights")
    what.add_argument("--pretrain-text", metavar="DATA", help="text for more masked language modelling first")
    what.add_argument("--pretrain-steps", type=int, help="optimizer steps of that; default: one pass over the text")
    what.add_argument("--intermediate-task", choices=TASKS, metavar="NAME", help="a task to fine-tune on first")
    what.add_argument("--validation-data", metavar="DATA", help="with --data: what is reported after every epoch")
    what.add_argument("--objective", choices=OBJECTIVES, help="with --data; default: that of the checkpoint's head")
    what.add_argument(
        "--data-dir", type=Path, metavar="FOLDER", help="with the files of the task as published; default: the Hub"
    )
    what.add_argument("--text-columns", nargs="+", metavar="COLUMN", help="with --data: one or two columns with text")
    what.add_argument("--label-column", metavar="COLUMN", help="with --data: for classification and regression")
    what.add_argument(
        "--train-size",
        type=_size,
        metavar="N",
        help="how many examples to train on, or a fraction of them, such as 0.1; default: all",
    )
    what.add_argument("--subset-seed", type=int, default=0, help="draws them, the same ones for all seeds")
    what.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=DEFAULT,
        metavar="NAME",
        help=f"who sees which examples: {', '.join(PROTOCOLS)}; default: {DEFAULT}",
    )
    what.add_argument(
        "--max-length", type=int, help="tokens per example; default: 128, or fewer if the model takes fewer"
    )
    what.add_argument("--revision", help="branch, tag or commit of the model on the Hub")
    what.add_argument("--device", help="cpu or cuda; default: CUDA where there is one, of several GPUs the first")
    _add_training_flags(parser)
    _add_method_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, help="folder for results.json, predictions.jsonl, …")
    output.add_argument("--resume", action="store_true", help="go on where an earlier run stopped")
    output.add_argument("--save-model", action="store_true", help="also save every model as a Hugging Face folder")
    output.add_argument(
        "--measure-forgetting",
        metavar="DATA",
        help="text on which the loss of pretraining is measured before and after",
    )
    add_general_flags(parser)
    parser.set_defaults(refuse=parser.error)


def _names(text: str) -> list[str]:
    """Names with commas between them."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, as in a,b; got {text!r}")
    return names


def _size(text: str) -> int | float:
    """A number of examples, or a fraction."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    seeds = training.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=int, default=1, help="how many trainings, of seeds 0, 1, …")
    seeds.add_argument("--seed", type=int, help="train with this seed alone")
    training.add_argument("--epochs", type=float, default=3.0, help="passes over the training examples")
    training.add_argument("--max-steps", type=int, help="optimizer steps in place of --epochs")
    training.add_argument("--batch-size", type=int, default=16, help="examples at once on every rank")
    training.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step; changes no gradient")
    training.add_argument("--learning-rate", type=float, default=2e-5, help="at its highest")
    training.add_argument("--weight-decay", type=float, default=0.01, help="decoupled; not of biases and norms")
    training.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    training.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16"), default="float32", help="of the passes"
    )


def _add_method_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting of a method; methods that share the name of a setting share the flag."""
    group = parser.add_argument_group("method")
    group.add_argument("--method", default="vanilla", metavar="NAME", help=f"{', '.join(sorted(METHODS))}, or A+B")
    group.add_argument("--scores", type=Path, metavar="FILE", help="default: estimated on the training examples")
    group.add_argument("--mask", type=Path, metavar="FILE", help="of the entries to train")
    group.add_argument("--strict", action="store_true", help="refuse scores and masks made from other weights")
    by_setting: dict[str, dict[str, inspect.Parameter]] = {}
    for name, method in sorted(METHODS.items()):
        for setting, parameter in method.settings().items():
            by_setting.setdefault(setting, {})[name] = parameter
    for setting, uses in by_setting.items():
        group.add_argument(f"--{setting.replace('_', '-')}", **_flag(setting, uses))
    parser.set_defaults(method_settings=sorted(by_setting))


def _flag(setting: str, uses: dict[str, inspect.Parameter]) -> dict[str, Any]:
    kinds = [p.annotation for p in uses.values()]
    facts: dict[str, Any] = {"help": _help(setting, uses).replace("%", "%%"), "default": None}
    if all(get_origin(kind) is Literal for kind in kinds):
        return {**facts, "choices": tuple(dict.fromkeys(value for kind in kinds for value in get_args(kind)))}
    if all(kind is bool for kind in kinds):
        return {**facts, "action": argparse.BooleanOptionalAction}
    return {**facts, "type": next((kind for kind in (int, float) if kinds[0] is kind), str)}


def _help(setting: str, uses: dict[str, inspect.Parameter]) -> str:
    """What every method says of the setting; methods that say the same share it."""
    by_text: dict[str, list[str]] = {}
    for name, parameter in uses.items():
        default = "required" if parameter.default is parameter.empty else f"default: {parameter.default}"
        by_text.setdefault(_documented(METHODS[name], setting), []).append(f"{name} ({default})")
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in by_text.items())


def _documented(method: type[Regularizer], setting: str) -> str:
    """What the docstring of the class, or of its ``for_run``, says of a setting, without the last full stop."""
    for text in (method.__doc__, method.for_run.__doc__):
        if match := re.search(rf"^( +){setting}: (.+(?:\n\1 +.+)*)", text or "", re.MULTILINE):
            words = " ".join(match[2].split()).removesuffix(".")
            return words[0].lower() + words[1:]
    return setting.replace("_", " ")


def run(args: argparse.Namespace) -> None:
    """Train, and say what came out."""
    from .. import distributed
    from ..finetune import finetune
    from ..masks import Mask
    from ..scores import FisherScores

    with distributed.started(args.device) as device:
        results = finetune(
            args.model,
            **{name: getattr(args, name) for name in ("task", "data", "validation_data", "objective", "data_dir")},
            **{name: getattr(args, name) for name in STAGES},
            text_columns=args.text_columns,
            label_column=args.label_column,
            method=args.method,
            settings={s: getattr(args, s) for s in args.method_settings if getattr(args, s) is not None},
            scores=FisherScores.load(args.scores) if args.scores else None,
            mask=Mask.load(args.mask) if args.mask else None,
            strict=args.strict,
            seeds=range(args.seeds) if args.seed is None else [args.seed],
            train_size=args.train_size,
            subset_seed=args.subset_seed,
            protocol=args.protocol,
            max_length=args.max_length,
            measure_forgetting=args.measure_forgetting,
            out=args.out,
            resume=args.resume,
            save_model=args.save_model,
            revision=args.revision,
            device=device,
            **{name: getattr(args, name) for name in TRAINING},
        )
        if distributed.is_first():
            print(f"{args.out}: {results}")
