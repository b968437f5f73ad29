"""Real English text that every machine already has: the documentation inside the Python standard library.

The topics of the language reference (``pydoc_data/topics.py``) and the docstrings of the modules are
read from the running interpreter's own source files, cleaned into prose passages, and split into a
training and a held-out part by module name. Nothing is imported and nothing is copied: files are
parsed with :mod:`ast`. The text differs a little between Python versions, so every artefact records
:func:`fingerprint`.
"""

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Part = Literal["held-out", "train"]

HELD_OUT_PERCENT = 25
WORDS_PER_PASSAGE = 56

# Debian ships these separately, or a supported Python (3.11 to 3.14) lacks them: a corpus that
# contained them would depend on how Python was installed.
_LEFT_OUT = re.compile(
    r"^(_sysconfigdata.*|aifc|asynchat|asyncore|cgi|cgitb|chunk|crypt|ctypes\.macholib|distutils|ensurepip|"
    r"idlelib|imghdr|imp|lib2to3|mailcap|msilib|nntplib|pipes|pydoc_data|site-packages|dist-packages|smtpd|sndhdr|"
    r"sunau|telnetlib|test|tkinter|turtle|turtledemo|uu|xdrlib)(\.|$)|\.tests?(\.|$)|config-"
)


@dataclass(frozen=True)
class Passage:
    """Whole sentences of prose, about 56 words, and the module or reference topic it comes from."""

    text: str
    source: str


def passages(part: Part = "held-out") -> tuple[Passage, ...]:
    """The passages of one part, in order of module name.

    A module belongs to the held-out part when the SHA-256 of its name, modulo 100, is below 25; a
    sentence that occurs several times counts once, for the first module, so that the parts share no text.

    Args:
        part: ``"held-out"`` for what the built-in models never saw, ``"train"`` for the rest.

    Returns:
        At least 512 held-out or 3000 training passages on every supported Python.

    Raises:
        FileNotFoundError: If this Python comes without the sources of its standard library.
        ValueError: If ``part`` is neither name.
    """
    if part not in ("held-out", "train"):
        raise ValueError(f"part must be 'held-out' or 'train', got {part!r}.")
    return tuple(p for p in _all_passages() if is_held_out(p.source) == (part == "held-out"))


def is_held_out(source: str) -> bool:
    """Whether a module (by dotted name) belongs to the held-out part; depends on the name alone."""
    return int(hashlib.sha256(source.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def fingerprint(part: Part = "held-out") -> str:
    """SHA-256 of the text of one part, shortened to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for passage in passages(part):
        digest.update(passage.text.encode() + b"\0")
    return digest.hexdigest()[:16]


@cache
def _all_passages() -> tuple[Passage, ...]:
    library = Path(sysconfig.get_path("stdlib"))
    if not (library / "pydoc.py").is_file():
        raise FileNotFoundError(
            f"builtin:docs reads the documentation inside the Python standard library, but {library.name}/ of this "
            "Python holds no source files. Use a Python with sources, or give a text file with --data."
        )
    seen: set[str] = set()
    found = []
    for source, text in _documents(library):
        fresh = [s for s in dict.fromkeys(_sentences(text)) if s not in seen]
        seen.update(fresh)
        found += [Passage(chunk, source) for chunk in _pack(fresh)]
    return tuple(found)


def _documents(library: Path) -> Iterator[tuple[str, str]]:
    """(source name, raw text) of every topic and every module, sorted by name."""
    texts = {f"topics.{name}": text for name, text in _topics(library / "pydoc_data" / "topics.py")}
    texts |= {name: "\n\n".join(_docstrings(path)) for name, path in _modules(library, "")}
    yield from sorted(texts.items())


def _modules(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    for path in folder.iterdir():
        name = prefix + path.stem
        if _LEFT_OUT.search(name):
            continue
        if path.is_dir():
            yield from _modules(path, name + ".")
        elif path.suffix == ".py":
            yield name.removesuffix(".__init__"), path


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    for table in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
        for key, value in zip(table.keys, table.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                yield str(key.value), str(value.value)


def _docstrings(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a fixture that is meant to be broken
        return
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


_FIELD = re.compile(r":\w+(?:\s+[^:\n]+)?:\s*(?=\S)")
_ROLE = re.compile(r":[\w:]+:`~?([^`<]*?)(?:\s*<[^>`]*>)?`")
_MARKUP = re.compile(r"`|(?<!\w)(\*{1,2}|\|)(?=\w)|(?<=\w)(\*{1,2}|\|)(?!\w)")
_ITEM = re.compile(r"^([-*]|\[\d+\]|\d+[.)])\s+")
_ASCII = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2026": "..."}
)
_SENTENCE_END = re.compile(r"""[.!?:]["')\]]*$""")
_WORD = re.compile(r"[A-Za-z]+")


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of prose: no code, no doctests, no tables, no headings, no markup."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text).expandtabs()):
        lines = block.strip("\n").splitlines()
        if not lines or any(re.match(r"\s*(>>>|\.\.\.|\.\. |[-=~^*+|#]{3,}|\$ )", line) for line in lines):
            continue
        plain = _MARKUP.sub("", _ROLE.sub(r"\1", " ".join(" ".join(lines).split())))
        plain = _ITEM.sub("", _FIELD.sub("", plain.strip())).translate(_ASCII)
        if _is_prose(plain):
            yield plain


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return (
        len(_WORD.findall(text)) >= 8
        and letters >= 0.85 * len(text)
        and text.isascii()
        and text[0].isalpha()
        and _SENTENCE_END.search(text) is not None
    )


def _sentences(text: str) -> Iterator[str]:
    for paragraph in _paragraphs(text):
        yield from re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", paragraph)


def _pack(sentences: list[str]) -> Iterator[str]:
    """Whole sentences of one module joined into passages of about ``WORDS_PER_PASSAGE`` words at most."""
    chunk: list[str] = []
    words = 0
    for sentence in sentences:
        length = len(sentence.split())
        if chunk and words + length > WORDS_PER_PASSAGE:
            yield " ".join(chunk)
            chunk, words = [], 0
        chunk.append(sentence)
        words += length
    if words >= 8:
        yield " ".join(chunk)
