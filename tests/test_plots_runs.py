"""Figures of runs: the numbers they show against numpy and scipy, and that both backends draw these."""

import inspect
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy import stats
from test_plots import assert_refused

import fisherscope as fs
from fisherscope import plots
from fisherscope.cli import main
from fisherscope.experiments.arms import Arm
from fisherscope.finetune.results import Results, SeedResult
from fisherscope.plots import _matplotlib_runs, _plotly_runs
from fisherscope.plots._matplotlib_layout import DASHES
from fisherscope.plots._prepare import COLOURS
from fisherscope.plots._prepare_runs import (
    STYLES,
    alike,
    boxes,
    costs,
    critical_difference,
    learning,
    ranks,
    side_step,
    sizes,
)

REAL = Path(__file__).parent.parent / "figures" / "finetune" / "builtin_bert"
PUBLIC = ["learning_curves", "run_boxes", "run_costs", "run_ranks", "run_sizes"]
SUFFIXES = (".pdf", ".png", ".svg", ".html")

VANILLA = [0.50, 0.55, 0.60, 0.57, 0.52]
BETTER = [0.56, 0.63, 0.62, 0.66, 0.90]
OTHER = [0.51, 0.54, 0.61, 0.55, 0.10]


def training(seed: int, value: float, seconds: float = 0.5, **changed: Any) -> SeedResult:
    """One of two epochs of two steps, whose accuracy after the last is given."""
    rows = [{"step": 2, "epoch": 1.0, "loss": 0.9, "accuracy": value / 2}]
    rows += [{"step": 4, "epoch": 2.0, "loss": 1 - value, "accuracy": value}]
    losses = [{"step": step, "loss": 1 / (step + seed)} for step in (1, 2, 3, 4)]
    return replace(SeedResult(seed, "finished", rows, losses, False, seconds, 2**30, 8), **changed)


def arm(
    method: str = "vanilla",
    values: Sequence[float] | Mapping[int, float] = VANILLA,
    task: str = "sums",
    size: float | None = 300,
    runs: Sequence[SeedResult] | None = None,
    crashed: Mapping[int, str] | None = None,
    seconds: float = 0.5,
    devices: tuple[str, ...] = ("abacus",),
    model: str = "small",
) -> Arm:
    by_seed = values if isinstance(values, Mapping) else dict(enumerate(values))
    made = [training(seed, value, seconds) for seed, value in by_seed.items()] if runs is None else list(runs)
    settings = {"model": model, "task": task, "train_size": size, "objective": "classification", "method": method}
    return Arm(task, method, "accuracy", settings, made, crashed=crashed or {}, devices=devices)


def three(task: str = "sums", size: float | None = 300) -> list[Arm]:
    return [arm(name, values, task, size) for name, values in (("vanilla", VANILLA), ("b", BETTER), ("a", OTHER))]


def by_sizes() -> list[Arm]:
    return [*three(size=100), *three(size=300), *three(size=1000)]


# What is shown


def test_boxes_are_numpys_percentiles():
    panel = boxes(three(), "vanilla", None, None).panels[0]
    for row, values in zip(panel.rows, (VANILLA, OTHER, BETTER), strict=True):
        assert row is not None
        np.testing.assert_allclose(row.quartiles, np.percentile(np.array(sorted(values)), [25, 50, 75]))
        np.testing.assert_array_equal(row.values, values)


def test_the_reference_is_the_first_row_and_its_median_a_line():
    shown = boxes(three(), "b", None, "last")
    assert shown.names == ("b", "a", "vanilla")
    assert shown.panels[0].reference == float(np.median(BETTER))


def test_whiskers_end_at_the_farthest_run_within_one_and_a_half_lengths():
    row = boxes(three(), "vanilla", None, None).panels[0].rows[1]
    assert row is not None
    assert row.quartiles == pytest.approx((0.51, 0.54, 0.55))
    assert row.whiskers == pytest.approx((0.51, 0.61))  # 0.10 is farther out


def test_failed_runs_are_marked_and_counted_with_those_that_crashed():
    runs = [training(0, 0.5), training(1, 0.2, status="diverged"), training(2, math.nan, status="diverged")]
    given = [arm(), arm("b", runs=runs, crashed={7: "It broke."})]
    row = boxes(given, "vanilla", None, None).panels[0].rows[1]
    assert row is not None
    assert (row.seeds, row.failed.tolist(), row.failures, row.runs) == ((0, 1), [False, True], 3, 4)


def test_an_arm_without_a_number_has_no_box_and_its_failures_are_counted():
    given = [arm(), arm("b", runs=[], crashed={0: "It broke.", 1: "It broke."})]
    row = boxes(given, "vanilla", None, None).panels[0].rows[1]
    assert row is not None
    assert (row.seeds, row.failures, row.runs) == ((), 2, 2)
    assert np.isnan(row.quartiles).all()


def test_an_arm_that_was_not_run_on_a_task_has_no_row_there():
    shown = boxes([*three(), arm(task="words")], "vanilla", None, None)
    assert [[row is None for row in panel.rows] for panel in shown.panels] == [[False] * 3, [False, True, True]]


def test_panels_are_titled_by_what_differs_and_notes_say_what_does_not():
    shown = boxes([*three(), *three(size=None)], "vanilla", None, None)
    assert [panel.title for panel in shown.panels] == ["sums, 300 training examples", "sums, all training examples"]
    assert shown.notes[-1] == "Runs of small."


def test_the_caption_names_the_epoch():
    assert "Numbers are those after the last epoch." in boxes(three(), "vanilla", None, "last").notes


def test_the_selected_epoch_is_drawn_where_there_is_one():
    given = arm()
    for run in given.runs:
        for row, loss in zip(run.evaluations, (1.0, 2.0), strict=True):
            row["select_loss"] = loss  # pyright: ignore[reportIndexIssue]
    shown = boxes([given], "vanilla", None, None)
    assert shown.panels[0].rows[0] is not None
    np.testing.assert_allclose(shown.panels[0].rows[0].values, np.array(VANILLA) / 2)
    assert "Numbers are those of the epoch that is best on the select examples." in shown.notes


def test_sizes_are_means_with_t_intervals():
    panel = sizes(by_sizes(), "vanilla", None, "last").panels[0]
    line = panel.lines[0]
    low, high = stats.t.interval(0.95, 4, np.mean(VANILLA), stats.sem(VANILLA))
    assert (line.name, line.x.tolist()) == ("vanilla", [100, 300, 1000])
    np.testing.assert_allclose(line.mean, [np.mean(VANILLA)] * 3)
    np.testing.assert_allclose(line.low, [low] * 3)
    np.testing.assert_allclose(line.high, [high] * 3)


def test_an_arm_of_one_size_is_left_out_and_named():
    shown = sizes([*by_sizes(), arm("once", size=300)], "vanilla", None, "last")
    assert shown.names == ("vanilla", "a", "b")
    assert "Without once: one size only." in shown.notes
    assert all("Without" not in note for note in sizes(by_sizes(), "vanilla", None, "last").notes)


def test_one_seed_has_no_interval():
    given = [arm(values=[0.5], size=100), arm(values=[0.6], size=200)]
    assert np.isnan(sizes(given, "vanilla", None, None).panels[0].lines[0].low).all()


def test_all_examples_are_the_share_1_but_no_known_number():
    shares = sizes([arm(size=0.1), arm(size=None)], "vanilla", None, None)
    assert (shares.panels[0].lines[0].x.tolist(), shares.x_label) == ([0.1, 1.0], "share of the training examples")
    numbers = sizes([arm(size=100), arm(size=300), arm(size=None)], "vanilla", None, None)
    assert numbers.panels[0].lines[0].x.tolist() == [100, 300]
    assert any("Without the runs on all training examples" in note for note in numbers.notes)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 39])
def test_lines_are_moved_by_8_percent_at_most(count: int):
    factors = np.array([side_step(number, count) for number in range(count)])
    assert (np.abs(np.log(factors)) <= np.log(1.08) + 1e-12).all()
    assert (np.diff(factors) > 0).all()
    assert factors.prod() == pytest.approx(1.0)


def test_ranks_are_scipys_over_all_blocks():
    shown = ranks([*three(), *three("words")], None, "last")
    ranked = stats.rankdata(-np.array([VANILLA, BETTER, OTHER]), axis=0).mean(axis=1)
    assert dict(zip(shown.names, shown.means, strict=True)) == pytest.approx(
        dict(zip(("vanilla", "b", "a"), ranked, strict=True))
    )
    assert list(shown.means) == sorted(shown.means)
    p = stats.friedmanchisquare(*(2 * values for values in (VANILLA, BETTER, OTHER))).pvalue
    assert f"rank alike: p = {p:.2g}." in shown.notes[1]


def test_the_lowest_loss_ranks_first():
    assert ranks(three(), "loss", "last").names == ranks(three(), "accuracy", "last").names


def test_ties_share_their_rank():
    assert ranks([arm(), arm("b"), arm("c")], None, None).means.tolist() == [2.0, 2.0, 2.0]


def test_a_run_without_a_number_ranks_last():
    crashed = arm("b", {0: 0.9, 1: 0.9, 2: 0.9, 3: 0.9}, crashed={4: "It broke."})
    shown = ranks([arm(), crashed, arm("a", OTHER)], None, None)
    means = dict(zip(shown.names, shown.means, strict=True))
    assert means["b"] == (1 * 4 + 3) / 5
    assert shown.notes[-1] == "A run without a number ranks last."


def test_methods_that_lack_a_block_are_left_out_by_name():
    shown = ranks([*three(), arm("d", VANILLA[:3])], None, None)
    assert "d" not in shown.names
    assert "Left out: d (2 of 5 blocks missing)." in shown.notes


def test_a_block_of_few_methods_is_left_out():
    shown = ranks([arm(), arm("a"), arm("b", [*BETTER, 0.5])], None, None)
    assert len(shown.names) == 3
    told = "Left out, as fewer than half of the methods have them: 1 block on sums, small, 300 training examples."
    assert told in shown.notes


def test_a_size_of_few_methods_is_left_out_with_all_its_runs():
    usual = [*three(), arm("c"), arm("d", BETTER)]
    alone, shown = (ranks(given, None, None) for given in (usual, [*usual, arm("c", size=1000), arm("d", size=1000)]))
    assert (shown.names, shown.means.tolist()) == (alone.names, alone.means.tolist())
    told = "Left out, as fewer than half of the methods have them: 5 blocks on sums, small, 1000 training examples."
    assert set(shown.notes) - set(alone.notes) == {told}


@pytest.mark.parametrize(
    ("methods", "quantile"),
    [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (8, 3.031), (9, 3.102), (10, 3.164)],
)
def test_the_critical_difference_is_that_of_demsars_table_5(methods: int, quantile: float):
    difference = critical_difference(methods, 14)
    assert difference / math.sqrt(methods * (methods + 1) / (6 * 14)) == pytest.approx(quantile, abs=1e-3)


def test_the_critical_difference_of_demsars_example():
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)  # section 3.2.2: 2.569 sqrt(4 * 5 / (6 * 14))


@pytest.mark.parametrize(
    ("means", "critical", "groups"),
    [
        ([1.0, 2.0, 3.0], 0.5, []),
        ([1.0, 2.0, 3.0], 1.0, []),  # a difference as large as the critical one is significant
        ([1.0, 2.0, 3.0], 1.5, [(0, 1), (1, 2)]),
        ([1.0, 2.0, 3.0], 2.5, [(0, 2)]),
        ([1.0, 1.2, 1.4, 4.0, 4.1], 0.5, [(0, 2), (3, 4)]),
    ],
)
def test_bars_join_the_largest_groups_that_do_not_differ(means: list[float], critical: float, groups: list):
    assert alike(np.array(means), critical) == groups


def test_learning_curves_are_the_logged_losses_by_epoch():
    course = learning(three(), "vanilla", None).tasks[0].courses[0][0]
    assert course.x.tolist() == [0.5, 1.0, 1.5, 2.0]
    expected = [[1 / (step + seed) for step in (1, 2, 3, 4)] for seed in range(5)]
    np.testing.assert_array_equal(course.seeds, expected)
    np.testing.assert_allclose(course.mean, np.mean(expected, axis=0))


def test_learning_curves_have_the_metric_after_every_epoch():
    course = learning(three(), "vanilla", None).tasks[0].courses[1][0]
    np.testing.assert_allclose(course.mean, [np.mean(VANILLA) / 2, np.mean(VANILLA)])


def test_a_mean_ends_where_a_run_has_no_number():
    broken = training(1, 0.5, losses=[{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.inf}], status="diverged")
    course = learning([arm(runs=[training(0, 0.5), broken])], "vanilla", None).tasks[0].courses[0][0]
    assert np.isfinite(course.mean).tolist() == [True, False, False, False]
    assert course.failed.tolist() == [False, True]


def test_learning_curves_know_what_the_labels_alone_give():
    runs = [training(0, 0.5, baselines={"label_entropy": 0.6, "accuracy": 0.3})]
    task = learning([arm(runs=runs)], "vanilla", None).tasks[0]
    assert task.levels == (pytest.approx(0.6), pytest.approx(0.3))
    assert learning(three(), "vanilla", None).tasks[0].levels == (None, None)


def test_all_methods_of_a_task_have_one_range():
    task = learning(three(), "vanilla", None).tasks[0]
    low, high = task.limits(1)
    values = [value * factor for values in (VANILLA, BETTER, OTHER) for value in values for factor in (0.5, 1)]
    margin = 0.05 * (max(values) - min(values))
    assert (low, high) == (pytest.approx(min(values) - margin), pytest.approx(max(values) + margin))


def test_one_huge_loss_of_a_failed_run_moves_no_axis():
    usual = learning(three(), "vanilla", None).tasks[0]
    losses = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1e6}]
    given = [*three(), arm("c", runs=[training(0, 0.5), training(1, 0.5, losses=losses, status="diverged")])]
    shown = learning(given, "vanilla", None)
    assert [shown.tasks[0].limits(quantity) for quantity in (0, 1)] == [usual.limits(quantity) for quantity in (0, 1)]
    told = "Axes hold the runs that did not fail; some that did, and means with them, go far beyond."
    assert told in shown.notes
    assert told not in learning(three(), "vanilla", None).notes


def test_axes_hold_failed_runs_that_do_not_go_far_beyond_the_others():
    usual = learning(three(), "vanilla", None).tasks[0]
    losses = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.05}]
    given = [*three(), arm("c", runs=[training(0, 0.5), training(1, -0.4, losses=losses, status="diverged")])]
    shown = learning(given, "vanilla", None)
    for quantity in (0, 1):
        low, high = shown.tasks[0].limits(quantity)
        values = np.concatenate([course.seeds.ravel() for course in shown.tasks[0].courses[quantity]])
        assert low < np.nanmin(values) and np.nanmax(values) < high
        assert (low, high) != usual.limits(quantity)
    assert not any("beyond" in note for note in shown.notes)


@pytest.mark.parametrize("evaluations", [1, 12, 13])
def test_the_points_of_short_learning_curves_are_marked(evaluations: int):
    rows = [{"step": k, "epoch": float(k), "loss": 0.5, "accuracy": 0.5} for k in range(1, evaluations + 1)]
    runs = [training(0, 0.5, evaluations=rows), training(1, 0.5, evaluations=rows, status="diverged")]
    shown = learning([arm(runs=runs), arm("b", runs=runs)], "vanilla", None)
    *_, metric = _matplotlib_runs.learning_curves(shown).axes
    marked = {line.get_marker() == "o" for line in metric.lines}
    assert marked == {evaluations <= 12}
    traces = _plotly_runs.learning_curves(shown).data
    assert {t.mode for t in traces if len(t.x) == evaluations} == {"lines+markers" if evaluations <= 12 else "lines"}


def test_where_all_runs_failed_the_axes_hold_them():
    given = [arm(runs=[training(0, 0.5, status="diverged")])]
    assert learning(given, "vanilla", None).tasks[0].limits(0) == pytest.approx((0.25 - 0.0375, 1 + 0.0375))


def test_horizontal_axes_end_with_the_epochs_of_each_method():
    rows = [{"step": 2 * epoch, "epoch": float(epoch), "loss": 0.5, "accuracy": 0.5} for epoch in range(1, 41)]
    shown = learning([arm(), arm("vanilla-long", runs=[training(0, 0.5, evaluations=rows)])], "vanilla", None)
    assert [shown.tasks[0].epochs(number) for number in (0, 1)] == [2.0, 40.0]
    assert "Horizontal axes end where the runs of each method do." in shown.notes
    ends = [1.02 * 2, 1.02 * 2, 1.02 * 40, 1.02 * 40]
    assert [axes.get_xlim() for axes in _matplotlib_runs.learning_curves(shown).axes] == [(0, end) for end in ends]
    layout = _plotly_runs.learning_curves(shown).layout
    assert sorted(layout[f"xaxis{number}"].range[1] for number in ("", 2, 3, 4)) == ends


def test_costs_are_ratios_to_the_reference_and_gibibytes():
    shown = costs([arm(), arm("b", seconds=0.75)], "vanilla")
    assert shown.panels[0].times.tolist() == [1.0, 1.5]
    assert shown.panels[0].memory.tolist() == [1.0, 1.0]


def test_costs_need_no_common_main_metric():
    shown = costs([arm(), replace(arm("b", seconds=0.75), metric="loss")], "vanilla")
    assert shown.panels[0].times.tolist() == [1.0, 1.5]


def test_times_of_other_devices_are_not_compared():
    shown = costs([arm(), arm("b", devices=("calculator",))], "vanilla")
    assert np.isnan(shown.panels[0].times).tolist() == [False, True]
    assert any(note.startswith("No bar:") for note in shown.notes)


# Errors


@pytest.mark.parametrize(
    ("draw", "error", "sentence"),
    [
        (lambda out: plots.run_boxes([], out), ValueError, "run_boxes needs at least one Arm, got none."),
        (lambda out: plots.run_boxes([Results("a", "b", "c", {}, [])], out), TypeError,  # pyright: ignore
         "run_boxes needs a Arm or a list of them, got Results."),
        (lambda out: plots.run_boxes(three(), out, metric="f1"), ValueError,
         "vanilla on sums, small, 300 training examples has no metric 'f1'; it has accuracy, loss."),
        (lambda out: plots.run_boxes(three(), "a.jpg"), ValueError,
         "A figure ends in one of .pdf .png .svg .html, got 'a.jpg'; rename the output."),
        (lambda out: plots.run_sizes(three(), out), ValueError,
         "A figure of sizes needs runs of at least two training sizes of one task, got 300 training examples; run the "
         "others, or draw these as boxes."),
        (lambda out: plots.run_sizes([arm(size=100), arm(size=0.5)], out), ValueError,
         "A figure of sizes needs training sizes of one kind, got numbers of examples and shares of all (0.5, 100); "
         "draw them in separate figures."),
        (lambda out: plots.run_sizes(by_many(STYLES + 1), out), ValueError,
         "A figure of sizes needs at most 210 methods, as it has so many kinds of lines, got 211; leave folders out, "
         "or draw these as boxes."),
        (lambda out: plots.run_ranks([arm(), arm("b")], out), ValueError,
         "A figure of ranks needs at least three methods that all have the same blocks (seeds of tasks), two or more, "
         "got methods: 2, blocks: 5; run what is missing, or leave folders out."),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_drawn_is_refused_in_a_sentence(
    tmp_path: Path, draw: Callable[[Path], Path], error: type[Exception], sentence: str
):
    assert_refused(tmp_path, draw, error, sentence)


# Files and pages


def by_many(count: int) -> list[Arm]:
    """Methods on two sizes."""
    names = ["vanilla", *(f"m{number}" for number in range(1, count))]
    return [arm(name, [0.5], size=size) for size in (100, 300) for name in names]


def rising(count: int, name: str) -> list[Arm]:
    """Methods of which each is a little better than the one before, so that ranks have many bars."""
    draw = np.random.default_rng(0)
    names = ["vanilla", *(f"{name}{number:02d}" for number in range(1, count))]
    return [
        arm(name, (0.3 + 0.02 * number + 0.03 * draw.normal(size=4)).tolist(), task)
        for task in ("sums", "words")
        for number, name in enumerate(names)
    ]


def many() -> list[Arm]:
    """Thirteen methods, some failed, on two tasks and two sizes."""
    names = ["vanilla", "a-method-with-a-long-name", *(f"_method-{k}$x$" for k in range(11))]
    draw = np.random.default_rng(0)
    given = []
    for task in ("builtin:a-task-with-a-long-name", "other"):
        for size in (100, 1000):
            for name in names:
                runs = [training(seed, float(draw.random()), 0.1 + float(draw.random())) for seed in range(3)]
                runs[1] = replace(runs[1], status="diverged", baselines={"label_entropy": 0.6, "accuracy": 0.3})
                given.append(arm(name, task=task, size=size, runs=runs, crashed={3: "It broke."}))
    return given


PREPARED: dict[str, Callable[[Sequence[Arm]], Any]] = {
    "learning_curves": lambda given: learning(given, "vanilla", None),
    "run_boxes": lambda given: boxes(given, "vanilla", None, None),
    "run_costs": lambda given: costs(given, "vanilla"),
    "run_ranks": lambda given: ranks(given, None, None),
    "run_sizes": lambda given: sizes(given, "vanilla", None, None),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", PUBLIC)
def test_every_figure_becomes_every_kind_of_file_the_same_bytes_each_time(tmp_path: Path, name: str, suffix: str):
    first, second = (getattr(plots, name)(by_sizes(), tmp_path / f"{number}{suffix}") for number in (1, 2))
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size > 1000


def test_pages_need_no_network(tmp_path: Path):
    for name in PUBLIC:
        text = getattr(plots, name)(by_sizes(), tmp_path / f"{name}.html").read_text("utf-8")
        assert not re.search(r"<(script|link)[^>]+(src|href)=", text)


def test_both_backends_have_the_same_functions():
    for backend in (_matplotlib_runs, _plotly_runs):
        assert sorted(backend.__all__) == sorted([*PUBLIC, "save"])
    for name in PUBLIC:
        first, second = (inspect.signature(getattr(b, name)).parameters for b in (_matplotlib_runs, _plotly_runs))
        assert [p.annotation for p in first.values()] == [p.annotation for p in second.values()]


@pytest.mark.parametrize("given", [three, by_sizes, many], ids=["one", "sizes", "many"])
@pytest.mark.parametrize("name", PUBLIC)
def test_nothing_on_a_printed_page_overlaps_or_is_cut_off(name: str, given: Callable[[], list[Arm]]):
    if name == "run_sizes" and given is three:
        given = by_sizes
    assert_nothing_overlaps(getattr(_matplotlib_runs, name)(PREPARED[name](given())))


@pytest.mark.parametrize(("count", "name"), [(38, "m"), (60, "a-method-with-a-long-name-")])
def test_ranks_of_many_methods_have_room_beside_their_bars(count: int, name: str):
    shown = ranks(rising(count, name), None, None)
    assert len(shown.alike) > 10
    figure = _matplotlib_runs.run_ranks(shown)
    assert_nothing_overlaps(figure)
    (axes,) = figure.axes
    assert axes.get_position().width * figure.get_figwidth() > 1.0
    renderer = FigureCanvasAgg(figure).get_renderer()
    ticks = [label.get_window_extent(renderer) for label in axes.get_xticklabels()]
    assert len(ticks) > 3
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(ticks))
    bars = [line for line in axes.lines if line.get_linewidth() == 2.0]
    assert min(np.diff([bar.get_window_extent(renderer).x0 for bar in bars])) > 2.0 * figure.dpi / 72


def assert_nothing_overlaps(figure: Figure) -> None:
    """Texts and axes stand on the page, none on another."""
    inside, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert width in (3.3, 6.9)
    assert max(-inside.x0, -inside.y0, inside.x1 - width, inside.y1 - height) <= 0.0
    renderer = FigureCanvasAgg(figure).get_renderer()
    found = {f"{n} {text.get_text()}": text.get_window_extent(renderer) for n, text in enumerate(figure.texts)}
    found |= {f"axes {n}": axes.get_tightbbox(renderer) for n, axes in enumerate(figure.axes)}
    assert [(a, b) for a in found for b in found if a < b and found[a].overlaps(found[b])] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_names_are_neither_formulas_nor_markup(name: str, tmp_path: Path):
    given = [replace(one, method="<b>$x$") if one.method == "a" else one for one in by_sizes()]
    texts = [t.get_text() for t in getattr(_matplotlib_runs, name)(PREPARED[name](given)).findobj() if is_text(t)]
    assert any(r"<b>\$x\$" in text for text in texts)
    assert "<b>$x$" not in getattr(_plotly_runs, name)(PREPARED[name](given)).to_json().replace("\\u003c", "<")


def is_text(artist: Any) -> bool:
    return hasattr(artist, "get_text")


# What is drawn


def test_both_backends_draw_a_dot_for_every_run_and_crosses_for_the_failed():
    runs = [training(0, 0.5), training(1, 0.2, status="diverged"), training(2, 0.6)]
    shown = boxes([arm(), arm("b", runs=runs)], "vanilla", None, None)
    axes = _matplotlib_runs.run_boxes(shown).axes[0]
    dots = {m: [line.get_xdata() for line in axes.lines if line.get_marker() == m] for m in "ox"}
    assert [list(x) for x in dots["o"]] == [VANILLA, [0.5, 0.6]]
    assert [list(x) for x in dots["x"]] == [[0.2]]
    scatters = [trace for trace in _plotly_runs.run_boxes(shown).data if trace.type == "scatter"]
    assert [list(trace.x) for trace in scatters] == [VANILLA, [0.5, 0.2, 0.6]]
    assert list(scatters[1].marker.symbol) == ["circle", "x-thin", "circle"]
    assert "b (1/3 failed)" in _plotly_runs.run_boxes(shown).layout.yaxis.ticktext
    assert "1/3 failed" in [text.get_text() for text in axes.texts]


def test_both_backends_draw_the_quartiles():
    shown = boxes(three(), "vanilla", None, None)
    axes = _matplotlib_runs.run_boxes(shown).axes[0]
    ends = [sorted(set(patch.get_path().vertices[:, 0])) for patch in axes.patches]
    traces = [trace for trace in _plotly_runs.run_boxes(shown).data if trace.type == "box"]
    for end, trace, values in zip(ends, traces, (VANILLA, OTHER, BETTER), strict=True):
        low, middle, high = np.percentile(values, [25, 50, 75])
        assert [end[0], end[-1]] == pytest.approx([low, high])
        assert [trace.q1[0], trace.median[0], trace.q3[0]] == pytest.approx([low, middle, high])


def test_both_backends_draw_the_median_of_the_reference():
    shown = boxes(three(), "vanilla", None, None)
    assert any(
        list(line.get_xdata()) == [0.55, 0.55] and line.get_linestyle() == "--"
        for line in _matplotlib_runs.run_boxes(shown).axes[0].lines
    )
    assert [shape.x0 for shape in _plotly_runs.run_boxes(shown).layout.shapes] == [0.55]


def test_both_backends_draw_means_by_size():
    shown = sizes(by_sizes(), "vanilla", None, None)
    line = shown.panels[0].lines[0]
    axes = _matplotlib_runs.run_sizes(shown).axes[0]
    container = axes.containers[0]
    x, y = container.lines[0].get_data()
    np.testing.assert_allclose(x, line.x * side_step(0, 3))
    np.testing.assert_allclose(y, line.mean)
    bars = np.array(container.lines[2][0].get_segments())
    np.testing.assert_allclose(bars[:, :, 1], np.column_stack([line.low, line.high]))
    trace = _plotly_runs.run_sizes(shown).data[0]
    np.testing.assert_allclose(trace.x, line.x * side_step(0, 3))
    np.testing.assert_array_equal(trace.customdata, line.x)
    np.testing.assert_allclose(trace.y + trace.error_y.array, line.high)


def test_all_panels_of_sizes_have_one_axis_that_no_label_leaves():
    shown = sizes([*by_sizes(), *three("words", 100), *three("words", 300)], "vanilla", None, None)
    figure = _matplotlib_runs.run_sizes(shown)
    assert_nothing_overlaps(figure)
    assert [axes.get_xlim() for axes in figure.axes[:2]] == [pytest.approx((100 / 1.2, 1200))] * 2
    layout = _plotly_runs.run_sizes(shown).layout
    assert [tuple(axis.range) for axis in (layout.xaxis, layout.xaxis2)] == [tuple(np.log10([100 / 1.2, 1200]))] * 2


def test_both_backends_draw_each_method_in_a_style_of_its_own():
    shown = sizes(by_many(46), "vanilla", None, None)
    lines = [container.lines[0] for container in _matplotlib_runs.run_sizes(shown).axes[0].containers]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 46
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 42
    traces = _plotly_runs.run_sizes(shown).data
    assert len({(trace.line.color, trace.marker.symbol, trace.line.dash) for trace in traces}) == 46
    for markers, dashes in ((_matplotlib_runs._MARKERS, DASHES), (_plotly_runs._MARKERS, _plotly_runs._DASHES)):
        assert math.lcm(len(COLOURS), len(markers), len(dashes)) == STYLES


def test_both_backends_draw_mean_ranks_and_bars():
    shown = ranks([*three(), *three("words")], None, "last")
    lines = _matplotlib_runs.run_ranks(shown).axes[0].lines
    np.testing.assert_array_equal(lines[0].get_xdata(), shown.means)
    assert list(lines[1].get_xdata()) == [1, 1 + shown.critical]
    assert [list(line.get_ydata()) for line in lines[2:]] == [[a - 0.3, b + 0.3] for a, b in shown.alike]
    assert shown.alike
    traces = _plotly_runs.run_ranks(shown).data
    np.testing.assert_array_equal(traces[0].x, shown.means)
    assert [list(trace.y) for trace in traces[1:-1]] == [[a - 0.3, b + 0.3] for a, b in shown.alike]


def test_both_backends_draw_every_seed_and_their_mean():
    failed = training(0, 0.2, status="diverged", baselines={"label_entropy": 0.6, "accuracy": 0.3})
    shown = learning([arm(runs=[failed, training(1, 0.5)])], "vanilla", None)
    loss, metric = _matplotlib_runs.learning_curves(shown).axes
    for number, axes in enumerate((loss, metric)):
        course, level = shown.tasks[0].courses[number][0], shown.tasks[0].levels[number]
        drawn = [list(line.get_ydata()) for line in axes.lines]
        assert drawn == [list(course.seeds[1]), list(course.mean), list(course.seeds[0]), [level, level]]
    good, _, bad, _ = loss.lines
    assert [to_hex(line.get_color()) for line in (good, bad)] == [COLOURS[0].lower(), COLOURS[1].lower()]
    assert bad.get_linewidth() > good.get_linewidth()
    traces = _plotly_runs.learning_curves(shown).data
    assert [list(trace.y) for trace in traces] == [
        list(y) for both in shown.tasks[0].courses for y in (both[0].seeds[1], both[0].mean, both[0].seeds[0])
    ]
    assert traces[2].line.color == COLOURS[1]
    assert traces[2].line.width > traces[0].line.width


def test_both_backends_draw_bars_of_time_and_memory():
    shown = costs([arm(), arm("b", seconds=0.75)], "vanilla")
    times, memory = _matplotlib_runs.run_costs(shown).axes
    assert [patch.get_width() for patch in times.patches] == [1.0, 1.5]
    assert [patch.get_width() for patch in memory.patches] == [1.0, 1.0]
    assert [list(trace.x) for trace in _plotly_runs.run_costs(shown).data] == [[1.0, 1.5], [1.0, 1.0]]


# From the command line


def test_folders_of_runs_become_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["plot", str(REAL / "acceptability"), "--out", str(tmp_path / "a.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'a.html'}\n"
    text = (tmp_path / "a.html").read_text("utf-8")
    assert json.dumps("fish-mask (1/6 failed)") in text.replace("\\u002f", "/")


def test_real_runs_are_drawn_with_all_their_seeds():
    given = fs.read_runs(REAL / "similarity")
    shown = boxes(given, "vanilla", None, None)
    for name, row in zip(shown.names, shown.panels[0].rows, strict=True):
        assert row is not None
        values = next(one for one in given if one.method == name).values()
        assert dict(zip(row.seeds, row.values, strict=True)) == values


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--kind", "cost", "--metric", "loss"], "argument --metric: not for --kind cost of runs"),
        (["--kind", "ranks", "--reference", "vanilla"], "argument --reference: not for --kind ranks of runs"),
        (["--titles", "a"], "argument --titles: not for --kind boxes of runs"),
        (["--width", "one-column"], "argument --width: not for --kind boxes of runs"),
        (["--by", "entry"], "argument --by: not for --kind boxes of runs"),
        (["--normalized"], "argument --normalized: not for --kind boxes of runs"),
        (["--fraction", "0.1"], "argument --fraction: not for --kind boxes of runs"),
    ],
)
def test_flags_without_effect_on_runs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
):
    with pytest.raises(SystemExit):
        main(["plot", str(REAL / "similarity"), "--out", str(tmp_path / "a.png"), *flags])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_kinds_of_other_figures_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plot", str(REAL / "similarity"), "--out", str(tmp_path / "a.png"), "--kind", "layers"]) == 1
    sentence = "--kind layers does not draw runs; take one of boxes, sizes, ranks, learning, cost."
    assert sentence in capsys.readouterr().err
