"""The recorder: follows one forward pass by a plan, and collects what every use of a parameter adds to its gradient."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from .contributions import Contribution
from .engines import parameters_named
from .operations import Follower, Operation, Slot, Source, on_gradient, outputs_of, with_output
from .plan import Plan, PlanOutdated, Step, backward
from .rules import SUMS, Use, contributions_of, pull_back
from .sharding import computing_parameters


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
        names = {id(p): n for n, p in parameters_named(model, sums).items() if n not in plan.by_loop}
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
