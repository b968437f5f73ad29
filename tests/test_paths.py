"""Directions between models against NumPy's singular values, closed forms in seven numbers, and the models."""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import Case, batched, built, case, checkpoint, untouched
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from fisherscope.landscape import Subspace, paths, scan_landscape
from fisherscope.landscape.paths import between, plane_through, span_of, trajectory
from fisherscope.landscape.surface import Marker
from fisherscope.masks import Mask, MaskMismatch, random_fraction
from fisherscope.storage import WrongFile

scan_quietly = functools.partial(scan_landscape, progress=False)

DIMENSION = 7


class Seven(nn.Module):
    """Seven numbers in two parameters, of which nothing is computed."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        values = torch.tensor(numbers, dtype=torch.float64)
        self.a, self.b = nn.Parameter(values[:4].reshape(2, 2).clone()), nn.Parameter(values[4:].clone())


def flat(tensors: Mapping[str, Tensor] | nn.Module) -> np.ndarray:
    own = dict(tensors.named_parameters()) if isinstance(tensors, nn.Module) else tensors
    return np.concatenate([own[name].detach().double().flatten().numpy() for name in own])


def cloud(count: int, rank: int = DIMENSION, seed: int = 0) -> list[Seven]:
    """Models that lie in a subspace of a given rank, far from its origin."""
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(count, rank)) @ draw.normal(size=(rank, DIMENSION)) + draw.normal(size=DIMENSION)
    return [Seven(*row) for row in points]


def half() -> Mask:
    """The first row of one parameter and the first number of the other."""
    a = torch.tensor([[True, True], [False, False]])
    return Mask({"a": a, "b": torch.tensor([True, False, False])})


HALF = np.array([1, 1, 0, 0, 1, 0, 0])


def steepness(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A quadratic that weighs every number differently."""
    numbers = torch.cat([p.flatten() for p in model.parameters()])
    return (numbers**2 * torch.arange(1, DIMENSION + 1)).sum() + 0 * batch["zero"]


ZEROS = [{"zero": torch.zeros(2).double()}]


def scanned(space: Subspace, model: nn.Module, **options: object):
    """A small landscape of the seven numbers."""
    options = {"points": 5, "objective": steepness, "axes": len(space.directions)} | options
    return scan_quietly(model, ZEROS, directions=space, span=span_of(space, 5), **options)


def steps(space: Subspace) -> np.ndarray:
    return np.array([marker.steps for marker in space.markers])


def distances(space: Subspace) -> np.ndarray:
    return np.array([marker.distance for marker in space.markers])


def matrix(space: Subspace) -> np.ndarray:
    return np.array([flat(direction) for direction in space.directions])


def test_line_to_another_model_is_their_difference():
    model, other = cloud(2)
    space = between(model, other, name="fine-tuned")
    np.testing.assert_array_equal(matrix(space), [flat(other) - flat(model)])
    assert space.markers == (Marker("fine-tuned", (1.0,), 0.0),)
    assert space.kinds == ("to fine-tuned",)


def test_line_with_a_mask_leaves_out_the_rest():
    model, other = cloud(2)
    space = between(model, other, mask=half())
    difference = flat(other) - flat(model)
    np.testing.assert_array_equal(matrix(space), [difference * HALF])
    assert space.markers[0].steps == (1.0,)
    assert math.isclose(space.markers[0].distance, np.linalg.norm(difference * (1 - HALF)), rel_tol=1e-14)


def test_marker_has_the_loss_of_the_model_itself_and_of_the_point():
    model, other = cloud(2)
    marker = scanned(between(model, other, mask=half()), model, mask=half()).markers[0]
    own, nearest = flat(other) ** 2, np.where(HALF, flat(other), flat(model)) ** 2
    weights = np.arange(1, DIMENSION + 1)
    assert math.isclose(marker.loss, own @ weights, rel_tol=1e-14)
    assert math.isclose(marker.nearest_loss, nearest @ weights, rel_tol=1e-14)


def test_nothing_between_equal_models():
    model, other = Seven(*range(7)), Seven(*range(7))
    with pytest.raises(
        ValueError, match=r"^twin must differ from the model by finite numbers, but the distance is 0\."
    ):
        between(model, other, name="twin")


def test_nothing_between_models_that_are_equal_where_the_mask_selects():
    model, other = Seven(*range(7)), Seven(0, 1, 9, 9, 4, 9, 9)
    with pytest.raises(ValueError, match="where the mask selects"):
        between(model, other, mask=half())


def test_model_that_holds_nan_is_refused():
    with pytest.raises(ValueError, match="distance is nan"):
        between(Seven(*range(7)), Seven(*range(6), math.nan))


def test_three_models_in_a_plane_in_closed_form():
    """From the origin to (2, 0, ...) and (1, 6, ...): the second axis is as long as the first."""
    model, first, second = Seven(*[0] * 7), Seven(2, *[0] * 6), Seven(1, 6, *[0] * 5)
    space = plane_through(model, first, second, names=("A", "B"))
    np.testing.assert_allclose(matrix(space), [[2, 0, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0, 0]], atol=1e-15)
    np.testing.assert_allclose(steps(space), [[1, 0], [0.5, 3]], atol=1e-15)
    assert [marker.name for marker in space.markers] == ["A", "B"]
    assert space.kinds == ("to A", "across, towards B")
    assert not space.connected


def test_axes_of_a_plane_are_orthogonal_and_equally_long():
    model, first, second = cloud(3)
    gram = matrix(plane_through(model, first, second)) @ matrix(plane_through(model, first, second)).T
    assert abs(gram[0, 1]) < 1e-14 * gram[0, 0]
    assert math.isclose(gram[1, 1], gram[0, 0], rel_tol=1e-14)


def test_three_models_are_in_their_plane():
    model, first, second = cloud(3)
    space = plane_through(model, first, second)
    np.testing.assert_allclose(flat(model) + steps(space) @ matrix(space), [flat(first), flat(second)], rtol=1e-13)
    np.testing.assert_allclose(distances(space), 0, atol=1e-14)


def test_landscape_of_a_plane_shows_the_models_themselves():
    model, first, second = cloud(3)
    found = scanned(plane_through(model, first, second), model)
    np.testing.assert_allclose([m.nearest_loss for m in found.markers], [m.loss for m in found.markers], rtol=1e-13)


def test_plane_with_a_mask_is_that_of_the_masked_models():
    """A model with what the mask selects of another, and its own other numbers, is in the plane."""
    model, first, second = cloud(3)
    mixed = [Seven(*np.where(HALF, flat(other), flat(model))) for other in (first, second)]
    masked, plain = plane_through(model, first, second, mask=half()), plane_through(model, *mixed)
    np.testing.assert_allclose(matrix(masked), matrix(plain), rtol=1e-13)
    np.testing.assert_allclose(steps(masked), steps(plain), atol=1e-14)
    left_out = [np.linalg.norm((flat(other) - flat(model)) * (1 - HALF)) for other in (first, second)]
    np.testing.assert_allclose(distances(masked), left_out, rtol=1e-13)


@pytest.mark.parametrize("numbers", [(2, 4, 6), (-1, -2, -3)])
def test_three_models_on_a_line_have_no_plane(numbers: Sequence[float]):
    line = [Seven(*np.arange(7) * k) for k in (1, *numbers[:2])]
    with pytest.raises(ValueError, match=r"^The model, A and B lie on a line, but .*; scan the line with between"):
        plane_through(*line, names=("A", "B"))


def test_models_in_a_figure_have_different_names():
    with pytest.raises(ValueError, match=r"^Every one of the 2 models needs a name of its own, got A, A\.$"):
        plane_through(*cloud(3), names=("A", "A"))


def components(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal components, one per row, and their shares of the variance."""
    _, sizes, rows = np.linalg.svd(points - points.mean(0), full_matrices=False)
    return rows, sizes**2 / (sizes**2).sum()


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_components_are_the_singular_vectors(axes: int, masked: bool):
    *others, model = cloud(6)
    keep = HALF if masked else np.ones(7)
    points = np.array([flat(other) for other in (*others, model)]) * keep
    wanted, shares = components(points)
    space = trajectory(model, [*others, model], axes=axes, mask=half() if masked else None)
    size = max(np.linalg.norm(point - flat(model) * keep) for point in points)
    signs = np.sign(np.sum(wanted[:axes] * matrix(space), axis=1, keepdims=True))
    np.testing.assert_allclose(matrix(space), wanted[:axes] * signs * size, atol=1e-12 * size)
    assert space.kinds == tuple(
        f"{nth} principal component, {100 * share:.1f} % of the variance"
        for nth, share in zip(("1st", "2nd", "3rd")[:axes], shares, strict=False)
    )


def test_first_checkpoint_is_on_the_positive_side_of_the_mean():
    for seed in range(5):
        *others, model = cloud(6, seed=seed)
        placed = steps(trajectory(model, [*others, model]))
        assert (placed[0] > placed.mean(0)).all()


def test_markers_are_the_least_squares_projections():
    *others, model = cloud(6)
    space = trajectory(model, others)
    differences = np.array([flat(other) - flat(model) for other in others])
    placed, squares, *_ = np.linalg.lstsq(matrix(space).T, differences.T, rcond=None)
    np.testing.assert_allclose(steps(space), placed.T, atol=1e-13)
    np.testing.assert_allclose(distances(space), np.sqrt(squares), rtol=1e-12)
    assert (distances(space) > 0.1).all()


def test_projection_with_a_mask_leaves_out_the_rest():
    *others, model = cloud(6)
    space = trajectory(model, others, mask=half())
    differences = np.array([flat(other) - flat(model) for other in others])
    np.testing.assert_array_equal(matrix(space) * (1 - HALF), 0)
    rest = np.linalg.norm(differences - steps(space) @ matrix(space), axis=1)
    np.testing.assert_allclose(distances(space), rest, rtol=1e-13)


def test_last_checkpoint_is_the_origin():
    *others, model = cloud(5)
    last = trajectory(model, [*others, Seven(*flat(model))]).markers[-1]
    assert (last.steps, last.distance) == ((0.0, 0.0), 0.0)


def test_path_in_a_plane_is_reproduced():
    *others, model = cloud(6, rank=2)
    space = trajectory(model, [*others, model])
    np.testing.assert_allclose(distances(space), 0, atol=1e-13)
    wanted = [flat(other) for other in (*others, model)]
    np.testing.assert_allclose(flat(model) + steps(space) @ matrix(space), wanted, atol=1e-13)
    found = scanned(space, model)
    np.testing.assert_allclose([m.nearest_loss for m in found.markers], [m.loss for m in found.markers], rtol=1e-11)


def test_step_1_is_as_far_as_the_farthest_checkpoint():
    *others, model = cloud(6)
    space = trajectory(model, others)
    farthest = max(np.linalg.norm(flat(other) - flat(model)) for other in others)
    np.testing.assert_allclose(np.linalg.norm(matrix(space), axis=1), farthest, rtol=1e-13)
    assert np.abs(steps(space)).max() <= 1


def test_components_are_orthogonal_even_where_one_is_tiny():
    draw = np.random.default_rng(0)
    points = draw.normal(size=(6, 1)) * draw.normal(size=7) + 1e-5 * draw.normal(size=(6, 7))
    *others, model = [Seven(*point) for point in points]
    gram = (found := matrix(trajectory(model, others))) @ found.T
    assert abs(gram[0, 1]) < 1e-14 * gram[0, 0]


def test_components_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch):
    *others, model = cloud(6)
    whole = trajectory(model, others)
    monkeypatch.setattr(paths, "BLOCK", 3)
    np.testing.assert_allclose(matrix(trajectory(model, others)), matrix(whole), atol=1e-13)


def test_trajectory_is_connected_and_named_by_number():
    *others, model = cloud(4)
    space = trajectory(model, others)
    assert space.connected
    assert [marker.name for marker in space.markers] == ["1", "2", "3"]
    named = trajectory(model, others, names=["start", "middle", "end"])
    assert [marker.name for marker in named.markers] == ["start", "middle", "end"]


@pytest.mark.parametrize(
    ("others", "axes", "rank"),
    [
        (cloud(2), 2, 1),
        (cloud(3), 3, 2),
        (cloud(5, rank=1), 2, 1),
        (cloud(2) * 3, 2, 1),
        (cloud(1) * 3, 1, 0),
        (cloud(1), 1, 0),
        ([], 1, 0),
    ],
    ids=["two", "three", "on a line", "repeated", "all equal", "one", "none"],
)
def test_checkpoints_that_do_not_spread_are_refused(others: list[Seven], axes: int, rank: int):
    names = [str(number) for number in range(len(others))]
    with pytest.raises(ValueError, match=rf"as there are axes \({axes}\), but these {len(others)} spread in {rank};"):
        trajectory(Seven(*range(7)), others, names=names, axes=axes)


def test_number_of_components_is_checked():
    with pytest.raises(ValueError, match=r"^axes must be 1, 2 or 3, got 4\.$"):
        trajectory(*_split(cloud(6)), axes=4)


def _split(models: Sequence[Seven]) -> tuple[Seven, Sequence[Seven]]:
    return models[-1], models[:-1]


def test_checkpoint_that_diverged_is_refused():
    with pytest.raises(ValueError, match=r"^Checkpoints must hold finite numbers, but one has infinity or NaN"):
        trajectory(Seven(*range(7)), [*cloud(3), Seven(*range(6), math.inf)])


def test_every_checkpoint_needs_a_name():
    with pytest.raises(ValueError, match=r"^Every one of the 3 models needs a name of its own, got a, b\.$"):
        trajectory(Seven(*range(7)), cloud(3), names=["a", "b"])


def same(a: Subspace, b: Subspace, tolerance: float = 0.0) -> bool:
    """Whether directions and markers agree."""
    return np.allclose(matrix(a), matrix(b), rtol=0, atol=tolerance) and np.allclose(steps(a), steps(b), atol=1e-12)


def saved(model: nn.Module, path: Path) -> Path:
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, path)
    return path


def test_other_can_be_a_module_a_state_a_file_or_a_folder(tmp_path: Path):
    model, other = built("bert").float(), built("bert", seed=1).float()
    wanted = between(model, other)
    checkpoint("bert", tmp_path / "folder", seed=1)
    assert same(between(model, other.state_dict()), wanted)
    assert same(between(model, saved(other, tmp_path / "other.safetensors")), wanted)
    assert same(between(model, str(tmp_path / "other.safetensors")), wanted)
    assert same(between(model, tmp_path / "folder"), wanted)


def test_other_can_be_a_built_in_model():
    from fisherscope.models import load_model

    model, _ = load_model("builtin:bert", device="cpu")
    loaded = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5
    found = between(model, "builtin:bert").weights[0]()
    assert all(torch.equal(found[name], tensor) for name, tensor in loaded.items())


def test_checkpoints_in_files_are_as_those_in_memory(tmp_path: Path):
    *others, model = [built("gpt2", seed=seed).float() for seed in range(4)]
    files = [saved(other, tmp_path / f"step_{n}.safetensors") for n, other in enumerate(others)]
    space, wanted = trajectory(model, [*files, model]), trajectory(model, [*others, model])
    assert same(space, wanted)
    assert [marker.name for marker in space.markers] == ["step_0", "step_1", "step_2", "4"]
    for read, other in zip(space.weights, others, strict=False):
        assert all(torch.equal(read()[name], p) for name, p in other.named_parameters())


def test_checkpoints_in_files_are_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing but a directions' worth of tensors is alive when the second checkpoint is read."""
    *others, model = cloud(4)
    files = [saved(other, tmp_path / f"{n}.safetensors") for n, other in enumerate(others)]
    reads, alive = paths._read, []

    class Watched(dict[str, Tensor]):
        def __init__(self, tensors: Mapping[str, Tensor]) -> None:
            super().__init__(tensors)
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def watched(model: nn.Module, other: Path) -> Watched:
        assert not alive
        return Watched(reads(model, other))

    monkeypatch.setattr(paths, "_read", watched)
    space = trajectory(model, files)
    assert not alive
    assert np.array_equal(flat(space.weights[1]()), flat(others[1]))


def test_temporary_copies_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    *others, model = cloud(4)
    files = [saved(other, tmp_path / f"{n}.safetensors") for n, other in enumerate(others)]
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    trajectory(model, files)
    assert not list(scratch.iterdir())


def loss_of(made: Case) -> Callable[[nn.Module], float]:
    return lambda model: reference.mean_loss(model, made.examples, made.objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_step_1_is_the_other_model_bit_for_bit(name: str, dtype: torch.dtype):
    made = case(name, lengths=(7, 3))
    model, other = made.model.to(dtype), built(name, seed=1).to(dtype)
    with untouched_bits(model):
        found = scan_quietly(
            model, batched(made.examples, 2), directions=between(model, other), axes=1, points=3, span=[(-1.0, 1.0)]
        )
    alone = scan_quietly(other, batched(made.examples, 2), directions=between(other, model), axes=1, points=3)
    assert found.markers[0].loss == found.markers[0].nearest_loss == found.loss[2] == alone.centre_loss
    assert found.loss[2] != found.loss[1]


def untouched_bits(model: nn.Module):
    """As ``untouched``, which reads through NumPy, where NumPy has the type."""
    from contextlib import nullcontext

    return nullcontext() if next(model.parameters()).dtype == torch.bfloat16 else untouched(model)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bert-classifier"])
def test_losses_at_markers_are_those_of_the_models(name: str):
    made = case(name, lengths=(7, 3, 4))
    others = [built(name, seed=seed) for seed in (1, 2)]
    space = plane_through(made.model, *others)
    with untouched(made.model), untouched(others[0]):
        found = scan_quietly(made.model, batched(made.examples, 2), directions=space, points=3, span=span_of(space, 3))
    wanted = [loss_of(made)(other) for other in others]
    rough = 1e-6 if name == "t5" else 1e-12
    np.testing.assert_allclose([marker.loss for marker in found.markers], wanted, rtol=rough)
    np.testing.assert_allclose([marker.nearest_loss for marker in found.markers], wanted, rtol=rough)


def test_loss_of_the_model_itself_among_its_checkpoints(gpt2: Case):
    """Its parameters are displaced by the scan when they are asked for."""
    others = [built("gpt2", seed=seed) for seed in (1, 2, 3)]
    for itself in (gpt2.model, gpt2.model.state_dict()):
        space = trajectory(gpt2.model, [itself, *others])
        with untouched(gpt2.model):
            found = scan_quietly(gpt2.model, batched(gpt2.examples, 4), directions=space, points=3)
        assert found.markers[0].loss == found.markers[0].nearest_loss == found.centre_loss
        assert math.isclose(found.markers[3].loss, loss_of(gpt2)(others[2]), rel_tol=1e-12)
        assert found.markers[3].distance > 1
        assert found.connected


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_tied_parameter_moves_once(name: str):
    model, other = built(name), built(name, seed=1)
    state = other.state_dict()
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}
    assert tied & set(state)
    space = between(model, state)
    assert list(space.directions[0]) == [n for n, _ in model.named_parameters()]
    wanted = dict(other.named_parameters())
    for key, parameter in model.named_parameters():
        assert torch.equal(space.directions[0][key], (wanted[key] - parameter).detach())


def test_tied_parameter_under_its_other_name_only():
    model, other = built("bert"), built("bert", seed=1)
    state = other.state_dict()
    shared = state.pop("bert.embeddings.word_embeddings.weight")
    assert state["cls.predictions.decoder.weight"] is not None
    assert torch.equal(between(model, state).weights[0]()["bert.embeddings.word_embeddings.weight"], shared)


def test_model_that_is_not_tied_is_refused():
    model, other = built("bert"), built("bert", seed=1)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    state["cls.predictions.decoder.weight"] += 1
    with pytest.raises(ValueError, match=r"^other has two values for '.*' and '.*', which are one parameter"):
        between(model, state)


def only_backbone_moves(space: Subspace, model: nn.Module, other: nn.Module) -> None:
    ours, theirs = dict(model.bert.named_parameters()), dict(other.bert.named_parameters())
    assert set(space.weights[0]()) == {f"bert.{name}" for name in theirs if name in ours}
    for name, tensor in space.directions[0].items():
        inside = name.removeprefix("bert.")
        expected = theirs[inside] - ours[inside] if name.startswith("bert.") and inside in theirs else 0 * tensor
        assert torch.equal(tensor, expected.detach()), name


@pytest.mark.parametrize("as_state", [False, True])
def test_head_that_the_other_lacks_rests(as_state: bool, caplog: pytest.LogCaptureFixture):
    model, other = built("bert"), built("bert", seed=1)
    with caplog.at_level(logging.INFO, logger="fisherscope"):
        space = between(model, other.bert.state_dict() if as_state else other.bert)
    only_backbone_moves(space, model, other)
    assert [r.message for r in caplog.records] == [
        "5 parameters are not in other and rest, for example 'cls.predictions.bias'."
    ]


def test_head_of_another_kind_rests():
    model, other = built("bert-classifier"), built("bert", seed=1)
    only_backbone_moves(between(model, other), model, other)


def test_head_that_the_model_lacks_is_left_out():
    model, other = built("bert"), built("bert", seed=1)
    found = between(model.bert, other)
    wanted = between(model.bert, other.bert)
    assert same(found, wanted)
    assert same(between(model.bert, other.state_dict()), wanted)


def test_head_that_was_drawn_at_random_on_loading_rests(tmp_path: Path):
    model = built("bert-classifier").float()
    folder = checkpoint("bert", tmp_path / "folder", seed=1)
    only_backbone_moves(between(model, folder), model.double(), built("bert", seed=1).float().double())


def test_checkpoints_with_and_without_head():
    """Where one has no head, it is as if it had that of the model."""
    model, *others = [built("bert", seed=seed) for seed in range(4)]
    with_own_head = built("bert", seed=2)
    with_own_head.cls.load_state_dict(model.cls.state_dict())
    bare = others[1].bert.state_dict()
    with_own_head.bert.load_state_dict(bare)
    assert same(
        trajectory(model, [others[0], bare, others[2]]), trajectory(model, [others[0], with_own_head, others[2]]), 1e-12
    )


def test_other_shape_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"^wide must have the architecture of the model: '.*' has shape .* in the model\.$"
    ):
        between(built("bert"), built("bert", hidden_size=16), name="wide")


def test_other_shape_of_the_head_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'classifier.weight' has shape \(5, 32\) there but \(3, 32\) in the model"):
        between(built("bert-classifier"), built("bert-classifier", num_labels=5))


@pytest.mark.parametrize("layers", [1, 3])
def test_other_number_of_layers_is_refused(layers: int):
    other = built("bert", num_hidden_layers=layers)
    for given_as in (other, other.state_dict(), other.bert):
        with pytest.raises(ValueError, match=r"must have the architecture of the model: .*layer"):
            between(built("bert"), given_as)


def test_other_family_is_refused(bert: Case, gpt2: Case):
    with pytest.raises(ValueError, match="must have the architecture of the model"):
        between(bert.model, gpt2.model)


def test_mask_is_no_model(bert: Case):
    with pytest.raises(ValueError, match=r"holds torch\.bool values, which are no weights"):
        between(bert.model, random_fraction(bert.model, 0.5, seed=0))


def test_buffers_of_a_state_are_left_out():
    class Counted(Seven):
        def __init__(self, *numbers: float) -> None:
            super().__init__(*numbers)
            self.register_buffer("seen", torch.zeros(1))

    model, other = Counted(*range(7)), Counted(*range(1, 8))
    assert "seen" in other.state_dict()
    assert list(between(model, other.state_dict()).directions[0]) == ["a", "b"]


def test_file_that_is_cut_short_is_refused(tmp_path: Path):
    model, other = cloud(2)
    path = saved(other, tmp_path / "other.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(WrongFile, match=r"other\.safetensors is not a safetensors file or was cut short"):
        between(model, path)


@pytest.mark.parametrize("name", ["missing.safetensors", "missing"])
def test_file_that_is_missing_is_refused(name: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="missing"):
        between(built("bert"), tmp_path / name)


def test_weights_of_a_marker_are_all_those_of_the_other_model():
    model, other = cloud(2)
    assert np.array_equal(flat(between(model, other, mask=half()).weights[0]()), flat(other))


def test_mask_of_other_weights_is_refused_when_strict(bert: Case):
    others = [built("bert", seed=seed) for seed in (1, 2, 3)]
    mask = random_fraction(others[0], 0.5, seed=0)
    makers = [
        functools.partial(between, bert.model, others[0]),
        functools.partial(plane_through, bert.model, *others[:2]),
        functools.partial(trajectory, bert.model, others),
    ]
    for make in makers:
        make(mask=mask)
        with pytest.raises(MaskMismatch):
            make(mask=mask, strict=True)


def test_making_directions_leaves_the_models_alone(bert: Case):
    others = [built("bert", seed=seed) for seed in (1, 2)]
    with untouched(bert.model), untouched(others[0]):
        trajectory(bert.model, [*others, bert.model])
        plane_through(bert.model, *others)


def spread_of(*placed: tuple[float, ...]) -> Subspace:
    """A space with markers at some steps."""
    axes = len(placed[0])
    names = ("a", "b")[:axes]
    directions = tuple({name: torch.ones_like(p)} for name, p in Seven(*range(7)).named_parameters() if name in names)
    markers = tuple(Marker(str(number), at, 0.0) for number, at in enumerate(placed))
    return Subspace(directions, ("given",) * axes, markers)


@pytest.mark.parametrize(
    ("at", "points", "margin", "wanted"),
    [
        (1.0, 7, 0.2, (-0.24, 1.2)),  # cells of 0.24, one of them below 0
        (1.0, 3, 0.0, (0.0, 1.0)),
        (-2.0, 5, 0.0, (-2.0, 0.0)),
        (1.0, 3, 0.5, (-1.5, 1.5)),
        (0.0, 5, 0.2, (-1.0, 1.0)),
    ],
)
def test_range_around_one_marker(at: float, points: int, margin: float, wanted: tuple[float, float]):
    (found,) = span_of(spread_of((at,)), points, margin)
    np.testing.assert_allclose(found, wanted, rtol=1e-14)


coordinate = st.floats(-3, 3).filter(lambda x: x == 0 or abs(x) > 1e-6)


@given(
    placed=st.lists(coordinate, min_size=1, max_size=4),
    points=st.integers(3, 40),
    margin=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_every_range_has_the_model_on_its_grid_and_covers_the_markers(placed: list[float], points: int, margin: float):
    space = spread_of(*((at,) for at in placed))
    ((low, high),) = ranges = span_of(space, points, margin)
    found = scan_quietly(
        Seven(*range(7)), ZEROS, directions=space.directions, axes=1, points=points, span=ranges,
        objective=lambda model, batch: batch["zero"],
    )  # fmt: skip
    lowest, highest = min(*placed, 0.0), max(*placed, 0.0)
    room = margin * (highest - lowest)
    ends = (lowest - room, highest + room) if any(placed) else (-1.0, 1.0)
    assert 0.0 in found.axes[0].steps
    assert low <= ends[0] + 1e-12
    assert high >= ends[1] - 1e-12
    assert math.isclose(found.axes[0].steps[1] - found.axes[0].steps[0], smallest_cell(*ends, points), rel_tol=1e-9)


def test_ranges_have_one_length_before_the_model_is_put_on_their_grids():
    """Each around the middle of its own markers, as long as the longest one needs."""
    space = spread_of((1.0, 0.0), (0.0, -2.0))
    assert span_of(space, (5, 5), 0.0) == [(-0.5, 1.5), (-2.0, 0.0)]
    assert span_of(space, (3, 5), 0.0) == [(-1.5, 1.5), (-2.0, 0.0)]


def smallest_cell(low: float, high: float, count: int) -> float:
    """Of all grids of so many points with 0 on them that cover from low to high."""

    def size(reach: float, cells: int) -> float:
        return 0.0 if reach == 0 else reach / cells if cells else math.inf

    return min(max(size(-low, below), size(high, count - 1 - below)) for below in range(count))


@pytest.mark.parametrize("points", [2, (5, 5), (5, 2, 5)])
def test_points_of_a_range_are_checked(points: int | tuple[int, ...]):
    with pytest.raises(ValueError, match="points must be at least 3"):
        span_of(spread_of((1.0,)), points)


@pytest.mark.parametrize("margin", [-0.1, math.inf, math.nan])
def test_margin_is_checked(margin: float):
    with pytest.raises(ValueError, match="margin must be a number from 0"):
        span_of(spread_of((1.0,)), 5, margin)
