"""A point of a landscape: where the weights are, what is measured there, and what is not computed again."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import WIDTH, Case, Interrupted, batched, case, untouched
from torch import Tensor, nn

from fisherscope.landscape import evaluate, random_directions
from fisherscope.landscape.evaluate import Evaluator
from fisherscope.landscape.surface import Point
from fisherscope.models import measuring
from fisherscope.objectives import Predictions

POINTS = [(-0.3, -0.2), (-0.3, 0.0), (-0.3, 0.4), (0.0, 0.0), (0.2, -0.2), (0.2, 0.4)]


def along(model: nn.Module, part: str, count: int = 2) -> list[dict[str, Tensor]]:
    """Directions in which only the parameters move whose name has a part."""
    whole = random_directions(model, count, seed=3, one_dimensional="scale")
    return [{n: t if part in n else torch.zeros_like(t) for n, t in direction.items()} for direction in whole]


def measured(made: Case, evaluator: Evaluator, points: Sequence[tuple[float, ...]] = POINTS) -> list[Point]:
    with measuring(made.model):
        try:
            return list(evaluator(points))
        finally:
            evaluator.restore()


def evaluator_of(made: Case, part: str, *, batch_size: int = 3, axes: int = 2, **options: Any) -> Evaluator:
    directions = along(made.model, part, axes)
    return Evaluator(made.model, batched(made.examples, batch_size), made.objective, directions, **options)


def in_full(evaluator: Evaluator) -> Evaluator:
    """The same without keeping what is constant."""
    evaluator.prefix = None
    return evaluator


def held(evaluator: Evaluator) -> list[bool]:
    """Of which batches something is kept."""
    prefix = evaluator.prefix
    return [prefix is not None and prefix.holds(number) for number in range(len(evaluator.batches))]


def bits(points: Sequence[Point]) -> list[bytes]:
    return [np.array([point.loss, *point.metrics.values()]).tobytes() for point in points]


def calls_of(module: nn.Module, run: Callable[[], object]) -> int:
    calls: list[None] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(None))
    run()
    handle.remove()
    return len(calls)


# What moves, and a module before it that then runs once per batch when it is recorded, and never again.
MOVING = {
    "last layer": ("bert", "layer.1.", "bert.encoder.layer.0.output.dense"),
    "end of the last layer": ("bert", "layer.1.output", "bert.encoder.layer.1.attention.self.query"),
    "second half of the first": ("bert", "layer.0.output", "bert.encoder.layer.0.attention.output.dense"),
    "head": ("bert-classifier", "classifier", "bert.pooler.dense"),
    "pooler": ("bert-classifier", "pooler", "bert.encoder.layer.1.output.dense"),
    "last block": ("gpt2", "h.1.", "transformer.h.0.mlp.c_fc"),
    "within a block": ("gpt2", "h.1.mlp", "transformer.h.1.attn.c_proj"),
    "gated block": ("llama", "layers.1.mlp", "model.layers.1.self_attn.q_proj"),
    "untied head": ("llama", "lm_head", "model.layers.1.mlp.up_proj"),
    "decoder": ("t5", "decoder.block", "encoder.block.1.layer.1.DenseReluDense.wi"),
    "end of the decoder": ("t5", "decoder.block.1", "decoder.block.0.layer.0.SelfAttention.q"),
    "end of the encoder": ("t5", "encoder.block.1", "encoder.block.0.layer.0.SelfAttention.q"),
}


@pytest.mark.parametrize("what", MOVING)
def test_what_is_constant_is_computed_once_and_the_losses_keep_their_bits(what: str):
    name, part, before = MOVING[what]
    made = case(name)
    made.model.float()
    fast, slow = evaluator_of(made, part), in_full(evaluator_of(made, part))
    found: list[Point] = []
    with untouched(made.model):
        calls = calls_of(made.model.get_submodule(before), lambda: found.extend(measured(made, fast)))
    assert bits(found) == bits(measured(made, slow))
    assert len({point.loss for point in found}) > 2
    assert calls == len(fast.batches) + 1  # recorded batch by batch, and once more to compare
    assert held(fast) == [True] * 3


def test_where_the_first_module_moves_nothing_is_kept(bert: Case):
    evaluator = evaluator_of(bert, "embeddings")
    calls = calls_of(bert.model, lambda: measured(bert, evaluator))
    assert held(evaluator) == [False] * 3
    assert calls == len(evaluator.batches) * len(POINTS) + 2  # the first and the last batch were watched at step 0


def test_layers_that_share_their_weights_all_run():
    made = case("albert")
    fast, slow = evaluator_of(made, "attention.key"), in_full(evaluator_of(made, "attention.key"))
    query = made.model.get_submodule("albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query")
    found: list[Point] = []
    calls = calls_of(query, lambda: found.extend(measured(made, fast)))
    assert bits(found) == bits(measured(made, slow))
    assert calls > len(fast.batches) * len(POINTS)  # the second of its calls at every point


def test_only_what_is_read_again_is_kept(bert: Case):
    """Of everything before the last layer, its input and the embeddings, which the encoder itself is given."""
    evaluator = evaluator_of(bert, "layer.1.", batch_size=8)
    measured(bert, evaluator)
    examples, tokens = evaluator.batches[0]["input_ids"].shape
    one = examples * tokens * WIDTH * 8  # float64
    assert evaluator.prefix is not None and one < evaluator.prefix.used <= 2.1 * one


def test_without_memory_every_point_runs_in_full(bert: Case, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    wanted = bits(measured(bert, in_full(evaluator_of(bert, "layer.1."))))
    monkeypatch.setattr(evaluate, "free_on", lambda device: 4000)
    evaluator = evaluator_of(bert, "layer.1.")
    with caplog.at_level(logging.INFO, logger="fisherscope.landscape"):
        assert bits(measured(bert, evaluator)) == wanted
    assert held(evaluator) == [False] * 3
    assert [record.message for record in caplog.records if "no memory for more" in record.message]


def test_with_memory_for_some_batches_the_others_run_in_full(bert: Case, monkeypatch: pytest.MonkeyPatch):
    whole = evaluator_of(bert, "layer.1.")
    wanted = bits(measured(bert, whole))
    assert whole.prefix is not None
    room = whole.prefix.used * 2 // 3
    monkeypatch.setattr(evaluate, "free_on", lambda device: int(room / evaluate.SHARE_OF_FREE))
    some = evaluator_of(bert, "layer.1.")
    assert bits(measured(bert, some)) == wanted
    assert some.prefix is not None and 0 < some.prefix.used <= room
    assert set(held(some)) == {True, False}


class Classifier(nn.Module):
    """Three classes of four numbers, computed in a way that a test chooses."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        self.compute = compute

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.compute(self, x))


class Noting(nn.Module):
    """Returns its input, and notes something that is read later."""

    def forward(self, x: Tensor) -> Tensor:
        self.noted = x.mean()
        return x * 1.0


def adds_up(m: Any, x: Tensor) -> Tensor:
    first = m.first(x)
    return m.head(first + m.second(first))


def borrows(m: Any, x: Tensor) -> Tensor:
    """Uses the weight of the head before the head runs, within a module that does not have it."""
    return m.head(m.second(m.first(x) @ m.head.weight.T @ m.head.weight))


def writes(m: Any, x: Tensor) -> Tensor:
    hidden = m.first(x)
    hidden *= 2
    return m.head(hidden)


def reads_a_note(m: Any, x: Tensor) -> Tensor:
    return m.head(m.noting(m.first(x)) * m.noting.noted)


def calls_again(m: Any, x: Tensor) -> Tensor:
    return m.head(m.first(m.head.weight.new_ones(()) * m.first(m.first(x)).tanh())) @ m.second.weight[:3, :3]


def attends(m: Any, x: Tensor) -> Tensor:
    """Torch's attention uses the weights of a child that it never calls."""
    hidden = m.first(x)[:, None]
    return m.head(m.attention(hidden, hidden, hidden)[0][:, 0])


def moves_between(m: Any, x: Tensor) -> Tensor:
    """One module before and after what moves."""
    return m.head(m.first(m.second(m.first(x).tanh())))


# How it computes, what moves, and whether anything can be kept.
COMPUTING = {
    "output read by two": (adds_up, "head", True),
    "borrowed weight": (borrows, "head", False),
    "written into": (writes, "head", False),
    "noted elsewhere": (reads_a_note, "head", False),
    "called several times": (calls_again, "head", True),
    "child that is not called": (attends, "out_proj", True),
    "before and after": (moves_between, "second", True),
}


@pytest.mark.parametrize("how", COMPUTING)
def test_losses_keep_their_bits_however_a_model_computes(how: str):
    compute, part, kept = COMPUTING[how]
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model = Classifier(compute, noting=Noting(), attention=attention).double()
    draw = torch.Generator().manual_seed(0)
    examples = [{"x": torch.randn(4, generator=draw, dtype=torch.float64), "labels": torch.tensor(n % 3)}
                for n in range(8)]  # fmt: skip
    made = Case(model, "classification", examples)
    fast, slow = evaluator_of(made, part), in_full(evaluator_of(made, part))
    with untouched(model):
        found = measured(made, fast)
    assert bits(found) == bits(measured(made, slow))
    assert len({point.loss for point in found}) > 2
    assert held(fast) == [kept] * 3


def test_hooks_of_others_see_what_is_given_back():
    made = case("bert")
    hooked = made.model.get_submodule("bert.encoder.layer.0")
    hooked.register_forward_hook(lambda module, args, output: torch.mul(output, 2))  # type: ignore
    evaluator = evaluator_of(made, "layer.1.")
    assert bits(measured(made, evaluator)) == bits(measured(made, in_full(evaluator_of(made, "layer.1."))))
    assert held(evaluator) == [True] * 3


def test_a_model_that_diverged_at_the_first_point_is_measured_all_the_same(bert: Case):
    points = [(1e300, 1e300), (1e300, 0.0), (0.1, 0.1), (0.2, 0.1)]
    found = measured(bert, evaluator_of(bert, "layer.1."), points)
    wanted = measured(bert, in_full(evaluator_of(bert, "layer.1.")), points)
    assert bits(found) == bits(wanted)
    assert not math.isfinite(found[0].loss) and math.isfinite(found[3].loss)


def test_the_loss_of_other_weights_is_measured_in_full(bert: Case):
    """Other weights may differ where nothing ever moves."""
    evaluator = evaluator_of(bert, "layer.1.")
    measured(bert, evaluator)
    name = "bert.embeddings.word_embeddings.weight"
    other = dict(bert.model.named_parameters())[name].detach() * 2
    with untouched(bert.model), measuring(bert.model):
        found = evaluator.of_weights({name: other}).loss
    with torch.no_grad():
        dict(bert.model.named_parameters())[name].copy_(other)
    assert math.isclose(found, reference.mean_loss(bert.model, bert.examples, "mlm"), rel_tol=1e-12)


@pytest.mark.parametrize("part", ["", "layer.1."])
@pytest.mark.parametrize("call", [1, 2, 4, 8])
def test_model_is_left_bit_identical_when_a_metric_raises(part: str, call: int, bert: Case):
    left = iter(range(call))

    def failing(predictions: Predictions) -> Tensor:
        if next(left, None) is None:
            raise Interrupted
        return predictions.count.double()

    bert.model.train()
    with untouched(bert.model), pytest.raises(Interrupted):
        measured(bert, evaluator_of(bert, part, metrics=[failing]))
    assert not any("forward" in vars(module) for module in bert.model.modules())


@pytest.mark.parametrize("call", range(1, 12))
def test_model_is_left_bit_identical_when_a_module_raises(call: int, bert: Case):
    """At whatever time: while a batch is recorded, compared, or run from what is kept."""
    left = iter(range(call))

    def failing(module: nn.Module, args: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    handle = bert.model.get_submodule("bert.encoder.layer.1").register_forward_pre_hook(failing)
    with untouched(bert.model), pytest.raises(KeyboardInterrupt):
        measured(bert, evaluator_of(bert, "layer.1."))
    handle.remove()
    assert not any("forward" in vars(module) for module in bert.model.modules())


def weights_at(made: Case, directions: Sequence[Mapping[str, Tensor]], points: Sequence[tuple[float, ...]]) -> Iterator:
    """The parameters of the model at every point."""
    evaluator = Evaluator(made.model, batched(made.examples, 8), made.objective, directions)
    with measuring(made.model):
        for _ in evaluator(points):
            yield {name: p.detach().clone() for name, p in made.model.named_parameters()}
    evaluator.restore()


GRIDS = {
    1: [(-0.5,), (0.0,), (0.25,)],
    2: POINTS,
    3: [(-0.5, 0.25, 0.1), (-0.5, 0.25, 0.3), (-0.5, 0.0, 0.1), (0.5, 0.0, 0.1)],
}


@pytest.mark.parametrize("axes", GRIDS)
def test_weights_are_where_the_steps_say(axes: int, bert: Case):
    directions = along(bert.model, "", axes)
    base = {name: p.detach().clone() for name, p in bert.model.named_parameters()}
    for steps, weights in zip(GRIDS[axes], weights_at(bert, directions, GRIDS[axes]), strict=True):
        for name, weight in weights.items():
            wanted = base[name] + sum(step * d[name] for step, d in zip(steps, directions, strict=True))
            torch.testing.assert_close(weight, wanted, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("axes", GRIDS)
def test_the_order_of_points_changes_no_bit(axes: int, gpt2: Case):
    there = measured(gpt2, evaluator_of(gpt2, "h.1.", axes=axes), GRIDS[axes])
    back = measured(gpt2, evaluator_of(gpt2, "h.1.", axes=axes), GRIDS[axes][::-1])
    assert bits(there) == bits(back[::-1])


@pytest.mark.parametrize("axes", GRIDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_rounded_once(dtype: torch.dtype, axes: int, bert: Case):
    """No further from the sum in float64 than half the distance to the next number, and a rounding in float32."""
    bert.model.to(dtype)
    directions = along(bert.model, "", axes)
    base = {name: p.detach().double() for name, p in bert.model.named_parameters()}
    info, moved = torch.finfo(dtype), 0
    for steps, weights in zip(GRIDS[axes], weights_at(bert, directions, GRIDS[axes]), strict=True):
        for name, weight in weights.items():
            terms = [step * d[name].double() for step, d in zip(steps, directions, strict=True)]
            exact = base[name] + sum(terms)
            size = base[name].abs() + sum(term.abs() for term in terms)
            half = torch.maximum(exact.abs(), torch.full_like(exact, info.smallest_normal)) * info.eps / 2
            assert ((weight.double() - exact).abs() <= half + 1e-6 * size).all()
            moved += int((weight.double() != base[name]).sum())
    assert moved > 0


def test_narrow_model_is_measured_and_left_bit_identical(bert: Case):
    bert.model.bfloat16()
    before = {name: p.detach().clone() for name, p in bert.model.named_parameters()}
    found = measured(bert, evaluator_of(bert, "layer.1."))
    assert bits(found) == bits(measured(bert, in_full(evaluator_of(bert, "layer.1."))))
    assert all(torch.equal(before[name].view(torch.int16), p.view(torch.int16))
               for name, p in bert.model.named_parameters())  # fmt: skip
    wide = case("bert")
    wide.model.load_state_dict({name: value.double() for name, value in bert.model.state_dict().items()})
    assert math.isclose(found[3].loss, reference.mean_loss(wide.model, wide.examples, "mlm"), rel_tol=0.02)


def test_parameters_that_rest_are_not_even_written(bert: Case):
    evaluator = evaluator_of(bert, "layer.1.")
    resting = {n: p._version for n, p in bert.model.named_parameters() if "layer.1." not in n}
    measured(bert, evaluator)
    assert {n: p._version for n, p in bert.model.named_parameters() if n in resting} == resting


def test_tied_parameter_moves_once(gpt2: Case):
    tied = gpt2.model.get_parameter("transformer.wte.weight")
    assert gpt2.model.get_parameter("lm_head.weight") is tied
    directions = along(gpt2.model, "wte", 1)
    base, move = tied.detach().clone(), directions[0]["transformer.wte.weight"]
    for weights in weights_at(gpt2, directions, [(0.5,)]):
        torch.testing.assert_close(weights["transformer.wte.weight"], base + 0.5 * move, rtol=1e-14, atol=0)


def test_tied_parameter_that_is_moved_reaches_both_its_places(gpt2: Case):
    found = measured(gpt2, evaluator_of(gpt2, "wte", axes=1), [(0.3,)])[0].loss
    direction = along(gpt2.model, "wte", 1)[0]
    with torch.no_grad():
        for name, parameter in gpt2.model.named_parameters():
            parameter += 0.3 * direction[name]
    assert math.isclose(found, reference.mean_loss(gpt2.model, gpt2.examples, "causal-lm"), rel_tol=1e-12)


def predictions_of(made: Case) -> tuple[list[int], list[int]]:
    """Class by class what a model says and what is true, one unpadded example at a time, from full logits."""
    said, true = [], []
    for example in made.examples:
        inputs = {name: value[None] for name, value in example.items() if name != "labels"}
        logits = made.model(**inputs).logits[0].detach()
        labels = example["labels"].reshape(-1)
        for position, label in enumerate(labels.tolist()):
            if label != -100:
                said.append(int((logits if logits.ndim == 1 else logits[position]).argmax()))
                true.append(label)
    return said, true


def counted_accuracy(said: list[int], true: list[int]) -> float:
    return sum(a == b for a, b in zip(said, true, strict=True)) / len(true)


def counted_matthews(said: list[int], true: list[int]) -> float:
    """Gorodkin 2004 from the counts: (c s - sum_k p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2))."""
    s, c = len(true), sum(a == b for a, b in zip(said, true, strict=True))
    p, t = ([values.count(k) for k in range(3)] for values in (said, true))
    below = math.sqrt((s * s - sum(x * x for x in p)) * (s * s - sum(x * x for x in t)))
    return (c * s - sum(x * y for x, y in zip(p, t, strict=True))) / below if below else 0.0


@pytest.mark.parametrize(
    ("name", "metric", "counted"),
    [
        ("bert", "accuracy", counted_accuracy),
        ("gpt2", "accuracy", None),
        ("bert-classifier", "accuracy", counted_accuracy),
        ("bert-classifier", "matthews", counted_matthews),
    ],
)
def test_metrics_are_over_all_scored_tokens(name: str, metric: str, counted: Callable[..., float] | None):
    made = case(name, lengths=(7, 3, 9, 5, 2, 6, 9, 4) * 2)
    if name == "bert":  # so that some are right
        said, _ = predictions_of(made)
        spare = iter(said[::2])
        for example in made.examples[::2]:
            labels = example["labels"]
            example["labels"] = torch.where(labels != -100, next(spare), labels)
    found = measured(made, evaluator_of(made, "", metrics=[metric]), [(0.0, 0.0), (0.4, 0.3)])
    directions = along(made.model, "")
    for steps, point in zip([(0.0, 0.0), (0.4, 0.3)], found, strict=True):
        moved = reference._moved(made.model, list(zip(steps, directions, strict=True)))
        said, true = predictions_of(Case(moved, made.objective, made.examples))
        if made.objective == "causal-lm":
            pairs = [shifted(moved, example) for example in made.examples]
            said, true = ([x for pair in pairs for x in pair[k]] for k in (0, 1))
        assert math.isclose(point.metrics[metric], (counted or counted_accuracy)(said, true), abs_tol=1e-12)


def shifted(model: nn.Module, example: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """What a causal model says of every next token."""
    logits = model(input_ids=example["input_ids"][None]).logits[0].detach()
    return logits[:-1].argmax(-1).tolist(), example["labels"][1:].tolist()


def test_regression_has_metrics_of_numbers():
    made = case("bert-regressor")
    found = measured(made, evaluator_of(made, "", metrics=["pearson"]), [(0.1, 0.2)])[0]
    moved = reference._moved(made.model, list(zip((0.1, 0.2), along(made.model, ""), strict=True)))
    said = [float(moved(input_ids=e["input_ids"][None]).logits.detach()) for e in made.examples]
    true = [float(e["labels"]) for e in made.examples]
    assert math.isclose(found.metrics["pearson"], np.corrcoef(said, true)[0, 1], rel_tol=1e-9)


def test_a_function_of_predictions_is_averaged_over_examples(bert: Case):
    def confidence(predictions: Predictions) -> Tensor:
        likely = predictions.outputs.softmax(-1).amax(-1)
        return torch.where(predictions.labels != -100, likely, 0).sum(1) / predictions.count

    found = measured(bert, evaluator_of(bert, "", metrics=[confidence]), [(0.0, 0.0)])[0]
    values = []
    for example in bert.examples:
        inputs = {name: value[None] for name, value in example.items() if name != "labels"}
        likely = bert.model(**inputs).logits[0].detach().softmax(-1).max(-1).values
        values.append(float(likely[example["labels"] != -100].mean()))
    assert math.isclose(found.metrics["confidence"], sum(values) / len(values), rel_tol=1e-12)


def test_metrics_do_not_change_the_loss(bert: Case):
    plain = measured(bert, evaluator_of(bert, ""))
    with_metrics = measured(bert, evaluator_of(bert, "", metrics=["accuracy"]))
    assert [p.loss for p in plain] == [p.loss for p in with_metrics]


def test_losses_of_examples_add_up_to_the_loss(bert: Case):
    point = measured(bert, evaluator_of(bert, "layer.1.", axes=1, keep_examples=True), [(0.2,)])[0]
    moved = reference._moved(bert.model, [(0.2, along(bert.model, "layer.1.", 1)[0])])
    wanted = [float(reference.example_loss(moved, e, "mlm", "sum").detach()) for e in bert.examples]  # type: ignore
    assert point.examples is not None
    np.testing.assert_allclose(point.examples, wanted, rtol=1e-12)
    tokens = sum(reference.number_scored(e, "mlm") for e in bert.examples)
    assert math.isclose(point.loss, sum(wanted) / tokens, rel_tol=1e-12)


@pytest.mark.parametrize("part", ["", "layer.1."])
def test_points_above_the_ceiling_are_decided_by_their_first_batch(part: str, bert: Case):
    points = [(0.0, 0.0), (0.1, 0.1), (2.0, 2.0), (0.1, 0.2), (3.0, 1.0)]
    whole = measured(bert, evaluator_of(bert, part), points)
    first = measured(bert.with_examples(bert.examples[:3]), evaluator_of(bert.with_examples(bert.examples[:3]), part),
                     points)  # fmt: skip
    ceiling = sorted(point.loss for point in first)[2] + 1e-9
    found = measured(bert, evaluator_of(bert, part, ceiling=ceiling), points)
    for point, beginning, all_batches in zip(found, first, whole, strict=True):
        assert point.clipped == (beginning.loss > ceiling)
        assert point.loss == (beginning.loss if point.clipped else all_batches.loss)
    assert {point.clipped for point in found} == {True, False}


def test_a_clipped_point_runs_one_batch(bert: Case):
    evaluator = evaluator_of(bert, "", ceiling=0.0)
    evaluator._is_checked = True
    assert calls_of(bert.model, lambda: measured(bert, evaluator)) == len(POINTS)


def test_only_a_loss_above_the_ceiling_is_clipped(bert: Case):
    """A first batch exactly at the ceiling is not: a loss is worse than guessing only beyond it."""
    one = bert.with_examples(bert.examples[:1] * 2)
    loss = measured(one, evaluator_of(one, "", batch_size=1), [(0.0, 0.0)])[0].loss
    counts = reference.number_scored(one.examples[0], "mlm")
    exact = (loss * counts) / counts
    assert not measured(one, evaluator_of(one, "", batch_size=1, ceiling=exact * (1 + 1e-12)), [(0.0, 0.0)])[0].clipped
    assert measured(one, evaluator_of(one, "", batch_size=1, ceiling=exact * (1 - 1e-12)), [(0.0, 0.0)])[0].clipped


def test_a_loss_that_is_not_a_number_is_measured_to_the_end(bert: Case):
    point = measured(bert, evaluator_of(bert, "", ceiling=1.0), [(1e300, 1e300)])[0]
    assert not math.isfinite(point.loss) and not point.clipped


def test_a_function_as_objective_is_called_once_per_batch_and_point(bert: Case):
    """It may count, draw or run the model twice, so nothing is kept for it."""
    calls: list[None] = []

    def counting(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        calls.append(None)
        return model(input_ids=batch["input_ids"]).logits.square().mean((1, 2))

    directions = along(bert.model, "layer.1.")
    evaluator = Evaluator(bert.model, batched(bert.examples, 3), counting, directions)
    measured(bert, evaluator)
    assert len(calls) == 3 * len(POINTS)
