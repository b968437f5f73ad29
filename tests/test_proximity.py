"""Methods that stay near the pretrained weights, or leave them: decay, penalty, RecAdam, Mixout, Re-init."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import entry
from conftest import Case, batched
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import fisherscope as fs
from fisherscope.finetune import METHODS, Composed, plan
from fisherscope.finetune.methods.fixed_mask import new_names
from fisherscope.finetune.methods.l2_sp import L2SP
from fisherscope.finetune.methods.mixout import Mixout, _Mixing
from fisherscope.finetune.methods.pretrained_decay import PretrainedDecay
from fisherscope.finetune.methods.re_init import ReInit
from fisherscope.finetune.methods.recadam import RecAdam
from fisherscope.finetune.methods.top_k_layers import numbered_layers
from fisherscope.finetune.parts import before_steps, weight_matrices
from fisherscope.finetune.plan import Plan
from fisherscope.finetune.regularizer import Regularizer
from fisherscope.finetune.run import Run
from fisherscope.models import dropout_sites, new_parameters
from fisherscope.objectives import Predictions, predict

FAMILIES = ("BERT", "RoBERTa", "DeBERTa", "DeBERTa-v3", "XLNet", "BART", "ELECTRA", "GPT-2", "T5")
NAMES = ("weight-decay-pretrained", "l2-sp", "recadam", "mixout", "re-init")


@pytest.fixture
def encoder() -> Case:
    return entry("BERT", "classification")


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def backbone_values(model: nn.Module, factor: float = 1.0) -> dict[str, Tensor]:
    new = new_names(model)
    return {name: factor * value for name, value in values(model).items() if name not in new}


def grouped(model: nn.Module, lr: float = 1e-3, decay: float = 0.1) -> AdamW:
    """AdamW as Trainer makes it: no decay for biases and norms."""
    groups = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    return AdamW([{"params": group, "weight_decay": d} for group, d in zip(groups, (decay, 0.0), strict=True)], lr=lr)


def test_an_anchor_of_the_parameters_themselves_stays_where_they_began(encoder: Case):
    live = {name: p.detach() for name, p in encoder.model.named_parameters()}
    pull, optimizer = L2SP(live, alpha=2.0), SGD(encoder.model.parameters(), lr=0.1)
    with pull.applied_to(encoder.model, optimizer):
        with torch.no_grad():
            for parameter in encoder.model.parameters():
                parameter.add_(0.5)
        (batch,) = batched(encoder.examples[:1], 1)
        (penalty,) = pull.penalty(encoder.model, batch, predict(encoder.model, batch, encoder.objective)).tolist()
    assert penalty == pytest.approx(0.25 * sum(p.numel() for p in encoder.model.parameters()))


def train(
    case: Case, optimizer: Optimizer, regularizer: Regularizer, steps: int = 3, size: int = 4, first: int = 0
) -> list[float]:
    """Optimizer steps with dropout, every one on the same four examples; gives the losses."""
    model, found = case.model.train(), []
    for step in range(first, first + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        for batch in batched(case.examples[:4], size):
            predictions = predict(model, batch, case.objective)
            loss = predictions.losses().total.sum() / 4
            if (term := regularizer.penalty(model, batch, predictions)) is not None:
                loss = loss + term.sum() / 4
            loss.backward()
            found.append(loss.item())
        optimizer.step()
    return found


def trained(
    case: Case, regularizer: Regularizer, steps: int = 3, decay: float = 0.1, **settings: Any
) -> dict[str, Tensor]:
    """The values after some steps of a copy."""
    case = Case(copy.deepcopy(case.model), case.objective, case.examples)
    optimizer = grouped(case.model, decay=decay)
    with regularizer.applied_to(case.model, optimizer):
        train(case, optimizer, regularizer, steps, **settings)
    return values(case.model)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


class Scalars(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, **start: Tensor) -> None:
        super().__init__()
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(value.clone().double()))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# The anchor


@pytest.fixture(scope="module")
def run() -> Run:
    """Of a checkpoint without a classification head."""
    model, tokenizer = fs.load_model("builtin:bert", objective="classification", num_labels=2)
    batches = fs.load_batches("builtin:docs", tokenizer, objective="mlm", num_examples=4)
    return Run(model, batches, "classification", 10)


def test_the_anchor_is_what_the_checkpoint_had(run: Run):
    """The parameters of the new head are not in it."""
    anchor, new = run.supply("anchor"), new_parameters(run.model)
    assert new
    assert anchor.keys() == dict(run.model.named_parameters()).keys() - set(new)
    assert all(torch.equal(value, run.model.get_parameter(name)) for name, value in anchor.items())


def test_the_anchor_does_not_follow_the_training(run: Run):
    model = copy.deepcopy(run.model)
    anchor = Run(model, run.batches, "classification", 10).supply("anchor")
    before = {name: value.clone() for name, value in anchor.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_same(anchor, before)


def test_what_is_drawn_anew_has_no_anchor(run: Run):
    """In whatever order the methods are named: layers of Re-init are not pulled to values they do not have."""
    for names in ("re-init+weight-decay-pretrained", "weight-decay-pretrained+re-init"):
        model, _ = fs.load_model("builtin:bert", objective="classification", num_labels=2)
        fresh = Run(model, run.batches, "classification", 10)
        chosen = SimpleNamespace(method=names, settings={}, scores=None, mask=None)
        parts = Plan.regularizer(chosen, fresh).parts  # pyright: ignore
        anchor = next(part for part in parts if isinstance(part, PretrainedDecay)).anchor
        assert fresh.renewed
        assert not fresh.renewed & anchor.keys()
        assert anchor.keys() | fresh.renewed | set(new_parameters(model)) == dict(model.named_parameters()).keys()


def test_a_model_without_a_checkpoint_has_no_anchor(encoder: Case, run: Run):
    everything = set(dict(encoder.model.named_parameters()))
    fresh = Run(encoder.model, run.batches, "classification", 10, renewed=everything)  # pyright: ignore
    with pytest.raises(ValueError, match=r"^This method needs pretrained weights, but all of this model's are drawn"):
        fresh.supply("anchor")


@pytest.mark.parametrize("name", ["weight-decay-pretrained", "l2-sp", "recadam", "mixout"])
def test_an_anchor_of_another_model_is_refused(name: str, encoder: Case):
    anchor = backbone_values(encoder.model) | {"bert.pooler.dense.bias": torch.zeros(3)}
    more = {"total_steps": 10, "gamma": 1.0} if name == "recadam" else {}
    regularizer = METHODS[name](anchor=anchor, **more)
    message = r"^The anchor does not fit this model, which has no parameter 'bert\.pooler\.dense\.bias' of shape \[3\];"
    with pytest.raises(ValueError, match=message), regularizer.applied_to(encoder.model, grouped(encoder.model)):
        pass


# Weight decay towards the pretrained weights


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        self.norm = nn.LayerNorm(2, dtype=torch.float64)
        self.head = nn.Linear(2, 2, dtype=torch.float64)


def decayed(model: nn.Module, anchor: Mapping[str, Tensor], steps: int, lr: float, decay: float) -> None:
    """Steps with a gradient of 0, all parameters in one group."""
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=decay)
    with PretrainedDecay(anchor).applied_to(model, optimizer):
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()


def test_without_a_gradient_the_distance_shrinks_geometrically():
    r""":math:`\theta_t - u = (1 - \eta \lambda)^t (\theta_0 - u)`."""
    model = Linear()
    start, target = model.layer.weight.detach().clone(), torch.randn(2, 3, dtype=torch.float64)
    decayed(model, {"layer.weight": target}, 5, 0.1, 0.5)
    torch.testing.assert_close(model.layer.weight - target, (1 - 0.05) ** 5 * (start - target), rtol=1e-12, atol=0)


def test_biases_and_norms_are_not_pulled_but_decay_as_the_optimizer_has_it():
    """They are told by shape and type, so that one group for all does no harm."""
    model = Linear()
    before = values(model)
    decayed(model, {name: value + 1 for name, value in before.items() if name != "head.weight"}, 1, 0.1, 0.5)
    for name in ("layer.bias", "norm.weight", "norm.bias", "head.bias"):
        torch.testing.assert_close(model.get_parameter(name).detach(), 0.95 * before[name], rtol=1e-14, atol=0)
    torch.testing.assert_close(model.layer.weight.detach(), before["layer.weight"] + 0.05)


def test_the_head_decays_to_zero():
    """Not to its random start, as in the program of arXiv 2006.05987."""
    model = Linear()
    before = model.head.weight.detach().clone()
    decayed(model, {"layer.weight": torch.zeros(2, 3)}, 1, 0.1, 0.5)
    torch.testing.assert_close(model.head.weight.detach(), 0.95 * before, rtol=1e-14, atol=0)


def test_at_the_pretrained_weights_the_first_step_has_no_decay(encoder: Case):
    """Bit for bit; the head decays."""
    anchor = backbone_values(encoder.model)
    found = trained(encoder, PretrainedDecay(anchor), 1)
    without, plain = (trained(encoder, Regularizer(), 1, decay=decay) for decay in (0.0, 0.1))
    assert_same({name: found[name] for name in anchor}, {name: without[name] for name in anchor})
    head = "classifier.weight"
    torch.testing.assert_close(found[head], plain[head], rtol=1e-12, atol=1e-15)
    assert not torch.equal(found[head], without[head])


def test_without_weight_decay_it_is_plain_fine_tuning(encoder: Case, caplog: pytest.LogCaptureFixture):
    """Bit for bit over 20 steps with dropout; a warning says so."""
    found = trained(encoder, PretrainedDecay(backbone_values(encoder.model, 2.0)), 20, decay=0.0)
    assert_same(found, trained(encoder, Regularizer(), 20, decay=0.0))
    assert "weight-decay-pretrained does nothing without a weight decay; give one above 0." in caplog.text


def test_an_anchor_of_zeros_is_the_decay_of_adamw(encoder: Case):
    found = trained(encoder, PretrainedDecay(backbone_values(encoder.model, 0.0)), 4)
    for name, value in trained(encoder, Regularizer(), 4).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


def test_a_stronger_decay_stays_nearer(encoder: Case):
    anchor = backbone_values(encoder.model)
    distances = []
    for decay in (0.0, 10.0, 100.0, 400.0):
        found = trained(encoder, PretrainedDecay(anchor), 6, decay=decay)
        matrices = [name for name in weight_matrices(encoder.model) if name in anchor]
        distances.append(sum(float((found[name] - anchor[name]).square().sum()) for name in matrices))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1.1 * distances[-1]


def test_the_decay_of_the_optimizer_is_back_after_a_step_that_raises():
    model = Linear()
    optimizer = AdamW(model.parameters(), weight_decay=0.5)
    method = PretrainedDecay({"layer.weight": torch.zeros(2, 3)})

    def stop() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError), method.applied_to(model, optimizer), before_steps(optimizer, stop):
        optimizer.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_frozen_parameters_are_not_pulled():
    model = Linear()
    before = values(model)
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with PretrainedDecay({"layer.weight": torch.zeros(2, 3)}).applied_to(model, optimizer):
        optimizer.step()
    assert_same(values(model), before)


# L2-SP


def nothing(count: int = 1) -> Predictions:
    return Predictions("losses", torch.zeros(count, 1, dtype=torch.float64), torch.zeros(count, 1).long())


def test_the_optimum_of_a_quadratic_loss():
    r""":math:`(H + \alpha I)^{-1} (H a + \alpha \theta_0)`: (0.5, 0.8) for H = diag(1, 4), a = (1, 1), alpha = 1."""
    model = Scalars(w=torch.zeros(2))
    method = L2SP({"w": torch.zeros(2)}, alpha=1.0)
    optimizer, curvature = SGD(model.parameters(), lr=0.2), torch.tensor([1.0, 4.0], dtype=torch.float64)
    for _ in range(100):
        optimizer.zero_grad()
        w = model.get_parameter("w")
        term = method.penalty(model, {}, nothing())
        assert term is not None
        ((curvature * (w - 1).square()).sum() / 2 + term.sum()).backward()
        optimizer.step()
    torch.testing.assert_close(model.get_parameter("w").detach(), torch.tensor([0.5, 0.8], dtype=torch.float64))


def test_the_penalty_is_the_formula():
    r""":math:`\alpha / 2 \sum_S (w - w_0)^2 + \beta / 2 \sum_{\bar S} w^2`, once for every scored token."""
    model = Scalars(w=torch.tensor([1.0, -2.0]), head=torch.tensor([3.0]))
    term = L2SP({"w": torch.tensor([0.5, 1.0])}, alpha=0.2, beta=0.6).penalty(model, {}, nothing(2))
    expected = 0.1 * (0.25 + 9.0) + 0.3 * 9.0
    torch.testing.assert_close(term, torch.full((2,), expected, dtype=torch.float64))
    labels = torch.tensor([[1, 0, -100], [2, 1, 0]])
    tokens = Predictions("categorical", torch.zeros(2, 3, 4, dtype=torch.float64), labels)
    term = L2SP({"w": torch.tensor([0.5, 1.0])}, alpha=0.2, beta=0.6).penalty(model, {}, tokens)
    torch.testing.assert_close(term, torch.tensor([2 * expected, 3 * expected], dtype=torch.float64))


def test_a_second_model_is_checked_too():
    method = L2SP({"w": torch.ones(2)}, alpha=1.0)

    def pull(model: nn.Module) -> Tensor | None:
        with method.applied_to(model, SGD(model.parameters(), lr=0.1)):
            return method.penalty(model, {}, nothing())

    torch.testing.assert_close(pull(Scalars(w=torch.zeros(2))), torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="The anchor does not fit this model"):
        pull(Scalars(w=torch.zeros(3)))


def test_the_penalty_begins_at_zero(encoder: Case):
    """The first step is plain, bit for bit, where the head has no penalty."""
    method = L2SP(backbone_values(encoder.model), alpha=10.0, beta=0.0)
    assert_same(trained(encoder, method, 1), trained(encoder, Regularizer(), 1))
    found, plain = trained(encoder, method, 2), trained(encoder, Regularizer(), 2)
    assert any(not torch.equal(found[name], plain[name]) for name in plain)


def test_scores_weigh_the_entries(encoder: Case):
    """Elastic weight consolidation; what is pretrained outside the backbone, here the pooler, has no pull."""
    scores = fs.estimate_fisher(encoder.model, batched(encoder.examples[:4], 2), progress=False)
    anchor = backbone_values(encoder.model, 1.5) | {"bert.pooler.dense.bias": torch.ones(16)}
    term = L2SP(anchor, scores, alpha=2.0, beta=0.0).penalty(encoder.model, {}, nothing())
    assert term is not None
    found = torch.autograd.grad(term.sum(), list(encoder.model.parameters()), materialize_grads=True)
    for (name, p), gradient in zip(encoder.model.named_parameters(), found, strict=True):
        inside = name in anchor and "pooler" not in name
        expected = 2.0 * scores[name] * (p - anchor[name]) if inside else torch.zeros_like(p)
        torch.testing.assert_close(gradient, expected.double(), msg=name, rtol=1e-5, atol=1e-12)


def test_under_gradient_descent_the_penalty_is_the_decay():
    """One step of SGD with the penalty is one with the decay, where nothing normalises gradients."""
    found = []
    for method in (L2SP({"w": torch.ones(2, 2)}, alpha=0.3), PretrainedDecay({"w": torch.ones(2, 2)})):
        model = Scalars(w=torch.arange(4.0).view(2, 2))
        decay = 0.3 if isinstance(method, PretrainedDecay) else 0.0
        optimizer = SGD(model.parameters(), lr=0.1, weight_decay=decay)
        with method.applied_to(model, optimizer):
            loss = model.get_parameter("w").sin().sum()
            if (term := method.penalty(model, {}, nothing())) is not None:
                loss = loss + term.sum()
            loss.backward()
            optimizer.step()
        found.append(model.get_parameter("w").detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_negative_weights_are_refused(name: str):
    with pytest.raises(ValueError, match=f"^{name} must be at least 0, got -1"):
        L2SP({}, **{name: -1.0})


# RecAdam


def squares(method: Regularizer, steps: int, eps: float = 1e-6, lr: float = 0.1) -> list[float]:
    r"""The values of :math:`\theta` from 1 down :math:`\theta^2 / 2`, whose gradient it is."""
    model = Scalars(w=number(1.0))
    w = model.get_parameter("w")
    optimizer, found = AdamW([w], lr=lr, eps=eps, weight_decay=0.0), []
    with method.applied_to(model, optimizer):
        for _ in range(steps):
            w.grad = w.detach().clone()
            optimizer.step()
            found.append(w.item())
    return found


ZERO = {"w": number(0.0)}


def test_three_steps_of_recadam():
    """The update of arXiv 2004.12651 with its task shares, by hand."""
    method = RecAdam(ZERO, 10, gamma=0.5, k=0.5, t0=1)
    assert [method.task_share(t) for t in (1, 2, 3)] == pytest.approx([0.5, 0.62245933, 0.73105858], abs=1e-8)
    assert squares(method, 3) == pytest.approx([0.92625154, 0.84786368, 0.76491454], abs=1e-8)


def test_a_constant_task_share_is_adam_with_its_epsilon_inside():
    """Added to the root of the second moment before the correction, as in the published program."""
    found = squares(RecAdam(ZERO, 10, gamma=0.5, anneal="constant"), 3, eps=1e-8)
    assert found == pytest.approx([0.90000003, 0.80041228, 0.70158635], abs=1e-8)


def test_without_a_pull_recadam_is_adam_times_the_task_share():
    method = RecAdam(ZERO, 10, gamma=0.0, k=0.5, t0=3)
    first = 1 - squares(method, 1)[0]
    assert first == pytest.approx(method.task_share(1) * (1 - squares(RecAdam(ZERO, 10, anneal="constant"), 1)[0]))


@pytest.mark.parametrize("anneal", ["sigmoid", "linear"])
def test_half_or_all_of_the_change_is_at_t0(anneal: Any):
    """A half for the sigmoid, all for the line; a share of the training is as good as steps."""
    for t0 in (40.0, 0.2):
        method = RecAdam(ZERO, 200, k=0.5, t0=t0, anneal=anneal)
        assert method.task_share(40) == (0.5 if anneal == "sigmoid" else 1.0)
        shares = [method.task_share(t) for t in range(1, 201)]
        assert shares == sorted(shares)
        assert shares[0] < 0.03
        assert shares[-1] > 1 - 1e-9


def test_long_before_t0_the_displacement_shrinks():
    r"""By :math:`1 - \eta \gamma` at every step: 0.9 at the published 2e-5 and 5000."""
    found = squares(RecAdam(ZERO, 100_000, t0=90_000), 29, lr=2e-5)
    assert found[-1] == pytest.approx(0.9**29)
    assert found[-1] < 0.05


def test_a_pull_that_diverges_is_refused():
    """At a rate of 0.1 and the published strength 1 would become -499, then 249001."""
    message = r"^The pull of RecAdam diverges unless learning rate times gamma is below 2, but it is 0\.1 times 5000;"
    with pytest.raises(ValueError, match=message):
        squares(RecAdam(ZERO, 1000, t0=250), 1)


def test_a_rate_that_rises_later_is_refused_then():
    """A scheduler may be anything."""
    model = Scalars(w=number(1.0))
    optimizer = AdamW(model.parameters(), lr=1e-5)
    with RecAdam(ZERO, 1000, t0=250).applied_to(model, optimizer):
        optimizer.param_groups[0]["lr"] = 0.1
        model.get_parameter("w").grad = number(1.0)
        with pytest.raises(ValueError, match="diverges"):
            optimizer.step()


def test_recadam_is_its_formula_with_decay(encoder: Case):
    """Five steps of a whole model by a slow reference; the head takes AdamW's own steps, bit for bit."""
    anchor = backbone_values(encoder.model, 0.9)
    method = RecAdam(anchor, 20, gamma=30.0, k=0.7, t0=3)
    case = Case(copy.deepcopy(encoder.model), encoder.objective, encoder.examples)
    optimizer, lr, eps = grouped(case.model, lr=1e-2), 1e-2, 1e-8
    expected, m, v = values(case.model), {}, {}
    with method.applied_to(case.model, optimizer):
        for t in range(1, 6):
            train(case, optimizer, method, 1, first=t)
            share = 1 / (1 + math.exp(-0.7 * (t - 3)))
            for name, parameter in case.model.named_parameters():
                g, w = parameter.grad, expected[name]
                assert g is not None
                m[name] = 0.9 * m.get(name, torch.zeros_like(g)) + 0.1 * g
                v[name] = 0.999 * v.get(name, torch.zeros_like(g)) + 0.001 * g * g
                decay = 0.1 if parameter.ndim > 1 else 0.0
                if name in anchor:
                    size = lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
                    w = w - share * size * m[name] / (v[name].sqrt() + eps)
                    w = w - lr * (1 - share) * 30.0 * (w - anchor[name])
                    w = w - lr * decay * w
                else:
                    w = w * (1 - lr * decay)
                    w = w - lr * (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + eps)
                expected[name] = w
    for name, parameter in case.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"t0": 10.0},
            r"^t0 must be above 0 and below the 10 steps of the training, got 10; give a share of",
        ),
        ({"k": 0.0}, r"^k must be above 0, got 0; the share of the task would stay at a half\.$"),
        ({"gamma": -1.0}, r"^gamma must be at least 0, got -1\.$"),
        ({"anneal": "cosine"}, r"^anneal must be one of sigmoid, linear, constant, got 'cosine'\.$"),
    ],
)
def test_settings_that_never_let_go_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RecAdam(ZERO, 10, **settings)


def test_recadam_needs_adamw():
    model = Scalars(w=number(1.0))
    method = RecAdam(ZERO, 10)
    with (
        pytest.raises(ValueError, match=r"^RecAdam is a form of AdamW, but the optimizer is SGD; take torch's AdamW"),
        method.applied_to(model, SGD(model.parameters(), lr=0.1)),
    ):
        pass


# Mixout


class Alone(nn.Module):
    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False, dtype=torch.float64)
        self.layer.weight.data = torch.tensor(weight, dtype=torch.float64)

    @property
    def computes_with(self) -> Tensor:
        return self.layer(torch.eye(2, dtype=torch.float64)).T


HALVES = torch.full((2, 2), 0.5)


def mixtures(granularity: Any, steps: int, rate: float = 0.5) -> list[Tensor]:
    model = Alone([[1, 2], [3, 4]]).train()
    optimizer, found = SGD(model.parameters(), lr=0.0), []
    method = Mixout({"layer.weight": HALVES}, rate=rate, granularity=granularity)
    with method.applied_to(model, optimizer):
        for _ in range(steps):
            found.append(model.computes_with.detach())
            optimizer.step()
    return found


def test_the_mixtures_of_two_inputs():
    """All of an input's weights are replaced at once; the four mixtures have the weights as their mean."""
    found = {tuple(mixture.flatten().tolist()) for mixture in mixtures("input", 30)}
    golden = {(1.5, 0.5, 5.5, 0.5), (0.5, 3.5, 0.5, 7.5), (0.5, 0.5, 0.5, 0.5), (1.5, 3.5, 5.5, 7.5)}
    assert found == golden
    assert torch.tensor(list(golden)).mean(0).tolist() == [1, 2, 3, 4]


def test_elements_are_mixed_by_themselves():
    """Mean w and variance p / (1 - p) (w - u)^2, within five standard errors; all 16 masks occur."""
    found = torch.stack(mixtures("element", 2000, rate=0.3))
    weight, share = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64), 0.3 / 0.7
    variance = share * (weight - 0.5).square()
    assert bool(((found.mean(0) - weight).abs() < 5 * (variance / 2000).sqrt()).all())
    torch.testing.assert_close(found.var(0), variance, rtol=0.12, atol=0)
    assert len({tuple(mixture.flatten().tolist()) for mixture in found}) == 16


def test_the_gradient_is_the_exact_one():
    """With the factor 1 / (1 - p) that the published program leaves out: 2 where a weight is used, else 0."""
    model = Alone([[1, 2], [3, 4]]).train()
    with Mixout({"layer.weight": HALVES}, rate=0.5).applied_to(model, SGD(model.parameters(), lr=0.1)):
        model.computes_with.sum().backward()
        used = (model.computes_with != 0.5).double()
    torch.testing.assert_close(model.layer.weight.grad, 2 * used)


def test_at_rate_one_the_pretrained_weights_are_used():
    model = Alone([[1, 2], [3, 4]]).train()
    with Mixout({"layer.weight": HALVES}, rate=1.0).applied_to(model, SGD(model.parameters(), lr=0.1)):
        mixture = model.computes_with
        mixture.sum().backward()
    assert torch.equal(mixture, HALVES.double())
    assert model.layer.weight.grad is not None
    assert not model.layer.weight.grad.any()


def test_pretrained_weights_mix_to_themselves(encoder: Case):
    """The first step computes as plain fine-tuning without the backbone's dropout, whatever is drawn."""
    plain = Case(copy.deepcopy(encoder.model), encoder.objective, encoder.examples)
    for site in dropout_sites(plain.model):
        site.set_rate(0.0)
    expected = train(plain, grouped(plain.model), Regularizer(), 2)
    method, optimizer = Mixout(backbone_values(encoder.model)), grouped(encoder.model)
    with method.applied_to(encoder.model, optimizer):
        found = train(encoder, optimizer, method, 2)
    assert found[0] == expected[0]
    assert found[1] != expected[1]


def test_a_mask_is_for_a_step_and_its_micro_batches(encoder: Case):
    anchor = backbone_values(encoder.model, 0.5)
    model, optimizer = encoder.model.train(), SGD(encoder.model.parameters(), lr=0.0)
    for site in dropout_sites(model, backbone_only=False):
        site.set_rate(0.0)
    batch = batched(encoder.examples, 2)[0]
    with Mixout(anchor).applied_to(model, optimizer):
        first, again = (predict(model, batch, encoder.objective).outputs for _ in range(2))
        optimizer.step()
        other = predict(model, batch, encoder.objective).outputs
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_eval_mode_computes_with_the_weights(encoder: Case):
    batch = batched(encoder.examples, 2)[0]
    expected = predict(encoder.model.eval(), batch, encoder.objective).outputs
    anchor = backbone_values(encoder.model, 0.5)
    with Mixout(anchor).applied_to(encoder.model, grouped(encoder.model)):
        assert torch.equal(predict(encoder.model, batch, encoder.objective).outputs, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_mixed(family: str, monkeypatch: pytest.MonkeyPatch):
    """Every matrix of the layers and no embedding, norm, bias or head; raw and transposed matrices, too."""
    case = entry(family, "classification")
    mixed: set[str] = set()
    inner = _Mixing.mixed

    def noted(self: _Mixing, name: str, module: nn.Module, weight: nn.Parameter) -> Tensor:
        mixed.add(name)
        return inner(self, name, module, weight)

    monkeypatch.setattr(_Mixing, "mixed", noted)
    optimizer = grouped(case.model)
    with Mixout(backbone_values(case.model)).applied_to(case.model, optimizer):
        train(case, optimizer, Regularizer(), 1)
    parameters, new = dict(case.model.named_parameters()), new_names(case.model)
    tables = {f"{p}.weight" for p, module in case.model.named_modules() if isinstance(module, nn.Embedding)}
    assert not [n for n in mixed if parameters[n].ndim < 2 or n in new or n in tables]
    linear = {f"{p}.weight" for p, m in case.model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert linear - new <= mixed
    if family == "XLNet":
        assert {f"transformer.layer.0.rel_attn.{raw}" for raw in "qkvor"} <= mixed


def test_one_input_of_a_transposed_matrix_is_a_row():
    """Conv1D keeps its weights as [inputs, outputs]."""
    case = entry("GPT-2", "classification")
    name = "transformer.h.0.attn.c_attn.weight"
    anchor = {name: torch.zeros_like(case.model.get_parameter(name))}
    with Mixout(anchor, keep_dropout=True).applied_to(case.model, grouped(case.model)) as mixing:
        assert isinstance(mixing, _Mixing)
        weight = case.model.get_parameter(name)
        used = mixing.mixed(name, case.model.get_submodule("transformer.h.0.attn.c_attn").train(), weight) != 0
    rows = used.all(1)
    assert torch.equal(used.any(1), rows)
    assert 0 < int(rows.sum()) < len(rows)


def test_mixing_nothing_is_refused(encoder: Case):
    message = "^Mixout mixes pretrained matrices that are trained, but this BertForSequenceClassification has none;"
    with pytest.raises(ValueError, match=message), Mixout({}).applied_to(encoder.model, grouped(encoder.model)):
        pass


@pytest.mark.parametrize("settings", [{"rate": 1.1}, {"rate": -0.1}, {"granularity": "layer"}])
def test_mixing_by_what_is_no_probability_is_refused(settings: dict[str, Any]):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} "):
        Mixout({}, **settings)


# Re-init


@pytest.mark.parametrize("family", FAMILIES)
def test_the_top_layers_are_drawn_anew_and_nothing_else(family: str):
    """All other values, the head's among them, keep every bit, and the global generator is where it was."""
    model = entry(family, "classification").model
    before, generator = values(model), torch.get_rng_state()
    names = ReInit(1, pooler=False).write(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name for name, value in values(model).items() if not torch.equal(value, before[name])} == set(names)
    assert names == list(numbered_layers(model).values())[-1]


def test_the_distribution_is_that_of_the_class():
    """Standard deviation 0.02 within 1 %, mean 0, biases 0, normalisations 1."""
    import transformers

    size = {"vocab_size": 8, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**size, num_attention_heads=2, max_position_embeddings=4)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    ReInit(1).write(model)
    layer = model.bert.encoder.layer[0]
    assert layer.output.dense.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(layer.output.dense.weight.mean().item()) < 1e-4
    assert not layer.output.dense.bias.any()
    assert bool((layer.output.LayerNorm.weight == 1).all())
    assert model.bert.pooler.dense.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert bool((model.classifier.weight == 0.5).all())


def test_no_layer_and_no_pooler_is_nothing(encoder: Case):
    before = values(encoder.model)
    assert ReInit(0, pooler=False).write(encoder.model) == []
    assert_same(values(encoder.model), before)


def test_the_draws_are_those_of_the_seed(encoder: Case):
    found = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(encoder.model)
        ReInit(1, seed=seed).write(model)
        found.append(model.get_parameter("bert.encoder.layer.1.output.dense.weight").detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_values_that_stay_the_same_are_noticed(encoder: Case):
    """A second time with the same seed changes nothing, and is no silent success."""
    ReInit(1).write(encoder.model)
    with pytest.raises(ValueError, match=r"^Re-init must change 'bert\..*', but it has these values already;"):
        ReInit(1).write(encoder.model)


def test_a_resumed_training_is_not_drawn_anew(encoder: Case):
    """It is known by the state of its optimizer."""
    optimizer = grouped(encoder.model)
    train(encoder, optimizer, Regularizer(), 1)
    before = values(encoder.model)
    with ReInit(1).applied_to(encoder.model, optimizer):
        assert_same(values(encoder.model), before)


def test_in_a_run_it_is_drawn_before_the_training(run: Run):
    """And not again when it begins: what other methods made of it since stays."""
    model, _ = fs.load_model("builtin:bert", objective="classification", num_labels=2)
    fresh = Run(model, run.batches, "classification", 10, seed=3)
    before = values(model)
    method = ReInit.for_run(fresh, reinit_layers=2)
    after = values(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == fresh.renewed
    assert all(f"bert.encoder.layer.{i}.output.dense.weight" in fresh.renewed for i in (2, 3))
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.3.output.dense.weight").add_(1.0)
    after = values(model)
    with method.applied_to(model, grouped(model)):
        assert_same(values(model), after)


def test_drawing_a_frozen_layer_anew_is_refused(encoder: Case):
    """It would stay random: 2 layers anew, of which the lower one is not trained."""
    both = Composed([METHODS["top-k-layers"](layers=1), ReInit(2)])  # pyright: ignore
    optimizer = grouped(encoder.model)
    message = r"^'bert\.encoder\.layer\.0\..*' was drawn anew, but is frozen by another method; draw fewer layers anew"
    with pytest.raises(ValueError, match=message), both.applied_to(encoder.model, optimizer):
        train(encoder, optimizer, both, 1)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (-1, "^reinit_layers must be at least 0, got -1"),
        (3, "^reinit_layers must be at most the 2 layers that a BertForSequenceClassification has, got 3"),
    ],
)
def test_layers_that_there_are_not_are_refused(layers: int, message: str, encoder: Case):
    with pytest.raises(ValueError, match=message):
        ReInit(layers).write(encoder.model)


# All of them


def made(name: str, model: nn.Module) -> Regularizer:
    anchor = backbone_values(model)
    settings: dict[str, Callable[[], Regularizer]] = {
        "weight-decay-pretrained": lambda: PretrainedDecay(anchor),
        "l2-sp": lambda: L2SP(anchor, alpha=1.0, beta=0.0),
        "recadam": lambda: RecAdam(anchor, 4, gamma=5.0, t0=0.5),
        "mixout": lambda: Mixout(anchor, keep_dropout=True),
        "re-init": lambda: ReInit(),
    }
    return settings[name]()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_trained_otherwise(name: str, family: str):
    """Finite values, a head that moves, and a backbone that is not that of plain fine-tuning."""
    case = entry(family, "classification")
    start, plain = values(case.model), trained(case, Regularizer(), 3)
    found = trained(case, made(name, case.model), 3)
    new = new_names(case.model)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert any(not torch.equal(found[n], start[n]) for n in new)
    assert any(not torch.equal(value, plain[n]) for n, value in found.items() if n not in new)


def final_loss(method: str, settings: Mapping[str, float]) -> float:
    results = fs.finetune(
        "builtin:bert", method=method, settings=settings, task="builtin:acceptability", train_size=8, batch_size=4,
        max_steps=3, max_length=16, learning_rate=1e-3, warmup=0.0, weight_decay=0.5, progress=False,
    )  # fmt: skip
    return results.runs[0].evaluations[-1]["loss"]


@pytest.fixture(scope="module")
def plain_loss() -> Iterator[float]:
    """Of plain fine-tuning, measured on few examples, as all runs are meanwhile."""

    def few(name: str, split: str, **options: Any) -> fs.Source:
        source = fs.read_task(name, split, **options)
        return replace(source, texts=source.texts[:8], labels=source.labels[:8])  # pyright: ignore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "read_task", few)
        yield final_loss("vanilla", {})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_whole_runs(name: str, plain_loss: float):
    """Through Trainer, with the pretrained values of the run: another loss than plain fine-tuning, and a finite one."""
    found = final_loss(name, {"recadam": {"gamma": 500.0, "t0": 0.5}, "l2-sp": {"alpha": 1.0}}.get(name, {}))
    assert math.isfinite(found)
    assert found != plain_loss
