"""Several processes that share one run: rank, agreement and sums. With one process, nothing here does anything.

``torchrun`` starts the processes and tells them apart by environment variables; :func:`started` joins them. A program
that has made its own process group with ``torch.distributed`` needs nothing more than that.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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
    with _together():
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
    if world_size() == 1:
        return value
    values = [value]
    with _together():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place, on every rank."""
    if world_size() > 1:
        sent = _sendable(tensor)
        with _together():
            dist.all_reduce(sent)
        tensor.copy_(sent)
    return tensor


def sum_at_first(tensor: Tensor) -> Tensor:
    """The sum over all ranks, on rank 0; what the other ranks get means nothing. The tensor itself stays as it is."""
    if world_size() == 1:
        return tensor
    copy = _sendable(tensor.clone())
    with _together():
        dist.reduce(copy, dst=0)
    return copy


def _sendable(tensor: Tensor) -> Tensor:
    """The tensor where the process group can send it from: NCCL alone knows no host memory."""
    return tensor.cuda() if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor


@contextmanager
def _together() -> Iterator[None]:
    """Say plainly that another process is gone; its own message says why."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"Rank {os.environ.get('RANK', '?')} lost the other processes of the run: one of them ended before it was "
            "done; see its message, or start again with --resume."
        ) from error
