"""The exact sentence of every refusal: what is required, what was found, what to do."""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from architectures import entry
from conftest import IGNORED, Case, Interrupted, Stopping, batched, built, case, checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fisherscope import storage
from fisherscope.data import load_batches
from fisherscope.finetune import GuidedDropout, SubnetworkUpdate, finetune
from fisherscope.fisher import estimate_fisher, run
from fisherscope.fisher.memory import empty_model
from fisherscope.landscape import Axis, Landscape, Subspace, random_directions, scan_landscape
from fisherscope.masks import Mask, MaskMismatch, bottom_fraction, random_fraction, top_fraction
from fisherscope.models import has_next_sentence_head, infer_objective, load_model, saved_classes, saved_objective
from fisherscope.objectives import example_losses
from fisherscope.scores import FisherScores

pytestmark = pytest.mark.usefixtures("unchecked")

fisher = functools.partial(estimate_fisher, progress=False)
scan = functools.partial(scan_landscape, progress=False)

OBJECTIVES = "mlm, causal-lm, seq2seq-lm, classification, regression"
NOTHING_SCORED = "None of the examples has a scored token (a label that is not -100); check labels and objective."


def refused(kind: type[Exception], sentence: str, function: Callable[..., object], *args: object, **options: object):
    with pytest.raises(kind) as error:
        function(*args, **options)
    assert str(error.value) == sentence
    assert type(error.value) is kind


def scores(**tensors: Tensor) -> FisherScores:
    return FisherScores(tensors or {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}, num_examples=1)


def squares(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().sum(1)


def plain(count: int = 4) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    return nn.Linear(3, 2), [{"x": torch.ones(count, 3)}]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([0.0, -1.5, -2.0], "2 entries that are not, the first -1.5"),
        ([float("nan"), 1.0], "1 entries that are not, the first nan"),
        ([1.0, float("inf")], "1 entries that are not, the first inf"),
    ],
)
def test_scores_that_are_no_mean_of_squares(values: list[float], found: str):
    refused(
        ValueError,
        f"Fisher scores are finite and cannot be negative, but 'a' has {found}.",
        FisherScores, {"a": torch.tensor(values)}, num_examples=1,
    )  # fmt: skip


def test_scores_of_no_example():
    refused(
        ValueError, "Fisher scores are a mean over examples, but num_examples is 0.", FisherScores, {}, num_examples=0
    )


NOUNS = {
    "scores": (FisherScores.load, "fisherscope.scores"),
    "landscape": (Landscape.load, "fisherscope.landscape"),
}


def landscape() -> Landscape:
    return Landscape((Axis("axis0", np.array([-1.0, 0.0, 1.0]), 1.0, 2),), np.zeros(3), np.ones(3, dtype=bool))


@pytest.fixture(params=NOUNS)
def noun(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable, str, Path]:
    path = tmp_path / f"{request.param}.h5"
    (scores() if request.param == "scores" else landscape()).save(path)
    return *NOUNS[request.param], path


def test_file_that_is_not_there(noun: tuple):
    load, _, path = noun
    path.unlink()
    refused(FileNotFoundError, f"There is no file {path}.", load, path)


def test_file_that_is_not_hdf5(noun: tuple):
    load, _, path = noun
    path.write_text("loss,step\n")
    sentence = f"{path} is no HDF5 file, as scores and landscapes are, or was cut short; make it again."
    refused(storage.WrongFile, sentence, load, path)


def test_file_that_was_cut_short(noun: tuple):
    load, _, path = noun
    path.write_bytes(path.read_bytes()[:-100])
    sentence = f"{path} is damaged and cannot be read; make it again."
    refused(storage.WrongFile, sentence, load, path)
    refused(storage.WrongFile, sentence, storage.file_format, path)


def test_file_of_another_format(noun: tuple):
    load, form, path = noun
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = "other"
    sentence = f"{path} should be a {form} file, but it says 'other'; give the file that was meant."
    refused(storage.WrongFile, sentence, load, path)


def test_file_of_another_program(noun: tuple):
    load, form, path = noun
    with h5py.File(path, "w") as file:
        file["x"] = 1
    sentence = f"{path} should be a {form} file, but it says no format; give the file that was meant."
    refused(storage.WrongFile, sentence, load, path)


def test_file_of_another_version(noun: tuple):
    load, _, path = noun
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 9
    sentence = f"{path} has format version 9, but this fisherscope reads version 1; make it again with this version."
    refused(storage.WrongFile, sentence, load, path)


@pytest.mark.parametrize("dtype", ["float16", "int64", "bool"])
def test_scores_of_another_dtype(dtype: str, tmp_path: Path):
    path = tmp_path / "scores.h5"
    scores().save(path)
    with h5py.File(path, "r+") as file:
        file["scores/z"] = np.zeros(2, dtype)
    sentence = f"{path} has {dtype} values under 'z', but scores are float32."
    refused(storage.WrongFile, sentence, FisherScores.load, path)


def test_scores_without_scores(tmp_path: Path):
    path = tmp_path / "scores.h5"
    scores().save(path)
    with h5py.File(path, "r+") as file:
        del file["scores"]
    refused(storage.WrongFile, f"{path} has no group 'scores'; make it again.", FisherScores.load, path)


def test_format_of_an_unknown_file(tmp_path: Path):
    path = tmp_path / "notes.txt"
    refused(FileNotFoundError, f"There is no file {path}.", storage.file_format, path)
    path.write_text("hello")
    sentence = (
        f"{path} is no HDF5 file, as scores and landscapes are, but by its name TXT; give the scores or the landscape "
        "that was meant."
    )
    refused(storage.WrongFile, sentence, storage.file_format, path)
    with h5py.File(path, "w") as file:
        file["x"] = 1
    sentence = f"{path} is not a file of fisherscope: scores and landscapes are HDF5, masks safetensors."
    refused(storage.WrongFile, sentence, storage.file_format, path)


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("reduction", "'mean' or 'sum'"),
        ("engine", "'auto' or 'hooks' or 'loop'"),
        ("estimator", "'empirical' or 'sampled' or 'exact' or 'squared-batch-mean' or 'absolute-gradient'"),
        ("unit", "'sequence' or 'token'"),
    ],
)
def test_options_of_a_run_are_listed(option: str, known: str):
    model, batches = plain()
    sentence = f"{option} must be {known}, got 'best'."
    refused(ValueError, sentence, fisher, model, batches, objective=squares, **{option: "best"})


def test_model_without_anything_to_score():
    model, batches = plain()
    model.requires_grad_(False)
    sentence = "A Fisher run scores the parameters that require a gradient, but this model has none."
    refused(ValueError, sentence, fisher, model, batches, objective=squares)


def test_objective_that_cannot_be_inferred():
    sentence = (
        f"Cannot tell the objective of a Linear; give one of {OBJECTIVES}, or a function (model, batch) -> losses of "
        "shape [B]."
    )
    refused(ValueError, sentence, infer_objective, nn.Linear(1, 1))
    refused(ValueError, sentence, fisher, *plain())
    refused(ValueError, sentence, scan, *plain())


def test_unknown_objective(bert: Case):
    sentence = f"objective must be one of {OBJECTIVES}; got 'masked'."
    batches = batched(bert.examples, 3)
    refused(ValueError, sentence, fisher, bert.model, batches, objective="masked")
    refused(ValueError, sentence, scan, bert.model, batches, objective="masked", axes=1, points=3)
    refused(ValueError, sentence, example_losses, bert.model, batches[0], "masked")


def test_unknown_objective_of_a_classifier():
    """It is named before anything is said of its labels, which do not fit a language model."""
    on = entry("BERT", "classification")
    sentence = f"objective must be one of {OBJECTIVES}; got 'hinge'."
    refused(ValueError, sentence, fisher, on.model, batched(on.examples, 3), objective="hinge")


def test_batch_without_labels(bert: Case):
    batches = batched([{k: v for k, v in example.items() if k != "labels"} for example in bert.examples], 3)
    sentence = (
        "The objective mlm needs 'labels' in every batch, but it holds ['attention_mask', 'input_ids', "
        "'token_type_ids']."
    )
    refused(ValueError, sentence, example_losses, bert.model, batches[0], "mlm")
    refused(ValueError, sentence, fisher, bert.model, batches)
    refused(ValueError, sentence, scan, bert.model, batches, axes=1, points=3)


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_nothing_scored(engine: str, bert: Case):
    silent = [{**example, "labels": torch.full_like(example["labels"], IGNORED)} for example in bert.examples]
    refused(ValueError, NOTHING_SCORED, fisher, bert.model, batched(silent, 3), engine=engine)
    refused(ValueError, NOTHING_SCORED, scan, bert.model, batched(silent, 3), axes=1, points=3)


def test_no_batches(bert: Case):
    sentence = "A Fisher run needs at least one batch, but there is none; check the data."
    refused(ValueError, sentence, fisher, bert.model, [])
    sentence = "A landscape needs at least one batch, but there is none; check the data."
    refused(ValueError, sentence, scan, bert.model, [], axes=1, points=3)


def test_model_without_logits(bert: Case):
    batch = batched(bert.examples, 3)[0]
    sentence = "BertModel returns no logits; load the model with a head for the objective."
    refused(ValueError, sentence, example_losses, bert.model.bert, batch, "mlm")


def test_model_with_another_head(bert: Case):
    batch = {**batched(bert.examples, 3)[0], "labels": torch.zeros(3, dtype=torch.long)}
    sentence = (
        "A BertForMaskedLM has a head for mlm, but the objective is classification; load the model with this objective."
    )
    refused(ValueError, sentence, example_losses, bert.model, batch, "classification")


@pytest.mark.parametrize("engine", ["hooks", "loop"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_loss_that_is_not_finite(value: str, engine: str):
    model, batches = plain()

    def broken(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return squares(model, batch) * torch.where(batch["x"][:, 0] > 0, 1.0, float(value))

    batches[0]["x"][2, 0] = -1
    with pytest.raises(ValueError) as error:
        fisher(model, batches, objective=broken, engine=engine)
    assert re.fullmatch(
        rf"Every example needs a finite loss, but example 2 of a batch has {value}; check the model's weights and the "
        r"labels\.",
        str(error.value),
    )


@pytest.mark.parametrize("shape", ["[]", "[4, 2]"])
def test_loss_function_with_another_shape(shape: str):
    model, batches = plain()
    losses = {"[]": lambda m, b: squares(m, b).sum(), "[4, 2]": lambda m, b: m(b["x"])}[shape]
    sentence = f"A loss function must return one loss per example, shape [B]; got shape {shape}."
    refused(ValueError, sentence, example_losses, model, batches[0], losses)


@pytest.mark.parametrize("value", [None, 1.0, (torch.ones(4),)])
def test_loss_function_that_returns_no_tensor(value: object):
    model, batches = plain()
    sentence = f"A loss function must return one loss per example, shape [B]; got a {type(value).__name__}."
    for run_it in (fisher, functools.partial(scan, axes=1, points=3)):
        refused(ValueError, sentence, run_it, model, batches, objective=lambda m, b: value)


def test_labels_drawn_for_a_loss_function():
    sentence = (
        "Labels can only be drawn from a named objective, but the losses come from a function; take the estimator "
        "empirical."
    )
    refused(ValueError, sentence, fisher, *plain(), objective=squares, estimator="sampled")


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_loss_function_without_a_gradient_is_told(engine: str, caplog: pytest.LogCaptureFixture):
    model, batches = plain()
    found = fisher(model, batches, objective=lambda m, b: squares(m, b).detach(), engine=engine)
    assert not any(t.any() for t in found.values())
    assert "All scores are 0" in caplog.text
    caplog.clear()
    fisher(model, batches, objective=squares, engine=engine)
    assert not caplog.text


@pytest.mark.parametrize("count", [1, 3, 5])
def test_loss_function_with_another_number_of_losses(count: int):
    """A mean over the batch in a list of one would silently give squared batch gradients."""
    model, batches = plain()
    losses = {1: lambda m, b: squares(m, b).mean()[None], 3: lambda m, b: squares(m, b)[:3]}
    wrong = losses.get(count, lambda m, b: squares(m, b).repeat(2)[:5])
    for run_it in (fisher, functools.partial(scan, axes=1, points=3)):
        with pytest.raises(ValueError, match="one loss per example"):
            run_it(model, batches, objective=wrong)


def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    part = tmp_path / "scores.h5.part"
    torch.manual_seed(0)
    model, batches = plain()
    with pytest.raises(Interrupted):
        fisher(model, Stopping(batches * 2, 1, fingerprint="abc"), objective=squares, checkpoint=part)
    return part


def test_checkpoint_of_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    part = begun(tmp_path, monkeypatch)
    torch.manual_seed(0)
    model, batches = plain()
    same = {"objective": squares, "checkpoint": part}
    runs = {
        "data fingerprint (abc there, def now)": (model, Stopping(batches, fingerprint="def"), same),
        "engine (hooks there, loop now)": (model, Stopping(batches, fingerprint="abc"), {**same, "engine": "loop"}),
        "model fingerprint (": (nn.Linear(3, 2), Stopping(batches, fingerprint="abc"), same),
    }
    for key, (other, data, options) in runs.items():
        with pytest.raises(ValueError) as error:
            fisher(other, data, **options)
        assert str(error.value).startswith(f"{part} was begun with another {key}")
        assert str(error.value).endswith("; repeat that command to go on, or delete the file to start afresh.")
        assert len(str(error.value)) < 350 + len(str(part)), "say what differs, not everything"
    ending = "repeat that command to go on, or delete the file to start afresh."
    sentence = f"{part} was begun with another reduction (mean there, sum now); {ending}"
    data = Stopping(batches, fingerprint="abc")
    refused(ValueError, sentence, fisher, model, data, reduction="sum", **same)


def test_checkpoint_that_is_finished(tmp_path: Path):
    path = tmp_path / "scores.h5"
    scores().save(path)
    sentence = f"{path} is a finished scores file, not the checkpoint of a run; name another checkpoint."
    refused(ValueError, sentence, fisher, *plain(), objective=squares, checkpoint=path)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), float("inf")])
def test_fraction_out_of_range(fraction: float):
    sentence = f"fraction must be between 0 and 1, got {fraction}."
    refused(ValueError, sentence, top_fraction, scores(), fraction)
    refused(ValueError, sentence, bottom_fraction, scores(), fraction)
    refused(ValueError, sentence, random_fraction, scores(), fraction, seed=0)


def test_options_of_masks_are_listed():
    sentence = "granularity must be 'entry', 'row' or 'parameter', got 'column'."
    refused(ValueError, sentence, top_fraction, scores(), 0.5, granularity="column")
    refused(ValueError, sentence, random_fraction, scores(), 0.5, seed=0, granularity="column")
    sentence = "within must be 'model', 'layer' or 'parameter', got 'block'."
    refused(ValueError, sentence, bottom_fraction, scores(), 0.5, within="block")
    sentence = "stratify must be 'model', 'layer' or 'parameter', got 'block'."
    refused(ValueError, sentence, random_fraction, scores(), 0.5, seed=0, stratify="block")


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_pattern_that_matches_nothing(option: str):
    sentence = "The pattern 'b.*' matches no parameter; they are named like 'a.weight'."
    for select in (top_fraction, bottom_fraction, functools.partial(random_fraction, seed=0)):
        refused(ValueError, sentence, select, scores(), 0.5, **{option: ["a.*", "b.*"]})


@pytest.mark.parametrize("mask", ["mask.safetensors", {"weight": torch.ones(2, 3, dtype=torch.bool)}])
def test_mask_that_is_none(mask: object):
    sentence = f"A mask must be a Mask, got a {type(mask).__name__}; take Mask.load(path) or Mask(tensors)."
    refused(TypeError, sentence, scan, *plain(), objective=squares, axes=1, points=3, mask=mask)
    refused(TypeError, sentence, SubnetworkUpdate, mask)
    refused(TypeError, sentence, finetune, "builtin:bert", task="builtin:pairs", method="fixed-mask", mask=mask)


@pytest.mark.parametrize("given", ["scores.h5", {"weight": torch.ones(2, 3)}])
def test_scores_that_are_none(given: object):
    sentence = (
        f"Scores must be FisherScores, got a {type(given).__name__}; take FisherScores.load(path) or "
        "estimate_fisher(model, batches)."
    )
    refused(TypeError, sentence, scan, *plain(), objective=squares, axes=1, points=3, scores=given)
    refused(TypeError, sentence, GuidedDropout, given)
    refused(TypeError, sentence, finetune, "builtin:bert", task="builtin:pairs", method="guided-dropout", scores=given)
    for select in (top_fraction, bottom_fraction):
        refused(TypeError, sentence, select, given, 0.5)
    sentence = f"like must be scores, a mask or a model, got a {type(given).__name__}; load it first."
    refused(TypeError, sentence, random_fraction, given, 0.5, seed=0)


def test_data_that_are_no_file():
    sentence = (
        "data must be a name, a path or a Source, got a dict; save it as a file (to_csv) or folder (save_to_disk) and "
        "give that, or make batches of your own."
    )
    refused(TypeError, sentence, load_batches, {"text": ["a"]}, None, objective="mlm")


def test_batch_of_what_is_no_tensor():
    ending = "is a list; let the loader collate it, or leave it out."
    sentence = f"A batch must hold tensors with the examples first, but 'text' {ending}"
    model, batches = plain()
    for run_ in (fisher, functools.partial(scan, axes=1, points=3)):
        refused(TypeError, sentence, run_, model, [{**batches[0], "text": ["a"] * 4}], objective=squares)


def test_mask_that_is_not_boolean(tmp_path: Path):
    refused(TypeError, "A mask holds boolean tensors, but 'a' is torch.float32.", Mask, {"a": torch.ones(2)})
    refused(TypeError, "A mask holds boolean tensors, but 'a' is a ndarray.", Mask, {"a": np.ones(2, dtype=bool)})
    path = tmp_path / "mask.safetensors"
    Mask({"a": torch.ones(2, dtype=torch.bool)}).save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file({"a": torch.ones(2, dtype=torch.uint8)}, path, metadata=header)
    refused(storage.WrongFile, f"{path} has torch.uint8 values under 'a', but masks are boolean.", Mask.load, path)


def test_files_that_are_no_mask(tmp_path: Path):
    path = tmp_path / "mask.safetensors"
    refused(FileNotFoundError, f"There is no file {path}.", Mask.load, path)
    path.write_bytes(b"abc")
    refused(storage.WrongFile, f"{path} is not a safetensors file or was cut short; make it again.", Mask.load, path)
    save_file({"a": torch.ones(2, dtype=torch.bool)}, path)
    sentence = f"{path} should be a fisherscope.mask file, but it says no format; give the file that was meant."
    refused(storage.WrongFile, sentence, Mask.load, path)


def test_masks_of_different_models():
    one = Mask({"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)})
    other = Mask({"a": torch.ones(2, dtype=torch.bool), "c": torch.ones(2, dtype=torch.bool)})
    sentence = (
        "Masks cover different parameters: 2 are in only one of them or differ in shape, for example 'b'; make "
        "both for the same model."
    )
    refused(MaskMismatch, sentence, lambda: one & other)
    refused(MaskMismatch, sentence, lambda: other | one)
    sentence = (
        "Masks cover different parameters: 1 are in only one of them or differ in shape, for example 'a'; make "
        "both for the same model."
    )
    shorter = Mask({"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)})
    refused(MaskMismatch, sentence, lambda: one & shorter)


def test_mask_of_another_model(bert: Case, gpt2: Case):
    mask = random_fraction(gpt2.model, 0.5, seed=0)
    sentence = (
        "The mask does not fit this model: it has nothing for the model's parameter "
        "'embeddings.word_embeddings.weight'."
    )
    refused(MaskMismatch, sentence, mask.for_model, bert.model)
    refused(MaskMismatch, sentence, scan, bert.model, batched(bert.examples, 3), mask=mask)


def test_mask_of_other_weights(bert: Case):
    mask = random_fraction(built("bert", seed=1), 0.5, seed=0)
    sentence = "The mask was made for other weights (unnamed) of the same architecture."
    refused(MaskMismatch, sentence, mask.for_model, bert.model, strict=True)
    refused(MaskMismatch, sentence, scan, bert.model, batched(bert.examples, 3), mask=mask, strict=True)


@pytest.mark.parametrize(
    ("points", "found", "near"),
    [(50, 50, "49 or 51"), ((51, 30), 30, "29 or 31"), (4, 4, "3 or 5"), (2, 2, "3"), (0, 0, "3")],
)
def test_even_number_of_points(points: int | tuple[int, int], found: int, near: str):
    sentence = f"points must be odd, so that step 0 is on the grid, got {found}; take {near}."
    refused(ValueError, sentence, scan, *plain(), objective=squares, points=points)


@pytest.mark.parametrize("points", [1, -3])
def test_too_few_points(points: int):
    """These are odd; the sentence must not say that they are not."""
    with pytest.raises(ValueError, match=rf"points must be .*at least 3.*, got {points}"):
        scan(*plain(), objective=squares, points=points)


def test_grid_that_makes_no_sense():
    options = {"objective": squares}
    refused(ValueError, "axes must be 1, 2 or 3, got 4.", scan, *plain(), axes=4, **options)
    sentence = "points must be one number or one per axis (1), got [3, 5]."
    refused(ValueError, sentence, scan, *plain(), axes=1, points=(3, 5), **options)
    for span in (0, -1.0, float("nan"), float("inf")):
        sentence = f"span must be a positive number, got {span}."
        refused(ValueError, sentence, scan, *plain(), span=span, **options)


def test_options_of_directions_are_listed():
    sentence = "normalize must be 'filter' or 'row' or 'parameter' or 'layer' or 'none', got 'model'."
    refused(ValueError, sentence, random_directions, nn.Linear(2, 2), 1, seed=0, normalize="model")
    sentence = "one_dimensional must be 'skip' or 'scale', got 'move'."
    refused(ValueError, sentence, random_directions, nn.Linear(2, 2), 1, seed=0, one_dimensional="move")


def test_given_directions_that_do_not_fit():
    options = {"objective": squares, "axes": 1, "points": 3}
    weight = torch.ones(2, 3)
    sentence = "directions must be 'random' or one mapping per axis (1), got 'pca'."
    refused(ValueError, sentence, scan, *plain(), directions="pca", **options)
    sentence = "directions must be 'random' or one mapping per axis (1), got 2 directions."
    refused(ValueError, sentence, scan, *plain(), directions=[{"weight": weight}] * 2, **options)
    sentence = "A direction has 'wait' of shape (2, 3), but the model has no such parameter."
    refused(ValueError, sentence, scan, *plain(), directions=[{"wait": weight}], **options)
    sentence = "A direction has 'weight' of shape (3, 2), but the model has shape (2, 3)."
    refused(ValueError, sentence, scan, *plain(), directions=[{"weight": weight.T}], **options)


def test_one_direction_that_is_no_list():
    """A single mapping is iterable too."""
    options = {"objective": squares, "axes": 1, "points": 3}
    for given in ({"weight": torch.ones(2, 3)}, 3):
        sentence = f"directions must be 'random' or one mapping per axis (1), got a {type(given).__name__}."
        refused(ValueError, sentence, scan, *plain(), directions=given, **options)


def test_a_subspace_says_what_each_direction_is():
    directions = ({"weight": torch.ones(2, 3)},)
    sentence = "kinds must say in words what each of 1 directions is, got 0 of them."
    refused(ValueError, sentence, Subspace, directions, ())
    sentence = "kinds must say in words what each of 1 directions is, got 'x'."
    refused(ValueError, sentence, Subspace, directions, "x")


def test_directions_may_be_parameters():
    """Those of another model, say, which require a gradient."""
    model, batches = plain()
    options = {"objective": squares, "axes": 1, "points": 3}
    given = dict(nn.Linear(3, 2).named_parameters())
    found = scan(model, batches, directions=[given], **options)
    plain_ones = scan(model, batches, directions=[{name: p.detach() for name, p in given.items()}], **options)
    assert (found.loss == plain_ones.loss).all()


def test_nothing_moves():
    sentence = (
        "Nothing moves along axis 0: the direction is 0, or the mask selects only entries where it is; select others, "
        "or let biases and norms move with one_dimensional='scale'."
    )
    model, batches = plain()
    mask = Mask({"weight": torch.zeros(2, 3, dtype=torch.bool), "bias": torch.ones(2, dtype=torch.bool)})
    refused(ValueError, sentence, scan, model, batches, objective=squares, mask=mask)
    assert scan(model, batches, objective=squares, mask=mask, points=3, one_dimensional="scale").axes[0].entries == 2


def test_landscape_whose_arrays_do_not_fit():
    axis = Axis("axis0", np.zeros(3), 1.0, 1)
    sentence = "A landscape with axes of (3,) points needs loss and evaluated of that shape, got (4,) and (3,)."
    refused(ValueError, sentence, Landscape, (axis,), np.zeros(4), np.zeros(3, dtype=bool))


def test_checkpoint_of_another_scan(tmp_path: Path):
    part, options = tmp_path / "landscape.h5.part", {"objective": squares, "axes": 1}
    torch.manual_seed(0)
    model, batches = plain()
    scan(model, batches, points=3, seed=1, checkpoint=part, **options)
    ending = "; repeat that command to go on, or delete the file to start afresh."
    for change, key in (
        ({"points": 5}, "grid"),
        ({"seed": 2}, "settings seed (1 there, 2 now)"),
        ({"span": 0.5}, "grid"),
    ):
        sentence = f"{part} was begun with another {key}{ending}"
        refused(
            ValueError, sentence, scan, model, batches, checkpoint=part, **{"points": 3, "seed": 1, **options, **change}
        )


def test_model_that_is_not_there(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"^There is no built-in model 'builtin:none'; there are builtin:\w+.*\.$"
    ):
        load_model("builtin:none")
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as error:
        load_model(missing)
    assert str(error.value).startswith(f"Cannot load the model '{missing}': ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("holds", "ending"),
    [
        (
            "adapter_config.json",
            "it is an adapter of peft without its model; save what merge_and_unload() gives and take that.",
        ),
        ("checkpoint-8", "it is the folder of a run; give a model in it, such as {folder}/checkpoint-8."),
        ("model.safetensors", "the folder holds no config.json; give one that save_pretrained wrote."),
    ],
)
def test_folder_without_a_config(holds: str, ending: str, tmp_path: Path):
    (tmp_path / holds).touch()
    sentence = f"Cannot load the model '{tmp_path}': {ending.format(folder=tmp_path)}"
    for look in (load_model, saved_objective, saved_classes, has_next_sentence_head):
        refused(FileNotFoundError, sentence, look, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_file_in_place_of_a_model(name: str, tmp_path: Path):
    built("bert").save_pretrained(tmp_path)
    file = tmp_path / name
    ending = "it is a file; give its folder, with config.json, weights and tokenizer."
    refused(FileNotFoundError, f"Cannot load the model '{file}': {ending}", load_model, file)
    if name == "model.safetensors":
        refused(FileNotFoundError, f"Cannot load the model '{file}': {ending}", empty_model, file)


def test_configuration_without_a_decoder_start():
    made = case("t5")
    del made.model.config.decoder_start_token_id
    sentence = (
        "T5ForConditionalGeneration does not say how its decoder starts; set decoder_start_token_id in its "
        "configuration, or add 'decoder_input_ids' to the batches."
    )
    refused(ValueError, sentence, example_losses, made.model, batched(made.examples, 2)[0], "seq2seq-lm")


def test_checkpoint_without_a_head(tmp_path: Path):
    built("bert").bert.save_pretrained(tmp_path)
    sentence = (
        f"The checkpoint '{tmp_path}' was saved without a head that fisherscope knows (['BertModel']); give an "
        f"objective: one of {OBJECTIVES}."
    )
    refused(ValueError, sentence, load_model, tmp_path)
    refused(ValueError, f"objective must be one of {OBJECTIVES}; got 'lm'.", load_model, tmp_path, objective="lm")


def test_checkpoint_with_another_number_of_labels(tmp_path: Path):
    built("bert-classifier").save_pretrained(tmp_path)
    ending = "are needed; take a checkpoint of the backbone, or data with as many labels."
    sentence = f"The checkpoint '{tmp_path}' has a head with 3 outputs, but 2 {ending}"
    refused(ValueError, sentence, load_model, tmp_path, num_labels=2)
    sentence = f"The checkpoint '{tmp_path}' has a head with 3 outputs, but 1 {ending}"
    refused(ValueError, sentence, load_model, tmp_path, objective="regression")


def test_objective_that_the_architecture_lacks(tmp_path: Path):
    checkpoint("gpt2", tmp_path)
    with pytest.raises(ValueError, match="mlm") as error:
        load_model(tmp_path, objective="mlm")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama"])
def test_model_without_a_tokenizer(name: str, tmp_path: Path):
    """Transformers makes an empty tokenizer up, for which every word is unknown."""
    built(name).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^Cannot load the model '{tmp_path}': .*tokenizer") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_every_message_is_one_sentence_about_the_value(name: str):
    """A spot check of the form: no line break, a full stop at the end."""
    made = case(name)
    for wrong in ({"reduction": "x"}, {"engine": "x"}, {"objective": "x"}):
        with pytest.raises(ValueError) as error:
            fisher(made.model, batched(made.examples, 3), **wrong)
        assert "'x'" in str(error.value)
        assert str(error.value).endswith(".")
        assert "\n" not in str(error.value)
