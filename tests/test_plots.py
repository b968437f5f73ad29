"""Figures: the numbers they show against plain Python, the files they become, and that both backends agree."""

import base64
import html
import inspect
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from fisherscope import plots
from fisherscope.cli import main
from fisherscope.comparison import compare
from fisherscope.finetune.methods.guided_dropout import GuidedSite
from fisherscope.landscape import Axis, Landscape
from fisherscope.masks import top_fraction
from fisherscope.plots import _matplotlib, _plotly
from fisherscope.plots._prepare import Compared, Layers, Lines, Panels, Parameters, Sites, columns, decades, spread
from fisherscope.plots._prepare_comparison import compared
from fisherscope.plots._prepare_landscapes import logarithmic_ticks, panels, round_ticks, short_title
from fisherscope.plots._prepare_scores import (
    layers,
    parameter_lines,
    short_labels,
    sorted_lines,
    stability_lines,
    thinned,
)
from fisherscope.plots._prepare_sites import sites_shown
from fisherscope.scores import FisherScores
from fisherscope.stability import Quarters

REFERENCES = {"uniform": 8.0, "unigram": 5.0}
BACKENDS = (_matplotlib, _plotly)
SUFFIXES = (".pdf", ".png", ".svg", ".html")
PUBLIC = [
    "comparison",
    "contour",
    "curves",
    "dropout_sites",
    "layer_scores",
    "parameter_scores",
    "sorted_scores",
    "stability",
    "surface",
]


def axis(number: int, points: int = 5, span: float = 1.0, norm: float = 12.34, entries: int = 1234567) -> Axis:
    return Axis(f"axis{number}", np.linspace(-span, span, points), norm, entries)


def landscape(loss: Any, **facts: Any) -> Landscape:
    """A landscape around a grid of losses; a loss of None is a point not yet measured."""
    values = np.array(loss, dtype=float)
    evaluated = np.array([value is not None for value in np.array(loss, dtype=object).flat]).reshape(values.shape)
    axes = facts.pop("axes", tuple(axis(number, size) for number, size in enumerate(values.shape)))
    return Landscape(axes, values, evaluated, **{"references": REFERENCES, "objective": "mlm"} | facts)


def bowl(steep: float = 5.0, base: float = 2.0, points: tuple[int, ...] = (7, 5), **facts: Any) -> Landscape:
    """A landscape whose loss is different in every direction."""
    grids = np.meshgrid(*(np.linspace(-1, 1, size) for size in points), indexing="ij")
    loss = base + sum((1 + k) * steep * g**2 + 0.3 * k * g for k, g in enumerate(grids))
    return landscape(loss.tolist(), **facts)


def scores(
    tensors: dict[str, Any], name: str = "", new: tuple[str, ...] = (), prefix: str = "", **facts: Any
) -> FisherScores:
    """Scores of a model with new parameters and with a prefix of its backbone."""
    provenance = {"model": {"name": name, "new_parameters": list(new), "prefix": prefix}, "objective": "mlm"}
    provenance |= facts.pop("provenance", {})
    return FisherScores({k: torch.tensor(v) for k, v in tensors.items()}, 8, provenance=provenance, **facts)


def some_scores(seed: int = 0, size: int = 40, **facts: Any) -> FisherScores:
    drawn = np.random.default_rng(seed).random((4, size)) ** 6
    drawn[0, :3] = 0.0
    names = ("net.embed.weight", "net.layer.0.a.weight", "net.layer.1.a.weight", "head.bias")
    return scores({name: row.tolist() for name, row in zip(names, drawn, strict=True)}, prefix="net.", **facts)


HISTORY = ((8.0, 0.5, 0.7), (10.0, 0.55, 0.72), (13.0, 0.6, 0.75), (17.0, 0.65, 0.74), (18.0, 0.66, 0.76))


def followed_scores(seed: int = 0, size: int = 40, **facts: Any) -> FisherScores:
    """Scores of a run that noted the stability of two masks at five moments."""
    quarters = Quarters(torch.ones(4, 4), (5, 5, 4, 4), (0.1, 0.5), HISTORY)
    return replace(some_scores(seed, size, **facts), quarters=quarters)


def noisy_scores(seed: int, **facts: Any) -> FisherScores:
    """Scores much like those of seed 0."""
    draw = torch.Generator().manual_seed(seed)
    given = some_scores(0, **facts)
    return replace(given, tensors={n: t * torch.exp(torch.randn(t.shape, generator=draw)) for n, t in given.items()})


def some_sites(layers: int = 2, inside: str = "attention") -> list[GuidedSite]:
    """Sites of embeddings and layers; the first has the lowest rate."""
    places = [f"net.layer.{k}.{part}.dropout" for k in range(layers) for part in (inside, "output")]
    names = ["net.embeddings.dropout", *places]
    return [GuidedSite(name, 10.0**-k, 0.01 * k) for k, name in enumerate(names)]


def surface_panels(*given: Landscape, metric: str = "loss", titles: Any = None) -> Panels:
    return panels(list(given), metric, titles, axes=given[0].loss.ndim, plot="surface")


# What is shown: landscapes


def test_all_panels_share_one_scale_from_the_lowest_to_the_highest_loss():
    scale = surface_panels(bowl(1.0, base=2.5), bowl(0.5, base=3.0)).scale
    assert (scale.low, scale.high, scale.is_cut) == (2.5, pytest.approx(2.5 + 3 * 1 + 0.3), False)


def test_language_models_are_cut_half_a_nat_above_guessing_and_the_note_counts_what_lies_above():
    first, second = bowl(5.0), bowl(1.0)
    shown = surface_panels(first, second)
    values = [*first.loss.flat, *second.loss.flat]
    above = sum(value > 8.5 for value in values)
    assert (shown.scale.high, shown.scale.is_cut) == (8.5, True)
    assert 0 < above < len(values)
    assert shown.notes[0] == f"cut at ln V + 0.5 = 8.5 nats; {above} of {len(values)} points above"


def test_a_model_worse_than_guessing_is_not_cut_away():
    grid = [[9.0, 9.1, 9.2], [9.1, 8.9, 9.3], [9.0, 9.1, 9.2]]
    scale = surface_panels(landscape(grid)).scale
    assert (scale.low, scale.high, scale.is_cut) == (8.9, 9.3, False)


def test_without_a_reference_only_extremes_are_cut():
    calm = np.linspace(0.1, 1.0, 49).reshape(7, 7)
    wild = calm.copy()
    wild[0, 0] = 500.0
    facts: dict[str, Any] = {"objective": "classification", "references": {}}
    assert surface_panels(landscape(calm.tolist(), **facts)).scale.high == 1.0
    shown = surface_panels(landscape(wild.tolist(), **facts))
    limit = float(np.percentile(wild, 95))
    assert shown.scale.high == limit < 1.1
    assert shown.notes[0] == f"cut at the 95th percentile = {limit:.3g} nats; {(wild > limit).sum()} of 49 points above"


def test_infinity_counts_as_above_and_nan_as_no_number_and_neither_is_a_value():
    grid = [[3.0, math.inf, 4.0], [3.5, 2.0, math.nan], [3.0, 3.0, None]]
    shown = surface_panels(landscape(grid))
    assert shown.notes[0] == "cut at ln V + 0.5 = 8.5 nats; 1 of 8 points above; not a number at 1 of 8"
    values = shown.panels[0].losses
    assert np.isnan(values).tolist() == [[False, True, False], [False, False, True], [False, False, True]]
    assert values[1, 0] == 3.5
    assert shown.panels[0].notes[-1] == "8 of 9 points"


def test_a_point_that_is_not_measured_is_not_drawn_whatever_it_holds():
    given = landscape([[2.0, 3.0], [2.5, 0.0]])
    given.evaluated[1, 1] = False
    shown = surface_panels(given)
    assert np.isnan(shown.panels[0].losses[1, 1])
    assert shown.scale.low == 2.0


def test_the_largest_finite_value_ends_the_scale_of_other_losses_that_reach_infinity():
    shown = surface_panels(landscape([[1.0, math.inf], [2.0, 3.0]], objective="regression", references={}))
    assert shown.scale.high == 3.0
    assert shown.notes[0] == "cut at the largest finite value = 3; 1 of 4 points above"


def test_a_flat_landscape_has_a_scale():
    scale = surface_panels(landscape([[2.0, 2.0], [2.0, 2.0]])).scale
    assert scale.low < 2.0 < scale.high


def test_the_centre_is_where_every_step_is_zero_and_measured():
    assert surface_panels(bowl(base=2.25)).panels[0].centre == 2.25
    assert surface_panels(landscape([[1.0, 1.0, 1.0], [1.0, None, 1.0], [1.0, 1.0, 1.0]])).panels[0].centre is None
    moved = tuple(replace(a, steps=a.steps + 0.1) for a in bowl().axes)
    assert surface_panels(landscape(bowl().loss.tolist(), axes=moved)).panels[0].centre is None


def test_references_are_those_inside_the_range():
    deep, shallow = surface_panels(bowl(5.0), bowl(0.5, base=4.8)).panels
    assert [(r.label, r.value) for r in deep.references] == [("ln V", 8.0), ("unigram entropy", 5.0)]
    assert [r.label for r in shallow.references] == ["unigram entropy"]
    assert surface_panels(bowl(0.1)).references == ()


def test_a_panel_says_how_many_entries_move_and_how_far():
    axes = (axis(0, 3, norm=12.345, entries=1000), axis(1, 3, norm=56780.0, entries=2000))
    grid = [[2.0] * 3] * 3
    assert surface_panels(landscape(grid, axes=axes)).panels[0].notes == (
        "1,000 / 2,000 entries move",
        "‖d₁‖\xa0=\xa012.3, ‖d₂‖\xa0=\xa056,780",
    )
    assert surface_panels(bowl(points=(5,))).panels[0].notes == ("1,234,567 entries move", "‖d‖\xa0=\xa012.3")


@pytest.mark.parametrize(
    ("rule", "title"),
    [
        ("all entries", "all entries"),
        ("top 0.5 of entries within model", "top 50\N{NO-BREAK SPACE}% of entries"),
        ("bottom 0.125 of rows within layer", "bottom 12.5\N{NO-BREAK SPACE}% of rows per layer"),
        ("top 1e-05 of entries within parameter", "top 0.001\N{NO-BREAK SPACE}% of entries per parameter"),
        ("random 0.5 of entries within model, seed 3", "random 50\N{NO-BREAK SPACE}% of entries (seed 3)"),
        ("~(top 0.5 of entries within model)", "not (top 50\N{NO-BREAK SPACE}% of entries)"),
        ("a mask", "a mask"),
    ],
)
def test_titles_are_short(rule: str, title: str):
    assert short_title(rule) == title


def test_titles_name_the_model_when_there_are_several_and_are_numbered_when_they_are_the_same():
    a, b = (bowl(provenance={"model": {"name": name}}) for name in ("a", "b"))
    assert [p.title for p in surface_panels(a, a).panels] == ["all entries (1)", "all entries (2)"]
    assert [p.title for p in surface_panels(a, b).panels] == ["a: all entries", "b: all entries"]
    assert [p.title for p in surface_panels(a, b, titles=["x", "x"]).panels] == ["x", "x"]
    assert surface_panels(a, titles="one").panels[0].title == "one"


@pytest.mark.parametrize(
    ("objective", "label"),
    [
        ("mlm", "MLM loss (nats per scored token)"),
        ("causal-lm", "loss (nats per token)"),
        ("seq2seq-lm", "loss (nats per target token)"),
        ("classification", "loss (nats per example)"),
        ("regression", "squared error per example"),
        ("my_loss", "my_loss per example"),
    ],
)
def test_the_scale_names_quantity_and_unit(objective: str, label: str):
    assert surface_panels(bowl(objective=objective)).scale.label == label


def test_perplexity_is_the_same_picture_with_other_ticks():
    loss, perplexity = (surface_panels(bowl(), metric=metric) for metric in ("loss", "perplexity"))
    assert perplexity.scale.label == "MLM perplexity (logarithmic scale)"
    assert (perplexity.scale.low, perplexity.scale.high) == (loss.scale.low, loss.scale.high)
    assert np.array_equal(perplexity.panels[0].losses, loss.panels[0].losses)
    assert [math.log(float(text.replace(",", ""))) for _, text in perplexity.scale.ticks] == pytest.approx(
        [position for position, _ in perplexity.scale.ticks]
    )
    assert perplexity.scale.shown(np.array([0.0, 2.0])) == pytest.approx([1.0, math.exp(2)])
    assert f"8.5 nats, perplexity {math.exp(8.5):,.0f}; " in perplexity.notes[0]


@given(low=st.floats(-1e3, 1e3), width=st.floats(1e-4, 1e4))
def test_round_ticks_lie_inside_and_say_where(low: float, width: float):
    ticks = round_ticks(low, low + width)
    assert 2 <= len(ticks) <= 8
    for position, text in ticks:
        assert low - 1e-9 * width <= position <= low + width * (1 + 1e-9)
        assert float(text.replace(",", "")) == pytest.approx(position, rel=1e-6, abs=1e-6 * width)
    assert len({text for _, text in ticks}) == len(ticks)


@given(low=st.floats(0, 60), width=st.floats(0.01, 40))
def test_logarithmic_ticks_lie_inside_and_say_where(low: float, width: float):
    ticks = logarithmic_ticks(low, low + width)
    assert 2 <= len(ticks) <= 8
    for position, text in ticks:
        assert low - 1e-9 <= position <= low + width + 1e-9
        assert math.log(float(text.replace(",", ""))) == pytest.approx(position, abs=1e-3 * width)


def test_logarithmic_ticks_survive_losses_whose_exponential_overflows():
    assert logarithmic_ticks(800.0, 800.5)[0] == (800.0, "e^800.0")


def test_rows_are_as_equal_as_possible():
    assert [columns(count, 3) for count in (1, 2, 3, 4, 5, 7)] == [1, 2, 3, 2, 3, 3]
    assert [columns(count, 4) for count in (4, 5, 6, 9)] == [4, 3, 3, 3]


# What is shown: scores


def test_sorted_entries_are_all_entries_in_ascending_order():
    given = some_scores()
    lines = sorted_lines(given, "entry", False, None)
    values = sorted(value for name in given for value in given[name].tolist())
    positive = [(rank, value) for rank, value in enumerate(values, 1) if value > 0]
    (line,) = lines.lines
    assert list(zip(line.x.tolist(), line.y.tolist(), strict=True)) == positive
    assert lines.notes == ("scores: 3 of 160 entries are exactly 0",)
    assert (lines.is_log, lines.is_share, lines.y_label) == (True, False, "Fisher score (nats²)")


def test_sorted_parameters_are_the_means_of_every_parameter():
    given = some_scores()
    (line,) = sorted_lines(given, "parameter", False, None).lines
    assert line.y.tolist() == pytest.approx(sorted(sum(t.tolist()) / t.numel() for t in given.values()), rel=1e-6)


def test_parameters_in_the_models_order_are_their_means_and_gaps_where_they_are_zero():
    given = scores({"b.w": [4.0, 2.0], "a.w": [0.0, 0.0], "c.w": [1.0, 2.0]})
    lines = parameter_lines(given, None)
    assert lines.lines[0].x.tolist() == [1.0, 2.0, 3.0]
    assert np.array_equal(lines.lines[0].y, [3.0, np.nan, 1.5], equal_nan=True)
    assert lines.notes == ("scores: 1 of 3 parameters are exactly 0",)
    with pytest.raises(ValueError, match="All scores of scores are 0, so there is nothing to draw"):
        parameter_lines(scores({"a.w": [0.0, 0.0]}), None)


def test_means_that_are_rounding_noise_are_counted_and_not_drawn():
    given = scores({"a.w": [4.0, 4.0], "a.b": [3e-12, 3e-12], "c.w": [4.1e-12, 4.1e-12], "c.b": [0.0, 0.0]}, name="m")
    drawn = parameter_lines(given, None)
    assert np.array_equal(drawn.lines[0].y, [4.0, np.nan, np.float64(torch.tensor(4.1e-12)), np.nan], equal_nan=True)
    assert drawn.notes == (
        "m: 1 of 4 parameters are exactly 0",
        "m: 1 of 4 parameters are below 1e-12 of the highest, not shown",
    )


def test_parameters_are_dots_above_the_names_of_their_layers():
    drawn = parameter_lines(
        scores({f"net.layer.{k}.{n}": [k + 1.0] for k in (0, 1) for n in "ab"}, prefix="net."), None
    )
    assert drawn.layers == (("layer 0", 1, 2), ("layer 1", 3, 4))
    assert drawn.names == (("net.layer.0.a", "net.layer.0.b", "net.layer.1.a", "net.layer.1.b"),)
    axes = _matplotlib.parameter_scores(drawn).axes[0]
    assert [line.get_linestyle() for line in axes.lines] == ["None"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["layer 0", "layer 1"]
    assert axes.get_xticks().tolist() == [1.5, 3.5]
    assert axes.get_xlabel() == "parameters, in the model's order, by layer"
    figure = _plotly.parameter_scores(drawn)
    assert [trace.mode for trace in figure.data] == ["markers"]
    assert figure.layout.xaxis.ticktext == ("layer 0", "layer 1") and figure.layout.xaxis.tickvals == (1.5, 3.5)
    assert np.array_equal(figure.data[0].y, axes.lines[0].get_ydata())
    other = parameter_lines(
        [scores({"a.layer.0.w": [1.0]}), scores({"a.layer.0.w": [1.0], "a.layer.0.b": [1.0]})], None
    )
    assert other.layers == () and other.x_label == "parameters, in the model's order"


def test_names_of_layers_are_left_out_where_there_is_no_room():
    drawn = parameter_lines(scores({f"net.layer.{k}.w": [1.0] for k in range(100)}, prefix="net."), None)
    places = [middle for middle, _ in drawn.labels(20)]
    assert places == [1, 6, 11, 16, 21, 26, 31, 36, 41, 46, 51, 56, 61, 66, 71, 76, 81, 86, 91, 96]


def test_normalized_scores_run_from_zero_to_one_and_keep_their_zeros():
    assert sorted_lines(scores({"a.w": [4.0, 2.0, 6.0]}), "entry", True, None).lines[0].y.tolist() == [0.0, 0.5, 1.0]
    lines = sorted_lines(scores({"a.w": [4.0, 0.0, 1.0]}), "entry", True, None)
    assert lines.lines[0].y.tolist() == [0.0, 0.25, 1.0]
    assert (lines.is_log, lines.notes) == (False, ())


def test_several_models_are_compared_by_share():
    small, large = scores({"a.w": [1.0, 2.0, 3.0]}), scores({"a.w": [5.0, 1.0, 4.0, 2.0, 3.0]})
    lines = sorted_lines([small, large], "entry", False, ["s", "l"])
    assert [line.x.tolist() for line in lines.lines] == [[0.0, 0.5, 1.0], [0.0, 0.25, 0.5, 0.75, 1.0]]
    assert lines.x_label == "share of entries, in ascending order"


@given(size=st.integers(1, 10**9), data=st.data())
def test_thinning_keeps_both_ends_and_few_points(size: int, data: st.DataObject):
    first = data.draw(st.integers(0, size - 1))
    positions = thinned(first, size, 50)
    assert (positions[0], positions[-1]) == (first, size - 1)
    assert len(positions) == min(50, size - first)
    gaps = np.diff(positions)
    assert gaps.size == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_a_large_model_becomes_a_short_curve_on_the_true_one():
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    given = FisherScores({"a.w": values}, 1)
    (line,) = sorted_lines(given, "entry", False, None).lines
    ordered = sorted(values.tolist())
    assert len(line.x) == 2000
    assert line.y.tolist() == [ordered[int(rank) - 1] for rank in line.x]
    assert (line.y[0], line.y[-1]) == (ordered[0], ordered[-1])
    assert torch.equal(given["a.w"], values)


def test_parameters_drawn_at_random_are_left_out():
    given = scores({"a.layer.0.w": [1.0, 2.0], "head.w": [1e6], "head.b": [1e7]}, new=("head.w", "head.b"))
    lines = sorted_lines(given, "entry", False, None)
    assert lines.lines[0].y.tolist() == [1.0, 2.0]
    assert lines.notes == layers(given, None).notes == ("without 2 parameters drawn at random",)
    assert layers(given, None).labels == ("layer 0",)
    assert layers([given, given], None).notes == ("without 2 parameters drawn at random",)
    other = scores({"a.layer.0.w": [1.0, 2.0]})
    for lines in (layers([given, other], ["x", "y"]), parameter_lines([given, other], ["x", "y"])):
        assert lines.notes == ("x: without 2 parameters drawn at random",)


def test_layers_are_means_over_entries_in_the_models_order():
    tensors = {"embed.w": [0.0, 0.0], "layer.1.a": [1.0, 2.0, 3.0], "layer.1.b": [[10.0]], "layer.0.a": [5.0]}
    drawn = layers(scores({f"net.{name}": values for name, values in tensors.items()}, name="m", prefix="net."), None)
    assert drawn.labels == ("embed", "layer 1", "layer 0")
    (series,) = drawn.series
    assert (series.x.tolist(), series.y.tolist()) == ([1.0, 2.0], [4.0, 5.0])
    assert drawn.notes == ("m: exactly 0 in embed",)


def test_layers_of_several_models_share_rows_and_keep_their_order():
    first = scores({"a.embed.w": [1.0], "a.layer.0.w": [2.0], "a.layer.1.w": [3.0], "a.pooler.w": [4.0]}, prefix="a.")
    second = scores({"b.tokens.w": [1.0], "b.h.0.w": [2.0], "b.h.1.w": [3.0], "b.norm.w": [4.0]}, prefix="b.")
    drawn = layers([first, second], ["a", "b"])
    assert drawn.labels == ("tokens", "embed", "layer 0", "layer 1", "norm", "pooler")
    assert [series.x.tolist() for series in drawn.series] == [[1, 2, 3, 5], [0, 2, 3, 4]]


@pytest.mark.parametrize(
    ("names", "prefix", "labels"),
    [
        (["m.embeddings", "m.encoder.layer.10", "cls.predictions"], "m.", ["embeddings", "layer 10", "head"]),
        (["m.embeddings", "cls.one", "cls.two"], "m.", ["embeddings", "cls.one", "cls.two"]),
        (["m.wte", "m.h.0", "m.ln_f"], "m.", ["wte", "layer 0", "ln f"]),
        (
            ["shared", "encoder.block.0", "encoder.final_norm", "decoder.block.0", "decoder.final_norm", "lm_head"],
            "",
            ["shared", "encoder layer 0", "encoder final norm", "decoder layer 0", "decoder final norm", "lm head"],
        ),
        (["layers.0", "layers.1"], "", ["layer 0", "layer 1"]),
    ],
)
def test_layers_have_short_names_that_differ(names: list[str], prefix: str, labels: list[str]):
    assert short_labels(names, prefix) == labels


@pytest.mark.parametrize(("objective", "unit"), [("mlm", " (nats²)"), ("regression", ""), ("my_loss", ""), (None, "")])
def test_scores_are_in_squared_nats_only_where_the_loss_is_in_nats(objective: str | None, unit: str):
    given = some_scores(provenance={"objective": objective})
    assert sorted_lines(given, "entry", False, None).y_label == "Fisher score" + unit


def test_stability_is_a_line_per_fraction():
    lines = stability_lines(followed_scores(name="m"), None)
    assert [line.title for line in lines.lines] == ["top 10 %", "top 50 %"]
    assert [line.x.tolist() for line in lines.lines] == [[8, 10, 13, 17, 18]] * 2
    assert [line.y.tolist() for line in lines.lines] == [[p[k] for p in HISTORY] for k in (1, 2)]
    assert lines.notes == ("m, 8 examples", "dotted: the overlap of two random masks of that size")
    several = stability_lines([followed_scores(name="m"), followed_scores(1, name="n")], None)
    assert [line.title for line in several.lines] == ["m: top 10 %", "m: top 50 %", "n: top 10 %", "n: top 50 %"]


@given(st.lists(st.integers(1, 10**6).map(float), min_size=1, max_size=40))
def test_ticks_on_a_logarithmic_axis_are_spread(values: list[float]):
    kept = spread(values)
    assert kept[-1] == max(values) and set(kept) <= set(values)
    assert len(kept) <= 5
    assert all(high / low >= (max(values) / min(values)) ** 0.2 for low, high in itertools.pairwise(kept))


@given(st.floats(-40, 10), st.floats(0, 40))
def test_decades_are_few_and_inside(low: float, width: float):
    found = decades(low, low + width)
    assert len(found) <= 6 and all(low <= k <= low + width for k in found)
    assert bool(found) == (math.ceil(low) <= math.floor(low + width))


def test_a_comparison_shows_the_agreement_within_each_layer():
    a, b = some_scores(0, name="m"), noisy_scores(1, name="n")
    drawn, result = compared(a, b, 0.25, None), compare(a, b, 0.25)
    assert drawn.labels == ("embed", "layer 0", "layer 1", "head")
    assert [line.title for line in drawn.series] == ["overlap of the top 25 %", "rank correlation"]
    for line, key in zip((*drawn.series, drawn.chance), ("overlap", "rank_correlation", "chance"), strict=True):
        assert line.y.tolist() == [getattr(row, key) for row in result.groups]
        assert line.x.tolist() == [0, 1, 2, 3]
    assert drawn.notes[0] == (
        f"m and n, over the whole model: overlap {result.overall.overlap:.3f}, Jaccard index "
        f"{result.overall.jaccard:.3f}, rank correlation {result.overall.rank_correlation:.3f}"
    )


def test_a_comparison_counts_entries_by_both_scores():
    a, b = some_scores(0), noisy_scores(1)
    histogram = compared(a, b, 0.25, ["x", "y"]).histogram
    assert histogram is not None
    pairs = [(x, y) for n in a for x, y in zip(a[n].tolist(), b[n].tolist(), strict=True) if x > 0 and y > 0]
    edges = histogram.edges
    inside = [(math.log10(x), math.log10(y)) for x, y in pairs if min(math.log10(x), math.log10(y)) >= edges[0]]
    assert histogram.counts.sum() == len(inside) >= 0.98 * len(pairs)
    for i, j in np.argwhere(histogram.counts):
        found = sum(edges[i] <= x <= edges[i + 1] and edges[j] <= y <= edges[j + 1] for x, y in inside)
        assert histogram.counts[i, j] == pytest.approx(found, abs=1)  # one may lie on an edge
    for mark, scores_ in zip(histogram.marks, (a, b), strict=True):
        values = [v for n in scores_ for v in scores_[n].tolist()]
        assert sum(math.log10(v) > mark for v in values if v > 0) == round(0.25 * len(values))
    assert histogram.labels == ("score, x (nats²)", "score, y (nats²)")
    assert f"{160 - len(inside)} of 160 entries are 0 or lower than shown" in compared(a, b, 0.25, None).notes


def test_a_comparison_of_masks_has_no_histogram():
    a, b = (top_fraction(s, 0.5) for s in (some_scores(0), noisy_scores(1)))
    drawn = compared(a, b, 0.1, None)
    assert drawn.histogram is None
    assert [line.title for line in drawn.series] == ["overlap", "Jaccard index"]
    assert drawn.series[0].y.tolist() == [row.overlap for row in compare(a, b).groups]


def test_a_comparison_says_what_it_leaves_out():
    a, b = some_scores(0, new=("head.bias",)), some_scores(1)
    assert compared(a, b, 0.1, None).notes[-1] == "parameters left out: 1 drawn at random"


@pytest.mark.parametrize(
    ("first", "second", "titles"),
    [
        ({"name": "a"}, {"name": "b"}, ["a", "b"]),
        ({"name": "a"}, {"name": "a", "reduction": "sum"}, ["mean over tokens", "sum over tokens"]),
        ({"name": "a", "provenance": {"data": {"source": "x"}}}, {"name": "a", "provenance": {"data": {"source": "y"}}},
         ["x", "y"]),
        ({"name": "a", "provenance": {"data": {"settings": {"seed": 0}}}},
         {"name": "a", "provenance": {"data": {"settings": {"seed": 1}}}}, ["seed 0", "seed 1"]),
        ({"name": "a"}, {"name": "a"}, ["a (1)", "a (2)"]),
        ({}, {}, ["scores (1)", "scores (2)"]),
    ],
)  # fmt: skip
def test_scores_of_one_model_are_told_apart_by_what_differs(first: Any, second: Any, titles: list[str]):
    lines = sorted_lines([some_scores(0, **first), some_scores(0, **second)], "entry", True, None)
    assert [line.title for line in lines.lines] == titles


# What is refused


LINE, MAP = bowl(points=(5,)), bowl()
ZERO = scores({"a.layer.0.w": [0.0, 0.0]}, name="m")


@pytest.mark.parametrize(
    ("draw", "error", "sentence"),
    [
        (lambda out: plots.surface(MAP, "a.jpg"), ValueError,
         "A figure ends in one of .pdf .png .svg .html, got 'a.jpg'; rename the output."),
        (lambda out: plots.surface([], out), ValueError, "surface needs at least one Landscape, got none."),
        (lambda out: plots.surface(some_scores(), out), TypeError,
         "surface needs a Landscape or a list of them, got FisherScores."),
        (lambda out: plots.dropout_sites([MAP], out), TypeError,  # pyright: ignore[reportArgumentType]
         "dropout_sites needs a GuidedSite or a list of them, got Landscape."),
        (lambda out: plots.dropout_sites([GuidedSite("a.drop", 0.0, 0.1)], out), ValueError,
         "All scores are 0, so there is nothing to draw on a logarithmic axis."),
        (lambda out: plots.layer_scores([MAP], out), TypeError,
         "layer_scores needs a FisherScores or a list of them, got Landscape."),
        (lambda out: plots.surface(LINE, out), ValueError,
         "surface needs landscapes of exactly two axes, got 1; use curves."),
        (lambda out: plots.curves(MAP, out), ValueError,
         "curves needs landscapes of exactly one axis, got 2; use surface or contour."),
        (lambda out: plots.contour([MAP, LINE], out), ValueError,
         "The landscapes of one figure need the same number of axes, got 1 and 2; draw those with one axis by curves "
         "and those with two by surface or contour."),
        (lambda out: plots.contour([MAP, bowl(objective="regression")], out), ValueError,
         "The landscapes of one figure share one scale, but these are of mlm and regression, whose losses have "
         "different units; draw them in separate figures."),
        (lambda out: plots.contour(bowl(objective="classification"), out, metric="perplexity"), ValueError,
         "Perplexity needs mlm, causal-lm or seq2seq-lm, but this landscape is of classification; draw the loss."),
        (lambda out: plots.contour(MAP, out, metric="accuracy"), ValueError,
         "metric must be 'loss', 'perplexity', or what was measured beside them (nothing else), got 'accuracy'."),
        (lambda out: plots.contour([MAP, MAP], out, titles=["a"]), ValueError,
         "titles must be one per Landscape (2), got 1."),
        (lambda out: plots.contour(landscape([[math.nan, None], [math.inf, None]]), out), ValueError,
         "There is nothing to draw: no point of the landscapes has a finite loss so far."),
        (lambda out: plots.sorted_scores(some_scores(), out, by="layer"), ValueError,
         "by must be 'entry' or 'parameter', got 'layer'."),
        (lambda out: plots.sorted_scores(ZERO, out), ValueError,
         "All scores of m are 0, so there is nothing to draw on a logarithmic axis."),
        (lambda out: plots.layer_scores(ZERO, out), ValueError,
         "All scores are 0, so there is nothing to draw on a logarithmic axis."),
        (lambda out: plots.sorted_scores(scores({"a.w": [2.0, 2.0]}), out, normalized=True), ValueError,
         "All scores of scores are 2, so there is nothing to normalise; draw them raw."),
        (lambda out: plots.sorted_scores([some_scores(), some_scores(reduction="sum")], out), ValueError,
         "Scores by mean and sum over the tokens of an example have different units; draw them in separate figures, or "
         "sorted with normalized=True."),
        (lambda out: plots.sorted_scores(scores({"a.w": [1.0]}, new=("a.w",)), out), ValueError,
         "There is nothing to draw: every scored parameter was drawn at random."),
        (lambda out: plots.stability(some_scores(name="m"), out), ValueError,
         "The scores of m have no history of their stability; estimate them again from at least four batches."),
        (lambda out: plots.comparison(some_scores(), top_fraction(some_scores(), 0.5), out), TypeError,
         "Two sets of scores or two masks can be compared, got one of each; make a mask from the scores."),
        (lambda out: plots.comparison(ZERO, ZERO, out), ValueError,
         "There is nothing to draw on logarithmic axes: no entry has a score above 0 in both."),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_drawn_is_refused_in_a_sentence(
    tmp_path: Path, draw: Callable[[Path], Path], error: type[Exception], sentence: str
):
    assert_refused(tmp_path, draw, error, sentence)


def assert_refused(folder: Path, draw: Callable[[Path], Path], error: type[Exception], sentence: str) -> None:
    """A figure is refused in exactly this sentence, and nothing is left of it."""
    with pytest.raises(error) as caught:
        draw(folder / "a.pdf")
    assert str(caught.value) == sentence
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["scores.h5", "--reference", "a"], "argument --reference: not for --kind layers of scores"),
        (["scores.h5", "--which", "last"], "argument --which: not for --kind layers of scores"),
        (["scores.h5", "--metric", "loss"], "argument --metric: not for --kind layers of scores"),
        (["scores.h5", "--width", "one-column"], "argument --width: not for --kind layers of scores"),
        (["scores.h5", "--by", "entry"], "argument --by: not for --kind layers of scores"),
        (
            ["scores.h5", "--kind", "sorted", "--fraction", "0.1"],
            "argument --fraction: not for --kind sorted of scores",
        ),
        (
            ["mask.safetensors", "mask.safetensors", "--fraction", "0.1"],
            "argument --fraction: not for --kind comparison of masks",
        ),
        (["map.h5", "--normalized"], "argument --normalized: not for --kind surface of landscapes"),
        (["map.h5", "--kind", "page", "--width", "one-column"], "argument --width: not for --kind page of landscapes"),
        (["map.h5", "--out", "a.vts", "--kind", "contour"], "argument --kind: not for files for ParaView"),
    ],
)
def test_flags_without_effect_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
):
    some_scores().save(tmp_path / "scores.h5")
    top_fraction(some_scores(), 0.5).save(tmp_path / "mask.safetensors")
    bowl().save(tmp_path / "map.h5")
    before = sorted(tmp_path.iterdir())
    words = [str(tmp_path / word) if (tmp_path / word) in before or word == "a.vts" else word for word in words]
    with pytest.raises(SystemExit):
        main(["plot", *words, *([] if "--out" in words else ["--out", str(tmp_path / "a.png")])])
    assert sentence in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_scores_of_different_reductions_can_be_compared_when_normalised():
    sorted_lines([some_scores(), some_scores(reduction="sum")], "entry", True, None)


# Files

TITLES = ["a title with so many words that it must be broken", "short", "_$x$_"]
PREPARED: dict[str, Callable[[], Panels | Lines | Layers | Parameters | Compared | Sites]] = {
    "dropout_sites": lambda: sites_shown([*some_sites(), GuidedSite("net.last", 0.0, 0.1)]),
    "comparison": lambda: compared(some_scores(0), noisy_scores(1), 0.1, TITLES[:2]),
    "stability": lambda: stability_lines([followed_scores(0), followed_scores(1)], None),
    "surface": lambda: surface_panels(bowl(), bowl(1.0), bowl(0.5), titles=TITLES),
    "contour": lambda: surface_panels(bowl(), bowl(1.0), bowl(0.5), titles=TITLES),
    "curves": lambda: surface_panels(bowl(points=(5,)), bowl(1.0, points=(7,))),
    "sorted_scores": lambda: sorted_lines([some_scores(0), some_scores(1)], "entry", False, None),
    "layer_scores": lambda: layers([some_scores(0), some_scores(1)], None),
    "parameter_scores": lambda: parameter_lines([some_scores(0), some_scores(1)], None),
}
FIGURES: dict[str, Callable[[Path], Path]] = {
    "dropout_sites": lambda out: plots.dropout_sites(some_sites(), out),
    "comparison": lambda out: plots.comparison(some_scores(0), noisy_scores(1), out),
    "stability": lambda out: plots.stability(followed_scores(), out),
    "surface": lambda out: plots.surface([bowl(), bowl(1.0)], out),
    "contour": lambda out: plots.contour([bowl(), bowl(1.0)], out, metric="perplexity"),
    "curves": lambda out: plots.curves([bowl(points=(5,)), bowl(1.0, points=(7,))], out),
    "sorted_scores": lambda out: plots.sorted_scores(some_scores(), out),
    "layer_scores": lambda out: plots.layer_scores(some_scores(), out),
    "parameter_scores": lambda out: plots.parameter_scores(some_scores(), out),
}
OPENINGS = {".pdf": b"%PDF", ".png": b"\x89PNG", ".svg": b"<?xml", ".html": (b"<html>", b"<!doctype html>")}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", PUBLIC)
def test_every_figure_becomes_every_kind_of_file_the_same_bytes_each_time(tmp_path: Path, name: str, suffix: str):
    first, second = (FIGURES[name](tmp_path / f"{number}{suffix}") for number in (1, 2))
    assert first == tmp_path / f"1{suffix}"
    assert first.read_bytes().startswith(OPENINGS[suffix])
    assert first.read_bytes() == second.read_bytes()
    assert not re.search(rb"CreationDate|<dc:date>", first.read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"1{suffix}", f"2{suffix}"]


def test_the_suffix_may_be_in_capitals(tmp_path: Path):
    assert FIGURES["curves"](tmp_path / "A.PDF").read_bytes().startswith(b"%PDF")


def test_drawing_changes_nothing_global(tmp_path: Path):
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "figure.dpi": 37}):
        loud = FIGURES["contour"](tmp_path / "loud.png")
    assert dict(matplotlib.rcParams) == before
    assert loud.read_bytes() == FIGURES["contour"](tmp_path / "plain.png").read_bytes()


def test_backends_are_imported_only_to_draw():
    code = "import sys, fisherscope.plots; print([m for m in ('matplotlib', 'plotly') if m in sys.modules])"
    root = Path(plots.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_both_backends_have_the_same_functions():
    # pages to explore are HTML only, and runs have backends of their own
    runs = {"learning_curves", "run_boxes", "run_costs", "run_ranks", "run_sizes"}
    assert sorted({*plots.__all__} - {"page", "volume"} - runs) == PUBLIC
    for backend in BACKENDS:
        assert sorted(backend.__all__) == sorted([*PUBLIC, "save"])
    for name in _matplotlib.__all__:
        first, second = (inspect.signature(getattr(backend, name)).parameters for backend in BACKENDS)
        assert list(first) == list(second)
        if name != "save":  # the figure to save is the backend's own
            assert [p.annotation for p in first.values()] == [p.annotation for p in second.values()]


# Figures for print


def overflow(figure: Any) -> float:
    """How many inches of a figure's contents lie outside its edges."""
    inside = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    return float(max(-inside.x0, -inside.y0, inside.x1 - width, inside.y1 - height))


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("name", PUBLIC)
def test_printed_figures_have_the_width_of_a_column_or_page_and_nothing_outside(name: str, count: int):
    title = "random 0.5 of entries within layer, seed 123"
    given: list[Any]
    if name == "curves":
        given = [bowl(1.0 + k, points=(5,), title=title) for k in range(count)]
    elif name in ("surface", "contour"):
        given = [bowl(1.0 + k, title=title) for k in range(count)]
    else:
        given = [followed_scores(k, name="a-model-with-a-long-name") for k in range(count)]
    prepared = {
        "dropout_sites": lambda: sites_shown(some_sites(count, "attention" * count)),
        "comparison": lambda: compared(given[0], noisy_scores(1, name="another-model-with-a-long-name"), 0.1, None),
        "stability": lambda: stability_lines(given, None),
        "surface": lambda: surface_panels(*given),
        "contour": lambda: surface_panels(*given, metric="perplexity"),
        "curves": lambda: surface_panels(*given),
        "sorted_scores": lambda: sorted_lines(given, "entry", False, None),
        "layer_scores": lambda: layers(given, None),
        "parameter_scores": lambda: parameter_lines(given, None),
    }[name]()
    figure = getattr(_matplotlib, name)(prepared)
    wide = name == "comparison" or (name in ("surface", "contour", "dropout_sites") and count > 1)
    assert figure.get_size_inches()[0] == (6.9 if wide else 3.3)
    assert overflow(figure) <= 0.0
    sizes = {text.get_size() for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()}
    assert min(sizes) >= 7.0 and max(sizes) <= 9.0


def regions(figure: Any) -> dict[str, Any]:
    """What stands on a page: every text outside the axes, the legend, and all axes with their labels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for text in figure.texts if text.get_text().strip()]
    found = {f"{n} {text.get_text()}": text.get_window_extent(renderer) for n, text in enumerate(texts)}
    found |= {f"legend {n}": legend.get_window_extent(renderer) for n, legend in enumerate(figure.legends)}
    return found | {f"axes {n}": axes.get_tightbbox(renderer) for n, axes in enumerate(figure.axes)}


@pytest.mark.parametrize("name", PUBLIC)
def test_nothing_on_a_printed_page_overlaps(name: str):
    figure = getattr(_matplotlib, name)(PREPARED[name]())
    found = regions(figure)
    parts = {"surface": 11, "contour": 11, "curves": 3, "sorted_scores": 3, "layer_scores": 2, "stability": 3}
    parts["parameter_scores"] = 2
    assert len(found) == (parts | {"comparison": 5, "dropout_sites": 3})[name]
    pairs = [(a, b) for a in found for b in found if a < b and found[a].overlaps(found[b])]
    # the slanted labels of neighbouring boxes pass each other, though the rectangles around them meet
    assert [pair for pair in pairs if name != "surface" or not all(region.startswith("axes") for region in pair)] == []


def test_titles_are_no_formulas_and_none_is_lost():
    figure = _matplotlib.curves(surface_panels(bowl(points=(5,)), bowl(1.0, points=(5,)), titles=["_a$b$", "c"]))
    assert [t.get_text().split("\n")[0] for t in figure.legends[0].get_texts()] == [r" _a\$b\$", "c"]


def area(polygon: np.ndarray) -> float:
    """Area of a polygon's shadow on the floor."""
    x, y = polygon[:, 0], polygon[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


@pytest.mark.parametrize("ceiling", [-0.5, 0.1, 0.5, 5.0])
def test_surfaces_are_cut_exactly_at_the_ceiling(ceiling: float):
    x, y = np.linspace(-1, 1, 7), np.linspace(-2, 2, 5)
    polygons = _matplotlib.clipped_cells(x, y, x[:, None] + 0 * y, ceiling)
    assert max(polygon[:, 2].max() for polygon in polygons) == pytest.approx(min(ceiling, 1.0))
    assert sum(map(area, polygons)) == pytest.approx((min(ceiling, 1.0) + 1) * 4)


def test_cells_without_a_number_are_holes():
    z = np.zeros((4, 4))
    z[1, 1] = np.nan
    polygons = _matplotlib.clipped_cells(np.arange(4.0), np.arange(4.0), z, 1.0)
    assert len(polygons) == 9 - 4
    assert not any(np.isnan(polygon).any() for polygon in polygons)


def test_the_printed_surface_ends_at_the_scale(monkeypatch: pytest.MonkeyPatch):
    drawn: list[np.ndarray] = []
    real = _matplotlib.Poly3DCollection
    monkeypatch.setattr(_matplotlib, "Poly3DCollection", lambda p, **style: drawn.extend(p) or real(p, **style))
    axes: Any = _matplotlib.surface(surface_panels(bowl(5.0))).axes[0]
    assert axes.get_zlim() == pytest.approx((2.0, 8.5))
    assert [text for text in axes.texts if text.get_text() == "θ"]
    assert max(polygon[:, 2].max() for polygon in drawn) == pytest.approx(8.5)
    assert min(polygon[:, 2].min() for polygon in drawn) == 2.0


def test_a_printed_map_has_direction_1_to_the_right():
    given = landscape([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    figure = _matplotlib.contour(surface_panels(given))
    axes = figure.axes[0]
    assert axes.get_xlabel() == "step along direction 1"
    red, green, _ = centre_colours(figure, axes, 0.95, 0.5)[:3]
    dark = centre_colours(figure, axes, 0.05, 0.9)[:3]
    assert green > 200 and red > 200
    assert max(dark) < 100


def centre_colours(figure: Any, axes: Any, across: float, up: float) -> Any:
    """The colour of a spot in a pair of axes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())
    box = axes.get_window_extent()
    return image[int(image.shape[0] - box.y0 - up * box.height), int(box.x0 + across * box.width)].astype(int)


def test_what_is_cut_is_grey_and_what_is_missing_is_not():
    given = landscape([[9.0, 9.0, 9.0], [2.0, 2.0, 2.0], [2.0, None, None]])
    figure = _matplotlib.contour(surface_panels(given))
    cut = centre_colours(figure, figure.axes[0], 0.03, 0.8)[:3]
    assert len(set(cut.tolist())) == 1 and 200 < cut[0] < 220
    assert "hatched where there is no number" in figure.texts[-1].get_text()
    assert "hatched" not in _matplotlib.contour(surface_panels(bowl())).texts[-1].get_text()


def test_reference_lines_of_a_printed_map_have_names():
    figure = _matplotlib.contour(surface_panels(bowl(), bowl(0.1)))
    first, second, bar = figure.axes
    assert {"ln V", "unigram"} <= {text.get_text() for text in first.texts}
    assert not {"ln V", "unigram"} & {text.get_text() for text in second.texts}
    assert {"ln V", "unigram\nentropy"} <= {text.get_text() for text in bar.texts}


def test_a_reference_that_only_cuts_corners_is_named_too():
    corners = np.full((9, 9), 7.0)
    corners[0, 0] = 8.1
    figure = _matplotlib.contour(surface_panels(landscape(corners.tolist())))
    assert [text.get_text() for text in figure.axes[0].texts].count("ln V") == 1


def test_printed_curves_are_the_losses_and_the_references():
    given = bowl(5.0, points=(9,))
    figure = _matplotlib.curves(surface_panels(given))
    curve, centre, *levels = figure.axes[0].lines
    assert np.array_equal(curve.get_ydata(), given.loss)
    assert centre.get_ydata() == [2.0]
    assert [line.get_ydata()[0] for line in levels] == [5.0]
    assert "unigram entropy = 5" in {text.get_text() for text in figure.axes[0].texts}


def test_a_panel_with_nothing_measured_yet_is_empty_beside_the_others():
    nothing = landscape([[None] * 3] * 3)
    for draw in (_matplotlib.surface, _matplotlib.contour, _plotly.surface, _plotly.contour):
        draw(surface_panels(bowl(), nothing))


def test_printed_layers_stand_from_the_top_down():
    figure = _matplotlib.layer_scores(layers(some_scores(), None))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["embed", "layer 0", "layer 1", "head"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("spread_by", [1.3, 3.0, 20.0, 70.0, 1e4, 1e9])
def test_labels_of_a_logarithmic_axis_have_room(spread_by: float):
    values = np.geomspace(2e-5, 2e-5 * spread_by, 4)
    given = scores({f"net.layer.{k}.weight": [value] * 3 for k, value in enumerate(values.tolist())}, prefix="net.")
    figure = _matplotlib.layer_scores(layers(given, None))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    ticks = [tick for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if low <= tick.get_loc() <= high]
    boxes = [t.label1.get_window_extent(renderer) for t in ticks if t.label1.get_text()]
    assert len(boxes) >= 1
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_printed_comparisons_are_the_agreement_and_the_counts():
    drawn = PREPARED["comparison"]()
    assert isinstance(drawn, Compared) and drawn.histogram is not None
    layers_, histogram, _ = _matplotlib.comparison(drawn).axes
    for line, series in zip(layers_.lines, (*drawn.series, drawn.chance), strict=True):
        assert (line.get_xdata() == series.y).all() and (line.get_ydata() == series.x).all()
    counts = histogram.collections[0].get_array()
    assert counts is not None and int(counts.sum()) == drawn.histogram.counts.sum()
    assert counts.reshape(drawn.histogram.counts.shape).filled(0)[3, 90] == drawn.histogram.counts[90, 3]
    masks = compared(top_fraction(some_scores(0), 0.5), top_fraction(some_scores(1), 0.5), 0.1, None)
    assert len(_matplotlib.comparison(masks).axes) == 1
    assert _matplotlib.comparison(masks).get_size_inches()[0] == 3.3


def test_stability_has_what_chance_gives_as_dotted_lines_once_for_all_scores():
    lines = stability_lines([followed_scores(0), followed_scores(1)], None)
    assert lines.levels == (("chance, top 10 %", 0.1), ("chance, top 50 %", 0.5))
    axes = _matplotlib.stability(lines).axes[0]
    assert [line.get_ydata()[0] for line in axes.lines[4:]] == [0.1, 0.5]
    assert [text.get_text() for text in axes.texts] == ["chance, top 10 %", "chance, top 50 %"]
    assert axes.get_ylim()[0] < 0.1
    layout = _plotly.stability(lines).layout
    assert [(shape.y0, shape.line.dash) for shape in layout.shapes] == [(0.1, "dot"), (0.5, "dot")]
    assert {text for text, _ in lines.levels} <= {note.text for note in layout.annotations}


def test_printed_stability_names_its_moments():
    axes = _matplotlib.stability(stability_lines(followed_scores(), None)).axes[0]
    assert axes.get_xscale() == "log" and axes.get_ylim()[1] == 1.0
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "10", "13", "18"]


# Figures for the browser


def decoded(value: Any) -> Any:
    """A plotly array as it is in the page: a list, or base64 with a type and a shape."""
    if not isinstance(value, dict):
        return np.array(value, dtype=float)
    flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]))
    return flat.reshape([int(size) for size in value["shape"].split(",")]) if "shape" in value else flat


def page(path: Path) -> tuple[list[Any], Any]:
    """Traces and layout in a page."""
    text = path.read_text(encoding="utf-8")
    call = text[text.rindex("Plotly.newPlot(") :]
    decoder = json.JSONDecoder()
    traces, end = decoder.raw_decode(call, call.index("["))
    layout, _ = decoder.raw_decode(call, call.index("{", end))
    return traces, layout


def test_a_page_of_surfaces_holds_the_measured_losses_and_needs_no_network(tmp_path: Path):
    given = landscape([[3.0, math.inf, 4.0], [3.5, 2.0, math.nan], [9.0, 3.0, None]])
    out = plots.surface([given, bowl()], tmp_path / "a.html", titles=["<b>&", "second"])
    assert not re.search(r"<(script|link)[^>]+(src|href)=", out.read_text(encoding="utf-8"))
    traces, layout = page(out)
    assert [trace["type"] for trace in traces] == ["surface", "scatter3d", "surface", "scatter3d"]
    expected = [[3.0, 3.5, 9.0], [math.nan, 2.0, 3.0], [4.0, math.nan, math.nan]]
    np.testing.assert_array_equal(decoded(traces[0]["z"]), expected)
    np.testing.assert_array_equal(decoded(traces[2]["x"]), np.linspace(-1, 1, 7))
    assert layout["scene"]["zaxis"]["range"] == layout["scene2"]["zaxis"]["range"] == [2.0, 8.5]
    assert layout["coloraxis"]["cmax"] == 8.5
    assert layout["annotations"][0]["text"].startswith("&lt;b&gt;&amp;<br>")


def test_a_page_of_maps_has_bands_on_one_scale_and_a_level_per_reference(tmp_path: Path):
    traces, layout = page(plots.contour([bowl(), bowl(0.1)], tmp_path / "a.html"))
    assert [trace["type"] for trace in traces] == ["contour", "contour", "contour", "scatter", "contour", "scatter"]
    first, second = traces[0], traces[4]
    assert first["contours"] == second["contours"]
    assert first["contours"]["end"] == pytest.approx(math.log(8.5))
    assert first["colorscale"][-1] == [1, "#d1d1d1"]
    assert [trace["name"] for trace in traces[1:3]] == ["ln V = 8", "unigram entropy = 5"]
    assert layout["yaxis"]["scaleanchor"] == "x" and layout["yaxis2"]["scaleanchor"] == "x2"
    np.testing.assert_allclose(decoded(first["z"]), np.log(bowl().loss.T))  # what colours go by
    np.testing.assert_array_equal(decoded(first["customdata"]), bowl().loss.T)  # what readers are told


def test_a_map_that_is_not_cut_has_no_grey():
    (trace,) = [t for t in _plotly.contour(surface_panels(bowl(0.1))).data if t.type == "contour"]
    assert [colour for _, colour in trace.colorscale][-1] != "#d1d1d1"
    assert len(trace.colorscale) == _plotly.LEVELS
    assert trace.contours.end + trace.contours.size == pytest.approx(2.0 + 0.1 * 3 + 0.3)


def test_pages_tell_perplexity_when_asked():
    figure = _plotly.surface(surface_panels(bowl(), metric="perplexity"))
    np.testing.assert_allclose(figure.data[0].customdata, np.exp(bowl().loss.T))
    assert "perplexity: %{customdata" in figure.data[0].hovertemplate
    assert "step 1: %{x" in figure.data[0].hovertemplate


def test_a_page_of_curves_has_the_references_as_lines():
    figure = _plotly.curves(surface_panels(bowl(9.0, points=(9,)), bowl(1.0, points=(5,))))
    assert [trace.mode for trace in figure.data] == ["lines", "markers", "lines", "markers"]
    assert [shape.y0 for shape in figure.layout.shapes] == [8.0, 5.0]
    assert {"ln V = 8", "unigram entropy = 5"} <= {note.text for note in figure.layout.annotations}
    assert figure.layout.yaxis.range[1] == 8.5


def halved_scores(seed: int = 0) -> FisherScores:
    """Scores whose first half, of 10 of 18 examples, has a quarter of every sum but that of the last parameter."""
    given = followed_scores(seed)
    shares = {name: torch.full(t.shape, 0.25, dtype=torch.float16) for name, t in given.items()}
    shares["head.bias"] = torch.zeros_like(shares["head.bias"])
    quarters = replace(given.quarters, num_examples=(2, 3, 2, 1))
    return replace(given, first_half=shares, quarters=quarters)


def test_layers_have_whiskers_between_the_means_by_either_half():
    drawn = layers([halved_scores(), some_scores(1)], ["a", "b"])
    means = np.array([float(t.mean()) for t in halved_scores().values()])
    first, second = means * 0.25 * 8 / 4, means * 0.75 * 8 / 4
    first[3], second[3] = means[3], 2 * means[3]  # an end at 0 cannot be shown
    ranges = drawn.ranges[0]
    assert ranges is not None and drawn.ranges[1] is None
    np.testing.assert_allclose(ranges, [first, second], rtol=1e-3)
    assert "whiskers: means by either half of the examples alone" in drawn.notes
    assert not any("whiskers" in note for note in layers(some_scores(), None).notes)
    (lines,) = _matplotlib.layer_scores(drawn).axes[0].collections
    ends = np.array([path.vertices[:, 0] for path in lines.get_paths()]).T
    np.testing.assert_array_equal(ends, ranges)
    a, b = _plotly.layer_scores(drawn).data
    np.testing.assert_allclose([a.x - a.error_x.arrayminus, a.x + a.error_x.array], ranges)
    assert b.error_x.array is None


@pytest.mark.parametrize("count", [1, 2, 7])
def test_dots_of_several_scores_do_not_cover_each_other(count: int):
    drawn = layers([some_scores(0)] * count, None)
    figure = _matplotlib.layer_scores(drawn)
    heights = [line.get_ydata() for line in figure.axes[0].lines]
    assert [np.array_equal(t.y, y) for t, y in zip(_plotly.layer_scores(drawn).data, heights, strict=True)] == [
        True
    ] * count
    assert np.allclose(np.mean(heights, axis=0), range(4)) and np.abs(heights - np.arange(4)).max() < 0.4
    pixels = figure.axes[0].transData.transform(np.column_stack([np.ones(count), [y[0] for y in heights]]))[:, 1]
    assert (np.abs(np.diff(pixels)) * 72 / figure.dpi >= 2.5).all()


def test_pages_of_scores_show_the_same_points_as_print():
    lines = sorted_lines([some_scores(0), some_scores(1)], "entry", False, None)
    figure = _plotly.sorted_scores(lines)
    for trace, line in zip(figure.data, lines.lines, strict=True):
        assert np.array_equal(trace.y, line.y)
    assert figure.layout.yaxis.type == "log"
    assert lines.notes[0] in figure.layout.annotations[0].text
    drawn = layers([some_scores(0), some_scores(1)], None)
    figure = _plotly.layer_scores(drawn)
    assert list(figure.layout.yaxis.ticktext) == list(drawn.labels)
    assert [np.array_equal(t.x, s.y) for t, s in zip(figure.data, drawn.series, strict=True)] == [True, True]


def test_sites_stand_in_order_under_the_name_of_their_layer():
    shown = sites_shown(some_sites())
    assert shown.labels == ("embeddings: dropout", "layer 0: attention", "output", "layer 1: attention", "output")
    assert shown.layers == ((0, 1), (1, 3), (3, 5))
    assert shown.names[3] == "net.layer.1.attention.dropout"
    assert shown.rates.tolist() == [0.0, 0.01, 0.02, 0.03, 0.04]
    assert shown.scores.tolist() == [1.0, 0.1, 0.01, 0.001, 0.0001]


def test_a_site_without_a_score_has_a_rate_and_a_note_but_no_dot():
    shown = PREPARED["dropout_sites"]()
    assert isinstance(shown, Sites)
    assert shown.notes == ("exactly 0 in net.last",)
    scores, rates = _matplotlib.dropout_sites(shown).axes
    assert len(scores.lines[0].get_xdata()) == 5 and len(rates.lines[0].get_xdata()) == 6
    assert np.isnan(_plotly.dropout_sites(shown).data[1].x).tolist() == [False] * 5 + [True]


def test_sites_are_drawn_at_their_rates_and_scores_by_both_backends():
    shown = sites_shown(some_sites())
    scores, rates = _matplotlib.dropout_sites(shown).axes
    bars, dots = _plotly.dropout_sites(shown).data
    for drawn in (rates.lines[0].get_xdata(), bars.x):
        assert np.array_equal(drawn, shown.rates)
    for drawn in (scores.lines[0].get_xdata(), dots.x):
        assert np.array_equal(drawn, shown.scores)
    assert [label.get_text() for label in rates.get_yticklabels()] == list(shown.labels)
    assert rates.get_ylim() == scores.get_ylim() == (4.5, -0.5)


def test_pages_of_stability_and_comparisons_show_the_same_as_print():
    lines = stability_lines(followed_scores(), None)
    for trace, line in zip(_plotly.stability(lines).data, lines.lines, strict=True):
        assert np.array_equal(trace.x, line.x) and np.array_equal(trace.y, line.y)
    drawn = PREPARED["comparison"]()
    assert isinstance(drawn, Compared) and drawn.histogram is not None
    figure = _plotly.comparison(drawn)
    for trace, series in zip(figure.data, (*drawn.series, drawn.chance), strict=False):
        assert np.array_equal(trace.x, series.y) and np.array_equal(trace.y, series.x)
    (heatmap,) = [trace for trace in figure.data if trace.type == "heatmap"]
    assert np.nansum(heatmap.customdata) == drawn.histogram.counts.sum()
    assert np.nan_to_num(heatmap.customdata[3][90]) == drawn.histogram.counts[90, 3]
    assert {shape.x0 for shape in figure.layout.shapes} > {drawn.histogram.marks[0]}
    masks = compared(top_fraction(some_scores(0), 0.5), top_fraction(some_scores(1), 0.5), 0.1, None)
    assert [trace.type for trace in _plotly.comparison(masks).data] == ["scatter"] * 3


LONG = "(top 0.1 of entries within model) & (~(random 0.5 of entries within model, seed 0))"


@pytest.mark.parametrize("name", ["curves", "contour", "surface"])
def test_the_name_of_a_combined_mask_stays_in_the_figure_and_in_one_piece(name: str):
    given = bowl(points=(5,) if name == "curves" else (5, 5), title=LONG)
    figure = getattr(_matplotlib, name)(surface_panels(given))
    assert overflow(figure) <= 0.0
    words = short_title(LONG)
    assert words in {text.get_text().replace("\n", " ") for text in figure.findobj(Text)}
    figure = getattr(_plotly, name)(surface_panels(given))
    [whole] = [
        text
        for text in [*(note.text for note in figure.layout.annotations), *(trace.name for trace in figure.data)]
        if text and "(top 10" in text
    ]
    lines = html.unescape(whole).split("<br>")
    assert " ".join(lines).startswith(words) and max(map(len, lines[:-1])) <= 80


def test_notes_in_a_browser_are_folded_and_the_margin_grows_with_them():
    short, long = (_plotly.comparison(compared(some_scores(0), noisy_scores(1), 0.1, [n, n])) for n in ("a", "a " * 99))
    lines = [figure.layout.annotations[0].text.split("<br>") for figure in (short, long)]
    assert len(lines[1]) > len(lines[0]) and max(map(len, lines[1])) <= 130
    assert long.layout.margin.b - short.layout.margin.b == 18 * (len(lines[1]) - len(lines[0]))
    assert long.layout.height - short.layout.height == long.layout.margin.b - short.layout.margin.b
