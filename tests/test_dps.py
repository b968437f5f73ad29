"""DPS Dense and Mix (arXiv 2211.01642): two stages that take turns, against the same written out step by step."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from architectures import checkpointed, entry
from conftest import Case, batched, case
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fisherscope.finetune import METHODS, Regularizer
from fisherscope.finetune.methods import dps
from fisherscope.finetune.methods.dps import DPSDense, DPSMix, stage, stage_length
from fisherscope.finetune.parts import weight_matrices
from fisherscope.objectives import predict
from fisherscope.testing import check_regularizer

DROP = 0.3


def made(name: str = "bert-classifier") -> Case:
    """A tiny model in training mode, with its dropout."""
    found = case(name)
    found.model.train()
    return found


def still(name: str = "bert-classifier") -> Case:
    """The same without dropout, as published."""
    found = case(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    found.model.train()
    return found


def step(found: Case, model: nn.Module, optimizer: Optimizer, number: int, micro: int = 1) -> None:
    """One optimizer step on four examples, in so many parts."""
    start = 4 * (number % 2)
    optimizer.zero_grad()
    for batch in batched(found.examples[start : start + 4], 4 // micro):
        (predict(model, batch, found.objective).losses().total.sum() / 4).backward()
    optimizer.step()


def trained(found: Case, method: Regularizer, steps: int, micro: int = 1) -> dict[str, Tensor]:
    model = copy.deepcopy(found.model)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    torch.manual_seed(5)
    with method.applied_to(model, optimizer):
        for number in range(steps):
            step(found, model, optimizer, number, micro)
    return values(model)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(("length", "second"), [(34, [*range(35, 69), *range(103, 106)]), (1, [*range(2, 106, 2)])])
def test_stages_of_the_published_lengths_take_turns(length: int, second: list[int]) -> None:
    """A stage of 34 steps is 1..34, 35..68, …; of 1 step, every other one is a second stage."""
    assert [step + 1 for step in range(105) if stage(step, length) == 2] == second


@pytest.mark.parametrize(
    ("total", "ratio", "length"),
    [(690, 0.05, 34), (468, 0.05, 23), (1080, 0.05, 54), (1605, 0.05, 80), (32, 0.05, 1), (63, 0.05, 3), (3, 0.05, 1)],
)
def test_the_stage_lengths_are_those_of_the_published_runs(total: int, ratio: float, length: int) -> None:
    """MRPC, RTE, STS-B, CoLA, 500 and 1000 examples; never 0."""
    assert stage_length(total, ratio) == length


@pytest.mark.parametrize("architecture", ["BERT", "RoBERTa", "XLNet", "GPT-2", "T5", "BART", "DeBERTa-v2", "Mixtral"])
def test_all_matrices_but_embeddings_biases_and_norms_are_selected(architecture: str) -> None:
    """The matrices are all parameters of two axes or more that no embedding or convolution has and no name calls so."""
    model = entry(architecture, "classification").model
    kinds = {f"{path}.{a}": type(m) for path, m in model.named_modules() for a in m._parameters}
    expected = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
        and not issubclass(kinds[name], (nn.Embedding, nn.Conv1d))
        and not name.endswith(("bias", "embed", "mask_emb"))
    }
    assert set(weight_matrices(model)) == expected


def test_the_axis_of_the_inputs_is_found() -> None:
    """Linear stores [out, in], Conv1D of transformers [in, out], raw parameters with three axes [in, ...]."""
    gpt2, xlnet = (entry(name, "classification").model for name in ("GPT-2", "XLNet"))
    assert {name.split(".")[-2]: axis for name, axis in weight_matrices(gpt2).items()} == {
        "c_attn": 0, "c_proj": 0, "c_fc": 0, "score": 1,
    }  # fmt: skip
    assert {name.split(".")[-1]: axis for name, axis in weight_matrices(xlnet).items()} == {
        "q": 0, "k": 0, "v": 0, "o": 0, "r": 0, "weight": 1,
    }  # fmt: skip


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.3, 0.8, 0.9])
@pytest.mark.parametrize("method", [DPSDense, DPSMix])
def test_exactly_the_share_that_is_not_dropped_is_kept_in_every_matrix(method: Any, drop: float) -> None:
    """Of n entries ceil(n (1 - p)), although the published flag for p is called reserve_p."""
    found = made()
    optimizer = SGD(found.model.parameters(), lr=1e-3)
    settings = {"seed": 0} if method is DPSMix else {}
    with method(20, drop=drop, **settings).applied_to(found.model, optimizer) as stages:
        assert not stages.masks
        step(found, found.model, optimizer, 0)
        kept = {name: int(stages.masks[p].sum()) for name, p in stages.weights.items()}
        step(found, found.model, optimizer, 1)
        assert not stages.masks
    exact = {name: -(-p.numel() * (10 - round(10 * drop)) // 10) for name, p in stages.weights.items()}
    assert len(kept) == 14
    assert kept == exact


def test_ties_are_broken_by_position() -> None:
    """Of equal scores the earlier ones are kept, so that the share is exact."""
    layer = nn.Linear(5, 2)
    optimizer = SGD(layer.parameters(), lr=0.0)
    with DPSDense(2, 0.5, 0.5).applied_to(layer, optimizer) as stages:
        layer(torch.ones(1, 5)).sum().backward()
        optimizer.step()
        assert stages.masks[layer.weight].tolist() == [[True] * 5, [False] * 5]


@pytest.mark.parametrize("method", [DPSDense(2, 0.5, 0.5), DPSMix(2, 0, 0.5, 0.5)])
def test_a_matrix_without_a_gradient_is_left_as_it_is(method: Regularizer) -> None:
    """There is nothing to choose by in a module that the first stage never used."""
    used, unused = nn.Linear(3, 2), nn.Linear(3, 2)
    both = nn.ModuleList([used, unused])
    optimizer = SGD(both.parameters(), lr=0.1)
    with method.applied_to(both, optimizer) as stages:
        used(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert stages.masks.keys() == {used.weight}
        unused(torch.ones(1, 3)).sum().backward()
        assert unused.weight.grad.tolist() == [[1.0] * 3] * 2


def test_dense_equals_the_method_written_out() -> None:
    """Sums of squared clipped gradients from 0 in every first stage; their largest entries mask the second one's."""
    found, length = still(), 2
    fast, slow = copy.deepcopy(found.model), copy.deepcopy(found.model)
    optimizer = AdamW(fast.parameters(), lr=1e-3, weight_decay=0.1)
    reference = AdamW(slow.parameters(), lr=1e-3, weight_decay=0.1)
    names = weight_matrices(slow)
    sums: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    with DPSDense(2 * 20, DROP).applied_to(fast, optimizer):
        for number in range(9):
            batch = batched(found.examples, 4)[number % 2]
            optimizer.zero_grad()
            predict(fast, batch, found.objective).losses().total.mean().backward()
            nn.utils.clip_grad_norm_(fast.parameters(), 0.5)
            optimizer.step()

            reference.zero_grad()
            predict(slow, batch, found.objective).losses().total.mean().backward()
            second = (number // length) % 2 == 1
            if second and number % length == 0:
                for name in names:
                    order = sums[name].flatten().sort(descending=True, stable=True).indices
                    masks[name] = torch.zeros(len(order), dtype=torch.bool)
                    masks[name][order[: math.ceil(len(order) * 0.7)]] = True
            if second:
                for name in names:
                    slow.get_parameter(name).grad.mul_(masks[name].view(sums[name].shape))
            nn.utils.clip_grad_norm_(slow.parameters(), 0.5)
            if not second:
                for name in names:
                    square = slow.get_parameter(name).grad ** 2
                    sums[name] = square if number % length == 0 else sums[name] + square
            reference.step()
    assert_same(values(fast), values(slow))


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_mix_equals_the_method_written_out(name: str) -> None:
    """The published formulas with the method's own draws, in a model whose weights are replaced by hand."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
    found = case(name, **dropout) if dropout else still(name)
    found.model.train()
    fast, slow = copy.deepcopy(found.model), copy.deepcopy(found.model)
    optimizer, reference = (SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (fast, slow))
    axes, length = weight_matrices(slow), 2
    first = {n: slow.get_parameter(n).detach().clone() for n in axes}
    sums, times, masks, second = {}, {}, {}, {}
    with DPSMix(2 * 20, 7, DROP).applied_to(fast, optimizer):
        for number in range(7):
            step(found, fast, optimizer, number)

            two = (number // length) % 2 == 1
            plain = {n: slow.get_parameter(n).detach().clone() for n in axes}
            kept, used = {}, {}
            for place, (n, axis) in enumerate(axes.items()):
                w = plain[n]
                if two and number % length == 0:
                    second[n] = w
                    order = (sums[n] / times[n].clamp(min=1)).flatten().sort(descending=True, stable=True).indices
                    masks[n] = torch.zeros(len(order), dtype=torch.bool)
                    masks[n][order[: math.ceil(len(order) * 0.7)]] = True
                    masks[n] = masks[n].view(w.shape).double()
                noise = np.random.default_rng((7, number, place)).random(w.shape[axis]) >= DROP
                column = torch.from_numpy(noise).double().view([-1 if a == axis else 1 for a in range(w.ndim)])
                kept[n] = masks[n] if two else column.expand(w.shape)
                t = second[n] if two else first[n]
                used[n] = ((1 - kept[n]) * t + kept[n] * w - DROP * t) / (1 - DROP)
                slow.get_parameter(n).data.copy_(used[n])
            start = 4 * (number % 2)
            reference.zero_grad()
            batch = batched(found.examples[start : start + 4], 4)[0]
            (predict(slow, batch, found.objective).losses().total.sum() / 4).backward()
            for n in axes:
                parameter = slow.get_parameter(n)
                parameter.data.copy_(plain[n])
                parameter.grad.mul_(kept[n])
                if not two:
                    began = number % length == 0
                    sums[n] = parameter.grad**2 + (0 if began else sums[n])
                    times[n] = kept[n] + (0 if began else times[n])
            reference.step()
    for n, value in values(slow).items():
        torch.testing.assert_close(fast.get_parameter(n).detach(), value, rtol=1e-9, atol=1e-12, msg=n)


def test_the_mixed_weight_has_the_weight_as_its_mean() -> None:
    """Over the draws of many steps, to within four standard errors."""
    layer = nn.Linear(6, 4).double()
    with DPSMix(100, 0, DROP).applied_to(layer, SGD(layer.parameters(), lr=0.1)) as stages:
        with torch.no_grad():
            layer.weight += 1
        draws = []
        for number in range(10, 4010, 10):  # the first step of a first stage
            stages.step = number
            draws.append(stages.mixed("weight", layer.weight).detach())
    found = torch.stack(draws)
    error = found.std(0) / math.sqrt(len(draws))
    assert bool((error > 0).all())
    assert bool(((found.mean(0) - layer.weight).abs() < 4 * error).all())


def test_a_draw_is_one_number_per_input_column_and_differs_by_step_matrix_and_seed() -> None:
    """All outputs share it; a fresh one is drawn for every step."""
    both = nn.Sequential(nn.Linear(64, 5), nn.Linear(64, 5))

    def draw(seed: int, step: int, name: str) -> Tensor:
        with DPSMix(100, seed).applied_to(both, SGD(both.parameters(), lr=0.1)) as stages:
            stages.step = step
            return stages.draw(name)

    base = draw(0, 0, "0.weight")
    assert base.shape == (1, 64)
    assert 20 < int(base.sum()) < 64
    assert torch.equal(base, draw(0, 0, "0.weight"))
    for other in (draw(1, 0, "0.weight"), draw(0, 1, "0.weight"), draw(0, 0, "1.weight")):
        assert not torch.equal(base, other)


def test_the_gradient_passes_unscaled_where_the_weight_is_mixed_in() -> None:
    """It is the gradient for the mixed weight times N, without the factor 1/(1 - p) of the formula."""
    layer = nn.Linear(8, 3).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    with DPSMix(100, 3, DROP).applied_to(layer, SGD(layer.parameters(), lr=0.1)) as stages:
        kept = stages.draw("weight")
        layer(x).sum().backward()
    assert 0 < int(kept.sum()) < 8
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(3, -1) * kept, rtol=1e-12, atol=0)


def test_the_mixed_weight_is_the_weight_right_after_the_snapshot() -> None:
    """The second stage starts with bit for bit the weights that the first one ended with."""
    found = made()
    found.model.float()
    optimizer = AdamW(found.model.parameters(), lr=1e-2)
    with DPSMix(20, 0, DROP).applied_to(found.model, optimizer) as stages:
        step(found, found.model, optimizer, 0)
        assert stages.step == 1
        for name, weight in stages.weights.items():
            mixed = stages.mixed(name, weight)
            assert mixed is not weight
            assert torch.equal(mixed, weight)


def test_often_drawn_columns_score_lower_in_long_stages() -> None:
    """The mean squared gradient times exp(-f/u) from u = 50 on, and without that factor below."""
    layer = nn.Linear(4, 3).double()
    total = torch.rand(3, 4, dtype=torch.float64)
    times = torch.tensor([[0, 1, 30, 50]])
    for steps, factor in ((980, 1.0), (1000, torch.exp(-times / 50))):
        with DPSMix(steps, 0).applied_to(layer, SGD(layer.parameters(), lr=0.1)) as stages:
            stages.drawn = {"weight": times}
            expected = total / torch.tensor([[1, 1, 30, 50]]) * factor
            torch.testing.assert_close(stages.score("weight", total), expected)


def test_draws_are_counted_by_column() -> None:
    """After a stage of three steps, each column counts the steps that drew it."""
    layer = nn.Linear(6, 2)
    optimizer = SGD(layer.parameters(), lr=0.1)
    with DPSMix(80, 0, 0.5).applied_to(layer, optimizer) as stages:
        expected = torch.zeros(1, 6, dtype=torch.int)
        for _ in range(3):
            expected += stages.draw("weight")
            layer(torch.ones(1, 6)).sum().backward()
            optimizer.step()
        assert torch.equal(stages.drawn["weight"], expected)
        assert len(expected.unique()) > 1


@pytest.mark.parametrize("method", [DPSDense(4, 0.0, 0.25), DPSMix(4, 0, 0.0, 0.25)])
def test_nothing_dropped_is_plain_training_bit_for_bit(method: Regularizer) -> None:
    """p = 0 in both stages, with the model's dropout on."""
    found = made()
    assert_same(trained(found, method, 4), trained(found, METHODS["vanilla"](), 4))


@pytest.mark.parametrize("method", [DPSDense(40), DPSMix(40, 0)])
def test_gradient_accumulation_changes_nothing(method: Regularizer) -> None:
    """Four micro-batches of one example make the updates of one batch of four, over both stages."""
    found = still()
    whole, parts = (trained(found, method, 4, micro) for micro in (1, 4))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_draw_the_same(reentrant: bool) -> None:
    """Gradient checkpointing changes nothing: the draw belongs to the step, not to the forward pass."""
    found, again = still(), still()
    checkpointed(again.model, reentrant)
    plain, recomputed = (dict(one_step(chosen, DPSMix(40, 0))) for chosen in (found, again))
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-9, atol=1e-12, msg=name)


def one_step(found: Case, method: Regularizer) -> dict[str, Tensor]:
    """Gradients of the first step."""
    optimizer = SGD(found.model.parameters(), lr=0.1)
    with method.applied_to(found.model, optimizer):
        step(found, found.model, optimizer, 0)
    return gradients(found.model)


@pytest.mark.parametrize("done", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("method", [DPSDense(40), DPSMix(40, 0)])
def test_a_resumed_training_goes_on_bit_for_bit(method: Regularizer, done: int) -> None:
    """From its state, in the middle of either stage and where one ends; the stages are two steps long."""
    found = made()
    expected = trained(found, method, 7)
    model = copy.deepcopy(found.model)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    torch.manual_seed(5)
    with method.applied_to(model, optimizer) as stages:
        for number in range(done):
            step(found, model, optimizer, number)
        saved = copy.deepcopy((stages.state_dict(), model.state_dict(), optimizer.state_dict()))
    again = copy.deepcopy(found.model)
    again.load_state_dict(saved[1])
    optimizer = AdamW(again.parameters(), lr=1e-3, weight_decay=0.1)
    optimizer.load_state_dict(saved[2])
    with method.applied_to(again, optimizer) as stages:
        stages.load_state_dict(saved[0])
        for number in range(done, 7):
            step(found, again, optimizer, number)
    assert_same(values(again), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_scored_unscaled_and_skipped_steps_do_not_count(fused: bool) -> None:
    """A loss scale changes no sum; a step that it skips for an overflow belongs to no stage."""
    layer = nn.Linear(3, 2)
    optimizer = AdamW(layer.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with DPSDense(40).applied_to(layer, optimizer) as stages:
        for size in (math.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(layer(torch.full((1, 3), size)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert stages.step == 1
        torch.testing.assert_close(stages.sums["weight"], torch.ones(2, 3))


def test_evaluation_uses_the_plain_weights() -> None:
    """In eval mode DPS Mix changes nothing, in either stage."""
    found = made()
    optimizer = AdamW(found.model.parameters(), lr=1e-2)
    batch = batched(found.examples, 4)[0]
    with DPSMix(20, 0, DROP).applied_to(found.model, optimizer):
        for number in range(2):
            step(found, found.model, optimizer, number)
            plain = copy.deepcopy(found.model.state_dict())
            found.model.eval()
            inside = predict(found.model, batch, found.objective).outputs
            other = case("bert-classifier").model
            other.load_state_dict(plain)
            assert torch.equal(inside, predict(other, batch, found.objective).outputs)
            found.model.train()


@pytest.mark.parametrize("architecture", ["BERT", "ALBERT", "GPT-2", "T5", "BART", "XLNet"])
@pytest.mark.parametrize("method", ["dps-dense", "dps-mix"])
def test_the_promises_of_a_regularizer_are_kept(method: str, architecture: str) -> None:
    """Neutral at p = 0, restored exactly, resumed exactly, and more, on other architectures."""
    found = entry(architecture, "classification")
    made_by = {"dps-dense": lambda p: DPSDense(2, p, 0.5), "dps-mix": lambda p: DPSMix(2, 0, p, 0.5)}[method]
    batches = batched(found.examples[:4], 1)
    check_regularizer(made_by(DROP), found.model, batches, objective=found.objective, neutral=made_by(0.0))


@pytest.mark.parametrize("method", [DPSDense, DPSMix])
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"drop": 1.0}, "below 1; got 1.0"), ({"drop": -0.1}, "at least 0"), ({"update_ratio": 0.0}, "above 0"),
     ({"update_ratio": 1.5}, "at most 1; got 1.5"), ({"total_steps": 0}, "total_steps must be at least 1, got 0")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(method: Any, settings: dict[str, Any], message: str) -> None:
    """With the range and what was found."""
    seed = {"seed": 0} if method is DPSMix else {}
    with pytest.raises(ValueError, match=message):
        method(**({"total_steps": 10} | seed | settings))


def test_a_model_without_matrices_is_refused() -> None:
    """There is nothing to choose from in a norm."""
    norm = nn.LayerNorm(3)
    with (
        pytest.raises(ValueError, match="LayerNorm has none"),
        DPSDense(10).applied_to(norm, SGD(norm.parameters(), lr=0.1)),
    ):
        pass


def test_the_settings_are_the_share_and_the_length() -> None:
    """Steps and seed come from the run."""
    for name in ("dps-dense", "dps-mix"):
        assert {n: p.default for n, p in METHODS[name].settings().items()} == {"drop": 0.3, "update_ratio": 0.05}
    assert dps.PENALIZED_FROM == 50
