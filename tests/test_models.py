"""Loading a model, the names of its parameters, and which tensors fit it."""

import logging
from pathlib import Path

import pytest
import torch
from architectures import POSITIONS, entry
from conftest import VOCABULARY, built, checkpoint, untouched
from torch import nn
from transformers.pytorch_utils import Conv1D

from fisherscope.models import (
    backbone_prefix,
    check_head,
    describe,
    find_difference,
    infer_objective,
    layer_of,
    load_model,
    measuring,
    row_axis,
    saved_objective,
    transposed_parameters,
    usable_device,
    weights_fingerprint,
)

HEADS = {
    "bert": "mlm", "albert": "mlm", "gpt2": "causal-lm", "llama": "causal-lm", "t5": "seq2seq-lm",
    "bert-classifier": "classification", "bert-regressor": "regression",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: checkpoint(name, root / name) for name in HEADS}


@pytest.mark.parametrize("name", HEADS)
def test_model_comes_with_the_head_it_was_saved_with(name: str, folders: dict, caplog: pytest.LogCaptureFixture):
    model, tokenizer = load_model(folders[name], device="cpu")
    assert type(model) is type(built(name))
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert weights_fingerprint(model) == weights_fingerprint(built(name))
    assert len(tokenizer) == VOCABULARY
    assert infer_objective(model) == saved_objective(folders[name]) == HEADS[name]
    assert describe(model)["new_parameters"] == []
    assert not caplog.records


def test_texts_are_cut_where_the_model_has_no_further_positions(tmp_path: Path):
    made = entry("RoBERTa", "masked LM")
    checkpoint("bert", tmp_path)  # for its tokenizer, which names no limit
    made.model.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, objective="mlm", device="cpu")
    longest = tokenizer.model_max_length
    assert longest == POSITIONS - 1
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_float32_whatever_the_checkpoint_has(dtype: torch.dtype, tmp_path: Path):
    model, _ = load_model(checkpoint("bert", tmp_path / "m", dtype), device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    wide, _ = load_model(tmp_path / "m", device="cpu", dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


def test_head_that_the_checkpoint_lacks_is_drawn_from_the_seed(folders: dict, caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    options = {"objective": "classification", "num_labels": 4, "device": "cpu"}
    one, _ = load_model(folders["bert"], seed=1, **options)
    assert torch.equal(torch.get_rng_state(), before)
    new = ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"]
    assert describe(one)["new_parameters"] == new
    assert describe(one)["seed"] == 1
    assert [record.message for record in caplog.records] == [
        f"{folders['bert']} has no weights for 4 of its parameters, for example 'bert.pooler.dense.bias'; such are "
        "drawn at random from seed 1."
    ]
    torch.rand(3)
    again, _ = load_model(folders["bert"], seed=1, **options)
    other, _ = load_model(folders["bert"], seed=2, **options)
    assert one.classifier.weight.shape == (4, 32)
    assert torch.equal(again.classifier.weight, one.classifier.weight)
    assert not torch.equal(other.classifier.weight, one.classifier.weight)
    assert torch.equal(other.bert.embeddings.word_embeddings.weight, one.bert.embeddings.word_embeddings.weight)


def test_generators_of_gpus_stay_as_they_are(folders: dict, monkeypatch: pytest.MonkeyPatch):
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    load_model(folders["bert"], device="cpu")
    assert seeded == []


def test_regression_has_one_output(folders: dict):
    model, _ = load_model(folders["bert"], objective="regression", device="cpu")
    assert model.classifier.weight.shape == (1, 32)
    assert infer_objective(model) == "regression"


def test_description_names_the_folder_without_its_path(folders: dict):
    model, _ = load_model(folders["bert"], device="cpu")
    facts = describe(model)
    assert (facts["name"], facts["class"], facts["prefix"]) == ("bert", "BertForMaskedLM", "bert.")
    assert facts["transposed"] == []
    assert str(folders["bert"].parent) not in str(facts)


def test_padding_id_for_models_that_have_none(tmp_path: Path):
    folder = checkpoint("gpt2", tmp_path / "gpt2", pad=None, pad_token_id=None)
    model, tokenizer = load_model(folder, objective="classification", num_labels=2, device="cpu")
    assert model.config.pad_token_id == tokenizer.eos_token_id
    ids = torch.tensor([[3, 4, 5], [6, 7, tokenizer.eos_token_id]])
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 2)


def test_logging_of_transformers_is_as_before(folders: dict):
    from transformers.utils import logging as theirs

    theirs.set_verbosity_info()
    load_model(folders["bert"], device="cpu")
    assert theirs.get_verbosity() == logging.INFO
    theirs.set_verbosity_warning()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.encoder.layer.3.output.dense.weight", "bert.encoder.layer.3"),
        ("bert.encoder.layer.11.attention.self.query.bias", "bert.encoder.layer.11"),
        ("bert.embeddings.LayerNorm.bias", "bert.embeddings"),
        ("cls.predictions.transform.dense.weight", "cls.predictions"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", "encoder.block.1"),
        ("decoder.final_layer_norm.weight", "decoder.final_layer_norm"),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.0"),
        ("shared.weight", "shared"),
        ("0.weight", "0"),
        ("weight", "weight"),
    ],
)
def test_layer_of_a_parameter(name: str, layer: str):
    assert layer_of(name) == layer


@pytest.mark.parametrize("name", HEADS)
def test_every_numbered_block_is_a_layer(name: str):
    layers = {layer_of(parameter) for parameter, _ in built(name).named_parameters()}
    numbered = [layer for layer in layers if layer[-1].isdigit()]
    assert len(numbered) == {"t5": 4, "albert": 1}.get(name, 2)


def test_transposed_parameters_are_the_weights_of_conv1d():
    model = built("gpt2")
    found = transposed_parameters(model)
    assert len(found) == 8
    assert all(isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D) for name in found)
    assert row_axis("transformer.h.0.mlp.c_fc.weight", found) == 1
    assert row_axis("transformer.wte.weight", found) == 0
    assert transposed_parameters(built("bert")) == set()


@pytest.mark.parametrize(
    ("name", "prefix"), [("bert", "bert."), ("bert-classifier", "bert."), ("gpt2", "transformer."), ("t5", "")]
)
def test_backbone_prefix(name: str, prefix: str):
    assert backbone_prefix(built(name)) == prefix


def test_bare_backbone_has_no_prefix():
    assert backbone_prefix(built("bert").bert) == ""
    assert backbone_prefix(nn.Linear(1, 1)) == ""


@pytest.mark.parametrize("name", HEADS)
def test_model_fits_itself(name: str):
    model = built(name)
    assert find_difference(dict(model.named_parameters()), backbone_prefix(model), model) is None


def test_fingerprint_changes_with_any_weight_and_with_nothing_else():
    model = built("bert")
    whole, backbone = weights_fingerprint(model), weights_fingerprint(model, backbone_only=True)
    assert len(whole) == len(backbone) == 16
    assert weights_fingerprint(model.train().requires_grad_(False)) == whole
    assert weights_fingerprint(built("bert-classifier"), backbone_only=True) != whole
    with torch.no_grad():
        model.cls.predictions.bias[3] += 1e-3
    assert weights_fingerprint(model) != whole
    assert weights_fingerprint(model, backbone_only=True) == backbone
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[98, 31] += 1e-3
    assert weights_fingerprint(model, backbone_only=True) != backbone


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_measuring_turns_training_and_cache_off_and_restores_them(name: str):
    model = built(name)
    model.train()
    next(iter(model.children())).eval()
    cache = model.config.use_cache if hasattr(model.config, "use_cache") else None
    with untouched(model), measuring(model):
        assert not any(module.training for module in model.modules())
        assert not getattr(model.config, "use_cache", False)
        model.requires_grad_(False)
    assert getattr(model.config, "use_cache", None) == cache


def test_objective_of_a_class_in_several_tables():
    """Some encoder-decoders are also listed as masked language models."""
    from fisherscope.models import _objective_of_class

    assert _objective_of_class("BartForConditionalGeneration", None) == "seq2seq-lm"
    assert _objective_of_class("T5ForConditionalGeneration", None) == "seq2seq-lm"
    assert _objective_of_class("BertForMaskedLM", None) == "mlm"
    assert _objective_of_class("GPT2LMHeadModel", None) == "causal-lm"


def test_the_head_of_a_family_for_texts_and_images_is_known():
    """The tables of transformers name the classes of both under one key."""
    from transformers import PerceiverConfig, PerceiverForSequenceClassification

    sizes = {"d_model": 16, "d_latents": 16, "num_latents": 2, "num_blocks": 1, "num_self_attends_per_block": 1}
    heads = {"num_self_attention_heads": 2, "num_cross_attention_heads": 2}
    model = PerceiverForSequenceClassification(PerceiverConfig(**sizes, **heads, vocab_size=20))
    with pytest.raises(ValueError, match="has a head for classification or regression"):
        check_head(model, "mlm")


def test_padding_and_length_follow_the_tokenizer_and_the_model(tmp_path: Path):
    checkpoint("gpt2", tmp_path)
    model, tokenizer = load_model(tmp_path, objective="classification", num_labels=2, device="cpu")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.model_max_length <= model.config.n_positions


@pytest.mark.parametrize(("asked", "count", "expected"), [(None, 2, "cuda"), (None, 0, "cpu"), ("cuda:1", 2, "cuda:1")])
def test_devices_asked_for(asked: str | None, count: int, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert usable_device(asked) == torch.device(expected)


@pytest.mark.parametrize(
    ("asked", "count", "message"),
    [
        ("gpu", 1, "must be cpu, cuda, cuda:1 or another name of torch's; got 'gpu'"),
        ("cuda", 0, "The device cuda was asked for, but torch finds no CUDA here; leave out the device"),
        ("cuda:2", 2, "The device cuda:2 was asked for, but torch finds 2 GPUs here"),
    ],
)
def test_devices_that_are_not_there_are_refused(asked: str, count: int, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=message):
        load_model("builtin:bert", device=asked)
