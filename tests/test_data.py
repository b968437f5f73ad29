"""Sources and batches: every format read verbatim, every draw a function of (seed, position) alone."""

import csv
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import built
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fisherscope import estimate_fisher, scan_landscape
from fisherscope.builtin import docs
from fisherscope.data import OBJECTIVES, Batches, Source, encoding, load_batches, read_source
from fisherscope.data.corruption import IGNORED, corrupt_spans, example_generator, mask_tokens

WORDS = [f"w{i}" for i in range(80)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>", *(f"<extra_id_{i}>" for i in range(10))]
LM_OBJECTIVES = ("mlm", "causal-lm", "seq2seq-lm")


def word_tokenizer(single: str, pair: str, **roles) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    used = [(t, vocabulary[t]) for t in ("[CLS]", "[SEP]", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **roles)


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerFast:
    return word_tokenizer(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


@pytest.fixture(scope="module")
def gpt() -> PreTrainedTokenizerFast:
    return word_tokenizer("$A", "$A $B", eos_token="</s>")


@pytest.fixture(scope="module")
def t5() -> PreTrainedTokenizerFast:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return word_tokenizer(
        "$A </s>", "$A </s> $B </s>", pad_token="[PAD]", eos_token="</s>", model_input_names=names, model_max_length=64
    )


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path, **options) -> list:
    return list(read_source(path, **{"objective": "mlm"} | options).texts)


def message(error: type[Exception], call, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def refused(path, objective="classification", **options) -> str:
    return message(ValueError, read_source, path, objective=objective, **options)


def equal(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


TRAPS = [
    ("NA", "pos"), ("null", "neg"), ("001", "pos"), ("1.0", "neg"), ("nan", "neg"), ("True", "pos"),
    (' lead "quote', "neg"), ("line\u2028separator and \x85", "pos"), ("é — 漢字", "neg"),
]  # fmt: skip


def as_csv(path: Path, rows, header=("text", "label"), **dialect) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **dialect).writerows([header, *rows])
    return path


def as_columns(rows) -> dict:
    return {"text": [text for text, _ in rows], "label": [label for _, label in rows]}


def save(path: Path, rows) -> Path:
    records = [{"text": text, "label": label} for text, label in rows]
    if path.suffix == ".csv":
        return as_csv(path, rows)
    if path.suffix == ".tsv":
        return write(path, "".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *rows]))
    if path.suffix == ".json":
        return write(path, json.dumps(records, indent=1))
    if path.suffix == ".jsonl":
        return write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    dataset = datasets.Dataset.from_dict(as_columns(rows))
    dataset.to_parquet(path) if path.suffix == ".parquet" else dataset.save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "a_folder"])
def test_every_format_gives_texts_verbatim_and_string_labels_in_sorted_order(tmp_path, name):
    source = read_source(save(tmp_path / name, TRAPS), objective="classification")
    assert list(source.texts) == [(text,) for text, _ in TRAPS]
    assert list(source.labels) == [{"neg": 0, "pos": 1}[label] for _, label in TRAPS]
    assert (source.label_names, source.num_labels, source.name) == (("neg", "pos"), 2, name)
    assert (source.text_columns, source.label_column) == (("text",), "label")
    assert source.fingerprint == read_source(save(tmp_path / "b.tsv", TRAPS), objective="classification").fingerprint


def test_a_text_file_is_paragraphs_or_lines(tmp_path):
    paragraphs = write(tmp_path / "a.txt", "\ufeffone\r\n  two\r\n \t\r\nthree\r\n\r\n\r\nfour\n")
    assert texts(paragraphs) == [("one two",), ("three",), ("four",)]
    assert texts(write(tmp_path / "b.txt", "one\ntwo  words \nthree\n\n")) == [("one",), ("two  words",), ("three",)]


def test_a_lone_quote_in_a_tsv_field_swallows_nothing(tmp_path):
    content = 'sentence1\tsentence2\tlabel\n"open\tplain\t0\nfive\' 3" tall\t"closed"\t1\n"\t"\t1\n'
    source = read_source(write(tmp_path / "a.tsv", content), objective="classification")
    assert list(source.texts) == [('"open', "plain"), ("five' 3\" tall", '"closed"'), ('"', '"')]
    assert list(source.labels) == [0, 1, 1]


def test_a_csv_quotes_delimiters_line_breaks_and_quotes(tmp_path):
    rows = [('a, "b"\nc', "0"), ("d", "1"), ("x" * 200_000, "1")]
    limit = csv.field_size_limit()
    assert texts(as_csv(tmp_path / "a.csv", rows)) == [(text,) for text, _ in rows]
    assert csv.field_size_limit() == limit


def test_a_csv_with_tabs_and_no_comma_in_its_header_is_tab_separated_with_quoting(tmp_path):
    rows = [(0, "7c", "yes, \t indeed", 3), (1, "2d", 'the "best"', 0)]
    path = as_csv(tmp_path / "a.csv", rows, header=("", "id", "sentence", "sentiment"), delimiter="\t")
    source = read_source(path, objective="regression")
    assert list(source.texts) == [("yes, \t indeed",), ('the "best"',)]
    assert list(source.labels) == [3.0, 0.0]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.json", "a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, name):
    body = save(tmp_path / name, [("one", "0"), ("two", "1")]).read_bytes() if name != "a.txt" else b"one\ntwo"
    assert texts(write(tmp_path / name, b"\xef\xbb\xbf" + body)) == [("one",), ("two",)]


def test_windows_line_ends_and_blank_lines_are_no_part_of_the_data(tmp_path):
    for name in ("a.tsv", "a.csv"):
        content = save(tmp_path / name, [("one", "0"), ("two", "1")]).read_text().replace("\n", "\r\n") + "\r\n\r\n"
        source = read_source(write(tmp_path / name, content), objective="classification")
        assert (list(source.texts), list(source.labels)) == ([("one",), ("two",)], [0, 1])


def test_a_json_file_may_hold_one_object_per_line_and_leave_keys_out(tmp_path):
    path = write(tmp_path / "a.json", '{"text": "one"}\n\n{"text": "two", "label": 1}\n')
    assert texts(path) == [("one",), ("two",)]
    assert refused(path) == "Every example needs a label, but row 1, column 'label' of a.json has none."


def test_text_that_is_not_utf8_is_refused_with_its_offset(tmp_path):
    for name in ("a.txt", "a.tsv", "a.csv", "a.jsonl"):
        assert refused(write(tmp_path / name, b"\xef\xbb\xbftext\ncaf\xe9\n"), "mlm") == (
            f"{name} must be UTF-8, but the byte at offset 11 (0xe9) is not; convert it, for example with iconv."
        )


def test_class_names_of_a_dataset_keep_their_ids(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["yes", "no", "maybe"]))
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    dataset.with_format("torch").save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "saved.parquet")
    for name in ("saved", "saved.parquet"):
        source = read_source(tmp_path / name, objective="classification")
        assert (list(source.labels), source.label_names) == ([1, 0], ("yes", "no", "maybe"))


def test_a_shuffled_dataset_is_read_in_its_own_order(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(20)]}).shuffle(seed=1).select(range(5, 15))
    dataset.save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == [(text,) for text in dataset["text"]]


def test_a_split_of_a_dataset_dict(tmp_path):
    parts = {part: datasets.Dataset.from_dict({"text": [part]}) for part in ("train", "dev")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(dev=parts["dev"]).save_to_disk(tmp_path / "one")
    source = read_source(f"{tmp_path}/both:dev", objective="mlm")
    assert (list(source.texts), source.name) == ([("dev",)], "both:dev")
    assert read_source(tmp_path / "one", objective="mlm").name == "one:dev"
    for wrong in (f"{tmp_path}/both", f"{tmp_path}/both:test"):
        assert refused(wrong, "mlm") == "both holds the splits train, dev; choose one as both:train."


def test_reading_files_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    paths = {save(tmp_path / f"a.{suffix}", TRAPS) for suffix in ("csv", "tsv", "json", "jsonl", "parquet")}
    for path in paths:
        read_source(path, objective="classification")
    assert set(tmp_path.iterdir()) == paths


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("text sentence sentence2 sentence1", ("sentence1", "sentence2")),
        ("text sentence sentence1", ("sentence",)),
        ("other text", ("text",)),
    ],
)
def test_default_text_columns(tmp_path, header, expected):
    path = write(tmp_path / "a.tsv", "\n".join(["\t".join(header.split())] * 2))
    source = read_source(path, objective="mlm")
    assert source.text_columns == expected
    assert list(source.texts) == [expected]


def test_chosen_columns(tmp_path):
    path = write(tmp_path / "a.tsv", "Quality\t#1 String\t#2 String\n1\ta\tb\n0\tc\td\n")
    pair = ("#2 String", "#1 String")
    source = read_source(path, objective="classification", text_columns=pair, label_column="Quality")
    assert (list(source.texts), list(source.labels)) == ([("b", "a"), ("d", "c")], [1, 0])
    assert texts(path, text_columns="#1 String") == [("a",), ("c",)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {},
            "a.tsv has no column sentence1 with sentence2, sentence or text; it has 'Quality', '#1 String', 'y'; "
            "choose with --text-columns.",
        ),
        (
            {"text_columns": ["#1 String", "#2 String"]},
            "a.tsv has no column '#2 String'; it has 'Quality', '#1 String', 'y'; choose with --text-columns.",
        ),
        ({"text_columns": ["y", "y", "y"]}, "--text-columns takes one or two columns, got 3."),
        (
            {"text_columns": ["#1 String"]},
            "classification needs labels, but a.tsv has no column label or labels; it has 'Quality', '#1 String', 'y'; "
            "choose with --label-column.",
        ),
        (
            {"text_columns": ["#1 String"], "label_column": "quality"},
            "a.tsv has no column 'quality'; it has 'Quality', '#1 String', 'y'; choose with --label-column.",
        ),
    ],
)
def test_a_missing_column_is_named_with_those_there_are(tmp_path, options, sentence):
    assert refused(write(tmp_path / "a.tsv", "Quality\t#1 String\ty\n1\ta\t0\n"), **options) == sentence


@pytest.mark.parametrize("column", ["label", "labels", "similarity", "score", "sentiment"])
def test_regression_finds_its_label_column_and_reads_numbers(tmp_path, column):
    path = write(tmp_path / "a.csv", f"text,{column}\na,4.6\nb,-1\nc,1e-2\n")
    source = read_source(path, objective="regression")
    assert (list(source.labels), source.label_names, source.num_labels) == ([4.6, -1.0, 0.01], None, None)


@pytest.mark.parametrize(
    ("labels", "ids", "names"),
    [
        (["1", "0", "2"], [1, 0, 2], ("0", "1", "2")),
        ([2, 0, 1], [2, 0, 1], ("0", "1", "2")),
        (["10", *map(str, range(10))], [10, *range(10)], tuple(map(str, range(11)))),
        ([" b", "a", "b "], [1, 0, 1], ("a", "b")),
        ([True, False], [1, 0], ("0", "1")),
        (["1", "one"], [0, 1], ("1", "one")),
    ],
)
def test_class_labels(tmp_path, labels, ids, names):
    path = write(tmp_path / "a.json", json.dumps([{"text": "t", "label": label} for label in labels]))
    source = read_source(path, objective="classification")
    assert (list(source.labels), source.label_names) == (ids, names)


@pytest.mark.parametrize(
    ("objective", "labels", "sentence"),
    [
        (
            "classification",
            [0, -1, 1],
            "A label of -1 marks an unlabelled example, as in the test sets of GLUE, and column 'label' of a.json "
            "holds it; use a labelled split.",
        ),
        (
            "regression",
            ["-1", "-1"],
            "A label of -1 marks an unlabelled example, as in the test sets of GLUE, and column 'label' of a.json "
            "holds it; use a labelled split.",
        ),
        (
            "classification",
            [1, 2, 2],
            "Integer labels must be 0 to C-1 for C classes, each of them present, but column 'label' of a.json holds "
            "1, 2; renumber them, or write the classes as names.",
        ),
        (
            "classification",
            ["4.6", "1.0"],
            "Classes are integers or names, but column 'label' of a.json holds numbers such as 4.6; "
            "write them as integers, or use regression.",
        ),
        ("classification", [0, " "], "Every example needs a label, but row 2, column 'label' of a.json has none."),
        ("regression", [0, None], "Every example needs a label, but row 2, column 'label' of a.json has none."),
        ("regression", [float("nan")], "Every example needs a label, but row 1, column 'label' of a.json has none."),
        (
            "regression",
            [1, "high"],
            "regression needs finite numbers, but row 2, column 'label' of a.json holds 'high'.",
        ),
        ("regression", [1, "inf"], "regression needs finite numbers, but row 2, column 'label' of a.json holds 'inf'."),
        (
            "classification",
            [[0, 1]],
            "A label must be a name or a number, but row 1, column 'label' of a.json holds [0, 1].",
        ),
    ],
)
def test_labels_that_are_refused(tmp_path, objective, labels, sentence):
    path = write(tmp_path / "a.json", json.dumps([{"text": "t", "label": label} for label in labels]))
    assert refused(path, objective) == sentence


@pytest.mark.parametrize("blank", ["", "  ", None])
def test_blank_texts_are_skipped_for_language_models_and_refused_with_labels(tmp_path, blank):
    rows = [("a", "b"), ("c", blank), ("d", "e")]
    records = [{"sentence1": a, "sentence2": b, "label": 0} for a, b in rows]
    path = write(tmp_path / "a.json", json.dumps(records))
    for objective in LM_OBJECTIVES:
        assert texts(path, objective=objective) == [("a", "b"), ("d", "e")]
    assert refused(path) == "Every example needs a text, but row 2, column 'sentence2' of a.json has none."


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "", "Data must hold at least one example, but a.csv is empty."),
        ("a.json", "[]", "Data must hold at least one example, but a.json is empty."),
        ("a.tsv", "text\n", "Data must hold at least one example, but column 'text' of a.tsv is empty."),
        ("a.txt", " \n\n", "Data must hold at least one example, but column 'text' of a.txt is empty."),
        ("a.tsv", "text\tid\na\n", "The header of a.tsv names 2 columns, but row 1 has 1."),
        ("a.csv", "text,id\na,1\nb,1,2\n", "The header of a.csv names 2 columns, but row 2 has 3."),
        ("a.csv", "text,text\n", "Columns must have different names, but the header of a.csv repeats 'text'."),
        ("a.csv", 'text,id\n"a,1\nb,2\n', "a.csv is not valid CSV up to line 3: unexpected end of data."),
        (
            "a.json",
            '{"text": "a"',
            "a.json must hold a list of objects, or one object per line: Expecting ',' delimiter: line 1 column 13.",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n{broken}\n',
            "a.jsonl must hold a list of objects, or one object per line: Expecting property name enclosed in double "
            "quotes: line 2 column 2.",
        ),
        (
            "a.csv",
            "text;id\na;1\n",
            "a.csv has no column sentence1 with sentence2, sentence or text; it has 'text;id'; it looks separated by "
            "';', write it with commas.",
        ),
        ("a.jsonl", '{"text": "a"}\n"b"\n', "a.jsonl must hold one object per example, but row 2 is 'b'."),
        ("a.jsonl", '{"text": 3}', "A text must be a string, but row 1, column 'text' of a.jsonl holds 3."),
        (
            "a.xlsx",
            "x",
            "The name of a data file must end in .txt, .csv, .tsv, .json, .jsonl, .parquet; got a.xlsx.",
        ),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, sentence):
    assert refused(write(tmp_path / name, content), "mlm") == sentence


def test_places_that_are_refused(tmp_path):
    write(tmp_path / "a.txt", "text")
    (tmp_path / "empty").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "plain")
    assert refused(f"{tmp_path}/a.txt:train", "mlm") == "a.txt is a file and has no splits; leave out ':train'."
    assert refused(f"{tmp_path}/plain:train", "mlm") == "The folder plain has no splits; leave out ':train'."
    assert refused(tmp_path / "empty", "mlm") == (
        "A data folder must be made by save_to_disk of the datasets library, but empty holds no state.json; "
        "give one of its files instead."
    )
    assert refused(write(tmp_path / "a.parquet", "text"), "mlm").startswith(
        "a.parquet is not a readable Parquet file: "
    )
    assert refused("builtin:books", "mlm") == (
        "Built-in data is builtin:docs, builtin:acceptability, builtin:pairs, builtin:similarity, builtin:topic (the "
        "held-out part), or one of them and /train; got 'builtin:books'."
    )


def test_an_unknown_objective_is_refused_with_the_five_names(forty, bert):
    sentence = "objective must be one of mlm, causal-lm, seq2seq-lm, classification, regression; got 'clm'."
    assert refused(forty, "clm") == sentence
    assert message(ValueError, load_batches, forty, bert, objective="clm") == sentence


def test_the_fingerprint_covers_texts_labels_and_names(tmp_path):
    rows = [("a", "x"), ("b", "y")]
    variants = [rows, rows[::-1], [("a", "x"), ("b", "x")], [("a", "x"), ("b", "z")], [("a", "x"), ("c", "y")]]
    paths = [save(tmp_path / f"{i}.tsv", variant) for i, variant in enumerate(variants)]
    fingerprints = {read_source(path, objective="classification").fingerprint for path in paths}
    fingerprints |= {
        read_source(paths[0], objective="mlm", text_columns=c).fingerprint for c in ("text", ("text", "label"))
    }
    assert len(fingerprints) == len(variants) + 2
    assert all(re.fullmatch("[0-9a-f]{16}", fingerprint) for fingerprint in fingerprints)
    assert read_source(paths[0], objective="mlm").fingerprint == hashlib.sha256(b"a\0b\0").hexdigest()[:16]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with four data sets; the fixture's value is the list of what was asked."""
    held = {("imdb",), ("glue", "mrpc"), ("owner/name",), ("owner/name", "config")}
    asked = []

    def load_dataset(*path, split, revision):
        asked.append((*path, split, revision))
        if path not in held:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path[0]}' doesn't exist on the Hub.")
        if split == "none":
            raise ValueError('Unknown split "none".\nShould be one of [train].')
        return datasets.Dataset.from_dict({"text": ["/".join(path)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(
    ("data", "revision", "asked", "name"),
    [
        ("imdb", None, [("imdb", "train", None)], "imdb:train"),
        ("imdb:test", None, [("imdb", "test", None)], "imdb:test"),
        ("imdb:train[:10%]", None, [("imdb", "train[:10%]", None)], "imdb:train[:10%]"),
        ("imdb@refs/pr/1:test", "main", [("imdb", "test", "refs/pr/1")], "imdb@refs/pr/1:test"),
        ("imdb", "main", [("imdb", "train", "main")], "imdb@main:train"),
        ("owner/name", None, [("owner/name", "train", None)], "owner/name:train"),
        ("owner/name/config:dev", None, [("owner/name", "config", "dev", None)], "owner/name/config:dev"),
        (
            "glue/mrpc@abc:validation",
            None,
            [("glue/mrpc", "validation", "abc"), ("glue", "mrpc", "validation", "abc")],
            "glue/mrpc@abc:validation",
        ),
    ],
)
def test_hub_names(hub, data, revision, asked, name):
    source = read_source(data, objective="mlm", revision=revision)
    assert (hub, source.name) == (asked, name)
    assert list(source.texts) == [("/".join(asked[-1][:-2]),)]


@pytest.mark.parametrize(
    "data", ["a.csv", "a.parquet:train", "./glue/mrpc", "../a", "/a/b", "~/nothing", Path("glue/mrpc")]
)
def test_a_missing_file_is_never_asked_of_the_hub(hub, data):
    assert message(FileNotFoundError, read_source, data, objective="mlm") == (
        f"There is no file or folder {data}; give one, a Hub name or builtin:docs."
    )
    assert hub == []


def test_a_local_folder_is_never_taken_for_a_hub_name(hub, tmp_path):
    (tmp_path / "glue").mkdir()
    assert refused("glue/mrpc", "mlm") == (
        "'glue/mrpc' could mean the Hub or the local 'glue'; rename that, or write ./glue."
    )


def test_what_the_hub_refuses_is_one_sentence(hub):
    assert message(FileNotFoundError, read_source, "super/glue", objective="mlm") == (
        "'super/glue' is neither a file here nor a data set of the Hub: "
        "Dataset 'super/glue' doesn't exist on the Hub.; Dataset 'super' doesn't exist on the Hub."
    )
    assert refused("imdb:none", "mlm") == (
        "'imdb:none' cannot be read from the Hub: Unknown split \"none\". Should be one of [train]."
    )
    assert refused("a/b/c/d", "mlm") == (
        "Data is a file, a folder, or a Hub name such as name/config@revision:split; got 'a/b/c/d'."
    )


def test_the_parts_of_the_documentation_are_large_and_disjoint():
    held_out, train = docs.passages("held-out"), docs.passages("train")
    assert len(held_out) >= 512
    assert len(train) >= 3000
    assert not {p.source for p in held_out} & {p.source for p in train}
    assert not {p.text for p in held_out} & {p.text for p in train}


def test_the_documentation_as_a_source():
    for name, part in (("builtin:docs", "held-out"), ("builtin:docs/train", "train")):
        source = read_source(name, objective="mlm")
        assert list(source.texts) == [(p.text,) for p in docs.passages(part)]
        assert (source.name, source.fingerprint) == (name, docs.fingerprint(part))
    assert refused("builtin:docs") == (
        "classification needs labels, but builtin:docs has no column label or labels; it has 'text'; "
        "choose with --label-column."
    )


@pytest.fixture
def tokenizers(bert, gpt, t5) -> dict[str, PreTrainedTokenizerFast]:
    return {"mlm": bert, "causal-lm": gpt, "seq2seq-lm": t5, "classification": bert, "regression": bert}


@pytest.fixture
def forty(tmp_path) -> Path:
    """Forty labelled texts of two to fifty words."""
    generator = np.random.default_rng(1)
    lines = [" ".join(generator.choice(WORDS, size=generator.integers(2, 51))) for _ in range(40)]
    return save(tmp_path / "forty.tsv", [(line, i % 3) for i, line in enumerate(lines)])


@pytest.fixture
def load(forty, tokenizers):
    def load_forty(objective: str, **options) -> Batches:
        return load_batches(forty, tokenizers[objective], objective=objective, **options)

    return load_forty


def places(batches: Batches) -> list[list[int]]:
    """For every batch served, the positions of its rows among the examples, which must all differ."""
    known = {example["input_ids"].tobytes(): i for i, example in enumerate(batches.examples)}
    assert len(known) == batches.num_examples
    rows = [zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True) for batch in batches]
    return [[known[tokens[real].numpy().tobytes()] for tokens, real in batch] for batch in rows]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_are_the_examples_padded_on_the_right(load, tokenizers, objective):
    batches = load(objective, batch_size=7)
    served, chosen = list(batches), places(batches)
    assert sorted(len(batch["labels"]) for batch in served) == [5, 7, 7, 7, 7, 7]
    assert (len(batches), batches.num_examples, batches.batch_size) == (6, 40, 7)
    assert sorted(i for rows in chosen for i in rows) == list(range(40))
    pad = 5 if objective == "causal-lm" else 0  # GPT-2 has no padding token and borrows the end of text
    fill = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
    for batch, positions in zip(served, chosen, strict=True):
        rows = [batches.examples[i] for i in positions]
        for name, tensor in batch.items():
            assert tensor.dtype == (torch.float32 if objective == "regression" and name == "labels" else torch.int64)
            for row, example in zip(tensor.tolist(), rows, strict=True):
                expected = example[name].tolist()
                if isinstance(expected, list):
                    width = max(len(other[name]) for other in rows)
                    expected = expected + [fill[name]] * (width - len(expected))
                assert row == expected
    assert tokenizers["causal-lm"].pad_token is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_fourth_batch_takes_neighbours_in_length_of_one_part_of_a_window(load, objective, monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW", 8)
    batches = load(objective, batch_size=3)
    target = objective == "seq2seq-lm"
    lengths = [len(e["input_ids"]) + (len(e["labels"]) if target else 0) for e in batches.examples]
    served = places(batches)
    assert len(served) == 14
    assert sorted(i for rows in served[:8] for i in rows) == list(range(24))
    for part in [served[number:end:4] for start, end in ((0, 8), (8, 14)) for number in range(start, start + 4)]:
        for shorter, longer in itertools.pairwise(sorted(part, key=lambda rows: [lengths[i] for i in rows])):
            assert max(lengths[i] for i in shorter) <= min(lengths[i] for i in longer)


def of_lengths(lengths: Sequence[int], batch_size: int) -> Batches:
    rows = [np.arange(length) for length in lengths]
    examples = [{"input_ids": row, "attention_mask": np.ones_like(row), "labels": row} for row in rows]
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return Batches(examples, padding, batch_size, "causal-lm", "mine", "0" * 16, None, {})


def test_every_fourth_batch_is_a_random_choice_of_the_examples():
    """As far from all examples, in length, as the mean of as many numbers without replacement; 4 deviations."""
    count, size, deviations = 256, 4, []
    for seed in range(20):
        lengths = np.random.default_rng(seed).permutation(count) + 1
        served = [lengths[rows].mean() for rows in places(of_lengths(lengths, size))]
        for step in (2, 4):
            wanted = (np.var(lengths) * (step - 1) / (count - 1)) ** 0.5
            deviations += [(np.mean(served[k::step]) - lengths.mean()) / wanted for k in range(step - 1)]
    assert max(map(abs, deviations)) < 4
    assert 0.7 < np.std(deviations) < 1.3


@pytest.mark.parametrize("count", [8, 32, 100, 300])
def test_the_first_batches_have_no_length_of_their_own(count):
    lengths = np.random.default_rng(count).permutation(3 * count) + 1
    served = np.array([lengths[rows].mean() for rows in places(of_lengths(lengths, 3))])
    for first in range(4, count + 1):
        assert 0.6 < served[:first].mean() / lengths.mean() < 1.4


@pytest.mark.parametrize("count", [*range(12), 127, 128, 129, 300])
def test_every_example_is_served_once_whatever_their_number(count):
    for size in (1, 3, 40):
        batches = of_lengths(np.arange(count) + 1, size)
        assert sorted(i for rows in places(batches) for i in rows) == list(range(count))
        assert len(list(batches)) == len(batches) == -(-count // size)


def test_hardly_anything_is_spent_on_padding():
    lengths = np.random.default_rng(0).integers(1, 129, size=1024)
    served = [batch["input_ids"].numel() for batch in of_lengths(lengths, 8)]
    in_order = sum(8 * max(lengths[i : i + 8]) for i in range(0, 1024, 8))
    assert sum(served) < 1.04 * lengths.sum() < 0.6 * in_order


@pytest.mark.parametrize(
    ("objective", "model", "settings"),
    [
        ("mlm", "bert", {"max_position_embeddings": 64}),
        ("causal-lm", "gpt2", {"n_positions": 64}),
        ("seq2seq-lm", "t5", {}),
        ("classification", "bert-classifier", {"max_position_embeddings": 64}),
    ],
)
def test_results_are_those_of_the_examples_in_source_order(load, objective, model, settings):
    batches, model = load(objective, num_examples=10, batch_size=3), built(model, **settings)
    in_order = [batch for example in batches.examples for batch in replace(batches, examples=[example])]
    found, wanted = (estimate_fisher(model, served, engine="loop", progress=False) for served in (batches, in_order))
    assert found.num_examples == wanted.num_examples
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-12)
    options = {"axes": 1, "points": 3, "progress": False}
    found, wanted = (scan_landscape(model, served, **options) for served in (batches, in_order))
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-6)
    assert found.references == pytest.approx(wanted.references, rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_iterating_again_gives_fresh_copies_of_the_same_batches(load, objective):
    batches = load(objective)
    first = list(batches)
    kept = [{name: tensor.clone() for name, tensor in batch.items()} for batch in first]
    for batch in first:
        for tensor in batch.values():
            tensor.zero_()
    assert all(torch.equal(a[name], b[name]) for a, b in zip(kept, batches, strict=True) for name in a)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_example_depends_on_neither_batch_size_nor_subset_nor_loading_order(load, objective):
    everything = load(objective, seed=3)
    subset = load(objective, seed=3, num_examples=11, batch_size=2)
    chosen = sorted(np.random.default_rng(3).permutation(40)[:11].tolist())
    assert equal(subset.examples, [everything.examples[i] for i in chosen])
    assert equal(load(objective, seed=3, batch_size=1).examples, everything.examples)
    smaller = load(objective, seed=3, num_examples=5)
    assert {e["input_ids"].tobytes() for e in smaller.examples} < {e["input_ids"].tobytes() for e in subset.examples}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_fingerprint_knows_the_examples_and_not_the_batch_size(load, objective):
    batches = load(objective)
    assert re.fullmatch("[0-9a-f]{16}", batches.fingerprint)
    other = batches.with_batch_size(5)
    assert (other.batch_size, other.fingerprint) == (5, batches.fingerprint)
    assert load(objective, batch_size=3).fingerprint == batches.fingerprint
    assert load(objective, max_length=20).fingerprint != batches.fingerprint
    assert load(objective, num_examples=39).fingerprint != batches.fingerprint
    drawn = objective in ("mlm", "seq2seq-lm")
    assert (load(objective, seed=1).fingerprint != batches.fingerprint) == drawn


def test_the_fingerprint_knows_the_labels(tmp_path, bert):
    paths = [save(tmp_path / f"{n}.tsv", [("w1 w2", 0), ("w3", n)]) for n in (0, 1)]
    a, b = (load_batches(path, bert, objective="classification") for path in paths)
    assert a.fingerprint != b.fingerprint


def test_batches_say_where_they_come_from(load):
    batches = load("classification", num_examples=30, max_length=20, seed=7)
    assert (batches.source, batches.objective, batches.label_names) == ("forty.tsv", "classification", ("0", "1", "2"))
    assert json.loads(json.dumps(batches.settings)) == {
        "objective": "classification", "num_examples": 30, "max_length": 20, "seed": 7, "text_columns": ["text"],
        "label_column": "label",
    }  # fmt: skip
    assert repr(batches) == "Batches(forty.tsv, classification, 30 examples in batches of 16)"
    assert load("mlm").source_fingerprint == load("mlm", num_examples=3, seed=1).source_fingerprint


def test_a_source_that_is_read_already(tmp_path, bert):
    path = save(tmp_path / "a.tsv", [("w1 w2", 0.5), ("w3", 2)])
    source = read_source(path, objective="regression")
    assert repr(source) == "Source(a.tsv, 2 examples, no classes)"
    assert load_batches(source, bert, objective="mlm").num_examples == 2
    assert [float(e["labels"]) for e in load_batches(source, bert, objective="regression").examples] == [0.5, 2.0]
    assert next(iter(load_batches(source, bert, objective="regression")))["labels"].tolist() == [2.0, 0.5]  # by length
    assert message(ValueError, load_batches, source, bert, objective="classification") == (
        "classification needs labels, but a.tsv was read without them; read it for classification."
    )
    assert message(ValueError, load_batches, source, bert, objective="mlm", label_column="label") == (
        "a.tsv is read already; give text_columns, label_column and revision to read_source."
    )
    own = Source("mine", [("w1",)], None, None, "0" * 16)
    assert load_batches(own, bert, objective="mlm").settings["text_columns"] is None


def test_asking_for_more_examples_than_there_are_takes_all_and_says_so(load, caplog):
    assert load("mlm", num_examples=40).num_examples == 40
    assert caplog.messages == []
    assert load("mlm", num_examples=41).num_examples == 40
    assert caplog.messages == ["forty.tsv holds 40 examples, 41 were asked for; all are used."]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0."),
        ({"num_examples": 0}, "num_examples must be at least 1, got 0."),
        ({"seed": -1}, "seed must be at least 0, got -1."),
        ({"max_length": 65}, "max_length must be at most 64, which is what the tokenizer allows; got 65."),
        ({"max_length": 2}, "max_length must leave room for text beside 2 special tokens, got 2."),
    ],
)
def test_arguments_out_of_range(load, options, sentence):
    assert message(ValueError, load, "mlm", **options) == sentence


def test_tokenizers_that_do_not_fit(forty, bert, gpt):
    assert message(ValueError, load_batches, forty, gpt, objective="mlm") == (
        "mlm needs a tokenizer with a mask token, but this one has none; use causal-lm or seq2seq-lm."
    )
    assert message(ValueError, load_batches, forty, bert, objective="seq2seq-lm") == (
        "seq2seq-lm needs a tokenizer with an end-of-sequence token, but this one has none."
    )
    plain = Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0"))
    assert message(
        ValueError, load_batches, forty, PreTrainedTokenizerFast(tokenizer_object=plain), objective="seq2seq-lm"
    ) == (
        "seq2seq-lm of one text column needs the sentinels <extra_id_0>, <extra_id_1>, … of T5, but this tokenizer has "
        "none; use one of T5, or give an input and a target column with --text-columns."
    )
    assert (
        message(ValueError, load_batches, forty, PreTrainedTokenizerFast(tokenizer_object=plain), objective="causal-lm")
        == "Batches need a tokenizer with a padding or end-of-sequence token, but this one has neither."
    )


def test_the_default_length_is_128_or_what_the_tokenizer_allows(tmp_path, bert, gpt):
    path = write(tmp_path / "long.txt", " ".join(WORDS * 3))
    assert len(load_batches(path, bert, objective="mlm").examples[0]["input_ids"]) == 64
    assert len(load_batches(path, gpt, objective="causal-lm").examples[0]["input_ids"]) == 128
    assert len(load_batches(path, gpt, objective="causal-lm", max_length=200).examples[0]["input_ids"]) == 200


def test_sentence_pairs_have_types_and_are_cut_to_the_length(tmp_path, bert):
    path = write(tmp_path / "a.tsv", f"sentence1\tsentence2\tlabel\nw0 w1\tw2\t1.5\n{' '.join(WORDS)}\tw2\t0\n")
    short, long = load_batches(path, bert, objective="regression", max_length=10).examples
    assert bert.convert_ids_to_tokens(short["input_ids"]) == ["[CLS]", "w0", "w1", "[SEP]", "w2", "[SEP]"]
    assert short["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]
    assert len(long["input_ids"]) == 10
    masked = load_batches(path, bert, objective="mlm").examples[0]
    assert masked["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]


def ids_of(text: str, tokenizer) -> list[int]:
    return tokenizer.convert_tokens_to_ids(text.split())


def test_mlm_masks_every_text_by_its_own_generator(load, forty, bert):
    special = frozenset(range(len(SPECIAL)))
    for position, ((text,), example) in enumerate(zip(texts(forty), load("mlm", seed=5).examples, strict=True)):
        clean = np.array([2, *ids_of(text, bert), 3])
        generator = example_generator(5, position)
        corrupted, labels = mask_tokens(clean, generator, mask_id=4, special_ids=special, vocabulary_size=len(bert))
        assert np.array_equal(example["input_ids"], corrupted)
        assert np.array_equal(example["labels"], labels)
        assert np.array_equal(np.where(labels == IGNORED, corrupted, labels), clean)


def test_mlm_chooses_15_percent_and_splits_them_80_10_10(tmp_path, bert):
    generator = np.random.default_rng(2)
    path = write(tmp_path / "a.txt", "\n".join(" ".join(generator.choice(WORDS, size=60)) for _ in range(500)))
    examples = load_batches(path, bert, objective="mlm").examples
    inputs, labels = (np.concatenate([example[name] for example in examples]) for name in ("input_ids", "labels"))
    total, chosen = 500 * 60, labels != IGNORED
    drawn = int(chosen.sum())

    def within_four_deviations(count: int, n: int, p: float) -> bool:
        return abs(count - n * p) < 4 * (n * p * (1 - p)) ** 0.5

    assert within_four_deviations(drawn, total, 0.15)
    kept = 0.1 + 0.1 / len(WORDS)  # a random token may be the token itself
    assert within_four_deviations(int((inputs == 4)[chosen].sum()), drawn, 0.8)
    assert within_four_deviations(int((inputs == labels)[chosen].sum()), drawn, kept)
    replaced = inputs[chosen & (inputs != 4) & (inputs != labels)]
    assert replaced.min() >= len(SPECIAL)
    assert len(set(replaced.tolist())) > 0.9 * len(WORDS)


def test_mlm_never_touches_special_tokens_not_even_those_without_a_role(tmp_path, bert):
    line = " ".join(SPECIAL[:4] + SPECIAL[5:]) + " w1"
    path = write(tmp_path / "a.txt", "\n".join([line] * 200))
    labels = np.concatenate([e["labels"] for e in load_batches(path, bert, objective="mlm").examples])
    assert set(labels.tolist()) == {IGNORED, bert.convert_tokens_to_ids("w1")}


def test_causal_labels_are_the_inputs_unshifted(load, forty, gpt, tmp_path):
    for (text,), example in zip(texts(forty), load("causal-lm").examples, strict=True):
        assert example["input_ids"].tolist() == example["labels"].tolist() == ids_of(text, gpt)
        assert example.keys() == {"input_ids", "attention_mask", "labels"}
    pair = write(tmp_path / "a.tsv", "sentence1\tsentence2\nw0 w1\tw2\n")
    assert load_batches(pair, gpt, objective="causal-lm").examples[0]["labels"].tolist() == ids_of("w0 w1 w2", gpt)


def test_causal_batches_have_no_token_types_even_if_the_tokenizer_makes_them(forty, t5):
    assert "token_type_ids" in t5("w1")
    batch = next(iter(load_batches(forty, t5, objective="causal-lm")))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}


def test_a_text_that_leaves_no_token_still_makes_a_batch_that_models_can_run(tmp_path, gpt):
    path = write(tmp_path / "a.txt", "\u200b")
    batch = next(iter(load_batches(path, gpt, objective="causal-lm")))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5]], "attention_mask": [[0]], "labels": [[IGNORED]],
    }  # fmt: skip


def spans(tokens: list[int], sentinels: list[int]) -> dict[int, list[int]]:
    """What follows each sentinel."""
    found: dict[int, list[int]] = {}
    for token in tokens:
        if token in sentinels:
            found[token] = []
        elif found:
            found[next(reversed(found))].append(token)
    return found


def test_span_corruption_can_be_undone(load, forty, t5):
    sentinels = t5.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(10)])
    several = 0
    for (text,), example in zip(texts(forty), load("seq2seq-lm").examples, strict=True):
        assert example.keys() == {"input_ids", "attention_mask", "labels"}
        *inputs, inputs_end = example["input_ids"].tolist()
        *targets, targets_end = example["labels"].tolist()
        assert inputs_end == targets_end == t5.eos_token_id
        lost = spans(targets, sentinels)
        used = [token for token in inputs if token in sentinels]
        assert list(lost) == sentinels[: len(used) + 1]
        assert used == sentinels[: len(used)]
        assert all(lost[sentinel] for sentinel in used)
        assert lost[sentinels[len(used)]] == []
        restored = [t for token in inputs for t in (lost[token] if token in sentinels else [token])]
        assert restored == ids_of(text, t5)
        assert sum(map(len, lost.values())) == max(1, round(0.15 * len(restored)))
        several += len(used) > 1
    assert several > 10


def test_span_corruption_draws_by_position_and_cuts_to_the_length(load, forty, t5):
    sentinels = t5.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(10)])
    for position, ((text,), example) in enumerate(
        zip(texts(forty), load("seq2seq-lm", seed=4, max_length=21).examples, strict=True)
    ):
        tokens = np.array(ids_of(text, t5)[:20])
        inputs, targets = corrupt_spans(tokens, example_generator(4, position), sentinels=sentinels)
        assert example["input_ids"].tolist() == [*inputs, 5]
        assert example["labels"].tolist() == [*targets, 5]


def test_two_columns_are_source_and_target(tmp_path, t5):
    path = write(tmp_path / "a.tsv", f"de\ten\nw0 w1\tw2\nw3\t{' '.join(WORDS)}\n")
    options = {"objective": "seq2seq-lm", "text_columns": ("de", "en"), "max_length": 10}
    short, long = load_batches(path, t5, **options).examples
    assert short["input_ids"].tolist() == [*ids_of("w0 w1", t5), 5]
    assert short["labels"].tolist() == [*ids_of("w2", t5), 5]
    assert long["labels"].tolist() == [*ids_of(" ".join(WORDS[:9]), t5), 5]
    assert short.keys() == {"input_ids", "attention_mask", "labels"}


def test_reading_a_source_needs_no_torch():
    code = """
import sys
from fisherscope.data import sources
print(*{"torch", "transformers", "datasets"} & set(sys.modules))
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "\n"
