"""Engines: functions that add the squared per-example gradients of one batch to the sums so far.

:func:`loop_engine` is the definition, one backward pass per example. :func:`hooks_engine` gives the same numbers at
about the price of one training step: it freezes the weights, so that autograd forms no weight gradient at all, and
forms the per-example ones itself from each module's input and the gradient of its output.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..objectives import Batch, ExampleLosses, LossFunction, example_losses
from .probe import ParameterUses, Usage, repeated, watch
from .rules import Contribution, Rule, accumulate, generic, rule_for

logger = logging.getLogger(__name__)


@runtime_checkable
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
            loss = _reduced(losses, reduction, first=n)
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

    def fast(batch: Batch, sums: Mapping[str, Tensor]) -> ExampleLosses:
        nonlocal plan
        plan = plan or _make_plan(model, batch, objective, sums, known_slow=frozenset())
        with suppress(_PlanOutdated):
            return _add_by_hooks(model, batch, objective, reduction, plan, sums)
        plan = _make_plan(model, batch, objective, sums, known_slow=plan.by_loop)
        with suppress(_PlanOutdated):
            return _add_by_hooks(model, batch, objective, reduction, plan, sums)
        plan = _Plan({}, frozenset(sums), frozenset(), ())  # what it does depends on the number of examples
        return _add_by_hooks(model, batch, objective, reduction, plan, sums)

    def add(batch: Batch, sums: Mapping[str, Tensor]) -> int:
        losses = fast(batch, sums)
        if plan and plan.by_loop:
            slow(batch, {name: sums[name] for name in plan.by_loop})
        return int((losses.count > 0).sum())

    return add


def _add_by_hooks(
    model: nn.Module,
    batch: Batch,
    objective: str | LossFunction,
    reduction: str,
    plan: "_Plan",
    sums: Mapping[str, Tensor],
) -> ExampleLosses:
    names = {id(p): name for name, p in model.named_parameters() if name in sums}
    with _frozen(model), _Recorder(plan, sums, _size(batch)) as recorder:
        with ParameterUses(names) as uses:
            losses = example_losses(model, batch, objective)
        recorder.check_uses(uses.counts)
        recorder.backward(_reduced(losses, reduction).sum())
    return losses


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _reduced(losses: ExampleLosses, reduction: str, first: int = 0) -> Tensor:
    values = losses.mean if reduction == "mean" else losses.total
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise ValueError(
            f"Every example needs a finite loss, but example {first + bad} of a batch has {values[bad].item()}; "
            "check the model's weights and the labels."
        )
    return values


class _PlanOutdated(Exception):
    """The model did something in this batch that it did not do in the one the plan was made from."""


@dataclass(frozen=True)
class _Call:
    """How one module takes part.

    Attributes:
        rule: What its gradients are formed by.
        parameters: Its own scored parameters: own name, such as ``"weight"``, to canonical name.
        batched: Which inputs, and the ``"output"``, are indexed by example.
        uses: How many operations of one call use which parameter.
    """

    rule: Rule
    parameters: Mapping[str, str]
    batched: frozenset[int | str]
    uses: Mapping[str, int]

    @property
    def shared(self) -> bool:
        """Whether the output has no example axis of its own, but one of length 1."""
        return "output" not in self.batched

    def without(self, names: frozenset[str]) -> "_Call":
        """The same, but for the parameters named."""
        kept = {own: name for own, name in self.parameters.items() if name not in names}
        return replace(self, parameters=kept)


@dataclass(frozen=True)
class _Plan:
    """What is done for every module that uses a scored parameter.

    Attributes:
        calls: The modules that have a rule.
        by_loop: The parameters that the loop does.
        seen: All modules that were called when the plan was made.
        watched: The modules that own a scored parameter, or use one.
    """

    calls: Mapping[nn.Module, _Call]
    by_loop: frozenset[str]
    seen: frozenset[nn.Module]
    watched: tuple[nn.Module, ...]


def _make_plan(
    model: nn.Module,
    batch: Batch,
    objective: str | LossFunction,
    sums: Mapping[str, Tensor],
    *,
    known_slow: frozenset[str],
) -> _Plan:
    """Find a rule for every use of every scored parameter, or send the parameter to the loop."""
    names = {id(p): name for name, p in model.named_parameters() if name in sums}
    usages = watch(model, batch, names, lambda examples: example_losses(model, examples, objective))
    users = {module: usage for module, usage in usages.items() if usage.parameters}
    found = {module: _plan_call(module, usage, names) for module, usage in users.items()}
    calls = {module: call for module, call in found.items() if call}
    slow = known_slow.union(*(usage.parameters for module, usage in users.items() if module not in calls))
    if not _sharing_is_harmless(model, batch, objective, [module for module, call in calls.items() if call.shared]):
        slow = slow.union(*(call.parameters.values() for call in calls.values() if call.shared))
    if slow - known_slow:
        logger.info(
            "%d parameters have no batched rule and are done one example at a time, for example '%s'.",
            len(slow),
            min(slow),
        )
    fast = {module: own for module, call in calls.items() if (own := call.without(slow)).parameters}
    owners = [m for m in model.modules() if any(id(p) in names for p in m.parameters(recurse=False))]
    return _Plan(fast, slow, frozenset(usages), tuple(dict.fromkeys([*owners, *fast])))


def _plan_call(module: nn.Module, usage: Usage, names: Mapping[int, str]) -> _Call | None:
    own = {k: names[id(p)] for k, p in module.named_parameters(recurse=False, remove_duplicate=False) if id(p) in names}
    uses = usage.uses_per_call()
    if uses is None or not usage.parameters.keys() <= set(own.values()):
        return None  # it computes with another module's parameter, or not always in the same way
    own = {k: name for k, name in own.items() if name in usage.parameters}
    batched, rule = usage.batched(), rule_for(module)
    if rule and batched and {0, "output"} <= batched:
        return _Call(rule, own, batched, uses)
    if rule and isinstance(module, nn.Embedding) and usage.shared_by_one():
        return _Call(rule, own, frozenset(), uses)
    if not rule and batched and "output" in batched and len(batched) > 1:
        rerun = generic(batched - {"output"})
        return _Call(rerun, own, batched, uses) if _works(rerun, module, usage) else None
    return None


def _works(rule: Rule, module: nn.Module, usage: Usage) -> bool:
    """Whether the generic rule can run a module at all; vmap cannot follow code that depends on values."""
    args, kwargs, output = usage.call
    try:
        rule(module, args, kwargs, torch.ones_like(output))
    except Exception:  # whatever the module's own code raises under vmap
        return False
    return True


def _sharing_is_harmless(
    model: nn.Module, batch: Batch, objective: str | LossFunction, shared: Sequence[nn.Module]
) -> bool:
    """Whether giving every example its own copy of a shared output leaves the losses alone, on three examples."""
    if not shared:
        return True
    examples = repeated(batch, 3)

    def expand(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.expand(3, *output.shape[1:])

    with torch.no_grad(), ExitStack() as hooks:
        before = example_losses(model, examples, objective).total
        for module in shared:
            hooks.callback(module.register_forward_hook(expand).remove)
        try:
            after = example_losses(model, examples, objective).total
        except (RuntimeError, ValueError, IndexError):  # the shape mattered
            return False
    return before.shape == after.shape and torch.allclose(before, after, rtol=1e-4, atol=1e-6, equal_nan=True)


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
        self.uses: Counter[str] = Counter()
        self.arrived: dict[str, list[Contribution]] = defaultdict(list)
        self.hooks = ExitStack()

    def __enter__(self) -> "_Recorder":
        for module in self.plan.watched:
            self.hooks.callback(module.register_forward_hook(self._after_forward, with_kwargs=True).remove)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.hooks.close()

    def check_uses(self, counts: Counter[str]) -> None:
        """Every use of a parameter must have been one of a module that the plan knows.

        Raises:
            _PlanOutdated: If not.
        """
        if any(counts[name] != self.uses[name] for name in self.sums if name not in self.plan.by_loop):
            raise _PlanOutdated

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass; the weights are frozen, so only the recorded outputs receive gradients."""
        self.hooks.close()  # the generic rule runs modules again
        if leaves := _leaves(loss):  # not backward(), which would write to the .grad of tensors that are not ours
            torch.autograd.grad(loss, leaves)
        for name, contributions in self.arrived.items():  # a use that the loss does not depend on never arrives
            accumulate(self.sums[name], contributions)
        self.arrived.clear()

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if module not in self.plan.seen:
            raise _PlanOutdated
        call = self.plan.calls.get(module)
        if call is None:
            return output
        self._check(call, args, kwargs, output)
        self.uses.update(call.uses)
        if not torch.is_grad_enabled():  # the model itself wants no gradient here
            return output
        if call.shared:  # from here on every example has a copy of its own, so the gradient is per example
            output = output.expand(self.batch_size, *output.shape[1:])
        if not output.requires_grad or output.is_leaf:
            output = output.detach().requires_grad_().clone()  # no leaf, so that the model may change it in place
        for name in call.parameters.values():
            self.expected[name] += 1
        output.register_hook(self._after_backward(module, call, args, kwargs))
        return output

    def _after_backward(
        self, module: nn.Module, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Tensor], None]:
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        kwargs = {key: a.detach() if isinstance(a, Tensor) else a for key, a in kwargs.items()}
        versions = _versions(args, kwargs)

        def arrive(gradient: Tensor) -> None:
            if _versions(args, kwargs) != versions:
                raise RuntimeError(
                    f"An input of {type(module).__name__} was changed in place after use, so its gradient cannot be "
                    "formed from it; use engine='loop' for this model."
                )
            contributions = call.rule(module, args, kwargs, gradient)
            for own, name in call.parameters.items():
                self.arrived[name].append(contributions[own])
                if len(self.arrived[name]) == self.expected[name]:
                    accumulate(self.sums[name], self.arrived.pop(name))

        return arrive

    def _check(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The example axis must be where it was when the plan was made."""
        values = {**dict(enumerate(args)), **kwargs, "output": output}
        keys = {0, "output"} if call.shared else call.batched
        length = 1 if call.shared else self.batch_size
        for key in keys:
            if not isinstance(values.get(key), Tensor) or len(values[key]) != length:
                raise _PlanOutdated


def _leaves(loss: Tensor) -> list[Tensor]:
    """All leaves of the graph of a loss; an output with none of them below would never hear of the backward pass."""
    leaves, seen, queue = [], set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        queue += [following for following, _ in node.next_functions]
    return leaves


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [a._version for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
