"""Bad input: one clear sentence, and nothing is written; `test_error_messages.py` has those of single values."""

import functools
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
import torch
from conftest import Case, batched, case, checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fisherscope import storage
from fisherscope.cli import main
from fisherscope.data import read_source
from fisherscope.fisher import estimate_fisher
from fisherscope.landscape import scan_landscape
from fisherscope.masks import Mask
from fisherscope.objectives import example_losses
from fisherscope.scores import FisherScores
from fisherscope.testing import check_engine

pytestmark = pytest.mark.usefixtures("unchecked")

fisher = functools.partial(estimate_fisher, progress=False)
scan = functools.partial(scan_landscape, axes=1, points=3, progress=False)

Batches = list[dict[str, Tensor]]


def refused(sentence: str, model: torch.nn.Module, batches: Batches, objective: str | None = None) -> None:
    """Whoever runs a model says the same."""
    runs: list[Callable[..., object]] = [fisher, functools.partial(fisher, engine="loop"), scan, check_engine]
    for run in runs:
        with pytest.raises(ValueError) as error:
            run(model, batches, objective=objective)
        assert str(error.value) == sentence


def changed(made: Case, name: str, change: Callable[[Tensor], Tensor]) -> Batches:
    """Batches of which the second has another tensor under a name."""
    batches = batched(made.examples, 4)
    batches[1][name] = change(batches[1][name].clone())
    return batches


def with_entry(value: int) -> Callable[[Tensor], Tensor]:
    """Another value at a place that is scored, and not the first token, which a decoder does not predict."""

    def change(tensor: Tensor) -> Tensor:
        flat = tensor.view(-1)
        scored = (flat != -100).nonzero()
        flat[int(scored[1])] = value
        return tensor

    return change


@pytest.mark.parametrize("value", [99, 1000, -1, -99])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_labels_outside_the_vocabulary(name: str, value: int):
    made = case(name)
    sentence = (
        "The labels of the vocabulary must be below 99, the number of outputs of the head, and not negative, but for "
        f"-100 (not scored); one is {value}."
    )
    refused(sentence, made.model, changed(made, "labels", with_entry(value)))


@pytest.mark.parametrize("value", [3, -1])
def test_classes_that_the_head_does_not_have(value: int):
    made = case("bert-classifier")
    sentence = (
        "The class labels must be below 3, the number of outputs of the head, and not negative, but for -100 (not "
        f"scored); one is {value}."
    )
    refused(sentence, made.model, changed(made, "labels", with_entry(value)))


@pytest.mark.parametrize("value", [99, -1])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_tokens_that_the_model_does_not_know(name: str, value: int):
    made = case(name)
    sentence = (
        "The input_ids must be below 99, the number of tokens that the model knows, and not negative; one is "
        f"{value}: use the model's own tokenizer."
    )
    refused(sentence, made.model, changed(made, "input_ids", with_entry(value)))


def test_labels_that_are_no_integers():
    for name in ("bert", "gpt2", "t5", "bert-classifier"):
        made = case(name)
        sentence = f"The objective {made.objective} needs integer labels, but they are torch.float32."
        refused(sentence, made.model, changed(made, "labels", Tensor.float))


HEADS = {
    "bert": "BertForMaskedLM has a head for mlm",
    "gpt2": "GPT2LMHeadModel has a head for causal-lm",
    "t5": "T5ForConditionalGeneration has a head for seq2seq-lm",
    "bert-classifier": "BertForSequenceClassification has a head for classification or regression",
}


@pytest.mark.parametrize(
    ("name", "objective"),
    [(name, o) for name in ("bert", "gpt2", "t5") for o in ("mlm", "causal-lm", "seq2seq-lm", "classification")]
    + [("bert-classifier", o) for o in ("mlm", "causal-lm", "seq2seq-lm")],
)
def test_objective_that_is_not_that_of_the_head(name: str, objective: str):
    made = case(name)
    if objective == made.objective:
        fisher(made.model, batched(made.examples, 4), objective=objective)
        return
    sentence = f"A {HEADS[name]}, but the objective is {objective}; load the model with this objective."
    refused(sentence, made.model, batched(made.examples, 4), objective)


def test_classes_for_a_regression_head_and_values_for_a_classifier():
    regressor, classifier = case("bert-regressor"), case("bert-classifier")
    sentence = "The objective classification needs integer labels, but they are torch.float64."
    refused(sentence, regressor.model, batched(regressor.examples, 4), "classification")
    with pytest.raises(ValueError, match=r"^The objective regression needs one label per example and logits of shape"):
        fisher(classifier.model, batched(classifier.examples, 4), objective="regression")


def test_batch_without_any_example(bert: Case):
    batches = [{name: value[:0] for name, value in batched(bert.examples, 4)[0].items()}]
    for run in (fisher, functools.partial(fisher, engine="loop"), scan, check_engine):
        with pytest.raises(ValueError, match=r"must hold at least one example|None of the examples has a scored token"):
            run(bert.model, batches)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bert-classifier", "bert-regressor"])
def test_weights_that_are_not_finite(name: str, caplog: pytest.LogCaptureFixture):
    made = case(name)
    with torch.no_grad():
        next(p for n, p in made.model.named_parameters() if "embed" in n or "wte" in n or "shared" in n).fill_(
            float("nan")
        )
    for engine in ("hooks", "loop"):
        with pytest.raises(ValueError, match=r"^Every example needs a finite loss, but example 0 of a batch has nan"):
            fisher(made.model, batched(made.examples, 4), engine=engine)
    assert "other examples of its batch" not in caplog.text  # the batch is not to blame
    with pytest.raises(ValueError, match=r"^Every example needs a finite loss"):
        check_engine(made.model, batched(made.examples, 4))


def test_label_that_is_not_a_number():
    made = case("bert-regressor")
    batches = changed(made, "labels", lambda labels: labels.fill_(float("nan")))
    with pytest.raises(ValueError, match=r"^Every example needs a finite loss, but example 0 of a batch has nan"):
        fisher(made.model, batches)


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_refusal_in_the_middle_leaves_the_model_and_no_file(engine: str, bert: Case, tmp_path: Path):
    before = {name: p.clone() for name, p in bert.model.named_parameters()}
    batches = changed(bert, "labels", with_entry(99))
    with pytest.raises(ValueError, match="labels of the vocabulary"):
        fisher(bert.model, batches, engine=engine, checkpoint=tmp_path / "scores.h5.part")
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in bert.model.named_parameters())
    assert list(tmp_path.iterdir()) == []


def scores() -> FisherScores:
    return FisherScores({"a.weight": torch.rand(20, 30), "a.bias": torch.rand(5)}, num_examples=3)


def mask() -> Mask:
    return Mask({"a.weight": torch.rand(20, 30) > 0.5, "a.bias": torch.rand(5) > 0.5})


FILES = {"scores.h5": (scores, FisherScores.load), "mask.safetensors": (mask, Mask.load)}


@pytest.mark.parametrize("name", FILES)
def test_file_cut_short_anywhere(name: str, tmp_path: Path):
    make, load = FILES[name]
    path = tmp_path / name
    make().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        with pytest.raises(storage.WrongFile) as error:
            load(path)
        assert str(error.value).startswith(f"{path} ") and str(error.value).endswith("; make it again.")


@pytest.mark.parametrize("name", FILES)
def test_file_with_a_wrong_byte_anywhere(name: str, tmp_path: Path):
    """It may go unnoticed (a score that is another number), but it is never an error of another kind."""
    make, load = FILES[name]
    path = tmp_path / name
    make().save(path)
    whole, draw = path.read_bytes(), torch.Generator().manual_seed(0)
    noticed = 0
    for place in torch.randint(len(whole), (150,), generator=draw).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        try:
            load(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).endswith(".")
            noticed += 1
    assert noticed > 5


def test_mask_with_values_beyond_1(tmp_path: Path):
    path = tmp_path / "mask.safetensors"
    mask().save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + b"\x02")
    with pytest.raises(storage.WrongFile, match=r"is damaged: a mask holds 0 and 1 only; make it again\.$"):
        Mask.load(path)


def edited(path: Path, **changes: object) -> None:
    """The same mask file with another header."""
    import json

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fisherscope"]) | changes
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"fisherscope": json.dumps(header)})


def test_mask_of_another_version_or_format(tmp_path: Path):
    path = tmp_path / "mask.safetensors"
    for change, ending in (
        ({"format_version": 9}, "has format version 9, but this fisherscope reads version 1; make it again with this "
         "version."),
        ({"format": "other"}, "should be a fisherscope.mask file, but it says 'other'; give the file that was meant."),
        ({"parameters": ["a.weight", "c"]}, "is not a safetensors file or was cut short; make it again."),
        ({"parameters": 3}, "has a damaged header; make it again."),
    ):  # fmt: skip
        mask().save(path)
        edited(path, **change)
        with pytest.raises(storage.WrongFile) as error:
            Mask.load(path)
        assert str(error.value) == f"{path} {ending}"


def test_scores_given_for_a_mask_and_the_other_way_round(tmp_path: Path):
    scores().save(tmp_path / "scores.h5")
    mask().save(tmp_path / "mask.safetensors")
    with pytest.raises(storage.WrongFile, match=r"holds no mask; make one from scores"):
        Mask.load(tmp_path / "scores.h5")
    with pytest.raises(storage.WrongFile, match=r"is no HDF5 file, as scores and landscapes are"):
        FisherScores.load(tmp_path / "mask.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 whose tokenizer splits words, text, and labelled pairs."""
    folder = tmp_path_factory.mktemp("bad")
    checkpoint("gpt2", folder / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(folder / "model")
    tokenizer.add_tokens(["beyond"])
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "text.txt").write_text("w1 w2 w3 w4\nw5 w6 w7\nw8 w9")
    (folder / "beyond.txt").write_text("w1 w2 beyond w4\nw5 w6 w7")
    (folder / "words.txt").write_text("w1\nw2\nw3")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "header.tsv").write_text("sentence\tlabel\n")
    (folder / "unlabelled.tsv").write_text("sentence\nw1 w2\nw3 w4\n")
    return folder


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """The same model with a weight that is not a number."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder / "model")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "broken" / file).write_bytes((folder / "model" / file).read_bytes())
    return tmp_path / "broken"


def said(capsys: pytest.CaptureFixture[str], out: Path, *words: object) -> str:
    """The sentence with which a command ends; nothing may be under ``--out``, nor beside it."""
    out.parent.mkdir(exist_ok=True)
    before = set(out.parent.iterdir())
    assert main([*map(str, words), "--out", str(out)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert set(out.parent.iterdir()) == before
    assert error.startswith("fisherscope: ") and error.endswith(".") and "unexpected" not in error
    return error.removeprefix("fisherscope: ")


@pytest.mark.parametrize("command", ["fisher", "landscape"])
def test_commands_on_bad_data(command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out" / "result.h5"
    model = ["--model", folder / "model", "--device", "cpu"]
    for data, sentence in (
        ("empty.txt", "Data must hold at least one example, but"),
        (
            "words.txt",
            "None of the examples has a scored token (a label that is not -100); check labels and objective.",
        ),
        ("none.txt", "There is no file or folder"),
    ):
        assert said(capsys, out, command, *model, "--data", folder / data).startswith(sentence)
    labelled = [*model, "--objective", "classification"]
    assert "is empty" in said(capsys, out, command, *labelled, "--data", folder / "header.tsv")
    sentence = said(capsys, out, command, *labelled, "--data", folder / "unlabelled.tsv")
    assert sentence.startswith("classification needs labels, but unlabelled.tsv has no column label or labels")
    sentence = said(capsys, out, command, *model, "--objective", "mlm", "--data", folder / "text.txt")
    assert "which has no head for mlm" in sentence


@pytest.mark.parametrize("command", ["fisher", "landscape"])
def test_commands_on_a_tokenizer_with_more_tokens_than_the_model(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The first batch is fine; only the second has the token."""
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / "tokenizer" / file).write_bytes((folder / "model" / file).read_bytes())
    words = [command, "--model", folder / "tokenizer", "--data", folder / "beyond.txt", "--device", "cpu"]
    sentence = said(capsys, tmp_path / "out" / "result.h5", *words, "--batch-size", "1")
    assert sentence == (
        "The input_ids must be below 99, the number of tokens that the model knows, and not negative; one is 99: use "
        "the model's own tokenizer."
    )


def test_fisher_of_a_model_that_is_not_a_number(
    broken: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["fisher", "--model", broken, "--data", folder / "text.txt", "--device", "cpu"]
    for engine in ("hooks", "loop"):
        sentence = said(capsys, tmp_path / "out" / "scores.h5", *words, "--engine", engine)
        assert sentence.startswith("Every example needs a finite loss, but example 0 of a batch has nan;")


def test_commands_on_bad_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cut, foreign, later = tmp_path / "cut", tmp_path / "foreign", tmp_path / "later"
    for place in (cut, foreign, later):
        scores().save(place / "scores.h5")
        mask().save(place / "mask.safetensors")
    for name in FILES:
        (cut / name).write_bytes((cut / name).read_bytes()[:-50])
    with h5py.File(foreign / "scores.h5", "w") as file:
        file["x"] = 1.0
    save_file({"a.weight": torch.ones(2)}, foreign / "mask.safetensors")
    with h5py.File(later / "scores.h5", "r+") as file:
        file.attrs["format_version"] = 9
    edited(later / "mask.safetensors", format_version=9)
    scan_it = ["landscape", "--model", folder / "model", "--data", folder / "text.txt", "--device", "cpu", "--mask"]
    for place, found in (
        (cut, "cut short|damaged"),
        (foreign, "says no format|not a file of"),
        (later, "version 9"),
    ):
        alternatives = found.split("|")
        for out, words in (
            ("m.safetensors", ["mask", place / "scores.h5", "--fraction", "0.5"]),
            ("a.pdf", ["plot", place / "scores.h5"]),
            ("l.h5", [*scan_it, place / "mask.safetensors"]),
        ):
            sentence = said(capsys, tmp_path / "out" / out, *words)
            assert any(text in sentence for text in alternatives), sentence
            assert str(place) in sentence


def test_losses_of_a_batch_are_checked_as_well(bert: Case):
    """The function below all commands."""
    with pytest.raises(ValueError, match="labels of the vocabulary"):
        example_losses(bert.model, changed(bert, "labels", with_entry(99))[1], "mlm")


@pytest.mark.parametrize("kind", [tuple, list])
def test_batches_without_names(kind: type) -> None:
    made = case("bert")
    batches: Batches = [kind(batch.values()) for batch in batched(made.examples, 4)]  # pyright: ignore
    for run in (fisher, scan, check_engine):
        with pytest.raises(TypeError, match=f"must be a mapping from the names .* gives a {kind.__name__};"):
            run(made.model, batches)


@pytest.mark.parametrize("name", ["data.csv", "half.safetensors"])
def test_files_of_another_kind_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("text\na\n")
    command = (
        ["info"] if name == "data.csv" else ["mask", "--fraction", "0.5", "--out", str(tmp_path / "m.safetensors")]
    )
    assert main([command[0], str(tmp_path / name), *command[1:]]) == 1
    found = {"data.csv": "CSV", "half.safetensors": "a mask or weights"}[name]
    message = f"but by its name {found}; give the scores or the landscape that was meant"
    assert message in capsys.readouterr().err


def test_folder_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["info", str(tmp_path)]) == 1
    message = "must hold results of fine-tuning, but "
    error = capsys.readouterr().err
    assert message in error and "give the folder of a run, or a file of scores, a mask or a landscape" in error


def test_empty_text_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.txt"
    path.write_text("")
    caplog.set_level("INFO", logger="fisherscope")
    with pytest.raises(ValueError, match=r"at least one example, but column 'text' of a.txt is empty"):
        read_source(path, objective="mlm")
    assert not caplog.messages
    csv = tmp_path / "a.csv"
    csv.write_text('text\na\n" "\n')
    read_source(csv, objective="mlm")
    assert caplog.messages == ["a.csv: 1 row with a blank text is skipped."]


def test_one_mask_is_no_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mask.safetensors"
    Mask({"weight": torch.ones(2, dtype=torch.bool)}).save(path)
    assert main(["plot", str(path), "--out", str(tmp_path / "a.pdf")]) == 1
    message = "A comparison takes two files, got 1; fisherscope info shows what one holds, layer by layer."
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "given", "meant"),
    [
        ("finetune", "--learning_rate", "; did you mean --learning-rate?"),
        ("fisher", "--num_examples=4", "; did you mean --num-examples?"),
        ("plot", "--nothing-like-it-at-all", " (see"),
    ],
)
def test_flags_that_are_almost_right(
    command: str, given: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"finetune": ["--task", "cola", "--model", "m"], "fisher": ["--model", "m", "--data", "d"], "plot": ["f"]}
    with pytest.raises(SystemExit):
        main([command, *needed[command], "--out", str(tmp_path / "out"), given])
    assert f"unrecognized arguments: {given}{meant}" in capsys.readouterr().err


def test_one_example_is_no_plural() -> None:
    made = case("bert")
    report = str(check_engine(made.model, batched(made.examples, 1), num_examples=1))
    assert ", 1 example, " in report
    report = str(check_engine(made.model, batched(made.examples[:1] * 2, 2), num_examples=2))
    assert report.endswith("; batching changes nothing.")
