"""The Fisher engine against one backward pass per example, against paper and pencil, and under interruption."""

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import h5py
import pytest
import reference
import torch
from conftest import (
    IGNORED,
    LENGTHS,
    Case,
    Example,
    Interrupted,
    Stopping,
    batched,
    case,
    contents,
    kill_when,
    moved,
    untouched,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fisherscope.fisher import estimate_fisher, rules, run
from fisherscope.fisher.contributions import Lookup, Outer, accumulate
from fisherscope.scores import FisherScores

fisher = functools.partial(estimate_fisher, progress=False)

FAMILIES = ("bert", "gpt2", "t5", "llama", "albert", "bert-classifier", "bert-regressor")
PRECISION = {"t5": 1e-6, "llama": 1e-6}  # their norms compute in float32, whatever the model's dtype


@functools.cache
def expected(name: str, reduction: str = "mean") -> tuple[Case, dict[str, Tensor]]:
    made = case(name)
    return made, reference.fisher(made.model, made.examples, made.objective, reduction)


def assert_same(scores: Mapping[str, Tensor], wanted: Mapping[str, Tensor], relative: float = 1e-9) -> None:
    """Equal entry by entry; the absolute floor is for scores that are 0 by algebra."""
    assert list(scores) == list(wanted)
    for name, want in wanted.items():
        floor = 1e-3 * relative * float(want.max()) + 1e-30
        torch.testing.assert_close(scores[name], want, rtol=relative, atol=floor, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_equals_the_loop_over_unpadded_examples(name: str, size: int):
    made, wanted = expected(name)
    scores = fisher(made.model, batched(made.examples, size))
    assert_same(scores, wanted, PRECISION.get(name, 1e-9))
    assert scores.num_examples == len(LENGTHS)


@pytest.mark.parametrize("name", FAMILIES)
def test_loop_engine_is_the_same_definition(name: str):
    made, wanted = expected(name)
    assert_same(fisher(made.model, batched(made.examples, 3), engine="loop"), wanted, PRECISION.get(name, 1e-9))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_sum_over_tokens(name: str):
    made, wanted = expected(name, "sum")
    scores = fisher(made.model, batched(made.examples, 3), reduction="sum")
    assert_same(scores, wanted, PRECISION.get(name, 1e-9))
    assert scores.reduction == "sum"


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_sum_is_squared_number_of_tokens_times_mean_for_one_example(name: str):
    made = case(name, lengths=[7])
    tokens = reference.number_scored(made.examples[0], made.objective)
    assert tokens > 1
    batches = batched(made.examples, 1)
    mean = fisher(made.model, batches)
    assert_same(fisher(made.model, batches, reduction="sum"), {n: tokens**2 * score for n, score in mean.items()})


@pytest.mark.parametrize(("count", "length"), [(6, 6), (5, 6), (4, 4), (3, 3), (2, 2), (8, 3)])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_batch_as_long_as_a_sequence(name: str, count: int, length: int):
    """Also as many examples as heads, as target tokens (11 - length), or as the probe runs."""
    made = case(name, lengths=[length] * count)
    wanted = reference.fisher(made.model, made.examples, made.objective)
    assert_same(fisher(made.model, batched(made.examples, count)), wanted, PRECISION.get(name, 1e-9))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_order_of_examples_does_not_matter(name: str):
    made, wanted = expected(name)
    assert_same(fisher(made.model, batched(made.examples[::-1], 3)), wanted, PRECISION.get(name, 1e-9))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_any_attention_implementation(attention: str):
    made = case("bert", lengths=(7, 3), attn_implementation=attention)
    wanted = reference.fisher(made.model, made.examples, made.objective)
    assert_same(fisher(made.model, batched(made.examples, 2)), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_is_close_to_float64(name: str):
    made = case(name)
    wide = fisher(made.model, batched(made.examples, 4))
    single = fisher(made.model.float(), batched(made.examples, 4))
    assert {score.dtype for score in wide.values()} == {torch.float64}
    assert {score.dtype for score in single.values()} == {torch.float32}
    for key, score in wide.items():
        assert (single[key] - score).norm() <= 1e-4 * score.norm() + 1e-12, key


def test_bfloat16_model_gets_float32_scores():
    made = case("bert")
    made.model.bfloat16()
    fast, slow = (fisher(made.model, batched(made.examples, 4), engine=engine) for engine in ("hooks", "loop"))
    for key, score in slow.items():
        assert fast[key].dtype == torch.float32
        assert (fast[key] - score).norm() <= 0.05 * score.norm() + 1e-6, key


def test_key_biases_have_no_influence():
    made, _ = expected("bert")
    scores = fisher(made.model, batched(made.examples, 4))
    keys = [name for name in scores if name.endswith("key.bias")]
    assert len(keys) == 2
    assert all(scores[key].max() < 1e-20 * scores[key.replace("key", "query")].min() for key in keys)


def test_key_third_of_a_joint_projection_has_no_influence():
    made, _ = expected("gpt2")
    scores = fisher(made.model, batched(made.examples, 4))
    for name in ("transformer.h.0.attn.c_attn.bias", "transformer.h.1.attn.c_attn.bias"):
        query, key, value = scores[name].chunk(3)
        assert key.max() < 1e-20 * min(query.min(), value.min())


def test_tied_parameter_appears_once():
    made, _ = expected("bert")
    scores = fisher(made.model, batched(made.examples, 8))
    assert list(scores) == [name for name, _ in made.model.named_parameters()]
    assert made.model.get_output_embeddings().weight is made.model.get_input_embeddings().weight
    assert "cls.predictions.decoder.weight" not in scores


class WithLogits(nn.Module):
    """A linear model with the output that Hugging Face heads have."""

    def __init__(self, outputs: int, inputs: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> "Logits":
        return Logits(self.linear(x))


class Logits:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def labelled(labels: Tensor, inputs: int = 5) -> list[Example]:
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(len(labels), inputs, generator=draw, dtype=torch.float64)
    return [{"x": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_softmax_regression_on_paper(engine: str):
    model = moved(WithLogits(4))
    examples = labelled(torch.arange(12) % 4)
    x, y = (torch.stack([example[key] for example in examples]) for key in ("x", "labels"))
    scores = fisher(model, batched(examples, 5), objective="classification", engine=engine)
    weight, bias = reference.softmax_regression_fisher(model.linear.weight.detach(), model.linear.bias.detach(), x, y)
    assert_same(scores, {"linear.weight": weight, "linear.bias": bias})


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_squared_error_on_paper(engine: str):
    model = moved(WithLogits(1))
    examples = labelled(torch.linspace(-1, 2, 12, dtype=torch.float64))
    x, y = (torch.stack([example[key] for example in examples]) for key in ("x", "labels"))
    scores = fisher(model, batched(examples, 5), objective="regression", engine=engine)
    weight, bias = reference.squared_error_fisher(model.linear.weight.detach(), model.linear.bias.detach(), x, y)
    assert_same(scores, {"linear.weight": weight, "linear.bias": bias})


def test_loss_scaled_by_three_scores_scaled_by_nine():
    model, examples = moved(nn.Linear(3, 2)), points(6)
    plain = fisher(model, batched(examples, 4), objective=energy)
    scaled = fisher(model, batched(examples, 4), objective=lambda m, b: 3 * energy(m, b))
    assert_same(scaled, {name: 9 * score for name, score in plain.items()})


def test_twice_the_same_data_is_the_same_mean():
    made, wanted = expected("bert")
    assert_same(fisher(made.model, batched([*made.examples, *made.examples], 5)), wanted)


def points(count: int, *shape: int) -> list[Example]:
    """Examples ``x`` of the given shape, three numbers by default."""
    draw = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(shape or (3,), generator=draw, dtype=torch.float64)} for _ in range(count)]


def ids(count: int, length: int) -> list[Example]:
    draw = torch.Generator().manual_seed(2)
    return [{"x": torch.randint(0, 7, (length,), generator=draw)} for _ in range(count)]


def energy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A loss that depends on every output, and on none linearly."""
    outputs = model(batch["x"]).flatten(1)
    return (outputs.sin() * torch.arange(1, outputs.shape[1] + 1)).sum(1) + outputs.square().sum(1)


class Net(nn.Module):
    """Children and parameters by keyword, and a forward function."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.compute = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, 0.5))


def tied_linears() -> nn.Module:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def tied_to_own_parameter() -> nn.Module:
    table = nn.Embedding(7, 3)
    head = Net(lambda m, x: x @ m.table.T, table=table.weight)
    return nn.Sequential(table, nn.Tanh(), head)


def two_names() -> nn.Module:
    shared = weight(3)
    return Net(lambda m, x: x * m.a + m.b, a=shared, b=shared)


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    hidden = m.words(x)
    hidden += m.places(torch.arange(x.shape[1])[None])
    return hidden


def by_value(m: nn.Module, x: Tensor) -> Tensor:
    return x * m.scale * (2 if x.abs().max().item() > 0 else 1)


def without_gradient(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = m.below(x)
    return m.above(hidden)


def half_used(m: nn.Module, x: Tensor) -> Tensor:
    m.layer(2 * x)  # computed, and thrown away
    return m.layer(x)


MODULES: dict[str, tuple[Callable[[], nn.Module], list[Example]]] = {
    "multilayer": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), points(7)),
    "inputs by keyword": (lambda: Net(lambda m, x: m.layer(input=x), layer=nn.Linear(3, 2)), points(7, 5, 3)),
    "one parameter of two linear modules": (tied_linears, points(7)),
    "one parameter of two linear modules, positions": (tied_linears, points(7, 5, 3)),
    "called twice": (lambda: Net(lambda m, x: m.layer(m.layer(x).tanh()), layer=nn.Linear(3, 3)), points(7, 5, 3)),
    "computed and thrown away": (lambda: Net(half_used, layer=nn.Linear(3, 3)), points(7, 5, 3)),
    "parameter of a module with children": (
        lambda: Net(
            lambda m, x: m.layer(x) * m.scale + m.shift, layer=nn.Linear(3, 3), scale=weight(3), shift=weight()
        ),
        points(7, 5, 3),
    ),
    "parent computes with its child's parameter": (
        lambda: Net(lambda m, x: F.linear(m.layer(x), m.layer.weight), layer=nn.Linear(3, 3)),
        points(7),
    ),
    "padding row": (lambda: nn.Embedding(7, 3, padding_idx=0), ids(7, 5)),
    "scaled by frequency": (lambda: nn.Embedding(7, 3, scale_grad_by_freq=True), ids(7, 5)),
    "positions without a batch axis": (
        lambda: Net(
            lambda m, x: m.words(x) + m.places(torch.arange(x.shape[1])),
            words=nn.Embedding(7, 3),
            places=nn.Embedding(9, 3),
        ),
        ids(7, 5),
    ),
    "positions with a batch axis of 1": (
        lambda: Net(
            lambda m, x: m.words(x) + m.places(torch.arange(x.shape[1])[None]),
            words=nn.Embedding(7, 3),
            places=nn.Embedding(9, 3),
        ),
        ids(7, 5),
    ),
    "positions joined to the batch axis": (
        lambda: Net(lambda m, x: m.layer(x.reshape(-1, 3)).reshape(x.shape), layer=nn.Linear(3, 3)),
        points(7, 5, 3),
    ),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.RMSNorm(3)), points(7, 5, 3)),
    "norm without bias": (lambda: nn.LayerNorm(3, bias=False), points(7, 5, 3)),
    "norm of two axes": (lambda: nn.Sequential(nn.LayerNorm((5, 3)), nn.RMSNorm((5, 3))), points(7, 5, 3)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), points(7)),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.Tanh(), nn.Conv1d(4, 2, 2)), points(7, 3, 5)),
    "recurrent": (lambda: Net(lambda m, x: m.layer(x)[0], layer=nn.LSTM(3, 4, batch_first=True)), points(7, 5, 3)),
    "torch's own encoder layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), points(7, 5, 4)),
    "embedding changed in place": (
        lambda: Net(in_place, words=nn.Embedding(7, 3), places=nn.Embedding(9, 3)),
        ids(7, 5),
    ),
    "activation in place": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), points(7)),
    "embedding tied to a module's own parameter": (tied_to_own_parameter, ids(7, 5)),
    "one parameter under two names": (two_names, points(7)),
    "depends on values": (lambda: Net(by_value, scale=weight(3)), points(7)),
    "part without gradient": (
        lambda: Net(without_gradient, below=nn.Linear(3, 3), above=nn.Linear(3, 2)),
        points(7),
    ),
}


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("kind", MODULES)
def test_any_module_with_any_loss(kind: str, size: int):
    make, examples = MODULES[kind]
    model = moved(make())
    wanted = reference.fisher(model, examples, energy)
    assert_same(fisher(model, batched(examples, size), objective=energy), wanted)


def with_penalty(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return energy(model, batch) + model.weight.square().sum()


def by_hand(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return (batch["x"] @ model.weight.T).square().sum(1)


def scaled_from_outside(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """As with soft prompts: what goes into the first module wants a gradient already."""
    return energy(model, {"x": batch["x"] * torch.tensor(2.0, dtype=torch.float64, requires_grad=True)})


def test_tied_uses_that_cancel_leave_nothing():
    """As a difference of squares this could come out below zero."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 4, 3, generator=draw)
    ids = torch.randint(0, 7, (5, 4), generator=draw)
    outer = Outer(F.one_hot(ids, 7).float(), inputs)
    products, score = outer.left.mT @ inputs, torch.zeros(7, 3)
    accumulate(score, [outer, Lookup(ids, -inputs)])
    assert 0 <= score.min() <= score.max() < 1e-12
    accumulate(score, [outer, Lookup(ids, inputs)])
    torch.testing.assert_close(score, (2 * products).square().sum(0))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (3, 4, 1), (3, 4, 7)], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["as usual", "last axis first"])
def test_tied_gradients_of_any_layout_are_used_and_left_alone(shape: tuple[int, ...], order: tuple[int, ...]):
    """Gradients of sums and means are one number, expanded."""
    draw = torch.Generator().manual_seed(3)
    drawn = [torch.randn(size, generator=draw).double() for size in (shape, (3, 4, 5), (3, 4, 5))]
    left = drawn[0].permute(order).contiguous().permute(order).expand(3, 4, 7)
    right, gradients, tokens = drawn[1], drawn[2], torch.randint(0, 7, (3, 4), generator=draw)
    before, score, wanted = left.clone(), torch.zeros(7, 5).double(), torch.zeros(7, 5).double()
    for n in range(3):
        wanted += (left[n].T @ right[n]).index_add(0, tokens[n], gradients[n]).square()
    accumulate(score, [Lookup(tokens, gradients), Outer(left, right)])
    torch.testing.assert_close(score, wanted)
    assert torch.equal(left, before)


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), MODULES["multilayer"][0]], ids=["one layer", "two layers"])
def test_inputs_that_want_a_gradient(make: Callable[[], nn.Module]):
    model = moved(make())
    wanted = reference.fisher(model, points(7), scaled_from_outside)
    assert_same(fisher(model, batched(points(7), 3), objective=scaled_from_outside), wanted)


@pytest.mark.parametrize("loss", [with_penalty, by_hand])
def test_loss_that_uses_parameters_outside_the_model(loss: Callable):
    model = moved(nn.Linear(3, 2))
    assert_same(fisher(model, batched(points(7), 3), objective=loss), reference.fisher(model, points(7), loss))


def deeper_when_longer(m: nn.Module, x: Tensor) -> Tensor:
    hidden = m.first(x)
    return m.second(hidden) if x.shape[1] > 1 else hidden


def child_weight_when_longer(m: nn.Module, x: Tensor) -> Tensor:
    hidden = m.layer(x)
    return F.linear(hidden, m.layer.weight) if x.shape[1] > 1 else hidden


def routed(m: nn.Module, x: Tensor) -> Tensor:
    """Every example goes to one of two experts; the first four all to the same one."""
    chosen, outputs = x[:, 0] > 0, torch.zeros_like(x)
    for expert, own in ((m.one, chosen), (m.other, ~chosen)):
        if own.any():
            outputs = outputs.index_put((own,), expert(x[own]))
    return outputs


def experts() -> nn.Module:
    return Net(routed, one=nn.Linear(3, 3), other=nn.Linear(3, 3))


SORTED = sorted(points(10), key=lambda example: float(example["x"][0]))

LATER: dict[str, tuple[Callable[[], nn.Module], Sequence[Example]]] = {
    "a module used": (
        lambda: Net(deeper_when_longer, first=nn.Linear(3, 3), second=nn.Linear(3, 3)),
        [*points(5, 1, 3), *points(5, 5, 3)],
    ),
    "a child's parameter used by its parent": (
        lambda: Net(child_weight_when_longer, layer=nn.Linear(3, 3)),
        [*points(5, 1, 3), *points(5, 5, 3)],
    ),
    "another expert chosen": (experts, SORTED),
    "the first expert chosen again": (experts, SORTED[::-1]),
    "positions joined to the batch axis": (
        MODULES["positions joined to the batch axis"][0],
        [*points(5, 1, 3), *points(5, 5, 3)],
    ),
    "as many positions as examples": (MODULES["positions without a batch axis"][0], [*ids(5, 1), *ids(5, 5)]),
}


@pytest.mark.parametrize("kind", LATER)
@pytest.mark.parametrize("size", [1, 5])
def test_what_only_later_batches_show(kind: str, size: int):
    """The first batch does not tell how the model treats all of them."""
    make, examples = LATER[kind]
    model = moved(make())
    assert_same(fisher(model, batched(examples, size), objective=energy), reference.fisher(model, examples, energy))


def test_batches_need_not_hold_the_same_inputs(bert: Case):
    """Without token types the model looks up the first row for everyone."""
    plain = [{k: v for k, v in example.items() if k != "token_type_ids"} for example in bert.examples]
    wanted = reference.fisher(bert.model, [*bert.examples, *plain], "mlm")
    batches = [*batched(bert.examples, 3), *batched(plain, 3)]
    assert_same(fisher(bert.model, batches), wanted)
    assert_same(fisher(bert.model, batches[::-1]), wanted)


def test_parameter_the_loss_does_not_reach_scores_zero():
    model = moved(Net(lambda m, x: m.used(x), used=nn.Linear(3, 2), unused=nn.Linear(3, 2)))
    scores = fisher(model, batched(points(4), 2), objective=energy)
    assert not scores["unused.weight"].any()
    assert not scores["unused.bias"].any()
    assert scores["used.weight"].all()


def test_rows_of_tokens_that_never_occur_score_zero():
    model = moved(nn.Embedding(50, 3))
    scores = fisher(model, batched(ids(7, 5), 3), objective=energy)["weight"]
    seen = torch.stack([example["x"] for example in ids(7, 5)]).unique()
    assert scores[seen].all()
    assert scores.any(1).sum() == len(seen)


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_frozen_parameters_are_not_scored(engine: str):
    _, wanted = expected("bert-classifier")
    made = case("bert-classifier")
    made.model.bert.embeddings.requires_grad_(False)
    scores = fisher(made.model, batched(made.examples, 3), engine=engine)
    assert_same(scores, {n: score for n, score in wanted.items() if not n.startswith("bert.embeddings.")})


def test_nothing_goes_one_example_at_a_time(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "fisherscope")
    for name in FAMILIES:
        fisher(case(name).model, batched(case(name).examples, 4))
    assert not [record for record in caplog.records if "one example at a time" in record.message]


@pytest.mark.parametrize("engine", ["hooks", "loop"])
def test_examples_without_a_scored_token_are_skipped_and_counted(engine: str, caplog: pytest.LogCaptureFixture):
    made, wanted = expected("bert")
    silent = [{**example, "labels": torch.full_like(example["labels"], IGNORED)} for example in made.examples[:5]]
    mixed = [*silent[:3], *made.examples[:4], silent[3], *made.examples[4:], silent[4]]
    scores = fisher(made.model, batched(mixed, 3), engine=engine)  # the first batch has nothing to score
    assert_same(scores, wanted)
    assert scores.num_examples == len(made.examples)
    assert scores.provenance["skipped"] == 5
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "5 of 13 examples have no scored token and were skipped."
    ]


def test_example_without_a_class_is_skipped():
    made, wanted = expected("bert-classifier")
    nameless = {**made.examples[0], "labels": torch.tensor(IGNORED)}
    scores = fisher(made.model, batched([*made.examples, nameless], 3))
    assert_same(scores, wanted)
    assert scores.provenance["skipped"] == 1


@pytest.mark.parametrize("engine", ["hooks", "loop"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_model_is_left_bit_identical(name: str, engine: str):
    made = case(name)
    prepare_for_training(made.model)
    with untouched(made.model):
        fisher(made.model, batched(made.examples, 3), engine=engine)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_model_is_left_bit_identical_when_the_loss_raises(call: int):
    made = case("gpt2")
    prepare_for_training(made.model)
    calls = 0

    def failing(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        losses = model(input_ids=batch["input_ids"]).logits.sum((1, 2))
        if calls == call:
            raise Interrupted
        return losses

    with untouched(made.model), pytest.raises(Interrupted):
        fisher(made.model, batched(made.examples, 3), objective=failing)


def prepare_for_training(model: nn.Module) -> None:
    """Flags and gradients that are not the defaults."""
    model.train()
    next(iter(model.children())).eval()
    first, *_, last = model.parameters()
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)
    assert getattr(model.config, "use_cache", True)


def test_dropout_and_checkpointing_are_off_although_the_model_trains():
    _, wanted = expected("bert")
    made = case("bert")
    made.model.train()
    made.model.activation_checkpointing_enable()
    assert_same(fisher(made.model, batched(made.examples, 3)), wanted)


def test_provenance_says_how_the_scores_were_made(bert: Case):
    scores = fisher(
        bert.model, Stopping(batched(bert.examples, 3), source="some text", fingerprint="abc", batch_size=3)
    )
    facts = scores.provenance
    assert facts["model"]["class"] == "BertForMaskedLM"
    assert facts["model"]["prefix"] == "bert."
    assert facts["data"] == {"source": "some text", "fingerprint": "abc", "batch_size": 3, "settings": None}
    assert facts["objective"] == "mlm"
    assert set(facts["versions"]) == {"python", "fisherscope", "torch", "transformers", "numpy"}
    assert json.loads(json.dumps(facts)) == facts


def test_arguments_of_the_design_are_accepted(bert: Case):
    scores = fisher(bert.model, batched(bert.examples, 3), estimator="empirical", unit="sequence", reduction="mean")
    assert (scores.estimator, scores.unit, scores.reduction) == ("empirical", "sequence", "mean")


@pytest.fixture
def always_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)


@pytest.mark.usefixtures("always_saving")
@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("engine", ["hooks", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resumed_run_gives_the_same_file(engine: str, stop: int, dtype: torch.dtype, bert: Case, tmp_path: Path):
    bert.model.to(dtype)
    batches, part = batched(bert.examples, 3), tmp_path / "scores.h5.part"
    fisher(bert.model, Stopping(batches), engine=engine).save(tmp_path / "whole.h5")
    with pytest.raises(Interrupted):
        fisher(bert.model, Stopping(batches, stop), engine=engine, checkpoint=part)
    assert FisherScores.load(part).num_examples == 3 * stop
    fisher(bert.model, Stopping(batches), engine=engine, checkpoint=part).save(tmp_path / "resumed.h5")
    assert contents(tmp_path / "resumed.h5") == contents(tmp_path / "whole.h5")


@pytest.mark.usefixtures("always_saving")
def test_checkpoint_holds_the_scores_so_far(bert: Case, tmp_path: Path):
    batches, part = batched(bert.examples, 3), tmp_path / "scores.h5.part"
    with pytest.raises(Interrupted):
        fisher(bert.model, Stopping(batches, 2), checkpoint=part)
    assert_same(FisherScores.load(part), reference.fisher(bert.model, bert.examples[:6], "mlm"))


@pytest.mark.usefixtures("always_saving")
def test_resumed_run_does_not_repeat_what_is_done(bert: Case, tmp_path: Path):
    """Batches of four, which no probe of the model uses."""
    batches, part, served = batched([*bert.examples, *bert.examples], 4), tmp_path / "scores.h5.part", []

    def counted(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        served.append(len(batch["labels"]))
        return model(input_ids=batch["input_ids"]).logits.sum((1, 2))

    with pytest.raises(Interrupted):
        fisher(bert.model, Stopping(batches, 3), objective=counted, checkpoint=part)
    assert served.count(4) == 3
    fisher(bert.model, Stopping(batches), objective=counted, checkpoint=part)
    assert served.count(4) == 4


@pytest.mark.usefixtures("always_saving")
def test_skipped_examples_survive_an_interruption(bert: Case, tmp_path: Path):
    silent = {**bert.examples[0], "labels": torch.full_like(bert.examples[0]["labels"], IGNORED)}
    batches, part = batched([silent, *bert.examples], 3), tmp_path / "scores.h5.part"
    with pytest.raises(Interrupted):
        fisher(bert.model, Stopping(batches, 2), checkpoint=part)
    scores = fisher(bert.model, Stopping(batches), checkpoint=part)
    assert (scores.num_examples, scores.provenance["skipped"]) == (8, 1)


@pytest.mark.usefixtures("always_saving")
def test_checkpoint_of_a_finished_run_gives_the_same_again(bert: Case, tmp_path: Path):
    """It is left for the caller to remove once the scores are saved."""
    batches, part = batched(bert.examples, 3), tmp_path / "scores.h5.part"
    first = fisher(bert.model, batches, checkpoint=part)
    again = fisher(bert.model, Stopping(batches), checkpoint=part)
    assert all(torch.equal(again[name], first[name]) for name in first)


def changed_weights(made: Case) -> None:
    with torch.no_grad():
        next(made.model.parameters())[0, 0] += 1


def fewer_parameters(made: Case) -> None:
    made.model.bert.embeddings.requires_grad_(False)


@pytest.mark.usefixtures("always_saving")
@pytest.mark.parametrize(
    ("change", "settings", "facts", "difference"),
    [
        (changed_weights, {}, {}, "another model"),
        (fewer_parameters, {}, {}, "another"),
        (None, {"engine": "loop"}, {}, "another engine"),
        (None, {"reduction": "sum"}, {}, "another reduction"),
        (None, {"objective": lambda m, b: m(b["input_ids"]).logits.sum((1, 2))}, {}, "another objective"),
        (None, {}, {"fingerprint": "other"}, "another data"),
        (None, {}, {"batch_size": 4}, "another data"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    change: Callable | None, settings: dict, facts: dict, difference: str, bert: Case, tmp_path: Path
):
    batches, part, same = (
        batched(bert.examples, 3),
        tmp_path / "scores.h5.part",
        {"fingerprint": "one", "batch_size": 3},
    )
    with pytest.raises(Interrupted):
        fisher(bert.model, Stopping(batches, 1, **same), checkpoint=part)
    if change:
        change(bert)
    before = part.read_bytes()
    with pytest.raises(ValueError, match=difference):
        fisher(bert.model, Stopping(batches, **same | facts), checkpoint=part, **settings)
    assert part.read_bytes() == before


@pytest.mark.usefixtures("always_saving")
def test_checkpoint_of_fewer_parameters_is_refused(bert: Case, tmp_path: Path):
    batches, part = batched(bert.examples, 3), tmp_path / "scores.h5.part"
    fewer_parameters(bert)
    with pytest.raises(Interrupted):
        fisher(bert.model, Stopping(batches, 1), checkpoint=part)
    bert.model.requires_grad_(True)
    with pytest.raises(ValueError, match="another"):
        fisher(bert.model, Stopping(batches), checkpoint=part)


KILLED = """
import sys, time
import torch
from conftest import batched, case
from fisherscope.fisher import estimate_fisher, run
from fisherscope.fisher.contributions import Lookup, Outer, accumulate
torch.set_num_threads(1)
run.SECONDS_BETWEEN_CHECKPOINTS = 0.0
class Slow(list):
    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            time.sleep(0.3)
made = case("bert")
estimate_fisher(made.model, Slow(batched(made.examples, 1)), progress=False, checkpoint=sys.argv[1])
"""


def test_killed_run_resumes_to_the_same_file(bert: Case, tmp_path: Path):
    part = tmp_path / "scores.h5.part"

    def ready() -> bool:
        if not part.exists():
            return False
        with h5py.File(part) as file:  # written atomically, so it is always complete
            return int(file.attrs["num_examples"]) >= 2

    kill_when(ready, KILLED, part)
    done = FisherScores.load(part).num_examples
    assert 2 <= done < len(bert.examples)
    batches = batched(bert.examples, 1)
    fisher(bert.model, batches, checkpoint=part).save(tmp_path / "resumed.h5")
    fisher(bert.model, batches).save(tmp_path / "whole.h5")
    assert contents(tmp_path / "resumed.h5") == contents(tmp_path / "whole.h5")


@pytest.mark.usefixtures("always_saving")
def test_checkpoint_of_more_batches_than_there_are_is_refused(bert: Case, tmp_path: Path):
    batches, part = batched(bert.examples, 2), tmp_path / "scores.h5.part"
    fisher(bert.model, batches, checkpoint=part)
    with pytest.raises(ValueError, match="was begun with other data"):
        fisher(bert.model, batches[:1], checkpoint=part)


def few_positions(m: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the joined axis is at even positions only, which also fits the other order of joining."""
    return m.last(m.layer(x.reshape(-1, 3)).tanh()).view(len(x), -1, 3)[:, [0, 2]]


def one_of_two_heads(m: nn.Module, x: Tensor) -> Tensor:
    first, second = m.one(x), m.other(x)
    return first if x[0, 0] > 0 else second


class OutOfSight(torch.autograd.Function):
    """Torch functions inside are not seen by anyone."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return gradient * scale, (gradient * x).sum(0)


def hardly_visible(m: nn.Module, x: Tensor) -> Tensor:
    return x * m.scale + 1e-3 * OutOfSight.apply(x, m.scale)


TRAPS: dict[str, tuple[Callable[[], nn.Module], Sequence[Example]]] = {
    "a few positions of a joined axis": (
        lambda: Net(few_positions, layer=nn.Linear(3, 3), last=nn.Linear(3, 3)),
        points(10, 5, 3),
    ),
    "another head in later batches": (
        lambda: Net(one_of_two_heads, one=nn.Linear(3, 3), other=nn.Linear(3, 3)),
        [{"x": torch.cat([torch.tensor([sign]).double(), e["x"][1:]])} for sign in (1, -1) for e in points(5)],
    ),
    "a function of its own beside a visible use": (lambda: Net(hardly_visible, scale=weight(3)), points(10)),
}


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("kind", TRAPS)
def test_traps(kind: str, size: int):
    make, examples = TRAPS[kind]
    model = moved(make())
    assert_same(fisher(model, batched(examples, size), objective=energy), reference.fisher(model, examples, energy))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("positions", [[0], [0, 2, 4], [5]])
def test_gradient_at_few_positions_of_gpt2(positions: list[int], size: int):
    made = case("gpt2", lengths=[7] * 8)
    keep = torch.isin(torch.arange(7), torch.tensor(positions) + 1)
    examples = [{**e, "labels": torch.where(keep, e["input_ids"], IGNORED)} for e in made.examples]
    wanted = reference.fisher(made.model, examples, "causal-lm")
    assert_same(fisher(made.model, batched(examples, size)), wanted)


def test_loss_that_depends_on_the_other_examples_is_taken_alone(caplog: pytest.LogCaptureFixture):
    def contrastive(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        outputs = model(batch["x"])
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none") + energy(model, batch)

    model = moved(nn.Linear(3, 2))
    scores = fisher(model, batched(points(6), 3), objective=contrastive)
    assert_same(scores, reference.fisher(model, points(6), contrastive))
    assert any("changes with the other examples" in record.message for record in caplog.records)


def test_shared_tensor_with_several_uses_one_by_one(monkeypatch: pytest.MonkeyPatch):
    """Nothing is stacked, as for tensors too large for that."""
    monkeypatch.setattr(rules, "STACKED_BYTES", 0)

    def twice(m: nn.Module, x: Tensor) -> Tensor:
        slope = m.slope.exp()
        return F.prelu(x, slope) + F.prelu(2 * x + 1, slope)

    model = moved(Net(twice, slope=weight(3)))
    assert_same(fisher(model, batched(points(7), 3), objective=energy), reference.fisher(model, points(7), energy))
