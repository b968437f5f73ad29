"""Fewer points: against the functions they are points of, with what is said of the errors against the true ones."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import Interrupted, batched, case, contents, untouched
from test_landscape import OFFSETS, Bowl, bowl

from fisherscope.landscape import Axis, Landscape, scan_landscape
from fisherscope.landscape.scan import MARGIN, scan_adaptively
from fisherscope.landscape.surface import Journal, Point, mean_of

scan_quietly = functools.partial(scan_landscape, progress=False)

Function = Callable[..., float]


def empty(*shape: int) -> Landscape:
    """Steps from -1 to 1 along every axis."""
    axes = tuple(Axis(f"axis{number}", np.linspace(-1, 1, size), 1.0, 1) for number, size in enumerate(shape))
    return Landscape(axes, np.full(shape, np.nan), np.zeros(shape, dtype=bool))


def measuring(function: Function, calls: list[tuple[float, ...]] | None = None):
    def evaluate(points: Iterable[tuple[float, ...]]) -> Iterator[Point]:
        for steps in points:
            if calls is not None:
                calls.append(steps)
            yield Point(float(function(*steps)))

    return evaluate


def adaptive(function: Function, *shape: int, tolerance: float = 0.02, ceiling: float | None = None) -> Landscape:
    return scan_adaptively(measuring(function), Journal(empty(*shape)), tolerance, ceiling=ceiling)


def truth(function: Function, *shape: int) -> np.ndarray:
    """The function at every point, one by one."""
    steps = [axis.steps for axis in empty(*shape).axes]
    found = np.empty(shape)
    for index in np.ndindex(*shape):
        found[index] = function(*(axis[i] for axis, i in zip(steps, index, strict=True)))
    return found


def percentile95(found: Landscape, true: np.ndarray, ceiling: float = math.inf) -> float:
    """Of the errors of what was predicted, of true losses below the ceiling."""
    rest = ~found.evaluated & np.isfinite(true) & (true < ceiling)
    return float(np.percentile(np.abs(found.loss - true)[rest] / true[rest], 95))


def basin(x: float, y: float) -> float:
    return math.exp(1 + x * x + 0.5 * y * y + 0.4 * x * y + 0.3 * math.sin(3 * x))


def narrow(x: float, y: float) -> float:
    """A plateau with a basin a sixth of the first round's spacing wide: the percentile alone would pass over it."""
    return 10 - 8 * math.exp(-(x * x + y * y) / 0.06**2)


def valley(x: float, y: float) -> float:
    return 9 - 8 * math.exp(-2 * (x + y) ** 2 - 50 * (x - y) ** 2)


def cliff(x: float, y: float) -> float:
    return 8.0 if x + 0.3 * y > 0.2 else 2 + x * x + 0.5 * y


def along_one_axis(x: float, y: float) -> float:
    return 3 + 2 * math.sin(6 * x)


SURFACES = {"basin": basin, "narrow": narrow, "valley": valley, "cliff": cliff, "one axis": along_one_axis}


@functools.cache
def surface(name: str) -> Landscape:
    return adaptive(SURFACES[name], 51, 51)


@pytest.mark.parametrize("name", SURFACES)
def test_measured_points_are_raw(name: str) -> None:
    found, true = surface(name), truth(SURFACES[name], 51, 51)
    assert np.array_equal(found.loss[found.evaluated], true[found.evaluated])
    assert found.evaluated[found.centre] and found.prediction is not None
    assert found.prediction.measured == found.evaluated.sum() < 51 * 51
    assert np.isfinite(found.loss).all()


@pytest.mark.parametrize("name", SURFACES)
def test_true_error_is_within_the_tolerance_and_not_above_the_estimate(name: str) -> None:
    found, true = surface(name), truth(SURFACES[name], 51, 51)
    assert found.prediction is not None
    assert percentile95(found, true) <= found.prediction.percentile95 <= 0.02


@pytest.mark.parametrize(("name", "share"), [("basin", 0.05), ("narrow", 0.1), ("valley", 0.16), ("cliff", 0.25)])
def test_share_of_the_points_that_is_measured(name: str, share: float) -> None:
    assert surface(name).evaluated.mean() <= share


def test_a_narrow_basin_is_not_passed_over() -> None:
    """The points beside the centre are what only the basin explains."""
    true, found = truth(narrow, 51, 51), surface("narrow")
    basin_of = true < 9
    assert 0 < basin_of.mean() < 0.05
    np.testing.assert_allclose(found.loss[basin_of], true[basin_of], rtol=0.05)


def test_a_smaller_tolerance_takes_more_points() -> None:
    counts = [int(adaptive(basin, 51, 51, tolerance=t).evaluated.sum()) for t in (0.05, 0.002)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_a_huge_tolerance_takes_one_round() -> None:
    found = adaptive(lambda x, y: 3 + x, 51, 51, tolerance=0.999)
    assert found.evaluated.sum() <= 49 + 5
    assert found.evaluated[0, 0] and found.evaluated[-1, -1] and found.evaluated[0, -1] and found.evaluated[-1, 0]


@pytest.mark.parametrize("tolerance", [0.0, -0.1, 1.0, math.nan])
def test_a_tolerance_that_is_no_share_is_refused(tolerance: float) -> None:
    model = Bowl()
    with untouched(model), pytest.raises(ValueError, match=r"between 0 and 1, got .*; leave it out to measure every"):
        scan_quietly(model, OFFSETS, objective=bowl, points=5, adaptive=tolerance)


@pytest.mark.parametrize("shape", [(3,), (5,), (3, 3), (5, 7), (3, 3, 3), (1, 1)])
def test_a_grid_smaller_than_the_first_round_is_measured_completely(shape: tuple[int, ...]) -> None:
    found = adaptive(lambda *steps: 2 + sum(steps) ** 2, *shape)
    assert found.evaluated.all()
    assert found.prediction is not None
    assert (found.prediction.percentile95, found.prediction.maximum) == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(101,), (13, 13, 13)])
def test_one_and_three_axes(shape: tuple[int, ...]) -> None:
    def function(*steps: float) -> float:
        return math.exp(sum(step * step + 0.3 * step for step in steps))

    found, true = adaptive(function, *shape, tolerance=0.01), truth(function, *shape)
    assert found.prediction is not None
    assert percentile95(found, true) <= found.prediction.percentile95 <= 0.01
    assert found.evaluated.mean() < 0.4


def test_noise_is_measured_completely() -> None:
    noise = np.random.default_rng(0).random((15, 15)) + 0.1

    def function(x: float, y: float) -> float:
        return noise[round((x + 1) * 7), round((y + 1) * 7)]

    found = adaptive(function, 15, 15)
    assert found.evaluated.all() and np.array_equal(found.loss, noise)


def test_losses_above_the_ceiling_are_not_refined() -> None:
    def function(x: float, y: float) -> float:
        far = 3 * math.hypot(x, y) ** 2
        return 1 + far if far < 3 else 12 + 8 * abs(math.sin(40 * x) * math.sin(40 * y))

    found, true = adaptive(function, 31, 31, ceiling=4.0), truth(function, 31, 31)
    assert percentile95(found, true, ceiling=4.0) <= 0.02
    assert found.evaluated[true > 4].mean() < 0.6
    assert adaptive(function, 31, 31).evaluated[true > 4].mean() > 0.8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_is_interpolated_across_values_that_are_not_finite(value: float) -> None:
    """The predictions of the finite half are as if the other were not there; of the other, they are what is there."""

    def function(x: float, y: float) -> float:
        return value if x > 0.3 else math.exp(x + y * y)

    found, true = adaptive(function, 41, 41), truth(function, 41, 41)
    same = (true == found.loss) | (np.isnan(true) & np.isnan(found.loss))
    assert same[found.evaluated].all()
    finite = np.isfinite(found.loss)
    assert (finite != np.isfinite(true)).mean() < 0.03  # where the border is, up to a point or two
    both = finite & np.isfinite(true)
    np.testing.assert_allclose(found.loss[both], true[both], rtol=0.05)
    assert same[~both & ~np.isfinite(true) & ~finite].all()


def test_nothing_finite_is_measured_completely() -> None:
    found = adaptive(lambda x, y: math.nan, 11, 11)
    assert found.evaluated.all() and np.isnan(found.loss).all()


def test_losses_that_are_not_positive_are_predicted_relative_to_their_range() -> None:
    def function(x: float, y: float) -> float:
        return 100 * (x * x + 0.5 * math.sin(3 * y))

    found, true = adaptive(function, 41, 41, tolerance=0.01), truth(function, 41, 41)
    off = np.abs(found.loss - true)[~found.evaluated] / np.ptp(true)
    assert found.prediction is not None
    assert np.percentile(off, 95) <= found.prediction.percentile95 <= 0.01
    assert found.evaluated.mean() < 0.15


def test_only_the_logarithm_is_a_plane_there() -> None:
    """What is interpolated is log loss: a plane is predicted exactly, by a spline that holds planes."""

    def function(x: float, y: float) -> float:
        return math.exp(3 * x - 2 * y)

    np.testing.assert_allclose(adaptive(function, 31, 31).loss, truth(function, 31, 31), rtol=1e-6)


def test_scale_of_the_losses_does_not_matter() -> None:
    found, tenth = adaptive(basin, 31, 31), adaptive(lambda x, y: basin(x, y) / 8, 31, 31)
    assert np.array_equal(found.evaluated, tenth.evaluated)
    np.testing.assert_allclose(tenth.loss, found.loss / 8, rtol=1e-10)


def test_no_point_is_measured_twice_and_the_choice_is_always_the_same() -> None:
    runs: list[list[tuple[float, ...]]] = [[], []]
    for calls in runs:
        scan_adaptively(measuring(valley, calls), Journal(empty(41, 41)), 0.02)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == len(runs[0])


@pytest.mark.parametrize("stop", [1, 40, 60])
def test_what_was_measured_before_changes_nothing(stop: int) -> None:
    """A scan goes on in the middle of a round, and repeats nothing."""
    log, calls = Journal(empty(41, 41)), list[tuple[float, ...]]()

    def interrupted(x: float, y: float) -> float:
        if len(calls) > stop:
            raise Interrupted
        return valley(x, y)

    with pytest.raises(Interrupted):
        scan_adaptively(measuring(interrupted, calls), log, 0.02)
    again = Journal(log.landscape)
    rest: list[tuple[float, ...]] = []
    found = scan_adaptively(measuring(valley, rest), again, 0.02)
    wanted = adaptive(valley, 41, 41)
    assert np.array_equal(found.loss, wanted.loss) and np.array_equal(found.evaluated, wanted.evaluated)
    assert found.prediction == wanted.prediction
    assert not set(rest) & set(calls[:stop])
    assert stop + len(rest) == wanted.evaluated.sum()


def test_mean_of_replicates_is_the_mean_of_their_predictions() -> None:
    parts = [adaptive(function, 31, 31) for function in (basin, valley)]
    whole = mean_of(parts)
    np.testing.assert_array_equal(whole.loss, (parts[0].loss + parts[1].loss) / 2)
    assert np.array_equal(whole.evaluated, parts[0].evaluated & parts[1].evaluated)
    first, second, both = (part.prediction for part in (*parts, whole))
    assert first is not None and second is not None and both is not None
    assert both.percentile95 == max(first.percentile95, second.percentile95)
    assert both.measured == first.measured + second.measured


def hill(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positive, and no quadratic."""
    return torch.exp(bowl(model, batch) / 3)


ALONG = [{"x": torch.ones(1).double()}, {"y": torch.ones(1).double()}]


def of_hill(**options: object) -> Landscape:
    return scan_quietly(Bowl(), OFFSETS, **{"objective": hill, "directions": ALONG, "points": 21, **options})


def test_a_model_against_its_full_grid() -> None:
    found, full = of_hill(adaptive=0.02), of_hill()
    assert np.array_equal(found.loss[found.evaluated], full.loss[found.evaluated])
    assert found.evaluated.sum() < full.evaluated.sum() == 21 * 21
    assert percentile95(found, full.loss) <= 0.02
    assert full.prediction is None


def test_metrics_are_measured_or_nothing() -> None:
    made = case("bert-classifier", lengths=(5, 3))
    options = {"points": 13, "span": 0.2, "metrics": ["accuracy"]}
    found = scan_quietly(made.model, batched(made.examples, 2), **options, adaptive=0.05)
    assert 0 < found.evaluated.sum() < 13 * 13
    assert np.array_equal(np.isnan(found.metrics["accuracy"]), ~found.evaluated)


def test_adaptive_language_models_look_no_closer_beyond_guessing() -> None:
    made = case("bert", lengths=(7, 5, 3, 6))
    batches = batched(made.examples, 2)
    found = scan_quietly(made.model, batches, points=9, span=4.0, adaptive=0.2)
    full = scan_quietly(made.model, batches, points=9, span=4.0, clip=True)
    assert found.clipped is not None and found.clipped.any() and full.clipped is not None
    assert np.array_equal(found.clipped, full.clipped & found.evaluated)
    assert np.array_equal(found.loss[found.evaluated], full.loss[found.evaluated])
    assert (found.loss[found.clipped] > 0).all() and math.log(99) + MARGIN < found.loss.max()


def test_file_holds_what_is_known_of_the_predictions(tmp_path: Path) -> None:
    found = of_hill(adaptive=0.02)
    found.save(tmp_path / "l.h5")
    loaded = Landscape.load(tmp_path / "l.h5")
    assert loaded.prediction == found.prediction is not None
    assert np.array_equal(loaded.loss, found.loss) and np.array_equal(loaded.evaluated, found.evaluated)


def test_file_of_replicates_holds_their_predictions(tmp_path: Path) -> None:
    made = case("bert-classifier", lengths=(5, 3))
    found = scan_quietly(made.model, batched(made.examples, 2), points=13, span=0.2, replicates=2, adaptive=0.1)
    found.save(tmp_path / "l.h5")
    loaded = Landscape.load(tmp_path / "l.h5")
    assert np.array_equal(loaded.loss, found.loss) and np.isfinite(found.loss).all()
    assert loaded.prediction == found.prediction is not None
    assert [part.prediction for part in loaded.replicates] == [part.prediction for part in found.replicates]


@pytest.mark.parametrize("stop", [5, 60, 100])
def test_resumed_file_is_the_same_bit_for_bit(tmp_path: Path, stop: int) -> None:
    calls = 0

    def stopping(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Interrupted
        return hill(model, batch)

    part = tmp_path / "l.part"
    stopping.__qualname__ = "hill"
    with pytest.raises(Interrupted):
        of_hill(adaptive=0.002, objective=stopping, checkpoint=part)
    assert Landscape.load(part).prediction is None
    of_hill(adaptive=0.002, checkpoint=part).save(tmp_path / "resumed.h5")
    of_hill(adaptive=0.002).save(tmp_path / "whole.h5")
    assert contents(tmp_path / "resumed.h5") == contents(tmp_path / "whole.h5")


def test_checkpoint_holds_nothing_predicted(tmp_path: Path) -> None:
    part = tmp_path / "l.part"
    found = of_hill(adaptive=0.02, checkpoint=part)
    raw = Landscape.load(part)
    assert np.array_equal(raw.evaluated, found.evaluated)
    assert np.isnan(raw.loss[~raw.evaluated]).all()


def test_checkpoint_of_another_tolerance_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "l.part"
    of_hill(adaptive=0.02, checkpoint=part)
    with pytest.raises(ValueError, match="was begun with another settings adaptive"):
        of_hill(adaptive=0.01, checkpoint=part)


def test_says_how_much_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fisherscope"):
        found = of_hill(adaptive=0.02)
    assert found.prediction is not None
    told = [r.getMessage() for r in caplog.records if "predicted" in r.getMessage()]
    assert told == [
        f"Measured {found.evaluated.sum()} of 441 points; 95 % of the others are predicted within "
        f"{100 * found.prediction.percentile95:.2g} % of the loss, by cross-validation."
    ]


def test_tolerance_is_in_the_provenance(tmp_path: Path) -> None:
    of_hill(adaptive=0.05).save(tmp_path / "l.h5")
    with h5py.File(tmp_path / "l.h5") as file:
        assert json.loads(str(file.attrs["provenance"]))["settings"]["adaptive"] == 0.05
