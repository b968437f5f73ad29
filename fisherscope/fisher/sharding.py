"""Models whose parameters are spread over the ranks by FSDP2, ``torch.distributed.fsdp.fully_shard``.

Every rank runs its own batch through the whole model, which FSDP puts together layer by layer, and forms per-example
squares of whole parameters, one at a time. Their sum over the ranks is scattered at once, so that the sums of squares
lie as the parameters do. A forward or backward pass, a plan, a parameter's sum: all of that is a meeting of all ranks,
so all do the same at the same time.
"""

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..distributed import is_sharded

_whole: "weakref.WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]]" = weakref.WeakKeyDictionary()


def computing_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the model's functions are called with, by canonical name.

    Of a sharded model these are not its parameters between two passes: FSDP makes a whole one of each when it is first
    needed, and gives it memory whenever its module computes. The model is left in that state between two passes.
    """
    names = dict(model.named_parameters())
    if model not in _whole and not any(map(is_sharded, names.values())):
        return names
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.reshard()
    if model not in _whole:
        found: dict[str, nn.Parameter] = {}
        for module in modules:
            module.unshard()
            found |= {name: p for name, p in model.named_parameters() if not is_sharded(p)}
            module.reshard()
        _whole[model] = {name: found[name] for name in names}
    return _whole[model]


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor, the same on all ranks, that lies where ``like`` has its own; all of it if not sharded."""
    if not is_sharded(like):
        return whole.to(like)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.dtype), like.device_mesh, like.placements, src_data_rank=None)  # pyright: ignore


def zeros_of_whole(like: Tensor) -> Tensor:
    """Zeros in the shape that a tensor has on all ranks together."""
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


class Shards(Mapping[str, Tensor]):
    """Sums of squares that lie as a sharded model's parameters do, and what a rank adds to them in one round.

    Attributes:
        row: Parameter name to what this rank has added at certain positions.
    """

    def __init__(self, parts: Sequence[Mapping[str, Tensor]], part: int, positions: Mapping[str, Tensor]) -> None:
        """Add to one of ``parts``; other ranks may add to another in the same round."""
        self.parts, self.part, self.positions = parts, part, positions
        self.row = {name: torch.zeros(len(at)) for name, at in positions.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The first part's sum, for its shape."""
        return self.parts[0][name]

    def __iter__(self) -> Iterator[str]:
        """Parameter names."""
        return iter(self.parts[0])

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self.parts[0])

    def add(self, name: str, squares: Tensor) -> None:
        """Add this rank's squares of a whole parameter; all ranks meet here."""
        self.row[name] += squares.flatten()[self.positions[name].to(squares.device)].cpu().float()
        for number, part in enumerate(self.parts):
            _scatter(squares if number == self.part else torch.zeros_like(squares), part[name])


def _scatter(squares: Tensor, total: Any) -> None:
    """Add the sum over all ranks to a sharded tensor."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = total.device_mesh
    shared = DTensor.from_local(squares, mesh, [Partial()] * mesh.ndim, run_check=False)
    with distributed.together():
        total.to_local().add_(shared.redistribute(placements=total.placements).to_local())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, as an ordinary one that shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore


@contextmanager
def without_warnings_of_views() -> Iterator[None]:
    """FSDP warns of outputs that are views, since somebody might change them in place; we do not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        yield
