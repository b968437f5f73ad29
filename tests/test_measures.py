"""Measures of landscapes and of curvature against closed forms, dense matrices and slow loops."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Case, batched, untouched
from test_curvature import (
    OFFSETS,
    SPECTRUM,
    Bowl,
    Net,
    Quadratic,
    bowl,
    dense,
    dense_hessian,
    direction_for,
    flat,
    labelled,
    symmetric,
)
from torch import Tensor, nn

from fisherscope.landscape import Axis, Landscape, random_directions, scan_landscape
from fisherscope.landscape.curvature import Curvature
from fisherscope.landscape.directions import geometry_of
from fisherscope.landscape.measures import (
    average_sharpness,
    basin_radius,
    displaced,
    eigenvalue_ratio_map,
    fitted_curvature,
    measure_landscape,
    measure_model,
    sharpness,
    slice_curvature,
    spectral_density,
    top_eigenvalues,
    trace,
)
from fisherscope.landscape.surface import Geometry
from fisherscope.masks import Mask, random_fraction


def landscape_of(loss, *steps: Sequence[float], norms: Sequence[float] = (1.0, 1.0, 1.0), inner=None) -> Landscape:
    """A function on a grid."""
    axes = tuple(Axis(f"axis{k}", np.array(s, dtype=float), norms[k], 1) for k, s in enumerate(steps))
    shape = tuple(len(s) for s in steps)
    values = np.array([loss(*point) for point in itertools.product(*steps)], dtype=float).reshape(shape)
    geometry = None if inner is None else Geometry(np.array(inner, dtype=float), 1.0)
    return Landscape(axes, values, np.ones(shape, dtype=bool), geometry=geometry)


def grid(count: int = 41, span: float = 1.0) -> np.ndarray:
    return span * np.arange(-(count // 2), count // 2 + 1) / (count // 2)


def test_basin_of_a_tent_is_exact():
    found = basin_radius(landscape_of(lambda s: 2 + 3 * abs(s), grid(5)), 0.1)
    assert found.radius == pytest.approx(0.1 / 3, rel=1e-12)
    assert found.threshold == 0.1
    assert abs(found.steps[0]) == pytest.approx(0.1 / 3, rel=1e-12)


def test_basin_ends_on_the_steeper_side():
    found = basin_radius(landscape_of(lambda s: 4 * s if s > 0 else -s, grid(5)), 0.2)
    assert found.steps == pytest.approx((0.05,))


def test_basin_of_a_parabola_to_the_width_of_its_cells():
    found = basin_radius(landscape_of(lambda s: s * s, grid(401)), 0.25)
    assert found.radius == pytest.approx(0.5, abs=1e-5)


def test_basin_along_two_axes_ends_where_the_loss_is_steepest():
    found = basin_radius(landscape_of(lambda a, b: a * a + 9 * b * b, grid(201), grid(201)), 0.25)
    assert found.radius == pytest.approx(0.5 / 3, abs=1e-4)
    assert found.steps[0] == pytest.approx(0, abs=0.02)


def test_basin_is_measured_in_weight_space():
    found = basin_radius(landscape_of(lambda s: abs(s), grid(5), norms=[7.0]), 0.25)
    assert found.radius == pytest.approx(7 * 0.25)
    assert abs(found.steps[0]) == pytest.approx(0.25)


def test_basin_with_axes_at_an_angle():
    """Along the diagonal two directions with cosine -0.9 hardly move."""
    inner = [[1.0, -0.9], [-0.9, 1.0]]
    made = landscape_of(lambda a, b: abs(a + b), grid(41), grid(41), inner=inner)
    found = basin_radius(made, 0.3)
    assert found.radius == pytest.approx(0.15 * math.sqrt(2 - 2 * 0.9), rel=1e-12)
    assert abs(found.steps[0] + found.steps[1]) == pytest.approx(0.3, rel=1e-12)


def edges(made: Landscape, threshold: float) -> float:
    """The distance to the nearest crossing, by a loop over all edges of the grid."""
    nearest, rise = math.inf, made.loss - made.centre_loss
    for index in np.ndindex(rise.shape):
        for axis in range(rise.ndim):
            other = tuple(i + (k == axis) for k, i in enumerate(index))
            if other[axis] == rise.shape[axis] or (rise[index] < threshold) == (rise[other] < threshold):
                continue
            share = (threshold - rise[index]) / (rise[other] - rise[index])
            point = [made.axes[k].steps[i] for k, i in enumerate(index)]
            point[axis] += share * (made.axes[axis].steps[other[axis]] - point[axis])
            nearest = min(nearest, math.dist(point, [0] * rise.ndim))
    return nearest


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_basin_of_rough_surfaces_is_that_of_a_loop_over_edges(axes: int, seed: int):
    values = iter(np.random.default_rng(seed).random(7**axes))
    made = landscape_of(lambda *steps: next(values) + math.hypot(*steps), *[grid(7)] * axes)
    wanted = edges(made, 0.3)
    assert basin_radius(made, 0.3).radius == pytest.approx(min(wanted, 1.0), rel=1e-12)


def test_basin_that_is_not_left_has_at_least_the_radius_of_the_grid():
    made = landscape_of(lambda a, b: 0.01 * a, grid(5, 2.0), grid(5, 3.0), norms=[1.5, 1.2])
    found = basin_radius(made, 0.1)
    assert found.radius == pytest.approx(3.0)  # 2.0 * 1.5
    assert found.steps is None


def test_basin_left_only_in_a_corner_has_at_least_the_radius_of_the_grid():
    """Between the corners, beyond the edges, nothing is known."""
    found = basin_radius(landscape_of(lambda a, b: float(abs(a) + abs(b) > 1.9), grid(5), grid(5)), 0.5)
    assert (found.radius, found.steps) == (1.0, None)


def test_basin_on_one_side_only_has_radius_0():
    found = basin_radius(landscape_of(lambda s: 0.01 * s, np.linspace(0, 1, 5)), 0.1)
    assert (found.radius, found.steps) == (0.0, None)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_diverged_loss_is_above_every_threshold(value: float):
    made = landscape_of(lambda s: value if s > 0.6 else 0.0, grid(5))
    assert basin_radius(made, 0.1).steps == (0.5,)


def test_point_that_was_not_measured_says_nothing():
    made = landscape_of(lambda s: abs(s), grid(5))
    made.loss[3], made.evaluated[3] = math.nan, False
    assert basin_radius(made, 0.75).steps == pytest.approx((-0.75,))


def test_predicted_point_counts():
    made = landscape_of(lambda s: max(s, 0), grid(5))
    made.evaluated[3:] = False
    assert basin_radius(made, 0.25).steps == pytest.approx((0.25,))


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_threshold_of_a_basin_is_positive(threshold: float):
    with pytest.raises(ValueError, match="must be positive"):
        basin_radius(landscape_of(lambda s: s * s, grid(5)), threshold)


def test_basin_around_nothing_is_refused():
    with pytest.raises(ValueError, match="a finite loss at the centre"):
        basin_radius(landscape_of(lambda s: math.nan, grid(5)))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("points", [3, 5, 9])
def test_fitted_curvature_of_a_quadratic_is_exact(axes: int, points: int):
    h, g = symmetric(axes).numpy(), np.arange(1.0, axes + 1)

    def loss(*steps: float) -> float:
        s = np.array(steps)
        return 7 + g @ s + s @ h @ s / 2

    found = fitted_curvature(landscape_of(loss, *[grid(points, 10.0**-k) for k in range(axes)]))
    np.testing.assert_allclose(found.hessian, h, rtol=1e-9)
    np.testing.assert_allclose(found.gradient, g, rtol=1e-9)
    assert found.residual < 1e-9
    assert found.points == min(points, 5) ** axes


def test_fitted_curvature_sees_only_what_is_near():
    found = fitted_curvature(landscape_of(lambda s: s * s if abs(s) < 0.3 else 99.0, grid(21)))
    assert found.hessian[0, 0] == pytest.approx(2)


def test_residual_is_the_share_that_is_no_quadratic():
    """Of s^4 at -2..2, least squares leaves by hand (12, -48, 72, -48, 12) / 35."""
    found = fitted_curvature(landscape_of(lambda s: s**4, grid(5, 2.0)))
    left = np.array([12, -48, 72, -48, 12]) / 35
    wanted = math.sqrt(np.mean(left**2)) / math.sqrt(np.mean(np.array([16, 1, 0, 1, 16]) ** 2))
    assert found.residual == pytest.approx(wanted, rel=1e-10)


def test_fitted_curvature_at_the_end_of_an_axis():
    found = fitted_curvature(landscape_of(lambda s: 3 * s * s + s, np.linspace(0, 1, 9)))
    assert (found.hessian[0, 0], found.gradient[0]) == pytest.approx((6, 1))
    assert found.points == 3


def test_flat_landscape_has_no_residual():
    assert fitted_curvature(landscape_of(lambda s: 2.0, grid(5))).residual == 0


@pytest.mark.parametrize("gone", ["not measured", "not finite"])
def test_fitted_curvature_needs_enough_points(gone: str):
    made = landscape_of(lambda s: s * s, grid(5))
    made.evaluated[[0, 1, 3]] = gone == "not finite"
    made.loss[[0, 1, 3]] = math.inf
    with pytest.raises(ValueError, match="the 2 there are not enough"):
        fitted_curvature(made)


def two(model: nn.Module) -> list[dict[str, Tensor]]:
    return [direction_for(model, seed) for seed in (3, 4)]


MASK = Mask({"a": torch.tensor([[True, False]]), "b": torch.tensor([False, True, True, False])})


@pytest.mark.parametrize("mask", [None, MASK])
def test_slice_curvature_is_what_a_landscape_of_a_quadratic_has(mask: Mask | None):
    curvature, loss = bowl()
    curvature = Curvature(curvature.model, OFFSETS, objective=loss, mask=mask)
    directions = two(curvature.model)
    found = slice_curvature(curvature, directions)
    made = scan_landscape(
        curvature.model, OFFSETS, objective=loss, mask=mask, directions=directions, points=5, span=0.5, progress=False
    )
    np.testing.assert_allclose(fitted_curvature(made).hessian, found, rtol=1e-10)
    keep = torch.ones(6) if mask is None else torch.tensor([1.0, 0, 0, 1, 1, 0])
    d = torch.stack([torch.cat([m["a"][0], m["b"]]) * keep for m in directions])
    np.testing.assert_allclose(found, d @ loss.matrix @ d.T, rtol=1e-12)


def test_slice_curvature_is_what_a_small_landscape_of_a_transformer_has(bert: Case):
    directions = random_directions(bert.model, 2, seed=0)
    batches = batched(bert.examples, 3)
    found = slice_curvature(Curvature(bert.model, batches), directions)
    made = scan_landscape(bert.model, batches, directions=directions, points=5, span=2e-3, progress=False)
    np.testing.assert_allclose(fitted_curvature(made).hessian, found, rtol=1e-3, atol=1e-3 * abs(found).max())


@pytest.mark.parametrize("mask", [None, MASK])
def test_sharpness_of_a_quadratic(mask: Mask | None):
    curvature, loss = bowl()
    curvature = Curvature(curvature.model, OFFSETS, objective=loss, mask=mask)
    keep = torch.ones(6) if mask is None else torch.tensor([1.0, 0, 0, 1, 1, 0])
    w = flat(curvature.model).detach()
    g = (loss.matrix @ w + loss.slope) * keep
    wanted = 0.3 * g.norm() + 0.3**2 / 2 * (g @ loss.matrix @ g) / g.norm() ** 2
    assert sharpness(curvature, radius=0.3) == pytest.approx(float(wanted), rel=1e-12)
    e = 0.3 * w**2 * g / (w.abs() * g).norm()
    assert sharpness(curvature, radius=0.3, adaptive=True) == pytest.approx(
        float(g @ e + e @ loss.matrix @ e / 2), rel=1e-12
    )


def rescaled(model: Net, factor: float) -> Net:
    """The same function of ReLUs: the first layer times a factor, the second by it."""
    first, _, second = model.layers
    with torch.no_grad():
        first.weight.mul_(factor)
        first.bias.mul_(factor)
        second.weight.div_(factor)
    return model


def relu() -> Net:
    torch.manual_seed(1)
    return Net(3, 6, 3, nn.ReLU)


def of(model: nn.Module, **options) -> Curvature:
    return Curvature(model, labelled(), objective="classification", **options)


def test_rescaled_layers_change_sharpness_and_eigenvalues_but_not_adaptive_sharpness():
    before, after = of(relu()), of(rescaled(relu(), 5.0))
    assert after.loss() == pytest.approx(before.loss(), rel=1e-13)
    assert sharpness(after, adaptive=True) == pytest.approx(sharpness(before, adaptive=True), rel=1e-10)
    assert sharpness(after) > 1.5 * sharpness(before)
    assert top_eigenvalues(after)[0] > 1.5 * top_eigenvalues(before)[0]


def test_rescaled_layers_change_average_sharpness_but_not_the_adaptive_one():
    before, after = of(relu()), of(rescaled(relu(), 5.0))
    a, b = (average_sharpness(c, adaptive=True, size=0.2) for c in (before, after))
    assert a.mean == pytest.approx(b.mean, rel=1e-9)
    a, b = (average_sharpness(c, size=0.2) for c in (before, after))
    assert abs(a.mean - b.mean) > 0.1 * abs(a.mean)


@pytest.mark.parametrize(("adaptive", "mask"), [(False, None), (True, MASK)])
def test_average_sharpness_of_a_quadratic(adaptive: bool, mask: Mask | None):
    """E of sigma^2 / 2 z^T P z with independent entries of z; the slope averages out."""
    curvature, loss = bowl()
    curvature = Curvature(curvature.model, OFFSETS, objective=loss, mask=mask)
    keep = torch.ones(6) if mask is None else torch.tensor([1.0, 0, 0, 1, 1, 0])
    w = flat(curvature.model).detach() * keep
    variance = w**2 if adaptive else keep * (w**2).sum() / keep.sum()
    wanted = 0.4**2 / 2 * float((variance * loss.matrix.diag()).sum())
    found = average_sharpness(curvature, size=0.4, adaptive=adaptive, draws=1500)
    assert found.draws == 1500
    assert abs(found.mean - wanted) < 4 * found.error
    # the variance on paper, of the slope's part and of the quadratic's
    g, root = loss.matrix @ flat(curvature.model).detach() + loss.slope, variance.sqrt()
    scaled = root[:, None] * loss.matrix * root
    spread = 0.4**2 * ((g * root) ** 2).sum() + 0.4**4 / 2 * (scaled**2).sum()
    assert found.error == pytest.approx(math.sqrt(float(spread) / 1500), rel=0.15)


@pytest.mark.parametrize("function", [average_sharpness, trace])
def test_one_draw_has_no_standard_error(function):
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        function(bowl()[0], draws=1)


def test_draws_follow_from_the_seed():
    curvature, _ = bowl()
    for function in (average_sharpness, trace):
        assert function(curvature, seed=1) == function(curvature, seed=1)
        assert function(curvature, seed=1).mean != function(curvature, seed=2).mean


def test_model_is_displaced_and_put_back(bert: Case):
    first, second = random_directions(bert.model, 2, seed=0)
    del second["cls.predictions.bias"]
    before = {n: p.detach().clone() for n, p in bert.model.named_parameters()}
    with untouched(bert.model), displaced(bert.model, [first, second], [0.5, -2.0]):
        for n, p in bert.model.named_parameters():
            wanted = before[n] + 0.5 * first[n] - 2 * second.get(n, torch.zeros_like(p))
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-14, atol=1e-14)


def test_model_is_put_back_when_the_block_raises(bert: Case):
    (direction,) = random_directions(bert.model, 1, seed=0)
    with untouched(bert.model), pytest.raises(ZeroDivisionError), displaced(bert.model, [direction], [1.0]):
        1 / 0  # noqa: B018


def test_displaced_bfloat16_weights_are_rounded_once():
    model = nn.Linear(50, 50).bfloat16()
    directions = [{n: torch.randn(p.shape) for n, p in model.named_parameters()} for _ in range(2)]
    weight = model.weight.detach().clone()
    with displaced(model, directions, [0.01, 0.01]):
        wanted = weight.float() + 0.01 * directions[0]["weight"] + 0.01 * directions[1]["weight"]
        assert torch.equal(model.weight.detach(), wanted.bfloat16())


def test_model_is_left_bit_identical_by_every_measure(bert: Case):
    bert.model.train()
    mask = random_fraction(bert.model, 0.002, seed=0)
    curvature = Curvature(bert.model, batched(bert.examples[:2], 1), mask=mask)
    with untouched(bert.model):
        sharpness(curvature), average_sharpness(curvature, draws=2), trace(curvature, draws=2)
        spectral_density(curvature, steps=3)


def test_top_eigenvalues_are_those_of_the_dense_hessian():
    model = Net(3, 6, 3)
    wanted = np.linalg.eigvalsh(dense_hessian(model, labelled(), "classification"))[::-1][:4]
    assert top_eigenvalues(of(model), 4, tolerance=1e-9) == pytest.approx(wanted, rel=1e-8)


def test_trace_of_a_diagonal_matrix_has_no_error():
    loss = Quadratic(torch.diag(torch.arange(6.0).double()), torch.zeros(6).double())
    found = trace(Curvature(Bowl([1.0] * 6), OFFSETS, objective=loss))
    assert found.mean == pytest.approx(15, rel=1e-14)
    assert (found.error, found.draws) == (pytest.approx(0, abs=1e-14), 10)


def test_mean_and_variance_of_the_trace_are_those_on_paper():
    curvature, loss = bowl(8)
    found = trace(curvature, tolerance=0.0, draws=600)
    h = loss.matrix
    variance = 2 * (float((h**2).sum()) - float((h.diag() ** 2).sum()))
    assert found.draws == 600
    assert abs(found.mean - float(h.trace())) < 4 * found.error
    assert found.error**2 * 600 == pytest.approx(variance, rel=0.2)


def test_trace_stops_when_its_standard_error_is_small():
    curvature, _ = bowl(30, np.linspace(1, 5, 30).tolist())
    found, finer = (trace(curvature, tolerance=t, draws=5000) for t in (0.05, 0.01))
    for estimate, tolerance in ((found, 0.05), (finer, 0.01)):
        assert estimate.error <= tolerance * abs(estimate.mean)
        assert 10 <= estimate.draws < 5000
        assert abs(estimate.mean - 90) < 4 * estimate.error
    assert finer.draws > found.draws


def test_trace_of_the_ggn_is_the_sum_of_the_exact_fisher():
    """Mean over examples of the expected squared gradient, with labels from the model."""
    model, curvature = Net(3, 4, 3), None
    wanted = 0.0
    for x in torch.cat([batch["x"] for batch in labelled()]):
        logits = model(x[None]).logits[0]
        for c, p in enumerate(logits.softmax(0).detach()):
            g = torch.autograd.grad(-logits.log_softmax(0)[c], list(model.parameters()), retain_graph=True)
            wanted += float(p) * sum(float((t**2).sum()) for t in g) / 9
    curvature = of(model, kind="ggn")
    assert np.trace(dense(curvature)) == pytest.approx(wanted, rel=1e-12)
    found = trace(curvature, draws=50)
    assert abs(found.mean - wanted) < 4 * found.error


@pytest.mark.parametrize("draws", [1, 2])
def test_full_quadrature_has_all_eigenvalues(draws: int):
    values = [-3.0, -1.0, 0.5, 2.0, 4.0, 9.0]
    curvature, _ = bowl(6, values)
    found = spectral_density(curvature, steps=99, draws=draws)
    np.testing.assert_allclose(found.nodes, np.repeat(values, draws), rtol=1e-10)
    assert found.weights.sum() == pytest.approx(1, rel=1e-13)


def test_full_quadrature_of_close_and_many_eigenvalues():
    """Without orthogonalisation the largest would be found several times."""
    values = sorted([*np.linspace(0.01, 1, 58), 50.0, 100.0])
    found = spectral_density(bowl(60, values)[0], steps=60)
    np.testing.assert_allclose(found.nodes, values, rtol=1e-7)


@pytest.mark.parametrize("draws", [2, 5])
def test_first_moment_is_the_trace_of_the_same_draws(draws: int):
    curvature, _ = bowl(len(SPECTRUM), SPECTRUM)
    found = spectral_density(curvature, steps=4, draws=draws)
    wanted = trace(curvature, tolerance=0.0, draws=draws).mean
    assert curvature.size * float(found.weights @ found.nodes) == pytest.approx(wanted, rel=1e-12)


def test_quadrature_is_exact_for_polynomials():
    """Two nodes: up to degree 3, for the vector of the draw."""
    curvature, loss = bowl(8)
    start = np.random.default_rng([0, 0]).integers(0, 2, 8) * 2.0 - 1.0
    found = spectral_density(curvature, steps=2)
    h = loss.matrix.numpy()
    for degree in range(4):
        wanted = start @ np.linalg.matrix_power(h, degree) @ start / 8
        assert found.weights @ found.nodes**degree == pytest.approx(wanted, rel=1e-12)


def test_quadrature_stops_where_the_space_is_exhausted():
    found = spectral_density(bowl(20, [2.0] * 20)[0], steps=10)
    assert found.nodes == pytest.approx([2.0])
    assert found.weights == pytest.approx([1.0])


def test_quadrature_of_no_curvature():
    found = spectral_density(bowl(5, [0.0] * 5)[0])
    assert (found.nodes.tolist(), found.weights.tolist()) == ([0.0], [1.0])


def test_spectrum_smoothed():
    found = spectral_density(bowl(len(SPECTRUM), SPECTRUM)[0], steps=10)
    x = np.linspace(-20, 20, 4001)
    density = found.smoothed(x, 0.5)
    assert density.sum() * (x[1] - x[0]) == pytest.approx(1, rel=1e-6)
    slow = [
        sum(w * math.exp(-((v - n) ** 2) / 0.5) / math.sqrt(0.5 * math.pi)
            for n, w in zip(found.nodes, found.weights, strict=True)) for v in x[::400]
    ]  # fmt: skip
    np.testing.assert_allclose(density[::400], slow, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("options", [{"steps": 0}, {"draws": 0}])
def test_quadrature_needs_a_step_and_a_draw(options: dict):
    with pytest.raises(ValueError, match="at least 1"):
        spectral_density(bowl()[0], **options)


def test_ratio_map_is_that_of_dense_hessians():
    model, batches = Net(3, 6, 3), labelled()
    directions = two(model)
    curvature = of(model)
    made = scan_landscape(
        model, batches, objective="classification", directions=directions, points=3, span=0.4, progress=False
    )
    with untouched(model):
        found = eigenvalue_ratio_map(curvature, made, directions, tolerance=1e-6, progress=False)
    for index in np.ndindex(3, 3):
        steps = [made.axes[k].steps[i] for k, i in enumerate(index)]
        with displaced(model, directions, steps):
            values = np.linalg.eigvalsh(dense_hessian(model, batches, "classification"))
        assert found[index] == pytest.approx(abs(values[0] / values[-1]), rel=1e-4)
    assert np.ptp(found) > 0.01


def test_ratio_map_of_a_mask():
    model, batches = Net(3, 6, 3), labelled()
    mask, directions = random_fraction(model, 0.7, seed=1), two(model)[:1]
    options = {"objective": "classification", "mask": mask}
    made = scan_landscape(model, batches, directions=directions, axes=1, points=3, progress=False, **options)
    found = eigenvalue_ratio_map(of(model, mask=mask), made, directions, tolerance=1e-6, progress=False)
    keep = np.concatenate([t.flatten() for t in mask.values()])
    h = dense_hessian(model, batches, "classification").numpy()[keep][:, keep]
    values = np.linalg.eigvalsh(h)
    assert found[1] == pytest.approx(abs(values[0] / values[-1]), rel=1e-4)


def test_ratio_map_has_nothing_where_the_loss_diverged():
    model = Net(3, 4, 3)
    directions = two(model)[:1]
    options = {"objective": "classification", "axes": 1, "points": 3}
    made = scan_landscape(model, labelled(), directions=directions, progress=False, **options)
    made.loss[2] = math.inf
    found = eigenvalue_ratio_map(of(model), made, directions, progress=False)
    assert np.isfinite(found).tolist() == [True, True, False]


def test_ratio_map_of_other_directions_is_refused():
    model = Net(3, 4, 3)
    first, second = two(model)
    made = landscape_of(lambda s: s * s, grid(3))
    made = dataclasses.replace(made, geometry=geometry_of(model, [first]))
    with pytest.raises(ValueError, match="those that the landscape was measured along"):
        eigenvalue_ratio_map(of(model), made, [second], progress=False)


def test_ratio_map_can_be_kept_as_a_metric(tmp_path: Path):
    made = landscape_of(lambda s: s * s, grid(3))
    dataclasses.replace(made, metrics={"eigenvalue ratio": np.array([0.1, 0.2, 0.3])}).save(tmp_path / "l.h5")
    assert Landscape.load(tmp_path / "l.h5").metrics["eigenvalue ratio"].tolist() == [0.1, 0.2, 0.3]


def test_measures_of_a_landscape_are_kept_in_its_file(tmp_path: Path):
    made = landscape_of(lambda a, b: a * a + b * b, grid(9), grid(9))
    measures = measure_landscape(made, threshold=0.25)
    basin = basin_radius(made, 0.25)
    assert measures["basin"] == {"threshold": 0.25, "radius": basin.radius, "steps": list(basin.steps)}
    assert np.array(measures["quadratic"]["hessian"]) == pytest.approx(2 * np.eye(2), abs=1e-12)
    dataclasses.replace(made, measures=measures).save(tmp_path / "l.h5")
    assert Landscape.load(tmp_path / "l.h5").measures == measures


def test_landscape_with_few_points_has_no_quadratic():
    made = landscape_of(lambda s: s * s, grid(5))
    made.evaluated[[0, 1, 3]] = False
    assert measure_landscape(made)["quadratic"] is None


def test_measures_of_a_model_are_those_of_the_functions():
    model = Net(3, 6, 3)
    curvature, directions = of(model), two(model)
    found = measure_model(curvature, directions, eigenvalues=3, seed=2)
    assert json.loads(json.dumps(found)) == found
    assert found["entries"] == 45
    assert found["curvature"] == "hessian"
    assert found["loss"] == curvature.loss()
    assert found["sharpness"] == {"plain": sharpness(curvature), "adaptive": sharpness(curvature, adaptive=True)}
    average = average_sharpness(curvature, adaptive=True, seed=2)
    assert found["average_sharpness"]["adaptive"] == dataclasses.asdict(average)
    assert found["eigenvalues"] == top_eigenvalues(curvature, 3, seed=2)
    assert found["trace"] == dataclasses.asdict(trace(curvature, seed=2))
    assert found["spectrum"]["nodes"] == spectral_density(curvature, seed=2).nodes.tolist()
    assert found["slice_curvature"] == slice_curvature(curvature, directions).tolist()


def test_measures_of_a_model_without_directions_have_no_slices(capsys: pytest.CaptureFixture[str]):
    assert "slice_curvature" not in measure_model(of(Net(3, 4, 3)))
    assert "Measures: 100%" in capsys.readouterr().err
    measure_model(of(Net(3, 4, 3)), progress=False)
    assert not capsys.readouterr().err


def test_basin_that_is_not_left_has_no_steps_in_json():
    found = measure_landscape(landscape_of(lambda s: 0.0, grid(5)))
    assert found["basin"] == {"threshold": 0.1, "radius": 1.0, "steps": None}


def test_numbers_that_json_lacks_are_none():
    far = [{"offset": torch.tensor([math.inf, 1.0]).double()}]
    curvature = Curvature(Bowl([1.0] * 4), far, objective=bowl(4)[1])
    found = measure_model(curvature, eigenvalues=1)
    assert found["loss"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
