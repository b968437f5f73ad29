r"""Sums of squared products on a CPU, by ``kernel.c``: a tile of the score stays in registers over each example.

The kernel is compiled when a process first has enough work for it, in a fraction of a second, by the command in ``CC``
or else ``cc``. Where that fails, or the processor has no wide vectors, there is none.

Shape names: M rows of all examples one after the other, O outputs, I inputs.
"""

import ctypes
import functools
import logging
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .._typing import Float, Int

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernel.c")


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it cannot be had."""
    with tempfile.TemporaryDirectory(prefix="fisherscope-", ignore_cleanup_errors=True) as folder:
        built = Path(folder, "kernel.so")
        command = [*shlex.split(os.environ.get("CC", "cc")), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        try:
            subprocess.run([*command, str(_SOURCE), "-o", str(built)], check=True, capture_output=True, timeout=60)
            library = ctypes.CDLL(str(built))
        except (OSError, subprocess.SubprocessError) as error:
            logger.debug("No kernel for this CPU: %s %s", error, getattr(error, "stderr", ""))
            return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    matrices = [pointer, number, number, number, pointer, number, pointer, number]
    library.add_squared_products.argtypes = [*matrices, pointer, number, ctypes.c_int]
    return library


def fits(score: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether the kernel, where there is one, can do this: plain float32 on a CPU, one axis of the score contiguous."""
    tensors = (score, left, right)
    plain = all(type(t) is Tensor and t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return plain and 1 in score.stride()


@torch.no_grad()
def accumulate_compiled(
    score: Float[Tensor, "O I"], left: Float[Tensor, "M O"], right: Float[Tensor, "M I"], offsets: Int[Tensor, "bounds"]
) -> None:
    """:func:`~.kernels.accumulate_products` by the compiled kernel, for what :func:`fits`; it multiplies in float32.

    Raises:
        RuntimeError: If there is no kernel for this CPU.
        MemoryError: If there is no room for a copy of the rows of ``right``.
    """
    library = kernel()
    if library is None:
        raise RuntimeError("The kernel for CPUs needs AVX2 or AVX-512 and a C compiler: the command in CC, or else cc.")
    if score.stride(1) != 1:
        score, left, right = score.T, right, left
    left, right = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (left, right))
    bounds = offsets.long().unique_consecutive()  # an example without rows adds nothing
    if library.add_squared_products(
        score.data_ptr(), score.stride(0), *score.shape, left.data_ptr(), left.stride(0), right.data_ptr(),
        right.stride(0), bounds.data_ptr(), len(bounds) - 1, torch.get_num_threads(),
    ):  # fmt: skip
        raise MemoryError(f"No room for a copy of {tuple(right.shape)} float32 numbers.")
