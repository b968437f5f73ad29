"""Two sets of scores or masks compared, against counting and ranking in plain Python."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from fisherscope import comparison
from fisherscope.comparison import compare, spearman
from fisherscope.masks import Mask, random_fraction, top_fraction
from fisherscope.scores import FisherScores

SHAPES = {
    "net.embed.weight": (30, 4),
    "net.layer.0.a.weight": (5, 6),
    "net.layer.0.a.bias": (5,),
    "net.layer.1.a.weight": (8, 4),
}


def made(
    seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES, prefix: str = "net.", **model: Any
) -> FisherScores:
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: torch.rand(shape, generator=draw) ** 3 for name, shape in shapes.items()}
    return FisherScores(tensors, 8, provenance={"model": {"prefix": prefix, **model}})


def alike(seed: int, to: FisherScores, noise: float) -> FisherScores:
    draw = torch.Generator().manual_seed(seed)
    tensors = {n: t * torch.exp(noise * torch.randn(t.shape, generator=draw)) for n, t in to.items()}
    return FisherScores(tensors, 8, provenance=to.provenance)


def flat(scores: FisherScores | Mask, names: list[str]) -> list[float]:
    return [float(value) for name in names for value in scores[name].flatten()]


def highest(values: list[float], fraction: float) -> set[int]:
    return set(sorted(range(len(values)), key=lambda k: (-values[k], k))[: round(fraction * len(values))])


LAYERS = {
    "net.embed": ["net.embed.weight"],
    "net.layer.0": ["net.layer.0.a.weight", "net.layer.0.a.bias"],
    "net.layer.1": ["net.layer.1.a.weight"],
}


@pytest.mark.parametrize("fraction", [0.1, 0.37, 1.0])
def test_scores_are_compared_overall_and_within_each_layer(fraction: float):
    a = made()
    b = alike(1, a, 0.5)
    result = compare(a, b, fraction)
    groups = {"all": list(SHAPES), **LAYERS}
    assert [row.name for row in (result.overall, *result.groups)] == list(groups)
    for row, names in zip((result.overall, *result.groups), groups.values(), strict=True):
        x, y = flat(a, names), flat(b, names)
        first, second = highest(x, fraction), highest(y, fraction)
        assert row.entries == len(x)
        assert row.overlap == pytest.approx(len(first & second) / len(first))
        assert row.jaccard == pytest.approx(len(first & second) / len(first | second))
        assert row.chance == pytest.approx(len(first) / len(x))
        assert row.rank_correlation == pytest.approx(float(spearmanr(x, y).statistic))
    assert (result.fraction, result.ranked) == (fraction, sum(map(math.prod, SHAPES.values())))
    assert (result.only_in_first, result.only_in_second, result.drawn) == ((), (), ())


def test_by_parameter():
    a, b = made(0), made(1)
    rows = compare(a, b, 0.2, by="parameter").groups
    assert [row.name for row in rows] == list(SHAPES)
    first, second = (highest(flat(s, ["net.layer.1.a.weight"]), 0.2) for s in (a, b))
    assert rows[-1].overlap == pytest.approx(len(first & second) / len(first))


def test_scores_agree_with_themselves_and_not_with_their_reverse():
    a = made()
    same = compare(a, a).overall
    assert (same.overlap, same.jaccard, same.rank_correlation) == (1.0, 1.0, pytest.approx(1.0))
    turned = FisherScores({n: 1 - t for n, t in a.items()}, 1, provenance=a.provenance)
    opposite = compare(a, turned).overall
    assert (opposite.overlap, opposite.rank_correlation) == (0.0, pytest.approx(-1.0))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_ranks_of_ties_are_their_mean(pairs: list[tuple[int, int]]):
    x, y = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    found = spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(float(spearmanr(x, y).statistic))


def test_masks_are_compared_as_they_are():
    a = made()
    first, second = top_fraction(a, 0.4), random_fraction(a, 0.2, seed=0)
    result = compare(first, second)
    for row, names in zip((result.overall, *result.groups), (list(SHAPES), *LAYERS.values()), strict=True):
        x, y = ({k for k, v in enumerate(flat(mask, names)) if v} for mask in (first, second))
        entries = len(flat(first, names))
        assert row.overlap == pytest.approx(len(x & y) / min(len(x), len(y)))
        assert row.jaccard == pytest.approx(len(x & y) / len(x | y))
        assert row.chance == pytest.approx(max(len(x), len(y)) / entries)
        assert row.rank_correlation is None
    assert (result.fraction, result.ranked) == (None, 0)


def test_a_mask_that_selects_nothing_has_no_overlap():
    mask = top_fraction(made(), 0.5)
    row = compare(mask, mask & ~mask).overall
    assert math.isnan(row.overlap) and row.jaccard == 0.0


def test_models_with_different_heads_are_compared_on_what_they_share():
    ours = {**SHAPES, "head.weight": (3, 4)}
    theirs = {name.replace("net.", "core."): shape for name, shape in SHAPES.items()} | {"classifier.weight": (2, 4)}
    theirs["core.layer.1.a.weight"] = (9, 4)
    a, b = made(0, ours), made(1, theirs, prefix="core.")
    result = compare(a, b)
    assert [row.name for row in result.groups] == ["net.embed", "net.layer.0"]
    assert result.only_in_first == ("net.layer.1.a.weight", "head.weight")
    assert result.only_in_second == ("core.layer.1.a.weight", "classifier.weight")
    names = ["net.embed.weight", "net.layer.0.a.weight", "net.layer.0.a.bias"]
    x, y = flat(a, names), flat(b, [name.replace("net.", "core.") for name in names])
    assert result.overall.rank_correlation == pytest.approx(float(spearmanr(x, y).statistic))
    assert result.overall.entries == len(x)


def test_parameters_drawn_at_random_are_left_out():
    shapes = {**SHAPES, "head.weight": (3, 4)}
    a, b = made(0, shapes, new_parameters=["head.weight"]), made(1, shapes)
    result = compare(a, b)
    assert result.drawn == ("head.weight",)
    assert result.overall.entries == sum(map(math.prod, SHAPES.values()))
    assert (result.only_in_first, result.only_in_second) == ((), ())


def test_large_models_are_ranked_at_an_even_selection(monkeypatch: pytest.MonkeyPatch):
    shapes = {"net.layer.0.w": (40_000,), "net.layer.1.w": (60_000,)}
    a = made(0, shapes)
    b = alike(1, a, 1.0)
    whole = compare(a, b)
    monkeypatch.setattr(comparison, "MOST_RANKED", 20_000)
    some = compare(a, b)
    assert some.ranked == pytest.approx(20_000, abs=2) and whole.ranked == 100_000
    assert some.overall.overlap == whole.overall.overlap
    assert some.overall.rank_correlation != whole.overall.rank_correlation
    for ours, theirs in zip((some.overall, *some.groups), (whole.overall, *whole.groups), strict=True):
        assert ours.rank_correlation == pytest.approx(theirs.rank_correlation, abs=0.02)
    assert compare(a, b) == some


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_compared_is_refused_in_a_sentence():
    a = made()
    with pytest.raises(TypeError, match="got one of each; make a mask from the scores"):
        compare(a, top_fraction(a, 0.5))
    with pytest.raises(TypeError, match="got a dict"):
        compare(a, {})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"'net\.embed\.weight' and 'other'; give files of the same architecture"):
        compare(a, made(0, {"other": (2,)}))
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="fraction must be above 0 and at most 1"):
            compare(a, a, fraction)
    with pytest.raises(ValueError, match="every parameter of the first was drawn at random in one of the two"):
        compare(made(0, new_parameters=list(made(0))), made(1))
    with pytest.raises(ValueError, match="by must be 'layer' or 'parameter', got 'row'"):
        compare(a, a, by="row")  # pyright: ignore[reportArgumentType]
