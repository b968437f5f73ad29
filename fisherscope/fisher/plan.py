"""The plan of a run: how the gradient of every scored parameter will be formed, found by watching the model."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..objectives import Batch, LossFunction, example_losses
from .probe import Usage, repeated, watch
from .rules import Rule, generic, rule_for

logger = logging.getLogger(__name__)


class PlanOutdated(Exception):
    """The model did something in this batch that it did not do in the one the plan was made from."""


@dataclass(frozen=True)
class Call:
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

    def without(self, names: frozenset[str]) -> "Call":
        """The same, but for the parameters named."""
        kept = {own: name for own, name in self.parameters.items() if name not in names}
        return replace(self, parameters=kept)


@dataclass(frozen=True)
class Plan:
    """What is done for every module that uses a scored parameter.

    Attributes:
        calls: The modules that have a rule.
        by_loop: The parameters that the loop does.
        seen: All modules that were called when the plan was made.
        watched: The modules that own a scored parameter, or use one.
    """

    calls: Mapping[nn.Module, Call]
    by_loop: frozenset[str]
    seen: frozenset[nn.Module]
    watched: tuple[nn.Module, ...]


def make_plan(
    model: nn.Module,
    batch: Batch,
    objective: str | LossFunction,
    sums: Mapping[str, Tensor],
    *,
    known_slow: frozenset[str],
) -> Plan:
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
    return Plan(fast, slow, frozenset(usages), tuple(dict.fromkeys([*owners, *fast])))


def _plan_call(module: nn.Module, usage: Usage, names: Mapping[int, str]) -> Call | None:
    own = {k: names[id(p)] for k, p in module.named_parameters(recurse=False, remove_duplicate=False) if id(p) in names}
    uses = usage.uses_per_call()
    if uses is None or not usage.parameters.keys() <= set(own.values()):
        return None  # it computes with another module's parameter, or not always in the same way
    own = {k: name for k, name in own.items() if name in usage.parameters}
    batched, rule = usage.batched(), rule_for(module)
    if rule and batched and {0, "output"} <= batched:
        return Call(rule, own, batched, uses)
    if rule and isinstance(module, nn.Embedding) and usage.shared_by_one():
        return Call(rule, own, frozenset(), uses)
    if not rule and batched and "output" in batched and len(batched) > 1:
        rerun = generic(batched - {"output"})
        return Call(rerun, own, batched, uses) if _works(rerun, module, usage) else None
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
