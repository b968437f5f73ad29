"""The model that ships with the package, and the script that made it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fisherscope as fs
from fisherscope.objectives import reference_losses

ROOT = Path(__file__).parent.parent
TRAJECTORY = ROOT / "figures" / "data" / "bert_trajectory"


@pytest.fixture(scope="module")
def bert() -> tuple[torch.nn.Module, fs.Batches]:
    model, tokenizer = fs.load_model("builtin:bert", device="cpu")
    batches = fs.load_batches("builtin:docs", tokenizer, objective="mlm", num_examples=64, batch_size=16, seed=0)
    return model, batches


def mean_loss(model: torch.nn.Module, batches: fs.Batches) -> float:
    with torch.no_grad():
        losses = [fs.example_losses(model, batch, "mlm") for batch in batches]
    return float(sum(x.total.sum() for x in losses) / sum(x.count.sum() for x in losses))


def test_is_a_language_model(bert: tuple[torch.nn.Module, fs.Batches]) -> None:
    model, batches = bert
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    references = reference_losses(model, batches, "mlm")
    assert mean_loss(model, batches) < references["unigram"] - 0.5 < references["uniform"]


def test_key_biases_carry_no_information(bert: tuple[torch.nn.Module, fs.Batches]) -> None:
    model, batches = bert
    scores = fs.estimate_fisher(model, batches, progress=False)
    keys = [name for name in scores if name.endswith("key.bias")]
    assert len(keys) == 4
    for name in keys:
        assert scores[name].max() < 1e-9 * scores[name.replace("key", "query")].max(), name


def test_is_small_and_says_where_it_comes_from() -> None:
    folder = ROOT / "fisherscope" / "builtin" / "bert"
    assert (folder / "model.safetensors").stat().st_size < 4_000_000
    card = (folder / "README.md").read_text()
    held_out = json.loads((TRAJECTORY / "held_out.json").read_text())[-1]
    assert f"{held_out['loss']:.3f}" in card and f"{held_out['unigram']:.3f}" in card


def test_trajectory_ends_at_the_model(bert: tuple[torch.nn.Module, fs.Batches]) -> None:
    model, _ = bert
    files = sorted(TRAJECTORY.glob("step_*.safetensors"))
    assert len(files) == len(json.loads((TRAJECTORY / "held_out.json").read_text())) >= 7
    assert sum(file.stat().st_size for file in files) < 25_000_000
    last = load_file(files[-1])
    for name, parameter in model.named_parameters():
        assert torch.equal(last[name].float(), parameter), name


@pytest.mark.slow
def test_pretraining_script_trains_resumes_and_exports(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"The cat number {i} sat on the mat." for i in range(300)))
    script = [sys.executable, str(ROOT / "scripts" / "pretrain_builtin.py")]
    train = [
        *script,
        "train",
        "--text",
        str(tmp_path / "text.txt"),
        "--out",
        str(tmp_path / "run"),
        "--causal-steps",
        "2",
    ]
    size = ["--batch-size", "2", "--vocabulary", "400"]
    for steps in ("4", "6"):  # the second one goes on after the first
        subprocess.run([*train, *size, "--steps", steps], check=True, cwd=ROOT, capture_output=True)
    out = ["--out", str(tmp_path / "model"), "--trajectory", str(tmp_path / "trajectory")]
    subprocess.run([*script, "export", "--run", str(tmp_path / "run"), *out], check=True, cwd=ROOT, capture_output=True)
    _, tokenizer = fs.load_model(tmp_path / "model", device="cpu")
    assert len(tokenizer) == 400 and "held out" in (tmp_path / "model" / "README.md").read_text()
    assert [row["step"] for row in json.loads((tmp_path / "trajectory" / "held_out.json").read_text())] == [0, 2, 4, 6]
