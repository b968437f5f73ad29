"""Pages to explore: the numbers that are embedded, and that nothing given as text becomes anything else."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fisherscope import plots
from fisherscope.landscape import Axis, Landscape
from fisherscope.landscape.statistics import band
from fisherscope.landscape.surface import Geometry, Marker, Prediction, mean_of
from fisherscope.plots import _plotly, _volume
from fisherscope.plots._prepare_landscapes import panels

REFERENCES = {"uniform": 8.0, "unigram": 5.0}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & <b>"


def bowl(points: tuple[int, ...] = (5, 4), steep: float = 1.0, **facts: Any) -> Landscape:
    steps = [np.linspace(-1, 1 + k, n) for k, n in enumerate(points)]
    grids = np.meshgrid(*steps, indexing="ij")
    loss = 2 + steep * np.sum([(k + 1) * g**2 + 0.3 * k * g for k, g in enumerate(grids)], axis=0)
    axes = tuple(Axis(f"axis{k}", s, 3.0 + k, 1234567) for k, s in enumerate(steps))
    return Landscape(axes, loss, np.ones(points, dtype=bool), **{"references": REFERENCES} | facts)


def embedded(path: Path) -> dict[str, Any]:
    """What the script of a page draws."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S)
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def shown(path: Path, *given: Landscape, **settings: Any) -> dict[str, Any]:
    return embedded(plots.page(list(given), path, **settings))


def test_the_numbers_of_a_page_are_the_landscapes(tmp_path: Path):
    first, second = (
        bowl(metrics={"accuracy": bowl().loss / 10}),
        bowl((3, 6), 0.5, metrics={"accuracy": np.ones((3, 6))}),
    )
    found = shown(tmp_path / "a.html", first, second)["panels"]
    for panel, given in zip(found, (first, second), strict=True):
        assert panel["steps"] == [axis.steps.tolist() for axis in given.axes]
        assert panel["values"] == {"loss": given.loss.tolist(), "accuracy": given.metrics["accuracy"].tolist()}


def test_what_is_no_number_is_null(tmp_path: Path):
    given = bowl()
    given.loss[0, 0], given.loss[1, 1], given.loss[2, 2] = math.nan, math.inf, -math.inf
    given.evaluated[3, 3] = False
    values = shown(tmp_path / "a.html", given)["panels"][0]["values"]["loss"]
    holes = [(i, j) for i, row in enumerate(values) for j, value in enumerate(row) if value is None]
    assert holes == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_predicted_points_are_drawn_and_measured_ones_are_marked(tmp_path: Path):
    given = bowl(prediction=Prediction(0.02, 0.01, 0.02, 0.05, 19))
    given.evaluated[3, 3] = False
    (panel,) = shown(tmp_path / "a.html", given)["panels"]
    assert panel["values"]["loss"] == given.loss.tolist()
    assert panel["measured"] == given.evaluated.tolist()
    assert shown(tmp_path / "a.html", bowl())["panels"][0]["measured"] is None


def test_all_panels_share_the_scale_of_the_other_figures(tmp_path: Path):
    loss, logarithm, perplexity = shown(tmp_path / "a.html", bowl(steep=9.0), bowl())["quantities"]
    assert (loss["low"], loss["high"], loss["is_cut"]) == (pytest.approx(2.0, abs=0.2), 8.5, True)
    assert (logarithm["low"], logarithm["high"]) == (math.log(loss["low"]), math.log(loss["high"]))
    assert (perplexity["low"], perplexity["high"]) == (loss["low"], loss["high"])
    assert [q["is_log"] for q in (loss, logarithm, perplexity)] == [False, True, False]
    assert [q["is_exp"] for q in (loss, logarithm, perplexity)] == [False, False, True]


def test_ticks_say_what_lies_at_their_place(tmp_path: Path):
    told = {"loss": lambda x: x, "loss, logarithmic scale": math.exp, "perplexity": math.exp}
    for quantity in shown(tmp_path / "a.html", bowl(steep=9.0))["quantities"]:
        places, texts = zip(*quantity["ticks"], strict=True)
        assert [told[quantity["name"]](place) for place in places] == pytest.approx(
            [float(t.replace(",", "")) for t in texts]
        )


def test_the_lines_of_reference_are_for_losses(tmp_path: Path):
    given = bowl(steep=9.0, metrics={"agreement": 10 * bowl().loss})
    references = {
        q["name"]: [r["label"] for r in q["references"]] for q in shown(tmp_path / "a.html", given)["quantities"]
    }
    lines = ["ln V = 8", "unigram entropy = 5"]
    assert references == {"loss": lines, "loss, logarithmic scale": lines, "perplexity": lines, "agreement": []}


@pytest.mark.parametrize(
    ("objective", "names"),
    [("mlm", ["loss", "loss, logarithmic scale", "perplexity", "accuracy"]),
     ("classification", ["loss", "loss, logarithmic scale", "accuracy"])],
)  # fmt: skip
def test_what_can_be_shown_is_what_all_landscapes_have(tmp_path: Path, objective: str, names: list[str]):
    given = [bowl(objective=objective, metrics={"accuracy": bowl().loss, f"only {n}": bowl().loss}) for n in range(2)]
    found = shown(tmp_path / "a.html", *given, metric="accuracy")
    assert [quantity["name"] for quantity in found["quantities"]] == names
    assert names[found["first"]] == "accuracy"


def test_losses_below_zero_have_no_logarithmic_scale(tmp_path: Path):
    given = bowl(objective="regression", references={})
    below = replace(given, loss=given.loss - 3)
    assert [q["name"] for q in shown(tmp_path / "a.html", below)["quantities"]] == ["loss"]


def test_markers_have_their_own_loss_and_that_of_the_picture(tmp_path: Path):
    markers = (Marker("epoch 1", (0.5, 0.25), 1.5, 3.25, 3.5), Marker("end", (1.0, 1.0), 0.0, None, math.nan))
    (panel,) = shown(tmp_path / "a.html", bowl(markers=markers, connected=True))["panels"]
    first = {"name": "epoch 1", "steps": [0.5, 0.25], "distance": 1.5, "loss": 3.25, "nearest_loss": 3.5}
    second = {"name": "end", "steps": [1.0, 1.0], "distance": 0.0, "loss": None, "nearest_loss": None}
    assert (panel["markers"], panel["connected"]) == ([first, second], True)


@pytest.mark.parametrize("points", [(5,), (5, 4)])
def test_replicates_have_the_band_of_their_mean(tmp_path: Path, points: tuple[int, ...]):
    given = mean_of([bowl(points, steep) for steep in (1.0, 1.5, 1.75)])
    (panel,) = shown(tmp_path / "a.html", given)["panels"]
    expected = band(given)
    assert panel["bands"] == {"loss": {"low": expected.low.tolist(), "high": expected.high.tolist()}}
    assert shown(tmp_path / "a.html", bowl(points))["panels"][0]["bands"] == {}


def test_one_axis_has_what_the_scores_foretell(tmp_path: Path):
    geometry = Geometry(np.array([[9.0]]), 30.0, np.array([[4.0]]), quadratic=True)
    given = bowl((5,), geometry=geometry)
    (panel,) = shown(tmp_path / "a.html", given)["panels"]
    assert panel["quadratic"] == pytest.approx([2 + 2 * step**2 for step in given.axes[0].steps])
    assert (panel["inner"], panel["weight_norm"]) == ([[9.0]], 30.0)


def test_the_facts_say_what_moves_how_far_and_where_it_comes_from(tmp_path: Path):
    provenance = {
        "model": {"name": "a-model"}, "data": {"source": "docs"}, "settings": {"seed": 3}, "time": "now",
        "mask": {"rule": "top 0.5 of entries within model"}, "command": "fisherscope landscape",
        "versions": {"torch": "2"},
    }  # fmt: skip
    geometry = Geometry(np.array([[9.0, 6.0], [6.0, 16.0]]), 30.0)
    given = bowl(title="half", geometry=geometry, provenance=provenance, counts=np.array([3, 4]))
    given.evaluated[0, 0] = False
    facts = dict(shown(tmp_path / "a.html", given)["panels"][0]["facts"])
    assert facts == {
        "model": "a-model", "moves": "half", "mask": "top 0.5 of entries within model",
        "entries that move": "1,234,567 / 1,234,567", "directions": "random, filter-normalised",
        "length of step 1": "3, 4 (10 %, 13.3 % of ‖θ‖)", "cosine between them": "0.5",
        "loss of the model": f"{given.centre_loss:.5g}", "objective": "mlm",
        "grid": "5 \N{MULTIPLICATION SIGN} 4 points, 19 measured",
        "data": "docs", "examples": "2", "scored tokens": "7", "seed": "3", "command": "fisherscope landscape",
        "made": "now", "versions": "torch 2",
    }  # fmt: skip


def test_titles_and_names_cannot_leave_the_data(tmp_path: Path):
    marker = Marker(EVIL, (0.5, 0.25), 1.5)
    given = bowl(title=EVIL, markers=(marker,), provenance={"model": {"name": EVIL}})
    path = plots.page(given, tmp_path / "a.html")
    assert "<img" not in path.read_text("utf-8").replace("<image", "")
    assert "alert(1)</script>" not in path.read_text("utf-8")
    found = embedded(path)["panels"][0]
    assert EVIL in (found["title"], dict(found["facts"])["moves"])
    assert (found["markers"][0]["name"], dict(found["facts"])["model"]) == (EVIL, EVIL)
    assert "<title>Loss landscape: &lt;/script&gt;&lt;script&gt;alert(1)" in path.read_text("utf-8")


def test_text_that_looks_like_a_place_of_the_page_is_text(tmp_path: Path):
    found = shown(tmp_path / "a.html", bowl(), titles="<!--plotly--> $1 \\1 \\g<0>")
    assert found["panels"][0]["title"] == "<!--plotly--> $1 \\1 \\g<0>"


def test_a_page_needs_no_network(tmp_path: Path):
    text = plots.page(bowl(), tmp_path / "a.html").read_text("utf-8")
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", text)
    assert "default-src 'none'" in text  # so that the browser refuses whatever else plotly.js may want


def test_a_page_has_the_same_bytes_each_time_and_is_whole(tmp_path: Path):
    first, second = (plots.page([bowl(), bowl((3, 3))], tmp_path / f"{n}.html").read_bytes() for n in range(2))
    assert first == second
    assert first.startswith(b"<!DOCTYPE html>") and first.endswith(b"</html>\n")
    assert not re.search(rb"<!--(title|plotly|data)-->", first)


@pytest.mark.parametrize(
    ("given", "name", "metric", "message"),
    [
        (bowl(), "a.pdf", "loss", "A page to explore ends in .html, got 'a.pdf'; rename the output."),
        (bowl((2, 2, 2)), "a.html", "loss", "page needs landscapes of exactly two axes, got 3; use contour or volume."),
        (bowl(), "a.html", "f1", "metric must be 'loss', 'perplexity', or what was measured"),
        ([bowl(), bowl((5,))], "a.html", "loss", "the same number of axes, got 1 and 2"),
    ],
)
def test_what_is_no_page_is_refused_and_leaves_no_file(
    tmp_path: Path, given: Any, name: str, metric: str, message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        plots.page(given, tmp_path / name, metric=metric)
    assert list(tmp_path.iterdir()) == []


def test_something_else_than_a_landscape_is_refused(tmp_path: Path):
    given: Any = "surface.h5"
    with pytest.raises(TypeError, match="Landscape"):  # with or without the checks of annotations
        plots.page(given, tmp_path / "a.html")


# Volumes


def traces(given: Landscape) -> tuple[Any, Any, Any]:
    """The surfaces, the slices, and the layout."""
    drawn = panels([given], "loss", None, axes=3, plot="volume")
    figure = _volume.volume(drawn.panels[0], drawn.scale, drawn.notes)
    return *figure.data, figure.layout


def test_a_volume_has_every_point_at_its_place():
    given = bowl((2, 3, 4))
    expected = {
        (given.axes[0].steps[i], given.axes[1].steps[j], given.axes[2].steps[k], given.loss[i, j, k])
        for i in range(2) for j in range(3) for k in range(4)
    }  # fmt: skip
    for trace in traces(given)[:2]:
        assert set(zip(trace.x, trace.y, trace.z, trace.value, strict=True)) == expected


def test_a_volume_is_cut_where_the_scale_ends():
    surfaces, slices, _ = traces(bowl((5, 5, 5), 9.0))
    assert (surfaces.isomax, slices.isomax, surfaces.cmax) == (8.5, 8.5, 8.5)
    assert slices.isomin == surfaces.cmin < surfaces.isomin < 8.5


def test_points_of_a_volume_without_a_number_are_far_above_it_and_the_page_says_so():
    given = bowl((3, 3, 3))
    given.loss[0, 1, 2] = math.nan
    surfaces, slices, layout = traces(given)
    for trace in (surfaces, slices):
        assert np.isfinite(trace.value).all()
        assert np.flatnonzero(trace.value > 1e5).tolist() == [0 * 9 + 1 * 3 + 2]
        assert np.isnan(trace.customdata).nonzero()[0].tolist() == [5]
    assert "surfaces close around points without a number" in layout.title.text
    assert "without a number" not in traces(bowl((3, 3, 3)))[2].title.text


def test_slices_pass_through_the_model_and_sliders_move_them():
    _, slices, layout = traces(bowl((5, 4, 7)))
    through = [slices.slices[axis].locations[0] for axis in "xyz"]
    assert through == [steps[np.abs(steps).argmin()] for steps in (axis.steps for axis in bowl((5, 4, 7)).axes)]
    for axis, slider, given in zip("xyz", layout.sliders, bowl((5, 4, 7)).axes, strict=True):
        assert [step.args[0] for step in slider.steps] == [{f"slices.{axis}.locations": [[s]]} for s in given.steps]
        assert slider.steps[slider.active].args[0][f"slices.{axis}.locations"][0] == list(slices.slices[axis].locations)


def test_a_volume_is_a_page(tmp_path: Path):
    path = plots.volume(bowl((3, 3, 3), title=EVIL), tmp_path / "a.html")
    assert "alert(1)</script>" not in path.read_text("utf-8")
    assert path.read_bytes() == plots.volume(bowl((3, 3, 3), title=EVIL), tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize(
    ("given", "name", "message"),
    [
        (bowl((2, 2, 2)), "a.png", "A page to explore ends in .html, got 'a.png'"),
        (bowl(), "a.html", "volume needs landscapes of exactly three axes, got 2"),
    ],
)
def test_what_is_no_volume_is_refused(tmp_path: Path, given: Any, name: str, message: str):
    with pytest.raises(ValueError, match=message):
        plots.volume(given, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# Single figures: what they show beside the losses

MARKERS = (Marker("start & <b>", (0.5, 0.25), 1.5, 3.25, 3.5), Marker("end", (-0.5, 1.0), 0.0))


def figure(plot: str, given: Landscape) -> Any:
    return getattr(_plotly, plot)(panels([given], "loss", None, axes=len(given.axes), plot=plot))


@pytest.mark.parametrize(("plot", "heights"), [("contour", None), ("surface", [3.5, math.nan])])
def test_other_models_are_marked_in_order_and_named(plot: str, heights: list[float] | None):
    drawn = figure(plot, bowl(markers=MARKERS, connected=True))
    (trace,) = [t for t in drawn.data if t.text is not None and "end" in t.text]
    assert (trace.x, trace.y, trace.text) == ((0.5, -0.5), (0.25, 1.0), ("start &amp; &lt;b&gt;", "end"))
    assert trace.mode == "lines+markers+text"
    assert "its own loss: 3.25<br>loss of the nearest point shown: 3.5<br>distance to it: 1.5" in trace.hovertext[0]
    assert "not measured" in trace.hovertext[1]
    assert heights is None or list(trace.z) == pytest.approx(heights, nan_ok=True)


def test_measured_points_are_dotted_where_others_are_predicted():
    given = bowl(prediction=Prediction(0.02, 0.01, 0.02, 0.05, 2))
    given.evaluated[:] = False
    given.evaluated[3, 1] = given.evaluated[0, 2] = True
    (dots,) = [t for t in figure("contour", given).data if t.name == "measured"]
    first, second = (axis.steps for axis in given.axes)
    assert list(zip(dots.x, dots.y, strict=True)) == [(first[0], second[2]), (first[3], second[1])]
    assert not [t for t in figure("contour", bowl()).data if t.name == "measured"]


def test_colours_of_a_map_go_by_the_logarithm_of_the_loss():
    filled = figure("contour", bowl(steep=9.0)).data[0]
    assert np.array(filled.z) == pytest.approx(np.log(bowl(steep=9.0).loss.T))
    values = [float(text.replace(",", "")) for text in filled.colorbar.ticktext]
    assert np.exp(np.array(filled.colorbar.tickvals, dtype=float)) == pytest.approx(values)


def test_curves_have_the_band_of_the_mean_and_its_directions():
    given = mean_of([bowl((5,), steep) for steep in (1.0, 1.5, 1.75)])
    expected = band(given)
    low, high, *thin, mean = [trace for trace in figure("curves", given).data if trace.mode == "lines"]
    assert np.array(low.y) == pytest.approx(expected.low) and np.array(high.y) == pytest.approx(expected.high)
    assert high.fill == "tonexty"
    assert [np.array(trace.y).tolist() for trace in thin] == [replicate.loss.tolist() for replicate in given.replicates]
    assert np.array(mean.y) == pytest.approx(given.loss)


def test_curves_have_the_quadratic_that_scores_foretell():
    given = bowl((5,), geometry=Geometry(np.array([[9.0]]), 30.0, np.array([[4.0]]), quadratic=True))
    (trace,) = [t for t in figure("curves", given).data if t.line.dash == "dot"]
    assert list(trace.y) == pytest.approx([2 + 2 * step**2 for step in given.axes[0].steps])
