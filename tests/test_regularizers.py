"""Every method keeps the promises of regularizers on every kind of model, and the check of them notices those broken.

Shape names: B examples in a batch.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import entry
from conftest import Case, batched, case, moved, untouched
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import AdamW, Optimizer

import fisherscope as fs
from fisherscope.finetune import METHODS, Applied, Composed, Regularizer, parts
from fisherscope.finetune.methods.fixed_mask import new_names
from fisherscope.finetune.methods.teacher_free import VirtualTeacher
from fisherscope.finetune.methods.weights_mixup import mixed_matrices
from fisherscope.finetune.plan import check_method
from fisherscope.masks import Mask
from fisherscope.models import dropout_sites
from fisherscope.objectives import predict
from fisherscope.scores import FisherScores
from fisherscope.testing import check_regularizer

MODELS = ("BERT", "GPT-2", "T5")


@dataclass(frozen=True)
class Given:
    """What methods are made from.

    Attributes:
        made: A classifier with dropout, and examples.
        scores: Of the classifier on four of them.
    """

    made: Case
    scores: FisherScores

    @property
    def model(self) -> nn.Module:
        return self.made.model

    @functools.cached_property
    def mask(self) -> Mask:
        return fs.top_fraction(self.scores, 0.3)

    @functools.cached_property
    def full_mask(self) -> Mask:
        return fs.top_fraction(self.scores, 1.0)

    def factors(self, value: float) -> dict[str, Any]:
        """Shares of rank 1, and matrices to mix with that are not the model's own."""
        parameters = dict(self.model.named_parameters())
        factors, anchor = {}, {}
        for name, axis in mixed_matrices(self.model).items():
            size = parameters[name].shape
            a = torch.full([1 if i == axis else n for i, n in enumerate(size)], value, dtype=torch.float64)
            b = torch.full([n if i == axis else 1 for i, n in enumerate(size)], value, dtype=torch.float64)
            factors[name], anchor[name] = (a, b), 1.5 * parameters[name].detach()
        return {"factors": factors, "anchor": anchor}


@functools.cache
def given(architecture: str) -> Given:
    made = entry(architecture, "classification")
    scores = fs.estimate_fisher(made.model, batched(made.examples[:4], 2), progress=False)
    return Given(made, scores)


@dataclass(frozen=True)
class Entry:
    """How a method is tested.

    Attributes:
        active: It, at a setting that changes something.
        neutral: It, at a setting that changes nothing; None if there is none.
        refused: By name of the model, the error that documents that it cannot work there.
        repeatable: Whether its first steps depend on the examples alone, not on draws for every batch.
        inert: Whether it changes nothing in the block.
    """

    active: Callable[[Given], Regularizer]
    neutral: Callable[[Given], Regularizer] | None = None
    refused: Mapping[str, str] | None = None
    repeatable: bool = False
    inert: bool = False


def of(method: str, **settings: Any) -> Callable[[Given], Regularizer]:
    """The method with settings; those that are functions are called with what is given."""
    return lambda on: METHODS[method](**{k: v(on) if callable(v) else v for k, v in settings.items()})


def the_weights(on: Given) -> dict[str, Tensor]:
    """Of the backbone, as if the head were new."""
    new = new_names(on.model)
    return {name: p.detach().clone() for name, p in on.model.named_parameters() if name not in new}


def the_scores(on: Given) -> FisherScores:
    return on.scores


def another(on: Given) -> nn.Module:
    """A model of the same kind with other values."""
    return moved(copy.deepcopy(on.model), 1)


TABLE: dict[str, Entry] = {
    "vanilla": Entry(of("vanilla"), repeatable=True, inert=True),
    "guided-dropout": Entry(
        of("guided-dropout", scores=the_scores),
        of("guided-dropout", scores=the_scores, highest=0.1, lowest=0.1),
    ),
    "gaussian-dropout": Entry(of("gaussian-dropout", rate=0.2)),
    "r-drop": Entry(of("r-drop"), of("r-drop", weight=0.0)),
    "r3f": Entry(of("r3f"), of("r3f", weight=0.0)),
    "r4f": Entry(of("r4f")),
    "smart": Entry(of("smart", total_steps=4), of("smart", total_steps=4, adversarial_weight=0.0, bregman_weight=0.0)),
    "lnsr": Entry(of("lnsr"), of("lnsr", weight=0.0)),
    "fixed-mask": Entry(
        of("fixed-mask", mask=lambda on: on.mask), of("fixed-mask", mask=lambda on: on.full_mask), repeatable=True
    ),
    "random-mask": Entry(of("random-mask", seed=1), of("random-mask", seed=1, fraction=1.0), repeatable=True),
    "fish-mask": Entry(
        of("fish-mask", scores=the_scores, keep=0.5), of("fish-mask", scores=the_scores, keep=1.0), repeatable=True
    ),
    "bitfit": Entry(
        of("bitfit"), refused={"T5": "^BitFit trains biases, but a T5ForSequenceClassification"}, repeatable=True
    ),
    "child-tuning-f": Entry(
        of("child-tuning-f", seed=1), of("child-tuning-f", seed=1, keep=1.0), repeatable=True
    ),
    "child-tuning-d": Entry(
        of("child-tuning-d", scores=the_scores), of("child-tuning-d", scores=the_scores, keep=1.0), repeatable=True
    ),
    "top-k-layers": Entry(of("top-k-layers", layers=1), repeatable=True),
    "dps-dense": Entry(
        of("dps-dense", total_steps=4), of("dps-dense", total_steps=4, drop=0.0), repeatable=True
    ),
    "dps-mix": Entry(
        of("dps-mix", total_steps=4, seed=1), of("dps-mix", total_steps=4, seed=1, drop=0.0), repeatable=True
    ),
    "label-smoothing": Entry(of("label-smoothing"), of("label-smoothing", weight=0.0), repeatable=True),
    "distillation": Entry(
        of("distillation", teacher=another), of("distillation", teacher=another, weight=0.0), repeatable=True
    ),
    "teacher-free-distillation": Entry(
        of("teacher-free-distillation", teacher=lambda on: VirtualTeacher()),
        of("teacher-free-distillation", teacher=lambda on: VirtualTeacher(), weight=0.0),
        repeatable=True,
    ),
    "weight-decay-pretrained": Entry(of("weight-decay-pretrained", anchor=the_weights), repeatable=True),
    "l2-sp": Entry(
        of("l2-sp", anchor=the_weights, alpha=1.0),
        of("l2-sp", anchor=the_weights, alpha=0.0, beta=0.0),
        repeatable=True,
    ),
    "recadam": Entry(of("recadam", anchor=the_weights, total_steps=4, gamma=5.0, t0=0.5), repeatable=True),
    "mixout": Entry(
        of("mixout", anchor=the_weights),
        of("mixout", anchor=the_weights, rate=0.0, keep_dropout=True),
        repeatable=True,
    ),
    "re-init": Entry(of("re-init"), of("re-init", reinit_layers=0, pooler=False), repeatable=True),
    "layerwise-lr-decay": Entry(of("layerwise-lr-decay"), of("layerwise-lr-decay", decay=1.0), repeatable=True),
    "gradual-unfreezing": Entry(
        of("gradual-unfreezing", total_steps=4),
        of("gradual-unfreezing", total_steps=4, share=0.0, ratio=1.0),
        repeatable=True,
    ),
    "linear-probe": Entry(of("linear-probe"), repeatable=True),
    "vanilla-undebiased": Entry(of("vanilla-undebiased"), repeatable=True),
    "vanilla-long": Entry(of("vanilla-long"), repeatable=True, inert=True),
    "weights-mixup": Entry(
        lambda on: METHODS["weights-mixup"](**on.factors(0.8)),
        lambda on: METHODS["weights-mixup"](**on.factors(1.0)),
        repeatable=True,
    ),
    "lora": Entry(of("lora", rank=2), repeatable=True),
    "prompt-tuning": Entry(
        of("prompt-tuning", virtual_tokens=3),
        refused={
            "GPT-2": "^prompt-tuning cannot be used for a GPT2ForSequenceClassification, which finds the end of a",
            "T5": "^prompt-tuning puts tokens before a text that one stack of layers reads, which a T5For",
        },
        repeatable=True,
    ),
    "prefix-tuning": Entry(
        of("prefix-tuning", virtual_tokens=3),
        refused={"T5": "^prefix-tuning puts tokens before a text that one stack of layers reads, which a T5For"},
        repeatable=True,
    ),
}  # fmt: skip

PAIRS = [(method, model) for method in TABLE for model in MODELS]


def is_refused(method: str, model: str) -> str | None:
    return (TABLE[method].refused or {}).get(model)


def test_every_method_is_in_the_table():
    """So that none goes without the tests below."""
    missing = sorted(METHODS.keys() - TABLE.keys())
    assert not missing, f"Put {missing} into TABLE of {__name__}, with a setting that changes nothing if there is one."
    assert sorted(TABLE.keys() - METHODS.keys()) == []


@pytest.mark.parametrize(("method", "model"), PAIRS)
def test_a_method_keeps_what_regularizers_promise(method: str, model: str):
    """It trains, is neutral where it says so, restores everything, is quiet in eval mode, and resumes bit for bit."""
    on, entry_ = given(model), TABLE[method]
    regularizer = entry_.active(on)
    neutral = None if entry_.neutral is None else entry_.neutral(on)
    neutral = regularizer if entry_.inert else neutral
    batches = batched(on.made.examples, 2)
    with untouched(on.model):
        if message := is_refused(method, model):
            with pytest.raises(ValueError, match=message):
                check_regularizer(regularizer, on.model, batches)
        else:
            check_regularizer(regularizer, on.model, batches, neutral=neutral)


@pytest.mark.parametrize(
    ("method", "model"), [pair for pair in PAIRS if TABLE[pair[0]].repeatable and not is_refused(*pair)]
)
def test_gradients_may_be_accumulated(method: str, model: str):
    """Two steps with four examples at once are those with one example four times, without dropout.

    AdamW's first step hardly depends on the size of a gradient, unless its epsilon is as large as here.
    """
    on = given(model)
    found = []
    for size in (4, 1):
        trained = copy.deepcopy(on.model)
        for site in dropout_sites(trained, backbone_only=False):
            setattr(site.module, site.attribute, 0.0)
        trained.train()
        optimizer = AdamW(trained.parameters(), lr=0.1, weight_decay=0.1, eps=1.0)
        regularizer = TABLE[method].active(on)
        with regularizer.applied_to(trained, optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                for batch in batched(on.made.examples[:4], size):
                    predictions = predict(trained, batch, "classification")
                    total, term = predictions.losses().total, regularizer.penalty(trained, batch, predictions)
                    ((total if term is None else total + term).sum() / 4).backward()
                optimizer.step()
        found.append(dict(trained.named_parameters()))
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter, rtol=0, atol=1e-6, msg=name)
    assert any(not torch.equal(p, found[0][name]) for name, p in on.model.named_parameters())


@pytest.mark.parametrize("model", MODELS)
def test_methods_can_be_composed(model: str):
    """Dropout by score, a mask, and a penalty at once."""
    on = given(model)
    chosen = Composed([TABLE[name].active(on) for name in ("guided-dropout", "fixed-mask", "r-drop")])
    check_regularizer(chosen, on.model, batched(on.made.examples, 2))


# The check itself


@pytest.fixture(scope="module")
def tiny() -> Case:
    return case("bert-classifier")


WEIGHT = "bert.encoder.layer.0.output.dense.weight"


class Pushing(Regularizer):
    """Keeps every promise: doubles a gradient."""

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        parameter = model.get_parameter(WEIGHT)

        def push() -> None:
            if parameter.grad is not None:
                parameter.grad *= 2

        with parts.before_steps(optimizer, push), self.more(model, optimizer):
            yield self.state(model, optimizer)

    @contextmanager
    def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        """What breaks a promise."""
        yield

    def state(self, model: nn.Module, optimizer: Optimizer) -> Any:
        return Applied()


def breaking(change: Callable[[nn.Module, Optimizer], object]) -> type[Pushing]:
    """A regularizer that does something and does not undo it."""

    class Leaving(Pushing):
        @contextmanager
        def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
            change(model, optimizer)
            yield

    return Leaving


def a_dropout(model: nn.Module) -> Any:
    return model.get_submodule("bert.encoder.layer.0.output.dropout")


def set_forward(model: nn.Module) -> None:
    layer = model.get_submodule("bert.encoder.layer.0.output.dense")
    layer.forward = layer.forward


LEFT: dict[str, tuple[Callable[[nn.Module, Optimizer], object], str]] = {
    "flag": (
        lambda m, o: m.get_parameter("bert.pooler.dense.bias").requires_grad_(False),
        r"the flag 'requires_grad' of 'bert\.pooler\.dense\.bias' is False and was True",
    ),
    "gradient": (lambda m, o: o.zero_grad(), "the gradient of 'bert.*' is not what it was"),
    "rate": (
        lambda m, o: setattr(a_dropout(m), "p", 0.25),
        r"the attribute 'p' of the module 'bert\.encoder\.layer\.0\.output\.dropout' is 0\.25 and was 0\.1",
    ),
    "mode": (lambda m, o: a_dropout(m).eval(), "the attribute 'training' of the module '.*dropout' is False and was"),
    "forward": (lambda m, o: set_forward(m), "the attribute 'forward' of the module '.*dense' is not what it was"),
    "hook": (
        lambda m, o: m.register_forward_hook(lambda *_: None),
        "the attribute '_forward_hooks' of the model is not what it was",
    ),
    "hook of a parameter": (
        lambda m, o: m.get_parameter(WEIGHT).register_post_accumulate_grad_hook(lambda _: None),
        f"the hooks of '{re.escape(WEIGHT)}' is not what it was",
    ),
    "hook of the optimizer": (
        lambda m, o: o.register_step_post_hook(lambda *_: None),
        "the attribute '_optimizer_step_post_hooks' of the optimizer is not what it was",
    ),
    "module": (
        lambda m, o: setattr(m, "dropout", nn.Dropout(0.1)),
        "the attribute '_modules' of the model is not what it was",
    ),
    "configuration": (
        lambda m, o: setattr(m.config, "hidden_dropout_prob", 0.3),
        r"'hidden_dropout_prob' in the config of the model is '0\.3' and was '0\.1'",
    ),
    "setting of the optimizer": (
        lambda m, o: o.param_groups[0].update(lr=0.002),
        r"'lr' of parameter group 0 is 0\.002 and was 0\.001",
    ),
    "parameter group": (
        lambda m, o: o.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
        "the number of parameter groups is 3 and was 2",
    ),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_behind_is_named(what: str, tiny: Case):
    change, message = LEFT[what]
    with untouched(tiny.model), pytest.raises(AssertionError, match=rf"^Leaving must restore .*, but {message}.*\.$"):
        check_regularizer(breaking(change)(), tiny.model, batched(tiny.examples, 2))


def test_a_regularizer_that_keeps_its_promises_passes(tiny: Case):
    """And the model, its gradients and the global generator stay as they were."""
    generator = torch.get_rng_state()
    with untouched(tiny.model):
        assert check_regularizer(Pushing(), tiny.model, batched(tiny.examples, 2)) is None
        check_regularizer(Pushing(), tiny.model, iter(batched(tiny.examples, 8)), neutral=Regularizer())
    assert torch.equal(torch.get_rng_state(), generator)


class OnlyWithoutExceptions(Pushing):
    @contextmanager
    def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        before, a_dropout(model).p = a_dropout(model).p, 0.25
        yield
        a_dropout(model).p = before


class Swallowing(Pushing):
    @contextmanager
    def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        try:
            yield
        except Exception:
            return


class Rounding(Pushing):
    @contextmanager
    def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        try:
            yield
        finally:
            model.get_parameter(WEIGHT).data.mul_(1 + 1e-12)


class Renaming(Pushing):
    @contextmanager
    def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        layer = model.get_submodule("bert.pooler.dense")
        parametrize.register_parametrization(layer, "weight", nn.Identity())
        yield


class GivingNothing(Pushing):
    def state(self, model: nn.Module, optimizer: Optimizer) -> Any:
        return None


class Freezing(Pushing):
    @contextmanager
    def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        with parts.frozen(list(model.parameters())):
            yield


class Stopping(Pushing):
    @contextmanager
    def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        everything = {p: torch.zeros_like(p, dtype=torch.bool) for p in model.parameters()}
        with parts.entries_kept(optimizer, everything):
            yield


class Exploding(Pushing):
    def penalty(self, model: nn.Module, batch: Any, predictions: Any) -> Tensor:
        return torch.full((2,), torch.inf)


class Averaging(Pushing):
    def penalty(self, model: nn.Module, batch: Any, predictions: Any) -> Tensor:
        return predictions.outputs.square().mean()


class Drawing(Pushing):
    def penalty(self, model: nn.Module, batch: Any, predictions: Any) -> Tensor:
        return torch.rand(len(batch["labels"]))


class NoisyWhenMeasured(Pushing):
    @contextmanager
    def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        handle = model.classifier.register_forward_hook(lambda *call: call[-1] + 0.01 * torch.rand(3))
        try:
            yield
        finally:
            handle.remove()


class OtherWhenMeasured(Pushing):
    @contextmanager
    def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        with parts.reparametrized(model, {WEIGHT: lambda p: 2 * p}):
            yield


class Merging(OtherWhenMeasured):
    @contextmanager
    def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        try:
            with super().more(model, optimizer):
                yield
        finally:
            model.get_parameter(WEIGHT).data.mul_(2)


class Counting(Applied):
    def __init__(self) -> None:
        self.steps = 0


class Forgetful(Pushing):
    """Pushes harder with every step, and does not save how many there were."""

    def state(self, model: nn.Module, optimizer: Optimizer) -> Any:
        return self.applied()

    def applied(self) -> Any:
        return self.counter

    @contextmanager
    def more(self, model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
        self.counter = counter = Counting()
        parameter = model.get_parameter("classifier.bias")

        def push() -> None:
            assert parameter.grad is not None
            parameter.grad += counter.steps
            counter.steps += 1

        with parts.before_steps(optimizer, push):
            yield


class SavingNumbers(Pushing):
    def state(self, model: nn.Module, optimizer: Optimizer) -> Any:
        state = Applied()
        state.state_dict = lambda: {"steps": 2}
        return state


BROKEN: dict[type[Regularizer], str] = {
    OnlyWithoutExceptions: "must restore the model and the optimizer also when the block raises .*, but the attribute",
    Swallowing: "must let the exceptions of the block pass, but stops them",
    Rounding: f"must leave values that were not trained as they are, but '{re.escape(WEIGHT)}' differs by up to",
    Renaming: r"must leave the names of parameters as they are, but changes \['bert\.pooler\.dense\.",
    GivingNothing: "must give an Applied to the block, but gives NoneType; write 'yield Applied",
    Freezing: "must leave something to train, but the loss depends on no parameter that is",
    Stopping: "must leave something to train, but 3 steps change no parameter",
    Regularizer: r"must change the training, but after 3 steps every parameter is what it is without it; .*neutral=",
    Exploding: r"must keep losses finite, but that of step 1 is inf",
    Averaging: r"must give a penalty with one number per example, shape \[2\], but its shape is \[\]",
    Drawing: "must leave torch's global generator as it was when it computes its penalty, but draws from it",
    NoisyWhenMeasured: "must compute the same every time in eval mode, but two passes over a batch differ by up to",
    OtherWhenMeasured: "must compute in eval mode what the model computes after the block, but the outputs differ",
    Forgetful: r"must go on from its state bit for bit, but two steps after it '.*' differs by",
    SavingNumbers: r"must have a state of tensors, but 'steps' is a int; wrap it in torch\.tensor",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_promise_is_named(kind: type[Regularizer], tiny: Case):
    with untouched(tiny.model), pytest.raises(AssertionError, match=rf"^{kind.__name__} {BROKEN[kind]}.*\.$"):
        check_regularizer(kind(), tiny.model, batched(tiny.examples, 2))


def test_a_change_in_eval_mode_may_be_written_into_the_values(tiny: Case):
    """So that the model goes on computing what it computed in the block."""
    check_regularizer(Merging(), tiny.model, batched(tiny.examples, 2))


def test_a_neutral_setting_that_is_none_is_named(tiny: Case):
    message = "^Pushing must train bit for bit as without it at its neutral setting, but after 3 steps '.*' differs by"
    with pytest.raises(AssertionError, match=message):
        check_regularizer(Pushing(), tiny.model, batched(tiny.examples, 2), neutral=Pushing())


class WithoutContext(Regularizer):
    """Lacks its decorator."""

    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Any:
        yield Applied()


def test_a_forgotten_decorator_is_named(tiny: Case):
    sentence = "WithoutContext must make a block, but applied_to gives a generator; put @contextmanager before it"
    with pytest.raises(AssertionError, match=f"^{sentence}"):
        check_regularizer(WithoutContext(), tiny.model, batched(tiny.examples, 2))


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (Pushing, "the class Pushing"),
        ([Pushing()], "a list"),
        (None, "a NoneType"),
        (lambda model, optimizer: None, "a function"),
    ],
)
def test_what_is_no_regularizer_is_refused(wrong: Any, found: str, tiny: Case):
    message = f"^A method is a name or a regularizer with its settings, as RDrop.*, but here is {found}; several are"
    with pytest.raises(TypeError, match=message):
        check_regularizer(wrong, tiny.model, batched(tiny.examples, 2))
    with pytest.raises(TypeError, match=message):
        check_method(wrong, {})
    with pytest.raises(TypeError, match=message):
        Composed([Pushing(), wrong])


class MeanOverBatch(Regularizer):
    """Its weight depends on how many examples there are."""

    def penalty(self, model: nn.Module, batch: Any, predictions: Any) -> Tensor:
        return predictions.losses().total.mean()


def test_a_penalty_of_a_whole_batch_is_refused_in_training(tiny: Case):
    message = r"^A penalty is one number per example, shape \[.*\], but that of MeanOverBatch has shape \[\];"
    batch = batched(tiny.examples, 2)[0]
    with pytest.raises(ValueError, match=message):
        Composed([MeanOverBatch()]).penalty(tiny.model, batch, predict(tiny.model, batch, tiny.objective))
    options = {"task": "builtin:acceptability", "train_size": 4, "max_steps": 1, "progress": False}
    with pytest.raises(ValueError, match=message):
        fs.finetune("builtin:bert", method=MeanOverBatch(), **options)


def test_no_batches_are_refused(tiny: Case):
    with pytest.raises(ValueError, match=r"^check_regularizer needs at least one batch, got none;"):
        check_regularizer(Pushing(), tiny.model, [])


def test_the_objective_can_be_a_function(tiny: Case):
    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return predict(model, batch, "classification").losses().total

    check_regularizer(Pushing(), tiny.model, batched(tiny.examples, 2), objective=losses)
