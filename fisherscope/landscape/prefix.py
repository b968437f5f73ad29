"""What a model computes before it first uses a parameter that moves: run once per batch, then given back.

With only the last layers moving, everything before them is the same at every point. The calls of modules that end
before the first moving parameter is used are found by watching one forward pass, so nothing is assumed of how the
model is built.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..objectives import Predictions

logger = logging.getLogger(__name__)


class Prefix:
    """The outputs of those calls of a model's modules that no moving parameter reaches, batch by batch.

    Attributes:
        used: Bytes that are held.
    """

    def __init__(self, model: nn.Module, moving: Iterable[nn.Parameter], room: int) -> None:
        """Hold nothing yet.

        Args:
            model: The model, in eval mode whenever it runs.
            moving: Its parameters that change between runs.
            room: Bytes that may be held; batches beyond that run in full.
        """
        self.model, self.room, self.used = model, room, 0
        self._moving = {id(parameter) for parameter in moving}
        self._kept: dict[int, _Replay] = {}
        self._plain: set[int] = set()

    def holds(self, number: int) -> bool:
        """Whether a batch is run from what is held."""
        return number in self._kept

    def run(self, number: int, compute: Callable[[], Predictions]) -> Predictions:
        """What ``compute`` returns, bit for bit; the first time for a batch, what is constant is kept.

        Args:
            number: Of the batch.
            compute: Runs the model on that batch.
        """
        if number in self._plain:
            return compute()
        if number in self._kept:
            with _replaying(self._kept[number]):
                return compute()
        recorder = _Recorder(self.model, self._moving)
        with recorder.watching():
            predictions = compute()
        if not recorder.calls:
            self._plain.add(number)
        elif bool(predictions.outputs.isfinite().all()):  # else nothing could be checked; try at the next point
            self._keep(number, recorder.calls, predictions, compute)
        return predictions

    def _keep(
        self, number: int, calls: "Sequence[_Call]", wanted: Predictions, compute: Callable[[], Predictions]
    ) -> None:
        """Keep as little as gives the same bits: without what only kept calls read, or else everything."""
        self._plain.add(number)
        for replay in ([call if call.is_read else call.hollow() for call in calls], calls):
            found, size = _by_module(replay), _size(replay)
            if self.used + size > self.room:
                logger.info("Batches from number %d on are run in full at every point: no memory for more.", number)
                return
            if _gives(wanted, found, compute):
                self._plain.discard(number)
                self._kept[number], self.used = found, self.used + size
                return
        logger.info("Every point runs the model in full: it does more in a module than its outputs tell.")


@dataclass(eq=False)
class _Call:
    """A call of a module that ended before anything that moves was used."""

    module: nn.Module
    output: Any
    read_by_kept: bool = False
    read_by_others: bool = False

    def __post_init__(self) -> None:
        self.tensors = [leaf for leaf in tree_leaves(self.output) if isinstance(leaf, Tensor)]
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in self.tensors}

    @property
    def is_read(self) -> bool:
        """Whether what still runs may read the output: code outside of any module may, unless a kept call did."""
        return self.read_by_others or not self.read_by_kept

    def hollow(self) -> "_Call":
        """The same with NaN that take no memory, which show in the loss if they are read after all."""

        def emptied(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf.new_full((), torch.nan).expand(leaf.shape)
            return leaf

        return _Call(self.module, tree_map(emptied, self.output))


_Replay = Mapping[nn.Module, Sequence[_Call]]
"""What the first calls of some modules give back, in order."""


@dataclass
class _Frame:
    """A call that has not ended."""

    start: int
    inputs: list[_Call]


class _Recorder:
    """Watches a forward pass.

    Attributes:
        calls: The outermost constant calls, in their order.
    """

    def __init__(self, model: nn.Module, moving: set[int]) -> None:
        self.model = model
        self.owners = {m for m in model.modules() if any(id(p) in moving for p in m.parameters(recurse=False))}
        self.depending = {m for m in model.modules() if any(id(p) in moving for p in m.parameters())}
        self.calls: list[_Call] = []
        self._open: list[_Frame] = []
        self._moved = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on all modules, for the length of a block."""
        with ExitStack() as stack:
            for module in self.model.modules():
                before = module.register_forward_pre_hook(self._begin, with_kwargs=True)
                stack.callback(before.remove)
                # first, so that what a hook of others makes of the output is made again
                stack.callback(module.register_forward_hook(self._end, prepend=True).remove)
            yield

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._moved = self._moved or module in self.owners
        found = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self._open.append(_Frame(len(self.calls), [call for call in self.calls if call.storages & found]))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        frame = self._open.pop()
        self._moved = self._moved or module in self.depending  # which may use what its own children own
        for call in frame.inputs:
            call.read_by_kept |= not self._moved
            call.read_by_others |= self._moved
        if not self._moved:
            self.calls[frame.start :] = [_Call(module, output)]


def _by_module(calls: Sequence[_Call]) -> _Replay:
    found: dict[nn.Module, list[_Call]] = {}
    for call in calls:
        found.setdefault(call.module, []).append(call)
    return found


def _size(calls: Iterable[_Call]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for c in calls for tensor in c.tensors}
    return sum(storage.nbytes() for storage in storages.values())


@contextmanager
def _replaying(replay: _Replay) -> Iterator[None]:
    """Let the first calls of modules give back what is kept; later ones run."""
    own = {module: vars(module).get("forward") for module in replay}
    try:
        for module, calls in replay.items():
            module.forward = _given(module.forward, calls)
        yield
    finally:
        for module, forward in own.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _given(forward: Callable[..., Any], calls: Sequence[_Call]) -> Callable[..., Any]:
    left = iter(calls)

    def run(*args: Any, **kwargs: Any) -> Any:
        call = next(left, None)
        return forward(*args, **kwargs) if call is None else tree_map(lambda leaf: leaf, call.output)  # new containers

    return run


def _gives(wanted: Predictions, replay: _Replay, compute: Callable[[], Predictions]) -> bool:
    """Whether a replay gives the same bits; a model may also refuse what it is given back."""
    try:
        with _replaying(replay):
            return same(wanted, compute())
    except Exception:  # whatever a model raises that gets NaN, or misses what a module would have noted elsewhere
        logger.debug("A replay failed.", exc_info=True)
        return False


def same(a: Predictions, b: Predictions) -> bool:
    """Whether two predictions are equal and finite."""
    return torch.equal(a.outputs, b.outputs) and bool(a.outputs.isfinite().all())
