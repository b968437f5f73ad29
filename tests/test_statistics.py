"""Intervals against hand-computed ones, a bootstrap and simulated truths; the Fisher quadratic against closed forms."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batched
from scipy import stats
from torch import Tensor, nn

from fisherscope.fisher import estimate_fisher
from fisherscope.landscape import Axis, Landscape, random_directions, scan_landscape
from fisherscope.landscape.statistics import (
    band,
    comparison_table,
    difference,
    fisher_quadratic,
    quadratic_ratio,
    rows,
)
from fisherscope.landscape.surface import Geometry, mean_of
from fisherscope.masks import random_fraction
from fisherscope.scores import FisherScores

scan_quietly = functools.partial(scan_landscape, progress=False)

REPLICATES, POINTS, EXAMPLES = 8, 600, 64
TRUTH = 3.0


def one(loss: object, **facts: object) -> Landscape:
    """A landscape from its losses, steps 1 apart."""
    values = np.asarray(loss, dtype=np.float64)
    axes = tuple(Axis(f"axis{k}", np.arange(n) - float(n // 2), 2.0, 5) for k, n in enumerate(values.shape))
    return Landscape(axes, values, **{"evaluated": np.ones(values.shape, dtype=bool), **facts})


def several(losses: Sequence[object], **facts: object) -> Landscape:
    return mean_of([one(loss) for loss in losses], **facts)


def from_examples(totals: np.ndarray, counts: np.ndarray) -> Landscape:
    """One replicate for every row of summed losses ``[replicates, points, examples]``."""
    parts = [one(t.sum(-1) / counts.sum(), examples=t, counts=counts) for t in totals]
    return mean_of(parts) if len(parts) > 1 else parts[0]


def by_hand(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean, from the library."""
    return stats.t.interval(level, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))


def ends(found: object, index: object) -> tuple[float, float]:
    return float(found.low[index]), float(found.high[index])


# intervals


def test_band_over_directions_is_students_interval_of_the_replicates():
    losses = np.random.default_rng(0).normal(size=(5, 3))
    found = band(several(losses))
    for point in range(3):
        assert ends(found, point) == pytest.approx(by_hand(losses[:, point]), rel=1e-12)


def test_two_replicates_by_hand():
    found = band(several([[1.0, 0.0, 1.0], [3.0, 0.0, 1.0]]))
    assert found.mean.tolist() == [2.0, 0.0, 1.0]
    assert ends(found, 0) == pytest.approx((2 - 12.7062047, 2 + 12.7062047))


def test_the_centre_that_all_replicates_share_has_no_width():
    found = band(several([[1.0, 0.5, 1.0], [3.0, 0.5, 1.0]]))
    assert ends(found, 1) == (0.5, 0.5)


def test_band_of_a_plane():
    losses = np.random.default_rng(0).normal(size=(4, 3, 5))
    found = band(several(losses), level=0.8)
    assert found.low.shape == (3, 5)
    assert ends(found, (2, 1)) == pytest.approx(by_hand(losses[:, 2, 1], 0.8))


def test_two_examples_by_hand():
    """8 nats over 3 tokens; the examples are -2/3 and 2/3 away from their share."""
    totals, counts = np.array([[[2.0, 6.0]] * 3]), np.array([1, 2])
    found = band(from_examples(totals, counts), over="examples")
    half = 12.7062047 * math.sqrt(2 * (4 / 9 + 4 / 9)) / 3
    assert found.mean[0] == pytest.approx(8 / 3)
    assert ends(found, 0) == pytest.approx((8 / 3 - half, 8 / 3 + half))


def test_equal_examples_give_students_interval_of_their_means():
    totals = np.random.default_rng(0).normal(size=(1, 3, 20))
    found = band(from_examples(totals, np.full(20, 1)), over="examples")
    assert ends(found, 1) == pytest.approx(by_hand(totals[0, 1]), rel=1e-12)


def test_band_over_examples_is_around_the_mean_of_the_replicates():
    draw = np.random.default_rng(0)
    made = from_examples(draw.normal(size=(4, 3, 20)), draw.integers(1, 9, 20))
    assert band(made, over="examples").mean == pytest.approx(made.loss)


def test_examples_without_a_scored_token_are_allowed():
    found = band(from_examples(np.array([[[2.0, 6.0, 0.0]] * 3]), np.array([1, 2, 0])), over="examples")
    assert np.isfinite(found.low).all()


@pytest.mark.parametrize("level", [0.68, 0.95])
def test_band_over_examples_is_what_a_bootstrap_finds(level: float):
    draw = np.random.default_rng(0)
    counts = draw.integers(1, 20, 400)
    totals = counts * draw.gamma(2.0, 1.5, 400)
    resampled = stats.bootstrap(
        (totals, counts),
        lambda t, c, axis: t.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        confidence_level=level,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    found = band(from_examples(totals[None, None].repeat(3, 1), counts), level=level, over="examples")
    width = found.high[0] - found.low[0]
    assert ends(found, 0) == pytest.approx(tuple(resampled.confidence_interval), abs=0.05 * width)


def test_both_variances_add_up_with_the_degrees_of_freedom_of_welch_and_satterthwaite():
    draw = np.random.default_rng(0)
    made = from_examples(draw.normal(size=(4, 3, 20)), draw.integers(1, 9, 20))
    scale = {"directions": stats.t.ppf(0.975, 3), "examples": stats.t.ppf(0.975, 19)}
    a, b = (((found := band(made, over=o)).high[0] - found.mean[0]) ** 2 / t**2 for o, t in scale.items())
    freedom = (a + b) ** 2 / (a**2 / 3 + b**2 / 19)
    found = band(made, over="both")
    assert found.high[0] - found.mean[0] == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(a + b))


# what intervals promise: every point is a simulation of its own


def simulated(directions: float, examples: float, both: float, seed: int = 0) -> Landscape:
    """Points with the same true loss, moved by random effects of these sizes."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 10, EXAMPLES)
    effects = directions * draw.normal(size=(REPLICATES, POINTS, 1)) + examples * draw.normal(size=(POINTS, EXAMPLES))
    effects = effects + both * draw.normal(size=(REPLICATES, POINTS, EXAMPLES))
    return from_examples(counts * (TRUTH + effects), counts)


def coverage(found: object, truth: float = TRUTH) -> float:
    return float(np.mean((found.low <= truth) & (truth <= found.high)))


def sampling_error(level: float) -> float:
    return 3 * math.sqrt(level * (1 - level) / POINTS)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_band_over_directions_holds_the_truth_as_often_as_promised(level: float):
    assert coverage(band(simulated(1.0, 0.0, 0.5), level=level)) == pytest.approx(level, abs=sampling_error(level))


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_band_over_examples_holds_the_truth_as_often_as_promised(level: float):
    found = band(simulated(0.0, 1.0, 0.5), level=level, over="examples")
    assert coverage(found) == pytest.approx(level, abs=sampling_error(level))


@pytest.mark.parametrize(("directions", "examples"), [(1.0, 1.0), (1.0, 3.0), (0.2, 3.0)])
def test_band_over_both_holds_the_truth_as_often_as_promised(directions: float, examples: float):
    found = band(simulated(directions, examples, 0.0), over="both")
    assert coverage(found) == pytest.approx(0.95, abs=sampling_error(0.95))


def test_band_over_both_errs_towards_width_where_directions_and_examples_interact():
    assert coverage(band(simulated(0.0, 0.0, 1.0), over="both")) > 0.95


@pytest.mark.parametrize("over", ["directions", "examples"])
def test_a_band_over_one_source_misses_the_other(over: str):
    assert coverage(band(simulated(1.0, 3.0, 0.0), over=over)) < 0.9


def test_difference_holds_the_truth_as_often_as_promised():
    a, b = simulated(1.0, 1.0, 0.3), simulated(1.0, 1.0, 0.3, seed=1)
    b = from_examples(np.stack([r.examples for r in b.replicates]), a.replicates[0].counts)
    for over in ("directions", "both"):
        assert coverage(difference(a, b, over=over), 0.0) == pytest.approx(0.95, abs=sampling_error(0.95))


# differences


def test_difference_over_directions_by_hand():
    a, b = several([[1.0, 0.0], [3.0, 0.0], [8.0, 0.0]]), several([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
    assert ends(difference(a, b), 0) == pytest.approx(by_hand([1.0, 2.0, -1.0]))


def test_difference_over_examples_is_of_paired_examples():
    draw, counts = np.random.default_rng(0), np.full(20, 1)
    a, b = draw.normal(size=(2, 1, 3, 20))
    found = difference(from_examples(a, counts), from_examples(b, counts), over="examples")
    assert ends(found, 2) == pytest.approx(by_hand((a - b)[0, 2]))


def test_what_both_share_cancels():
    draw = np.random.default_rng(0)
    losses = draw.normal(size=(4, 3))
    found = difference(several(losses + 1), several(losses))
    assert found.low == pytest.approx(np.ones(3))
    assert found.high == pytest.approx(np.ones(3))


def test_a_pair_is_told_apart_where_two_bands_are_not():
    draw = np.random.default_rng(0)
    shared = draw.normal(size=(REPLICATES, 3))
    a, b = (several(shared + rise + 0.1 * draw.normal(size=shared.shape)) for rise in (0.5, 0.0))
    found, first, second = difference(a, b), band(a), band(b)
    assert (found.low > 0).all()
    assert (first.low < second.high).all()
    assert (found.high - found.low < (first.high - first.low) / 3).all()


def test_masks_of_one_model_pair(bert):
    options = {"axes": 1, "points": 3, "span": 0.5, "replicates": 2}
    scores = FisherScores({n: torch.ones_like(p) for n, p in bert.model.named_parameters()}, 1)
    masks = [random_fraction(scores, share, seed=0) for share in (0.5, 0.1)]
    a, b = (scan_quietly(bert.model, batched(bert.examples, 3), mask=mask, **options) for mask in masks)
    found = difference(a, b, over="both")
    assert found.mean == pytest.approx(a.loss - b.loss)
    assert found.examples == len(bert.examples)
    assert found.replicates == 2


def test_another_seed_does_not_pair(bert):
    options = {"axes": 1, "points": 3, "replicates": 2}
    a, b = (scan_quietly(bert.model, batched(bert.examples, 3), seed=seed, **options) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"another seed \(0 and 1\); scan both with the same"):
        difference(a, b)


FACTS = {"model": {"fingerprint": "m"}, "data": {"fingerprint": "d"}, "settings": {"seed": 0, "directions": "random"}}


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"model": {"fingerprint": "n"}}, "model"),
        ({"data": {"fingerprint": "e"}}, "data"),
        ({"settings": {"seed": 0, "directions": ["given"]}}, "directions"),
        ({"settings": {"seed": 0, "directions": "random", "one_dimensional": "scale"}}, "one_dimensional"),
    ],
)
def test_landscapes_of_other_scans_do_not_pair(changed: dict, word: str):
    losses = np.zeros((2, 3))
    with pytest.raises(ValueError, match=f"another {word}"):
        difference(several(losses, provenance=FACTS), several(losses, provenance=FACTS | changed))


def test_landscapes_whose_masks_alone_differ_pair():
    losses = np.zeros((2, 3))
    other = {**FACTS, "mask": {"rule": "top"}, "settings": FACTS["settings"] | {"moves": "x", "match": "norm"}}
    assert difference(several(losses, provenance=FACTS), several(losses, provenance=other)).mean.tolist() == [0, 0, 0]


def test_other_grids_replicates_or_objectives_do_not_pair():
    made = several(np.zeros((2, 3)))
    for other, word in [
        (several(np.zeros((2, 5))), "grid"),
        (several(np.zeros((3, 3))), "number of replicates"),
        (several(np.zeros((2, 3)), objective="causal-lm"), "objective"),
    ]:
        with pytest.raises(ValueError, match=f"another {word}"):
            difference(made, other)


def test_other_numbers_of_tokens_do_not_pair():
    totals = np.zeros((2, 3, 2))
    a, b = (from_examples(totals, np.array(counts)) for counts in ([1, 2], [2, 1]))
    with pytest.raises(ValueError, match="another number of scored tokens"):
        difference(a, b)


# holes


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_replicate_that_is_not_finite_leaves_a_hole(value: float):
    found = band(several([[value, 0.0, 1.0], [1.0, 0.0, 2.0]]))
    for values in (found.mean, found.low, found.high):
        assert np.isnan(values).tolist() == [True, False, False]


def test_points_that_were_clipped_or_not_measured_are_holes():
    parts = [one([1.0, 2.0, 3.0]), one([2.0, 2.0, math.nan])]
    parts[0] = replace(parts[0], clipped=np.array([True, False, False]))
    parts[1] = replace(parts[1], evaluated=np.array([True, True, False]))
    assert np.isnan(band(mean_of(parts)).mean).tolist() == [True, False, True]


def test_mean_of_replicates_keeps_what_was_clipped_and_their_metrics(tmp_path: Path):
    marks = [np.array([True, False, False]), np.array([False, False, True])]
    metrics = [{"accuracy": np.array(values)} for values in ([0.1, 0.2, 0.3], [0.3, 0.4, 0.5])]
    parts = [
        one([1.0, 2.0, 3.0], clipped=mark, metrics=own, measures={"trace": number})
        for number, (mark, own) in enumerate(zip(marks, metrics, strict=True))
    ]
    mean_of(parts).save(tmp_path / "mean.h5")
    found = Landscape.load(tmp_path / "mean.h5")
    assert found.clipped.tolist() == [True, False, True]
    assert np.isnan(found.metrics["accuracy"]).tolist() == [True, False, True]
    assert found.metrics["accuracy"][1] == pytest.approx(0.3)
    assert [part.metrics["accuracy"].tolist() for part in found.replicates] == [
        own["accuracy"].tolist() for own in metrics
    ]


def test_predicted_points_count_over_directions_but_not_over_examples():
    made = from_examples(np.random.default_rng(0).normal(size=(2, 3, 9)), np.full(9, 1))
    first, second = made.replicates
    unknown = first.examples.copy()
    unknown[0] = math.nan
    made = mean_of([replace(first, evaluated=np.array([False, True, True]), examples=unknown), second])
    assert ends(band(made), 0) == pytest.approx(by_hand([first.loss[0], second.loss[0]]))
    assert np.isnan(band(made, over="examples").low).tolist() == [True, False, False]


def test_holes_stay_holes_over_examples_and_in_differences():
    totals = np.random.default_rng(0).normal(size=(2, 3, 9))
    totals[1, 0, 4] = math.inf
    made, counts = from_examples(totals, np.full(9, 1)), np.full(9, 1)
    assert np.isnan(band(made, over="both").low).tolist() == [True, False, False]
    whole = from_examples(np.zeros((2, 3, 9)), counts)
    assert np.isnan(difference(made, whole, over="examples").high).tolist() == [True, False, False]


# refusals and words


def test_a_single_direction_has_no_band_over_directions():
    with pytest.raises(ValueError, match="needs at least two replicates, got 1; scan with replicates=8"):
        band(one([1.0, 2.0, 3.0]))


def test_a_plane_has_no_band_over_examples():
    with pytest.raises(ValueError, match="losses of the single examples, which are kept along one axis only"):
        band(several(np.zeros((2, 3, 3))), over="examples")


def test_a_single_example_has_no_band():
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        band(from_examples(np.zeros((1, 3, 1)), np.array([1])), over="examples")


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, math.nan])
def test_a_level_is_between_0_and_1(level: float):
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        band(several(np.zeros((2, 3))), level=level)


@pytest.mark.usefixtures("unchecked")
def test_over_is_one_of_three_words():
    with pytest.raises(ValueError, match="over must be 'directions' or 'examples' or 'both', got 'seeds'"):
        band(several(np.zeros((2, 3))), over="seeds")


def test_a_band_says_what_it_covers():
    found = band(simulated(1.0, 1.0, 0.0), level=0.9, over="both")
    assert found.covers == "90 % interval of the mean loss, over random directions and examples"
    assert (found.replicates, found.examples, found.level) == (REPLICATES, EXAMPLES, 0.9)


def test_a_band_is_read_by_step():
    found = band(several([[1.0, 0.0, 4.0], [3.0, 0.0, 4.0]]))
    assert found.at(1.0) == (4.0, 4.0, 4.0)
    assert found.at(-1.0) == (2.0, *ends(found, 0))


def test_a_step_off_the_grid_is_refused():
    found = band(several(np.zeros((2, 3))))
    with pytest.raises(ValueError, match=r"Step 0\.7 is not on the grid of axis0; the nearest that is: 1"):
        found.at(0.7)
    with pytest.raises(ValueError, match=r"one step per axis \(1\), got 2"):
        found.at(0.0, 1.0)


# the Fisher quadratic


class Point2(nn.Module):
    """Two parameters of which nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
        self.y = nn.Parameter(torch.tensor([[3.0]], dtype=torch.float64))


DIAGONAL = {"x": torch.tensor([[1.0, 2.0]]).double(), "y": torch.tensor([[5.0]]).double()}
SCORES = FisherScores(DIAGONAL, 4, unit="token")
WHERE = [{"offset": torch.arange(4.0).double()}]


def bowl(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """1/2 sum of H (theta - theta_0)^2, at its minimum at first, and a number for every example."""
    start = Point2()
    moved = {name: p - dict(start.named_parameters())[name] for name, p in model.named_parameters()}
    return sum((DIAGONAL[name] * m**2).sum() for name, m in moved.items()) / 2 + batch["offset"]


def tilted(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return bowl(model, batch) + 3 * model.x.sum() - model.y.sum()


@pytest.mark.parametrize("replicates", [1, 3])
@pytest.mark.parametrize("axes", [1, 2])
def test_a_diagonal_quadratic_is_foretold_exactly(axes: int, replicates: int):
    found = scan_quietly(Point2(), WHERE, objective=bowl, scores=SCORES, axes=axes, points=5, replicates=replicates)
    assert fisher_quadratic(found) == pytest.approx(found.loss, rel=1e-12)


def test_axes_that_are_not_orthogonal_are_foretold_too():
    directions = [{"x": torch.tensor([[1.0, 1.0]]).double()}, {"x": torch.tensor([[0.0, 3.0]]).double()}]
    found = scan_quietly(Point2(), WHERE, objective=bowl, scores=SCORES, directions=directions, points=3)
    a, b = np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij")
    assert fisher_quadratic(found) == pytest.approx(1.5 + (a**2 + 2 * (a + 3 * b) ** 2) / 2)
    assert found.loss == pytest.approx(fisher_quadratic(found))


@pytest.mark.parametrize("axes", [1, 2])
def test_a_slope_does_not_count_as_an_error_of_the_quadratic(axes: int):
    found = scan_quietly(Point2(), WHERE, objective=tilted, scores=SCORES, axes=axes, points=5, replicates=2)
    ratio = quadratic_ratio(found)
    centre = ratio.mean.size // 2
    for values in (ratio.mean, ratio.low, ratio.high):
        assert np.isnan(values.flat[centre])
        assert np.delete(values, centre) == pytest.approx(1.0, rel=1e-9)


def test_ratio_by_hand():
    """Rises of 2 and 6 against 1 and 2 foretold: 8/3 together, and 2 - 8/3 and 6 - 16/3 are what is left."""

    def part(rise: float, fisher: float) -> Landscape:
        geometry = Geometry(np.eye(1), 1.0, np.array([[fisher]]), True)
        return one([1 + 2 * rise - 0.5, 1.0, 1.5], geometry=geometry)

    found = quadratic_ratio(mean_of([part(2.0, 2.0), part(6.0, 4.0)]))
    half = 12.7062047 * math.sqrt(2 * (4 / 9 + 4 / 9)) / 3
    assert found.at(1.0) == pytest.approx((8 / 3, 8 / 3 - half, 8 / 3 + half))
    assert found.at(-1.0) == pytest.approx(found.at(1.0))


def test_the_ratio_of_a_single_direction_has_no_interval():
    found = scan_quietly(Point2(), WHERE, objective=bowl, scores=SCORES, axes=1, points=3)
    mean, low, high = quadratic_ratio(found).at(1.0)
    assert mean == pytest.approx(1.0)
    assert math.isnan(low) and math.isnan(high)


class Softmax(nn.Module):
    """A linear model with the output that Hugging Face heads have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(x))


def softmax_case() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    return Softmax(), [{"x": torch.randn(12, 4).double(), "labels": torch.randint(3, (12,))}]


def mean_curvature(found: Landscape) -> float:
    step = found.axes[0].steps[-1]
    return float(found.loss[-1] + found.loss[0] - 2 * found.loss[1]) / step**2


def test_curvature_of_a_softmax_is_the_trace_of_its_exact_fisher_on_average():
    """Gaussian directions: the mean of d^T H d is the trace of H, and H of a linear softmax is its Fisher matrix."""
    model, batches = softmax_case()
    scores = estimate_fisher(model, batches, objective="classification", estimator="exact", progress=False)
    trace = sum(float(score.sum()) for score in scores.values())
    options = {"normalize": "none", "axes": 1, "points": 3, "span": 1e-3, "replicates": 300}
    found = scan_quietly(model, batches, objective="classification", scores=scores, **options)
    curvatures = [mean_curvature(part) for part in found.replicates]
    assert np.mean(curvatures) == pytest.approx(trace, abs=3 * stats.sem(curvatures))
    ratio, low, high = quadratic_ratio(found, level=0.997).at(1e-3)
    assert low < 1 < high
    assert 0.9 < ratio < 1.1


def test_a_single_direction_differs_by_the_cross_terms_that_a_diagonal_leaves_out():
    model, batches = softmax_case()
    scores = estimate_fisher(model, batches, objective="classification", estimator="exact", progress=False)
    options = {"normalize": "none", "axes": 1, "points": 3, "span": 1e-3}
    found = scan_quietly(model, batches, objective="classification", scores=scores, **options)
    (name, weight), batch = next(iter(model.named_parameters())), batches[0]

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(batch["x"] @ flat.view(weight.shape).T, batch["labels"])

    hessian = torch.autograd.functional.hessian(loss, weight.detach().flatten())
    assert hessian.diagonal() == pytest.approx(scores[name].flatten().double().numpy())
    move = random_directions(model, 1, seed=0, normalize="none")[0][name].flatten()
    cross = float(move @ hessian @ move - move @ (hessian.diagonal() * move))
    foretold = float(found.geometry.fisher[0, 0])
    assert mean_curvature(found) - foretold == pytest.approx(cross, rel=1e-3)
    assert abs(cross) > 0.05 * foretold


def test_scores_of_sequences_foretell_no_loss_of_a_language_model(bert):
    batches = batched(bert.examples, 3)
    scores = estimate_fisher(bert.model, batches, progress=False)
    found = scan_quietly(bert.model, batches, scores=scores, axes=1, points=3)
    for refused in (fisher_quadratic, quadratic_ratio):
        with pytest.raises(ValueError, match="scanned with others; estimate scores with --unit token"):
            refused(found)


def test_without_scores_nothing_is_foretold(bert):
    found = scan_quietly(bert.model, batched(bert.examples, 3), axes=1, points=3)
    with pytest.raises(ValueError, match="scanned with none; estimate scores with --unit token"):
        fisher_quadratic(found)


def test_a_grid_with_one_side_has_no_ratio():
    found = scan_quietly(Point2(), WHERE, objective=bowl, scores=SCORES, axes=1, points=3, span=[(0.0, 1.0)])
    with pytest.raises(ValueError, match="symmetric about 0; scan with one number as span"):
        quadratic_ratio(found)


# tables


def plane(scale: float, cosine: float) -> Landscape:
    """Norms 3 and 4 of weights of norm 10, Fisher norms 1 and 2, loss 1 + scale (s_0^2 + s_1^2)."""
    a, b = np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij")
    inner = np.array([[9.0, 12 * cosine], [12 * cosine, 16.0]])
    geometry = Geometry(inner, 10.0, np.array([[1.0, 0.0], [0.0, 4.0]]), True)
    made = one(1 + scale * (a**2 + b**2), geometry=geometry)
    axes = tuple(replace(axis, norm=n, parameters=7) for axis, n in zip(made.axes, (3.0, 4.0), strict=True))
    return replace(made, axes=axes)


def test_row_of_a_plane():
    (row,) = rows([plane(2.0, -0.5)], ["mine"])
    assert (row.title, row.entries, row.parameters, row.replicates) == ("mine", 5, 7, 1)
    assert (row.norm, row.relative_norm, row.fisher_norm, row.cosine) == (3.5, 0.35, 1.5, -0.5)
    assert (row.loss, row.step, row.rise, row.low, row.high) == (1.0, 1.0, 2.0, None, None)


def test_row_of_replicates_has_the_interval_of_the_rise():
    (row,) = rows([mean_of([plane(2.0, 0.1), plane(4.0, -0.3), plane(9.0, 0.2)])])
    assert (row.replicates, row.cosine, row.rise) == (3, -0.3, 5.0)
    assert (row.low, row.high) == pytest.approx(by_hand([2.0, 4.0, 9.0]))


def test_rise_is_taken_on_both_sides_at_the_step():
    made = one([9.0, 4.0, 1.0, 2.0, 99.0])
    assert rows([made], step=1.0)[0].rise == 2.0
    assert rows([made])[0].rise == 53.0


def test_rise_is_taken_at_the_farthest_step_that_all_have():
    assert [row.step for row in rows([one(np.zeros(9)), one(np.zeros(5))])] == [2.0, 2.0]


def test_what_a_hand_made_line_lacks_is_none():
    (row,) = rows([one([1.0, 0.0, 1.0])])
    assert (row.relative_norm, row.fisher_norm, row.cosine) == (None, None, None)


def test_table_as_markdown():
    made = mean_of([plane(2.0, -0.5), plane(4.0, -0.5)])
    first, rule, *lines = comparison_table([made, one([1.0, 0.0, 1.0])], ["top|10 %", "all"]).splitlines()
    assert first == (
        "|  | entries | parameters | replicates | ‖d‖ | ‖d‖/‖θ‖ | ‖d‖_F | cosine | loss | rise at ±1 | 95 % interval |"
    )
    assert rule.count("|") == first.count("|")
    assert lines == [
        r"| top\|10 % | 5 | 7 | 2 | 3.5 | 0.35 | 1.5 | -0.5 | 1 | 3 | -9.706 to 15.71 |",
        "| all | 5 | 0 | 1 | 2 |  |  |  | 0 | 1 |  |",
    ]


def test_tables_refuse_what_they_cannot_show():
    made = one([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="at least one landscape, got none"):
        rows([])
    with pytest.raises(ValueError, match=r"one title per landscape \(1\), got 2"):
        rows([made], ["a", "b"])
    with pytest.raises(ValueError, match=r"Step -0\.5 is not on the grid"):
        rows([made], step=0.5)


def test_landscapes_without_a_common_step_have_no_rise():
    made = one([1.0, 0.0, 1.0])
    other = replace(made, axes=(replace(made.axes[0], steps=np.array([-0.4, 0.0, 0.4])),))
    assert [(row.step, row.rise, row.low) for row in rows([made, other])] == [(None, None, None)] * 2
    assert "| rise at the same step |" in comparison_table([made, other])


def test_the_rise_is_taken_where_no_loss_is_infinite():
    made = one([np.inf, 1.0, 0.0, 2.0, 9.0])
    assert rows([made])[0].step == made.axes[0].steps[3]
    assert rows([made])[0].rise == 1.5
