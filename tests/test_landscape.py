"""Landscapes against a grid loop over copies of the model, directions against the weights' rows, files and resume."""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import reference
import torch
from conftest import Case, Interrupted, Stopping, batched, built, case, contents, kill_when, untouched
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fisherscope import storage
from fisherscope.landscape import Axis, Landscape, random_directions, scan_landscape
from fisherscope.landscape.scan import scan
from fisherscope.landscape.surface import Journal, Point
from fisherscope.masks import Mask, MaskMismatch, random_fraction

scan_quietly = functools.partial(scan_landscape, progress=False)

STEPS = {3: [-1.0, 0.0, 1.0], 5: [-1.0, -0.5, 0.0, 0.5, 1.0]}


class Bowl(nn.Module):
    """Two numbers, of which nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = nn.Parameter(torch.zeros(1, dtype=torch.float64)), nn.Parameter(torch.zeros(1).double())


def bowl(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """x^2 + 3 y^2 + x y, plus a number for every example."""
    return model.x**2 + 3 * model.y**2 + model.x * model.y + batch["offset"]


OFFSETS = [{"offset": torch.tensor([1.0, 2.0]).double()}, {"offset": torch.tensor([6.0]).double()}]
ALONG_X, ALONG_Y = {"x": torch.ones(1).double()}, {"y": torch.ones(1).double()}


def height(x: float, y: float) -> float:
    return x * x + 3 * y * y + x * y + 3  # the mean of the offsets


@pytest.mark.parametrize("points", [3, 5])
def test_one_axis_of_a_quadratic(points: int):
    found = scan_quietly(Bowl(), OFFSETS, objective=bowl, directions=[ALONG_X], axes=1, points=points)
    assert found.axes[0].steps.tolist() == STEPS[points]
    assert found.loss.tolist() == [height(a, 0) for a in STEPS[points]]
    assert found.evaluated.all()


@pytest.mark.parametrize("points", [(3, 3), (5, 3), (3, 5)])
def test_two_axes_of_a_quadratic(points: tuple[int, int]):
    found = scan_quietly(Bowl(), OFFSETS, objective=bowl, directions=[ALONG_X, ALONG_Y], points=points)
    assert [axis.steps.tolist() for axis in found.axes] == [STEPS[count] for count in points]
    assert found.loss.tolist() == [[height(a, b) for b in STEPS[points[1]]] for a in STEPS[points[0]]]
    assert found.loss.shape == found.evaluated.shape == points


def test_step_is_scaled_by_span():
    found = scan_quietly(Bowl(), OFFSETS, objective=bowl, directions=[ALONG_X, ALONG_Y], points=3, span=4.0)
    assert found.axes[0].steps.tolist() == [-4.0, 0.0, 4.0]
    assert found.loss.tolist() == [[height(a, b) for b in (-4, 0, 4)] for a in (-4, 0, 4)]


def test_swapped_directions_transpose_the_surface():
    options = {"objective": bowl, "points": 5}
    found = scan_quietly(Bowl(), OFFSETS, directions=[ALONG_X, ALONG_Y], **options)
    swapped = scan_quietly(Bowl(), OFFSETS, directions=[ALONG_Y, ALONG_X], **options)
    assert np.array_equal(swapped.loss, found.loss.T)
    assert not np.array_equal(found.loss, found.loss.T)


def test_mean_is_over_examples_not_over_batches():
    found = scan_quietly(Bowl(), OFFSETS, objective=bowl, directions=[ALONG_X], axes=1, points=3)
    assert found.centre_loss == 3.0
    assert found.objective == "bowl"
    assert found.references == {}


def test_parameters_that_no_direction_names_rest():
    model = Bowl()
    with torch.no_grad():
        model.y += 2
    found = scan_quietly(model, OFFSETS, objective=bowl, directions=[ALONG_X], axes=1, points=5)
    assert found.loss.tolist() == [height(a, 2) for a in STEPS[5]]


def test_values_that_are_not_finite_are_kept(tmp_path: Path):
    def broken(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        x = model.x.item()
        return torch.full_like(batch["offset"], {-1.0: math.nan, 0.0: 1.0, 1.0: math.inf}[x])

    scan_quietly(Bowl(), OFFSETS, objective=broken, directions=[ALONG_X], axes=1, points=3).save(tmp_path / "l.h5")
    found = Landscape.load(tmp_path / "l.h5")
    assert math.isnan(found.loss[0])
    assert found.loss[1:].tolist() == [1.0, math.inf]
    assert found.evaluated.all()
    assert found.perplexity[2] == math.inf


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@given(sizes=sizes, slope=st.lists(st.floats(-9, 9), min_size=3, max_size=3), done=st.integers(0, 2**30))
def test_scan_of_a_function_is_that_function(sizes: list[int], slope: list[float], done: int):
    """Whatever has been evaluated before is neither repeated nor changed."""
    axes = tuple(Axis(f"axis{k}", np.arange(size) * 0.5 - 1, 1.0, 1) for k, size in enumerate(sizes))
    before = np.array([bool(done >> bit & 1) for bit in range(math.prod(sizes))]).reshape(sizes)
    calls = []

    def loss_at(*steps: float) -> float:
        calls.append(steps)
        return sum(k * step + step * step for k, step in zip(slope, steps, strict=False))

    def measured(points: Iterable[tuple[float, ...]]) -> Iterator[Point]:
        return (Point(loss_at(*steps)) for steps in points)

    log = Journal(Landscape(axes, np.where(before, 99.0, np.nan), before))
    scan(measured, log)
    assert log.evaluated.all()
    assert len(calls) == (~before).sum()
    for index in np.ndindex(*sizes):
        steps = [axis.steps[i] for axis, i in zip(axes, index, strict=True)]
        assert log.landscape.loss[index] == (99.0 if before[index] else loss_at(*steps))


def moving(made: Case, **options: object) -> Landscape:
    return scan_quietly(made.model, batched(made.examples, 3), points=options.pop("points", 3), **options)


def loss_of(made: Case) -> Callable[[nn.Module], float]:
    return lambda model: reference.mean_loss(model, made.examples, made.objective)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bert-classifier", "bert-regressor"])
def test_surface_equals_a_loop_over_copies(name: str):
    """The reference moves every parameter once, by its canonical name: tied ones too."""
    made = case(name, lengths=(7, 3, 9, 5))
    found = moving(made, points=(3, 5), span=0.5, seed=4)
    directions = random_directions(made.model, 2, seed=4)
    wanted = reference.landscape(made.model, loss_of(made), directions, [axis.steps for axis in found.axes])
    np.testing.assert_allclose(found.loss, wanted, rtol=1e-6 if name == "t5" else 1e-10)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama", "albert"])
def test_centre_is_the_plain_loss(name: str):
    made = case(name)
    found = moving(made, axes=1)
    assert math.isclose(
        found.centre_loss, loss_of(made)(made.model), rel_tol=1e-6 if name in ("t5", "llama") else 1e-12
    )
    assert found.loss[1] == found.centre_loss


def test_centre_does_not_depend_on_mask_or_axes_or_batches(bert: Case):
    centres = [
        moving(bert).loss[1, 1],
        moving(bert, axes=1).loss[1],
        moving(bert, axes=1, seed=1, mask=random_fraction(bert.model, 0.5, seed=0)).loss[1],
        scan_quietly(bert.model, batched(bert.examples, 8), axes=1, points=3).loss[1],
    ]
    np.testing.assert_allclose(centres, centres[0], rtol=1e-12)
    assert len(set(centres[:3])) == 1


def test_one_axis_is_the_middle_of_two(bert: Case):
    surface, curve = moving(bert, points=5), moving(bert, points=5, axes=1)
    np.testing.assert_allclose(surface.loss[:, 2], curve.loss, rtol=1e-13)
    assert curve.axes[0].norm == surface.axes[0].norm


def test_loss_has_every_scored_token_once(bert: Case):
    np.testing.assert_allclose(
        moving(bert, axes=1).loss,
        scan_quietly(bert.model, batched(bert.examples, 1), axes=1, points=3).loss,
        rtol=1e-12,
    )


def test_float32_surface_is_close_to_float64(bert: Case):
    wide = moving(bert, span=0.3)
    bert.model.float()
    single = moving(bert, span=0.3)
    assert single.loss.dtype == np.float64
    np.testing.assert_allclose(single.loss, wide.loss, rtol=1e-3)


def test_reference_lines_and_perplexity(bert: Case):
    found = moving(bert, axes=1)
    assert found.references["uniform"] == math.log(99)
    assert 0 < found.references["unigram"] <= math.log(99)
    assert found.objective == "mlm"
    np.testing.assert_allclose(found.perplexity, np.exp(found.loss))


def rows(name: str, tensor: Tensor) -> Sequence[Tensor]:
    """Output units, embedded tokens: columns of what GPT-2 stores as [inputs, outputs]."""
    transposed = re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name)
    return list(tensor.T) if transposed else list(tensor)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama"])
def test_rows_of_directions_are_as_long_as_those_of_the_weights(name: str):
    model = built(name)
    with torch.no_grad():
        next(model.parameters())[3] = 0
    for direction in random_directions(model, 2, seed=1):
        assert list(direction) == [key for key, _ in model.named_parameters()]
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                assert not direction[key].any()
                continue
            for own, drawn in zip(rows(key, weight), rows(key, direction[key]), strict=True):
                assert torch.isclose(own.norm(), drawn.norm(), rtol=1e-6, atol=0), key


def test_biases_and_norms_can_move_with_their_own_norm(bert: Case):
    direction = random_directions(bert.model, 1, seed=1, one_dimensional="scale")[0]
    for name, parameter in bert.model.named_parameters():
        assert torch.isclose(direction[name].norm(), parameter.norm(), rtol=1e-6), name


def test_parameter_that_is_zero_rests():
    model = nn.Linear(3, 4)
    nn.init.zeros_(model.bias)
    nn.init.zeros_(model.weight)
    direction = random_directions(model, 1, seed=1, one_dimensional="scale")[0]
    assert not direction["weight"].any()
    assert not direction["bias"].any()


def test_directions_without_normalisation_are_standard_normal():
    direction = random_directions(nn.Linear(200, 100), 1, seed=1, normalize="none")[0]["weight"]
    assert abs(direction.mean()) < 0.03
    assert abs(direction.std() - 1) < 0.02


def test_direction_depends_only_on_seed_number_and_name(bert: Case):
    first, second = random_directions(bert.model, 2, seed=3)
    torch.rand(5)
    assert same(random_directions(bert.model, 1, seed=3)[0], first)
    assert not same(random_directions(bert.model, 1, seed=4)[0], first)
    assert not same(second, first)
    assert same(random_directions(built("bert"), 2, seed=3)[1], second)
    classifier = random_directions(built("bert-classifier"), 1, seed=3, normalize="none")[0]
    plain = random_directions(bert.model, 1, seed=3, normalize="none")[0]
    assert all(torch.equal(classifier[name], plain[name]) for name in plain if name.startswith("bert."))


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_drawing_directions_leaves_the_global_generator_alone(bert: Case):
    before = torch.get_rng_state()
    moving(bert, axes=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_directions_are_nearly_orthogonal():
    first, second = random_directions(nn.Linear(100, 100), 2, seed=0)
    cosine = nn.functional.cosine_similarity(first["weight"].flatten(), second["weight"].flatten(), dim=0)
    assert abs(cosine) < 0.05  # five standard deviations


def as_given(made: Case, direction: Mapping[str, Tensor], **options: object) -> np.ndarray:
    return moving(made, axes=1, directions=[direction], points=5, **options).loss


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_mask_and_complement_add_up_to_the_whole_direction(name: str):
    made = case(name, lengths=(7, 3))
    mask = random_fraction(made.model, 0.4, seed=1)
    whole = random_directions(made.model, 1, seed=2)[0]
    inside, outside = ({n: d * m[n] for n, d in whole.items()} for m in (mask, ~mask))
    assert same({n: inside[n] + outside[n] for n in whole}, whole)
    masked, rest = (moving(made, axes=1, points=5, seed=2, mask=m) for m in (mask, ~mask))
    np.testing.assert_allclose(masked.loss, as_given(made, inside), rtol=1e-13)
    np.testing.assert_allclose(rest.loss, as_given(made, outside), rtol=1e-13)
    together = moving(made, axes=1, points=5, seed=2)
    assert math.isclose(masked.axes[0].norm ** 2 + rest.axes[0].norm ** 2, together.axes[0].norm ** 2, rel_tol=1e-12)
    assert masked.axes[0].entries + rest.axes[0].entries == together.axes[0].entries


def test_moved_entries_and_norm_are_of_the_masked_direction(bert: Case):
    mask = random_fraction(bert.model, 0.4, seed=1)
    found = moving(bert, seed=2, mask=mask)
    for number, axis in enumerate(found.axes):
        moves = {n: d * mask[n] for n, d in random_directions(bert.model, 2, seed=2)[number].items()}
        assert axis.entries == sum(int((d != 0).sum()) for d in moves.values())
        assert math.isclose(axis.norm, math.sqrt(sum(float((d**2).sum()) for d in moves.values())), rel_tol=1e-12)
        assert axis.entries < mask.num_selected  # biases and norms are selected, but rest
        assert (axis.name, axis.kind) == (f"axis{number}", "random, filter-normalised")
    assert found.title == "random 0.4 of entries within model, seed 1"
    assert moving(bert, axes=1).title == "all entries"


def test_everything_selected_is_no_mask(bert: Case):
    assert np.array_equal(moving(bert, mask=random_fraction(bert.model, 1.0, seed=0)).loss, moving(bert).loss)


def test_entries_outside_the_mask_never_move(bert: Case):
    mask = random_fraction(bert.model, 0.3, seed=1)
    before = {name: p.detach().clone() for name, p in bert.model.named_parameters()}
    moved: list[bool] = []

    def watched(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        changes = {name: p.detach() != before[name] for name, p in model.named_parameters()}
        assert not any((change & ~mask[name]).any() for name, change in changes.items())
        moved.append(any(change.any() for change in changes.values()))
        return torch.zeros(len(batch["labels"]))

    moving(bert, axes=1, mask=mask, objective=watched)
    assert moved == [True] * 3 + [False] * 3 + [True] * 3  # three batches at every point


def test_head_that_the_mask_does_not_cover_rests(bert: Case):
    made = case("bert-classifier")
    mask = random_fraction(bert.model, 1.0, seed=0)
    found = moving(made, axes=1, mask=mask)
    direction = random_directions(made.model, 1, seed=0)[0]
    covered = {n: d for n, d in direction.items() if n.startswith("bert.") and not n.startswith("bert.pooler")}
    np.testing.assert_allclose(found.loss, moving(made, axes=1, directions=[covered]).loss, rtol=1e-13)


def test_mask_of_another_model_is_refused(gpt2: Case, bert: Case):
    with untouched(bert.model), pytest.raises(MaskMismatch):
        moving(bert, mask=random_fraction(gpt2.model, 0.5, seed=0))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_model_is_left_bit_identical(name: str):
    made = case(name, lengths=(5, 3))
    made.model.train()
    first, *_, last = made.model.parameters()
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)
    with torch.no_grad():
        first[0, 0] = -0.0
    with untouched(made.model):
        moving(made)


@pytest.mark.parametrize("call", [1, 4, 9])
def test_model_is_left_bit_identical_when_the_loss_raises(call: int, gpt2: Case, tmp_path: Path):
    gpt2.model.train()
    calls = 0

    def failing(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Interrupted
        return torch.zeros(len(batch["labels"]))

    with untouched(gpt2.model), pytest.raises(Interrupted):
        moving(gpt2, objective=failing, checkpoint=tmp_path / "landscape.h5.part")


def test_model_is_left_bit_identical_after_it_diverged(bert: Case):
    with untouched(bert.model):
        moving(bert, axes=1, span=1e300)


def test_given_directions_are_left_alone(bert: Case):
    direction = random_directions(bert.model, 1, seed=0)[0]
    before = {name: tensor.clone() for name, tensor in direction.items()}
    moving(bert, axes=1, directions=[direction], mask=random_fraction(bert.model, 0.5, seed=0))
    assert same(direction, before)


def test_file_gives_back_the_same_landscape(bert: Case, tmp_path: Path):
    found = moving(bert, points=(3, 5), mask=random_fraction(bert.model, 0.5, seed=0))
    found.save(tmp_path / "new" / "landscape.h5")
    loaded = Landscape.load(tmp_path / "new" / "landscape.h5")
    for a, b in zip(loaded.axes, found.axes, strict=True):
        assert a.steps.tolist() == b.steps.tolist()
        assert (a.name, a.norm, a.entries, a.kind) == (b.name, b.norm, b.entries, b.kind)
    assert loaded.loss.tobytes() == found.loss.tobytes()
    assert loaded.evaluated.tolist() == found.evaluated.tolist()
    for fact in ("objective", "references", "title", "provenance"):
        assert getattr(loaded, fact) == getattr(found, fact)
    loaded.save(tmp_path / "again.h5")
    assert contents(tmp_path / "again.h5") == contents(tmp_path / "new" / "landscape.h5")


def test_file_has_dimension_scales(bert: Case, tmp_path: Path):
    moving(bert, points=(3, 5)).save(tmp_path / "landscape.h5")
    with h5py.File(tmp_path / "landscape.h5") as file:
        assert file.attrs["format"] == "fisherscope.landscape"
        assert file.attrs["format_version"] == 1
        assert file["evaluated"].dtype == bool
        for number, size in enumerate((3, 5)):
            scale = file[f"axis{number}"]
            assert scale.is_scale
            assert scale.shape == (size,)
            for dataset in (file["loss"], file["evaluated"]):
                assert dataset.shape == (3, 5)
                assert dataset.dims[number][0] == scale


def test_provenance_says_how_the_landscape_was_made(bert: Case):
    batches = Stopping(batched(bert.examples, 3), source="some text", fingerprint="abc", batch_size=3)
    mask = random_fraction(bert.model, 0.5, seed=9)
    facts = scan_quietly(bert.model, batches, axes=1, points=3, mask=mask, seed=5).provenance
    assert facts["model"]["class"] == "BertForMaskedLM"
    assert facts["data"] == {"source": "some text", "fingerprint": "abc", "batch_size": 3, "settings": None}
    assert facts["mask"]["rule"] == "random 0.5 of entries within model, seed 9"
    assert facts["mask"]["selected"] == mask.num_selected
    assert facts["settings"]["seed"] == 5
    assert json.loads(json.dumps(facts)) == facts


DAMAGES: dict[str, Callable[[h5py.File], object]] = {
    "no loss": lambda file: file.__delitem__("loss"),
    "no axis": lambda file: file.__delitem__("axis1"),
    "no norm": lambda file: file["axis0"].attrs.__delitem__("norm"),
    "no title": lambda file: file.attrs.__delitem__("title"),
    "broken references": lambda file: file.attrs.__setitem__("references", "{"),
    "other shape": lambda file: (file.__delitem__("loss"), file.create_dataset("loss", data=np.zeros((2, 2)))),
    "text for losses": lambda file: (file.__delitem__("loss"), file.create_dataset("loss", data="text")),
    "a group for losses": lambda file: (file.__delitem__("loss"), file.create_group("loss")),
    "other format": lambda file: file.attrs.__setitem__("format", "fisherscope.scores"),
    "other version": lambda file: file.attrs.__setitem__("format_version", 7),
}


def small() -> Landscape:
    axes = (Axis("axis0", np.array(STEPS[3]), 1.0, 2), Axis("axis1", np.array(STEPS[5]), 1.5, 3))
    return Landscape(axes, np.arange(15.0).reshape(3, 5), np.ones((3, 5), dtype=bool))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_refused_in_one_sentence(damage: str, tmp_path: Path):
    path = tmp_path / "landscape.h5"
    small().save(path)
    with h5py.File(path, "r+") as file:
        DAMAGES[damage](file)
    with pytest.raises(storage.WrongFile, match=re.escape(str(path))) as error:
        Landscape.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_file_cut_short_is_refused(share: float, tmp_path: Path):
    path = tmp_path / "landscape.h5"
    small().save(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(storage.WrongFile, match="make it again"):
        Landscape.load(path)


def test_landscape_in_one_line():
    assert repr(small()) == "Landscape(3 x 5 points, all entries, mlm, 7 at the centre)"
    begun = replace(small(), loss=np.full((3, 5), np.nan), evaluated=np.zeros((3, 5), dtype=bool))
    assert repr(begun) == "Landscape(3 x 5 points, all entries, mlm, centre not measured yet)"
    assert small().centre_loss == 7.0


def stopping_after(calls: int | None) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """A loss that raises when it was called often enough, always under the same name."""
    left = [math.inf if calls is None else calls]

    def distance(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1
        return model(input_ids=batch["input_ids"]).logits.square().mean((1, 2))

    distance.left = left
    return distance


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("calls", [0, 3, 12, 30])
def test_resumed_scan_gives_the_same_file(axes: int, calls: int, bert: Case, tmp_path: Path):
    points, part = ((3, 5), 11)[axes == 1], tmp_path / "landscape.h5.part"
    options = {"axes": axes, "points": points, "seed": 3, "mask": random_fraction(bert.model, 0.5, seed=0)}
    moving(bert, objective=stopping_after(None), **options).save(tmp_path / "whole.h5")
    with pytest.raises(Interrupted):
        moving(bert, objective=stopping_after(calls), checkpoint=part, **options)
    assert Landscape.load(part).evaluated.sum() == calls // 3  # three batches
    resumed = stopping_after(None)
    moving(bert, objective=resumed, checkpoint=part, **options).save(tmp_path / "resumed.h5")
    assert contents(tmp_path / "resumed.h5") == contents(tmp_path / "whole.h5")


def test_resumed_scan_does_not_repeat_points(bert: Case, tmp_path: Path):
    part, again = tmp_path / "landscape.h5.part", stopping_after(100)
    with pytest.raises(Interrupted):
        moving(bert, objective=stopping_after(13), checkpoint=part)
    moving(bert, objective=again, checkpoint=part)
    assert 100 - again.left[0] == 3 * (9 - 4)


def flipped(mask: Mask) -> Mask:
    """As many entries, but others."""
    tensors = {name: tensor.flatten().flip(0).view_as(tensor) for name, tensor in mask.items()}
    return Mask(tensors, mask.provenance)


def halved(direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor / 2 for name, tensor in direction.items()}


@pytest.mark.parametrize(
    "change", ["seed", "span", "points", "axes", "mask", "directions", "weights", "data", "objective"]
)
def test_checkpoint_of_another_scan_is_refused(change: str, bert: Case, tmp_path: Path):
    part = tmp_path / "landscape.h5.part"
    direction = random_directions(bert.model, 1, seed=0)[0]
    options: dict = {"axes": 1, "points": 5, "mask": random_fraction(bert.model, 0.5, seed=0)}
    options |= {"directions": [direction]} if change == "directions" else {"seed": 3}
    before = {"fingerprint": "one"}
    with pytest.raises(Interrupted):
        scan_quietly(
            bert.model,
            Stopping(batched(bert.examples, 3), **before),
            objective=stopping_after(7),
            checkpoint=part,
            **options,
        )
    kept = part.read_bytes()
    others: dict = {
        "seed": {"seed": 4}, "span": {"span": 2.0}, "points": {"points": 3}, "axes": {"axes": 2},
        "mask": {"mask": flipped(options["mask"])}, "directions": {"directions": [halved(direction)]},
        "objective": {"objective": "mlm"},
    }  # fmt: skip
    if change == "weights":
        with torch.no_grad():
            next(bert.model.parameters())[0, 0] += 1
    data = {"fingerprint": "two"} if change == "data" else before
    options = {"objective": stopping_after(None), **options, **others.get(change, {})}
    with pytest.raises(ValueError, match="was begun with another"):
        scan_quietly(bert.model, Stopping(batched(bert.examples, 3), **data), checkpoint=part, **options)
    assert part.read_bytes() == kept


KILLED = """
import sys, time
import torch
from conftest import batched, case
from fisherscope.landscape import scan_landscape
def distance(model, batch):
    time.sleep(0.05)
    return model(input_ids=batch["input_ids"]).logits.square().mean((1, 2))
torch.set_num_threads(int(sys.argv[2]))
made = case("bert")
batches = batched(made.examples, 8)
scan_landscape(made.model, batches, objective=distance, points=5, progress=False, checkpoint=sys.argv[1])
"""


def distance(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"]).logits.square().mean((1, 2))


def test_killed_scan_resumes_to_the_same_file(bert: Case, tmp_path: Path):
    part = tmp_path / "landscape.h5.part"

    def ready() -> bool:
        try:
            with h5py.File(part, locking=False) as file:  # the scan holds the lock
                return file["evaluated"][()].sum() > 5
        except OSError:
            return False

    kill_when(ready, KILLED, part, Path(str(torch.get_num_threads())))  # sums depend on the number of threads
    done = Landscape.load(part)
    assert 5 < done.evaluated.sum() < 25
    assert np.isfinite(done.loss[done.evaluated]).all()
    batches, options = batched(bert.examples, 8), {"objective": distance, "points": 5}
    scan_quietly(bert.model, batches, checkpoint=part, **options).save(tmp_path / "resumed.h5")
    scan_quietly(bert.model, batches, **options).save(tmp_path / "whole.h5")
    assert contents(tmp_path / "resumed.h5") == contents(tmp_path / "whole.h5")
