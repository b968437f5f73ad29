"""``fisherscope check``: the table, the verdict, and the exit status."""

from pathlib import Path

import pytest
import torch
from conftest import checkpoint
from tokenizers import pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from fisherscope.cli import main
from fisherscope.fisher import run


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny GPT-2 and texts of unequal length for it, as flags."""
    folder = tmp_path_factory.mktemp("check")
    checkpoint("gpt2", folder / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(0)
    lengths = [3, 9, 5, 12, 4, 7, 8, 2, 6, 11]
    lines = [" ".join(f"w{i}" for i in torch.randint(0, 90, (n,), generator=draw).tolist()) for n in lengths]
    (folder / "text.txt").write_text("\n".join(lines))
    return ["check", "--model", str(folder / "model"), "--data", str(folder / "text.txt"), "--device", "cpu"]


def test_sound_model_on_text(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("GPT2LMHeadModel: causal-lm, 8 examples, float32, tolerance 0.0001\n")
    assert "WRONG" not in shown and "not examined" not in shown
    assert shown.endswith("exact on this model and data; batching and padding change nothing.\n")


def test_built_in_model(capsys: pytest.CaptureFixture[str]):
    words = ["check", "--model", "builtin:bert", "--data", "builtin:docs", "--device", "cpu"]
    assert main([*words, "--num-examples", "3", "--max-length", "48"]) == 0
    assert "BertForMaskedLM: mlm, 3 examples, float32" in capsys.readouterr().out


def test_flags_reach_the_check(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*words, "--num-examples", "3", "--batch-size", "1", "--dtype", "float64"]) == 0
    shown = capsys.readouterr().out
    assert "3 examples, float64, tolerance 1e-09" in shown
    assert "Batching was not examined" in shown
    assert main([*words, "--tolerance", "1e-30"]) == 1
    assert "tolerance 1e-30" in capsys.readouterr().out


def test_wrong_engine_is_named_and_exits_1(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    right, name = run.hooks_engine, "transformer.h.1.mlp.c_fc.weight"

    def doubled(model: nn.Module, *rest: object) -> object:
        engine = right(model, *rest)

        def add(batch: dict, sums: dict) -> int:
            used = engine(batch, sums)
            sums[name].mul_(2)
            return used

        return add

    monkeypatch.setattr(run, "hooks_engine", doubled)
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "Verdict: not to be trusted as it is." in shown.out
    assert f"1. The fast engine differs from the loop for 1 parameter ({name}), by up to 1: " in shown.out


def test_problem_with_the_data_is_one_sentence(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*words[:3], "--data", str(tmp_path / "none.txt")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fisherscope: There is no file or folder") and error.endswith("or builtin:docs.")
