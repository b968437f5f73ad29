"""What regularizers are made of: every part does one thing, is undone exactly, and composes."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from architectures import checkpointed, entry
from conftest import Case, Interrupted, batched, case, untouched
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fisherscope.cli.finetune import _documented as described
from fisherscope.finetune import parts
from fisherscope.finetune.contract import _facts, _same
from fisherscope.finetune.regularizer import METHODS, Applied, Composed, Regularizer
from fisherscope.models import dropout_sites
from fisherscope.objectives import predict


def loss_of(made: Case, size: int = 4) -> Tensor:
    """Of the first batch, per example."""
    losses = predict(made.model, batched(made.examples, size)[0], made.objective).losses()
    return losses.total.sum() / losses.count.sum()


def gradients(made: Case) -> dict[str, Tensor]:
    made.model.zero_grad()
    loss_of(made).backward()
    return {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@contextmanager
def undone(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Fails unless the block, which must raise, leaves every flag, hook and attribute as it was."""
    before = _facts(model, optimizer)
    with pytest.raises(Interrupted):
        yield
    after = _facts(model, optimizer)
    assert [name for name in before | after if not _same(before.get(name), after.get(name))] == []


@pytest.fixture
def linear() -> tuple[nn.Linear, Tensor]:
    """Six weights, and inputs for them."""
    return nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)


def checkers(parameter: Tensor) -> Tensor:
    """Every second entry."""
    return (torch.arange(parameter.numel()) % 2 == 0).view(parameter.shape)


def train(layer: nn.Module, optimizer: Any, x: Tensor, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()


# The optimizer


def test_the_innermost_optimizer_is_found_in_wrappers_of_accelerate(linear: tuple[nn.Linear, Tensor]):
    """Hooks on accelerate's wrapper are never called; those on the optimizer inside are."""
    from accelerate import Accelerator

    layer, x = linear
    plain = SGD(layer.parameters(), lr=0.1)
    wrapped = Accelerator(cpu=True).prepare(plain)
    assert wrapped is not plain
    assert parts.innermost(wrapped) is plain
    assert parts.innermost(plain) is plain
    calls: list[str] = []
    with parts.before_steps(wrapped, lambda: calls.append("before")):
        train(layer, wrapped, x)
    assert calls == ["before"]


def test_steps_are_announced_before_and_after(linear: tuple[nn.Linear, Tensor]):
    """Before a step the gradients are there and the values old; after it the values are new. Later ones are not."""
    layer, x = linear
    optimizer = SGD(layer.parameters(), lr=0.1)
    seen: list[Tensor] = []

    def note() -> None:
        seen.append(layer.weight.detach().clone())

    first = layer.weight.detach().clone()
    with parts.before_steps(optimizer, note), parts.after_steps(optimizer, note):
        train(layer, optimizer, x)
    train(layer, optimizer, x)
    assert len(seen) == 2
    assert torch.equal(seen[0], first)
    assert layer.weight.grad is not None
    assert not torch.equal(seen[1], first)


@pytest.mark.parametrize("announced", [parts.before_steps, parts.after_steps])
def test_announcements_end_after_an_exception(announced: Any, linear: tuple[nn.Linear, Tensor]):
    layer, x = linear
    optimizer = SGD(layer.parameters(), lr=0.1)
    calls: list[int] = []
    with undone(layer, optimizer), announced(optimizer, lambda: calls.append(1)):
        raise Interrupted
    train(layer, optimizer, x)
    assert calls == []


# Parameters that stay


def test_frozen_parameters_have_no_gradient_and_no_state(linear: tuple[nn.Linear, Tensor]):
    layer, x = linear
    optimizer = AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    before = values(layer)
    with parts.frozen([layer.weight]):
        assert not layer.weight.requires_grad
        train(layer, optimizer, x, 3)
        assert layer.weight.grad is None
        assert layer.weight not in optimizer.state
    assert torch.equal(layer.weight, before["weight"])
    assert not torch.equal(layer.bias, before["bias"])
    assert layer.weight.requires_grad


def test_frozen_parameters_get_their_flags_and_gradients_back_after_an_exception(linear: tuple[nn.Linear, Tensor]):
    """A parameter that was frozen before stays so, and a gradient from before is the same object again."""
    layer, x = linear
    layer(x).sum().backward()
    layer.bias.requires_grad_(False)
    with undone(layer, SGD(layer.parameters())), untouched(layer), parts.frozen([layer.weight, layer.bias]):
        raise Interrupted


def test_gradients_of_entries_that_are_not_selected_are_0_even_where_infinite(linear: tuple[nn.Linear, Tensor]):
    layer, _ = linear
    mask = checkers(layer.weight)
    with parts.gradients_masked({layer.weight: mask}):
        (layer.weight.sum() * torch.inf).backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.where(mask, torch.inf, 0.0).double())


def test_gradients_are_masked_while_micro_batches_are_added_up(linear: tuple[nn.Linear, Tensor]):
    layer, x = linear
    mask = checkers(layer.weight)
    layer(x).square().sum().backward()
    whole = layer.weight.grad.clone()
    layer.zero_grad()
    with parts.gradients_masked({layer.weight: mask}):
        for row in x:
            layer(row).square().sum().backward()
            assert not layer.weight.grad[~mask].any()
    torch.testing.assert_close(layer.weight.grad, whole * mask)


def test_masks_of_gradients_can_be_changed_and_taken_out_inside_the_block(linear: tuple[nn.Linear, Tensor]):
    layer, _ = linear
    mask = checkers(layer.weight)
    masks = {layer.weight: mask}

    def gradient() -> Tensor:
        layer.zero_grad()
        layer.weight.sum().backward()
        return layer.weight.grad.bool()

    with parts.gradients_masked(masks):
        assert torch.equal(gradient(), mask)
        masks[layer.weight] = ~mask
        assert torch.equal(gradient(), ~mask)
        del masks[layer.weight]
        assert gradient().all()


def test_gradients_are_whole_again_after_an_exception(linear: tuple[nn.Linear, Tensor]):
    layer, x = linear
    with undone(layer, SGD(layer.parameters())), parts.gradients_masked({layer.weight: checkers(layer.weight)}):
        raise Interrupted
    layer(x).sum().backward()
    assert layer.weight.grad.all()


def test_a_frozen_parameter_can_have_a_mask(linear: tuple[nn.Linear, Tensor]):
    """torch refuses a hook on it."""
    layer, x = linear
    layer.weight.requires_grad_(False)
    with parts.gradients_masked({layer.weight: checkers(layer.weight)}):
        layer(x).sum().backward()
    assert layer.weight.grad is None


@pytest.mark.parametrize("fused", [False, True])
def test_kept_entries_are_exact_under_decay_and_momentum_from_before(fused: bool, linear: tuple[nn.Linear, Tensor]):
    """With masked gradients alone, decoupled decay and old momentum move the entries that are not selected."""
    layer, x = linear
    optimizer = AdamW(layer.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
    train(layer, optimizer, x, 3)
    mask, before = checkers(layer.weight), layer.weight.detach().clone()
    masks = {layer.weight: mask}
    with parts.gradients_masked(masks), parts.entries_kept(optimizer, masks):
        train(layer, optimizer, x, 8)
    assert torch.equal(layer.weight[~mask], before[~mask])
    assert bool((layer.weight != before)[mask].all())
    with parts.gradients_masked(masks):
        train(layer, optimizer, x)
    assert bool((layer.weight != before)[~mask].all()), "the test could not have failed"


def test_kept_entries_may_move_after_an_exception(linear: tuple[nn.Linear, Tensor]):
    layer, x = linear
    optimizer = SGD(layer.parameters(), lr=0.1)
    mask, before = checkers(layer.weight), layer.weight.detach().clone()
    with undone(layer, optimizer), untouched(layer), parts.entries_kept(optimizer, {layer.weight: mask}):
        raise Interrupted
    train(layer, optimizer, x)
    assert bool((layer.weight != before).all())


# Functions of parameters


@dataclass(frozen=True)
class Place:
    """A parameter that a kind of module reads in a way of its own."""

    architecture: str
    parameter: str


PLACES = {
    "Linear": Place("BERT", "bert.encoder.layer.0.attention.self.query.weight"),
    "bias of a norm": Place("BERT", "bert.encoder.layer.1.output.LayerNorm.bias"),
    "Embedding": Place("BERT", "bert.embeddings.word_embeddings.weight"),
    "Conv1D": Place("GPT-2", "transformer.h.1.attn.c_attn.weight"),
    "raw parameter": Place("XLNet", "transformer.layer.0.rel_attn.q"),
    "T5's norm": Place("T5", "transformer.encoder.block.0.layer.0.layer_norm.weight"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_module_computes_with_a_function_of_its_parameter(kind: str):
    """The same loss and gradients as after writing 2 θ² into the parameter, by the chain rule; names stay."""
    place = PLACES[kind]
    made = entry(place.architecture, "classification")
    parameter = made.model.get_parameter(place.parameter)
    names, before = list(made.model.state_dict()), parameter.detach().clone()
    with parts.reparametrized(made.model, {place.parameter: lambda p: 2 * p.square()}):
        loss, found = loss_of(made), gradients(made)
        assert list(made.model.state_dict()) == names
        assert made.model.get_parameter(place.parameter) is parameter
    with torch.no_grad():
        parameter.copy_(2 * before.square())
    torch.testing.assert_close(loss, loss_of(made), rtol=1e-12, atol=0)
    expected = gradients(made)
    expected[place.parameter] = expected[place.parameter] * 4 * before
    assert expected[place.parameter].any()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_the_parameter_itself_changes_nothing_bit_for_bit(bert: Case):
    expected = gradients(bert)
    function = {n: lambda p: p for n, p in bert.model.named_parameters() if ".layer." in n}
    with parts.reparametrized(bert.model, function):
        assert_equal(gradients(bert), expected)


@pytest.mark.parametrize("kind", PLACES)
def test_modules_compute_with_their_parameters_again_after_an_exception(kind: str):
    place = PLACES[kind]
    made = entry(place.architecture, "classification")
    expected = loss_of(made)
    doubled = parts.reparametrized(made.model, {place.parameter: lambda p: 2 * p})
    with undone(made.model, SGD(made.model.parameters())), untouched(made.model), doubled:
        assert loss_of(made) != expected
        raise Interrupted
    assert torch.equal(loss_of(made), expected)


def test_an_exception_inside_a_forward_pass_leaves_nothing_behind(linear: tuple[nn.Linear, Tensor]):
    layer, x = linear
    with parts.reparametrized(nn.Sequential(layer), {"0.weight": lambda p: 2 * p}):
        with pytest.raises(RuntimeError):
            layer(x[:, :2])
        assert "weight" not in vars(layer)
    assert "forward" not in vars(layer)


def test_a_forward_of_its_own_is_kept(linear: tuple[nn.Linear, Tensor]):
    """As accelerate gives to models that it has prepared."""
    layer, x = linear
    inner = layer.forward
    layer.forward = own = lambda value: inner(value) + 1
    with parts.reparametrized(nn.Sequential(layer), {"0.weight": lambda p: 2 * p}):
        torch.testing.assert_close(layer(x), x @ (2 * layer.weight).T + layer.bias + 1)
    assert vars(layer)["forward"] is own


def test_two_parameters_of_a_module_can_be_changed_in_blocks_of_their_own(linear: tuple[nn.Linear, Tensor]):
    layer, x = linear
    model = nn.Sequential(layer)
    weight, bias = layer.weight, layer.bias
    with parts.reparametrized(model, {"0.weight": lambda p: 2 * p}):
        with parts.reparametrized(model, {"0.bias": lambda p: p + 3}):
            torch.testing.assert_close(model(x), x @ (2 * weight).T + bias + 3)
        torch.testing.assert_close(model(x), x @ (2 * weight).T + bias)
    assert torch.equal(model(x), torch.nn.functional.linear(x, weight, bias))


def test_a_parameter_that_is_changed_twice_is_refused(linear: tuple[nn.Linear, Tensor]):
    """And what was applied before the refusal is taken off."""
    layer, _ = linear
    model, double = nn.Sequential(layer, nn.Linear(2, 2)), {"0.weight": lambda p: 2 * p}
    with parts.reparametrized(model, double):
        outer = vars(layer)["forward"]
        both = parts.reparametrized(model, {"1.weight": lambda p: p, **double})
        message = r"^Two methods compute with a changed 'weight' of the same Linear; take one of them\.$"
        with pytest.raises(ValueError, match=message), both:
            pass
        assert vars(layer)["forward"] is outer
        assert "forward" not in vars(model[1])


def test_a_tied_parameter_is_refused(bert: Case):
    """The other module would go on with the parameter as it is."""
    name = "bert.embeddings.word_embeddings.weight"
    doubled = parts.reparametrized(bert.model, {name: lambda p: 2 * p})
    with untouched(bert.model), pytest.raises(ValueError, match=rf"^'{name}' is tied: several modules use it"), doubled:
        pass


def test_gradients_are_the_same_when_layers_are_computed_again(bert: Case):
    """Gradient checkpointing that is not reentrant; the function is called again in the backward pass."""
    name = "bert.encoder.layer.0.output.dense.weight"
    calls: list[int] = []

    def double(parameter: nn.Parameter) -> Tensor:
        calls.append(1)
        return 2 * parameter

    with parts.reparametrized(bert.model, {name: double}):
        expected = gradients(bert)
        assert len(calls) == 1
        checkpointed(bert.model, reentrant=False)
        assert_equal(gradients(bert), expected)
    assert len(calls) == 3


# Dropout


@pytest.mark.parametrize("architecture", ["BERT", "T5"])
def test_rates_of_dropout_are_set_and_restored_after_an_exception(architecture: str):
    """Those of modules, and the numbers that T5's attention hands to functions."""
    made = entry(architecture, "classification")
    sites = dropout_sites(made.model)
    wanted = [0.2 + 0.01 * number for number in range(len(sites))]
    rates = parts.rates_set(sites, wanted)
    with undone(made.model, SGD(made.model.parameters())), untouched(made.model), rates:
        assert [site.rate for site in dropout_sites(made.model)] == wanted
        raise Interrupted


# Regularizers of regularizers


class Counted(Applied):
    """Counts steps, from a number of its own."""

    def __init__(self, start: int) -> None:
        self.count = torch.tensor(start)

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert state.keys() == {"count"}
        self.count = state["count"]


@dataclass(frozen=True)
class Noting(Regularizer):
    """Notes when it is applied and taken off, and adds its number to every example's loss."""

    number: int
    notes: list[str] = dataclasses.field(default_factory=list)

    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager[Applied]:
        return self._noted()

    @contextmanager
    def _noted(self) -> Iterator[Applied]:
        self.notes.append(f"+{self.number}")
        try:
            yield Counted(self.number)
        finally:
            self.notes.append(f"-{self.number}")

    def penalty(self, model: nn.Module, batch: Any, predictions: Any) -> Tensor | None:
        return None if self.number == 0 else torch.full((2,), float(self.number))


def test_composed_regularizers_are_applied_in_order_and_taken_off_in_reverse(linear: tuple[nn.Linear, Tensor]):
    layer, notes = linear[0], []
    composed = Composed([Noting(number, notes) for number in (1, 2, 3)])
    with pytest.raises(Interrupted), composed.applied_to(layer, SGD(layer.parameters())):
        assert notes == ["+1", "+2", "+3"]
        raise Interrupted
    assert notes == ["+1", "+2", "+3", "-3", "-2", "-1"]


def test_what_is_applied_is_taken_off_when_the_next_refuses(linear: tuple[nn.Linear, Tensor]):
    class Refusing(Regularizer):
        def applied_to(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager[Applied]:
            raise ValueError("no")

    layer, notes = linear[0], []
    composed = Composed([Noting(1, notes), Refusing()]).applied_to(layer, SGD(layer.parameters()))
    with pytest.raises(ValueError, match=r"^no$"), composed:
        pass
    assert notes == ["+1", "-1"]


def test_penalties_of_composed_regularizers_add_up(linear: tuple[nn.Linear, Tensor]):
    """Those of none count for nothing; if all are none, so is the sum."""
    composed = Composed([Regularizer(), Noting(2), Noting(0), Noting(5)])
    of_two: Any = SimpleNamespace(count=torch.ones(2))
    found: Any = composed.penalty(linear[0], {}, of_two)
    assert torch.equal(found, torch.tensor([7.0, 7.0]))
    assert Composed([Regularizer(), Noting(0)]).penalty(linear[0], {}, None) is None


def test_composed_regularizers_have_a_penalty_if_one_of_them_has():
    assert Composed([Regularizer(), Noting(1)]).has_penalty
    assert Composed([Regularizer(), Composed([Noting(1)])]).has_penalty
    assert not Composed([Regularizer()]).has_penalty
    assert not Composed([]).has_penalty


def test_states_of_composed_regularizers_are_kept_apart(linear: tuple[nn.Linear, Tensor]):
    """Also those of the 2nd and the 11th, whose prefixes begin alike."""
    layer = linear[0]
    many, more = (Composed([Noting(shift + number) for number in range(12)]) for shift in (100, 200))
    with many.applied_to(layer, SGD(layer.parameters())) as applied:
        state = applied.state_dict()
    assert len(state) == 12
    with more.applied_to(layer, SGD(layer.parameters())) as applied:
        assert not set(map(int, applied.state_dict().values())) & set(map(int, state.values()))
        applied.load_state_dict(state)
        assert {key: int(t) for key, t in applied.state_dict().items()} == {f"{n}.count": 100 + n for n in range(12)}


def test_a_regularizer_that_overrides_nothing_changes_nothing(bert: Case):
    optimizer = SGD(bert.model.parameters())
    with untouched(bert.model), Regularizer().applied_to(bert.model, optimizer) as applied:
        assert applied.state_dict() == {}
    assert not Regularizer().has_penalty


@dataclass(frozen=True)
class Toy(Regularizer):
    """Has settings of its own, some that a run supplies, and some for what it prepares."""

    scores: Any
    total_steps: int
    rate: float = 0.25
    kind: Literal["one", "two"] = "one"

    @classmethod
    def for_run(cls, run: Any, *, splits: int = 5, **settings: Any) -> "Toy":
        return super().for_run(run, rate=splits / 10, **settings)


def test_settings_are_the_fields_and_what_a_run_can_be_told():
    """Fields that a run supplies are none; annotations are types, as a command line needs them."""
    found = Toy.settings()
    assert {name: (p.annotation, p.default) for name, p in found.items()} == {
        "rate": (float, 0.25),
        "kind": (Literal["one", "two"], "one"),
        "splits": (int, 5),
    }
    assert Regularizer.settings() == {}


def test_settings_of_every_method_have_types_and_defaults():
    for name, method in METHODS.items():
        for setting, parameter in method.settings().items():
            assert not isinstance(parameter.annotation, str), (name, setting)
            assert parameter.annotation is not inspect.Parameter.empty, (name, setting)


def test_a_run_supplies_what_is_no_setting():
    class FakeRun:
        def supply(self, name: str) -> str:
            return f"the {name}"

    run: Any = FakeRun()
    assert Toy.for_run(run, splits=3, kind="two") == Toy("the scores", "the total_steps", 0.3, "two")


def test_only_classes_with_a_name_of_their_own_are_methods():
    before = dict(METHODS)
    try:

        class Named(Regularizer):
            name = "for-a-test"

        class Derived(Named):
            pass

        assert before | {"for-a-test": Named} == METHODS
        assert Derived.name == "for-a-test"
    finally:
        METHODS.pop("for-a-test", None)


def test_a_name_belongs_to_one_class():
    before = dict(METHODS)
    sentence = (
        r"The method 'mixout' is Mixout of fisherscope\.finetune\.methods\.mixout; give .*\.Another another name\."
    )
    try:
        with pytest.raises(ValueError, match=f"^{sentence}$"):

            class Another(Regularizer):
                name = "mixout"

        assert before == METHODS
        made = []
        for _ in range(2):  # as a cell of a notebook that is run again

            class Again(Regularizer):
                name = "for-a-test"

            made.append(Again)
        assert METHODS["for-a-test"] is made[1]
    finally:
        METHODS.pop("for-a-test", None)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_a_dataclass_that_documents_its_settings(name: str):
    """Without the decorator its fields are no settings, and ``--help`` has what the docstring says of them."""
    method = METHODS[name]
    assert "__dataclass_params__" in vars(method)
    assert [s for s in method.settings() if described(method, s) == s.replace("_", " ")] == []


def test_a_changed_parameter_learns_by_its_own_gradient():
    """The optimizer moves the parameter, not the tensor that is computed with."""
    made = case("bert-classifier")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    optimizer = SGD(made.model.parameters(), lr=0.1)
    before = values(made.model)[name]
    with parts.reparametrized(made.model, {name: lambda p: 3 * p}):
        gradient = gradients(made)[name]
        optimizer.step()
    assert gradient.any()
    torch.testing.assert_close(made.model.get_parameter(name), before - 0.1 * gradient)
