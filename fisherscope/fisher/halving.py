"""What to do when memory runs out in the middle of a run: go on with smaller batches, exactly."""

import gc
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..objectives import Batch
from .engines import Engine

logger = logging.getLogger(__name__)


def within_memory(add: Engine, *, rehearse: bool) -> Engine:
    r"""An engine that halves the batch when memory runs out, and goes on: the sums are those of a run that never did.

    An engine adds to a parameter's sum as soon as the parameter's gradients are in, so memory that runs out halfway
    leaves sums that hold part of a batch. A copy of all sums to fall back on would cost as much memory as the sums
    themselves, and time with every batch. Instead:

    - With ``rehearse``, a batch larger in some dimension than every batch so far is first added to throwaway sums,
      which all share the memory of the largest one, since nobody reads them. If it fits, it is added in earnest. With
      batches in random order, the k-th is a new largest one with probability 1/k: some :math:`\ln K` rehearsals for K
      batches, and a single one if the largest comes first.
    - Memory that runs out in earnest before the engine has asked for any sum, in the forward pass or while the loss is
      formed, has changed nothing: the batch is halved as well.
    - Otherwise (another program took the memory since the rehearsal) there is no way back, and the error says so.

    The smaller size is kept for all later batches.

    Args:
        add: The engine; one whose terms are examples or tokens, not whole batches as those of ``squared-batch-mean``.
        rehearse: Whether to rehearse: True on a device of its own memory, unless there is plenty of it.

    Raises:
        MemoryError: By the engine returned, if one example alone is too much, or sums were changed already.
    """
    return _Within(add, rehearse)


class _Within:
    def __init__(self, add: Engine, rehearse: bool) -> None:
        self.add, self.rehearse = add, rehearse
        self.largest: int | None = None
        self.rehearsed: list[dict[str, tuple[int, ...]]] = []

    def __call__(self, batch: Batch, sums: Mapping[str, Tensor]) -> int:
        """As for :class:`Engine`."""
        total = _size(batch)
        used = done = 0
        while done < total:
            part = {name: value[done : done + (self.largest or total)] for name, value in batch.items()}
            if (used_here := self._try(part, sums)) is None:
                self._halve(part)
            else:
                used, done = used + used_here, done + _size(part)
        return used

    def _try(self, batch: Batch, sums: Mapping[str, Tensor]) -> int | None:
        """How many examples were used, or None if memory ran out and the sums are as they were."""
        if self.rehearse and not self._was_rehearsed(batch):
            if self._attempt(batch, _Watched(_throwaway(sums))) is None:
                return None
            self.rehearsed.append({name: tuple(value.shape) for name, value in batch.items()})
        watched = _Watched(sums)
        used = self._attempt(batch, watched)
        if used is None and watched.touched:
            raise MemoryError(
                f"Memory ran out in the middle of a batch of {_size(batch)} examples, after part of it was added; go "
                "on from the last checkpoint (--resume) with less than that as batch size."
            )
        return used

    def _attempt(self, batch: Batch, sums: "_Watched") -> int | None:
        try:
            return self.add(batch, sums)
        except RuntimeError as error:
            if not _ran_out(error):
                raise
        gc.collect()  # here, not above: the error holds the frames, and they hold the activations
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _was_rehearsed(self, batch: Batch) -> bool:
        def covers(shapes: Mapping[str, tuple[int, ...]]) -> bool:
            return shapes.keys() == batch.keys() and all(
                len(shape) == batch[name].ndim and all(a >= b for a, b in zip(shape, batch[name].shape, strict=True))
                for name, shape in shapes.items()
            )

        return any(map(covers, self.rehearsed))

    def _halve(self, batch: Batch) -> None:
        size = _size(batch)
        shape = "x".join(map(str, next(iter(batch.values())).shape[1:])) or "1"
        if size == 1:
            raise MemoryError(
                f"Even a single example of size {shape} does not fit in memory beside the model and its scores; use a "
                "shorter max_length, keep the scores on the host (offload), or a device with more memory."
            )
        self.largest = size // 2
        logger.warning("Out of memory with %d examples of size %s; going on with %d at a time.", size, shape, size // 2)


class _Watched(Mapping[str, Tensor]):
    """Sums that note whether any of them was asked for; in-place kernels leave no other trace on a tensor."""

    def __init__(self, sums: Mapping[str, Tensor]) -> None:
        self.sums, self.touched = sums, False

    def __getitem__(self, name: str) -> Tensor:
        self.touched = True
        return self.sums[name]

    def __contains__(self, name: object) -> bool:
        return name in self.sums

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)


def _throwaway(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums that nobody will read: those of one kind and device share the memory of the largest."""
    sizes: dict[tuple[torch.dtype, torch.device], int] = defaultdict(int)
    for total in sums.values():
        sizes[total.dtype, total.device] = max(sizes[total.dtype, total.device], total.numel())
    buffers = {kind: torch.zeros(size, dtype=kind[0], device=kind[1]) for kind, size in sizes.items()}
    return {name: buffers[t.dtype, t.device][: t.numel()].view(t.shape) for name, t in sums.items()}


def _ran_out(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out; on the host, and in cuBLAS, it has no class of its own."""
    marks = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(mark in str(error) for mark in marks)


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))
