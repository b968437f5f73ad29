"""Every command and every Python block of the README and the docs runs as written."""

import re
import shlex
from pathlib import Path

import pytest

from fisherscope.cli import main
from fisherscope.finetune import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW = {"finetuning.md", "landscapes.md", "questions.md"}
BLOCK = re.compile(r"^```(bash|python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `([a-z][\w-]*)` \|.*\|.*\| (.*) \|$", re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name in SLOW))
        for page in PAGES
        if BLOCK.search(page.read_text())
    ],
)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures").symlink_to(ROOT / "figures")  # runs that are there already
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, page.name, "exec"), {})
        elif language == "yaml":  # a file, whose first line is "# NAME"
            (tmp_path / text.split()[1]).write_text(text, encoding="utf-8")
        else:
            for line in text.strip().splitlines():
                program, *words = shlex.split(line)
                assert program == "fisherscope" and main([*words, "--debug"]) == 0, line


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([\w-]+)", "".join(page.read_text() for page in PAGES), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_gate_runs_the_readme_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def described_methods() -> dict[str, str]:
    """What the table of methods says of the settings of each."""
    text = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    return dict(ROW.findall(text.partition("\n## Methods\n")[2].partition("\n## ")[0]))


def test_the_readme_counts_the_methods() -> None:
    (number,) = re.findall(r"There are (\d+) methods", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert int(number) == len(METHODS)


def test_table_of_methods_has_them_all() -> None:
    assert described_methods().keys() == METHODS.keys()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_table_of_methods_names_settings_and_defaults(method: str) -> None:
    """Every setting, in its order, with the default that it has, and no other."""
    described = re.findall(r"`(\w+)`(?: ([\w.]+))?", described_methods()[method])
    settings = METHODS[method].settings()
    assert [name for name, _ in described] == list(settings)
    for name, default in described:
        expected = settings[name].default
        if expected is settings[name].empty:
            assert default == "", name
        else:
            assert type(expected)(default) == expected, name
