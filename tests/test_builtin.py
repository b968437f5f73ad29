"""The models that ship with the package, and the scripts that made them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import fisherscope as fs
from fisherscope.objectives import reference_losses

ROOT = Path(__file__).parent.parent
DATA = ROOT / "figures" / "data"
TRAJECTORY = DATA / "bert_trajectory"
RECORDS = {"bert": TRAJECTORY, "gpt2": DATA / "gpt2_pretraining", "t5": DATA / "t5_pretraining"}
OBJECTIVES = {"bert": "mlm", "gpt2": "causal-lm", "t5": "seq2seq-lm"}
CLASSES = {"bert": AutoModelForMaskedLM, "gpt2": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}

each_model = pytest.mark.parametrize("name", RECORDS)


def loaded(name: str, num_examples: int | None = 64) -> tuple[torch.nn.Module, fs.Batches]:
    model, tokenizer = fs.load_model(f"builtin:{name}", device="cpu")
    batches = fs.load_batches(
        "builtin:docs", tokenizer, objective=OBJECTIVES[name], num_examples=num_examples, batch_size=16, seed=0
    )
    return model, batches


def without_sentinels(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Only words are scored; the decoder reads all as before."""
    tokenizer = fs.load_model("builtin:t5", device="cpu")[1]
    marks = torch.tensor(
        [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(100))]
    )
    read = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    words = torch.where(torch.isin(batch["labels"], marks), -100, batch["labels"])
    return {**batch, "decoder_input_ids": read, "labels": words}


def mean_loss(model: torch.nn.Module, batches: fs.Batches, objective: str) -> float:
    with torch.no_grad():
        losses = [fs.example_losses(model, batch, objective) for batch in batches]
    return float(sum(x.total.sum() for x in losses) / sum(x.count.sum() for x in losses))


@each_model
def test_is_a_language_model(name: str) -> None:
    model, batches = loaded(name, None)  # the entropy of few tokens is too low
    if name == "t5":  # sentinels and the end are no words
        batches = [without_sentinels(model, batch) for batch in batches]
    assert next(model.parameters()).dtype == torch.float32 and not model.training
    references = reference_losses(model, batches, OBJECTIVES[name])
    assert mean_loss(model, batches, OBJECTIVES[name]) < references["unigram"] - 1.5 < references["uniform"]


@each_model
def test_opens_with_transformers_alone(name: str) -> None:
    model, _ = fs.load_model(f"builtin:{name}", device="cpu")
    plain = CLASSES[name].from_pretrained(ROOT / "fisherscope" / "builtin" / name, dtype=torch.float32)
    assert type(plain) is type(model)
    for (mine, a), (theirs, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert mine == theirs and torch.equal(a, b)


def test_all_share_one_vocabulary() -> None:
    vocabularies = [fs.load_model(f"builtin:{name}", device="cpu")[1].get_vocab() for name in RECORDS]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_gpt2_continues_with_words() -> None:
    model, tokenizer = fs.load_model("builtin:gpt2", device="cpu")
    ids = tokenizer("this function returns the", return_tensors="pt")["input_ids"]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert len(tokenizer.decode(made[0, ids.shape[1] :]).split()) >= 4


def test_t5_fills_in_words() -> None:
    model, tokenizer = fs.load_model("builtin:t5", device="cpu")
    ids = tokenizer("return a list of the <extra_id_0> in the file .", return_tensors="pt")["input_ids"]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    words = tokenizer.convert_ids_to_tokens(made[0])
    assert words[1] == "<extra_id_0>" and not words[2].startswith("<extra_id_")


@pytest.mark.parametrize(("name", "keys"), [("bert", 4), ("gpt2", 4)])
def test_key_biases_carry_no_information(name: str, keys: int) -> None:
    model, batches = loaded(name)
    scores = fs.estimate_fisher(model, batches, progress=False)
    if name == "bert":
        pairs = [(scores[n], scores[n.replace("key", "query")]) for n in scores if n.endswith("key.bias")]
    else:  # queries, keys and values in one
        thirds = [scores[n].chunk(3) for n in scores if n.endswith("c_attn.bias")]
        pairs = [(key, query) for query, key, _ in thirds]
    assert len(pairs) == keys
    for key, query in pairs:
        assert key.max() < 1e-9 * query.max()


@each_model
def test_is_small_and_says_where_it_comes_from(name: str) -> None:
    folder = ROOT / "fisherscope" / "builtin" / name
    assert (folder / "model.safetensors").stat().st_size < 6_000_000
    card = (folder / "README.md").read_text()
    held_out = json.loads((RECORDS[name] / "held_out.json").read_text())[-1]
    assert f"{held_out['loss']:.3f}" in card and f"{held_out['unigram']:.3f}" in card
    assert held_out["loss"] < held_out["unigram"] - 1.5


def test_trajectory_ends_at_the_model() -> None:
    model, _ = loaded("bert", 16)
    files = sorted(TRAJECTORY.glob("step_*.safetensors"))
    assert len(files) == len(json.loads((TRAJECTORY / "held_out.json").read_text())) >= 7
    assert sum(file.stat().st_size for file in files) < 25_000_000
    last = load_file(files[-1])
    for name, parameter in model.named_parameters():
        assert torch.equal(last[name].float(), parameter), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_pretraining_script_trains_resumes_and_exports(name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The cat number {i} sat on the mat." for i in range(300)))
    script = [sys.executable, str(ROOT / "scripts" / "pretrain_builtin.py")]
    train = [*script, "train", "--model", name, "--text", str(text), "--out", str(tmp_path / "run")]
    settings = [
        "--early-steps",
        "2",
        "--batch-size",
        "2",
        *(["--vocabulary", "400"] if name == "bert" else ["--from-bert"]),
    ]
    run = {"check": True, "cwd": ROOT, "capture_output": True, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    for steps in ("4", "6"):  # the second one goes on after the first
        subprocess.run([*train, *settings, "--steps", steps], **run)
    out = ["--out", str(tmp_path / "model"), "--record", str(tmp_path / "record"), "--snapshots"]
    subprocess.run([*script, "export", "--run", str(tmp_path / "run"), *out], **run)
    _, tokenizer = fs.load_model(tmp_path / "model", device="cpu")
    assert len(tokenizer) == (400 if name == "bert" else 4096)
    assert "held out" in (tmp_path / "model" / "README.md").read_text()
    steps = [row["step"] for row in json.loads((tmp_path / "record" / "held_out.json").read_text())]
    assert steps == [0, 2, 4, 6] == [int(f.stem[5:]) for f in sorted((tmp_path / "record").glob("step_*.safetensors"))]
