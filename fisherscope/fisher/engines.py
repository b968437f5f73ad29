"""Engines: functions that add the squared per-example gradients of one batch to the sums so far.

:func:`loop_engine` is the definition, one backward pass per example. :func:`hooks_engine` gives the same numbers at
about the price of one training step: it freezes the weights, so that autograd forms no weight gradient at all, and
forms the per-example ones itself from each operation's inputs and the gradient of its output.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..distributed import whole
from ..objectives import Batch, LossFunction, num_scored, predict
from .contributions import Contribution, accumulate
from .estimand import Estimand, check_finite
from .operations import Follower, Operation, Slot, Source, on_gradient, outputs_of, with_output
from .plan import COPIES, Plan, PlanOutdated, Step, backward, make_plan
from .rules import SUMS, Use, contributions_of, pull_back, wide
from .sharding import computing_parameters, own_part, zeros_of_whole

logger = logging.getLogger(__name__)

MOST_PLANS = 4
"""A model that does still other things goes to the loop for those batches."""


@runtime_checkable
class Engine(Protocol):
    """Adds squared per-example gradients of a batch to sums of squares."""

    def __call__(self, batch: Batch, sums: Mapping[str, Tensor]) -> int:
        """Add one batch.

        Args:
            batch: Inputs and labels of B examples.
            sums: Parameter name to sum of squares, changed in place; exactly these parameters are scored.

        Returns:
            How many terms of the mean the batch stands for: examples, or tokens, that had something to score.

        Raises:
            ValueError: If the loss of an example is not finite.
        """
        ...


def loop_engine(model: nn.Module, objective: str | LossFunction, estimand: Estimand = Estimand()) -> Engine:  # noqa: B008
    r"""The reference: :math:`\sum_n (\partial \ell_n / \partial \theta)^2` by one backward pass per example."""
    absolute = estimand.estimator == "absolute-gradient"

    def add(batch: Batch, sums: Mapping[str, Tensor]) -> int:
        parameters = _named(model, sums)
        units = 0

        def see(name: str, gradient: Tensor) -> None:
            gradient = own_part(gradient, sums[name])
            sums[name].add_(gradient.abs() if absolute else gradient.square())

        for n in range(size(batch)):
            example = {name: value[n : n + 1] for name, value in batch.items()}
            predictions = predict(model, example, objective)
            check_finite(predictions, first=n)
            if own := estimand.num_units(predictions):
                for loss in estimand.terms(predictions, example):
                    backward(model, loss.sum(), parameters, see, retain_graph=True)
            units += own
        return units

    return add


def batch_mean_engine(model: nn.Module, objective: str | LossFunction, estimand: Estimand) -> Engine:
    """The squared gradient of the mean loss of every batch; each batch is one term of the mean."""

    def add(batch: Batch, sums: Mapping[str, Tensor]) -> int:
        predictions = predict(model, batch, objective)
        check_finite(predictions)
        if not (units := estimand.num_units(predictions)):
            return 0
        (losses,) = estimand.terms(predictions, batch)
        backward(
            model, losses.sum() / units, _named(model, sums), lambda name, g: sums[name].add_(g.to(sums[name]).square())
        )
        return 1

    return add


def hooks_engine(model: nn.Module, objective: str | LossFunction, estimand: Estimand = Estimand()) -> Engine:  # noqa: B008
    """The fast engine: one forward and one backward pass per batch, exact for every parameter.

    A parameter that no rule can do exactly goes to :func:`loop_engine`, and one log line names it.
    """
    return Hooks(model, objective, estimand)


def rules_used(model: nn.Module, batch: Batch, objective: str | LossFunction) -> dict[str, str]:
    """By which rules the fast engine forms the gradient of every scored parameter; ``"loop"``: one example at a time.

    A parameter that the loss does not depend on has ``"none"``.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    engine = Hooks(model, objective, Estimand())
    engine(batch, {name: torch.zeros_like(p, dtype=wide(p).dtype) for name, p in parameters.items()})
    slow = engine.plans[0].by_loop if engine.plans else frozenset()
    return {n: "loop" if n in slow else " + ".join(sorted(engine.rules[n])) or "none" for n in parameters}


class Hooks:
    """The fast engine and its plans: a model may do one thing with padded batches and another with full ones."""

    def __init__(self, model: nn.Module, objective: str | LossFunction, estimand: Estimand) -> None:
        self.model, self.objective, self.estimand = model, objective, estimand
        self.loop = loop_engine(model, objective, estimand)
        self.plans: list[Plan] = []  # the one used last comes first
        self.rules: defaultdict[str, set[str]] = defaultdict(set)
        self.late: frozenset[str] = frozenset()  # parameters of which a plan did not know all uses

    def __call__(self, batch: Batch, sums: Mapping[str, Tensor]) -> int:
        """As for :class:`Engine`."""
        scored = num_scored(batch, self.objective)
        if not bool(scored.any()):
            return 0
        plan, units = self._fast(batch, scored, sums)
        if plan.by_loop:
            self.loop(batch, {name: sums[name] for name in plan.by_loop})
        return units

    def _fast(self, batch: Batch, scored: Tensor, sums: Mapping[str, Tensor]) -> tuple[Plan, int]:
        for plan in self._candidates(batch, scored, sums):
            with suppress(PlanOutdated):
                units, late = self._add(batch, sums, plan)
                others = [p for p in self.plans if p is not plan]
                self.plans = others if late else [plan, *others]
                self.late |= late
                return replace(plan, by_loop=plan.by_loop | late), units
        plan = Plan((), frozenset(sums))  # what the model does depends on more than the first examples show
        return plan, self._add(batch, sums, plan)[0]

    def _candidates(self, batch: Batch, scored: Tensor, sums: Mapping[str, Tensor]) -> Iterator[Plan]:
        yield from self.plans
        if len(self.plans) < MOST_PLANS:
            self.plans.append(self._planned(batch, scored, sums))
            yield self.plans[-1]

    def _add(self, batch: Batch, sums: Mapping[str, Tensor], plan: Plan) -> tuple[int, frozenset[str]]:
        """The number of units, and the parameters that turned out to need the loop after all."""

        def sink(name: str, contributions: list[Contribution]) -> None:
            accumulate(sums[name], contributions)

        recorder = self.recorder(plan, sums, size(batch), sink)
        with frozen(self.model):
            with recorder:
                predictions = predict(self.model, batch, self.objective)
                check_finite(predictions)
                terms = list(self.estimand.terms(predictions, batch))
            recorder.check_complete()
            for number, loss in enumerate(terms, 1):
                recorder.backward(loss.sum(), last=number == len(terms))
        if recorder.late and len(terms) > 1:  # some of their terms are in the sums already
            raise RuntimeError(
                f"The loss depends on '{min(recorder.late)}' in this batch, but did not in the first; use "
                "engine='loop' for this model."
            )
        return self.estimand.num_units(predictions), frozenset(recorder.late)

    def recorder(self, plan: Plan, sums: Mapping[str, Tensor], examples: int, sink: "Sink") -> "Recorder":
        """What sees one forward pass by a plan."""
        return Recorder(self.model, plan, sums, examples, sink, self.rules)

    def _planned(self, batch: Batch, scored: Tensor, sums: Mapping[str, Tensor]) -> Plan:
        def losses(examples: Batch) -> Tensor:
            return predict(self.model, examples, self.objective).losses().mean

        known = self.late.union(*(plan.by_loop for plan in self.plans))
        chosen = _telling(batch, scored)
        copies, examples = _taken(batch, [chosen[0]] * COPIES), _taken(batch, chosen)
        try:
            if self._mixes(examples, losses):
                return Plan((), frozenset(sums))
            plan = make_plan(self.model, losses, copies, list(sums), known)
            wrong = _Trial(self, plan, sums).wrong(examples)
            if wrong is None:  # the examples differ in what the model does with them; the copies do not
                wrong = _Trial(self, plan, sums).wrong(copies)
            if wrong is None:
                return Plan((), frozenset(sums))
            if wrong:
                plan = make_plan(self.model, losses, copies, list(sums), plan.by_loop | wrong)
        except ValueError:
            with torch.no_grad():  # so that the message counts examples as the batch does
                check_finite(predict(self.model, batch, self.objective))
            raise
        if new := plan.by_loop - known:
            logger.info(
                "%d parameters have no batched rule and are done one example at a time, for example '%s'.",
                len(new),
                min(new),
            )
        return plan

    def _mixes(self, examples: Batch, losses: Callable[[Batch], Tensor]) -> bool:
        """Whether the loss of an example depends on the others of its batch; alone it is what the loop says."""
        together = losses(examples).detach()
        alone = torch.cat([losses(_taken(examples, [n])).detach() for n in range(size(examples))])
        tolerance = _tolerance(self.model)
        mixes = not torch.allclose(together, alone, rtol=tolerance, atol=0.01 * tolerance)
        if mixes:
            logger.warning(
                "The loss of an example changes with the other examples of its batch (%.6g, but %.6g alone), so every "
                "example is scored alone, one at a time.",
                together[0],
                alone[0],
            )
        return mixes


def _tolerance(model: nn.Module) -> float:
    """Largest relative difference between two ways to compute the same, by the precision they are computed in."""
    parameter = next(model.parameters())
    if parameter.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(parameter.device.type):
        return 0.2
    if parameter.dtype == torch.float64:
        return 1e-5  # some models compute parts in float32
    return 3e-2 if parameter.is_cuda else 1e-3  # CUDA may multiply in TF32


def _telling(batch: Batch, scored: Tensor) -> list[int]:
    """Two examples with something to score; first a padded one, if any, since padding changes what models do.

    Of those, the longest: in a sequence of one token, attention has no gradient.
    """
    positions = scored.nonzero()[:, 0].tolist()
    if (mask := batch.get("attention_mask")) is not None:
        lengths = mask.flatten(1).sum(1).tolist()
        full = mask[0].numel()
        positions.sort(key=lambda n: (lengths[n] == full, -lengths[n]))
    return (positions * 2)[:2]


def _taken(batch: Batch, positions: list[int]) -> dict[str, Tensor]:
    return {name: value[torch.tensor(positions, device=value.device)] for name, value in batch.items()}


class _Trial:
    """One batch by a plan, compared with the loop parameter by parameter as they arrive."""

    def __init__(self, engine: Hooks, plan: Plan, sums: Mapping[str, Tensor]) -> None:
        self.engine, self.plan = engine, plan
        self.wanted = {name: torch.zeros_like(total) for name, total in sums.items() if name not in plan.by_loop}
        self.tolerance, self.floor = _tolerance(engine.model), 0.0
        self.good: set[str] = set()

    def wrong(self, examples: Batch) -> frozenset[str] | None:
        """The parameters for which the plan does not give what the loop gives; None if the plan does not fit.

        Raises:
            ValueError: If a gradient is not finite although the loss is.
        """
        model = self.engine.model
        loop_engine(model, self.engine.objective)(examples, self.wanted)
        for name, total in self.wanted.items():
            if not math.isfinite(norm(total)):
                raise ValueError(
                    f"Every example needs a finite gradient, but that of '{name}' is not, although the loss is; check "
                    "how the model treats padding."
                )
        self.floor = 1e-9 * max((norm(t) for t in self.wanted.values()), default=0.0)
        recorder = self.engine.recorder(self.plan, self.wanted, size(examples), self._compare)
        try:
            with frozen(model):
                with recorder:
                    loss = predict(model, examples, self.engine.objective).losses().mean.sum()
                recorder.check_complete()
                recorder.backward(loss, last=True)
        except PlanOutdated:
            return None
        never = {name for name, total in self.wanted.items() if norm(total) <= self.floor}
        return (frozenset(self.wanted) - self.good - never) | recorder.late

    def _compare(self, name: str, contributions: list[Contribution]) -> None:
        found = zeros_of_whole(self.wanted[name])
        accumulate(found, contributions)
        found = own_part(found, self.wanted[name])
        size, error = norm(self.wanted[name]), norm(found - self.wanted[name])
        if error <= self.tolerance * size + self.floor:
            self.good.add(name)


def _named(model: nn.Module, names: Container[str]) -> dict[str, nn.Parameter]:
    return {name: p for name, p in computing_parameters(model).items() if name in names}


def norm(tensor: Tensor) -> float:
    """Of a whole tensor, sharded or not."""
    return float(whole(tensor.norm()))


def size(batch: Batch) -> int:
    """Number of examples."""
    return len(next(iter(batch.values())))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight needs a gradient for the length of the block."""
    required = {p: p.requires_grad for p in (*computing_parameters(model).values(), *model.parameters())}
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


Sink = Callable[[str, list[Contribution]], None]


class Recorder(Follower):
    """Sees one forward pass by a plan, and passes every parameter's contributions on as soon as all are in."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        sums: Mapping[str, Tensor],
        examples: int,
        sink: Sink,
        rules: Mapping[str, set[str]],
    ) -> None:
        names = {id(p): n for n, p in _named(model, sums).items() if n not in plan.by_loop}
        super().__init__(names)
        self.model = model
        self.plan, self.examples, self.sink, self.rules = plan, examples, sink, rules
        self.position = self.after_forward = 0
        self.shared: dict[int, tuple[Operation, list[Tensor]]] = {}
        self.arrived: defaultdict[str | int, list[tuple[int, Contribution]]] = defaultdict(list)
        self.counts: Counter[str | int] = Counter()
        self.last = False
        self.uncertain = frozenset[str]().union(*(step.roots for step in plan.steps))
        self.late: set[str] = set()

    def note(self, operation: Operation, sources: Mapping[Slot, Source], result: Any) -> Any:
        """Compare with the plan and do what it says."""
        number, self.position = self.position, self.position + 1
        step = self.plan.steps[number] if number < len(self.plan.steps) else None
        if step is None or step.function != operation.function or step.sources != sources:
            raise PlanOutdated
        outputs = outputs_of(result)
        if step.kind == "shared":
            self._share(number, step, operation, outputs)
        elif step.kind == "use":
            output = outputs[step.outputs[0]]
            return with_output(result, output, self._use(step, operation, output))
        elif not operation.in_place:
            for k in step.outputs:
                result = with_output(result, outputs[k], self._watch(step, outputs[k]))
        return result

    def check_complete(self) -> None:
        """The model must have come to all steps of the plan.

        Raises:
            PlanOutdated: If not.
        """
        selects = self.data_dependent and not self.plan.data_dependent
        if selects and any(step.layout and step.layout.merged for step in self.plan.steps):
            raise PlanOutdated
        if self.position != len(self.plan.steps) and not self.plan.checkpointed:
            raise PlanOutdated
        self.after_forward = self.position

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Run a backward pass; the weights are frozen, so only the recorded outputs receive gradients."""
        self.last, self.position = last, self.after_forward
        try:
            with self if self.plan.checkpointed else nullcontext():
                backward(self.model, loss, {}, _ignored, retain_graph=not last)
        except PlanOutdated:
            raise RuntimeError(
                "A checkpointed part of the model did something new in the backward pass; use engine='loop' for it."
            ) from None
        while steps := [k for k in self.arrived if isinstance(k, int)]:
            self._settle(max(steps))  # a use that the loss does not depend on never arrives
        for name in [k for k in self.arrived if isinstance(k, str)]:
            if name in self.late:
                del self.arrived[name]
            else:
                self._settle(name)
        self.counts.clear()

    def _share(self, number: int, step: Step, operation: Operation, outputs: list[Tensor]) -> None:
        if any(n == 1 and len(t) != 1 for n, t in zip(step.lengths, outputs, strict=True)):
            raise PlanOutdated  # what all examples shared is now per example
        self.shared[number] = operation, outputs
        for k in step.outputs:
            self.follow(outputs[k], (number, k))

    def _use(self, step: Step, operation: Operation, output: Tensor) -> Tensor:
        assert step.layout is not None
        if not step.layout.fits(output, self.examples):
            raise PlanOutdated
        if not output.requires_grad:
            if operation.in_place:
                raise PlanOutdated  # it is the model's own tensor that would have to want a gradient
            output = output.detach().requires_grad_().clone()  # no leaf: the model may change it in place
        on_gradient(output, self._arrive(step, operation))
        return output

    def _watch(self, step: Step, output: Tensor) -> Tensor:
        """Notice when the loss depends on what it did not depend on in the experiment."""

        def see(gradient: Tensor) -> None:
            if bool(gradient.any()):
                self.late |= step.roots

        output = output if output.requires_grad else output.detach().requires_grad_().clone()
        on_gradient(output, see)
        return output

    def _arrive(self, step: Step, operation: Operation) -> Callable[[Tensor], None]:
        waiting = [_detached(operation)]
        versions = _versions(operation)

        def arrive(gradient: Tensor) -> None:
            done = waiting.pop() if self.last else waiting[0]  # its inputs are not needed any more
            if operation_changed(done):
                raise RuntimeError(
                    f"An input of {done.name} was changed in place after use, so no gradient can be formed from it; "
                    "use engine='loop' for this model."
                )
            use = Use(done, tuple(step.sources), step.layout, gradient, self.examples, step.outputs[0])
            rule, found = contributions_of(use)
            for slot, contribution in found.items():
                self._deliver(step.sources[slot], [contribution], rule)

        def operation_changed(done: Operation) -> bool:
            return done.function not in SUMS and _versions(done) != versions

        return arrive

    def _deliver(self, source: Source, contributions: list[Contribution], rule: str) -> None:
        key, output = (source, 0) if isinstance(source, str) else source
        if isinstance(source, str):
            self.rules[source].add(rule)
        self.arrived[key] += [(output, c) for c in contributions]
        self.counts[key] += 1
        if self.counts[key] == self.plan.arrivals[key] and key not in self.uncertain:
            self._settle(key)

    def _settle(self, key: str | int) -> None:
        arrived = self.arrived.pop(key)
        if isinstance(key, str):
            self.sink(key, [c for _, c in arrived])
            return
        operation, outputs = self.shared[key]
        by_output: defaultdict[int, list[Contribution]] = defaultdict(list)
        for k, contribution in arrived:
            by_output[k].append(contribution)
        sources = self.plan.steps[key].sources
        shapes = [tuple(t.shape) for t in outputs]
        for slot, found in pull_back(operation, tuple(sources), shapes, by_output, self.examples).items():
            self._deliver(sources[slot], found, "chain")


def _ignored(name: str, gradient: Tensor) -> None:
    """The weights are frozen."""


def _detached(operation: Operation) -> Operation:
    def detached(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach()
        return type(value)([detached(v) for v in value]) if type(value) in (list, tuple) else value

    kwargs = {key: detached(value) for key, value in operation.kwargs.items()}
    return Operation(operation.function, tuple(detached(a) for a in operation.args), kwargs, operation.in_place)


def _versions(operation: Operation) -> list[int]:
    values = (*operation.args, *operation.kwargs.values())
    return [t._version for v in values for t in (v if type(v) in (list, tuple) else [v]) if isinstance(t, Tensor)]
