"""Engines: functions that add the squared per-example gradients of one batch to the sums so far.

:func:`loop_engine` is the definition, one backward pass per example. :func:`hooks_engine` gives the same numbers at
about the price of one training step: it freezes the weights, so that autograd forms no weight gradient at all, and
forms the per-example ones itself from each module's input and the gradient of its output.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..objectives import Batch, ExampleLosses, LossFunction, example_losses
from .plan import Call, Plan, PlanOutdated, make_plan
from .probe import ParameterUses
from .rules import Contribution, accumulate


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
    plan: Plan | None = None
    slow = loop_engine(model, objective, reduction)

    def fast(batch: Batch, sums: Mapping[str, Tensor]) -> ExampleLosses:
        nonlocal plan
        plan = plan or make_plan(model, batch, objective, sums, known_slow=frozenset())
        with suppress(PlanOutdated):
            return _add_by_hooks(model, batch, objective, reduction, plan, sums)
        plan = make_plan(model, batch, objective, sums, known_slow=plan.by_loop)
        with suppress(PlanOutdated):
            return _add_by_hooks(model, batch, objective, reduction, plan, sums)
        plan = Plan({}, frozenset(sums), frozenset(), ())  # what it does depends on the number of examples
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
    plan: Plan,
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

    def __init__(self, plan: Plan, sums: Mapping[str, Tensor], batch_size: int) -> None:
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
            PlanOutdated: If not.
        """
        if any(counts[name] != self.uses[name] for name in self.sums if name not in self.plan.by_loop):
            raise PlanOutdated

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
            raise PlanOutdated
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
        self, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
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

    def _check(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The example axis must be where it was when the plan was made."""
        values = {**dict(enumerate(args)), **kwargs, "output": output}
        keys = {0, "output"} if call.shared else call.batched
        length = 1 if call.shared else self.batch_size
        for key in keys:
            if not isinstance(values.get(key), Tensor) or len(values[key]) != length:
                raise PlanOutdated


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
