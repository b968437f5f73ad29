"""The plan of a run: which operations use scored parameters and where the examples are, found by experiment.

The model is run on two copies of one example, and the loss of the first and then of the second is differentiated.
Where those gradients are not zero is where the example is: this tells the example axis of every tensor, whatever the
model calls it, and which tensors are shared by all examples. The plan is then tried on two different examples
against one backward pass per example; a parameter that comes out wrong, or that the experiment leaves unclear, goes to
the loop. Nothing is assumed about modules.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..objectives import Batch
from .layout import ByExample, layouts_holding
from .operations import Follower, Operation, Slot, Source, on_gradient, outputs_of
from .rules import LINEAR_IN_PLACE, SUMS
from .sharding import computing_parameters, local

logger = logging.getLogger(__name__)

COPIES = 2
"""Of one example in the experiment."""

Losses = Callable[[Batch], Tensor]
"""The loss of every example of a batch."""


class PlanOutdated(Exception):
    """The model did something in this batch that it did not do in the experiment."""


@dataclass(frozen=True)
class Step:
    """One operation with a followed tensor among its inputs.

    Attributes:
        function: What is called.
        sources: The followed inputs: parameters, and outputs of earlier steps.
        kind: ``"use"``: the output is indexed by example. ``"shared"``: it is not, and is followed in turn.
            ``"inert"``: the loss did not depend on it in the experiment.
        layout: Of a use: where the examples are in the output.
        outputs: The outputs that matter; of an inert step, those that a gradient might come back to after all.
        lengths: First axis of the outputs of a shared step, None where there is none.
        roots: Of an inert step: the parameters it is made of.
    """

    function: Callable[..., Any]
    sources: Mapping[Slot, Source]
    kind: Literal["use", "shared", "inert"]
    layout: ByExample | None = None
    outputs: tuple[int, ...] = ()
    lengths: tuple[int | None, ...] = ()
    roots: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """What is done with every operation that uses a scored parameter.

    Attributes:
        steps: In the order in which the model comes to them.
        by_loop: The parameters that the loop does.
        data_dependent: Whether the model selects or sorts by value.
        checkpointed: Whether operations run again in the backward pass.
        arrivals: How many contributions a parameter, or a shared step, gets from one backward pass.
    """

    steps: tuple[Step, ...]
    by_loop: frozenset[str]
    data_dependent: bool = False
    checkpointed: bool = False
    arrivals: Mapping[str | int, int] = field(default_factory=dict)


def make_plan(model: nn.Module, losses: Losses, examples: Batch, names: Sequence[str], slow: frozenset[str]) -> Plan:
    """Find out how the gradient of every scored parameter comes about.

    Args:
        model: The model that ``losses`` calls.
        losses: Per-example losses of a batch.
        examples: :data:`COPIES` times the same example; it must have something to score.
        names: The scored parameters.
        slow: Those of them that are known to need the loop.
    """
    with _nowhere_zero(model):
        while True:
            parameters = computing_parameters(model)
            wanted = {id(p): name for name, p in parameters.items() if name in names and name not in slow}
            first, second = (_experiment(model, losses, examples, wanted, n) for n in (0, 1))
            steps, unclear = _steps(first, second)
            if not unclear:
                break
            slow |= unclear
    data_dependent = first.data_dependent or second.data_dependent
    return Plan(tuple(steps), slow, data_dependent, first.without_gradient, _arrivals(steps))


@contextmanager
def _nowhere_zero(model: nn.Module) -> Iterator[None]:
    """Small random values in parameters that are zero all over: behind them, gradients would vanish."""
    own = [local(p.detach()) for p in model.parameters()]
    kept = [(p, p.clone()) for p in own if p.is_floating_point() and not bool(p.any())]
    try:
        with torch.no_grad():
            for i, (p, _) in enumerate(kept):
                draw = torch.Generator().manual_seed(i)
                p.copy_(torch.randn(p.shape, generator=draw).mul_(0.02))
        yield
    finally:
        with torch.no_grad():
            for p, values in kept:
                p.copy_(values)


@dataclass
class _Entry:
    """An operation as it was seen in one experiment; ``layouts`` is None for an output no gradient came back to."""

    function: Callable[..., Any]
    in_place: bool
    writes_only: bool
    sources: dict[Slot, Source]
    lengths: list[int | None]
    differentiable: list[bool]
    layouts: list[set[ByExample] | None]
    vanished: list[bool]

    @property
    def signature(self) -> tuple[Any, ...]:
        return self.function, tuple(self.sources.items()), len(self.layouts)


class _Experiment(Follower):
    """Follows everything that depends on a parameter, and notes where the gradient of one example's loss is."""

    def __init__(self, names: Mapping[int, str], example: int) -> None:
        super().__init__(names)
        self.example = example
        self.entries: list[_Entry] = []

    def note(self, operation: Operation, sources: Mapping[Slot, Source], result: Any) -> Any:
        outputs = outputs_of(result)
        lengths = [len(t) if t.ndim else None for t in outputs]
        count = max(len(outputs), 1)
        entry = _Entry(
            operation.function,
            operation.in_place,
            not outputs,
            dict(sources),
            lengths,
            [tensor.grad_fn is not None for tensor in outputs],
            [None] * count,
            [False] * count,
        )
        for k, tensor in enumerate(outputs):
            if tensor.grad_fn is not None:
                self.follow(tensor, (len(self.entries), k))
                on_gradient(tensor, self._see(entry, k))
        self.entries.append(entry)
        return result

    def _see(self, entry: _Entry, output: int) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            entry.layouts[output] = layouts_holding(gradient, self.example, COPIES)
            entry.vanished[output] = not bool(gradient.any())

        return see


def _experiment(model: nn.Module, losses: Losses, examples: Batch, names: Mapping[int, str], n: int) -> _Experiment:
    parameters = {name: p for name, p in computing_parameters(model).items() if p.requires_grad}
    with torch.enable_grad(), _Experiment(names, n) as experiment:
        loss = losses(examples)[n]
    with experiment if experiment.without_gradient else nullcontext():
        backward(model, loss, parameters, lambda name, gradient: None)
    return experiment


def backward(
    model: nn.Module,
    loss: Tensor,
    parameters: Mapping[str, nn.Parameter],
    see: Callable[[str, Tensor], object],
    *,
    retain_graph: bool = False,
) -> None:
    """Run a backward pass, showing the gradient of every parameter once it is complete.

    Every ``.grad`` stays as it was. One such gradient is held at a time, but all of them with reentrant checkpointing,
    where they come in pieces.
    """
    leaves, reentrant = _graph(loss)
    if loss.grad_fn is None or not leaves:
        return
    hidden = [p for p in model.parameters() if p.requires_grad] if reentrant else []
    kept = {leaf: leaf.grad for leaf in (*leaves, *hidden)}

    def take(name: str) -> Callable[[Tensor], None]:
        def taken(parameter: Tensor) -> None:
            if parameter.grad is not None:
                see(name, parameter.grad)
                parameter.grad = None

        return taken

    takers = {parameter: take(name) for name, parameter in parameters.items()}
    with ExitStack() as hooks:
        hooks.callback(lambda: [setattr(leaf, "grad", gradient) for leaf, gradient in kept.items()])
        for leaf in kept:
            leaf.grad = None
        if reentrant:  # refuses to know its inputs
            loss.backward(retain_graph=retain_graph)
            for parameter, taker in takers.items():
                taker(parameter)
        else:
            for parameter, taker in takers.items():
                hooks.callback(parameter.register_post_accumulate_grad_hook(taker).remove)
            wanted = [leaf for leaf in leaves if leaf in takers] or leaves
            loss.backward(retain_graph=retain_graph, inputs=wanted)


def _graph(loss: Tensor) -> tuple[list[Tensor], bool]:
    """All leaves of the graph of a loss, and whether a part of it is checkpointed the reentrant way."""
    leaves, seen, queue, reentrant = [], set(), [loss.grad_fn], False
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reentrant |= node.name() == "CheckpointFunctionBackward"
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        queue += [following for following, _ in node.next_functions]
    return leaves, reentrant


Kind = ByExample | Literal["shared", "inert", "unclear"]


def _steps(first: _Experiment, second: _Experiment) -> tuple[list[Step], frozenset[str]]:
    """The operations that matter, and the parameters whose way to the loss is unclear."""
    if [e.signature for e in first.entries] != [e.signature for e in second.entries]:
        return [], frozenset(first._names.values())  # the model does not do the same thing twice
    found = [[_held(*pair, k) for k in range(len(pair[0].layouts))] for pair in _pairs(first, second)]
    orders = _merging_orders(found)
    if first.data_dependent or second.data_dependent:
        orders = frozenset()
    steps: list[Step] = []
    unclear: set[str] = set()
    live: dict[Source, Source] = {}  # what is followed in a run, by what it was in the experiment
    origins: dict[Source, frozenset[str]] = {}
    for i, (one, other) in enumerate(_pairs(first, second)):
        kept = {slot: live.get(s, s) for slot, s in one.sources.items() if isinstance(s, str) or s in live}
        if not kept:
            continue
        named = (frozenset([s]) if isinstance(s, str) else origins.get(s, frozenset()) for s in one.sources.values())
        roots = frozenset[str]().union(*named)
        kinds: list[Kind] = [_kind(one, other, k, found[i][k], orders) for k in range(len(one.layouts))]
        step = _step(one, kept, kinds, roots, mixes=len(kept) < len(one.sources))
        if step is None:
            unclear |= roots
            continue
        if step.kind == "shared":
            for k in step.outputs:
                live[i, k], origins[i, k] = (len(steps), k), roots
        steps.append(step)
    return steps, frozenset(unclear)


def _pairs(first: _Experiment, second: _Experiment) -> Iterator[tuple[_Entry, _Entry]]:
    return zip(first.entries, second.entries, strict=True)


def _held(one: _Entry, other: _Entry, output: int) -> set[ByExample]:
    """The layouts that fit both gradients."""
    return (one.layouts[output] or set()) & (other.layouts[output] or set())


def _merging_orders(found: Sequence[Sequence[set[ByExample]]]) -> frozenset[str]:
    """How this model merges examples with positions, told by the outputs that leave no doubt.

    A gradient at a few positions only, such as that of a class token, may fit either order.
    """
    clear = (layouts for entry in found for layouts in entry if len(layouts) == 1)
    return frozenset(merged for layouts in clear for layout in layouts if (merged := layout.merged))


def _kind(one: _Entry, other: _Entry, output: int, held: set[ByExample], orders: frozenset[str]) -> Kind:
    a, b = one.layouts[output], other.layouts[output]
    if a is None and b is None:
        return "inert"
    if a is None or b is None or one.vanished[output] or other.vanished[output]:
        return "unclear"
    if not held:
        return "shared"
    plain = [layout for layout in held if layout.merged is None]
    possible = plain or [layout for layout in held if layout.merged in orders]
    return possible[0] if len(possible) == 1 else "unclear"


def _step(
    entry: _Entry, sources: Mapping[Slot, Source], kinds: Sequence[Kind], roots: frozenset[str], *, mixes: bool
) -> Step | None:
    """None: unclear."""
    function = entry.function
    outputs = tuple(k for k, kind in enumerate(kinds) if kind != "inert")
    found = {kinds[k] for k in outputs}
    if entry.writes_only:
        return None
    if not found:
        unused = tuple(k for k, differentiable in enumerate(entry.differentiable) if differentiable)
        return Step(function, sources, "inert", None, unused, roots=roots)
    if found == {"shared"} and not mixes and (not entry.in_place or _scales(entry, sources)):
        return Step(function, sources, "shared", None, outputs, tuple(entry.lengths))
    layout = kinds[outputs[0]]
    if len(outputs) == 1 and isinstance(layout, ByExample) and (function in SUMS or not entry.in_place):
        return Step(function, sources, "use", layout, outputs)
    return None


def _scales(entry: _Entry, sources: Mapping[Slot, Source]) -> bool:
    """Whether an operation in place is linear in what it changes: its old value is gone, and not needed."""
    return entry.function in LINEAR_IN_PLACE and set(sources) == {(0,)}


def _arrivals(steps: Sequence[Step]) -> dict[str | int, int]:
    counts: Counter[str | int] = Counter()
    for step in steps:
        if step.kind != "inert":
            counts.update(source if isinstance(source, str) else source[0] for source in step.sources.values())
    return dict(counts)
