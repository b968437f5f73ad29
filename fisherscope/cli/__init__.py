"""The command line: one thin module per command, each a parser and a call into the library.

Nothing here imports torch before a command runs, so that ``fisherscope --help`` answers at once.
"""

import argparse
import difflib
import importlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__

COMMANDS = {
    "fisher": "Fisher scores of a model on data",
    "mask": "a mask from Fisher scores",
    "landscape": "the loss around a model, on a grid",
    "finetune": "fine-tuning with a regularizer, for several seeds",
    "sweep": "many runs of fine-tuning that one file names",
    "compare": "methods of fine-tuning side by side, with tests over seeds",
    "plot": "figures from scores, masks, landscapes and runs",
    "info": "what a file holds and how it was made",
    "check": "whether the fast engine is exact on a model, and batching and padding are harmless",
    "plan": "the memory that a Fisher run takes, from a model's configuration alone",
    "demo": "all of it on the built-in model, no network",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        quiet = action.default is None or action.default is False
        silent = action.required or quiet or "default:" in (action.help or "")
        return action.help if silent else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        args = _parse(argv)
        _set_up_logging()
        status = args.run(args) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # as in `fisherscope info FILE | head`
        sys.stdout = None
        return 0
    except KeyboardInterrupt:
        resumable = argv[:1] in (["fisher"], ["landscape"], ["finetune"], ["demo"])
        again = "the same command" if argv[:1] == ["sweep"] else "the same command with --resume" if resumable else ""
        hint = f"; {again} goes on from what was saved, if anything was" if again else ""
        print(f"fisherscope: interrupted{hint}.", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        known = isinstance(error, (ValueError, TypeError, OSError, MemoryError))
        hint = "" if known else f" (unexpected {type(error).__name__}; --debug shows where)"
        print(f"fisherscope: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 1
    return status


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="fisherscope", description="Loss landscapes and Fisher information of language models.")
    parser.add_argument("--version", action="version", version=f"fisherscope {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            allow_abbrev=False,
            formatter_class=_Help,
        )
        if argv[:1] == [name]:  # the flags of the others are not needed
            module: Any = importlib.import_module(f".{name}", __name__)
            module.add_flags(command)
            command.set_defaults(run=module.run)
            positional = list(itertools.takewhile(lambda w: not w.startswith("-"), argv[1:]))  # some flags take lists
            argv = [name, *positional, *_config_flags(command, argv), *argv[1 + len(positional) :]]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands.choices[argv[0]]
        command.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(command, unknown)}")
    return args


def _meant(command: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """The flag of a command that is most like the first unknown one, as a question; nothing where none is like it."""
    first = unknown[0].partition("=")[0].replace("_", "-")
    near = difflib.get_close_matches(first, [flag for a in command._actions for flag in a.option_strings], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _config_flags(command: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The settings of ``--config FILE`` as flags, checked against those of the command."""
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    path = before.parse_known_args(list(argv))[0].config
    if path is None:
        return []
    known = {flag: action for action in command._actions for flag in action.option_strings}
    flags: list[str] = []
    for key, value in _read_settings(path).items():
        flag = f"--{str(key).replace('_', '-')}"
        if flag not in known:
            hint = "; the file of a sweep is given without --config" if command.prog.endswith(" sweep") else ""
            command.error(f"{path} sets {key!r}, which is no flag of this command{hint}")
        if value is True:
            flags.append(flag)
        elif value is False:  # most flags without a value are off unless they are given
            flags += [f"--no-{flag[2:]}"] if isinstance(known[flag], argparse.BooleanOptionalAction) else []
        elif value is not None:
            flags += [flag, *map(str, value if isinstance(value, list) else [value])]
    return flags


def _read_settings(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file) or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no config file {path}.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be YAML with one 'flag: value' per line, as in 'num-examples: 512'.")
    return settings


def _set_up_logging() -> None:
    import logging

    logger = logging.getLogger("fisherscope")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fisherscope: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
