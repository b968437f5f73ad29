"""What every regularizer promises, as a check for those that users write; our own tests run it over ours."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..models import infer_objective
from ..objectives import Batch, LossFunction, predict
from .regularizer import Applied, Regularizer, check_regularizers

SEED = 0
STEPS = 3
NUM_BATCHES = 4


def check_regularizer(
    regularizer: Regularizer,
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    objective: str | LossFunction | None = None,
    neutral: Regularizer | None = None,
) -> None:
    """Whether a regularizer keeps the promises of :class:`fisherscope.finetune.Regularizer` on this model and data.

    1. It trains: losses stay finite, some parameter changes, and not as without it.
    2. At its neutral setting, training is bit for bit as without it, with the model's dropout.
    3. What it adds to the loss has shape [B], is finite, and leaves torch's global generator as it was.
    4. In eval mode a batch gives the same outputs every time, and after the block the same but for rounding, where
       what it trains stays in the model.
    5. Leaving the block restores every flag, attribute, hook, gradient, setting and parameter group, whether or not
       training raised. Values that were not trained stay, too, unless the block changed what the model computes.
    6. A training that is resumed from its state goes on bit for bit as if it had never stopped.

    The model trains on the CPU for some twenty steps of AdamW, with decay; it is copied, and the one that is given
    stays as it is.

    Args:
        regularizer: At a setting that changes something.
        model: With the head of a task; with dropout, as users train it.
        batches: The first four are used, again and again if there are fewer.
        objective: As for :func:`fisherscope.estimate_fisher`.
        neutral: The same regularizer at a setting that changes nothing; the regularizer itself if it never does.

    Raises:
        AssertionError: If a promise is broken; says which one, and where.
        TypeError: If there is no regularizer.
        ValueError: If there are no batches, or the regularizer refuses the model.
    """
    check_regularizers([regularizer])
    taken = list(itertools.islice(batches, NUM_BATCHES))
    if not taken:
        raise ValueError("check_regularizer needs at least one batch, got none; give some examples to train on.")
    trial = _Trial(
        copy.deepcopy(model).cpu().train(),
        [{name: value.cpu() for name, value in taken[n % len(taken)].items()} for n in range(NUM_BATCHES)],
        objective or infer_objective(model),
        type(regularizer).__name__,
    )
    with torch.random.fork_rng(devices=[]):
        plain = _trained(trial, Regularizer())
        if neutral is not regularizer:
            _check_training(trial, _trained(trial, regularizer), plain)
        if neutral is not None:
            _check_neutral(trial, _trained(trial, neutral), plain)
        _check_penalty(trial, regularizer)
        _check_eval_mode(trial, regularizer)
        _check_restoration(trial, regularizer)
        _check_resuming(trial, regularizer)


@dataclass(frozen=True)
class _Trial:
    """What the trainings of a check share.

    Attributes:
        model: As every training starts; none trains this one.
        batches: One for every step.
        objective: What the losses are.
        name: Of the regularizer, for messages.
    """

    model: nn.Module
    batches: list[dict[str, Tensor]]
    objective: str | LossFunction
    name: str

    def start(self, regularizer: Regularizer | None = None) -> tuple[nn.Module, Optimizer]:
        """A copy of the model in training mode, an optimizer with decay for weights, and the generator at its seed.

        With a regularizer they have its parameters from the start.
        """
        model = copy.deepcopy(self.model)
        if regularizer is not None:
            regularizer.extend(model)
        groups: tuple[list[nn.Parameter], ...] = ([], [])
        for parameter in model.parameters():
            groups[parameter.ndim < 2].append(parameter)
        settings = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0), strict=True)]
        torch.default_generator.manual_seed(SEED)
        return model, AdamW([group for group in settings if group["params"]], lr=1e-3)

    def step(self, model: nn.Module, optimizer: Optimizer, regularizer: Regularizer, number: int) -> None:
        """One optimizer step on a batch."""
        predictions = predict(model, self.batches[number], self.objective)
        losses = predictions.losses()
        total = losses.total.sum()
        if (term := regularizer.penalty(model, self.batches[number], predictions)) is not None:
            total = total + term.sum()
        loss = total / losses.count.sum().clamp(min=1)
        self.require(bool(loss.isfinite()), f"must keep losses finite, but that of step {number + 1} is {loss.item()}")
        self.require(loss.requires_grad, "must leave something to train, but the loss depends on no parameter that is")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def require(self, holds: bool, broken: str) -> None:
        """Raise if a promise is broken."""
        if not holds:
            raise AssertionError(f"{self.name} {broken}.")


def _trained(trial: _Trial, regularizer: Regularizer) -> dict[str, Tensor]:
    """The values of all parameters after some steps, still inside the block, unless names differ there."""
    model, optimizer = trial.start()
    block = regularizer.applied_to(model, optimizer)
    trial.require(
        isinstance(block, AbstractContextManager),
        f"must make a block, but applied_to gives a {type(block).__name__}; put @contextmanager before it",
    )
    with block as applied:
        trial.require(
            isinstance(applied, Applied),
            f"must give an Applied to the block, but gives {type(applied).__name__}; write 'yield Applied()'",
        )
        for number in range(STEPS):
            trial.step(model, optimizer, regularizer, number)
        inside = _values(model)
    return _values(model) if regularizer.extends else inside


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _check_training(trial: _Trial, found: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> None:
    trial.require(
        found.keys() == plain.keys(),
        "must leave the names of parameters as they are, but changes "
        f"{sorted(found.keys() ^ plain.keys())[:1]}; change what modules compute, not what they hold",
    )
    trial.require(
        _difference(found, _values(trial.model)) is not None,
        f"must leave something to train, but {STEPS} steps change no parameter",
    )
    trial.require(
        _difference(found, plain) is not None,
        f"must change the training, but after {STEPS} steps every parameter is what it is without it; check that it "
        "finds its modules and parameters (give neutral=regularizer if it is meant to change nothing)",
    )


def _check_neutral(trial: _Trial, found: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> None:
    difference = _difference(found, plain)
    trial.require(
        difference is None,
        f"must train bit for bit as without it at its neutral setting, but after {STEPS} steps {difference}; draw "
        "random numbers from a generator of your own, and return a tensor itself where nothing is to change",
    )


def _check_penalty(trial: _Trial, regularizer: Regularizer) -> None:
    model, optimizer = trial.start()
    with regularizer.applied_to(model, optimizer):
        predictions = predict(model, trial.batches[0], trial.objective)
        before = torch.get_rng_state()
        term = regularizer.penalty(model, trial.batches[0], predictions)
        same = torch.equal(torch.get_rng_state(), before)
    trial.require(
        same,
        "must leave torch's global generator as it was when it computes its penalty, but draws from it; draw from a "
        "generator of your own, or inside torch.random.fork_rng",
    )
    if term is None:
        return
    examples = list(predictions.count.shape)
    trial.require(
        list(term.shape) == examples,
        f"must give a penalty with one number per example, shape {examples}, but its shape is {list(term.shape)}",
    )
    trial.require(bool(term.isfinite().all()), f"must give a finite penalty, but it is {term.detach().tolist()}")


def _check_eval_mode(trial: _Trial, regularizer: Regularizer) -> None:
    model, optimizer = trial.start()
    with regularizer.applied_to(model, optimizer):
        for number in range(STEPS):
            trial.step(model, optimizer, regularizer, number)
        inside, again = _outputs(trial, model), _outputs(trial, model)
    after = _outputs(trial, model)
    trial.require(
        torch.equal(inside, again),
        "must compute the same every time in eval mode, but two passes over a batch differ by "
        f"{_largest(again - inside)}; do what is random only while module.training is True",
    )
    trial.require(
        not regularizer.stays or _close(inside, after),
        "must compute in eval mode what the model computes after the block, but the outputs differ by "
        f"{_largest(after - inside)}; change nothing in eval mode, or write the change into the values on leaving",
    )


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether outputs are the same but for rounding: a block may choose other kernels."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5) if a.dtype == torch.float32 else torch.allclose(a, b, rtol=1e-6)


@torch.no_grad()
def _outputs(trial: _Trial, model: nn.Module) -> Tensor:
    """Of a batch in eval mode; the model is in training mode afterwards."""
    model.eval()
    outputs = predict(model, trial.batches[0], trial.objective).outputs
    model.train()
    return outputs


class _Interrupted(Exception):
    """What is raised in the middle of a training."""


def _check_restoration(trial: _Trial, regularizer: Regularizer) -> None:
    model, optimizer = trial.start()
    trial.step(model, optimizer, Regularizer(), 0)  # what a model notes when it is first used is no change
    before, tensors, computed = _facts(model, optimizer), _tensors(model, optimizer), _outputs(trial, model)
    with regularizer.applied_to(model, optimizer):
        inside = _outputs(trial, model)
    _require_same(trial, before, model, optimizer, "restore the model and the optimizer")
    if _close(inside, computed):
        difference = _difference(_tensors(model, optimizer), tensors)
        trial.require(difference is None, f"must leave values that were not trained as they are, but {difference}")

    with regularizer.applied_to(model, optimizer):
        trial.step(model, optimizer, regularizer, 1)
    optimizer.zero_grad()
    _require_same(
        trial, _without_gradients(before), model, optimizer, "restore the model and the optimizer after a training"
    )
    raised = False
    try:
        with regularizer.applied_to(model, optimizer):
            trial.step(model, optimizer, regularizer, 2)
            raise _Interrupted
    except _Interrupted:
        raised = True
    trial.require(raised, "must let the exceptions of the block pass, but stops them")
    optimizer.zero_grad()
    _require_same(
        trial,
        _without_gradients(before),
        model,
        optimizer,
        "restore the model and the optimizer also when the block raises (put it into 'finally')",
    )


def _without_gradients(facts: Mapping[str, object]) -> dict[str, object]:
    return {name: None if name.startswith("the gradient") else value for name, value in facts.items()}


def _require_same(
    trial: _Trial, before: Mapping[str, object], model: nn.Module, optimizer: Optimizer, promise: str
) -> None:
    after = _facts(model, optimizer)
    for name in {**before, **after}:
        was, found = before.get(name), after.get(name)
        trial.require(_same(was, found), f"must {promise}, but {name} {_told(was, found)}")


def _told(was: object, found: object) -> str:
    plain = all(isinstance(value, (bool, int, float, str, type(None))) for value in (was, found))
    return f"is {found!r} and was {was!r}" if plain else "is not what it was"


def _facts(model: nn.Module, optimizer: Optimizer) -> dict[str, object]:
    """All that a model and an optimizer are, but for the values of tensors, by a name for messages."""
    facts = dict(_of_modules(model))
    for name, parameter in model.named_parameters():
        facts[f"the flag 'requires_grad' of '{name}'"] = parameter.requires_grad
        facts[f"the gradient of '{name}'"] = parameter.grad
        hooks = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
        facts[f"the hooks of '{name}'"] = tuple(tuple((found or {}).values()) for found in hooks)
    for key, value in vars(optimizer).items():
        if key not in ("param_groups", "state"):
            facts[f"the attribute '{key}' of the optimizer"] = _copied(value)
    facts["the number of parameter groups"] = len(optimizer.param_groups)
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            facts[f"'{key}' of parameter group {number}"] = _copied(value)
    return facts


def _of_modules(model: nn.Module) -> Iterator[tuple[str, object]]:
    for path, module in model.named_modules():
        where = f"the module '{path}'" if path else "the model"
        for key, value in vars(module).items():
            yield f"the attribute '{key}' of {where}", _copied(value)
        config = vars(module).get("config")
        for key, value in vars(config).items() if hasattr(config, "__dict__") else ():
            yield f"'{key}' in the config of {where}", repr(value)


def _copied(value: Any) -> object:
    """A container as it is now; what it holds is compared by identity."""
    if isinstance(value, Mapping):
        return tuple(value.items())
    if isinstance(value, (list, set)):
        return tuple(sorted(value, key=str)) if isinstance(value, set) else tuple(value)
    return value


def _same(a: object, b: object) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (bool, int, float, complex, str, type(None))):
        return type(a) is type(b) and a == b
    return a is b


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of all tensors that training changes."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found |= {f"the gradient of {name}": p.grad for p, name in names.items() if p.grad is not None}
    for parameter, state in optimizer.state.items():
        found |= {f"{key} of {names[parameter]}": t for key, t in state.items() if isinstance(t, Tensor)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _check_resuming(trial: _Trial, regularizer: Regularizer) -> None:
    first, last = (0, 1), (2, 3)
    model, optimizer = trial.start(regularizer)
    with regularizer.applied_to(model, optimizer) as applied:
        for number in first:
            trial.step(model, optimizer, regularizer, number)
        state = _saved(trial, applied)
        weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        generator = torch.get_rng_state()
        for number in last:
            trial.step(model, optimizer, regularizer, number)
        expected = _values(model)
    model, optimizer = trial.start(regularizer)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    with regularizer.applied_to(model, optimizer) as applied:
        applied.load_state_dict(state)
        torch.set_rng_state(generator)
        for number in last:
            trial.step(model, optimizer, regularizer, number)
        difference = _difference(_values(model), expected)
    trial.require(
        difference is None,
        f"must go on from its state bit for bit, but two steps after it {difference}; put all that the next step "
        "depends on into Applied.state_dict, and take it up in load_state_dict",
    )


def _saved(trial: _Trial, applied: Applied) -> dict[str, Tensor]:
    """The state as it comes back from a file."""
    state = applied.state_dict()
    wrong = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    kind = type(state.get(wrong or "")).__name__
    trial.require(wrong is None, f"must have a state of tensors, but '{wrong}' is a {kind}; wrap it in torch.tensor")
    return safetensors.torch.load(
        safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in state.items()})
    )


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first tensor that is not bit for bit what it should be, as half a sentence; None if all are."""
    for name, value in expected.items():
        if name not in found:
            return f"'{name}' is missing"
        if not torch.equal(found[name], value):
            return f"'{name}' differs by {_largest(found[name] - value)}"
    return None


def _largest(difference: Tensor) -> str:
    return f"up to {difference.abs().max().item():.3g}"
