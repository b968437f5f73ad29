"""The command line: every command on a tiny model, messages, and runs that are killed and resumed."""

import argparse
import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import fisherscope as fs
from fisherscope import cli, masks, plots
from fisherscope.cli import COMMANDS, main
from fisherscope.cli.info import describe_scores, describe_stability
from fisherscope.cli.landscape import DIRECTIONS
from fisherscope.cli.landscape import _names as names_of
from fisherscope.cli.plot import KINDS
from fisherscope.comparison import compare
from fisherscope.experiments.statistics import Correction
from fisherscope.finetune.recipe import Precision
from fisherscope.finetune.results import Which
from fisherscope.fisher.run import EngineName
from fisherscope.landscape import directions, measures
from fisherscope.stability import Quarters

WORDS = [f"word{i}" for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokenizer, and some text and labels."""
    folder = tmp_path_factory.mktemp("cli")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=32,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **shape)
    BertForMaskedLM(config).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(WORDS, size=generator.integers(4, 20))) for _ in range(40)]
    (folder / "text.txt").write_text("\n".join(lines))
    rows = [f"{line}\t{lines[i - 1]}\t{'yes' if i % 3 else 'no'}" for i, line in enumerate(lines)]
    (folder / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]))
    return folder


@pytest.fixture
def flags(folder: Path) -> list[str]:
    return [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "text.txt"),
        "--batch-size",
        "4",
        "--device",
        "cpu",
    ]


def run(*words: object) -> int:
    return main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert run(*words) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("fisherscope: ") and "Traceback" not in error
    return error.splitlines()[-1]


def test_main_job_by_commands(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, mask = tmp_path / "scores.h5", tmp_path / "top.safetensors"
    assert run("fisher", *flags, "--out", scores) == 0
    assert run("mask", scores, "--fraction", "0.5", "--out", mask) == 0
    assert run("landscape", *flags, "--mask", mask, "--points", "5", "3", "--out", tmp_path / "surface.h5") == 0
    assert run("landscape", *flags, "--axes", "1", "--points", "5", "--out", tmp_path / "curve.h5") == 0
    landscape = fs.Landscape.load(tmp_path / "surface.h5")
    assert landscape.loss.shape == (5, 3) and landscape.evaluated.all()
    assert landscape.centre_loss == pytest.approx(fs.Landscape.load(tmp_path / "curve.h5").centre_loss, abs=1e-12)
    for file, figure in (("surface.h5", "surface.pdf"), ("curve.h5", "curve.png"), ("scores.h5", "scores.html")):
        assert run("plot", tmp_path / file, "--out", tmp_path / figure) == 0
        assert (tmp_path / figure).stat().st_size > 1000
    for file, said in ((scores, "FisherScores"), (mask, "entries selected"), (tmp_path / "surface.h5", "entries move")):
        capsys.readouterr()
        assert run("info", file) == 0
        assert said in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*"))


def test_classification_on_a_pair_task(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.h5"
    words = ["--model", folder / "model", "--data", folder / "pairs.tsv", "--objective", "classification"]
    assert run("fisher", *words, "--device", "cpu", "--out", out) == 0
    drawn, warned = (line for line in capsys.readouterr().err.splitlines() if "drawn at random" in line)
    assert drawn.endswith("such are drawn at random from seed 0.")
    assert "gradients through what was drawn at random" in warned and "fine-tune the model first" in warned
    scores = fs.FisherScores.load(out)
    assert scores.num_examples == 40
    assert scores["classifier.weight"].shape == (2, 16)
    assert set(scores.new_parameters) >= {"classifier.weight", "classifier.bias"}
    assert str(folder) not in json.dumps(dict(scores.provenance))


def test_random_and_bottom_masks(flags: list[str], tmp_path: Path) -> None:
    scores = tmp_path / "scores.h5"
    run("fisher", *flags, "--num-examples", "4", "--out", scores)
    for select in ("top", "bottom", "random"):
        out = tmp_path / f"{select}.safetensors"
        assert run("mask", scores, "--fraction", "0.3", "--select", select, "--within", "parameter", "--out", out) == 0
        mask = fs.Mask.load(out)
        for name, tensor in mask.items():
            size = tensor.numel()
            kept = size - round(0.7 * size) if select == "bottom" else round(0.3 * size)
            assert int(tensor.sum()) == kept, name


def test_existing_output_is_never_replaced_silently(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.h5"
    words = ["fisher", *flags, "--num-examples", "4", "--out", out]
    assert run(*words) == 0
    before = out.read_bytes()
    assert refused(capsys, *words).endswith("give --overwrite to replace it, or another --out.")
    capsys.readouterr()
    assert run(*words, "--resume") == 0
    assert "is complete (model on text.txt, 20" in capsys.readouterr().out
    assert out.read_bytes() == before
    assert run(*words, "--overwrite", "--seed", "1") == 0
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("command", "given", "harmless", "others"),
    [
        (
            "fisher",
            ["--estimator", "sampled"],
            ["--batch-size", "2", "--offload", "--engine", "hooks"],
            {
                "estimator (sampled there, empirical now)": ["--estimator", "empirical"],
                "draws (1 there, 2 now)": ["--draws", "2"],
                "seed (0 there, 1 now)": ["--seed", "1"],
                "setting of the data: num_examples (4 there, 5 now)": ["--num-examples", "5"],
                "halves (False there, True now)": ["--halves"],
                "source of data (text.txt there, builtin:docs now)": ["--data", "builtin:docs"],
                "model (model there, builtin:bert now)": ["--model", "builtin:bert"],
            },
        ),
        (
            "landscape",
            ["--points", "3", "--axes", "1"],
            ["--batch-size", "2", "--range", "-1", "1"],
            {
                "points ([3] there, [5] now)": ["--points", "5"],
                "measures (False there, True now)": ["--measures"],
                "normalize (filter there, row now)": ["--normalize", "row"],
                "span ([[-1.0, 1.0]] there, [[-0.5, 0.5]] now)": ["--span", "0.5"],
                "model (model there, builtin:bert now)": ["--model", "builtin:bert"],
            },
        ),
    ],
)
def test_finished_file_of_another_command_is_not_taken_for_the_result(
    command: str,
    given: list[str],
    harmless: list[str],
    others: dict[str, list[str]],
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "result.h5"
    words = [command, *flags, "--num-examples", "4", *given, "--out", out]
    assert run(*words) == 0
    before = out.read_bytes()
    assert run(*words, *harmless, "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().out
    for found, other in others.items():
        message = refused(capsys, *words, *other, "--resume")
        assert f"was made with another {found}; give another --out, or --overwrite" in message
    assert out.read_bytes() == before
    with h5py.File(out, "r+") as file:  # as earlier versions made it
        facts = json.loads(file.attrs["provenance"])
        del facts["flags"]
        file.attrs["provenance"] = json.dumps(facts)
    assert run(*words, "--seed", "0", *next(iter(others.values())), "--resume") == 0


def test_masks_and_models_of_the_same_name_are_told_apart(
    folder: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores, mask, out = tmp_path / "scores.h5", tmp_path / "mask.safetensors", tmp_path / "curve.h5"
    run("fisher", *flags, "--num-examples", "4", "--out", scores)
    choose = ["mask", scores, "--out", mask, "--overwrite", "--fraction"]
    run(*choose, "0.5")
    words = ["landscape", *flags, "--num-examples", "4", "--axes", "1", "--points", "3", "--out", out]
    assert run(*words, "--mask", mask, "--scores", scores) == 0
    run(*choose, "0.5")
    assert run(*words, "--mask", mask, "--scores", scores, "--resume") == 0  # made again, the same
    run(*choose, "0.4")
    assert "another mask (" in refused(capsys, *words, "--mask", mask, "--scores", scores, "--resume")
    other = tmp_path / "other" / "model"
    shutil.copytree(folder / "model", other)
    model = BertForMaskedLM.from_pretrained(other)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(other)
    between = [*words[:-1], tmp_path / "between.h5", "--directions", "between", "--models"]
    assert run(*between, other) == 0
    copy = shutil.copytree(other, tmp_path / "copy" / "model")
    assert run(*between, copy, "--resume") == 0
    shutil.rmtree(copy)
    shutil.copytree(folder / "model", copy)
    assert "another models (" in refused(capsys, *between, copy, "--resume")
    found = refused(capsys, *words, "--mask", mask, "--scores", scores, "--model", other, "--resume")
    assert "another mask" in found  # the names of the models are the same, the first difference is the mask's


def test_config_file_gives_flags_and_the_command_line_wins(flags: list[str], tmp_path: Path) -> None:
    settings = {"points": [5, 3], "span": 0.5, "num_examples": 4, "out": str(tmp_path / "a.h5")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert run("landscape", "--config", tmp_path / "config.yaml", *flags, "--span", "0.25") == 0
    axes = fs.Landscape.load(tmp_path / "a.h5").axes
    assert [len(axis.steps) for axis in axes] == [5, 3] and axes[0].steps[-1] == 0.25


def test_two_files_are_compared(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.h5", tmp_path / "b.h5"]
    masks = [path.with_suffix(".safetensors") for path in files]
    for seed, (path, mask) in enumerate(zip(files, masks, strict=True)):
        assert run("fisher", *flags, "--seed", seed, "--out", path) == 0
        assert run("mask", path, "--fraction", "0.2", "--out", mask) == 0
    capsys.readouterr()
    assert run("info", *files, "--fraction", "0.2", "--out", tmp_path / "table.csv") == 0
    said = capsys.readouterr().out
    assert "a.h5: FisherScores(" in said and "overlap of the top 20 %" in said
    result = compare(*map(fs.FisherScores.load, files), 0.2)
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["all", *(row.name for row in result.groups)]
    assert float(rows[0]["overlap"]) == result.overall.overlap
    assert float(rows[-1]["rank_correlation"]) == result.groups[-1].rank_correlation
    (line,) = [line for line in said.splitlines() if line.startswith("all ")]
    assert line.split()[2] == f"{result.overall.overlap:.3f}"
    assert run("info", *masks, "--by", "parameter") == 0
    said = capsys.readouterr().out
    assert "jaccard" in said and "rank correlation" not in said
    for given, out in ((files, "scores.png"), (masks, "masks.html")):
        assert run("plot", *given, "--out", tmp_path / out) == 0
        assert (tmp_path / out).stat().st_size > 1000
    assert "got one of each" in refused(capsys, "info", files[0], masks[0])
    assert "info takes one file, two to compare, or several landscapes; got 3" in refused(
        capsys, "info", *files, masks[0]
    )
    assert "holds neither" not in refused(capsys, "info", files[0], "--out", tmp_path / "table.csv")


@pytest.mark.parametrize(
    ("scores", "new", "said"),
    [([0.0, 0.0], [], "; every score is 0"), ([1.0, 2.0], ["w"], "; every scored parameter was drawn at random")],
)
def test_scores_without_any_to_rank_are_described(scores: list[float], new: list[str], said: str) -> None:
    facts = {"model": {"new_parameters": new}}
    made = fs.FisherScores({"w": torch.tensor(scores)}, num_examples=1, provenance=facts)
    assert describe_scores(made) == repr(made) + said


def test_info_tables(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, table = tmp_path / "scores.h5", tmp_path / "table.csv"
    assert run("fisher", *flags, "--fraction", "0.25", "--out", path) == 0
    scores = fs.FisherScores.load(path)
    capsys.readouterr()
    assert run("info", path, "--by", "parameter", "--out", table) == 0
    lines = capsys.readouterr().out.splitlines()
    flat = torch.cat([score.flatten() for score in scores.values()])
    assert lines[0] == (
        f"{scores}; {100 * scores.share_holding(0.5):.3g} % of the entries hold half of the summed scores, "
        f"{100 * float((flat == 0).double().mean()):.3g} % have score 0"  # of positions that no text reaches
    )
    assert f"25 %: {scores.stability(0.25):.3f}" in lines[1]
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["parameter"] for row in rows] == list(scores)
    for row in rows:
        score = scores[row["parameter"]].double()
        assert int(row["entries"]) == score.numel() and float(row["max"]) == float(score.max())
        assert float(row["sum"]) == pytest.approx(float(score.sum())) and float(row["mean"]) == float(score.mean())
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1.0)
    header = next(k for k, line in enumerate(lines) if line.startswith("parameter "))
    assert len({len(line) for line in lines[header : header + 1 + len(rows)]}) == 1  # aligned
    assert any(line.startswith("objective") and line.endswith("mlm") for line in lines)
    assert not any(mark in "\n".join(lines) for mark in "{}[]")  # no raw JSON
    before = table.read_bytes()
    assert "--overwrite" in refused(capsys, "info", path, "--out", table)
    assert table.read_bytes() == before
    assert "ends in .csv" in refused(capsys, "info", path, "--out", tmp_path / "table.txt")


def test_too_few_batches_for_the_stability_are_told(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, line = tmp_path / "scores.h5", "no expected overlap of a mask of the top entries with that of a fresh draw: "
    why = "it needs at least 4 batches with scored examples; give more examples or a smaller --batch-size"
    assert run("fisher", *flags, "--num-examples", "12", "--out", path) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == line + why and "drawn at random" not in said.err
    assert run("info", path) == 0
    assert capsys.readouterr().out.splitlines()[1] == line + why
    with h5py.File(path, "r+") as file:
        del file["stability"]
    assert run("info", path) == 0
    assert capsys.readouterr().out.splitlines()[1] == line + "these scores keep no parts of the examples apart"
    assert run("fisher", *flags, "--num-examples", "13", "--out", path, "--overwrite") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(line.removeprefix("no "))


def test_an_overlap_of_ties_is_told_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = torch.rand(4, 100, generator=generator) * (torch.arange(100) < torch.tensor([[40], [60], [60], [60]]))
    scores = fs.FisherScores({"a": sums.sum(0)}, 8, quarters=Quarters(sums, (2, 2, 2, 2), (0.1, 0.5)))
    (line,) = describe_stability(scores, 0.4)
    shown = ", ".join(f"{f} %: {scores.stability(f / 100):.3f}" for f in (10, 40, 50))
    assert line.split(": ", 1)[1] == (
        f"{shown} (ties); (ties): fewer entries than that have a score above 0 in a quarter of the examples, so that "
        "this is the overlap of ties broken by position"
    )


def test_stability_of_a_run_is_drawn(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fisher", *flags, "--out", tmp_path / "scores.h5") == 0
    assert fs.FisherScores.load(tmp_path / "scores.h5").first_half is None
    for out in ("stability.pdf", "stability.html"):
        assert run("plot", tmp_path / "scores.h5", "--kind", "stability", "--out", tmp_path / out) == 0
    words = ["plot", tmp_path / "scores.h5", "--kind", "comparison", "--out", tmp_path / "c.pdf"]
    assert "A comparison takes two files, got 1" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fisher", "--model", "x"], "the following arguments are required: --out"),
        (["fisher", "--model", "x", "--out", "x.h5"], "one of the arguments --data --task is required"),
        (["landscape", "--points", "three"], "argument --points: invalid int value: 'three'"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (
            ["mask", "s.h5", "--published", "sharma2024", "--within", "layer", "--out", "m"],
            "argument --within: not with --published, which says what is selected",
        ),
        (
            ["mask", "s.h5", "--published", "sharma2024", "--select", "random", "--out", "m"],
            "argument --select: the published masks are the top and the bottom half",
        ),
        (
            ["landscape", "--model", "m", "--data", "d", "--rank", "4", "--out", "s.h5"],
            "argument --rank: only with --directions low-rank",
        ),
        (
            [
                "landscape",
                "--model",
                "m",
                "--data",
                "d",
                "--directions",
                "hessian",
                "--normalize",
                "row",
                "--out",
                "s.h5",
            ],
            "argument --normalize: only with --directions random",
        ),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(words)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and said in error and error.count("\n") == 1


def test_models_of_one_file_name_keep_their_folders() -> None:
    assert names_of(["a/model.safetensors", "b/other"]) == ("model", "other")
    assert names_of(["a/model", "b/model"]) == ("a/model", "b/model")


def test_errors_are_one_sentence(
    flags: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path / "out.h5"]
    assert "points must be odd" in refused(capsys, "landscape", *flags, "--points", "4", *out)
    no_model = ["landscape", "--model", tmp_path / "none", "--data", "builtin:docs"]
    assert "span must be a positive number" in refused(capsys, *no_model, "--span", "0", *out)  # before it is loaded
    assert "There is no file" in refused(capsys, "info", tmp_path / "none.h5")
    assert "no built-in model 'builtin:none'" in refused(
        capsys, "fisher", "--model", "builtin:none", "--data", "builtin:docs", *out
    )
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"good \xff bad")
    words = ["fisher", *flags[:2], "--data", broken, *out]
    assert "broken.txt" in refused(capsys, *words) and "5" in refused(capsys, *words)
    (tmp_path / "cut.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert "cut.h5" in refused(capsys, "plot", tmp_path / "cut.h5", "--out", tmp_path / "a.pdf")
    assert not list(tmp_path.glob("out.h5*")) and not list(tmp_path.glob("a.pdf*"))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["info", str(tmp_path / "none.h5"), "--debug"])


def test_mask_of_another_model_is_refused(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fs.Mask({"bert.embeddings.word_embeddings.weight": torch.ones(3, 2, dtype=torch.bool)}).save(
        tmp_path / "m.safetensors"
    )
    message = refused(capsys, "landscape", *flags, "--mask", tmp_path / "m.safetensors", "--out", tmp_path / "s.h5")
    assert "'embeddings.word_embeddings.weight' has shape (3, 2) there but (65, 16) in the model" in message


def test_mask_of_other_weights_warns_and_strict_refuses(
    flags: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = fs.load_model(folder / "model", device="cpu")
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    fs.random_fraction(model, 0.5, seed=0).save(tmp_path / "m.safetensors")
    words = ["landscape", *flags, "--mask", tmp_path / "m.safetensors", "--points", "3", "--out", tmp_path / "s.h5"]
    assert "other weights" in refused(capsys, *words, "--strict")
    assert run(*words) == 0
    assert "other weights" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from fisherscope.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            code + "print(sorted({'torch', 'transformers', 'h5py', 'matplotlib'} & set(sys.modules)))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "[]"
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0 and "--debug" in capsys.readouterr().out


CHOICES = [
    ("fisher", "estimator", fs.scores.Estimator),
    ("fisher", "unit", fs.scores.Unit),
    ("fisher", "reduction", fs.scores.Reduction),
    ("fisher", "engine", EngineName),
    ("mask", "granularity", masks.Granularity),
    ("mask", "within", masks.Within),
    ("landscape", "normalize", directions.Normalize),
    ("landscape", "one_dimensional", directions.OneDimensional),
    ("landscape", "match", directions.Match),
    ("finetune", "precision", Precision),
    ("compare", "which", Which),
    ("compare", "correction", Correction),
    ("plot", "which", Which),
    ("plot", "by", plots._prepare.By),
    ("info", "by", fs.scores.By),
]


@pytest.mark.parametrize(
    ("command", "flag", "kind"), CHOICES, ids=[f"{command}-{flag}" for command, flag, _ in CHOICES]
)
def test_choices_of_flags_are_those_of_the_library(command: str, flag: str, kind: Any) -> None:
    """They are written out for the command line, which imports nothing heavy to show its help."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"fisherscope.cli.{command}").add_flags(parser)
    (found,) = [action.choices for action in parser._actions if action.dest == flag]
    assert found is not None and tuple(found) == get_args(kind)


def test_directions_without_a_function_are_not_random_ones(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name alone, as somebody begins with who writes new ones."""
    monkeypatch.setitem(DIRECTIONS, "new", 0)
    assert run("landscape", *flags, "--directions", "new", "--axes", "1", "--out", tmp_path / "s.h5") == 1
    assert "No function makes the directions 'new'" in capsys.readouterr().err


def test_every_figure_has_a_kind() -> None:
    by_command = {name for kinds in KINDS.values() for name in kinds.values()}
    assert by_command | {"dropout_sites"} == set(plots.__all__)  # whose sites are in no file


SLOWED = """
import sys, time
import fisherscope.fisher.run as run
from fisherscope.landscape.evaluate import Evaluator
from fisherscope.cli import main
run.SECONDS_BETWEEN_CHECKPOINTS = 0.0
def slowed(work):
    def slow(*args):
        time.sleep(0.02)
        return work(*args)
    return slow
run.State.add = slowed(run.State.add)
Evaluator._measure = slowed(Evaluator._measure)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("fisher", []),
        pytest.param("fisher", ["--until-stable", "0.5", "--fraction", "0.3"], marks=pytest.mark.slow),
        pytest.param("landscape", ["--points", "7"], marks=pytest.mark.slow),
    ],
)
def test_killed_command_resumes_to_the_same_file(
    command: str, settings: list[str], flags: list[str], tmp_path: Path
) -> None:
    words = [command, *flags, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out, whole = tmp_path / "killed.h5", tmp_path / "whole.h5"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWED, *words, "--out", str(out)], env=environment, stderr=subprocess.PIPE
    )
    done = _wait_for_progress(command, Path(f"{out}.part"), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists() and done > 0
    assert run("info", f"{out}.part") == 0
    for target, extra in ((out, ["--resume"]), (whole, [])):
        subprocess.run(
            [sys.executable, "-m", "fisherscope", *words, *extra, "--out", str(target)],
            env=environment, check=True, capture_output=True,
        )  # fmt: skip
    assert _contents(out) == _contents(whole)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("command", "settings", "interrupted_at"),
    [
        ("fisher", [], "fisherscope.scores.FisherScores.save"),
        pytest.param(
            "landscape",
            ["--axes", "1", "--points", "3", "--measures"],
            "fisherscope.landscape.measures.measure_model",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_replacement_that_was_interrupted_is_gone_on_with(
    command: str,
    settings: list[str],
    interrupted_at: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, part = tmp_path / "result.h5", tmp_path / "result.h5.part"
    words = [command, *flags, "--num-examples", "4", *settings, "--out", out]
    assert run(*words) == 0

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(interrupted_at, interrupted)
        assert run(*words, "--seed", "1", "--overwrite") == 130
    assert "goes on from what was saved, if anything was." in capsys.readouterr().err
    begun = part.read_bytes()
    assert "begun with another" in refused(capsys, *words, "--resume")
    assert run(*words, "--seed", "1", "--resume") == 0
    assert not part.exists()
    replaced = _contents(out)
    part.write_bytes(begun)  # as if it had been killed before the part was deleted
    assert run(*words, "--seed", "1", "--resume") == 0
    assert not part.exists() and _contents(out) == replaced
    assert run(*words, "--seed", "2", "--overwrite") == 0
    assert run(*words, "--seed", "2", "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().out


def test_measures_that_were_interrupted_are_made_up_for(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "curve.h5"
    words = ["landscape", *flags, "--num-examples", "4", "--axes", "1", "--points", "3", "--measures", "--out", out]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measures, "measure_model", interrupted)
    assert run(*words) == 130
    assert not out.exists()
    monkeypatch.setattr(measures, "measure_model", lambda *_, **__: {"trace": 1.0})
    assert run(*words, "--resume") == 0
    assert {"trace", "basin"} <= fs.Landscape.load(out).measures.keys()
    assert not list(tmp_path.glob("*.part"))


def _wait_for_progress(command: str, part: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait until some of the work, but not all, is in the part file; returns how much."""
    for _ in range(600):
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.05)
        try:
            with h5py.File(part, "r", locking=False) as file:
                done = int(file.attrs["progress"][0]) if command == "fisher" else int(np.sum(file["evaluated"]))
        except (OSError, KeyError):  # not there yet, or being written
            continue
        if done >= 2:
            return done
    raise AssertionError(f"no progress in {part}")


def _contents(path: Path) -> dict[str, object]:
    """Every data set and attribute, but for the provenance's command and time."""
    found: dict[str, object] = {}

    def visit(name: str, item: h5py.Dataset | h5py.Group | h5py.File) -> None:
        for key, value in item.attrs.items():
            if key == "provenance":
                facts = json.loads(value)
                found[f"{name}@{key}"] = {k: v for k, v in facts.items() if k not in ("command", "time")}
            elif key not in ("REFERENCE_LIST", "DIMENSION_LIST"):  # addresses inside the file
                found[f"{name}@{key}"] = np.asarray(value).tolist()
        if isinstance(item, h5py.Dataset):
            found[name] = np.asarray(item).tobytes()

    with h5py.File(path, "r") as file:
        visit("", file)
        file.visititems(visit)
    return found


def test_classes_are_numbered_as_the_checkpoint_numbers_them(folder: Path, tmp_path: Path) -> None:
    """The data's classes sort as no, yes; the head's are yes, no."""
    from transformers import BertForSequenceClassification

    config = BertConfig.from_pretrained(folder / "model", num_labels=2, id2label={0: "YES", 1: "NO"})
    torch.manual_seed(1)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / file).write_bytes((folder / "model" / file).read_bytes())
    rows = (folder / "pairs.tsv").read_text().splitlines()
    numbered = [rows[0], *(r.replace("\tyes", "\t0").replace("\tno", "\t1") for r in rows[1:])]
    (tmp_path / "numbered.tsv").write_text("\n".join(numbered))
    scores = []
    for data, out in ((folder / "pairs.tsv", "named.h5"), (tmp_path / "numbered.tsv", "numbered.h5")):
        assert (
            run("fisher", "--model", tmp_path / "model", "--data", data, "--device", "cpu", "--out", tmp_path / out)
            == 0
        )
        scores.append(fs.FisherScores.load(tmp_path / out))
    for name in scores[0]:
        assert torch.equal(scores[0][name], scores[1][name]), name


def test_classes_that_the_checkpoint_does_not_know_are_refused() -> None:
    from fisherscope.data.sources import with_class_order

    source = fs.Source("data.tsv", [("a",), ("b",)], [0, 1], ("maybe", "no"), "0")
    with pytest.raises(
        ValueError, match=r"^data\.tsv has the classes maybe, no, but the model's head has yes, no: 'maybe'"
    ):
        with_class_order(source, ("yes", "no"))
    assert with_class_order(source, ("LABEL_0", "LABEL_1")) is source
    assert with_class_order(source, ("no", "maybe")).labels == [1, 0]
    many = fs.Source("data.tsv", [("a",)] * 30, list(range(30)), tuple(f"class {n}" for n in range(30)), "0")
    with pytest.raises(ValueError, match=r"has the classes class 0, .*, class 9 and 20 more, but .* has yes, no: "):
        with_class_order(many, ("yes", "no"))


@pytest.mark.parametrize(
    ("words", "kind", "endings"),
    [
        (["fisher", "--model", "m", "--data", "d"], "scores", ".h5 or .hdf5"),
        (["landscape", "--model", "m", "--data", "d"], "a landscape", ".h5 or .hdf5"),
        (["mask", "scores.h5", "--fraction", "0.1"], "a mask", ".safetensors"),
    ],
)
def test_names_by_which_a_result_could_not_be_read_are_refused(
    words: list[str], kind: str, endings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    said = f"fisherscope: The name of {kind} ends in {endings}, got 'result.json'; rename the output."
    assert refused(capsys, *words, "--out", out) == said
    folder = tmp_path / f"folder{endings.split()[0]}"
    folder.mkdir()
    for more in ([], ["--overwrite"]):
        said = f"fisherscope: --out must be a file, but {folder} is a folder; name a file in it."
        assert refused(capsys, *words, "--out", folder, *more) == said


def test_unfinished_work_is_not_deleted_silently(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, part = tmp_path / "scores.h5", tmp_path / "scores.h5.part"
    part.write_bytes(b"hours of work")
    message = refused(capsys, "fisher", *flags, "--out", out)
    assert message.endswith("holds unfinished work; give --resume to go on, or --overwrite to start afresh.")
    assert part.read_bytes() == b"hours of work"
    assert run("fisher", *flags, "--out", out, "--overwrite") == 0


def test_config_problems_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    assert "There is no config file" in refused(capsys, "mask", "scores.h5", f"--config={config}")
    config.write_text("fraction: 0.5\nfoo: 1\n")
    with pytest.raises(SystemExit):
        main(["mask", "scores.h5", "--config", str(config)])
    assert "config.yaml sets 'foo', which is no flag of this command" in capsys.readouterr().err
    config.write_text("a: [1")
    assert "must be YAML" in refused(capsys, "mask", "scores.h5", "--config", config)


FINETUNE = ["finetune", "--model", "builtin:bert", "--out", "run"]


def parsed(*words: object) -> Any:
    return cli._parse([*FINETUNE, *map(str, words)])


def test_a_config_file_may_say_zero(tmp_path: Path) -> None:
    """0 == False, but weight-decay: 0 is no switch."""
    (tmp_path / "c.yaml").write_text("task: cola\nweight-decay: 0\nwarmup: 0.0\nsubset-seed: 0\nstrict: false\n")
    args = parsed("--config", tmp_path / "c.yaml")
    assert (args.weight_decay, args.warmup, args.strict) == (0.0, 0.0, False)


def test_settings_that_are_on_or_off_are_switches(tmp_path: Path) -> None:
    assert parsed("--task", "cola").fisher is None
    assert parsed("--task", "cola", "--fisher", "--no-pooler").fisher is True
    assert parsed("--task", "cola", "--fisher", "--no-pooler").pooler is False
    (tmp_path / "c.yaml").write_text("task: cola\npooler: false\nfisher: true\nkeep-dropout: false\n")
    args = parsed("--config", tmp_path / "c.yaml")
    assert (args.pooler, args.fisher, args.keep_dropout) == (False, True, False)


def test_a_switch_of_a_method_takes_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    """--fisher false was once taken for on."""
    with pytest.raises(SystemExit):
        parsed("--task", "cola", "--fisher", "false")
    assert "unrecognized arguments: false" in capsys.readouterr().err


def test_tasks_are_names_with_commas_between_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--tasks", "cola, rte").tasks == ["cola", "rte"]
    with pytest.raises(SystemExit):
        parsed("--tasks", "cola,")
    assert "must be names with commas between them, as in a,b; got 'cola,'" in capsys.readouterr().err


def test_one_task_has_no_sampling_exponent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tasks", "builtin:topic", "--sampling-exponent", "0.5", "--out", tmp_path / "run"]
    assert "several tasks, but there is one" in refused(capsys, "finetune", "--model", "builtin:bert", *words)


def test_config_lists_do_not_swallow_the_file(flags: list[str], tmp_path: Path) -> None:
    run("fisher", *flags, "--num-examples", "4", "--out", tmp_path / "scores.h5")
    (tmp_path / "m.yaml").write_text("exclude: ['*bias']\nfraction: 0.5\n")
    words = ["mask", tmp_path / "scores.h5", f"--config={tmp_path / 'm.yaml'}", "--out", tmp_path / "m.safetensors"]
    assert run(*words) == 0
    assert not any(
        bool(t.any()) for name, t in fs.Mask.load(tmp_path / "m.safetensors").items() if name.endswith("bias")
    )


def test_config_goes_with_several_files(flags: list[str], tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        run("landscape", *flags, "--num-examples", "4", "--axes", "1", "--points", "3", "--out", tmp_path / name)
    (tmp_path / "plot.yaml").write_text("titles: [one, two]\n")
    files = [tmp_path / "a.h5", tmp_path / "b.h5"]
    assert run("plot", *files, "--config", tmp_path / "plot.yaml", "--out", tmp_path / "curves.png") == 0


def test_files_can_be_read_by_others(flags: list[str], tmp_path: Path) -> None:
    run("fisher", *flags, "--num-examples", "4", "--out", tmp_path / "scores.h5")
    run("mask", tmp_path / "scores.h5", "--fraction", "0.5", "--out", tmp_path / "m.safetensors")
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert {(tmp_path / name).stat().st_mode for name in ("scores.h5", "m.safetensors")} == {expected}
