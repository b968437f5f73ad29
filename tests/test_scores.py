"""Fisher scores as a value and as a file."""

import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import batched, case, contents
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisherscope import storage
from fisherscope._machine import forget_peak, peak_memory
from fisherscope.fisher import estimate_fisher
from fisherscope.scores import FisherScores, summarize

NAMES = ("b.1.weight", "a.0.bias", "a.0.weight", "c")


def made_scores(dtype: torch.dtype = torch.float32, **facts: object) -> FisherScores:
    draw = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (4,), (2, 3, 2), ())
    tensors = {n: torch.rand(s, generator=draw, dtype=dtype) for n, s in zip(NAMES, shapes, strict=True)}
    return FisherScores(tensors, num_examples=5, **facts)


def test_mapping_of_parameters():
    scores = made_scores()
    assert list(scores) == list(NAMES)
    assert len(scores) == 4
    assert scores.num_entries == 12 + 4 + 12 + 1
    assert repr(scores) == "FisherScores(4 parameters, 29 entries, empirical, 5 examples)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_file_gives_back_the_same_scores(dtype: torch.dtype, tmp_path: Path):
    scores = made_scores(dtype, reduction="sum", provenance={"model": {"name": "m"}, "seed": 3})
    scores.save(tmp_path / "deep" / "scores.h5")
    loaded = FisherScores.load(tmp_path / "deep" / "scores.h5")
    assert list(loaded) == list(NAMES)
    assert all(torch.equal(loaded[n], scores[n]) and loaded[n].dtype == dtype for n in NAMES)
    for fact in ("num_examples", "estimator", "unit", "reduction", "provenance"):
        assert getattr(loaded, fact) == getattr(scores, fact)


@given(st.lists(st.floats(0, allow_infinity=False, width=32), max_size=20), st.integers(1, 10**9))
def test_every_finite_value_survives_the_file(values: list[float], num_examples: int):
    scores = FisherScores({"a.weight": torch.tensor(values, dtype=torch.float32)}, num_examples)
    with tempfile.TemporaryDirectory() as folder:
        scores.save(Path(folder) / "scores.h5")
        loaded = FisherScores.load(Path(folder) / "scores.h5")
    assert loaded["a.weight"].tolist() == values
    assert loaded.num_examples == num_examples


def test_file_has_the_layout_that_others_read(tmp_path: Path):
    made_scores(provenance={"model": {}}).save(tmp_path / "scores.h5")
    with h5py.File(tmp_path / "scores.h5") as file:
        assert file.attrs["format"] == "fisherscope.scores"
        assert file.attrs["format_version"] == 1
        assert (file.attrs["num_examples"], file.attrs["estimator"]) == (5, "empirical")
        assert (file.attrs["unit"], file.attrs["reduction"]) == ("sequence", "mean")
        assert json.loads(file.attrs["provenance"]) == {"model": {}}
        assert set(file["scores"]) == set(NAMES)
        assert file["scores/b.1.weight"].shape == (3, 4)


def test_saving_twice_gives_the_same_contents(tmp_path: Path):
    scores = made_scores()
    scores.save(tmp_path / "one.h5")
    FisherScores.load(tmp_path / "one.h5").save(tmp_path / "two.h5")
    assert contents(tmp_path / "one.h5") == contents(tmp_path / "two.h5")


def test_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "scores.h5"
    made_scores().save(path)
    before = path.read_bytes()
    monkeypatch.setattr(h5py.Group, "create_dataset", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made_scores().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [-1.0, -1e-30, float("nan"), float("inf")])
def test_what_is_no_mean_of_squares_is_refused(value: float, tmp_path: Path):
    with pytest.raises(ValueError, match="'a'"):
        FisherScores({"a": torch.tensor([0.0, value])}, num_examples=1)
    made_scores().save(tmp_path / "scores.h5")
    with h5py.File(tmp_path / "scores.h5", "r+") as file:
        file["scores/b.1.weight"][1, 2] = value
    with pytest.raises(ValueError, match=r"'b\.1\.weight' has 1 entries"):
        FisherScores.load(tmp_path / "scores.h5")


def test_zero_is_a_score():
    assert FisherScores({"a": torch.zeros(2)}, num_examples=1)["a"].tolist() == [0, 0]


DAMAGES = {
    "no attribute": lambda file: file.attrs.__delitem__("num_examples"),
    "no estimator": lambda file: file.attrs.__delitem__("estimator"),
    "no provenance": lambda file: file.attrs.__delitem__("provenance"),
    "broken provenance": lambda file: file.attrs.__setitem__("provenance", "{"),
    "no scores": lambda file: file.__delitem__("scores"),
    "a group for a tensor": lambda file: file["scores"].create_group("x"),
    "integers": lambda file: file["scores"].create_dataset("x", data=np.arange(3)),
    "float16": lambda file: file["scores"].create_dataset("x", data=np.zeros(3, np.float16)),
    "text": lambda file: file["scores"].create_dataset("x", data="text"),
    "other format": lambda file: file.attrs.__setitem__("format", "fisherscope.landscape"),
    "other version": lambda file: file.attrs.__setitem__("format_version", 2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_refused_in_one_sentence(damage: str, tmp_path: Path):
    path = tmp_path / "scores.h5"
    made_scores().save(path)
    with h5py.File(path, "r+") as file:
        DAMAGES[damage](file)
    with pytest.raises(storage.WrongFile, match=re.escape(str(path))) as error:
        FisherScores.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_file_cut_short_is_refused(share: float, tmp_path: Path):
    path = tmp_path / "scores.h5"
    made_scores().save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(storage.WrongFile, match="make it again"):
        FisherScores.load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_format_of_a_file_cut_short_is_refused(share: float, tmp_path: Path):
    path = tmp_path / "scores.h5"
    made_scores().save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(storage.WrongFile, match="make it again"):
        storage.file_format(path)


def test_format_of_our_files(tmp_path: Path):
    made_scores().save(tmp_path / "scores.h5")
    assert storage.file_format(tmp_path / "scores.h5") == "fisherscope.scores"
    (tmp_path / "mask.safetensors").write_bytes(b"")
    assert storage.file_format(tmp_path / "mask.safetensors") == "fisherscope.mask"


def test_layers_in_the_order_of_the_model():
    tensors = {
        "bert.embeddings.word.weight": torch.tensor([1.0, 3.0]),
        "bert.encoder.layer.0.a.weight": torch.tensor([[1.0, 2.0, 3.0]]),
        "bert.encoder.layer.0.a.bias": torch.tensor([6.0]),
        "classifier.weight": torch.tensor([9.0]),
    }
    facts = {"model": {"new_parameters": ["classifier.weight"]}}
    scores = FisherScores(tensors, num_examples=1, provenance=facts)
    known = [("bert.embeddings", 2.0), ("bert.encoder.layer.0", 3.0)]
    assert [(row.name, row.mean) for row in summarize(scores)] == known
    assert [(row.name, row.mean) for row in summarize(scores, include_new=True)] == [*known, ("classifier", 9.0)]


@pytest.mark.parametrize("by", ["layer", "parameter"])
def test_summary_by_layer_and_parameter(by: str):
    scores = made_scores(provenance={"model": {"new_parameters": ["c"]}})
    groups = {name: [name] for name in NAMES[:3]} if by == "parameter" else {"b.1": NAMES[:1], "a.0": NAMES[1:3]}
    values = {group: [float(v) for name in names for v in scores[name].flatten()] for group, names in groups.items()}
    whole = sum(map(sum, values.values()))
    for row, (group, inside) in zip(summarize(scores, by), values.items(), strict=True):
        assert (row.name, row.entries, row.max) == (group, len(inside), max(inside))
        assert row.sum == pytest.approx(sum(inside))
        assert row.mean == pytest.approx(sum(inside) / len(inside))
        assert row.share == pytest.approx(sum(inside) / whole)
        assert row.first_half_mean is None and row.second_half_mean is None
    assert summarize(scores, by, include_new=True)[-1].name == "c"


def test_summary_has_the_means_of_both_halves():
    made = case("bert", lengths=(3, 4, 5, 6, 7))
    scores = estimate_fisher(made.model, batched(made.examples, 1), halves=True, progress=False)
    for row, *halves in zip(summarize(scores), *map(summarize, scores.halves()), strict=True):
        assert row.first_half_mean == pytest.approx(halves[0].mean, rel=1e-3)
        assert row.second_half_mean == pytest.approx(halves[1].mean, rel=1e-3)
        assert row.first_half_mean != row.second_half_mean


@pytest.mark.usefixtures("unchecked")
def test_summary_by_anything_else_is_refused():
    with pytest.raises(ValueError, match="by must be 'layer' or 'parameter', got 'row'"):
        summarize(made_scores(), "row")  # pyright: ignore[reportArgumentType]


def strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *strings(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "/home/me/model", "--out", "/tmp/scores.h5"],
        ["--model=/home/me/model", "--out=~/scores.h5", "--data=../secret/x.tsv:train"],
        ["--model", "owner/model", "--data", "glue/mrpc:train"],
    ],
)
def test_provenance_names_files_without_folders(arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    made = case("bert", lengths=(3, 4))
    made.model.config._name_or_path = str(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/fisherscope", "fisher", *arguments])
    scores = estimate_fisher(made.model, batched(made.examples, 2), progress=False)
    assert scores.provenance["command"].startswith("fisherscope fisher ")
    assert scores.provenance["model"]["name"] == "model"
    for text in strings(scores.provenance):
        assert not re.search(r"(^|[\s=:,])(/|~|\.\.)", text), text


def test_share_of_entries_that_holds_a_share_of_the_scores():
    scores = FisherScores({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([[3.0], [1.0]])}, num_examples=1)
    assert [scores.share_holding(share) for share in (0.4, 0.5, 0.8, 0.9, 1.0)] == [0.25, 0.25, 0.5, 0.75, 1.0]
    assert math.isnan(FisherScores({"a": torch.zeros(3)}, num_examples=1).share_holding(0.5))
    drawn = {"model": {"new_parameters": ["a"]}}
    assert math.isnan(FisherScores({"a": torch.ones(3)}, num_examples=1, provenance=drawn).share_holding(0.5))


def sorted_share_holding(kept: list[Tensor], share: float) -> float:
    """By the definition: the sums of the highest, all of them."""
    held = torch.cat([score.flatten().double() for score in kept]).sort(descending=True).values.cumsum(0)
    return (int(torch.searchsorted(held, share * held[-1])) + 1) / len(held)


@pytest.mark.parametrize("dtypes", [[torch.float32] * 2, [torch.float64] * 2, [torch.float32, torch.float64]])
@given(
    st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 4096, 4097, 2**20, 2**20 + 1, 2**24 - 1]), min_size=4, max_size=40),
    st.integers(-140, 90),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
)
def test_share_that_holds_is_that_of_the_sorted_entries(
    dtypes: list[torch.dtype], values: list[int], exponent: int, share: float
):
    scaled = [math.ldexp(value, exponent) for value in values]
    tensors = {n: torch.tensor(scaled[k::2], dtype=d) for k, (n, d) in enumerate(zip("ab", dtypes, strict=True))}
    expected = sorted_share_holding(list(tensors.values()), share) if any(values) else float("nan")
    tensors["new"] = torch.full((5,), 1e30)
    scores = FisherScores(tensors, 1, provenance={"model": {"new_parameters": ["new"]}})
    assert scores.share_holding(share) == pytest.approx(expected, abs=0, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_share_that_holds_of_scores_over_many_orders_of_magnitude(dtype: torch.dtype):
    draw = torch.Generator().manual_seed(1)
    flat = torch.randn(30_000, generator=draw, dtype=dtype).mul(4).exp() * (torch.rand(30_000, generator=draw) > 0.4)
    flat[0] = -0.0
    scores = FisherScores({"a": flat[:20_000].view(100, 200).T, "b": flat[20_000:]}, 1)
    for share in (0.1, 0.5, 0.9, 0.999):
        assert scores.share_holding(share) == sorted_share_holding(list(scores.values()), share)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the life of the process")
def test_share_that_holds_takes_little_memory_however_many_entries():
    scores = FisherScores({"a": torch.rand(2**24, generator=torch.Generator().manual_seed(0))}, 1)
    cpu = torch.device("cpu")
    forget_peak(cpu)
    before = peak_memory(cpu)
    scores.share_holding(0.5)
    assert peak_memory(cpu) - before < 4 * 2**24


def test_share_of_entries_with_score_0():
    drawn = {"model": {"new_parameters": ["c"]}}
    tensors = {"a": torch.tensor([0.0, 1e-45]), "b": torch.tensor([[-0.0, 2.0]]), "c": torch.zeros(9)}
    assert FisherScores(tensors, 1, provenance=drawn).zero_share == 0.5
    assert made_scores().zero_share == 0
    assert math.isnan(FisherScores({"c": torch.zeros(9)}, 1, provenance=drawn).zero_share)
