"""Operations: every call of a torch function that computes with a parameter, seen as the model runs.

The model's code is not patched and its modules are not looked at: what is followed are tensors. A parameter may be
used by a module of any kind, by the code around the model, more than once, cast or reshaped first; all of that is a
torch function with the parameter, or something made of it, among its inputs.
"""

import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Slot = tuple[int | str, ...]
"""Where an input stands: ``(1,)`` the second, ``("weight",)`` that keyword, ``(0, 2)`` the third of the first list."""

Source = str | tuple[int, int]
"""What a tensor is: a parameter, by canonical name, or output ``(operation, output)`` of an operation seen before."""

_DATA_DEPENDENT = frozenset(
    f
    for name in ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "sort", "argsort", "topk")
    for f in (getattr(torch, name, None), getattr(Tensor, name, None))
    if f is not None
)


_HANDED_ON = "RegisterPostBackwardFunctionBackward"
"""FSDP hands a sharded module copies of its inputs, all made by this node, to learn when the module is done."""

_BASE_OF_VIEW: Any = Tensor._base.__get__  # pyright: ignore
"""What a tensor is a view of: FSDP looks at it, and nobody computes with it."""


@dataclass(frozen=True)
class Operation:
    """One call of a torch function.

    Attributes:
        function: The function.
        args: Its positional inputs.
        kwargs: Its keyword inputs.
        in_place: Whether it wrote to one of its inputs.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    in_place: bool = False

    @property
    def name(self) -> str:
        """Name of the function."""
        return getattr(self.function, "__name__", "")

    def __getitem__(self, slot: Slot) -> Any:
        """The input in a slot."""
        value: Any = self.args[slot[0]] if isinstance(slot[0], int) else self.kwargs[slot[0]]
        return value if len(slot) == 1 else value[slot[1]]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An input that may be given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def run(self, replaced: Mapping[Slot, Tensor]) -> Any:
        """Call the function again with other tensors in some slots."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for slot, tensor in replaced.items():
            place: Any = args if isinstance(slot[0], int) else kwargs
            if len(slot) == 2:
                inner = list(place[slot[0]])
                inner[slot[1]] = tensor  # pyright: ignore
                place[slot[0]] = type(place[slot[0]])(inner)
            else:
                place[slot[0]] = tensor
        return self.function(*args, **kwargs)


class Follower(TorchFunctionMode):
    """While the mode is on, tells of every operation that has a followed tensor among its inputs.

    Attributes:
        data_dependent: Whether the order or number of rows of some tensor has depended on values.
        without_gradient: Whether a followed tensor was used where gradients are off; reentrant checkpointing does
            that, and runs the operation again in the backward pass.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        """Follow the parameters named, by ``id(parameter)``."""
        super().__init__()
        self._names = names
        self._followed: dict[int, tuple[weakref.ref[Tensor], Source]] = {}
        self._nodes: dict[tuple[object, int], Source] = {}
        self.data_dependent = False
        self.without_gradient = False

    @abstractmethod
    def note(self, operation: Operation, sources: Mapping[Slot, Source], result: Any) -> Any:
        """See one operation and return its result, or what the model is to get instead."""

    def follow(self, tensor: Tensor, source: Source) -> None:
        """Tell of uses of this tensor as well."""
        self._followed[id(tensor)] = (weakref.ref(tensor), source)
        if tensor.grad_fn is not None:
            self._nodes[tensor.grad_fn, tensor.output_nr] = source

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note it."""
        kwargs = kwargs or {}
        if function in _DATA_DEPENDENT or (function is Tensor.__getitem__ and _by_mask(args[1])):
            self.data_dependent = True
        sources = {slot: source for slot, t in _tensors(args, kwargs) if (source := self._source(t)) is not None}
        if not sources or function == _BASE_OF_VIEW:
            return function(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.without_gradient = True
            return function(*args, **kwargs)
        versions = [t._version for _, t in _tensors(args, kwargs)]
        result = function(*args, **kwargs)
        in_place = versions != [t._version for _, t in _tensors(args, kwargs)]
        operation = Operation(function, args, kwargs, in_place)
        if not in_place and any(result is operation[slot] for slot in sources):
            return result  # such as contiguous() of what is contiguous
        if not outputs_of(result) and not in_place:
            return result  # a shape, a number, a flag: no gradient flows through it
        return self.note(operation, sources, result)

    def _source(self, tensor: Tensor) -> Source | None:
        if (name := self._names.get(id(tensor))) is not None:
            return name
        reference, source = self._followed.get(id(tensor), (None, None))
        if reference is not None and reference() is tensor:
            return source
        if tensor.grad_fn is not None and tensor.grad_fn.name() == _HANDED_ON:
            return self._nodes.get(tensor.grad_fn.next_functions[tensor.output_nr])
        return None


def outputs_of(result: Any) -> list[Tensor]:
    """The floating-point tensors of a result."""
    results = result if isinstance(result, tuple | list) else [result]
    return [r for r in results if isinstance(r, Tensor) and (r.is_floating_point() or r.is_complex())]


def on_gradient(output: Tensor, see: Callable[[Tensor], None]) -> None:
    """Call a function with the gradient of an operation's output, once it is complete.

    The hook is on the node of the graph: one on the tensor is lost when the model changes a view of it in place.
    """
    node, number = output.grad_fn, output.output_nr
    assert node is not None

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        if (gradient := gradients[number]) is not None:
            see(gradient)

    node.register_prehook(before)


def with_output(result: Any, old: Tensor, new: Tensor) -> Any:
    """A result with one of its tensors replaced."""
    if result is old:
        return new
    return type(result)([new if r is old else r for r in result])


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Slot, Tensor]]:
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor):
            yield (key,), value
        elif isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                if isinstance(inner, Tensor):
                    yield (key, i), inner


def _by_mask(index: Any) -> bool:
    indices = index if isinstance(index, tuple) else (index,)
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
