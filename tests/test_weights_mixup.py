"""Attention-guided weights mixup (arXiv 2403.12918): the mixture, the gradient through a step, and the search."""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import entry
from conftest import Case, Interrupted, batched, case
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW

from fisherscope.data import Batches
from fisherscope.finetune import METHODS, Regularizer
from fisherscope.finetune.bilevel import hypergradient
from fisherscope.finetune.methods import weights_mixup
from fisherscope.finetune.methods.weights_mixup import WeightsMixup, initial_factors, mixed, mixed_matrices, search
from fisherscope.finetune.parts import reparametrized
from fisherscope.finetune.run import Run
from fisherscope.objectives import predict
from fisherscope.testing import check_regularizer

FORMS = ("convex", "published")
SHORT: dict[str, Any] = {"form": "convex", "splits": 1, "search_epochs": 1.0, "alpha_learning_rate": 2e-3}


def factors_of(model: nn.Module, value: float | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """The same factor everywhere, or as they are before the search."""
    draw, found = np.random.default_rng(0), {}
    for name, axis in mixed_matrices(model).items():
        a, b = initial_factors(model.get_parameter(name), axis, draw)
        found[name] = (a, b) if value is None else (torch.full_like(a, value), torch.full_like(b, value))
    return found


def anchor_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach().clone() for name in mixed_matrices(model)}


def random_factors(model: nn.Module, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.rand(a.shape, generator=draw, dtype=a.dtype), torch.rand(b.shape, generator=draw, dtype=b.dtype))
        for name, (a, b) in factors_of(model).items()
    }


def run_of(found: Case, **settings: Any) -> Run:
    """A run whose settings make a search move something in a few steps."""
    examples = [{name: value.numpy() for name, value in example.items()} for example in found.examples]
    batches = Batches(examples, {}, 2, found.objective, "test", "0" * 16, None, {})
    return Run(found.model, batches, found.objective, 10, 0, settings={"learning_rate": 1e-3, **settings})  # pyright: ignore


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def step(found: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    predict(model, batched(found.examples, 4)[0], found.objective).losses().total.mean().backward()
    optimizer.step()


def outputs(found: Case, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return predict(model, batched(found.examples, 4)[0], found.objective).outputs


class TestMixture:
    """What the model computes with."""

    @pytest.fixture
    def layer(self) -> nn.Module:
        """A linear layer that has a number for a name."""
        return nn.Sequential(nn.Linear(5, 3).double())

    @pytest.fixture
    def anchor(self) -> dict[str, Tensor]:
        """Another weight."""
        return {"0.weight": torch.randn(3, 5, dtype=torch.float64)}

    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    @pytest.mark.parametrize("form", FORMS)
    def test_all_shares_1_is_the_layer_itself(self, layer: Any, anchor: Any, form: Any) -> None:
        """a = b = 1 gives exactly Linear(W), by the formula and by the regularizer."""
        expected, (a, b) = layer(self.x), factors_of(layer, 1.0)["0.weight"]
        assert torch.equal(mixed(layer[0].weight, anchor["0.weight"], a, b, form), layer[0].weight)
        with WeightsMixup({"0.weight": (a, b)}, anchor, form).applied_to(layer, AdamW(layer.parameters())):
            assert torch.equal(layer(self.x), expected)

    @pytest.mark.parametrize("form", FORMS)
    def test_all_shares_0_is_the_anchor_with_the_bias_of_the_layer(self, layer: Any, anchor: Any, form: Any) -> None:
        """a = b = 0 gives W0 x + bias of W."""
        expected = nn.functional.linear(self.x, anchor["0.weight"], layer[0].bias)
        mixup = WeightsMixup(factors_of(layer, 0.0), anchor, form)
        with mixup.applied_to(layer, AdamW(layer.parameters())):
            assert torch.equal(layer(self.x), expected)

    def test_the_convex_form_is_a_weighted_mean_entry_by_entry(self, layer: Any, anchor: Any) -> None:
        """alpha_ij = a_i b_j, against a loop."""
        (a, b), w0, w = random_factors(layer)["0.weight"], anchor["0.weight"], layer[0].weight.detach()
        found = mixed(w, w0, a, b, "convex")
        for i in range(3):
            for j in range(5):
                share = float(a[i, 0] * b[0, j])
                assert float(found[i, j]) == pytest.approx(share * float(w[i, j]) + (1 - share) * float(w0[i, j]))

    def test_the_published_form_does_not_add_up_to_1(self) -> None:
        """Its shares are ab and (1-a)(1-b): at a = b = 1/2 the mixture is (W + W0) / 4."""
        half = torch.full((1, 1), 0.5)
        found = mixed(torch.full((2, 3), 5.0), torch.full((2, 3), 3.0), half, half, "published")
        assert torch.equal(found, torch.full((2, 3), 2.0))

    def test_factors_start_just_below_1(self) -> None:
        """After N(1, 0.005) is clamped, half of them are 1, and the mean is 1 - 0.005/sqrt(2 pi) = 0.998005."""
        a, b = initial_factors(torch.zeros(200_000, 1, dtype=torch.float64), 1, np.random.default_rng(0))
        assert a.shape == (200_000, 1)
        assert b.shape == (1, 1)
        error = 0.005 * math.sqrt(1 / 2 - 1 / (2 * math.pi)) / math.sqrt(len(a))
        assert float(a.mean()) == pytest.approx(1 - 0.005 / math.sqrt(2 * math.pi), abs=4 * error)
        assert float((a == 1).double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(a)))
        assert float(a.max()) == 1.0

    @pytest.mark.parametrize(("shape", "axis", "shapes"), [
        ((3, 5), 1, [(3, 1), (1, 5)]), ((5, 3), 0, [(1, 3), (5, 1)]), ((5, 2, 3), 0, [(1, 2, 3), (5, 1, 1)]),
    ])  # fmt: skip
    def test_a_is_for_outputs_and_b_for_inputs(self, shape: Any, axis: int, shapes: Any) -> None:
        """Wherever a matrix has them: Linear, transposed, and raw parameters with more than two axes."""
        assert [tuple(f.shape) for f in initial_factors(torch.zeros(shape), axis, np.random.default_rng(0))] == shapes


class TestMatrices:
    """Which weights are mixed."""

    def test_those_of_numbered_layers_and_the_pooler_are_mixed(self) -> None:
        """Of a classifier: q, k, v, three projections per layer, and the pooler; no embedding, norm or head."""
        layers = {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                  "intermediate.dense", "output.dense"}  # fmt: skip
        expected = {f"bert.encoder.layer.{i}.{name}.weight" for i in (0, 1) for name in layers}
        assert set(mixed_matrices(case("bert-classifier").model)) == expected | {"bert.pooler.dense.weight"}

    def test_raw_attention_parameters_are_mixed_and_raw_biases_are_not(self) -> None:
        """XLNet keeps its attention in parameters of three axes, next to biases of two."""
        names = {name.rpartition("rel_attn.")[2] for name in mixed_matrices(entry("XLNet", "classification").model)}
        assert {"q", "k", "v", "o", "r"} < names
        assert not {"r_r_bias", "r_s_bias", "r_w_bias", "seg_embed"} & names

    @pytest.mark.parametrize(("name", "count"), [("gpt2", 8), ("t5", 32), ("llama", 14), ("albert", 6)])
    def test_heads_and_embeddings_are_left_out_of_other_models(self, name: str, count: int) -> None:
        """4 matrices per layer, 6 or 10 per layer of two stacks, 7 per layer, and 6 in one shared layer."""
        found = mixed_matrices(case(name).model)
        assert len(found) == count
        assert not [n for n in found if "embed" in n or "head" in n or "norm" in n.lower()]


class TestApplied:
    """The regularizer in a training."""

    def test_shares_of_1_train_as_plain_bit_for_bit(self) -> None:
        """With dropout on, whatever the anchor is."""
        found = case("bert-classifier")
        found.model.train()
        anchor = {name: torch.zeros_like(t) for name, t in anchor_of(found.model).items()}
        ends = []
        for method in (METHODS["vanilla"](), WeightsMixup(factors_of(found.model, 1.0), anchor)):
            model = copy.deepcopy(found.model)
            optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
            torch.manual_seed(1)
            with method.applied_to(model, optimizer):
                for _ in range(4):
                    step(found, model, optimizer)
            ends.append(values(model))
        assert_same(ends[1], ends[0])

    @pytest.mark.parametrize("form", FORMS)
    def test_the_gradient_of_the_weight_is_multiplied_by_its_share(self, form: Any) -> None:
        """dL/dW = ab dL/dW_hat, and the factors and the anchor get none."""
        found = case("bert-classifier", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        anchor = {name: t + 0.1 for name, t in anchor_of(found.model).items()}
        factors = random_factors(found.model)
        plain = copy.deepcopy(found.model)
        for name, (a, b) in factors.items():
            weight = plain.get_parameter(name)
            weight.data.copy_(mixed(weight.data, anchor[name], a, b, form))
        predict(plain, batched(found.examples, 4)[0], found.objective).losses().total.mean().backward()
        with WeightsMixup(factors, anchor, form).applied_to(found.model, AdamW(found.model.parameters())):
            predict(found.model, batched(found.examples, 4)[0], found.objective).losses().total.mean().backward()
        for name, (a, b) in factors.items():
            got, of_mixed = found.model.get_parameter(name).grad, plain.get_parameter(name).grad
            assert float(of_mixed.abs().max()) > 1e-6
            torch.testing.assert_close(got, a * b * of_mixed, rtol=1e-8, atol=1e-14)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("raised", [False, True])
    def test_the_model_computes_the_same_after_the_block(self, form: Any, raised: bool) -> None:
        """The mixed weights are written into the model when the block ends, also by an exception."""
        found = case("bert-classifier")
        mixup = WeightsMixup(random_factors(found.model), anchor_of(found.model), form)
        optimizer = AdamW(found.model.parameters(), lr=1e-2)
        forwards = [vars(module).get("forward") for module in found.model.modules()]
        inside: list[Tensor] = []
        try:
            with mixup.applied_to(found.model, optimizer):
                step(found, found.model, optimizer)
                inside.append(outputs(found, found.model))
                raw = values(found.model)
                if raised:
                    raise Interrupted
        except Interrupted:
            assert raised
        assert torch.equal(outputs(found, found.model), inside[0])
        changed = {name for name, value in values(found.model).items() if not torch.equal(value, raw[name])}
        assert changed == set(mixup.anchor)
        assert [vars(module).get("forward") for module in found.model.modules()] == forwards

    def test_the_state_has_factors_and_anchor(self) -> None:
        """A resumed training computes with those of its checkpoint, not those that it began with."""
        found = case("bert-classifier")
        other = anchor_of(found.model)
        mixup = WeightsMixup(random_factors(found.model), {name: t + 1 for name, t in other.items()})
        start = WeightsMixup(factors_of(found.model, 1.0), other)
        again = copy.deepcopy(found.model)
        with mixup.applied_to(found.model, AdamW(found.model.parameters())) as applied:
            expected = outputs(found, found.model)
            with start.applied_to(again, AdamW(again.parameters())) as resumed:
                assert not torch.allclose(outputs(found, again), expected)
                resumed.load_state_dict(applied.state_dict())
                assert torch.equal(outputs(found, again), expected)

    @pytest.mark.parametrize("architecture", ["BERT", "GPT-2", "XLNet", "T5", "ALBERT"])
    def test_the_promises_of_a_regularizer_are_kept(self, architecture: str) -> None:
        """Neutral at shares of 1, the same in eval mode as after the block, resumed exactly, and more."""
        found = entry(architecture, "classification")
        anchor = {name: t + 0.01 for name, t in anchor_of(found.model).items()}
        check_regularizer(
            WeightsMixup(random_factors(found.model), anchor),
            found.model,
            batched(found.examples[:4], 1),
            objective=found.objective,
            neutral=WeightsMixup(factors_of(found.model, 1.0), anchor),
        )

    def test_what_does_not_fit_is_refused(self) -> None:
        """With what does not fit."""
        ones, w0 = (torch.ones(2, 1), torch.ones(1, 3)), torch.zeros(2, 3)
        with pytest.raises(ValueError, match="form must be one of convex, published, got 'linear'"):
            WeightsMixup({}, {}, "linear")  # pyright: ignore
        with pytest.raises(ValueError, match="only one of them has 'x'"):
            WeightsMixup({"x": ones}, {})
        with pytest.raises(ValueError, match="in \\[0, 1\\], but one of 'x'"):
            WeightsMixup({"x": (ones[0], 2 * ones[1])}, {"x": w0})
        with pytest.raises(ValueError, match="shape \\[2, 3\\], but it has shape \\[3, 2\\]"):
            WeightsMixup({"x": ones}, {"x": w0.T})
        layer = nn.Linear(3, 2)
        for name, anchor, factors in (("other", w0, ones), ("weight", w0.T, (ones[0].T, ones[1].T))):
            with (
                pytest.raises(ValueError, match=f"no matrix '{name}'"),
                WeightsMixup({name: factors}, {name: anchor}).applied_to(layer, AdamW(layer.parameters())),
            ):
                pass


Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def exact_hypergradient(
    weights: Sequence[Tensor], settings: Sequence[Tensor], train: Loss, validation: Loss, learning_rate: float
) -> list[Tensor]:
    """By differentiating through the step."""
    gradients = torch.autograd.grad(train(weights, settings), weights, create_graph=True)
    moved = [w - learning_rate * g for w, g in zip(weights, gradients, strict=True)]
    return list(torch.autograd.grad(validation(moved, settings), settings))


class TestHypergradient:
    """DARTS (arXiv 1806.09055), equations 7 and 8, on problems that autograd can differentiate twice."""

    @pytest.fixture
    def problem(self) -> tuple[list[Tensor], list[Tensor], Loss, Loss]:
        """A network of two layers whose first weight is scaled by the settings."""

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64)

        weights = [numbers(4, 3).requires_grad_(), numbers(1, 4).requires_grad_()]
        settings = [torch.rand(4, 1, dtype=torch.float64).requires_grad_()]

        def loss(x: Tensor, y: Tensor) -> Loss:
            return lambda w, a: ((x @ (a[0] * w[0]).T).tanh() @ w[1].T - y).square().mean()

        return weights, settings, loss(numbers(8, 3), numbers(8, 1)), loss(numbers(8, 3), numbers(8, 1))

    def test_the_error_falls_as_the_square_of_the_shift(self, problem: Any) -> None:
        """A tenth of the shift has a hundredth of the error."""
        weights, settings, train, validation = problem
        exact = exact_hypergradient(weights, settings, train, validation, 0.5)[0]
        losses = lambda: train(weights, settings), lambda: validation(weights, settings)
        errors = []
        for shift in (0.3, 0.03, 0.003):
            found = hypergradient(weights, settings, *losses, 0.5, shift=shift)[0]
            errors.append(float((found - exact).norm() / exact.norm()))
        assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)
        assert errors[1] / errors[2] == pytest.approx(100, rel=0.1)
        assert errors[2] < 1e-6

    def test_the_learning_rate_multiplies_the_indirect_part(self, problem: Any) -> None:
        """As derived, and unlike Betty 0.2: at a rate of 0 the gradient is the direct one."""
        weights, settings, train, validation = problem
        losses = lambda: train(weights, settings), lambda: validation(weights, settings)
        direct = torch.autograd.grad(validation(weights, settings), settings)[0]
        assert torch.equal(hypergradient(weights, settings, *losses, 0.0)[0], direct)
        small = hypergradient(weights, settings, *losses, 1e-4)[0]
        exact = exact_hypergradient(weights, settings, train, validation, 1e-4)[0]
        torch.testing.assert_close(small - direct, exact - direct, rtol=1e-3, atol=0)

    def test_settings_that_the_training_loss_does_not_depend_on_have_no_indirect_part(self, problem: Any) -> None:
        """Then the gradient is that of the validation loss after the step."""
        weights, settings, train, validation = problem
        fixed = [settings[0].detach().clone()]
        found = hypergradient(
            weights, settings, lambda: train(weights, fixed), lambda: validation(weights, settings), 0.5
        )
        gradients = torch.autograd.grad(train(weights, fixed), weights)
        moved = [w - 0.5 * g for w, g in zip(weights, gradients, strict=True)]
        torch.testing.assert_close(found[0], torch.autograd.grad(validation(moved, settings), settings)[0])

    @pytest.mark.parametrize("fails_at", [None, 1, 2, 3, 4])
    def test_weights_have_the_bits_they_had(self, problem: Any, fails_at: int | None) -> None:
        """Restored by copying, also when a loss raises; in float32, where arithmetic would not do it."""
        weights, settings = ([t.detach().float().requires_grad_() for t in found] for found in problem[:2])
        x, y = torch.randn(8, 3), torch.randn(8, 1)
        before, calls = [w.detach().clone() for w in weights], []

        def loss() -> Tensor:
            calls.append([w.detach().clone() for w in weights])
            if len(calls) == fails_at:
                raise Interrupted
            return ((x @ (settings[0] * weights[0]).T).tanh() @ weights[1].T - y).square().mean()

        try:
            hypergradient(weights, settings, loss, loss, 0.5)
        except Interrupted:
            assert fails_at is not None
        assert len(calls) == (fails_at or 4)
        assert all(map(torch.equal, weights, before))
        assert all(not torch.equal(seen[0], before[0]) for seen in calls[1:])
        assert all(w.grad is None for w in weights)

    def test_a_validation_loss_without_a_gradient_is_no_error(self, problem: Any) -> None:
        """At a minimum there is no direction to shift the weights in."""
        weights, settings, train, _ = problem
        found = hypergradient(weights, settings, lambda: train(weights, settings), lambda: torch.zeros(()), 0.5)
        assert torch.equal(found[0], torch.zeros_like(settings[0]))

    def test_it_is_the_exact_one_on_a_transformer(self) -> None:
        """All factors of a tiny classifier, through the modules that the search changes."""
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
        found = case("bert-classifier", **off)
        model, batches = found.model, batched(found.examples, 4)
        anchor = {name: t + 0.1 * torch.randn_like(t) for name, t in anchor_of(model).items()}
        pairs = random_factors(model)
        factors = [f.requires_grad_() for pair in pairs.values() for f in pair]
        names, weights = zip(*model.named_parameters(), strict=True)
        functions = {
            name: lambda w, name=name: mixed(w, anchor[name], *pairs[name], "convex")  # pyright: ignore
            for name in pairs
        }

        def computed(batch: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
            used = {n: functions[n](t) if n in functions else t for n, t in zip(names, tensors, strict=True)}  # pyright: ignore
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            logits = functional_call(model, used, args=(), kwargs=inputs).logits
            return nn.functional.cross_entropy(logits, batch["labels"])

        exact = exact_hypergradient(
            weights, factors, lambda w, _: computed(batches[0], w), lambda w, _: computed(batches[1], w), 0.3
        )
        with reparametrized(model, functions):
            losses = [
                lambda batch=batch: predict(model, batch, found.objective).losses().total.mean() for batch in batches
            ]
            got = hypergradient(weights, factors, losses[0], losses[1], 0.3, shift=0.001)
            none = hypergradient(weights, factors, losses[0], losses[1], 0.0)
        found_all, exact_all, none_all = (torch.cat([t.flatten() for t in ts]) for ts in (got, exact, none))
        assert float((none_all - exact_all).norm() / exact_all.norm()) > 0.01
        assert float((found_all - exact_all).norm() / exact_all.norm()) < 1e-5


class TestSearch:
    """Bilevel training for the factors."""

    @pytest.mark.parametrize("architecture", ["BERT", "RoBERTa", "BART", "DeBERTa-v2", "XLNet", "GPT-2", "T5"])
    def test_a_run_prepares_it_for_every_kind_of_model(self, architecture: str) -> None:
        """Factors in [0, 1] that moved, the pretrained matrices as anchor, and a model that trains on with them."""
        found = entry(architecture, "classification")
        before = values(found.model)
        modes = [module.training for module in found.model.modules()]
        mixup = WeightsMixup.for_run(run_of(found), splits=1, search_epochs=1.0)
        assert_same(mixup.anchor, {name: before[name] for name in mixup.factors})
        started = {
            name: initial_factors(before[name], axis, draw)
            for draw in [np.random.default_rng((0, 0))]
            for name, axis in mixed_matrices(found.model).items()
        }
        assert set(mixup.factors) == set(started)
        for name, pair in mixup.factors.items():
            assert not all(map(torch.equal, pair, started[name]))
            assert all(float(f.max()) <= 1 and not f.requires_grad for f in pair)
        moved = [name for name, value in values(found.model).items() if not torch.equal(value, before[name])]
        assert set(mixup.factors) <= set(moved)
        assert [module.training for module in found.model.modules()] == modes
        assert all(p.grad is None for p in found.model.parameters())
        optimizer = AdamW(found.model.parameters(), lr=1e-3)
        with mixup.applied_to(found.model, optimizer):
            step(found.with_examples(found.examples[:1]), found.model, optimizer)

    def test_it_equals_one_iteration_written_out(self) -> None:
        """A step of AdamW for the factors by the exact hypergradient, then one for the weights of the mixed model."""
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
        found = case("bert-classifier", lengths=(7, 3), **off)  # one example to train on, one to validate on
        slow = copy.deepcopy(found.model)
        anchor, axes = anchor_of(slow), mixed_matrices(slow)
        factors, _ = search(run_of(found, weight_decay=0.1, max_grad_norm=0.5), **SHORT)

        draw = np.random.default_rng((0, 0))
        pairs = {name: initial_factors(anchor[name], axis, draw) for name, axis in axes.items()}
        order = draw.permutation(2)
        train, validation = (batched([found.examples[i]], 1)[0] for i in order)
        alphas = [f.requires_grad_() for pair in pairs.values() for f in pair]
        names, weights = zip(*slow.named_parameters(), strict=True)

        def loss(batch: Mapping[str, Tensor]) -> Callable[..., Tensor]:
            def of(tensors: Sequence[Tensor], _: object = None) -> Tensor:
                used = dict(zip(names, tensors, strict=True))
                for name, (a, b) in pairs.items():
                    used[name] = a * b * used[name] + (1 - a * b) * anchor[name]
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                logits = functional_call(slow, used, args=(), kwargs=inputs).logits
                return nn.functional.cross_entropy(logits, batch["labels"])

            return of

        exact = exact_hypergradient(weights, alphas, loss(train), loss(validation), 1e-3)
        upper = AdamW(alphas, lr=2e-3, weight_decay=0.0)
        for alpha, gradient in zip(alphas, exact, strict=True):
            alpha.grad = gradient
        upper.step()
        for alpha in alphas:
            alpha.data.clamp_(0, 1)
        groups = [[w for w in weights if (w.ndim > 1) == matrices] for matrices in (True, False)]
        lower = AdamW([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-3)
        for weight, gradient in zip(weights, torch.autograd.grad(loss(train)(weights), weights), strict=True):
            weight.grad = gradient
        nn.utils.clip_grad_norm_(weights, 0.5)
        lower.step()
        for name, pair in pairs.items():
            for got, expected in zip(factors[name], pair, strict=True):
                # a step of Adam is some 2e-3 however small the gradient is, and so are the finite difference's errors
                torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-4)
        for name, weight in zip(names, weights, strict=True):
            torch.testing.assert_close(found.model.get_parameter(name), weight, rtol=0, atol=1e-5)

    def test_weights_and_factors_are_averaged_over_splits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of K splits that all start from the same weights; one split alone is its own mean."""
        start = case("bert-classifier")
        alone = []
        generator = np.random.default_rng
        for number in range(2):
            found = case("bert-classifier")
            with monkeypatch.context() as patch:  # the only split of this search is drawn as that of another number
                patch.setattr(np.random, "default_rng", lambda key, n=number: generator((key[0], key[1] + n)))
                alone.append((search(run_of(found), **SHORT)[0], values(found.model)))
        both = case("bert-classifier")
        factors, anchor = search(run_of(both), **SHORT | {"splits": 2})
        assert_same(anchor, anchor_of(start.model))
        (first, first_values), (second, second_values) = alone
        for name, pair in factors.items():
            assert not torch.equal(first[name][1], second[name][1])
            for i in (0, 1):
                torch.testing.assert_close(pair[i], (first[name][i] + second[name][i]) / 2)
        for name, value in values(both.model).items():
            torch.testing.assert_close(value, (first_values[name] + second_values[name]) / 2)

    def test_it_leaves_the_global_generator_alone_and_repeats_itself(self) -> None:
        """Dropout in the search is drawn from the seed of the run."""
        ends = []
        for seed in (1, 2):
            found = case("bert-classifier")
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            factors, _ = search(run_of(found), **SHORT)
            assert torch.equal(torch.get_rng_state(), before)
            ends.append(values(found.model) | {f"{n} {i}": pair[i] for n, pair in factors.items() for i in (0, 1)})
        assert_same(ends[1], ends[0])

    def test_another_seed_searches_otherwise(self) -> None:
        """Splits and factors are drawn from the seed of the run."""
        one, two = (search(replace(run_of(case("bert-classifier")), seed=seed), **SHORT)[0] for seed in (0, 1))
        assert all(not torch.equal(one[name][0], two[name][0]) for name in one)

    def test_all_passes_of_a_step_have_the_same_dropout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The finite difference would be noise otherwise."""
        equal = []

        def spied(weights: Any, settings: Any, train: Any, validation: Any, rate: float) -> list[Tensor]:
            del validation, rate
            equal.append((train().item(), train().item()))
            return [torch.zeros_like(s) for s in settings]

        monkeypatch.setattr(weights_mixup, "hypergradient", spied)
        found = case("bert-classifier", hidden_dropout_prob=0.4)
        search(run_of(found), **SHORT)
        assert len(equal) == 3
        assert all(a == b for a, b in equal)
        assert len(set(equal)) == 3

    def test_training_and_validation_examples_are_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """80 % and 20 % of the examples; every one of the larger part is used once per pass."""
        seen: dict[str, list[int]] = {"train": [], "validation": []}

        def noted(self: Any, training: Any, validation: Any) -> None:
            del self
            seen["train"] += training["input_ids"][:, 0].tolist()
            seen["validation"] += validation["input_ids"][:, 0].tolist()

        monkeypatch.setattr(weights_mixup._Search, "step", noted)
        found = case("bert-classifier", lengths=(4,) * 10)
        for number, example in enumerate(found.examples):
            example["input_ids"][0] = number
        search(run_of(found, batch_size=4), **SHORT | {"search_epochs": 2.0})
        assert sorted(seen["train"]) == sorted(2 * sorted(set(seen["train"])))
        assert len(set(seen["train"])) == 8
        assert set(seen["train"]) | set(seen["validation"]) == set(range(10))
        assert not set(seen["train"]) & set(seen["validation"])

    def test_an_interrupted_search_leaves_the_weights_as_they_were(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every bit and every flag, also in the second split."""
        found = case("bert-classifier")
        before, calls = values(found.model), []
        original = weights_mixup._Search.step

        def stopping(self: Any, training: Any, validation: Any) -> None:
            calls.append(0)
            if len(calls) == 5:
                raise Interrupted
            original(self, training, validation)

        monkeypatch.setattr(weights_mixup._Search, "step", stopping)
        with pytest.raises(Interrupted):
            search(run_of(found), **SHORT | {"splits": 2})
        assert_same(values(found.model), before)
        assert not found.model.training
        assert not any("forward" in vars(module) for module in found.model.modules())

    def test_every_split_is_one_line_of_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        """With the mean share that was found."""
        with caplog.at_level(logging.INFO, logger="fisherscope"):
            search(run_of(case("bert-classifier")), **SHORT | {"splits": 2})
        lines = [record.getMessage() for record in caplog.records]
        assert [line.partition(":")[0] for line in lines] == ["Searched on split 1 of 2", "Searched on split 2 of 2"]

    @pytest.mark.parametrize(("setting", "value", "message"), [
        ("splits", 0, "splits must be at least 1, got 0"), ("search_epochs", 0.0, "search_epochs must be above 0"),
        ("alpha_learning_rate", -1.0, "above 0, got -1.0"), ("form", "other", "form must be one of"),
    ])  # fmt: skip
    def test_settings_out_of_range_are_refused(self, setting: str, value: Any, message: str) -> None:
        """Before anything is computed."""
        with pytest.raises(ValueError, match=message):
            WeightsMixup.for_run(run_of(case("bert-classifier")), **{setting: value})

    def test_too_few_examples_and_models_without_layers_are_refused(self) -> None:
        """A split needs two parts, and the mixture a matrix."""
        with pytest.raises(ValueError, match="at least 2 examples for its split, but there are 1"):
            WeightsMixup.for_run(run_of(case("bert-classifier", lengths=(4,))))
        lone = Case(nn.Linear(3, 2), "classification", [])
        with pytest.raises(ValueError, match="Linear has no matrix in a numbered layer"):
            WeightsMixup.for_run(run_of(lone))

    def test_its_settings_are_those_of_the_search(self) -> None:
        """Factors and anchor come from the search."""
        defaults = {name: parameter.default for name, parameter in METHODS["weights-mixup"].settings().items()}
        assert defaults == {"form": "convex", "splits": 5, "search_epochs": 3.0, "alpha_learning_rate": 2e-3}
        assert issubclass(METHODS["weights-mixup"], Regularizer)
