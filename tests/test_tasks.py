"""Tasks by name: every original layout, the order of the classes, what is left out, messages, and ``--task``."""

import csv
import io
import logging
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import fisherscope as fs
from fisherscope.cli import main
from fisherscope.data import TASKS, Source, read_task

WORDS = ["a", "b", "c", "d", "e", "f"]


def tsv(*rows: str) -> str:
    """Lines as GLUE has them, a blank standing for each tab."""
    return "".join(row.replace(" ", "\t") + "\n" for row in rows)


def quoted(header: str, *rows: tuple[object, ...]) -> str:
    """Lines as pandas writes them for minBERT."""
    file = io.StringIO()
    csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header.split(" "), *rows])
    return file.getvalue()


SST = quoted(" id sentence sentiment", (0, "x1", " a b .", 1), (1, "x2", 'c "d" e', 0))
PAIRS = " id sentence1 sentence2 "
MNLI_HEADER = "index promptID sentence1 sentence2 label1 gold_label"
ORIGINAL = {
    "cola": ("CoLA/train.tsv", tsv("gj04 0 * a", "gj04 1  b"), [("a",), ("b",)], [0, 1]),
    "sst2": ("SST-2/train.tsv", tsv("sentence label", "a 1", "b 0"), [("a",), ("b",)], [1, 0]),
    "mrpc": (
        "MRPC/train.tsv",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\ta\tb\r\n0\t9\t9\tc\td\r\n",
        [("a", "b"), ("c", "d")],
        [1, 0],
    ),
    "stsb": (
        "STS-B/train.tsv",
        tsv("index genre sentence1 sentence2 score", "0 g a b 5.000", "1 g c d 0.75"),
        [("a", "b"), ("c", "d")],
        [5.0, 0.75],
    ),
    "qqp": (
        "QQP/train.tsv",
        tsv("id qid1 qid2 question1 question2 is_duplicate", "1 2 3 a b 1", "4 5 6 c d 0"),
        [("a", "b"), ("c", "d")],
        [1, 0],
    ),
    "mnli": (
        "MNLI/train.tsv",
        tsv(MNLI_HEADER, "0 p a b neutral neutral", "1 p c d x contradiction", "2 p e f x entailment"),
        [("a", "b"), ("c", "d"), ("e", "f")],
        [1, 2, 0],
    ),
    "qnli": (
        "QNLI/train.tsv",
        tsv("index question sentence label", "0 a b not_entailment", "1 c d entailment"),
        [("a", "b"), ("c", "d")],
        [1, 0],
    ),
    "rte": (
        "RTE/train.tsv",
        tsv("index sentence1 sentence2 label", "0 a b not_entailment", "1 c d entailment"),
        [("a", "b"), ("c", "d")],
        [1, 0],
    ),
    "wnli": (
        "WNLI/train.tsv",
        tsv("index sentence1 sentence2 label", "0 a b 1", "1 c d 0"),
        [("a", "b"), ("c", "d")],
        [1, 0],
    ),
    "sst5": ("SST-5/ids-sst-train.csv", SST, [(" a b .",), ('c "d" e',)], [1, 0]),
    "cfimdb": ("CFIMDB/ids-cfimdb-train.csv", SST, [(" a b .",), ('c "d" e',)], [1, 0]),
    "quora": (
        "Quora/quora-train.csv",
        quoted(PAIRS + "is_duplicate", (5, "x1", "a", "b", "1.0"), (6, "x2", "c", "d", "0.0")),
        [("a", "b"), ("c", "d")],
        [1, 0],
    ),
    "sts": (
        "STS/sts-train.csv",
        quoted(PAIRS + "similarity", (5, "x1", "a", "b", "4.6"), (6, "x2", "c", "d", "0.0")),
        [("a", "b"), ("c", "d")],
        [4.6, 0.0],
    ),
}
HUB_ORDER = {
    "cola": "unacceptable acceptable",
    "sst2": "negative positive",
    "mrpc": "not_equivalent equivalent",
    "stsb": "",
    "qqp": "not_duplicate duplicate",
    "mnli": "entailment neutral contradiction",
    "qnli": "entailment not_entailment",
    "rte": "entailment not_entailment",
    "wnli": "not_entailment entailment",
}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the package logs, once; a command leaves a logger alone that has a handler."""
    logger = logging.getLogger("fisherscope")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.INFO, logger="fisherscope")
    return caplog


def written(folder: Path, file: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def rte(folder: Path, *rows: str, file: str = "train.tsv") -> Path:
    """A folder with some rows of RTE, cells between tabs."""
    written(folder, file, "\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    return folder


def message(error: type[Exception], *arguments: object, **options: object) -> str:
    with pytest.raises(error) as caught:
        read_task(*arguments, **options)
    return str(caught.value)


def test_all_tasks_of_both_collections_are_there() -> None:
    assert set(ORIGINAL) == {name for name in TASKS if not name.startswith("builtin:")}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ORIGINAL)
def test_original_layouts(name: str, encoding: str, tmp_path: Path) -> None:
    file, text, texts, labels = ORIGINAL[name]
    path = written(tmp_path, file, text, encoding)
    source = read_task(name, data_dir=tmp_path)
    assert (list(source.texts), list(source.labels or [])) == (texts, labels)
    assert source.name == f"{name}:train"
    assert [type(label) for label in source.labels or []] == [type(label) for label in labels]
    own = read_task(name, "train", data_dir=path.parent)  # the task's own folder does as well
    assert own.fingerprint == source.fingerprint and str(tmp_path) not in repr(vars(own))


def test_validation_is_the_file_called_dev(tmp_path: Path) -> None:
    rte(tmp_path, "0\ta\tb\tentailment", file="dev.tsv")
    assert read_task("rte", "validation", data_dir=tmp_path).name == "rte:validation"
    for split, text in (("matched", "a"), ("mismatched", "c")):
        written(tmp_path, f"mnli/dev_{split}.tsv", tsv(MNLI_HEADER, f"0 p {text} b x neutral"))
    matched = read_task("mnli", "validation", data_dir=tmp_path)
    assert (matched.name, list(matched.texts)) == ("mnli:validation_matched", [("a", "b")])
    assert list(read_task("mnli", "validation_mismatched", data_dir=tmp_path).texts) == [("c", "b")]


@pytest.mark.parametrize(("name", "order"), HUB_ORDER.items())
def test_classes_are_numbered_as_on_the_hub(name: str, order: str, tmp_path: Path) -> None:
    written(tmp_path, *ORIGINAL[name][:2])
    source = read_task(name, data_dir=tmp_path)
    assert " ".join(source.label_names or ()) == order
    assert source.num_labels == (len(order.split()) or None)


def test_quotes_mean_nothing_in_glue(tmp_path: Path) -> None:
    source = read_task("rte", data_dir=rte(tmp_path, '0\t"a\tb"\tentailment', '1\tc "d"\t"\t not_entailment '))
    assert list(source.texts) == [('"a', 'b"'), ('c "d"', '"')]
    assert list(source.labels or []) == [0, 1]


def test_quotes_hold_tabs_and_lines_together_in_minbert(tmp_path: Path) -> None:
    header = "\tid\tsentence\tsentiment\n"
    text = header + '0\tx\t"a\tb\nc ""d"""\t4\n'
    written(tmp_path, "ids-sst-train.csv", text)
    assert list(read_task("sst5", data_dir=tmp_path).texts) == [('a\tb\nc "d"',)]
    written(tmp_path, "ids-sst-train.csv", header + '0\tx\t"a\t4\n1\tx\tb\t4\n')
    assert message(ValueError, "sst5", data_dir=tmp_path).startswith("ids-sst-train.csv is not valid CSV")


def test_another_size_than_published_is_one_warning(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    read_task("rte", data_dir=rte(tmp_path, *["0\ta\tb\tentailment"] * 2489))
    assert log.messages == ["rte:train has 2489 examples here, but 2490 as published."]
    assert log.records[0].levelno == logging.WARNING
    log.clear()
    read_task("rte", data_dir=rte(tmp_path, *["0\ta\tb\tentailment"] * 2490))
    assert log.messages == []


def test_rows_without_a_label_are_left_out_and_counted(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    rows = [(0, "x", "a", "b", "0.0"), (1, "x", "c", "d", ""), (2, "x", "e", "", 1.0), (3, "x", "e", "f", " ")]
    written(tmp_path, "quora-dev.csv", quoted(PAIRS + "is_duplicate", *rows))
    source = read_task("quora", "validation", data_dir=tmp_path)
    assert (list(source.texts), list(source.labels or [])) == ([("a", "b"), ("e", "")], [0, 1])
    assert "quora:validation: 2 rows that lack their label or are broken are left out." in log.messages


def test_rows_broken_across_lines_are_left_out_and_counted(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    written(tmp_path, "train.tsv", header + "1\t2\t3\ta\n\tb\t0\n4\t5\t6\tc\td\t1\n")
    assert list(read_task("qqp", data_dir=tmp_path).texts) == [("c", "d")]
    assert "qqp:train: 2 rows that lack their label or are broken are left out." in log.messages


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("rte", "0\ta\tb\tneutral", "entailment, not_entailment, or 0 to 1, but row 2, column 'label' of rte:train"),
        ("rte", "0\ta\tb\t2", "or 0 to 1, but row 2, column 'label' of rte:train holds '2'."),
        ("rte", "0\ta\tb\t-1", "holds '-1'."),
        ("rte", "0\ta\tb\t0.5", "holds '0.5'."),
        ("wnli", "0\ta\tb\tnan", "holds 'nan'."),
    ],
)
def test_other_labels_are_refused(name: str, row: str, said: str, tmp_path: Path) -> None:
    sentence = message(ValueError, name, data_dir=rte(tmp_path, "0\ta\tb\t", row))
    assert sentence.startswith("A label must be ") and said in sentence


def test_a_value_must_be_finite(tmp_path: Path) -> None:
    written(tmp_path, "sts-train.csv", quoted(PAIRS + "similarity", (0, "x", "a", "b", "inf")))
    assert message(ValueError, "sts", data_dir=tmp_path) == (
        "A label must be a finite number, but row 1, column 'similarity' of sts:train holds 'inf'."
    )


def test_messages(tmp_path: Path) -> None:
    names = message(ValueError, "boolq")
    assert names.endswith("got 'boolq'.") and all(name in names for name in TASKS)
    assert message(ValueError, "rte", "test", data_dir=tmp_path) == (
        "The labelled splits of rte are train, validation; got 'test'; the labels of its test set are not public."
    )
    assert "train, validation_matched, validation_mismatched; got 'dev'" in message(ValueError, "mnli", "dev")
    assert message(FileNotFoundError, "rte", "validation", data_dir=tmp_path) == (
        f"rte:validation needs the file dev.tsv, but there is none in {tmp_path} or in a folder rte there."
    )
    assert message(FileNotFoundError, "quora") == (
        "quora is not on the Hub; give --data-dir, a folder with quora-train.csv and quora-dev.csv."
    )
    assert "takes no --data-dir" in message(ValueError, "builtin:pairs", data_dir=tmp_path)
    assert message(ValueError, "qnli", data_dir=rte(tmp_path, "0\ta\tb\t1")) == (
        "train.tsv must have the column 'question', but it has 'index', 'sentence1', 'sentence2', 'label'."
    )
    assert message(ValueError, "rte", data_dir=rte(tmp_path)) == (
        "A split must hold at least one labelled example, but rte:train has none."
    )
    written(tmp_path, "train.tsv", "")
    assert "must have the column 'sentence1'" in message(ValueError, "rte", data_dir=tmp_path)


def test_a_folder_of_the_task_comes_before_stray_files(tmp_path: Path) -> None:
    rte(tmp_path, "0\tstray\tb\tentailment")
    rte(tmp_path / "RTE", "0\ta\tb\tentailment")
    assert list(read_task("rte", data_dir=tmp_path).texts) == [("a", "b")]


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    asked = []
    held = {
        ("glue", "rte"): {"sentence1": ["a", "c"], "sentence2": ["b", ""], "label": [0, 1]},
        ("glue", "stsb"): {"sentence1": ["a"], "sentence2": ["b"], "label": [2.5]},
        ("glue", "mnli"): {"premise": ["a"], "hypothesis": ["b"], "label": [-1]},
    }
    # In another order than the Hub's own, so that going by the names shows.
    classes = {"rte": ["not_entailment", "entailment"], "mnli": ["entailment", "neutral", "contradiction"]}

    def load_dataset(*path: str, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((*path, split))
        if path not in held:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path[0]}' doesn't exist on the Hub.")
        data = datasets.Dataset.from_dict(held[path])
        return data.cast_column("label", datasets.ClassLabel(names=classes[path[1]])) if path[1] in classes else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    source = read_task("rte", "validation")
    assert asked[-1] == ("glue", "rte", "validation")
    assert (source.name, list(source.texts), source.labels) == ("rte:validation", [("a", "b"), ("c", "")], [1, 0])
    assert log.messages == ["rte:validation has 2 examples here, but 277 as published."]
    same = read_task("rte", "validation", data_dir=rte(tmp_path, "0\ta\tb\t1", "1\tc\t\t0", file="dev.tsv"))
    assert same.fingerprint == source.fingerprint
    assert read_task("stsb").labels == [2.5]
    assert "holds '-1'" in message(ValueError, "mnli", "validation")
    assert asked[-1] == ("glue", "mnli", "validation_matched")


@pytest.mark.parametrize(("split", "data"), [("train", "builtin:pairs/train"), ("validation", "builtin:pairs")])
def test_built_in_tasks_go_through_read_source(split: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_source(asked: str, *, objective: str) -> Source:
        return Source(asked, [("a", "b")], [0], ("no",), objective)

    monkeypatch.setattr("fisherscope.data.tasks.read_source", read_source)
    source = read_task("builtin:pairs", split)
    assert (source.name, source.fingerprint) == (data, "classification")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokenizer."""
    folder = tmp_path_factory.mktemp("tasks") / "tiny"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=16, model_input_names=inputs, **roles
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **shape)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def fisher(model: Path, out: Path, *words: object) -> int:
    return main(["fisher", *map(str, ["--model", model, "--device", "cpu", "--out", out, *words])])


def test_task_on_the_command_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], log: pytest.LogCaptureFixture
) -> None:
    rows = [f"{i}\ta b c d e f\tc d\t{label}" for i, label in enumerate(["entailment", "not_entailment"] * 4)]
    data = rte(tmp_path / "RTE", *rows)
    rte(tmp_path / "RTE", *rows[:3], file="dev.tsv")
    words = ["--task", "rte", "--data-dir", tmp_path]
    assert fisher(model, tmp_path / "a.h5", *words) == 0
    assert "rte:train has 8 examples here, but 2490 as published." in log.text
    scores = fs.FisherScores.load(tmp_path / "a.h5")
    facts = scores.provenance
    assert (scores.num_examples, facts["objective"], facts["data"]["source"]) == (8, "classification", "rte:train")
    assert scores["classifier.weight"].shape == (2, 8) and str(data) not in repr(facts)

    assert fisher(model, tmp_path / "b.h5", *words, "--split", "validation", "--objective", "mlm") == 0
    scores = fs.FisherScores.load(tmp_path / "b.h5")
    facts = scores.provenance
    assert (facts["objective"], facts["data"]["source"]) == ("mlm", "rte:validation")
    assert scores.num_examples + facts["skipped"] == 3
    assert facts["data"]["settings"]["label_column"] is None
    assert not any(name.startswith("classifier") for name in scores)
    assert float(scores["bert.embeddings.token_type_embeddings.weight"][1].sum()) > 0  # the second sentence is one

    assert fisher(model, tmp_path / "c.h5", *words, "--split", "test") == 1
    assert "the labels of its test set are not public" in capsys.readouterr().err


def test_regression_task_on_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, *ORIGINAL["sts"][:2])
    assert fisher(model, tmp_path / "a.h5", "--task", "sts", "--data-dir", tmp_path) == 0
    scores = fs.FisherScores.load(tmp_path / "a.h5")
    assert scores.provenance["objective"] == "regression" and scores["classifier.weight"].shape == (1, 8)
    classifier, tokenizer = fs.load_model(model, objective="classification", num_labels=3, device="cpu")
    for part in (classifier, tokenizer):
        part.save_pretrained(tmp_path / "classifier")
    assert fisher(tmp_path / "classifier", tmp_path / "b.h5", "--task", "sts", "--data-dir", tmp_path) == 1
    assert "has a head with 3 outputs, but 1 are needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "one of the arguments --data --task is required"),
        (["--task", "rte", "--data", "builtin:docs"], "not allowed with argument"),
        (["--task", "boolq"], "argument --task: invalid choice: 'boolq'"),
        (["--data", "builtin:docs", "--data-dir", "x"], "argument --data-dir: only with --task"),
        (["--data", "builtin:docs", "--split", "train"], "argument --split: only with --task"),
        (["--task", "rte", "--text-columns", "a"], "argument --text-columns: only with --data"),
        (["--task", "rte", "--label-column", "a"], "argument --label-column: only with --data"),
        (["--task", "sts", "--objective", "classification"], "argument --objective: sts is a task of regression"),
    ],
)
def test_flags_that_do_not_go_together(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        fisher(Path("builtin:bert"), tmp_path / "a.h5", *words)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and said in error and error.count("\n") == 1
