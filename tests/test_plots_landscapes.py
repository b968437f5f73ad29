"""Figures of landscapes for print: what each element shows, and that it stands where there is room for it."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text
from scipy import stats
from test_plots import axis, bowl, centre_colours, landscape, overflow, regions

from fisherscope import plots
from fisherscope.landscape import Axis, Landscape
from fisherscope.landscape.surface import Geometry, Marker, Prediction, mean_of
from fisherscope.plots import _matplotlib, _plotly
from fisherscope.plots._prepare import Panels
from fisherscope.plots._prepare_landscapes import marker_notes, panels

NBSP = "\N{NO-BREAK SPACE}"
SETTINGS = {"directions": "random, filter-normalised", "seed": 3, "one_dimensional": "skip", "match": "norm"}
PROVENANCE: dict[str, Any] = {
    "model": {"name": "m"},
    "data": {"source": "docs", "settings": {"num_examples": 1200}},
    "settings": SETTINGS | {"orthogonal": True, "tokens": 4321, "dtype": "float32"},
}


def shown(*given: Landscape, plot: str = "contour", metric: str = "loss", width: Any = None, **options: Any) -> Panels:
    axes = 1 if plot == "curves" else 2
    slices = plot == "contour"
    return panels(list(given), metric, None, axes=axes, plot=plot, slices=slices, width=width, **options)


def geometry(*norms: float, weights: float = 10.0, cosine: float = 0.25, fisher: Any = None, **facts: Any) -> Geometry:
    """Directions of these norms, all at one angle to each other."""
    inner = np.array([[a * b * (1.0 if i == j else cosine) for j, b in enumerate(norms)] for i, a in enumerate(norms)])
    return Geometry(inner, weights, fisher, **facts)


def with_norms(given: Landscape, *norms: float, **facts: Any) -> Landscape:
    axes = tuple(replace(a, norm=n) for a, n in zip(given.axes, norms, strict=True))
    return replace(given, axes=axes, geometry=geometry(*norms, **facts))


def several(count: int = 3, points: int = 7, **facts: Any) -> Landscape:
    """Replicates whose losses differ, and whose scores foretell curvatures 2, 4, 6, ..."""
    draws = np.random.default_rng(0).random((count, points))
    draws[:, points // 2] = 0.5
    parts = []
    for number, draw in enumerate(draws):
        part = landscape((draw + 2).tolist(), metrics={"accuracy": 1 - draw}, **facts)
        fisher = np.array([[2.0 * (number + 1)]])
        parts.append(replace(part, geometry=geometry(12.34, fisher=fisher, quadratic=True)))
    return mean_of(parts)


def marked(connected: bool = True, steps: Any = ((-0.6, 0.5), (-0.3, 0.2), (0.1, 0.2), (0.0, 0.0))) -> Landscape:
    each = [Marker(f"epoch {k}", tuple(map(float, s)), 1.0, 2.5 + k, 2.25 + k) for k, s in enumerate(steps)]
    return replace(bowl(1.0), markers=tuple(each), connected=connected)


def adaptive() -> Landscape:
    given = bowl(1.0)
    evaluated = np.zeros(given.loss.shape, dtype=bool)
    evaluated[::2, ::2] = True
    return replace(given, evaluated=evaluated, prediction=Prediction(0.02, 0.004, 0.018, 0.05, int(evaluated.sum())))


# The scale


def test_maps_are_coloured_by_the_logarithm_of_the_loss_and_say_so():
    scale = shown(bowl(1.0)).scale
    assert (scale.is_log, scale.label) == (True, "MLM loss (nats per scored token, log scale)")
    edges = scale.levels(20)
    assert (edges[0], edges[-1]) == (pytest.approx(scale.low), pytest.approx(scale.high))
    assert np.allclose(np.diff(np.log(edges)), np.log(scale.high / scale.low) / 20)
    for value, text in scale.ticks:
        assert float(text) == pytest.approx(value)


@pytest.mark.parametrize(("plot", "metric"), [("surface", "loss"), ("contour", "perplexity"), ("contour", "accuracy")])
def test_other_scales_are_evenly_spaced(plot: str, metric: str):
    given = replace(bowl(1.0), metrics={"accuracy": bowl(0.1).loss})
    scale = shown(given, plot=plot, metric=metric).scale
    assert not scale.is_log
    assert np.allclose(np.diff(scale.levels(20)), (scale.high - scale.low) / 20)


def test_a_loss_of_zero_has_no_logarithm_and_a_plain_scale():
    given = landscape([[0.0, 1.0], [2.0, 3.0]], objective="my_loss", references={})
    assert (shown(given).scale.is_log, shown(given).scale.label) == (False, "my_loss per example")
    assert shown(replace(given, loss=given.loss + 1)).scale.label == "my_loss per example (log scale)"


def test_a_printed_map_has_the_colour_of_the_logarithm():
    figure = _matplotlib.contour(shown(landscape([[1.0] * 3, [10.0] * 3, [100.0] * 3], references={})))
    found = centre_colours(figure, figure.axes[0], 0.44, 0.2)[:3]  # loss is linear in between, so 8.92 here
    band = int(20 * math.log(8.92) / math.log(100))
    assert np.abs(found - 255 * np.array(_matplotlib._colours(20)(band)[:3])).max() <= 2


# Metrics


def test_another_surface_is_drawn_as_it_is_without_cut_or_references():
    given = replace(bowl(9.0), metrics={"top_5": 0.3 + 0.1 * bowl(0.5).loss})
    drawn = shown(given, metric="top_5")
    assert np.array_equal(drawn.panels[0].losses, given.metrics["top_5"])
    assert (drawn.scale.low, drawn.scale.high) == (given.metrics["top_5"].min(), given.metrics["top_5"].max())
    assert (drawn.scale.label, drawn.scale.is_cut) == ("top 5", False)
    assert drawn.references == drawn.panels[0].references == ()
    assert drawn.panels[0].centre == given.metrics["top_5"][given.centre]
    assert not any("cut" in note for note in drawn.notes)


def test_points_that_only_the_first_batch_saw_have_a_loss_but_no_metric():
    given = replace(bowl(1.0), metrics={"accuracy": bowl(0.1).loss})
    clipped = np.zeros(given.loss.shape, dtype=bool)
    clipped[0] = True
    given = replace(given, clipped=clipped)
    assert np.array_equal(np.isnan(shown(given, metric="accuracy").panels[0].losses), clipped)
    assert not np.isnan(shown(given).panels[0].losses).any()


# Notes


def test_a_panel_says_how_far_its_directions_go_by_the_weights_and_the_angle_between_them():
    given = replace(with_norms(bowl(), 5.0, 2.5), title="x")
    assert shown(given).panels[0].notes[1:] == (
        f"‖d₁‖{NBSP}={NBSP}5.00, ‖d₂‖{NBSP}={NBSP}2.50",
        f"0.500, 0.250 of ‖θ‖, cosine{NBSP}0.25",
    )
    assert shown(with_norms(bowl(), 5.0, 5.01, cosine=-0.004)).panels[0].notes[2] == f"0.500 of ‖θ‖, cosine{NBSP}0.00"
    line = with_norms(bowl(points=(5,)), 5.0)
    assert shown(line, plot="curves").panels[0].notes[1:] == (f"‖d‖{NBSP}={NBSP}5.00", "0.500 of ‖θ‖")


@pytest.mark.parametrize("backend", [_matplotlib, _plotly])
def test_signs_for_lengths_and_angles_are_explained_where_they_are_used(backend: Any):
    def told(draw: str, *given: Landscape) -> str:
        figure = getattr(backend, draw)(shown(*given, plot=draw))
        if backend is _plotly:
            return " ".join(note.text for note in figure.layout.annotations)
        return figure.texts[-1].get_text().replace("\n", " ")

    plane, line = with_norms(bowl(), 5.0, 5.0), with_norms(bowl(points=(5,)), 5.0)
    lengths = "‖d‖: length of a step of 1; ‖θ‖: length of all weights"
    cosine, axis_ = (
        "; cosine: of the angle between two directions",
        "‖δ‖ / ‖θ‖: length of the step, by that of all weights",
    )
    for draw, given in (("contour", plane), ("surface", plane), ("curves", line)):
        assert lengths in told(draw, given)
        assert (cosine in told(draw, given)) == (given is plane)
        assert (axis_ in told(draw, given)) == (backend is _matplotlib and draw != "surface")
    for draw, given in (("contour", bowl()), ("curves", bowl(points=(5,)))):
        assert not any(words in told(draw, given) for words in (lengths, cosine, axis_))


def test_norms_are_those_of_all_replicates_on_average():
    parts = [with_norms(part, norm) for part, norm in zip(several(2).replicates, (3.0, 5.0), strict=True)]
    panel = shown(mean_of(parts), plot="curves").panels[0]
    assert panel.notes[1] == f"‖d‖{NBSP}={NBSP}4.00"
    assert panel.relative == (0.4,)


def test_a_figure_says_how_its_directions_were_made_and_what_the_loss_is_of():
    notes = shown(bowl(provenance=PROVENANCE)).notes
    assert notes[-2] == (
        "random, filter-normalised directions; seed 3; biases and norms at rest; made orthogonal; sizes matched by norm"
    )
    assert notes[-1] == "m; 1,200 examples of docs; 4,321 scored tokens; float32"


def test_what_differs_between_the_landscapes_of_a_figure_is_all_named():
    other = PROVENANCE | {"settings": PROVENANCE["settings"] | {"seed": 4, "match": "none"}}
    notes = shown(bowl(provenance=PROVENANCE), bowl(provenance=other)).notes
    assert "; seed 3 and seed 4; " in notes[-2]
    assert notes[-2].endswith("; sizes matched by norm (not all)")


def test_given_directions_have_no_seed_and_hand_made_landscapes_no_story():
    given = PROVENANCE | {"settings": {"directions": ["to x"], "seed": None, "one_dimensional": "skip"}}
    notes = shown(bowl(provenance=given)).notes
    assert notes[-1].startswith("m; ") and notes[-2].endswith("linear in between")
    assert shown(bowl(1.0)).notes == ("7 \N{MULTIPLICATION SIGN} 5 points, linear in between",)


def test_scored_tokens_are_counted_where_they_are_kept():
    given = landscape([2.0, 1.0, 2.0], provenance=PROVENANCE, counts=np.array([3, 4]), examples=np.ones((3, 2)))
    assert "; 7 scored tokens; " in shown(given, plot="curves").notes[-1]
    labels = replace(given, objective="classification", references={})
    assert "; 7 scored labels; " in shown(labels, plot="curves").notes[-1]


def test_axes_are_named_after_special_directions():
    a, b = axis(0, 7), replace(axis(1, 5), kind="2nd principal component, 9.1 % of the variance")
    assert shown(replace(bowl(), axes=(a, b))).panels[0].labels == ("step along direction 1", b.kind)
    figure = _matplotlib.surface(shown(replace(bowl(), axes=(a, b)), plot="surface"))
    assert f"direction 2: {b.kind}" in figure.texts[-1].get_text()
    assert "direction 1:" not in figure.texts[-1].get_text()
    label = _matplotlib.contour(shown(replace(bowl(), axes=(a, b)))).axes[0].get_ylabel()
    assert label.replace("\n", " ") == b.kind and label.count("\n") >= 1


# Replicates and the Fisher quadratic


def test_the_band_is_students_interval_of_the_mean_over_directions():
    given = several(4)
    panel = shown(given, plot="curves").panels[0]
    losses = np.stack([part.loss for part in given.replicates])
    half = stats.t.ppf(0.975, 3) * losses.std(0, ddof=1) / 2
    centre = given.centre[0]
    assert panel.band is not None
    assert np.allclose(panel.band, [losses.mean(0) - half, losses.mean(0) + half], rtol=1e-12)
    assert [end[centre] for end in panel.band] == [2.5, 2.5]
    assert np.array_equal(panel.replicates, losses)
    assert np.allclose(panel.losses, losses.mean(0))


def test_metrics_have_bands_too():
    given = several(3)
    panel = shown(given, plot="curves", metric="accuracy").panels[0]
    values = np.stack([part.metrics["accuracy"] for part in given.replicates])
    assert panel.band is not None
    half = stats.t.ppf(0.975, 2) * values.std(0, ddof=1) / math.sqrt(3)
    assert np.allclose(panel.band[1], values.mean(0) + half)
    assert panel.quadratic is None


def test_the_fisher_quadratic_is_the_loss_at_the_centre_and_half_the_mean_curvature():
    given = several(3)
    panel = shown(given, plot="curves").panels[0]
    assert panel.quadratic is not None
    assert np.allclose(panel.quadratic, [2.5 + 0.5 * 4.0 * step**2 for step in given.axes[0].steps])


def test_scores_that_foretell_no_loss_draw_none():
    one = several(1).replicates[0]
    geometry_ = one.geometry
    assert geometry_ is not None
    for other in (replace(geometry_, quadratic=False), replace(geometry_, fisher=None), None):
        assert shown(replace(one, geometry=other), plot="curves").panels[0].quadratic is None


@pytest.mark.parametrize("count", [4, 5])
def test_crowded_figures_have_no_quadratics(count: int):
    """Nobody could tell which is whose."""
    drawn = shown(*[several(3)] * count, plot="curves").panels
    assert [panel.quadratic is not None for panel in drawn] == [count <= 4] * count


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_landscapes_of_four_axes_are_refused_in_one_sentence(axes: int):
    four = Axis("axis0", np.array([-1.0, 0.0, 1.0]), 1.0, 1)
    given = Landscape((four,) * 4, np.ones((3,) * 4), np.ones((3,) * 4, dtype=bool))
    with pytest.raises(ValueError, match="got 4"):
        panels(given, "loss", None, axes=axes, plot="curves")


def test_printed_curves_have_a_band_and_thin_lines_while_they_are_few():
    given = several(3)
    axes = _matplotlib.curves(shown(given, plot="curves")).axes[0]
    (band,) = axes.collections
    corners = np.asarray(band.get_paths()[0].vertices)
    panel = shown(given, plot="curves").panels[0]
    assert panel.band is not None
    for end in panel.band:
        for place in zip(panel.steps[0], end, strict=True):
            assert np.isclose(corners, place).all(axis=1).any()
    drawn = [np.asarray(line.get_ydata()) for line in axes.lines]
    for part in given.replicates:
        assert any(np.array_equal(line, part.loss) for line in drawn)
    many = _matplotlib.curves(shown(given, several(8), plot="curves")).axes[0]
    drawn = [np.asarray(line.get_ydata()) for line in many.lines]
    assert not any(np.array_equal(line, given.replicates[0].loss) for line in drawn)
    assert len(many.collections) == 2


def steep_replicates(count: int, base: float) -> Landscape:
    """Replicates of curvatures so different that their interval and the steepest of them go far beyond the mean."""
    x = np.linspace(-1, 1, 7)
    return mean_of([landscape((base + 3.0**number * 0.1 * x**2).tolist()) for number in range(count)])


@pytest.mark.parametrize("count", [4, 11])
@pytest.mark.parametrize("backend", [_matplotlib, _plotly])
def test_axes_of_curves_hold_intervals_and_single_directions(backend: Any, count: int):
    given = steep_replicates(4, 3.0)
    if count > 4:  # single directions are not drawn
        given = mean_of([*given.replicates, *[landscape([3.0] * 7)] * (count - 4)])
    drawn = shown(given, plot="curves")
    figure = backend.curves(drawn)
    low, high = figure.axes[0].get_ylim() if backend is _matplotlib else figure.layout.yaxis.range
    assert drawn.panels[0].band is not None
    singles = [part.loss for part in given.replicates] if count == 4 else []
    everything = np.concatenate([given.loss, *drawn.panels[0].band, *singles])
    assert low <= everything.min() and everything.max() <= high < 8.5
    assert low >= everything.min() - 0.1 * np.ptp(everything) and high <= everything.max() + 0.1 * np.ptp(everything)
    assert drawn.scale.ticks[-1][0] >= everything.max() - 0.3 * np.ptp(everything)


def test_intervals_and_single_directions_are_cut_where_losses_are_and_the_note_says_so():
    drawn = shown(steep_replicates(4, 7.0), plot="curves")
    assert (drawn.scale.high, drawn.scale.is_cut) == (8.5, True)
    assert drawn.notes[0] == (
        "cut at ln V + 0.5 = 8.5 nats; 0 of 7 points above, and parts of intervals or single directions"
    )


@pytest.mark.parametrize("backend", [_matplotlib, _plotly])
def test_every_interval_has_an_edge_of_the_colour_and_dashes_of_its_curve(backend: Any):
    drawn = shown(several(4), several(5), plot="curves")
    figure = backend.curves(drawn)
    if backend is _plotly:
        assert figure.layout.legend.traceorder == "normal"  # else bands turn it round
    for panel, dashes in zip(drawn.panels, ("-", "--") if backend is _matplotlib else ("solid", "dash"), strict=True):
        lines = (
            [(i.get_ydata(), i.get_linestyle()) for i in figure.axes[0].lines]
            if backend is _matplotlib
            else [(i.y, i.line.dash) for i in figure.data]
        )
        assert panel.band is not None
        for end in panel.band:
            assert any(np.array_equal(y, end) and style == dashes for y, style in lines)


def test_printed_curves_say_what_is_shaded_thin_and_dotted():
    few, many = (_matplotlib.curves(shown(several(n), plot="curves")).texts[-1].get_text() for n in (3, 11))
    assert f"means over 3 directions, shaded: their 95{NBSP}% interval" in few
    assert "thin lines: single directions" in few and "thin" not in many
    assert "dotted: L(0) + ½ s² dᵀFd" in few
    assert "dotted" not in _matplotlib.curves(shown(bowl(points=(5,)), plot="curves")).texts[-1].get_text()


def test_the_dotted_line_is_the_fisher_quadratic():
    drawn = shown(several(3), plot="curves")
    axes = _matplotlib.curves(drawn).axes[0]
    quadratic = drawn.panels[0].quadratic
    assert quadratic is not None
    (dotted,) = [line for line in axes.lines if np.array_equal(line.get_ydata(), quadratic)]
    assert dotted.get_linestyle() not in ("-", "None")


def test_maps_of_replicates_are_their_mean_and_say_so():
    a, b = bowl(1.0), bowl(2.0)
    drawn = shown(mean_of([a, b]))
    assert np.allclose(drawn.panels[0].losses, (a.loss + b.loss) / 2)
    assert "means over 2 pairs of directions" in drawn.notes


# Sizes by the weights


def test_sizes_by_the_weights_are_shared_within_a_hundredth():
    assert shown(with_norms(bowl(), 5.0, 5.04)).relative == pytest.approx(0.5)
    assert shown(with_norms(bowl(), 5.0, 5.1)).relative is None
    assert shown(with_norms(bowl(), 5.0, 5.0), with_norms(bowl(), 5.1, 5.0)).relative is None
    assert shown(bowl()).relative is None
    assert shown(with_norms(bowl(), 5.0, 5.0), bowl()).relative is None


def ticks_above(axes: Any) -> list[tuple[float, str]]:
    """Where the ticks of the second axis on top stand, as steps, and their texts."""
    (top,) = axes.child_axes
    axes.get_figure().draw_without_rendering()
    scale = axes.get_xlim()[1] / top.get_xlim()[1]
    return [
        (float(at) * scale, text.get_text()) for at, text in zip(top.get_xticks(), top.get_xticklabels(), strict=True)
    ]


def test_a_second_axis_tells_sizes_by_the_weights():
    for figure, most in (
        (_matplotlib.contour(shown(with_norms(bowl(), 5.0, 5.0))), "0.5"),
        (_matplotlib.curves(shown(with_norms(bowl(points=(5,)), 5.0), plot="curves")), "0.4"),
    ):
        ticks = ticks_above(figure.axes[0])
        assert len(ticks) >= 3 and {"0", most} <= {text for _, text in ticks}
        for step, text in ticks:
            assert 0.5 * abs(step) == pytest.approx(float(text), abs=1e-9)
        assert figure.axes[0].child_axes[0].get_xlabel() == "‖δ‖ / ‖θ‖"


def test_there_is_no_second_axis_where_sizes_differ():
    assert _matplotlib.contour(shown(with_norms(bowl(), 5.0, 4.0))).axes[0].child_axes == []


def test_maps_are_true_to_distance_where_both_axes_have_one_unit():
    assert _matplotlib.contour(shown(bowl())).axes[0].get_aspect() == 1.0
    assert _matplotlib.contour(shown(with_norms(bowl(), 5.0, 4.0))).axes[0].get_aspect() == "auto"


# Other models


def test_losses_of_other_models_stand_beside_those_of_the_plane():
    given = marked()
    assert marker_notes(shown(given)) == [
        "loss of other models (of the nearest point of the plane): "
        + ", ".join(f"epoch{NBSP}{k}:{NBSP}{2.5 + k:.2f}{NBSP}({2.25 + k:.2f})" for k in range(4))
    ]
    first, second = marker_notes(shown(given, given))
    assert first.startswith("all entries (1): loss") and second.startswith("all entries (2): loss")
    unknown = replace(given, markers=tuple(replace(m, loss=None) for m in given.markers))
    assert marker_notes(shown(unknown)) == []


def dots(axes: Any, marker: str = "o") -> list[tuple[float, float]]:
    """The places of other models."""
    lines = [line for line in axes.lines if line.get_marker() == marker and line.get_color() == _matplotlib._MARKER]
    return [(float(x), float(y)) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def arrows(axes: Any) -> list[Annotation]:
    return [text for text in axes.texts if isinstance(text, Annotation) and text.arrow_patch is not None]


def test_other_models_are_marked_where_they_are_and_named():
    figure = _matplotlib.contour(shown(marked()))
    axes = figure.axes[0]
    assert dots(axes) == [(-0.6, 0.5), (-0.3, 0.2), (0.1, 0.2), (0.0, 0.0)]
    names = [text.get_text() for text in axes.texts]
    assert {"epoch 0", "epoch 1", "epoch 2", "θ"} <= set(names)
    assert "epoch 3" not in names  # it is the model itself
    assert "loss of other models" in figure.texts[-1].get_text()


def test_a_path_has_arrows_in_its_order_and_single_models_have_none():
    axes = _matplotlib.contour(shown(marked())).axes[0]
    ends = [(arrow.xyann, arrow.xy) for arrow in arrows(axes)]
    assert ends == list(itertools.pairwise([(-0.6, 0.5), (-0.3, 0.2), (0.1, 0.2), (0.0, 0.0)]))
    assert arrows(_matplotlib.contour(shown(marked(connected=False))).axes[0]) == []


def test_a_model_beyond_the_map_is_not_drawn():
    axes = _matplotlib.contour(shown(marked(False, [(0.5, 0.5), (1.5, 0.0)]))).axes[0]
    assert dots(axes) == [(0.5, 0.5)]
    assert "epoch 1" not in {text.get_text() for text in axes.texts}


def test_names_of_models_never_cover_each_other_or_leave_the_map():
    crowd = [(0.3 * math.cos(k), 0.3 * math.sin(k)) for k in range(12)] + [(0.98, 0.98), (-0.98, -0.9)]
    figure = _matplotlib.contour(shown(marked(False, crowd)))
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0]
    texts = [text for text in axes.texts if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text().startswith("epoch")]
    frame = axes.get_window_extent(renderer)
    assert 3 <= len(boxes) < 14
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)


def test_models_on_a_printed_surface_are_at_its_height_and_their_path_lies_on_it():
    given = marked()
    axes: Any = _matplotlib.surface(shown(given, plot="surface")).axes[0]
    (line,) = [curve for curve in axes.lines if curve.get_color() == _matplotlib._MARKER]
    x, y, z = line.get_data_3d()
    assert list(zip(x, y, strict=True)) == [m.steps for m in given.markers]
    corner = given.loss[given.centre]
    assert z[-1] == pytest.approx(corner)
    (path,) = [np.array(curve.get_data_3d()) for curve in axes.lines if len(curve.get_data_3d()[0]) == 3 * 20]
    rows, columns = (a.steps for a in given.axes)
    for a, b, height in path.T[::7]:
        i, j = (min(int(np.searchsorted(s, v, "right")) - 1, len(s) - 2) for s, v in ((rows, a), (columns, b)))
        u, v = (a - rows[i]) / (rows[i + 1] - rows[i]), (b - columns[j]) / (columns[j + 1] - columns[j])
        cell = given.loss[i : i + 2, j : j + 2]
        assert height == pytest.approx(np.array([1 - u, u]) @ cell @ np.array([1 - v, v]))
    assert "epoch 0\n" in {text.get_text() for text in axes.texts}
    alone: Any = _matplotlib.surface(shown(replace(given, connected=False), plot="surface")).axes[0]
    assert {"epoch 0\n", "epoch 1\n", "epoch 2\n"} <= {text.get_text() for text in alone.texts}
    assert not [curve for curve in alone.lines if len(curve.get_data_3d()[0]) == 3 * 20]


def test_another_model_on_a_line_is_marked_on_the_curve():
    given = replace(bowl(points=(5,)), markers=(Marker("tuned", (0.75,), 0.0, 2.0, 3.0),))
    figure = _matplotlib.curves(shown(given, plot="curves"))
    (mark,) = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert np.allclose(np.asarray(mark.get_xydata()), [(0.75, (given.loss[3] + given.loss[4]) / 2)])
    assert "tuned" in {text.get_text() for text in figure.axes[0].texts}
    assert "(of the nearest point of the line)" in figure.texts[-1].get_text().replace("\n", " ")


@pytest.mark.parametrize("plot", ["curves", "surface"])
def test_other_models_are_drawn_at_the_height_of_what_is_shown(plot: str):
    steps = (0.5,) if plot == "curves" else (0.5, 0.5)
    given = bowl(points=(5,)) if plot == "curves" else bowl(points=(5, 5))
    own = replace(given, markers=(Marker("tuned", steps, 0.0, 2.0, 3.0),), metrics={"accuracy": 0.1 * given.loss})
    at = {"loss": 3.0, "accuracy": 0.1 * given.loss[(3,) * len(steps)]}
    for metric, height in at.items():
        figure = getattr(_plotly, plot)(shown(own, plot=plot, metric=metric))
        (trace,) = [trace for trace in figure.data if trace.hoverinfo == "text"]
        assert list(trace.y if plot == "curves" else trace.z) == pytest.approx([height])


# Predicted points, slices, the cut


def test_predicted_points_are_drawn_and_measured_ones_dotted():
    given = adaptive()
    panel = shown(given).panels[0]
    assert np.array_equal(panel.losses, given.loss)
    assert panel.notes[-2:] == ("measured 12 of 35 points", f"the rest predicted, 95{NBSP}% within 1.8{NBSP}%")
    figure = _matplotlib.contour(shown(given))
    (line,) = [line for line in figure.axes[0].lines if line.get_marker() == "."]
    x, y = given.axes[0].steps[::2], given.axes[1].steps[::2]
    assert sorted(map(tuple, np.asarray(line.get_xydata()).tolist())) == sorted(itertools.product(x, y))
    assert "dots: points that were measured" in figure.texts[-1].get_text()
    plain = _matplotlib.contour(shown(bowl(1.0)))
    assert not [line for line in plain.axes[0].lines if line.get_marker() == "."]
    assert "dots" not in plain.texts[-1].get_text()


def test_landscapes_of_three_axes_are_cut_through_the_model():
    given = with_norms(bowl(0.5, points=(5, 7, 9)), 5.0, 5.0, 2.5)
    inside, outside = Marker("in", (0.0, 0.5, 0.2), 0.0), Marker("out", (0.5, 0.5, 0.2), 0.0)
    drawn = shown(replace(given, markers=(inside, outside)))
    assert [panel.title for panel in drawn.panels] == [
        f"all entries, directions {a} and {b}" for a, b in ((1, 2), (1, 3), (2, 3))
    ]
    for panel, expected in zip(drawn.panels, (given.loss[:, :, 4], given.loss[:, 3], given.loss[2]), strict=True):
        assert np.array_equal(panel.losses, expected)
    assert [panel.labels[0][-1] + panel.labels[1][-1] for panel in drawn.panels] == ["12", "13", "23"]
    assert [panel.relative for panel in drawn.panels] == [(0.5, 0.5), (0.5, 0.25), (0.5, 0.25)]
    assert [panel.notes[1][:5] for panel in drawn.panels] == [f"‖d₁‖{NBSP}", f"‖d₁‖{NBSP}", f"‖d₂‖{NBSP}"]
    assert [[(m.name, m.steps) for m in panel.markers] for panel in drawn.panels] == [[], [], [("in", (0.5, 0.2))]]
    assert len(_matplotlib.contour(drawn).axes) == 3 + 1


def test_the_edge_of_the_cut_is_a_line():
    def edges(given: Landscape) -> list[np.ndarray]:
        found = [c for c in _matplotlib.contour(shown(given)).axes[0].collections if not getattr(c, "filled", True)]
        return [c.levels for c in found if c.levels[0] not in (5.0, 8.0)]  # pyright: ignore[reportAttributeAccessIssue]

    assert [levels.tolist() for levels in edges(bowl(5.0))] == [[8.5]]
    assert edges(bowl(1.0)) == []


# Widths


def one_of(name: str, count: int, width: Any) -> Panels:
    """A figure with everything that takes room."""
    title = "random 0.5 of entries within layer, seed 123"
    if name == "curves":
        given = [several(3, title=title, provenance=PROVENANCE) for _ in range(count)]
    else:
        given = [replace(with_norms(marked(), 5.0, 5.0), title=title, provenance=PROVENANCE) for _ in range(count)]
    return shown(*given, plot=name, width=width)


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize(("width", "inches"), [("one-column", 3.3), ("two-column", 6.9)])
@pytest.mark.parametrize("name", ["surface", "contour", "curves"])
def test_figures_for_columns_have_their_width_and_nothing_outside_or_overlapping(
    name: str, width: Any, inches: float, count: int
):
    figure = getattr(_matplotlib, name)(one_of(name, count, width))
    assert figure.get_size_inches()[0] == inches
    assert overflow(figure) <= 0.0
    sizes = {text.get_size() for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()}
    assert min(sizes) >= 7.0 and max(sizes) <= 9.0
    found = regions(figure)
    pairs = [(a, b) for a in found for b in found if a < b and found[a].overlaps(found[b])]
    # the slanted labels of neighbouring boxes pass each other, though the rectangles around them meet
    assert [pair for pair in pairs if name != "surface" or not all(region.startswith("axes") for region in pair)] == []


def test_the_colour_bar_lies_below_the_panels_of_a_column():
    *maps, bar = _matplotlib.contour(one_of("contour", 3, "one-column")).axes
    below, beside = bar.get_position(), _matplotlib.contour(one_of("contour", 3, None)).axes[-1].get_position()
    assert below.width > 0.8 and below.height < 0.1 < beside.height
    assert below.y1 < min(axes.get_position().y0 for axes in maps)
    assert {axes.get_position().x0 for axes in maps} == {maps[0].get_position().x0, maps[1].get_position().x0}


def test_names_on_a_lying_colour_bar_are_those_of_the_references():
    figure = _matplotlib.contour(shown(bowl(), bowl(), width="one-column"))
    assert {(text.get_text(), text.get_position()[0]) for text in figure.axes[-1].texts} == {
        ("ln V", 8.0),
        ("unigram", 5.0),
    }


# What is refused


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda folder: plots.contour(bowl(), folder / "a.pdf", width="wide"),  # pyright: ignore[reportArgumentType]
         "width must be 'one-column' or 'two-column', got 'wide'."),
        (lambda folder: plots.contour(bowl(), folder / "a.html", width="one-column"),
         "width is of print, and a page in a browser fills its window; leave it out, got 'one-column'."),
        (lambda folder: plots.surface([several_metrics("a", "b"), several_metrics("b")], folder / "a.pdf", metric="a"),
         "metric must be 'loss', 'perplexity', or what was measured beside them ('b'), got 'a'."),
        (lambda folder: plots.curves(bowl(points=(3, 3, 3)), folder / "a.pdf"),
         "curves needs landscapes of exactly one axis, got 3; use contour or volume."),
        (lambda folder: plots.contour(bowl(points=(3,)), folder / "a.pdf"),
         "contour needs landscapes of exactly two axes or three axes, got 1; use curves."),
        (lambda folder: plots.contour(replace(several_metrics("a"), metrics={"a": np.full((7, 5), np.nan)}),
                                      folder / "a.pdf", metric="a"),
         "There is nothing to draw: no point of the landscapes has a finite a so far."),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_drawn_is_refused_in_a_sentence(tmp_path: Path, draw: Callable[[Path], Path], sentence: str):
    with pytest.raises(ValueError) as caught:
        draw(tmp_path)
    assert str(caught.value) == sentence
    assert list(tmp_path.iterdir()) == []


def several_metrics(*names: str) -> Landscape:
    return replace(bowl(), metrics={name: bowl(0.1).loss for name in names})


def test_figures_of_columns_are_files_of_that_size(tmp_path: Path):
    for kind, given in (("surface", bowl()), ("contour", bowl()), ("curves", several(3))):
        out = getattr(plots, kind)(given, tmp_path / f"{kind}.svg", width="two-column")
        assert 'width="496.8pt"' in out.read_text(encoding="utf-8")
