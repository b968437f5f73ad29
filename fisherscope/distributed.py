"""Several processes that share one run: rank, agreement and sums. With one process, nothing here does anything.

``torchrun`` starts the processes and tells them apart by environment variables; :func:`started` joins them. A program
that has made its own process group with ``torch.distributed`` needs nothing more than that.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others; one that ends is noticed at once, so this is for one that hangs."""


@contextmanager
def started(device: str | None = None) -> Iterator[str | None]:
    """Join the processes that ``torchrun`` started, for the length of the block.

    Args:
        device: The device asked for; None means CUDA where there is one.

    Yields:
        The device of this process: of several on one machine, each has the GPU of its own number.

    Raises:
        ValueError: If there are more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield device
        return
    on_gpu = torch.cuda.is_available() and device in (None, "cuda")
    device = _own_gpu() if on_gpu else device or "cpu"
    with together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    yield device
    dist.destroy_process_group()  # not after an error: it would wait for the others


def _own_gpu() -> str:
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"Every process on a machine needs a GPU of its own, but here are {os.environ.get('LOCAL_WORLD_SIZE')} "
            f"processes and {count} GPUs; give torchrun --nproc_per_node {count}, or --device cpu."
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def world_size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files, prints and shows progress."""
    return rank() == 0


def first_says(value: T) -> T:
    """What rank 0 passed, on every rank."""
    return said_by(0, value)


def said_by(speaker: int, value: T) -> T:
    """What one rank passed, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    with together():
        dist.broadcast_object_list(values, src=speaker)
    return values[0]


def all_say(value: T) -> list[T]:
    """What all ranks passed, in their order, on every rank."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        with together():
            dist.all_gather_object(values, value)
    return values


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place, on every rank."""
    if world_size() > 1:
        sent = _sendable(tensor)
        with together():
            dist.all_reduce(sent)
        tensor.copy_(sent)
    return tensor


def sum_at_first(tensor: Tensor) -> Tensor:
    """The sum over all ranks, on rank 0; what the other ranks get means nothing. The tensor itself stays as it is.

    Of a sharded tensor: the whole.
    """
    if world_size() == 1 or is_sharded(tensor):
        return whole(tensor)
    copy = _sendable(tensor.clone())
    with together():
        dist.reduce(copy, dst=0)
    return copy


class Gathered(Mapping[str, Tensor]):
    """Tensors that all ranks make together, one at a time and as rank 0 asks for it; the other ranks send their part.

    Attributes:
        parts: Name to what this rank has.
    """

    def __init__(self, parts: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]) -> None:
        """Gather by one of this module's functions."""
        self.parts, self.gather = parts, gather

    def __getitem__(self, name: str) -> Tensor:
        """One tensor; all ranks meet here."""
        return self.gather(self.parts[name])

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self.parts)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.parts)

    def send(self) -> None:
        """What the other ranks do while rank 0 goes through all items."""
        for name in self:
            self[name]


def shard(model: nn.Module, device: str | None = None) -> None:
    """Spread a model's parameters over all ranks, every numbered block on its own, as ``fully_shard`` does it.

    Args:
        model: The model; it may be in host memory, from where one block after the other goes to the device.
        device: Of this rank.

    Raises:
        ValueError: If there is only one rank.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "A model is sharded over several processes, but there is only one; start the command with torchrun "
            "--nproc_per_node N -m fisherscope."
        )
    mesh = init_device_mesh(torch.device(device or "cpu").type, (world_size(),))
    blocks: list[str] = []
    for name, module in model.named_modules():
        is_numbered = name.rpartition(".")[2].isdigit() and next(module.parameters(), None) is not None
        if is_numbered and not any(name.startswith(f"{outer}.") for outer in blocks):
            blocks.append(name)
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of the tensor: a ``DTensor``, as FSDP2 makes them of parameters."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, for which all ranks meet; any other as it is."""
    if not is_sharded(tensor):
        return tensor
    with together():
        return tensor.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]


def _sendable(tensor: Tensor) -> Tensor:
    """The tensor where the process group can send it from: NCCL alone knows no host memory."""
    return tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor


@contextmanager
def together() -> Iterator[None]:
    """Say plainly that another process is gone; its own message says why."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"Rank {os.environ.get('RANK', '?')} lost the other processes of the run: one of them ended before it was "
            "done; see its message, or start again with --resume."
        ) from error
