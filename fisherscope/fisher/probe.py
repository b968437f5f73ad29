"""Which module uses which parameter, and where the examples are: found by watching the model, never assumed.

The model is run on two examples and on three. An input whose first axis has length 2 in one run and 3 in the other
is indexed by example; one that stays the same is shared by all. The length of that axis in a single run proves
nothing: a sequence may be as long as the batch.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Key = int | str
Sizes = dict[Key, int | None]

OUTSIDE = nn.Module()
"""Stands for the code around the model: a loss function that uses a parameter itself."""


@dataclass
class Usage:
    """What was seen of one module.

    Attributes:
        parameters: How many operations of this module's own forward function, over all calls, use the values of which
            parameter, by canonical name.
        sizes: For both runs, for every call, the length of the first axis of each tensor input and of the output
            (``None`` where there is none, or the output is no tensor).
        call: Inputs and output of the latest call.
    """

    parameters: Counter[str] = field(default_factory=Counter)
    sizes: tuple[list[Sizes], list[Sizes]] = field(default_factory=lambda: ([], []))
    call: tuple[tuple[Any, ...], dict[str, Any], Any] = ((), {}, None)

    def uses_per_call(self) -> dict[str, int] | None:
        """Operations per call that use a parameter; None if the calls do not agree."""
        calls = len(self.sizes[0]) + len(self.sizes[1])
        if not calls or any(count % calls for count in self.parameters.values()):
            return None
        return {name: count // calls for name, count in self.parameters.items()}

    def batched(self) -> frozenset[Key] | None:
        """The inputs (and ``"output"``) indexed by example in every call; None if the calls do not agree."""
        kinds = {frozenset(k for k in pair[0] if _grows(pair, k)) for pair in self._pairs()}
        return kinds.pop() if len(kinds) == 1 else None

    def shared_by_one(self) -> bool:
        """Whether in every call the first input and the output have a first axis of length 1, whatever the batch."""
        pairs = list(self._pairs())
        return bool(pairs) and all(call.get(0) == call.get("output") == 1 for pair in pairs for call in pair)

    def _pairs(self) -> Iterator[tuple[Sizes, Sizes]]:
        two, three = self.sizes
        if len(two) == len(three):
            yield from zip(two, three, strict=True)
        else:  # not the same calls in both runs: two pairs that disagree, so that nothing is concluded
            nothing, grows = Sizes(), Sizes({0: 2})
            yield from ((nothing, nothing), (grows, Sizes({0: 3})))


def _grows(pair: tuple[Sizes, Sizes], key: Key) -> bool:
    return pair[0].get(key) == 2 and pair[1].get(key) == 3


def watch(
    model: nn.Module, batch: Mapping[str, Tensor], names: Mapping[int, str], run: Callable[[dict[str, Tensor]], Any]
) -> dict[nn.Module, Usage]:
    """Run the model on two and on three examples of a batch and report on every module that is called.

    Args:
        model: The model that ``run`` calls.
        batch: At least one example; examples are repeated where there are fewer than three.
        names: ``id(parameter)`` to canonical name, of the parameters that matter.
        run: Calls the model on a batch.
    """
    usages: dict[nn.Module, Usage] = defaultdict(Usage)
    for size in (2, 3):
        with torch.no_grad(), _Watcher(model, names, usages, run_number=size - 2):
            run(repeated(batch, size))
    return dict(usages)


def repeated(batch: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """The first ``size`` examples of a batch, over again where it has fewer."""
    return {name: value[torch.arange(size, device=value.device) % len(value)] for name, value in batch.items()}


class ParameterUses(TorchFunctionMode):
    """Counts the operations that use the values of a parameter, while the mode is on.

    Attributes:
        counts: Number of operations by canonical name.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        """Count for the parameters named, by ``id(parameter)``."""
        super().__init__()
        self.names = names
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note its parameters."""
        result = function(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size):  # no use of the values
            for value in tree_leaves((args, kwargs)):
                if (name := self.names.get(id(value))) is not None:
                    self.note(name)
        return result

    def note(self, name: str) -> None:
        """Count one use."""
        self.counts[name] += 1


class _Watcher(ParameterUses):
    """Notes the uses under the module whose forward is running, and the sizes of what goes in and out."""

    def __init__(
        self, model: nn.Module, names: Mapping[int, str], usages: dict[nn.Module, Usage], run_number: int
    ) -> None:
        super().__init__(names)
        self.model, self.usages, self.run_number = model, usages, run_number
        self.running: list[nn.Module] = [OUTSIDE]
        self.hooks = ExitStack()

    def note(self, name: str) -> None:
        self.usages[self.running[-1]].parameters[name] += 1

    def __enter__(self) -> "_Watcher":
        for module in self.model.modules():
            self.hooks.enter_context(_removed(module.register_forward_pre_hook(self._begin)))
            self.hooks.enter_context(
                _removed(module.register_forward_hook(self._end, with_kwargs=True, always_call=True))
            )
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.hooks.close()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.running.append(module)

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.running.pop()
        sizes = {key: _length(value) for key, value in (*enumerate(args), *kwargs.items(), ("output", output))}
        usage = self.usages[module]
        usage.call = (args, kwargs, output)
        usage.sizes[self.run_number].append(sizes)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, Tensor) and value.ndim > 0 else None


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
