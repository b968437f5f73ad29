"""The file of what a training changed: it turns the base model into the trained one, bit for bit."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import built, untouched
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fisherscope import storage
from fisherscope.finetune.difference import Difference
from fisherscope.masks import Mask, random_fraction


@pytest.fixture
def base() -> Any:
    return built("bert-classifier")


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def backbone_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in parameters_of(model).items() if not name.startswith("classifier")}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: p.detach().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}


def trained_within(model: nn.Module, mask: Mask) -> nn.Module:
    """A copy in which every selected entry has a new value."""
    after = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            parameter += torch.where(mask[name], torch.rand_like(parameter) + 0.1, 0.0)
    return after


@pytest.fixture
def mask(base: Any) -> Mask:
    return random_fraction(base, 0.1, seed=0)


@pytest.fixture
def trained(base: Any, mask: Mask) -> nn.Module:
    return trained_within(base, mask)


def test_it_turns_the_base_into_the_trained_model_bit_for_bit(
    tmp_path: Path, base: Any, trained: nn.Module, mask: Mask
):
    Difference.between(parameters_of(base), trained, mask).save(tmp_path / "d.safetensors")
    Difference.load(tmp_path / "d.safetensors").apply_to(base)
    assert bits(base) == bits(trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_does_so_in_every_precision(dtype: torch.dtype):
    base: Any = built("gpt2").to(dtype)
    trained = trained_within(base, random_fraction(base, 0.1, seed=0))
    Difference.between(parameters_of(base), trained).apply_to(base)
    assert bits(base) == bits(trained)


def test_it_holds_the_changed_entries_and_no_others(base: Any, trained: nn.Module, mask: Mask):
    difference = Difference.between(parameters_of(base), trained)
    assert difference.num_entries == mask.num_selected
    assert difference.density == mask.density
    for name, positions in difference.indices.items():
        assert positions.dtype == torch.int32  # 64 bits only where a parameter has so many entries
        assert torch.equal(positions.long(), mask[name].flatten().nonzero()[:, 0])
        assert torch.equal(difference.values[name], trained.get_parameter(name).detach().flatten()[positions.long()])


def test_a_parameter_that_did_not_change_is_not_in_it(base: Any):
    trained = copy.deepcopy(base)
    with torch.no_grad():
        trained.get_parameter("classifier.bias")[1] += 1
    difference = Difference.between(parameters_of(base), trained)
    assert (list(difference.values), difference.num_entries) == (["classifier.bias"], 1)


def test_new_values_are_kept_because_adding_would_round():
    """1e-8 is lost when the difference to 1 is added back in float32, and found here."""
    base, trained = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(base.weight, 1.0)
    nn.init.constant_(trained.weight, 1e-8)
    assert base.weight + (trained.weight - base.weight) != trained.weight
    Difference.between(parameters_of(base), trained).apply_to(base)
    assert base.weight == trained.weight


def test_it_sees_the_sign_of_zero_and_no_change_in_nan():
    base, trained = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[0.0, torch.nan]]))
        trained.weight.copy_(torch.tensor([[-0.0, torch.nan]]))
    difference = Difference.between(parameters_of(base), trained)
    assert difference.indices["weight"].tolist() == [0]
    difference.apply_to(base)
    assert bits(base) == bits(trained)


def test_a_head_that_the_base_lacks_is_kept_whole(base: Any, trained: nn.Module):
    difference = Difference.between(backbone_of(base), trained)
    assert {name for name in difference.values if name not in difference.indices} == {
        "classifier.weight",
        "classifier.bias",
    }
    with torch.no_grad():
        base.get_parameter("classifier.weight").normal_()  # as any other draw of a new head
    difference.apply_to(base)
    assert bits(base) == bits(trained)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_the_base_may_be_a_saved_checkpoint(tmp_path: Path, name: str):
    base: Any = built(name)
    base.save_pretrained(tmp_path)
    trained = trained_within(base, random_fraction(base, 0.1, seed=0))
    difference = Difference.between(tmp_path, trained)
    assert set(difference.indices) == set(difference.values)
    difference.apply_to(base)
    assert bits(base) == bits(trained)


def test_the_base_may_be_a_checkpoint_of_the_backbone_alone(tmp_path: Path, base: Any, trained: nn.Module):
    base.bert.save_pretrained(tmp_path)
    assert not any(name.startswith("bert.") for name in load_file(tmp_path / "model.safetensors"))
    difference = Difference.between(tmp_path / "model.safetensors", trained)
    difference.apply_to(base)
    assert bits(base) == bits(trained)


def test_the_base_of_a_bare_backbone_may_be_a_checkpoint_with_a_head(tmp_path: Path, base: Any):
    base.save_pretrained(tmp_path)
    backbone = base.bert
    trained = trained_within(backbone, random_fraction(backbone, 0.1, seed=0))
    difference = Difference.between(tmp_path, trained)
    assert set(difference.indices) == set(difference.values)
    difference.apply_to(backbone)
    assert bits(backbone) == bits(trained)


def test_a_checkpoint_in_half_precision_is_compared_as_a_model_loads_it(tmp_path: Path):
    base: Any = built("bert-classifier").to(torch.float16).to(torch.float32)
    copy.deepcopy(base).to(torch.float16).save_pretrained(tmp_path)
    assert Difference.between(tmp_path, base).num_entries == 0


def test_a_base_of_something_else_is_refused(base: Any):
    with pytest.raises(ValueError, match="has no parameter of a BertForSequenceClassification"):
        Difference.between({"other.weight": torch.zeros(2)}, base)


def test_a_missing_base_is_named(tmp_path: Path, base: Any):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*model\.safetensors"):
        Difference.between(tmp_path, base)


def test_a_change_outside_the_mask_is_refused(base: Any, trained: nn.Module, mask: Mask):
    name = "bert.encoder.layer.1.output.dense.weight"
    wrong = Mask(dict(mask) | {name: torch.zeros_like(mask[name])}, mask.provenance)
    with pytest.raises(ValueError, match=rf"in '{name}' {int(mask[name].sum())} changed that it does not select"):
        Difference.between(parameters_of(base), trained, wrong)


def test_a_head_that_the_mask_lacks_was_free_to_change(base: Any, trained: nn.Module, mask: Mask):
    inside = Mask({name: t for name, t in mask.items() if not name.startswith("classifier")}, mask.provenance)
    assert Difference.between(parameters_of(base), trained, inside).num_entries == mask.num_selected


def test_other_weights_than_those_of_the_base_are_refused_and_left_alone(base: Any, trained: nn.Module):
    difference = Difference.between(parameters_of(base), trained)
    with torch.no_grad():
        base.get_parameter("bert.pooler.dense.bias")[0] += 1e-9
    message = "belongs to a base model with fingerprint [0-9a-f]{16}, but these weights have [0-9a-f]{16}; load the"
    with untouched(base), pytest.raises(ValueError, match=message):
        difference.apply_to(base)


def test_applying_it_twice_is_refused(base: Any, trained: nn.Module):
    difference = Difference.between(parameters_of(base), trained)
    difference.apply_to(base)
    with untouched(base), pytest.raises(ValueError, match="load the checkpoint that the training started from"):
        difference.apply_to(base)


def test_another_architecture_is_refused(base: Any, trained: nn.Module):
    difference = Difference.between(parameters_of(base), trained)
    other = built("gpt2")
    with untouched(other), pytest.raises(ValueError, match=r"does not fit this model: 'bert\..*' is .* but None here"):
        difference.apply_to(other)


def test_another_number_of_classes_is_refused(base: Any, trained: nn.Module):
    other = built("bert-classifier", num_labels=5)
    with untouched(other), pytest.raises(ValueError, match=r"'classifier\.weight' is \(3, 32\) there but \(5, 32\)"):
        Difference.between(backbone_of(base), trained).apply_to(other)


def test_another_precision_is_refused(base: Any, trained: nn.Module):
    difference = Difference.between(parameters_of(base), trained)
    with pytest.raises(ValueError, match="load the model in the same precision"):
        difference.apply_to(base.float())


@pytest.fixture
def saved(tmp_path: Path, base: Any, trained: nn.Module) -> Path:
    Difference.between(parameters_of(base), trained).save(tmp_path / "d.safetensors")
    return tmp_path / "d.safetensors"


def rewritten(path: Path, header: dict[str, object] | None = None, **tensors: Any) -> None:
    with safe_open(path, framework="pt") as file:
        found = json.loads(file.metadata()["fisherscope"])
    text = json.dumps(found | (header or {}))
    save_file(load_file(path) | tensors, path, metadata={"fisherscope": text})


BIAS = "classifier.bias"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"indices.{BIAS}", torch.tensor([-1])),
        (f"indices.{BIAS}", torch.tensor([3])),
        (f"indices.{BIAS}", torch.tensor([0, 1])),
        (f"indices.{BIAS}", torch.tensor([0.0])),
        (f"values.{BIAS}", torch.zeros(2)),
        ("values.unknown", torch.zeros(2)),
    ],
    ids=str,
)
def test_a_file_whose_parts_do_not_fit_is_refused(saved: Path, name: str, value: Tensor):
    start = {f"indices.{BIAS}": torch.tensor([1]), f"values.{BIAS}": torch.zeros(1, dtype=torch.float64)}
    rewritten(saved, None, **start)
    Difference.load(saved)
    rewritten(saved, None, **{name: value})
    with pytest.raises(storage.WrongFile, match="is damaged; make it again"):
        Difference.load(saved)


def test_a_file_with_a_position_twice_is_refused(saved: Path):
    rewritten(
        saved, None, **{f"indices.{BIAS}": torch.tensor([1, 1]), f"values.{BIAS}": torch.zeros(2, dtype=torch.float64)}
    )
    with pytest.raises(storage.WrongFile, match="is damaged; make it again"):
        Difference.load(saved)


@pytest.mark.parametrize("header", [{"shapes": None}, {"shapes": {"a": "b"}}, {"provenance": {}}, {"provenance": 3}])
def test_a_file_with_a_damaged_header_is_refused(saved: Path, header: dict[str, object]):
    rewritten(saved, header)
    with pytest.raises(storage.WrongFile, match="is damaged; make it again"):
        Difference.load(saved)


def test_a_file_of_another_version_is_refused(saved: Path):
    rewritten(saved, {"format_version": 99})
    with pytest.raises(storage.WrongFile, match="has format version 99"):
        Difference.load(saved)


def test_a_mask_is_no_difference(tmp_path: Path, mask: Mask):
    mask.save(tmp_path / "m.safetensors")
    with pytest.raises(storage.WrongFile, match=r"should be a fisherscope\.difference file"):
        Difference.load(tmp_path / "m.safetensors")


def test_a_file_that_was_cut_short_is_refused(saved: Path):
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(storage.WrongFile, match="was cut short; make it again"):
        Difference.load(saved)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        Difference.load(tmp_path / "none.safetensors")


def test_a_file_of_a_sparse_difference_is_small(tmp_path: Path, base: Any):
    """4 bytes for a position and 8 for a value of a float64 model, and the header."""
    mask = random_fraction(base, 0.01, seed=0)
    Difference.between(parameters_of(base), trained_within(base, mask)).save(tmp_path / "d.safetensors")
    header = 40_000
    assert (tmp_path / "d.safetensors").stat().st_size < 12 * mask.num_selected + header


def test_it_says_in_one_line_what_it_is(base: Any, trained: nn.Module, mask: Mask):
    difference = Difference.between(parameters_of(base), trained)
    shown = f"Difference({mask.num_selected:,} entries in {len(difference.values)} parameters, {mask.density:.2%})"
    assert repr(difference) == shown
