"""``failed.json``: what a sweep leaves in the folder of a training that failed."""

import json
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import storage
from ..models import shown_name

FAILED = "failed.json"

FAILURE = "fisherscope.failure"
"""Format of the file."""


@dataclass(frozen=True)
class Failure:
    """A training without a result.

    Attributes:
        error: What happened, in a sentence.
        config: What it was asked for, with its ``seed`` and the name of its ``arm``; of local files the names alone.
        traceback: Where in the code.
    """

    error: str
    config: Mapping[str, Any]
    traceback: str

    @classmethod
    def of(cls, error: Exception, arguments: Mapping[str, Any], arm: str) -> "Failure":
        """What there is to say of an error; ``arguments`` are those of the training, with one seed."""
        shown = {key: shown_name(value) if isinstance(value, str) else value for key, value in arguments.items()}
        config = {**shown, "seed": arguments["seeds"][0], "arm": arm}
        return cls(_sentence(error), config, _without_folders("".join(traceback.format_exception(error))))

    def save(self, path: Path) -> None:
        """Write JSON, complete or not at all."""
        header = {"format": FAILURE, "format_version": storage.FORMAT_VERSION}
        contents = {"error": self.error, "traceback": self.traceback, "config": self.config}
        with storage.atomic(path) as temporary:
            text = json.dumps({**header, **contents, "provenance": storage.provenance()}, indent=1)
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Failure":
        """Read what :meth:`save` wrote.

        Raises:
            WrongFile: If the file is damaged, or none of ours.
        """
        try:
            contents = dict(json.loads(path.read_text(encoding="utf-8")))
            storage.check_header(path, FAILURE, contents.get("format"), contents.get("format_version"))
            config = dict(contents["config"])
            if missing := {"model", "task", "seed"} - config.keys():
                raise KeyError(*missing)
            return cls(str(contents["error"]), config, str(contents.get("traceback")))
        except storage.WrongFile:
            raise
        except (ValueError, KeyError, TypeError) as problem:
            raise storage.WrongFile(
                f"{path} was cut short, or has damaged contents; remove it, or name the other folders one by one."
            ) from problem


def _sentence(error: Exception) -> str:
    said = " ".join(str(error).split())
    known = isinstance(error, ValueError | TypeError | OSError | MemoryError) and said
    return said if known else f"{type(error).__name__}: {said}"


def _without_folders(text: str) -> str:
    """A traceback that names files as ``finetune/training.py``, wherever they are."""

    def shortened(found: re.Match[str]) -> str:
        return "/".join(Path(found[0]).parts[-2:])

    return re.sub(r'(?<=File ")[^"]+', shortened, text)
