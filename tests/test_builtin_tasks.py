"""The labelled tasks made from the standard library's documentation: what the labels mean, and what does not leak."""

import difflib
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest

from fisherscope.builtin import docs, tasks
from fisherscope.data import tasks as data_tasks
from fisherscope.data.sources import Source, read_source
from fisherscope.metrics import CLASSIFICATION, REGRESSION

TASKS = tuple(tasks.TASKS)
PARTS = ("", "/train")


@cache
def source(task: str, part: str = "") -> Source:
    return read_source(f"builtin:{task}{part}", objective="regression" if task == "similarity" else "classification")


def sentences(passage: docs.Passage) -> list[str]:
    return re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", passage.text)


def originals(part: str) -> set[str]:
    return {s for p in docs.passages("train" if part else "held-out") for s in sentences(p)}


def labels(data: Source) -> np.ndarray:
    assert data.labels is not None
    return np.array(data.labels)


def best_rule(feature: np.ndarray, label: np.ndarray) -> float:
    """Accuracy of the best threshold on a feature, in either direction."""
    above = [np.mean((feature >= threshold) == label) for threshold in np.unique(feature)]
    return max(max(above), 1 - min(above))


def chance(label: np.ndarray) -> float:
    """What the best threshold on pure noise stays below: the majority and three standard errors."""
    return max(label.mean(), 1 - label.mean()) + 1.5 / np.sqrt(len(label))


@pytest.mark.parametrize("task", TASKS)
def test_sizes_and_columns(task: str) -> None:
    held_out, train = source(task), source(task, "/train")
    assert 500 <= len(held_out.texts) <= 1000 and 2000 <= len(train.texts) <= 8000
    columns = {"acceptability": ("sentence",), "topic": ("text",)}.get(task, ("sentence1", "sentence2"))
    assert held_out.text_columns == train.text_columns == columns
    assert all(text.isascii() and text.strip() for data in (held_out, train) for row in data.texts for text in row)
    assert held_out.label_names == train.label_names and held_out.fingerprint != train.fingerprint


@pytest.mark.parametrize("task", TASKS)
def test_a_built_in_task_is_one_by_name(task: str) -> None:
    """What ``--task`` knows of it is what its examples are."""
    known = data_tasks.TASKS[f"builtin:{task}"]
    assert known.text_columns == source(task).text_columns
    assert known.objective == ("classification" if source(task).label_names else "regression")
    assert set(known.metrics) <= set(CLASSIFICATION if source(task).label_names else REGRESSION)


def test_another_process_makes_the_same_data_without_torch() -> None:
    code = (
        "import sys; from fisherscope.data.sources import read_source\n"
        f"print(*(read_source(f'builtin:{{task}}', objective='regression').fingerprint for task in {TASKS}))\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    here = [read_source(f"builtin:{task}", objective="regression").fingerprint for task in TASKS]
    assert run.stdout.split() == here


@pytest.mark.parametrize("task", TASKS)
def test_no_text_is_in_both_parts_or_twice_in_one(task: str) -> None:
    held_out, train = ({row[0] for row in source(task, part).texts} for part in PARTS)
    assert not held_out & train
    assert (len(held_out), len(train)) == tuple(len(source(task, part).texts) for part in PARTS)
    if task == "pairs":
        seconds = [[row[1] for row in source(task, part).texts] for part in PARTS]
        assert not set(seconds[0]) & (set(seconds[1]) | train) and not set(seconds[1]) & held_out
        assert all(len(set(second)) == len(second) for second in seconds)


@pytest.mark.parametrize("task", ["acceptability", "pairs"])
def test_both_classes_are_equally_frequent(task: str) -> None:
    for part in PARTS:
        assert 0.44 < labels(source(task, part)).mean() < 0.56


@pytest.mark.parametrize("task", TASKS)
def test_one_module_more_changes_few_examples(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = docs.passages("held-out")
    module = Counter(p.source for p in everything if p.source != "os").most_common(8)[-1][0]
    without = tuple(p for p in everything if p.source != module)
    all_rows = set(zip(*tasks.table(task).values(), strict=True))
    monkeypatch.setattr(docs, "passages", lambda part: without)
    rows = set(zip(*tasks.table(task).values(), strict=True))
    removed = len(everything) - len(without)
    assert 0 < len(all_rows - rows) <= 2 * removed and len(rows - all_rows) <= removed


@pytest.mark.parametrize("part", PARTS)
def test_acceptable_sentences_are_the_documentations_own(part: str) -> None:
    data = source("acceptability", part)
    assert data.label_names == ("unacceptable", "acceptable")
    written = originals(part)
    bags = {tuple(sorted(sentence.split())) for sentence in written}
    for (text,), label in zip(data.texts, labels(data), strict=True):
        assert (text in written) == bool(label)
        assert tuple(sorted(text.split())) in bags
    assert len({tuple(sorted(text.split())) for (text,) in data.texts}) == len(data.texts)  # one version of each


def test_unacceptable_sentences_keep_capitals_and_punctuation_in_place() -> None:
    data = source("acceptability")
    shape = {re.sub(r"(?<!\S)[a-z]+(?!\S)", "w", sentence) for sentence in originals("")}
    assert all(re.sub(r"(?<!\S)[a-z]+(?!\S)", "w", text) in shape for (text,) in data.texts)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("task", ["acceptability", "pairs"])
def test_no_trivial_rule_tells_the_classes(task: str, part: str) -> None:
    data = source(task, part)
    label = labels(data)
    features = [
        len,
        lambda t: len(t.split()),
        lambda t: sum(map(str.isupper, t)),
        lambda t: t.count(","),
        lambda t: t[-1] == ":",
        lambda t: t[0].isupper(),
        lambda t: t.count('"'),
        lambda t: t.count("the"),
    ]
    for feature, column in product(features, range(len(data.texts[0]))):
        values = np.array([feature(row[column]) for row in data.texts])
        assert best_rule(values, label) < chance(label)


@pytest.mark.parametrize("part", PARTS)
def test_consecutive_pairs_are_and_unrelated_ones_are_not(part: str) -> None:
    data = source("pairs", part)
    assert data.label_names == ("unrelated", "consecutive")
    passages = docs.passages("train" if part else "held-out")
    neighbours = {pair for passage in passages for pair in pairwise(sentences(passage))}
    passage_of = {sentence: passage for passage in passages for sentence in sentences(passage)}
    same_module = 0
    for (first, second), label in zip(data.texts, labels(data), strict=True):
        assert ((first, second) in neighbours) == bool(label)
        if not label:
            assert passage_of[first] is not passage_of[second]
            same_module += passage_of[first].source == passage_of[second].source
    assert 0.05 < same_module / (labels(data) == 0).sum() < 0.6


def test_shared_words_alone_do_not_solve_pairs() -> None:
    data = source("pairs", "/train")
    words = [[set(re.findall(r"\w+", text.lower())) for text in row] for row in data.texts]
    overlap = np.array([len(a & b) / max(1, len(a | b)) for a, b in words])
    assert best_rule(overlap, labels(data)) < 0.70


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    for i, j in product(range(len(first)), range(len(second))):
        table[i + 1, j + 1] = table[i, j] + 1 if first[i] == second[j] else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


def test_similarity_is_the_share_of_words_left_in_order() -> None:
    data = source("similarity")
    assert data.label_names is None and not {row[0] for row in data.texts} - originals("")
    for (sentence, edited), label in list(zip(data.texts, labels(data), strict=True))[:150]:
        a, b = sentence.split(), edited.split()
        assert label == pytest.approx(5 * 2 * longest_common_subsequence(a, b) / (len(a) + len(b)))
        assert label >= 5 * difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() - 1e-9


def test_similarity_of_sentences_one_can_check_by_hand() -> None:
    assert tasks.similarity("a b c d", "a b c d") == 5
    assert tasks.similarity("a b c d", "x y") == 0
    assert tasks.similarity("a b c d", "a x d") == pytest.approx(5 * 2 * 2 / 7)
    assert tasks.similarity("a b c d", "c d a b") == pytest.approx(2.5)


def test_similarity_is_spread_over_its_range() -> None:
    for part in PARTS:
        label = labels(source("similarity", part))
        assert label.min() >= 0 and label.max() <= 5
        assert (np.histogram(label, 5, (0, 5))[0] > 0.08 * len(label)).all()


def test_similarity_is_more_than_which_words_occur() -> None:
    data = source("similarity")
    overlap = [len(set(a.split()) & set(b.split())) / len(set(a.split()) | set(b.split())) for a, b in data.texts]
    lengths = [len(b) / len(a) for a, b in data.texts]
    assert np.corrcoef(overlap, labels(data))[0, 1] < 0.97
    assert np.corrcoef(lengths, labels(data))[0, 1] < 0.75


@pytest.mark.parametrize("part", PARTS)
def test_topics_are_areas_of_modules(part: str) -> None:
    data = source("topic", part)
    assert data.label_names is not None and 4 <= len(data.label_names) <= 6
    area = {p.text: p.source.split(".")[0] for p in docs.passages("train" if part else "held-out")}
    found: dict[str, set[int]] = {}
    for (text,), label in zip(data.texts, labels(data), strict=True):
        found.setdefault(area[text], set()).add(int(label))
    assert all(len(classes) == 1 for classes in found.values())
    assert found["topics"] == {data.label_names.index("language")}
    assert found["email"] == found["urllib"] == {data.label_names.index("network")}
    shares = np.bincount(labels(data), minlength=len(data.label_names)) / len(data.texts)
    assert shares.min() > 0.04 and shares.max() < 0.45


def test_no_module_is_in_two_areas() -> None:
    modules = [module for names in tasks.AREAS.values() for module in names.split()]
    assert len(set(modules)) == len(modules)


@pytest.mark.parametrize("task", TASKS)
def test_examples_of_all_classes_are_mixed(task: str) -> None:
    label = labels(source(task, "/train"))
    half = len(label) // 2
    assert abs(label[:half].mean() - label[half:].mean()) < 0.25 * label.std()


def test_unknown_names_are_refused_in_a_sentence() -> None:
    for name in ("books", "pairs/test", "docs/", "pairs/train/x", ""):
        with pytest.raises(ValueError) as refusal:
            read_source(f"builtin:{name}", objective="classification")
        assert str(refusal.value) == (
            "Built-in data is builtin:docs, builtin:acceptability, builtin:pairs, builtin:similarity, builtin:topic "
            f"(the held-out part), or one of them and /train; got 'builtin:{name}'."
        )
    with pytest.raises(ValueError, match=r"^A built-in task is one of acceptability, pairs, .*; got 'mnli'\.$"):
        tasks.table("mnli")
    with pytest.raises(ValueError, match="part must be 'held-out' or 'train', got 'validation'"):
        tasks.table("pairs", "validation")  # pyright: ignore[reportArgumentType]
