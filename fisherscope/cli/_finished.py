"""Whether a finished file is what a command with ``--resume`` asks for.

Model and data are compared by what every file says of them; flags by what the command that made it left in its
provenance, under :data:`FLAGS`. What a file does not say is not compared.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import distributed, storage

if TYPE_CHECKING:
    from torch import nn

    from ..landscape import Landscape
    from ..objectives import Batch
    from ..scores import FisherScores

    Noun = TypeVar("Noun", FisherScores, Landscape)

FLAGS = "flags"
"""The key of the provenance under which the flags are kept."""

OF_MODEL_AND_DATA = {"model", "revision", "objective", "data", "task", "data_dir", "split"}
OF_MODEL_AND_DATA |= {"num_examples", "max_length", "text_columns", "label_column"}
"""Flags that are compared by what they led to."""

HARMLESS = {"device", "batch_size", "offload", "shard", "strict", "out", "overwrite", "resume", "config", "debug"}
"""Flags that do not change the result."""


def deciding_flags(args: argparse.Namespace, **resolved: Any) -> dict[str, Any]:
    """The flags that decide a result, as plain JSON; some as what they stand for."""
    left_out = OF_MODEL_AND_DATA | HARMLESS | {"run", "refuse"}
    return json.loads(json.dumps({name: v for name, v in vars(args).items() if name not in left_out} | resolved))


def with_flags(noun: "Noun", flags: Mapping[str, Any]) -> "Noun":
    """Scores or a landscape that say by which flags they were made."""
    return replace(noun, provenance={**noun.provenance, FLAGS: dict(flags)})


def check_finished(path: Path, model: "nn.Module", batches: "Iterable[Batch]", flags: Mapping[str, Any]) -> None:
    """Say that a file is complete, if it is the result of these flags on this model and data.

    Raises:
        ValueError: If it is the result of others; names the first that differs.
        WrongFile: If it is no file of ours.
    """
    from ..data import describe_batches
    from ..models import describe

    before = storage.provenance_of(path)
    described = {"model": describe(model), "data": describe_batches(batches)}
    there = _compared(before, before.get(FLAGS, {}))
    now = json.loads(json.dumps(_compared(described, flags)))
    if found := storage.difference(there, {key: now.get(key) for key in there}):
        raise ValueError(
            f"{path} was made with another {found}; give another --out, or --overwrite to replace what is there."
        )
    if distributed.is_first():
        origin = f"{there['model']} on {there['source of data']}, {str(before.get('time'))[:10]}"
        print(f"{path} is complete ({origin}); nothing to resume.")


def _compared(facts: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs with the same result agree on, the most telling first."""
    model, data = facts["model"], facts["data"]
    chosen = {"model": model.get("name"), "source of data": data.get("source"), **flags}
    chosen |= {"setting of the data:": data.get("settings"), "fingerprint of the data": data.get("fingerprint")}
    return chosen | {"fingerprint of the weights": model.get("fingerprint")}


def content(path: str | Path | None) -> str | None:
    """A name, and a fingerprint of what a local file or folder of that name holds; when it was made does not enter."""
    from ..models import shown_name

    if path is None:
        return None
    local = Path(path).expanduser()
    files = [local] if local.is_file() else sorted([*local.glob("*.safetensors"), *local.glob("*.bin")])
    found = storage.digest(*map(_digest, files)) if files and local.exists() else ""
    return f"{shown_name(path)} {found}".strip()


def _digest(path: Path) -> str:
    if path.suffix == ".h5":
        facts = storage.provenance_of(path)
        return storage.digest(json.dumps({k: v for k, v in facts.items() if k not in storage.VOLATILE}, sort_keys=True))
    with path.open("rb") as file:
        if path.suffix == ".safetensors":  # whose header tells the time
            file.seek(int.from_bytes(file.read(8), "little"), 1)
        return hashlib.file_digest(file, "sha256").hexdigest()
