"""Files that are never half-written, that say how they were made, and that are checked when read.

Every file of fisherscope carries a format name, a format version and its provenance as JSON. Nothing is pickled.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import h5py
    from safetensors import safe_open

FORMAT_VERSION = 1

Provenance = Mapping[str, Any]
"""Where a result came from; plain JSON values, file names only, never absolute paths."""

VOLATILE = ("command", "time", "versions")
"""The provenance keys in which two runs with the same result may differ."""


class WrongFile(ValueError):
    """A file is not what it should be: another format, version or shape, or damaged."""


def provenance(**facts: Any) -> dict[str, Any]:
    """The given facts, the versions of the libraries that compute, the command and the time."""
    return {
        **facts,
        "versions": dict(_versions()),
        "command": _command(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


@functools.cache
def _versions() -> Mapping[str, str]:
    """Reading them takes longer than saving a mask."""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {"python": platform.python_version(), "fisherscope": _own_version(), **libraries}


def _command() -> str:
    """The command line without folders, or the name of another program that uses the library."""
    program = Path(sys.argv[0])
    if program.name != "fisherscope" and program.parent.name != "fisherscope":
        return program.name
    return " ".join(["fisherscope", *map(_without_folders, sys.argv[1:])])


def _without_folders(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}{Path(value).name if value.startswith(('/', '~', '.')) else value}"


def _own_version() -> str:
    from . import __version__

    return __version__


def part_path(path: str | Path) -> Path:
    """Where work in progress towards ``path`` is kept."""
    return Path(f"{path}.part")


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an exception.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist and cannot be made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        readable(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Tell in one sentence why a file cannot be written; HDF5 says it in many.

    Raises:
        BlockingIOError: If another process has it open.
        OSError: If the system refuses for another reason, as a full disk.
    """
    try:
        yield
    except BlockingIOError as error:
        raise _in_use(path) from error
    except (OSError, RuntimeError) as error:  # h5py raises either
        number = re.search(r"errno (?:= )?(\d+)", str(error), re.IGNORECASE)
        if number is None:
            raise
        reason = os.strerror(int(number[1]))
        raise OSError(f"{path} cannot be written ({reason}); mend that, and repeat the command.") from error


def _in_use(path: str | Path) -> BlockingIOError:
    return BlockingIOError(f"{path} is in use by another process; wait for it to end, or give another file.")


def readable(path: Path) -> None:
    """Give a file the usual permissions; some writers make files that only their owner can read."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def digest(*values: bytes | str) -> str:
    """SHA-256 of the values one after the other, shortened to 16 hexadecimal digits."""
    total = hashlib.sha256()
    for value in values:
        total.update(value.encode() if isinstance(value, str) else value)
        total.update(b"\0")
    return total.hexdigest()[:16]


def difference(before: Any, now: Any, name: str = "") -> str | None:
    """The first place where two JSON values differ, in words, or None; volatile keys are not compared."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in (*now, *(k for k in before if k not in now)) if key not in VOLATILE]
        found = (difference(before.get(key), now.get(key), f"{name} {key}".strip()) for key in keys)
        return next(filter(None, found), None)
    return None if before == now else f"{name} ({before} there, {now} now)"


def write_header(file: "h5py.File", format_name: str, provenance: Provenance) -> None:
    """Mark an open HDF5 file as one of ours."""
    file.attrs["format"] = format_name
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["provenance"] = json.dumps(dict(provenance), sort_keys=True)


def attributes(item: Any) -> dict[str, Any]:
    """The attributes of an open file or data set as plain values.

    Raises:
        WrongFile: If they cannot be read.
    """
    try:
        return dict(item.attrs)
    except (OSError, RuntimeError) as error:  # h5py raises either for damaged ones
        raise WrongFile(f"{item.file.filename} is damaged and cannot be read; make it again.") from error


@contextlib.contextmanager
def open_hdf5(path: str | Path, format_name: str) -> Iterator["h5py.File"]:
    """Open one of our HDF5 files for reading.

    Raises:
        FileNotFoundError: If there is no such file.
        WrongFile: If it cannot be read as HDF5, or holds another format or version.
        BlockingIOError: If another process writes to it.
    """
    path = Path(path)
    with _open_any_hdf5(path) as file:
        check_header(path, format_name, file.attrs.get("format"), file.attrs.get("format_version"))
        yield file


@contextlib.contextmanager
def _open_any_hdf5(path: Path) -> Iterator["h5py.File"]:
    import h5py

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if not h5py.is_hdf5(path):
        raise WrongFile(f"{path} is no HDF5 file, as scores and landscapes are, {_what_is(path)}.")
    try:
        # what a running process has flushed so far may be read, too
        with h5py.File(path, "r", locking=False if path.suffix == ".part" else None) as file:
            yield file
    except BlockingIOError as error:
        raise _in_use(path) from error
    except OSError as error:
        raise WrongFile(f"{path} is damaged and cannot be read; make it again.") from error


def _what_is(path: Path) -> str:
    """What a file without HDF5 is by its name, and what to do, as half a sentence."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return "but by its name a mask or weights; give the scores or the landscape that was meant"
    if suffix in (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".yaml", ".yml"):
        return f"but by its name {suffix[1:].upper()}; give the scores or the landscape that was meant"
    return "or was cut short; make it again"


def check_header(path: Path, format_name: str, found: object, version: object) -> None:
    """Refuse a file of another format or of another version.

    Raises:
        WrongFile: If either differs.
    """
    if found != format_name:
        says = "says no format" if found is None else f"says {found!r}"
        raise WrongFile(f"{path} should be a {format_name} file, but it {says}; give the file that was meant.")
    if version != FORMAT_VERSION:
        raise WrongFile(
            f"{path} has format version {version}, but this fisherscope reads version {FORMAT_VERSION}; "
            "make it again with this version."
        )


@contextlib.contextmanager
def open_safetensors(path: Path, format_name: str) -> "Iterator[tuple[safe_open, dict[str, Any]]]":
    """Open one of our safetensors files for reading: the file, and what we wrote into its header.

    Raises:
        FileNotFoundError: If there is no such file.
        WrongFile: If it cannot be read as safetensors, in the block too, or holds another format or version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            try:
                header = dict(json.loads((file.metadata() or {}).get("fisherscope", "{}")))
            except (TypeError, ValueError) as error:
                raise WrongFile(f"{path} has a damaged header; make it again.") from error
            check_header(path, format_name, header.get("format"), header.get("format_version"))
            yield file, header
    except SafetensorError as error:
        raise WrongFile(f"{path} is not a safetensors file or was cut short; make it again.") from error


def provenance_of(path: str | Path) -> dict[str, Any]:
    """The provenance of scores or of a landscape, without reading the rest.

    Raises:
        FileNotFoundError: If there is no such file.
        WrongFile: If it is none of ours.
    """
    with _open_any_hdf5(Path(path)) as file:
        try:
            facts = json.loads(attributes(file)["provenance"])
            return {**facts, "model": dict(facts["model"]), "data": dict(facts["data"])}
        except (KeyError, TypeError, ValueError) as error:
            raise WrongFile(f"{path} is not a file of fisherscope; give another --out.") from error


def file_format(path: str | Path) -> str:
    """Which of our formats a file holds: ``"fisherscope.scores"``, ``".mask"``, ``".landscape"`` or ``".results"``.

    Scores and landscapes are told apart by their header, masks and results (a folder, too) by name alone.

    Raises:
        FileNotFoundError: If there is no such file.
        WrongFile: If it is none of ours.
    """
    path = Path(path)
    if path.name.removesuffix(".part").endswith(".safetensors") and path.is_file():
        return "fisherscope.mask"
    if path.name.removesuffix(".part").endswith(".json") or path.is_dir():
        return "fisherscope.results"
    with _open_any_hdf5(path) as file:
        found = str(file.attrs.get("format", ""))
    if not found.startswith("fisherscope."):
        raise WrongFile(f"{path} is not a file of fisherscope: scores and landscapes are HDF5, masks safetensors.")
    return found
