"""The map of the design: imports point one way, start-up imports nothing heavy, and no module names a model family."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fisherscope

PACKAGE = Path(fisherscope.__file__).parent

RANKS = (
    ("storage", "_typing", "_progress", "_machine", "distributed"),
    ("builtin", "models", "data", "objectives", "metrics"),
    ("fisher", "scores", "stability", "masks"),
    ("landscape", "finetune", "comparison"),
    ("experiments",),
    ("plots",),
    ("testing", "cli", "__main__"),
)
RANK = {unit: rank for rank, units in enumerate(RANKS) for unit in units}

FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def unit_of(file: Path) -> str:
    """The module or package directly below fisherscope; '' for fisherscope itself."""
    return file.parts[0].removesuffix(".py") if file != Path("__init__.py") else ""


def parsed(file: Path) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imported_modules(file: Path) -> Iterator[list[str]]:
    """Everything of fisherscope that a file imports anywhere, as path below fisherscope."""
    home = ["fisherscope", *file.parts[:-1]]
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = home[: len(home) + 1 - node.level] if node.level else []
            base = start + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1:] for name in names if name[0] == "fisherscope" and len(name) > 1)


def imports() -> dict[str, set[str]]:
    """Which unit imports which others."""
    found: dict[str, set[str]] = {unit_of(file): set() for file in FILES if unit_of(file)}
    for file in FILES:
        if unit := unit_of(file):
            targets = {name[0] for name in imported_modules(file)}
            found[unit] |= {target for target in targets if target in RANK} - {unit}
    return found


def test_every_module_has_its_place_on_the_map():
    assert sorted({unit_of(file) for file in FILES} - {""} - set(RANK)) == []


def test_the_imports_are_found_at_all():
    found = imports()
    assert {"storage", "scores", "models"} <= found["masks"]
    assert {"models", "objectives", "scores", "_progress"} <= found["fisher"]
    assert sum(map(len, found.values())) > 20


def test_imports_point_one_way_along_the_map():
    wrong = [(unit, other) for unit, others in imports().items() for other in others if RANK[other] > RANK[unit]]
    assert wrong == []


def test_imports_have_no_cycle():
    order = list(graphlib.TopologicalSorter(imports()).static_order())
    assert order.index("storage") < order.index("scores") < order.index("masks") < order.index("landscape")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


HEAVY = ("torch", "transformers", "datasets", "matplotlib", "plotly", "scipy", "h5py", "numpy", "safetensors")


@pytest.mark.parametrize("module", ["fisherscope", "fisherscope.cli"])
def test_start_imports_nothing_heavy(module: str):
    assert run_python(f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])") == "[]\n"


def test_every_public_name_can_be_had():
    assert set(fisherscope.__all__) <= set(dir(fisherscope))
    for name in fisherscope.__all__:
        assert getattr(fisherscope, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fisherman'"):
        fisherscope.fisherman  # noqa: B018


FAMILY = re.compile(r"(?i)(bert|electra|gpt|llama|mistral|qwen|opt-\d)|(?<![a-z0-9])t5(?![0-9])")
ALLOWED = re.compile(r"builtin:[a-z0-9|]+")


def words_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Identifiers, and strings that look like names; prose (a message, a docstring) is free to name models."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(word := getattr(node, field, None), str):
                yield getattr(node, "lineno", 0), word
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.search(r"\s", node.value):
            yield node.lineno, ALLOWED.sub("", node.value)


@pytest.mark.parametrize("file", [file for file in FILES if file != Path("models.py")], ids=str)
def test_only_models_py_names_a_model_family(file: Path):
    assert [(line, word) for line, word in words_of(parsed(file)) if FAMILY.search(word)] == []


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from transformers import BertModel", True),
        ("if name.startswith('bert.'): pass", True),
        ("t5_bias = 1", True),
        ("model.gpt2", True),
        ("'''BERT's masking.'''", False),
        ("raise ValueError('needs a tokenizer like that of T5')", False),
        ("load_model('builtin:bert')", False),
        ("part5 = 1", False),
        ("start5 = 1", False),
    ],
)
def test_a_named_family_is_noticed(code: str, names: bool):
    assert any(FAMILY.search(word) for _, word in words_of(ast.parse(code))) == names
