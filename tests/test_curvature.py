"""Products with Hessian and GGN against dense matrices and models without fused attention, and directions from them."""

import copy
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from conftest import Case, Interrupted, Stopping, batched, built, case, untouched
from torch import Tensor, nn
from torch.func import functional_call

from fisherscope.landscape import scan_landscape
from fisherscope.landscape.curvature import (
    Curvature,
    eigenpairs,
    extremes,
    low_rank,
    steepest,
    top_eigenvectors,
)
from fisherscope.masks import Mask, MaskMismatch, random_fraction

Vector = Mapping[str, Tensor]


class Bowl(nn.Module):
    """Some numbers in two parameters, of which nothing is computed."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        values = torch.tensor(values, dtype=torch.float64)
        self.a, self.b = nn.Parameter(values[:2].view(1, 2).clone()), nn.Parameter(values[2:].clone())


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.flatten() for p in model.parameters()])


class Quadratic:
    """The loss 1/2 t^T P t + c^T t, plus a number for every example."""

    def __init__(self, matrix: Tensor, slope: Tensor) -> None:
        self.matrix, self.slope = matrix, slope

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        t = flat(model)
        return t @ self.matrix @ t / 2 + self.slope @ t + batch["offset"]


OFFSETS = [{"offset": torch.tensor([1.0, 2.0]).double()}, {"offset": torch.tensor([6.0]).double()}]


def symmetric(size: int, seed: int = 0, values: Sequence[float] | None = None) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=draw, dtype=torch.float64)
    if values is None:
        return matrix + matrix.T
    turned = torch.linalg.qr(matrix)[0]
    return turned @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turned.T


def bowl(size: int = 6, values: Sequence[float] | None = None, seed: int = 0) -> tuple[Curvature, Quadratic]:
    draw = torch.Generator().manual_seed(seed + 1)
    model = Bowl(torch.randn(size, generator=draw).tolist())
    loss = Quadratic(symmetric(size, seed, values), torch.randn(size, generator=draw, dtype=torch.float64))
    return Curvature(model, OFFSETS, objective=loss), loss


class Net(nn.Module):
    """Two layers that say logits as Hugging Face heads do."""

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, outputs)).double()

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layers(x))


class Softmax(nn.Module):
    """Softmax regression, without a hidden layer."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, classes).double()

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(x))


def labelled(number: int = 9, inputs: int = 3, classes: int = 3) -> list[dict[str, Tensor]]:
    """Batches of unequal size."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(number, inputs, generator=draw, dtype=torch.float64)
    y = torch.randint(0, classes, (number,), generator=draw)
    return [{"x": x[:4], "labels": y[:4]}, {"x": x[4:], "labels": y[4:]}]


def valued(number: int = 9) -> list[dict[str, Tensor]]:
    return [b | {"labels": torch.randn(len(b["labels"]), dtype=torch.float64)} for b in labelled(number)]


def on_paper(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], objective: str):
    """The mean loss as a function of all parameters in one vector."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        total, count = torch.zeros((), dtype=torch.float64), 0
        for batch in batches:
            logits = functional_call(model, weights, (batch["x"],)).logits
            rows = torch.arange(len(logits))
            if objective == "regression":
                total = total + ((logits[:, 0] - batch["labels"]) ** 2).sum()
            else:
                total = total + (logits.exp().sum(1).log() - logits[rows, batch["labels"]]).sum()
            count += len(logits)
        return total / count

    return loss


def dense_hessian(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], objective: str) -> Tensor:
    return torch.autograd.functional.hessian(on_paper(model, batches, objective), flat(model).detach())


def dense(curvature: Curvature) -> np.ndarray:
    return np.stack([curvature.product(unit) for unit in np.eye(curvature.size)])


PROBLEMS = [("classification", labelled, 3), ("regression", valued, 1)]


@pytest.mark.parametrize(("objective", "data", "outputs"), PROBLEMS)
def test_hessian_is_that_of_autograd(objective: str, data, outputs: int):
    model, batches = Net(3, 4, outputs), data()
    found = dense(Curvature(model, batches, objective=objective))
    np.testing.assert_allclose(found, dense_hessian(model, batches, objective), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("objective", "data", "outputs"), PROBLEMS)
def test_ggn_is_jacobian_times_output_hessian_times_jacobian(objective: str, data, outputs: int):
    model, batches = Net(3, 4, outputs), data()
    wanted = 0
    for x in torch.cat([batch["x"] for batch in batches]):
        logits = model(x[None]).logits[0]
        j = torch.stack([torch.cat([*map(torch.flatten, grad_of(z, model))]) for z in logits])
        p = logits.softmax(0).detach()
        outer = 2 * torch.eye(1) if objective == "regression" else torch.diag(p) - p[:, None] * p
        wanted = wanted + j.T @ outer.to(j) @ j / 9
    found = dense(Curvature(model, batches, objective=objective, kind="ggn"))
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-14)


def grad_of(value: Tensor, model: nn.Module) -> Sequence[Tensor]:
    return torch.autograd.grad(value, list(model.parameters()), retain_graph=True)


def test_ggn_has_no_negative_eigenvalue_where_the_hessian_has():
    model, batches = Net(3, 4, 3), labelled()
    lowest = [np.linalg.eigvalsh(dense(Curvature(model, batches, objective="classification", kind=k))).min()
              for k in ("hessian", "ggn")]  # fmt: skip
    assert lowest[0] < -0.01
    assert lowest[1] > -1e-14


def test_hessian_and_ggn_of_softmax_regression_are_its_exact_fisher():
    model, batches = Softmax(3, 4), labelled(classes=4)
    wanted = 0
    for x in torch.cat([batch["x"] for batch in batches]):
        logits = model(x[None]).logits[0]
        for c, p in enumerate(logits.softmax(0).detach()):
            g = torch.cat([*map(torch.flatten, grad_of(-logits.log_softmax(0)[c], model))])
            wanted = wanted + p * g[:, None] * g / 9
    for kind in ("hessian", "ggn"):
        found = dense(Curvature(model, batches, objective="classification", kind=kind))
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-15)


def test_curvature_of_a_quadratic_is_its_matrix():
    curvature, loss = bowl()
    np.testing.assert_allclose(dense(curvature), loss.matrix, rtol=1e-14)


def test_gradient_of_a_quadratic():
    curvature, loss = bowl()
    wanted = loss.matrix @ flat(curvature.model).detach() + loss.slope
    np.testing.assert_allclose(curvature.pack(curvature.gradient()), wanted, rtol=1e-14)


def test_loss_of_a_quadratic_has_the_mean_of_the_offsets():
    curvature, loss = bowl()
    t = flat(curvature.model).detach()
    assert curvature.loss() == pytest.approx(float(t @ loss.matrix @ t / 2 + loss.slope @ t) + 3, rel=1e-14)


def test_a_straight_loss_has_no_extremes():
    curvature, _ = bowl(40, values=[0.0] * 40)
    assert extremes(curvature) == (0.0, 0.0)


def test_weights_of_a_straight_loss_have_no_curvature():
    model = Bowl([1.0, 2.0, 3.0])
    curvature = Curvature(model, OFFSETS, objective=lambda model, batch: flat(model).sum() + batch["offset"])
    assert not dense(curvature).any()


def test_parameters_that_the_loss_does_not_see_have_no_curvature():
    model = Bowl([1.0, 2.0, 3.0])
    curvature = Curvature(model, OFFSETS, objective=lambda model, batch: (model.a**2).sum() + batch["offset"])
    np.testing.assert_array_equal(dense(curvature), np.diag([2.0, 2.0, 0.0]))


def half(size_a: Sequence[bool], size_b: Sequence[bool]) -> Mask:
    return Mask({"a": torch.tensor([list(size_a)]), "b": torch.tensor(list(size_b))})


MASK = half([True, False], [False, True, True, False])
CHOSEN = [0, 3, 4]


def test_mask_takes_rows_and_columns():
    curvature, loss = bowl()
    masked = Curvature(curvature.model, OFFSETS, objective=loss, mask=MASK)
    assert masked.size == 3
    np.testing.assert_allclose(dense(masked), loss.matrix[CHOSEN][:, CHOSEN], rtol=1e-14)


def test_mask_restricts_what_goes_in_and_what_comes_out():
    curvature, loss = bowl()
    masked = Curvature(curvature.model, OFFSETS, objective=loss, mask=MASK)
    everything = {"a": torch.ones(1, 2).double(), "b": torch.ones(4).double()}
    p = torch.diag(torch.tensor([1.0, 0, 0, 1, 1, 0]).double())
    wanted = p @ loss.matrix @ p @ torch.ones(6).double()
    found = masked.times(everything)
    np.testing.assert_allclose(torch.cat([found["a"][0], found["b"]]), wanted, atol=1e-14)
    assert not found["a"][~MASK["a"]].any()


def test_vector_and_direction_are_the_same():
    curvature, loss = bowl()
    masked = Curvature(curvature.model, OFFSETS, objective=loss, mask=MASK)
    for found in (curvature, masked):
        vector = np.arange(1.0, found.size + 1)
        np.testing.assert_array_equal(found.pack(found.unpack(vector)), vector)
    assert masked.unpack(np.array([1.0, 2.0, 3.0]))["b"].tolist() == [0, 2, 3, 0]


def test_directions_may_leave_parameters_out():
    curvature, loss = bowl()
    found = curvature.times({"a": torch.tensor([[1.0, 0.0]]).double()})
    np.testing.assert_allclose(curvature.pack(found), loss.matrix[0], rtol=1e-14)


def test_operator_is_a_matrix_of_scipy():
    curvature, loss = bowl()
    v = np.arange(6.0)
    wanted = loss.matrix.numpy() @ v
    np.testing.assert_allclose(curvature.operator @ v, wanted, rtol=1e-13)
    np.testing.assert_allclose(curvature.operator.rmatvec(v), wanted, rtol=1e-13)


def direction_for(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=draw).to(p) for n, p in model.named_parameters()}


def eager(made: Case) -> nn.Module:
    model = copy.deepcopy(made.model)
    model.set_attn_implementation("eager")
    return model


# models whose norms compute in float32 whatever their dtype is
ROUNDED = {"t5": 1e-3, "llama": 1e-3}


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama", "albert", "bert-classifier", "bert-regressor"])
def test_hessian_product_of_transformers(name: str):
    """Against the losses of single examples, with attention that has second derivatives."""
    made = case(name, lengths=(5, 3, 4))
    assert made.model.config._attn_implementation == "sdpa"
    direction, model = direction_for(made.model), eager(made)
    with torch.enable_grad():
        losses = [reference.example_loss(model, e, made.objective, "sum") for e in made.examples]
        loss = sum(losses) / sum(reference.number_scored(e, made.objective) for e in made.examples)
        parameters = dict(model.named_parameters())
        slopes = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, materialize_grads=True)
        along = sum((g * direction[n]).sum() for n, g in zip(parameters, slopes, strict=True))
        wanted = torch.autograd.grad(along, list(parameters.values()), materialize_grads=True)
    with untouched(made.model):
        found = Curvature(made.model, batched(made.examples, 2)).times(direction)
    scale = max(float(t.abs().max()) for t in wanted)
    for (n, t), tensor in zip(found.items(), wanted, strict=True):
        torch.testing.assert_close(t, tensor, rtol=0, atol=ROUNDED.get(name, 1e-10) * scale, msg=n)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of forward derivatives, in torch
@pytest.mark.parametrize("name", ["bert", "gpt2", "bert-classifier", "bert-regressor"])
def test_ggn_product_of_transformers(name: str):
    """Forward derivatives of the full logits of single examples, the formula, and backward again."""
    made = case(name, lengths=(5, 3))
    direction, model = direction_for(made.model), eager(made)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    wanted, count = {n: torch.zeros_like(p) for n, p in weights.items()}, 0
    for example in made.examples:
        inputs = {n: t[None] for n, t in example.items() if n != "labels"}
        labels = example["labels"][None] if example["labels"].ndim == 0 else example["labels"]
        if made.objective == "causal-lm":
            labels = torch.cat([labels[1:], torch.tensor([-100])])
        scored = torch.ones_like(labels, dtype=torch.bool) if made.objective == "regression" else labels != -100

        def outputs(values: Vector, inputs: Vector = inputs, scored: Tensor = scored) -> Tensor:
            return functional_call(model, values, kwargs=dict(inputs)).logits.reshape(len(scored), -1)[scored]

        z, jv = torch.func.jvp(outputs, (weights,), (direction,))
        p = z.softmax(-1)
        bent = 2 * jv if made.objective == "regression" else p * jv - p * (p * jv).sum(-1, keepdim=True)
        pulled = torch.func.vjp(outputs, weights)[1](bent)[0]
        wanted = {n: total + pulled[n] for n, total in wanted.items()}
        count += int(scored.sum())
    found = Curvature(made.model, batched(made.examples, 2), kind="ggn").times(direction)
    for n, total in wanted.items():
        torch.testing.assert_close(found[n], total / count, rtol=1e-8, atol=1e-12, msg=n)


def test_model_in_bfloat16_has_products_near_those_in_float32():
    made = case("bert", lengths=(5, 3, 4))
    model = made.model.float()
    direction = direction_for(model)
    exact = Curvature(model, batched(made.examples, 2))
    wanted = exact.pack(exact.times(direction))
    rough = Curvature(copy.deepcopy(model).bfloat16(), batched(made.examples, 2))
    found = rough.pack(rough.times(direction))
    assert found.dtype == np.float64
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_model_is_left_bit_identical(name: str, kind: str):
    made = case(name, lengths=(5, 3))
    made.model.train()
    first, *_, last = made.model.parameters()
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)
    curvature = Curvature(made.model, batched(made.examples, 1), kind=kind)
    with untouched(made.model), torch.no_grad():
        curvature.loss(), curvature.gradient(), curvature.times(direction_for(made.model))


def test_model_is_left_bit_identical_when_the_loss_raises():
    made = case("bert", lengths=(5, 3))
    calls = []

    def failing(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted
        return model(input_ids=batch["input_ids"]).logits.square().mean((1, 2))

    curvature = Curvature(made.model, batched(made.examples, 1), objective=failing)
    with untouched(made.model), pytest.raises(Interrupted):
        curvature.times(direction_for(made.model))


def test_frozen_parameters_count_as_the_others():
    model, batches = Net(3, 4, 3), labelled()
    wanted = dense(Curvature(model, batches, objective="classification"))
    model.requires_grad_(False)
    np.testing.assert_array_equal(dense(Curvature(model, batches, objective="classification")), wanted)


def test_ggn_of_a_loss_function_is_refused():
    model = Bowl([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="take kind='hessian'"):
        Curvature(model, OFFSETS, objective=Quadratic(torch.eye(3), torch.zeros(3)), kind="ggn")


def test_unknown_kind_is_refused(unchecked: None):
    with pytest.raises(ValueError, match="kind must be 'hessian' or 'ggn'"):
        Curvature(Net(3, 4, 3), labelled(), objective="classification", kind="fisher")


def test_empty_mask_is_refused():
    with pytest.raises(ValueError, match="the mask selects none"):
        Curvature(Bowl([1.0] * 6), OFFSETS, objective=bowl()[1], mask=MASK & ~MASK)


def test_mask_of_another_model_is_refused(bert: Case, gpt2: Case):
    with pytest.raises(MaskMismatch):
        Curvature(bert.model, batched(bert.examples, 3), mask=random_fraction(gpt2.model, 0.5, seed=0))


def test_data_without_a_scored_token_are_refused(bert: Case):
    silent = [{**e, "labels": torch.full_like(e["labels"], -100)} for e in bert.examples]
    curvature = Curvature(bert.model, batched(silent, 3))
    for method in (curvature.loss, curvature.gradient):
        with pytest.raises(ValueError, match="None of the examples has a scored token"):
            method()


@pytest.mark.parametrize("mask", [None, 0.8])
def test_eigenpairs_are_those_of_the_dense_hessian(mask: float | None):
    model, batches = Net(3, 6, 3), labelled()
    chosen = None if mask is None else random_fraction(model, mask, seed=0)
    curvature = Curvature(model, batches, objective="classification", mask=chosen)
    keep = np.ones(curvature.size, bool) if chosen is None else np.concatenate([t.flatten() for t in chosen.values()])
    assert curvature.size > 20  # the iteration, not the dense way
    h = dense_hessian(model, batches, "classification").numpy()[keep][:, keep]
    values, vectors = eigenpairs(curvature, 3, tolerance=1e-10)
    wanted, columns = np.linalg.eigh(h)
    np.testing.assert_allclose(values, wanted[::-1][:3], rtol=1e-9)
    for number, vector in enumerate(map(curvature.pack, vectors)):
        assert np.linalg.norm(vector) == pytest.approx(1, rel=1e-12)
        assert abs(vector @ columns[:, -1 - number]) == pytest.approx(1, rel=1e-9)


SPECTRUM = [-9.0, *np.linspace(-1, 1, 26), 4.0, 7.0, 3.0]


@pytest.mark.parametrize("values", [SPECTRUM, [-9.0, 1.0, 4.0, 2.0, 7.0]])
def test_largest_eigenvalues_are_the_highest_not_the_farthest_from_0(values: list[float]):
    curvature, _ = bowl(len(values), values)
    assert eigenpairs(curvature, 2, tolerance=1e-10)[0] == pytest.approx([7, 4], rel=1e-8)


@pytest.mark.parametrize("values", [SPECTRUM, [-9.0, 1.0, 4.0, 2.0, 7.0]])
def test_sign_of_eigenvectors_is_that_of_the_largest_entry(values: list[float]):
    curvature, _ = bowl(len(values), values)
    for seed in range(3):
        for vector in map(curvature.pack, eigenpairs(curvature, 2, seed=seed)[1]):
            assert vector[np.abs(vector).argmax()] > 0


def test_eigenvectors_of_two_seeds_agree():
    curvature, _ = bowl(len(SPECTRUM), SPECTRUM)
    a, b = (curvature.pack(eigenpairs(curvature, 1, seed=seed, tolerance=1e-10)[1][0]) for seed in (0, 1))
    np.testing.assert_allclose(a, b, atol=1e-7)
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("count", [0, 7])
def test_number_of_eigenvalues_is_checked(count: int):
    with pytest.raises(ValueError, match=rf"from 1 to 6, the entries that move; got {count}"):
        eigenpairs(bowl()[0], count)


def test_eigenvalues_that_are_not_found_are_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fisherscope.landscape.curvature.RESTARTS", 1)
    curvature, _ = bowl(60, np.linspace(1, 1.001, 60).tolist())
    with pytest.raises(RuntimeError, match="take a larger tolerance"):
        eigenpairs(curvature, 2, tolerance=1e-12)


ENDS = [
    SPECTRUM,
    [-s for s in SPECTRUM],
    [1e-9 * k for k in range(28)] + [3.0, 5.0],
    [2.0 + k / 10 for k in range(30)],
    [-2.0 - k / 10 for k in range(30)],
    [-1.0, 3.0, 0.5],
    [0.0] * 5,
]


@pytest.mark.parametrize("values", ENDS)
def test_extremes_are_the_lowest_and_the_highest(values: list[float]):
    curvature, _ = bowl(len(values), values)
    low, high = extremes(curvature, tolerance=1e-3)
    largest = max(map(abs, values))
    assert low == pytest.approx(min(values), abs=3e-3 * largest)
    assert high == pytest.approx(max(values), abs=3e-3 * largest)


def test_extremes_of_a_loss_that_is_not_finite_are_nan():
    model = Bowl([0.0] * 30)
    curvature = Curvature(model, OFFSETS, objective=lambda model, batch: (flat(model) ** 1.5).sum() + batch["offset"])
    assert all(map(math.isnan, extremes(curvature)))


def test_top_eigenvectors_are_as_long_as_the_weights_that_move():
    model, batches = Net(3, 6, 3), labelled()
    mask = random_fraction(model, 0.6, seed=0)
    space = top_eigenvectors(model, batches, objective="classification", mask=mask)
    weights = torch.cat([p.detach()[mask[n]] for n, p in model.named_parameters()])
    for direction in space.directions:
        vector = torch.cat([direction[n][mask[n]] for n in direction])
        assert float(vector.norm()) == pytest.approx(float(weights.norm()), rel=1e-10)
        assert not any(direction[n][~mask[n]].any() for n in direction)


def test_top_eigenvectors_say_what_they_are():
    curvature, loss = bowl(5, [-9.0, 1.0, 4.0, 2.0, 7.5])
    space = top_eigenvectors(curvature.model, OFFSETS, 3, objective=loss)
    assert space.kinds == (
        "1st Hessian eigenvector, λ = 7.5", "2nd Hessian eigenvector, λ = 4", "3rd Hessian eigenvector, λ = 2",
    )  # fmt: skip
    made = top_eigenvectors(Net(3, 4, 3), labelled(), 1, objective="classification", kind="ggn")
    assert made.kinds[0].startswith("1st GGN eigenvector, λ = ")


def test_top_eigenvectors_have_the_dtype_of_the_weights():
    model = built("bert").float()
    made = case("bert", lengths=(5, 3))
    space = top_eigenvectors(model, batched(made.examples, 2), 1, tolerance=0.1, mask=first_of(model))
    assert {t.dtype for t in space.directions[0].values()} == {torch.float32}


def first_of(model: nn.Module) -> Mask:
    """One small parameter of a model, whole."""
    small = min((n for n, p in model.named_parameters() if "LayerNorm" in n), key=str)
    return Mask({n: torch.full(p.shape, n == small) for n, p in model.named_parameters()})


def test_weights_of_0_have_unit_eigenvectors():
    space = top_eigenvectors(Bowl([0.0] * 4), OFFSETS, 1, objective=bowl(4)[1])
    vector = torch.cat([t.flatten() for t in space.directions[0].values()])
    assert float(vector.norm()) == pytest.approx(1, rel=1e-12)


def test_a_curvature_of_0_has_no_eigenvectors():
    loss = Quadratic(torch.zeros(4, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="a curvature that is not 0 everywhere"):
        top_eigenvectors(Bowl([1.0] * 4), OFFSETS, 1, objective=loss)


def test_landscape_along_eigenvectors_of_a_quadratic():
    curvature, loss = bowl(5, [-9.0, 1.0, 4.0, 2.0, 7.5])
    loss.slope.zero_()
    with torch.no_grad():
        for parameter in curvature.model.parameters():
            parameter.mul_(1e-9)  # the minimum of the eigenvectors' plane, but for rounding
    space = top_eigenvectors(curvature.model, OFFSETS, objective=loss)
    found = scan_landscape(curvature.model, OFFSETS, objective=loss, directions=space, points=5, progress=False)
    s = found.axes[0].steps
    wanted = (7.5 * s[:, None] ** 2 + 4.0 * s**2) / 2 * found.axes[0].norm ** 2
    np.testing.assert_allclose(found.loss - found.centre_loss, wanted, atol=1e-14)
    assert found.axes[1].kind == "2nd Hessian eigenvector, λ = 4"


@pytest.mark.parametrize("mask", [None, MASK])
def test_steepest_is_the_unit_gradient(mask: Mask | None):
    curvature, loss = bowl()
    keep = torch.ones(6) if mask is None else torch.tensor([1.0, 0, 0, 1, 1, 0])
    g = (loss.matrix @ flat(curvature.model).detach() + loss.slope) * keep
    (direction,) = steepest(curvature.model, OFFSETS, objective=loss, mask=mask).directions
    np.testing.assert_allclose(torch.cat([direction["a"][0], direction["b"]]), g / g.norm(), rtol=1e-13)


@pytest.mark.parametrize("mask", [None, MASK])
def test_adaptive_steepest_is_scaled_by_the_weights(mask: Mask | None):
    curvature, loss = bowl()
    keep = torch.ones(6) if mask is None else torch.tensor([1.0, 0, 0, 1, 1, 0])
    w = flat(curvature.model).detach()
    g = (loss.matrix @ w + loss.slope) * keep
    (direction,) = steepest(curvature.model, OFFSETS, objective=loss, mask=mask, adaptive=True).directions
    wanted = w**2 * g / (w.abs() * g).norm()
    np.testing.assert_allclose(torch.cat([direction["a"][0], direction["b"]]), wanted, rtol=1e-13)


def test_steepest_says_what_it_is():
    curvature, loss = bowl()
    kinds = [steepest(curvature.model, OFFSETS, objective=loss, adaptive=a).kinds for a in (False, True)]
    assert kinds == [("steepest ascent, steps are its radius",), ("steepest ascent, adaptive, steps are its radius",)]


def test_loss_without_gradient_has_no_steepest_direction():
    model = Bowl([0.0] * 4)
    loss = Quadratic(symmetric(4), torch.zeros(4, dtype=torch.float64))
    for adaptive in (False, True):
        with pytest.raises(ValueError, match="needs a gradient, but its norm is 0"):
            steepest(model, OFFSETS, objective=loss, adaptive=adaptive)


def rows(name: str, tensor: Tensor) -> Tensor:
    """Output units and embedded tokens; Conv1D stores its units as columns."""
    return tensor.T if name.startswith("transformer.h.") and ".c_" in name else tensor


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_directions_have_that_rank(name: str, rank: int):
    model = built(name)
    for direction in low_rank(model, 2, rank=rank).directions:
        for n, p in model.named_parameters():
            if p.ndim > 1:
                wanted = min(rank, *p.shape)
                assert int(torch.linalg.matrix_rank(direction[n], rtol=1e-5)) == wanted, n


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_rows_of_low_rank_directions_are_as_long_as_the_weights(name: str):
    model = built(name)
    (direction,) = low_rank(model, 1, rank=2).directions
    for n, p in model.named_parameters():
        if p.ndim > 1:
            torch.testing.assert_close(rows(n, direction[n]).norm(dim=1), rows(n, p.detach()).norm(dim=1))
        else:
            assert not direction[n].any()


def test_low_rank_directions_follow_from_seed_and_number():
    model = built("bert")
    first, second = low_rank(model, 2, rank=2, seed=1).directions
    (again,) = low_rank(model, 1, rank=2, seed=1).directions
    (other,) = low_rank(model, 1, rank=2, seed=2).directions
    for n, p in model.named_parameters():
        if p.ndim > 1:
            assert torch.equal(first[n], again[n])
            assert not torch.equal(first[n], second[n])
            assert not torch.equal(first[n], other[n])


def test_low_rank_of_a_kernel_counts_all_axes_but_the_rows_as_one():
    model = nn.Conv2d(4, 5, 3).double()
    (direction,) = low_rank(model, 1, rank=2).directions
    assert int(torch.linalg.matrix_rank(direction["weight"].flatten(1), rtol=1e-5)) == 2
    torch.testing.assert_close(direction["weight"].flatten(1).norm(dim=1), model.weight.flatten(1).norm(dim=1))


def test_rank_of_full_size_is_any_direction():
    model = nn.Linear(4, 3).double()
    (direction,) = low_rank(model, 1, rank=9).directions
    assert int(torch.linalg.matrix_rank(direction["weight"])) == 3


def test_low_rank_directions_can_be_scanned(bert: Case):
    space = low_rank(bert.model, 1, rank=2)
    found = scan_landscape(
        bert.model, batched(bert.examples, 3), directions=space, axes=1, points=3, span=0.1, progress=False
    )
    assert found.axes[0].kind == "random of rank 2, filter-normalised"
    assert np.ptp(found.loss) > 0


def test_rank_below_1_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        low_rank(nn.Linear(2, 2), 1, rank=0)


def test_batches_are_read_once():
    reader = Stopping(labelled())
    curvature = Curvature(Net(3, 4, 3), iter(reader), objective="classification")
    assert curvature.loss() == curvature.loss()
