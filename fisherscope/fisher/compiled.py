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
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .._typing import Float, Int

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernel.c")


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it cannot be had; one line of the log says so."""
    if sys.platform != "linux":  # elsewhere torch has another OpenMP than compilers, and two do not share the cores
        return None
    try:
        library = _built()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        logger.debug("No kernel for this CPU: %s", said.decode(errors="replace"))
        logger.info("Products of gradients are formed by torch: a C compiler and AVX2 or AVX-512 would be faster.")
        return None
    pointer, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.scratch_size.argtypes = [number, number, pointer, number, threads]
    library.scratch_size.restype = number
    matrices = [pointer, number, number, number, pointer, number, pointer, number]
    library.add_squared_products.argtypes = [*matrices, pointer, number, pointer, threads]
    library.add_squared_products.restype = None
    return library


def _built() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="fisherscope-", ignore_cleanup_errors=True) as folder:
        built = Path(folder, "kernel.so")
        command = [*shlex.split(os.environ.get("CC") or "cc"), "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([*command, str(_SOURCE), "-o", str(built)], check=True, capture_output=True, timeout=60)
        return ctypes.CDLL(str(built))


def can_take(score: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether the kernel, where there is one, can do this: plain float32 on a CPU, one axis of the score contiguous."""
    tensors = (score, left, right)
    plain = all(type(t) is Tensor and t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return plain and 1 in score.stride()


@torch.no_grad()
def accumulate_compiled(
    score: Float[Tensor, "O I"], left: Float[Tensor, "M O"], right: Float[Tensor, "M I"], offsets: Int[Tensor, "bounds"]
) -> None:
    """:func:`~.kernels.accumulate_products` by the compiled kernel, for what it :func:`can_take`; always in float32.

    Raises:
        RuntimeError: If there is no kernel for this CPU.
        ValueError: If the offsets do not increase, or leave the rows.
    """
    library = kernel()
    if library is None:
        raise RuntimeError("The kernel for CPUs needs AVX2 or AVX-512 and a C compiler: the command in CC, or else cc.")
    if score.stride(1) != 1:
        score, left, right = score.T, right, left
    left, right = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (left, right))
    bounds = offsets.cpu().long().unique_consecutive()  # an example without rows adds nothing
    if bounds[0] < 0 or bounds[-1] > len(left) or (bounds.diff() < 0).any():
        raise ValueError(f"Offsets must go up from 0 to {len(left)} rows at most, got {bounds.tolist()}.")
    examples, threads = len(bounds) - 1, torch.get_num_threads()
    scratch = torch.empty(library.scratch_size(*score.shape, bounds.data_ptr(), examples, threads))
    library.add_squared_products(
        score.data_ptr(), score.stride(0), *score.shape, left.data_ptr(), left.stride(0), right.data_ptr(),
        right.stride(0), bounds.data_ptr(), examples, scratch.data_ptr(), threads,
    )  # fmt: skip
