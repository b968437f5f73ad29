"""Engines: functions that add the squared per-example gradients of one batch to the sums so far.

:func:`loop_engine` is the definition, one backward pass per example. :func:`hooks_engine` gives the same numbers at
about the price of one training step: it freezes the weights, so that autograd forms no weight gradient at all, and
forms the per-example ones itself from each module's input and the gradient of its output.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..objectives import Batch, ExampleLosses, LossFunction, example_losses
from .probe import Usage, watch
from .rules import Contribution, Rule, accumulate, generic, rule_for

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Adds squared per-example gradients of a batch to sums of squares."""

    def __call__(self, batch: Batch, sums: Mapping[str, Tensor]) -> int:
        """Add one batch.

        Args:
            batch: Inputs and labels of B examples.
            sums: Parameter name to sum of squares, changed in place; exactly these parameters are scored.

        Returns:
            How many examples had something to score; the others add nothing.

        Raises:
            ValueError: If the loss of an example is not finite.
        """
        ...


def loop_engine(model: nn.Module, objective: str | LossFunction, reduction: str = "mean") -> Engine:
    r"""The reference: :math:`\sum_n (\partial \ell_n / \partial \theta)^2` by one backward pass per example."""

    def add(batch: Batch, sums: Mapping[str, Tensor]) -> int:
        parameters = {name: p for name, p in model.named_parameters() if name in sums}
        used = 0
        for n in range(_size(batch)):
            losses = example_losses(model, {name: value[n : n + 1] for name, value in batch.items()}, objective)
            if not losses.count.item():
                continue
            loss = _reduced(losses, reduction)
            gradients = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:  # autograd says that the loss does not depend on it
                    sums[name].add_(gradient.to(sums[name].dtype).square())
            used += 1
        return used

    return add


def hooks_engine(model: nn.Module, objective: str | LossFunction, reduction: str = "mean") -> Engine:
    """The fast engine: one forward and one backward pass per batch, exact for every parameter.

    A parameter that no rule can do exactly goes to :func:`loop_engine`, and one log line names it.
    """
    plan: _Plan | None = None
    slow = loop_engine(model, objective, reduction)

    def add(batch: Batch, sums: Mapping[str, Tensor]) -> int:
        nonlocal plan
        if plan is None:
            plan = _make_plan(model, batch, objective, set(sums))
        if plan.by_loop:
            slow(batch, {name: sums[name] for name in plan.by_loop})
        with _frozen(model), _Recorder(plan, sums, _size(batch)) as recorder:
            losses = example_losses(model, batch, objective)
            recorder.backward(_reduced(losses, reduction).sum())
        return int((losses.count > 0).sum())

    return add


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _reduced(losses: ExampleLosses, reduction: str) -> Tensor:
    values = losses.mean if reduction == "mean" else losses.total
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise ValueError(
            f"Every example needs a finite loss, but example {bad} of a batch has {float(values[bad])}; "
            "check the model's weights and the labels."
        )
    return values


@dataclass(frozen=True)
class _Call:
    """How one module takes part: its rule, its own scored parameters, and whether its output lacks the batch axis."""

    rule: Rule
    parameters: Mapping[str, str]  # own name, such as 'weight', to canonical name
    shared: bool


@dataclass(frozen=True)
class _Plan:
    calls: Mapping[nn.Module, _Call]
    by_loop: list[str]


def _make_plan(model: nn.Module, batch: Batch, objective: str | LossFunction, scored: set[str]) -> _Plan:
    """Find a rule for every use of every scored parameter, or send the parameter to the loop."""
    names = {id(p): name for name, p in model.named_parameters() if name in scored}
    usages = watch(model, batch, names, lambda examples: example_losses(model, examples, objective))
    calls = {module: _plan_call(module, usage, names) for module, usage in usages.items()}
    by_loop = {name for module, usage in usages.items() if calls[module] is None for name in usage.parameters}
    used = set().union(*(usage.parameters for usage in usages.values()))
    if by_loop:
        logger.info(
            "%d parameters have no batched rule and are done one example at a time, for example '%s'.",
            len(by_loop),
            min(by_loop),
        )
    if unused := scored - used:
        logger.info("The loss does not use %d parameters, for example '%s': score 0.", len(unused), min(unused))
    kept = {}
    for module, call in calls.items():
        if call and (own := {k: name for k, name in call.parameters.items() if name not in by_loop}):
            kept[module] = _Call(call.rule, own, call.shared)
    return _Plan(kept, [name for name in names.values() if name in by_loop])


def _plan_call(module: nn.Module, usage: Usage, names: Mapping[int, str]) -> _Call | None:
    own = {k: names[id(p)] for k, p in module.named_parameters(recurse=False, remove_duplicate=False) if id(p) in names}
    if not usage.parameters <= set(own.values()):
        return None  # it computes with another module's parameter
    own = {k: name for k, name in own.items() if name in usage.parameters}
    batched, rule = usage.batched(), rule_for(module)
    if rule and batched and {0, "output"} <= batched:
        return _Call(rule, own, shared=False)
    if isinstance(module, nn.Embedding) and rule and usage.shared_by_one():
        return _Call(rule, own, shared=True)
    if not rule and batched and "output" in batched and len(batched) > 1:
        return _Call(generic(batched - {"output"}), own, shared=False)
    return None


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight needs a gradient for the length of the block."""
    required = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


class _Recorder:
    """Watches one forward and backward pass; a parameter is accumulated as soon as all its uses are in."""

    def __init__(self, plan: _Plan, sums: Mapping[str, Tensor], batch_size: int) -> None:
        self.plan, self.sums, self.batch_size = plan, sums, batch_size
        self.expected: dict[str, int] = defaultdict(int)
        self.arrived: dict[str, list[Contribution]] = defaultdict(list)
        self.hooks = ExitStack()

    def __enter__(self) -> "_Recorder":
        for module in self.plan.calls:
            self.hooks.callback(module.register_forward_hook(self._after_forward, with_kwargs=True).remove)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.hooks.close()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass; the weights are frozen, so only the recorded outputs receive gradients."""
        self.hooks.close()  # the generic rule runs modules again
        if loss.requires_grad:
            loss.backward()
        for name, contributions in self.arrived.items():  # a use that the loss does not depend on never arrives
            accumulate(self.sums[name], contributions)
        self.arrived.clear()

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        call = self.plan.calls[module]
        if call.shared:  # from here on every example has a copy of its own, so the gradient is per example
            output = output.detach().expand(self.batch_size, *output.shape[1:])
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        for name in call.parameters.values():
            self.expected[name] += 1
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        kwargs = {key: a.detach() if isinstance(a, Tensor) else a for key, a in kwargs.items()}
        versions = _versions(args, kwargs)

        def after_backward(gradient: Tensor) -> None:
            if _versions(args, kwargs) != versions:
                raise RuntimeError(
                    f"An input of {type(module).__name__} was changed in place after use, so its gradient cannot be "
                    "formed from it; use engine='loop' for this model."
                )
            self._arrive(call, call.rule(module, args, kwargs, gradient))

        output.register_hook(after_backward)
        return output

    def _arrive(self, call: _Call, contributions: Mapping[str, Contribution]) -> None:
        for own, name in call.parameters.items():
            self.arrived[name].append(contributions[own])
            if len(self.arrived[name]) == self.expected[name]:
                accumulate(self.sums[name], self.arrived.pop(name))


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [a._version for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
