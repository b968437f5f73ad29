"""The landscape against closed forms and slow loops: a quadratic whose every value is known, sizes, files."""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import Interrupted, batched, built, case, contents, untouched
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fisherscope import storage
from fisherscope.landscape import Landscape, random_directions, scan_landscape
from fisherscope.landscape.evaluate import Evaluator
from fisherscope.landscape.surface import Axis, Geometry, Marker, Prediction, mean_of
from fisherscope.masks import Mask, bottom_fraction, random_fraction, top_fraction
from fisherscope.models import backbone_prefix, weights_fingerprint
from fisherscope.scores import FisherScores

scan_quietly = functools.partial(scan_landscape, progress=False)

SIZES = [(3,), (7,), (5, 3), (3, 5), (3, 5, 7)]


class Point(nn.Module):
    """Three numbers, of which nothing is computed."""

    def __init__(self, at: Sequence[float] = (0, 0, 0), dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.x, self.y, self.z = (nn.Parameter(torch.tensor([value], dtype=dtype)) for value in at)


def height(x: float, y: float = 0, z: float = 0) -> float:
    """A quadratic that no exchange of axes leaves alone; sums of powers of two, so that it is exact."""
    return x * x + 4 * y * y + 16 * z * z + x * y + 2 * y * z + x + 8


def quadratic(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return (height(model.x, model.y, model.z) + batch["offset"]).to(batch["offset"].dtype)


OFFSETS = [{"offset": torch.tensor([-1.0, 2.0]).double()}, {"offset": torch.tensor([-1.0]).double()}]
UNITS = [{name: torch.ones(1).double()} for name in "xyz"]


def scanned(sizes: Sequence[int], model: nn.Module | None = None, **options: object) -> Landscape:
    given = {"objective": quadratic, "axes": len(sizes), "points": sizes, "span": 2.0} | options
    given.setdefault("directions", UNITS[: len(sizes)])
    return scan_quietly(model or Point(), OFFSETS, **given)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_value_of_a_quadratic(sizes: tuple[int, ...]):
    found = scanned(sizes)
    wanted = [np.arange(size) / (size // 2) * 2 - 2 for size in sizes]
    for axis, steps in zip(found.axes, wanted, strict=True):
        np.testing.assert_allclose(axis.steps, steps, rtol=0, atol=1e-15)
        assert axis.steps[len(steps) // 2] == 0
    for index in np.ndindex(*sizes):
        steps = [axis.steps[i] for axis, i in zip(found.axes, index, strict=True)]
        assert math.isclose(found.loss[index], height(*steps), rel_tol=1e-14)
    assert found.evaluated.all() and found.loss.shape == sizes


@given(
    at=st.tuples(*[st.integers(-8, 8)] * 3),
    sizes=st.lists(st.sampled_from([3, 5, 9]), min_size=1, max_size=3),
    span=st.sampled_from([0.25, 1.0, 4.0]),
)
def test_quadratic_around_another_point_is_exact(at: tuple[int, ...], sizes: list[int], span: float):
    model = Point(at)
    with untouched(model):
        found = scanned(sizes, model, span=span)
    for index in np.ndindex(*sizes):
        moved = [span * (i - size // 2) / (size // 2) for i, size in zip(index, sizes, strict=True)]
        assert found.loss[index] == height(*(start + move for start, move in zip(at, [*moved, 0, 0], strict=False)))


@pytest.mark.parametrize("sizes", [(4,), (2,), (5, 4), (6, 5), (3, 3, 8)], ids=str)
def test_even_counts_are_refused(sizes: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"^points must be odd, so that step 0 is on the grid, got \d; take"):
        scanned(sizes)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_other_order_of_directions_transposes_the_surface(order: tuple[int, ...]):
    sizes = (3, 5, 7)
    found = scanned([sizes[k] for k in order], directions=[UNITS[k] for k in order])
    assert np.array_equal(found.loss, scanned(sizes).loss.transpose(order))


@pytest.mark.parametrize(
    ("count", "ends", "steps"),
    [
        (5, (-1.0, 1.0), [-1, -0.5, 0, 0.5, 1]),
        (4, (-1.0, 2.0), [-1, 0, 1, 2]),
        (3, (0.0, 1.0), [0, 0.5, 1]),
        (5, (-4.0, 0.0), [-4, -3, -2, -1, 0]),
        (11, (-0.3, 0.7), [k / 10 for k in range(-3, 8)]),
    ],
    ids=str,
)
def test_given_ends_have_0_on_the_grid(count: int, ends: tuple[float, float], steps: list[float]):
    found = scanned([count], span=[ends])
    np.testing.assert_allclose(found.axes[0].steps, steps, rtol=0, atol=1e-12)
    assert found.axes[0].steps[found.centre] == 0
    assert found.centre_loss == height(0)
    np.testing.assert_allclose(found.loss, [height(step) for step in steps], rtol=1e-12)


@pytest.mark.parametrize(("count", "instead"), [(5, "4 or 7"), (6, "4 or 7")])
def test_grid_that_misses_0_is_refused_and_others_are_named(count: int, instead: str):
    with pytest.raises(ValueError, match=rf"^Step 0, the model, must be on the grid .* take {instead} points\.$"):
        scanned([count], span=[(-1.0, 2.0)])


@pytest.mark.parametrize("sizes", [(5,), (5, 3)], ids=str)
def test_resumed_after_every_number_of_points(sizes: tuple[int, ...], tmp_path: Path):
    scanned(sizes, objective=stopping(None)).save(tmp_path / "whole.h5")
    wanted, total = contents(tmp_path / "whole.h5"), math.prod(sizes)
    for done in range(total + 1):
        part = tmp_path / f"{done}.part"
        if done < total:
            with pytest.raises(Interrupted):
                scanned(sizes, objective=stopping(done), checkpoint=part)
            assert Landscape.load(part).evaluated.sum() == done
        scanned(sizes, objective=stopping(None), checkpoint=part).save(tmp_path / "resumed.h5")
        assert contents(tmp_path / "resumed.h5") == wanted


def stopping(points: int | None) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """The quadratic, raising after so many points of two batches."""
    left = [math.inf if points is None else 2 * points]

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1
        return quadratic(model, batch)

    return loss


def test_not_finite_values_count_as_measured_when_resumed(tmp_path: Path):
    calls = []

    def cliff(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(x := model.x.item())
        if x == 1 and len(calls) < 6:
            raise Interrupted
        return torch.full_like(batch["offset"], {-2.0: math.nan, -1.0: math.inf, 2.0: -math.inf}.get(x, x))

    part = tmp_path / "part"
    with pytest.raises(Interrupted):
        scan_quietly(Point(), OFFSETS[:1], **CLIFF, objective=cliff, checkpoint=part)
    assert Landscape.load(part).evaluated.tolist() == [True, True, True, False, False]
    calls.extend([0.0] * 6)
    before = len(calls)
    found = scan_quietly(Point(), OFFSETS[:1], **CLIFF, objective=cliff, checkpoint=part)
    assert calls[before:] == [1.0, 2.0]
    assert np.array_equal(found.loss, [math.nan, math.inf, 0, 1, -math.inf], equal_nan=True)
    assert found.evaluated.all()


CLIFF: dict = {"axes": 1, "points": 5, "span": 2.0, "directions": [UNITS[0]]}


def test_bf16_weights_are_rounded_once_per_point():
    """Computed in double precision and rounded at the end, on both axes."""
    model = Point((1.0, 1.0, 1.0), torch.bfloat16)
    seen: list[float] = []

    def watched(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        seen.append(model.x.item())
        return torch.zeros(len(batch["offset"]))

    directions = [{"x": torch.tensor([value], dtype=torch.bfloat16)} for value in (0.3, 0.007)]
    with untouched_bf16(model):
        found = scan_quietly(model, OFFSETS[:1], objective=watched, directions=directions, points=(5, 7), span=1.0)
    one, other = (float(direction["x"]) for direction in directions)
    wanted = [
        torch.tensor(1 + a * one + b * other, dtype=torch.float64).bfloat16().item()
        for a, b in itertools.product(*(axis.steps for axis in found.axes))
    ]
    assert seen == wanted


class untouched_bf16:
    """As ``untouched``, for a dtype that numpy does not know."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.before = [p.detach().view(torch.int16).clone() for p in self.model.parameters()]

    def __exit__(self, *_: object) -> None:
        pairs = zip(self.model.parameters(), self.before, strict=True)
        assert all(torch.equal(p.detach().view(torch.int16), before) for p, before in pairs)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_bf16_language_model(name: str):
    made = case(name, lengths=(5, 3))
    made.model.bfloat16()
    with untouched_bf16(made.model):
        found = scan_quietly(made.model, batched(made.examples, 2), points=3, span=0.5)
    assert np.isfinite(found.loss).all() and len(np.unique(found.loss)) == 9


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_tied_weights_are_moved_once(name: str):
    made = case(name, lengths=(3,))
    tied = {n: p for n, p in made.model.named_parameters(remove_duplicate=False)}
    assert len(tied) > len(list(made.model.named_parameters())), "nothing is tied here"
    before = {n: p.detach().clone() for n, p in tied.items()}
    directions = random_directions(made.model, 1, seed=0)
    evaluator = Evaluator(made.model.eval(), batched(made.examples, 1), made.objective, directions)
    next(iter(evaluator([(0.5,)])))
    for n, p in tied.items():
        moves = [d for own, d in directions[0].items() if tied[own] is p]
        assert len(moves) == 1
        assert torch.allclose(p, before[n] + 0.5 * moves[0], rtol=1e-14), n
    evaluator.restore()


def scores_of(model: nn.Module, seed: int = 0) -> FisherScores:
    """Some that are spread over orders of magnitude."""
    draw = torch.Generator().manual_seed(seed)
    return FisherScores(
        {n: torch.randn(p.shape, generator=draw).mul(2).exp().double() for n, p in model.named_parameters()}, 1
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_top_and_bottom_make_up_everything(share: float):
    model = built("gpt2")
    scores = scores_of(model)
    top, bottom = top_fraction(scores, share), bottom_fraction(scores, 1 - share)
    found = {key: masked(model, mask, one_dimensional="scale") for key, mask in (("top", top), ("bottom", bottom))}
    whole = masked(model, None, one_dimensional="scale")
    assert found["top"].axes[0].entries + found["bottom"].axes[0].entries == whole.axes[0].entries
    squares = [found[key].axes[0].norm ** 2 for key in ("top", "bottom")]
    assert math.isclose(sum(squares), whole.axes[0].norm ** 2, rel_tol=1e-12)


def nothing(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return torch.zeros(len(batch["offset"]))


def masked(model: nn.Module, mask: Mask | None, axes: int = 1, **options: object) -> Landscape:
    return scan_quietly(model, OFFSETS, objective=nothing, axes=axes, points=3, mask=mask, **options)


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("match", ["norm", "fisher"])
def test_masks_of_one_density_are_made_equal(match: str, orthogonal: bool):
    model = built("bert")
    scores = scores_of(model)
    weigh = [1.0 if match == "norm" else scores[n] for n in scores]
    masks = [top_fraction(scores, 0.2), bottom_fraction(scores, 0.2), random_fraction(model, 0.2, seed=1)]
    assert {mask.density for mask in masks} == {0.2}
    found = [masked(model, m, 2, match=match, scores=scores, orthogonal=orthogonal).geometry for m in masks]
    for number, direction in enumerate(random_directions(model, 2, seed=0)):
        pairs = zip(weigh, direction.values(), strict=True)
        wanted = 0.2 * sum(float((f * d.square()).sum()) for f, d in pairs)
        for geometry in found:
            gram = geometry.inner if match == "norm" else geometry.fisher
            assert math.isclose(gram[number, number], wanted, rel_tol=1e-12)
            if orthogonal:
                assert abs(geometry.cosines[0, 1]) < 1e-12


def test_scores_of_other_weights_warn_and_strict_refuses(caplog: pytest.LogCaptureFixture):
    model = built("bert")
    mask = random_fraction(model, 0.2, seed=1)
    facts = {"prefix": backbone_prefix(model), "backbone_fingerprint": weights_fingerprint(model, backbone_only=True)}
    scores = FisherScores(dict(scores_of(model)), 1, provenance={"model": facts})
    masked(model, mask, match="fisher", scores=scores, strict=True)
    assert not caplog.records
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    mask = random_fraction(model, 0.2, seed=1)
    masked(model, mask, match="fisher", scores=scores)
    assert "made for other weights of the same architecture" in caplog.text
    with pytest.raises(ValueError, match="estimate them for this model"):
        masked(model, mask, match="fisher", scores=scores, strict=True)


@pytest.mark.parametrize("match", ["norm", "fisher"])
def test_random_mask_keeps_its_size_on_average(match: str):
    """The ratio of squared sizes has mean 1 over masks: within four standard errors."""
    model = nn.Linear(40, 40).double()
    scores = scores_of(model)
    key = {"norm": "inner", "fisher": "fisher"}[match]
    ratios = []
    for seed in range(60):
        mask = random_fraction(model, 0.25, seed=seed)
        plain, equal = (
            masked(model, mask, scores=scores, one_dimensional="scale", match=how) for how in ("none", match)
        )
        ratios.append(float(getattr(plain.geometry, key)[0, 0] / getattr(equal.geometry, key)[0, 0]))
    error = np.std(ratios, ddof=1) / math.sqrt(len(ratios))
    assert 0 < error < 0.2
    assert abs(np.mean(ratios) - 1) < 4 * error


def test_head_that_the_mask_does_not_cover_does_not_count_for_the_size():
    """All of the backbone selected: matching changes nothing, though the head rests."""
    mask = random_fraction(built("bert"), 1.0, seed=0)
    model = built("bert-classifier")
    assert math.isclose(masked(model, mask, match="norm").axes[0].norm, masked(model, mask).axes[0].norm, rel_tol=1e-12)


def test_orthogonal_axes_have_cosine_0_and_keep_their_norms():
    model = built("gpt2")
    mask = top_fraction(scores_of(model), 0.2)
    plain, found = (masked(model, mask, 3, orthogonal=orthogonal).geometry for orthogonal in (False, True))
    assert np.abs(plain.cosines - np.eye(3)).max() > 1e-5
    np.testing.assert_allclose(found.cosines, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.diag(found.inner), np.diag(plain.inner), rtol=1e-12)


def test_geometry_is_that_of_the_flattened_directions():
    model = built("bert")
    scores, mask = scores_of(model), random_fraction(model, 0.4, seed=2)
    found = masked(model, mask, 3, scores=scores, seed=6).geometry
    directions = random_directions(model, 3, seed=6)
    flat = np.array([np.concatenate([(d[n] * mask[n]).numpy().ravel() for n in mask]) for d in directions])
    weights = np.concatenate([p.detach().numpy().ravel() for _, p in model.named_parameters()])
    fisher = np.concatenate([scores[n].numpy().ravel() for n in mask])
    np.testing.assert_allclose(found.inner, flat @ flat.T, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.fisher, flat * fisher @ flat.T, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.cosines, np.corrcoef(flat), atol=2e-2)
    norms = np.linalg.norm(flat, axis=1)
    np.testing.assert_allclose(found.cosines, flat @ flat.T / norms[:, None] / norms, atol=1e-12)
    assert math.isclose(found.weight_norm, np.linalg.norm(weights), rel_tol=1e-12)


class Mixed(nn.Module):
    """Every kind of parameter: rows, columns, three axes, one axis, zero rows, a row of one entry."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 3), Conv1D(5, 4)])
        self.kernel = nn.Conv1d(2, 3, 2)
        self.narrow = nn.Linear(1, 3)
        self.norm = nn.LayerNorm(4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape))
            self.layers[0].weight[1] = 0
            self.layers[1].weight[:, 2] = 0
            self.norm.bias.zero_()


def slices(name: str, weight: Tensor, normalize: str) -> list[tuple]:
    """What is scaled together, as indices."""
    if normalize == "parameter":
        return [(...,)]
    axis = 1 if name == "layers.1.weight" and normalize == "filter" else 0
    return [(slice(None),) * axis + (i,) for i in range(weight.shape[axis])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("one_dimensional", ["skip", "scale"])
@pytest.mark.parametrize("normalize", ["filter", "row", "parameter", "layer", "none"])
def test_normalisation_is_a_loop_over_groups(normalize: str, one_dimensional: str, dtype: torch.dtype):
    model = Mixed().to(dtype)
    own = {"normalize": normalize, "one_dimensional": one_dimensional}
    found = random_directions(model, 1, seed=3, **own)[0]
    drawn = random_directions(model, 1, seed=3, normalize="none", one_dimensional="scale")[0]
    weights = {n: p.detach() for n, p in model.named_parameters()}
    assert all(bool(d.isfinite().all()) for d in found.values())
    groups: list[list[tuple[str, tuple]]] = []
    for name, weight in weights.items():
        if weight.ndim == 1:
            groups += [[(name, (...,))]] if one_dimensional == "scale" else []
            assert one_dimensional == "scale" or not found[name].any()
        elif normalize != "layer":
            groups += [[(name, index)] for index in slices(name, weight, normalize)]
    if normalize == "layer":
        members = [["layers.0.weight"], ["layers.1.weight"], ["kernel.weight"], ["narrow.weight"]]
        groups += [[(name, (...,)) for name in names] for names in members]
    for group in groups:
        own_size, drawn_size = (
            math.sqrt(sum(float(t[name][index].double().square().sum()) for name, index in group))
            for t in (weights, drawn)
        )
        scale = 1.0 if normalize == "none" else own_size / drawn_size
        for name, index in group:
            wanted = drawn[name][index].double() * scale
            assert torch.allclose(found[name][index].double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=0), name


@pytest.mark.parametrize("normalize", ["filter", "row", "parameter", "layer"])
def test_rows_that_are_drawn_as_0_rest_without_nan(normalize: str, monkeypatch: pytest.MonkeyPatch):
    """A draw of exactly 0 is rare, but happens in rows of one entry."""
    model = nn.Linear(1, 3, bias=False)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    direction = random_directions(model, 1, seed=0, normalize=normalize)[0]
    assert direction["weight"].tolist() == [[0.0]] * 3


def test_replicates_are_the_mean_of_separate_scans(tmp_path: Path):
    made = case("bert", lengths=(5, 3, 4))
    batches, options = batched(made.examples, 2), {"points": (5, 3), "seed": 7, "metrics": ["accuracy"]}
    found = scan_quietly(made.model, batches, replicates=3, checkpoint=tmp_path / "part", **options)
    alone = [
        scan_quietly(
            made.model,
            batches,
            directions=random_directions(made.model, 2, seed=7, first=2 * number),
            **{**options, "seed": 0},
        )
        for number in range(3)
    ]
    for replicate, separate in zip(found.replicates, alone, strict=True):
        assert np.array_equal(replicate.loss, separate.loss)
        assert np.array_equal(replicate.metrics["accuracy"], separate.metrics["accuracy"])
        assert np.array_equal(replicate.geometry.inner, separate.geometry.inner)
    np.testing.assert_allclose(found.loss, np.mean([a.loss for a in alone], axis=0), rtol=1e-15)
    np.testing.assert_allclose(found.metrics["accuracy"], np.mean([a.metrics["accuracy"] for a in alone], axis=0))
    assert len({replicate.loss.tobytes() for replicate in found.replicates}) == 3
    assert np.array_equal(Landscape.load(tmp_path / "part").loss, found.loss)


def test_metrics_are_those_of_a_loop():
    made = case("bert-classifier")

    def margin(predictions) -> Tensor:
        return predictions.outputs.double().max(-1).values[:, 0]

    found = scan_quietly(made.model, batched(made.examples, 3), points=(5, 3), metrics=["accuracy", margin], span=0.5)
    directions = random_directions(made.model, 2, seed=0)
    for index in [(0, 0), (2, 1), (4, 2), (1, 2)]:
        model = built("bert-classifier")
        steps = [axis.steps[i] for axis, i in zip(found.axes, index, strict=True)]
        with torch.no_grad():
            for step, direction in zip(steps, directions, strict=True):
                for name, parameter in model.named_parameters():
                    parameter += step * direction[name]
            inputs = [{k: v[None] for k, v in e.items() if k != "labels"} for e in made.examples]
            logits = torch.cat([model(**one).logits for one in inputs])
        labels = torch.stack([e["labels"] for e in made.examples])
        assert found.metrics["accuracy"][index] == (logits.argmax(1) == labels).double().mean()
        assert math.isclose(found.metrics["margin"][index], logits.max(1).values.mean(), rel_tol=1e-9)
    assert {name: values.shape for name, values in found.metrics.items()} == dict.fromkeys(found.metrics, (5, 3))


def test_metrics_leave_the_losses_alone():
    made = case("gpt2", lengths=(5, 3))
    batches = batched(made.examples, 2)
    plain, found = (scan_quietly(made.model, batches, points=3, metrics=metrics) for metrics in ([], ["accuracy"]))
    assert np.array_equal(plain.loss, found.loss)


@pytest.mark.parametrize("axes", [1, 2])
def test_clipped_points_are_those_whose_first_batch_is_beyond_guessing(axes: int):
    made = case("bert")
    batches = batched(made.examples, 3)
    options = {"axes": axes, "points": 5, "span": 2.0}
    whole, found = (scan_quietly(made.model, batches, clip=clip, **options) for clip in (False, True))
    first = scan_quietly(made.model, batches[:1], **options)
    above = first.loss > math.log(99) + 0.5
    assert 0 < above.sum() < above.size
    assert np.array_equal(found.clipped, above)
    np.testing.assert_allclose(found.loss, np.where(above, first.loss, whole.loss), rtol=1e-13)
    assert whole.clipped is None
    if axes == 1:
        assert np.isnan(found.examples[above][:, 3:]).all()
        assert np.array_equal(found.examples[:, :3], whole.examples[:, :3])
        assert np.array_equal(found.examples[~above], whole.examples[~above])


def test_examples_of_a_curve_make_up_its_loss():
    made = case("gpt2")
    found = scan_quietly(made.model, batched(made.examples, 3), axes=1, points=5)
    assert found.counts.tolist() == [len(e["labels"]) - 1 for e in made.examples]
    np.testing.assert_allclose(found.examples.sum(1) / found.counts.sum(), found.loss, rtol=1e-13)


def full(sizes: tuple[int, ...], draw: np.random.Generator, replicates: int = 0) -> Landscape:
    """A landscape that has everything, with values that are not finite."""
    axes = tuple(
        Axis(f"axis{k}", np.arange(size) - float(size // 2), draw.random() + 1, k + 1, "given", 2)
        for k, size in enumerate(sizes)
    )

    def values(*more: int) -> np.ndarray:
        found = draw.normal(size=(*sizes, *more))
        found[draw.random(found.shape) < 0.1] = draw.choice([math.nan, math.inf, -math.inf])
        return found

    prediction = Prediction(0.02, 0.001, 0.01, 0.5, 9)

    def one(**facts: object) -> Landscape:
        return Landscape(
            axes,
            values(),
            draw.random(sizes) < 0.8,
            "causal-lm",
            {"uniform": math.log(7), "unigram": 1.0},
            "top 10 % é",
            metrics={"accuracy": values(), "own": values()},
            clipped=draw.random(sizes) < 0.2,
            examples=values(4),
            counts=np.array([3, 1, 0, 2]),
            geometry=Geometry(draw.normal(size=(len(sizes),) * 2), 3.5, draw.normal(size=(len(sizes),) * 2), True),
            **facts,
        )

    facts = {
        "provenance": {"model": {"name": "m"}, "time": "now"},
        "measures": {"trace": [1.5, 2.5], "note": {"a": None}},
    }
    if replicates:
        with np.errstate(invalid="ignore"):
            return mean_of([one(prediction=prediction) for _ in range(replicates)], **facts)
    markers = Marker("a", (0.5,) * len(sizes), 0.1, 1.0, math.nan), Marker("b", (1.0,) * len(sizes), 2.0)
    return one(**facts, markers=markers, connected=True, prediction=prediction)


def same(a: object, b: object) -> bool:
    """Field by field, NaN being NaN."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    return a == b or (a != a and b != b)


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_file_gives_back_everything(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int):
    path = tmp_path_factory.mktemp("file") / "landscape.h5"
    made = full(tuple(sizes), np.random.default_rng(seed))
    made.save(path)
    loaded = Landscape.load(path)
    for name in made.__dataclass_fields__:
        assert same(getattr(loaded, name), getattr(made, name)), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_file_gives_back_replicates(tmp_path: Path):
    made = full((3, 5), np.random.default_rng(0), replicates=3)
    made.save(tmp_path / "landscape.h5")
    loaded = Landscape.load(tmp_path / "landscape.h5")
    for name in made.__dataclass_fields__:
        assert same(getattr(loaded, name), getattr(made, name)), name


def test_datasets_of_the_grid_have_its_dimension_scales(tmp_path: Path):
    full((3, 5), np.random.default_rng(0)).save(tmp_path / "landscape.h5")
    with h5py.File(tmp_path / "landscape.h5") as file:
        for name in ("loss", "evaluated", "clipped", "metrics/accuracy", "metrics/own"):
            assert [dim[0].name for dim in file[name].dims] == ["/axis0", "/axis1"], name
            assert [dim[0].shape for dim in file[name].dims] == [(3,), (5,)]


def replaced(name: str, data: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = data

    return change


def without(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.__delitem__(name)


def attribute(name: str, value: object) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__(name, value)


DAMAGES: dict[str, Callable[[h5py.File], None]] = {
    "metrics of another shape": replaced("metrics/accuracy", np.zeros((2, 2))),
    "text for a metric": replaced("metrics/accuracy", "text"),
    "no group of metrics": replaced("metrics", np.zeros(3)),
    "clipped of another shape": replaced("clipped", np.zeros(3, dtype=bool)),
    "examples of another shape": replaced("examples", np.zeros((3, 5, 7))),
    "examples without counts": without("counts"),
    "inner products of another shape": replaced("inner", np.zeros((3, 3))),
    "Fisher inner products of another shape": replaced("fisher", np.zeros(2)),
    "no weight norm": lambda file: file.attrs.__delitem__("weight_norm"),
    "text for the weight norm": attribute("weight_norm", "x"),
    "no markers": lambda file: file.attrs.__delitem__("markers"),
    "broken markers": attribute("markers", "[{"),
    "markers without steps": attribute("markers", '[{"name": "a", "distance": 1}]'),
    "markers of another version": attribute("markers", '[{"name": "a", "steps": [0, 0], "distance": 1, "new": 1}]'),
    "markers that are a number": attribute("markers", "3"),
    "markers with too many steps": attribute("markers", '[{"name": "a", "steps": [0, 0, 0], "distance": 1}]'),
    "broken prediction": attribute("prediction", '{"tolerance": 1}'),
    "prediction that is a list": attribute("prediction", "[1, 2]"),
    "broken measures": attribute("measures", "{"),
    "measures that are a list": attribute("measures", "[1]"),
    "references that are a list": attribute("references", "[1]"),
    "broken provenance": attribute("provenance", "{"),
    "no connected": lambda file: file.attrs.__delitem__("connected"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_refused_in_one_sentence(damage: str, tmp_path: Path):
    path = tmp_path / "landscape.h5"
    full((3, 5), np.random.default_rng(0)).save(path)
    with h5py.File(path, "r+") as file:
        DAMAGES[damage](file)
    with pytest.raises(storage.WrongFile, match=re.escape(str(path))) as error:
        Landscape.load(path)
    assert str(error.value).endswith("make it again.") and "\n" not in str(error.value)


DAMAGED_REPLICATES: dict[str, Callable[[h5py.File], None]] = {
    "none": lambda file: [file.__delitem__(f"replicates/{k}") for k in range(2)] and None,
    "one missing": without("replicates/0"),
    "no group": replaced("replicates", np.zeros(2)),
    "loss of one missing": without("replicates/1/loss"),
    "no group for one": replaced("replicates/1", np.zeros(2)),
    "other metrics": without("replicates/1/metrics/own"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("damage", DAMAGED_REPLICATES)
def test_damaged_replicates_are_refused_in_one_sentence(damage: str, tmp_path: Path):
    path = tmp_path / "landscape.h5"
    full((3, 5), np.random.default_rng(0), replicates=2).save(path)
    with h5py.File(path, "r+") as file:
        DAMAGED_REPLICATES[damage](file)
    with pytest.raises(storage.WrongFile, match=re.escape(str(path))):
        Landscape.load(path)


def test_markers_have_the_losses_of_their_models_and_of_the_nearest_points():
    from fisherscope.landscape import Subspace

    model = Point((1.0, 2.0, 0.0))
    space = Subspace(
        tuple(UNITS[:2]),
        ("along x", "along y"),
        (Marker("m", (2.0, -1.0), 0.5),),
        (lambda: {"x": torch.tensor([3.0]).double(), "z": torch.tensor([0.5]).double()},),
        connected=True,
    )
    with untouched(model):
        found = scanned((5, 3), model, directions=space)
    assert found.markers == (
        replace(space.markers[0], loss=float(height(3, 2, 0.5)), nearest_loss=float(height(3, 1))),
    )
    assert found.connected
    assert [axis.kind for axis in found.axes] == ["along x", "along y"]
    assert json.loads(json.dumps(found.provenance["settings"]["directions"])) == ["along x", "along y"]
